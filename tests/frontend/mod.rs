//! An in-process vhost-user front end: the part of QEMU and of the guest driver that a
//! vhost-user-scsi target sees, as a library for integration tests.
//!
//! ```text
//! Scratch ── Daemon              the real binary, its socket, its log, its end
//!              │
//!          FrontEnd              one connection: negotiation, memory, queues   (connection)
//!          ├─ Channel            vhost-user messages, also malformed ones      (protocol)
//!          ├─ GuestMemory        memfd regions and a heap inside them          (memory)
//!          └─ Queue, one a ring  exchanges, notifications, guard bytes         (queue)
//!               └─ Ring          descriptor table, avail ring, used ring       (ring)
//!
//! ScsiRequest / ScsiResponse     one command                                   (scsi, cdb)
//! Lun                            commands a test wants in one line             (lun)
//! lists of copies and tokens     what third-party copies are asked with         (third_party)
//! Tmf, Notification, Event       control and event queue                       (control)
//! Load                           transfers as fast as they go, stamped          (load)
//! ```
//!
//! The message channel and the rings are written from the specifications and share no code with
//! the crates that the daemon is built on, so that a defect there cannot hide behind itself.
//! (The `vhost` crate's own `Frontend` retries a timed out receive for ever, and refuses several
//! message orders that real front ends use.)
//!
//! **Nothing waits without a limit.** Every wait ends after [`PATIENCE`] at the latest and then
//! panics with the daemon's log, so a test that hangs says where and why.
//!
//! A test starts like this:
//!
//! ```ignore
//! let daemon = Daemon::with_disk(16 * MIB, "");
//! let fe = FrontEnd::connect(&daemon);
//! let lun = fe.ready_lun(0, 0);
//! lun.write10(0, &data);
//! assert_eq!(lun.read10(0, 8), data);
//! ```

// Every test file compiles this module for itself and uses a part of it.
#![allow(dead_code, unused_imports)]

use std::time::Duration;

pub mod cdb;
pub mod connection;
pub mod control;
pub mod daemon;
pub mod load;
pub mod lun;
pub mod memory;
pub mod pattern;
pub mod protocol;
pub mod queue;
pub mod ring;
pub mod scsi;
pub mod third_party;

pub use cdb::Cdb;
pub use connection::{FrontEnd, FrontEndBuilder, MemoryMessage, Order, RingMessage};
pub use control::{Event, Notification, Tmf};
pub use daemon::{Daemon, Scratch};
pub use load::{Driver, Load, Pattern};
pub use lun::Lun;
pub use memory::{GuestMemory, RegionSpec};
pub use pattern::Rng;
pub use queue::{Completion, Cuts, Exchange, Queue, Shape, Ticket};
pub use scsi::{Address, ScsiRequest, ScsiResponse, Sense, TaskAttribute};

/// The longest any single wait lasts before the test fails. Generous, because tests share two
/// slow cores with other builds; a healthy daemon never comes near it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A pause in which something that must not happen would have happened.
pub const A_MOMENT: Duration = Duration::from_millis(200);

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// Polls `condition` until it holds, for [`PATIENCE`] at most; `what` says what was waited for.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
