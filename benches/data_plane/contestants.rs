//! What is measured beside each other: vhost-user back ends under the front end's load, and fio.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::frontend::daemon::{DaemonBuilder, Diagnosis};
use crate::frontend::load::{self, Figures};
use crate::frontend::protocol::{feature, protocol_feature};
use crate::frontend::*;

/// What one sample says.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Transfers in a second.
    pub rate: f64,
    /// Microseconds.
    pub p50: f64,
    pub p99: f64,
}

/// A back end that serves a disk, with a front end connected to it.
pub struct Backend {
    pub front_end: FrontEnd,
    pub pid: i32,
    process: Process,
}

enum Process {
    Thinlun(Daemon),
    Other(Child),
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Process::Other(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Largest queues of vhost-device-scsi; the others get the same.
const QUEUE_SIZE: u16 = 128;

impl Backend {
    /// thinlun with these arguments, a disk and its options.
    pub fn thinlun(disk: &Path, options: &str, arguments: &[&str], queues: usize) -> Self {
        let builder = Daemon::builder(&Scratch::new()).disk(disk, options);
        Self::started(builder.args(arguments), queues)
    }

    /// Another build of thinlun, with the same disk at the same time.
    pub fn other_thinlun(
        program: &Path,
        disk: &Path,
        options: &str,
        arguments: &[&str],
        queues: usize,
    ) -> Self {
        let options = format!("{options},locking=off");
        let builder = Daemon::builder(&Scratch::new()).program(program);
        let builder = builder.disk(disk, options.trim_start_matches(','));
        Self::started(builder.args(arguments), queues)
    }

    /// thinlun with several disks.
    pub fn thinlun_with(disks: &[PathBuf], queues: usize) -> Self {
        let builder = Daemon::builder(&Scratch::new());
        Self::started(disks.iter().fold(builder, |b, disk| b.disk(disk, "")), queues)
    }

    fn started(builder: DaemonBuilder, queues: usize) -> Self {
        let daemon = builder.spawn();
        let builder = FrontEnd::builder().queues(queues).queue_size(QUEUE_SIZE);
        let front_end = builder.connect(&daemon);
        Backend { front_end, pid: daemon.pid(), process: Process::Thinlun(daemon) }
    }

    /// thinlun with a disk, inside another program.
    pub fn thinlun_under(program: &str, arguments: &[&str], disk: &Path) -> Self {
        let builder = Daemon::builder(&Scratch::new()).under(program, arguments);
        Self::started(builder.disk(disk, ""), 1)
    }

    /// Ends thinlun; returns what it said.
    pub fn end(&mut self) -> String {
        let Process::Thinlun(daemon) = &mut self.process else { return String::new() };
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        eventually("thinlun ends", || !daemon.is_running());
        daemon.log()
    }

    /// vhost-device-scsi from crates.io; `None` if it is not installed.
    pub fn vhost_device_scsi(disk: &Path, scratch: &Scratch) -> Option<Self> {
        let binary = installed("vhost-device-scsi")?;
        let socket = scratch.join("peer.sock");
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::create(scratch.join("peer.log")).unwrap();
        let mut command = Command::new(binary);
        command.arg("--solid-state").arg("--socket-path").arg(&socket).arg(disk).stderr(log);
        let child = command.stdin(Stdio::null()).spawn().ok()?;
        let pid = child.id() as i32;
        let process = Process::Other(child);
        eventually("vhost-device-scsi listens", || socket.exists());
        std::thread::sleep(Duration::from_millis(200));
        let diagnosis = Diagnosis::of(scratch.join("peer.log"), pid);
        let builder = FrontEnd::builder()
            .queue_size(QUEUE_SIZE)
            .feature(feature::SCSI_CHANGE, false)
            .protocol(protocol_feature::MQ)
            .event_buffers(0);
        let stream = UnixStream::connect(&socket).unwrap();
        Some(Backend { front_end: builder.attach(stream, diagnosis), pid, process })
    }

    /// Runs a load on each of some queues at once; rates add up.
    pub fn sample(&self, load: &Load, queues: usize, time: Duration) -> Sample {
        let figures = self.run(load, queues, time);
        Sample {
            rate: figures.iter().map(Figures::rate).sum(),
            p50: figures[0].latencies.percentile(50.0),
            p99: figures[0].latencies.percentile(99.0),
        }
    }

    pub fn run(&self, load: &Load, queues: usize, time: Duration) -> Vec<Figures> {
        let is_peer = matches!(self.process, Process::Other(_));
        let lun = match is_peer {
            // Its blocks are what a unit has that nobody asked.
            true => self.front_end.lun(0, 0),
            false => self.front_end.ready_lun(0, 0),
        };
        std::thread::scope(|scope| {
            let runs: Vec<_> = (0..queues)
                .map(|n| {
                    let lun = lun.on_queue(2 + n);
                    let span = load.span / queues as u64;
                    let start = load.start + span * n as u64;
                    let load = Load { start, span, seed: load.seed + n as u64, ..*load };
                    scope.spawn(move || {
                        if load.driver == Driver::Polls {
                            stay_on_driver_cpu();
                        }
                        load::run(&lun, &load, time)
                    })
                })
                .collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        })
    }
}

/// The processor that drivers poll on, and the others.
static DRIVER_CPU: OnceLock<(usize, Vec<usize>)> = OnceLock::new();

/// Chooses a processor for drivers that poll, if there is more than one: where a device interrupts one processor only,
/// chance would decide otherwise whether a driver keeps the back end away from it.
pub fn choose_driver_cpu(wanted: Option<&str>) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("the processors we may use");
    let mut others: Vec<usize> =
        (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    let wanted = wanted.map_or(others[0], |cpu| cpu.parse().expect("a processor's number"));
    others.retain(|cpu| *cpu != wanted);
    if !others.is_empty() {
        DRIVER_CPU.get_or_init(|| (wanted, others));
    }
}

fn stay_on_driver_cpu() {
    let Some((cpu, _)) = DRIVER_CPU.get() else { return };
    let mut set = CpuSet::new();
    set.set(*cpu).expect("a processor");
    sched_setaffinity(Pid::from_raw(0), &set).expect("--driver-cpu");
}

/// A program on the path, or where `cargo install` puts it.
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin"));
    let places = std::env::split_paths(&path).chain(home);
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

/// One job of fio on the same file; `None` if it is not installed.
pub fn fio(engine: &str, file: &Path, direct: bool, load: &Load, time: Duration) -> Option<Sample> {
    let mut command = Command::new(installed("fio")?);
    let set = |name: &str, value: String| format!("--{name}={value}");
    let mixed = load.pattern == Pattern::Mixed;
    command.args([
        set("name", "limit".into()),
        set("filename", file.display().to_string()),
        set("rw", load.pattern.name().into()),
        set("bs", load.block.to_string()),
        set("size", load.span.to_string()),
        set("iodepth", load.depth.to_string()),
        set("ioengine", engine.into()),
        set("direct", u8::from(direct).to_string()),
        set("runtime", format!("{}ms", time.as_millis())),
        set("output-format", "json".into()),
        set("random_generator", "tausworthe64".into()),
    ]);
    command.args(["--time_based", "--norandommap", "--thread", "--invalidate=0", "--fsync=0"]);
    command.args(["--lat_percentiles=1", "--clat_percentiles=0"]);
    command.args(mixed.then_some("--rwmixread=70"));
    command.args(DRIVER_CPU.get().map(|(_, others)| {
        let others: Vec<String> = others.iter().map(usize::to_string).collect();
        set("cpus_allowed", others.join(","))
    }));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut text = String::new();
    child.stdout.take()?.read_to_string(&mut text).ok()?;
    assert!(child.wait().is_ok_and(|status| status.success()), "fio: {text}");
    let mut sample = Sample { rate: 0.0, p50: 0.0, p99: 0.0 };
    for direction in ["\"read\" : {", "\"write\" : {"] {
        let part = text.split(direction).nth(1).unwrap_or_default();
        let rate = number(part, "\"iops\"").unwrap_or_default();
        if rate == 0.0 {
            continue;
        }
        sample.rate += rate;
        // The whole latency, submission included, as the front end counts it: for the device that is a quarter of it.
        let whole = part.split("\"lat_ns\"").nth(1).unwrap_or_default();
        sample.p50 = sample.p50.max(number(whole, "\"50.000000\"").unwrap_or_default() / 1e3);
        sample.p99 = sample.p99.max(number(whole, "\"99.000000\"").unwrap_or_default() / 1e3);
    }
    Some(sample)
}

/// The number behind a name in JSON.
fn number(text: &str, name: &str) -> Option<f64> {
    let rest = text.split(name).nth(1)?.trim_start_matches([' ', ':']);
    rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}
