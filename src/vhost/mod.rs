//! The transport: vhost-user and virtio-scsi. Nothing outside this folder knows of either.
//!
//! A connection is handled by [`connection`] over the `vhost` crate's message parser. Each queue that
//! runs is owned by a thread of its own ([`worker`]), which nothing else touches: a connection talks
//! to it by messages. Queues 0 and 1 are the control and the event queue, the rest take commands.

mod connection;
mod dirty_log;
mod early;
mod events;
mod guest_buf;
mod inflight;
mod memory;
mod message;
mod order;
mod requests;
mod ring;
mod split_ring;
mod tmf;
mod wire;
mod worker;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::{BackendReqHandler, Error};

use crate::scsi::{Lun, Target, UnitAttention};
use crate::store::engine::EngineKind;
use connection::Connection;
use message::Peers;

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

/// The device that front ends connect to, one after another.
pub struct Device {
    target: Arc<Target>,
    offer: Offer,
    /// The queues of the connection that is served now.
    peers: Mutex<Option<Peers>>,
}

impl Device {
    /// A device over these disks.
    pub fn new(target: Arc<Target>, offer: Offer) -> Self {
        Device { target, offer, peers: Mutex::default() }
    }

    /// Serves one connection until the front end goes away or [`UnixStream::shutdown`] is called on a
    /// clone of `stream`. When it returns, nothing is in flight and the guest's memory is unmapped.
    pub fn serve(self: &Arc<Self>, stream: UnixStream) {
        let connection = Connection::new(Arc::clone(self));
        *self.peers() = Some(connection.peers());
        let connection = Arc::new(Mutex::new(connection));
        let queues = FIXED_QUEUES + self.offer.request_queues;
        let end = match stream.try_clone() {
            Ok(copy) => handle_messages(queues, &copy, stream, &connection),
            Err(error) => refused(error),
        };
        *self.peers() = None;
        connection.lock().unwrap_or_else(PoisonError::into_inner).stop_all(true);
        match end {
            Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => {
                log::info!("front end is gone");
            }
            error => log::warn!("connection ended: {error}"),
        }
    }

    /// Looks at the disks' sizes again and tells initiators about those that changed.
    pub fn refresh_capacities(&self) {
        for disk in self.target.disks() {
            match disk.refresh_capacity() {
                Ok(false) => {}
                Ok(true) => self.announce_capacity(disk),
                Err(error) => log::error!("{}: size: {error}", disk.settings().serial),
            }
        }
    }

    fn announce_capacity(&self, disk: &Lun) {
        let (target, lun) = (disk.settings().target, disk.settings().lun);
        log::info!("target {target} LUN {}: {} blocks now", lun.get(), disk.blocks());
        self.target.announce(disk, UnitAttention::CapacityChanged, None);
        if let Some(peers) = self.peers().as_ref() {
            let event =
                message::Event::parameters_changed(target, lun, UnitAttention::CapacityChanged);
            connection::send_event(peers, event);
        }
    }

    fn peers(&self) -> std::sync::MutexGuard<'_, Option<Peers>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handles one message after another until there is an end to it.
fn handle_messages(
    queues: usize,
    peek: &UnixStream,
    stream: UnixStream,
    connection: &Arc<Mutex<Connection>>,
) -> Error {
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(connection));
    let end = loop {
        match early::answer_queue_num(peek, queues) {
            Ok(true) => {}
            Ok(false) => {
                if let Err(end) = handler.handle_request() {
                    break end;
                }
            }
            Err(error) => break Error::SocketBroken(error),
        }
    };
    let _ = peek.shutdown(Shutdown::Both);
    end
}

/// Most request queues that can be asked for; the message that names a ring has one byte for it.
pub const MAX_REQUEST_QUEUES: usize = 256 - FIXED_QUEUES;

/// An [`io::Error`] as the message handler wants it.
fn refused(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}
