//! Task attributes (SAM-6 8.6): which commands of a queue may begin, and which wait for others.
//!
//! Order holds within a queue: commands on different queues are consumed with no order constraints (VIRTIO
//! 1.3 5.6.6.1). Where nobody asks for order there is nothing here, and nothing is looked at.

use std::collections::{BTreeMap, VecDeque};

/// When a command may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attribute {
    /// After every ORDERED command that came before it.
    Simple,
    /// After every command that came before it.
    Ordered,
    /// At once.
    HeadOfQueue,
}

impl Attribute {
    /// The `task_attr` of a request. ACA, and what is not defined, counts as SIMPLE (VIRTIO 1.3
    /// 5.6.6.1): there is never an ACA condition.
    pub(super) fn parse(value: u8) -> Self {
        match value {
            1 => Attribute::Ordered,
            2 => Attribute::HeadOfQueue,
            _ => Attribute::Simple,
        }
    }
}

/// The commands that wait, by disk.
pub(super) struct Order<C> {
    disks: BTreeMap<usize, Line<C>>,
}

/// Who waits for a disk, and for whom.
struct Line<C> {
    /// The ORDERED command that everybody waits for, if it is in flight.
    ordered: Option<u32>,
    waiting: VecDeque<(Attribute, C)>,
}

impl<C> Default for Order<C> {
    fn default() -> Self {
        Order { disks: BTreeMap::new() }
    }
}

impl<C> Order<C> {
    /// Whether nobody waits for anything: a SIMPLE command may begin.
    pub(super) fn is_free(&self) -> bool {
        self.disks.is_empty()
    }

    /// Whether a command must wait, on a disk with this many in flight.
    pub(super) fn holds_back(&self, disk: usize, attribute: Attribute, in_flight: usize) -> bool {
        let line = self.disks.contains_key(&disk);
        match attribute {
            Attribute::Simple => line,
            Attribute::Ordered => line || in_flight > 0,
            Attribute::HeadOfQueue => false,
        }
    }

    /// Has a command wait.
    pub(super) fn wait(&mut self, disk: usize, attribute: Attribute, command: C) {
        self.line(disk).waiting.push_back((attribute, command));
    }

    /// An ORDERED command has begun and is in flight.
    pub(super) fn began(&mut self, disk: usize, slot: u32) {
        self.line(disk).ordered = Some(slot);
    }

    fn line(&mut self, disk: usize) -> &mut Line<C> {
        let empty = || Line { ordered: None, waiting: VecDeque::new() };
        self.disks.entry(disk).or_insert_with(empty)
    }

    /// The command in this slot is no longer in flight.
    pub(super) fn ended(&mut self, disk: usize, slot: u32) {
        if let Some(line) = self.disks.get_mut(&disk)
            && line.ordered == Some(slot)
        {
            line.ordered = None;
        }
    }

    /// The next command that may begin now, on a disk with this many in flight.
    pub(super) fn next(&mut self, disk: usize, in_flight: usize) -> Option<(Attribute, C)> {
        let line = self.disks.get_mut(&disk)?;
        let may_begin = line.ordered.is_none()
            && line
                .waiting
                .front()
                .is_some_and(|(attribute, _)| *attribute != Attribute::Ordered || in_flight == 0);
        let next = if may_begin { line.waiting.pop_front() } else { None };
        if next.is_none() && line.ordered.is_none() && line.waiting.is_empty() {
            self.disks.remove(&disk);
        }
        next
    }

    /// Commands that wait.
    pub(super) fn waiting(&self) -> usize {
        self.disks.values().map(|line| line.waiting.len()).sum()
    }

    /// Disks for which something waits.
    pub(super) fn disks(&self) -> Vec<usize> {
        self.disks.keys().copied().collect()
    }

    /// Takes out the waiting commands of a disk that `which` chooses.
    pub(super) fn take(&mut self, disk: usize, which: impl Fn(&C) -> bool) -> Vec<C> {
        let Some(line) = self.disks.get_mut(&disk) else { return Vec::new() };
        let (taken, left) = line.waiting.drain(..).partition(|(_, command)| which(command));
        line.waiting = left;
        let taken: VecDeque<(Attribute, C)> = taken;
        taken.into_iter().map(|(_, command)| command).collect()
    }

    /// Whether a waiting command of a disk is one that `which` looks for.
    pub(super) fn has(&self, disk: usize, which: impl Fn(&C) -> bool) -> bool {
        self.disks.get(&disk).is_some_and(|line| line.waiting.iter().any(|(_, c)| which(c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Attribute::{HeadOfQueue, Ordered, Simple};

    #[test]
    fn ordered_commands_wait_for_all_before_them_and_hold_up_all_behind_them() {
        let mut order = Order::default();
        assert!(!order.holds_back(0, Simple, 5) && order.holds_back(0, Ordered, 1));
        order.wait(0, Ordered, "a");
        assert!(order.holds_back(0, Simple, 1) && !order.holds_back(1, Simple, 1));
        order.wait(0, Simple, "b");
        order.wait(0, Simple, "c");
        order.wait(0, Ordered, "d");
        assert!(!order.holds_back(0, HeadOfQueue, 1));
        assert_eq!(order.next(0, 1), None);
        assert_eq!(order.next(0, 0), Some((Ordered, "a")));
        order.began(0, 7);
        order.ended(0, 3);
        assert_eq!(order.next(0, 1), None);
        order.ended(0, 7);
        assert_eq!(order.next(0, 0), Some((Simple, "b")));
        assert_eq!(order.next(0, 1), Some((Simple, "c")));
        assert_eq!((order.next(0, 2), order.waiting()), (None, 1));
        assert_eq!(order.take(0, |c| *c == "d"), ["d"]);
        assert_eq!(order.next(0, 2), None);
        assert!(order.is_free());
    }
}
