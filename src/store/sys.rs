//! The system calls that no safe library wraps the way we need them: transfers straight from and to
//! [`Buffers`], and what only the kernel knows of a file.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, MSDOS_SUPER_MAGIC};

use super::{Buffers, Space};

/// Longest iovec that the kernel takes in one call (IOV_MAX).
pub(super) const MAX_SEGMENTS: usize = 1024;

/// A transfer of one segment by the bare system call. The C library's functions are points at which a thread can be
/// cancelled, which costs some thirty instructions to prepare for; ours never are.
///
/// # Safety
/// The iovec describes memory that stays mapped for the transfer.
unsafe fn one(call: libc::c_long, file: &File, iov: *const libc::iovec, offset: i64) -> isize {
    // SAFETY: as the caller says; the descriptor is open as long as the file is.
    let done =
        unsafe { libc::syscall(call, file.as_raw_fd(), (*iov).iov_base, (*iov).iov_len, offset) };
    isize::try_from(done).unwrap_or(-1)
}

/// A transfer of several segments that fails rather than waits for a device or a lock (RWF_NOWAIT), as bare.
///
/// # Safety
/// The iovec describes memory that stays mapped for the transfer.
unsafe fn now(
    call: libc::c_long,
    file: &File,
    iov: *const libc::iovec,
    count: libc::c_int,
    offset: i64,
) -> isize {
    let flags = libc::RWF_NOWAIT;
    // SAFETY: as above. The offset is one number on machines of 64 bits, and what comes after it is not looked at.
    let done = unsafe { libc::syscall(call, file.as_raw_fd(), iov, count, offset, 0, flags) };
    isize::try_from(done).unwrap_or(-1)
}

/// One `preadv(2)` into the segments of `into` from byte `skip` of the list on; may be short. A single segment
/// goes by `pread(2)`, which is some 50 ns cheaper.
pub(super) fn read(file: &File, offset: u64, into: &Buffers, skip: usize) -> io::Result<usize> {
    with_segments(into, skip, offset, |iov, count, offset| match count {
        // SAFETY: the one iovec describes memory that `into` keeps mapped for writing.
        1 => unsafe { one(libc::SYS_pread64, file, iov, offset) },
        // SAFETY: as above, for all of them.
        _ => unsafe { libc::preadv(file.as_raw_fd(), iov, count, offset) },
    })
}

/// One `preadv2(2)` that fails rather than waits for a device (RWF_NOWAIT); may be short.
pub(super) fn read_now(file: &File, offset: u64, into: &Buffers) -> io::Result<usize> {
    with_segments(into, 0, offset, |iov, count, offset| {
        // SAFETY: the iovec describes memory that `into` keeps mapped for writing.
        unsafe { now(libc::SYS_preadv2, file, iov, count, offset) }
    })
}

/// Whether the kernel knows of transfers of this file that do not wait (RWF_NOWAIT); asked for a read of its first
/// bytes, `align` of them, which is not made if it would have to wait.
pub(super) fn has_nowait(file: &File, align: u64) -> bool {
    let len = usize::try_from(align.max(512)).unwrap_or(4096);
    let Some(room) = Buffers::zeroed(len) else { return false };
    match read_now(file, 0, &room) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() == Some(libc::EAGAIN),
    }
}

/// One `pwritev2(2)` that fails rather than waits for a device or a lock; may be short.
pub(super) fn write_now(file: &File, offset: u64, from: &Buffers) -> io::Result<usize> {
    with_segments(from, 0, offset, |iov, count, offset| {
        // SAFETY: the iovec describes memory that `from` keeps mapped for reading.
        unsafe { now(libc::SYS_pwritev2, file, iov, count, offset) }
    })
}

/// One `pwritev2(2)` from the segments of `from`, starting at byte `skip` of the list; may be short.
pub(super) fn write(file: &File, offset: u64, from: &Buffers, skip: usize) -> io::Result<usize> {
    with_segments(from, skip, offset, |iov, count, offset| match count {
        // SAFETY: the one iovec describes memory that `from` keeps mapped for reading.
        1 => unsafe { one(libc::SYS_pwrite64, file, iov, offset) },
        // SAFETY: as above, for all of them.
        _ => unsafe { libc::pwritev2(file.as_raw_fd(), iov, count, offset, 0) },
    })
}

/// One `pwritev2(2)` that the device makes whole or not at all, whatever happens (RWF_ATOMIC). Only for one segment, and
/// for what the device and the file system have it for.
pub(super) fn write_torn_free(file: &File, offset: u64, from: &Buffers) -> io::Result<()> {
    let flags = libc::RWF_ATOMIC;
    let written = with_segments(from, 0, offset, |iov, count, offset| match count {
        // SAFETY: the iovec describes memory that `from` keeps mapped for reading.
        1 => unsafe { libc::pwritev2(file.as_raw_fd(), iov, count, offset, flags) },
        _ => -1,
    })?;
    if written == from.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Takes space for a range, so that a write to it has room.
pub(super) fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let (at, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, at, len) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Has the host begin to write back the folio that a byte lies in, if there is anything to write. It does not wait, and so
/// takes no error that a flush is to tell of.
pub(super) fn begin_writeback(file: &File, at: u64) {
    let Ok(at) = libc::off64_t::try_from(at) else { return };
    // SAFETY: plain numbers. Where it fails, nothing is lost but an answer that is more exact.
    unsafe { libc::sync_file_range(file.as_raw_fd(), at, 1, libc::SYNC_FILE_RANGE_WRITE) };
}

/// File systems whose flushes do not mean what those of others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileSystem {
    /// ext4, ext3 or ext2: a flush may succeed that should not ([`journal_is_kept`]).
    Ext4,
    /// btrfs: a flush may fail for want of room for its log, and nothing is lost. The next one may have it.
    Btrfs,
    /// Any other.
    Other,
}

impl FileSystem {
    /// That of a file.
    pub(super) fn of(file: &File) -> Self {
        match nix::sys::statfs::fstatfs(file).map(|host| host.filesystem_type()) {
            Ok(nix::sys::statfs::EXT4_SUPER_MAGIC) => FileSystem::Ext4,
            Ok(nix::sys::statfs::BTRFS_SUPER_MAGIC) => FileSystem::Btrfs,
            _ => FileSystem::Other,
        }
    }
}

/// Whether the file system still has its journal, where that is not told by a flush: once ext4 could not commit a
/// transaction, a flush of what was in it has nothing to wait for and succeeds. The first step that needs the journal
/// notices, and says nothing; the next is refused.
pub(super) fn journal_is_kept(file: &File) -> io::Result<()> {
    touch(file)?;
    touch(file)
}

/// Sets the times of a file to now. Who may not do that is told nothing.
fn touch(file: &File) -> io::Result<()> {
    // SAFETY: without times there is nothing to read.
    match unsafe { libc::futimens(file.as_raw_fd(), std::ptr::null()) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error().raw_os_error() {
            Some(libc::EROFS | libc::EIO) => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        },
    }
}

/// What the page cache has of a range of a file, in pages (`struct cachestat`, linux/mman.h).
#[repr(C)]
#[derive(Default)]
pub(super) struct CacheStatus {
    /// All there are.
    pub cached: u64,
    /// That are to be written.
    pub dirty: u64,
    /// That are being written.
    pub under_way: u64,
    evicted: [u64; 2],
}

/// `cachestat(2)`, which has this number on every architecture (Linux 6.5).
pub const SYS_CACHESTAT: i64 = 451;

/// Asks what the page cache has of a range. It waits for nothing.
pub(super) fn cache_status(file: &File, range: &Range<u64>) -> io::Result<CacheStatus> {
    let asked = [range.start, range.end - range.start];
    let mut status = CacheStatus::default();
    // SAFETY: the kernel reads two numbers, and writes one `struct cachestat`, which has this size and layout.
    let done =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), asked.as_ptr(), &mut status, 0) };
    if done == 0 { Ok(status) } else { Err(io::Error::last_os_error()) }
}

/// Whether lseek takes what lies in the page cache over unwritten space for data, and a page stays dirty or under
/// write-back there until the space is marked as written: ext4 and XFS.
pub(super) fn seeks_in_cache(file: &File) -> bool {
    use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};
    let is = |kind: FsType| kind == EXT4_SUPER_MAGIC || kind == XFS_SUPER_MAGIC;
    fstatfs(file).is_ok_and(|host| is(host.filesystem_type()))
}

/// What the host has failed to write back of a file since this open file was asked the last time. It neither writes nor
/// waits for anything: no file has pages there.
pub(super) fn write_back_error(file: &File) -> io::Result<()> {
    const NOWHERE: libc::off64_t = 1 << 62;
    // SAFETY: plain numbers.
    let asked = unsafe {
        libc::sync_file_range(file.as_raw_fd(), NOWHERE, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
    };
    match (asked, io::Error::last_os_error()) {
        (0, _) => Ok(()),
        // No such call for this file: it tells nothing.
        (_, error)
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::ESPIPE)) =>
        {
            Ok(())
        }
        (_, error) => Err(error),
    }
}

/// Calls `f(iovec, count, offset + skip)` for what is left of `list` after `skip` bytes.
fn with_segments(
    list: &Buffers,
    skip: usize,
    offset: u64,
    f: impl FnOnce(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<usize> {
    let rest;
    let segments = if skip == 0 {
        list.iovecs()
    } else {
        rest = list.slice(skip, list.len());
        rest.iovecs()
    };
    let count = segments.len().min(MAX_SEGMENTS);
    let einval = || io::Error::from_raw_os_error(libc::EINVAL);
    let count = libc::c_int::try_from(count).map_err(|_| einval())?;
    let at = u64::try_from(skip).ok().and_then(|s| offset.checked_add(s));
    let at = at.and_then(|at| libc::off_t::try_from(at).ok()).ok_or_else(einval)?;
    usize::try_from(f(segments.as_ptr(), count, at)).map_err(|_| io::Error::last_os_error())
}

/// What O_DIRECT on this file demands: alignment of memory and of offsets, in bytes. `None` where
/// the kernel does not say (before 6.1, or a file system that keeps it to itself).
pub(super) fn direct_io_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: an all-zero statx is a valid value of this plain structure.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor; `stat` is written by the kernel.
    let status = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stat,
        )
    };
    let known = status == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    (known && stat.stx_dio_offset_align != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Space on the file system of `file` for whoever may not use the reserve, and space that the file
/// takes there, what is written but not yet allocated included.
pub(super) fn space(file: &File) -> io::Result<Space> {
    let host = nix::sys::statvfs::fstatvfs(file)?;
    Ok(Space {
        available: host.blocks_available().saturating_mul(host.fragment_size()),
        used: used(file)?,
    })
}

/// Whether `file` is in memory (tmpfs), where no transfer waits for a device.
pub(super) fn is_in_memory(file: &File) -> bool {
    let host = nix::sys::statfs::fstatfs(file);
    host.is_ok_and(|host| host.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

/// Whether who shares a part of an extent with `file` keeps all of that extent on the host: of those that share, XFS alone
/// counts the users of each block.
pub(super) fn shares_whole_extents(file: &File) -> bool {
    let host = nix::sys::statfs::fstatfs(file);
    host.is_ok_and(|host| host.filesystem_type() != nix::sys::statfs::XFS_SUPER_MAGIC)
}

/// Whether the number of an inode stays the same as long as the file is there, also over mounts: not where it is made up
/// for whoever looks.
pub(super) fn inodes_last(file: &File) -> bool {
    /// EXFAT_SUPER_MAGIC.
    const EXFAT: FsType = FsType(0x2011_bab0);
    let host = nix::sys::statfs::fstatfs(file).map(|host| host.filesystem_type());
    host.is_ok_and(|kind| ![FUSE_SUPER_MAGIC, MSDOS_SUPER_MAGIC, EXFAT].contains(&kind))
}

/// The generation of the file's inode, where the file system tells it (FS_IOC_GETVERSION).
pub(super) fn generation(file: &File) -> Option<u32> {
    let mut version = [0u32; 2];
    // SAFETY: the kernel writes one int, or one long where it believes the number of the call.
    unsafe { ioctl::getversion(file.as_raw_fd(), &mut version) }.ok()?;
    version.first().copied()
}

/// The flags of the file's inode (FS_IOC_GETFLAGS).
pub(super) fn flags(file: &File) -> io::Result<u32> {
    let mut flags = [0u32; 2];
    // SAFETY: the kernel writes one int, or one long where it believes the number of the call.
    unsafe { ioctl::getflags(file.as_raw_fd(), &mut flags) }?;
    Ok(flags.first().copied().unwrap_or(0))
}

/// Sets them (FS_IOC_SETFLAGS).
pub(super) fn set_flags(file: &File, flags: u32) -> io::Result<()> {
    // SAFETY: the kernel reads one int, or one long where it believes the number of the call.
    unsafe { ioctl::setflags(file.as_raw_fd(), &[flags, 0]) }?;
    Ok(())
}

/// `struct fsxattr` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
pub(super) struct ExtendedFlags {
    pub flags: u32,
    /// Bytes that are taken at a time.
    pub extent_size: u32,
    rest: [u32; 5],
}

/// The flags of the file's inode that are none of those (FS_IOC_FSGETXATTR).
pub(super) fn extended_flags(file: &File) -> io::Result<ExtendedFlags> {
    let mut all = ExtendedFlags::default();
    // SAFETY: the kernel writes one `struct fsxattr`, which has this size and layout.
    unsafe { ioctl::fsgetxattr(file.as_raw_fd(), &mut all) }?;
    Ok(all)
}

/// Sets them (FS_IOC_FSSETXATTR).
pub(super) fn set_extended_flags(file: &File, all: &ExtendedFlags) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct fsxattr`, which has this size and layout.
    unsafe { ioctl::fssetxattr(file.as_raw_fd(), all) }?;
    Ok(())
}

/// Bytes that `file` takes on its file system.
pub(super) fn used(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks().saturating_mul(512))
}

/// Whether a block device gives space back when it is asked to (queue/discard_max_bytes).
pub(super) fn discards(file: &File) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    let number = metadata.rdev();
    let device = format!(
        "/sys/dev/block/{}:{}",
        nix::sys::stat::major(number),
        nix::sys::stat::minor(number)
    );
    // A partition has its queue one level up.
    ["queue", "../queue"].iter().any(|queue| {
        let limit = std::fs::read_to_string(format!("{device}/{queue}/discard_max_bytes"));
        limit.is_ok_and(|limit| limit.trim() != "0")
    })
}

/// Shares `len` bytes from `source` of `from` with `to` at `at` (FICLONERANGE).
pub(super) fn reflink(from: &File, source: u64, to: &File, at: u64, len: u64) -> io::Result<()> {
    let range = FileCloneRange { from: i64::from(from.as_raw_fd()), source, len, at };
    // SAFETY: the kernel reads one `struct file_clone_range`, which has this size and layout.
    unsafe { ioctl::ficlonerange(to.as_raw_fd(), &range) }?;
    Ok(())
}

/// `struct file_clone_range` (linux/fs.h).
#[repr(C)]
pub(super) struct FileCloneRange {
    from: i64,
    source: u64,
    len: u64,
    at: u64,
}

/// What a loop device says about the file behind it.
pub(super) struct LoopStatus {
    /// `st_dev` of the file.
    pub device: u64,
    /// `st_ino` of the file.
    pub inode: u64,
    /// First byte of the file that belongs to the device.
    pub offset: u64,
}

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
#[derive(Default)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    numbers: [u32; 4],
    // Names and keys, 64 + 64 + 32 + 16 bytes, which we do not look at.
    rest: [u64; 22],
}

/// Asks a block device for its loop status (LOOP_GET_STATUS64).
pub(super) fn loop_status(file: &File) -> io::Result<LoopStatus> {
    let mut info = LoopInfo64::default();
    // SAFETY: the kernel writes one `struct loop_info64`, which has this size and layout.
    unsafe { ioctl::loop_get_status64(file.as_raw_fd(), &mut info) }?;
    Ok(LoopStatus { device: info.device, inode: info.inode, offset: info.offset })
}

mod ioctl {
    nix::ioctl_read_bad!(loop_get_status64, 0x4c05, super::LoopInfo64);
    nix::ioctl_write_ptr!(ficlonerange, 0x94, 13, super::FileCloneRange);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read!(getversion, b'v', 1, [u32; 2]);
    nix::ioctl_read!(getflags, b'f', 1, [u32; 2]);
    nix::ioctl_write_ptr!(setflags, b'f', 2, [u32; 2]);
    nix::ioctl_read!(fsgetxattr, b'X', 31, super::ExtendedFlags);
    nix::ioctl_write_ptr!(fssetxattr, b'X', 32, super::ExtendedFlags);
    nix::ioctl_read_bad!(blksszget, 0x1268, libc::c_int);
}

/// Size of a block device in bytes (BLKGETSIZE64).
pub(super) fn block_device_size(file: &File) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the kernel writes one u64.
    unsafe { ioctl::blkgetsize64(file.as_raw_fd(), &mut bytes) }?;
    Ok(bytes)
}

/// Logical block size of a block device in bytes (BLKSSZGET).
pub(super) fn block_device_block(file: &File) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    unsafe { ioctl::blksszget(file.as_raw_fd(), &mut bytes) }?;
    u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
