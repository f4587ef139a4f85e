//! Several initiators at once, each with several commands in flight, on disks that they share; or one that migrates between
//! two daemons. Whatever they do to each other, and whatever becomes of the daemon, no block ever holds what it may not
//! (`model`): writes, copies and tokens in the background, formats, reservations and those who preempt them, resets, rings
//! that stop, connections that break, `kill -9`.
//!
//! An episode is a few hundred steps from one seed. Which operation meets which is up to the scheduler, so that a seed may
//! have to be tried several times. What is printed for a failure is the history of the wrong block. Seeds that have failed
//! are kept in `regressions/cluster_model.txt` and come first.
//!
//! `THINLUN_TEST_MODEL_SECONDS` says how long each test takes on each file system (30), `THINLUN_TEST_MODEL_SEED` is the one
//! seed to use all that time.

mod frontend;
mod model;
mod mounts;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use frontend::cdb::{FUA, write_same};
use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE};
use frontend::control::tmf_response;
use frontend::daemon::{Scratch, host_read};
use frontend::pattern::Rng;
use frontend::scsi::{key, response, status};
use frontend::third_party as lists;
use frontend::*;
use model::reserved::{Access, Change, Reserved};
use model::{Area, BLOCK, Ending, Id, Model, Time, Value, What, Wrong, stamped};
use mounts::{Kind as FileSystem, Mount};

const DISKS: usize = 2;
const BLOCKS: usize = 2048;
/// Request queues of each guest.
const QUEUES: u64 = 2;
/// Steps of an episode.
const STEPS: u32 = 400;
/// Copies in the background at the same time: fewer than there may be of all copies.
const MOST_COPIES: usize = 5;
/// Lines of a wrong block's history that are printed.
const HISTORY: usize = 60;

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

const ACTIONS: [(Action, u64); 33] = [
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

/// One initiator.
struct Guest {
    fe: Option<FrontEnd>,
    number: u32,
    depth: usize,
}

impl Guest {
    fn fe(&self) -> &FrontEnd {
        self.fe.as_ref().expect("a guest that runs")
    }
}

/// A command to be given.
struct Command {
    lun: usize,
    name: &'static str,
    cdb: Cdb,
    data: Vec<u8>,
    room: usize,
    reads: Vec<Area>,
    writes: Vec<(Area, What)>,
    needs: Vec<(usize, Access)>,
    kind: Kind,
}

impl Command {
    fn new(lun: usize, name: &'static str, access: Access, cdb: Cdb) -> Self {
        let needs = vec![(lun, access)];
        let (reads, writes, data, kind) = (vec![], vec![], vec![], Kind::Plain);
        Command { lun, name, cdb, data, room: 0, reads, writes, needs, kind }
    }

    fn data(mut self, data: Vec<u8>) -> Self {
        self.data = data;
        self
    }

    fn room(mut self, room: usize) -> Self {
        self.room = room;
        self
    }

    fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    fn reads(mut self, area: Area) -> Self {
        self.reads.push(area);
        self
    }

    fn writes(mut self, area: Area, what: What) -> Self {
        self.writes.push((area, what));
        self
    }

    fn needs(mut self, lun: usize, access: Access) -> Self {
        self.needs.push((lun, access));
        self
    }
}

/// What an answer means.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
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
    fn rank(&self) -> u8 {
        match self {
            Kind::Function { .. } => 2,
            Kind::Reservation { change: Change::Preempt { abort: true, .. }, .. } => 1,
            _ => 0,
        }
    }

    /// It ends others, or may.
    fn ends_others(&self) -> bool {
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
struct Need {
    lun: usize,
    access: Access,
    permitted: bool,
    forbidden: bool,
}

impl Need {
    fn meet(&mut self, who: usize, possible: &[Reserved]) {
        self.permitted |= possible.iter().any(|state| !state.forbids(who, self.access));
        self.forbidden |= possible.iter().any(|state| state.forbids(who, self.access));
    }
}

/// A command or function that is not answered.
struct Outstanding {
    id: Id,
    guest: usize,
    lun: usize,
    name: &'static str,
    tag: u64,
    kind: Kind,
    needs: Vec<Need>,
    since: Time,
    /// Something may have ended it.
    disturbed: bool,
    /// A format or sanitize operation may have been in its way.
    beside_whole: bool,
    /// It was given to a daemon, or a connection, that has ended without an answer.
    again: bool,
    /// Disks that it must not write to as long as it is not let through again.
    kept_from: Vec<usize>,
}

/// A copy whose command was answered, and whose end is not known.
#[derive(Debug)]
struct Background {
    id: Id,
    guest: usize,
    lun: usize,
    list: u32,
    answered: Time,
    needs: Vec<Need>,
}

/// A format or sanitize operation whose end is not known.
#[derive(Debug)]
struct Whole {
    id: Id,
    since: Time,
    answered: Option<Time>,
    /// It was accepted.
    sure: bool,
}

struct Token {
    guest: usize,
    lun: usize,
    list: u32,
    ranges: Vec<Area>,
    values: Vec<BTreeSet<Value>>,
    answered: Time,
    bytes: Option<Vec<u8>>,
    /// Its disk was erased since.
    dead: bool,
}

const POINT_IN_TIME: [u8; 4] = [0, 0x80, 0, 0];

struct Disk {
    path: PathBuf,
    options: String,
    cscd: Vec<u8>,
    /// What its reservations may be.
    reserved: Vec<Reserved>,
    /// Something that changes them is under way.
    changing: bool,
    whole: Option<Whole>,
}

/// A line of the history.
struct Line {
    text: String,
    areas: Vec<Area>,
    /// It is about everything.
    always: bool,
}

struct World {
    rng: Rng,
    scratch: Scratch,
    daemon: Option<Daemon>,
    /// The destination of the next migration.
    next: Option<Daemon>,
    /// Sources of past ones.
    retired: Vec<Daemon>,
    migrates: bool,
    engine: Option<&'static str>,
    guests: Vec<Guest>,
    disks: Vec<Disk>,
    model: Model,
    out: BTreeMap<(usize, Ticket), Outstanding>,
    background: Vec<Background>,
    tokens: Vec<Token>,
    next_list: u32,
    next_key: u64,
    recent: Vec<Area>,
    history: Vec<Line>,
    counts: BTreeMap<(&'static str, &'static str), u32>,
    last_answer: Instant,
}

impl World {
    fn new(seed: u64, mount: &Mount, migrates: bool) -> Self {
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
        };
        world.daemon = Some(world.spawn());
        (0..world.guests.len()).for_each(|guest| world.boot(guest));
        for lun in 0..DISKS {
            let cscd = lists::cscd(&world.guests[0].fe().ready_lun(0, lun as u16));
            world.disks[lun].cscd = cscd;
        }
        world
    }

    fn spawn(&self) -> Daemon {
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

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("a daemon")
    }

    /// Starts a guest, on a socket that served nobody or whose guest is gone.
    fn boot(&mut self, guest: usize) {
        let builder = FrontEnd::builder().queues(QUEUES as usize).inflight();
        self.guests[guest].fe = Some(builder.connect_to(self.daemon(), guest));
        // Once it is served, nothing of the last one is under way any more.
        self.ask(guest, 0, cdb::inquiry(36), 36).expect_good();
    }

    // ----- history --------------------------------------------------------------------------

    fn note(&mut self, text: String, areas: Vec<Area>, always: bool) {
        let text = format!("{:6} {text}", self.model.now());
        self.history.push(Line { text, areas, always });
    }

    /// Something that is not about one command.
    fn event(&mut self, text: impl Into<String>) {
        self.note(format!("*** {}", text.into()), vec![], true);
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        self.fail_with(what, |_| true)
    }

    #[track_caller]
    fn fail_with(&self, what: &str, about: impl Fn(&Line) -> bool) -> ! {
        let lines: Vec<&Line> = self.history.iter().filter(|line| about(line)).collect();
        let mut text = format!("{what}\n--- what led there:\n");
        for line in &lines[lines.len().saturating_sub(HISTORY)..] {
            let _ = writeln!(text, "{} {:?}", line.text, line.areas);
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
    fn fail_block(&self, what: &str, wrong: &Wrong) -> ! {
        let Wrong { disk, block, found, allowed } = wrong;
        let why = self.model.explain(*disk, *block);
        let what = format!(
            "{what}: block {block} of disk {disk} holds {found:?}, and may hold {allowed:?}\n{why}"
        );
        self.fail_with(&what, |line| line.always || line.areas.iter().any(|a| a.has(*disk, *block)))
    }

    // ----- choices --------------------------------------------------------------------------

    /// Some blocks, often such as were used lately.
    fn area(&mut self, most: u64) -> Area {
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

    fn guest(&mut self) -> usize {
        self.rng.below(self.guests.len() as u64) as usize
    }

    fn disk(&mut self) -> usize {
        self.rng.below(DISKS as u64) as usize
    }

    fn next_id(&mut self, guest: usize) -> Id {
        self.guests[guest].number += 1;
        Id { initiator: guest as u8, number: self.guests[guest].number }
    }

    // ----- giving ---------------------------------------------------------------------------

    fn give(&mut self, guest: usize, command: Command) {
        let id = self.next_id(guest);
        self.give_as(id, guest, command);
    }

    /// The data of a command that writes names it.
    fn give_as(&mut self, id: Id, guest: usize, command: Command) {
        let Command { lun, name, cdb, data, room, reads, writes, needs, kind } = command;
        self.model.begin(id, &reads, &writes);
        let areas = writes.iter().map(|(area, _)| *area).chain(reads).collect();
        let always = kind.ends_others() || matches!(kind, Kind::Reservation { .. });
        self.note(format!("{id:?} {name} to disk {lun}: {}", described(&kind)), areas, always);
        let queue = FIRST_REQUEST_QUEUE + self.rng.below(QUEUES) as usize;
        let shape = if self.rng.one_in(3) { Shape::default().indirect() } else { Shape::default() };
        let tag = self.guests[guest].fe().new_tag();
        let unit = self.guests[guest].fe().lun(0, lun as u16);
        let request = unit.request(cdb).data_out(data).data_in(room).tag(tag).shape(shape);
        let ticket = self.guests[guest].fe().submit(queue, &request);
        self.enter(ticket, id, guest, lun, name, tag, kind, needs);
    }

    fn give_function(&mut self, guest: usize, lun: usize, function: Tmf, about: u64) {
        let id = self.next_id(guest);
        self.model.begin(id, &[], &[]);
        self.note(format!("{id:?} {function:?} of disk {lun}, tag {about}"), vec![], true);
        let address = Address::flat(0, lun as u16);
        let exchange = function.exchange(address, about);
        let ticket = self.guests[guest].fe().queue(CONTROL_QUEUE).submit(&exchange);
        let kind = Kind::Function { function, about };
        self.enter(ticket, id, guest, lun, "function", 0, kind, vec![]);
    }

    #[allow(clippy::too_many_arguments)]
    fn enter(
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
        let disturbed = self.out.values().any(|other| other.kind.ends_others());
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
        let (since, again, kept_from) = (self.model.now(), false, vec![]);
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
        };
        self.out.insert((guest, ticket), outstanding);
    }

    // ----- answers --------------------------------------------------------------------------

    /// Takes the answers that are there; says whether there were any.
    fn collect(&mut self) -> bool {
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
    fn await_answers(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
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
    fn ending(&self, one: &Outstanding, answer: &ScsiResponse) -> Ending {
        let wrong = |why: &str| -> Ending {
            self.fail(&format!("{:?} {} of disk {}: {why}: {answer:?}", one.id, one.name, one.lun))
        };
        let not = if one.again { Ending::Maybe } else { Ending::Not };
        let copy = matches!(one.kind, Kind::Copy { .. });
        let ended = |answer| match one.disturbed || one.again {
            true => answer,
            false => wrong("nobody has ended it"),
        };
        match (answer.response, answer.status) {
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
                    true => not,
                    false => wrong("nobody formats it"),
                },
                (key::MISCOMPARE, 0x1d, 0) if matches!(one.kind, Kind::Compare(_)) => not,
                (key::COPY_ABORTED, ..) if copy => {
                    let met = one.needs.iter().any(|need| need.forbidden);
                    if !met && !one.beside_whole && !one.disturbed && !one.again {
                        return wrong("nothing was in its way");
                    }
                    Ending::Maybe
                }
                // A token is good for as long as its maker sees fit.
                (key::ILLEGAL_REQUEST, 0x23, _) if copy => Ending::Maybe,
                (key::ILLEGAL_REQUEST, ..) if matches!(one.kind, Kind::Populate { .. }) => not,
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

    fn answered(&mut self, one: Outstanding, answer: &ScsiResponse) {
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
        let mut areas = self.model.written_by(one.id);
        areas.extend(self.model.read_by(one.id));
        let always = one.kind.ends_others() || matches!(one.kind, Kind::Reservation { .. });
        let sense = answer.sense_code().map_or(String::new(), |code| format!(" {code:x?}"));
        self.note(format!("{:?} {}: {said}{sense}, {how:?}", one.id, one.name), areas, always);
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
                let Outstanding { id, guest, lun, needs, .. } = one;
                let (list, answered) = (*list, self.model.now());
                self.background.push(Background { id, guest, lun, list, answered, needs });
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
    fn end(&mut self, id: Id, how: Ending) {
        if let Err(why) = self.model.end(id, how) {
            self.fail(&why);
        }
    }

    /// What is not mapped reads as zeroes.
    fn check_lba_status(&self, one: &Outstanding, answer: &ScsiResponse) {
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
                    let wrong = Wrong { disk: area.disk, block, found, allowed };
                    self.fail_block(&format!("{:?} GET LBA STATUS {kind}", one.id), &wrong);
                }
            }
        }
    }

    fn check_compare(
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
                let wrong = Wrong { disk: area.disk, block: area.lba + n, found, allowed };
                self.fail_block(&format!("{:?} COMPARE AND WRITE", one.id), &wrong);
            }
        }
        let certain = seen.iter().zip(expected).all(|(s, v)| s.len() == 1 && s.contains(v));
        if miscompared && certain {
            self.fail_with(
                &format!("{:?} COMPARE AND WRITE miscompares what is there", one.id),
                |l| l.always || l.areas.iter().any(|a| a.overlaps(&area)),
            );
        }
    }

    // ----- copies ---------------------------------------------------------------------------

    /// How a copy has ended, if it has.
    fn told_of_copy(&self, one: &Outstanding, answer: &ScsiResponse) -> Option<Ending> {
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
    fn end_background(&mut self, how: Ending, which: impl Fn(&Background) -> bool) {
        let (ended, left) =
            std::mem::take(&mut self.background).into_iter().partition(|copy| which(copy));
        self.background = left;
        let ended: Vec<Background> = ended;
        for copy in ended {
            let areas = self.model.written_by(copy.id);
            self.note(format!("{:?} has ended in the background: {how:?}", copy.id), areas, false);
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
    fn set_reserved(&mut self, lun: usize, possible: impl IntoIterator<Item = Reserved>) {
        let mut all: Vec<Reserved> = Vec::new();
        possible.into_iter().for_each(|state| {
            if !all.contains(&state) {
                all.push(state);
            }
        });
        for copy in &mut self.background {
            let guest = copy.guest;
            copy.needs.iter_mut().filter(|n| n.lun == lun).for_each(|n| n.meet(guest, &all));
        }
        for one in self.out.values_mut() {
            let guest = one.guest;
            for need in one.needs.iter_mut().filter(|need| need.lun == lun) {
                need.meet(guest, &all);
            }
            let may = all.iter().any(|state| !state.forbids(guest, Access::Write));
            if may && one.kept_from.contains(&lun) {
                one.kept_from.clear();
                self.model.goes_on(one.id);
            }
        }
        self.disks[lun].reserved = all;
    }

    /// A change to what each of them may be.
    fn change_reserved(&mut self, lun: usize, change: impl Fn(&Reserved) -> Reserved) {
        let new: Vec<Reserved> = self.disks[lun].reserved.iter().map(change).collect();
        self.set_reserved(lun, new);
    }

    fn give_change(&mut self, guest: usize, lun: usize, change: Change) {
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

    fn reservation_answered(
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
    fn preempted(&mut self, by: &Outstanding, guests: &[usize]) {
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
            .filter(|copy| guests.contains(&copy.guest) && (copy.lun == lun || writes(copy)))
            .map(|copy| copy.id)
            .collect();
        self.end_background(Ending::Maybe, |copy| ended.contains(&copy.id));
    }

    /// Asks for the reservations of a disk that nobody changes now, and holds them against what they may be.
    fn look_at_reservations(&mut self, lun: usize) {
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
    fn ask(&self, guest: usize, lun: usize, cdb: Cdb, room: usize) -> ScsiResponse {
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

    fn function_answered(&mut self, one: Outstanding, function: Tmf, about: u64, code: u8) {
        self.note(format!("{:?} {function:?}: {code}", one.id), vec![], true);
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
                self.end_background(Ending::Maybe, |copy| copy.lun == one.lun);
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

    fn whole_answered(&mut self, one: &Outstanding, immediate: bool, how: Ending) {
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
    fn whole_ended(&mut self, lun: usize) {
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
    fn abandon(&mut self, guest: usize) {
        let all: Vec<(usize, Ticket)> =
            self.out.keys().filter(|(of, _)| *of == guest).copied().collect();
        for key in all {
            let Some(one) = self.out.remove(&key) else { continue };
            match one.kind {
                Kind::Reservation { .. } => self.disks[one.lun].changing = false,
                Kind::Function { .. } => {
                    for lun in 0..DISKS {
                        let busy = self.out.values().any(|o| o.lun == lun && changes(&o.kind));
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
    fn nexus_lost(&mut self, guest: usize) {
        self.end_background(Ending::Maybe, |copy| copy.guest == guest);
        for lun in 0..DISKS {
            self.change_reserved(lun, |state| state.without_basic(|by| by == guest));
        }
    }

    /// What these guests have under way is done by another daemon, or over another connection.
    fn again(&mut self, which: impl Fn(usize) -> bool) {
        for one in self.out.values_mut().filter(|one| which(one.guest)) {
            (one.again, one.disturbed) = (true, true);
            one.kept_from.clear();
            self.model.goes_on(one.id);
        }
    }

    fn restart(&mut self, gently: bool) {
        self.event(if gently { "SIGTERM" } else { "SIGKILL" });
        // One that was started beside it knows less than what comes now.
        self.next = None;
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
        for (n, guest) in self.guests.iter_mut().enumerate() {
            let daemon = self.daemon.as_ref().expect("a daemon");
            guest.fe.as_mut().expect("a guest").reconnect_to(daemon, n);
        }
        self.look_again();
    }

    /// All that lasts as long as a daemon is gone.
    fn daemon_gone(&mut self) {
        self.end_background(Ending::Maybe, |_| true);
        self.tokens.clear();
        (0..DISKS).for_each(|lun| self.change_reserved(lun, Reserved::restarted));
        self.again(|_| true);
    }

    fn look_again(&mut self) {
        for lun in 0..DISKS {
            if !self.disks[lun].changing {
                self.look_at_reservations(lun);
            }
        }
    }

    /// Stops the rings of a guest, and says where they go on.
    fn stop_rings(&mut self, guest: usize) -> Vec<(usize, u16)> {
        for one in self.out.values_mut() {
            one.disturbed |= one.guest == guest;
            // It need not wait for rings that do not run.
            one.again |= one.kind.ends_others();
        }
        self.guests[guest].fe().stop()
    }

    fn migrate(&mut self) {
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

    // ----- steps ----------------------------------------------------------------------------

    fn step(&mut self, action: Action) {
        let guest = self.guest();
        match action {
            A::Read | A::Write | A::WriteAtomic | A::Unmap | A::WriteSame | A::CompareAndWrite => {
                self.transfer(guest, action);
            }
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

    fn transfer(&mut self, guest: usize, action: Action) {
        let area = match action {
            A::Unmap | A::WriteSame => self.area(256),
            A::CompareAndWrite => self.area(6),
            A::WriteAtomic => self.area(16),
            _ => self.area(48),
        };
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
        if to.is_empty() {
            return;
        }
        let segments: Vec<Vec<u8>> = from
            .iter()
            .zip(&to)
            .map(|(source, target)| {
                let place = |area: &Area| (area.disk as u16, area.lba as u64);
                lists::segment(place(source), place(target), source.blocks as u16)
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
        let bytes = lists::populate_list(10, &pairs);
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
        let data = lists::write_list(&bytes, background, delete, &range);
        let cdb = cdb::write_using_token(data.len() as u32).be32(6, list);
        let name = if background { "WRITE USING TOKEN, IMMED" } else { "WRITE USING TOKEN" };
        let mut command = Command::new(target.disk, name, Access::Write, cdb).data(data);
        if by_reference {
            if !dead {
                command = command.needs(source, Access::Read);
            }
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

    // ----- rest -----------------------------------------------------------------------------

    /// Waits until nothing is under way.
    fn settle(&mut self) {
        self.await_answers("all answers", |w| w.out.is_empty());
        for lun in 0..DISKS {
            self.look_at_reservations(lun);
        }
        let deadline = Instant::now() + 2 * PATIENCE;
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
    fn look_at_disks(&mut self, when: &str) {
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
    fn finish(&mut self, mount: &Mount) {
        self.settle();
        self.look_at_disks("when all is quiet");
        self.guests.iter_mut().for_each(|guest| guest.fe = None);
        self.next = None;
        self.retired.clear();
        let mut daemon = self.daemon.take().expect("a daemon");
        assert!(daemon.terminate().success(), "{}", daemon.log());
        self.look_at_disks("when the daemon has ended");
        for (n, disk) in self.disks.iter().enumerate() {
            let [state] = disk.reserved.as_slice() else { self.fail("unknown reservations") };
            let mut expected = vec![format!("{n}.img")];
            if state.survives {
                expected.push(format!("{n}.img.thinlun"));
            }
            let mut found: Vec<String> = std::fs::read_dir(mount.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.starts_with(&format!("{n}.img")))
                .collect();
            found.sort();
            if found != expected {
                self.fail(&format!("beside disk {n}: {found:?}, not {expected:?}"));
            }
        }
    }
}

fn changes(kind: &Kind) -> bool {
    let resets = |f: &Tmf| matches!(f, Tmf::LogicalUnitReset | Tmf::ItNexusReset);
    match kind {
        Kind::Reservation { .. } => true,
        Kind::Function { function, .. } => resets(function),
        _ => false,
    }
}

fn described(kind: &Kind) -> String {
    match kind {
        Kind::Reservation { change, .. } => format!("{change:x?}"),
        Kind::Compare(_) | Kind::Populate { .. } => String::new(),
        other => format!("{other:?}"),
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
