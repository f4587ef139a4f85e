//! A disk in a regular file or on a block device.

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, copy_file_range, fcntl, posix_fadvise};

use super::at_once::AtOnce;
use super::beside::{self, Directory};
use super::copy::{self, CopyError, Holes, Method, Side};
use super::extents::{self, Cached, Host, Knowledge};
use super::fiemap::Mapped;
use super::identity::Identity;
use super::journal::{self, Journal};
use super::lock::{LockError, lock_image_soon};
use super::loop_device::BackingFile;
use super::space::{self, DEALLOCATE, Ladder, RESERVE};
use super::sys::FileSystem;
use super::trial::Verdict;
use super::{
    Buffers, Capabilities, Cause, Durability, Extent, Hold, Kind, Notes, Operation, Piece, Pool,
    RingFile, Snapshot, Space, Store, StoreError, WriteBack, notes, sys,
};
use crate::sandbox::{self, Role};

/// Threads that may block in one file at the same time.
const POOL_THREADS: usize = 16;

/// Longest transfer that is made at once, by the thread that has others to make, in bytes.
const MAX_AT_ONCE: usize = 128 << 10;

/// Bytes that are zeroed by one call, where that is a change of a few extents, and where zeroes may be written.
const ZEROES_MARKED: u64 = 4 << 30;
const ZEROES_WRITTEN: u64 = 16 << 20;

/// How a file is opened.
#[derive(Clone, Debug)]
pub struct OpenOptionsFor {
    /// Never write to it.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Smallest transfer there will be, in bytes; the size must be a multiple of it.
    pub block_size: u32,
    /// Keep other processes away from it, and stay away if there is one. Off for the other end of a migration,
    /// which opens the file while this end still has it.
    pub locking: bool,
}

/// What to make of the files that lie beside an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Surroundings {
    /// The image has just been made: nothing that lies there is about it.
    pub new: bool,
    /// What lies there is about the image, though it says that it is about another.
    pub adopt: bool,
    /// This process is about to give up its capabilities: what only they allow cannot be done later.
    pub confined: bool,
}

impl Surroundings {
    /// Does something with the privileges that there will be.
    fn within<T>(self, work: impl FnOnce() -> T) -> T {
        if self.confined { sandbox::without_capabilities(work) } else { work() }
    }
}

/// A regular file or a block device, open and locked.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    block_device: bool,
    /// Whether it is open with O_DIRECT.
    direct: bool,
    file_system: FileSystem,
    /// Whether transfers can be left to the kernel, which has no need of a thread for each (FMODE_NOWAIT): not on FUSE
    /// and NFS.
    in_ring: bool,
    capabilities: Capabilities,
    /// Alignment that O_DIRECT asks of memory, in bytes; 1 without it.
    memory_align: usize,
    /// How much it tells about its extents.
    knowledge: Knowledge,
    /// Who tells in its place, for a loop device.
    backing: Option<BackingFile>,
    at_once: AtOnce,
    write_back: Arc<WriteBack>,
    /// Cached zeroes over space that was not written are told from data, and dropped.
    forgets: bool,
    deallocate: Ladder,
    reserve: Ladder,
    /// What its host does as it says.
    verdict: Arc<Verdict>,
    notes: Notes,
    /// For writes that are whole or not begun, where something can be kept beside it: not where it is only read, nor
    /// beside a block device.
    journal: Option<Journal>,
    /// Where notes, the journal and unnamed files that share its blocks are made; a block device has none.
    directory: Option<Arc<Directory>>,
    identity: Identity,
    /// What lies beside it is about it, whatever it says.
    adopt: bool,
    pool: Pool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

/// What is kept beside an image.
const KEPT: [&str; 2] = [notes::SUFFIX, journal::SUFFIX];

/// Somebody else has come between the name and the file.
const CHANGED: &str = "changed while it was being opened; try again";

/// Why a file cannot be served: what, and what to do about it, without the path.
#[derive(Debug, PartialEq, Eq)]
pub struct OpenError(pub String);

impl From<String> for OpenError {
    fn from(message: String) -> Self {
        OpenError(message)
    }
}

impl From<&str> for OpenError {
    fn from(message: &str) -> Self {
        OpenError(message.to_owned())
    }
}

/// How much space a new file takes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provision {
    /// None: it is one hole.
    #[default]
    Thin,
    /// All of it, reserved and unwritten.
    Anchored,
    /// All of it, written with zeroes.
    Full,
}

/// Makes a file of `size` zero bytes where there is none yet.
///
/// # Errors
/// If there is a file of that name, or the host cannot make one; then nothing is left behind.
pub fn create(path: &Path, size: u64, provision: Provision) -> Result<(), OpenError> {
    let made = OpenOptions::new().write(true).create_new(true).open(path);
    let file = made.map_err(|e| format!("cannot create it: {}", plain(&e)))?;
    let filled = file.set_len(size).and_then(|()| match provision {
        Provision::Thin => Ok(()),
        Provision::Anchored => space::allocate_all(&file, size),
        Provision::Full => space::fill(&file, size, |percent| {
            log::info!("{}: {percent}% written", path.display());
        }),
    });
    filled.map_err(|e| {
        let _ = std::fs::remove_file(path);
        OpenError(format!("cannot make it {size} bytes long: {}", plain(&e)))
    })
}

impl FileStore {
    /// Opens and locks `path` and finds out what it can do.
    ///
    /// # Errors
    /// A sentence for people if it cannot be served as asked.
    pub fn open(path: &Path, options: &OpenOptionsFor) -> Result<Self, OpenError> {
        Self::open_among(path, options, Surroundings::default())
    }

    /// The same, with more to be said of what lies beside it.
    ///
    /// # Errors
    /// As there.
    pub fn open_among(
        path: &Path,
        options: &OpenOptionsFor,
        surroundings: Surroundings,
    ) -> Result<Self, OpenError> {
        let block_device = check_kind(path)?;
        let file = open_file(path, options)?;
        // The name may have been given to another file in between: believe the open file.
        let kind = file.metadata().map_err(|e| plain(&e))?.file_type();
        if !(kind.is_file() || (kind.is_block_device() && block_device)) {
            return Err(CHANGED.into());
        }
        let locked = match options.locking {
            true => lock_image_soon(&file, options.read_only),
            false => Ok(()),
        };
        locked.map_err(|e| match e {
            LockError::InUse => OpenError::from(
                "is in use by another process (QEMU, qemu-img or thinlun); stop that one, or open \
                 it readonly on both sides",
            ),
            LockError::Host(e) => format!("cannot be locked: {}", plain(&e)).into(),
        })?;
        let witness = witness(&file, path)?;
        let mut store = Self::assemble(file, path, block_device, options, surroundings)?;
        store.check_size(options.block_size)?;
        // Before anything is written: what failed before this start and was told to nobody is not to be taken for ours.
        let size = store.size_bytes().map_err(|e| plain(&e))?;
        let write_back = WriteBack::of(path.display().to_string(), size, Some(witness));
        store.write_back = Arc::new(match store.file_system {
            FileSystem::Btrfs => write_back.short_of_room(),
            FileSystem::Ext4 | FileSystem::Other => write_back,
        });
        store.forgets = !options.direct && !block_device && sys::seeks_in_cache(&store.file);
        store.write_back.look();
        // Nothing can be kept beside a device node: /dev is made anew by every boot.
        if !block_device {
            store.look_around(path, options, surroundings)?;
        }
        Ok(store)
    }

    /// Finds out what is kept beside the image, and whether anything can be.
    fn look_around(
        &mut self,
        path: &Path,
        options: &OpenOptionsFor,
        surroundings: Surroundings,
    ) -> Result<(), OpenError> {
        let real = real_name(path).map_err(|e| plain(&e))?;
        let directory = match &self.directory {
            Some(directory) => Arc::clone(directory),
            None => Directory::of(&real, &self.file)
                .map_err(|e| format!("its directory cannot be opened: {}", plain(&e)))?,
        };
        let (mut found, writes) = ([Vec::new(), Vec::new()], !options.read_only);
        if !surroundings.new {
            if let Some((stray, suffix)) = stray(path, &real, &self.identity) {
                return Err(format!(
                    "has another name than what is remembered of it, in {}: rename that to {}{suffix}",
                    stray.display(),
                    real.display()
                )
                .into());
            }
            found = surroundings
                .within(|| Self::look_beside(&directory))
                .map_err(|e| format!("what lies beside it: {}", plain(&e)))?
                .ok_or(CHANGED)?;
            if writes {
                make_names_last(&directory);
            }
        }
        let [noted, journaled] = found;
        let in_notes = |e: io::Error| {
            format!("what is remembered of it, in its {}: {}", notes::SUFFIX, plain(&e))
        };
        let in_journal = |e: io::Error| format!("its {}: {}", journal::SUFFIX, plain(&e));
        if !writes {
            self.notes.read(&self.identity, &noted, self.adopt).map_err(in_notes)?;
            self.with_image(|image| journal::look(&journaled, image).map(drop))
                .map_err(in_journal)?;
            return Ok(());
        }
        if let Some(why) = surroundings.within(|| cannot_be_kept(&directory)) {
            if !noted.is_empty() || !journaled.is_empty() {
                return Err(format!(
                    "something is remembered of it in its directory, which cannot be changed: {why}; make it writable \
                     for the user that this runs as"
                )
                .into());
            }
            log::warn!(
                "{}: nothing can be kept beside it ({why}): there is no WRITE ATOMIC, and saved mode pages, \
                 registrations, formats and what it is called are forgotten with this process",
                real.display()
            );
            return Ok(());
        }
        if self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 1) {
            log::warn!(
                "{}: has several names (hard links): what is kept beside this one is not found by another",
                real.display()
            );
        }
        // Only looked at: a process that has not locked the image may be serving it. Who takes it over makes it good.
        self.with_image(|image| journal::look(&journaled, image).map(drop)).map_err(in_journal)?;
        let kept = Journal::of(&directory, self.identity);
        self.notes = Notes::beside(&directory, self.identity);
        self.notes.read(&self.identity, &noted, self.adopt).map_err(in_notes)?;
        (self.journal, self.directory) = (Some(kept), Some(directory));
        self.capabilities.whole_writes = journal::MAX_BYTES;
        Ok(())
    }

    /// What lies beside the image: notes and the journal; nothing of what is not there. `None` if its name is another
    /// file's by now.
    fn look_beside(directory: &Arc<Directory>) -> io::Result<Option<[Vec<u8>; 2]>> {
        let found = directory.look(KEPT)?;
        let Some([noted, journaled]) = found else { return Ok(None) };
        let noted = beside::bytes_of(noted, notes::MAX_BYTES)?;
        Ok(Some([noted, beside::bytes_of(journaled, journal::MAX_FILE)?]))
    }

    /// The image, for a journal.
    fn with_image<T>(
        &self,
        work: impl FnOnce(&journal::Image<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let host = |error: StoreError| match error.cause {
            Cause::Busy => io::Error::from_raw_os_error(libc::EAGAIN),
            _ => io::Error::other(error.to_string()),
        };
        work(&journal::Image {
            identity: &self.identity,
            adopt: self.adopt,
            read_only: self.capabilities.read_only,
            size: self.size_bytes()?,
            // Of the medium, as another host may have written it.
            read: &|at, into| self.read_medium(at, into).map_err(host),
            write: &|at, from| self.write_stable(at, from).map_err(host),
        })
    }

    /// Opens `path` only to look at it: read-only, and without a lock, so that it may be in use.
    ///
    /// # Errors
    /// A sentence for people if it is no disk or cannot be read.
    pub fn inspect(path: &Path) -> Result<Self, OpenError> {
        let options =
            OpenOptionsFor { read_only: true, direct: false, block_size: 512, locking: false };
        if let Err(error) = path.metadata() {
            // Not the advice to create it that a disk to be served gets.
            let absent = error.kind() == ErrorKind::NotFound;
            return Err(if absent { "no such file".into() } else { plain(&error).into() });
        }
        let block_device = check_kind(path)?;
        let file = open_file(path, &options)?;
        Self::assemble(file, path, block_device, &options, Surroundings::default())
    }

    /// Finds out what an open file can do.
    fn assemble(
        file: File,
        path: &Path,
        block_device: bool,
        options: &OpenOptionsFor,
        surroundings: Surroundings,
    ) -> Result<Self, OpenError> {
        let (memory_align, transfer_align) =
            if options.direct { direct_alignment(&file, options.block_size)? } else { (1, 1) };
        let host_block = host_block(&file, block_device).map_err(|e| plain(&e))?;
        let backing = if block_device { BackingFile::of(&file) } else { None };
        let name = real_name(path).ok().filter(|_| !block_device);
        let folder = name.as_deref().and_then(Path::parent).filter(|_| !options.read_only);
        let verdict = match folder {
            Some(folder) => Verdict::of(&file, folder, host_block.into()),
            // Nothing is made beside what is only read.
            None => Arc::new(Verdict::untried(&file)),
        };
        let mut knowledge = match &backing {
            Some(backing) => backing.knowledge(),
            None => Knowledge::probe(&file, verdict.seek),
        };
        let (deallocate, reserve) = match block_device {
            true => (Ladder::from(DEALLOCATE, 0), Ladder::from(RESERVE, 0)),
            false => (
                Ladder::from(DEALLOCATE, verdict.deallocate),
                Ladder::from(RESERVE, verdict.reserve),
            ),
        };
        if !options.read_only && !block_device {
            // The image itself may be one of which no hole can be made: one is punched behind its end.
            let block = u64::from(host_block);
            let end = file.metadata().map_err(|e| plain(&e))?.len().next_multiple_of(block);
            deallocate.probe(&file, &(end..end + block));
        }
        // Nobody will reserve space of a disk that is only read: it is told of what there is.
        let reserves = !block_device && knowledge.fiemap && verdict.reserves;
        knowledge.reserved = reserves;
        let directory = name.and_then(|name| Directory::of(&name, &file).ok());
        let shares = |d| surroundings.within(|| shares_blocks(&file, d)).unwrap_or(false);
        let shares = directory.as_ref().is_some_and(shares);
        let identity = Identity::of(&file).map_err(|e| plain(&e))?;
        let capabilities = Capabilities {
            read_only: options.read_only,
            host_block,
            deallocates: match block_device {
                true => sys::discards(&file),
                false => deallocate.is_best(),
            },
            reserves,
            whole_writes: 0,
            // Nothing is made beside a disk that is only read.
            snapshots: shares && !options.read_only,
            shares_whole_extents: sys::shares_whole_extents(&file),
            transfer_align,
            unlocked: !options.locking,
            in_memory: !options.direct && sys::is_in_memory(&file),
            device: device(&file, block_device).map_err(|e| plain(&e))?,
            ways: format!(
                "extents={knowledge} unmap={} zero={} copy={}",
                deallocate.name(),
                reserve.name(),
                if shares { "reflink" } else { "bytes" }
            ),
        };
        let file_system = if block_device { FileSystem::Other } else { FileSystem::of(&file) };
        let in_ring = sys::has_nowait(&file, u64::from(transfer_align));
        let at_once = AtOnce::of(&file, options.direct);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let pool = Pool::new(&name.chars().take(15).collect::<String>(), Role::Disk, POOL_THREADS);
        Ok(FileStore {
            file,
            block_device,
            direct: options.direct,
            file_system,
            in_ring,
            capabilities,
            memory_align,
            knowledge,
            backing,
            at_once,
            write_back: unwatched(),
            forgets: false,
            deallocate,
            reserve,
            verdict,
            notes: Notes::in_memory(),
            journal: None,
            directory,
            identity,
            adopt: surroundings.adopt,
            pool,
        })
    }

    fn check_size(&self, block_size: u32) -> Result<(), OpenError> {
        let size = self.size_bytes().map_err(|e| format!("has no size: {}", plain(&e)))?;
        if size == 0 {
            return Err("is empty; make it as long as the disk shall be (truncate -s SIZE)".into());
        }
        if size % u64::from(block_size) != 0 {
            let (below, above) = (size - size % u64::from(block_size), u64::from(block_size));
            return Err(format!(
                "its size of {size} bytes is no multiple of the block size {block_size}; \
                 the next sizes that are: {below} and {}",
                below + above
            )
            .into());
        }
        Ok(())
    }

    fn size_bytes(&self) -> io::Result<u64> {
        if self.block_device {
            sys::block_device_size(&self.file)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    /// An unnamed file that shares the blocks of these ranges. Each range keeps its place in its first
    /// block; what shares a block with something else is copied.
    fn share(
        &self,
        directory: &Arc<Directory>,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Snapshot, CopyError> {
        let block = u64::from(self.capabilities.host_block);
        let mut starts = Vec::new();
        let mut end = 0u64;
        for range in ranges {
            starts.push(end + range.start % block);
            let blocks = range.end.next_multiple_of(block) - (range.start - range.start % block);
            end = end.saturating_add(blocks);
        }
        // A place in the unnamed file says nothing to anybody.
        let own =
            |cause: Cause, done| CopyError { side: Side::Destination, error: cause.into(), done };
        let host = |e: io::Error| own(Cause::from(&e), 0);
        let file = directory.unnamed_file().map_err(host)?;
        file.set_len(end).map_err(host)?;
        let store = self.over_snapshot(file);
        let (mut done, mut written) = (0, false);
        for (range, start) in ranges.iter().zip(&starts) {
            let mut step = |more| go_on(done + more);
            let mut copy = copy::Copy::new(self, &store, Holes::Stay, &mut step);
            copy.run(range.clone(), *start).map_err(|error| match error.side {
                Side::Source => CopyError { done: done + error.done, ..error },
                Side::Destination => own(error.error.cause, done + error.done),
            })?;
            written |= copy.moved().copied + copy.moved().offloaded > 0;
            done += range.end - range.start;
        }
        // It is read for as long as an hour, and nobody would be told that the host has not written back what was copied.
        if written {
            store.sync().map_err(|error| own(error.cause, done))?;
        }
        Ok(Snapshot { store: Box::new(store), starts, charge: None })
    }

    /// A store over an unnamed file beside this one.
    fn over_snapshot(&self, file: File) -> Self {
        FileStore {
            file,
            block_device: false,
            direct: false,
            file_system: self.file_system,
            in_ring: false,
            capabilities: Capabilities { transfer_align: 1, ..self.capabilities.clone() },
            memory_align: 1,
            knowledge: self.knowledge,
            backing: None,
            at_once: AtOnce::never(),
            write_back: unwatched(),
            forgets: false,
            deallocate: self.deallocate.again(),
            reserve: self.reserve.again(),
            verdict: Arc::clone(&self.verdict),
            notes: Notes::in_memory(),
            journal: None,
            directory: None,
            identity: Identity::default(),
            adopt: false,
            pool: Pool::new("snapshot", Role::Disk, 1),
        }
    }

    /// Runs `transfer` until all `len` bytes from `offset` are done. `transfer(done)` moves some
    /// more bytes and says how many; 0 ends it. Returns the bytes moved.
    fn all(
        offset: u64,
        len: usize,
        mut transfer: impl FnMut(usize) -> io::Result<usize>,
    ) -> Result<usize, StoreError> {
        let mut done = 0;
        while done < len {
            match transfer(done) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(StoreError::at(Cause::from(&e), offset + done as u64)),
            }
        }
        Ok(done)
    }

    /// Does a transfer through memory of our own, piece by piece: for lists that O_DIRECT cannot use. `step` gets where
    /// in the file a piece begins, the piece, and where in the list it belongs.
    fn in_pieces(
        offset: u64,
        len: usize,
        mut step: impl FnMut(u64, &Buffers, usize) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            // A new one each time: there may be a longer one by now.
            let piece = Piece::of(len - done).ok_or(StoreError::at(Cause::Busy, at))?;
            step(at, &piece, done)?;
            done += piece.len();
        }
        Ok(())
    }

    fn is_usable(&self, list: &Buffers) -> bool {
        list.is_aligned(self.memory_align)
    }

    fn read_all(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        let align = self.capabilities.transfer_align as usize;
        let done = Self::all(offset, into.len(), |done| {
            // A read that ended off the alignment met the end of the file: do not ask again.
            if done % align == 0 { sys::read(&self.file, offset, into, done) } else { Ok(0) }
        })?;
        into.fill_zero(done, into.len() - done);
        Ok(())
    }

    /// Before anything is called stable, a journal goes that would be made good over it.
    fn settle_journal(&self) -> Result<(), StoreError> {
        let settled = self.journal.as_ref().map_or(Ok(()), Journal::settle);
        settled.map_err(|e| Cause::from(&e).into())
    }

    fn write_all(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let done =
            Self::all(offset, from.len(), |done| sys::write(&self.file, offset, from, done))?;
        match done == from.len() {
            true => Ok(()),
            false => Err(StoreError::at(Cause::Medium, offset + done as u64)),
        }
    }

    fn write_cached(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let written = match self.is_usable(from) {
            true => self.write_all(offset, from),
            false => Self::in_pieces(offset, from.len(), |at, piece, done| {
                piece.copy_from(0, from, done, piece.len());
                self.write_all(at, piece)
            }),
        };
        self.write_back.mark(bytes(offset, from.len()));
        written
    }

    /// Writes, and then flushes all that was written. An error of a write that does both (RWF_DSYNC) would not say which of the
    /// two has failed, and what only failed to be written is no reason to mistrust everything that was written before. Nor
    /// is it written once more with that flag: by then it can be seen, and others may have written over it. And to flush a
    /// part by msync(2) takes the lock of all mappings, with which a host that hangs would hold up all guests.
    fn write_stable(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.write_cached(offset, from)?;
        let at = |error: StoreError| match error.lost {
            true => error,
            false => StoreError::at(error.cause, offset),
        };
        self.sync().map_err(at)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.write_back.flush(|some| {
            self.file.sync_data()?;
            if some { self.journal_is_kept() } else { Ok(()) }
        })
    }

    /// Whether a flush that succeeded can be believed.
    fn journal_is_kept(&self) -> io::Result<()> {
        match self.file_system {
            FileSystem::Ext4 if !self.capabilities.read_only => sys::journal_is_kept(&self.file),
            _ => Ok(()),
        }
    }

    /// Has an atomic write ended that failed halfway, before anybody gets at its blocks.
    fn end_atomic(&self, range: &Range<u64>) -> Result<(), StoreError> {
        match &self.journal {
            None => Ok(()),
            Some(journal) => journal.finish(range, |offset, from| self.write_stable(offset, from)),
        }
    }

    /// Whether nobody has to wait for the end of one.
    fn is_whole(&self) -> bool {
        !self.journal.as_ref().is_some_and(Journal::is_unfinished)
    }
}

/// The file of a disk in service, of which what reads have left in the page cache may be dropped.
struct Served<'a>(&'a FileStore);

impl Host for Served<'_> {
    fn mapped(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Mapped>> {
        self.0.file.mapped(range, max)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.0.file.next_data(at)
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        self.0.file.next_hole(at)
    }

    fn cached(&self, range: &Range<u64>) -> Cached {
        let Ok(status) = sys::cache_status(&self.0.file, range) else { return Cached::Fresh };
        match status.dirty.saturating_add(status.under_way) {
            // What could not be written back is clean too, and may be nowhere else: the host is asked first.
            0 if self.0.write_back.look().is_none() => Cached::Clean,
            0 => Cached::Fresh,
            unwritten if unwritten < status.cached => Cached::Mixed,
            _ => Cached::Fresh,
        }
    }

    fn forget(&self, range: &Range<u64>) {
        // A folio goes as a whole or not at all, and may begin before the range and end behind it.
        let folio = <Self as Host>::FOLIO;
        let wide = range.start - range.start % folio..range.end.next_multiple_of(folio);
        let range = if self.cached(&wide) == Cached::Clean { wide } else { range.clone() };
        let (at, len) = (i64::try_from(range.start), i64::try_from(range.end - range.start));
        if let (Ok(at), Ok(len)) = (at, len) {
            // The kernel keeps what came to be dirty meanwhile.
            let _ = posix_fadvise(&self.0.file, at, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
}

fn bytes(offset: u64, len: usize) -> Range<u64> {
    offset..offset.saturating_add(len as u64)
}

/// What one who has died has removed beside an image stays removed.
fn make_names_last(directory: &Directory) {
    if let Err(error) = directory.make_last() {
        let (image, why) = (directory.path().display(), plain(&error));
        log::warn!(
            "{image}: its directory cannot be flushed ({why}): what was removed beside it may come back"
        );
    }
}

/// For a file that is only looked at, or whose writes are flushed by who makes them.
fn unwatched() -> Arc<WriteBack> {
    Arc::new(WriteBack::of(String::new(), 0, None))
}

/// The same file, opened once more, to be told of errors of write-back.
fn witness(file: &File, path: &Path) -> Result<File, OpenError> {
    let witness = File::open(path).map_err(|e| format!("cannot be opened: {}", plain(&e)))?;
    let (one, other) = (file.metadata(), witness.metadata());
    let (one, other) = (one.map_err(|e| plain(&e))?, other.map_err(|e| plain(&e))?);
    match (one.dev(), one.ino()) == (other.dev(), other.ino()) {
        true => Ok(witness),
        false => Err(CHANGED.into()),
    }
}

impl Store for FileStore {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn size(&self) -> Result<u64, StoreError> {
        self.size_bytes().map_err(|e| Cause::from(&e).into())
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        self.end_atomic(&bytes(offset, into.len()))?;
        if self.is_usable(into) {
            return self.read_all(offset, into);
        }
        Self::in_pieces(offset, into.len(), |at, piece, done| {
            self.read_all(at, piece)?;
            into.copy_from(done, piece, 0, piece.len());
            Ok(())
        })
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        let len = into.len() as u64;
        if let (Ok(at), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
            // Clean pages are dropped, so that the read goes to the device. Where the host keeps
            // them (tmpfs, pages mapped elsewhere) the cache is all the medium we can reach.
            let _ = posix_fadvise(&self.file, at, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        self.read(offset, into)
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError> {
        if durability == Durability::Stable {
            self.settle_journal()?;
            self.write_back.check()?;
        }
        self.end_atomic(&bytes(offset, from.len()))?;
        let written = match durability {
            Durability::Cached => self.write_cached(offset, from),
            Durability::Stable => self.write_stable(offset, from),
        };
        // A host that fails now may have failed to write back before. It is not asked when all goes well: a flush will.
        let lost =
            if written.is_err() { self.write_back.look() } else { self.write_back.failure() };
        match (durability, lost) {
            (Durability::Stable, Some(lost)) => Err(lost),
            _ => written,
        }
    }

    fn overwrite(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let align = u64::from(self.capabilities.transfer_align);
        let end = self.size()?.next_multiple_of(align);
        let there = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        match there {
            0 => Ok(()),
            there => self.write(offset, &from.slice(0, there.min(from.len())), Durability::Cached),
        }
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        // Asked, as the journal may be what has no room.
        self.write_back.look().map_or(Ok(()), Err)?;
        self.settle_journal()?;
        if self.direct && self.is_usable(from) && self.is_whole() {
            // Where the device can do it, and the range is one that it does. Otherwise nothing was written.
            if sys::write_torn_free(&self.file, offset, from).is_ok() {
                self.write_back.mark(bytes(offset, from.len()));
                self.sync()?;
                return self.write_back.check();
            }
        }
        let Some(journal) = &self.journal else {
            return Err(StoreError::at(Cause::Medium, offset));
        };
        let room = sys::allocate(&self.file, offset, from.len() as u64);
        room.map_err(|e| StoreError::at(Cause::from(&e), offset))?;
        let read = |at, into: &Buffers| {
            self.read(at, into)?;
            // Else a crash would bring back what was there before that.
            self.write_stable(at, into)
        };
        journal.write(offset, from, read, |offset, from| self.write_stable(offset, from))?;
        self.write_back.check()
    }

    fn flush(&self) -> Result<(), StoreError> {
        // Also when it has failed before: what can still be saved is.
        let flushed = self.settle_journal().and(self.sync());
        self.write_back.check().and(flushed)
    }

    fn write_back(&self) -> Option<&Arc<WriteBack>> {
        Some(&self.write_back)
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        if let (Ok(at), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
            let _ = posix_fadvise(&self.file, at, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        }
        Ok(())
    }

    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
        if self.end_atomic(&range).is_err() {
            // There may be data of it where there is nothing yet.
            return Ok(vec![Extent { range, kind: Kind::Data }]);
        }
        if self.backing.is_none() && self.knowledge.when_flushed && self.sync().is_err() {
            return Ok(vec![Extent { range, kind: Kind::Data }]);
        }
        match &self.backing {
            None if self.forgets => Ok(extents::walk(&Served(self), self.knowledge, range, limit)),
            None => Ok(extents::walk(&self.file, self.knowledge, range, limit)),
            Some(backing) => {
                let extents = backing.extents(&self.file, range, limit);
                extents.map_err(|e| Cause::from(&e).into())
            }
        }
    }

    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.end_atomic(&range)?;
        let block = u64::from(self.capabilities.host_block);
        let range = match self.block_device {
            true => range,
            false => extents::without_empty_ends(&self.file, self.knowledge, range, block),
        };
        let done = match self.block_device {
            true => self.deallocate.run_aligned(&self.file, &range, block),
            false => self.deallocate.run(&self.file, &range),
        };
        self.write_back.mark(range);
        done
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.end_atomic(&range)?;
        let done = match self.block_device {
            true => {
                self.reserve.run_aligned(&self.file, &range, self.capabilities.host_block.into())
            }
            false => self.reserve.run(&self.file, &range),
        };
        self.write_back.mark(range);
        done
    }

    fn zeroes_at_a_time(&self, into: Kind) -> u64 {
        // Devices may write them themselves, and memory is cleared when it is taken.
        let marked = match into {
            Kind::Hole => self.deallocate.only_marks(),
            Kind::Reserved | Kind::Data => {
                self.reserve.only_marks() && !self.capabilities.in_memory
            }
        };
        if marked && !self.block_device { ZEROES_MARKED } else { ZEROES_WRITTEN }
    }

    fn try_now(&self, operation: &Operation) -> Option<Result<(), StoreError>> {
        if !self.is_whole() {
            return None;
        }
        let (result, len) = match operation {
            Operation::Read { offset, into, medium: false } if into.len() <= MAX_AT_ONCE => {
                (self.at_once.read(&self.file, *offset, into)?, into.len())
            }
            Operation::Write { offset, from, durability: Durability::Cached }
                if from.len() <= MAX_AT_ONCE =>
            {
                let quiet = !self.pool.is_busy();
                let written = self.at_once.write(&self.file, *offset, from, quiet)?;
                self.write_back.mark(bytes(*offset, from.len()));
                if written > 0 && written < from.len() {
                    // That part can be seen, and written over: it is not written again, only the rest.
                    let rest = from.slice(written, from.len() - written);
                    return Some(self.write_cached(*offset + written as u64, &rest));
                }
                (written, from.len())
            }
            _ => return None,
        };
        // A part of a read is done again with the rest.
        (result == len).then_some(Ok(()))
    }

    fn ring_file(&self, operation: &Operation) -> Option<(RingFile, Hold)> {
        if !self.in_ring || !self.is_whole() {
            return None;
        }
        let list = match operation {
            Operation::Read { into, medium: false, .. } => into,
            // Marked when it has landed: a flush meanwhile is not its own.
            Operation::Write { from, durability: Durability::Cached, .. } if self.direct => from,
            // The kernel would hand a flush, and a write into the page cache that it cannot make at once, to
            // threads of its own, one write a file at a time; our own are as good, and end when idle. A stable write
            // is two calls.
            Operation::Write { .. } | Operation::Flush => return None,
            Operation::Read { .. } | Operation::Prefetch { .. } => return None,
        };
        // What O_DIRECT cannot use in place, and what is more than one call takes, is our own work.
        let fits = self.is_usable(list) && list.iovecs().len() <= sys::MAX_SEGMENTS;
        // Reads into the page cache wait for the device without a thread, and only if they may.
        let file = RingFile { fd: self.file.as_raw_fd(), comes_back: self.direct };
        fits.then_some((file, Hold::FREE))
    }

    fn file(&self) -> Option<&File> {
        // Where its blocks may not be what is read, nobody shares them.
        (self.is_whole() && self.write_back.failure().is_none()).then_some(&self.file)
    }

    fn take(
        &self,
        from: &File,
        source: u64,
        at: u64,
        len: u64,
        how: Method,
    ) -> Result<Option<u64>, StoreError> {
        if self.block_device {
            return Ok(None);
        }
        self.end_atomic(&(at..at.saturating_add(len)))?;
        let taken = match how {
            Method::Offload if !self.verdict.offloads => return Ok(None),
            Method::Reflink => sys::reflink(from, source, &self.file, at, len).map(|()| len),
            Method::Offload => offload(from, source, &self.file, at, len),
        };
        self.write_back.mark(at..at.saturating_add(len));
        match taken {
            // The end of a file that is shorter than the disk: there is nothing to take.
            Ok(0) => Ok(None),
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => match error.raw_os_error() {
                Some(
                    libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EXDEV | libc::EINVAL,
                ) => Ok(None),
                _ => Err(StoreError::at(Cause::from(&error), at)),
            },
        }
    }

    fn snapshot(
        &self,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>, CopyError> {
        let directory = self.directory.as_ref().filter(|_| self.capabilities.snapshots);
        let Some(directory) = directory else { return Ok(None) };
        if self.write_back.failure().is_some() {
            return Ok(None);
        }
        for range in ranges {
            self.end_atomic(range).map_err(|error| CopyError {
                side: Side::Source,
                error,
                done: 0,
            })?;
        }
        let shared = self.share(directory, ranges, go_on)?;
        // The blocks that are shared are the medium's. If write-back has failed, they may not be what is read.
        Ok(self.write_back.look().is_none().then_some(shared))
    }

    fn space(&self) -> Result<Option<Space>, StoreError> {
        let space = match (&self.backing, self.block_device) {
            (Some(backing), _) => backing.space().map(Some),
            (None, true) => Ok(None),
            (None, false) => sys::space(&self.file).map(Some),
        };
        space.map_err(|e| Cause::from(&e).into())
    }

    fn notes(&self) -> &Notes {
        &self.notes
    }

    fn take_over(&self, go_on: &dyn Fn() -> bool) -> Result<(), StoreError> {
        let (Some(directory), Some(journal)) = (&self.directory, &self.journal) else {
            return Ok(());
        };
        let path = directory.path().display();
        let found = Self::look_beside(directory);
        make_names_last(directory);
        if !go_on() {
            return Err(Cause::Cancelled.into());
        }
        directory.remove_unfinished(KEPT);
        let taken = found.and_then(|found| {
            let Some([noted, journaled]) = found else {
                log::warn!("{path}: has lost its name to another file: nothing is kept beside it");
                return Ok(());
            };
            self.with_image(|image| journal.recover(&journaled, image))?;
            self.notes.read(&self.identity, &noted, self.adopt)
        });
        taken.map_err(|error| {
            let cause = Cause::from(&error);
            if cause != Cause::Busy {
                log::error!("{path}: what lies beside it: {}", plain(&error));
            }
            cause.into()
        })
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// One `copy_file_range(2)`; may be short.
pub(super) fn offload(from: &File, source: u64, to: &File, at: u64, len: u64) -> io::Result<u64> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let mut source = i64::try_from(source).map_err(invalid)?;
    let mut at = i64::try_from(at).map_err(invalid)?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    loop {
        match copy_file_range(from, Some(&mut source), to, Some(&mut at), len) {
            Err(Errno::EINTR) => {}
            other => return Ok(other? as u64),
        }
    }
}

/// Whether unnamed files in the directory of a file can share its blocks: tried out on two of them.
fn shares_blocks(file: &File, directory: &Arc<Directory>) -> io::Result<bool> {
    let (one, other) = (directory.unnamed_file()?, directory.unnamed_file()?);
    // A file that is mounted over, or a link to one elsewhere, is not in this file system.
    if one.metadata()?.dev() != file.metadata()?.dev() {
        return Ok(false);
    }
    let block = host_block(file, false)?;
    let [old, new] = [0xa5, 0x5a].map(|byte| vec![byte; block as usize]);
    one.write_all_at(&old, 0)?;
    if sys::reflink(&one, 0, &other, 0, block.into()).is_err() {
        return Ok(false);
    }
    // And stay as they were for one when the other changes them.
    one.write_all_at(&new, 0)?;
    let mut found = vec![0; block as usize];
    other.read_exact_at(&mut found, 0)?;
    Ok(found == old)
}

/// Whether `path` is a block device; an error unless it is that or a regular file.
fn check_kind(path: &Path) -> Result<bool, OpenError> {
    let kind = match path.metadata() {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err("no such file; size=SIZE would create it".into());
        }
        Err(e) => return Err(plain(&e).into()),
    };
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind.is_block_device());
    }
    let what = if kind.is_dir() { "is a directory" } else { "is a special file" };
    Err(format!("{what}; a disk is a regular file or a block device").into())
}

fn open_file(path: &Path, options: &OpenOptionsFor) -> Result<File, OpenError> {
    let flags = if options.direct { libc::O_DIRECT } else { 0 };
    let opened =
        OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(path);
    let file = opened.map_err(|e| -> OpenError {
        match e.raw_os_error() {
            Some(libc::EINVAL) if options.direct => {
                "its file system has no O_DIRECT; leave cache=direct away".into()
            }
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if !options.read_only => {
                format!("cannot be opened for writing: {}; readonly might do", plain(&e)).into()
            }
            _ => format!("cannot be opened: {}", plain(&e)).into(),
        }
    })?;
    // What a guest reads is no access to the file by anybody on the host, and every read would look whether to note it.
    // The kernel allows this to the file's owner; where it does not, nothing is lost.
    let _ = fcntl(&file, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NOATIME));
    Ok(file)
}

/// Alignment of memory and of transfers for O_DIRECT on `file`, in bytes.
fn direct_alignment(file: &File, block_size: u32) -> Result<(usize, u32), OpenError> {
    let (memory, transfer) = match sys::direct_io_alignment(file) {
        Some(alignment) => alignment,
        None => probe_direct_alignment(file)?,
    };
    if transfer > block_size {
        return Err(format!(
            "cache=direct needs transfers of {transfer} bytes here and the block size is \
             {block_size}; use block-size={transfer} or another cache mode"
        )
        .into());
    }
    Ok((memory.max(1) as usize, transfer))
}

/// The smallest power of two at which an O_DIRECT read works, tried out on the file.
fn probe_direct_alignment(file: &File) -> Result<(u32, u32), OpenError> {
    for align in [512u32, 4096] {
        let Some(one) = Buffers::zeroed(align as usize) else { continue };
        if sys::read(file, u64::from(align), &one, 0).is_ok() {
            return Ok((align, align));
        }
    }
    Err("O_DIRECT reads fail on it; leave cache=direct away".into())
}

/// What hangs when the file does: its file system, or the block device itself.
fn device(file: &File, block_device: bool) -> io::Result<u64> {
    let metadata = file.metadata()?;
    Ok(if block_device { metadata.rdev() } else { metadata.dev() })
}

/// The unit in which the host keeps data, in bytes: a power of two from 512 to 64 KiB.
fn host_block(file: &File, block_device: bool) -> io::Result<u32> {
    let bytes = if block_device {
        u64::from(sys::block_device_block(file)?)
    } else {
        nix::sys::statvfs::fstatvfs(file)?.block_size()
    };
    let bytes = u32::try_from(bytes).unwrap_or(4096).clamp(512, 65536);
    Ok(bytes.next_power_of_two())
}

/// An error's text without Rust's " (os error N)".
pub fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map(|c| c.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// The name of the file itself, by which what is kept beside it is found whatever links lead to it.
///
/// # Errors
/// If there is none.
pub fn real_name(path: &Path) -> io::Result<PathBuf> {
    path.canonicalize()
}

/// Why nothing can be kept beside an image, if that is so for good.
fn cannot_be_kept(directory: &Directory) -> Option<String> {
    let error = directory.try_out().err()?;
    let for_good = matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ENAMETOOLONG)
    );
    for_good.then(|| plain(&error))
}

/// Most names of a directory that are looked through.
const MAX_NAMES: usize = 100_000;

/// A file about the image that would not be found, as it has another name than the image has now: the image was renamed,
/// has several names, or an older thinlun kept it beside a link. And what its name should end with.
fn stray(path: &Path, real: &Path, image: &Identity) -> Option<(PathBuf, &'static str)> {
    const SUFFIXES: [&str; 2] = [notes::SUFFIX, journal::SUFFIX];
    let about = |path: &Path| {
        let file = beside::peek(path, 4096).ok()?;
        let ours = notes::is_ours(&file) || journal::is_ours(&file);
        (ours && !file.is_empty()).then(|| notes::image_of(&file).or(journal::image_of(&file)))
    };
    let link = stable_name(path).ok().filter(|link| link != real);
    for (link, suffix) in link.iter().flat_map(|link| SUFFIXES.map(|suffix| (link, suffix))) {
        let file = with_suffix(link, suffix);
        if about(&file).is_some_and(|id| id.is_none_or(|id| id.may_be(image))) {
            return Some((file, suffix));
        }
    }
    let same =
        |one: &Metadata, other: &Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    let own = real.metadata().ok()?;
    for entry in std::fs::read_dir(real.parent()?).ok()?.take(MAX_NAMES).flatten() {
        let name = entry.file_name();
        let bytes = name.as_encoded_bytes();
        for suffix in SUFFIXES {
            let Some(stem) = bytes.strip_suffix(suffix.as_bytes()) else { continue };
            let of = real.with_file_name(OsStr::from_bytes(stem));
            // A copy of it may lie beside a copy of the image.
            let of_another = of.metadata().is_ok_and(|of| !same(&of, &own));
            let is_about = || about(&entry.path()).flatten().is_some_and(|about| about.is(image));
            if of != real && !of_another && is_about() {
                return Some((entry.path(), suffix));
            }
        }
    }
    None
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What lies where things will be kept of an image that does not exist yet: left over from another one of that name, and
/// in the way.
///
/// # Errors
/// If it is nothing that thinlun has made.
pub fn left_over(path: &Path) -> Result<Vec<PathBuf>, OpenError> {
    let name = stable_name(path).map_err(|e| plain(&e))?;
    let mut all = Vec::new();
    for suffix in [notes::SUFFIX, journal::SUFFIX] {
        for new in ["", beside::NEW] {
            let file = with_suffix(&with_suffix(&name, suffix), new);
            let found = match file.symlink_metadata() {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) if e.raw_os_error() == Some(libc::ENAMETOOLONG) => continue,
                Err(e) => return Err(format!("{}: {}", file.display(), plain(&e)).into()),
                Ok(metadata) => metadata,
            };
            let bytes = match found.is_file() {
                true => beside::peek(&file, 4096)
                    .map_err(|e| format!("{}: {}", file.display(), plain(&e)))?,
                false => Vec::new(),
            };
            let ours = match new.is_empty() {
                true => notes::is_ours(&bytes) || journal::is_ours(&bytes),
                false => notes::is_begun(&bytes) || journal::is_begun(&bytes),
            };
            if !found.is_file() || !ours {
                return Err(format!(
                    "{} lies where thinlun would keep what it remembers, and is none of its files: move it away",
                    file.display()
                )
                .into());
            }
            all.push(file);
        }
    }
    Ok(all)
}

/// The name a file keeps over restarts: its directory resolved, its own name as given, so that a
/// stable link such as /dev/disk/by-id/... stays the name although it points elsewhere next time.
///
/// # Errors
/// If the directory cannot be resolved.
pub fn stable_name(path: &Path) -> io::Result<PathBuf> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    Ok(directory.canonicalize()?.join(name))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const PLAIN: OpenOptionsFor =
        OpenOptionsFor { read_only: false, direct: false, block_size: 512, locking: true };

    #[test]
    fn a_file_that_shrank_reads_zeroes_beyond_its_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let store = FileStore::open(file.path(), &PLAIN).unwrap();
        store.write(0, &Buffers::copy_of(&[7; 8192]).unwrap(), Durability::Cached).unwrap();
        file.as_file().set_len(1000).unwrap();
        let out = Buffers::copy_of(&[9; 2048]).unwrap();
        store.read(0, &out).unwrap();
        assert_eq!(out.to_vec(2048)[..1000], [7; 1000]);
        assert_eq!(out.to_vec(2048)[1000..], [0; 1048]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(FileStore::open(file.path(), &PLAIN).unwrap_err().0.contains("empty"));
        file.as_file().set_len(1000).unwrap();
        let message = FileStore::open(file.path(), &PLAIN).unwrap_err().0;
        assert!(message.contains("512 and 1024"), "{message}");
        assert!(FileStore::open(Path::new("/"), &PLAIN).unwrap_err().0.contains("directory"));
        assert!(FileStore::open(Path::new("/nope"), &PLAIN).unwrap_err().0.contains("size="));
        assert!(FileStore::open(Path::new("/dev/null"), &PLAIN).unwrap_err().0.contains("special"));
    }

    /// A journal that cannot be removed would be made good over what is stable by then.
    #[test]
    fn nothing_is_called_stable_while_a_journal_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, [0; 8192]).unwrap();
        for direct in [false, true] {
            let options = OpenOptionsFor { direct, ..PLAIN };
            let Ok(store) = FileStore::open(&path, &options) else { continue };
            let left = folder.path().join("disk.img.thinlun-write");
            std::fs::create_dir(&left).unwrap();
            store.journal.as_ref().unwrap().leave();
            let data = Buffers::copy_of(&[7; 4096]).unwrap();
            store.write(0, &data, Durability::Cached).unwrap();
            store.flush().unwrap_err();
            store.write(0, &data, Durability::Stable).unwrap_err();
            store.write_whole(0, &data).unwrap_err();
            let stable = Operation::Write { offset: 0, from: data, durability: Durability::Stable };
            assert!(store.try_now(&stable).is_none() && store.ring_file(&stable).is_none());
            std::fs::remove_dir(&left).unwrap();
            store.flush().unwrap();
            stable.run(&store).unwrap();
        }
    }

    /// Whichever way something is written, the next flush has something to flush.
    #[test]
    fn a_flush_knows_of_every_write() {
        for direct in [false, true] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let options = OpenOptionsFor { direct, block_size: 4096, ..PLAIN };
            let Ok(store) = FileStore::open(file.path(), &options) else {
                eprintln!("NOT PROVED: no O_DIRECT here");
                continue;
            };
            let has_something = || {
                let told = Cell::new(false);
                let flush = |some| {
                    told.set(some);
                    Ok(())
                };
                store.write_back.flush(flush).unwrap();
                told.get()
            };
            assert!(has_something() && !has_something());
            let from = Buffers::copy_of(&[7; 4096]).unwrap();
            let cached = Operation::Write { offset: 0, from, durability: Durability::Cached };
            // The first one finds out that the host does not say whether it would wait.
            if (0..4).any(|_| store.try_now(&cached).is_some()) {
                assert!(has_something(), "at once");
            } else if !direct {
                eprintln!("NOT PROVED: no write at once here");
            }
            cached.run(&store).unwrap();
            assert!(has_something(), "cached, direct {direct}");
            store.deallocate(0..65536).unwrap();
            assert!(has_something(), "deallocated, direct {direct}");
            store.reserve(0..65536).unwrap();
            assert!(has_something(), "reserved, direct {direct}");
        }
    }

    #[test]
    fn errors_carry_the_place_and_the_cause() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let from = Buffers::copy_of(&[1; 512]).unwrap();
        let error = FileStore::all(4096, 512, |done| sys::write(&full, 4096, &from, done));
        assert_eq!(error, Err(StoreError::at(Cause::NoSpace, 4096)));
    }

    /// Nobody uses the blocks of an atomic write that has failed halfway, by whatever way, before it is made.
    #[test]
    fn an_unfinished_atomic_write_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let range = 4096..8192;
        let fail = |store: &FileStore| {
            let data = Buffers::copy_of(&[2; 4096]).unwrap();
            let half = |offset, data: &Buffers| {
                store.write_cached(offset, &data.slice(0, 512)).unwrap();
                Err(Cause::Medium.into())
            };
            store
                .journal
                .as_ref()
                .unwrap()
                .write(range.start, &data, |_, _| Ok(()), half)
                .unwrap_err();
        };
        let into = |len| Buffers::zeroed(len).unwrap();
        let first = |store: &FileStore| {
            let found = into(512);
            store.read_all(range.end - 512, &found).unwrap();
            found.to_vec(1)[0]
        };
        type Use = fn(&FileStore);
        let uses: [Use; 7] = [
            |store| store.read(4096, &Buffers::zeroed(512).unwrap()).unwrap(),
            |store| store.read_medium(7680, &Buffers::zeroed(512).unwrap()).unwrap(),
            |store| {
                let one = Buffers::copy_of(&[9; 512]).unwrap();
                store.write(4096, &one, Durability::Cached).unwrap();
            },
            |store| {
                let one = Buffers::copy_of(&[9; 512]).unwrap();
                store.write(4096, &one, Durability::Stable).unwrap();
            },
            |store| store.deallocate(4096..4608).unwrap(),
            |store| store.reserve(4096..4608).unwrap(),
            |store| {
                let one = Buffers::copy_of(&[9; 512]).unwrap();
                store.write_whole(0, &one).unwrap();
            },
        ];
        for direct in [false, true] {
            for use_it in uses {
                std::fs::write(&path, [1; 16384]).unwrap();
                let options = OpenOptionsFor { direct, ..PLAIN };
                let Ok(store) = FileStore::open(&path, &options) else { continue };
                fail(&store);
                let read = Operation::Read { offset: 0, into: into(512), medium: false };
                let from = Buffers::copy_of(&[3; 512]).unwrap();
                let write = Operation::Write { offset: 0, from, durability: Durability::Cached };
                for operation in [&read, &write] {
                    assert!(store.try_now(operation).is_none(), "direct {direct}");
                    assert!(store.ring_file(operation).is_none(), "direct {direct}");
                }
                assert!(store.file().is_none());
                assert_eq!(first(&store), 1);
                store.read(range.end, &into(512)).unwrap();
                assert_eq!(first(&store), 1, "others do not wait for it");
                use_it(&store);
                assert_eq!(first(&store), 2, "direct {direct}");
                assert!(store.file().is_some());
                assert!(!directory.path().join("disk.img.thinlun-write").exists());
            }
        }
    }
}
