//! Which logical unit the eight bytes of a request mean (VIRTIO 1.3, 5.6.6.1; SAM-6, 4.7), and
//! what is answered where there is none.

mod frontend;

use std::path::PathBuf;

use frontend::pattern::{assert_same, blocks};
use frontend::scsi::{response, sense};
use frontend::*;

/// A daemon with one disk for every (target, lun); disk n is n + 1 MiB large.
fn daemon_with(units: &[(u8, u16)]) -> (Daemon, Vec<PathBuf>) {
    let scratch = Scratch::new();
    let mut builder = Daemon::builder(&scratch);
    let mut disks = Vec::new();
    for (number, (target, lun)) in units.iter().enumerate() {
        let disk = scratch.image(&format!("disk{number}.img"), (number as u64 + 1) * MIB);
        builder = builder.disk(&disk, &format!("target={target},lun={lun}"));
        disks.push(disk);
    }
    (builder.spawn(), disks)
}

/// The LUN as REPORT LUNS lists it, in the form SAM demands for its size.
fn entry(lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    let form = if lun < 256 { 0 } else { 0x40 };
    [form | high, low, 0, 0, 0, 0, 0, 0]
}

const REPORT_LUNS_UNIT: [u8; 8] = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];

#[test]
fn both_forms_of_a_lun_mean_the_same_unit() {
    let units = [(0, 0), (0, 1), (0, 255)];
    let (daemon, disks) = daemon_with(&units);
    let fe = FrontEnd::connect(&daemon);
    for (number, &(target, lun)) in units.iter().enumerate() {
        let peripheral = Lun::new(&fe, Address::peripheral(target, lun as u8));
        let flat = Lun::new(&fe, Address::flat(target, lun));
        assert_eq!(peripheral.clear_unit_attentions(), [(0x29, 0x00)]);
        assert_eq!(flat.clear_unit_attentions(), [], "one unit has one unit attention");
        assert_eq!(flat.capacity().0, (number as u64 + 1) * 2048);
        let data = blocks(0, 4, 512, number as u64);
        peripheral.write10(0, &data);
        assert_same(&flat.read10(0, 4), &data, "the other form");
        flat.synchronize_cache();
        assert_same(&daemon::host_read(&disks[number], 0, 2048), &data, "the right file");
    }
}

#[test]
fn luns_above_255_have_only_the_flat_form() {
    let units = [(0, 0), (0, 300), (0, 16383)];
    let (daemon, _disks) = daemon_with(&units);
    let fe = FrontEnd::connect(&daemon);
    assert_eq!(fe.ready_lun(0, 300).blocks, 2 * 2048);
    assert_eq!(fe.ready_lun(0, 16383).blocks, 3 * 2048);
    // 300 - 256: a device that drops the upper bits would find something else.
    let response = fe.lun(0, 44).run(cdb::test_unit_ready());
    response.expect_sense(sense::LUN_NOT_SUPPORTED);
    let listed = fe.ready_lun(0, 0).report_luns(0);
    assert_eq!(listed, [entry(0), entry(300), entry(16383)]);
}

#[test]
fn several_targets() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (5, 0), (5, 7), (255, 2)]);
    let fe = FrontEnd::connect(&daemon);
    assert_eq!(fe.ready_lun(0, 0).blocks, 2048);
    assert_eq!(fe.ready_lun(5, 0).blocks, 2 * 2048);
    assert_eq!(fe.ready_lun(5, 7).blocks, 3 * 2048);
    assert_eq!(fe.ready_lun(255, 2).blocks, 4 * 2048);
    assert_eq!(fe.lun(0, 0).report_luns(0), [entry(0)]);
    assert_eq!(fe.lun(5, 0).report_luns(0), [entry(0), entry(7)]);
}

#[test]
fn an_absent_target_is_a_bad_target() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (2, 0)]);
    let fe = FrontEnd::connect(&daemon);
    for target in [1, 3, 254, 255] {
        for cdb in [cdb::inquiry(36), cdb::test_unit_ready(), cdb::report_luns(0, 16)] {
            let response = fe.lun(target, 0).run_in(cdb, 36);
            response.expect_response(response::BAD_TARGET);
            assert_eq!(response.buffer, [queue::POISON; 36], "nothing was transferred");
            assert_eq!(response.sense_len, 0);
        }
        let response = fe.lun(target, 0).run_out(cdb::write10(0, 1), &[0; 512]);
        response.expect_response(response::BAD_TARGET);
    }
}

/// The first byte says what kind of address it is; others than 1 are reserved or well-known.
#[test]
fn addresses_of_other_kinds_are_bad_targets() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (1, 0)]);
    let fe = FrontEnd::connect(&daemon);
    for bytes in [[0; 8], [0, 0, 0x40, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0], [0xff; 8]] {
        let response = Lun::new(&fe, Address(bytes)).run_in(cdb::inquiry(36), 36);
        println!("{bytes:02x?}: {response:?}");
        response.expect_response(response::BAD_TARGET);
    }
}

/// Neither the bus number of the peripheral form, nor lower levels, nor extended forms may be
/// taken for unit 0.
#[test]
fn forms_that_are_not_supported_reach_no_unit() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (0, 1)]);
    let fe = FrontEnd::connect(&daemon);
    fe.ready_lun(0, 0);
    fe.ready_lun(0, 1);
    let forms = [
        ("bus 1", [1, 0, 1, 0, 0, 0, 0, 0]),
        ("a second level", [1, 0, 0, 0, 0, 1, 0, 0]),
        ("a second level after the flat form", [1, 0, 0x40, 0, 0x40, 1, 0, 0]),
        ("logical unit addressing", [1, 0, 0x80, 0, 0, 0, 0, 0]),
        ("extended flat space addressing", [1, 0, 0xd2, 0, 0, 0, 0, 0]),
        ("another well-known unit", [1, 0, 0xc1, 0x02, 0, 0, 0, 0]),
    ];
    for (what, bytes) in forms {
        let response = Lun::new(&fe, Address(bytes)).run(cdb::test_unit_ready());
        println!("{what}: {response:?}");
        let refused = response.response == response::BAD_TARGET
            || response.response == response::INCORRECT_LUN
            || response.sense_code() == Some(sense::LUN_NOT_SUPPORTED);
        assert!(refused, "{what}: {response:?}");
    }
}

/// SAM-6, 5.11: INQUIRY tells that nothing can be there, the rest is refused.
#[test]
fn an_absent_lun_of_a_present_target() {
    let (daemon, _disks) = daemon_with(&[(0, 1)]);
    let fe = FrontEnd::connect(&daemon);
    let absent = [
        Address::flat(0, 0),
        Address::peripheral(0, 0),
        Address::peripheral(0, 2),
        Address::flat(0, 300),
    ];
    for address in absent {
        let lun = Lun::new(&fe, address);
        let data = lun.inquiry();
        assert_eq!(data[0], 0x7f, "qualifier 011b, device type 1Fh");
        assert!(data.len() >= 36, "standard INQUIRY data has 36 bytes");
        for cdb in [cdb::test_unit_ready(), cdb::start_stop_unit(1)] {
            lun.run(cdb).expect_sense(sense::LUN_NOT_SUPPORTED);
        }
        for cdb in [cdb::read10(0, 1), cdb::read_capacity10(), cdb::mode_sense6(8, 0, 255)] {
            let response = lun.run_in(cdb, 512);
            response.expect_sense(sense::LUN_NOT_SUPPORTED);
            assert_eq!(response.residual, 512);
        }
        let response = lun.run_out(cdb::write10(0, 1), &[0; 512]);
        response.expect_sense(sense::LUN_NOT_SUPPORTED);
    }
}

/// SAM-6, 5.11: REQUEST SENSE itself succeeds; the missing unit is in its parameter data.
#[test]
fn request_sense_of_an_absent_lun() {
    let (daemon, _disks) = daemon_with(&[(0, 1)]);
    let fe = FrontEnd::connect(&daemon);
    for descriptor_format in [false, true] {
        let cdb = cdb::request_sense(descriptor_format, 252);
        let response = fe.lun(0, 0).run_in(cdb, 252).expect_good();
        let sense = Sense::parse(response.data()).expect("sense data");
        assert_eq!(sense.code(), sense::LUN_NOT_SUPPORTED);
        let expected = if descriptor_format { 0x72 } else { 0x70 };
        assert_eq!(sense.response_code, expected);
    }
}

#[test]
fn report_luns_selects() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (0, 3), (0, 300)]);
    let fe = FrontEnd::connect(&daemon);
    let units = vec![entry(0), entry(3), entry(300)];
    let all = [vec![REPORT_LUNS_UNIT], units.clone()].concat();
    let sorted = |mut list: Vec<[u8; 8]>| {
        list.sort();
        list
    };
    let through = [
        ("unit 0", Address::flat(0, 0)),
        ("another unit", Address::flat(0, 300)),
        ("the well-known unit of the device", Address::report_luns_of_device()),
        ("the well-known unit of the target", Address::report_luns_of(0)),
    ];
    for (what, address) in through {
        println!("through {what}");
        let lun = Lun::new(&fe, address);
        assert_eq!(lun.report_luns(0), units);
        assert_eq!(lun.report_luns(1), [REPORT_LUNS_UNIT]);
        assert_eq!(sorted(lun.report_luns(2)), sorted(all.clone()));
        let response = lun.run_in(cdb::report_luns(0x03, 64), 64);
        let pointer = response.expect_sense(sense::INVALID_FIELD_IN_CDB).field_pointer();
        assert_eq!(pointer.map(|p| (p.in_cdb, p.byte)), Some((true, 2)));
    }
}

/// Linux asks unit 0 for the list whether it exists or not.
#[test]
fn report_luns_of_a_target_without_unit_0() {
    let (daemon, _disks) = daemon_with(&[(0, 3), (0, 4)]);
    let fe = FrontEnd::connect(&daemon);
    assert_eq!(fe.lun(0, 0).report_luns(0), [entry(3), entry(4)]);
}

#[test]
fn report_luns_is_truncated_to_the_allocation_length() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (0, 1), (0, 2)]);
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    let whole = lun.run_in(cdb::report_luns(0, 64), 64).expect_good().data().to_vec();
    assert_eq!(whole.len(), 8 + 3 * 8);
    for len in [16, 20, 24, 32] {
        let response = lun.run_in(cdb::report_luns(0, len), len as usize).expect_good();
        assert_eq!(response.data(), &whole[..len as usize], "the length field stays 24");
    }
}

#[test]
fn the_well_known_unit_knows_few_commands() {
    let (daemon, _disks) = daemon_with(&[(0, 0)]);
    let fe = FrontEnd::connect(&daemon);
    let lun = Lun::new(&fe, Address::report_luns_of(0));
    let inquiry = lun.inquiry();
    assert_eq!(inquiry[0] & 0x1f, 0x1e, "device type: well-known logical unit");
    let response = lun.run_in(cdb::read10(0, 1), 512);
    assert!(!response.is_good(), "{response:?}");
}

/// Each unit has its own power-on unit attention; three commands look past it.
#[test]
fn unit_attention_after_connecting() {
    let (daemon, _disks) = daemon_with(&[(0, 0), (0, 1), (3, 0)]);
    for _ in 0..3 {
        let fe = FrontEnd::connect(&daemon);
        for (target, lun) in [(0, 0), (0, 1), (3, 0)] {
            let lun = fe.lun(target, lun);
            lun.inquiry();
            lun.report_luns(0);
            lun.inquiry();
            let response = lun.run_in(cdb::read10(0, 1), 512);
            response.expect_sense(sense::POWER_ON_OR_RESET);
            assert_eq!(response.buffer, [queue::POISON; 512], "the command was not performed");
            lun.test_unit_ready();
        }
    }
}

/// SPC-6, 6.38: REQUEST SENSE reports a pending unit attention as data and clears it.
#[test]
fn request_sense_takes_the_unit_attention() {
    let (daemon, _disks) = daemon_with(&[(0, 0)]);
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    let ask = || {
        let response = lun.run_in(cdb::request_sense(false, 252), 252).expect_good();
        Sense::parse(response.data()).expect("sense data").code()
    };
    assert_eq!(ask(), sense::POWER_ON_OR_RESET);
    assert_eq!(ask(), (0, 0, 0), "no sense");
    lun.test_unit_ready();
}
