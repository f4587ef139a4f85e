//! Who has reserved a disk: persistent reservations (SPC-5 5.14) and the RESERVE and RELEASE of old (SPC-2 5.5).
//!
//! An initiator is known by the port it comes by, so that it is the same one when it has been away. What was
//! registered with APTPL is noted beside the image from before the command is answered, and is in force again
//! before a restarted program takes commands.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::attention::{Port, UnitAttention};
use super::sense::{ScsiError, asc};
use super::wire::Cdb;
use crate::store::Notes;

/// The name that registrations which survive a restart are noted under.
const NOTE: &str = "reservations";

/// A reservation key.
pub type Key = u64;

/// How a command gets along with a reservation of somebody else (SPC-5 table 71, SBC-4 table 13).
#[derive(Clone, Copy, Debug)]
pub enum Conflict {
    /// It runs under any reservation.
    Never,
    /// It runs under any persistent reservation.
    NeverPersistent,
    /// It only reads: it runs under the Write Exclusive types.
    ExclusiveAccess,
    /// Only those whom the reservation is for may do it.
    Always,
    /// As `Always`, unless the CDB is harmless; then as `Never`.
    Unless(fn(&Cdb) -> bool),
    /// It is about reservations, and looks at them itself.
    Itself,
}

/// Type of a persistent reservation (SPC-5 table 73).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Type {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrantsOnly = 5,
    ExclusiveAccessRegistrantsOnly = 6,
    WriteExclusiveAllRegistrants = 7,
    ExclusiveAccessAllRegistrants = 8,
}

impl Type {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// The type with this code.
    pub fn parse(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// Every registered initiator holds it.
    pub fn is_of_all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    fn is_exclusive_access(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess
                | Self::ExclusiveAccessRegistrantsOnly
                | Self::ExclusiveAccessAllRegistrants
        )
    }

    /// Being registered is enough to be let through.
    fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }
}

/// A persistent reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its type.
    pub kind: Type,
    /// Who made it; with the all registrants types, every registered initiator holds it.
    by: Port,
}

/// What is registered and reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// PRGENERATION.
    pub generation: u32,
    /// The keys of those who are registered.
    pub keys: BTreeMap<Port, Key>,
    /// The reservation.
    pub held: Option<Held>,
    /// APTPL: all of this but the generation survives a restart.
    pub survives: bool,
    /// Who has made a RESERVE.
    basic: Option<Port>,
}

/// A change to be made by PERSISTENT RESERVE OUT. Each but the first names the key that the initiator is
/// registered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Change {
    /// `None` as the old key: whatever it was.
    Register {
        old: Option<Key>,
        new: Key,
        survives: bool,
    },
    Reserve {
        key: Key,
        kind: Type,
    },
    Release {
        key: Key,
        kind: Type,
    },
    Clear {
        key: Key,
    },
    /// Of those who are registered with `other`.
    Preempt {
        key: Key,
        other: Key,
        kind: Type,
    },
    /// Registers `to` with `other` and gives it the reservation.
    Move {
        key: Key,
        other: Key,
        to: Port,
        unregister: bool,
        survives: bool,
    },
}

/// Who has to be told of a change, and whose registrations it took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Unit attentions.
    pub tell: Vec<(Port, UnitAttention)>,
    /// Those who were preempted.
    pub preempted: Vec<Port>,
}

impl Effects {
    fn tell(&mut self, ports: impl IntoIterator<Item = Port>, attention: UnitAttention) {
        self.tell.extend(ports.into_iter().map(|port| (port, attention)));
    }
}

const CONFLICT: ScsiError = ScsiError::ReservationConflict;
/// SERVICE ACTION RESERVATION KEY.
const WRONG_OTHER_KEY: ScsiError = ScsiError::parameter_field(8, None);

impl State {
    /// Whether an initiator holds the reservation.
    pub fn holds(&self, port: Port) -> bool {
        self.held.is_some_and(|held| match held.kind.is_of_all_registrants() {
            true => self.keys.contains_key(&port),
            false => held.by == port,
        })
    }

    /// The key that READ RESERVATION shows: that of the holder, if there is one.
    pub fn holders_key(&self) -> Key {
        let holder = self.held.filter(|held| !held.kind.is_of_all_registrants());
        holder.and_then(|held| self.keys.get(&held.by)).copied().unwrap_or(0)
    }

    /// Whether a command must not run.
    fn forbids(&self, port: Port, conflict: Conflict, cdb: &Cdb) -> bool {
        let (basic, persistent) = match conflict {
            Conflict::Never | Conflict::Itself => return false,
            Conflict::Unless(harmless) if harmless(cdb) => return false,
            Conflict::NeverPersistent => (true, false),
            Conflict::ExclusiveAccess => {
                (true, self.held.is_some_and(|held| held.kind.is_exclusive_access()))
            }
            Conflict::Always | Conflict::Unless(_) => (true, true),
        };
        let by_other = self.basic.is_some_and(|holder| holder != port);
        basic && by_other || persistent && self.held.is_some_and(|held| !self.admits(port, held))
    }

    fn admits(&self, port: Port, held: Held) -> bool {
        let is_for = held.by == port || held.kind.admits_registrants();
        is_for && self.keys.contains_key(&port)
    }

    fn check_key(&self, port: Port, key: Key) -> Result<(), ScsiError> {
        if self.keys.get(&port) == Some(&key) { Ok(()) } else { Err(CONFLICT) }
    }

    fn others(&self, port: Port) -> Vec<Port> {
        self.keys.keys().copied().filter(|other| *other != port).collect()
    }

    /// The reservation ends; who was let through by it is told (SPC-5 5.14.11.2).
    fn end_reservation(&mut self, port: Port, effects: &mut Effects) {
        if let Some(held) = self.held.take()
            && held.kind.admits_registrants()
        {
            effects.tell(self.others(port), UnitAttention::ReservationsReleased);
        }
    }

    fn unregister(&mut self, port: Port, effects: &mut Effects) {
        self.keys.remove(&port);
        let ends = self.held.is_some_and(|held| match held.kind.is_of_all_registrants() {
            true => self.keys.is_empty(),
            false => held.by == port,
        });
        if ends {
            self.end_reservation(port, effects);
        }
    }

    fn apply(&mut self, port: Port, change: Change) -> Result<Effects, ScsiError> {
        if self.basic.is_some() {
            // SPC-2 5.5.1: the two kinds do not go together.
            return Err(CONFLICT);
        }
        let mut effects = Effects::default();
        match change {
            Change::Register { old, new, survives } => {
                let registered = self.keys.get(&port).copied().unwrap_or(0);
                if old.is_some_and(|old| old != registered) {
                    return Err(CONFLICT);
                }
                match new {
                    // Who is not registered and does not want to be changes nothing, APTPL included (SPC-5 5.14.7).
                    0 if registered == 0 => {}
                    0 => {
                        self.unregister(port, &mut effects);
                        self.survives = survives;
                    }
                    key => {
                        self.keys.insert(port, key);
                        self.survives = survives;
                    }
                }
            }
            Change::Reserve { key, kind } => {
                self.check_key(port, key)?;
                match self.held {
                    None => self.held = Some(Held { kind, by: port }),
                    Some(held) if held.kind == kind && self.holds(port) => {}
                    Some(_) => return Err(CONFLICT),
                }
            }
            Change::Release { key, kind } => {
                self.check_key(port, key)?;
                if self.holds(port) {
                    if self.held.is_some_and(|held| held.kind != kind) {
                        let asc = asc::INVALID_RELEASE_OF_PERSISTENT_RESERVATION;
                        return Err(ScsiError::illegal(asc));
                    }
                    self.end_reservation(port, &mut effects);
                }
            }
            Change::Clear { key } => {
                self.check_key(port, key)?;
                effects.tell(self.others(port), UnitAttention::ReservationsPreempted);
                self.keys.clear();
                self.held = None;
            }
            Change::Preempt { key, other, kind } => {
                self.check_key(port, key)?;
                self.preempt(port, other, kind, &mut effects)?;
            }
            Change::Move { key, other, to, unregister, survives } => {
                self.check_key(port, key)?;
                let movable = |held: Held| held.by == port && !held.kind.is_of_all_registrants();
                let held = self.held.filter(|held| movable(*held)).ok_or(CONFLICT)?;
                if other == 0 {
                    return Err(WRONG_OTHER_KEY);
                }
                self.keys.insert(to, other);
                self.held = Some(Held { by: to, ..held });
                if unregister {
                    self.keys.remove(&port);
                }
                self.survives = survives;
            }
        }
        if !matches!(change, Change::Reserve { .. } | Change::Release { .. }) {
            self.generation = self.generation.wrapping_add(1);
        }
        Ok(effects)
    }

    /// PREEMPT (SPC-5 5.14.11.2.6 ff).
    fn preempt(
        &mut self,
        port: Port,
        other: Key,
        kind: Type,
        effects: &mut Effects,
    ) -> Result<(), ScsiError> {
        let of_all = self.held.is_some_and(|held| held.kind.is_of_all_registrants());
        let takes_over =
            self.held.is_some() && if of_all { other == 0 } else { self.holders_key() == other };
        if other == 0 && !of_all {
            return Err(WRONG_OTHER_KEY);
        }
        let everyone = of_all && other == 0;
        let loses = |state: &Self, p: &Port| everyone || state.keys.get(p) == Some(&other);
        let preempted: Vec<Port> =
            self.others(port).into_iter().filter(|p| loses(self, p)).collect();
        // Who takes the reservation over keeps his registration. Else all go that have the key, his own as well; of that
        // he is not told.
        let own = !takes_over && self.keys.get(&port) == Some(&other);
        if preempted.is_empty() && !takes_over && !own {
            return Err(CONFLICT);
        }
        self.keys.retain(|p, _| !(preempted.contains(p) || own && *p == port));
        effects.tell(preempted.iter().copied(), UnitAttention::RegistrationsPreempted);
        effects.preempted = preempted;
        if takes_over {
            let before = self.held.replace(Held { kind, by: port });
            if before.is_some_and(|held| held.kind != kind) {
                effects.tell(self.others(port), UnitAttention::ReservationsReleased);
            }
        } else if of_all && self.keys.is_empty() {
            self.held = None;
        }
        Ok(())
    }

    /// As a line of the notes: `TYPE@PORT` or `-`, then `KEY@PORT` for each who is registered.
    fn encode(&self) -> Option<String> {
        let held = match self.held {
            Some(Held { kind, by }) => format!("{}@{}", kind as u8, by.0),
            None => "-".into(),
        };
        let keys = self.keys.iter().map(|(port, key)| format!(" {key:016x}@{}", port.0));
        (self.survives && !self.keys.is_empty()).then(|| held + &keys.collect::<String>())
    }

    fn decode(text: &str) -> Option<Self> {
        let port = |text: &str| text.parse().ok().map(Port);
        let mut words = text.split(' ');
        let held = match words.next()? {
            "-" => None,
            word => {
                let (kind, by) = word.split_once('@')?;
                Some(Held { kind: Type::parse(kind.parse().ok()?)?, by: port(by)? })
            }
        };
        let key = |word: &str| {
            let (key, of) = word.split_once('@')?;
            Some((port(of)?, Key::from_str_radix(key, 16).ok()?))
        };
        let keys = words.map(key).collect::<Option<_>>()?;
        Some(State { keys, held, survives: true, ..State::default() })
    }
}

/// The reservations of one disk.
#[derive(Debug, Default)]
pub struct Reservations {
    state: Mutex<State>,
    /// Whether anything is reserved: what every command looks at.
    reserved: AtomicBool,
    /// Held by who changes the state and has to note it first.
    changing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reservations {
    /// The reservations as they were noted.
    pub fn of(notes: &Notes) -> Self {
        let reservations = Self::default();
        if let Some(text) = notes.get(NOTE) {
            match State::decode(&text) {
                Some(state) => reservations.become_state(state),
                None => {
                    log::error!("the reservations noted beside the image make no sense: {text}")
                }
            }
        }
        reservations
    }

    /// What is noted may be another's by now: then that is in force. Blocks.
    pub fn take_over(&self, notes: &Notes) {
        let _alone = lock(&self.changing);
        let generation = self.state().generation;
        if notes.get(NOTE) != self.state().encode() {
            self.become_state(State { generation, ..Self::of(notes).state() });
        }
    }

    fn become_state(&self, new: State) {
        let reserved = new.held.is_some() || new.basic.is_some();
        let mut state = lock(&self.state);
        *state = new;
        self.reserved.store(reserved, Ordering::Release);
    }

    /// What is registered and reserved now.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// Whether a command may run.
    ///
    /// # Errors
    /// RESERVATION CONFLICT.
    #[inline]
    pub fn check(&self, port: Port, conflict: Conflict, cdb: &Cdb) -> Result<(), ScsiError> {
        match self.reserved.load(Ordering::Acquire) {
            false => Ok(()),
            true => self.check_reserved(port, conflict, cdb),
        }
    }

    #[cold]
    fn check_reserved(&self, port: Port, conflict: Conflict, cdb: &Cdb) -> Result<(), ScsiError> {
        if lock(&self.state).forbids(port, conflict, cdb) { Err(CONFLICT) } else { Ok(()) }
    }

    /// Makes a change that nothing has to be noted for; `None` if that is not known at once, or not so.
    ///
    /// # Errors
    /// If the initiator may not; then nothing has changed.
    pub fn change_now(&self, port: Port, change: Change) -> Option<Result<Effects, ScsiError>> {
        let _alone = self.changing.try_lock().ok()?;
        let old = self.state();
        let mut new = old.clone();
        let effects = match new.apply(port, change) {
            Ok(effects) => effects,
            Err(error) => return Some(Err(error)),
        };
        if old.encode().is_some() || new.encode().is_some() {
            return None;
        }
        self.become_state(new);
        Some(Ok(effects))
    }

    /// Makes a change, notes it where it is to survive, and says what follows from it. It waits for the host.
    ///
    /// # Errors
    /// If the initiator may not, or the host cannot keep it; then nothing has changed.
    pub fn change(&self, port: Port, change: Change, notes: &Notes) -> Result<Effects, ScsiError> {
        let _alone = lock(&self.changing);
        let mut new = self.state();
        let effects = new.apply(port, change)?;
        notes
            .set(NOTE, new.encode().as_deref())
            .map_err(|_| ScsiError::illegal(asc::INSUFFICIENT_REGISTRATION_RESOURCES))?;
        self.become_state(new);
        Ok(effects)
    }

    /// Whether PERSISTENT RESERVE IN may look (SPC-2 5.5.1).
    ///
    /// # Errors
    /// RESERVATION CONFLICT under a RESERVE of somebody else.
    pub fn check_basic(&self, port: Port) -> Result<(), ScsiError> {
        let other = lock(&self.state).basic.is_some_and(|holder| holder != port);
        if other { Err(CONFLICT) } else { Ok(()) }
    }

    /// RESERVE. Where there are registrations it changes nothing and is right for who is let through
    /// anyway (SPC-5 5.14.3; CRH).
    ///
    /// # Errors
    /// RESERVATION CONFLICT; BUSY while a change is being noted, which would not know of it.
    pub fn reserve(&self, port: Port) -> Result<(), ScsiError> {
        let _alone = self.changing.try_lock().map_err(|_| ScsiError::Busy)?;
        self.basic(port, |state| state.basic = Some(port))
    }

    /// RELEASE: by another than the holder it changes nothing.
    ///
    /// # Errors
    /// RESERVATION CONFLICT.
    pub fn release(&self, port: Port) -> Result<(), ScsiError> {
        let other = lock(&self.state).basic.is_some_and(|holder| holder != port);
        if other { Ok(()) } else { self.basic(port, |state| state.basic = None) }
    }

    fn basic(&self, port: Port, change: impl FnOnce(&mut State)) -> Result<(), ScsiError> {
        let mut state = lock(&self.state);
        if !state.keys.is_empty() {
            let admitted = match state.held {
                Some(held) => state.admits(port, held),
                None => state.keys.contains_key(&port),
            };
            return if admitted { Ok(()) } else { Err(CONFLICT) };
        }
        if state.basic.is_some_and(|holder| holder != port) {
            return Err(CONFLICT);
        }
        change(&mut state);
        self.reserved.store(state.basic.is_some(), Ordering::Release);
        Ok(())
    }

    /// An initiator is gone, or starts anew: what it has reserved by RESERVE is free.
    pub fn nexus_lost(&self, port: Port) {
        self.free(|holder| holder == port);
    }

    /// A reset ends what was reserved by RESERVE; registrations and persistent reservations stay.
    pub fn reset(&self) {
        self.free(|_| true);
    }

    fn free(&self, whose: impl FnOnce(Port) -> bool) {
        let mut state = lock(&self.state);
        if state.basic.is_some_and(whose) {
            state.basic = None;
            self.reserved.store(state.held.is_some(), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_survives_is_noted_whole() {
        let notes = Notes::in_memory();
        let port = Port(2);
        let reservations = Reservations::of(&notes);
        let change = |change| reservations.change(port, change, &notes).unwrap();
        change(Change::Register { old: Some(0), new: 0xab, survives: true });
        change(Change::Reserve { key: 0xab, kind: Type::WriteExclusive });
        let again = Reservations::of(&notes).state();
        assert_eq!(again, State { generation: 0, ..reservations.state() });
        assert!(again.holds(port) && again.holders_key() == 0xab);
        change(Change::Register { old: None, new: 0xcd, survives: false });
        assert_eq!(Reservations::of(&notes).state(), State::default());
    }

    /// What is to be noted, or not to be any more, is not done at once.
    #[test]
    fn a_change_at_once_is_one_that_nothing_is_noted_of() {
        let (notes, port) = (Notes::in_memory(), Port(1));
        let reservations = Reservations::of(&notes);
        let register = |new, survives| Change::Register { old: None, new, survives };
        assert_eq!(reservations.change_now(port, register(1, true)), None);
        assert_eq!(reservations.state(), State::default());
        assert!(reservations.change_now(port, register(1, false)).unwrap().is_ok());
        reservations.change(port, register(2, true), &notes).unwrap();
        let before = reservations.state();
        assert_eq!(reservations.change_now(port, register(3, false)), None);
        assert_eq!(reservations.change_now(port, Change::Clear { key: 2 }), None);
        assert_eq!(reservations.state(), before);
        let _alone = lock(&reservations.changing);
        assert_eq!(
            reservations.change_now(port, Change::Clear { key: 9 }),
            None,
            "it is not known"
        );
    }

    #[test]
    fn a_reserve_of_old_is_its_holders() {
        let reservations = Reservations::default();
        let (one, other) = (Port(1), Port(2));
        reservations.reserve(one).unwrap();
        reservations.nexus_lost(other);
        assert_eq!(reservations.release(other), Ok(()));
        let write = |port| reservations.check(port, Conflict::Always, &Cdb::new(&[]));
        assert_eq!((write(one), write(other)), (Ok(()), Err(CONFLICT)));
        reservations.nexus_lost(one);
        assert_eq!(write(other), Ok(()));
    }

    /// Who moves a reservation says anew whether all of it survives.
    #[test]
    fn a_move_has_an_aptpl_of_its_own() {
        let notes = Notes::in_memory();
        let (one, other) = (Port(1), Port(2));
        let reservations = Reservations::of(&notes);
        let change = |who, change| reservations.change(who, change, &notes).unwrap();
        change(one, Change::Register { old: None, new: 1, survives: false });
        change(one, Change::Reserve { key: 1, kind: Type::WriteExclusive });
        let moving =
            |key, to, survives| Change::Move { key, other: 7, to, unregister: true, survives };
        change(one, moving(1, other, true));
        assert!(Reservations::of(&notes).state().holds(other));
        change(other, moving(7, one, false));
        assert_eq!(Reservations::of(&notes).state(), State::default());
        assert!(reservations.state().holds(one));
    }

    /// A RESERVE that was answered GOOD is not undone by a registration that was being noted meanwhile, and one that has
    /// ended does not come back.
    #[test]
    fn a_reserve_and_a_change_do_not_undo_each_other() {
        let reservations = Reservations::default();
        let (one, other) = (Port(1), Port(2));
        {
            // As while a change waits for the host to note it.
            let _alone = lock(&reservations.changing);
            assert_eq!(reservations.reserve(one), Err(ScsiError::Busy));
        }
        reservations.reserve(one).unwrap();
        let register = Change::Register { old: None, new: 7, survives: true };
        assert_eq!(reservations.change(other, register, &Notes::in_memory()), Err(CONFLICT));
        reservations.nexus_lost(one);
        reservations.change(other, register, &Notes::in_memory()).unwrap();
        assert_eq!((reservations.state().basic, reservations.reserve(one)), (None, Err(CONFLICT)));
    }

    /// Registrations that another process has changed are in force, others stay as they are.
    #[test]
    fn what_another_has_noted_is_in_force() {
        let (notes, port) = (Notes::in_memory(), Port(2));
        let (one, other) = (Reservations::of(&notes), Reservations::of(&notes));
        let register = |new, survives| Change::Register { old: None, new, survives };
        one.change(port, register(7, true), &notes).unwrap();
        one.change(port, Change::Reserve { key: 7, kind: Type::WriteExclusive }, &notes).unwrap();
        other.take_over(&notes);
        assert!(other.state().holds(port) && other.reserved.load(Ordering::Acquire));
        let before = one.state();
        one.take_over(&notes);
        assert_eq!(one.state(), before);
        other.change(port, Change::Clear { key: 7 }, &notes).unwrap();
        one.take_over(&notes);
        assert_eq!(one.state(), State { generation: before.generation, ..State::default() });
        assert!(!one.reserved.load(Ordering::Acquire));
        // What is not to survive is nowhere else.
        one.change(port, register(8, false), &notes).unwrap();
        one.take_over(&notes);
        assert_eq!(one.state().keys.get(&port), Some(&8));
    }

    /// Only who is registered, before or after, says whether registrations survive.
    #[test]
    fn a_stranger_who_stays_one_changes_nothing() {
        let notes = Notes::in_memory();
        let (port, stranger) = (Port(1), Port(2));
        let reservations = Reservations::of(&notes);
        let change = |who, change| reservations.change(who, change, &notes).unwrap();
        change(port, Change::Register { old: None, new: 7, survives: true });
        change(port, Change::Reserve { key: 7, kind: Type::ExclusiveAccess });
        let (state, noted) = (reservations.state(), notes.get(NOTE));
        assert!(noted.is_some());
        for old in [Some(0), None] {
            for survives in [false, true] {
                let effects = change(stranger, Change::Register { old, new: 0, survives });
                assert_eq!(effects, Effects::default());
                // That it was asked for is counted.
                let generation = reservations.state().generation;
                assert_eq!(reservations.state(), State { generation, ..state.clone() });
                assert_eq!(notes.get(NOTE), noted);
            }
        }
        let wrong = Change::Register { old: Some(9), new: 0, survives: false };
        assert_eq!(reservations.change(stranger, wrong, &notes), Err(CONFLICT));
        // Who comes and who goes may.
        change(stranger, Change::Register { old: None, new: 8, survives: false });
        assert!(!reservations.state().survives && notes.get(NOTE).is_none());
        change(stranger, Change::Register { old: Some(8), new: 0, survives: true });
        assert!(reservations.state().survives);
        assert_eq!(notes.get(NOTE), noted);
    }

    #[test]
    fn notes_that_make_no_sense_are_none() {
        for text in ["", "9@1", "5@", "- 12@x", "- zz@1"] {
            assert_eq!(State::decode(text), None, "{text}");
        }
    }
}
