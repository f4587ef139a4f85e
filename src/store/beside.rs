//! Small files beside an image, each replaced as a whole, so that a crash of the host leaves the old one or the new.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Where such a file is, or can be made. The directory is held open: what it is called may change.
#[derive(Debug)]
pub(super) struct Beside {
    directory: File,
    name: OsString,
}

impl Beside {
    /// The file whose name is that of `image`, the directory of which is resolved already, and `suffix`.
    ///
    /// # Errors
    /// If the directory cannot be opened.
    pub(super) fn of(image: &Path, suffix: &str) -> io::Result<Self> {
        let directory = image.parent().ok_or(ErrorKind::InvalidInput)?;
        let options = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).clone();
        let mut name = image.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
        name.push(suffix);
        Ok(Beside { directory: options.open(directory)?, name })
    }

    fn open(&self, name: &OsString, flags: OFlag) -> nix::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        openat(&self.directory, name.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
    }

    /// Its contents, or the first `most` bytes of them; nothing if there is no such file.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub(super) fn read(&self, most: u64) -> io::Result<Vec<u8>> {
        let file = match self.open(&self.name, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT | Errno::ENAMETOOLONG) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
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
        let mut file = File::from(self.open(&new, flags)?);
        fill(&mut file)?;
        file.sync_all()?;
        let (from, to) = (new.as_os_str(), self.name.as_os_str());
        renameat(&self.directory, from, &self.directory, to)?;
        self.directory.sync_all()
    }

    /// Removes it, if it is there. When it returns, a crash does not bring it back.
    ///
    /// # Errors
    /// If it stays.
    pub(super) fn remove(&self) -> io::Result<()> {
        match unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => self.directory.sync_all(),
            Err(error) => Err(error.into()),
        }
    }
}
