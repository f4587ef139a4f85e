//! LOG SENSE (SPC-5 6.10): the list of log pages.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::U16;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LogSense {
    opcode: u8,
    sp: u8,
    /// Page control and page code.
    page: u8,
    subpage: u8,
    reserved: u8,
    parameter_pointer: U16,
    allocation: U16,
    control: u8,
}

/// Pages and subpages there are.
const PAGES: &[(u8, u8)] = &[(0x00, 0x00), (0x00, 0xff)];

/// LOG SENSE.
pub(super) fn log_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &LogSense = context.request.cdb.view()?;
    if cdb.parameter_pointer.get() != 0 {
        return Err(ScsiError::cdb_field(5, 7));
    }
    let bytes = match (cdb.page & 0x3f, cdb.subpage) {
        // Supported log pages: codes only. Supported log pages and subpages: pairs.
        (0x00, 0x00) => {
            let codes = PAGES.iter().filter(|(_, sub)| *sub == 0).map(|(page, _)| *page);
            page(0x00, 0x00, codes.collect())
        }
        (0x00, 0xff) => {
            let pairs = PAGES.iter().flat_map(|(page, sub)| [*page, *sub]);
            page(0x40, 0xff, pairs.collect())
        }
        (0x00, _) => return Err(ScsiError::cdb_field(3, 7)),
        _ => return Err(ScsiError::cdb_field(2, 5)),
    };
    Ok(Reply::Data { bytes, allocation: cdb.allocation.get().into() })
}

fn page(code: u8, subpage: u8, contents: Vec<u8>) -> Vec<u8> {
    let [high, low] = crate::scsi::wire::len16(contents.len()).to_bytes();
    let mut page = vec![code, subpage, high, low];
    page.extend(contents);
    page
}
