//! Load that goes on: stamped transfers on every engine and every way to a file, and what is left when it ends.

mod frontend;

use std::path::{Path, PathBuf};
use std::time::Duration;

use frontend::load::{self, Figures};
use frontend::*;

/// How long each engine is under load.
const TIME: Duration = Duration::from_secs(60);

/// A file in memory, gone with the test.
struct InMemory(PathBuf);

impl InMemory {
    fn new(name: &str, size: u64) -> Self {
        let path = PathBuf::from(format!("/dev/shm/thinlun-{name}-{}.img", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        InMemory(path)
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Every sector that is written says where it belongs and which writing it was; every read is held against that.
/// Four queues at once: the page cache, O_DIRECT, memory, and writes that must be stable.
fn stamped_load(engine: &str) {
    let scratch = Scratch::new();
    let files = ["cached", "direct", "stable"].map(|name| scratch.image(name, 32 * MIB));
    let memory = InMemory::new(engine, 32 * MIB);
    let daemon = Daemon::builder(&scratch)
        .disk(&files[0], "")
        .disk(&files[1], "cache=direct")
        .disk(&files[2], "cache=writethrough")
        .disk(&memory.0, "")
        .args(["--io-engine", engine])
        .spawn();
    let fe = FrontEnd::builder().queues(4).connect(&daemon);
    let sizes = [4 << 10, 4 << 10, 64 << 10, 16 << 10];
    let luns: Vec<Lun<'_>> = (0..4).map(|n| fe.ready_lun(0, n)).collect();
    let figures: Vec<Figures> = std::thread::scope(|scope| {
        let runs: Vec<_> = sizes
            .into_iter()
            .zip(&luns)
            .enumerate()
            .map(|(n, (block, lun))| {
                let lun = lun.on_queue(2 + n);
                let load = Load {
                    driver: Driver::Sleeps,
                    verify: true,
                    seed: n as u64 + 1,
                    ..Load::new(Pattern::Mixed, block, 24, 32 * MIB)
                };
                scope.spawn(move || load::run(&lun, &load, TIME))
            })
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    for (figures, what) in figures.iter().zip(["page cache", "direct", "stable", "memory"]) {
        println!(
            "{engine}, {what}: {} transfers, {} sectors verified, {} kicks, {} interrupts",
            figures.transfers, figures.verified, figures.kicks, figures.interrupts
        );
        assert!(figures.transfers > 100, "{what} stood still");
        // Seven of ten read, each eight sectors or more; only what was not written yet is not looked at.
        assert!(figures.verified > figures.transfers, "{what}: hardly anything was looked at");
    }
}

#[test]
fn a_minute_of_stamped_load_on_io_uring() {
    stamped_load("io_uring");
}

#[test]
fn a_minute_of_stamped_load_on_threads() {
    stamped_load("threads");
}

/// Voluntary and involuntary switches of each thread and its time on a processor, by its number. Not those of the kernel's own threads for
/// io_uring, which look for work every five seconds, make no system calls, and end with the ring.
fn activity(daemon: &Daemon) -> Vec<(String, Vec<String>)> {
    let tasks = Path::new("/proc").join(daemon.pid().to_string()).join("task");
    let mut all: Vec<_> = std::fs::read_dir(tasks)
        .unwrap()
        .map(|task| task.unwrap().path())
        .filter(|path| {
            let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            !name.starts_with("iou-wrk")
        })
        .map(|path| {
            let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
            // Behind the name: user and system time are the twelfth and thirteenth.
            let words = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            let times = words.skip(11).take(2);
            (path.display().to_string(), lines.chain(times).map(str::to_owned).collect())
        })
        .collect();
    all.sort();
    all
}

/// With a guest connected, after load on both a file that waits and one that does not: nothing wakes up.
#[test]
fn an_idle_daemon_sleeps() {
    for arguments in [&["--poll-us", "0"][..], &["--poll-us", "200"]] {
        let scratch = Scratch::new();
        let (cached, direct) = (scratch.image("cached", 8 * MIB), scratch.image("direct", 8 * MIB));
        let daemon = Daemon::builder(&scratch)
            .disk(&cached, "")
            .disk(&direct, "cache=direct")
            .args(arguments)
            .spawn();
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        for n in 0..2 {
            let lun = fe.ready_lun(0, n).on_queue(2 + usize::from(n));
            // Kicks and completions come at the same moment, and the last of either may be the one that is overlooked.
            for (driver, depth) in [(Driver::Polls, 8), (Driver::Sleeps, 5), (Driver::Sleeps, 32)] {
                let load = Load { driver, ..Load::new(Pattern::Mixed, 4096, depth, 8 * MIB) };
                load::run(&lun, &load, Duration::from_millis(300));
            }
            lun.synchronize_cache();
        }
        // Threads that had work wait a little for more, and end.
        std::thread::sleep(Duration::from_secs(7));
        let before = activity(&daemon);
        std::thread::sleep(Duration::from_secs(10));
        assert_eq!(before, activity(&daemon), "{arguments:?}");
    }
}

/// Memory of the daemon's own, in KiB: not the guest's, which it maps.
fn own_memory(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let value = |name| {
        let line = status.lines().find(|line: &&str| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or_default()
    };
    value("RssAnon:") + value("RssFile:")
}

#[test]
fn memory_is_bounded_with_many_disks_and_queues() {
    let scratch = Scratch::new();
    let one = Daemon::builder(&scratch).disk(&scratch.image("one", MIB), "").spawn();
    let fe = FrontEnd::connect(&one);
    let load = Load::new(Pattern::Mixed, 4096, 32, MIB);
    load::run(&fe.ready_lun(0, 0), &load, Duration::from_millis(300));
    let alone = own_memory(&one);

    let scratch = Scratch::new();
    let builder = (0..256).fold(Daemon::builder(&scratch), |builder, n| {
        let options = if n % 2 == 0 { "" } else { "cache=direct" };
        builder.disk(&scratch.image(&format!("{n}.img"), MIB), options)
    });
    let many = builder.spawn();
    let fe = FrontEnd::builder().queues(8).connect(&many);
    let luns: Vec<Lun<'_>> = (0..256).map(|n| fe.ready_lun(0, n)).collect();
    std::thread::scope(|scope| {
        for queue in 0..8 {
            let luns = luns.iter().skip(queue).step_by(8);
            scope.spawn(move || {
                for lun in luns {
                    let load = Load { driver: Driver::Sleeps, ..load };
                    load::run(&lun.on_queue(2 + queue), &load, Duration::from_millis(50));
                }
            });
        }
    });
    let together = own_memory(&many);
    println!("one disk: {alone} KiB; 256 disks, 8 queues: {together} KiB");
    // The tests' build is larger than the one that is shipped, and has to fit all the same.
    assert!(alone <= 16 << 10 && together <= 64 << 10, "{alone} and {together} KiB");
}
