//! The real daemon as a child process, and the files it serves.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{PATIENCE, eventually};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_thinlun");

/// How long a daemon that was asked to end may take.
const GRACE: Duration = Duration::from_secs(5);

/// A directory for one test: images, sockets, logs. Removed at the end.
#[derive(Clone)]
pub struct Scratch(Arc<tempfile::TempDir>);

impl Scratch {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("thinlun-test-").tempdir();
        Self(Arc::new(dir.expect("a temporary directory")))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// A sparse file of `size` bytes.
    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.join(name);
        File::create(&path).and_then(|file| file.set_len(size)).expect("an image file");
        path
    }

    /// A file that holds `bytes`.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, bytes).expect("a file");
        path
    }

    /// Names and sizes of everything in it but logs, to show that a command changed nothing.
    pub fn listing(&self) -> Vec<(OsString, u64)> {
        let entry = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.expect("a directory entry");
            (entry.file_name(), entry.metadata().map_or(0, |meta| meta.len()))
        };
        let mut names: Vec<_> = fs::read_dir(self.path()).unwrap().map(entry).collect();
        names.retain(|(name, _)| !name.as_encoded_bytes().ends_with(b".log"));
        names.sort();
        names
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads bytes of a file on the host.
pub fn host_read(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let file = File::open(path).expect("the image");
    file.read_exact_at(&mut bytes, offset).expect("the image's bytes");
    bytes
}

/// Writes bytes of a file on the host.
pub fn host_write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the image");
    file.write_all_at(bytes, offset).expect("the image's bytes");
}

/// What a failing wait needs to explain itself. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    log: PathBuf,
    pid: i32,
}

impl Diagnosis {
    /// Everything the daemon wrote to its standard error.
    /// Of another process than ours.
    pub fn of(log: PathBuf, pid: i32) -> Self {
        Self { log, pid }
    }

    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(|e| e.to_string(), |b| String::from_utf8_lossy(&b).into())
    }

    /// Panics with `what`, the daemon's state and its log.
    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        panic!("{what}\n{}", self.report())
    }

    /// State, thread states and log of the daemon.
    pub fn report(&self) -> String {
        let state = fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let state = match state.as_deref().map(|stat| stat.rsplit(')').next().unwrap_or("")) {
            Ok(rest) => format!("state {}", rest.trim_start().chars().next().unwrap_or('?')),
            Err(_) => "gone".into(),
        };
        let threads = self.thread_states().join(", ");
        format!(
            "--- daemon {}: {state}; threads: {threads}\n--- its log:\n{}--- end of log",
            self.pid,
            self.log()
        )
    }

    /// Name, state and place in the kernel of each of its threads.
    pub fn thread_states(&self) -> Vec<String> {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return vec![] };
        let line = |task: io::Result<fs::DirEntry>| {
            let task = task.ok()?.path();
            let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
            let stat = read("stat");
            let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
            Some(format!("{} {state} {}", read("comm").trim(), read("wchan").trim()))
        };
        tasks.filter_map(line).collect()
    }
}

/// Where the daemon gets its connection from.
enum Endpoint {
    /// `--socket-path`.
    Path(PathBuf),
    /// An inherited descriptor, at a number the arguments or the environment name.
    Inherited,
}

/// How to start a daemon.
pub struct DaemonBuilder {
    scratch: Scratch,
    endpoint: Endpoint,
    others: Vec<PathBuf>,
    args: Vec<OsString>,
    inherited: Vec<(OwnedFd, RawFd)>,
    listen_fds: Option<u32>,
    user: Option<u32>,
    binary: PathBuf,
    before: Vec<OsString>,
}

impl DaemonBuilder {
    /// Listens on a socket in `scratch`.
    pub fn new(scratch: &Scratch) -> Self {
        Self {
            scratch: scratch.clone(),
            endpoint: Endpoint::Path(scratch.join("vhost.sock")),
            others: Vec::new(),
            args: Vec::new(),
            inherited: Vec::new(),
            listen_fds: None,
            user: None,
            binary: BINARY.into(),
            before: Vec::new(),
        }
    }

    /// Listens on this path instead.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.endpoint = Endpoint::Path(path.into());
        self
    }

    /// Listens on so many sockets, for as many initiators.
    pub fn ports(mut self, count: usize) -> Self {
        self.others =
            (1..count).map(|n| self.scratch.join(format!("vhost-{}.sock", n + 1))).collect();
        self
    }

    /// Passes no socket that we know of.
    pub fn without_socket(mut self) -> Self {
        self.endpoint = Endpoint::Inherited;
        self
    }

    /// A disk with options such as `readonly,lun=3`.
    pub fn disk(self, path: &Path, options: &str) -> Self {
        let mut arg = path.as_os_str().to_owned();
        if !options.is_empty() {
            arg.push(",");
            arg.push(options);
        }
        self.arg(arg)
    }

    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Passes `fd` as descriptor `number` and with `--fd`, without a socket path.
    pub fn with_fd(mut self, fd: OwnedFd, number: RawFd) -> Self {
        self.endpoint = Endpoint::Inherited;
        self.inherited.push((above_stdio(fd), number));
        self.arg("--fd").arg(number.to_string())
    }

    /// Passes `fd` as systemd does: number 3, LISTEN_FDS=1, LISTEN_PID.
    pub fn with_listen_fd(mut self, fd: OwnedFd) -> Self {
        self.endpoint = Endpoint::Inherited;
        self.inherited.push((above_stdio(fd), 3));
        self.listen_fds = Some(1);
        self
    }

    /// Runs another build.
    pub fn program(mut self, program: &Path) -> Self {
        self.binary = program.into();
        self
    }

    /// Runs under another program, such as valgrind, which gets these arguments before ours.
    pub fn under(mut self, program: &str, arguments: &[&str]) -> Self {
        self.binary = program.into();
        self.before = arguments.iter().map(Into::into).chain([BINARY.into()]).collect();
        self
    }

    /// Runs as this user and group, from a copy of the binary that the user can read.
    pub fn user(mut self, uid: u32) -> Self {
        self.binary = self.scratch.join("thinlun");
        // By another process: a file that this one has just written may be busy in a child that
        // another thread is forking at the moment, and cannot be executed then.
        let copied = Command::new("cp").arg(BINARY).arg(&self.binary).status().expect("cp");
        assert!(copied.success(), "cp: {copied}");
        self.user = Some(uid);
        self
    }

    /// Starts it and waits until it can be connected to.
    #[track_caller]
    pub fn spawn(self) -> Daemon {
        let log = self.scratch.join(format!("daemon-{}.log", unique()));
        let mut command = self.command();
        command.stderr(File::create(&log).expect("a log file"));
        let child = command.spawn().expect("the daemon's binary");
        let socket = match self.endpoint {
            Endpoint::Path(path) => Some(path),
            Endpoint::Inherited => None,
        };
        let diagnosis = Diagnosis { log, pid: child.id() as i32 };
        let DaemonBuilder { scratch, others, .. } = self;
        let mut daemon = Daemon { child, socket, others, diagnosis, scratch, status: None };
        daemon.wait_until_listening();
        daemon
    }

    /// Runs it and demands that it refuses to start, in the way every refusal has to look: an exit
    /// status of 1 or 2, one line on standard error, no file made or changed.
    #[track_caller]
    pub fn expect_refusal(self) -> (i32, String) {
        let scratch = self.scratch.clone();
        let before = scratch.listing();
        let Finished { status, stdout, stderr } = self.finish();
        let status = status.code().unwrap_or_else(|| panic!("ended by a signal: {stderr}"));
        assert!(matches!(status, 1 | 2), "exit status {status}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("backtrace"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "one line of explanation, not:\n{stderr}");
        assert_eq!(stdout, "", "nothing on standard output");
        assert_eq!(scratch.listing(), before, "files were made or changed: {stderr}");
        (status, stderr)
    }

    /// Runs it to its end, which must come soon.
    #[track_caller]
    pub fn finish(self) -> Finished {
        Finished::of(self.command())
    }

    /// The command line and what the child inherits.
    fn command(&self) -> Command {
        let mut command = match self.listen_fds {
            None => {
                let mut command = Command::new(&self.binary);
                command.args(&self.before);
                command
            }
            Some(count) => listening_command(count),
        };
        if let Endpoint::Path(path) = &self.endpoint {
            command.arg("--socket-path").arg(path);
        }
        for path in &self.others {
            command.arg("--socket-path").arg(path);
        }
        command.args(&self.args).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        // So that every test can be run on every engine.
        let chosen = self.args.iter().any(|arg| arg == "--io-engine");
        if let Some(engine) = std::env::var_os("THINLUN_TEST_ENGINE").filter(|_| !chosen) {
            command.arg("--io-engine").arg(engine);
        }
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        inherit(&mut command, &self.inherited);
        command
    }
}

/// LISTEN_PID is the daemon's own process id, which only the process itself knows.
fn listening_command(count: u32) -> Command {
    let mut command = Command::new("sh");
    let script = format!("export LISTEN_FDS={count} LISTEN_PID=$$; exec \"$0\" \"$@\"");
    command.args(["-c", &script, BINARY]);
    command
}

/// Moves a descriptor to a high number, where it is in nobody's way.
fn above_stdio(fd: OwnedFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let high = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(200)).expect("F_DUPFD_CLOEXEC");
    // SAFETY: fcntl has just returned this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(high) }
}

/// Gives the child the descriptors at their numbers, and ends it if the test dies.
fn inherit(command: &mut Command, fds: &[(OwnedFd, RawFd)]) {
    let fds: Vec<(RawFd, RawFd)> =
        fds.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect();
    let in_child = move || {
        for &(fd, number) in &fds {
            // SAFETY: dup2 is async-signal-safe; the copy is not close-on-exec.
            if unsafe { libc::dup2(fd, number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: prctl is async-signal-safe and takes no pointers here. The signal comes when
        // the spawning thread ends: daemons live in the thread of their test.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        Ok(())
    };
    // SAFETY: the closure makes only async-signal-safe calls and does not allocate on success.
    unsafe { command.pre_exec(in_child) };
}

/// A running daemon. Ended when dropped.
pub struct Daemon {
    child: Child,
    socket: Option<PathBuf>,
    others: Vec<PathBuf>,
    diagnosis: Diagnosis,
    scratch: Scratch,
    status: Option<ExitStatus>,
}

impl Daemon {
    pub fn builder(scratch: &Scratch) -> DaemonBuilder {
        DaemonBuilder::new(scratch)
    }

    /// One sparse disk `disk.img` of `size` bytes at target 0, LUN 0.
    #[track_caller]
    pub fn with_disk(size: u64, options: &str) -> Self {
        let scratch = Scratch::new();
        let disk = scratch.image("disk.img", size);
        Self::builder(&scratch).disk(&disk, options).spawn()
    }

    /// The image that `with_disk` made.
    pub fn disk(&self) -> PathBuf {
        self.scratch.join("disk.img")
    }

    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    #[track_caller]
    pub fn socket(&self) -> &Path {
        self.socket.as_deref().expect("a daemon with a socket path")
    }

    pub fn pid(&self) -> i32 {
        self.diagnosis.pid
    }

    pub fn diagnosis(&self) -> Diagnosis {
        self.diagnosis.clone()
    }

    pub fn log(&self) -> String {
        self.diagnosis.log()
    }

    /// A new connection, without a message on it.
    #[track_caller]
    pub fn connect(&self) -> UnixStream {
        self.connect_to(0)
    }

    /// The same to one of several sockets.
    #[track_caller]
    pub fn connect_to(&self, port: usize) -> UnixStream {
        let path = match port.checked_sub(1) {
            None => self.socket(),
            Some(n) => &self.others[n],
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return stream,
                Err(e) if Instant::now() > deadline => {
                    self.diagnosis.fail(&format!("cannot connect: {e}"))
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    #[track_caller]
    fn wait_until_listening(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.socket.as_deref().is_none_or(is_listened_on) {
            if let Some(status) = self.try_wait() {
                self.diagnosis.fail(&format!("the daemon ended at its start: {status}"));
            }
            if Instant::now() > deadline {
                self.diagnosis.fail("the daemon does not listen");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.try_wait().is_none()
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("waitpid");
        }
        self.status
    }

    /// The exit status, if it comes within `limit`.
    pub fn wait_exit(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            kill(Pid::from_raw(self.pid()), signal).expect("kill");
        }
    }

    /// Stops all its threads where they are, until it is killed or told to go on. Each of them notices when it runs
    /// next, which on a busy machine can be after the signal was sent.
    pub fn halt(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid());
        eventually("all threads are stopped", || {
            std::fs::read_dir(&tasks).expect("its threads").flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
            })
        });
    }

    /// Makes the daemon look at its backing files again.
    pub fn sighup(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// Asks it to end and waits until it has.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        self.end_with(Signal::SIGTERM)
    }

    #[track_caller]
    pub fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let status = self.wait_exit(GRACE);
        status.unwrap_or_else(|| self.diagnosis.fail(&format!("{signal} does not end it")))
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait_exit(PATIENCE).expect("a killed process");
    }

    /// Open descriptors of the process.
    pub fn fd_count(&self) -> usize {
        self.count("fd")
    }

    /// Threads of the process.
    pub fn thread_count(&self) -> usize {
        self.count("task")
    }

    /// What the descriptors of the process are, for comparison.
    pub fn fds(&self) -> Vec<String> {
        let link = |entry: io::Result<fs::DirEntry>| {
            fs::read_link(entry.ok()?.path()).ok().map(|target| target.display().to_string())
        };
        let dir = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("/proc");
        let mut fds: Vec<_> = dir.filter_map(link).collect();
        fds.sort();
        fds
    }

    /// Memory mappings that contain `name`.
    pub fn mappings(&self, name: &str) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap_or_default();
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most that there was of it, since it began or 5 was written to its clear_refs.
    pub fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, what: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix(what));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.expect(what) * 1024
    }

    /// Lets it have only so many bytes of address space more than it has now, or as many as it likes.
    pub fn limit_memory(&self, more: Option<u64>) {
        let most = more.map_or(libc::RLIM_INFINITY, |more| self.memory("VmSize:") + more);
        let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the kernel reads one structure.
        let set =
            unsafe { libc::prlimit(self.pid(), libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
        assert_eq!(set, 0, "prlimit: {}", io::Error::last_os_error());
    }

    fn count(&self, what: &str) -> usize {
        fs::read_dir(format!("/proc/{}/{what}", self.pid())).map_or(0, Iterator::count)
    }

    /// Runs the binary with a whole command line and waits for its end.
    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Finished {
        let mut command = Command::new(BINARY);
        command.args(args);
        Finished::of(command)
    }

    /// A start that must fail, with a free socket path. Returns exit status and standard error.
    #[track_caller]
    pub fn expect_bad_start<S: AsRef<OsStr>>(
        scratch: &Scratch,
        args: impl IntoIterator<Item = S>,
    ) -> (i32, String) {
        Self::builder(scratch).args(args).expect_refusal()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.diagnosis.report());
        }
        self.signal(Signal::SIGTERM);
        if self.wait_exit(GRACE).is_none() {
            eprintln!("daemon {} ignores SIGTERM, killing it", self.pid());
            self.kill();
        }
    }
}

/// How a process that ends by itself ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Runs a command to its end, for [`PATIENCE`] at most.
    #[track_caller]
    pub fn of(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LOG");
        let mut child = command.spawn().expect("the binary");
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().expect("waitpid") {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let output = child.wait_with_output().expect("waitpid");
                panic!("{command:?} does not end: {output:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let text = |pipe: Option<&mut dyn Read>| {
            let mut bytes = Vec::new();
            pipe.expect("a pipe").read_to_end(&mut bytes).expect("output");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let stdout = text(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
        let stderr = text(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
        Self { status, stdout, stderr }
    }
}

/// Whether some process accepts connections on this socket; asking leaves no trace in it.
pub fn is_listened_on(path: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").expect("/proc/net/unix");
    let path = path.to_str().expect("a printable path");
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3);
        flags == Some(ACCEPTS_CONNECTIONS) && fields.nth(3) == Some(path)
    })
}

fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
