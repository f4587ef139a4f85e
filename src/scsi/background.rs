//! Format and sanitize operations: long, on their own thread, and not over before they are over. While
//! one runs, or after one failed, the disk takes few other commands; neither a reset nor a restart of
//! the program changes that (SBC-4 4.33, 4.11).
//!
//! An operation goes on only while commands can come, for only then the disk is surely this process's: when the last way for
//! them ends, the operation stops and notes how far it is, and whoever is the next to take commands goes on from there. He
//! looks for the note then, not when he starts, which may be before the operation did.
//!
//! The first block is the last to get its new contents. Until then it holds a mark that the note names, so that an image
//! that has been replaced meanwhile, by name or in place, is not erased by a note that was about another.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fill::Fill;
use super::lun::Lun;
use super::sense::{Key, KeySpecific, ScsiError, Sense, asc};
use crate::store::engine::Cancel;
use crate::store::{Buffers, Cause, Durability, StoreError};

/// The name that an operation is noted under while it has not ended well.
const NOTE: &str = "operation";

/// How often a command that waits for the end looks whether it was aborted.
const LOOK: Duration = Duration::from_millis(50);

/// How long it takes until a host that had nothing left may have something again.
const SOON: Duration = Duration::from_millis(100);

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
    /// Stopped, and noted: whoever is the next to take commands goes on.
    Left(Work),
    /// Commands can come again, and it is being found out what is noted; or, once that is known, put into force.
    Unknown {
        known: bool,
    },
    /// What lies beside the image needs a person.
    Refused,
}

/// The operation of one disk.
#[derive(Debug)]
pub struct Background {
    state: Mutex<State>,
    ended: Condvar,
    /// Whether the state is anything but idle: what every command looks at. Changed with it.
    occupied: AtomicBool,
    /// How far it is, in 65536ths.
    progress: AtomicU16,
    /// Operations that have begun.
    begun: AtomicU64,
    /// Commands can come. Changed with the state locked.
    served: AtomicBool,
    /// How often they could not before. As `served`.
    takeovers: AtomicU64,
    /// Held by who begins an operation or leaves the failure of one, which waits for the host.
    changing: Mutex<()>,
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
    /// Nothing under way, and commands can come.
    pub fn idle() -> Self {
        Background {
            state: Mutex::new(State::Idle),
            ended: Condvar::new(),
            occupied: AtomicBool::new(false),
            progress: AtomicU16::new(0),
            begun: AtomicU64::new(0),
            served: AtomicBool::new(true),
            takeovers: AtomicU64::new(0),
            changing: Mutex::new(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn become_state(&self, state: State) {
        self.put(&mut self.state(), state);
    }

    /// Puts another state in the place of this one, which is locked; returns this one.
    fn put(&self, state: &mut State, new: State) -> State {
        self.occupied.store(new != State::Idle, Ordering::Release);
        self.ended.notify_all();
        std::mem::replace(state, new)
    }

    /// What REQUEST SENSE has to say about it.
    pub fn sense(&self) -> Option<Sense> {
        self.occupied.load(Ordering::Acquire).then(|| self.sense_of(&self.state())).flatten()
    }

    fn sense_of(&self, state: &State) -> Option<Sense> {
        let (key, asc, specific) = match state {
            State::Idle | State::Unknown { .. } => return None,
            State::Running(work) | State::Left(work) => {
                let progress = KeySpecific::Progress(self.progress.load(Ordering::Acquire));
                (Key::NotReady, work.in_progress(), Some(progress))
            }
            State::Failed(work) => (Key::MediumError, work.failed(), None),
            State::Refused => (Key::NotReady, asc::NOT_READY_MANUAL_INTERVENTION_REQUIRED, None),
        };
        Some(Sense { specific, ..Sense::new(key, asc) })
    }

    /// Why nothing can be begun in a state.
    fn refusal(&self, state: &State) -> ScsiError {
        self.sense_of(state).map_or(ScsiError::Busy, ScsiError::Check)
    }

    /// Whether a command may run now.
    ///
    /// # Errors
    /// 02/04/04 or 02/04/1B with the progress while an operation runs, 03/31/00 or 03/31/03 after one
    /// has failed, BUSY while it is not known whether one does, 02/04/03 if that cannot be known.
    #[inline]
    pub fn check(&self, tolerance: Tolerance) -> Result<(), ScsiError> {
        match self.occupied.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.check_occupied(tolerance),
        }
    }

    /// BUSY while it is not known what is noted: registrations, mode pages and names among it, which are not to be told as
    /// they were before another process served the disk.
    ///
    /// # Errors
    /// Then.
    #[inline]
    pub fn check_known(&self) -> Result<(), ScsiError> {
        match self.occupied.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.check_unknown(),
        }
    }

    #[cold]
    fn check_unknown(&self) -> Result<(), ScsiError> {
        let state = self.state();
        match &*state {
            State::Unknown { .. } => Err(self.refusal(&state)),
            _ => Ok(()),
        }
    }

    #[cold]
    fn check_occupied(&self, tolerance: Tolerance) -> Result<(), ScsiError> {
        if tolerance == Tolerance::Always {
            return Ok(());
        }
        let state = self.state();
        match (&*state, tolerance) {
            (State::Idle, _) => Ok(()),
            (State::Failed(_), Tolerance::Mends) => Ok(()),
            (State::Failed(Work::Format(_)), Tolerance::AfterFailedFormat) => Ok(()),
            _ => Err(self.refusal(&state)),
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
                State::Failed(_) => return Err(self.refusal(&state)),
                State::Left(_) | State::Unknown { .. } | State::Refused => {
                    return Err(ScsiError::Aborted);
                }
            }
            let waited = self.ended.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// EXIT FAILURE MODE. Blocks.
    ///
    /// # Errors
    /// 05/24/00 if the sanitize operation that failed does not allow it, as [`Background::check`] if one has begun since.
    pub fn exit_failure_mode(&self, lun: &Lun) -> Result<(), ScsiError> {
        // Nothing begins between the look and the end of it.
        let _alone = self.change();
        let state = self.state().clone();
        match state {
            State::Failed(Work::Sanitize { unrestricted_exit: true, .. }) => {
                note(lun, None)?;
                self.become_state(State::Idle);
                Ok(())
            }
            State::Failed(Work::Sanitize { .. }) => Err(ScsiError::cdb_field(1, 4)),
            State::Idle | State::Failed(Work::Format(_)) => Ok(()),
            State::Running(_) | State::Left(_) | State::Unknown { .. } | State::Refused => {
                Err(self.refusal(&state))
            }
        }
    }

    fn is_served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }

    /// No more commands come: an operation stops at its next step, and what was not known yet stays so.
    pub fn leave(&self) {
        let _locked = self.state();
        self.served.store(false, Ordering::Release);
    }

    /// Waits until nothing goes on any more that changes the medium or what is noted of it, or commands can come again.
    pub fn wait_until_left(&self) {
        let goes_on = |state: &mut State| {
            let changes = matches!(state, State::Running(_) | State::Unknown { known: true });
            changes && !self.is_served()
        };
        drop(self.ended.wait_while(self.state(), goes_on));
    }

    /// Waits until it is known what is noted, for so long at most.
    pub fn wait_until_known(&self, end: Instant) {
        let unknown = |state: &mut State| matches!(state, State::Unknown { .. });
        let most = end.saturating_duration_since(Instant::now());
        drop(self.ended.wait_timeout_while(self.state(), most, unknown));
    }

    /// It is known what is noted: puts that into force, unless that was found out for an earlier time.
    fn is_known(&self, takeover: u64) -> bool {
        let mut state = self.state();
        let still = self.is_served() && self.takeovers.load(Ordering::Acquire) == takeover;
        if still {
            self.put(&mut state, State::Unknown { known: true });
        }
        still
    }
}

/// Commands can come again: finds out what is noted, on the disk's own threads, and goes on with it. Until that is known most
/// commands are BUSY.
pub fn take_over(lun: &Arc<Lun>) {
    let background = lun.background();
    {
        let mut state = background.state();
        background.served.store(true, Ordering::Release);
        background.takeovers.fetch_add(1, Ordering::AcqRel);
        background.ended.notify_all();
        match &*state {
            // It has not been let go of.
            State::Running(_) | State::Unknown { .. } => return,
            State::Idle | State::Failed(_) | State::Left(_) | State::Refused => {}
        }
        background.put(&mut state, State::Unknown { known: false });
    }
    let on = Arc::clone(lun);
    if lun.store().pool().run(Box::new(move || find_out(&on))).is_err() {
        log::error!("{}: no thread to find out what is noted of it", lun.settings().serial);
        background.become_state(State::Refused);
    }
}

/// Finds out what is noted, and goes on with it. Blocks.
fn find_out(lun: &Arc<Lun>) {
    let background = lun.background();
    loop {
        let takeover = {
            let mut state = background.state();
            if !background.is_served() {
                background.put(&mut state, State::Idle);
                return;
            }
            background.put(&mut state, State::Unknown { known: false });
            background.takeovers.load(Ordering::Acquire)
        };
        match lun.store().take_over(&|| background.is_known(takeover)) {
            Ok(()) if background.is_known(takeover) => break,
            Ok(()) | Err(StoreError { cause: Cause::Cancelled, .. }) => {}
            Err(StoreError { cause: Cause::Busy, .. }) => std::thread::sleep(SOON),
            Err(_) => return background.become_state(State::Refused),
        }
    }
    lun.reservations().take_over(lun.store().notes());
    lun.pages().take_over(lun.store().notes());
    resume(lun);
}

/// Whether an operation can be left to itself: whoever serves the disk next goes on with it. Where another process may be the
/// next, and nothing can be noted for it, nobody would.
pub fn is_remembered(lun: &Lun) -> bool {
    !lun.store().capabilities().unlocked || lun.store().notes().survive()
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
    let conflict = |state: &State| match state {
        State::Idle | State::Failed(Work::Format(_)) => false,
        State::Failed(Work::Sanitize { .. }) => matches!(work, Work::Format(_)),
        State::Running(_) | State::Left(_) | State::Unknown { .. } | State::Refused => true,
    };
    let check = |state: &State| match conflict(state) {
        true => Err(background.refusal(state)),
        false => Ok(()),
    };
    // Nobody waits for the host to be told that another was first.
    check(&background.state())?;
    let _alone = background.change();
    let (before, started) = {
        let mut state = background.state();
        check(&state)?;
        background.progress.store(0, Ordering::Release);
        let started = Started(background.begun.fetch_add(1, Ordering::AcqRel) + 1);
        (background.put(&mut state, State::Running(work.clone())), started)
    };
    let operation = Operation { work, from: Position::default(), mark: None };
    let on = Arc::clone(lun);
    let prepare = move |operation: &mut Operation| {
        first();
        // Not before: a write that was under way may be one of the first block.
        operation.set_mark(&on);
    };
    // There is a thread for it before it is noted, so that nothing is noted that does not run.
    let noted = spawn(lun, prepare).and_then(|begin| {
        note(lun, Some(operation.running()))?;
        Ok(begin)
    });
    match noted {
        Ok(begin) => {
            let _ = begin.send(operation);
            Ok(started)
        }
        Err(error) => {
            background.become_state(before);
            Err(error)
        }
    }
}

/// Takes up what is noted: an operation that was under way goes on, one that had failed still has.
fn resume(lun: &Arc<Lun>) {
    let (background, serial) = (lun.background(), &lun.settings().serial);
    let Some(noted) = lun.store().notes().get(NOTE) else {
        return background.become_state(State::Idle);
    };
    let (runs, operation) = Operation::decode(&noted, lun.block_size());
    let work = operation.work.clone();
    if runs && !is_remembered(lun) {
        // Another process may have served the disk, and have written to it, since.
        log::error!(
            "{serial}: {} does not go on: others may have served the disk meanwhile, and nothing can be noted for them; \
             it must be repeated",
            work.name()
        );
        return background.become_state(State::Failed(work));
    }
    match operation.mark.as_ref().map(|mark| mark.is_in(lun)) {
        None | Some(Ok(true)) => {}
        Some(Ok(false)) => {
            log::warn!(
                "{serial}: a {} was noted that this image does not know of: it has been replaced, or all was done",
                work.name()
            );
            if note(lun, None).is_err() {
                log::error!("{serial}: nor could that be noted");
            }
            return background.become_state(State::Idle);
        }
        Some(Err(error)) => {
            log::error!("{serial}: whether a {} goes on cannot be read: {error}", work.name());
            return background.become_state(State::Failed(work));
        }
    }
    if !runs || lun.store().capabilities().read_only {
        log::warn!("{serial}: {} has failed before and must be repeated", work.name());
        return background.become_state(State::Failed(work));
    }
    log::info!("{serial}: {} goes on", work.name());
    background.become_state(State::Running(work.clone()));
    // What was in flight when it began, and was not answered, is of before it.
    if let Some(tasks) = lun.sharing().tasks() {
        tasks.fence(lun.index());
    }
    let on = Arc::clone(lun);
    let prepare = move |operation: &mut Operation| {
        // It died before it had one.
        if operation.mark.is_none() && operation.from == Position::default() {
            operation.set_mark(&on);
        }
    };
    match spawn(lun, prepare) {
        Ok(begin) => drop(begin.send(operation)),
        Err(_) => {
            log::error!("{serial}: no thread for it; it is repeated at the next start");
            background.become_state(State::Failed(work));
        }
    }
}

/// Makes the thread of an operation, which begins when it is told to, with `prepare`, and ends if nobody will.
fn spawn(
    lun: &Arc<Lun>,
    prepare: impl FnOnce(&mut Operation) + Send + 'static,
) -> Result<Sender<Operation>, ScsiError> {
    let on = Arc::clone(lun);
    let (begin, begins) = mpsc::channel();
    // Commands wait for it, as many as the pool has threads.
    let spawned = lun.store().pool().run_apart(Box::new(move || {
        if let Ok(mut operation) = begins.recv() {
            prepare(&mut operation);
            carry_out(&on, operation);
        }
    }));
    spawned.map(|()| begin).map_err(|_| ScsiError::Busy)
}

/// The life of an operation's thread.
fn carry_out(lun: &Lun, mut operation: Operation) {
    let (background, serial) = (lun.background(), &lun.settings().serial);
    let name = operation.work.name();
    loop {
        let done = operation.work.run(lun, operation.from).and_then(|()| {
            // The first of the passes that are left takes the mark with it.
            (operation.from, operation.mark) = (operation.work.behind_all(), None);
            note(lun, Some(operation.running())).map_err(End::Failed)?;
            operation.work.finish(lun).map_err(End::Failed)
        });
        // An operation has ended when a restart will not repeat it.
        let failed = match done {
            Ok(()) => match note(lun, None) {
                Ok(()) => {
                    log::info!("{serial}: {name} is done");
                    return background.become_state(State::Idle);
                }
                Err(error) => End::Failed(error),
            },
            Err(end) => end,
        };
        match failed {
            End::Left(position) => {
                operation.from = position;
                if note(lun, Some(operation.running())).is_err() {
                    log::error!("{serial}: how far {name} is could not be noted");
                }
                let mut state = background.state();
                if !background.is_served() {
                    log::info!("{serial}: {name} stops until commands can come");
                    background.put(&mut state, State::Left(operation.work));
                    return;
                }
            }
            End::Failed(error) => {
                log::error!("{serial}: {name} failed: {error:?}");
                if note(lun, Some(operation.failed())).is_err() {
                    log::error!(
                        "{serial}: nor could that be noted: it is repeated at the next start"
                    );
                }
                return background.become_state(State::Failed(operation.work));
            }
        }
    }
}

fn note(lun: &Lun, text: Option<String>) -> Result<(), ScsiError> {
    let noted = lun.store().notes().set(NOTE, text.as_deref());
    noted.map_err(|error| match error.cause {
        // There is no block to name: it is the note that has no room.
        Cause::Busy => ScsiError::Busy,
        Cause::NoSpace | Cause::ReadOnly => ScsiError::from_store(error.cause.into(), true, 1),
        _ => ScsiError::Check(Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE)),
    })
}

/// Why an operation is not done.
enum End {
    /// No more commands come. What is before this position is done, and lasts.
    Left(Position),
    /// It failed.
    Failed(ScsiError),
}

/// How far an operation is: passes that are done, and bytes of the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    pass: usize,
    byte: u64,
}

/// What stands in the first block while the rest gets its new contents.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark(String);

/// What is done again with the first block, in bytes.
const HEAD: u64 = 1 << 20;

/// Bytes of the smallest block that a disk can have.
const SMALLEST_BLOCK: usize = 512;

const MARK: &[u8] = b"thinlun: erasing ";

impl Mark {
    /// One that is in no image yet; `None` if the host has no random numbers.
    fn random() -> Option<Self> {
        let mut number = [0; 16];
        getrandom::fill(&mut number).ok()?;
        Some(Mark(number.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// As noted.
    fn parse(text: &str) -> Option<Self> {
        let is_number = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_number.then(|| Mark(text.to_owned()))
    }

    /// The block that it stands in.
    fn block(&self, lun: &Lun) -> Vec<u8> {
        let mut block = [MARK, self.0.as_bytes()].concat();
        block.resize(lun.block_size() as usize, 0);
        block
    }

    fn write(&self, lun: &Lun) -> Result<(), StoreError> {
        let block = Buffers::copy_of(&self.block(lun)).ok_or(Cause::Busy)?;
        lun.store().write(0, &block, Durability::Stable)
    }

    fn is_in(&self, lun: &Lun) -> Result<bool, StoreError> {
        let mut expected = self.block(lun);
        let found = Buffers::zeroed(expected.len()).ok_or(Cause::Busy)?;
        // Of the medium, as another host may have written it.
        lun.store().read_medium(0, &found)?;
        // The blocks may have been smaller when it was written.
        expected.truncate(SMALLEST_BLOCK);
        Ok(found.to_vec(SMALLEST_BLOCK) == expected)
    }
}

/// An operation with all that is noted of it.
struct Operation {
    work: Work,
    from: Position,
    mark: Option<Mark>,
}

impl Operation {
    /// Gives the image a mark, and has the note name it. Without one, where that cannot be, the note holds whatever the
    /// image holds.
    fn set_mark(&mut self, lun: &Lun) {
        let Some(mark) = Mark::random().filter(|mark| mark.write(lun).is_ok()) else { return };
        self.mark = Some(mark);
        if note(lun, Some(self.running())).is_err() {
            self.mark = None;
        }
    }

    /// As it is noted while it runs: `running@PASS.BYTE#MARK WORK`, without a position at the start.
    fn running(&self) -> String {
        let Position { pass, byte } = self.from;
        let position = match self.from == Position::default() {
            true => String::new(),
            false => format!("@{pass}.{byte}"),
        };
        format!("running{position}{} {}", self.marked(), self.work.encode())
    }

    /// As it is noted when it has failed: `failed#MARK WORK`.
    fn failed(&self) -> String {
        format!("failed{} {}", self.marked(), self.work.encode())
    }

    fn marked(&self) -> String {
        self.mark.as_ref().map_or(String::new(), |mark| format!("#{}", mark.0))
    }

    /// Whether it runs, and what it is. What cannot be read was an operation all the same: it does not run, and the disk
    /// has to be formatted again.
    fn decode(text: &str, block_size: u32) -> (bool, Self) {
        let (state, work) = text.split_once(' ').unwrap_or(("failed", text));
        let parse = || {
            let (state, mark) = match state.split_once('#') {
                Some((state, mark)) => (state, Some(Mark::parse(mark)?)),
                None => (state, None),
            };
            let (state, from) = match state.split_once('@') {
                Some((state, position)) => {
                    let (pass, byte) = position.split_once('.')?;
                    (state, Position { pass: pass.parse().ok()?, byte: byte.parse().ok()? })
                }
                None => (state, Position::default()),
            };
            let work = Work::decode(work, block_size)?;
            Some((state == "running", Operation { work, from, mark }))
        };
        let unknown = || {
            // Its passes may be for blocks of another size. What was to make old data unreadable is not over before that is.
            let sanitize = Work::Sanitize {
                fill: Fill::Deallocated,
                passes: 1,
                invert: false,
                unrestricted_exit: false,
            };
            let is_sanitize = work.starts_with("sanitize ");
            let work = if is_sanitize { sanitize } else { Work::Format(Fill::Deallocated) };
            let mark = state.split_once('#').and_then(|(_, mark)| Mark::parse(mark));
            (false, Operation { work, from: Position::default(), mark })
        };
        parse().unwrap_or_else(unknown)
    }
}

/// What fills the medium alike in blocks of this size, if there is such a thing.
fn of_size(block: Vec<u8>, size: usize) -> Option<Vec<u8>> {
    if block.len() < SMALLEST_BLOCK || size == 0 {
        return None;
    }
    if size.is_multiple_of(block.len()) {
        return Some(block.repeat(size / block.len()));
    }
    let first = block.get(..size)?;
    let alike = block.len().is_multiple_of(size) && block.chunks(size).all(|part| part == first);
    alike.then(|| first.to_vec())
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

    /// Does all of it from a position on but the first block, with the mark, and makes it last.
    fn run(&self, lun: &Lun, from: Position) -> Result<(), End> {
        let whole = lun.bytes(0, lun.blocks()).map_err(End::Failed)?;
        let first = lun.store().capabilities().host_block.max(lun.block_size());
        let first = whole.end.min(first.into());
        let passes = self.passes();
        let total = u128::from(whole.end) * passes.len().max(1) as u128;
        let background = lun.background();
        for (number, pass) in passes.iter().enumerate().skip(from.pass) {
            // The blocks may have been smaller when that was noted.
            let noted = from.byte - from.byte % u64::from(lun.block_size());
            let start = if number == from.pass { noted.max(first) } else { first };
            let before = u128::from(whole.end) * number as u128;
            let mut left = None;
            let done = pass.run_on_all(lun, start.min(whole.end)..whole.end, |done| {
                let byte = start + done;
                let part = (before + u128::from(byte)) * 65536 / total.max(1);
                let part = u16::try_from(part).unwrap_or(u16::MAX);
                background.progress.store(part, Ordering::Release);
                if background.is_served() {
                    return Ok(());
                }
                left = Some(Position { pass: number, byte });
                Err(ScsiError::Aborted)
            });
            if left.is_none() {
                done.map_err(End::Failed)?;
            }
            // Each pass reaches the medium before the next begins.
            lun.settle(Durability::Stable).map_err(End::Failed)?;
            if let Some(position) = left {
                return Err(End::Left(position));
            }
        }
        Ok(())
    }

    /// Where it is when only the first block is left.
    fn behind_all(&self) -> Position {
        Position { pass: self.passes().len(), byte: 0 }
    }

    /// Does the first block.
    fn finish(&self, lun: &Lun) -> Result<(), ScsiError> {
        let whole = lun.bytes(0, lun.blocks())?;
        for pass in &self.passes() {
            // More than the block, as the host may give space back in larger pieces only.
            pass.run_on_all(lun, 0..whole.end.min(HEAD), |_| Ok(()))?;
            lun.settle(Durability::Stable)?;
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
                let block: Option<Vec<u8>> = (0..hex.len().div_ceil(2)).map(byte).collect();
                block.and_then(|block| of_size(block, block_size as usize)).map(Fill::Pattern)
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
    use super::super::address::LunNumber;
    use super::super::{LunSettings, Target};
    use super::*;
    use crate::store::mem::MemStore;

    fn lun() -> Arc<Lun> {
        let settings = LunSettings {
            target: 0,
            lun: LunNumber::MIN,
            serial: "X".into(),
            naa: vec![0x30; 8],
            block_size: 512,
            physical_block_size: 512,
            rotational: false,
            discard: true,
            discard_granularity: 512,
            detect_zeroes: Default::default(),
            write_cache: true,
        };
        Arc::new(Lun::new(settings, 0, Arc::new(MemStore::new(1 << 20))).unwrap())
    }

    /// Who waits for an operation to stop does not wait for its end when another initiator has come meanwhile.
    #[test]
    fn nobody_waits_for_what_goes_on_because_commands_can_come_again() {
        let lun = lun();
        lun.background().become_state(State::Running(Work::Format(Fill::Deallocated)));
        lun.background().leave();
        let on = Arc::clone(&lun);
        let (left, leaves) = mpsc::channel();
        std::thread::spawn(move || {
            on.background().wait_until_left();
            left.send(()).unwrap();
        });
        assert!(leaves.recv_timeout(Duration::from_millis(200)).is_err(), "it goes on");
        take_over(&lun);
        leaves.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(*lun.background().state(), State::Running(Work::Format(Fill::Deallocated)));
    }

    /// With the first way that commands can come the disk is taken over, and with no other.
    #[test]
    fn a_disk_is_taken_over_once() {
        let lun = lun();
        let target = Target::new(vec![Arc::clone(&lun)], 2);
        let takeovers = || lun.background().takeovers.load(Ordering::Acquire);
        for (begin, expected) in [(true, 1), (true, 1), (false, 1), (true, 1), (false, 1)] {
            if begin {
                target.begin_service()
            } else {
                target.end_service()
            }
            assert_eq!(takeovers(), expected);
            lun.background().check(Tolerance::Never).unwrap();
        }
        target.end_service();
        target.begin_service();
        assert_eq!(takeovers(), 2);
    }

    /// What was found out is put into force if it was found out for this time, and commands can come.
    #[test]
    fn what_was_found_out_for_another_time_is_not_put_into_force() {
        let (lun, unknown) = (lun(), State::Unknown { known: false });
        let background = lun.background();
        let state = || background.state().clone();
        background.become_state(unknown.clone());
        take_over(&lun);
        background.leave();
        assert!(!background.is_known(1), "nobody is there");
        take_over(&lun);
        assert!(!background.is_known(1) && state() == unknown, "it was for another");
        assert!(background.is_known(2));
        assert_eq!(state(), State::Unknown { known: true });
        // That is waited for: it changes what is noted.
        background.leave();
        let on = Arc::clone(&lun);
        let (left, leaves) = mpsc::channel();
        std::thread::spawn(move || {
            on.background().wait_until_left();
            left.send(()).unwrap();
        });
        assert!(leaves.recv_timeout(Duration::from_millis(200)).is_err());
        background.become_state(State::Idle);
        leaves.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    /// If commands can come again by the time an operation has stopped, it goes on.
    #[test]
    fn an_operation_that_has_stopped_for_nobody_goes_on() {
        let lun = lun();
        let background = lun.background();
        let work = Work::Format(Fill::Anchored);
        background.become_state(State::Running(work.clone()));
        background.leave();
        let state = background.state();
        let on = Arc::clone(&lun);
        let operation = Operation { work, from: Position::default(), mark: None };
        let thread = std::thread::spawn(move || carry_out(&on, operation));
        // It has noted how far it is, and has not seen yet that this is for nothing.
        while lun.store().notes().get(NOTE).is_none() {
            std::thread::yield_now();
        }
        background.served.store(true, Ordering::Release);
        drop(state);
        thread.join().unwrap();
        assert_eq!(*background.state(), State::Idle);
    }

    /// If everybody has left before it is found out what is noted, the next one who comes has it found out.
    #[test]
    fn what_nobody_waits_for_is_found_out_for_the_next() {
        let lun = lun();
        let background = lun.background();
        background.become_state(State::Unknown { known: false });
        background.leave();
        find_out(&lun);
        assert_eq!(*background.state(), State::Idle);
        take_over(&lun);
        background.wait_until_known(Instant::now() + Duration::from_secs(60));
        background.check(Tolerance::Never).unwrap();
    }
    use crate::scsi::copy::tests::target;

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
    fn an_operation_is_noted_with_all_that_belongs_to_it() {
        let work = Work::Format(Fill::Anchored);
        let mark = Mark("0123456789abcdef0123456789abcdef".into());
        for (text, position, marked) in [
            ("running format zero", (0, 0), false),
            ("running@2.1048576 format zero", (2, 1 << 20), false),
            ("running#0123456789abcdef0123456789abcdef format zero", (0, 0), true),
            ("running@0.9#0123456789abcdef0123456789abcdef format zero", (0, 9), true),
        ] {
            let (runs, found) = Operation::decode(text, 512);
            assert!(runs && found.work == work, "{text}");
            assert_eq!((found.from.pass, found.from.byte), position, "{text}");
            assert_eq!(found.mark, Some(mark.clone()).filter(|_| marked), "{text}");
            assert_eq!(found.running(), text);
            assert_eq!(
                found.failed(),
                text.replace("running", "failed").replace("@2.1048576", "").replace("@0.9", "")
            );
            let (runs, again) = Operation::decode(&found.failed(), 512);
            assert!(!runs && again.work == work && again.mark == found.mark, "{text}");
        }
        // What nobody understands erases nothing.
        for text in [
            "running",
            "running@1 format zero",
            "running@x.1 format zero",
            "running#12 format zero",
            "running format 00",
        ] {
            let (runs, found) = Operation::decode(text, 512);
            assert!(!runs && found.work == Work::Format(Fill::Deallocated), "{text}");
        }
    }

    /// The blocks may have another size at the next start.
    #[test]
    fn a_pattern_is_understood_for_blocks_of_another_size() {
        let sanitize = |block: Vec<u8>| Work::Sanitize {
            fill: Fill::Pattern(block),
            passes: 2,
            invert: false,
            unrestricted_exit: true,
        };
        let numbers = |len: usize| (0..len).map(|n| (n / 2 % 251) as u8).collect::<Vec<u8>>();
        let small = sanitize(numbers(512));
        let large = sanitize(numbers(512).repeat(8));
        assert_eq!(Work::decode(&small.encode(), 4096), Some(large.clone()));
        assert_eq!(Work::decode(&large.encode(), 512), Some(small));
        // And where it cannot be had, it is a sanitize operation that must be repeated, which knows its image.
        let mark = Mark::random().unwrap();
        let text = format!("running#{} {}", mark.0, sanitize(numbers(4096)).encode());
        let (runs, found) = Operation::decode(&text, 512);
        assert!(!runs && !found.work.is_format() && found.mark == Some(mark));
        assert!(Operation::decode(&text, 4096).0);
    }

    fn format() -> Work {
        Work::Format(Fill::Anchored)
    }

    fn sanitize() -> Work {
        Work::Sanitize { fill: Fill::Anchored, passes: 1, invert: false, unrestricted_exit: false }
    }

    #[test]
    fn what_an_operation_lets_in() {
        use Tolerance::{AfterFailedFormat, Always, Mends, Never};
        let background = Background::idle();
        for (state, lets_in) in [
            (State::Idle, vec![Always, AfterFailedFormat, Never, Mends]),
            (State::Running(format()), vec![Always]),
            (State::Left(sanitize()), vec![Always]),
            (State::Failed(format()), vec![Always, AfterFailedFormat, Mends]),
            (State::Failed(sanitize()), vec![Always, Mends]),
            (State::Unknown { known: false }, vec![Always]),
            (State::Refused, vec![Always]),
        ] {
            background.become_state(state.clone());
            for tolerance in [Always, AfterFailedFormat, Never, Mends] {
                let checked = background.check(tolerance);
                assert_eq!(
                    checked.is_ok(),
                    lets_in.contains(&tolerance),
                    "{state:?} {tolerance:?}"
                );
            }
            let unknown = matches!(state, State::Unknown { .. });
            let known = background.check_known();
            assert_eq!(known, if unknown { Err(ScsiError::Busy) } else { Ok(()) }, "{state:?}");
        }
    }

    /// Who waits is told of his own operation, and can be aborted, whatever the host does.
    #[test]
    fn who_waits_for_the_end_does_not_wait_for_ever() {
        let background = Background::idle();
        let (going_on, aborted) = (Cancel::default(), Cancel::default());
        aborted.request();
        background.become_state(State::Running(format()));
        assert_eq!(background.wait(Started(0), &aborted), Err(ScsiError::Aborted));
        background.begun.store(1, Ordering::Release);
        assert_eq!(background.wait(Started(0), &going_on), Err(ScsiError::Aborted));
        background.become_state(State::Idle);
        assert_eq!(background.wait(Started(0), &going_on), Err(ScsiError::Aborted));
        assert_eq!(background.wait(Started(1), &going_on), Ok(()));
    }

    /// What was found out for those who had the disk before, and who have let go of it since, is not in force.
    #[test]
    fn what_was_found_out_for_an_earlier_time_is_nothing() {
        let background = Background::idle();
        background.become_state(State::Unknown { known: false });
        background.takeovers.store(2, Ordering::Release);
        assert!(!background.is_known(1));
        assert_eq!(*background.state(), State::Unknown { known: false });
        background.leave();
        assert!(!background.is_known(2));
        background.served.store(true, Ordering::Release);
        assert!(background.is_known(2));
        assert_eq!(*background.state(), State::Unknown { known: true });
    }

    /// Two who begin at the same time: the second sees what the first has done.
    #[test]
    fn who_has_waited_to_begin_looks_again() {
        let target = target(1);
        let lun = &target.disks()[0];
        let background = lun.background();
        std::thread::scope(|scope| {
            let alone = background.change();
            let second = scope.spawn(|| start(lun, format(), || ()));
            // It has looked once by now, and waits.
            std::thread::sleep(LOOK * 4);
            background.become_state(State::Running(sanitize()));
            drop(alone);
            assert!(second.join().unwrap().is_err());
            assert_eq!(*background.state(), State::Running(sanitize()));
        });
    }

    #[test]
    fn progress_is_that_of_all_passes() {
        let target = target(1);
        let lun = &target.disks()[0];
        let mut work = sanitize();
        if let Work::Sanitize { passes, .. } = &mut work {
            *passes = 3;
        }
        assert!(work.run(lun, Position::default()).is_ok());
        // It is told before each step.
        let last = lun.background().progress.load(Ordering::Acquire);
        assert!(last >= u16::MAX / 3 * 2, "{last} before the last step of the last pass");
    }

    #[test]
    fn an_operation_begins_with_nothing_done() {
        let target = target(1);
        let lun = &target.disks()[0];
        let background = lun.background();
        background.progress.store(u16::MAX, Ordering::Release);
        let (go_on, waits) = mpsc::channel::<()>();
        let started = start(lun, format(), move || {
            let _ = waits.recv();
        })
        .unwrap();
        let progress = background.sense().and_then(|sense| sense.specific);
        assert_eq!(progress, Some(KeySpecific::Progress(0)));
        drop(go_on);
        background.wait(started, &Cancel::default()).unwrap();
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
