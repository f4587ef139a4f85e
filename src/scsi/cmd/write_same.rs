//! WRITE SAME (10, 16, 32) (SBC-4 5.56 ff).

use std::sync::Arc;

use super::rw::BlockCdb;
use super::unmap::{self, Fate};
use super::{Context, JobFn, Reply};
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::sense::{ScsiError, asc};
use crate::store::engine::Cancel;
use crate::store::{Buffers, Durability};

/// Most bytes of one WRITE SAME (VPD B0 MAXIMUM WRITE SAME LENGTH, in blocks there).
pub(super) const MAX_BYTES: u64 = 4 << 30;

/// Bytes that a pattern is written in at a time.
const CHUNK: usize = 1 << 20;

const UNMAP: u8 = 0x08;
const ANCHOR: u8 = 0x10;
const NDOB: u8 = 0x01;

/// A WRITE SAME of any length.
struct WriteSame(BlockCdb);

impl WriteSame {
    fn has(&self, flag: u8) -> bool {
        self.0.flags & flag != 0
    }

    /// UNMAP only where unmapping is offered, ANCHOR only with UNMAP and where there are anchors.
    fn check_flags(&self, lun: &Lun) -> Result<(), ScsiError> {
        if self.has(ANCHOR) && !(self.has(UNMAP) && lun.can_anchor()) {
            return Err(ScsiError::cdb_field(self.0.flags_byte, 4));
        }
        if self.has(UNMAP) && !lun.is_thin() {
            return Err(ScsiError::cdb_field(self.0.flags_byte, 3));
        }
        Ok(())
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

/// WRITE SAME. Zeroes take the cheap way; a payload that is not zero is written whatever UNMAP says.
pub(super) fn write_same(context: Context<'_>) -> Result<Reply, ScsiError> {
    let lun = context.lun;
    let command = WriteSame(BlockCdb::parse(&context.request.cdb)?);
    command.check_flags(lun)?;
    let range = command.range(lun)?;
    let needed = if command.has(NDOB) { 0 } else { lun.block_size() as usize };
    if context.request.data_out.len() < needed {
        return Err(ScsiError::Overrun);
    }
    let block = context.request.data_out.to_vec(needed);
    let job = match (block.iter().all(|byte| *byte == 0), command.has(UNMAP)) {
        (true, true) if !command.has(ANCHOR) => {
            unmap::job(lun, vec![range], Fate::Deallocated, needed)
        }
        (true, _) => unmap::job(lun, vec![range], Fate::Anchored, needed),
        (false, _) => pattern(lun, range, block),
    };
    Ok(Reply::Job(job))
}

/// Writes the block over and over, many at a time.
fn pattern(lun: &Arc<Lun>, range: ByteRange, block: Vec<u8>) -> JobFn {
    let lun = Arc::clone(lun);
    Box::new(move |cancel: &Cancel| {
        let whole = usize::try_from(range.end - range.start).unwrap_or(CHUNK).min(CHUNK);
        let chunk = Buffers::zeroed(whole).ok_or(ScsiError::Busy)?;
        let mut filled = 0;
        while filled < whole {
            filled += chunk.write_at(filled, &block);
        }
        let mut at = range.start;
        while at < range.end {
            if cancel.is_requested() {
                return Err(ScsiError::Aborted);
            }
            let len = usize::try_from(range.end - at).unwrap_or(whole).min(whole);
            lun.store()
                .write(at, &chunk.slice(0, len), Durability::Cached)
                .map_err(|e| ScsiError::from_store(e, true, lun.block_size()))?;
            at += len as u64;
        }
        lun.settle(lun.durability(false))?;
        Ok(block.len())
    })
}
