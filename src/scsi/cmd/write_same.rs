//! WRITE SAME (10, 16, 32) (SBC-4 5.56 ff).

use super::rw::BlockCdb;
use super::{Context, Reply, unmap};
use crate::scsi::fill::Fill;
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::sense::{ScsiError, asc};

/// Most bytes of one WRITE SAME (VPD B0 MAXIMUM WRITE SAME LENGTH, in blocks there).
pub(super) const MAX_BYTES: u64 = 4 << 30;

const UNMAP: u8 = 0x08;
const ANCHOR: u8 = 0x10;
const NDOB: u8 = 0x01;

/// A WRITE SAME of any length.
struct WriteSame(BlockCdb);

impl WriteSame {
    fn has(&self, flag: u8) -> bool {
        self.0.flags & flag != 0
    }

    /// ANCHOR only with UNMAP. (The table knows which disks have them.)
    fn check_flags(&self) -> Result<(), ScsiError> {
        match self.has(ANCHOR) && !self.has(UNMAP) {
            true => Err(ScsiError::cdb_field(self.0.flags_byte, 4)),
            false => Ok(()),
        }
    }

    /// The range; zero blocks reach to the last one (WSNZ is zero).
    fn range(&self, lun: &Lun) -> Result<ByteRange, ScsiError> {
        let rest = lun.blocks().checked_sub(self.0.lba).ok_or(ScsiError::LBA_OUT_OF_RANGE)?;
        let blocks = if self.0.blocks == 0 { rest } else { self.0.blocks };
        let range = lun.bytes(self.0.lba, blocks)?;
        match range.end - range.start > MAX_BYTES {
            true => Err(ScsiError::illegal(asc::INVALID_FIELD_IN_CDB)),
            false => Ok(range),
        }
    }
}

/// WRITE SAME. A payload that is not zero is written whatever UNMAP says; so are zeroes without UNMAP where initiators can
/// ask which blocks are mapped, as theirs are (SBC-4 4.7.4). Elsewhere these take the cheap way.
pub(super) fn write_same(context: Context<'_>) -> Result<Reply, ScsiError> {
    let lun = context.lun;
    let command = WriteSame(BlockCdb::parse(&context.request.cdb)?);
    command.check_flags()?;
    let range = command.range(lun)?;
    let needed = if command.has(NDOB) { 0 } else { lun.block_size() as usize };
    let mut block = context.data_out(needed)?.to_vec(needed);
    block.resize(lun.block_size() as usize, 0);
    let zero = block.iter().all(|byte| *byte == 0);
    let fill = match (zero, command.has(UNMAP)) {
        (true, true) if !command.has(ANCHOR) => Fill::Deallocated,
        (true, true) => Fill::Anchored,
        (true, false) if !lun.is_thin() => Fill::Anchored,
        _ => Fill::Pattern(block),
    };
    Ok(unmap::job(lun, vec![range], fill, needed))
}
