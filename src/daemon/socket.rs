//! Where front ends come from: a socket of our own, or one that was handed to us.
#![allow(unsafe_code)]

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, SockType as TypeOf};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect,
    getpeername, getsockname, getsockopt, socket,
};
use nix::sys::stat::fstat;

use crate::cli::Cli;
use crate::config::{Identity, StartError};
use crate::store::file::plain;

/// The first descriptor that systemd passes (sd_listen_fds(3)).
const SYSTEMD_FIRST_FD: RawFd = 3;

/// Most bytes of a socket's path: `sun_path` has 108 (unix(7)), the last of them zero.
const MAX_PATH: usize = 107;

/// For how long another daemon may be in the middle of making a socket in the same directory.
const MAKING: Duration = Duration::from_secs(5);

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
        let passed = Passed::by_systemd()?;
        let paths = cli.socket_path.iter().cloned().map(Endpoint::Path);
        let mut all: Vec<Self> =
            paths.chain(cli.fd.iter().copied().map(Endpoint::Inherited)).collect();
        match passed {
            Passed::Sockets(_) if !cli.socket_path.is_empty() => {
                return Err(StartError::usage(
                    "--socket-path and LISTEN_FDS cannot be combined: use the socket of the \
                     systemd unit, or none",
                ));
            }
            Passed::Sockets(count) if all.is_empty() => {
                let fds = SYSTEMD_FIRST_FD..SYSTEMD_FIRST_FD + RawFd::from(count);
                all = fds.map(Endpoint::Inherited).collect();
            }
            Passed::ToAnother(pid) if all.is_empty() => {
                return Err(StartError::usage(format!(
                    "no socket: LISTEN_FDS is for process {pid} (LISTEN_PID), and this is {}",
                    std::process::id()
                )));
            }
            Passed::Sockets(_) | Passed::ToAnother(_) | Passed::Nothing => {}
        }
        if all.is_empty() {
            return Err(StartError::usage(
                "no socket: give --socket-path SOCK, --fd N, or use systemd socket activation",
            ));
        }
        if all.len() > MAX_SOCKETS {
            return Err(StartError::usage(format!("more than {MAX_SOCKETS} sockets")));
        }
        check_distinct(&all)?;
        Ok(all)
    }

    /// Finds out whether the socket can be had, without changing anything.
    pub(super) fn check(self) -> Result<Checked, StartError> {
        match self {
            Endpoint::Path(path) => {
                is_stale(&path)
                    .map_err(|why| StartError::host(format!("{}: {why}", path.display())))?;
                Ok(Checked::Path(path))
            }
            Endpoint::Inherited(fd) => inherit(fd)
                .map(Checked::Inherited)
                .map_err(|why| StartError::usage(format!("file descriptor {fd}: {why}"))),
        }
    }
}

/// No socket is named twice, by whatever names.
fn check_distinct(all: &[Endpoint]) -> Result<(), StartError> {
    let mut seen: Vec<(Identity, &Endpoint)> = Vec::new();
    for one in all {
        let identity = match one {
            Endpoint::Path(path) => Identity::of_name(path),
            // SAFETY: only looked at, and only if it is open, which the call itself finds out.
            Endpoint::Inherited(fd) => fstat(unsafe { BorrowedFd::borrow_raw(*fd) })
                .map_or(Identity::Unknown, |s| Identity::File(s.st_dev, s.st_ino)),
        };
        let same = |(other, named): &&(Identity, &Endpoint)| {
            *named == one || *other == identity && identity != Identity::Unknown
        };
        if let Some((_, first)) = seen.iter().find(same) {
            return Err(StartError::usage(match (first, one) {
                (Endpoint::Inherited(first), Endpoint::Inherited(fd)) if fd == first => {
                    format!("--fd: {fd} is given twice")
                }
                (Endpoint::Inherited(first), Endpoint::Inherited(fd)) => {
                    format!("--fd: one socket is given twice, as {first} and as {fd}")
                }
                (Endpoint::Path(first), Endpoint::Path(path))
                    if path.as_os_str() != first.as_os_str() =>
                {
                    format!(
                        "--socket-path: one socket is given twice, as {} and as {}",
                        first.display(),
                        path.display()
                    )
                }
                (_, Endpoint::Path(path)) => {
                    format!("--socket-path: {} is given twice", path.display())
                }
                (_, Endpoint::Inherited(fd)) => format!("--fd: {fd} is given twice"),
            }));
        }
        seen.push((identity, one));
    }
    Ok(())
}

/// What the environment says about sockets (sd_listen_fds(3)).
enum Passed {
    /// Nothing.
    Nothing,
    /// So many, to us.
    Sockets(u8),
    /// Some, to another process.
    ToAnother(String),
}

impl Passed {
    fn by_systemd() -> Result<Self, StartError> {
        let text = |name| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        let Some(count) = text("LISTEN_FDS") else { return Ok(Passed::Nothing) };
        match text("LISTEN_PID") {
            Some(pid) if pid == std::process::id().to_string() => {}
            Some(pid) => return Ok(Passed::ToAnother(pid)),
            None => return Ok(Passed::Nothing),
        }
        match count.parse::<u8>() {
            Ok(0) => Err(StartError::usage("LISTEN_FDS is 0: systemd has passed no socket")),
            Ok(count) => Ok(Passed::Sockets(count)),
            Err(_) => {
                Err(StartError::usage(format!("LISTEN_FDS is '{count}', not a number of sockets")))
            }
        }
    }
}

/// Whether a socket that nobody listens on is in the way at `path`.
fn is_stale(path: &Path) -> Result<bool, String> {
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_PATH {
        return Err(format!(
            "the path is {length} bytes long, and that of a UNIX socket has at most {MAX_PATH}"
        ));
    }
    let kind = match path.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(plain(&e)),
        Ok(metadata) => metadata.file_type(),
    };
    if !kind.is_socket() {
        return Err("exists and is not a socket; it will not be replaced".into());
    }
    match try_to_connect(path) {
        // EAGAIN: it is listened on, and its backlog is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(IN_USE.into()),
        Err(Errno::ECONNREFUSED) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(Errno::EPROTOTYPE) => Err("is in use, by a socket of another type".into()),
        Err(e) => Err(format!("cannot be tried: {}", plain(&e.into()))),
    }
}

const IN_USE: &str = "is in use by another process; stop that one or choose another path";

fn try_to_connect(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(probe.as_raw_fd(), &UnixAddr::new(path)?)
}

/// Takes over an inherited socket, listening or connected.
fn inherit(fd: RawFd) -> Result<Socket, String> {
    if fd <= 2 {
        return Err("is standard input or output".into());
    }
    // SAFETY: only looked at here, and only if it is open, which the call itself finds out.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let address = getsockname::<SockaddrStorage>(fd).map_err(|e| match e {
        Errno::EBADF => "is not open",
        _ => "is not a socket",
    })?;
    if address.family() != Some(AddressFamily::Unix) {
        return Err("is not a UNIX socket".into());
    }
    let text = |e: Errno| plain(&e.into());
    let kind = getsockopt(&borrowed, TypeOf).map_err(text)?;
    if kind != SockType::Stream {
        let what = match kind {
            SockType::Datagram => "a datagram socket",
            SockType::SeqPacket => "a sequenced packet socket",
            _ => "a socket of another type",
        };
        return Err(format!("is {what}; vhost-user is spoken over stream sockets"));
    }
    let listening = getsockopt(&borrowed, AcceptConn).map_err(text)?;
    if !listening && getpeername::<SockaddrStorage>(fd).is_err() {
        return Err("is a socket that neither listens nor is connected".into());
    }
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(text)?;
    // SAFETY: open, checked above; whoever passed it by number gave it to us, and it is taken once.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // Who passed it may have left it either way.
    let set = |result: io::Result<()>| result.map_err(|e| plain(&e));
    if listening {
        let listener = UnixListener::from(owned);
        set(listener.set_nonblocking(true))?;
        Ok(Socket { made: None, listener: Some(listener), connected: None })
    } else {
        let stream = UnixStream::from(owned);
        set(stream.set_nonblocking(false))?;
        Ok(Socket { made: None, listener: None, connected: Some(stream) })
    }
}

/// A socket that can be had.
pub(super) enum Checked {
    Path(PathBuf),
    Inherited(Socket),
}

impl Checked {
    /// Makes the socket; from here on front ends can connect.
    pub(super) fn open(self) -> Result<Socket, StartError> {
        match self {
            Checked::Inherited(socket) => Ok(socket),
            Checked::Path(path) => {
                listen(&path).map_err(|why| StartError::host(format!("{}: {why}", path.display())))
            }
        }
    }
}

/// Listens on a path. Of several daemons that find the same stale socket, or nothing, one has it: whoever replaces a
/// socket holds a lock on its directory from the look at the old one until the new one is listened on.
fn listen(path: &Path) -> Result<Socket, String> {
    let _lock = lock_directory(path);
    let cannot = |e: io::Error| match e.kind() {
        // By a program that does not know of the lock.
        ErrorKind::AddrInUse => IN_USE.to_owned(),
        _ => format!("cannot listen: {}", plain(&e)),
    };
    if is_stale(path)? {
        std::fs::remove_file(path).map_err(cannot)?;
    }
    let listener = UnixListener::bind(path).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let metadata = path.symlink_metadata().map_err(cannot)?;
    let made = Made { path: path.to_owned(), inode: (metadata.dev(), metadata.ino()) };
    Ok(Socket { made: Some(made), listener: Some(listener), connected: None })
}

/// The lock of the directory that `path` is in. `None` where there is no such lock: a directory that cannot be read,
/// a file system without locks; and where somebody keeps it who makes no socket.
fn lock_directory(path: &Path) -> Option<Flock<File>> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let start = Instant::now();
    loop {
        directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((_, Errno::EAGAIN)) if start.elapsed() > MAKING => {
                log::warn!(
                    "{}: its directory stays locked (flock) by another process; listening without \
                     the lock",
                    path.display()
                );
                return None;
            }
            Err((directory, Errno::EAGAIN)) => directory,
            Err(_) => return None,
        };
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where front ends come from.
pub(super) struct Socket {
    /// Removed while it is still listened on: a socket that is not may be another daemon's by then.
    made: Option<Made>,
    listener: Option<UnixListener>,
    connected: Option<UnixStream>,
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

    /// The next one; `None` if there is none, or it has gone again.
    ///
    /// # Errors
    /// If it cannot be taken now; it may still be there.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let Some(listener) = &self.listener else { return Ok(None) };
        match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) => match e.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(e),
            },
        }
    }

    /// Nobody can come any more.
    pub(super) fn close(&mut self) {
        self.made = None;
        self.listener = None;
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
