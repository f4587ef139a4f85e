//! The end of what others are at, waited for without a thread.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

/// What is done when something has ended. It does not wait for anything.
pub type GoOn = Box<dyn FnOnce() + Send>;

/// Whoever holds this has not ended.
#[derive(Debug)]
pub struct Ending(Arc<Mutex<Awaited>>);

/// When everybody who holds the [`Ending`] has let go of it.
#[derive(Debug)]
pub struct Ended(Arc<Mutex<Awaited>>);

enum Awaited {
    /// Somebody may come to wait.
    Yet,
    /// By whom this is done then; for somebody who waits for that in turn, if it names one.
    By(GoOn, Option<Arc<Ending>>),
    /// It has ended, or nobody waits for it any more.
    Over,
}

impl std::fmt::Debug for Awaited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Awaited::Yet => "Yet",
            Awaited::By(..) => "By",
            Awaited::Over => "Over",
        })
    }
}

fn lock(awaited: &Mutex<Awaited>) -> MutexGuard<'_, Awaited> {
    awaited.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that will have ended: to be held, and to be waited for.
pub fn ending() -> (Arc<Ending>, Ended) {
    let awaited = Arc::new(Mutex::new(Awaited::Yet));
    (Arc::new(Ending(Arc::clone(&awaited))), Ended(awaited))
}

impl Ending {
    /// Whether somebody waits, or may come to wait.
    pub fn is_awaited(&self) -> bool {
        match &*lock(&self.0) {
            Awaited::Yet | Awaited::By(_, None) => true,
            Awaited::By(_, Some(next)) => next.is_awaited(),
            Awaited::Over => false,
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let before = mem::replace(&mut *lock(&self.0), Awaited::Over);
        if let Awaited::By(go_on, _next) = before {
            go_on();
        }
    }
}

impl Ended {
    /// Goes on with this when it has ended: at once if it has, else where the last lets go.
    pub fn then(&self, go_on: GoOn) {
        self.go_on(go_on, None);
    }

    /// The same, where it is of no use any more once nobody waits for `next`.
    pub fn then_before(&self, next: Arc<Ending>, go_on: GoOn) {
        self.go_on(go_on, Some(next));
    }

    fn go_on(&self, go_on: GoOn, next: Option<Arc<Ending>>) {
        let mut awaited = lock(&self.0);
        match *awaited {
            Awaited::Yet => *awaited = Awaited::By(go_on, next),
            Awaited::By(..) | Awaited::Over => {
                drop(awaited);
                go_on();
            }
        }
    }

    /// Nobody waits any more; says whether somebody did.
    pub fn forget(&self) -> bool {
        let before = mem::replace(&mut *lock(&self.0), Awaited::Over);
        matches!(before, Awaited::By(..))
    }

    /// Waits on this thread.
    pub fn wait(&self) {
        let (over, is_over) = mpsc::channel::<()>();
        self.then(Box::new(move || drop(over)));
        let _ = is_over.recv();
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let mut awaited = lock(&self.0);
        if matches!(*awaited, Awaited::Yet) {
            *awaited = Awaited::Over;
        }
    }
}

/// Keeps something in a list as long as it is awaited, and those who are not awaited any more no longer than there is no
/// room without them: the list is looked through after it has doubled, so that this costs little each time.
pub fn keep<T>(list: &mut Vec<T>, one: T, is_awaited: impl Fn(&T) -> bool) {
    if list.len() == list.capacity() {
        list.retain(is_awaited);
        list.reserve(list.len() + 1);
    }
    list.push(one);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_goes_on_once_when_the_last_has_let_go() {
        for late in [false, true] {
            let (ending, ended) = ending();
            let other = Arc::clone(&ending);
            let (over, is_over) = mpsc::channel();
            let go_on: GoOn = Box::new(move || over.send(()).unwrap());
            drop(ending);
            assert!(is_over.try_recv().is_err());
            if late {
                drop(other);
                ended.then(go_on);
            } else {
                ended.then(go_on);
                assert!(is_over.try_recv().is_err() && other.is_awaited());
                drop(other);
            }
            assert_eq!((is_over.try_recv(), is_over.try_recv().is_err()), (Ok(()), true));
            assert!(!ended.forget());
            ended.wait();
        }
    }

    #[test]
    fn who_waits_no_longer_does_not_go_on_and_is_not_kept() {
        let mut kept = Vec::new();
        let (forgotten, live) = (10_000, 100);
        for n in 0..forgotten + live {
            let (ending, ended) = ending();
            ended.then(Box::new(move || assert!(n >= forgotten)));
            keep(&mut kept, ending, |ending| ending.is_awaited());
            assert!(n >= forgotten || ended.forget() && !ended.forget());
        }
        let (before, awaits) = ending();
        for _ in 0..forgotten {
            let ((first, ended), (next, nobody)) = (ending(), ending());
            ended.then_before(next, Box::new(|| ()));
            drop(nobody);
            keep(&mut kept, first, |ending| ending.is_awaited());
        }
        drop(awaits);
        assert!(!before.is_awaited());
        assert_eq!(kept.iter().filter(|ending| ending.is_awaited()).count(), live);
        assert!(kept.capacity() < 1000, "{}", kept.capacity());
    }
}
