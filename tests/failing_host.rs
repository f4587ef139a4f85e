//! A host that fails: every error has its sense data, nothing is called good that was not, and when the host is well
//! again the guest goes on.

mod frontend;
mod mounts;

use std::time::{Duration, Instant};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::pattern::{Rng, assert_same, blocks};
use frontend::scsi::{key, response, sense, status};
use frontend::*;
use mounts::pids::Pids;
use mounts::{Kind, Mount, skipped};

const SIZE: u64 = 4 * MIB;

fn failing(faults: &str) -> Daemon {
    Daemon::with_disk(SIZE, &format!("fault={faults}"))
}

const READ_ERROR: sense::Code = (key::MEDIUM_ERROR, 0x11, 0);
const WRITE_ERROR: sense::Code = (key::MEDIUM_ERROR, 0x0c, 0);

#[test]
fn every_error_of_the_host_has_its_sense() {
    // Of the blocks 16 to 31 of 512 bytes.
    for (effect, reading, writing) in [
        ("eio", Some(READ_ERROR), Some(WRITE_ERROR)),
        ("enospc", None, Some(sense::SPACE_ALLOCATION_FAILED)),
        ("erofs", None, Some(sense::WRITE_PROTECTED)),
        ("half", Some(READ_ERROR), Some(WRITE_ERROR)),
    ] {
        for (operation, code) in [("read", reading), ("write", writing)] {
            let Some(code) = code else { continue };
            let daemon = failing(&format!("{operation}:{effect}@8192-16384*1"));
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            let data = blocks(0, 64, 512, 1);
            let run = || match operation {
                "read" => lun.run_in(cdb::read16(0, 64), 64 * 512),
                _ => lun.run_out(cdb::write16(0, 64), &data),
            };
            let answer = run();
            let told = answer.expect_sense(code);
            if code.0 == key::MEDIUM_ERROR || code == sense::SPACE_ALLOCATION_FAILED {
                let first = if effect == "half" { 32 } else { 16 };
                assert_eq!(told.information, Some(first), "{operation}:{effect}");
            }
            run().expect_good();
        }
    }
}

#[test]
fn a_host_without_resources_is_busy() {
    for operation in ["read", "write", "flush"] {
        let daemon = failing(&format!("{operation}:enomem*1"));
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let run = || match operation {
            "read" => lun.run_in(cdb::read16(0, 8), 4096),
            "write" => lun.run_out(cdb::write16(0, 8), &[1; 4096]),
            _ => lun.run(cdb::synchronize_cache10(0, 0)),
        };
        let answer = run();
        assert_eq!((answer.response, answer.status), (response::OK, status::BUSY), "{operation}");
        run().expect_good();
    }
}

/// A guest that asks for self-tests faster than the host makes them piles nothing up.
#[test]
fn there_is_one_self_test_in_the_background_at_a_time() {
    let daemon = failing("read:delay-ms-200");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let test = || lun.run(Cdb::new(0x1d).byte(1, 0x20));
    test().expect_good();
    for _ in 0..20 {
        test().expect_sense((key::NOT_READY, 0x04, 0x09));
    }
    eventually("it has ended", || test().is_good());
}

/// What a flush could not make safe is not called safe, and that does not change when the next flush would succeed.
#[test]
fn a_failed_flush_is_told() {
    for (faults, code) in [
        ("flush:eio*1", WRITE_ERROR),
        ("flush:enospc*1", sense::SPACE_ALLOCATION_FAILED),
        ("flush:erofs*1", sense::WRITE_PROTECTED),
    ] {
        let daemon = failing(faults);
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(0, &[1; 4096]);
        for _ in 0..3 {
            let flush = lun.run(cdb::synchronize_cache10(0, 0));
            assert_eq!(flush.expect_sense(code).response_code, 0x70, "{faults}");
        }
        let fua = lun.run_out(cdb::write16(0, 8).byte(1, 8), &[1; 4096]);
        fua.expect_sense(code);
        lun.write16(0, &[2; 4096]);
        assert_eq!(lun.read16(0, 8), [2; 4096]);
    }
}

/// A write that fails at once has lost nothing but itself, stable or not.
#[test]
fn a_write_that_fails_at_once_is_no_loss() {
    for (faults, options) in [
        ("write:eio*1", ""),
        ("write:enospc*1", ""),
        ("write:eio*1", "cache=direct"),
        ("write:eio*1", "cache=writethrough"),
    ] {
        let options = format!("{options},fault={faults}");
        let daemon = Daemon::with_disk(SIZE, options.trim_start_matches(','));
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let fua = || lun.run_out(cdb::write16(0, 8).byte(1, 8), &[1; 4096]);
        assert_eq!(fua().status, status::CHECK_CONDITION, "{faults} {options}");
        fua().expect_good();
        lun.synchronize_cache();
    }
}

#[test]
fn what_frees_reserves_and_copies_fails_as_it_should() {
    let daemon = failing("discard:eio*1+zero:enospc*1");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let list = cdb::unmap_list(&[(8, 8)]);
    let unmap = |anchor| lun.run_out(cdb::unmap(anchor, list.len() as u16), &list);
    unmap(false).expect_sense(WRITE_ERROR);
    unmap(true).expect_sense(sense::SPACE_ALLOCATION_FAILED);
    unmap(false).expect_good();
    unmap(true).expect_good();
}

/// A disk whose host hangs holds up neither another disk on the same queue nor task management of it, and the abort of
/// what hangs is answered when that has ended, not before.
#[test]
fn a_disk_that_hangs_hangs_alone() {
    let scratch = Scratch::new();
    let (slow, quick) = (scratch.image("slow.img", SIZE), scratch.image("quick.img", SIZE));
    let daemon = Daemon::builder(&scratch)
        .disk(&slow, "fault=write:delay-ms-1500@0-4096")
        .disk(&quick, "")
        .spawn();
    let fe = FrontEnd::connect(&daemon);
    let (slow, quick) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let write = slow.request(cdb::write16(0, 8)).data_out(vec![1; 4096]).tag(77);
    let start = Instant::now();
    let ticket = slow.submit(&write);
    for n in 0..50 {
        quick.write16(n * 8, &[2; 4096]);
        slow.write16(1024 + n * 8, &[2; 4096]);
    }
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, quick.address, 0), response::FUNCTION_COMPLETE);
    assert_eq!(fe.tmf(Tmf::QueryTask, slow.address, 77), response::FUNCTION_SUCCEEDED);
    assert!(fe.queue(FIRST_REQUEST_QUEUE).try_take(ticket).is_none(), "it hangs no longer");
    assert_eq!(fe.tmf(Tmf::AbortTask, slow.address, 77), response::FUNCTION_COMPLETE);
    assert!(start.elapsed() >= Duration::from_millis(1500), "aborted before its end");
    let answer = fe.queue(FIRST_REQUEST_QUEUE).try_take(ticket).expect("answered before the abort");
    assert_eq!(ScsiResponse::parse(&answer).response, response::ABORTED);
}

/// A write in which the host holds the queue's own thread holds up no other disk of the queue, no task management of
/// others, and no message; transfers of other disks that are in the queue's ring end; and the abort of what hangs is
/// answered when that has ended.
#[test]
fn a_write_that_holds_its_thread_holds_nothing_else() {
    let scratch = Scratch::new();
    let names = ["stuck.img", "cached.img", "direct.img"];
    let [stuck, cached, direct] = names.map(|name| scratch.image(name, SIZE));
    let daemon = Daemon::builder(&scratch)
        .disk(&stuck, "fault=write:stall-ms-5000@0-4096*2")
        .disk(&cached, "")
        .disk(&direct, "cache=direct")
        .spawn();
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    let [stuck, cached, direct] = [0, 1, 2].map(|lun| fe.ready_lun(0, lun));
    direct.write16(0, &vec![3; 64 << 10]);
    for round in 0..2u64 {
        let start = Instant::now();
        // In the second round there is something in the ring when the write comes.
        let reads: Vec<_> = (0..8 * round)
            .map(|n| direct.submit(&direct.request(cdb::read16(n * 8, 8)).data_in(4096)))
            .collect();
        let write = stuck.request(cdb::write16(0, 8)).data_out(vec![1; 4096]).tag(77);
        let ticket = stuck.submit(&write);
        // To the same disk, behind it: these are handed over.
        let behind: Vec<_> = (1..9)
            .map(|n| {
                let write = stuck.request(cdb::write16(n * 8, 8)).data_out(vec![4; 4096]);
                stuck.submit(&write)
            })
            .collect();
        for (n, ticket) in reads.into_iter().enumerate() {
            assert_eq!(fe.wait(ticket).expect_good().data(), [3; 4096], "read {n}");
        }
        for n in 0..50 {
            cached.write16(n * 8, &[round as u8 + 5; 4096]);
            assert_eq!(cached.read16(n * 8, 8), [round as u8 + 5; 4096]);
            direct.write16(n * 8, &[3; 4096]);
        }
        behind.into_iter().for_each(|ticket| {
            fe.wait(ticket).expect_good();
        });
        cached.synchronize_cache();
        fe.renew_call(FIRST_REQUEST_QUEUE);
        fe.add_region(&RegionSpec::new(64 * GIB, MIB));
        fe.remove_region(64 * GIB);
        assert_eq!(fe.stop_queue(FIRST_REQUEST_QUEUE + 1), fe.base(FIRST_REQUEST_QUEUE + 1));
        fe.start_queue(FIRST_REQUEST_QUEUE + 1, fe.base(FIRST_REQUEST_QUEUE + 1));
        assert_eq!(fe.tmf(Tmf::AbortTaskSet, cached.address, 0), response::FUNCTION_COMPLETE);
        assert_eq!(fe.tmf(Tmf::LogicalUnitReset, direct.address, 0), response::FUNCTION_COMPLETE);
        direct.clear_unit_attentions();
        assert_eq!(fe.tmf(Tmf::QueryTask, stuck.address, 77), response::FUNCTION_SUCCEEDED);
        assert!(fe.queue(FIRST_REQUEST_QUEUE).try_take(ticket).is_none(), "it hangs no longer");
        assert_eq!(fe.tmf(Tmf::AbortTask, stuck.address, 77), response::FUNCTION_COMPLETE);
        assert!(start.elapsed() >= Duration::from_millis(5000), "aborted before its end");
        let answer = fe.queue(FIRST_REQUEST_QUEUE).try_take(ticket);
        let answer = ScsiResponse::parse(&answer.expect("answered before the abort"));
        assert_eq!(answer.response, response::ABORTED);
        stuck.write16(64, &[6; 4096]);
        assert_eq!(stuck.read16(64, 8), [6; 4096]);
    }
    let left = daemon.log().matches("does not come back from a write").count();
    assert_eq!(left, 1, "only a thread without transfers of others is left in a write");
    // Threads that were left end: one for each queue that runs is there, and one that waits to take over.
    let queues = || {
        let names = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
        let names =
            names.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("queue ") || name.starts_with("standby")).count()
    };
    eventually("one thread a queue", || queues() == 5);
}

/// A file that is cut off under the disk: what is not there reads as zeroes, nobody dies of it, and writes bring it
/// back.
#[test]
fn a_file_that_is_truncated_is_survived() {
    for options in ["", "cache=direct"] {
        let daemon = Daemon::with_disk(SIZE, options);
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let data = blocks(0, 64, 512, 3);
        lun.write16(4096, &data);
        let file = std::fs::OpenOptions::new().write(true).open(daemon.disk()).unwrap();
        file.set_len(MIB).unwrap();
        assert_same(&lun.read16(4096, 64), &[0; 64 * 512], "behind the end");
        lun.write16(4096, &data);
        assert_same(&lun.read16(4096, 64), &data, "written anew");
        daemon.sighup();
        eventually("a unit attention", || !lun.clear_unit_attentions().is_empty());
        assert_eq!(lun.capacity().0, 4096 + 64);
        let behind = lun.run_in(cdb::read16(SIZE / 512 - 8, 8), 4096);
        behind.expect_sense(sense::LBA_OUT_OF_RANGE);
        file.set_len(SIZE).unwrap();
        daemon.sighup();
        eventually("a unit attention", || !lun.clear_unit_attentions().is_empty());
        assert_eq!(lun.capacity().0, SIZE / 512);
    }
}

/// Another file takes the name: the disk stays the one it was.
#[test]
fn a_file_that_is_replaced_stays_the_disk() {
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &[1; 4096]);
    let other = daemon.disk().with_extension("new");
    std::fs::write(&other, vec![9; SIZE as usize]).unwrap();
    std::fs::rename(&other, daemon.disk()).unwrap();
    assert_eq!(lun.read16(0, 8), [1; 4096]);
    lun.write16(0, &[2; 4096]);
    assert_eq!(lun.read16(0, 8), [2; 4096]);
    assert_eq!(std::fs::read(daemon.disk()).unwrap()[..4096], [9; 4096]);
}

/// A file system that goes down under the disk (as after a lost cable): errors, no death, and no GOOD for what is not
/// there.
#[test]
fn a_file_system_that_goes_down_is_told() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(mount) = Mount::new(kind, 320) else { continue };
        let disk = mount.path().join("disk.img");
        std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
        let scratch = Scratch::new();
        let daemon = Daemon::builder(&scratch).disk(&disk, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(0, &[1; 4096]);
        lun.synchronize_cache();
        if !mount.go_down() {
            skipped(&format!("{kind:?} cannot be shut down here"));
            continue;
        }
        let write = lun.run_out(cdb::write16(0, 8), &[2; 4096]);
        let flush = lun.run(cdb::synchronize_cache10(0, 0));
        assert!(!(write.is_good() && flush.is_good()), "{kind:?}: {write:?} {flush:?}");
        assert!(!lun.run(cdb::synchronize_cache10(0, 0)).is_good(), "{kind:?}: still down");
        lun.inquiry();
    }
}

/// A file system that becomes read-only under the disk: what is there can be read, and writes say why they fail.
#[test]
fn a_file_system_that_becomes_read_only_is_told() {
    let Some(mount) = Mount::new(Kind::Ext4, 64) else { return };
    let disk = mount.path().join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let scratch = Scratch::new();
    let daemon = Daemon::builder(&scratch).disk(&disk, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &[1; 4096]);
    lun.synchronize_cache();
    if !mount.abort() {
        return skipped("ext4 could not be made read-only");
    }
    for _ in 0..2 {
        let write = lun.run_out(cdb::write16(64, 8), &[2; 4096]);
        write.expect_sense(sense::WRITE_PROTECTED);
        let list = cdb::unmap_list(&[(64, 8)]);
        let unmap = lun.run_out(cdb::unmap(true, list.len() as u16), &list);
        unmap.expect_sense(sense::WRITE_PROTECTED);
    }
    assert_eq!(lun.read16(0, 8), [1; 4096]);
}

const BLOCK: usize = 4096;
const PLACES: u64 = 256;

/// The power goes at any moment (the file system goes down with nothing more reaching its disk, and comes up again by
/// its log): what was flushed is there, what was not may be there or not, and nothing else is.
#[test]
fn what_was_flushed_survives_a_power_cut() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(mut mount) = Mount::new(kind, 320) else { continue };
        let mut rng = Rng::new(kind as u64 + 1);
        for round in 0..6 {
            let disk = mount.path().join(format!("disk{round}.img"));
            std::fs::File::create(&disk).unwrap().set_len(PLACES * BLOCK as u64).unwrap();
            std::fs::File::open(&disk).unwrap().sync_all().unwrap();
            std::fs::File::open(mount.path()).unwrap().sync_all().unwrap();
            let options = ["", "cache=direct", "cache=writethrough"][round % 3];
            let possible = worked_on(&disk, options, &mut rng, || mount.go_down());
            let Some(possible) = possible else {
                skipped(&format!("{kind:?} cannot be shut down here"));
                break;
            };
            mount.remount();
            let bytes = std::fs::read(&disk).unwrap();
            for (place, stamps) in possible.iter().enumerate() {
                let found = &bytes[place * BLOCK..][..BLOCK];
                let matches = |stamp: &u64| found == contents(place as u64, *stamp);
                // A block that was written twice since the flush may be either, and a sector of it as well.
                let sectors = found.chunks(512).enumerate().all(|(n, sector)| {
                    stamps.iter().any(|s| sector == &contents(place as u64, *s)[n * 512..][..512])
                });
                assert!(
                    stamps.iter().any(matches) || sectors,
                    "{kind:?} {options}: place {place}, {stamps:?}"
                );
            }
        }
    }
}

fn contents(place: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 { vec![0; BLOCK] } else { blocks(place, BLOCK / 512, 512, stamp) }
}

/// Random writes, frees and flushes, and then the cut. Returns what each place may hold after it.
fn worked_on(
    disk: &std::path::Path,
    options: &str,
    rng: &mut Rng,
    cut: impl FnOnce() -> bool,
) -> Option<Vec<Vec<u64>>> {
    let scratch = Scratch::new();
    let mut daemon = Daemon::builder(&scratch).disk(disk, options).spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut possible = vec![vec![0u64]; PLACES as usize];
    for stamp in 1..400 {
        let place = rng.below(PLACES);
        let lba = place * (BLOCK / 512) as u64;
        match rng.below(12) {
            0 => {
                lun.synchronize_cache();
                for stamps in &mut possible {
                    stamps.drain(..stamps.len() - 1);
                }
            }
            1 => {
                let list = cdb::unmap_list(&[(lba, 8)]);
                lun.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
                possible[place as usize].push(0);
            }
            2 => {
                lun.run_out(cdb::write16(lba, 8).byte(1, 8), &contents(place, stamp)).expect_good();
                possible[place as usize] = vec![stamp];
            }
            _ => {
                lun.write16(lba, &contents(place, stamp));
                possible[place as usize].push(stamp);
                if options == "cache=writethrough" {
                    possible[place as usize] = vec![stamp];
                }
            }
        }
    }
    let down = cut();
    daemon.kill();
    down.then_some(possible)
}

/// The power goes while atomic writes go on: afterwards the range holds one of them whole, and none that is older than
/// the last one that was answered.
#[test]
fn an_atomic_write_is_whole_or_not_begun_after_a_power_cut() {
    const LEN: u16 = 64;
    let write = |lun: &Lun<'_>, stamp: u64| {
        let cdb = Cdb::new(0x9c).be16(12, LEN);
        lun.run_out(cdb, &blocks(0, LEN.into(), 512, stamp))
    };
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(mut mount) = Mount::new(kind, 320) else { continue };
        let mut rng = Rng::new(kind as u64 + 7);
        let (mut written, mut recovered) = (0, 0);
        for round in 0..12 {
            let disk = mount.path().join("disk.img");
            std::fs::write(&disk, vec![0; MIB as usize]).unwrap();
            std::fs::File::open(&disk).unwrap().sync_all().unwrap();
            std::fs::File::open(mount.path()).unwrap().sync_all().unwrap();
            let options = ["", "cache=direct"][round % 2];
            let scratch = Scratch::new();
            let mut daemon = Daemon::builder(&scratch).disk(&disk, options).spawn();
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            let pause = Duration::from_micros(3_000 + rng.below(30_000));
            let answered = std::thread::scope(|scope| {
                let writing = scope.spawn(|| {
                    let good = (1..).take_while(|stamp| write(&lun, *stamp).is_good());
                    good.last().unwrap_or(0)
                });
                std::thread::sleep(pause);
                mount.go_down().then(|| writing.join().unwrap())
            });
            let Some(answered) = answered else {
                skipped(&format!("{kind:?} cannot be shut down here"));
                return;
            };
            drop(fe);
            daemon.kill();
            mount.remount();
            recovered += u64::from(mount.path().join("disk.img.thinlun-write").exists());
            written += answered;
            let daemon = Daemon::builder(&scratch).disk(&disk, options).spawn();
            let fe = FrontEnd::connect(&daemon);
            let found = fe.ready_lun(0, 0).read16(0, LEN.into());
            let is = |stamp: u64| match stamp {
                0 => found == vec![0; 512 * usize::from(LEN)],
                _ => found == blocks(0, LEN.into(), 512, stamp),
            };
            assert!(is(answered) || is(answered + 1), "{kind:?} {options}: after {answered}");
        }
        println!(
            "{kind:?}: {written} atomic writes, 12 cuts, {recovered} times one was made again"
        );
    }
}

/// A daemon over one disk that gets no more threads from here on, and its front end with two request queues.
fn without_threads(options: &str) -> Option<(Pids, Daemon, FrontEnd)> {
    let pids = Pids::new()?;
    let daemon = Daemon::with_disk(SIZE, options);
    pids.add(daemon.pid());
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    fe.ready_lun(0, 0);
    pids.fill();
    Some((pids, daemon, fe))
}

/// All that a pool does is done by the one thread that it has.
#[test]
fn without_threads_everything_is_answered() {
    let Some((_pids, mut daemon, fe)) = without_threads("") else { return };
    let lun = fe.lun(0, 0);
    // Both queues at once: each finds that the other is about to have a thread.
    std::thread::scope(|scope| {
        for queue in 0..2 {
            let lun = lun.on_queue(FIRST_REQUEST_QUEUE + queue);
            scope.spawn(move || {
                for _ in 0..200 {
                    lun.run_in(cdb::get_lba_status16(0, 512, 0), 512).expect_good();
                }
            });
        }
    });
    lun.synchronize_cache();
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
    assert!(daemon.terminate().success());
}

/// Who wants blocks for himself waits for a transfer of the same queue, and neither holds the other up.
#[test]
fn without_threads_an_atomic_command_waits_beside_its_queue() {
    let Some((_pids, mut daemon, fe)) = without_threads("cache=direct") else { return };
    let mut lun = fe.lun(0, 0);
    (lun.blocks, lun.block_size) = (SIZE / 512, 512);
    let read = || lun.request(cdb::read16(0, 128)).data_in(128 * 512);
    let compare = || lun.request(cdb::compare_and_write(0, 1)).data_out([0; 1024]);
    for _ in 0..20 {
        for answer in fe.run_all(FIRST_REQUEST_QUEUE, &[read(), compare(), read(), compare()]) {
            answer.expect_good();
        }
    }
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
    assert!(daemon.terminate().success());
}

/// Work that waits for the one thread can be aborted.
#[test]
fn without_threads_what_waits_can_be_aborted() {
    let Some((_pids, mut daemon, fe)) = without_threads("fault=read:delay-ms-300") else { return };
    let lun = fe.lun(0, 0);
    let tickets: Vec<_> =
        (0..60).map(|_| lun.submit(&lun.request(cdb::verify16(0, 0, 8)))).collect();
    let start = Instant::now();
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
    // One after another they would have taken longer.
    assert!(start.elapsed() < Duration::from_secs(10));
    for ticket in tickets {
        fe.wait(ticket);
    }
    assert!(daemon.terminate().success());
}

/// What needs a thread of its own is refused, leaves nothing behind, and can be had later.
#[test]
fn without_threads_what_needs_one_is_busy() {
    let Some((pids, daemon, fe)) = without_threads("") else { return };
    let lun = fe.lun(0, 0);
    let busy = |answer: ScsiResponse, what: &str| {
        assert_eq!((answer.response, answer.status), (response::OK, status::BUSY), "{what}");
    };
    let before = daemon.scratch().listing();
    busy(lun.run(cdb::format_unit(0)), "FORMAT UNIT");
    busy(lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]), "WRITE ATOMIC");
    busy(
        lun.run_out(Cdb::new(0xa4).byte(1, 0x06).byte(9, 5), b"hello"),
        "SET IDENTIFYING INFORMATION",
    );
    lun.test_unit_ready();
    assert_eq!(daemon.scratch().listing(), before, "nothing was noted");
    pids.release();
    lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]).expect_good();
    assert_eq!(lun.transfer_in(cdb::read16(0, 8), 8), [7; 4096]);
    lun.run(cdb::format_unit(0)).expect_good();
}
