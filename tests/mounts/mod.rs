//! Real file systems to test on, each a file mounted through a loop device, and what makes them hang. Needs root;
//! without it a test says loudly what it did not prove ([`skipped`], the one way by which any test leaves something out).
#![allow(dead_code)]

pub mod failing;
pub mod fuse;
pub mod pids;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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

/// A file system that is not as mkfs makes it.
#[derive(Clone, Copy, Debug)]
pub struct Flavour {
    pub name: &'static str,
    pub kind: Kind,
    mkfs: &'static [&'static str],
    /// Mount options.
    mount: &'static str,
    /// What each of its files is: `chattr` and its arguments, or `xfs_io -c`.
    files: &'static [&'static str],
}

impl Flavour {
    const fn new(name: &'static str, kind: Kind) -> Self {
        Flavour { name, kind, mkfs: &[], mount: "loop", files: &[] }
    }

    /// Does to its top directory what its files are to inherit.
    fn prepare(&self, top: &Path) -> Result<(), String> {
        match self.files {
            [] => Ok(()),
            [command, arguments @ ..] => run(command, arguments, top),
        }
    }
}

/// What users have on their hosts beside what mkfs makes.
pub const FLAVOURS: [Flavour; 12] = [
    Flavour {
        mkfs: &["-O", "^extents,^64bit"],
        ..Flavour::new("ext4 without extents", Kind::Ext4)
    },
    Flavour {
        mkfs: &["-b", "1024", "-O", "^extents,^64bit"],
        ..Flavour::new("ext4 without extents, blocks of 1 KiB", Kind::Ext4)
    },
    Flavour { mkfs: &["-t", "ext3"], ..Flavour::new("ext3", Kind::Ext4) },
    Flavour { mkfs: &["-b", "1024"], ..Flavour::new("ext4, blocks of 1 KiB", Kind::Ext4) },
    Flavour {
        mkfs: &["-O", "bigalloc", "-C", "65536"],
        ..Flavour::new("ext4, clusters of 64 KiB", Kind::Ext4)
    },
    Flavour {
        mkfs: &["-O", "inline_data", "-I", "1024"],
        ..Flavour::new("ext4 with data in inodes", Kind::Ext4)
    },
    Flavour {
        mount: "loop,nodelalloc,data=journal",
        ..Flavour::new("ext4, data=journal", Kind::Ext4)
    },
    Flavour { mkfs: &["-b", "size=1024"], ..Flavour::new("XFS, blocks of 1 KiB", Kind::Xfs) },
    Flavour {
        files: &["xfs_io", "-c", "extsize 1m"],
        ..Flavour::new("XFS with an extent size", Kind::Xfs)
    },
    Flavour { mount: "loop,compress-force=zstd", ..Flavour::new("btrfs, compressed", Kind::Btrfs) },
    Flavour { files: &["chattr", "+C"], ..Flavour::new("btrfs, nodatacow", Kind::Btrfs) },
    Flavour { mount: "loop,nodatacow", ..Flavour::new("btrfs, mounted nodatacow", Kind::Btrfs) },
];

/// A mounted file system, gone with this value.
pub struct Mount {
    pub kind: Kind,
    directory: TempDir,
    /// The file it is made in.
    image: PathBuf,
    options: &'static str,
}

impl Mount {
    /// Mounts a fresh file system of `mib` MiB (XFS needs 300). `None`, loudly, where that cannot be.
    pub fn new(kind: Kind, mib: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let image = directory.path().join("image");
        Self::in_file(Mount { kind, directory, image, options: "loop" }, mib, &[])
    }

    /// One that is not as mkfs makes it.
    pub fn of_flavour(flavour: &Flavour, mib: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let (kind, image) = (flavour.kind, directory.path().join("image"));
        let mount = Mount { kind, directory, image, options: flavour.mount };
        let mount = Self::in_file(mount, mib, flavour.mkfs)?;
        match flavour.prepare(&mount.path()) {
            Ok(()) => Some(mount),
            Err(why) => {
                skipped(&format!("nothing was proved on {}: {why}", flavour.name));
                None
            }
        }
    }

    /// The same in a file elsewhere, with blocks that are pages.
    pub fn over(kind: Kind, image: &Path, mib: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mount = Mount { kind, directory, image: image.into(), options: "loop" };
        let mkfs: &[&str] = if kind == Kind::Ext4 { &["-b", "4096"] } else { &[] };
        Self::in_file(mount, mib, mkfs)
    }

    fn in_file(mount: Mount, mib: u64, mkfs: &[&str]) -> Option<Self> {
        let kind = mount.kind;
        fs::create_dir(mount.path()).unwrap();
        match mount.make(mib, mkfs) {
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

    /// How many of these open files are on it and have no name.
    pub fn unnamed(&self, open: &[String]) -> usize {
        let top = format!("{}/", self.path().display());
        open.iter().filter(|file| file.starts_with(&top) && file.ends_with(" (deleted)")).count()
    }

    fn make(&self, mib: u64, mkfs: &[&str]) -> Result<(), String> {
        let size = format!("size={mib}m");
        if self.kind == Kind::Tmpfs {
            return run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs"], &self.path());
        }
        let image = &self.image;
        File::create(image).and_then(|f| f.set_len(mib << 20)).map_err(|e| e.to_string())?;
        match self.kind {
            Kind::Ext4 => run("mkfs.ext4", &[&["-q", "-F"], mkfs].concat(), image)?,
            Kind::Xfs => run("mkfs.xfs", &[&["-q", "-m", "reflink=1"], mkfs].concat(), image)?,
            Kind::Btrfs => run("mkfs.btrfs", &[&["-q"], mkfs].concat(), image)?,
            Kind::Tmpfs => {}
        }
        self.mount()
    }

    fn mount(&self) -> Result<(), String> {
        run("mount", &["-o", self.options, self.image.to_str().unwrap()], &self.path())
    }

    /// Freezes it until the returned value goes, as a snapshot of the host does (FIFREEZE): every write waits. `None`,
    /// loudly, where that cannot be (tmpfs).
    #[must_use = "it thaws when this goes"]
    pub fn freeze(&self) -> Option<Frozen> {
        let frozen = Frozen::new(&self.path());
        if let Err(why) = &frozen {
            skipped(&format!("nothing was proved on a frozen {:?}: {why}", self.kind));
        }
        frozen.ok()
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

/// A file system that is frozen, until this goes.
pub struct Frozen {
    top: File,
    /// Waits for this process to let go of a pipe, and thaws: should the test be killed, nothing stays frozen, and
    /// nobody waits for it who could not be killed.
    guard: Child,
}

impl Frozen {
    fn new(path: &Path) -> Result<Self, String> {
        let top = File::open(path).map_err(|e| e.to_string())?;
        let guard = Command::new("sh")
            .args(["-c", "read wait; fsfreeze --unfreeze \"$0\"; true"])
            .arg(path)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let frozen = Frozen { top, guard: guard.map_err(|e| e.to_string())? };
        // SAFETY: both ioctls look at no argument.
        match unsafe { libc::ioctl(frozen.top.as_raw_fd(), FIFREEZE, 0) } {
            0 => Ok(frozen),
            _ => Err(std::io::Error::last_os_error().to_string()),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: as above. Where it was not frozen, it stays as it is.
        unsafe { libc::ioctl(self.top.as_raw_fd(), FITHAW, 0) };
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// How a host hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hang {
    /// A file system that is frozen.
    Frozen(Kind),
    /// A FUSE file system whose server is stopped, with or without the kernel's write-back cache.
    Fuse { writeback: bool },
}

/// A file system that can be made to hang.
pub enum Hanging {
    Frozen(Mount),
    Fuse(fuse::Fuse),
}

/// It hangs until this goes.
pub enum Hung {
    Frozen(Frozen),
    Fuse(fuse::Stopped),
}

impl Hanging {
    /// `None`, loudly, where there can be none.
    pub fn new(how: Hang) -> Option<Self> {
        match how {
            Hang::Frozen(kind) => Mount::new(kind, 400).map(Hanging::Frozen),
            Hang::Fuse { writeback } => fuse::Fuse::new(writeback).map(Hanging::Fuse),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        match self {
            Hanging::Frozen(mount) => mount.path(),
            Hanging::Fuse(fuse) => fuse.path(),
        }
    }

    /// Makes it hang. Whoever touches it then waits: a test, too.
    #[must_use = "it goes on when this goes"]
    #[track_caller]
    pub fn hang(&self) -> Hung {
        match self {
            Hanging::Frozen(mount) => Hung::Frozen(mount.freeze().expect("a frozen file system")),
            Hanging::Fuse(fuse) => Hung::Fuse(fuse.stop()),
        }
    }
}

/// A loop device over a file of `mib` MiB, gone with this value.
pub struct LoopDevice {
    pub device: PathBuf,
    file: Option<tempfile::NamedTempFile>,
}

impl LoopDevice {
    /// `None`, loudly, where there can be none.
    pub fn new(mib: u64) -> Option<Self> {
        Self::with_sectors(mib, 512)
    }

    /// The file behind it.
    pub fn file(&self) -> &Path {
        self.file.as_ref().expect("a file of its own").path()
    }

    /// One with sectors of so many bytes.
    pub fn with_sectors(mib: u64, bytes: u32) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        let mut device = Self::attach(file.path(), bytes)?;
        device.file = Some(file);
        Some(device)
    }

    /// One over a new file of this name, which stays.
    pub fn over(path: &Path, mib: u64) -> Option<Self> {
        File::create(path).unwrap().set_len(mib << 20).unwrap();
        Self::attach(path, 512)
    }

    fn attach(path: &Path, sectors: u32) -> Option<Self> {
        let sectors = sectors.to_string();
        let arguments = ["--show", "-f", "-b", &sectors];
        let made = Command::new("losetup").args(arguments).arg(path).output();
        match made {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(LoopDevice { device: PathBuf::from(name.trim()), file: None })
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

/// Says, past the capture of test output, what a test did not prove. Where everything is to be proved
/// (`THINLUN_REQUIRE_ALL=1`), that is a failure.
#[track_caller]
pub fn skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {what}\n");
    let all = std::env::var_os("THINLUN_REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!all, "THINLUN_REQUIRE_ALL=1, and {what}");
}

fn run(program: &str, arguments: &[&str], path: &Path) -> Result<(), String> {
    let output = Command::new(program).args(arguments).arg(path).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}
