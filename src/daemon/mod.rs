//! The process: sockets, signals, and on each socket one guest after another.

mod signals;
mod socket;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::cli::{Cli, IoEngine, Sandbox};
use crate::config::{DiskConfig, StartError, open_disks};
use crate::sandbox::{self, Reach, Role};
use crate::scsi::{Port, Target, background};
use crate::store::engine::uring;
use crate::store::file::stable_name;
use crate::vhost::{Device, Offer};
use signals::{Signal, Signals};
use socket::{Checked, Endpoint, Socket};

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
    let endpoints = Endpoint::from_cli(cli)?;
    if cli.io_engine == IoEngine::IoUring && !uring::is_there() {
        return Err(StartError::host(
            "--io-engine: the kernel refuses io_uring; auto and threads work without it",
        ));
    }
    // Before there is any other thread, so that all of them have these signals blocked.
    let signals = Signals::block().map_err(|e| StartError::host(format!("signals: {e}")))?;
    let checked: Vec<_> = endpoints.into_iter().map(Endpoint::check).collect::<Result<_, _>>()?;
    let units = open_disks(&disks)?;
    let sockets: Vec<_> = checked.into_iter().map(Checked::open).collect::<Result<_, _>>()?;
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
    for unit in &units {
        let started = unit.store().pool().start();
        started.map_err(|e| StartError::host(format!("a thread for each disk: {e}")))?;
    }
    units.iter().for_each(background::resume);
    let offer = Offer {
        request_queues: cli.num_queues.into(),
        config_space: cli.config_space,
        engine: cli.io_engine.into(),
        poll: Duration::from_micros(cli.poll_us.into()),
    };
    let ports: Vec<_> =
        (1..).map(Port).zip(sockets).map(|(port, s)| Serving::of(port, s)).collect();
    let count = u16::try_from(ports.len()).unwrap_or(u16::MAX);
    let device = Device::new(Arc::new(Target::new(units, count)), offer)
        .map_err(|e| StartError::host(format!("watchdog thread: {e}")))?;
    let device = Arc::new(device);
    serve(&device, ports, &signals).map_err(|e| StartError::host(e.to_string()))
}

/// Leaves nothing that serving does not need.
fn lock_in(cli: &Cli, disks: &[DiskConfig]) -> Result<(), StartError> {
    if cli.sandbox == Sandbox::None {
        log::warn!("--sandbox=none: a fault in this process can do what its user can");
        return Ok(());
    }
    let reach = reach(disks, &cli.socket_path);
    let missing = sandbox::enter(&reach, cli.seccomp.into()).map_err(|e| {
        StartError::host(format!("--sandbox=strict: {e}; --sandbox=none does without"))
    })?;
    missing.iter().for_each(|what| log::warn!("{what}"));
    Ok(())
}

/// What is reached by name from here on: beside the disks that change, and the sockets. Nothing is made beside a disk that
/// is only read, nor beside a device: that is /dev.
fn reach(disks: &[DiskConfig], sockets: &[PathBuf]) -> Vec<Reach> {
    let folder = |path: &Path| Some(stable_name(path).ok()?.parent()?.to_path_buf());
    let changes = |disk: &&DiskConfig| {
        !disk.read_only && disk.path.metadata().is_ok_and(|metadata| metadata.is_file())
    };
    let beside = disks.iter().filter(changes).filter_map(|disk| folder(&disk.path));
    let sockets = sockets.iter().filter_map(|path| folder(path));
    beside.map(Reach::Beside).chain(sockets.map(Reach::Socket)).collect()
}

/// Serves one connection after another on every socket until a signal says to end, or the only connections
/// there were have gone.
fn serve(device: &Arc<Device>, mut all: Vec<Serving>, signals: &Signals) -> std::io::Result<()> {
    for serving in &mut all {
        serving.begin(device)?;
    }
    while all.iter().any(Serving::has_more) {
        let fds = std::iter::once(Some(PollFd::new(signals.as_fd(), PollFlags::POLLIN)));
        let fds: Vec<_> = fds.chain(all.iter().map(Serving::waits_for)).collect();
        let ready = wait(&fds)?;
        drop(fds);
        if ready.first() == Some(&true) {
            match signals.next()? {
                Some(Signal::End) => break,
                Some(Signal::Refresh) => device.refresh_capacities(),
                None => {}
            }
        }
        for (serving, _) in all.iter_mut().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
            serving.go_on(device)?;
        }
    }
    all.into_iter().for_each(Serving::end);
    Ok(())
}

/// Waits for one of the descriptors; says which are ready.
fn wait(fds: &[Option<PollFd<'_>>]) -> std::io::Result<Vec<bool>> {
    let mut present: Vec<PollFd<'_>> = fds.iter().flatten().cloned().collect();
    match poll(&mut present, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut ready = present.iter().map(|fd| fd.any().unwrap_or(false));
    Ok(fds.iter().map(|fd| fd.is_some() && ready.next() == Some(true)).collect())
}

/// A port: its socket, and the connection that is served on it now.
struct Serving {
    port: Port,
    socket: Socket,
    connected: Option<Connected>,
}

impl Serving {
    fn of(port: Port, socket: Socket) -> Self {
        Serving { port, socket, connected: None }
    }

    /// Whether it serves somebody, or may do so.
    fn has_more(&self) -> bool {
        self.connected.is_some() || self.socket.is_listening()
    }

    /// What there is to wait for: the end of the connection, or the next one; that one waits in the backlog
    /// until the last one's requests have ended.
    fn waits_for(&self) -> Option<PollFd<'_>> {
        let fd = match &self.connected {
            Some(connected) => Some(connected.done.as_fd()),
            None => self.socket.listener().map(AsFd::as_fd),
        };
        fd.map(|fd| PollFd::new(fd, PollFlags::POLLIN))
    }

    /// Takes up a connection that was handed over.
    fn begin(&mut self, device: &Arc<Device>) -> std::io::Result<()> {
        match self.socket.take_connected() {
            Some(stream) => self.connect(device, stream),
            None => Ok(()),
        }
    }

    /// What it waited for has come.
    fn go_on(&mut self, device: &Arc<Device>) -> std::io::Result<()> {
        if let Some(connected) = self.connected.take() {
            connected.end();
            return Ok(());
        }
        match self.socket.accept()? {
            Some(stream) => self.connect(device, stream),
            None => Ok(()),
        }
    }

    fn connect(&mut self, device: &Arc<Device>, stream: UnixStream) -> std::io::Result<()> {
        self.connected = Some(Connected::start(device, self.port, stream)?);
        Ok(())
    }

    /// Ends its connection; when this returns nothing of it is in flight.
    fn end(self) {
        self.connected.into_iter().for_each(Connected::end);
    }
}

/// A connection that is served.
struct Connected {
    stream: UnixStream,
    done: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Connected {
    fn start(device: &Arc<Device>, port: Port, stream: UnixStream) -> std::io::Result<Self> {
        log::info!("port {}: front end connected", port.0);
        let done = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let (device, served, end) = (Arc::clone(device), stream.try_clone()?, Arc::clone(&done));
        let thread = sandbox::spawn("connection".into(), Role::Connection, move || {
            device.serve(port, served);
            let _ = end.write(1);
        })?;
        Ok(Connected { stream, done, thread })
    }

    /// Ends the connection; when this returns nothing is in flight.
    fn end(self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
        if self.thread.join().is_err() {
            log::error!("connection thread failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    #[test]
    fn only_what_changes_and_is_a_file_has_something_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().canonicalize().unwrap();
        let image = |name: &str| {
            let folder = folder.join(name);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("image"), [0; 512]).unwrap();
            folder.join("image").display().to_string()
        };
        let mut arguments = vec![image("changes"), image("readonly") + ",readonly"];
        let devices = std::fs::read_dir("/dev").unwrap().flatten();
        let is_disk =
            |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_block_device());
        match devices.into_iter().find(is_disk) {
            Some(device) => arguments.push(device.path().display().to_string()),
            None => eprintln!("*** SKIPPED: nothing was proved of a block device: there is none"),
        }
        let disks: Vec<_> =
            arguments.iter().map(|a| DiskConfig::parse(a.as_ref()).unwrap()).collect();
        let wanted = [Reach::Beside(folder.join("changes")), Reach::Socket(folder.clone())];
        assert_eq!(reach(&disks, &[folder.join("socket")]), wanted);
    }
}
