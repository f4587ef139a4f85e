//! File systems over a device that fails for a while: what was written to them cannot be written back then.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::fuse::Fuse;
use super::{Kind, Mount};

/// How a device fails. All of a transfer does: where a part of one goes well, a loop device (Linux 6.18) says that the
/// whole has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It is thin, and what it lies on is full: ENOSPC, for blocks that it does not have yet. It has those of ext4's
    /// journal.
    Full,
    /// It has not even those.
    FullForJournal,
    /// It breaks: EIO, for every block.
    Broken,
}

/// A file system over such a device, gone with this value.
pub struct Failing {
    mount: Mount,
    below: Below,
}

enum Below {
    Tmpfs(Mount),
    Fuse(Fuse),
}

/// Of the file system. It takes that much space only where it is used.
const MIB: u64 = 400;
/// Of the tmpfs below it.
const ROOM: u64 = 280;

impl Failing {
    /// `None`, loudly, where there can be none.
    pub fn new(kind: Kind, failure: Failure) -> Option<Self> {
        let below = match failure {
            Failure::Full | Failure::FullForJournal => Below::Tmpfs(Mount::new(Kind::Tmpfs, ROOM)?),
            Failure::Broken => Below::Fuse(Fuse::new(false)?),
        };
        let device = match &below {
            Below::Tmpfs(tmpfs) => tmpfs.path(),
            Below::Fuse(fuse) => fuse.path(),
        };
        let device = device.join("device");
        let mount = Mount::over(kind, &device, MIB)?;
        if (kind, failure) == (Kind::Ext4, Failure::Full) {
            keep_journal(&device);
        }
        Some(Failing { mount, below })
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.mount.path()
    }

    /// It fails from now on.
    #[track_caller]
    pub fn fail(&self) {
        match &self.below {
            Below::Fuse(fuse) => fuse.fail_writes(Some(0..u64::MAX)),
            Below::Tmpfs(tmpfs) => {
                let mut filler = File::create(tmpfs.path().join("filler")).unwrap();
                for piece in [1 << 20, 4096] {
                    while filler.write_all(&vec![1; piece]).is_ok() {}
                }
            }
        }
    }

    /// It fails from now on where the blocks of this file are, of which none may be a hole, and nowhere else: its file
    /// system goes on. For a device that breaks.
    #[track_caller]
    pub fn fail_below(&self, file: &Path) {
        let listed = Command::new("filefrag").args(["-v", "-b4096"]).arg(file).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        // "   0:        0..     511:      34816..     35327:    512:             last,eof"
        let physical = |line: &str| -> Option<[u64; 2]> {
            let (first, last) = line.split(':').nth(2)?.split_once("..")?;
            Some([first.trim().parse().ok()?, last.trim().parse().ok()?])
        };
        let runs: Vec<_> = listed.lines().filter_map(physical).collect();
        let first = runs.iter().map(|[first, _]| first * 4096).min().expect("an extent");
        let last = runs.iter().map(|[_, last]| last * 4096).max().expect("an extent");
        match &self.below {
            Below::Fuse(fuse) => fuse.fail_writes(Some(first..last + 4096)),
            Below::Tmpfs(_) => panic!("a thin device has room where there is something"),
        }
    }

    /// It is well again. What was lost stays lost.
    pub fn heal(&self) {
        match &self.below {
            Below::Fuse(fuse) => fuse.fail_writes(None),
            Below::Tmpfs(tmpfs) => drop(std::fs::remove_file(tmpfs.path().join("filler"))),
        }
    }

    /// Mounts it again, so that nothing of it is in the page cache. Nobody may have files open there.
    #[track_caller]
    pub fn remount(&mut self) {
        self.mount.remount();
    }
}

/// Takes space for the journal of an ext4 file system in a file.
fn keep_journal(device: &Path) {
    let blocks = Command::new("debugfs").args(["-R", "blocks <8>"]).arg(device).output().unwrap();
    let blocks = String::from_utf8(blocks.stdout).unwrap();
    let file = File::options().write(true).open(device).unwrap();
    let size = Command::new("debugfs").args(["-R", "stats -h"]).arg(device).output().unwrap();
    let size = String::from_utf8(size.stdout).unwrap();
    let size =
        size.lines().find_map(|line| line.strip_prefix("Block size:")).expect("a block size");
    let size: i64 = size.trim().parse().unwrap();
    let blocks: Vec<i64> = blocks.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    assert!(blocks.len() > 1000, "the journal");
    for run in blocks.chunk_by(|a, b| a + 1 == *b) {
        let (at, len) = (run[0] * size, run.len() as i64 * size);
        // SAFETY: plain numbers, and a descriptor that is open.
        let kept = unsafe { libc::fallocate(file.as_raw_fd(), 0, at, len) };
        assert_eq!(kept, 0, "{}", std::io::Error::last_os_error());
    }
}
