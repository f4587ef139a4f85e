//! Atomicity against everybody else: a store around a store, in which a few commands (COMPARE AND WRITE and its
//! like) have a range for themselves for as long as several steps take.
//!
//! Hardly any disk ever gets such a command. So until the first one comes, an operation is only counted, in a
//! counter that its thread shares with few others; from then on each is entered in a list with its range, and waits
//! for whoever has the range for himself. The first of them waits for the end of what was only counted.
//!
//! Who waits does so in a list, in the order they came, and is begun by whoever lets go of what is in the way: it takes no
//! thread ([`Store::hold`]). Only the methods that read and change the store wait where they are called: for those who have
//! a thread of their own, and nothing of any disk while they wait.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use super::copy::{CopyError, Method};
use super::{
    Buffers, Capabilities, Durability, Extent, Kind, Notes, Operation, Pool, RingFile, Snapshot,
    Space, Store, StoreError, WriteBack,
};

/// Places to count in.
pub const PLACES: usize = 16;

/// A counter that has its cache lines for itself.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

/// What somebody has of a store, until it is given back ([`Store::let_go`]).
#[derive(Debug)]
#[must_use = "what is held must be let go of"]
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

/// How ranges are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With others, but not with one who is alone.
    Together,
    /// With nobody.
    Alone,
}

/// What is done with ranges once they are held.
pub type Granted = Box<dyn FnOnce(Hold) + Send>;

/// What becomes of one who wants ranges.
pub enum Wanted {
    /// He has them.
    Had(Hold, Granted),
    /// He waits, under this number.
    Waits(u64),
}

/// A store with what is held of it, which is let go of with this value.
pub struct Held {
    store: Arc<dyn Store>,
    hold: Option<Hold>,
}

impl Held {
    /// Something is held of the store.
    pub fn new(store: Arc<dyn Store>, hold: Hold) -> Self {
        Held { store, hold: Some(hold) }
    }

    /// Nothing is.
    pub fn nothing(store: Arc<dyn Store>) -> Self {
        Held { store, hold: None }
    }

    /// The store, as whoever holds this may use it: in the ranges that are held, nobody is waited for.
    pub fn store(&self) -> &dyn Store {
        match self.hold {
            Some(_) => self.store.behind().unwrap_or(self.store.as_ref()),
            None => self.store.as_ref(),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            self.store.let_go(hold);
        }
    }
}

const NOTHING: Range<u64> = 0..0;

/// Ranges in use, each with the number of whoever uses it.
type Used = Vec<(u64, Range<u64>)>;

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

fn meets(used: &[(u64, Range<u64>)], ranges: &[Range<u64>]) -> bool {
    used.iter().any(|(_, used)| ranges.iter().any(|range| overlap(used, range)))
}

/// One who waits.
struct Waiting {
    number: u64,
    mode: Mode,
    ranges: Vec<Range<u64>>,
    granted: Granted,
}

#[derive(Default)]
struct State {
    next: u64,
    together: Used,
    alone: Used,
    /// In the order they came.
    waiting: VecDeque<Waiting>,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whether nobody is in the way who has the ranges or has waited longer. `drained`: nobody is only counted.
    fn is_free(&self, mode: Mode, ranges: &[Range<u64>], drained: bool) -> bool {
        let together = mode == Mode::Together;
        let overtakes = |waiting: &Waiting| {
            (waiting.mode == Mode::Alone || !together)
                && waiting.ranges.iter().any(|a| ranges.iter().any(|b| overlap(a, b)))
        };
        (together || drained && !meets(&self.together, ranges))
            && !meets(&self.alone, ranges)
            && !self.waiting.iter().any(overtakes)
    }

    fn enter(&mut self, number: u64, mode: Mode, ranges: &[Range<u64>]) -> Hold {
        let used = match mode {
            Mode::Together => &mut self.together,
            Mode::Alone => &mut self.alone,
        };
        let entries = ranges.iter().filter(|range| !range.is_empty());
        used.extend(entries.map(|range| (number, range.clone())));
        Hold(How::Listed(number))
    }

    /// Those who wait no longer.
    fn grant(&mut self, drained: bool) -> Vec<(Hold, Granted)> {
        let mut granted = Vec::new();
        for one in std::mem::take(&mut self.waiting) {
            // In the list by now are those who came before him and wait on.
            if self.is_free(one.mode, &one.ranges, drained) {
                granted.push((self.enter(one.number, one.mode, &one.ranges), one.granted));
            } else {
                self.waiting.push_back(one);
            }
        }
        granted
    }
}

/// A store in which a range can be had alone.
pub struct Exclusion {
    store: Arc<dyn Store>,
    /// Operations are listed, no longer counted.
    lists: AtomicBool,
    /// And none is left that was counted.
    drained: AtomicBool,
    counters: [Counter; PLACES],
    state: Mutex<State>,
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
            drained: AtomicBool::new(false),
            counters: Default::default(),
            state: Mutex::default(),
        }
    }

    /// The store itself: for those to whom it is all the same what others do to it meanwhile.
    pub fn unguarded(&self) -> &dyn Store {
        self.store.as_ref()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an operation is under way, as far as that can be seen without waiting.
    pub fn is_in_use(&self) -> bool {
        let counted = self.counters.iter().any(|c| c.0.load(Ordering::SeqCst) > 0);
        let state = self.state();
        counted || !state.together.is_empty() || !state.alone.is_empty()
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
        self.count_out(count);
        None
    }

    #[inline]
    fn count_out(&self, count: &AtomicUsize) {
        count.fetch_sub(1, Ordering::SeqCst);
        // As above: this thread sees that lists are kept, or who keeps them does not see the count any more.
        if self.lists.load(Ordering::SeqCst) && !self.drained.load(Ordering::Relaxed) {
            self.grant(self.state());
        }
    }

    /// Whether nobody is left who was only counted, once lists are kept: nobody is counted any more.
    fn is_drained(&self) -> bool {
        let drained = self.drained.load(Ordering::Relaxed)
            || self.counters.iter().all(|count| count.0.load(Ordering::SeqCst) == 0);
        if drained {
            self.drained.store(true, Ordering::Relaxed);
        }
        drained
    }

    /// Begins what no longer has to wait.
    #[cold]
    fn grant(&self, mut state: MutexGuard<'_, State>) {
        if state.waiting.is_empty() {
            return;
        }
        let all = state.grant(self.is_drained());
        drop(state);
        for (hold, granted) in all {
            granted(hold);
        }
    }

    #[cold]
    fn enter_list(&self, ranges: &[Range<u64>]) -> Option<Hold> {
        let mut state = self.state();
        if !state.is_free(Mode::Together, ranges, false) {
            return None;
        }
        let number = state.number();
        Some(state.enter(number, Mode::Together, ranges))
    }

    /// Does something blocking while nobody is alone with these ranges.
    fn shared<T>(&self, ranges: &[Range<u64>], work: impl FnOnce() -> T) -> T {
        let hold = self.hold_now(ranges).unwrap_or_else(|| {
            let (had, waits) = mpsc::channel();
            let granted: Granted = Box::new(move |hold| drop(had.send(hold)));
            match self.hold(Mode::Together, ranges, granted) {
                Wanted::Had(hold, _) => hold,
                // Nobody else has the number, so that it is granted.
                Wanted::Waits(_) => waits.recv().unwrap_or(Hold::FREE),
            }
        });
        let result = work();
        self.let_go(hold);
        result
    }
}

fn at(offset: u64, len: usize) -> Range<u64> {
    offset..offset.saturating_add(len as u64)
}

impl Store for Exclusion {
    fn capabilities(&self) -> &Capabilities {
        self.store.capabilities()
    }

    fn size(&self) -> Result<u64, StoreError> {
        self.store.size()
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&at(offset, into.len())), || self.store.read(offset, into))
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&at(offset, into.len())), || {
            self.store.read_medium(offset, into)
        })
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&at(offset, from.len())), || {
            self.store.write(offset, from, durability)
        })
    }

    fn overwrite(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&at(offset, from.len())), || self.store.overwrite(offset, from))
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&at(offset, from.len())), || {
            self.store.write_whole(offset, from)
        })
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.store.flush()
    }

    fn write_back(&self) -> Option<&Arc<WriteBack>> {
        self.store.write_back()
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.store.prefetch(offset, len)
    }

    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
        self.store.extents(range, limit)
    }

    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&range), || self.store.deallocate(range.clone()))
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.shared(slice::from_ref(&range), || self.store.reserve(range.clone()))
    }

    fn zeroes_at_a_time(&self, into: Kind) -> u64 {
        self.store.zeroes_at_a_time(into)
    }

    fn try_now(&self, operation: &Operation) -> Option<Result<(), StoreError>> {
        if let Some(count) = self.count_in() {
            let done = self.store.try_now(operation);
            self.count_out(count);
            return done;
        }
        let hold = self.enter_list(&[operation.range()])?;
        let done = self.store.try_now(operation);
        self.let_go(hold);
        done
    }

    fn ring_file(&self, operation: &Operation) -> Option<(RingFile, Hold)> {
        let (file, _) = self.store.ring_file(operation)?;
        Some((file, self.hold_now(&[operation.range()])?))
    }

    fn hold_now(&self, ranges: &[Range<u64>]) -> Option<Hold> {
        match self.count_in() {
            Some(_) => Some(Hold(How::Counted(own_place()))),
            None => self.enter_list(ranges),
        }
    }

    fn hold(&self, mode: Mode, ranges: &[Range<u64>], granted: Granted) -> Wanted {
        if mode == Mode::Together
            && let Some(hold) = self.hold_now(ranges)
        {
            return Wanted::Had(hold, granted);
        }
        self.lists.store(true, Ordering::SeqCst);
        let mut state = self.state();
        let number = state.number();
        if state.is_free(mode, ranges, self.is_drained()) {
            return Wanted::Had(state.enter(number, mode, ranges), granted);
        }
        state.waiting.push_back(Waiting { number, mode, ranges: ranges.to_vec(), granted });
        Wanted::Waits(number)
    }

    fn stop_waiting(&self, number: u64) -> Option<Granted> {
        let mut state = self.state();
        let at = state.waiting.iter().position(|waiting| waiting.number == number)?;
        let stopped = state.waiting.remove(at);
        // Others may have waited for him only.
        self.grant(state);
        stopped.map(|waiting| waiting.granted)
    }

    fn let_go(&self, hold: Hold) {
        match hold.0 {
            How::Free => {}
            How::Counted(place) => {
                if let Some(count) = self.counters.get(place) {
                    self.count_out(&count.0);
                }
            }
            How::Listed(number) => {
                let mut state = self.state();
                state.together.retain(|(other, _)| *other != number);
                state.alone.retain(|(other, _)| *other != number);
                self.grant(state);
            }
        }
    }

    fn behind(&self) -> Option<&dyn Store> {
        Some(self.store.as_ref())
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

    fn snapshot(
        &self,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>, CopyError> {
        self.shared(ranges, || self.store.snapshot(ranges, go_on))
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
    use std::time::Duration;

    use super::*;
    use crate::store::faults::Faults;
    use crate::store::file::{FileStore, OpenOptionsFor};
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

    /// Does something alone with a range, when that can be.
    fn alone(store: &Exclusion, range: Range<u64>, work: impl FnOnce(&dyn Store)) {
        let (had, waits) = mpsc::channel();
        let granted: Granted = Box::new(move |hold| had.send(hold).unwrap());
        let hold = match store.hold(Mode::Alone, &[range], granted) {
            Wanted::Had(hold, _) => hold,
            Wanted::Waits(_) => waits.recv().unwrap(),
        };
        work(store.unguarded());
        store.let_go(hold);
    }

    /// Who has been granted what he waited for, and with what.
    type Log = Arc<Mutex<Vec<(char, Hold)>>>;

    fn want(store: &Exclusion, log: &Log, who: char, mode: Mode, range: Range<u64>) -> u64 {
        let of_thread = Arc::clone(log);
        let granted: Granted = Box::new(move |hold| of_thread.lock().unwrap().push((who, hold)));
        match store.hold(mode, &[range], granted) {
            Wanted::Had(hold, granted) => {
                granted(hold);
                0
            }
            Wanted::Waits(number) => number,
        }
    }

    fn names(log: &Log) -> String {
        log.lock().unwrap().iter().map(|(who, _)| who).collect()
    }

    fn end(store: &Exclusion, log: &Log, who: char) {
        let mut all = log.lock().unwrap();
        let at = all.iter().position(|(other, _)| *other == who).unwrap();
        let (_, hold) = all.swap_remove(at);
        drop(all);
        store.let_go(hold);
    }

    fn is_idle(store: &Exclusion) -> bool {
        let state = store.state();
        let counted = store.counters.iter().any(|count| count.0.load(Ordering::SeqCst) > 0);
        let used = state.together.len() + state.alone.len() + state.waiting.len();
        !counted && used == 0
    }

    #[test]
    fn steps_alone_are_one() {
        let store = exclusion();
        let add = |offset: u64| {
            alone(&store, offset..offset + 8, |store| {
                let before = number(store, offset);
                std::thread::yield_now();
                set(store, offset, before + 1);
            });
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|n| add(n % 2 * 8)));
                scope.spawn(|| (0..500).map(|_| number(&store, 4)).max());
            }
        });
        assert_eq!((number(&store, 0), number(&store, 8)), (1000, 1000));
        assert!(is_idle(&store));
    }

    /// The first who wants to be alone waits for those who were only counted, wherever they are, and the last of them
    /// lets him begin.
    #[test]
    fn what_is_only_counted_ends_first() {
        for ends_listed in [false, true] {
            let (store, log) = (exclusion(), Log::default());
            let hold = |at: u64| store.hold_now(slice::from_ref(&(at..at + 8))).unwrap();
            let elsewhere = std::thread::scope(|scope| scope.spawn(|| hold(8)).join().unwrap());
            let holds = [hold(0), elsewhere];
            want(&store, &log, 'a', Mode::Alone, 512..520);
            let read =
                Operation::Read { offset: 512, into: Buffers::zeroed(8).unwrap(), medium: false };
            assert!(store.try_now(&read).is_none(), "a newcomer does not overtake");
            let listed = store.hold_now(slice::from_ref(&(0..8))).unwrap();
            for hold in holds {
                assert_eq!(names(&log), "");
                store.let_go(hold);
            }
            assert_eq!(names(&log), "a");
            if ends_listed {
                store.let_go(listed);
                end(&store, &log, 'a');
            } else {
                end(&store, &log, 'a');
                store.let_go(listed);
            }
            assert!(is_idle(&store));
        }
    }

    #[test]
    fn ranges_are_had_in_the_order_they_were_asked_for() {
        use Mode::{Alone, Together};
        let (store, log) = (exclusion(), Log::default());
        let want = |who, mode, range| want(&store, &log, who, mode, range);
        let end = |who| end(&store, &log, who);
        want('a', Alone, 0..8);
        want('b', Together, 0..4);
        want('c', Together, 4..8);
        want('d', Alone, 4..12);
        want('e', Together, 8..12);
        want('f', Together, 2..4);
        want('g', Alone, 12..16);
        assert_eq!(names(&log), "ag", "the rest waits, `e` for one who waits himself");
        assert!(
            store.hold_now(slice::from_ref(&(0..1))).is_none()
                && store.hold_now(slice::from_ref(&(9..10))).is_none()
        );
        end('a');
        assert_eq!(names(&log), "gbcf");
        end('b');
        assert_eq!(names(&log), "gfc");
        end('c');
        assert_eq!(names(&log), "gfd");
        end('d');
        assert_eq!(names(&log), "gfe");
        "gfe".chars().for_each(end);
        assert!(is_idle(&store));
    }

    /// Of those who can be together none waits for another, nor for one who waits.
    #[test]
    fn those_who_can_be_together_overtake_each_other() {
        let (store, log) = (exclusion(), Log::default());
        want(&store, &log, 'a', Mode::Alone, 0..8);
        want(&store, &log, 'b', Mode::Together, 4..12);
        want(&store, &log, 'c', Mode::Together, 8..16);
        assert_eq!(names(&log), "ac");
        "ac".chars().for_each(|who| end(&store, &log, who));
        assert_eq!(names(&log), "b");
        end(&store, &log, 'b');
        assert!(is_idle(&store));
    }

    /// Who ends gives back what he has, and nothing of others.
    #[test]
    fn each_holds_until_it_ends_itself() {
        let (store, log) = (exclusion(), Log::default());
        alone(&store, 512..520, |_| {});
        want(&store, &log, 'a', Mode::Together, 0..8);
        want(&store, &log, 'b', Mode::Together, 0..8);
        want(&store, &log, 'c', Mode::Alone, 4..8);
        for (who, next) in [('b', "a"), ('a', "c"), ('c', "")] {
            assert!(store.is_in_use());
            end(&store, &log, who);
            assert_eq!(names(&log), next);
        }
        assert!(is_idle(&store) && !store.is_in_use());
    }

    /// All that reads or changes the store, called without a hold, waits for whoever is alone where it reads or writes.
    #[test]
    fn every_method_waits_for_one_who_is_alone() {
        type Call = fn(&Exclusion);
        let calls: [(&str, Call); 9] = [
            ("read", |store| store.read(4, &Buffers::zeroed(8).unwrap()).unwrap()),
            ("read_medium", |store| store.read_medium(4, &Buffers::zeroed(8).unwrap()).unwrap()),
            ("write", |store| set(store, 4, 1)),
            ("overwrite", |store| store.overwrite(0, &Buffers::zeroed(8).unwrap()).unwrap()),
            ("write_whole", |store| store.write_whole(0, &Buffers::zeroed(512).unwrap()).unwrap()),
            ("deallocate", |store| store.deallocate(0..4096).unwrap()),
            ("reserve", |store| store.reserve(0..4096).unwrap()),
            ("snapshot", |store| drop(store.snapshot(&[0..4096, 8192..8200], &mut |_| true))),
            ("take", |store| {
                let _ = store.take(store.file().unwrap(), 0, 8192, 4096, Method::Offload);
            }),
        ];
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let plain =
            OpenOptionsFor { read_only: false, direct: false, block_size: 512, locking: false };
        for (name, call) in calls {
            let of_file = Arc::new(FileStore::open(file.path(), &plain).unwrap());
            let (store, log) = (Arc::new(Exclusion::around(of_file)), Log::default());
            want(&store, &log, 'a', Mode::Alone, 0..8);
            let of_thread = Arc::clone(&store);
            let thread = std::thread::spawn(move || call(&of_thread));
            while store.state().waiting.is_empty() {
                assert!(!thread.is_finished(), "{name} did not wait");
                std::thread::yield_now();
            }
            end(&store, &log, 'a');
            thread.join().unwrap();
            assert!(is_idle(&store), "{name}");
        }
    }

    /// What is under way has its range until it is over: nothing changes there any more for one who is alone.
    #[test]
    fn nothing_changes_for_one_who_is_alone() {
        // In memory, where a write can always be made at once.
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let plain =
            OpenOptionsFor { read_only: false, direct: false, block_size: 512, locking: false };
        let write = |store: &Exclusion| set(store, 0, 1);
        let try_now = |store: &Exclusion| {
            let from = Buffers::copy_of(&1u64.to_be_bytes()).unwrap();
            let write = Operation::Write { offset: 0, from, durability: Durability::Cached };
            // `None` if the range is another's.
            let _ = store.try_now(&write);
        };
        for call in [write as fn(&Exclusion), try_now] {
            file.as_file().set_len(0).unwrap();
            file.as_file().set_len(4096).unwrap();
            let of_file = FileStore::open(file.path(), &plain).unwrap();
            let slow = Faults::new(of_file, vec!["write:stall-ms-300".parse().unwrap()]);
            let store = Arc::new(Exclusion::around(Arc::new(slow)));
            // From now on each is listed.
            alone(&store, 512..520, |_| {});
            let of_thread = Arc::clone(&store);
            let thread = std::thread::spawn(move || call(&of_thread));
            std::thread::sleep(Duration::from_millis(50));
            alone(&store, 0..8, |store| {
                let before = number(store, 0);
                std::thread::sleep(Duration::from_millis(500));
                assert_eq!(number(store, 0), before);
            });
            thread.join().unwrap();
            assert!(is_idle(&store));
        }
    }

    /// One begins as one who is only counted while the first comes who wants to be alone: whoever is second sees the other.
    #[test]
    fn the_first_who_is_alone_meets_nobody() {
        const ROUNDS: usize = 5_000;
        let store: Arc<dyn Store> = Arc::new(MemStore::new(512));
        let all: Vec<_> = (0..ROUNDS).map(|_| Exclusion::around(Arc::clone(&store))).collect();
        let inside: Vec<_> = (0..ROUNDS).map(|_| AtomicUsize::new(0)).collect();
        let arrived: Vec<_> = (0..ROUNDS).map(|_| AtomicUsize::new(0)).collect();
        let met = AtomicUsize::new(0);
        // Both begin each round as nearly together as can be, the one or the other a little later.
        let begin = |round: usize, later: usize| {
            arrived[round].fetch_add(1, Ordering::SeqCst);
            for looks in 0.. {
                match arrived[round].load(Ordering::SeqCst) {
                    2 => break,
                    _ if looks > 10_000 => std::thread::yield_now(),
                    _ => std::hint::spin_loop(),
                }
            }
            (0..later).for_each(|_| std::hint::spin_loop());
        };
        let alone_in = |store: &Exclusion, round: usize, hold: Hold| {
            met.fetch_add(inside[round].fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
            (0..50).for_each(|_| std::hint::spin_loop());
            inside[round].fetch_sub(1, Ordering::SeqCst);
            store.let_go(hold);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (round, store) in all.iter().enumerate() {
                    begin(round, round % 61);
                    if let Some(hold) = store.hold_now(slice::from_ref(&(0..8))) {
                        alone_in(store, round, hold);
                    }
                }
            });
            for (round, store) in all.iter().enumerate() {
                begin(round, round % 13);
                let (had, waits) = mpsc::channel();
                let granted: Granted = Box::new(move |hold| drop(had.send(hold)));
                let hold = match store.hold(Mode::Alone, slice::from_ref(&(0..8)), granted) {
                    Wanted::Had(hold, _) => hold,
                    Wanted::Waits(_) => waits.recv().unwrap(),
                };
                alone_in(store, round, hold);
            }
        });
        assert_eq!(met.into_inner(), 0, "two at once");
        assert!(all.iter().all(is_idle));
    }

    /// Who waits no longer is not in the way of others, and gets nothing.
    #[test]
    fn whoever_stops_waiting_lets_others_pass() {
        let (store, log) = (exclusion(), Log::default());
        want(&store, &log, 'a', Mode::Together, 0..8);
        let b = want(&store, &log, 'b', Mode::Alone, 0..8);
        want(&store, &log, 'c', Mode::Together, 0..8);
        assert_eq!(names(&log), "a");
        assert!(store.stop_waiting(b).is_some());
        assert_eq!(names(&log), "ac");
        assert!(store.stop_waiting(b).is_none(), "once");
        "ac".chars().for_each(|who| end(&store, &log, who));
        assert!(is_idle(&store));
    }

    /// Many ranges are one hold, and those without bytes are in nobody's way.
    #[test]
    fn many_ranges_are_held_as_one() {
        let (store, log) = (exclusion(), Log::default());
        want(&store, &log, 'a', Mode::Alone, 64..72);
        let hold = store.hold_now(&[0..8, 68..68, 16..24]).unwrap();
        for (who, at) in ('b'..).zip([0, 16]) {
            want(&store, &log, who, Mode::Alone, at..at + 8);
        }
        want(&store, &log, 'x', Mode::Alone, 8..16);
        assert_eq!(names(&log), "ax");
        store.let_go(hold);
        assert_eq!(names(&log), "axbc");
        "axbc".chars().for_each(|who| end(&store, &log, who));
        assert!(is_idle(&store));
    }
}
