//! Segments of a copy: from which disk to which, and the way of each through the store's copy engine.

use std::sync::Arc;

use super::Operation;
use crate::scsi::attention::Port;
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
        done.map_err(|error| error.of_segment(number))?;
        operation.update(|report| report.segments = number.saturating_add(1));
    }
    for segment in segments {
        if let (Some(lun), false) = (&segment.destination, segment.is_verify()) {
            lun.settle(lun.durability(false))?;
        }
    }
    Ok(())
}

/// A failed segment.
struct Failure {
    error: ScsiError,
    /// What is missing of it, in its own units.
    residual: u64,
}

impl Failure {
    fn unreachable() -> Self {
        copy_aborted(asc::UNREACHABLE_COPY_TARGET).into()
    }

    /// COMMAND-SPECIFIC INFORMATION names the segment (SPC-5 5.18.7.4).
    fn of_segment(self, number: u16) -> ScsiError {
        match self.error {
            ScsiError::Check(sense) if sense.key == Key::CopyAborted => ScsiError::Check(Sense {
                information: Some(self.residual),
                command_specific: Some(number.into()),
                ..sense
            }),
            other => other,
        }
    }
}

impl From<ScsiError> for Failure {
    fn from(error: ScsiError) -> Self {
        Failure { error, residual: 0 }
    }
}

fn copy_aborted(asc: crate::scsi::sense::Asc) -> ScsiError {
    ScsiError::Check(Sense::new(Key::CopyAborted, asc))
}

impl Segment {
    fn is_verify(&self) -> bool {
        matches!(self.what, What::Verify { .. })
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
        usable(source, operation.port, Conflict::ExclusiveAccess)?;
        usable(destination, operation.port, Conflict::Always)?;
        destination.check_writable()?;
        let before = operation.report().bytes;
        let result = transfer(
            source.store().as_ref(),
            span.source.clone(),
            destination,
            span.at,
            &mut |done| {
                operation.update(|report| report.bytes = before + done);
                !cancel.is_requested() && !operation.shall_end()
            },
        );
        let end = span.at + whole;
        let error = match result {
            Ok(_) if span.pad > 0 => destination
                .store()
                .reserve(end..end + span.pad)
                .map_err(|error| CopyError { side: Side::Destination, error, done: whole }),
            other => other.map(drop),
        };
        operation.update(|report| {
            report.bytes = before + error.map_or_else(|error| error.done, |()| whole);
        });
        error.map_err(|error| Failure {
            residual: (whole - error.done.min(whole)).div_ceil(span.unit),
            error: why(&error, destination),
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

/// What an initiator hears of a copy that failed.
pub(in crate::scsi) fn why(error: &CopyError, destination: &Lun) -> ScsiError {
    match (error.side, error.error.cause) {
        (_, Cause::Cancelled) => ScsiError::Aborted,
        (_, Cause::Busy) => ScsiError::Busy,
        (Side::Destination, Cause::NoSpace | Cause::ReadOnly) => {
            ScsiError::from_store(error.error, true, destination.block_size())
        }
        _ => copy_aborted(asc::THIRD_PARTY_DEVICE_FAILURE),
    }
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
fn usable(lun: &Lun, port: Port, conflict: Conflict) -> Result<(), Failure> {
    let tolerance = crate::scsi::background::Tolerance::Never;
    let ready = lun.background().check(tolerance).and_then(|()| lun.check_ready());
    let ready = ready.and_then(|()| lun.reservations().check(port, conflict, &Cdb::new(&[])));
    ready.map_err(|_| copy_aborted(asc::COPY_TARGET_DEVICE_NOT_REACHABLE).into())
}
