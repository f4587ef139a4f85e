//! The driver's half of a split virtqueue (VIRTIO 1.3, 2.7): a descriptor table, an available
//! ring and a used ring in guest memory, with the memory barriers a driver on another CPU needs.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::GuestMemory;

pub const DESC_F_NEXT: u16 = 1;
pub const DESC_F_WRITE: u16 = 2;
pub const DESC_F_INDIRECT: u16 = 4;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

const DESC_SIZE: usize = 16;
const USED_ELEMENT_SIZE: u64 = 8;

/// A descriptor with every field free: hostile drivers write what they want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDesc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl RawDesc {
    pub fn to_bytes(self) -> [u8; DESC_SIZE] {
        let mut bytes = [0; DESC_SIZE];
        bytes[0..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One buffer of a well-formed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub len: u32,
}

/// Where the three parts lie, as guest addresses.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

pub struct Ring {
    mem: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    at: RingAddresses,
    /// Descriptors nobody uses.
    free: Vec<u16>,
    /// By head, the descriptors of the chains that the device has.
    chains: Vec<Option<Vec<u16>>>,
    /// Free running index of the next available entry, offered or not.
    next_avail: u16,
    /// The index that was last published.
    published: u16,
    /// Free running index of the next used entry to look at.
    next_used: u16,
    polling: bool,
}

impl Ring {
    pub fn new(mem: Arc<GuestMemory>, size: u16, event_idx: bool) -> Self {
        let n = usize::from(size);
        let at = RingAddresses {
            desc: mem.alloc(DESC_SIZE * n, 16, 0),
            avail: mem.alloc(6 + 2 * n, 2, 0),
            used: mem.alloc(6 + 8 * n, 4, 0),
        };
        let mut ring = Self {
            mem,
            size,
            event_idx,
            at,
            free: Vec::new(),
            chains: Vec::new(),
            next_avail: 0,
            published: 0,
            next_used: 0,
            polling: false,
        };
        ring.reset();
        ring
    }

    /// Empty rings at other addresses.
    pub fn move_to(&mut self, at: RingAddresses) {
        self.at = at;
        self.reset();
    }

    /// Bytes of the three parts.
    pub fn lengths(&self) -> [usize; 3] {
        let n = usize::from(self.size);
        [DESC_SIZE * n, 6 + 2 * n, 6 + 8 * n]
    }

    /// As after a device reset: empty rings, indexes zero, nothing outstanding.
    pub fn reset(&mut self) {
        let n = usize::from(self.size);
        self.mem.write(self.at.desc, &vec![0; DESC_SIZE * n]);
        self.mem.write(self.at.avail, &vec![0; 6 + 2 * n]);
        self.mem.write(self.at.used, &vec![0; 6 + 8 * n]);
        self.free = (0..self.size).rev().collect();
        self.chains = vec![None; n];
        (self.next_avail, self.published, self.next_used) = (0, 0, 0);
        self.set_polling(self.polling);
    }

    /// Starts both indexes at `base` instead of 0, as a driver that has run for a while.
    pub fn start_at(&mut self, base: u16) {
        self.reset();
        (self.next_avail, self.published, self.next_used) = (base, base, base);
        self.store_avail_idx(base);
        self.mem.store_u16(self.at.used + 2, base, Ordering::Release);
        self.set_polling(self.polling);
    }

    /// Somebody else has used the ring up to `index`, and nothing is outstanding.
    pub fn go_on_at(&mut self, index: u16) {
        assert_eq!(self.outstanding(), 0);
        (self.next_avail, self.published, self.next_used) = (index, index, index);
        self.set_polling(self.polling);
    }

    pub fn addresses(&self) -> RingAddresses {
        self.at
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Chains the device has and has not returned.
    pub fn outstanding(&self) -> usize {
        self.chains.iter().flatten().count()
    }

    /// The available index as the device sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Entries that were offered and not published.
    pub fn unpublished(&self) -> u16 {
        self.next_avail.wrapping_sub(self.published)
    }

    /// The used index as this driver has consumed it.
    pub fn consumed(&self) -> u16 {
        self.next_used
    }

    /// The used index in memory, written by the device.
    pub fn used_idx(&self) -> u16 {
        self.mem.load_u16(self.at.used + 2, Ordering::Acquire)
    }

    /// How far the device has taken entries in and asks to be kicked for more (EVENT_IDX).
    pub fn avail_event(&self) -> u16 {
        let event = self.at.used + 4 + USED_ELEMENT_SIZE * u64::from(self.size);
        self.mem.load_u16(event, Ordering::Acquire)
    }

    // ----- making buffers available ---------------------------------------------------------

    /// Builds a chain in the descriptor table and offers it; `None` if there is no room.
    pub fn add(&mut self, chain: &[Desc]) -> Option<u16> {
        assert!(!chain.is_empty() && chain.len() <= usize::from(self.size), "an impossible chain");
        if self.free.len() < chain.len() {
            return None;
        }
        let indexes = self.free.split_off(self.free.len() - chain.len());
        for (position, desc) in chain.iter().enumerate() {
            let raw = linked(desc, indexes.get(position + 1).copied());
            self.write_desc(indexes[position], raw);
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = Some(indexes);
        self.offer(head);
        Some(head)
    }

    /// Offers a chain that lies in an indirect table at `table`; `None` if there is no room.
    pub fn add_indirect(&mut self, table: u64, chain: &[Desc]) -> Option<u16> {
        let head = self.free.pop()?;
        self.mem.write(table, &indirect_table(chain));
        let len = (chain.len() * DESC_SIZE) as u32;
        let raw = RawDesc { address: table, len, flags: DESC_F_INDIRECT, next: 0 };
        self.write_desc(head, raw);
        self.chains[usize::from(head)] = Some(vec![head]);
        self.offer(head);
        Some(head)
    }

    /// Writes descriptors as they are, at free places, and offers the first. `next` counts from
    /// the first descriptor of the slice, unless the entry is not linked.
    pub fn add_raw(&mut self, descs: &[RawDesc]) -> u16 {
        let indexes = self.free.split_off(self.free.len() - descs.len());
        for (&index, desc) in indexes.iter().zip(descs) {
            let next = indexes.get(usize::from(desc.next)).copied().unwrap_or(desc.next);
            self.write_desc(index, RawDesc { next, ..*desc });
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = Some(indexes);
        self.offer(head);
        head
    }

    pub fn write_desc(&self, index: u16, desc: RawDesc) {
        let address = self.at.desc + u64::from(index) * DESC_SIZE as u64;
        self.mem.write(address, &desc.to_bytes());
    }

    /// Writes any head, also an invalid one, into the next available entry. Not yet visible.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.mem.store_u16(self.at.avail + 4 + 2 * slot, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// The head in the available entry of this index.
    pub fn head_of(&self, index: u16) -> u16 {
        let slot = u64::from(index % self.size);
        self.mem.load_u16(self.at.avail + 4 + 2 * slot, Ordering::Relaxed)
    }

    /// Makes everything offered visible; true if the device wants a notification.
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.store_avail_idx(self.next_avail);
        self.published = self.next_avail;
        // 2.7.13.4.1: the index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        if old == self.published {
            return false;
        }
        if self.event_idx {
            need_event(self.avail_event(), self.published, old)
        } else {
            self.mem.load_u16(self.at.used, Ordering::Acquire) & USED_F_NO_NOTIFY == 0
        }
    }

    /// Writes the available index as it is: hostile drivers jump.
    pub fn store_avail_idx(&self, index: u16) {
        self.mem.store_u16(self.at.avail + 2, index, Ordering::Release);
    }

    // ----- taking back used buffers ---------------------------------------------------------

    /// The next used entry, if there is one. Panics if the device returned what it never had.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let entry = self.at.used + 4 + USED_ELEMENT_SIZE * slot;
        let (id, len) = (self.mem.load_u32(entry), self.mem.load_u32(entry + 4));
        assert!(id < u32::from(self.size), "the used ring holds descriptor {id}, out of range");
        let head = id as u16;
        let chain = self.chains[usize::from(head)].take();
        let chain = chain.unwrap_or_else(|| {
            panic!("the used ring holds descriptor {head}, which the device does not have")
        });
        self.free.extend(chain);
        self.next_used = self.next_used.wrapping_add(1);
        Some(Used { head, len })
    }

    /// Asks for an interrupt once `more` further entries are used; true if they already are, in
    /// which case no interrupt may come.
    pub fn arm(&mut self, more: u16) -> bool {
        debug_assert!(more > 0);
        if self.event_idx {
            let event = self.next_used.wrapping_add(more - 1);
            self.mem.store_u16(self.used_event(), event, Ordering::Release);
        }
        // 2.7.7.1: the wish must be visible before the index is read again.
        fence(Ordering::SeqCst);
        self.used_idx().wrapping_sub(self.next_used) >= more
    }

    /// Interrupts on demand (the default), or a driver that polls and wants none.
    pub fn set_polling(&mut self, polling: bool) {
        self.polling = polling;
        if self.event_idx {
            // An event behind the present is reached only after the index has wrapped.
            let event = self.next_used.wrapping_sub(u16::from(polling));
            self.mem.store_u16(self.used_event(), event, Ordering::Release);
        } else {
            let flags = if polling { AVAIL_F_NO_INTERRUPT } else { 0 };
            self.mem.store_u16(self.at.avail, flags, Ordering::Release);
        }
        fence(Ordering::SeqCst);
    }

    pub fn is_polling(&self) -> bool {
        self.polling
    }

    fn used_event(&self) -> u64 {
        self.at.avail + 4 + 2 * u64::from(self.size)
    }
}

fn linked(desc: &Desc, next: Option<u16>) -> RawDesc {
    let write = if desc.writable { DESC_F_WRITE } else { 0 };
    let link = if next.is_some() { DESC_F_NEXT } else { 0 };
    RawDesc {
        address: desc.address,
        len: desc.len,
        flags: write | link,
        next: next.unwrap_or_default(),
    }
}

/// The bytes of an indirect table that holds `chain` in order.
pub fn indirect_table(chain: &[Desc]) -> Vec<u8> {
    let last = chain.len() - 1;
    let entry = |(position, desc): (usize, &Desc)| {
        let next = (position < last).then_some(position as u16 + 1);
        linked(desc, next).to_bytes()
    };
    chain.iter().enumerate().flat_map(entry).collect()
}

/// 2.7.7.2: does going from `old` to `new` pass the event index?
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
