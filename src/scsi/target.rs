//! All the disks of the daemon, how they are addressed, and the way of a command through the checks
//! that every command passes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::attention::{Nexus, UnitAttention};
use super::cmd::{self, Access, Command, Context, Reply};
use super::lun::Lun;
use super::sense::{ScsiError, asc};
use super::{Delivery, Outcome, Plan, Request, Transfer};
use crate::store::engine::Cancel;

/// Largest logical unit number in flat space addressing (SAM-6 4.7.7.3).
pub const MAX_LUN: u16 = 0x3fff;

/// A logical unit number, 0 to 16383.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LunNumber(u16);

impl LunNumber {
    /// `None` above [`MAX_LUN`].
    pub fn new(number: u16) -> Option<Self> {
        (number <= MAX_LUN).then_some(LunNumber(number))
    }

    /// The plain number.
    pub fn get(self) -> u16 {
        self.0
    }

    /// As an eight-byte LUN: peripheral device addressing up to 255, flat space above.
    pub fn encode(self) -> [u8; 8] {
        let [high, low] = self.0.to_be_bytes();
        let method = if self.0 > 255 { 0x40 } else { 0 };
        [method | high, low, 0, 0, 0, 0, 0, 0]
    }
}

/// The REPORT LUNS well-known logical unit (SPC-5 8.2).
pub const REPORT_LUNS_WLUN: [u8; 8] = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];

/// What a transport address leads to.
#[derive(Clone)]
pub enum Addressed {
    /// A disk.
    Disk(Arc<Lun>),
    /// The REPORT LUNS well-known logical unit of a target.
    WellKnown(u8),
    /// A target that is there, but no such logical unit; the number, if it is one at all.
    AbsentLun(u8, Option<LunNumber>),
    /// Nothing.
    AbsentTarget,
}

/// Every disk of the daemon, under one or more target numbers.
pub struct Target {
    disks: Vec<Arc<Lun>>,
    by_address: BTreeMap<(u8, LunNumber), usize>,
    nexuses: Mutex<Vec<Weak<Nexus>>>,
}

impl Target {
    /// A target over these disks, in the order of their index.
    pub fn new(disks: Vec<Arc<Lun>>) -> Self {
        let address = |d: &Arc<Lun>| ((d.settings().target, d.settings().lun), d.index());
        let by_address = disks.iter().map(address).collect();
        Target { disks, by_address, nexuses: Mutex::default() }
    }

    /// All disks.
    pub fn disks(&self) -> &[Arc<Lun>] {
        &self.disks
    }

    /// A new initiator: for it every disk has just been powered on.
    pub fn connect(&self) -> Arc<Nexus> {
        let nexus = Arc::new(Nexus::new(self.disks.len()));
        let mut all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|n| n.strong_count() > 0);
        all.push(Arc::downgrade(&nexus));
        drop(all);
        self.power_on(&nexus);
        nexus
    }

    /// An initiator starts anew. For it every disk was powered on; if it is the only one, the disks
    /// really are as after power on.
    pub fn power_on(&self, nexus: &Nexus) {
        let all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = all.iter().filter(|n| n.strong_count() > 0).count() <= 1;
        drop(all);
        for disk in &self.disks {
            if alone {
                disk.reset();
            }
            nexus.attentions(disk.index()).reset(UnitAttention::PowerOnOrReset);
        }
    }

    /// Tells every initiator but `except` about a condition of one disk.
    pub fn announce(&self, disk: &Lun, attention: UnitAttention, except: Option<&Nexus>) {
        let all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        for nexus in all.iter().filter_map(Weak::upgrade) {
            if !except.is_some_and(|e| std::ptr::eq(e, nexus.as_ref())) {
                nexus.attentions(disk.index()).raise(attention);
            }
        }
    }

    /// The effect of LOGICAL UNIT RESET on a disk, once its commands have ended.
    pub fn reset(&self, disk: &Lun) {
        disk.reset();
        let all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        for nexus in all.iter().filter_map(Weak::upgrade) {
            nexus.attentions(disk.index()).reset(UnitAttention::PowerOnOrReset);
        }
    }

    /// Decodes the LUN field of a virtio-scsi header (VIRTIO 1.3 5.6.6.1): 1, target, single-level
    /// LUN; or the REPORT LUNS well-known unit, with or without a target in front.
    pub fn resolve(&self, field: &[u8; 8]) -> Addressed {
        let [kind, target, high, low, rest @ ..] = *field;
        if *field == REPORT_LUNS_WLUN {
            return Addressed::WellKnown(0);
        }
        if kind != 1 || !self.has_target(target) {
            return Addressed::AbsentTarget;
        }
        if [high, low] == [0xc1, 0x01] {
            return Addressed::WellKnown(target);
        }
        // Peripheral device (00b, bus 0) and flat space (01b) addressing; Linux sends the latter
        // even for LUN 0.
        let number = match high >> 6 {
            _ if rest != [0; 4] => None,
            0 if high == 0 => LunNumber::new(u16::from(low)),
            1 => LunNumber::new(u16::from_be_bytes([high & 0x3f, low])),
            _ => None,
        };
        match number.and_then(|n| self.disk(target, n)) {
            Some(disk) => Addressed::Disk(Arc::clone(disk)),
            None => Addressed::AbsentLun(target, number),
        }
    }

    fn has_target(&self, target: u8) -> bool {
        self.units_of(target).next().is_some()
    }

    fn disk(&self, target: u8, lun: LunNumber) -> Option<&Arc<Lun>> {
        self.by_address.get(&(target, lun)).and_then(|index| self.disks.get(*index))
    }

    /// The logical unit numbers of one target, in order.
    pub fn units_of(&self, target: u8) -> impl Iterator<Item = LunNumber> {
        let first = (target, LunNumber(0));
        let last = (target, LunNumber(MAX_LUN));
        self.by_address.range(first..=last).map(|((_, lun), _)| *lun)
    }

    /// Takes a command through all checks to its handler.
    pub fn execute(&self, nexus: &Arc<Nexus>, address: &Addressed, request: Request) -> Plan {
        match address {
            Addressed::Disk(lun) => self.execute_on_disk(nexus, lun, request),
            Addressed::WellKnown(target) => {
                Plan::Done(self.execute_without_disk(*target, &request, Missing::WellKnown))
            }
            Addressed::AbsentLun(target, number) => {
                let lun_zero = number.is_some_and(|n| n.get() == 0);
                Plan::Done(self.execute_without_disk(*target, &request, Missing::Lun { lun_zero }))
            }
            Addressed::AbsentTarget => Plan::Done(Outcome::undelivered(Delivery::BadTarget)),
        }
    }

    fn execute_on_disk(&self, nexus: &Arc<Nexus>, lun: &Arc<Lun>, request: Request) -> Plan {
        let data_in = request.data_in.clone();
        let reply = check(nexus, lun, &request).and_then(|command| {
            let context = Context { target: self, nexus, lun, request };
            Ok((command, (command.handler)(context)?))
        });
        let (command, reply) = match reply {
            Ok(done) => done,
            Err(error) => return Plan::Done(lun.failed(error)),
        };
        match reply {
            Reply::Good => Plan::Done(Outcome::good(0)),
            Reply::Consumed(bytes) => Plan::Done(Outcome::good(bytes)),
            Reply::Data { bytes, allocation } => Plan::Done(
                deliver(&data_in, &bytes, allocation).unwrap_or_else(|error| lun.failed(error)),
            ),
            Reply::Transfer(operation, bytes) => {
                let writing = command.access == Access::Write;
                Plan::Transfer(Transfer { lun: Arc::clone(lun), bytes, writing }, operation)
            }
            Reply::Job(job) => {
                let on = Arc::clone(lun);
                Plan::Job(
                    Arc::clone(lun),
                    Box::new(move |cancel: &Cancel| match job(cancel) {
                        Ok(transferred) => Outcome::good(transferred),
                        Err(error) => on.failed(error),
                    }),
                )
            }
        }
    }

    /// A command to a logical unit that is no disk: the well-known one, or none at all.
    fn execute_without_disk(&self, target: u8, request: &Request, missing: Missing) -> Outcome {
        cmd::without_disk(self, target, request, missing)
            .and_then(|(bytes, allocation)| deliver(&request.data_in, &bytes, allocation))
            .unwrap_or_else(|error| Outcome::failed(error, false))
    }
}

/// Why there is no disk behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It is the REPORT LUNS well-known logical unit.
    WellKnown,
    /// It is a number without a logical unit; number 0 answers REPORT LUNS all the same
    /// (SPC-5 6.34: an initiator has to begin somewhere).
    Lun {
        /// Whether it is number 0.
        lun_zero: bool,
    },
}

/// What every command is checked for before its handler sees it, in the order of SAM-6 5.3.3 and
/// SPC-5: known operation, unit attention, reserved bits, readiness, write protection.
fn check(nexus: &Nexus, lun: &Lun, request: &Request) -> Result<&'static Command, ScsiError> {
    let command = cmd::find(&request.cdb);
    let exempt = command.as_ref().is_ok_and(|c| c.exempt_from_attention);
    if !exempt && let Some(attention) = nexus.attentions(lun.index()).take() {
        return Err(ScsiError::Check(attention.sense()));
    }
    let command = command?;
    command.check_reserved_bits(&request.cdb)?;
    if command.access != Access::None {
        lun.check_ready()?;
    }
    if command.access == Access::Write {
        lun.check_writable()?;
    }
    Ok(command)
}

/// Gives data-in bytes to the initiator, cut off at the allocation length (SPC-5 4.2.5.6). There must
/// be room for all that the allocation length allows (VIRTIO 1.3 5.6.6.1.1, OVERRUN).
fn deliver(
    data_in: &crate::store::Buffers,
    bytes: &[u8],
    allocation: usize,
) -> Result<Outcome, ScsiError> {
    if allocation > data_in.len() {
        return Err(ScsiError::Overrun);
    }
    let bytes = bytes.get(..allocation).unwrap_or(bytes);
    Ok(Outcome::good(data_in.write_at(0, bytes)))
}

/// 05/25/00.
pub(super) const LUN_NOT_SUPPORTED: ScsiError = ScsiError::illegal(asc::LOGICAL_UNIT_NOT_SUPPORTED);
