//! Signals as something to poll for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal as Number};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// SIGTERM, SIGINT: end.
    End,
    /// SIGHUP: look at the disks again.
    Refresh,
}

/// The signals we handle, blocked and readable from a descriptor.
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Blocks them for this thread and all it starts from now on.
    pub(super) fn block() -> io::Result<Self> {
        let set: SigSet = [Number::SIGTERM, Number::SIGINT, Number::SIGHUP].into_iter().collect();
        set.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Signals(SignalFd::with_flags(&set, flags)?))
    }

    /// The next signal that has arrived, if there is one.
    pub(super) fn next(&self) -> io::Result<Option<Signal>> {
        let Some(info) = self.0.read_signal()? else { return Ok(None) };
        let hang_up = i32::try_from(info.ssi_signo) == Ok(libc::SIGHUP);
        Ok(Some(if hang_up { Signal::Refresh } else { Signal::End }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
