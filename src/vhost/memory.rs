//! The guest's memory as the front end describes it (vhost-user SET_MEM_TABLE, ADD_MEM_REG,
//! REM_MEM_REG).

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Memory of one guest, mapped.
pub(super) type GuestMemory = GuestMemoryMmap<()>;

/// Most regions that we map. More than any guest has; a front end is told when it asks.
pub(super) const MAX_SLOTS: u64 = 509;

/// Maps a part of a file that the front end gave us.
///
/// # Errors
/// If it cannot be mapped, or the file does not reach so far: touching what is behind its end would kill us. (A front
/// end that makes it shorter later can do that still: it is trusted not to, as it could kill its guest as well.)
pub(super) fn map(file: File, offset: u64, size: u64) -> io::Result<MmapRegion<()>> {
    let metadata = file.metadata()?;
    let end = offset.checked_add(size);
    if metadata.is_file() && end.is_none_or(|end| end > metadata.len()) {
        return Err(io::Error::other("a memory region reaches behind the end of its file"));
    }
    let size = usize::try_from(size).map_err(io::Error::other)?;
    MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)
}

/// The regions that are mapped now, and how the front end addresses them.
#[derive(Default)]
pub(super) struct Regions {
    regions: Vec<Region>,
}

struct Region {
    guest_address: u64,
    size: u64,
    /// Where the region lies in the front end's own address space; rings are named by these.
    user_address: u64,
    mapping: Arc<GuestRegionMmap<()>>,
}

impl Regions {
    /// Maps a region.
    ///
    /// # Errors
    /// If it cannot be mapped, overlaps another, or there are too many.
    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> io::Result<()> {
        let (start, size) = (region.guest_phys_addr, region.memory_size);
        let wrong = |what: &str| {
            io::Error::other(format!("memory region of {size:#x} bytes at {start:#x}: {what}"))
        };
        if self.regions.len() as u64 >= MAX_SLOTS {
            return Err(wrong(&format!("there are {MAX_SLOTS} already")));
        }
        let end = start.saturating_add(size);
        let overlaps =
            |r: &Region| r.guest_address < end && start - r.guest_address.min(start) < r.size;
        if let Some(other) = self.regions.iter().find(|r| overlaps(r)) {
            let (size, start) = (other.size, other.guest_address);
            return Err(wrong(&format!("overlaps that of {size:#x} bytes at {start:#x}")));
        }
        let mapped = map(file, region.mmap_offset, size).map_err(|e| wrong(&e.to_string()))?;
        let mapping = GuestRegionMmap::new(mapped, GuestAddress(start))
            .ok_or_else(|| wrong("beyond the end of the address space"))?;
        let region = Region {
            guest_address: region.guest_phys_addr,
            size: region.memory_size,
            user_address: region.user_addr,
            mapping: Arc::new(mapping),
        };
        self.regions.push(region);
        self.regions.sort_by_key(|r| r.guest_address);
        Ok(())
    }

    /// Forgets the region that begins at this guest address and is this long.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn remove(&mut self, guest_address: u64, size: u64) -> io::Result<()> {
        let before = self.regions.len();
        self.regions.retain(|r| (r.guest_address, r.size) != (guest_address, size));
        if self.regions.len() == before {
            let what = format!("there is no region of {size:#x} bytes at {guest_address:#x}");
            return Err(io::Error::other(what));
        }
        Ok(())
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The guest's memory as one.
    pub(super) fn memory(&self) -> Arc<GuestMemory> {
        let all = self.regions.iter().map(|r| Arc::clone(&r.mapping)).collect();
        // It is refused only if there is none: they are in order and do not overlap.
        Arc::new(GuestMemory::from_arc_regions(all).unwrap_or_default())
    }

    /// The guest-physical address of a front end's address.
    pub(super) fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|r| {
            let offset = user_address.checked_sub(r.user_address)?;
            (offset < r.size).then(|| r.guest_address.checked_add(offset).map(GuestAddress))?
        })
    }
}
