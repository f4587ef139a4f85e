//! Looks after queue threads that are in a host call: one that does not come back soon is left in it, and another thread
//! takes its queue over ([`super::worker`]).
//!
//! The watchdog sleeps while all queues sleep. While one is awake it looks at all of them every few milliseconds.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::limits;
use crate::sandbox::{self, Role};

/// How often it looks. A call that was there at one look and still is at the next one has not come back soon.
const LOOK: Duration = Duration::from_millis(5);

/// Looks at sleeping queues before it sleeps itself: a guest with one request at a time sleeps often.
const LINGER: u32 = 20;

/// Something to look after.
pub(super) trait Watched: Send + Sync {
    /// Whether its thread has made host calls since it last slept.
    fn is_awake(&self) -> bool;

    /// Whether nobody needs to look any more.
    fn is_over(&self) -> bool;

    /// Looks whether its thread is still in the call of the last look.
    fn look(self: Arc<Self>);
}

/// The watchdog of a device.
#[derive(Clone)]
pub(super) struct Watchdog(Arc<Shared>);

struct Shared {
    watched: Mutex<Vec<Arc<dyn Watched>>>,
    awake: AtomicBool,
    woken: Condvar,
    /// The device is gone.
    over: AtomicBool,
    standby: Mutex<Standby>,
}

/// What a thread that takes over does.
type Work = Box<dyn FnOnce() + Send>;

/// A thread that waits to take over, so that there is one when the host has no more.
struct Standby {
    thread: Option<(JoinHandle<()>, Sender<Work>)>,
    /// It was said that there is none.
    complained: bool,
}

impl Standby {
    fn start() -> io::Result<(JoinHandle<()>, Sender<Work>)> {
        let (sender, work) = mpsc::channel::<Work>();
        let wait = move || work.recv().into_iter().for_each(|work| work());
        Ok((sandbox::spawn("standby".into(), Role::Queue, wait)?, sender))
    }

    fn refill(&mut self) {
        if self.thread.is_some() {
            return;
        }
        match Self::start() {
            Ok(thread) => (self.thread, self.complained) = (Some(thread), false),
            Err(error) if !self.complained => {
                self.complained = true;
                let why = limits::behind(&error).unwrap_or_else(|| error.to_string());
                log::error!("no thread to take over a queue whose host hangs: {why}");
            }
            Err(_) => {}
        }
    }
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, Vec<Arc<dyn Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps if all that is watched does, until [`Watchdog::wake`].
    fn sleep(&self) {
        let watched = self.watched();
        // Either whoever wakes up now sees that we sleep, or we see that it is awake: all of this is sequentially
        // consistent.
        self.awake.store(false, Ordering::SeqCst);
        if watched.iter().any(|one| one.is_awake()) {
            self.awake.store(true, Ordering::SeqCst);
            return;
        }
        let asleep = |_: &mut Vec<_>| !self.awake.load(Ordering::SeqCst);
        drop(self.woken.wait_while(watched, asleep).unwrap_or_else(PoisonError::into_inner));
    }

    fn run(&self) {
        let mut quiet = 0;
        while !self.over.load(Ordering::Acquire) {
            if quiet > LINGER {
                self.sleep();
                quiet = 0;
            }
            thread::sleep(LOOK);
            let all = {
                let mut watched = self.watched();
                watched.retain(|one| !one.is_over());
                watched.clone()
            };
            quiet = if all.iter().any(|one| one.is_awake()) { 0 } else { quiet + 1 };
            all.into_iter().for_each(Watched::look);
        }
    }
}

impl Watchdog {
    /// A watchdog with a thread of its own.
    ///
    /// # Errors
    /// If the host has no thread for it.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            watched: Mutex::default(),
            awake: AtomicBool::new(true),
            woken: Condvar::new(),
            over: AtomicBool::new(false),
            standby: Mutex::new(Standby { thread: Some(Standby::start()?), complained: false }),
        });
        let of_thread = Arc::clone(&shared);
        sandbox::spawn("watchdog".into(), Role::Watchdog, move || of_thread.run())?;
        Ok(Watchdog(shared))
    }

    /// Looks after one more, until it is over.
    pub(super) fn watch(&self, one: Arc<dyn Watched>) {
        let mut watched = self.0.watched();
        // It may sleep for long.
        watched.retain(|one| !one.is_over());
        watched.push(one);
    }

    /// Has a thread that waits for this take over; `None` if there is none now.
    pub(super) fn stand_in(&self, work: Work) -> Option<JoinHandle<()>> {
        let mut standby = self.0.standby.lock().unwrap_or_else(PoisonError::into_inner);
        standby.refill();
        let (thread, sender) = standby.thread.take()?;
        let _ = sender.send(work);
        standby.refill();
        Some(thread)
    }

    /// Something that is watched is about to make host calls, the first since it slept.
    #[inline]
    pub(super) fn wake(&self) {
        if !self.0.awake.load(Ordering::SeqCst) {
            self.rouse();
        }
    }

    #[cold]
    fn rouse(&self) {
        // With the lock, it is either not asleep yet or hears of it.
        let _watched = self.0.watched();
        self.0.awake.store(true, Ordering::SeqCst);
        self.0.woken.notify_one();
    }

    /// Has its threads end.
    pub(super) fn end(&self) {
        self.0.over.store(true, Ordering::Release);
        self.0.standby.lock().unwrap_or_else(PoisonError::into_inner).thread = None;
        self.rouse();
    }
}
