//! The process: sockets, signals, and on each socket one guest after another.

mod ports;
mod signals;
mod socket;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::cli::{Cli, IoEngine, Sandbox};
use crate::config::{DiskConfig, StartError, open_disks};
use crate::sandbox::{self, Reach};
use crate::scsi::Target;
use crate::store::engine::uring;
use crate::store::file::{real_name, stable_name};
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
    logger::hold();
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
    let (units, mut created) = open_disks(&disks, cli.sandbox == Sandbox::Strict)?;
    created.clear()?;
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
    // Before all other threads, which may log and not look whether there is room.
    logger::detach().map_err(short)?;
    for unit in &units {
        unit.store().pool().start().map_err(|e| {
            let why = limits::behind(&e).unwrap_or_else(|| e.to_string());
            StartError::host(format!("a thread for each disk: {why}"))
        })?;
    }
    let offer = Offer {
        request_queues: cli.num_queues.into(),
        config_space: cli.config_space,
        engine: cli.io_engine.into(),
        poll: Duration::from_micros(cli.poll_us.into()),
    };
    let count = u16::try_from(sockets.len()).unwrap_or(u16::MAX);
    let target = Arc::new(Target::new(units, count));
    let device = Arc::new(Device::new(Arc::clone(&target), offer).map_err(short)?);
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
    let reach = reach(disks, &cli.socket_path);
    let missing = sandbox::enter(&reach, cli.seccomp.into()).map_err(|e| {
        StartError::host(format!("--sandbox=strict: {e}; --sandbox=none does without"))
    })?;
    missing.iter().for_each(|what| log::warn!("{what}"));
    Ok(())
}

/// What is reached by name from here on: beside the disks that change, and the sockets. Nothing is made beside a disk that
/// is only read, nor beside a device: that is /dev.
fn reach(disks: &[DiskConfig], sockets: &[PathBuf]) -> Vec<Reach> {
    let parent = |path: PathBuf| Some(path.parent()?.to_path_buf());
    let folder = |path: &Path| parent(stable_name(path).ok()?);
    let changes = |disk: &&DiskConfig| {
        !disk.read_only && disk.path.metadata().is_ok_and(|metadata| metadata.is_file())
    };
    let beside =
        disks.iter().filter(changes).filter_map(|disk| parent(real_name(&disk.path).ok()?));
    let sockets = sockets.iter().filter_map(|path| folder(path));
    beside.map(Reach::Beside).chain(sockets.map(Reach::Socket)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    #[test]
    fn only_what_changes_and_is_a_file_has_something_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().canonicalize().unwrap();
        let image = |name: &str| {
            let folder = folder.join(name);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("image"), [0; 512]).unwrap();
            folder.join("image").display().to_string()
        };
        let mut arguments = vec![image("changes"), image("readonly") + ",readonly"];
        let devices = std::fs::read_dir("/dev").unwrap().flatten();
        let is_disk =
            |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_block_device());
        match devices.into_iter().find(is_disk) {
            Some(device) => arguments.push(device.path().display().to_string()),
            None => eprintln!("*** SKIPPED: nothing was proved of a block device: there is none"),
        }
        let disks: Vec<_> =
            arguments.iter().map(|a| DiskConfig::parse(a.as_ref()).unwrap()).collect();
        let wanted = [Reach::Beside(folder.join("changes")), Reach::Socket(folder.clone())];
        assert_eq!(reach(&disks, &[folder.join("socket")]), wanted);
    }
}
