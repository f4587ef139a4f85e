//! The SCSI side: what each command means and what it answers. No virtio, no files, no errno.
//!
//! This is the upper of the two waists: the transport gives [`execute`] a [`Request`] and
//! gets a [`Plan`]: an answer, or work for an engine after which there will be one.

pub mod address;
pub mod attention;
pub mod background;
pub mod cmd;
pub mod copy;
pub mod dispatch;
pub mod fill;
pub mod lun;
pub mod mode_pages;
pub mod provisioning;
pub mod reservations;
pub mod sense;
pub mod sharing;
pub mod statistics;
pub mod target;
pub mod wire;

use std::sync::mpsc::Sender;

use crate::store::engine::Job;
use crate::store::{Buffers, Cause, Durability, Operation, StoreError};

pub use address::LunNumber;
pub use attention::{Nexus, Port, UnitAttention};
pub use dispatch::execute;
pub use lun::{DetectZeroes, Lun, LunSettings};
pub use sense::ScsiError;
pub use sharing::Redone;
use statistics::Activity;
pub use target::{Addressed, Target, Tasks};
pub use wire::Cdb;

/// One command as it arrived.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub cdb: Cdb,
    /// Bytes from the initiator.
    pub data_out: Buffers,
    /// Room for bytes to the initiator.
    pub data_in: Buffers,
    /// It was given to a daemon that has ended without an answer: it may have been done, all of it or in part.
    pub again: bool,
    /// Others have changed the disk since, as far as was noted when that daemon served it.
    pub overtaken: bool,
}

/// What has to happen for a command to end.
pub enum Plan {
    /// It has ended.
    Done(Outcome),
    /// One transfer, then [`Transfer::finish`].
    Transfer(Transfer, Operation),
    /// Blocking work of several steps on the disk's threads, which makes the outcome itself.
    Job(Work),
}

/// Blocking work of a command.
pub struct Work {
    /// Does it.
    pub job: Job<Outcome>,
    /// It is about what the medium holds, and has to be over before all of that changes (FORMAT UNIT, SANITIZE).
    pub at_medium: bool,
    /// To be told when the command has been answered as the work has ended: something that goes on begins then.
    pub begin: Option<Sender<()>>,
}

/// What is known of a transfer while it is under way.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Bytes of the data buffers that are used when it succeeds.
    pub bytes: usize,
    /// Whether it writes to the medium.
    pub writing: bool,
    /// Whether it leaves what it writes in the write cache.
    cached: bool,
}

impl Transfer {
    /// What an operation is that is about to be done for a command.
    pub fn of(operation: &Operation, bytes: usize, writing: bool) -> Self {
        let cached = matches!(operation, Operation::Write { durability: Durability::Cached, .. });
        Transfer { bytes, writing, cached }
    }

    /// What there is to do before it is answered, if the write cache was switched off since it was planned: who did that
    /// has flushed what had been written by then, and no more.
    pub fn owed(&self, lun: &Lun, result: &Result<(), StoreError>) -> Option<(Self, Operation)> {
        let owes = self.cached && result.is_ok() && !lun.pages().write_cache();
        owes.then_some((Transfer { cached: false, ..*self }, Operation::Flush))
    }

    /// The command's outcome from that of the disk's store.
    pub fn finish(&self, lun: &Lun, result: Result<(), StoreError>) -> Outcome {
        let lost = matches!(result, Err(error) if error.lost);
        let activity = if self.writing || lost { Activity::Write } else { Activity::Read };
        match result {
            Ok(()) => {
                if self.bytes > 0 {
                    lun.statistics().count(activity, self.bytes);
                }
                Outcome::good(self.bytes)
            }
            Err(error) => {
                if error.cause == Cause::Medium {
                    lun.statistics().count_error(activity);
                }
                lun.failed(ScsiError::from_store(error, self.writing, lun.block_size()))
            }
        }
    }
}

/// SCSI status (SAM-6 5.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Status {
    Good = 0x00,
    CheckCondition = 0x02,
    Busy = 0x08,
    ReservationConflict = 0x18,
    TaskAborted = 0x40,
}

/// What the transport says about the delivery of a command, apart from its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The device server answered; status and sense say what.
    Complete,
    /// The data buffers are too small for the CDB.
    Overrun,
    /// There is no such target.
    BadTarget,
    /// A task management function ended it.
    Aborted,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the device server got to answer.
    pub delivery: Delivery,
    /// Its status.
    pub status: Status,
    /// Encoded sense data with CHECK CONDITION, else empty.
    pub sense: Vec<u8>,
    /// Bytes of the data buffers that were transferred; the rest is the residual.
    pub transferred: usize,
}

impl Outcome {
    /// GOOD.
    pub fn good(transferred: usize) -> Self {
        Outcome {
            delivery: Delivery::Complete,
            status: Status::Good,
            sense: Vec::new(),
            transferred,
        }
    }

    /// No answer of the device server, for this reason.
    pub fn undelivered(delivery: Delivery) -> Self {
        Outcome { delivery, ..Self::good(0) }
    }

    /// Anything but GOOD, with the sense data in the format the disk is set to.
    pub fn failed(error: ScsiError, descriptor_sense: bool) -> Self {
        match error {
            ScsiError::Check(sense) => Outcome {
                status: Status::CheckCondition,
                sense: sense.encode(descriptor_sense),
                ..Self::good(0)
            },
            ScsiError::Busy => Outcome { status: Status::Busy, ..Self::good(0) },
            ScsiError::ReservationConflict => {
                Outcome { status: Status::ReservationConflict, ..Self::good(0) }
            }
            ScsiError::Overrun => Self::undelivered(Delivery::Overrun),
            ScsiError::Aborted => Self::undelivered(Delivery::Aborted),
        }
    }
}
