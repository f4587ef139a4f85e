//! Threads for work that blocks: one that stays, and more while there is more work.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sandbox::{self, Role};

/// How long a thread waits for more work before it ends, unless it is the one that stays.
const IDLE: Duration = Duration::from_secs(5);

/// A piece of blocking work.
pub type Work = Box<dyn FnOnce() + Send>;

/// Names work that was handed to a pool, to withdraw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkId(u64);

/// A bounded set of threads with one queue of work, first come first served.
///
/// Whoever hands work over never does it himself: he may be a queue thread, for whom the work may wait. The first thread
/// stays as long as the pool, so that work that was taken is done even if the host has no thread more.
pub struct Pool {
    shared: Arc<Shared>,
}

/// How a pool makes a thread.
type Spawn = Box<dyn Fn(Work) -> io::Result<()> + Send + Sync>;

struct Shared {
    name: String,
    max_threads: usize,
    spawn: Spawn,
    /// Work that was handed over and has not ended.
    unfinished: AtomicUsize,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    waiting: VecDeque<(u64, Work)>,
    /// Threads that there are, or are about to be.
    threads: usize,
    idle: usize,
    /// Why the last thread could not be made, until that has been said.
    refused: Option<io::Error>,
    /// A thread was refused since one could be made.
    short: bool,
    /// The pool is gone.
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Work never runs under this lock, so that a poisoned one still holds a sound queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, work: Work) {
        work();
        self.unfinished.fetch_sub(1, Ordering::AcqRel);
    }

    /// Makes one more thread, if the host has one: it is counted already. Without it the work waits for the others.
    fn add_thread(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        sandbox::post(move || {
            let of_thread = Arc::clone(&shared);
            let spawned = (shared.spawn)(Box::new(move || serve(&of_thread, false)));
            let mut state = shared.state();
            let short = std::mem::replace(&mut state.short, spawned.is_err());
            if let Err(error) = spawned {
                state.threads -= 1;
                state.refused = (!short).then_some(error);
            }
        });
    }
}

impl Drop for Pool {
    /// Its threads end when they have done what they were given.
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.more.notify_all();
    }
}

impl Pool {
    /// Whether there is work that has not ended.
    pub fn is_busy(&self) -> bool {
        self.shared.unfinished.load(Ordering::Acquire) > 0
    }

    /// A pool of at most `max_threads` threads (at least one) for a role, none of them started yet.
    pub fn new(name: &str, role: Role, max_threads: usize) -> Self {
        let thread = name.to_owned();
        let spawn = move |work: Work| sandbox::spawn(thread.clone(), role, work).map(drop);
        Self::with(name, max_threads, Box::new(spawn))
    }

    fn with(name: &str, max_threads: usize, spawn: Spawn) -> Self {
        let shared = Shared {
            name: name.to_owned(),
            max_threads: max_threads.max(1),
            spawn,
            unfinished: AtomicUsize::new(0),
            state: Mutex::default(),
            more: Condvar::new(),
        };
        Pool { shared: Arc::new(shared) }
    }

    /// Starts the thread that stays, unless it is there.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn start(&self) -> io::Result<()> {
        self.start_in(&mut self.shared.state())
    }

    /// The lock is held until there is the thread, or none. The maker does not wait for it meanwhile: what it does for
    /// this pool else comes after the first thread.
    fn start_in(&self, state: &mut State) -> io::Result<()> {
        if state.threads == 0 {
            let shared = Arc::clone(&self.shared);
            (self.shared.spawn)(Box::new(move || serve(&shared, true)))?;
            state.threads = 1;
        }
        Ok(())
    }

    /// Runs `work` on one of the threads, soon.
    ///
    /// # Errors
    /// If there is no thread and the host has none left. It never is once [`Pool::start`] or this succeeded.
    pub fn run(&self, work: Work) -> io::Result<WorkId> {
        let mut state = self.shared.state();
        self.start_in(&mut state)?;
        self.shared.unfinished.fetch_add(1, Ordering::AcqRel);
        let id = state.next;
        state.next += 1;
        state.waiting.push_back((id, work));
        let more = state.idle < state.waiting.len() && state.threads < self.shared.max_threads;
        if more {
            state.threads += 1;
        }
        drop(state);
        if more {
            self.shared.add_thread();
        }
        self.shared.more.notify_one();
        Ok(WorkId(id))
    }

    /// Runs `work` on a thread of its own: for what other work may wait for, which then holds none of the threads
    /// up that this needs.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn run_apart(&self, work: Work) -> io::Result<()> {
        self.shared.unfinished.fetch_add(1, Ordering::AcqRel);
        let shared = Arc::clone(&self.shared);
        let spawned = (self.shared.spawn)(Box::new(move || shared.carry_out(work)));
        if spawned.is_err() {
            self.shared.unfinished.fetch_sub(1, Ordering::AcqRel);
        }
        spawned
    }

    /// Takes work back that no thread has begun; `None` once it runs or is done.
    pub fn withdraw(&self, id: WorkId) -> Option<Work> {
        let mut state = self.shared.state();
        let index = state.waiting.iter().position(|(waiting, _)| *waiting == id.0)?;
        self.shared.unfinished.fetch_sub(1, Ordering::AcqRel);
        state.waiting.remove(index).map(|(_, work)| work)
    }
}

/// A thread's life: work while there is some; unless it stays, wait a little for more, and end.
fn serve(shared: &Shared, stays: bool) {
    let mut state = shared.state();
    loop {
        while let Some((_, work)) = state.waiting.pop_front() {
            let refused = state.refused.take();
            drop(state);
            if let Some(error) = refused {
                log::warn!("{}: no more threads to be had, work waits: {error}", shared.name);
            }
            shared.carry_out(work);
            state = shared.state();
        }
        if state.closed {
            return;
        }
        state.idle += 1;
        let nothing = |state: &mut State| state.waiting.is_empty() && !state.closed;
        state = if stays {
            shared.more.wait_while(state, nothing).unwrap_or_else(PoisonError::into_inner)
        } else {
            let waited = shared.more.wait_timeout_while(state, IDLE, nothing);
            waited.unwrap_or_else(PoisonError::into_inner).0
        };
        state.idle -= 1;
        if !stays && state.waiting.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn test_pool(max_threads: usize) -> Pool {
        Pool::new("test", Role::Disk, max_threads)
    }

    /// A host that has so many threads, and after that none.
    fn pool_on_a_host_with(threads: usize, max_threads: usize) -> Pool {
        let left = Mutex::new(threads);
        let spawn = move |work: Work| {
            let mut left = left.lock().unwrap();
            *left = left.checked_sub(1).ok_or(io::Error::from_raw_os_error(libc::EAGAIN))?;
            std::thread::spawn(work);
            Ok(())
        };
        Pool::with("test", max_threads, Box::new(spawn))
    }

    /// Much at once, most of which no thread can be had for: all of it is done, and none by whoever hands it over.
    #[test]
    fn work_waits_for_the_one_thread_there_is() {
        let pool = pool_on_a_host_with(1, 16);
        pool.start().unwrap();
        let (done, results) = mpsc::channel();
        let here = std::thread::current().id();
        let (open, gate) = mpsc::channel::<()>();
        pool.run(Box::new(move || gate.recv().unwrap())).unwrap();
        for n in 0..50 {
            let done = done.clone();
            let work = move || done.send((n, std::thread::current().id() != here)).unwrap();
            pool.run(Box::new(work)).unwrap();
        }
        open.send(()).unwrap();
        for n in 0..50 {
            assert_eq!(results.recv_timeout(PATIENCE), Ok((n, true)));
        }
        // The last thread of all is the one that stays.
        assert_eq!(pool.shared.state().threads, 1);
        // What needs a thread of its own does not share.
        assert!(pool.run_apart(Box::new(|| panic!("it ran"))).is_err());
    }

    #[test]
    fn without_any_thread_work_is_refused_and_dropped() {
        struct Dropped(Arc<AtomicBool>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let pool = pool_on_a_host_with(0, 2);
        assert!(pool.start().is_err());
        for apart in [false, true] {
            let gone = Arc::new(AtomicBool::new(false));
            let work = Dropped(Arc::clone(&gone));
            let work = Box::new(move || panic!("{}", work.0.load(Ordering::Acquire)));
            let refused = if apart { pool.run_apart(work) } else { pool.run(work).map(drop) };
            assert!(refused.is_err() && gone.load(Ordering::Acquire) && !pool.is_busy());
        }
    }

    /// A thread that could not be made once can be later.
    #[test]
    fn threads_come_when_the_host_has_them_again() {
        let full = Arc::new(AtomicBool::new(false));
        let host = Arc::clone(&full);
        let spawn = move |work: Work| {
            if host.load(Ordering::Acquire) {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            std::thread::spawn(work);
            Ok(())
        };
        let pool = Pool::with("test", 2, Box::new(spawn));
        pool.start().unwrap();
        full.store(true, Ordering::Release);
        let (open, gate) = mpsc::channel::<()>();
        pool.run(Box::new(move || gate.recv().unwrap())).unwrap();
        let (done, results) = mpsc::channel();
        let other = done.clone();
        pool.run(Box::new(move || other.send(1).unwrap())).unwrap();
        assert!(results.try_recv().is_err());
        full.store(false, Ordering::Release);
        pool.run(Box::new(move || done.send(2).unwrap())).unwrap();
        assert_eq!(results.recv_timeout(PATIENCE), Ok(1));
        assert_eq!(results.recv_timeout(PATIENCE), Ok(2));
        open.send(()).unwrap();
    }

    #[test]
    fn threads_end_with_their_pool() {
        let pool = test_pool(1);
        pool.start().unwrap();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        let start = std::time::Instant::now();
        while shared.strong_count() > 0 {
            assert!(start.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
    }

    #[test]
    fn work_that_others_wait_for_is_not_held_up_by_them() {
        let pool = Arc::new(test_pool(2));
        let (sender, receiver) = std::sync::mpsc::channel();
        let ended = Arc::new((Mutex::new(false), Condvar::new()));
        for _ in 0..4 {
            let (ended, sender) = (Arc::clone(&ended), sender.clone());
            pool.run(Box::new(move || {
                let all = ended.0.lock().unwrap();
                drop(ended.1.wait_while(all, |ended| !*ended).unwrap());
                sender.send(()).unwrap();
            }))
            .unwrap();
        }
        pool.run_apart(Box::new(move || {
            *ended.0.lock().unwrap() = true;
            ended.1.notify_all();
        }))
        .unwrap();
        for _ in 0..4 {
            receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        }
    }

    #[test]
    fn runs_everything_with_bounded_threads() {
        let pool = test_pool(3);
        let (tx, rx) = mpsc::channel();
        for i in 0..100 {
            let tx = tx.clone();
            pool.run(Box::new(move || tx.send(i).unwrap())).unwrap();
            assert!(pool.shared.state().threads <= 3);
        }
        let mut seen: Vec<i32> = rx.iter().take(100).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn waiting_work_can_be_withdrawn_running_work_cannot() {
        let pool = test_pool(1);
        let (release, gate) = mpsc::channel::<()>();
        let (started, running) = mpsc::channel();
        let first = pool
            .run(Box::new(move || {
                started.send(()).unwrap();
                gate.recv().unwrap();
            }))
            .unwrap();
        running.recv().unwrap();
        let second = pool.run(Box::new(|| panic!("withdrawn work ran"))).unwrap();
        assert!(pool.withdraw(first).is_none());
        assert!(pool.withdraw(second).is_some());
        assert!(pool.withdraw(second).is_none());
        assert!(pool.is_busy());
        release.send(()).unwrap();
        while pool.is_busy() {
            std::thread::yield_now();
        }
    }
}
