//! Transfers that a queue thread makes itself, because they do not wait for a device.
//!
//! What the host has in memory it gives at once (RWF_NOWAIT), and where everything is in memory there is
//! nothing to ask. Some file systems (ext4) do not tell beforehand whether a write into the page cache would
//! wait; there it hardly ever does, and is many times dearer to hand over than to make. So it is made, while
//! that goes well.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Buffers, sys};

/// A write that took longer has waited for something.
const SLOW: Duration = Duration::from_millis(1);

/// How many times as long as it has waited a file has to be left alone: no more than a hundredth of a queue's
/// time is lost to it.
const REST: u32 = 100;

/// Which transfers can be made without waiting, as far as is known.
#[derive(Debug)]
pub(super) struct AtOnce {
    /// Everything is in memory.
    in_memory: bool,
    /// Whether the host gives what it has.
    reads: AtomicBool,
    /// Whether the host takes what it has room for.
    writes: AtomicBool,
    trust: Option<Trust>,
}

impl AtOnce {
    /// O_DIRECT always waits for the device; for the rest, the first answer tells.
    pub(super) fn of(file: &File, direct: bool) -> Self {
        AtOnce {
            in_memory: !direct && sys::is_in_memory(file),
            reads: AtomicBool::new(!direct),
            writes: AtomicBool::new(!direct),
            trust: (!direct).then(Trust::new),
        }
    }

    /// Nothing is done at once.
    pub(super) fn never() -> Self {
        let no = || AtomicBool::new(false);
        AtOnce { in_memory: false, reads: no(), writes: no(), trust: None }
    }

    /// Bytes read, if that could be done.
    pub(super) fn read(&self, file: &File, offset: u64, into: &Buffers) -> Option<usize> {
        if self.in_memory {
            return sys::read(file, offset, into, 0).ok();
        }
        attempt(&self.reads, || sys::read_now(file, offset, into))
    }

    /// Bytes written, if that could be done. `quiet`: nobody is at work on the file who may hold it up.
    pub(super) fn write(
        &self,
        file: &File,
        offset: u64,
        from: &Buffers,
        quiet: bool,
    ) -> Option<usize> {
        let write = || sys::write(file, offset, from, 0, false);
        if self.in_memory {
            return write().ok();
        }
        if self.writes.load(Ordering::Relaxed) {
            return attempt(&self.writes, || sys::write_now(file, offset, from));
        }
        self.trust.as_ref().filter(|_| quiet)?.attempt(write)
    }
}

/// What is not there is not tried again; what failed otherwise is done another way.
fn attempt(there: &AtomicBool, transfer: impl Fn() -> io::Result<usize>) -> Option<usize> {
    if !there.load(Ordering::Relaxed) {
        return None;
    }
    match transfer() {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                there.store(false, Ordering::Relaxed);
            }
            None
        }
    }
}

/// That a call which may wait does not, until it did.
#[derive(Debug)]
struct Trust {
    since: Instant,
    /// When it may be tried again, in microseconds since then.
    again: AtomicU64,
}

impl Trust {
    fn new() -> Self {
        Trust { since: Instant::now(), again: AtomicU64::new(0) }
    }

    fn attempt(&self, transfer: impl Fn() -> io::Result<usize>) -> Option<usize> {
        let start = self.since.elapsed();
        if microseconds(start) < self.again.load(Ordering::Relaxed) {
            return None;
        }
        let result = transfer();
        let end = self.since.elapsed();
        let took = end.saturating_sub(start);
        if took > SLOW {
            let again = microseconds(end.saturating_add(took.saturating_mul(REST)));
            self.again.store(again, Ordering::Relaxed);
            log::debug!("a write has waited for {took:?}: the next ones are handed over");
        }
        result.ok()
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_waited_is_not_followed_by_another() {
        let trust = Trust::new();
        assert_eq!(trust.attempt(|| Ok(1)), Some(1));
        assert_eq!(trust.attempt(|| Err(io::ErrorKind::StorageFull.into())), None);
        assert_eq!(trust.attempt(|| Ok(2)), Some(2));
        let slow = || {
            std::thread::sleep(Duration::from_millis(20));
            Ok(3)
        };
        assert_eq!(trust.attempt(slow), Some(3));
        assert_eq!(trust.attempt(|| Ok(4)), None);
        assert!(trust.again.load(Ordering::Relaxed) >= 2_000_000);
    }
}
