//! Where front ends come from: a socket of our own, or one that was handed to us.
#![allow(unsafe_code)]

use std::env;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::sockopt::AcceptConn;
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt};

use crate::cli::Cli;
use crate::config::StartError;
use crate::store::file::plain;

/// The first descriptor that systemd passes (sd_listen_fds(3)).
const SYSTEMD_FIRST_FD: RawFd = 3;

/// Most sockets, and so ports, of a daemon.
const MAX_SOCKETS: usize = 64;

/// What the command line and the environment say about a socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Path(PathBuf),
    Inherited(RawFd),
}

impl Endpoint {
    /// One or more of `--socket-path`, or of `--fd`, or systemd's LISTEN_FDS: each is a port, in this order.
    pub(super) fn from_cli(cli: &Cli) -> Result<Vec<Self>, StartError> {
        let paths = cli.socket_path.iter().cloned().map(Endpoint::Path);
        let mut all: Vec<Self> =
            paths.chain(cli.fd.iter().copied().map(Endpoint::Inherited)).collect();
        if all.is_empty() {
            all = systemd_fds()?.map(Endpoint::Inherited).collect();
        }
        if all.is_empty() {
            return Err(StartError::usage(
                "no socket: give --socket-path SOCK, --fd N, or start it by a systemd socket",
            ));
        }
        if all.len() > MAX_SOCKETS {
            return Err(StartError::usage(format!("more than {MAX_SOCKETS} sockets")));
        }
        match all.iter().enumerate().find(|(n, one)| all.iter().take(*n).any(|o| o == *one)) {
            Some((_, Endpoint::Path(path))) => {
                Err(StartError::usage(format!("--socket-path: {} is given twice", path.display())))
            }
            Some((_, Endpoint::Inherited(fd))) => {
                Err(StartError::usage(format!("--fd: {fd} is given twice")))
            }
            None => Ok(all),
        }
    }

    /// Finds out whether the socket can be had, without changing anything.
    pub(super) fn check(self) -> Result<Checked, StartError> {
        match self {
            Endpoint::Path(path) => {
                let stale = check_path(&path)
                    .map_err(|why| StartError::host(format!("{}: {why}", path.display())))?;
                Ok(Checked::Path { path, stale })
            }
            Endpoint::Inherited(fd) => inherit(fd)
                .map(Checked::Inherited)
                .map_err(|why| StartError::usage(format!("file descriptor {fd}: {why}"))),
        }
    }
}

/// The descriptors that systemd passes, if it passes some to us.
fn systemd_fds() -> Result<std::ops::Range<RawFd>, StartError> {
    let ours = env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    let Some(count) = env::var("LISTEN_FDS").ok().filter(|_| ours) else {
        return Ok(SYSTEMD_FIRST_FD..SYSTEMD_FIRST_FD);
    };
    match count.parse::<u8>() {
        Ok(count) => Ok(SYSTEMD_FIRST_FD..SYSTEMD_FIRST_FD + RawFd::from(count)),
        Err(_) => Err(StartError::usage(format!("LISTEN_FDS is {count}, no number of sockets"))),
    }
}

/// Whether a stale socket is in the way at `path`.
fn check_path(path: &Path) -> Result<bool, String> {
    let kind = match path.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(plain(&e)),
        Ok(metadata) => metadata.file_type(),
    };
    if !kind.is_socket() {
        return Err("is there and is no socket; it will not be replaced".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("is in use by another process; stop that one or choose another path".into()),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(true),
        Err(e) => Err(format!("is a socket that cannot be tried: {}", plain(&e))),
    }
}

/// Takes over an inherited socket, listening or connected.
fn inherit(fd: RawFd) -> Result<Socket, String> {
    if fd <= 2 {
        return Err("is standard input or output".into());
    }
    // SAFETY: only looked at here, and only if it is open, which the call itself finds out.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let address = getsockname::<SockaddrStorage>(fd).map_err(|_| "is no open socket")?;
    if address.family() != Some(AddressFamily::Unix) {
        return Err("is no UNIX socket".into());
    }
    let listening = getsockopt(&borrowed, AcceptConn).map_err(|e| plain(&e.into()))?;
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| plain(&e.into()))?;
    // SAFETY: open, checked above; whoever passed it by number gave it to us, and it is taken once.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(match listening {
        true => Socket { listener: Some(owned.into()), connected: None, _made: None },
        false => Socket { listener: None, connected: Some(owned.into()), _made: None },
    })
}

/// A socket that can be had.
pub(super) enum Checked {
    Path { path: PathBuf, stale: bool },
    Inherited(Socket),
}

impl Checked {
    /// Makes the socket; from here on front ends can connect.
    pub(super) fn open(self) -> Result<Socket, StartError> {
        match self {
            Checked::Inherited(socket) => Ok(socket),
            Checked::Path { path, stale } => listen(&path, stale).map_err(|e| {
                StartError::host(format!("{}: cannot listen: {}", path.display(), plain(&e)))
            }),
        }
    }
}

fn listen(path: &Path, stale: bool) -> io::Result<Socket> {
    if stale {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let metadata = path.symlink_metadata()?;
    let made = Made { path: path.to_owned(), inode: (metadata.dev(), metadata.ino()) };
    Ok(Socket { listener: Some(listener), connected: None, _made: Some(made) })
}

/// Where front ends come from.
pub(super) struct Socket {
    listener: Option<UnixListener>,
    connected: Option<UnixStream>,
    /// Removed when the program ends.
    _made: Option<Made>,
}

impl Socket {
    /// The connection that was handed to us, once.
    pub(super) fn take_connected(&mut self) -> Option<UnixStream> {
        self.connected.take()
    }

    /// Whether more front ends can come.
    pub(super) fn is_listening(&self) -> bool {
        self.listener.is_some()
    }

    /// What to poll for them.
    pub(super) fn listener(&self) -> Option<&impl AsFd> {
        self.listener.as_ref()
    }

    /// The next one; `None` if it has gone again.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let Some(listener) = &self.listener else { return Ok(None) };
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Err(e),
            Err(_) => Ok(None),
        }
    }
}

/// The socket file we made; it goes with us, unless somebody has replaced it.
struct Made {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Made {
    fn drop(&mut self) {
        let ours = self.path.symlink_metadata().is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
