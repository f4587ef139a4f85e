//! The three parts of a split virtqueue (VIRTIO 1.3 2.7): found in guest memory once, and then read and
//! written in place. Nothing that is read here is believed by anyone.
#![allow(unsafe_code)]

use std::any::Any;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::memory::GuestMemory;

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// Bytes of the used ring: flags, index and event, and for each entry.
const USED_FIXED: usize = 6;
const USED_ENTRY: usize = 8;

/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// `struct virtq_desc`, in numbers of the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub address: u64,
    pub len: u32,
    flags: u16,
    pub next: u16,
}

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_SIZE: usize = 16;

/// What stands at a place that the driver may change at any moment, aligned or not: it is read exactly once.
///
/// # Safety
/// There must be a `T` of mapped bytes, and any bytes must be one.
#[inline]
pub(super) unsafe fn read_once<T: Copy>(at: *const u8) -> T {
    #[repr(C, packed)]
    #[derive(Clone, Copy)]
    struct Unaligned<T>(T);
    // SAFETY: as the caller says; a packed structure is aligned anywhere.
    unsafe { at.cast::<Unaligned<T>>().read_volatile().0 }
}

impl Descriptor {
    pub(super) fn has_next(&self) -> bool {
        self.flags & 1 != 0
    }

    pub(super) fn is_writable(&self) -> bool {
        self.flags & 2 != 0
    }

    pub(super) fn is_indirect(&self) -> bool {
        self.flags & 4 != 0
    }
}

/// A table of descriptors in memory that the driver may change at any moment: no field is read twice.
#[derive(Clone, Copy)]
pub(super) struct DescriptorTable {
    first: *const u8,
    count: usize,
}

impl DescriptorTable {
    /// A table of `count` descriptors.
    ///
    /// # Safety
    /// They must be mapped as long as the table is used.
    pub(super) unsafe fn new(first: *const u8, count: usize) -> Self {
        DescriptorTable { first, count }
    }

    pub(super) fn len(self) -> usize {
        self.count
    }

    /// A descriptor; `None` if the table does not reach so far.
    #[inline]
    pub(super) fn get(self, index: u16) -> Option<Descriptor> {
        let index = usize::from(index);
        if index >= self.count {
            return None;
        }
        // SAFETY: the table has `count` descriptors, of 8, 4, 2 and 2 bytes.
        unsafe {
            let descriptor = self.first.add(DESCRIPTOR_SIZE * index);
            Some(Descriptor {
                address: u64::from_le(read_once(descriptor)),
                len: u32::from_le(read_once(descriptor.add(8))),
                flags: u16::from_le(read_once(descriptor.add(12))),
                next: u16::from_le(read_once(descriptor.add(14))),
            })
        }
    }
}

/// Where a ring lies, in guest addresses, and how long it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Number of descriptors: a power of two.
    pub size: u16,
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

impl Layout {
    /// Bytes of the descriptor table, the available ring and the used ring.
    fn lengths(&self) -> [usize; 3] {
        let size = usize::from(self.size);
        [DESCRIPTOR_SIZE * size, 6 + 2 * size, USED_FIXED + USED_ENTRY * size]
    }
}

/// What keeps a part of a ring where it is.
type Keeper = Box<dyn Any + Send>;

/// A ring that was found.
pub(super) struct SplitRing {
    size: u16,
    descriptors: *mut u8,
    available: *mut u16,
    used: *mut u16,
    /// Keep the pointers valid.
    _keepers: [Keeper; 3],
}

// SAFETY: the pointers are to memory that `_keepers` keep mapped, whichever thread looks at it.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Finds a ring; `None` if a part of it is not in memory, or is not aligned as VIRTIO 1.3 2.7 demands.
    pub(super) fn find(memory: &Arc<GuestMemory>, layout: &Layout) -> Option<Self> {
        if !layout.size.is_power_of_two() || layout.available.0 == 0 {
            return None;
        }
        let part = |address, len, align| {
            let (at, keeper) = in_one_piece(memory, address, len)?;
            (at.addr() % align == 0).then_some((at, keeper))
        };
        let [descriptors, available, used] = layout.lengths();
        let (descriptors, keeps_descriptors) = part(layout.descriptors, descriptors, 16)?;
        let (available, keeps_available) = part(layout.available, available, 2)?;
        let (used, keeps_used) = part(layout.used, used, 4)?;
        Some(SplitRing {
            size: layout.size,
            descriptors,
            available: available.cast(),
            used: used.cast(),
            _keepers: [keeps_descriptors, keeps_available, keeps_used],
        })
    }

    /// A ring of our own, with nothing in it, that stands in for one whose memory is away.
    pub(super) fn stand_in(layout: &Layout) -> Self {
        let part = |len: usize| {
            let mut words = vec![0_u128; len.div_ceil(size_of::<u128>())];
            (words.as_mut_ptr(), Box::new(words) as Keeper)
        };
        let [(descriptors, a), (available, b), (used, c)] = layout.lengths().map(part);
        SplitRing {
            size: layout.size,
            descriptors: descriptors.cast(),
            available: available.cast(),
            used: used.cast(),
            _keepers: [a, b, c],
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Bytes of the used ring.
    pub(super) fn used_len(&self) -> u64 {
        (USED_FIXED + USED_ENTRY * usize::from(self.size)) as u64
    }

    /// The number at a place of one of the two rings, counted in 16 bits.
    fn number(&self, ring: *mut u16, place: usize) -> &AtomicU16 {
        // SAFETY: callers name places inside the parts that `find` has found: flags and index, `size`
        // entries of one place (available) or four (used), and the event behind them. Aligned by `find`;
        // everybody else who looks at these places is outside this process.
        unsafe { AtomicU16::from_ptr(ring.add(place)) }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// The driver's index; entries before it can be read after this.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.number(self.available, 1).load(Ordering::Acquire))
    }

    /// An entry of the available ring.
    pub(super) fn available(&self, index: u16) -> u16 {
        let entry = self.number(self.available, 2 + self.slot(index));
        u16::from_le(entry.load(Ordering::Relaxed))
    }

    /// What was made available from an index on, as far as that can be: at most the queue's length.
    pub(super) fn available_since(&self, index: u16) -> Vec<u16> {
        let count = self.available_index().wrapping_sub(index).min(self.size);
        (0..count).map(|n| self.available(index.wrapping_add(n))).collect()
    }

    /// Its descriptors: a table that is there as long as the ring is.
    pub(super) fn descriptors(&self) -> DescriptorTable {
        // SAFETY: `find` has found as many.
        unsafe { DescriptorTable::new(self.descriptors, self.size.into()) }
    }

    /// Writes an entry of the used ring, which the driver sees when the index is past it.
    pub(super) fn put_used(&self, index: u16, head: u32, written: u32) {
        let place = 2 + 4 * self.slot(index);
        for (part, value) in [(0, head), (2, written)] {
            // SAFETY: inside an entry, aligned to four bytes as the ring is; as in `number`.
            let number = unsafe { AtomicU32::from_ptr(self.used.add(place + part).cast()) };
            number.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// What stands in an entry of the used ring.
    pub(super) fn used_entry(&self, index: u16) -> (u32, u32) {
        let place = 2 + 4 * self.slot(index);
        // SAFETY: as in `put_used`.
        let number = |part| unsafe { AtomicU32::from_ptr(self.used.add(place + part).cast()) };
        let read = |part| u32::from_le(number(part).load(Ordering::Relaxed));
        (read(0), read(2))
    }

    /// Our own index, as it stands in memory.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.number(self.used, 1).load(Ordering::Relaxed))
    }

    /// Shows the driver the entries before `index`.
    pub(super) fn set_used_index(&self, index: u16) {
        self.number(self.used, 1).store(index.to_le(), Ordering::Release);
    }

    /// Asks for a kick at this index (EVENT_IDX). The available index has to be looked at again after it.
    pub(super) fn set_kick_event(&self, index: u16) {
        let event = self.number(self.used, 2 + 4 * usize::from(self.size));
        event.store(index.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Asks for kicks, or says that there need be none (without EVENT_IDX).
    pub(super) fn set_kicks(&self, wanted: bool) {
        let flags = if wanted { 0 } else { NO_NOTIFY };
        self.number(self.used, 0).store(flags.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The index at which the driver wants to be told (EVENT_IDX), asked after the used index was set.
    pub(super) fn call_event(&self) -> u16 {
        fence(Ordering::SeqCst);
        let event = self.number(self.available, 2 + usize::from(self.size));
        u16::from_le(event.load(Ordering::Relaxed))
    }

    /// Whether the driver wants to be told (without EVENT_IDX), asked after the used index was set.
    pub(super) fn wants_calls(&self) -> bool {
        fence(Ordering::SeqCst);
        u16::from_le(self.number(self.available, 0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0
    }
}

/// Where a range of guest memory lies in one piece, and what keeps it there. Neighbouring regions are files of their own
/// (the memory of two NUMA nodes, say): if the range lies across them, their pages are mapped once more, one behind
/// the other. `None` if part of it is not memory, or if the regions do not meet at a page of their files.
fn in_one_piece(
    memory: &Arc<GuestMemory>,
    address: GuestAddress,
    len: usize,
) -> Option<(*mut u8, Keeper)> {
    if let Ok(slice) = memory.get_slice(address, len) {
        return Some((slice.ptr_guard_mut().as_ptr(), Box::new(Arc::clone(memory))));
    }
    // SAFETY: it reads a number.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let (first, offset) = memory.to_region_addr(address)?;
    let offset = first.file_offset()?.start().checked_add(offset.0)?;
    // How far into its page the range begins.
    let start = usize::try_from(offset).ok()? % page;
    let whole = MmapRegion::<()>::new(start.checked_add(len)?.next_multiple_of(page)).ok()?;
    let mut done = 0;
    while done < len {
        let (region, at) = memory.to_region_addr(address.checked_add(done as u64)?)?;
        let file = region.file_offset()?;
        let here = usize::try_from(region.len() - at.0).ok()?.min(len - done);
        let before = if done == 0 { start } else { 0 };
        let offset = file.start().checked_add(at.0)?.checked_sub(before as u64)?;
        let place = start + done - before;
        if place % page != 0 || usize::try_from(offset).ok()? % page != 0 {
            return None;
        }
        // SAFETY: page by page inside `whole`, which is ours, has nothing in it and is unmapped as one.
        let mapped = unsafe {
            libc::mmap(
                whole.as_ptr().add(place).cast(),
                before + here,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.file().as_raw_fd(),
                libc::off_t::try_from(offset).ok()?,
            )
        };
        if mapped == libc::MAP_FAILED {
            return None;
        }
        done += here;
    }
    // SAFETY: `start` is less than a page, of which there is at least one.
    let at = unsafe { whole.as_ptr().add(start) };
    Some((at, Box::new(whole)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset, GuestRegionMmap};

    /// Regions of these lengths one behind the other from guest address 0x10000 on, each at an offset in its file.
    fn regions(lengths: &[usize]) -> Arc<GuestMemory> {
        let mut start = 0x10000;
        let region = |len: &usize| {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(0x3000 + *len as u64).unwrap();
            let mapping = MmapRegion::from_file(FileOffset::new(file, 0x3000), *len).unwrap();
            let region = GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap();
            start += *len as u64;
            region
        };
        let regions = lengths.iter().map(region).collect();
        Arc::new(GuestMemory::from_regions(regions).unwrap())
    }

    #[test]
    fn a_range_across_regions_is_one_piece() {
        let memory = regions(&[0x2000, 0x1000, 0x3000]);
        for (address, len) in
            [(0x11f00, 0x200), (0x11ff0, 0x1020), (0x12010, 0x100), (0x10000, 0x6000)]
        {
            let bytes: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
            memory.write_slice(&bytes, GuestAddress(address)).unwrap();
            let (at, _keeper) = in_one_piece(&memory, GuestAddress(address), len).unwrap();
            assert_eq!(at.addr() as u64 % 4096, address % 4096);
            // SAFETY: the piece has as many bytes.
            unsafe {
                assert_eq!(std::slice::from_raw_parts(at, len), bytes);
                at.add(len - 1).write(0xee);
            }
            let last = memory.read_obj::<u8>(GuestAddress(address + len as u64 - 1)).unwrap();
            assert_eq!(last, 0xee, "the same memory");
        }
        assert!(in_one_piece(&memory, GuestAddress(0x15ff0), 0x11).is_none(), "past the end");
        assert!(in_one_piece(&memory, GuestAddress(0xfff0), 0x20).is_none(), "before it");
    }

    #[test]
    fn regions_that_do_not_meet_at_a_page_are_not_joined() {
        let memory = regions(&[0x1800, 0x1800]);
        assert!(in_one_piece(&memory, GuestAddress(0x117f0), 0x20).is_none());
        assert!(in_one_piece(&memory, GuestAddress(0x11000), 0x800).is_some());
    }
}
