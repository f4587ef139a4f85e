//! FIEMAP: which parts of a file have space on the disk, and which of it was never written.
//!
//! Asked without FIEMAP_FLAG_SYNC, so that a query never flushes anything. The price is that a fresh
//! write into an unwritten extent may still be called unwritten; [`super::extents`] knows.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// A part of a file that has space on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    /// First byte.
    pub start: u64,
    /// First byte behind it.
    pub end: u64,
    /// Reserved, not written as far as the disk knows.
    pub unwritten: bool,
}

/// Most extents asked for in one call.
pub(super) const BATCH: usize = 24;

/// `struct fiemap` (linux/fiemap.h) with room for a batch.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x0800;

/// The size in the request number is that of the header alone.
const FS_IOC_FIEMAP: libc::c_ulong =
    nix::request_code_readwrite!(b'f', 11, std::mem::offset_of!(Request, extents));

/// The first extents (at most `max`, at most [`BATCH`]) that overlap `range`, in order.
///
/// # Errors
/// What the host says; EOPNOTSUPP where the file system has no FIEMAP.
pub(super) fn mapped(file: &File, range: Range<u64>, max: usize) -> io::Result<Vec<Mapped>> {
    let none = RawExtent {
        logical: 0,
        physical: 0,
        length: 0,
        reserved64: [0; 2],
        flags: 0,
        reserved: [0; 3],
    };
    let mut request = Box::new(Request {
        start: range.start,
        length: range.end.saturating_sub(range.start),
        flags: 0,
        mapped_extents: 0,
        extent_count: u32::try_from(max.clamp(1, BATCH)).unwrap_or(1),
        reserved: 0,
        extents: [none; BATCH],
    });
    // SAFETY: the kernel fills at most `extent_count` extents behind the header, and there is room
    // for BATCH of them.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &mut *request) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = (request.mapped_extents as usize).min(BATCH);
    let extents = request.extents.iter().take(count);
    Ok(extents
        .map(|e| Mapped {
            start: e.logical,
            end: e.logical.saturating_add(e.length),
            unwritten: e.flags & FIEMAP_EXTENT_UNWRITTEN != 0,
        })
        .collect())
}
