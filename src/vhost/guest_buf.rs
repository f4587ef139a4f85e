//! From descriptor chains to [`Buffers`]: guest memory in place, without copies.
#![allow(unsafe_code)]

use std::any::Any;
use std::mem::offset_of;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use zerocopy::FromBytes;

use super::dirty_log::DirtyLog;
use super::memory::GuestMemory;
use super::split_ring::{DESCRIPTOR_SIZE, Descriptor, DescriptorTable, SplitRing, read_once};
use super::wire::{CommandHeader, CommandResponse};
use crate::scsi::lun;
use crate::store::Buffers;

/// Most descriptors of a chain that we follow. The standard's bound is the queue size; QEMU's own
/// devices allow this many.
const MAX_DESCRIPTORS: usize = 1024;

/// Most bytes that are written to a chain: a response, and the data of one command.
const MAX_WRITTEN: u64 = lun::MAX_TRANSFER + 4096;

/// A request as the driver laid it out: what the device reads, and what it writes.
#[derive(Debug)]
pub(super) struct Chain {
    /// Names the chain in the used ring.
    pub head: u16,
    /// Driver's part.
    pub readable: Buffers,
    /// Device's part.
    pub writable: Buffers,
}

/// A command as the driver laid it out (VIRTIO 1.3 5.6.6.1): a header and data-out for the device to read, a response
/// and data-in for it to write.
#[derive(Debug)]
pub(super) struct CommandChain {
    /// Names the chain in the used ring.
    pub head: u16,
    /// The header, as much of it as there is.
    pub header: Part,
    /// Room for a response.
    pub response: Part,
    /// What comes behind the header.
    pub data_out: Buffers,
    /// What comes behind the response.
    pub data_in: Buffers,
    /// It was taken before, by a process that has ended without an answer.
    pub again: bool,
}

/// A part of a command that has a fixed length.
#[derive(Debug)]
pub(super) enum Part {
    /// Nothing.
    Nothing,
    /// All of it in one piece, as nearly always, at this guest address. Nothing is held for it: it is looked up again
    /// when it is read or written.
    Whole(u64),
    /// As much of it as there is, in several pieces.
    Pieces(Box<Buffers>),
}

/// A part that is looked for.
struct Wanted {
    part: Part,
    /// Bytes of it that are still to come.
    missing: usize,
}

impl Wanted {
    fn new(len: usize) -> Self {
        Wanted { part: Part::Nothing, missing: len }
    }
}

/// Makes chains of descriptors. Each queue has one of its own, so that counting references touches no
/// memory that queues share.
pub(super) struct Chains {
    memory: Arc<GuestMemory>,
    /// What in-flight buffers hold to keep guest memory mapped.
    owner: Arc<dyn Any + Send + Sync>,
    /// The region that was last found: most buffers lie in the same.
    near: Near,
    /// A copy of the indirect table that is looked at, if that lies across regions.
    copied: Vec<u8>,
    framing: Framing,
}

/// What a driver may make of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// Any bytes in any descriptor (VIRTIO 1.3 2.7.4.1).
    Any,
    /// Header and response in a descriptor each, and data in others: a legacy driver without ANY_LAYOUT (VIRTIO 1.3
    /// 5.6.6.4). Old firmware makes these descriptors longer than what is in them.
    Legacy,
}

/// A region of guest memory, by guest addresses, and where it is mapped.
struct Near {
    start: u64,
    end: u64,
    host: *mut u8,
}

// SAFETY: the pointer is only handed on, into buffers whose owner keeps the memory mapped.
unsafe impl Send for Near {}

impl Chains {
    /// Chains in this memory.
    pub(super) fn new(memory: &Arc<GuestMemory>, framing: Framing) -> Self {
        Chains {
            memory: Arc::clone(memory),
            owner: Arc::new(Arc::clone(memory)),
            near: Near { start: 0, end: 0, host: std::ptr::null_mut() },
            copied: Vec::new(),
            framing,
        }
    }

    /// Looks from now on in other memory.
    pub(super) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        *self = Chains::new(memory, self.framing);
    }

    /// The chain that begins at descriptor `head`.
    ///
    /// # Errors
    /// What is wrong with a chain that breaks the rules: it cannot be answered, only given back.
    pub(super) fn resolve(&mut self, ring: &SplitRing, head: u16) -> Result<Chain, &'static str> {
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        self.walk(ring, head, |chains, descriptor| {
            let list = match descriptor.is_writable() {
                true => &mut writable,
                // VIRTIO 1.3 2.7.4.2: all device-readable descriptors come first.
                false if !writable.is_empty() => return Err("readable after writable descriptor"),
                false => &mut readable,
            };
            let (address, len) = (descriptor.address, descriptor.len);
            chains.append(address, len as usize, list).ok_or("descriptor outside guest memory")
        })?;
        Ok(Chain { head, readable, writable })
    }

    /// The command whose chain begins at descriptor `head`; `again` says whether it was taken before. Its header and
    /// response are on their way to this processor when it returns.
    ///
    /// # Errors
    /// As [`Chains::resolve`]; and if there is no room for a response.
    #[inline(always)]
    pub(super) fn resolve_command(
        &mut self,
        ring: &SplitRing,
        head: u16,
        again: bool,
    ) -> Result<CommandChain, &'static str> {
        let mut header = Wanted::new(size_of::<CommandHeader>());
        let mut response = Wanted::new(size_of::<CommandResponse>());
        let (mut data_out, mut data_in) = (Buffers::default(), Buffers::default());
        self.walk(ring, head, |chains, descriptor| {
            let (wanted, data) = match descriptor.is_writable() {
                true => (&mut response, &mut data_in),
                // VIRTIO 1.3 2.7.4.2, as above.
                false if !matches!(response.part, Part::Nothing) => {
                    return Err("readable after writable descriptor");
                }
                false => (&mut header, &mut data_out),
            };
            let (address, len) = (descriptor.address, descriptor.len);
            chains.share_out(address, len, wanted, data).ok_or("descriptor outside guest memory")
        })?;
        if response.missing > 0 {
            return Err("no room for a response");
        }
        let (header, response) = (header.part, response.part);
        Ok(CommandChain { head, header, response, data_out, data_in, again })
    }

    /// Gives the first bytes of a range to the part that is wanted, the rest to the data.
    #[inline]
    fn share_out(
        &mut self,
        address: u64,
        len: u32,
        wanted: &mut Wanted,
        data: &mut Buffers,
    ) -> Option<()> {
        let taken = wanted.missing.min(len as usize);
        let mut rest = len as usize - taken;
        if taken > 0 {
            if rest > 0 && self.framing == Framing::Legacy && matches!(wanted.part, Part::Nothing) {
                // All of it, and padding.
                rest = 0;
            }
            wanted.missing -= taken;
            let whole = wanted.missing == 0 && matches!(wanted.part, Part::Nothing);
            match self.host(address, taken as u64).filter(|_| whole) {
                Some(host) => {
                    fetch(host, taken);
                    wanted.part = Part::Whole(address);
                }
                None => self.add_piece(address, taken, wanted)?,
            }
        }
        match rest {
            0 => Some(()),
            _ => self.append(address.checked_add(taken as u64)?, rest, data),
        }
    }

    #[cold]
    fn add_piece(&mut self, address: u64, len: usize, wanted: &mut Wanted) -> Option<()> {
        let mut pieces = match std::mem::replace(&mut wanted.part, Part::Nothing) {
            Part::Pieces(pieces) => pieces,
            Part::Nothing | Part::Whole(_) => Box::default(),
        };
        self.append(address, len, &mut pieces)?;
        wanted.part = Part::Pieces(pieces);
        Some(())
    }

    /// The header of a command; `None` if there is less of it.
    #[inline(always)]
    pub(super) fn header(&mut self, part: &Part) -> Option<CommandHeader> {
        match part {
            Part::Nothing => None,
            Part::Whole(address) => {
                let host = self.host(*address, size_of::<CommandHeader>() as u64)?;
                // SAFETY: `host` has found as many bytes.
                Some(unsafe { read_header(host) })
            }
            Part::Pieces(pieces) => {
                let bytes = pieces.to_vec(size_of::<CommandHeader>());
                CommandHeader::read_from_bytes(&bytes).ok()
            }
        }
    }

    /// Copies into a part; returns the number of bytes. In one piece it is written to where the driver's memory is
    /// now: nothing is written while that is away.
    #[inline]
    pub(super) fn write(&mut self, part: &Part, from: &[u8]) -> usize {
        match part {
            Part::Nothing => 0,
            Part::Whole(address) => match self.host(*address, from.len() as u64) {
                Some(host) => {
                    // SAFETY: `host` has found as many bytes; Rust references to guest memory do not exist.
                    unsafe { host.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
                    from.len()
                }
                None => 0,
            },
            Part::Pieces(pieces) => pieces.write_at(0, from),
        }
    }

    /// Marks what a chain, which is answered now, lets the device write to. The driver may have changed it since it
    /// was taken: then it has spoilt its own log.
    pub(super) fn mark_written(&mut self, ring: &SplitRing, head: u16, log: &DirtyLog) {
        let mut left = MAX_WRITTEN;
        let _ = self.walk(ring, head, |_, descriptor| {
            if descriptor.is_writable() {
                let len = left.min(descriptor.len.into());
                log.mark(descriptor.address, len);
                left -= len;
            }
            Ok(())
        });
    }

    /// Goes through the descriptors of a chain.
    fn walk(
        &mut self,
        ring: &SplitRing,
        head: u16,
        mut each: impl FnMut(&mut Self, &Descriptor) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        let mut table = ring.descriptors();
        let mut descriptor = table.get(head).ok_or("no such descriptor")?;
        let mut left = table.len();
        let mut indirect = false;
        loop {
            if descriptor.is_indirect() {
                // VIRTIO 1.3 2.7.5.3.2: by itself, or behind others as the last.
                if std::mem::replace(&mut indirect, true) {
                    return Err("indirect descriptor in an indirect table");
                }
                table = self.indirect(&descriptor)?;
                left = table.len();
                descriptor = table.get(0).ok_or("empty indirect table")?;
                continue;
            }
            each(self, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            left -= 1;
            if left == 0 {
                return Err("chain without an end");
            }
            descriptor = table.get(descriptor.next).ok_or("descriptor outside its table")?;
        }
    }

    /// The table that a descriptor refers to: where it lies, or a copy if it lies in several places. It is there until
    /// the next one is looked for.
    fn indirect(&mut self, descriptor: &Descriptor) -> Result<DescriptorTable, &'static str> {
        let len = descriptor.len as usize;
        if descriptor.has_next() {
            return Err("indirect descriptor with another behind it");
        }
        let entries = len / DESCRIPTOR_SIZE;
        if !len.is_multiple_of(DESCRIPTOR_SIZE) || !(1..=MAX_DESCRIPTORS).contains(&entries) {
            return Err("indirect table of a wrong length");
        }
        let address = descriptor.address;
        let host = match self.host(address, len as u64) {
            Some(host) => host.cast_const(),
            None => self.copy_table(address, len)?,
        };
        // SAFETY: `host` has found as many bytes, in memory that `self` keeps mapped; or it is our own copy.
        Ok(unsafe { DescriptorTable::new(host, entries) })
    }

    #[cold]
    fn copy_table(&mut self, address: u64, len: usize) -> Result<*const u8, &'static str> {
        self.copied.resize(len, 0);
        let read = self.memory.read_slice(&mut self.copied, GuestAddress(address));
        read.map_err(|_| "indirect table outside guest memory")?;
        Ok(self.copied.as_ptr())
    }

    /// Adds the pieces of a guest-physical range; `None` if part of it is not memory.
    fn append(&mut self, address: u64, len: usize, list: &mut Buffers) -> Option<()> {
        if list.is_empty() {
            *list = Buffers::of(Arc::clone(&self.owner));
        }
        if let Some(host) = self.host(address, len as u64) {
            // SAFETY: the list's owner keeps it mapped; Rust references to guest memory do not exist.
            unsafe { list.push(host, len) };
            return Some(());
        }
        for slice in self.memory.get_slices(GuestAddress(address), len) {
            let slice = slice.ok()?;
            // SAFETY: as above.
            unsafe { list.push(slice.ptr_guard_mut().as_ptr(), slice.len()) };
        }
        Some(())
    }

    /// Where a range lies on the host, if one region holds all of it.
    #[inline]
    fn host(&mut self, address: u64, len: u64) -> Option<*mut u8> {
        let end = address.checked_add(len)?;
        if address < self.near.start || end > self.near.end {
            self.find(address);
        }
        let inside = address >= self.near.start && end <= self.near.end;
        let offset = usize::try_from(address.checked_sub(self.near.start)?).ok()?;
        // SAFETY: inside the region, whose mapping is one object.
        inside.then(|| unsafe { self.near.host.add(offset) })
    }

    #[cold]
    fn find(&mut self, address: u64) {
        if let Some(region) = self.memory.find_region(GuestAddress(address)) {
            let start = region.start_addr().0;
            let end = start.saturating_add(region.len());
            self.near = Near { start, end, host: region.as_ptr() };
        }
    }
}

/// A command's header: in words, each of which goes straight to where it is used.
///
/// # Safety
/// There must be as many mapped bytes.
#[inline]
unsafe fn read_header(host: *const u8) -> CommandHeader {
    // SAFETY: all of it lies inside the header.
    unsafe {
        let word = |at| read_once::<u64>(host.add(at));
        let cdb = offset_of!(CommandHeader, cdb);
        CommandHeader {
            lun: word(offset_of!(CommandHeader, lun)).to_ne_bytes(),
            tag: zerocopy::transmute!(word(offset_of!(CommandHeader, tag))),
            task_attribute: read_once(host.add(offset_of!(CommandHeader, task_attribute))),
            _priority: 0,
            _crn: 0,
            cdb: zerocopy::transmute!([word(cdb), word(cdb + 8), word(cdb + 16), word(cdb + 24)]),
        }
    }
}

/// Has the processor fetch `len` bytes, which another has written or will look at: a hint, which costs next to nothing
/// and never faults.
#[inline]
fn fetch(at: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for byte in [0, len.saturating_sub(1)] {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast_const().cast::<i8>().wrapping_add(byte)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}
