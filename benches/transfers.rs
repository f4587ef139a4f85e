//! Reads and writes of 4 KiB: io_uring beside threads, on a file in memory, in the page cache, and past it.
//!
//! `cargo bench --bench transfers`; needs room for 512 MiB in the temporary directory. Both engines are
//! measured in turns in one run; the table shows medians of thousands of transfers per second.
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

#[path = "../tests/frontend/mod.rs"]
mod frontend;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frontend::*;

const SIZE: u64 = 256 * MIB;
const ROUNDS: usize = 5;
const ENGINES: [&str; 2] = ["threads", "io_uring"];

fn main() {
    println!("{:<34} {:>10} {:>10} {:>7}", "", ENGINES[0], ENGINES[1], "ratio");
    let scratch = Scratch::new();
    let memory = PathBuf::from(format!("/dev/shm/thinlun-bench-{}.img", std::process::id()));
    let disk = scratch.join("disk.img");
    for (name, path, options) in
        [("memory", &memory, ""), ("page cache", &disk, ""), ("direct", &disk, "cache=direct")]
    {
        fill(path);
        let daemons = ENGINES.map(|engine| {
            let own = Scratch::new();
            // Both serve a file of their own: an image is locked.
            let copy = path.with_extension(engine);
            std::fs::copy(path, &copy).unwrap();
            let daemon =
                Daemon::builder(&own).disk(&copy, options).args(["--io-engine", engine]).spawn();
            (daemon, copy)
        });
        let front_ends = daemons.each_ref().map(|(daemon, _)| FrontEnd::connect(daemon));
        for write in [false, true] {
            for depth in [1, 32] {
                let mut found = [const { Vec::new() }; 2];
                for _ in 0..ROUNDS {
                    for (fe, list) in front_ends.iter().zip(&mut found) {
                        list.push(thousands_per_second(fe, write, depth));
                    }
                }
                let [threads, ring] = found.map(median);
                let what = if write { "randwrite" } else { "randread" };
                let what = format!("{name}, {what}, depth {depth}");
                println!("{what:<34} {threads:>10.1} {ring:>10.1} {:>7.2}", ring / threads);
            }
        }
        for (daemon, copy) in daemons {
            drop(daemon);
            let _ = std::fs::remove_file(copy);
        }
        let _ = std::fs::remove_file(path);
    }
}

fn fill(path: &Path) {
    std::fs::write(path, vec![0x5a; SIZE as usize]).unwrap();
    std::fs::File::open(path).unwrap().sync_all().unwrap();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Batches of `depth` transfers at random places for a while.
fn thousands_per_second(fe: &FrontEnd, write: bool, depth: usize) -> f64 {
    let lun = fe.ready_lun(0, 0);
    let mut rng = Rng::new(7);
    let data = vec![0x3c; 4096];
    let (start, end) = (Instant::now(), Duration::from_millis(600));
    let mut count = 0;
    while start.elapsed() < end {
        let requests: Vec<ScsiRequest> = (0..depth)
            .map(|_| {
                let lba = rng.below(SIZE / 4096) * 8;
                match write {
                    true => lun.request(cdb::write16(lba, 8)).data_out(&data[..]),
                    false => lun.request(cdb::read16(lba, 8)).data_in(4096),
                }
            })
            .collect();
        let answers = fe.run_all(lun.queue, &requests);
        assert!(answers.iter().all(ScsiResponse::is_good));
        count += depth;
    }
    count as f64 / start.elapsed().as_secs_f64() / 1000.0
}
