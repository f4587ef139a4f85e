//! Log lines to standard error, and not too many of them: a guest may cause some, and it must not fill the host's log
//! or keep threads busy with it.
//!
//! Standard error may be a pipe that nobody reads, or a terminal that was stopped: writing to it can block for ever.
//! So a thread of its own writes ([`detach`]); the others put their lines into a bounded queue. Until there can be a
//! thread, what fits into standard error is written and the rest waits in the queue ([`hold`]).

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Logger, Target, WriteStyle};
use log::{Level, Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sandbox::{self, Role};

/// Lines that may come at once.
const BURST: u32 = 200;
/// Time after which there may be one more.
const EACH: Duration = Duration::from_millis(100);

/// Most bytes that wait to be written; lines beyond that are dropped and counted.
const ROOM: usize = 256 << 10;
/// For how long the end waits for the last lines to be written.
const LAST: Duration = Duration::from_secs(2);

/// What a pipe that can be written to has room for (PIPE_BUF).
const PIECE: usize = 4096;

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

/// From now on nobody waits for standard error, not even a panic: a line that does not fit into it waits in the queue.
pub fn hold() {
    LINES.queue().way = Way::AsItFits;
    std::panic::set_hook(Box::new(tell_panic));
}

/// From now on a thread writes the lines.
///
/// # Errors
/// If the host has no thread left.
pub fn detach() -> io::Result<()> {
    sandbox::spawn("log".into(), Role::Logger, || LINES.write())?;
    LINES.queue().way = Way::Thread;
    Ok(())
}

/// Waits until all lines are written, though not for ever.
pub fn finish() {
    LINES.finish(LINES.queue());
}

/// Says why the program ends, after all other lines.
pub fn finish_with(why: &str) {
    let mut queue = LINES.queue();
    if queue.way == Way::AtOnce {
        drop(queue);
        eprintln!("{why}");
        return;
    }
    queue.append(format!("{why}\n").into_bytes());
    LINES.finish(queue);
}

/// Says what the panic is about, as the standard library does, but does not wait for ever: the abort comes next.
fn tell_panic(panic: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let mut text = format!("\nthread '{}' {panic}\n", thread.name().unwrap_or("<unnamed>"));
    let backtrace = Backtrace::capture();
    text += &match backtrace.status() {
        BacktraceStatus::Captured => format!("stack backtrace:\n{backtrace}"),
        _ => "note: run with `RUST_BACKTRACE=1` for a backtrace\n".into(),
    };
    // The panic may be one of a thread that has the queue.
    let start = Instant::now();
    let mut queue = loop {
        match LINES.queue.try_lock() {
            Ok(queue) => break queue,
            Err(TryLockError::Poisoned(queue)) => break queue.into_inner(),
            Err(TryLockError::WouldBlock) if start.elapsed() > LAST => return,
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
        }
    };
    queue.append(text.into_bytes());
    LINES.finish(queue);
}

/// Whether standard error takes a [`PIECE`], at the latest after so long.
fn has_room(limit: Duration) -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
    poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
}

static LINES: Lines =
    Lines { queue: Mutex::new(Queue::empty()), more: Condvar::new(), written: Condvar::new() };

/// Lines on their way to standard error.
struct Lines {
    queue: Mutex<Queue>,
    more: Condvar,
    written: Condvar,
}

/// How a line comes to standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Whoever has it writes it, and waits.
    AtOnce,
    /// Whoever has it writes what can be written without waiting, and queues the rest.
    AsItFits,
    /// By the thread for it.
    Thread,
}

struct Queue {
    way: Way,
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
        Queue { way: Way::AtOnce, lines, bytes: 0, dropped: 0, writing: false }
    }

    fn push(&mut self, line: &[u8]) {
        if self.bytes + line.len() > ROOM {
            self.dropped += 1;
            return;
        }
        self.append(line.to_vec());
    }

    /// Also where there is no room.
    fn append(&mut self, line: Vec<u8>) {
        self.note_dropped();
        self.bytes += line.len();
        self.lines.push_back(line);
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

    /// Writes as long as it need not wait longer than that in all.
    fn write_as_it_fits(&mut self, limit: Duration) {
        let start = Instant::now();
        while let Some(mut line) = self.pop() {
            while !line.is_empty() {
                if !has_room(limit.saturating_sub(start.elapsed())) {
                    self.bytes += line.len();
                    return self.lines.push_front(line);
                }
                let rest = line.split_off(line.len().min(PIECE));
                // Who reads it may have gone.
                let _ = io::stderr().write_all(&line);
                line = rest;
            }
        }
    }
}

impl Lines {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all lines written, and does not wait for ever.
    fn finish(&self, mut queue: MutexGuard<'_, Queue>) {
        if queue.way != Way::Thread {
            return queue.write_as_it_fits(LAST);
        }
        self.more.notify_one();
        let pending = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        let waited = self.written.wait_timeout_while(queue, LAST, pending);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
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
        match queue.way {
            Way::AtOnce => {
                drop(queue);
                io::stderr().write_all(line)?;
            }
            Way::AsItFits => {
                queue.push(line);
                queue.write_as_it_fits(Duration::ZERO);
            }
            Way::Thread => {
                queue.push(line);
                drop(queue);
                self.more.notify_one();
            }
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
