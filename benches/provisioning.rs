//! What the truth costs: GET LBA STATUS on a file of a million extents beside the bare host calls, reads
//! beside a looping map and beside a long copy, and copies beside `cp`.
//!
//! `cargo bench --bench provisioning [-- --only commands|reads|copies] [--json FILE]`; needs root (loop mounts) and 12 GiB of room.
//! Everything that is compared is measured in turns in one run; the table shows medians.
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

#[path = "../tests/frontend/mod.rs"]
mod frontend;
#[path = "../tests/mounts/mod.rs"]
mod mounts;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use frontend::*;
use mounts::{Kind, Mount};

const EXTENTS: u64 = 1_000_000;
/// A data extent, and the hole behind it.
const BLOCK: u64 = 4096;
const STRIDE: u64 = 2 * BLOCK;
const SIZE: u64 = EXTENTS * STRIDE;
const DESCRIPTORS: u64 = 4000;
const ROUNDS: usize = 15;

/// Rows of the result: what, its figure, its unit, and what it shall be at most.
#[derive(Default)]
struct Report(Vec<(String, f64, &'static str, Option<f64>)>);

impl Report {
    fn add(&mut self, what: String, value: f64, unit: &'static str, most: Option<f64>) {
        let goal = most.map_or(String::new(), |most| format!("(goal: at most {most})"));
        println!("{what:<66} {value:>10.2} {unit:<5} {goal}");
        self.0.push((what, value, unit, most));
    }

    fn json(&self) -> String {
        let rows = self.0.iter().map(|(what, value, unit, most)| {
            let most = most.map_or("null".to_owned(), |most| most.to_string());
            format!(
                "{{\"what\": \"{what}\", \"value\": {value}, \"unit\": \"{unit}\", \"goal\": {most}}}"
            )
        });
        format!("[{}]\n", rows.collect::<Vec<_>>().join(",\n"))
    }
}

fn main() {
    let mut report = Report::default();
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name| arguments.iter().skip_while(|a| *a != name).nth(1);
    let only = option("--only");
    let wanted = |part: &str| only.is_none_or(|only| only == part);

    for kind in [Kind::Ext4, Kind::Xfs] {
        if !wanted("commands") && !wanted("reads") {
            continue;
        }
        let Some(mount) = Mount::new(kind, 6 << 10) else { continue };
        let path = mount.path().join("disk.img");
        fragmented(&path);
        let scratch = Scratch::new();
        let daemon = Daemon::builder(&scratch).disk(&path, "").spawn();
        if wanted("commands") {
            commands(&mut report, kind, &daemon, &path);
        }
        if wanted("reads") {
            beside_a_map(&mut report, kind, &daemon);
        }
    }
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        if wanted("copies") {
            copies(&mut report, kind);
        }
    }
    if let Some(file) = option("--json") {
        std::fs::write(file, report.json()).unwrap();
    }
}

fn fragmented(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let data = [0x5a; BLOCK as usize];
    for n in 0..EXTENTS {
        file.write_all_at(&data, n * STRIDE).unwrap();
    }
    file.sync_all().unwrap();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn microseconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e6
}

/// One command for 4000 descriptors, against FIEMAP and lseek for the same extents.
fn commands(report: &mut Report, kind: Kind, daemon: &Daemon, path: &Path) {
    let fe = FrontEnd::connect(daemon);
    let lun = fe.ready_lun(0, 0);
    let file = File::open(path).unwrap();
    let len = 8 + 16 * DESCRIPTORS as usize;
    let span = DESCRIPTORS / 2 * STRIDE;
    let places = [("start", 0), ("middle", SIZE / 2), ("end", SIZE - span)];
    let mut ours = [const { Vec::new() }; 3];
    let mut bare = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (n, (_, at)) in places.iter().enumerate() {
            bare[n].push(microseconds(|| assert_eq!(walk(&file, *at, span), DESCRIPTORS)));
            ours[n].push(microseconds(|| {
                let cdb = cdb::get_lba_status16(at / 512, len as u32, 0);
                let answer = lun.run_in(cdb, len).expect_good();
                assert_eq!(answer.data().len(), len);
            }));
        }
    }
    let ours = ours.map(median);
    let bare = bare.map(median);
    for (n, (place, _)) in places.iter().enumerate() {
        let what =
            |what: &str| format!("{kind:?}: {DESCRIPTORS} descriptors at the {place}: {what}");
        report.add(what("command"), ours[n], "us", None);
        report.add(what("host calls"), bare[n], "us", None);
        report.add(what("ratio"), ours[n] / bare[n], "", Some(2.0));
    }
    report.add(
        format!("{kind:?}: command at the end / at the start"),
        ours[2] / ours[0],
        "",
        Some(1.25),
    );
}

/// The extents of a range by as few bare calls as tell everything: FIEMAP in large batches, and one lseek
/// for each place where it has found nothing.
fn walk(file: &File, from: u64, len: u64) -> u64 {
    let (mut at, mut found) = (from, 0);
    while at < from + len {
        let extents = fiemap(file, at, from + len - at);
        for extent in &extents {
            if extent.start > at {
                assert_eq!(next_data(file, at), extent.start);
                found += 1;
            }
            at = extent.end;
            found += 1;
        }
        if extents.len() < FIEMAP_BATCH && at < from + len {
            assert!(next_data(file, at) >= from + len);
            return found + 1;
        }
    }
    found
}

fn next_data(file: &File, at: u64) -> u64 {
    // SAFETY: no memory is involved.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as i64, libc::SEEK_DATA) };
    u64::try_from(found).unwrap_or(SIZE)
}

/// What a bare walk would choose; the daemon asks for fewer at once, so that reads get in between.
const FIEMAP_BATCH: usize = 512;

/// One FS_IOC_FIEMAP.
fn fiemap(file: &File, at: u64, len: u64) -> Vec<Range<u64>> {
    const WORDS: usize = 4 + 7 * FIEMAP_BATCH;
    let mut buffer = [0u64; WORDS];
    buffer[0] = at;
    buffer[1] = len;
    buffer[3] = FIEMAP_BATCH as u64;
    // SAFETY: the buffer is a `struct fiemap` with room for so many extents, as it says itself.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), 0xc020_660b, buffer.as_mut_ptr()) };
    assert_eq!(status, 0);
    let mapped = (buffer[2] >> 32) as usize;
    buffer[4..].chunks(7).take(mapped).map(|extent| extent[0]..extent[0] + extent[2]).collect()
}

/// How long one sample of latencies takes.
const SAMPLE: Duration = Duration::from_millis(400);

/// Transfers of 4 KiB at random places.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    depth: usize,
    /// Number of places.
    places: u64,
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, depth {}", if self.write { "writes" } else { "reads" }, self.depth)
    }
}

impl Load {
    /// Latencies in microseconds of as many transfers as fit into a sample; `meanwhile` runs before each.
    fn run(self, lun: &Lun<'_>, rng: &mut Rng, mut meanwhile: impl FnMut()) -> Vec<f64> {
        let end = Instant::now() + SAMPLE;
        let data = [0x3c; 4096];
        let mut latencies = Vec::new();
        let mut under_way = VecDeque::new();
        while Instant::now() < end || !under_way.is_empty() {
            if Instant::now() < end {
                meanwhile();
                let lba = rng.below(self.places) * STRIDE / 512;
                let request = match self.write {
                    true => lun.request(cdb::write16(lba, 8)).data_out(&data[..]),
                    false => lun.request(cdb::read16(lba, 8)).data_in(4096),
                };
                under_way.push_back((Instant::now(), lun.submit(&request)));
                if under_way.len() < self.depth {
                    continue;
                }
            }
            if let Some((start, ticket)) = under_way.pop_front() {
                lun.front_end().wait(ticket).expect_good();
                latencies.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        latencies
    }
}

fn percentile(latencies: &mut [f64], percent: usize) -> f64 {
    latencies.sort_by(f64::total_cmp);
    latencies[(latencies.len() * percent / 100).min(latencies.len() - 1)]
}

/// p50 and p99 of transfers alone, beside something, and the ratios of the medians, in turns.
fn compare(
    report: &mut Report,
    what: &str,
    mut alone: impl FnMut() -> Vec<f64>,
    mut beside: impl FnMut() -> Vec<f64>,
) {
    let mut figures = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let (mut a, mut b) = (alone(), beside());
        let found = [
            percentile(&mut a, 50),
            percentile(&mut a, 99),
            percentile(&mut b, 50),
            percentile(&mut b, 99),
        ];
        figures.iter_mut().zip(found).for_each(|(list, figure)| list.push(figure));
    }
    let [a50, a99, b50, b99] = figures.map(median);
    report.add(format!("{what}: alone, p50"), a50, "us", None);
    report.add(format!("{what}: alone, p99"), a99, "us", None);
    report.add(format!("{what}: beside it, p50"), b50, "us", None);
    report.add(format!("{what}: beside it, p99"), b99, "us", None);
    report.add(format!("{what}: p99 beside it / alone"), b99 / a99, "", Some(1.5));
}

fn beside_a_map(report: &mut Report, kind: Kind, daemon: &Daemon) {
    let fe = FrontEnd::builder().queues(2).connect(daemon);
    let lun = fe.ready_lun(0, 0);
    let places = EXTENTS / 50;
    let rng = Rng::new(1);
    // What is read is cached.
    for n in 0..places {
        lun.run_read(cdb::read16(n * STRIDE / 512, 8), 8).expect_good();
    }
    let len = 8 + 16 * DESCRIPTORS as usize;
    let next = Cell::new(0u64);
    let query = || {
        let at = next.get();
        next.set((at + DESCRIPTORS / 2 * STRIDE) % SIZE);
        cdb::get_lba_status16(at / 512, len as u32, 0)
    };
    let rng = RefCell::new(rng);
    let alone = |load: Load| load.run(&lun, &mut rng.borrow_mut(), || {});
    for depth in [1, 8] {
        let load = Load { write: false, depth, places };
        compare(
            report,
            &format!("{kind:?}: {load}, a looping map on the same queue"),
            || alone(load),
            || {
                let submit = || lun.submit(&lun.request(query()).data_in(len));
                // There is always one map, and only one.
                let mut map = submit();
                let latencies = load.run(&lun, &mut rng.borrow_mut(), || {
                    let done = fe.queue(lun.queue).try_take(map);
                    if let Some(done) = done {
                        ScsiResponse::parse(&done).expect_good();
                        map = submit();
                    }
                });
                fe.wait(map).expect_good();
                latencies
            },
        );
        compare(
            report,
            &format!("{kind:?}: {load}, a looping map on another queue"),
            || alone(load),
            || {
                let stop = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let other = lun.on_queue(3);
                        let mut at = 0;
                        while !stop.load(Ordering::Relaxed) {
                            let cdb = cdb::get_lba_status16(at / 512, len as u32, 0);
                            other.run_in(cdb, len).expect_good();
                            at = (at + DESCRIPTORS / 2 * STRIDE) % SIZE;
                        }
                    });
                    let latencies = alone(load);
                    stop.store(true, Ordering::Relaxed);
                    latencies
                })
            },
        );
    }
}

/// A GiB of data, by one token from disk to disk, and by `cp`; reads beside a long copy.
fn copies(report: &mut Report, kind: Kind) {
    const LEN: u64 = GIB;
    let Some(mount) = Mount::new(kind, 6 << 10) else { return };
    let paths = ["a.img", "b.img", "c.img"].map(|name| mount.path().join(name));
    let source = File::create(&paths[0]).unwrap();
    let chunk: Vec<u8> = (0..=255).cycle().take(MIB as usize).collect();
    for at in (0..LEN).step_by(MIB as usize) {
        source.write_all_at(&chunk, at).unwrap();
    }
    source.sync_all().unwrap();
    File::create(&paths[1]).unwrap().set_len(LEN).unwrap();
    let scratch = Scratch::new();
    let daemon = Daemon::builder(&scratch).disk(&paths[0], "").disk(&paths[1], "").spawn();
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    let (a, b) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let blocks = (LEN / 512) as u32;
    let token = populate(&a, blocks);
    let clear = || {
        let file = OpenOptions::new().write(true).open(&paths[1]).unwrap();
        let list = cdb::unmap_list(&[(0, blocks)]);
        b.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
        let _ = std::fs::remove_file(&paths[2]);
        file.sync_all().unwrap();
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..5 {
        clear();
        ours.push(microseconds(|| use_token(&b, round, &token, blocks)));
        clear();
        theirs.push(microseconds(|| {
            let mut cp = Command::new("cp");
            cp.args(["--reflink=never", "--sparse=never"]);
            cp_ok(&mut cp, &paths[0], &paths[2]);
        }));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    if kind == Kind::Ext4 {
        report.add(format!("{kind:?}: 1 GiB by token"), ours / 1000.0, "ms", None);
        report.add(format!("{kind:?}: 1 GiB by cp"), theirs / 1000.0, "ms", None);
        report.add(format!("{kind:?}: token / cp"), ours / theirs, "", Some(1.11));
        long_copy(report, &fe, &a, &b, &token, blocks);
    } else {
        report.add(format!("{kind:?}: 1 GiB by token (reflink)"), ours / 1000.0, "ms", Some(50.0));
        report.add(format!("{kind:?}: 1 GiB by cp without reflink"), theirs / 1000.0, "ms", None);
    }
}

fn cp_ok(command: &mut Command, from: &Path, to: &Path) {
    assert!(command.arg(from).arg(to).status().unwrap().success());
}

fn long_copy(
    report: &mut Report,
    fe: &FrontEnd,
    a: &Lun<'_>,
    b: &Lun<'_>,
    token: &[u8],
    blocks: u32,
) {
    let rng = RefCell::new(Rng::new(3));
    for (queue, what) in [(2, "the same queue"), (3, "another queue")] {
        for (write, depth) in [(false, 1), (true, 1), (false, 8), (true, 8)] {
            let load = Load { write, depth, places: GIB / STRIDE / 16 };
            let measure = || load.run(a, &mut rng.borrow_mut(), || {});
            compare(report, &format!("Ext4: {load}, a long copy on {what}"), measure, || {
                let other = b.on_queue(queue);
                let (list, cdb) = write_list(77, token, blocks);
                let ticket = other.submit(&other.request(cdb).data_out(&list[..]));
                let latencies = measure();
                fe.wait(ticket).expect_good();
                latencies
            });
        }
    }
}

fn populate(lun: &Lun<'_>, blocks: u32) -> Vec<u8> {
    let mut list = vec![0; 32];
    list[..2].copy_from_slice(&30u16.to_be_bytes());
    list[4..8].copy_from_slice(&3600u32.to_be_bytes());
    list[15] = 16;
    list[24..28].copy_from_slice(&blocks.to_be_bytes());
    lun.run_out(cdb::populate_token(32).be32(6, 1), &list).expect_good();
    let answer = lun.run_in(cdb::receive_copy_lid4(7, 1, 1024), 1024).expect_good();
    answer.data()[38..38 + 512].to_vec()
}

fn write_list(id: u32, token: &[u8], blocks: u32) -> (Vec<u8>, Cdb) {
    let mut list = vec![0; 552];
    list[..2].copy_from_slice(&550u16.to_be_bytes());
    list[16..528].copy_from_slice(token);
    list[535] = 16;
    list[544..548].copy_from_slice(&blocks.to_be_bytes());
    (list, cdb::write_using_token(552).be32(6, id))
}

fn use_token(lun: &Lun<'_>, id: u32, token: &[u8], blocks: u32) {
    let (list, cdb) = write_list(100 + id, token, blocks);
    lun.run_out(cdb, &list).expect_good();
}
