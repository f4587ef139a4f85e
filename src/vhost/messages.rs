//! The messages of a front end (vhost-user): received whole, checked, done, answered.
//!
//! What they ask for is done by [`Connection`]. The `vhost` crate has a receiver of its own, which does not serve here: it
//! ends the connection at a signal, at a passing shortage of memory, and where a message comes in two pieces; takes
//! what follows for a message where the kernel has dropped descriptors; does not answer SPDK, which asks for the number of
//! queues whether or not it has negotiated MQ; and says of a wrong message only that it is wrong.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut};
use vmm_sys_util::errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::connection::Connection;
use super::{refused, wrong};

/// The longest payload that anybody sends; a table of as many regions as there can be descriptors is shorter.
const MAX_PAYLOAD: u32 = 4096;

/// Most descriptors that come with a message.
const MAX_FILES: usize = 32;

/// Most descriptors that the kernel passes at once (SCM_MAX_FD). With room for them it drops some only where there
/// is no number left for them.
const MAX_PASSED: usize = 253;

/// In the flags of a header: the version of the protocol, the mark of a reply, the wish for one.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// How long to wait when the host is short of memory.
const A_MOMENT: Duration = Duration::from_millis(1);

/// Numbers are in the machine's own order.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    request: U32,
    flags: U32,
    size: U32,
}

/// SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RingValue {
    index: U32,
    value: U32,
}

/// SET_VRING_ADDR.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RingAddress {
    index: U32,
    flags: U32,
    descriptors: U64,
    used: U64,
    available: U64,
    log: U64,
}

/// Of SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Region {
    guest_address: U64,
    size: U64,
    user_address: U64,
    file_offset: U64,
}

/// ADD_MEM_REG, REM_MEM_REG.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OneRegion {
    padding: U64,
    region: Region,
}

/// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Inflight {
    size: U64,
    offset: U64,
    queues: U16,
    queue_size: U16,
    padding: U32,
}

/// SET_LOG_BASE.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Log {
    size: U64,
    offset: U64,
}

/// GET_CONFIG, SET_CONFIG: what stands before the bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ConfigHeader {
    offset: U32,
    size: U32,
    flags: U32,
}

/// Declares the requests with their numbers and the protocol feature that each needs.
macro_rules! requests {
    ($($number:literal $name:ident $($feature:ident)?,)*) => {
        /// What a front end may ask for.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Request { $($name,)* }

        impl Request {
            fn of(number: u32) -> Option<Self> {
                match number { $($number => Some(Request::$name),)* _ => None }
            }

            fn needs(self) -> Protocol {
                match self { $(Request::$name => Protocol::empty() $(| Protocol::$feature)?,)* }
            }
        }
    };
}

requests! {
    1 GET_FEATURES,
    2 SET_FEATURES,
    3 SET_OWNER,
    4 RESET_OWNER,
    5 SET_MEM_TABLE,
    6 SET_LOG_BASE LOG_SHMFD,
    8 SET_VRING_NUM,
    9 SET_VRING_ADDR,
    10 SET_VRING_BASE,
    11 GET_VRING_BASE,
    12 SET_VRING_KICK,
    13 SET_VRING_CALL,
    14 SET_VRING_ERR,
    15 GET_PROTOCOL_FEATURES,
    16 SET_PROTOCOL_FEATURES,
    17 GET_QUEUE_NUM,
    18 SET_VRING_ENABLE,
    24 GET_CONFIG CONFIG,
    25 SET_CONFIG CONFIG,
    31 GET_INFLIGHT_FD INFLIGHT_SHMFD,
    32 SET_INFLIGHT_FD INFLIGHT_SHMFD,
    34 RESET_DEVICE RESET_DEVICE,
    36 GET_MAX_MEM_SLOTS CONFIGURE_MEM_SLOTS,
    37 ADD_MEM_REG CONFIGURE_MEM_SLOTS,
    38 REM_MEM_REG CONFIGURE_MEM_SLOTS,
}

/// A message as it came.
struct Message {
    number: u32,
    flags: u32,
    payload: Vec<u8>,
    files: Vec<File>,
}

/// What is sent back.
enum Reply {
    /// Nothing but, if it was asked for, that the message was done.
    Done,
    Bytes(Vec<u8>),
    WithFile(Vec<u8>, File),
}

/// Handles one message after another until there is an end to it; returns why.
pub(super) fn serve(stream: &UnixStream, connection: &mut Connection) -> Error {
    loop {
        if let Err(end) = serve_one(stream, connection) {
            return end;
        }
    }
}

fn serve_one(stream: &UnixStream, connection: &mut Connection) -> Result<()> {
    let mut message = receive(stream)?;
    let result = message.perform(connection);
    let acknowledged =
        message.flags & NEED_REPLY != 0 && connection.negotiated(Protocol::REPLY_ACK);
    let send = |payload: &[u8], file: Option<&File>| send(stream, message.number, payload, file);
    match &result {
        Ok(Reply::Bytes(payload)) => send(payload, None)?,
        Ok(Reply::WithFile(payload, file)) => send(payload, Some(file))?,
        Ok(Reply::Done) if acknowledged => send(&0_u64.to_ne_bytes(), None)?,
        Err(_) if acknowledged => send(&1_u64.to_ne_bytes(), None)?,
        Ok(Reply::Done) | Err(_) => {}
    }
    result.map(drop).map_err(|error| named(message.number, error))
}

/// An error of a message, which says which one. What the host has said stays as it is.
fn named(number: u32, error: Error) -> Error {
    let what = match error {
        Error::ReqHandlerError(error) if error.raw_os_error().is_some() => return refused(error),
        Error::ReqHandlerError(error) => error.to_string(),
        Error::InvalidOperation(what) => what.to_owned(),
        other => other.to_string(),
    };
    match Request::of(number) {
        Some(request) => wrong(format_args!("{request:?}: {what}")),
        None => wrong(format_args!("message {number}: {what}")),
    }
}

// ----- receiving and sending ------------------------------------------------------------------

/// The next message.
///
/// # Errors
/// If there is none, or it is none of this protocol.
fn receive(stream: &UnixStream) -> Result<Message> {
    let mut files = Vec::new();
    let mut header = [0; size_of::<Header>()];
    match fill(stream, &mut header, &mut files)? {
        0 => return Err(Error::Disconnected),
        got if got < header.len() => return Err(Error::PartialMessage),
        _ => {}
    }
    let Header { request, flags, size } = zerocopy::transmute!(header);
    let (number, flags, size) = (request.get(), flags.get(), size.get());
    if flags & !NEED_REPLY != VERSION {
        let what = format_args!("flags {flags:#x}: not those of a request in version 1");
        return Err(named(number, wrong(what)));
    }
    if size > MAX_PAYLOAD {
        let what = format_args!("{size} bytes of payload: at most {MAX_PAYLOAD} are taken");
        return Err(named(number, wrong(what)));
    }
    let mut payload = vec![0; usize::try_from(size).unwrap_or_default()];
    if fill(stream, &mut payload, &mut files)? < payload.len() {
        return Err(Error::PartialMessage);
    }
    Ok(Message { number, flags, payload, files })
}

/// Receives as many bytes as there is room for, or up to the end of the stream; returns how many. Every piece may bring
/// descriptors.
fn fill(stream: &UnixStream, into: &mut [u8], files: &mut Vec<File>) -> Result<usize> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match receive_some(stream, rest, files) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) => wait_if_it_passes(error)?,
        }
        if files.len() > MAX_FILES {
            let count = files.len();
            return Err(wrong(format_args!(
                "{count} descriptors with one message: at most {MAX_FILES} are taken"
            )));
        }
    }
    Ok(done)
}

fn receive_some(
    stream: &UnixStream,
    into: &mut [u8],
    files: &mut Vec<File>,
) -> std::result::Result<usize, errno::Error> {
    let mut fds = [-1; MAX_PASSED];
    let mut place = [libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() }];
    // SAFETY: the place is that of `into`, for any bytes.
    let (got, count) = unsafe { stream.recv_with_fds(&mut place, &mut fds) }?;
    for fd in fds.into_iter().take(count) {
        // SAFETY: it has just come, and nobody else knows of it.
        files.push(unsafe { File::from_raw_fd(fd) });
    }
    Ok(got)
}

/// Waits for the end of what makes a call fail now and not for ever.
///
/// # Errors
/// If it is something else.
fn wait_if_it_passes(error: errno::Error) -> Result<()> {
    match error.errno() {
        libc::EINTR => Ok(()),
        libc::EAGAIN | libc::ENOMEM => {
            std::thread::sleep(A_MOMENT);
            Ok(())
        }
        // The kernel had to drop descriptors that came with the message, which is lost with them.
        libc::ENOBUFS => Err(refused(io::Error::from_raw_os_error(libc::EMFILE))),
        errno => Err(Error::SocketBroken(io::Error::from_raw_os_error(errno))),
    }
}

fn send(stream: &UnixStream, number: u32, payload: &[u8], file: Option<&File>) -> Result<()> {
    let size = u32::try_from(payload.len()).unwrap_or_default();
    let header =
        Header { request: number.into(), flags: (VERSION | REPLY).into(), size: size.into() };
    let bytes = [header.as_bytes(), payload].concat();
    let mut fds: Vec<_> = file.map(AsRawFd::as_raw_fd).into_iter().collect();
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match stream.send_with_fds(&[rest], &fds) {
            Ok(sent) => {
                // They went with the first byte.
                fds.clear();
                done += sent;
            }
            Err(error) if error.errno() == libc::ENOBUFS => std::thread::sleep(A_MOMENT),
            Err(error) => wait_if_it_passes(error)?,
        }
    }
    Ok(())
}

// ----- what is in them ------------------------------------------------------------------------

impl Message {
    fn perform(&mut self, connection: &mut Connection) -> Result<Reply> {
        use Request as R;
        let Some(request) = Request::of(self.number) else {
            return Err(Error::InvalidOperation("there is no such message here"));
        };
        let needed = request.needs();
        // Until something was negotiated a feature may be asked about.
        if !connection.negotiated(needed) {
            return Err(wrong(format_args!("protocol feature {needed:?} was not negotiated")));
        }
        if !self.files.is_empty() && !request.may_have_files() {
            return Err(Error::InvalidOperation("descriptors with a message that takes none"));
        }
        match request {
            R::GET_FEATURES
            | R::GET_PROTOCOL_FEATURES
            | R::GET_QUEUE_NUM
            | R::GET_MAX_MEM_SLOTS => {
                let [] = self.bytes()?;
                let number = match request {
                    R::GET_FEATURES => connection.get_features()?,
                    R::GET_PROTOCOL_FEATURES => connection.get_protocol_features()?.bits(),
                    R::GET_QUEUE_NUM => connection.get_queue_num()?,
                    _ => connection.get_max_mem_slots()?,
                };
                return Ok(Reply::Bytes(number.to_ne_bytes().to_vec()));
            }
            R::SET_OWNER | R::RESET_OWNER | R::RESET_DEVICE => {
                let [] = self.bytes()?;
                match request {
                    R::SET_OWNER => connection.set_owner()?,
                    R::RESET_OWNER => connection.reset_owner()?,
                    _ => connection.reset_device()?,
                }
            }
            R::SET_FEATURES => connection.set_features(self.number()?)?,
            R::SET_PROTOCOL_FEATURES => connection.set_protocol_features(self.number()?)?,
            R::SET_MEM_TABLE => self.memory_table(connection)?,
            R::ADD_MEM_REG => {
                let (region, file) = (self.region()?, self.file()?);
                connection.add_mem_region(&region, file, None)?;
            }
            R::REM_MEM_REG => connection.remove_mem_region(&self.region()?)?,
            R::SET_VRING_NUM | R::SET_VRING_BASE | R::SET_VRING_ENABLE | R::GET_VRING_BASE => {
                return self.ring_value(request, connection);
            }
            R::SET_VRING_ADDR => self.ring_address(connection)?,
            R::SET_VRING_KICK => {
                let (index, file) = self.event()?;
                connection.set_vring_kick(index, file)?;
            }
            R::SET_VRING_CALL => {
                let (index, file) = self.event()?;
                connection.set_vring_call(index, file)?;
            }
            R::SET_VRING_ERR => {
                let (index, file) = self.event()?;
                connection.set_vring_err(index, file)?;
            }
            R::GET_CONFIG | R::SET_CONFIG => return self.config(request, connection),
            R::GET_INFLIGHT_FD => {
                let (given, file) = connection.get_inflight_fd(&self.inflight()?)?;
                let reply = Inflight {
                    size: given.mmap_size.into(),
                    offset: given.mmap_offset.into(),
                    queues: given.num_queues.into(),
                    queue_size: given.queue_size.into(),
                    padding: 0.into(),
                };
                return Ok(Reply::WithFile(reply.as_bytes().to_vec(), file));
            }
            R::SET_INFLIGHT_FD => {
                let (given, file) = (self.inflight()?, self.file()?);
                connection.set_inflight_fd(&given, file)?;
            }
            R::SET_LOG_BASE => {
                let Log { size, offset } = self.body()?;
                if size == 0 || size.get().checked_add(offset.get()).is_none() {
                    return Err(wrong(format_args!("{size} bytes at offset {offset}")));
                }
                let log = VhostUserLog::new(size.get(), offset.get());
                connection.set_log_base(&log, self.file()?)?;
                return Ok(Reply::Bytes(self.payload.clone()));
            }
        }
        Ok(Reply::Done)
    }

    /// The payload, which must be as long.
    fn bytes<const N: usize>(&self) -> Result<[u8; N]> {
        let len = self.payload.len();
        let bytes = self.payload.as_slice().try_into();
        bytes.map_err(|_| wrong(format_args!("{len} bytes of payload: there must be {N}")))
    }

    fn number(&self) -> Result<u64> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// The payload, which must be one of these.
    fn body<T: FromBytes>(&self) -> Result<T> {
        let (len, must) = (self.payload.len(), size_of::<T>());
        T::read_from_bytes(&self.payload)
            .map_err(|_| wrong(format_args!("{len} bytes of payload: there must be {must}")))
    }

    /// The descriptor that came with it, which must be one.
    fn file(&mut self) -> Result<File> {
        match (self.files.pop(), self.files.len()) {
            (Some(file), 0) => Ok(file),
            (None, _) => Err(Error::InvalidOperation("no descriptor came with it")),
            (Some(_), more) => Err(wrong(format_args!("{} descriptors, not one", more + 1))),
        }
    }

    /// SET_VRING_KICK, CALL and ERR: the ring, and the event unless bit 8 says that there is none.
    fn event(&mut self) -> Result<(u8, Option<File>)> {
        let value = self.number()?;
        let [index, ..] = value.to_le_bytes();
        match value & 1 << 8 {
            0 => self.file().map(|file| (index, Some(file))),
            _ if self.files.is_empty() => Ok((index, None)),
            _ => Err(wrong(format_args!(
                "{value:#x} says that there is no descriptor, and one came"
            ))),
        }
    }

    fn ring_value(&self, request: Request, connection: &mut Connection) -> Result<Reply> {
        let RingValue { index, value } = self.body()?;
        let (index, value) = (index.get(), value.get());
        match request {
            Request::SET_VRING_NUM => connection.set_vring_num(index, value)?,
            Request::SET_VRING_BASE => connection.set_vring_base(index, value)?,
            Request::SET_VRING_ENABLE if value > 1 => {
                return Err(wrong(format_args!("{value} for queue {index}: neither 0 nor 1")));
            }
            Request::SET_VRING_ENABLE => connection.set_vring_enable(index, value == 1)?,
            _ => {
                let base = connection.get_vring_base(index)?.num;
                let reply = RingValue { index: index.into(), value: base.into() };
                return Ok(Reply::Bytes(reply.as_bytes().to_vec()));
            }
        }
        Ok(Reply::Done)
    }

    fn ring_address(&self, connection: &mut Connection) -> Result<()> {
        let RingAddress { index, flags, descriptors, used, available, log } = self.body()?;
        let flags = VhostUserVringAddrFlags::from_bits(flags.get())
            .ok_or_else(|| wrong(format_args!("flags {flags:#x}")))?;
        for (what, address, align) in [
            ("descriptor table", descriptors, 16),
            ("available ring", available, 2),
            ("used ring", used, 4),
        ] {
            if !address.get().is_multiple_of(align) {
                return Err(wrong(format_args!(
                    "{what} of queue {index} at {address:#x}: not a multiple of {align}"
                )));
            }
        }
        let [descriptors, used, available, log] = [descriptors, used, available, log].map(U64::get);
        connection.set_vring_addr(index.get(), flags, descriptors, used, available, log)
    }

    fn memory_table(&mut self, connection: &mut Connection) -> Result<()> {
        let Ok((head, regions)) = <[U32; 2]>::read_from_prefix(&self.payload) else {
            return Err(Error::InvalidOperation("no number of regions"));
        };
        let [count, _] = head.map(|n| usize::try_from(n.get()).unwrap_or(usize::MAX));
        let regions: Vec<_> = regions
            .chunks(size_of::<Region>())
            .map(|bytes| Region::read_from_bytes(bytes).map_err(|_| ()))
            .collect::<std::result::Result<_, ()>>()
            .map_err(|()| Error::InvalidOperation("a part of a region"))?;
        // virtio_uml sends room for more regions than there are.
        if count == 0 || regions.len() < count || self.files.len() != count {
            let (found, files) = (regions.len(), self.files.len());
            let what = format_args!("{count} regions, of which {found} and {files} files came");
            return Err(wrong(what));
        }
        let regions: Vec<_> =
            regions.iter().take(count).map(Region::check).collect::<Result<_>>()?;
        connection.set_mem_table(&regions, std::mem::take(&mut self.files), None).map(drop)
    }

    fn region(&self) -> Result<VhostUserSingleMemoryRegion> {
        let OneRegion { region, .. } = self.body()?;
        let region = region.check()?;
        Ok(VhostUserSingleMemoryRegion::new(
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            region.mmap_offset,
        ))
    }

    fn inflight(&self) -> Result<VhostUserInflight> {
        let Inflight { size, offset, queues, queue_size, .. } = self.body()?;
        if queues == 0 || queue_size == 0 {
            return Err(wrong(format_args!("{queues} queues of {queue_size} descriptors")));
        }
        Ok(VhostUserInflight::new(size.get(), offset.get(), queues.get(), queue_size.get()))
    }

    /// An answer without bytes says that there are none.
    fn config(&self, request: Request, connection: &mut Connection) -> Result<Reply> {
        let Ok((head, bytes)) = ConfigHeader::read_from_prefix(&self.payload) else {
            return Err(Error::InvalidOperation("no offset and size"));
        };
        let (offset, size) = (head.offset.get(), head.size.get());
        if usize::try_from(size) != Ok(bytes.len()) {
            let what = format_args!("{size} bytes, of which {} came", bytes.len());
            return Err(wrong(what));
        }
        let flags = VhostUserConfigFlags::from_bits(head.flags.get())
            .ok_or_else(|| wrong(format_args!("flags {:#x}", head.flags)))?;
        if request == Request::SET_CONFIG {
            return connection.set_config(offset, bytes, flags).map(|()| Reply::Done);
        }
        let config = connection.get_config(offset, size, flags).unwrap_or_default();
        let len = u32::try_from(config.len()).unwrap_or_default();
        let head = ConfigHeader { size: len.into(), ..head };
        Ok(Reply::Bytes([head.as_bytes(), &config].concat()))
    }
}

impl Request {
    /// REM_MEM_REG came with one from older front ends; it is closed and not looked at.
    fn may_have_files(self) -> bool {
        use Request as R;
        matches!(
            self,
            R::SET_MEM_TABLE
                | R::SET_LOG_BASE
                | R::SET_VRING_KICK
                | R::SET_VRING_CALL
                | R::SET_VRING_ERR
                | R::SET_INFLIGHT_FD
                | R::ADD_MEM_REG
                | R::REM_MEM_REG
        )
    }
}

impl Region {
    fn check(&self) -> Result<VhostUserMemoryRegion> {
        let [start, size, user, offset] =
            [&self.guest_address, &self.size, &self.user_address, &self.file_offset]
                .map(|n| n.get());
        let ends = [start, user, offset].into_iter().all(|at| at.checked_add(size).is_some());
        if size == 0 || !ends {
            return Err(wrong(format_args!(
                "region of {size:#x} bytes at {start:#x}, in the front end at {user:#x}, in its file at \
                 {offset:#x}: empty, or past the end of the address space"
            )));
        }
        Ok(VhostUserMemoryRegion::new(start, size, user, offset))
    }
}
