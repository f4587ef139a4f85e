//! GET LBA STATUS, UNMAP and WRITE SAME over the socket, on real file systems, held against a model,
//! `qemu-img map` and `filefrag`.

mod frontend;
mod mounts;

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use frontend::daemon::{Scratch, host_write};
use frontend::pattern::{Rng, assert_same};
use frontend::scsi::sense;
use frontend::*;
use mounts::{ALL, Kind, LoopDevice, Mount, skipped};
use nix::fcntl::{FallocateFlags, fallocate};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};

const SIZE: u64 = 8 * MIB;
/// The unit in which all four file systems keep data here.
const HOST_BLOCK: u64 = 4096;

const MAPPED: u8 = 0;
const DEALLOCATED: u8 = 1;
const ANCHORED: u8 = 2;

const WS_UNMAP: u8 = 0x08;
const WS_ANCHOR: u8 = 0x10;
const WS_NDOB: u8 = 0x01;

/// One descriptor of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    lba: u64,
    blocks: u64,
    status: u8,
}

/// What one GET LBA STATUS answers: the runs, and the byte with condition and RTP.
fn query(lun: &Lun<'_>, cdb: Cdb, len: usize) -> (Vec<Run>, u8) {
    let answer = lun.run_in(cdb, len).expect_good();
    let data = answer.data();
    let stated = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize + 4;
    assert!(stated >= data.len(), "{stated} bytes stated, {} came", data.len());
    let runs = data[8..].chunks_exact(16).map(|d| Run {
        lba: u64::from_be_bytes(d[..8].try_into().unwrap()),
        blocks: u32::from_be_bytes(d[8..12].try_into().unwrap()).into(),
        status: d[12] & 0x0f,
    });
    (runs.collect(), data[7])
}

/// The whole disk, asked for in pieces of `count` descriptors; every block's status.
fn statuses(lun: &Lun<'_>, count: usize) -> Vec<u8> {
    let capacity = lun.capacity().0;
    let len = 8 + 16 * count;
    let mut all = Vec::new();
    while (all.len() as u64) < capacity {
        let lba = all.len() as u64;
        let cdb = if lba.is_multiple_of(2) {
            cdb::get_lba_status16(lba, len as u32, 0)
        } else {
            cdb::get_lba_status32(lba, 0, len as u32, 0)
        };
        let (runs, _) = query(lun, cdb, len);
        assert!(!runs.is_empty() && runs.len() <= count);
        assert_eq!(runs[0].lba, lba, "the first descriptor is where it was asked for");
        assert!(runs.windows(2).all(|w| w[0].status != w[1].status), "unmerged: {runs:?}");
        for run in runs {
            assert_eq!(run.lba, all.len() as u64, "a gap or an overlap");
            assert!(run.blocks > 0);
            all.resize(all.len() + run.blocks as usize, run.status);
        }
    }
    assert_eq!(all.len() as u64, capacity);
    all
}

/// A disk on a file system, served, with a model of its bytes.
struct Bench {
    kind: Kind,
    daemon: Daemon,
    path: std::path::PathBuf,
    model: Vec<u8>,
    _mount: Mount,
}

impl Bench {
    /// `prepare` lays the file out before it is served.
    fn new(
        kind: Kind,
        size: u64,
        options: &str,
        prepare: impl FnOnce(&Path, &mut Vec<u8>),
    ) -> Option<Self> {
        let mount = Mount::new(kind, 512)?;
        let path = mount.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let mut model = vec![0; size as usize];
        prepare(&path, &mut model);
        let scratch = Scratch::new();
        let daemon = Daemon::builder(&scratch).disk(&path, options).spawn();
        Some(Bench { kind, daemon, path, model, _mount: mount })
    }

    fn can_anchor(&self) -> bool {
        self.kind != Kind::Tmpfs
    }

    /// The disk's own word against the model and the host's tools.
    fn check(&self, lun: &Lun<'_>, count: usize) {
        let block = lun.block_size;
        let (all, map, frag) = self.at_one_time(lun, count);
        for (status, bytes) in all.iter().zip(self.model.chunks(block)) {
            let zero = bytes.iter().all(|byte| *byte == 0);
            assert!(*status == MAPPED || zero, "{:?}: data is called {status}", self.kind);
        }
        let whole: Vec<u8> = all.iter().flat_map(|s| std::iter::repeat_n(*s, block)).collect();
        match map {
            Some(text) => self.check_qemu_img(&whole, &text),
            None => skipped("GET LBA STATUS was not held against qemu-img: it is not installed"),
        }
        match frag {
            Some(text) => self.check_filefrag(&whole, &text),
            None => skipped("GET LBA STATUS was not held against filefrag: it is not installed"),
        }
    }

    /// The disk's word and the tools', all of it, with nothing changed in between. A host may come to call zeroes
    /// data while nobody writes: Linux leaves a mark where it evicts a page of an unwritten extent, and lseek takes
    /// the mark for data. Zeroing a part of a block makes such a page; memory pressure evicts it.
    fn at_one_time(
        &self,
        lun: &Lun<'_>,
        count: usize,
    ) -> (Vec<u8>, Option<String>, Option<String>) {
        for _ in 0..10 {
            let before = statuses(lun, count);
            let map = self.told_by("qemu-img", &["map", "-U", "-f", "raw", "--output=json"]);
            let frag = self.told_by("filefrag", &["-v", "-b4096"]);
            if statuses(lun, count) == before {
                return (before, map, frag);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("{:?}: the file's extents change though nobody writes", self.kind);
    }

    /// What a tool says of the file; `None` if it is not installed.
    fn told_by(&self, tool: &str, arguments: &[&str]) -> Option<String> {
        let output = Command::new(tool).args(arguments).arg(&self.path).output().ok()?;
        if tool == "qemu-img" {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        String::from_utf8(output.stdout).ok()
    }

    /// `qemu-img map` asks lseek: data is mapped, what reads as zeroes is not.
    fn check_qemu_img(&self, whole: &[u8], text: &str) {
        let mut seen = 0;
        for line in text.lines().filter(|line| line.contains("\"start\"")) {
            let number = |key: &str| -> usize {
                let at = line.find(key).unwrap() + key.len() + 2;
                let digits: String =
                    line[at..].trim().chars().take_while(char::is_ascii_digit).collect();
                digits.parse().unwrap()
            };
            let (start, len) = (number("\"start\""), number("\"length\""));
            let data = line.contains("\"data\": true");
            for (at, status) in whole.iter().enumerate().skip(start).take(len).step_by(512) {
                assert_eq!(*status == MAPPED, data, "{:?}: byte {at}: {line}", self.kind);
            }
            seen += len;
        }
        assert!(seen >= whole.len() - 512, "qemu-img told of {seen} bytes");
    }

    /// `filefrag` asks FIEMAP: what has no extent is deallocated, anchored is unwritten.
    fn check_filefrag(&self, whole: &[u8], text: &str) {
        if self.kind == Kind::Tmpfs {
            return assert!(!whole.contains(&ANCHORED), "tmpfs cannot tell anchored blocks");
        }
        let blocks = whole.len().div_ceil(HOST_BLOCK as usize);
        let mut extents: Vec<Option<bool>> = vec![None; blocks];
        for line in text.lines() {
            let fields: Vec<&str> = line.split(':').map(str::trim).collect();
            if fields.len() < 5 || fields[0].parse::<u32>().is_err() {
                continue;
            }
            let (from, to) = fields[1].split_once("..").unwrap();
            let (from, to): (usize, usize) =
                (from.trim().parse().unwrap(), to.trim().parse().unwrap());
            let unwritten = line.contains("unwritten");
            extents.iter_mut().take(to + 1).skip(from).for_each(|e| *e = Some(unwritten));
        }
        for (at, extent) in extents.iter().enumerate() {
            let status = whole[at * HOST_BLOCK as usize];
            let told = match extent {
                None => status == DEALLOCATED || status == MAPPED,
                Some(true) => status == ANCHORED || status == MAPPED,
                Some(false) => status == MAPPED,
            };
            assert!(told, "{:?}: block {at} is {status}, filefrag says {extent:?}", self.kind);
        }
    }
}

fn host_allocate(path: &Path, from: u64, len: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from as i64, len as i64).unwrap();
    file.sync_all().unwrap();
}

/// Data, holes, unwritten space, and fresh writes into it that nobody has flushed.
fn random_layout(rng: &mut Rng, path: &Path, model: &mut [u8]) {
    for _ in 0..40 {
        let at = rng.below(model.len() as u64 / HOST_BLOCK) * HOST_BLOCK;
        let len = (rng.between(1, 32) * HOST_BLOCK).min(model.len() as u64 - at);
        match rng.below(3) {
            0 => host_allocate(path, at, len),
            _ => {
                let len = rng.between(1, len) as usize;
                let bytes = rng.bytes(len);
                host_write(path, at, &bytes);
                model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
    }
}

#[test]
fn random_layouts_are_told_as_they_are() {
    for kind in ALL {
        for (size, options) in [(SIZE, "block-size=4096"), (SIZE, ""), (SIZE + 1536, "")] {
            let mut rng = Rng::new(size ^ options.len() as u64);
            let bench = Bench::new(kind, size, options, |path, model| {
                random_layout(&mut rng, path, model);
            });
            let Some(bench) = bench else { continue };
            let fe = FrontEnd::connect(&bench.daemon);
            let lun = fe.ready_lun(0, 0);
            for count in [1, 3, 4000] {
                bench.check(&lun, count);
            }
        }
    }
}

/// fallocate, fsync, one guest write without a flush, GET LBA STATUS at once: mapped.
#[test]
fn a_fresh_write_into_reserved_space_is_mapped_at_once() {
    for kind in ALL {
        let bench = Bench::new(kind, SIZE, "", |path, _| host_allocate(path, 0, SIZE));
        let Some(bench) = bench else { continue };
        let fe = FrontEnd::connect(&bench.daemon);
        let lun = fe.ready_lun(0, 0);
        for lba in [0, 8, 4096, SIZE / 512 - 8] {
            lun.write16(lba, &[0x5a; 4096]);
            let (runs, _) = query(&lun, cdb::get_lba_status16(lba, 24, 0), 24);
            assert_eq!(runs[0].status, MAPPED, "{kind:?}, LBA {lba}: {runs:?}");
        }
    }
}

/// A command that changes the disk.
#[derive(Clone, Debug)]
enum Step {
    Write { at: Place, seed: u64 },
    Unmap { at: Place, anchor: bool },
    WriteSame { at: Place, unmap: bool, anchor: bool, contents: Contents },
    Format,
    BlockErase,
    Flush,
}

/// Where, in 65536ths of the disk, and how many blocks of 512 bytes.
#[derive(Clone, Copy, Debug)]
struct Place(u16, u16);

/// What WRITE SAME writes.
#[derive(Clone, Copy, Debug)]
enum Contents {
    NoBuffer,
    Zeroes,
    Pattern(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few blocks, many, and the borders of the host's blocks.
    let count = prop_oneof![1..=16u16, 1..=400u16, Just(8u16), Just(64u16)];
    let place = || (any::<u16>(), count.clone()).prop_map(|(at, count)| Place(at, count));
    let contents = prop_oneof![
        Just(Contents::NoBuffer),
        Just(Contents::Zeroes),
        (1..=255u8).prop_map(Contents::Pattern),
    ];
    let write = (place(), any::<u64>()).prop_map(|(at, seed)| Step::Write { at, seed });
    let unmap = (place(), any::<bool>()).prop_map(|(at, anchor)| Step::Unmap { at, anchor });
    let same = (place(), any::<bool>(), any::<bool>(), contents)
        .prop_map(|(at, unmap, anchor, contents)| Step::WriteSame { at, unmap, anchor, contents });
    let step = prop_oneof![
        30 => write,
        20 => unmap,
        30 => same,
        1 => Just(Step::Format),
        1 => Just(Step::BlockErase),
        2 => Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..160)
}

/// What a block of the host may be told as, after what was last done to all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Written,
    Freed,
    /// Reserved, or zeroes that the host chose to write.
    Zeroed,
    /// Only a part of it was freed or zeroed: whatever is true of the bytes.
    Mixed,
}

impl Expected {
    fn allows(self, status: u8) -> bool {
        match self {
            Expected::Written => status == MAPPED,
            Expected::Freed => status == DEALLOCATED,
            Expected::Zeroed | Expected::Mixed => true,
        }
    }
}

/// A served disk with what all of it must be.
struct Modelled<'a> {
    bench: &'a mut Bench,
    states: Vec<Expected>,
    lun: &'a Lun<'a>,
}

impl Modelled<'_> {
    fn range(&self, Place(at, count): Place) -> (u64, u64) {
        let block = self.lun.block_size as u64;
        let capacity = SIZE / block;
        let lba = (capacity * u64::from(at) / 65536).min(capacity - 1);
        (lba, (u64::from(count) * 512).div_ceil(block).min(capacity - lba))
    }

    fn run(&mut self, step: &Step) {
        let (lun, block) = (self.lun, self.lun.block_size);
        let can_anchor = self.bench.can_anchor();
        match step {
            Step::Write { at, seed } => {
                let (lba, count) = self.range(*at);
                let bytes = Rng::new(*seed).bytes(count as usize * block);
                lun.write16(lba, &bytes);
                self.set(lba, &bytes, Expected::Written);
            }
            Step::Unmap { at, anchor } => {
                let (lba, count) = self.range(*at);
                let anchor = *anchor && can_anchor;
                let list = cdb::unmap_list(&[(lba, count as u32), (lba, 0)]);
                lun.run_out(cdb::unmap(anchor, list.len() as u16), &list).expect_good();
                self.zero(lba, count, if anchor { Expected::Zeroed } else { Expected::Freed });
            }
            Step::WriteSame { at, unmap, anchor, contents } => {
                let (lba, count) = self.range(*at);
                let anchor = *anchor && *unmap && can_anchor;
                let flags = if *unmap { WS_UNMAP } else { 0 } | if anchor { WS_ANCHOR } else { 0 };
                let pattern = match contents {
                    Contents::NoBuffer => {
                        lun.run(cdb::write_same16(flags | WS_NDOB, lba, count as u32))
                            .expect_good();
                        vec![0; block]
                    }
                    Contents::Zeroes => vec![0; block],
                    Contents::Pattern(byte) => vec![*byte; block],
                };
                if !matches!(contents, Contents::NoBuffer) {
                    let same = cdb::write_same32(flags, lba, count as u32);
                    lun.run_out(same, &pattern).expect_good();
                }
                match contents {
                    // A payload that is not zero is written, UNMAP or not.
                    Contents::Pattern(_) => {
                        self.set(lba, &pattern.repeat(count as usize), Expected::Written);
                    }
                    _ if !*unmap => self.zero(lba, count, Expected::Written),
                    _ if !anchor => self.zero(lba, count, Expected::Freed),
                    _ => self.zero(lba, count, Expected::Zeroed),
                }
            }
            Step::Format => {
                lun.run(cdb::format_unit(0)).expect_good();
                self.zero(0, SIZE / block as u64, Expected::Freed);
            }
            Step::BlockErase => {
                lun.run(cdb::sanitize(0x02, 0)).expect_good();
                self.zero(0, SIZE / block as u64, Expected::Freed);
            }
            Step::Flush => lun.synchronize_cache(),
        }
    }

    fn zero(&mut self, lba: u64, count: u64, expected: Expected) {
        self.set(lba, &vec![0; count as usize * self.lun.block_size], expected);
    }

    fn set(&mut self, lba: u64, bytes: &[u8], expected: Expected) {
        let from = lba as usize * self.lun.block_size;
        self.bench.model[from..][..bytes.len()].copy_from_slice(bytes);
        let (to, host) = (from + bytes.len(), HOST_BLOCK as usize);
        for block in from / host..to.div_ceil(host) {
            let whole = from <= block * host && (block + 1) * host <= to;
            // A part that is written makes all of the host's block data.
            if whole || expected == Expected::Written {
                self.states[block] = expected;
            } else if self.states[block] != expected {
                self.states[block] = Expected::Mixed;
            }
        }
    }

    fn check(&self) {
        let (lun, block) = (self.lun, self.lun.block_size);
        self.bench.check(lun, 100);
        let all = statuses(lun, 4000);
        for (at, expected) in self.states.iter().enumerate() {
            let status = all[at * HOST_BLOCK as usize / block];
            assert!(expected.allows(status), "host block {at}: {expected:?} is told as {status}");
        }
        let step = MIB as usize / block;
        for (at, expected) in (0..).step_by(step).zip(self.bench.model.chunks(MIB as usize)) {
            assert_same(&lun.read16(at, step as u32), expected, &format!("LBA {at}"));
        }
    }
}

/// WRITE SAME without UNMAP is a write, of zeroes too: its blocks are mapped, whatever they were, flushed or not.
#[test]
fn zeroes_that_were_written_are_mapped() {
    for kind in ALL {
        let Some(mount) = Mount::new(kind, 512) else { continue };
        for options in ["", "block-size=4096,cache=direct"] {
            let path = mount.path().join("disk.img");
            std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
            let scratch = Scratch::new();
            if !options.is_empty() && kind == Kind::Tmpfs {
                continue;
            }
            let daemon = Daemon::builder(&scratch).disk(&path, options).spawn();
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            let per = MIB / lun.block_size as u64;
            let zeroes = vec![0; lun.block_size];
            if kind != Kind::Tmpfs {
                let list = cdb::unmap_list(&[(per, per as u32)]);
                lun.run_out(cdb::unmap(true, list.len() as u16), &list).expect_good();
            }
            lun.write16(2 * per, &vec![7; MIB as usize]);
            for (n, cdb) in [
                cdb::write_same16(WS_NDOB, 0, per as u32),
                cdb::write_same32(WS_NDOB, per, per as u32),
                cdb::write_same16(0, 2 * per, per as u32),
                cdb::write_same10(0, 3 * per as u32, 1),
            ]
            .into_iter()
            .enumerate()
            {
                let answer = if n < 2 { lun.run(cdb) } else { lun.run_out(cdb, &zeroes) };
                answer.expect_good();
            }
            for flushed in [false, true] {
                let all = statuses(&lun, 4000);
                let mapped = 3 * per as usize + 1;
                let wrong = all[..mapped].iter().position(|status| *status != MAPPED);
                assert_eq!(wrong, None, "{kind:?} {options}, flushed: {flushed}");
                let host = HOST_BLOCK as usize / lun.block_size;
                assert_eq!(all[3 * per as usize + host], DEALLOCATED, "{kind:?}");
                lun.synchronize_cache();
            }
            assert_same(&lun.read16(0, 3 * per as u32), &vec![0; 3 * MIB as usize], options);
        }
    }
}

/// What reads leave in the host's page cache over reserved space is no data, and a block that was written since is. Nor is it
/// over space that XFS keeps for copies on write, after all was erased.
#[test]
fn blocks_that_were_only_read_are_what_they_were() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        let bench = Bench::new(kind, 64 * MIB, "", |path, _| host_allocate(path, 0, 32 * MIB));
        let Some(bench) = bench else { continue };
        let fe = FrontEnd::connect(&bench.daemon);
        let lun = fe.ready_lun(0, 0);
        let blocks = 64 * MIB / 512;
        let read_all = || (0..blocks).step_by(2048).for_each(|lba| drop(lun.read16(lba, 2048)));
        let told = || query(&lun, cdb::get_lba_status16(0, 4096, 0), 4096).0;
        let run = |lba, blocks, status| Run { lba, blocks, status };
        let half = blocks / 2;
        let (anchored, hole) = (run(0, half, ANCHORED), run(half, half, DEALLOCATED));
        for _ in 0..2 {
            read_all();
            assert_eq!(told(), [anchored, hole], "{kind:?}: after reads");
        }
        // A few fresh blocks among them, zeroes too: they are data at once, and stay so.
        read_all();
        lun.write16(8192, &[0x5a; 4096]);
        lun.write16(24576, &[0; 4096]);
        for flushed in [false, true] {
            let all = statuses(&lun, 4000);
            for fresh in [8192, 24576] {
                let status = &all[fresh..fresh + 8];
                assert!(status.iter().all(|s| *s == MAPPED), "{kind:?} {flushed}: {status:?}");
            }
            assert_eq!(lun.read16(8192, 8), [0x5a; 4096], "{kind:?}");
            lun.synchronize_cache();
        }
        read_all();
        // ext4 writes all of a folio of the page cache, of which a block in it is written.
        let all = statuses(&lun, 4000);
        let mapped = all.iter().filter(|status| **status == MAPPED).count();
        assert!((16..=2 * 4096).contains(&mapped), "{kind:?}: {mapped} blocks after a flush");
        let (first, second) = all.split_at(half as usize);
        assert!(!first.contains(&DEALLOCATED) && second.iter().all(|s| *s == DEALLOCATED));
        if kind != Kind::Ext4 {
            // The blocks are shared, and written apart again: XFS reserves more than that for it.
            let copy = bench.path.with_extension("copy");
            let cloned =
                Command::new("cp").arg("--reflink=always").arg(&bench.path).arg(&copy).status();
            assert!(cloned.unwrap().success());
            (0..64).for_each(|n| lun.write16(8192 + n % 8, &[n as u8; 512]));
            lun.synchronize_cache();
        }
        lun.run(cdb::sanitize(0x02, 0)).expect_good();
        read_all();
        assert_eq!(told(), [run(0, blocks, DEALLOCATED)], "{kind:?}: after BLOCK ERASE");
    }
}

/// A device whose sectors are larger than the disk's blocks frees and zeroes single blocks all the same, and touches no
/// other.
#[test]
fn blocks_smaller_than_a_sector_are_freed_and_zeroed() {
    let Some(device) = LoopDevice::with_sectors(SIZE / MIB, 4096) else { return };
    let scratch = Scratch::new();
    let daemon = Daemon::builder(&scratch).disk(&device.device, "block-size=512").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut model = Rng::new(0x4b).bytes(SIZE as usize);
    (0..SIZE / MIB)
        .for_each(|n| lun.write16(n * 2048, &model[(n * MIB) as usize..][..MIB as usize]));
    let mut rng = Rng::new(0x4c);
    for round in 0..400 {
        let lba = rng.below(SIZE / 512);
        let count = (*rng.pick(&[1, 7, 8, 9, 63, 512])).min(SIZE / 512 - lba);
        let list = cdb::unmap_list(&[(lba, count as u32)]);
        let answer = match round % 4 {
            0 | 1 => lun.run_out(cdb::unmap(false, list.len() as u16), &list),
            2 => lun.run(cdb::write_same16(WS_NDOB | WS_UNMAP, lba, count as u32)),
            _ => lun.run_out(cdb::write_same16(0, lba, count as u32), &[0; 512]),
        };
        answer.expect_good();
        model[(lba * 512) as usize..((lba + count) * 512) as usize].fill(0);
    }
    for (n, wanted) in (0..).zip(model.chunks(MIB as usize)) {
        assert_same(&lun.read16(n * 2048, 2048), wanted, &format!("MiB {n}"));
    }
    lun.run(cdb::format_unit(0)).expect_good();
    assert_same(&lun.read16(0, 2048), &vec![0; MIB as usize], "after FORMAT UNIT");
}

/// Nobody is told of anchored blocks by a disk that says that it has none (VPD B2, ANC_SUP).
#[test]
fn only_a_disk_that_has_anchors_tells_of_them() {
    let reserve = |path: &Path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, MIB as i64, MIB as i64).is_ok()
    };
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", SIZE);
    let device = LoopDevice::new(SIZE / MIB);
    let disks = [(image.clone(), image.clone(), ""), (image.clone(), image, "readonly")];
    let of_device = device.as_ref().map(|d| (d.device.clone(), d.file().to_owned(), ""));
    for (disk, behind, options) in disks.into_iter().chain(of_device) {
        if !reserve(&behind) {
            skipped(
                "nothing was proved of anchored blocks: the temporary directory has no fallocate",
            );
            return;
        }
        let daemon = Daemon::builder(&scratch).disk(&disk, options).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let anchors = lun.vpd(0xb2)[5] & 0x02 != 0;
        let all = statuses(&lun, 100);
        assert_eq!(all.contains(&ANCHORED), anchors, "{} {options}", disk.display());
        assert_eq!(all[2048], if anchors { ANCHORED } else { MAPPED }, "it has space");
        assert_eq!(all[0], DEALLOCATED);
    }
}

/// Any commands that write, free, reserve and format leave the bytes and the states they should. What
/// once failed is kept in tests/regressions and tried first.
#[test]
fn random_commands_agree_with_the_model() {
    let regressions = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/regressions/lba_status.txt");
    let mut ran = 0;
    for kind in ALL {
        for options in ["", "block-size=4096"] {
            let Some(mut bench) = Bench::new(kind, SIZE, options, |_, _| {}) else { continue };
            let fe = FrontEnd::connect(&bench.daemon);
            let lun = fe.ready_lun(0, 0);
            let config = Config {
                cases: 12,
                failure_persistence: Some(Box::new(FileFailurePersistence::Direct(regressions))),
                max_shrink_iters: 500,
                ..Config::default()
            };
            let bench = std::cell::RefCell::new(&mut bench);
            let count = std::cell::Cell::new(0);
            let result = TestRunner::new(config).run(&steps(), |steps| {
                let bench = &mut **bench.borrow_mut();
                let states = vec![Expected::Freed; (SIZE / HOST_BLOCK) as usize];
                let mut disk = Modelled { bench, states, lun: &lun };
                disk.run(&Step::Format);
                steps.iter().for_each(|step| disk.run(step));
                disk.check();
                count.set(count.get() + steps.len());
                Ok(())
            });
            result.unwrap_or_else(|why| panic!("{kind:?} {options}: {why}"));
            ran += count.get();
        }
    }
    println!("{ran} commands");
}

#[test]
fn the_wire_format_is_the_standards() {
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let blocks = SIZE / 512;
    lun.write16(1024, &[1; 4096]);
    let run = |lba, blocks, status| Run { lba, blocks, status };
    let all = [run(0, 1024, 1), run(1024, 8, 0), run(1032, blocks - 1032, 1)];

    let (runs, flags) = query(&lun, cdb::get_lba_status16(0, 4096, 0), 4096);
    assert_eq!((&runs[..], flags), (&all[..], 3 << 1 | 1), "end of medium, RTP");
    let (runs, flags) = query(&lun, cdb::get_lba_status16(1000, 40, 0), 40);
    assert_eq!(runs, [run(1000, 24, 1), run(1024, 8, 0)]);
    assert_eq!(flags, 1 << 1 | 1, "allocation length");
    let (runs, flags) = query(&lun, cdb::get_lba_status32(1000, 28, 4096, 0), 4096);
    assert_eq!(runs, [run(1000, 24, 1), run(1024, 4, 0)]);
    assert_eq!(flags, 2 << 1 | 1, "scan length");

    let typed = |report| query(&lun, cdb::get_lba_status16(0, 4096, report), 4096).0;
    assert_eq!(typed(1), [all[0], all[2]]);
    assert_eq!(typed(2), [all[1]]);
    assert_eq!(typed(3), [all[0], all[2]]);
    assert_eq!(typed(4), []);
    assert_eq!((typed(0x10), typed(0x11)), (vec![], vec![]));
    lun.run_in(cdb::get_lba_status16(0, 4096, 5), 4096).expect_sense(sense::INVALID_FIELD_IN_CDB);

    for lba in [blocks, blocks + 1, u64::MAX] {
        let past = lun.run_in(cdb::get_lba_status16(lba, 24, 0), 24);
        past.expect_sense(sense::LBA_OUT_OF_RANGE);
    }
    assert_eq!(lun.run(cdb::get_lba_status16(0, 0, 0)).expect_good().data(), []);
    let long = lun.run_in(cdb::get_lba_status16(0, 24, 0), 24).expect_good().data().to_vec();
    for len in 1..24 {
        let short = lun.run_in(cdb::get_lba_status16(0, len, 0), len as usize).expect_good();
        assert_eq!(short.data(), &long[..len as usize]);
    }
}

#[test]
fn unmap_lists_are_checked_before_anything_is_done() {
    let daemon = Daemon::with_disk(SIZE, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let blocks = SIZE / 512;
    let data = vec![7; 65536];
    lun.write16(0, &data);
    lun.run(cdb::unmap(false, 0)).expect_good();
    for len in 1..8 {
        let short = lun.run_out(cdb::unmap(false, len), &vec![0; len.into()]);
        short.expect_sense((5, 0x1a, 0));
    }
    let unmap = |ranges: &[(u64, u32)]| {
        let list = cdb::unmap_list(ranges);
        lun.run_out(cdb::unmap(false, list.len() as u16), &list)
    };
    unmap(&[]).expect_good();
    unmap(&[(0, 0), (blocks, 0)]).expect_good();
    unmap(&[(0, 8), (blocks, 1)]).expect_sense(sense::LBA_OUT_OF_RANGE);
    unmap(&[(0, 8), (u64::MAX, 0)]).expect_sense(sense::LBA_OUT_OF_RANGE);
    unmap(&[(0, 1); 257]).expect_sense((5, 0x26, 0));
    assert_same(&lun.read16(0, 128), &data, "nothing was done");
    unmap(&[(0, 1); 256]).expect_good();
    unmap(&[(8, 1), (17, 2)]).expect_good();
    let mut expected = data;
    for block in [0, 8, 17, 18] {
        expected[block * 512..(block + 1) * 512].fill(0);
    }
    assert_same(&lun.read16(0, 128), &expected, "only what was named");
}

/// A full host file system ends a write, and an anchor, in 07/27/07 with the first block that failed;
/// what was answered before stays, and when there is space again the guest goes on.
#[test]
fn a_full_host_is_told_and_left_again() {
    const SPACE_ALLOCATION_FAILED: sense::Code = (7, 0x27, 7);
    for kind in [Kind::Ext4, Kind::Tmpfs] {
        let Some(mount) = Mount::new(kind, 64) else { continue };
        let (path, filler) = (mount.path().join("disk.img"), mount.path().join("filler"));
        std::fs::File::create(&path).unwrap().set_len(GIB).unwrap();
        std::fs::write(&filler, vec![1; 16 << 20]).unwrap();
        let scratch = Scratch::new();
        let daemon = Daemon::builder(&scratch).disk(&path, "").spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let chunk = vec![0xa7; MIB as usize];
        let write = |lba: u64| lun.run_out(cdb::write16(lba, 2048), &chunk);
        let mut lba = 0;
        let failed = loop {
            let answer = write(lba);
            if !answer.is_good() {
                break answer;
            }
            lba += 2048;
            assert!(lba < GIB / 512, "{kind:?} never fills up");
        };
        let information = failed.expect_sense(SPACE_ALLOCATION_FAILED).information.unwrap();
        assert!((lba..lba + 2048).contains(&information), "{kind:?}: {information} in {lba}");
        if kind != Kind::Tmpfs {
            let list = cdb::unmap_list(&[(GIB / 1024, 65536)]);
            let anchor = lun.run_out(cdb::unmap(true, list.len() as u16), &list);
            anchor.expect_sense(SPACE_ALLOCATION_FAILED);
        }
        assert_same(&lun.read16(0, 2048), &chunk, "what was written before");
        std::fs::remove_file(&filler).unwrap();
        eventually("a write to succeed again", || write(lba).is_good());
        assert_same(&lun.read16(lba, 2048), &chunk, "what was written after");
    }
}

/// `detect-zeroes=`: writes of zeroes are not data; every other write is.
#[test]
fn writes_of_zeroes_are_detected_where_it_is_asked_for() {
    for (options, zeroes_are_data) in
        [("", true), ("detect-zeroes=on", false), ("detect-zeroes=unmap", false)]
    {
        let daemon = Daemon::with_disk(SIZE, options);
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        // Long enough that a file system does not rather write a few zeroes than split an extent.
        let zeroes = vec![0; MIB as usize];
        lun.write16(0, &vec![7; 2 * MIB as usize]);
        // ext4 calls zeroed space data as long as what was there before has not reached the disk.
        lun.synchronize_cache();
        lun.write16(0, &zeroes);
        let mut almost = vec![0; 16384];
        almost[16383] = 1;
        lun.write16(2048, &almost);
        let status = |lba| query(&lun, cdb::get_lba_status16(lba, 24, 0), 24).0[0].status;
        assert_eq!(status(0) == MAPPED, zeroes_are_data, "{options}");
        assert_eq!(status(2048), MAPPED, "{options}");
        assert_same(&lun.read16(0, 2048), &zeroes, options);
        assert_same(&lun.read16(2048, 32), &almost, options);
    }
}

/// `provision=`: how much space a created file takes at once.
#[test]
fn created_files_take_the_space_they_are_asked_to() {
    use std::os::unix::fs::MetadataExt;
    for (provision, takes_space) in [("thin", false), ("anchored", true), ("full", true)] {
        let scratch = Scratch::new();
        let path = scratch.join("disk.img");
        let options = format!("size=4M,provision={provision}");
        let daemon = Daemon::builder(&scratch).disk(&path, &options).spawn();
        let fe = FrontEnd::connect(&daemon);
        assert_eq!(fe.ready_lun(0, 0).capacity().0, 4 * MIB / 512);
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), 4 * MIB);
        assert_eq!(metadata.blocks() * 512 >= 4 * MIB, takes_space, "{provision}");
    }
}
