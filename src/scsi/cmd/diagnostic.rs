//! SEND DIAGNOSTIC and RECEIVE DIAGNOSTIC RESULTS (SPC-5 6.42, 6.30), READ DEFECT DATA (SBC-4 5.20 f): the disk looks
//! after itself, and has no defects that it knows of.

use std::sync::Arc;

use super::{Context, Reply, wire};
use crate::scsi::lun::Lun;
use crate::scsi::sense::{Key, ScsiError, Sense, asc};
use crate::scsi::statistics::SelfTest;
use crate::store::Buffers;

const PF: u8 = 0x10;
const SELFTEST: u8 = 0x04;

/// The one diagnostic page: the list of pages.
const PAGE: [u8; 5] = [0x00, 0, 0, 1, 0x00];

/// SEND DIAGNOSTIC: a self-test, or the page that says which pages there are.
pub(super) fn send_diagnostic(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let flags = cdb.byte(1);
    let (code, selftest) = (flags >> 5, flags & SELFTEST != 0);
    let len = usize::from(u16::from_be_bytes([cdb.byte(3), cdb.byte(4)]));
    if selftest || code != 0 {
        // SELFTEST is the default test; the codes are for others, and either goes without a list.
        if selftest && code != 0 {
            return Err(ScsiError::cdb_field(1, 7));
        }
        if len != 0 {
            return Err(ScsiError::cdb_field(3, 7));
        }
        return self_test(context.lun, code);
    }
    if len == 0 {
        return Ok(Reply::Good);
    }
    if flags & PF == 0 {
        return Err(ScsiError::cdb_field(1, 4));
    }
    match context.data_out(len)?.to_vec(len.min(8)).as_slice() {
        [0x00, _, 0, 0] => Ok(Reply::Consumed(len)),
        [_, _, _, _, ..] => Err(ScsiError::parameter_field(0, None)),
        _ => Err(ScsiError::PARAMETER_LIST_LENGTH),
    }
}

/// BACKGROUND SHORT and EXTENDED, FOREGROUND SHORT and EXTENDED self-test. The default test is like a short one in
/// the foreground. There is never one to abort (100b) when the command comes to be looked at: all are short.
fn self_test(lun: &Arc<Lun>, code: u8) -> Result<Reply, ScsiError> {
    let on = Arc::clone(lun);
    match code {
        0b001 | 0b010 => {
            // One at a time: what runs behind commands that have ended is bounded by nothing else.
            if !lun.statistics().begin_self_test() {
                let busy = Sense::new(Key::NotReady, asc::NOT_READY_SELF_TEST_IN_PROGRESS);
                return Err(ScsiError::Check(busy));
            }
            let begun = lun.store().pool().run(Box::new(move || {
                // What came of it is told by log page 10h.
                let _ = run_test(&on, code);
                on.statistics().end_self_test();
            }));
            if begun.is_err() {
                lun.statistics().end_self_test();
                return Err(ScsiError::Busy);
            }
            Ok(Reply::Good)
        }
        0b000 | 0b101 | 0b110 => Ok(Reply::Job(Box::new(move |cancel| {
            if cancel.is_requested() {
                return Err(ScsiError::Aborted);
            }
            run_test(&on, code).map(|()| 0)
        }))),
        _ => Err(ScsiError::cdb_field(1, 7)),
    }
}

/// Whether what was written can be made stable, and the first, a middle and the last block be read from the medium.
fn run_test(lun: &Lun, code: u8) -> Result<(), ScsiError> {
    let block = u64::from(lun.block_size());
    let last = lun.blocks().saturating_sub(1);
    let room = Buffers::zeroed(lun.block_size() as usize).ok_or(ScsiError::Busy)?;
    // What the blocks hold does not matter, so that whoever has them for himself is not waited for.
    let store = lun.exclusion().unguarded();
    let can = |lba: &u64| store.read_medium(lba * block, &room).is_ok();
    let flushed = lun.flush().is_ok();
    let failed = [0, last / 2, last].into_iter().filter(|_| flushed).find(|lba| !can(lba));
    let hours = u16::try_from(lun.statistics().minutes() / 60).unwrap_or(u16::MAX);
    // The first and the second segment of the test.
    let result = match (flushed, failed) {
        (true, None) => 0,
        (false, _) => 0x5,
        (true, Some(_)) => 0x6,
    };
    lun.statistics().note_self_test(SelfTest { code, result, hours, failed });
    match result {
        0 => Ok(()),
        _ => {
            let failed = asc::LOGICAL_UNIT_FAILED_SELF_TEST;
            Err(ScsiError::Check(Sense::new(Key::HardwareError, failed)))
        }
    }
}

/// RECEIVE DIAGNOSTIC RESULTS: there is only the list of pages, asked for (PCV) or not.
pub(super) fn receive_results(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    if cdb.byte(2) != 0 {
        return Err(ScsiError::cdb_field(2, 7));
    }
    let allocation = u16::from_be_bytes([cdb.byte(3), cdb.byte(4)]).into();
    Ok(Reply::Data { bytes: PAGE.to_vec(), allocation })
}

/// REQ_PLIST, REQ_GLIST and the format, which come back as what they are valid for.
fn lists(byte: u8, at: u16) -> Result<u8, ScsiError> {
    match byte & 0x07 {
        // Short and long block, bytes from index, physical sector: of each of these there are none.
        0 | 3 | 4 | 5 => Ok(byte & 0x1f),
        _ => Err(ScsiError::cdb_field(at, 2)),
    }
}

/// READ DEFECT DATA(10): both lists are empty.
pub(super) fn defect_data_10(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let bytes = vec![0, lists(cdb.byte(2), 2)?, 0, 0];
    Ok(Reply::Data { bytes, allocation: u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]).into() })
}

/// READ DEFECT DATA(12).
pub(super) fn defect_data_12(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let bytes = vec![0, lists(cdb.byte(1), 1)?, 0, 0, 0, 0, 0, 0];
    let length = [cdb.byte(6), cdb.byte(7), cdb.byte(8), cdb.byte(9)];
    Ok(Reply::Data { bytes, allocation: wire::allocation(u32::from_be_bytes(length)) })
}
