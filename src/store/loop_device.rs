//! Loop devices: a block device knows nothing of extents, but the file behind a loop device does.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::extents::{Extent, Knowledge, walk};
use super::trial::Verdict;
use super::{Space, sys};

/// The file behind a loop device, open for looking only.
#[derive(Debug)]
pub(super) struct BackingFile {
    file: File,
    knowledge: Knowledge,
    /// Where in the file the device begins.
    offset: u64,
}

impl BackingFile {
    /// Finds the file behind `device`; `None` if it is no loop device, or the file cannot be had.
    pub(super) fn of(device: &File) -> Option<Self> {
        let status = sys::loop_status(device).ok()?;
        let number = device.metadata().ok()?.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file"));
        let file = File::open(PathBuf::from(name.ok()?.trim_end_matches('\n'))).ok()?;
        // The name may lead to another file by now: the kernel knows which one it is.
        let metadata = file.metadata().ok()?;
        let same = (metadata.dev(), metadata.ino()) == (status.device, status.inode);
        let knowledge = Knowledge::probe(&file, Verdict::untried(&file).seek);
        (same && metadata.is_file()).then_some(BackingFile {
            file,
            knowledge,
            offset: status.offset,
        })
    }

    /// How much is known of its extents.
    pub(super) fn knowledge(&self) -> Knowledge {
        self.knowledge
    }

    /// Space for the file.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn space(&self) -> io::Result<Space> {
        sys::space(&self.file)
    }

    /// The extents of a range of the device. What the device's own page cache still holds is not in
    /// the file yet, so that it is flushed first: no fresh data is called a hole.
    ///
    /// # Errors
    /// If the device cannot be flushed.
    pub(super) fn extents(
        &self,
        device: &File,
        range: Range<u64>,
        limit: usize,
    ) -> io::Result<Vec<Extent>> {
        device.sync_data()?;
        if self.knowledge.when_flushed {
            self.file.sync_data()?;
        }
        let shifted =
            range.start.saturating_add(self.offset)..range.end.saturating_add(self.offset);
        let mut extents = walk(&self.file, self.knowledge, shifted, limit);
        for extent in &mut extents {
            extent.range.start -= self.offset;
            extent.range.end -= self.offset;
        }
        Ok(extents)
    }
}
