//! Atomicity against everybody else: a store around a store, in which a few commands (COMPARE AND WRITE and its
//! like) have a range for themselves for as long as several steps take.
//!
//! Hardly any disk ever gets such a command. So until the first one comes, an operation is only counted, in a
//! counter that its thread shares with few others; from then on each is entered in a list with its range, and waits
//! for whoever has the range for himself. The first of them waits for the end of what was only counted.
//!
//! Who waits does so in a list, in the order they came, and is begun by whoever lets go of what is in the way: it takes no
//! thread ([`Store::hold`]). It is known of each who waits which one was found in his way, the latest, and he is looked at
//! again when that one is gone: so many who wait cost nothing to those in whose way they are not. Only the methods that read and change the store wait where they are called: for those who have
//! a thread of their own, and nothing of any disk while they wait.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
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
    Listed(u64, Mode, Vec<Range<u64>>),
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

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// Ranges that somebody has or waits for.
///
/// They are in the order of their lengths, as powers of two, and then of their places: of those that are no longer than that
/// only the ones that begin no farther away can meet a range.
#[derive(Debug, Default)]
struct Used {
    /// Length as a power of two, start, end, and the number of whoever it is.
    all: BTreeSet<(u32, u64, u64, u64)>,
    /// How often one of them was looked at.
    #[cfg(test)]
    looks: Cell<usize>,
}

impl Used {
    fn len(&self) -> usize {
        self.all.len()
    }

    fn entries(number: u64, ranges: &[Range<u64>]) -> impl Iterator<Item = (u32, u64, u64, u64)> {
        ranges.iter().filter(|range| !range.is_empty()).map(move |range| {
            let most = range.end - range.start - 1;
            (u64::BITS - most.leading_zeros(), range.start, range.end, number)
        })
    }

    fn add(&mut self, number: u64, ranges: &[Range<u64>]) {
        self.all.extend(Self::entries(number, ranges));
    }

    fn remove(&mut self, number: u64, ranges: &[Range<u64>]) {
        for entry in Self::entries(number, ranges) {
            self.all.remove(&entry);
        }
    }

    /// The last before this number who is at any of these ranges.
    fn last(&self, ranges: &[Range<u64>], before: u64) -> Option<u64> {
        let mut last = None;
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let mut lengths = 0;
            while let Some(&(length, ..)) = self.all.range((lengths, 0, 0, 0)..).next() {
                let most = u64::MAX.checked_shr(u64::BITS - length).unwrap_or(0);
                let first = (length, range.start.saturating_sub(most), 0, 0);
                let mut behind = (length, range.end, 0, 0);
                while let Some(&(_, start, end, _)) = self.all.range(first..behind).next_back() {
                    #[cfg(test)]
                    self.looks.set(self.looks.get() + 1);
                    behind = (length, start, end, 0);
                    if overlap(range, &(start..end)) {
                        // Of those at the same range one is looked at.
                        let mut same = self.all.range(behind..(length, start, end, before));
                        last = last.max(same.next_back().map(|(.., number)| *number));
                    }
                }
                lengths = length + 1;
            }
        }
        last
    }
}

/// Stands for all who are only counted. Nobody has this number.
const COUNTED: u64 = 0;

/// One who waits.
struct Waiting {
    mode: Mode,
    ranges: Vec<Range<u64>>,
    /// Who is in his way: has one of the ranges, or has waited longer for one.
    behind: u64,
    granted: Granted,
}

#[derive(Default)]
struct State {
    next: u64,
    /// Who has ranges or waits for them, to be together there, or alone.
    together: Used,
    alone: Used,
    /// Those who wait, in the order they came.
    waiting: BTreeMap<u64, Waiting>,
    /// Each who is in the way of one who waits, and that one. Who gets what he waited for stays in their way.
    behind: BTreeSet<(u64, u64)>,
    /// How often one who waits was looked at again.
    #[cfg(test)]
    looks: usize,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The last who is in the way of this number, as he came before: he has one of the ranges, or waits for it. `drained`:
    /// nobody is only counted.
    fn in_the_way(
        &self,
        number: u64,
        mode: Mode,
        ranges: &[Range<u64>],
        drained: bool,
    ) -> Option<u64> {
        let alone = self.alone.last(ranges, number);
        match mode {
            Mode::Together => alone,
            Mode::Alone => alone
                .max(self.together.last(ranges, number))
                .or_else(|| (!drained).then_some(COUNTED)),
        }
    }

    fn used(&mut self, mode: Mode) -> &mut Used {
        match mode {
            Mode::Together => &mut self.together,
            Mode::Alone => &mut self.alone,
        }
    }

    fn enter(&mut self, number: u64, mode: Mode, ranges: &[Range<u64>]) -> Hold {
        self.used(mode).add(number, ranges);
        Hold(How::Listed(number, mode, ranges.to_vec()))
    }

    fn wait(&mut self, number: u64, one: Waiting) {
        self.used(one.mode).add(number, &one.ranges);
        self.behind.insert((one.behind, number));
        self.waiting.insert(number, one);
    }

    fn wait_no_longer(&mut self, number: u64) -> Option<Waiting> {
        let one = self.waiting.remove(&number)?;
        self.behind.remove(&(one.behind, number));
        Some(one)
    }

    /// Somebody is gone: those who wait no longer.
    fn gone(&mut self, who: u64, drained: bool) -> Vec<(Hold, Granted)> {
        let all = self.behind.range((who, 0)..=(who, u64::MAX));
        let mut granted = Vec::new();
        for number in all.map(|(_, number)| *number).collect::<Vec<_>>() {
            #[cfg(test)]
            {
                self.looks += 1;
            }
            let Some(one) = self.waiting.get(&number) else { continue };
            if let Some(other) = self.in_the_way(number, one.mode, &one.ranges, drained) {
                self.behind.remove(&(who, number));
                self.behind.insert((other, number));
                if let Some(one) = self.waiting.get_mut(&number) {
                    one.behind = other;
                }
            } else if let Some(one) = self.wait_no_longer(number) {
                // Nothing of what he waited for is anybody else's: it is his as it stands there.
                granted.push((Hold(How::Listed(number, one.mode, one.ranges)), one.granted));
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
        counted || state.together.len() + state.alone.len() > 0
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
            self.grant(self.state(), COUNTED);
        }
    }

    /// Whether nobody is left who was only counted, once lists are kept: nobody is counted any more.
    fn is_drained(&self, state: &State) -> bool {
        let drained = self.drained.load(Ordering::Relaxed)
            || self.counters.iter().all(|count| count.0.load(Ordering::SeqCst) == 0);
        // Once this is set nobody else looks after those who wait for it.
        if drained && state.behind.first().is_none_or(|(who, _)| *who != COUNTED) {
            self.drained.store(true, Ordering::Relaxed);
        }
        drained
    }

    /// Begins what no longer has to wait when somebody is gone.
    #[cold]
    fn grant(&self, mut state: MutexGuard<'_, State>, who: u64) {
        if state.waiting.is_empty() {
            return;
        }
        let drained = self.is_drained(&state);
        let mut all = Vec::new();
        if who != COUNTED {
            all = state.gone(who, drained);
        }
        if drained {
            all.extend(state.gone(COUNTED, drained));
            self.drained.store(true, Ordering::Relaxed);
        }
        drop(state);
        for (hold, granted) in all {
            granted(hold);
        }
    }

    #[cold]
    fn enter_list(&self, ranges: &[Range<u64>]) -> Option<Hold> {
        let mut state = self.state();
        let number = state.number();
        if state.in_the_way(number, Mode::Together, ranges, false).is_some() {
            return None;
        }
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
        let drained = self.is_drained(&state);
        let Some(behind) = state.in_the_way(number, mode, ranges, drained) else {
            return Wanted::Had(state.enter(number, mode, ranges), granted);
        };
        state.wait(number, Waiting { mode, ranges: ranges.to_vec(), behind, granted });
        Wanted::Waits(number)
    }

    fn stop_waiting(&self, number: u64) -> Option<Granted> {
        let mut state = self.state();
        let stopped = state.wait_no_longer(number)?;
        state.used(stopped.mode).remove(number, &stopped.ranges);
        // Others may have waited for him only.
        self.grant(state, number);
        Some(stopped.granted)
    }

    fn let_go(&self, hold: Hold) {
        match hold.0 {
            How::Free => {}
            How::Counted(place) => {
                if let Some(count) = self.counters.get(place) {
                    self.count_out(&count.0);
                }
            }
            How::Listed(number, mode, ranges) => {
                let mut state = self.state();
                state.used(mode).remove(number, &ranges);
                self.grant(state, number);
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
        !counted && used + state.behind.len() == 0
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

    /// One who is only counted says first that he is gone, and looks then for those who wait for it. Who comes in between
    /// and finds nobody counted leaves them to him.
    #[test]
    fn who_finds_nobody_counted_leaves_those_who_wait_to_who_was() {
        let (store, log) = (exclusion(), Log::default());
        let _counted = store.hold_now(slice::from_ref(&(0..8))).unwrap();
        want(&store, &log, 'a', Mode::Alone, 0..8);
        store.counters[own_place()].0.fetch_sub(1, Ordering::SeqCst);
        want(&store, &log, 'b', Mode::Alone, 64..72);
        assert_eq!(names(&log), "b");
        // As the other does, after his number has been taken off.
        assert!(store.count_in().is_none());
        assert_eq!(names(&log), "ba");
        "ba".chars().for_each(|who| end(&store, &log, who));
        assert!(is_idle(&store));
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

    /// Who wants ranges in the simplest way: all who wait are looked at, in their order, whenever anything changes.
    #[derive(Default)]
    struct Model {
        /// What was only counted, which is in the way of all who want to be alone.
        counted: usize,
        had: Vec<(usize, Mode, Vec<Range<u64>>)>,
        waiting: Vec<(usize, Mode, Vec<Range<u64>>)>,
    }

    impl Model {
        fn go_on(&mut self) {
            for one in std::mem::take(&mut self.waiting) {
                let conflicts = |(_, mode, ranges): &(usize, Mode, Vec<Range<u64>>)| {
                    (*mode == Mode::Alone || one.1 == Mode::Alone)
                        && ranges.iter().any(|a| one.2.iter().any(|b| overlap(a, b)))
                };
                let waits = self.had.iter().chain(&self.waiting).any(conflicts)
                    || one.1 == Mode::Alone && self.counted > 0;
                if waits { self.waiting.push(one) } else { self.had.push(one) }
            }
        }

        fn have(&self) -> Vec<usize> {
            let mut have: Vec<usize> = self.had.iter().map(|(who, ..)| *who).collect();
            have.sort_unstable();
            have
        }
    }

    /// Whoever comes, ends and stops waiting: at any time those have their ranges who have them in the simplest way.
    #[test]
    fn ranges_are_had_as_in_the_simplest_way() {
        let mut seed = 1u64;
        let mut below = |n: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        for round in 0..150 {
            let (store, mut model) = (exclusion(), Model::default());
            let holds: Arc<Mutex<Vec<(usize, Hold)>>> = Arc::default();
            let mut counted: Vec<Hold> =
                (0..below(3)).map(|_| store.hold_now(slice::from_ref(&(0..64))).unwrap()).collect();
            model.counted = counted.len();
            let mut numbers = std::collections::HashMap::new();
            for who in 0..200 {
                // The first wants to be alone, so that from then on nobody is only counted.
                match if who == 0 { 0 } else { below(8) } {
                    0..5 => {
                        let mode =
                            [Mode::Alone, Mode::Together][usize::from(who > 0 && below(3) == 0)];
                        let range = |at: u64, len: u64| at..(at + len).min(64);
                        let ranges: Vec<_> = (0..=below(2))
                            .map(|_| range(below(64), below([3, 9, 40][round % 3])))
                            .collect();
                        let of_thread = Arc::clone(&holds);
                        let granted: Granted =
                            Box::new(move |hold| of_thread.lock().unwrap().push((who, hold)));
                        match store.hold(mode, &ranges, granted) {
                            Wanted::Had(hold, granted) => granted(hold),
                            Wanted::Waits(number) => {
                                numbers.insert(who, number);
                            }
                        }
                        model.waiting.push((who, mode, ranges));
                    }
                    5 if !counted.is_empty() => {
                        store.let_go(counted.pop().unwrap());
                        model.counted -= 1;
                    }
                    5 | 6 if !model.had.is_empty() => {
                        let at = below(model.had.len() as u64) as usize;
                        let (who, ..) = model.had.remove(at);
                        let mut all = holds.lock().unwrap();
                        let at = all.iter().position(|(other, _)| *other == who).unwrap();
                        let (_, hold) = all.swap_remove(at);
                        drop(all);
                        store.let_go(hold);
                    }
                    _ if !model.waiting.is_empty() => {
                        let at = below(model.waiting.len() as u64) as usize;
                        let (who, ..) = model.waiting.remove(at);
                        assert!(store.stop_waiting(numbers[&who]).is_some());
                    }
                    _ => {}
                }
                model.go_on();
                let mut have: Vec<usize> =
                    holds.lock().unwrap().iter().map(|(who, _)| *who).collect();
                have.sort_unstable();
                assert_eq!(have, model.have(), "round {round}, step {who}");
            }
            counted.into_iter().for_each(|hold| store.let_go(hold));
            loop {
                let all = std::mem::take(&mut *holds.lock().unwrap());
                if all.is_empty() {
                    break;
                }
                all.into_iter().for_each(|(_, hold)| store.let_go(hold));
            }
            assert!(is_idle(&store), "round {round}");
        }
    }

    /// However many wait for one range, who has another and lets go of it looks at none of them; and in a row of those who
    /// wait for each other each is looked at when the one before it goes.
    #[test]
    fn who_lets_go_looks_at_those_who_wait_for_that() {
        // A power of two, so that what is about all of them is not near what is behind them.
        const MANY: u64 = 1024;
        let (store, log) = (exclusion(), Log::default());
        // From then on nobody is only counted.
        alone(&store, 0..8, |_| {});
        want(&store, &log, 'a', Mode::Together, 0..512 * MANY);
        for n in 0..MANY {
            want(&store, &log, 'b', Mode::Alone, 512 * n..512 * n + 512);
        }
        for _ in 0..MANY {
            want(&store, &log, 'c', Mode::Alone, 0..512);
        }
        let elsewhere = 512 * MANY..512 * MANY + 512;
        let looks = || {
            let state = store.state();
            state.looks + state.alone.looks.get() + state.together.looks.get()
        };
        let before = looks();
        for mode in [Mode::Together, Mode::Alone] {
            want(&store, &log, 'x', mode, elsewhere.clone());
            end(&store, &log, 'x');
        }
        let hold = store.hold_now(slice::from_ref(&elsewhere)).unwrap();
        store.let_go(hold);
        assert_eq!(looks(), before, "neither who comes nor who goes looks at one of them");
        end(&store, &log, 'a');
        assert_eq!(store.state().looks as u64, MANY);
        (0..MANY).for_each(|_| end(&store, &log, 'b'));
        (0..MANY).for_each(|_| end(&store, &log, 'c'));
        assert_eq!(store.state().looks as u64, 2 * MANY);
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
