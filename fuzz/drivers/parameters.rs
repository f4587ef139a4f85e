//! Commands with a parameter list: the CDB is as it must be, the list is anything.

use thinlun::scsi::cmd::{Command, Data, ServiceAction, TABLE};

use super::Input;
use super::disk::Bench;

const MAX_LISTS: usize = 12;
const MAX_LIST: usize = 4096;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let bench = Bench::new(input.byte());
    let rows: Vec<&Command> = TABLE.iter().filter(|c| c.data == Data::Out).collect();
    for _ in 0..MAX_LISTS {
        if input.is_empty() {
            return;
        }
        let who = input.byte() & 3;
        let row = rows[usize::from(input.byte()) % rows.len()];
        // Any bits that the command looks at, and the list's true length.
        let bits = input.bytes(row.usage.len());
        let mut cdb: Vec<u8> = bits.iter().zip(row.usage).map(|(bits, used)| bits & used).collect();
        cdb[0] = row.opcode();
        match row.service_action {
            ServiceAction::None => {}
            ServiceAction::Byte1(action) => cdb[1] = cdb[1] & 0xe0 | action,
            ServiceAction::Variable(action) => {
                cdb[7] = row.usage.len() as u8 - 8;
                cdb[8..10].copy_from_slice(&action.to_be_bytes());
            }
        }
        let len = usize::from(input.u16()) % MAX_LIST;
        let list = input.bytes(len);
        if let Some((at, width)) = length_field(&cdb) {
            cdb[at..at + width].copy_from_slice(&(len as u64).to_be_bytes()[8 - width..]);
        }
        bench.run(who, &cdb, &list, 0);
    }
    // Whatever the lists did, the disk still tells of all its blocks.
    bench.run(0, &[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0], &[], 1024);
}

/// Where the length of the parameter list stands, and how many bytes it has.
fn length_field(cdb: &[u8]) -> Option<(usize, usize)> {
    match cdb[0] {
        0x15 => Some((4, 1)),
        0x42 | 0x48 | 0x4c | 0x55 => Some((7, 2)),
        0x83 => Some((10, 4)),
        0x5f => Some((5, 4)),
        0xa4 => Some((6, 4)),
        0x1d => Some((3, 2)),
        0x3b => Some((6, 3)),
        _ => None,
    }
}
