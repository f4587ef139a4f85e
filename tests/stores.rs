//! One contract that every store keeps, on every file system and in every cache mode.

mod mounts;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mounts::fuse::{Fuse, Lie};
use mounts::{ALL, FLAVOURS, Kind as FileSystem, LoopDevice, Mount, skipped};
use nix::fcntl::{FallocateFlags, fallocate};
use thinlun::store::copy::{Copy, Holes};
use thinlun::store::file::{FileStore, OpenOptionsFor};
use thinlun::store::mem::MemStore;
use thinlun::store::{Buffers, Cause, Durability, Extent, Kind, Store, StoreError};

const SIZE: usize = 4 << 20;
const BLOCK: usize = 512;

/// A small generator of repeatable numbers (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// Memory whose address is off every alignment when `skew` is not zero.
fn buffer(bytes: &[u8], skew: usize) -> Buffers {
    let all = Buffers::zeroed(bytes.len() + skew).unwrap();
    let part = all.slice(skew, bytes.len());
    part.write_at(0, bytes);
    part
}

fn contract(name: &str, store: &dyn Store) {
    reads_zeroes_at_first(name, store);
    agrees_with_a_model(name, store);
    space_operations_show(name, store);
    fresh_data_can_be_reserved_again(name, store);
    fresh_data_in_reserved_space_is_data(name, store);
}

fn reads_zeroes_at_first(name: &str, store: &dyn Store) {
    assert_eq!(store.size().unwrap(), SIZE as u64, "{name}");
    let into = buffer(&vec![0xa5; SIZE], 0);
    store.read(0, &into).unwrap();
    assert!(into.to_vec(SIZE).iter().all(|b| *b == 0), "{name}");
}

fn agrees_with_a_model(name: &str, store: &dyn Store) {
    let mut model = vec![0; SIZE];
    let mut dice = Dice(0x5eed);
    for _ in 0..2000 {
        let block = dice.below(SIZE / BLOCK);
        let blocks = 1 + dice.below(64.min(SIZE / BLOCK - block));
        let (at, len) = (block * BLOCK, blocks * BLOCK);
        let skew = [0, 0, 512, 4, 1][dice.below(5)];
        match dice.below(14) {
            10 | 11 => {
                store.deallocate(at as u64..(at + len) as u64).unwrap();
                model[at..at + len].fill(0);
            }
            12 => {
                store.reserve(at as u64..(at + len) as u64).unwrap();
                model[at..at + len].fill(0);
            }
            13 => extents_agree(name, store, &model, at, 1 + dice.below(50)),
            0..=3 => {
                let bytes = dice.bytes(len);
                let durability =
                    [Durability::Cached, Durability::Cached, Durability::Stable][dice.below(3)];
                store.write(at as u64, &buffer(&bytes, skew), durability).unwrap();
                model[at..at + len].copy_from_slice(&bytes);
            }
            4 => store.flush().unwrap(),
            5 => store.prefetch(at as u64, len as u64).unwrap(),
            6 => assert_holds(name, store, &model[at..at + len], at, skew, true),
            _ => assert_holds(name, store, &model[at..at + len], at, skew, false),
        }
    }
    assert_holds(name, store, &model, 0, 0, true);
}

/// Extents from `at` on touch each other, and no byte that is not zero is in a hole or unwritten.
fn extents_agree(name: &str, store: &dyn Store, model: &[u8], at: usize, limit: usize) {
    let extents = store.extents(at as u64..SIZE as u64, limit).unwrap();
    assert!(!extents.is_empty() && extents.len() <= limit, "{name}");
    let mut next = at as u64;
    for extent in extents {
        assert_eq!(extent.range.start, next, "{name}");
        next = extent.range.end;
        let bytes = &model[extent.range.start as usize..extent.range.end as usize];
        let zero = bytes.iter().all(|byte| *byte == 0);
        assert!(extent.kind == Kind::Data || zero, "{name}: fresh data in {extent:?}");
    }
}

/// What one call on a whole aligned range leaves behind, where the store can tell.
fn space_operations_show(name: &str, store: &dyn Store) {
    let can = store.capabilities().clone();
    let (range, around) = (1 << 20..2 << 20, 0..SIZE as u64);
    let at = |kind| Extent { range: range.clone(), kind };
    store.write(0, &buffer(&vec![3; SIZE], 0), Durability::Stable).unwrap();
    if can.deallocates {
        store.deallocate(range.clone()).unwrap();
    }
    if can.deallocates && !can.ways.contains("extents=none") {
        assert!(store.extents(around.clone(), 9).unwrap().contains(&at(Kind::Hole)), "{name}");
    }
    if can.reserves {
        store.reserve(range.clone()).unwrap();
        assert!(store.extents(around, 9).unwrap().contains(&at(Kind::Reserved)), "{name}");
    }
}

/// A part of what was just written in one piece, which the host keeps in one piece.
fn fresh_data_can_be_reserved_again(name: &str, store: &dyn Store) {
    if !store.capabilities().reserves {
        return;
    }
    let (whole, part) = (0..1u64 << 20, 0..32u64 << 10);
    store.deallocate(whole.clone()).unwrap();
    store.flush().unwrap();
    store.write(whole.start, &buffer(&vec![0x5a; 1 << 20], 0), Durability::Cached).unwrap();
    store.reserve(part.clone()).unwrap();
    let extents = store.extents(whole, 99).unwrap();
    let reserved = extents.iter().take_while(|e| e.range.end <= part.end);
    assert!(reserved.map(|e| e.kind).eq([Kind::Reserved]), "{name}: {extents:?}");
}

/// The one lie that destroys data: space reserved and on the disk, then a write that was not flushed.
fn fresh_data_in_reserved_space_is_data(name: &str, store: &dyn Store) {
    for at in [0, 1 << 20, SIZE as u64 - 4096] {
        store.reserve(0..SIZE as u64).unwrap();
        store.flush().unwrap();
        store.write(at, &buffer(&[9; 4096], 0), Durability::Cached).unwrap();
        let extents = store.extents(0..SIZE as u64, 99).unwrap();
        let hit = extents.iter().find(|e| e.range.contains(&at)).unwrap();
        assert_eq!(hit.kind, Kind::Data, "{name}: a fresh write at {at}: {extents:?}");
    }
}

/// The store holds these bytes at `at`, read into memory that is `skew` bytes off.
fn assert_holds(
    name: &str,
    store: &dyn Store,
    expected: &[u8],
    at: usize,
    skew: usize,
    medium: bool,
) {
    let into = buffer(&vec![0xa5; expected.len()], skew);
    match medium {
        true => store.read_medium(at as u64, &into).unwrap(),
        false => store.read(at as u64, &into).unwrap(),
    }
    assert!(into.to_vec(expected.len()) == expected, "{name}: {} bytes at {at}", expected.len());
}

fn options(direct: bool) -> OpenOptionsFor {
    OpenOptionsFor { read_only: false, direct, block_size: BLOCK as u32, locking: true }
}

fn fresh_file(path: &Path, size: u64) {
    let _ = std::fs::remove_file(path);
    File::create(path).unwrap().set_len(size).unwrap();
}

#[test]
fn memory() {
    contract("memory", &MemStore::new(SIZE as u64));
}

/// File systems that are not as mkfs makes them. Whatever a host can do there, nothing that it says may be a lie.
#[test]
fn files_on_other_file_systems() {
    for flavour in &FLAVOURS {
        let name = flavour.name;
        let Some(mount) = Mount::of_flavour(flavour, 512) else { continue };
        let path = mount.path().join("disk.img");
        for direct in [false, true] {
            fresh_file(&path, SIZE as u64);
            let before = path.metadata().unwrap().blocks();
            match FileStore::open(&path, &options(direct)) {
                Ok(store) => {
                    let can = store.capabilities();
                    eprintln!("{name}, direct={direct}: {}", can.ways);
                    assert_eq!(
                        path.metadata().unwrap().blocks(),
                        before,
                        "{name}: opening changed it"
                    );
                    let name = format!("{name}, direct={direct}");
                    contract(&name, &store);
                    copies_copy(&name, &store);
                }
                Err(why) if direct => eprintln!("{name}: no O_DIRECT: {}", why.0),
                Err(why) => panic!("{name}: {why:?}"),
            }
        }
    }
}

/// Servers that do what they say, by halves, or not at all: what cannot be had is offered less, and nothing is a lie.
#[test]
fn files_on_fuse() {
    let servers = [
        (false, None, ("seek", "punch")),
        (true, None, ("flushed first", "punch")),
        (false, Some(Lie::Fallocate), ("seek", "write")),
        (false, Some(Lie::Size), ("seek", "write")),
        (false, Some(Lie::Holes), ("none", "punch")),
        (true, Some(Lie::Holes), ("none", "punch")),
        (false, Some(Lie::Copies), ("seek", "punch")),
    ];
    for (writeback, lie, (extents, unmap)) in servers {
        let Some(fuse) = Fuse::new(writeback) else { return };
        if let Some(lie) = lie {
            fuse.lie(lie);
        }
        let name = format!("FUSE, writeback={writeback}, {lie:?}");
        let path = fuse.path().join("disk.img");
        fresh_file(&path, SIZE as u64);
        let store = FileStore::open(&path, &options(false)).unwrap();
        let ways = store.capabilities().ways.clone();
        assert!(
            ways.contains(extents) && ways.contains(&format!("unmap={unmap}")),
            "{name}: {ways}"
        );
        assert_eq!(store.capabilities().deallocates, unmap == "punch", "{name}");
        contract(&name, &store);
        copies_copy(&name, &store);
        drop(store);
        let mut left: Vec<_> = std::fs::read_dir(fuse.behind()).unwrap().flatten().collect();
        left.retain(|entry| entry.file_name() != "disk.img");
        assert!(left.is_empty(), "{name}: {left:?}");
        assert_eq!(path.metadata().unwrap().len(), SIZE as u64, "{name}");
    }
    let Some(fuse) = Fuse::new(false) else { return };
    fuse.refuse();
    let path = fuse.path().join("disk.img");
    fresh_file(&path, SIZE as u64);
    let store = FileStore::open(&path, &options(false)).unwrap();
    contract("FUSE that refuses", &store);
    copies_copy("FUSE that refuses", &store);
}

/// What was written can be read, and written over, before it is stable: it must not be written again.
#[test]
fn a_stable_write_is_written_once() {
    let Some(fuse) = Fuse::new(false) else { return };
    let path = fuse.path().join("disk.img");
    fresh_file(&path, SIZE as u64);
    for len in [BLOCK, 64 << 10, 1 << 20] {
        let store = FileStore::open(&path, &options(false)).unwrap();
        let (written, flushes) = (fuse.written(), fuse.flushes());
        store.write(4096, &buffer(&vec![7; len], 0), Durability::Stable).unwrap();
        assert_eq!(fuse.written() - written, len as u64);
        assert!(fuse.flushes() > flushes, "it was not flushed");
        assert_holds("FUSE", &store, &vec![7; len], 4096, 0, false);
    }
}

/// Data, holes and what is fresh, within a store.
fn copies_copy(name: &str, store: &dyn Store) {
    let half = SIZE / 2;
    store.deallocate(0..SIZE as u64).unwrap();
    store.flush().unwrap();
    let mut bytes = vec![0; half];
    let mut dice = Dice(0xc0de);
    for _ in 0..20 {
        let (at, len) = (dice.below(half / BLOCK - 100) * BLOCK, (1 + dice.below(99)) * BLOCK);
        bytes[at..at + len].copy_from_slice(&dice.bytes(len));
        store.write(at as u64, &buffer(&bytes[at..at + len], 0), Durability::Cached).unwrap();
    }
    let mut go_on = |_| true;
    let mut copy = Copy::new(store, store, Holes::Stay, &mut go_on);
    copy.run(0..half as u64, half as u64).unwrap();
    assert_holds(name, store, &bytes, half, 0, false);
}

fn files_on(kind: FileSystem) {
    let Some(mount) = Mount::new(kind, 512) else { return };
    let path = mount.path().join("disk.img");
    fresh_file(&path, SIZE as u64);
    let store = FileStore::open(&path, &options(false)).unwrap();
    assert!(store.capabilities().deallocates, "{kind:?}");
    assert_eq!(store.capabilities().reserves, kind != FileSystem::Tmpfs, "{kind:?}");
    assert_eq!(path.metadata().unwrap().blocks(), 0, "{kind:?}: opening a file changed it");
    drop(store);
    for direct in [false, true] {
        fresh_file(&path, SIZE as u64);
        match FileStore::open(&path, &options(direct)) {
            Ok(store) => contract(&format!("{kind:?} direct={direct}"), &store),
            // A loop device with larger blocks, or a file system without O_DIRECT.
            Err(why) if direct => skipped(&format!("O_DIRECT on {kind:?}: {}", why.0)),
            Err(why) => panic!("{kind:?}: {why:?}"),
        }
    }
}

#[test]
fn files_on_ext4() {
    files_on(FileSystem::Ext4);
}

#[test]
fn files_on_xfs() {
    files_on(FileSystem::Xfs);
}

#[test]
fn files_on_btrfs() {
    files_on(FileSystem::Btrfs);
}

#[test]
fn files_on_tmpfs() {
    files_on(FileSystem::Tmpfs);
}

#[test]
fn a_block_device() {
    let Some(device) = LoopDevice::new(SIZE as u64 >> 20) else { return };
    for direct in [false, true] {
        let store = FileStore::open(&device.device, &options(direct)).unwrap();
        assert!(store.capabilities().deallocates && !store.capabilities().reserves);
        store.write(0, &buffer(&vec![0; SIZE], 0), Durability::Stable).unwrap();
        contract(&format!("loop device direct={direct}"), &store);
    }
}

/// Sectors of 4096 bytes, on which fallocate has to be aligned, under blocks of 512.
#[test]
fn a_block_device_with_larger_sectors() {
    let Some(device) = LoopDevice::with_sectors(SIZE as u64 >> 20, 4096) else { return };
    let store = FileStore::open(&device.device, &options(false)).unwrap();
    assert_eq!(store.capabilities().host_block, 4096, "the sectors are not what was asked for");
    contract("loop device with larger sectors", &store);
    drop(store);
    let refused = FileStore::open(&device.device, &options(true)).unwrap_err().0;
    assert!(refused.contains("block-size=4096"), "{refused}");
}

/// Space that is reserved in the file behind a loop device: the device cannot be asked for any, so that it has none to
/// tell of.
#[test]
fn a_loop_device_over_reserved_space() {
    let Some(device) = LoopDevice::new(SIZE as u64 >> 20) else { return };
    let file = File::options().write(true).open(device.file()).unwrap();
    let (from, len) = (1 << 20, 1 << 20);
    if fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, len).is_err() {
        return skipped("nothing was proved of reserved space behind a loop device: there is none");
    }
    let store = FileStore::open(&device.device, &options(false)).unwrap();
    assert!(!store.capabilities().reserves);
    let extents = store.extents(0..SIZE as u64, 99).unwrap();
    assert!(extents.iter().all(|extent| extent.kind != Kind::Reserved), "{extents:?}");
    let whole = Extent { range: 1 << 20..2 << 20, kind: Kind::Data };
    assert!(extents.contains(&whole), "{extents:?}");
}

#[test]
fn a_read_only_store_refuses_every_write() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE as u64).unwrap();
    let read_only = OpenOptionsFor { read_only: true, ..options(false) };
    let store = FileStore::open(file.path(), &read_only).unwrap();
    let bytes = buffer(&[1; BLOCK], 0);
    for durability in [Durability::Cached, Durability::Stable] {
        let refused = store.write(1024, &bytes, durability);
        assert_eq!(refused, Err(StoreError::at(Cause::ReadOnly, 1024)));
        let refused = MemStore::new(SIZE as u64).read_only().write(1024, &bytes, durability);
        assert_eq!(refused, Err(StoreError::at(Cause::ReadOnly, 1024)));
    }
    reads_zeroes_at_first("read-only", &store);
}

/// A full file system is told as such, at the byte where it happened; what was written stays, and
/// when there is space again writes succeed.
#[test]
fn a_full_file_system_is_no_space() {
    for kind in ALL {
        let Some(mount) = Mount::new(kind, 320) else { continue };
        let (disk, filler) = (mount.path().join("disk.img"), mount.path().join("filler"));
        fresh_file(&disk, 1 << 30);
        let store = FileStore::open(&disk, &options(false)).unwrap();
        let chunk = buffer(&vec![7; 1 << 20], 0);
        fresh_file(&filler, 0);
        std::fs::write(&filler, vec![1; 32 << 20]).unwrap();
        let mut at = 0;
        let error = loop {
            assert!(at < 1 << 30, "{kind:?} never fills up");
            match store.write(at, &chunk, Durability::Stable) {
                Ok(()) => at += 1 << 20,
                Err(error) => break error,
            }
        };
        assert_eq!(error.cause, Cause::NoSpace, "{kind:?}");
        assert!((at..at + (1 << 20)).contains(&error.at.unwrap()), "{kind:?}: {error:?}");
        assert_holds("full", &store, &vec![7; 1 << 20], 0, 0, false);
        std::fs::remove_file(&filler).unwrap();
        let freed = (0..50).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            store.write(at, &chunk, Durability::Stable).is_ok()
        });
        assert!(freed, "{kind:?}: no write succeeds after space was freed");
    }
}
