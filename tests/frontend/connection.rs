//! One connection to the daemon: negotiation in the orders real front ends use, guest memory,
//! starting and stopping queues.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{self, Event, Notification, Tmf};
use super::daemon::{Daemon, Diagnosis};
use super::lun::Lun;
use super::memory::{GuestMemory, RegionSpec};
use super::protocol::{
    Channel, feature, inflight, memory_table, protocol_feature, request, single_region,
    vring_address, vring_state,
};
use super::queue::{Completion, Exchange, Queue, Shape, Ticket};
use super::scsi::{Address, ScsiRequest, ScsiResponse};

pub const CONTROL_QUEUE: usize = 0;
pub const EVENT_QUEUE: usize = 1;
pub const FIRST_REQUEST_QUEUE: usize = 2;

/// The order of the messages that set a device up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// QEMU 7.2: call and error descriptors first, rings enabled last and without replies, the
    /// real call descriptors after that.
    Qemu7,
    /// QEMU 10: the same, but it waits for every SET_VRING_ENABLE.
    Qemu10,
    /// SPDK: features before protocol features, SET_VRING_ENABLE before anything else is known
    /// of a queue, then GET_QUEUE_NUM, negotiated or not.
    Spdk,
    /// Without VHOST_USER_F_PROTOCOL_FEATURES: rings are enabled as soon as they are started.
    Legacy,
}

/// The messages that start a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingMessage {
    Num,
    Addr,
    Base,
    Kick,
    Call,
    Enable,
}

impl RingMessage {
    pub const ALL: [Self; 6] =
        [Self::Num, Self::Addr, Self::Base, Self::Kick, Self::Call, Self::Enable];
}

/// How the daemon learns of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMessage {
    /// SET_MEM_TABLE with all regions.
    Table,
    /// ADD_MEM_REG for each region.
    Slots,
}

/// What a connection is to look like.
#[derive(Clone, Debug)]
pub struct FrontEndBuilder {
    request_queues: usize,
    queue_size: u16,
    layout: Vec<RegionSpec>,
    memory: MemoryMessage,
    order: Order,
    features: u64,
    protocol: u64,
    started: Option<Vec<usize>>,
    event_buffers: usize,
}

impl Default for FrontEndBuilder {
    fn default() -> Self {
        use {feature as f, protocol_feature as p};
        Self {
            request_queues: 1,
            queue_size: 128,
            layout: RegionSpec::single(),
            memory: MemoryMessage::Table,
            order: Order::Qemu10,
            features: f::VERSION_1
                | f::INDIRECT_DESC
                | f::EVENT_IDX
                | f::PROTOCOL_FEATURES
                | f::SCSI_HOTPLUG
                | f::SCSI_CHANGE,
            protocol: p::MQ | p::REPLY_ACK | p::RESET_DEVICE | p::CONFIGURE_MEM_SLOTS,
            started: None,
            event_buffers: 8,
        }
    }
}

impl FrontEndBuilder {
    /// Request queues beside control and event queue.
    pub fn queues(mut self, count: usize) -> Self {
        self.request_queues = count;
        self
    }

    pub fn queue_size(mut self, entries: u16) -> Self {
        self.queue_size = entries;
        self
    }

    pub fn memory(mut self, layout: Vec<RegionSpec>, message: MemoryMessage) -> Self {
        (self.layout, self.memory) = (layout, message);
        self
    }

    pub fn order(mut self, order: Order) -> Self {
        self.order = order;
        if order == Order::Legacy {
            return self.feature(feature::PROTOCOL_FEATURES, false).protocol(0);
        }
        self
    }

    pub fn event_idx(self, on: bool) -> Self {
        self.feature(feature::EVENT_IDX, on)
    }

    pub fn indirect(self, on: bool) -> Self {
        self.feature(feature::INDIRECT_DESC, on)
    }

    /// Adds or removes one virtio feature.
    pub fn feature(mut self, mask: u64, on: bool) -> Self {
        self.features = if on { self.features | mask } else { self.features & !mask };
        self
    }

    /// Keeps the requests in flight for the next daemon.
    pub fn inflight(mut self) -> Self {
        self.protocol |= protocol_feature::INFLIGHT_SHMFD;
        self
    }

    /// The protocol features to negotiate.
    pub fn protocol(mut self, features: u64) -> Self {
        self.protocol = features;
        self
    }

    /// Starts only these queues, as firmware does; the front end still enables all of them.
    pub fn start_only(mut self, queues: &[usize]) -> Self {
        self.started = Some(queues.to_vec());
        self
    }

    /// Event buffers to post at the start.
    pub fn event_buffers(mut self, count: usize) -> Self {
        self.event_buffers = count;
        self
    }

    #[track_caller]
    pub fn connect(self, daemon: &Daemon) -> FrontEnd {
        self.connect_to(daemon, 0)
    }

    /// The same to one of several sockets, from 0 on.
    #[track_caller]
    pub fn connect_to(self, daemon: &Daemon, port: usize) -> FrontEnd {
        self.attach(daemon.connect_to(port), daemon.diagnosis())
    }

    /// Sets up the device at the other end of a connected socket.
    #[track_caller]
    pub fn attach(self, socket: UnixStream, diagnosis: Diagnosis) -> FrontEnd {
        let mut fe = self.build(socket, diagnosis);
        fe.negotiate();
        fe.start();
        fe
    }

    /// The front end before its first message.
    pub fn build(self, socket: UnixStream, diagnosis: Diagnosis) -> FrontEnd {
        let mem = Arc::new(GuestMemory::new(&self.layout));
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let queue = |index| {
            let mem = mem.clone();
            Mutex::new(Queue::new(index, mem, self.queue_size, event_idx, diagnosis.clone()))
        };
        let queues = (0..self.queue_count()).map(queue).collect();
        FrontEnd {
            channel: Mutex::new(Channel::new(socket, diagnosis.clone())),
            mem,
            queues,
            offered: 0,
            offered_protocol: 0,
            masked: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
            inflight: None,
            reconnected: false,
            next_tag: AtomicU64::new(1),
            diagnosis,
            config: self,
        }
    }

    fn queue_count(&self) -> usize {
        FIRST_REQUEST_QUEUE + self.request_queues
    }

    fn is_started(&self, queue: usize) -> bool {
        self.started.as_ref().is_none_or(|started| started.contains(&queue))
    }
}

/// A connection that is set up. All methods take `&self`: threads may share it, and use different
/// queues at the same time.
pub struct FrontEnd {
    channel: Mutex<Channel>,
    mem: Arc<GuestMemory>,
    queues: Vec<Mutex<Queue>>,
    offered: u64,
    offered_protocol: u64,
    /// Stands for QEMU's masked notifier, which is set before the guest's.
    masked: EventFd,
    next_tag: AtomicU64,
    /// What the first daemon gave us to keep, and how it describes it.
    inflight: Option<(Vec<u8>, File)>,
    /// To another daemon than the first.
    reconnected: bool,
    diagnosis: Diagnosis,
    config: FrontEndBuilder,
}

impl FrontEnd {
    pub fn builder() -> FrontEndBuilder {
        FrontEndBuilder::default()
    }

    /// One request queue of 128 entries, one memory region, everything negotiated.
    #[track_caller]
    pub fn connect(daemon: &Daemon) -> Self {
        Self::builder().connect(daemon)
    }

    // ----- setting up -----------------------------------------------------------------------

    /// Features and everything else that comes before the driver is ready.
    #[track_caller]
    pub fn negotiate(&mut self) {
        match self.config.order {
            Order::Qemu7 | Order::Qemu10 => self.negotiate_like_qemu(),
            Order::Spdk => self.negotiate_like_spdk(),
            Order::Legacy => {
                self.read_features();
                self.set(request::SET_OWNER, &[], &[], false);
                self.set_features();
            }
        }
    }

    /// Goes on with another daemon where the last one has left off, as QEMU does: memory, rings and what is in
    /// flight stay as they are.
    #[track_caller]
    pub fn reconnect(&mut self, daemon: &Daemon) {
        self.reconnect_to(daemon, 0);
    }

    /// The same on one of several sockets, from 0 on.
    #[track_caller]
    pub fn reconnect_to(&mut self, daemon: &Daemon, port: usize) {
        self.connect_again(daemon, port);
        self.start_like_qemu();
        self.barrier();
    }

    /// Goes on with another daemon, as the destination of a migration does whose source has stopped: nothing is in flight.
    #[track_caller]
    pub fn migrate_to(&mut self, daemon: &Daemon, port: usize) {
        self.inflight = None;
        self.connect_again(daemon, port);
        self.reconnected = false;
        self.start_like_qemu();
        self.barrier();
    }

    #[track_caller]
    fn connect_again(&mut self, daemon: &Daemon, port: usize) {
        self.diagnosis = daemon.diagnosis();
        self.channel = Mutex::new(Channel::new(daemon.connect_to(port), self.diagnosis.clone()));
        for queue in &self.queues {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.set_diagnosis(self.diagnosis.clone());
        }
        self.negotiate();
        self.reconnected = true;
    }

    /// What was kept of the requests in flight, to look at or to spoil.
    pub fn inflight_file(&self) -> &File {
        &self.inflight.as_ref().expect("INFLIGHT_SHMFD was not negotiated").1
    }

    /// Memory and queues.
    #[track_caller]
    pub fn start(&self) {
        match self.config.order {
            Order::Qemu7 | Order::Qemu10 => self.start_like_qemu(),
            Order::Spdk => self.start_like_spdk(),
            Order::Legacy => {
                self.announce_memory();
                self.started().for_each(|index| self.start_queue(index, 0));
            }
        }
        // A barrier: everything before it has been done when it is answered.
        self.barrier();
        if self.config.is_started(EVENT_QUEUE) {
            let room = usize::from(self.config.queue_size);
            self.post_event_buffers(self.config.event_buffers.min(room));
        }
    }

    #[track_caller]
    fn negotiate_like_qemu(&mut self) {
        self.read_features();
        self.negotiate_protocol_features();
        if self.has_protocol(protocol_feature::MQ) {
            let queues = self.channel().get_u64(request::GET_QUEUE_NUM);
            assert!(queues >= self.queues.len() as u64, "the daemon has only {queues} queues");
        }
        if self.has_protocol(protocol_feature::CONFIGURE_MEM_SLOTS) {
            let slots = self.channel().get_u64(request::GET_MAX_MEM_SLOTS);
            assert!(slots >= 8, "only {slots} memory slots");
        }
        self.set(request::SET_OWNER, &[], &[], false);
        self.read_features();
        for index in 0..self.queues.len() {
            self.set_vring_fd(request::SET_VRING_CALL, index, &self.masked);
            let queue = self.queue(index);
            self.set_vring_fd(request::SET_VRING_ERR, index, queue.err_fd());
        }
        if self.has_protocol(protocol_feature::INFLIGHT_SHMFD) && self.inflight.is_none() {
            let (queues, size) = (self.queues.len() as u16, self.config.queue_size);
            let asked = inflight(0, 0, queues, size);
            let kept = self.channel().ask_for_file(request::GET_INFLIGHT_FD, &asked);
            self.inflight = Some(kept);
        }
    }

    #[track_caller]
    fn start_like_qemu(&self) {
        self.set_up();
        for index in 0..self.queues.len() {
            self.enable_queue(index, true);
        }
        self.set_calls();
    }

    #[track_caller]
    fn set_calls(&self) {
        for index in 0..self.queues.len() {
            let queue = self.queue(index);
            self.set_vring_fd(request::SET_VRING_CALL, index, queue.call_fd());
        }
    }

    /// Everything that comes before SET_VRING_ENABLE when QEMU starts a device.
    #[track_caller]
    pub fn set_up(&self) {
        if let Some((kept, file)) = &self.inflight {
            self.set(request::SET_INFLIGHT_FD, kept, &[file.as_raw_fd()], true);
        }
        self.set_features();
        self.announce_memory();
        for index in self.started() {
            // After a daemon's death this is all that QEMU knows; and it looks when it sees the connection break, which
            // may be before the last answers came.
            let used = self.queue(index).ring().used_idx();
            let missed = if self.reconnected && used > 0 { 3 } else { 0 };
            self.start_queue_without_call(index, used.wrapping_sub(missed));
        }
    }

    /// Ends the connection without another word; memory and rings stay, for [`FrontEnd::reconnect`].
    pub fn hang_up(&self) {
        let _ = self.channel().socket().shutdown(std::net::Shutdown::Both);
    }

    /// The first half of [`FrontEnd::reconnect`]: all but SET_VRING_ENABLE.
    #[track_caller]
    pub fn reconnect_without_enabling(&mut self, daemon: &Daemon) {
        self.connect_again(daemon, 0);
        self.set_up();
        self.set_calls();
    }

    #[track_caller]
    fn negotiate_like_spdk(&mut self) {
        self.set(request::SET_OWNER, &[], &[], false);
        self.read_features();
        self.set_features();
        self.negotiate_protocol_features();
    }

    #[track_caller]
    fn start_like_spdk(&self) {
        for index in 0..self.queues.len() {
            self.enable_queue(index, true);
        }
        let queues = self.channel().get_u64(request::GET_QUEUE_NUM);
        assert!(queues >= self.queues.len() as u64, "the daemon has only {queues} queues");
        for index in 0..self.queues.len() {
            let queue = self.queue(index);
            self.set_vring_fd(request::SET_VRING_CALL, index, queue.call_fd());
        }
        self.announce_memory();
        self.barrier();
        for index in self.started() {
            self.start_queue_without_call(index, 0);
        }
    }

    #[track_caller]
    fn read_features(&mut self) {
        let offered = self.channel().get_u64(request::GET_FEATURES);
        self.offered = offered;
        let missing = self.config.features & !offered;
        assert_eq!(missing, 0, "features {missing:#x} are not among {offered:#x}");
    }

    #[track_caller]
    fn negotiate_protocol_features(&mut self) {
        let offered = self.channel().get_u64(request::GET_PROTOCOL_FEATURES);
        self.offered_protocol = offered;
        let missing = self.config.protocol & !offered;
        assert_eq!(missing, 0, "protocol features {missing:#x} are not among {offered:#x}");
        let payload = self.config.protocol.to_ne_bytes();
        self.set(request::SET_PROTOCOL_FEATURES, &payload, &[], false);
    }

    #[track_caller]
    fn set_features(&self) {
        self.set(request::SET_FEATURES, &self.config.features.to_ne_bytes(), &[], false);
    }

    /// Tells the daemon of all regions in one of the two ways.
    #[track_caller]
    pub fn announce_memory(&self) {
        let regions = self.mem.regions();
        match self.config.memory {
            MemoryMessage::Table => {
                let fds: Vec<RawFd> = regions.iter().map(|region| region.fd).collect();
                self.set(request::SET_MEM_TABLE, &memory_table(&regions), &fds, true);
            }
            MemoryMessage::Slots => {
                for region in regions {
                    self.set(request::ADD_MEM_REG, &single_region(&region), &[region.fd], true);
                }
            }
        }
    }

    // ----- the connection -------------------------------------------------------------------

    /// The virtio features that are in use.
    pub fn features(&self) -> u64 {
        self.config.features
    }

    /// The virtio features that were offered.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// The protocol features that were offered.
    pub fn offered_protocol_features(&self) -> u64 {
        self.offered_protocol
    }

    pub fn channel(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    pub fn diagnosis(&self) -> &Diagnosis {
        &self.diagnosis
    }

    /// Exclusive use of a queue.
    pub fn queue(&self, index: usize) -> MutexGuard<'_, Queue> {
        self.queues[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn request_queues(&self) -> usize {
        self.config.request_queues
    }

    /// Waits until the daemon has handled all messages so far.
    #[track_caller]
    pub fn barrier(&self) {
        self.channel().get_u64(request::GET_FEATURES);
    }

    fn has_protocol(&self, feature: u64) -> bool {
        self.config.protocol & feature != 0
    }

    fn started(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.queues.len()).filter(|&index| self.config.is_started(index))
    }

    /// A request without data in its reply; waits for the acknowledgement if that is wanted and
    /// was negotiated.
    #[track_caller]
    pub fn set(&self, number: u32, payload: &[u8], fds: &[RawFd], acknowledged: bool) {
        let channel = self.channel();
        if acknowledged && self.has_protocol(protocol_feature::REPLY_ACK) {
            let result = channel.tell_and_wait(number, payload, fds);
            assert_eq!(result, 0, "request {number} failed\n{}", self.diagnosis.report());
        } else {
            channel.tell(number, payload, fds);
        }
    }

    // ----- memory slots ---------------------------------------------------------------------

    /// Plugs memory in while the device runs.
    #[track_caller]
    pub fn add_region(&self, spec: &RegionSpec) {
        self.mem.insert(spec);
        let region = self.mem.region(spec.base);
        self.set(request::ADD_MEM_REG, &single_region(&region), &[region.fd], true);
    }

    /// Unplugs memory. Nothing in it may be in use.
    #[track_caller]
    pub fn remove_region(&self, base: u64) {
        let region = self.mem.region(base);
        self.set(request::REM_MEM_REG, &single_region(&region), &[], true);
        self.mem.remove(base);
    }

    // ----- queues ---------------------------------------------------------------------------

    /// Size, base, addresses, kick: the queue runs once it is enabled as well.
    #[track_caller]
    pub fn start_queue_without_call(&self, index: usize, base: u16) {
        let queue = self.queue(index);
        let at = queue.ring().addresses();
        let [desc, used, avail] =
            [at.desc, at.used, at.avail].map(|address| self.mem.user_address(address));
        let size = u32::from(queue.ring().size());
        self.set(request::SET_VRING_NUM, &vring_state(index, size), &[], false);
        self.set(request::SET_VRING_BASE, &vring_state(index, base.into()), &[], false);
        self.set(request::SET_VRING_ADDR, &vring_address(index, desc, used, avail), &[], false);
        self.set_vring_fd(request::SET_VRING_KICK, index, queue.kick_fd());
    }

    /// The same after the call descriptor.
    #[track_caller]
    pub fn start_queue(&self, index: usize, base: u16) {
        self.set_vring_fd(request::SET_VRING_CALL, index, self.queue(index).call_fd());
        self.start_queue_without_call(index, base);
    }

    /// One of the messages that start a queue, whose next request is the one of this index.
    #[track_caller]
    pub fn tell(&self, index: usize, message: RingMessage, base: u16) {
        let queue = self.queue(index);
        let at = queue.ring().addresses();
        let user = |address| self.mem.user_address(address);
        let state = |number| vring_state(index, number);
        let size = queue.ring().size().into();
        match message {
            RingMessage::Num => self.set(request::SET_VRING_NUM, &state(size), &[], false),
            RingMessage::Base => self.set(request::SET_VRING_BASE, &state(base.into()), &[], false),
            RingMessage::Addr => {
                let payload = vring_address(index, user(at.desc), user(at.used), user(at.avail));
                self.set(request::SET_VRING_ADDR, &payload, &[], false);
            }
            RingMessage::Kick => self.set_vring_fd(request::SET_VRING_KICK, index, queue.kick_fd()),
            RingMessage::Call => self.set_vring_fd(request::SET_VRING_CALL, index, queue.call_fd()),
            RingMessage::Enable => {
                self.set(request::SET_VRING_ENABLE, &state(1), &[], false);
            }
        }
    }

    /// Takes a region away, as far as the daemon knows, until [`FrontEnd::give_back`].
    #[track_caller]
    pub fn take_away(&self, base: u64) {
        self.set(request::REM_MEM_REG, &single_region(&self.mem.region(base)), &[], true);
    }

    #[track_caller]
    pub fn give_back(&self, base: u64) {
        let region = self.mem.region(base);
        self.set(request::ADD_MEM_REG, &single_region(&region), &[region.fd], true);
    }

    /// SET_VRING_ENABLE.
    #[track_caller]
    pub fn enable_queue(&self, index: usize, on: bool) {
        let payload = vring_state(index, u32::from(on));
        self.set(request::SET_VRING_ENABLE, &payload, &[], self.config.order == Order::Qemu10);
    }

    /// SET_VRING_CALL with what is there already, which waits for the queue's thread.
    #[track_caller]
    pub fn renew_call(&self, index: usize) {
        let queue = self.queue(index);
        let payload = (index as u64).to_ne_bytes();
        self.set(request::SET_VRING_CALL, &payload, &[queue.call_fd().as_raw_fd()], true);
    }

    /// Where a queue with nothing in flight goes on.
    pub fn base(&self, index: usize) -> u16 {
        self.queue(index).ring().used_idx()
    }

    /// GET_VRING_BASE: stops the queue; returns the index of the next available entry.
    #[track_caller]
    pub fn stop_queue(&self, index: usize) -> u16 {
        let reply = self.channel().ask(request::GET_VRING_BASE, &vring_state(index, 0));
        let (replied, base) = reply.as_state();
        assert_eq!(replied as usize, index, "the base of another queue");
        u16::try_from(base).expect("a base of 16 bits")
    }

    /// Disables all queues, then stops the started ones, as QEMU does.
    #[track_caller]
    pub fn stop(&self) -> Vec<(usize, u16)> {
        if self.config.order != Order::Legacy {
            (0..self.queues.len()).for_each(|index| self.enable_queue(index, false));
        }
        self.started().map(|index| (index, self.stop_queue(index))).collect()
    }

    /// RESET_DEVICE after a stop, and empty queues on this side. [`FrontEnd::start`] follows.
    #[track_caller]
    pub fn reset_device(&self) {
        self.stop();
        self.set(request::RESET_DEVICE, &[], &[], true);
        self.reset_queues();
    }

    /// Empty rings on this side, as a driver that starts over makes them.
    pub fn reset_queues(&self) {
        (0..self.queues.len()).for_each(|index| self.queue(index).reset());
    }

    /// Which queues the next [`FrontEnd::start`] starts: those, or all.
    pub fn start_only(&mut self, queues: Option<&[usize]>) {
        self.config.started = queues.map(<[usize]>::to_vec);
    }

    #[track_caller]
    fn set_vring_fd(&self, number: u32, index: usize, fd: &EventFd) {
        self.set(number, &(index as u64).to_ne_bytes(), &[fd.as_raw_fd()], false);
    }

    // ----- commands -------------------------------------------------------------------------

    /// A tag that no other command of this connection has.
    pub fn new_tag(&self) -> u64 {
        self.next_tag.fetch_add(1, Ordering::Relaxed)
    }

    /// Submits to a queue by its virtqueue number (2 is the first request queue).
    #[track_caller]
    pub fn submit(&self, queue: usize, request: &ScsiRequest) -> Ticket {
        self.queue(queue).submit(&request.exchange())
    }

    #[track_caller]
    pub fn wait(&self, ticket: Ticket) -> ScsiResponse {
        ScsiResponse::parse(&self.queue(ticket.queue).wait(ticket))
    }

    /// Submits and waits, on the first request queue.
    #[track_caller]
    pub fn run(&self, request: &ScsiRequest) -> ScsiResponse {
        self.run_on(FIRST_REQUEST_QUEUE, request)
    }

    #[track_caller]
    pub fn run_on(&self, queue: usize, request: &ScsiRequest) -> ScsiResponse {
        let ticket = self.submit(queue, request);
        self.wait(ticket)
    }

    /// Submits all before it waits for any; answers come in the order of the requests.
    #[track_caller]
    pub fn run_all(&self, queue: usize, requests: &[ScsiRequest]) -> Vec<ScsiResponse> {
        let mut queue = self.queue(queue);
        let tickets: Vec<_> = requests.iter().map(|r| queue.enqueue(&r.exchange())).collect();
        queue.publish();
        tickets.into_iter().map(|ticket| ScsiResponse::parse(&queue.wait(ticket))).collect()
    }

    /// A logical unit as it is, with its unit attentions. On rings that are too small for header
    /// and data in different descriptors, they share one.
    pub fn lun(&self, target: u8, lun: u16) -> Lun<'_> {
        let unit = Lun::new(self, Address::new(target, lun));
        if self.config.queue_size < 4 { unit.with_shape(Shape::joined()) } else { unit }
    }

    /// A logical unit whose unit attentions were taken and whose block size is known.
    #[track_caller]
    pub fn ready_lun(&self, target: u8, lun: u16) -> Lun<'_> {
        let mut lun = self.lun(target, lun);
        lun.make_ready();
        lun
    }

    // ----- control and event queue ----------------------------------------------------------

    #[track_caller]
    pub fn control(&self, exchange: &Exchange) -> Completion {
        let mut queue = self.queue(CONTROL_QUEUE);
        let ticket = queue.submit(exchange);
        queue.wait(ticket)
    }

    /// A task management function; returns its response code.
    #[track_caller]
    pub fn tmf(&self, function: Tmf, address: Address, tag: u64) -> u8 {
        control::tmf_response(&self.control(&function.exchange(address, tag)))
    }

    /// An asynchronous notification request; returns the events and the response code.
    #[track_caller]
    pub fn notification(&self, kind: Notification, address: Address, events: u32) -> (u32, u8) {
        control::notification_response(&self.control(&kind.exchange(address, events)))
    }

    pub fn post_event_buffers(&self, count: usize) {
        let mut queue = self.queue(EVENT_QUEUE);
        for _ in 0..count {
            queue.enqueue(&Event::buffer());
        }
        queue.publish();
    }

    /// The next event within `limit`; its buffer is given back to the device.
    pub fn next_event(&self, limit: Duration) -> Option<Event> {
        let mut queue = self.queue(EVENT_QUEUE);
        let event = Event::parse(&queue.wait_for(limit)?);
        queue.submit(&Event::buffer());
        Some(event)
    }
}
