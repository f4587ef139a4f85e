//! A daemon that is killed, or replaced, while a guest is at work: what was in flight is done by the next one, once
//! as far as the guest can tell, and nothing that was answered is lost.

mod frontend;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::pattern::{Rng, assert_same, blocks};
use frontend::queue::Ticket;
use frontend::scsi::{key, response};
use frontend::*;
use nix::sys::signal::Signal;

const BLOCK: usize = 4096;
const PLACES: u64 = 512;
const QUEUES: usize = 2;
const DEPTH: usize = 24;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Unmap,
}

/// One command, and what the place holds when it has succeeded (0: zeroes).
#[derive(Clone, Copy, Debug)]
struct Command {
    kind: Kind,
    place: u64,
    stamp: u64,
}

/// Random commands with known results over a disk, exactly accounted for.
struct Guest {
    fe: FrontEnd,
    rng: Rng,
    /// What each place holds.
    stamps: Vec<u64>,
    /// No two commands in flight are about the same place.
    busy: Vec<bool>,
    flying: HashMap<Ticket, Command>,
    next_stamp: u64,
    done: u64,
    attentions: u64,
}

impl Guest {
    fn new(fe: FrontEnd, seed: u64) -> Self {
        Guest {
            fe,
            rng: Rng::new(seed),
            stamps: vec![0; PLACES as usize],
            busy: vec![false; PLACES as usize],
            flying: HashMap::new(),
            next_stamp: 1,
            done: 0,
            attentions: 0,
        }
    }

    fn lun(&self, queue: usize) -> Lun<'_> {
        self.fe.lun(0, 0).on_queue(FIRST_REQUEST_QUEUE + queue)
    }

    fn submit(&mut self, queue: usize, command: Command) {
        let lba = command.place * (BLOCK / 512) as u64;
        let lun = self.lun(queue);
        let request = match command.kind {
            Kind::Read => lun.request(cdb::read16(lba, 8)).data_in(BLOCK),
            Kind::Write => lun.request(cdb::write16(lba, 8)).data_out(contents(command)),
            Kind::Unmap => {
                let list = cdb::unmap_list(&[(lba, 8)]);
                lun.request(cdb::unmap(false, list.len() as u16)).data_out(list)
            }
        };
        let ticket = lun.submit(&request);
        assert!(self.flying.insert(ticket, command).is_none());
    }

    /// Gives a queue new commands, up to its depth.
    fn fill(&mut self, queue: usize) {
        let index = FIRST_REQUEST_QUEUE + queue;
        let in_flight = self.fe.queue(index).in_flight();
        for _ in in_flight..DEPTH {
            let place = self.rng.below(PLACES);
            if std::mem::replace(&mut self.busy[place as usize], true) {
                continue;
            }
            let (kind, stamp) = match self.rng.below(8) {
                0..=2 => (Kind::Read, self.stamps[place as usize]),
                3 => (Kind::Unmap, 0),
                _ => {
                    self.next_stamp += 1;
                    (Kind::Write, self.next_stamp)
                }
            };
            self.submit(queue, Command { kind, place, stamp });
        }
    }

    /// Takes what is answered. A unit attention says that the daemon is a new one; then the command is given again.
    fn take(&mut self, queue: usize) {
        loop {
            let done = self.fe.queue(FIRST_REQUEST_QUEUE + queue).wait_for(Duration::ZERO);
            let Some(completion) = done else { return };
            let command = self.flying.remove(&completion.ticket).expect("answered twice");
            let answer = ScsiResponse::parse(&completion);
            if let Some((key::UNIT_ATTENTION, 0x29, _)) = answer.sense_code() {
                self.attentions += 1;
                self.submit(queue, command);
                continue;
            }
            let answer = answer.expect_good();
            if matches!(command.kind, Kind::Read) {
                assert_same(answer.data(), &contents(command), &format!("{command:?}"));
            }
            self.stamps[command.place as usize] = command.stamp;
            self.busy[command.place as usize] = false;
            self.done += 1;
        }
    }

    fn work(&mut self, time: Duration) {
        let start = Instant::now();
        loop {
            for queue in 0..QUEUES {
                self.fill(queue);
                self.take(queue);
            }
            if start.elapsed() >= time {
                return;
            }
        }
    }

    fn in_flight(&self) -> usize {
        (0..QUEUES).map(|n| self.fe.queue(FIRST_REQUEST_QUEUE + n).in_flight()).sum()
    }

    /// Until nothing is in flight; then the disk must hold what was answered.
    fn settle(&mut self) {
        let start = Instant::now();
        while !self.flying.is_empty() {
            (0..QUEUES).for_each(|queue| self.take(queue));
            if start.elapsed() > PATIENCE {
                self.fe.diagnosis().fail(&format!("{} commands hang", self.flying.len()));
            }
        }
        for queue in 0..QUEUES {
            assert_eq!(
                self.fe.queue(FIRST_REQUEST_QUEUE + queue).strays(),
                0,
                "answers to nothing"
            );
        }
        let lun = self.fe.ready_lun(0, 0);
        for (place, stamp) in (0..).zip(&self.stamps) {
            let command = Command { kind: Kind::Read, place, stamp: *stamp };
            let lba = place * (BLOCK / 512) as u64;
            assert_same(&lun.read16(lba, 8), &contents(command), &format!("place {place}"));
        }
    }
}

fn contents(command: Command) -> Vec<u8> {
    match command.stamp {
        0 => vec![0; BLOCK],
        stamp => blocks(command.place, BLOCK / 512, 512, stamp),
    }
}

fn daemon(scratch: &Scratch, options: &str) -> Daemon {
    Daemon::builder(scratch).disk(&scratch.join("disk.img"), options).arg("--num-queues=2").spawn()
}

fn killed_under_load(options: &str, kills: u64) {
    let scratch = Scratch::new();
    scratch.image("disk.img", PLACES * BLOCK as u64);
    let mut served = daemon(&scratch, options);
    let fe = FrontEnd::builder().queues(QUEUES).inflight().connect(&served);
    let mut guest = Guest::new(fe, kills);
    let mut left = 0;
    for _ in 0..kills {
        let time = Duration::from_micros(guest.rng.below(8000));
        guest.work(time);
        served.kill();
        left += guest.in_flight();
        served = daemon(&scratch, options);
        guest.fe.reconnect(&served);
    }
    guest.settle();
    println!(
        "{options:?}: {kills} kills, {} commands answered, {left} in flight at the kills, {} unit attentions",
        guest.done, guest.attentions
    );
    assert!(left > 0, "no kill met a command in flight");
}

#[test]
fn two_hundred_kills_lose_nothing_and_leave_nothing_hanging() {
    killed_under_load("", 100);
    killed_under_load("cache=direct,block-size=512", 100);
}

/// SIGTERM ends what is in flight; the next daemon finds a clean table.
#[test]
fn a_daemon_is_replaced_under_load() {
    let scratch = Scratch::new();
    scratch.image("disk.img", PLACES * BLOCK as u64);
    let mut served = daemon(&scratch, "");
    let fe = FrontEnd::builder().queues(QUEUES).inflight().connect(&served);
    let mut guest = Guest::new(fe, 7);
    for _ in 0..10 {
        guest.work(Duration::from_millis(20));
        assert!(served.end_with(Signal::SIGTERM).success());
        served = daemon(&scratch, "");
        guest.fe.reconnect(&served);
    }
    guest.settle();
    assert!(!served.log().contains("left in flight") || guest.done > 0);
}

/// What an initiator had set up is gone with the daemon, and it is told.
#[test]
fn the_loss_of_state_is_announced() {
    let scratch = Scratch::new();
    scratch.image("disk.img", MIB);
    let mut served = daemon(&scratch, "");
    let mut fe = FrontEnd::builder().inflight().connect(&served);
    fe.ready_lun(0, 0);
    served.kill();
    served = daemon(&scratch, "");
    fe.reconnect(&served);
    let lun = fe.lun(0, 0);
    assert_eq!(lun.clear_unit_attentions(), [(0x29, 0)]);
}

/// A copy within a disk must not be done a second time: nobody knows how far it had come.
#[test]
fn what_cannot_be_done_twice_is_not() {
    let scratch = Scratch::new();
    scratch.image("disk.img", MIB);
    let mut served = daemon(&scratch, "");
    let mut fe = FrontEnd::builder().inflight().connect(&served);
    let lun = fe.ready_lun(0, 0);
    // Stopped: what is given now stays in the ring, as if it had been taken from there.
    served.halt();
    let copy = Cdb::from_slice(&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16]);
    let copy = lun.request(copy).data_out(vec![0; 16]);
    let ready = lun.request(cdb::test_unit_ready());
    let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
    let tickets = [&ready, &copy, &ready].map(|request| queue.submit(&request.exchange()));
    drop(queue);
    note_in_flight(&fe, FIRST_REQUEST_QUEUE, 3);
    served.kill();
    served = daemon(&scratch, "");
    fe.reconnect(&served);
    let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
    let answers = tickets.map(|ticket| ScsiResponse::parse(&queue.wait(ticket)));
    assert!(answers[0].is_good() && answers[2].is_good());
    answers[1].expect_response(response::ABORTED);
}

/// A disk that was being formatted when the daemon died is formatted to its end, and not once more for the command that was
/// left in flight: somebody else may have written to it meanwhile.
#[test]
fn a_format_is_not_begun_again() {
    for (cdb, list) in [(cdb::format_unit(0), vec![]), (cdb::sanitize(1, 5), vec![1, 0, 0, 1, 0])] {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", MIB);
        let start = |options: &str| Daemon::builder(&scratch).disk(&disk, options).ports(2).spawn();
        let mut served = start("fault=any:delay-ms-300");
        let mut fe = FrontEnd::builder().inflight().connect(&served);
        let lun = fe.ready_lun(0, 0);
        let erase = lun.submit(&lun.request(cdb).data_out(list));
        let noted = format!("{}.thinlun", disk.display());
        eventually("it is noted", || std::path::Path::new(&noted).exists());
        served.kill();
        served = start("");
        let other = FrontEnd::builder().connect_to(&served, 1);
        let theirs = other.lun(0, 0);
        eventually("it has ended", || theirs.run(cdb::test_unit_ready()).is_good());
        let data = blocks(8, 8, 512, 1);
        theirs.run_out(cdb::write16(8, 8), &data).expect_good();
        fe.reconnect(&served);
        fe.wait(erase).expect_response(response::ABORTED);
        let after = theirs.run_in(cdb::read16(8, 8), 4096).expect_good();
        assert_same(after.data(), &data, "what was written since");
    }
}

/// Firmware that was reading when the daemon was restarted gets its data: it would not ask again. The first command
/// that is given after that is told what has happened, on each logical unit.
#[test]
fn what_was_in_flight_does_not_take_the_unit_attention() {
    let scratch = Scratch::new();
    let disks = [0, 1].map(|n| scratch.image(&format!("disk{n}.img"), MIB));
    let start = || {
        let slow = "fault=read:delay-ms-300";
        Daemon::builder(&scratch).disk(&disks[0], slow).disk(&disks[1], slow).spawn()
    };
    let mut served = start();
    let mut fe = FrontEnd::builder().inflight().connect(&served);
    let data = [1, 2].map(|stamp| blocks(0, 8, 512, stamp));
    let luns = || [0, 1].map(|n| fe.ready_lun(0, n));
    for (lun, data) in luns().iter().zip(&data) {
        lun.write10(0, data);
    }
    // In flight when it is killed, all of them; and some that lie in the ring and are not taken yet.
    let reads = luns().map(|lun| lun.submit(&lun.request(cdb::read10(0, 8)).data_in(4096)));
    served.halt();
    let lun = &luns_of(&fe)[0];
    let others = [
        lun.request(cdb::request_sense(false, 18)).data_in(18),
        lun.request(cdb::report_luns(0, 64)).data_in(64),
        lun.request(cdb::inquiry(36)).data_in(36),
        lun.request(Cdb::new(0xfe)),
        lun.request(cdb::test_unit_ready()),
    ];
    let others = others.map(|request| lun.submit(&request));
    note_in_flight(&fe, FIRST_REQUEST_QUEUE, 7);
    served.kill();
    served = start();
    fe.reconnect(&served);
    for (ticket, data) in reads.into_iter().zip(&data) {
        assert_same(fe.wait(ticket).expect_good().data(), data, "what was being read");
    }
    let [sense, luns, inquiry, unknown, ready] = others.map(|ticket| fe.wait(ticket));
    assert_eq!(sense.expect_good().data()[2], key::NO_SENSE);
    luns.expect_good();
    inquiry.expect_good();
    unknown.expect_sense(frontend::scsi::sense::INVALID_OPCODE);
    ready.expect_good();
    for lun in luns_of(&fe) {
        assert_eq!(lun.clear_unit_attentions(), [(0x29, 0)]);
    }
}

fn luns_of(fe: &FrontEnd) -> [Lun<'_>; 2] {
    [0, 1].map(|n| fe.lun(0, n))
}

/// A guest that was reset while nobody served it has made new rings: what its last life had in flight is not done in
/// this one, and no request of this one is left out.
#[test]
fn what_an_earlier_life_had_in_flight_is_not_done() {
    let scratch = Scratch::new();
    scratch.image("disk.img", MIB);
    let mut served = daemon(&scratch, "");
    // With as many requests in the new ring as were left, more and fewer; after many commands and after none.
    for before in [0, 5, 200] {
        for now in [0, 1, 4, 9] {
            let mut fe = FrontEnd::builder().queues(QUEUES).inflight().connect(&served);
            let lun = fe.lun(0, 0);
            for _ in 0..before {
                lun.run(cdb::test_unit_ready());
            }
            served.halt();
            // A WRITE that would be seen.
            let data = vec![0xee; BLOCK];
            let write = lun.request(cdb::write10(0, 8)).data_out(data);
            let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
            for _ in 0..4 {
                queue.submit(&write.exchange());
            }
            drop(queue);
            note_in_flight_from(&fe, FIRST_REQUEST_QUEUE, 4, u64::from(before > 0) * 1000);
            served.kill();
            served = daemon(&scratch, "");
            fe.reset_queues();
            let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
            let read = lun.request(cdb::read10(0, 8)).data_in(BLOCK);
            let tickets: Vec<_> = (0..now).map(|_| queue.submit(&read.exchange())).collect();
            drop(queue);
            fe.reconnect(&served);
            for ticket in tickets {
                let answer = fe.wait(ticket);
                if answer.sense_code() != Some((key::UNIT_ATTENTION, 0x29, 0)) {
                    assert_same(
                        answer.expect_good().data(),
                        &vec![0; BLOCK],
                        "nothing was written",
                    );
                }
            }
            let lun = fe.ready_lun(0, 0);
            assert_same(&lun.read10(0, 8), &vec![0; BLOCK], "nothing was written");
            let answered = fe.queue(FIRST_REQUEST_QUEUE).ring().used_idx();
            assert_eq!(fe.queue(FIRST_REQUEST_QUEUE).ring().published(), answered);
            assert_eq!(fe.queue(FIRST_REQUEST_QUEUE).strays(), 0);
        }
    }
}

/// Notes the last `count` requests of a queue as a daemon notes what it takes.
fn note_in_flight(fe: &FrontEnd, index: usize, count: u16) {
    note_in_flight_from(fe, index, count, 1000);
}

/// The same, with counters from `first` on.
fn note_in_flight_from(fe: &FrontEnd, index: usize, count: u16, first: u64) {
    use std::os::unix::fs::FileExt;
    let queue = fe.queue(index);
    let stride = (16 + 16 * u64::from(queue.ring().size())).next_multiple_of(64);
    let file = fe.inflight_file();
    for n in 0..count {
        let head = queue.ring().head_of(queue.ring().published().wrapping_sub(count - n));
        let state = index as u64 * stride + 16 + 16 * u64::from(head);
        file.write_all_at(&[1], state).unwrap();
        file.write_all_at(&(first + u64::from(n)).to_ne_bytes(), state + 8).unwrap();
    }
}
