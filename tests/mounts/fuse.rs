//! A FUSE file system whose server can be stopped: every request then waits, as with a server that got SIGSTOP or
//! has lost its network; and can fail, as a device does that breaks. It passes all else on to a directory. The server is
//! a thread of the test.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use fuser::{
    BackgroundSession, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use super::skipped;

/// What can be changed while it is mounted.
#[derive(Default)]
struct Switches {
    stopped: Mutex<bool>,
    goes_on: Condvar,
    /// fallocate, SEEK_DATA and copy_file_range are answered EOPNOTSUPP. The kernel asks once and remembers.
    refuses: AtomicBool,
    /// What is answered without being done: of LIES, those that are named.
    lies: AtomicU64,
    /// Requests that came in.
    requests: AtomicU64,
    /// FSYNC among them.
    flushes: AtomicU64,
    /// Bytes that were written.
    written: AtomicU64,
    /// Writes into this range of a file fail.
    breaks: Mutex<Option<Range<u64>>>,
    /// So many FSYNCs fail.
    flushes_fail: AtomicU64,
}

impl Switches {
    fn stop(&self, stopped: bool) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = stopped;
        self.goes_on.notify_all();
    }

    /// How many bytes of a write go well, if it fails.
    fn breaks_at(&self, offset: u64, len: usize) -> Option<usize> {
        let breaks = self.breaks.lock().unwrap_or_else(PoisonError::into_inner);
        let range = breaks.as_ref()?;
        let meets = offset < range.end && range.start < offset + len as u64;
        meets.then(|| range.start.saturating_sub(offset) as usize)
    }

    fn flush(&self) -> Answer<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        let one_less = |left: u64| left.checked_sub(1);
        let order = Ordering::AcqRel;
        match self.flushes_fail.fetch_update(order, Ordering::Acquire, one_less) {
            Ok(_) => Err(Errno::EIO),
            Err(_) => Ok(()),
        }
    }

    /// Where every request passes.
    fn gate(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        while *stopped {
            stopped = self.goes_on.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What a server can claim to have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// fallocate does nothing.
    Fallocate = 1,
    /// fallocate makes a file as long as the range, whatever it is asked for.
    Size = 2,
    /// All is one hole.
    Holes = 4,
    /// copy_file_range copies nothing.
    Copies = 8,
}

/// A mounted file system of that kind, gone with this value, whatever hangs in it.
pub struct Fuse {
    switches: Arc<Switches>,
    session: Option<BackgroundSession>,
    directory: TempDir,
}

impl Fuse {
    /// Mounts it, with or without the kernel's write-back cache. `None`, loudly, where that cannot be.
    pub fn new(writeback: bool) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let [behind, at] = ["behind", "mnt"].map(|name| directory.path().join(name));
        fs::create_dir(&behind).unwrap();
        fs::create_dir(&at).unwrap();
        let switches = Arc::new(Switches::default());
        let server = Server::new(behind, Arc::clone(&switches), writeback);
        match fuser::spawn_mount(server, &at, &fuser::Config::default()) {
            Ok(session) => Some(Fuse { switches, session: Some(session), directory }),
            Err(why) => {
                skipped(&format!("nothing was proved on FUSE: {why}"));
                None
            }
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    /// The directory behind it, which can be looked at while the server is stopped.
    pub fn behind(&self) -> PathBuf {
        self.directory.path().join("behind")
    }

    /// Stops the server until the returned value goes.
    #[must_use = "the server goes on when this goes"]
    pub fn stop(&self) -> Stopped {
        self.switches.stop(true);
        Stopped(Arc::clone(&self.switches))
    }

    /// Refuses fallocate, SEEK_DATA and copy_file_range from now on, as simple servers do.
    pub fn refuse(&self) {
        self.switches.refuses.store(true, Ordering::Relaxed);
    }

    /// Answers from now on that this was done.
    pub fn lie(&self, lie: Lie) {
        self.switches.lies.fetch_or(lie as u64, Ordering::Relaxed);
    }

    /// Requests that have reached the server, the one it hangs in included.
    pub fn requests(&self) -> u64 {
        self.switches.requests.load(Ordering::Relaxed)
    }

    /// Flushes (FSYNC) that have reached the server.
    pub fn flushes(&self) -> u64 {
        self.switches.flushes.load(Ordering::Relaxed)
    }

    /// Bytes that were written to the server, again and again if so.
    pub fn written(&self) -> u64 {
        self.switches.written.load(Ordering::Relaxed)
    }

    /// Has writes into this range of any file fail with EIO from now on, or none.
    pub fn fail_writes(&self, range: Option<Range<u64>>) {
        *self.switches.breaks.lock().unwrap_or_else(PoisonError::into_inner) = range;
    }

    /// Has the next flushes fail with EIO, so many of them.
    pub fn fail_flushes(&self, count: u64) {
        self.switches.flushes_fail.store(count, Ordering::Release);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.switches.stop(false);
        // MNT_FORCE aborts the connection: whoever waits for an answer gets an error, so that no process is left
        // that cannot be killed.
        let path = std::ffi::CString::new(self.path().into_os_string().into_encoded_bytes());
        // SAFETY: a path that ends with a zero byte.
        unsafe { libc::umount2(path.unwrap().as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

/// A server that is stopped, until this goes.
pub struct Stopped(Arc<Switches>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.stop(false);
    }
}

/// For how long the kernel may remember names and attributes. It is not to ask the server for them all the time.
const REMEMBERED: Duration = Duration::from_secs(60);

struct Server {
    switches: Arc<Switches>,
    writeback: bool,
    nodes: Mutex<HashMap<u64, PathBuf>>,
    files: Mutex<HashMap<u64, Arc<File>>>,
    next: AtomicU64,
}

type Answer<T> = Result<T, Errno>;

impl Server {
    fn new(root: PathBuf, switches: Arc<Switches>, writeback: bool) -> Self {
        let nodes = Mutex::new(HashMap::from([(INodeNo::ROOT.0, root)]));
        let next = AtomicU64::new(1);
        Server { switches, writeback, nodes, files: Mutex::default(), next }
    }

    fn path(&self, node: INodeNo) -> Answer<PathBuf> {
        self.nodes.lock().unwrap().get(&node.0).cloned().ok_or(Errno::ENOENT)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Answer<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    /// The attributes of what a path leads to, which is a node from now on.
    fn node(&self, path: &Path) -> Answer<FileAttr> {
        let attributes = attributes(&fs::symlink_metadata(path)?)?;
        self.nodes.lock().unwrap().insert(attributes.ino.0, path.into());
        Ok(attributes)
    }

    fn keep(&self, file: File) -> FileHandle {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.files.lock().unwrap().insert(handle, Arc::new(file));
        FileHandle(handle)
    }

    fn file(&self, handle: FileHandle) -> Answer<Arc<File>> {
        self.files.lock().unwrap().get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn open(&self, path: &Path, flags: i32, create: bool) -> Answer<FileHandle> {
        let writes = self.writeback || flags & libc::O_ACCMODE != libc::O_RDONLY;
        let truncates = flags & libc::O_TRUNC != 0;
        let options = OpenOptions::new().read(true).write(writes).create(create).clone();
        Ok(self.keep(options.clone().truncate(truncates && writes).open(path)?))
    }

    fn lies(&self, lie: Lie) -> bool {
        self.switches.lies.load(Ordering::Relaxed) & lie as u64 != 0
    }

    fn may(&self) -> Answer<()> {
        match self.switches.refuses.load(Ordering::Relaxed) {
            true => Err(Errno::EOPNOTSUPP),
            false => Ok(()),
        }
    }
}

fn attributes(of: &fs::Metadata) -> Answer<FileAttr> {
    Ok(FileAttr {
        ino: INodeNo(of.ino()),
        size: of.size(),
        blocks: of.blocks(),
        atime: of.accessed()?,
        mtime: of.modified()?,
        ctime: of.modified()?,
        crtime: of.modified()?,
        kind: FileType::from_std(of.file_type()).ok_or(Errno::EIO)?,
        perm: (of.permissions().mode() & 0o7777) as u16,
        nlink: of.nlink() as u32,
        uid: of.uid(),
        gid: of.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

/// The result of a system call.
fn called(result: i64) -> Answer<i64> {
    match result {
        -1 => Err(io::Error::last_os_error().into()),
        result => Ok(result),
    }
}

/// Answers with what came of it.
macro_rules! answer {
    ($reply:ident, $result:expr, |$value:pat_param| $good:expr) => {
        match $result {
            Ok($value) => $good,
            Err(error) => $reply.error(error),
        }
    };
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        if self.writeback {
            let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.switches.gate();
        let found = self.child(parent, name).and_then(|path| self.node(&path));
        answer!(reply, found, |node| reply.entry(&REMEMBERED, &node, Generation(0)));
    }

    fn getattr(&self, _: &Request, node: INodeNo, file: Option<FileHandle>, reply: ReplyAttr) {
        self.switches.gate();
        let metadata = match file.and_then(|handle| self.file(handle).ok()) {
            Some(file) => file.metadata().map_err(Errno::from),
            None => self.path(node).and_then(|path| Ok(fs::symlink_metadata(path)?)),
        };
        let found = metadata.and_then(|metadata| attributes(&metadata));
        answer!(reply, found, |mut found| {
            found.ino = node;
            reply.attr(&REMEMBERED, &found)
        });
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.switches.gate();
        let set = || {
            let path = self.path(node)?;
            if let Some(size) = size {
                OpenOptions::new().write(true).open(&path)?.set_len(size)?;
            }
            let mut found = attributes(&fs::symlink_metadata(path)?)?;
            found.ino = node;
            Ok(found)
        };
        answer!(reply, set(), |found| reply.attr(&REMEMBERED, &found));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.switches.gate();
        let done = self.child(parent, name).and_then(|path| Ok(fs::remove_file(path)?));
        answer!(reply, done, |()| reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.switches.gate();
        let rename = || {
            let (from, to) = (self.child(parent, name)?, self.child(new_parent, new_name)?);
            fs::rename(from, &to)?;
            self.node(&to)
        };
        answer!(reply, rename(), |_| reply.ok());
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.switches.gate();
        let opened = self.path(node).and_then(|path| self.open(&path, flags.0, false));
        answer!(reply, opened, |file| reply.opened(file, FopenFlags::FOPEN_KEEP_CACHE));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.switches.gate();
        let create = || {
            let path = self.child(parent, name)?;
            let file = self.open(&path, flags, true)?;
            Ok((self.node(&path)?, file))
        };
        let flags = FopenFlags::empty();
        answer!(reply, create(), |(node, file)| {
            reply.created(&REMEMBERED, &node, Generation(0), file, flags)
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.switches.gate();
        let mut bytes = vec![0; size as usize];
        let read = self.file(handle).and_then(|file| {
            let mut len = 0;
            while let more @ 1.. = file.read_at(&mut bytes[len..], offset + len as u64)? {
                len += more;
            }
            Ok(len)
        });
        answer!(reply, read, |len| reply.data(&bytes[..len]));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.switches.gate();
        self.switches.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        let written =
            self.file(handle).and_then(|file| match self.switches.breaks_at(offset, data.len()) {
                None => Ok(file.write_all_at(data, offset)?),
                Some(first) => {
                    file.write_all_at(&data[..first], offset)?;
                    Err(Errno::EIO)
                }
            });
        answer!(reply, written, |()| reply.written(data.len() as u32));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.switches.gate();
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.switches.gate();
        self.files.lock().unwrap().remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.switches.gate();
        let done = self.switches.flush().and_then(|()| self.file(handle));
        let done = done.and_then(|file| Ok(file.sync_data()?));
        answer!(reply, done, |()| reply.ok());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.switches.gate();
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.switches.gate();
        let blocks = 1 << 20;
        reply.statfs(blocks, blocks / 2, blocks / 2, 1 << 20, 1 << 19, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.switches.gate();
        let done = self.may().and_then(|()| self.file(handle)).and_then(|file| {
            if self.lies(Lie::Fallocate) {
                return Ok(0);
            }
            let lies = self.lies(Lie::Size);
            let mode = if lies { mode & !libc::FALLOC_FL_KEEP_SIZE } else { mode };
            let mode = if lies && mode != 0 { libc::FALLOC_FL_ZERO_RANGE } else { mode };
            // SAFETY: plain numbers, and a descriptor that is open.
            called(i64::from(unsafe {
                libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64)
            }))
        });
        answer!(reply, done, |_| reply.ok());
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.switches.gate();
        let found = self.may().and_then(|()| self.file(handle)).and_then(|file| {
            if self.lies(Lie::Holes) {
                return if whence == libc::SEEK_HOLE { Ok(offset) } else { Err(Errno::ENXIO) };
            }
            // SAFETY: plain numbers, and a descriptor that is open.
            called(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })
        });
        answer!(reply, found, |at| reply.offset(at));
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        from: FileHandle,
        offset_from: u64,
        _: INodeNo,
        to: FileHandle,
        offset_to: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.switches.gate();
        let copy = || {
            self.may()?;
            if self.lies(Lie::Copies) {
                return Ok(len as i64);
            }
            let (from, to) = (self.file(from)?, self.file(to)?);
            let (mut from_at, mut to_at) = (offset_from as i64, offset_to as i64);
            let len = len.min(1 << 30) as usize;
            let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
            // SAFETY: two numbers that the kernel may change, and descriptors that are open.
            called(unsafe {
                libc::copy_file_range(from, &mut from_at, to, &mut to_at, len, 0) as i64
            })
        };
        answer!(reply, copy(), |len| reply.written(len as u32));
    }
}
