//! The transport: vhost-user and virtio-scsi. Nothing outside this folder knows of either.
//!
//! A connection is handled by [`connection`], which is told by [`messages`] what a front end sends. Each queue that
//! runs is owned by a thread of its own ([`worker`]), which nothing else touches: a connection talks
//! to it by messages. Queues 0 and 1 are the control and the event queue, the rest take commands.

mod connection;
mod dirty_log;
mod event_fd;
mod events;
mod guest_buf;
mod inflight;
mod lent;
mod memory;
mod message;
mod messages;
mod order;
mod requests;
mod ring;
mod split_ring;
mod tmf;
mod watchdog;
mod wire;
mod worker;

use std::fmt::Display;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost::vhost_user::Error;

use crate::limits;
use crate::scsi::{Lun, Port, Target, Tasks, UnitAttention};
use crate::store::engine::EngineKind;
use crate::store::engine::ending::Ending;
use connection::Connection;
use message::{Queues, Report, Sweep};
use watchdog::Watchdog;
use wire::Ended;

/// Queues before the first request queue.
pub const FIXED_QUEUES: usize = 2;

/// What the daemon is asked to offer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Number of request queues.
    pub request_queues: usize,
    /// Offer the CONFIG protocol feature. QEMU 7.1 to 8.0 misbehave when it is there.
    pub config_space: bool,
    /// What makes the transfers.
    pub engine: EngineKind,
    /// For how long a queue may look for requests before it sleeps.
    pub poll: Duration,
}

/// The queues of all ports, whether or not there is a connection by them now.
struct Connections {
    lines: Vec<Line>,
    /// By disk, where it is noted in flight who changes it.
    places: Vec<usize>,
}

/// A port.
struct Line {
    port: Port,
    queues: Arc<Queues>,
    /// Where its requests in flight were last noted.
    inflight: Mutex<Option<inflight::Region>>,
}

impl Line {
    fn inflight(&self) -> MutexGuard<'_, Option<inflight::Region>> {
        self.inflight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connections {
    fn new(target: &Target, queues: usize) -> Self {
        let line =
            |port| Line { port, queues: Arc::new(Queues::new(queues)), inflight: Mutex::default() };
        let places = target.disks().iter().map(|disk| inflight::place(disk)).collect();
        Connections { lines: target.ports().map(line).collect(), places }
    }

    fn all(&self) -> impl Iterator<Item = (Port, &Arc<Queues>)> {
        self.lines.iter().map(|line| (line.port, &line.queues))
    }

    fn of(&self, port: Port) -> Option<&Line> {
        self.lines.iter().find(|line| line.port == port)
    }

    /// The requests in flight of a port are noted there from now on.
    fn note_inflight(&self, port: Port, region: &inflight::Region, target: &Target) {
        region.begin_changes();
        // Where there are others it is kept when its guest has gone, for what they do until it is back.
        if let Some(line) = self.of(port).filter(|_| self.lines.len() > 1) {
            *line.inflight() = Some(region.clone());
        }
        // Only now, so that nobody is missed who has just begun.
        for (disk, place) in target.disks().iter().zip(&self.places) {
            if disk.sharing().is_changed_by_others(port) {
                region.note_change(*place);
            }
        }
    }

    /// Sweeps the queues of all other connections than `own`, for a reset.
    fn sweep_for_reset(&self, own: &Arc<Queues>, sweep: &Arc<Sweep>) {
        for (_, queues) in self.all().filter(|(_, queues)| !Arc::ptr_eq(queues, own)) {
            queues.sweep_for_reset(sweep);
        }
    }
}

impl Tasks for Connections {
    fn abort(&self, ports: &[Port], disk: usize, ending: Arc<Ending>) {
        let report = Report::Caller(ending);
        let sweep = Arc::new(Sweep::new(None, vec![disk], None, Some(Ended::TaskAborted), report));
        for (_, queues) in self.all().filter(|(port, _)| ports.contains(port)) {
            queues.sweep_running(&sweep);
        }
    }

    fn clear(&self, disk: usize, ending: Arc<Ending>) {
        let sweep = Arc::new(Sweep::clearing(disk, Report::Caller(ending)));
        self.all().for_each(|(_, queues)| queues.sweep_running(&sweep));
        self.fence(disk);
    }

    fn fence(&self, disk: usize) {
        let how = Some(Ended::As(wire::Response::Aborted));
        let sweep = Sweep::new(None, vec![disk], None, how, Report::Nobody);
        self.all().for_each(|(_, queues)| queues.fence(&sweep));
    }

    fn note_change(&self, port: Port, disk: usize) {
        let Some(place) = self.places.get(disk) else { return };
        for line in self.lines.iter().filter(|line| line.port != port) {
            if let Some(region) = &*line.inflight() {
                region.note_change(*place);
            }
        }
    }
}

/// The device that front ends connect to: several at a time, each by a port of its own.
pub struct Device {
    target: Arc<Target>,
    offer: Offer,
    connections: Arc<Connections>,
    watchdog: Watchdog,
    /// For each disk, how often its size was asked for since that was last begun to be found out.
    asked: Vec<AtomicU32>,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.watchdog.end();
    }
}

impl Device {
    /// A device over these disks.
    ///
    /// # Errors
    /// If the host has no thread for its watchdog.
    pub fn new(target: Arc<Target>, offer: Offer) -> io::Result<Self> {
        let queues = FIXED_QUEUES + offer.request_queues;
        let connections = Arc::new(Connections::new(&target, queues));
        let tasks: Arc<dyn Tasks> = Arc::<Connections>::clone(&connections);
        target.set_tasks(Arc::downgrade(&tasks));
        let asked = target.disks().iter().map(|_| AtomicU32::new(0)).collect();
        Ok(Device { target, offer, connections, watchdog: Watchdog::start()?, asked })
    }

    /// Serves one connection by a port, which has no other, until the front end goes away or
    /// [`UnixStream::shutdown`] is called for reading on `stream`. When it returns, nothing is in flight and the guest's memory is unmapped.
    pub fn serve(self: &Arc<Self>, port: Port, stream: &UnixStream) {
        let Some(Line { queues, .. }) = self.connections.of(port) else { return };
        let mut connection = Connection::new(Arc::clone(self), port, Arc::clone(queues));
        let end = messages::serve(stream, &mut connection);
        let gone =
            matches!(end, Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage);
        if !gone {
            close(stream);
        }
        connection.stop_all(true);
        // Only now: a front end that sees its connection break takes what is answered by then for all there is.
        close(stream);
        queues.hang_up();
        self.target.disconnected(port);
        match gone {
            true => log::info!("port {}: front end is gone", port.0),
            false => log::warn!("port {}: connection ended: {}", port.0, reason(&end)),
        }
    }

    /// Looks at the disks' sizes again and tells initiators about those that changed. Each disk is asked on its own
    /// pool, because its file system may hang: that keeps nobody waiting, and however often it is asked meanwhile, it
    /// is asked once more afterwards.
    pub fn refresh_capacities(self: &Arc<Self>) {
        for (disk, asked) in self.target.disks().iter().zip(&self.asked) {
            if asked.fetch_add(1, Ordering::AcqRel) == 0 {
                let (device, disk) = (Arc::clone(self), Arc::clone(disk));
                let pool = Arc::clone(disk.store());
                let begun = pool.pool().run(Box::new(move || device.refresh_capacity(&disk)));
                if begun.is_err() {
                    asked.store(0, Ordering::Release);
                }
            }
        }
    }

    /// Blocks.
    fn refresh_capacity(&self, disk: &Lun) {
        let Some(asked) = self.asked.get(disk.index()) else { return };
        let mut times = asked.load(Ordering::Acquire);
        while times > 0 {
            match disk.refresh_capacity() {
                Ok(false) => {}
                Ok(true) => self.announce_capacity(disk),
                Err(error) => log::error!("{}: size: {error}", disk.settings().serial),
            }
            let answered = asked.compare_exchange(times, 0, Ordering::AcqRel, Ordering::Acquire);
            times = answered.map_or_else(|more| more, |_| 0);
        }
    }

    /// The disks on which operations are under way, for people.
    pub fn busy_disks(&self) -> Vec<String> {
        let busy = |disk: &&Arc<Lun>| disk.exclusion().is_in_use() || disk.store().pool().is_busy();
        let name = |disk: &Arc<Lun>| {
            format!("target {} LUN {}", disk.settings().target, disk.settings().lun.get())
        };
        self.target.disks().iter().filter(busy).map(name).collect()
    }

    fn announce_capacity(&self, disk: &Lun) {
        let (target, lun) = (disk.settings().target, disk.settings().lun);
        log::info!("target {target} LUN {}: {} blocks now", lun.get(), disk.blocks());
        self.target.announce(disk, UnitAttention::CapacityChanged, None);
        for (_, queues) in self.connections.all() {
            let event =
                message::Event::parameters_changed(target, lun, UnitAttention::CapacityChanged);
            connection::send_event(queues, event);
        }
    }
}

fn close(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

/// Why a connection ended, for people.
fn reason(end: &Error) -> String {
    match end {
        Error::ReqHandlerError(error) => limits::behind(error).unwrap_or_else(|| error.to_string()),
        other => other.to_string(),
    }
}

/// Most request queues that can be asked for; the message that names a ring has one byte for it.
pub const MAX_REQUEST_QUEUES: usize = 256 - FIXED_QUEUES;

/// An [`io::Error`] as the message handler wants it.
fn refused(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

/// A message that breaks a rule: what is wrong with it. The connection ends with that.
fn wrong(what: impl Display) -> Error {
    refused(io::Error::other(what.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_of_a_connection_that_has_ended() {
        let target = Arc::new(Target::new(Vec::new(), 1));
        let offer = Offer {
            request_queues: 1,
            config_space: false,
            engine: EngineKind::Threads,
            poll: Duration::ZERO,
        };
        let device = Arc::new(Device::new(target, offer).unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        device.serve(Port(1), &ours);
        assert!(device.connections.all().all(|(_, queues)| Arc::strong_count(queues) == 1));
    }
}
