//! Real file systems to test on, each a file mounted through a loop device. Needs root; without it a
//! test says loudly what it did not prove.
#![allow(dead_code)]

pub mod pids;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A file system to test on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
    Tmpfs,
}

/// All of them.
pub const ALL: [Kind; 4] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs, Kind::Tmpfs];

/// A mounted file system, gone with this value.
pub struct Mount {
    pub kind: Kind,
    directory: TempDir,
}

impl Mount {
    /// Mounts a fresh file system of `mib` MiB (XFS needs 300). `None`, loudly, where that cannot be.
    pub fn new(kind: Kind, mib: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mount = Mount { kind, directory };
        fs::create_dir(mount.path()).unwrap();
        match mount.make(mib) {
            Ok(()) => Some(mount),
            Err(why) => {
                skipped(&format!("nothing was proved on {kind:?}: {why}"));
                None
            }
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    fn make(&self, mib: u64) -> Result<(), String> {
        let size = format!("size={mib}m");
        if self.kind == Kind::Tmpfs {
            return run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs"], &self.path());
        }
        let image = self.directory.path().join("image");
        File::create(&image).and_then(|f| f.set_len(mib << 20)).map_err(|e| e.to_string())?;
        match self.kind {
            Kind::Ext4 => run("mkfs.ext4", &["-q", "-F"], &image)?,
            Kind::Xfs => run("mkfs.xfs", &["-q", "-m", "reflink=1"], &image)?,
            Kind::Btrfs => run("mkfs.btrfs", &["-q"], &image)?,
            Kind::Tmpfs => {}
        }
        self.mount()
    }

    fn mount(&self) -> Result<(), String> {
        let image = self.directory.path().join("image");
        run("mount", &["-o", "loop", image.to_str().unwrap()], &self.path())
    }

    /// Takes the file system down as a lost disk would: nothing more reaches it, its log included. Says whether it
    /// could.
    pub fn go_down(&self) -> bool {
        /// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN.
        const GO_DOWN: libc::c_ulong = 0x8004_587d;
        const WITHOUT_LOG: u32 = 2;
        let top = File::open(self.path()).unwrap();
        // SAFETY: the call reads one number.
        unsafe { libc::ioctl(top.as_raw_fd(), GO_DOWN, &WITHOUT_LOG) == 0 }
    }

    /// Makes ext4 read-only under open files, as it makes itself after an error.
    pub fn abort(&self) -> bool {
        run("mount", &["-o", "remount,abort"], &self.path()).is_ok()
    }

    /// Mounts it again, which replays its log. Nobody may have files open there.
    #[track_caller]
    pub fn remount(&mut self) {
        let path = self.path();
        let done = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            run("umount", &[], &path).is_ok()
        });
        assert!(done, "{} stays busy", path.display());
        self.mount().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

/// A loop device over a file of `mib` MiB, gone with this value.
pub struct LoopDevice {
    pub device: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    /// `None`, loudly, where there can be none.
    pub fn new(mib: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        let made = Command::new("losetup").args(["--show", "-f"]).arg(file.path()).output();
        match made {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(LoopDevice { device: PathBuf::from(name.trim()), _file: file })
            }
            other => {
                skipped(&format!("nothing was proved on a block device: {other:?}"));
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).output();
    }
}

/// Says, past the capture of test output, what a test did not prove.
pub fn skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {what}\n");
}

fn run(program: &str, arguments: &[&str], path: &Path) -> Result<(), String> {
    let output = Command::new(program).args(arguments).arg(path).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}
