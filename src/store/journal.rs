//! Writes that a crash of the host leaves whole or not begun, on any file system: what is to be written is put into a
//! file beside the image first, `IMAGE.thinlun-write`, which is there from before the image is changed until it has
//! been. If it is there at the start, the write is made again.
//!
//! A write that is made again at the wrong place or time destroys what was written since. So the file says which image it
//! is about, and what was there before, by a sum of each sector. In an image that the write was cut off in, every sector
//! is as it was or as it was to be. Where one is neither, the image is another, an older or a newer one, and the journal
//! is void; so it is where all are as they were.

use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::beside::{Beside, Directory, Failed};
use super::identity::Identity;
use super::sum::fnv_1a;
use super::{Buffers, Cause, Piece, StoreError, notes, sys};

/// What the file's name has more than the image's.
pub(super) const SUFFIX: &str = ".thinlun-write";

/// Longest write that is put into it, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// Longest file that is read: one byte more than is ever written, so that a longer one is known from it.
pub(super) const MAX_FILE: u64 =
    (size_of::<Header>() + MAX_BYTES / SECTOR * size_of::<U64>() + MAX_BYTES + 1) as u64;

/// What the device writes whole, in bytes.
const SECTOR: usize = 512;

/// Reads that fail before the rest of a range counts as what cannot be read: a disk may take seconds for each.
const MAX_FAILURES: usize = 32;

const MAGIC: [u8; 16] = *b"thinlun: write 3";
/// Of a thinlun that only said which sectors the write would change.
const OLD_MAGIC: [u8; 16] = *b"thinlun: write 2";
/// Of a thinlun that did not say which image a journal is about.
const OLDEST_MAGIC: [u8; 16] = *b"thinlun: writing";
const MAGICS: [[u8; 16]; 3] = [MAGIC, OLD_MAGIC, OLDEST_MAGIC];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Place {
    magic: [u8; 16],
    offset: U64,
    len: U64,
}

/// What the file begins with; the oldest with its first part only. Behind it are, for each sector, [`sum`] of what was there
/// or zero where that is not known, and then what is to be written.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    place: Place,
    /// The image's identity as text, with zeroes behind it.
    image: [u8; 96],
}

/// Behind the header of an old one, in the place of the sums: the sectors that the write changes, a bit each.
type Changes = [u8; MAX_BYTES / SECTOR / 8];

/// Of a sector; never zero.
fn sum(sector: &[u8]) -> u64 {
    fnv_1a(sector).max(1)
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
    /// Which image it is about, where that is said.
    image: Option<Identity>,
    before: Before<'a>,
}

/// What is said of the image as it was before a write.
enum Before<'a> {
    Nothing,
    Changes(&'a Changes),
    Sums(&'a [U64]),
}

/// What a sector of the image tells of a write, or all of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trace {
    /// Nothing of it is there.
    Nothing,
    /// Some of it may be.
    Begun,
    /// The image is in a state that it has neither found nor made.
    Another,
}

impl Before<'_> {
    /// By what there is where `new` was to be; nothing if it cannot be read.
    fn trace(&self, sector: usize, new: &[u8], found: Option<&[u8]>) -> Trace {
        let may_be_new = found.is_none_or(|found| found == new);
        let old = match self {
            Before::Nothing => 0,
            Before::Changes(changes) => {
                let byte = changes.get(sector / 8).copied().unwrap_or_default();
                if byte & 1 << (sector % 8) == 0 {
                    return Trace::Nothing;
                }
                0
            }
            Before::Sums(sums) => sums.get(sector).map_or(0, |sum| sum.get()),
        };
        match found {
            // Also where that is what was to be.
            Some(found) if old != 0 && sum(found) == old => Trace::Nothing,
            _ if may_be_new => Trace::Begun,
            _ if old != 0 => Trace::Another,
            // What could not be read then may be anything now.
            _ => Trace::Nothing,
        }
    }
}

impl<'a> Entry<'a> {
    fn parse(file: &'a [u8]) -> Option<Self> {
        let (place, oldest_data) = Place::ref_from_prefix(file).ok()?;
        let (offset, len) = (place.offset.get(), usize::try_from(place.len.get()).ok()?);
        if len > MAX_BYTES {
            return None;
        }
        let (image, before, data) = if place.magic == OLDEST_MAGIC {
            (None, Before::Nothing, oldest_data)
        } else {
            let (_, behind) = Header::ref_from_prefix(file).ok()?;
            let (before, data) = if place.magic == MAGIC {
                let sums = <[U64]>::ref_from_prefix_with_elems(behind, len.div_ceil(SECTOR));
                sums.map(|(sums, data)| (Before::Sums(sums), data)).ok()?
            } else {
                let changes = Changes::ref_from_prefix(behind);
                changes.map(|(changes, data)| (Before::Changes(changes), data)).ok()?
            };
            (Some(image_of(file)?), before, data)
        };
        (data.len() == len).then_some(Entry { offset, data, image, before })
    }

    /// What the image tells of it.
    fn trace(&self, image: &Image<'_>) -> io::Result<Trace> {
        let room = Piece::of(self.data.len()).ok_or(ErrorKind::OutOfMemory)?;
        let read = |at, into: &Buffers| match (image.read)(at, into) {
            // It may be read by who has more than there is now.
            Err(e) if Cause::from(&e) == Cause::Busy => Err(e),
            other => Ok(other.is_ok()),
        };
        let mut all = Trace::Nothing;
        sectors(self.offset, self.data.len(), &room, read, |start, found| {
            let new = self.data.get(start..).unwrap_or_default();
            let new = new.get(..SECTOR).unwrap_or(new);
            // Behind the end of the image is nothing that could tell.
            let end = self.offset.saturating_add((start + new.len()) as u64);
            if end <= image.size && all != Trace::Another {
                match self.before.trace(start / SECTOR, new, found) {
                    Trace::Nothing => {}
                    more => all = more,
                }
            }
        })?;
        Ok(all)
    }
}

/// Has `see` look at a range sector by sector: where in the range each starts, and what is there, or that it cannot be read.
/// It is read by `read`, as far as there is room at a time, which says whether it can be.
fn sectors<E>(
    offset: u64,
    len: usize,
    room: &Buffers,
    read: impl Fn(u64, &Buffers) -> Result<bool, E>,
    mut see: impl FnMut(usize, Option<&[u8]>),
) -> Result<(), E> {
    let (mut failures, mut bytes) = (0, [0; SECTOR]);
    // Parts that are to be read, the last of them next.
    let mut parts = Vec::new();
    for start in (0..len).step_by(room.len().max(SECTOR)) {
        parts.push((start, room.slice(0, len - start)));
        while let Some((start, part)) = parts.pop() {
            let tried = failures < MAX_FAILURES;
            let is_read = tried && read(offset.saturating_add(start as u64), &part)?;
            failures += usize::from(tried && !is_read);
            if tried && !is_read && part.len() > SECTOR {
                let half = (part.len() / 2).next_multiple_of(SECTOR);
                let (first, second) = part.split(half);
                parts.push((start + first.len(), second));
                parts.push((start, first));
                continue;
            }
            for at in (0..part.len()).step_by(SECTOR) {
                let count = part.read_at(at, &mut bytes);
                see(start + at, bytes.get(..count).filter(|_| is_read));
            }
        }
    }
    Ok(())
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
            Found::Another => log::warn!(
                "{}: the image holds neither what was there before the write in it nor what was to be: it is another, or \
                 was changed since; the write is not made again, and the file goes",
                self.beside.path().display()
            ),
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

    /// Makes a write by `write`, which has to have it reach the medium before it returns. `read` says what is there now, and
    /// has that reach the medium, too: a crash must not bring back what was there before.
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
        let sums = sums(offset, from.len(), read)?;
        let header = Header::new(offset, from.len(), &self.image);
        let own = Buffers::zeroed(from.len()).ok_or(StoreError::at(Cause::Busy, offset))?;
        // The guest can change its memory; and who is killed while the host copies from it may leave part of a sector.
        own.copy_from(0, from, 0, from.len());
        let from = &own;
        let filled = self.beside.replace(|file| {
            file.write_all(header.as_bytes())?;
            file.write_all(sums.as_bytes())?;
            let (behind, mut done) = (header.as_bytes().len() + sums.as_bytes().len(), 0);
            while done < from.len() {
                match sys::write(file, behind as u64, from, done) {
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
    fn new(offset: u64, len: usize, image: &Identity) -> Self {
        let place = Place { magic: MAGIC, offset: U64::new(offset), len: U64::new(len as u64) };
        let mut text = [0; 96];
        let _ = text.as_mut_slice().write_all(image.to_string().as_bytes());
        Header { place, image: text }
    }
}

/// Of each sector that a write is to change; zero of those that cannot be read.
fn sums(
    offset: u64,
    len: usize,
    read: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
) -> Result<Vec<U64>, StoreError> {
    let room = Piece::of(len).ok_or(StoreError::at(Cause::Busy, offset))?;
    let read = |at, into: &Buffers| match read(at, into) {
        // Other errors are not about what is there.
        Err(StoreError { cause: Cause::Medium, lost: false, .. }) => Ok(false),
        other => other.map(|()| true),
    };
    let mut sums = Vec::with_capacity(len.div_ceil(SECTOR));
    sectors(offset, len, &room, read, |_, old| sums.push(U64::new(old.map_or(0, sum))))?;
    Ok(sums)
}

/// What a file asks for.
pub(super) enum Found<'a> {
    /// There is none.
    Nothing,
    /// The write had not begun, or was of an image that is not there any more.
    Void,
    /// The image is in a state that this write has neither found nor made.
    Another,
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
    match entry.trace(image)? {
        Trace::Nothing => return Ok(Found::Void),
        Trace::Another => return Ok(Found::Another),
        Trace::Begun => {}
    }
    if let Some(about) = &entry.image
        && !about.may_be(image.identity)
        && !image.adopt
    {
        return Err(notes::of_another(about));
    }
    let end = entry.offset.saturating_add(entry.data.len() as u64);
    if end > image.size {
        return Err(io::Error::other(format!(
            "it holds a write of bytes {} to {end} that was interrupted, and the image has {}: give it back \
             the end that it had, or remove that file if the image is another one",
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
    let (header, _) = Header::ref_from_prefix(file).ok()?;
    if ![MAGIC, OLD_MAGIC].contains(&header.place.magic) {
        return None;
    }
    let image = header.image.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(image).ok()?.parse().ok()
}

/// Whether a file is one of ours, whatever it says.
pub(super) fn is_ours(file: &[u8]) -> bool {
    file.is_empty() || MAGICS.iter().any(|magic| file.starts_with(magic))
}

/// Whether a file is one of ours, or the beginning of one.
pub(super) fn is_begun(file: &[u8]) -> bool {
    is_ours(file) || MAGICS.iter().any(|magic| magic.starts_with(file))
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
        for torn in [512, 1024, 1536, 2048] {
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
            let file = disk.write(1024, &[2; 2048], 512);
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
        let file = disk.write(1024, &[2; 2048], 512);
        let copy = disk.bytes();
        disk.replace(&copy);
        let why = disk.find(&file, false, false).unwrap_err().to_string();
        assert!(why.contains("another image (inode:") && why.contains("adopt"), "{why}");
        assert!(disk.file.exists() && disk.bytes() == copy);
        disk.find(&file, true, false).unwrap();
        assert!(!disk.file.exists());
        disk.assert_holds(1024, 3072, 2);
    }

    /// A sector of which the image holds what was to be written proves nothing where others hold what neither was there nor
    /// was to be.
    #[test]
    fn a_backup_that_was_restored_in_place_is_not_written_over() {
        let cut_off = |data: &[u8]| {
            let disk = Disk::new();
            let file = disk.write(1024, data, data.len() / 2);
            (disk, file)
        };
        let restore = |disk: &Disk, at: u64, backup: &[u8]| {
            open(&disk.path).write_all_at(backup, at).unwrap();
            let all = disk.bytes();
            (all, backup.to_vec())
        };
        // In the half that was written the backup holds the same.
        let data = [[0; 2048], [2; 2048]].concat();
        let (disk, file) = cut_off(&data);
        let (all, _) = restore(&disk, 0, &[0; SIZE]);
        disk.find(&file, false, false).unwrap();
        assert!(disk.bytes() == all && !disk.file.exists());
        // All that the write changes is as it was to be, and what it would leave alone is another's.
        let (disk, file) = cut_off(&[[2; 512], [1; 512]].concat());
        let (all, _) = restore(&disk, 1536, &[9; 512]);
        disk.find(&file, false, false).unwrap();
        assert!(disk.bytes() == all && !disk.file.exists());
        // One byte is enough, in any sector and wherever it is.
        for at in [1024, 1535, 3072, 5119] {
            let (disk, file) = cut_off(&data);
            let (all, _) = restore(&disk, at, &[9]);
            disk.find(&file, true, false).unwrap();
            assert!(disk.bytes() == all && !disk.file.exists(), "{at}");
        }
        // Beside the write it proves nothing.
        for at in [1023, 5120] {
            let (disk, file) = cut_off(&data);
            let (mut all, _) = restore(&disk, at, &[9]);
            all[1024..5120].copy_from_slice(&data);
            disk.find(&file, false, false).unwrap();
            assert!(disk.bytes() == all && !disk.file.exists(), "{at}");
        }
    }

    /// A write that is made again may be cut off again, anywhere and in whatever order its sectors reach the medium.
    #[test]
    fn a_write_that_was_cut_off_again_is_made_again() {
        let data: Vec<u8> = (2..10).flat_map(|byte| [byte; 512]).collect();
        for written in 1..=0xff_u8 {
            let disk = Disk::new();
            let file = disk.write(1024, &data, 512);
            let image = open(&disk.path);
            for (n, sector) in data.chunks(512).enumerate() {
                let bytes = if written & 1 << n != 0 { sector } else { &[1; 512] };
                image.write_all_at(bytes, 1024 + 512 * n as u64).unwrap();
            }
            disk.find(&file, false, false).unwrap();
            assert!(disk.bytes()[1024..5120] == data && !disk.file.exists(), "{written:#b}");
        }
    }

    /// Nothing in thinlun writes so; it is read like anything else.
    #[test]
    fn a_last_sector_may_be_short() {
        let data = [[2; 512].as_slice(), &[3; 188]].concat();
        for (torn, whole) in [(0, false), (512, true), (700, true)] {
            let disk = Disk::new();
            let file = disk.write(1024, &data, torn);
            disk.find(&file, false, false).unwrap();
            let expected = if whole { &data[..] } else { &[1; 700] };
            assert!(disk.bytes()[1024..1724] == *expected && !disk.file.exists(), "{torn}");
        }
        let disk = Disk::new();
        let file = disk.write(1024, &data, 512);
        open(&disk.path).write_all_at(&[9], 1723).unwrap();
        disk.find(&file, false, false).unwrap();
        assert_eq!(disk.bytes()[1536..1724], [&[1; 187][..], &[9]].concat());
    }

    /// It is as long as its write, and little more.
    #[test]
    fn the_journal_of_a_small_write_is_small() {
        let disk = Disk::new();
        for (len, sums) in [(512, 8), (700, 16), (4096, 64), (MAX_BYTES, 16384)] {
            let file = disk.write(0, &vec![2; len], 0);
            assert_eq!(file.len(), 128 + sums + len);
            assert!((file.len() as u64) < MAX_FILE);
        }
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
        let mut file = OLDEST_MAGIC.to_vec();
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

    /// A disk of which these sectors cannot be read: what is found of a journal that was made, or is read, there.
    struct Bad(Vec<u64>, std::cell::Cell<usize>);

    impl Bad {
        fn of(sectors: impl IntoIterator<Item = u64>) -> Self {
            Bad(sectors.into_iter().collect(), std::cell::Cell::default())
        }

        fn read(&self, disk: &Disk, at: u64, into: &Buffers) -> bool {
            let sectors = at / 512..(at + into.len() as u64).div_ceil(512);
            if self.0.iter().any(|bad| sectors.contains(bad)) {
                self.1.set(self.1.get() + 1);
                return false;
            }
            into.write_at(0, &disk.bytes()[at as usize..]);
            true
        }

        /// The journal of a write to it, of which nothing is in the image.
        fn journal_of(&self, disk: &Disk, offset: u64, data: &[u8]) -> Vec<u8> {
            let file = std::cell::RefCell::new(Vec::new());
            let read = |at: u64, into: &Buffers| match self.read(disk, at, into) {
                true => Ok(()),
                false => Err(StoreError::at(Cause::Medium, at)),
            };
            let write = |_: u64, _: &Buffers| {
                file.replace(fs::read(&disk.file).unwrap());
                Ok(())
            };
            let from = Buffers::copy_of(data).unwrap();
            disk.journal().write(offset, &from, read, write).unwrap();
            file.into_inner()
        }

        /// Whether it is made again.
        fn is_made(&self, disk: &Disk, file: &[u8]) -> bool {
            let image = open(&disk.path);
            let made = std::cell::Cell::new(false);
            let found = Image {
                identity: &Identity::of(&image).unwrap(),
                adopt: false,
                read_only: false,
                size: image.metadata().unwrap().len(),
                read: &|at, into| match self.read(disk, at, into) {
                    true => Ok(()),
                    false => Err(io::Error::from_raw_os_error(libc::EIO)),
                },
                write: &|_, _| {
                    made.set(true);
                    Ok(())
                },
            };
            disk.journal().recover(file, &found).unwrap();
            made.get()
        }
    }

    /// What could not be read before may be anything, and what cannot be read now may be half of what was to be; others tell
    /// all the same.
    #[test]
    fn what_cannot_be_read_tells_nothing_of_others() {
        const LEN: usize = 256 << 10;
        let (good, data) = (Bad::of([]), [[0; LEN / 2], [2; LEN / 2]].concat());
        let put = |disk: &Disk, sector: u64, byte: u8| {
            open(&disk.path).write_all_at(&[byte; 512], sector * 512).unwrap();
        };
        // Sector 5 has no sum.
        let disk = Disk::new();
        let file = Bad::of([5]).journal_of(&disk, 0, &data);
        assert!(!good.is_made(&disk, &file));
        put(&disk, 5, 9);
        assert!(!good.is_made(&disk, &file));
        put(&disk, 6, 0);
        assert!(good.is_made(&disk, &file));
        put(&disk, 300, 9);
        assert!(!good.is_made(&disk, &file));
        // It can be what tells that the write has begun, and what was not changed can be what has become unreadable.
        let disk = Disk::new();
        let file = Bad::of([5]).journal_of(&disk, 0, &data);
        put(&disk, 5, 0);
        assert!(good.is_made(&disk, &file));
        let file = good.journal_of(&disk, 0, &[[1; 512], [2; 512]].concat());
        assert!(!good.is_made(&disk, &file) && Bad::of([0]).is_made(&disk, &file));
        // A sector that cannot be read now.
        let disk = Disk::new();
        let file = good.journal_of(&disk, 0, &data);
        for bad in [0, 5, 511] {
            assert!(Bad::of([bad]).is_made(&disk, &file), "{bad}");
        }
        assert!(!Bad::of([512]).is_made(&disk, &file));
        put(&disk, 300, 9);
        assert!(!Bad::of([0, 5, 511]).is_made(&disk, &file));
        // Not for ever.
        let bad = Bad::of(0..512);
        assert!(bad.is_made(&disk, &file));
        assert_eq!(bad.1.get(), MAX_FAILURES);
        bad.journal_of(&disk, 0, &data);
        assert_eq!(bad.1.get(), 2 * MAX_FAILURES);
    }

    /// A host that has no memory now says nothing about the image.
    #[test]
    fn a_host_that_is_busy_is_not_taken_for_a_broken_disk() {
        let disk = Disk::new();
        let file = disk.write(512, &[2; 1024], 512);
        fs::write(&disk.file, &file).unwrap();
        let image = open(&disk.path);
        let found = Image {
            identity: &Identity::of(&image).unwrap(),
            adopt: false,
            read_only: false,
            size: SIZE as u64,
            read: &|_, _| Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            write: &|_, _| panic!("nobody has looked"),
        };
        disk.journal().recover(&file, &found).unwrap_err();
        assert!(disk.file.exists());
        // Nor is anything written then.
        for error in [StoreError::from(Cause::Busy), StoreError::lost(Cause::Medium)] {
            let from = Buffers::copy_of(&[3; 1024]).unwrap();
            let refused =
                disk.journal().write(512, &from, |_, _| Err(error), |_, _| panic!("it was made"));
            assert_eq!(refused, Err(error));
        }
    }

    /// What the guest makes of its memory meanwhile is in neither.
    #[test]
    fn the_image_gets_what_the_journal_has() {
        let disk = Disk::new();
        let from = Buffers::copy_of(&[2; 1024]).unwrap();
        let write = |_: u64, data: &Buffers| {
            from.write_at(0, &[3; 1024]);
            let (file, data) = (fs::read(&disk.file).unwrap(), data.to_vec(1024));
            assert!(file.ends_with(&data) && data == [2; 1024]);
            Ok(())
        };
        disk.journal().write(0, &from, |_, _| Ok(()), write).unwrap();
    }

    /// A thinlun that knew only which sectors it would change.
    #[test]
    fn an_old_journal_without_sums_is_made_good() {
        let disk = Disk::new();
        let header = Header::new(512, 1024, &Identity::of(&open(&disk.path)).unwrap());
        let mut file = [OLD_MAGIC.as_slice(), &header.as_bytes()[16..]].concat();
        let mut changes = [0; 256];
        changes[0] = 0b10;
        file.extend([&changes[..], &[2; 1024]].concat());
        assert!(is_ours(&file) && image_of(&file).is_some());
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(0, 0, 0);
        // It does not change this one.
        open(&disk.path).write_all_at(&[2; 512], 512).unwrap();
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(512, 1024, 2);
        // One is enough, whatever the others are.
        open(&disk.path).write_all_at(&[[9; 512], [2; 512]].concat(), 512).unwrap();
        disk.find(&file, false, false).unwrap();
        disk.assert_holds(512, 1536, 2);
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
        let read = |at: u64, into: &Buffers| {
            into.write_at(0, &disk.bytes()[at as usize..]);
            Ok(())
        };
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
