//! A budget: a store that may take less space than its file system has (`space-limit=`).
//!
//! As long as the budget has room for a request whatever it finds, requests run side by side. Once it
//! has not, each is looked at alone: only what it would write into holes counts, so that a full disk can
//! still be overwritten. Space of the file system's own for the file (its tree of extents) counts where
//! the host counts it as the file's.
//!
//! A snapshot counts from the start with all that it holds, though it takes nothing as long as it shares that with the
//! file: what is overwritten in the file is the snapshot's alone from then on, and nobody has to ask then. Where the host
//! keeps extents as a whole, that is up to all that the file has.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::copy::{CopyError, Method, Side};
use super::{
    Buffers, Capabilities, Cause, Durability, Extent, Hold, Kind, Notes, Operation, Pool, RingFile,
    Snapshot, Space, Store, StoreError, WriteBack,
};

/// Extents looked at in one go.
const EXTENTS: usize = 512;

/// Most bytes that are reserved by one call.
const MOST_COUNTED: u64 = 64 << 20;

/// A store that takes at most `limit` bytes of space.
pub struct Budget<S> {
    store: S,
    limit: u64,
    /// Bytes that requests under way may take.
    promised: AtomicU64,
    /// Bytes that snapshots hold.
    kept: Arc<AtomicU64>,
    /// Held shared by requests that surely fit, alone by one that has to be looked at.
    gate: RwLock<()>,
}

impl<S: Store> Budget<S> {
    /// Limits `store` to `limit` bytes of space. What it takes already is not taken from it.
    pub fn new(store: S, limit: u64) -> Self {
        let (promised, kept) = (AtomicU64::new(0), Arc::default());
        Budget { store, limit, promised, kept, gate: RwLock::new(()) }
    }

    fn used(&self) -> Result<u64, StoreError> {
        let own = self.store.space()?.map_or(0, |space| space.used);
        Ok(own.saturating_add(self.kept.load(Ordering::Acquire)))
    }

    /// Takes so many bytes for a snapshot, if the budget has room for them.
    fn charge(&self, bytes: u64) -> Result<Option<Charge>, StoreError> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if self.used()?.saturating_add(bytes) > self.limit {
            return Ok(None);
        }
        self.kept.fetch_add(bytes, Ordering::AcqRel);
        Ok(Some(Charge { kept: Arc::clone(&self.kept), bytes }))
    }

    /// Bytes that a snapshot of ranges can come to take: what they have space for, in whole blocks of the host. `None` if it
    /// is not to go on.
    fn held(
        &self,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<u64>, StoreError> {
        if self.store.capabilities().shares_whole_extents {
            return Ok(self.store.space()?.map(|space| space.used));
        }
        let mut held = 0u64;
        for range in ranges {
            let blocks = self.whole_blocks(range);
            let mut at = blocks.start;
            while at < blocks.end {
                if !go_on(0) {
                    return Ok(None);
                }
                for extent in self.store.extents(at..blocks.end, EXTENTS)? {
                    at = extent.range.end;
                    if extent.kind != Kind::Hole {
                        held = held.saturating_add(extent.range.end - extent.range.start);
                    }
                }
            }
        }
        Ok(Some(held))
    }

    /// Runs `change`, which may take space for all of `range`, if the budget has room for it.
    fn spend<T>(
        &self,
        range: &Range<u64>,
        change: impl Fn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let blocks = self.whole_blocks(range);
        {
            let _together = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let bytes = blocks.end - blocks.start;
            // What was promised is asked before what is used: a request that ends in between counts
            // twice, not never.
            let promised = self.promised.fetch_add(bytes, Ordering::AcqRel) + bytes;
            let done = match self.used() {
                Ok(used) if used.saturating_add(promised) <= self.limit => Some(change()),
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            };
            self.promised.fetch_sub(bytes, Ordering::AcqRel);
            if let Some(done) = done {
                return done;
            }
        }
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let room = self.limit.saturating_sub(self.used()?);
        match self.fits(&blocks, room)? {
            true => change(),
            false => Err(StoreError::at(Cause::NoSpace, range.start)),
        }
    }

    /// Whether the holes in a range are no more than `room` bytes.
    fn fits(&self, blocks: &Range<u64>, room: u64) -> Result<bool, StoreError> {
        let mut holes = 0u64;
        let mut at = blocks.start;
        while at < blocks.end && holes <= room {
            for extent in self.store.extents(at..blocks.end, EXTENTS)? {
                at = extent.range.end;
                if extent.kind == Kind::Hole {
                    holes += extent.range.end - extent.range.start;
                }
            }
        }
        Ok(holes <= room)
    }

    /// The host's blocks that a range touches.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let block = u64::from(self.store.capabilities().host_block.max(1));
        range.start - range.start % block..range.end.next_multiple_of(block)
    }
}

/// What a snapshot takes of a budget, until it has gone.
#[derive(Debug)]
pub struct Charge {
    kept: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.kept.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl<S: Store> Store for Budget<S> {
    fn capabilities(&self) -> &Capabilities {
        self.store.capabilities()
    }

    fn size(&self) -> Result<u64, StoreError> {
        self.store.size()
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.store.read(offset, into)
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.store.read_medium(offset, into)
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError> {
        let range = offset..offset.saturating_add(from.len() as u64);
        self.spend(&range, || self.store.write(offset, from, durability))
    }

    fn overwrite(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let range = offset..offset.saturating_add(from.len() as u64);
        self.spend(&range, || self.store.overwrite(offset, from))
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let range = offset..offset.saturating_add(from.len() as u64);
        self.spend(&range, || self.store.write_whole(offset, from))
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
        self.store.deallocate(range)
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.spend(&range, || self.store.reserve(range.clone()))
    }

    fn zeroes_at_a_time(&self, into: Kind) -> u64 {
        let most = self.store.zeroes_at_a_time(into);
        // What there is of the range already may have to be counted, extent by extent, while everybody else waits.
        if into == Kind::Hole { most } else { most.min(MOST_COUNTED) }
    }

    fn try_now(&self, operation: &Operation) -> Option<Result<(), StoreError>> {
        match operation {
            Operation::Read { .. } => self.store.try_now(operation),
            // Whether there is room is not known at once.
            Operation::Write { .. } | Operation::Flush | Operation::Prefetch { .. } => None,
        }
    }

    fn ring_file(&self, operation: &Operation) -> Option<(RingFile, Hold)> {
        match operation {
            Operation::Read { .. } | Operation::Flush => self.store.ring_file(operation),
            Operation::Write { .. } | Operation::Prefetch { .. } => None,
        }
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
        let range = at..at.saturating_add(len);
        self.spend(&range, || self.store.take(from, source, at, len, how))
    }

    fn snapshot(
        &self,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>, CopyError> {
        let source = |error| CopyError { side: Side::Source, error, done: 0 };
        let cancelled =
            Err(CopyError { side: Side::Destination, error: Cause::Cancelled.into(), done: 0 });
        let Some(held) = self.held(ranges, go_on).map_err(source)? else { return cancelled };
        let Some(mut charge) = self.charge(held).map_err(source)? else { return Ok(None) };
        let Some(mut snapshot) = self.store.snapshot(ranges, go_on)? else { return Ok(None) };
        // What was written to the ranges since they were looked at is in it, too.
        let space = snapshot.store.space().map_err(source)?;
        let more = space.map_or(0, |space| space.used).saturating_sub(held);
        if more > 0 {
            let Some(mut added) = self.charge(more).map_err(source)? else { return Ok(None) };
            charge.bytes += std::mem::take(&mut added.bytes);
        }
        snapshot.charge = Some(charge);
        Ok(Some(snapshot))
    }

    /// What is left of the budget, or of the file system if that is less.
    fn space(&self) -> Result<Option<Space>, StoreError> {
        let kept = self.kept.load(Ordering::Acquire);
        let space = self.store.space()?;
        Ok(space.map(|space| {
            let used = space.used.saturating_add(kept);
            Space { available: space.available.min(self.limit.saturating_sub(used)), used }
        }))
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

    fn write(store: &impl Store, offset: u64, len: usize) -> Result<(), StoreError> {
        store.write(offset, &Buffers::copy_of(&vec![1; len]).unwrap(), Durability::Cached)
    }

    #[test]
    fn a_budget_is_kept_and_can_be_spent_again() {
        let store = Budget::new(MemStore::new(1 << 20), 10 * 4096);
        write(&store, 0, 8 * 4096).unwrap();
        assert_eq!(write(&store, 1 << 19, 3 * 4096), Err(StoreError::at(Cause::NoSpace, 1 << 19)));
        write(&store, 6 * 4096, 4 * 4096).expect("half of it is there already");
        write(&store, 0, 10 * 4096).expect("all of it is there already");
        assert_eq!(write(&store, 10 * 4096, 512), Err(StoreError::at(Cause::NoSpace, 10 * 4096)));
        assert_eq!(store.space().unwrap(), Some(Space { available: 0, used: 10 * 4096 }));
        assert!(store.reserve(1 << 19..(1 << 19) + 1).is_err());
        store.deallocate(0..4096).unwrap();
        write(&store, 1 << 19, 1).unwrap();
        // No more is counted at a time than is soon counted.
        let at_a_time = |into| store.zeroes_at_a_time(into);
        assert_eq!((at_a_time(Kind::Reserved), at_a_time(Kind::Hole)), (MOST_COUNTED, 4 << 30));
    }

    #[test]
    fn many_writers_keep_to_it_together() {
        let store = Budget::new(MemStore::new(64 << 20), 1 << 20);
        let good = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..8u64 {
                let (store, good) = (&store, &good);
                scope.spawn(move || {
                    for n in 0..64u64 {
                        if write(store, (writer * 64 + n) * 8192, 8192).is_ok() {
                            good.fetch_add(8192, Ordering::AcqRel);
                        }
                    }
                });
            }
        });
        assert_eq!(good.load(Ordering::Acquire), 1 << 20, "no more, and no less");
    }
}
