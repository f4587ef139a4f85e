//! What the fuzzers were given to begin with and what they have found worth keeping, run once more. The fuzzers
//! themselves are in fuzz/.
//!
//! `UPDATE_CORPORA=1` writes the seeds anew.

mod bench;
#[path = "../fuzz/drivers/mod.rs"]
mod drivers;

use std::fs;
use std::path::PathBuf;

use bench::bare;
use thinlun::scsi::cmd::{Command, Data, TABLE};

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn replay(target: &str, run: fn(&[u8]), seeds: &[(String, Vec<u8>)]) {
    let folder = corpus(target);
    if std::env::var_os("UPDATE_CORPORA").is_some() {
        fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in seeds {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
    let mut inputs: Vec<PathBuf> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(inputs.len() >= seeds.len(), "{}: seeds are missing", folder.display());
    for input in &inputs {
        println!("{}", input.display());
        run(&fs::read(input).unwrap());
    }
    println!("{target}: {} inputs", inputs.len());
}

/// A CDB that a driver might send: the first block, a block or as many bytes as there is room for.
fn plausible(command: &Command) -> Vec<u8> {
    let mut cdb = bare(command);
    // The last whole byte that is looked at ends a length or a count.
    let blocks = command.name.starts_with("READ(") || command.name.contains("WRITE");
    let last = (2..cdb.len()).rev().find(|at| command.usage[*at] == 0xff);
    if let Some(at) = last {
        cdb[at] = if blocks { 1 } else { 64 };
    }
    cdb
}

fn name_of(command: &Command) -> String {
    command.name.to_lowercase().replace([' ', '(', ')'], "_").trim_matches('_').to_owned()
}

#[test]
fn commands() {
    let seed = |command: &Command| {
        let who = if command.name.contains("LUNS") { 12 } else { 0 };
        let mut bytes = vec![0, who];
        bytes.extend(plausible(command));
        // As many bytes of CDB as the driver takes for this group.
        let len = if command.opcode() >> 5 == 3 { 32 } else { command.usage.len() };
        bytes.resize(2 + len, 0);
        let (room, out) = if command.data == Data::Out { (1u16, 512u16) } else { (1024, 0) };
        bytes.extend([room, out].map(u16::to_le_bytes).concat());
        bytes.extend(vec![0; out.into()]);
        (name_of(command), bytes)
    };
    let seeds: Vec<_> = TABLE.iter().map(seed).collect();
    replay("commands", drivers::commands::run, &seeds);
}

#[test]
fn parameters() {
    let rows = TABLE.iter().filter(|command| command.data == Data::Out);
    let seed = |(number, command): (usize, &Command)| {
        let mut bytes = vec![0, 0, number as u8];
        bytes.extend(plausible(command));
        let list = list_for(command);
        bytes.extend((list.len() as u16).to_le_bytes());
        bytes.extend(list);
        (name_of(command), bytes)
    };
    let seeds: Vec<_> = rows.enumerate().map(seed).collect();
    replay("parameters", drivers::parameters::run, &seeds);
}

/// A parameter list of the right form.
fn list_for(command: &Command) -> Vec<u8> {
    match command.name {
        "UNMAP" => [&[0, 22, 0, 16, 0, 0, 0, 0][..], &[0; 8], &[0, 0, 0, 8, 0, 0, 0, 0]].concat(),
        "MODE SELECT(6)" => [&[0; 4][..], &[8, 0x12, 4], &[0; 17]].concat(),
        "MODE SELECT(10)" => [&[0; 8][..], &[8, 0x12, 4], &[0; 17]].concat(),
        "FORMAT UNIT" => vec![0, 2, 0, 0],
        "LOG SELECT" => vec![0x0f, 0, 0, 7, 0, 3, 3, 3, 9, 8, 7],
        "SET TIMESTAMP" => vec![0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0],
        "PERSISTENT RESERVE OUT REGISTER AND MOVE" => {
            let ports =
                [&[0; 16][..], &[0, 2, 0, 2, 0, 0, 0, 24, 0x0f, 0, 0, 0], b"THINLUN "].concat();
            [&ports[..], &[0; 11], &[2]].concat()
        }
        name if name.starts_with("PERSISTENT RESERVE OUT") => vec![0; 24],
        "SANITIZE OVERWRITE" => vec![1, 0, 0, 4, 1, 2, 3, 4],
        "EXTENDED COPY(LID1)" => {
            let descriptor = [
                &[0xe4, 0, 0, 0, 1, 3, 0, 8, 0x30, 1, 2, 3, 4, 5, 6, 0][..],
                &[0; 12],
                &[0, 0, 2, 0],
            ];
            let segment =
                [&[2, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 8][..], &[0; 8], &[0, 0, 0, 0, 0, 0, 0, 16]];
            let head = [1, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
            [&head[..], &descriptor.concat(), &segment.concat()].concat()
        }
        "POPULATE TOKEN" => [
            &[0, 30, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 16][..],
            &[0; 8],
            &[0, 0, 0, 8, 0, 0, 0, 0],
        ]
        .concat(),
        _ => vec![0; 512],
    }
}

#[test]
fn chains() {
    let seeds = [
        ("read".to_owned(), request(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0, 512)),
        ("write".to_owned(), request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512, 0)),
        ("inquiry".to_owned(), request(&[0x12, 0, 0, 0, 36, 0], 0, 36)),
        ("reset".to_owned(), lun_reset()),
        ("direct_then_indirect".to_owned(), direct_then_indirect(2)),
        ("indirect_in_itself".to_owned(), direct_then_indirect(4)),
        ("padded_header".to_owned(), padded_header()),
    ];
    replay("chains", drivers::chains::run, &seeds);
}

/// Where the driver of the fuzzer puts the input's rest.
const DATA: u16 = 0x1000;

fn descriptor(address: u16, len: u16, flags: u8, next: u8) -> Vec<u8> {
    [&address.to_le_bytes()[..], &[0], &len.to_le_bytes(), &[flags, next]].concat()
}

/// Queue, entries, sixteen descriptors, sixteen heads, data.
fn image(queue: u8, descriptors: &[Vec<u8>], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![queue, 1];
    bytes.extend(descriptors.concat());
    bytes.extend(vec![0; 7 * (16 - descriptors.len()) + 16]);
    bytes.extend(data);
    bytes
}

fn request(cdb: &[u8], out: u16, room: u16) -> Vec<u8> {
    let header = header(cdb);
    let (response, data) = (DATA + 0x100, DATA + 0x200);
    let mut chain = vec![descriptor(DATA, 51, 1, 1)];
    if out > 0 {
        chain.push(descriptor(data, out, 1, 2));
    }
    let more = room > 0;
    chain.push(descriptor(response, 108, if more { 3 } else { 2 }, chain.len() as u8 + 1));
    if more {
        chain.push(descriptor(data, room, 2, 0));
    }
    image(2, &chain, &header)
}

/// Where the bytes of [`header`] end and a table may be.
const TABLE_AT: u16 = DATA + 0x80;

fn header(cdb: &[u8]) -> Vec<u8> {
    let mut header = vec![1, 0, 0x40, 0, 0, 0, 0, 0];
    header.extend([0; 11]);
    header.extend(cdb);
    header.resize(51, 0);
    header
}

/// A READ whose response and data are in a table; the table's last descriptor has these flags.
fn direct_then_indirect(flags: u16) -> Vec<u8> {
    let chain = [descriptor(DATA, 51, 1, 1), descriptor(TABLE_AT, 32, 4, 0)];
    let entry = |address: u16, len: u32, flags: u16, next: u16| {
        let address = u64::from(address).to_le_bytes();
        [&address[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    let mut data = header(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    data.resize(usize::from(TABLE_AT - DATA), 0);
    data.extend(entry(DATA + 0x100, 108, 3, 1));
    data.extend(entry(DATA + 0x200, 512, flags, 0));
    image(2, &chain, &data)
}

/// A READ of a legacy driver that rounds up the lengths of its structures.
fn padded_header() -> Vec<u8> {
    let chain = [
        descriptor(DATA, 64, 1, 1),
        descriptor(DATA + 0x100, 128, 3, 2),
        descriptor(DATA + 0x200, 512, 2, 0),
    ];
    image(0x82, &chain, &header(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]))
}

fn lun_reset() -> Vec<u8> {
    let chain = [descriptor(DATA, 24, 1, 1), descriptor(DATA + 0x100, 1, 2, 0)];
    let function = [&[0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0][..], &[0; 8]].concat();
    image(0, &chain, &function)
}

#[test]
fn messages() {
    let message = |request: u8, fds: u8, payload: &[u8]| {
        [&[request, fds << 1, payload.len() as u8][..], payload].concat()
    };
    let word = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<u8>>();
    let state = |index: u32, number: u32| [index, number].map(u32::to_ne_bytes).concat();
    let start = [
        message(3, 0, &[]),
        message(1, 0, &[]),
        message(15, 0, &[]),
        message(16, 0, &word(&[0x902b])),
        message(17, 0, &[]),
        message(31, 0, &word(&[0, 0, 3 | 16 << 16])),
        message(32, 1, &word(&[4096, 0, 3 | 16 << 16])),
        message(2, 0, &word(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28])),
        message(5, 1, &word(&[1, 0, 65536, 0x10000, 0])),
        message(6, 1, &word(&[4096, 0])),
        message(8, 0, &state(2, 16)),
        message(10, 0, &state(2, 0)),
        message(9, 0, &[state(2, 0), word(&[0x10000, 0x11000, 0x12000, 0])].concat()),
        // The second descriptor of a message is the event.
        message(12, 1 | 8, &word(&[2])),
        message(18, 0, &state(2, 1)),
        message(2, 0, &word(&[1 << 32 | 1 << 30 | 1 << 26])),
        message(24, 0, &[0; 20]),
        message(37, 1, &word(&[0, 0x100000, 4096, 0x200000, 0])),
        message(38, 0, &word(&[0, 0x100000, 4096, 0x200000, 0])),
        message(11, 0, &state(2, 0)),
        message(34, 0, &[]),
    ];
    let whole = ("session".to_owned(), start.concat());
    // Up to the memory, then a ring in another order, without a kick descriptor, without its memory for a while.
    let begin = start.get(..9).unwrap().concat();
    let ring = word(&[0x10000, 0x11000, 0x12000, 0]);
    let addresses = message(9, 0, &[state(2, 0), ring].concat());
    let kick = message(12, 1 | 8, &word(&[2]));
    let (size, base) = (message(8, 0, &state(2, 16)), message(10, 0, &state(2, 0)));
    let enable = message(18, 0, &state(2, 1));
    let region = word(&[0, 0, 65536, 0x10000, 0]);
    let away = [message(38, 0, &region), message(37, 1, &region)].concat();
    let again = message(8, 0, &state(2, 8));
    let stop = message(11, 0, &state(2, 0));
    let rings = [
        (
            "backwards",
            [&enable, &kick, &addresses, &size, &base, &again, &stop].map(Vec::as_slice).concat(),
        ),
        (
            "polled",
            [&size, &addresses, &message(12, 0, &word(&[2 | 1 << 8])), &enable, &stop]
                .map(Vec::as_slice)
                .concat(),
        ),
        (
            "memory_away",
            [&size, &addresses, &kick, &enable, &away, &stop].map(Vec::as_slice).concat(),
        ),
        (
            "reset_in_flight",
            [&size, &base, &addresses, &kick, &enable, &message(34, 0, &[]), &size, &enable]
                .map(Vec::as_slice)
                .concat(),
        ),
    ];
    let rings = rings.map(|(name, rest)| (format!("ring_{name}"), [&begin[..], &rest].concat()));
    let parts =
        start.iter().enumerate().map(|(n, bytes)| (format!("message_{n:02}"), bytes.clone()));
    let seeds: Vec<_> = std::iter::once(whole).chain(rings).chain(parts).collect();
    replay("messages", drivers::messages::run, &seeds);
}
