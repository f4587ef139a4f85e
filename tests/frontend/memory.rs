//! Guest memory: shared memfd regions at guest physical addresses, and a heap inside them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::{GIB, MIB};

/// Where a region lies and how it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Offset of the region inside its file: QEMU maps the RAM above 4 GiB at an offset.
    pub file_offset: u64,
    /// Whether [`GuestMemory::alloc`] may use it; if not, only [`GuestMemory::alloc_in`] does.
    pub shared: bool,
}

impl RegionSpec {
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size, file_offset: 0, shared: true }
    }

    /// At an offset inside the file that is passed to the daemon.
    pub const fn at_file_offset(mut self, offset: u64) -> Self {
        self.file_offset = offset;
        self
    }

    /// Used only by those who ask for this region by its base address.
    pub const fn reserved(mut self) -> Self {
        self.shared = false;
        self
    }

    /// One region of 64 MiB at address 0.
    pub fn single() -> Vec<Self> {
        vec![Self::new(0, 64 * MIB)]
    }

    /// Like a PC: low memory, a hole, memory above 4 GiB, a file offset, far away memory.
    pub fn with_gaps() -> Vec<Self> {
        vec![
            Self::new(0, 16 * MIB),
            Self::new(0x0800_0000, 8 * MIB),
            Self::new(4 * GIB, 32 * MIB).at_file_offset(16 * MIB),
            Self::new(1 << 40, 8 * MIB),
        ]
    }

    /// Two files that touch each other in the guest, as with two NUMA nodes: a buffer may lie
    /// across the seam, though the daemon's mappings of the halves are unrelated.
    pub fn adjacent() -> Vec<Self> {
        vec![Self::new(0, 16 * MIB), Self::new(16 * MIB, 16 * MIB)]
    }
}

/// One region as the vhost-user messages describe it.
#[derive(Clone, Copy, Debug)]
pub struct RegionInfo {
    pub guest_address: u64,
    pub size: u64,
    pub user_address: u64,
    pub file_offset: u64,
    pub fd: RawFd,
}

/// The memory of the guest. Regions come and go; all accesses are safe.
pub struct GuestMemory {
    map: GuestMemoryAtomic<GuestMemoryMmap>,
    heap: Mutex<Heap>,
}

impl GuestMemory {
    pub fn new(layout: &[RegionSpec]) -> Self {
        let mut heap = Heap::default();
        let mut regions = Vec::new();
        for spec in layout {
            regions.push(map_region(spec));
            heap.add_zone(spec);
        }
        let map = GuestMemoryMmap::from_regions(regions).expect("a valid memory layout");
        Self { map: GuestMemoryAtomic::new(map), heap: Mutex::new(heap) }
    }

    /// Maps one more region (the daemon has to be told about it).
    pub fn insert(&self, spec: &RegionSpec) {
        let guard = self.map.lock().unwrap();
        let map = self.map.memory().insert_region(Arc::new(map_region(spec)));
        guard.replace(map.expect("a region that overlaps no other"));
        self.heap.lock().unwrap().add_zone(spec);
    }

    /// Unmaps a region. Nothing allocated in it may be in use.
    pub fn remove(&self, base: u64) {
        let size = self.region(base).size;
        self.heap.lock().unwrap().remove_zone(base);
        let guard = self.map.lock().unwrap();
        let (map, _) = self.map.memory().remove_region(GuestAddress(base), size).unwrap();
        guard.replace(map);
    }

    pub fn regions(&self) -> Vec<RegionInfo> {
        self.map.memory().iter().map(describe).collect()
    }

    pub fn region(&self, base: u64) -> RegionInfo {
        let found = self.regions().into_iter().find(|region| region.guest_address == base);
        found.unwrap_or_else(|| panic!("no memory region at {base:#x}"))
    }

    /// The front end's own address of a guest address, as SET_VRING_ADDR wants it.
    pub fn user_address(&self, address: u64) -> u64 {
        let inside = |region: &&RegionInfo| {
            (region.guest_address..region.guest_address + region.size).contains(&address)
        };
        let regions = self.regions();
        let region = regions.iter().find(inside).expect("an address in guest memory");
        region.user_address + (address - region.guest_address)
    }

    /// Takes `len` bytes whose address is `skew` more than a multiple of `align`.
    pub fn alloc(&self, len: usize, align: usize, skew: usize) -> u64 {
        let taken = self.heap.lock().unwrap().take(len, align, skew);
        taken.unwrap_or_else(|| panic!("guest memory has no {len} bytes left"))
    }

    /// The same in the region that starts at `base`.
    pub fn alloc_in(&self, base: u64, len: usize, align: usize, skew: usize) -> u64 {
        let taken = self.heap.lock().unwrap().take_in(base, len, align, skew);
        taken.unwrap_or_else(|| panic!("the region at {base:#x} has no {len} bytes left"))
    }

    /// Gives back what `alloc` or `alloc_in` returned.
    pub fn free(&self, address: u64) {
        self.heap.lock().unwrap().give_back(address);
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.map.memory().write_slice(bytes, GuestAddress(address)).expect("guest memory");
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_into(address, &mut bytes);
        bytes
    }

    pub fn read_into(&self, address: u64, bytes: &mut [u8]) {
        self.map.memory().read_slice(bytes, GuestAddress(address)).expect("guest memory");
    }

    pub fn load_u16(&self, address: u64, order: Ordering) -> u16 {
        let value = self.map.memory().load(GuestAddress(address), order).expect("guest memory");
        u16::from_le(value)
    }

    pub fn store_u16(&self, address: u64, value: u16, order: Ordering) {
        let stored = self.map.memory().store(value.to_le(), GuestAddress(address), order);
        stored.expect("guest memory");
    }

    pub fn load_u32(&self, address: u64) -> u32 {
        let map = self.map.memory();
        u32::from_le(map.load(GuestAddress(address), Ordering::Relaxed).expect("guest memory"))
    }
}

fn map_region(spec: &RegionSpec) -> GuestRegionMmap {
    let fd = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC).expect("memfd_create");
    let file = File::from(fd);
    file.set_len(spec.file_offset + spec.size).expect("space for guest memory");
    let offset = FileOffset::new(file, spec.file_offset);
    let mapping = MmapRegion::from_file(offset, spec.size as usize).expect("mmap");
    GuestRegionMmap::new(mapping, GuestAddress(spec.base)).expect("a region below 2^64")
}

fn describe(region: &GuestRegionMmap) -> RegionInfo {
    let file = region.file_offset().expect("regions have files");
    RegionInfo {
        guest_address: region.start_addr().0,
        size: region.len(),
        user_address: region.as_ptr() as u64,
        file_offset: file.start(),
        fd: file.file().as_raw_fd(),
    }
}

/// First fit in free lists, one a region; round robin over the regions, so that the parts of one
/// request lie in different ones.
#[derive(Default)]
struct Heap {
    zones: Vec<Zone>,
    next: usize,
    taken: HashMap<u64, Taken>,
}

struct Zone {
    base: u64,
    shared: bool,
    /// Start to length; neighbours are merged.
    free: BTreeMap<u64, u64>,
}

struct Taken {
    zone: u64,
    start: u64,
    len: u64,
}

impl Heap {
    fn add_zone(&mut self, spec: &RegionSpec) {
        let free = BTreeMap::from([(spec.base, spec.size)]);
        self.zones.push(Zone { base: spec.base, shared: spec.shared, free });
    }

    fn remove_zone(&mut self, base: u64) {
        let in_use = self.taken.values().filter(|taken| taken.zone == base).count();
        assert_eq!(in_use, 0, "buffers of the region at {base:#x} are still in use");
        self.zones.retain(|zone| zone.base != base);
    }

    fn take(&mut self, len: usize, align: usize, skew: usize) -> Option<u64> {
        for _ in 0..self.zones.len() {
            self.next = (self.next + 1) % self.zones.len();
            let zone = &self.zones[self.next];
            if zone.shared {
                let base = zone.base;
                if let Some(address) = self.take_in(base, len, align, skew) {
                    return Some(address);
                }
            }
        }
        None
    }

    fn take_in(&mut self, base: u64, len: usize, align: usize, skew: usize) -> Option<u64> {
        let zone = self.zones.iter_mut().find(|zone| zone.base == base)?;
        let (align, skew) = (align as u64, skew as u64);
        let len = len.max(1) as u64;
        let (start, room, address) = zone.free.iter().find_map(|(&start, &room)| {
            let address = start.next_multiple_of(align) + skew;
            (address + len <= start + room).then_some((start, room, address))
        })?;
        zone.free.remove(&start);
        let end = address + len;
        if end < start + room {
            zone.free.insert(end, start + room - end);
        }
        self.taken.insert(address, Taken { zone: base, start, len: end - start });
        Some(address)
    }

    fn give_back(&mut self, address: u64) {
        let taken = self.taken.remove(&address).expect("an address that was allocated");
        let zone = self.zones.iter_mut().find(|zone| zone.base == taken.zone).unwrap();
        let (mut start, mut len) = (taken.start, taken.len);
        if let Some((&before, &room)) = zone.free.range(..start).next_back()
            && before + room == start
        {
            zone.free.remove(&before);
            (start, len) = (before, room + len);
        }
        if let Some(room) = zone.free.remove(&(start + len)) {
            len += room;
        }
        zone.free.insert(start, len);
    }
}
