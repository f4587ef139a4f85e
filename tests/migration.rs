//! The guest's memory is copied to another host while the guest runs: what the daemon writes to it meanwhile has to be
//! marked, or the copy is not the guest.

mod frontend;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::daemon::Scratch;
use frontend::pattern::Rng;
use frontend::protocol::{feature, protocol_feature, request, vring_state};
use frontend::queue::Shape;
use frontend::*;
use nix::sys::memfd::{MFdFlags, memfd_create};

const PAGE: usize = 4096;
const QUEUES: usize = 2;

/// The side that copies.
struct Migration {
    log: File,
    copy: Vec<u8>,
    base: u64,
    sent: usize,
}

impl Migration {
    /// `log_last`: the feature was there before.
    fn begin(fe: &FrontEnd, log_last: bool) -> Self {
        let region = fe.memory().regions()[0];
        let pages = (region.guest_address + region.size) as usize / PAGE;
        let log = File::from(memfd_create(c"log", MFdFlags::empty()).unwrap());
        log.set_len(pages.div_ceil(8).next_multiple_of(PAGE) as u64).unwrap();
        let len = log.metadata().unwrap().len();
        // The log first, then the feature, or the other way round: the first copy is made when both are there.
        if log_last {
            Self::switch(fe, true);
        }
        let place = [len, 0].map(u64::to_ne_bytes).concat();
        let channel = fe.channel();
        channel.tell(request::SET_LOG_BASE, &place, &[log.as_raw_fd()]);
        assert_eq!(channel.receive().unwrap().request, request::SET_LOG_BASE);
        drop(channel);
        if !log_last {
            Self::switch(fe, true);
        }
        let copy = fe.memory().read(region.guest_address, region.size as usize);
        Migration { log, copy, base: region.guest_address, sent: 0 }
    }

    fn switch(fe: &FrontEnd, on: bool) {
        let features = fe.features() & !feature::LOG_ALL | if on { feature::LOG_ALL } else { 0 };
        fe.set(request::SET_FEATURES, &features.to_ne_bytes(), &[], false);
        fe.barrier();
    }

    /// Copies the pages that are marked.
    fn pass(&mut self, fe: &FrontEnd) {
        let mut bits = vec![0; self.log.metadata().unwrap().len() as usize];
        self.log.read_exact_at(&mut bits, 0).unwrap();
        for (at, byte) in bits.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            // Clear before copying: what is written after that is marked again.
            self.clear(at, *byte);
            for page in (0..8).filter(|bit| byte >> bit & 1 != 0).map(|bit| at * 8 + bit) {
                let address = (page * PAGE) as u64;
                let offset = (address - self.base) as usize;
                self.copy[offset..][..PAGE].copy_from_slice(&fe.memory().read(address, PAGE));
                self.sent += 1;
            }
        }
    }

    /// Clears these bits and no others that may be set meanwhile.
    fn clear(&self, at: usize, bits: u8) {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        use std::sync::atomic::{AtomicU8, Ordering};
        let len = std::num::NonZero::new(self.log.metadata().unwrap().len() as usize).unwrap();
        let (prot, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping of our own file, used and removed here.
        unsafe {
            let mapped = mmap(None, len, prot, flags, &self.log, 0).unwrap();
            let byte = AtomicU8::from_ptr(mapped.as_ptr().cast::<u8>().add(at));
            byte.fetch_and(!bits, Ordering::SeqCst);
            munmap(mapped, len.get()).unwrap();
        }
    }

    /// Copies the page of something that the driver has written itself.
    fn copy_page(&mut self, fe: &FrontEnd, address: u64) {
        let page = address - address % PAGE as u64;
        let offset = (page - self.base) as usize;
        self.copy[offset..][..PAGE].copy_from_slice(&fe.memory().read(page, PAGE));
    }

    /// The last pass, with the queues stopped; then the two memories must be one.
    fn end(mut self, fe: &FrontEnd) {
        for index in 0..FIRST_REQUEST_QUEUE + QUEUES {
            fe.channel().ask(request::GET_VRING_BASE, &vring_state(index, 0));
        }
        self.pass(fe);
        let now = fe.memory().read(self.base, self.copy.len());
        let pages = now.chunks(PAGE).zip(self.copy.chunks(PAGE));
        let wrong: Vec<usize> =
            pages.enumerate().filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
        assert!(wrong.is_empty(), "pages {wrong:?} were written to and not marked");
        println!("{} pages sent again", self.sent);
    }
}

#[test]
fn every_byte_that_is_written_to_the_guest_is_marked() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", 16 * MIB);
    for options in ["", "cache=direct"] {
        for indirect in [false, true] {
            for (log_last, restart) in [(false, false), (true, false), (false, true)] {
                let daemon =
                    Daemon::builder(&scratch).disk(&disk, options).arg("--num-queues=2").spawn();
                migrate(&daemon, indirect, log_last, restart);
            }
        }
    }
}

/// `log_last`: the log comes when the feature is there. `restart`: the request queues start when both are.
fn migrate(daemon: &Daemon, indirect: bool, log_last: bool, restart: bool) {
    let builder = FrontEnd::builder().queues(QUEUES);
    let protocol = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::LOG_SHMFD;
    let fe = builder.protocol(protocol).connect(daemon);
    let lun = fe.ready_lun(0, 0);
    let mut rng = Rng::new(indirect.into());
    lun.write16(0, &rng.bytes(MIB as usize));
    let shape = if indirect { Shape::default().indirect() } else { Shape::default() };
    // Prepared before the first copy, so that from then on only the device writes to memory.
    let mut reads = Vec::new();
    for queue in FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES {
        let lun = lun.on_queue(queue).with_shape(shape.clone());
        for _ in 0..30 {
            let blocks = rng.between(1, 64) as u32;
            let lba = rng.below(2048 - u64::from(blocks));
            let request = lun.request(cdb::read16(lba, blocks)).data_in(blocks as usize * 512);
            reads.push((queue, fe.queue(queue).enqueue(&request.exchange())));
        }
    }
    let mut migration = Migration::begin(&fe, log_last);
    if restart {
        for queue in FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES {
            let base = fe.stop_queue(queue);
            fe.start_queue(queue, base);
        }
        fe.barrier();
    }
    for queue in FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES {
        fe.queue(queue).publish();
    }
    // The available index is the driver's own to mark.
    let start = Instant::now();
    let answered = |queue| {
        let queue = fe.queue(queue);
        queue.ring().used_idx() == queue.ring().published()
    };
    while !(0..QUEUES).all(|n| answered(FIRST_REQUEST_QUEUE + n)) {
        migration.pass(&fe);
        assert!(start.elapsed() < PATIENCE, "reads hang");
        std::thread::sleep(Duration::from_micros(200));
    }
    for queue in FIRST_REQUEST_QUEUE..FIRST_REQUEST_QUEUE + QUEUES {
        let at = fe.queue(queue).ring().addresses().avail;
        migration.copy_page(&fe, at);
    }
    migration.end(&fe);
    for (queue, ticket) in reads {
        ScsiResponse::parse(&fe.queue(queue).wait(ticket)).expect_good();
    }
}
