//! Log lines to standard error, and not too many of them: a guest may cause some, and it must not fill the host's log
//! or keep threads busy with it.
//!
//! Standard error may be a pipe that nobody reads, or a terminal that was stopped: writing to it can block for ever.
//! So a thread of its own writes ([`detach`]); the others put their lines into a bounded queue.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Logger, Target, WriteStyle};
use log::{Level, Log, Metadata, Record};

use crate::sandbox::{self, Role};

/// Lines that may come at once.
const BURST: u32 = 200;
/// Time after which there may be one more.
const EACH: Duration = Duration::from_millis(100);

/// Most bytes that wait to be written; lines beyond that are dropped and counted.
const ROOM: usize = 256 << 10;
/// For how long [`finish`] waits.
const LAST: Duration = Duration::from_secs(2);

/// Begins to log what the environment variable RUST_LOG chooses: at first every line is written by whoever has it.
pub fn begin() {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let logger = Builder::new()
        .write_style(if colours { WriteStyle::Always } else { WriteStyle::Never })
        .parse_env(Env::default().default_filter_or("info"))
        .target(Target::Pipe(Box::new(&LINES)))
        .format_target(false)
        .build();
    log::set_max_level(logger.filter());
    let limited = Limited { logger, bucket: Mutex::new(Bucket::full(Instant::now())) };
    // It fails only if there is one already.
    let _ = log::set_boxed_logger(Box::new(limited));
}

/// From now on a thread writes the lines, and nobody else waits for standard error.
///
/// # Errors
/// If the host has no thread left.
pub fn detach() -> io::Result<()> {
    sandbox::spawn("log".into(), Role::Logger, || LINES.write())?;
    LINES.queue().detached = true;
    Ok(())
}

/// Waits until all lines are written, though not for ever.
pub fn finish() {
    let pending = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
    let waited = LINES.written.wait_timeout_while(LINES.queue(), LAST, pending);
    drop(waited.unwrap_or_else(PoisonError::into_inner));
}

static LINES: Lines =
    Lines { queue: Mutex::new(Queue::empty()), more: Condvar::new(), written: Condvar::new() };

/// Lines on their way to standard error.
struct Lines {
    queue: Mutex<Queue>,
    more: Condvar,
    written: Condvar,
}

struct Queue {
    detached: bool,
    lines: VecDeque<Vec<u8>>,
    /// The sum of their lengths.
    bytes: usize,
    /// Lines dropped since the last one that was not.
    dropped: u64,
    /// A line was taken out and is not written yet.
    writing: bool,
}

impl Queue {
    const fn empty() -> Self {
        let lines = VecDeque::new();
        Queue { detached: false, lines, bytes: 0, dropped: 0, writing: false }
    }

    fn push(&mut self, line: &[u8]) {
        if self.bytes + line.len() > ROOM {
            self.dropped += 1;
            return;
        }
        self.note_dropped();
        self.bytes += line.len();
        self.lines.push_back(line.to_vec());
    }

    /// Says how many lines are missing in this place.
    fn note_dropped(&mut self) {
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            let note = format!("[{dropped} lines were dropped: standard error was not read]\n");
            self.bytes += note.len();
            self.lines.push_back(note.into_bytes());
        }
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        if self.lines.is_empty() {
            self.note_dropped();
        }
        let line = self.lines.pop_front()?;
        self.bytes -= line.len();
        Some(line)
    }
}

impl Lines {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of the thread that writes.
    fn write(&self) {
        let mut queue = self.queue();
        loop {
            let Some(line) = queue.pop() else {
                self.written.notify_all();
                queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.writing = true;
            drop(queue);
            // Who reads it may have gone.
            let _ = io::stderr().write_all(&line);
            queue = self.queue();
            queue.writing = false;
        }
    }
}

/// What the logger writes to: one call for each line.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut queue = self.queue();
        if queue.detached {
            queue.push(line);
            drop(queue);
            self.more.notify_one();
        } else {
            drop(queue);
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Limited {
    logger: Logger,
    bucket: Mutex<Bucket>,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.logger.matches(record) {
            return;
        }
        // Who asked for details wants all of them.
        if log::max_level() <= Level::Info {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            match bucket.take(Instant::now()) {
                None => return,
                Some(0) => {}
                Some(unsaid) => {
                    let mut note = Record::builder();
                    note.level(Level::Warn).target(record.target());
                    let text = format_args!("{unsaid} lines were left out here: too many at once");
                    self.logger.log(&note.args(text).build());
                }
            }
        }
        self.logger.log(record);
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

/// Room for lines, which fills up again with time.
struct Bucket {
    room: u32,
    since: Instant,
    unsaid: u64,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Bucket { room: BURST, since: now, unsaid: 0 }
    }

    /// Takes room for a line; says how many lines had none since the last one that had, or that there is none.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.since).as_millis() / EACH.as_millis();
        let more = u32::try_from(passed).unwrap_or(u32::MAX);
        if more > 0 {
            self.room = self.room.saturating_add(more).min(BURST);
            self.since = now;
        }
        match self.room.checked_sub(1) {
            Some(room) => {
                self.room = room;
                Some(std::mem::take(&mut self.unsaid))
            }
            None => {
                self.unsaid += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_nobody_takes_are_dropped_and_counted() {
        let mut queue = Queue::empty();
        (0..1000).for_each(|_| queue.push(&[b'a'; ROOM / 100]));
        assert_eq!((queue.lines.len(), queue.dropped), (100, 900));
        assert_eq!(queue.pop().unwrap().len(), ROOM / 100);
        // The note stands where they are missing: behind what was there, before what comes.
        queue.push(b"b");
        let rest: Vec<Vec<u8>> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest.len(), 99 + 2);
        assert!(rest[99].starts_with(b"[900 lines"));
        assert_eq!((&rest[100][..], queue.bytes), (&b"b"[..], 0));
        (0..101).for_each(|_| queue.push(&[b'a'; ROOM / 100]));
        let last = std::iter::from_fn(|| queue.pop()).last().unwrap();
        assert!(last.starts_with(b"[1 lines"), "also when no more come");
    }

    #[test]
    fn a_flood_is_cut_off_and_counted() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        let said = (0..1000).filter(|_| bucket.take(start).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(bucket.take(start + EACH), Some(800));
        assert_eq!(bucket.take(start + EACH), None);
        assert_eq!(bucket.take(start + EACH * 3), Some(1));
        assert_eq!(bucket.take(start + EACH * 3), Some(0));
        let later = start + EACH * 100_000;
        assert_eq!((0..1000).filter(|_| bucket.take(later).is_some()).count(), BURST as usize);
    }
}
