//! What is known of how well a part of the host is: a file system that hangs in one file hangs in all of its files.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The device or file system that files lie on.
#[derive(Debug, Default)]
pub struct Host {
    /// Calls that do not come back.
    hanging: AtomicUsize,
}

impl Host {
    /// The one with this device number (`st_dev`), the same for all that ask while it is in use.
    pub fn of_device(number: u64) -> Arc<Self> {
        static ALL: Mutex<Option<HashMap<u64, Weak<Host>>>> = Mutex::new(None);
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.get_or_insert_default();
        if let Some(host) = all.get(&number).and_then(Weak::upgrade) {
            return host;
        }
        all.retain(|_, host| host.strong_count() > 0);
        let host = Arc::default();
        all.insert(number, Arc::downgrade(&host));
        host
    }

    /// Whether a call of a thread that others wait for hangs there, so that the next one should not be made.
    #[inline]
    pub fn is_hung(&self) -> bool {
        self.hanging.load(Ordering::Relaxed) > 0
    }

    /// A call does not come back; says whether it is the only one.
    pub fn hangs(&self) -> bool {
        self.hanging.fetch_add(1, Ordering::AcqRel) == 0
    }

    /// Such a call is back after all; says whether it was the last one.
    pub fn is_back(&self) -> bool {
        self.hanging.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_device_share_its_state() {
        let (one, other) = (Host::of_device(1), Host::of_device(2));
        assert!(one.hangs() && !one.hangs() && Host::of_device(1).is_hung() && !other.is_hung());
        assert!(!one.is_back() && one.is_back() && !one.is_hung());
        one.hangs();
        drop(one);
        assert!(!Host::of_device(1).is_hung(), "a new one");
    }
}
