//! Tokens: who may use them, what they take of the host, how many an initiator can have, and what is said when one cannot be
//! made.

mod frontend;
mod mounts;

use std::path::PathBuf;

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::pattern::{Rng, assert_same};
use frontend::scsi::{key, response, sense};
use frontend::third_party::*;
use frontend::*;
use mounts::{Hang, Hanging, Kind, Mount};

const SIZE: u64 = 8 * MIB;
/// File systems on which a token keeps what was there when it was made.
const REFLINKS: [Kind; 2] = [Kind::Xfs, Kind::Btrfs];

const NOT_REACHABLE: sense::Code = (key::COPY_ABORTED, 0x0d, 2);
const NO_ROD: sense::Code = (5, 0x55, 0x0c);
const TOO_MANY_TOKENS: sense::Code = (5, 0x55, 0x0d);
const TOO_MANY_COPIES: sense::Code = (5, 0x55, 0x03);

/// Disks of one size on a file system that shares blocks.
fn disks<const N: usize>(mount: &Mount, size: u64) -> [PathBuf; N] {
    std::array::from_fn(|n| {
        let path = mount.path().join(format!("{n}.img"));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    })
}

fn used(mount: &Mount) -> u64 {
    let _ = std::process::Command::new("sync").arg("-f").arg(mount.path()).status();
    let stat = nix::sys::statvfs::statvfs(&mount.path()).unwrap();
    (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
}

fn make(lun: &Lun<'_>, id: u32, kind: Option<u32>, ranges: &[(u64, u32)]) -> ScsiResponse {
    let (cdb, list) = populate_request(id, 600, kind, ranges);
    lun.run_out(cdb, &list)
}

/// The tokens that REPORT ALL ROD TOKENS tells of.
fn count_tokens(lun: &Lun<'_>) -> usize {
    let all = lun.run_in(cdb::receive_copy_lid4(0x08, 0, 32768), 32768).expect_good();
    (all.data().len() - 8) / 128
}

fn reserve(lun: &Lun<'_>, kind: u8) {
    for (action, key, other) in [(6, 0u64, 0xbu64), (1, 0xb, 0)] {
        let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
        list.resize(24, 0);
        lun.run_out(cdb::persistent_reserve_out(action, kind, 24), &list).expect_good();
    }
}

/// A token is no way around what its disk allows, whether it has kept the data or reads it there.
#[test]
fn a_token_does_not_outlive_the_right_to_read_its_disk() {
    for kind in [Kind::Xfs, Kind::Ext4] {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let [from, to] = disks(&mount, SIZE);
        let daemon = Daemon::builder(&scratch).disk(&from, "").disk(&to, "").ports(2).spawn();
        let (a, b) = (FrontEnd::connect(&daemon), FrontEnd::builder().connect_to(&daemon, 1));
        let (from, to, owner) = (a.ready_lun(0, 0), a.ready_lun(0, 1), b.ready_lun(0, 0));
        from.write16(0, &[7; 4096]);
        let token = populate(&from, 1, 600, &[(0, 8)]).0;
        let write = || write_token(&to, 2, &token, 0, 0, &[(0, 8)]);
        from.run(cdb::start_stop_unit(0)).expect_good();
        write().expect_sense(NOT_REACHABLE);
        from.run(cdb::start_stop_unit(1)).expect_good();
        // Exclusive access: nobody else may read it.
        reserve(&owner, 3);
        write().expect_sense(NOT_REACHABLE);
        assert_same(&to.read16(0, 8), &[0; 4096], "nothing was copied");
        // Who holds the reservation may, and so may all under one that only keeps writers out.
        write_token(&b.ready_lun(0, 1), 2, &token, 0, 0, &[(8, 8)]).expect_good();
        let mut list = [0xbu64.to_be_bytes(), 0u64.to_be_bytes()].concat();
        list.resize(24, 0);
        owner.run_out(cdb::persistent_reserve_out(3, 0, 24), &list).expect_good();
        reserve(&owner, 1);
        write().expect_good();
        assert_same(&to.read16(0, 16), &[7; 8192], "both copies");
    }
}

/// What a disk takes of its host stays below its limit, tokens and all that is written after them included.
#[test]
fn a_space_limit_holds_for_tokens_too() {
    const LIMIT: u64 = 20 * MIB;
    for kind in REFLINKS {
        let Some(mount) = Mount::new(kind, 512) else { continue };
        let scratch = Scratch::new();
        let [image] = disks(&mount, 64 * MIB);
        let daemon = Daemon::builder(&scratch).disk(&image, "space-limit=20M").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let mut rng = Rng::new(1);
        let before = used(&mount);
        let mut write =
            |mib: u64| lun.run_out(cdb::write16(mib * 2048, 2048), &rng.bytes(MIB as usize));
        for round in 0..6 {
            // In halves, so that each has extents of its own.
            (0..8).for_each(|mib| drop(write(mib).expect_good()));
            lun.synchronize_cache();
            (8..16).for_each(|mib| drop(write(mib).expect_good()));
            lun.synchronize_cache();
            // As it is now if there is room for that, else as it will be: the initiator did not ask for either.
            make(&lun, round, None, &[(0, 16 * 2048)]).expect_good();
            let taken = used(&mount).saturating_sub(before);
            assert!(taken < LIMIT + 4 * MIB, "{kind:?}: {taken} bytes are taken");
        }
        // Where it asks, it is told.
        make(&lun, 10, Some(POINT_IN_TIME), &[(0, 16 * 2048)]).expect_sense(NO_ROD);
        // With less on the disk there is room for a token: for its own blocks, or on btrfs, which keeps extents as a whole, for
        // all that the disk has.
        let list = cdb::unmap_list(&[(8 * 2048, 8 * 2048)]);
        lun.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
        make(&lun, 11, Some(POINT_IN_TIME), &[(0, 2 * 2048)]).expect_good();
        // What is there can be written again, holes as far as there is room.
        (0..8).for_each(|mib| drop(write(mib).expect_good()));
        lun.synchronize_cache();
        write(20).expect_good();
        (21..40).for_each(|mib| drop(write(mib)));
        write(50).expect_sense(sense::SPACE_ALLOCATION_FAILED);
        let log = lun.run_in(cdb::log_sense(0x0c, 0, 28), 28).expect_good();
        assert_eq!(log.data()[8..12], [0; 4], "available");
        let taken = used(&mount).saturating_sub(before);
        assert!(taken < LIMIT + 4 * MIB, "{kind:?}: {taken} bytes are taken");
        // With the token goes what it has kept.
        let token = token_information(&lun, 11).2[2..].to_vec();
        write_token(&lun, 12, &token, 0x02, 0, &[(0, 8)]).expect_good();
        eventually("there is room again", || write(50).is_good());
    }
}

/// What one initiator takes, no other is short of; and it is told that there is no more, not to try again.
#[test]
fn each_initiator_has_a_share() {
    let scratch = Scratch::new();
    let paths = ["a.img", "b.img"].map(|name| scratch.image(name, SIZE));
    let builder = Daemon::builder(&scratch).disk(&paths[0], "");
    let daemon =
        builder.disk(&paths[1], "fault=zero:delay-ms-300+discard:delay-ms-300").ports(2).spawn();
    let guests = [0, 1].map(|port| FrontEnd::builder().queues(2).connect_to(&daemon, port));
    let [a, b] = guests.each_ref().map(|fe| [fe.ready_lun(0, 0), fe.ready_lun(0, 1)]);
    // A result of the other, before all that follows.
    let kept = populate(&b[0], 0x77, 600, &[(0, 1)]).0;
    // Results: as many as one likes, each of which makes one's own oldest be forgotten.
    let nothing = |id| list_lid4(id, false, &[], &[]);
    (1..400).for_each(|id| drop(xcopy_lid4(&a[0], &nothing(id)).expect_good()));
    assert_eq!(token_information(&b[0], 0x77).2[2..], kept);
    assert_eq!(status_of(&a[0], 399), Some((copy_status::DONE, 0)));
    assert_eq!(status_of(&a[0], 1), None);
    // Tokens.
    let mut made = 0;
    let refused = loop {
        let answer = make(&a[0], 1000 + made, None, &[(0, 1)]);
        if !answer.is_good() {
            break answer;
        }
        made += 1;
    };
    refused.expect_sense(TOO_MANY_TOKENS);
    assert_eq!(made, 32, "half of them");
    for n in 0..31 {
        make(&b[0], 2000 + n, None, &[(0, 1)]).expect_good();
    }
    make(&b[0], 3000, None, &[(0, 1)]).expect_sense(TOO_MANY_TOKENS);
    // Copies under way: zeroes, each block of which takes its time.
    let mut zeroes = vec![0; 512];
    zeroes[..8].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 1, 0xf8]);
    let ranges: Vec<(u64, u32)> = (0..64).map(|n| (n * 8, 8)).collect();
    let begin = |lun: &Lun<'_>, id| write_token(lun, id, &zeroes, 1, 0, &ranges);
    let begun = (0..4).filter(|id| begin(&a[1], 5000 + id).is_good()).count();
    assert_eq!(begun, 4);
    begin(&a[1], 5100).expect_sense(TOO_MANY_COPIES);
    let limits = a[0].run_in(cdb::receive_copy(3, 0, 256), 256).expect_good();
    assert_eq!((&limits.data()[34..36], limits.data()[36]), (&[0, 4][..], 4), "as many as it says");
    begin(&b[1], 5000).expect_good();
    for fe in &guests {
        assert_eq!(fe.tmf(Tmf::LogicalUnitReset, a[1].address, 0), response::OK);
    }
}

/// Tokens that are being made at the same time are no more than there may be when they are there; and who can have none has
/// nothing read for it.
#[test]
fn tokens_that_are_made_at_once_are_counted() {
    const SHARE: u32 = 32;
    for kind in REFLINKS {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let [image] = disks(&mount, SIZE);
        let faults = "fault=copy:delay-ms-300@0-1048576+copy:eio@7340032-7341056";
        let daemon = Daemon::builder(&scratch).disk(&image, faults).ports(2).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(0, &vec![1; MIB as usize]);
        lun.write16(7 * 2048, &vec![1; MIB as usize]);
        for id in 1..SHARE {
            make(&lun, id, Some(BY_REFERENCE), &[(0, 1)]).expect_good();
        }
        let ranges: Vec<(u64, u32)> = (0..4).map(|n| (n * 16, 8)).collect();
        let tickets: Vec<Ticket> = (100..104)
            .map(|id| {
                let (cdb, list) = populate_request(id, 600, None, &ranges);
                lun.submit(&lun.request(cdb).data_out(list))
            })
            .collect();
        let answers: Vec<ScsiResponse> = tickets.into_iter().map(|t| fe.wait(t)).collect();
        assert_eq!(answers.iter().filter(|answer| answer.is_good()).count(), 1, "{kind:?}");
        for answer in answers.iter().filter(|answer| !answer.is_good()) {
            answer.expect_sense(TOO_MANY_TOKENS);
        }
        assert_eq!(count_tokens(&lun), SHARE as usize, "{kind:?}");
        make(&lun, 200, None, &[(7 * 2048, 2)]).expect_sense(TOO_MANY_TOKENS);
    }
}

/// What a token has kept on a host that hangs is given back when that is over, and nobody's tokens of other disks wait for it.
#[test]
fn a_token_of_a_host_that_hangs_holds_up_no_others() {
    for kind in REFLINKS {
        let Some(host) = Hanging::new(Hang::Frozen(kind)) else { continue };
        let scratch = Scratch::new();
        let paths = [host.path().join("hung.img"), scratch.join("other.img")];
        for path in &paths {
            std::fs::File::create(path).unwrap().set_len(MIB).unwrap();
        }
        let daemon = Daemon::builder(&scratch).disk(&paths[0], "").disk(&paths[1], "").spawn();
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let (lun, other) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        lun.write16(0, &[1; 4096]);
        lun.synchronize_cache();
        let kept = populate(&other, 2, 600, &[(0, 8)]).0;
        let token = populate(&lun, 1, 2, &[(0, 8)]).0;
        assert_eq!(token[..4], POINT_IN_TIME.to_be_bytes(), "{kind:?}");
        let hung = host.hang();
        eventually("its time is over", || count_tokens(&other) == 1);
        write_token(&other, 3, &kept, 0, 0, &[(8, 8)]).expect_good();
        populate(&other, 4, 600, &[(0, 8)]);
        drop(hung);
    }
}

/// Making a token of much that is in pieces takes long, and can be ended.
#[test]
fn a_token_that_is_being_made_can_be_aborted() {
    for kind in REFLINKS {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let [image] = disks(&mount, SIZE);
        // It is asked at each step whether it may go on, and does not come to the last.
        let faults = format!("fault=copy:delay-ms-200+copy:eio@{}-{}", 63 * 8192, 63 * 8192 + 4096);
        let daemon = Daemon::builder(&scratch).disk(&image, &faults).ports(2).spawn();
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(0, &vec![1; MIB as usize]);
        let ranges: Vec<(u64, u32)> = (0..64).map(|n| (n * 16, 8)).collect();
        let made = || mount.unnamed(&daemon.fds());
        for way in ["abort task set", "reset", "reservation"] {
            let (cdb, list) = populate_request(1, 600, None, &ranges);
            let ticket = lun.submit(&lun.request(cdb).data_out(list));
            eventually("it is being made", || made() > 0);
            match way {
                "abort task set" => drop(fe.tmf(Tmf::AbortTaskSet, lun.address, 0)),
                "reset" => drop(fe.tmf(Tmf::LogicalUnitReset, lun.address, 0)),
                _ => {
                    let other = FrontEnd::builder().connect_to(&daemon, 1);
                    reserve(&other.ready_lun(0, 0), 3);
                }
            }
            let answer = fe.wait(ticket);
            match way {
                "abort task set" => assert_eq!(answer.response, response::ABORTED),
                "reset" => assert_eq!(answer.response, response::RESET),
                _ => drop(answer.expect_sense(NOT_REACHABLE)),
            }
            eventually("nothing of it is left", || made() == 0);
            lun.clear_unit_attentions();
            if way != "reservation" {
                assert_eq!(count_tokens(&lun), 0, "{kind:?}, {way}");
            }
        }
    }
}

/// A token that cannot be made names the block of the disk that cannot be read, and no other.
#[test]
fn a_token_that_cannot_be_made_says_where_and_why() {
    const LBA: u64 = 5000;
    for kind in REFLINKS {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let [image] = disks(&mount, SIZE);
        let fault = format!("fault=copy:eio@{}-{}", LBA * 512, LBA * 512 + 512);
        let daemon = Daemon::builder(&scratch).disk(&image, &fault).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        for at in (0..SIZE / 512).step_by(2048) {
            lun.write16(at, &vec![1; MIB as usize]);
        }
        for asked in [None, Some(POINT_IN_TIME)] {
            let answer = make(&lun, 1, asked, &[(100, 50), (LBA, 40)]);
            let found = answer.expect_sense((key::MEDIUM_ERROR, 0x11, 0));
            assert_eq!(found.information, Some(LBA));
        }
        // By reference nothing is read yet.
        make(&lun, 1, Some(BY_REFERENCE), &[(LBA, 40)]).expect_good();
        make(&lun, 2, Some(POINT_IN_TIME), &[(0, 1000)]).expect_good();
    }
}

/// On a host that is full a token has no room for what shares a block with something else: then it is read when it is used,
/// unless its maker wants it kept.
#[test]
fn a_full_host_has_no_room_for_a_token() {
    let Some(mount) = Mount::new(Kind::Xfs, 400) else { return };
    let scratch = Scratch::new();
    let [image] = disks(&mount, SIZE);
    let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &Rng::new(3).bytes(MIB as usize));
    lun.synchronize_cache();
    let mut step = 256 * MIB;
    let filler = std::fs::File::create(mount.path().join("filler")).unwrap();
    let mut at = 0;
    while step >= 4096 {
        let mode = nix::fcntl::FallocateFlags::empty();
        match nix::fcntl::fallocate(&filler, mode, at, step as i64) {
            Ok(()) => at += step as i64,
            Err(_) => step /= 2,
        }
    }
    let ranges = [(1, 100), (300, 101)];
    make(&lun, 1, Some(POINT_IN_TIME), &ranges).expect_sense(NO_ROD);
    let token = populate(&lun, 1, 0, &ranges).0;
    assert_eq!(token[..4], BY_REFERENCE.to_be_bytes());
}

/// The space of a token is given back when its time is over, though nobody asks.
#[test]
fn the_space_of_a_token_is_given_back_when_it_expires() {
    for kind in REFLINKS {
        let Some(mount) = Mount::new(kind, 400) else { continue };
        let scratch = Scratch::new();
        let [image] = disks(&mount, SIZE);
        let daemon = Daemon::builder(&scratch).disk(&image, "").spawn();
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        lun.write16(0, &vec![1; MIB as usize]);
        let kept = || mount.unnamed(&daemon.fds());
        populate(&lun, 2, 3600, &[(0, 2048)]);
        assert_eq!(kept(), 1, "{kind:?}");
        let brief = populate(&lun, 1, 1, &[(0, 2048)]).0;
        assert_eq!(brief[..4], POINT_IN_TIME.to_be_bytes(), "{kind:?}");
        eventually("the other is over", || kept() == 1);
        assert_eq!(count_tokens(&lun.on_queue(FIRST_REQUEST_QUEUE + 1)), 1);
    }
}
