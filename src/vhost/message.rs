//! What queue threads and connections tell each other.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

use super::FIXED_QUEUES;
use super::dirty_log::DirtyLog;
use super::memory::GuestMemory;
use super::wire::{Ended, T_PARAM_CHANGE};
use crate::scsi::{LunNumber, UnitAttention};

/// What others want of a queue thread.
pub(super) enum Message {
    /// Use this memory from now on; answered when it does.
    SetMemory(Arc<GuestMemory>, Sender<()>),
    /// Tell the driver by this from now on; answered when it does.
    SetCall(Option<File>, Sender<()>),
    /// Mark in this from now on which guest memory is written to; answered when it does.
    SetLog(Option<Arc<DirtyLog>>, Sender<()>),
    /// Find, and maybe end, commands in flight (request queues).
    Sweep(Arc<Sweep>),
    /// A sweep is over (control queue).
    Swept(u64),
    /// Something for the driver to know (event queue).
    Event(Event),
    /// End early what can be (request queues): nobody will hear the answers any more, or, if it is to be left, the
    /// next process is to do it again.
    GiveUp { leave: bool },
    /// Finish what is in flight and end.
    Stop,
}

/// Where to send a queue thread messages.
#[derive(Clone, Debug)]
pub(super) struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// The mailbox of the thread that receives from `sender`'s other end and waits for `wake`.
    pub(super) fn new(sender: Sender<Message>, wake: Arc<EventFd>) -> Self {
        Mailbox { sender, wake }
    }

    /// Sends a message; it is lost if the thread has ended.
    pub(super) fn send(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // It fails only if the counter is full, and then the thread is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Sends a message that is answered, and waits for the answer or the thread's end.
    fn call(&self, message: impl FnOnce(Sender<()>) -> Message) {
        let (done, answered) = mpsc::channel();
        self.send(message(done));
        let _ = answered.recv();
    }

    /// Has the thread use other memory.
    pub(super) fn set_memory(&self, memory: &Arc<GuestMemory>) {
        self.call(|done| Message::SetMemory(Arc::clone(memory), done));
    }

    /// Has the thread mark what it writes to.
    pub(super) fn set_log(&self, log: Option<&Arc<DirtyLog>>) {
        self.call(|done| Message::SetLog(log.cloned(), done));
    }

    /// Has the thread use another call event.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.call(|done| Message::SetCall(call, done));
    }
}

/// The mailboxes of the queue threads of one connection, by queue index.
pub(super) type Peers = Arc<Mutex<HashMap<usize, Mailbox>>>;

/// Sends a sweep to all request queues of a connection.
pub(super) fn send_sweep(peers: &Peers, sweep: &Arc<Sweep>) {
    let peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
    for (_, mailbox) in peers.iter().filter(|(index, _)| is_request_queue(**index)) {
        mailbox.send(Message::Sweep(Arc::clone(sweep)));
    }
}

/// Queue 0 is the control queue, 1 the event queue, the rest are request queues.
fn is_request_queue(index: usize) -> bool {
    index >= FIXED_QUEUES
}

/// A search through the commands in flight on all request queues.
#[derive(Debug)]
pub(super) struct Sweep {
    disks: Vec<usize>,
    tag: Option<u64>,
    ends_with: Option<Ended>,
    any: AtomicBool,
    report: Report,
}

/// Who waits for the end of a sweep.
#[derive(Debug)]
pub(super) enum Report {
    /// A control queue, which knows it by a number, and whether anything was found.
    Queue { to: Mailbox, id: u64, found: Arc<AtomicBool> },
    /// Somebody at the other end, which hangs up.
    Caller { _end: Sender<()> },
}

impl Sweep {
    /// A sweep for commands to `disks` (and, if given, with this tag).
    pub(super) fn new(
        disks: Vec<usize>,
        tag: Option<u64>,
        ends_with: Option<Ended>,
        report: Report,
    ) -> Self {
        Sweep { disks, tag, ends_with, any: AtomicBool::new(false), report }
    }

    /// Whether it is about this command.
    pub(super) fn selects(&self, disk: usize, tag: u64) -> bool {
        self.disks.contains(&disk) && self.tag.is_none_or(|t| t == tag)
    }

    /// Notes that there is such a command.
    pub(super) fn found(&self) {
        self.any.store(true, Ordering::Release);
    }

    /// How to end what it finds, if at all.
    pub(super) fn ends_with(&self) -> Option<Ended> {
        self.ends_with
    }
}

impl Drop for Sweep {
    fn drop(&mut self) {
        if let Report::Queue { to, id, found } = &self.report {
            found.store(self.any.load(Ordering::Acquire), Ordering::Release);
            to.send(Message::Swept(*id));
        }
    }
}

/// Something that happened to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// VIRTIO_SCSI_T_*.
    pub kind: u32,
    /// The disk, as in a command's header.
    pub lun: [u8; 8],
    /// What exactly, as the kind defines.
    pub reason: u32,
}

impl Event {
    /// The parameters of a disk changed; the reason is the unit attention's code (ASC in the low
    /// byte, ASCQ above it).
    pub(super) fn parameters_changed(target: u8, lun: LunNumber, attention: UnitAttention) -> Self {
        let [high, low, ..] = lun.encode();
        let [asc, ascq] = attention.asc().to_be_bytes();
        Event {
            kind: T_PARAM_CHANGE,
            lun: [1, target, high, low, 0, 0, 0, 0],
            reason: u32::from(asc) | u32::from(ascq) << 8,
        }
    }
}
