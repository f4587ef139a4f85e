//! One disk: its identity, its geometry and the state that commands change.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Outcome;
use super::address::LunNumber;
use super::attention::Nexus;
use super::background::Background;
use super::cmd::buffer::Scratch;
use super::cmd::identity::Clock;
use super::mode_pages::Pages;
use super::provisioning::SpaceWatch;
use super::reservations::Reservations;
use super::sense::{About, Key, ScsiError, Sense, asc};
use super::sharing::Sharing;
use super::statistics::{Activity, Statistics};
use crate::store::{Capabilities, Durability, Exclusion, Host, Store, StoreError, WriteBack};

/// Most bytes that one command may transfer or verify (VPD B0 MAXIMUM TRANSFER LENGTH).
pub const MAX_TRANSFER: u64 = 32 << 20;

/// Most blocks of a disk: every byte offset fits an `off_t`, with room to spare.
const MAX_BYTES: u64 = 1 << 62;

/// What becomes of writes of nothing but zeroes, as QEMU names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zeroed, reserved space.
    On,
    /// Their space is given back.
    Unmap,
}

/// What a disk is configured to be.
#[derive(Clone, Debug)]
pub struct LunSettings {
    /// Target number, 0 to 255.
    pub target: u8,
    /// Logical unit number.
    pub lun: LunNumber,
    /// Unit serial number (VPD 80): printable ASCII.
    pub serial: String,
    /// NAA designator (VPD 83): 8 or 16 bytes.
    pub naa: Vec<u8>,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Physical block size in bytes: a power of two, not below `block_size`.
    pub physical_block_size: u32,
    /// Whether to look like a disk that turns.
    pub rotational: bool,
    /// Whether thin provisioning is offered where the store can do it.
    pub discard: bool,
    /// OPTIMAL UNMAP GRANULARITY in bytes; a multiple of `block_size`.
    pub discard_granularity: u32,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Whether the write cache starts out enabled (WCE).
    pub write_cache: bool,
}

/// A disk in service.
pub struct Lun {
    settings: LunSettings,
    index: usize,
    store: Arc<dyn Store>,
    exclusion: Arc<Exclusion>,
    write_back: Option<Arc<WriteBack>>,
    host: Arc<Host>,
    waits_for_host: bool,
    blocks: AtomicU64,
    started: AtomicBool,
    pages: Pages,
    background: Background,
    reservations: Reservations,
    sharing: Sharing,
    statistics: Statistics,
    scratch: Mutex<Scratch>,
    clock: Mutex<Clock>,
    space_watch: Option<SpaceWatch>,
}

/// Bytes of the store, inside the disk.
pub type ByteRange = Range<u64>;

/// A range of logical blocks that lies inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First logical block.
    pub lba: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// First byte in the store.
    pub offset: u64,
    /// Length in bytes; at most [`MAX_TRANSFER`].
    pub bytes: usize,
}

impl BlockRange {
    /// Its bytes in the store.
    pub fn in_store(&self) -> ByteRange {
        self.offset..self.offset.saturating_add(self.bytes as u64)
    }
}

impl Lun {
    /// Puts a store into service as disk number `index` of its target.
    ///
    /// # Errors
    /// If the store cannot tell its size.
    pub fn new(
        settings: LunSettings,
        index: usize,
        store: Arc<dyn Store>,
    ) -> Result<Self, StoreError> {
        let can = store.capabilities();
        let thin = is_thin(&settings, can);
        // Thresholds are about space that can still be taken, and there must be someone to ask.
        let watched = thin && !can.read_only && store.space()?.is_some();
        let pages = Pages::new(settings.write_cache, watched, store.notes());
        let reservations = Reservations::of(store.notes());
        let (host, waits_for_host) = (Host::of_device(can.device), !can.in_memory);
        let write_back = store.write_back().cloned();
        let exclusion = Arc::new(Exclusion::around(store));
        let lun = Lun {
            settings,
            index,
            store: Arc::<Exclusion>::clone(&exclusion),
            exclusion,
            write_back,
            host,
            waits_for_host,
            blocks: AtomicU64::new(0),
            started: AtomicBool::new(true),
            pages,
            background: Background::idle(),
            reservations,
            sharing: Sharing::default(),
            statistics: Statistics::new(),
            scratch: Mutex::default(),
            clock: Mutex::default(),
            space_watch: watched.then(SpaceWatch::new),
        };
        lun.refresh_capacity()?;
        Ok(lun)
    }

    /// What it was configured to be.
    pub fn settings(&self) -> &LunSettings {
        &self.settings
    }

    /// Its number among the target's disks.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where its bytes are.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Who has blocks of it for himself.
    pub fn exclusion(&self) -> &Exclusion {
        &self.exclusion
    }

    /// Why writes that were answered may be lost, if the host could not write them back. As long as that is so, whoever
    /// needs something to be stable is refused.
    #[inline]
    pub fn loss(&self) -> Option<StoreError> {
        self.write_back.as_ref()?.failure()
    }

    /// The deferred error that is due to an initiator.
    #[inline]
    pub fn deferred_error(&self, nexus: &Nexus) -> Option<Sense> {
        self.deferred(self.loss()?, nexus)
    }

    #[cold]
    fn deferred(&self, loss: StoreError, nexus: &Nexus) -> Option<Sense> {
        let due = nexus.attentions(self.index).learn_of_loss();
        match ScsiError::from_store(loss, true, self.block_size()) {
            ScsiError::Check(sense) if due => Some(Sense { about: About::Deferred, ..sense }),
            _ => None,
        }
    }

    /// What is known of the host below it.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Whether its bytes are anywhere but in memory, so that the host may hang.
    pub fn waits_for_host(&self) -> bool {
        self.waits_for_host
    }

    /// Mode pages and what they switch.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// The format or sanitize operation.
    pub fn background(&self) -> &Background {
        &self.background
    }

    /// Who has reserved it.
    pub fn reservations(&self) -> &Reservations {
        &self.reservations
    }

    /// Who has changed it.
    pub fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    /// What it has counted.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Counts a command that was done in steps: what it processed, or that the medium failed it.
    pub fn account<T>(&self, activity: Activity, bytes: usize, result: &Result<T, ScsiError>) {
        match result {
            Ok(_) => self.statistics.count(activity, bytes),
            Err(ScsiError::Check(sense)) if sense.key == Key::MediumError => {
                self.statistics.count_error(activity);
            }
            Err(_) => {}
        }
    }

    /// What WRITE BUFFER has left.
    pub fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its clock.
    pub fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.settings.block_size
    }

    /// LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
    pub fn physical_exponent(&self) -> u8 {
        let ratio = (self.settings.physical_block_size / self.settings.block_size).max(1);
        u8::try_from(ratio.ilog2()).unwrap_or(0)
    }

    /// Capacity in logical blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }

    /// Asks the store for its size again; says whether the capacity changed.
    ///
    /// # Errors
    /// If the store cannot tell; the old capacity stays.
    pub fn refresh_capacity(&self) -> Result<bool, StoreError> {
        let blocks = self.store.size()?.min(MAX_BYTES) / u64::from(self.block_size());
        Ok(self.blocks.swap(blocks, Ordering::AcqRel) != blocks)
    }

    /// The range of a command, checked against capacity and MAXIMUM TRANSFER LENGTH.
    ///
    /// # Errors
    /// 05/21/00 if it is not inside the disk, 05/24/00 if it is too long.
    pub fn range(&self, lba: u64, blocks: u64) -> Result<BlockRange, ScsiError> {
        let range = self.bytes(lba, blocks)?;
        if range.end - range.start > MAX_TRANSFER {
            return Err(ScsiError::illegal(asc::INVALID_FIELD_IN_CDB));
        }
        let bytes = usize::try_from(range.end - range.start).map_err(|_| ScsiError::Busy)?;
        Ok(BlockRange { lba, blocks, offset: range.start, bytes })
    }

    /// The bytes of a range of blocks of any length.
    ///
    /// # Errors
    /// 05/21/00 if it is not inside the disk.
    pub fn bytes(&self, lba: u64, blocks: u64) -> Result<ByteRange, ScsiError> {
        let end = lba.checked_add(blocks).ok_or(ScsiError::LBA_OUT_OF_RANGE)?;
        if end > self.blocks() {
            return Err(ScsiError::LBA_OUT_OF_RANGE);
        }
        // Neither product overflows: the capacity is at most MAX_BYTES.
        let block = u64::from(self.block_size());
        Ok(lba * block..end * block)
    }

    /// Whether thin provisioning is offered (LBPME): it was asked for, and the store gives space
    /// back, or nobody will ask it to.
    pub fn is_thin(&self) -> bool {
        is_thin(&self.settings, self.store.capabilities())
    }

    /// What watches the space for it, if it can be watched.
    pub fn space_watch(&self) -> Option<&SpaceWatch> {
        self.space_watch.as_ref()
    }

    /// Whether blocks can be anchored (ANC_SUP).
    pub fn can_anchor(&self) -> bool {
        self.is_thin() && self.store.capabilities().reserves
    }

    /// What a command that writes does at its end if that was not stable: where its effect must be stable before it
    /// is answered, it is made so. The write cache may have been switched off since it was planned.
    ///
    /// # Errors
    /// If the store cannot make it stable.
    pub fn settle(&self, durability: Durability) -> Result<(), ScsiError> {
        if durability == Durability::Cached && self.pages.write_cache() {
            return Ok(());
        }
        self.store.flush().map_err(|e| ScsiError::from_store(e, true, self.block_size()))
    }

    /// The same at the end of a write that was made with this durability.
    ///
    /// # Errors
    /// As [`Lun::settle`].
    pub fn settle_written(&self, written: Durability) -> Result<(), ScsiError> {
        match written {
            Durability::Stable => Ok(()),
            Durability::Cached => self.settle(written),
        }
    }

    /// Makes everything stable that was written; on a disk that is only read, nothing was.
    ///
    /// # Errors
    /// If the store cannot.
    pub fn flush(&self) -> Result<(), ScsiError> {
        match self.store.capabilities().read_only {
            true => Ok(()),
            false => self.settle(Durability::Stable),
        }
    }

    /// MAXIMUM TRANSFER LENGTH in blocks.
    pub fn max_transfer_blocks(&self) -> u64 {
        MAX_TRANSFER / u64::from(self.block_size())
    }

    /// Whether START STOP UNIT last started it.
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Starts or stops it.
    pub fn set_started(&self, started: bool) {
        self.started.store(started, Ordering::Release);
    }

    /// Starts or stops it because an initiator wants so.
    pub fn stop_or_start(&self, start: bool) {
        if !start && self.is_started() {
            self.statistics.count_stop();
        }
        self.set_started(start);
    }

    /// Commands that reach the medium need a started disk, which has a medium.
    ///
    /// # Errors
    /// 02/04/02 if it is stopped, 02/04/03 if its file has become so short that it has no blocks: there is no capacity
    /// that would say so.
    pub fn check_ready(&self) -> Result<(), ScsiError> {
        let asc = match (self.is_started(), self.blocks()) {
            (true, 1..) => return Ok(()),
            (true, 0) => asc::NOT_READY_MANUAL_INTERVENTION_REQUIRED,
            (false, _) => asc::NOT_READY_INITIALIZING_COMMAND_REQUIRED,
        };
        Err(ScsiError::Check(Sense::new(Key::NotReady, asc)))
    }

    /// Whether nothing may be written, for whatever reason (the WP bit of MODE SENSE).
    pub fn is_write_protected(&self) -> bool {
        self.store.capabilities().read_only || self.pages.software_write_protect()
    }

    /// Commands that change the medium need a writable disk.
    ///
    /// # Errors
    /// 07/27/00, or 07/27/02 if it is the initiator's own doing (SWP).
    pub fn check_writable(&self) -> Result<(), ScsiError> {
        let asc = if self.store.capabilities().read_only {
            asc::WRITE_PROTECTED
        } else if self.pages.software_write_protect() {
            asc::SOFTWARE_WRITE_PROTECTED
        } else {
            return Ok(());
        };
        Err(ScsiError::Check(Sense::new(Key::DataProtect, asc)))
    }

    /// How a write must be done: without a write cache every write is stable, like one with FUA.
    pub fn durability(&self, fua: bool) -> Durability {
        match fua || !self.pages.write_cache() {
            true => Durability::Stable,
            false => Durability::Cached,
        }
    }

    /// The outcome of a command that failed, with sense data as this disk is set to give it.
    pub fn failed(&self, error: ScsiError) -> Outcome {
        Outcome::failed(error, self.pages.descriptor_sense())
    }

    /// What a reset does to the disk's own state: it runs, and mode parameters are at their defaults
    /// (SAM-6 6.3.3; there are no saved ones).
    pub fn reset(&self) {
        self.set_started(true);
        let cached = self.pages.write_cache();
        self.pages.reset();
        self.reservations.reset();
        if cached && !self.pages.write_cache() {
            // Nobody flushes a disk without a write cache, and there may be something in it.
            let store = Arc::clone(&self.store);
            let begun = self.store.pool().run(Box::new(move || {
                let _ = store.flush();
            }));
            if begun.is_err() {
                log::warn!(
                    "{}: no thread to flush what was written before the reset",
                    self.settings.serial
                );
            }
        }
    }
}

fn is_thin(settings: &LunSettings, can: &Capabilities) -> bool {
    settings.discard && (can.deallocates || can.read_only)
}
