//! What the host's calls do to files of one kind, tried out on one of them before a disk relies on it. A call that is there
//! need not do what it says: lseek on ext4 does not see what waits to be written in a file without extents, and a FUSE
//! server may answer any call by doing nothing.
//!
//! It is an unnamed file beside the image that is tried, made to be what the image is (flags, extent size). The image itself
//! stays as it is. Where there can be no such file, only what is known of Linux's own file systems is believed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::{Deref, Range};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{self, FsType, fstatfs};

use super::extents::Host as _;
use super::space::{DEALLOCATE, RESERVE, Way, is_missing};
use super::{fiemap, sys};

/// What lseek knows of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Seek {
    /// All of it.
    Sees,
    /// What has been flushed.
    SeesWhatIsFlushed,
    /// Not all of it, or there is no such call.
    Lies,
}

/// What was found out about files of a kind. Of a ladder it is the first rung that does what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) seek: Seek,
    pub(super) deallocate: usize,
    pub(super) reserve: usize,
    /// Space that was reserved is told by FIEMAP.
    pub(super) reserves: bool,
    /// copy_file_range copies.
    pub(super) offloads: bool,
}

/// What makes files of one file system differ in what can be done to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Nature {
    /// FS_IOC_GETFLAGS, where there is that.
    flags: Option<u32>,
    /// FS_IOC_FSGETXATTR, where there is that: flags and extent size.
    extended: Option<(u32, u32)>,
}

/// FS_EXTENT_FL, FS_NOCOW_FL, FS_COMPR_FL, FS_NOCOMP_FL, FS_JOURNAL_DATA_FL, FS_DAX_FL, FS_ENCRYPT_FL, FS_INLINE_DATA_FL.
const FLAGS: u32 = EXTENTS | 0x80_0000 | 0x4 | 0x400 | 0x4000 | 0x200_0000 | 0x800 | 0x1000_0000;
const EXTENTS: u32 = 0x8_0000;
/// FS_XFLAG_REALTIME, FS_XFLAG_EXTSIZE, FS_XFLAG_DAX, FS_XFLAG_COWEXTSIZE.
const EXTENDED: u32 = 0x1 | 0x800 | 0x8000 | 0x1_0000;

impl Nature {
    fn of(file: &File) -> Self {
        let flags = sys::flags(file).ok().map(|flags| flags & FLAGS);
        let extended = sys::extended_flags(file).ok();
        let extended = extended.map(|all| (all.flags & EXTENDED, all.extent_size));
        Nature { flags, extended }
    }

    /// Makes an empty file be of this nature, as far as it can be.
    fn give(&self, to: &File) {
        if let (Some(wanted), Ok(flags)) = (self.flags, sys::flags(to))
            && flags & FLAGS != wanted
        {
            let _ = sys::set_flags(to, flags & !FLAGS | wanted);
        }
        if let (Some((wanted, extent_size)), Ok(mut all)) = (self.extended, sys::extended_flags(to))
            && (all.flags & EXTENDED, all.extent_size) != (wanted, extent_size)
        {
            (all.flags, all.extent_size) = (all.flags & !EXTENDED | wanted, extent_size);
            let _ = sys::set_extended_flags(to, &all);
        }
    }
}

/// Where an image and what is tried in its place lie, and what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    file_system: u64,
    device: u64,
    unit: u64,
    nature: Nature,
}

/// What can be done to the files of a kind is found out once, for as long as one of them is open: then it is the same file
/// system that is mounted there.
static KNOWN: Mutex<Option<HashMap<Kind, Weak<Verdict>>>> = Mutex::new(None);

impl Verdict {
    /// Nothing is to be believed.
    const NOTHING: Self = Verdict {
        seek: Seek::Lies,
        deallocate: DEALLOCATE.len() - 1,
        reserve: RESERVE.len() - 1,
        reserves: false,
        offloads: false,
    };

    const ALL: Self =
        Verdict { seek: Seek::Sees, deallocate: 0, reserve: 0, reserves: true, offloads: true };

    /// What is known of the file system of a file without trying.
    pub(super) fn untried(file: &File) -> Self {
        let Ok(host) = fstatfs(file) else { return Self::NOTHING };
        let is = |kinds: &[FsType]| kinds.contains(&host.filesystem_type());
        if is(&[statfs::XFS_SUPER_MAGIC, statfs::BTRFS_SUPER_MAGIC, statfs::TMPFS_MAGIC]) {
            return Self::ALL;
        }
        if is(&[statfs::EXT4_SUPER_MAGIC]) {
            let has_extents = sys::flags(file).is_ok_and(|flags| flags & EXTENTS != 0);
            let seek = if has_extents { Seek::Sees } else { Seek::SeesWhatIsFlushed };
            return Verdict { seek, ..Self::ALL };
        }
        if is(&[statfs::NFS_SUPER_MAGIC]) {
            return Verdict { seek: Seek::SeesWhatIsFlushed, ..Self::NOTHING };
        }
        Self::NOTHING
    }

    /// What can be done to an image that has its name in this directory and blocks of `unit` bytes.
    pub(super) fn of(image: &File, directory: &Path, unit: u64) -> Arc<Self> {
        let nature = Nature::of(image);
        let kind = || -> io::Result<Kind> {
            let statvfs = nix::sys::statvfs::fstatvfs(image)?;
            let device = image.metadata()?.dev();
            Ok(Kind { file_system: statvfs.filesystem_id(), device, unit, nature })
        };
        let Ok(kind) = kind() else { return Arc::new(Self::untried(image)) };
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        known.retain(|_, verdict| verdict.strong_count() > 0);
        if let Some(verdict) = known.get(&kind).and_then(Weak::upgrade) {
            return verdict;
        }
        let trial = Trial { directory, device: kind.device, nature, unit };
        match trial.verdict(Self::untried(image)) {
            Ok(verdict) => {
                let verdict = Arc::new(verdict);
                known.insert(kind, Arc::downgrade(&verdict));
                verdict
            }
            Err(error) => {
                log::debug!("{}: nothing can be tried there: {error}", directory.display());
                Arc::new(Self::untried(image))
            }
        }
    }
}

/// Files of one nature in a directory.
struct Trial<'a> {
    directory: &'a Path,
    device: u64,
    nature: Nature,
    /// Bytes of a block of the host.
    unit: u64,
}

/// Blocks of the host at which a write is looked for: where ext4 without extents has direct, indirect, and doubly indirect
/// blocks. From behind, so that nothing in front of it leads there.
const PLACES: [u64; 5] = [2100, 1040, 300, 13, 5];
/// A range that is reserved first, in blocks of the host, and where in it is written.
const RESERVED: Range<u64> = 20..40;
const IN_RESERVED: u64 = 30;
/// Bytes of such a write.
const WRITE: usize = 512;
/// Answers of lseek that are looked at.
const MOST: usize = 64;

impl Trial<'_> {
    /// # Errors
    /// If there can be no file to try it on, or it is not of the image's kind.
    fn verdict(&self, untried: Verdict) -> io::Result<Verdict> {
        let file = self.file()?;
        let seek = self.seek(&file)?;
        // What it is shows when it holds something.
        if Nature::of(&file) != self.nature {
            return Err(ErrorKind::Unsupported.into());
        }
        // A host that is full, or fails in another way, has no say.
        let rung = |ways: &[(&str, Way)], untried: usize| {
            let (_, tried) = ways.split_last().map_or((0, ways), |(_, tried)| (0, tried));
            for (rung, (_, way)) in tried.iter().enumerate() {
                match self.zeroes(*way) {
                    Ok(true) => return rung,
                    Ok(false) => {}
                    Err(_) => return untried.max(rung),
                }
            }
            tried.len()
        };
        let (deallocate, reserve) =
            (rung(DEALLOCATE, untried.deallocate), rung(RESERVE, untried.reserve));
        let reserves = RESERVE.get(reserve).is_some_and(|(_, way)| self.reserves(*way));
        let offloads = self.offloads().unwrap_or(untried.offloads);
        Ok(Verdict { seek, deallocate, reserve, reserves, offloads })
    }

    /// A new file.
    fn file(&self) -> io::Result<Scratch> {
        let file = Scratch::new(self.directory)?;
        // A file that is mounted over, or a link to one elsewhere, is not in this file system.
        if file.metadata()?.dev() != self.device {
            return Err(ErrorKind::CrossesDevices.into());
        }
        self.nature.give(&file);
        Ok(file)
    }

    fn seek(&self, file: &File) -> io::Result<Seek> {
        let mut written = Vec::new();
        let mut sees = true;
        file.set_len((PLACES[0] + 1) * self.unit)?;
        for place in PLACES {
            file.write_all_at(&[0xa5; WRITE], place * self.unit)?;
            written.push(place * self.unit);
            sees &= sees_data(file, &written);
        }
        let reserved = RESERVED.start * self.unit..RESERVED.end * self.unit;
        if sys::allocate(file, reserved.start, reserved.end - reserved.start).is_ok() {
            // On the disk, so that what is fresh is a write alone.
            file.sync_data()?;
            file.write_all_at(&[0xa5; WRITE], IN_RESERVED * self.unit)?;
            written.push(IN_RESERVED * self.unit);
            sees &= sees_data(file, &written);
        }
        file.sync_data()?;
        Ok(match (sees, sees_data(file, &written)) {
            (_, false) => Seek::Lies,
            (false, true) => Seek::SeesWhatIsFlushed,
            (true, true) => Seek::Sees,
        })
    }

    /// Whether a way makes ranges zeroes, and leaves everything else as it was.
    fn zeroes(&self, way: Way) -> io::Result<bool> {
        let (file, unit) = (self.file()?, self.unit);
        let mut expected = pattern(16 * unit);
        file.write_all_at(&expected, 0)?;
        let part = unit / 4;
        let fresh =
            [2 * unit..4 * unit, 6 * unit + part..7 * unit - part, 8 * unit..8 * unit + part];
        let flushed = [10 * unit..12 * unit, 13 * unit + part..14 * unit + part];
        for ranges in [fresh.as_slice(), flushed.as_slice()] {
            for range in ranges {
                match way(&file, range) {
                    Err(error) if is_missing(&error) => return Ok(false),
                    done => done?,
                }
                let range = usize::try_from(range.start).unwrap_or(0)
                    ..usize::try_from(range.end).unwrap_or(0);
                if let Some(bytes) = expected.get_mut(range) {
                    bytes.fill(0);
                }
            }
            if !holds(&file, &expected)? {
                return Ok(false);
            }
            file.sync_data()?;
            // What the medium has.
            let _ = posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        // Behind its end, as it is tried on the image.
        way(&file, &(16 * unit..17 * unit))?;
        holds(&file, &expected)
    }

    /// Whether a way takes space for a hole that is told as space that was not written.
    fn reserves(&self, way: Way) -> bool {
        let tried = || -> io::Result<bool> {
            let file = self.file()?;
            let range = 4 * self.unit..8 * self.unit;
            file.set_len(16 * self.unit)?;
            way(&file, &range)?;
            file.sync_data()?;
            let mut at = range.start;
            for extent in fiemap::mapped(&file, range.clone(), MOST)? {
                if extent.unwritten && extent.start <= at {
                    at = at.max(extent.end);
                }
            }
            Ok(at >= range.end)
        };
        tried().unwrap_or(false)
    }

    /// Whether copy_file_range copies what it says.
    fn offloads(&self) -> io::Result<bool> {
        let (from, to, unit) = (self.file()?, self.file()?, self.unit);
        let source = pattern(4 * unit);
        from.write_all_at(&source, 0)?;
        to.set_len(6 * unit)?;
        let mut done = 0;
        while done < 4 * unit {
            match super::file::offload(&from, done, &to, unit + done, 4 * unit - done) {
                // There is no such call: another way is found when it is used.
                Ok(0) | Err(_) => break,
                Ok(more) => done += more,
            }
        }
        let done = usize::try_from(done).unwrap_or(0);
        let mut found = vec![0; done];
        to.read_exact_at(&mut found, unit)?;
        Ok(source.get(..done) == Some(found.as_slice()))
    }
}

/// Bytes that are not the same in any two blocks.
fn pattern(len: u64) -> Vec<u8> {
    let byte = |at: u64| u8::try_from((at / 512 * 7 + at) % 251).unwrap_or(0) | 1;
    (0..len).map(byte).collect()
}

/// Whether a file holds these bytes, and has not become shorter or longer.
fn holds(file: &File, expected: &[u8]) -> io::Result<bool> {
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0)?;
    Ok(found == expected && file.metadata()?.len() == expected.len() as u64)
}

/// Whether lseek, asked from the start on, finds data at all of these places.
fn sees_data(file: &File, places: &[u64]) -> bool {
    let (mut at, mut found) = (0, Vec::new());
    for _ in 0..MOST {
        match file.next_data(at) {
            Ok(Some(data)) => match file.next_hole(data) {
                Ok(hole) if hole > data && data >= at => {
                    found.push(data..hole);
                    at = hole;
                }
                _ => return false,
            },
            Ok(None) => break,
            Err(_) => return false,
        }
    }
    places.iter().all(|place| found.iter().any(|range| range.contains(place)))
}

/// A file to try things on, gone with this value.
struct Scratch {
    file: File,
    /// A name that it could not lose at once.
    name: Option<PathBuf>,
}

impl Scratch {
    /// One without a name; where the file system has no such files, one that loses it at once; where it needs that for its
    /// answers, later.
    fn new(directory: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
            Ok(file) => return Ok(Scratch { file, name: None }),
            Err(error) => match error.raw_os_error() {
                // open(2): what old file systems answer, too.
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL) => {}
                _ => return Err(error),
            },
        }
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".thinlun-trial-{}-{number}", std::process::id()));
        options.create_new(true);
        let file = options.open(&path)?;
        std::fs::remove_file(&path)?;
        if file.set_len(1).and_then(|()| file.set_len(0)).is_ok() {
            return Ok(Scratch { file, name: None });
        }
        let file = options.open(&path)?;
        Ok(Scratch { file, name: Some(path) })
    }
}

impl Deref for Scratch {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}
