//! EXTENDED COPY and ROD tokens over the socket, on real file systems, held against a model.

mod frontend;
mod mounts;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use frontend::daemon::{Scratch, host_read, host_write};
use frontend::pattern::{Rng, assert_same};
use frontend::scsi::{response, sense};
use frontend::*;
use mounts::{ALL, Kind, Mount, skipped};

const SIZE: u64 = 8 * MIB;
const HOST_BLOCK: u64 = 4096;

const UNREACHABLE: sense::Code = (0xa, 0x08, 0x04);
const INEXACT: sense::Code = (0xa, 0x26, 0x0a);
const PAST_THE_END: sense::Code = (0xa, 0, 0);
const fn token_error(ascq: u8) -> sense::Code {
    (5, 0x23, ascq)
}

/// LIST ID USAGE and list identifier of a list that nobody asks about.
const NO_LIST_ID: (u8, u8) = (0b11, 0);

/// An identification CSCD descriptor with a designator of VPD page 83, by its place there.
fn cscd(lun: &Lun<'_>, designator: usize) -> Vec<u8> {
    let page = lun.vpd(0x83);
    let mut at = 4;
    for _ in 0..designator {
        at += 4 + usize::from(page[at + 3]);
    }
    let len = usize::from(page[at + 3]);
    let mut descriptor = vec![0xe4, 0, 0, 0, page[at], page[at + 1], 0, len as u8];
    descriptor.extend(&page[at + 4..at + 4 + len]);
    descriptor.resize(28, 0);
    descriptor.push(0);
    descriptor.extend(&(lun.block_size as u32).to_be_bytes()[1..]);
    descriptor
}

/// Segment 02h.
fn blocks(from: (u16, u64), to: (u16, u64), count: u16, dc: bool) -> Vec<u8> {
    let mut s = vec![0x02, if dc { 2 } else { 0 }, 0, 0x18];
    s.extend(from.0.to_be_bytes());
    s.extend(to.0.to_be_bytes());
    s.extend([0, 0]);
    s.extend(count.to_be_bytes());
    s.extend(from.1.to_be_bytes());
    s.extend(to.1.to_be_bytes());
    s
}

/// Segment 0Ah, between bytes of disks with these block sizes.
fn bytes(from: (u16, u64, u64), to: (u16, u64, u64), count: u32) -> Vec<u8> {
    let mut s = vec![0x0a, 0, 0, 0x1c];
    s.extend(from.0.to_be_bytes());
    s.extend(to.0.to_be_bytes());
    s.extend(count.to_be_bytes());
    s.extend((from.1 / from.2).to_be_bytes());
    s.extend((to.1 / to.2).to_be_bytes());
    s.extend(((from.1 % from.2) as u16).to_be_bytes());
    s.extend(((to.1 % to.2) as u16).to_be_bytes());
    s
}

/// A parameter list of EXTENDED COPY(LID1).
fn list((usage, id): (u8, u8), cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (cscds, segments) = (cscds.concat(), segments.concat());
    let mut list = vec![id, usage << 3];
    list.extend((cscds.len() as u16).to_be_bytes());
    list.extend([0; 4]);
    list.extend((segments.len() as u32).to_be_bytes());
    list.extend([0; 4]);
    list.extend(cscds);
    list.extend(segments);
    list
}

/// A parameter list of EXTENDED COPY(LID4).
fn list_lid4(id: u32, immediate: bool, cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (cscds, segments) = (cscds.concat(), segments.concat());
    let mut list = vec![0; 48];
    list[0] = 1;
    list[3] = 0x20;
    list[15] = u8::from(immediate);
    list[16] = 0xff;
    list[20..24].copy_from_slice(&id.to_be_bytes());
    list[42..44].copy_from_slice(&(cscds.len() as u16).to_be_bytes());
    list[44..46].copy_from_slice(&(segments.len() as u16).to_be_bytes());
    list.extend(cscds);
    list.extend(segments);
    list
}

fn xcopy(lun: &Lun<'_>, list: &[u8]) -> ScsiResponse {
    lun.run_out(cdb::extended_copy_lid1(list.len() as u32), list)
}

fn xcopy_lid4(lun: &Lun<'_>, list: &[u8]) -> ScsiResponse {
    lun.run_out(cdb::extended_copy_lid4(list.len() as u32), list)
}

fn copy(lun: &Lun<'_>, cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> ScsiResponse {
    xcopy(lun, &list(NO_LIST_ID, cscds, segments))
}

/// POPULATE TOKEN and RECEIVE ROD TOKEN INFORMATION; the token and the blocks it stands for.
fn populate(lun: &Lun<'_>, id: u32, timeout: u32, ranges: &[(u64, u32)]) -> (Vec<u8>, u64) {
    let mut list = vec![0; 16];
    list[4..8].copy_from_slice(&timeout.to_be_bytes());
    append_ranges(&mut list, 14, ranges);
    let cdb = cdb::populate_token(list.len() as u32).be32(6, id);
    lun.run_out(cdb, &list).expect_good();
    let (status, blocks, rest) = token_information(lun, id);
    assert_eq!(status, 0x01);
    assert_eq!(rest.len(), 514, "one token");
    (rest[2..].to_vec(), blocks)
}

/// Status, transfer count and token descriptors.
fn token_information(lun: &Lun<'_>, id: u32) -> (u8, u64, Vec<u8>) {
    let answer = lun.run_in(cdb::receive_copy_lid4(0x07, id, 1024), 1024).expect_good();
    let data = answer.data();
    assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize + 4, data.len());
    assert_eq!(data[15], 0xf1, "logical blocks");
    let sense = usize::from(data[13]);
    let tokens = u32::from_be_bytes(data[32 + sense..36 + sense].try_into().unwrap());
    assert_eq!(tokens as usize, data.len() - 36 - sense);
    let count = u64::from_be_bytes(data[16..24].try_into().unwrap());
    (data[5], count, data[36 + sense..].to_vec())
}

fn append_ranges(list: &mut Vec<u8>, length_at: usize, ranges: &[(u64, u32)]) {
    list[length_at..length_at + 2].copy_from_slice(&(16 * ranges.len() as u16).to_be_bytes());
    for (lba, count) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    let len = list.len() as u16 - 2;
    list[..2].copy_from_slice(&len.to_be_bytes());
}

fn write_token(
    lun: &Lun<'_>,
    id: u32,
    token: &[u8],
    flags: u8,
    offset: u64,
    ranges: &[(u64, u32)],
) -> ScsiResponse {
    let list = write_token_list(token, flags, offset, ranges);
    lun.run_out(cdb::write_using_token(list.len() as u32).be32(6, id), &list)
}

/// The parameter list of WRITE USING TOKEN.
fn write_token_list(token: &[u8], flags: u8, offset: u64, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut list = vec![0; 536];
    list[2] = flags;
    list[8..16].copy_from_slice(&offset.to_be_bytes());
    list[16..528].copy_from_slice(token);
    append_ranges(&mut list, 534, ranges);
    list
}

/// PROVISIONING STATUS of each of the host's blocks in a range of bytes.
fn statuses(lun: &Lun<'_>, range: std::ops::Range<u64>) -> Vec<u8> {
    let block = lun.block_size as u64;
    let mut all = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let cdb = cdb::get_lba_status16(at / block, 8 + 16 * 64, 0);
        let answer = lun.run_in(cdb, 8 + 16 * 64).expect_good();
        for d in answer.data()[8..].chunks_exact(16) {
            let blocks: u64 = u32::from_be_bytes(d[8..12].try_into().unwrap()).into();
            let end = range.end.min(at + blocks * block);
            while at < end {
                all.push(d[12] & 0xf);
                at += HOST_BLOCK;
            }
        }
    }
    all.truncate(((range.end - range.start) / HOST_BLOCK) as usize);
    all
}

fn sparse(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Two disks of different block sizes on one file system.
struct Pair {
    kind: Kind,
    daemon: Daemon,
    paths: [PathBuf; 2],
    mount: Mount,
}

impl Pair {
    fn new(kind: Kind, mib: u64, size: u64, options: [&str; 2]) -> Option<Self> {
        let mount = Mount::new(kind, mib)?;
        let paths = ["a.img", "b.img"].map(|name| mount.path().join(name));
        paths.iter().for_each(|path| sparse(path, size));
        let scratch = Scratch::new();
        let mut builder = Daemon::builder(&scratch);
        for (path, options) in paths.iter().zip(options) {
            builder = builder.disk(path, options);
        }
        let daemon = builder.spawn();
        Some(Pair { kind, daemon, paths, mount })
    }

    fn reflinks(&self) -> bool {
        matches!(self.kind, Kind::Xfs | Kind::Btrfs)
    }
}

/// A copy to be made: in bytes of the two disks.
struct Move {
    from: (usize, u64),
    to: (usize, u64),
    len: u64,
}

/// Random copies of every kind, across and within disks, overlapping or not, aligned or not: the bytes are
/// those of the model, and whole blocks of the host keep what they were.
#[test]
fn random_copies_agree_with_the_model() {
    let mut copies = 0;
    for kind in ALL {
        for caches in [["", "block-size=4096"], ["cache=direct", "cache=direct,block-size=4096"]] {
            if kind == Kind::Tmpfs && !caches[0].is_empty() {
                continue;
            }
            let Some(pair) = Pair::new(kind, 512, SIZE, caches) else { continue };
            let fe = FrontEnd::connect(&pair.daemon);
            let luns = [fe.ready_lun(0, 0), fe.ready_lun(0, 1)];
            let mut model = [vec![0; SIZE as usize], vec![0; SIZE as usize]];
            let mut rng = Rng::new(0xc0 + kind as u64);
            let (mut looked, mut differ) = (0u32, 0u32);
            for round in 0..300u32 {
                change(&mut rng, &luns, &mut model, pair.kind != Kind::Tmpfs);
                let one = random_move(&mut rng, &luns);
                let before = expected_statuses(&luns, &one);
                make(&mut rng, &luns, &one, round);
                let (from, to) = (one.from.1 as usize, one.to.1 as usize);
                let moved = model[one.from.0][from..from + one.len as usize].to_vec();
                model[one.to.0][to..to + moved.len()].copy_from_slice(&moved);
                if let Some((range, wanted)) = before {
                    let after = statuses(&luns[one.to.0], range.clone());
                    for (at, (after, wanted)) in after.iter().zip(&wanted).enumerate() {
                        // A file system may call zeroes data as long as they are cached, over
                        // reserved space or (XFS) over space it keeps for copy on write; and that
                        // can be so on either side only.
                        let start = range.start as usize + at * HOST_BLOCK as usize;
                        let copied = &model[one.to.0][start..start + HOST_BLOCK as usize];
                        let zero = copied.iter().all(|byte| *byte == 0);
                        let cached = zero && (*wanted == 0 || *after == 0);
                        let right = after == wanted || cached;
                        looked += 1;
                        differ += u32::from(after != wanted);
                        assert!(
                            right,
                            "{kind:?} {round}: block {at} of {range:?}: {wanted} is {after}"
                        );
                    }
                }
                copies += 1;
                if round % 50 == 49 {
                    for (lun, model) in luns.iter().zip(&model) {
                        let count = (SIZE / lun.block_size as u64) as u32;
                        let what = format!("{kind:?} {round} {}", lun.block_size);
                        assert_same(&lun.read16(0, count), model, &what);
                    }
                }
            }
            assert!(
                differ * 20 < looked,
                "{kind:?}: {differ} of {looked} blocks changed their kind"
            );
        }
    }
    println!("{copies} copies");
}

/// Writes, frees or reserves something.
fn change(rng: &mut Rng, luns: &[Lun<'_>; 2], model: &mut [Vec<u8>; 2], anchors: bool) {
    let disk = rng.below(2) as usize;
    let (lun, block) = (&luns[disk], luns[disk].block_size as u64);
    let lba = rng.below(SIZE / block);
    let count = rng.between(1, 256 * 1024 / block).min(SIZE / block - lba);
    let range = (lba * block) as usize..((lba + count) * block) as usize;
    if rng.one_in(2) {
        let bytes = rng.bytes(range.len());
        lun.write16(lba, &bytes);
        model[disk][range].copy_from_slice(&bytes);
    } else {
        let list = cdb::unmap_list(&[(lba, count as u32)]);
        let anchor = anchors && rng.one_in(2);
        lun.run_out(cdb::unmap(anchor, list.len() as u16), &list).expect_good();
        model[disk][range].fill(0);
    }
}

fn random_move(rng: &mut Rng, luns: &[Lun<'_>; 2]) -> Move {
    let (from, to) = (rng.below(2) as usize, rng.below(2) as usize);
    let unit = *rng.pick(&[1, 512, 4096, 4096, 65536]);
    let len = (rng.between(1, (SIZE / 3) / unit) * unit).min(1 << 20);
    let place = |rng: &mut Rng| rng.below((SIZE - len) / unit + 1) * unit;
    let start = place(rng);
    // Every other copy within a disk overlaps itself.
    let at = if from == to && rng.one_in(2) {
        let distance = rng.below(len / unit + 1) * unit;
        if rng.one_in(2) {
            start.saturating_sub(distance)
        } else {
            (start + distance).min(SIZE - len)
        }
    } else {
        place(rng)
    };
    let _ = luns;
    Move { from: (from, start), to: (to, at), len }
}

/// What the destination's whole blocks must be told as: what the source's are told as now. Only where
/// blocks go to blocks, and do not overwrite their own source.
fn expected_statuses(luns: &[Lun<'_>; 2], one: &Move) -> Option<(std::ops::Range<u64>, Vec<u8>)> {
    let ((from, start), (to, at)) = (one.from, one.to);
    let overlaps = from == to && start.abs_diff(at) < one.len;
    if overlaps || start % HOST_BLOCK != at % HOST_BLOCK {
        return None;
    }
    let head = start.next_multiple_of(HOST_BLOCK) - start;
    let whole = one.len.checked_sub(head)? / HOST_BLOCK * HOST_BLOCK;
    if whole == 0 {
        return None;
    }
    let source = start + head..start + head + whole;
    Some((at + head..at + head + whole, statuses(&luns[from], source)))
}

/// Makes a copy by one of the ways that can.
fn make(rng: &mut Rng, luns: &[Lun<'_>; 2], one: &Move, round: u32) {
    let ((from, start), (to, at)) = (one.from, one.to);
    let asked = &luns[rng.below(2) as usize];
    let cscds = [cscd(&luns[from], 0), cscd(&luns[to], 0)];
    let (source, target) = (luns[from].block_size as u64, luns[to].block_size as u64);
    let in_blocks = start % source == 0 && at % target == 0;
    let fits = |block: u64| one.len.is_multiple_of(block) && one.len / block <= 65535;
    let by_token =
        in_blocks && fits(source) && fits(target) && !(from == to && start.abs_diff(at) < one.len);
    if by_token && rng.one_in(3) {
        let id = 1000 + round;
        let token = populate(&luns[from], id, 0, &[(start / source, (one.len / source) as u32)]).0;
        let count = (one.len / target) as u32;
        // In two ranges, the second first.
        let half = count / 2;
        let ranges = [(at / target, half), (at / target + u64::from(half), count - half)];
        write_token(&luns[to], id, &token, 0x02, 0, &ranges).expect_good();
    } else if in_blocks && fits(source) && fits(target) && rng.one_in(2) {
        let dc = rng.one_in(2);
        let count = (one.len / if dc { target } else { source }) as u16;
        let segment = blocks((0, start / source), (1, at / target), count, dc);
        copy(asked, &cscds, &[segment]).expect_good();
    } else {
        let segment = bytes((0, start, source), (1, at, target), one.len as u32);
        copy(asked, &cscds, &[segment]).expect_good();
    }
}

fn available(mount: &Mount) -> u64 {
    let _ = Command::new("sync").arg("-f").arg(mount.path()).status();
    let stat = nix::sys::statvfs::statvfs(&mount.path()).unwrap();
    stat.blocks_free() * stat.fragment_size()
}

fn filefrag(path: &Path) -> Option<String> {
    let output = Command::new("filefrag").arg("-v").arg(path).output().ok()?;
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A copy on a file system with reflinks shares its blocks and takes no space, and neither side sees what is
/// written to the other later.
#[test]
fn reflinked_copies_take_no_space_and_stay_apart() {
    const LEN: u64 = 64 * MIB;
    for kind in [Kind::Xfs, Kind::Btrfs] {
        let Some(pair) = Pair::new(kind, 512, 4 * LEN, ["", "block-size=4096"]) else { continue };
        let fe = FrontEnd::connect(&pair.daemon);
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let mut rng = Rng::new(1);
        let data = rng.bytes(LEN as usize);
        for (n, piece) in data.chunks(MIB as usize).enumerate() {
            a.write16(n as u64 * 2048, piece);
        }
        a.synchronize_cache();
        let before = available(&pair.mount);
        let cscds = [cscd(&a, 0), cscd(&b, 0)];
        let segments: Vec<Vec<u8>> = (0..LEN / (16 * MIB))
            .map(|n| blocks((0, n * 32768), (1, n * 4096), 32768, false))
            .collect();
        copy(&b, &cscds, &segments).expect_good();
        let token = populate(&a, 7, 0, &[(0, (LEN / 512) as u32)]).0;
        write_token(&b, 8, &token, 0, 0, &[(LEN / 4096, (LEN / 4096) as u32)]).expect_good();
        let taken = before.saturating_sub(available(&pair.mount));
        assert!(taken < 4 * MIB, "{kind:?}: {taken} bytes were taken");
        for path in &pair.paths {
            match filefrag(path) {
                Some(text) => assert!(text.contains("shared"), "{kind:?}: {text}"),
                None => {
                    skipped("that blocks are shared was not looked at: filefrag is not installed")
                }
            }
        }
        // Both copies, and what stays of them when all sides are written to.
        let both = |what: &str, first: &[u8]| {
            assert_same(&b.read16(0, (MIB / 4096) as u32), first, what);
            let second = b.read16(LEN / 4096, (MIB / 4096) as u32);
            assert_same(&second, &data[..MIB as usize], what);
        };
        both("the copies", &data[..MIB as usize]);
        a.write16(0, &[1; 4096]);
        both("the copies after the source was written", &data[..MIB as usize]);
        b.write16(0, &[2; 8192]);
        let mut changed = data[..MIB as usize].to_vec();
        changed[..8192].fill(2);
        both("the other copy after one was written", &changed);
        assert_same(&a.read16(8, 8), &data[4096..8192], "the source");
    }
}

/// A large disk with little on it: the copy has the same map, and costs what is on it.
#[test]
fn a_sparse_copy_stays_sparse() {
    const LARGE: u64 = 10 * GIB;
    for kind in ALL {
        let Some(pair) = Pair::new(kind, 1024, LARGE, ["", ""]) else { continue };
        let fe = FrontEnd::connect(&pair.daemon);
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        for n in 0..64u64 {
            a.write16(n * (LARGE / 512 / 64) + 2048 * (n % 3), &vec![n as u8 + 1; MIB as usize]);
        }
        let token = populate(&a, 1, 0, &[(0, (LARGE / 512) as u32)]).0;
        write_token(&b, 2, &token, 0, 0, &[(0, (LARGE / 512) as u32)]).expect_good();
        let (status, blocks, _) = token_information(&b, 2);
        assert_eq!((status, blocks), (0x01, LARGE / 512));
        let map = |path: &Path| {
            let run = Command::new(env!("CARGO_BIN_EXE_thinlun"))
                .args(["map", "--output", "json"])
                .arg(path)
                .output();
            String::from_utf8(run.unwrap().stdout).unwrap()
        };
        let maps = pair.paths.clone().map(|path| map(&path));
        assert_eq!(maps[0], maps[1], "{kind:?}");
        assert_eq!(maps[0].matches("mapped").count(), 64);
        assert_same(&b.read16(0, 2048), &vec![1; MIB as usize], "the first data");
    }
}

/// A token whose disk can share blocks stands for what was there when it was made.
#[test]
fn a_point_in_time_token_keeps_the_old_bytes() {
    for kind in ALL {
        let Some(pair) = Pair::new(kind, 512, SIZE, ["", "block-size=4096"]) else { continue };
        let fe = FrontEnd::connect(&pair.daemon);
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let old = Rng::new(2).bytes(MIB as usize);
        a.write16(0, &old);
        // Ranges that are not whole blocks of the host, out of order.
        let ranges = [(1024, 1000), (3, 13), (100, 800)];
        let (token, blocks) = populate(&a, 5, 0, &ranges);
        assert_eq!(blocks, 1813);
        let kept = u32::from_be_bytes(token[..4].try_into().unwrap());
        assert_eq!(kept, if pair.reflinks() { 0x0080_0000 } else { 0x0001_0000 }, "{kind:?}");
        let new = vec![9; MIB as usize];
        a.write16(0, &new);
        let (count, target) = (1813 * 512 / 4096, 64);
        write_token(&b, 6, &token, 0, 0, &[(target, count)]).expect_good();
        let stream: Vec<u8> = ranges
            .iter()
            .flat_map(|(lba, n)| {
                let bytes = if pair.reflinks() { &old } else { &new };
                bytes[*lba as usize * 512..(*lba as usize + *n as usize) * 512].to_vec()
            })
            .collect();
        let found = b.read16(target, count);
        assert_same(&found, &stream[..found.len()], &format!("{kind:?}"));
        // Both kinds can be asked for where they are.
        for (rod_type, there) in [
            (0x0001_0000u32, true),
            (0x0080_0000, pair.reflinks()),
            (0x0080_ffff, pair.reflinks()),
            (5, false),
        ] {
            let mut list = vec![0; 16];
            list[2] = 0x02;
            list[8..12].copy_from_slice(&rod_type.to_be_bytes());
            append_ranges(&mut list, 14, &[(0, 8)]);
            let answer = a.run_out(cdb::populate_token(list.len() as u32).be32(6, 9), &list);
            match there {
                true => drop(answer.expect_good()),
                false => drop(answer.expect_sense(sense::INVALID_FIELD_IN_LIST)),
            }
        }
    }
}

#[test]
fn tokens_that_are_no_good_say_why() {
    let scratch = Scratch::new();
    let paths = ["a.img", "b.img"].map(|name| scratch.image(name, SIZE));
    let spawn = || Daemon::builder(&scratch).disk(&paths[0], "").disk(&paths[1], "").spawn();
    let daemon = spawn();
    let fe = FrontEnd::connect(&daemon);
    let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    a.write16(0, &[7; 8192]);
    let good = populate(&a, 1, 0, &[(0, 16)]).0;
    let write = |token: &[u8]| write_token(&b, 2, token, 0, 0, &[(0, 16)]);
    // Forged: any byte of it.
    for byte in (16..512).step_by(31) {
        let mut forged = good.clone();
        forged[byte] ^= 0x10;
        write(&forged).expect_sense(token_error(5));
    }
    let mut unknown = good.clone();
    unknown[8..16].copy_from_slice(&77u64.to_be_bytes());
    write(&unknown).expect_sense(token_error(4));
    let mut other = good.clone();
    other[..4].copy_from_slice(&0x0080_0002u32.to_be_bytes());
    write(&other).expect_sense(token_error(1));
    let mut short = good.clone();
    short[7] = 0x18;
    write(&short).expect_sense(token_error(0x0a));
    write(&good).expect_good();
    // The list shows it, and what it shows is no token.
    let all = a.run_in(cdb::receive_copy_lid4(0x08, 0, 4096), 4096).expect_good();
    assert_eq!((all.data().len(), &all.data()[8..]), (8 + 128, &good[..128]));
    // Past its data.
    write_token(&b, 3, &good, 0, 16, &[(0, 1)]).expect_sense(sense::INVALID_FIELD_IN_LIST);
    write_token(&b, 3, &good, 0, 10, &[(100, 4), (200, 9)]).expect_good();
    let (status, blocks, _) = token_information(&b, 3);
    assert_eq!((status, blocks), (0x04, 6), "residual data");
    // What it was told about belongs to the disk that was asked.
    b.run_in(cdb::receive_copy_lid4(0x07, 1, 1024), 1024).expect_sense(sense::INVALID_FIELD_IN_CDB);
    // Deleted with its last use.
    write_token(&b, 4, &good, 0x02, 0, &[(0, 16)]).expect_good();
    write(&good).expect_sense(token_error(9));
    let brief = populate(&a, 5, 1, &[(0, 16)]).0;
    std::thread::sleep(Duration::from_millis(1500));
    write(&brief).expect_sense(token_error(7));
    // Of a daemon that is gone.
    let last = populate(&a, 6, 0, &[(0, 16)]).0;
    drop((fe, daemon));
    let daemon = spawn();
    let fe = FrontEnd::connect(&daemon);
    let b = fe.ready_lun(0, 1);
    write_token(&b, 2, &last, 0, 0, &[(0, 16)]).expect_sense(token_error(4));
    // Everybody knows zeroes.
    let mut zeroes = vec![0; 512];
    zeroes[..8].copy_from_slice(&[0xff, 0xff, 0, 1, 0, 0, 1, 0xf8]);
    b.write16(0, &[1; 65536]);
    write_token(&b, 3, &zeroes, 0, 0, &[(0, 64), (100, 4)]).expect_good();
    assert_same(&b.read16(0, 64), &vec![0; 32768], "zeroes");
    assert_eq!(statuses(&b, 0..32768), [1; 8], "and no space");
    assert_eq!(token_information(&b, 3).1, 68);
}

/// A token's snapshot, and with it the space, goes when its time is over, though nobody asks; one that is used lives on.
#[test]
fn what_a_token_keeps_goes_with_it() {
    let Some(pair) = Pair::new(Kind::Xfs, 512, SIZE, ["", ""]) else { return };
    let fe = FrontEnd::connect(&pair.daemon);
    let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    a.write16(0, &vec![7; MIB as usize]);
    let snapshots = || pair.daemon.fds().iter().filter(|fd| fd.contains("(deleted)")).count();
    let before = snapshots();
    let brief = populate(&a, 1, 1, &[(0, 2048)]).0;
    let other = populate(&a, 2, 60, &[(0, 2048)]).0;
    assert_eq!(snapshots(), before + 2, "{:?}", pair.daemon.fds());
    eventually("the token's snapshot is gone", || snapshots() == before + 1);
    write_token(&b, 3, &brief, 0, 0, &[(0, 16)]).expect_sense(token_error(7));
    write_token(&b, 4, &other, 0x02, 0, &[(0, 16)]).expect_good();
    eventually("the deleted token's snapshot is gone", || snapshots() == before);
}

#[test]
fn token_lists_are_checked_before_anything_is_done() {
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let end = SIZE / 512;
    let populate = |ranges: &[(u64, u32)], timeout: u32| {
        let mut list = vec![0; 16];
        list[4..8].copy_from_slice(&timeout.to_be_bytes());
        append_ranges(&mut list, 14, ranges);
        lun.run_out(cdb::populate_token(list.len() as u32).be32(6, 1), &list)
    };
    const WRONG: sense::Code = sense::INVALID_FIELD_IN_LIST;
    populate(&[], 0).expect_sense(WRONG);
    populate(&[(end - 1, 2)], 0).expect_sense(sense::LBA_OUT_OF_RANGE);
    populate(&[(u64::MAX, 2)], 0).expect_sense(sense::LBA_OUT_OF_RANGE);
    populate(&[(0, 10), (9, 1)], 0).expect_sense(WRONG);
    populate(&[(0, 1)], 3601).expect_sense(WRONG);
    let many: Vec<(u64, u32)> = (0..65).map(|n| (n * 2, 1)).collect();
    populate(&many, 0).expect_sense((5, 0x26, 8));
    populate(&many[..64], 0).expect_good();
    lun.run(cdb::populate_token(0)).expect_good();
    for len in 1..16 {
        lun.run_out(cdb::populate_token(len), &vec![0; len as usize])
            .expect_sense(sense::LIST_LENGTH_ERROR);
    }
    // There is an end to tokens.
    let mut made = 1;
    while populate(&[(0, 1)], 0).is_good() {
        made += 1;
        assert!(made <= 64, "tokens without end");
    }
    assert_eq!(made, 64);
}

#[test]
fn lists_of_segments_are_checked_and_answered_by_the_book() {
    let scratch = Scratch::new();
    let paths = ["a.img", "b.img", "ro.img"].map(|name| scratch.image(name, SIZE));
    let daemon = Daemon::builder(&scratch)
        .disk(&paths[0], "serial=FIRST")
        .disk(&paths[1], "block-size=4096,serial=SECOND")
        .disk(&paths[2], "readonly")
        .spawn();
    let fe = FrontEnd::connect(&daemon);
    let (a, b, read_only) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1), fe.ready_lun(0, 2));
    let cscds = [cscd(&a, 0), cscd(&b, 0), cscd(&read_only, 0)];
    let end = SIZE / 512;
    assert_eq!(a.inquiry()[5] & 0x08, 0x08, "3PC");
    lengths(&a, &cscds);

    let one = |segment: Vec<u8>| copy(&a, &cscds, &[segment]);
    one(blocks((0, 0), (0, end - 1), 2, false)).expect_sense(PAST_THE_END);
    one(blocks((0, u64::MAX), (0, 0), 2, false)).expect_sense(PAST_THE_END);
    one(blocks((0, 0), (7, 0), 2, false)).expect_sense(UNREACHABLE);
    one(blocks((0, 0), (2, 0), 2, false)).expect_sense((7, 0x27, 0));
    one(blocks((2, 0), (0, 0), 2, false)).expect_good();
    one(blocks((0, 0), (0, end), 0, false)).expect_good();
    one(blocks((0xffff, 0), (0xffff, 8), 4, false)).expect_good();
    // Seven small blocks do not make a large one, unless what is missing is padded or dropped.
    one(blocks((0, 0), (1, 0), 7, false)).expect_sense(INEXACT);
    a.write16(0, &[5; 8192]);
    b.write16(0, &[6; 8192]);
    let with_pad = |at: usize| {
        let mut cscds = cscds.clone();
        cscds[at][28] |= 0x04;
        copy(&a, &cscds, &[blocks((0, 0), (1, 0), 15, false)]).expect_good();
        b.read16(0, 2)
    };
    assert_same(&with_pad(0), &[vec![5; 4096], vec![6; 4096]].concat(), "dropped");
    assert_same(&with_pad(1), &[vec![5; 7680], vec![0; 512]].concat(), "padded");
    // Any name that fits a descriptor will do (the SCSI name string is longer); one that nobody has does not.
    for name in 0..2 {
        let named = [cscd(&a, name), cscd(&b, name)];
        copy(&b, &named, &[blocks((0, 0), (1, 4), 8, false)]).expect_good();
    }
    let mut nobody = cscd(&a, 0);
    nobody[12] ^= 1;
    copy(&a, &[nobody], &[blocks((0, 0), (0xffff, 8), 1, false)]).expect_sense(UNREACHABLE);
    let mut wrong_size = cscd(&a, 0);
    wrong_size[30] = 0x10;
    copy(&a, &[wrong_size], &[]).expect_sense(sense::INVALID_FIELD_IN_LIST);
    // Verify: it is there, and ready.
    let verify = |tur: u8| vec![7, 0, 0, 8, 0, 1, 0, 0, tur, 0, 0, 0];
    copy(&a, &cscds, &[verify(1)]).expect_good();
    b.run(cdb::start_stop_unit(0)).expect_good();
    copy(&a, &cscds, &[verify(0)]).expect_good();
    copy(&a, &cscds, &[verify(1)]).expect_sense((0xa, 0x0d, 2));
    copy(&a, &cscds, &[blocks((0, 0), (1, 0), 8, false)]).expect_sense((0xa, 0x0d, 2));
}

/// Lengths, limits and kinds of descriptors.
fn lengths(a: &Lun<'_>, cscds: &[Vec<u8>; 3]) {
    let segment = blocks((0, 0), (0, 8), 1, false);
    let whole = list(NO_LIST_ID, cscds, std::slice::from_ref(&segment));
    a.run(cdb::extended_copy_lid1(0)).expect_good();
    for len in [1, 15, 16, 47, whole.len() - 1] {
        xcopy(a, &whole[..len]).expect_sense(sense::LIST_LENGTH_ERROR);
    }
    xcopy(a, &whole).expect_good();
    let many = |cscd_count: usize, segment_count: usize| {
        let cscds = vec![cscds[0].clone(); cscd_count];
        copy(a, &cscds, &vec![segment.clone(); segment_count])
    };
    many(16, 128).expect_good();
    many(17, 1).expect_sense((5, 0x26, 6));
    many(1, 129).expect_sense((5, 0x26, 8));
    many(17, 129).expect_sense(sense::LIST_LENGTH_ERROR);
    let mut inline = whole.clone();
    inline[15] = 1;
    xcopy(a, &inline).expect_sense((5, 0x26, 0x0b));
    let mut kind = whole.clone();
    kind[16] = 0xe0;
    xcopy(a, &kind).expect_sense((5, 0x26, 7));
    let mut kind = whole.clone();
    kind[16 + 96] = 0x03;
    xcopy(a, &kind).expect_sense((5, 0x26, 9));
    for (usage, id, right) in
        [(0, 9, true), (2, 9, true), (3, 0, true), (3, 9, false), (1, 9, false)]
    {
        let answer = xcopy(a, &list((usage, id), cscds, std::slice::from_ref(&segment)));
        match right {
            true => drop(answer.expect_good()),
            false => drop(answer.expect_sense(sense::INVALID_FIELD_IN_LIST)),
        }
    }
}

#[test]
fn what_became_of_a_copy_can_be_asked() {
    let scratch = Scratch::new();
    let paths = ["a.img", "b.img"].map(|name| scratch.image(name, SIZE));
    let daemon =
        Daemon::builder(&scratch).disk(&paths[0], "").disk(&paths[1], "space-limit=1M").spawn();
    let fe = FrontEnd::connect(&daemon);
    let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    a.write16(0, &vec![3; 4 * MIB as usize]);
    let cscds = [cscd(&a, 0), cscd(&b, 0)];
    let status = |action: u8, id: u8| a.run_in(cdb::receive_copy(action, id, 256), 256);
    let short = |n: u64, count: u16| blocks((0, n), (1, n), count, false);
    status(0, 1).expect_sense(sense::INVALID_FIELD_IN_CDB);
    xcopy(&a, &list((0, 1), &cscds, &[short(0, 8), short(64, 8)])).expect_good();
    // Only who asked can ask, where he asked.
    b.run_in(cdb::receive_copy(0, 1, 256), 256).expect_sense(sense::INVALID_FIELD_IN_CDB);
    let told = status(0, 1).expect_good();
    assert_eq!(told.data(), [0, 0, 0, 8, 1, 0, 2, 0, 0, 0, 0x20, 0]);
    status(0, 1).expect_sense(sense::INVALID_FIELD_IN_CDB);
    // One that may be forgotten is.
    xcopy(&a, &list((2, 2), &cscds, &[short(0, 8)])).expect_good();
    status(0, 2).expect_sense(sense::INVALID_FIELD_IN_CDB);
    // One that failed has its segment, its residual, and details.
    let segments = [short(0, 8), short(SIZE / 512 - 4, 8), short(8, 8)];
    let failed = xcopy(&a, &list((0, 3), &cscds, &segments));
    let found = failed.expect_sense(PAST_THE_END);
    assert_eq!((found.information, &found.raw[8..12]), (Some(0), &[0, 0, 0, 1][..]));
    let told = status(0, 3).expect_good();
    assert_eq!(told.data()[4..7], [2, 0, 1], "failed in its second segment");
    let details = status(4, 3).expect_good();
    let data = details.data();
    assert_eq!((data[56], u16::from_be_bytes([data[58], data[59]])), (2, 18));
    assert_eq!(data[60..], found.raw[..18]);
    // No space is told as it always is.
    let large = [blocks((0, 0), (1, 0), 8192, false)];
    let full = xcopy_lid4(&a, &list_lid4(0x1234_5678, false, &cscds, &large));
    full.expect_sense(sense::SPACE_ALLOCATION_FAILED);
    let told = a.run_in(cdb::receive_copy_lid4(5, 0x1234_5678, 256), 256).expect_good();
    let data = told.data();
    assert_eq!((data[4], data[5], data[12], data[14]), (1, 2, 2, 18));
    assert_eq!((data[34], data[44], data[45]), (7, 0x27, 7));
    // In the background.
    let list = list_lid4(0x99, true, &cscds, &[short(0, 1024)]);
    xcopy_lid4(&a, &list).expect_good();
    let progress = || {
        let told = a.run_in(cdb::receive_copy_lid4(5, 0x99, 256), 256).expect_good();
        let data = told.data();
        (data[5], u64::from_be_bytes(data[16..24].try_into().unwrap()))
    };
    let mut last = progress();
    let patience = Instant::now() + Duration::from_secs(10);
    while last.0 == 0x12 && Instant::now() < patience {
        last = progress();
    }
    assert_eq!(last, (0x01, 512 * 1024));
    assert_same(&b.read16(0, 1024), &vec![3; 512 * 1024], "the copy");
    // Limits are what they are said to be.
    let limits = a.run_in(cdb::receive_copy(3, 0, 256), 256).expect_good();
    assert_eq!(limits.data()[4..20], [1, 0, 0, 0, 0, 16, 0, 128, 0, 0, 0x10, 0, 0, 0, 0, 0]);
    assert_eq!(limits.data()[43..], [4, 2, 7, 10, 0xe4]);
}

/// The Third-party Copy page: well formed, and true.
#[test]
fn the_third_party_copy_page_says_what_there_is() {
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let page = lun.run_in(cdb::inquiry_vpd(0x8f, 4096), 4096).expect_good().data().to_vec();
    assert_eq!(usize::from(u16::from_be_bytes([page[2], page[3]])) + 4, page.len());
    let mut descriptors = BTreeMap::new();
    let mut at = 4;
    while at < page.len() {
        let kind = u16::from_be_bytes([page[at], page[at + 1]]);
        let len = usize::from(u16::from_be_bytes([page[at + 2], page[at + 3]]));
        assert_eq!(len % 4, 0);
        assert!(descriptors.insert(kind, page[at + 4..at + 4 + len].to_vec()).is_none());
        at += 4 + len;
    }
    let kinds: Vec<u16> = descriptors.keys().copied().collect();
    assert_eq!(kinds, [0x0000, 0x0001, 0x0004, 0x0008, 0x000c, 0x0106, 0x0108, 0x8001]);
    let commands = &descriptors[&1];
    let list = &commands[1..1 + usize::from(commands[0])];
    assert_eq!(list, [0x83, 5, 0, 1, 0x10, 0x11, 0x1c, 0x84, 8, 0, 1, 3, 4, 5, 6, 7, 8]);
    assert_eq!(descriptors[&0].len(), 0x20);
    assert_eq!(descriptors[&0x8001].len(), 0x20);
}

/// When the reset of a disk is answered, copies that it was asked for write nothing more.
#[test]
fn a_reset_waits_for_the_copies_that_it_ends() {
    let scratch = Scratch::new();
    let data = frontend::pattern::blocks(0, 4096, 512, 1);
    let from = scratch.file("from.img", &data);
    let to = scratch.image("to.img", 2 * MIB);
    let daemon = Daemon::builder(&scratch)
        .disk(&from, "fault=copy:delay-ms-400")
        .disk(&to, "fault=any:delay-ms-400@1-2097152")
        .spawn();
    let fe = FrontEnd::connect(&daemon);
    let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let cscds = [cscd(&a, 0), cscd(&b, 0)];
    let segments: Vec<Vec<u8>> =
        (0..4).map(|n| blocks((0, n * 1024), (1, n * 1024), 1024, false)).collect();
    for _ in 0..2 {
        let list = list_lid4(1, true, &cscds, &segments);
        a.run_out(cdb::extended_copy_lid4(list.len() as u32), &list).expect_good();
        // It is at its second segment.
        eventually("the copy is under way", || host_read(&to, 0, 512) == data[..512]);
        let code = fe.tmf(Tmf::LogicalUnitReset, a.address, 0);
        assert_eq!(code, response::FUNCTION_COMPLETE);
        let before = host_read(&to, 0, 2 * MIB as usize);
        assert!(before != data, "all was copied before the reset was answered");
        std::thread::sleep(Duration::from_millis(1500));
        assert_same(&host_read(&to, 0, 2 * MIB as usize), &before, "when the reset was answered");
        a.clear_unit_attentions();
        host_write(&to, 0, &vec![0; 2 * MIB as usize]);
    }
}

/// A copy that takes long, whatever the host is like: every step of it is held up, and what it has copied shows.
struct LongCopy {
    daemon: Daemon,
    to: PathBuf,
    data: Vec<u8>,
}

impl LongCopy {
    const SEGMENTS: u64 = 100;
    const BLOCKS: u64 = 64;
    const BYTES: usize = 512 * Self::BLOCKS as usize;

    fn new() -> Self {
        let scratch = Scratch::new();
        let count = (Self::SEGMENTS * Self::BLOCKS) as usize;
        let data = frontend::pattern::blocks(0, count, 512, 1);
        let (from, to) =
            (scratch.file("from.img", &data), scratch.image("to.img", data.len() as u64));
        let slow = "fault=any:delay-ms-200";
        let daemon = Daemon::builder(&scratch).disk(&from, "").disk(&to, slow).spawn();
        LongCopy { daemon, to, data }
    }

    /// Begins it, by the disk that is written to; a token stands for its source as segments do.
    fn begin(&self, fe: &FrontEnd, by_token: bool, background: bool) -> Ticket {
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let (cdb, list) = if by_token {
            let ranges: Vec<(u64, u32)> =
                (0..50).map(|n| (n * 2 * Self::BLOCKS, 2 * Self::BLOCKS as u32)).collect();
            let token = populate(&a, 2, 60, &ranges).0;
            let list = write_token_list(&token, u8::from(background), 0, &ranges);
            (cdb::write_using_token(list.len() as u32).be32(6, 1), list)
        } else {
            let segment = |n| {
                let at = n * Self::BLOCKS;
                blocks((0, at), (1, at), Self::BLOCKS as u16, false)
            };
            let segments: Vec<Vec<u8>> = (0..Self::SEGMENTS).map(segment).collect();
            let list = list_lid4(1, background, &[cscd(&a, 0), cscd(&b, 0)], &segments);
            (cdb::extended_copy_lid4(list.len() as u32), list)
        };
        let ticket = b.submit(&b.request(cdb).data_out(list));
        eventually("the copy is under way", || self.copied() > 0);
        ticket
    }

    /// Segments that are copied. No block is anything but old or new.
    fn copied(&self) -> usize {
        let found = host_read(&self.to, 0, self.data.len());
        for (n, (found, new)) in found.chunks(512).zip(self.data.chunks(512)).enumerate() {
            let zero = found.iter().all(|byte| *byte == 0);
            assert!(zero || found == new, "block {n} is torn");
        }
        let segments = found.chunks(Self::BYTES).zip(self.data.chunks(Self::BYTES));
        segments.filter(|(found, new)| found == new).count()
    }

    /// It was ended before it was done, and is over.
    #[track_caller]
    fn assert_over(&self, what: &str) {
        let copied = self.copied();
        println!("{what}: {copied} of {} were copied", Self::SEGMENTS);
        assert!(copied < Self::SEGMENTS as usize, "{what}: all of it was copied");
        std::thread::sleep(5 * A_MOMENT);
        assert_eq!(self.copied(), copied, "{what}: it goes on");
    }

    /// Makes its destination new, behind the daemon's back.
    fn clear(&self) {
        host_write(&self.to, 0, &vec![0; self.data.len()]);
    }
}

/// Whatever ends a copy ends it at a boundary, and before it is answered itself.
#[test]
fn a_long_copy_can_be_ended() {
    let long = LongCopy::new();
    let fe = FrontEnd::builder().queues(2).connect(&long.daemon);
    for by_token in [false, true] {
        for way in ["COPY OPERATION ABORT", "reset", "abort task set", "abort task"] {
            let background = ["COPY OPERATION ABORT", "reset"].contains(&way);
            let ticket = long.begin(&fe, by_token, background);
            let b = fe.lun(0, 1);
            match way {
                "COPY OPERATION ABORT" => {
                    b.on_queue(3).run(Cdb::new(0x83).byte(1, 0x1c).be32(2, 1)).expect_good();
                }
                "reset" => assert_eq!(fe.tmf(Tmf::LogicalUnitReset, b.address, 0), 0),
                "abort task set" => assert_eq!(fe.tmf(Tmf::AbortTaskSet, b.address, 0), 0),
                _ => {
                    // The last tag that was given.
                    let tag = fe.new_tag() - 1;
                    assert_eq!(fe.tmf(Tmf::AbortTask, b.address, tag), 0);
                }
            }
            let done = fe.queue(ticket.queue).try_take(ticket).expect("answered before its end");
            let answer = ScsiResponse::parse(&done);
            match background {
                true => drop(answer.expect_good()),
                false => drop(answer.expect_response(response::ABORTED)),
            }
            long.assert_over(&format!("{way}, by token: {by_token}"));
            b.clear_unit_attentions();
            long.clear();
        }
    }
}

/// When the next guest is served, nothing writes any more on account of the last.
#[test]
fn a_copy_ends_with_its_initiator() {
    let long = LongCopy::new();
    for by_token in [false, true] {
        for background in [false, true] {
            let fe = FrontEnd::connect(&long.daemon);
            long.begin(&fe, by_token, background);
            drop(fe);
            let fe = FrontEnd::connect(&long.daemon);
            fe.ready_lun(0, 1);
            long.assert_over(&format!("by token: {by_token}, background: {background}"));
            long.clear();
        }
    }
}

/// Killed in the middle of a copy: the source is as it was, and each block of the destination is old or new.
#[test]
fn a_killed_copy_leaves_whole_blocks() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let slow = "fault=any:delay-ms-50";
        let Some(mut pair) = Pair::new(kind, 512, 64 * MIB, ["", slow]) else { continue };
        let block = |n: u64| n.to_le_bytes().repeat(512);
        let chunk: Vec<u8> = (1..257).flat_map(block).collect();
        for at in (0..64 * MIB).step_by(MIB as usize) {
            host_write(&pair.paths[0], at, &chunk);
        }
        let fe = FrontEnd::connect(&pair.daemon);
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let cscds = [cscd(&a, 0), cscd(&b, 0)];
        let segments: Vec<Vec<u8>> =
            (0..64).map(|n| blocks((0, n * 2048), (1, n * 2048), 2048, false)).collect();
        xcopy_lid4(&a, &list_lid4(1, true, &cscds, &segments)).expect_good();
        eventually("the copy is under way", || host_read(&pair.paths[1], 0, 4096) == chunk[..4096]);
        pair.daemon.kill();
        drop(fe);
        let (source, found) =
            (host_read(&pair.paths[0], 0, 64 << 20), host_read(&pair.paths[1], 0, 64 << 20));
        let mut new = 0;
        for (n, bytes) in found.chunks(4096).enumerate() {
            assert!(
                source[n * 4096..][..4096] == block(n as u64 % 256 + 1),
                "{kind:?}: source {n}"
            );
            let is_new = bytes == &source[n * 4096..][..4096];
            assert!(is_new || bytes.iter().all(|byte| *byte == 0), "{kind:?}: block {n} is torn");
            new += u64::from(is_new);
        }
        println!("{kind:?}: {new} blocks were copied");
        assert!(new < (64 << 20) / 4096, "{kind:?}: it was not killed in the middle");
        let scratch = Scratch::new();
        let daemon =
            Daemon::builder(&scratch).disk(&pair.paths[0], "").disk(&pair.paths[1], "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        copy(&a, &[cscd(&a, 0), cscd(&b, 0)], &segments).expect_good();
        assert_same(&host_read(&pair.paths[1], 0, 64 << 20), &source, "the copy, made again");
    }
}
