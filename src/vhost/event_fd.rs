//! Event descriptors that a front end passes: not to be trusted to be such.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
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

/// What the driver is told by.
pub(super) struct Call {
    event: File,
    /// Whether a write waits while the counter is full. The descriptor is the front end's as well, so that this is
    /// not for us to change.
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
