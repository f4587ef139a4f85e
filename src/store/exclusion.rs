//! Atomicity against everybody else: a store around a store, in which a few commands (COMPARE AND WRITE and its
//! like) have a range for themselves for as long as several steps take.
//!
//! Hardly any disk ever gets such a command. So until the first one comes, an operation is only counted, in a
//! counter that its thread shares with few others; from then on each is entered in a list with its range, and waits
//! for whoever has the range for himself. The first of them waits for the end of what was only counted.

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::copy::Method;
use super::engine::Cancel;
use super::{
    Buffers, Capabilities, Cause, Durability, Extent, Notes, Operation, Pool, RingFile, Snapshot,
    Space, Store, StoreError,
};

/// How often one that waits looks whether it is to go on waiting.
const LOOK: Duration = Duration::from_millis(20);

/// Places to count in.
pub const PLACES: usize = 16;

/// A counter that has its cache lines for itself.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

/// An operation under way, until it is given back.
#[derive(Debug)]
#[must_use = "an operation under way must be ended"]
pub struct Hold(How);

#[derive(Debug)]
enum How {
    /// Nobody looks at it.
    Free,
    /// In this counter.
    Counted(usize),
    /// Under this number.
    Listed(u64),
}

impl Hold {
    /// Of a store in which nobody ever is alone.
    pub const FREE: Self = Hold(How::Free);
}

/// Two ranges: a copy within a store reads one and writes the other.
type Ranges = [Range<u64>; 2];

const NOTHING: Range<u64> = 0..0;

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[derive(Debug, Default)]
struct State {
    /// Operations under way.
    shared: Vec<(u64, Ranges)>,
    next: u64,
    /// Ranges that somebody has, or is about to have, for himself.
    alone: Vec<Range<u64>>,
}

impl State {
    fn is_taken(&self, ranges: &Ranges) -> bool {
        self.alone.iter().any(|alone| ranges.iter().any(|range| overlap(alone, range)))
    }

    fn is_used(&self, range: &Range<u64>) -> bool {
        self.shared.iter().any(|(_, ranges)| ranges.iter().any(|other| overlap(range, other)))
    }
}

/// A store in which a range can be had alone.
pub struct Exclusion {
    store: Arc<dyn Store>,
    /// Operations are listed, no longer counted.
    lists: AtomicBool,
    counters: [Counter; PLACES],
    state: Mutex<State>,
    changed: Condvar,
}

/// The place in which this thread counts: it is always the same.
#[inline]
pub fn own_place() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static OWN: Cell<usize> = const { Cell::new(PLACES) });
    OWN.with(|own| match own.get() {
        PLACES => {
            own.set(NEXT.fetch_add(1, Ordering::Relaxed) % PLACES);
            own.get()
        }
        place => place,
    })
}

impl Exclusion {
    /// Around a store.
    pub fn around(store: Arc<dyn Store>) -> Self {
        Exclusion {
            store,
            lists: AtomicBool::new(false),
            counters: Default::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an operation is under way, as far as that can be seen without waiting.
    pub fn is_in_use(&self) -> bool {
        let counted = self.counters.iter().any(|c| c.0.load(Ordering::SeqCst) > 0);
        counted || !self.state().shared.is_empty()
    }

    fn count(&self, counter: usize) -> Option<&AtomicUsize> {
        self.counters.get(counter).map(|c| &c.0)
    }

    /// Counts an operation, as long as that is enough.
    #[inline]
    fn count_in(&self) -> Option<&AtomicUsize> {
        let count = &self.counters.get(own_place())?.0;
        // Either this thread sees below that lists are kept, or who keeps them sees the count: both are
        // sequentially consistent.
        count.fetch_add(1, Ordering::SeqCst);
        if !self.lists.load(Ordering::SeqCst) {
            return Some(count);
        }
        count.fetch_sub(1, Ordering::SeqCst);
        None
    }

    /// Enters an operation if nobody has to be waited for.
    fn enter_now(&self, ranges: &Ranges) -> Option<Hold> {
        if self.count_in().is_some() {
            return Some(Hold(How::Counted(own_place())));
        }
        self.enter_list(ranges)
    }

    #[cold]
    fn enter_list(&self, ranges: &Ranges) -> Option<Hold> {
        let mut state = self.state();
        if state.is_taken(ranges) {
            return None;
        }
        let number = state.next;
        state.next += 1;
        state.shared.push((number, ranges.clone()));
        Some(Hold(How::Listed(number)))
    }

    fn enter(&self, ranges: &Ranges) -> Hold {
        loop {
            if let Some(hold) = self.enter_now(ranges) {
                return hold;
            }
            let state = self.state();
            if state.is_taken(ranges) {
                drop(self.changed.wait_timeout(state, LOOK));
            }
        }
    }

    fn leave(&self, hold: &Hold) {
        match hold.0 {
            How::Free => {}
            How::Counted(counter) => {
                if let Some(count) = self.count(counter) {
                    count.fetch_sub(1, Ordering::Release);
                }
            }
            How::Listed(number) => {
                let mut state = self.state();
                state.shared.retain(|(other, _)| *other != number);
                if !state.alone.is_empty() {
                    self.changed.notify_all();
                }
            }
        }
    }

    /// Does something blocking while nobody is alone with these ranges.
    fn shared<T>(&self, ranges: &Ranges, work: impl FnOnce() -> T) -> T {
        let hold = self.enter(ranges);
        let result = work();
        self.leave(&hold);
        result
    }

    /// Does something with a range that no other operation reads or changes meanwhile: `work` gets the store that is
    /// for it alone.
    ///
    /// # Errors
    /// [`Cause::Cancelled`] if it was told to end while it waited, and those of `work`.
    pub fn alone<T, E: From<StoreError>>(
        &self,
        range: Range<u64>,
        cancel: &Cancel,
        work: impl FnOnce(&dyn Store) -> Result<T, E>,
    ) -> Result<T, E> {
        self.lists.store(true, Ordering::SeqCst);
        let go_on = || match cancel.is_requested() {
            true => Err(E::from(Cause::Cancelled.into())),
            false => Ok(()),
        };
        while self.counters.iter().any(|count| count.0.load(Ordering::SeqCst) != 0) {
            go_on()?;
            std::thread::sleep(Duration::from_micros(50));
        }
        let both = [range.clone(), NOTHING];
        let mut state = self.state();
        while state.is_taken(&both) {
            go_on()?;
            state = self.wait(state);
        }
        // From here on newcomers wait, so that it gets its turn.
        state.alone.push(range.clone());
        let mine = Mine { exclusion: self, range };
        while state.is_used(&mine.range) {
            if let Err(error) = go_on() {
                drop(state);
                return Err(error);
            }
            state = self.wait(state);
        }
        drop(state);
        work(self.store.as_ref())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A range that somebody has for himself.
struct Mine<'a> {
    exclusion: &'a Exclusion,
    range: Range<u64>,
}

impl Drop for Mine<'_> {
    fn drop(&mut self) {
        let mut state = self.exclusion.state();
        if let Some(at) = state.alone.iter().position(|range| *range == self.range) {
            state.alone.swap_remove(at);
        }
        self.exclusion.changed.notify_all();
    }
}

fn at(offset: u64, len: usize) -> Ranges {
    [offset..offset.saturating_add(len as u64), NOTHING]
}

/// What an operation touches.
fn ranges_of(operation: &Operation) -> Ranges {
    match operation {
        Operation::Read { offset, .. } | Operation::Write { offset, .. } => {
            at(*offset, operation.len())
        }
        Operation::Flush | Operation::Prefetch { .. } => [NOTHING, NOTHING],
    }
}

impl Store for Exclusion {
    fn capabilities(&self) -> &Capabilities {
        self.store.capabilities()
    }

    fn size(&self) -> Result<u64, StoreError> {
        self.store.size()
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.shared(&at(offset, into.len()), || self.store.read(offset, into))
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.shared(&at(offset, into.len()), || self.store.read_medium(offset, into))
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError> {
        self.shared(&at(offset, from.len()), || self.store.write(offset, from, durability))
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.shared(&at(offset, from.len()), || self.store.write_whole(offset, from))
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.store.flush()
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.store.prefetch(offset, len)
    }

    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
        self.store.extents(range, limit)
    }

    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.shared(&[range.clone(), NOTHING], || self.store.deallocate(range))
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.shared(&[range.clone(), NOTHING], || self.store.reserve(range))
    }

    fn try_now(&self, operation: &Operation) -> Option<Result<(), StoreError>> {
        if let Some(count) = self.count_in() {
            let done = self.store.try_now(operation);
            count.fetch_sub(1, Ordering::Release);
            return done;
        }
        let hold = self.enter_list(&ranges_of(operation))?;
        let done = self.store.try_now(operation);
        self.leave(&hold);
        done
    }

    fn ring_file(&self, operation: &Operation) -> Option<(RingFile, Hold)> {
        let (file, _) = self.store.ring_file(operation)?;
        Some((file, self.enter_now(&ranges_of(operation))?))
    }

    fn ring_done(&self, hold: Hold) {
        self.leave(&hold);
    }

    fn file(&self) -> Option<&File> {
        self.store.file()
    }

    fn take(
        &self,
        from: &File,
        source: u64,
        at: u64,
        len: u64,
        how: Method,
    ) -> Result<Option<u64>, StoreError> {
        let own = self.store.file().is_some_and(|file| std::ptr::eq(file, from));
        let read = if own { source..source.saturating_add(len) } else { NOTHING };
        self.shared(&[at..at.saturating_add(len), read], || {
            self.store.take(from, source, at, len, how)
        })
    }

    fn steady(&self, range: Range<u64>, work: &mut dyn FnMut()) {
        self.shared(&[range, NOTHING], work);
    }

    fn snapshot(&self, ranges: &[Range<u64>]) -> Result<Option<Snapshot>, StoreError> {
        let start = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        self.shared(&[start..end, NOTHING], || self.store.snapshot(ranges))
    }

    fn space(&self) -> Result<Option<Space>, StoreError> {
        self.store.space()
    }

    fn notes(&self) -> &Notes {
        self.store.notes()
    }

    fn take_over(&self, go_on: &dyn Fn() -> bool) -> Result<(), StoreError> {
        self.store.take_over(go_on)
    }

    fn pool(&self) -> &Pool {
        self.store.pool()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;

    fn exclusion() -> Exclusion {
        Exclusion::around(Arc::new(MemStore::new(1 << 20)))
    }

    fn number(store: &dyn Store, offset: u64) -> u64 {
        let bytes = Buffers::zeroed(8).unwrap();
        store.read(offset, &bytes).unwrap();
        u64::from_be_bytes(bytes.to_vec(8).try_into().unwrap())
    }

    fn set(store: &dyn Store, offset: u64, number: u64) {
        let bytes = Buffers::copy_of(&number.to_be_bytes()).unwrap();
        store.write(offset, &bytes, Durability::Cached).unwrap();
    }

    #[test]
    fn steps_alone_are_one() {
        let store = exclusion();
        let alone = |offset: u64| {
            let done = store.alone(offset..offset + 8, &Cancel::default(), |store| {
                let before = number(store, offset);
                std::thread::yield_now();
                set(store, offset, before + 1);
                Ok::<_, StoreError>(())
            });
            done.unwrap();
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|n| alone(n % 2 * 8)));
                scope.spawn(|| (0..500).map(|_| number(&store, 4)).max());
            }
        });
        assert_eq!((number(&store, 0), number(&store, 8)), (1000, 1000));
        assert!(store.state().shared.is_empty() && store.state().alone.is_empty());
    }

    #[test]
    fn what_is_under_way_ends_first_and_nothing_overtakes() {
        let store = exclusion();
        let read = Operation::Read { offset: 0, into: Buffers::zeroed(8).unwrap(), medium: false };
        let before = store.enter_now(&ranges_of(&read)).unwrap();
        std::thread::scope(|scope| {
            let alone = scope.spawn(|| {
                store.alone(0..8, &Cancel::default(), |store| {
                    set(store, 0, 7);
                    Ok::<_, StoreError>(())
                })
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(!alone.is_finished());
            store.leave(&before);
            alone.join().unwrap().unwrap();
        });
        let before = store.enter_now(&ranges_of(&read)).unwrap();
        let cancel = Cancel::default();
        std::thread::scope(|scope| {
            let alone = scope.spawn(|| store.alone(0..8, &cancel, |_| Ok::<_, StoreError>(())));
            while store.state().alone.is_empty() {
                std::thread::yield_now();
            }
            assert!(store.try_now(&read).is_none(), "a newcomer waits");
            assert!(store.enter_now(&at(8, 8)).is_some_and(|hold| {
                store.leave(&hold);
                true
            }));
            cancel.request();
            assert_eq!(alone.join().unwrap(), Err(Cause::Cancelled.into()));
        });
        store.leave(&before);
        assert_eq!(number(&store, 0), 7);
    }
}
