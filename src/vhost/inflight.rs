//! Requests in flight, kept in memory that outlives this process (vhost-user, "Inflight I/O tracking", split
//! virtqueues), so that the next one can do again what this one did not answer.
//!
//! The memory is shared with the front end. Nothing in it is believed: a wrong number may make us do a request
//! of the guest again or leave one out, as the front end could anyway, and no more.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory};

use super::memory;
use super::ring::MAX_QUEUE_SIZE;

/// `QueueRegionSplit`: features, version, desc_num, last_batch_head, used_idx.
mod header {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const SIZE: usize = 16;
}

/// `DescStateSplit`: inflight, padding, next, counter.
mod state {
    pub(super) const INFLIGHT: usize = 0;
    pub(super) const NEXT: usize = 6;
    pub(super) const COUNTER: usize = 8;
    pub(super) const SIZE: usize = 16;
}

/// The only version there is.
const VERSION: u16 = 1;

/// Queues do not share cache lines.
const ALIGNMENT: usize = 64;

/// The memory of all queues of a device.
#[derive(Clone, Debug)]
pub(super) struct Region {
    memory: Arc<MmapRegion<()>>,
    queues: usize,
    queue_size: u16,
}

impl Region {
    /// How many bytes so many queues take.
    pub(super) fn len(queues: usize, queue_size: u16) -> usize {
        queues * Self::stride(queue_size)
    }

    fn stride(queue_size: u16) -> usize {
        (header::SIZE + state::SIZE * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
    }

    /// New memory, for the front end to keep.
    ///
    /// # Errors
    /// If the host has none left.
    pub(super) fn create(queues: usize, queue_size: u16) -> io::Result<File> {
        let file = File::from(memfd_create(c"thinlun-inflight", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(Self::len(queues, queue_size) as u64)?;
        Ok(file)
    }

    /// Maps what a front end has kept.
    ///
    /// # Errors
    /// If it cannot be mapped, or is too small for these queues.
    pub(super) fn map(
        file: File,
        offset: u64,
        size: u64,
        queues: usize,
        queue_size: u16,
    ) -> io::Result<Self> {
        if queue_size > MAX_QUEUE_SIZE || size < Self::len(queues, queue_size) as u64 {
            return Err(io::Error::other("in-flight region of a wrong size"));
        }
        let memory = Arc::new(memory::map(file, offset, size)?);
        Ok(Region { memory, queues, queue_size })
    }

    /// The part of one queue; `None` if there is none for it, or it is too short.
    pub(super) fn queue(&self, index: usize, size: u16) -> Option<Inflight> {
        (index < self.queues && size <= self.queue_size).then(|| Inflight {
            memory: Arc::clone(&self.memory),
            start: index * Self::stride(self.queue_size),
            size: self.queue_size,
            counter: 0,
            batch: Vec::new(),
        })
    }
}

/// One queue's requests in flight.
#[derive(Debug)]
pub(super) struct Inflight {
    memory: Arc<MmapRegion<()>>,
    start: usize,
    size: u16,
    /// Orders the requests.
    counter: u64,
    /// Chains that are in the used ring and not shown yet.
    batch: Vec<u16>,
}

impl Inflight {
    /// What was left in flight, oldest first; `None` if nobody has served the queue before. `used` is the used ring's index.
    pub(super) fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        if self.header(header::VERSION) != Some(VERSION)
            || self.header(header::DESC_NUM) != Some(self.size)
        {
            self.begin(used);
            return None;
        }
        self.end_last_batch(used);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (self.load::<AtomicU64>(head, state::COUNTER).unwrap_or(0), head))
            .collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(left.into_iter().map(|(_, head)| head).collect())
    }

    /// Fresh memory.
    fn begin(&self, used: u16) {
        (0..self.size).for_each(|head| self.set_in_flight(head, false));
        self.set_header(header::DESC_NUM, self.size);
        self.set_header(header::USED_IDX, used);
        self.set_header(header::VERSION, VERSION);
    }

    /// The index in the used ring moved, and the process ended before it had noted what that was for: those
    /// chains were answered.
    fn end_last_batch(&self, used: u16) {
        let noted = self.header(header::USED_IDX).unwrap_or(used);
        let mut head = self.header(header::LAST_BATCH_HEAD).unwrap_or(0);
        for _ in 0..used.wrapping_sub(noted).min(self.size) {
            if head >= self.size {
                break;
            }
            self.set_in_flight(head, false);
            head = self.load::<AtomicU16>(head, state::NEXT).unwrap_or(self.size);
        }
        self.set_header(header::USED_IDX, used);
    }

    /// A request was taken from the available ring.
    pub(super) fn take(&mut self, head: u16) {
        self.store::<AtomicU64>(head, state::COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        compiler_fence(Ordering::SeqCst);
        self.set_in_flight(head, true);
    }

    /// A chain was put into the used ring, where the driver does not see it yet.
    pub(super) fn give(&mut self, head: u16) {
        let last = self.header(header::LAST_BATCH_HEAD).unwrap_or(0);
        self.store::<AtomicU16>(head, state::NEXT, last);
        compiler_fence(Ordering::SeqCst);
        self.set_header(header::LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    /// The driver sees the used ring up to here. The stores above came before that, those here come after it: a
    /// process that is killed leaves them in this order on every processor.
    pub(super) fn shown(&mut self, used: u16) {
        compiler_fence(Ordering::SeqCst);
        for head in std::mem::take(&mut self.batch) {
            self.set_in_flight(head, false);
        }
        compiler_fence(Ordering::SeqCst);
        self.set_header(header::USED_IDX, used);
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.load::<AtomicU8>(head, state::INFLIGHT) == Some(1)
    }

    fn set_in_flight(&self, head: u16, yes: bool) {
        self.store::<AtomicU8>(head, state::INFLIGHT, yes.into());
    }

    fn load<T: AtomicInteger>(&self, head: u16, field: usize) -> Option<T::V> {
        Some(self.at::<T>(self.state_of(head)? + field)?.load(Ordering::Relaxed))
    }

    fn store<T: AtomicInteger>(&self, head: u16, field: usize, value: T::V) {
        let place = self.state_of(head).and_then(|state| self.at::<T>(state + field));
        if let Some(place) = place {
            place.store(value, Ordering::Relaxed);
        }
    }

    /// Where the state of a chain stands; the number may come from the guest.
    fn state_of(&self, head: u16) -> Option<usize> {
        (head < self.size).then(|| header::SIZE + state::SIZE * usize::from(head))
    }

    fn header(&self, field: usize) -> Option<u16> {
        Some(self.at::<AtomicU16>(field)?.load(Ordering::Relaxed))
    }

    fn set_header(&self, field: usize, value: u16) {
        if let Some(place) = self.at::<AtomicU16>(field) {
            place.store(value, Ordering::Relaxed);
        }
    }

    fn at<T: AtomicInteger>(&self, offset: usize) -> Option<&T> {
        self.memory.get_atomic_ref(self.start + offset).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Region {
        let file = Region::create(3, 8).unwrap();
        let size = Region::len(3, 8) as u64;
        Region::map(file, 0, size, 3, 8).unwrap()
    }

    #[test]
    fn what_was_not_answered_is_left_in_its_order() {
        let region = region();
        let mut queue = region.queue(1, 8).unwrap();
        assert_eq!(queue.recover(0), None);
        [5, 2, 7, 1].into_iter().for_each(|head| queue.take(head));
        queue.give(2);
        queue.give(1);
        queue.shown(2);
        drop(queue);
        let mut next = region.queue(1, 8).unwrap();
        assert_eq!(next.recover(2), Some(vec![5, 7]));
        next.take(5);
        next.take(7);
        next.take(0);
        assert_eq!(region.queue(1, 8).unwrap().recover(2), Some(vec![5, 7, 0]));
        assert_eq!(region.queue(0, 8).unwrap().recover(0), None, "another queue");
    }

    #[test]
    fn an_end_at_any_step_loses_and_repeats_nothing() {
        let taken = |queue: &mut Inflight| {
            queue.recover(65534);
            [0, 1, 2, 3].into_iter().for_each(|head| queue.take(head));
            queue.give(3);
            queue.give(0);
        };
        // Before the index moved: neither was answered.
        let region = region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        assert_eq!(region.queue(0, 8).unwrap().recover(65534), Some(vec![0, 1, 2, 3]));
        // After it, before that was noted: both were, over the end of the index's numbers.
        let region = super::tests::region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        assert_eq!(region.queue(0, 8).unwrap().recover(0), Some(vec![1, 2]));
        // Halfway through the note.
        let region = super::tests::region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        queue.set_in_flight(3, false);
        assert_eq!(region.queue(0, 8).unwrap().recover(0), Some(vec![1, 2]));
    }

    #[test]
    fn nonsense_in_the_memory_is_survived() {
        let region = region();
        let mut queue = region.queue(2, 8).unwrap();
        queue.recover(0);
        for offset in 0..Region::stride(8) {
            queue.at::<AtomicU8>(offset).unwrap().store(0xff, Ordering::Relaxed);
        }
        queue.set_header(header::VERSION, VERSION);
        queue.set_header(header::DESC_NUM, 8);
        assert_eq!(region.queue(2, 8).unwrap().recover(7), Some(vec![]));
        queue.take(9);
        queue.take(65535);
        queue.give(65535);
        queue.shown(8);
        assert!(region.queue(3, 8).is_none() && region.queue(0, 16).is_none());
        assert!(Region::map(Region::create(1, 8).unwrap(), 0, 64, 1, 8).is_err());
        let short = Region::create(1, 8).unwrap();
        assert!(Region::map(short, 0, 4096, 3, 8).is_err(), "shorter than it says");
    }
}
