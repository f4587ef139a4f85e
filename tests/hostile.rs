//! Front ends and drivers that break the rules, beside those in tests/transport.rs: after each the daemon lives, a new
//! connection reads right, and no descriptor or thread has been left behind.

mod frontend;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use frontend::connection::FIRST_REQUEST_QUEUE;
use frontend::memory::RegionInfo;
use frontend::protocol::{
    Channel, FLAG_VERSION, feature, inflight, memory_table, protocol_feature, request,
    single_region, vring_address, vring_state,
};
use frontend::ring::RawDesc;
use frontend::*;
use nix::sys::memfd::{MFdFlags, memfd_create};

const DISK: u64 = 4 * MIB;

/// A daemon, and what it has open while nobody is connected.
struct Victim {
    daemon: Daemon,
    descriptors: usize,
    threads: usize,
}

impl Victim {
    fn new() -> Self {
        let daemon = Daemon::with_disk(DISK, "");
        let victim = Victim { descriptors: 0, threads: 0, daemon };
        // The pool's threads come and go by themselves.
        victim.reads_right();
        std::thread::sleep(Duration::from_millis(50));
        Victim { descriptors: victim.daemon.fd_count(), threads: 1, ..victim }
    }

    fn reads_right(&self) {
        let fe = FrontEnd::connect(&self.daemon);
        let lun = fe.ready_lun(0, 0);
        let data = pattern::blocks(8, 16, 512, 5);
        lun.write10(8, &data);
        pattern::assert_same(&lun.read10(8, 16), &data, "what was written");
    }

    #[track_caller]
    fn is_well_after(&self, what: &str) {
        self.reads_right();
        eventually(&format!("no descriptor to be left of: {what}"), || {
            self.daemon.fd_count() <= self.descriptors
                && self.daemon.thread_count() <= self.threads + 16
        });
    }

    fn channel(&self) -> Channel {
        Channel::new(self.daemon.connect(), self.daemon.diagnosis())
    }

    /// A channel on which everything was negotiated that there is.
    fn negotiated(&self) -> Channel {
        let channel = self.channel();
        channel.tell(request::SET_OWNER, &[], &[]);
        let features = channel.get_u64(request::GET_FEATURES);
        let protocol = channel.get_u64(request::GET_PROTOCOL_FEATURES);
        channel.tell(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        channel.tell(request::SET_FEATURES, &features.to_ne_bytes(), &[]);
        channel
    }
}

fn memory(size: u64) -> File {
    let file = File::from(memfd_create(c"hostile", MFdFlags::empty()).unwrap());
    file.set_len(size).unwrap();
    file
}

fn region(guest_address: u64, size: u64, file: &File) -> RegionInfo {
    RegionInfo {
        guest_address,
        size,
        user_address: guest_address.wrapping_add(0x7000_0000),
        file_offset: 0,
        fd: file.as_raw_fd(),
    }
}

/// Says something that must be refused: by an answer, or by the end of the connection.
#[track_caller]
fn refused(channel: &Channel, number: u32, payload: &[u8], fds: &[i32]) {
    let size = payload.len() as u32;
    let sent = channel.send_message(number, FLAG_VERSION | 8, size, payload, fds);
    if sent.is_ok()
        && let Some(reply) = channel.receive()
    {
        assert_ne!(reply.as_u64(), 0, "request {number} was accepted");
    }
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let victim = Victim::new();
    let file = memory(MIB);
    let cases: [(&str, Vec<RegionInfo>); 6] = [
        ("overlapping", vec![region(0, MIB, &file), region(MIB / 2, MIB, &file)]),
        ("the same twice", vec![region(0, MIB, &file), region(0, MIB, &file)]),
        ("longer than its file", vec![region(0, 2 * MIB, &file)]),
        ("longer than anything", vec![region(0, 1 << 62, &file)]),
        ("wrapping", vec![region(u64::MAX - MIB + 2, MIB, &file)]),
        ("empty", vec![region(0, 0, &file)]),
    ];
    for (what, regions) in cases {
        let fds: Vec<i32> = regions.iter().map(|region| region.fd).collect();
        refused(&victim.negotiated(), request::SET_MEM_TABLE, &memory_table(&regions), &fds);
        victim.is_well_after(what);
        let channel = victim.negotiated();
        for (n, region) in regions.iter().enumerate() {
            if n + 1 < regions.len() {
                assert_eq!(
                    channel.tell_and_wait(
                        request::ADD_MEM_REG,
                        &single_region(region),
                        &[region.fd]
                    ),
                    0
                );
            } else {
                refused(&channel, request::ADD_MEM_REG, &single_region(region), &[region.fd]);
            }
        }
        drop(channel);
        victim.is_well_after(what);
    }
    refused(
        &victim.negotiated(),
        request::REM_MEM_REG,
        &single_region(&region(0, MIB, &file)),
        &[],
    );
    victim.is_well_after("removing what is not there");
}

#[test]
fn what_is_kept_for_us_may_be_wrong() {
    let victim = Victim::new();
    let file = memory(4096);
    for (what, payload) in [
        ("shorter than its queues", inflight(4096, 0, 18, 1024)),
        ("longer than its file", inflight(1 << 20, 0, 2, 128)),
        ("at a wrong place", inflight(4096, 1, 2, 16)),
        ("behind its end", inflight(4096, 4096, 2, 16)),
        ("wrapping", inflight(4096, u64::MAX - 100, 2, 16)),
        ("giant queues", inflight(u64::MAX, 0, 65535, 65535)),
    ] {
        refused(&victim.negotiated(), request::SET_INFLIGHT_FD, &payload, &[file.as_raw_fd()]);
        victim.is_well_after(what);
    }
    for (queues, size) in [(0, 16), (2, 0), (65535, 16), (2, 65535)] {
        let channel = victim.negotiated();
        channel.tell(request::GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]);
        channel.expect_hangup();
        victim.is_well_after("asking for the impossible");
    }
    for (what, payload) in [("longer than its file", [1 << 30, 0]), ("wrapping", [4096, u64::MAX])]
    {
        let channel = victim.negotiated();
        let payload = payload.map(u64::to_ne_bytes).concat();
        channel.tell(request::SET_LOG_BASE, &payload, &[file.as_raw_fd()]);
        channel.expect_hangup();
        victim.is_well_after(what);
    }
}

/// A region in which everything is in flight, in every order, a thousand times over.
#[test]
fn nonsense_in_flight_is_survived() {
    use std::os::unix::fs::FileExt;
    let victim = Victim::new();
    let mut rng = pattern::Rng::new(3);
    for round in 0..20 {
        let mut fe = FrontEnd::builder().inflight().connect(&victim.daemon);
        fe.ready_lun(0, 0);
        let file = fe.inflight_file();
        let len = file.metadata().unwrap().len();
        let mut bytes = rng.bytes(len as usize);
        for (n, queue) in bytes.chunks_mut(16 + 16 * 128 + 48).enumerate() {
            if round % 2 == 0 {
                // Otherwise right: version, size; every chain in flight.
                queue[8..12].copy_from_slice(&[1, 0, 128, 0]);
                queue[16..].chunks_mut(16).take(128).for_each(|state| state[0] = u8::from(n != 1));
            }
        }
        file.write_all_at(&bytes, 0).unwrap();
        fe.reconnect(&victim.daemon);
        std::thread::sleep(Duration::from_millis(10));
        drop(fe);
    }
    victim.is_well_after("nonsense in flight");
}

#[test]
fn a_log_that_is_too_short_is_written_as_far_as_it_goes() {
    let victim = Victim::new();
    let protocol = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::LOG_SHMFD;
    let fe = FrontEnd::builder().protocol(protocol).connect(&victim.daemon);
    let file = memory(4096);
    let channel = fe.channel();
    channel.tell(
        request::SET_LOG_BASE,
        &[1u64, 0].map(u64::to_ne_bytes).concat(),
        &[file.as_raw_fd()],
    );
    channel.receive().unwrap();
    drop(channel);
    let features = fe.features() | feature::LOG_ALL;
    fe.set(request::SET_FEATURES, &features.to_ne_bytes(), &[], false);
    fe.barrier();
    let lun = fe.ready_lun(0, 0);
    lun.read10(0, 255);
    drop(fe);
    victim.is_well_after("a short log");
}

#[test]
fn messages_in_the_wrong_order_are_survived() {
    let victim = Victim::new();
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let orders: [&[u32]; 5] = [
        &[request::GET_VRING_BASE],
        &[request::SET_VRING_ENABLE, request::SET_VRING_KICK, request::GET_VRING_BASE],
        &[
            request::SET_VRING_KICK,
            request::SET_VRING_KICK,
            request::SET_VRING_NUM,
            request::SET_VRING_ADDR,
        ],
        &[
            request::RESET_DEVICE,
            request::SET_VRING_ENABLE,
            request::RESET_OWNER,
            request::GET_VRING_BASE,
        ],
        &[
            request::SET_VRING_ADDR,
            request::SET_VRING_ENABLE,
            request::SET_VRING_CALL,
            request::SET_VRING_ERR,
        ],
    ];
    for order in orders {
        let channel = victim.negotiated();
        for number in order {
            let (payload, fds) = match *number {
                request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                    (2u64.to_ne_bytes().to_vec(), vec![event.as_raw_fd()])
                }
                request::SET_VRING_ADDR => (vring_address(2, 0x1000, 0x2000, 0x3000), vec![]),
                request::RESET_DEVICE | request::RESET_OWNER => (vec![], vec![]),
                _ => (vring_state(2, 1), vec![]),
            };
            let size = payload.len() as u32;
            if channel.send_message(*number, FLAG_VERSION, size, &payload, &fds).is_err() {
                break;
            }
        }
        drop(channel);
        victim.is_well_after(&format!("{order:?}"));
    }
}

/// Lengths that add up to far more than there is, in one chain of buffers that are all memory.
#[test]
fn giant_requests_are_bounded() {
    let victim = Victim::new();
    let fe = FrontEnd::builder().queue_size(1024).connect(&victim.daemon);
    let lun = fe.ready_lun(0, 0);
    let memory = fe.memory();
    let region = memory.regions()[0];
    let header = memory.alloc(4096, 16, 0);
    let answer = memory.alloc(4096, 16, 0);
    // READ(16) of 4 Gi blocks; the whole memory as a buffer, a thousand times.
    let request =
        lun.request(Cdb::from_slice(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
    memory.write(header, &request.header());
    let mut chain = vec![
        RawDesc { address: header, len: 51, flags: 1, next: 1 },
        RawDesc { address: answer, len: 108, flags: 3, next: 2 },
    ];
    for n in 2..1000 {
        let flags = if n == 999 { 2 } else { 3 };
        chain.push(RawDesc {
            address: region.guest_address,
            len: region.size as u32,
            flags,
            next: n + 1,
        });
    }
    let before = victim.daemon.resident();
    let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
    let head = queue.ring_mut().add_raw(&chain);
    queue.ring_mut().publish();
    queue.kick_now();
    queue.wait_raw(head);
    drop(queue);
    assert!(victim.daemon.resident() < before + (8 << 20), "memory grew by a request");
    drop(fe);
    victim.is_well_after("a giant request");
}

#[test]
fn a_second_front_end_waits_for_the_first() {
    let victim = Victim::new();
    let first = FrontEnd::connect(&victim.daemon);
    let second = victim.channel();
    second.tell(request::GET_FEATURES, &[], &[]);
    first.ready_lun(0, 0).write10(0, &[1; 512]);
    drop(first);
    assert!(second.receive().is_some(), "its turn has come");
    drop(second);
    victim.is_well_after("two front ends");
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    let victim = Victim::new();
    for n in 0..2000 {
        let channel = victim.channel();
        if n % 3 != 0 {
            channel.tell(request::SET_OWNER, &[], &[]);
            channel.get_u64(request::GET_FEATURES);
        }
    }
    victim.is_well_after("2000 connections");
}

/// A driver that breaks a rule with every request does not fill the log.
#[test]
fn complaints_are_few() {
    let victim = Victim::new();
    let fe = FrontEnd::connect(&victim.daemon);
    let mut queue = fe.queue(FIRST_REQUEST_QUEUE);
    for _ in 0..2000 {
        let chain = [RawDesc { address: u64::MAX - 4, len: 64, flags: 2, next: 0 }];
        let head = queue.ring_mut().add_raw(&chain);
        queue.ring_mut().publish();
        queue.kick_now();
        queue.wait_raw(head);
    }
    drop(queue);
    let lines = victim.daemon.log().lines().count();
    assert!(lines < 100, "{lines} lines");
    drop(fe);
    victim.is_well_after("complaints");
}
