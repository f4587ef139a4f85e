//! A load on one queue: transfers at a given depth for a while, with so little work for each that what is
//! measured is the device.
//!
//! It takes over a queue on which nothing is in flight. Chains are indirect, as Linux makes them, and laid out
//! once; what changes from transfer to transfer is the address in the CDB.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::FrontEnd;
use super::lun::Lun;
use super::pattern::Rng;
use super::queue::AsFdCompat;
use super::ring::{Desc, indirect_table, need_event};
use super::scsi::{REQUEST_HEADER, RESPONSE_HEADER, ScsiRequest};
use super::{Cdb, PATIENCE};

/// Where transfers go, and in which direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    RandRead,
    RandWrite,
    SeqRead,
    SeqWrite,
    /// Random, seven reads to three writes.
    Mixed,
}

impl Pattern {
    /// As fio calls it.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::RandRead => "randread",
            Pattern::RandWrite => "randwrite",
            Pattern::SeqRead => "read",
            Pattern::SeqWrite => "write",
            Pattern::Mixed => "randrw",
        }
    }

    /// Whether it changes the disk.
    pub fn writes(self) -> bool {
        matches!(self, Pattern::RandWrite | Pattern::SeqWrite | Pattern::Mixed)
    }

    fn is_sequential(self) -> bool {
        matches!(self, Pattern::SeqRead | Pattern::SeqWrite)
    }
}

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// It looks all the time, and wants no interrupts.
    Polls,
    /// It sleeps until there is an interrupt.
    Sleeps,
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub pattern: Pattern,
    /// Bytes of a transfer.
    pub block: usize,
    /// Transfers in flight.
    pub depth: usize,
    /// First byte of the part of the disk that is used; a multiple of the block.
    pub start: u64,
    /// Its length.
    pub span: u64,
    pub driver: Driver,
    /// Whether every sector that is written says where and when it was, and reads are held against that.
    pub verify: bool,
    /// FUA in every write.
    pub fua: bool,
    pub seed: u64,
}

impl Load {
    pub fn new(pattern: Pattern, block: usize, depth: usize, span: u64) -> Self {
        let driver = match std::env::var("SLEEPS") {
            Ok(_) => Driver::Sleeps,
            Err(_) => Driver::Polls,
        };
        Load { pattern, block, depth, start: 0, span, driver, verify: false, fua: false, seed: 1 }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub transfers: u64,
    pub elapsed: Duration,
    pub kicks: u64,
    pub interrupts: u64,
    pub latencies: Histogram,
    /// Sectors that were read and held against what was written.
    pub verified: u64,
}

impl Figures {
    /// Transfers in a second.
    pub fn rate(&self) -> f64 {
        self.transfers as f64 / self.elapsed.as_secs_f64()
    }
}

/// Latencies in buckets, each a sixteenth wider than the one before.
#[derive(Clone, Debug)]
pub struct Histogram(Vec<u64>);

impl Default for Histogram {
    fn default() -> Self {
        Histogram(vec![0; 16 * 64])
    }
}

impl Histogram {
    fn add(&mut self, latency: Duration) {
        let ns = (latency.as_nanos() as u64).max(16);
        let power = ns.ilog2();
        self.0[(power * 16) as usize + ((ns >> (power - 4)) & 15) as usize] += 1;
    }

    /// The latency that so many per cent stay below, in microseconds.
    pub fn percentile(&self, percent: f64) -> f64 {
        let wanted = (self.0.iter().sum::<u64>() as f64 * percent / 100.0).ceil() as u64;
        let mut seen = 0;
        let found = self.0.iter().position(|count| {
            seen += count;
            seen >= wanted.max(1)
        });
        let (power, part) = (found.unwrap_or(0) / 16, found.unwrap_or(0) % 16);
        2f64.powi(power as i32) * (1.0 + part as f64 / 16.0) / 1000.0
    }
}

const SECTOR: usize = 512;
/// CDB in a request header, and the parts of a WRITE(10) or READ(10).
const CDB_AT: usize = 19;
const STATUS_AT: usize = 10;

/// Runs a load on a disk's queue, on which nothing may be in flight.
#[track_caller]
pub fn run(lun: &Lun<'_>, load: &Load, time: Duration) -> Figures {
    let mut driver = RawDriver::new(lun, load);
    driver.run(time);
    driver.leave();
    driver.figures
}

/// One transfer's place in guest memory.
struct Slot {
    header: *mut u8,
    response: *mut u8,
    data: *mut u8,
    read_table: u64,
    write_table: u64,
    place: u64,
    writes: bool,
    since: Instant,
}

struct RawDriver<'a> {
    fe: &'a FrontEnd,
    queue: usize,
    load: Load,
    slots: Vec<Slot>,
    free: VecDeque<u16>,
    descriptors: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    next_avail: u16,
    next_used: u16,
    rng: Rng,
    next_place: u64,
    /// By place, how often it was written; a place in flight is not used again.
    generations: Vec<u32>,
    busy: Vec<bool>,
    block_size: u64,
    figures: Figures,
    /// What was allocated.
    memory: Vec<u64>,
}

impl<'a> RawDriver<'a> {
    fn new(lun: &Lun<'a>, load: &Load) -> Self {
        let (fe, queue) = (lun.front_end(), lun.queue);
        let (at, size, next_avail, next_used) = {
            let queue = fe.queue(queue);
            assert_eq!(queue.in_flight(), 0, "the queue is not idle");
            let ring = queue.ring();
            (ring.addresses(), ring.size(), ring.published(), ring.consumed())
        };
        assert!(load.depth <= usize::from(size));
        let memory = fe.memory();
        let host = |address: u64| memory.user_address(address) as *mut u8;
        let mut allocated = Vec::new();
        let slots = (0..load.depth).map(|n| {
            let [header, response, read_table, write_table] =
                [REQUEST_HEADER, RESPONSE_HEADER, 64, 64].map(|len| memory.alloc(len, 16, 0));
            let data = memory.alloc(load.block, 4096, 0);
            allocated.extend([header, response, read_table, write_table, data]);
            let desc = |address, len: usize, writable| Desc { address, len: len as u32, writable };
            let head = desc(header, REQUEST_HEADER, false);
            let tail = desc(response, RESPONSE_HEADER, true);
            let block = |writable| desc(data, load.block, writable);
            memory.write(read_table, &indirect_table(&[head, tail, block(true)]));
            memory.write(write_table, &indirect_table(&[head, block(false), tail]));
            let request = ScsiRequest::new(lun.address, Cdb::new(0)).tag(n as u64 + 1);
            memory.write(header, &request.header());
            memory.write(data, &vec![n as u8; load.block]);
            let (header, response, data) = (host(header), host(response), host(data));
            let since = Instant::now();
            Slot { header, response, data, read_table, write_table, place: 0, writes: false, since }
        });
        let slots: Vec<Slot> = slots.collect();
        let places = (load.span / load.block as u64) as usize;
        RawDriver {
            fe,
            queue,
            load: *load,
            free: (0..slots.len() as u16).collect(),
            slots,
            descriptors: host(at.desc),
            avail: host(at.avail),
            used: host(at.used),
            size,
            next_avail,
            next_used,
            rng: Rng::new(load.seed),
            next_place: 0,
            generations: vec![0; if load.verify { places } else { 0 }],
            busy: vec![false; if load.verify { places } else { 0 }],
            block_size: lun.block_size as u64,
            figures: Figures::default(),
            memory: allocated,
        }
    }

    /// Gives memory and queue back.
    fn leave(&mut self) {
        let memory = self.fe.memory();
        self.memory.drain(..).for_each(|address| memory.free(address));
        self.fe.queue(self.queue).ring_mut().go_on_at(self.next_avail);
    }

    fn run(&mut self, time: Duration) {
        self.want_interrupts(false);
        let start = Instant::now();
        let mut now = start;
        let mut idle_since = start;
        while now < start + time || self.free.len() < self.slots.len() {
            if self.take(now) {
                idle_since = now;
            }
            if now < start + time {
                self.give(now);
            }
            if !self.has_used() && self.free.len() < self.slots.len() {
                self.wait();
            }
            now = Instant::now();
            if now > idle_since + PATIENCE {
                self.fe.diagnosis().fail("a transfer is not answered");
            }
        }
        self.figures.elapsed = now - start;
    }

    /// Takes what is used.
    fn take(&mut self, now: Instant) -> bool {
        let end = self.used_index();
        let any = end != self.next_used;
        while self.next_used != end {
            let at = 4 + 8 * usize::from(self.next_used % self.size);
            // SAFETY: the used ring has `size` entries of 8 bytes behind 4 bytes.
            let id = unsafe { self.used.add(at).cast::<u32>().read_volatile() };
            self.complete(id as u16, now);
            self.next_used = self.next_used.wrapping_add(1);
        }
        any
    }

    fn complete(&mut self, slot: u16, now: Instant) {
        let done = &self.slots[usize::from(slot)];
        // SAFETY: the response is RESPONSE_HEADER bytes long.
        let (status, response) = unsafe {
            (done.response.add(STATUS_AT).read_volatile(), done.response.add(11).read_volatile())
        };
        if (status, response) != (0, 0) {
            self.fe.diagnosis().fail(&format!(
                "status {status:#x}, response {response} for place {} ({})",
                done.place,
                if done.writes { "write" } else { "read" }
            ));
        }
        self.figures.latencies.add(now - done.since);
        self.figures.transfers += 1;
        if self.load.verify {
            let (place, writes) = (done.place, done.writes);
            if !writes {
                self.check(slot, place);
            }
            self.busy[place as usize] = false;
        }
        self.free.push_back(slot);
    }

    /// Makes as many transfers available as there is room for.
    fn give(&mut self, now: Instant) {
        let before = self.next_avail;
        while let Some(slot) = self.free.pop_front() {
            self.prepare(slot, now);
            let at = 4 + 2 * usize::from(self.next_avail % self.size);
            // SAFETY: the available ring has `size` entries of 2 bytes behind 4 bytes.
            unsafe { self.avail.add(at).cast::<u16>().write_volatile(slot) };
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        if self.next_avail == before {
            return;
        }
        self.index(self.avail).store(self.next_avail, Ordering::Release);
        fence(Ordering::SeqCst);
        // SAFETY: behind the used ring's entries there are two bytes for the event.
        let event = unsafe { self.used.add(4 + 8 * usize::from(self.size)).cast::<u16>() };
        // SAFETY: as above; the address is even.
        if need_event(unsafe { event.read_volatile() }, self.next_avail, before) {
            self.fe.queue(self.queue).kick_fd().write(1).expect("kick");
            self.figures.kicks += 1;
        }
    }

    fn prepare(&mut self, slot: u16, now: Instant) {
        let (place, writes) = self.choose();
        let lba = (self.load.start + place * self.load.block as u64) / self.block_size;
        let blocks = (self.load.block as u64 / self.block_size) as u16;
        let mut cdb = [if writes { 0x2a } else { 0x28 }, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if writes && self.load.fua {
            cdb[1] = 8;
        }
        cdb[2..6].copy_from_slice(&(lba as u32).to_be_bytes());
        cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
        if self.load.verify && writes {
            self.stamp(slot, place);
        }
        let slot_data = &mut self.slots[usize::from(slot)];
        (slot_data.place, slot_data.writes, slot_data.since) = (place, writes, now);
        let table = if writes { slot_data.write_table } else { slot_data.read_table };
        // SAFETY: header and response are as long as their names say, the descriptor table has `size`
        // entries of 16 bytes, and a slot's number is below that.
        unsafe {
            slot_data.header.add(CDB_AT).copy_from_nonoverlapping(cdb.as_ptr(), cdb.len());
            slot_data.response.add(STATUS_AT).write_volatile(0xff);
            let descriptor = self.descriptors.add(16 * usize::from(slot));
            descriptor.cast::<u64>().write_volatile(table);
            descriptor.add(8).cast::<u64>().write_volatile((3 * 16) | (4 << 32));
        }
    }

    fn choose(&mut self) -> (u64, bool) {
        let places = self.load.span / self.load.block as u64;
        let mut place = match self.load.pattern.is_sequential() {
            true => self.next_place,
            false => self.rng.below(places),
        };
        while self.load.verify && self.busy[place as usize] {
            place = (place + 1) % places;
        }
        if self.load.verify {
            self.busy[place as usize] = true;
        }
        self.next_place = (place + 1) % places;
        let writes = match self.load.pattern {
            Pattern::RandRead | Pattern::SeqRead => false,
            Pattern::RandWrite | Pattern::SeqWrite => true,
            Pattern::Mixed => self.rng.below(10) < 3,
        };
        (place, writes)
    }

    /// What stands at the beginning and the end of each sector: where it is and which writing it was.
    fn stamp_of(&self, place: u64, sector: usize) -> [u8; 16] {
        let at = self.load.start + place * self.load.block as u64 + (sector * SECTOR) as u64;
        let generation = u64::from(self.generations[place as usize]) ^ (self.load.seed << 32);
        let mut stamp = [0; 16];
        stamp[..8].copy_from_slice(&at.to_le_bytes());
        stamp[8..].copy_from_slice(&generation.to_le_bytes());
        stamp
    }

    fn stamp(&mut self, slot: u16, place: u64) {
        self.generations[place as usize] += 1;
        let data = self.slots[usize::from(slot)].data;
        for sector in 0..self.load.block / SECTOR {
            let stamp = self.stamp_of(place, sector);
            for at in [sector * SECTOR, (sector + 1) * SECTOR - 16] {
                // SAFETY: inside the data buffer, which is `block` bytes long.
                unsafe { data.add(at).copy_from_nonoverlapping(stamp.as_ptr(), 16) };
            }
        }
    }

    fn check(&mut self, slot: u16, place: u64) {
        if self.generations[place as usize] == 0 {
            return;
        }
        let data = self.slots[usize::from(slot)].data;
        for sector in 0..self.load.block / SECTOR {
            let expected = self.stamp_of(place, sector);
            for at in [sector * SECTOR, (sector + 1) * SECTOR - 16] {
                let mut found = [0; 16];
                // SAFETY: inside the data buffer, which is `block` bytes long.
                unsafe { data.add(at).copy_to_nonoverlapping(found.as_mut_ptr(), 16) };
                if found != expected {
                    self.fe.diagnosis().fail(&format!(
                        "place {place}, byte {at}: {found:02x?} was read, {expected:02x?} written"
                    ));
                }
            }
            self.figures.verified += 1;
        }
    }

    fn used_index(&self) -> u16 {
        self.index(self.used).load(Ordering::Acquire)
    }

    fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// The index of a ring, behind its flags.
    fn index(&self, ring: *mut u8) -> &AtomicU16 {
        // SAFETY: both rings begin with two aligned 16-bit numbers, mapped as long as `fe` lives.
        unsafe { AtomicU16::from_ptr(ring.add(2).cast()) }
    }

    fn want_interrupts(&self, wanted: bool) {
        let event = self.next_used.wrapping_sub(u16::from(!wanted));
        // SAFETY: behind the available ring's entries there are two bytes for the event.
        unsafe {
            self.avail.add(4 + 2 * usize::from(self.size)).cast::<u16>().write_volatile(event)
        };
        fence(Ordering::SeqCst);
    }

    /// Waits for something used, at least for a moment.
    fn wait(&mut self) {
        if self.load.driver == Driver::Polls {
            for _ in 0..64 {
                if self.has_used() {
                    return;
                }
                std::hint::spin_loop();
            }
            return;
        }
        self.want_interrupts(true);
        if !self.has_used() {
            let queue = self.fe.queue(self.queue);
            let call = queue.call_fd();
            let mut fds = [PollFd::new(call.as_fd_compat(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(1000u16));
            match call.read() {
                Ok(count) => self.figures.interrupts += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        self.want_interrupts(false);
    }
}
