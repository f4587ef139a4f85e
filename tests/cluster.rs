//! Disks that several guests share, each by a socket of its own: reservations that mean something, counters that end at
//! the sum, and task management that reaches those it is about.

mod frontend;
mod mounts;

use std::path::Path;
use std::time::{Duration, Instant};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::scsi::{key, response, status};
use frontend::*;

use frontend::scsi::status::{RESERVATION_CONFLICT, TASK_ABORTED};
use mounts::{Kind, Mount, skipped};

/// A daemon with several sockets and one disk.
fn cluster(scratch: &Scratch, ports: usize, disk: &Path, options: &str) -> Daemon {
    Daemon::builder(scratch).disk(disk, options).ports(ports).spawn()
}

/// The guests behind its sockets.
fn guests<const N: usize>(daemon: &Daemon) -> [FrontEnd; N] {
    std::array::from_fn(|n| FrontEnd::builder().queues(2).connect_to(daemon, n))
}

fn reserve_out(
    lun: &Lun<'_>,
    action: u8,
    kind: u8,
    key: u64,
    other: u64,
    flags: u8,
) -> ScsiResponse {
    let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
    list.resize(24, 0);
    list[20] = flags;
    lun.run_out(Cdb::from_slice(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0]), &list)
}

fn reservation(lun: &Lun<'_>) -> Vec<u8> {
    lun.run_in(Cdb::from_slice(&[0x5e, 1, 0, 0, 0, 0, 0, 0, 64, 0]), 64)
        .expect_good()
        .data()
        .to_vec()
}

fn keys(lun: &Lun<'_>) -> Vec<u8> {
    let data = lun.run_in(Cdb::from_slice(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0]), 256).expect_good();
    data.data()[8..].chunks(8).map(|key| key[7]).collect()
}

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const APTPL: u8 = 1;
const WRITE_EXCLUSIVE_REGISTRANTS_ONLY: u8 = 5;

fn compare_and_write(lba: u8) -> Cdb {
    Cdb::from_slice(&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0])
}

#[test]
fn each_socket_is_a_port_and_all_lead_to_the_same_disk() {
    let scratch = Scratch::new();
    let daemon = cluster(&scratch, 3, &scratch.image("disk.img", MIB), "");
    let guests: [FrontEnd; 3] = guests(&daemon);
    let luns: Vec<Lun<'_>> = guests.iter().map(|guest| guest.ready_lun(0, 0)).collect();
    luns[0].write16(0, &[1; 512]);
    luns[1].write16(1, &[2; 512]);
    assert_eq!(luns[2].read16(0, 2), [[1; 512], [2; 512]].concat());
    for (n, lun) in (1u8..).zip(&luns) {
        let names = lun.vpd(0x83);
        assert!(names.windows(8).any(|d| d == [1, 0x14, 0, 4, 0, 0, 0, n]), "{n}: {names:02x?}");
        assert_eq!(names.len(), luns[0].vpd(0x83).len());
        assert_eq!(lun.vpd(0x80), luns[0].vpd(0x80));
    }
    // What one changes the others are told.
    luns[0].run_out(cdb::mode_select6(24), &{
        let mut list = vec![0; 4];
        list.extend([8, 18, 0]);
        list.resize(24, 0);
        list
    });
    for lun in &luns[1..] {
        assert_eq!(lun.clear_unit_attentions(), [(0x2a, 0x01)]);
    }
    // One that goes and comes back disturbs nobody.
    let [first, second, third] = guests;
    drop(first);
    let again = FrontEnd::connect(&daemon);
    assert_eq!(again.lun(0, 0).clear_unit_attentions(), [(0x29, 0x00)]);
    for guest in [second, third] {
        guest.lun(0, 0).test_unit_ready();
    }
}

#[test]
fn reservations_keep_others_out_and_survive_a_crash() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let mut daemon = cluster(&scratch, 2, &disk, "");
    {
        let [a, b] = guests(&daemon);
        let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        reserve_out(&a, REGISTER, 0, 0, 0xa, APTPL).expect_good();
        reserve_out(&a, RESERVE, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xa, 0, 0).expect_good();
        b.read16(0, 1);
        let write = |lun: &Lun<'_>| lun.run_out(cdb::write16(0, 1), &[7; 512]).status;
        assert_eq!(write(&b), RESERVATION_CONFLICT);
        assert_eq!(b.run_out(compare_and_write(0), &[0; 1024]).status, RESERVATION_CONFLICT);
        reserve_out(&b, REGISTER, 0, 0, 0xb, APTPL).expect_good();
        assert_eq!((write(&a), write(&b)), (status::GOOD, status::GOOD));
    }
    daemon.kill();
    drop(daemon);
    let daemon = cluster(&scratch, 2, &disk, "");
    {
        let [a, b] = guests(&daemon);
        let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        assert_eq!(keys(&a), [0xa, 0xb]);
        assert_eq!(reservation(&b)[8..16], 0xau64.to_be_bytes());
        // The second takes over.
        reserve_out(&b, PREEMPT, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xb, 0xa, 0).expect_good();
        assert_eq!(a.clear_unit_attentions(), [(0x2a, 0x05)]);
        assert_eq!(a.run_out(cdb::write16(0, 1), &[7; 512]).status, RESERVATION_CONFLICT);
        b.write16(0, &[8; 512]);
        // Without APTPL nothing is to survive, and nothing is left beside the image.
        reserve_out(&b, 6, 0, 0, 0xc, 0).expect_good();
        assert!(!scratch.join("disk.img.thinlun").exists());
    }
    drop(daemon);
    let daemon = cluster(&scratch, 2, &disk, "");
    let [a, _] = guests(&daemon);
    assert!(keys(&a.ready_lun(0, 0)).is_empty());
}

/// What is to survive and cannot be noted is refused, and is not so.
#[test]
fn a_registration_that_cannot_be_noted_is_none() {
    let Some(mount) = Mount::new(Kind::Ext4, 64) else { return };
    let directory = mount.path().join("images");
    std::fs::create_dir(&directory).unwrap();
    let disk = directory.join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(MIB).unwrap();
    // Nothing can be made or removed in it then.
    let immutable = |on: bool| {
        let mode = if on { "+i" } else { "-i" };
        let run = std::process::Command::new("chattr").arg(mode).arg(&directory).status();
        run.is_ok_and(|status| status.success())
    };
    let scratch = Scratch::new();
    let daemon = cluster(&scratch, 2, &disk, "");
    let [a, b] = guests(&daemon);
    let (a, b) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    reserve_out(&a, REGISTER, 0, 0, 0xa, 0).expect_good();
    reserve_out(&a, RESERVE, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xa, 0, 0).expect_good();
    if !immutable(true) {
        return skipped("a directory that cannot be changed");
    }
    let refused = reserve_out(&b, REGISTER, 0, 0, 0xb, APTPL);
    let write = b.run_out(cdb::write16(0, 1), &[7; 512]);
    assert!(immutable(false));
    refused.expect_sense((5, 0x55, 4));
    assert_eq!(write.status, RESERVATION_CONFLICT);
    assert_eq!(keys(&a), [0xa]);
    reserve_out(&b, REGISTER, 0, 0, 0xb, APTPL).expect_good();
    b.write16(0, &[7; 512]);
}

/// A REGISTER that registers nobody does not take from others that their registrations survive.
#[test]
fn a_stranger_does_not_make_reservations_forgotten() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let mut daemon = cluster(&scratch, 2, &disk, "");
    let [a, b] = guests(&daemon);
    let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    reserve_out(&la, REGISTER, 0, 0, 0xa, APTPL).expect_good();
    reserve_out(&la, RESERVE, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xa, 0, 0).expect_good();
    for action in [REGISTER, REGISTER_AND_IGNORE] {
        reserve_out(&lb, action, 0, 0, 0, 0).expect_good();
        assert!(scratch.join("disk.img.thinlun").exists());
    }
    daemon.kill();
    drop((a, b, daemon));
    let daemon = cluster(&scratch, 2, &disk, "");
    let [a, b] = guests(&daemon);
    let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    assert_eq!(keys(&la), [0xa]);
    let write = lb.run_out(cdb::write16(0, 1), &[7; 512]);
    assert_eq!(write.status, RESERVATION_CONFLICT);
}

#[test]
fn a_reserve_of_old_goes_with_its_guest() {
    let scratch = Scratch::new();
    let daemon = cluster(&scratch, 2, &scratch.image("disk.img", MIB), "");
    let [a, b] = guests(&daemon);
    let lun = b.ready_lun(0, 0);
    a.ready_lun(0, 0).run(Cdb::new(0x16)).expect_good();
    assert_eq!(lun.run(cdb::test_unit_ready()).status, RESERVATION_CONFLICT);
    drop(a);
    eventually("the disk is free", || lun.run(cdb::test_unit_ready()).is_good());
}

#[test]
fn copies_respect_the_reservations_of_other_disks() {
    let scratch = Scratch::new();
    let builder = Daemon::builder(&scratch).disk(&scratch.image("disk.img", MIB), "");
    let daemon = builder.disk(&scratch.image("copy.img", MIB), "").ports(2).spawn();
    let [a, b] = guests(&daemon);
    let (from, to, held) = (b.ready_lun(0, 0), b.ready_lun(0, 1), a.ready_lun(0, 1));
    from.write16(0, &[3; 4096]);
    let cscd = |lun: &Lun<'_>| {
        let naa = lun.vpd(0x83)[8..16].to_vec();
        [&[0xe4, 0, 0, 0, 1, 3, 0, 8][..], &naa, &[0; 12], &[0, 0, 2, 0]].concat()
    };
    let segment = [&[2, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 8][..], &[0; 16]].concat();
    let head = [0, 0x30, 0, 64, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    let list = [&head[..], &cscd(&from), &cscd(&to), &segment].concat();
    let copy = || from.run_out(Cdb::new(0x83).byte(13, list.len() as u8), &list);
    for (kind, code) in [(1, Some((key::COPY_ABORTED, 0x0d, 0x02))), (0, None)] {
        if kind == 1 {
            reserve_out(&held, REGISTER, 0, 0, 0xa, 0).expect_good();
            reserve_out(&held, RESERVE, kind, 0xa, 0, 0).expect_good();
        } else {
            reserve_out(&held, REGISTER, 0, 0xa, 0, 0).expect_good();
        }
        let answer = copy();
        assert_eq!(answer.sense_code(), code, "{answer:?}");
        let copied = if code.is_none() { [3; 4096] } else { [0; 4096] };
        assert_eq!(to.read16(0, 8), copied);
    }
}

#[test]
fn preempt_and_abort_ends_commands_in_flight() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    // Each read of the second block takes a while.
    let daemon = cluster(&scratch, 3, &disk, "fault=read:delay-ms-700@512-1024");
    let [a, b, c] = guests(&daemon);
    let (la, lb, lc) = (a.ready_lun(0, 0), b.ready_lun(0, 0), c.ready_lun(0, 0));
    for (lun, key) in [(&la, 0xa), (&lb, 0xb), (&lc, 0xc)] {
        reserve_out(lun, REGISTER, 0, 0, key, 0).expect_good();
    }
    reserve_out(&la, RESERVE, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xa, 0, 0).expect_good();
    let slow = |lun: &Lun<'_>| {
        (0..20)
            .map(|_| lun.submit(&lun.request(cdb::read16(1, 1)).data_in(512)))
            .collect::<Vec<_>>()
    };
    let (mine, theirs) = (slow(&la), slow(&lc));
    std::thread::sleep(Duration::from_millis(100));
    // On a queue of its own: it waits for those it ends.
    let second = lb.on_queue(FIRST_REQUEST_QUEUE + 1);
    let preempt =
        reserve_out(&second, PREEMPT_AND_ABORT, WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 0xb, 0xa, 0);
    preempt.expect_good();
    // Everything was over before it was.
    for ticket in mine {
        let answer = a.queue(FIRST_REQUEST_QUEUE).try_take(ticket).expect("ended before");
        let answer = ScsiResponse::parse(&answer);
        assert_eq!((answer.response, answer.status), (response::OK, TASK_ABORTED));
    }
    assert_eq!(la.clear_unit_attentions(), [(0x2a, 0x05)]);
    for ticket in theirs {
        c.wait(ticket).expect_good();
    }
}

#[test]
fn a_reset_of_the_disk_ends_everybodys_commands_and_an_abort_only_ones_own() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let daemon = cluster(&scratch, 2, &disk, "fault=read:delay-ms-400@512-1024");
    let [a, b] = guests(&daemon);
    let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
    let slow = |lun: &Lun<'_>| lun.submit(&lun.request(cdb::read16(1, 1)).data_in(512));
    for function in [Tmf::AbortTaskSet, Tmf::ClearTaskSet] {
        let (mine, theirs) = (slow(&la), slow(&lb));
        assert_eq!(b.tmf(function, lb.address, 0), response::OK);
        assert_eq!(b.wait(theirs).response, response::ABORTED);
        a.wait(mine).expect_good();
    }
    let (mine, theirs) = (slow(&la), slow(&lb));
    assert_eq!(b.tmf(Tmf::LogicalUnitReset, lb.address, 0), response::OK);
    assert_eq!(b.wait(theirs).response, response::RESET);
    assert_eq!(a.wait(mine).response, response::RESET);
    for lun in [&la, &lb] {
        assert_eq!(lun.clear_unit_attentions(), [(0x29, 0x00)]);
    }
}

/// Adds one to a counter, as often as asked, by COMPARE AND WRITE, several at a time.
fn count_up(guest: &FrontEnd, queue: usize, times: u64) -> u64 {
    let lun = guest.lun(0, 0).on_queue(queue);
    let block = |number: u64| {
        let mut block = vec![0; 512];
        block[..8].copy_from_slice(&number.to_be_bytes());
        block
    };
    let read = || u64::from_be_bytes(lun.read16(5, 1)[..8].try_into().unwrap());
    let (mut done, mut tries, mut known) = (0, 0, read());
    while done < times {
        tries += 1;
        let data = [block(known), block(known + 1)].concat();
        let answer = lun.run_out(compare_and_write(5), &data);
        match answer.sense_code() {
            None => {
                answer.expect_good();
                (done, known) = (done + 1, known + 1);
            }
            Some((key::MISCOMPARE, 0x1d, 0)) => known = read(),
            Some(other) => panic!("{other:02x?}"),
        }
    }
    tries
}

#[test]
fn two_guests_count_to_exactly_the_sum() {
    let times: u64 = std::env::var("THINLUN_TEST_INCREMENTS")
        .map_or(1_000_000, |text| text.parse().expect("a number"));
    let scratch = Scratch::new();
    let daemon = cluster(&scratch, 2, &scratch.image("disk.img", MIB), "");
    let guests: [FrontEnd; 2] = guests(&daemon);
    guests.iter().for_each(|guest| drop(guest.ready_lun(0, 0)));
    let start = Instant::now();
    let tries: u64 = std::thread::scope(|scope| {
        let count = |guest| scope.spawn(move || count_up(guest, FIRST_REQUEST_QUEUE, times / 2));
        let both = guests.each_ref().map(count);
        both.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let counter = guests[0].lun(0, 0).read16(5, 1);
    assert_eq!(counter[..8], times.to_be_bytes());
    println!("{times} increments by two guests in {tries} tries, {:.1?}", start.elapsed());
}

#[test]
fn plain_reads_see_no_half_of_an_atomic_write() {
    let scratch = Scratch::new();
    for options in ["", "cache=direct,block-size=4096"] {
        let disk = scratch.image("disk.img", MIB);
        let daemon = cluster(&scratch, 2, &disk, options);
        let [a, b] = guests(&daemon);
        let (la, lb) = (a.ready_lun(0, 0), b.ready_lun(0, 0));
        let blocks = 16;
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                for n in 0..200u8 {
                    let cdb =
                        Cdb::from_slice(&[0x9c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, blocks, 0, 0]);
                    la.run_out(cdb, &vec![n; usize::from(blocks) * la.block_size]).expect_good();
                }
            });
            while !writing.is_finished() {
                let seen = lb.read16(0, blocks.into());
                assert!(seen.iter().all(|byte| *byte == seen[0]), "{options}");
            }
        });
        assert!(!scratch.join("disk.img.thinlun-write").exists());
    }
}

#[test]
fn a_write_that_the_host_lost_half_of_is_made_whole_at_the_next_start() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    // As a host that crashed while block 3 of blocks 2 to 5 was written leaves it.
    let mut journal = b"thinlun: writing".to_vec();
    journal.extend(1024u64.to_be_bytes());
    journal.extend(2048u64.to_be_bytes());
    journal.extend([9; 2048]);
    frontend::daemon::host_write(&disk, 1024, &[9; 700]);
    std::fs::write(scratch.join("disk.img.thinlun-write"), &journal).unwrap();
    let builder = Daemon::builder(&scratch).disk(&disk, "readonly");
    let (code, why) = builder.expect_refusal();
    assert!(code == 1 && why.contains("serve the image writable once"), "{why}");
    let daemon = Daemon::builder(&scratch).disk(&disk, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let data = fe.ready_lun(0, 0).read16(1, 6);
    assert_eq!(data, [vec![0; 512], vec![9; 2048], vec![0; 512]].concat());
    assert!(!scratch.join("disk.img.thinlun-write").exists());
}

#[test]
fn saved_mode_pages_names_and_their_absence_survive() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let select = |lun: &Lun<'_>, page: &[u8], save: u8| {
        let list = [&[0; 4], page].concat();
        let cdb = Cdb::from_slice(&[0x15, 0x10 | save, 0, 0, list.len() as u8, 0]);
        lun.run_out(cdb, &list).expect_good();
    };
    let sense = |lun: &Lun<'_>, control: u8| {
        let cdb = Cdb::from_slice(&[0x1a, 8, control << 6 | 8, 0, 64, 0]);
        lun.run_in(cdb, 64).expect_good().data()[4..].to_vec()
    };
    let caching = |wce: u8| {
        let mut page = vec![8, 18, wce];
        page.resize(20, 0);
        page
    };
    for start in 0..3 {
        let daemon = Daemon::builder(&scratch).disk(&disk, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        assert_eq!(sense(&lun, 0)[0], 0x88, "PS");
        match start {
            0 => {
                assert_eq!([sense(&lun, 0)[2], sense(&lun, 3)[2]], [4, 4]);
                select(&lun, &caching(0), 1);
                select(&lun, &caching(4), 0);
                assert_eq!([sense(&lun, 0)[2], sense(&lun, 3)[2], sense(&lun, 2)[2]], [4, 0, 4]);
                fe.tmf(Tmf::LogicalUnitReset, lun.address, 0);
                lun.clear_unit_attentions();
                assert_eq!(sense(&lun, 0)[2], 0, "a reset brings back what was saved");
            }
            1 => {
                assert_eq!([sense(&lun, 0)[2], sense(&lun, 3)[2]], [0, 0]);
                select(&lun, &caching(4), 1);
            }
            _ => assert_eq!([sense(&lun, 0)[2], sense(&lun, 3)[2]], [4, 4]),
        }
    }
}
