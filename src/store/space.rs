//! Giving space back and taking it: fallocate(2), and what to do where a file system lacks a mode.
//!
//! Each operation is a ladder of ways, best first. A way is given up for good on the first answer that
//! says that this file does not have it, and only on that: any other error is the operation's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{Cause, StoreError};

/// One way to do an operation on a range.
pub(super) type Way = fn(&File, &Range<u64>) -> io::Result<()>;

/// The ways of an operation, and the best that has not failed to be there.
#[derive(Debug)]
pub(super) struct Ladder {
    ways: &'static [(&'static str, Way)],
    current: AtomicUsize,
    /// The way that is used has worked.
    proven: AtomicBool,
}

/// Makes a range read as zeroes without space of its own.
pub(super) const DEALLOCATE: &[(&str, Way)] = &[("punch", punch), ("write", overwrite_with_zeroes)];

/// Makes a range read as zeroes with space reserved for it.
pub(super) const RESERVE: &[(&str, Way)] = &[
    ("zero_range", zero_range),
    ("punch+allocate", punch_and_allocate),
    ("write", overwrite_with_zeroes),
];

impl Ladder {
    /// A ladder of which the ways from this one on may be there.
    pub(super) fn from(ways: &'static [(&'static str, Way)], first: usize) -> Self {
        Ladder { ways, current: AtomicUsize::new(first), proven: AtomicBool::new(false) }
    }

    /// The same, for another file of the same kind.
    pub(super) fn again(&self) -> Self {
        Ladder::from(self.ways, self.current.load(Ordering::Acquire))
    }

    /// The name of the way that is used now.
    pub(super) fn name(&self) -> &'static str {
        self.ways.get(self.current.load(Ordering::Acquire)).map_or("none", |(name, _)| name)
    }

    /// Whether the best way is used.
    pub(super) fn is_best(&self) -> bool {
        self.current.load(Ordering::Acquire) == 0
    }

    /// Whether it is known that no zeroes are written.
    pub(super) fn only_marks(&self) -> bool {
        self.proven.load(Ordering::Acquire) && !self.is_last_resort()
    }

    /// Whether only the way is left that is always there.
    pub(super) fn is_last_resort(&self) -> bool {
        self.current.load(Ordering::Acquire) + 1 >= self.ways.len()
    }

    /// Steps down past the ways that this file does not have, by trying them on a range. The last
    /// resort is not tried, and what else goes wrong is no news yet.
    pub(super) fn probe(&self, file: &File, range: &Range<u64>) {
        while !self.is_last_resort() {
            let rung = self.current.load(Ordering::Acquire);
            let Some((_, way)) = self.ways.get(rung) else { return };
            match retry(|| way(file, range)) {
                Err(error) if is_missing(&error) => self.step_down(rung),
                done => return self.proven.store(done.is_ok(), Ordering::Release),
            }
        }
    }

    /// Two threads that find out at once step down once.
    fn step_down(&self, rung: usize) {
        let order = (Ordering::AcqRel, Ordering::Acquire);
        let _ = self.current.compare_exchange(rung, rung + 1, order.0, order.1);
    }

    /// Does it.
    ///
    /// # Errors
    /// What the host says; the first byte that may not be done is the range's first.
    pub(super) fn run(&self, file: &File, range: &Range<u64>) -> Result<(), StoreError> {
        if range.is_empty() {
            return Ok(());
        }
        loop {
            let rung = self.current.load(Ordering::Acquire);
            let Some((_, way)) = self.ways.get(rung) else {
                return Err(StoreError::at(Cause::Medium, range.start));
            };
            match retry(|| way(file, range)) {
                Ok(()) => {
                    self.proven.store(true, Ordering::Release);
                    return Ok(());
                }
                Err(error) if is_missing(&error) => self.step_down(rung),
                Err(error) => return Err(StoreError::at(Cause::from(&error), range.start)),
            }
        }
    }

    /// Does it to a range of a device that has it only for whole sectors: parts of one are written, which the page cache
    /// can do. (O_DIRECT cannot, nor has to: it is refused where the disk's blocks are smaller than a sector.)
    ///
    /// # Errors
    /// As [`Ladder::run`].
    pub(super) fn run_aligned(
        &self,
        file: &File,
        range: &Range<u64>,
        sector: u64,
    ) -> Result<(), StoreError> {
        let write = |part: Range<u64>| {
            let written = retry(|| write_zeroes(file, &part));
            written.map_err(|error| StoreError::at(Cause::from(&error), part.start))
        };
        let (start, end) = (range.start.next_multiple_of(sector), range.end - range.end % sector);
        if start > end {
            return write(range.clone());
        }
        write(range.start..start)?;
        self.run(file, &(start..end))?;
        write(end..range.end)
    }
}

/// Whether an error says that this file does not have the operation at all.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}

fn retry(mut f: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match f() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn allocate(file: &File, mode: FallocateFlags, range: &Range<u64>) -> io::Result<()> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let start = i64::try_from(range.start).map_err(invalid)?;
    let len = i64::try_from(range.end - range.start).map_err(invalid)?;
    Ok(fallocate(file, mode, start, len)?)
}

fn punch(file: &File, range: &Range<u64>) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, mode, range)
}

fn zero_range(file: &File, range: &Range<u64>) -> io::Result<()> {
    write_back_edges(file, range);
    let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, mode, range)
}

fn punch_and_allocate(file: &File, range: &Range<u64>) -> io::Result<()> {
    write_back_edges(file, range);
    punch(file, range)?;
    allocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
}

/// ext4 does not cut up a large folio of the page cache that has not been written back: what stays of it in the range
/// is zeroes, but lseek calls them data for as long as they are cached. The next step waits for what is begun here.
fn write_back_edges(file: &File, range: &Range<u64>) {
    super::sys::begin_writeback(file, range.start);
    super::sys::begin_writeback(file, range.end - 1);
}

/// Takes space for a whole new file.
pub(super) fn allocate_all(file: &File, size: u64) -> io::Result<()> {
    retry(|| allocate(file, FallocateFlags::empty(), &(0..size)))
}

/// Writes a whole new file with zeroes, and says how far it has come at each tenth.
pub(super) fn fill(file: &File, size: u64, progress: impl Fn(u64)) -> io::Result<()> {
    let tenth = (size / 10).max(1 << 20);
    let mut at = 0;
    while at < size {
        let end = size.min(at + tenth);
        write_zeroes(file, &(at..end))?;
        at = end;
        // Neither product overflows: a file is shorter than 2^63 bytes.
        progress(at / (size / 100).max(1));
    }
    file.sync_data()
}

/// The way that is always there. Beyond the end of a file that is shorter than the disk everything reads as zeroes, and it
/// does not become longer.
fn overwrite_with_zeroes(file: &File, range: &Range<u64>) -> io::Result<()> {
    let metadata = file.metadata()?;
    let end = if metadata.is_file() { range.end.min(metadata.len()) } else { range.end };
    write_zeroes(file, &(range.start..end))
}

/// Writes zeroes. O_DIRECT has its zeroes aligned like everything else.
fn write_zeroes(file: &File, range: &Range<u64>) -> io::Result<()> {
    const CHUNK: u64 = 1 << 20;
    if range.is_empty() {
        return Ok(());
    }
    let chunk = usize::try_from(CHUNK.min(range.end - range.start)).unwrap_or(0);
    let zeroes = super::Buffers::zeroed(chunk).ok_or(io::ErrorKind::OutOfMemory)?;
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(chunk).min(chunk);
        let done = super::sys::write(file, at, &zeroes.slice(0, len), 0)?;
        if done == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        at += done as u64;
    }
    Ok(())
}
