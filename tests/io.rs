//! Data: everything written is read back, by every command, and is what the file on the host
//! holds.

mod frontend;
mod mounts;

use std::fs;

use frontend::cdb::{DPO, FUA, IMMED};
use frontend::daemon::{host_read, host_write};
use frontend::pattern::{assert_same, blocks};
use frontend::scsi::{sense, status};
use frontend::*;

const DISK: u64 = 4 * MIB;

/// A read or write CDB for an address and a number of blocks.
type Transfer = fn(u64, u32) -> Cdb;

/// The same with a BYTCHK value before them.
type Verify = fn(u8, u64, u32) -> Cdb;

const READS: [(&str, Transfer); 4] = [
    ("READ (6)", |lba, count| cdb::read6(lba as u32, count as u8)),
    ("READ (10)", |lba, count| cdb::read10(lba as u32, count as u16)),
    ("READ (12)", |lba, count| cdb::read12(lba as u32, count)),
    ("READ (16)", cdb::read16),
];

const WRITES: [(&str, Transfer); 4] = [
    ("WRITE (6)", |lba, count| cdb::write6(lba as u32, count as u8)),
    ("WRITE (10)", |lba, count| cdb::write10(lba as u32, count as u16)),
    ("WRITE (12)", |lba, count| cdb::write12(lba as u32, count)),
    ("WRITE (16)", cdb::write16),
];

const VERIFIES: [(&str, Verify); 3] = [
    ("VERIFY (10)", |check, lba, count| cdb::verify10(check, lba as u32, count as u16)),
    ("VERIFY (12)", |check, lba, count| cdb::verify12(check, lba as u32, count)),
    ("VERIFY (16)", cdb::verify16),
];

const WRITE_AND_VERIFIES: [(&str, Verify); 3] = [
    ("WRITE AND VERIFY (10)", |c, lba, n| cdb::write_and_verify10(c, lba as u32, n as u16)),
    ("WRITE AND VERIFY (12)", |c, lba, n| cdb::write_and_verify12(c, lba as u32, n)),
    ("WRITE AND VERIFY (16)", cdb::write_and_verify16),
];

fn with_lun(options: &str, test: impl FnOnce(&Daemon, &Lun<'_>)) {
    let daemon = Daemon::with_disk(DISK, options);
    let fe = FrontEnd::connect(&daemon);
    test(&daemon, &fe.ready_lun(0, 0));
}

#[track_caller]
fn assert_on_host(daemon: &Daemon, lun: &Lun<'_>, lba: u64, data: &[u8]) {
    let found = host_read(&daemon.disk(), lba * lun.block_size as u64, data.len());
    assert_same(&found, data, "the file on the host");
}

// ----- reading and writing --------------------------------------------------------------------

#[test]
fn every_write_and_every_read() {
    for options in ["", "block-size=4096", "physical-block-size=4096", "cache=writethrough"] {
        with_lun(options, |daemon, lun| {
            let mut stamp = 0;
            for (write_name, write) in WRITES {
                for count in [1, 2, 7, 64, 128] {
                    stamp += 1;
                    let lba = stamp % 5;
                    let data = blocks(lba, count as usize, lun.block_size, stamp);
                    lun.transfer_out(write(lba, count), &data);
                    for (read_name, read) in READS {
                        let found = lun.transfer_in(read(lba, count), count as usize);
                        assert_same(&found, &data, &format!("{write_name}, {read_name} {options}"));
                    }
                    assert_on_host(daemon, lun, lba, &data);
                }
            }
        });
    }
}

#[test]
fn capacity_and_block_sizes_are_as_asked_for() {
    for (options, logical, exponent) in [
        ("", 512, None),
        ("block-size=512,physical-block-size=512", 512, Some(0)),
        ("block-size=512,physical-block-size=4096", 512, Some(3)),
        ("block-size=4096", 4096, Some(0)),
        ("block-size=4096,physical-block-size=4096", 4096, Some(0)),
    ] {
        with_lun(options, |_, lun| {
            assert_eq!((lun.blocks, lun.block_size), (DISK / logical as u64, logical), "{options}");
            assert_eq!(lun.read_capacity10(), (lun.blocks as u32 - 1, logical as u32));
            let data = lun.read_capacity16();
            assert_eq!(data.len(), 32, "READ CAPACITY (16) has 32 bytes");
            if let Some(exponent) = exponent {
                assert_eq!(data[13] & 0x0f, exponent, "{options}");
            }
        });
    }
}

/// A transfer length of 0 means 256 blocks in the 6-byte commands.
#[test]
fn six_byte_commands_count_to_256() {
    with_lun("", |daemon, lun| {
        let data = blocks(0, 256, 512, 6);
        lun.transfer_out(cdb::write6(0, 0), &data);
        assert_same(&lun.transfer_in(cdb::read6(0, 0), 256), &data, "256 blocks");
        assert_on_host(daemon, lun, 0, &data);
    });
}

#[test]
fn fua_and_dpo_change_nothing_in_the_data() {
    for options in ["", "cache=writethrough", "block-size=4096"] {
        with_lun(options, |daemon, lun| {
            for (stamp, flags) in [0, FUA, DPO, FUA | DPO].into_iter().enumerate() {
                for (number, write) in WRITES.iter().enumerate().skip(1) {
                    let data = blocks(9, 8, lun.block_size, (stamp * 4 + number) as u64);
                    lun.transfer_out((write.1)(9, 8).or(1, flags), &data);
                    assert_on_host(daemon, lun, 9, &data);
                    for (_, read) in &READS[1..] {
                        let found = lun.transfer_in(read(9, 8).or(1, flags), 8);
                        assert_same(&found, &data, "a read with flags");
                    }
                }
            }
        });
    }
}

#[test]
fn large_transfers() {
    with_lun("", |daemon, lun| {
        let data = blocks(1, 8000, 512, 1);
        for step in [4096, 65536, 1 << 20] {
            let cuts = Cuts::DataEvery(step);
            let shape = Shape { readable: cuts.clone(), writable: cuts, ..Shape::default() };
            let lun = lun.with_shape(shape.indirect());
            lun.write16(1, &data);
            assert_same(&lun.read16(1, 8000), &data, "4 MB");
        }
        assert_on_host(daemon, lun, 1, &data);
    });
}

#[test]
fn what_the_host_writes_is_read() {
    for options in ["", "cache=direct", "readonly"] {
        with_lun(options, |daemon, lun| {
            let data = blocks(100, 100, 512, 3);
            host_write(&daemon.disk(), 100 * 512, &data);
            assert_same(&lun.read10(100, 100), &data, options);
            assert_same(&lun.read10(99, 1), &[0; 512], "the block before");
        });
    }
}

#[test]
fn what_a_guest_reads_is_no_access_on_the_host() {
    with_lun("", |daemon, lun| {
        // A file system notes the first access after a change (relatime).
        host_write(&daemon.disk(), 0, &[7; 4096]);
        let accessed = || fs::metadata(daemon.disk()).unwrap().accessed().unwrap();
        let before = accessed();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(lun.read10(0, 8).len(), 4096);
        assert_eq!(accessed(), before);
    });
}

#[test]
fn unwritten_parts_read_as_zeroes() {
    with_lun("", |_, lun| {
        lun.write10(1000, &blocks(1000, 1, 512, 1));
        assert_same(&lun.read10(0, 1000), &vec![0; 512_000], "the hole before");
        assert_same(&lun.read10(1001, 1000), &vec![0; 512_000], "the hole behind");
    });
}

/// Every block of a disk, with its own address in it: none is in another's place.
#[test]
fn every_block_is_in_its_place() {
    for options in ["", "block-size=4096", "cache=direct"] {
        with_lun(options, |daemon, lun| {
            let chunk = 64;
            for lba in (0..lun.blocks).step_by(chunk) {
                lun.write16(lba, &blocks(lba, chunk, lun.block_size, 5));
            }
            let whole = blocks(0, lun.blocks as usize, lun.block_size, 5);
            assert_on_host(daemon, lun, 0, &whole);
            for (number, block) in whole.chunks(lun.block_size).enumerate().step_by(7) {
                assert_same(&lun.read10(number as u32, 1), block, "one block");
            }
        });
    }
}

// ----- limits ---------------------------------------------------------------------------------

#[test]
fn the_last_block_and_no_further() {
    for options in ["", "block-size=4096", "readonly", "cache=direct"] {
        with_lun(options, |_, lun| {
            let end = lun.blocks;
            for (_, read) in READS {
                lun.transfer_in(read(end - 1, 1), 1);
                for (lba, count) in [(end, 1), (end - 1, 2), (end - 7, 8), (end + 1, 1)] {
                    let response = lun.run_read(read(lba, count), count as usize);
                    response.expect_sense(sense::LBA_OUT_OF_RANGE);
                }
            }
            for (lba, count) in [(u64::MAX, 1), (u64::MAX - 1, 2), (u64::MAX - 7, 8), (1 << 63, 1)]
            {
                let response = lun.run_read(cdb::read16(lba, count), count as usize);
                response.expect_sense(sense::LBA_OUT_OF_RANGE);
            }
            // Without blocks the address still has to be one.
            let response = lun.run(cdb::read16(end + 1, 0));
            response.expect_sense(sense::LBA_OUT_OF_RANGE);
        });
    }
}

#[test]
fn writing_behind_the_end_changes_nothing() {
    with_lun("", |daemon, lun| {
        let end = lun.blocks;
        for (_, write) in WRITES {
            for (lba, count) in [(end, 1), (end - 1, 2), (end - 7, 8)] {
                let data = vec![0xff; count as usize * 512];
                lun.run_out(write(lba, count), &data).expect_sense(sense::LBA_OUT_OF_RANGE);
            }
        }
        assert_same(&lun.read10(end as u32 - 8, 8), &[0; 4096], "the end of the disk");
        assert_eq!(fs::metadata(daemon.disk()).unwrap().len(), DISK, "the file did not grow");
    });
}

#[test]
fn other_commands_know_the_end_too() {
    with_lun("", |_, lun| {
        let end = lun.blocks;
        for (name, verify) in VERIFIES {
            println!("{name}");
            lun.run(verify(0, end - 1, 1)).expect_good();
            lun.run(verify(0, end, 1)).expect_sense(sense::LBA_OUT_OF_RANGE);
            let response = lun.run_out(verify(1, end - 1, 2), &[0; 1024]);
            response.expect_sense(sense::LBA_OUT_OF_RANGE);
        }
        for (name, write) in WRITE_AND_VERIFIES {
            println!("{name}");
            let response = lun.run_out(write(0, end - 1, 2), &[0; 1024]);
            response.expect_sense(sense::LBA_OUT_OF_RANGE);
        }
        let out_of_range = [
            cdb::synchronize_cache10(end as u32, 1),
            cdb::synchronize_cache16(end - 1, 2),
            cdb::pre_fetch10(end as u32, 1),
            cdb::pre_fetch16(end - 1, 2),
        ];
        for cdb in out_of_range {
            lun.run(cdb).expect_sense(sense::LBA_OUT_OF_RANGE);
        }
    });
}

#[test]
fn a_read_only_disk_is_not_written() {
    with_lun("readonly", |daemon, lun| {
        for (name, write) in WRITES {
            println!("{name}");
            let response = lun.run_out(write(0, 1), &[1; 512]);
            response.expect_sense(sense::WRITE_PROTECTED);
        }
        for (name, write) in WRITE_AND_VERIFIES {
            println!("{name}");
            let response = lun.run_out(write(0, 0, 1), &[1; 512]);
            response.expect_sense(sense::WRITE_PROTECTED);
        }
        lun.read10(0, 8);
        lun.run(cdb::verify10(0, 0, 8)).expect_good();
        lun.synchronize_cache();
        assert_on_host(daemon, lun, 0, &[0; 4096]);
        assert_eq!(lun.mode_sense10(0x3f)[3] & 0x80, 0x80, "the WP bit of MODE SENSE");
    });
}

/// Addresses above 2^32 and offsets above 2 TiB, in a sparse file.
#[test]
fn beyond_two_tebibytes() {
    let scratch = Scratch::new();
    let path = scratch.join("huge.img");
    if fs::File::create(&path).and_then(|file| file.set_len(3 * TIB)).is_err() {
        return mounts::skipped("the temporary directory takes no file of 3 TiB");
    }
    let daemon = Daemon::builder(&scratch).disk(&path, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    assert_eq!(lun.blocks, 3 * TIB / 512);
    assert_eq!(lun.read_capacity10(), (u32::MAX, 512));
    let low = blocks(5, 8, 512, 1);
    lun.write10(5, &low);
    for lba in [(1 << 32) - 4, (1 << 32) + 5, lun.blocks - 8] {
        let data = blocks(lba, 8, 512, 2);
        lun.write16(lba, &data);
        assert_same(&lun.read16(lba, 8), &data, "far away blocks");
        assert_same(&host_read(&path, lba * 512, 4096), &data, "the file");
    }
    assert_same(&lun.read10(5, 8), &low, "2^32 blocks before");
    let response = lun.run_read(cdb::read16(lun.blocks, 1), 1);
    response.expect_sense(sense::LBA_OUT_OF_RANGE);
}

// ----- verifying and caching ------------------------------------------------------------------

#[test]
fn verify_compares() {
    for options in ["", "block-size=4096", "cache=direct"] {
        with_lun(options, |_, lun| {
            let size = lun.block_size;
            let data = blocks(10, 8, size, 1);
            lun.write10(10, &data);
            for (name, verify) in VERIFIES {
                println!("{name} {options}");
                lun.run(verify(0, 10, 8)).expect_good();
                lun.run_out(verify(1, 10, 8), &data).expect_good();
                for at in [0, 1, size - 1, size, 3 * size + 77, 8 * size - 1] {
                    let mut other = data.clone();
                    other[at] ^= 0x10;
                    let response = lun.run_out(verify(1, 10, 8), &other);
                    let sense = response.expect_sense(sense::MISCOMPARE);
                    assert_eq!(sense.information, Some(at as u64), "the offset");
                }
                // BYTCHK 11b: one block is compared with each of the range.
                lun.run_out(verify(3, 10, 1), &data[..size]).expect_good();
                let response = lun.run_out(verify(3, 10, 2), &data[..size]);
                response.expect_sense(sense::MISCOMPARE);
                let response = lun.run_out(verify(2, 10, 1), &data[..size]);
                response.expect_sense(sense::INVALID_FIELD_IN_CDB);
                lun.run(verify(0, 10, 0)).expect_good();
                lun.run(verify(1, 10, 0)).expect_good();
            }
            let same = blocks(1, 1, size, 4).repeat(16);
            lun.write10(20, &same);
            lun.run_out(cdb::verify10(3, 20, 16), &same[..size]).expect_good();
            assert_same(&lun.read10(10, 8), &data, "verifying changes nothing");
        });
    }
}

#[test]
fn write_and_verify_writes() {
    for options in ["", "block-size=4096", "cache=direct"] {
        with_lun(options, |daemon, lun| {
            for (number, (name, write)) in WRITE_AND_VERIFIES.into_iter().enumerate() {
                println!("{name} {options}");
                for check in [0, 1] {
                    let data = blocks(10, 8, lun.block_size, number as u64 * 2 + u64::from(check));
                    lun.transfer_out(write(check, 10, 8), &data);
                    assert_same(&lun.read10(10, 8), &data, name);
                    assert_on_host(daemon, lun, 10, &data);
                }
                for reserved in [2, 3] {
                    let data = vec![0; 8 * lun.block_size];
                    let response = lun.run_out(write(reserved, 10, 8), &data);
                    response.expect_sense(sense::INVALID_FIELD_IN_CDB);
                }
            }
        });
    }
}

#[test]
fn caches_are_flushed_and_filled_on_request() {
    for options in ["", "readonly", "cache=direct", "cache=writethrough"] {
        with_lun(options, |_, lun| {
            let commands = [
                cdb::synchronize_cache10(0, 0),
                cdb::synchronize_cache10(5, 10),
                cdb::synchronize_cache10(5, 0),
                cdb::synchronize_cache10(0, 0).or(1, IMMED),
                cdb::synchronize_cache16(0, 0),
                cdb::synchronize_cache16(lun.blocks - 1, 1),
                cdb::pre_fetch10(0, 8),
                cdb::pre_fetch10(0, 0),
                cdb::pre_fetch10(0, 8).or(1, IMMED),
                cdb::pre_fetch16(8, 64),
            ];
            for cdb in commands {
                let response = lun.run(cdb);
                let met = response.status == status::CONDITION_MET && response.response == 0;
                assert!(response.is_good() || met, "{options} {cdb:?}: {response:?}");
            }
        });
    }
}

/// The WCE bit of the caching mode page, and DPOFUA in the header.
#[test]
fn the_cache_mode_is_told() {
    for (options, write_back) in
        [("", true), ("cache=writeback", true), ("cache=writethrough", false)]
    {
        with_lun(options, |_, lun| {
            let data = lun.mode_sense10(0x08);
            let descriptors = usize::from(u16::from_be_bytes([data[6], data[7]]));
            let page = &data[8 + descriptors..];
            assert_eq!(page[0] & 0x3f, 0x08, "the caching page");
            assert_eq!(page[2] & 0x04 != 0, write_back, "WCE with `{options}`");
            assert_eq!(data[3] & 0x10, 0x10, "DPOFUA");
        });
    }
}

/// O_DIRECT demands alignment of the host's buffers; the guest's may lie anywhere.
#[test]
fn direct_io_takes_buffers_at_any_address() {
    with_lun("cache=direct", |daemon, lun| {
        let mut stamp = 0;
        for skew in [0, 1, 2, 3, 7, 15, 33, 63] {
            for step in [512, 1000, 4096, 100_000] {
                for (lba, count) in [(0, 1), (1, 1), (3, 9), (8, 64), (7, 129)] {
                    stamp += 1;
                    let cuts = Cuts::DataEvery(step);
                    let shape =
                        Shape { readable: cuts.clone(), writable: cuts, ..Shape::default() };
                    let lun = lun.with_shape(shape.indirect().skewed(skew));
                    let data = blocks(lba, count, 512, stamp);
                    lun.write16(lba, &data);
                    let found = lun.read16(lba, count as u32);
                    assert_same(&found, &data, &format!("skew {skew}, buffers of {step}"));
                    assert_on_host(daemon, &lun, lba, &data);
                }
            }
        }
    });
}

/// Transfers that go piece by piece, where the pieces meet.
#[test]
fn long_transfers_at_odd_addresses_are_whole() {
    for options in ["cache=direct", "cache=direct,block-size=4096"] {
        with_lun(options, |daemon, lun| {
            let size = lun.block_size;
            let len = (3 * MIB + 64 * KIB) as usize + size;
            let lun = lun.with_shape(Shape::default().skewed(3));
            let count = (len / size) as u32;
            let data = blocks(1, len / size, size, 7);
            lun.write16(1, &data);
            assert_on_host(daemon, &lun, 1, &data);
            assert_same(&lun.read16(1, count), &data, options);
            for at in [0, 65_535, 65_536, MIB as usize - 1, MIB as usize, len - 1] {
                let mut other = data.clone();
                other[at] ^= 1;
                let response = lun.run_out(cdb::verify16(1, 1, count), &other);
                let sense = response.expect_sense(sense::MISCOMPARE);
                assert_eq!(sense.information, Some(at as u64), "{options}");
            }
            let half = 255 * size;
            let new = blocks(1, 255, size, 17);
            for at in [0, 65_535, 65_536, half - 1] {
                let mut other = data[..half].to_vec();
                other[at] ^= 1;
                other.extend_from_slice(&new);
                let response = lun.run_out(cdb::compare_and_write(1, 255), &other);
                let sense = response.expect_sense(sense::MISCOMPARE);
                assert_eq!(sense.information, Some(at as u64), "{options}");
            }
            assert_on_host(daemon, &lun, 1, &data);
            let both = [&data[..half], &new].concat();
            lun.run_out(cdb::compare_and_write(1, 255), &both).expect_good();
            assert_on_host(daemon, &lun, 1, &[&new, &data[half..]].concat());
        });
    }
}

// ----- against a model ------------------------------------------------------------------------

/// What a disk ought to hold.
struct Model {
    bytes: Vec<u8>,
    block_size: usize,
}

impl Model {
    fn range(&mut self, lba: u64, count: u32) -> &mut [u8] {
        let start = lba as usize * self.block_size;
        &mut self.bytes[start..start + count as usize * self.block_size]
    }
}

/// One random command, and what its answer has to be.
struct Step {
    request: ScsiRequest,
    data_in: Option<Vec<u8>>,
}

/// Commands at the same time have ranges of their own, so that their order does not matter.
fn random_batch(rng: &mut Rng, lun: &Lun<'_>, model: &mut Model, batch: u64) -> Vec<Step> {
    const SLOT: u64 = 256;
    let slots = lun.blocks / SLOT;
    let offset = rng.below(slots);
    let wanted = rng.between(1, 24.min(slots));
    (0..wanted)
        .map(|slot| {
            let start = (slot + offset) % slots * SLOT;
            let count = if rng.one_in(3) { rng.between(1, 200) } else { rng.between(1, 16) };
            let lba = start + rng.below(SLOT - count + 1);
            random_step(rng, lun, model, lba, count as u32, batch)
        })
        .collect()
}

fn random_step(
    rng: &mut Rng,
    lun: &Lun<'_>,
    model: &mut Model,
    lba: u64,
    count: u32,
    batch: u64,
) -> Step {
    let flags = *rng.pick(&[0, 0, 0, FUA, DPO]);
    let shape = random_shape(rng);
    let data = blocks(lba, count as usize, lun.block_size, batch);
    let in_range = model.range(lba, count);
    let mut data_in = None;
    let request = match rng.below(10) {
        0..=3 => {
            data_in = Some(in_range.to_vec());
            let (number, read) = pick_numbered(rng, &READS);
            let cdb = if number == 0 { read(lba, count) } else { read(lba, count).or(1, flags) };
            lun.request(cdb).data_in(in_range.len())
        }
        4..=6 => {
            in_range.copy_from_slice(&data);
            let (number, write) = pick_numbered(rng, &WRITES);
            let cdb = if number == 0 { write(lba, count) } else { write(lba, count).or(1, flags) };
            lun.request(cdb).data_out(data)
        }
        7 => {
            in_range.copy_from_slice(&data);
            let (_, write) = rng.pick(&WRITE_AND_VERIFIES);
            lun.request(write(rng.below(2) as u8, lba, count)).data_out(data)
        }
        8 => {
            let (_, verify) = rng.pick(&VERIFIES);
            lun.request(verify(1, lba, count)).data_out(in_range.to_vec())
        }
        _ => lun.request(cdb::synchronize_cache16(lba, count)),
    };
    Step { request: request.shape(shape), data_in }
}

fn pick_numbered(rng: &mut Rng, transfers: &[(&str, Transfer)]) -> (usize, Transfer) {
    let number = rng.below(transfers.len() as u64) as usize;
    (number, transfers[number].1)
}

fn random_shape(rng: &mut Rng) -> Shape {
    let cuts = match rng.below(4) {
        0 => Cuts::Natural,
        1 => Cuts::Joined,
        2 => Cuts::DataEvery(rng.between(5000, 20_000) as usize),
        _ => Cuts::At(vec![rng.between(1, 200) as usize]),
    };
    Shape {
        readable: cuts.clone(),
        writable: cuts,
        indirect: rng.one_in(2),
        skew: rng.below(64) as usize,
        ..Shape::default()
    }
}

fn random_operations(options: &str, batches: u64, seed: u64) {
    println!("seed {seed}, `{options}`");
    let daemon = Daemon::with_disk(DISK, options);
    let fe = FrontEnd::builder().queues(3).queue_size(256).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut rng = Rng::new(seed);
    let mut model = Model { bytes: vec![0; DISK as usize], block_size: lun.block_size };
    for batch in 0..batches {
        let steps = random_batch(&mut rng, &lun, &mut model, batch);
        let tickets: Vec<_> =
            steps.iter().map(|step| fe.submit(2 + rng.below(3) as usize, &step.request)).collect();
        for (step, ticket) in steps.iter().zip(tickets) {
            let response = fe.wait(ticket).expect_good();
            assert_eq!(response.residual, 0, "batch {batch}: {:?}", step.request.cdb);
            if let Some(expected) = &step.data_in {
                let what = format!("batch {batch}, {:?}", step.request.cdb);
                assert_same(&response.buffer, expected, &what);
            }
        }
    }
    lun.synchronize_cache();
    let on_host = fs::read(daemon.disk()).unwrap();
    assert_same(&on_host, &model.bytes, "the file after all");
}

#[test]
fn random_operations_match_a_model() {
    random_operations("", 300, 1);
}

#[test]
fn random_operations_with_large_blocks() {
    random_operations("block-size=4096", 100, 2);
}

#[test]
fn random_operations_without_the_hosts_cache() {
    random_operations("cache=direct", 200, 3);
}

#[test]
fn random_operations_written_through() {
    random_operations("cache=writethrough", 60, 4);
}

/// Stamped blocks, in batches on two queues, by each engine and each way of caching: what is read is what was
/// written last, and what the host has is too.
#[test]
fn every_engine_keeps_every_byte() {
    for engine in ["auto", "threads"] {
        for options in ["", "cache=direct,block-size=4096", "cache=writethrough"] {
            let scratch = Scratch::new();
            let path = scratch.image("disk.img", 4 * MIB);
            let daemon = Daemon::builder(&scratch)
                .disk(&path, options)
                .args(["--io-engine", engine])
                .spawn();
            let fe = FrontEnd::builder().queues(2).connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            let (block, places) = (lun.block_size, (4 * MIB) as usize / (4 * lun.block_size));
            let mut stamps = vec![0u64; places];
            let mut rng = Rng::new(engine.len() as u64);
            let contents = |place: usize, stamp: u64| match stamp {
                0 => vec![0; 4 * block],
                _ => pattern::blocks(place as u64 * 4, 4, block, stamp),
            };
            for round in 1..200u64 {
                let mut taken = std::collections::BTreeSet::new();
                let batch: Vec<(usize, bool)> = (0..24)
                    .map(|_| (rng.below(places as u64) as usize, rng.one_in(2)))
                    .filter(|(place, _)| taken.insert(*place))
                    .collect();
                let requests: Vec<ScsiRequest> = batch
                    .iter()
                    .map(|(place, write)| {
                        let lba = *place as u64 * 4;
                        // Some with FUA.
                        let fua = if place % 11 == 0 { 0x08 } else { 0 };
                        match write {
                            true => lun
                                .request(cdb::write16(lba, 4).or(1, fua))
                                .data_out(contents(*place, round)),
                            false => lun.request(cdb::read16(lba, 4).or(1, fua)).data_in(4 * block),
                        }
                    })
                    .collect();
                let answers = fe.run_all(2 + (round % 2) as usize, &requests);
                for ((place, write), answer) in batch.iter().zip(answers) {
                    let answer = answer.expect_good();
                    if *write {
                        stamps[*place] = round;
                    } else {
                        let what = format!("{engine} {options} round {round} place {place}");
                        assert_same(answer.data(), &contents(*place, stamps[*place]), &what);
                    }
                }
                if round % 40 == 0 {
                    lun.synchronize_cache();
                }
            }
            for (place, stamp) in stamps.iter().enumerate() {
                let found = host_read(&path, (place * 4 * block) as u64, 4 * block);
                assert_same(
                    &found,
                    &contents(place, *stamp),
                    &format!("{engine} {options} {place}"),
                );
            }
        }
    }
}

// ----- memory of the host ---------------------------------------------------------------------

/// Disks with cache=direct, and transfers of 4 MiB to all of them at once, on several queues.
struct Large {
    scratch: Scratch,
    daemon: Daemon,
    /// What stands in each place at first.
    base: Vec<u8>,
}

impl Large {
    const LUNS: usize = 3;
    const COUNT: usize = 48;
    const LEN: usize = 4 << 20;

    fn new() -> Self {
        let scratch = Scratch::new();
        let base = blocks(0, Self::LEN / 512, 512, 1);
        let mut builder = Daemon::builder(&scratch);
        for lun in 0..Self::LUNS {
            let places = Self::COUNT / Self::LUNS;
            let content: Vec<u8> = (0..places).flat_map(|place| stamped(&base, place)).collect();
            let path = scratch.file(&format!("{lun}.img"), &content);
            builder = builder.disk(&path, &format!("lun={lun},cache=direct"));
        }
        Large { daemon: builder.spawn(), scratch, base }
    }

    fn front_end(&self) -> FrontEnd {
        let memory = vec![RegionSpec::new(0, 512 * MIB)];
        FrontEnd::builder().queues(4).memory(memory, MemoryMessage::Table).connect(&self.daemon)
    }

    /// Reads every second place and writes the others, all at once, demands that what is GOOD is right, and says how
    /// many were; the rest is BUSY.
    fn transfer(&self, fe: &FrontEnd, shape: &Shape, round: usize) -> usize {
        let in_blocks = (Self::LEN / 512) as u32;
        let luns: Vec<Lun<'_>> = (0..Self::LUNS).map(|n| fe.ready_lun(0, n as u16)).collect();
        let started: Vec<_> = (0..Self::COUNT)
            .map(|n| {
                let lun = luns[n % Self::LUNS].on_queue(2 + n % 4).with_shape(shape.clone());
                let place = n / Self::LUNS;
                let lba = (place * Self::LEN / 512) as u64;
                let request = match place % 2 {
                    0 => lun.request(cdb::read16(lba, in_blocks)).data_in(Self::LEN),
                    _ => {
                        let cdb =
                            cdb::write16(lba, in_blocks).or(1, if n % 4 == 0 { FUA } else { 0 });
                        lun.request(cdb).data_out(stamped(&self.base, place + round))
                    }
                };
                let ticket = fe.queue(lun.queue).enqueue(&request.exchange());
                (n % Self::LUNS, place, ticket)
            })
            .collect();
        (2..6).for_each(|queue| fe.queue(queue).publish());
        let mut good = 0;
        for (lun, place, ticket) in started {
            let response = fe.wait(ticket);
            if response.status == status::BUSY {
                continue;
            }
            let response = response.expect_good();
            good += 1;
            if place % 2 == 0 {
                assert!(response.data() == stamped(&self.base, place), "what was read");
            } else {
                let path = self.scratch.join(format!("{lun}.img"));
                let found = host_read(&path, (place * Self::LEN) as u64, Self::LEN);
                assert!(found == stamped(&self.base, place + round), "what was written");
            }
        }
        good
    }
}

fn stamped(base: &[u8], stamp: usize) -> Vec<u8> {
    let mut bytes = base.to_vec();
    bytes.rotate_left(4099 * stamp);
    bytes
}

/// O_DIRECT cannot use buffers at odd addresses. What it uses instead is bounded for the whole process: 32 MiB, and 64
/// KiB for each of the 16 threads that a disk has for such things.
#[test]
fn transfers_at_odd_addresses_take_little_memory() {
    let large = Large::new();
    let fe = large.front_end();
    // So that all of the guest's memory is known to the process, and counted.
    let aligned = Shape::default().aligned(4096);
    assert_eq!(large.transfer(&fe, &aligned, 1), Large::COUNT);
    fs::write(format!("/proc/{}/clear_refs", large.daemon.pid()), "5").unwrap();
    let before = large.daemon.resident();
    assert_eq!(large.transfer(&fe, &aligned.skewed(1), 2), Large::COUNT);
    let more = large.daemon.peak().saturating_sub(before);
    println!("{} KiB more", more / KIB);
    assert!(more < 48 * MIB, "{} MiB", more / MIB);
}

/// Memory that is not there is BUSY, and no reason to end.
#[test]
fn transfers_without_memory_are_busy() {
    let mut large = Large::new();
    let fe = large.front_end();
    // Threads are there after this, and have what they need themselves.
    let aligned = Shape::default().aligned(4096);
    assert_eq!(large.transfer(&fe, &aligned, 1), Large::COUNT);
    large.daemon.limit_memory(Some(6 * MIB));
    println!("{} were good", large.transfer(&fe, &aligned.clone().skewed(1), 2));
    large.daemon.limit_memory(None);
    assert_eq!(large.transfer(&fe, &aligned.skewed(1), 3), Large::COUNT);
    assert!(large.daemon.is_running());
}
