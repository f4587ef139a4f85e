//! The asynchronous face of the store: operations go in with a token, completions come out in any
//! order. Each queue thread owns one engine; nothing in it is shared between queues.

pub mod ending;
pub mod threads;
pub mod uring;

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Buffers, Durability, Store, StoreError};
use ending::Ended;

/// Names one command in flight on a queue. Whoever holds it owes the queue exactly one completion.
#[must_use = "a command in flight must be completed"]
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// One transfer between memory and a store, or one flush.
#[derive(Debug)]
pub enum Operation {
    /// Fill `into` from byte `offset` on; from the medium itself where `medium` is set.
    Read {
        /// First byte.
        offset: u64,
        /// Where the bytes go.
        into: Buffers,
        /// Whether cached data will not do (FUA).
        medium: bool,
    },
    /// Write `from` at byte `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Where the bytes come from.
        from: Buffers,
        /// When the write counts as done.
        durability: Durability,
    },
    /// Make what was written before survive a crash.
    Flush,
    /// Read ahead, best effort.
    Prefetch {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Which engine serves a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the kernel has it.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Threads.
    Threads,
}

impl Operation {
    /// Bytes that it transfers.
    pub fn len(&self) -> usize {
        match self {
            Operation::Read { into, .. } => into.len(),
            Operation::Write { from, .. } => from.len(),
            Operation::Flush | Operation::Prefetch { .. } => 0,
        }
    }

    /// The bytes of the store that it is about.
    pub fn range(&self) -> Range<u64> {
        match self {
            Operation::Read { offset, .. } | Operation::Write { offset, .. } => {
                *offset..offset.saturating_add(self.len() as u64)
            }
            Operation::Flush | Operation::Prefetch { .. } => 0..0,
        }
    }

    /// Whether it transfers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Runs the operation to its end on this thread.
    ///
    /// # Errors
    /// What the store says.
    pub fn run(self, store: &dyn Store) -> Result<(), StoreError> {
        match self {
            Operation::Read { offset, into, medium: false } => store.read(offset, &into),
            Operation::Read { offset, into, medium: true } => {
                if !store.capabilities().read_only {
                    store.flush()?;
                }
                store.read_medium(offset, &into)
            }
            Operation::Write { offset, from, durability } => store.write(offset, &from, durability),
            Operation::Flush => store.flush(),
            Operation::Prefetch { offset, len } => store.prefetch(offset, len),
        }
    }
}

/// Asks a job to end at its next clean boundary.
#[derive(Debug, Default)]
pub struct Cancel(AtomicBool);

impl Cancel {
    /// Asks. There is no way back.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether somebody asked; a job looks here between its steps.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a job must have before it begins, and has until it has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// A thread of the store's pool, as all have: it waits for nothing but the host.
    Nothing,
    /// A thread of its own: it may wait for others.
    Thread,
    /// Ranges of the store that nobody has for himself. It does not wait for any others.
    Together(Vec<Range<u64>>),
    /// A range of the store for itself. It does not wait for any other.
    Alone(Range<u64>),
}

/// Work of several blocking steps, with a result of the caller's own kind. It gets the store, to be used in the ranges that
/// it needs.
pub type Work<J> = Box<dyn FnOnce(&Cancel, &dyn Store) -> J + Send>;

/// Work, and what it needs.
pub struct Job<J> {
    /// What it must have.
    pub need: Need,
    /// What it does.
    pub work: Work<J>,
    /// What else must have ended before it has: it takes no thread meanwhile.
    pub after: Option<Ended>,
}

impl<J> Job<J> {
    /// Does it on this thread, on a store of which nobody else has anything.
    pub fn run(self, store: &dyn Store, cancel: &Cancel) -> J {
        (self.work)(cancel, store)
    }
}

/// The end of one operation or job.
#[derive(Debug)]
pub struct Completion<J> {
    /// The token it was submitted with.
    pub token: Token,
    /// What came of it.
    pub result: Finished<J>,
}

/// What came of an operation or job.
#[derive(Debug)]
pub enum Finished<J> {
    /// An operation ran; or nothing did, for want of a thread ([`super::Cause::Busy`]), be it an operation or a job.
    Operation(Result<(), StoreError>),
    /// A job ran.
    Job(J),
    /// Cancelled before it began; nothing was touched.
    Withdrawn,
}

/// Runs operations and jobs beside the queue thread that owns it.
pub trait Engine<J> {
    /// Begins an operation that cannot be done at once ([`Store::try_now`]) on a store. The engine may keep
    /// the store under this number, which always names the same one.
    fn submit(&mut self, token: Token, number: usize, store: &Arc<dyn Store>, operation: Operation);

    /// Hands over to the host what was submitted since the last time.
    fn flush(&mut self) {}

    /// Does that, and sleeps until a completion is there or one of the events can be read; says which of
    /// them can. `None`, at once, if the engine has nothing to sleep in.
    fn sleep(&mut self, _events: [Option<RawFd>; 2]) -> Option<[bool; 2]> {
        None
    }

    /// Whether operations have completed that [`Engine::completions`] will tell of, as far as can be seen
    /// without waiting for a wake event.
    fn has_completions(&mut self) -> bool {
        false
    }

    /// Whether the host has something for [`Engine::completions`] to look at already.
    fn has_landed(&mut self) -> bool {
        false
    }

    /// Begins a job on the store's pool, when it can have what it needs.
    fn spawn(&mut self, token: Token, store: &Arc<dyn Store>, job: Job<J>);

    /// Asks for an early end: work not begun is withdrawn, a running job is asked to stop, a
    /// running transfer goes on. Either way its completion still comes.
    fn cancel(&mut self, token: u32);

    /// Moves the completions that are there into `into`. The engine rings the wake event it was
    /// made with whenever there is a new one.
    fn completions(&mut self, into: &mut Vec<Completion<J>>);
}
