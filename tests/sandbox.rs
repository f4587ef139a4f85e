//! What a process that serves cannot do: tried from inside, in a process of its own for each attempt, and looked up in
//! /proc of the real daemon.

mod frontend;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use frontend::daemon::Scratch;
use frontend::*;
use thinlun::logger;
use thinlun::sandbox::{self, Reach, Role, Violation};

/// Runs `attempt` of this file by a thread for `role` of another process, inside the sandbox.
fn attempt(role: Role, name: &str) -> (ExitStatus, String) {
    let output = attempts(role, name).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status, text + &String::from_utf8_lossy(&output.stderr))
}

fn attempts(role: Role, name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "attempt_in_here", "--nocapture", "--ignored"])
        .env("ATTEMPT", name)
        .env("ROLE", format!("{role:?}"))
        .env("RUST_BACKTRACE", if name == "panic" { "1" } else { "0" });
    command
}

#[track_caller]
fn is_killed(role: Role, name: &str) {
    let (status, text) = attempt(role, name);
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{role:?}, {name}: {status} {text}");
}

/// The attempt comes back: it could be made, or it failed.
#[track_caller]
fn comes_back(role: Role, name: &str, could: bool) {
    let (status, text) = attempt(role, name);
    let said = text.lines().any(|line| line == if could { "could" } else { "could not" });
    assert!(status.success() && said, "{role:?}, {name}: {status} {text}");
}

/// What no role does.
const NEVER: &[(&str, i64)] = &[
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("clone", libc::SYS_clone),
    ("socket", libc::SYS_socket),
    ("socketpair", libc::SYS_socketpair),
    ("connect", libc::SYS_connect),
    ("bind", libc::SYS_bind),
    ("listen", libc::SYS_listen),
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("mount", libc::SYS_mount),
    ("bpf", libc::SYS_bpf),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("kill", libc::SYS_kill),
    ("tgkill", libc::SYS_tgkill),
    ("fchmod", libc::SYS_fchmod),
    ("linkat", libc::SYS_linkat),
    ("symlinkat", libc::SYS_symlinkat),
    ("mkdirat", libc::SYS_mkdirat),
    ("openat2", libc::SYS_openat2),
    ("seccomp", libc::SYS_seccomp),
    ("prctl", libc::SYS_prctl),
    ("landlock_restrict_self", libc::SYS_landlock_restrict_self),
    ("io_uring_setup", libc::SYS_io_uring_setup),
];

/// What some roles do, and which.
const SOME: &[(&str, i64, &[Role])] = &[
    ("accept4", libc::SYS_accept4, &[Role::Main]),
    ("recvmsg", libc::SYS_recvmsg, &[Role::Connection]),
    ("sendto", libc::SYS_sendto, &[Role::Connection]),
    ("io_uring_enter", libc::SYS_io_uring_enter, &[Role::Queue]),
    ("pwrite64", libc::SYS_pwrite64, &[Role::Queue, Role::Disk]),
    ("fallocate", libc::SYS_fallocate, &[Role::Disk]),
    ("ioctl FS_IOC_FIEMAP", libc::SYS_ioctl, &[Role::Disk]),
    ("renameat", libc::SYS_renameat, &[Role::Names]),
    ("renameat2", libc::SYS_renameat2, &[Role::Names]),
    ("unlinkat", libc::SYS_unlinkat, &[Role::Names, Role::Main]),
];

const FIEMAP: i64 = 0xc020_660b;

#[test]
fn what_no_role_does_kills() {
    for role in Role::ALL {
        comes_back(role, "nothing", true);
        for (name, _) in NEVER {
            is_killed(role, name);
        }
        is_killed(role, "executable memory");
        is_killed(role, "executable code");
    }
}

/// Every role in turn: a thread of it cannot do what only others need.
#[test]
fn threads_are_held_to_their_roles() {
    for (name, _, roles) in SOME {
        for role in Role::ALL {
            match roles.contains(&role) {
                true => assert!(attempt(role, name).0.success(), "{role:?}, {name}"),
                false => is_killed(role, name),
            }
        }
    }
}

/// A ring is restricted before anybody gets it. A queue can turn one on that was made for it, and cannot change it.
#[test]
fn rings_are_made_by_the_maker_only() {
    for role in Role::ALL {
        is_killed(role, "register files with a ring");
        is_killed(role, "lift a ring's restrictions");
        match role {
            Role::Queue => assert!(attempt(role, "enable a ring").0.success()),
            _ => is_killed(role, "enable a ring"),
        }
    }
}

/// Names are for one role, and for it below the image's directory; the rest has the files that are open.
#[test]
fn names_are_out_of_reach() {
    // As it may be said in four ways.
    let opens = ["open image", "open image by path", "open below image", "create beside image"];
    let elsewhere = ["open elsewhere", "open elsewhere by path", "open socket"];
    for role in Role::ALL {
        for name in opens {
            let by_path_alone = name == "open image by path";
            comes_back(role, name, role == Role::Names && !by_path_alone);
        }
        for name in elsewhere {
            comes_back(role, name, false);
        }
    }
    for name in ["remove elsewhere by path", "remove socket", "move image elsewhere"] {
        comes_back(Role::Names, name, false);
    }
    for (name, could) in
        [("remove image", false), ("remove elsewhere by path", false), ("remove socket", true)]
    {
        comes_back(Role::Main, name, could);
    }
    // What README says of it: it is a tree that Landlock knows, no folder.
    comes_back(Role::Names, "remove below image", true);
}

/// A panic says what it was about, and where.
#[test]
fn a_panic_is_told() {
    for role in Role::ALL {
        let (status, text) = attempt(role, "panic");
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{role:?}: {status} {text}");
        for wanted in ["panicked at", "told by a panic", "stack backtrace", "sandbox::panics"] {
            assert!(text.contains(wanted), "{role:?}: no {wanted} in {text}");
        }
    }
}

/// A panic ends the process also when nobody can be told.
#[test]
fn a_panic_does_not_wait_for_its_reader() {
    let (_reader, full) = std::io::pipe().unwrap();
    let mut blocks = std::os::fd::OwnedFd::from(full.try_clone().unwrap());
    nix::fcntl::fcntl(&blocks, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
        .unwrap();
    for piece in [4096, 1] {
        while nix::unistd::write(&mut blocks, &vec![b'.'; piece]).is_ok() {}
    }
    nix::fcntl::fcntl(&blocks, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
    let mut child = attempts(Role::Queue, "panic").stderr(full).spawn().unwrap();
    let start = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
}

#[inline(never)]
fn panics() {
    panic!("told by a panic");
}

/// Each of the two holds without the other; and a host that has only one of them is said to.
#[test]
fn names_are_out_of_reach_twice() {
    for role in Role::ALL.into_iter().filter(|role| *role != Role::Names) {
        for only in [Only::Landlock, Only::Filters] {
            for name in ["open image", "open elsewhere by path", "create beside image"] {
                only.comes_back(role, name, false);
            }
        }
    }
    Only::Landlock.comes_back(Role::Names, "open image", true);
    Only::Landlock.comes_back(Role::Names, "open elsewhere by path", false);
    Only::Filters.comes_back(Role::Names, "open image", true);
    // This one is Landlock's.
    Only::Filters.comes_back(Role::Names, "open elsewhere by path", true);
    Only::Filters.comes_back(Role::Names, "open image by path", false);
}

/// What of the sandbox there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Only {
    Landlock,
    Filters,
}

impl Only {
    #[track_caller]
    fn comes_back(self, role: Role, name: &str, could: bool) {
        comes_back(role, &format!("{self:?} {name}"), could);
    }
}

/// Refuses a system call to this process from here on, as a kernel that does not have it.
fn refuse(call: i64) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let answer = SeccompAction::Errno(libc::ENOSYS as u32);
    let rules = [(call, Vec::new())].into_iter().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// Not a test: what the others start.
#[test]
#[ignore = "is started by the other tests of this file"]
fn attempt_in_here() {
    let (Ok(name), Ok(role)) = (std::env::var("ATTEMPT"), std::env::var("ROLE")) else { return };
    let (only, name) = match name.split_once(' ') {
        Some(("Landlock", name)) => (Some(Only::Landlock), name.to_owned()),
        Some(("Filters", name)) => (Some(Only::Filters), name.to_owned()),
        _ => (None, name),
    };
    let role = Role::ALL.into_iter().find(|of| format!("{of:?}") == role).unwrap();
    let [beside, elsewhere, socket] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let below = beside.path().join("other guest");
    fs::create_dir(&below).unwrap();
    for directory in [beside.path(), elsewhere.path(), socket.path(), &below] {
        fs::write(directory.join("file"), "secret").unwrap();
    }
    let places = Places {
        beside: fs::File::open(beside.path()).unwrap(),
        elsewhere: fs::File::open(elsewhere.path()).unwrap(),
        socket: fs::File::open(socket.path()).unwrap(),
        image_path: beside.path().join("file"),
        elsewhere_path: elsewhere.path().join("file"),
    };
    if only == Some(Only::Filters) {
        refuse(libc::SYS_landlock_create_ruleset);
    }
    let reach = [Reach::Beside(beside.path().to_owned()), Reach::Socket(socket.path().to_owned())];
    let violation = Some(Violation::Kill).filter(|_| only != Some(Only::Landlock));
    logger::hold();
    let missing = sandbox::enter(&reach, violation).unwrap();
    logger::detach().unwrap();
    match only {
        Some(Only::Filters) => {
            let said = missing.iter().any(|what| what.starts_with("files are not restricted"));
            assert!(said && missing.len() == 1, "{missing:?}");
        }
        _ => assert!(missing.is_empty(), "{missing:?}"),
    }
    let work = move || match made_by(&name, &places) {
        Some(true) => println!("could"),
        Some(false) => println!("could not"),
        None => panic!("no such attempt: {name}"),
    };
    sandbox::spawn("attempt".into(), role, work).unwrap().join().unwrap();
    // What the test harness does at its end is not allowed either.
    std::process::exit(0);
}

struct Places {
    beside: fs::File,
    elsewhere: fs::File,
    socket: fs::File,
    image_path: std::path::PathBuf,
    elsewhere_path: std::path::PathBuf,
}

/// Makes an attempt; says whether it came to something.
fn made_by(name: &str, places: &Places) -> Option<bool> {
    use nix::fcntl::{OFlag, openat, renameat};
    use nix::sys::stat::Mode;
    use nix::unistd::{UnlinkatFlags, unlinkat};
    // SAFETY: calls whose arguments are no pointers, or null ones, or of no call that is let through.
    let call = |number: i64, arguments: [i64; 3]| unsafe {
        libc::syscall(number, arguments[0], arguments[1], arguments[2], 0, 0, 0) >= 0
    };
    let map = |protection| {
        // SAFETY: a new mapping, which is not used.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, 0x22, -1, 0) };
        at as i64
    };
    let open = |directory: &fs::File, name: &Path, flags| {
        openat(directory, name, flags, Mode::S_IRUSR).is_ok()
    };
    let remove = |directory: &fs::File, name: &Path| {
        unlinkat(directory, name, UnlinkatFlags::NoRemoveDir).is_ok()
    };
    let never = NEVER.iter().find(|(of, _)| *of == name);
    let some = SOME.iter().find(|(of, ..)| *of == name);
    if let Some(number) = never.map(|(_, n)| *n).or(some.map(|(_, n, _)| *n)) {
        // The one argument that counts: the request of ioctl, and that clone is to make a process.
        return Some(call(number, [-1, FIEMAP, 0].map(|a| if name == "clone" { 0 } else { a })));
    }
    let (read, create) = (OFlag::O_RDONLY, OFlag::O_CREAT | OFlag::O_WRONLY);
    let file = Path::new("file");
    Some(match name {
        "nothing" => true,
        "executable memory" => map(libc::PROT_EXEC) != -1,
        "executable code" => {
            let at = map(libc::PROT_READ);
            call(libc::SYS_mprotect, [at, 4096, libc::PROT_EXEC.into()])
        }
        "register files with a ring" => call(libc::SYS_io_uring_register, [-1, 2, 0]),
        "lift a ring's restrictions" => call(libc::SYS_io_uring_register, [-1, 11, 0]),
        "enable a ring" => call(libc::SYS_io_uring_register, [-1, 12, 0]),
        "open image" => open(&places.beside, file, read),
        "open image by path" => fs::File::open(&places.image_path).is_ok(),
        "open below image" => open(&places.beside, Path::new("other guest/file"), read),
        "create beside image" => open(&places.beside, Path::new("new"), create),
        "open elsewhere" => open(&places.elsewhere, file, read),
        "open elsewhere by path" => open(&places.beside, &places.elsewhere_path, read),
        "open socket" => open(&places.socket, file, read),
        "remove image" => remove(&places.beside, file),
        "remove below image" => remove(&places.beside, Path::new("other guest/file")),
        "remove elsewhere by path" => remove(&places.beside, &places.elsewhere_path),
        "remove socket" => remove(&places.socket, file),
        "move image elsewhere" => renameat(&places.beside, file, &places.elsewhere, "new").is_ok(),
        "panic" => {
            // As the daemon is built, a panic ends it.
            let _ = std::panic::catch_unwind(panics);
            std::process::abort();
        }
        _ => return None,
    })
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
        // Every thread has held itself to its role, but for the one that makes them.
        let filters = if field("Name") == "maker" { "2" } else { "4" };
        assert!(["", filters].contains(&field("Seccomp_filters").as_str()), "{status}");
        threads += 1;
    }
    assert!(threads >= 6);
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

/// Names that are used while the daemon serves, by whom they are left to: with all of the sandbox, without filters, and
/// with none of it. A ring, where the kernel has them.
#[test]
fn what_is_kept_beside_the_image_is_kept_from_inside() {
    for arguments in [&[][..], &["--seccomp=none"], &["--sandbox=none"]] {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", 4 * MIB);
        let direct = scratch.image("direct.img", 4 * MIB);
        let builder = Daemon::builder(&scratch).disk(&disk, "").disk(&direct, "cache=direct");
        let daemon = builder.args(arguments).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        // SET IDENTIFYING INFORMATION, of type 0.
        let set = Cdb::new(0xa4).byte(1, 0x06).byte(9, 5);
        lun.run_out(set, b"hello").expect_good();
        let noted = fs::read_to_string(scratch.join("disk.img.thinlun")).unwrap();
        assert!(noted.contains("68656c6c6f"), "{noted}");
        lun.run(Cdb::new(0xa4).byte(1, 0x06)).expect_good();
        assert!(!scratch.join("disk.img.thinlun").exists());
        // WRITE ATOMIC, whose journal is gone when it has ended.
        lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]).expect_good();
        assert_eq!(lun.read16(0, 8), [7; 4096]);
        assert!(!scratch.join("disk.img.thinlun-write").exists());
        let direct = fe.ready_lun(0, 1);
        direct.write16(0, &[8; 4096]);
        assert_eq!(direct.read16(0, 8), [8; 4096]);
        let log = daemon.log();
        let rings = thinlun::store::engine::uring::is_there();
        assert!(!rings || !log.contains("no io_uring"), "{log}");
        assert!(!log.contains("rror"), "{log}");
    }
}
