//! Small files beside an image, each replaced as a whole, so that a crash of the host leaves the old one or the new; and
//! the one thread of each disk that may use names for that.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, mpsc};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Pool;
use crate::sandbox::{self, Role};

const OURS: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// The directory of an image, held open: what it is called may change.
pub(super) struct Directory {
    file: File,
    /// Uses the names in it, once nobody else may. It is started for the first of them and stays, so that what was begun
    /// can be ended. No other disk has to do with it, for it hangs with its file system.
    names: Pool,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Directory").field(&self.file).finish()
    }
}

impl Directory {
    /// That of `image`, the directory of which is resolved already.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(super) fn of(image: &Path) -> io::Result<Arc<Self>> {
        let directory = image.parent().ok_or(ErrorKind::InvalidInput)?;
        let options = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).clone();
        let file = options.open(directory)?;
        Ok(Arc::new(Directory { file, names: Pool::new("names", Role::Names, 1) }))
    }

    /// Has somebody who may do it use names, and waits for that.
    fn with_names<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&File) -> nix::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if !sandbox::is_entered() {
            return Ok(work(&self.file)?);
        }
        let (done, result) = mpsc::sync_channel(1);
        let on = Arc::clone(self);
        self.names.run(Box::new(move || drop(done.send(work(&on.file)))))?;
        Ok(result.recv().map_err(|_| ErrorKind::BrokenPipe)??)
    }

    /// A file without a name, gone with its descriptor.
    ///
    /// # Errors
    /// If its file system has no such files, or no room.
    pub(super) fn unnamed_file(self: &Arc<Self>) -> io::Result<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        Ok(self.with_names(move |directory| openat(directory, ".", flags, OURS))?.into())
    }
}

/// Where such a file is, or can be made.
#[derive(Debug)]
pub(super) struct Beside {
    directory: Arc<Directory>,
    name: OsString,
}

impl Beside {
    /// The file in the directory of `image` whose name is that of `image`, and `suffix`.
    ///
    /// # Errors
    /// If the image has no name.
    pub(super) fn of(directory: &Arc<Directory>, image: &Path, suffix: &str) -> io::Result<Self> {
        let mut name = image.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
        name.push(suffix);
        Ok(Beside { directory: Arc::clone(directory), name })
    }

    fn open(&self, name: OsString, flags: OFlag) -> io::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        self.directory.with_names(move |d| openat(d, name.as_os_str(), flags, OURS))
    }

    /// Its contents, or the first `most` bytes of them; nothing if there is no such file.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub(super) fn read(&self, most: u64) -> io::Result<Vec<u8>> {
        let file = match self.open(self.name.clone(), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => File::from(file),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENAMETOOLONG) => return Ok(Vec::new()),
                _ => return Err(error),
            },
        };
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Has a new file, which `fill` fills, take the old one's place. When it returns, a crash changes nothing about it.
    ///
    /// # Errors
    /// If the host cannot keep it; then the old one stays.
    pub(super) fn replace(&self, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        let mut new = self.name.clone();
        new.push(".new");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
        let mut file = File::from(self.open(new.clone(), flags)?);
        fill(&mut file)?;
        file.sync_all()?;
        let name = self.name.clone();
        self.directory.with_names(move |d| renameat(d, new.as_os_str(), d, name.as_os_str()))?;
        self.directory.file.sync_all()
    }

    /// Removes it, if it is there. When it returns, a crash does not bring it back.
    ///
    /// # Errors
    /// If it stays.
    pub(super) fn remove(&self) -> io::Result<()> {
        let name = self.name.clone();
        self.directory.with_names(move |d| {
            match unlinkat(d, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
                Err(Errno::ENOENT) => Ok(()),
                other => other,
            }
        })?;
        self.directory.file.sync_all()
    }
}
