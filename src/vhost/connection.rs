//! One front end's connection: negotiation, memory, and the state of each ring.
//!
//! This is written over the `vhost` crate's message parser, without the `vhost-user-backend` crate,
//! because that crate owns the queue threads: each request would take two locks there, a device reset
//! would not wait for requests in flight, and the in-flight region could not be offered.
//!
//! A ring runs when it has everything it needs and stops when something is taken away; the order in
//! which a front end sends the messages does not matter.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

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
use super::inflight;
use super::memory::{GuestMemory, MAX_SLOTS, Regions};
use super::message::{Event, Message, Peers};
use super::requests::RequestQueue;
use super::ring::{MAX_QUEUE_SIZE, Ring};
use super::split_ring::Layout;
use super::tmf::ControlQueue;
use super::wire::Config;
use super::worker::Worker;
use super::{Device, FIXED_QUEUES, Offer, event_fd, refused};
use crate::scsi::{Nexus, Port, address, lun};

const CONTROL_QUEUE: usize = 0;
const EVENT_QUEUE: usize = 1;

/// Feature bits of VIRTIO 1.3 section 6 and 5.6.3.
mod feature {
    pub(super) const HOTPLUG: u64 = 1 << 1;
    pub(super) const CHANGE: u64 = 1 << 2;
    /// VHOST_F_LOG_ALL.
    pub(super) const LOG_ALL: u64 = 1 << 26;
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
}

/// What we offer a driver, and a front end.
const FEATURES: u64 = feature::HOTPLUG
    | feature::CHANGE
    | feature::LOG_ALL
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What a front end has told about a ring, and its thread while it runs.
#[derive(Default)]
struct RingState {
    size: u16,
    /// Descriptor table, available ring, used ring: front end addresses.
    addresses: Option<[u64; 3]>,
    next_avail: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    worker: Option<Worker>,
}

/// One front end's connection.
pub(super) struct Connection {
    device: Arc<Device>,
    nexus: Arc<Nexus>,
    features: u64,
    protocol_features: u64,
    regions: Regions,
    memory: Option<Arc<GuestMemory>>,
    /// Where requests in flight are noted.
    inflight: Option<inflight::Region>,
    /// Where written memory is noted, while LOG_ALL is there.
    log: Option<Arc<DirtyLog>>,
    rings: Vec<RingState>,
    peers: Peers,
}

impl Connection {
    /// A connection on which nothing was said yet.
    pub(super) fn new(device: Arc<Device>, port: Port) -> Self {
        let queues = FIXED_QUEUES + device.offer.request_queues;
        Connection {
            nexus: device.target.connect(port),
            device,
            features: 0,
            protocol_features: 0,
            regions: Regions::default(),
            memory: None,
            inflight: None,
            log: None,
            rings: (0..queues).map(|_| RingState::default()).collect(),
            peers: Peers::default(),
        }
    }

    /// The mailboxes of the queues that run.
    pub(super) fn peers(&self) -> Peers {
        Arc::clone(&self.peers)
    }

    /// Stops every ring and waits until nothing is in flight. The driver is gone or starts anew, so that
    /// copies and the like need not be finished; or, if they are to be left, the front end comes back and has them
    /// done by whoever serves it then.
    pub(super) fn stop_all(&mut self, leave: bool) {
        for ring in &self.rings {
            if let Some(worker) = &ring.worker {
                worker.give_up(leave);
            }
        }
        for index in 0..self.rings.len() {
            self.stop(index);
        }
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> Result<(usize, &mut RingState)> {
        let index = index.try_into().map_err(|_| Error::InvalidParam)?;
        let ring = self.rings.get_mut(index).ok_or(Error::InvalidParam)?;
        Ok((index, ring))
    }

    /// Stops a ring; nothing of it is in flight afterwards.
    fn stop(&mut self, index: usize) {
        let Some(ring) = self.rings.get_mut(index) else { return };
        if let Some(worker) = ring.worker.take() {
            ring.next_avail = worker.join();
            lock(&self.peers).remove(&index);
        }
    }

    /// Starts a ring that has everything it needs.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        let Some(ring) = self.rings.get(index) else { return Ok(()) };
        let (Some(memory), Some(addresses), Some(kick), None, true) =
            (&self.memory, ring.addresses, &ring.kick, &ring.worker, ring.enabled)
        else {
            return Ok(());
        };
        let layout = self.layout(ring, addresses)?;
        let kick = kick.try_clone().map_err(refused)?;
        let call = ring.call.as_ref().map(File::try_clone).transpose().map_err(refused)?;
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let inflight = self.inflight.as_ref().and_then(|region| region.queue(index, ring.size));
        let new = Ring::new(index, layout, event_idx, ring.next_avail, memory, call, inflight);
        let mut new = new.ok_or(Error::InvalidParam)?;
        new.set_log(self.log_in_use());
        let (target, nexus) = (Arc::clone(&self.device.target), Arc::clone(&self.nexus));
        let name = format!("queue {index}");
        let worker = match index {
            CONTROL_QUEUE => {
                let peers = Arc::clone(&self.peers);
                let connections = Arc::clone(&self.device.connections);
                let make = |_| ControlQueue::new(target, nexus, peers, connections, index);
                Worker::start(name, new, kick, None, make)
            }
            EVENT_QUEUE => {
                let changes = self.features & feature::CHANGE != 0;
                Worker::start(name, new, kick, None, |_| EventQueue::new(changes))
            }
            _ => {
                let Offer { engine, poll, .. } = self.device.offer;
                Worker::start(name, new, kick, Some(poll), |wake| {
                    RequestQueue::new(target, nexus, engine, wake)
                })
            }
        }
        .map_err(refused)?;
        lock(&self.peers).insert(index, worker.mailbox().clone());
        if let Some(ring) = self.rings.get_mut(index) {
            ring.worker = Some(worker);
        }
        Ok(())
    }

    /// Where a ring lies in the guest.
    fn layout(&self, ring: &RingState, [descriptors, available, used]: [u64; 3]) -> Result<Layout> {
        let translate = |user| self.regions.guest_address(user).ok_or(Error::InvalidParam);
        Ok(Layout {
            size: ring.size,
            descriptors: translate(descriptors)?,
            available: translate(available)?,
            used: translate(used)?,
        })
    }

    /// Takes over a changed set of regions.
    fn use_regions(&mut self) -> Result<()> {
        self.memory = self.regions.memory();
        let Some(memory) = self.memory.clone() else {
            // All memory is gone: no ring can go on.
            self.stop_all(false);
            return Ok(());
        };
        for index in 0..self.rings.len() {
            match self.rings.get(index).and_then(|r| r.worker.as_ref()) {
                Some(worker) => worker.mailbox().set_memory(&memory),
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

    fn negotiated(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
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

impl Drop for Connection {
    fn drop(&mut self) {
        self.stop_all(true);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands an event to the event queue, if it runs.
pub(super) fn send_event(peers: &Peers, event: Event) {
    if let Some(mailbox) = lock(peers).get(&EVENT_QUEUE) {
        mailbox.send(Message::Event(event));
    }
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
        for ring in &mut self.rings {
            *ring = RingState::default();
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
            log::warn!(
                "front end wants features that are not offered: {:#x}",
                features & !FEATURES
            );
            return Err(Error::InvalidParam);
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
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE);
        self.ring(index)?.1.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
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
        ring.addresses = Some([descriptor, available, used]);
        self.start_if_ready(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (_, ring) = self.ring(index)?;
        if ring.worker.is_some() {
            return Err(Error::InvalidOperation("SET_VRING_BASE on a running ring"));
        }
        ring.next_avail = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, _) = self.ring(index)?;
        self.stop(at);
        let (_, ring) = self.ring(index)?;
        ring.kick = None;
        ring.call = None;
        Ok(VhostUserVringState::new(index, ring.next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = event_fd::check(kick)?;
        let (at, _) = self.ring(index)?;
        self.stop(at);
        let (_, ring) = self.ring(index)?;
        // Without a descriptor the front end would have us poll the ring; no known one does.
        ring.kick = Some(kick.ok_or(Error::InvalidOperation("a ring needs a kick event"))?);
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
            return Err(Error::InvalidParam);
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
            return Err(Error::InvalidParam);
        }
        let file = inflight::Region::create(queues, size).map_err(refused)?;
        let len = inflight::Region::len(queues, size) as u64;
        Ok((VhostUserInflight::new(len, 0, asked.num_queues, size), file))
    }

    /// Rings that run go on with what they have.
    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (usize::from(given.num_queues), given.queue_size);
        let region = inflight::Region::map(file, given.mmap_offset, given.mmap_size, queues, size);
        self.inflight = Some(region.map_err(refused)?);
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
