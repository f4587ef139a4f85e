//! vhost-user messages as bytes on a socket: well-formed ones, and any others.
//!
//! A message is a header of three native-endian words (request, flags, payload size), the
//! payload, and file descriptors as ancillary data of the first byte.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use super::PATIENCE;
use super::daemon::Diagnosis;
use super::memory::RegionInfo;

/// Message numbers of the vhost-user specification.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const VRING_KICK: u32 = 35;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Virtio feature bits, as masks.
pub mod feature {
    pub const SCSI_INOUT: u64 = 1 << 0;
    pub const SCSI_HOTPLUG: u64 = 1 << 1;
    pub const SCSI_CHANGE: u64 = 1 << 2;
    pub const SCSI_T10_PI: u64 = 1 << 3;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const ANY_LAYOUT: u64 = 1 << 27;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Protocol feature bits, as masks.
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

pub const FLAG_VERSION: u32 = 1;
pub const FLAG_REPLY: u32 = 1 << 2;
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// In the payload of SET_VRING_KICK, CALL and ERR: no descriptor is attached, poll instead.
pub const VRING_NO_FD: u64 = 1 << 8;

const HEADER_SIZE: usize = 12;

/// A message that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
}

impl Reply {
    #[track_caller]
    pub fn as_u64(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("a payload of 8 bytes"))
    }

    /// Index and number of a vring state.
    #[track_caller]
    pub fn as_state(&self) -> (u32, u32) {
        let value = self.as_u64().to_ne_bytes();
        let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }
}

/// One connection's message stream.
pub struct Channel {
    socket: UnixStream,
    diagnosis: Diagnosis,
}

impl Channel {
    pub fn new(socket: UnixStream, diagnosis: Diagnosis) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
        socket.set_write_timeout(Some(PATIENCE)).expect("SO_SNDTIMEO");
        Self { socket, diagnosis }
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    // ----- anything -------------------------------------------------------------------------

    /// Sends bytes and descriptors as they are. An error is the peer's hanging up.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
        let attached = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &attached[..] };
        let fd = self.socket.as_raw_fd();
        let iov = [IoSlice::new(bytes)];
        let sent = sendmsg::<UnixAddr>(fd, &iov, control, MsgFlags::MSG_NOSIGNAL, None)?;
        assert_eq!(sent, bytes.len(), "the socket took a part of a message");
        Ok(())
    }

    /// Sends a message with a header of one's own choice.
    pub fn send_message(
        &self,
        request: u32,
        flags: u32,
        size: u32,
        payload: &[u8],
        fds: &[RawFd],
    ) -> nix::Result<()> {
        let header = [request, flags, size].map(u32::to_ne_bytes).concat();
        self.send_bytes(&[&header[..], payload].concat(), fds)
    }

    /// Receives a message; `None` at the end of the stream.
    pub fn receive(&self) -> Option<Reply> {
        let mut header = [0; HEADER_SIZE];
        self.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        self.read_exact(&mut payload)?;
        Some(Reply { request: word(0), flags: word(4), payload })
    }

    /// A request whose reply brings a descriptor.
    #[track_caller]
    pub fn ask_for_file(&self, request: u32, payload: &[u8]) -> (Vec<u8>, File) {
        self.tell(request, payload, &[]);
        let mut bytes = [0; 256];
        let mut control = nix::cmsg_space!([RawFd; 1]);
        let (len, fd) = {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let fd = self.socket.as_raw_fd();
            let message = recvmsg::<UnixAddr>(fd, &mut iov, Some(&mut control), flags);
            let message = message.unwrap_or_else(|e| self.diagnosis.fail(&format!("reply: {e}")));
            let fds = message.cmsgs().unwrap().find_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            (message.bytes, fds)
        };
        let Some(fd) = fd else {
            self.diagnosis.fail(&format!("no descriptor with the reply to request {request}"));
        };
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), request, "a reply to another request");
        assert_eq!(word(8) as usize, len - HEADER_SIZE, "the reply came in one piece");
        // SAFETY: the descriptor has just come with the message, and nobody else knows of it.
        (bytes[HEADER_SIZE..len].to_vec(), unsafe { File::from_raw_fd(fd) })
    }

    fn read_exact(&self, bytes: &mut [u8]) -> Option<()> {
        use std::io::ErrorKind::{TimedOut, WouldBlock};
        match (&self.socket).read_exact(bytes) {
            Ok(()) => Some(()),
            Err(e) if matches!(e.kind(), WouldBlock | TimedOut) => {
                self.diagnosis.fail(&format!("no vhost-user reply within {PATIENCE:?}"))
            }
            Err(_) => None,
        }
    }

    /// Waits until the daemon has hung up; panics if it sends something or keeps the line.
    #[track_caller]
    pub fn expect_hangup(&self) {
        if let Some(reply) = self.receive() {
            self.diagnosis.fail(&format!("expected the daemon to hang up, got {reply:?}"));
        }
    }

    // ----- well-formed messages -------------------------------------------------------------

    /// A request without a reply.
    #[track_caller]
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
        self.tell_with_flags(request, FLAG_VERSION, payload, fds);
    }

    #[track_caller]
    fn tell_with_flags(&self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let sent = self.send_message(request, flags, payload.len() as u32, payload, fds);
        if let Err(e) = sent {
            self.diagnosis.fail(&format!("request {request} could not be sent: {e}"));
        }
    }

    /// A request that has a reply by nature.
    #[track_caller]
    pub fn ask(&self, request: u32, payload: &[u8]) -> Reply {
        self.tell(request, payload, &[]);
        self.reply_to(request)
    }

    /// A request with NEED_REPLY (the REPLY_ACK feature); returns 0 for success.
    #[track_caller]
    pub fn tell_and_wait(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> u64 {
        self.tell_with_flags(request, FLAG_VERSION | FLAG_NEED_REPLY, payload, fds);
        self.reply_to(request).as_u64()
    }

    #[track_caller]
    fn reply_to(&self, request: u32) -> Reply {
        let Some(reply) = self.receive() else {
            self.diagnosis.fail(&format!("the daemon hung up on request {request}"));
        };
        assert_eq!(reply.request, request, "a reply to another request");
        assert_eq!(reply.flags, FLAG_VERSION | FLAG_REPLY, "the flags of a reply");
        reply
    }

    #[track_caller]
    pub fn get_u64(&self, request: u32) -> u64 {
        self.ask(request, &[]).as_u64()
    }
}

/// The payload of SET_VRING_NUM, BASE, ENABLE and GET_VRING_BASE.
pub fn vring_state(index: usize, number: u32) -> Vec<u8> {
    [index as u32, number].map(u32::to_ne_bytes).concat()
}

/// The payload of SET_VRING_ADDR, with front end addresses.
pub fn vring_address(index: usize, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let log = 0;
    let words = [index as u32, 0].map(u32::to_ne_bytes).concat();
    [words, [desc, used, avail, log].map(u64::to_ne_bytes).concat()].concat()
}

/// The payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD, padded as C does it.
pub fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let words = [size, offset].map(u64::to_ne_bytes).concat();
    let halves = [queues, queue_size, 0, 0].map(u16::to_ne_bytes).concat();
    [words, halves].concat()
}

/// The payload of SET_MEM_TABLE.
pub fn memory_table(regions: &[RegionInfo]) -> Vec<u8> {
    let head = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    [head, regions.iter().flat_map(memory_region).collect()].concat()
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region(region: &RegionInfo) -> Vec<u8> {
    [0_u64.to_ne_bytes().to_vec(), memory_region(region)].concat()
}

fn memory_region(region: &RegionInfo) -> Vec<u8> {
    let RegionInfo { guest_address, size, user_address, file_offset, .. } = *region;
    [guest_address, size, user_address, file_offset].map(u64::to_ne_bytes).concat()
}
