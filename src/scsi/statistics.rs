//! What a disk counts: commands, bytes and errors, for its log pages. Each thread counts in one of a few places, so
//! that queues do not write to what others read for each request.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::store::exclusion::{PLACES, own_place};

/// What is counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Blocks go to the initiator.
    Read,
    /// Blocks come from the initiator.
    Write,
    /// Blocks are compared, or only looked at.
    Verify,
}

/// How much of an activity there was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Commands.
    pub commands: u64,
    /// Bytes that they processed.
    pub bytes: u64,
    /// Commands that ended with a medium error.
    pub errors: u64,
}

#[derive(Debug, Default)]
struct Counter {
    commands: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// The counters of few threads, with cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Place {
    read: Counter,
    write: Counter,
    verify: Counter,
}

impl Place {
    fn counter(&self, activity: Activity) -> &Counter {
        match activity {
            Activity::Read => &self.read,
            Activity::Write => &self.write,
            Activity::Verify => &self.verify,
        }
    }
}

/// A self-test that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelfTest {
    /// SELF-TEST CODE.
    pub code: u8,
    /// SELF-TEST RESULTS: 0 without an error, 6h where a segment failed.
    pub result: u8,
    /// Accumulated power on hours.
    pub hours: u16,
    /// The first block that could not be read.
    pub failed: Option<u64>,
}

/// Self-tests that are remembered (SPC-5 7.3.19).
pub const SELF_TESTS: usize = 20;

/// Parameters of the application client page (SPC-5 7.3.4), and their length in bytes.
pub const CLIENT_PARAMETERS: u16 = 64;
/// The same.
pub const CLIENT_BYTES: usize = 252;

/// The counters of one disk, and what else its log pages tell.
#[derive(Debug)]
pub struct Statistics {
    places: [Place; PLACES],
    self_tests: Mutex<VecDeque<SelfTest>>,
    /// One runs in the background.
    tests: AtomicBool,
    stops: AtomicU64,
    client: Mutex<BTreeMap<u16, Vec<u8>>>,
    since: std::time::Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Statistics {
    /// Nothing was done yet.
    pub fn new() -> Self {
        Statistics {
            places: Default::default(),
            self_tests: Mutex::default(),
            tests: AtomicBool::new(false),
            stops: AtomicU64::new(0),
            client: Mutex::default(),
            since: std::time::Instant::now(),
        }
    }

    /// Counts a command that processed so many bytes.
    pub fn count(&self, activity: Activity, bytes: usize) {
        self.add(activity, |counter| {
            counter.commands.fetch_add(1, Ordering::Relaxed);
            counter.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        });
    }

    /// Counts one that failed.
    pub fn count_error(&self, activity: Activity) {
        self.add(activity, |counter| {
            counter.errors.fetch_add(1, Ordering::Relaxed);
        });
    }

    fn add(&self, activity: Activity, add: impl FnOnce(&Counter)) {
        if let Some(place) = self.places.get(own_place()) {
            add(place.counter(activity));
        }
    }

    fn counters(&self, activity: Activity) -> impl Iterator<Item = &Counter> {
        self.places.iter().map(move |place| place.counter(activity))
    }

    /// What was counted.
    pub fn total(&self, activity: Activity) -> Count {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        self.counters(activity).fold(Count::default(), |sum, counter| Count {
            commands: sum.commands.wrapping_add(load(&counter.commands)),
            bytes: sum.bytes.wrapping_add(load(&counter.bytes)),
            errors: sum.errors.wrapping_add(load(&counter.errors)),
        })
    }

    /// Begins to count anew. What is counted at this very moment may be lost.
    pub fn reset(&self, activity: Activity) {
        for counter in self.counters(activity) {
            for number in [&counter.commands, &counter.bytes, &counter.errors] {
                number.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Minutes since the disk was powered on.
    pub fn minutes(&self) -> u64 {
        self.since.elapsed().as_secs() / 60
    }

    /// Whether a self-test may begin in the background: there is but one at a time. It has to be ended.
    pub fn begin_self_test(&self) -> bool {
        !self.tests.swap(true, Ordering::AcqRel)
    }

    /// The self-test in the background has ended.
    pub fn end_self_test(&self) {
        self.tests.store(false, Ordering::Release);
    }

    /// Notes how a self-test has ended.
    pub fn note_self_test(&self, test: SelfTest) {
        let mut tests = lock(&self.self_tests);
        tests.push_front(test);
        tests.truncate(SELF_TESTS);
    }

    /// Self-tests, the last one first.
    pub fn self_tests(&self) -> Vec<SelfTest> {
        lock(&self.self_tests).iter().copied().collect()
    }

    /// Counts that the disk was stopped.
    pub fn count_stop(&self) {
        self.stops.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was stopped.
    pub fn stops(&self) -> u64 {
        self.stops.load(Ordering::Relaxed)
    }

    /// What application clients have left in a parameter.
    pub fn client_parameter(&self, number: u16) -> Vec<u8> {
        let mut bytes = lock(&self.client).get(&number).cloned().unwrap_or_default();
        bytes.resize(CLIENT_BYTES, 0);
        bytes
    }

    /// Leaves something there: at most [`CLIENT_BYTES`] for each of [`CLIENT_PARAMETERS`].
    pub fn set_client_parameter(&self, number: u16, mut bytes: Vec<u8>) {
        bytes.truncate(CLIENT_BYTES);
        if number < CLIENT_PARAMETERS {
            lock(&self.client).insert(number, bytes);
        }
    }

    /// Forgets all that.
    pub fn clear_client_parameters(&self) {
        lock(&self.client).clear();
    }
}

impl Default for Statistics {
    fn default() -> Self {
        Self::new()
    }
}
