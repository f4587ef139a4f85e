//! One queue's life: a thread that owns a ring, waits for kicks, messages and completions in one
//! place, and ends when it is told to, with nothing in flight.
//!
//! A queue thread makes short host calls itself, and some of them can hang: a write into the page cache waits as long as
//! the file system is frozen. So a thread that makes such a call **lends** all it has, puts it where another can take it,
//! and takes it back after the call. What the [`Watchdog`] finds lent for too long a new thread takes, and serves the
//! queue from then on; the old one, when its call comes back at last, finds nothing to take back, hands in the outcome
//! as any other thread would, and ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;

use super::event_fd;
use super::lent::Lent;
use super::message::{Mailbox, Message, Queues, Sweep, keep_unreported};
use super::ring::Ring;
use super::watchdog::{Watchdog, Watched};
use crate::sandbox::{self, Role};
use crate::scsi::Target;
use crate::store::{Operation, StoreError};

/// What a queue is for. All methods are called on the queue's own thread and must not block.
pub(super) trait Service: Send + 'static {
    /// There may be new requests: goes on with those that were taken, and takes some if it may, until there is a
    /// host call to make or nothing more to do now.
    fn advance(&mut self, ring: &mut Ring, take: bool) -> Step;

    /// The host call that was asked for is over.
    fn called(&mut self, _ring: &mut Ring, _operation: Operation, _result: CallResult) {}

    /// The host call that was asked for does not come back soon: from now on it is in flight like others. Says
    /// what its thread is to do when it is over.
    fn abandon(&mut self) -> Abandoned {
        Box::new(|_, _| {})
    }

    /// Sends on what was taken, because the thread does not sleep now.
    fn hand_over(&mut self) {}

    /// Whether there is something to finish.
    fn has_progress(&mut self) -> bool {
        false
    }

    /// Whether there is something to finish that is known without asking the host.
    fn is_behind(&mut self) -> bool {
        false
    }

    /// Sends on what was taken, and sleeps in a place of its own until there is something to finish or one
    /// of the events is readable; says which. `None`, at once, if it has no such place.
    fn sleep(&mut self, _events: [Option<RawFd>; 2]) -> Option<[bool; 2]> {
        None
    }

    /// Finishes what has completed.
    fn progress(&mut self, ring: &mut Ring);

    /// Marks, and maybe ends, the commands that a task management function is about. What lies in the ring counts, if
    /// it may still be taken.
    fn sweep(&mut self, _ring: &mut Ring, _sweep: &Arc<Sweep>, _take: bool) {}

    /// A message that is not about the ring itself.
    fn message(&mut self, ring: &mut Ring, message: Message);

    /// The memory that requests were taken from may go: begins those that have not.
    fn leave_memory(&mut self, _ring: &mut Ring) {}

    /// Nothing more will be taken; the queue ends when nothing is in flight. Says what is still to be swept in the ring.
    fn stop(&mut self) -> Vec<Arc<Sweep>> {
        Vec::new()
    }

    /// Whether it would take a request now. If not, none is looked for until something else
    /// happens: a completion, a message, or a kick.
    fn wants_requests(&self, ring: &Ring) -> bool;

    /// Requests taken and not yet answered.
    fn in_flight(&self) -> usize;
}

/// How far a service got.
pub(super) enum Step {
    /// There is nothing more to do now, or `more` but it is another's turn.
    Rest { more: bool },
    /// Make this call, and tell [`Service::called`].
    Call(HostCall),
}

/// A host call that may hang: [`crate::store::Store::try_now`] of a disk.
pub(super) struct HostCall {
    /// The disk, by its index.
    pub disk: usize,
    /// What to do.
    pub operation: Operation,
}

/// What [`crate::store::Store::try_now`] said.
pub(super) type CallResult = Option<Result<(), StoreError>>;

/// The rest of an abandoned host call, run by its thread.
pub(super) type Abandoned = Box<dyn FnOnce(Operation, CallResult) + Send>;

/// What a queue needs of the device it belongs to.
#[derive(Clone)]
pub(super) struct Host {
    /// Whose disks host calls are about.
    pub target: Arc<Target>,
    /// Who looks after threads in host calls.
    pub watchdog: Watchdog,
    /// The queues of the connection, which hear of the end of this one.
    pub queues: Arc<Queues>,
}

/// A queue that runs.
pub(super) struct Worker {
    mailbox: Mailbox,
    ended: Receiver<Ended>,
    threads: Threads,
}

/// The threads that a queue has or has had.
type Threads = Arc<Mutex<Vec<JoinHandle<()>>>>;

/// What is left of a queue.
pub(super) struct Ended {
    /// Where the next request will be found.
    pub next_avail: u16,
}

impl Worker {
    /// Starts a thread for `ring`, which has this mailbox. `poll` says for how long it may look for requests before it
    /// sleeps.
    ///
    /// # Errors
    /// If the host has no thread left; gives the inbox back.
    pub(super) fn start<S: Service>(
        index: usize,
        host: Host,
        ring: Ring,
        kick: Option<File>,
        poll: Option<Duration>,
        (mailbox, inbox): (Mailbox, Receiver<Message>),
        service: S,
    ) -> Result<Self, (io::Error, Receiver<Message>)> {
        let (end, ended) = mpsc::channel();
        let spin = poll.map(Spin::new);
        let state = State {
            ring,
            service,
            kick,
            pause: PAUSE,
            mailbox: mailbox.clone(),
            inbox,
            spin,
            stopping: false,
            unheard: Vec::new(),
            end,
        };
        let threads = Threads::default();
        let loan = Loan::new(index, host, Arc::clone(&threads));
        // Where a thread that could not be made does not take it with it.
        loan.lent.lend(Box::new(state));
        let first = Arc::clone(&loan);
        let thread = sandbox::spawn(loan.name(), Role::Queue, move || {
            if let Some(state) = first.lent.take() {
                first.serve(state);
            }
        });
        match thread {
            Ok(thread) => {
                threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
                Ok(Worker { mailbox, ended, threads })
            }
            Err(error) => {
                loan.over.store(true, Ordering::Release);
                let state = loan.lent.take();
                Err((error, state.map_or_else(|| mpsc::channel().1, |state| state.inbox)))
            }
        }
    }

    /// Where to send it messages.
    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Asks it to end, and to let go of what takes long, or to leave it to whoever serves the ring next.
    pub(super) fn give_up(&self, leave: bool) {
        self.mailbox.send(Message::GiveUp { leave });
        self.stop();
    }

    /// Asks it to end; [`Worker::join`] waits for that.
    pub(super) fn stop(&self) {
        self.mailbox.send(Message::Stop);
    }

    /// Waits until nothing is in flight and the threads are gone. `None` if there is nothing left, which does not
    /// happen.
    pub(super) fn join(self) -> Option<Ended> {
        self.stop();
        let ended = self.ended.recv().ok();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
        ended
    }
}

/// All that a queue thread has.
struct State<S> {
    ring: Ring,
    service: S,
    kick: Option<File>,
    mailbox: Mailbox,
    inbox: Receiver<Message>,
    spin: Option<Spin>,
    /// It takes nothing more and ends when nothing is in flight.
    stopping: bool,
    unheard: Vec<Arc<Sweep>>,
    end: Sender<Ended>,
    /// For how long it sleeps next without a kick.
    pause: Duration,
}

/// What one thread of a queue shares with the watchdog, and with the thread that may take its place.
struct Loan<S> {
    index: usize,
    host: Host,
    threads: Threads,
    /// What the thread has, while it is in a host call.
    lent: Lent<State<S>>,
    /// Host calls begun and ended: odd in a call. Only the thread itself writes it.
    calls: AtomicU64,
    /// `calls` at the last look.
    seen: AtomicU64,
    /// The thread has made a host call since it last slept.
    awake: AtomicBool,
    /// It serves the queue no longer.
    over: AtomicBool,
    /// There is a thread that will take over if the call is not back by then.
    succession: AtomicBool,
    /// What the thread is to do with a call that it was left in.
    abandoned: Mutex<Option<Abandoned>>,
    left: Condvar,
}

impl<S: Service> Loan<S> {
    fn new(index: usize, host: Host, threads: Threads) -> Arc<Self> {
        let loan = Arc::new(Loan {
            index,
            host,
            threads,
            lent: Lent::default(),
            calls: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            awake: AtomicBool::new(false),
            over: AtomicBool::new(false),
            succession: AtomicBool::new(false),
            abandoned: Mutex::new(None),
            left: Condvar::new(),
        });
        loan.host.watchdog.watch(Arc::<Self>::clone(&loan));
        loan
    }

    fn name(&self) -> String {
        format!("queue {}", self.index)
    }

    /// A thread's life: until the queue is stopped, or another thread has taken over.
    fn serve(&self, mut state: Box<State<S>>) {
        loop {
            state.hear();
            state.service.progress(&mut state.ring);
            if !state.stopping {
                state.ring.spare_kicks();
            }
            let more = loop {
                let take = !state.stopping;
                match state.service.advance(&mut state.ring, take) {
                    Step::Rest { more } => break more,
                    Step::Call(call) => match self.call(state, call) {
                        Some(back) => state = back,
                        None => return,
                    },
                }
            };
            let answered = state.ring.announce();
            if answered || more {
                state.pause = PAUSE;
            }
            if state.stopping && state.service.in_flight() == 0 {
                self.over.store(true, Ordering::Release);
                return (*state).end(self.index, &self.host.queues);
            }
            let look = !state.stopping && state.service.wants_requests(&state.ring);
            let more = more || state.service.is_behind();
            if more || look && (state.spin(answered) || state.ring.await_kicks()) {
                state.service.hand_over();
            } else {
                if self.awake.load(Ordering::Relaxed) {
                    self.awake.store(false, Ordering::SeqCst);
                }
                state.rest();
            }
        }
    }

    /// Makes a host call; `None` if the queue was taken over meanwhile.
    #[inline]
    fn call(&self, state: Box<State<S>>, call: HostCall) -> Option<Box<State<S>>> {
        let HostCall { disk, operation } = call;
        if !self.awake.load(Ordering::Relaxed) {
            self.awake.store(true, Ordering::SeqCst);
            self.host.watchdog.wake();
        }
        let begun = self.calls.load(Ordering::Relaxed).wrapping_add(1);
        self.lent.lend(state);
        self.calls.store(begun, Ordering::Release);
        let store = self.host.target.disks().get(disk).map(|lun| lun.store());
        let result = store.and_then(|store| store.try_now(&operation));
        let Some(mut state) = self.lent.take() else {
            self.finish_abandoned(operation, result);
            return None;
        };
        self.calls.store(begun.wrapping_add(1), Ordering::Relaxed);
        state.service.called(&mut state.ring, operation, result);
        Some(state)
    }

    #[cold]
    fn finish_abandoned(&self, operation: Operation, result: CallResult) {
        let none = |abandoned: &mut Option<Abandoned>| abandoned.is_none();
        let abandoned = self.abandoned.lock().unwrap_or_else(PoisonError::into_inner);
        let mut abandoned =
            self.left.wait_while(abandoned, none).unwrap_or_else(PoisonError::into_inner);
        if let Some(finish) = abandoned.take() {
            drop(abandoned);
            finish(operation, result);
        }
    }

    /// Takes over from the thread of this loan, if that is still in the call that was seen.
    fn succeed(&self, seen: u64) {
        let still = self.calls.load(Ordering::Acquire) == seen;
        let Some(mut state) = still.then(|| self.lent.take()).flatten() else {
            return self.succession.store(false, Ordering::Release);
        };
        self.over.store(true, Ordering::Release);
        let abandoned = state.service.abandon();
        *self.abandoned.lock().unwrap_or_else(PoisonError::into_inner) = Some(abandoned);
        self.left.notify_one();
        let next = Loan::new(self.index, self.host.clone(), Arc::clone(&self.threads));
        next.serve(state);
    }
}

impl<S: Service> Watched for Loan<S> {
    fn is_awake(&self) -> bool {
        self.awake.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn look(self: Arc<Self>) {
        let calls = self.calls.load(Ordering::Acquire);
        let hangs = calls % 2 == 1 && self.seen.swap(calls, Ordering::Relaxed) == calls;
        if !hangs || self.is_over() || self.succession.swap(true, Ordering::AcqRel) {
            return;
        }
        // The new thread takes what is lent when it runs, so that nothing is lost if there is none.
        let of_thread = Arc::clone(&self);
        match self.host.watchdog.stand_in(Box::new(move || of_thread.succeed(calls))) {
            Some(thread) => {
                let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
            }
            // The next look tries again.
            None => self.succession.store(false, Ordering::Release),
        }
    }
}

impl<S: Service> State<S> {
    /// Nothing is in flight: says where the queue was left.
    fn end(self, index: usize, queues: &Queues) {
        let State { ring, unheard, inbox, end, .. } = self;
        // Here, not by the connection, which may be waiting for another queue.
        queues.stop(index, unheard, &inbox);
        // Nobody waits for it when the connection is being torn down without a join; then there is nothing to say.
        let _ = end.send(Ended { next_avail: ring.next_avail() });
    }

    /// Handles the messages that are there.
    fn hear(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.message(message);
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Stop => {
                self.stopping = true;
                for sweep in self.service.stop() {
                    keep_unreported(&mut self.unheard, &sweep);
                }
            }
            Message::SetMemory(memory, done) => {
                self.service.leave_memory(&mut self.ring);
                self.ring.set_memory(&memory);
                let _ = done.send(());
            }
            Message::SetLog(log, done) => {
                self.ring.set_log(log);
                let _ = done.send(());
            }
            Message::SetCall(call, done) => {
                self.ring.set_call(call);
                let _ = done.send(());
            }
            Message::Sweep(sweep) => {
                self.service.sweep(&mut self.ring, &sweep, !self.stopping);
                // The driver sees what has ended before it sees the end of the function.
                self.ring.announce();
                if self.stopping {
                    keep_unreported(&mut self.unheard, &sweep);
                }
            }
            other => self.service.message(&mut self.ring, other),
        }
    }

    /// Looks for something to do for a while, if that was worth it lately; says whether there is. A driver
    /// that has just been answered may come back at once; what is in flight takes longer than a short look.
    fn spin(&mut self, answered: bool) -> bool {
        let Some(time) = self.spin.as_ref().and_then(Spin::time) else { return false };
        if time <= SPIN && !answered {
            return false;
        }
        let completions = time > SPIN && self.service.in_flight() > 0;
        let start = Instant::now();
        let mut found = false;
        while !found && start.elapsed() < time {
            std::hint::spin_loop();
            found = self.ring.has_requests() || completions && self.service.has_progress();
        }
        if let Some(spin) = &mut self.spin {
            spin.learn(found);
        }
        found
    }

    /// Sleeps, and learns from it whether it would have been better not to.
    fn rest(&mut self) {
        let start = self.spin.as_ref().map(|_| Instant::now());
        self.wait();
        if let (Some(spin), Some(start)) = (&mut self.spin, start) {
            spin.slept(start.elapsed());
        }
    }

    /// Sleeps until there is a kick, a message or a completion.
    fn wait(&mut self) {
        if self.kick.is_none() {
            return self.doze();
        }
        let kick = self.kick.as_ref().map(AsRawFd::as_raw_fd);
        if self.service.sleep([Some(self.mailbox.wake().as_raw_fd()), kick]).is_some() {
            // Nobody waits for these events to be readable, so that they need not be read.
            return;
        }
        let mut fds = vec![PollFd::new(self.mailbox.wake().as_ref().as_fd(), PollFlags::POLLIN)];
        fds.extend(self.kick.as_ref().map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => log::error!("poll: {error}"),
        }
        let ready = |n: usize| fds.get(n).and_then(PollFd::any).unwrap_or(false);
        let (woken, kicked) = (ready(0), ready(1));
        if woken {
            let _ = self.mailbox.wake().read();
        }
        if kicked && !self.kick.as_ref().is_some_and(event_fd::drain) {
            log::warn!("the kick descriptor cannot be read without waiting; the queue is polled");
            self.kick = None;
        }
    }

    /// Sleeps for a moment, or until there is a message or a completion: nobody says when there are requests. The moment
    /// grows while nothing happens, so that an idle queue costs little.
    fn doze(&mut self) {
        self.service.hand_over();
        let mut fds = [PollFd::new(self.mailbox.wake().as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(self.pause)), None) {
            Ok(0) | Err(_) => self.pause = (self.pause * 9 / 8).min(LONGEST_PAUSE),
            Ok(_) => drop(self.mailbox.wake().read()),
        }
    }
}

/// The first and the longest pause between looks at a ring that is not kicked. They grow by an eighth each, so that the
/// longest comes after a tenth of a second in which nothing happened.
const PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// How long a queue looks for requests before it sleeps, if nothing else was asked for: less than going to
/// sleep and being woken takes.
const SPIN: Duration = Duration::from_micros(3);

/// What a sleep and its end cost: a shorter one should not have been.
const WAKING: Duration = Duration::from_micros(20);

/// For how long to look before sleeping: as long as allowed while that pays, not at all while it does not.
struct Spin {
    most: Duration,
    /// Looks in a row that found nothing.
    misses: u32,
}

impl Spin {
    fn new(asked: Duration) -> Self {
        Spin { most: asked.max(SPIN), misses: MISSES }
    }

    fn time(&self) -> Option<Duration> {
        (self.misses < MISSES).then_some(self.most)
    }

    fn learn(&mut self, found: bool) {
        self.misses = if found { 0 } else { self.misses + 1 };
    }

    fn slept(&mut self, time: Duration) {
        if time < self.most + WAKING {
            self.misses = self.misses.saturating_sub(1);
        }
    }
}

/// Looks that may find nothing before no more are made.
const MISSES: u32 = 4;
