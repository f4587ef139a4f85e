//! The engine that works everywhere: every operation is a blocking call on the store's pool.
//!
//! What needs ranges of the store that others have is not begun before it has them ([`Store::hold`]), and until then no
//! thread has to do with it. Nor has one when it has been done, and waits for the end of something else ([`Job::after`]).

use std::collections::HashMap;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use super::ending::Ended;
use super::{Cancel, Completion, Engine, Finished, Job, Need, Operation, Token};
use crate::store::pool::WorkId;
use crate::store::{Cause, Held, Hold, Mode, Store, Wanted};

/// Runs everything on the pools of the stores.
pub struct ThreadEngine<J> {
    port: Arc<Port<J>>,
    running: HashMap<u32, Running>,
}

struct Running {
    place: Arc<Mutex<Place>>,
    store: Arc<dyn Store>,
    cancel: Arc<Cancel>,
}

/// Where something is that was begun, and can be taken back from.
#[derive(Debug, Default)]
enum Place {
    /// Nowhere: a thread is at it, or it has completed.
    #[default]
    Gone,
    /// It waits for ranges of its store, under this number.
    Waits(u64),
    /// The pool has it.
    Queued(WorkId),
    /// It is done, but for the end of this.
    Ends(Ended),
}

fn lock(place: &Mutex<Place>) -> MutexGuard<'_, Place> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Nothing was done, for want of a thread.
    fn refuse(&self, token: u32) {
        self.post(Token(token), Finished::Operation(Err(Cause::Busy.into())));
    }
}

impl<J: Send + 'static> ThreadEngine<J> {
    /// An engine that writes to `wake` when a completion is there.
    pub fn new(wake: Arc<EventFd>) -> Self {
        let port = Port { finished: Mutex::default(), wake };
        ThreadEngine { port: Arc::new(port), running: HashMap::new() }
    }

    /// Has `work` done by the store's pool, or by a thread `apart`, when it can hold what it needs.
    fn run(
        &mut self,
        token: Token,
        store: &Arc<dyn Store>,
        need: Option<(Mode, &[Range<u64>])>,
        apart: bool,
        after: Option<Ended>,
        work: impl FnOnce(&Cancel, &dyn Store) -> Finished<J> + Send + 'static,
    ) {
        let id = token.0;
        let (cancel, place) = (Arc::new(Cancel::default()), Arc::<Mutex<Place>>::default());
        let (flag, known) = (Arc::clone(&cancel), Arc::clone(&place));
        let (port, on) = (Arc::clone(&self.port), Arc::clone(store));
        let begin = move |held: Held| {
            let (done, at) = (Arc::clone(&port), Arc::clone(&known));
            let work = Box::new(move || {
                let result = work(&flag, held.store());
                drop(held);
                let Some(ended) = after else { return done.post(token, result) };
                let mut place = lock(&at);
                let port = Arc::clone(&done);
                ended.then(Box::new(move || port.post(token, result)));
                // Whoever cancels it says so before he looks at the place.
                match flag.is_requested() && ended.forget() {
                    true => done.post(Token(id), Finished::Withdrawn),
                    false => *place = Place::Ends(ended),
                }
            });
            // The place is not looked at before it says where the work is.
            let mut place = lock(&known);
            let pool = on.pool();
            let begun = match apart {
                false => pool.run(work),
                true => {
                    let (done, on) = (Arc::clone(&port), Arc::clone(&on));
                    // Making a thread takes time, which a queue thread has not.
                    pool.run(Box::new(move || {
                        if on.pool().run_apart(work).is_err() {
                            done.refuse(id);
                        }
                    }))
                }
            };
            match begun {
                Ok(id) => *place = Place::Queued(id),
                Err(_) => port.refuse(id),
            }
        };
        let running = Running { place: Arc::clone(&place), store: Arc::clone(store), cancel };
        self.running.insert(id, running);
        let Some((mode, ranges)) = need else { return begin(Held::nothing(Arc::clone(store))) };
        let of_hold = Arc::clone(store);
        let begin = move |hold: Hold| begin(Held::new(of_hold, hold));
        if mode == Mode::Together
            && let Some(hold) = store.hold_now(ranges)
        {
            return begin(hold);
        }
        let mut place = lock(&place);
        match store.hold(mode, ranges, Box::new(begin)) {
            Wanted::Had(hold, begin) => {
                drop(place);
                begin(hold);
            }
            Wanted::Waits(number) => *place = Place::Waits(number),
        }
    }
}

impl<J: Send + 'static> ThreadEngine<J> {
    /// Counts an operation as running that another thread is at, which will post its completion.
    pub(super) fn adopt(&mut self, token: u32, store: &Arc<dyn Store>) -> Arc<Cancel> {
        let cancel = Arc::new(Cancel::default());
        let (place, store) = (Arc::default(), Arc::clone(store));
        self.running.insert(token, Running { place, store, cancel: Arc::clone(&cancel) });
        cancel
    }

    /// Where completions are posted.
    pub(super) fn port(&self) -> Arc<Port<J>> {
        Arc::clone(&self.port)
    }

    /// Has a thread do an operation.
    pub(super) fn hand_over(&mut self, token: Token, store: &Arc<dyn Store>, operation: Operation) {
        let range = operation.range();
        let need = (!range.is_empty()).then_some((Mode::Together, std::slice::from_ref(&range)));
        self.run(token, store, need, false, None, |cancel, store| {
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
        let Job { need, work, after } = job;
        let work = move |cancel: &Cancel, store: &dyn Store| Finished::Job(work(cancel, store));
        match need {
            Need::Nothing => self.run(token, store, None, false, after, work),
            Need::Thread => self.run(token, store, None, true, after, work),
            Need::Together(ranges) => {
                self.run(token, store, Some((Mode::Together, &ranges)), false, after, work);
            }
            Need::Alone(range) => {
                self.run(token, store, Some((Mode::Alone, &[range])), false, after, work);
            }
        }
    }

    fn cancel(&mut self, token: u32) {
        let Some(Running { place, store, cancel }) = self.running.get(&token) else { return };
        cancel.request();
        let place = mem::take(&mut *lock(place));
        let withdrawn = match place {
            Place::Gone => false,
            Place::Waits(number) => store.stop_waiting(number).is_some(),
            Place::Queued(work) => store.pool().withdraw(work).is_some(),
            Place::Ends(ended) => ended.forget(),
        };
        if withdrawn {
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
    use std::sync::mpsc;

    use super::super::Work;
    use super::super::ending::ending;
    use super::*;
    use crate::store::mem::MemStore;
    use crate::store::{Buffers, Durability, Exclusion};

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
        for need in [Need::Nothing, Need::Thread, Need::Alone(0..8)] {
            let work: Work<&str> = Box::new(|cancel, _| {
                while !cancel.is_requested() {
                    std::thread::yield_now();
                }
                "stopped"
            });
            engine.spawn(Token(7), &store, Job { need, work, after: None });
            engine.cancel(7);
            let done = collect(&mut engine, &wake, 1);
            assert!(matches!(done[0].result, Finished::Job("stopped") | Finished::Withdrawn));
        }
    }

    /// What may wait for others has a thread of its own: more of it than the pool has threads are in nobody's way.
    #[test]
    fn those_who_may_wait_take_no_thread_of_the_pool() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<u32>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(MemStore::new(1 << 20));
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for n in 0..5 {
            let gate = Arc::clone(&gate);
            let work: Work<u32> = Box::new(move |_, _| {
                gate.lock().unwrap().recv().unwrap();
                n
            });
            engine.spawn(Token(n), &store, Job { need: Need::Thread, work, after: None });
        }
        let job = Job { need: Need::Nothing, work: Box::new(|_, _| 9), after: None };
        engine.spawn(Token(9), &store, job);
        assert_eq!(collect(&mut engine, &wake, 1)[0].token, Token(9));
        (0..5).for_each(|_| open.send(()).unwrap());
        collect(&mut engine, &wake, 5);
        assert!(engine.running.is_empty());
    }

    /// What the pool has not begun is taken back, and nobody waits for the host on its account.
    #[test]
    fn what_waits_for_a_thread_is_taken_back() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<u32>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(MemStore::new(1 << 20));
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        // More than there are threads.
        for n in 0..5 {
            let gate = Arc::clone(&gate);
            let work: Work<u32> = Box::new(move |_, _| {
                gate.lock().unwrap().recv().unwrap();
                n
            });
            engine.spawn(Token(n), &store, Job { need: Need::Nothing, work, after: None });
        }
        let into = Buffers::zeroed(8).unwrap();
        engine.submit(Token(9), 0, &store, Operation::Read { offset: 0, into, medium: false });
        engine.cancel(9);
        let done = collect(&mut engine, &wake, 1);
        assert!(done[0].token == Token(9) && matches!(done[0].result, Finished::Withdrawn));
        (0..5).for_each(|_| open.send(()).unwrap());
        collect(&mut engine, &wake, 5);
        assert!(engine.running.is_empty());
    }

    /// A job that a thread is at is told to stop.
    #[test]
    fn a_job_that_has_begun_is_told_to_stop() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<&str>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(MemStore::new(4096));
        for need in
            [Need::Nothing, Need::Thread, Need::Together(vec![0..8, 16..24]), Need::Alone(0..8)]
        {
            let (begun, begins) = mpsc::channel();
            let work: Work<&str> = Box::new(move |cancel, _| {
                begun.send(()).unwrap();
                while !cancel.is_requested() {
                    std::thread::yield_now();
                }
                "stopped"
            });
            engine.spawn(Token(7), &store, Job { need, work, after: None });
            begins.recv().unwrap();
            engine.cancel(7);
            let done = collect(&mut engine, &wake, 1);
            assert!(matches!(done[0].result, Finished::Job("stopped")));
        }
    }

    /// What is done but for the end of something else holds neither a thread nor a range. It can be taken back, and else ends
    /// with that.
    #[test]
    fn those_who_wait_for_an_end_take_no_thread() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<u32>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(Exclusion::around(Arc::new(MemStore::new(1 << 20))));
        let job = |n, need, after| Job { need, work: Box::new(move |_, _| n), after };
        let (ending, ends): (Vec<_>, Vec<_>) = (0..10).map(|_| ending()).unzip();
        for (n, ended) in (0u32..).zip(ends) {
            let need = if n % 2 == 0 { Need::Nothing } else { Need::Alone(0..8) };
            engine.spawn(Token(n), &store, job(n, need, Some(ended)));
        }
        engine.spawn(Token(99), &store, job(99, Need::Alone(0..8), None));
        assert_eq!(collect(&mut engine, &wake, 1)[0].token, Token(99));
        (0..5).for_each(|n| engine.cancel(n));
        let withdrawn = collect(&mut engine, &wake, 5);
        assert!(withdrawn.iter().all(|c| c.token.0 < 5 && matches!(c.result, Finished::Withdrawn)));
        for (n, ending) in (0..).zip(ending) {
            drop(ending);
            engine.cancel(n);
            if n >= 5 {
                let done = collect(&mut engine, &wake, 1);
                assert!(matches!(done[0].result, Finished::Job(result) if result == n), "{done:?}");
            }
        }
        assert!(engine.running.is_empty());
    }

    /// More wait for a range than there are threads, and what wants none of it does not notice. Who waits can be taken
    /// back; the others are done when the range is free.
    #[test]
    fn those_who_wait_take_no_thread() {
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = ThreadEngine::<u32>::new(Arc::clone(&wake));
        let store: Arc<dyn Store> = Arc::new(Exclusion::around(Arc::new(MemStore::new(1 << 20))));
        let (open, gate) = mpsc::channel::<()>();
        let holder: Work<u32> = Box::new(move |_, _| {
            gate.recv().unwrap();
            0
        });
        let holder = Job { need: Need::Alone(0..512), work: holder, after: None };
        engine.spawn(Token(0), &store, holder);
        let job = |n, need| Job { need, work: Box::new(move |_, _| n), after: None };
        for n in 1..40u32 {
            let into = Buffers::zeroed(8).unwrap();
            match n % 4 {
                0 => engine.spawn(Token(n), &store, job(n, Need::Alone(0..8))),
                1 => engine.spawn(Token(n), &store, job(n, Need::Together(vec![4..8, 1024..1032]))),
                _ => engine.submit(
                    Token(n),
                    0,
                    &store,
                    Operation::Read { offset: 0, into, medium: false },
                ),
            }
        }
        engine.spawn(Token(99), &store, job(99, Need::Alone(512..520)));
        let into = Buffers::zeroed(8).unwrap();
        engine.submit(Token(98), 0, &store, Operation::Read { offset: 4096, into, medium: true });
        let tokens = |done: Vec<Completion<u32>>| {
            let mut tokens: Vec<u32> = done.into_iter().map(|c| c.token.0).collect();
            tokens.sort_unstable();
            tokens
        };
        assert_eq!(tokens(collect(&mut engine, &wake, 2)), [98, 99]);
        (1..20).for_each(|token| engine.cancel(token));
        let withdrawn = collect(&mut engine, &wake, 19);
        assert!(withdrawn.iter().all(|c| matches!(c.result, Finished::Withdrawn)));
        assert_eq!(tokens(withdrawn), (1..20).collect::<Vec<_>>());
        open.send(()).unwrap();
        let done = collect(&mut engine, &wake, 21);
        assert!(!done.iter().any(|c| matches!(c.result, Finished::Withdrawn)));
        assert_eq!(tokens(done), [0].into_iter().chain(20..40).collect::<Vec<_>>());
        assert!(engine.running.is_empty());
    }
}
