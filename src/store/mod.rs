//! Host bytes: what a disk's contents are kept in. No SCSI words live here.
//!
//! [`Store`] is the lower of the two waists of the program. Its methods block; the queues never
//! call them directly but hand an [`Operation`] and a [`Token`] to an [`engine::Engine`], which
//! completes operations in any order.

mod at_once;
mod beside;
pub mod budget;
pub mod buffers;
pub mod copy;
pub mod engine;
pub mod exclusion;
pub mod extents;
pub mod faults;
mod fiemap;
pub mod file;
pub mod host;
mod identity;
pub mod image_format;
pub mod journal;
pub mod lock;
mod loop_device;
pub mod mem;
pub mod notes;
pub mod pieces;
pub mod pool;
mod space;
pub mod sum;
mod sys;
mod trial;
mod write_back;

pub use buffers::Buffers;
pub use engine::{Completion, Engine, Operation, Token};
pub use exclusion::{Exclusion, Granted, Held, Hold, Mode, Wanted};
pub use extents::{Extent, Kind};
pub use host::Host;
pub use notes::Notes;
pub use pieces::Piece;
pub use pool::Pool;
pub use sys::SYS_CACHESTAT;
pub use write_back::WriteBack;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Where the bytes of one disk are kept.
///
/// All offsets and lengths are in bytes. The caller has checked them against the disk's capacity;
/// a store checks them only as far as memory safety needs it. Bytes beyond the end of a file that
/// is shorter than the disk read as zeroes, as a hole does.
pub trait Store: Send + Sync {
    /// What this very store can do, probed when it was opened.
    fn capabilities(&self) -> &Capabilities;

    /// Size now, in bytes. It can change while the disk is served (a file that grows).
    fn size(&self) -> Result<u64, StoreError>;

    /// Fills all of `into` from `offset` on.
    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError>;

    /// Like [`Store::read`], but what a flush has made stable is read from stable storage, as far as the host allows
    /// (FUA reads, VERIFY).
    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError>;

    /// Writes all of `from` at `offset`. With [`Durability::Stable`] the bytes survive a crash of
    /// the host when this returns.
    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError>;

    /// Writes `from` at `offset` as far as there is something to be overwritten: a file that ends before keeps its length.
    fn overwrite(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.write(offset, from, Durability::Cached)
    }

    /// Writes all of `from` at `offset`, or nothing: when the host crashes meanwhile, either all of it is there
    /// afterwards or what was there before. It survives a crash when this returns. For stores that can
    /// ([`Capabilities::whole_writes`]), and at most that many bytes.
    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError>;

    /// Makes every write that completed before the call survive a crash of the host. Once it could not, it
    /// fails for good, and so do stable writes: what was lost does not come back.
    fn flush(&self) -> Result<(), StoreError>;

    /// What is known of the host's write-back of it; `None` where nothing is written back.
    fn write_back(&self) -> Option<&Arc<WriteBack>> {
        None
    }

    /// Asks the host to read a range ahead. Best effort, and cheap.
    fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError>;

    /// What the bytes from `range.start` on are: extents that touch each other, at most `limit` of
    /// them. The list may end before the range does (there are more extents, or finding them would
    /// take too long), but is empty only if the range is. Bytes written before the call are never
    /// called anything but data, flushed or not.
    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError>;

    /// Makes a range read as zeroes and gives its space back, as far as the host can: a part of a
    /// host block keeps its space.
    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError>;

    /// Makes a range read as zeroes and keeps, or takes, space for it.
    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError>;

    /// Most bytes that one call should be about that makes them a hole, or reserved, as nothing ends it early: where the
    /// host has no better way than to write zeroes, it takes as long as its range is.
    fn zeroes_at_a_time(&self, _into: Kind) -> u64 {
        4 << 30
    }

    /// Does an operation if that is done at once: the host has the data in memory, or room for it.
    /// `None` if it would have to wait, or nobody can tell; then it is done another way, all of it.
    fn try_now(&self, _operation: &Operation) -> Option<Result<(), StoreError>> {
        None
    }

    /// The file by which the kernel can do an operation on its own, exactly as the store would, and what to
    /// let go of when that is over.
    fn ring_file(&self, _operation: &Operation) -> Option<(RingFile, Hold)> {
        None
    }

    /// Holds ranges together with others, if nobody has to be waited for. Nobody waits for anything but the host of this
    /// store while he holds some of it.
    fn hold_now(&self, _ranges: &[Range<u64>]) -> Option<Hold> {
        Some(Hold::FREE)
    }

    /// Holds ranges now, or has `granted` called with them when that can be, by whoever lets go of what is in the way.
    fn hold(&self, _mode: Mode, _ranges: &[Range<u64>], granted: Granted) -> Wanted {
        Wanted::Had(Hold::FREE, granted)
    }

    /// Ends the waiting of this number; `None` if it is over.
    fn stop_waiting(&self, _number: u64) -> Option<Granted> {
        None
    }

    /// Lets go of what was held.
    fn let_go(&self, _hold: Hold) {}

    /// The store in which whoever holds ranges waits for nobody, if it is not this one.
    fn behind(&self) -> Option<&dyn Store> {
        None
    }

    /// The file it is, if it is one and its blocks are what is read: for [`Store::take`] of another store, and not to be
    /// written.
    fn file(&self) -> Option<&File> {
        None
    }

    /// Takes over `len` bytes from byte `source` of a file, at byte `at`, by a way in which nobody has
    /// to read them; says how many bytes that were (at least one). `None` if that way does not exist
    /// between these two files, or has nothing to offer here.
    fn take(
        &self,
        _from: &File,
        _source: u64,
        _at: u64,
        _len: u64,
        _how: copy::Method,
    ) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }

    /// Ranges as they are now, whatever is written to them later, in a store of their own, and where
    /// in it each of them begins. `None` where that would take time and space. Before each step `go_on` is asked with the
    /// bytes of the ranges that are done; false ends it.
    ///
    /// # Errors
    /// What went wrong, on which side, and how far it came. A place is one in this store, where there is one.
    fn snapshot(
        &self,
        _ranges: &[Range<u64>],
        _go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>, copy::CopyError> {
        Ok(None)
    }

    /// How much space there is for it and how much it takes now; `None` where the host does not say.
    fn space(&self) -> Result<Option<Space>, StoreError>;

    /// What is remembered of it while nobody serves it.
    fn notes(&self) -> &Notes;

    /// Another process may have had it since it was opened, or since commands last came: a write that was cut off is made
    /// again, and the notes are what they are by now. Nobody else is at it from here on. Before anything is changed, `go_on`
    /// is asked whether it still shall be ([`Cause::Cancelled`] if not). [`Cause::Busy`] passes.
    fn take_over(&self, _go_on: &dyn Fn() -> bool) -> Result<(), StoreError> {
        Ok(())
    }

    /// The threads that run this store's blocking work; its own, so that a host file system that
    /// hangs stops nothing but the disks on it.
    fn pool(&self) -> &Pool;
}

/// A file for transfers that the kernel does on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFile {
    /// Its descriptor.
    pub fd: RawFd,
    /// A transfer that the kernel cannot begin at once comes back (RWF_NOWAIT). Otherwise threads of the kernel would
    /// wait with it, of which all files of a ring have the same few.
    pub comes_back: bool,
}

/// What [`Store::snapshot`] makes.
pub struct Snapshot {
    /// The bytes; gone with the last reference to it.
    pub store: Box<dyn Store>,
    /// Where in the store each range begins.
    pub starts: Vec<u64>,
    /// What it takes of a budget, given back after the bytes have gone.
    pub charge: Option<budget::Charge>,
}

/// Space on the host, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What can still be taken.
    pub available: u64,
    /// What is taken.
    pub used: u64,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it is visible to reads; a flush makes it survive a crash.
    Cached,
    /// When it survives a crash of the host.
    Stable,
}

/// What a store can do and how it likes to be used; sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Every write fails with [`Cause::ReadOnly`].
    pub read_only: bool,
    /// Smallest unit in which the host keeps data (file system block); a power of two.
    pub host_block: u32,
    /// [`Store::deallocate`] gives space back.
    pub deallocates: bool,
    /// [`Store::reserve`] is cheap, and [`Store::extents`] tells what it has reserved.
    pub reserves: bool,
    /// Most bytes of a [`Store::write_whole`]; 0 if it cannot be done.
    pub whole_writes: usize,
    /// [`Store::snapshot`] works.
    pub snapshots: bool,
    /// A snapshot of a part of an extent keeps all of it.
    pub shares_whole_extents: bool,
    /// Offsets and lengths of transfers must be multiples of this (1 without O_DIRECT).
    pub transfer_align: u32,
    /// It is not locked: another process may serve it before, after and beside this one.
    pub unlocked: bool,
    /// Everything is in memory: nothing that is done at once waits for anything.
    pub in_memory: bool,
    /// The device number of the file system it lies on (`st_dev`), or its own if it is a block device.
    pub device: u64,
    /// The host calls that were chosen, for the log.
    pub ways: String,
}

/// A failed operation: why, and the first byte that is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreError {
    /// Why.
    pub cause: Cause,
    /// Offset of the first byte that was not transferred, where one is known.
    pub at: Option<u64>,
    /// The host could not write back what was written before: that may be lost, whatever this operation was.
    pub lost: bool,
}

/// Why a host operation failed, in the classes that a caller can act upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The file system, a quota or a budget is full (ENOSPC, EDQUOT).
    NoSpace,
    /// The file or its file system cannot be written (EROFS, EPERM, EACCES, EBADF).
    ReadOnly,
    /// The data cannot be read or written (EIO and everything that is not known better).
    Medium,
    /// The host is short of memory or another resource right now (ENOMEM, EAGAIN, EMFILE, ENFILE).
    Busy,
    /// Withdrawn before it began, or stopped at a clean boundary, because somebody asked for it.
    Cancelled,
}

impl StoreError {
    /// An error at a byte offset.
    pub fn at(cause: Cause, offset: u64) -> Self {
        StoreError { cause, at: Some(offset), lost: false }
    }

    /// What was written before may be lost. Nobody knows where.
    pub fn lost(cause: Cause) -> Self {
        StoreError { cause, at: None, lost: true }
    }
}

impl From<Cause> for StoreError {
    fn from(cause: Cause) -> Self {
        StoreError { cause, at: None, lost: false }
    }
}

impl From<&io::Error> for Cause {
    fn from(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::OutOfMemory {
            return Cause::Busy;
        }
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Cause::NoSpace,
            Some(libc::EROFS | libc::EPERM | libc::EACCES | libc::EBADF) => Cause::ReadOnly,
            Some(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Cause::Busy,
            _ => Cause::Medium,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.cause {
            Cause::NoSpace => "no space left",
            Cause::ReadOnly => "cannot be written",
            Cause::Medium => "I/O error",
            Cause::Busy => "host out of resources",
            Cause::Cancelled => "cancelled",
        };
        match self.at {
            Some(at) => write!(f, "{what} at byte {at}"),
            None => f.write_str(what),
        }
    }
}
