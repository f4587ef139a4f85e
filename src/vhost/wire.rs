//! The virtio-scsi structures (VIRTIO 1.3 5.6.6). Numbers are little-endian; the CDB, the sense data
//! and the LUN are SCSI's own and big-endian.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::scsi::wire::CDB_SIZE;
use crate::scsi::{Delivery, Outcome, Status};

/// Bytes of sense data in a response (QEMU fixes `sense_size` to this).
pub(super) const SENSE_SIZE: usize = 96;

/// `virtio_scsi_req_cmd`, the part before data-out.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct CommandHeader {
    pub lun: [u8; 8],
    pub tag: U64,
    pub task_attribute: u8,
    /// Nobody looks at it, nor at the next.
    pub _priority: u8,
    pub _crn: u8,
    pub cdb: [u8; CDB_SIZE],
}

/// `virtio_scsi_req_cmd`, the part before data-in.
#[derive(IntoBytes, FromZeros, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct CommandResponse {
    pub sense_len: U32,
    pub residual: U32,
    pub status_qualifier: U16,
    pub status: u8,
    pub response: u8,
    pub sense: [u8; SENSE_SIZE],
}

/// VIRTIO_SCSI_S_*: what became of a request as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Response {
    Ok = 0,
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Reset = 4,
    Failure = 9,
    /// FUNCTION_SUCCEEDED; FUNCTION_COMPLETE is [`Response::Ok`].
    FunctionSucceeded = 10,
    FunctionRejected = 11,
    IncorrectLun = 12,
}

/// How a command is answered that was ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By its own initiator, or a reset.
    As(Response),
    /// By another initiator: with a status, as the TAS bit says (SAM-6 5.3.1).
    TaskAborted,
}

impl CommandResponse {
    /// The response of a command that was ended from outside.
    pub(super) fn ended(how: Ended, data_len: usize) -> Self {
        match how {
            Ended::As(response) => Self::bare(response, data_len),
            Ended::TaskAborted => {
                let status = Status::TaskAborted as u8;
                CommandResponse { status, ..Self::bare(Response::Ok, data_len) }
            }
        }
    }

    /// A response without status, sense or transfer.
    pub(super) fn bare(response: Response, data_len: usize) -> Self {
        let mut this = Self::new_zeroed();
        this.response = response as u8;
        this.residual = residual(data_len);
        this
    }

    /// The response for an outcome; `data_len` is the length of the data buffers.
    pub(super) fn new(outcome: &Outcome, data_len: usize) -> Self {
        let response = match outcome.delivery {
            Delivery::Complete => Response::Ok,
            Delivery::Overrun => Response::Overrun,
            Delivery::BadTarget => Response::BadTarget,
            Delivery::Aborted => Response::Aborted,
        };
        let mut this = Self::bare(response, data_len.saturating_sub(outcome.transferred));
        this.status = outcome.status as u8;
        let len = outcome.sense.len().min(SENSE_SIZE);
        this.sense_len = U32::new(u32::try_from(len).unwrap_or(0));
        for (to, from) in this.sense.iter_mut().zip(&outcome.sense) {
            *to = *from;
        }
        this
    }
}

fn residual(bytes: usize) -> U32 {
    U32::new(u32::try_from(bytes).unwrap_or(u32::MAX))
}

/// VIRTIO_SCSI_T_*: requests on the control queue.
pub(super) const T_TMF: u32 = 0;
pub(super) const T_AN_QUERY: u32 = 1;
pub(super) const T_AN_SUBSCRIBE: u32 = 2;

/// `virtio_scsi_ctrl_tmf`, the driver's part.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TaskManagement {
    pub kind: U32,
    pub subtype: U32,
    pub lun: [u8; 8],
    pub tag: U64,
}

/// `virtio_scsi_ctrl_an`, the driver's part.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct AsyncNotification {
    pub kind: U32,
    pub lun: [u8; 8],
    pub requested: U32,
}

/// `virtio_scsi_ctrl_an`, the device's part.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AsyncNotificationResponse {
    pub actual: U32,
    pub response: u8,
}

/// VIRTIO_SCSI_T_EVENTS_MISSED.
pub(super) const T_EVENTS_MISSED: u32 = 0x8000_0000;
/// VIRTIO_SCSI_T_NO_EVENT.
pub(super) const T_NO_EVENT: u32 = 0;
/// VIRTIO_SCSI_T_PARAM_CHANGE.
pub(super) const T_PARAM_CHANGE: u32 = 3;

/// `virtio_scsi_event`.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct EventBuffer {
    pub event: U32,
    pub lun: [u8; 8],
    pub reason: U32,
}

/// `virtio_scsi_config` (VIRTIO 1.3 5.6.4).
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Config {
    pub num_queues: U32,
    pub seg_max: U32,
    pub max_sectors: U32,
    pub cmd_per_lun: U32,
    pub event_info_size: U32,
    pub sense_size: U32,
    pub cdb_size: U32,
    pub max_channel: U16,
    pub max_target: U16,
    pub max_lun: U32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_standards() {
        assert_eq!(size_of::<CommandHeader>(), 51);
        assert_eq!(size_of::<CommandResponse>(), 108);
        assert_eq!(size_of::<TaskManagement>(), 24);
        assert_eq!(size_of::<AsyncNotification>(), 16);
        assert_eq!(size_of::<AsyncNotificationResponse>(), 5);
        assert_eq!(size_of::<EventBuffer>(), 16);
        assert_eq!(size_of::<Config>(), 36);
    }
}
