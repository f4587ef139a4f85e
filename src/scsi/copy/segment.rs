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
