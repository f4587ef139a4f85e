//! Image locking, byte for byte as QEMU does it, so that QEMU, qemu-img and a second thinlun see us.
//!
//! QEMU names permissions by number and locks one byte of the image for each: byte 100 + n says
//! "somebody uses permission n", byte 200 + n says "somebody does not share permission n". All locks
//! are shared OFD locks; a conflict is found by asking whether an exclusive lock could be had on the
//! opposite byte. (QEMU block/file-posix.c describes the scheme.)

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's permission numbers, as far as they concern us.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why an image could not be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another process uses the image in a way that excludes us.
    InUse,
    /// The host would not lock at all.
    Host(io::Error),
}

/// How long an image may stay locked by somebody who ends: a killed daemon lets go when its last transfer has.
const ENDING: Duration = Duration::from_secs(1);

/// [`lock_image`], with a little patience.
///
/// # Errors
/// As there.
pub fn lock_image_soon(file: &File, read_only: bool) -> Result<(), LockError> {
    let start = Instant::now();
    loop {
        match lock_image(file, read_only) {
            Err(LockError::InUse) if start.elapsed() < ENDING => {}
            end => return end,
        }
        // Nobody is kept out while we wait.
        let mut all = byte_lock(libc::F_UNLCK, USED);
        all.l_len = UNSHARED;
        fcntl(file, FcntlArg::F_OFD_SETLK(&all)).map_err(|e| LockError::Host(e.into()))?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Locks the image behind `file` for as long as this open file lives.
///
/// A writer shares with nobody who writes or wants the contents to hold still; a reader shares with
/// readers.
///
/// # Errors
/// [`LockError::InUse`] if somebody else's locks exclude us, else what the host says.
pub fn lock_image(file: &File, read_only: bool) -> Result<(), LockError> {
    let used: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    let unshared: &[i64] = &[WRITE, RESIZE];
    // Take first, then look: two that start at once see each other and both give way.
    for n in used {
        take(file, USED + n)?;
    }
    for n in unshared {
        take(file, UNSHARED + n)?;
    }
    for n in used {
        check(file, UNSHARED + n)?;
    }
    for n in unshared {
        check(file, USED + n)?;
    }
    Ok(())
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn take(file: &File, byte: i64) -> Result<(), LockError> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(LockError::InUse),
        Err(error) => Err(LockError::Host(error.into())),
    }
}

fn check(file: &File, byte: i64) -> Result<(), LockError> {
    let mut probe = byte_lock(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).map_err(|e| LockError::Host(e.into()))?;
    match libc::c_int::from(probe.l_type) {
        libc::F_UNLCK => Ok(()),
        _ => Err(LockError::InUse),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn open(path: &std::path::Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn writers_exclude_everybody_readers_share() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(image.path()), open(image.path()), open(image.path()));
        lock_image(&a, false).unwrap();
        assert!(matches!(lock_image(&b, false), Err(LockError::InUse)));
        assert!(matches!(lock_image(&c, true), Err(LockError::InUse)));
        drop((a, b, c));
        let (a, b, c) = (open(image.path()), open(image.path()), open(image.path()));
        lock_image(&a, true).unwrap();
        lock_image(&b, true).unwrap();
        assert!(matches!(lock_image(&c, false), Err(LockError::InUse)));
    }
}
