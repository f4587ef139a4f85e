//! What is given to a disk, and what has to be known of it until it is answered, and longer.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::reserved::{Access, Change, Reserved};
use super::{Area, Id, Time, Value, What};
use crate::frontend::{Cdb, Tmf};

/// A command to be given.
pub struct Command {
    pub lun: usize,
    pub name: &'static str,
    pub cdb: Cdb,
    pub data: Vec<u8>,
    pub room: usize,
    pub reads: Vec<Area>,
    pub writes: Vec<(Area, What)>,
    pub needs: Vec<(usize, Access)>,
    pub kind: Kind,
}

impl Command {
    pub fn new(lun: usize, name: &'static str, access: Access, cdb: Cdb) -> Self {
        let needs = vec![(lun, access)];
        let (reads, writes, data, kind) = (vec![], vec![], vec![], Kind::Plain);
        Command { lun, name, cdb, data, room: 0, reads, writes, needs, kind }
    }

    pub fn data(mut self, data: Vec<u8>) -> Self {
        self.data = data;
        self
    }

    pub fn room(mut self, room: usize) -> Self {
        self.room = room;
        self
    }

    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn reads(mut self, area: Area) -> Self {
        self.reads.push(area);
        self
    }

    pub fn writes(mut self, area: Area, what: What) -> Self {
        self.writes.push((area, what));
        self
    }

    pub fn needs(mut self, lun: usize, access: Access) -> Self {
        self.needs.push((lun, access));
        self
    }
}

/// What an answer means.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Plain,
    Read,
    LbaStatus,
    Compare(Vec<Value>),
    /// EXTENDED COPY or WRITE USING TOKEN.
    Copy {
        list: u32,
        background: bool,
    },
    Populate {
        list: u32,
        ranges: Vec<Area>,
    },
    TokenInformation(u32),
    CopyStatus(u32),
    StopCopy(u32),
    Reservation {
        change: Change,
        before: Vec<Reserved>,
    },
    /// FORMAT UNIT or SANITIZE.
    Whole {
        immediate: bool,
    },
    Ready,
    Function {
        function: Tmf,
        about: u64,
    },
}

impl Kind {
    /// What ends others comes after them: functions, which nothing else ends, last.
    pub fn rank(&self) -> u8 {
        match self {
            Kind::Function { .. } => 2,
            Kind::Reservation { change: Change::Preempt { abort: true, .. }, .. } => 1,
            _ => 0,
        }
    }

    /// It changes what a disk's reservations are.
    pub fn changes_reservations(&self) -> bool {
        match self {
            Kind::Reservation { .. } => true,
            Kind::Function { function, .. } => {
                matches!(function, Tmf::LogicalUnitReset | Tmf::ItNexusReset)
            }
            _ => false,
        }
    }

    /// For the history.
    pub fn described(&self) -> String {
        match self {
            Kind::Reservation { change, .. } => format!("{change:x?}"),
            Kind::Compare(_) | Kind::Populate { .. } | Kind::Plain => String::new(),
            other => format!("{other:?}"),
        }
    }

    /// It ends others, or may.
    pub fn ends_others(&self) -> bool {
        match self {
            Kind::Function { .. } | Kind::Whole { .. } | Kind::StopCopy(_) => true,
            Kind::Reservation { change, .. } => {
                matches!(change, Change::Preempt { abort: true, .. })
            }
            _ => false,
        }
    }
}

/// What a command needs of a disk's reservations, and what it has met since it was given.
#[derive(Debug)]
pub struct Need {
    pub lun: usize,
    pub access: Access,
    pub permitted: bool,
    pub forbidden: bool,
}

impl Need {
    pub fn meet(&mut self, who: usize, possible: &[Reserved]) {
        self.permitted |= possible.iter().any(|state| !state.forbids(who, self.access));
        self.forbidden |= possible.iter().any(|state| state.forbids(who, self.access));
    }
}

/// A command or function that is not answered.
pub struct Outstanding {
    pub id: Id,
    pub guest: usize,
    pub lun: usize,
    pub name: &'static str,
    pub tag: u64,
    pub kind: Kind,
    pub needs: Vec<Need>,
    pub since: Time,
    /// Something may have ended it.
    pub disturbed: bool,
    /// A format or sanitize operation may have been in its way.
    pub beside_whole: bool,
    /// It was given to a daemon, or a connection, that has ended without an answer.
    pub again: bool,
    /// Disks that it must not write to as long as it is not let through again.
    pub kept_from: Vec<usize>,
    /// While its guest was away, others have changed the disk that it writes to, or were told that it has ended.
    pub over: bool,
}

/// A copy whose command was answered, and whose end is not known.
#[derive(Debug)]
pub struct Background {
    pub id: Id,
    pub guest: usize,
    pub lun: usize,
    pub list: u32,
    pub since: Time,
    pub answered: Time,
    pub needs: Vec<Need>,
    /// As of the command.
    pub kept_from: Vec<usize>,
}

/// A format or sanitize operation whose end is not known.
#[derive(Debug)]
pub struct Whole {
    pub id: Id,
    pub since: Time,
    pub answered: Option<Time>,
    /// It was accepted.
    pub sure: bool,
}

pub struct Token {
    pub guest: usize,
    pub lun: usize,
    pub list: u32,
    pub ranges: Vec<Area>,
    pub values: Vec<BTreeSet<Value>>,
    pub answered: Time,
    pub bytes: Option<Vec<u8>>,
    /// Its disk was erased since.
    pub dead: bool,
}

pub const POINT_IN_TIME: [u8; 4] = [0, 0x80, 0, 0];

pub struct Disk {
    pub path: PathBuf,
    pub options: String,
    pub cscd: Vec<u8>,
    /// What its reservations may be.
    pub reserved: Vec<Reserved>,
    /// Something that changes them is under way.
    pub changing: bool,
    pub whole: Option<Whole>,
}
