//! The control queue: task management functions (VIRTIO 1.3 5.6.6.2, SAM-6 7) and asynchronous
//! notification requests.
//!
//! A function that ends commands is a [`Sweep`]: every request queue marks the commands it is about
//! and each of them holds the sweep until it has ended. When the last one lets go, the function is
//! answered. So a function never answers before what it ended is over, and never waits for anything
//! else.
//!
//! Copies that go on when their commands have been answered are no part of a task set: the functions about tasks leave
//! them alone (there is COPY OPERATION ABORT), resets end them. A reset looks for them again when its commands have ended,
//! as some of those may have begun one meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zerocopy::{FromBytes, IntoBytes};

use super::Connections;
use super::guest_buf::Chain;
use super::message::{Mailbox, Message, Queues, Report, Sweep};
use super::ring::Ring;
use super::wire::{
    AsyncNotification, AsyncNotificationResponse, Ended, Response, T_AN_QUERY, T_AN_SUBSCRIBE,
    T_TMF, TaskManagement,
};
use super::worker::{Service, Step};
use crate::scsi::copy::{Operation, Waiter};
use crate::scsi::{Addressed, Lun, Nexus, Target};
use crate::store::Buffers;

/// VIRTIO_SCSI_T_TMF_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    AbortTask,
    AbortTaskSet,
    ClearTaskSet,
    ItNexusReset,
    LogicalUnitReset,
    QueryTask,
    QueryTaskSet,
}

impl Function {
    /// `None` for CLEAR ACA (there is never one: NORMACA is zero) and for what is not defined.
    fn parse(subtype: u32) -> Option<Self> {
        Some(match subtype {
            0 => Function::AbortTask,
            1 => Function::AbortTaskSet,
            3 => Function::ClearTaskSet,
            4 => Function::ItNexusReset,
            5 => Function::LogicalUnitReset,
            6 => Function::QueryTask,
            7 => Function::QueryTaskSet,
            _ => return None,
        })
    }

    /// How the commands it ends are answered.
    fn ends_with(self) -> Option<Ended> {
        match self {
            Function::AbortTask | Function::AbortTaskSet | Function::ClearTaskSet => {
                Some(Ended::As(Response::Aborted))
            }
            Function::ItNexusReset | Function::LogicalUnitReset => Some(Ended::As(Response::Reset)),
            Function::QueryTask | Function::QueryTaskSet => None,
        }
    }

    /// Whether it is about one command, named by its tag.
    fn is_about_one_task(self) -> bool {
        matches!(self, Function::AbortTask | Function::QueryTask)
    }
}

/// A function that waits for its sweep.
struct Pending {
    head: u16,
    room: Buffers,
    function: Function,
    disks: Vec<Arc<Lun>>,
    found: Arc<AtomicBool>,
    /// Its commands have ended, and it waits for copies at the most.
    swept: bool,
}

/// Serves the control queue.
pub(super) struct ControlQueue {
    target: Arc<Target>,
    nexus: Arc<Nexus>,
    queues: Arc<Queues>,
    connections: Arc<Connections>,
    /// Its own: the end of a sweep comes there.
    mailbox: Mailbox,
    pending: HashMap<u64, Pending>,
    next: u64,
    /// What is not answered yet is left to the next process.
    leaves: bool,
}

impl ControlQueue {
    /// The control queue of a connection with these queues; `mailbox` is the one of its thread.
    pub(super) fn new(
        target: Arc<Target>,
        nexus: Arc<Nexus>,
        queues: Arc<Queues>,
        connections: Arc<Connections>,
        mailbox: Mailbox,
    ) -> Self {
        let pending = HashMap::new();
        ControlQueue {
            target,
            nexus,
            queues,
            connections,
            mailbox,
            pending,
            next: 0,
            leaves: false,
        }
    }

    fn begin(&mut self, ring: &mut Ring, chain: Chain) {
        let mut kind = [0; 4];
        if chain.readable.read_at(0, &mut kind) < kind.len() {
            return ring.refuse(chain.head, "control request without a type");
        }
        match u32::from_le_bytes(kind) {
            T_TMF => self.task_management(ring, chain),
            T_AN_QUERY | T_AN_SUBSCRIBE => self.async_notification(ring, &chain),
            _ => ring.refuse(chain.head, "unknown control request"),
        }
    }

    /// No event that can be asked for ever happens to a disk: they are about removable media, power
    /// and multi-host devices. So none is reported as there, and none is subscribed to.
    fn async_notification(&self, ring: &mut Ring, chain: &Chain) {
        let request = chain.readable.to_vec(size_of::<AsyncNotification>());
        let Ok(request) = AsyncNotification::ref_from_bytes(&request) else {
            return ring.refuse(chain.head, "short notification request");
        };
        let response = match self.target.resolve(&request.lun) {
            Addressed::Disk(_) | Addressed::WellKnown(_) => Response::Ok,
            Addressed::AbsentLun(..) => Response::IncorrectLun,
            Addressed::AbsentTarget => Response::BadTarget,
        };
        let answer = AsyncNotificationResponse { actual: 0.into(), response: response as u8 };
        if chain.writable.len() < size_of::<AsyncNotificationResponse>() {
            return ring.refuse(chain.head, "no room for a response");
        }
        ring.push(chain.head, chain.writable.write_at(0, answer.as_bytes()));
    }

    fn task_management(&mut self, ring: &mut Ring, chain: Chain) {
        let Chain { head, readable, writable: room } = chain;
        let request = readable.to_vec(size_of::<TaskManagement>());
        let Ok(request) = TaskManagement::ref_from_bytes(&request) else {
            return ring.refuse(head, "short task management request");
        };
        if room.is_empty() {
            return ring.refuse(head, "no room for a response");
        }
        let Some(function) = Function::parse(request.subtype.get()) else {
            return answer(ring, head, &room, Response::FunctionRejected);
        };
        let disks = match self.disks(function, &request.lun) {
            Ok(disks) => disks,
            Err(response) => return answer(ring, head, &room, response),
        };
        let tag = function.is_about_one_task().then_some(request.tag.get());
        let found = Arc::new(AtomicBool::new(false));
        let pending = Pending { head, room, function, disks, found, swept: false };
        self.start(pending, tag);
    }

    /// The disks that a function is about.
    fn disks(&self, function: Function, lun: &[u8; 8]) -> Result<Vec<Arc<Lun>>, Response> {
        let address = self.target.resolve(lun);
        if let (Function::ItNexusReset, [_, target, ..]) = (function, lun) {
            return match address {
                Addressed::AbsentTarget => Err(Response::BadTarget),
                _ => {
                    let all = self.target.disks().iter();
                    Ok(all.filter(|d| d.settings().target == *target).cloned().collect())
                }
            };
        }
        match (address.disk(), &address) {
            (Some(disk), _) => Ok(vec![Arc::clone(disk)]),
            (None, Addressed::AbsentTarget) => Err(Response::BadTarget),
            (None, _) => Err(Response::IncorrectLun),
        }
    }

    fn start(&mut self, pending: Pending, tag: Option<u64>) {
        let id = self.next;
        self.next += 1;
        let disks = pending.disks.iter().map(|d| d.index()).collect();
        let found = Arc::clone(&pending.found);
        let report = Report::Queue { to: self.mailbox.clone(), id, found };
        let (owner, ends_with) = (self.nexus.port(), pending.function.ends_with());
        let sweep = Arc::new(Sweep::new(Some(owner), disks, tag, ends_with, report));
        // A reset ends everybody's commands; all else is about those of this initiator: each has a task set
        // of its own (TST 001b).
        if pending.function == Function::LogicalUnitReset {
            pending.disks.iter().for_each(|disk| disk.note_change(owner));
            self.connections.sweep_for_reset(&self.queues, &sweep);
        }
        let waiter: Waiter = Arc::<Sweep>::clone(&sweep);
        self.end_copies(&pending, &waiter);
        self.queues.sweep(&sweep);
        self.pending.insert(id, pending);
    }

    /// Has the copies end that a reset is about; says whether there are any.
    fn end_copies(&self, pending: &Pending, waiter: &Waiter) -> bool {
        let (copies, disks) = (self.target.copies(), &pending.disks);
        match pending.function {
            Function::LogicalUnitReset => {
                copies.end(|copy| disks.iter().any(|disk| copy.concerns(disk)), waiter)
            }
            Function::ItNexusReset => {
                let of_these = |copy: &Operation| disks.iter().any(|disk| copy.was_asked_of(disk));
                copies.end(|copy| copy.is_of(&self.nexus) && of_these(copy), waiter)
            }
            Function::AbortTask
            | Function::AbortTaskSet
            | Function::ClearTaskSet
            | Function::QueryTask
            | Function::QueryTaskSet => false,
        }
    }

    /// A sweep is over, and then what it has left to wait for: the function takes effect and is answered.
    fn finish(&mut self, ring: &mut Ring, id: u64) {
        let Some(mut pending) = self.pending.remove(&id) else { return };
        if !std::mem::replace(&mut pending.swept, true) {
            let report = Report::Queue { to: self.mailbox.clone(), id, found: Arc::default() };
            let waiter: Waiter = Arc::new(Sweep::new(None, Vec::new(), None, None, report));
            if self.end_copies(&pending, &waiter) {
                self.pending.insert(id, pending);
                return;
            }
        }
        let found = pending.found.load(Ordering::Acquire);
        let response = match pending.function {
            Function::QueryTask | Function::QueryTaskSet if found => Response::FunctionSucceeded,
            _ => Response::Ok,
        };
        for disk in &pending.disks {
            match pending.function {
                Function::LogicalUnitReset => self.target.reset(disk),
                Function::ItNexusReset => self.target.reset_nexus(&self.nexus, disk),
                Function::AbortTask
                | Function::AbortTaskSet
                | Function::ClearTaskSet
                | Function::QueryTask
                | Function::QueryTaskSet => {}
            }
        }
        answer(ring, pending.head, &pending.room, response);
    }
}

fn answer(ring: &mut Ring, head: u16, room: &Buffers, response: Response) {
    ring.push(head, room.write_at(0, &[response as u8]));
}

impl Service for ControlQueue {
    fn advance(&mut self, ring: &mut Ring, take: bool) -> Step {
        // No more than a ring's worth wait for their end: a driver that hands out a chain twice gains nothing by it.
        let take = take && !self.leaves;
        let most = if take { ring.size().saturating_sub(self.pending.len()) } else { 0 };
        for _ in 0..most {
            match ring.pop() {
                Some(chain) => self.begin(ring, chain),
                None => return Step::Rest { more: false },
            }
        }
        Step::Rest { more: take && self.wants_requests(ring) }
    }

    fn progress(&mut self, _: &mut Ring) {}

    fn message(&mut self, ring: &mut Ring, message: Message) {
        match message {
            Message::Swept(id) => self.finish(ring, id),
            // They stay noted as in flight, and the next process does them again, when it has seen the commands.
            Message::GiveUp { leave: true } if ring.keeps_requests() => {
                self.leaves = true;
                self.pending.clear();
            }
            _ => {}
        }
    }

    /// Functions that wait for a ring which does not run may wait for ever.
    fn stop(&mut self) -> Vec<Arc<Sweep>> {
        self.queues.release();
        Vec::new()
    }

    fn wants_requests(&self, ring: &Ring) -> bool {
        !self.leaves && self.pending.len() < ring.size()
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::guest_buf::Framing;
    use super::super::memory::GuestMemory;
    use super::super::ring::Rules;
    use super::super::split_ring::Layout;
    use super::*;
    use crate::scsi::copy::Start;
    use crate::scsi::{LunNumber, LunSettings, Port};
    use crate::store::mem::MemStore;

    const REQUESTS: usize = 2;

    /// A control queue of eight, in which LOGICAL UNIT RESET of a disk is offered, always in the same chain; and a request
    /// queue that was told of and does not run.
    struct Rig {
        control: ControlQueue,
        ring: Ring,
        memory: Arc<GuestMemory>,
        inbox: Receiver<Message>,
        lun: Arc<Lun>,
    }

    impl Rig {
        fn new() -> Self {
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
            let lun = Lun::new(settings, 0, Arc::new(MemStore::new(1 << 20))).unwrap();
            let lun = Arc::new(lun);
            let target = Arc::new(Target::new(vec![Arc::clone(&lun)], 1));
            let nexus = target.connect(Port(1));
            let queues = Arc::new(Queues::new(REQUESTS + 1));
            queues.told(REQUESTS);
            let (mailbox, inbox) = Mailbox::new().unwrap();
            let connections = Arc::new(Connections::new(&target, REQUESTS + 1));
            let control = ControlQueue::new(target, nexus, queues, connections, mailbox);
            let ranges = [(GuestAddress(0), 0x4000)];
            let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
            let descriptor = |at: u64, address: u64, len: u32, flags: u16, next: u16| {
                memory.write_obj(address, GuestAddress(at)).unwrap();
                memory.write_obj(len, GuestAddress(at + 8)).unwrap();
                memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
                memory.write_obj(next, GuestAddress(at + 14)).unwrap();
            };
            descriptor(0, 0x3000, 24, 1, 1);
            descriptor(16, 0x3100, 1, 2, 0);
            memory.write_obj(5u32, GuestAddress(0x3004)).unwrap();
            memory.write_obj([1u8, 0, 0x40, 0], GuestAddress(0x3008)).unwrap();
            let layout = Layout {
                size: 8,
                descriptors: GuestAddress(0),
                available: GuestAddress(0x1000),
                used: GuestAddress(0x2000),
            };
            let rules = Rules { event_idx: false, framing: Framing::Any };
            let ring = Ring::new(0, layout, rules, Some(0), &memory, None, None).unwrap();
            Rig { control, ring, memory, inbox, lun }
        }

        /// So many have been offered; says how many wait.
        fn offer(&mut self, index: u16) -> usize {
            self.memory.write_obj(index, GuestAddress(0x1002)).unwrap();
            let _ = self.control.advance(&mut self.ring, true);
            self.control.in_flight()
        }

        /// What its thread does with its messages; says how many functions have been answered.
        fn hear(&mut self) -> u16 {
            while let Ok(message) = self.inbox.try_recv() {
                self.control.message(&mut self.ring, message);
            }
            self.ring.announce();
            self.memory.read_obj(GuestAddress(0x2002)).unwrap()
        }
    }

    /// A driver that offers a chain again before it has it back has no more functions waiting for it.
    #[test]
    fn no_more_functions_wait_than_a_ring_holds() {
        let mut rig = Rig::new();
        assert_eq!((rig.offer(8), rig.hear()), (8, 0));
        assert_eq!((rig.offer(16), rig.hear()), (8, 0));
        rig.control.queues.forget(REQUESTS);
        assert_eq!((rig.hear(), rig.control.in_flight()), (8, 0));
    }

    /// One of the commands that a reset ends may have begun a copy after copies were looked for.
    #[test]
    fn a_reset_waits_for_a_copy_that_has_begun_meanwhile() {
        let mut rig = Rig::new();
        assert_eq!((rig.offer(1), rig.hear()), (1, 0));
        let start = Start { list_id: Some(1), service_action: 1, hold: true, immediate: true };
        let (copies, nexus) = (rig.control.target.copies(), &rig.control.nexus);
        let copy = copies.begin(nexus, &rig.lun, vec![0], &start).unwrap();
        let found = copies.find(nexus, &rig.lun, 1, 1).unwrap();
        rig.control.queues.forget(REQUESTS);
        assert_eq!((rig.hear(), rig.control.in_flight()), (0, 1), "answered before it has ended");
        assert!(found.shall_end());
        drop(copy);
        assert_eq!((rig.hear(), rig.control.in_flight()), (1, 0));
    }
}
