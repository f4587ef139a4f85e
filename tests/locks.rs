//! Blocks that a command has for itself, and those who wait for them: across disks nobody holds one while he waits for
//! another, and whoever waits is in nobody's way.

mod frontend;
mod mounts;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use frontend::cdb::{FUA, write_same};
use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::scsi::{key, response};
use frontend::*;
use mounts::{Kind, Mount};

const SIZE: u64 = 8 * MIB;

/// The block where a slow host holds whoever writes there. It holds zeroes, and a self-test reads it.
const SLOW_LBA: u64 = SIZE / 512 / 2 - 1;
const SLOW: u64 = SLOW_LBA * 512;

/// Long enough that what must not wait for it has ended before, on a slow machine too.
const LONG_MS: u64 = 12_000;

/// A disk on which one write to a block takes very long.
fn slow_once() -> String {
    format!("fault=write:delay-ms-{LONG_MS}@{SLOW}-{}*1", SLOW + 512)
}

fn cscd(lun: &Lun<'_>) -> Vec<u8> {
    let naa = lun.vpd(0x83)[8..16].to_vec();
    [&[0xe4, 0, 0, 0, 1, 3, 0, 8][..], &naa, &[0; 12], &[0, 0, 2, 0]].concat()
}

/// EXTENDED COPY(LID1) of blocks to the same blocks of another disk.
fn copy(from: &Lun<'_>, to: &Lun<'_>, lba: u64, count: u16) -> ScsiRequest {
    let mut segment = vec![2, 0, 0, 24, 0, 0, 0, 1, 0, 0];
    segment.extend(count.to_be_bytes());
    segment.extend(lba.to_be_bytes());
    segment.extend(lba.to_be_bytes());
    let head = [0, 0x30, 0, 64, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    let list = [&head[..], &cscd(from), &cscd(to), &segment].concat();
    from.request(cdb::extended_copy_lid1(list.len() as u32)).data_out(list)
}

fn write_atomic(lba: u64, blocks: u8) -> Cdb {
    Cdb::new(0x9c).be64(2, lba).byte(13, blocks)
}

/// COMPARE AND WRITE of a block that holds `old` everywhere.
fn swap(lun: &Lun<'_>, lba: u64, old: u8, new: u8) -> ScsiRequest {
    let data = [[old; 512], [new; 512]].concat();
    lun.request(cdb::compare_and_write(lba, 1)).data_out(data)
}

/// A guest with two queues that take as much as a test has to say.
fn guest(daemon: &Daemon, port: usize) -> FrontEnd {
    FrontEnd::builder().queues(2).queue_size(1024).connect_to(daemon, port)
}

/// A COMPARE AND WRITE of the slow block, which has it for itself when this returns.
fn take(lun: &Lun<'_>) -> Ticket {
    let ticket = lun.submit(&swap(lun, SLOW_LBA, 0, 1));
    // A queue begins its commands in the order they came.
    lun.test_unit_ready();
    ticket
}

fn is_done(guest: &FrontEnd, ticket: Ticket) -> bool {
    guest.queue(ticket.queue).peek(ticket)
}

fn pair(directory: &Path, options: [&str; 2], ports: usize) -> (Scratch, Daemon) {
    let scratch = Scratch::new();
    let paths: [PathBuf; 2] = ["a.img", "b.img"].map(|name| directory.join(name));
    let mut builder = Daemon::builder(&scratch).ports(ports);
    for ((path, options), seed) in paths.iter().zip(options).zip(1..) {
        let mut bytes = Rng::new(seed).bytes(SIZE as usize);
        bytes[SLOW as usize..][..512].fill(0);
        std::fs::write(path, bytes).unwrap();
        builder = builder.disk(path, options);
    }
    (scratch, builder.spawn())
}

/// Two copies in opposite directions, and on either disk a guest that takes blocks of what is copied for itself, again
/// and again: all of them go on.
#[test]
fn copies_in_opposite_directions_and_locks_on_both_disks_go_on() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let (_scratch, daemon) = pair(&mount.path(), [""; 2], 4);
        let guests: [FrontEnd; 4] = std::array::from_fn(|port| guest(&daemon, port));
        let luns = |guest: usize| [guests[guest].ready_lun(0, 0), guests[guest].ready_lun(0, 1)];
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (done, luns) = (&done, &luns);
            for disk in 0..2 {
                scope.spawn(move || {
                    let lun = &luns(2 + disk)[disk];
                    let mut rounds = 0u32;
                    while !done.load(Ordering::Acquire) || rounds < 100 {
                        let taken = match rounds % 2 {
                            0 => lun.execute(&swap(lun, 100, 0, 0)),
                            _ => lun.run_out(write_atomic(8000, 8), &[7; 8 * 512]),
                        };
                        let code = taken.sense_code().map(|(key, ..)| key);
                        assert!(code.is_none_or(|code| code == key::MISCOMPARE), "{taken:?}");
                        rounds += 1;
                    }
                });
            }
            let copies = [0, 1].map(|disk| {
                scope.spawn(move || {
                    let luns = luns(disk);
                    let copy = copy(&luns[disk], &luns[1 - disk], 0, (SIZE / 512) as u16);
                    (0..150).for_each(|_| drop(luns[disk].execute(&copy).expect_good()));
                })
            });
            let ended = copies.map(|copy| copy.join());
            done.store(true, Ordering::Release);
            ended.into_iter().for_each(|copy| copy.unwrap());
        });
    }
}

/// While a host that is slow keeps a COMPARE AND WRITE from ending, more commands wait for its block than the disk has
/// threads, of every kind. What is about other blocks is done meanwhile, and the waiting can be aborted.
#[test]
fn who_waits_for_a_block_is_in_nobodys_way() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", SIZE);
    let other = scratch.image("other.img", SIZE);
    let builder = Daemon::builder(&scratch).disk(&disk, &slow_once()).disk(&other, "");
    let daemon = builder.ports(3).spawn();
    let guests: [FrontEnd; 3] = std::array::from_fn(|port| guest(&daemon, port));
    let [holder, waiter, free] = guests.each_ref().map(|guest| guest.ready_lun(0, 0));
    holder.write16(0, &vec![5; MIB as usize]);
    let holding = take(&holder);
    let unmap = cdb::unmap_list(&[(16, 8), (SLOW_LBA, 1)]);
    let waiting: Vec<ScsiRequest> = (0..20)
        .flat_map(|_| {
            let request = |cdb| waiter.request(cdb);
            [
                request(cdb::read16(SLOW_LBA - 1, 2)).data_in(1024),
                request(cdb::write16(SLOW_LBA, 1).or(1, FUA)).data_out([2; 512]),
                request(cdb::verify16(0, SLOW_LBA, 1)),
                request(cdb::unmap(false, unmap.len() as u16)).data_out(unmap.clone()),
                request(cdb::write_same16(0, SLOW_LBA, 1)).data_out([3; 512]),
                request(cdb::write_same16(write_same::UNMAP, SLOW_LBA, 1)).data_out([0; 512]),
                request(cdb::write_and_verify16(1, SLOW_LBA, 1)).data_out([4; 512]),
                swap(&waiter, SLOW_LBA, 9, 9),
            ]
        })
        .chain((0..8).map(|_| waiter.request(write_atomic(SLOW_LBA, 1)).data_out([6; 512])))
        .collect();
    let second = waiter.on_queue(FIRST_REQUEST_QUEUE + 1);
    let half = waiting.len() / 2;
    let tickets: Vec<_> = waiting[..half].iter().map(|request| waiter.submit(request)).collect();
    let others: Vec<_> = waiting[half..].iter().map(|request| second.submit(request)).collect();
    // Everything about other blocks, by another guest.
    for _ in 0..3 {
        assert_eq!(free.read16(0, 2048), vec![5; MIB as usize]);
        free.run_in(cdb::get_lba_status16(SLOW_LBA, 24, 0), 24).expect_good();
        free.run_out(cdb::write16(4, 1).or(1, FUA), &[5; 512]).expect_good();
        let list = cdb::unmap_list(&[(4096, 8)]);
        free.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
        free.run_out(cdb::write_same16(0, 4096, 8), &[7; 512]).expect_good();
        free.run(cdb::verify16(0, 0, 2048)).expect_good();
        free.execute(&swap(&free, 12_000, 0, 0)).expect_good();
        free.run_out(write_atomic(12_001, 1), &[1; 512]).expect_good();
        free.synchronize_cache();
        let copied = free.front_end().ready_lun(0, 1);
        free.execute(&copy(&free, &copied, 0, 2048)).expect_good();
        assert_eq!(copied.read16(0, 2048), vec![5; MIB as usize]);
    }
    // A self-test reads the middle block, which is taken.
    free.run(Cdb::new(0x1d).byte(1, 0x04)).expect_good();
    assert!(!is_done(&guests[0], holding), "it was all done while the block was taken");
    // Those who wait can be taken back.
    assert_eq!(guests[1].tmf(Tmf::AbortTaskSet, waiter.address, 0), response::OK);
    assert!(!is_done(&guests[0], holding), "nor did that wait for the block");
    for ticket in tickets.into_iter().chain(others) {
        let answer = guests[1].queue(ticket.queue).try_take(ticket).expect("ended before");
        assert_eq!(ScsiResponse::parse(&answer).response, response::ABORTED);
    }
    guests[0].wait(holding).expect_good();
    assert_eq!(free.read16(SLOW_LBA, 1), [1; 512], "nothing of what was aborted was done");
}

/// What waited is done when the block is free, each once.
#[test]
fn who_waited_has_his_turn() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", SIZE);
    let options = format!("fault=write:delay-ms-400@{SLOW}-{}*1", SLOW + 512);
    let daemon = Daemon::builder(&scratch).disk(&disk, &options).ports(2).spawn();
    let guests: [FrontEnd; 2] = std::array::from_fn(|port| guest(&daemon, port));
    let [a, b] = guests.each_ref().map(|guest| guest.ready_lun(0, 0));
    let first = take(&a);
    let add = |n: u8| b.submit(&swap(&b, SLOW_LBA, n, n + 1));
    let reads = || b.submit(&b.request(cdb::read16(SLOW_LBA, 1)).data_in(512));
    // Each COMPARE AND WRITE finds what the one before has left, and each read what was written before it was given: who
    // waits for a block has it in the order of coming.
    let waiting: Vec<_> = (1..60u8).map(|n| (add(n), reads())).collect();
    guests[0].wait(first).expect_good();
    for (n, (added, read)) in (2u8..).zip(waiting) {
        guests[1].wait(added).expect_good();
        assert_eq!(guests[1].wait(read).expect_good().data(), [n; 512]);
    }
    assert_eq!(a.read16(SLOW_LBA, 1), [60; 512]);
}

/// A copy that waits for a block of one disk holds nothing of the other, and writes what it should in the end.
#[test]
fn a_copy_waits_for_one_disk_and_holds_none_of_the_other() {
    std::thread::scope(|scope| {
        for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
            // The copy goes to the slow disk, or comes from it.
            scope.spawn(move || wait_for_one_disk(kind, 0));
            scope.spawn(move || wait_for_one_disk(kind, 1));
        }
    });
}

fn wait_for_one_disk(kind: Kind, from: usize) {
    let Some(mount) = Mount::new(kind, 400) else { return };
    let slow = slow_once();
    let (_scratch, daemon) = pair(&mount.path(), ["", &slow], 3);
    let guests: [FrontEnd; 3] = std::array::from_fn(|port| guest(&daemon, port));
    let luns = |guest: usize| [0, 1].map(|lun| guests[guest].ready_lun(0, lun));
    let (holders, copiers, free) = (luns(0), luns(1), luns(2));
    let holding = take(&holders[1]);
    let request = copy(&copiers[from], &copiers[1 - from], 0, (SIZE / 512) as u16);
    let copying = copiers[from].submit(&request);
    // Blocks of the other disk, what is copied to or from the taken one included, are to be had.
    for _ in 0..200 {
        let taken = free[0].execute(&swap(&free[0], SLOW_LBA, 0, 0));
        assert!(taken.sense_code().is_none_or(|(key, ..)| key == key::MISCOMPARE));
        free[0].run_out(write_atomic(100, 1), &[9; 512]).expect_good();
    }
    assert!(!is_done(&guests[0], holding), "{kind:?}: the block is not taken any more");
    assert!(!is_done(&guests[1], copying), "{kind:?}: the copy waits");
    guests[0].wait(holding).expect_good();
    guests[1].wait(copying).expect_good();
    // What was taken went before the copy, which found it, or came over it.
    let blocks = [0, 1].map(|disk: usize| copiers[disk].read16(SLOW_LBA, 1));
    assert_eq!(blocks[0], blocks[1], "{kind:?}");
    assert_eq!(blocks[0] == [1; 512], from == 1, "{kind:?}");
    let whole = [0, 1].map(|disk: usize| copiers[disk].read16(8192, 4096));
    assert!(whole[0] == whole[1], "{kind:?}: the rest");
}
