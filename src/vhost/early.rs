//! What is looked at before the `vhost` crate's parser sees a message.
//!
//! SPDK's front end asks for the number of queues whether or not it has negotiated MQ. The parser takes
//! that for a breach of protocol and hangs up; the answer is the same either way.
//!
//! The kernel drops descriptors that come with a message when this process may have no more. The parser takes that for
//! a passing failure and goes on with the bytes that follow, as if they were another message; so it is only asked to
//! receive descriptors for which there is room.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, UnixAddr, recvmsg};
use vhost::vhost_user::{Error, Result};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// VHOST_USER_SET_MEM_TABLE, and the length of its regions in bytes.
const SET_MEM_TABLE: u32 = 5;
const REGION: u32 = 32;
/// Most descriptors that the parser takes with a message.
const MAX_DESCRIPTORS: u32 = 32;
/// VHOST_USER_GET_QUEUE_NUM.
const GET_QUEUE_NUM: u32 = 17;
/// Version 1 of the protocol, and the mark of a reply.
const REPLY: u32 = 0x1 | 0x4;

/// Header of a vhost-user message; numbers are in the machine's own order.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    request: U32,
    flags: U32,
    size: U32,
}

/// Waits for the next message. If it is GET_QUEUE_NUM, takes it and answers it; says whether it did.
///
/// # Errors
/// If the answer cannot be sent, or there is no room for the descriptors that come with the message.
pub(super) fn answer_queue_num(mut stream: &UnixStream, queues: usize) -> Result<bool> {
    let mut bytes = [0; size_of::<Header>()];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
    let (peeked, received) = loop {
        let mut space = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut space, None, flags) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(Error::SocketBroken(error.into())),
            Ok(message) => break (message.bytes, message.flags),
        }
    };
    let Ok(header) = Header::read_from_bytes(&bytes) else { return Ok(false) };
    // There were descriptors, and we have asked for none.
    if received.contains(MsgFlags::MSG_CTRUNC) {
        check_room(stream, &header)?;
    }
    if peeked < bytes.len() || header.request != GET_QUEUE_NUM || header.size != 0 {
        // The parser finds out what it is, and what is wrong with it.
        return Ok(false);
    }
    stream.read_exact(&mut bytes).map_err(Error::SocketBroken)?;
    let size = u32::try_from(size_of::<U64>()).unwrap_or_default();
    let reply = Header { request: header.request, flags: REPLY.into(), size: size.into() };
    let mut answer = reply.as_bytes().to_vec();
    answer.extend(U64::new(queues as u64).as_bytes());
    stream.write_all(&answer).map_err(Error::SocketBroken)?;
    Ok(true)
}

/// Finds out whether this process may have as many descriptors more as such a message brings.
fn check_room(stream: &UnixStream, header: &Header) -> Result<()> {
    let count = match header.request.get() {
        SET_MEM_TABLE => header.size.get() / REGION,
        _ => 1,
    };
    let room = (0..count.clamp(1, MAX_DESCRIPTORS)).map(|_| stream.try_clone());
    room.collect::<std::io::Result<Vec<_>>>().map(drop).map_err(Error::ReqHandlerError)
}
