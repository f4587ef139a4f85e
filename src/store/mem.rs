//! A store in memory: the model that tests and fuzzers run the commands on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::extents::List;
use super::{
    Buffers, Capabilities, Cause, Durability, Extent, Kind, Notes, Pool, Space, Store, StoreError,
};
use crate::sandbox::Role;

const PAGE: usize = 4096;

/// A page that has space: reserved, or with the bytes that were written.
type Page = Option<Box<[u8; PAGE]>>;

/// Sparse bytes in memory; pages that are not there are holes.
pub struct MemStore {
    size: u64,
    pages: Mutex<BTreeMap<u64, Page>>,
    capabilities: Capabilities,
    notes: Notes,
    pool: Pool,
}

impl MemStore {
    /// A writable store of `size` zero bytes.
    pub fn new(size: u64) -> Self {
        let capabilities = Capabilities {
            read_only: false,
            host_block: 4096,
            deallocates: true,
            reserves: true,
            whole_writes: super::journal::MAX_BYTES,
            snapshots: false,
            shares_whole_extents: false,
            transfer_align: 1,
            unlocked: false,
            in_memory: true,
            device: u64::MAX,
            ways: "memory".into(),
        };
        let (notes, pool) = (Notes::in_memory(), Pool::new("mem", Role::Disk, 2));
        MemStore { size, pages: Mutex::default(), capabilities, notes, pool }
    }

    /// The same store, not writable.
    pub fn read_only(mut self) -> Self {
        self.capabilities.read_only = true;
        self
    }

    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages, to be changed at `offset`.
    fn writable(&self, offset: u64) -> Result<MutexGuard<'_, BTreeMap<u64, Page>>, StoreError> {
        match self.capabilities.read_only {
            true => Err(StoreError::at(Cause::ReadOnly, offset)),
            false => Ok(self.pages()),
        }
    }

    /// Calls `f(page number, offset in the page, offset in the list, length)` for each piece.
    fn for_each(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize, usize)) {
        let page_len = PAGE as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = usize::try_from(at % page_len).unwrap_or(0);
            let n = (PAGE - within).min(len - done);
            f(at / page_len, within, done, n);
            done += n;
        }
    }

    /// Zeroes a range; whole pages of it become `whole` (`None`: holes).
    fn zero(&self, range: Range<u64>, whole: Option<&Page>) -> Result<(), StoreError> {
        let mut pages = self.writable(range.start)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(0);
        Self::for_each(range.start, len, |number, within, _, n| {
            if n == PAGE {
                match whole {
                    Some(page) => drop(pages.insert(number, page.clone())),
                    None => drop(pages.remove(&number)),
                }
            } else if let Some(Some(bytes)) = pages.get_mut(&number) {
                bytes.iter_mut().skip(within).take(n).for_each(|byte| *byte = 0);
            } else if whole.is_some() {
                pages.entry(number).or_default();
            }
        });
        Ok(())
    }
}

impl Store for MemStore {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn size(&self) -> Result<u64, StoreError> {
        Ok(self.size)
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        let pages = self.pages();
        Self::for_each(offset, into.len(), |number, within, done, n| {
            let page = pages.get(&number).and_then(Option::as_ref);
            match page.and_then(|p| p.get(within..within + n)) {
                Some(bytes) => {
                    into.write_at(done, bytes);
                }
                None => into.fill_zero(done, n),
            }
        });
        Ok(())
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.read(offset, into)
    }

    fn write(&self, offset: u64, from: &Buffers, _: Durability) -> Result<(), StoreError> {
        let mut pages = self.writable(offset)?;
        Self::for_each(offset, from.len(), |number, within, done, n| {
            let page = pages.entry(number).or_default();
            let bytes = page.get_or_insert_with(|| Box::new([0; PAGE]));
            if let Some(bytes) = bytes.get_mut(within..within + n) {
                from.read_at(done, bytes);
            }
        });
        Ok(())
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.write(offset, from, Durability::Stable)
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn prefetch(&self, _: u64, _: u64) -> Result<(), StoreError> {
        Ok(())
    }

    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
        let page_len = PAGE as u64;
        let mut list = List::default();
        let mut at = range.start;
        for (number, page) in self.pages().range(range.start / page_len..) {
            let start = (number * page_len).max(range.start);
            if start >= range.end || list.len() > limit {
                break;
            }
            list.push(at..start, Kind::Hole);
            at = (start - start % page_len + page_len).min(range.end);
            list.push(start..at, if page.is_some() { Kind::Data } else { Kind::Reserved });
        }
        if list.len() <= limit {
            list.push(at..range.end, Kind::Hole);
        }
        Ok(list.first(limit))
    }

    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.zero(range, None)
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.zero(range, Some(&None))
    }

    /// As if there were room for all of it.
    fn space(&self) -> Result<Option<Space>, StoreError> {
        let used = self.pages().len() as u64 * PAGE as u64;
        Ok(Some(Space { available: self.size.saturating_sub(used), used }))
    }

    fn notes(&self) -> &Notes {
        &self.notes
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}
