//! The process: sockets, signals, and one guest after another.

mod signals;
mod socket;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::cli::{Cli, IoEngine, Sandbox};
use crate::config::{DiskConfig, StartError, open_disks};
use crate::sandbox::{self, Reach, Role};
use crate::scsi::{Target, background};
use crate::store::engine::uring;
use crate::store::file::stable_name;
use crate::vhost::{Device, Offer};
use signals::{Signal, Signals};
use socket::{Endpoint, Socket};

/// What `--print-capabilities` prints (vhost-user backend program conventions).
const CAPABILITIES: &str = r#"{"type": "scsi"}"#;

/// Runs the program until it is asked to end.
///
/// # Errors
/// If it cannot start; then nothing has changed.
pub fn run(cli: &Cli) -> Result<(), StartError> {
    if cli.print_capabilities {
        println!("{CAPABILITIES}");
        return Ok(());
    }
    let disks = cli.disks.iter().map(|a| DiskConfig::parse(a)).collect::<Result<Vec<_>, _>>()?;
    let endpoint = Endpoint::from_cli(cli)?;
    if cli.io_engine == IoEngine::IoUring && !uring::is_there() {
        return Err(StartError::host(
            "--io-engine: the kernel refuses io_uring; auto and threads work without it",
        ));
    }
    // Before there is any other thread, so that all of them have these signals blocked.
    let signals = Signals::block().map_err(|e| StartError::host(format!("signals: {e}")))?;
    let socket = endpoint.check()?;
    let units = open_disks(&disks)?;
    let socket = socket.open()?;
    for unit in &units {
        let s = unit.settings();
        log::info!(
            "target {} LUN {}: {} blocks of {} bytes, serial {}, {}",
            s.target,
            s.lun.get(),
            unit.blocks(),
            s.block_size,
            s.serial,
            unit.store().capabilities().ways
        );
    }
    lock_in(cli, &disks)?;
    units.iter().for_each(background::resume);
    let offer = Offer {
        request_queues: cli.num_queues.into(),
        config_space: cli.config_space,
        engine: cli.io_engine.into(),
        poll: Duration::from_micros(cli.poll_us.into()),
    };
    let device = Arc::new(Device::new(Arc::new(Target::new(units)), offer));
    serve(&device, socket, &signals).map_err(|e| StartError::host(e.to_string()))
}

/// Leaves nothing that serving does not need.
fn lock_in(cli: &Cli, disks: &[DiskConfig]) -> Result<(), StartError> {
    if cli.sandbox == Sandbox::None {
        log::warn!("--sandbox=none: a fault in this process can do what its user can");
        return Ok(());
    }
    let folder = |path: &Path| Some(stable_name(path).ok()?.parent()?.to_path_buf());
    let beside = disks.iter().filter_map(|disk| folder(&disk.path)).map(Reach::Beside);
    let socket = cli.socket_path.iter().filter_map(|path| folder(path)).map(Reach::Socket);
    let reach: Vec<Reach> = beside.chain(socket).collect();
    let missing = sandbox::enter(&reach, cli.seccomp.into()).map_err(|e| {
        StartError::host(format!("--sandbox=strict: {e}; --sandbox=none does without"))
    })?;
    missing.iter().for_each(|what| log::warn!("{what}"));
    Ok(())
}

/// Serves one connection after another until a signal says to end, or the only connection there is
/// has gone.
fn serve(device: &Arc<Device>, mut socket: Socket, signals: &Signals) -> std::io::Result<()> {
    let mut serving: Option<Serving> = None;
    loop {
        if serving.is_none() {
            if let Some(stream) = socket.take_connected() {
                serving = Some(Serving::start(device, stream)?);
            } else if !socket.is_listening() {
                return Ok(());
            }
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match &serving {
            Some(serving) => {
                fds.push(PollFd::new(serving.done.as_ref().as_fd(), PollFlags::POLLIN))
            }
            // The next front end waits in the backlog until the last one's requests have ended.
            None => {
                fds.extend(socket.listener().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)))
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready.first() == Some(&true) {
            match signals.next()? {
                Some(Signal::End) => {
                    if let Some(serving) = serving {
                        serving.end();
                    }
                    return Ok(());
                }
                Some(Signal::Refresh) => device.refresh_capacities(),
                None => {}
            }
        }
        if ready.get(1) == Some(&true) {
            serving = match serving.take() {
                Some(serving) => {
                    serving.end();
                    None
                }
                None => socket.accept()?.map(|s| Serving::start(device, s)).transpose()?,
            };
        }
    }
}

/// The connection that is served now.
struct Serving {
    stream: UnixStream,
    done: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Serving {
    fn start(device: &Arc<Device>, stream: UnixStream) -> std::io::Result<Self> {
        log::info!("front end connected");
        let done = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let (device, served, end) = (Arc::clone(device), stream.try_clone()?, Arc::clone(&done));
        let thread = sandbox::spawn("connection".into(), Role::Connection, move || {
            device.serve(served);
            let _ = end.write(1);
        })?;
        Ok(Serving { stream, done, thread })
    }

    /// Ends the connection; when this returns nothing is in flight.
    fn end(self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if self.thread.join().is_err() {
            log::error!("connection thread failed");
        }
    }
}
