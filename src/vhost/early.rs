//! The one message that is answered before the `vhost` crate's parser sees it.
//!
//! SPDK's front end asks for the number of queues whether or not it has negotiated MQ. The parser takes
//! that for a breach of protocol and hangs up; the answer is the same either way.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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
/// If the answer cannot be sent.
pub(super) fn answer_queue_num(mut stream: &UnixStream, queues: usize) -> io::Result<bool> {
    let mut bytes = [0; size_of::<Header>()];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
    let peeked = loop {
        match recv(stream.as_raw_fd(), &mut bytes, flags) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let Ok(header) = Header::read_from_bytes(&bytes) else { return Ok(false) };
    if peeked < bytes.len() || header.request != GET_QUEUE_NUM || header.size != 0 {
        // The parser finds out what it is, and what is wrong with it.
        return Ok(false);
    }
    stream.read_exact(&mut bytes)?;
    let size = u32::try_from(size_of::<U64>()).unwrap_or_default();
    let reply = Header { request: header.request, flags: REPLY.into(), size: size.into() };
    let mut answer = reply.as_bytes().to_vec();
    answer.extend(U64::new(queues as u64).as_bytes());
    stream.write_all(&answer)?;
    Ok(true)
}
