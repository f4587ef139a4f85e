//! A place where a thread leaves what it has, so that another can take it.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Something that was left here, or nothing. One thread leaves and takes back; any may take.
#[derive(Debug)]
pub(super) struct Lent<T>(AtomicPtr<T>);

impl<T> Default for Lent<T> {
    fn default() -> Self {
        Lent(AtomicPtr::default())
    }
}

impl<T> Lent<T> {
    /// Leaves something where there is nothing. A plain store: an exchange would wait for everything that this thread has
    /// written lately, to memory that the driver looks at on another processor.
    #[inline]
    pub(super) fn lend(&self, what: Box<T>) {
        debug_assert!(self.0.load(Ordering::Relaxed).is_null(), "there is something already");
        self.0.store(Box::into_raw(what), Ordering::Release);
    }

    /// Takes what is here: whoever is the first has it.
    #[inline]
    pub(super) fn take(&self) -> Option<Box<T>> {
        let what = self.0.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: it came from `Box::into_raw` in `lend`, and whoever exchanges it for null is the only one who has it.
        (!what.is_null()).then(|| unsafe { Box::from_raw(what) })
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    #[test]
    fn one_of_two_has_it() {
        const ROUNDS: usize = 20_000;
        let (lent, over, other) = (Lent::default(), AtomicBool::new(false), AtomicUsize::new(0));
        let mut own = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    other.fetch_add(usize::from(lent.take().is_some()), Ordering::AcqRel);
                }
            });
            for round in 0..ROUNDS {
                lent.lend(Box::new(round));
                own += usize::from(lent.take().is_some());
            }
            over.store(true, Ordering::Release);
        });
        assert_eq!(own + other.load(Ordering::Acquire), ROUNDS);
        lent.lend(Box::new(0));
    }
}
