//! What each block of some disks may hold, while operations on them are under way and when they have ended.
//!
//! A disk is a set of registers. An operation that writes may take effect at any time between its beginning and its end;
//! one that was answered GOOD has taken effect by then, one that was ended in another way may have, as a whole or in part.
//! So a block may hold what was last written to it, what was being written at the same time, and what may have been written
//! since: its [`Version`]s. A read may find what the block may hold at any time between the read's beginning and its end,
//! and a copy may write what a read would find.
//!
//! Every block that is written says who wrote it ([`Value`]), so that a wrong one tells whose it is.
#![allow(dead_code)]

pub mod commands;
pub mod reserved;
pub mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Bytes of a logical block.
pub const BLOCK: usize = 512;

/// A block is made of these, which all say the same and where in the block they are.
const CELL: usize = 16;

/// An operation: the initiator, and which of its operations it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    pub initiator: u8,
    pub number: u32,
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Id { initiator, number } = self;
        write!(f, "{}{number}", char::from(b'A'.saturating_add(*initiator)))
    }
}

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Zeroes,
    /// This byte all over.
    Fill(u8),
    /// What an operation wrote to one of its blocks.
    Of(Id, u16),
    /// Nothing that anybody wrote.
    Garbage,
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Zeroes => write!(f, "zeroes"),
            Value::Fill(byte) => write!(f, "{byte:02x} all over"),
            Value::Of(id, block) => write!(f, "{id:?}'s block {block}"),
            Value::Garbage => write!(f, "what nobody wrote"),
        }
    }
}

impl Value {
    /// Blocks filled with a byte.
    pub fn fill(byte: u8) -> Self {
        if byte == 0 { Value::Zeroes } else { Value::Fill(byte) }
    }

    fn cell(self, place: usize) -> [u8; CELL] {
        let Value::Of(Id { initiator, number }, block) = self else {
            let Value::Fill(byte) = self else { return [0; CELL] };
            return [byte; CELL];
        };
        let [n0, n1, n2, n3] = number.to_be_bytes();
        let [b0, b1] = block.to_be_bytes();
        let head = [n0, n1, n2, n3, b0, b1, initiator, place as u8 | 0x80];
        let check = head.iter().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3).rotate_left(5)
        });
        let mut cell = [0; CELL];
        cell[..8].copy_from_slice(&head);
        cell[8..].copy_from_slice(&check.to_be_bytes());
        cell
    }

    /// The bytes of such a block.
    pub fn bytes(self) -> Vec<u8> {
        (0..BLOCK / CELL).flat_map(|place| self.cell(place)).collect()
    }

    /// What is in a block: more than one value in one that several wrote to at the same time.
    pub fn found_in(block: &[u8]) -> BTreeSet<Self> {
        let cells = block.chunks(CELL).enumerate();
        cells.map(|(place, cell)| Self::of_cell(cell, place)).collect()
    }

    fn of_cell(cell: &[u8], place: usize) -> Self {
        if cell.iter().all(|byte| *byte == cell[0]) {
            return Self::fill(cell[0]);
        }
        let number = u32::from_be_bytes(cell[..4].try_into().unwrap());
        let block = u16::from_be_bytes(cell[4..6].try_into().unwrap());
        let value = Value::Of(Id { initiator: cell[6], number }, block);
        if value.cell(place) == cell { value } else { Value::Garbage }
    }
}

/// The blocks that an operation writes, in their order.
pub fn stamped(id: Id, blocks: usize) -> Vec<u8> {
    (0..blocks).flat_map(|n| Value::Of(id, n as u16).bytes()).collect()
}

/// Some blocks of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub disk: usize,
    pub lba: usize,
    pub blocks: usize,
}

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}+{}", self.disk, self.lba, self.blocks)
    }
}

impl Area {
    pub fn end(&self) -> usize {
        self.lba + self.blocks
    }

    pub fn overlaps(&self, other: &Area) -> bool {
        self.disk == other.disk && self.lba < other.end() && other.lba < self.end()
    }

    pub fn has(&self, disk: usize, block: usize) -> bool {
        self.disk == disk && (self.lba..self.end()).contains(&block)
    }
}

/// What an operation writes to an area.
#[derive(Clone, Debug)]
pub enum What {
    /// [`stamped`] blocks.
    Stamps,
    /// The first of them, to every block.
    Same,
    Zeroes,
    /// A byte all over; others while it is at it.
    Fill {
        last: u8,
        also: Vec<u8>,
    },
    /// What it reads in its area of this number.
    Copy(usize),
    /// One of these, for each block.
    Given(Vec<BTreeSet<Value>>),
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It has done what it was to do.
    Done,
    /// It may have done all of it, a part, or nothing.
    Maybe,
    /// It has done nothing.
    Not,
}

/// Counts what happens.
pub type Time = u64;

/// What a block may hold on account of one operation.
#[derive(Clone, Debug)]
struct Version {
    by: Option<Id>,
    values: BTreeSet<Value>,
    began: Time,
    /// When it was known that the operation writes no more.
    ended: Option<Time>,
}

/// What an operation may find in an area that it reads.
#[derive(Clone, Debug)]
struct Seen {
    area: Area,
    values: Vec<BTreeSet<Value>>,
    /// Where it writes what it finds.
    feeds: Option<Area>,
}

#[derive(Debug)]
struct Operation {
    began: Time,
    reads: Vec<Seen>,
    writes: Vec<(Area, What)>,
}

/// A block that holds what it may not.
#[derive(Debug)]
pub struct Wrong {
    pub disk: usize,
    pub block: usize,
    /// So many from there on do.
    pub count: usize,
    pub found: BTreeSet<Value>,
    pub allowed: BTreeSet<Value>,
}

/// The disks, and the operations on them that have not ended.
pub struct Model {
    now: Time,
    disks: Vec<Vec<Vec<Version>>>,
    operations: BTreeMap<Id, Operation>,
    /// Operations whose blocks were found.
    found: BTreeSet<Id>,
}

impl Model {
    /// So many disks of so many blocks of zeroes.
    pub fn new(disks: usize, blocks: usize) -> Self {
        let values = BTreeSet::from([Value::Zeroes]);
        let zeroes = Version { by: None, values, began: 0, ended: Some(0) };
        let disks = vec![vec![vec![zeroes]; blocks]; disks];
        Model { now: 0, disks, operations: BTreeMap::new(), found: BTreeSet::new() }
    }

    pub fn blocks(&self, disk: usize) -> usize {
        self.disks[disk].len()
    }

    pub fn now(&self) -> Time {
        self.now
    }

    /// What a block may hold now.
    pub fn may_hold(&self, disk: usize, block: usize) -> BTreeSet<Value> {
        self.disks[disk][block].iter().flat_map(|version| &version.values).copied().collect()
    }

    /// Who may have written what a block holds, with the times between which that was, for people.
    pub fn explain(&self, disk: usize, block: usize) -> String {
        let line = |v: &Version| {
            let end = v.ended.map_or("now".into(), |end| end.to_string());
            format!("  {:?} by {:?} from {} to {end}\n", v.values, v.by, v.began)
        };
        self.disks[disk][block].iter().map(line).collect()
    }

    /// An operation begins: it may be done from now on.
    pub fn begin(&mut self, id: Id, reads: &[Area], writes: &[(Area, What)]) {
        self.now += 1;
        let fed = |read: usize| {
            let copies = |(_, what): &&(Area, What)| matches!(what, What::Copy(n) if *n == read);
            writes.iter().find(copies).map(|(area, _)| *area)
        };
        let seen = |(n, area): (usize, &Area)| Seen {
            area: *area,
            values: (area.lba..area.end()).map(|block| self.may_hold(area.disk, block)).collect(),
            feeds: fed(n),
        };
        let reads = reads.iter().enumerate().map(seen).collect();
        let operation = Operation { began: self.now, reads, writes: writes.to_vec() };
        self.operations.insert(id, operation);
        for n in 0..writes.len() {
            self.open(id, n);
        }
    }

    /// Enters what an operation may write to one of its areas.
    fn open(&mut self, id: Id, write: usize) {
        let operation = &self.operations[&id];
        let began = operation.began;
        let (area, what) = operation.writes[write].clone();
        let values: Vec<BTreeSet<Value>> = (0..area.blocks)
            .map(|n| match &what {
                What::Stamps => BTreeSet::from([Value::Of(id, n as u16)]),
                What::Same => BTreeSet::from([Value::Of(id, 0)]),
                What::Zeroes => BTreeSet::from([Value::Zeroes]),
                What::Fill { last, also } => {
                    also.iter().chain([last]).map(|byte| Value::fill(*byte)).collect()
                }
                What::Copy(read) => operation.reads[*read].values[n].clone(),
                What::Given(values) => values[n].clone(),
            })
            .collect();
        for (n, values) in values.into_iter().enumerate() {
            let block = &mut self.disks[area.disk][area.lba + n];
            match block.iter_mut().find(|version| version.by == Some(id)) {
                Some(version) => {
                    version.ended = None;
                    // What it found while it was kept from writing it may write now.
                    version.values.extend(values.iter().copied());
                }
                None => {
                    let values = values.clone();
                    block.push(Version { by: Some(id), values, began, ended: None });
                }
            }
            self.show(area.disk, area.lba + n, values);
        }
    }

    /// Whoever reads a block now may find these in it, and so may whoever reads what he writes.
    fn show(&mut self, disk: usize, block: usize, values: BTreeSet<Value>) {
        let mut shown = vec![(disk, block, values)];
        while let Some((disk, block, values)) = shown.pop() {
            for (id, operation) in &mut self.operations {
                for seen in operation.reads.iter_mut().filter(|s| s.area.has(disk, block)) {
                    let place = block - seen.area.lba;
                    let new: BTreeSet<Value> =
                        values.difference(&seen.values[place]).copied().collect();
                    if new.is_empty() {
                        continue;
                    }
                    seen.values[place].extend(&new);
                    let Some(to) = seen.feeds else { continue };
                    let fed = &mut self.disks[to.disk][to.lba + place];
                    let version = fed.iter_mut().find(|version| version.by == Some(*id));
                    // What it can write no more it does not write.
                    if let Some(version) = version.filter(|version| version.ended.is_none()) {
                        version.values.extend(&new);
                        shown.push((to.disk, to.lba + place, new));
                    }
                }
            }
        }
    }

    /// What an operation that is under way may have found in each block of an area that it reads.
    pub fn seen(&self, id: Id, read: usize) -> &[BTreeSet<Value>] {
        &self.operations[&id].reads[read].values
    }

    /// An operation has ended.
    ///
    /// # Errors
    /// If it has done nothing, as it says, and its data was found.
    pub fn end(&mut self, id: Id, how: Ending) -> Result<(), String> {
        self.now += 1;
        let Some(Operation { began, writes, .. }) = self.operations.remove(&id) else {
            return Ok(());
        };
        if how == Ending::Not && self.found.contains(&id) {
            return Err(format!("{id:?} was refused, and its data was found all the same"));
        }
        for (area, what) in writes {
            for block in &mut self.disks[area.disk][area.lba..area.end()] {
                let Some(at) = block.iter().position(|version| version.by == Some(id)) else {
                    continue;
                };
                match how {
                    Ending::Not => drop(block.remove(at)),
                    Ending::Maybe => drop(block[at].ended.get_or_insert(self.now)),
                    Ending::Done => {
                        let version = &mut block[at];
                        version.ended.get_or_insert(self.now);
                        if let What::Fill { last, .. } = what {
                            version.values = BTreeSet::from([Value::fill(last)]);
                        }
                        // Whatever was over before it began is overwritten.
                        block.retain(|version| {
                            version.by == Some(id) || version.ended.is_none_or(|end| end >= began)
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// An operation writes no more to a disk, and has not since a time.
    pub fn over_on(&mut self, id: Id, disk: usize, since: Time) {
        let Some(operation) = self.operations.get(&id) else { return };
        for (area, _) in operation.writes.iter().filter(|(area, _)| area.disk == disk) {
            for block in &mut self.disks[disk][area.lba..area.end()] {
                let version = block.iter_mut().find(|version| version.by == Some(id));
                if let Some(version) = version {
                    version.ended = Some(version.ended.unwrap_or(since).min(since));
                }
            }
        }
    }

    /// It may write again.
    pub fn goes_on(&mut self, id: Id) {
        let count = self.operations.get(&id).map_or(0, |operation| operation.writes.len());
        (0..count).for_each(|write| self.open(id, write));
    }

    /// When an operation that is under way began.
    pub fn began(&self, id: Id) -> Option<Time> {
        self.operations.get(&id).map(|operation| operation.began)
    }

    /// Where an operation under way writes.
    pub fn written_by(&self, id: Id) -> Vec<Area> {
        let operation = self.operations.get(&id);
        operation.map_or(vec![], |o| o.writes.iter().map(|(area, _)| *area).collect())
    }

    /// Where an operation under way reads.
    pub fn read_by(&self, id: Id) -> Vec<Area> {
        let operation = self.operations.get(&id);
        operation.map_or(vec![], |o| o.reads.iter().map(|seen| seen.area).collect())
    }

    /// Holds what an operation has found in an area against what it may find.
    ///
    /// # Errors
    /// The first block that is wrong.
    pub fn check(&mut self, id: Id, read: usize, bytes: &[u8]) -> Result<(), Wrong> {
        let operation = &self.operations[&id];
        let (began, Seen { area, values, .. }) = (operation.began, operation.reads[read].clone());
        let found: Vec<_> = bytes.chunks(BLOCK).map(Value::found_in).collect();
        let fits = |n: usize| found[n].is_subset(&values[n]);
        let whole = found.len().min(values.len());
        if let Some(n) = (0..whole).find(|n| !fits(*n)) {
            let count = (n..whole).take_while(|n| !fits(*n)).count();
            let (found, allowed) = (found[n].clone(), values[n].clone());
            return Err(Wrong { disk: area.disk, block: area.lba + n, count, found, allowed });
        }
        for (n, found) in found.into_iter().enumerate().take(whole) {
            let (disk, block) = (area.disk, area.lba + n);
            let by = |value: &Value| if let Value::Of(id, _) = value { Some(*id) } else { None };
            self.found.extend(found.iter().filter_map(by));
            // Nothing was under way that could change it: this is what it holds.
            let versions = &mut self.disks[disk][block];
            let last = versions.iter().map(|version| version.ended).max().flatten();
            let quiet = versions.iter().all(|v| v.ended.is_some_and(|end| end < began));
            if let (true, Some(ended)) = (quiet, last) {
                *versions =
                    vec![Version { by: None, values: found, began: ended, ended: Some(ended) }];
            }
        }
        Ok(())
    }
}
