//! The engine that works everywhere: every operation is a blocking call on the store's pool.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

use super::{Cancel, Completion, Engine, Finished, Job, Operation, Token};
use crate::store::pool::WorkId;
use crate::store::{Cause, Store};

/// Runs everything on the pools of the stores.
pub struct ThreadEngine<J> {
    port: Arc<Port<J>>,
    running: HashMap<u32, Running>,
}

struct Running {
    /// `None` if a thread of its own is at it, or none could be had: then it has completed.
    work: Option<WorkId>,
    store: Arc<dyn Store>,
    cancel: Arc<Cancel>,
}

/// Where pool threads leave completions for the queue thread.
pub(super) struct Port<J> {
    finished: Mutex<Vec<Completion<J>>>,
    wake: Arc<EventFd>,
}

impl<J> Port<J> {
    pub(super) fn post(&self, token: Token, result: Finished<J>) {
        let completion = Completion { token, result };
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).push(completion);
        // It fails only if the counter is full, and then the queue thread is awake already.
        let _ = self.wake.write(1);
    }
}

impl<J: Send + 'static> ThreadEngine<J> {
    /// An engine that writes to `wake` when a completion is there.
    pub fn new(wake: Arc<EventFd>) -> Self {
        let port = Port { finished: Mutex::default(), wake };
        ThreadEngine { port: Arc::new(port), running: HashMap::new() }
    }

    fn run(
        &mut self,
        token: Token,
        store: &Arc<dyn Store>,
        work: impl FnOnce(&Cancel, &dyn Store) -> Finished<J> + Send + 'static,
    ) {
        let id = token.0;
        let cancel = Arc::new(Cancel::default());
        let (port, flag, on) = (Arc::clone(&self.port), Arc::clone(&cancel), Arc::clone(store));
        let work = Box::new(move || port.post(token, work(&flag, on.as_ref())));
        let work = store.pool().run(work).ok();
        if work.is_none() {
            self.port.post(Token(id), Finished::Operation(Err(Cause::Busy.into())));
        }
        self.running.insert(id, Running { work, store: Arc::clone(store), cancel });
    }
}

impl<J: Send + 'static> ThreadEngine<J> {
    /// Counts an operation as running that another thread is at, which will post its completion.
    pub(super) fn adopt(&mut self, token: u32, store: &Arc<dyn Store>) -> Arc<Cancel> {
        let cancel = Arc::new(Cancel::default());
        let running = Running { work: None, store: Arc::clone(store), cancel: Arc::clone(&cancel) };
        self.running.insert(token, running);
        cancel
    }

    /// Where completions are posted.
    pub(super) fn port(&self) -> Arc<Port<J>> {
        Arc::clone(&self.port)
    }

    /// Has a thread do an operation.
    pub(super) fn hand_over(&mut self, token: Token, store: &Arc<dyn Store>, operation: Operation) {
        self.run(token, store, |cancel, store| {
            Finished::Operation(match cancel.is_requested() {
                true => Err(Cause::Cancelled.into()),
                false => operation.run(store),
            })
        });
    }
}

impl<J: Send + 'static> Engine<J> for ThreadEngine<J> {
    fn submit(&mut self, token: Token, _: usize, store: &Arc<dyn Store>, operation: Operation) {
        self.hand_over(token, store, operation);
    }

    fn spawn(&mut self, token: Token, store: &Arc<dyn Store>, job: Job<J>) {
        self.run(token, store, |cancel, _| Finished::Job(job(cancel)));
    }

    fn cancel(&mut self, token: u32) {
        let Some(running) = self.running.get(&token) else { return };
        running.cancel.request();
        if running.work.is_some_and(|work| running.store.pool().withdraw(work).is_some()) {
            self.port.post(Token(token), Finished::Withdrawn);
        }
    }

    fn completions(&mut self, into: &mut Vec<Completion<J>>) {
        if self.running.is_empty() {
            return;
        }
        let first = into.len();
        into.append(&mut self.port.finished.lock().unwrap_or_else(PoisonError::into_inner));
        for completion in into.iter().skip(first) {
            self.running.remove(&completion.token.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;
    use crate::store::{Buffers, Durability};

    fn collect<J: Send + 'static>(
        engine: &mut ThreadEngine<J>,
        wake: &EventFd,
        n: usize,
    ) -> Vec<Completion<J>> {
        let mut all = Vec::new();
        while all.len() < n {
            wake.read().unwrap();
            engine.completions(&mut all);
        }
        all
    }

    #[test]
    fn many_operations_in_flight_each_complete_once() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<()>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(MemStore::new(1 << 20));
        for i in 0..64u32 {
            let from = Buffers::copy_of(&[i as u8; 512]).unwrap();
            let offset = u64::from(i) * 512;
            let write = Operation::Write { offset, from, durability: Durability::Cached };
            engine.submit(Token(i), 0, &store, write);
        }
        let mut seen: Vec<u32> = collect(&mut engine, &wake, 64)
            .into_iter()
            .map(|c| {
                assert!(matches!(c.result, Finished::Operation(Ok(()))));
                c.token.0
            })
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..64).collect::<Vec<_>>());
        assert!(engine.running.is_empty());
    }

    #[test]
    fn a_cancelled_job_still_completes() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<&str>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(MemStore::new(4096));
        let job: Job<&str> = Box::new(|cancel| {
            while !cancel.is_requested() {
                std::thread::yield_now();
            }
            "stopped"
        });
        engine.spawn(Token(7), &store, job);
        engine.cancel(7);
        let done = collect(&mut engine, &wake, 1);
        assert!(matches!(done[0].result, Finished::Job("stopped") | Finished::Withdrawn));
    }
}
