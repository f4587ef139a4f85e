//! The event queue: what the driver is told without having asked (VIRTIO 1.3 5.6.6.3).
//!
//! Buffers stay in the ring until there is something to put into them, so that a stopped queue has
//! lost none.

use std::collections::VecDeque;

use zerocopy::IntoBytes;

use super::ring::Ring;
use super::wire::{EventBuffer, T_EVENTS_MISSED, T_NO_EVENT, T_PARAM_CHANGE};
use super::worker::{Message, Service};
use crate::scsi::{LunNumber, UnitAttention};

/// Events kept while the driver has no buffer for them; more than these are missed.
const MAX_WAITING: usize = 16;

/// Something that happened to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    kind: u32,
    lun: [u8; 8],
    reason: u32,
}

impl Event {
    /// The parameters of a disk changed; the reason is the unit attention's code (ASC in the low
    /// byte, ASCQ above it).
    pub(super) fn parameters_changed(target: u8, lun: LunNumber, attention: UnitAttention) -> Self {
        let [high, low, ..] = lun.encode();
        let [asc, ascq] = attention.asc().to_be_bytes();
        Event {
            kind: T_PARAM_CHANGE,
            lun: [1, target, high, low, 0, 0, 0, 0],
            reason: u32::from(asc) | u32::from(ascq) << 8,
        }
    }
}

/// Serves the event queue.
#[derive(Default)]
pub(super) struct EventQueue {
    waiting: VecDeque<Event>,
    missed: bool,
}

impl EventQueue {
    fn next(&mut self) -> Option<Event> {
        let nothing = Event { kind: T_NO_EVENT, lun: [0; 8], reason: 0 };
        self.waiting.pop_front().or(self.missed.then_some(nothing))
    }

    fn deliver(&mut self, ring: &mut Ring) {
        while !self.waiting.is_empty() || self.missed {
            let Some(chain) = ring.pop() else { return };
            if chain.writable.len() < size_of::<EventBuffer>() {
                // VIRTIO 1.3 5.6.6.3.1: the event is lost with the buffer, and that is told.
                self.missed = true;
                self.waiting.pop_front();
                ring.refuse(chain.head, "event buffer too short");
                return;
            }
            let Some(event) = self.next() else { return };
            let missed = if std::mem::take(&mut self.missed) { T_EVENTS_MISSED } else { 0 };
            let buffer = EventBuffer {
                event: (event.kind | missed).into(),
                lun: event.lun,
                reason: event.reason.into(),
            };
            ring.push(chain.head, chain.writable.write_at(0, buffer.as_bytes()));
        }
    }
}

impl Service for EventQueue {
    fn requests(&mut self, ring: &mut Ring) -> bool {
        self.deliver(ring);
        false
    }

    fn progress(&mut self, _: &mut Ring) {}

    fn message(&mut self, ring: &mut Ring, message: Message) {
        if let Message::Event(event) = message {
            if self.waiting.len() < MAX_WAITING {
                self.waiting.push_back(event);
            } else {
                self.missed = true;
            }
            self.deliver(ring);
        }
    }

    fn wants_requests(&self, _: &Ring) -> bool {
        !self.waiting.is_empty() || self.missed
    }

    fn in_flight(&self) -> usize {
        0
    }
}
