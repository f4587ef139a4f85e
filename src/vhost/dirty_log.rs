//! Which pages of guest memory were written to, for a front end that copies it to another host while the guest
//! runs (vhost-user, "Migration").

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use super::memory;

/// Bytes of guest memory for each bit of the log.
const PAGE: u64 = 4096;

/// A bit for each page, in memory that the front end reads and clears.
#[derive(Debug)]
pub(super) struct DirtyLog {
    bits: MmapRegion<()>,
}

impl DirtyLog {
    /// Maps the log.
    ///
    /// # Errors
    /// If that cannot be done.
    pub(super) fn map(file: File, offset: u64, size: u64) -> io::Result<Self> {
        Ok(DirtyLog { bits: memory::map(file, offset, size)? })
    }

    /// Marks the pages of a range of guest addresses, after it was written to. What the log has no bit for is no
    /// memory of the guest.
    pub(super) fn mark(&self, address: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = address.saturating_add(len - 1) / PAGE;
        for page in address / PAGE..=last {
            let place = usize::try_from(page / 8).ok();
            let byte = place.and_then(|at| self.bits.get_atomic_ref::<AtomicU8>(at).ok());
            let Some(byte) = byte else { return };
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn every_page_of_a_range_is_marked_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 4).unwrap();
        log.mark(0x1fff, 2);
        log.mark(0x5000, 0);
        log.mark(0x8000, 0x1000);
        log.mark(31 * PAGE, 100 * PAGE);
        log.mark(u64::MAX - 1, 100);
        let mut bits = [0; 8];
        (&file).read_exact(&mut bits).unwrap();
        assert_eq!(bits, [0b110, 1, 0, 0x80, 0, 0, 0, 0]);
    }
}
