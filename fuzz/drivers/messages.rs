//! Any vhost-user messages with any descriptors.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use thinlun::vhost::Device;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Input;
use super::session::{device, memfd, send};

/// As many as a socket holds the replies to.
const MAX_MESSAGES: usize = 48;
const MEMORY: u64 = 64 << 10;

thread_local! {
    static DEVICE: Arc<Device> = device();
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a socket");
    let (memory, event) = (memfd(MEMORY), EventFd::new(EFD_NONBLOCK).expect("eventfd"));
    let fds = [memory.as_raw_fd(), event.as_raw_fd()];
    for _ in 0..MAX_MESSAGES {
        if input.is_empty() || !message(&ours, &mut input, fds) {
            break;
        }
    }
    let _ = ours.shutdown(Shutdown::Write);
    DEVICE.with(|device| device.serve(thinlun::scsi::Port(1), &theirs));
}

/// Sends a message; says whether more can be sent.
fn message(stream: &UnixStream, input: &mut Input<'_>, [memory, event]: [RawFd; 2]) -> bool {
    let request = u32::from(input.byte() % 48);
    let kind = input.byte();
    // Nearly always the flags of version 1.
    let flags =
        if kind & 0xc0 == 0xc0 { u32::from(input.byte()) } else { 1 | u32::from(kind & 1) << 3 };
    let fds: Vec<RawFd> =
        (0..kind >> 1 & 7).map(|n| if kind & 16 == 0 || n > 1 { memory } else { event }).collect();
    let len = usize::from(input.byte());
    let payload = input.bytes(len);
    let size = if kind & 32 != 0 { u32::from(input.u16()) } else { len as u32 };
    send(stream, [request, flags, size], &payload, &fds).is_ok()
}
