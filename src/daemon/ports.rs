//! The ports: on each socket one guest after another, until the program is to end.
//!
//! The main thread polls here and does nothing else. It asks the host for nothing that can hang, waits for no thread
//! that has not ended, and goes on when a limit is hit: a guest that cannot be served is hung up on.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::signals::{Signal, Signals};
use super::socket::Socket;
use crate::limits;
use crate::sandbox::{self, Role};
use crate::scsi::Port;
use crate::store::file::plain;
use crate::vhost::Device;

/// How long a port rests after a guest could not be served: at first, and at most.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// How often that is said.
const SAY_EACH: Duration = Duration::from_secs(10);

/// How often it is looked, once all connections were told to end, for front ends that read no replies.
const LOOK: Duration = Duration::from_millis(100);

/// For how long connections are waited for at least: so long may one with nothing in flight take to end.
const ENDING: Duration = Duration::from_millis(200);

/// All ports of the daemon.
pub(super) struct Ports<'a> {
    device: &'a Arc<Device>,
    signals: &'a Signals,
    all: Vec<Serving>,
    reserve: Reserve,
    polls: Complaint,
}

impl<'a> Ports<'a> {
    /// A port for each socket. Connections that were handed over are served from here on.
    ///
    /// # Errors
    /// If the host has not what they need.
    pub(super) fn open(
        device: &'a Arc<Device>,
        signals: &'a Signals,
        sockets: Vec<Socket>,
    ) -> io::Result<Self> {
        let serving = (1..).map(Port).zip(sockets);
        let all = serving.map(|(port, socket)| Serving::begin(device, port, socket));
        let all = all.collect::<io::Result<_>>()?;
        let (reserve, polls) = (Reserve::of(signals), Complaint::default());
        Ok(Ports { device, signals, all, reserve, polls })
    }

    /// Serves until a signal says to end, or the only connections there were have gone. Then every connection has so
    /// long to end; says whether all have.
    pub(super) fn serve(mut self, grace: Duration) -> bool {
        while self.all.iter().any(Serving::has_more) {
            match self.wait(None) {
                Some(Signal::End) => return self.end(grace),
                Some(Signal::Refresh) => self.device.refresh_capacities(),
                None => {}
            }
        }
        true
    }

    /// Tells all connections to end before it waits for any. A second signal ends the waiting.
    fn end(mut self, grace: Duration) -> bool {
        self.all.iter_mut().for_each(Serving::hang_up);
        let (asked, grace) = (Instant::now(), grace.max(ENDING));
        let mut again = false;
        while self.all.iter().any(Serving::has_more) {
            let left = grace.saturating_sub(asked.elapsed());
            if again || left.is_zero() {
                self.say_who_is_busy(asked.elapsed());
                // Nobody is hung up on: as long as a thread is in a call of the host, it may still write to the
                // medium or to guest memory. The kernel closes the connections when the last thread is gone.
                return false;
            }
            again = self.wait(Some(left.min(LOOK))) == Some(Signal::End);
            self.all.iter().for_each(Serving::unblock);
        }
        true
    }

    /// Waits for signals, ends of connections, and front ends, for so long at most. Handles all but signals.
    fn wait(&mut self, limit: Option<Duration>) -> Option<Signal> {
        let now = Instant::now();
        let rest = self.all.iter().filter_map(|serving| serving.rests_for(now)).min();
        let limit = limit.into_iter().chain(rest).min();
        let fds: Vec<_> = std::iter::once(Some(self.signals.as_fd()))
            .chain(self.all.iter().map(|serving| serving.waits_for(now)))
            .collect();
        let ready = ready(&fds, limit).unwrap_or_else(|error| {
            // Memory, or a limit of open files below the number polled. All may be ready: nothing that is done then
            // waits.
            if self.polls.is_due() {
                log::warn!("poll: {error}");
            }
            std::thread::sleep(LOOK);
            fds.iter().map(Option::is_some).collect()
        });
        drop(fds);
        let mut ended = false;
        for (serving, _) in self.all.iter_mut().zip(ready.iter().skip(1)).filter(|(_, r)| **r) {
            ended |= serving.go_on(self.device, &mut self.reserve);
        }
        if ended {
            // What it had is there for others now.
            self.all.iter_mut().for_each(|serving| serving.pause.until = None);
        }
        self.reserve.fill(self.signals);
        if ready.first() != Some(&true) {
            return None;
        }
        self.signals.next().unwrap_or_else(|error| {
            log::error!("signals: {error}");
            None
        })
    }

    fn say_who_is_busy(&self, time: Duration) {
        let busy = self.all.iter().filter(|s| s.connected.is_some());
        let ports: Vec<_> = busy.map(|s| format!("port {}", s.port.0)).collect();
        let disks = self.device.busy_disks();
        let at = match disks.is_empty() {
            true => String::new(),
            false => format!(", with operations under way on {}", disks.join(", ")),
        };
        log::error!(
            "{} did not end within {:.1} s{at}; ending without: commands in flight are left to the \
             in-flight region, if the front end has one",
            ports.join(", "),
            time.as_secs_f32()
        );
    }
}

/// Waits for one of the descriptors, or for so long; says which are ready.
fn ready(fds: &[Option<BorrowedFd<'_>>], limit: Option<Duration>) -> nix::Result<Vec<bool>> {
    let mut present: Vec<_> =
        fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    // Rounded up: a wait that ends too early would be made again and again.
    let millis = limit.map(|limit| limit.as_nanos().div_ceil(1_000_000));
    let timeout = millis.map(|m| PollTimeout::try_from(m).unwrap_or(PollTimeout::MAX));
    match poll(&mut present, timeout.unwrap_or(PollTimeout::NONE)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error),
    }
    let mut ready = present.iter().map(|fd| fd.any().unwrap_or(false));
    Ok(fds.iter().map(|fd| fd.is_some() && ready.next() == Some(true)).collect())
}

/// A descriptor that is kept, so that there is one to take a connection with when there is none left: a front end
/// that stayed in the backlog would wait for an answer, and QEMU stops the whole guest while it waits. One that is
/// hung up on says so, or comes again.
struct Reserve(Option<OwnedFd>);

impl Reserve {
    fn of(signals: &Signals) -> Self {
        Reserve(signals.as_fd().try_clone_to_owned().ok())
    }

    fn fill(&mut self, signals: &Signals) {
        if self.0.is_none() {
            *self = Self::of(signals);
        }
    }

    /// Hangs up on whoever is the next, if that can be: else it stays in the backlog.
    fn turn_away(&mut self, socket: &Socket) {
        if self.0.take().is_some() {
            let _ = socket.accept();
        }
    }
}

/// When a port looks for front ends again.
#[derive(Default)]
struct Pause {
    until: Option<Instant>,
    length: Option<Duration>,
}

impl Pause {
    fn begin(&mut self) {
        let [first, longest] = PAUSE;
        let length = self.length.map_or(first, |length| (length * 2).min(longest));
        self.length = Some(length);
        self.until = Some(Instant::now() + length);
    }

    fn end(&mut self) {
        (self.until, self.length) = (None, None);
    }
}

/// Something that is said once in a while.
#[derive(Default)]
struct Complaint(Option<Instant>);

impl Complaint {
    /// Whether it is time to say it.
    fn is_due(&mut self) -> bool {
        let due = self.0.is_none_or(|said| said.elapsed() >= SAY_EACH);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// A port: its socket, and the connection that is served on it now.
struct Serving {
    port: Port,
    socket: Socket,
    connected: Option<Connected>,
    pause: Pause,
    refusals: Complaint,
}

impl Serving {
    /// Takes up a connection if one was handed over.
    fn begin(device: &Arc<Device>, port: Port, mut socket: Socket) -> io::Result<Self> {
        let stream = socket.take_connected();
        let connected = stream.map(|stream| Connected::start(device, port, stream)).transpose()?;
        let (pause, refusals) = (Pause::default(), Complaint::default());
        Ok(Serving { port, socket, connected, pause, refusals })
    }

    /// Whether it serves somebody, or may do so.
    fn has_more(&self) -> bool {
        self.connected.is_some() || self.socket.is_listening()
    }

    /// How long it is until front ends are looked for again.
    fn rests_for(&self, now: Instant) -> Option<Duration> {
        let until = self.pause.until.filter(|_| self.connected.is_none())?;
        Some(until.saturating_duration_since(now)).filter(|rest| !rest.is_zero())
    }

    /// What there is to wait for: the end of the connection, or the next one; that one waits in the backlog
    /// until the last one's requests have ended.
    fn waits_for(&self, now: Instant) -> Option<BorrowedFd<'_>> {
        match &self.connected {
            Some(connected) => Some(connected.done.as_fd()),
            None if self.rests_for(now).is_some() => None,
            None => self.socket.listener().map(AsFd::as_fd),
        }
    }

    /// What it waited for may have come. Says whether a connection has ended.
    fn go_on(&mut self, device: &Arc<Device>, reserve: &mut Reserve) -> bool {
        match self.connected.take_if(|connected| connected.is_done()) {
            Some(connected) => {
                connected.join();
                return true;
            }
            None if self.connected.is_some() => return false,
            None => {}
        }
        match self.socket.accept() {
            Ok(None) => {}
            Ok(Some(stream)) => match Connected::start(device, self.port, stream) {
                Ok(connected) => {
                    self.connected = Some(connected);
                    self.pause.end();
                }
                Err(error) => self.refuse(&error),
            },
            Err(error) => {
                reserve.turn_away(&self.socket);
                self.refuse(&error);
            }
        }
        false
    }

    /// A front end could not be served.
    fn refuse(&mut self, error: &io::Error) {
        self.pause.begin();
        if self.refusals.is_due() {
            let why = limits::behind(error).unwrap_or_else(|| plain(error));
            log::warn!("port {}: a front end was refused: {why}", self.port.0);
        }
    }

    /// Takes no more front ends, and tells the one that it has to end.
    fn hang_up(&mut self) {
        self.socket.close();
        if let Some(connected) = &self.connected {
            let _ = connected.stream.shutdown(Shutdown::Read);
        }
    }

    /// Ends the wait of a connection for a front end that reads no replies, once it was told to end. Such a front end
    /// may see the connection break before its last requests are answered.
    fn unblock(&self) {
        let Some(connected) = &self.connected else { return };
        let mut fds = [PollFd::new(connected.stream.as_fd(), PollFlags::POLLOUT)];
        let writable =
            |fd: &PollFd<'_>| fd.revents().is_some_and(|r| r.contains(PollFlags::POLLOUT));
        if poll(&mut fds, PollTimeout::ZERO).is_ok() && !fds.iter().any(writable) {
            let _ = connected.stream.shutdown(Shutdown::Both);
        }
    }
}

/// A connection that is served.
struct Connected {
    stream: Arc<UnixStream>,
    /// Readable when it is no longer served.
    done: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Connected {
    fn start(device: &Arc<Device>, port: Port, stream: UnixStream) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let (stream, done) = (Arc::new(stream), Arc::new(EventFd::from_flags(flags)?));
        let (device, served, end) = (Arc::clone(device), Arc::clone(&stream), Arc::clone(&done));
        let thread = sandbox::spawn("connection".into(), Role::Connection, move || {
            log::info!("port {}: front end connected", port.0);
            device.serve(port, &served);
            let _ = end.write(1);
        })?;
        Ok(Connected { stream, done, thread })
    }

    /// Whether nothing of it is in flight any more, so that joining its thread takes no time.
    fn is_done(&self) -> bool {
        self.done.read().is_ok()
    }

    fn join(self) {
        if self.thread.join().is_err() {
            log::error!("connection thread failed");
        }
    }
}
