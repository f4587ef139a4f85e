//! The request queues: commands in, responses out, in any order.

use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::guest_buf::Chain;
use super::message::{Message, Sweep};
use super::ring::Ring;
use super::wire::{CommandHeader, CommandResponse, Response};
use super::worker::Service;
use crate::scsi::{self, Cdb, Lun, Nexus, Outcome, Plan, Request, ScsiError, Target, Transfer};
use crate::store::engine::uring::UringEngine;
use crate::store::engine::{Completion, Engine, EngineKind, Finished, Token};
use crate::store::{Buffers, Cause};

/// Requests taken in one pass before completions are looked at again.
const BATCH: usize = 64;

/// A command in flight.
struct Task {
    head: u16,
    tag: u64,
    lun: Arc<Lun>,
    response: Buffers,
    data: DataPhase,
    kind: Kind,
    /// How it ends if a task management function ended it.
    ended: Option<Response>,
    /// Task management functions that wait for its end.
    sweeps: Vec<Arc<Sweep>>,
}

enum Kind {
    Transfer(Transfer),
    Job,
}

/// The data buffers of a command.
#[derive(Clone, Copy)]
struct DataPhase {
    /// Length in bytes.
    len: usize,
    /// Whether they are written to.
    to_driver: bool,
}

/// Serves one request queue.
pub(super) struct RequestQueue {
    target: Arc<Target>,
    nexus: Arc<Nexus>,
    engine: UringEngine<Outcome>,
    tasks: Vec<Option<Task>>,
    free: Vec<u32>,
    completions: Vec<Completion<Outcome>>,
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
            engine: UringEngine::new(wake, kind),
            tasks: Vec::new(),
            free: Vec::new(),
            completions: Vec::new(),
        }
    }

    fn begin(&mut self, ring: &mut Ring, chain: Chain) {
        let Chain { head, readable, writable } = chain;
        let mut header = [0; size_of::<CommandHeader>()];
        if writable.len() < size_of::<CommandResponse>() {
            return ring.refuse(head, "no room for a response");
        }
        let response = writable.slice(0, size_of::<CommandResponse>());
        let data_in = writable.slice(size_of::<CommandResponse>(), writable.len());
        if readable.read_at(0, &mut header) < header.len() {
            return fail(ring, head, &response, data_in.len());
        }
        let data_out = readable.slice(header.len(), readable.len());
        let Ok((header, _)) = CommandHeader::ref_from_prefix(&header) else {
            return fail(ring, head, &response, data_in.len());
        };
        if !data_in.is_empty() && !data_out.is_empty() {
            // Both directions at once need VIRTIO_SCSI_F_INOUT, which is not offered.
            return fail(ring, head, &response, data_in.len() + data_out.len());
        }
        let data =
            DataPhase { len: data_in.len() + data_out.len(), to_driver: !data_in.is_empty() };
        let address = self.target.resolve(&header.lun);
        let request = Request { cdb: Cdb(header.cdb), data_out, data_in };
        let plan = scsi::execute(&self.target, &self.nexus, &address, request);
        let (Plan::Transfer(Transfer { lun, .. }, _) | Plan::Job(lun, _)) = &plan else {
            if let Plan::Done(outcome) = plan {
                respond(
                    ring,
                    head,
                    &response,
                    data,
                    &CommandResponse::new(&outcome, data.len),
                    &outcome,
                );
            }
            return;
        };
        let task = Task {
            head,
            tag: header.tag.get(),
            lun: Arc::clone(lun),
            response,
            data,
            kind: Kind::Job,
            ended: None,
            sweeps: Vec::new(),
        };
        self.start(task, plan);
    }

    fn start(&mut self, mut task: Task, plan: Plan) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            // At most a queue size of tasks, checked before each is taken.
            u32::try_from(self.tasks.len() - 1).unwrap_or(u32::MAX)
        });
        let store = Arc::clone(task.lun.store());
        match plan {
            Plan::Done(_) => {}
            Plan::Transfer(transfer, operation) => {
                task.kind = Kind::Transfer(transfer);
                self.put(slot, task);
                self.engine.submit(Token(slot), &store, operation);
            }
            Plan::Job(_, job) => {
                self.put(slot, task);
                self.engine.spawn(Token(slot), &store, job);
            }
        }
    }

    fn put(&mut self, slot: u32, task: Task) {
        if let Some(place) = self.tasks.get_mut(slot as usize) {
            *place = Some(task);
        }
    }

    fn finish(&mut self, ring: &mut Ring, completion: Completion<Outcome>) {
        let slot = completion.token.0;
        let Some(task) = self.tasks.get_mut(slot as usize).and_then(Option::take) else { return };
        self.free.push(slot);
        let outcome = match (completion.result, &task.kind) {
            (Finished::Operation(result), Kind::Transfer(transfer)) => transfer.finish(result),
            (Finished::Job(outcome), _) => outcome,
            (Finished::Withdrawn, Kind::Transfer(transfer)) => {
                transfer.finish(Err(Cause::Cancelled.into()))
            }
            (Finished::Withdrawn | Finished::Operation(_), Kind::Job) => {
                task.lun.failed(ScsiError::Aborted)
            }
        };
        let response = match task.ended {
            None => CommandResponse::new(&outcome, task.data.len),
            Some(response) => CommandResponse::bare(response, task.data.len),
        };
        respond(ring, task.head, &task.response, task.data, &response, &outcome);
    }

    /// Marks the commands that a task management function is about, and ends them if it says so.
    fn sweep(&mut self, sweep: &Arc<Sweep>) {
        for (slot, place) in (0u32..).zip(self.tasks.iter_mut()) {
            let Some(task) = place.as_mut() else { continue };
            if !sweep.selects(&task.lun, task.tag) {
                continue;
            }
            sweep.found();
            if let Some(response) = sweep.ends_with() {
                task.ended = Some(response);
                task.sweeps.push(Arc::clone(sweep));
                self.engine.cancel(slot);
            }
        }
    }
}

impl Service for RequestQueue {
    fn requests(&mut self, ring: &mut Ring) -> bool {
        let mut more = true;
        for _ in 0..BATCH {
            more = self.wants_requests(ring);
            let Some(chain) = more.then(|| ring.pop()).flatten() else {
                more = false;
                break;
            };
            self.begin(ring, chain);
        }
        self.engine.flush();
        // What was done at once rings no bell.
        self.progress(ring);
        more
    }

    fn progress(&mut self, ring: &mut Ring) {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.completions(&mut completions);
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
                self.sweep(&sweep);
            }
            Message::GiveUp => {
                for slot in 0..self.tasks.len() {
                    self.engine.cancel(u32::try_from(slot).unwrap_or(u32::MAX));
                }
            }
            _ => {}
        }
    }

    /// No more than a ring's worth: a driver that hands out a chain twice gains nothing by it.
    fn wants_requests(&self, ring: &Ring) -> bool {
        self.in_flight() < ring.size()
    }

    fn in_flight(&self) -> usize {
        self.tasks.len() - self.free.len()
    }
}

/// A request that is not one: no status, VIRTIO_SCSI_S_FAILURE.
fn fail(ring: &mut Ring, head: u16, room: &Buffers, data_len: usize) {
    let response = CommandResponse::bare(Response::Failure, data_len);
    ring.push(head, room.write_at(0, response.as_bytes()));
}

/// Writes the response and gives the chain back, with the bytes written to it.
fn respond(
    ring: &mut Ring,
    head: u16,
    room: &Buffers,
    data: DataPhase,
    response: &CommandResponse,
    outcome: &Outcome,
) {
    let header = room.write_at(0, response.as_bytes());
    let data = if data.to_driver { outcome.transferred } else { 0 };
    ring.push(head, header + data);
}
