//! The three parts of a split virtqueue (VIRTIO 1.3 2.7): found in guest memory once, and then read and
//! written in place. Nothing that is read here is believed by anyone.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use vm_memory::{GuestAddress, GuestMemoryBackend};

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

/// A ring that was found.
pub(super) struct SplitRing {
    size: u16,
    descriptors: *mut u8,
    available: *mut u16,
    used: *mut u16,
    /// Keeps the pointers valid.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are to memory that `_memory` keeps mapped, whichever thread looks at it.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Finds a ring; `None` if a part of it is not in memory, lies across two regions, or is not aligned as
    /// VIRTIO 1.3 2.7 demands.
    pub(super) fn find(memory: &Arc<GuestMemory>, layout: &Layout) -> Option<Self> {
        let size = usize::from(layout.size);
        if !layout.size.is_power_of_two() || layout.available.0 == 0 {
            return None;
        }
        let part = |address, len, align| {
            let at = memory.get_slice(address, len).ok()?.ptr_guard_mut().as_ptr();
            (at.addr() % align == 0).then_some(at)
        };
        Some(SplitRing {
            size: layout.size,
            descriptors: part(layout.descriptors, DESCRIPTOR_SIZE * size, 16)?,
            available: part(layout.available, 6 + 2 * size, 2)?.cast(),
            used: part(layout.used, USED_FIXED + USED_ENTRY * size, 4)?.cast(),
            _memory: Arc::clone(memory),
        })
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

    /// Its descriptors: a table that is there as long as the ring is.
    pub(super) fn descriptors(&self) -> DescriptorTable {
        // SAFETY: `find` has found as many.
        unsafe { DescriptorTable::new(self.descriptors, self.size.into()) }
    }

    /// Writes an entry of the used ring, which the driver sees when the index is past it.
    pub(super) fn put_used(&self, index: u16, head: u16, written: u32) {
        let place = 2 + 4 * self.slot(index);
        for (part, value) in [(0, u32::from(head)), (2, written)] {
            // SAFETY: inside an entry, aligned to four bytes as the ring is; as in `number`.
            let number = unsafe { AtomicU32::from_ptr(self.used.add(place + part).cast()) };
            number.store(value.to_le(), Ordering::Relaxed);
        }
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
