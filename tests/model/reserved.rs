//! Who may do what to a disk that initiators share: registrations, reservations and the RESERVE of old, written from SPC-5
//! 5.14 and SPC-2 5.5 without a look at what is tested.

use std::collections::BTreeMap;

/// What a command does, as far as reservations are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It runs under any persistent reservation.
    Ready,
    Read,
    Write,
}

/// A change that an initiator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// `None`: REGISTER AND IGNORE EXISTING KEY.
    Register {
        old: Option<u64>,
        new: u64,
        aptpl: bool,
    },
    Reserve(u8),
    Release(u8),
    Clear,
    Preempt {
        other: u64,
        kind: u8,
        abort: bool,
    },
    /// RESERVE and RELEASE of old.
    Take,
    GiveBack,
}

/// The registrations and reservations of a disk. Initiators are numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    pub keys: BTreeMap<usize, u64>,
    /// Type and holder.
    pub held: Option<(u8, usize)>,
    pub survives: bool,
    pub basic: Option<usize>,
}

const FOR_ALL_REGISTRANTS: u8 = 7;
const FOR_REGISTRANTS: u8 = 5;

impl Reserved {
    fn holds(&self, who: usize) -> bool {
        self.held.is_some_and(|(kind, by)| match kind >= FOR_ALL_REGISTRANTS {
            true => self.keys.contains_key(&who),
            false => by == who,
        })
    }

    /// Whether a command must be refused.
    pub fn forbids(&self, who: usize, access: Access) -> bool {
        if self.basic.is_some_and(|by| by != who) {
            return true;
        }
        let Some((kind, by)) = self.held else { return false };
        let admitted = self.keys.contains_key(&who) && (by == who || kind >= FOR_REGISTRANTS);
        let excludes_reading = [3, 6, 8].contains(&kind);
        !admitted && (access == Access::Write || access == Access::Read && excludes_reading)
    }

    /// What a change leads to, and whose registrations it takes away; `None` if it is refused.
    pub fn after(&self, who: usize, change: Change) -> Option<(Self, Vec<usize>)> {
        let mut new = self.clone();
        let registered = self.keys.get(&who).copied();
        match change {
            Change::Take | Change::GiveBack if !self.keys.is_empty() => {
                // SPC-5 5.14.3: it changes nothing, and is right for who is let through.
                let may = if self.held.is_some() {
                    !self.forbids(who, Access::Write)
                } else {
                    registered.is_some()
                };
                return may.then_some((new, vec![]));
            }
            Change::Take | Change::GiveBack => {
                if self.basic.is_some_and(|by| by != who) {
                    return None;
                }
                new.basic = (change == Change::Take).then_some(who);
                return Some((new, vec![]));
            }
            _ if self.basic.is_some() => return None,
            Change::Register { old, new: key, aptpl } => {
                if old.is_some_and(|old| old != registered.unwrap_or(0)) {
                    return None;
                }
                if registered.is_none() && key == 0 {
                    return Some((new, vec![]));
                }
                new.survives = aptpl;
                if key == 0 {
                    new.remove(who);
                } else {
                    new.keys.insert(who, key);
                }
                return Some((new.settled(), vec![]));
            }
            _ => registered?,
        };
        let mut preempted = vec![];
        match change {
            Change::Reserve(kind) => match self.held {
                None => new.held = Some((kind, who)),
                Some((held, _)) if held == kind && self.holds(who) => {}
                Some(_) => return None,
            },
            Change::Release(_) if self.holds(who) => new.held = None,
            Change::Clear => new = Self::default(),
            Change::Preempt { other, kind, .. } => {
                let for_all = self.held.is_some_and(|(kind, _)| kind >= FOR_ALL_REGISTRANTS);
                let everybody = for_all && other == 0;
                let holders = self.held.and_then(|(_, by)| self.keys.get(&by)) == Some(&other);
                let takes = everybody || !for_all && holders;
                let loses = |(by, key): (&usize, &u64)| {
                    (*by != who && (everybody || *key == other)).then_some(*by)
                };
                preempted = self.keys.iter().filter_map(loses).collect();
                if preempted.is_empty() && !takes {
                    return None;
                }
                new.keys.retain(|by, _| !preempted.contains(by));
                if takes {
                    new.held = Some((kind, who));
                }
            }
            _ => {}
        }
        Some((new.settled(), preempted))
    }

    fn remove(&mut self, who: usize) {
        self.keys.remove(&who);
        if let Some((kind, by)) = self.held {
            let ends = if kind >= FOR_ALL_REGISTRANTS { self.keys.is_empty() } else { by == who };
            self.held = self.held.filter(|_| !ends);
        }
    }

    /// Nothing can be said of how long nothing lasts.
    fn settled(mut self) -> Self {
        self.survives &= !self.keys.is_empty();
        self
    }

    /// As it is when the daemon has been away.
    pub fn restarted(&self) -> Self {
        if self.survives { Self { basic: None, ..self.clone() } } else { Self::default() }
    }

    /// As it is when somebody's RESERVE is over.
    pub fn without_basic(&self, of: impl Fn(usize) -> bool) -> Self {
        Self { basic: self.basic.filter(|by| !of(*by)), ..self.clone() }
    }
}
