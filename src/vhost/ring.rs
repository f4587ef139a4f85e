//! One split virtqueue as the device sees it, owned by the thread that serves it.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dirty_log::DirtyLog;
use super::event_fd::Call;
use super::guest_buf::{Chain, Chains, CommandChain, Framing, Part};
use super::inflight::Inflight;
use super::memory::GuestMemory;
use super::split_ring::{Layout, SplitRing};
use super::wire::CommandHeader;

/// Largest queue we serve.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// Used entries after which the driver may see them, though more are coming: it can begin with them while
/// we go on, and the index, on whose cache line both look, need not move for each.
const SHOWN_AT_ONCE: u16 = 8;

/// What was negotiated about a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// EVENT_IDX: each side says at which index it wants to be notified.
    pub event_idx: bool,
    /// How requests are laid out.
    pub framing: Framing,
}

/// An answer whose place in guest memory is away.
struct Held {
    head: u16,
    room: Part,
    response: Box<[u8]>,
    /// Bytes that were written to other places of the chain.
    data: usize,
}

/// A queue that runs.
///
/// Its memory may go away and come back (REM_MEM_REG, ADD_MEM_REG: QEMU does so when a region changes its length). While
/// it is away nothing is taken, and what is answered is kept for when it is back.
pub(super) struct Ring {
    /// The ring, or what stands in for it while its memory is away.
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
    /// The ring's memory is away.
    away: bool,
    /// Answers whose memory is away, oldest first. When there are as many as the queue is long, no more is taken.
    held: Vec<Held>,
    /// Nothing is taken for now, for one of these reasons.
    rests: bool,
    /// Where requests in flight are noted.
    inflight: Option<Inflight>,
    /// Chains that a process before this one took and did not answer.
    left: VecDeque<u16>,
    /// Where it is noted which memory was written to.
    log: Option<Arc<DirtyLog>>,
}

impl Ring {
    /// A ring that goes on where `inflight` says it was left, else at `base`, else at what was not answered. `None` if it
    /// does not lie in memory as it must.
    pub(super) fn new(
        index: usize,
        layout: Layout,
        Rules { event_idx, framing }: Rules,
        base: Option<u16>,
        memory: &Arc<GuestMemory>,
        call: Option<File>,
        mut inflight: Option<Inflight>,
    ) -> Option<Self> {
        let parts = SplitRing::find(memory, &layout)?;
        // SET_VRING_BASE does not tell the used index: it stands in the ring.
        let used = parts.used_index();
        let recovered = inflight
            .as_mut()
            .and_then(|inflight| inflight.recover(used, &parts.available_since(used)));
        let was_served = recovered.is_some();
        let mut left: VecDeque<u16> = recovered.unwrap_or_default().into();
        left.retain(|head| *head < parts.size());
        let count = u16::try_from(left.len()).unwrap_or(0);
        if count > 0 {
            log::info!("queue {index}: {count} requests were left in flight and are done again");
        }
        // Everything that was taken is answered or in flight. SET_VRING_BASE may say less: a front end makes it up when
        // its connection breaks, and the process that served the ring may have answered more after that.
        let next_avail = match base {
            Some(base) if !was_served => base,
            _ => used.wrapping_add(count),
        };
        Some(Ring {
            parts,
            layout,
            event_idx,
            chains: Chains::new(memory, framing),
            call: call.map(Call::new),
            complaints: Complaints::new(index),
            next_avail,
            seen_avail: next_avail,
            next_used: used,
            shown_used: used,
            told_used: None,
            awaits_kicks: true,
            broken: false,
            away: false,
            held: Vec::new(),
            rests: false,
            inflight,
            left,
            log: None,
        })
    }

    /// The next request, or `None` if there is none, or nothing but wrong ones for as long as the queue is: a
    /// driver that makes them without end holds nobody up.
    pub(super) fn pop(&mut self) -> Option<Chain> {
        self.pop_as(|chains, parts, head, _| chains.resolve(parts, head))
    }

    /// The same, as a command.
    #[inline(always)]
    pub(super) fn pop_command(&mut self) -> Option<CommandChain> {
        self.pop_as(Chains::resolve_command)
    }

    #[inline(always)]
    fn pop_as<T>(
        &mut self,
        resolve: impl Fn(&mut Chains, &SplitRing, u16, bool) -> Result<T, &'static str>,
    ) -> Option<T> {
        for _ in 0..self.parts.size() {
            let (head, again) = self.next_head()?;
            match resolve(&mut self.chains, &self.parts, head, again) {
                Ok(chain) => return Some(chain),
                Err(why) => self.refuse(head, why),
            }
        }
        None
    }

    /// The header of a command; `None` if there is less of it.
    #[inline(always)]
    pub(super) fn header(&mut self, part: &Part) -> Option<CommandHeader> {
        self.chains.header(part)
    }

    /// Answers a command: writes its response into `room` and gives the chain back, with that and the `data` bytes written
    /// to it.
    #[inline]
    pub(super) fn answer(&mut self, head: u16, room: &Part, response: &[u8], data: usize) {
        match self.chains.write(room, response) {
            0 => self.hold(head, room, response, data),
            written => self.push(head, written + data),
        }
    }

    /// The place of a response is away: a driver that got its chain back would take what stands there for the answer.
    #[cold]
    fn hold(&mut self, head: u16, room: &Part, response: &[u8], data: usize) {
        let Part::Whole(address) = *room else { return self.push(head, data) };
        self.complaints.say("the memory for a response is away; the response waits for it");
        self.held.push(Held { head, room: Part::Whole(address), response: response.into(), data });
        self.set_rests();
    }

    fn set_rests(&mut self) {
        self.rests = self.broken || self.away || self.held.len() >= self.size();
    }

    #[inline(always)]
    fn next_head(&mut self) -> Option<(u16, bool)> {
        if self.rests {
            return None;
        }
        if let Some(head) = self.left.pop_front() {
            return Some((head, true));
        }
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
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Some((head, false))
    }

    /// Whether others had changed a disk, by its place in the notes, when a request that was left in flight was given, or
    /// since, and as far as was noted; `None` if nobody has kept such notes.
    pub(super) fn was_changed_by_others(&self, place: usize) -> Option<bool> {
        self.inflight.as_ref()?.was_changed_by_others(place)
    }

    /// Whether it does not lie in memory now, so that nobody can tell what is in it.
    pub(super) fn is_away(&self) -> bool {
        self.away
    }

    /// Whether there is a request to pop.
    pub(super) fn has_requests(&mut self) -> bool {
        !self.rests && (!self.left.is_empty() || self.has_new_requests())
    }

    #[inline]
    fn has_new_requests(&mut self) -> bool {
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
        self.set_rests();
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
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.parts.put_used(self.next_used, head.into(), written);
        if let Some(inflight) = &mut self.inflight {
            inflight.give(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
        if self.next_used.wrapping_sub(self.shown_used) >= SHOWN_AT_ONCE {
            self.show();
        }
    }

    fn show(&mut self) {
        if self.away {
            // It is shown when it stands in the driver's ring.
            return;
        }
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

    /// New memory; the data of what is in flight stays in the old one.
    pub(super) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        if self.shown_used != self.next_used {
            // While the old memory is there.
            self.show();
        }
        self.chains.set_memory(memory);
        match SplitRing::find(memory, &self.layout) {
            Some(parts) => {
                let stand_in = std::mem::replace(&mut self.parts, parts);
                if std::mem::take(&mut self.away) {
                    self.come_back(&stand_in);
                }
            }
            None if self.away => {}
            None => {
                self.complaints.say("the ring's memory is away; the queue waits for it");
                self.parts = SplitRing::stand_in(&self.layout);
                self.away = true;
            }
        }
        for Held { head, room, response, data } in std::mem::take(&mut self.held) {
            self.answer(head, &room, &response, data);
        }
        self.set_rests();
    }

    /// The ring is in memory again: what was answered meanwhile is put into it.
    fn come_back(&mut self, stand_in: &SplitRing) {
        let mut index = self.shown_used;
        while index != self.next_used {
            let (head, written) = stand_in.used_entry(index);
            self.parts.put_used(index, head, written);
            if let (Some(log), Ok(head)) = (&self.log, u16::try_from(head)) {
                self.chains.mark_written(&self.parts, head, log);
            }
            index = index.wrapping_add(1);
        }
        self.told_used = None;
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

#[cfg(test)]
mod tests {
    use super::super::inflight::Region;
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    const RULES: Rules = Rules { event_idx: false, framing: Framing::Any };

    fn ring(memory: &Arc<GuestMemory>, region: &Region) -> Ring {
        let layout = Layout {
            size: 8,
            descriptors: GuestAddress(0),
            available: GuestAddress(0x1000),
            used: GuestAddress(0x2000),
        };
        Ring::new(0, layout, RULES, Some(0), memory, None, region.queue(0, 8)).unwrap()
    }

    fn heads(ring: &mut Ring, count: usize) -> Vec<(u16, bool)> {
        std::iter::from_fn(|| ring.pop_as(|_, _, head, again| Ok((head, again))))
            .take(count)
            .collect()
    }

    /// A process that ends while it does again what another has left leaves the rest of that before what is new.
    #[test]
    fn requests_are_replayed_in_their_order_after_any_number_of_crashes() {
        let ranges = [(GuestAddress(0), 0x3000)];
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
        let order = [5_u16, 2, 7, 0, 3];
        for (at, head) in (0x1004..).step_by(2).zip(order) {
            memory.write_obj(head, GuestAddress(at)).unwrap();
        }
        memory.write_obj(3_u16, GuestAddress(0x1002)).unwrap();
        let file = Region::create(1, 8).unwrap();
        let region = Region::map(file, 0, Region::len(1, 8) as u64, 1, 8).unwrap();
        let first = [5, 2, 7].map(|head| (head, false));
        assert_eq!(heads(&mut ring(&memory, &region), 8), first);
        // It gets as far as the first of three, and the next as far as the second.
        for taken in [1, 2] {
            assert_eq!(
                heads(&mut ring(&memory, &region), taken),
                first.map(|(h, _)| (h, true))[..taken]
            );
        }
        memory.write_obj(5_u16, GuestAddress(0x1002)).unwrap();
        let all = [(5, true), (2, true), (7, true), (0, false), (3, false)];
        assert_eq!(heads(&mut ring(&memory, &region), 8), all);
        assert_eq!(heads(&mut ring(&memory, &region), 8), all.map(|(head, _)| (head, true)));
    }
}
