//! Format and sanitize operations: long, on their own thread, and not over before they are over. While
//! one runs, or after one failed, the disk takes few other commands; neither a reset nor a restart of
//! the program changes that (SBC-4 4.33, 4.11).

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fill::Fill;
use super::lun::Lun;
use super::sense::{Key, KeySpecific, ScsiError, Sense, asc};
use crate::store::Cause;
use crate::store::engine::Cancel;

/// The name that an operation is noted under while it has not ended well.
const NOTE: &str = "operation";

/// How often a command that waits for the end looks whether it was aborted.
const LOOK: Duration = Duration::from_millis(50);

/// An operation on the whole medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// FORMAT UNIT.
    Format(Fill),
    /// SANITIZE.
    Sanitize {
        /// The contents after the last pass.
        fill: Fill,
        /// Overwrite passes, at least one.
        passes: u8,
        /// Each pass but the last is the inverse of the next.
        invert: bool,
        /// AUSE: a failure may be left by EXIT FAILURE MODE.
        unrestricted_exit: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Running(Work),
    Failed(Work),
}

/// The operation of one disk.
#[derive(Debug)]
pub struct Background {
    state: Mutex<State>,
    ended: Condvar,
    /// Whether the state is anything but idle: what every command looks at.
    occupied: AtomicBool,
    /// How far it is, in 65536ths.
    progress: AtomicU16,
    /// Operations that have begun.
    begun: AtomicU64,
}

/// Names an operation that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started(u64);

/// How a command gets along with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// It only says what is known without the medium.
    Always,
    /// It changes something other than the medium.
    AfterFailedFormat,
    /// It uses the medium.
    Never,
    /// It is what mends a medium whose operation failed.
    Mends,
}

impl Background {
    /// Nothing under way.
    pub fn idle() -> Self {
        Background {
            state: Mutex::new(State::Idle),
            ended: Condvar::new(),
            occupied: AtomicBool::new(false),
            progress: AtomicU16::new(0),
            begun: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn become_state(&self, state: State) {
        self.occupied.store(state != State::Idle, Ordering::Release);
        *self.state() = state;
        self.ended.notify_all();
    }

    /// What REQUEST SENSE has to say about it.
    pub fn sense(&self) -> Option<Sense> {
        self.occupied.load(Ordering::Acquire).then(|| self.sense_of(&self.state())).flatten()
    }

    fn sense_of(&self, state: &State) -> Option<Sense> {
        let (key, asc, specific) = match state {
            State::Idle => return None,
            State::Running(work) => {
                let progress = KeySpecific::Progress(self.progress.load(Ordering::Acquire));
                (Key::NotReady, work.in_progress(), Some(progress))
            }
            State::Failed(work) => (Key::MediumError, work.failed(), None),
        };
        Some(Sense { specific, ..Sense::new(key, asc) })
    }

    /// Whether a command may run now.
    ///
    /// # Errors
    /// 02/04/04 or 02/04/1B with the progress while an operation runs, 03/31/00 or 03/31/03 after one
    /// has failed.
    #[inline]
    pub fn check(&self, tolerance: Tolerance) -> Result<(), ScsiError> {
        match self.occupied.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.check_occupied(tolerance),
        }
    }

    #[cold]
    fn check_occupied(&self, tolerance: Tolerance) -> Result<(), ScsiError> {
        if tolerance == Tolerance::Always {
            return Ok(());
        }
        let state = self.state();
        let passes = match (&*state, tolerance) {
            (State::Failed(_), Tolerance::Mends) => true,
            (State::Failed(Work::Format(_)), Tolerance::AfterFailedFormat) => true,
            (State::Idle | State::Running(_) | State::Failed(_), _) => false,
        };
        match self.sense_of(&state) {
            Some(sense) if !passes => Err(ScsiError::Check(sense)),
            _ => Ok(()),
        }
    }

    /// Waits for the end of an operation that was started.
    ///
    /// # Errors
    /// If it failed, or somebody aborted the command that waits (the operation goes on then), or another has begun
    /// meanwhile: then nobody knows any more what came of this one.
    pub fn wait(&self, started: Started, cancel: &Cancel) -> Result<(), ScsiError> {
        let mut state = self.state();
        loop {
            if self.begun.load(Ordering::Acquire) != started.0 {
                return Err(ScsiError::Aborted);
            }
            match &*state {
                State::Idle => return Ok(()),
                State::Running(_) if cancel.is_requested() => return Err(ScsiError::Aborted),
                State::Running(_) => {}
                State::Failed(_) => {
                    let sense = self.sense_of(&state);
                    return sense.map_or(Ok(()), |sense| Err(ScsiError::Check(sense)));
                }
            }
            let waited = self.ended.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// EXIT FAILURE MODE. Blocks.
    ///
    /// # Errors
    /// 05/24/00 if the sanitize operation that failed does not allow it.
    pub fn exit_failure_mode(&self, lun: &Lun) -> Result<(), ScsiError> {
        let state = self.state().clone();
        match state {
            State::Failed(Work::Sanitize { unrestricted_exit: true, .. }) => {
                note(lun, None)?;
                self.become_state(State::Idle);
                Ok(())
            }
            State::Failed(Work::Sanitize { .. }) => Err(ScsiError::cdb_field(1, 4)),
            State::Idle | State::Running(_) | State::Failed(Work::Format(_)) => Ok(()),
        }
    }
}

/// Starts an operation, which is noted before anything happens. Blocks for the note. `first` comes before it on its thread,
/// when the disk takes no commands any more.
///
/// # Errors
/// If one is under way, or only another would mend the disk, or it cannot be noted, or there is no thread for it, or
/// nothing of the disk can be called stable.
pub fn start(
    lun: &Arc<Lun>,
    work: Work,
    first: impl FnOnce() + Send + 'static,
) -> Result<Started, ScsiError> {
    if let Some(loss) = lun.loss() {
        // It would fail at its end, when it is made stable.
        return Err(ScsiError::from_store(loss, true, lun.block_size()));
    }
    let background = lun.background();
    let (before, started) = {
        let mut state = background.state();
        let conflict = match &*state {
            State::Idle | State::Failed(Work::Format(_)) => false,
            State::Running(_) => true,
            State::Failed(Work::Sanitize { .. }) => matches!(work, Work::Format(_)),
        };
        if conflict && let Some(sense) = background.sense_of(&state) {
            return Err(ScsiError::Check(sense));
        }
        background.progress.store(0, Ordering::Release);
        background.occupied.store(true, Ordering::Release);
        let started = Started(background.begun.fetch_add(1, Ordering::AcqRel) + 1);
        (std::mem::replace(&mut *state, State::Running(work.clone())), started)
    };
    // There is a thread for it before it is noted, so that nothing is noted that does not run.
    let noted = spawn(lun, work.clone(), first).and_then(|begin| {
        note(lun, Some(&format!("running {}", work.encode())))?;
        Ok(begin)
    });
    match noted {
        Ok(begin) => {
            let _ = begin.send(());
            Ok(started)
        }
        Err(error) => {
            background.become_state(before);
            Err(error)
        }
    }
}

/// Takes up what was noted: an operation that was under way begins again, one that had failed still
/// has.
pub fn resume(lun: &Arc<Lun>) {
    let Some(noted) = lun.store().notes().get(NOTE) else { return };
    let (state, work) = noted.split_once(' ').unwrap_or(("failed", &noted));
    // What cannot be read was an operation all the same: the disk has to be formatted again.
    let work = Work::decode(work, lun.block_size());
    let (work, known) = (work.clone().unwrap_or(Work::Format(Fill::Deallocated)), work.is_some());
    let background = lun.background();
    if state == "running" && known && !lun.store().capabilities().read_only {
        log::info!("{}: {} begins again", lun.settings().serial, work.name());
        background.become_state(State::Running(work.clone()));
        match spawn(lun, work.clone(), || {}) {
            Ok(begin) => drop(begin.send(())),
            Err(_) => {
                log::error!(
                    "{}: no thread for it; it is repeated at the next start",
                    lun.settings().serial
                );
                background.become_state(State::Failed(work));
            }
        }
    } else {
        log::warn!(
            "{}: {} has failed before and must be repeated",
            lun.settings().serial,
            work.name()
        );
        background.become_state(State::Failed(work));
    }
}

/// Makes the thread of an operation, which begins when it is told to, and ends if nobody will.
fn spawn(
    lun: &Arc<Lun>,
    work: Work,
    first: impl FnOnce() + Send + 'static,
) -> Result<Sender<()>, ScsiError> {
    let on = Arc::clone(lun);
    let (begin, begins) = mpsc::channel();
    // Commands wait for it, as many as the pool has threads.
    let spawned = lun.store().pool().run_apart(Box::new(move || {
        if begins.recv().is_err() {
            return;
        }
        first();
        let (background, serial) = (on.background(), &on.settings().serial);
        // An operation has ended when a restart will not repeat it.
        let done = work.run(&on).and_then(|()| note(&on, None));
        let state = match done {
            Ok(()) => {
                log::info!("{serial}: {} is done", work.name());
                State::Idle
            }
            Err(error) => {
                log::error!("{serial}: {} failed: {error:?}", work.name());
                if note(&on, Some(&format!("failed {}", work.encode()))).is_err() {
                    log::error!(
                        "{serial}: nor could that be noted: it is repeated at the next start"
                    );
                }
                State::Failed(work)
            }
        };
        background.become_state(state);
    }));
    spawned.map(|()| begin).map_err(|_| ScsiError::Busy)
}

fn note(lun: &Lun, text: Option<&str>) -> Result<(), ScsiError> {
    let noted = lun.store().notes().set(NOTE, text);
    noted.map_err(|error| match error.cause {
        // There is no block to name: it is the note that has no room.
        Cause::Busy => ScsiError::Busy,
        Cause::NoSpace | Cause::ReadOnly => ScsiError::from_store(error.cause.into(), true, 1),
        _ => ScsiError::Check(Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE)),
    })
}

impl Work {
    fn is_format(&self) -> bool {
        matches!(self, Work::Format(_))
    }

    fn in_progress(&self) -> super::sense::Asc {
        match self.is_format() {
            true => asc::NOT_READY_FORMAT_IN_PROGRESS,
            false => asc::NOT_READY_SANITIZE_IN_PROGRESS,
        }
    }

    fn failed(&self) -> super::sense::Asc {
        match self.is_format() {
            true => asc::MEDIUM_FORMAT_CORRUPTED,
            false => asc::SANITIZE_COMMAND_FAILED,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Work::Format(_) => "format",
            Work::Sanitize { fill: Fill::Pattern(_), .. } => "sanitize (overwrite)",
            Work::Sanitize { .. } => "sanitize (block erase)",
        }
    }

    /// The contents of each pass. With INVERT they alternate, and the last is as it was given (SBC-4
    /// 5.30.2.2).
    fn passes(&self) -> Vec<Fill> {
        match self {
            Work::Format(fill) => vec![fill.clone()],
            Work::Sanitize { fill, passes, invert, .. } => {
                let pass = |left: u8| match fill {
                    Fill::Pattern(block) if *invert && left % 2 == 1 => {
                        Fill::Pattern(block.iter().map(|byte| !byte).collect())
                    }
                    _ => fill.clone(),
                };
                (0..*passes).rev().map(pass).collect()
            }
        }
    }

    /// Does all of it and makes it last.
    fn run(&self, lun: &Lun) -> Result<(), ScsiError> {
        let whole = lun.bytes(0, lun.blocks())?;
        let passes = self.passes();
        let total = u128::from(whole.end) * passes.len().max(1) as u128;
        for (number, pass) in passes.iter().enumerate() {
            let before = u128::from(whole.end) * number as u128;
            pass.run_on_all(lun, whole.clone(), |done| {
                let part = (before + u128::from(done)) * 65536 / total.max(1);
                let part = u16::try_from(part).unwrap_or(u16::MAX);
                lun.background().progress.store(part, Ordering::Release);
                Ok(())
            })?;
            // Each pass reaches the medium before the next begins.
            lun.settle(crate::store::Durability::Stable)?;
        }
        Ok(())
    }

    /// One line of text that [`Work::decode`] understands.
    fn encode(&self) -> String {
        let fill = |fill: &Fill| match fill {
            Fill::Deallocated => "deallocate".to_owned(),
            Fill::Anchored => "zero".to_owned(),
            Fill::Pattern(block) => block.iter().map(|byte| format!("{byte:02x}")).collect(),
        };
        match self {
            Work::Format(contents) => format!("format {}", fill(contents)),
            Work::Sanitize { fill: contents, passes, invert, unrestricted_exit } => {
                let (invert, exit) = (u8::from(*invert), u8::from(*unrestricted_exit));
                format!("sanitize {} {passes} {invert} {exit}", fill(contents))
            }
        }
    }

    fn decode(text: &str, block_size: u32) -> Option<Self> {
        let fill = |text: &str| match text {
            "deallocate" => Some(Fill::Deallocated),
            "zero" => Some(Fill::Anchored),
            hex => {
                let byte = |n| u8::from_str_radix(hex.get(2 * n..2 * n + 2)?, 16).ok();
                let block: Option<Vec<u8>> = (0..block_size as usize).map(byte).collect();
                block.map(Fill::Pattern)
            }
        };
        let flag = |text: &str| (text == "1").then_some(true).or((text == "0").then_some(false));
        match text.split(' ').collect::<Vec<_>>().as_slice() {
            ["format", contents] => Some(Work::Format(fill(contents)?)),
            ["sanitize", contents, passes, invert, exit] => Some(Work::Sanitize {
                fill: fill(contents)?,
                passes: passes.parse().ok().filter(|passes| *passes > 0)?,
                invert: flag(invert)?,
                unrestricted_exit: flag(exit)?,
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_noted_and_understood_again() {
        let pattern = Fill::Pattern((0..=255).cycle().take(512).collect());
        for fill in [Fill::Deallocated, Fill::Anchored, pattern] {
            let sanitize = Work::Sanitize {
                fill: fill.clone(),
                passes: 31,
                invert: true,
                unrestricted_exit: false,
            };
            for work in [Work::Format(fill), sanitize] {
                assert_eq!(Work::decode(&work.encode(), 512), Some(work));
            }
        }
        for text in ["", "format", "format 00", "sanitize zero 0 0 0", "sanitize zero 1 2 0"] {
            assert_eq!(Work::decode(text, 512), None, "{text}");
        }
    }

    #[test]
    fn the_last_pass_is_what_was_asked_for() {
        let work = |passes, invert| Work::Sanitize {
            fill: Fill::Pattern(vec![0x0f]),
            passes,
            invert,
            unrestricted_exit: false,
        };
        let bytes = |work: Work| -> Vec<u8> {
            let byte = |fill: &Fill| match fill {
                Fill::Pattern(block) => block[0],
                _ => panic!(),
            };
            work.passes().iter().map(byte).collect()
        };
        assert_eq!(bytes(work(3, false)), [0x0f; 3]);
        assert_eq!(bytes(work(3, true)), [0x0f, 0xf0, 0x0f]);
        assert_eq!(bytes(work(2, true)), [0xf0, 0x0f]);
    }
}
