//! A disk goes from one daemon to another, as a migration has it: both have the image open, and it is whose rings run.
//! What goes on in the background, and what is remembered, goes with it.

mod frontend;
mod mounts;

use std::path::{Path, PathBuf};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::{Scratch, host_read};
use frontend::pattern::assert_same;
use frontend::scsi::{sense, status};
use frontend::*;
use mounts::{Hang, Hanging, LoopDevice};

const FORMAT_IN_PROGRESS: sense::Code = (2, 4, 4);
const SANITIZE_IN_PROGRESS: sense::Code = (2, 4, 0x1b);

const IMMED: u8 = 0x80;
const OVERWRITE: u8 = 0x01;
/// Of its parameter list.
const INVERT: u8 = 0x80;

const SIZE: u64 = 16 * MIB;

/// What slows an operation down: a piece of it is written at a time, and each takes so long.
const SLOW: &str = "fault=write:delay-ms-100";

/// An image, the daemon that a guest comes from (by two sockets), and the one that it goes to.
struct Hosts {
    scratch: Scratch,
    disk: PathBuf,
}

impl Hosts {
    fn new() -> Self {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", SIZE);
        Hosts { scratch, disk }
    }

    fn source(&self, options: &str) -> Daemon {
        Daemon::builder(&self.scratch).disk(&self.disk, options).ports(2).spawn()
    }

    fn destination(&self, options: &str) -> Daemon {
        let options = format!("locking=off{options}");
        let socket = self.scratch.join("destination.sock");
        Daemon::builder(&self.scratch).socket(socket).disk(&self.disk, &options).spawn()
    }

    fn noted(&self) -> Option<String> {
        let file = format!("{}.thinlun", self.disk.display());
        std::fs::read_to_string(file).ok()
    }

    #[track_caller]
    fn assert_filled(&self, from: u64, byte: u8) {
        let len = (SIZE - from) as usize;
        assert_same(&host_read(&self.disk, from, len), &vec![byte; len], "the image");
    }

    /// Nothing writes to the image.
    #[track_caller]
    fn assert_still(&self) {
        let now = || host_read(&self.disk, 0, SIZE as usize);
        let before = now();
        std::thread::sleep(3 * A_MOMENT);
        assert_same(&now(), &before, "the image of one whose rings have stopped");
    }
}

/// SANITIZE OVERWRITE with a byte, in the background.
fn overwrite(lun: &Lun<'_>, passes: u8, byte: u8) {
    lun.run_out(cdb::sanitize(IMMED | OVERWRITE, 5), &[passes, 0, 0, 1, byte]).expect_good();
}

/// REQUEST SENSE: how far an operation is.
fn progress(lun: &Lun<'_>) -> Option<u16> {
    let answer = lun.run_in(cdb::request_sense(false, 18), 18).expect_good();
    let sense = frontend::scsi::Sense::parse(answer.data()).unwrap();
    sense.specific.map(|[_, high, low]| u16::from_be_bytes([high, low]))
}

#[track_caller]
fn wait_for_progress(lun: &Lun<'_>, most: u16) -> u16 {
    eventually("an operation makes progress", || progress(lun).is_some_and(|done| done > most));
    progress(lun).unwrap_or(u16::MAX)
}

fn take_attentions(lun: &Lun<'_>) {
    while lun.run(cdb::test_unit_ready()).sense_code().is_some_and(|(key, ..)| key == 6) {}
}

/// Waits until the disk is ready, which until then says nothing but this.
#[track_caller]
fn wait_until_ready(lun: &Lun<'_>, code: sense::Code) {
    take_attentions(lun);
    eventually("the disk is ready", || match lun.run(cdb::test_unit_ready()).sense_code() {
        None => true,
        found => {
            assert_eq!(found, Some(code));
            false
        }
    });
}

#[test]
fn an_operation_stops_with_the_rings_and_goes_on_where_the_guest_is() {
    let hosts = Hosts::new();
    let (source, destination) = (hosts.source(SLOW), hosts.destination(""));
    let fe = FrontEnd::builder().queues(2).connect(&source);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, 1, 0x5a);
    wait_for_progress(&lun, 0);
    let queues = FIRST_REQUEST_QUEUE + 2;
    for queue in 0..queues {
        fe.stop_queue(queue);
    }
    hosts.assert_still();
    let noted = hosts.noted().expect("what is to go on is noted");
    assert!(noted.contains("operation=running@0."), "how far it is, too: {noted}");
    assert!(source.log().contains("stops until commands can come"), "{}", source.log());
    // The destination was there before it began.
    let guest = FrontEnd::connect(&destination);
    let lun = guest.lun(0, 0);
    wait_until_ready(&lun, SANITIZE_IN_PROGRESS);
    assert!(destination.log().contains("goes on"), "{}", destination.log());
    hosts.assert_filled(0, 0x5a);
    assert_eq!(hosts.noted(), None);
    // What is written now stays, whatever becomes of the other.
    let lun = guest.ready_lun(0, 0);
    lun.write16(0, &[7; 4096]);
    lun.write16(SIZE / 512 - 8, &[7; 4096]);
    lun.synchronize_cache();
    hosts.assert_still();
    drop((fe, source));
    assert_eq!(lun.read16(0, 8), [7; 4096]);
    assert_eq!(lun.read16(SIZE / 512 - 8, 8), [7; 4096]);
    assert_eq!(hosts.noted(), None);
}

/// The end of the connection is the end of its rings; and the end of the daemon, however it comes.
#[test]
fn it_goes_on_where_the_guest_is_when_the_first_daemon_has_died() {
    for end in 0..4 {
        let hosts = Hosts::new();
        let (mut source, destination) = (hosts.source(SLOW), hosts.destination(""));
        let fe = FrontEnd::connect(&source);
        let lun = fe.ready_lun(0, 0);
        overwrite(&lun, 1, 0x5a);
        wait_for_progress(&lun, 0);
        match end {
            // Stopped first, or not.
            0 => {
                fe.stop();
                source.kill();
            }
            1 => source.kill(),
            2 => {
                fe.stop();
                assert!(source.terminate().success());
            }
            _ => assert!(source.terminate().success()),
        }
        let noted = hosts.noted().unwrap_or_default();
        assert_eq!(noted.contains("running@0."), end != 1, "{end}: {noted}");
        hosts.assert_still();
        let guest = FrontEnd::connect(&destination);
        wait_until_ready(&guest.lun(0, 0), SANITIZE_IN_PROGRESS);
        hosts.assert_filled(0, 0x5a);
        assert_eq!(hosts.noted(), None);
    }
}

/// It is begun by nobody who only waits for a guest.
#[test]
fn nothing_goes_on_before_a_guest_is_there() {
    let hosts = Hosts::new();
    let mut source = hosts.source(SLOW);
    {
        let fe = FrontEnd::connect(&source);
        let lun = fe.ready_lun(0, 0);
        overwrite(&lun, 1, 0x5a);
        wait_for_progress(&lun, 0);
        source.kill();
    }
    // Neither with locks nor without.
    let mut next = hosts.source("");
    hosts.assert_still();
    next.kill();
    let next = hosts.destination("");
    hosts.assert_still();
    // The socket alone is no guest, nor are queues that are not started.
    let stream = next.connect();
    hosts.assert_still();
    drop(stream);
    let fe = FrontEnd::connect(&next);
    wait_until_ready(&fe.lun(0, 0), SANITIZE_IN_PROGRESS);
    hosts.assert_filled(0, 0x5a);
}

/// What has ended is over for a daemon that has seen it begin.
#[test]
fn an_operation_that_has_ended_is_not_begun_again() {
    let hosts = Hosts::new();
    let source = hosts.source(SLOW);
    let fe = FrontEnd::connect(&source);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, 1, 0x5a);
    // It starts while the operation goes on, and would be slower.
    let destination = hosts.destination(",fault=write:delay-ms-200");
    assert!(hosts.noted().is_some_and(|noted| noted.contains("operation=running")));
    wait_until_ready(&lun, SANITIZE_IN_PROGRESS);
    let last = SIZE / 512 - 8;
    lun.write16(last, &[7; 4096]);
    fe.stop();
    hosts.assert_still();
    let guest = FrontEnd::connect(&destination);
    let lun = guest.ready_lun(0, 0);
    assert_eq!(lun.read16(last, 8), [7; 4096]);
    hosts.assert_still();
    assert_eq!(lun.read16(last, 8), [7; 4096]);
}

/// The mark in the first block is gone with the first of its passes; what dies between two of them has not ended.
#[test]
fn an_operation_that_dies_in_its_last_block_goes_on() {
    let hosts = Hosts::new();
    let mut source = hosts.source("fault=write:delay-ms-1000@0-512");
    let fe = FrontEnd::connect(&source);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, INVERT | 2, 0x5a);
    eventually("the first pass over the first block", || {
        host_read(&hosts.disk, 0, 512) == [!0x5a; 512]
    });
    source.kill();
    drop(fe);
    let next = hosts.source("");
    let fe = FrontEnd::connect(&next);
    wait_until_ready(&fe.lun(0, 0), SANITIZE_IN_PROGRESS);
    hosts.assert_filled(0, 0x5a);
    assert_eq!(hosts.noted(), None);
}

/// A guest that starts anew finds it further, not begun again.
#[test]
fn a_guest_that_reboots_finds_it_where_it_was() {
    for reset in [false, true] {
        let hosts = Hosts::new();
        let source = hosts.source(SLOW);
        let fe = FrontEnd::connect(&source);
        let lun = fe.ready_lun(0, 0);
        overwrite(&lun, 2, 0x5a);
        let before = wait_for_progress(&lun, 6000);
        match reset {
            true => fe.reset_device(),
            false => {
                fe.stop();
                fe.reset_queues();
            }
        }
        hosts.assert_still();
        fe.start();
        let lun = fe.lun(0, 0);
        take_attentions(&lun);
        let after = progress(&lun).unwrap_or(u16::MAX);
        assert!(after >= before, "from {before} back to {after} of 65536");
        wait_until_ready(&lun, SANITIZE_IN_PROGRESS);
        hosts.assert_filled(0, 0x5a);
        assert_eq!(hosts.noted(), None);
    }
}

/// Several initiators: it goes on as long as one of them is there, and stops with the last.
#[test]
fn it_stops_with_the_last_initiator() {
    let hosts = Hosts::new();
    let source = hosts.source(SLOW);
    let [a, b] = [0, 1].map(|port| FrontEnd::builder().connect_to(&source, port));
    let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    overwrite(&la, 4, 0x5a);
    let before = wait_for_progress(&la, 0);
    a.stop();
    wait_for_progress(&lb, before);
    // The other one's last ring but one.
    b.stop_queue(FIRST_REQUEST_QUEUE);
    b.stop_queue(0);
    let noted = hosts.noted().unwrap_or_default();
    assert!(noted.contains("running") && !noted.contains("running@"), "{noted}");
    b.stop_queue(1);
    let noted = hosts.noted().unwrap_or_default();
    assert!(noted.contains("running@"), "{noted}");
    hosts.assert_still();
    let destination = hosts.destination("");
    let guest = FrontEnd::connect(&destination);
    wait_until_ready(&guest.lun(0, 0), SANITIZE_IN_PROGRESS);
    hosts.assert_filled(0, 0x5a);
}

/// Rings that start while the last of another initiator stop.
#[test]
fn initiators_that_come_and_go_leave_one_operation() {
    let hosts = Hosts::new();
    let source = hosts.source("fault=write:delay-ms-20");
    let [a, b] = [0, 1].map(|port| FrontEnd::builder().connect_to(&source, port));
    let lun = a.ready_lun(0, 0);
    b.ready_lun(0, 0);
    overwrite(&lun, 8, 0x5a);
    for fe in [&a, &b] {
        fe.stop();
        fe.reset_queues();
    }
    std::thread::scope(|scope| {
        for fe in [&a, &b] {
            scope.spawn(move || {
                for _ in 0..20 {
                    fe.start();
                    fe.stop();
                    fe.reset_queues();
                }
            });
        }
    });
    hosts.assert_still();
    a.start();
    wait_until_ready(&a.lun(0, 0), SANITIZE_IN_PROGRESS);
    hosts.assert_filled(0, 0x5a);
    assert_eq!(hosts.noted(), None);
}

/// The contents of FORMAT UNIT, with all that they leave behind them: a thin disk is thin again.
#[test]
fn a_format_goes_on_too() {
    use std::os::unix::fs::MetadataExt;
    let hosts = Hosts::new();
    let (source, destination) = (hosts.source(SLOW), hosts.destination(""));
    let fe = FrontEnd::connect(&source);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &vec![3; MIB as usize]);
    let pattern = [0, 0x8a, 0, 0, 0, 1, 0, 1, 0xc3];
    lun.run_out(cdb::format_unit(0x10), &pattern).expect_good();
    wait_for_progress(&lun, 0);
    fe.stop();
    let guest = FrontEnd::connect(&destination);
    let lun = guest.lun(0, 0);
    wait_until_ready(&lun, FORMAT_IN_PROGRESS);
    hosts.assert_filled(0, 0xc3);
    lun.run(cdb::format_unit(0)).expect_good();
    hosts.assert_filled(0, 0);
    assert!(hosts.disk.metadata().unwrap().blocks() * 512 < 64 * KIB, "its space is given back");
}

fn reserve_out(lun: &Lun<'_>, action: u8, kind: u8, key: u64, other: u64) -> ScsiResponse {
    let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
    list.resize(24, 0);
    // APTPL.
    list[20] = 1;
    lun.run_out(Cdb::from_slice(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0]), &list)
}

fn keys(lun: &Lun<'_>) -> Vec<u8> {
    let data = lun.run_in(Cdb::from_slice(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0]), 256).expect_good();
    data.data()[8..].chunks(8).map(|key| key[7]).collect()
}

/// Registrations that are to survive, and what else is remembered, are those that the guest has left, there and back.
#[test]
fn what_is_remembered_goes_with_the_guest() {
    const EXCLUSIVE_ACCESS: u8 = 3;
    let hosts = Hosts::new();
    let (source, destination) = (hosts.source(""), hosts.destination(""));
    let fe = FrontEnd::connect(&source);
    let lun = fe.ready_lun(0, 0);
    // WCE off, saved; a name.
    let page = |lun: &Lun<'_>| {
        let sense = Cdb::from_slice(&[0x1a, 8, 8, 0, 64, 0]);
        lun.run_in(sense, 64).expect_good().data()[4 + 2] & 4
    };
    assert_eq!(page(&lun), 4);
    let mut list = vec![0; 4];
    list.extend([8, 18]);
    list.resize(24, 0);
    lun.run_out(Cdb::from_slice(&[0x15, 0x11, 0, 0, 24, 0]), &list).expect_good();
    lun.run_out(Cdb::new(0xa4).byte(1, 0x06).byte(9, 5), b"hello").expect_good();
    let name = |lun: &Lun<'_>| {
        let report = Cdb::new(0xa3).byte(1, 0x05).byte(9, 64);
        lun.run_in(report, 64).expect_good().data()[4..].to_vec()
    };
    reserve_out(&lun, 0, 0, 0, 0xa).expect_good();
    reserve_out(&lun, 1, EXCLUSIVE_ACCESS, 0xa, 0).expect_good();
    fe.stop();
    let guest = FrontEnd::connect(&destination);
    let there = guest.ready_lun(0, 0);
    assert_eq!((keys(&there), page(&there), name(&there)), (vec![0xa], 0, b"hello".to_vec()));
    there.write16(0, &[1; 512]);
    // What is noted there does not undo what was noted here.
    there.run_out(Cdb::new(0xa4).byte(1, 0x06).byte(9, 3), b"you").expect_good();
    reserve_out(&there, 0, 0, 0xa, 0xb).expect_good();
    guest.stop();
    fe.reset_queues();
    fe.start();
    let back = fe.lun(0, 0);
    take_attentions(&back);
    assert_eq!((keys(&back), page(&back), name(&back)), (vec![0xb], 0, b"you".to_vec()));
    assert_eq!(
        reserve_out(&back, 1, EXCLUSIVE_ACCESS, 0xa, 0).status,
        status::RESERVATION_CONFLICT
    );
    reserve_out(&back, 3, 0, 0xb, 0).expect_good();
    fe.stop();
    guest.reset_queues();
    guest.start();
    let there = guest.lun(0, 0);
    take_attentions(&there);
    assert!(keys(&there).is_empty());
}

/// What is not to survive a restart stays with the daemon, over restarts of the guest.
#[test]
fn registrations_of_a_guest_that_reboots_stay() {
    let hosts = Hosts::new();
    let source = hosts.source("");
    let [a, b] = [0, 1].map(|port| FrontEnd::builder().connect_to(&source, port));
    let la = a.ready_lun(0, 0);
    b.ready_lun(0, 0);
    let mut list = [0u64.to_be_bytes(), 5u64.to_be_bytes()].concat();
    list.resize(24, 0);
    la.run_out(Cdb::from_slice(&[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0]), &list).expect_good();
    for fe in [&a, &b] {
        fe.stop();
        fe.reset_queues();
    }
    b.start();
    let lb = b.lun(0, 0);
    take_attentions(&lb);
    assert_eq!(keys(&lb), [5]);
}

/// A write that was cut off where the guest came from is made whole before it reads here.
#[test]
fn a_write_that_was_cut_off_is_whole_where_the_guest_goes() {
    let hosts = Hosts::new();
    let destination = hosts.destination("");
    // The other daemon has died in the middle of it, after this one started.
    let journal = |offset: u64, data: &[u8]| {
        let mut bytes = b"thinlun: writing".to_vec();
        bytes.extend(offset.to_be_bytes());
        bytes.extend((data.len() as u64).to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let file = PathBuf::from(format!("{}.thinlun-write", hosts.disk.display()));
    std::fs::write(&file, journal(1024, &[9; 2048])).unwrap();
    frontend::daemon::host_write(&hosts.disk, 1024, &[9; 700]);
    hosts.assert_still();
    assert!(file.exists(), "who only waits for a guest leaves it to whom it may belong");
    let guest = FrontEnd::connect(&destination);
    let read = |fe: &FrontEnd| fe.ready_lun(0, 0).read16(1, 6);
    let whole = [vec![0; 512], vec![9; 2048], vec![0; 512]].concat();
    assert_same(&read(&guest), &whole, "all of it");
    assert!(!file.exists());
    // One that cannot be made whole keeps the disk from being used, until a person has looked, and others are not kept.
    guest.stop();
    guest.reset_queues();
    std::fs::write(&file, b"nothing that anybody knows").unwrap();
    guest.start();
    let lun = guest.lun(0, 0);
    take_attentions(&lun);
    lun.run_read(cdb::read16(0, 1), 1).expect_sense((2, 4, 3));
    lun.run(cdb::test_unit_ready()).expect_sense((2, 4, 3));
    lun.run(cdb::format_unit(0)).expect_sense((2, 4, 3));
    lun.inquiry();
    let log = destination.log();
    assert!(log.contains("disk.img") && log.contains("not a journal of thinlun"), "{log}");
    assert!(file.exists());
    guest.stop();
    guest.reset_queues();
    std::fs::remove_file(&file).unwrap();
    guest.start();
    take_attentions(&guest.lun(0, 0));
    assert_same(&read(&guest), &whole, "as it was");
}

/// What was begun and never had its name is removed when nobody else can be at it.
#[test]
fn what_another_daemon_is_writing_is_left_alone() {
    let hosts = Hosts::new();
    let left =
        |suffix: &str| PathBuf::from(format!("{}.thinlun{suffix}.new", hosts.disk.display()));
    let files: Vec<PathBuf> = ["", "-write"].map(left).into();
    let begun = [&b"thinlun: write 3"[..], &[7; 1 << 20]].concat();
    let write = || files.iter().for_each(|file| std::fs::write(file, &begun).unwrap());
    let there = || files.iter().filter(|file| file.exists()).count();
    write();
    let source = hosts.source("");
    assert_eq!(there(), 0, "with the image locked nobody else is at it");
    write();
    let destination = hosts.destination("");
    assert_eq!(there(), 2);
    drop(FrontEnd::connect(&destination));
    assert_eq!(there(), 0);
    drop(source);
    let listing = hosts.scratch.listing();
    let beside = |(name, _): &&(std::ffi::OsString, u64)| {
        Path::new(name).to_string_lossy().starts_with("disk.img.")
    };
    assert_eq!(listing.iter().find(beside), None);
}

/// A host that hangs while it is looked at keeps its own disk from being used, and neither other disks nor the next guest.
#[test]
fn a_host_that_hangs_keeps_nobody_else_waiting() {
    let Some(host) = Hanging::new(Hang::Fuse { writeback: false }) else { return };
    let Hanging::Fuse(fuse) = &host else { panic!("another host") };
    let scratch = Scratch::new();
    std::fs::write(fuse.behind().join("hangs.img"), vec![7; MIB as usize]).unwrap();
    let hangs = host.path().join("hangs.img");
    let healthy = scratch.image("disk.img", MIB);
    let daemon = Daemon::builder(&scratch).disk(&hangs, "").disk(&healthy, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    assert_eq!(fe.ready_lun(0, 0).read16(0, 1), [7; 512]);
    fe.ready_lun(0, 1).write16(0, &[1; 512]);
    fe.stop();
    fe.reset_queues();
    let hung = host.hang();
    fe.start();
    let works = |fe: &FrontEnd| {
        let lun = fe.lun(0, 1);
        take_attentions(&lun);
        assert_eq!(lun.run_in(cdb::read16(0, 1), 512).expect_good().data(), [1; 512]);
    };
    works(&fe);
    let lun = fe.lun(0, 0);
    lun.inquiry();
    take_attentions(&lun);
    assert_eq!(lun.run_in(cdb::read16(0, 1), 512).status, status::BUSY);
    assert_eq!(lun.run(cdb::format_unit(0)).status, status::BUSY);
    // Nor is told what was noted before.
    let mode_sense = Cdb::from_slice(&[0x1a, 8, 8, 0, 64, 0]);
    for cdb in [cdb::persistent_reserve_in(0, 64), mode_sense] {
        assert_eq!(lun.run_in(cdb, 64).status, status::BUSY);
    }
    // It goes, and the next one comes.
    drop(fe);
    let fe = FrontEnd::connect(&daemon);
    works(&fe);
    drop(hung);
    let lun = fe.lun(0, 0);
    take_attentions(&lun);
    eventually("the disk can be used", || lun.run(cdb::test_unit_ready()).is_good());
    assert_eq!(lun.run_in(cdb::read16(0, 1), 512).expect_good().data(), [7; 512]);
}

/// Nothing can be kept beside a block device, and where it is not locked another process may serve it next: what it could not
/// be told of is not begun in the background, and what stopped is not gone on with over what it has written.
#[test]
fn an_operation_that_cannot_be_noted_is_not_left_to_itself() {
    let Some(device) = LoopDevice::new(SIZE / MIB) else { return };
    let scratch = Scratch::new();
    let daemon = |name: &str, options: &str| {
        let socket = scratch.join(name);
        Daemon::builder(&scratch).socket(socket).disk(&device.device, options).spawn()
    };
    {
        // Alone with it: this process goes on.
        let source = daemon("alone.sock", SLOW);
        let fe = FrontEnd::connect(&source);
        overwrite(&fe.ready_lun(0, 0), 1, 0x5a);
        fe.stop();
        fe.start();
        wait_until_ready(&fe.lun(0, 0), SANITIZE_IN_PROGRESS);
        assert!(source.log().contains("goes on"), "{}", source.log());
    }
    let source = daemon("source.sock", &format!("locking=off,{SLOW}"));
    let fe = FrontEnd::connect(&source);
    let lun = fe.ready_lun(0, 0);
    let immediate = lun.run_out(cdb::sanitize(IMMED | OVERWRITE, 5), &[1, 0, 0, 1, 0xa5]);
    immediate.expect_sense((5, 0x24, 0));
    lun.run_out(cdb::format_unit(0x10), &[0, 2, 0, 0]).expect_sense((5, 0x26, 0));
    let request = lun.request(cdb::sanitize(OVERWRITE, 5)).data_out(vec![1, 0, 0, 1, 0xa5]);
    fe.submit(FIRST_REQUEST_QUEUE, &request);
    eventually("it has begun", || device_holds(&device.device, 0xa5));
    // Its guest dies, and comes back after it was at another host.
    drop(fe);
    let elsewhere = daemon("elsewhere.sock", "locking=off");
    let fe = FrontEnd::connect(&elsewhere);
    let lun = fe.ready_lun(0, 0);
    lun.write16(SIZE / 512 - 8, &[7; 4096]);
    lun.synchronize_cache();
    drop(fe);
    let fe = FrontEnd::connect(&source);
    let lun = fe.lun(0, 0);
    take_attentions(&lun);
    lun.run(cdb::test_unit_ready()).expect_sense((3, 0x31, 3));
    assert!(source.log().contains("must be repeated"), "{}", source.log());
    assert_eq!(host_read(&device.device, SIZE - 4096, 4096), [7; 4096]);
}

/// Whether any of the blocks behind the first of a device is filled with a byte.
fn device_holds(device: &Path, byte: u8) -> bool {
    host_read(device, MIB, 4096) == [byte; 4096]
}
