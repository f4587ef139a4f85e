//! The control queue (task management, asynchronous notification) and the event queue
//! (VIRTIO 1.3, 5.6.6.2 and 5.6.6.3).

use super::queue::{Completion, Exchange, Shape};
use super::scsi::Address;

const TYPE_TMF: u32 = 0;

/// Task management functions by subtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Tmf {
    AbortTask = 0,
    AbortTaskSet = 1,
    ClearAca = 2,
    ClearTaskSet = 3,
    ItNexusReset = 4,
    LogicalUnitReset = 5,
    QueryTask = 6,
    QueryTaskSet = 7,
}

impl Tmf {
    pub const ALL: [Self; 8] = [
        Self::AbortTask,
        Self::AbortTaskSet,
        Self::ClearAca,
        Self::ClearTaskSet,
        Self::ItNexusReset,
        Self::LogicalUnitReset,
        Self::QueryTask,
        Self::QueryTaskSet,
    ];

    /// Subtype, addressed unit and, for the two that name one, the tag of a task.
    pub fn exchange(self, address: Address, tag: u64) -> Exchange {
        tmf_exchange(self as u32, address, tag)
    }
}

/// A task management request with any subtype.
pub fn tmf_exchange(subtype: u32, address: Address, tag: u64) -> Exchange {
    let kind = [TYPE_TMF, subtype].map(u32::to_le_bytes).concat();
    control_exchange([&kind[..], &address.0, &tag.to_le_bytes()].concat(), 1)
}

/// The response code of a task management request.
pub fn tmf_response(completion: &Completion) -> u8 {
    assert_eq!(completion.used_len, 1, "the used length of a task management response");
    completion.writable[0]
}

/// Asynchronous notification requests by type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Notification {
    Query = 1,
    Subscribe = 2,
}

impl Notification {
    pub fn exchange(self, address: Address, events: u32) -> Exchange {
        let kind = (self as u32).to_le_bytes();
        control_exchange([&kind[..], &address.0, &events.to_le_bytes()].concat(), 5)
    }
}

/// The events that are supported or subscribed, and the response code.
pub fn notification_response(completion: &Completion) -> (u32, u8) {
    assert_eq!(completion.used_len, 5, "the used length of a notification response");
    let bytes = &completion.writable;
    (u32::from_le_bytes(bytes[..4].try_into().unwrap()), bytes[4])
}

fn control_exchange(readable: Vec<u8>, writable: usize) -> Exchange {
    let readable_header = readable.len();
    Exchange {
        readable,
        readable_header,
        writable,
        writable_header: writable,
        ..Exchange::default()
    }
}

/// Event numbers.
pub mod event {
    pub const NO_EVENT: u32 = 0;
    pub const TRANSPORT_RESET: u32 = 1;
    pub const ASYNC_NOTIFY: u32 = 2;
    pub const PARAM_CHANGE: u32 = 3;
    /// Set in the number when events were dropped for want of buffers.
    pub const EVENTS_MISSED: u32 = 0x8000_0000;

    pub const RESET_RESCAN: u32 = 1;
    pub const RESET_REMOVED: u32 = 2;
}

/// One entry of the event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub event: u32,
    pub address: Address,
    pub reason: u32,
}

impl Event {
    pub const SIZE: usize = 16;

    /// An empty buffer for the device to report an event in.
    pub fn buffer() -> Exchange {
        Exchange { writable: Self::SIZE, writable_header: Self::SIZE, ..Exchange::default() }
    }

    pub fn parse(completion: &Completion) -> Self {
        assert_eq!(completion.used_len as usize, Self::SIZE, "the used length of an event");
        let bytes = &completion.writable;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Self {
            event: word(0),
            address: Address(bytes[4..12].try_into().unwrap()),
            reason: word(12),
        }
    }

    /// The additional sense code and qualifier of a PARAM_CHANGE.
    pub fn sense(&self) -> (u8, u8) {
        let [asc, ascq, ..] = self.reason.to_le_bytes();
        (asc, ascq)
    }
}
