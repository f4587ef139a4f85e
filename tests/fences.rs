//! A guest that shares a disk goes away with commands in flight, because the daemon was killed or the connection broke, and
//! comes back to have them done again. Whatever others have done to the disk meanwhile, or have been told is over, is not
//! undone by them.

mod frontend;

use frontend::cdb::FUA;
use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE as REQUESTS};
use frontend::control::tmf_response;
use frontend::daemon::{host_read, host_write};
use frontend::queue::Ticket;
use frontend::scsi::{key, response, status};
use frontend::third_party as lists;
use frontend::*;

const BLOCK: usize = 512;
/// Blocks of each transfer.
const BLOCKS: usize = 8;
/// Longer than any test.
const FOR_EVER: &str = "delay-ms-600000";

fn filled(byte: u8) -> Vec<u8> {
    vec![byte; BLOCKS * BLOCK]
}

/// PERSISTENT RESERVE OUT, with APTPL where it registers.
fn reserve_out(lun: &Lun<'_>, action: u8, kind: u8, key: u64, other: u64) -> ScsiResponse {
    let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
    list.resize(24, 0);
    list[20] = u8::from([0, 6].contains(&action));
    lun.run_out(cdb::persistent_reserve_out(action, kind, 24), &list)
}

const REGISTER: u8 = 6;
const RESERVE: u8 = 1;
const PREEMPT_AND_ABORT: u8 = 5;
/// Write exclusive, registrants only.
const REGISTRANTS: u8 = 5;

/// What a guest does before the daemon dies: a write that is not answered, and a read.
struct Left {
    write: Ticket,
    read: Ticket,
}

/// Two disks, and two guests, each by a port of its own.
struct Pair {
    scratch: Scratch,
    daemon: Daemon,
    a: FrontEnd,
}

impl Pair {
    /// With these faults of the first disk.
    fn new(faults: &str) -> Self {
        let scratch = Scratch::new();
        for name in ["0.img", "1.img"] {
            scratch.image(name, 16 * MIB);
        }
        let daemon = Self::daemon(&scratch, faults);
        let a = FrontEnd::builder().queues(2).inflight().connect_to(&daemon, 0);
        (0..2).for_each(|lun| drop(a.ready_lun(0, lun)));
        Pair { scratch, daemon, a }
    }

    fn daemon(scratch: &Scratch, faults: &str) -> Daemon {
        let builder = Daemon::builder(scratch).disk(&scratch.join("0.img"), faults);
        builder.disk(&scratch.join("1.img"), "").ports(2).spawn()
    }

    fn b(&self) -> FrontEnd {
        let b = FrontEnd::builder().inflight().connect_to(&self.daemon, 1);
        (0..2).for_each(|lun| drop(b.ready_lun(0, lun)));
        b
    }

    /// The first guest gives a write of ones to a host that does not come back, and behind it a read, of a queue of its own.
    fn leave(&self) -> Left {
        let lun = self.a.lun(0, 0);
        let write = cdb::write10(0, BLOCKS as u16).or(1, FUA);
        let write = lun.submit(&lun.request(write).data_out(filled(1)));
        let read = lun.request(cdb::read10(64, 1)).data_in(BLOCK).attribute(TaskAttribute::Ordered);
        let read = lun.submit(&read);
        eventually("both are taken", || {
            let queue = self.a.queue(REQUESTS);
            queue.ring().avail_event() == queue.ring().published()
        });
        // And the write has come to the host.
        std::thread::sleep(A_MOMENT);
        Left { write, read }
    }

    /// The daemon is killed, and another one starts.
    fn crash(&mut self, faults: &str) {
        self.daemon.kill();
        self.a.hang_up();
        self.daemon = Self::daemon(&self.scratch, faults);
    }

    fn back(&mut self) {
        self.a.reconnect_to(&self.daemon, 0);
    }

    fn enable(&self) {
        (0..REQUESTS + 2).for_each(|queue| self.a.enable_queue(queue, true));
    }

    fn first_block(&self) -> u8 {
        host_read(&self.scratch.join("0.img"), 0, 1)[0]
    }

    /// New commands are done, and so is what is left in flight from now on.
    fn assert_well(&self) {
        for lun in 0..2 {
            let lun = self.a.lun(0, lun);
            lun.clear_unit_attentions();
            lun.write16(512, &filled(7));
            assert_eq!(lun.read16(512, BLOCKS as u32), filled(7));
        }
    }
}

/// Who has reserved nothing and formats nothing says that a command was ended.
#[track_caller]
fn assert_ended(answer: &ScsiResponse, how: (u8, u8), what: &str) {
    assert_eq!((answer.response, answer.status), how, "{what}: {answer:?}");
}

const RESET: (u8, u8) = (response::RESET, status::GOOD);
const ABORTED: (u8, u8) = (response::ABORTED, status::GOOD);
/// ABORTED COMMAND: Linux gives it again.
const OVERTAKEN: (u8, u8) = (response::OK, status::CHECK_CONDITION);
const TASK_ABORTED: (u8, u8) = (response::OK, status::TASK_ABORTED);

/// Where the first guest is when the other one has its commands ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    /// Its front end has not connected yet.
    Away,
    /// Its rings are told and not enabled.
    Told,
    /// It came, was told of, and went again.
    AwayAgain,
    /// One of its rings runs, the one with the commands does not.
    HalfStarted,
}

const PLACES: [Where; 4] = [Where::Away, Where::Told, Where::AwayAgain, Where::HalfStarted];

impl Pair {
    fn go(&mut self, place: Where) {
        if place != Where::Away {
            self.a.reconnect_without_enabling(&self.daemon);
            self.a.barrier();
        }
        match place {
            Where::Away | Where::Told => {}
            Where::AwayAgain => self.a.hang_up(),
            Where::HalfStarted => {
                self.a.enable_queue(CONTROL_QUEUE, true);
                self.a.enable_queue(REQUESTS + 1, true);
            }
        }
    }

    fn come(&mut self, place: Where) {
        match place {
            Where::Away | Where::AwayAgain => self.back(),
            Where::Told | Where::HalfStarted => self.enable(),
        }
    }
}

#[test]
fn a_reset_reaches_what_a_guest_that_is_away_has_in_flight() {
    for place in PLACES {
        let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
        let left = pair.leave();
        pair.crash("");
        let b = pair.b();
        let lun = b.lun(0, 0);
        pair.go(place);
        assert_eq!(b.tmf(Tmf::LogicalUnitReset, lun.address, 0), response::FUNCTION_COMPLETE);
        lun.clear_unit_attentions();
        lun.write16(0, &filled(2));
        lun.synchronize_cache();
        pair.come(place);
        assert_ended(&pair.a.wait(left.write), RESET, &format!("{place:?}: the write"));
        assert_ended(&pair.a.wait(left.read), RESET, &format!("{place:?}: the read"));
        assert_eq!(lun.read16(0, 8), filled(2), "{place:?}");
        pair.assert_well();
    }
}

#[test]
fn preempt_and_abort_reaches_what_a_guest_that_is_away_has_in_flight() {
    for (place, reserved) in PLACES.into_iter().flat_map(|place| [(place, false), (place, true)]) {
        let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
        {
            let b = pair.b();
            reserve_out(&pair.a.lun(0, 0), REGISTER, 0, 0, 0xa).expect_good();
            reserve_out(&b.lun(0, 0), REGISTER, 0, 0, 0xb).expect_good();
            if reserved {
                reserve_out(&pair.a.lun(0, 0), RESERVE, REGISTRANTS, 0xa, 0).expect_good();
            }
        }
        let left = pair.leave();
        pair.crash("");
        let b = pair.b();
        let lun = b.lun(0, 0);
        pair.go(place);
        reserve_out(&lun, PREEMPT_AND_ABORT, REGISTRANTS, 0xb, 0xa).expect_good();
        lun.write16(0, &filled(2));
        lun.synchronize_cache();
        pair.come(place);
        let what = format!("{place:?}, reserved: {reserved}");
        assert_ended(&pair.a.wait(left.write), TASK_ABORTED, &what);
        assert_ended(&pair.a.wait(left.read), TASK_ABORTED, &what);
        assert_eq!(lun.read16(0, 8), filled(2), "{what}");
        if !reserved {
            pair.assert_well();
        }
    }
}

#[test]
fn what_erases_a_disk_is_not_followed_by_what_was_in_flight_before() {
    for place in PLACES {
        let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
        let left = pair.leave();
        pair.crash("");
        let b = pair.b();
        let lun = b.lun(0, 0);
        pair.go(place);
        lun.run(cdb::sanitize(0x02, 0)).expect_good();
        pair.come(place);
        assert_ended(&pair.a.wait(left.write), ABORTED, &format!("{place:?}"));
        assert_eq!(lun.read16(0, 8), filled(0), "{place:?}");
        pair.assert_well();
    }
}

/// What is in flight when a sanitize operation is begun ends before its first block changes; the daemon dies before that.
#[test]
fn what_was_in_flight_when_a_disk_was_erased_is_not_done_again_afterwards() {
    let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
    let left = pair.leave();
    pair.a.lun(0, 0).on_queue(REQUESTS + 1).run(cdb::sanitize(0x82, 0)).expect_good();
    pair.crash("");
    pair.a.reconnect_without_enabling(&pair.daemon);
    pair.a.enable_queue(CONTROL_QUEUE, true);
    eventually("the end of it", || pair.daemon.log().contains("is done"));
    pair.enable();
    assert_ended(&pair.a.wait(left.write), ABORTED, "the write");
    assert_ended(&pair.a.wait(left.read), ABORTED, "the read");
    assert_eq!(pair.first_block(), 0);
    pair.assert_well();
}

/// A fence is for the commands that it was about, on its disk, and for nothing that comes later.
#[test]
fn a_fence_is_gone_when_it_has_served() {
    let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
    let other = pair.a.lun(0, 1).on_queue(REQUESTS + 1);
    let left = pair.leave();
    pair.daemon.halt();
    // It waits in the ring: no daemon has taken it.
    let waits = pair.a.lun(0, 0).on_queue(REQUESTS + 1);
    let waits = waits.submit(&waits.request(cdb::read10(64, 1)).data_in(BLOCK));
    let elsewhere = other.submit(&other.request(cdb::read10(64, 1)).data_in(BLOCK));
    pair.crash("fault=write:delay-ms-700*1");
    let b = pair.b();
    let lun = b.lun(0, 0);
    assert_eq!(b.tmf(Tmf::LogicalUnitReset, lun.address, 0), response::FUNCTION_COMPLETE);
    pair.back();
    assert_ended(&pair.a.wait(left.write), RESET, "the write");
    assert_ended(&pair.a.wait(left.read), RESET, "the read");
    for ticket in [waits, elsewhere] {
        let answer = pair.a.wait(ticket);
        let attention = matches!(answer.sense_code(), Some((key::UNIT_ATTENTION, ..)));
        assert!(attention || answer.is_good(), "{answer:?}");
    }
    // What it leaves in flight later is done again.
    pair.a.lun(0, 0).clear_unit_attentions();
    let left = pair.leave();
    pair.a.hang_up();
    pair.back();
    pair.a.wait(left.write);
    pair.a.wait(left.read).expect_good();
}

/// A connection breaks and comes back within the life of a daemon; the command that is left was never begun.
#[test]
fn a_reset_reaches_what_a_broken_connection_has_left() {
    let mut pair = Pair::new("fault=write:delay-ms-700*1");
    let b = pair.b();
    let lun = b.lun(0, 0);
    let left = pair.leave();
    let ordered = pair.a.lun(0, 0);
    let write = ordered.request(cdb::write10(0, 8)).data_out(filled(3));
    let write = ordered.submit(&write.attribute(TaskAttribute::Ordered));
    std::thread::sleep(A_MOMENT);
    pair.a.hang_up();
    // Its connection has ended when the next one is served.
    pair.a.reconnect_without_enabling(&pair.daemon);
    pair.a.barrier();
    pair.a.hang_up();
    assert_eq!(b.tmf(Tmf::LogicalUnitReset, lun.address, 0), response::FUNCTION_COMPLETE);
    lun.clear_unit_attentions();
    lun.write16(0, &filled(2));
    pair.back();
    pair.a.wait(left.write);
    assert_ended(&pair.a.wait(left.read), RESET, "the read");
    assert_ended(&pair.a.wait(write), RESET, "the write");
    assert_eq!(lun.read16(0, 8), filled(2));
    pair.assert_well();
}

// ----- without a fence ------------------------------------------------------------------------

/// A guest takes a lock that another one's unanswered write has left.
fn takes_the_lock(lun: &Lun<'_>) {
    assert_eq!(lun.read16(0, 8), filled(1));
    let data = [filled(1), filled(2)].concat();
    lun.run_out(cdb::compare_and_write(0, 8), &data).expect_good();
}

#[test]
fn a_write_is_not_done_again_over_what_another_has_written_since() {
    // Its data is on the medium, and it waits for the flush.
    let mut pair = Pair::new(&format!("fault=flush:{FOR_EVER}"));
    let left = pair.leave();
    assert_eq!(pair.first_block(), 1);
    pair.crash("");
    let b = pair.b();
    takes_the_lock(&b.lun(0, 0));
    b.lun(0, 0).synchronize_cache();
    pair.back();
    assert_ended(&pair.a.wait(left.write), OVERTAKEN, "the write");
    pair.a.wait(left.read).expect_good();
    assert_eq!(b.lun(0, 0).read16(0, 8), filled(2), "the lock");
    pair.assert_well();
}

/// The other one was there before the daemon died.
#[test]
fn a_write_is_not_done_again_over_what_another_has_written_before_the_end() {
    for first in [true, false] {
        let mut pair = Pair::new(&format!("fault=flush:{FOR_EVER}*1"));
        let b = pair.b();
        if !first {
            b.lun(0, 0).write16(1024, &filled(9));
        }
        let left = pair.leave();
        assert_eq!(b.lun(0, 0).read16(0, 8), filled(1));
        b.lun(0, 0).write16(0, &filled(2));
        b.hang_up();
        pair.crash("");
        pair.back();
        assert_ended(&pair.a.wait(left.write), OVERTAKEN, "the write");
        pair.a.wait(left.read).expect_good();
        assert_eq!(pair.first_block(), 2);
        pair.assert_well();
    }
}

/// A second daemon has died before the guest was served.
#[test]
fn what_another_did_is_known_to_the_daemon_after_the_next() {
    for (reset, place, before) in [
        (true, Where::Told, true),
        (false, Where::Told, true),
        (false, Where::AwayAgain, true),
        (false, Where::Told, false),
    ] {
        let mut pair = Pair::new(&format!("fault=flush:{FOR_EVER}"));
        let left = pair.leave();
        pair.crash("");
        let b = pair.b();
        if before {
            pair.go(place);
        }
        let lun = b.lun(0, 0);
        match reset {
            true => {
                let code = b.tmf(Tmf::LogicalUnitReset, lun.address, 0);
                assert_eq!(code, response::FUNCTION_COMPLETE);
            }
            false => takes_the_lock(&lun),
        }
        if !before {
            pair.go(place);
        }
        b.hang_up();
        let found = pair.first_block();
        host_write(&pair.scratch.join("0.img"), 0, &[found + 4]);
        pair.crash("");
        pair.back();
        assert_ended(&pair.a.wait(left.write), OVERTAKEN, "the write");
        pair.a.wait(left.read).expect_good();
        assert_eq!(pair.first_block(), found + 4);
        pair.assert_well();
    }
}

/// What another guest has not changed is as its own.
#[test]
fn a_write_is_done_again_where_nobody_else_has_written() {
    let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
    let b = pair.b();
    b.lun(0, 0).read16(0, 8);
    b.lun(0, 1).write16(0, &filled(2));
    let left = pair.leave();
    pair.crash("");
    let b = pair.b();
    b.lun(0, 0).read16(0, 8);
    b.lun(0, 1).write16(0, &filled(2));
    pair.back();
    pair.a.wait(left.write).expect_good();
    pair.a.wait(left.read).expect_good();
    assert_eq!(pair.first_block(), 1);
}

/// A guest that has been alone again for long enough is as one that always was: what it left when it was not has been
/// answered.
#[test]
fn what_another_did_is_forgotten_when_it_has_served() {
    let mut pair = Pair::new(&format!("fault=flush:{FOR_EVER}"));
    let left = pair.leave();
    pair.b().lun(0, 0).write16(1024, &filled(9));
    pair.crash(&format!("fault=write:{FOR_EVER}"));
    pair.back();
    assert_ended(&pair.a.wait(left.write), OVERTAKEN, "the write");
    pair.a.wait(left.read).expect_good();
    pair.a.lun(0, 0).clear_unit_attentions();
    let left = pair.leave();
    pair.crash("");
    pair.back();
    pair.a.wait(left.write).expect_good();
    pair.a.wait(left.read).expect_good();
}

/// A copy writes to another disk than the one that was asked.
#[test]
fn a_write_is_not_done_again_over_what_another_has_copied() {
    let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
    let left = pair.leave();
    pair.crash("");
    let b = pair.b();
    let (to, from) = (b.lun(0, 0), b.lun(0, 1));
    from.write16(0, &filled(2));
    let cscds = [lists::cscd(&to, 0), lists::cscd(&from, 0)];
    let segment = lists::blocks((1, 0), (0, 0), 8, false);
    lists::xcopy_lid4(&from, &lists::list_lid4(9, false, &cscds, &[segment])).expect_good();
    pair.back();
    assert_ended(&pair.a.wait(left.write), OVERTAKEN, "the write");
    assert_eq!(to.read16(0, 8), filled(2));
}

/// While a write is done again, what it has done before may be seen; nobody changes the disk in between.
#[test]
fn others_wait_while_a_write_is_done_again() {
    let mut pair = Pair::new(&format!("fault=flush:{FOR_EVER}"));
    let left = pair.leave();
    pair.crash("fault=write:delay-ms-2000*1");
    pair.back();
    let b = pair.b();
    let lun = b.lun(0, 0);
    assert_eq!(lun.read16(0, 8), filled(1));
    // What changes no blocks need not wait.
    reserve_out(&lun, REGISTER, 0, 0, 0xb).expect_good();
    eventually("the other's write", || {
        let answer = lun.run_out(cdb::write16(0, 8), &filled(2));
        assert!(answer.is_good() || answer.status == status::BUSY, "{answer:?}");
        answer.is_good()
    });
    pair.a.wait(left.write).expect_good();
    pair.a.wait(left.read).expect_good();
    assert_eq!(lun.read16(0, 8), filled(2));
}

/// A function of the guest itself waits for rings that are starting, and ends what lies in them whatever becomes of the
/// connection.
#[test]
fn the_own_reset_outlasts_the_connection() {
    let mut pair = Pair::new(&format!("fault=write:{FOR_EVER}"));
    let left = pair.leave();
    pair.crash("");
    pair.a.reconnect_without_enabling(&pair.daemon);
    pair.a.enable_queue(CONTROL_QUEUE, true);
    let function = Tmf::ItNexusReset.exchange(pair.a.lun(0, 0).address, 0);
    let function = pair.a.queue(CONTROL_QUEUE).submit(&function);
    eventually("the function is taken", || {
        let queue = pair.a.queue(CONTROL_QUEUE);
        queue.ring().avail_event() == queue.ring().published()
    });
    // The front end takes the ring back; so the function is answered.
    pair.a.stop_queue(CONTROL_QUEUE);
    let done = pair.a.queue(CONTROL_QUEUE).try_take(function).expect("answered at the end");
    assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
    pair.a.hang_up();
    pair.back();
    assert_ended(&pair.a.wait(left.write), RESET, "the write");
    assert_ended(&pair.a.wait(left.read), RESET, "the read");
    assert_eq!(pair.first_block(), 0);
}
