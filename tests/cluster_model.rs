//! Several initiators at once, each with several commands in flight, on disks that they share; or one that migrates between
//! two daemons. Whatever they do to each other, and whatever becomes of the daemon, no block ever holds what it may not
//! (`model`): writes, copies and tokens in the background, formats, reservations and those who preempt them, resets, rings
//! that stop, connections that break, `kill -9`.
//!
//! An episode is a few hundred steps from one seed. Which operation meets which is up to the scheduler, so that a seed may
//! have to be tried several times. What is printed for a failure is the history of the wrong block, and where all of it is
//! kept. Seeds that have failed are in `regressions/cluster_model.txt` and come first.
//!
//! `THINLUN_TEST_MODEL_SECONDS` says how long each test takes on each file system (30), `THINLUN_TEST_MODEL_SEED` is the one
//! seed to use all that time.

mod frontend;
mod model;
mod mounts;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

use frontend::cdb::{FUA, write_same};
use frontend::pattern::Rng;
use frontend::third_party as lists;
use frontend::*;
use model::commands::{Background, Command, Disk, Kind, Outstanding, POINT_IN_TIME, Token, Whole};
use model::reserved::{Access, Change, Reserved};
use model::world::{BLOCKS, DISKS, World};
use model::{Area, BLOCK, Ending, Value, What, stamped};
use mounts::{Kind as FileSystem, Mount};

/// Steps of an episode.
const STEPS: u32 = 400;
/// Copies in the background at the same time: fewer than there may be of all copies.
const MOST_COPIES: usize = 5;

/// What can be done in a step, and how often it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Read,
    Write,
    WriteAtomic,
    CompareAndWrite,
    Unmap,
    WriteSame,
    Flush,
    LbaStatus,
    Copy,
    CopyInBackground,
    Knot,
    Populate,
    UseToken,
    UseTokenInBackground,
    AskOfCopy,
    StopCopy,
    Format,
    Register,
    Reserve,
    Preempt,
    PreemptAndAbort,
    TakeOrGiveBack,
    AbortTask,
    AbortTaskSet,
    ResetUnit,
    ResetNexus,
    LookAtReservations,
    LookAtDisks,
    ResetDevice,
    StopRings,
    Reboot,
    HangUp,
    Kill,
    Restart,
    Migrate,
}

use Action as A;

const ACTIONS: [(Action, u64); 34] = [
    (A::Read, 120),
    (A::Write, 240),
    (A::WriteAtomic, 12),
    (A::CompareAndWrite, 40),
    (A::Unmap, 40),
    (A::WriteSame, 40),
    (A::Flush, 20),
    (A::LbaStatus, 20),
    (A::Copy, 60),
    (A::CopyInBackground, 60),
    (A::Knot, 12),
    (A::Populate, 30),
    (A::UseToken, 30),
    (A::UseTokenInBackground, 30),
    (A::AskOfCopy, 40),
    (A::StopCopy, 6),
    (A::Format, 8),
    (A::Register, 16),
    (A::Reserve, 8),
    (A::Preempt, 4),
    (A::PreemptAndAbort, 12),
    (A::TakeOrGiveBack, 4),
    (A::AbortTask, 20),
    (A::AbortTaskSet, 8),
    (A::ResetUnit, 10),
    (A::ResetNexus, 4),
    (A::LookAtReservations, 8),
    (A::LookAtDisks, 2),
    (A::ResetDevice, 6),
    (A::StopRings, 6),
    (A::Reboot, 4),
    (A::HangUp, 4),
    (A::Kill, 3),
    (A::Restart, 2),
];

/// With one guest that migrates.
const MIGRATIONS: (Action, u64) = (A::Migrate, 16);

impl World {
    fn step(&mut self, action: Action) {
        let guest = self.guest();
        match action {
            A::Read | A::Write | A::WriteAtomic | A::Unmap | A::WriteSame | A::CompareAndWrite => {
                let area = self.area(match action {
                    A::Unmap | A::WriteSame => 256,
                    A::CompareAndWrite => 6,
                    A::WriteAtomic => 16,
                    _ => 48,
                });
                self.transfer(guest, action, area);
            }
            A::Knot => self.knot(),
            A::Flush => {
                let lun = self.disk();
                let cdb = cdb::synchronize_cache10(0, 0);
                self.give(guest, Command::new(lun, "SYNCHRONIZE CACHE", Access::Write, cdb));
            }
            A::LbaStatus => {
                let area = self.area(256);
                let cdb = cdb::get_lba_status16(area.lba as u64, 8 + 16 * 16, 0);
                let command = Command::new(area.disk, "GET LBA STATUS", Access::Read, cdb);
                let command = command.room(8 + 16 * 16).reads(area).kind(Kind::LbaStatus);
                self.give(guest, command);
            }
            A::Copy | A::CopyInBackground => self.copy(guest, action == A::CopyInBackground),
            A::Populate => self.populate(guest),
            A::UseToken | A::UseTokenInBackground => {
                self.use_token(guest, action == A::UseTokenInBackground);
            }
            A::AskOfCopy | A::StopCopy => self.ask_of_copy(action == A::StopCopy),
            A::Format => self.format(guest),
            A::Register | A::Reserve | A::Preempt | A::PreemptAndAbort | A::TakeOrGiveBack => {
                self.reserve(guest, action);
            }
            A::AbortTask => {
                let mine = self.out.values().filter(|o| o.guest == guest && o.tag != 0);
                let all: Vec<(usize, u64)> = mine.map(|o| (o.lun, o.tag)).collect();
                if !all.is_empty() {
                    let (lun, tag) = *self.rng.pick(&all);
                    self.give_function(guest, lun, Tmf::AbortTask, tag);
                }
            }
            A::AbortTaskSet => {
                let (lun, function) =
                    (self.disk(), *self.rng.pick(&[Tmf::AbortTaskSet, Tmf::ClearTaskSet]));
                self.give_function(guest, lun, function, 0);
            }
            A::ResetUnit | A::ResetNexus => self.reset(guest, action == A::ResetNexus),
            A::LookAtReservations => {
                let lun = self.disk();
                if !self.disks[lun].changing {
                    self.look_at_reservations(lun);
                }
            }
            A::LookAtDisks => {
                self.settle();
                self.look_at_disks("at a look");
            }
            A::ResetDevice => {
                self.event(format!("guest {guest} resets its device"));
                self.collect();
                self.guests[guest].fe().reset_device();
                self.abandon(guest);
                self.guests[guest].fe().start();
            }
            A::StopRings => {
                self.event(format!("guest {guest} stops its rings"));
                let bases = self.stop_rings(guest);
                self.collect();
                self.end_background(Ending::Maybe, |copy| copy.guest == guest);
                self.event(format!("guest {guest} starts its rings"));
                let fe = self.guests[guest].fe();
                bases.iter().for_each(|(queue, base)| fe.start_queue(*queue, *base));
                bases.iter().for_each(|(queue, _)| fe.enable_queue(*queue, true));
            }
            A::Reboot => {
                self.event(format!("guest {guest} dies"));
                self.guests[guest].fe = None;
                self.boot(guest);
                self.abandon(guest);
                self.event(format!("guest {guest} is back"));
            }
            A::HangUp => {
                self.event(format!("guest {guest} hangs up"));
                self.collect();
                self.again(|of| of == guest);
                let daemon = self.daemon.as_ref().expect("a daemon");
                let fe = self.guests[guest].fe.as_mut().expect("a guest");
                fe.hang_up();
                fe.reconnect_to(daemon, guest);
                // Its first answer is one of the new connection.
                self.ask(guest, 0, cdb::inquiry(36), 36).expect_good();
                self.collect();
                self.nexus_lost(guest);
                self.event(format!("guest {guest} is back"));
            }
            A::Kill | A::Restart => self.restart(action == A::Restart),
            A::Migrate => self.migrate(),
        }
        self.tend();
    }

    fn transfer(&mut self, guest: usize, action: Action, area: Area) {
        let id = self.next_id(guest);
        let (disk, lba, count) = (area.disk, area.lba as u64, area.blocks as u32);
        let data = stamped(id, area.blocks);
        let command = |name, cdb| Command::new(disk, name, Access::Write, cdb);
        let command = match action {
            A::Read => {
                let cdb = cdb::read16(lba, count);
                let read = Command::new(disk, "READ", Access::Read, cdb).room(data.len());
                read.reads(area).kind(Kind::Read)
            }
            A::Write => {
                let (name, bits) =
                    if self.rng.one_in(4) { ("WRITE, FUA", FUA) } else { ("WRITE", 0) };
                let write = command(name, cdb::write16(lba, count).or(1, bits));
                write.data(data).writes(area, What::Stamps)
            }
            A::WriteAtomic => {
                let cdb = Cdb::new(0x9c).be64(2, lba).be16(12, area.blocks as u16);
                command("WRITE ATOMIC", cdb).data(data).writes(area, What::Stamps)
            }
            A::Unmap => {
                let list = cdb::unmap_list(&[(lba, count)]);
                let cdb = cdb::unmap(self.rng.one_in(3), list.len() as u16);
                command("UNMAP", cdb).data(list).writes(area, What::Zeroes)
            }
            A::WriteSame => {
                use write_same::{NDOB, UNMAP};
                let flags = *self.rng.pick(&[0, 0, NDOB, NDOB | UNMAP]);
                let same = command("WRITE SAME", cdb::write_same16(flags, lba, count));
                match flags {
                    0 => same.data(data[..BLOCK].to_vec()).writes(area, What::Same),
                    _ => same.writes(area, What::Zeroes),
                }
            }
            _ => {
                let guess: Vec<Value> = (area.lba..area.end())
                    .map(|block| {
                        let all: Vec<Value> =
                            self.model.may_hold(disk, block).into_iter().collect();
                        *self.rng.pick(&all)
                    })
                    .collect();
                let compared: Vec<u8> = guess.iter().flat_map(|value| value.bytes()).collect();
                let cdb = cdb::compare_and_write(lba, area.blocks as u8);
                let compare = command("COMPARE AND WRITE", cdb).data([compared, data].concat());
                compare.reads(area).writes(area, What::Stamps).kind(Kind::Compare(guess))
            }
        };
        self.give_as(id, guest, command);
    }

    fn copy(&mut self, guest: usize, background: bool) {
        if background && self.background.len() >= MOST_COPIES {
            return;
        }
        let (mut from, mut to): (Vec<Area>, Vec<Area>) = (vec![], vec![]);
        let most = *self.rng.pick(&[16, 64, 256]);
        for _ in 0..self.rng.between(1, 8) {
            let (mut source, mut target) = (self.area(most), self.area(most));
            source.blocks = source.blocks.min(target.blocks);
            target.blocks = source.blocks;
            // None overwrites what another reads or writes.
            let overwritten = |area: &Area| area.overlaps(&target);
            let both = source.overlaps(&target) || from.iter().chain(&to).any(overwritten);
            if both || to.iter().any(|area| area.overlaps(&source)) {
                continue;
            }
            from.push(source);
            to.push(target);
        }
        if !to.is_empty() {
            self.give_copy(guest, background, from, to);
        }
    }

    /// Two copies between the same blocks in opposite directions, a block at a time, and at both ends what wants some of
    /// them for itself.
    fn knot(&mut self) {
        let mut ends = [self.area(64), self.area(64)];
        let blocks = ends[0].blocks.min(ends[1].blocks);
        (0..DISKS).for_each(|disk| (ends[disk].disk, ends[disk].blocks) = (disk, blocks));
        for (from, to) in [(0, 1), (1, 0)] {
            let guest = self.guest();
            let background = self.rng.one_in(3) && self.background.len() < MOST_COPIES;
            let each = |end: &Area| {
                let block = |lba| Area { lba, blocks: 1, ..*end };
                (end.lba..end.end()).map(block).collect()
            };
            self.give_copy(guest, background, each(&ends[from]), each(&ends[to]));
        }
        for end in [ends, ends, ends].concat() {
            let guest = self.guest();
            let action = *self.rng.pick(&[A::CompareAndWrite, A::CompareAndWrite, A::WriteAtomic]);
            let lba = end.lba + self.rng.below(blocks as u64) as usize;
            let area = Area { disk: end.disk, lba, blocks: (end.end() - lba).min(6) };
            self.transfer(guest, action, area);
        }
    }

    fn give_copy(&mut self, guest: usize, background: bool, from: Vec<Area>, to: Vec<Area>) {
        let segments: Vec<Vec<u8>> = from
            .iter()
            .zip(&to)
            .map(|(source, target)| {
                let place = |area: &Area| (area.disk as u16, area.lba as u64);
                lists::blocks(place(source), place(target), source.blocks as u16, false)
            })
            .collect();
        let cscds: Vec<Vec<u8>> = self.disks.iter().map(|disk| disk.cscd.clone()).collect();
        let (lun, list) = (self.disk(), self.list_id());
        let bytes = lists::list_lid4(list, background, &cscds, &segments);
        let cdb = cdb::extended_copy_lid4(bytes.len() as u32);
        let name = if background { "EXTENDED COPY, IMMED" } else { "EXTENDED COPY" };
        let mut command = Command::new(lun, name, Access::Write, cdb).data(bytes);
        for (n, (source, target)) in from.into_iter().zip(to).enumerate() {
            command = command.reads(source).needs(source.disk, Access::Read);
            command = command.writes(target, What::Copy(n)).needs(target.disk, Access::Write);
        }
        self.give(guest, command.kind(Kind::Copy { list, background }));
    }

    fn list_id(&mut self) -> u32 {
        self.next_list += 1;
        self.next_list
    }

    fn populate(&mut self, guest: usize) {
        if self.tokens.len() >= 6 {
            return;
        }
        let lun = self.disk();
        let mut ranges: Vec<Area> = vec![];
        for _ in 0..self.rng.between(1, 4) {
            let area = self.area(128);
            if area.disk == lun && !ranges.iter().any(|other| other.overlaps(&area)) {
                ranges.push(area);
            }
        }
        if ranges.is_empty() {
            return;
        }
        let list = self.list_id();
        let pairs: Vec<(u64, u32)> =
            ranges.iter().map(|area| (area.lba as u64, area.blocks as u32)).collect();
        let (_, bytes) = lists::populate_request(0, 10, None, &pairs);
        let cdb = cdb::populate_token(bytes.len() as u32).be32(6, list);
        let mut command = Command::new(lun, "POPULATE TOKEN", Access::Read, cdb).data(bytes);
        command.reads = ranges.clone();
        self.give(guest, command.kind(Kind::Populate { list, ranges }));
    }

    fn use_token(&mut self, guest: usize, background: bool) {
        let usable: Vec<usize> =
            (0..self.tokens.len()).filter(|n| self.tokens[*n].bytes.is_some()).collect();
        if usable.is_empty() || background && self.background.len() >= MOST_COPIES {
            return;
        }
        let at = *self.rng.pick(&usable);
        let delete = self.rng.one_in(3);
        let Token { ranges, values, bytes, dead, lun: source, .. } = &self.tokens[at];
        let (ranges, values, source) = (ranges.clone(), values.clone(), *source);
        let (bytes, dead) = (bytes.clone().expect("a token"), *dead);
        let by_reference = dead || bytes[..4] != POINT_IN_TIME;
        let total: usize = ranges.iter().map(|area| area.blocks).sum();
        let mut target = self.area(1);
        target.lba = target.lba.min(BLOCKS - total);
        target.blocks = total;
        if by_reference && ranges.iter().any(|area| area.overlaps(&target)) {
            return;
        }
        let list = self.list_id();
        let range = [(target.lba as u64, total as u32)];
        let flags = u8::from(background) | u8::from(delete) << 1;
        let (_, data) = lists::write_token_request(0, &bytes, flags, 0, &range);
        let cdb = cdb::write_using_token(data.len() as u32).be32(6, list);
        let name = if background { "WRITE USING TOKEN, IMMED" } else { "WRITE USING TOKEN" };
        let mut command = Command::new(target.disk, name, Access::Write, cdb).data(data);
        // A token does not outlive the right to read its disk, wherever its bytes are.
        command = command.needs(source, Access::Read);
        if by_reference {
            let mut lba = target.lba;
            for (n, range) in ranges.iter().enumerate() {
                let part = Area { disk: target.disk, lba, blocks: range.blocks };
                command = command.reads(*range).writes(part, What::Copy(n));
                lba += range.blocks;
            }
        } else {
            command = command.writes(target, What::Given(values));
        }
        if delete {
            self.tokens.remove(at);
        }
        self.give(guest, command.kind(Kind::Copy { list, background }));
    }

    fn ask_of_copy(&mut self, stop: bool) {
        if self.background.is_empty() {
            return;
        }
        let at = self.rng.below(self.background.len() as u64) as usize;
        let Background { guest, lun, list, .. } = self.background[at];
        let command = match stop {
            true => {
                let cdb = Cdb::new(0x83).byte(1, 0x1c).be32(2, list);
                let name = "COPY OPERATION ABORT";
                Command::new(lun, name, Access::Write, cdb).kind(Kind::StopCopy(list))
            }
            false => {
                let cdb = cdb::receive_copy_lid4(0x05, list, 256);
                let name = "RECEIVE COPY STATUS";
                let ask = Command::new(lun, name, Access::Write, cdb).room(256);
                ask.kind(Kind::CopyStatus(list))
            }
        };
        self.give(guest, command);
    }

    fn format(&mut self, guest: usize) {
        const IMMED: u8 = 0x80;
        let lun = self.disk();
        if self.disks[lun].whole.is_some() {
            return;
        }
        let immediate = self.rng.one_in(2);
        let flag = if immediate { IMMED } else { 0 };
        let command = |name, cdb| Command::new(lun, name, Access::Write, cdb);
        let (command, what) = match self.rng.below(4) {
            0 if immediate => {
                let list = vec![0, 0x02, 0, 0];
                (command("FORMAT UNIT", cdb::format_unit(0x10)).data(list), What::Zeroes)
            }
            0 => (command("FORMAT UNIT", cdb::format_unit(0)), What::Zeroes),
            1 => (command("SANITIZE BLOCK ERASE", cdb::sanitize(0x02 | flag, 0)), What::Zeroes),
            _ => {
                let invert = self.rng.one_in(2);
                let passes = self.rng.between(1, 6) as u8;
                let last = self.rng.below(256) as u8;
                let list = vec![passes | u8::from(invert) << 7, 0, 0, 1, last];
                let also = if invert { vec![!last] } else { vec![] };
                let cdb = cdb::sanitize(0x01 | flag, 5);
                (command("SANITIZE OVERWRITE", cdb).data(list), What::Fill { last, also })
            }
        };
        let all = Area { disk: lun, lba: 0, blocks: BLOCKS };
        let id = self.next_id(guest);
        let command = command.writes(all, what).kind(Kind::Whole { immediate });
        self.give_as(id, guest, command);
        let since = self.model.now();
        self.disks[lun].whole = Some(Whole { id, since, answered: None, sure: false });
    }

    fn reserve(&mut self, guest: usize, action: Action) {
        let lun = self.disk();
        let disk = &self.disks[lun];
        let [state] = disk.reserved.as_slice() else { return };
        if disk.changing {
            return;
        }
        let state = state.clone();
        let own = state.keys.get(&guest).copied();
        self.next_key += 1;
        let new = (guest as u64 + 1) << 32 | self.next_key;
        let kind = *self.rng.pick(&[1, 3, 5, 5, 5, 6, 7, 8]);
        let aptpl = self.rng.one_in(2);
        let other = state.keys.iter().find(|(by, _)| **by != guest).map(|(_, key)| *key);
        let for_all = state.held.is_some_and(|(kind, _)| kind >= 7);
        let other = if for_all && self.rng.one_in(2) { Some(0) } else { other };
        let change = match (action, own) {
            (A::TakeOrGiveBack, _) => match state.basic == Some(guest) {
                true => Change::GiveBack,
                false if state.basic.is_none() => Change::Take,
                false => return,
            },
            (A::Register, own) if self.rng.one_in(4) => {
                // It goes; or a stranger asks for nothing.
                Change::Register { old: Some(own.unwrap_or(0)), new: 0, aptpl }
            }
            (A::Register, _) if self.rng.one_in(8) => Change::Register { old: None, new: 0, aptpl },
            (A::Register, _) if self.rng.one_in(3) => Change::Register { old: None, new, aptpl },
            (A::Register, own) => Change::Register { old: Some(own.unwrap_or(0)), new, aptpl },
            (_, None) if !self.rng.one_in(4) => Change::Register { old: Some(0), new, aptpl },
            (A::Reserve, _) => match state.held {
                Some((held, _)) if !self.rng.one_in(4) => Change::Release(held),
                Some(_) if self.rng.one_in(2) => Change::Clear,
                _ => Change::Reserve(kind),
            },
            (A::Preempt | A::PreemptAndAbort, _) => {
                let Some(other) = other else { return };
                Change::Preempt { other, kind, abort: action == A::PreemptAndAbort }
            }
            _ => return,
        };
        self.give_change(guest, lun, change);
    }

    fn reset(&mut self, guest: usize, nexus: bool) {
        let lun = self.disk();
        let busy = if nexus { (0..DISKS).collect() } else { vec![lun] };
        if busy.iter().any(|lun| self.disks[*lun].changing) {
            return;
        }
        for lun in busy {
            self.disks[lun].changing = true;
            let now = self.disks[lun].reserved.clone();
            let freed = |state: &Reserved| state.without_basic(|by| !nexus || by == guest);
            let possible: Vec<Reserved> =
                now.iter().cloned().chain(now.iter().map(freed)).collect();
            self.set_reserved(lun, possible);
        }
        let function = if nexus { Tmf::ItNexusReset } else { Tmf::LogicalUnitReset };
        self.give_function(guest, lun, function, 0);
    }

    /// A guest is not back yet, and the others go on.
    fn while_away(&mut self, late: usize) {
        self.event(format!("guest {late} is late"));
        let here = |w: &Self| w.out.values().all(|one| one.guest == late);
        self.await_answers("all answers of those who are there", here);
        let (by, lun) = loop {
            let by = self.guest();
            if by != late {
                break (by, self.disk());
            }
        };
        let disk = &self.disks[lun];
        if disk.changing || disk.reserved.iter().any(|state| state.basic.is_some()) {
            return;
        }
        self.ask(by, lun, cdb::test_unit_ready(), 0);
        if self.rng.one_in(2) {
            self.disks[lun].changing = true;
            self.give_function(by, lun, Tmf::LogicalUnitReset, 0);
            self.await_answers("a reset", here);
            self.over_while_away(late, lun, true);
            self.ask(by, lun, cdb::test_unit_ready(), 0);
        }
        let theirs = self.out.values().filter(|one| one.guest == late);
        let theirs: Vec<Area> = theirs.flat_map(|one| self.model.written_by(one.id)).collect();
        // The first may be beside what was in flight; what it has changed, others do not change back.
        for area in [&theirs[..], &theirs[..]].concat() {
            if area.disk != lun || area.blocks > 256 {
                continue;
            }
            let done = |w: &Self| {
                let writes = w.counts.iter().filter(|((name, _), _)| name.starts_with("WRITE"));
                writes.filter(|((_, how), _)| *how == "good").map(|(_, n)| n).sum::<u32>()
            };
            let before = done(self);
            self.transfer(by, A::Write, area);
            self.await_answers("a write", here);
            if done(self) > before {
                self.over_while_away(late, lun, false);
            }
        }
    }

    /// What has to be done between steps.
    fn tend(&mut self) {
        self.collect();
        for guest in 0..self.guests.len() {
            let depth = self.guests[guest].depth;
            let full = |w: &Self| w.out.keys().filter(|(of, _)| *of == guest).count() >= depth;
            if full(self) {
                self.await_answers("room for a command", |w| !full(w));
            }
        }
        for lun in 0..DISKS {
            let Disk { reserved, changing, whole, .. } = &self.disks[lun];
            let (unknown, whole) = (reserved.len() > 1 && !changing, whole.is_some());
            if unknown {
                self.look_at_reservations(lun);
            }
            let basic = self.disks[lun].reserved.first().and_then(|state| state.basic);
            if let (Some(by), false) = (basic, self.disks[lun].changing)
                && self.rng.one_in(6)
            {
                self.give_change(by, lun, Change::GiveBack);
            }
            let asks = |o: &Outstanding| o.kind == Kind::Ready && o.lun == lun;
            if whole && !self.out.values().any(asks) && self.rng.one_in(3) {
                let guest = self.guest();
                let cdb = cdb::test_unit_ready();
                let command = Command::new(lun, "TEST UNIT READY", Access::Ready, cdb);
                self.give(guest, command.kind(Kind::Ready));
            }
        }
    }
}
/// What comes how often in this episode: some things never, some very often.
fn weights(rng: &mut Rng, migrates: bool) -> Vec<(Action, u64)> {
    let of_others = [A::LookAtReservations, A::Kill, A::Restart];
    let mut all = ACTIONS.to_vec();
    if migrates {
        all.push(MIGRATIONS);
    }
    for (action, weight) in &mut all {
        if !of_others.contains(action) {
            *weight *= *rng.pick(&[0, 1, 1, 4]);
        }
    }
    all
}

fn episode(
    seed: u64,
    mount: &Mount,
    migrates: bool,
) -> BTreeMap<(&'static str, &'static str), u32> {
    let mut world = World::new(seed, mount, migrates);
    let mut rng = Rng::new(!seed);
    let weights = weights(&mut rng, migrates);
    let sum: u64 = weights.iter().map(|(_, weight)| weight).sum();
    for _ in 0..STEPS {
        let mut at = rng.below(sum);
        let chosen = weights.iter().find(|(_, weight)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        world.step(chosen.expect("weights").0);
    }
    world.finish(mount);
    std::mem::take(&mut world.counts)
}

const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/regressions/cluster_model.txt");

/// Seeds that have failed in this test.
fn kept_seeds(test: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(SEEDS).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.strip_prefix(test)?.trim().strip_prefix("0x"));
    lines.map(|seed| u64::from_str_radix(seed, 16).expect("a seed")).collect()
}

fn keep(test: &str, seed: u64) {
    if kept_seeds(test).contains(&seed) {
        return;
    }
    let file = std::fs::OpenOptions::new().append(true).create(true).open(SEEDS);
    if let Ok(mut file) = file {
        let _ = writeln!(file, "{test} {seed:#018x}");
    }
}

fn run(test: &str, kind: FileSystem) {
    let Some(mount) = Mount::new(kind, 400) else { return };
    let setting = |name: &str| std::env::var(name).ok();
    let seconds = setting("THINLUN_TEST_MODEL_SECONDS").map_or(30, |s| s.parse().expect("seconds"));
    let fixed = setting("THINLUN_TEST_MODEL_SEED")
        .map(|s| u64::from_str_radix(s.trim_start_matches("0x"), 16).expect("a seed"));
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let mut seeds = Rng::new(clock.as_nanos() as u64);
    let kept = if fixed.is_some() { vec![] } else { kept_seeds(test) };
    let mut kept = kept.into_iter();
    let mut sums: BTreeMap<_, u32> = BTreeMap::new();
    let start = Instant::now();
    let mut episodes = 0;
    loop {
        let next = kept.next();
        if next.is_none() && start.elapsed() > Duration::from_secs(seconds) {
            break;
        }
        let seed = next.or(fixed).unwrap_or_else(|| seeds.next());
        println!("{test} on {kind:?}: seed {seed:#x}");
        let done = catch_unwind(AssertUnwindSafe(|| episode(seed, &mount, test == MIGRATION)));
        match done {
            Ok(counts) => {
                counts.into_iter().for_each(|(what, n)| *sums.entry(what).or_default() += n)
            }
            Err(panic) => {
                eprintln!("THINLUN_TEST_MODEL_SEED={seed:#x} ({test} on {kind:?})");
                keep(test, seed);
                resume_unwind(panic);
            }
        }
        episodes += 1;
    }
    println!("{test} on {kind:?}: {episodes} episodes of {STEPS} steps in {:?}", start.elapsed());
    for ((what, answer), count) in sums {
        println!("{count:7} {what}: {answer}");
    }
}

const CLUSTER: &str = "cluster";
const MIGRATION: &str = "migration";

#[test]
fn no_block_holds_what_it_may_not_on_xfs() {
    run(CLUSTER, FileSystem::Xfs);
}

#[test]
fn no_block_holds_what_it_may_not_on_ext4() {
    run(CLUSTER, FileSystem::Ext4);
}

#[test]
fn nothing_is_left_behind_by_a_migration_on_xfs() {
    run(MIGRATION, FileSystem::Xfs);
}

#[test]
fn nothing_is_left_behind_by_a_migration_on_ext4() {
    run(MIGRATION, FileSystem::Ext4);
}
