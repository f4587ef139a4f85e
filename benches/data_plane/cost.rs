//! What a transfer costs apart from time: system calls (strace), instructions in user mode (callgrind), memory.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::contestants::{Backend, installed};
use crate::frontend::load::Figures;
use crate::frontend::*;

/// Of one transfer, and of the process that makes it. What could not be counted is not a number.
pub struct Cost {
    what: String,
    /// System calls that are no transfers themselves.
    other_calls: f64,
    /// All system calls.
    calls: f64,
    /// Instructions in user mode.
    instructions: f64,
    /// Resident memory under load, in KiB.
    resident: u64,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { what, other_calls, calls, instructions, resident } = self;
        write!(
            f,
            "{what}: a transfer takes {calls:.3} system calls ({other_calls:.3} beside the transfer itself) and \
             {instructions:.0} instructions in user mode; {resident} KiB are resident"
        )
    }
}

impl Cost {
    pub fn json(&self) -> String {
        let Cost { what, other_calls, calls, instructions, resident } = self;
        format!(
            "  {{\"load\": \"{what}\", \"calls\": {calls:.4}, \"other_calls\": {other_calls:.4}, \
             \"instructions\": {instructions:.0}, \"resident_kib\": {resident}}}"
        )
    }
}

/// A file in memory, random transfers of 4 KiB.
pub fn measure(file: &Path) -> Vec<Cost> {
    let mut costs = Vec::new();
    for pattern in [Pattern::RandRead, Pattern::RandWrite] {
        for depth in [1, 32] {
            let load = Load::new(pattern, 4096, depth, 256 * MIB);
            let (calls, other_calls, resident) = system_calls(file, &load);
            costs.push(Cost {
                what: format!("tmpfs, {} 4k, depth {depth}", pattern.name()),
                other_calls,
                calls,
                instructions: instructions(file, &load),
                resident,
            });
        }
    }
    costs
}

fn transfers(figures: &[Figures]) -> f64 {
    figures.iter().map(|f| f.transfers as f64).sum()
}

/// All calls, those that are no transfers, and resident memory.
fn system_calls(file: &Path, load: &Load) -> (f64, f64, u64) {
    let backend = Backend::thinlun(file, "", &[], 1);
    backend.run(load, 1, Duration::from_millis(100));
    let resident = resident(backend.pid);
    if installed("strace").is_none() {
        return (f64::NAN, f64::NAN, resident);
    }
    let scratch = Scratch::new();
    let table = scratch.join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "calls,name", "-p"]).arg(backend.pid.to_string());
    strace.arg("-o").arg(&table).stdin(Stdio::null()).stderr(Stdio::null());
    let mut tracer = strace.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let made = transfers(&backend.run(load, 1, Duration::from_secs(2)));
    let _ = kill(Pid::from_raw(tracer.id() as i32), Signal::SIGINT);
    let _ = tracer.wait();
    let table = std::fs::read_to_string(&table).unwrap_or_default();
    let lines: Vec<(f64, &str)> = table.lines().filter_map(counted).collect();
    let all: f64 = lines.iter().map(|(calls, _)| calls).sum();
    let is_transfer = |name: &str| name.starts_with("pread") || name.starts_with("pwrite");
    let own = lines.iter().filter(|(_, name)| is_transfer(name)).map(|(calls, _)| calls);
    (all / made, (all - own.sum::<f64>()) / made, resident)
}

/// A line of strace's table: calls, and the call's name.
fn counted(line: &str) -> Option<(f64, &str)> {
    let mut words = line.split_whitespace();
    let calls = words.next()?.parse().ok()?;
    words.next().filter(|name| *name != "total").map(|name| (calls, name))
}

fn resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// Milliseconds from the start of the process to the answer of a first read.
pub fn start_to_first_read(file: &Path) -> f64 {
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = std::time::Instant::now();
            let backend = Backend::thinlun(file, "", &[], 1);
            backend.front_end.ready_lun(0, 0).read10(0, 8);
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What a long run takes more than a short one, so that start and end do not count.
fn instructions(file: &Path, load: &Load) -> f64 {
    if installed("valgrind").is_none() {
        return f64::NAN;
    }
    let run = |seconds: f64| {
        let scratch = Scratch::new();
        let out = format!("--callgrind-out-file={}", scratch.join("callgrind").display());
        let mut backend = Backend::thinlun_under("valgrind", &["--tool=callgrind", &out], file);
        let made = transfers(&backend.run(load, 1, Duration::from_secs_f64(seconds)));
        let log = backend.end();
        let collected =
            log.split("Collected :").nth(1).and_then(|rest| rest.split_whitespace().next());
        (made, collected.and_then(|n| n.parse::<f64>().ok()).unwrap_or(f64::NAN))
    };
    let (short, long) = (run(0.5), run(2.5));
    (long.1 - short.1) / (long.0 - short.0)
}
