//! All the disks of the daemon: how they are found, who is connected to them, and who has to be told
//! what.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::address::{LunNumber, REPORT_LUNS_WLUN};
use super::attention::{Nexus, Port, UnitAttention};
use super::background;
use super::copy::{CopyManager, Waiter};
use super::lun::Lun;
use crate::store::engine::ending::{Ending, ending};

/// What a transport address leads to.
#[derive(Clone, Copy)]
pub enum Addressed<'a> {
    /// A disk.
    Disk(&'a Arc<Lun>),
    /// The REPORT LUNS well-known logical unit of a target.
    WellKnown(u8),
    /// A target that is there, but no such logical unit; the number, if it is one at all.
    AbsentLun(u8, Option<LunNumber>),
    /// Nothing.
    AbsentTarget,
}

impl<'a> Addressed<'a> {
    /// The disk, if it is one.
    pub fn disk(self) -> Option<&'a Arc<Lun>> {
        match self {
            Addressed::Disk(lun) => Some(lun),
            Addressed::WellKnown(_) | Addressed::AbsentLun(..) | Addressed::AbsentTarget => None,
        }
    }
}

/// The commands in flight, as whoever carries them knows them.
pub trait Tasks: Send + Sync {
    /// Ends the commands that came by these ports to a disk, with TASK ABORTED (SAM-6 5.3.1; the TAS bit is
    /// one). Each holds `ending` until it has ended.
    fn abort(&self, ports: &[Port], disk: usize, ending: Arc<Ending>);

    /// Has the commands end that are under way at the medium of a disk, whose ever they are: early where they can. Each holds
    /// `ending` until it has ended.
    fn clear(&self, disk: usize, ending: Arc<Ending>);

    /// The contents of a disk are about to change as a whole: what queues that do not run have in flight is not done
    /// again when they do.
    fn fence(&self, disk: usize);

    /// The initiator behind a port changes a disk: what others have in flight must not be done again over that, not even
    /// by another process.
    fn note_change(&self, port: Port, disk: usize);
}

/// Logical units of target 0 that are found at once.
const FIRST: u16 = 64;

/// Every disk of the daemon, under one or more target numbers.
pub struct Target {
    disks: Vec<Arc<Lun>>,
    by_address: BTreeMap<(u8, LunNumber), usize>,
    /// The same for the first logical units of target 0, where nearly all are: looked at for every command.
    first: Vec<Option<usize>>,
    ports: u16,
    nexuses: Mutex<Vec<Weak<Nexus>>>,
    tasks: OnceLock<Weak<dyn Tasks>>,
    copies: Arc<CopyManager>,
    service: Mutex<Service>,
}

/// Whether commands can come.
#[derive(Default)]
struct Service {
    /// In how many ways, of all initiators.
    ways: usize,
    /// Until when the first of them waits for what is being found out of the disks.
    patience: Option<Instant>,
}

/// How long commands are kept from coming while it is found out what is noted of the disks. After that those to disks of
/// which it is not known yet are BUSY: their host hangs, and that of others does not.
const TAKING_OVER: Duration = Duration::from_secs(1);

impl Target {
    /// A target over these disks, in the order of their index, with so many ports.
    pub fn new(disks: Vec<Arc<Lun>>, ports: u16) -> Self {
        let address = |d: &Arc<Lun>| ((d.settings().target, d.settings().lun), d.index());
        let by_address: BTreeMap<_, _> = disks.iter().map(address).collect();
        let lun = |n| LunNumber::new(n).and_then(|lun| by_address.get(&(0, lun)).copied());
        let first = (0..FIRST).map(lun).collect();
        Target {
            disks,
            by_address,
            first,
            ports,
            nexuses: Mutex::default(),
            tasks: OnceLock::new(),
            copies: Arc::new(CopyManager::new(ports)),
            service: Mutex::default(),
        }
    }

    fn service(&self) -> MutexGuard<'_, Service> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands are about to come in one more way. With the first the disks are taken over from whoever had them before:
    /// another process, or this one an hour ago.
    pub fn begin_service(&self) {
        let mut service = self.service();
        service.ways += 1;
        if service.ways == 1 {
            service.patience = Some(Instant::now() + TAKING_OVER);
            self.disks.iter().for_each(background::take_over);
        }
        let patience = service.patience;
        drop(service);
        for (disk, end) in self.disks.iter().zip(patience.into_iter().cycle()) {
            disk.background().wait_until_known(end);
        }
    }

    /// Commands come in one way less, and none is under way there. When the last has ended the disks may be another
    /// process's: nothing that writes to them, or notes anything of them, goes on when this returns.
    pub fn end_service(&self) {
        let mut service = self.service();
        service.ways = service.ways.saturating_sub(1);
        if service.ways > 0 {
            return;
        }
        self.disks.iter().for_each(|disk| disk.background().leave());
        drop(service);
        self.disks.iter().for_each(|disk| disk.background().wait_until_left());
    }

    /// Its ports.
    pub fn ports(&self) -> impl Iterator<Item = Port> {
        (1..=self.ports).map(Port)
    }

    /// Tells it, once, who knows the commands in flight.
    pub fn set_tasks(&self, tasks: Weak<dyn Tasks>) {
        self.disks.iter().for_each(|disk| disk.sharing().set_tasks(Weak::clone(&tasks)));
        let _ = self.tasks.set(tasks);
    }

    /// As [`Tasks::abort`].
    pub fn abort_tasks(&self, ports: &[Port], disk: &Lun, ending: Arc<Ending>) {
        if let Some(tasks) = self.tasks.get().and_then(Weak::upgrade) {
            tasks.abort(ports, disk.index(), ending);
        }
    }

    /// Before a disk gets other contents as a whole, and once it lets nobody in: the commands under way at its medium and
    /// the copies from and to it have ended when this returns, and tokens for its data stand for nothing, so that nothing
    /// of before is within reach or still to be written (SBC-4 4.11.2). Waits for the host.
    pub fn clear(&self, disk: &Lun) {
        self.copies.rods().revoke(|rod| rod.is_of(disk));
        let (ending, ended) = ending();
        let waiter: Waiter = Arc::<Ending>::clone(&ending);
        self.copies.end(|copy| copy.concerns(disk), &waiter);
        drop(waiter);
        if let Some(tasks) = self.tasks.get().and_then(Weak::upgrade) {
            tasks.clear(disk.index(), Arc::clone(&ending));
        }
        drop(ending);
        ended.wait();
        // Once more: one of the commands may have begun a copy before it ended.
        self.copies.end_and_wait(|copy| copy.concerns(disk));
    }

    /// Copies between the disks.
    pub fn copies(&self) -> &Arc<CopyManager> {
        &self.copies
    }

    /// All disks.
    pub fn disks(&self) -> &[Arc<Lun>] {
        &self.disks
    }

    /// An initiator comes by a port: for it every disk has just been powered on.
    pub fn connect(&self, port: Port) -> Arc<Nexus> {
        let nexus = Arc::new(Nexus::new(port, self.disks.len()));
        let mut all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|n| n.strong_count() > 0);
        all.push(Arc::downgrade(&nexus));
        drop(all);
        // What was lost before it came is none of its own writes; its flushes fail all the same.
        for disk in self.disks.iter().filter(|disk| disk.loss().is_some()) {
            nexus.attentions(disk.index()).learn_of_loss();
        }
        self.power_on(&nexus);
        nexus
    }

    /// What an initiator has started goes on no longer than it does: its copies have ended when this returns, nothing is
    /// known of them any more, and its tokens stand for nothing. For when none of its commands is under way. Waits for the
    /// host.
    pub fn end_nexus(&self, nexus: &Nexus) {
        self.copies.end_and_wait(|copy| copy.is_of(nexus));
        self.copies.forget_all(|copy| copy.is_of(nexus));
        self.copies.rods().revoke(|rod| rod.is_by(nexus.port()));
    }

    /// The initiator behind a port has gone.
    pub fn disconnected(&self, port: Port) {
        self.disks.iter().for_each(|disk| disk.reservations().nexus_lost(port));
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
            disk.reservations().nexus_lost(nexus.port());
            nexus.attentions(disk.index()).reset(UnitAttention::PowerOnOrReset);
        }
    }

    /// The effect of I_T NEXUS RESET on a disk, once the commands and copies of that initiator have ended.
    pub fn reset_nexus(&self, nexus: &Nexus, disk: &Lun) {
        disk.reservations().nexus_lost(nexus.port());
        self.copies.forget_all(|copy| copy.is_of(nexus) && copy.was_asked_of(disk));
        self.copies.rods().revoke(|rod| rod.is_by(nexus.port()) && rod.is_of(disk));
        nexus.attentions(disk.index()).raise(UnitAttention::NexusLoss);
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

    /// Tells the initiator behind a port about a condition of one disk.
    pub fn tell(&self, disk: &Lun, attention: UnitAttention, port: Port) {
        let all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        for nexus in all.iter().filter_map(Weak::upgrade) {
            if nexus.port() == port {
                nexus.attentions(disk.index()).raise(attention);
            }
        }
    }

    /// The effect of LOGICAL UNIT RESET on a disk, once its commands and copies have ended.
    pub fn reset(&self, disk: &Lun) {
        disk.reset();
        self.copies.forget_all(|copy| copy.was_asked_of(disk));
        let all = self.nexuses.lock().unwrap_or_else(PoisonError::into_inner);
        for nexus in all.iter().filter_map(Weak::upgrade) {
            nexus.attentions(disk.index()).reset(UnitAttention::PowerOnOrReset);
        }
    }

    /// Decodes the LUN field of a virtio-scsi header (VIRTIO 1.3 5.6.6.1): 1, target, single-level
    /// LUN; or the REPORT LUNS well-known unit, with or without a target in front.
    pub fn resolve(&self, field: &[u8; 8]) -> Addressed<'_> {
        let [kind, target, high, low, rest @ ..] = *field;
        if *field == REPORT_LUNS_WLUN {
            return Addressed::WellKnown(0);
        }
        // Peripheral device (00b, bus 0) and flat space (01b) addressing; Linux sends the latter
        // even for LUN 0.
        let number = match high >> 6 {
            _ if rest != [0; 4] => None,
            0 if high == 0 => LunNumber::new(u16::from(low)),
            1 => LunNumber::new(u16::from_be_bytes([high & 0x3f, low])),
            _ => None,
        };
        match number.filter(|_| kind == 1).and_then(|n| self.disk(target, n)) {
            Some(disk) => Addressed::Disk(disk),
            None if kind != 1 || !self.has_target(target) => Addressed::AbsentTarget,
            None if [high, low] == [0xc1, 0x01] => Addressed::WellKnown(target),
            None => Addressed::AbsentLun(target, number),
        }
    }

    fn has_target(&self, target: u8) -> bool {
        self.units_of(target).next().is_some()
    }

    fn disk(&self, target: u8, lun: LunNumber) -> Option<&Arc<Lun>> {
        let index = match self.first.get(usize::from(lun.get())) {
            Some(index) if target == 0 => (*index)?,
            _ => *self.by_address.get(&(target, lun))?,
        };
        self.disks.get(index)
    }

    /// The logical unit numbers of one target, in order.
    pub fn units_of(&self, target: u8) -> impl Iterator<Item = LunNumber> {
        let of_target = (target, LunNumber::MIN)..=(target, LunNumber::MAX);
        self.by_address.range(of_target).map(|((_, lun), _)| *lun)
    }
}
