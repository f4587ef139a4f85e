//! Commands that are neither transfers nor about space: atomic ones, names and clocks, buffers, diagnostics, logs,
//! saved mode pages.
#![allow(clippy::cast_possible_truncation)]

use thinlun::scsi::Port;
use thinlun::store::mem::MemStore;

mod bench;
use bench::{BLOCKS, Bench};

fn read(bench: &Bench, lba: u8, blocks: u8) -> Vec<u8> {
    bench.data(&[0x28, 0, 0, 0, 0, lba, 0, 0, blocks, 0], usize::from(blocks) * 512)
}

#[test]
fn compare_and_write_writes_what_it_was_to_only_where_it_found_what_it_was_to() {
    let bench = Bench::new();
    let cdb = |lba: u8, blocks: u8| [0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, blocks, 0, 0];
    let zeroes_then = |byte: u8| [vec![0; 1024], vec![byte; 1024]].concat();
    bench.run(&cdb(4, 2), &zeroes_then(7), 0).expect_good();
    assert_eq!(read(&bench, 4, 2), [7; 1024]);
    let answer = bench.run(&cdb(3, 2), &zeroes_then(9), 0);
    answer.expect_sense(0xe, 0x1d00);
    assert_eq!(answer.outcome.sense[0], 0xf0, "VALID");
    assert_eq!(answer.outcome.sense[3..7], 512u32.to_be_bytes());
    assert_eq!((read(&bench, 3, 1), read(&bench, 4, 2)), (vec![0; 512], vec![7; 1024]));
    let mut most = vec![0; 255 * 512];
    most.extend(vec![1; 255 * 512]);
    bench.run(&cdb(100, 255), &most, 0).expect_good();
    bench.run(&cdb(100, 0), &[], 0).expect_good();
    bench.run(&[0x89, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_good();
    let end = [0x89, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0, 0];
    bench.run(&end, &[0; 1024], 0).expect_sense(5, 0x2100);
}

#[test]
fn or_write_sets_bits_and_clears_none() {
    let bench = Bench::over(MemStore::new(1 << 20));
    let cdb = [0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0];
    bench.run(&cdb, &[0x0f; 1024 * 512][..512 * 512], 0).expect_good();
    bench.run(&cdb, &[0x35; 512 * 512], 0).expect_good();
    assert_eq!(read(&bench, 0, 2), [vec![0; 512], vec![0x3f; 512]].concat());
    let rest = bench.data(&[0x28, 0, 0, 0, 2, 0, 0, 0, 2, 0], 1024);
    assert_eq!(rest, [vec![0x3f; 512], vec![0; 512]].concat(), "513 blocks from 0, and no more");
}

#[test]
fn write_atomic_takes_what_the_page_says() {
    let bench = Bench::over(MemStore::new(4 << 20));
    let cdb = |blocks: u16, boundary: u8| {
        let [high, low] = blocks.to_be_bytes();
        [0x9c, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, boundary, high, low, 0, 0]
    };
    bench.run(&cdb(2048, 0), &vec![5; 1 << 20], 0).expect_good();
    assert_eq!(read(&bench, 2, 2), [vec![0; 512], vec![5; 512]].concat());
    bench.run(&cdb(2049, 0), &vec![5; (1 << 20) + 512], 0).expect_sense(5, 0x2400);
    bench.run(&cdb(8, 4), &[5; 4096], 0).expect_cdb_field(10, 7);
}

#[test]
fn long_cdbs_do_what_short_ones_do() {
    let bench = Bench::new();
    let cdb = |action: u8, flags: u8| {
        let mut cdb = [0; 32];
        (cdb[0], cdb[7], cdb[9], cdb[10]) = (0x7f, 0x18, action, flags);
        (cdb[19], cdb[23], cdb[31]) = (9, 0xaa, 2);
        cdb
    };
    bench.run(&cdb(0x0b, 8), &[3; 1024], 0).expect_good();
    assert_eq!(bench.data(&cdb(0x09, 0), 1024), [3; 1024]);
    bench.run(&cdb(0x0a, 2), &[3; 1024], 0).expect_good();
    bench.run(&cdb(0x0a, 2), &[4; 1024], 0).expect_sense(0xe, 0x1d00);
    bench.run(&cdb(0x0a, 4), &[3; 1024], 0).expect_cdb_field(10, 2);
    bench.run(&cdb(0x0c, 2), &[6; 1024], 0).expect_good();
    assert_eq!(read(&bench, 9, 2), [6; 1024]);
    // RDPROTECT is reserved: there is no protection information.
    bench.run(&cdb(0x09, 0x20), &[], 1024).expect_cdb_field(10, 5);
}

#[test]
fn buffers_keep_what_they_are_given() {
    let bench = Bench::new();
    let read = |mode: u8, id: u8, offset: u8, len: u8| {
        bench.run(&[0x3c, mode, id, 0, 0, offset, 0, 0, len, 0], &[], len.into())
    };
    assert_eq!(read(3, 0, 0, 4).expect_good(), [0, 0, 16, 0]);
    assert_eq!(read(3, 1, 0, 4).expect_good(), [0; 4]);
    assert_eq!(read(0x0b, 0, 0, 4).expect_good(), [0, 0, 16, 0]);
    read(0x0a, 0, 0, 4).expect_sense(5, 0x2c00);
    bench.run(&[0x3b, 0x0a, 0, 0, 0, 0, 0, 0, 3, 0], &[1, 2, 3], 0).expect_good();
    assert_eq!(read(0x0a, 0, 0, 8).expect_good(), [1, 2, 3]);
    bench.run(&[0x3b, 2, 0, 0, 0, 2, 0, 0, 3, 0], &[4, 5, 6], 0).expect_good();
    assert_eq!(read(2, 0, 1, 5).expect_good(), [0, 4, 5, 6, 0]);
    let long = |mode: u8, id: u8, offset: u8| {
        bench.run(&[0x9b, mode, 0, 0, 0, 0, 0, 0, 0, offset, 0, 0, 0, 5, id, 0], &[], 5)
    };
    assert_eq!(long(2, 0, 1).expect_good(), [0, 4, 5, 6, 0]);
    assert_eq!(long(3, 0, 0).expect_good(), [0, 0, 16, 0]);
    long(2, 1, 0).expect_cdb_field(14, 7);
    read(2, 1, 0, 1).expect_cdb_field(2, 7);
    read(4, 0, 0, 1).expect_cdb_field(1, 4);
    let long = bench.run(&[0x3b, 0x0a, 0, 0, 0, 0, 0, 16, 1, 0], &[0; 4097], 0);
    long.expect_cdb_field(6, 7);
}

#[test]
fn diagnostics_and_defects() {
    let bench = Bench::new();
    assert_eq!(bench.data(&[0x1c, 1, 0, 0, 255, 0], 255), [0, 0, 0, 1, 0]);
    bench.run(&[0x1c, 1, 1, 0, 255, 0], &[], 255).expect_cdb_field(2, 7);
    for flags in [0x04, 0xa0, 0xc0, 0x10, 0x00] {
        bench.run(&[0x1d, flags, 0, 0, 0, 0], &[], 0).expect_good();
    }
    for flags in [0x24, 0x60, 0x80, 0xe0] {
        bench.run(&[0x1d, flags, 0, 0, 0, 0], &[], 0).expect_cdb_field(1, 7);
    }
    bench.run(&[0x1d, 0x10, 0, 0, 4, 0], &[0; 4], 0).expect_good();
    bench.run(&[0x1d, 0x10, 0, 0, 4, 0], &[0x40, 0, 0, 0], 0).expect_sense(5, 0x2600);
    let log = bench.data(&[0x4d, 0, 0x50, 0, 0, 0, 0, 4, 0, 0], 1024);
    assert_eq!(log.len(), 4 + 20 * 20);
    assert_eq!([log[8], log[28], log[48], log[68]], [6 << 5, 5 << 5, 0, 0], "the last one first");
    assert_eq!(log[8 + 4..8 + 12], [0xff; 8]);
    assert_eq!(bench.data(&[0x37, 0, 0x1d, 0, 0, 0, 0, 0, 255, 0], 255), [0, 0x1d, 0, 0]);
    assert_eq!(
        bench.data(&[0xb7, 0x08, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64),
        [0, 8, 0, 0, 0, 0, 0, 0]
    );
    bench.run(&[0x37, 0, 7, 0, 0, 0, 0, 0, 255, 0], &[], 255).expect_cdb_field(2, 2);
}

#[test]
fn names_and_clocks() {
    let bench = Bench::new();
    let other = bench.target.connect(Port(2));
    bench.run_as(&other, &[0; 6], &[], 0).expect_sense(6, 0x2900);
    let report = |kind: u8| bench.data(&[0xa3, 5, 0, 0, 0, 0, 0, 0, 4, 0, kind << 1, 0], 1024);
    let set = |kind: u8, bytes: &[u8]| {
        let [high, low] = (bytes.len() as u16).to_be_bytes();
        bench.run(&[0xa4, 6, 0, 0, 0, 0, 0, 0, high, low, kind << 1, 0], bytes, 0)
    };
    assert_eq!(report(0), [0; 4]);
    assert_eq!(report(0x7f), [0, 0, 0, 8, 0, 0, 2, 0, 4, 0, 1, 0]);
    set(0, &[1, 2, 0xff]).expect_good();
    assert_eq!(report(0), [0, 0, 0, 3, 1, 2, 0xff]);
    bench.run_as(&other, &[0; 6], &[], 0).expect_sense(6, 0x3f05);
    set(2, "Zürich\0".as_bytes()).expect_good();
    assert_eq!(&report(2)[4..], "Zürich\0".as_bytes());
    set(2, b"no end").expect_sense(5, 0x2600);
    set(0, &[0; 513]).expect_cdb_field(6, 7);
    set(1, &[0]).expect_cdb_field(10, 7);
    set(0, &[]).expect_good();
    assert_eq!(report(0), [0; 4]);

    let time = || bench.data(&[0xa3, 0x0f, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    let number = |data: &[u8]| data[4..10].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let first = time();
    assert_eq!((first.len(), first[1], first[2]), (12, 10, 3));
    assert!(number(&first).abs_diff(host.as_millis() as u64) < 60_000);
    let list = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    bench.run(&[0xa4, 0x0f, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0], &list, 0).expect_good();
    let second = time();
    assert_eq!(second[2], 2);
    assert!((256..60_256).contains(&number(&second)));
    while let Some(sense) =
        Some(bench.run_as(&other, &[0; 6], &[], 0).outcome.sense).filter(|sense| !sense.is_empty())
    {
        assert!([[0x2a, 0x10], [0x3f, 0x05]].contains(&[sense[12], sense[13]]));
    }
    bench.run(&[0xa4, 0x0f, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0], &list, 0).expect_sense(5, 0x1a00);

    let groups = bench.data(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!(groups[..12], [0, 0, 0, 24, 0, 1, 0, 1, 0, 0, 0, 4]);
    assert_eq!(groups[12..], [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]);
    let extended = bench.data(&[0xa3, 0x2a, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!((extended[..5].to_vec(), &extended[8..]), (vec![0, 0, 0, 28, 0x10], &groups[4..]));
    let serial = bench.data(&[0xab, 1, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!(serial, [&[0, 0, 0, 8][..], b"SERIAL  "].concat());
}

#[test]
fn logs_count_what_was_done() {
    let bench = Bench::new();
    let log = |page: u8| bench.data(&[0x4d, 0, 0x40 | page, 0, 0, 0, 0, 0x7f, 0, 0], 0x7f00);
    let counter = |data: &[u8], code: u16| {
        let mut at = 4;
        while u16::from_be_bytes([data[at], data[at + 1]]) != code {
            at += 4 + usize::from(data[at + 3]);
        }
        u64::from_be_bytes(data[at + 4..at + 12].try_into().unwrap())
    };
    for _ in 0..3 {
        bench.run(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 4, 0], &[1; 2048], 0).expect_good();
    }
    read(&bench, 0, 2);
    bench.run(&[0x2f, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[], 0).expect_good();
    assert_eq!(counter(&log(2), 5), 3 * 2048);
    assert_eq!((counter(&log(3), 5), counter(&log(5), 5)), (1024, 4096));
    let statistics = log(0x19);
    let numbers: Vec<u64> =
        statistics[8..40].chunks(8).map(|n| u64::from_be_bytes(n.try_into().unwrap())).collect();
    assert_eq!(numbers, [1, 3, 12, 2], "commands read and written, blocks written and read");
    bench.run(&[0x4c, 2, 0x02, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_good();
    assert_eq!((counter(&log(2), 5), counter(&log(3), 5)), (0, 1024));
    bench.run(&[0x4c, 2, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_good();
    assert_eq!(counter(&log(3), 5), 0);
    // So do commands of several steps.
    let zeroes_then_ones = [[0; 512], [1; 512]].concat();
    let compare_and_write = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0, 1, 0, 0];
    bench.run(&compare_and_write, &zeroes_then_ones, 0).expect_good();
    bench.run(&compare_and_write, &zeroes_then_ones, 0).expect_sense(0xe, 0x1d00);
    assert_eq!(counter(&log(2), 5), 512, "what was not written does not count");
    // START STOP UNIT counts.
    bench.run(&[0x1b, 0, 0, 0, 0, 0], &[], 0).expect_good();
    bench.run(&[0x1b, 0, 0, 0, 1, 0], &[], 0).expect_good();
    assert_eq!(log(0x0e).last(), Some(&1));
    // From a parameter on.
    let from = bench.data(&[0x4d, 0, 0x42, 0, 0, 0, 5, 0, 255, 0], 255);
    assert_eq!((from.len(), from[5]), (4 + 24, 5));
    bench.run(&[0x4d, 0, 0x42, 0, 0, 0, 7, 0, 255, 0], &[], 255).expect_cdb_field(5, 7);
}

#[test]
fn application_clients_leave_notes() {
    let bench = Bench::new();
    let select = |list: &[u8]| {
        let len = list.len() as u8;
        bench.run(&[0x4c, 0, 0, 0, 0, 0, 0, 0, len, 0], list, 0)
    };
    select(&[0x0f, 0, 0, 7, 0, 3, 3, 3, 9, 8, 7]).expect_good();
    let page = bench.data(&[0x4d, 0, 0x4f, 0, 0, 0, 3, 2, 0, 0], 512);
    assert_eq!(page[4..12], [0, 3, 3, 252, 9, 8, 7, 0]);
    select(&[0x02, 0, 0, 0]).expect_sense(5, 0x2600);
    select(&[0x0f, 0, 0, 4, 0, 64, 3, 0]).expect_sense(5, 0x2600);
    for cut in 1..11 {
        let list = [0x0f, 0, 0, 7, 0, 3, 3, 3, 9, 8, 7];
        select(&list[..cut]).expect_sense(5, 0x1a00);
    }
    bench.run(&[0x4c, 1, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_cdb_field(1, 0);
}

#[test]
fn pages_about_ports_tell_the_port_that_was_asked() {
    let bench = Bench::new();
    let third = bench.target.connect(Port(3));
    let page =
        |nexus, code| bench.run_as(nexus, &[0x12, 1, code, 4, 0, 0], &[], 1024).expect_good();
    for (nexus, port) in [(&bench.nexus, 1), (&third, 3)] {
        let names = page(nexus, 0x83);
        assert!(names.windows(8).any(|d| d == [1, 0x14, 0, 4, 0, 0, 0, port]));
        assert!(names.windows(8).any(|d| d == [1, 0x15, 0, 4, 0, 0, 0, 1]));
    }
    assert_eq!(page(&third, 0x83).len(), page(&bench.nexus, 0x83).len());
    let ports = page(&bench.nexus, 0x88);
    assert_eq!(ports[4..].chunks(12).map(|d| d[3]).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let ranges = page(&bench.nexus, 0xb9);
    assert_eq!(ranges.len(), 64 + 32);
    assert_eq!(ranges[80..88], BLOCKS.to_be_bytes());
    let inquiry = bench.data(&[0x12, 0, 0, 0, 96, 0], 96);
    assert_eq!((inquiry[5], inquiry[6]), (0x18, 0x10), "TPGS and 3PC, MULTIP");
}

#[test]
fn nothing_is_saved_where_there_is_no_place_for_it() {
    let bench = Bench::new();
    bench.run(&[0x1a, 8, 0xff, 0, 255, 0], &[], 255).expect_sense(5, 0x3900);
    bench.run(&[0x15, 0x11, 0, 0, 0, 0], &[], 0).expect_cdb_field(1, 0);
    assert!(bench.mode_sense(0x08)[4] & 0x80 == 0);
}
