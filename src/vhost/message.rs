//! What queue threads and connections tell each other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::FIXED_QUEUES;
use super::dirty_log::DirtyLog;
use super::memory::GuestMemory;
use super::wire::{Ended, T_PARAM_CHANGE};
use crate::scsi::copy::Waits;
use crate::scsi::{LunNumber, Port, UnitAttention};
use crate::store::engine::ending::Ending;

/// What others want of a queue thread.
pub(super) enum Message {
    /// Use this memory from now on; answered when it does.
    SetMemory(Arc<GuestMemory>, Sender<()>),
    /// Tell the driver by this from now on; answered when it does.
    SetCall(Option<File>, Sender<()>),
    /// Mark in this from now on which guest memory is written to; answered when it does.
    SetLog(Option<Arc<DirtyLog>>, Sender<()>),
    /// Find, and maybe end, commands in flight (request queues).
    Sweep(Arc<Sweep>),
    /// A sweep is over (control queue).
    Swept(u64),
    /// Something for the driver to know (event queue).
    Event(Event),
    /// End early what can be (request queues): nobody will hear the answers any more, or, if it is to be left, the
    /// next process is to do it again.
    GiveUp { leave: bool },
    /// Finish what is in flight and end.
    Stop,
}

/// Where to send a queue thread messages.
#[derive(Clone, Debug)]
pub(super) struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// A mailbox, and the end that the thread receives from.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub(super) fn new() -> io::Result<(Self, Receiver<Message>)> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let (sender, inbox) = mpsc::channel();
        Ok((Mailbox { sender, wake }, inbox))
    }

    /// What the thread waits for besides kicks: written to when there is a message.
    pub(super) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// Sends a message; it is lost if the thread has ended.
    pub(super) fn send(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // It fails only if the counter is full, and then the thread is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Sends a message that is answered, and waits for the answer or the thread's end.
    fn call(&self, message: impl FnOnce(Sender<()>) -> Message) {
        let (done, answered) = mpsc::channel();
        self.send(message(done));
        let _ = answered.recv();
    }

    /// Has the thread use other memory.
    pub(super) fn set_memory(&self, memory: &Arc<GuestMemory>) {
        self.call(|done| Message::SetMemory(Arc::clone(memory), done));
    }

    /// Has the thread mark what it writes to.
    pub(super) fn set_log(&self, log: Option<&Arc<DirtyLog>>) {
        self.call(|done| Message::SetLog(log.cloned(), done));
    }

    /// Has the thread use another call event.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.call(|done| Message::SetCall(call, done));
    }
}

/// The queues of one port, as those see them who have something to say to them. They outlast its connections.
///
/// A task management function is answered when every command it is about has ended, and that includes commands that lie
/// in a ring which does not run yet: a front end that connects again starts the control queue first (SAM-6 7.1, 7.2: a
/// function is about every command that the task set holds). So a sweep stays with such a ring until it starts.
///
/// Of a front end that is away nobody can tell whether it comes, and what it has in flight then. Such commands were in the
/// task set all the time: they are not done again if a function was about them meanwhile, but end as it has them end (a
/// fence). New ones were given, as far as anybody can tell, after it.
#[derive(Debug)]
pub(super) struct Queues(Mutex<Vec<Queue>>);

/// A queue, from outside.
#[derive(Debug)]
enum Queue {
    /// It does not run.
    Stopped {
        /// The front end has told us of it: commands may lie in it.
        told: bool,
        /// What it is swept for when it starts.
        sweeps: Vec<Arc<Sweep>>,
        /// By disk, how that ends which is found in flight in it when it starts.
        fences: BTreeMap<usize, Ended>,
    },
    /// A thread serves it.
    Running(Mailbox),
}

impl Queue {
    const UNTOLD: Self =
        Queue::Stopped { told: false, sweeps: Vec::new(), fences: BTreeMap::new() };

    /// Nothing is known of its ring any more. The sweeps that it has not been told of are fences from now on.
    fn forget(&mut self) -> Vec<Arc<Sweep>> {
        let Queue::Stopped { told, sweeps, .. } = self else { return Vec::new() };
        *told = false;
        let sweeps = std::mem::take(sweeps);
        sweeps.iter().for_each(|sweep| self.fence(sweep));
        sweeps
    }

    /// What it may have in flight ends as this sweep has it end, if it does not run.
    fn fence(&mut self, sweep: &Sweep) {
        if let (Queue::Stopped { fences, .. }, Some(how), None) = (self, sweep.ends_with, sweep.tag)
        {
            fences.extend(sweep.disks.iter().map(|disk| (*disk, how)));
        }
    }
}

impl Queues {
    /// So many queues that nothing was told of.
    pub(super) fn new(count: usize) -> Self {
        Queues(Mutex::new((0..count).map(|_| Queue::UNTOLD).collect()))
    }

    fn all(&self) -> MutexGuard<'_, Vec<Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The front end has begun to set a queue up.
    pub(super) fn told(&self, index: usize) {
        if let Some(Queue::Stopped { told, .. }) = self.all().get_mut(index) {
            *told = true;
        }
    }

    /// The front end has taken a queue back, which does not run: nobody will serve what lies in it.
    pub(super) fn forget(&self, index: usize) {
        let old = self.all().get_mut(index).map(Queue::forget);
        // Only now, without the lock: the end of a sweep is a message.
        drop(old);
    }

    /// The front end is gone; none of them runs.
    pub(super) fn hang_up(&self) {
        let old: Vec<_> = self.all().iter_mut().map(Queue::forget).collect();
        drop(old);
    }

    /// A thread is about to serve a queue; what it is to be swept for comes first.
    pub(super) fn start(&self, index: usize, mailbox: &Mailbox) {
        if let Some(queue) = self.all().get_mut(index)
            && let Queue::Stopped { sweeps, fences, .. } =
                std::mem::replace(queue, Queue::Running(mailbox.clone()))
        {
            let fences = Sweep::of_fences(&fences).into_iter().map(Arc::new);
            let sweeps = sweeps.into_iter().chain(fences);
            sweeps.for_each(|sweep| mailbox.send(Message::Sweep(sweep)));
        }
    }

    /// A queue's thread has ended; the front end may start it again. What `inbox` still holds, or came when the thread
    /// took nothing from the ring any more, is about commands that lie there: they will end unbegun. Nobody waits for
    /// that, as whether the ring starts again is up to the front end.
    pub(super) fn stop(&self, index: usize, unheard: Vec<Arc<Sweep>>, inbox: &Receiver<Message>) {
        let mut all = self.all();
        let Some(queue) = all.get_mut(index) else { return };
        // Under the lock, so that nothing is sent to it after this.
        let late = inbox.try_iter().filter_map(|message| match message {
            Message::Sweep(sweep) => Some(sweep),
            _ => None,
        });
        let (mut sweeps, unheard) = (Vec::new(), unheard.into_iter().chain(late));
        unheard.for_each(|sweep| keep_unreported(&mut sweeps, &sweep));
        *queue = Queue::Stopped { told: true, sweeps, fences: BTreeMap::new() };
    }

    /// The control queue ends: functions that wait for rings which do not run end now. What they are about ends
    /// unbegun when its ring starts.
    pub(super) fn release(&self) {
        let mut released = Vec::new();
        for queue in self.all().iter_mut() {
            if let Queue::Stopped { sweeps, .. } = queue {
                let held = std::mem::take(sweeps);
                held.iter().for_each(|sweep| keep_unreported(sweeps, sweep));
                released.push(held);
            }
        }
        // Only now, without the lock: the end of a sweep is a message.
        drop(released);
    }

    /// Sends a message to a queue that runs.
    pub(super) fn send(&self, index: usize, message: Message) {
        if let Some(Queue::Running(mailbox)) = self.all().get(index) {
            mailbox.send(message);
        }
    }

    /// Sweeps all request queues, those that do not run yet when they start.
    pub(super) fn sweep(&self, sweep: &Arc<Sweep>) {
        for queue in self.all().iter_mut().skip(FIXED_QUEUES) {
            match queue {
                Queue::Running(mailbox) => mailbox.send(Message::Sweep(Arc::clone(sweep))),
                Queue::Stopped { told: true, sweeps, .. } => sweeps.push(Arc::clone(sweep)),
                Queue::Stopped { .. } => queue.fence(sweep),
            }
        }
    }

    /// Sweeps the request queues that run. What lies in others is in flight and ends unbegun; or it is new, and will be
    /// held against what is then.
    pub(super) fn sweep_running(&self, sweep: &Arc<Sweep>) {
        for queue in self.all().iter_mut().skip(FIXED_QUEUES) {
            match queue {
                Queue::Running(mailbox) => mailbox.send(Message::Sweep(Arc::clone(sweep))),
                Queue::Stopped { .. } => queue.fence(sweep),
            }
        }
    }

    /// What is in flight in request queues that do not run ends as this sweep has it end.
    pub(super) fn fence(&self, sweep: &Sweep) {
        self.all().iter_mut().skip(FIXED_QUEUES).for_each(|queue| queue.fence(sweep));
    }

    /// Sweeps the request queues for the reset of a disk by another initiator. What lies in those that the front end is
    /// still starting ends unbegun, and nobody waits for that: whether they ever start is up to the front end.
    pub(super) fn sweep_for_reset(&self, sweep: &Arc<Sweep>) {
        for queue in self.all().iter_mut().skip(FIXED_QUEUES) {
            match queue {
                Queue::Running(mailbox) => mailbox.send(Message::Sweep(Arc::clone(sweep))),
                Queue::Stopped { told: true, sweeps, .. } => keep_unreported(sweeps, sweep),
                Queue::Stopped { .. } => {}
            }
            queue.fence(sweep);
        }
    }
}

/// Most sweeps without anybody who waits for them that are kept for a ring: as many functions as a control queue holds.
const MAX_UNREPORTED: usize = 1024;

/// Keeps a sweep for commands that lie where nobody can look now; nobody waits for it.
pub(super) fn keep_unreported(kept: &mut Vec<Arc<Sweep>>, sweep: &Sweep) {
    let needed = sweep.ends_with.is_some() && !kept.iter().any(|other| other.covers(sweep));
    if needed && kept.len() < MAX_UNREPORTED {
        kept.push(Arc::new(sweep.unreported()));
    }
}

/// A search through the commands in flight on all request queues.
#[derive(Debug)]
pub(super) struct Sweep {
    /// The initiator whose function it is, if it is about that initiator's own commands.
    owner: Option<Port>,
    disks: Vec<usize>,
    tag: Option<u64>,
    ends_with: Option<Ended>,
    /// It is about what is under way at the medium, which is to be over, and nothing else.
    clears: bool,
    /// It is about what was in flight when the ring started, and nothing else.
    fence: bool,
    any: AtomicBool,
    report: Report,
}

/// Who waits for the end of a sweep.
#[derive(Debug)]
pub(super) enum Report {
    /// A control queue, which knows it by a number, and whether anything was found.
    Queue { to: Mailbox, id: u64, found: Arc<AtomicBool> },
    /// Whoever waits until everybody has let go of this.
    Caller(Arc<Ending>),
    /// Nobody.
    Nobody,
}

impl Sweep {
    /// A sweep for commands to `disks` (and, if given, with this tag).
    pub(super) fn new(
        owner: Option<Port>,
        disks: Vec<usize>,
        tag: Option<u64>,
        ends_with: Option<Ended>,
        report: Report,
    ) -> Self {
        let (clears, fence, any) = (false, false, AtomicBool::new(false));
        Sweep { owner, disks, tag, ends_with, clears, fence, any, report }
    }

    /// Sweeps for what is in flight in a ring that starts, by disk how it ends.
    fn of_fences(fences: &BTreeMap<usize, Ended>) -> Vec<Self> {
        let mut sweeps: Vec<Self> = Vec::new();
        for (disk, how) in fences {
            match sweeps.iter_mut().find(|sweep| sweep.ends_with == Some(*how)) {
                Some(sweep) => sweep.disks.push(*disk),
                None => {
                    let mut sweep = Sweep::new(None, vec![*disk], None, Some(*how), Report::Nobody);
                    sweep.fence = true;
                    sweeps.push(sweep);
                }
            }
        }
        sweeps
    }

    /// A sweep for what is under way at the medium of a disk that lets nobody in any more.
    pub(super) fn clearing(disk: usize, report: Report) -> Self {
        let mut sweep = Sweep::new(None, vec![disk], None, None, report);
        sweep.clears = true;
        sweep
    }

    /// Whether it is one of those.
    pub(super) fn clears(&self) -> bool {
        self.clears
    }

    /// Whether it is about nothing but what was in flight when the ring started.
    pub(super) fn is_fence(&self) -> bool {
        self.fence
    }

    /// The same for commands that have not begun, without anybody who waits for it.
    fn unreported(&self) -> Self {
        let disks = self.disks.clone();
        let mut sweep = Sweep::new(self.owner, disks, self.tag, self.ends_with, Report::Nobody);
        sweep.fence = self.fence;
        sweep
    }

    /// Whether it ends, without anybody who waits for it, all that another one ends.
    fn covers(&self, other: &Sweep) -> bool {
        matches!(self.report, Report::Nobody)
            && self.tag.is_none()
            && (other.fence || !self.fence)
            && self.ends_with == other.ends_with
            && other.disks.iter().all(|disk| self.disks.contains(disk))
    }

    /// Whether it is about this command.
    pub(super) fn selects(&self, disk: usize, tag: u64) -> bool {
        self.disks.contains(&disk) && self.tag.is_none_or(|t| t == tag)
    }

    /// Whether an initiator waits for it in vain if its own front end leaves it waiting, and nobody else does.
    pub(super) fn is_of(&self, port: Port) -> bool {
        self.owner == Some(port)
    }

    /// Notes that there is such a command.
    pub(super) fn found(&self) {
        self.any.store(true, Ordering::Release);
    }

    /// How to end what it finds, if at all.
    pub(super) fn ends_with(&self) -> Option<Ended> {
        self.ends_with
    }
}

impl Waits for Sweep {
    fn is_awaited(&self) -> bool {
        match &self.report {
            Report::Queue { .. } => true,
            Report::Caller(ending) => ending.is_awaited(),
            Report::Nobody => false,
        }
    }
}

impl Drop for Sweep {
    fn drop(&mut self) {
        if let Report::Queue { to, id, found } = &self.report {
            found.store(self.any.load(Ordering::Acquire), Ordering::Release);
            to.send(Message::Swept(*id));
        }
    }
}

/// Something that happened to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// VIRTIO_SCSI_T_*.
    pub kind: u32,
    /// The disk, as in a command's header.
    pub lun: [u8; 8],
    /// What exactly, as the kind defines.
    pub reason: u32,
}

impl Event {
    /// The parameters of a disk changed; the reason is the unit attention's code (ASC in the low
    /// byte, ASCQ above it).
    pub(super) fn parameters_changed(target: u8, lun: LunNumber, attention: UnitAttention) -> Self {
        let [high, low, ..] = lun.encode();
        let [asc, ascq] = attention.asc().to_be_bytes();
        Event {
            kind: T_PARAM_CHANGE,
            lun: [1, target, high, low, 0, 0, 0, 0],
            reason: u32::from(asc) | u32::from(ascq) << 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Response;
    use super::*;

    /// Of what a ring is to be swept for only that is left out which another sweep ends anyway.
    #[test]
    fn a_sweep_that_is_kept_stands_for_those_that_it_covers() {
        let ended = |how| Some(Ended::As(how));
        let (aborted, reset) = (ended(Response::Aborted), ended(Response::Reset));
        let mut kept = Vec::new();
        for (disks, tag, ends_with, expected) in [
            (vec![0], Some(1), None, 0),
            (vec![0], Some(1), aborted, 1),
            (vec![0], Some(2), aborted, 2),
            (vec![0, 1], None, aborted, 3),
            (vec![0], Some(3), aborted, 3),
            (vec![1], None, aborted, 3),
            (vec![2], None, aborted, 4),
            (vec![0, 2], None, aborted, 5),
            (vec![0], None, reset, 6),
        ] {
            let sweep = Sweep::new(None, disks.clone(), tag, ends_with, Report::Nobody);
            keep_unreported(&mut kept, &sweep);
            assert_eq!(kept.len(), expected, "{disks:?}, {tag:?}, {ends_with:?}");
        }
    }
}
