//! One split virtqueue as the device sees it, owned by the thread that serves it.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::guest_buf::{BadChain, Chain, Guard, resolve};
use super::memory::GuestMemory;

/// Largest queue we serve.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A queue that runs.
pub(super) struct Ring {
    queue: Queue,
    memory: Arc<Guard>,
    call: Option<File>,
    complaints: Complaints,
    /// Whether used buffers were added since the driver was last told.
    unannounced: bool,
    /// The driver broke a rule that leaves no way to go on.
    broken: bool,
}

impl Ring {
    /// A ring over a queue whose addresses lie in `memory`.
    pub(super) fn new(
        index: usize,
        queue: Queue,
        memory: Arc<GuestMemory>,
        call: Option<File>,
    ) -> Self {
        Ring {
            queue,
            memory: Arc::new(Guard(memory)),
            call,
            complaints: Complaints::new(index),
            unannounced: false,
            broken: false,
        }
    }

    /// The next request, or `None` if there is none.
    pub(super) fn pop(&mut self) -> Option<Chain> {
        while !self.broken {
            let memory: &GuestMemory = &self.memory.0;
            let chain = match self.queue.iter(memory) {
                Ok(mut chains) => chains.next()?,
                Err(error) => {
                    self.broken = true;
                    self.complaints.say(&format!("queue is broken and stopped: {error}"));
                    return None;
                }
            };
            match resolve(&self.memory, chain) {
                Ok(chain) => return Some(chain),
                Err(bad) => self.give_back(&bad),
            }
        }
        None
    }

    fn give_back(&mut self, bad: &BadChain) {
        self.complaints.say(bad.why);
        self.push(bad.head, 0);
    }

    /// A chain that we cannot answer: back it goes, with nothing written.
    pub(super) fn refuse(&mut self, head: u16, why: &'static str) {
        self.give_back(&BadChain { head, why });
    }

    /// Puts a chain into the used ring, with the number of bytes written to it.
    pub(super) fn push(&mut self, head: u16, written: usize) {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        if let Err(error) = self.queue.add_used(self.memory.0.as_ref(), head, written) {
            self.broken = true;
            self.complaints.say(&format!("cannot write the used ring: {error}"));
        }
        self.unannounced = true;
    }

    /// Tells the driver about used buffers, if there are any and it wants to know.
    pub(super) fn announce(&mut self) {
        if !std::mem::take(&mut self.unannounced) {
            return;
        }
        if let (true, Some(mut call)) = (self.driver_wants_to_know(), self.call.as_ref()) {
            // It fails if the counter is full, and then the driver knows already.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }

    fn driver_wants_to_know(&mut self) -> bool {
        let memory = self.memory.0.as_ref();
        let wanted = self.queue.needs_notification(memory).unwrap_or(true);
        // Without EVENT_IDX the driver says so by a flag, which virtio-queue does not look at
        // (VIRTIO 1.3 2.7.7). That call has put a fence after the used index.
        let flags: u16 = match self.queue.event_idx_enabled() {
            true => 0,
            false => memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .unwrap_or_default(),
        };
        wanted && u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0
    }

    /// Asks for kicks again; says whether requests came in meanwhile.
    pub(super) fn await_kicks(&mut self) -> bool {
        !self.broken && self.queue.enable_notification(self.memory.0.as_ref()).unwrap_or_default()
    }

    /// Whether there is a request to pop.
    pub(super) fn has_requests(&self) -> bool {
        let available = self.queue.avail_idx(self.memory.0.as_ref(), Ordering::Acquire);
        !self.broken && available.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Spares the driver kicks while we look at the ring anyway.
    pub(super) fn spare_kicks(&mut self) {
        let _ = self.queue.disable_notification(self.memory.0.as_ref());
    }

    /// New memory; what is in flight keeps the old one.
    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        self.memory = Arc::new(Guard(memory));
    }

    /// Another way to tell the driver. It is told at once, in case the old way lost something.
    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call;
        if let Some(mut call) = self.call.as_ref() {
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }

    /// Number of descriptors: no more requests than that can rightly be in flight.
    pub(super) fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// Where the next request will be found.
    pub(super) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }
}

/// Log lines that a guest can cause: one a second is enough.
struct Complaints {
    queue: usize,
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    fn new(queue: usize) -> Self {
        Complaints { queue, last: None, unsaid: 0 }
    }

    fn say(&mut self, what: &str) {
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.unsaid += 1;
            return;
        }
        log::warn!("queue {}: {what} ({} like it unsaid)", self.queue, self.unsaid);
        self.last = Some(Instant::now());
        self.unsaid = 0;
    }
}
