//! The engine over io_uring: transfers that would wait for the device go to a ring of the queue's own, many with
//! one system call; everything else is done as [`super::threads`] does it.
//!
//! Nothing in it is shared with other queues: it holds each store by a reference of its own, and counts none.
//!
//! A transfer that the ring has not made whole is made again by the thread pool, which knows how to go on
//! after part of it, and what an error is about.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::sys::eventfd::EventFd;

use super::threads::{Port, ThreadEngine};
use super::{Cancel, Completion, Engine, EngineKind, Finished, Job, Operation, Token};
use crate::sandbox;
use crate::store::{Cause, Durability, Hold, RingFile, Store, StoreError};

/// Transfers in a ring at the same time; more go to the pool.
const DEPTH: u32 = 128;
/// Transfers that are handed over with one call. The kernel holds the first back until it has the last: many
/// together save calls, but keep the device waiting.
const AT_ONCE: usize = 2;
/// Completions that are taken at a time: the driver is to have the first, and to send on what it has next, while the rest
/// is worked on. Devices tend to end many at once, and then have nothing to do.
const LANDED: usize = 4;
/// POLLIN, as the ring wants it.
const READABLE: u32 = libc::POLLIN as u32;
/// IORING_ENTER_GETEVENTS.
const ENTER_GETEVENTS: u32 = 1;

/// A ring for transfers, threads for the rest.
pub struct UringEngine<J: Send + 'static> {
    side: RingSide,
    threads: ThreadEngine<J>,
    /// The stores of operations that were in the ring, by number.
    stores: Vec<Option<Arc<dyn Store>>>,
    done: Vec<Completion<J>>,
}

/// A ring and what it is at. The kernel completes its transfers only while the thread that made them asks for it, so that
/// they stay with that thread ([`UringEngine::leave`]).
struct RingSide {
    ring: Ring,
    /// What the ring is at, by token.
    flights: Vec<Option<Flight>>,
    flying: usize,
    /// The store, by its number, that all it is at belongs to, if it is one.
    only: Option<usize>,
    /// The events that the ring looks at, and whether they were seen to be readable.
    events: [Event; 2],
}

/// An event that is waited for in the ring.
#[derive(Clone, Copy, Default)]
struct Event {
    watched: bool,
    readable: bool,
    /// It will never be readable again: it is no event, or closed at its other end.
    dead: bool,
}

/// What an event's completions are known by; transfers have the numbers below.
const EVENTS: u64 = 1 << 32;

/// Made when it is first needed: a queue that never waits for a device has none.
enum Ring {
    Untried,
    Refused,
    Ready(Box<IoUring>),
}

/// A transfer that the kernel is at. Its buffers stay where they are until it is over.
struct Flight {
    number: usize,
    operation: Operation,
    hold: Hold,
}

impl<J: Send + 'static> UringEngine<J> {
    /// An engine of this kind that writes to `wake` when a completion is there.
    pub fn new(wake: Arc<EventFd>, kind: EngineKind) -> Self {
        let ring = match kind {
            EngineKind::Threads => Ring::Refused,
            EngineKind::Auto | EngineKind::Uring => Ring::Untried,
        };
        let threads = ThreadEngine::new(wake);
        UringEngine { side: RingSide::new(ring), threads, stores: Vec::new(), done: Vec::new() }
    }

    /// Keeps a store, so that its file stays open while the kernel is at it.
    fn keep(&mut self, number: usize, store: &Arc<dyn Store>) {
        if self.stores.len() <= number {
            self.stores.resize_with(number + 1, || None);
        }
        if let Some(place @ None) = self.stores.get_mut(number) {
            *place = Some(Arc::clone(store));
        }
    }

    /// Puts a transfer into the ring, and says how many there are that the kernel was not told of; gives
    /// it back if that cannot be.
    fn launch(
        &mut self,
        token: u32,
        number: usize,
        store: &Arc<dyn Store>,
        operation: Operation,
    ) -> Result<usize, Operation> {
        if self.side.flying >= DEPTH as usize {
            return Err(operation);
        }
        let Some((file, hold)) = store.ring_file(&operation) else {
            return Err(operation);
        };
        self.keep(number, store);
        self.side.launch(token, file, Flight { number, operation, hold }).map_err(|flight| {
            store.let_go(flight.hold);
            flight.operation
        })
    }

    /// Takes the ring's completions; what is not wholly done is done again by a thread.
    fn land(&mut self) {
        let UringEngine { side, threads, stores, done } = self;
        side.land(|token, Flight { number, operation, hold }, result| {
            let store = stores.get(number).and_then(Option::as_ref);
            store.inspect(|store| landed(store.as_ref(), &operation, hold));
            match (outcome(&operation, result), store) {
                (None, Some(store)) => threads.hand_over(token, store, rest(operation, result)),
                (result, _) => {
                    let result = result.unwrap_or(Err(Cause::Medium.into()));
                    done.push(Completion { token, result: Finished::Operation(result) });
                }
            }
        });
    }

    /// Whether the thread may make a call on the store of this number that may not come back: nothing of another
    /// store would be left behind with it.
    #[inline]
    pub fn may_leave(&self, number: usize) -> bool {
        self.side.flying == 0 || self.side.only == Some(number)
    }

    /// The thread that has used this engine does not come back from an operation on a store, and another goes on in
    /// its place: the operation is in flight from now on, and so is what the ring is at, which stays with the old
    /// thread. Says what that is to do when it is back.
    pub fn leave(&mut self, token: Token, store: &Arc<dyn Store>) -> Left<J> {
        let ring = match self.side.ring {
            Ring::Refused => Ring::Refused,
            Ring::Untried | Ring::Ready(_) => Ring::Untried,
        };
        let side = std::mem::replace(&mut self.side, RingSide::new(ring));
        for (slot, _) in (0..).zip(&side.flights).filter(|(_, flight)| flight.is_some()) {
            let _ = self.threads.adopt(slot, store);
        }
        let cancel = self.threads.adopt(token.0, store);
        Left { side, port: self.threads.port(), token, store: Arc::clone(store), cancel }
    }
}

/// What a thread has to finish that was left in an operation.
pub struct Left<J: Send + 'static> {
    side: RingSide,
    port: Arc<Port<J>>,
    token: Token,
    store: Arc<dyn Store>,
    cancel: Arc<Cancel>,
}

impl<J: Send + 'static> Left<J> {
    /// The operation is over with this result; or it could not be done at once, and is done now. Then everything that
    /// the old thread's ring is at.
    pub fn finish(self, operation: Operation, result: Option<Result<(), StoreError>>) {
        let Left { mut side, port, token, store, cancel } = self;
        let result = match result {
            Some(result) => result,
            None if cancel.is_requested() => Err(Cause::Cancelled.into()),
            None => operation.run(store.as_ref()),
        };
        port.post(token, Finished::Operation(result));
        while side.flying > 0 {
            side.enter(1);
            side.land(|token, Flight { operation, hold, .. }, result| {
                landed(store.as_ref(), &operation, hold);
                let done = outcome(&operation, result);
                let result = done.unwrap_or_else(|| rest(operation, result).run(store.as_ref()));
                port.post(token, Finished::Operation(result));
            });
        }
    }
}

impl RingSide {
    fn new(ring: Ring) -> Self {
        let events = [Event::default(); 2];
        RingSide { ring, flights: Vec::new(), flying: 0, only: None, events }
    }

    /// The ring, if the kernel lets us have one.
    fn ring(&mut self) -> Option<&mut IoUring> {
        if let Ring::Untried = self.ring {
            self.ring = match ready() {
                Ok(ring) => Ring::Ready(Box::new(ring)),
                Err(error) => {
                    log::info!("no io_uring here ({error}): transfers are made by threads");
                    Ring::Refused
                }
            };
        }
        match &mut self.ring {
            Ring::Ready(ring) => Some(ring),
            Ring::Untried | Ring::Refused => None,
        }
    }

    /// Puts a transfer into the ring; as [`UringEngine::launch`].
    fn launch(&mut self, token: u32, file: RingFile, mut flight: Flight) -> Result<usize, Flight> {
        let (Some(entry), Some(ring)) = (entry(file, &mut flight.operation), self.ring()) else {
            return Err(flight);
        };
        // SAFETY: the memory, and the vector of segments if there is one, belong to the operation, which stays in
        // `flights` until the kernel says it is done with it; neither moves with it. The file belongs to the store,
        // which whoever has this side keeps.
        let pushed = unsafe { ring.submission().push(&entry.user_data(token.into())) };
        if pushed.is_err() {
            return Err(flight);
        }
        let queued = ring.submission().len();
        let slot = token as usize;
        if self.flights.len() <= slot {
            self.flights.resize_with(slot + 1, || None);
        }
        let all_same = self.flying == 0 || self.only == Some(flight.number);
        self.only = all_same.then_some(flight.number);
        if let Some(place) = self.flights.get_mut(slot) {
            *place = Some(flight);
        }
        self.flying += 1;
        Ok(queued)
    }

    /// Hands over what was submitted, has the kernel finish what has ended, and waits for so many
    /// completions.
    fn enter(&mut self, wanted: u32) {
        let Ring::Ready(ring) = &mut self.ring else { return };
        let queued = u32::try_from(ring.submission().len()).unwrap_or(DEPTH);
        // SAFETY: no signal mask is given, and what is submitted stays as `launch` and `watch` say.
        let entered = unsafe {
            ring.submitter().enter::<libc::sigset_t>(queued, wanted, ENTER_GETEVENTS, None)
        };
        if let Err(error) = entered
            && error.kind() != io::ErrorKind::Interrupted
        {
            // What the kernel has not taken stays queued and is handed over with the next.
            log::debug!("io_uring: {error}");
            std::thread::yield_now();
        }
    }

    /// Has the ring look at an event.
    fn watch(&mut self, n: usize, file: Option<RawFd>) {
        let Some(event) = self.events.get_mut(n) else { return };
        let (Some(fd), Ring::Ready(ring)) = (file, &mut self.ring) else { return };
        if event.watched || event.dead {
            return;
        }
        let poll = opcode::PollAdd::new(types::Fd(fd), READABLE).multi(true).build();
        // SAFETY: no memory is involved; the ring is gone before whoever owns the event is.
        let pushed = unsafe { ring.submission().push(&poll.user_data(EVENTS + n as u64)) };
        event.watched = pushed.is_ok();
    }

    /// Takes some of the ring's completions.
    fn land(&mut self, mut each: impl FnMut(Token, Flight, i32)) {
        let Ring::Ready(ring) = &mut self.ring else { return };
        for entry in ring.completion().take(LANDED) {
            if let Some(which) = entry.user_data().checked_sub(EVENTS) {
                let event = usize::try_from(which).ok().and_then(|n| self.events.get_mut(n));
                if let Some(event) = event {
                    event.readable = true;
                    // The kernel goes on looking until it says that it does not.
                    event.watched = cqueue::more(entry.flags());
                    event.dead |= entry.result() != libc::POLLIN.into();
                }
                continue;
            }
            let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(flight) = self.flights.get_mut(slot).and_then(Option::take) else { continue };
            self.flying -= 1;
            each(Token(u32::try_from(slot).unwrap_or(u32::MAX)), flight, entry.result());
        }
    }

    fn flush(&mut self) {
        let Ring::Ready(ring) = &mut self.ring else { return };
        let queued = !ring.submission().is_empty();
        if queued || self.flying > 0 && ring.completion().is_empty() {
            self.enter(0);
        }
    }

    fn has_landed(&mut self) -> bool {
        match &mut self.ring {
            Ring::Ready(ring) => !ring.completion().is_empty(),
            Ring::Untried | Ring::Refused => false,
        }
    }
}

impl Drop for RingSide {
    /// A queue ends with nothing in flight. Should it not, the kernel must not write to memory that is
    /// somebody else's by then.
    fn drop(&mut self) {
        while self.flying > 0 {
            self.enter(1);
            self.land(|_, _, _| {});
        }
    }
}

/// The kernel is done with a transfer: what was written is there, and not yet stable.
fn landed(store: &dyn Store, operation: &Operation, hold: Hold) {
    if let (Operation::Write { .. }, Some(write_back)) = (operation, store.write_back()) {
        write_back.mark(operation.range());
    }
    store.let_go(hold);
}

/// What is left to do of a transfer. A part that was written can be seen, and written over, by now: it is not written again.
fn rest(operation: Operation, result: i32) -> Operation {
    match (operation, usize::try_from(result)) {
        (Operation::Write { offset, from, durability }, Ok(done)) if done < from.len() => {
            let from = from.slice(done, from.len() - done);
            Operation::Write { offset: offset + done as u64, from, durability }
        }
        (operation, _) => operation,
    }
}

/// What came of a transfer; `None` if it has to be done again.
fn outcome(operation: &Operation, result: i32) -> Option<Result<(), StoreError>> {
    let whole = usize::try_from(result).is_ok_and(|bytes| bytes == operation.len());
    whole.then_some(Ok(()))
}

/// Whether the kernel lets us have a ring.
pub fn is_there() -> bool {
    ready().is_ok()
}

/// A ring for this thread. A confined one may not make any, but turn one on, which then is its own.
fn ready() -> io::Result<IoUring> {
    let ring = sandbox::ask(make)??;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// A ring that is off, and restricted.
fn make() -> io::Result<IoUring> {
    // One thread submits and reaps, and is not interrupted for completions: they wait until it looks
    // (Linux 6.1). Before that, it is interrupted.
    let modern = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_r_disabled()
        .build(DEPTH);
    let ring = modern.or_else(|_| IoUring::builder().setup_r_disabled().build(DEPTH))?;
    // Events are watched by polls that stay, which came with this feature (Linux 5.13).
    if !ring.params().is_feature_resource_tagging() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    // Whoever gets hold of the ring can do no more with it than we do (Linux 5.10). What it does is not seen by
    // the filters of the sandbox.
    let operations = [
        opcode::PollAdd::CODE,
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
    ];
    let mut restrictions = operations.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut restrictions)?;
    // No file is registered: when this process is killed, a registered one stays open, and its image
    // locked, for as long as the kernel takes to clear the ring away.
    Ok(ring)
}

/// The ring's form of an operation. A single segment goes without a list of segments that the kernel would have to read.
fn entry(file: RingFile, operation: &mut Operation) -> Option<squeue::Entry> {
    let waits = if file.comes_back { libc::RWF_NOWAIT } else { 0 };
    let file = types::Fd(file.fd);
    match operation {
        Operation::Read { offset, into, medium: false } => {
            if let [one] = into.iovecs() {
                let len = u32::try_from(one.iov_len).ok()?;
                let read = opcode::Read::new(file, one.iov_base.cast(), len).offset(*offset);
                return Some(read.rw_flags(waits).build());
            }
            let segments = into.fixed_iovecs();
            let count = u32::try_from(segments.len()).ok()?;
            let read = opcode::Readv::new(file, segments.as_ptr(), count).offset(*offset);
            Some(read.rw_flags(waits).build())
        }
        Operation::Write { offset, from, durability: Durability::Cached } => {
            if let [one] = from.iovecs() {
                let len = u32::try_from(one.iov_len).ok()?;
                let write = opcode::Write::new(file, one.iov_base.cast(), len).offset(*offset);
                return Some(write.rw_flags(waits).build());
            }
            let segments = from.fixed_iovecs();
            let count = u32::try_from(segments.len()).ok()?;
            let write = opcode::Writev::new(file, segments.as_ptr(), count).offset(*offset);
            Some(write.rw_flags(waits).build())
        }
        // Of a stable write that failed nobody could tell whether it was written, and the flush has failed.
        Operation::Write { .. } | Operation::Read { .. } => None,
        Operation::Flush | Operation::Prefetch { .. } => None,
    }
}

impl<J: Send + 'static> Engine<J> for UringEngine<J> {
    fn submit(
        &mut self,
        token: Token,
        number: usize,
        store: &Arc<dyn Store>,
        operation: Operation,
    ) {
        match self.launch(token.0, number, store, operation) {
            Ok(queued) if queued >= AT_ONCE => self.side.enter(0),
            Ok(_) => {}
            Err(operation) => self.threads.hand_over(token, store, operation),
        }
    }

    fn spawn(&mut self, token: Token, store: &Arc<dyn Store>, job: Job<J>) {
        self.threads.spawn(token, store, job);
    }

    fn cancel(&mut self, token: u32) {
        // What the kernel is at goes on.
        if self.side.flights.get(token as usize).is_none_or(Option::is_none) {
            self.threads.cancel(token);
        }
    }

    fn flush(&mut self) {
        self.side.flush();
    }

    fn sleep(&mut self, events: [Option<RawFd>; 2]) -> Option<[bool; 2]> {
        let side = &mut self.side;
        let Ring::Ready(_) = &side.ring else { return None };
        for (n, event) in events.into_iter().enumerate() {
            side.watch(n, event);
        }
        // An event that was seen meanwhile may be about something that nobody has looked for since.
        if side.has_landed() || side.events.iter().any(|event| event.readable) {
            side.flush();
        } else {
            side.enter(1);
        }
        self.land();
        Some(self.side.events.each_mut().map(|event| std::mem::take(&mut event.readable)))
    }

    fn has_completions(&mut self) -> bool {
        self.side.flush();
        self.side.has_landed()
    }

    fn has_landed(&mut self) -> bool {
        self.side.has_landed()
    }

    fn completions(&mut self, into: &mut Vec<Completion<J>>) {
        self.land();
        into.append(&mut self.done);
        self.threads.completions(into);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::store::Buffers;
    use crate::store::file::{FileStore, OpenOptionsFor};
    use crate::store::mem::MemStore;

    /// Runs operations and returns what came of each, by token.
    fn run(
        engine: &mut UringEngine<()>,
        wake: &EventFd,
        operations: Vec<(Arc<dyn Store>, Operation)>,
    ) -> Vec<Result<(), StoreError>> {
        let count = operations.len();
        for (token, (store, operation)) in (0..).zip(operations) {
            engine.submit(Token(token), 0, &store, operation);
        }
        engine.flush();
        let (mut landed, mut results) = (Vec::new(), vec![None; count]);
        while results.iter().any(Option::is_none) {
            engine.completions(&mut landed);
            for completion in landed.drain(..) {
                let Finished::Operation(result) = completion.result else { panic!("a job") };
                let place = &mut results[completion.token.0 as usize];
                assert!(place.replace(result).is_none(), "completed twice");
            }
            if results.iter().any(Option::is_none)
                && engine.sleep([Some(wake.as_raw_fd()), None]).is_none()
            {
                wake.read().unwrap();
            }
        }
        results.into_iter().flatten().collect()
    }

    /// More than the ring holds, with and without O_DIRECT, some of it beyond the end of the file.
    #[test]
    fn transfers_come_back_once_and_whole() {
        for kind in [EngineKind::Auto, EngineKind::Threads] {
            for direct in [true, false] {
                let file = tempfile::NamedTempFile::new().unwrap();
                file.as_file().set_len(4 << 20).unwrap();
                let options =
                    OpenOptionsFor { read_only: false, direct, block_size: 4096, locking: true };
                let Ok(store) = FileStore::open(file.path(), &options) else { continue };
                let store: Arc<dyn Store> = Arc::new(store);
                let wake = Arc::new(EventFd::new().unwrap());
                let mut engine = UringEngine::<()>::new(Arc::clone(&wake), kind);
                // In one piece, in two, and in more than lie in a list itself.
                let block = |n: u64| {
                    let whole = Buffers::copy_of(&[n as u8; 4096]).unwrap();
                    let at = whole.iovecs()[0].iov_base.cast::<u8>();
                    let mut list = Buffers::of(Arc::new(whole));
                    let len = 4096 / [1, 2, 8][n as usize % 3];
                    for start in (0..4096).step_by(len) {
                        // SAFETY: a part of what the list's owner keeps.
                        unsafe { list.push(at.wrapping_add(start), len) };
                    }
                    list
                };
                let writes = (0..300u64).map(|n| {
                    let stable = [Durability::Cached, Durability::Stable][usize::from(n % 50 == 0)];
                    let (offset, from) = (n * 4096, block(n));
                    let write = Operation::Write { offset, from, durability: stable };
                    (Arc::clone(&store), write)
                });
                let flush = (Arc::clone(&store), Operation::Flush);
                let all = writes.chain([flush]).collect();
                assert!(run(&mut engine, &wake, all).iter().all(Result::is_ok));
                // The file is cut off in the middle: what is behind reads as zeroes.
                file.as_file().set_len(200 * 4096 + 512).unwrap();
                let into: Vec<Buffers> = (0..300).map(|_| block(99)).collect();
                let reads = (0u64..).zip(&into).map(|(n, into)| {
                    let (offset, into) = (n * 4096, into.clone());
                    (Arc::clone(&store), Operation::Read { offset, into, medium: n % 70 == 3 })
                });
                assert!(run(&mut engine, &wake, reads.collect()).iter().all(Result::is_ok));
                for (n, into) in into.iter().enumerate() {
                    let mut expected = vec![n as u8; 4096];
                    let end = (200 * 4096 + 512usize).saturating_sub(n * 4096).min(4096);
                    expected[end..].fill(0);
                    assert!(into.to_vec(4096) == expected, "{kind:?}, direct {direct}: block {n}");
                }
            }
        }
    }

    /// What its thread has left, and could not do at once, is not done any more if it was to end meanwhile.
    #[test]
    fn what_was_left_can_be_ended() {
        for ends in [false, true] {
            let store: Arc<dyn Store> = Arc::new(MemStore::new(4096));
            let wake = Arc::new(EventFd::new().unwrap());
            let mut engine = UringEngine::<()>::new(Arc::clone(&wake), EngineKind::Threads);
            let left = engine.leave(Token(3), &store);
            if ends {
                engine.cancel(3);
            }
            let from = Buffers::copy_of(&[7; 512]).unwrap();
            let write = Operation::Write { offset: 0, from, durability: Durability::Cached };
            left.finish(write, None);
            let mut done = Vec::new();
            engine.completions(&mut done);
            let expected = if ends { Err(Cause::Cancelled.into()) } else { Ok(()) };
            assert!(done.len() == 1 && done[0].token == Token(3));
            assert!(matches!(&done[0].result, Finished::Operation(result) if *result == expected));
            let found = Buffers::zeroed(512).unwrap();
            store.read(0, &found).unwrap();
            assert_eq!(found.to_vec(512), [if ends { 0 } else { 7 }; 512]);
        }
    }

    #[test]
    fn a_ring_does_nothing_else() {
        let Ok(mut ring) = ready() else { return };
        let entry = opcode::Fsync::new(types::Fd(2)).build();
        // SAFETY: it refers to no memory.
        unsafe { ring.submission().push(&entry).unwrap() };
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
        assert!(ring.submitter().register_files(&[2]).is_err());
    }

    #[test]
    fn a_part_of_a_transfer_is_done_again() {
        let into = Buffers::zeroed(512).unwrap();
        let read = Operation::Read { offset: 0, into, medium: false };
        assert_eq!(outcome(&read, 512), Some(Ok(())));
        assert_eq!((outcome(&read, 511), outcome(&read, -libc::EIO)), (None, None));
        // A part of a read is read again, and of a write what is left.
        assert_eq!(rest(read, 511).range(), 0..512);
        let write = |result| {
            let from = Buffers::zeroed(8192).unwrap();
            rest(Operation::Write { offset: 512, from, durability: Durability::Cached }, result)
        };
        assert_eq!(write(4096).range(), 4608..8704);
        assert_eq!(write(-libc::EAGAIN).range(), 512..8704);
    }

    /// A flush that ends while a write is in the ring has not covered it: the next one knows that there is something.
    #[test]
    fn a_write_in_the_ring_is_for_the_flush_after_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options =
            OpenOptionsFor { read_only: false, direct: true, block_size: 4096, locking: true };
        let write = || {
            let from = Buffers::copy_of(&[7; 4096]).unwrap();
            Operation::Write { offset: 0, from, durability: Durability::Cached }
        };
        let store = FileStore::open(file.path(), &options).ok();
        let Some(store) =
            store.filter(|store| ready().is_ok() && store.ring_file(&write()).is_some())
        else {
            return eprintln!("NOT PROVED: no writes by io_uring here");
        };
        let store: Arc<dyn Store> = Arc::new(store);
        // A write to a hole would wait, and be made by a thread.
        let first = Buffers::copy_of(&[1; 4096]).unwrap();
        store.write(0, &first, Durability::Stable).unwrap();
        let has_something = || {
            let told = Cell::new(false);
            let flush = |some| {
                told.set(some);
                Ok(())
            };
            store.write_back().unwrap().flush(flush).unwrap();
            told.get()
        };
        let wake = Arc::new(EventFd::new().unwrap());
        let mut engine = UringEngine::<()>::new(Arc::clone(&wake), EngineKind::Auto);
        engine.submit(Token(0), 0, &store, write());
        engine.flush();
        // One that is over before the write is.
        has_something();
        let mut landed = Vec::new();
        while landed.is_empty() {
            if engine.sleep([Some(wake.as_raw_fd()), None]).is_none() {
                wake.read().unwrap();
            }
            engine.completions(&mut landed);
        }
        assert!(has_something() && !has_something());
    }
}
