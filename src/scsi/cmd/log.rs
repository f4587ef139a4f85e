//! LOG SENSE and LOG SELECT (SPC-5 6.9, 6.8): what the disk has counted, and how much space there is (SBC-4 6.4.5).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::UnitAttention;
use crate::scsi::lun::Lun;
use crate::scsi::provisioning::counted;
use crate::scsi::sense::ScsiError;
use crate::scsi::statistics::{Activity, CLIENT_BYTES, CLIENT_PARAMETERS, SELF_TESTS};
use crate::scsi::wire::{U16, len8, len16};

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

/// Page and subpage.
type PageCode = (u8, u8);
const SUPPORTED: PageCode = (0x00, 0x00);
const SUPPORTED_SUBPAGES: PageCode = (0x00, 0xff);
const WRITE_ERRORS: PageCode = (0x02, 0x00);
const READ_ERRORS: PageCode = (0x03, 0x00);
const VERIFY_ERRORS: PageCode = (0x05, 0x00);
const PROVISIONING: PageCode = (0x0c, 0x00);
const TEMPERATURE: PageCode = (0x0d, 0x00);
const START_STOP: PageCode = (0x0e, 0x00);
const CLIENT: PageCode = (0x0f, 0x00);
const SELF_TEST: PageCode = (0x10, 0x00);
const BACKGROUND_SCAN: PageCode = (0x15, 0x00);
const STATISTICS: PageCode = (0x19, 0x00);
const EXCEPTIONS: PageCode = (0x2f, 0x00);

/// The pages of a disk, in the order of codes.
fn pages(lun: &Lun) -> Vec<PageCode> {
    let all = [
        SUPPORTED,
        SUPPORTED_SUBPAGES,
        WRITE_ERRORS,
        READ_ERRORS,
        VERIFY_ERRORS,
        PROVISIONING,
        TEMPERATURE,
        START_STOP,
        CLIENT,
        SELF_TEST,
        BACKGROUND_SCAN,
        STATISTICS,
        EXCEPTIONS,
    ];
    let there = |page: &PageCode| *page != PROVISIONING || lun.space_watch().is_some();
    all.into_iter().filter(there).collect()
}

/// Which of the fields that name a page is wrong, if there is no such page.
fn check_page(lun: &Lun, wanted: PageCode) -> Result<(), ScsiError> {
    let pages = pages(lun);
    if pages.contains(&wanted) {
        return Ok(());
    }
    let known = pages.iter().any(|(code, _)| *code == wanted.0);
    Err(if known { ScsiError::cdb_field(3, 7) } else { ScsiError::cdb_field(2, 5) })
}

/// LOG SENSE. SP must be zero, as nothing is saved. There are no thresholds: whichever values are asked for (PC), they
/// are the cumulative ones.
pub(super) fn log_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &LogSense = context.request.cdb.view()?;
    let (allocation, first) = (cdb.allocation.get().into(), cdb.parameter_pointer.get());
    let wanted = (cdb.page & 0x3f, cdb.subpage);
    let lun = context.lun;
    check_page(lun, wanted)?;
    let parameters = match wanted {
        SUPPORTED | SUPPORTED_SUBPAGES if first != 0 => return Err(ScsiError::cdb_field(5, 7)),
        SUPPORTED => {
            let codes = pages(lun).into_iter().filter(|(_, sub)| *sub == 0).map(|(page, _)| page);
            return Ok(Reply::Data { bytes: page(wanted, codes.collect()), allocation });
        }
        SUPPORTED_SUBPAGES => {
            let pairs = pages(lun).into_iter().flat_map(|(page, sub)| [page, sub]);
            return Ok(Reply::Data { bytes: page(wanted, pairs.collect()), allocation });
        }
        PROVISIONING => {
            let lun = Arc::clone(lun);
            let make = move |_: &_| from(first, PROVISIONING, provisioning(&lun)?);
            return super::data_job(context.request, allocation, make);
        }
        WRITE_ERRORS => errors(lun, Activity::Write),
        READ_ERRORS => errors(lun, Activity::Read),
        VERIFY_ERRORS => errors(lun, Activity::Verify),
        TEMPERATURE => temperature(),
        START_STOP => start_stop(lun),
        CLIENT => client(lun),
        SELF_TEST => self_tests(lun),
        BACKGROUND_SCAN => background_scan(lun),
        STATISTICS => statistics(lun),
        _ => exceptions(),
    };
    Ok(Reply::Data { bytes: from(first, wanted, parameters)?, allocation })
}

/// A parameter: its code, its control byte, and what it holds.
struct Parameter(u16, u8, Vec<u8>);

/// FORMAT AND LINKING 00b: a counter, without bounds.
const COUNTER: u8 = 0x00;
/// 01b: ASCII. 11b: binary. As lists, which are not counted.
const ASCII: u8 = 0x01;
const BINARY: u8 = 0x03;

/// A page from this parameter on (PARAMETER POINTER).
fn from(first: u16, code: PageCode, parameters: Vec<Parameter>) -> Result<Vec<u8>, ScsiError> {
    if parameters.last().is_none_or(|last| last.0 < first) && first != 0 {
        return Err(ScsiError::cdb_field(5, 7));
    }
    let contents = parameters.into_iter().filter(|parameter| parameter.0 >= first);
    let contents = contents.flat_map(|Parameter(code, control, bytes)| {
        let [high, low] = code.to_be_bytes();
        [vec![high, low, control, len8(bytes.len())], bytes].concat()
    });
    Ok(page(code, contents.collect()))
}

fn page((code, subpage): PageCode, contents: Vec<u8>) -> Vec<u8> {
    let [high, low] = len16(contents.len()).to_bytes();
    // SPF; DS: nothing of it is saved.
    let format = if subpage == 0 { 0x80 } else { 0xc0 };
    let mut page = vec![format | code, subpage, high, low];
    page.extend(contents);
    page
}

/// Total bytes processed, and total uncorrected errors; nothing is corrected (SPC-5 7.3.8).
fn errors(lun: &Lun, activity: Activity) -> Vec<Parameter> {
    let count = lun.statistics().total(activity);
    let counter = |code, number: u64| Parameter(code, COUNTER, number.to_be_bytes().to_vec());
    vec![counter(3, 0), counter(5, count.bytes), counter(6, count.errors)]
}

/// A file has no temperature: FFh says so.
fn temperature() -> Vec<Parameter> {
    vec![Parameter(0, BINARY, vec![0, 0xff]), Parameter(1, BINARY, vec![0, 0xff])]
}

/// Dates that are not known are spaces (SPC-5 7.3.22).
fn start_stop(lun: &Lun) -> Vec<Parameter> {
    let stops = u32::try_from(lun.statistics().stops()).unwrap_or(u32::MAX);
    vec![
        Parameter(1, ASCII, b"      ".to_vec()),
        Parameter(2, ASCII, b"      ".to_vec()),
        Parameter(3, BINARY, vec![0; 4]),
        Parameter(4, BINARY, stops.to_be_bytes().to_vec()),
    ]
}

fn client(lun: &Lun) -> Vec<Parameter> {
    let parameter = |code| Parameter(code, BINARY, lun.statistics().client_parameter(code));
    (0..CLIENT_PARAMETERS).map(parameter).collect()
}

/// The last twenty; what is not there yet is zero (SPC-5 7.3.19).
fn self_tests(lun: &Lun) -> Vec<Parameter> {
    let tests = lun.statistics().self_tests();
    let result = |code: u16| {
        let test = tests.get(usize::from(code - 1));
        let bytes = test.map_or(vec![0; 16], |test| {
            let lba = test.failed.unwrap_or(u64::MAX);
            let mut bytes = vec![test.code << 5 | test.result, 0];
            bytes.extend(test.hours.to_be_bytes());
            bytes.extend(lba.to_be_bytes());
            let failed = test.failed.map_or([0, 0, 0, 0], |_| [0x03, 0x11, 0x00, 0]);
            bytes.extend(failed);
            bytes
        });
        Parameter(code, BINARY, bytes)
    };
    let count = u16::try_from(SELF_TESTS).unwrap_or(0);
    (1..=count).map(result).collect()
}

/// Power on minutes; no scan was ever made.
fn background_scan(lun: &Lun) -> Vec<Parameter> {
    let minutes = u32::try_from(lun.statistics().minutes()).unwrap_or(u32::MAX);
    let mut status = minutes.to_be_bytes().to_vec();
    status.resize(12, 0);
    vec![Parameter(0, BINARY, status)]
}

/// Commands and blocks; times are not taken (SPC-5 7.3.10).
fn statistics(lun: &Lun) -> Vec<Parameter> {
    let (read, written) =
        (lun.statistics().total(Activity::Read), lun.statistics().total(Activity::Write));
    let block = u64::from(lun.block_size());
    let numbers =
        [read.commands, written.commands, written.bytes / block, read.bytes / block, 0, 0, 0, 0];
    let numbers = numbers.iter().flat_map(|n| n.to_be_bytes()).collect();
    // Idle time, and the interval of which that is a number: none.
    vec![
        Parameter(1, BINARY, numbers),
        Parameter(2, BINARY, vec![0; 8]),
        Parameter(3, BINARY, vec![0; 8]),
    ]
}

/// There are no informational exceptions (DEXCPT), and there is no temperature.
fn exceptions() -> Vec<Parameter> {
    vec![Parameter(0, BINARY, vec![0, 0, 0xff, 0])]
}

/// PCR and SP of LOG SELECT.
const PCR: u8 = 0x02;
const SP: u8 = 0x01;

/// LOG SELECT: begins counting anew, or leaves something on the application client page.
pub(super) fn log_select(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let (flags, wanted) = (cdb.byte(1), (cdb.byte(2) & 0x3f, cdb.byte(3)));
    let len = usize::from(u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]));
    if flags & SP != 0 {
        return Err(ScsiError::cdb_field(1, 0));
    }
    if wanted != (0, 0) && (len != 0 || flags & PCR != 0 && wanted.1 != 0) {
        // A list names its pages itself (SPC-5 6.8).
        return Err(ScsiError::cdb_field(2, 5));
    }
    if flags & PCR != 0 {
        if len != 0 {
            return Err(ScsiError::cdb_field(1, 1));
        }
        if wanted != SUPPORTED {
            check_page(context.lun, wanted)?;
        }
        reset(context.lun, wanted);
    } else {
        for (code, bytes) in client_parameters(&context.data_out(len)?.to_vec(len))? {
            context.lun.statistics().set_client_parameter(code, bytes);
        }
    }
    if len != 0 || flags & PCR != 0 {
        let nexus = Some(context.nexus.as_ref());
        context.target.announce(context.lun, UnitAttention::LogParametersChanged, nexus);
    }
    Ok(Reply::Consumed(len))
}

/// Counters are zero again; of one page, or of all (page 0).
fn reset(lun: &Lun, wanted: PageCode) {
    let of = |page| wanted == page || wanted == SUPPORTED;
    let statistics = lun.statistics();
    for (page, activity) in [
        (WRITE_ERRORS, Activity::Write),
        (READ_ERRORS, Activity::Read),
        (VERIFY_ERRORS, Activity::Verify),
    ] {
        if of(page) || wanted == STATISTICS && page != VERIFY_ERRORS {
            statistics.reset(activity);
        }
    }
    if of(CLIENT) {
        statistics.clear_client_parameters();
    }
}

/// What a list of pages wants to be left: only the application client page takes anything.
fn client_parameters(list: &[u8]) -> Result<Vec<(u16, Vec<u8>)>, ScsiError> {
    let at = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    let mut found = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let here = list.len() - rest.len();
        let (header, after) = rest.split_at_checked(4).ok_or(ScsiError::PARAMETER_LIST_LENGTH)?;
        let &[code, subpage, high, low] = header else { return Ok(found) };
        if (code & 0x3f, subpage) != CLIENT {
            return Err(ScsiError::parameter_field(at(here), Some(5)));
        }
        let len = usize::from(u16::from_be_bytes([high, low]));
        let (mut page, next) =
            after.split_at_checked(len).ok_or(ScsiError::PARAMETER_LIST_LENGTH)?;
        while !page.is_empty() {
            let here = list.len() - next.len() - page.len();
            let short = ScsiError::PARAMETER_LIST_LENGTH;
            let (header, after) = page.split_at_checked(4).ok_or(short)?;
            let &[high, low, _, len] = header else { return Ok(found) };
            let code = u16::from_be_bytes([high, low]);
            let (bytes, following) = after.split_at_checked(len.into()).ok_or(short)?;
            if code >= CLIENT_PARAMETERS {
                return Err(ScsiError::parameter_field(at(here), None));
            }
            if bytes.len() > CLIENT_BYTES {
                return Err(ScsiError::parameter_field(at(here + 3), None));
            }
            found.push((code, bytes.to_vec()));
            page = following;
        }
        rest = next;
    }
    Ok(found)
}

/// What is left for the disk, shared with whatever else is on the file system (SCOPE 10b), and what it takes itself
/// (01b).
fn provisioning(lun: &Lun) -> Result<Vec<Parameter>, ScsiError> {
    let space =
        lun.store().space().map_err(|e| ScsiError::from_store(e, false, lun.block_size()))?;
    let counts = space.map(|space| [(1, space.available, 2), (2, space.used, 1)]);
    let parameter = |(code, bytes, scope)| {
        let mut contents = counted(bytes).to_be_bytes().to_vec();
        contents.extend([scope, 0, 0, 0]);
        Parameter(code, BINARY, contents)
    };
    Ok(counts.into_iter().flatten().map(parameter).collect())
}
