//! The event queue: what the driver is told without having asked (VIRTIO 1.3 5.6.6.3).
//!
//! Buffers stay in the ring until there is something to put into them, so that a stopped queue has
//! lost none.

use zerocopy::IntoBytes;

use super::message::{Event, Message};
use super::ring::Ring;
use super::wire::{EventBuffer, T_EVENTS_MISSED, T_NO_EVENT};
use super::worker::{Service, Step};

/// Serves the event queue.
pub(super) struct EventQueue {
    /// The driver wants to know of changed parameters (VIRTIO_SCSI_F_CHANGE).
    changes: bool,
    /// An event was lost for want of a buffer; the next one says so.
    missed: bool,
}

impl EventQueue {
    /// An event queue; `changes` says whether VIRTIO_SCSI_F_CHANGE was accepted.
    pub(super) fn new(changes: bool) -> Self {
        EventQueue { changes, missed: false }
    }

    /// Puts an event into the next buffer. Without one, or with one that is too short, the event is
    /// lost.
    fn deliver(&mut self, ring: &mut Ring, event: Event) {
        let Some(chain) = ring.pop() else {
            self.missed = true;
            return;
        };
        if chain.writable.len() < size_of::<EventBuffer>() {
            self.missed = true;
            return ring.refuse(chain.head, "event buffer too short");
        }
        let missed = if std::mem::take(&mut self.missed) { T_EVENTS_MISSED } else { 0 };
        let buffer = EventBuffer {
            event: (event.kind | missed).into(),
            lun: event.lun,
            reason: event.reason.into(),
        };
        ring.push(chain.head, chain.writable.write_at(0, buffer.as_bytes()));
    }
}

/// What is said when there is nothing to say but that something was missed.
const NOTHING: Event = Event { kind: T_NO_EVENT, lun: [0; 8], reason: 0 };

impl Service for EventQueue {
    fn advance(&mut self, ring: &mut Ring, take: bool) -> Step {
        if take && self.missed && ring.has_requests() {
            self.deliver(ring, NOTHING);
        }
        Step::Rest { more: false }
    }

    fn progress(&mut self, _: &mut Ring) {}

    fn message(&mut self, ring: &mut Ring, message: Message) {
        if let Message::Event(event) = message
            && self.changes
        {
            self.deliver(ring, event);
        }
    }

    fn wants_requests(&self, _: &Ring) -> bool {
        self.missed
    }

    fn in_flight(&self) -> usize {
        0
    }
}
