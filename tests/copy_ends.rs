//! What ends a copy, and that it is over then: fences, resets, the end of its initiator, erasing a disk it has to do with.
//! Copies are made slow here (`fault=copy:delay`), so that each is met in the middle.

mod frontend;
mod mounts;

use std::path::{Path, PathBuf};
use std::time::Duration;

use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE};
use frontend::control::tmf_response;
use frontend::daemon::{Scratch, host_read};
use frontend::pattern::{self, assert_same};
use frontend::protocol::request;
use frontend::scsi::{key, response, sense};
use frontend::third_party::*;
use frontend::*;
use mounts::{Hang, Hanging, Kind, Mount};

/// How long each step of a slow copy takes.
const STEP: Duration = Duration::from_millis(100);
const SLOW: &str = "fault=copy:delay-ms-100";
/// Blocks of each of its steps.
const EACH: u16 = 128;
const STEPS: u64 = 60;
const SIZE: u64 = STEPS * EACH as u64 * 512;

/// The disks: what is copied, where to, and one that has nothing to do with it but may be asked.
const FROM: u16 = 0;
const TO: u16 = 1;
const OTHER: u16 = 2;

/// The list identifier of slow copies.
const ID: u32 = 0x51;

const NOT_REACHABLE: sense::Code = (key::COPY_ABORTED, 0x0d, 2);
const REVOKED: sense::Code = (5, 0x23, 6);
const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const READ_KEYS: [u8; 10] = [0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0];
const WRITE_EXCLUSIVE_REGISTRANTS_ONLY: u8 = 5;
const EXCLUSIVE_ACCESS: u8 = 3;

struct Rig {
    daemon: Daemon,
    scratch: Scratch,
}

impl Rig {
    fn new() -> Self {
        let scratch = Scratch::new();
        let daemon = Self::spawn(&scratch, &data(), |name| scratch.join(name));
        Rig { daemon, scratch }
    }

    fn spawn(scratch: &Scratch, data: &[u8], place: impl Fn(&str) -> PathBuf) -> Daemon {
        let from = place("from.img");
        std::fs::write(&from, data).unwrap();
        for name in ["to.img", "other.img"] {
            std::fs::File::create(place(name)).unwrap().set_len(SIZE).unwrap();
        }
        Daemon::builder(scratch)
            .disk(&from, "")
            .disk(&place("to.img"), SLOW)
            .disk(&place("other.img"), "")
            .ports(2)
            .spawn()
    }

    fn guest(&self, port: usize) -> FrontEnd {
        FrontEnd::builder().queues(2).connect_to(&self.daemon, port)
    }

    fn to(&self) -> PathBuf {
        self.scratch.join("to.img")
    }
}

fn data() -> Vec<u8> {
    pattern::blocks(0, (SIZE / 512) as usize, 512, 1)
}

/// How a slow copy is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// EXTENDED COPY with IMMED, of this disk's copy manager.
    Background(u16),
    /// EXTENDED COPY that is answered when it is done.
    Foreground(u16),
    /// WRITE USING TOKEN with IMMED.
    Token,
}

/// A copy that is under way: who asked for it, of which disk, and the command if that is not answered.
struct Slow<'a> {
    asked: Lun<'a>,
    ticket: Option<Ticket>,
}

impl<'a> Slow<'a> {
    /// Begins one, and waits until some of it is done.
    #[track_caller]
    fn begin(fe: &'a FrontEnd, way: Way) -> Self {
        let asked = match way {
            Way::Background(disk) | Way::Foreground(disk) => fe.ready_lun(0, disk),
            Way::Token => fe.ready_lun(0, TO),
        };
        let slow = Self::ask(fe, asked, way);
        eventually("some of it is copied", || slow.status().is_some_and(|(_, bytes)| bytes > 0));
        slow
    }

    /// Asks for one.
    #[track_caller]
    fn ask(fe: &'a FrontEnd, asked: Lun<'a>, way: Way) -> Self {
        let (from, to) = (fe.ready_lun(0, FROM), fe.ready_lun(0, TO));
        let (cdb, list) = match way {
            Way::Token => {
                let all = (SIZE / 512) as u32;
                let (cdb, list) = populate_request(7, 600, Some(BY_REFERENCE), &[(0, all)]);
                from.run_out(cdb, &list).expect_good();
                let token = token_information(&from, 7).2[2..].to_vec();
                let ranges: Vec<(u64, u32)> =
                    (0..STEPS).map(|n| (n * u64::from(EACH), EACH.into())).collect();
                write_token_request(ID, &token, 1, 0, &ranges)
            }
            Way::Background(_) | Way::Foreground(_) => {
                let cscds = [cscd(&from, 0), cscd(&to, 0)];
                let step = |n: u64| n * u64::from(EACH);
                let segments: Vec<Vec<u8>> =
                    (0..STEPS).map(|n| blocks((0, step(n)), (1, step(n)), EACH, false)).collect();
                let list = list_lid4(ID, matches!(way, Way::Background(_)), &cscds, &segments);
                (cdb::extended_copy_lid4(list.len() as u32), list)
            }
        };
        let ticket = asked.submit(&asked.request(cdb).data_out(list));
        let ticket = match way {
            Way::Foreground(_) => Some(ticket),
            Way::Background(_) | Way::Token => {
                fe.wait(ticket).expect_good();
                None
            }
        };
        Slow { asked, ticket }
    }

    #[track_caller]
    fn status(&self) -> Option<(u8, u64)> {
        status_of(&self.asked.on_queue(FIRST_REQUEST_QUEUE + 1), ID)
    }

    /// The sense data that is told of it after it has failed.
    #[track_caller]
    fn failure(&self) -> sense::Code {
        let told = self.asked.run_in(cdb::receive_copy_lid4(5, ID, 256), 256).expect_good();
        let data = told.data();
        assert_eq!(data[5], copy_status::FAILED, "{data:02x?}");
        (data[34] & 0xf, data[44], data[45])
    }
}

/// Demands that a copy to an image is over in its middle: not all of it was copied, and nothing more is.
#[track_caller]
fn assert_over(image: &Path, what: &str) {
    let before = host_read(image, 0, SIZE as usize);
    assert!(before[SIZE as usize - 512..] == [0; 512], "{what}: all of it was copied");
    assert_stays(image, &before, what);
}

#[track_caller]
fn assert_stays(image: &Path, before: &[u8], what: &str) {
    std::thread::sleep(STEP * 8);
    assert_same(&host_read(image, 0, SIZE as usize), before, what);
}

fn reserve_out(lun: &Lun<'_>, action: u8, kind: u8, key: u64, other: u64) -> ScsiResponse {
    let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
    list.resize(24, 0);
    lun.run_out(cdb::persistent_reserve_out(action, kind, 24), &list)
}

// ----- fences ---------------------------------------------------------------------------------

/// The new owner of a disk writes to it as soon as PREEMPT AND ABORT is answered, and nobody overwrites that.
#[test]
fn preempt_and_abort_ends_copies_wherever_they_were_asked_for() {
    let ways = [
        Way::Background(TO),
        Way::Background(FROM),
        Way::Background(OTHER),
        Way::Foreground(FROM),
        Way::Foreground(TO),
        Way::Token,
    ];
    for way in ways {
        let rig = Rig::new();
        let (a, b) = (rig.guest(0), rig.guest(1));
        let (la, lb) = (a.ready_lun(0, TO), b.ready_lun(0, TO));
        reserve_out(&la, REGISTER, 0, 0, 0xa).expect_good();
        reserve_out(&lb, REGISTER, 0, 0, 0xb).expect_good();
        reserve_out(&la, RESERVE, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xa, 0).expect_good();
        let slow = Slow::begin(&a, way);
        let kind = WRITE_EXCLUSIVE_REGISTRANTS_ONLY;
        reserve_out(&lb, PREEMPT_AND_ABORT, kind, 0xb, 0xa).expect_good();
        let new = pattern::blocks(0, (SIZE / 512) as usize, 512, 2);
        for (n, piece) in new.chunks(MIB as usize).enumerate() {
            lb.write16(n as u64 * 2048, piece);
        }
        lb.synchronize_cache();
        assert_stays(&rig.to(), &new, &format!("{way:?}: what the new owner wrote"));
        if let (Some(ticket), Way::Foreground(FROM)) = (slow.ticket, way) {
            // It was not sent to the disk that was preempted.
            let answer = a.wait(ticket);
            assert_eq!(answer.sense_code().map(|code| code.0), Some(key::COPY_ABORTED));
        }
    }
}

#[test]
fn preempt_and_abort_leaves_copies_alone_that_do_not_concern_the_disk() {
    let rig = Rig::new();
    let (a, b) = (rig.guest(0), rig.guest(1));
    let (la, lb) = (a.ready_lun(0, OTHER), b.ready_lun(0, OTHER));
    reserve_out(&la, REGISTER, 0, 0, 0xa).expect_good();
    reserve_out(&lb, REGISTER, 0, 0, 0xb).expect_good();
    let slow = Slow::begin(&a, Way::Background(FROM));
    let kind = WRITE_EXCLUSIVE_REGISTRANTS_ONLY;
    reserve_out(&lb, PREEMPT_AND_ABORT, kind, 0xb, 0xa).expect_good();
    eventually("it ends well", || slow.status().is_none_or(|(status, _)| status < 0x10));
    assert_same(&host_read(&rig.to(), 0, SIZE as usize), &data(), "the copy");
}

/// A reservation is looked at before each step, at both ends; so is whether a disk is started.
#[test]
fn a_copy_ends_when_a_disk_does_not_let_it_in_any_more() {
    for (held, kind) in [
        (TO, Some(WRITE_EXCLUSIVE_REGISTRANTS_ONLY)),
        (TO, Some(EXCLUSIVE_ACCESS)),
        (FROM, Some(EXCLUSIVE_ACCESS)),
        (TO, None),
        (FROM, None),
    ] {
        for way in [Way::Background(OTHER), Way::Foreground(OTHER)] {
            let rig = Rig::new();
            let (a, b) = (rig.guest(0), rig.guest(1));
            let taken = b.ready_lun(0, held);
            let slow = Slow::begin(&a, way);
            match kind {
                Some(kind) => {
                    reserve_out(&taken, REGISTER, 0, 0, 0xb).expect_good();
                    reserve_out(&taken, RESERVE, kind, 0xb, 0).expect_good();
                }
                None => drop(taken.run(cdb::start_stop_unit(0)).expect_good()),
            }
            let what = format!("{way:?}, {kind:?} of {held}");
            match slow.ticket {
                Some(ticket) => {
                    let answer = a.wait(ticket);
                    let found = answer.expect_sense(NOT_REACHABLE);
                    // The segment, and what is missing of it.
                    let segment = u32::from_be_bytes(found.raw[8..12].try_into().unwrap());
                    assert!((1..STEPS as u32).contains(&segment), "{what}: {segment}");
                    assert_eq!(found.information, Some(EACH.into()), "{what}");
                }
                None => {
                    eventually("it ends", || slow.status().is_none_or(|(status, _)| status < 0x10));
                    assert_eq!(slow.failure(), NOT_REACHABLE, "{what}");
                }
            }
            assert_over(&rig.to(), &what);
        }
    }
}

// ----- task management ------------------------------------------------------------------------

/// Every copy that has to do with a disk is over when its reset is answered, whoever asked for it and where.
#[test]
fn a_reset_ends_the_copies_that_concern_the_disk() {
    for way in [Way::Background(OTHER), Way::Foreground(OTHER), Way::Token] {
        for disk in [FROM, TO, OTHER] {
            if (way, disk) == (Way::Token, OTHER) {
                continue;
            }
            let rig = Rig::new();
            let (a, b) = (rig.guest(0), rig.guest(1));
            let slow = Slow::begin(&a, way);
            let lun = b.ready_lun(0, disk);
            let what = format!("{way:?}, reset of {disk}");
            assert_eq!(b.tmf(Tmf::LogicalUnitReset, lun.address, 0), response::OK, "{what}");
            assert_over(&rig.to(), &what);
            if let Some(ticket) = slow.ticket {
                let answer = a.wait(ticket);
                match disk {
                    OTHER => assert_eq!(answer.response, response::RESET, "{what}"),
                    _ => drop(answer.expect_sense((key::COPY_ABORTED, 0, 6))),
                }
            }
        }
    }
}

/// I_T NEXUS RESET ends what this initiator has started, and forgets it; not what another has.
#[test]
fn a_nexus_reset_ends_its_own_copies() {
    for way in [Way::Background(FROM), Way::Foreground(FROM), Way::Token] {
        let rig = Rig::new();
        let (a, b) = (rig.guest(0), rig.guest(1));
        let slow = Slow::begin(&a, way);
        let (cdb, list) = populate_request(9, 600, None, &[(0, 8)]);
        a.lun(0, OTHER).clear_unit_attentions();
        a.lun(0, OTHER).run_out(cdb, &list).expect_good();
        let token = token_information(&a.lun(0, OTHER), 9).2[2..].to_vec();
        let other = b.ready_lun(0, TO);
        assert_eq!(b.tmf(Tmf::ItNexusReset, other.address, 0), response::OK);
        let before = slow.status().expect("it goes on").1;
        eventually("it goes on", || slow.status().is_some_and(|(_, bytes)| bytes > before));
        write_token(&b.ready_lun(0, OTHER), 9, &token, 0, 0, &[(100, 8)]).expect_good();
        assert_eq!(a.tmf(Tmf::ItNexusReset, slow.asked.address, 0), response::OK);
        assert_over(&rig.to(), &format!("{way:?}"));
        slow.asked.clear_unit_attentions();
        assert_eq!(slow.status(), None);
        // Its tokens, whoever has them.
        write_token(&b.lun(0, OTHER), 9, &token, 0, 0, &[(100, 8)]).expect_sense(REVOKED);
    }
}

/// I_T NEXUS RESET is about the disks of one target: what was asked of others goes on, to which disks ever.
#[test]
fn a_nexus_reset_ends_what_was_asked_of_its_target() {
    let scratch = Scratch::new();
    let place = |name: &str| scratch.join(name);
    std::fs::write(place("from.img"), data()).unwrap();
    for name in ["to.img", "other.img"] {
        std::fs::File::create(place(name)).unwrap().set_len(SIZE).unwrap();
    }
    let daemon = Daemon::builder(&scratch)
        .disk(&place("from.img"), "")
        .disk(&place("to.img"), SLOW)
        .disk(&place("other.img"), "target=1,lun=0")
        .spawn();
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    let asked = fe.ready_lun(1, 0);
    let slow = Slow::ask(&fe, asked.clone(), Way::Background(OTHER));
    let goes_on = || {
        let before = slow.status().expect("it goes on").1;
        eventually("it goes on", || slow.status().is_some_and(|(_, bytes)| bytes > before));
    };
    goes_on();
    assert_eq!(fe.tmf(Tmf::ItNexusReset, fe.lun(0, TO).address, 0), response::OK);
    goes_on();
    assert_eq!(fe.tmf(Tmf::ItNexusReset, asked.address, 0), response::OK);
    assert_over(&place("to.img"), "the target that was asked");
}

/// A copy whose command has been answered is in no task set: functions about tasks leave it alone. One whose command is under
/// way ends with that.
#[test]
fn functions_about_tasks_end_copies_whose_commands_are_under_way() {
    for function in [Tmf::AbortTaskSet, Tmf::ClearTaskSet] {
        let rig = Rig::new();
        let a = rig.guest(0);
        let slow = Slow::begin(&a, Way::Foreground(FROM));
        assert_eq!(a.tmf(function, slow.asked.address, 0), response::OK);
        assert_over(&rig.to(), &format!("{function:?}"));
        assert_eq!(a.wait(slow.ticket.unwrap()).response, response::ABORTED);
        assert_eq!(slow.status().map(|(status, _)| status), Some(copy_status::TERMINATED));
        let slow = Slow::begin(&a, Way::Background(FROM));
        assert_eq!(a.tmf(function, slow.asked.address, 0), response::OK);
        let (status, before) = slow.status().expect("it goes on");
        assert_eq!(status, copy_status::BACKGROUND);
        eventually("it goes on", || slow.status().is_some_and(|(_, bytes)| bytes > before));
        slow.asked.run(copy_operation_abort()).expect_good();
        assert_over(&rig.to(), "COPY OPERATION ABORT");
    }
}

/// COPY OPERATION ABORT.
fn copy_operation_abort() -> Cdb {
    Cdb::from_slice(&[0x83, 0x1c, 0, 0, 0, ID as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
}

/// More of them at a time than a disk has threads.
const MANY: usize = 40;

/// Demands that the disk that is copied from answers what takes a thread of it, while commands that have to wait for the
/// other disk's host do so; that one of those can be aborted; and that they are GOOD when that host goes on.
#[track_caller]
fn assert_in_nobodys_way(
    fe: &FrontEnd,
    waiting: Vec<Ticket>,
    other: &FrontEnd,
    go_on: impl FnOnce(),
) {
    let healthy = other.ready_lun(0, FROM);
    let stable = healthy.request(cdb::write10(0, 8).or(1, 8)).data_out(vec![1; 4096]);
    healthy.execute(&stable).expect_good();
    healthy.synchronize_cache();
    let (mut waiting, address) = (waiting, fe.lun(0, FROM).address);
    assert_eq!(fe.tmf(Tmf::AbortTask, address, MANY as u64), response::OK);
    assert_eq!(fe.wait(waiting.pop().unwrap()).response, response::ABORTED);
    for ticket in &waiting {
        assert!(!fe.queue(FIRST_REQUEST_QUEUE + 1).peek(*ticket), "what it waits for goes on");
    }
    go_on();
    waiting.into_iter().for_each(|ticket| drop(fe.wait(ticket).expect_good()));
}

/// A copy from a healthy disk to one whose host hangs.
fn with_a_copy_that_hangs(test: impl FnOnce(&FrontEnd, &FrontEnd, Box<dyn FnOnce() + '_>)) {
    let Some(host) = Hanging::new(Hang::Frozen(Kind::Ext4)) else { return };
    let scratch = Scratch::new();
    let place = |name: &str| match name {
        "to.img" => host.path().join(name),
        _ => scratch.join(name),
    };
    let daemon = Rig::spawn(&scratch, &data(), place);
    let rig = Rig { daemon, scratch: scratch.clone() };
    let (a, b) = (rig.guest(0), rig.guest(1));
    let _slow = Slow::begin(&a, Way::Background(FROM));
    let hung = host.hang();
    eventually("it hangs", || {
        rig.daemon.diagnosis().thread_states().iter().any(|t| t.contains("percpu_rwsem_wait"))
    });
    test(&a, &b, Box::new(move || drop(hung)));
    assert_over(&host.path().join("to.img"), "after the thaw");
}

/// Who wants a copy to end waits for the hosts of both its disks, and takes nothing of either disk while he does.
#[test]
fn those_who_abort_a_copy_that_hangs_take_no_thread() {
    with_a_copy_that_hangs(|a, b, go_on| {
        let asked = a.ready_lun(0, FROM).on_queue(FIRST_REQUEST_QUEUE + 1);
        let abort = |n: usize| asked.submit(&asked.request(copy_operation_abort()).tag(n as u64));
        assert_in_nobodys_way(a, (1..=MANY).map(abort).collect(), b, go_on);
    });
}

/// The same for PREEMPT AND ABORT, whether or not its change has to be noted.
#[test]
fn those_who_preempt_one_whose_copy_hangs_take_no_thread() {
    for survives in [false, true] {
        with_a_copy_that_hangs(|a, b, go_on| {
            let kind = WRITE_EXCLUSIVE_REGISTRANTS_ONLY;
            let (la, lb) = (a.ready_lun(0, FROM), b.ready_lun(0, FROM));
            let mut list = [0; 24];
            (list[15], list[20]) = (0xb, survives.into());
            lb.run_out(cdb::persistent_reserve_out(REGISTER_AND_IGNORE, 0, 24), &list)
                .expect_good();
            list[15] = 0xa;
            let preempt = lb.on_queue(FIRST_REQUEST_QUEUE + 1);
            let round = |n: usize| {
                // After it has been told so, and unless the fence takes this with it.
                let register = cdb::persistent_reserve_out(REGISTER_AND_IGNORE, 0, 24);
                eventually("it comes again", || la.run_out(register, &list).is_good());
                let keys = [0xb_u64.to_be_bytes(), 0xa_u64.to_be_bytes(), [0; 8]].concat();
                let cdb = cdb::persistent_reserve_out(PREEMPT_AND_ABORT, kind, 24);
                let ticket = preempt.submit(&preempt.request(cdb).data_out(keys).tag(n as u64));
                eventually("it is preempted", || {
                    let told = lb.run_in(Cdb::from_slice(&READ_KEYS), 64).expect_good();
                    told.data()[7] == 8
                });
                ticket
            };
            assert_in_nobodys_way(b, (1..=MANY).map(round).collect(), b, go_on);
        });
    }
}

/// A host that hangs at one end of a copy holds up what is about that disk, and nothing else.
#[test]
fn functions_of_other_disks_do_not_wait_for_a_copy_that_hangs() {
    let Some(host) = Hanging::new(Hang::Frozen(Kind::Ext4)) else { return };
    let scratch = Scratch::new();
    let place = |name: &str| match name {
        "to.img" => host.path().join(name),
        _ => scratch.join(name),
    };
    let daemon = Rig::spawn(&scratch, &data(), place);
    let rig = Rig { daemon, scratch: scratch.clone() };
    let (a, b) = (rig.guest(0), rig.guest(1));
    let (la, lb) = (a.ready_lun(0, OTHER), b.ready_lun(0, OTHER));
    reserve_out(&la, REGISTER, 0, 0, 0xa).expect_good();
    reserve_out(&lb, REGISTER, 0, 0, 0xb).expect_good();
    let slow = Slow::begin(&a, Way::Background(FROM));
    let hung = host.hang();
    eventually("it hangs", || {
        rig.daemon.diagnosis().thread_states().iter().any(|t| t.contains("percpu_rwsem_wait"))
    });
    assert_eq!(b.tmf(Tmf::LogicalUnitReset, lb.address, 0), response::OK);
    lb.clear_unit_attentions();
    let kind = WRITE_EXCLUSIVE_REGISTRANTS_ONLY;
    reserve_out(&lb, PREEMPT_AND_ABORT, kind, 0xb, 0xa).expect_good();
    assert_eq!(b.tmf(Tmf::ItNexusReset, lb.address, 0), response::OK);
    // What is about one of its disks waits.
    let ticket = {
        let exchange = Tmf::LogicalUnitReset.exchange(slow.asked.address, 0);
        a.queue(CONTROL_QUEUE).submit(&exchange)
    };
    std::thread::sleep(A_MOMENT);
    assert!(!a.queue(CONTROL_QUEUE).peek(ticket), "it may still write");
    drop(hung);
    assert_eq!(tmf_response(&a.queue(CONTROL_QUEUE).wait(ticket)), response::OK);
    assert_over(&host.path().join("to.img"), "after the thaw");
}

// ----- the end of the initiator ---------------------------------------------------------------

/// How an initiator ends, or starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// RESET_DEVICE, with the rings running.
    Reset,
    /// GET_VRING_BASE of every ring: it is paused, or has migrated, or is reset by a front end without RESET_DEVICE.
    Stop,
    /// The front end is gone, and the next one is there.
    Disconnect,
}

#[test]
fn nothing_that_an_initiator_has_started_outlives_it() {
    for end in [End::Reset, End::Stop, End::Disconnect] {
        for way in [Way::Background(FROM), Way::Background(TO), Way::Token] {
            let rig = Rig::new();
            let (mut a, b) = (rig.guest(0), rig.guest(1));
            let token = {
                let (cdb, list) = populate_request(9, 600, None, &[(0, 8)]);
                let lun = a.ready_lun(0, OTHER);
                lun.run_out(cdb, &list).expect_good();
                let token = token_information(&lun, 9).2[2..].to_vec();
                let asked = Slow::begin(&a, way).asked.address;
                let what = format!("{end:?}, {way:?}");
                match end {
                    End::Reset => a.set(request::RESET_DEVICE, &[], &[], true),
                    End::Stop => {
                        // As long as there is one ring for requests, it is there.
                        for queue in [1, FIRST_REQUEST_QUEUE + 1] {
                            a.stop_queue(queue);
                        }
                        let lun = Lun::new(&a, asked);
                        let before = status_of(&lun, ID).expect("it goes on").1;
                        eventually("it goes on", || {
                            status_of(&lun, ID).is_some_and(|(_, bytes)| bytes > before)
                        });
                        a.stop_queue(FIRST_REQUEST_QUEUE);
                    }
                    End::Disconnect => {}
                }
                if end == End::Disconnect {
                    drop(a);
                    a = rig.guest(0);
                    assert_over(&rig.to(), &what);
                    a.lun(0, FROM).clear_unit_attentions();
                    a.lun(0, TO).clear_unit_attentions();
                } else {
                    assert_over(&rig.to(), &what);
                    if end == End::Reset {
                        a.reset_queues();
                    }
                    a.start();
                }
                let lun = Lun::new(&a, asked);
                lun.clear_unit_attentions();
                assert_eq!(status_of(&lun, ID), None, "{what}: it is known");
                token
            };
            let lun = b.ready_lun(0, OTHER);
            write_token(&lun, 9, &token, 0, 0, &[(100, 8)]).expect_sense(REVOKED);
        }
    }
}

/// The daemon's end does not wait for copies to be done.
#[test]
fn the_end_of_the_daemon_ends_copies() {
    for way in [Way::Background(FROM), Way::Foreground(FROM), Way::Token] {
        let mut rig = Rig::new();
        let a = rig.guest(0);
        drop(Slow::begin(&a, way));
        assert_eq!(rig.daemon.terminate().code(), Some(0), "{way:?}");
        assert_over(&rig.to(), &format!("{way:?}"));
    }
}

// ----- erasing a disk -------------------------------------------------------------------------

const SANITIZE_IN_PROGRESS: sense::Code = (2, 4, 0x1b);
const FORMAT_IN_PROGRESS: sense::Code = (2, 4, 4);

/// The ways to erase a disk, each waiting for its end.
fn erasing() -> [(&'static str, Cdb, Vec<u8>, sense::Code); 3] {
    [
        ("BLOCK ERASE", cdb::sanitize(0x02, 0), vec![], SANITIZE_IN_PROGRESS),
        ("OVERWRITE", cdb::sanitize(0x01, 5), vec![1, 0, 0, 1, 0], SANITIZE_IN_PROGRESS),
        ("FORMAT UNIT", cdb::format_unit(0), vec![], FORMAT_IN_PROGRESS),
    ]
}

/// What was there before an erase is not brought back by a token of it, point in time or not.
#[test]
fn tokens_of_a_disk_end_when_it_is_erased() {
    for kind in [Kind::Xfs, Kind::Btrfs, Kind::Ext4] {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let paths = ["secret.img", "other.img"].map(|name| mount.path().join(name));
        for path in &paths {
            std::fs::File::create(path).unwrap().set_len(SIZE).unwrap();
        }
        let daemon =
            Daemon::builder(&scratch).disk(&paths[0], "").disk(&paths[1], "").ports(2).spawn();
        let fe = FrontEnd::connect(&daemon);
        let (lun, other) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let kept = if kind == Kind::Ext4 { BY_REFERENCE } else { POINT_IN_TIME };
        for (what, cdb, list, _) in erasing() {
            lun.write16(0, &[7; 4096]);
            let token = populate(&lun, 1, 600, &[(0, 8)]).0;
            assert_eq!(token[..4], kept.to_be_bytes());
            lun.run_out(cdb, &list).expect_good();
            write_token(&other, 2, &token, 0, 0, &[(0, 8)]).expect_sense(REVOKED);
            assert_same(&other.read16(0, 8), &[0; 4096], what);
            eventually("what it kept is let go of", || mount.unnamed(&daemon.fds()) == 0);
        }
    }
}

/// A copy from a disk that is erased, and one to it, are over before the first block of it is erased.
#[test]
fn copies_end_before_a_disk_is_erased() {
    for disk in [FROM, TO] {
        for way in [Way::Background(OTHER), Way::Foreground(OTHER), Way::Token] {
            for (what, cdb, list, _) in erasing() {
                let rig = Rig::new();
                let (a, b) = (rig.guest(0), rig.guest(1));
                let slow = Slow::begin(&a, way);
                b.ready_lun(0, disk).run_out(cdb, &list).expect_good();
                let what = format!("{what} of {disk}, {way:?}");
                match disk {
                    TO => assert_stays(&rig.to(), &vec![0; SIZE as usize], &what),
                    _ => assert_over(&rig.to(), &what),
                }
                match slow.ticket {
                    Some(ticket) => {
                        let code = a.wait(ticket).sense_code().expect("it failed");
                        assert_eq!(code.0, key::COPY_ABORTED, "{what}");
                    }
                    None => {
                        let (status, _) = slow.status().expect("it is known");
                        let ended = [copy_status::FAILED, copy_status::TERMINATED];
                        assert!(ended.contains(&status), "{what}: {status:02x}");
                    }
                }
            }
        }
    }
}

/// Writes that are under way or wait for a thread when a disk is erased do not come after that. What has not begun is
/// answered as a write that comes now.
#[test]
fn writes_under_way_end_before_a_disk_is_erased() {
    for (what, cdb, list, refused) in erasing() {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", MIB);
        let builder = Daemon::builder(&scratch).disk(&image, "fault=write:delay-ms-1000");
        let daemon = builder.ports(2).spawn();
        let (a, b) = (FrontEnd::connect(&daemon), FrontEnd::builder().connect_to(&daemon, 1));
        let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        let mut writes = Vec::new();
        let mut write = |n: u64| {
            let (fe, lun) = if n.is_multiple_of(2) { (&a, &la) } else { (&b, &lb) };
            let request = lun.request(cdb::write16(n * 8, 8)).data_out(vec![9; 4096]);
            writes.push((fe, lun.submit(&request)));
        };
        // Twice as many as there are threads before the erase gets one, and more behind it.
        (0..32).for_each(&mut write);
        let erase = lb.submit(&lb.request(cdb).data_out(list));
        (32..64).for_each(&mut write);
        let answer = b.wait(erase);
        let mut refusals = 0;
        for (fe, ticket) in writes {
            let answer = fe.wait(ticket);
            if !answer.is_good() {
                answer.expect_sense(refused);
                refusals += 1;
            }
        }
        answer.expect_good();
        assert!((1..64).contains(&refusals), "{what}: {refusals} of 64 writes were refused");
        assert_same(&host_read(&image, 0, MIB as usize), &vec![0; MIB as usize], what);
    }
}
