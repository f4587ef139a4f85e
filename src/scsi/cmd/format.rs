//! FORMAT UNIT (SBC-4 5.4): all blocks get their first contents again, and a thin disk is thin again.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::background::{self, Work};
use crate::scsi::fill::Fill;
use crate::scsi::lun::Lun;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{Cdb, U16};
use crate::store::Buffers;

const LONGLIST: u8 = 0x20;
const FMTDATA: u8 = 0x10;

/// FOV, DPRY, DCRT, STPF: how to deal with defects. There are none, so that any wish is met.
const DEFECT_OPTIONS: u8 = 0x70;
const FOV: u8 = 0x80;
const IP: u8 = 0x08;
const IMMED: u8 = 0x02;

/// What the initialization pattern descriptor begins with.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Pattern {
    /// SI and obsolete bits.
    flags: u8,
    kind: u8,
    length: U16,
}

/// FORMAT UNIT. Neither the block size nor the capacity changes, and there are no defects to manage.
pub(super) fn format_unit(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (lun, cdb) = (context.lun, &context.request.cdb);
    let default = if lun.is_thin() { Fill::Deallocated } else { Fill::Anchored };
    let (fill, immediate, consumed) = match cdb.byte(1) & FMTDATA {
        0 => (default, false, 0),
        _ => parse(lun, cdb, &context.request.data_out, default)?,
    };
    let (target, lun) = (Arc::clone(context.target), Arc::clone(lun));
    Ok(Reply::Job(Box::new(move |cancel| {
        let disk = Arc::clone(&lun);
        let started = background::start(&lun, Work::Format(fill), move || target.clear(&disk))?;
        if !immediate {
            lun.background().wait(started, cancel)?;
        }
        Ok(consumed)
    })))
}

/// Contents, IMMED and length of the parameter list.
fn parse(
    lun: &Lun,
    cdb: &Cdb,
    data_out: &Buffers,
    default: Fill,
) -> Result<(Fill, bool, usize), ScsiError> {
    let long = cdb.byte(1) & LONGLIST != 0;
    let header = if long { 8 } else { 4 };
    // The list says itself how long it is; there is no more of it than a pattern descriptor.
    let most = header + size_of::<Pattern>() + lun.block_size() as usize;
    let list = data_out.to_vec(most);
    let byte = |n: usize| list.get(n).copied().ok_or(ScsiError::Overrun);
    let defects_at: u16 = if long { 4 } else { 2 };
    let wrong = |byte: u16, bit| Err(ScsiError::parameter_field(byte, bit));
    let flags = byte(1)?;
    byte(header - 1)?;
    let defects = list.get(usize::from(defects_at)..header).unwrap_or_default();
    if byte(0)? & 0x07 != 0 {
        return wrong(0, Some(2));
    }
    if flags & FOV == 0 && flags & DEFECT_OPTIONS != 0 {
        return wrong(1, Some(7));
    }
    if long && byte(3)? != 0 {
        return wrong(3, None);
    }
    if defects.iter().any(|byte| *byte != 0) {
        return wrong(defects_at, None);
    }
    let immediate = flags & IMMED != 0;
    if immediate && !background::is_remembered(lun) {
        return wrong(1, Some(1));
    }
    if flags & IP == 0 {
        return Ok((default, immediate, header));
    }
    if flags & FOV == 0 {
        return wrong(1, Some(7));
    }
    let (fill, len) = pattern(lun, list.get(header..).unwrap_or_default(), header, default)?;
    Ok((fill, immediate, header + len))
}

/// The initialization pattern descriptor, at byte `at` of the list: contents, and its length.
fn pattern(lun: &Lun, bytes: &[u8], at: usize, default: Fill) -> Result<(Fill, usize), ScsiError> {
    let (head, rest) = Pattern::ref_from_prefix(bytes).map_err(|_| ScsiError::Overrun)?;
    let wrong = |byte: usize, bit| {
        Err(ScsiError::parameter_field(u16::try_from(at + byte).unwrap_or(u16::MAX), bit))
    };
    // SI: space that is not the disk's any more cannot be reached from here.
    if let Some(bit) = head.flags.checked_ilog2() {
        return wrong(0, u8::try_from(bit).ok());
    }
    let block = lun.block_size() as usize;
    let length = usize::from(head.length.get());
    match head.kind {
        0 if length == 0 => Ok((default, size_of::<Pattern>())),
        1 if (1..=block).contains(&length) => {
            let pattern = rest.get(..length).ok_or(ScsiError::Overrun)?;
            Ok((filled(pattern, block), size_of::<Pattern>() + length))
        }
        0 | 1 => wrong(2, None),
        _ => wrong(1, None),
    }
}

/// A block of copies of a pattern, the last cut off; zeroes take the cheap way.
pub(super) fn filled(pattern: &[u8], block: usize) -> Fill {
    let block: Vec<u8> = pattern.iter().copied().cycle().take(block).collect();
    match block.iter().all(|byte| *byte == 0) {
        true => Fill::Anchored,
        false => Fill::Pattern(block),
    }
}
