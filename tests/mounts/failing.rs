//! File systems over a device that fails for a while: what was written to them cannot be written back then.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use super::fuse::Fuse;
use super::{Kind, Mount};

/// How a device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It is thin, and what it lies on is full: ENOSPC, for blocks that it does not have yet.
    Full,
    /// It breaks: EIO, for every block.
    Broken,
}

pub const FAILURES: [Failure; 2] = [Failure::Full, Failure::Broken];

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
            Failure::Full => Below::Tmpfs(Mount::new(Kind::Tmpfs, ROOM)?),
            Failure::Broken => Below::Fuse(Fuse::new(false)?),
        };
        let device = match &below {
            Below::Tmpfs(tmpfs) => tmpfs.path(),
            Below::Fuse(fuse) => fuse.path(),
        };
        let mount = Mount::over(kind, &device.join("device"), MIB)?;
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
