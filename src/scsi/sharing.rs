//! Who has changed a disk, so that nothing is done again over what others have done since.
//!
//! A command that a daemon has not answered may have been done, and seen. To do it again is right as long as it could still
//! be the first time: when another initiator has changed the disk since, it could not (he may have read what it wrote, and
//! have taken a lock on account of that). Who only reads is in nobody's way. So it is kept who has changed the disk since
//! the daemon started, told to whoever keeps requests in flight for the next daemon, and nobody begins to change the disk
//! while another's command is done again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::attention::Port;
use super::cmd::{self, Command};
use super::lun::Lun;
use super::sense::ScsiError;
use super::target::Tasks;
use super::wire::Cdb;

/// The initiators of one disk, as far as they change it.
#[derive(Default)]
pub struct Sharing {
    /// A bit for each port whose initiator has changed it.
    changed: AtomicU64,
    /// The same for those who need not look at anything else: what every command looks at that changes the disk.
    settled: AtomicU64,
    /// Whose commands are done again now.
    redone: Mutex<Vec<Port>>,
    tasks: OnceLock<Weak<dyn Tasks>>,
}

/// A command that changes a disk and is done again, until this is dropped.
pub struct Redone {
    lun: Arc<Lun>,
    port: Port,
}

/// There are no more than 64 ports.
fn bit(port: Port) -> u64 {
    1 << (port.0 % 64)
}

impl Sharing {
    fn redone(&self) -> MutexGuard<'_, Vec<Port>> {
        self.redone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says, once, who knows the commands in flight.
    pub(super) fn set_tasks(&self, tasks: Weak<dyn Tasks>) {
        let _ = self.tasks.set(tasks);
    }

    /// Who knows the commands in flight.
    pub(super) fn tasks(&self) -> Option<Arc<dyn Tasks>> {
        self.tasks.get()?.upgrade()
    }

    /// Whether any other initiator has changed the disk.
    pub fn is_changed_by_others(&self, port: Port) -> bool {
        self.changed.load(Ordering::SeqCst) & !bit(port) != 0
    }
}

impl Lun {
    /// An initiator is about to change the disk: its medium, or what else it keeps.
    ///
    /// # Errors
    /// BUSY for who changes the medium while a command of another is done again.
    #[inline]
    pub fn change(&self, port: Port, medium: bool) -> Result<(), ScsiError> {
        match self.sharing().settled.load(Ordering::Acquire) & bit(port) {
            0 => self.change_first(port, medium),
            _ => Ok(()),
        }
    }

    #[cold]
    fn change_first(&self, port: Port, medium: bool) -> Result<(), ScsiError> {
        self.note_change(port);
        let sharing = self.sharing();
        // Nothing is begun again from here on but what is his own.
        let busy = sharing.redone().iter().any(|of| *of != port);
        if !busy {
            sharing.settled.fetch_or(bit(port), Ordering::AcqRel);
        }
        if busy && medium { Err(ScsiError::Busy) } else { Ok(()) }
    }

    /// An initiator changes the disk, or is told that others no longer do.
    pub fn note_change(&self, port: Port) {
        let sharing = self.sharing();
        // Who begins to keep requests in flight looks there.
        sharing.changed.fetch_or(bit(port), Ordering::SeqCst);
        if let Some(tasks) = sharing.tasks() {
            tasks.note_change(port, self.index());
        }
    }
}

impl Redone {
    /// To be held as long as a command is under way that is done again; `None` if it changes nothing, or will not be done.
    #[cold]
    pub fn of(lun: &Arc<Lun>, port: Port, cdb: &Cdb) -> Option<Box<Self>> {
        let changes = cmd::find_on(lun, cdb).is_ok_and(Command::changes);
        let mut redone = lun.sharing().redone();
        if !changes || lun.sharing().is_changed_by_others(port) {
            return None;
        }
        redone.push(port);
        Some(Box::new(Redone { lun: Arc::clone(lun), port }))
    }
}

impl Drop for Redone {
    fn drop(&mut self) {
        let mut redone = self.lun.sharing().redone();
        if let Some(at) = redone.iter().position(|of| *of == self.port) {
            redone.swap_remove(at);
        }
    }
}
