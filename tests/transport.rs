//! The transport: vhost-user negotiation, guest memory, virtqueues, notifications. SCSI commands
//! serve as the payload.

mod frontend;
mod mounts;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE as REQUESTS};
use frontend::pattern::{assert_same, blocks};
use frontend::protocol::{
    Channel, FLAG_VERSION, VRING_NO_FD, feature, protocol_feature, request, vring_state,
};
use frontend::ring::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, RawDesc, RingAddresses, indirect_table,
};
use frontend::scsi::{REQUEST_HEADER, RESPONSE_HEADER, SENSE_OFFSET};
use frontend::*;

const DISK: u64 = 16 * MIB;

/// Writes stamped blocks and reads them back.
#[track_caller]
fn round_trip(lun: &Lun<'_>, lba: u32, count: u16, stamp: u64) {
    let data = blocks(lba.into(), count.into(), lun.block_size, stamp);
    lun.write10(lba, &data);
    assert_same(&lun.read10(lba, count), &data, "what was written");
}

/// Shows that the daemon serves a new front end.
#[track_caller]
fn assert_serves(daemon: &Daemon) {
    let fe = FrontEnd::connect(daemon);
    round_trip(&fe.ready_lun(0, 0), 0, 8, 0x5e7e5);
}

/// What a daemon owns while nobody is connected.
struct AtRest {
    threads: usize,
    fds: Vec<String>,
}

impl AtRest {
    /// After one connection, so that everything that is made once has been made.
    #[track_caller]
    fn of(daemon: &Daemon) -> Self {
        assert_serves(daemon);
        let mut fds = daemon.fds();
        eventually("the end of the connection", || {
            thread::sleep(A_MOMENT);
            let before = std::mem::replace(&mut fds, daemon.fds());
            before == fds && daemon.mappings("guest-memory") == 0
        });
        Self { threads: daemon.thread_count(), fds }
    }

    /// Nothing was leaked since. There may be fewer threads, because idle ones end.
    #[track_caller]
    fn assert_again(&self, daemon: &Daemon) {
        let left = || (daemon.thread_count(), daemon.fds());
        let clean = || daemon.thread_count() <= self.threads && daemon.fds() == self.fds;
        let before = (self.threads, &self.fds);
        eventually(&format!("{before:?}, now {:?}", left()), clean);
        eventually("guest memory to be unmapped", || daemon.mappings("guest-memory") == 0);
    }
}

// ----- negotiation ----------------------------------------------------------------------------

#[test]
fn every_order_of_messages_sets_the_device_up() {
    use MemoryMessage::{Slots, Table};
    let daemon = Daemon::with_disk(DISK, "");
    let without_slots = protocol_feature::MQ | protocol_feature::REPLY_ACK;
    let connections = [
        FrontEnd::builder().order(Order::Qemu7),
        FrontEnd::builder().order(Order::Qemu10),
        FrontEnd::builder().order(Order::Qemu7).memory(RegionSpec::with_gaps(), Slots),
        FrontEnd::builder().order(Order::Qemu10).memory(RegionSpec::with_gaps(), Slots),
        FrontEnd::builder().order(Order::Qemu10).memory(RegionSpec::with_gaps(), Table),
        FrontEnd::builder().order(Order::Qemu7).protocol(without_slots),
        FrontEnd::builder().order(Order::Qemu7).protocol(protocol_feature::MQ),
        FrontEnd::builder().order(Order::Qemu10).protocol(0),
        FrontEnd::builder().order(Order::Spdk).protocol(protocol_feature::MQ),
        FrontEnd::builder().order(Order::Legacy),
        FrontEnd::builder().feature(feature::SCSI_HOTPLUG | feature::SCSI_CHANGE, false),
        FrontEnd::builder().event_idx(false).indirect(false),
    ];
    for (number, builder) in connections.into_iter().enumerate() {
        println!("{builder:?}");
        let fe = builder.queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        round_trip(&lun, 8, 16, number as u64);
        round_trip(&lun.on_queue(REQUESTS + 1), 64, 16, number as u64);
        assert_eq!(fe.tmf(Tmf::QueryTaskSet, lun.address, 0), 0);
    }
}

/// SPDK's front end asks for the number of queues whether it negotiated MQ or not.
#[test]
fn the_number_of_queues_is_told_without_mq() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().order(Order::Spdk).protocol(0).connect(&daemon);
    round_trip(&fe.ready_lun(0, 0), 8, 16, 1);
}

#[test]
fn offers_what_it_can_do_and_nothing_else() {
    use {feature as f, protocol_feature as p};
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let virtio = f::VERSION_1 | f::INDIRECT_DESC | f::EVENT_IDX | f::SCSI_HOTPLUG | f::SCSI_CHANGE;
    let more = f::PROTOCOL_FEATURES | f::LOG_ALL | f::ANY_LAYOUT;
    assert_eq!(fe.offered_features(), virtio | more);
    let protocol = p::MQ | p::REPLY_ACK | p::CONFIGURE_MEM_SLOTS | p::RESET_DEVICE;
    let protocol = protocol | p::INFLIGHT_SHMFD | p::LOG_SHMFD;
    assert_eq!(fe.offered_protocol_features(), protocol);
    let queues = fe.channel().get_u64(request::GET_QUEUE_NUM);
    assert_eq!(queues, 2 + 16, "control, event, and 16 request queues");
}

#[test]
fn number_of_queues_follows_the_option() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", DISK);
    let daemon = Daemon::builder(&scratch).disk(&disk, "").args(["--num-queues", "3"]).spawn();
    let fe = FrontEnd::builder().queues(3).connect(&daemon);
    assert_eq!(fe.channel().get_u64(request::GET_QUEUE_NUM), 5);
    for queue in 0..3 {
        round_trip(&fe.ready_lun(0, 0).on_queue(REQUESTS + queue), 0, 1, queue as u64);
    }
}

/// VIRTIO 1.3, 5.6.4: the fields of the configuration space.
#[test]
fn config_space_is_there_when_it_was_asked_for() {
    const CONFIG_SIZE: usize = 36;
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", DISK);
    let daemon = Daemon::builder(&scratch).disk(&disk, "").arg("--config-space").spawn();
    let protocol = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::CONFIG;
    let fe = FrontEnd::builder().protocol(protocol).connect(&daemon);
    let head = [0, CONFIG_SIZE as u32, 0].map(u32::to_ne_bytes).concat();
    let payload = [&head[..], &[0; CONFIG_SIZE]].concat();
    let reply = fe.channel().ask(request::GET_CONFIG, &payload);
    assert_eq!(reply.payload[..12], head, "offset, size and flags come back");
    let config = &reply.payload[12..];
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 16, "num_queues");
    assert!(word(4) >= 2, "seg_max");
    assert_eq!((word(16), word(20), word(24)), (16, 96, 32), "event_info, sense, cdb size");
    assert_eq!(u16::from_le_bytes([config[28], config[29]]), 0, "max_channel");
    assert!(word(32) >= 255, "max_lun");
    round_trip(&fe.ready_lun(0, 0), 0, 8, 1);
}

#[test]
fn malformed_messages_end_their_connection_only() {
    let daemon = Daemon::with_disk(DISK, "");
    let state = vring_state(2, 1);
    let huge_queue = vring_state(2, 4096);
    let far_queue = vring_state(200, 1);
    let messages: [(&str, u32, u32, u32, &[u8]); 14] = [
        ("an unknown request", 999, FLAG_VERSION, 0, &[]),
        ("request 0", 0, FLAG_VERSION, 0, &[]),
        ("another protocol version", request::GET_FEATURES, 2, 0, &[]),
        ("reserved flags", request::GET_FEATURES, 0xf0 | FLAG_VERSION, 0, &[]),
        ("a reply", request::GET_FEATURES, FLAG_VERSION | 4, 0, &[]),
        ("a huge payload", request::SET_FEATURES, FLAG_VERSION, u32::MAX, &[]),
        ("a payload of 4 GiB - 12", request::SET_CONFIG, FLAG_VERSION, u32::MAX - 11, &[]),
        ("a payload that is too short", request::SET_FEATURES, FLAG_VERSION, 4, &[0; 4]),
        ("a payload where there is none", request::SET_OWNER, FLAG_VERSION, 8, &[0; 8]),
        ("a queue that is too large", request::SET_VRING_NUM, FLAG_VERSION, 8, &huge_queue),
        ("a queue that does not exist", request::SET_VRING_BASE, FLAG_VERSION, 8, &far_queue),
        ("the base of no queue", request::GET_VRING_BASE, FLAG_VERSION, 8, &far_queue),
        (
            "enabling with the number 7",
            request::SET_VRING_ENABLE,
            FLAG_VERSION,
            8,
            &vring_state(2, 7),
        ),
        ("a kick without a descriptor", request::SET_VRING_KICK, FLAG_VERSION, 8, &state),
    ];
    for (what, number, flags, size, payload) in messages {
        println!("{what}");
        let fe = FrontEnd::connect(&daemon);
        let channel = fe.channel();
        // The daemon may hang up before everything was sent.
        let _ = channel.send_message(number, flags, size, payload, &[]);
        channel.socket().shutdown(std::net::Shutdown::Write).unwrap();
        channel.expect_hangup();
        drop(channel);
        drop(fe);
        assert_serves(&daemon);
    }
}

/// The log says which message was wrong, with its value and the rule.
#[test]
fn what_was_wrong_with_a_message_is_logged() {
    let daemon = Daemon::with_disk(DISK, "");
    let region =
        |base: u64, size: u64| [0, base, size, 0x1000_0000, 0].map(u64::to_ne_bytes).concat();
    let features = (1_u64 << 63).to_ne_bytes();
    let inflight = frontend::protocol::inflight(0, 0, 99, 128);
    let cases: [(u32, &[u8], bool, &str); 10] = [
        (request::SET_VRING_NUM, &vring_state(2, 4096), false, "SET_VRING_NUM: 4096 for queue 2"),
        (request::SET_VRING_NUM, &vring_state(2, 100), false, "not a power of two up to 1024"),
        (
            request::SET_VRING_BASE,
            &vring_state(2, 65536),
            false,
            "SET_VRING_BASE: 65536 for queue 2",
        ),
        (request::SET_VRING_BASE, &vring_state(2, 7), false, "SET_VRING_BASE: queue 2 has taken"),
        (request::SET_VRING_ENABLE, &vring_state(200, 1), false, "queue 200: there are 18"),
        (request::SET_FEATURES, &features, false, "0x8000000000000000 were not offered"),
        (request::SET_PROTOCOL_FEATURES, &features, false, "SET_PROTOCOL_FEATURES: 0x8"),
        (request::REM_MEM_REG, &region(64 * GIB, MIB), false, "no region of 0x100000 bytes"),
        (request::ADD_MEM_REG, &region(MIB, MIB), true, "overlaps that of 0x4000000 bytes at 0x0"),
        (request::GET_INFLIGHT_FD, &inflight, false, "GET_INFLIGHT_FD: 99 queues"),
    ];
    for (number, payload, with_memory, expected) in cases {
        let builder = FrontEnd::builder();
        let inflight = number == request::GET_INFLIGHT_FD;
        let fe = if inflight { builder.inflight() } else { builder }.connect(&daemon);
        fe.ready_lun(0, 0);
        let fds = if with_memory { vec![fe.memory().region(0).fd] } else { vec![] };
        fe.channel().tell(number, payload, &fds);
        fe.channel().expect_hangup();
        eventually(&format!("{expected:?} in {}", daemon.log()), || {
            daemon.log().contains(expected)
        });
    }
}

#[test]
fn descriptors_where_none_belong_are_not_leaked() {
    let daemon = Daemon::with_disk(DISK, "");
    let at_rest = AtRest::of(&daemon);
    let gift = std::fs::File::open("/dev/null").unwrap();
    for count in [1, 8, 32] {
        let fe = FrontEnd::connect(&daemon);
        let fds = vec![std::os::fd::AsRawFd::as_raw_fd(&gift); count];
        let _ = fe.channel().send_message(request::GET_FEATURES, FLAG_VERSION, 0, &[], &fds);
        let _ = fe.channel().send_message(request::SET_OWNER, FLAG_VERSION, 0, &[], &fds);
        drop(fe);
        assert_serves(&daemon);
    }
    at_rest.assert_again(&daemon);
}

/// Every piece of a message may bring some; more in all than any message has end the connection.
#[test]
fn a_message_has_few_descriptors() {
    let daemon = Daemon::with_disk(DISK, "");
    let gift = std::fs::File::open("/dev/null").unwrap();
    let header = [request::SET_MEM_TABLE, FLAG_VERSION, 4096].map(u32::to_ne_bytes).concat();
    for counts in [&[33][..], &[253], &[0, 16, 18]] {
        let channel = Channel::new(daemon.connect(), daemon.diagnosis());
        for (n, count) in counts.iter().enumerate() {
            let fds = vec![std::os::fd::AsRawFd::as_raw_fd(&gift); *count];
            let bytes = if n == 0 { &header[..] } else { &[0] };
            channel.send_bytes(bytes, &fds).unwrap();
        }
        channel.expect_hangup();
        let said = format!("{} descriptors with one message", counts.iter().sum::<usize>());
        eventually(&format!("{said:?} in {}", daemon.log()), || daemon.log().contains(&said));
    }
    assert_serves(&daemon);
}

/// A stream has no messages in it: each may come byte by byte, its descriptors with the first.
#[test]
fn a_message_may_come_in_pieces() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let base = fe.stop_queue(REQUESTS);
    let queue = fe.queue(REQUESTS);
    let fds = [queue.call_fd(), queue.kick_fd()].map(std::os::fd::AsRawFd::as_raw_fd);
    drop(queue);
    let index = (REQUESTS as u64).to_ne_bytes();
    for (number, payload, fds) in [
        (request::SET_VRING_CALL, &index[..], &fds[..1]),
        (request::SET_VRING_KICK, &index, &fds[1..]),
        (request::SET_VRING_BASE, &vring_state(REQUESTS, base.into()), &[]),
    ] {
        let header = [number, FLAG_VERSION, payload.len() as u32].map(u32::to_ne_bytes).concat();
        for (n, byte) in [&header[..], payload].concat().into_iter().enumerate() {
            let with = if n == 0 { fds } else { &[] };
            fe.channel().send_bytes(&[byte], with).unwrap();
        }
    }
    fe.tell(REQUESTS, RingMessage::Num, base);
    fe.tell(REQUESTS, RingMessage::Addr, base);
    round_trip(&lun, 0, 8, 1);
}

/// A signal or a passing shortage of memory at any call that receives a message or answers it: life goes on.
#[test]
fn signals_and_shortages_do_not_end_a_connection() {
    let probe = ["-qq", "-e", "trace=none", "true"];
    let probe = std::process::Command::new("strace").args(probe).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return mounts::skipped("connections under EINTR and ENOMEM: strace does not work here");
    }
    for fault in ["recvmsg:error=EINTR", "recvmsg:error=ENOMEM", "sendmsg:error=EINTR"] {
        for when in ["1+2", "2+2", "1+3"] {
            let inject = format!("inject={fault}:when={when}");
            println!("{inject}");
            let scratch = Scratch::new();
            let disk = scratch.image("disk.img", DISK);
            // As a grandchild, so that the daemon is what is started and ended.
            let arguments = ["-D", "-f", "-qq", "-o", "/dev/null", "-e", &inject];
            // The filter of system calls takes a call that strace replaces for a forbidden one.
            let daemon = Daemon::builder(&scratch).disk(&disk, "").arg("--seccomp=none");
            let daemon = daemon.under("strace", &arguments).spawn();
            let builder = FrontEnd::builder().inflight();
            let fe = builder.memory(RegionSpec::with_gaps(), MemoryMessage::Slots).connect(&daemon);
            round_trip(&fe.ready_lun(0, 0), 0, 8, 1);
            drop(fe);
            assert_serves(&daemon);
        }
    }
}

// ----- reconnecting ---------------------------------------------------------------------------

#[test]
fn reconnecting_leaks_neither_threads_nor_descriptors() {
    let daemon = Daemon::with_disk(DISK, "");
    let at_rest = AtRest::of(&daemon);
    for round in 0..30 {
        match round % 3 {
            0 => assert_serves(&daemon),
            1 => drop(FrontEnd::builder().queues(16).connect(&daemon)),
            _ => drop(
                FrontEnd::builder()
                    .queues(4)
                    .memory(RegionSpec::with_gaps(), MemoryMessage::Slots)
                    .connect(&daemon),
            ),
        }
    }
    at_rest.assert_again(&daemon);
}

#[test]
fn a_connection_may_break_at_any_message() {
    let daemon = Daemon::with_disk(DISK, "");
    let at_rest = AtRest::of(&daemon);
    for cut in 0..24 {
        let stream = daemon.connect();
        let limited = break_after(&stream, cut);
        drop(stream);
        limited.join().unwrap();
    }
    assert_serves(&daemon);
    at_rest.assert_again(&daemon);
}

/// Sends the first `cut` messages of an ordinary setup, by hand, and hangs up.
fn break_after(stream: &std::os::unix::net::UnixStream, cut: usize) -> thread::JoinHandle<()> {
    use request::*;
    let stream = stream.try_clone().unwrap();
    thread::spawn(move || {
        let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let mem = GuestMemory::new(&RegionSpec::single());
        let regions = mem.regions();
        let table = frontend::protocol::memory_table(&regions);
        let user = |address| mem.user_address(address);
        let ring = frontend::protocol::vring_address(2, user(0), user(0x4000), user(0x3000));
        let features = (feature::VERSION_1 | feature::PROTOCOL_FEATURES).to_ne_bytes();
        let protocol = protocol_feature::MQ.to_ne_bytes();
        let kick_fd = [std::os::fd::AsRawFd::as_raw_fd(&kick)];
        let two = 2_u64.to_ne_bytes();
        let (size, base, on) = (vring_state(2, 128), vring_state(2, 0), vring_state(2, 1));
        let script: [(u32, &[u8], &[i32]); 12] = [
            (GET_FEATURES, &[], &[]),
            (GET_PROTOCOL_FEATURES, &[], &[]),
            (SET_PROTOCOL_FEATURES, &protocol, &[]),
            (SET_OWNER, &[], &[]),
            (SET_FEATURES, &features, &[]),
            (SET_MEM_TABLE, &table, &[regions[0].fd]),
            (SET_VRING_NUM, &size, &[]),
            (SET_VRING_BASE, &base, &[]),
            (SET_VRING_ADDR, &ring, &[]),
            (SET_VRING_KICK, &two, &kick_fd),
            (SET_VRING_CALL, &two, &kick_fd),
            (SET_VRING_ENABLE, &on, &[]),
        ];
        for (step, (number, payload, fds)) in script.iter().enumerate() {
            // Every message is cut twice: before it, and in its middle.
            let header = [*number, FLAG_VERSION, payload.len() as u32].map(u32::to_ne_bytes);
            let bytes = [&header.concat()[..], payload].concat();
            if step * 2 == cut {
                return;
            }
            let part = if step * 2 + 1 == cut { bytes.len() / 2 } else { bytes.len() };
            send_with_fds(&stream, &bytes[..part], fds);
            if part < bytes.len() {
                return;
            }
        }
    })
}

fn send_with_fds(stream: &std::os::unix::net::UnixStream, bytes: &[u8], fds: &[i32]) {
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
    let fd = std::os::fd::AsRawFd::as_raw_fd(stream);
    let iov = [std::io::IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let _ = sendmsg::<UnixAddr>(fd, &iov, control, MsgFlags::MSG_NOSIGNAL, None);
}

#[test]
fn a_connection_may_break_with_requests_in_flight() {
    let daemon = Daemon::with_disk(DISK, "");
    let at_rest = AtRest::of(&daemon);
    for _ in 0..10 {
        let fe = FrontEnd::builder().queues(4).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        for queue in 0..4 {
            let mut queue = fe.queue(REQUESTS + queue);
            for number in 0..40 {
                let read = lun.request(cdb::read10(number * 128, 128)).data_in(64 << 10);
                queue.enqueue(&read.exchange());
            }
            queue.publish();
        }
    }
    assert_serves(&daemon);
    at_rest.assert_again(&daemon);
}

// ----- memory ---------------------------------------------------------------------------------

#[test]
fn buffers_lie_in_any_region() {
    let daemon = Daemon::with_disk(DISK, "");
    for message in [MemoryMessage::Table, MemoryMessage::Slots] {
        let layout = RegionSpec::with_gaps();
        let fe = FrontEnd::builder().memory(layout.clone(), message).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        for (number, region) in layout.iter().enumerate() {
            let lun = lun.with_shape(Shape::default().in_region(region.base));
            round_trip(&lun, 128, 128, number as u64);
        }
        // Parts of one request in different regions.
        let scattered = Shape { writable: Cuts::DataEvery(4096), ..Shape::default() };
        round_trip(&lun.with_shape(scattered), 0, 200, 99);
    }
}

/// Neighbouring regions of different files: a buffer across the seam is one buffer to the driver.
#[test]
fn a_buffer_may_lie_across_two_regions() {
    const SEAM: u64 = 80 * MIB;
    const BEFORE: u64 = 1000;
    let daemon = Daemon::with_disk(DISK, "");
    let layout = vec![
        RegionSpec::new(0, 8 * MIB),
        RegionSpec::new(SEAM - 4 * MIB, 4 * MIB).reserved(),
        RegionSpec::new(SEAM, 4 * MIB).reserved(),
    ];
    let fe = FrontEnd::builder().memory(layout, MemoryMessage::Table).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let data = blocks(0, 8, 512, 7);
    lun.write10(0, &data);

    let header = lun.request(cdb::read10(0, 8)).header();
    let at = SEAM - BEFORE;
    let mem = fe.memory();
    // The request header across the seam, the response and its data across it, one at a time.
    for (request_at, response_at) in
        [(SEAM - 20, SEAM + 8192), (SEAM - 8192, SEAM - 50), (SEAM - 8192, at)]
    {
        mem.write(request_at, &header);
        let len = (RESPONSE_HEADER + data.len()) as u32;
        mem.write(response_at, &vec![0xee; len as usize]);
        let chain = [
            Desc { address: request_at, len: REQUEST_HEADER as u32, writable: false },
            Desc { address: response_at, len, writable: true },
        ];
        let mut queue = fe.queue(REQUESTS);
        let head = queue.ring_mut().add(&chain).unwrap();
        queue.publish();
        let used = queue.wait_raw(head);
        assert_eq!(used.len, len);
        let answer = mem.read(response_at, len as usize);
        assert_eq!(answer[..SENSE_OFFSET], [0; SENSE_OFFSET], "GOOD");
        assert_same(&answer[RESPONSE_HEADER..], &data, "the data across the seam");
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn memory_comes_and_goes_while_requests_run() {
    const PLUGGED: u64 = 64 * GIB;
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder()
        .queues(2)
        .memory(RegionSpec::with_gaps(), MemoryMessage::Slots)
        .connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mapped = daemon.mappings("guest-memory");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Also when this thread fails, or the other one would never end.
        let _end = SetOnDrop(&done);
        let background = scope.spawn(|| {
            let lun = lun.on_queue(REQUESTS + 1);
            let mut rounds = 0;
            while !done.load(Relaxed) {
                round_trip(&lun, 8192, 256, rounds);
                rounds += 1;
            }
            rounds
        });
        for round in 0..40 {
            let spec = RegionSpec::new(PLUGGED + round % 3 * GIB, 2 * MIB).reserved();
            fe.add_region(&spec);
            round_trip(&lun.with_shape(Shape::default().in_region(spec.base)), 0, 128, round);
            fe.remove_region(spec.base);
        }
        done.store(true, Relaxed);
        assert!(background.join().unwrap() > 0, "requests ran meanwhile");
    });
    eventually("unplugged memory to be unmapped", || daemon.mappings("guest-memory") == mapped);
}

/// Places the ring of a stopped queue.
fn move_ring(fe: &FrontEnd, queue: usize, desc: u64, avail: u64, used: u64) {
    fe.queue(queue).ring_mut().move_to(RingAddresses { desc, avail, used });
}

/// A region that a ring lies in may go and come back: QEMU does so when it changes a region's length. Nothing is done
/// meanwhile, and nothing of it is lost: neither a kick nor an answer.
#[test]
fn a_ring_waits_for_its_memory() {
    const PLUGGED: u64 = 64 * GIB;
    let daemon = Daemon::with_disk(DISK, "fault=read:delay-ms-100");
    let layout = vec![RegionSpec::new(0, 8 * MIB), RegionSpec::new(PLUGGED, 4 * MIB).reserved()];
    for (what, layout, base, in_plugged) in [
        ("the ring alone", layout.clone(), PLUGGED, false),
        ("the ring and its buffers", layout, PLUGGED, true),
        ("all there is", RegionSpec::single(), 0, false),
    ] {
        println!("{what}");
        let fe = FrontEnd::builder().memory(layout, MemoryMessage::Slots).connect(&daemon);
        let at = fe.stop_queue(REQUESTS);
        if base == PLUGGED {
            let place = |len| fe.memory().alloc_in(PLUGGED, len, 4096, 0);
            let [desc, avail, used] = fe.queue(REQUESTS).ring().lengths().map(place);
            move_ring(&fe, REQUESTS, desc, avail, used);
            fe.start_queue(REQUESTS, 0);
        } else {
            fe.start_queue(REQUESTS, at);
        }
        let lun = fe.ready_lun(0, 0);
        let data = blocks(8, 8, 512, 3);
        lun.write10(8, &data);
        let shape = Shape { region: in_plugged.then_some(PLUGGED), ..Shape::default() };
        let lun = lun.with_shape(shape);
        for round in 0..3 {
            let read = lun.request(cdb::read10(8, 8)).data_in(4096);
            let wrong = lun.request(cdb::read10(u32::MAX, 1)).data_in(512);
            let early: Vec<_> = (0..3).map(|_| lun.submit(&read)).collect();
            fe.take_away(base);
            let used = fe.queue(REQUESTS).ring().used_idx();
            let late = [lun.submit(&wrong), lun.submit(&read)];
            if round > 0 {
                thread::sleep(A_MOMENT);
            }
            assert_eq!(fe.queue(REQUESTS).ring().used_idx(), used, "answered without memory");
            fe.give_back(base);
            for ticket in early {
                assert_same(fe.wait(ticket).expect_good().data(), &data, "given before");
            }
            fe.wait(late[0]).expect_sense(scsi::sense::LBA_OUT_OF_RANGE);
            assert_same(fe.wait(late[1]).expect_good().data(), &data, "given meanwhile");
        }
        // It can also be stopped while its memory is away.
        fe.take_away(base);
        fe.stop_queue(REQUESTS);
        fe.give_back(base);
    }
}

/// What lies in a ring that is out of memory cannot be looked at: its own front end's functions wait until the memory is
/// back, another's reset does not, and what they end is not begun.
#[test]
fn functions_reach_what_lies_in_memory_that_is_away() {
    const PLUGGED: u64 = 64 * GIB;
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", DISK);
    let daemon = Daemon::builder(&scratch).disk(&disk, "").ports(2).spawn();
    let layout = vec![RegionSpec::new(0, 8 * MIB), RegionSpec::new(PLUGGED, 4 * MIB).reserved()];
    let fe = FrontEnd::builder().memory(layout, MemoryMessage::Slots).connect(&daemon);
    fe.stop_queue(REQUESTS);
    let place = |len| fe.memory().alloc_in(PLUGGED, len, 4096, 0);
    let [desc, avail, used] = fe.queue(REQUESTS).ring().lengths().map(place);
    move_ring(&fe, REQUESTS, desc, avail, used);
    fe.start_queue(REQUESTS, 0);
    let lun = fe.ready_lun(0, 0);
    for (function, ends) in [
        (Tmf::AbortTask, scsi::response::ABORTED),
        (Tmf::AbortTaskSet, scsi::response::ABORTED),
        (Tmf::LogicalUnitReset, scsi::response::RESET),
    ] {
        let read = lun.request(cdb::read10(8, 8)).data_in(4096).tag(77);
        fe.take_away(PLUGGED);
        let ticket = lun.submit(&read);
        let asked = fe.queue(CONTROL_QUEUE).submit(&function.exchange(lun.address, 77));
        let early = fe.queue(CONTROL_QUEUE).wait_for(Duration::from_millis(100));
        assert!(early.is_none(), "{function:?} is answered though nobody can see its command");
        fe.give_back(PLUGGED);
        let code = control::tmf_response(&fe.queue(CONTROL_QUEUE).wait(asked));
        assert_eq!(code, scsi::response::FUNCTION_COMPLETE, "{function:?}");
        let answer = fe.wait(ticket);
        assert_eq!(answer.response, ends, "{function:?}");
        assert_same(&answer.buffer, &[frontend::queue::POISON; 4096], "it never began");
        lun.clear_unit_attentions();
        lun.read16(8, 8);
    }
    let other = FrontEnd::builder().connect_to(&daemon, 1);
    fe.take_away(PLUGGED);
    let ticket = lun.submit(&lun.request(cdb::read10(8, 8)).data_in(4096));
    let code = other.tmf(Tmf::LogicalUnitReset, lun.address, 0);
    assert_eq!(code, scsi::response::FUNCTION_COMPLETE, "it waits for another guest's memory");
    fe.give_back(PLUGGED);
    assert_eq!(fe.wait(ticket).response, scsi::response::RESET);
}

/// A ring whose memory was not told of yet starts when it is.
#[test]
fn a_ring_may_be_told_of_before_its_memory() {
    let daemon = Daemon::with_disk(DISK, "");
    let layout = RegionSpec::with_gaps();
    let fe = FrontEnd::builder().memory(layout.clone(), MemoryMessage::Slots).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let base = fe.stop_queue(REQUESTS);
    layout.iter().for_each(|region| fe.take_away(region.base));
    fe.start_queue(REQUESTS, base);
    let ticket = lun.submit(&lun.request(cdb::test_unit_ready()));
    layout.iter().for_each(|region| fe.give_back(region.base));
    fe.wait(ticket).expect_good();
}

/// Each part of a ring across two, and more, regions that touch each other in the guest.
#[test]
fn a_ring_may_lie_across_regions() {
    const SEAM: u64 = 80 * MIB;
    let daemon = Daemon::with_disk(DISK, "");
    let layout = vec![
        RegionSpec::new(0, 8 * MIB),
        RegionSpec::new(SEAM - 4 * MIB, 4 * MIB).at_file_offset(MIB).reserved(),
        RegionSpec::new(SEAM, 4096).at_file_offset(4096).reserved(),
        RegionSpec::new(SEAM + 4096, 4 * MIB).reserved(),
    ];
    for event_idx in [true, false] {
        let builder = FrontEnd::builder().queue_size(512).event_idx(event_idx);
        let fe = builder.memory(layout.clone(), MemoryMessage::Slots).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let old = fe.queue(REQUESTS).ring().addresses();
        for (what, desc, avail, used) in [
            ("the descriptors", SEAM - 4096, old.avail, old.used),
            ("the available ring", old.desc, SEAM - 514, old.used),
            ("the used ring", old.desc, old.avail, SEAM - 2052),
            ("everything", SEAM - 4096, SEAM + 5000, SEAM + 4096 + 2048),
        ] {
            println!("{what}");
            fe.stop_queue(REQUESTS);
            move_ring(&fe, REQUESTS, desc, avail, used);
            fe.start_queue(REQUESTS, 0);
            for round in 0..40 {
                let reads: Vec<_> =
                    (0..120).map(|n| lun.request(cdb::read10(n % 64, 1)).data_in(512)).collect();
                for response in fe.run_all(REQUESTS, &reads) {
                    response.expect_good();
                }
                if round == 20 {
                    fe.take_away(SEAM);
                    fe.give_back(SEAM);
                }
            }
            round_trip(&lun, 0, 64, 1);
        }
    }
}

/// The data of a command in flight stays mapped until it is there; its response waits until its memory is there.
#[test]
fn memory_can_be_removed_under_a_command() {
    const PLUGGED: u64 = 64 * GIB;
    let mut daemon = Daemon::with_disk(DISK, "fault=read:delay-ms-500");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mapped = daemon.mappings("guest-memory");
    for response_goes in [false, true] {
        fe.add_region(&RegionSpec::new(PLUGGED, MIB).reserved());
        let header = lun.request(cdb::read10(0, 8)).header();
        let at = fe.memory().alloc(REQUEST_HEADER + RESPONSE_HEADER, 8, 0);
        fe.memory().write(at, &header);
        let stays = at + REQUEST_HEADER as u64;
        fe.memory().write(stays, &[0xa5; RESPONSE_HEADER]);
        let response = if response_goes { PLUGGED + 4096 } else { stays };
        let desc = |address, len: usize, writable| Desc { address, len: len as u32, writable };
        let chain = [
            desc(at, REQUEST_HEADER, false),
            desc(response, RESPONSE_HEADER, true),
            desc(PLUGGED, 4096, true),
        ];
        let mut queue = fe.queue(REQUESTS);
        let head = queue.ring_mut().add(&chain).unwrap();
        queue.publish();
        drop(queue);
        thread::sleep(A_MOMENT);
        fe.remove_region(PLUGGED);
        let len = 4096 + RESPONSE_HEADER as u32;
        if response_goes {
            // Given back without its response it would look like one that has succeeded.
            let unmapped = || daemon.mappings("guest-memory") == mapped;
            eventually("the end of the command and of its memory", unmapped);
            assert_eq!(fe.queue(REQUESTS).wait_raw_for(head, A_MOMENT), None);
            let answer = fe.memory().read(stays, RESPONSE_HEADER);
            assert!(answer.iter().all(|byte| *byte == 0xa5), "nothing is written elsewhere");
            lun.test_unit_ready();
            fe.add_region(&RegionSpec::new(PLUGGED, MIB).reserved());
        }
        let used = fe.queue(REQUESTS).wait_raw(head);
        let answer = fe.memory().read(response, RESPONSE_HEADER);
        assert_eq!((answer[10], answer[11], used.len), (0, 0, len));
        fe.memory().free(at);
        if response_goes {
            fe.remove_region(PLUGGED);
        }
        eventually("removed memory to be unmapped", || daemon.mappings("guest-memory") == mapped);
    }
    drop(fe);
    assert!(daemon.is_running(), "{}", daemon.log());
    assert_serves(&daemon);
}

#[test]
fn memory_that_was_removed_is_not_touched() {
    const PLUGGED: u64 = 64 * GIB;
    let mut daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    fe.add_region(&RegionSpec::new(PLUGGED, MIB).reserved());
    fe.remove_region(PLUGGED);
    // The descriptors of a driver that has lost track: no answer is possible, life goes on.
    let header = lun.request(cdb::test_unit_ready()).header();
    let at = fe.memory().alloc(REQUEST_HEADER, 8, 0);
    fe.memory().write(at, &header);
    let mut queue = fe.queue(REQUESTS);
    let chain = [
        Desc { address: at, len: REQUEST_HEADER as u32, writable: false },
        Desc { address: PLUGGED, len: RESPONSE_HEADER as u32, writable: true },
    ];
    queue.ring_mut().add(&chain).unwrap();
    queue.publish();
    thread::sleep(A_MOMENT);
    drop(queue);
    drop(fe);
    assert!(daemon.is_running(), "{}", daemon.log());
    assert_serves(&daemon);
}

// ----- chains ---------------------------------------------------------------------------------

#[test]
fn chains_in_indirect_tables() {
    let daemon = Daemon::with_disk(DISK, "");
    for builder in [FrontEnd::builder(), FrontEnd::builder().event_idx(false)] {
        let fe = builder.queue_size(16).connect(&daemon);
        let lun = fe.ready_lun(0, 0).with_shape(Shape::default().indirect());
        round_trip(&lun, 0, 128, 1);
        // Longer than the ring itself: 5.6.6 leaves the length to seg_max, 2.7.5.3.1 does not
        // bound an indirect table by the queue size for the devices that exist.
        let cuts = Cuts::DataEvery(1024);
        let shape = Shape { readable: cuts.clone(), writable: cuts, ..Shape::default() };
        round_trip(&lun.with_shape(shape.indirect()), 512, 128, 2);
        // As many requests as the ring has entries, though each has three descriptors.
        let reads: Vec<_> =
            (0..16).map(|n| lun.request(cdb::read10(n * 8, 8)).data_in(4096)).collect();
        let expected = lun.read10(0, 128);
        let found: Vec<u8> =
            fe.run_all(REQUESTS, &reads).into_iter().flat_map(|r| r.expect_good().buffer).collect();
        assert_same(&found, &expected, "requests through indirect tables");
    }
}

/// VIRTIO 1.3, 2.7.5.3.2: descriptors may be followed by one indirect descriptor, the last of the chain.
#[test]
fn an_indirect_table_may_end_a_chain() {
    const SEAM: u64 = 80 * MIB;
    let daemon = Daemon::with_disk(DISK, "");
    let layout = vec![
        RegionSpec::new(0, 8 * MIB),
        RegionSpec::new(SEAM - 4 * MIB, 4 * MIB).reserved(),
        RegionSpec::new(SEAM, 4 * MIB).reserved(),
    ];
    let fe = FrontEnd::builder().memory(layout, MemoryMessage::Table).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let data = blocks(0, 8, 512, 7);
    lun.write10(0, &data);
    let mem = fe.memory();
    let header_at = mem.alloc(REQUEST_HEADER, 8, 0);
    mem.write(header_at, &lun.request(cdb::read10(0, 8)).header());
    let (response, len) = (mem.alloc(RESPONSE_HEADER, 8, 0), data.len() as u32);
    let data_at = mem.alloc(data.len(), 8, 0);
    let desc = |address, len, writable| Desc { address, len, writable };
    let chain = [
        desc(header_at, 20, false),
        desc(header_at + 20, REQUEST_HEADER as u32 - 20, false),
        desc(response, RESPONSE_HEADER as u32, true),
        desc(data_at, 512, true),
        desc(data_at + 512, len - 512, true),
    ];
    let inside = mem.alloc(16 * chain.len(), 16, 0);
    // Also across two regions, and with more entries than the ring has left.
    for table in [inside, SEAM - 16, SEAM - 32] {
        for direct in 0..chain.len() {
            mem.write(data_at, &vec![0xee; data.len()]);
            mem.write(response, &[0xee; RESPONSE_HEADER]);
            let (first, rest) = chain.split_at(direct);
            mem.write(table, &indirect_table(rest));
            let raw = |(n, d): (usize, &Desc)| RawDesc {
                address: d.address,
                len: d.len,
                flags: DESC_F_NEXT | if d.writable { DESC_F_WRITE } else { 0 },
                next: n as u16 + 1,
            };
            let mut descs: Vec<_> = first.iter().enumerate().map(raw).collect();
            // 2.7.5.3.2: WRITE means nothing there.
            let flags = DESC_F_INDIRECT | if direct % 2 == 0 { 0 } else { DESC_F_WRITE };
            descs.push(RawDesc { address: table, len: 16 * rest.len() as u32, flags, next: 0 });
            let mut queue = fe.queue(REQUESTS);
            let head = queue.ring_mut().add_raw(&descs);
            queue.publish();
            let used = queue.wait_raw(head);
            assert_eq!(used.len, RESPONSE_HEADER as u32 + len, "{direct} direct descriptors");
            assert_eq!(mem.read(response, SENSE_OFFSET), [0; SENSE_OFFSET], "GOOD");
            assert_same(&mem.read(data_at, data.len()), &data, "what was read");
        }
    }
}

/// A legacy driver has header and response in a descriptor each (VIRTIO 1.3 5.6.6.4), and old firmware made these longer
/// than they must be. The data is in other descriptors.
#[test]
fn legacy_firmware_pads_headers() {
    let daemon = Daemon::with_disk(DISK, "");
    let legacy = FrontEnd::builder().feature(feature::VERSION_1, false);
    let fe = legacy.clone().order(Order::Legacy).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let data = blocks(0, 8, 512, 7);
    for padding in [0_usize, 1, 13, 4096] {
        for write in [true, false] {
            let cdb = if write { cdb::write10(0, 8) } else { cdb::read10(0, 8) };
            let mem = fe.memory();
            let place = |len| mem.alloc(len, 8, 0);
            let (header, response) = (REQUEST_HEADER + padding, RESPONSE_HEADER + padding);
            let (header_at, response_at) = (place(header), place(response));
            let data_at = place(data.len());
            mem.write(header_at, &[0x77; 8192][..header]);
            mem.write(header_at, &lun.request(cdb).header());
            mem.write(response_at, &[0x77; 8192][..response]);
            mem.write(data_at, &if write { data.clone() } else { vec![0xee; data.len()] });
            let desc = |address, len: usize, writable| Desc { address, len: len as u32, writable };
            let mut chain = vec![desc(header_at, header, false), desc(response_at, response, true)];
            chain.insert(if write { 1 } else { 2 }, desc(data_at, data.len(), !write));
            let mut queue = fe.queue(REQUESTS);
            let head = queue.ring_mut().add(&chain).unwrap();
            queue.publish();
            queue.wait_raw(head);
            let answer = mem.read(response_at, response);
            let what = format!("padding {padding}, write {write}");
            assert_eq!(answer[4..SENSE_OFFSET], [0; SENSE_OFFSET - 4], "{what}");
            assert!(answer[RESPONSE_HEADER..].iter().all(|b| *b == 0x77), "{what}");
            assert_same(&mem.read(data_at, data.len()), &data, &what);
        }
    }
    drop(fe);
    // With ANY_LAYOUT, or as VERSION_1 has it, what follows a header is data.
    let fe = legacy.feature(feature::ANY_LAYOUT, true).connect(&daemon);
    round_trip(&fe.ready_lun(0, 0).with_shape(Shape::joined()), 0, 8, 1);
}

/// VIRTIO 1.3, 2.7.4.2: the device makes no assumption about the framing of messages.
#[test]
fn headers_and_data_may_be_cut_anywhere() {
    const READABLE: usize = REQUEST_HEADER + 512;
    const WRITABLE: usize = RESPONSE_HEADER + 512;
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for cut in 1..READABLE {
        let shape = Shape { readable: Cuts::At(vec![cut]), ..Shape::default() }.skewed(cut % 5);
        let data = blocks(3, 1, 512, cut as u64);
        lun.with_shape(shape).write10(3, &data);
        assert_same(&lun.read10(3, 1), &data, &format!("a write cut at {cut}"));
    }
    let data = lun.read10(3, 1);
    for cut in 1..WRITABLE {
        let readable = Cuts::At(vec![cut % REQUEST_HEADER]);
        let shape = Shape { readable, writable: Cuts::At(vec![cut]), ..Shape::default() };
        let found = lun.with_shape(shape.skewed(cut % 7)).read10(3, 1);
        assert_same(&found, &data, &format!("a read cut at {cut}"));
    }
}

#[test]
fn every_byte_may_have_its_own_descriptor() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queue_size(1024).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for step in [1, 2, 3, 7, 13, 50, 51, 52, 107, 108, 109, 511, 513] {
        for indirect in [false, true] {
            let cuts = Cuts::Every(step);
            let shape =
                Shape { readable: cuts.clone(), writable: cuts, indirect, ..Shape::default() };
            round_trip(&lun.with_shape(shape.skewed(1)), 5, 1, step as u64);
        }
    }
    round_trip(&lun.with_shape(Shape::joined()), 5, 64, 0);
    round_trip(&lun.with_shape(Shape::joined().indirect()), 5, 64, 1);
}

#[test]
fn sense_data_may_be_cut_anywhere() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for cut in 1..RESPONSE_HEADER {
        let shape = Shape { writable: Cuts::At(vec![cut]), ..Shape::default() };
        let response = lun.with_shape(shape).run_in(cdb::read10(u32::MAX, 1), 512);
        response.expect_sense(scsi::sense::LBA_OUT_OF_RANGE);
    }
}

// ----- notifications --------------------------------------------------------------------------

#[test]
fn no_notification_is_lost() {
    const REQUESTS_EACH: usize = 4000;
    let daemon = Daemon::with_disk(DISK, "");
    for event_idx in [true, false] {
        let fe = FrontEnd::builder().event_idx(event_idx).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let mut rng = Rng::new(0xe4e47 + u64::from(event_idx));
        let mut queue = fe.queue(REQUESTS);
        let before = queue.notifications();
        let mut sent = 0;
        while sent < REQUESTS_EACH {
            // Batches of all sizes; half of the time the next one comes before this is done.
            for _ in 0..rng.between(1, 24) {
                let block = rng.below(1000) as u32;
                let read = lun.request(cdb::read10(block, 1)).data_in(512);
                queue.enqueue(&read.exchange());
                sent += 1;
            }
            queue.publish();
            match rng.below(4) {
                0 => drop(queue.wait_all()),
                1 => drop(queue.wait_any()),
                2 => queue.collect(),
                _ => {}
            }
        }
        queue.wait_all();
        let after = queue.notifications();
        println!("event_idx {event_idx}: {after:?}");
        assert_eq!(after.completions - before.completions, sent as u64);
        assert!(after.calls - before.calls <= sent as u64, "more interrupts than completions");
    }
}

/// One at a time, so that every single answer depends on its kick and on its interrupt.
#[test]
fn no_notification_is_lost_in_lock_step() {
    let daemon = Daemon::with_disk(DISK, "");
    for event_idx in [true, false] {
        let fe = FrontEnd::builder().event_idx(event_idx).queue_size(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        for _ in 0..3000 {
            lun.test_unit_ready();
        }
    }
}

#[test]
fn interrupts_come_when_they_are_wanted() {
    const BATCH: u16 = 32;
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut queue = fe.queue(REQUESTS);
    for _ in 0..50 {
        queue.drain_calls();
        // Wish first, requests later: the interrupt comes with the last completion.
        queue.ring_mut().arm(BATCH);
        for _ in 0..BATCH {
            queue.enqueue(&lun.request(cdb::test_unit_ready()).exchange());
        }
        queue.publish();
        assert_eq!(queue.wait_batch(BATCH).len(), usize::from(BATCH), "woken too early");
    }
    // A driver that polls is left alone.
    queue.drain_calls();
    queue.ring_mut().set_polling(true);
    for _ in 0..200 {
        queue.submit(&lun.request(cdb::test_unit_ready()).exchange());
        queue.wait_all();
    }
    assert_eq!(queue.drain_calls(), 0, "interrupts for a driver that polls");
}

#[test]
fn a_driver_without_event_idx_can_switch_interrupts_off() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().event_idx(false).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut queue = fe.queue(REQUESTS);
    queue.ring_mut().set_polling(true);
    queue.drain_calls();
    for _ in 0..200 {
        queue.submit(&lun.request(cdb::test_unit_ready()).exchange());
        queue.wait_all();
    }
    assert_eq!(queue.drain_calls(), 0, "interrupts though VIRTQ_AVAIL_F_NO_INTERRUPT is set");
    queue.ring_mut().set_polling(false);
    queue.submit(&lun.request(cdb::test_unit_ready()).exchange());
    queue.wait_all();
}

#[test]
fn a_queue_without_a_call_descriptor_is_polled() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let payload = (REQUESTS as u64 | VRING_NO_FD).to_ne_bytes();
    fe.set(request::SET_VRING_CALL, &payload, &[], false);
    fe.barrier();
    fe.queue(REQUESTS).ring_mut().set_polling(true);
    round_trip(&lun, 0, 64, 1);
    assert_eq!(fe.queue(REQUESTS).drain_calls(), 0);
}

// ----- queues ---------------------------------------------------------------------------------

#[test]
fn many_queues_work_in_parallel() {
    const QUEUES: usize = 8;
    const BLOCKS_EACH: u64 = 4096;
    let daemon = Daemon::with_disk(QUEUES as u64 * BLOCKS_EACH * 512, "");
    let fe = FrontEnd::builder()
        .queues(QUEUES)
        .memory(RegionSpec::with_gaps(), MemoryMessage::Slots)
        .connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    thread::scope(|scope| {
        for number in 0..QUEUES {
            let lun = lun.on_queue(REQUESTS + number);
            scope.spawn(move || hammer(&lun, number as u64 * BLOCKS_EACH, BLOCKS_EACH));
        }
    });
}

/// Writes and reads back random ranges of one's own part of the disk, many at a time.
fn hammer(lun: &Lun<'_>, start: u64, len: u64) {
    let mut rng = Rng::new(start + 1);
    for round in 0..60 {
        let ranges: Vec<(u64, u64)> = (0..len / 256)
            .map(|part| (start + part * 256 + rng.below(128), rng.between(1, 128)))
            .collect();
        let data = |&(lba, count): &(u64, u64)| blocks(lba, count as usize, 512, round);
        let writes: Vec<_> = ranges
            .iter()
            .map(|r| lun.request(cdb::write10(r.0 as u32, r.1 as u16)).data_out(data(r)))
            .collect();
        for response in lun.front_end().run_all(lun.queue, &writes) {
            response.expect_good();
        }
        let reads: Vec<_> = ranges
            .iter()
            .map(|r| lun.request(cdb::read10(r.0 as u32, r.1 as u16)).data_in(r.1 as usize * 512))
            .collect();
        for (range, response) in ranges.iter().zip(lun.front_end().run_all(lun.queue, &reads)) {
            let found = response.expect_good().buffer;
            assert_same(&found, &data(range), &format!("blocks {range:?} in round {round}"));
        }
    }
}

#[test]
fn all_request_queues_can_be_used_at_once() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queues(16).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let tickets: Vec<_> = (0..16)
        .flat_map(|number| {
            let lun = lun.on_queue(REQUESTS + number);
            let read = lun.request(cdb::read10(number as u32, 8)).data_in(4096);
            (0..20).map(move |_| lun.submit(&read)).collect::<Vec<_>>()
        })
        .collect();
    for ticket in tickets {
        fe.wait(ticket).expect_good();
    }
}

#[test]
fn queues_of_every_size() {
    let daemon = Daemon::with_disk(DISK, "");
    for shift in 1..=10 {
        for event_idx in [true, false] {
            let size = 1_u16 << shift;
            let fe = FrontEnd::builder().queue_size(size).event_idx(event_idx).connect(&daemon);
            let lun = fe.ready_lun(0, 0).with_shape(Shape::joined());
            round_trip(&lun, 0, 16, u64::from(size));
            // Around the ring more than once, full all the time.
            let reads: Vec<_> = (0..usize::from(size) * 2 + 3)
                .map(|n| lun.request(cdb::read10(n as u32 % 64, 1)).data_in(512))
                .collect();
            for response in fe.run_all(REQUESTS, &reads) {
                response.expect_good();
            }
            assert_eq!(fe.tmf(Tmf::QueryTaskSet, lun.address, 0), 0);
        }
    }
}

/// The used index counts what was returned, and GET_VRING_BASE what was taken.
#[test]
fn indexes_are_exact_and_survive_a_stop() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queue_size(32).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let mut expected = fe.queue(REQUESTS).ring().published();
    for round in 0..5 {
        for _ in 0..77 {
            lun.test_unit_ready();
            expected = expected.wrapping_add(1);
            assert_eq!(fe.queue(REQUESTS).ring().used_idx(), expected);
        }
        let base = fe.stop_queue(REQUESTS);
        assert_eq!(base, expected, "round {round}");
        fe.start_queue(REQUESTS, base);
    }
    round_trip(&lun, 0, 8, 1);
}

#[test]
fn indexes_wrap_around() {
    let daemon = Daemon::with_disk(DISK, "");
    for event_idx in [true, false] {
        let fe = FrontEnd::builder().queue_size(16).event_idx(event_idx).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        fe.stop_queue(REQUESTS);
        fe.queue(REQUESTS).ring_mut().start_at(65_500);
        fe.start_queue(REQUESTS, 65_500);
        for round in 0..100 {
            round_trip(&lun, 0, 8, round);
        }
        let base = fe.stop_queue(REQUESTS);
        assert_eq!(base, 65_500_u16.wrapping_add(200));
    }
}

/// What was taken from the ring is answered before GET_VRING_BASE is; what was not, is taken
/// after the restart. Nothing is lost and nothing is done twice.
#[test]
fn stopping_a_queue_drains_it() {
    const IN_FLIGHT: usize = 42;
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for round in 0..20 {
        let submitted: Vec<Ticket> = {
            let mut queue = fe.queue(REQUESTS);
            let read = lun.request(cdb::read10(0, 256)).data_in(128 << 10);
            let tickets = (0..IN_FLIGHT).map(|_| queue.enqueue(&read.exchange())).collect();
            queue.publish();
            tickets
        };
        if round % 2 == 1 {
            fe.wait(submitted[0]).expect_good();
        }
        let base = fe.stop_queue(REQUESTS);
        assert_eq!(fe.queue(REQUESTS).ring().used_idx(), base, "taken but not answered");
        thread::sleep(Duration::from_millis(round));
        assert_eq!(fe.queue(REQUESTS).ring().used_idx(), base, "answered after the stop");
        fe.start_queue(REQUESTS, base);
        assert_eq!(fe.queue(REQUESTS).wait_all().len(), IN_FLIGHT - (round % 2) as usize);
    }
}

#[test]
fn requests_made_before_the_start_are_found_without_a_kick() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let base = fe.stop_queue(REQUESTS);
    let tickets: Vec<_> =
        (0..5).map(|_| lun.submit(&lun.request(cdb::test_unit_ready()))).collect();
    // QEMU does not promise to kick again for what was made available before.
    while fe.queue(REQUESTS).kick_fd().read().is_ok() {}
    fe.start_queue(REQUESTS, base);
    for ticket in tickets {
        fe.wait(ticket).expect_good();
    }
}

fn permutations<T: Copy>(of: &[T]) -> Vec<Vec<T>> {
    if of.is_empty() {
        return vec![vec![]];
    }
    let begin_with = |n: usize| {
        let rest = [&of[..n], &of[n + 1..]].concat();
        permutations(&rest).into_iter().map(move |rest| [&of[n..=n], &rest].concat())
    };
    (0..of.len()).flat_map(begin_with).collect()
}

/// All 720 orders, and those without SET_VRING_BASE, with requests in the ring from before and from in between; the
/// indexes begin anywhere, as those of a ring that another process has served.
#[test]
fn a_ring_starts_whatever_the_order_of_its_messages() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().order(Order::Qemu7).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let without_base: Vec<_> =
        RingMessage::ALL.into_iter().filter(|message| *message != RingMessage::Base).collect();
    let orders = [permutations(&RingMessage::ALL), permutations(&without_base)].concat();
    assert_eq!(orders.len(), 720 + 120);
    for (round, order) in orders.iter().enumerate() {
        fe.enable_queue(REQUESTS, false);
        fe.stop_queue(REQUESTS);
        let base = (round * 40_503) as u16;
        let mut queue = fe.queue(REQUESTS);
        queue.reset();
        queue.ring_mut().start_at(base);
        drop(queue);
        let ready = lun.request(cdb::test_unit_ready());
        let mut tickets = vec![lun.submit(&ready)];
        // Only the first kick was for a descriptor that may not have been passed on yet.
        while fe.queue(REQUESTS).kick_fd().read().is_ok() {}
        for (n, message) in order.iter().enumerate() {
            fe.tell(REQUESTS, *message, base);
            if n == round % order.len() {
                tickets.push(lun.submit(&ready));
            }
        }
        tickets.push(lun.submit(&ready));
        for ticket in tickets {
            fe.wait(ticket).expect_good();
        }
        assert_eq!(fe.stop_queue(REQUESTS), base.wrapping_add(3), "{order:?}");
    }
    assert!(!daemon.log().contains("broken"), "{}", daemon.log());
}

/// A ring that has taken nothing starts anew where it is told; one that has is not moved.
#[test]
fn a_ring_that_runs_may_be_told_another_size_or_base() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    fe.stop_queue(REQUESTS);
    fe.queue(REQUESTS).ring_mut().start_at(0);
    let payload = vring_state(REQUESTS, 16);
    fe.start_queue(REQUESTS, 0);
    fe.set(request::SET_VRING_NUM, &payload, &[], true);
    fe.tell(REQUESTS, RingMessage::Num, 0);
    fe.tell(REQUESTS, RingMessage::Base, 0);
    fe.barrier();
    round_trip(&lun, 0, 64, 1);
    // What it runs with already, and QEMU's SET_VRING_ADDR for the log.
    for message in [RingMessage::Num, RingMessage::Addr] {
        fe.tell(REQUESTS, message, 0);
    }
    round_trip(&lun, 0, 64, 2);
}

/// From then on it is the new one that is waited for.
#[test]
fn a_ring_that_runs_may_be_told_another_kick() {
    use std::os::fd::AsRawFd;
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    round_trip(&lun, 0, 64, 1);
    let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let payload = (REQUESTS as u64).to_ne_bytes();
    fe.set(request::SET_VRING_KICK, &payload, &[kick.as_raw_fd()], true);
    fe.barrier();
    for _ in 0..10 {
        let ticket = {
            let mut queue = fe.queue(REQUESTS);
            let ticket = queue.enqueue(&lun.request(cdb::test_unit_ready()).exchange());
            queue.ring_mut().publish();
            ticket
        };
        kick.write(1).unwrap();
        fe.wait(ticket).expect_good();
    }
}

/// With memory for requests in flight it is that which says where a ring goes on; a ring that runs is not disturbed.
#[test]
fn a_ring_that_runs_with_memory_for_requests_in_flight_keeps_its_base() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queues(1).inflight().connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    round_trip(&lun, 0, 64, 1);
    for base in [0, 7] {
        fe.tell(REQUESTS, RingMessage::Base, base);
        fe.barrier();
        round_trip(&lun, 0, 64, base.into());
    }
}

/// Bit 8 of the payload: no descriptor, so that the device has to look for itself.
#[test]
fn a_queue_without_a_kick_descriptor_is_polled() {
    let daemon = Daemon::with_disk(DISK, "fault=read:delay-ms-20");
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    for queue in [0, REQUESTS, REQUESTS + 1] {
        let base = fe.stop_queue(queue);
        let all = [RingMessage::Call, RingMessage::Num, RingMessage::Base, RingMessage::Addr];
        all.into_iter().for_each(|message| fe.tell(queue, message, base));
        let payload = (queue as u64 | VRING_NO_FD).to_ne_bytes();
        fe.set(request::SET_VRING_KICK, &payload, &[], false);
    }
    let lun = fe.ready_lun(0, 0);
    for round in 0..5 {
        round_trip(&lun, 0, 64, round);
        round_trip(&lun.on_queue(REQUESTS + 1), 64, 64, round);
        assert_eq!(fe.tmf(Tmf::QueryTaskSet, lun.address, 0), 0);
        thread::sleep(Duration::from_millis(round * 5));
    }
    assert!(fe.queue(REQUESTS).kick_fd().read().is_ok(), "nobody reads these");
    // And back to kicks.
    let base = fe.stop_queue(REQUESTS);
    fe.start_queue(REQUESTS, base);
    round_trip(&lun, 0, 64, 9);
}

#[test]
fn a_disabled_queue_rests() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for _ in 0..10 {
        fe.enable_queue(REQUESTS, false);
        let ticket = lun.submit(&lun.request(cdb::test_unit_ready()));
        round_trip(&lun.on_queue(REQUESTS + 1), 0, 8, 1);
        thread::sleep(Duration::from_millis(20));
        assert!(fe.queue(REQUESTS).try_take(ticket).is_none(), "a disabled queue was served");
        fe.enable_queue(REQUESTS, true);
        fe.wait(ticket).expect_good();
    }
}

#[test]
fn the_device_can_be_reset_and_set_up_again() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().queues(3).connect(&daemon);
    for round in 0..10 {
        let lun = fe.ready_lun(0, 0);
        round_trip(&lun, 0, 64, round);
        let read = lun.request(cdb::read10(0, 256)).data_in(128 << 10);
        for _ in 0..round * 4 {
            fe.submit(REQUESTS + 1, &read);
        }
        fe.reset_device();
        fe.start();
        // A reset of the device resets its logical units.
        let pending = fe.lun(0, 0).clear_unit_attentions();
        assert_eq!(pending, [(0x29, 0x00)], "in round {round}");
    }
}

/// Firmware boots through one request queue; the system's driver takes over with all of them.
#[test]
fn a_single_request_queue_is_enough_to_boot() {
    let daemon = Daemon::with_disk(DISK, "");
    for order in [Order::Qemu7, Order::Qemu10] {
        let builder = FrontEnd::builder().queues(4).order(order).event_idx(false);
        let mut fe = builder.start_only(&[REQUESTS]).connect(&daemon);
        round_trip(&fe.ready_lun(0, 0), 0, 8, 1);
        fe.stop();
        fe.reset_queues();
        fe.start_only(None);
        fe.start();
        let lun = fe.ready_lun(0, 0);
        round_trip(&lun.on_queue(REQUESTS + 3), 0, 8, 2);
        assert_eq!(fe.tmf(Tmf::LogicalUnitReset, lun.address, 0), 0);
    }
}

// ----- hostile drivers ------------------------------------------------------------------------

/// Chains that break the rules, with room at `data` for whatever they need.
fn unusable_chains(header: u64, data: u64) -> Vec<(&'static str, Vec<RawDesc>)> {
    const OUTSIDE: u64 = 1 << 50;
    let (request, response) = (REQUEST_HEADER as u32, RESPONSE_HEADER as u32);
    let desc = |address, len, flags, next| RawDesc { address, len, flags, next };
    let read_only = |len| desc(header, len, 0, 0);
    let first = desc(header, request, DESC_F_NEXT, 1);
    vec![
        ("no response buffer", vec![read_only(request)]),
        ("no request", vec![desc(data, response, DESC_F_WRITE, 0)]),
        (
            "a request that is too short",
            vec![desc(header, 50, DESC_F_NEXT, 1), desc(data, response, DESC_F_WRITE, 0)],
        ),
        ("a response buffer that is too short", vec![first, desc(data, 107, DESC_F_WRITE, 0)]),
        ("a response buffer of one byte", vec![first, desc(data, 1, DESC_F_WRITE, 0)]),
        ("a response buffer of no bytes", vec![first, desc(data, 0, DESC_F_WRITE, 0)]),
        (
            "a request of no bytes",
            vec![desc(header, 0, DESC_F_NEXT, 1), desc(data, response, DESC_F_WRITE, 0)],
        ),
        (
            "a request outside memory",
            vec![desc(OUTSIDE, request, DESC_F_NEXT, 1), desc(data, response, DESC_F_WRITE, 0)],
        ),
        ("a response outside memory", vec![first, desc(OUTSIDE, response, DESC_F_WRITE, 0)]),
        (
            "an address that wraps around",
            vec![first, desc(u64::MAX - 16, response, DESC_F_WRITE, 0)],
        ),
        ("a response of 4 GiB", vec![first, desc(data, u32::MAX, DESC_F_WRITE, 0)]),
        (
            "readable after writable",
            vec![desc(data, response, DESC_F_WRITE | DESC_F_NEXT, 1), read_only(request)],
        ),
        ("a loop of one", vec![desc(header, request, DESC_F_NEXT, 0)]),
        ("a loop of two", vec![first, desc(data, response, DESC_F_WRITE | DESC_F_NEXT, 0)]),
        ("a next that is out of range", vec![desc(header, request, DESC_F_NEXT, 60_000)]),
        ("an indirect table outside memory", vec![desc(OUTSIDE, 32, DESC_F_INDIRECT, 0)]),
        ("an indirect table of no bytes", vec![desc(data, 0, DESC_F_INDIRECT, 0)]),
        ("an indirect table of 17 bytes", vec![desc(data, 17, DESC_F_INDIRECT, 0)]),
        ("an indirect table of 4 GiB", vec![desc(data, !15, DESC_F_INDIRECT, 0)]),
        (
            "an indirect table with a successor behind a descriptor",
            vec![first, desc(data, 32, DESC_F_INDIRECT | DESC_F_NEXT, 2), read_only(request)],
        ),
        ("an indirect table in itself", vec![first, desc(header + 1024, 16, DESC_F_INDIRECT, 0)]),
        (
            "an indirect table with a successor",
            vec![desc(data, 32, DESC_F_INDIRECT | DESC_F_NEXT, 1), read_only(request)],
        ),
    ]
}

#[test]
fn unusable_chains_harm_nobody() {
    let mut daemon = Daemon::with_disk(DISK, "");
    let scratch_memory = |fe: &FrontEnd| {
        let lun = fe.ready_lun(0, 0);
        let header = fe.memory().alloc(4096, 4096, 0);
        fe.memory().write(header, &lun.request(cdb::test_unit_ready()).header());
        let itself = RawDesc { address: header + 1024, len: 16, flags: DESC_F_INDIRECT, next: 0 };
        fe.memory().write(header + 1024, &itself.to_bytes());
        (header, fe.memory().alloc(4096, 4096, 0))
    };
    let count = unusable_chains(0, 0).len();
    for number in 0..count {
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let (header, data) = scratch_memory(&fe);
        let (what, chain) = unusable_chains(header, data).swap_remove(number);
        let mut queue = fe.queue(REQUESTS);
        let head = queue.ring_mut().add_raw(&chain);
        queue.publish();
        let used = queue.wait_raw_for(head, A_MOMENT);
        println!("{what}: {used:?}");
        drop(queue);
        assert!(daemon.is_running(), "{what} ended the daemon: {}", daemon.log());
        // The other queues of the same connection go on.
        round_trip(&fe.ready_lun(0, 0).on_queue(REQUESTS + 1), 0, 8, 1);
        drop(fe);
    }
    assert_serves(&daemon);
}

/// The chain itself is sound, so the driver gets its descriptors back and the queue goes on.
#[test]
fn requests_that_cannot_be_answered_are_returned() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let header = fe.memory().alloc(4096, 4096, 0);
    fe.memory().write(header, &lun.request(cdb::test_unit_ready()).header());
    let data = fe.memory().alloc(4096, 4096, 0);
    for (what, chain) in unusable_chains(header, data).into_iter().take(7) {
        let mut queue = fe.queue(REQUESTS);
        let head = queue.ring_mut().add_raw(&chain);
        queue.publish();
        let used = queue.wait_raw_for(head, Duration::from_secs(5));
        let used = used.unwrap_or_else(|| panic!("{what}: not returned\n{}", daemon.log()));
        let room: u32 = chain.iter().filter(|d| d.flags & DESC_F_WRITE != 0).map(|d| d.len).sum();
        assert!(used.len <= room, "{what}: {used:?} with room for {room}");
        drop(queue);
        lun.test_unit_ready();
    }
}

#[test]
fn heads_that_are_out_of_range_harm_nobody() {
    let mut daemon = Daemon::with_disk(DISK, "");
    for head in [128, 129, 0x7fff, 0xffff] {
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let mut queue = fe.queue(REQUESTS);
        queue.ring_mut().offer(head);
        queue.publish();
        thread::sleep(Duration::from_millis(50));
        drop(queue);
        assert!(daemon.is_running(), "head {head} ended the daemon: {}", daemon.log());
        round_trip(&lun.on_queue(REQUESTS + 1), 0, 8, 1);
    }
    assert_serves(&daemon);
}

#[test]
fn an_available_index_that_jumps_harms_nobody() {
    let mut daemon = Daemon::with_disk(DISK, "");
    for jump in [129, 1000, 0x8000, 0xffff] {
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let mut queue = fe.queue(REQUESTS);
        let index = queue.ring().published().wrapping_add(jump);
        queue.ring().store_avail_idx(index);
        queue.kick_now();
        thread::sleep(Duration::from_millis(50));
        drop(queue);
        assert!(daemon.is_running(), "a jump of {jump} ended the daemon: {}", daemon.log());
        round_trip(&lun.on_queue(REQUESTS + 1), 0, 8, 1);
    }
    assert_serves(&daemon);
}

/// Rings outside memory, rings that are not aligned, rings that overlap: refused or useless.
#[test]
fn rings_in_bad_places_harm_nobody() {
    let mut daemon = Daemon::with_disk(DISK, "");
    let far = 1_u64 << 60;
    type Place = fn([u64; 3], u64) -> [u64; 3];
    let places: [(&str, Place); 7] = [
        ("descriptors outside", |[_, u, a], far| [far, u, a]),
        ("used ring outside", |[d, _, a], far| [d, far, a]),
        ("available ring outside", |[d, u, _], far| [d, u, far]),
        ("descriptors not aligned", |[d, u, a], _| [d + 1, u, a]),
        ("used ring not aligned", |[d, u, a], _| [d, u + 1, a]),
        ("available ring not aligned", |[d, u, a], _| [d, u, a + 1]),
        ("everything in one place", |[d, _, _], _| [d, d, d]),
    ];
    for (what, place) in places {
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        fe.stop_queue(REQUESTS);
        let at = fe.queue(REQUESTS).ring().addresses();
        let good = [at.desc, at.used, at.avail].map(|address| fe.memory().user_address(address));
        let [desc, used, avail] = place(good, far);
        let payload = frontend::protocol::vring_address(REQUESTS, desc, used, avail);
        fe.tell(REQUESTS, RingMessage::Num, 0);
        let channel = fe.channel();
        let number = request::SET_VRING_ADDR;
        let _ = channel.send_message(number, FLAG_VERSION, payload.len() as u32, &payload, &[]);
        let kick = std::os::fd::AsRawFd::as_raw_fd(fe.queue(REQUESTS).kick_fd());
        let index = (REQUESTS as u64).to_ne_bytes();
        let _ = channel.send_message(request::SET_VRING_KICK, FLAG_VERSION, 8, &index, &[kick]);
        drop(channel);
        fe.queue(REQUESTS).kick_now();
        thread::sleep(Duration::from_millis(50));
        assert!(daemon.is_running(), "{what} ended the daemon: {}", daemon.log());
        drop(fe);
        assert_serves(&daemon);
    }
}

/// Kicks that announce nothing cost little and change nothing.
#[test]
fn idle_kicks_are_ignored() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let before = fe.queue(REQUESTS).ring().used_idx();
    let started = Instant::now();
    while started.elapsed() < A_MOMENT {
        fe.queue(REQUESTS).kick_now();
    }
    assert_eq!(fe.queue(REQUESTS).ring().used_idx(), before);
    round_trip(&lun, 0, 8, 1);
}
