//! The process when the host has no more to give, hangs, or a front end does not play along: whoever is served goes on,
//! and the end comes when it is asked for.

mod frontend;
mod mounts;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use frontend::connection::FIRST_REQUEST_QUEUE as REQUESTS;
use frontend::daemon::DaemonBuilder;
use frontend::pattern::{assert_same, blocks};
use frontend::protocol::{FLAG_NEED_REPLY, FLAG_VERSION, request};
use frontend::*;
use mounts::skipped;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

/// Well below the grace that a connection has when nothing is said, and what a test waits for an end.
const SOON: Duration = Duration::from_secs(4);

/// The exit status of a daemon that left commands in flight.
const LEFT_BEHIND: Option<i32> = Some(3);

/// Writes and reads through a disk.
#[track_caller]
fn round_trip(lun: &Lun<'_>, stamp: u64) {
    let data = blocks(8, 16, lun.block_size, stamp);
    lun.write10(8, &data);
    assert_same(&lun.read10(8, 16), &data, "what was written");
}

/// A daemon of two ports and two disks. The second port is at this path.
fn two_ports(scratch: &Scratch, first: &str) -> (DaemonBuilder, PathBuf) {
    let other = scratch.join("other.sock");
    let builder = Daemon::builder(scratch)
        .arg("--socket-path")
        .arg(&other)
        .disk(&scratch.image("a.img", 16 * MIB), first)
        .disk(&scratch.image("b.img", 16 * MIB), "");
    (builder, other)
}

#[track_caller]
fn attach(daemon: &Daemon, path: &Path) -> FrontEnd {
    FrontEnd::builder().attach(UnixStream::connect(path).unwrap(), daemon.diagnosis())
}

// ----- limits ---------------------------------------------------------------------------------

/// Whether a new guest at `path` was served. If not, it was hung up on: it never waits for an answer in vain.
#[track_caller]
fn is_served(daemon: &Daemon, path: &Path) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let served = catch_unwind(AssertUnwindSafe(|| {
        let fe = attach(daemon, path);
        round_trip(&fe.ready_lun(0, 1), 1);
        assert_eq!(fe.tmf(Tmf::QueryTaskSet, Address::new(0, 1), 0), 0);
    }));
    std::panic::set_hook(hook);
    let Err(why) = served else { return true };
    let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
    let hung_up =
        ["hung up", "could not be sent", "failed", "reply: "].iter().any(|w| why.contains(w));
    assert!(hung_up && !why.contains("within"), "neither served nor refused: {why}");
    false
}

/// A guest at one port is served throughout, while new ones come to the other under each limit that `set` sets.
#[track_caller]
fn under_limits(daemon: &mut Daemon, other: &Path, set: impl Fn(Option<usize>), name: &str) {
    let fe = FrontEnd::connect(daemon);
    let lun = fe.ready_lun(0, 0);
    round_trip(&lun, 0);
    let rest = (daemon.thread_count(), daemon.fd_count());
    let mut results = Vec::new();
    for room in 0..24 {
        eventually("the end of what the last guest had", || {
            daemon.thread_count() <= rest.0 && daemon.fd_count() <= rest.1
        });
        set(Some(room));
        results.push(is_served(daemon, other));
        round_trip(&lun, room as u64);
        assert!(daemon.is_running(), "{room}");
        set(None);
        eventually("a new guest is served once there is room", || is_served(daemon, other));
    }
    println!("{results:?}");
    assert!(!results[0] && results[23], "the limits were around the edge");
    let log = daemon.log();
    assert!(log.contains(name), "the limit is named\n{log}");
    drop(fe);
    assert_eq!(daemon.terminate().code(), Some(0));
}

fn set_open_files(pid: i32, soft: usize) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both point to a limit that lives through the call.
    unsafe {
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &mut limit), 0);
        limit.rlim_cur = soft as u64;
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()), 0);
    }
}

/// The lowest descriptors that are free, so many: what the limit has to be for them.
fn limit_for(pid: i32, room: usize) -> usize {
    let taken = |n: &usize| Path::new(&format!("/proc/{pid}/fd/{n}")).exists();
    (0..).filter(|n| !taken(n)).nth(room).unwrap_or_default()
}

#[test]
fn running_out_of_descriptors_harms_only_who_comes() {
    let scratch = Scratch::new();
    let (builder, other) = two_ports(&scratch, "");
    let mut daemon = builder.spawn();
    let pid = daemon.pid();
    let set = |room: Option<usize>| {
        set_open_files(pid, room.map_or(1000, |room| limit_for(pid, room)));
    };
    under_limits(&mut daemon, &other, set, "RLIMIT_NOFILE");
}

/// The kernel drops a descriptor for which there is no room. The message is not taken for another one, nor waited for.
#[test]
fn a_descriptor_that_cannot_be_received_ends_its_connection() {
    let daemon = Daemon::with_disk(16 * MIB, "");
    let fe = FrontEnd::connect(&daemon);
    round_trip(&fe.ready_lun(0, 0), 1);
    set_open_files(daemon.pid(), limit_for(daemon.pid(), 0));
    let (payload, event) = ((REQUESTS as u64).to_ne_bytes(), EventFd::new(0).unwrap());
    let flags = FLAG_VERSION | FLAG_NEED_REPLY;
    let channel = fe.channel();
    channel
        .send_message(request::SET_VRING_CALL, flags, 8, &payload, &[event.as_raw_fd()])
        .unwrap();
    channel.expect_hangup();
    eventually("the limit is named", || daemon.log().contains("RLIMIT_NOFILE"));
    set_open_files(daemon.pid(), 1000);
    round_trip(&FrontEnd::connect(&daemon).ready_lun(0, 0), 2);
}

/// A control group that holds a number of threads.
struct PidsGroup(PathBuf);

impl PidsGroup {
    /// `None`, loudly, where there can be none.
    fn new() -> Option<Self> {
        for root in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let path = Path::new(root).join(format!("thinlun-test-{}", std::process::id()));
            if fs::create_dir(&path).is_ok() {
                let group = PidsGroup(path);
                if group.0.join("pids.max").exists() {
                    return Some(group);
                }
            }
        }
        skipped("nothing was proved about a full pids control group: there is none to be had");
        None
    }

    fn take(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn set(&self, room: Option<usize>) {
        let current = fs::read_to_string(self.0.join("pids.current")).unwrap();
        let current: usize = current.trim().parse().unwrap();
        let max = room.map_or("max".into(), |room| (current + room).to_string());
        fs::write(self.0.join("pids.max"), max).unwrap();
    }
}

impl Drop for PidsGroup {
    fn drop(&mut self) {
        let gone = || fs::remove_dir(&self.0).is_ok();
        let _ = (0..100).any(|_| {
            gone() || {
                std::thread::sleep(Duration::from_millis(20));
                false
            }
        });
    }
}

#[test]
fn running_out_of_threads_harms_only_who_comes() {
    let Some(group) = PidsGroup::new() else { return };
    let scratch = Scratch::new();
    let (builder, other) = two_ports(&scratch, "");
    let mut daemon = builder.spawn();
    group.take(daemon.pid());
    under_limits(&mut daemon, &other, |room| group.set(room), "pids.max");
}

/// The soft limit of open files is raised as far as the hard one allows.
#[test]
fn the_soft_limit_of_open_files_is_raised() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let script = "ulimit -Sn 64; ulimit -Hn 500; exec \"$0\" \"$@\"";
    let daemon = Daemon::builder(&scratch).under("sh", &["-c", script]).disk(&disk, "").spawn();
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<_> = line.split_whitespace().filter(|w| w.parse::<u32>().is_ok()).collect();
    assert_eq!(numbers, ["500", "500"]);
}

/// However few descriptors there are at the start, it ends with a sentence, or serves.
#[test]
fn a_start_with_few_descriptors_says_so() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    for limit in 4..40 {
        let script = format!("ulimit -n {limit}; exec timeout -s TERM 0.3 \"$0\" \"$@\"");
        let builder = Daemon::builder(&scratch).under("sh", &["-c", &script]).disk(&disk, "");
        let end = builder.finish();
        let served = matches!(end.status.code(), Some(0 | 124));
        assert!(served || end.status.code() == Some(1), "{limit}: {end:?}");
        let why = end.stderr.lines().last().unwrap_or_default();
        assert!(served || why.starts_with("thinlun: "), "{limit}: {end:?}");
        assert!(!end.stderr.contains("panicked"), "{limit}: {end:?}");
    }
}

// ----- the end --------------------------------------------------------------------------------

/// A read of the first disk that takes a minute.
const SLOW: &str = "fault=read:delay-ms-60000*1";

/// Begins it, and waits until a thread is at it: before that it could be withdrawn.
#[track_caller]
fn begin_slow_read(daemon: &Daemon, lun: &Lun<'_>) -> Ticket {
    let ticket = lun.submit(&lun.request(cdb::read10(0, 8)).data_in(4096));
    // The watchdog sleeps as well.
    let sleeps = |thread: &String| thread.contains("nanosleep") && !thread.contains("watchdog");
    eventually("a thread that sleeps", || daemon.diagnosis().thread_states().iter().any(sleeps));
    ticket
}

/// Waits until the front end is hung up on; says whether the daemon did that before `limit`.
fn is_hung_up_on(fe: &FrontEnd, limit: Duration) -> bool {
    let channel = fe.channel();
    channel.socket().set_read_timeout(Some(limit)).unwrap();
    matches!(channel.socket().try_clone().unwrap().read(&mut [0; 1]), Ok(0))
}

/// All connections are told before any is waited for, sockets go at once, and a second signal ends it.
#[test]
fn a_hung_disk_holds_up_its_own_connection_only() {
    let scratch = Scratch::new();
    let (builder, other) = two_ports(&scratch, SLOW);
    let mut daemon = builder.args(["--shutdown-timeout", "60"]).spawn();
    let slow = FrontEnd::connect(&daemon);
    let waits = slow.ready_lun(0, 0);
    let fe = attach(&daemon, &other);
    round_trip(&fe.ready_lun(0, 1), 1);
    begin_slow_read(&daemon, &waits);
    daemon.signal(Signal::SIGTERM);
    assert!(is_hung_up_on(&fe, PATIENCE), "the idle connection waits for the other");
    assert!(!daemon.socket().exists() && !other.exists(), "the sockets are still there");
    assert!(daemon.wait_exit(A_MOMENT).is_none(), "{}", daemon.log());
    daemon.sighup();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait_exit(SOON).expect("the second signal to end it");
    assert_eq!(status.code(), LEFT_BEHIND, "{}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("port 1 did not end") && log.contains("target 0 LUN 0"), "{log}");
    assert!(!log.contains("LUN 1,") && !log.contains("port 2 did"), "{log}");
}

/// The end comes after the time that was set, and what was in flight is done by the next daemon.
#[test]
fn an_end_that_waits_no_longer_leaves_what_is_in_flight() {
    for timeout in ["0", "1"] {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", 16 * MIB);
        let start = |options: &str| {
            let builder = Daemon::builder(&scratch).disk(&disk, options);
            builder.args(["--shutdown-timeout", timeout]).spawn()
        };
        let mut daemon = start(SLOW);
        let mut fe = FrontEnd::builder().inflight().connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let data = blocks(0, 8, 512, 7);
        lun.write10(0, &data);
        let ticket = begin_slow_read(&daemon, &lun);
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait_exit(SOON).expect("an end after the timeout");
        assert_eq!(status.code(), LEFT_BEHIND, "{}", daemon.log());
        let next = start("");
        fe.reconnect(&next);
        let answer = fe.wait(ticket);
        if answer.is_good() {
            assert_same(answer.data(), &data, "what the next daemon read");
        }
    }
}

/// Who is idle needs a moment to end as well.
#[test]
fn an_idle_front_end_is_not_in_the_way_of_an_end_at_once() {
    for connected in [false, true] {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", 16 * MIB);
        let mut daemon =
            Daemon::builder(&scratch).disk(&disk, "").args(["--shutdown-timeout", "0"]).spawn();
        let fe = connected.then(|| FrontEnd::connect(&daemon));
        fe.iter().for_each(|fe| round_trip(&fe.ready_lun(0, 0), 1));
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait_exit(SOON).expect("an end");
        assert_eq!(status.code(), Some(0), "nothing was in flight: {}", daemon.log());
    }
}

/// A front end that sends requests and never reads a reply.
#[test]
fn a_front_end_that_reads_no_replies_holds_up_nobody() {
    let scratch = Scratch::new();
    let (builder, other) = two_ports(&scratch, "");
    let mut daemon = builder.spawn();
    let deaf = daemon.connect();
    deaf.set_nonblocking(true).unwrap();
    let message = [request::GET_FEATURES, FLAG_VERSION, 0].map(u32::to_ne_bytes).concat();
    // Until the daemon waits for room for its replies, and takes no more requests.
    let mut refused = 0;
    while refused < 20 {
        match (&deaf).write(&message) {
            Ok(_) => refused = 0,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => panic!("{e}"),
        }
    }
    let fe = attach(&daemon, &other);
    round_trip(&fe.ready_lun(0, 1), 1);
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait_exit(SOON).expect("an end");
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
}

// ----- descriptors of the wrong kind ----------------------------------------------------------

#[test]
fn descriptors_that_are_not_events_are_refused() {
    let daemon = Daemon::with_disk(16 * MIB, "");
    let (pipe, full) = nix::unistd::pipe().unwrap();
    let (socket, _other) = UnixDatagram::pair().unwrap();
    let file: OwnedFd = File::open(daemon.disk()).unwrap().into();
    for number in [request::SET_VRING_CALL, request::SET_VRING_KICK, request::SET_VRING_ERR] {
        for fd in [full.as_fd(), pipe.as_fd(), socket.as_fd(), file.as_fd()] {
            let fe = FrontEnd::connect(&daemon);
            round_trip(&fe.ready_lun(0, 0), 1);
            let payload = (REQUESTS as u64).to_ne_bytes();
            fe.set(number, &payload, &[fd.as_raw_fd()], false);
            fe.channel().expect_hangup();
        }
    }
    assert!(daemon.log().contains("not an eventfd"), "{}", daemon.log());
}

/// An event whose counter is full, and on which a write would wait.
#[test]
fn a_full_call_event_holds_up_no_queue() {
    let mut daemon = Daemon::with_disk(16 * MIB, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    let payload = (REQUESTS as u64).to_ne_bytes();
    fe.set(request::SET_VRING_CALL, &payload, &[full.as_raw_fd()], false);
    fe.queue(REQUESTS).ring_mut().set_polling(true);
    fe.barrier();
    round_trip(&lun, 1);
    // One that has room is written to.
    full.read().unwrap();
    fe.queue(REQUESTS).ring_mut().set_polling(false);
    lun.submit(&lun.request(cdb::test_unit_ready()));
    full.read().unwrap();
    assert_eq!(daemon.terminate().code(), Some(0));
}

// ----- the log --------------------------------------------------------------------------------

/// A pipe that can be standard error, and the script that makes it that.
fn pipe_for_errors(scratch: &Scratch) -> (File, String) {
    let fifo = scratch.join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&fifo);
    (open.unwrap(), format!("RUST_LOG=debug exec \"$0\" \"$@\" 2>{}", fifo.display()))
}

/// Until not one byte more goes in.
fn fill_up(mut pipe: &File) {
    for piece in [4096, 1] {
        while pipe.write(&vec![b'.'; piece]).is_ok() {}
    }
}

/// All that is in it.
fn drain(mut pipe: &File, into: &mut Vec<u8>) {
    let mut bytes = [0; 4096];
    while let Ok(read) = pipe.read(&mut bytes) {
        into.extend_from_slice(&bytes[..read]);
    }
}

/// Standard error was full before the start.
#[test]
fn a_log_that_nobody_reads_holds_up_no_start() {
    let scratch = Scratch::new();
    let (builder, _) = two_ports(&scratch, "");
    let (pipe, script) = pipe_for_errors(&scratch);
    fill_up(&pipe);
    let mut daemon = builder.under("sh", &["-c", &script]).spawn();
    round_trip(&FrontEnd::connect(&daemon).ready_lun(0, 0), 1);
    let mut text = Vec::new();
    eventually("the lines of the start", || {
        drain(&pipe, &mut text);
        String::from_utf8_lossy(&text).contains("port 1: front end connected")
    });
    assert!(String::from_utf8_lossy(&text).contains("target 0 LUN 0: "), "in their order");
    fill_up(&pipe);
    assert_eq!(daemon.end_with(Signal::SIGTERM).code(), Some(0));
    // A start that fails ends as well.
    fill_up(&pipe);
    let builder = Daemon::builder(&scratch).under("sh", &["-c", &script]);
    let end = builder.disk(&scratch.join("missing.img"), "").finish();
    assert_eq!(end.status.code(), Some(1), "{end:?}");
}

/// Standard error is a pipe that nobody reads.
#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    let scratch = Scratch::new();
    let (builder, other) = two_ports(&scratch, "");
    let (pipe, script) = pipe_for_errors(&scratch);
    let mut daemon = builder.under("sh", &["-c", &script]).spawn();
    fill_up(&pipe);
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    for round in 0..20 {
        let other = attach(&daemon, &other);
        round_trip(&lun, round);
        round_trip(&other.ready_lun(0, 1), round);
    }
    // Nothing was lost so far.
    let mut text = Vec::new();
    eventually("the log's lines when it is read", || {
        drain(&pipe, &mut text);
        let text = String::from_utf8_lossy(&text);
        text.matches("port 2: front end is gone").count() == 20
    });
    fill_up(&pipe);
    drop(fe);
    let status = daemon.end_with(Signal::SIGTERM);
    assert_eq!(status.code(), Some(0));
}

// ----- sizes ----------------------------------------------------------------------------------

/// A file `disk.img` in a file system whose server stops answering when it is told to.
struct HangingFile {
    shared: Arc<Shared>,
    directory: TempDir,
    server: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    size: AtomicU64,
    hangs: Mutex<bool>,
    goes_on: Condvar,
    /// Requests that came while it hung.
    waiting: AtomicU64,
}

impl HangingFile {
    /// `None`, loudly, where there is no FUSE.
    fn new(size: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let mounted = device.and_then(|device| {
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
            let text = |text: &[u8]| std::ffi::CString::new(text).unwrap();
            let at = text(directory.path().as_os_str().as_encoded_bytes());
            let (kind, options) = (text(b"fuse"), text(options.as_bytes()));
            // SAFETY: strings that live through the call.
            let result = unsafe {
                libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast())
            };
            if result == 0 { Ok(device) } else { Err(std::io::Error::last_os_error()) }
        });
        let device = match mounted {
            Ok(device) => device,
            Err(why) => {
                skipped(&format!("nothing was proved about a hung file system: {why}"));
                return None;
            }
        };
        let shared = Arc::new(Shared {
            size: AtomicU64::new(size),
            hangs: Mutex::new(false),
            goes_on: Condvar::new(),
            waiting: AtomicU64::new(0),
        });
        let of_server = Arc::clone(&shared);
        let server = Some(std::thread::spawn(move || of_server.serve(&device)));
        Some(HangingFile { shared, directory, server })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    /// Its server answers nothing until the returned value goes.
    fn hang(&self) -> Hang {
        *self.shared.hangs.lock().unwrap() = true;
        Hang(Arc::clone(&self.shared))
    }
}

struct Hang(Arc<Shared>);

impl Drop for Hang {
    fn drop(&mut self) {
        *self.0.hangs.lock().unwrap() = false;
        self.0.goes_on.notify_all();
    }
}

impl Drop for HangingFile {
    fn drop(&mut self) {
        let at = std::ffi::CString::new(self.directory.path().as_os_str().as_encoded_bytes());
        // SAFETY: a string that lives through the call.
        unsafe { libc::umount2(at.unwrap().as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
        let _ = self.server.take().map(std::thread::JoinHandle::join);
    }
}

impl Shared {
    /// The FUSE protocol, as far as one file needs it (linux/fuse.h).
    fn serve(&self, mut device: &File) {
        let mut request = vec![0; 1 << 20];
        while let Ok(len) = device.read(&mut request) {
            let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
            let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
            let (operation, unique, node) = (word(4), long(8), long(16));
            let mut hangs = self.hangs.lock().unwrap();
            if *hangs {
                self.waiting.fetch_add(1, Ordering::SeqCst);
            }
            while *hangs {
                hangs = self.goes_on.wait(hangs).unwrap();
            }
            drop(hangs);
            let answer: Result<Vec<u8>, i32> = match operation {
                // FORGET, BATCH_FORGET, INTERRUPT: no answer.
                2 | 42 | 36 => continue,
                // INIT: version 7.31, writes of 128 KiB.
                26 => {
                    let head = [7, 31, 0, 0, 0, 128 << 10, 1].map(u32::to_ne_bytes).concat();
                    Ok([head, vec![0; 36]].concat())
                }
                // LOOKUP.
                1 if request[40..len].starts_with(b"disk.img\0") => {
                    let head = [2_u64, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
                    Ok([head, self.attributes(2)].concat())
                }
                1 => Err(libc::ENOENT),
                // GETATTR, SETATTR.
                3 | 4 => Ok([vec![0; 16], self.attributes(node)].concat()),
                // OPEN, OPENDIR.
                14 | 27 => Ok(vec![0; 16]),
                // READ.
                15 => {
                    let left = self.size.load(Ordering::SeqCst).saturating_sub(long(48));
                    Ok(vec![0; left.min(word(56).into()) as usize])
                }
                // WRITE.
                16 => Ok([word(56), 0].map(u32::to_ne_bytes).concat()),
                // STATFS.
                17 => Ok(vec![0; 80]),
                // RELEASE, RELEASEDIR, FSYNC.
                18 | 29 | 20 => Ok(Vec::new()),
                _ => Err(libc::ENOSYS),
            };
            let (error, data) = answer.map_or_else(|e| (-e, Vec::new()), |data| (0, data));
            let length = (16 + data.len()) as u32;
            let head = [length.to_ne_bytes(), error.to_ne_bytes()].concat();
            let _ = device.write(&[head, unique.to_ne_bytes().to_vec(), data].concat());
        }
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size) = match node {
            2 => (libc::S_IFREG | 0o600, self.size.load(Ordering::SeqCst)),
            _ => (libc::S_IFDIR | 0o700, 0),
        };
        let longs = [node, size, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].map(u32::to_ne_bytes).concat();
        [longs, words].concat()
    }
}

fn is_about(event: &Event, lun: u8) -> bool {
    [Address::flat(0, lun.into()), Address::peripheral(0, lun)].contains(&event.address)
}

/// The size of a disk whose file system hangs is found out when that goes on; nobody waits for it.
#[test]
fn a_hung_disk_delays_the_news_of_its_own_size_only() {
    let Some(hanging) = HangingFile::new(16 * MIB) else { return };
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", 16 * MIB);
    let other = scratch.join("other.sock");
    let mut daemon = Daemon::builder(&scratch)
        .arg("--socket-path")
        .arg(&other)
        .disk(&hanging.path(), "")
        .disk(&disk, "")
        .spawn();
    let fe = FrontEnd::connect(&daemon);
    let (hung, lun) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    assert_eq!(hung.read10(0, 8).len(), 4096);
    let hang = hanging.hang();
    hanging.shared.size.store(32 * MIB, Ordering::SeqCst);
    for size in [24, 32, 40] {
        OpenOptions::new().write(true).open(&disk).unwrap().set_len(size * MIB).unwrap();
        daemon.sighup();
        let event = fe.next_event(PATIENCE).expect("news of the disk that does not hang");
        assert!(is_about(&event, 1), "{event:?}");
    }
    eventually("the question", || hanging.shared.waiting.load(Ordering::SeqCst) == 1);
    // The server hangs in one; no more were asked.
    lun.clear_unit_attentions();
    round_trip(&lun, 1);
    drop(attach(&daemon, &other));
    drop(hang);
    let event = fe.next_event(PATIENCE).expect("news of the disk that hung");
    assert!(is_about(&event, 0), "{event:?}");
    drop(fe);
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
}
