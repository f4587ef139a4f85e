//! A host that cannot write back what it has taken: the kernel tells of that once, to whoever flushes next. All
//! initiators are told, whoever that was and by whatever command, and nothing is called stable any more until the image
//! is opened anew.

mod frontend;
mod mounts;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use frontend::cdb::FUA;
use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::{Scratch, host_read};
use frontend::pattern::{Rng, blocks};
use frontend::scsi::{key, response, sense, status};
use frontend::*;
use mounts::failing::{Failing, Failure};
use mounts::fuse::Fuse;
use mounts::{Kind, LoopDevice};

const SIZE: u64 = 8 * MIB;
const BLOCKS: u64 = SIZE / 512;
const WRITE_ERROR: sense::Code = (key::MEDIUM_ERROR, 0x0c, 0);
const SELF_TEST_FAILED: sense::Code = (key::HARDWARE_ERROR, 0x3e, 0x03);
const CURRENT: u8 = 0x70;
const DEFERRED: u8 = 0x71;

/// A command that makes something stable, or has to have it stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flusher {
    SynchronizeCache10,
    SynchronizeCache16,
    Write,
    WriteAndVerify,
    CompareAndWrite,
    OrWrite,
    WriteAtomic,
    Read,
    Verify,
    Stop,
    CacheOff,
    /// By its code; in the background if that says so.
    SelfTest(u8),
}

use Flusher::*;

const FLUSHERS: [Flusher; 14] = [
    SynchronizeCache10,
    SynchronizeCache16,
    Write,
    WriteAndVerify,
    CompareAndWrite,
    OrWrite,
    WriteAtomic,
    Read,
    Verify,
    Stop,
    CacheOff,
    SelfTest(0b000),
    SelfTest(0b001),
    SelfTest(0b110),
];

/// Where flushers work: nobody else writes there, and it holds zeroes.
const THEIRS: u64 = BLOCKS - 64;

/// MODE SELECT(6) of the caching page.
fn write_cache(lun: &Lun<'_>, on: bool) -> ScsiResponse {
    let mut list = vec![0, 0, 0, 0, 0x08, 18, if on { 4 } else { 0 }];
    list.resize(24, 0);
    lun.run_out(cdb::mode_select6(24), &list)
}

impl Flusher {
    fn run(self, lun: &Lun<'_>) -> ScsiResponse {
        let zeroes = [0; 4096];
        match self {
            SynchronizeCache10 => lun.run(cdb::synchronize_cache10(0, 0)),
            SynchronizeCache16 => lun.run(cdb::synchronize_cache16(0, 0)),
            Write => lun.run_out(cdb::write16(THEIRS, 8).or(1, FUA), &zeroes),
            WriteAndVerify => lun.run_out(cdb::write_and_verify16(0, THEIRS, 8), &zeroes),
            CompareAndWrite => {
                lun.run_out(cdb::compare_and_write(THEIRS, 1).or(1, FUA), &zeroes[..1024])
            }
            OrWrite => {
                let or_write = Cdb::new(0x8b).or(1, FUA).be64(2, THEIRS).be32(10, 8);
                lun.run_out(or_write, &zeroes)
            }
            WriteAtomic => lun.run_out(Cdb::new(0x9c).be64(2, THEIRS).be16(12, 8), &zeroes),
            Read => lun.run_in(cdb::read16(THEIRS, 8).or(1, FUA), 4096),
            Verify => lun.run(cdb::verify16(0, THEIRS, 8)),
            Stop => lun.run(cdb::start_stop_unit(0)),
            CacheOff => write_cache(lun, false),
            SelfTest(code) => {
                lun.run(Cdb::new(0x1d).byte(1, if code == 0 { 4 } else { code << 5 }))
            }
        }
    }

    /// What it says of a loss; `None` if it has ended before it finds that.
    fn says(self, loss: sense::Code) -> Option<sense::Code> {
        match self {
            SelfTest(0b001) => None,
            SelfTest(_) => Some(SELF_TEST_FAILED),
            _ => Some(loss),
        }
    }

    /// Its own error is not about the loss.
    fn tells_later(self) -> bool {
        matches!(self, SelfTest(_))
    }
}

/// All but what changes the disk for good, and what reads by the way, which a host that is down cannot.
fn flushers_fail(lun: &Lun<'_>, loss: sense::Code, is_up: bool) {
    let some = |flusher: &Flusher| match flusher {
        CacheOff => false,
        CompareAndWrite | OrWrite => is_up,
        _ => true,
    };
    for flusher in FLUSHERS.into_iter().filter(some) {
        if let Some(code) = flusher.says(loss) {
            let answer = flusher.run(lun);
            assert_eq!(answer.sense_code(), Some(code), "{flusher:?}: {answer:?}");
            assert_eq!(answer.sense.unwrap().response_code, CURRENT, "{flusher:?}");
        }
    }
}

/// A command that has nothing to do with it is told of the loss, and the one after that is not.
#[track_caller]
fn is_told_once(lun: &Lun<'_>, loss: sense::Code, who: &str) {
    let told = lun.run(cdb::test_unit_ready());
    assert_eq!(told.sense_code(), Some(loss), "{who}: {told:?}");
    assert_eq!(told.sense.unwrap().response_code, DEFERRED, "{who}");
    is_told_nothing(lun, who);
}

#[track_caller]
fn is_told_nothing(lun: &Lun<'_>, who: &str) {
    let answer = lun.run(cdb::test_unit_ready());
    assert!(answer.is_good(), "{who}: {answer:?}");
}

/// The first initiator has written what is lost, the second flushes by this command. `loss` is what is heard of it;
/// `is_up` whether the file system goes on all the same.
fn both_are_told(flusher: Flusher, a: &Lun<'_>, b: &Lun<'_>, loss: sense::Code, is_up: bool) {
    let answer = flusher.run(b);
    assert_eq!(answer.sense_code(), flusher.says(loss), "{flusher:?}: {answer:?}");
    if flusher == CacheOff {
        a.run(cdb::test_unit_ready()).expect_sense(sense::MODE_PARAMETERS_CHANGED);
    }
    match flusher.says(loss) {
        None => eventually("the self-test has failed", || {
            let told = a.run(cdb::test_unit_ready());
            assert!(told.is_good() || told.sense_code() == Some(loss), "{told:?}");
            !told.is_good()
        }),
        Some(_) => is_told_once(a, loss, "who wrote"),
    }
    match flusher.tells_later() {
        true => is_told_once(b, loss, "who tested"),
        false => is_told_nothing(b, "who flushed"),
    }
    if flusher == CacheOff {
        // It is off all the same, and so nothing can be written.
        let write = a.run_out(cdb::write16(0, 8), &[3; 4096]);
        assert_eq!(write.sense_code(), Some(loss), "{write:?}");
        assert_eq!(write_cache(b, true).sense_code(), None);
        assert_eq!(a.clear_unit_attentions(), [(0x2a, 0x01)]);
    }
    for lun in [a, b, a] {
        flushers_fail(lun, loss, is_up);
    }
    if is_up {
        a.write16(16, &[4; 4096]);
        assert_eq!(b.read16(16, 8), [4; 4096]);
    }
}

fn cluster(scratch: &Scratch, disk: &Path, options: &str) -> Daemon {
    let daemon = cluster_as_it_is(scratch, disk, options);
    // What it has tried out has taken blocks of a thin device, where then what is to be lost would have room.
    let folder = disk.parent().unwrap();
    for command in [&["sync", "-f"][..], &["fstrim"]] {
        let _ = Command::new(command[0]).args(&command[1..]).arg(folder).output();
    }
    daemon
}

fn cluster_as_it_is(scratch: &Scratch, disk: &Path, options: &str) -> Daemon {
    Daemon::builder(scratch).disk(disk, options).ports(2).spawn()
}

fn guests(daemon: &Daemon) -> [FrontEnd; 2] {
    std::array::from_fn(|n| FrontEnd::builder().queues(2).connect_to(daemon, n))
}

#[test]
fn whoever_flushes_everybody_is_told() {
    for (effect, loss) in [("eio", WRITE_ERROR), ("enospc", sense::SPACE_ALLOCATION_FAILED)] {
        for flusher in FLUSHERS {
            let scratch = Scratch::new();
            let disk = scratch.image("disk.img", SIZE);
            let daemon = cluster(&scratch, &disk, &format!("fault=flush:{effect}*1"));
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            a.write16(0, &[1; 4096]);
            both_are_told(flusher, &a, &b, loss, true);
            eventually("it is logged", || daemon.log().contains("could not write back"));
            let log = daemon.log();
            assert_eq!(log.matches("could not write back").count(), 1, "{flusher:?}: {log}");
            assert!(log.contains("in bytes 0-65535"), "{flusher:?}: {log}");
        }
    }
}

/// REQUEST SENSE has it as its data, and that is as good as any other way to be told.
#[test]
fn request_sense_tells_of_the_loss() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", SIZE);
    let daemon = cluster(&scratch, &disk, "fault=flush:eio*1");
    let [a, b] = guests(&daemon);
    let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    SynchronizeCache10.run(&b).expect_sense(WRITE_ERROR);
    a.inquiry();
    for (descriptors, code, at) in [(true, 0x73, 1), (false, 0x70, 2)] {
        let data =
            a.run_in(cdb::request_sense(descriptors, 252), 252).expect_good().data().to_vec();
        let key = if descriptors { key::MEDIUM_ERROR } else { key::NO_SENSE };
        assert_eq!((data[0], data[at]), (code, key), "{data:02x?}");
    }
    is_told_nothing(&a, "who has asked");
}

/// Only a restart ends it: not a reset, a new connection, a look at the sizes, or a flush that would succeed.
#[test]
fn the_loss_stays_until_the_image_is_opened_anew() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", SIZE);
    let mut daemon = cluster(&scratch, &disk, "fault=flush:eio*1");
    {
        let [first, second] = guests(&daemon);
        let (a, b) = (first.ready_lun(0, 0), second.ready_lun(0, 0));
        a.write16(0, &[1; 4096]);
        SynchronizeCache10.run(&a).expect_sense(WRITE_ERROR);
        // What another reset takes away, the loss is not.
        assert_eq!(first.tmf(Tmf::LogicalUnitReset, a.address, 0), response::FUNCTION_COMPLETE);
        assert_eq!(a.clear_unit_attentions(), [(0x29, 0x00)]);
        b.run(cdb::test_unit_ready()).expect_sense(sense::POWER_ON_OR_RESET);
        is_told_once(&b, WRITE_ERROR, "the other");
        daemon.sighup();
        for _ in 0..20 {
            flushers_fail(&b, WRITE_ERROR, true);
        }
        // What is refused has changed nothing.
        let fua = b.run_out(cdb::write16(64, 8).or(1, FUA), &[9; 4096]);
        fua.expect_sense(WRITE_ERROR);
        assert_eq!(b.read16(64, 8), [0; 4096]);
        // A format would fail at its end.
        a.run(cdb::format_unit(0)).expect_sense(WRITE_ERROR);
        a.run(cdb::sanitize(0x02, 0)).expect_sense(WRITE_ERROR);
        is_told_nothing(&a, "who formats");
    }
    {
        let again = FrontEnd::connect(&daemon);
        let lun = again.ready_lun(0, 0);
        is_told_nothing(&lun, "who comes later");
        flushers_fail(&lun, WRITE_ERROR, true);
    }
    assert!(daemon.terminate().success());
    let daemon = cluster(&scratch, &disk, "");
    let [a, b] = guests(&daemon);
    for lun in [a.ready_lun(0, 0), b.ready_lun(0, 0)] {
        lun.synchronize_cache();
        Write.run(&lun).expect_good();
        assert_eq!(lun.read16(0, 8), [1; 4096], "the host had not really lost it");
    }
}

/// A disk whose write cache is off from the start.
#[test]
fn without_a_write_cache_every_write_is_refused() {
    let daemon = Daemon::with_disk(SIZE, "cache=writethrough,fault=flush:half*1+flush:eio*1");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let write = |byte| lun.run_out(cdb::write16(0, 8), &[byte; 4096]);
    write(1).expect_good();
    write(2).expect_sense(WRITE_ERROR);
    write(3).expect_sense(WRITE_ERROR);
    let list = cdb::unmap_list(&[(64, 8)]);
    lun.run_out(cdb::unmap(false, list.len() as u16), &list).expect_sense(WRITE_ERROR);
    lun.run_out(cdb::write_same16(0, 64, 8), &[7; 512]).expect_sense(WRITE_ERROR);
    is_told_nothing(&lun, "who wrote");
    lun.read16(0, 8);
}

// ----- hosts that really fail ------------------------------------------------------------------

/// A file of which the first half is written and on its device, and so is where flushers work; the rest is a hole, for
/// which the device may have to take space.
fn half_written(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&vec![0; SIZE as usize / 2], 0).unwrap();
    file.write_all_at(&[0; 64 * 512], THEIRS * 512).unwrap();
    file.sync_all().unwrap();
    File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
}

/// Has the host begin to write back what there is, and wait for that, as it does by itself after a while.
fn write_back_by_the_host(path: &Path) {
    let _ = File::open(path).and_then(|file| file.sync_all());
}

fn code_of(failure: Failure) -> sense::Code {
    match failure {
        Failure::Full => sense::SPACE_ALLOCATION_FAILED,
        Failure::Broken | Failure::FullForJournal => WRITE_ERROR,
    }
}

/// A write into the hole is lost for want of space, or wherever it is for a device that is broken.
fn a_loss_is_told(kind: Kind, failure: Failure, flushers: &[Flusher], mount: &Failing) {
    let (loss, is_up) = (code_of(failure), failure == Failure::Full);
    for flusher in flushers {
        let disk = mount.path().join("disk.img");
        half_written(&disk);
        {
            let scratch = Scratch::new();
            let daemon = cluster(&scratch, &disk, "");
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            a.write16(BLOCKS / 2, &blocks(BLOCKS / 2, 2048, 512, 1));
            mount.fail();
            write_back_by_the_host(&disk);
            both_are_told(*flusher, &a, &b, loss, is_up);
            mount.heal();
            for lun in [&a, &b] {
                flushers_fail(lun, loss, is_up);
            }
            eventually("it is logged", || daemon.log().contains("could not write back"));
            let log = daemon.log();
            let said = log.matches("could not write back").count();
            assert_eq!(said, 1, "{kind:?} {flusher:?}: {log}");
            let range = format!("in bytes {}-", SIZE / 2);
            assert!(log.contains(&range), "{kind:?} {flusher:?}: {log}");
        }
        let _ = std::fs::remove_file(&disk);
    }
}

#[test]
fn ext4_on_a_thin_device_that_is_full() {
    let Some(mount) = Failing::new(Kind::Ext4, Failure::Full) else { return };
    a_loss_is_told(Kind::Ext4, Failure::Full, &FLUSHERS, &mount);
}

/// The data has room, ext4's journal has not: when somebody else was told of that, no flush of ours has anything to wait
/// for any more, and succeeds.
#[test]
fn ext4_on_a_thin_device_that_has_no_room_for_its_journal() {
    for flusher in [SynchronizeCache10, Verify, Read, SelfTest(0b001)] {
        let Some(mut mount) = Failing::new(Kind::Ext4, Failure::FullForJournal) else { return };
        let disk = mount.path().join("disk.img");
        half_written(&disk);
        // The blocks that the disk will take.
        let file = File::options().write(true).open(&disk).unwrap();
        file.write_all_at(&vec![9; SIZE as usize / 4], SIZE / 2).unwrap();
        file.sync_all().unwrap();
        file.set_len(SIZE / 2).unwrap();
        file.set_len(SIZE).unwrap();
        file.sync_all().unwrap();
        drop(file);
        {
            let scratch = Scratch::new();
            let mut daemon = cluster_as_it_is(&scratch, &disk, "");
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            a.write16(BLOCKS / 2, &[1; 4096]);
            mount.fail();
            write_back_by_the_host(&disk);
            let answer = flusher.run(&b);
            assert_eq!(answer.sense_code(), flusher.says(WRITE_ERROR), "{flusher:?}: {answer:?}");
            eventually("it is told", || {
                a.run(cdb::test_unit_ready()).sense_code() == Some(WRITE_ERROR)
            });
            flushers_fail(&a, WRITE_ERROR, false);
            mount.heal();
            flushers_fail(&a, WRITE_ERROR, false);
            daemon.kill();
        }
        mount.remount();
        assert_eq!(host_read(&disk, SIZE / 2, 1), [0], "{flusher:?}: it was not lost");
    }
}

#[test]
fn xfs_on_a_thin_device_that_is_full() {
    let Some(mount) = Failing::new(Kind::Xfs, Failure::Full) else { return };
    a_loss_is_told(Kind::Xfs, Failure::Full, &FLUSHERS, &mount);
}

#[test]
fn btrfs_on_a_thin_device_that_is_full() {
    for flusher in [SynchronizeCache10, Write, Read, SelfTest(0b001)] {
        let Some(mount) = Failing::new(Kind::Btrfs, Failure::Full) else { return };
        a_loss_is_told(Kind::Btrfs, Failure::Full, &[flusher], &mount);
    }
}

#[test]
fn file_systems_on_a_device_that_breaks() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        for flusher in [SynchronizeCache16, Write, Read, CacheOff, SelfTest(0b001)] {
            let Some(mount) = Failing::new(kind, Failure::Broken) else { break };
            a_loss_is_told(kind, Failure::Broken, &[flusher], &mount);
        }
    }
}

/// The thin host gets space again: what was lost stays lost, and the next start begins with what there is.
#[test]
fn space_that_comes_back_brings_nothing_back() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(mount) = Failing::new(kind, Failure::Full) else { continue };
        let disk = mount.path().join("disk.img");
        half_written(&disk);
        let scratch = Scratch::new();
        let mut daemon = cluster(&scratch, &disk, "");
        {
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            a.write16(BLOCKS / 2, &[1; 4096]);
            mount.fail();
            SynchronizeCache10.run(&a).expect_sense(sense::SPACE_ALLOCATION_FAILED);
            mount.heal();
            SynchronizeCache10.run(&a).expect_sense(sense::SPACE_ALLOCATION_FAILED);
            is_told_once(&b, sense::SPACE_ALLOCATION_FAILED, "the other");
            SynchronizeCache10.run(&b).expect_sense(sense::SPACE_ALLOCATION_FAILED);
        }
        assert!(daemon.terminate().success());
        let daemon = cluster(&scratch, &disk, "");
        let [a, b] = guests(&daemon);
        let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        a.synchronize_cache();
        a.write16(BLOCKS / 2, &[2; 4096]);
        b.synchronize_cache();
        Write.run(&b).expect_good();
        assert!(!daemon.log().contains("write back"), "{}", daemon.log());
    }
}

/// The process dies before it has asked the host: the next one is told, and has its first flush fail.
#[test]
fn a_loss_that_nobody_was_told_of_is_told_after_a_restart() {
    let Some(mount) = Failing::new(Kind::Ext4, Failure::Full) else { return };
    let disk = mount.path().join("disk.img");
    half_written(&disk);
    let scratch = Scratch::new();
    let mut daemon = cluster(&scratch, &disk, "");
    let [a, _] = guests(&daemon);
    a.ready_lun(0, 0).write16(BLOCKS / 2, &[1; 4096]);
    mount.fail();
    daemon.kill();
    drop(a);
    // All files at once: nobody is told of any of them.
    let sync = Command::new("sync").arg("-f").arg(mount.path()).status();
    assert!(sync.is_ok());
    mount.heal();
    let daemon = cluster(&scratch, &disk, "");
    let [a, _] = guests(&daemon);
    let lun = a.ready_lun(0, 0);
    SynchronizeCache10.run(&lun).expect_sense(sense::SPACE_ALLOCATION_FAILED);
    SynchronizeCache10.run(&lun).expect_sense(sense::SPACE_ALLOCATION_FAILED);
}

/// Two processes with the same file, as in a migration: each has its own open file, and each is told.
#[test]
fn whoever_has_the_file_open_is_told() {
    let Some(mount) = Failing::new(Kind::Ext4, Failure::Full) else { return };
    let disk = mount.path().join("disk.img");
    half_written(&disk);
    let scratch = Scratch::new();
    let other = Scratch::new();
    let daemons = [&scratch, &other]
        .map(|scratch| Daemon::builder(scratch).disk(&disk, "locking=off").spawn());
    let guests = daemons.each_ref().map(FrontEnd::connect);
    let luns = guests.each_ref().map(|guest| guest.ready_lun(0, 0));
    luns[0].write16(BLOCKS / 2, &[1; 4096]);
    mount.fail();
    write_back_by_the_host(&disk);
    mount.heal();
    for _ in 0..2 {
        for lun in &luns {
            SynchronizeCache10.run(lun).expect_sense(sense::SPACE_ALLOCATION_FAILED);
        }
    }
}

/// A block device: the kernel keeps its errors in the same way. What is in the device's own cache is lost without them,
/// and only the flush tells.
#[test]
fn a_block_device_that_breaks_is_told() {
    let Some(fuse) = Fuse::new(false) else { return };
    let device = fuse.path().join("device");
    let Some(device) = LoopDevice::over(&device, SIZE >> 20) else { return };
    for (options, breaks, flusher) in [
        ("", true, SynchronizeCache10),
        ("", true, SelfTest(0b001)),
        ("", false, Write),
        ("cache=direct", false, SynchronizeCache10),
        ("cache=direct", false, Write),
        ("cache=direct", false, CompareAndWrite),
    ] {
        let scratch = Scratch::new();
        let daemon = cluster(&scratch, &device.device, options);
        let [a, b] = guests(&daemon);
        let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        a.write16(0, &[1; 4096]);
        match breaks {
            true => fuse.fail_writes(Some(0..u64::MAX)),
            false => fuse.fail_flushes(1),
        }
        let answer = flusher.run(&b);
        assert_eq!(answer.sense_code(), flusher.says(WRITE_ERROR), "{options} {flusher:?}");
        eventually("who wrote is told", || {
            a.run(cdb::test_unit_ready()).sense_code() == Some(WRITE_ERROR)
        });
        fuse.fail_writes(None);
        is_told_nothing(&a, "who wrote, again");
        if flusher.tells_later() {
            is_told_once(&b, WRITE_ERROR, "who tested");
        }
        for lun in [&a, &b] {
            SynchronizeCache10.run(lun).expect_sense(WRITE_ERROR);
            Write.run(lun).expect_sense(WRITE_ERROR);
        }
    }
}

/// A direct write that fails, and a write through a cache that keeps nothing back, are told at once and lose nothing.
#[test]
fn writes_that_fail_at_once_are_no_loss() {
    let Some(fuse) = Fuse::new(false) else { return };
    for options in ["", "cache=direct", "cache=writethrough", "cache=direct,detect-zeroes=on"] {
        let disk = fuse.path().join("disk.img");
        std::fs::write(&disk, vec![0; SIZE as usize]).unwrap();
        let scratch = Scratch::new();
        let daemon = cluster(&scratch, &disk, options);
        let [a, b] = guests(&daemon);
        let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        fuse.fail_writes(Some(0..MIB));
        for fua in [0, FUA] {
            let write = a.run_out(cdb::write16(8, 8).or(1, fua), &[1; 4096]);
            let information = write.expect_sense(WRITE_ERROR).information;
            assert_eq!(information, Some(8), "{options}: where it failed");
        }
        is_told_nothing(&b, options);
        let write = b.run_out(cdb::write16(MIB / 512, 8).or(1, FUA), &[1; 4096]);
        assert!(write.is_good(), "{options}: {write:?}");
        fuse.fail_writes(None);
        a.synchronize_cache();
        // A flush that fails is another matter.
        fuse.fail_flushes(1);
        let write = a.run_out(cdb::write16(8, 8).or(1, FUA), &[1; 4096]);
        assert_eq!(write.sense_code(), Some(WRITE_ERROR), "{options}: {write:?}");
        is_told_once(&b, WRITE_ERROR, options);
        SynchronizeCache10.run(&b).expect_sense(WRITE_ERROR);
    }
}

// ----- what is stable --------------------------------------------------------------------------

const PLACE: usize = 4096;
const PLACES: u64 = 512;

fn contents(place: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 { vec![0; PLACE] } else { blocks(place, PLACE / 512, 512, stamp) }
}

/// What a place may hold on the medium: what was stable last, and everything that was written since, with whether that
/// succeeded.
struct Model {
    possible: Vec<Vec<(u64, bool)>>,
    /// The disk has said that something is lost, by this answer: from then on nothing is stable.
    lost: Option<String>,
}

impl Model {
    fn new() -> Self {
        Model { possible: vec![vec![(0, true)]; PLACES as usize], lost: None }
    }

    fn stable(stamps: &mut Vec<(u64, bool)>) {
        let last = stamps.iter().rposition(|(_, good)| *good).unwrap();
        stamps.drain(..last);
    }

    fn is_right(&self, disk: &Path, what: &str) {
        for (place, stamps) in (0u64..).zip(&self.possible) {
            let found = host_read(disk, place * PLACE as u64, PLACE);
            let is = |(stamp, _): &(u64, bool)| found == contents(place, *stamp);
            let sectors = || {
                found.chunks(512).enumerate().all(|(n, sector)| {
                    let is = |(stamp, _): &(u64, bool)| {
                        sector == &contents(place, *stamp)[n * 512..][..512]
                    };
                    stamps.iter().any(is)
                })
            };
            assert!(
                stamps.iter().any(is) || sectors(),
                "{what}: place {place} is none of {stamps:?}"
            );
        }
    }
}

/// A step of an initiator.
#[derive(Clone, Copy, Debug)]
enum Step {
    Flush,
    Write { place: u64, stamp: u64, fua: bool },
    WriteWhole { place: u64, stamp: u64 },
    Free { place: u64, anchor: bool },
    Read { place: u64 },
    Test(u8),
}

impl Step {
    fn random(rng: &mut Rng, stamp: u64) -> Self {
        let place = rng.below(PLACES);
        match rng.below(15) {
            0 => Step::Flush,
            1 | 2 => Step::Write { place, stamp, fua: true },
            3 => Step::WriteWhole { place, stamp },
            4 => Step::Free { place, anchor: rng.below(2) == 0 },
            5 => Step::Read { place },
            6 => Step::Test([0b000, 0b001][rng.below(2) as usize]),
            _ => Step::Write { place, stamp, fua: false },
        }
    }

    fn run(self, lun: &Lun<'_>) -> ScsiResponse {
        let lba = |place: u64| place * (PLACE / 512) as u64;
        match self {
            Step::Flush => lun.run(cdb::synchronize_cache10(0, 0)),
            Step::Write { place, stamp, fua } => {
                let flags = if fua { FUA } else { 0 };
                lun.run_out(cdb::write16(lba(place), 8).or(1, flags), &contents(place, stamp))
            }
            Step::WriteWhole { place, stamp } => {
                let cdb = Cdb::new(0x9c).be64(2, lba(place)).be16(12, 8);
                lun.run_out(cdb, &contents(place, stamp))
            }
            Step::Free { place, anchor } => {
                let list = cdb::unmap_list(&[(lba(place), 8)]);
                lun.run_out(cdb::unmap(anchor, list.len() as u16), &list)
            }
            Step::Read { place } => lun.run_in(cdb::read16(lba(place), 8).or(1, FUA), PLACE),
            Step::Test(code) => SelfTest(code).run(lun),
        }
    }
}

impl Model {
    /// What an answer says. `cache` is whether the disk has a write cache.
    fn hears(&mut self, step: Step, answer: &ScsiResponse, cache: bool, what: &str) {
        if answer.sense.as_ref().is_some_and(|sense| sense.response_code == DEFERRED) {
            self.lost.get_or_insert(format!("{answer:?}"));
            return;
        }
        let (wrote, stable) = match step {
            Step::Flush | Step::Read { .. } | Step::Test(0b000) => (None, true),
            Step::Test(_) => (None, false),
            Step::Write { place, stamp, fua } => (Some((place, stamp)), fua || !cache),
            Step::WriteWhole { place, stamp } => (Some((place, stamp)), true),
            Step::Free { place, .. } => (Some((place, 0)), !cache),
        };
        assert!(
            self.lost.is_none() || !stable || !answer.is_good(),
            "{what}: {step:?} is good after {:?}",
            self.lost
        );
        if let Some((place, stamp)) = wrote {
            let stamps = &mut self.possible[place as usize];
            stamps.push((stamp, answer.is_good()));
            if stable && answer.is_good() {
                Self::stable(stamps);
            }
        }
        match step {
            Step::Flush if answer.is_good() => self.possible.iter_mut().for_each(Self::stable),
            Step::Flush => drop(self.lost.get_or_insert(format!("{answer:?}"))),
            _ => {}
        }
    }
}

/// An image of zeroes, so much of it written and on the device.
fn image(mount: &Failing, written: u64) -> PathBuf {
    let disk = mount.path().join("disk.img");
    let file = File::create(&disk).unwrap();
    file.set_len(PLACES * PLACE as u64).unwrap();
    file.write_all_at(&vec![0; written as usize * PLACE], 0).unwrap();
    file.sync_all().unwrap();
    File::open(mount.path()).unwrap().sync_all().unwrap();
    disk
}

const CACHES: [&str; 3] = ["", "cache=direct", "cache=writethrough"];

/// Random commands of two initiators while the device fails now and then; at the end the medium holds what was called
/// stable, unless the disk has said before that something may be lost.
fn what_is_called_stable_is_there(kind: Kind, seed: u64) -> bool {
    let Some(mut mount) = Failing::new(kind, Failure::Broken) else { return false };
    let mut rng = Rng::new(seed);
    // Where only the file's own blocks fail, its file system goes on.
    let alone = seed.is_multiple_of(2) && kind != Kind::Btrfs;
    let disk = image(&mount, if alone { PLACES } else { rng.below(PLACES) });
    let options = CACHES[rng.below(3) as usize];
    let what = format!("{kind:?} seed {seed} {options} alone {alone}");
    let scratch = Scratch::new();
    let mut daemon = cluster(&scratch, &disk, options);
    let mut model = Model::new();
    {
        let guests = guests(&daemon);
        let luns = [guests[0].ready_lun(0, 0), guests[1].ready_lun(0, 0)];
        let mut failing = false;
        for stamp in 1..300 {
            match rng.below(60) {
                0 | 1 => {
                    failing = !failing;
                    match failing {
                        true if alone => mount.fail_below(&disk),
                        true => mount.fail(),
                        false => mount.heal(),
                    }
                }
                2 | 3 => write_back_by_the_host(&disk),
                _ => {
                    let step = Step::random(&mut rng, stamp);
                    let answer = step.run(&luns[rng.below(2) as usize]);
                    model.hears(step, &answer, options != "cache=writethrough", &what);
                }
            }
        }
    }
    mount.heal();
    daemon.kill();
    drop(daemon);
    mount.remount();
    model.is_right(&disk, &what);
    model.lost.is_some()
}

#[test]
fn what_is_called_stable_is_there_when_the_device_fails() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        let lost = (0..8).filter(|seed| what_is_called_stable_is_there(kind, *seed));
        println!("{kind:?}: something was lost in {} of 8 runs", lost.count());
    }
}

/// Many stable writes and flushes of two initiators at a time when the device fails: the kernel tells one of them, and
/// none of the others is answered GOOD for what is not there.
#[test]
fn of_many_flushes_at_a_time_none_is_good_that_is_not() {
    const WRITERS: u64 = 8;
    for kind in [Kind::Ext4, Kind::Xfs] {
        for round in 0..6 {
            let Some(mut mount) = Failing::new(kind, Failure::Broken) else { break };
            let mut rng = Rng::new(round);
            let disk = image(&mount, PLACES);
            let options = ["", "", "cache=writethrough"][round as usize % 3];
            let what = format!("{kind:?} round {round} {options}");
            let scratch = Scratch::new();
            let mut daemon = cluster(&scratch, &disk, options);
            // What each place held when that was called stable last, and whether something else was written since.
            let places: Vec<_> =
                (0..PLACES).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect();
            let (stop, good) = (AtomicBool::new(false), AtomicU64::new(0));
            {
                let guests = guests(&daemon);
                guests.iter().for_each(|guest| drop(guest.ready_lun(0, 0)));
                std::thread::scope(|scope| {
                    for writer in 0..WRITERS {
                        let (guests, places, stop, good) = (&guests, &places, &stop, &good);
                        scope.spawn(move || {
                            let guest = &guests[writer as usize % 2];
                            let queue = FIRST_REQUEST_QUEUE + writer as usize / 2 % 2;
                            let lun = guest.lun(0, 0).on_queue(queue);
                            let mut rng = Rng::new(round * 100 + writer);
                            for stamp in 1.. {
                                // Each has places of its own.
                                let place = rng.below(PLACES / WRITERS) * WRITERS + writer;
                                let flush = rng.below(3) == 0;
                                let fua = !flush;
                                let (stable, last) = &places[place as usize];
                                last.store(stamp, Ordering::Release);
                                let step = Step::Write { place, stamp, fua };
                                let mut is_good = step.run(&lun).is_good();
                                if flush {
                                    is_good &= Step::Flush.run(&lun).is_good();
                                }
                                if is_good {
                                    stable.store(stamp, Ordering::Release);
                                    good.fetch_add(1, Ordering::AcqRel);
                                }
                                if stop.load(Ordering::Acquire) {
                                    return;
                                }
                            }
                        });
                    }
                    let some = |more: u64| {
                        let before = good.load(Ordering::Acquire);
                        eventually("stable writes", || {
                            good.load(Ordering::Acquire) >= before + more
                        });
                    };
                    some(40);
                    mount.fail_below(&disk);
                    // Long enough for all of them to meet it.
                    std::thread::sleep(Duration::from_millis(50 + rng.below(100)));
                    mount.heal();
                    std::thread::sleep(Duration::from_millis(50));
                    stop.store(true, Ordering::Release);
                });
            }
            daemon.kill();
            drop(daemon);
            mount.remount();
            for (place, (stable, last)) in (0u64..).zip(&places) {
                let [stable, last] = [stable, last].map(|stamp| stamp.load(Ordering::Acquire));
                let found = host_read(&disk, place * PLACE as u64, PLACE);
                let is_one = (stable..=last).any(|stamp| found == contents(place, stamp));
                assert!(is_one, "{what}: place {place} is not of {stable} to {last}");
            }
        }
    }
}

// ----- what meets the switching off of the cache ----------------------------------------------------------------

/// A write that is under way when the write cache is switched off is stable when it is answered, whatever kind of command
/// makes it.
#[test]
fn a_write_that_meets_the_end_of_the_cache_is_stable() {
    let plain = |lun: &Lun<'_>| lun.request(cdb::write16(0, 8)).data_out([1; 4096]);
    let compare = |lun: &Lun<'_>| {
        lun.request(cdb::compare_and_write(0, 1)).data_out([[0; 512], [1; 512]].concat())
    };
    let or = |lun: &Lun<'_>| lun.request(Cdb::new(0x8b).be32(10, 8)).data_out([1; 4096]);
    let same = |lun: &Lun<'_>| lun.request(cdb::write_same16(0, 0, 8)).data_out([1; 512]);
    type Make = fn(&Lun<'_>) -> ScsiRequest;
    let kinds: [(&str, Make, &str); 5] = [
        ("WRITE", plain, ""),
        ("WRITE", plain, "detect-zeroes=on,"),
        ("COMPARE AND WRITE", compare, ""),
        ("ORWRITE", or, ""),
        ("WRITE SAME", same, ""),
    ];
    for (name, make, options) in kinds {
        // The first flush is that of MODE SELECT: it succeeds. The write has to make another.
        let met = [500, 2000, 8000].into_iter().any(|delay| {
            let scratch = Scratch::new();
            let disk = scratch.image("disk.img", SIZE);
            let faults = format!("write:delay-ms-{delay}@0-4096*1+flush:half*1+flush:eio*1");
            let daemon = cluster(&scratch, &disk, &format!("{options}fault={faults}"));
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            let ticket = a.submit(&make(&a));
            // It is planned when this is answered, which goes through the same queue.
            a.inquiry();
            write_cache(&b, false).expect_good();
            let under_way = a.front_end().queue(FIRST_REQUEST_QUEUE).try_take(ticket);
            if under_way.is_some() {
                // MODE SELECT took too long to meet it.
                return false;
            }
            let answer = a.front_end().wait(ticket);
            assert_eq!(answer.sense_code(), Some(WRITE_ERROR), "{name} {options}: {answer:?}");
            true
        });
        assert!(met, "{name}: MODE SELECT takes longer than a write that is delayed");
    }
}

/// A reset that switches the write cache off does not leave in it what was written before.
#[test]
fn a_reset_that_ends_the_cache_flushes_it() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", SIZE);
    let daemon = cluster(&scratch, &disk, "cache=writethrough,fault=flush:eio*1");
    let [first, second] = guests(&daemon);
    let (a, b) = (first.ready_lun(0, 0), second.ready_lun(0, 0));
    write_cache(&a, true).expect_good();
    a.write16(0, &[1; 4096]);
    assert_eq!(first.tmf(Tmf::LogicalUnitReset, a.address, 0), response::FUNCTION_COMPLETE);
    eventually("the flush has failed", || {
        let answer = b.run(cdb::test_unit_ready());
        let lost = answer.sense_code() == Some(WRITE_ERROR);
        assert!(!lost || answer.sense.unwrap().response_code == DEFERRED);
        lost
    });
}

// ----- what is flushed how often, and what is whole -------------------------------------------------------------

/// VERIFY flushes once, however long it is; so do the other commands that read from the medium.
#[test]
fn a_command_flushes_once() {
    let Some(fuse) = Fuse::new(false) else { return };
    let disk = fuse.path().join("disk.img");
    std::fs::write(&disk, vec![0; SIZE as usize]).unwrap();
    let scratch = Scratch::new();
    let daemon = cluster(&scratch, &disk, "");
    let [a, _] = guests(&daemon);
    let lun = a.ready_lun(0, 0);
    let flushes = |run: &dyn Fn() -> ScsiResponse| {
        let before = fuse.flushes();
        run().expect_good();
        fuse.flushes() - before
    };
    let long = (4 * MIB / 512) as u32;
    assert_eq!(flushes(&|| lun.run(cdb::verify16(0, 0, long))), 1);
    assert_eq!(flushes(&|| lun.run_out(cdb::verify16(3, 0, long), &[0; 512])), 1);
    assert_eq!(flushes(&|| lun.run_in(cdb::read16(0, long).or(1, FUA), 4 << 20)), 1);
    assert_eq!(flushes(&|| SelfTest(0b000).run(&lun)), 1);
    assert_eq!(flushes(&|| lun.run(cdb::read16(0, 0).or(1, FUA))), 0);
    let verify = || lun.run_out(cdb::write_and_verify16(1, 0, 8), &[1; 4096]);
    assert_eq!(flushes(&verify), 1, "the write has flushed it");
}

const ATOMIC: u64 = MIB;

fn write_atomic(lun: &Lun<'_>, lba: u64, byte: u8) -> ScsiResponse {
    let cdb = Cdb::new(0x9c).be64(2, lba).be16(12, (ATOMIC / 512) as u16);
    lun.run_out(cdb, &vec![byte; ATOMIC as usize])
}

/// What a journal calls the old bytes is what a crash of the host leaves: they have reached the medium before it is there.
#[test]
fn what_a_journal_knows_of_has_reached_the_medium() {
    for _ in 0..8 {
        // What was written before is in the page cache, and the server has none of it.
        let Some(fuse) = Fuse::new(true) else { return };
        let disk = fuse.path().join("disk.img");
        std::fs::write(&disk, vec![1; SIZE as usize]).unwrap();
        File::open(&disk).unwrap().sync_all().unwrap();
        let scratch = Scratch::new();
        let daemon = cluster(&scratch, &disk, "");
        let [a, _] = guests(&daemon);
        let a = a.ready_lun(0, 0);
        a.write16(0, &vec![3; ATOMIC as usize]);
        let behind = |name: &str| fuse.behind().join(name);
        assert_eq!(host_read(&behind("disk.img"), 0, 512), [1; 512]);
        let bytes = std::thread::scope(|scope| {
            let writing = scope.spawn(|| write_atomic(&a, 0, 2).expect_good());
            while !behind("disk.img.thinlun-write").exists() && !writing.is_finished() {
                std::hint::spin_loop();
            }
            let stopped = fuse.stop();
            let bytes = host_read(&behind("disk.img"), 0, ATOMIC as usize);
            drop(stopped);
            writing.join().unwrap();
            bytes
        });
        assert!(!bytes.contains(&1), "what was overwritten before would come back");
        assert_eq!(a.read16(0, 8), [2; 4096]);
    }
}

/// An atomic write that fails halfway keeps its journal: it is whole before anybody sees its blocks again, and never comes
/// back over what was written there later.
#[test]
fn an_atomic_write_that_fails_halfway_is_made_before_its_blocks_are_used() {
    const AT: u64 = 2 * MIB;
    let lba = AT / 512;
    for options in ["", "cache=direct"] {
        let Some(fuse) = Fuse::new(false) else { return };
        let disk = fuse.path().join("disk.img");
        std::fs::write(&disk, vec![1; SIZE as usize]).unwrap();
        let journal = fuse.behind().join("disk.img.thinlun-write");
        let second_half = || fuse.fail_writes(Some(AT + ATOMIC / 2..AT + ATOMIC));
        let scratch = Scratch::new();
        let mut daemon = cluster(&scratch, &disk, options);
        {
            let [a, b] = guests(&daemon);
            let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
            second_half();
            let failed = write_atomic(&a, lba, 2);
            assert_eq!(failed.sense_code(), Some(WRITE_ERROR), "{options}: {failed:?}");
            assert!(journal.exists(), "{options}: the only whole copy");
            // Nobody sees half of it, and others are not disturbed.
            let last = lba + ATOMIC / 512 - 8;
            let list = cdb::unmap_list(&[(last, 8)]);
            for answer in [
                b.run_in(cdb::read16(lba, 8), 4096),
                b.run_in(cdb::read16(last, 8).or(1, FUA), 4096),
                b.run_out(cdb::write16(last, 8), &[3; 4096]),
                b.run_out(cdb::write16(lba, 8).or(1, FUA), &[3; 4096]),
                b.run_out(cdb::unmap(false, list.len() as u16), &list),
            ] {
                assert_eq!(answer.status, status::CHECK_CONDITION, "{options}: {answer:?}");
            }
            b.write16(lba - 8, &[4; 4096]);
            b.read16(last + 8, 8);
            b.synchronize_cache();
            fuse.fail_writes(None);
            assert_eq!(b.read16(lba, 8), [2; 4096], "{options}");
            assert_eq!(b.read16(last, 8), [2; 4096], "{options}");
            assert!(!journal.exists(), "{options}");
            // Again, and then it meets a newer write.
            second_half();
            write_atomic(&a, lba, 5).expect_sense(WRITE_ERROR);
            fuse.fail_writes(None);
            b.write16(last, &[6; 4096]);
            b.synchronize_cache();
            assert!(!journal.exists(), "{options}");
            assert_eq!(a.read16(lba, 8), [5; 4096], "{options}");
        }
        daemon.kill();
        let mut daemon = cluster(&scratch, &disk, options);
        {
            let [a, _] = guests(&daemon);
            let a = a.ready_lun(0, 0);
            assert_eq!(a.read16(lba + ATOMIC / 512 - 8, 8), [6; 4096], "{options}: newer");
            // And once more, for the next process.
            second_half();
            write_atomic(&a, lba, 7).expect_sense(WRITE_ERROR);
        }
        daemon.kill();
        fuse.fail_writes(None);
        let daemon = cluster(&scratch, &disk, options);
        let [a, _] = guests(&daemon);
        let found = a.ready_lun(0, 0).read16(lba, (ATOMIC / 512) as u32);
        assert!(found == vec![7; ATOMIC as usize], "{options}: not whole");
        assert!(!journal.exists(), "{options}");
    }
}

/// A copy takes what is read, not what the host has failed to write back, and which is in the blocks that could be
/// shared.
#[test]
fn a_copy_of_what_is_lost_is_a_copy_of_what_is_read() {
    // ROD TYPE; without one (RTV 0) a token that keeps its data is made if that can be had.
    const POINT_IN_TIME: u32 = 0x0080_0000;
    const UPON_REFERENCE: u32 = 0x0001_0000;
    const ANY: u32 = 0;
    const INSUFFICIENT_RESOURCES_TO_CREATE_ROD: sense::Code = (key::ILLEGAL_REQUEST, 0x55, 0x0c);
    const COUNT: u32 = 2048;
    for (kind, is_known) in
        [(POINT_IN_TIME, false), (ANY, false), (UPON_REFERENCE, false), (UPON_REFERENCE, true)]
    {
        let Some(mount) = Failing::new(Kind::Xfs, Failure::Full) else { return };
        let disk = mount.path().join("disk.img");
        half_written(&disk);
        let copy = mount.path().join("copy.img");
        File::create(&copy).unwrap().set_len(SIZE).unwrap();
        let scratch = Scratch::new();
        let daemon = Daemon::builder(&scratch).disk(&disk, "").disk(&copy, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let (from, to) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let data = blocks(0, COUNT as usize, 512, 1);
        from.write16(BLOCKS / 2, &data);
        mount.fail();
        write_back_by_the_host(&disk);
        mount.heal();
        if is_known {
            SynchronizeCache10.run(&from).expect_sense(sense::SPACE_ALLOCATION_FAILED);
        }
        let mut list = vec![0; 32];
        list[..2].copy_from_slice(&30u16.to_be_bytes());
        list[2] = if kind == ANY { 0 } else { 2 };
        list[8..12].copy_from_slice(&kind.to_be_bytes());
        list[14..16].copy_from_slice(&16u16.to_be_bytes());
        list[16..24].copy_from_slice(&(BLOCKS / 2).to_be_bytes());
        list[24..28].copy_from_slice(&COUNT.to_be_bytes());
        let populated = from.run_out(cdb::populate_token(32).be32(6, 1), &list);
        if kind == POINT_IN_TIME {
            populated.expect_sense(INSUFFICIENT_RESOURCES_TO_CREATE_ROD);
            continue;
        }
        populated.expect_good();
        if kind == ANY {
            is_told_once(&from, sense::SPACE_ALLOCATION_FAILED, "whose blocks were to be shared");
        }
        let answer = from.run_in(cdb::receive_copy_lid4(0x07, 1, 1024), 1024).expect_good();
        let token = &answer.data()[answer.data().len() - 512..];
        let mut list = vec![0; 552];
        list[..2].copy_from_slice(&550u16.to_be_bytes());
        list[16..528].copy_from_slice(token);
        list[534..536].copy_from_slice(&16u16.to_be_bytes());
        list[544..548].copy_from_slice(&COUNT.to_be_bytes());
        to.run_out(cdb::write_using_token(552).be32(6, 2), &list).expect_good();
        if kind == UPON_REFERENCE && !is_known {
            is_told_once(&from, sense::SPACE_ALLOCATION_FAILED, "whose blocks were to be shared");
        }
        assert!(from.read16(BLOCKS / 2, COUNT) == data, "the host still has it");
        assert!(to.read16(0, COUNT) == data, "{kind:x} {is_known}: the copy is not what is read");
    }
}

/// A file that has become so short that it holds no block: there is no capacity to report.
#[test]
fn a_disk_without_blocks_is_not_ready() {
    const MANUAL_INTERVENTION: sense::Code = (key::NOT_READY, 0x04, 0x03);
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let file = File::options().write(true).open(daemon.disk()).unwrap();
    for len in [0, 511] {
        file.set_len(len).unwrap();
        daemon.sighup();
        eventually("a unit attention", || {
            lun.run(cdb::test_unit_ready()).sense_code() == Some(sense::CAPACITY_CHANGED)
        });
        for answer in [
            lun.run(cdb::test_unit_ready()),
            lun.run_in(cdb::read_capacity10(), 8),
            lun.run_in(cdb::read_capacity16(32), 32),
            lun.run_in(cdb::read16(0, 1), 512),
        ] {
            answer.expect_sense(MANUAL_INTERVENTION);
        }
        lun.inquiry();
        file.set_len(512).unwrap();
        daemon.sighup();
        eventually("a unit attention", || {
            lun.run(cdb::test_unit_ready()).sense_code() == Some(sense::CAPACITY_CHANGED)
        });
        assert_eq!((lun.capacity(), lun.read_capacity10()), ((1, 512), (0, 512)));
    }
}
