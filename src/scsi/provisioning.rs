//! Space that runs out: thresholds and who is told of them (SBC-4 4.7.3.7).
//!
//! Space is looked at in the background, on the store's threads, at most ten times a second and only when
//! commands come: a unit attention is told with a command anyway, so that nothing is lost by sleeping as
//! long as the initiator does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use super::attention::UnitAttention;
use super::lun::Lun;
use super::target::Target;
use crate::store::Space;

/// Bytes of a threshold set, in which space is counted on the wire: 1 MiB, so that 32 bits count far
/// more than any file can have.
pub const THRESHOLD_SET: u64 = 1 << 20;

/// Milliseconds between two looks: a guest that writes a gigabyte a second is warned within 100 MB.
const INTERVAL: u64 = 100;

/// The thresholds, and the bit that stands for each.
const THRESHOLDS: [(UnitAttention, u8); 2] =
    [(UnitAttention::AvailableThreshold, 1), (UnitAttention::UsedThreshold, 2)];

/// What is known of a disk's space.
#[derive(Debug)]
pub struct SpaceWatch {
    started: Instant,
    /// When it was last looked at, in milliseconds since the start; 0 is never.
    last: AtomicU64,
    looking: AtomicBool,
    /// Thresholds that are reached: they are told once, until they are left again.
    reached: AtomicU8,
    /// Thresholds that were reached since initiators were told.
    crossed: AtomicU8,
}

impl SpaceWatch {
    /// Nothing is known yet.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        SpaceWatch {
            started: Instant::now(),
            last: AtomicU64::new(0),
            looking: AtomicBool::new(false),
            reached: AtomicU8::new(0),
            crossed: AtomicU8::new(0),
        }
    }

    /// The thresholds were changed: all are told again if they are reached.
    pub fn rearm(&self) {
        self.reached.store(0, Ordering::Release);
    }

    fn is_due(&self) -> bool {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let last = self.last.load(Ordering::Acquire);
        if last != 0 && now.saturating_sub(last) < INTERVAL
            || self.looking.swap(true, Ordering::AcqRel)
        {
            return false;
        }
        self.last.store(now, Ordering::Release);
        true
    }

    fn compare(&self, lun: &Lun, space: Space) {
        let set = lun.pages().thresholds();
        let (available, used) = (counted(space.available), counted(space.used));
        let mut reached = 0;
        if set.available.is_some_and(|threshold| available <= threshold) {
            reached |= 1;
        }
        if set.used.is_some_and(|threshold| used >= threshold) {
            reached |= 2;
        }
        let new = reached & !self.reached.swap(reached, Ordering::AcqRel);
        if new != 0 {
            let serial = &lun.settings().serial;
            log::warn!("{serial}: space threshold: {available} MiB left, {used} MiB used");
            self.crossed.fetch_or(new, Ordering::AcqRel);
        }
    }
}

/// Looks at the space of a disk if an initiator wants to be told and it is time to, and tells what was
/// found the last time.
pub(super) fn watch(target: &Target, lun: &Arc<Lun>) {
    let Some(watch) = lun.space_watch().filter(|_| lun.pages().has_thresholds()) else { return };
    if watch.crossed.load(Ordering::Acquire) != 0 {
        let crossed = watch.crossed.swap(0, Ordering::AcqRel);
        for (attention, _) in THRESHOLDS.iter().filter(|(_, bit)| crossed & bit != 0) {
            target.announce(lun, *attention, None);
        }
    }
    if watch.is_due() {
        let on = Arc::clone(lun);
        let begun = lun.store().pool().run(Box::new(move || {
            let Some(watch) = on.space_watch() else { return };
            match on.store().space() {
                Ok(Some(space)) => watch.compare(&on, space),
                Ok(None) => {}
                Err(error) => log::warn!("{}: space: {error}", on.settings().serial),
            }
            watch.looking.store(false, Ordering::Release);
        }));
        if begun.is_err() {
            watch.looking.store(false, Ordering::Release);
        }
    }
}

/// Bytes as threshold sets.
pub(super) fn counted(bytes: u64) -> u32 {
    u32::try_from(bytes / THRESHOLD_SET).unwrap_or(u32::MAX)
}

/// THRESHOLD EXPONENT (VPD B2): a threshold set in logical blocks, as a power of two.
pub(super) fn threshold_exponent(lun: &Lun) -> u8 {
    let blocks = THRESHOLD_SET / u64::from(lun.block_size());
    u8::try_from(blocks.max(1).ilog2()).unwrap_or(0)
}
