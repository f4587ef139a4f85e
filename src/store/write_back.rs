//! What became of writes after they were answered: the host writes them back later, and may fail.
//!
//! Linux tells of that once for each open file, to whoever flushes it next by whatever call (errseq_t), and takes the
//! pages for clean from then on: the next flush succeeds over data that is lost. All initiators share one open file. So
//! a failure is kept here until the image is opened anew, and in the meantime nobody is told that anything is stable.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Cause, StoreError, sys};

/// Parts of a file in which writes are looked for, and 64-bit words for one bit each.
const PARTS: u64 = 4096;
const WORDS: usize = 64;

/// A part is at least so long, in bytes.
const SHORTEST_PART: u64 = 64 << 10;

/// Ranges that are named in one line of the log.
const NAMED: usize = 8;

/// A bit for each part of a file.
type Bits = [u64; WORDS];

/// The write-back of one file.
#[derive(Debug)]
pub struct WriteBack {
    name: String,
    /// The file, opened once more. Nobody flushes by it, so that it is told of every failure, whichever of several flushes
    /// at a time the kernel tells through the other.
    witness: Option<File>,
    /// A flush that finds no room has lost nothing, where the witness does not say so.
    may_lack_room: bool,
    failed: AtomicBool,
    written: Written,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Why it failed first.
    cause: Option<Cause>,
    /// What was written before each flush under way.
    flushing: Vec<(u64, Bits)>,
    next: u64,
    /// A flush has succeeded: what others wrote before this start is stable.
    flushed: bool,
    /// Where something may be lost.
    lost: Bits,
}

/// Where something was written that no flush has covered.
#[derive(Debug)]
struct Written {
    /// Length of a part, as a power of two.
    shift: u32,
    parts: [AtomicU64; WORDS],
}

impl Written {
    fn in_file(size: u64) -> Self {
        let part = size.div_ceil(PARTS).max(SHORTEST_PART);
        let shift = part.checked_next_power_of_two().unwrap_or(1 << 62).ilog2();
        Written { shift, parts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// The last part has what the file has grown by.
    fn part(&self, at: u64) -> u64 {
        (at >> self.shift).min(PARTS - 1)
    }

    #[inline]
    fn mark(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for part in self.part(range.start)..=self.part(range.end - 1) {
            let word = usize::try_from(part / 64).ok().and_then(|word| self.parts.get(word));
            let bit = 1 << (part % 64);
            // Queues share these lines, and nearly always the bit is set already.
            if let Some(word) = word.filter(|word| word.load(Ordering::Acquire) & bit == 0) {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    fn take(&self) -> Bits {
        self.parts.each_ref().map(|word| word.swap(0, Ordering::AcqRel))
    }

    fn add(&self, more: &Bits) {
        self.parts.iter().zip(more).for_each(|(word, more)| {
            word.fetch_or(*more, Ordering::AcqRel);
        });
    }

    fn now(&self) -> Bits {
        self.parts.each_ref().map(|word| word.load(Ordering::Acquire))
    }

    /// The ranges that these parts are.
    fn ranges(&self, parts: &Bits) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let words = parts.iter().zip((0..).step_by(64));
        let set = words.flat_map(|(word, first)| {
            (first..first + 64).zip(0..).filter(move |(_, bit)| word & (1 << bit) != 0)
        });
        for (part, _) in set {
            let start: u64 = part << self.shift;
            // The last one has no end.
            let end = if part == PARTS - 1 { u64::MAX } else { start + (1 << self.shift) };
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

fn add(to: &mut Bits, more: &Bits) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to |= more);
}

/// Ranges as people read them.
struct Ranges(Vec<Range<u64>>);

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, range) in self.0.iter().take(NAMED).enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            match range.end {
                u64::MAX => write!(f, "{comma}{} to the end", range.start)?,
                end => write!(f, "{comma}{}-{}", range.start, end - 1)?,
            }
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} ranges more"),
        }
    }
}

impl WriteBack {
    /// Of a file of `size` bytes that is called so in the log. `witness` is the same file, opened once more.
    pub(super) fn of(name: String, size: u64, witness: Option<File>) -> Self {
        let (cause, flushing, lost) = (None, Vec::new(), [0; WORDS]);
        WriteBack {
            name,
            witness,
            may_lack_room: false,
            failed: AtomicBool::new(false),
            written: Written::in_file(size),
            state: Mutex::new(State { cause, flushing, next: 0, flushed: false, lost }),
        }
    }

    /// The same on a file system that may have no room for a flush, and have it later (btrfs).
    pub(super) fn short_of_room(self) -> Self {
        WriteBack { may_lack_room: true, ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was written that is not stable yet.
    #[inline]
    pub fn mark(&self, range: Range<u64>) {
        self.written.mark(range);
    }

    /// Whether it has failed, as far as is known, and why.
    #[inline]
    pub fn failure(&self) -> Option<StoreError> {
        self.failed.load(Ordering::Acquire).then(|| self.error())
    }

    #[cold]
    fn error(&self) -> StoreError {
        StoreError::lost(self.state().cause.unwrap_or(Cause::Medium))
    }

    /// Nothing can be called stable when it has failed.
    ///
    /// # Errors
    /// Then.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Whether it has failed; the host is asked, which takes no flush.
    pub fn look(&self) -> Option<StoreError> {
        let _ = self.judge(&mut self.state(), Ok(()), &[0; WORDS]);
        self.failure()
    }

    /// Does a call that makes everything stable that was written before; it is told whether there can be anything. What has
    /// failed before that is another question ([`WriteBack::check`]).
    ///
    /// # Errors
    /// If it could not, or the host tells of another failure meanwhile.
    pub(super) fn flush(
        &self,
        call: impl FnOnce(bool) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let (number, some) = {
            let mut state = self.state();
            let (number, before) = (state.next, self.written.take());
            // What another flush has not made stable yet is this one's, too.
            let some = before != [0; WORDS] || !state.flushing.is_empty() || !state.flushed;
            state.next += 1;
            state.flushing.push((number, before));
            (number, some)
        };
        let done = call(some);
        let mut state = self.state();
        let own = state.flushing.iter().position(|(other, _)| *other == number);
        let (_, before) =
            own.map_or((number, [0; WORDS]), |place| state.flushing.swap_remove(place));
        let judged = self.judge(&mut state, done, &before);
        state.flushed |= judged.is_ok();
        judged
    }

    /// What came of a flush. The witness is asked by one at a time, who notes what it says before the next is.
    fn judge(
        &self,
        state: &mut State,
        done: io::Result<()>,
        before: &Bits,
    ) -> Result<(), StoreError> {
        let told = self.witness.as_ref().map_or(Ok(()), sys::write_back_error);
        let cause = |error: &io::Error| Cause::from(error);
        match (&told, &done) {
            (Ok(()), Ok(())) => Ok(()),
            // This is about what is lost; a flush may also say what became of its file system since.
            (Err(error), _) => Err(self.note(state, cause(error), before)),
            (Ok(()), Err(error)) if self.may_lack_room && cause(error) == Cause::NoSpace => {
                self.written.add(before);
                Err(Cause::NoSpace.into())
            }
            (Ok(()), Err(error)) => Err(self.note(state, cause(error), before)),
        }
    }

    /// It has failed.
    pub(super) fn fail(&self, cause: Cause) -> StoreError {
        self.note(&mut self.state(), cause, &[0; WORDS])
    }

    fn note(&self, state: &mut State, cause: Cause, before: &Bits) -> StoreError {
        // Nobody knows any more what it was short of, and doing it again does not help.
        let cause = if cause == Cause::Busy { Cause::Medium } else { cause };
        let known = state.lost;
        add(&mut state.lost, before);
        add(&mut state.lost, &self.written.now());
        let flushing = state.flushing.iter().fold([0; WORDS], |mut all, (_, bits)| {
            add(&mut all, bits);
            all
        });
        add(&mut state.lost, &flushing);
        let (name, why) = (&self.name, StoreError::from(cause));
        let lost = self.written.ranges(&state.lost);
        let lost = if lost.is_empty() { std::iter::once(0..u64::MAX).collect() } else { lost };
        if state.cause.is_none() {
            log::error!(
                "{name}: the host could not write back what was written to it ({why}): what was written since the \
                 last flush may be lost, in bytes {}. Flushes and stable writes of it fail from now on, until it is \
                 opened anew: mend the cause, look at the data, restart thinlun",
                Ranges(lost)
            );
        } else if state.lost != known {
            log::error!(
                "{name}: write-back has failed again ({why}): what may be lost is in bytes {}",
                Ranges(lost)
            );
        }
        state.cause.get_or_insert(cause);
        self.failed.store(true, Ordering::Release);
        StoreError::lost(cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(errno: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    fn write_back(size: u64) -> WriteBack {
        WriteBack::of("test".into(), size, None)
    }

    fn lost(write_back: &WriteBack) -> String {
        let parts = write_back.state().lost;
        Ranges(write_back.written.ranges(&parts)).to_string()
    }

    #[test]
    fn a_failure_stays() {
        let one = write_back(1 << 20);
        one.flush(|_| Ok(())).unwrap();
        assert_eq!((one.check(), one.look()), (Ok(()), None));
        let error = StoreError::lost(Cause::NoSpace);
        assert_eq!(one.flush(|_| failing(libc::ENOSPC)), Err(error));
        assert_eq!((one.check(), one.look()), (Err(error), Some(error)));
        // What is told last does not hide what was told first.
        assert_eq!(one.flush(|_| failing(libc::EIO)), Err(StoreError::lost(Cause::Medium)));
        assert_eq!(one.check(), Err(error));
        // There is no waiting for better times.
        let other = write_back(1 << 20);
        other.flush(|_| failing(libc::ENOMEM)).unwrap_err();
        assert_eq!(other.check(), Err(StoreError::lost(Cause::Medium)));
    }

    #[test]
    fn what_may_be_lost_is_what_no_flush_has_covered() {
        let one = write_back(4 << 20);
        one.mark(0..1);
        one.flush(|_| Ok(())).unwrap();
        one.mark(65536..65537);
        one.mark(131071..131073);
        one.mark(1 << 20..1 << 20);
        // Written while the flush is under way: it may be covered, or not.
        let flushed = one.flush(|_| {
            one.mark((2 << 20) + 5..(2 << 20) + 6);
            failing(libc::EIO)
        });
        flushed.unwrap_err();
        assert_eq!(lost(&one), "65536-196607, 2097152-2162687");
        one.mark(300 << 20..301 << 20);
        one.flush(|_| failing(libc::EIO)).unwrap_err();
        assert!(lost(&one).ends_with("268369920 to the end"), "{}", lost(&one));
    }

    #[test]
    fn a_flush_that_fails_tells_of_those_beside_it() {
        let one = write_back(4 << 20);
        one.mark(0..1);
        // The inner one is told what the outer one's writes have met.
        one.flush(|_| {
            one.flush(|_| failing(libc::EIO)).unwrap_err();
            Ok(())
        })
        .unwrap();
        assert_eq!(lost(&one), "0-65535");
        assert!(one.check().is_err(), "which the outer one is to look at");
        let other = write_back(4 << 20);
        other.mark(0..1);
        other
            .flush(|_| {
                other.flush(|_| Ok(())).unwrap();
                Ok(())
            })
            .unwrap();
        other.mark(65536..65537);
        other.flush(|_| failing(libc::EIO)).unwrap_err();
        assert_eq!(lost(&other), "65536-131071");
    }

    #[test]
    fn a_flush_without_room_has_lost_nothing_where_that_can_be() {
        let one = write_back(1 << 20).short_of_room();
        one.mark(65536..65537);
        assert_eq!(one.flush(|_| failing(libc::EDQUOT)), Err(Cause::NoSpace.into()));
        assert_eq!(one.flush(|_| failing(libc::ENOSPC)), Err(Cause::NoSpace.into()));
        assert_eq!(one.check(), Ok(()));
        one.flush(|_| failing(libc::EIO)).unwrap_err();
        assert_eq!((one.check().is_err(), lost(&one).as_str()), (true, "65536-131071"));
    }

    #[test]
    fn a_flush_knows_whether_there_is_anything_to_flush() {
        let one = write_back(1 << 20);
        let some = |write_back: &WriteBack| {
            let told = std::cell::Cell::new(false);
            let tell = |some| {
                told.set(some);
                Ok(())
            };
            write_back.flush(tell).unwrap();
            told.get()
        };
        assert!(some(&one), "of others, before the start");
        assert!(!some(&one));
        one.mark(0..1);
        let during = |_| {
            assert!(some(&one), "of the one that is under way");
            Ok(())
        };
        one.flush(during).unwrap();
        assert!(!some(&one));
        let other = write_back(1 << 20).short_of_room();
        other.flush(|_| failing(libc::ENOSPC)).unwrap_err();
        assert!(some(&other), "one that had no room has covered nothing");
        assert!(!some(&other));
    }

    #[test]
    fn many_ranges_are_not_all_named() {
        let one = write_back(64 << 20);
        (0..20u64).for_each(|n| one.mark(n << 17..(n << 17) + 1));
        one.flush(|_| failing(libc::EIO)).unwrap_err();
        assert!(lost(&one).ends_with("917504-983039 and 12 ranges more"), "{}", lost(&one));
    }
}
