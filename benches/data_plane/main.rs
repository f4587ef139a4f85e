//! The data plane beside its limit and its peers: random and sequential transfers through the socket, by a
//! front end in process, against fio on the same file and vhost-device-scsi.
//!
//! `cargo bench --bench data_plane -- [--all] [--only TEXT] [--seconds N] [--json FILE] [--svg FILE] [--driver-cpu N]
//! [--against PROGRAM] [--rounds N]`
//!
//! Needs 1 GiB in /dev/shm and 2 in the temporary directory. fio (Debian) and vhost-device-scsi
//! (`cargo install vhost-device-scsi`) are measured if they are installed. `--against` has another build of thinlun in
//! the place of vhost-device-scsi: whether a change made it faster is seen in one run or not at all.
//!
//! All contestants have their turns beside each other, and the rounds go through all loads, so that a load is not
//! judged by the minute in which it happened to be measured. A ratio is the median of what the turns of a round gave.
//! A driver that polls has a processor for itself (the first, or that of `--driver-cpu`); fio runs on the others, as the
//! back ends do.
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

mod chart;
mod contestants;
mod cost;
#[path = "../../tests/frontend/mod.rs"]
mod frontend;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use contestants::{Backend, Sample, fio};
use frontend::*;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use report::{Report, Row};

const SIZE: u64 = 512 * MIB;

/// How often every contestant has its turn, and for how long.
#[derive(Clone, Copy)]
struct Turns {
    rounds: usize,
    time: Duration,
}

/// Where the file is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Memory,
    Cache,
    Direct,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::Memory => "tmpfs",
            Place::Cache => "page cache",
            Place::Direct => "direct",
        }
    }

    fn options(self) -> &'static str {
        if self == Place::Direct { "cache=direct" } else { "" }
    }
}

/// A file, the back ends that serve it, and the loads on how many queues that they are measured under.
struct Station {
    place: Place,
    file: PathBuf,
    ours: Backend,
    peer: Option<Backend>,
    loads: Vec<(Load, usize)>,
}

impl Station {
    /// `None` if no load is wanted.
    fn new(place: Place, file: &Path, options: &Options, scratch: &Scratch) -> Option<Self> {
        let only = options.value("--only").unwrap_or_default();
        let mut loads = loads(options);
        loads.retain(|(load, queues)| title(place, load, *queues).contains(only));
        let queues = loads.iter().map(|(_, queues)| *queues).max()?;
        fill(file, place);
        let arguments: Vec<&str> =
            options.value("--with").iter().flat_map(|a| a.split(' ')).collect();
        let ours = Backend::thinlun(file, place.options(), &arguments, queues);
        let peer = match options.value("--against") {
            Some(program) => {
                let program = Path::new(program);
                Some(Backend::other_thinlun(program, file, place.options(), &arguments, queues))
            }
            None if place == Place::Direct => None,
            None => Backend::vhost_device_scsi(file, scratch),
        };
        Some(Station { place, file: file.into(), ours, peer, loads })
    }

    fn rows(&self) -> impl Iterator<Item = Row> {
        let title = |(load, queues): &(Load, usize)| title(self.place, load, *queues);
        self.loads.iter().map(move |load| Row::new(title(load)))
    }

    /// A turn of each contestant, in another order each round: one follows on what the one before has left behind.
    fn turns(
        &self,
        load: &Load,
        queues: usize,
        time: Duration,
        round: usize,
    ) -> [Option<Sample>; 4] {
        let fio = |engine| fio(engine, &self.file, self.place == Place::Direct, load, time);
        match self.place {
            Place::Memory => {}
            // The host may have let go of what nobody has looked at since the last round.
            Place::Cache => drop(std::fs::read(&self.file)),
            // The device may have things to do since the last load.
            Place::Direct => drop(fio("io_uring")),
        }
        let mut samples = [None; 4];
        for turn in 0..samples.len() {
            let turn = if round.is_multiple_of(2) { turn } else { samples.len() - 1 - turn };
            let contestant = (turn + round / 2) % samples.len();
            samples[contestant] = match contestant {
                0 => Some(self.ours.sample(load, queues, time)),
                _ if queues > 1 => None,
                1 => self.peer.as_ref().map(|peer| peer.sample(load, 1, time)),
                2 => fio("psync"),
                _ => fio("io_uring"),
            };
            if self.place != Place::Memory && load.pattern.writes() {
                // Or the host would write it back while another is measured.
                std::fs::File::open(&self.file).and_then(|file| file.sync_all()).unwrap();
            }
        }
        samples
    }
}

struct Options(Vec<String>);

impl Options {
    fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().skip_while(|a| *a != name).nth(1).map(String::as_str)
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|a| a == name)
    }
}

fn main() {
    let options = Options(std::env::args().collect());
    let only = options.value("--only").unwrap_or_default();
    let seconds = options.value("--seconds").map_or(1.0, |n| n.parse().expect("seconds"));
    let rounds = options.value("--rounds").map_or(5, |n| n.parse().expect("rounds"));
    let turns = Turns { rounds, time: Duration::from_secs_f64(seconds) };
    contestants::choose_driver_cpu(options.value("--driver-cpu"));
    let scratch = Scratch::new();
    let memory = PathBuf::from(format!("/dev/shm/thinlun-bench-{}.img", std::process::id()));
    let disk = scratch.join("disk.img");
    let direct = scratch.join("direct.img");
    let mut stations = Vec::new();
    for (place, file) in [(Place::Memory, &memory), (Place::Cache, &disk), (Place::Direct, &direct)]
    {
        stations.extend(Station::new(place, file, &options, &scratch));
    }
    let mut report = Report { rows: measure(&stations, turns), ..Report::default() };
    drop(stations);
    report.print_rows();
    if only.is_empty() || "sharing".contains(only) {
        sharing(&mut report, turns);
    }
    if only.is_empty() || "cost".contains(only) {
        fill(&memory, Place::Memory);
        report.costs = cost::measure(&memory);
        report.start = Some(cost::start_to_first_read(&memory));
    }
    let _ = std::fs::remove_file(&memory);
    report.print_goals();
    if let Some(path) = options.value("--json") {
        std::fs::write(path, report.json()).unwrap();
    }
    if let Some(path) = options.value("--svg") {
        std::fs::write(path, chart::svg(&report)).unwrap();
    }
}

/// Two queues of one daemon, each on a file of its own, beside two daemons that can share nothing, and
/// beside one queue alone. Drivers and queues are four threads, which sleep where they can.
fn sharing(report: &mut Report, turns: Turns) {
    let Turns { rounds, time } = turns;
    let files: Vec<PathBuf> = (0..4)
        .map(|n| PathBuf::from(format!("/dev/shm/thinlun-bench-{}-{n}.img", std::process::id())))
        .collect();
    for file in &files {
        std::fs::write(file, vec![0x5a; (64 * MIB) as usize]).unwrap();
    }
    let together = Backend::thinlun_with(&files[..2], 2);
    let apart = [&files[2], &files[3]].map(|file| Backend::thinlun(file, "", &[], 1));
    for pattern in [Pattern::RandRead, Pattern::RandWrite] {
        let load = Load { driver: Driver::Sleeps, ..Load::new(pattern, 4096, 32, 64 * MIB) };
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            rates[0].push(at_once(&[(&together, 0), (&together, 1)], &load, time));
            rates[1].push(at_once(&[(&apart[0], 0), (&apart[1], 0)], &load, time));
            rates[2].push(at_once(&[(&together, 0)], &load, time));
        }
        let [together, apart, alone] = rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates[rounds / 2]
        });
        report.sharing.push(report::Sharing { load: pattern.name(), together, apart, alone });
    }
    files.iter().for_each(|file| drop(std::fs::remove_file(file)));
}

/// The mean rate of a load on these disks at once, each on the queue of its number.
fn at_once(disks: &[(&Backend, u16)], load: &Load, time: Duration) -> f64 {
    let luns: Vec<Lun<'_>> = disks
        .iter()
        .map(|(backend, n)| backend.front_end.ready_lun(0, *n).on_queue(2 + usize::from(*n)))
        .collect();
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let run = |lun| scope.spawn(move || frontend::load::run(lun, load, time).rate());
        let runs: Vec<_> = luns.iter().map(run).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    rates.iter().sum::<f64>() / rates.len() as f64
}

/// Loads, and on how many queues.
fn loads(options: &Options) -> Vec<(Load, usize)> {
    use Pattern::{Mixed, RandRead, RandWrite, SeqRead, SeqWrite};
    let all = options.has("--all");
    let small = |pattern, depth| Load::new(pattern, 4096, depth, SIZE);
    let large = |pattern, depth| Load::new(pattern, 128 << 10, depth, SIZE);
    let depths: &[usize] = if all { &[1, 8, 32, 128] } else { &[1, 32] };
    let mut loads = Vec::new();
    for pattern in [RandRead, RandWrite] {
        loads.extend(depths.iter().map(|depth| (small(pattern, *depth), 1)));
    }
    for pattern in [SeqRead, SeqWrite] {
        loads.push((large(pattern, 8), 1));
    }
    if all {
        loads.extend(depths.iter().map(|depth| (small(Mixed, *depth), 1)));
        loads.extend([(large(RandRead, 8), 1), (large(RandWrite, 8), 1)]);
        for queues in 2..=4 {
            for pattern in [RandRead, RandWrite] {
                // More threads than cores: nobody can poll.
                let load = Load { driver: Driver::Sleeps, ..small(pattern, 32) };
                loads.push((load, queues));
            }
        }
    }
    loads
}

fn title(place: Place, load: &Load, queues: usize) -> String {
    let size = load.block >> 10;
    let many = if queues > 1 { format!(", {queues} queues") } else { String::new() };
    format!("{}, {} {size}k, depth {}{many}", place.name(), load.pattern.name(), load.depth)
}

/// Written in small pieces: ext4 keeps what is written in large ones in large folios and walks through all blocks
/// of one for each write to it, which takes many times as long as the write (20 us of 23 for all contestants).
///
/// What is transferred directly is not left in the page cache: the kernel would look there for each write, and end the
/// write on a thread of its own.
fn fill(file: &Path, place: Place) {
    let block = [0x5a; 4096];
    let out = std::fs::File::create(file).unwrap();
    for at in (0..SIZE).step_by(block.len()) {
        std::os::unix::fs::FileExt::write_all_at(&out, &block, at).unwrap();
    }
    out.sync_all().unwrap();
    if place == Place::Direct {
        posix_fadvise(&out, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
}

/// Measures all loads in rounds, in each of which every contestant has its turn.
fn measure(stations: &[Station], turns: Turns) -> Vec<Row> {
    let mut rows: Vec<Row> = stations.iter().flat_map(Station::rows).collect();
    for round in 1..=turns.rounds {
        eprint!("\rround {round} of {} ", turns.rounds);
        let loads = stations.iter().flat_map(|s| s.loads.iter().map(move |load| (s, load)));
        for ((station, (load, queues)), row) in loads.zip(&mut rows) {
            row.add(station.turns(load, *queues, turns.time, round));
        }
    }
    eprintln!();
    rows
}
