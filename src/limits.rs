//! What the host allows this process to have: descriptors, threads, memory. Whoever runs out of one says which limit
//! that was and how it is raised.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// RLIMIT_NOFILE, as [`raise_open_files`] left it.
static OPEN_FILES: AtomicU64 = AtomicU64::new(0);

/// Raises the limit of open files as far as this process may: the soft limit is low for programs that use select(2),
/// which we do not.
pub fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
        OPEN_FILES.store(if raised { hard } else { soft }, Ordering::Relaxed);
    }
}

/// Which limit is behind a failed call that makes a descriptor, a thread or a mapping, and what to do; `None` if the
/// error is about something else.
pub fn behind(error: &io::Error) -> Option<String> {
    Some(match error.raw_os_error()? {
        libc::EMFILE => format!(
            "out of open files: RLIMIT_NOFILE was {} at the start; raise LimitNOFILE= or ulimit -Hn",
            OPEN_FILES.load(Ordering::Relaxed)
        ),
        libc::ENFILE => "the host is out of open files; raise the sysctl fs.file-max".into(),
        libc::EAGAIN => "out of threads; raise TasksMax= (pids.max of the control group) or \
                         RLIMIT_NPROC (ulimit -u)"
            .into(),
        libc::ENOMEM | libc::ENOBUFS => "the host is out of memory".into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        for (errno, word) in [
            (libc::EMFILE, "RLIMIT_NOFILE"),
            (libc::ENFILE, "fs.file-max"),
            (libc::EAGAIN, "pids.max"),
            (libc::ENOMEM, "memory"),
        ] {
            let text = behind(&io::Error::from_raw_os_error(errno)).unwrap();
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(behind(&io::Error::from_raw_os_error(libc::EIO)), None);
        assert_eq!(behind(&io::ErrorKind::NotFound.into()), None);
    }
}
