//! Writes that a crash of the host leaves whole or not begun, on any file system: what is to be written is put into a
//! file beside the image first, `IMAGE.thinlun-write`, which is there from before the image is changed until it has
//! been. If it is there at the start, the write is made again.
//!
//! A write that is made again at the wrong place or time destroys what was written since. So the file says which image it
//! is about, and which parts of it the write would change: where none of these holds what was to be written, it had not
//! begun, or the image is another or an older one, and the journal is void.

use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::beside::{Beside, Directory, Failed};
use super::identity::Identity;
use super::{Buffers, Cause, Piece, StoreError, notes, sys};

/// What the file's name has more than the image's.
pub(super) const SUFFIX: &str = ".thinlun-write";

/// Longest write that is put into it, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// Longest file that is read: one byte more than is ever written, so that a longer one is known from it.
pub(super) const MAX_FILE: u64 = (MAX_BYTES + size_of::<Header>() + 1) as u64;

/// What the device writes whole, in bytes.
const SECTOR: usize = 512;

const MAGIC: [u8; 16] = *b"thinlun: write 2";
/// Of a thinlun that did not say which image a journal is about.
const OLD_MAGIC: [u8; 16] = *b"thinlun: writing";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Place {
    magic: [u8; 16],
    offset: U64,
    len: U64,
}

/// What the file begins with; the old ones with its first part only.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    place: Place,
    /// The image's identity as text, with zeroes behind it.
    image: [u8; 96],
    /// The sectors that the write changes, a bit each.
    changes: Changes,
}

/// Sectors of a write.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Changes([u8; MAX_BYTES / SECTOR / 8]);

impl Changes {
    fn set(&mut self, sector: usize) {
        if let Some(byte) = self.0.get_mut(sector / 8) {
            *byte |= 1 << (sector % 8);
        }
    }

    fn has(&self, sector: usize) -> bool {
        self.0.get(sector / 8).is_some_and(|byte| byte & 1 << (sector % 8) != 0)
    }
}

/// The image, for whoever makes a write again.
pub(super) struct Image<'a> {
    pub(super) identity: &'a Identity,
    /// Take a journal about another image for one about this.
    pub(super) adopt: bool,
    pub(super) read_only: bool,
    pub(super) size: u64,
    pub(super) read: &'a dyn Fn(u64, &Buffers) -> io::Result<()>,
    /// Writes, and has it reach the medium.
    pub(super) write: &'a dyn Fn(u64, &Buffers) -> io::Result<()>,
}

/// The journal of one image: one write at a time.
#[derive(Debug)]
pub(super) struct Journal {
    beside: Beside,
    image: Identity,
    /// Held while a write is made.
    writing: Mutex<()>,
    /// The range of one that has failed halfway, or that may still be found in the journal: nobody uses it before that
    /// write is made again and the journal gone, else the next start would write old bytes over newer ones. Changed by who
    /// writes; who looks at it does not wait for the host.
    unfinished: Mutex<Option<Range<u64>>>,
    /// Whether there is such a range.
    is_unfinished: AtomicBool,
    /// A file that is of no use any more could not be removed.
    left: AtomicBool,
}

/// A write as it is found in the file.
pub(super) struct Entry<'a> {
    offset: u64,
    data: &'a [u8],
    /// Which image it is about and what of it would change, where that is said.
    about: Option<(Identity, &'a Changes)>,
}

impl<'a> Entry<'a> {
    fn parse(file: &'a [u8]) -> Option<Self> {
        let (place, old_data) = Place::ref_from_prefix(file).ok()?;
        let (about, data) = match place.magic {
            OLD_MAGIC => (None, old_data),
            MAGIC => {
                let (header, data) = Header::ref_from_prefix(file).ok()?;
                let image = header.image.split(|byte| *byte == 0).next().unwrap_or_default();
                let image = std::str::from_utf8(image).ok()?.parse().ok()?;
                (Some((image, &header.changes)), data)
            }
            _ => return None,
        };
        let fits = place.len.get() == data.len() as u64 && data.len() <= MAX_BYTES;
        fits.then_some(Entry { offset: place.offset.get(), data, about })
    }

    /// Whether any of it may be in the image: a sector that it changes is as it was to be, or cannot be read.
    fn may_have_begun(&self, image: &Image<'_>) -> io::Result<bool> {
        let room = Piece::of(self.data.len()).ok_or(ErrorKind::OutOfMemory)?;
        for (number, new) in self.data.chunks(room.len().max(SECTOR)).enumerate() {
            let first = number * room.len() / SECTOR;
            let at = self.offset.saturating_add((number * room.len()) as u64);
            let found = room.slice(0, new.len());
            let read = (image.read)(at, &found).is_ok();
            let mut sector = [0; SECTOR];
            for (n, new) in new.chunks(SECTOR).enumerate() {
                // Behind the end of the image nothing is as it was to be.
                let inside = at.saturating_add(((n + 1) * SECTOR) as u64) <= image.size;
                found.read_at(n * SECTOR, &mut sector);
                let same = sector.get(..new.len()) == Some(new);
                let changes = self.about.as_ref().is_none_or(|(_, changes)| changes.has(first + n));
                if changes && inside && (same || !read) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl Journal {
    /// The journal of an image, in its directory; of what lies there already, [`Journal::recover`] takes care.
    pub(super) fn of(directory: &Arc<Directory>, image: Identity) -> Self {
        let beside = Beside::of(directory, SUFFIX);
        let no = || AtomicBool::new(false);
        let (writing, unfinished) = (Mutex::default(), Mutex::default());
        Journal { beside, image, writing, unfinished, is_unfinished: no(), left: no() }
    }

    /// Has the write that was not finished, if there is one in the file, made again. Of an image that is written to.
    ///
    /// # Errors
    /// If it cannot be made, is none of ours, or is about another image; then it is there still.
    pub(super) fn recover(&self, file: &[u8], image: &Image<'_>) -> io::Result<()> {
        let _alone = self.alone();
        match look(file, image)? {
            // Whatever this process has left there, another has taken away.
            Found::Nothing => {
                self.left.store(false, Ordering::Release);
                self.set_unfinished(None);
                return Ok(());
            }
            Found::Void => {
                let file = self.beside.path();
                log::info!("{}: nothing of it is in the image: it goes", file.display());
            }
            Found::Unfinished(Entry { offset, data, .. }) => {
                let bytes = Buffers::copy_of(data).ok_or(ErrorKind::OutOfMemory)?;
                (image.write)(offset, &bytes)?;
                let len = data.len();
                log::info!("a write that the host did not finish was made again ({len} bytes)");
            }
        }
        self.discard()?;
        self.set_unfinished(None);
        Ok(())
    }

    /// Whether a write has failed halfway.
    #[inline]
    pub(super) fn is_unfinished(&self) -> bool {
        self.is_unfinished.load(Ordering::Acquire)
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unfinished(&self) -> Option<Range<u64>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_unfinished(&self, range: Option<Range<u64>>) {
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_unfinished.store(range.is_some(), Ordering::Release);
        *unfinished = range;
    }

    /// Before somebody uses a range: if a write to it has failed halfway, it is made again, by `write`, which has it reach
    /// the medium.
    ///
    /// # Errors
    /// If that fails again; then the range cannot be used yet.
    pub(super) fn finish(
        &self,
        range: &Range<u64>,
        write: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let concerned = || {
            let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
            self.is_unfinished() && self.unfinished().as_ref().is_some_and(overlaps)
        };
        if !concerned() {
            return Ok(());
        }
        let _alone = self.alone();
        if concerned() { self.finish_that(write) } else { Ok(()) }
    }

    /// Makes the write that has failed halfway again, if there is one. By who is alone.
    fn finish_that(
        &self,
        write: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Some(start) = self.unfinished().map(|range| range.start) else { return Ok(()) };
        let kept = |e: io::Error| StoreError::at(Cause::from(&e), start);
        // It is the one that this process has put there, or none: it may have been removed before, but not so that a
        // crash would not bring it back.
        let file = self.beside.read(MAX_FILE).map_err(kept)?;
        if let Some(Entry { offset, data, .. }) = Entry::parse(&file) {
            let data = Buffers::copy_of(data).ok_or(StoreError::at(Cause::Busy, start))?;
            write(offset, &data)?;
            log::info!("the write of {} bytes at {offset} has been made after all", data.len());
        }
        self.discard().map_err(kept)?;
        self.set_unfinished(None);
        Ok(())
    }

    /// Makes a write by `write`, which has to have it reach the medium before it returns. `read` says what is there now.
    ///
    /// # Errors
    /// If the journal cannot be kept, and then nothing was written, or those of `write`: then it is made again before
    /// anybody uses its range, be it by the next process.
    pub(super) fn write(
        &self,
        offset: u64,
        from: &Buffers,
        read: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
        write: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let _alone = self.alone();
        self.finish_that(&write)?;
        let leave = |error| {
            log::error!(
                "a write of {} bytes at {offset} that is to be whole or not begun has failed halfway ({error}): nobody \
                 gets at these blocks before it is made again",
                from.len()
            );
            self.set_unfinished(Some(offset..offset.saturating_add(from.len() as u64)));
            error
        };
        let kept = |e: io::Error| StoreError::at(Cause::from(&e), offset);
        let changes = changes(offset, from, read)?;
        let header = Header::new(offset, from.len(), &self.image, changes);
        let filled = self.beside.replace(|file| {
            file.write_all(header.as_bytes())?;
            let mut done = 0;
            while done < from.len() {
                match sys::write(file, size_of::<Header>() as u64, from, done) {
                    Ok(0) => return Err(ErrorKind::WriteZero.into()),
                    Ok(more) => done += more,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        if let Err(Failed { error, happened }) = filled {
            // It is refused, and must not be made by the next who looks.
            return Err(match happened.then(|| self.discard()) {
                None | Some(Ok(())) => kept(error),
                Some(Err(_)) => leave(kept(error)),
            });
        }
        // What may have been left there is no more.
        self.left.store(false, Ordering::Release);
        // Once more: the journal has all of it, and the old bytes are gone.
        write(offset, from).or_else(|_| write(offset, from)).map_err(leave)?;
        self.discard().map_err(kept).map_err(leave)
    }

    /// Removes the file, which is of no use any more.
    fn discard(&self) -> io::Result<()> {
        let removed = self.beside.remove().map_err(|failed| failed.error);
        self.left.store(removed.is_err(), Ordering::Release);
        if let Err(error) = &removed {
            let (file, why) = (self.beside.path(), super::file::plain(error));
            log::error!(
                "{}: cannot be removed: {why}; nothing is stable before it is",
                file.display()
            );
        }
        removed
    }

    /// Whether a file of no use lies there that could not be removed.
    pub(super) fn is_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// As if the file could not be removed.
    #[cfg(test)]
    pub(super) fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }

    /// What is stable from now on must not be written over by the next who looks: a file that was left goes.
    ///
    /// # Errors
    /// If it stays.
    pub(super) fn settle(&self) -> io::Result<()> {
        if !self.is_left() {
            return Ok(());
        }
        let _alone = self.alone();
        if self.is_left() {
            // Its write was made, or refused.
            self.discard()?;
            self.set_unfinished(None);
        }
        Ok(())
    }
}

impl Header {
    fn new(offset: u64, len: usize, image: &Identity, changes: Changes) -> Self {
        let place = Place { magic: MAGIC, offset: U64::new(offset), len: U64::new(len as u64) };
        let mut text = [0; 96];
        let _ = text.as_mut_slice().write_all(image.to_string().as_bytes());
        Header { place, image: text, changes }
    }
}

/// The sectors that a write changes: all of those that cannot be read.
fn changes(
    offset: u64,
    from: &Buffers,
    read: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
) -> Result<Changes, StoreError> {
    let mut changes = Changes([0; MAX_BYTES / SECTOR / 8]);
    let room = Piece::of(from.len()).ok_or(StoreError::at(Cause::Busy, offset))?;
    let (mut old, mut new) = ([0; SECTOR], [0; SECTOR]);
    for start in (0..from.len()).step_by(room.len().max(SECTOR)) {
        let found = room.slice(0, from.len() - start);
        let known = read(offset + start as u64, &found).is_ok();
        for at in (0..found.len()).step_by(SECTOR) {
            found.read_at(at, &mut old);
            from.read_at(start + at, &mut new);
            if !known || old != new {
                changes.set((start + at) / SECTOR);
            }
        }
    }
    Ok(changes)
}

/// What a file asks for.
pub(super) enum Found<'a> {
    /// There is none.
    Nothing,
    /// The write had not begun, or was of an image that is not there any more.
    Void,
    /// This write is to be made again.
    Unfinished(Entry<'a>),
}

/// What is in the file.
///
/// # Errors
/// If nobody but a person can say what to do with it: why, and what there is to do.
pub(super) fn look<'a>(file: &'a [u8], image: &Image<'_>) -> io::Result<Found<'a>> {
    if file.is_empty() {
        return Ok(Found::Nothing);
    }
    let foreign = || io::Error::new(ErrorKind::InvalidData, "not a journal of thinlun");
    let entry = Entry::parse(file).ok_or_else(foreign)?;
    if !entry.may_have_begun(image)? {
        return Ok(Found::Void);
    }
    if let Some((about, _)) = &entry.about
        && !about.may_be(image.identity)
        && !image.adopt
    {
        return Err(notes::of_another(about));
    }
    let end = entry.offset.saturating_add(entry.data.len() as u64);
    if end > image.size {
        return Err(io::Error::other(format!(
            "it holds a write of bytes {} to {end} that was interrupted, and the image has {}: give it the length \
             that it had, or remove that file if the image is another one",
            entry.offset, image.size
        )));
    }
    if image.read_only {
        let why = "holds a write that was interrupted; serve the image writable once";
        return Err(io::Error::new(ErrorKind::ReadOnlyFilesystem, why));
    }
    Ok(Found::Unfinished(entry))
}

/// Which image a file says that it is about, if it is one of ours and says so.
pub(super) fn image_of(file: &[u8]) -> Option<Identity> {
    let (header, _) = Header::ref_from_prefix(file).ok().filter(|(h, _)| h.place.magic == MAGIC)?;
    let image = header.image.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(image).ok()?.parse().ok()
}

/// Whether a file is one of ours, whatever it says.
pub(super) fn is_ours(file: &[u8]) -> bool {
    file.is_empty() || [MAGIC, OLD_MAGIC].iter().any(|magic| file.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    const SIZE: usize = 1 << 20;

    /// An image of ones, and its journal.
    struct Disk {
        folder: tempfile::TempDir,
        path: PathBuf,
        file: PathBuf,
    }

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    impl Disk {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk.img");
            let file = folder.path().join("disk.img.thinlun-write");
            fs::write(&path, [1; SIZE]).unwrap();
            Disk { folder, path, file }
        }

        fn journal(&self) -> Journal {
            let image = open(&self.path);
            let directory = Directory::of(&self.path, &image).unwrap();
            Journal::of(&directory, Identity::of(&image).unwrap())
        }

        /// Writes, up to byte `torn` of it; returns what the journal was meanwhile.
        fn write(&self, offset: u64, data: &[u8], torn: usize) -> Vec<u8> {
            let (image, from) = (open(&self.path), Buffers::copy_of(data).unwrap());
            let read = |at: u64, into: &Buffers| {
                let mut bytes = vec![0; into.len()];
                image.read_exact_at(&mut bytes, at).unwrap();
                into.write_at(0, &bytes);
                Ok(())
            };
            let file = std::cell::RefCell::new(Vec::new());
            let write = |_: u64, _: &Buffers| {
                // The image is changed, if at all, only while the journal is there.
                file.replace(fs::read(&self.file).unwrap());
                image.write_all_at(&data[..torn], offset).unwrap();
                Ok(())
            };
            self.journal().write(offset, &from, read, write).unwrap();
            assert!(!self.file.exists());
            file.into_inner()
        }

        /// Finds a journal at the next start.
        fn find(&self, file: &[u8], adopt: bool, read_only: bool) -> io::Result<()> {
            fs::write(&self.file, file).unwrap();
            let image = open(&self.path);
            let size = image.metadata().unwrap().len();
            let read = |at: u64, into: &Buffers| {
                let mut bytes = vec![0; into.len()];
                let there = size.saturating_sub(at).min(bytes.len() as u64) as usize;
                image.read_exact_at(&mut bytes[..there], at)?;
                into.write_at(0, &bytes);
                Ok(())
            };
            let write = |at: u64, data: &Buffers| image.write_all_at(&data.to_vec(data.len()), at);
            let identity = Identity::of(&image).unwrap();
            let (read, write) = (&read, &write);
            let found = Image { identity: &identity, adopt, read_only, size, read, write };
            self.journal().recover(file, &found)
        }

        fn bytes(&self) -> Vec<u8> {
            fs::read(&self.path).unwrap()
        }

        /// Whether the image holds `value` from `start` to `end`, and ones around that.
        #[track_caller]
        fn assert_holds(&self, start: usize, end: usize, value: u8) {
            let bytes = self.bytes();
            let expected = |n: usize| if (start..end).contains(&n) { value } else { 1 };
            let wrong = bytes.iter().enumerate().find(|(n, byte)| **byte != expected(*n));
            assert_eq!(wrong, None);
        }

        /// Another file takes its name.
        fn replace(&self, bytes: &[u8]) {
            let other = self.folder.path().join("other.img");
            fs::write(&other, bytes).unwrap();
            fs::rename(&other, &self.path).unwrap();
        }
    }

    #[test]
    fn a_write_that_was_cut_off_is_made_again() {
        for torn in [512, 700, 1024, 2048] {
            let disk = Disk::new();
            let file = disk.write(1024, &[2; 2048], torn);
            disk.find(&file, false, true).unwrap_err();
            assert!(disk.file.exists());
            disk.find(&file, false, false).unwrap();
            assert!(!disk.file.exists());
            disk.assert_holds(1024, 3072, 2);
        }
        // The longest, of which only the last sector was written.
        let disk = Disk::new();
        let file = disk.write(0, &[2; MAX_BYTES], 0);
        open(&disk.path).write_all_at(&[2; 512], MAX_BYTES as u64 - 512).unwrap();
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(0, MAX_BYTES, 2);
    }

    /// It had not begun, or the image holds something that is newer or older.
    #[test]
    fn a_write_of_which_nothing_is_there_is_void() {
        let disk = Disk::new();
        let file = disk.write(1024, &[2; 2048], 0);
        disk.find(&file, false, false).unwrap();
        assert!(!disk.file.exists());
        disk.assert_holds(0, 0, 0);
        let disk = Disk::new();
        let file = disk.write(1024, &[2; 2048], 2048);
        open(&disk.path).write_all_at(&[3; 2048], 1024).unwrap();
        disk.find(&file, false, false).unwrap();
        assert!(!disk.file.exists());
        disk.assert_holds(1024, 3072, 3);
        // Parts that it does not change prove nothing.
        let mut data = [1; 2048];
        data[..512].fill(2);
        let disk = Disk::new();
        let file = disk.write(1024, &data, 2048);
        disk.assert_holds(1024, 1536, 2);
        open(&disk.path).write_all_at(&[1; 512], 1024).unwrap();
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(0, 0, 0);
    }

    /// The image has been replaced by name, or written over in place.
    #[test]
    fn another_image_is_not_written_to() {
        for in_place in [false, true] {
            let disk = Disk::new();
            let file = disk.write(1024, &[2; 2048], 700);
            let restored = vec![1; SIZE];
            match in_place {
                true => fs::write(&disk.path, &restored).unwrap(),
                false => disk.replace(&restored),
            }
            disk.find(&file, false, false).unwrap();
            assert!(!disk.file.exists());
            disk.assert_holds(0, 0, 0);
        }
        // A copy that was made of both, in the middle of it.
        let disk = Disk::new();
        let file = disk.write(1024, &[2; 2048], 700);
        let copy = disk.bytes();
        disk.replace(&copy);
        let why = disk.find(&file, false, false).unwrap_err().to_string();
        assert!(why.contains("another image (inode:") && why.contains("adopt"), "{why}");
        assert!(disk.file.exists() && disk.bytes() == copy);
        disk.find(&file, true, false).unwrap();
        assert!(!disk.file.exists());
        disk.assert_holds(1024, 3072, 2);
    }

    #[test]
    fn an_image_that_has_become_too_short_is_not_made_longer() {
        let disk = Disk::new();
        let file = disk.write(1024, &[2; 2048], 1024);
        open(&disk.path).set_len(2048).unwrap();
        for adopt in [false, true] {
            let why = disk.find(&file, adopt, false).unwrap_err().to_string();
            assert!(why.contains("bytes 1024 to 3072") && why.contains("has 2048"), "{why}");
            assert!(disk.file.exists() && disk.bytes().len() == 2048);
        }
        // Nothing of it is in what is left.
        open(&disk.path).set_len(1024).unwrap();
        disk.find(&file, false, false).unwrap();
        assert!(!disk.file.exists() && disk.bytes() == [1; 1024]);
    }

    #[test]
    fn what_is_no_journal_is_left_alone() {
        let disk = Disk::new();
        let file = disk.write(512, &[2; 1024], 512);
        let (before, longer) = (disk.bytes(), [&file[..], &[0]].concat());
        let short = &file[..file.len() - 1];
        for foreign in [&file[..20], short, &longer[..], b"something else, that is long enough"] {
            disk.find(foreign, true, false).unwrap_err();
            assert!(disk.file.exists() && disk.bytes() == before);
        }
        disk.find(&[], false, false).unwrap();
    }

    /// Of a thinlun that said neither which image it was about nor what it would change: it may be all of it.
    #[test]
    fn an_old_journal_is_made_good() {
        let disk = Disk::new();
        let mut file = OLD_MAGIC.to_vec();
        file.extend(512u64.to_be_bytes());
        file.extend(1024u64.to_be_bytes());
        file.extend([2; 1024]);
        assert!(is_ours(&file) && image_of(&file).is_none());
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(0, 0, 0);
        open(&disk.path).write_all_at(&[2; 512], 1024).unwrap();
        disk.find(&file, false, true).unwrap_err();
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(512, 1536, 2);
        open(&disk.path).set_len(1024).unwrap();
        disk.find(&file, false, false).unwrap_err();
        assert_eq!(disk.bytes().len(), 1024);
    }

    /// What cannot be read counts as changed, and cannot tell whether it has been.
    #[test]
    fn what_cannot_be_read_is_written_all_the_same() {
        let disk = Disk::new();
        let from = Buffers::copy_of(&[1; 1024]).unwrap();
        let fails = |at: u64, _: &Buffers| Err(StoreError::at(Cause::Medium, at));
        let file = std::cell::RefCell::new(Vec::new());
        let write = |_: u64, _: &Buffers| {
            file.replace(fs::read(&disk.file).unwrap());
            Ok(())
        };
        disk.journal().write(512, &from, fails, write).unwrap();
        let image = open(&disk.path);
        let identity = Identity::of(&image).unwrap();
        let written = std::cell::Cell::new(0);
        let found = Image {
            identity: &identity,
            adopt: false,
            read_only: false,
            size: SIZE as u64,
            read: &|_, _| Err(ErrorKind::Other.into()),
            write: &|_, data| {
                written.set(data.len());
                Ok(())
            },
        };
        disk.journal().recover(&file.into_inner(), &found).unwrap();
        assert_eq!(written.get(), 1024);
    }

    /// A journal that cannot be removed would be made good over what is written later.
    #[test]
    fn nothing_is_stable_while_a_journal_is_left() {
        let disk = Disk::new();
        let journal = disk.journal();
        let from = Buffers::copy_of(&[2; 512]).unwrap();
        let nothing = |_: u64, _: &Buffers| Ok(());
        journal.settle().unwrap();
        // Nobody can remove it now.
        let written = journal.write(0, &from, nothing, |_, _| {
            fs::remove_file(&disk.file).unwrap();
            fs::create_dir(&disk.file).unwrap();
            Ok(())
        });
        written.unwrap_err();
        journal.settle().unwrap_err();
        fs::remove_dir(&disk.file).unwrap();
        journal.settle().unwrap();
        journal.write(0, &from, nothing, |_, _| Ok(())).unwrap();
    }

    /// A write that is refused is not found by the next.
    #[test]
    fn a_write_that_is_refused_leaves_nothing() {
        let disk = Disk::new();
        let from = Buffers::copy_of(&[2; 512]).unwrap();
        fs::create_dir(&disk.file).unwrap();
        let refused = disk.journal().write(0, &from, |_, _| Ok(()), |_, _| panic!("it was made"));
        refused.unwrap_err();
        assert_eq!(
            fs::read_dir(disk.folder.path()).unwrap().count(),
            2,
            "the image and the folder"
        );
    }

    #[test]
    fn a_write_that_fails_halfway_keeps_others_from_its_blocks_until_it_is_made() {
        let disk = Disk::new();
        let (image, journal) = (open(&disk.path), disk.journal());
        let there = || disk.file.exists();
        let write = |offset, data: &Buffers| {
            image.write_all_at(&data.to_vec(data.len()), offset).unwrap();
            Ok(())
        };
        let eio = StoreError::at(Cause::Medium, 1024);
        let half = |offset, data: &Buffers| {
            image.write_all_at(&data.to_vec(512), offset).unwrap();
            Err(eio)
        };
        let holds = |offset: usize, byte: u8| disk.bytes()[offset..][..1024] == [byte; 1024];
        let data = |byte| Buffers::copy_of(&[byte; 1024]).unwrap();
        let read = |_: u64, _: &Buffers| Ok(());
        // One that goes wrong once is made again at once.
        let tries = std::cell::Cell::new(0);
        let second = |offset, data: &Buffers| {
            tries.set(tries.get() + 1);
            if tries.get() == 1 { half(offset, data) } else { write(offset, data) }
        };
        journal.write(512, &data(2), read, second).unwrap();
        assert!(holds(512, 2) && !there() && !journal.is_unfinished());
        // One that goes wrong for longer stays noted.
        assert_eq!(journal.write(512, &data(3), read, half), Err(eio));
        assert!(there() && journal.is_unfinished() && !holds(512, 3));
        let never = |_: u64, _: &Buffers| -> Result<(), StoreError> { panic!("not its blocks") };
        journal.finish(&(0..512), never).unwrap();
        journal.finish(&(1536..4096), never).unwrap();
        assert_eq!(journal.finish(&(1535..1536), half), Err(eio));
        // A flush has nothing to remove.
        journal.settle().unwrap();
        assert!(there());
        journal.finish(&(0..513), write).unwrap();
        assert!(holds(512, 3) && !there() && !journal.is_unfinished());
        // The next atomic write makes it, too, whatever its blocks.
        journal.write(512, &data(4), read, half).unwrap_err();
        journal.write(2048, &data(5), read, write).unwrap();
        assert!(holds(512, 4) && holds(2048, 5) && !there());
        // And so does the next process.
        journal.write(512, &data(6), read, half).unwrap_err();
        disk.find(&fs::read(&disk.file).unwrap(), false, false).unwrap();
        assert!(holds(512, 6) && !there());
    }

    /// Its blocks are nobody's as long as it is not known whether it has been made.
    #[test]
    fn what_cannot_be_recovered_is_still_unfinished() {
        let disk = Disk::new();
        let (image, journal) = (open(&disk.path), disk.journal());
        let eio = StoreError::at(Cause::Medium, 512);
        let half = |offset, data: &Buffers| {
            image.write_all_at(&data.to_vec(512), offset).unwrap();
            Err(eio)
        };
        let data = Buffers::copy_of(&[2; 1024]).unwrap();
        journal.write(512, &data, |_, _| Ok(()), half).unwrap_err();
        let identity = Identity::of(&image).unwrap();
        let size = SIZE as u64;
        let read = |_: u64, _: &Buffers| Err(ErrorKind::Other.into());
        let recover = |write: &dyn Fn(u64, &Buffers) -> io::Result<()>| {
            let (adopt, read_only) = (false, false);
            let found = Image { identity: &identity, adopt, read_only, size, read: &read, write };
            journal.recover(&fs::read(&disk.file).unwrap_or_default(), &found)
        };
        recover(&|_, _| Err(ErrorKind::Other.into())).unwrap_err();
        assert!(journal.is_unfinished());
        assert_eq!(journal.finish(&(512..1024), half), Err(eio));
        recover(&|at, data| image.write_all_at(&data.to_vec(data.len()), at)).unwrap();
        assert!(!journal.is_unfinished() && !disk.file.exists());
        disk.assert_holds(512, 1536, 2);
        // Another process has made it.
        journal.write(512, &data, |_, _| Ok(()), half).unwrap_err();
        fs::remove_file(&disk.file).unwrap();
        recover(&|_, _| panic!("there is nothing")).unwrap();
        assert!(!journal.is_unfinished());
    }

    /// A host that hangs with one write holds up nobody who wants other blocks.
    #[test]
    fn who_wants_other_blocks_does_not_wait() {
        let disk = Disk::new();
        let journal = Arc::new(disk.journal());
        let failed = |at: u64, _: &Buffers| Err(StoreError::at(Cause::Medium, at));
        let data = Buffers::copy_of(&[2; 1024]).unwrap();
        journal.write(512, &data, |_, _| Ok(()), failed).unwrap_err();
        let (hangs, is_hung) = std::sync::mpsc::channel();
        let (heal, healed) = std::sync::mpsc::channel::<()>();
        let one = Arc::clone(&journal);
        let hung = std::thread::spawn(move || {
            one.finish(&(512..1024), |_, _| {
                hangs.send(()).unwrap();
                healed.recv().map_err(|_| Cause::Medium.into())
            })
        });
        is_hung.recv().unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        let other = Arc::clone(&journal);
        std::thread::spawn(move || done.send(other.finish(&(2048..4096), |_, _| Ok(()))));
        let seen = is_done.recv_timeout(std::time::Duration::from_secs(20));
        heal.send(()).unwrap();
        hung.join().unwrap().unwrap();
        assert_eq!(seen, Ok(Ok(())));
        assert!(!journal.is_unfinished());
    }
}
