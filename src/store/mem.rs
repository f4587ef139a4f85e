//! A store in memory: the model that tests and fuzzers run the commands on.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Buffers, Capabilities, Cause, Durability, Pool, Store, StoreError};

const PAGE: usize = 4096;

/// Sparse bytes in memory; pages never written read as zeroes.
pub struct MemStore {
    size: u64,
    pages: Mutex<HashMap<u64, Box<[u8; PAGE]>>>,
    capabilities: Capabilities,
    pool: Pool,
}

impl MemStore {
    /// A writable store of `size` zero bytes.
    pub fn new(size: u64) -> Self {
        let capabilities = Capabilities { read_only: false, host_block: 4096, transfer_align: 1 };
        MemStore { size, pages: Mutex::default(), capabilities, pool: Pool::new("mem", 2) }
    }

    /// The same store, not writable.
    pub fn read_only(mut self) -> Self {
        self.capabilities.read_only = true;
        self
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<u64, Box<[u8; PAGE]>>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
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
        Self::for_each(offset, into.len(), |page, within, done, n| {
            match pages.get(&page).and_then(|p| p.get(within..within + n)) {
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
        if self.capabilities.read_only {
            return Err(StoreError::at(Cause::ReadOnly, offset));
        }
        let mut pages = self.pages();
        Self::for_each(offset, from.len(), |page, within, done, n| {
            let page = pages.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            if let Some(bytes) = page.get_mut(within..within + n) {
                from.read_at(done, bytes);
            }
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn prefetch(&self, _: u64, _: u64) -> Result<(), StoreError> {
        Ok(())
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}
