//! Segments of a copy: from which disk to which, and the way of each through the store's copy engine.

use std::sync::Arc;

use super::Operation;
use crate::scsi::attention::Port;
use crate::scsi::background::Tolerance;
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::reservations::Conflict;
use crate::scsi::sense::{Key, ScsiError, Sense, asc};
use crate::scsi::wire::Cdb;
use crate::store::copy::{Copy, CopyError, Holes, Moved, Side};
use crate::store::engine::Cancel;
use crate::store::{Cause, Store};

/// A disk that a segment names; `None` if the name leads nowhere.
pub type Cscd = Option<Arc<Lun>>;

/// One segment descriptor.
#[derive(Clone)]
pub struct Segment {
    /// Where from.
    pub source: Cscd,
    /// Where to.
    pub destination: Cscd,
    /// What.
    pub what: What,
}

/// What a segment descriptor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// 02h: block device to block device.
    Blocks {
        /// DC: the count is in the destination's blocks.
        by_destination: bool,
        /// NUMBER OF BLOCKS.
        count: u16,
        /// First block of the source.
        source: u64,
        /// First block of the destination.
        destination: u64,
        /// PAD of the source's descriptor: what does not fill a block of the destination is dropped.
        strip: bool,
        /// PAD of the destination's descriptor: its last block is filled up with zeroes.
        pad: bool,
    },
    /// 0Ah: block device to block device, by bytes.
    Bytes {
        /// NUMBER OF BYTES.
        count: u32,
        /// Block and byte of the source.
        source: (u64, u16),
        /// Block and byte of the destination.
        destination: (u64, u16),
    },
    /// 07h: the source is there.
    Verify {
        /// TUR: and it is ready.
        test_ready: bool,
    },
}

/// A segment as bytes of two disks.
struct Span {
    source: ByteRange,
    at: u64,
    /// Zeroes written behind it.
    pad: u64,
    /// Bytes that the residual is counted in.
    unit: u64,
}

/// Runs all segments in their order, until one fails.
///
/// # Errors
/// COPY ABORTED with the segment and its residual, or what the destination says of its space;
/// [`ScsiError::Aborted`] if it was told to end.
pub fn run(operation: &Operation, segments: &[Segment], cancel: &Cancel) -> Result<(), ScsiError> {
    for (number, segment) in (0u16..).zip(segments) {
        let done = segment.run(operation, cancel);
        done.map_err(|failure| failure.of_segment(number, segment.wanted()))?;
        operation.update(|report| report.segments = number.saturating_add(1));
    }
    for segment in segments {
        if let (Some(lun), false) = (&segment.destination, segment.is_verify()) {
            lun.settle(lun.durability(false))?;
        }
    }
    Ok(())
}

/// Whether a copy may go on, which it asks before each step: nobody wants it to end, and its disks still let it in. Who
/// has reserved one of them meanwhile, stopped it or begun to format it need not wait for its end.
pub(in crate::scsi) struct Leave<'a> {
    operation: &'a Operation,
    cancel: &'a Cancel,
    source: Option<&'a Lun>,
    destination: Option<&'a Lun>,
    /// Bytes that the operation had done before.
    before: u64,
    refusal: Option<ScsiError>,
}

impl<'a> Leave<'a> {
    /// For a copy from one disk, if it is one, to another, if there is one.
    pub(in crate::scsi) fn new(
        operation: &'a Operation,
        cancel: &'a Cancel,
        source: Option<&'a Lun>,
        destination: Option<&'a Lun>,
    ) -> Self {
        let before = operation.report().bytes;
        Leave { operation, cancel, source, destination, before, refusal: None }
    }

    /// Whose copy it is.
    pub(in crate::scsi) fn port(&self) -> Port {
        self.operation.port
    }

    /// Whether it may go on.
    ///
    /// # Errors
    /// [`ScsiError::Aborted`] if it is to end; what one of its disks says else.
    pub(in crate::scsi) fn look(&self) -> Result<(), ScsiError> {
        if self.cancel.is_requested() || self.operation.shall_end() {
            return Err(ScsiError::Aborted);
        }
        let port = self.operation.port;
        if let Some(source) = self.source {
            usable(source, port, Conflict::ExclusiveAccess)?;
        }
        let Some(destination) = self.destination else { return Ok(()) };
        usable(destination, port, Conflict::Always)?;
        destination.check_writable()?;
        destination.change(port, true)
    }

    /// The same, after so many bytes.
    pub(in crate::scsi) fn step(&mut self, done: u64) -> bool {
        self.operation.update(|report| report.bytes = self.before + done);
        self.refusal = self.look().err();
        self.refusal.is_none()
    }

    /// Ends with so many bytes done.
    pub(in crate::scsi) fn end(&self, done: u64) {
        self.operation.update(|report| report.bytes = self.before + done);
    }

    /// What an initiator hears of a copy that failed, or was not to go on.
    pub(in crate::scsi) fn why(&self, error: &CopyError, destination: &Lun) -> ScsiError {
        match (error.side, error.error.cause) {
            (_, Cause::Cancelled) => self.refusal.unwrap_or(ScsiError::Aborted),
            (_, Cause::Busy) => ScsiError::Busy,
            (Side::Destination, Cause::NoSpace | Cause::ReadOnly) => {
                ScsiError::from_store(error.error, true, destination.block_size())
            }
            _ => copy_aborted(asc::THIRD_PARTY_DEVICE_FAILURE),
        }
    }
}

/// A failed segment.
struct Failure {
    error: ScsiError,
    /// What is missing of it, in its own units; `None`: all of it.
    residual: Option<u64>,
}

impl Failure {
    fn unreachable() -> Self {
        copy_aborted(asc::UNREACHABLE_COPY_TARGET).into()
    }

    /// COMMAND-SPECIFIC INFORMATION names the segment, INFORMATION says what is missing of it (SPC-5 5.18.7.4).
    fn of_segment(self, number: u16, wanted: u64) -> ScsiError {
        match self.error {
            ScsiError::Check(sense) if sense.key == Key::CopyAborted => ScsiError::Check(Sense {
                information: Some(self.residual.unwrap_or(wanted)),
                command_specific: Some(number.into()),
                ..sense
            }),
            other => other,
        }
    }
}

impl From<ScsiError> for Failure {
    fn from(error: ScsiError) -> Self {
        Failure { error, residual: None }
    }
}

fn copy_aborted(asc: crate::scsi::sense::Asc) -> ScsiError {
    ScsiError::Check(Sense::new(Key::CopyAborted, asc))
}

impl Segment {
    fn is_verify(&self) -> bool {
        matches!(self.what, What::Verify { .. })
    }

    /// All that it asks for, in its own units.
    fn wanted(&self) -> u64 {
        match self.what {
            What::Blocks { count, .. } => count.into(),
            What::Bytes { count, .. } => count.into(),
            What::Verify { .. } => 0,
        }
    }

    fn run(&self, operation: &Operation, cancel: &Cancel) -> Result<(), Failure> {
        let source = self.source.as_ref().ok_or_else(Failure::unreachable)?;
        if let What::Verify { test_ready } = self.what {
            if test_ready && source.check_ready().is_err() {
                return Err(copy_aborted(asc::COPY_TARGET_DEVICE_NOT_REACHABLE).into());
            }
            return Ok(());
        }
        let destination = self.destination.as_ref().ok_or_else(Failure::unreachable)?;
        let span = self.span(source, destination)?;
        let whole = span.source.end - span.source.start;
        fits(source, &span.source)?;
        fits(destination, &(span.at..span.at.saturating_add(whole).saturating_add(span.pad)))?;
        let mut leave = Leave::new(operation, cancel, Some(source), Some(destination));
        leave.look()?;
        let (from, at) = (source.store().as_ref(), span.at);
        let end = at + whole;
        let copied = transfer(from, span.source, destination, at, &mut |n| leave.step(n));
        let copied = copied.and_then(|_| match span.pad {
            0 => Ok(()),
            pad if leave.step(whole) => destination
                .store()
                .reserve(end..end + pad)
                .map_err(|error| CopyError { side: Side::Destination, error, done: whole }),
            _ => {
                let error = Cause::Cancelled.into();
                Err(CopyError { side: Side::Destination, error, done: whole })
            }
        });
        leave.end(copied.map_or_else(|error| error.done, |()| whole));
        copied.map_err(|error| Failure {
            residual: Some((whole - error.done.min(whole)).div_ceil(span.unit)),
            error: leave.why(&error, destination),
        })
    }

    /// The bytes that it is about.
    fn span(&self, source: &Lun, destination: &Lun) -> Result<Span, Failure> {
        let from_block = u64::from(source.block_size());
        let to_block = u64::from(destination.block_size());
        let at = |lba: u64, block: u64| lba.checked_mul(block).ok_or(past_the_end());
        match self.what {
            What::Blocks { by_destination, count, source, destination, strip, pad } => {
                let unit = if by_destination { to_block } else { from_block };
                let mut bytes = u64::from(count) * unit;
                let mut padding = 0;
                if bytes % to_block != 0 {
                    match (strip, pad) {
                        (_, true) => padding = to_block - bytes % to_block,
                        (true, false) => bytes -= bytes % to_block,
                        (false, false) => {
                            return Err(copy_aborted(asc::UNEXPECTED_INEXACT_SEGMENT).into());
                        }
                    }
                }
                let start = at(source, from_block)?;
                // Neither sum overflows: a block number was below 2^64 / 512.
                Ok(Span {
                    source: start..start.saturating_add(bytes),
                    at: at(destination, to_block)?,
                    pad: padding,
                    unit,
                })
            }
            What::Bytes { count, source, destination } => {
                let start = at(source.0, from_block)?.saturating_add(source.1.into());
                Ok(Span {
                    source: start..start.saturating_add(count.into()),
                    at: at(destination.0, to_block)?.saturating_add(destination.1.into()),
                    pad: 0,
                    unit: 1,
                })
            }
            What::Verify { .. } => Err(Failure::unreachable()),
        }
    }
}

/// Copies bytes of a store to a disk; a thin disk's holes stay holes.
///
/// # Errors
/// How far it came and why it ended.
pub(super) fn transfer(
    from: &dyn Store,
    source: ByteRange,
    to: &Lun,
    at: u64,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Moved, CopyError> {
    let holes = if to.is_thin() { Holes::Stay } else { Holes::AreReserved };
    let started = std::time::Instant::now();
    let mut copy = Copy::new(from, to.store().as_ref(), holes, go_on);
    let result = copy.run(source.clone(), at);
    let moved = copy.moved();
    log::debug!(
        "copy of {} bytes to {}: {moved} in {:?}{}",
        source.end - source.start,
        to.settings().serial,
        started.elapsed(),
        if result.is_err() { ", not finished" } else { "" }
    );
    result.map(|()| moved)
}

fn past_the_end() -> Failure {
    copy_aborted(asc::NONE).into()
}

fn fits(lun: &Lun, range: &ByteRange) -> Result<(), Failure> {
    // It does not overflow: a capacity is at most 2^62 bytes.
    let end = lun.blocks() * u64::from(lun.block_size());
    if range.end <= end && range.start <= range.end { Ok(()) } else { Err(past_the_end()) }
}

/// A disk that is stopped, under a format operation, or reserved for others takes no part in copies.
fn usable(lun: &Lun, port: Port, conflict: Conflict) -> Result<(), ScsiError> {
    let ready = lun.background().check(Tolerance::Never).and_then(|()| lun.check_ready());
    let ready = ready.and_then(|()| lun.reservations().check(port, conflict, &Cdb::new(&[])));
    ready.map_err(|_| copy_aborted(asc::COPY_TARGET_DEVICE_NOT_REACHABLE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::background::{Work, start};
    use crate::scsi::copy::tests::{begin, disk};
    use crate::scsi::fill::Fill;
    use crate::scsi::target::Target;
    use crate::scsi::{Lun, LunSettings};
    use crate::store::faults::Faults;
    use crate::store::mem::MemStore;
    use crate::store::{Buffers, Durability, Kind};

    const SIZE: u64 = 1 << 20;

    fn fill(lun: &Lun, byte: u8) {
        let all = Buffers::copy_of(&vec![byte; SIZE as usize]).unwrap();
        lun.store().write(0, &all, Durability::Cached).unwrap();
    }

    fn contents(lun: &Lun) -> Vec<u8> {
        let all = Buffers::zeroed(SIZE as usize).unwrap();
        lun.store().read(0, &all).unwrap();
        all.to_vec(SIZE as usize)
    }

    /// Runs one segment; what came of it, and the bytes that were told.
    fn run_one(from: &Arc<Lun>, to: &Arc<Lun>, what: What) -> (Result<(), ScsiError>, u64) {
        let target = Arc::new(Target::new(vec![Arc::clone(from), Arc::clone(to)], 1));
        let nexus = target.connect(Port(1));
        let running = begin(&target, &nexus, 0, 1).unwrap();
        let segment =
            Segment { source: Some(Arc::clone(from)), destination: Some(Arc::clone(to)), what };
        let result = run(&running.operation, &[segment], &Cancel::default());
        (result, running.operation.report().bytes)
    }

    fn of_blocks(count: u16, destination: u64, strip: bool, pad: bool) -> What {
        What::Blocks { by_destination: false, count, source: 0, destination, strip, pad }
    }

    fn failed(asc: crate::scsi::sense::Asc, residual: u64) -> Result<(), ScsiError> {
        let sense = Sense::new(Key::CopyAborted, asc);
        Err(ScsiError::Check(Sense {
            information: Some(residual),
            command_specific: Some(0),
            ..sense
        }))
    }

    /// The PAD of the destination is stronger than that of the source.
    #[test]
    fn what_does_not_fill_a_block_is_padded_dropped_or_refused() {
        for (strip, pad) in [(false, true), (true, true), (true, false), (false, false)] {
            for count in [11u16, 3] {
                let from = disk(0, 512, MemStore::new(SIZE));
                let to = disk(1, 4096, MemStore::new(SIZE));
                fill(&from, 7);
                fill(&to, 9);
                let bytes = usize::from(count) * 512;
                let (copied, padded) = match (strip, pad) {
                    (_, true) => (bytes, bytes.next_multiple_of(4096)),
                    (true, false) => (bytes - bytes % 4096, bytes - bytes % 4096),
                    (false, false) => (0, 0),
                };
                let mut expected = vec![9; SIZE as usize];
                expected[4096..4096 + copied].fill(7);
                expected[4096 + copied..4096 + padded].fill(0);
                let (result, told) = run_one(&from, &to, of_blocks(count, 1, strip, pad));
                let refused = failed(asc::UNEXPECTED_INEXACT_SEGMENT, count.into());
                assert_eq!(result, if strip || pad { Ok(()) } else { refused });
                assert_eq!(told, copied as u64, "{count} {strip} {pad}");
                assert!(contents(&to) == expected, "{count} {strip} {pad}");
            }
        }
    }

    #[test]
    fn neither_end_of_a_segment_is_past_the_end() {
        let (from, to) = (disk(0, 512, MemStore::new(SIZE)), disk(1, 512, MemStore::new(SIZE)));
        fill(&to, 9);
        let last = SIZE / 512 - 1;
        let of = |source, destination| What::Blocks {
            by_destination: false,
            count: 2,
            source,
            destination,
            strip: false,
            pad: false,
        };
        for (source, destination) in [(last, 0), (0, last), (u64::MAX, 0), (0, u64::MAX)] {
            assert_eq!(run_one(&from, &to, of(source, destination)), (failed(asc::NONE, 2), 0));
        }
        assert!(contents(&to) == vec![9; SIZE as usize], "nothing was written");
        assert_eq!(run_one(&from, &to, of(last - 1, last - 1)), (Ok(()), 1024));
    }

    /// In the middle of a segment as at its beginning, whoever wants it to end, or does not let it in any more.
    #[test]
    fn each_step_is_asked_for() {
        let (from, to) = (disk(0, 512, MemStore::new(SIZE)), disk(1, 512, MemStore::new(SIZE)));
        let target = Arc::new(Target::new(vec![Arc::clone(&from), Arc::clone(&to)], 1));
        let nexus = target.connect(Port(1));
        let running = begin(&target, &nexus, 0, 1).unwrap();
        let cancel = Cancel::default();
        let mut leave = Leave::new(&running.operation, &cancel, Some(&from), Some(&to));
        let kept = CopyError { side: Side::Destination, error: Cause::Cancelled.into(), done: 0 };
        let keeps_out = copy_aborted(asc::COPY_TARGET_DEVICE_NOT_REACHABLE);
        assert!(leave.step(512));
        for lun in [&from, &to] {
            lun.set_started(false);
            assert!(!leave.step(1024));
            assert_eq!(leave.why(&kept, &to), keeps_out);
            lun.set_started(true);
            let (go_on, waits) = std::sync::mpsc::channel::<()>();
            let first = move || {
                let _ = waits.recv();
            };
            let started = start(lun, Work::Format(Fill::Anchored), first).unwrap();
            assert!(!leave.step(1024));
            assert_eq!(leave.why(&kept, &to), keeps_out);
            drop(go_on);
            lun.background().wait(started, &Cancel::default()).unwrap();
            assert!(leave.step(1024));
        }
        cancel.request();
        assert!(!leave.step(2048));
        assert_eq!(leave.why(&kept, &to), ScsiError::Aborted);
        assert_eq!(running.operation.report().bytes, 2048);
    }

    /// A hole becomes one where that is one, and space where every block has its own.
    #[test]
    fn a_thick_disk_has_no_holes() {
        for thin in [true, false] {
            let settings = LunSettings {
                discard: thin,
                ..disk(1, 512, MemStore::new(SIZE)).settings().clone()
            };
            let from = disk(0, 512, MemStore::new(SIZE));
            let to = Arc::new(Lun::new(settings, 1, Arc::new(MemStore::new(SIZE))).unwrap());
            fill(&to, 9);
            assert_eq!(run_one(&from, &to, of_blocks(128, 0, false, false)), (Ok(()), 65536));
            let kinds: Vec<Kind> =
                to.store().extents(0..65536, 9).unwrap().iter().map(|e| e.kind).collect();
            assert_eq!(kinds, [if thin { Kind::Hole } else { Kind::Reserved }], "{thin}");
        }
    }

    /// Without a write cache a copy is on the medium when it is done.
    #[test]
    fn what_was_copied_is_settled() {
        for write_cache in [true, false] {
            let settings =
                LunSettings { write_cache, ..disk(1, 512, MemStore::new(SIZE)).settings().clone() };
            let faults = vec!["flush:eio".parse().unwrap()];
            let store = Arc::new(Faults::new(MemStore::new(SIZE), faults));
            let to = Arc::new(Lun::new(settings, 1, store).unwrap());
            let from = disk(0, 512, MemStore::new(SIZE));
            fill(&from, 7);
            let (result, _) = run_one(&from, &to, of_blocks(8, 0, false, false));
            assert_eq!(result.is_ok(), write_cache);
        }
    }

    /// What may go better soon is BUSY; no room says so; all else is for the host at that end to mend.
    #[test]
    fn why_a_segment_failed_is_told() {
        let third_party = failed(asc::THIRD_PARTY_DEVICE_FAILURE, 8);
        for (fault, expected) in [
            ("read:enomem", Err(ScsiError::Busy)),
            ("write:enomem", Err(ScsiError::Busy)),
            ("read:eio", third_party),
            ("write:eio", third_party),
        ] {
            let plain = || MemStore::new(SIZE);
            let faults = || Faults::new(plain(), vec![fault.parse().unwrap()]);
            let (from, to) = match fault.starts_with("read") {
                true => (disk(0, 512, faults()), disk(1, 512, plain())),
                false => (disk(0, 512, plain()), disk(1, 512, faults())),
            };
            let block = Buffers::copy_of(&[7; 4096]).unwrap();
            from.store().write(0, &block, Durability::Cached).unwrap();
            let (result, _) = run_one(&from, &to, of_blocks(8, 0, false, false));
            assert_eq!(result, expected, "{fault}");
        }
        // All was copied, and the rest of its last block was not filled.
        let from = disk(0, 512, MemStore::new(SIZE));
        fill(&from, 7);
        let faults = vec!["zero:eio".parse().unwrap()];
        let to = disk(1, 4096, Faults::new(MemStore::new(SIZE), faults));
        let (result, told) = run_one(&from, &to, of_blocks(11, 0, false, true));
        assert_eq!(result, failed(asc::THIRD_PARTY_DEVICE_FAILURE, 0));
        assert_eq!(told, 11 * 512);
    }
}
