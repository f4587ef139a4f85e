//! The front end's side of a connection to a device in this process, for the transport's fuzzers.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use thinlun::store::engine::EngineKind;
use thinlun::vhost::{Device, Offer};

use super::disk;

pub fn device() -> Arc<Device> {
    let offer = Offer {
        request_queues: 1,
        config_space: true,
        engine: EngineKind::Threads,
        poll: Duration::ZERO,
    };
    Arc::new(Device::new(disk::target(32), offer).unwrap())
}

pub fn memfd(size: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(size).expect("memory");
    file
}

/// Sends a message with the header as it is given. An error is the other end's hanging up.
pub fn send(
    stream: &UnixStream,
    header: [u32; 3],
    payload: &[u8],
    fds: &[RawFd],
) -> nix::Result<()> {
    let bytes = [header.map(u32::to_ne_bytes).concat(), payload.to_vec()].concat();
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// A connection with memory, served by a thread.
pub struct Session {
    stream: UnixStream,
    served: Option<JoinHandle<()>>,
    pub memory: File,
}

const VERSION: u32 = 1;
/// Where the front end says it has the guest's memory.
const USER: u64 = 0x1000_0000;

impl Session {
    /// Negotiated as by a driver of today, with `size` bytes of guest memory from address 0 on.
    pub fn new(size: u64) -> Self {
        Self::with_features(size, 1 << 32)
    }

    /// The same as by a legacy driver.
    pub fn legacy(size: u64) -> Self {
        Self::with_features(size, 0)
    }

    fn with_features(size: u64, version: u64) -> Self {
        let (stream, other) = UnixStream::pair().expect("sockets");
        let device = device();
        let served = Some(std::thread::spawn(move || device.serve(thinlun::scsi::Port(1), &other)));
        let session = Session { stream, served, memory: memfd(size) };
        session.tell(3, &[], &[]);
        let features: u64 = 1 << 28 | 1 << 29 | 1 << 30 | version;
        session.tell(2, &features.to_ne_bytes(), &[]);
        session.tell(16, &1u64.to_ne_bytes(), &[]);
        let table = [
            &[1u32, 0].map(u32::to_ne_bytes).concat()[..],
            &[0, size, USER, 0].map(u64::to_ne_bytes).concat(),
        ];
        session.tell(5, &table.concat(), &[session.memory.as_raw_fd()]);
        session
    }

    fn tell(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
        send(&self.stream, [request, VERSION, payload.len() as u32], payload, fds)
            .expect("the device hung up");
    }

    fn state(index: u32, number: u32) -> Vec<u8> {
        [index, number].map(u32::to_ne_bytes).concat()
    }

    /// Starts a queue whose parts lie at these guest addresses.
    pub fn start(
        &self,
        index: u32,
        size: u32,
        [descriptors, available, used]: [u64; 3],
        kick: RawFd,
    ) {
        self.tell(8, &Self::state(index, size), &[]);
        self.tell(10, &Self::state(index, 0), &[]);
        let at =
            [USER + descriptors, USER + used, USER + available, 0].map(u64::to_ne_bytes).concat();
        self.tell(9, &[&Self::state(index, 0)[..], &at].concat(), &[]);
        self.tell(12, &u64::from(index).to_ne_bytes(), &[kick]);
        self.tell(18, &Self::state(index, 1), &[]);
    }

    /// Stops a queue: nothing of it is in flight afterwards. Returns where it would go on.
    pub fn stop(&self, index: u32) -> u32 {
        self.tell(11, &Self::state(index, 0), &[]);
        let mut reply = [0; 20];
        (&self.stream).read_exact(&mut reply).expect("the device hung up");
        u32::from_ne_bytes(reply[16..].try_into().expect("four bytes"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let end = self.served.take().map(JoinHandle::join);
        assert!(!matches!(end, Some(Err(_))), "the connection's thread panicked");
    }
}
