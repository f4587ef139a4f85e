//! One queue's life: a thread that owns a ring, waits for kicks, messages and completions in one
//! place, and ends when it is told to, with nothing in flight.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

use super::message::{Mailbox, Message};
use super::ring::Ring;
use crate::sandbox::{self, Role};

/// What a queue is for. All methods are called on the queue's own thread and must not block.
pub(super) trait Service {
    /// There may be new requests: takes some. Returns whether it left some although it could go on.
    fn requests(&mut self, ring: &mut Ring) -> bool;

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

    /// A message that is not about the ring itself.
    fn message(&mut self, ring: &mut Ring, message: Message);

    /// Whether it would take a request now. If not, none is looked for until something else
    /// happens: a completion, a message, or a kick.
    fn wants_requests(&self, ring: &Ring) -> bool;

    /// Requests taken and not yet answered.
    fn in_flight(&self) -> usize;
}

/// A queue thread that runs.
pub(super) struct Worker {
    mailbox: Mailbox,
    thread: JoinHandle<u16>,
}

impl Worker {
    /// Starts a thread for `ring`. `make` gets an event to write to when a completion is there. `poll` says for how
    /// long it may look for requests before it sleeps.
    ///
    /// # Errors
    /// If the host has no thread or file descriptor left.
    pub(super) fn start<S: Service + Send + 'static>(
        name: String,
        ring: Ring,
        kick: Option<File>,
        poll: Option<Duration>,
        make: impl FnOnce(Arc<EventFd>) -> S,
    ) -> io::Result<Self> {
        let (sender, inbox) = mpsc::channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let mailbox = Mailbox::new(sender, Arc::clone(&wake));
        let service = make(Arc::clone(&wake));
        let spin = poll.map(Spin::new);
        let state = State { ring, service, kick, wake, inbox, spin, pause: PAUSE };
        let thread = sandbox::spawn(name, Role::Queue, move || state.run())?;
        Ok(Worker { mailbox, thread })
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

    /// Waits until nothing is in flight and the thread is gone; returns where the next request will
    /// be found.
    pub(super) fn join(self) -> u16 {
        self.stop();
        self.thread.join().unwrap_or_default()
    }
}

struct State<S> {
    ring: Ring,
    service: S,
    kick: Option<File>,
    wake: Arc<EventFd>,
    inbox: Receiver<Message>,
    spin: Option<Spin>,
    /// For how long it sleeps next without a kick.
    pause: Duration,
}

impl<S: Service> State<S> {
    fn run(mut self) -> u16 {
        let mut stopping = false;
        loop {
            while let Ok(message) = self.inbox.try_recv() {
                stopping |= self.message(message);
            }
            self.service.progress(&mut self.ring);
            let mut more = false;
            if !stopping {
                self.ring.spare_kicks();
                more = self.service.requests(&mut self.ring);
            }
            let answered = self.ring.announce();
            if answered || more {
                self.pause = PAUSE;
            }
            if stopping && self.service.in_flight() == 0 {
                return self.ring.next_avail();
            }
            let look = !stopping && self.service.wants_requests(&self.ring);
            let more = more || self.service.is_behind();
            if more || look && (self.spin(answered) || self.ring.await_kicks()) {
                self.service.hand_over();
            } else {
                self.rest();
            }
        }
    }

    /// Handles a message; says whether it was the last one.
    fn message(&mut self, message: Message) -> bool {
        match message {
            Message::Stop => return true,
            Message::SetMemory(memory, done) => {
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
            other => self.service.message(&mut self.ring, other),
        }
        false
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
        if self.service.sleep([Some(self.wake.as_raw_fd()), kick]).is_some() {
            // Nobody waits for these events to be readable, so that they need not be read.
            return;
        }
        let mut fds = vec![PollFd::new(self.wake.as_ref().as_fd(), PollFlags::POLLIN)];
        fds.extend(self.kick.as_ref().map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => log::error!("poll: {error}"),
        }
        let ready = |n: usize| fds.get(n).and_then(PollFd::any).unwrap_or(false);
        let (woken, kicked) = (ready(0), ready(1));
        if woken {
            let _ = self.wake.read();
        }
        if kicked && !self.consume_kick() {
            log::warn!("the kick descriptor is not an eventfd; the queue is polled");
            self.kick = None;
        }
    }

    /// Sleeps for a moment, or until there is a message or a completion: nobody says when there are requests. The moment
    /// grows while nothing happens, so that an idle queue costs little.
    fn doze(&mut self) {
        self.service.hand_over();
        let mut fds = [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(self.pause)), None) {
            Ok(0) | Err(_) if self.service.in_flight() == 0 => {
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
            Ok(0) | Err(_) => self.pause = PAUSE,
            Ok(_) => drop(self.wake.read()),
        }
    }

    fn consume_kick(&self) -> bool {
        let Some(mut kick) = self.kick.as_ref() else { return false };
        match kick.read(&mut [0; 8]) {
            Ok(n) => n == 8,
            Err(e) => matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }
}

/// The first and the longest pause between looks at a ring that is not kicked.
const PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

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
