//! Transfers that a queue thread makes itself, because they do not wait for a device.
//!
//! What the host has in memory it gives at once (RWF_NOWAIT), and where everything is in memory there is
//! nothing to ask. Some file systems (ext4) do not tell beforehand whether a write into the page cache would
//! wait; there it hardly ever does, and is many times dearer to hand over than to make. So it is made, while
//! that goes well.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use super::{Buffers, sys};

/// A write that took longer has waited for something.
const SLOW: Duration = Duration::from_millis(1);

/// How many times as long as it has waited a file has to be left alone: little of a queue's time is lost to it, some five
/// hundredths if every write waits.
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
        let write = || sys::write(file, offset, from, 0);
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
///
/// A call that took long may have waited, or the thread has lost its processor meanwhile. So the calls after it are
/// watched, and only one that gave the processor up by itself ends the trust.
#[derive(Debug)]
struct Trust {
    since: Instant,
    /// Until when calls are watched, in microseconds since then; 0 if they are not.
    watched: AtomicU64,
    /// When it may be tried again, in the same.
    again: AtomicU64,
}

impl Trust {
    fn new() -> Self {
        Trust { since: Instant::now(), watched: AtomicU64::new(0), again: AtomicU64::new(0) }
    }

    fn attempt(&self, transfer: impl Fn() -> io::Result<usize>) -> Option<usize> {
        // While nothing has waited lately some are timed: what makes one wait makes many wait, and a clock costs.
        let until = self.watched.load(Ordering::Relaxed);
        if until == 0 && !is_sample() {
            return transfer().ok();
        }
        let start = self.since.elapsed();
        let now = microseconds(start);
        if now < self.again.load(Ordering::Relaxed) {
            return None;
        }
        let watched = now < until;
        if until != 0 && !watched {
            // Unless another has found a reason to go on.
            let _ = self.watched.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        let before = watched.then(waits);
        let result = transfer();
        let end = self.since.elapsed();
        let took = end.saturating_sub(start);
        if took > SLOW {
            let until = microseconds(end.saturating_add(took.saturating_mul(REST)));
            if before.is_some_and(|before| waits() > before) {
                self.again.store(until, Ordering::Relaxed);
                log::debug!("a write has waited for {took:?}: the next ones are handed over");
            }
            self.watched.store(until, Ordering::Relaxed);
        }
        result.ok()
    }
}

/// Whether this is one of the few calls of this thread whose time is taken: the first, as a thread that is left in a call
/// makes no other, and then any, so that no file and no block is passed over for ever.
fn is_sample() -> bool {
    SAMPLES.with(|number| {
        let this = number.get();
        // Numerical Recipes' generator: its upper bits are as good as any for this.
        number.set(this.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        this >> SAMPLED_BITS == 0
    })
}

/// One call in four has its time taken.
const SAMPLED_BITS: u32 = 30;

thread_local! {
    static SAMPLES: Cell<u32> = const { Cell::new(0) };
}

/// How often this thread has gone to sleep by itself.
fn waits() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(20);

    fn sleeps() -> io::Result<usize> {
        std::thread::sleep(LONG);
        Ok(3)
    }

    /// Has the next call be one that is timed.
    fn timed() {
        SAMPLES.set(0);
    }

    #[test]
    fn some_are_timed_and_the_first_of_a_thread_is() {
        for _ in 0..3 {
            assert!(std::thread::spawn(is_sample).join().unwrap());
        }
        let both = [0, 1].map(|odd| (0..4000).filter(|n| is_sample() && n % 2 == odd).count());
        assert!(both.iter().all(|some| (300..700).contains(some)), "{both:?}");
    }

    #[test]
    fn a_write_that_waited_twice_is_not_followed_by_another() {
        let trust = Trust::new();
        timed();
        assert_eq!(trust.attempt(|| Err(io::ErrorKind::StorageFull.into())), None);
        timed();
        assert_eq!(trust.attempt(sleeps), Some(3));
        // For long enough, however slow this machine is.
        assert!(trust.watched.swap(u64::MAX, Ordering::Relaxed) >= 2_000_000);
        assert_eq!(trust.attempt(|| Ok(2)), Some(2));
        assert_eq!(trust.attempt(sleeps), Some(3));
        assert!(trust.again.swap(u64::MAX, Ordering::Relaxed) >= 2_000_000);
        assert_eq!(trust.attempt(|| Ok(4)), None);
    }

    #[test]
    fn a_write_that_was_only_slow_is() {
        let trust = Trust::new();
        let busy = || {
            let start = Instant::now();
            while start.elapsed() < LONG {
                std::hint::spin_loop();
            }
            Ok(3)
        };
        for _ in 0..4 {
            timed();
            assert_eq!(trust.attempt(busy), Some(3));
            assert!(trust.watched.swap(u64::MAX, Ordering::Relaxed) > 0, "the next one is watched");
        }
        assert_eq!(trust.again.load(Ordering::Relaxed), 0);
    }
}
