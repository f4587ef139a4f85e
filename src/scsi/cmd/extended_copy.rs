//! EXTENDED COPY (LID1, LID4) and COPY OPERATION ABORT (SPC-5 6.6 ff).
//!
//! Segments go from one disk of the daemon to another, named by any designator of its VPD page 83.
//! Everything in the list is checked before any segment runs; what is wrong with a segment's disks or
//! their blocks ends that segment.

use std::collections::BTreeSet;
use std::sync::{Arc, mpsc};

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::vpd::designators;
use super::{Context, Reply};
use crate::scsi::Target;
use crate::scsi::copy::segment::{self, Cscd, Segment, What};
use crate::scsi::copy::{Operation, Running, Start, Waiter};
use crate::scsi::lun::Lun;
use crate::scsi::sense::{Key, ScsiError, Sense, asc};
use crate::scsi::wire::{Cdb, U16, U32, U64};
use crate::store::Store;
use crate::store::engine::ending::ending;
use crate::store::engine::{Cancel, Need};

/// MAXIMUM CSCD DESCRIPTOR COUNT.
pub(super) const MAX_CSCDS: usize = 16;
/// MAXIMUM SEGMENT DESCRIPTOR COUNT.
pub(super) const MAX_SEGMENTS: usize = 128;
/// MAXIMUM DESCRIPTOR LIST LENGTH: as many of the shorter segment descriptors as there may be.
pub(super) const MAX_DESCRIPTORS: usize = MAX_CSCDS * CSCD_LEN + MAX_SEGMENTS * BLOCKS_LEN;

/// The service actions.
pub(super) const LID1: u8 = 0x00;
pub(super) const LID4: u8 = 0x01;

/// Identification CSCD descriptor.
pub(super) const IDENTIFICATION: u8 = 0xe4;
/// Segment descriptors.
pub(super) const BLOCK_TO_BLOCK: u8 = 0x02;
pub(super) const VERIFY_CSCD: u8 = 0x07;
pub(super) const BLOCK_TO_BLOCK_OFFSET: u8 = 0x0a;

/// CSCD DESCRIPTOR ID of the disk that the command came to.
pub(super) const THIS_DISK: u16 = 0xffff;

const CSCD_LEN: usize = 32;
const BLOCKS_LEN: usize = 28;
const BYTES_LEN: usize = 32;
const VERIFY_LEN: usize = 12;

/// LIST ID USAGE.
const HOLD: u8 = 0b00;
const DISCARD: u8 = 0b10;
const NO_LIST_ID: u8 = 0b11;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderLid1 {
    list_id: u8,
    /// STR, LIST ID USAGE, PRIORITY.
    flags: u8,
    cscds: U16,
    reserved: U32,
    segments: U32,
    inline: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeaderLid4 {
    format: u8,
    /// STR, LIST ID USAGE, PRIORITY.
    flags: u8,
    header_cscds: U16,
    reserved: [u8; 11],
    /// G_SENSE, IMMED.
    flags2: u8,
    header_cscd_type: u8,
    reserved2: [u8; 3],
    list_id: U32,
    reserved3: [u8; 18],
    cscds: U16,
    segments: U16,
    inline: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Identification {
    kind: u8,
    /// LU ID TYPE, NUL, PERIPHERAL DEVICE TYPE.
    device: u8,
    relative_port: U16,
    code_set: u8,
    designator_type: u8,
    reserved: u8,
    designator_length: u8,
    designator: [u8; 20],
    /// PAD.
    flags: u8,
    block_length: [u8; 3],
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SegmentHead {
    kind: u8,
    /// DC, CAT.
    flags: u8,
    length: U16,
    source: U16,
    destination: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Blocks {
    reserved: U16,
    count: U16,
    source: U64,
    destination: U64,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Bytes {
    count: U32,
    source: U64,
    destination: U64,
    source_offset: U16,
    destination_offset: U16,
}

/// Either list, as far as they say the same.
struct List {
    start: Start,
    cscds: usize,
    segments: usize,
    inline: usize,
    header: usize,
}

/// PARAMETER LIST LENGTH.
fn length(cdb: &Cdb) -> usize {
    let bytes = [cdb.byte(10), cdb.byte(11), cdb.byte(12), cdb.byte(13)];
    usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
}

fn wrong(byte: u16, bit: Option<u8>) -> ScsiError {
    ScsiError::parameter_field(byte, bit)
}

/// EXTENDED COPY(LID1).
pub(super) fn lid1(context: Context<'_>) -> Result<Reply, ScsiError> {
    extended_copy(context, |list| {
        let (header, _) =
            HeaderLid1::ref_from_prefix(list).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
        let usage = header.flags >> 3 & 0b11;
        let list_id = identifier(usage, header.list_id.into(), 0)?;
        Ok(List {
            start: Start { list_id, service_action: LID1, hold: usage == HOLD, immediate: false },
            cscds: header.cscds.get().into(),
            segments: usize::try_from(header.segments.get()).unwrap_or(usize::MAX),
            inline: usize::try_from(header.inline.get()).unwrap_or(usize::MAX),
            header: size_of::<HeaderLid1>(),
        })
    })
}

/// EXTENDED COPY(LID4). G_SENSE may be asked for: a copy that is done has no sense data to give.
pub(super) fn lid4(context: Context<'_>) -> Result<Reply, ScsiError> {
    extended_copy(context, |list| {
        let (header, _) =
            HeaderLid4::ref_from_prefix(list).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
        if header.format != 1 {
            return Err(wrong(0, None));
        }
        if header.header_cscds.get() != 0x20 {
            return Err(wrong(2, None));
        }
        if header.header_cscd_type != 0xff {
            return Err(wrong(16, None));
        }
        let usage = header.flags >> 3 & 0b11;
        let immediate = header.flags2 & 1 != 0;
        let list_id = identifier(usage, header.list_id.get(), 20)?;
        if immediate && list_id.is_none() {
            // Nobody could ever ask what became of it.
            return Err(wrong(15, Some(0)));
        }
        Ok(List {
            start: Start {
                list_id,
                service_action: LID4,
                hold: usage == HOLD || immediate,
                immediate,
            },
            cscds: header.cscds.get().into(),
            segments: header.segments.get().into(),
            inline: header.inline.get().into(),
            header: size_of::<HeaderLid4>(),
        })
    })
}

fn identifier(usage: u8, list_id: u32, at: u16) -> Result<Option<u32>, ScsiError> {
    match (usage, list_id) {
        (HOLD | DISCARD, id) => Ok(Some(id)),
        (NO_LIST_ID, 0) => Ok(None),
        (NO_LIST_ID, _) => Err(wrong(at, None)),
        _ => Err(wrong(1, Some(4))),
    }
}

fn extended_copy(
    context: Context<'_>,
    header: impl FnOnce(&[u8]) -> Result<List, ScsiError>,
) -> Result<Reply, ScsiError> {
    let len = length(&context.request.cdb);
    if len == 0 {
        return Ok(Reply::Good);
    }
    if context.request.data_out.len() < len {
        return Err(ScsiError::Overrun);
    }
    // What can be right is no longer than this.
    let most = size_of::<HeaderLid4>() + MAX_DESCRIPTORS + 1;
    let list = context.request.data_out.to_vec(len.min(most));
    let header = header(&list)?;
    let segments = parse(context.target, context.lun, &list, len, &header)?;
    let named = segments.iter().flat_map(|s| [&s.source, &s.destination]).flatten();
    let others: BTreeSet<usize> = named.map(|lun| lun.index()).collect();
    let others = others.into_iter().collect();
    let copies = context.target.copies();
    let copy = copies.begin(context.nexus, context.lun, others, &header.start)?;
    let work =
        move |operation: &Operation, cancel: &Cancel| segment::run(operation, &segments, cancel);
    Ok(run(copy, Arc::clone(context.lun), header.start.immediate, len, work))
}

/// Runs a copy to its end, before or after its command is answered, on a thread of its own: it may wait for whoever has
/// blocks for himself, on any disk, and has none while it does.
pub(super) fn run(
    copy: Running,
    lun: Arc<Lun>,
    immediate: bool,
    consumed: usize,
    work: impl FnOnce(&Operation, &Cancel) -> Result<(), ScsiError> + Send + 'static,
) -> Reply {
    if !immediate {
        let job = move |cancel: &Cancel, _: &dyn Store| {
            let done = copy.run(|operation| work(operation, cancel));
            done.map(|()| consumed).map_err(|error| match error {
                // It is not its command that was to end.
                ScsiError::Aborted if !cancel.is_requested() => {
                    ScsiError::Check(Sense::new(Key::CopyAborted, asc::IO_PROCESS_TERMINATED))
                }
                other => other,
            })
        };
        return Reply::Needy(Need::Thread, Box::new(job));
    }
    let (begin, begins) = mpsc::channel();
    let job = move |cancel: &Cancel| {
        if cancel.is_requested() {
            return Err(ScsiError::Aborted);
        }
        // Commands that abort it wait for it.
        let made = lun.store().pool().run_apart(Box::new(move || {
            // Not if a task management function ends the command: what it ended does nothing any more.
            if begins.recv().is_ok() {
                // What became of it is asked for by its list identifier.
                let _ = copy.run(|operation| work(operation, &Cancel::default()));
            }
        }));
        made.map(|()| consumed).map_err(|_| ScsiError::Busy)
    };
    Reply::Begins(Box::new(job), begin)
}

/// The segments of a list of `len` bytes.
fn parse(
    target: &Target,
    lun: &Arc<Lun>,
    list: &[u8],
    len: usize,
    header: &List,
) -> Result<Vec<Segment>, ScsiError> {
    let List { cscds, segments, inline, header: at, .. } = *header;
    let descriptors = cscds.saturating_add(segments);
    if descriptors > MAX_DESCRIPTORS {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    if inline > 0 {
        return Err(ScsiError::illegal(asc::INLINE_DATA_LENGTH_EXCEEDED));
    }
    if at + descriptors > len {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    let short = ScsiError::PARAMETER_LIST_LENGTH;
    let cscd_list = list.get(at..at + cscds).ok_or(short)?;
    let segment_list = list.get(at + cscds..at + descriptors).ok_or(short)?;
    if cscds % CSCD_LEN != 0 {
        return Err(wrong(2, None));
    }
    if cscds / CSCD_LEN > MAX_CSCDS {
        return Err(ScsiError::illegal(asc::TOO_MANY_TARGET_DESCRIPTORS));
    }
    let named = cscd_list
        .chunks_exact(CSCD_LEN)
        .enumerate()
        .map(|(n, bytes)| parse_cscd(target, bytes, at + n * CSCD_LEN))
        .collect::<Result<Vec<_>, _>>()?;
    let find = |id: u16| match id {
        THIS_DISK => Named { lun: Some(Arc::clone(lun)), pad: false },
        id => named.get(usize::from(id)).cloned().unwrap_or(Named { lun: None, pad: false }),
    };
    parse_segments(segment_list, at + cscds, find)
}

/// A disk by its name, and the PAD bit of its descriptor.
#[derive(Clone)]
struct Named {
    lun: Cscd,
    pad: bool,
}

fn parse_cscd(target: &Target, bytes: &[u8], at: usize) -> Result<Named, ScsiError> {
    let unsupported = ScsiError::illegal(asc::UNSUPPORTED_TARGET_DESCRIPTOR_TYPE);
    let cscd = Identification::ref_from_bytes(bytes).map_err(|_| unsupported)?;
    if cscd.kind != IDENTIFICATION {
        return Err(unsupported);
    }
    let field = |byte: usize| wrong(u16::try_from(at + byte).unwrap_or(u16::MAX), None);
    let designator = cscd.designator.get(..usize::from(cscd.designator_length)).ok_or(field(7))?;
    let is_this = |lun: &&Arc<Lun>| {
        designators(lun).iter().any(|(head, bytes)| {
            [cscd.code_set & 0x0f, cscd.designator_type & 0x3f] == *head && bytes == designator
        })
    };
    let lun = target.disks().iter().find(is_this).cloned();
    let [a, b, c] = cscd.block_length;
    let block_length = u32::from_be_bytes([0, a, b, c]);
    if lun.as_ref().is_some_and(|lun| ![0, lun.block_size()].contains(&block_length)) {
        return Err(field(29));
    }
    Ok(Named { lun, pad: cscd.flags & 0x04 != 0 })
}

fn parse_segments(
    mut list: &[u8],
    mut at: usize,
    find: impl Fn(u16) -> Named,
) -> Result<Vec<Segment>, ScsiError> {
    let mut segments = Vec::new();
    while !list.is_empty() {
        let short = ScsiError::PARAMETER_LIST_LENGTH;
        let kind = list.first().copied().ok_or(short)?;
        let len = match kind {
            BLOCK_TO_BLOCK => BLOCKS_LEN,
            BLOCK_TO_BLOCK_OFFSET => BYTES_LEN,
            VERIFY_CSCD => VERIFY_LEN,
            _ => return Err(ScsiError::illegal(asc::UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE)),
        };
        if segments.len() >= MAX_SEGMENTS {
            return Err(ScsiError::illegal(asc::TOO_MANY_SEGMENT_DESCRIPTORS));
        }
        let (bytes, rest) = list.split_at_checked(len).ok_or(short)?;
        let (head, body) = SegmentHead::ref_from_prefix(bytes).map_err(|_| short)?;
        if usize::from(head.length.get()) != len - 4 {
            return Err(wrong(u16::try_from(at + 2).unwrap_or(u16::MAX), None));
        }
        let (source, destination) = (find(head.source.get()), find(head.destination.get()));
        let what = match kind {
            BLOCK_TO_BLOCK => {
                let blocks = Blocks::ref_from_bytes(body).map_err(|_| short)?;
                What::Blocks {
                    by_destination: head.flags & 0x02 != 0,
                    count: blocks.count.get(),
                    source: blocks.source.get(),
                    destination: blocks.destination.get(),
                    strip: source.pad,
                    pad: destination.pad,
                }
            }
            BLOCK_TO_BLOCK_OFFSET => {
                let bytes = Bytes::ref_from_bytes(body).map_err(|_| short)?;
                What::Bytes {
                    count: bytes.count.get(),
                    source: (bytes.source.get(), bytes.source_offset.get()),
                    destination: (bytes.destination.get(), bytes.destination_offset.get()),
                }
            }
            _ => What::Verify { test_ready: body.first().is_some_and(|b| b & 1 != 0) },
        };
        segments.push(Segment { source: source.lun, destination: destination.lun, what });
        list = rest;
        at += len;
    }
    Ok(segments)
}

/// COPY OPERATION ABORT: answered when the copy has ended, which is up to the hosts of both its disks.
pub(super) fn abort(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let list_id = u32::from_be_bytes([cdb.byte(2), cdb.byte(3), cdb.byte(4), cdb.byte(5)]);
    let manager = context.target.copies();
    let operation = manager.find(context.nexus, context.lun, list_id, 2)?;
    let (ending, ended) = ending();
    let waiter: Waiter = ending;
    match manager.end(|other| std::ptr::eq(other, operation.as_ref()), &waiter) {
        true => Ok(Reply::After(Box::new(|_| Ok(0)), ended)),
        false => Ok(Reply::Good),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::copy::Status;
    use crate::scsi::{Addressed, LunNumber, LunSettings, Plan, Port, Request, execute};
    use crate::store::mem::MemStore;
    use crate::store::{Buffers, Durability};

    fn lun() -> Arc<Lun> {
        let settings = LunSettings {
            target: 0,
            lun: LunNumber::MIN,
            serial: "X".into(),
            naa: vec![0x30; 8],
            block_size: 512,
            physical_block_size: 512,
            rotational: false,
            discard: true,
            discard_granularity: 512,
            detect_zeroes: Default::default(),
            write_cache: true,
        };
        Arc::new(Lun::new(settings, 0, Arc::new(MemStore::new(1 << 20))).unwrap())
    }

    /// If a task management function ends the command first, nobody tells the copy to begin, and it never does.
    #[test]
    fn a_copy_in_the_background_begins_when_its_command_has_been_answered() {
        for answered in [true, false] {
            let lun = lun();
            let target = Arc::new(Target::new(vec![Arc::clone(&lun)], 1));
            let nexus = target.connect(Port(1));
            let run = |cdb: Cdb, list: &[u8]| {
                let (data_out, data_in) = (Buffers::copy_of(list).unwrap(), Buffers::default());
                let request = Request { cdb, data_out, data_in, again: false, overtaken: false };
                execute(&target, &nexus, &Addressed::Disk(&lun), request)
            };
            // The unit attention.
            let _ = run(Cdb::new(&[0; 6]), &[]);
            let old = Buffers::copy_of(&[7; 4096]).unwrap();
            lun.store().write(0, &old, Durability::Cached).unwrap();
            // Eight blocks from block 0 of this disk to block 100, IMMED, list identifier 9.
            let mut list = vec![0; 48];
            (list[0], list[3], list[15], list[16], list[23], list[45]) = (1, 0x20, 1, 0xff, 9, 28);
            list.extend([2, 0, 0, 24, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 8]);
            list.extend([0u64, 100].map(u64::to_be_bytes).concat());
            let mut cdb = [0x83, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            cdb[13] = u8::try_from(list.len()).unwrap();
            let Plan::Job(work) = run(Cdb::new(&cdb), &list) else { panic!("no job") };
            let outcome = work.job.run(lun.store().as_ref(), &Cancel::default());
            assert_eq!(outcome.status, crate::scsi::Status::Good, "{outcome:?}");
            let copy = target.copies().find(&nexus, &lun, 9, 0).unwrap();
            assert_eq!((copy.report().status, copy.report().bytes), (Status::Background, 0));
            if !answered {
                // Nor is it kept who has waited for its end and does not any more.
                let abort = Cdb::new(&[0x83, 0x1c, 0, 0, 0, 9]);
                (0..1000).for_each(|_| assert!(matches!(run(abort, &[]), Plan::Job(_))));
                assert!(copy.waiting().capacity() < 100);
            }
            match answered {
                true => work.begin.unwrap().send(()).unwrap(),
                false => drop(work.begin),
            }
            while copy.report().status == Status::Background {
                std::thread::yield_now();
            }
            let (status, byte) = if answered { (Status::Done, 7) } else { (Status::Terminated, 0) };
            assert_eq!(copy.report().status, status);
            let found = Buffers::zeroed(4096).unwrap();
            lun.store().read(100 * 512, &found).unwrap();
            assert_eq!(found.to_vec(4096), [byte; 4096]);
        }
    }
}
