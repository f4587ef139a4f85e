//! Threads for work that blocks, started when there is work and gone when there is none.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sandbox::{self, Role};

/// How long a thread waits for more work before it ends.
const IDLE: Duration = Duration::from_secs(5);

/// A piece of blocking work.
pub type Work = Box<dyn FnOnce() + Send>;

/// Names work that was handed to a pool, to withdraw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkId(u64);

/// A bounded set of threads with one queue of work, first come first served.
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    max_threads: usize,
    /// Work that was handed over and has not ended.
    unfinished: AtomicUsize,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    waiting: VecDeque<(u64, Work)>,
    threads: usize,
    idle: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Work never runs under this lock, so that a poisoned one still holds a sound queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn carry_out(&self, work: Work) {
        work();
        self.unfinished.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    /// Whether there is work that has not ended.
    pub fn is_busy(&self) -> bool {
        self.shared.unfinished.load(Ordering::Acquire) > 0
    }

    /// A pool of at most `max_threads` threads (at least one), none of them started yet.
    pub fn new(name: &str, max_threads: usize) -> Self {
        let shared = Shared {
            name: name.to_owned(),
            max_threads: max_threads.max(1),
            unfinished: AtomicUsize::new(0),
            state: Mutex::default(),
            more: Condvar::new(),
        };
        Pool { shared: Arc::new(shared) }
    }

    /// Runs `work` on one of the threads, soon. If the host refuses even the first thread, the work
    /// runs here and now: late is better than never.
    pub fn run(&self, work: Work) -> WorkId {
        self.shared.unfinished.fetch_add(1, Ordering::AcqRel);
        let mut state = self.shared.state();
        let id = state.next;
        state.next += 1;
        state.waiting.push_back((id, work));
        let start = state.idle < state.waiting.len() && state.threads < self.shared.max_threads;
        if start {
            state.threads += 1;
        }
        drop(state);
        if start {
            self.start_thread();
        } else {
            self.shared.more.notify_one();
        }
        WorkId(id)
    }

    /// Runs `work` on a thread of its own: for what other work may wait for, which then holds none of the threads
    /// up that this needs. If the host has no thread, it has to share.
    pub fn run_apart(&self, work: Work) {
        self.shared.unfinished.fetch_add(1, Ordering::AcqRel);
        let (shared, work) = (Arc::clone(&self.shared), Arc::new(Mutex::new(Some(work))));
        let take =
            |work: &Mutex<Option<Work>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
        let of_thread = Arc::clone(&work);
        let spawned = sandbox::spawn(self.shared.name.clone(), Role::Disk, move || {
            if let Some(work) = take(&of_thread) {
                shared.carry_out(work);
            }
        });
        if spawned.is_err()
            && let Some(work) = take(&work)
        {
            self.shared.unfinished.fetch_sub(1, Ordering::AcqRel);
            self.run(work);
        }
    }

    /// Takes work back that no thread has begun; `None` once it runs or is done.
    pub fn withdraw(&self, id: WorkId) -> Option<Work> {
        let mut state = self.shared.state();
        let index = state.waiting.iter().position(|(waiting, _)| *waiting == id.0)?;
        self.shared.unfinished.fetch_sub(1, Ordering::AcqRel);
        state.waiting.remove(index).map(|(_, work)| work)
    }

    fn start_thread(&self) {
        let shared = Arc::clone(&self.shared);
        let spawned = sandbox::spawn(self.shared.name.clone(), Role::Disk, move || serve(&shared));
        if let Err(error) = spawned {
            log::warn!("{}: cannot start a thread: {error}", self.shared.name);
            let mut state = self.shared.state();
            state.threads -= 1;
            let orphan = if state.threads == 0 { state.waiting.pop_front() } else { None };
            drop(state);
            if let Some((_, work)) = orphan {
                self.shared.carry_out(work);
            }
        }
    }
}

/// A thread's life: work while there is some, wait a little, end.
fn serve(shared: &Shared) {
    let mut state = shared.state();
    loop {
        while let Some((_, work)) = state.waiting.pop_front() {
            drop(state);
            shared.carry_out(work);
            state = shared.state();
        }
        state.idle += 1;
        let waited = shared.more.wait_timeout_while(state, IDLE, |s| s.waiting.is_empty());
        let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        state = guard;
        state.idle -= 1;
        if timeout.timed_out() && state.waiting.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn work_that_others_wait_for_is_not_held_up_by_them() {
        let pool = Arc::new(Pool::new("test", 2));
        let (sender, receiver) = std::sync::mpsc::channel();
        let ended = Arc::new((Mutex::new(false), Condvar::new()));
        for _ in 0..4 {
            let (ended, sender) = (Arc::clone(&ended), sender.clone());
            pool.run(Box::new(move || {
                let all = ended.0.lock().unwrap();
                drop(ended.1.wait_while(all, |ended| !*ended).unwrap());
                sender.send(()).unwrap();
            }));
        }
        pool.run_apart(Box::new(move || {
            *ended.0.lock().unwrap() = true;
            ended.1.notify_all();
        }));
        for _ in 0..4 {
            receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        }
    }

    #[test]
    fn runs_everything_with_bounded_threads() {
        let pool = Pool::new("test", 3);
        let (tx, rx) = mpsc::channel();
        for i in 0..100 {
            let tx = tx.clone();
            pool.run(Box::new(move || tx.send(i).unwrap()));
            assert!(pool.shared.state().threads <= 3);
        }
        let mut seen: Vec<i32> = rx.iter().take(100).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn waiting_work_can_be_withdrawn_running_work_cannot() {
        let pool = Pool::new("test", 1);
        let (release, gate) = mpsc::channel::<()>();
        let (started, running) = mpsc::channel();
        let first = pool.run(Box::new(move || {
            started.send(()).unwrap();
            gate.recv().unwrap();
        }));
        running.recv().unwrap();
        let second = pool.run(Box::new(|| panic!("withdrawn work ran")));
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
