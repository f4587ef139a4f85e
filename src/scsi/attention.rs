//! Initiators and what each disk still has to tell them: unit attention conditions (SAM-6 5.14).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::mode_pages::{AVAILABLE_AT, USED_AT};
use super::sense::{About, Asc, Key, ScsiError, Sense, asc};

/// A condition to be reported once to each initiator, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitAttention {
    /// The disk was powered on or reset.
    PowerOnOrReset,
    /// The nexus was lost or reset.
    NexusLoss,
    /// Another initiator, or a reset, changed mode parameters.
    ModeParametersChanged,
    /// Another initiator changed log parameters.
    LogParametersChanged,
    /// Another initiator cleared all registrations and the reservation.
    ReservationsPreempted,
    /// A reservation that allowed this initiator more than others is gone.
    ReservationsReleased,
    /// Another initiator took this one's registration away.
    RegistrationsPreempted,
    /// Another initiator set the clock.
    TimestampChanged,
    /// The disk grew or shrank.
    CapacityChanged,
    /// Another initiator changed the identifying information.
    DeviceIdentifierChanged,
    /// Disks came or went.
    ReportedLunsChanged,
    /// There is less space left than an initiator asked to be told of.
    AvailableThreshold,
    /// More space is used than an initiator asked to be told of.
    UsedThreshold,
}

impl UnitAttention {
    /// All of them, in the order of reporting: a reset says more than anything it hides.
    const ALL: [Self; 13] = [
        Self::PowerOnOrReset,
        Self::NexusLoss,
        Self::ModeParametersChanged,
        Self::LogParametersChanged,
        Self::ReservationsPreempted,
        Self::ReservationsReleased,
        Self::RegistrationsPreempted,
        Self::TimestampChanged,
        Self::CapacityChanged,
        Self::DeviceIdentifierChanged,
        Self::ReportedLunsChanged,
        Self::AvailableThreshold,
        Self::UsedThreshold,
    ];

    /// Its additional sense code.
    pub fn asc(self) -> Asc {
        match self {
            Self::PowerOnOrReset => asc::POWER_ON_OR_RESET,
            Self::NexusLoss => asc::I_T_NEXUS_LOSS,
            Self::ModeParametersChanged => asc::MODE_PARAMETERS_CHANGED,
            Self::LogParametersChanged => asc::LOG_PARAMETERS_CHANGED,
            Self::ReservationsPreempted => asc::RESERVATIONS_PREEMPTED,
            Self::ReservationsReleased => asc::RESERVATIONS_RELEASED,
            Self::RegistrationsPreempted => asc::REGISTRATIONS_PREEMPTED,
            Self::TimestampChanged => asc::TIMESTAMP_CHANGED,
            Self::CapacityChanged => asc::CAPACITY_DATA_CHANGED,
            Self::DeviceIdentifierChanged => asc::DEVICE_IDENTIFIER_CHANGED,
            Self::ReportedLunsChanged => asc::REPORTED_LUNS_DATA_CHANGED,
            Self::AvailableThreshold | Self::UsedThreshold => {
                asc::THIN_PROVISIONING_SOFT_THRESHOLD_REACHED
            }
        }
    }

    /// Its sense data. A threshold is named by the place of its descriptor in the mode page (SBC-4
    /// 4.7.3.7.6).
    pub fn sense(self) -> Sense {
        let information = match self {
            Self::AvailableThreshold => u64::try_from(AVAILABLE_AT).ok(),
            Self::UsedThreshold => u64::try_from(USED_AT).ok(),
            _ => None,
        };
        Sense { information, ..Sense::new(Key::UnitAttention, self.asc()) }
    }

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// The conditions due to one initiator from one disk. A set, so that it is bounded however often a
/// guest resets the disk, and free to look at on every command.
#[derive(Debug, Default)]
pub struct Attentions {
    due: AtomicU32,
    /// The initiator knows that the disk has lost writes. No reset changes that.
    knows_loss: AtomicBool,
}

impl Attentions {
    /// Adds a condition.
    pub fn raise(&self, attention: UnitAttention) {
        self.due.fetch_or(attention.bit(), Ordering::AcqRel);
    }

    /// A reset: whatever was due before no longer matters.
    pub fn reset(&self, attention: UnitAttention) {
        self.due.store(attention.bit(), Ordering::Release);
    }

    /// Takes out the most urgent condition, if there is one.
    pub fn take(&self) -> Option<UnitAttention> {
        if self.due.load(Ordering::Acquire) == 0 {
            return None;
        }
        UnitAttention::ALL
            .into_iter()
            .find(|a| self.due.fetch_and(!a.bit(), Ordering::AcqRel) & a.bit() != 0)
    }

    /// Takes back a condition that another answer has made known.
    pub fn clear(&self, attention: UnitAttention) {
        self.due.fetch_and(!attention.bit(), Ordering::AcqRel);
    }

    /// The disk has lost writes: that is to be told now, unless it was.
    #[cold]
    pub fn learn_of_loss(&self) -> bool {
        !self.knows_loss.swap(true, Ordering::AcqRel)
    }

    /// An answer with this error tells of the loss, if it does.
    pub fn hears(&self, error: &ScsiError) {
        if matches!(error, ScsiError::Check(sense) if sense.about != About::Command) {
            self.knows_loss.store(true, Ordering::Release);
        }
    }
}

/// A target port, and with it the one initiator that can be behind it: a socket. Its RELATIVE TARGET PORT
/// IDENTIFIER, from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port(pub u16);

/// One initiator's view of the target: an I_T nexus (here: one vhost-user connection).
#[derive(Debug)]
pub struct Nexus {
    port: Port,
    attentions: Vec<Attentions>,
    none: Attentions,
}

impl Nexus {
    /// A new nexus by a port to a target of `disks` disks.
    pub(super) fn new(port: Port, disks: usize) -> Self {
        let attentions = (0..disks).map(|_| Attentions::default()).collect();
        Nexus { port, attentions, none: Attentions::default() }
    }

    /// The port it goes by; it stays the same when the initiator comes back.
    pub fn port(&self) -> Port {
        self.port
    }

    /// What disk number `index` of the target has to tell this initiator.
    pub fn attentions(&self, index: usize) -> &Attentions {
        self.attentions.get(index).unwrap_or(&self.none)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reported_once_most_urgent_first() {
        let a = Attentions::default();
        a.raise(UnitAttention::CapacityChanged);
        a.raise(UnitAttention::PowerOnOrReset);
        a.raise(UnitAttention::CapacityChanged);
        assert_eq!(a.take(), Some(UnitAttention::PowerOnOrReset));
        assert_eq!(a.take(), Some(UnitAttention::CapacityChanged));
        assert_eq!(a.take(), None);
        a.raise(UnitAttention::ModeParametersChanged);
        a.reset(UnitAttention::PowerOnOrReset);
        assert_eq!(a.take(), Some(UnitAttention::PowerOnOrReset));
        assert_eq!(a.take(), None);
    }

    #[test]
    fn a_loss_is_told_once_by_whatever_error() {
        let (a, b) = (Attentions::default(), Attentions::default());
        assert!(a.learn_of_loss() && !a.learn_of_loss());
        a.reset(UnitAttention::PowerOnOrReset);
        assert!(!a.learn_of_loss());
        b.hears(&ScsiError::Busy);
        b.hears(&ScsiError::LBA_OUT_OF_RANGE);
        let lost = Sense { about: About::Cache, ..Sense::new(Key::MediumError, asc::WRITE_ERROR) };
        b.hears(&ScsiError::Check(lost));
        assert!(!b.learn_of_loss());
    }
}
