//! The copy manager (SPC-5 5.18): copies under way, what became of those that ended, and the tokens
//! that stand for data. One for all disks of a target, as copies go from one to another.

pub mod rod;
pub mod segment;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::attention::{Nexus, Port};
use super::lun::Lun;
use super::sense::{Key, ScsiError, Sense, asc};
use crate::store::engine::Cancel;
use crate::store::engine::ending::{Ending, ending, keep};
use rod::{Rods, TokenBytes};

/// Copies at a time, over all initiators, if none has less than one; and of those that a disk is asked for, which may have as
/// many of its threads.
const MAX_COPIES: usize = 8;

/// Copies that are remembered after they have ended, over all initiators, if none has less than the second number.
const MAX_REMEMBERED: [usize; 2] = [256, 16];

/// What has become of a copy (SPC-5 table 211).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Under way, and the command waits for it.
    Foreground = 0x11,
    /// Under way, and the command has ended.
    Background = 0x12,
    /// Done.
    Done = 0x01,
    /// Ended with an error.
    Failed = 0x02,
    /// Done as far as the token's data went.
    Residual = 0x04,
    /// Ended because somebody wanted it to.
    Terminated = 0x60,
}

impl Status {
    fn is_running(self) -> bool {
        matches!(self, Status::Foreground | Status::Background)
    }
}

/// What is told of a copy.
#[derive(Clone, Debug)]
pub struct Report {
    /// What has become of it.
    pub status: Status,
    /// Segments that were processed.
    pub segments: u16,
    /// Bytes that were transferred.
    pub bytes: u64,
    /// Why it failed.
    pub sense: Option<Sense>,
    /// Tokens that it made.
    pub tokens: Vec<TokenBytes>,
}

/// One copy.
pub struct Operation {
    owner: Weak<Nexus>,
    /// The port that it came by.
    pub port: Port,
    /// The disk whose copy manager was asked.
    lun: usize,
    /// The disks that it reads and writes.
    others: Vec<usize>,
    list_id: Option<u32>,
    /// The command: its service action.
    pub service_action: u8,
    /// Logical block size of the disk that was asked, in bytes.
    pub block_size: u32,
    /// Remembered after its end.
    hold: bool,
    cancel: Cancel,
    report: Mutex<Report>,
    /// What waits for its end, and goes on when this is gone.
    waiting: Mutex<Vec<Waiter>>,
}

/// Something that goes on when everything that holds it has let go.
pub trait Waits: Send + Sync {
    /// Whether anybody still wants it to.
    fn is_awaited(&self) -> bool;
}

impl Waits for Ending {
    fn is_awaited(&self) -> bool {
        Ending::is_awaited(self)
    }
}

/// One of them.
pub type Waiter = Arc<dyn Waits>;

impl Operation {
    fn lock(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::scsi) fn waiting(&self) -> MutexGuard<'_, Vec<Waiter>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be told of it now.
    pub fn report(&self) -> Report {
        self.lock().clone()
    }

    /// Changes what is told of it.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock());
    }

    /// Whether it was told to end, as it is when its initiator goes.
    pub fn shall_end(&self) -> bool {
        self.cancel.is_requested()
    }

    /// Whether this initiator has asked for it.
    pub fn is_of(&self, nexus: &Nexus) -> bool {
        std::ptr::eq(self.owner.as_ptr(), nexus)
    }

    /// Whether this disk's copy manager was asked for it.
    pub fn was_asked_of(&self, lun: &Lun) -> bool {
        self.lun == lun.index()
    }

    /// Whether it has to do with a disk: that was asked, or is read, or is written.
    pub fn concerns(&self, lun: &Lun) -> bool {
        self.was_asked_of(lun) || self.others.contains(&lun.index())
    }

    fn is(&self, nexus: &Nexus, lun: &Lun, list_id: u32) -> bool {
        self.is_of(nexus) && self.was_asked_of(lun) && self.list_id == Some(list_id)
    }
}

/// How a copy is begun.
pub struct Start {
    /// LIST IDENTIFIER; `None` if it has none.
    pub list_id: Option<u32>,
    /// The command's service action.
    pub service_action: u8,
    /// Whether it is remembered after its end.
    pub hold: bool,
    /// Whether the command ends before the copy does.
    pub immediate: bool,
}

/// A copy that was entered and has to be ended. Dropped before that, because its command was taken back
/// before it began, it is terminated.
pub struct Running {
    manager: Arc<CopyManager>,
    operation: Arc<Operation>,
    ended: bool,
}

impl Running {
    /// Runs it to its end.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn run(
        mut self,
        work: impl FnOnce(&Operation) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        let result = work(&self.operation);
        self.manager.ended(&self.operation, &result);
        self.ended = true;
        result
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.manager.ended(&self.operation, &Err(ScsiError::Aborted));
        }
    }
}

/// All copies and tokens. Each initiator has a share of all there is, which no other can use up.
pub struct CopyManager {
    ports: usize,
    operations: Mutex<Vec<Arc<Operation>>>,
    rods: Rods,
}

/// The share of each of so many initiators.
fn share(all: usize, least: usize, initiators: usize) -> usize {
    (all / initiators.max(1)).max(least)
}

impl CopyManager {
    /// For so many initiators.
    pub fn new(ports: u16) -> Self {
        let ports = usize::from(ports);
        let rods = Rods::new(ports);
        CopyManager { ports, operations: Mutex::default(), rods }
    }

    /// TOTAL CONCURRENT COPIES and MAXIMUM IDENTIFIED CONCURRENT COPIES, as far as an initiator can have them.
    pub fn max_copies(&self) -> usize {
        share(MAX_COPIES, 1, self.ports)
    }

    /// The tokens.
    pub fn rods(&self) -> &Rods {
        &self.rods
    }

    fn operations(&self) -> MutexGuard<'_, Vec<Arc<Operation>>> {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a copy, which reads and writes these disks.
    ///
    /// # Errors
    /// 05/00/16 if the list identifier is in use, 05/55/03 if there are too many copies of the initiator or asked of the disk.
    pub fn begin(
        self: &Arc<Self>,
        nexus: &Arc<Nexus>,
        lun: &Lun,
        others: Vec<usize>,
        start: &Start,
    ) -> Result<Running, ScsiError> {
        let mut all = self.operations();
        let running = |o: &Operation| o.report().status.is_running();
        let same = |o: &Operation| start.list_id.is_some_and(|id| o.is(nexus, lun, id));
        if all.iter().any(|o| same(o) && running(o)) {
            return Err(ScsiError::illegal(asc::OPERATION_IN_PROGRESS));
        }
        let under_way = all.iter().filter(|o| running(o));
        let (own, here) = under_way.fold((0, 0), |(own, here), o| {
            (own + usize::from(o.is_of(nexus)), here + usize::from(o.was_asked_of(lun)))
        });
        if own >= self.max_copies() || here >= MAX_COPIES {
            return Err(ScsiError::illegal(asc::INSUFFICIENT_RESOURCES));
        }
        all.retain(|o| !same(o));
        let [most, least] = MAX_REMEMBERED;
        let told = |o: &Operation| o.is_of(nexus) && !running(o);
        if all.iter().filter(|o| told(o)).count() >= share(most, least, self.ports)
            && let Some(oldest) = all.iter().position(|o| told(o))
        {
            all.remove(oldest);
        }
        let report = Report {
            status: if start.immediate { Status::Background } else { Status::Foreground },
            segments: 0,
            bytes: 0,
            sense: None,
            tokens: Vec::new(),
        };
        let operation = Arc::new(Operation {
            owner: Arc::downgrade(nexus),
            port: nexus.port(),
            lun: lun.index(),
            others,
            list_id: start.list_id,
            service_action: start.service_action,
            block_size: lun.block_size(),
            hold: start.hold,
            cancel: Cancel::default(),
            report: Mutex::new(report),
            waiting: Mutex::default(),
        });
        all.push(Arc::clone(&operation));
        Ok(Running { manager: Arc::clone(self), operation, ended: false })
    }

    /// Notes how a copy has ended.
    fn ended(&self, operation: &Arc<Operation>, result: &Result<(), ScsiError>) {
        let mut all = self.operations();
        operation.update(|report| match result {
            Ok(()) if report.status.is_running() => report.status = Status::Done,
            Ok(()) => {}
            Err(ScsiError::Aborted) => report.status = Status::Terminated,
            Err(error) => {
                report.status = Status::Failed;
                report.sense = Some(error.as_sense());
            }
        });
        if !operation.hold {
            all.retain(|o| !Arc::ptr_eq(o, operation));
        }
        let waiting = std::mem::take(&mut *operation.waiting());
        drop(all);
        drop(waiting);
    }

    /// The copy with this list identifier.
    ///
    /// # Errors
    /// 05/24/00 pointing at the field if there is none.
    pub fn find(
        &self,
        nexus: &Nexus,
        lun: &Lun,
        list_id: u32,
        field: u16,
    ) -> Result<Arc<Operation>, ScsiError> {
        let all = self.operations();
        let found = all.iter().find(|o| o.is(nexus, lun, list_id));
        found.cloned().ok_or(ScsiError::cdb_field(field, 7))
    }

    /// Forgets a copy whose end was told.
    pub fn forget(&self, operation: &Arc<Operation>) {
        self.operations().retain(|o| !Arc::ptr_eq(o, operation));
    }

    /// Has copies end; says whether there are any. Each holds `waiter` until it has: what is to be over before something is
    /// answered writes nothing when that is (SAM-6 7.1).
    ///
    /// Whoever keeps others out does that before: a copy looks whether it may begin after it was entered into the list that
    /// is looked through here.
    pub fn end(&self, which: impl Fn(&Operation) -> bool, waiter: &Waiter) -> bool {
        let all = self.operations();
        let mut any = false;
        for operation in all.iter().filter(|o| o.report().status.is_running() && which(o)) {
            any = true;
            operation.cancel.request();
            keep(&mut operation.waiting(), Arc::clone(waiter), |waiter| waiter.is_awaited());
        }
        any
    }

    /// The same, and waits for the last of them: for as long as the host takes for a step of each.
    pub fn end_and_wait(&self, which: impl Fn(&Operation) -> bool) {
        let (ending, ended) = ending();
        let waiter: Waiter = ending;
        self.end(which, &waiter);
        drop(waiter);
        ended.wait();
    }

    /// Forgets copies that have ended.
    pub fn forget_all(&self, which: impl Fn(&Operation) -> bool) {
        self.operations().retain(|o| o.report().status.is_running() || !which(o));
    }
}

impl ScsiError {
    /// Sense data for a copy that is asked about after it has failed.
    fn as_sense(self) -> Sense {
        match self {
            ScsiError::Check(sense) => sense,
            ScsiError::Busy
            | ScsiError::ReservationConflict
            | ScsiError::Overrun
            | ScsiError::Aborted => Sense::new(Key::CopyAborted, asc::NONE),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::scsi::{LunNumber, LunSettings, Target};
    use crate::store::Store;
    use crate::store::mem::MemStore;

    /// A disk of so many bytes a block.
    pub(in crate::scsi) fn disk(
        index: usize,
        block_size: u32,
        store: impl Store + 'static,
    ) -> Arc<Lun> {
        let settings = LunSettings {
            target: 0,
            lun: LunNumber::MIN,
            serial: format!("D{index}"),
            naa: vec![0x30; 8],
            block_size,
            physical_block_size: block_size,
            rotational: false,
            discard: true,
            discard_granularity: 512,
            detect_zeroes: Default::default(),
            write_cache: true,
        };
        Arc::new(Lun::new(settings, index, Arc::new(store)).unwrap())
    }

    /// A target of two disks for so many initiators.
    pub(in crate::scsi) fn target(ports: u16) -> Arc<Target> {
        let disks = [0, 1].map(|index| disk(index, 512, MemStore::new(1 << 20)));
        Arc::new(Target::new(disks.into(), ports))
    }

    /// Enters a copy that was asked of a disk.
    pub(in crate::scsi) fn begin(
        target: &Target,
        nexus: &Arc<Nexus>,
        disk: usize,
        list_id: u32,
    ) -> Result<Running, ScsiError> {
        let start =
            Start { list_id: Some(list_id), service_action: 1, hold: true, immediate: true };
        target.copies().begin(nexus, &target.disks()[disk], Vec::new(), &start)
    }

    #[test]
    fn a_list_identifier_is_in_use_as_long_as_its_copy() {
        let target = target(1);
        let (nexus, disk) = (target.connect(Port(1)), &target.disks()[0]);
        let first = begin(&target, &nexus, 0, 7).unwrap();
        let in_use = Err(ScsiError::illegal(asc::OPERATION_IN_PROGRESS));
        assert_eq!(begin(&target, &nexus, 0, 7).map(drop), in_use);
        let found = || target.copies().find(&nexus, disk, 7, 0).unwrap();
        assert!(Arc::ptr_eq(&found(), &first.operation), "and that one can be ended");
        begin(&target, &nexus, 1, 7).unwrap();
        begin(&target, &nexus, 0, 8).unwrap();
        first.run(|_| Ok(())).unwrap();
        let second = begin(&target, &nexus, 0, 7).unwrap();
        assert!(Arc::ptr_eq(&found(), &second.operation), "what is told is of the newer one");
    }

    /// One that begins while others are forgotten can still be asked about, and ended.
    #[test]
    fn a_copy_that_runs_is_not_forgotten() {
        let target = target(1);
        let nexus = target.connect(Port(1));
        let (running, ended) = (begin(&target, &nexus, 0, 1), begin(&target, &nexus, 0, 2));
        ended.unwrap().run(|_| Ok(())).unwrap();
        target.copies().forget_all(|_| true);
        let find = |list_id| target.copies().find(&nexus, &target.disks()[0], list_id, 0);
        assert!(find(1).is_ok() && find(2).is_err());
        drop(running);
        target.copies().forget_all(|_| true);
        assert!(find(1).is_err());
    }

    /// Whatever the initiators' shares, a disk's threads are not all busy with copies.
    #[test]
    fn a_disk_is_asked_for_so_many_copies_at_most() {
        let most = MAX_COPIES as u16;
        let target = target(most + 1);
        let all: Vec<_> = (1..=most + 1).map(|port| target.connect(Port(port))).collect();
        let (last, others) = all.split_last().unwrap();
        let mut running: Vec<_> =
            others.iter().map(|nexus| begin(&target, nexus, 0, 1).unwrap()).collect();
        let too_many = Err(ScsiError::illegal(asc::INSUFFICIENT_RESOURCES));
        assert_eq!(begin(&target, last, 0, 1).map(drop), too_many);
        begin(&target, last, 1, 1).unwrap();
        running.pop();
        begin(&target, last, 0, 2).unwrap();
    }

    #[test]
    fn a_copy_that_somebody_wanted_to_end_has_not_failed() {
        let target = target(1);
        let nexus = target.connect(Port(1));
        for (result, status) in [
            (Ok(()), Status::Done),
            (Err(ScsiError::Aborted), Status::Terminated),
            (Err(ScsiError::Busy), Status::Failed),
        ] {
            let running = begin(&target, &nexus, 0, 1).unwrap();
            let operation = Arc::clone(&running.operation);
            assert_eq!(running.run(|_| result), result);
            let report = operation.report();
            assert_eq!((report.status, report.sense.is_some()), (status, status == Status::Failed));
        }
        // Its command was taken back before it began.
        let never = begin(&target, &nexus, 0, 1).unwrap();
        let operation = Arc::clone(&never.operation);
        drop(never);
        assert_eq!(operation.report().status, Status::Terminated);
        let partly = begin(&target, &nexus, 0, 1).unwrap();
        let operation = Arc::clone(&partly.operation);
        let work = |copy: &Operation| {
            copy.update(|report| report.status = Status::Residual);
            Ok(())
        };
        partly.run(work).unwrap();
        assert_eq!(operation.report().status, Status::Residual);
    }
}
