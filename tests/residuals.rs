//! Buffers that do not fit the command (VIRTIO 1.3, 5.6.6.1.1): OVERRUN where the CDB needs more
//! than there is, a residual count where there is more than it needs.

mod frontend;

use frontend::pattern::{assert_same, blocks};
use frontend::queue::POISON;
use frontend::scsi::{RESPONSE_HEADER, response, sense};
use frontend::*;

const DISK: u64 = MIB;
const BLOCK: usize = 512;

fn with_lun(test: impl FnOnce(&Daemon, &Lun<'_>)) {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    test(&daemon, &fe.ready_lun(0, 0));
}

/// Nothing but the response header was written.
#[track_caller]
fn assert_nothing_transferred(response: &ScsiResponse) {
    assert!(response.buffer.iter().all(|&byte| byte == POISON), "data was written: {response:?}");
    assert!(response.used_len as usize <= RESPONSE_HEADER, "{response:?}");
}

#[test]
fn reading_into_too_small_a_buffer_is_an_overrun() {
    with_lun(|_, lun| {
        for (blocks, room) in [(1, 0), (1, 1), (1, 511), (2, 512), (8, 4095), (128, 512)] {
            let response = lun.run_in(cdb::read10(0, blocks), room);
            response.expect_response(response::OVERRUN);
            assert_nothing_transferred(&response);
        }
        lun.test_unit_ready();
    });
}

#[test]
fn writing_from_too_small_a_buffer_is_an_overrun() {
    with_lun(|daemon, lun| {
        let data = blocks(0, 8, BLOCK, 1);
        for (blocks, len) in [(1, 0), (1, 1), (1, 511), (2, 512), (8, 4095)] {
            let response = lun.run_out(cdb::write10(0, blocks), &data[..len]);
            response.expect_response(response::OVERRUN);
            assert_nothing_transferred(&response);
        }
        let on_disk = daemon::host_read(&daemon.disk(), 0, data.len());
        assert_same(&on_disk, &vec![0; data.len()], "a disk nobody wrote to");
    });
}

#[test]
fn parameter_lists_that_are_not_there_are_an_overrun() {
    with_lun(|_, lun| {
        let response = lun.run_out(cdb::mode_select10(28), &[0; 8]);
        response.expect_response(response::OVERRUN);
        let response = lun.run_out(cdb::verify10(1, 0, 2), &[0; 512]);
        response.expect_response(response::OVERRUN);
    });
}

/// "such as allocation length": the CDB counts, not what there is to say.
#[test]
fn an_allocation_length_above_the_buffer_is_an_overrun() {
    with_lun(|_, lun| {
        for cdb in [cdb::inquiry(255), cdb::read_capacity16(255), cdb::report_luns(0, 255)] {
            let response = lun.run_in(cdb, 254);
            response.expect_response(response::OVERRUN);
            assert_nothing_transferred(&response);
        }
        let response = lun.run_in(cdb::read_capacity10(), 7);
        response.expect_response(response::OVERRUN);
    });
}

#[test]
fn data_in_the_wrong_direction_is_an_overrun() {
    with_lun(|daemon, lun| {
        let response = lun.run_out(cdb::read10(0, 1), &[1; 512]);
        response.expect_response(response::OVERRUN);
        let response = lun.run_in(cdb::write10(0, 1), 512);
        response.expect_response(response::OVERRUN);
        assert_nothing_transferred(&response);
        let response = lun.run_out(cdb::inquiry(36), &[1; 36]);
        response.expect_response(response::OVERRUN);
        let on_disk = daemon::host_read(&daemon.disk(), 0, 512);
        assert_same(&on_disk, &[0; 512], "a disk nobody wrote to");
    });
}

#[test]
fn reading_into_a_larger_buffer_leaves_a_residual() {
    with_lun(|_, lun| {
        let data = blocks(0, 8, BLOCK, 1);
        lun.write10(0, &data);
        for (count, room) in [(1, 513), (1, 1024), (2, 4096), (8, 4097), (1, 65536)] {
            let response = lun.run_in(cdb::read10(0, count), room).expect_good();
            let len = usize::from(count) * BLOCK;
            assert_eq!(response.residual as usize, room - len, "{count} blocks, {room} bytes");
            assert_eq!(response.used_len as usize, RESPONSE_HEADER + len, "the used length");
            assert_same(response.data(), &data[..len], "the data");
            assert!(response.buffer[len..].iter().all(|&byte| byte == POISON), "too much data");
        }
    });
}

#[test]
fn writing_from_a_larger_buffer_leaves_a_residual() {
    with_lun(|daemon, lun| {
        let data = blocks(0, 8, BLOCK, 1);
        for (count, len) in [(1, 513), (1, 1024), (2, 4096), (4, 2049)] {
            let response = lun.run_out(cdb::write10(16, count), &data[..len]).expect_good();
            assert_eq!(response.residual as usize, len - usize::from(count) * BLOCK);
            assert_eq!(response.used_len as usize, RESPONSE_HEADER, "the used length");
        }
        lun.synchronize_cache();
        let on_disk = daemon::host_read(&daemon.disk(), 16 * 512, 8 * BLOCK);
        assert_same(&on_disk[..4 * BLOCK], &data[..4 * BLOCK], "the blocks of the CDB");
        assert_same(&on_disk[4 * BLOCK..], &[0; 4 * BLOCK], "the blocks behind them");
    });
}

#[test]
fn residuals_do_not_depend_on_how_buffers_are_cut() {
    with_lun(|_, lun| {
        let data = blocks(0, 2, BLOCK, 1);
        lun.write10(0, &data);
        for step in [3, 7, 100, 511, 512, 513, 1000] {
            let shape = Shape { writable: Cuts::DataEvery(step), ..Shape::default() }.indirect();
            let response = lun.with_shape(shape).run_in(cdb::read10(0, 2), 1500).expect_good();
            assert_eq!((response.residual, response.used_len), (1500 - 1024, 108 + 1024));
            assert_same(response.data(), &data, "the data");
            let shape = Shape { readable: Cuts::DataEvery(step), ..Shape::default() }.indirect();
            let longer = [&data[..], &[9; 100]].concat();
            let lun = lun.with_shape(shape);
            let response = lun.run_out(cdb::write10(0, 2), &longer).expect_good();
            assert_eq!((response.residual, response.used_len), (100, 108));
        }
    });
}

#[test]
fn transfers_of_no_blocks() {
    with_lun(|_, lun| {
        for cdb in [cdb::read10(0, 0), cdb::read12(5, 0), cdb::read16(5, 0)] {
            lun.run(cdb).expect_good();
            let response = lun.run_in(cdb, 512).expect_good();
            assert_eq!((response.residual, response.used_len), (512, 108));
            assert_nothing_transferred(&response);
        }
        for cdb in [cdb::write10(0, 0), cdb::write12(5, 0), cdb::write16(5, 0)] {
            lun.run(cdb).expect_good();
            let response = lun.run_out(cdb, &[1; 512]).expect_good();
            assert_eq!((response.residual, response.used_len), (512, 108));
        }
        assert_same(&lun.read10(0, 8), &[0; 4096], "a disk nobody wrote to");
    });
}

#[test]
fn commands_without_data_leave_all_of_it() {
    with_lun(|_, lun| {
        for cdb in [cdb::test_unit_ready(), cdb::synchronize_cache10(0, 0)] {
            let response = lun.run_in(cdb, 512).expect_good();
            assert_eq!((response.residual, response.used_len), (512, 108), "{cdb:?}");
            assert_nothing_transferred(&response);
            let response = lun.run_out(cdb, &[1; 100]).expect_good();
            assert_eq!((response.residual, response.used_len), (100, 108), "{cdb:?}");
        }
    });
}

#[test]
fn a_short_allocation_length_truncates() {
    with_lun(|_, lun| {
        type WithLength = fn(u16) -> Cdb;
        let commands: [(&str, WithLength); 5] = [
            ("INQUIRY", cdb::inquiry),
            ("VPD 83h", |len| cdb::inquiry_vpd(0x83, len)),
            ("READ CAPACITY (16)", |len| cdb::read_capacity16(len.into())),
            ("MODE SENSE (10)", |len| cdb::mode_sense10(0x08, 0, len)),
            ("REQUEST SENSE", |len| cdb::request_sense(false, len as u8)),
        ];
        for (what, cdb) in commands {
            let room = 252;
            let whole = lun.run_in(cdb(room), room.into()).expect_good().data().to_vec();
            assert!(!whole.is_empty() && whole.len() < room.into(), "{what} has data");
            for len in 0..whole.len() as u16 {
                let response = lun.run_in(cdb(len), len.into()).expect_good();
                assert_eq!(response.residual, 0, "{what}, {len} bytes");
                assert_eq!(response.data(), &whole[..len.into()], "{what}, {len} bytes");
                assert_eq!(response.used_len, 108 + u32::from(len), "{what}, {len} bytes");
            }
            // A larger buffer than the allocation length.
            let response = lun.run_in(cdb(4), 100).expect_good();
            assert_eq!((response.residual, response.used_len), (96, 112), "{what}");
            assert!(response.buffer[4..].iter().all(|&byte| byte == POISON), "{what}");
        }
    });
}

#[test]
fn a_failed_command_transfers_nothing() {
    with_lun(|_, lun| {
        let end = (DISK / 512) as u32;
        let response = lun.run_in(cdb::read10(end, 1), 512);
        response.expect_sense(sense::LBA_OUT_OF_RANGE);
        assert_eq!(response.residual, 512);
        assert_nothing_transferred(&response);
        let response = lun.run_out(cdb::write10(end, 1), &[0; 512]);
        response.expect_sense(sense::LBA_OUT_OF_RANGE);
        assert_eq!(response.residual, 512);
        let response = lun.run_in(Cdb::new(0xf0), 100);
        response.expect_sense(sense::INVALID_OPCODE);
        assert_eq!(response.residual, 100);
        assert!((18..=96).contains(&response.sense_len), "sense length {}", response.sense_len);
    });
}

/// Both directions at once need VIRTIO_SCSI_F_INOUT, which was not negotiated.
#[test]
fn data_in_both_directions_is_refused() {
    with_lun(|_, lun| {
        let request = lun.request(cdb::read10(0, 1)).data_in(512).data_out(vec![1; 512]);
        let response = lun.execute(&request);
        println!("{response:?}");
        if response.is_good() {
            // A device may as well ignore the buffer that the command does not use.
            assert_same(&response.buffer, &[0; 512], "the data");
        }
        lun.test_unit_ready();
    });
}
