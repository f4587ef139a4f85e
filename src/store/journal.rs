//! Writes that a crash of the host leaves whole or not begun, on any file system: what is to be written is put into a
//! file beside the image first, `IMAGE.thinlun-write`, which is there from before the image is changed until it has
//! been. If it is there at the start, the write is made again.

use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

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
    busy: Mutex<()>,
}

impl Journal {
    /// The journal of `image`, in its directory.
    ///
    /// # Errors
    /// If the image has no name.
    pub(super) fn of(directory: &Arc<Directory>, image: &Path) -> io::Result<Self> {
        let beside = Beside::of(directory, image, ".thinlun-write")?;
        Ok(Journal { beside, busy: Mutex::new(()) })
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

    /// Makes a write by `write`, which has to have it reach the medium before it returns.
    ///
    /// # Errors
    /// If the journal cannot be kept, and then nothing was written, or those of `write`.
    pub(super) fn write(
        &self,
        offset: u64,
        from: &Buffers,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let _alone = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = |e: io::Error| StoreError::at(Cause::from(&e), offset);
        let len = U64::new(from.len() as u64);
        let header = Header { magic: MAGIC, offset: U64::new(offset), len };
        self.beside
            .replace(|file| {
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
            })
            .map_err(kept)?;
        let written = write();
        self.beside.remove().map_err(kept)?;
        written
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
        let mut kept = Vec::new();
        let done = journal.write(512, &data, || {
            assert!(there());
            kept = std::fs::read(directory.path().join("disk.img.thinlun-write")).unwrap();
            image.write_all_at(&[2; 100], 512).unwrap();
            Ok(())
        });
        done.unwrap();
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
}
