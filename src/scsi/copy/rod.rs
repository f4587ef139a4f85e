//! Representations of data (SPC-5 5.18.6): tokens that stand for blocks of a disk, as they were when the
//! token was made where the host can keep them so, or as they are when it is used.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::segment::{Leave, transfer};
use crate::sandbox::{self, Role};
use crate::scsi::attention::Port;
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::sense::{Key, ScsiError, Sense, asc};
use crate::scsi::wire::{U16, U32, U64};
use crate::store::copy::{CopyError, Side};
use crate::store::{Cause, Snapshot};

/// A ROD token as it goes over the wire.
pub type TokenBytes = [u8; TOKEN_LEN];

/// Bytes of a token.
pub const TOKEN_LEN: usize = 512;
/// Bytes of a token that is only shown to manage it: nothing can be read with it.
pub const MANAGEMENT_TOKEN_LEN: usize = 128;

/// Tokens that are held at the same time, over all disks and initiators, if none has less than the second number.
const MAX_TOKENS: [usize; 2] = [64, 8];
/// Tokens that are known to be dead, to tell their users why.
const MAX_DEAD: usize = 256;

/// ROD TYPE: the data is read when the token is used.
pub const ACCESS_UPON_REFERENCE: u32 = 0x0001_0000;
/// ROD TYPE: the data is as it was when the token was made.
pub const POINT_IN_TIME: u32 = 0x0080_0000;
/// ROD TYPE: any kind of point in time copy will do.
pub const POINT_IN_TIME_ANY: u32 = 0x0080_ffff;
/// ROD TYPE: zeroes; everybody knows this token.
pub const BLOCK_ZERO: u32 = 0xffff_0001;

/// Seconds that a token lives unused, unless its maker says otherwise.
pub const DEFAULT_TIMEOUT: u32 = 60;
/// Most seconds that its maker can ask for.
pub const MAX_TIMEOUT: u32 = 3600;

/// Data that a token stands for.
pub struct Rod {
    token: TokenBytes,
    /// Whose initiator has made it.
    owner: Port,
    source: Weak<Lun>,
    ranges: Vec<ByteRange>,
    /// `None`: access upon reference.
    snapshot: Option<Snapshot>,
    timeout: Duration,
    used: Mutex<Instant>,
}

impl Drop for Rod {
    /// The blocks that only a snapshot has go with it, which takes as long as the host does: on a thread of its disk, as
    /// whoever asks for tokens, of any disk, may be the one who finds that this one is over.
    fn drop(&mut self) {
        if let (Some(snapshot), Some(lun)) = (self.snapshot.take(), self.source.upgrade()) {
            let _ = lun.store().pool().run(Box::new(move || drop(snapshot)));
        }
    }
}

/// Why a token is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Expired,
    Deleted,
    Revoked,
}

/// All tokens.
pub struct Rods {
    shared: Arc<Shared>,
    /// How many of an initiator's there may be.
    share: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    live: Vec<Arc<Rod>>,
    dead: Vec<(u64, Death)>,
    /// A thread waits for the next token to expire.
    reaping: bool,
}

/// What a token begins with.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    kind: U32,
    reserved: U16,
    /// Length of what follows.
    length: U16,
    identifier: U64,
    /// The disk it was made of, as an identification CSCD descriptor.
    creator: [u8; 32],
    /// NUMBER OF BYTES REPRESENTED, 128 bits.
    bytes_high: U64,
    bytes: U64,
    manager_specific: [u8; 32],
    /// Block length and what else READ CAPACITY(16) says of blocks.
    geometry: [u8; 8],
    reserved2: [u8; 24],
}

/// What a token is to be.
pub struct Wanted {
    /// The disk that it is made of.
    pub lun: Arc<Lun>,
    /// What the token says of that.
    pub creator: Creator,
    /// The bytes that it stands for.
    pub ranges: Vec<ByteRange>,
    /// How they are kept.
    pub keep: Keep,
    /// How long it lives unused.
    pub timeout: Duration,
}

/// How the bytes of a token are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Not at all: they are read when the token is used.
    Not,
    /// As they are now, where there is a way and room for that.
    IfPossible,
    /// As they are now, or there is no token.
    Surely,
}

/// The disk that a token is made of, as the token says it.
pub struct Creator {
    /// Its name, as an identification CSCD descriptor.
    pub descriptor: [u8; 32],
    /// Bytes 8 to 15 of its READ CAPACITY(16) data.
    pub geometry: [u8; 8],
}

impl Rod {
    /// Bytes of data.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }

    /// Whether it stands for no data at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it was made of this disk.
    pub fn is_of(&self, lun: &Lun) -> bool {
        std::ptr::eq(self.source.as_ptr(), lun)
    }

    /// Whether it was made by the initiator behind this port.
    pub fn is_by(&self, port: Port) -> bool {
        self.owner == port
    }

    fn identifier(&self) -> u64 {
        identifier(&self.token)
    }

    fn expires(&self) -> Instant {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) + self.timeout
    }

    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// The disk that it was made of.
    ///
    /// # Errors
    /// 05/23/06 if that is gone.
    pub fn source(&self) -> Result<Arc<Lun>, ScsiError> {
        self.source.upgrade().ok_or(ScsiError::illegal(asc::TOKEN_REVOKED))
    }

    /// Copies `len` bytes from byte `offset` of the data, which is of this disk, to another.
    ///
    /// # Errors
    /// How far it came and why it ended.
    pub fn copy_to(
        &self,
        source: &Lun,
        offset: u64,
        len: u64,
        to: &Lun,
        at: u64,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), CopyError> {
        let (mut skip, mut done) = (offset, 0);
        for (number, range) in self.ranges.iter().enumerate() {
            let size = range.end - range.start;
            if skip >= size || done == len {
                skip = skip.saturating_sub(size);
                continue;
            }
            let n = (size - skip).min(len - done);
            let (store, start) = match &self.snapshot {
                Some(snapshot) => {
                    let start = snapshot.starts.get(number).copied().unwrap_or(0);
                    (snapshot.store.as_ref(), start)
                }
                None => (source.store().as_ref(), range.start),
            };
            let from = start + skip..start + skip + n;
            let before = done;
            transfer(store, from, to, at + done, &mut |more| go_on(before + more))
                .map_err(|error| CopyError { done: before + error.done, ..error })?;
            (done, skip) = (done + n, 0);
        }
        Ok(())
    }
}

fn identifier(token: &TokenBytes) -> u64 {
    token.get(8..16).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// ROD TYPE of a token.
pub fn token_type(token: &TokenBytes) -> u32 {
    let [a, b, c, d, ..] = *token;
    u32::from_be_bytes([a, b, c, d])
}

/// The token for zeroes.
pub fn block_zero() -> TokenBytes {
    let mut token = [0; TOKEN_LEN];
    let head = [&BLOCK_ZERO.to_be_bytes()[..], &[0, 0, 0x01, 0xf8]].concat();
    token.iter_mut().zip(head).for_each(|(to, from)| *to = from);
    token
}

impl Rods {
    /// For so many initiators.
    pub(super) fn new(initiators: usize) -> Self {
        let [most, least] = MAX_TOKENS;
        Rods { shared: Arc::default(), share: super::share(most, least, initiators) }
    }

    /// Whether an initiator can have another token.
    fn check_share(&self, state: &mut State, owner: Port) -> Result<(), ScsiError> {
        state.bury();
        match state.live.iter().filter(|rod| rod.is_by(owner)).count() < self.share {
            true => Ok(()),
            false => Err(ScsiError::illegal(asc::INSUFFICIENT_RESOURCES_TO_CREATE_ROD_TOKEN)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a token, if it has leave until it is there. Blocks.
    ///
    /// # Errors
    /// 05/55/0D if its initiator has too many tokens, 05/55/0C if there is no room for the data; what the host says if it
    /// cannot keep it; why it had to end.
    pub(in crate::scsi) fn create(
        &self,
        wanted: Wanted,
        leave: &mut Leave<'_>,
    ) -> Result<TokenBytes, ScsiError> {
        let Wanted { lun, creator, ranges, keep, timeout } = wanted;
        let owner = leave.port();
        self.check_share(&mut self.state(), owner)?;
        let snapshot = match keep {
            Keep::Not => None,
            Keep::IfPossible | Keep::Surely => keep_ranges(&lun, &ranges, leave)?,
        };
        if keep == Keep::Surely && snapshot.is_none() {
            return Err(ScsiError::illegal(asc::INSUFFICIENT_RESOURCES_TO_CREATE_ROD));
        }
        let kind = if snapshot.is_some() { POINT_IN_TIME } else { ACCESS_UPON_REFERENCE };
        let bytes = ranges.iter().map(|r| r.end - r.start).sum();
        let mut state = self.state();
        // Whoever ends tokens has taken the leave from those that are made before it looks for those that there are.
        leave.look()?;
        self.check_share(&mut state, owner)?;
        state.next += 1;
        let token = make_token(kind, state.next, &creator, bytes)?;
        let used = Mutex::new(Instant::now());
        let source = Arc::downgrade(&lun);
        state.live.push(Arc::new(Rod { token, owner, source, ranges, snapshot, timeout, used }));
        self.reap(&mut state);
        Ok(token)
    }

    /// The data of a token, which is used by that.
    ///
    /// # Errors
    /// 05/23/xx: the token is unknown, expired, deleted, or not what was given out.
    pub fn find(&self, token: &TokenBytes) -> Result<Arc<Rod>, ScsiError> {
        let mut state = self.state();
        state.bury();
        let wanted = identifier(token);
        if let Some(rod) = state.live.iter().find(|rod| rod.identifier() == wanted) {
            // The comparison takes the same time wherever they differ.
            let differs = rod.token.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
            if differs != 0 {
                return Err(ScsiError::illegal(asc::TOKEN_CORRUPT));
            }
            rod.touch();
            return Ok(Arc::clone(rod));
        }
        let death = state.dead.iter().find(|(identifier, _)| *identifier == wanted);
        Err(ScsiError::illegal(match death {
            Some((_, Death::Expired)) => asc::TOKEN_EXPIRED,
            Some((_, Death::Deleted)) => asc::TOKEN_DELETED,
            Some((_, Death::Revoked)) => asc::TOKEN_REVOKED,
            None => asc::TOKEN_UNKNOWN,
        }))
    }

    /// Takes a token out of use (DEL_TKN).
    pub fn delete(&self, rod: &Arc<Rod>) {
        self.end(|other| std::ptr::eq(other, rod.as_ref()), Death::Deleted);
    }

    /// Takes tokens out of use, whoever has them: their disk is about to hold something else, or their maker is gone. Data
    /// that a copy is being made of stays until that has ended.
    pub fn revoke(&self, which: impl Fn(&Rod) -> bool) {
        self.end(which, Death::Revoked);
    }

    fn end(&self, which: impl Fn(&Rod) -> bool, death: Death) {
        let mut state = self.state();
        let all = std::mem::take(&mut state.live).into_iter();
        let (dead, live): (Vec<_>, Vec<_>) = all.partition(|rod| which(rod));
        state.live = live;
        dead.iter().for_each(|rod| state.remember(rod.identifier(), death));
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The tokens that there are, without what makes them usable.
    pub fn list(&self) -> Vec<[u8; MANAGEMENT_TOKEN_LEN]> {
        let mut state = self.state();
        state.bury();
        let head = |rod: &Arc<Rod>| rod.token.first_chunk().copied();
        state.live.iter().filter_map(head).collect()
    }

    /// Has the tokens' space given back when their time is over, whether or not anybody asks: a thread
    /// that lives as long as there are tokens.
    fn reap(&self, state: &mut State) {
        if state.reaping {
            self.shared.changed.notify_all();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let spawned = sandbox::spawn("tokens".into(), Role::Timer, move || shared.wait());
        state.reaping = spawned.is_ok();
    }
}

impl Shared {
    fn wait(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            state.bury();
            let Some(next) = state.live.iter().map(|rod| rod.expires()).min() else {
                state.reaping = false;
                return;
            };
            let until = next.saturating_duration_since(Instant::now());
            let waited = self.changed.wait_timeout(state, until);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Lets go of the tokens whose time is over. One that is being used has time as long as it is.
    fn bury(&mut self) {
        let now = Instant::now();
        let mut expired = Vec::new();
        self.live.retain(|rod| {
            if Arc::strong_count(rod) > 1 {
                rod.touch();
            }
            let lives = rod.expires() > now;
            if !lives {
                expired.push(rod.identifier());
            }
            lives
        });
        expired.into_iter().for_each(|identifier| self.remember(identifier, Death::Expired));
    }

    fn remember(&mut self, identifier: u64, death: Death) {
        if self.dead.len() >= MAX_DEAD {
            self.dead.remove(0);
        }
        self.dead.push((identifier, death));
    }
}

/// Ranges of a disk as they are now; `None` where the host cannot keep them so, or has no room for it.
fn keep_ranges(
    lun: &Lun,
    ranges: &[ByteRange],
    leave: &mut Leave<'_>,
) -> Result<Option<Snapshot>, ScsiError> {
    let kept = lun.store().snapshot(ranges, &mut |done| leave.step(done));
    kept.or_else(|error| match (error.side, error.error.cause) {
        (Side::Destination, Cause::NoSpace) => Ok(None),
        (_, Cause::Cancelled) => Err(leave.why(&error, lun)),
        (Side::Source, _) => Err(ScsiError::from_store(error.error, false, lun.block_size())),
        (_, Cause::Busy) => Err(ScsiError::Busy),
        // No block of the disk is to blame.
        (Side::Destination, _) => {
            Err(ScsiError::Check(Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE)))
        }
    })
}

/// A token that cannot be guessed: everything behind its head is random.
fn make_token(
    kind: u32,
    identifier: u64,
    creator: &Creator,
    bytes: u64,
) -> Result<TokenBytes, ScsiError> {
    let head = Head {
        kind: U32::new(kind),
        reserved: U16::ZERO,
        length: U16::new(0x01f8),
        identifier: U64::new(identifier),
        creator: creator.descriptor,
        bytes_high: U64::ZERO,
        bytes: U64::new(bytes),
        manager_specific: [0; 32],
        geometry: creator.geometry,
        reserved2: [0; 24],
    };
    let mut token = [0; TOKEN_LEN];
    getrandom::fill(&mut token).map_err(|_| ScsiError::Busy)?;
    token.iter_mut().zip(head.as_bytes()).for_each(|(to, from)| *to = *from);
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::copy::tests::{begin, target};
    use crate::scsi::target::Target;
    use crate::store::engine::Cancel;
    use crate::store::{Buffers, Durability};

    fn wanted(target: &Target, timeout: Duration) -> Wanted {
        let lun = Arc::clone(&target.disks()[0]);
        let creator = Creator { descriptor: [0; 32], geometry: [0; 8] };
        Wanted { lun, creator, ranges: std::iter::once(0..512).collect(), keep: Keep::Not, timeout }
    }

    /// Makes a token by reference.
    fn make(target: &Target, port: u16, timeout: Duration) -> Result<TokenBytes, ScsiError> {
        let nexus = target.connect(Port(port));
        let copy = begin(target, &nexus, 0, 1)?;
        let (lun, cancel) = (Arc::clone(&target.disks()[0]), Cancel::default());
        let mut leave = Leave::new(&copy.operation, &cancel, Some(&lun), None);
        target.copies().rods().create(wanted(target, timeout), &mut leave)
    }

    const LONG: Duration = Duration::from_secs(3600);

    fn rod(target: &Target, identifier: u64, timeout: Duration) -> Rod {
        let creator = Creator { descriptor: [0; 32], geometry: [0; 8] };
        Rod {
            token: make_token(ACCESS_UPON_REFERENCE, identifier, &creator, 512).unwrap(),
            owner: Port(1),
            source: Arc::downgrade(&target.disks()[0]),
            ranges: std::iter::once(0..512).collect(),
            snapshot: None,
            timeout,
            used: Mutex::new(Instant::now()),
        }
    }

    /// Whoever ends tokens finds those that there are; one that is being made meanwhile does not come after that.
    #[test]
    fn no_token_comes_of_a_copy_that_was_to_end() {
        let target = target(1);
        let nexus = target.connect(Port(1));
        for way in ["ended", "aborted", "stopped"] {
            let copy = begin(&target, &nexus, 0, 1).unwrap();
            let (lun, cancel) = (&target.disks()[0], Cancel::default());
            match way {
                "ended" => copy.operation.cancel.request(),
                "aborted" => cancel.request(),
                _ => lun.set_started(false),
            }
            let mut leave = Leave::new(&copy.operation, &cancel, Some(lun), None);
            let rods = target.copies().rods();
            assert!(rods.create(wanted(&target, LONG), &mut leave).is_err(), "{way}");
            assert!(rods.list().is_empty(), "{way}");
        }
    }

    #[test]
    fn a_token_that_is_being_used_does_not_expire() {
        let target = target(1);
        let brief = Duration::from_millis(1);
        let used = Arc::new(rod(&target, 1, brief));
        let mut state = State { live: vec![Arc::clone(&used)], ..State::default() };
        std::thread::sleep(brief * 2);
        state.bury();
        assert_eq!((state.live.len(), state.dead.len()), (1, 0));
        drop(used);
        std::thread::sleep(brief * 2);
        state.bury();
        assert_eq!((state.live.len(), state.dead), (0, vec![(1, Death::Expired)]));
    }

    /// Its time begins anew with each use; and when that is over it cannot be used, whether or not somebody has noticed.
    #[test]
    fn a_token_lives_unused_for_its_time() {
        let target = target(1);
        let rods = Rods::new(1);
        let expired = Err(ScsiError::illegal(asc::TOKEN_EXPIRED));
        let token = {
            let rod = rod(&target, 1, Duration::ZERO);
            let token = rod.token;
            rods.state().live.push(Arc::new(rod));
            token
        };
        assert_eq!(rods.find(&token).map(drop), expired);
        rods.state().live.push(Arc::new(rod(&target, 3, Duration::ZERO)));
        assert!(rods.list().is_empty());
        let rod = rod(&target, 2, LONG);
        let token = rod.token;
        let made = *rod.used.lock().unwrap();
        rods.state().live.push(Arc::new(rod));
        while Instant::now() == made {}
        assert!(*rods.find(&token).unwrap().used.lock().unwrap() > made);
        // Nobody can guess one from what is told of it.
        let mut guessed = token;
        guessed[MANAGEMENT_TOKEN_LEN] ^= 1;
        let corrupt = Err(ScsiError::illegal(asc::TOKEN_CORRUPT));
        assert_eq!(rods.find(&guessed).map(drop), corrupt);
    }

    /// Tokens expire though nobody asks, those of before and those that come when there was none for a while.
    #[test]
    fn there_is_always_somebody_who_buries_tokens() {
        let target = target(1);
        for _ in 0..3 {
            make(&target, 1, Duration::from_millis(1)).unwrap();
            let started = Instant::now();
            let is_buried = |state: &State| state.live.is_empty() && !state.reaping;
            while !is_buried(&target.copies().rods().state()) {
                assert!(started.elapsed() < Duration::from_secs(60), "it lives for ever");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// What is told of a copy, and what is left of it, counts all ranges of its token.
    #[test]
    fn a_copy_of_several_ranges_counts_all_of_them() {
        let target = target(1);
        let [from, to] = target.disks() else { panic!("two disks") };
        for n in [0u64, 1] {
            let data = Buffers::copy_of(&[n as u8 + 1; 4096]).unwrap();
            from.store().write(n * 8192, &data, Durability::Cached).unwrap();
        }
        let mut rod = rod(&target, 1, LONG);
        rod.ranges = vec![0..4096, 8192..12288];
        let mut told = Vec::new();
        let mut all = |done| {
            told.push(done);
            true
        };
        rod.copy_to(from, 512, 4096, to, 0, &mut all).unwrap();
        assert!(told.is_sorted() && told.last().is_some_and(|last| *last >= 3584), "{told:?}");
        let copied = Buffers::zeroed(4096).unwrap();
        to.store().read(0, &copied).unwrap();
        assert_eq!(copied.to_vec(4096), [[1; 3584].as_slice(), &[2; 512]].concat());
        let error = rod.copy_to(from, 512, 4096, to, 0, &mut |done| done < 3584).unwrap_err();
        assert_eq!((error.done, error.error.cause), (3584, Cause::Cancelled));
    }

    #[test]
    fn the_dead_are_remembered_while_there_is_room() {
        let mut state = State::default();
        let last = MAX_DEAD as u64 + 10;
        (0..=last).for_each(|identifier| state.remember(identifier, Death::Deleted));
        assert_eq!(state.dead.len(), MAX_DEAD);
        assert_eq!(state.dead.last(), Some(&(last, Death::Deleted)));
    }
}
