//! Writes that a crash of the host leaves whole or not begun, on any file system: what is to be written is put into a
//! file beside the image first, `IMAGE.thinlun-write`, which is there from before the image is changed until it has
//! been. If it is there at the start, the write is made again.

use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::beside::{Beside, Directory};
use super::{Buffers, Cause, StoreError, sys};

/// Longest write that is put into it, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

const MAGIC: [u8; 16] = *b"thinlun: writing";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 16],
    offset: U64,
    len: U64,
}

/// The journal of one image: one write at a time.
#[derive(Debug)]
pub(super) struct Journal {
    beside: Beside,
    /// Held while a write is made. The range of one that has failed halfway, or that may still be found in the journal:
    /// nobody uses it before that write is made again and the journal gone, else the next start would write old bytes
    /// over newer ones.
    unfinished: Mutex<Option<Range<u64>>>,
    /// Whether there is such a range.
    is_unfinished: AtomicBool,
}

impl Journal {
    /// The journal of `image`, in its directory.
    ///
    /// # Errors
    /// If the image has no name.
    pub(super) fn of(directory: &Arc<Directory>, image: &Path) -> io::Result<Self> {
        let beside = Beside::of(directory, image, ".thinlun-write")?;
        Ok(Journal { beside, unfinished: Mutex::new(None), is_unfinished: AtomicBool::new(false) })
    }

    /// Has the write that was not finished, if there is one, made by `write`, which has it reach the medium.
    ///
    /// # Errors
    /// If it cannot be made, or is none of ours.
    pub(super) fn recover(
        &self,
        read_only: bool,
        write: impl FnOnce(u64, &Buffers) -> io::Result<()>,
    ) -> io::Result<()> {
        let bytes = self.beside.read((MAX_BYTES + size_of::<Header>()) as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let foreign = || io::Error::new(ErrorKind::InvalidData, "not a journal of thinlun");
        let (header, data) = Header::ref_from_prefix(&bytes).map_err(|_| foreign())?;
        if header.magic != MAGIC || header.len.get() != data.len() as u64 {
            return Err(foreign());
        }
        if read_only {
            let why = "holds a write that was interrupted; serve the image writable once";
            return Err(io::Error::new(ErrorKind::ReadOnlyFilesystem, why));
        }
        let data = Buffers::copy_of(data).ok_or(ErrorKind::OutOfMemory)?;
        write(header.offset.get(), &data)?;
        log::info!("a write that the host did not finish was made again ({} bytes)", data.len());
        self.beside.remove()
    }

    /// Whether a write has failed halfway.
    #[inline]
    pub(super) fn is_unfinished(&self) -> bool {
        self.is_unfinished.load(Ordering::Acquire)
    }

    fn unfinished(&self) -> MutexGuard<'_, Option<Range<u64>>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
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
        if !self.is_unfinished() {
            return Ok(());
        }
        let mut unfinished = self.unfinished();
        match &*unfinished {
            Some(other) if other.start < range.end && range.start < other.end => {
                self.finish_that(&mut unfinished, write)
            }
            _ => Ok(()),
        }
    }

    fn finish_that(
        &self,
        unfinished: &mut Option<Range<u64>>,
        write: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Some(start) = unfinished.as_ref().map(|range| range.start) else { return Ok(()) };
        let mut failed = None;
        let recovered = self.recover(false, |offset, data| {
            write(offset, data).map_err(|error| {
                failed = Some(error);
                io::Error::other(error.to_string())
            })
        });
        // It may have been removed before, but not so that a crash would not bring it back.
        let gone = recovered.and_then(|()| self.beside.remove());
        gone.map_err(|e| failed.unwrap_or(StoreError::at(Cause::from(&e), start)))?;
        self.is_unfinished.store(false, Ordering::Release);
        *unfinished = None;
        Ok(())
    }

    /// Makes a write by `write`, which has to have it reach the medium before it returns.
    ///
    /// # Errors
    /// If the journal cannot be kept, and then nothing was written, or those of `write`: then it is made again before
    /// anybody uses its range, be it by the next process.
    pub(super) fn write(
        &self,
        offset: u64,
        from: &Buffers,
        write: impl Fn(u64, &Buffers) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut unfinished = self.unfinished();
        self.finish_that(&mut unfinished, &write)?;
        let mut leave = |error| {
            log::error!(
                "a write of {} bytes at {offset} that is to be whole or not begun has failed halfway ({error}): nobody \
                 gets at these blocks before it is made again",
                from.len()
            );
            *unfinished = Some(offset..offset.saturating_add(from.len() as u64));
            self.is_unfinished.store(true, Ordering::Release);
            error
        };
        let kept = |e: io::Error| StoreError::at(Cause::from(&e), offset);
        let len = U64::new(from.len() as u64);
        let header = Header { magic: MAGIC, offset: U64::new(offset), len };
        let noted = self.beside.replace(|file| {
            file.write_all(header.as_bytes())?;
            let mut done = 0;
            while done < from.len() {
                match sys::write(file, size_of::<Header>() as u64, from, done, false) {
                    Ok(0) => return Err(ErrorKind::WriteZero.into()),
                    Ok(more) => done += more,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        if let Err(error) = noted {
            // It may be there all the same, and must not be found later.
            return Err(match self.beside.remove() {
                Ok(()) => kept(error),
                Err(_) => leave(kept(error)),
            });
        }
        // Once more: the journal has all of it, and the old bytes are gone.
        write(offset, from).or_else(|_| write(offset, from)).map_err(&mut leave)?;
        self.beside.remove().map_err(kept).map_err(leave)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_write_that_was_cut_off_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, [1; 4096]).unwrap();
        let image = File::options().read(true).write(true).open(&path).unwrap();
        let journal = Journal::of(&Directory::of(&path).unwrap(), &path).unwrap();
        let data = Buffers::copy_of(&[2; 1024]).unwrap();
        let there = || directory.path().join("disk.img.thinlun-write").exists();
        // The image is changed, if at all, only while the journal is there.
        let kept = std::cell::RefCell::new(Vec::new());
        let done = journal.write(512, &data, |_, _| {
            assert!(there());
            kept.replace(std::fs::read(directory.path().join("disk.img.thinlun-write")).unwrap());
            image.write_all_at(&[2; 100], 512).unwrap();
            Ok(())
        });
        done.unwrap();
        let kept = kept.into_inner();
        assert!(!there());
        std::fs::write(directory.path().join("disk.img.thinlun-write"), &kept).unwrap();
        let recover = |read_only| {
            let write =
                |offset, data: &Buffers| image.write_all_at(&data.to_vec(data.len()), offset);
            journal.recover(read_only, write)
        };
        assert!(recover(true).is_err());
        recover(false).unwrap();
        assert!(!there());
        let whole = std::fs::read(&path).unwrap();
        assert!(whole[512..1536].iter().all(|b| *b == 2) && whole[1536..].iter().all(|b| *b == 1));
        for foreign in
            [&kept[..20], &kept[..kept.len() - 1], b"something else, that is long enough"]
        {
            std::fs::write(directory.path().join("disk.img.thinlun-write"), foreign).unwrap();
            assert!(recover(false).is_err());
            assert!(there());
        }
    }

    #[test]
    fn a_write_that_fails_halfway_keeps_others_from_its_blocks_until_it_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, [1; 4096]).unwrap();
        let image = File::options().read(true).write(true).open(&path).unwrap();
        let journal = Journal::of(&Directory::of(&path).unwrap(), &path).unwrap();
        let there = || directory.path().join("disk.img.thinlun-write").exists();
        let write = |offset, data: &Buffers| {
            image.write_all_at(&data.to_vec(data.len()), offset).unwrap();
            Ok(())
        };
        let eio = StoreError::at(Cause::Medium, 1024);
        let half = |offset, data: &Buffers| {
            image.write_all_at(&data.to_vec(512), offset).unwrap();
            Err(eio)
        };
        let holds = |offset: usize, byte: u8| {
            std::fs::read(&path).unwrap()[offset..][..1024] == [byte; 1024]
        };
        let data = |byte| Buffers::copy_of(&[byte; 1024]).unwrap();
        // One that goes wrong once is made again at once.
        let tries = std::cell::Cell::new(0);
        let second = |offset, data: &Buffers| {
            tries.set(tries.get() + 1);
            if tries.get() == 1 { half(offset, data) } else { write(offset, data) }
        };
        journal.write(512, &data(2), second).unwrap();
        assert!(holds(512, 2) && !there() && !journal.is_unfinished());
        // One that goes wrong for longer stays noted.
        assert_eq!(journal.write(512, &data(3), half), Err(eio));
        assert!(there() && journal.is_unfinished() && !holds(512, 3));
        let never = |_: u64, _: &Buffers| -> Result<(), StoreError> { panic!("not its blocks") };
        journal.finish(&(0..512), never).unwrap();
        journal.finish(&(1536..4096), never).unwrap();
        assert_eq!(journal.finish(&(1535..1536), half), Err(eio));
        assert!(there());
        journal.finish(&(0..513), write).unwrap();
        assert!(holds(512, 3) && !there() && !journal.is_unfinished());
        // The next atomic write makes it, too, whatever its blocks.
        journal.write(512, &data(4), half).unwrap_err();
        journal.write(2048, &data(5), write).unwrap();
        assert!(holds(512, 4) && holds(2048, 5) && !there());
        // And so does the next process.
        journal.write(512, &data(6), half).unwrap_err();
        let next = Journal::of(&Directory::of(&path).unwrap(), &path).unwrap();
        next.recover(false, |offset, data| {
            write(offset, data).map_err(|_: StoreError| io::ErrorKind::Other.into())
        })
        .unwrap();
        assert!(holds(512, 6) && !there());
    }
}
