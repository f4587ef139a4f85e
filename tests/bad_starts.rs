//! Starting and ending: command lines that must be refused, with one clear line and no trace
//! left; the ways to pass a socket; ordinary ends.

mod frontend;
mod mounts;

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use frontend::daemon::{DaemonBuilder, is_listened_on};
use frontend::pattern::{assert_same, blocks};
use frontend::*;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

/// "Quickly", for a debug build on a busy machine.
const SOON: Duration = Duration::from_secs(2);

const NOBODY: u32 = 65534;

/// Writes and reads through a new connection.
#[track_caller]
fn assert_serves(daemon: &Daemon) {
    let fe = FrontEnd::connect(daemon);
    let lun = fe.ready_lun(0, 0);
    let data = blocks(0, 8, lun.block_size, 42);
    lun.write10(0, &data);
    assert_same(&lun.read10(0, 8), &data, "what was written");
}

/// Refused, with an explanation that contains `words`.
#[track_caller]
fn assert_refused(builder: DaemonBuilder, words: &[&str]) {
    let (status, stderr) = builder.expect_refusal();
    println!("{status}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "`{word}` is not in: {stderr}");
    }
}

// ----- disks that cannot be served ------------------------------------------------------------

#[test]
fn files_that_are_not_disks() {
    let scratch = Scratch::new();
    let disk = |path: &Path, options: &str| Daemon::builder(&scratch).disk(path, options);
    assert_refused(disk(&scratch.join("missing.img"), ""), &["missing.img"]);
    assert_refused(disk(&scratch.join("no/such/dir.img"), "size=1M"), &["no/such/dir.img"]);
    assert_refused(disk(scratch.path(), ""), &[scratch.path().to_str().unwrap()]);
    assert_refused(disk(Path::new(""), ""), &[]);
    assert_refused(disk(Path::new("/dev/null"), ""), &["/dev/null"]);

    symlink("nowhere", scratch.join("dangling.img")).unwrap();
    assert_refused(disk(&scratch.join("dangling.img"), ""), &["dangling.img"]);
    nix::unistd::mkfifo(&scratch.join("fifo.img"), Mode::S_IRWXU).unwrap();
    assert_refused(disk(&scratch.join("fifo.img"), ""), &["fifo.img"]);
    let _listener = UnixListener::bind(scratch.join("socket.img")).unwrap();
    assert_refused(disk(&scratch.join("socket.img"), ""), &["socket.img"]);
}

/// Made by qemu-img where it is there; what other tools make is known by tests of the table.
#[test]
fn image_files_that_are_no_disks_as_they_are() {
    let scratch = Scratch::new();
    let disk = |path: &Path, options: &str| Daemon::builder(&scratch).disk(path, options);
    for (format, name) in [
        ("qcow2", "qcow2"),
        ("qcow", "qcow"),
        ("qed", "QED"),
        ("vmdk", "VMDK"),
        ("vhdx", "VHDX"),
        ("vpc", "VHD"),
        ("vdi", "VDI"),
        ("parallels", "Parallels"),
    ] {
        let path = scratch.join(format!("image.{format}"));
        let arguments = ["create", "-q", "-f", format];
        match Command::new("qemu-img").args(arguments).arg(&path).arg("8M").status() {
            Ok(status) if status.success() => {}
            other => {
                mounts::skipped(&format!("nothing was proved of {format} of qemu-img: {other:?}"));
                continue;
            }
        }
        let before = fs::read(&path).unwrap();
        let words = ["image.", &format!("is a {name} image"), "qemu-img convert", "format=raw"];
        assert_refused(disk(&path, ""), &words);
        assert_refused(disk(&path, "readonly"), &words);
        assert_refused(disk(&path, "size=8M"), &words);
        assert!(fs::read(&path).unwrap() == before, "{format}");
    }
    // A guest may have written what looks like one.
    let path = scratch.join("raw.img");
    fs::write(&path, [&b"QFI\xfb\0\0\0\x03"[..], &[0; MIB as usize - 8]].concat()).unwrap();
    assert_refused(disk(&path, ""), &["raw.img", "qcow2"]);
    let daemon = disk(&path, "format=raw").spawn();
    assert_serves(&daemon);
    assert_refused(disk(&path, "format=qcow2"), &["raw.img", "format", "qemu-img convert"]);
}

#[test]
fn sizes_that_are_no_disk() {
    let scratch = Scratch::new();
    for (name, size, options) in [
        ("odd.img", 1000, ""),
        ("long.img", MIB + 1, ""),
        ("small-blocks.img", 512 * 3, "block-size=4096"),
        ("empty.img", 0, ""),
    ] {
        let disk = scratch.image(name, size);
        assert_refused(Daemon::builder(&scratch).disk(&disk, options), &[name]);
        assert_eq!(fs::metadata(disk).unwrap().len(), size, "{name} keeps its size");
    }
}

#[test]
fn a_size_that_contradicts_the_file() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    for size in ["size=2M", "size=512K"] {
        assert_refused(Daemon::builder(&scratch).disk(&disk, size), &["disk.img"]);
    }
    Daemon::builder(&scratch).disk(&disk, "size=1M").spawn();
    assert_eq!(fs::metadata(disk).unwrap().len(), MIB);
}

#[test]
fn a_size_makes_a_sparse_file() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let disk = scratch.join("new.img");
    let daemon = Daemon::builder(&scratch).disk(&disk, "size=64M").spawn();
    assert_serves(&daemon);
    drop(daemon);
    let meta = fs::metadata(&disk).unwrap();
    assert_eq!(meta.len(), 64 * MIB);
    assert!(meta.blocks() * 512 < MIB, "{} bytes are allocated", meta.blocks() * 512);
    // It is there now, and taken as it is.
    let daemon = Daemon::builder(&scratch).disk(&disk, "size=64M").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    assert_same(&lun.read10(0, 8), &blocks(0, 8, 512, 42), "what the first daemon wrote");
}

#[test]
fn options_that_are_wrong() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let wrong = [
        ("colour=blue", "colour"),
        ("readonl", "readonl"),
        ("block-size=513", "513"),
        ("block-size=0", "block-size"),
        ("block-size=-512", "block-size"),
        ("block-size=1024", "1024"),
        ("block-size=", "block-size"),
        ("block-size", "block-size"),
        ("physical-block-size=3000", "3000"),
        ("physical-block-size=512,block-size=4096", "physical-block-size"),
        ("lun=abc", "abc"),
        ("lun=-1", "lun"),
        ("lun=16384", "16384"),
        ("lun=99999999999999999999", "lun"),
        ("target=256", "256"),
        ("target=x", "target"),
        ("size=12Q", "12Q"),
        ("size=1000", "1000"),
        ("size=0", "size"),
        ("size=99999999999T", "size"),
        ("cache=yes", "yes"),
        ("wwn=xyz", "xyz"),
        ("lun=1,lun=2", "lun"),
        ("readonly,readonly", "readonly"),
        (",", "disk.img"),
    ];
    for (options, word) in wrong {
        println!("{options}");
        assert_refused(Daemon::builder(&scratch).disk(&disk, options), &[word]);
    }
    assert_eq!(fs::metadata(disk).unwrap().len(), MIB);
}

#[test]
fn wrong_options_of_a_file_that_is_not_there_make_none() {
    let scratch = Scratch::new();
    let disk = scratch.join("new.img");
    for options in ["size=1M,colour=blue", "size=1M,block-size=7", "colour=blue,size=1M"] {
        assert_refused(Daemon::builder(&scratch).disk(&disk, options), &[]);
    }
    // Nor does a good disk beside a bad one.
    let bad = scratch.join("missing.img");
    for builder in [
        Daemon::builder(&scratch).disk(&disk, "size=1M,lun=0").disk(&bad, "lun=1"),
        Daemon::builder(&scratch).disk(&bad, "lun=1").disk(&disk, "size=1M,lun=0"),
    ] {
        assert_refused(builder, &["missing.img"]);
    }
}

#[test]
fn two_disks_in_one_place() {
    let scratch = Scratch::new();
    let (first, second) = (scratch.image("a.img", MIB), scratch.image("b.img", MIB));
    let builder = Daemon::builder(&scratch).disk(&first, "lun=1").disk(&second, "lun=1");
    assert_refused(builder, &["lun", "1"]);
    let builder = Daemon::builder(&scratch).disk(&first, "lun=0").disk(&first, "lun=1");
    assert_refused(builder, &["a.img"]);
    let builder = Daemon::builder(&scratch).disk(&first, "target=1,lun=0").disk(&second, "lun=0");
    builder.spawn();
}

#[test]
fn a_file_without_permission() {
    if !nix::unistd::geteuid().is_root() {
        return mounts::skipped("only root can become somebody without permission");
    }
    let scratch = Scratch::new();
    let open = fs::Permissions::from_mode(0o777);
    fs::set_permissions(scratch.path(), open.clone()).unwrap();
    fs::create_dir(scratch.join("open")).unwrap();
    fs::set_permissions(scratch.join("open"), open).unwrap();
    let disk = scratch.image("open/secret.img", MIB);
    let mode = |mode| fs::set_permissions(&disk, fs::Permissions::from_mode(mode)).unwrap();
    let as_nobody = |options: &str| Daemon::builder(&scratch).user(NOBODY).disk(&disk, options);
    mode(0o600);
    assert_refused(as_nobody(""), &["secret.img", "denied"]);
    assert_refused(as_nobody("readonly"), &["secret.img", "denied"]);
    // Readable, not writable: only as a read-only disk.
    mode(0o644);
    assert_refused(as_nobody(""), &["secret.img", "denied"]);
    drop(as_nobody("readonly").spawn());
    mode(0o666);
    drop(as_nobody("").spawn());
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert_refused(as_nobody(""), &["vhost.sock", "denied"]);
}

// ----- sockets --------------------------------------------------------------------------------

#[test]
fn a_socket_that_is_in_use() {
    let daemon = Daemon::with_disk(MIB, "");
    let other = daemon.scratch().image("other.img", MIB);
    assert_refused(Daemon::builder(daemon.scratch()).disk(&other, ""), &["vhost.sock"]);
    assert!(is_listened_on(daemon.socket()));
    assert_serves(&daemon);
    // Also while a front end is connected.
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    assert_refused(Daemon::builder(daemon.scratch()).disk(&other, ""), &["vhost.sock"]);
    lun.test_unit_ready();
}

#[test]
fn a_stale_socket_is_replaced() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    drop(UnixListener::bind(scratch.join("vhost.sock")).unwrap());
    assert!(scratch.join("vhost.sock").exists());
    assert_serves(&Daemon::builder(&scratch).disk(&disk, "").spawn());
    // The socket of a daemon that was killed.
    Daemon::builder(&scratch).disk(&disk, "").spawn().kill();
    assert!(scratch.join("vhost.sock").exists());
    assert_serves(&Daemon::builder(&scratch).disk(&disk, "").spawn());
}

#[test]
fn paths_that_cannot_be_sockets() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let at = |path: &Path| Daemon::builder(&scratch).socket(path).disk(&disk, "");
    let file = scratch.file("precious.txt", b"not a socket");
    assert_refused(at(&file), &["precious.txt"]);
    assert_eq!(fs::read(&file).unwrap(), b"not a socket", "a file is not a stale socket");
    assert_refused(at(&scratch.join("no/such/dir/sock")), &["no/such/dir/sock"]);
    assert_refused(at(scratch.path()), &[]);
    let long = scratch.join("x".repeat(120));
    assert_refused(at(&long), &["xxxxx"]);
    // sun_path has 108 bytes, one of them for the zero at the end.
    let of_length = |length| scratch.join("y".repeat(length - scratch.join("").as_os_str().len()));
    assert_refused(at(&of_length(108)), &["yyyy", "108 bytes long", "at most 107"]);
    assert_serves(&at(&of_length(107)).spawn());
}

/// A daemon that is one of several, ended with this value.
struct Racer(std::process::Child, std::path::PathBuf);

impl Racer {
    fn start(scratch: &Scratch, n: usize) -> Self {
        let log = scratch.join(format!("{n}.log"));
        let mut command = Command::new(daemon::BINARY);
        command.arg("--socket-path").arg(scratch.join("vhost.sock"));
        command.arg(scratch.image(&format!("{n}.img"), MIB));
        command.stderr(fs::File::create(&log).unwrap()).env_remove("RUST_LOG");
        Racer(command.spawn().unwrap(), log)
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Of daemons that start at once and find the same stale socket, one serves, and the others say why they do not.
#[test]
fn a_stale_socket_is_replaced_by_one() {
    for round in 0..20 {
        let scratch = Scratch::new();
        let path = scratch.join("vhost.sock");
        if round % 2 == 0 {
            drop(UnixListener::bind(&path).unwrap());
        }
        let mut all: Vec<_> = (0..4).map(|n| Racer::start(&scratch, n)).collect();
        let mut refused = 0;
        eventually("all but one are refused", || {
            all.retain_mut(|Racer(child, log)| {
                let Some(status) = child.try_wait().unwrap() else { return true };
                let text = fs::read_to_string(log).unwrap();
                assert_eq!(status.code(), Some(1), "{text}");
                assert!(text.contains("is in use by another process"), "{text}");
                refused += 1;
                false
            });
            refused == 3
        });
        let Racer(child, log) = &all[0];
        let diagnosis = daemon::Diagnosis::of(log.clone(), child.id() as i32);
        eventually("the one that is left listens", || is_listened_on(&path));
        let stream = UnixStream::connect(&path).unwrap();
        FrontEnd::builder().attach(stream, diagnosis).ready_lun(0, 0).read10(0, 8);
    }
}

/// Another process holds the lock of the directory.
#[test]
fn a_socket_waits_for_the_lock_of_its_directory() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let directory = fs::File::open(scratch.path()).unwrap();
    directory.lock().unwrap();
    let socket = scratch.join("vhost.sock");
    let mut daemon = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(A_MOMENT);
            assert!(!socket.exists(), "it was made under another's lock");
            directory.unlock().unwrap();
        });
        Daemon::builder(&scratch).disk(&disk, "").spawn()
    });
    assert_eq!(daemon.terminate().code(), Some(0));
}

/// Somebody keeps it who makes no socket.
#[test]
fn a_directory_that_stays_locked_has_sockets_all_the_same() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let directory = fs::File::open(scratch.path()).unwrap();
    directory.lock().unwrap();
    let mut daemon = Daemon::builder(&scratch).disk(&disk, "").spawn();
    assert!(daemon.log().contains("its directory stays locked"), "{}", daemon.log());
    assert_eq!(daemon.terminate().code(), Some(0));
}

/// One file by several names.
#[test]
fn a_name_is_recognised_however_it_is_spelled() {
    let scratch = Scratch::new();
    let elsewhere = Scratch::new();
    fs::create_dir(scratch.join("sub")).unwrap();
    symlink(scratch.path(), elsewhere.join("link")).unwrap();
    let spelled = |name: &str| {
        [
            scratch.join("./.").join(name),
            scratch.join("sub/..").join(name),
            elsewhere.join("link").join(name),
        ]
    };
    let disk = scratch.image("disk.img", MIB);
    for path in spelled("vhost.sock") {
        let builder = Daemon::builder(&scratch).disk(&disk, "").arg("--socket-path").arg(&path);
        assert_refused(builder, &["given twice", "vhost.sock and as ", path.to_str().unwrap()]);
    }
    symlink(&disk, scratch.join("symlink.img")).unwrap();
    fs::hard_link(&disk, scratch.join("hardlink.img")).unwrap();
    let links = ["symlink.img", "hardlink.img"].map(|name| scratch.join(name));
    for path in spelled("disk.img").iter().chain(&links) {
        let builder = Daemon::builder(&scratch).disk(&disk, "").disk(path, "");
        let names = ["given twice", disk.to_str().unwrap(), path.to_str().unwrap()];
        assert_refused(builder, &names);
    }
    assert_refused(Daemon::builder(&scratch).disk(&disk, "").disk(&disk, ""), &["given twice"]);
    // Those that are to be made.
    for path in spelled("new.img") {
        let builder = Daemon::builder(&scratch).disk(&scratch.join("new.img"), "size=1M");
        assert_refused(builder.disk(&path, "size=1M"), &["given twice"]);
    }
    // Readers share.
    drop(Daemon::builder(&scratch).disk(&disk, "readonly").disk(&links[0], "readonly").spawn());
}

#[test]
fn arguments_that_do_not_go_together() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let disk = disk.to_str().unwrap();
    let socket = scratch.join("vhost.sock");
    let socket = socket.to_str().unwrap();
    let wrong: [&[&str]; 9] = [
        &[],
        &[disk],
        &["--socket-path", socket],
        &["--socket-path", socket, "--fd", "3", disk],
        &["--fd", "no", disk],
        &["--fd", "99", disk],
        &["--socket-path", socket, "--num-queues", "0", disk],
        &["--socket-path", socket, "--num-queues", "100000", disk],
        &["--socket-path", socket, "--no-such-option", disk],
    ];
    for args in wrong {
        let finished = Daemon::run(args);
        println!("{args:?}: {finished:?}");
        assert!(matches!(finished.status.code(), Some(1 | 2)), "{args:?}: {finished:?}");
        assert!(!finished.stderr.is_empty(), "{args:?} is refused without a word");
        assert!(!finished.stderr.contains("panicked"), "{args:?}: {finished:?}");
        assert!(!Path::new(socket).exists(), "{args:?} left a socket");
    }
}

// ----- locks ----------------------------------------------------------------------------------

#[test]
fn an_image_is_written_by_one_daemon_only() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let start = |name: &str, options: &str| {
        Daemon::builder(&scratch).socket(scratch.join(name)).disk(&disk, options)
    };
    let mut writer = start("writer", "").spawn();
    assert_refused(start("second", ""), &["disk.img", "in use"]);
    assert_refused(start("reader", "readonly"), &["disk.img", "in use"]);
    assert_serves(&writer);
    writer.kill();
    // The lock dies with its owner, and readers share.
    let readers = [start("r1", "readonly").spawn(), start("r2", "readonly").spawn()];
    for reader in &readers {
        FrontEnd::connect(reader).ready_lun(0, 0).read10(0, 8);
    }
    assert_refused(start("second", ""), &["disk.img", "in use"]);
    drop(readers);
    assert_serves(&start("writer", "").spawn());
}

/// The same file by other names.
#[test]
fn a_lock_is_the_files_not_the_names() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    symlink(&disk, scratch.join("symlink.img")).unwrap();
    fs::hard_link(&disk, scratch.join("hardlink.img")).unwrap();
    let _writer = Daemon::builder(&scratch).disk(&disk, "").spawn();
    for name in ["symlink.img", "hardlink.img"] {
        let other = Daemon::builder(&scratch).socket(scratch.join("other"));
        assert_refused(other.disk(&scratch.join(name), ""), &[name, "in use"]);
    }
}

fn is_installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    if found.is_err() {
        mounts::skipped(&format!("locks were not held against {program}: it is not installed"));
    }
    found.is_ok()
}

fn qemu_io(disk: &Path, command: &str, read_only: bool) -> std::process::Output {
    let mut program = Command::new("qemu-io");
    if read_only {
        program.arg("-r");
    }
    program.args(["-f", "raw", "-c", command]).arg(disk).output().expect("qemu-io")
}

#[test]
fn qemu_tools_respect_the_daemons_lock() {
    if !is_installed("qemu-io") {
        return;
    }
    let daemon = Daemon::with_disk(MIB, "");
    let output = qemu_io(&daemon.disk(), "write 0 512", false);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("lock"), "qemu-io wrote: {text}");
    drop(daemon);

    let reader = Daemon::with_disk(MIB, "readonly");
    let output = qemu_io(&reader.disk(), "read 0 512", true);
    assert!(output.status.success(), "readers share: {output:?}");
    let output = qemu_io(&reader.disk(), "write 0 512", false);
    assert!(!output.status.success(), "qemu-io wrote while the daemon reads");
}

/// A qemu-io that holds an image open until it is told to quit.
struct Holder(std::process::Child);

impl Holder {
    fn new(disk: &Path, read_only: bool) -> Self {
        let mut program = Command::new("qemu-io");
        if read_only {
            program.arg("-r");
        }
        program.args(["-f", "raw"]).arg(disk);
        program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn().expect("qemu-io");
        // It answers a command only after it has opened the image.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut answer).expect("an answer");
        std::thread::sleep(A_MOMENT);
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_daemon_respects_qemus_lock() {
    if !is_installed("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let start = |options: &str| Daemon::builder(&scratch).disk(&disk, options);
    let writer = Holder::new(&disk, false);
    assert_refused(start(""), &["disk.img", "in use"]);
    assert_refused(start("readonly"), &["disk.img", "in use"]);
    drop(writer);
    let reader = Holder::new(&disk, true);
    drop(start("readonly").spawn());
    drop(reader);
    assert_serves(&start("").spawn());
}

// ----- information ----------------------------------------------------------------------------

#[test]
fn help_and_version() {
    let help = Daemon::run(["--help"]);
    assert!(help.status.success(), "{help:?}");
    for word in ["--socket-path", "--fd", "--print-capabilities", "readonly", "block-size"] {
        assert!(help.stdout.contains(word), "{word} is not in the help: {}", help.stdout);
    }
    let version = Daemon::run(["--version"]);
    assert!(version.status.success(), "{version:?}");
    assert_eq!(version.stdout.trim(), format!("thinlun {}", env!("CARGO_PKG_VERSION")));
    assert_eq!((help.stderr.as_str(), version.stderr.as_str()), ("", ""));
}

/// vhost-user specification, "Backend program conventions".
#[test]
fn capabilities_are_printed_as_json() {
    let printed = Daemon::run(["--print-capabilities"]);
    assert!(printed.status.success() && printed.stderr.is_empty(), "{printed:?}");
    let text: String = printed.stdout.split_whitespace().collect();
    assert!(text.starts_with('{') && text.ends_with('}'), "{printed:?}");
    assert!(text.contains(r#""type":"scsi""#), "{printed:?}");
    // The option wins over whatever else is on the command line.
    let printed = Daemon::run(["--print-capabilities", "--socket-path", "/nonexistent/socket"]);
    assert!(printed.status.success(), "{printed:?}");
}

// ----- inherited sockets ----------------------------------------------------------------------

#[test]
fn a_listening_socket_is_inherited() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let path = scratch.join("inherited.sock");
    let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
    let mut daemon = Daemon::builder(&scratch).disk(&disk, "").with_fd(listener, 40).spawn();
    for round in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        let fe = FrontEnd::builder().attach(stream, daemon.diagnosis());
        let lun = fe.ready_lun(0, 0);
        lun.write10(0, &blocks(0, 8, 512, round));
    }
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(path.exists(), "the socket belongs to who made it");
}

/// With a connected socket there is one connection; its end is the daemon's.
#[test]
fn a_connected_socket_is_inherited() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Daemon::builder(&scratch).disk(&disk, "").with_fd(theirs.into(), 41).spawn();
    let fe = FrontEnd::builder().attach(ours, daemon.diagnosis());
    let lun = fe.ready_lun(0, 0);
    lun.write10(0, &blocks(0, 8, 512, 1));
    drop(fe);
    let status = daemon.wait_exit(SOON).expect("an end after the connection's");
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    assert_same(&daemon::host_read(&disk, 0, 4096), &blocks(0, 8, 512, 1), "the disk");
}

#[test]
fn systemd_passes_a_listening_socket() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let path = scratch.join("systemd.sock");
    let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
    let mut daemon = Daemon::builder(&scratch).disk(&disk, "").with_listen_fd(listener).spawn();
    for _ in 0..2 {
        let stream = UnixStream::connect(&path).unwrap();
        let fe = FrontEnd::builder().attach(stream, daemon.diagnosis());
        fe.ready_lun(0, 0).read10(0, 8);
    }
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(path.exists(), "the socket belongs to who made it");
}

/// A socket may be given but once; and where one of several cannot be had, none is made.
#[test]
fn several_sockets() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let start = || Daemon::builder(&scratch).disk(&disk, "");
    let path = scratch.join("vhost.sock");
    assert_refused(start().arg("--socket-path").arg(&path), &["vhost.sock", "given twice"]);
    let file: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    assert_refused(start().with_fd(file, 42).arg("--fd").arg("42"), &["42", "given twice"]);
    let nowhere = scratch.join("no/such/dir.sock");
    assert_refused(start().arg("--socket-path").arg(nowhere), &["no/such/dir.sock"]);
    let many = (0..64).flat_map(|n| ["--socket-path".into(), format!("/tmp/{n}.sock")]);
    assert_refused(start().args(many), &["64"]);
    // Those that are handed over end with the last of them.
    let pairs = [0; 2].map(|_| UnixStream::pair().unwrap());
    let mut builder = start();
    let mut ours = Vec::new();
    for (number, (our, their)) in (43..).zip(pairs) {
        builder = builder.with_fd(their.into(), number);
        ours.push(our);
    }
    let mut daemon = builder.spawn();
    for our in ours {
        assert!(daemon.wait_exit(Duration::from_millis(100)).is_none());
        FrontEnd::builder().attach(our, daemon.diagnosis()).ready_lun(0, 0).test_unit_ready();
    }
    assert_eq!(daemon.wait_exit(SOON).expect("an end").code(), Some(0), "{}", daemon.log());
}

#[test]
fn descriptors_that_are_no_sockets() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let file: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    let start = || Daemon::builder(&scratch).disk(&disk, "");
    assert_refused(start().with_fd(file, 42), &["42", "not a socket"]);
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    assert_refused(start().with_fd(pipe, 42), &["42", "not a socket"]);
    assert_refused(start().without_socket().args(["--fd", "42"]), &["42", "not open"]);
}

/// Sockets that vhost-user is not spoken over.
#[test]
fn sockets_of_the_wrong_kind() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket, socketpair};
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let start = || Daemon::builder(&scratch).disk(&disk, "");
    let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap();
    for (kind, word) in [(SockType::Datagram, "datagram"), (SockType::SeqPacket, "packet")] {
        let (theirs, _ours) = pair(kind);
        assert_refused(start().with_fd(theirs, 42), &["42", word]);
        let (theirs, _ours) = pair(kind);
        assert_refused(start().with_listen_fd(theirs), &["3", word]);
    }
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert_refused(start().with_fd(tcp.into(), 42), &["42", "not a UNIX socket"]);
    let idle = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    assert_refused(start().with_fd(idle, 42), &["42", "neither listens nor is connected"]);
    // One socket by two numbers.
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let copy = theirs.try_clone().unwrap();
    let builder = start().with_fd(theirs.into(), 42).with_fd(copy.into(), 43);
    assert_refused(builder, &["42", "43", "given twice"]);
}

/// Sockets as their makers may leave them.
#[test]
fn a_socket_may_wait_or_not() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let daemon = Daemon::builder(&scratch).disk(&disk, "").with_fd(theirs.into(), 41).spawn();
    FrontEnd::builder().attach(ours, daemon.diagnosis()).ready_lun(0, 0).read10(0, 8);
    drop(daemon);
    // A front end that came and was taken by somebody else: nobody waits for it.
    let path = scratch.join("shared.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let theirs = listener.try_clone().unwrap();
    let mut daemon = Daemon::builder(&scratch).disk(&disk, "").with_fd(theirs.into(), 41).spawn();
    eventually("the socket is set to wait for nobody", || {
        let flags = nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        flags & libc::O_NONBLOCK != 0
    });
    assert_eq!(daemon.terminate().code(), Some(0));
}

/// What systemd, or whoever sets its variables, may get wrong.
#[test]
fn variables_of_systemd_that_fit_nothing() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let with = |variables: &str| {
        let script = format!("export {variables}; exec \"$0\" \"$@\"");
        Daemon::builder(&scratch).under("sh", &["-c", &script]).disk(&disk, "")
    };
    let without = |variables: &str| with(variables).without_socket();
    assert_refused(without("LISTEN_FDS=0 LISTEN_PID=$$"), &["LISTEN_FDS is 0"]);
    assert_refused(without("LISTEN_FDS=two LISTEN_PID=$$"), &["LISTEN_FDS", "two"]);
    assert_refused(without("LISTEN_FDS=1 LISTEN_PID=1"), &["process 1 ", "LISTEN_PID"]);
    assert_refused(without("LISTEN_FDS=1"), &["no socket"]);
    assert_refused(without("LISTEN_FDS=1 LISTEN_PID=$$"), &["3"]);
    assert_refused(with("LISTEN_FDS=1 LISTEN_PID=$$"), &["--socket-path", "LISTEN_FDS"]);
    // What is for another process is none of our business.
    assert_serves(&with("LISTEN_FDS=1 LISTEN_PID=1").spawn());
}

// ----- ends -----------------------------------------------------------------------------------

#[test]
fn signals_end_it_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::with_disk(MIB, "");
        end_quickly(&mut daemon, signal, "idle");

        let mut daemon = Daemon::with_disk(MIB, "");
        let fe = FrontEnd::connect(&daemon);
        fe.ready_lun(0, 0);
        end_quickly(&mut daemon, signal, "connected");

        let mut daemon = Daemon::with_disk(16 * MIB, "");
        let fe = FrontEnd::builder().queues(2).connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let write = lun.request(cdb::write10(0, 256)).data_out(vec![1; 128 << 10]);
        for _ in 0..40 {
            lun.submit(&write);
        }
        end_quickly(&mut daemon, signal, "busy");
    }
}

#[track_caller]
fn end_quickly(daemon: &mut Daemon, signal: Signal, when: &str) {
    let asked = Instant::now();
    let status = daemon.end_with(signal);
    let took = asked.elapsed();
    assert_eq!(status.code(), Some(0), "{when}, {signal}: {}", daemon.log());
    assert!(took < SOON, "{when}, {signal}: it took {took:?}");
    assert!(!daemon.socket().exists(), "{when}, {signal}: the socket is still there");
}

/// What was answered is in the file, however the daemon ends.
#[test]
fn an_end_loses_nothing_that_was_answered() {
    for round in 0..3 {
        let mut daemon = Daemon::with_disk(MIB, "");
        let fe = FrontEnd::connect(&daemon);
        let data = blocks(0, 64, 512, round);
        fe.ready_lun(0, 0).write10(0, &data);
        match round {
            0 => drop(daemon.terminate()),
            1 => drop(daemon.end_with(Signal::SIGINT)),
            _ => daemon.kill(),
        }
        assert_same(&daemon::host_read(&daemon.disk(), 0, data.len()), &data, "the file");
    }
}

/// A daemon that says nothing has nothing to complain of.
#[test]
fn a_quiet_run_writes_no_errors() {
    let mut daemon = Daemon::with_disk(MIB, "");
    assert_serves(&daemon);
    daemon.terminate();
    let log = daemon.log();
    for word in ["panicked", "ERROR", "WARN", "rror:"] {
        assert!(!log.contains(word), "{log}");
    }
}
