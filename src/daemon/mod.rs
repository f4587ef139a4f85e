//! The process: sockets, signals, and on each socket one guest after another.

mod ports;
mod signals;
mod socket;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::{Cli, IoEngine, Sandbox};
use crate::config::{DiskConfig, StartError, open_disks};
use crate::sandbox::{self, Reach};
use crate::scsi::{Target, background};
use crate::store::engine::uring;
use crate::store::file::stable_name;
use crate::vhost::{Device, Offer};
use crate::{limits, logger};
use ports::Ports;
use signals::Signals;
use socket::{Checked, Endpoint};

/// Exit status of a daemon that was asked to end and did, with commands in flight.
const LEFT_BEHIND: u8 = 3;

/// What `--print-capabilities` prints (vhost-user backend program conventions).
const CAPABILITIES: &str = r#"{"type": "scsi"}"#;

/// Runs the program until it is asked to end. The exit status is 3 if it ended with commands in flight, else 0.
///
/// # Errors
/// If it cannot start; then nothing has changed.
pub fn run(cli: &Cli) -> Result<ExitCode, StartError> {
    if cli.print_capabilities {
        println!("{CAPABILITIES}");
        return Ok(ExitCode::SUCCESS);
    }
    limits::raise_open_files();
    let disks = cli.disks.iter().map(|a| DiskConfig::parse(a)).collect::<Result<Vec<_>, _>>()?;
    let endpoints = Endpoint::from_cli(cli)?;
    if cli.io_engine == IoEngine::IoUring && !uring::is_there() {
        return Err(StartError::host(
            "--io-engine: the kernel refuses io_uring; auto and threads work without it",
        ));
    }
    // Before there is any other thread, so that all of them have these signals blocked.
    let signals = Signals::block().map_err(|e| StartError::host(format!("signals: {e}")))?;
    let checked: Vec<_> = endpoints.into_iter().map(Endpoint::check).collect::<Result<_, _>>()?;
    let (units, created) = open_disks(&disks)?;
    let sockets: Vec<_> = checked.into_iter().map(Checked::open).collect::<Result<_, _>>()?;
    for unit in &units {
        let s = unit.settings();
        log::info!(
            "target {} LUN {}: {} blocks of {} bytes, serial {}, {}",
            s.target,
            s.lun.get(),
            unit.blocks(),
            s.block_size,
            s.serial,
            unit.store().capabilities().ways
        );
    }
    lock_in(cli, &disks)?;
    let short =
        |e: std::io::Error| StartError::host(limits::behind(&e).unwrap_or_else(|| e.to_string()));
    logger::detach().map_err(short)?;
    let offer = Offer {
        request_queues: cli.num_queues.into(),
        config_space: cli.config_space,
        engine: cli.io_engine.into(),
        poll: Duration::from_micros(cli.poll_us.into()),
    };
    let count = u16::try_from(sockets.len()).unwrap_or(u16::MAX);
    let target = Arc::new(Target::new(units, count));
    let device = Arc::new(Device::new(Arc::clone(&target), offer));
    target.disks().iter().for_each(background::resume);
    let ports = Ports::open(&device, &signals, sockets).map_err(short)?;
    created.keep();
    let all_ended = ports.serve(Duration::from_secs(cli.shutdown_timeout.into()));
    logger::finish();
    // The kernel closes the images: where their file system hangs, that waits in it, and here it would keep the end
    // of the others waiting.
    std::mem::forget(device);
    Ok(if all_ended { ExitCode::SUCCESS } else { ExitCode::from(LEFT_BEHIND) })
}

/// Leaves nothing that serving does not need.
fn lock_in(cli: &Cli, disks: &[DiskConfig]) -> Result<(), StartError> {
    if cli.sandbox == Sandbox::None {
        log::warn!("--sandbox=none: a fault in this process can do what its user can");
        return Ok(());
    }
    let folder = |path: &Path| Some(stable_name(path).ok()?.parent()?.to_path_buf());
    let beside = disks.iter().filter_map(|disk| folder(&disk.path)).map(Reach::Beside);
    let socket = cli.socket_path.iter().filter_map(|path| folder(path)).map(Reach::Socket);
    let reach: Vec<Reach> = beside.chain(socket).collect();
    let missing = sandbox::enter(&reach, cli.seccomp.into()).map_err(|e| {
        StartError::host(format!("--sandbox=strict: {e}; --sandbox=none does without"))
    })?;
    missing.iter().for_each(|what| log::warn!("{what}"));
    Ok(())
}
