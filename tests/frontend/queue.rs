//! One virtqueue in use: exchanges of bytes over a ring, buffers of any shape with guard bytes
//! around them, notifications both ways.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PATIENCE;
use super::daemon::Diagnosis;
use super::memory::GuestMemory;
use super::ring::{Desc, Ring, Used};

/// What the device is given to write to is filled with this first.
pub const POISON: u8 = 0xa5;

/// Bytes before and after every buffer that nobody may touch.
const GUARD: [u8; 16] = *b"\xfe guard  bytes \xfe";

/// Bytes for the device to read, room for it to write, and how both are cut into descriptors.
#[derive(Clone, Debug, Default)]
pub struct Exchange {
    pub readable: Vec<u8>,
    /// How many of the readable bytes are a header.
    pub readable_header: usize,
    pub writable: usize,
    /// How many of the writable bytes are a header.
    pub writable_header: usize,
    pub shape: Shape,
}

/// How an exchange becomes descriptors. VIRTIO 1.3, 2.7.4.2: the device must not care.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    pub readable: Cuts,
    pub writable: Cuts,
    /// Put the chain into an indirect table.
    pub indirect: bool,
    /// Buffers start this many bytes after a boundary.
    pub skew: usize,
    /// The boundary: 64 bytes, or this if it is more.
    pub align: usize,
    /// Allocate the buffers in the region with this base address.
    pub region: Option<u64>,
}

impl Shape {
    /// A single descriptor each way, header and data in one buffer.
    pub fn joined() -> Self {
        Self { readable: Cuts::Joined, writable: Cuts::Joined, ..Self::default() }
    }

    pub fn indirect(mut self) -> Self {
        self.indirect = true;
        self
    }

    pub fn skewed(mut self, bytes: usize) -> Self {
        self.skew = bytes;
        self
    }

    /// As O_DIRECT wants them, with 4096.
    pub fn aligned(mut self, bytes: usize) -> Self {
        self.align = bytes;
        self
    }

    pub fn in_region(mut self, base: u64) -> Self {
        self.region = Some(base);
        self
    }
}

/// How a run of bytes is cut into buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cuts {
    /// The header in one buffer, the data in another.
    #[default]
    Natural,
    /// Everything in one buffer.
    Joined,
    /// Buffers of this many bytes, regardless of what is in them.
    Every(usize),
    /// The header in one buffer, the data in buffers of this many bytes.
    DataEvery(usize),
    /// Cut at these offsets.
    At(Vec<usize>),
}

impl Cuts {
    /// The lengths of the buffers for `total` bytes of which `header` are the header.
    pub fn lengths(&self, header: usize, total: usize) -> Vec<usize> {
        let cuts: Vec<usize> = match self {
            Self::Natural => vec![header],
            Self::Joined => vec![],
            Self::Every(step) => (1..).map(|i| i * step).take_while(|&at| at < total).collect(),
            Self::DataEvery(step) => {
                (0..).map(|i| header + i * step).take_while(|&at| at < total).collect()
            }
            Self::At(cuts) => cuts.clone(),
        };
        let inner = cuts.into_iter().filter(|&at| at > 0 && at < total);
        let mut edges: Vec<usize> = [0].into_iter().chain(inner).chain([total]).collect();
        edges.dedup();
        edges.windows(2).map(|edge| edge[1] - edge[0]).collect()
    }
}

/// Names one exchange until its completion was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    pub queue: usize,
    pub serial: u64,
}

/// What the device made of an exchange.
#[derive(Clone, Debug)]
pub struct Completion {
    pub ticket: Ticket,
    /// The length in the used ring: bytes the device says it wrote.
    pub used_len: u32,
    /// The whole writable part; what was not written is [`POISON`].
    pub writable: Vec<u8>,
    /// Counts the completions of this queue.
    pub order: u64,
}

/// How much notifying went on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notifications {
    /// Kicks that were sent.
    pub kicks: u64,
    /// Kicks that the device had said it does not need.
    pub kicks_saved: u64,
    /// Interrupts the device sent, as counted by its eventfd.
    pub calls: u64,
    /// Chains the device returned.
    pub completions: u64,
}

pub struct Queue {
    index: usize,
    mem: Arc<GuestMemory>,
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    in_flight: HashMap<u16, InFlight>,
    done: VecDeque<Completion>,
    /// Used entries of chains that were put into the ring by hand.
    raw_done: Vec<Used>,
    next_serial: u64,
    notifications: Notifications,
    diagnosis: Diagnosis,
}

struct InFlight {
    ticket: Ticket,
    readable: Vec<u8>,
    segments: Vec<Segment>,
    table: Option<u64>,
}

struct Segment {
    /// What was allocated: the buffer and its guards.
    allocation: u64,
    desc: Desc,
}

impl Queue {
    pub fn new(
        index: usize,
        mem: Arc<GuestMemory>,
        size: u16,
        event_idx: bool,
        diagnosis: Diagnosis,
    ) -> Self {
        let ring = Ring::new(mem.clone(), size, event_idx);
        let eventfd = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
        Self {
            index,
            mem,
            ring,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            in_flight: HashMap::new(),
            done: VecDeque::new(),
            raw_done: Vec::new(),
            next_serial: 0,
            notifications: Notifications::default(),
            diagnosis,
        }
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// For tests that break the rules.
    pub fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    pub fn err_fd(&self) -> &EventFd {
        &self.err
    }

    pub fn notifications(&self) -> Notifications {
        self.notifications
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Used entries for which nothing was in flight.
    pub fn strays(&self) -> usize {
        self.raw_done.len()
    }

    pub fn set_diagnosis(&mut self, diagnosis: Diagnosis) {
        self.diagnosis = diagnosis;
    }

    /// Forgets everything in flight and starts over with empty rings, as after a device reset.
    pub fn reset(&mut self) {
        for (_, exchange) in std::mem::take(&mut self.in_flight) {
            self.release(&exchange);
        }
        self.done.clear();
        self.raw_done.clear();
        self.ring.reset();
        let _ = self.call.read();
        let _ = self.kick.read();
    }

    // ----- submitting -----------------------------------------------------------------------

    /// Makes one exchange available and notifies the device if it wants that.
    pub fn submit(&mut self, exchange: &Exchange) -> Ticket {
        let ticket = self.enqueue(exchange);
        self.publish();
        ticket
    }

    /// Puts one exchange into the ring without making it visible. Waits for room if need be.
    pub fn enqueue(&mut self, exchange: &Exchange) -> Ticket {
        if let Some(ticket) = self.try_enqueue(exchange) {
            return ticket;
        }
        self.publish();
        loop {
            self.await_used("room in the ring");
            if let Some(ticket) = self.try_enqueue(exchange) {
                return ticket;
            }
        }
    }

    /// The same without waiting; `None` if the ring is full.
    pub fn try_enqueue(&mut self, exchange: &Exchange) -> Option<Ticket> {
        self.collect();
        let segments = self.place(exchange);
        let chain: Vec<Desc> = segments.iter().map(|segment| segment.desc).collect();
        let (head, table) = if exchange.shape.indirect {
            let table = self.allocate(&exchange.shape, 16 * chain.len(), 16);
            (self.ring.add_indirect(table, &chain), Some(table))
        } else {
            (self.ring.add(&chain), None)
        };
        let ticket = Ticket { queue: self.index, serial: self.next_serial };
        let readable = exchange.readable.clone();
        let exchange = InFlight { ticket, readable, segments, table };
        let Some(head) = head else {
            self.release(&exchange);
            return None;
        };
        self.next_serial += 1;
        self.in_flight.insert(head, exchange);
        Some(ticket)
    }

    /// Shows the device everything enqueued, and kicks if it wants to be kicked.
    pub fn publish(&mut self) {
        let anything = self.ring.unpublished() > 0;
        if self.ring.publish() {
            self.kick_now();
        } else if anything {
            self.notifications.kicks_saved += 1;
        }
    }

    /// Notifies the device whether it wants that or not.
    pub fn kick_now(&mut self) {
        self.kick.write(1).expect("kick");
        self.notifications.kicks += 1;
    }

    fn place(&self, exchange: &Exchange) -> Vec<Segment> {
        let shape = &exchange.shape;
        let mut segments = Vec::new();
        let mut offset = 0;
        if !exchange.readable.is_empty() {
            let total = exchange.readable.len();
            for len in shape.readable.lengths(exchange.readable_header, total) {
                let bytes = &exchange.readable[offset..offset + len];
                segments.push(self.segment(shape, bytes, false));
                offset += len;
            }
        }
        if exchange.writable > 0 {
            for len in shape.writable.lengths(exchange.writable_header, exchange.writable) {
                segments.push(self.segment(shape, &vec![POISON; len], true));
            }
        }
        segments
    }

    /// Allocates a buffer between guards and fills all three.
    fn segment(&self, shape: &Shape, bytes: &[u8], writable: bool) -> Segment {
        let guarded = [&GUARD[..], bytes, &GUARD[..]].concat();
        let allocation = self.allocate(shape, guarded.len(), shape.align.max(64));
        self.mem.write(allocation, &guarded);
        let address = allocation + GUARD.len() as u64;
        Segment { allocation, desc: Desc { address, len: bytes.len() as u32, writable } }
    }

    fn allocate(&self, shape: &Shape, len: usize, align: usize) -> u64 {
        // Indirect tables stay aligned; buffers end up `skew` bytes after a boundary.
        let skew = if align >= 64 { (align - GUARD.len() + shape.skew) % align } else { 0 };
        match shape.region {
            Some(base) => self.mem.alloc_in(base, len, align, skew),
            None => self.mem.alloc(len, align, skew),
        }
    }

    fn release(&self, exchange: &InFlight) {
        exchange.segments.iter().for_each(|segment| self.mem.free(segment.allocation));
        exchange.table.into_iter().for_each(|table| self.mem.free(table));
    }

    // ----- completing -----------------------------------------------------------------------

    /// Waits for one exchange and takes its completion.
    #[track_caller]
    pub fn wait(&mut self, ticket: Ticket) -> Completion {
        assert_eq!(ticket.queue, self.index, "the ticket of another queue");
        loop {
            self.collect();
            if let Some(place) = self.done.iter().position(|done| done.ticket == ticket) {
                return self.done.remove(place).unwrap();
            }
            self.await_used(&format!("exchange {}", ticket.serial));
        }
    }

    /// Waits for whatever completes next.
    #[track_caller]
    pub fn wait_any(&mut self) -> Completion {
        loop {
            self.collect();
            if let Some(done) = self.done.pop_front() {
                return done;
            }
            assert!(!self.in_flight.is_empty(), "nothing is in flight on queue {}", self.index);
            self.await_used("any exchange");
        }
    }

    /// Waits until nothing is in flight and takes all completions, oldest first.
    #[track_caller]
    pub fn wait_all(&mut self) -> Vec<Completion> {
        self.publish();
        loop {
            self.collect();
            if self.in_flight.is_empty() {
                return self.done.drain(..).collect();
            }
            self.await_used("all exchanges");
        }
    }

    /// Waits for the used entry of a chain that was put into the ring by hand.
    #[track_caller]
    pub fn wait_raw(&mut self, head: u16) -> Used {
        loop {
            self.collect();
            if let Some(place) = self.raw_done.iter().position(|used| used.head == head) {
                return self.raw_done.remove(place);
            }
            self.await_used(&format!("chain {head}"));
        }
    }

    /// The same, but the device may also decide not to answer.
    pub fn wait_raw_for(&mut self, head: u16, limit: Duration) -> Option<Used> {
        let deadline = Instant::now() + limit;
        loop {
            self.collect();
            if let Some(place) = self.raw_done.iter().position(|used| used.head == head) {
                return Some(self.raw_done.remove(place));
            }
            if !self.ring.arm(1) && !self.interrupted_before(deadline) {
                return None;
            }
        }
    }

    /// What completes within `limit`; `None` is no failure here.
    pub fn wait_for(&mut self, limit: Duration) -> Option<Completion> {
        let deadline = Instant::now() + limit;
        loop {
            self.collect();
            if let Some(done) = self.done.pop_front() {
                return Some(done);
            }
            if self.ring.arm(1) {
                continue;
            }
            if !self.interrupted_before(deadline) {
                self.collect();
                return self.done.pop_front();
            }
        }
    }

    /// Takes the completion of an exchange if it is there.
    pub fn try_take(&mut self, ticket: Ticket) -> Option<Completion> {
        self.collect();
        let place = self.done.iter().position(|done| done.ticket == ticket)?;
        self.done.remove(place)
    }

    /// Whether the completion of an exchange is there; it is left for whoever waits for it.
    pub fn peek(&mut self, ticket: Ticket) -> bool {
        self.collect();
        self.done.iter().any(|done| done.ticket == ticket)
    }

    /// Asks for one interrupt after `count` more completions and waits for just that.
    #[track_caller]
    pub fn wait_batch(&mut self, count: u16) -> Vec<Completion> {
        if !self.ring.arm(count) && !self.interrupted_before(Instant::now() + PATIENCE) {
            self.fail(&format!("an interrupt after {count} completions"));
        }
        self.collect();
        self.done.drain(..).collect()
    }

    /// Takes everything from the used ring, without waiting.
    pub fn collect(&mut self) {
        while let Some(used) = self.ring.take_used() {
            let Some(exchange) = self.in_flight.remove(&used.head) else {
                self.raw_done.push(used);
                continue;
            };
            let completion = self.complete(&exchange, used);
            self.release(&exchange);
            self.done.push_back(completion);
        }
    }

    fn complete(&mut self, exchange: &InFlight, used: Used) -> Completion {
        let mut writable = Vec::new();
        let mut readable = Vec::new();
        for segment in &exchange.segments {
            let bytes = self.checked(segment);
            if segment.desc.writable { &mut writable } else { &mut readable }.extend(bytes);
        }
        assert!(readable == exchange.readable, "the device wrote to a buffer it may only read");
        let room = writable.len();
        assert!(used.len as usize <= room, "used length {} of {room} writable bytes", used.len);
        self.notifications.completions += 1;
        let order = self.notifications.completions;
        Completion { ticket: exchange.ticket, used_len: used.len, writable, order }
    }

    /// The bytes of a buffer, after a look at the guards around it.
    fn checked(&self, segment: &Segment) -> Vec<u8> {
        let guard = GUARD.len();
        let len = segment.desc.len as usize;
        let mut bytes = self.mem.read(segment.allocation, len + 2 * guard);
        let at = segment.desc.address;
        assert!(bytes[guard + len..] == GUARD, "written after the {len} byte buffer at {at:#x}");
        assert!(bytes[..guard] == GUARD, "written before the {len} byte buffer at {at:#x}");
        bytes.truncate(guard + len);
        bytes.drain(..guard);
        bytes
    }

    /// Sleeps until the used ring moves. Only an interrupt ends the sleep, so that a lost one is
    /// found and not papered over.
    #[track_caller]
    fn await_used(&mut self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_used() {
            if self.ring.is_polling() {
                std::thread::yield_now();
                if Instant::now() > deadline {
                    self.fail(what);
                }
            } else if !self.ring.arm(1) && !self.interrupted_before(deadline) {
                self.fail(what);
            }
        }
    }

    fn has_used(&self) -> bool {
        self.ring.used_idx() != self.ring.consumed()
    }

    /// Waits for an interrupt and takes it; false if none came in time.
    pub fn interrupted_before(&mut self, deadline: Instant) -> bool {
        let mut fds = [PollFd::new(self.call.as_fd_compat(), PollFlags::POLLIN)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(0) => return false,
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => panic!("poll: {e}"),
            }
        }
        self.notifications.calls += self.call.read().unwrap_or(0);
        true
    }

    /// Takes and counts interrupts that are already there.
    pub fn drain_calls(&mut self) -> u64 {
        let calls = self.call.read().unwrap_or(0);
        self.notifications.calls += calls;
        calls
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        let ring = &self.ring;
        let verdict = if self.has_used() {
            "the used ring has moved: a NOTIFICATION WAS LOST"
        } else {
            "the used ring has not moved: no answer"
        };
        self.diagnosis.fail(&format!(
            "queue {}: waited {PATIENCE:?} for {what}; {verdict}; {} in flight, \
             available index {}, used index {} (consumed {}); {:?}",
            self.index,
            self.in_flight.len(),
            ring.published(),
            ring.used_idx(),
            ring.consumed(),
            self.notifications,
        ))
    }
}

/// `vmm_sys_util`'s eventfd implements only `AsRawFd`.
pub trait AsFdCompat {
    fn as_fd_compat(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl AsFdCompat for EventFd {
    fn as_fd_compat(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}
