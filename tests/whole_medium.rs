//! FORMAT UNIT and SANITIZE over the socket: in the background, with progress, through resets and
//! restarts, and failed when they failed. Also space: budgets, thresholds, and a host that is full.

mod frontend;
mod mounts;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::{Scratch, host_read};
use frontend::pattern::assert_same;
use frontend::scsi::{response, sense};
use frontend::*;
use mounts::fuse::Fuse;
use mounts::{Kind, Mount, skipped};

const FORMAT_IN_PROGRESS: sense::Code = (2, 4, 4);
const SANITIZE_IN_PROGRESS: sense::Code = (2, 4, 0x1b);
const FORMAT_CORRUPTED: sense::Code = (3, 0x31, 0);
const SANITIZE_FAILED: sense::Code = (3, 0x31, 3);
const SPACE_ALLOCATION_FAILED: sense::Code = (7, 0x27, 7);
const SOFT_THRESHOLD: sense::Code = (6, 0x38, 7);

const IMMED: u8 = 0x80;
const AUSE: u8 = 0x20;
const OVERWRITE: u8 = 0x01;
const BLOCK_ERASE: u8 = 0x02;
const EXIT_FAILURE_MODE: u8 = 0x1f;

/// Large enough that overwriting it takes a while.
const LARGE: u64 = 512 * MIB;

/// SANITIZE OVERWRITE with a byte, so many times.
fn overwrite(lun: &Lun<'_>, flags: u8, passes: u8, byte: u8) -> ScsiResponse {
    lun.run_out(cdb::sanitize(flags | OVERWRITE, 5), &[passes, 0, 0, 1, byte])
}

fn overwrite_request(lun: &Lun<'_>, flags: u8, byte: u8) -> ScsiRequest {
    lun.request(cdb::sanitize(flags | OVERWRITE, 5)).data_out([1, 0, 0, 1, byte])
}

/// REQUEST SENSE: the code and the progress, if there is one.
fn polled(lun: &Lun<'_>) -> (sense::Code, Option<u16>) {
    let answer = lun.run_in(cdb::request_sense(false, 18), 18).expect_good();
    let sense = frontend::scsi::Sense::parse(answer.data()).unwrap();
    (sense.code(), sense.specific.map(|[_, high, low]| u16::from_be_bytes([high, low])))
}

/// Waits until TEST UNIT READY says something else than this; returns what it says then.
fn wait_while(lun: &Lun<'_>, code: sense::Code) -> Option<sense::Code> {
    let end = Instant::now() + Duration::from_secs(120);
    while Instant::now() < end {
        let now = lun.run(cdb::test_unit_ready()).sense_code();
        if now != Some(code) {
            return now;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{code:x?} for two minutes");
}

/// Takes the unit attentions of a disk that may not be ready.
fn take_attentions(lun: &Lun<'_>) {
    while lun.run(cdb::test_unit_ready()).sense_code().is_some_and(|(key, ..)| key == 6) {}
}

fn notes(image: &Path) -> PathBuf {
    PathBuf::from(format!("{}.thinlun", image.display()))
}

fn assert_filled(image: &Path, byte: u8) {
    let size = image.metadata().unwrap().len();
    for at in (0..size).step_by(64 * MIB as usize) {
        let len = (size - at).min(64 * MIB) as usize;
        assert_same(&host_read(image, at, len), &vec![byte; len], "the image");
    }
}

#[test]
fn a_sanitize_operation_shows_its_progress_and_lets_nothing_else_in() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", LARGE);
    let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, IMMED, 3, 0x5a).expect_good();
    assert!(notes(&image).exists(), "noted before it is answered");
    let mut last = 0;
    for _ in 0..5 {
        let (code, progress) = polled(&lun);
        assert_eq!(code, SANITIZE_IN_PROGRESS);
        let progress = progress.unwrap();
        assert!(progress >= last);
        last = progress;
        std::thread::sleep(Duration::from_millis(20));
    }
    lun.run_read(cdb::read16(0, 1), 1).expect_sense(SANITIZE_IN_PROGRESS);
    lun.run_out(cdb::write16(0, 1), &[1; 512]).expect_sense(SANITIZE_IN_PROGRESS);
    lun.run(cdb::start_stop_unit(1)).expect_sense(SANITIZE_IN_PROGRESS);
    lun.run(cdb::format_unit(0)).expect_sense(SANITIZE_IN_PROGRESS);
    overwrite(&lun, IMMED, 1, 0).expect_sense(SANITIZE_IN_PROGRESS);
    lun.inquiry();
    lun.report_luns(0);
    lun.mode_sense10(0x3f);
    // A reset does not end it.
    fe.tmf(Tmf::LogicalUnitReset, lun.address, 0);
    take_attentions(&lun);
    assert_eq!(lun.run(cdb::test_unit_ready()).sense_code(), Some(SANITIZE_IN_PROGRESS));
    assert_eq!(wait_while(&lun, SANITIZE_IN_PROGRESS), None);
    assert_eq!(polled(&lun), ((0, 0, 0), None));
    assert!(!notes(&image).exists(), "there is nothing to remember");
    assert_filled(&image, 0x5a);
}

/// The same where the host can neither free nor reserve, so that zeroes are written.
#[test]
fn zeroes_that_have_to_be_written_do_not_make_a_file_longer() {
    let Some(fuse) = Fuse::new(false) else { return };
    fuse.refuse();
    let (scratch, whole, rest) = (Scratch::new(), 64 * MIB, 4 * MIB);
    let path = fuse.path().join("disk.img");
    std::fs::write(&path, vec![7; whole as usize]).unwrap();
    let daemon = Daemon::builder(&scratch).disk(&path, "fault=zero:delay-ms-1500*1").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.run_out(cdb::format_unit(0x10), &[0, 0x82, 0, 0]).expect_good();
    // Through the mount, where the daemon's file is told of it.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(rest).unwrap();
    assert_eq!(wait_while(&lun, FORMAT_IN_PROGRESS), None);
    assert_eq!(path.metadata().unwrap().len(), rest);
    assert_same(&host_read(&path, 0, rest as usize), &vec![0; rest as usize], "what is left");
}

/// What the host has taken away while it was overwritten is not there any more: neither an operation nor zeroes for a
/// thick disk make the file long again. A guest that writes there does.
#[test]
fn an_operation_does_not_make_a_file_longer() {
    let (whole, rest) = (32 * MIB, 4 * MIB + 512);
    for (cache, operation) in [
        ("", 0),
        ("", 1),
        (",cache=direct", 0),
        (",discard=off", 2),
        (",cache=direct,discard=off", 2),
    ] {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", whole);
        // One step in the middle of it takes long enough to change the file meanwhile.
        let slow = format!("fault=any:delay-ms-1500@{}-{}*1{cache}", 8 * MIB, 8 * MIB + 1);
        let daemon = Daemon::builder(&scratch).disk(&image, &slow).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let (answer, code) = match operation {
            0 => (overwrite(&lun, IMMED, 2, 0x5a), SANITIZE_IN_PROGRESS),
            1 => {
                let pattern = [0, 0x8a, 0, 0, 0, 1, 0, 1, 0x5a];
                (lun.run_out(cdb::format_unit(0x10), &pattern), FORMAT_IN_PROGRESS)
            }
            // All of it is zeroed by one call, if that; it is the second of the two that finds a shorter file.
            _ => (lun.run_out(cdb::format_unit(0x10), &[0, 0x82, 0, 0]), FORMAT_IN_PROGRESS),
        };
        answer.expect_good();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.set_len(rest).unwrap();
        assert_eq!(wait_while(&lun, code), None, "{cache} {operation}");
        // O_DIRECT may not stop within a sector.
        let len = image.metadata().unwrap().len();
        assert!((rest..=rest.next_multiple_of(4096)).contains(&len), "{cache} {operation}: {len}");
        let byte = if operation == 2 { 0 } else { 0x5a };
        assert_same(&host_read(&image, 0, rest as usize), &vec![byte; rest as usize], cache);
        // Behind the end everything reads as zeroes, and can be written.
        assert_same(&lun.read16(whole / 512 - 8, 8), &[0; 4096], cache);
        lun.write16(whole / 512 - 8, &[9; 4096]);
        assert_eq!(image.metadata().unwrap().len(), whole);
    }
}

#[test]
fn an_operation_goes_on_after_the_daemon_was_killed() {
    for immediately in [true, false] {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", LARGE);
        let mut daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(LARGE / 512 - 8, &[7; 4096]);
        let pattern = [0, 0x8a, 0, 0, 0, 1, 0, 1, 0xc3];
        lun.run_out(cdb::format_unit(0x10), &pattern).expect_good();
        assert_eq!(polled(&lun).0, FORMAT_IN_PROGRESS);
        if !immediately {
            std::thread::sleep(Duration::from_millis(200));
        }
        daemon.kill();
        drop(fe);
        assert!(notes(&image).exists());
        let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.lun(0, 0);
        take_attentions(&lun);
        assert_eq!(wait_while(&lun, FORMAT_IN_PROGRESS), None);
        assert!(!notes(&image).exists());
        assert_filled(&image, 0xc3);
    }
}

/// The power goes in the middle of an operation, when only its first block is left, or after its end: what is noted of it is
/// so on the medium.
#[test]
fn an_operation_goes_on_after_a_power_cut() {
    const SIZE: u64 = 16 * MIB;
    let half = format!("fault=write:delay-ms-300@{}-{SIZE}", SIZE / 2);
    for kind in [Kind::Ext4, Kind::Xfs] {
        for (moment, faults) in [
            ("middle", half.as_str()),
            ("first block", "fault=write:delay-ms-1500@0-512"),
            ("end", ""),
        ] {
            let Some(mut mount) = Mount::new(kind, 320) else { continue };
            let image = mount.path().join("disk.img");
            std::fs::write(&image, vec![7; SIZE as usize]).unwrap();
            std::fs::File::open(&image).unwrap().sync_all().unwrap();
            std::fs::File::open(mount.path()).unwrap().sync_all().unwrap();
            let scratch = Scratch::new();
            let mut daemon = Daemon::builder(&scratch).disk(&image, faults).spawn();
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            overwrite(&lun, IMMED, 1, 0x5a).expect_good();
            let noted = |text: &str| {
                std::fs::read_to_string(notes(&image)).is_ok_and(|noted| noted.contains(text))
            };
            match moment {
                "middle" => eventually("half of it", || polled(&lun).1 > Some(0x8000)),
                "first block" => {
                    eventually("only the first block is left", || noted("operation=running@1."));
                }
                _ => assert_eq!(wait_while(&lun, SANITIZE_IN_PROGRESS), None),
            }
            if !mount.go_down() {
                skipped(&format!("{kind:?} cannot be shut down here"));
                break;
            }
            daemon.kill();
            drop((fe, daemon));
            mount.remount();
            let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.lun(0, 0);
            take_attentions(&lun);
            assert_eq!(wait_while(&lun, SANITIZE_IN_PROGRESS), None, "{kind:?}, {moment}");
            assert_same(
                &host_read(&image, 0, SIZE as usize),
                &vec![0x5a; SIZE as usize],
                &format!("{kind:?}, {moment}"),
            );
        }
    }
}

#[test]
fn a_failed_operation_stays_failed_until_it_is_mended() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 64 * MIB);
    let spawn = || Daemon::builder(&scratch).disk(&image, "space-limit=8M").spawn();
    let daemon = spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let read = |lun: &Lun<'_>| lun.run_read(cdb::read16(0, 1), 1);
    // There is no room to overwrite all of it.
    overwrite(&lun, 0, 1, 1).expect_sense(SANITIZE_FAILED);
    read(&lun).expect_sense(SANITIZE_FAILED);
    lun.run(cdb::test_unit_ready()).expect_sense(SANITIZE_FAILED);
    lun.run(cdb::format_unit(0)).expect_sense(SANITIZE_FAILED);
    lun.inquiry();
    lun.run(cdb::sanitize(EXIT_FAILURE_MODE, 0)).expect_sense(sense::INVALID_FIELD_IN_CDB);
    // With AUSE the initiator may leave it at that.
    overwrite(&lun, AUSE, 1, 1).expect_sense(SANITIZE_FAILED);
    lun.run(cdb::sanitize(EXIT_FAILURE_MODE, 0)).expect_good();
    read(&lun).expect_good();
    // A failure is remembered.
    overwrite(&lun, AUSE, 1, 1).expect_sense(SANITIZE_FAILED);
    drop((fe, daemon));
    let daemon = spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    take_attentions(&lun);
    read(&lun).expect_sense(SANITIZE_FAILED);
    lun.run(cdb::sanitize(BLOCK_ERASE, 0)).expect_good();
    assert_eq!(read(&lun).expect_good().data(), [0; 512]);
    assert!(image.metadata().unwrap().blocks() * 512 < MIB, "its space is given back");
    // So is that of a format, which a format mends.
    let pattern = [0, 0x88, 0, 0, 0, 1, 0, 1, 9];
    lun.run_out(cdb::format_unit(0x10), &pattern).expect_sense(FORMAT_CORRUPTED);
    drop((fe, daemon));
    let daemon = spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    take_attentions(&lun);
    read(&lun).expect_sense(FORMAT_CORRUPTED);
    lun.run(cdb::start_stop_unit(1)).expect_good();
    lun.run(cdb::format_unit(0)).expect_good();
    assert_eq!(read(&lun).expect_good().data(), [0; 512]);
    assert!(!notes(&image).exists());
}

/// An operation whose end cannot be noted has not ended: a restart would repeat it, over what was written since.
#[test]
fn an_operation_ends_when_that_is_noted() {
    let Some(mount) = Mount::new(Kind::Ext4, 128) else { return };
    let directory = mount.path().join("images");
    std::fs::create_dir(&directory).unwrap();
    let image = directory.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    // Nothing can be made or removed in it then.
    let immutable = |on: bool| {
        let mode = if on { "+i" } else { "-i" };
        let run = std::process::Command::new("chattr").arg(mode).arg(&directory).status();
        run.is_ok_and(|status| status.success())
    };
    let scratch = Scratch::new();
    let slow = "fault=write:delay-ms-1500@0-512";
    let daemon = Daemon::builder(&scratch).disk(&image, slow).spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, IMMED, 1, 0x5a).expect_good();
    eventually("only the first block is left", || {
        std::fs::read_to_string(notes(&image))
            .is_ok_and(|noted| noted.contains("operation=running@1."))
    });
    if !immutable(true) {
        return skipped("a directory that cannot be changed");
    }
    let ended = wait_while(&lun, SANITIZE_IN_PROGRESS);
    assert!(immutable(false));
    assert_eq!(ended, Some(SANITIZE_FAILED));
    lun.run(cdb::sanitize(BLOCK_ERASE, 0)).expect_good();
    lun.write10(0, &[1; 512]);
    assert!(!notes(&image).exists());
}

/// What could not be made stable at its end is not begun.
#[test]
fn a_disk_that_has_lost_writes_is_not_erased() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", MIB);
    std::fs::write(&image, vec![7; MIB as usize]).unwrap();
    let daemon = Daemon::builder(&scratch).disk(&image, "fault=flush:eio*1").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let lost = lun.run(cdb::synchronize_cache10(0, 0)).sense_code();
    assert!(lost.is_some_and(|(key, ..)| key == 3), "{lost:x?}");
    for answer in [
        overwrite(&lun, 0, 1, 0x5a),
        overwrite(&lun, IMMED, 1, 0x5a),
        lun.run(cdb::sanitize(BLOCK_ERASE, 0)),
        lun.run(cdb::format_unit(0)),
    ] {
        assert_eq!(answer.sense_code(), lost);
    }
    // It is as it was, and no worse for it.
    assert_eq!(lun.read16(0, 8), [7; 4096]);
    assert_filled(&image, 7);
    assert!(!notes(&image).exists());
}

/// A budget below the file system's: kept by many writers at once, told as the host's own end would be.
#[test]
fn a_space_limit_is_kept() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 256 * MIB);
    let daemon = Daemon::builder(&scratch).disk(&image, "space-limit=32M").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let chunk = vec![0x3c; MIB as usize];
    let write = |mib: u64| lun.run_out(cdb::write16(mib * 2048, 2048), &chunk);
    (0..32).for_each(|mib| drop(write(mib).expect_good()));
    let information = write(40).expect_sense(SPACE_ALLOCATION_FAILED).information;
    assert_eq!(information, Some(40 * 2048));
    let list = cdb::unmap_list(&[(100 * 2048, 8)]);
    let anchor = cdb::unmap(true, list.len() as u16);
    lun.run_out(anchor, &list).expect_sense(SPACE_ALLOCATION_FAILED);
    write(5).expect_good();
    assert!(image.metadata().unwrap().blocks() * 512 <= 32 * MIB);
    // The log page counts the budget's rest, not the file system's.
    let log = lun.run_in(cdb::log_sense(0x0c, 0, 28), 28).expect_good();
    assert_eq!((&log.data()[8..12], &log.data()[20..24]), (&[0; 4][..], &[0, 0, 0, 32][..]));
    let list = cdb::unmap_list(&[(0, 2048)]);
    lun.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
    write(40).expect_good();
    write(41).expect_sense(SPACE_ALLOCATION_FAILED);
}

/// The initiator asks to be told when less than some space is left, and is, before there is none.
#[test]
fn a_threshold_warns_before_the_host_is_full() {
    let Some(mount) = Mount::new(Kind::Ext4, 128) else { return };
    let image = mount.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(GIB).unwrap();
    let scratch = Scratch::new();
    let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let sensed = lun.run_in(cdb::mode_sense10(0x1c, 2, 64), 64).expect_good();
    let mut list = vec![0; 8];
    list.extend(&sensed.data()[16..]);
    list.truncate(8 + 32);
    list[8 + 16] |= 0x80;
    list[8 + 20..8 + 24].copy_from_slice(&32u32.to_be_bytes());
    lun.run_out(cdb::mode_select10(list.len() as u16), &list).expect_good();
    let chunk = vec![0x11; MIB as usize];
    let mut warned = None;
    for mib in 0.. {
        let answer = lun.run_out(cdb::write16(mib * 2048, 2048), &chunk);
        match answer.sense_code() {
            None => {}
            Some(SOFT_THRESHOLD) => {
                assert_eq!(answer.expect_sense(SOFT_THRESHOLD).information, Some(16));
                warned = Some(mib);
            }
            Some(SPACE_ALLOCATION_FAILED) => break,
            Some(other) => panic!("{other:x?}"),
        }
        // Space is looked at ten times a second: who fills it in less is not warned in time.
        std::thread::sleep(Duration::from_millis(10));
    }
    let warned = warned.expect("a warning");
    assert!(warned > 32, "warned at {warned} MiB");
}

/// More operations at once than the disk has threads: each is begun, refused or given up, and none waits for ever.
#[test]
fn many_operations_at_once_all_end() {
    let daemon = Daemon::with_disk(MIB, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for _ in 0..20 {
        let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
        for n in 0..40 {
            let cdb = if n % 2 == 0 { cdb::format_unit(0) } else { cdb::sanitize(0x02, 0) };
            queue.enqueue(&lun.request(cdb).exchange());
        }
        let answers: Vec<ScsiResponse> = queue.wait_all().iter().map(ScsiResponse::parse).collect();
        drop(queue);
        assert!(answers.iter().any(ScsiResponse::is_good));
        for answer in &answers {
            let refused = answer.sense_code().is_some_and(|(key, ..)| key == 2);
            assert!(
                answer.is_good() || refused || answer.response == response::ABORTED,
                "{answer:?}"
            );
        }
    }
    lun.write10(0, &[1; 512]);
}

/// The end of a failure and a new operation at the same time: whichever comes first, the disk is not ready while it is
/// erased, and the note says that it is.
#[test]
fn a_failure_that_is_left_leaves_a_new_operation_alone() {
    let Some(mount) = Mount::new(Kind::Ext4, 128) else { return };
    let image = mount.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let scratch = Scratch::new();
    // It fails once, and is slow then.
    let faults = "fault=write:eio@8388608-8388609*1+write:delay-ms-100@1048576-16777216";
    let mut daemon = Daemon::builder(&scratch).disk(&image, faults).spawn();
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    overwrite(&lun, AUSE, 1, 1).expect_sense(SANITIZE_FAILED);
    let at_names = |daemon: &Daemon| {
        let threads = daemon.diagnosis().thread_states();
        threads.iter().any(|thread| thread.starts_with("names D"))
    };
    let frozen = mount.freeze().expect("a frozen file system");
    let exit = lun.submit(&lun.request(cdb::sanitize(EXIT_FAILURE_MODE, 0)));
    eventually("the end of the failure waits to be noted", || at_names(&daemon));
    let again = overwrite_request(&lun, AUSE, 2);
    let again = lun.on_queue(FIRST_REQUEST_QUEUE + 1).submit(&again);
    std::thread::sleep(A_MOMENT);
    drop(frozen);
    fe.wait(exit).expect_good();
    let running = || {
        std::fs::read_to_string(notes(&image))
            .is_ok_and(|noted| noted.contains("operation=running"))
    };
    eventually("the new operation is noted", running);
    assert_eq!(lun.run(cdb::test_unit_ready()).sense_code(), Some(SANITIZE_IN_PROGRESS));
    lun.run_read(cdb::read16(0, 1), 1).expect_sense(SANITIZE_IN_PROGRESS);
    // A crash does not forget it.
    daemon.kill();
    assert!(running());
    drop((fe, again));
    let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    take_attentions(&lun);
    assert_eq!(wait_while(&lun, SANITIZE_IN_PROGRESS), None);
    assert_filled(&image, 2);
}
