//! Log lines to standard error, and not too many of them: a guest may cause some, and it must not fill the host's log
//! or keep threads busy with it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Logger};
use log::{Level, Log, Metadata, Record};

/// Lines that may come at once.
const BURST: u32 = 200;
/// Time after which there may be one more.
const EACH: Duration = Duration::from_millis(100);

/// Begins to log what the environment variable RUST_LOG chooses.
pub fn begin() {
    let logger =
        Builder::from_env(Env::default().default_filter_or("info")).format_target(false).build();
    log::set_max_level(logger.filter());
    let limited = Limited { logger, bucket: Mutex::new(Bucket::full(Instant::now())) };
    // It fails only if there is one already.
    let _ = log::set_boxed_logger(Box::new(limited));
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
