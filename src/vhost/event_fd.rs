//! Event descriptors that a front end passes: not to be trusted to be such.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::SFlag;
use vhost::vhost_user::{Error, Result};

/// Lets only event descriptors through, as far as can be seen: a pipe or a socket would block a queue when it is full.
/// Like everything that the kernel makes without a file system, an eventfd has no type; those that are something else
/// again refuse to be written to.
pub(super) fn check(file: Option<File>) -> Result<Option<File>> {
    let Some(file) = file else { return Ok(None) };
    let mode = file.metadata().map_err(super::refused)?.mode();
    match mode & SFlag::S_IFMT.bits() {
        0 => Ok(Some(file)),
        _ => Err(Error::InvalidOperation("a kick, call or error descriptor is not an eventfd")),
    }
}

/// Reads a kick, if there still is one: the front end has the descriptor as well, may read it first, and may have made
/// its reads wait. Says whether that can be done at all: not by something else than an eventfd, and not by Linux before
/// 5.12, where an eventfd knows no read that does not wait (RWF_NOWAIT).
pub(super) fn drain(kick: &File) -> bool {
    let mut count = [0_u8; size_of::<u64>()];
    let place = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
    // SAFETY: the one iovec describes `count`. The offset of -1 stands for that of the file, which has none.
    let read =
        unsafe { libc::preadv2(kick.as_raw_fd(), &raw const place, 1, -1, libc::RWF_NOWAIT) };
    match usize::try_from(read) {
        Ok(read) => read == count.len(),
        Err(_) => {
            let kind = io::Error::last_os_error().kind();
            matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
        }
    }
}

/// What the driver is told by.
pub(super) struct Call {
    event: File,
    /// Whether a write waits while the counter is full. The descriptor is the front end's as well, so that this is
    /// not for us to change; and an eventfd knows no write that does not wait (RWF_NOWAIT), so that a front end that
    /// changes it later, and fills the counter, stops its own queue.
    blocks: bool,
}

impl Call {
    pub(super) fn new(event: File) -> Self {
        let flags = fcntl(&event, FcntlArg::F_GETFL).unwrap_or_default();
        let blocks = !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK);
        Call { event, blocks }
    }

    /// Tells the driver. It fails if the counter is full, and then the driver knows already.
    pub(super) fn tell(&self) {
        if !self.blocks || self.has_room() {
            let _ = (&self.event).write(&1u64.to_ne_bytes());
        }
    }

    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(self.event.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::OwnedFd;

    #[test]
    fn a_kick_that_somebody_else_has_read_is_not_waited_for() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        let kick = File::from(OwnedFd::from(event));
        (&kick).write_all(&3_u64.to_ne_bytes()).unwrap();
        // The first takes all of it; the second would wait.
        assert!(drain(&kick) && drain(&kick));
        let mut fds = [PollFd::new(kick.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(0));
        assert!(!drain(&File::open("/dev/null").unwrap()), "that is no eventfd");
    }
}
