//! `thinlun map`: true, harmless, and beside a daemon that serves the same file.

mod frontend;
mod mounts;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use frontend::daemon::{Scratch, host_write};
use frontend::*;
use mounts::{ALL, Kind, Mount};
use nix::fcntl::{FallocateFlags, fallocate};

fn map(path: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thinlun"))
        .arg("map")
        .args(arguments)
        .arg(path)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// 1 MiB of data, 1 MiB reserved with one fresh block in it, a hole, and a tail that fills no block.
fn laid_out(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(4 * MIB + 100).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, MIB as i64, MIB as i64).unwrap();
    host_write(path, 0, &vec![1; MIB as usize]);
    file.sync_all().unwrap();
    host_write(path, MIB + 65536, &[2; 4096]);
}

fn object(start: u64, length: u64, status: &str) -> String {
    let (zero, alloc) = (status != "mapped", status != "deallocated");
    let offset = if alloc { format!("\"offset\": {start}, ") } else { String::new() };
    format!(
        "{{\"start\": {start}, \"length\": {length}, \"zero\": {zero}, \"alloc\": {alloc}, \
         {offset}\"status\": \"{status}\"}}"
    )
}

#[test]
fn json_says_what_is_there_and_looking_changes_nothing() {
    for kind in ALL {
        let Some(mount) = Mount::new(kind, 320) else { continue };
        let path = mount.path().join("disk.img");
        laid_out(&path);
        let before = fs::metadata(&path).unwrap();
        let fresh = MIB + 65536;
        // tmpfs does not tell what is reserved.
        let reserved = if kind == Kind::Tmpfs { "deallocated" } else { "anchored" };
        let mut expected = vec![
            object(0, MIB, "mapped"),
            object(MIB, 65536, reserved),
            object(fresh, 4096, "mapped"),
        ];
        if kind == Kind::Tmpfs {
            expected.push(object(fresh + 4096, 4 * MIB + 100 - fresh - 4096, reserved));
        } else {
            expected.push(object(fresh + 4096, 2 * MIB - fresh - 4096, reserved));
            expected.push(object(2 * MIB, 2 * MIB + 100, "deallocated"));
        }
        let json = text(&map(&path, &["--output", "json"]));
        assert_eq!(json, format!("[{}]\n", expected.join(",\n")), "{kind:?}");
        let after = fs::metadata(&path).unwrap();
        let facts = |m: &fs::Metadata| (m.len(), m.blocks(), m.mtime(), m.mtime_nsec());
        assert_eq!(facts(&before), facts(&after), "{kind:?}");
    }
}

#[test]
fn a_file_in_use_can_be_looked_at() {
    let scratch = Scratch::new();
    let path = scratch.image("disk.img", 4 * MIB);
    let daemon = Daemon::builder(&scratch).disk(&path, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &vec![3; MIB as usize]);
    let table = text(&map(&path, &["--width", "16"]));
    assert!(table.contains("################\n################\n................\n"), "{table}");
    assert!(table.contains("# mapped            1MiB  25%  1 extent\n"), "{table}");
    lun.write16(4096, &[4; 512]);
}

#[test]
fn what_cannot_be_looked_at_is_one_line() {
    for (path, why) in [
        ("/nowhere.img", "no such file"),
        ("/etc/passwd/disk.img", "not a directory"),
        ("/", "directory"),
        ("/dev/null", "special"),
    ] {
        let output = map(Path::new(path), &[]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(message.contains(path) && message.contains(why), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

/// `--watch` takes its seconds only behind an equals sign, draws whole frames, and ends well when it is told
/// to.
#[test]
fn watching_ends_when_it_is_told_to() {
    let scratch = Scratch::new();
    let path = scratch.image("5", 4 * MIB);
    for ends in [nix::sys::signal::Signal::SIGINT, nix::sys::signal::Signal::SIGTERM] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_thinlun"))
            .args(["map", "--watch"])
            .arg(&path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines =
            std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        // A second frame comes by itself.
        let last = "0B of 4MiB are allocated";
        for _ in 0..2 {
            assert!(lines.by_ref().any(|line| line.unwrap() == last));
        }
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, ends).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        assert!(rest.last().is_none_or(|line| line == last), "a frame was cut off: {rest:?}");
    }
    let refused = map(&path, &["--watch=0"]);
    assert_eq!(refused.status.code(), Some(2));
}
