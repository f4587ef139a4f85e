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
use crate::scsi::Lun;

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

/// What this program keeps behind the parts of all queues, for each of them: the disks that others had changed before the
/// requests were taken that were left in flight, or since, and those that they have changed since this daemon serves the
/// ring. One bit a disk, by its place.
mod changes {
    pub(super) const BEFORE: usize = 0;
    pub(super) const NOW: usize = 64;
    pub(super) const WORDS: usize = 8;
    pub(super) const SIZE: usize = 128;
}

/// The place of a disk in these notes. Where there are very many, some share one; it is the same whatever other disks there
/// are.
pub(super) fn place(lun: &Lun) -> usize {
    let settings = lun.settings();
    (usize::from(settings.target) + usize::from(settings.lun.get())) % (changes::WORDS * 64)
}

/// The only version there is.
const VERSION: u16 = 1;

/// The head of no chain: what LAST_BATCH_HEAD says as long as nothing was ever answered.
const NOTHING: u16 = u16::MAX;

/// Queues do not share cache lines.
const ALIGNMENT: usize = 64;

/// The memory of all queues of a device.
#[derive(Clone, Debug)]
pub(super) struct Region {
    memory: Arc<MmapRegion<()>>,
    queues: usize,
    queue_size: u16,
    keeps_changes: bool,
}

impl Region {
    /// How many bytes so many queues take.
    pub(super) fn len(queues: usize, queue_size: u16) -> usize {
        queues * (Self::stride(queue_size) + changes::SIZE)
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
        if queue_size > MAX_QUEUE_SIZE || size < (queues * Self::stride(queue_size)) as u64 {
            return Err(io::Error::other("in-flight region of a wrong size"));
        }
        let memory = Arc::new(memory::map(file, offset, size)?);
        // Another program may have made it, with what the protocol asks for.
        let keeps_changes = size >= Self::len(queues, queue_size) as u64;
        Ok(Region { memory, queues, queue_size, keeps_changes })
    }

    /// The part of one queue; `None` if there is none for it, or it is too short.
    pub(super) fn queue(&self, index: usize, size: u16) -> Option<Inflight> {
        (index < self.queues && size <= self.queue_size).then(|| Inflight {
            memory: Arc::clone(&self.memory),
            queue: index,
            start: index * Self::stride(self.queue_size),
            changes: self.changes(index),
            size: self.queue_size,
            counter: 0,
            batch: Vec::new(),
            again: Vec::new(),
        })
    }

    /// Where the disks that others change are noted for a queue.
    fn changes(&self, index: usize) -> Option<usize> {
        let start = self.queues * Self::stride(self.queue_size) + index * changes::SIZE;
        self.keeps_changes.then_some(start)
    }

    fn all_changes(&self) -> impl Iterator<Item = usize> {
        (0..self.queues).filter_map(|index| self.changes(index))
    }

    /// This daemon begins to serve the rings: what has been noted by now is of before.
    pub(super) fn begin_changes(&self) {
        for start in self.all_changes() {
            for word in (0..changes::WORDS).map(|word| start + 8 * word) {
                let (now, before) = (word + changes::NOW, word + changes::BEFORE);
                let noted = word_at(&self.memory, now).map_or(0, |now| now.load(Ordering::SeqCst));
                if let Some(before) = word_at(&self.memory, before) {
                    before.fetch_or(noted, Ordering::SeqCst);
                }
                if let Some(now) = word_at(&self.memory, now) {
                    now.store(0, Ordering::SeqCst);
                }
            }
        }
    }

    /// Others change a disk.
    pub(super) fn note_change(&self, place: usize) {
        for start in self.all_changes() {
            if let Some(word) = word_at(&self.memory, start + changes::NOW + place / 64 * 8) {
                word.fetch_or(1 << (place % 64), Ordering::SeqCst);
            }
        }
    }

    /// Forgets all requests: the driver that gave them has reset the device.
    pub(super) fn clear(&self) {
        for queue in (0..self.queues).filter_map(|index| self.queue(index, self.queue_size)) {
            queue.set_header(header::VERSION, 0);
        }
    }
}

fn word_at(memory: &MmapRegion<()>, offset: usize) -> Option<&AtomicU64> {
    memory.get_atomic_ref(offset).ok()
}

/// One queue's requests in flight.
#[derive(Debug)]
pub(super) struct Inflight {
    memory: Arc<MmapRegion<()>>,
    queue: usize,
    start: usize,
    /// Where it is noted which disks others change.
    changes: Option<usize>,
    size: u16,
    /// Orders the requests.
    counter: u64,
    /// Chains that are in the used ring and not shown yet.
    batch: Vec<u16>,
    /// Chains that were left in flight, and are not answered yet.
    again: Vec<u16>,
}

impl Inflight {
    /// What was left in flight, oldest first; `None` if nobody has served this ring before. `used` is the used ring's
    /// index, and `available` the heads that were made available since the entry of that index, oldest first.
    ///
    /// The memory may outlive the ring: a guest that was reset while no process served it has made a new ring, and what
    /// its last life left is not to be done in this one (VIRTIO 1.3 2.4.2: a reset device processes no buffers). A
    /// ring is another one if its index is not where it was left, or if fewer requests are outstanding than are noted.
    pub(super) fn recover(&mut self, used: u16, available: &[u16]) -> Option<Vec<u16>> {
        if self.header(header::VERSION) != Some(VERSION)
            || self.header(header::DESC_NUM) != Some(self.size)
        {
            self.begin(used);
            return None;
        }
        let noted = self.header(header::USED_IDX).unwrap_or(used);
        let near = used.wrapping_sub(noted) <= self.size;
        if near {
            self.end_last_batch(noted, used);
        }
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (self.load::<AtomicU64>(head, state::COUNTER).unwrap_or(0), head))
            .collect();
        left.sort_unstable();
        let another = self.is_of_another_start(noted, used, &left, available);
        if !near || left.len() > available.len() || another {
            log::info!(
                "queue {}: {} requests in flight are of an earlier life of the guest and are dropped",
                self.queue,
                left.len()
            );
            self.begin(used);
            return None;
        }
        // Their numbers begin at zero again, so that they never wrap. Each is at least its rank, so that the order is the
        // same after every step, should this process end here.
        self.counter = 0;
        for (_, head) in &left {
            self.store::<AtomicU64>(*head, state::COUNTER, self.counter);
            self.counter += 1;
        }
        self.set_header(header::USED_IDX, used);
        self.again = left.into_iter().map(|(_, head)| head).collect();
        if self.again.is_empty() {
            self.forget_changes();
        }
        Some(self.again.clone())
    }

    /// Nothing was ever answered, so that the index stays where it was and what was taken from a new ring are the first
    /// entries of the available ring; and it is not so.
    fn is_of_another_start(
        &self,
        noted: u16,
        used: u16,
        left: &[(u64, u16)],
        available: &[u16],
    ) -> bool {
        let unanswered = self.header(header::LAST_BATCH_HEAD) == Some(NOTHING);
        let same = left.iter().zip(available).all(|((_, head), given)| head == given);
        unanswered && (used != noted || used == 0 && !same)
    }

    /// Fresh memory.
    fn begin(&mut self, used: u16) {
        self.counter = 0;
        self.forget_changes();
        self.set_header(header::VERSION, 0);
        compiler_fence(Ordering::SeqCst);
        (0..self.size).for_each(|head| self.set_in_flight(head, false));
        self.set_header(header::DESC_NUM, self.size);
        self.set_header(header::LAST_BATCH_HEAD, NOTHING);
        self.set_header(header::USED_IDX, used);
        compiler_fence(Ordering::SeqCst);
        self.set_header(header::VERSION, VERSION);
    }

    /// The index in the used ring moved, and the process ended before it had noted what that was for: those
    /// chains were answered.
    fn end_last_batch(&self, noted: u16, used: u16) {
        let mut head = self.header(header::LAST_BATCH_HEAD).unwrap_or(NOTHING);
        for _ in 0..used.wrapping_sub(noted).min(self.size) {
            self.set_in_flight(head, false);
            head = self.load::<AtomicU16>(head, state::NEXT).unwrap_or(NOTHING);
        }
    }

    /// A request was taken from the available ring. One that was left in flight is noted already, and keeps its place.
    pub(super) fn take(&mut self, head: u16) {
        self.store::<AtomicU64>(head, state::COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        compiler_fence(Ordering::SeqCst);
        self.set_in_flight(head, true);
    }

    /// A chain was put into the used ring, where the driver does not see it yet.
    pub(super) fn give(&mut self, head: u16) {
        let last = self.header(header::LAST_BATCH_HEAD).unwrap_or(NOTHING);
        self.store::<AtomicU16>(head, state::NEXT, last);
        compiler_fence(Ordering::SeqCst);
        self.set_header(header::LAST_BATCH_HEAD, head);
        self.batch.push(head);
    }

    /// The driver sees the used ring up to here. The stores above came before that, those here come after it: a
    /// process that is killed leaves them in this order on every processor.
    pub(super) fn shown(&mut self, used: u16) {
        compiler_fence(Ordering::SeqCst);
        let batch = std::mem::take(&mut self.batch);
        for head in &batch {
            self.set_in_flight(*head, false);
        }
        compiler_fence(Ordering::SeqCst);
        self.set_header(header::USED_IDX, used);
        if !self.again.is_empty() {
            self.again.retain(|head| !batch.contains(head));
            if self.again.is_empty() {
                self.forget_changes();
            }
        }
    }

    /// Whether others have changed a disk before a request was taken that was left in flight, or since; `None` if nobody
    /// has kept that.
    pub(super) fn was_changed_by_others(&self, place: usize) -> Option<bool> {
        let word = self.changes? + changes::BEFORE + place / 64 * 8;
        Some(word_at(&self.memory, word)?.load(Ordering::SeqCst) >> (place % 64) & 1 != 0)
    }

    /// What others did before is of no interest: nothing is left in flight that was taken then.
    fn forget_changes(&self) {
        let words = self.changes.into_iter().flat_map(|start| {
            (0..changes::WORDS).map(move |word| start + changes::BEFORE + 8 * word)
        });
        for word in words.filter_map(|at| word_at(&self.memory, at)) {
            word.store(0, Ordering::SeqCst);
        }
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

    /// As many requests as anything can be in flight.
    const ALL: [u16; 8] = [0; 8];

    #[test]
    fn what_was_not_answered_is_left_in_its_order() {
        let region = region();
        let mut queue = region.queue(1, 8).unwrap();
        assert_eq!(queue.recover(0, &[]), None);
        [5, 2, 7, 1].into_iter().for_each(|head| queue.take(head));
        queue.give(2);
        queue.give(1);
        queue.shown(2);
        drop(queue);
        let mut next = region.queue(1, 8).unwrap();
        assert_eq!(next.recover(2, &ALL), Some(vec![5, 7]));
        next.take(0);
        assert_eq!(region.queue(1, 8).unwrap().recover(2, &ALL), Some(vec![5, 7, 0]));
        assert_eq!(region.queue(0, 8).unwrap().recover(0, &ALL), None, "another queue");
    }

    /// What is done again keeps its place before what is taken later, in any number of lives and at the end of the
    /// numbers.
    #[test]
    fn the_order_survives_several_crashes() {
        let region = region();
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(100, &[]);
        queue.counter = u64::MAX - 1;
        [6, 3].into_iter().for_each(|head| queue.take(head));
        for (taken, order) in [(5, &[6, 3][..]), (0, &[6, 3, 5]), (4, &[6, 3, 5, 0])] {
            let mut next = region.queue(0, 8).unwrap();
            assert_eq!(next.recover(100, &ALL).as_deref(), Some(order));
            next.take(taken);
        }
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(100, &ALL);
        queue.give(3);
        queue.shown(101);
        assert_eq!(region.queue(0, 8).unwrap().recover(101, &ALL), Some(vec![6, 5, 0, 4]));
    }

    #[test]
    fn an_end_at_any_step_loses_and_repeats_nothing() {
        let taken = |queue: &mut Inflight| {
            queue.recover(65534, &[]);
            [0, 1, 2, 3].into_iter().for_each(|head| queue.take(head));
            queue.give(3);
            queue.give(0);
        };
        // Before the index moved: neither was answered.
        let region = region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        assert_eq!(region.queue(0, 8).unwrap().recover(65534, &ALL), Some(vec![0, 1, 2, 3]));
        // After it, before that was noted: both were, over the end of the index's numbers.
        let region = super::tests::region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        assert_eq!(region.queue(0, 8).unwrap().recover(0, &ALL), Some(vec![1, 2]));
        // Halfway through the note.
        let region = super::tests::region();
        let mut queue = region.queue(0, 8).unwrap();
        taken(&mut queue);
        queue.set_in_flight(3, false);
        assert_eq!(region.queue(0, 8).unwrap().recover(0, &ALL), Some(vec![1, 2]));
    }

    #[test]
    fn what_an_earlier_life_of_the_guest_left_is_forgotten() {
        let taken = |used: u16, heads: &[u16]| {
            let region = region();
            let mut queue = region.queue(0, 8).unwrap();
            queue.recover(used, &[]);
            heads.iter().for_each(|head| queue.take(*head));
            (region.queue(0, 8).unwrap(), region)
        };
        let cases: [(&str, u16, u16, &[u16], bool); 9] = [
            ("the same ring", 100, 100, &[2, 1], true),
            ("the same ring, with more", 100, 100, &[2, 1, 5], true),
            ("a new ring, empty", 0, 0, &[], false),
            ("a new ring with as much in it", 100, 0, &[2, 1], false),
            ("a new ring with less in it", 65535, 0, &[2], false),
            (
                "a new ring with more in it where an old one was never answered",
                65535,
                0,
                &[1, 2, 5],
                false,
            ),
            ("a new ring that begins as an old one did", 65535, 0, &[2, 1, 5], false),
            ("an old ring that was never answered", 0, 0, &[2, 1, 5], true),
            ("a new ring where an old one was never answered", 0, 0, &[1, 2, 5], false),
        ];
        for (what, before, now, available, same) in cases {
            let (mut next, region) = taken(before, &[2, 1]);
            let expected = same.then(|| vec![2, 1]);
            assert_eq!(next.recover(now, available), expected, "{what}");
            // Whatever it was, it is this ring's now.
            let again = region.queue(0, 8).unwrap().recover(now, available);
            assert_eq!(again, Some(expected.unwrap_or_default()), "{what}");
        }
        let region = super::tests::region();
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(99, &[]);
        [7, 2, 1].into_iter().for_each(|head| queue.take(head));
        queue.give(7);
        queue.shown(100);
        assert_eq!(region.queue(0, 8).unwrap().recover(0, &ALL), None, "an old one was answered");
        let (mut next, region) = taken(100, &[2, 1]);
        region.queue(2, 8).unwrap().recover(100, &[]);
        region.clear();
        assert_eq!(next.recover(100, &ALL), None, "after a reset of the device");
        assert_eq!(region.queue(2, 8).unwrap().recover(100, &ALL), None, "all queues are reset");
    }

    /// The index comes to zero again in an old ring, too, where the oldest request may be the one that is not answered.
    #[test]
    fn an_index_that_wraps_to_zero_is_no_new_ring() {
        let region = region();
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(65535, &[]);
        [5, 2].into_iter().for_each(|head| queue.take(head));
        queue.give(2);
        queue.shown(0);
        assert_eq!(region.queue(0, 8).unwrap().recover(0, &[2]), Some(vec![5]));
    }

    /// A chain that was answered is the driver's, who may give it again: what was noted of it before is not about that.
    #[test]
    fn a_chain_that_comes_again_is_another_request() {
        let region = region();
        let next = || region.queue(0, 8).unwrap();
        let mut queue = next();
        queue.recover(0, &[]);
        [2, 1].into_iter().for_each(|head| queue.take(head));
        queue.give(2);
        queue.shown(1);
        queue.take(2);
        assert_eq!(next().recover(1, &ALL), Some(vec![1, 2]));
        queue.give(1);
        queue.shown(2);
        assert_eq!(next().recover(2, &ALL), Some(vec![2]));
        // The end of a batch that a process left unnoted is noted once.
        queue.give(2);
        let mut queue = next();
        assert_eq!(queue.recover(3, &ALL), Some(vec![]));
        queue.take(2);
        assert_eq!(next().recover(3, &ALL), Some(vec![2]));
    }

    #[test]
    fn a_batch_may_be_as_long_as_the_queue() {
        let region = region();
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(65530, &[]);
        (0..8).for_each(|head| queue.take(head));
        (0..8).for_each(|head| queue.give(head));
        assert_eq!(region.queue(0, 8).unwrap().recover(2, &[]), Some(vec![]));
    }

    /// What was noted of queues of another size lies elsewhere.
    #[test]
    fn what_was_noted_of_another_size_is_not_believed() {
        let file = Region::create(1, 8).unwrap();
        let size = Region::len(1, 8) as u64;
        let region = Region::map(file.try_clone().unwrap(), 0, size, 1, 8).unwrap();
        let mut queue = region.queue(0, 8).unwrap();
        queue.recover(7, &[]);
        queue.take(1);
        let smaller = Region::map(file, 0, size, 1, 4).unwrap();
        assert_eq!(smaller.queue(0, 4).unwrap().recover(7, &ALL), None);
        assert_eq!(smaller.queue(0, 4).unwrap().recover(7, &ALL), Some(vec![]));
    }

    /// What others change is of interest until what was left in flight then has been answered, queue by queue.
    #[test]
    fn what_others_change_is_known_as_long_as_requests_are_left_of_then() {
        let region = region();
        let serve = |index: usize, used: u16| {
            let mut queue = region.queue(index, 8).unwrap();
            queue.recover(used, &ALL);
            queue
        };
        let (mut busy, idle) = (serve(0, 100), serve(1, 100));
        busy.take(3);
        region.note_change(77);
        let changed = |queue: &Inflight| [76, 77, 141].map(|at| queue.was_changed_by_others(at));
        let (none, one) = ([Some(false); 3], [Some(false), Some(true), Some(false)]);
        assert_eq!(changed(&busy), none, "it has not been left yet");
        drop((busy, idle));
        for _ in 0..3 {
            // Whoever ends without an answer leaves it as it was.
            region.begin_changes();
            assert_eq!([changed(&serve(0, 100)), changed(&serve(1, 100))], [one, none]);
        }
        let mut queue = serve(0, 100);
        queue.take(5);
        queue.give(5);
        queue.shown(101);
        assert_eq!(changed(&queue), one);
        queue.give(3);
        queue.shown(102);
        assert_eq!(changed(&queue), none);
        region.note_change(141);
        region.clear();
        region.begin_changes();
        assert_eq!(changed(&serve(0, 102)), none, "after a reset of the device");
    }

    #[test]
    fn other_programs_keep_no_changes() {
        let size = (3 * Region::stride(8)) as u64;
        let file = Region::create(3, 8).unwrap();
        file.set_len(size).unwrap();
        let region = Region::map(file, 0, size, 3, 8).unwrap();
        region.begin_changes();
        region.note_change(1);
        let mut queue = region.queue(2, 8).unwrap();
        assert_eq!(queue.recover(0, &[]), None);
        assert_eq!(queue.was_changed_by_others(1), None);
    }

    #[test]
    fn nonsense_in_the_memory_is_survived() {
        let region = region();
        let mut queue = region.queue(2, 8).unwrap();
        queue.recover(0, &[]);
        for offset in 0..Region::stride(8) {
            queue.at::<AtomicU8>(offset).unwrap().store(0xff, Ordering::Relaxed);
        }
        queue.set_header(header::VERSION, VERSION);
        queue.set_header(header::DESC_NUM, 8);
        queue.set_header(header::LAST_BATCH_HEAD, 0xfeff);
        assert_eq!(region.queue(2, 8).unwrap().recover(6, &ALL), Some(vec![]));
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
