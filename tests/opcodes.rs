//! REPORT SUPPORTED OPERATION CODES, proved from outside: every operation code and service action there is, and every
//! reserved bit of every command that is said to be there.

mod frontend;

use frontend::scsi::{key, sense};
use frontend::*;

/// A command as the report describes it.
struct Described {
    opcode: u8,
    action: Option<u16>,
    length: usize,
}

fn all_commands(lun: &Lun<'_>) -> Vec<Described> {
    let data = lun.run_in(Cdb::from_slice(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]), 16384);
    let data = data.expect_good().data().to_vec();
    assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize, data.len() - 4);
    let described = |d: &[u8]| Described {
        opcode: d[0],
        action: (d[5] & 1 != 0).then(|| u16::from_be_bytes([d[2], d[3]])),
        length: usize::from(u16::from_be_bytes([d[6], d[7]])),
    };
    data[4..].chunks(8).map(described).collect()
}

impl Described {
    fn cdb(&self) -> Cdb {
        name(self.opcode, self.action.unwrap_or(0))
    }

    /// CDB usage data, by the one-command format.
    fn usage(&self, lun: &Lun<'_>) -> Vec<u8> {
        let option = if self.action.is_some() { 2 } else { 1 };
        let [high, low] = self.action.unwrap_or(0).to_be_bytes();
        let cdb = [0xa3, 0x0c, option, self.opcode, high, low, 0, 0, 1, 0, 0, 0];
        let data = lun.run_in(Cdb::from_slice(&cdb), 256).expect_good().data().to_vec();
        assert_eq!((data[1] & 7, usize::from(data[3])), (3, self.length));
        data[4..].to_vec()
    }

    /// Where bits name the command rather than being looked at or not.
    fn names(&self, byte: usize, bit: u8) -> bool {
        match (self.action, self.opcode) {
            (None, _) => byte == 0,
            (Some(_), 0x7f) => matches!(byte, 0 | 7..=9),
            (Some(_), _) => byte == 0 || byte == 1 && bit < 5,
        }
    }
}

/// A CDB of this operation code and service action, zero otherwise.
fn name(opcode: u8, action: u16) -> Cdb {
    let [high, low] = action.to_be_bytes();
    match opcode {
        0x7f => Cdb::new(opcode).byte(7, 0x18).byte(8, high).byte(9, low),
        _ => Cdb::new(opcode).or(1, low),
    }
}

/// What the answer says about the command's being there. Modes, as READ BUFFER has them, are no service actions.
fn is_there(answer: &ScsiResponse, has_actions: bool) -> bool {
    let Some((key::ILLEGAL_REQUEST, asc, 0)) = answer.sense_code() else { return true };
    let pointer = answer.sense.as_ref().and_then(|sense| sense.field_pointer());
    let at = pointer.map(|pointer| (pointer.in_cdb, pointer.byte, pointer.bit));
    let wrong_action = [Some((true, 1, Some(4))), Some((true, 8, Some(7)))].contains(&at);
    asc != 0x20 && !(asc == 0x24 && has_actions && wrong_action)
}

/// Puts things back that a command has done.
fn recover(lun: &Lun<'_>) {
    lun.run(Cdb::from_slice(&[0x1b, 0, 0, 0, 1, 0]));
    lun.run(Cdb::new(0x17));
}

#[test]
fn what_is_reported_is_there_and_nothing_else() {
    let daemon = Daemon::with_disk(64 * KIB, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let commands = all_commands(&lun);
    let mut asked = 0;
    for opcode in 0..=255u8 {
        let has_actions = commands.iter().any(|c| c.opcode == opcode && c.action.is_some());
        let actions = match opcode {
            0x7f => 0..=u16::MAX,
            _ if has_actions => 0..=0x1f,
            _ => 0..=0,
        };
        for action in actions {
            let found = is_there(&lun.run(name(opcode, action)), has_actions);
            let said = |c: &Described| c.opcode == opcode && c.action.unwrap_or(0) == action;
            assert_eq!(found, commands.iter().any(said), "{opcode:#04x}/{action:#06x}");
            asked += 1;
            if found {
                recover(&lun);
            }
        }
    }
    println!("{asked} operation codes and service actions, {} are there", commands.len());
}

#[test]
fn every_reserved_bit_is_refused_and_pointed_at() {
    let daemon = Daemon::with_disk(64 * KIB, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let (mut reserved, mut used) = (0, 0);
    for command in all_commands(&lun) {
        let usage = command.usage(&lun);
        for (byte, mask) in usage.iter().enumerate() {
            for bit in (0..8).filter(|bit| !command.names(byte, *bit)) {
                if mask & 1 << bit != 0 {
                    used += 1;
                    continue;
                }
                reserved += 1;
                let what =
                    format!("{:#04x}/{:?}, byte {byte} bit {bit}", command.opcode, command.action);
                let answer = lun.run(command.cdb().or(byte, 1 << bit));
                assert_eq!(
                    answer.sense_code(),
                    Some(sense::INVALID_FIELD_IN_CDB),
                    "{what}: {answer:?}"
                );
                let pointer = answer.sense.as_ref().and_then(|sense| sense.field_pointer());
                let pointer = pointer.unwrap_or_else(|| panic!("{what}: no field pointer"));
                let expected = (true, byte as u16, Some(bit));
                assert_eq!((pointer.in_cdb, pointer.byte, pointer.bit), expected, "{what}");
            }
        }
    }
    println!("{reserved} reserved bits were refused, {used} are looked at");
}
