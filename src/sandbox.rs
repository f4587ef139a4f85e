//! A process that can do nothing but serve: no new privileges, no capabilities, no files but those that are open, and
//! for each kind of thread the system calls it needs and no others.
//!
//! [`enter`] is called once, when everything is open and before there is a second thread. It starts the maker: a thread
//! that makes what confined threads may not make, other threads ([`spawn`]) and rings ([`ask`]). So every thread is a
//! child of the maker, inherits from it only what all have in common, and takes the rest away itself before it begins.
//! Where nobody has called [`enter`], as in tests of parts, whoever asks makes it himself, and nothing is confined.

use std::backtrace::Backtrace;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus, Scope,
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
    /// Looks after queue threads, and has those made that take over.
    Watchdog,
    /// Does what blocks on the files of a disk.
    Disk,
    /// Opens, renames and removes files beside an image.
    Names,
    /// Waits for time to pass.
    Timer,
    /// Writes log lines.
    Logger,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::Connection,
        Self::Queue,
        Self::Watchdog,
        Self::Disk,
        Self::Names,
        Self::Timer,
        Self::Logger,
    ];
}

/// What may be reached below a directory after [`enter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Files are made, written, replaced and removed there, by threads for [`Role::Names`]: notes, and unnamed files that
    /// share blocks.
    Beside(PathBuf),
    /// A socket is removed from there at the end, by [`Role::Main`].
    Socket(PathBuf),
}

type Task = Box<dyn FnOnce() + Send>;

/// The process, once it has confined itself.
struct Inside {
    /// What the maker is to do.
    tasks: Sender<Task>,
    maker: ThreadId,
    limits: Limits,
}

static INSIDE: OnceLock<Inside> = OnceLock::new();

/// Gives up what is not needed from here on. `violation` is what becomes of forbidden system calls, if anything.
/// Returns what could not be had on this host, for people.
///
/// # Errors
/// If the kernel refuses what every kernel that we run on has, or has no thread left.
pub fn enter(reach: &[Reach], violation: Option<Violation>) -> io::Result<Vec<String>> {
    // A panic opens nothing any more: what names the frames of a backtrace is read now, if one is wanted.
    drop(Backtrace::capture().to_string());
    let mut missing = Vec::new();
    nix::sys::prctl::set_no_new_privs()?;
    drop_capabilities()?;
    let mut limits = Limits::default();
    match restrict_files(reach) {
        Ok((domains, lacks)) => {
            limits.domains = Some(domains);
            missing.extend(lacks);
        }
        Err(why) => missing.push(format!("files are not restricted (Landlock: {why})")),
    }
    if let Some(violation) = violation {
        match filter_all(violation) {
            Ok(()) => limits.filters = of_each_role(|role| filters_of(role, violation))?,
            Err(why) => missing.push(format!("system calls are not filtered (seccomp: {why})")),
        }
    }
    let (tasks, inbox) = mpsc::channel::<Task>();
    let work = move || inbox.into_iter().for_each(|task| task());
    let maker = thread::Builder::new().name("maker".into()).spawn(work)?;
    limits.of(Role::Main)?.confine()?;
    // It fails only if this was done already.
    let _ = INSIDE.set(Inside { tasks, maker: maker.thread().id(), limits });
    Ok(missing)
}

/// Whether the process has confined itself.
pub fn is_entered() -> bool {
    INSIDE.get().is_some()
}

/// The process, unless this is the thread that may do everything.
fn inside() -> Option<&'static Inside> {
    INSIDE.get().filter(|inside| inside.maker != thread::current().id())
}

/// Has the maker do something soon. What it does must not wait for anybody.
pub fn post(work: impl FnOnce() + Send + 'static) {
    match inside() {
        // The maker never ends.
        Some(inside) => drop(inside.tasks.send(Box::new(work))),
        None => work(),
    }
}

/// Has the maker do something, and waits for it. What it does must not wait for anybody.
///
/// # Errors
/// If it failed in that.
pub fn ask<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, result) = mpsc::sync_channel(1);
    post(move || drop(done.send(work())));
    result.recv().map_err(|_| io::Error::from(ErrorKind::BrokenPipe))
}

/// Makes a thread that may do what its role needs.
///
/// # Errors
/// If the host has no thread left; then `work` has been dropped, by this thread.
pub fn spawn<T: Send + 'static>(
    name: String,
    role: Role,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // Whatever its end does is nothing for the maker, which would have to drop it if there is no thread.
    let kept = Arc::new(Mutex::new(Some(work)));
    let taken = Arc::clone(&kept);
    ask(move || {
        // Here, where a want of descriptors is an error.
        let limits = INSIDE.get().map(|inside| inside.limits.of(role)).transpose()?;
        thread::Builder::new().name(name).spawn(move || {
            let confined = limits.map_or(Ok(()), RoleLimits::confine);
            let work = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
            match (confined, work) {
                (Ok(()), Some(work)) => work(),
                (confined, _) => {
                    // It must not run as it is, and whoever waits for it cannot go on without it.
                    log::error!("a thread could not be confined: {:?}", confined.err());
                    std::process::abort()
                }
            }
        })
    })?
}

/// The files that each role reaches.
type Domains = Vec<(Role, RulesetCreated)>;

/// What threads take away from themselves.
#[derive(Default)]
struct Limits {
    /// The files that each role reaches, if the kernel restricts that.
    domains: Option<Domains>,
    /// The filters of each role, in the order in which they are installed; none if system calls are not filtered.
    filters: Vec<(Role, Vec<BpfProgram>)>,
}

fn of_each_role<T>(make: impl Fn(Role) -> io::Result<T>) -> io::Result<Vec<(Role, T)>> {
    Role::ALL.into_iter().map(|role| Ok((role, make(role)?))).collect()
}

/// The limits of one thread.
struct RoleLimits<'a> {
    domain: Option<RulesetCreated>,
    filters: &'a [BpfProgram],
}

impl Limits {
    /// What a thread of this role takes away from itself.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    fn of(&self, role: Role) -> io::Result<RoleLimits<'_>> {
        let domain = self.domains.iter().flatten().find(|(of, _)| *of == role);
        let filters = self.filters.iter().find(|(of, _)| *of == role);
        Ok(RoleLimits {
            domain: domain.map(|(_, domain)| domain.try_clone()).transpose()?,
            filters: filters.map_or(&[], |(_, filters)| filters),
        })
    }
}

impl RoleLimits<'_> {
    /// Holds this thread to them.
    fn confine(self) -> io::Result<()> {
        if let Some(domain) = self.domain {
            domain.restrict_self().map_err(io::Error::other)?;
        }
        self.filters.iter().try_for_each(install)
    }
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

/// Does something as it can be done after [`enter`], without the capabilities that this thread still has.
pub fn without_capabilities<T>(work: impl FnOnce() -> T) -> T {
    let had = caps::read(None, CapSet::Effective).unwrap_or_default();
    let _ = caps::clear(None, CapSet::Effective);
    let result = work();
    // It has them still where they can be taken up from.
    if let Err(error) = caps::set(None, CapSet::Effective, &had) {
        log::warn!("capabilities: {error}");
    }
    result
}

/// The newest Landlock that we know of; older ones do what they can.
const LANDLOCK: ABI = ABI::V6;

/// Restricts the process to all that any role reaches. Returns what each role reaches, and what this kernel does not
/// restrict.
fn restrict_files(reach: &[Reach]) -> Result<(Domains, Option<String>), String> {
    let text = |e: landlock::RulesetError| e.to_string();
    let files = || {
        let rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
        rules.handle_access(AccessFs::from_all(LANDLOCK)).map_err(text)
    };
    let whole = files()?
        .handle_access(AccessNet::from_all(LANDLOCK))
        .map_err(text)?
        .scope(Scope::from_all(LANDLOCK))
        .map_err(text)?
        .create()
        .map_err(text)?;
    let whole = allow(whole, reach, &[Role::Main, Role::Names])?;
    let mut domains = Vec::new();
    for role in Role::ALL {
        domains.push((role, allow(files()?.create().map_err(text)?, reach, &[role])?));
    }
    let lacks = lacks(&whole.restrict_self().map_err(text)?)?;
    Ok((domains, lacks))
}

/// What the kernel does not restrict; an error if that is everything.
fn lacks(status: &RestrictionStatus) -> Result<Option<String>, String> {
    match (&status.ruleset, &status.landlock) {
        (RulesetStatus::FullyEnforced, _) => Ok(None),
        (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(Some(unrestricted(*effective_abi)))
        }
        (RulesetStatus::PartiallyEnforced, _) => Ok(Some("Landlock: not all is restricted".into())),
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("this kernel was started without it".into())
        }
        (RulesetStatus::NotEnforced, _) => Err("this kernel does not have it".into()),
    }
}

/// What came after this version of Landlock, for people.
fn unrestricted(abi: ABI) -> String {
    let later = [
        (ABI::V3, "truncation of files"),
        (ABI::V4, "TCP"),
        (ABI::V5, "ioctl on devices"),
        (ABI::V6, "signals and abstract sockets"),
    ];
    let lacks: Vec<&str> =
        later.iter().filter(|(since, _)| *since > abi).map(|(_, what)| *what).collect();
    format!("not restricted by Landlock ABI {} of this kernel: {}", abi as i32, lacks.join(", "))
}

/// Allows what any of these roles reaches.
fn allow(
    mut rules: RulesetCreated,
    reach: &[Reach],
    roles: &[Role],
) -> Result<RulesetCreated, String> {
    for place in reach {
        let (role, path, access) = match place {
            Reach::Beside(path) => {
                let files = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
                (Role::Names, path, files | AccessFs::ReadFile | AccessFs::WriteFile)
            }
            Reach::Socket(path) => (Role::Main, path, AccessFs::RemoveFile.into()),
        };
        if roles.contains(&role) {
            rules = allow_below(rules, path, access)?;
        }
    }
    Ok(rules)
}

fn allow_below(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, String> {
    let directory = PathFd::new(path).map_err(|e| e.to_string())?;
    let directory: BorrowedFd<'_> = directory.as_fd();
    rules.add_rule(PathBeneath::new(directory, access)).map_err(|e| e.to_string())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters that all threads inherit: what no role needs, and nobody needs to make a thread or a ring.
fn filter_all(violation: Violation) -> io::Result<()> {
    install(&without_clone3()?)?;
    let mut all = makers_calls().map_err(io::Error::other)?;
    for role in Role::ALL {
        for (call, rules) in calls_of(role).map_err(io::Error::other)? {
            merge(&mut all, call, rules);
        }
    }
    install(&compile(all, violation.action(), SeccompAction::Allow)?)
}

/// Allows a call with these arguments too; without a rule, with any.
fn merge(all: &mut Rules, call: i64, rules: Vec<SeccompRule>) {
    match all.get_mut(&call) {
        Some(known) if known.is_empty() => {}
        Some(known) if rules.is_empty() => known.clear(),
        Some(known) => {
            let new: Vec<_> = rules.into_iter().filter(|rule| !known.contains(rule)).collect();
            known.extend(new);
        }
        None => drop(all.insert(call, rules)),
    }
}

/// The filters of a role, in this order: the last forbids to install another.
fn filters_of(role: Role, violation: Violation) -> io::Result<Vec<BpfProgram>> {
    let calls = calls_of(role).map_err(io::Error::other)?;
    Ok(vec![without_open(role)?, compile(calls, violation.action(), SeccompAction::Allow)?])
}

impl Violation {
    fn action(self) -> SeccompAction {
        match self {
            Violation::Kill => SeccompAction::KillProcess,
            Violation::Log => SeccompAction::Log,
        }
    }
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

/// Files are opened by one role, below directories that are held open; where that is, Landlock watches. Any other open
/// fails, and does not kill: the C library looks at /proc/sys/vm/overcommit_memory when it gives memory back, and can do
/// without.
fn without_open(role: Role) -> io::Result<BpfProgram> {
    let here = u64::from(libc::AT_FDCWD.cast_unsigned());
    let rules = match role {
        Role::Names => vec![argument(0, SeccompCmpOp::Eq, here).map_err(io::Error::other)?],
        _ => Vec::new(),
    };
    refuse(libc::SYS_openat, rules, libc::EACCES)
}

fn refuse(call: i64, rules: Vec<SeccompRule>, errno: i32) -> io::Result<BpfProgram> {
    let errno = u32::try_from(errno).unwrap_or_default();
    let rules = BTreeMap::from([(call, rules)]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(errno))
}

/// Memory, locks, time and the end, also by a panic: what every thread does.
const ALL: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getcwd,
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
    libc::SYS_write,
    libc::SYS_writev,
];

/// To make a thread, which then confines itself, and a ring.
const MAKER: &[i64] = &[
    libc::SYS_clone3,
    libc::SYS_io_uring_setup,
    libc::SYS_landlock_restrict_self,
    libc::SYS_rseq,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
];

const MAIN: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getsockopt,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_unlinkat,
];

const CONNECTION: &[i64] = &[
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_memfd_create,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
];

/// What newer architectures have only in newer forms.
#[cfg(target_arch = "x86_64")]
mod old {
    pub(super) const POLL: &[i64] = &[libc::SYS_poll];
    pub(super) const UNLINK: &[i64] = &[libc::SYS_unlink];
}
#[cfg(not(target_arch = "x86_64"))]
mod old {
    pub(super) const POLL: &[i64] = &[];
    pub(super) const UNLINK: &[i64] = &[];
}

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
    libc::SYS_sync_file_range,
    libc::SYS_utimensat,
];

const QUEUE: &[i64] = &[libc::SYS_eventfd2, libc::SYS_io_uring_enter, libc::SYS_ppoll];

/// What changes a file's extents.
const DISK: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    crate::store::SYS_CACHESTAT,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
];

const NAMES: &[i64] =
    &[libc::SYS_newfstatat, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_unlinkat];

/// FIONBIO, to take a connection up; BLKGETSIZE64.
const MAIN_REQUESTS: &[i64] = &[0x5421, 0x8008_1272];

/// FS_IOC_FIEMAP, FICLONERANGE, BLKGETSIZE64.
const DISK_REQUESTS: &[i64] = &[0xc020_660b, 0x4020_940d, 0x8008_1272];

/// IORING_REGISTER_RESTRICTIONS, IORING_REGISTER_ENABLE_RINGS.
const RESTRICT_RING: i64 = 11;
const ENABLE_RING: i64 = 12;

type Built<T> = Result<T, seccompiler::BackendError>;

/// The calls of a role. A filter that is installed later can only take away.
fn calls_of(role: Role) -> Built<Rules> {
    let (lists, requests): (&[&[i64]], &[i64]) = match role {
        Role::Main => (&[MAIN, old::POLL, old::UNLINK], MAIN_REQUESTS),
        Role::Connection => (&[CONNECTION, old::POLL], &[]),
        Role::Queue => (&[QUEUE, old::POLL, TRANSFERS], &[]),
        Role::Disk => (&[TRANSFERS, DISK], DISK_REQUESTS),
        Role::Names => (&[NAMES], &[]),
        Role::Timer | Role::Watchdog | Role::Logger => (&[], &[]),
    };
    let mut rules = listed(std::iter::once(ALL).chain(lists.iter().copied()))?;
    if !requests.is_empty() {
        rules.insert(libc::SYS_ioctl, one_of(1, requests)?);
    }
    if role == Role::Queue {
        // A ring belongs to the thread that enables it.
        rules.insert(libc::SYS_io_uring_register, one_of(1, &[ENABLE_RING])?);
    }
    Ok(rules)
}

/// What only the maker does, and a thread before it has confined itself.
fn makers_calls() -> Built<Rules> {
    let mut rules = listed([MAKER])?;
    // Threads, no processes.
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap_or_default();
    rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    // Its name, and what comes with each filter.
    let settings = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS].map(i64::from);
    rules.insert(libc::SYS_prctl, one_of(0, &settings)?);
    rules.insert(libc::SYS_io_uring_register, one_of(1, &[RESTRICT_RING])?);
    Ok(rules)
}

/// The calls of these lists, and those that all need with some arguments.
fn listed<'a>(lists: impl IntoIterator<Item = &'a [i64]>) -> Built<Rules> {
    let calls = lists.into_iter().flatten();
    let mut rules: Rules = calls.map(|call| (*call, Vec::new())).collect();
    // No code is made or loaded.
    let executable = u64::try_from(libc::PROT_EXEC).unwrap_or_default();
    let not_executable = || argument(2, SeccompCmpOp::MaskedEq(executable), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL];
    rules.insert(libc::SYS_fcntl, one_of(1, &commands.map(i64::from))?);
    // The signal of an abort is for this process.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Eq, own)?]);
    Ok(rules)
}

fn argument(number: u8, compare: SeccompCmpOp, value: u64) -> Built<SeccompRule> {
    let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, compare, value)?;
    SeccompRule::new(vec![condition])
}

fn one_of(number: u8, values: &[i64]) -> Built<Vec<SeccompRule>> {
    let rule = |value: &i64| argument(number, SeccompCmpOp::Eq, value.cast_unsigned());
    values.iter().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_old_landlock_lacks_is_named() {
        assert_eq!(
            unrestricted(ABI::V1),
            "not restricted by Landlock ABI 1 of this kernel: truncation of files, TCP, ioctl on \
             devices, signals and abstract sockets"
        );
        assert!(
            unrestricted(ABI::V5).ends_with("ABI 5 of this kernel: signals and abstract sockets")
        );
    }

    #[test]
    fn rules_of_several_roles_add_up() {
        let rule = |n| vec![argument(0, SeccompCmpOp::Eq, n).unwrap()];
        let mut all = Rules::new();
        merge(&mut all, 1, rule(1));
        merge(&mut all, 1, rule(2));
        merge(&mut all, 1, rule(1));
        assert_eq!(all[&1].len(), 2);
        merge(&mut all, 1, Vec::new());
        merge(&mut all, 1, rule(3));
        assert!(all[&1].is_empty());
    }
}
