//! The command line, as typed. What it means and whether it makes sense is [`crate::config`]'s job.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::sandbox::Violation;
use crate::store::engine::EngineKind;
use crate::vhost::MAX_REQUEST_QUEUES;

/// SCSI disks for QEMU guests from host files, over a vhost-user socket.
#[derive(Debug, Parser)]
#[command(version, about, after_help = DISK_HELP, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Listen on this UNIX socket. A stale one is replaced, one that is in use is not. May be given several
    /// times: each socket is a port of its own, for one guest of several that share the disks.
    #[arg(long, value_name = "SOCK", conflicts_with = "fd")]
    pub socket_path: Vec<PathBuf>,

    /// Use this inherited file descriptor: a listening socket, or a connected one. May be given several times.
    #[arg(long, value_name = "N")]
    pub fd: Vec<i32>,

    /// Request queues to offer; QEMU uses one per vCPU unless told otherwise.
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=MAX_REQUEST_QUEUES as i64))]
    pub num_queues: u16,

    /// Offer the CONFIG protocol feature, for front ends that do not make the configuration space
    /// themselves. QEMU does; its versions 7.1 to 8.0 fail when this is offered.
    #[arg(long)]
    pub config_space: bool,

    /// What makes transfers that have to wait for a device.
    #[arg(long, value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,

    /// Microseconds for which a queue may look for requests and completions before it sleeps, while that
    /// finds any; it costs a core for the fastest answers.
    #[arg(long, value_name = "US", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=MAX_POLL))]
    pub poll_us: u32,

    /// Give up, once everything is open, what serving does not need: privileges, capabilities, other files,
    /// system calls.
    #[arg(long, value_enum, default_value_t = Sandbox::Strict)]
    pub sandbox: Sandbox,

    /// What becomes of a system call that serving does not need.
    #[arg(long, value_enum, default_value_t = Seccomp::Kill)]
    pub seccomp: Seccomp,

    /// Seconds that connections have to end after SIGTERM or SIGINT. Then, or at a second signal, the program ends
    /// with status 3 and leaves commands in flight to the in-flight region; 0 does not wait.
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(0..=86400))]
    pub shutdown_timeout: u32,

    /// Print what this program can do, as JSON for management software, and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// A disk: a raw file or a block device, and options for it.
    #[arg(value_name = "DISK[,key=value]...")]
    pub disks: Vec<String>,

    /// Something else than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Longest `--poll-us`: a queue that looks for requests is slower to hear of anything else.
const MAX_POLL: i64 = 1000;

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// All of it.
    Strict,
    /// Nothing of it.
    None,
}

/// `--seccomp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// The process is killed.
    Kill,
    /// The kernel logs it.
    Log,
    /// Nothing; it is not looked at.
    None,
}

impl From<Seccomp> for Option<Violation> {
    fn from(seccomp: Seccomp) -> Self {
        match seccomp {
            Seccomp::Kill => Some(Violation::Kill),
            Seccomp::Log => Some(Violation::Log),
            Seccomp::None => None,
        }
    }
}

/// `--io-engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoEngine {
    /// io_uring if the kernel allows it, else threads.
    Auto,
    /// io_uring.
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads.
    Threads,
}

impl From<IoEngine> for EngineKind {
    fn from(engine: IoEngine) -> Self {
        match engine {
            IoEngine::Auto => EngineKind::Auto,
            IoEngine::IoUring => EngineKind::Uring,
            IoEngine::Threads => EngineKind::Threads,
        }
    }
}

/// What the program can do beside serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show which parts of a disk are mapped, anchored or deallocated; it may be in use.
    Map(MapArgs),
}

/// Arguments of `thinlun map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// A raw file or a block device. It is only looked at.
    pub disk: PathBuf,

    /// How to print it.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,

    /// Draw the picture again every so many seconds, until it is interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          require_equals = true, conflicts_with = "output",
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub watch: Option<u64>,

    /// Cells in a row of the picture.
    #[arg(long, default_value_t = 64)]
    pub width: u16,
}

/// How to print something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table and a picture.
    Human,
    /// JSON, for programs.
    Json,
}

const DISK_HELP: &str = "\
Disk options (a comma in a path or value is doubled; without lun= the disks are LUN 0, 1, ...):
  readonly              nobody writes to it; several readers may share it
  size=SIZE             create a sparse file of this size (K, M, G, T) if there is none
  lun=N, target=N       logical unit number (0-16383) and target number (0-255)
  format=raw            the disk is the file as it is, even if that looks like a qcow2, VMDK or other image
  block-size=512|4096   logical block size (default 512)
  physical-block-size=N physical block size (default: the host file's block, at most 4096)
  cache=writeback       fast; guest flushes make data safe (default)
  cache=writethrough    every write is on stable storage before it is answered
  cache=direct          bypass the host's page cache (O_DIRECT)
  provision=KIND        space of a created file: thin (none), anchored (reserved) or full (written)
  space-limit=SIZE      most space that the file may take, below what its file system has
  detect-zeroes=on|unmap  writes of zeroes reserve space, or give it back
  discard=off           do not offer thin provisioning (UNMAP, WRITE SAME with UNMAP)
  discard-granularity=N size in which unmapping pays (default: the host file's block)
  serial=TEXT, wwn=HEX  unit serial number and NAA name (default: made from the path)
  rotational            look like a disk that turns
  locking=off           do not lock the file: for the daemon that a guest migrates to
  adopt                 take what lies beside the file (.thinlun, .thinlun-write) for its own though it
                        is about another: once, for a copy or backup that was made of both
  fault=OP:EFFECT[@FROM-TO][*COUNT][+...]  let the host fail: OP read, write, flush, discard, zero,
                        copy or any; EFFECT eio, enospc, erofs, enomem, half, delay-ms-N
                        or stall-ms-N (as a frozen file system)

Log lines are chosen by the environment variable RUST_LOG (error, warn, info, debug).
SIGHUP looks at the sizes of the disks again; SIGTERM and SIGINT end the program cleanly, a second one at once.";
