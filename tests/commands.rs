//! Commands as pure tables: no daemon, no files. Whatever the command table says is held against
//! what the disk does.
#![allow(clippy::cast_possible_truncation)]

use thinlun::scsi::cmd::{Access, Command, Data, ServiceAction, TABLE};
use thinlun::scsi::reservations::Conflict;
use thinlun::scsi::{Delivery, Plan, Port, Status};
use thinlun::store::engine::Need;
use thinlun::store::mem::MemStore;

mod bench;
use bench::{Answer, BLOCKS, Bench, bare};

/// The service action as a number, and the byte of the CDB that holds its last bits.
fn action_of(command: &Command) -> Option<(u16, usize)> {
    match command.service_action {
        ServiceAction::None => None,
        ServiceAction::Byte1(action) => Some((action.into(), 1)),
        ServiceAction::Variable(action) => Some((action, 9)),
    }
}

#[test]
fn the_table_is_in_order_and_each_row_is_sound() {
    let keys: Vec<_> = TABLE.iter().map(|c| (c.opcode(), action_of(c))).collect();
    assert!(keys.is_sorted() && keys.windows(2).all(|w| w[0] != w[1]));
    for command in TABLE {
        let len = match command.opcode() >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ => command.usage.len(),
        };
        assert_eq!(command.usage.len(), len, "{}", command.name);
        // CONTROL: neither NACA nor the obsolete LINK is supported.
        let control = if command.opcode() == 0x7f { 1 } else { len - 1 };
        assert_eq!(command.usage[control], 0, "{}", command.name);
        assert!(command.access != Access::Write || command.data != Data::In, "{}", command.name);
    }
}

#[test]
fn every_opcode_that_is_not_in_the_table_is_invalid() {
    let bench = Bench::new();
    for opcode in 0..=255u8 {
        if TABLE.iter().any(|c| c.opcode() == opcode) {
            continue;
        }
        for action in 0..32 {
            bench.run(&[opcode, action], &[], 0).expect_sense(5, 0x2000);
        }
    }
}

#[test]
fn every_service_action_that_is_not_in_the_table_is_an_invalid_field() {
    let bench = Bench::new();
    for opcode in TABLE.iter().filter(|c| action_of(c).is_some()).map(Command::opcode) {
        let unknown = |action: u16| {
            let mut same = TABLE.iter().filter(|c| c.opcode() == opcode);
            !same.any(|c| action_of(c).unwrap().0 == action)
        };
        if opcode == 0x7f {
            for action in (0..256).chain([0x0d00, 0x120d, 0xffff]).filter(|a| unknown(*a)) {
                let [high, low] = action.to_be_bytes();
                let cdb = [opcode, 0, 0, 0, 0, 0, 0, 0x18, high, low];
                bench.run(&cdb, &[], 0).expect_cdb_field(8, 7);
            }
        } else {
            for action in (0..32).filter(|a| unknown(*a)) {
                bench.run(&[opcode, action as u8], &[], 0).expect_cdb_field(1, 4);
            }
        }
    }
}

#[test]
fn every_reserved_bit_is_refused_and_pointed_at() {
    let bench = Bench::new();
    for command in TABLE {
        for byte in 1..command.usage.len() {
            for bit in 0..8u8 {
                let names_it = match command.service_action {
                    ServiceAction::None => false,
                    ServiceAction::Byte1(_) => byte == 1 && bit < 5,
                    ServiceAction::Variable(_) => byte == 8 || byte == 9,
                };
                if command.usage[byte] & (1 << bit) != 0 || names_it {
                    continue;
                }
                let mut cdb = bare(command);
                cdb[byte] |= 1 << bit;
                bench.run(&cdb, &[], 0).expect_cdb_field(byte as u16, bit);
            }
        }
    }
}

#[test]
fn writes_are_refused_on_a_read_only_disk_and_nothing_else_is() {
    let bench = Bench::over(MemStore::new(BLOCKS * 512).read_only());
    for command in TABLE {
        let answer = bench.run(&bare(command), &[0; 512], 0);
        bench.lun.set_started(true);
        if command.access == Access::Write {
            answer.expect_sense(7, 0x2700);
        } else if answer.outcome.status == Status::CheckCondition {
            assert_ne!(answer.outcome.sense[2], 7, "{}: {answer:02x?}", command.name);
        }
    }
    assert_eq!(bench.mode_sense(0x3f)[2] & 0x80, 0x80, "WP");
}

#[test]
fn a_stopped_disk_answers_what_does_not_need_its_medium() {
    let bench = Bench::new();
    bench.run(&[0x1b, 0, 0, 0, 0, 0], &[], 0).expect_good();
    for command in TABLE.iter().filter(|c| c.opcode() != 0x1b) {
        let answer = bench.run(&bare(command), &[0; 512], 512);
        if command.access == Access::None {
            assert_ne!(answer.outcome.sense.get(12), Some(&4), "{}: {answer:02x?}", command.name);
        } else {
            answer.expect_sense(2, 0x0402);
        }
    }
    let sense = bench.data(&[3, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12], sense[13]), (2, 4, 2));
    bench.run(&[0x1b, 0, 0, 0, 1, 0], &[], 0).expect_good();
    bench.run(&[0; 6], &[], 0).expect_good();
}

#[test]
fn a_unit_attention_is_reported_once_and_only_by_those_that_may() {
    for command in TABLE {
        let bench = Bench::new();
        let other = bench.target.connect(Port(2));
        let answer = bench.run_as(&other, &bare(command), &[0; 512], 512);
        let reported = answer.outcome.sense.get(12) == Some(&0x29);
        assert_eq!(reported, !command.exempt_from_attention, "{}: {answer:02x?}", command.name);
        if reported {
            bench.run_as(&other, &[0; 6], &[], 0).expect_good();
        }
    }
    // An unknown command does not get past it either.
    let bench = Bench::new();
    let other = bench.target.connect(Port(2));
    bench.run_as(&other, &[0xff], &[], 0).expect_sense(6, 0x2900);
}

#[test]
fn report_supported_operation_codes_is_the_table() {
    let bench = Bench::new();
    for rctd in [0, 0x80] {
        let all = bench.data(&[0xa3, 0x0c, rctd, 0, 0, 0, 0, 0, 16, 0, 0, 0], 4096);
        let list = &all[4..];
        assert_eq!(u32::from_be_bytes(all[..4].try_into().unwrap()) as usize, list.len());
        let each = if rctd == 0 { 8 } else { 20 };
        assert_eq!(list.len(), each * TABLE.len());
        for (entry, command) in list.chunks(each).zip(TABLE) {
            assert_eq!(entry[0], command.opcode(), "{}", command.name);
            let action = action_of(command).map_or((0, 0), |(action, _)| (action as u8, 1));
            assert_eq!((entry[3], entry[5] & 1), action, "{}", command.name);
            assert_eq!(usize::from(entry[7]), command.usage.len());
            assert_eq!(entry[5] & 2 != 0, rctd != 0);
            if rctd != 0 {
                assert_eq!(entry[8..10], [0, 10]);
                assert_eq!(entry[16..20], command.timeouts.1.to_be_bytes());
            }
        }
        for command in TABLE {
            let cdb = bare(command);
            let has_action = action_of(command).is_some();
            let ask = |option: u8| {
                let action = action_of(command).map_or(0, |(_, byte)| cdb[byte]);
                bench.run(
                    &[0xa3, 0x0c, rctd | option, cdb[0], 0, action, 0, 0, 1, 0, 0, 0],
                    &[],
                    256,
                )
            };
            let (right, wrong) = if has_action { (2, 1) } else { (1, 2) };
            ask(wrong).expect_cdb_field(2, 2);
            for option in [right, 3] {
                let one = ask(option).expect_good();
                assert_eq!(one[1] & 7, 3, "{}", command.name);
                assert_eq!(usize::from(one[3]), command.usage.len());
                let named = bare(command);
                let usage: Vec<u8> = command.usage.iter().zip(named).map(|(a, b)| a | b).collect();
                assert_eq!(one[4..12.min(4 + usage.len())][..4], usage[..4]);
                let skip_length = |(at, byte): (usize, &u8)| if at == 7 { 0 } else { *byte };
                let all = |bytes: &[u8]| -> Vec<u8> {
                    bytes.iter().enumerate().map(skip_length).collect()
                };
                assert_eq!(all(&one[4..4 + usage.len()]), all(&usage), "{}", command.name);
                assert_eq!(one[1] & 0x80 != 0, rctd != 0);
            }
        }
    }
    let unknown = bench.data(&[0xa3, 0x0c, 1, 0xff, 0, 0, 0, 0, 1, 0, 0, 0], 256);
    assert_eq!(unknown, [0, 1, 0, 0]);
    let unknown = bench.data(&[0xa3, 0x0c, 3, 0x9e, 0, 0x1f, 0, 0, 1, 0, 0, 0], 256);
    assert_eq!(unknown, [0, 1, 0, 0]);
}

#[test]
fn report_supported_task_management_functions() {
    let bench = Bench::new();
    let short = bench.data(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!(short, [0xdc, 0x03, 0, 0]);
    let long = bench.data(&[0xa3, 0x0d, 0x80, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!((long.len(), &long[..4]), (16, &[0xdc, 0x03, 0, 0x0c][..]));
}

#[test]
fn vpd_pages_are_listed_and_each_is_there() {
    let bench = Bench::new();
    let list = bench.data(&[0x12, 1, 0, 0, 255, 0], 255);
    let pages = [0, 0x80, 0x83, 0x85, 0x86, 0x87, 0x88, 0x8f, 0xb0, 0xb1, 0xb2, 0xb7, 0xb9];
    assert_eq!(list[4..], pages);
    for page in 0..=255u8 {
        let answer = bench.run(&[0x12, 1, page, 4, 0, 0], &[], 1024);
        if list[4..].contains(&page) {
            let data = answer.expect_good();
            assert_eq!(data[1], page);
            assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), data.len() - 4);
        } else {
            answer.expect_cdb_field(2, 7);
        }
    }
    let limits = bench.data(&[0x12, 1, 0xb0, 0, 255, 0], 255);
    assert_eq!(limits[3], 0x3c);
    assert_eq!(u16::from_be_bytes([limits[6], limits[7]]), 8, "one physical block");
    assert_eq!(limits[8..12], 65536u32.to_be_bytes(), "32 MiB");
    assert_eq!(limits[20..24], [0xff; 4], "UNMAP of any length");
    assert_eq!(limits[24..28], 256u32.to_be_bytes());
    assert_eq!(limits[28..36], [0, 0, 0, 8, 0x80, 0, 0, 0], "granularity and alignment");
    assert_eq!(limits[36..44], (8u64 << 20).to_be_bytes(), "4 GiB");
    assert_eq!(limits[5], 255, "COMPARE AND WRITE");
    assert_eq!(limits[44..48], 2048u32.to_be_bytes(), "1 MiB whole or not at all");
    assert_eq!(limits[48..], [0; 16], "wherever they are, but no boundaries");
}

#[test]
fn provisioning_is_claimed_everywhere_or_nowhere() {
    for thin in [true, false] {
        let bench = if thin { Bench::new() } else { Bench::fully_provisioned() };
        let capacity = bench.data(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
        assert_eq!(capacity[..8], (BLOCKS - 1).to_be_bytes());
        assert_eq!(capacity[8..14], [0, 0, 2, 0, 0, 3]);
        assert_eq!(capacity[14], if thin { 0xc0 } else { 0 }, "LBPME and LBPRZ");
        let provisioning = bench.data(&[0x12, 1, 0xb2, 0, 255, 0], 255);
        let expected = if thin { [11, 0xe6, 2, 0] } else { [0; 4] };
        assert_eq!(provisioning[4..], expected);
        let unmap = bench.run(&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0);
        let listed = bench.data(&[0xa3, 0x0c, 1, 0x42, 0, 0, 0, 0, 1, 0, 0, 0], 256);
        assert_eq!(listed[1] & 7, if thin { 3 } else { 1 });
        let same = bench.run(&[0x41, 8, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512], 0);
        let status = bench.data(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0], 24);
        if thin {
            drop((unmap.expect_good(), same.expect_good()));
            assert_eq!(status[20], 1, "deallocated");
        } else {
            unmap.expect_sense(5, 0x2000);
            same.expect_cdb_field(1, 3);
            assert_eq!(status[16..21], [0, 0, 8, 0, 0], "all mapped");
        }
        let usage = bench.data(&[0xa3, 0x0c, 1, 0x93, 0, 0, 0, 0, 1, 0, 0, 0], 256);
        assert_eq!(usage[5], if thin { 0x19 } else { 0x01 }, "UNMAP and ANCHOR");
        // Space is watched where there is something to watch.
        let pages = bench.data(&[0x4d, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255);
        assert_eq!(pages[4..].contains(&0x0c), thin);
        let page = bench.run(&[0x1a, 8, 0x1c, 2, 255, 0], &[], 255);
        let log = bench.run(&[0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 255, 0], &[], 255);
        if thin {
            drop((page.expect_good(), log.expect_good()));
        } else {
            page.expect_cdb_field(3, 7);
            log.expect_cdb_field(2, 5);
        }
        assert_eq!(bench.mode_sense(0x01)[4 + 7], if thin { 0x80 } else { 0 }, "LBPERE");
    }
}

/// What a command waits for it says beforehand: the blocks that it is about, alone or together with others, or a thread of
/// its own where it may have to wait halfway. All else takes a thread of the disk's pool, and waits for nobody there.
#[test]
fn commands_say_what_they_need() {
    let bench = Bench::new();
    let need = |cdb: &[u8], out: &[u8]| match bench.plan(cdb, out) {
        Plan::Job(work) => work.job.need,
        Plan::Done(outcome) => panic!("{cdb:02x?}: {outcome:?}"),
        Plan::Transfer(..) => panic!("{cdb:02x?} is one transfer"),
    };
    let (out, blocks) = (vec![0; 4096], |from: u64, count: u64| from * 512..(from + count) * 512);
    for cdb in [
        // COMPARE AND WRITE, ORWRITE, WRITE ATOMIC.
        [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0],
        [0x8b, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0],
        [0x9c, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0],
    ] {
        assert_eq!(need(&cdb, &out), Need::Alone(blocks(8, 4)), "{cdb:02x?}");
    }
    for (opcode, flags) in [(0x8f, 0), (0x8f, 2), (0x8e, 2), (0x93, 0), (0x93, 8), (0x93, 1)] {
        let cdb = [opcode, flags, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0];
        assert_eq!(need(&cdb, &out), Need::Together(vec![blocks(8, 4)]), "{cdb:02x?}");
    }
    let descriptor = |lba: u8, count: u8| [0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0, 0, 0];
    let unmap = [&[0, 38, 0, 32, 0, 0, 0, 0][..], &descriptor(4, 2), &descriptor(100, 1)].concat();
    let both = Need::Together(vec![blocks(4, 2), blocks(100, 1)]);
    assert_eq!(need(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], &unmap), both);
    // EXTENDED COPY of one block within the disk; WRITE USING TOKEN of zeroes.
    let mut copy = vec![0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    copy.extend([2, 0, 0, 24, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1]);
    copy.extend([[0; 8], [0, 0, 0, 0, 0, 0, 0, 9]].concat());
    let len = copy.len() as u8;
    assert_eq!(need(&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, len, 0, 0], &copy), Need::Thread);
    let mut token = vec![0; 552];
    token[..2].copy_from_slice(&550u16.to_be_bytes());
    token[16..24].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 0x01, 0xf8]);
    token[534..536].copy_from_slice(&16u16.to_be_bytes());
    token[547] = 1;
    let write = [0x83, 0x11, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 2, 40, 0, 0];
    assert_eq!(need(&write, &token), Need::Thread);
    // GET LBA STATUS, a self-test.
    for cdb in [&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &[0x1d, 4, 0, 0, 0, 0]]
    {
        assert_eq!(need(cdb, &[]), Need::Nothing, "{cdb:02x?}");
    }
}

#[test]
fn ranges_end_at_the_capacity() {
    let bench = Bench::new();
    for (lba, blocks, fits) in [
        (0, 0, true),
        (BLOCKS, 0, true),
        (BLOCKS + 1, 0, false),
        (BLOCKS - 1, 1, true),
        (BLOCKS - 1, 2, false),
        (u64::MAX, 0, false),
        (u64::MAX, 1, false),
        (0, u32::MAX, false),
    ] {
        let block_commands = [0x88, 0x8a, 0x8e, 0x8f, 0x90, 0x91];
        for opcode in block_commands {
            let mut cdb = [0; 16];
            cdb[0] = opcode;
            cdb[2..10].copy_from_slice(&lba.to_be_bytes());
            cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
            let reads = opcode == 0x88;
            let (out, room) = if reads { (vec![], 512) } else { (vec![0; 512], 0) };
            let answer = bench.run(&cdb, &out, room);
            match fits {
                true => drop(answer.expect_good()),
                false => answer.expect_sense(5, 0x2100),
            }
        }
    }
}

#[test]
fn a_transfer_above_the_limit_is_refused() {
    let bench = Bench::over(MemStore::new(1 << 30));
    let over = 65537u32.to_be_bytes();
    let cdb = [0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, over[0], over[1], over[2], over[3], 0, 0];
    bench.run(&cdb, &[], 0).expect_sense(5, 0x2400);
}

#[test]
fn mode_pages_can_be_changed_where_they_say_so() {
    let bench = Bench::new();
    let current = bench.mode_sense(0x3f);
    let changeable = bench.mode_sense(0x3f | 0x40);
    let codes: Vec<u8> = {
        let mut at = 4;
        let mut codes = vec![];
        while at < current.len() {
            codes.push(current[at] & 0x3f);
            at += 2 + usize::from(current[at + 1]);
        }
        codes
    };
    assert_eq!(codes, [0x01, 0x02, 0x07, 0x08, 0x0a, 0x1c]);
    assert_eq!(bench.mode_sense(0x3f | 0x80)[4..], current[4..], "defaults are in force");
    bench.run(&[0x1a, 8, 0xff, 0, 255, 0], &[], 255).expect_sense(5, 0x3900);
    // Every bit of every page: it can be changed if and only if the mask says so.
    let mut at = 4;
    while at < current.len() {
        let len = 2 + usize::from(current[at + 1]);
        for byte in 2..len {
            for bit in 0..8 {
                let mut list = vec![0; 4];
                list.extend(&current[at..at + len]);
                list[4 + byte] ^= 1 << bit;
                let select = [0x15, 0x10, 0, 0, list.len() as u8, 0];
                let answer = bench.run(&select, &list, 0);
                if changeable[at + byte] & (1 << bit) != 0 {
                    answer.expect_good();
                    let now = bench.mode_sense(current[at] & 0x3f);
                    assert_eq!(now[4..], list[4..]);
                    bench.lun.reset();
                } else {
                    answer.expect_sense(5, 0x2600);
                    let sense = answer.outcome.sense;
                    assert_eq!((sense[15], sense[17]), (0x88 | bit, (4 + byte) as u8));
                }
            }
        }
        at += len;
    }
    assert_eq!(bench.mode_sense(0x3f), current, "nothing else has changed");
}

#[test]
fn mode_select_takes_all_pages_or_none() {
    let bench = Bench::new();
    let mut list = vec![0; 4];
    list.extend(&bench.mode_sense(0x08)[4..]);
    list[4 + 2] &= !0x04;
    list.extend(&bench.mode_sense(0x0a)[4..]);
    *list.last_mut().unwrap() ^= 1;
    let select = |list: &[u8]| bench.run(&[0x15, 0x10, 0, 0, list.len() as u8, 0], list, 0);
    select(&list).expect_sense(5, 0x2600);
    assert!(bench.lun.pages().write_cache(), "the first page had no effect");
    *list.last_mut().unwrap() ^= 1;
    select(&list).expect_good();
    assert!(!bench.lun.pages().write_cache());
    for short in 1..list.len() {
        if short != 4 && short != 24 {
            select(&list[..short]).expect_sense(5, 0x1a00);
        }
    }
}

#[test]
fn mode_changes_are_told_to_the_others() {
    let bench = Bench::new();
    let other = bench.target.connect(Port(2));
    bench.run_as(&other, &[0; 6], &[], 0).expect_sense(6, 0x2900);
    let mut list = vec![0; 4];
    list.extend(&bench.mode_sense(0x08)[4..]);
    bench.run(&[0x15, 0x10, 0, 0, 24, 0], &list, 0).expect_good();
    bench.run_as(&other, &[0; 6], &[], 0).expect_good();
    list[6] ^= 0x04;
    bench.run(&[0x15, 0x10, 0, 0, 24, 0], &list, 0).expect_good();
    bench.run(&[0; 6], &[], 0).expect_good();
    bench.run_as(&other, &[0; 6], &[], 0).expect_sense(6, 0x2a01);
}

#[test]
fn d_sense_changes_the_format_of_sense_data() {
    let bench = Bench::new();
    let mut list = vec![0; 4];
    list.extend(&bench.mode_sense(0x0a)[4..]);
    list[6] |= 0x04;
    bench.run(&[0x15, 0x10, 0, 0, 16, 0], &list, 0).expect_good();
    let answer = bench.run(&[0xff], &[], 0);
    assert_eq!(answer.outcome.sense[..4], [0x72, 5, 0x20, 0]);
}

#[test]
fn software_write_protect_protects() {
    let bench = Bench::new();
    let mut list = vec![0; 4];
    list.extend(&bench.mode_sense(0x0a)[4..]);
    list[8] |= 0x08;
    bench.run(&[0x15, 0x10, 0, 0, 16, 0], &list, 0).expect_good();
    bench.run(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[1; 512], 0).expect_sense(7, 0x2702);
    assert_eq!(bench.mode_sense(0x0a)[2] & 0x80, 0x80);
    assert_eq!(bench.data(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512), [0; 512]);
}

/// MODE SELECT of the Logical Block Provisioning page: enabled counts of MiB, or none.
fn set_thresholds(bench: &Bench, available: Option<u32>, used: Option<u32>) {
    let mut list = vec![0; 4];
    list.extend(&past_attentions(|| bench.run(&[0x1a, 8, 0x1c, 2, 255, 0], &[], 255))[4..]);
    for (at, count) in [(4 + 16, available), (4 + 24, used)] {
        list[at] = list[at] & 0x7f | if count.is_some() { 0x80 } else { 0 };
        list[at + 4..at + 8].copy_from_slice(&count.unwrap_or(0).to_be_bytes());
    }
    past_attentions(|| bench.run(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list, 0));
}

/// What comes of a command after the unit attentions that are due, which come when the host was looked at.
fn past_attentions(command: impl Fn() -> Answer) -> Vec<u8> {
    for _ in 0..4 {
        let answer = command();
        if answer.outcome.sense.get(2) != Some(&6) {
            return answer.expect_good();
        }
    }
    command().expect_good()
}

/// Sends TEST UNIT READY until it reports something, for at most some seconds.
fn attention_within(bench: &Bench, seconds: u64) -> Option<Vec<u8>> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while std::time::Instant::now() < end {
        let answer = bench.run(&[0; 6], &[], 0);
        if answer.outcome.status != Status::Good {
            return Some(answer.outcome.sense);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    None
}

#[test]
fn thresholds_are_told_once_and_the_log_page_counts_space() {
    const SIZE: u64 = 16 << 20;
    let bench = Bench::over(MemStore::new(SIZE));
    let page = bench.data(&[0x1a, 8, 0x1c, 2, 255, 0], 255);
    let changeable = bench.data(&[0x1a, 8, 0x5c, 2, 255, 0], 255);
    assert_eq!(page[4..8], [0x5c, 2, 0, 28]);
    assert_eq!(page[20..36], [0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]);
    let bits = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(changeable[20..36], [bits, bits].concat());
    let counts = || {
        let log = bench.data(&[0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 255, 0], 255);
        assert_eq!(log[..8], [0x8c, 0, 0, 24, 0, 1, 3, 8]);
        assert_eq!((log[12], log[24]), (2, 1), "scopes");
        assert_eq!(log[16..20], [0, 2, 3, 8]);
        (log[11], log[23])
    };
    assert_eq!(counts(), (16, 0));
    set_thresholds(&bench, Some(12), Some(8));
    assert_eq!(attention_within(&bench, 1), None, "nothing is reached");
    let write = |mib: u32| {
        let lba = (mib * 2048).to_be_bytes();
        let cdb = [0x2a, 0, lba[0], lba[1], lba[2], lba[3], 0, 8, 0, 0];
        bench.run(&cdb, &vec![1; 1 << 20], 0)
    };
    (0..4).for_each(|mib| drop(write(mib).expect_good()));
    assert_eq!(counts(), (12, 4));
    let sense = attention_within(&bench, 10).expect("a unit attention");
    assert_eq!((sense[2], sense[12], sense[13]), (6, 0x38, 7));
    assert_eq!((sense[0], &sense[3..7]), (0xf0, &[0, 0, 0, 16][..]), "the first descriptor");
    assert_eq!(attention_within(&bench, 1), None, "once");
    // It is told again after it was left.
    bench.run(&[0x41, 8, 0, 0, 0, 0, 0, 0, 0, 0], &[0; 512], 0).expect_good();
    assert_eq!(attention_within(&bench, 1), None);
    for mib in 0..8 {
        past_attentions(|| write(mib));
    }
    set_thresholds(&bench, None, Some(8));
    let sense = attention_within(&bench, 10).expect("a unit attention");
    assert_eq!((sense[12], sense[13], sense[6]), (0x38, 7, 24), "the second descriptor");
    // LBPERE off: nothing is told.
    let mut list = vec![0; 4];
    list.extend(&bench.mode_sense(0x01)[4..]);
    list[4 + 7] &= 0x7f;
    bench.run(&[0x15, 0x10, 0, 0, 16, 0], &list, 0).expect_good();
    set_thresholds(&bench, Some(12), Some(8));
    assert_eq!(attention_within(&bench, 1), None);
}

/// Fills the disk with a byte.
fn fill(bench: &Bench, byte: u8) {
    let same = [0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bench.run(&same, &[byte; 512], 0).expect_good();
}

fn read_all(bench: &Bench) -> Vec<u8> {
    bench.data(&[0x28, 0, 0, 0, 0, 0, 0, (BLOCKS >> 8) as u8, 0, 0], BLOCKS as usize * 512)
}

fn first_status(bench: &Bench) -> u8 {
    bench.data(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0], 24)[20]
}

#[test]
fn format_unit_makes_a_fresh_disk() {
    for (thin, status) in [(true, 1), (false, 0)] {
        let bench = if thin { Bench::new() } else { Bench::fully_provisioned() };
        fill(&bench, 7);
        bench.run(&[4, 0, 0, 0, 0, 0], &[], 0).expect_good();
        assert_eq!(read_all(&bench), vec![0; BLOCKS as usize * 512]);
        assert_eq!(first_status(&bench), status);
    }
    let bench = Bench::new();
    let format = |list: &[u8]| bench.run(&[4, 0x10, 0, 0, 0, 0], list, 0);
    let format_long = |list: &[u8]| bench.run(&[4, 0x38, 0, 0, 0, 0], list, 0);
    fill(&bench, 7);
    // A pattern, with the options about defects that there are.
    format(&[0, 0xf8, 0, 0, 0, 1, 0, 3, 1, 2, 3]).expect_good();
    let block: Vec<u8> = [1, 2, 3].into_iter().cycle().take(512).collect();
    assert_eq!(read_all(&bench), block.repeat(BLOCKS as usize));
    format(&[0, 0x88, 0, 0, 0, 1, 0, 1, 0]).expect_good();
    assert_eq!((read_all(&bench)[0], first_status(&bench)), (0, 2), "zeroes, with their space");
    format(&[0, 0x88, 0, 0, 0, 0, 0, 0]).expect_good();
    assert_eq!(first_status(&bench), 1, "the default pattern");
    format_long(&[0; 8]).expect_good();
    // What is wrong is pointed at, and changes nothing.
    fill(&bench, 9);
    for (list, byte) in [
        (&[1, 0, 0, 0][..], 0),
        (&[0, 0x40, 0, 0], 1),
        (&[0, 0, 0, 8], 2),
        (&[0, 0x08, 0, 0, 0, 0, 0, 0], 1),
        (&[0, 0x88, 0, 0, 0x20, 0, 0, 0], 4),
        (&[0, 0x88, 0, 0, 0, 2, 0, 0], 5),
        (&[0, 0x88, 0, 0, 0, 0, 0, 1, 0], 6),
        (&[0, 0x88, 0, 0, 0, 1, 0, 0], 6),
        (&[0, 0x88, 0, 0, 0, 1, 2, 1], 6),
    ] {
        let answer = format(list);
        answer.expect_sense(5, 0x2600);
        assert_eq!(answer.outcome.sense[17], byte, "{list:x?}");
    }
    format_long(&[0, 0, 0, 0x10, 0, 0, 0, 0]).expect_sense(5, 0x2600);
    format_long(&[0, 0, 0, 0, 0, 0, 0, 8]).expect_sense(5, 0x2600);
    for short in [&[0, 0, 0][..], &[0, 0x88, 0, 0, 0, 1, 0, 8, 1, 2]] {
        assert_eq!(format(short).outcome.delivery, Delivery::Overrun);
    }
    assert_eq!(read_all(&bench), vec![9; BLOCKS as usize * 512]);
}

#[test]
fn sanitize_erases_or_overwrites_everything() {
    let bench = Bench::new();
    let erase = |len: u8| bench.run(&[0x48, 2, 0, 0, 0, 0, 0, 0, len, 0], &[0; 8], 0);
    let overwrite = |list: &[u8]| {
        let [high, low] = (list.len() as u16).to_be_bytes();
        bench.run(&[0x48, 1, 0, 0, 0, 0, 0, high, low, 0], list, 0)
    };
    fill(&bench, 7);
    erase(0).expect_good();
    assert_eq!((read_all(&bench), first_status(&bench)), (vec![0; BLOCKS as usize * 512], 1));
    erase(8).expect_cdb_field(7, 7);
    for (list, last) in [
        (&[0x01, 0, 0, 4, 1, 2, 3, 4][..], [1, 2, 3, 4]),
        (&[0x82, 0, 0, 2, 0xf0, 0x0f], [0xf0, 0x0f, 0xf0, 0x0f]),
        (&[0x83, 0, 0, 1, 0], [0; 4]),
    ] {
        overwrite(list).expect_good();
        assert_eq!(read_all(&bench), last.repeat(BLOCKS as usize * 128));
        assert_eq!(first_status(&bench), 0, "overwritten is mapped, even with zeroes");
    }
    for len in [0, 4, 517] {
        overwrite(&vec![1; len]).expect_cdb_field(7, 7);
    }
    for (list, byte) in [
        (&[0, 0, 0, 1, 1][..], 0),
        (&[0x21, 0, 0, 1, 1], 0),
        (&[1, 1, 0, 1, 1], 1),
        (&[1, 0, 0, 0, 1], 2),
        (&[1, 0, 0, 2, 1], 2),
    ] {
        let answer = overwrite(list);
        answer.expect_sense(5, 0x2600);
        assert_eq!(answer.outcome.sense[17], byte, "{list:x?}");
    }
    // CRYPTOGRAPHIC ERASE: there is no key to change.
    bench.run(&[0x48, 3, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_cdb_field(1, 4);
    bench.run(&[0x48, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0).expect_good();
    assert_eq!(bench.data(&[0x12, 1, 0xb1, 0, 255, 0], 255)[7], 0x40, "WABEREQ");
}

/// The README's table of commands, as it must stand there.
fn readme_table() -> String {
    let mut table = String::from(
        "| operation | code | CDB | under a reservation of others | notes |\n|---|---|---|---|---|\n",
    );
    for command in TABLE {
        let code = match action_of(command) {
            None => format!("{:02X}h", command.opcode()),
            Some((action, _)) => format!("{:02X}h/{action:02X}h", command.opcode()),
        };
        let notes = match (command.access, command.exempt_from_attention) {
            (Access::Write, _) => "writes; refused on a read-only disk",
            (_, true) => "answered although a unit attention is due",
            (Access::Read, _) => "needs a started disk",
            (Access::None, _) => "",
        };
        let reserved = match command.conflict {
            Conflict::Never => "runs",
            Conflict::NeverPersistent => "runs, but not under a RESERVE",
            Conflict::ExclusiveAccess => "under write exclusive ones",
            Conflict::Always => "no",
            Conflict::Unless(_) => "where it takes nothing away",
            Conflict::Itself => "is about them",
        };
        let len = command.usage.len();
        table += &format!("| {} | {code} | {len} | {reserved} | {notes} |\n", command.name);
    }
    table
}

/// `UPDATE_README=1 cargo test --test commands` writes the table into the README.
#[test]
fn the_readme_lists_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- commands -->\n", "<!-- end of commands -->");
    let from = readme.find(begin).expect("the README marks where the table begins") + begin.len();
    let to = readme.find(end).expect("the README marks where the table ends");
    if std::env::var_os("UPDATE_README").is_some() {
        let new = format!("{}{}{}", &readme[..from], readme_table(), &readme[to..]);
        std::fs::write(path, new).unwrap();
        return;
    }
    assert_eq!(readme[from..to], readme_table(), "UPDATE_README=1 brings it up to date");
}
