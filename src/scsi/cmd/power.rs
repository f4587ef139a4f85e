//! TEST UNIT READY, START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL (SPC-5 6.50, SBC-4 5.31, 5.17).

use std::sync::Arc;

use super::{Context, Reply};
use crate::scsi::sense::ScsiError;

/// TEST UNIT READY: the table has the disk checked before this.
pub(super) fn test_unit_ready(_: Context<'_>) -> Result<Reply, ScsiError> {
    Ok(Reply::Good)
}

/// START STOP UNIT. Stopping flushes the cache first, unless NO_FLUSH says not to. There is no power
/// condition but active and stopped, and no medium to load or eject.
pub(super) fn start_stop_unit(context: Context<'_>) -> Result<Reply, ScsiError> {
    let flags = context.request.cdb.byte(4);
    let (power_condition, no_flush) = (flags >> 4, flags & 0x04 != 0);
    let (loej, start) = (flags & 0x02 != 0, flags & 0x01 != 0);
    if context.request.cdb.byte(3) != 0 {
        return Err(ScsiError::cdb_field(3, 3));
    }
    if power_condition != 0 {
        return Err(ScsiError::cdb_field(4, 7));
    }
    if loej {
        return Err(ScsiError::cdb_field(4, 1));
    }
    let lun = Arc::clone(context.lun);
    if start || no_flush {
        lun.stop_or_start(start);
        return Ok(Reply::Good);
    }
    Ok(Reply::Job(Box::new(move |cancel| {
        if cancel.is_requested() {
            return Err(ScsiError::Aborted);
        }
        lun.flush()?;
        lun.stop_or_start(false);
        Ok(0)
    })))
}

/// PREVENT ALLOW MEDIUM REMOVAL: the medium of this disk cannot be removed anyway.
pub(super) fn prevent_allow(_: Context<'_>) -> Result<Reply, ScsiError> {
    Ok(Reply::Good)
}
