//! A process that can do nothing but serve: no new privileges, no capabilities, no files but those beside the images,
//! and for each kind of thread the system calls it needs and no others.
//!
//! [`enter`] is called once, when everything is open and before there is a second thread; threads are made by
//! [`spawn`] and lock themselves in further. Where nobody has called [`enter`], as in tests of parts, [`spawn`] only
//! makes threads.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// What happens to a thread that makes a system call it has no use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The process is killed (SIGSYS).
    Kill,
    /// The kernel logs it and lets it pass.
    Log,
}

/// What a thread is for, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Accepts connections and waits for signals.
    Main,
    /// Talks to a front end.
    Connection,
    /// Serves a queue.
    Queue,
    /// Does what blocks on the files of a disk.
    Disk,
    /// Waits for time to pass.
    Timer,
    /// Writes log lines.
    Logger,
}

/// What may be reached below a directory after [`enter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Files are made, written, replaced and removed there: notes, and unnamed files that share blocks.
    Beside(PathBuf),
    /// A socket is removed from there at the end.
    Socket(PathBuf),
}

static VIOLATION: OnceLock<Violation> = OnceLock::new();

/// Gives up what is not needed from here on. `violation` is what becomes of forbidden system calls, if anything.
/// Returns what could not be had on this host, for people.
///
/// # Errors
/// If the kernel refuses what every kernel that we run on has.
pub fn enter(reach: &[Reach], violation: Option<Violation>) -> io::Result<Vec<String>> {
    let mut missing = Vec::new();
    nix::sys::prctl::set_no_new_privs()?;
    drop_capabilities()?;
    if let Err(why) = restrict_files(reach) {
        missing.push(format!("files are not restricted (Landlock: {why})"));
    }
    if let Some(violation) = violation {
        match filter_main(violation) {
            Ok(()) => drop(VIOLATION.set(violation)),
            Err(why) => missing.push(format!("system calls are not filtered (seccomp: {why})")),
        }
    }
    Ok(missing)
}

/// Makes a thread that may do what its role needs.
///
/// # Errors
/// If the host has no thread left.
pub fn spawn<T: Send + 'static>(
    name: String,
    role: Role,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name).spawn(move || {
        if let Some(violation) = VIOLATION.get()
            && let Err(error) = confine(role, *violation)
        {
            // It is no worse off than the thread that made it.
            log::error!("a thread could not be confined: {error}");
        }
        work()
    })
}

/// The filters that all threads inherit, in this order: the last would forbid the others.
fn filter_main(violation: Violation) -> io::Result<()> {
    install(&without_clone3()?)?;
    install(&without_open()?)?;
    confine(Role::Main, violation)
}

fn drop_capabilities() -> io::Result<()> {
    // Without CAP_SETPCAP there is nothing to drop from the bounding set that could be had again.
    let _ = caps::clear(None, CapSet::Bounding);
    let _ = caps::clear(None, CapSet::Ambient);
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(io::Error::other)?;
    }
    Ok(())
}

/// The newest Landlock that we know of; older ones do what they can.
const LANDLOCK: ABI = ABI::V6;

fn restrict_files(reach: &[Reach]) -> Result<(), String> {
    let text = |e: landlock::RulesetError| e.to_string();
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .map_err(text)?
        .handle_access(AccessNet::from_all(LANDLOCK))
        .map_err(text)?
        .scope(Scope::from_all(LANDLOCK))
        .map_err(text)?
        .create()
        .map_err(text)?;
    for place in reach {
        let (path, access) = match place {
            Reach::Beside(path) => {
                let files = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
                (path, files | AccessFs::ReadFile | AccessFs::WriteFile)
            }
            Reach::Socket(path) => (path, AccessFs::RemoveFile.into()),
        };
        rules = allow(rules, path, access)?;
    }
    let status = rules.restrict_self().map_err(text)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("this kernel does not have it".into()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, String> {
    let directory = PathFd::new(path).map_err(|e| e.to_string())?;
    let directory: BorrowedFd<'_> = directory.as_fd();
    rules.add_rule(PathBeneath::new(directory, access)).map_err(|e| e.to_string())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn confine(role: Role, violation: Violation) -> io::Result<()> {
    let action = match violation {
        Violation::Kill => SeccompAction::KillProcess,
        Violation::Log => SeccompAction::Log,
    };
    let rules = calls_of(role).map_err(io::Error::other)?;
    install(&compile(rules, action, SeccompAction::Allow)?)
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

fn install(program: &BpfProgram) -> io::Result<()> {
    apply_filter(program).map_err(io::Error::other)
}

/// clone3 hides its flags from filters; told that it is not there, the C library uses clone.
fn without_clone3() -> io::Result<BpfProgram> {
    refuse(libc::SYS_clone3, Vec::new(), libc::ENOSYS)
}

/// Files are opened below directories that are held open; where that is, Landlock watches. Any other open fails, and
/// does not kill: the C library looks at /proc/sys/vm/overcommit_memory when it gives memory back, and can do without.
fn without_open() -> io::Result<BpfProgram> {
    let here = u64::from(libc::AT_FDCWD.cast_unsigned());
    let rule = argument(0, SeccompCmpOp::Eq, here).map_err(io::Error::other)?;
    refuse(libc::SYS_openat, vec![rule], libc::EACCES)
}

fn refuse(call: i64, rules: Vec<SeccompRule>, errno: i32) -> io::Result<BpfProgram> {
    let errno = u32::try_from(errno).unwrap_or_default();
    let rules = BTreeMap::from([(call, rules)]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(errno))
}

/// Memory, locks, time and the end: what every thread does.
const ALL: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// To make a thread, which then confines itself.
const SPAWN: &[i64] =
    &[libc::SYS_clone3, libc::SYS_rseq, libc::SYS_seccomp, libc::SYS_set_robust_list];

const CONNECTION: &[i64] = &[
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_memfd_create,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
];

const MAIN: &[i64] = &[libc::SYS_accept4, libc::SYS_unlinkat];

/// What newer architectures have only in newer forms.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[libc::SYS_poll, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// Transfers, and waiting for them.
const TRANSFERS: &[i64] = &[
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_getrusage,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_statx,
];

const QUEUE: &[i64] = &[
    libc::SYS_eventfd2,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ppoll,
];

/// What changes a file's extents, and notes beside it.
const DISK: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_newfstatat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sync_file_range,
    libc::SYS_unlinkat,
];

/// The calls of a role. A filter that is installed later can only take away: what a thread hands down to those that
/// it makes it must be allowed itself.
fn calls_of(role: Role) -> Result<Rules, seccompiler::BackendError> {
    let lists: &[&[i64]] = match role {
        Role::Main => &[SPAWN, MAIN, OLD, CONNECTION, TRANSFERS, QUEUE, DISK],
        Role::Connection => &[SPAWN, OLD, CONNECTION, TRANSFERS, QUEUE, DISK],
        Role::Queue => &[SPAWN, OLD, TRANSFERS, QUEUE, DISK],
        Role::Disk => &[SPAWN, OLD, TRANSFERS, DISK],
        Role::Timer => &[SPAWN, TRANSFERS],
        Role::Logger => &[],
    };
    let listed = std::iter::once(&ALL).chain(lists).flat_map(|list| list.iter());
    let mut rules: Rules = listed.map(|call| (*call, Vec::new())).collect();
    // No code is made or loaded.
    let executable = u64::try_from(libc::PROT_EXEC).unwrap_or_default();
    let not_executable = || argument(2, SeccompCmpOp::MaskedEq(executable), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    // Threads, no processes.
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap_or_default();
    rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    // Its name, and the one that comes with each filter.
    let settings = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS];
    rules.insert(libc::SYS_prctl, one_of(0, settings.map(i64::from))?);
    let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL];
    rules.insert(libc::SYS_fcntl, one_of(1, commands.map(i64::from))?);
    if matches!(role, Role::Main | Role::Connection | Role::Queue | Role::Disk) {
        rules.insert(libc::SYS_ioctl, one_of(1, DISK_REQUESTS.iter().copied())?);
    }
    Ok(rules)
}

/// FIONBIO, FS_IOC_FIEMAP, FICLONERANGE, BLKGETSIZE64.
const DISK_REQUESTS: &[i64] = &[0x5421, 0xc020_660b, 0x4020_940d, 0x8008_1272];

fn argument(
    number: u8,
    compare: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, compare, value)?;
    SeccompRule::new(vec![condition])
}

fn one_of(
    number: u8,
    values: impl IntoIterator<Item = i64>,
) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |value: i64| argument(number, SeccompCmpOp::Eq, value.cast_unsigned());
    values.into_iter().map(rule).collect()
}
