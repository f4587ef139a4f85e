//! Guests, a daemon and two disks, and what has to hold of every answer: which blocks an operation has written by then, and
//! what it must not have done, as others had reserved the disk, ended the operation, or erased what it was about.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::commands::{Background, Command, Disk, Kind, Need, Outstanding, Token, Whole};
use super::reserved::{Access, Change, Reserved};
use super::{Area, BLOCK, Ending, Id, Model, Time, Value, Wrong};
use crate::frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE};
use crate::frontend::control::tmf_response;
use crate::frontend::daemon::{Scratch, host_read};
use crate::frontend::pattern::Rng;
use crate::frontend::scsi::{key, response, status};
use crate::frontend::third_party as lists;
use crate::frontend::*;
use crate::mounts::{Kind as FileSystem, Mount};

/// The disks of each world, and their blocks.
pub const DISKS: usize = 2;
pub const BLOCKS: usize = 2048;
/// Request queues of each guest.
const QUEUES: u64 = 2;
/// Blocks whose history is printed, as what the wrong one holds may have come from them.
const PLACES: usize = 5;
/// Lines of it.
const HISTORY: usize = 120;

/// What the host of a disk is like.
const HOSTS: [&str; 8] = [
    "",
    "cache=direct",
    "fault=copy:delay-ms-15",
    "fault=copy:delay-ms-30",
    "fault=any:delay-ms-2",
    "fault=write:delay-ms-3+copy:delay-ms-20+discard:delay-ms-40",
    "cache=direct,fault=copy:delay-ms-10",
    "fault=write:stall-ms-12",
];

/// One initiator.
pub struct Guest {
    pub fe: Option<FrontEnd>,
    pub number: u32,
    pub depth: usize,
}

impl Guest {
    pub fn fe(&self) -> &FrontEnd {
        self.fe.as_ref().expect("a guest that runs")
    }
}

/// A line of the history.
pub struct Line {
    pub text: String,
    pub writes: Vec<Area>,
    pub reads: Vec<Area>,
    /// It is about everything.
    pub always: bool,
}

impl Line {
    fn shown(&self) -> String {
        let Line { text, writes, reads, .. } = self;
        format!("{text} writes {writes:?} reads {reads:?}")
    }
}

pub struct World {
    pub seed: u64,
    pub rng: Rng,
    pub scratch: Scratch,
    pub daemon: Option<Daemon>,
    /// The destination of the next migration.
    pub next: Option<Daemon>,
    /// Sources of past ones.
    pub retired: Vec<Daemon>,
    pub migrates: bool,
    pub engine: Option<&'static str>,
    pub guests: Vec<Guest>,
    pub disks: Vec<Disk>,
    pub model: Model,
    pub out: BTreeMap<(usize, Ticket), Outstanding>,
    pub background: Vec<Background>,
    pub tokens: Vec<Token>,
    pub next_list: u32,
    pub next_key: u64,
    pub recent: Vec<Area>,
    pub history: Vec<Line>,
    pub counts: BTreeMap<(&'static str, &'static str), u32>,
    pub last_answer: Instant,
    /// When a guest went last with something under way that ends commands of others: what reaches them may be late.
    pub went: Time,
}

impl World {
    pub fn new(seed: u64, mount: &Mount, migrates: bool) -> Self {
        let mut rng = Rng::new(seed);
        let scratch = Scratch::new();
        let disks = (0..DISKS).map(|n| {
            let path = mount.path().join(format!("{n}.img"));
            for entry in std::fs::read_dir(mount.path()).unwrap().flatten() {
                let mine = entry.file_name().to_string_lossy().starts_with(&format!("{n}.img"));
                if mine {
                    std::fs::remove_file(entry.path()).unwrap();
                }
            }
            std::fs::File::create(&path).unwrap().set_len((BLOCKS * BLOCK) as u64).unwrap();
            let mut options = (*rng.pick(&HOSTS)).to_owned();
            if mount.kind == FileSystem::Xfs {
                // Of a file that shares blocks it wants direct transfers of whole ones.
                options = options.replace("cache=direct,", "").replace("cache=direct", "");
            }
            if migrates {
                options += if options.is_empty() { "locking=off" } else { ",locking=off" };
            }
            let reserved = vec![Reserved::default()];
            Disk { path, options, cscd: vec![], reserved, changing: false, whole: None }
        });
        let disks = disks.collect();
        let count = if migrates { 1 } else { rng.between(2, 3) };
        let guests = (0..count).map(|_| {
            let depth = *rng.pick(&[2, 5, 12]);
            Guest { fe: None, number: 0, depth }
        });
        let guests = guests.collect();
        let chosen = std::env::var_os("THINLUN_TEST_ENGINE").is_some();
        let engine = (!chosen).then(|| *rng.pick(&["auto", "threads"]));
        let mut world = World {
            seed,
            rng,
            scratch,
            daemon: None,
            next: None,
            retired: vec![],
            migrates,
            engine,
            guests,
            disks,
            model: Model::new(DISKS, BLOCKS),
            out: BTreeMap::new(),
            background: vec![],
            tokens: vec![],
            next_list: 1,
            next_key: 1,
            recent: vec![],
            history: vec![],
            counts: BTreeMap::new(),
            last_answer: Instant::now(),
            went: 0,
        };
        world.daemon = Some(world.spawn());
        (0..world.guests.len()).for_each(|guest| world.boot(guest));
        for lun in 0..DISKS {
            let cscd = lists::cscd(&world.guests[0].fe().ready_lun(0, lun as u16), 0);
            world.disks[lun].cscd = cscd;
        }
        world
    }

    pub fn spawn(&self) -> Daemon {
        let mut builder = Daemon::builder(&self.scratch).ports(self.guests.len());
        if self.migrates {
            // Others may still listen.
            builder = builder.socket(self.scratch.join(format!("{}.sock", self.history.len())));
        }
        if let Some(engine) = self.engine {
            builder = builder.args(["--io-engine", engine]);
        }
        for disk in &self.disks {
            builder = builder.disk(&disk.path, &disk.options);
        }
        builder.spawn()
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("a daemon")
    }

    /// Starts a guest, on a socket that served nobody or whose guest is gone.
    pub fn boot(&mut self, guest: usize) {
        let builder = FrontEnd::builder().queues(QUEUES as usize).inflight();
        self.guests[guest].fe = Some(builder.connect_to(self.daemon(), guest));
        // Once it is served, nothing of the last one is under way any more.
        self.ask(guest, 0, cdb::inquiry(36), 36).expect_good();
    }

    // ----- history --------------------------------------------------------------------------

    /// Something about an operation that is under way.
    pub fn note(&mut self, id: Id, text: String, always: bool) {
        let (writes, reads) = (self.model.written_by(id), self.model.read_by(id));
        let text = format!("{:6} {id:?} {text}", self.model.now());
        self.history.push(Line { text, writes, reads, always });
    }

    /// Something that is not about one command.
    pub fn event(&mut self, text: impl Into<String>) {
        let text = format!("{:6} *** {}", self.model.now(), text.into());
        self.history.push(Line { text, writes: vec![], reads: vec![], always: true });
    }

    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        self.fail_with(what, |_| true)
    }

    #[track_caller]
    pub fn fail_with(&self, what: &str, about: impl Fn(&Line) -> bool) -> ! {
        let lines: Vec<&Line> = self.history.iter().filter(|line| about(line)).collect();
        let whole: Vec<String> = self.history.iter().map(Line::shown).collect();
        let kept = std::env::temp_dir().join(format!("thinlun-model-{:016x}.txt", self.seed));
        let _ = std::fs::write(&kept, format!("{what}\n{}", whole.join("\n")));
        let mut text =
            format!("{what}\n--- what led there (all of it is in {}):\n", kept.display());
        for line in &lines[lines.len().saturating_sub(HISTORY)..] {
            let _ = writeln!(text, "{}", line.shown());
        }
        let _ = writeln!(text, "--- not answered:");
        for o in self.out.values() {
            let _ = writeln!(text, "{:?} {} of disk {}, since {}", o.id, o.name, o.lun, o.since);
        }
        let _ = writeln!(text, "--- in the background: {:?}", self.background);
        for (n, disk) in self.disks.iter().enumerate() {
            let Disk { options, reserved, whole, .. } = disk;
            let _ = writeln!(text, "--- disk {n}: {options}: {reserved:?} {whole:?}");
        }
        panic!("{text}")
    }

    #[track_caller]
    pub fn fail_block(&self, what: &str, wrong: &Wrong) -> ! {
        let Wrong { disk, block, count, found, allowed } = wrong;
        let why = self.model.explain(*disk, *block);
        let what = format!(
            "{what}: block {block} of disk {disk} (of {count}) holds {found:?}, and may hold {allowed:?}\n{why}"
        );
        let by = |value: &Value| {
            if let Value::Of(id, _) = value { Some(format!(" {id:?} ")) } else { None }
        };
        let theirs: Vec<String> = found.iter().chain(allowed).filter_map(by).collect();
        // Where what it holds, or may hold, may have come from.
        let mut places = vec![(*disk, *block)];
        for line in self.history.iter().rev() {
            let copied = line.writes.iter().zip(&line.reads).find_map(|(to, from)| {
                let mut here = places.iter().filter(|(disk, block)| to.has(*disk, *block));
                here.next().map(|(_, block)| (from.disk, from.lba + block - to.lba))
            });
            places.extend(copied.filter(|place| !places.contains(place) && places.len() < PLACES));
        }
        self.fail_with(&format!("{what}--- places {places:?}"), |line| {
            let mut areas = line.writes.iter().chain(&line.reads);
            // What shares a block of the host with them may have done it.
            let host = |(disk, block): &(usize, usize)| Area {
                disk: *disk,
                lba: block / 8 * 8,
                blocks: 8,
            };
            let here = areas.any(|area| places.iter().any(|place| area.overlaps(&host(place))));
            here || line.always || theirs.iter().any(|id| line.text.contains(id))
        })
    }

    // ----- choices --------------------------------------------------------------------------

    /// Some blocks, often such as were used lately.
    pub fn area(&mut self, most: u64) -> Area {
        let mut disk = self.rng.below(DISKS as u64) as usize;
        let aligned = self.rng.one_in(2);
        let mut blocks = self.rng.between(1, most) as usize;
        let mut lba = self.rng.below(BLOCKS as u64) as usize;
        if !self.recent.is_empty() && !self.rng.one_in(3) {
            let near = *self.rng.pick(&self.recent);
            disk = near.disk;
            lba = near.lba + self.rng.below(near.blocks as u64) as usize;
            lba = lba.saturating_sub(self.rng.below(8) as usize);
        }
        if aligned {
            (lba, blocks) = (lba / 8 * 8, blocks.next_multiple_of(8));
        }
        let area = Area { disk, lba, blocks: blocks.min(BLOCKS - lba) };
        self.recent.push(area);
        if self.recent.len() > 12 {
            self.recent.remove(0);
        }
        area
    }

    pub fn guest(&mut self) -> usize {
        self.rng.below(self.guests.len() as u64) as usize
    }

    pub fn disk(&mut self) -> usize {
        self.rng.below(DISKS as u64) as usize
    }

    pub fn next_id(&mut self, guest: usize) -> Id {
        self.guests[guest].number += 1;
        Id { initiator: guest as u8, number: self.guests[guest].number }
    }

    // ----- giving ---------------------------------------------------------------------------

    pub fn give(&mut self, guest: usize, command: Command) {
        let id = self.next_id(guest);
        self.give_as(id, guest, command);
    }

    /// The data of a command that writes names it.
    pub fn give_as(&mut self, id: Id, guest: usize, command: Command) {
        let Command { lun, name, cdb, data, room, reads, writes, needs, kind } = command;
        self.model.begin(id, &reads, &writes);
        let always = kind.ends_others() || matches!(kind, Kind::Reservation { .. });
        self.note(id, format!("{name} to disk {lun} {}", kind.described()), always);
        let queue = FIRST_REQUEST_QUEUE + self.rng.below(QUEUES) as usize;
        let shape = if self.rng.one_in(3) { Shape::default().indirect() } else { Shape::default() };
        let tag = self.guests[guest].fe().new_tag();
        let unit = self.guests[guest].fe().lun(0, lun as u16);
        let request = unit.request(cdb).data_out(data).data_in(room).tag(tag).shape(shape);
        let ticket = self.guests[guest].fe().submit(queue, &request);
        self.enter(ticket, id, guest, lun, name, tag, kind, needs);
    }

    pub fn give_function(&mut self, guest: usize, lun: usize, function: Tmf, about: u64) {
        let id = self.next_id(guest);
        self.model.begin(id, &[], &[]);
        self.note(id, format!("{function:?} of disk {lun}, tag {about}"), true);
        let address = Address::flat(0, lun as u16);
        let exchange = function.exchange(address, about);
        let ticket = self.guests[guest].fe().queue(CONTROL_QUEUE).submit(&exchange);
        let kind = Kind::Function { function, about };
        self.enter(ticket, id, guest, lun, "function", 0, kind, vec![]);
    }

    #[allow(clippy::too_many_arguments)]
    pub fn enter(
        &mut self,
        ticket: Ticket,
        id: Id,
        guest: usize,
        lun: usize,
        name: &'static str,
        tag: u64,
        kind: Kind,
        needs: Vec<(usize, Access)>,
    ) {
        let needs: Vec<Need> = needs
            .into_iter()
            .map(|(lun, access)| {
                let mut need = Need { lun, access, permitted: false, forbidden: false };
                need.meet(guest, &self.disks[lun].reserved);
                need
            })
            .collect();
        let disturbs = |other: &Outstanding| other.kind.ends_others() || other.since <= self.went;
        let disturbed = self.out.values().any(disturbs);
        if kind.ends_others() {
            self.out.values_mut().for_each(|other| other.disturbed = true);
        }
        if matches!(kind, Kind::Whole { .. }) {
            let met = |other: &&mut Outstanding| {
                other.lun == lun || other.needs.iter().any(|need| need.lun == lun)
            };
            self.out.values_mut().filter(met).for_each(|other| other.beside_whole = true);
        }
        let mut luns = needs.iter().map(|need| need.lun).chain([lun]);
        let beside_whole = luns.any(|lun| self.disks[lun].whole.is_some());
        let (since, again, kept_from, over) = (self.model.now(), false, vec![], false);
        let outstanding = Outstanding {
            id,
            guest,
            lun,
            name,
            tag,
            kind,
            needs,
            since,
            disturbed,
            beside_whole,
            again,
            kept_from,
            over,
        };
        self.out.insert((guest, ticket), outstanding);
    }

    // ----- answers --------------------------------------------------------------------------

    /// Takes the answers that are there; says whether there were any.
    pub fn collect(&mut self) -> bool {
        let mut answers = Vec::new();
        loop {
            let before = answers.len();
            for (n, guest) in self.guests.iter().enumerate() {
                let Some(fe) = &guest.fe else { continue };
                let queues = FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES as usize;
                for queue in [CONTROL_QUEUE].into_iter().chain(queues) {
                    while let Some(done) = fe.queue(queue).wait_for(Duration::ZERO) {
                        answers.push((n, done));
                    }
                }
            }
            // What was ended by one that is answered now can be seen by now, and comes first.
            let rank = |(guest, done): &(usize, Completion)| {
                self.out.get(&(*guest, done.ticket)).map_or(0, |one| one.kind.rank())
            };
            if answers[before..].iter().all(|answer| rank(answer) == 0) {
                answers.sort_by_key(rank);
                break;
            }
        }
        if !answers.is_empty() {
            self.last_answer = Instant::now();
        }
        let any = !answers.is_empty();
        for (guest, done) in answers {
            let Some(one) = self.out.remove(&(guest, done.ticket)) else {
                self.fail("an answer to nothing")
            };
            match one.kind {
                Kind::Function { function, about } => {
                    self.function_answered(one, function, about, tmf_response(&done));
                }
                _ => self.answered(one, &ScsiResponse::parse(&done)),
            }
        }
        any
    }

    /// Waits until a condition holds.
    #[track_caller]
    pub fn await_answers(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        self.last_answer = Instant::now();
        loop {
            let any = self.collect();
            if holds(self) {
                return;
            }
            if !any {
                if self.last_answer.elapsed() > PATIENCE {
                    eprintln!("{}", self.daemon().diagnosis().report());
                    self.fail(&format!("not within {PATIENCE:?}: {what}"));
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// What an answer says of the command's effects, if it is one that may be given.
    pub fn ending(&self, one: &Outstanding, answer: &ScsiResponse) -> Ending {
        let wrong = |why: &str| -> Ending {
            self.fail(&format!("{:?} {} of disk {}: {why}: {answer:?}", one.id, one.name, one.lun))
        };
        let not = if one.again { Ending::Maybe } else { Ending::Not };
        let copy = matches!(one.kind, Kind::Copy { .. });
        let populates = matches!(one.kind, Kind::Populate { .. });
        let ended = |answer| match one.disturbed || one.again {
            true => answer,
            false => wrong("nobody has ended it"),
        };
        match (answer.response, answer.status) {
            (response::OK, status::GOOD) if one.over => {
                wrong("it is done again after what others did while its guest was away")
            }
            (response::OK, status::GOOD) => {
                // One that goes on in the background is only begun.
                let begun = matches!(one.kind, Kind::Copy { background: true, .. });
                let needed = if begun { &one.needs[..1] } else { &one.needs[..] };
                if let Some(need) = needed.iter().find(|need| !need.permitted) {
                    return wrong(&format!("done while others had reserved disk {}", need.lun));
                }
                Ending::Done
            }
            (response::OK, status::RESERVATION_CONFLICT) => {
                // Whether a change is refused is known where it is looked at.
                let change = matches!(one.kind, Kind::Reservation { .. });
                let met = one.needs.iter().any(|need| need.lun == one.lun && need.forbidden);
                match change || met {
                    true => not,
                    false => wrong("nobody has reserved it"),
                }
            }
            (response::OK, status::TASK_ABORTED) => ended(Ending::Maybe),
            (response::ABORTED | response::RESET, _) => ended(Ending::Maybe),
            (response::OK, status::BUSY | status::TASK_SET_FULL) => Ending::Maybe,
            (response::OK, status::CHECK_CONDITION) => match answer.sense_code().unwrap() {
                (key::UNIT_ATTENTION, ..) => not,
                (key::NOT_READY, 4, 0x04 | 0x1b) => match one.beside_whole || one.again {
                    // An operation that begins ends copies that may be under way, to other disks too.
                    true if copy => Ending::Maybe,
                    true => not,
                    false => wrong("nobody formats it"),
                },
                (key::MISCOMPARE, 0x1d, 0) if matches!(one.kind, Kind::Compare(_)) => not,
                (key::COPY_ABORTED, ..) if copy || populates => {
                    let met = one.needs.iter().any(|need| need.forbidden);
                    if !met && !one.beside_whole && !one.disturbed && !one.again {
                        return wrong("nothing was in its way");
                    }
                    Ending::Maybe
                }
                // A token is good for as long as its maker sees fit.
                (key::ILLEGAL_REQUEST, 0x23, _) if copy => Ending::Maybe,
                // INSUFFICIENT RESOURCES: an initiator has no more than its share of copies and tokens.
                (key::ILLEGAL_REQUEST, 0x55, 3) if copy || populates => not,
                (key::ILLEGAL_REQUEST, 0x24, 0) if matches!(one.kind, Kind::CopyStatus(_)) => not,
                (key::ILLEGAL_REQUEST, 0x24, 0) if matches!(one.kind, Kind::StopCopy(_)) => not,
                (key::ILLEGAL_REQUEST, 0x24, 0)
                    if matches!(one.kind, Kind::TokenInformation(_)) =>
                {
                    not
                }
                (key::ABORTED_COMMAND, ..) => ended(Ending::Maybe),
                _ => wrong("an unexpected answer"),
            },
            _ => wrong("an unexpected answer"),
        }
    }

    pub fn answered(&mut self, one: Outstanding, answer: &ScsiResponse) {
        let how = self.ending(&one, answer);
        let said = match (answer.response, answer.status, answer.sense_code()) {
            (response::OK, status::GOOD, _) => "good",
            (response::OK, status::RESERVATION_CONFLICT, _) => "conflict",
            (response::OK, _, Some((key::UNIT_ATTENTION, ..))) => "attention",
            (response::OK, _, Some((key::NOT_READY, ..))) => "not ready",
            (response::OK, _, Some(_)) => "sense",
            (response::OK, status::BUSY, _) => "busy",
            _ => "ended",
        };
        *self.counts.entry((one.name, said)).or_default() += 1;
        let always = one.kind.ends_others() || matches!(one.kind, Kind::Reservation { .. });
        let sense = answer.sense_code().map_or(String::new(), |code| format!(" {code:x?}"));
        self.note(one.id, format!("{}: {said}{sense}, {how:?}", one.name), always);
        match &one.kind {
            Kind::Read if how == Ending::Done => {
                if let Err(wrong) = self.model.check(one.id, 0, &answer.buffer) {
                    self.fail_block(&format!("{:?} READ", one.id), &wrong);
                }
            }
            Kind::LbaStatus if how == Ending::Done => self.check_lba_status(&one, answer),
            Kind::Compare(expected) => self.check_compare(&one, expected, how, answer),
            Kind::Populate { list, ranges } if how == Ending::Done => {
                let values = (0..ranges.len()).flat_map(|n| self.model.seen(one.id, n)).cloned();
                let values = values.collect();
                let (guest, lun, list, ranges) = (one.guest, one.lun, *list, ranges.clone());
                let (answered, bytes, dead) = (self.model.now(), None, false);
                let token = Token { guest, lun, list, ranges, values, answered, bytes, dead };
                self.tokens.push(token);
                let cdb = cdb::receive_copy_lid4(0x07, list, 1024);
                let ask = Command::new(lun, "token information", Access::Write, cdb).room(1024);
                self.give(guest, ask.kind(Kind::TokenInformation(list)));
            }
            Kind::TokenInformation(list) => {
                let token = (how == Ending::Done).then(|| lists::token(answer.data())).flatten();
                let mine = |t: &Token| t.guest == one.guest && t.list == *list;
                match (token, self.tokens.iter_mut().find(|t| mine(t))) {
                    (Some(bytes), Some(token)) => token.bytes = Some(bytes),
                    _ => self.tokens.retain(|t| !mine(t)),
                }
            }
            Kind::Copy { list, background: true } if how == Ending::Done => {
                let (list, answered) = (*list, self.model.now());
                let Outstanding { id, guest, lun, since, needs, kept_from, .. } = one;
                self.background.push(Background {
                    id,
                    guest,
                    lun,
                    list,
                    since,
                    answered,
                    needs,
                    kept_from,
                });
                // It has not ended.
                return;
            }
            Kind::CopyStatus(list) | Kind::StopCopy(list) => {
                let ended = self.told_of_copy(&one, answer);
                if let Some(how) = ended {
                    self.end_background(how, |b| b.guest == one.guest && b.list == *list);
                }
            }
            Kind::Reservation { change, before } => {
                let (change, before) = (*change, before.clone());
                self.reservation_answered(&one, change, before, how, answer);
            }
            Kind::Whole { immediate } => return self.whole_answered(&one, *immediate, how),
            Kind::Ready if how == Ending::Done => {
                let whole = self.disks[one.lun].whole.as_ref();
                if whole.is_some_and(|w| w.answered.is_some_and(|at| at < one.since)) {
                    self.whole_ended(one.lun);
                }
            }
            _ => {}
        }
        self.end(one.id, how);
    }

    #[track_caller]
    pub fn end(&mut self, id: Id, how: Ending) {
        if let Err(why) = self.model.end(id, how) {
            self.fail(&why);
        }
    }

    /// What is not mapped reads as zeroes.
    pub fn check_lba_status(&self, one: &Outstanding, answer: &ScsiResponse) {
        let area = self.model.read_by(one.id)[0];
        let mut at = area.lba;
        for descriptor in answer.data()[8..].chunks_exact(16) {
            let number = |range: std::ops::Range<usize>| {
                descriptor[range].iter().fold(0usize, |n, byte| n << 8 | usize::from(*byte))
            };
            let (lba, count, kind) = (number(0..8), number(8..12), descriptor[12] & 0x0f);
            if lba != at {
                self.fail(&format!("GET LBA STATUS: {lba} where {at} should be"));
            }
            at += count;
            for block in (lba..at).filter(|block| kind != 0 && area.has(area.disk, *block)) {
                let allowed = self.model.seen(one.id, 0)[block - area.lba].clone();
                if !allowed.contains(&Value::Zeroes) {
                    let found = BTreeSet::from([Value::Zeroes]);
                    let wrong = Wrong { disk: area.disk, block, count: 1, found, allowed };
                    self.fail_block(&format!("{:?} GET LBA STATUS {kind}", one.id), &wrong);
                }
            }
        }
    }

    pub fn check_compare(
        &self,
        one: &Outstanding,
        expected: &[Value],
        how: Ending,
        answer: &ScsiResponse,
    ) {
        let seen = self.model.seen(one.id, 0);
        let area = self.model.read_by(one.id)[0];
        let miscompared = answer.sense_code().is_some_and(|(key, ..)| key == key::MISCOMPARE);
        for (n, (allowed, value)) in seen.iter().zip(expected).enumerate() {
            if how == Ending::Done && !allowed.contains(value) {
                let (found, allowed) = (BTreeSet::from([*value]), allowed.clone());
                let (disk, block) = (area.disk, area.lba + n);
                let wrong = Wrong { disk, block, count: 1, found, allowed };
                self.fail_block(&format!("{:?} COMPARE AND WRITE", one.id), &wrong);
            }
        }
        let certain = seen.iter().zip(expected).all(|(s, v)| s.len() == 1 && s.contains(v));
        if miscompared && certain {
            self.fail_with(
                &format!("{:?} COMPARE AND WRITE miscompares what is there", one.id),
                |l| l.always || l.writes.iter().chain(&l.reads).any(|a| a.overlaps(&area)),
            );
        }
    }

    // ----- copies ---------------------------------------------------------------------------

    /// How a copy has ended, if it has.
    pub fn told_of_copy(&self, one: &Outstanding, answer: &ScsiResponse) -> Option<Ending> {
        if answer.sense_code() == Some((key::ILLEGAL_REQUEST, 0x24, 0)) {
            return Some(Ending::Maybe);
        }
        if !answer.is_good() {
            return None;
        }
        if matches!(one.kind, Kind::StopCopy(_)) {
            return Some(Ending::Maybe);
        }
        match answer.data()[5] & 0x7f {
            0x01 => Some(Ending::Done),
            0x02 | 0x04 | 0x60 => Some(Ending::Maybe),
            0x10..=0x12 => None,
            other => self.fail(&format!("COPY OPERATION STATUS {other:#x}")),
        }
    }

    /// Copies in the background have ended.
    pub fn end_background(&mut self, how: Ending, which: impl Fn(&Background) -> bool) {
        let (ended, left) =
            std::mem::take(&mut self.background).into_iter().partition(|copy| which(copy));
        self.background = left;
        let ended: Vec<Background> = ended;
        for copy in ended {
            self.note(copy.id, format!("has ended in the background: {how:?}"), false);
            let denied = copy.needs.iter().find(|need| !need.permitted);
            if let (Ending::Done, Some(need)) = (how, denied) {
                self.fail(&format!(
                    "{:?} was done while others had reserved disk {}",
                    copy.id, need.lun
                ));
            }
            self.end(copy.id, how);
        }
    }

    // ----- reservations ---------------------------------------------------------------------

    /// What a disk's reservations may be from now on.
    pub fn set_reserved(&mut self, lun: usize, possible: impl IntoIterator<Item = Reserved>) {
        let mut all: Vec<Reserved> = Vec::new();
        possible.into_iter().for_each(|state| {
            if !all.contains(&state) {
                all.push(state);
            }
        });
        let commands =
            self.out.values_mut().map(|o| (o.id, o.guest, &mut o.needs, &mut o.kept_from));
        let copies =
            self.background.iter_mut().map(|c| (c.id, c.guest, &mut c.needs, &mut c.kept_from));
        for (id, guest, needs, kept_from) in commands.chain(copies) {
            needs.iter_mut().filter(|need| need.lun == lun).for_each(|n| n.meet(guest, &all));
            let may = all.iter().any(|state| !state.forbids(guest, Access::Write));
            if may && kept_from.contains(&lun) {
                kept_from.clear();
                self.model.goes_on(id);
            }
        }
        self.disks[lun].reserved = all;
    }

    /// A change to what each of them may be.
    pub fn change_reserved(&mut self, lun: usize, change: impl Fn(&Reserved) -> Reserved) {
        let new: Vec<Reserved> = self.disks[lun].reserved.iter().map(change).collect();
        self.set_reserved(lun, new);
    }

    pub fn give_change(&mut self, guest: usize, lun: usize, change: Change) {
        let before = self.disks[lun].reserved.clone();
        let key = before[0].keys.get(&guest).copied().unwrap_or(0);
        let (action, kind, key, other, aptpl) = match change {
            Change::Register { old: Some(old), new, aptpl } => (0, 0, old, new, aptpl),
            Change::Register { old: None, new, aptpl } => (6, 0, 0x77, new, aptpl),
            Change::Reserve(kind) => (1, kind, key, 0, false),
            Change::Release(kind) => (2, kind, key, 0, false),
            Change::Clear => (3, 0, key, 0, false),
            Change::Preempt { other, kind, abort } => {
                (4 + u8::from(abort), kind, key, other, false)
            }
            Change::Take | Change::GiveBack => (0, 0, 0, 0, false),
        };
        let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
        list.resize(24, 0);
        list[20] = aptpl.into();
        let (name, cdb, list) = match change {
            Change::Take => ("RESERVE(6)", Cdb::new(0x16), vec![]),
            Change::GiveBack => ("RELEASE(6)", Cdb::new(0x17), vec![]),
            Change::Preempt { abort: true, .. } => {
                ("PREEMPT AND ABORT", cdb::persistent_reserve_out(action, kind, 24), list)
            }
            _ => ("PERSISTENT RESERVE OUT", cdb::persistent_reserve_out(action, kind, 24), list),
        };
        let after =
            before.iter().filter_map(|state| state.after(guest, change)).map(|(new, _)| new);
        let possible: Vec<Reserved> = before.iter().cloned().chain(after).collect();
        self.set_reserved(lun, possible);
        self.disks[lun].changing = true;
        let mut command = Command::new(lun, name, Access::Ready, cdb).data(list);
        command.needs.clear();
        self.give(guest, command.kind(Kind::Reservation { change, before }));
    }

    pub fn reservation_answered(
        &mut self,
        one: &Outstanding,
        change: Change,
        before: Vec<Reserved>,
        how: Ending,
        answer: &ScsiResponse,
    ) {
        let (guest, lun) = (one.guest, one.lun);
        self.disks[lun].changing = false;
        let changed = |state: &Reserved| state.after(guest, change).map(|(new, _)| new);
        if one.again {
            let now = self.disks[lun].reserved.clone();
            let possible = now.iter().cloned().chain(now.iter().filter_map(changed));
            return self.set_reserved(lun, possible.collect::<Vec<_>>());
        }
        let conflict = answer.status == status::RESERVATION_CONFLICT;
        let possible: Vec<Reserved> = match how {
            Ending::Done => before.iter().filter_map(changed).collect(),
            Ending::Not if conflict => {
                before.iter().filter(|state| changed(state).is_none()).cloned().collect()
            }
            Ending::Not => before.clone(),
            Ending::Maybe => return,
        };
        if possible.is_empty() {
            self.fail(&format!("{:?} {change:?} was answered wrongly: {answer:?}", one.id));
        }
        self.set_reserved(lun, possible);
        if let (Change::Preempt { abort: true, .. }, Ending::Done, [before]) =
            (change, how, before.as_slice())
        {
            let preempted = before.after(guest, change).map(|(_, lost)| lost).unwrap_or_default();
            self.preempted(one, &preempted);
        }
    }

    /// PREEMPT AND ABORT is answered: what those who were preempted had under way is over.
    pub fn preempted(&mut self, by: &Outstanding, guests: &[usize]) {
        let lun = by.lun;
        let now = self.model.now();
        let theirs = |one: &Outstanding| {
            let command = !matches!(one.kind, Kind::Function { .. });
            command && guests.contains(&one.guest) && one.since < by.since && !one.again
        };
        if let Some(one) = self.out.values().find(|one| one.lun == lun && theirs(one)) {
            let (id, name) = (one.id, one.name);
            self.fail(&format!("{id:?} {name} was preempted and aborted, and is not answered"));
        }
        let state = self.disks[lun].reserved[0].clone();
        for one in self.out.values_mut().filter(|one| theirs(one)) {
            // One that has not begun does so when it is let through, and as long as it is not, it writes nothing.
            if state.forbids(one.guest, Access::Write) {
                one.kept_from.push(lun);
                self.model.over_on(one.id, lun, now);
            }
        }
        let writes =
            |copy: &Background| self.model.written_by(copy.id).iter().any(|area| area.disk == lun);
        let ended: Vec<Id> = self
            .background
            .iter()
            .filter(|copy| guests.contains(&copy.guest) && copy.since < by.since)
            .filter(|copy| copy.lun == lun || writes(copy))
            .map(|copy| copy.id)
            .collect();
        self.end_background(Ending::Maybe, |copy| ended.contains(&copy.id));
    }

    /// Asks for the reservations of a disk that nobody changes now, and holds them against what they may be.
    pub fn look_at_reservations(&mut self, lun: usize) {
        let mut left = self.disks[lun].reserved.clone();
        for guest in 0..self.guests.len() {
            let keys = self.ask(guest, lun, cdb::persistent_reserve_in(0, 256), 256);
            if keys.status == status::RESERVATION_CONFLICT {
                left.retain(|state| state.basic.is_some_and(|by| by != guest));
                continue;
            }
            let keys = keys.expect_good();
            let held = self.ask(guest, lun, cdb::persistent_reserve_in(1, 64), 64).expect_good();
            let can = self.ask(guest, lun, cdb::persistent_reserve_in(2, 64), 64).expect_good();
            let number = |bytes: &[u8]| u64::from_be_bytes(bytes[..8].try_into().unwrap());
            let mut found: Vec<u64> = keys.data()[8..].chunks(8).map(number).collect();
            found.sort_unstable();
            let kind = held.data().get(21).map(|byte| byte & 0x0f);
            let survives = can.data()[3] & 1 != 0;
            left.retain(|state| {
                let mut keys: Vec<u64> = state.keys.values().copied().collect();
                keys.sort_unstable();
                keys == found
                    && state.held.map(|(kind, _)| kind) == kind
                    && (keys.is_empty() || survives == state.survives)
                    && state.basic.is_none_or(|by| by == guest)
            });
            if left.is_empty() {
                self.fail(&format!(
                    "disk {lun} has the registrations {found:x?}, type {kind:?}, APTPL {survives}; not {:x?}",
                    self.disks[lun].reserved
                ));
            }
        }
        if left.is_empty() {
            self.fail(&format!("a RESERVE of disk {lun}: not {:x?}", self.disks[lun].reserved));
        }
        self.set_reserved(lun, left);
    }

    /// Runs a command at once, and again as long as something else comes between.
    #[track_caller]
    pub fn ask(&self, guest: usize, lun: usize, cdb: Cdb, room: usize) -> ScsiResponse {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.guests[guest].fe().lun(0, lun as u16).run_in(cdb, room);
            let attention = matches!(answer.sense_code(), Some((key::UNIT_ATTENTION, ..)));
            let ended = [response::ABORTED, response::RESET].contains(&answer.response)
                || [status::TASK_ABORTED, status::BUSY].contains(&answer.status);
            if !attention && !ended {
                return answer;
            }
            if Instant::now() > deadline {
                self.fail(&format!("{cdb:?} of disk {lun} never gets through: {answer:?}"));
            }
        }
    }

    // ----- functions ------------------------------------------------------------------------

    pub fn function_answered(&mut self, one: Outstanding, function: Tmf, about: u64, code: u8) {
        self.note(one.id, format!("{function:?}: {code}"), true);
        if code != response::FUNCTION_COMPLETE {
            self.fail(&format!("{:?} {function:?} is answered with {code}", one.id));
        }
        *self.counts.entry(("function", "good")).or_default() += 1;
        let ends = |other: &&Outstanding| {
            let own = other.guest == one.guest;
            let here = other.lun == one.lun;
            let selected = match function {
                Tmf::AbortTask => own && here && other.tag == about,
                Tmf::LogicalUnitReset => here,
                Tmf::ItNexusReset => own,
                _ => own && here,
            };
            let command = !matches!(other.kind, Kind::Function { .. });
            selected && command && other.since < one.since && !other.again
        };
        if let Some(left) = self.out.values().find(ends).filter(|_| !one.again) {
            let (id, name) = (left.id, left.name);
            self.fail(&format!("{function:?} is answered before {id:?} {name}"));
        }
        match function {
            Tmf::LogicalUnitReset => {
                self.disks[one.lun].changing = false;
                self.change_reserved(one.lun, |state| state.without_basic(|_| true));
                // One that was asked for after the reset is none of its business.
                let before = |copy: &Background| copy.lun == one.lun && copy.since < one.since;
                self.end_background(Ending::Maybe, before);
            }
            Tmf::ItNexusReset => {
                for lun in 0..DISKS {
                    self.disks[lun].changing = false;
                    self.change_reserved(lun, |state| state.without_basic(|by| by == one.guest));
                }
            }
            _ => {}
        }
        self.end(one.id, Ending::Done);
    }

    // ----- whole disks ----------------------------------------------------------------------

    pub fn whole_answered(&mut self, one: &Outstanding, immediate: bool, how: Ending) {
        let now = self.model.now();
        let disk = &mut self.disks[one.lun];
        match how {
            Ending::Not => {
                disk.whole = None;
                self.end(one.id, Ending::Not);
            }
            Ending::Done | Ending::Maybe => {
                if let Some(whole) = &mut disk.whole {
                    (whole.answered, whole.sure) = (Some(now), how == Ending::Done);
                }
                if how == Ending::Done && !immediate {
                    self.whole_ended(one.lun);
                }
            }
        }
    }

    /// A format or sanitize operation is over: with it, everything that it found of the disk.
    pub fn whole_ended(&mut self, lun: usize) {
        let Some(Whole { id, since, sure, .. }) = self.disks[lun].whole.take() else { return };
        self.event(format!("{id:?} has ended on disk {lun}"));
        if sure {
            let touches = |areas: Vec<Area>| areas.iter().any(|area| area.disk == lun);
            let before: Vec<Id> = self
                .background
                .iter()
                .filter(|copy| copy.answered < since)
                .map(|copy| copy.id)
                .filter(|id| {
                    touches(self.model.written_by(*id)) || touches(self.model.read_by(*id))
                })
                .collect();
            // They ended before it began.
            before.iter().for_each(|copy| self.model.over_on(*copy, lun, since - 1));
            self.end_background(Ending::Maybe, |copy| before.contains(&copy.id));
        }
        self.tokens.retain_mut(|token| {
            let before = token.answered < since;
            token.dead |= token.lun == lun && before;
            token.lun != lun || sure && before
        });
        self.end(id, if sure { Ending::Done } else { Ending::Maybe });
    }

    // ----- ends -----------------------------------------------------------------------------

    /// A guest will not hear of what it had under way, and nothing of it is under way any more.
    pub fn abandon(&mut self, guest: usize) {
        let all: Vec<(usize, Ticket)> =
            self.out.keys().filter(|(of, _)| *of == guest).copied().collect();
        for key in all {
            let Some(one) = self.out.remove(&key) else { continue };
            if one.kind.ends_others() {
                self.went = self.model.now();
            }
            match one.kind {
                Kind::Reservation { .. } => self.disks[one.lun].changing = false,
                Kind::Function { .. } => {
                    for lun in 0..DISKS {
                        let busy = self
                            .out
                            .values()
                            .any(|o| o.lun == lun && o.kind.changes_reservations());
                        self.disks[lun].changing &= busy;
                    }
                }
                Kind::Whole { .. } => {
                    if let Some(whole) = &mut self.disks[one.lun].whole {
                        (whole.answered, whole.sure) = (Some(self.model.now()), false);
                    }
                    continue;
                }
                Kind::TokenInformation(list) => {
                    self.tokens.retain(|t| t.guest != guest || t.list != list);
                }
                _ => {}
            }
            self.end(one.id, Ending::Maybe);
        }
        self.nexus_lost(guest);
    }

    /// The connection of a guest has ended, or its device was reset.
    pub fn nexus_lost(&mut self, guest: usize) {
        self.end_background(Ending::Maybe, |copy| copy.guest == guest);
        for lun in 0..DISKS {
            self.change_reserved(lun, |state| state.without_basic(|by| by == guest));
        }
    }

    /// What these guests have under way is done by another daemon, or over another connection.
    pub fn again(&mut self, which: impl Fn(usize) -> bool) {
        for one in self.out.values_mut().filter(|one| which(one.guest)) {
            (one.again, one.disturbed) = (true, true);
            one.kept_from.clear();
            self.model.goes_on(one.id);
        }
    }

    pub fn restart(&mut self, gently: bool) {
        self.event(if gently { "SIGTERM" } else { "SIGKILL" });
        // One that was started beside it knows less than what comes now.
        self.next = None;
        let late = if gently { None } else { self.late() };
        let mut daemon = self.daemon.take().expect("a daemon");
        if gently {
            self.collect();
            self.again(|_| true);
            daemon.terminate();
        } else {
            daemon.kill();
        }
        self.collect();
        self.daemon_gone();
        self.daemon = Some(self.spawn());
        let in_time = (0..self.guests.len()).filter(|n| Some(*n) != late);
        in_time.for_each(|guest| self.reconnect(guest));
        if let Some(late) = late {
            self.while_away(late);
            self.reconnect(late);
        }
        self.look_again();
    }

    fn reconnect(&mut self, guest: usize) {
        let daemon = self.daemon.as_ref().expect("a daemon");
        self.guests[guest].fe.as_mut().expect("a guest").reconnect_to(daemon, guest);
    }

    /// A guest that will come back later than others, if any: the daemon has taken all that it has given.
    fn late(&mut self) -> Option<usize> {
        let late = self.guest();
        if self.guests.len() < 2 || self.rng.one_in(3) {
            return None;
        }
        let fe = self.guests[late].fe();
        let taken = |queue| {
            let queue = fe.queue(queue);
            queue.ring().avail_event() == queue.ring().published()
        };
        let deadline = Instant::now() + Duration::from_secs(2);
        while !(FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES as usize).all(taken) {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Some(late)
    }

    /// What a guest that is away has in flight to a disk is over: it writes nothing there any more, or, if a function has
    /// ended it, is not done at all.
    pub fn over_while_away(&mut self, late: usize, lun: usize, function: bool) {
        let now = self.model.now();
        for one in self.out.values_mut().filter(|one| one.guest == late && one.lun == lun) {
            let writes = self.model.written_by(one.id).iter().any(|area| area.disk == lun);
            let command = !matches!(one.kind, Kind::Function { .. });
            one.over |= command && (writes || function);
            self.model.over_on(one.id, lun, now);
        }
    }

    /// All that lasts as long as a daemon is gone.
    pub fn daemon_gone(&mut self) {
        self.end_background(Ending::Maybe, |_| true);
        self.tokens.clear();
        (0..DISKS).for_each(|lun| self.change_reserved(lun, Reserved::restarted));
        self.again(|_| true);
    }

    pub fn look_again(&mut self) {
        for lun in 0..DISKS {
            if !self.disks[lun].changing {
                self.look_at_reservations(lun);
            }
        }
    }

    /// Stops the rings of a guest, and says where they go on.
    pub fn stop_rings(&mut self, guest: usize) -> Vec<(usize, u16)> {
        for one in self.out.values_mut() {
            one.disturbed |= one.guest == guest;
            // It need not wait for rings that do not run.
            one.again |= one.kind.ends_others();
        }
        self.guests[guest].fe().stop()
    }

    pub fn migrate(&mut self) {
        // What it starts with must be whole.
        if self.next.is_none() {
            self.await_answers("all answers before a migration", |w| w.out.is_empty());
            self.event("the destination starts");
            self.next = Some(self.spawn());
            return;
        }
        self.event("migration");
        self.stop_rings(0);
        self.collect();
        self.daemon_gone();
        let next = self.next.take().expect("a destination");
        self.guests[0].fe.as_mut().expect("a guest").migrate_to(&next, 0);
        let mut source = self.daemon.replace(next).expect("a source");
        match self.rng.below(3) {
            0 => source.kill(),
            1 => drop(source.terminate()),
            _ => self.retired.push(source),
        }
        if self.retired.len() > 3 {
            self.retired.remove(0);
        }
        self.look_again();
    }

    // ----- rest -----------------------------------------------------------------------------

    /// Waits until nothing is under way.
    pub fn settle(&mut self) {
        self.await_answers("all answers", |w| w.out.is_empty());
        for lun in 0..DISKS {
            self.look_at_reservations(lun);
        }
        let deadline = Instant::now() + 10 * PATIENCE;
        while !self.background.is_empty() || self.disks.iter().any(|disk| disk.whole.is_some()) {
            if Instant::now() > deadline {
                self.fail("what is under way in the background does not end");
            }
            for lun in 0..DISKS {
                let by = self.disks[lun].reserved[0].basic.unwrap_or(0);
                let done = self.disks[lun].whole.is_some()
                    && self.ask(by, lun, cdb::test_unit_ready(), 0).is_good();
                if done {
                    self.whole_ended(lun);
                }
            }
            let asked = self.background.first().map(|copy| (copy.guest, copy.lun, copy.list));
            if let Some((guest, lun, list)) = asked {
                let answer = self.ask(guest, lun, cdb::receive_copy_lid4(5, list, 256), 256);
                if answer.status == status::RESERVATION_CONFLICT {
                    // It cannot ask.
                    self.give_function(guest, lun, Tmf::LogicalUnitReset, 0);
                    self.await_answers("a reset", |w| w.out.is_empty());
                } else if answer.is_good() && (0x10..=0x12).contains(&(answer.data()[5] & 0x7f)) {
                    std::thread::sleep(Duration::from_millis(5));
                } else {
                    let done = answer.is_good() && answer.data()[5] & 0x7f == 1;
                    let how = if done { Ending::Done } else { Ending::Maybe };
                    self.end_background(how, |copy| copy.guest == guest && copy.list == list);
                }
            }
        }
    }

    /// Holds all blocks, as the host sees them, against the model.
    pub fn look_at_disks(&mut self, when: &str) {
        self.event(format!("all blocks are looked at, {when}"));
        for disk in 0..DISKS {
            let id = Id { initiator: u8::MAX - b'A', number: self.model.now() as u32 };
            let all = Area { disk, lba: 0, blocks: BLOCKS };
            self.model.begin(id, &[all], &[]);
            let bytes = host_read(&self.disks[disk].path, 0, BLOCKS * BLOCK);
            if let Err(wrong) = self.model.check(id, 0, &bytes) {
                self.fail_block(when, &wrong);
            }
            self.end(id, Ending::Done);
        }
    }

    /// Everything ends, and nothing is left but what has to be remembered.
    pub fn finish(&mut self, mount: &Mount) {
        self.settle();
        self.look_at_disks("when all is quiet");
        self.guests.iter_mut().for_each(|guest| guest.fe = None);
        self.next = None;
        self.retired.clear();
        let mut daemon = self.daemon.take().expect("a daemon");
        assert!(daemon.terminate().success(), "{}", daemon.log());
        self.look_at_disks("when the daemon has ended");
        for (n, disk) in self.disks.iter().enumerate() {
            // Whether its only initiator has reserved it by RESERVE(6) cannot be seen.
            let survives = disk.reserved.iter().any(|state| state.survives);
            if disk.reserved.iter().any(|state| state.survives != survives) {
                self.fail("unknown reservations");
            }
            let mut expected = vec![format!("{n}.img")];
            if survives {
                expected.push(format!("{n}.img.thinlun"));
            }
            let mut found: Vec<String> = std::fs::read_dir(mount.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.starts_with(&format!("{n}.img")))
                // A kill may leave it; it is a few lines, and the next note replaces it.
                .filter(|name| !name.ends_with(".thinlun.new"))
                .collect();
            found.sort();
            if found != expected {
                self.fail(&format!("beside disk {n}: {found:?}, not {expected:?}"));
            }
        }
    }
}
