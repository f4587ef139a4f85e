//! What a process that serves cannot do: tried from inside, in a process of its own for each attempt, and looked up in
//! /proc of the real daemon.

mod frontend;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use frontend::daemon::Scratch;
use frontend::*;
use thinlun::sandbox::{self, Reach, Role, Violation};

/// Runs `attempt` of this file in another process, inside the sandbox.
fn attempt(name: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attempt_in_here", "--nocapture", "--ignored"])
        .env("ATTEMPT", name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status, text + &String::from_utf8_lossy(&output.stderr))
}

const SIGSYS: i32 = 31;

#[test]
fn what_is_forbidden_kills_or_fails() {
    let (status, text) = attempt("nothing");
    assert!(status.success(), "{text}");
    for name in [
        "exec",
        "fork",
        "socket",
        "connect",
        "ptrace",
        "mount",
        "bpf",
        "kill",
        "chmod",
        "executable memory",
    ] {
        let (status, text) = attempt(name);
        assert_eq!(status.signal(), Some(SIGSYS), "{name}: {status} {text}");
    }
    for name in ["open", "open beside", "open elsewhere", "write elsewhere"] {
        let (status, text) = attempt(name);
        let wanted = name == "open beside";
        assert!(status.success() && text.contains("could") == wanted, "{name}: {status} {text}");
    }
}

/// Every role in turn: a thread of it cannot do what only others need.
#[test]
fn threads_are_held_to_their_roles() {
    for name in ["queue accepts", "disk receives", "timer allocates"] {
        let (status, text) = attempt(name);
        assert_eq!(status.signal(), Some(SIGSYS), "{name}: {status} {text}");
    }
}

/// Not a test: what the others start.
#[test]
#[ignore = "is started by the other tests of this file"]
fn attempt_in_here() {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    let Ok(name) = std::env::var("ATTEMPT") else { return };
    let beside = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let directories = [beside.path(), elsewhere.path()].map(|path| fs::File::open(path).unwrap());
    fs::write(elsewhere.path().join("secret"), "secret").unwrap();
    let reach = [Reach::Beside(beside.path().to_owned())];
    let missing = sandbox::enter(&reach, Some(Violation::Kill)).unwrap();
    assert!(missing.is_empty(), "{missing:?}");
    let open = |directory: &fs::File, name: &str, flags| match openat(
        directory,
        name,
        flags,
        Mode::S_IRUSR | Mode::S_IWUSR,
    ) {
        Ok(_) => println!("could"),
        Err(error) => println!("failed: {error}"),
    };
    let create = OFlag::O_CREAT | OFlag::O_WRONLY;
    // SAFETY: calls with arguments that are no pointers, or null ones; none of them comes back.
    let call = |number: i64| unsafe { libc::syscall(number, 0, 0, 0, 0, 0) };
    let within = |role, number: i64| {
        // SAFETY: as above.
        let work = move || unsafe { libc::syscall(number, -1, 0, 0, 0, 0) };
        sandbox::spawn("attempt".into(), role, work).unwrap().join().unwrap()
    };
    match name.as_str() {
        "nothing" => {}
        "exec" => drop(call(libc::SYS_execve)),
        "fork" => drop(call(libc::SYS_fork)),
        "socket" => drop(call(libc::SYS_socket)),
        "connect" => drop(call(libc::SYS_connect)),
        "ptrace" => drop(call(libc::SYS_ptrace)),
        "mount" => drop(call(libc::SYS_mount)),
        "bpf" => drop(call(libc::SYS_bpf)),
        "kill" => drop(call(libc::SYS_kill)),
        "chmod" => drop(call(libc::SYS_fchmod)),
        "executable memory" => {
            // SAFETY: a new mapping, which is not used.
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_EXEC, 0x22, -1, 0) };
        }
        "open" => match fs::File::open("/etc/passwd") {
            Ok(_) => println!("could"),
            Err(error) => println!("failed: {error}"),
        },
        "open beside" => open(&directories[0], "notes", create),
        "open elsewhere" => open(&directories[1], "secret", OFlag::O_RDONLY),
        "write elsewhere" => open(&directories[1], "new", create),
        "queue accepts" => drop(within(Role::Queue, libc::SYS_accept4)),
        "disk receives" => drop(within(Role::Disk, libc::SYS_recvmsg)),
        "timer allocates" => drop(within(Role::Timer, libc::SYS_fallocate)),
        _ => panic!("no such attempt"),
    }
    // What the test harness does at its end is not allowed either.
    std::process::exit(0);
}

#[test]
fn the_daemon_has_no_privileges() {
    let daemon = Daemon::with_disk(MIB, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(0, &[1; 4096]);
    let mut threads = 0;
    for entry in fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = fs::read_to_string(entry.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim_start_matches(':').trim().to_owned()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}\n{status}");
        }
        assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()), "{status}");
        threads += 1;
    }
    assert!(threads >= 4);
}

/// With the sandbox off, and with its filters off, the daemon says so or serves all the same.
#[test]
fn the_sandbox_can_be_taken_off() {
    for (arguments, seccomp, warns) in [
        (&["--sandbox=none"][..], "0", true),
        (&["--seccomp=none"], "0", false),
        (&["--seccomp=log"], "2", false),
    ] {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", MIB);
        let daemon = Daemon::builder(&scratch).disk(&disk, "").args(arguments).spawn();
        FrontEnd::connect(&daemon).ready_lun(0, 0).write16(0, &[1; 4096]);
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        assert!(status.contains(&format!("Seccomp:\t{seccomp}\n")), "{arguments:?}: {status}");
        assert_eq!(daemon.log().contains("--sandbox=none"), warns);
    }
}
