//! Any CDBs with any data, over stores in memory.

use super::Input;
use super::disk::Bench;

/// Commands of one input.
const MAX_COMMANDS: usize = 24;
/// Bytes of data each way.
const MAX_DATA: usize = 16 << 10;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let bench = Bench::new(input.byte());
    for _ in 0..MAX_COMMANDS {
        if input.is_empty() {
            return;
        }
        let who = input.byte();
        let opcode = input.byte();
        let len = match opcode >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ => 32,
        };
        let cdb = [vec![opcode], input.bytes(len - 1)].concat();
        let (room, out) = (usize::from(input.u16()), usize::from(input.u16()));
        // One direction at a time, as the transport has it.
        let (room, out) = if room % 2 == 0 { (room % MAX_DATA, 0) } else { (0, out % MAX_DATA) };
        let out = input.bytes(out);
        bench.run(who, &cdb, &out, room);
    }
}
