//! The request queues: commands in, responses out, in any order that task attributes allow.

use std::os::fd::RawFd;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::guest_buf::{CommandChain, Part};
use super::message::{Message, Sweep};
use super::order::{Attribute, Order};
use super::ring::Ring;
use super::wire::{CommandResponse, Ended, Response};
use super::worker::Service;
use crate::scsi::{
    self, Cdb, Delivery, Nexus, Outcome, Plan, Request, ScsiError, Target, Transfer,
};
use crate::store::Cause;
use crate::store::engine::uring::UringEngine;
use crate::store::engine::{Completion, Engine, EngineKind, Finished, Token};

/// Requests taken in one pass before completions are looked at again.
const BATCH: usize = 64;

/// Requests taken together: what the driver's processor has just written of one is on its way to ours while another
/// is worked on.
const TOGETHER: usize = 8;

/// A command that was received: who gave it, and where its answer goes.
struct Received {
    head: u16,
    tag: u64,
    response: Part,
    data: DataPhase,
}

/// The data buffers of a command.
#[derive(Clone, Copy)]
struct DataPhase {
    /// Length in bytes.
    len: usize,
    /// Whether they are written to.
    to_driver: bool,
}

/// A command in flight.
struct Task {
    received: Received,
    /// The disk, by its index.
    disk: usize,
    /// `None` for a job.
    transfer: Option<Transfer>,
    /// How it ends if a task management function ended it.
    ended: Option<Ended>,
    /// Task management functions that wait for its end.
    sweeps: Vec<Arc<Sweep>>,
}

/// Serves one request queue.
pub(super) struct RequestQueue {
    target: Arc<Target>,
    nexus: Arc<Nexus>,
    flights: Flights,
    /// Commands that may not begin yet.
    order: Order<(Received, [u8; 8], Request)>,
    /// Taken together and not looked at yet: empty but while requests are taken.
    taken: Vec<CommandChain>,
    completions: Vec<Completion<Outcome>>,
    /// What is ended early is not answered: it stays noted as in flight.
    leaves: bool,
}

/// The commands in flight, and what they are in flight with.
struct Flights {
    engine: UringEngine<Outcome>,
    tasks: Vec<Option<Task>>,
    free: Vec<u32>,
}

impl Flights {
    /// A place for a command.
    fn put(&mut self, disk: usize, transfer: Option<Transfer>, received: Received) -> u32 {
        let task = Some(Task { received, disk, transfer, ended: None, sweeps: Vec::new() });
        match self.free.pop() {
            Some(slot) => {
                if let Some(place) = self.tasks.get_mut(slot as usize) {
                    *place = task;
                }
                slot
            }
            None => {
                self.tasks.push(task);
                // At most a queue size of tasks, checked before each is taken.
                u32::try_from(self.tasks.len() - 1).unwrap_or(u32::MAX)
            }
        }
    }

    fn take(&mut self, slot: u32) -> Option<Task> {
        let task = self.tasks.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(task)
    }

    fn len(&self) -> usize {
        self.tasks.len() - self.free.len()
    }

    fn on_disk(&self, disk: usize) -> usize {
        self.tasks.iter().flatten().filter(|task| task.disk == disk).count()
    }
}

impl RequestQueue {
    /// A queue for one initiator; `wake` is written to when something completes.
    pub(super) fn new(
        target: Arc<Target>,
        nexus: Arc<Nexus>,
        kind: EngineKind,
        wake: Arc<EventFd>,
    ) -> Self {
        RequestQueue {
            target,
            nexus,
            flights: Flights {
                engine: UringEngine::new(wake, kind),
                tasks: Vec::new(),
                free: Vec::new(),
            },
            order: Order::default(),
            taken: Vec::new(),
            completions: Vec::new(),
            leaves: false,
        }
    }

    fn receive(&mut self, ring: &mut Ring, chain: CommandChain) {
        let CommandChain { head, header, response, data_out, data_in, again } = chain;
        let Some(header) = ring.header(&header) else {
            return fail(ring, head, &response, data_in.len());
        };
        if !data_in.is_empty() && !data_out.is_empty() {
            // Both directions at once need VIRTIO_SCSI_F_INOUT, which is not offered.
            return fail(ring, head, &response, data_in.len() + data_out.len());
        }
        let data =
            DataPhase { len: data_in.len() + data_out.len(), to_driver: !data_in.is_empty() };
        let received = Received { head, tag: header.tag.get(), response, data };
        let request = Request { cdb: Cdb(header.cdb), data_out, data_in, again };
        let attribute = Attribute::parse(header.task_attribute);
        if attribute == Attribute::Simple && self.order.is_free() {
            self.begin(ring, &header.lun, received, request);
        } else {
            self.begin_in_order(ring, &header.lun, attribute, received, request);
        }
    }

    /// Begins a command; says where it is in flight if it has not ended at once.
    fn begin(
        &mut self,
        ring: &mut Ring,
        lun: &[u8; 8],
        received: Received,
        request: Request,
    ) -> Option<u32> {
        let RequestQueue { target, nexus, flights, .. } = self;
        let address = target.resolve(lun);
        let plan = scsi::execute(target, nexus, &address, request);
        let outcome = match (plan, address.disk()) {
            (Plan::Done(outcome), _) => outcome,
            (Plan::Transfer(transfer, operation), Some(lun)) => {
                match lun.store().try_now(&operation) {
                    Some(result) => transfer.finish(lun, result),
                    None => {
                        let slot = flights.put(lun.index(), Some(transfer), received);
                        flights.engine.submit(Token(slot), lun.index(), lun.store(), operation);
                        return Some(slot);
                    }
                }
            }
            (Plan::Job(job), Some(lun)) => {
                let slot = flights.put(lun.index(), None, received);
                flights.engine.spawn(Token(slot), lun.store(), job);
                return Some(slot);
            }
            // Only a disk has work to do.
            (Plan::Transfer(..) | Plan::Job(_), None) => Outcome::undelivered(Delivery::BadTarget),
        };
        received.answer(ring, None, &outcome);
        None
    }

    /// Begins a command when its task attribute and those of the ones before it allow.
    fn begin_in_order(
        &mut self,
        ring: &mut Ring,
        lun: &[u8; 8],
        attribute: Attribute,
        received: Received,
        request: Request,
    ) {
        let disk = self.target.resolve(lun).disk().map(|lun| lun.index());
        match disk {
            Some(disk) if self.order.holds_back(disk, attribute, self.flights.on_disk(disk)) => {
                self.order.wait(disk, attribute, (received, *lun, request));
            }
            _ => {
                let slot = self.begin(ring, lun, received, request);
                if let (Some(disk), Attribute::Ordered, Some(slot)) = (disk, attribute, slot) {
                    self.order.began(disk, slot);
                }
            }
        }
    }

    /// Begins what no longer has to wait.
    fn go_on(&mut self, ring: &mut Ring, disk: usize) {
        while let Some((attribute, (received, lun, request))) =
            self.order.next(disk, self.flights.on_disk(disk))
        {
            let slot = self.begin(ring, &lun, received, request);
            if let (Attribute::Ordered, Some(slot)) = (attribute, slot) {
                self.order.began(disk, slot);
            }
        }
    }

    fn finish(&mut self, ring: &mut Ring, completion: Completion<Outcome>) {
        let slot = completion.token.0;
        let Some(task) = self.flights.take(slot) else { return };
        let Some(lun) = self.target.disks().get(task.disk) else { return };
        let outcome = match (completion.result, task.transfer) {
            (Finished::Operation(result), Some(transfer)) => transfer.finish(lun, result),
            (Finished::Job(outcome), _) => outcome,
            (Finished::Withdrawn, Some(transfer)) => {
                transfer.finish(lun, Err(Cause::Cancelled.into()))
            }
            (Finished::Withdrawn | Finished::Operation(_), None) => lun.failed(ScsiError::Aborted),
        };
        let ended_early = task.ended.is_none() && outcome.delivery == Delivery::Aborted;
        if !(self.leaves && ended_early) {
            task.received.answer(ring, task.ended, &outcome);
        }
        if !self.order.is_free() {
            self.order.ended(task.disk, slot);
            self.go_on(ring, task.disk);
        }
    }

    /// Marks the commands that a task management function is about, and ends them if it says so.
    fn sweep(&mut self, ring: &mut Ring, sweep: &Arc<Sweep>) {
        for (slot, place) in (0u32..).zip(self.flights.tasks.iter_mut()) {
            let Some(task) = place.as_mut() else { continue };
            if !sweep.selects(task.disk, task.received.tag) {
                continue;
            }
            sweep.found();
            if let Some(how) = sweep.ends_with() {
                task.ended = Some(how);
                task.sweeps.push(Arc::clone(sweep));
                self.flights.engine.cancel(slot);
            }
        }
        for disk in self.order.disks() {
            let selected = |tag| sweep.selects(disk, tag);
            if !self.order.has(disk, |(received, ..)| selected(received.tag)) {
                continue;
            }
            sweep.found();
            if let Some(how) = sweep.ends_with() {
                self.end_waiting(ring, disk, how, selected);
            }
        }
    }

    /// Ends commands that have not begun.
    fn end_waiting(
        &mut self,
        ring: &mut Ring,
        disk: usize,
        how: Ended,
        which: impl Fn(u64) -> bool,
    ) {
        for (received, ..) in self.order.take(disk, |(received, ..)| which(received.tag)) {
            if !self.leaves {
                received.answer(ring, Some(how), &Outcome::undelivered(Delivery::Aborted));
            }
        }
        self.go_on(ring, disk);
    }

    /// Ends early what can be.
    fn give_up(&mut self, ring: &mut Ring, leave: bool) {
        self.leaves = leave && ring.keeps_requests();
        for disk in self.order.disks() {
            self.end_waiting(ring, disk, Ended::As(Response::Aborted), |_| true);
        }
        for slot in 0..self.flights.tasks.len() {
            self.flights.engine.cancel(u32::try_from(slot).unwrap_or(u32::MAX));
        }
    }
}

impl Service for RequestQueue {
    fn requests(&mut self, ring: &mut Ring) -> bool {
        let mut taken = std::mem::take(&mut self.taken);
        let mut more = true;
        for _ in 0..BATCH / TOGETHER {
            let room = ring.size().saturating_sub(self.in_flight());
            for _ in 0..room.min(TOGETHER) {
                let Some(chain) = ring.pop_command() else { break };
                taken.push(chain);
            }
            more = !taken.is_empty();
            if !more {
                break;
            }
            for chain in taken.drain(..) {
                self.receive(ring, chain);
            }
        }
        self.taken = taken;
        more
    }

    fn hand_over(&mut self) {
        self.flights.engine.flush();
    }

    fn has_progress(&mut self) -> bool {
        self.flights.engine.has_completions()
    }

    fn is_behind(&mut self) -> bool {
        self.flights.engine.has_landed()
    }

    fn sleep(&mut self, events: [Option<RawFd>; 2]) -> Option<[bool; 2]> {
        self.flights.engine.sleep(events)
    }

    fn progress(&mut self, ring: &mut Ring) {
        if self.flights.len() == 0 && !self.flights.engine.has_landed() {
            return;
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.flights.engine.completions(&mut completions);
        for completion in completions.drain(..) {
            self.finish(ring, completion);
        }
        self.completions = completions;
    }

    fn message(&mut self, ring: &mut Ring, message: Message) {
        match message {
            Message::Sweep(sweep) => {
                // What the driver handed over before the function counts as received before it.
                // A ring's worth: a driver that adds more meanwhile adds it after the function.
                for _ in 0..=ring.size() / BATCH {
                    if !self.requests(ring) {
                        break;
                    }
                }
                self.sweep(ring, &sweep);
            }
            Message::GiveUp { leave } => self.give_up(ring, leave),
            _ => {}
        }
    }

    /// No more than a ring's worth: a driver that hands out a chain twice gains nothing by it.
    fn wants_requests(&self, ring: &Ring) -> bool {
        self.in_flight() < ring.size()
    }

    fn in_flight(&self) -> usize {
        self.flights.len() + self.order.waiting()
    }
}

impl Received {
    /// Writes the response and gives the chain back, with the bytes written to it. `instead` stands in for
    /// the outcome of a command that was ended from outside.
    fn answer(&self, ring: &mut Ring, instead: Option<Ended>, outcome: &Outcome) {
        let response = match instead {
            None => CommandResponse::new(outcome, self.data.len),
            Some(how) => CommandResponse::ended(how, self.data.len),
        };
        let data = if self.data.to_driver { outcome.transferred } else { 0 };
        ring.answer(self.head, &self.response, response.as_bytes(), data);
    }
}

/// A request that is not one: no status, VIRTIO_SCSI_S_FAILURE.
fn fail(ring: &mut Ring, head: u16, room: &Part, data_len: usize) {
    let response = CommandResponse::bare(Response::Failure, data_len);
    ring.answer(head, room, response.as_bytes(), 0);
}
