//! One front end's connection: negotiation, memory, and the state of each ring.
//!
//! This is written with the `vhost` crate's words for messages, without the `vhost-user-backend` crate,
//! because that crate owns the queue threads: each request would take two locks there, a device reset
//! would not wait for requests in flight, and the in-flight region could not be offered.
//!
//! A ring runs when it has everything it needs and stops when something is taken away; the order in
//! which a front end sends the messages does not matter. It needs memory, and SET_VRING_NUM, SET_VRING_ADDR,
//! SET_VRING_KICK and, where protocol features were negotiated, SET_VRING_ENABLE. All but the last have to be told anew
//! after GET_VRING_BASE, which ends a life of the ring: what was told before it may be about memory that the guest uses
//! otherwise now. SET_VRING_BASE may come at any place among them or not at all. Without it a ring goes on where its used
//! index says that requests are not answered, which is what front ends tell. Told something else than it runs with, a
//! ring starts anew with that if it has not taken anything; else it is too late, and an error.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use zerocopy::IntoBytes;

use super::dirty_log::DirtyLog;
use super::events::EventQueue;
use super::guest_buf::Framing;
use super::inflight;
use super::memory::{GuestMemory, MAX_SLOTS, Regions};
use super::message::{Event, Mailbox, Message, Queues};
use super::requests::RequestQueue;
use super::ring::{MAX_QUEUE_SIZE, Ring, Rules};
use super::split_ring::Layout;
use super::tmf::ControlQueue;
use super::wire::Config;
use super::worker::{Host, Worker};
use super::{Device, FIXED_QUEUES, Offer, event_fd, refused, wrong};
use crate::scsi::{Nexus, Port, address, lun};

const CONTROL_QUEUE: usize = 0;
const EVENT_QUEUE: usize = 1;

/// Feature bits of VIRTIO 1.3 section 6 and 5.6.3.
mod feature {
    pub(super) const HOTPLUG: u64 = 1 << 1;
    pub(super) const CHANGE: u64 = 1 << 2;
    /// VHOST_F_LOG_ALL.
    pub(super) const LOG_ALL: u64 = 1 << 26;
    /// Of legacy drivers: QEMU offers it whatever we do, and passes it on when it was accepted.
    pub(super) const ANY_LAYOUT: u64 = 1 << 27;
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
}

/// What we offer a driver, and a front end.
const FEATURES: u64 = feature::HOTPLUG
    | feature::CHANGE
    | feature::LOG_ALL
    | feature::ANY_LAYOUT
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// How a ring is notified of requests.
enum Kick {
    /// By an event.
    Event(File),
    /// Not at all: it has to look.
    Poll,
}

impl Kick {
    fn try_clone(&self) -> io::Result<Option<File>> {
        match self {
            Kick::Event(event) => event.try_clone().map(Some),
            Kick::Poll => Ok(None),
        }
    }
}

/// What a front end has told about a ring, and its thread while it runs.
#[derive(Default)]
struct RingState {
    size: Option<u16>,
    /// Descriptor table, available ring, used ring: front end addresses.
    addresses: Option<[u64; 3]>,
    /// Where the next request is, if that was told or the ring has run.
    base: Option<u16>,
    kick: Option<Kick>,
    call: Option<File>,
    enabled: bool,
    worker: Option<Worker>,
    /// Where it started, while it runs.
    started_at: u16,
}

/// One front end's connection.
pub(super) struct Connection {
    device: Arc<Device>,
    nexus: Arc<Nexus>,
    features: u64,
    protocol_features: u64,
    regions: Regions,
    memory: Arc<GuestMemory>,
    /// Where requests in flight are noted.
    inflight: Option<inflight::Region>,
    /// Where written memory is noted, while LOG_ALL is there.
    log: Option<Arc<DirtyLog>>,
    rings: Vec<RingState>,
    /// The same rings, as their threads and other connections see them.
    queues: Arc<Queues>,
}

impl Connection {
    /// A connection on which nothing was said yet.
    pub(super) fn new(device: Arc<Device>, port: Port, queues: Arc<Queues>) -> Self {
        let rings = FIXED_QUEUES + device.offer.request_queues;
        Connection {
            nexus: device.target.connect(port),
            device,
            features: 0,
            protocol_features: 0,
            regions: Regions::default(),
            memory: Arc::default(),
            inflight: None,
            log: None,
            rings: (0..rings).map(|_| RingState::default()).collect(),
            queues,
        }
    }

    /// Its queues, for those who have something to say to them.
    pub(super) fn queues(&self) -> Arc<Queues> {
        Arc::clone(&self.queues)
    }

    /// Stops every ring and waits until nothing is in flight, and nothing goes on that the initiator has started. The
    /// driver is gone or starts anew, so that copies and the like need not be finished; or, if they are to be left, the
    /// front end comes back and has them done by whoever serves it then.
    pub(super) fn stop_all(&mut self, leave: bool) {
        for ring in &self.rings {
            if let Some(worker) = &ring.worker {
                worker.give_up(leave);
            }
        }
        let served = (0..self.rings.len()).filter(|index| self.drain(*index)).count();
        // Before another process can have the disks.
        self.device.target.end_nexus(&self.nexus);
        (0..served).for_each(|_| self.device.target.end_service());
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> Result<(usize, &mut RingState)> {
        let queues = self.rings.len();
        let index = index.try_into().unwrap_or(usize::MAX);
        let ring = self
            .rings
            .get_mut(index)
            .ok_or_else(|| wrong(format_args!("queue {index}: there are {queues}, from 0 on")))?;
        Ok((index, ring))
    }

    /// Stops a ring; nothing of it is in flight afterwards.
    fn stop(&mut self, index: usize) {
        if self.drain(index) {
            self.device.target.end_service();
        }
    }

    /// The same, but for the end of its service; says whether it ran.
    fn drain(&mut self, index: usize) -> bool {
        let Some(ring) = self.rings.get_mut(index) else { return false };
        let Some(worker) = ring.worker.take() else { return false };
        if let Some(ended) = worker.join() {
            ring.base = Some(ended.next_avail);
        }
        true
    }

    /// Starts a ring that has everything it needs.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        let Some(ring) = self.rings.get(index) else { return Ok(()) };
        let told = (ring.size, ring.addresses, &ring.kick, &ring.worker, ring.enabled);
        let (Some(size), Some(addresses), Some(kick), None, true) = told else { return Ok(()) };
        let Some(layout) = self.layout(index, size, addresses) else { return Ok(()) };
        let kick = kick.try_clone().map_err(refused)?;
        let call = ring.call.as_ref().map(File::try_clone).transpose().map_err(refused)?;
        let inflight = self.inflight.as_ref().and_then(|region| region.queue(index, size));
        let rules = self.rules();
        let new = Ring::new(index, layout, rules, ring.base, &self.memory, call, inflight);
        let Some(mut new) = new else {
            log::warn!(
                "queue {index} waits: not all of it lies in guest memory, aligned: {layout:x?}"
            );
            return Ok(());
        };
        let started_at = new.next_avail();
        new.set_log(self.log_in_use());
        let worker = self.start_worker(index, new, kick).map_err(refused)?;
        if let Some(ring) = self.rings.get_mut(index) {
            ring.worker = Some(worker);
            ring.started_at = started_at;
        }
        Ok(())
    }

    /// Starts the thread of a ring.
    fn start_worker(&self, index: usize, ring: Ring, kick: Option<File>) -> io::Result<Worker> {
        let Device { target, offer, connections, watchdog, .. } = self.device.as_ref();
        let host =
            Host { target: Arc::clone(target), watchdog: watchdog.clone(), queues: self.queues() };
        let (target, nexus) = (Arc::clone(target), Arc::clone(&self.nexus));
        let (mailbox, inbox) = Mailbox::new()?;
        target.begin_service();
        // From here on it is reached, so that no sweep passes it by while its thread begins.
        self.queues.start(index, &mailbox);
        let both = (mailbox.clone(), inbox);
        let started = match index {
            CONTROL_QUEUE => {
                let (queues, connections) = (self.queues(), Arc::clone(connections));
                let service = ControlQueue::new(target, nexus, queues, connections, mailbox);
                Worker::start(index, host, ring, kick, None, both, service)
            }
            EVENT_QUEUE => {
                let service = EventQueue::new(self.features & feature::CHANGE != 0);
                Worker::start(index, host, ring, kick, None, both, service)
            }
            _ => {
                let Offer { engine, poll, .. } = *offer;
                let wake = Arc::clone(mailbox.wake());
                let service = RequestQueue::new(target, nexus, engine, wake);
                Worker::start(index, host, ring, kick, Some(poll), both, service)
            }
        };
        started.map_err(|(error, inbox)| {
            self.queues.stop(index, Vec::new(), &inbox);
            self.device.target.end_service();
            error
        })
    }

    /// Tells a ring something. If it runs it starts anew with it.
    ///
    /// # Errors
    /// If it has taken requests.
    fn tell(&mut self, index: usize, what: &str, tell: impl FnOnce(&mut RingState)) -> Result<()> {
        let (_, ring) = self.ring(index)?;
        let started_at = ring.worker.as_ref().map(|_| ring.started_at);
        self.stop(index);
        let (_, ring) = self.ring(index)?;
        if let (Some(start), Some(end)) = (started_at, ring.base)
            && start != end
        {
            let taken = end.wrapping_sub(start);
            return Err(wrong(format_args!(
                "queue {index} has taken {taken} requests: another {what} needs a stop first"
            )));
        }
        tell(ring);
        self.queues.told(index);
        self.start_if_ready(index)
    }

    /// What was negotiated about rings.
    fn rules(&self) -> Rules {
        let has = |feature| self.features & feature != 0;
        let any = has(feature::VERSION_1) || has(feature::ANY_LAYOUT);
        let framing = if any { Framing::Any } else { Framing::Legacy };
        Rules { event_idx: has(feature::EVENT_IDX), framing }
    }

    /// Where a ring lies in the guest; `None` while that is not known.
    fn layout(&self, index: usize, size: u16, addresses: [u64; 3]) -> Option<Layout> {
        let translate = |user| {
            let guest = self.regions.guest_address(user);
            if guest.is_none() && !self.regions.is_empty() {
                log::warn!("queue {index} waits: SET_VRING_ADDR {user:#x} is in no memory region");
            }
            guest
        };
        let [descriptors, available, used] = addresses;
        Some(Layout {
            size,
            descriptors: translate(descriptors)?,
            available: translate(available)?,
            used: translate(used)?,
        })
    }

    /// Takes over a changed set of regions. Rings that lose their memory wait for it.
    fn use_regions(&mut self) -> Result<()> {
        self.memory = self.regions.memory();
        for index in 0..self.rings.len() {
            match self.rings.get(index).and_then(|r| r.worker.as_ref()) {
                Some(worker) => worker.mailbox().set_memory(&self.memory),
                None => self.start_if_ready(index)?,
            }
        }
        Ok(())
    }

    /// The log, if the front end wants it to be written.
    fn log_in_use(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.features & feature::LOG_ALL != 0)
    }

    /// Has all queues that run note, or no longer note, what they write to.
    fn tell_log(&self) {
        let log = self.log_in_use();
        for worker in self.rings.iter().filter_map(|ring| ring.worker.as_ref()) {
            worker.mailbox().set_log(log.as_ref());
        }
    }

    /// Whether these protocol features are in use.
    pub(super) fn negotiated(&self, features: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & features.bits() == features.bits()
    }

    fn config(&self) -> Config {
        let queues = self.rings.len() - FIXED_QUEUES;
        let max_sectors = u32::try_from(lun::MAX_TRANSFER / 512).unwrap_or(u32::MAX);
        Config {
            num_queues: u32::try_from(queues).unwrap_or(u32::MAX).into(),
            // Header and response take one descriptor each.
            seg_max: u32::from(MAX_QUEUE_SIZE - 2).into(),
            max_sectors: max_sectors.into(),
            cmd_per_lun: u32::from(MAX_QUEUE_SIZE).into(),
            event_info_size: 16.into(),
            sense_size: 96.into(),
            cdb_size: 32.into(),
            max_channel: 0.into(),
            max_target: 255.into(),
            max_lun: u32::from(address::MAX_LUN).into(),
        }
    }
}

/// Hands an event to the event queue, if it runs.
pub(super) fn send_event(queues: &Queues, event: Event) {
    queues.send(EVENT_QUEUE, Message::Event(event));
}

/// A message whose feature we do not offer.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Connection {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    /// The driver has reset the device: commands in flight end first, then everything is as after
    /// power on. Memory and protocol features stay.
    fn reset_device(&mut self) -> Result<()> {
        self.stop_all(false);
        for (index, ring) in self.rings.iter_mut().enumerate() {
            *ring = RingState::default();
            self.queues.forget(index);
        }
        if let Some(inflight) = &self.inflight {
            inflight.clear();
        }
        self.features = 0;
        self.device.target.power_on(&self.nexus);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(wrong(format_args!(
                "{features:#x}: {:#x} were not offered",
                features & !FEATURES
            )));
        }
        self.features = features;
        self.tell_log();
        // Without protocol features there is no SET_VRING_ENABLE: rings are enabled from the start.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..self.rings.len() {
                self.ring(index)?.1.enabled = true;
                self.start_if_ready(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut new = Regions::default();
        for (region, file) in regions.iter().zip(files) {
            new.add(region, file).map_err(refused)?;
        }
        self.regions = new;
        self.use_regions()?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.regions.add(region, file).map_err(refused)?;
        self.use_regions()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.regions.remove(region.guest_phys_addr, region.memory_size).map_err(refused)?;
        self.use_regions()
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE);
        let Some(size) = size else {
            return Err(wrong(format_args!(
                "{num} for queue {index}: not a power of two up to {MAX_QUEUE_SIZE}"
            )));
        };
        if ring.size == Some(size) {
            return Ok(());
        }
        self.tell(index, "size", |ring| ring.size = Some(size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        let addresses = Some([descriptor, available, used]);
        if ring.addresses == addresses {
            // QEMU tells them again when it begins or ends to log.
            return Ok(());
        }
        self.tell(index, "address", |ring| ring.addresses = addresses)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let inflight = self.inflight.is_some();
        let (index, ring) = self.ring(index)?;
        let Ok(base) = u16::try_from(base) else {
            return Err(wrong(format_args!(
                "{base} for queue {index}: an index of a split ring has 16 bits"
            )));
        };
        // The in-flight region knows better.
        if ring.worker.is_some() && (ring.started_at == base || inflight) {
            return Ok(());
        }
        self.tell(index, "base", |ring| ring.base = Some(base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, _) = self.ring(index)?;
        let served = self.drain(at);
        self.queues.forget(at);
        let (_, ring) = self.ring(index)?;
        let base = ring.base.unwrap_or(0);
        *ring = RingState { enabled: ring.enabled, ..RingState::default() };
        if self.rings.iter().skip(FIXED_QUEUES).all(|ring| ring.worker.is_none()) {
            // The guest is stopped, or goes on elsewhere.
            self.device.target.end_nexus(&self.nexus);
        }
        if served {
            self.device.target.end_service();
        }
        Ok(VhostUserVringState::new(index, base.into()))
    }

    /// Without a descriptor (bit 8 of the payload) the ring is polled.
    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = event_fd::check(kick)?;
        let (at, _) = self.ring(index)?;
        self.stop(at);
        self.queues.told(at);
        let (_, ring) = self.ring(index)?;
        ring.kick = Some(kick.map_or(Kick::Poll, Kick::Event));
        self.start_if_ready(at)
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let call = event_fd::check(call)?;
        let (_, ring) = self.ring(index)?;
        if let Some(worker) = &ring.worker {
            let copy = call.as_ref().map(File::try_clone).transpose().map_err(refused)?;
            worker.mailbox().set_call(copy);
        }
        ring.call = call;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, error: Option<File>) -> Result<()> {
        event_fd::check(error)?;
        self.ring(index).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if self.device.offer.config_space {
            features |= VhostUserProtocolFeatures::CONFIG;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(wrong(format_args!(
                "{features:#x}: {:#x} were not offered",
                features & !offered
            )));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (at, ring) = self.ring(index)?;
        ring.enabled = enable;
        if enable {
            return self.start_if_ready(at);
        }
        self.stop(at);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if !self.negotiated(VhostUserProtocolFeatures::CONFIG) {
            return not_offered();
        }
        let config = self.config();
        let mut bytes = config.as_bytes().to_vec();
        // QEMU asks for as many bytes as it has room for.
        bytes.resize(bytes.len().max(256), 0);
        let range = (offset as usize)..(offset as usize).saturating_add(size as usize);
        bytes.get(range).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        // Only sense_size and cdb_size may be written, and ours are fixed.
        Err(Error::InvalidOperation("the configuration cannot be changed"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (usize::from(asked.num_queues), asked.queue_size);
        if queues > self.rings.len() || size > MAX_QUEUE_SIZE {
            return Err(wrong(format_args!(
                "{queues} queues of {size}: there are {} of up to {MAX_QUEUE_SIZE}",
                self.rings.len()
            )));
        }
        let file = inflight::Region::create(queues, size).map_err(refused)?;
        let len = inflight::Region::len(queues, size) as u64;
        Ok((VhostUserInflight::new(len, 0, asked.num_queues, size), file))
    }

    /// Rings that run go on with what they have.
    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (usize::from(given.num_queues), given.queue_size);
        let region = inflight::Region::map(file, given.mmap_offset, given.mmap_size, queues, size);
        let region = region.map_err(refused)?;
        self.device.connections.note_inflight(self.nexus.port(), &region, &self.device.target);
        self.inflight = Some(region);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size).map_err(refused)?;
        self.log = Some(Arc::new(log));
        self.tell_log();
        Ok(())
    }
}
