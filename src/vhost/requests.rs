//! The request queues: commands in, responses out, in any order that task attributes allow.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use nix::sys::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::guest_buf::{CommandChain, Part};
use super::inflight;
use super::message::{Message, Sweep, keep_unreported};
use super::order::{Attribute, Order};
use super::ring::Ring;
use super::wire::{CommandResponse, Ended, Response};
use super::worker::{Abandoned, CallResult, HostCall, Service, Step};
use crate::scsi::background::Tolerance;
use crate::scsi::copy::Waits;
use crate::scsi::{
    self, Cdb, Delivery, Lun, Nexus, Outcome, Plan, Redone, Request, ScsiError, Target, Transfer,
    Work,
};
use crate::store::engine::ending::keep;
use crate::store::engine::uring::UringEngine;
use crate::store::engine::{Completion, Engine, EngineKind, Finished, Token};
use crate::store::{Cause, Durability, Operation, StoreError};

/// Requests taken together: what the driver's processor has just written of one is on its way to ours while another
/// is worked on.
const TOGETHER: usize = 8;

/// How often so many are taken before completions and messages are looked at again.
const ROUNDS: usize = 8;

/// A command that was received: who gave it, and where its answer goes.
struct Received {
    head: u16,
    tag: u64,
    response: Part,
    data: DataPhase,
    /// It changes a disk, and is done again.
    redone: Option<Box<Redone>>,
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
    /// It is about what the medium holds.
    at_medium: bool,
    /// Told when it has been answered as it ended.
    begin: Option<Sender<()>>,
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
    /// Taken together and not looked at yet.
    taken: VecDeque<CommandChain>,
    /// What the ring is to be swept for when its memory is back: what lies in it has not begun. No more than functions
    /// and disks.
    later: Vec<Arc<Sweep>>,
    /// How often requests may still be taken in this pass.
    rounds: usize,
    /// The command whose transfer the queue's thread is making itself.
    calling: Option<Calling>,
    completions: Vec<Completion<Outcome>>,
    /// What is ended early is not answered: it stays noted as in flight.
    leaves: bool,
}

/// A command that waits for a host call of the queue's own thread.
struct Calling {
    received: Received,
    disk: usize,
    transfer: Transfer,
}

impl Task {
    /// A command whose transfer is under way.
    fn transfer(received: Received, disk: usize, transfer: Transfer) -> Self {
        Task { transfer: Some(transfer), ..Self::job(received, disk, true, None) }
    }

    /// A command whose job is under way.
    fn job(received: Received, disk: usize, at_medium: bool, begin: Option<Sender<()>>) -> Self {
        let (transfer, ended, sweeps) = (None, None, Vec::new());
        Task { received, disk, transfer, at_medium, begin, ended, sweeps }
    }
}

/// How a command began.
enum Begun {
    /// It has been answered.
    Answered,
    /// It is in flight, in this slot.
    InFlight(u32),
    /// It waits for a host call.
    Calls(HostCall),
}

/// The commands in flight, and what they are in flight with.
struct Flights {
    engine: UringEngine<Outcome>,
    tasks: Vec<Option<Task>>,
    free: Vec<u32>,
}

impl Flights {
    /// A place for a command.
    fn put(&mut self, task: Task) -> u32 {
        match self.free.pop() {
            Some(slot) => {
                if let Some(place) = self.tasks.get_mut(slot as usize) {
                    *place = Some(task);
                }
                slot
            }
            None => {
                self.tasks.push(Some(task));
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

    /// The transfer of a command has ended: it is answered, unless there is more to do.
    fn ended(
        &mut self,
        ring: &mut Ring,
        nexus: &Nexus,
        lun: &Arc<Lun>,
        received: Received,
        transfer: Transfer,
        result: Result<(), StoreError>,
    ) -> Begun {
        if let Some((rest, operation)) = transfer.owed(lun, &result) {
            let slot = self.put(Task::transfer(received, lun.index(), rest));
            self.engine.submit(Token(slot), lun.index(), lun.store(), operation);
            return Begun::InFlight(slot);
        }
        received.answer(ring, None, &finished(nexus, lun, &transfer, result));
        Begun::Answered
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
            taken: VecDeque::new(),
            later: Vec::new(),
            rounds: ROUNDS,
            calling: None,
            completions: Vec::new(),
            leaves: false,
        }
    }

    /// Begins a command that was taken; says what host call it waits for, if it may and does.
    #[inline(always)]
    fn receive(
        &mut self,
        ring: &mut Ring,
        chain: CommandChain,
        may_call: bool,
    ) -> Option<HostCall> {
        let CommandChain { head, header, response, data_out, data_in, again } = chain;
        let len = data_in.len() + data_out.len();
        let Some(header) = ring.header(&header) else {
            fail(ring, head, &response, len);
            return None;
        };
        if !data_in.is_empty() && !data_out.is_empty() {
            // Both directions at once need VIRTIO_SCSI_F_INOUT, which is not offered.
            fail(ring, head, &response, len);
            return None;
        }
        let data = DataPhase { len, to_driver: !data_in.is_empty() };
        let received = Received { head, tag: header.tag.get(), response, data, redone: None };
        let cdb = Cdb(header.cdb);
        let request = Request { cdb, data_out, data_in, again, overtaken: false };
        let attribute = Attribute::parse(header.task_attribute);
        if attribute != Attribute::Simple || !self.order.is_free() {
            self.begin_in_order(ring, &header.lun, attribute, received, request);
            return None;
        }
        match self.begin(ring, &header.lun, received, request, may_call) {
            Begun::Calls(call) => Some(call),
            Begun::Answered | Begun::InFlight(_) => None,
        }
    }

    /// Begins a command. `may_call` says whether it may wait for a host call.
    fn begin(
        &mut self,
        ring: &mut Ring,
        lun: &[u8; 8],
        mut received: Received,
        mut request: Request,
        may_call: bool,
    ) -> Begun {
        let RequestQueue { target, nexus, flights, .. } = self;
        let address = target.resolve(lun);
        if let (true, Some(lun)) = (request.again, address.disk()) {
            received.redone = Redone::of(lun, nexus.port(), &request.cdb);
            let noted = ring.was_changed_by_others(inflight::place(lun));
            // Who has kept no such notes may not have been alone.
            request.overtaken = noted.unwrap_or_else(|| target.ports().count() > 1);
        }
        let plan = scsi::execute(target, nexus, &address, request);
        let outcome = match (plan, address.disk()) {
            (Plan::Done(outcome), _) => outcome,
            (Plan::Transfer(transfer, operation), Some(lun)) => {
                let disk = lun.index();
                if may_hang(lun, &operation) {
                    if may_call && !lun.host().is_hung() && flights.engine.may_leave(disk) {
                        self.calling = Some(Calling { received, disk, transfer });
                        return Begun::Calls(HostCall { disk, operation });
                    }
                } else if let Some(result) = lun.store().try_now(&operation) {
                    return flights.ended(ring, nexus, lun, received, transfer, result);
                }
                let slot = flights.put(Task::transfer(received, disk, transfer));
                flights.engine.submit(Token(slot), disk, lun.store(), operation);
                return Begun::InFlight(slot);
            }
            (Plan::Job(Work { job, at_medium, begin }), Some(lun)) => {
                let slot = flights.put(Task::job(received, lun.index(), at_medium, begin));
                flights.engine.spawn(Token(slot), lun.store(), job);
                return Begun::InFlight(slot);
            }
            // Only a disk has work to do.
            (Plan::Transfer(..) | Plan::Job(_), None) => Outcome::undelivered(Delivery::BadTarget),
        };
        received.answer(ring, None, &outcome);
        Begun::Answered
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
                let begun = self.begin(ring, lun, received, request, false);
                if let (Some(disk), Attribute::Ordered, Begun::InFlight(slot)) =
                    (disk, attribute, begun)
                {
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
            let begun = self.begin(ring, &lun, received, request, false);
            if let (Attribute::Ordered, Begun::InFlight(slot)) = (attribute, begun) {
                self.order.began(disk, slot);
            }
        }
    }

    /// Takes requests from the ring: as many as it may, and no more than a ring's worth. Says whether there were any.
    #[inline(always)]
    fn take(&mut self, ring: &mut Ring, most: usize) -> bool {
        let room = ring.size().saturating_sub(self.in_flight());
        for _ in 0..room.min(most) {
            let Some(chain) = ring.pop_command() else { break };
            self.taken.push_back(chain);
        }
        !self.taken.is_empty()
    }

    /// Takes all that is there, to look at it.
    #[cold]
    fn take_all(&mut self, ring: &mut Ring) {
        self.take(ring, ring.size());
    }

    /// Takes all that is there, and ends in it what the ring was to be swept for when its memory came back.
    #[cold]
    fn sweep_later(&mut self, ring: &mut Ring) {
        self.take_all(ring);
        for sweep in std::mem::take(&mut self.later) {
            self.sweep_taken(ring, &sweep);
        }
    }

    fn finish(&mut self, ring: &mut Ring, completion: Completion<Outcome>) {
        let slot = completion.token.0;
        if let Finished::Operation(result) = &completion.result
            && self.goes_on(slot, result)
        {
            return;
        }
        let Some(task) = self.flights.take(slot) else { return };
        let Some(lun) = self.target.disks().get(task.disk) else { return };
        let mut outcome = match (completion.result, task.transfer) {
            (Finished::Operation(result), Some(transfer)) => {
                finished(&self.nexus, lun, &transfer, result)
            }
            (Finished::Job(outcome), _) => outcome,
            (Finished::Withdrawn, Some(transfer)) => {
                transfer.finish(lun, Err(Cause::Cancelled.into()))
            }
            (Finished::Withdrawn, None) => lun.failed(ScsiError::Aborted),
            // A job that there was no thread for.
            (Finished::Operation(_), None) => lun.failed(ScsiError::Busy),
        };
        let ended_early = task.ended.is_none() && outcome.delivery == Delivery::Aborted;
        if ended_early && task.sweeps.iter().any(|sweep| sweep.clears()) {
            // As if it came now.
            let refused = lun.background().check(Tolerance::Never);
            outcome = refused.map_or_else(|error| lun.failed(error), |()| outcome);
        }
        if !(self.leaves && ended_early) {
            task.received.answer(ring, task.ended, &outcome);
            if let (Some(begin), None) = (&task.begin, task.ended) {
                let _ = begin.send(());
            }
        }
        if !task.sweeps.is_empty() {
            // The driver sees what has ended before it sees the end of the function.
            ring.announce();
        }
        if !self.order.is_free() {
            self.order.ended(task.disk, slot);
            self.go_on(ring, task.disk);
        }
    }

    /// Whether there is more to do for a command whose operation has ended; then it is under way.
    fn goes_on(&mut self, slot: u32, result: &Result<(), StoreError>) -> bool {
        let Some(Some(task)) = self.flights.tasks.get_mut(slot as usize) else { return false };
        let Some(lun) = self.target.disks().get(task.disk) else { return false };
        let owed = task.transfer.and_then(|transfer| transfer.owed(lun, result));
        let Some((rest, operation)) = owed.filter(|_| task.ended.is_none()) else { return false };
        task.transfer = Some(rest);
        self.flights.engine.submit(Token(slot), lun.index(), lun.store(), operation);
        true
    }

    /// Marks, or ends, what was taken and has not begun.
    fn sweep_taken(&mut self, ring: &mut Ring, sweep: &Sweep) {
        for chain in std::mem::take(&mut self.taken) {
            let about = chain.again || !sweep.is_fence();
            let header = if about { ring.header(&chain.header) } else { None };
            let selected = header.is_some_and(|header| {
                let disk = self.target.resolve(&header.lun).disk().map(|lun| lun.index());
                disk.is_some_and(|disk| sweep.selects(disk, header.tag.get()))
            });
            if selected {
                sweep.found();
            }
            match sweep.ends_with() {
                Some(how) if selected => end_unbegun(ring, &chain, how),
                _ => self.taken.push_back(chain),
            }
        }
    }

    /// Marks, or ends, what has begun or waits for its turn.
    fn sweep_begun(&mut self, ring: &mut Ring, sweep: &Arc<Sweep>) {
        for (slot, place) in (0u32..).zip(self.flights.tasks.iter_mut()) {
            let Some(task) = place.as_mut() else { continue };
            if !sweep.selects(task.disk, task.received.tag) {
                continue;
            }
            sweep.found();
            if let Some(how) = sweep.ends_with() {
                task.ended = Some(how);
                keep(&mut task.sweeps, Arc::clone(sweep), |sweep| sweep.is_awaited());
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

    /// Ends early what is under way at the medium, as far as it can be. What has not begun is kept out when it begins.
    fn clear(&mut self, sweep: &Arc<Sweep>) {
        for (slot, place) in (0u32..).zip(self.flights.tasks.iter_mut()) {
            let Some(task) = place.as_mut() else { continue };
            if task.at_medium && sweep.selects(task.disk, task.received.tag) {
                keep(&mut task.sweeps, Arc::clone(sweep), |sweep| sweep.is_awaited());
                self.flights.engine.cancel(slot);
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
        for chain in std::mem::take(&mut self.taken) {
            if !self.leaves {
                end_unbegun(ring, &chain, Ended::As(Response::Aborted));
            }
        }
        for disk in self.order.disks() {
            self.end_waiting(ring, disk, Ended::As(Response::Aborted), |_| true);
        }
        for slot in 0..self.flights.tasks.len() {
            self.flights.engine.cancel(u32::try_from(slot).unwrap_or(u32::MAX));
        }
    }
}

impl Service for RequestQueue {
    fn advance(&mut self, ring: &mut Ring, take: bool) -> Step {
        if take && !self.later.is_empty() && !self.leaves && !ring.is_away() {
            self.sweep_later(ring);
        }
        loop {
            while let Some(chain) = self.taken.pop_front() {
                if let Some(call) = self.receive(ring, chain, true) {
                    return Step::Call(call);
                }
            }
            let more = take && self.rounds == 0;
            if !take || more || !self.take(ring, TOGETHER) {
                self.rounds = ROUNDS;
                return Step::Rest { more };
            }
            self.rounds -= 1;
        }
    }

    fn called(&mut self, ring: &mut Ring, operation: Operation, result: CallResult) {
        let Some(Calling { received, disk, transfer }) = self.calling.take() else { return };
        let Some(lun) = self.target.disks().get(disk) else { return };
        match result {
            Some(result) => {
                self.flights.ended(ring, &self.nexus, lun, received, transfer, result);
            }
            None => {
                let slot = self.flights.put(Task::transfer(received, disk, transfer));
                self.flights.engine.submit(Token(slot), disk, lun.store(), operation);
            }
        }
    }

    fn abandon(&mut self) -> Abandoned {
        let calling = self.calling.take();
        let lun = calling.as_ref().and_then(|calling| self.target.disks().get(calling.disk));
        let (Some(calling), Some(lun)) = (calling, lun.map(Arc::clone)) else {
            return Box::new(|_, _| {});
        };
        let (target, number) = (lun.settings().target, lun.settings().lun.get());
        if lun.host().hangs() {
            log::warn!(
                "target {target} LUN {number}: the host does not come back from a write; is its file system frozen?"
            );
        }
        let Calling { received, disk, transfer } = calling;
        let slot = self.flights.put(Task::transfer(received, disk, transfer));
        let rest = self.flights.engine.leave(Token(slot), lun.store());
        Box::new(move |operation, result| {
            if lun.host().is_back() {
                log::info!("target {target} LUN {number}: the host is back");
            }
            rest.finish(operation, result);
        })
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

    fn sweep(&mut self, ring: &mut Ring, sweep: &Arc<Sweep>, take: bool) {
        if sweep.clears() {
            return self.clear(sweep);
        }
        // What the driver handed over before the function counts as received before it. A ring's worth: a driver that
        // adds more meanwhile adds it after the function.
        if self.leaves {
            // It is about what was left without an answer, too, which nobody will look at before the ring starts again.
            keep_unreported(&mut self.later, sweep);
        } else if take && ring.is_away() {
            // Nobody can tell when its memory is back. The front end's own guest may wait for that, no other.
            match sweep.is_of(self.nexus.port()) {
                true => self.later.push(Arc::clone(sweep)),
                false => keep_unreported(&mut self.later, sweep),
            }
        } else if take {
            // What came before is swept first for what was asked before.
            self.sweep_later(ring);
        }
        self.sweep_taken(ring, sweep);
        if !sweep.is_fence() {
            self.sweep_begun(ring, sweep);
        }
    }

    #[cold]
    fn leave_memory(&mut self, ring: &mut Ring) {
        while let Some(chain) = self.taken.pop_front() {
            let _ = self.receive(ring, chain, false);
        }
    }

    fn stop(&mut self) -> Vec<Arc<Sweep>> {
        std::mem::take(&mut self.later)
    }

    fn message(&mut self, ring: &mut Ring, message: Message) {
        if let Message::GiveUp { leave } = message {
            self.give_up(ring, leave);
        }
    }

    /// No more than a ring's worth: a driver that hands out a chain twice gains nothing by it.
    fn wants_requests(&self, ring: &Ring) -> bool {
        self.in_flight() < ring.size()
    }

    fn in_flight(&self) -> usize {
        self.taken.len() + self.flights.len() + self.order.waiting()
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

/// The outcome of a transfer, which may be that something else is lost.
fn finished(
    nexus: &Nexus,
    lun: &Lun,
    transfer: &Transfer,
    result: Result<(), StoreError>,
) -> Outcome {
    if result.is_err_and(|error| error.lost) {
        nexus.attentions(lun.index()).learn_of_loss();
    }
    transfer.finish(lun, result)
}

/// Whether a host call that does this at once may hang all the same. Reads from the page cache do not (RWF_NOWAIT); a
/// write waits for as long as its file system is frozen, before the kernel looks at that flag (`sb_start_write`).
fn may_hang(lun: &Lun, operation: &Operation) -> bool {
    let cached = matches!(operation, Operation::Write { durability: Durability::Cached, .. });
    cached && lun.waits_for_host()
}

/// Answers a command that has not begun.
fn end_unbegun(ring: &mut Ring, chain: &CommandChain, how: Ended) {
    let response = CommandResponse::ended(how, chain.data_in.len() + chain.data_out.len());
    ring.answer(chain.head, &chain.response, response.as_bytes(), 0);
}

/// A request that is not one: no status, VIRTIO_SCSI_S_FAILURE.
fn fail(ring: &mut Ring, head: u16, room: &Part, data_len: usize) {
    let response = CommandResponse::bare(Response::Failure, data_len);
    ring.answer(head, room, response.as_bytes(), 0);
}
