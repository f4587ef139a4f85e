//! Small files beside an image, each replaced as a whole, so that a crash of the host leaves the old one or the new; and
//! the one thread of each disk that may use names for that.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Pool, journal, notes};
use crate::sandbox::{self, Role};

const OURS: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Of a file that is not ours and has the name that one of ours is to be written under.
const IN_THE_WAY: &str =
    "lies where thinlun would write what it keeps, and is none of its files: move it away";

/// What is added to a name while a file is written that is to have it.
pub(super) const NEW: &str = ".new";

/// What is looked at of a file to see whose it is, in bytes: more than all of ours begin with.
const HEAD: u64 = 64;

/// How a file is opened that may be anything: what is no file of ours is not followed and not waited for.
const LOOK: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_NONBLOCK).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// The directory of an image, held open: what it is called may change.
pub(super) struct Directory {
    file: File,
    /// The image's name in it, and which file it had when it was opened.
    image: OsString,
    device: u64,
    inode: u64,
    /// The image, for people.
    path: PathBuf,
    /// Uses the names in it, once nobody else may. It is started for the first of them and stays, so that what was begun
    /// can be ended. No other disk has to do with it, for it hangs with its file system.
    names: Pool,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Directory").field(&self.file).finish()
    }
}

/// The name of an image has been given to another file.
fn replaced() -> io::Error {
    io::Error::other("another file has its name now")
}

/// Removes a file if it is there. That is looked at first: a frozen file system has a removal wait, whatever is there.
fn remove(directory: &File, name: &OsString) -> nix::Result<()> {
    let found = fstatat(directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
    if matches!(found, Err(Errno::ENOENT)) {
        return Ok(());
    }
    match unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// Whether what has a name that ends with [`NEW`] was begun by a thinlun: a file that begins as ours do, as far as it was
/// written.
fn is_begun(directory: &File, name: &OsString) -> nix::Result<bool> {
    let found = fstatat(directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Ok(false);
    }
    let file = File::from(openat(directory, name.as_os_str(), LOOK, Mode::empty())?);
    let mut head = Vec::new();
    let read = file.take(HEAD).read_to_end(&mut head);
    read.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    Ok(notes::is_begun(&head) || journal::is_begun(&head))
}

impl Directory {
    /// That of an image, open as `image`, the name of which is resolved already.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(super) fn of(path: &Path, image: &File) -> io::Result<Arc<Self>> {
        let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
        let options = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).clone();
        let metadata = image.metadata()?;
        Ok(Arc::new(Directory {
            file: options.open(directory)?,
            image: path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            path: path.to_owned(),
            names: Pool::new("names", Role::Names, 1),
        }))
    }

    /// The image, for people.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Has somebody who may do it use names, and waits for that.
    fn with_names<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.left_to(|pool, work| pool.run(work).map(drop), work)
    }

    /// The same by a thread that ends with it, where nothing is begun that has to be ended.
    fn with_names_once<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.left_to(Pool::run_apart, work)
    }

    fn left_to<T: Send + 'static>(
        self: &Arc<Self>,
        run: impl FnOnce(&Pool, super::pool::Work) -> io::Result<()>,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if !sandbox::is_entered() {
            return work(self);
        }
        let (done, result) = mpsc::sync_channel(1);
        let on = Arc::clone(self);
        run(&self.names, Box::new(move || drop(done.send(work(&on)))))?;
        result.recv().map_err(|_| ErrorKind::BrokenPipe)?
    }

    /// A file without a name, gone with its descriptor.
    ///
    /// # Errors
    /// If its file system has no such files, or no room.
    pub(super) fn unnamed_file(self: &Arc<Self>) -> io::Result<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        Ok(self.with_names(move |on| Ok(openat(&on.file, ".", flags, OURS)?))?.into())
    }

    /// Makes names last as they are: a file that one who has died has removed, but not so that a crash would not bring it
    /// back, is not found after one.
    ///
    /// # Errors
    /// If the host cannot; not where it has no such call for directories.
    pub(super) fn make_last(&self) -> io::Result<()> {
        match self.file.sync_all() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                Ok(())
            }
            other => other,
        }
    }

    /// Whether the image's name leads to another file now. While it leads nowhere, what is kept under it is still the
    /// image's, and says so.
    fn is_replaced(&self) -> bool {
        fstatat(&self.file, self.image.as_os_str(), AtFlags::empty())
            .is_ok_and(|found| (found.st_dev, found.st_ino) != (self.device, self.inode))
    }

    fn name_of(&self, suffix: &str) -> OsString {
        let mut name = self.image.clone();
        name.push(suffix);
        name
    }

    /// Removes what was begun beside the image and never had its name: where nobody else is at it. What others have put there
    /// stays, and nothing can be kept until they take it away.
    pub(super) fn remove_unfinished<const N: usize>(self: &Arc<Self>, suffixes: [&'static str; N]) {
        let _ = self.with_names_once(move |on| {
            for suffix in suffixes {
                let name = on.name_of(&format!("{suffix}{NEW}"));
                match is_begun(&on.file, &name) {
                    _ if on.is_replaced() => {}
                    Ok(true) => drop(remove(&on.file, &name)),
                    Err(Errno::ENOENT | Errno::ENAMETOOLONG) => {}
                    Ok(false) | Err(_) => {
                        log::warn!("{}: {IN_THE_WAY}", on.path.with_file_name(&name).display());
                    }
                }
            }
            Ok(())
        });
    }

    /// Opens what is kept beside the image under these suffixes. `None` if the image's name is another file's by now: what lies there is not about it.
    ///
    /// # Errors
    /// If something is there and cannot be opened, or the host has no thread for it.
    pub(super) fn look<const N: usize>(
        self: &Arc<Self>,
        suffixes: [&'static str; N],
    ) -> io::Result<Option<[Option<File>; N]>> {
        self.with_names_once(move |on| {
            if on.is_replaced() {
                return Ok(None);
            }
            let mut found = [const { None }; N];
            for (suffix, place) in suffixes.into_iter().zip(&mut found) {
                let name = on.name_of(suffix);
                *place = match openat(&on.file, name.as_os_str(), LOOK, Mode::empty()) {
                    Ok(file) => Some(file.into()),
                    Err(Errno::ENOENT | Errno::ENAMETOOLONG) => None,
                    Err(error) => return Err(error.into()),
                };
            }
            Ok(Some(found))
        })
    }

    /// Tries out whether this thread can keep files beside the image, with names as long as those will be.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn try_out(&self) -> io::Result<()> {
        let name = self.name_of(&format!(".thinlun-{:09x}", std::process::id()));
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.file, name.as_os_str(), flags, OURS) {
            // What another of this number has left.
            Ok(_) | Err(Errno::EEXIST) => Ok(remove(&self.file, &name)?),
            Err(error) => Err(error.into()),
        }
    }
}

/// All bytes of a file, or the first `most` of them; none of no file.
///
/// # Errors
/// If it cannot be read.
pub(super) fn bytes_of(file: Option<File>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(file) = file {
        file.take(most).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// The first bytes of whatever is at `path`, if it can be read at once.
///
/// # Errors
/// If it cannot.
pub(super) fn peek(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(LOOK.bits()).open(path)?;
    bytes_of(Some(file), most)
}

/// Where such a file is, or can be made.
#[derive(Debug)]
pub(super) struct Beside {
    directory: Arc<Directory>,
    name: OsString,
}

/// A file could not be replaced, or removed.
#[derive(Debug)]
pub(super) struct Failed {
    /// Why.
    pub error: io::Error,
    /// It has happened all the same, as far as can be seen; a crash may undo it.
    pub happened: bool,
}

impl Beside {
    /// The file in the directory of the image whose name is that of the image, and `suffix`.
    pub(super) fn of(directory: &Arc<Directory>, suffix: &str) -> Self {
        Beside { directory: Arc::clone(directory), name: directory.name_of(suffix) }
    }

    /// What it is called, for people.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path.with_file_name(&self.name)
    }

    /// Uses names unless what they lead to belongs to another image by now.
    fn with_names<T: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> nix::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.directory.with_names(move |on| match on.is_replaced() {
            true => Err(replaced()),
            false => Ok(work(&on.file)?),
        })
    }

    /// The first `most` bytes of it; none if it is not there.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn read(&self, most: u64) -> io::Result<Vec<u8>> {
        let name = self.name.clone();
        let file =
            self.with_names(move |d| match openat(d, name.as_os_str(), LOOK, Mode::empty()) {
                Ok(file) => Ok(Some(File::from(file))),
                Err(Errno::ENOENT) => Ok(None),
                Err(error) => Err(error),
            })?;
        bytes_of(file, most)
    }

    /// Has a new file, which `fill` fills, take the old one's place. When it returns, a crash changes nothing about it.
    ///
    /// # Errors
    /// If the host cannot keep it.
    pub(super) fn replace(
        &self,
        fill: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), Failed> {
        let mut new = self.name.clone();
        new.push(NEW);
        let failed = |error| Failed { error, happened: false };
        let mut file = self.open_new(&new).map_err(failed)?;
        let made = fill(&mut file).and_then(|()| file.sync_all()).and_then(|()| {
            let (from, to) = (new.clone(), self.name.clone());
            self.with_names(move |d| renameat(d, from.as_os_str(), d, to.as_os_str()))
        });
        if let Err(error) = made {
            // Nothing is left of it, where that can be had.
            let _ = self.with_names(move |d| remove(d, &new));
            return Err(failed(error));
        }
        self.make_last()
    }

    fn make_last(&self) -> Result<(), Failed> {
        self.directory.make_last().map_err(|error| Failed { error, happened: true })
    }

    /// A file of this name that was not there before, or was begun by one of us.
    fn open_new(&self, name: &OsString) -> io::Result<File> {
        let new = name.clone();
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = self.with_names(move |d| match openat(d, new.as_os_str(), flags, OURS) {
            Err(Errno::EEXIST) if is_begun(d, &new)? => {
                remove(d, &new)?;
                openat(d, new.as_os_str(), flags, OURS)
            }
            other => other,
        });
        let file = opened.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => {
                let other = self.directory.path.with_file_name(name);
                io::Error::new(error.kind(), format!("{} {IN_THE_WAY}", other.display()))
            }
            _ => error,
        })?;
        Ok(File::from(file))
    }

    /// Removes it, if it is there. When it returns, a crash does not bring it back.
    ///
    /// # Errors
    /// If it stays, or may come back.
    pub(super) fn remove(&self) -> Result<(), Failed> {
        let name = self.name.clone();
        let removed = self.with_names(move |d| remove(d, &name));
        removed.map_err(|error| Failed { error, happened: false })?;
        self.make_last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    fn image(folder: &Path) -> (PathBuf, Arc<Directory>) {
        let path = folder.join("disk.img");
        fs::write(&path, [0; 512]).unwrap();
        let directory = Directory::of(&path, &File::open(&path).unwrap()).unwrap();
        (path, directory)
    }

    fn names(folder: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| name(entry).unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_could_not_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (_, directory) = image(folder.path());
        let beside = Beside::of(&directory, ".kept");
        beside.replace(|file| file.write_all(b"old")).unwrap();
        let failed = beside.replace(|file| {
            file.write_all(b"secret")?;
            Err(ErrorKind::StorageFull.into())
        });
        assert!(!failed.unwrap_err().happened);
        assert_eq!(names(folder.path()), ["disk.img", "disk.img.kept"]);
        assert_eq!(fs::read(folder.path().join("disk.img.kept")).unwrap(), b"old");
    }

    /// Begun by one who died. Who is not alone there leaves it: somebody may be about to give it its name.
    #[test]
    fn what_was_left_unfinished_goes_when_nobody_else_is_at_it() {
        let folder = tempfile::tempdir().unwrap();
        let (_, directory) = image(folder.path());
        let left = folder.path().join("disk.img.kept.new");
        fs::write(&left, "# thinlun remembers").unwrap();
        fs::write(folder.path().join("disk.img.kept"), "kept").unwrap();
        for alone in [false, true] {
            if alone {
                directory.remove_unfinished([".kept", ".other"]);
            }
            let [kept, other] = directory.look([".kept", ".other"]).unwrap().unwrap();
            assert_eq!(bytes_of(kept, 3).unwrap(), b"kep");
            assert!(other.is_none());
            assert_eq!(left.exists(), !alone);
        }
    }

    /// Where a file of ours was begun there is nothing in it, or what ours begin with, as far as it came.
    #[test]
    fn what_others_have_put_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (_, directory) = image(folder.path());
        let left = folder.path().join("disk.img.kept.new");
        let notes = b"# thinlun remembers this of the image beside it.";
        let mut ours = vec![Vec::new(), b"#".to_vec(), b"thinlun: wri".to_vec(), notes.to_vec()];
        ours.push([&notes[..], b"\nimage=inode:1\n"].concat());
        for magic in [&b"thinlun: writing"[..], b"thinlun: write 2", b"thinlun: write 3"] {
            ours.extend([magic.to_vec(), [magic, &[7; 70_000]].concat()]);
        }
        for bytes in ours {
            fs::write(&left, &bytes).unwrap();
            directory.remove_unfinished([".kept"]);
            assert!(!left.exists(), "{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(60)]));
        }
        let beside = Beside::of(&directory, ".kept");
        let stays = |what: &str| {
            directory.remove_unfinished([".kept"]);
            beside.replace(|file| file.write_all(b"ours")).unwrap_err();
            beside.remove().unwrap();
            assert!(left.symlink_metadata().is_ok(), "{what}");
        };
        for foreign in ["\n", "secret", "# thinlun remembers nothing", "thinlun: write 4", "##"] {
            fs::write(&left, foreign).unwrap();
            stays(foreign);
            assert_eq!(fs::read_to_string(&left).unwrap(), foreign);
            fs::remove_file(&left).unwrap();
        }
        // Nor is anything followed, or waited for.
        let target = folder.path().join("target");
        for text in ["", "thinlun: write 2"] {
            fs::write(&target, text).unwrap();
            std::os::unix::fs::symlink(&target, &left).unwrap();
            stays("a link");
            assert_eq!(fs::read_to_string(&target).unwrap(), text);
            fs::remove_file(&left).unwrap();
        }
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &left).unwrap();
        stays("a link that leads nowhere");
        fs::remove_file(&left).unwrap();
        nix::unistd::mkfifo(&left, OURS).unwrap();
        stays("a FIFO");
        fs::remove_file(&left).unwrap();
        fs::create_dir(&left).unwrap();
        stays("a directory");
        fs::remove_dir(&left).unwrap();
        // Another name of it is another's.
        fs::write(&target, "thinlun: write 2, and more").unwrap();
        fs::hard_link(&target, &left).unwrap();
        beside.replace(|file| file.write_all(b"ours")).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "thinlun: write 2, and more");
        assert_eq!(fs::read(beside.path()).unwrap(), b"ours");
    }

    /// The name of the image has been given to another file, to which then belongs what lies beside it.
    #[test]
    fn what_belongs_to_another_image_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let (path, directory) = image(folder.path());
        let beside = Beside::of(&directory, ".kept");
        // Without a name it has kept its own.
        fs::rename(&path, folder.path().join("moved.img")).unwrap();
        beside.replace(|file| file.write_all(b"old")).unwrap();
        fs::write(&path, [1; 512]).unwrap();
        fs::write(beside.path(), "another's").unwrap();
        assert!(directory.look([".kept"]).unwrap().is_none());
        assert!(!beside.replace(|file| file.write_all(b"new")).unwrap_err().happened);
        beside.remove().unwrap_err();
        assert_eq!(fs::read(beside.path()).unwrap(), b"another's");
        assert_eq!(names(folder.path()), ["disk.img", "disk.img.kept", "moved.img"]);
        // As it was.
        fs::rename(folder.path().join("moved.img"), &path).unwrap();
        beside.remove().unwrap();
        assert_eq!(names(folder.path()), ["disk.img"]);
    }

    #[test]
    fn trying_out_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (_, directory) = image(folder.path());
        let left = format!("disk.img.thinlun-{:09x}", std::process::id());
        directory.try_out().unwrap();
        fs::write(folder.path().join(left), "").unwrap();
        directory.try_out().unwrap();
        assert_eq!(names(folder.path()), ["disk.img"]);
        // A name for which there would be no room.
        let long = folder.path().join("n".repeat(250));
        fs::write(&long, [0; 512]).unwrap();
        let directory = Directory::of(&long, &File::open(&long).unwrap()).unwrap();
        assert_eq!(directory.try_out().unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
        assert!(directory.look([".kept"]).unwrap().is_some_and(|[kept]| kept.is_none()));
    }
}
