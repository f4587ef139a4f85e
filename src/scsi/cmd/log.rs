//! LOG SENSE (SPC-5 6.10): the list of log pages, and how much space there is (SBC-4 6.4.5).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::lun::Lun;
use crate::scsi::provisioning::counted;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{U16, U32, len16};

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

/// Pages and subpages.
type PageCode = (u8, u8);
const SUPPORTED: PageCode = (0x00, 0x00);
const SUPPORTED_SUBPAGES: PageCode = (0x00, 0xff);
const PROVISIONING: PageCode = (0x0c, 0x00);

/// The pages of a disk, in the order of codes.
fn pages(lun: &Lun) -> Vec<PageCode> {
    let provisioning = lun.space_watch().map(|_| PROVISIONING);
    [SUPPORTED, SUPPORTED_SUBPAGES].into_iter().chain(provisioning).collect()
}

/// LOG SENSE.
pub(super) fn log_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &LogSense = context.request.cdb.view()?;
    if cdb.parameter_pointer.get() != 0 {
        return Err(ScsiError::cdb_field(5, 7));
    }
    let allocation = cdb.allocation.get().into();
    let pages = pages(context.lun);
    let wanted = (cdb.page & 0x3f, cdb.subpage);
    let bytes = match wanted {
        _ if !pages.contains(&wanted) => {
            let known = pages.iter().any(|(code, _)| *code == wanted.0);
            return Err(if known {
                ScsiError::cdb_field(3, 7)
            } else {
                ScsiError::cdb_field(2, 5)
            });
        }
        SUPPORTED => {
            let codes = pages.iter().filter(|(_, sub)| *sub == 0).map(|(page, _)| *page);
            page(0x00, 0x00, codes.collect())
        }
        SUPPORTED_SUBPAGES => {
            let pairs = pages.iter().flat_map(|(page, sub)| [*page, *sub]);
            page(0x40, 0xff, pairs.collect())
        }
        _ => {
            let lun = Arc::clone(context.lun);
            return super::data_job(context.request, allocation, move |_| provisioning(&lun));
        }
    };
    Ok(Reply::Data { bytes, allocation })
}

fn page(code: u8, subpage: u8, contents: Vec<u8>) -> Vec<u8> {
    let [high, low] = len16(contents.len()).to_bytes();
    let mut page = vec![code, subpage, high, low];
    page.extend(contents);
    page
}

/// A parameter of the Logical Block Provisioning page.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ResourceCount {
    code: U16,
    /// FORMAT AND LINKING 11b: a binary list.
    control: u8,
    length: u8,
    count: U32,
    /// SCOPE: 01b this disk's own, 10b shared with others.
    scope: u8,
    reserved: [u8; 3],
}

/// What is left for the disk, shared with whatever else is on the file system, and what it takes.
fn provisioning(lun: &Lun) -> Result<Vec<u8>, ScsiError> {
    let space =
        lun.store().space().map_err(|e| ScsiError::from_store(e, false, lun.block_size()))?;
    let parameters = space.map(|space| [(1, space.available, 2), (2, space.used, 1)]);
    let contents = parameters.into_iter().flatten().flat_map(|(code, bytes, scope)| {
        let parameter = ResourceCount {
            code: U16::new(code),
            control: 0x03,
            length: 8,
            count: U32::new(counted(bytes)),
            scope,
            reserved: [0; 3],
        };
        parameter.as_bytes().to_vec()
    });
    Ok(page(PROVISIONING.0, PROVISIONING.1, contents.collect()))
}
