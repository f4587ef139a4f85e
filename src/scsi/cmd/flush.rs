//! SYNCHRONIZE CACHE and PRE-FETCH (10, 16) (SBC-4 5.33, 5.13).

use super::rw::BlockCdb;
use super::{Context, Reply};
use crate::scsi::sense::ScsiError;
use crate::store::Operation;

/// SYNCHRONIZE CACHE. The whole disk is flushed whatever the range says; with IMMED too the answer
/// comes when that is done, which is later than an initiator may ask for, but never a lie.
pub(super) fn synchronize_cache(context: Context<'_>) -> Result<Reply, ScsiError> {
    check_inside(&context)?;
    Ok(Reply::Transfer(Operation::Flush, 0))
}

/// PRE-FETCH. Answered GOOD: CONDITION MET would promise that all the blocks fit the cache.
pub(super) fn prefetch(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (lba, blocks) = check_inside(&context)?;
    let block = u64::from(context.lun.block_size());
    Ok(Reply::Transfer(Operation::Prefetch { offset: lba * block, len: blocks * block }, 0))
}

/// The range, of any length: none of these commands moves data. Zero blocks reach to the end.
fn check_inside(context: &Context<'_>) -> Result<(u64, u64), ScsiError> {
    let cdb = BlockCdb::parse(&context.request.cdb)?;
    let capacity = context.lun.blocks();
    let end = cdb.lba.checked_add(cdb.blocks).ok_or(ScsiError::LBA_OUT_OF_RANGE)?;
    if end > capacity {
        return Err(ScsiError::LBA_OUT_OF_RANGE);
    }
    Ok((cdb.lba, if cdb.blocks == 0 { capacity - cdb.lba } else { cdb.blocks }))
}
