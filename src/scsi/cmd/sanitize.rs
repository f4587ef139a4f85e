//! SANITIZE (SBC-4 5.30): the former contents of all blocks cannot be read any more. It is the disk's
//! blocks that are erased or overwritten: what the host's file system keeps elsewhere of them (a
//! snapshot, a clone, freed space) is out of reach.

use std::sync::Arc;

use super::{Context, Reply};
use crate::scsi::background::{self, Work};
use crate::scsi::fill::Fill;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::Cdb;

const IMMED: u8 = 0x80;
const AUSE: u8 = 0x20;

/// INVERT and OVERWRITE COUNT of the parameter list's first byte.
const INVERT: u8 = 0x80;
const COUNT: u8 = 0x1f;

/// Bytes of the parameter list before the pattern.
const HEADER: usize = 4;

fn parameter_list_length(cdb: &Cdb) -> usize {
    u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]).into()
}

/// Service actions without a parameter list.
fn check_no_list(cdb: &Cdb) -> Result<(), ScsiError> {
    match parameter_list_length(cdb) {
        0 => Ok(()),
        _ => Err(ScsiError::cdb_field(7, 7)),
    }
}

/// SANITIZE with BLOCK ERASE: all space is given back.
pub(super) fn block_erase(context: Context<'_>) -> Result<Reply, ScsiError> {
    check_no_list(&context.request.cdb)?;
    let fill = if context.lun.is_thin() { Fill::Deallocated } else { Fill::Anchored };
    start(&context, fill, 1, false, 0)
}

/// SANITIZE with OVERWRITE.
pub(super) fn overwrite(context: Context<'_>) -> Result<Reply, ScsiError> {
    let block = context.lun.block_size() as usize;
    let len = parameter_list_length(&context.request.cdb);
    if !(HEADER + 1..=HEADER + block).contains(&len) {
        return Err(ScsiError::cdb_field(7, 7));
    }
    let list = context.data_out(len)?.to_vec(len);
    let [flags, reserved, high, low, pattern @ ..] = list.as_slice() else {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    };
    let wrong = |byte, bit| Err(ScsiError::parameter_field(byte, bit));
    if flags & !(INVERT | COUNT) != 0 {
        // TEST asks for passes that the vendor defines: there are none.
        return wrong(0, Some(6));
    }
    if flags & COUNT == 0 {
        return wrong(0, Some(4));
    }
    if *reserved != 0 {
        return wrong(1, None);
    }
    let pattern_len = usize::from(u16::from_be_bytes([*high, *low]));
    let pattern = match pattern_len {
        0 => return wrong(2, None),
        len => match pattern.get(..len) {
            Some(pattern) => pattern,
            None => return wrong(2, None),
        },
    };
    // Written even if it is zero: that is what overwriting is.
    let block = pattern.iter().copied().cycle().take(block).collect();
    start(&context, Fill::Pattern(block), flags & COUNT, flags & INVERT != 0, len)
}

/// SANITIZE with EXIT FAILURE MODE.
pub(super) fn exit_failure_mode(context: Context<'_>) -> Result<Reply, ScsiError> {
    check_no_list(&context.request.cdb)?;
    let lun = Arc::clone(context.lun);
    Ok(Reply::Job(Box::new(move |_| lun.background().exit_failure_mode(&lun).map(|()| 0))))
}

fn start(
    context: &Context<'_>,
    fill: Fill,
    passes: u8,
    invert: bool,
    consumed: usize,
) -> Result<Reply, ScsiError> {
    let flags = context.request.cdb.byte(1);
    let (immediate, unrestricted_exit) = (flags & IMMED != 0, flags & AUSE != 0);
    if immediate && !background::is_remembered(context.lun) {
        return Err(ScsiError::cdb_field(1, 7));
    }
    let (target, lun) = (Arc::clone(context.target), Arc::clone(context.lun));
    let work = Work::Sanitize { fill, passes, invert, unrestricted_exit };
    Ok(Reply::Job(Box::new(move |cancel| {
        let disk = Arc::clone(&lun);
        let started = background::start(&lun, work, move || target.clear(&disk))?;
        if !immediate {
            lun.background().wait(started, cancel)?;
        }
        Ok(consumed)
    })))
}
