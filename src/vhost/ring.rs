//! One split virtqueue as the device sees it, owned by the thread that serves it.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dirty_log::DirtyLog;
use super::event_fd::Call;
use super::guest_buf::{Chain, Chains, CommandChain, Part};
use super::inflight::Inflight;
use super::memory::GuestMemory;
use super::split_ring::{Layout, SplitRing};
use super::wire::CommandHeader;

/// Largest queue we serve.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// Used entries after which the driver may see them, though more are coming: it can begin with them while
/// we go on, and the index, on whose cache line both look, need not move for each.
const SHOWN_AT_ONCE: u16 = 8;

/// A queue that runs.
pub(super) struct Ring {
    parts: SplitRing,
    layout: Layout,
    event_idx: bool,
    chains: Chains,
    call: Option<Call>,
    complaints: Complaints,
    /// Where the next request will be found.
    next_avail: u16,
    /// The driver's index when it was last looked at.
    seen_avail: u16,
    /// Where the next used entry goes.
    next_used: u16,
    /// Up to where the driver sees used entries.
    shown_used: u16,
    /// Up to where the driver was told of them, or did not want to be; `None` if it has to be told.
    told_used: Option<u16>,
    /// Whether the driver was asked for kicks.
    awaits_kicks: bool,
    /// The driver broke a rule that leaves no way to go on.
    broken: bool,
    /// Where requests in flight are noted.
    inflight: Option<Inflight>,
    /// Chains that a process before this one took and did not answer.
    left: VecDeque<u16>,
    /// Where it is noted which memory was written to.
    log: Option<Arc<DirtyLog>>,
}

impl Ring {
    /// A ring that goes on at `next_avail`, or where `inflight` says it was left; `None` if it does not lie in memory as it must.
    pub(super) fn new(
        index: usize,
        layout: Layout,
        event_idx: bool,
        next_avail: u16,
        memory: &Arc<GuestMemory>,
        call: Option<File>,
        mut inflight: Option<Inflight>,
    ) -> Option<Self> {
        let parts = SplitRing::find(memory, &layout)?;
        // SET_VRING_BASE does not tell the used index: it stands in the ring.
        let used = parts.used_index();
        let recovered = inflight.as_mut().and_then(|inflight| inflight.recover(used));
        let was_served = recovered.is_some();
        let mut left: VecDeque<u16> = recovered.unwrap_or_default().into();
        left.retain(|head| *head < parts.size());
        let count = u16::try_from(left.len()).unwrap_or(0);
        if count > 0 {
            log::info!("queue {index}: {count} requests were left in flight and are done again");
        }
        // Everything that was taken is answered or in flight. SET_VRING_BASE may say less: a front end makes it up when
        // its connection breaks, and the process that served the ring may have answered more after that.
        let next_avail = if was_served { used.wrapping_add(count) } else { next_avail };
        Some(Ring {
            parts,
            layout,
            event_idx,
            chains: Chains::new(memory),
            call: call.map(Call::new),
            complaints: Complaints::new(index),
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            shown_used: used,
            told_used: None,
            awaits_kicks: true,
            broken: false,
            inflight,
            left,
            log: None,
        })
    }

    /// The next request, or `None` if there is none, or nothing but wrong ones for as long as the queue is: a
    /// driver that makes them without end holds nobody up.
    pub(super) fn pop(&mut self) -> Option<Chain> {
        self.pop_as(Chains::resolve).map(|(chain, _)| chain)
    }

    /// The same, as a command.
    pub(super) fn pop_command(&mut self) -> Option<CommandChain> {
        let (mut chain, again) = self.pop_as(Chains::resolve_command)?;
        chain.again = again;
        Some(chain)
    }

    #[inline]
    fn pop_as<T>(
        &mut self,
        resolve: impl Fn(&mut Chains, &SplitRing, u16) -> Result<T, &'static str>,
    ) -> Option<(T, bool)> {
        for _ in 0..self.parts.size() {
            let (head, again) = match self.left.pop_front() {
                Some(head) => (head, true),
                None => (self.next_head()?, false),
            };
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            match resolve(&mut self.chains, &self.parts, head) {
                Ok(chain) => return Some((chain, again)),
                Err(why) => self.refuse(head, why),
            }
        }
        None
    }

    /// The header of a command; `None` if there is less of it.
    #[inline]
    pub(super) fn header(&mut self, part: &Part) -> Option<CommandHeader> {
        self.chains.header(part)
    }

    /// Copies into a part of a command; returns the number of bytes.
    #[inline]
    pub(super) fn write(&mut self, part: &Part, from: &[u8]) -> usize {
        let written = self.chains.write(part, from);
        if written == 0 {
            self.complaints.say("the memory for a response was taken away");
        }
        written
    }

    fn next_head(&mut self) -> Option<u16> {
        if !self.has_new_requests() {
            return None;
        }
        let head = self.parts.available(self.next_avail);
        if head >= self.parts.size() {
            // There is no such chain to give back, and so no way to say what became of it.
            self.stop_for_good("the available ring names a descriptor that is not there");
            return None;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    /// Whether there is a request to pop.
    pub(super) fn has_requests(&mut self) -> bool {
        !self.left.is_empty() || self.has_new_requests()
    }

    fn has_new_requests(&mut self) -> bool {
        if self.broken {
            return false;
        }
        if self.next_avail == self.seen_avail {
            self.seen_avail = self.parts.available_index();
            if self.seen_avail.wrapping_sub(self.next_avail) > self.parts.size() {
                self.stop_for_good("the available index is further than the queue is long");
            }
        }
        self.next_avail != self.seen_avail && !self.broken
    }

    fn stop_for_good(&mut self, why: &str) {
        self.broken = true;
        self.complaints.say(&format!("queue is broken and stopped: {why}"));
    }

    /// A chain that we cannot answer: back it goes, with nothing written.
    pub(super) fn refuse(&mut self, head: u16, why: &'static str) {
        self.complaints.say(why);
        self.push(head, 0);
    }

    /// Puts a chain into the used ring, with the number of bytes written to it.
    pub(super) fn push(&mut self, head: u16, written: usize) {
        if let Some(log) = &self.log {
            self.chains.mark_written(&self.parts, head, log);
        }
        self.parts.put_used(self.next_used, head, u32::try_from(written).unwrap_or(u32::MAX));
        if let Some(inflight) = &mut self.inflight {
            inflight.give(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
        if self.next_used.wrapping_sub(self.shown_used) >= SHOWN_AT_ONCE {
            self.show();
        }
    }

    fn show(&mut self) {
        self.parts.set_used_index(self.next_used);
        self.shown_used = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            inflight.shown(self.shown_used);
        }
        self.mark_used_ring();
    }

    /// Shows the driver the used buffers, and tells it if there are any that it wants to know of. Says whether
    /// there were any since the last time.
    pub(super) fn announce(&mut self) -> bool {
        if self.shown_used != self.next_used {
            self.show();
        }
        if self.told_used == Some(self.shown_used) {
            return false;
        }
        let told = self.told_used.replace(self.shown_used);
        if let (true, Some(call)) = (self.driver_wants_to_know(told), self.call.as_ref()) {
            call.tell();
        }
        true
    }

    fn driver_wants_to_know(&self, told: Option<u16>) -> bool {
        match told {
            _ if !self.event_idx => self.parts.wants_calls(),
            None => true,
            // VIRTIO 1.3 2.7.7.2: the index has come past the event.
            Some(told) => {
                let past = self.shown_used.wrapping_sub(self.parts.call_event()).wrapping_sub(1);
                past < self.shown_used.wrapping_sub(told)
            }
        }
    }

    /// Asks for kicks again; says whether requests came in meanwhile.
    pub(super) fn await_kicks(&mut self) -> bool {
        self.awaits_kicks = true;
        match self.event_idx {
            true => self.parts.set_kick_event(self.next_avail),
            false => self.parts.set_kicks(true),
        }
        self.mark_used_ring();
        self.has_requests()
    }

    /// Spares the driver kicks while we look at the ring anyway.
    pub(super) fn spare_kicks(&mut self) {
        if std::mem::take(&mut self.awaits_kicks) {
            match self.event_idx {
                // An event that lies behind comes again only when the index has gone round.
                true => self.parts.set_kick_event(self.next_avail.wrapping_sub(1)),
                false => self.parts.set_kicks(false),
            }
            self.mark_used_ring();
        }
    }

    /// The used ring was written to, somewhere.
    fn mark_used_ring(&self) {
        if let Some(log) = &self.log {
            log.mark(self.layout.used.0, self.parts.used_len());
        }
    }

    /// Notes from now on, or no longer, which memory is written to. What the requests in flight have written to
    /// is marked when they are answered.
    pub(super) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
        self.mark_used_ring();
    }

    /// New memory; what is in flight keeps the old one.
    pub(super) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        match SplitRing::find(memory, &self.layout) {
            Some(parts) => self.parts = parts,
            None => self.stop_for_good("it is no longer in memory"),
        }
        self.chains = Chains::new(memory);
    }

    /// Another way to tell the driver. It is told at once, in case the old way lost something.
    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call.map(Call::new);
        if let Some(call) = &self.call {
            call.tell();
        }
    }

    /// Whether what is not answered is kept for the next process.
    pub(super) fn keeps_requests(&self) -> bool {
        self.inflight.is_some()
    }

    /// Number of descriptors: no more requests than that can rightly be in flight.
    pub(super) fn size(&self) -> usize {
        self.parts.size().into()
    }

    /// Where the next request will be found.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
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
