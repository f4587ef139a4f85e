//! The way of a command through the checks that every command passes, to its handler and back.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::attention::Nexus;
use super::cmd::{self, Access, Command, Context, Missing, NeedyFn, Reply};
use super::lun::Lun;
use super::provisioning;
use super::sense::{Key, ScsiError, Sense, asc};
use super::target::{Addressed, Target};
use super::{Delivery, Outcome, Plan, Request, Transfer, Work};
use crate::store::engine::ending::Ended;
use crate::store::engine::{Cancel, Job, Need};
use crate::store::{Buffers, Store};

/// Takes a command through all checks to its handler.
pub fn execute(
    target: &Arc<Target>,
    nexus: &Arc<Nexus>,
    address: &Addressed<'_>,
    mut request: Request,
) -> Plan {
    match address {
        Addressed::Disk(lun) => on_disk(target, nexus, lun, &mut request),
        Addressed::WellKnown(number) => {
            Plan::Done(without_disk(target, *number, &request, Missing::WellKnown))
        }
        Addressed::AbsentLun(number, lun) => {
            let lun_zero = lun.is_some_and(|n| n.get() == 0);
            Plan::Done(without_disk(target, *number, &request, Missing::Lun { lun_zero }))
        }
        Addressed::AbsentTarget => Plan::Done(Outcome::undelivered(Delivery::BadTarget)),
    }
}

fn on_disk(
    target: &Arc<Target>,
    nexus: &Arc<Nexus>,
    lun: &Arc<Lun>,
    request: &mut Request,
) -> Plan {
    provisioning::watch(target, lun);
    let reply = check(nexus, lun, request).and_then(|command| {
        let context = Context { target, nexus, lun, request };
        Ok((command, (command.handler)(context)?))
    });
    let (command, reply) = match reply {
        Ok(done) => done,
        Err(error) => return Plan::Done(lun.failed(error)),
    };
    match reply {
        Reply::Good => Plan::Done(Outcome::good(0)),
        Reply::Consumed(bytes) => Plan::Done(Outcome::good(bytes)),
        Reply::Data { bytes, allocation } => Plan::Done(
            deliver(&request.data_in, &bytes, allocation).unwrap_or_else(|error| lun.failed(error)),
        ),
        Reply::Transfer(operation, bytes) => {
            let writing = command.access == Access::Write;
            Plan::Transfer(Transfer::of(&operation, bytes, writing), operation)
        }
        Reply::Job(job) => {
            let job = Box::new(move |cancel: &Cancel, _: &dyn Store| job(cancel));
            plan_job(command, nexus, lun, Need::Nothing, job, None, None)
        }
        Reply::After(job, ended) => {
            let job = Box::new(move |cancel: &Cancel, _: &dyn Store| job(cancel));
            plan_job(command, nexus, lun, Need::Nothing, job, Some(ended), None)
        }
        Reply::Needy(need, job) => plan_job(command, nexus, lun, need, job, None, None),
        Reply::Begins(job, begin) => {
            let job = Box::new(move |cancel: &Cancel, _: &dyn Store| job(cancel));
            plan_job(command, nexus, lun, Need::Nothing, job, None, Some(begin))
        }
    }
}

fn plan_job(
    command: &Command,
    nexus: &Arc<Nexus>,
    lun: &Arc<Lun>,
    need: Need,
    job: NeedyFn,
    after: Option<Ended>,
    begin: Option<Sender<()>>,
) -> Plan {
    let (on, nexus) = (Arc::clone(lun), Arc::clone(nexus));
    let work = move |cancel: &Cancel, store: &dyn Store| match job(cancel, store) {
        Ok(transferred) => Outcome::good(transferred),
        Err(error) => {
            nexus.attentions(on.index()).hears(&error);
            on.failed(error)
        }
    };
    let job = Job { need, work: Box::new(work), after };
    Plan::Job(Work { job, at_medium: command.is_at_medium(), begin })
}

/// A command to a logical unit that is no disk: the well-known one, or none at all.
fn without_disk(target: &Target, number: u8, request: &Request, missing: Missing) -> Outcome {
    cmd::without_disk(target, number, request, missing)
        .and_then(|(bytes, allocation)| deliver(&request.data_in, &bytes, allocation))
        .unwrap_or_else(|error| Outcome::failed(error, false))
}

/// What every command is checked for before its handler sees it, in the order of SAM-6 5.3.3 and
/// SPC-5: known operation, unit attention, deferred error, reservations, reserved bits, operation under way, readiness,
/// write protection.
fn check(nexus: &Nexus, lun: &Lun, request: &Request) -> Result<&'static Command, ScsiError> {
    let command = cmd::find_on(lun, &request.cdb);
    // A condition that arose with the restart is for commands that were given after it: one that was given before was
    // in the task set before the condition was established (SAM-6 5.14), and firmware does not repeat it.
    let exempt = request.again || command.as_ref().is_ok_and(|c| c.exempt_from_attention);
    if !exempt && let Some(attention) = nexus.attentions(lun.index()).take() {
        return Err(ScsiError::Check(attention.sense()));
    }
    if !exempt && let Some(error) = lun.deferred_error(nexus) {
        return Err(ScsiError::Check(error));
    }
    let command = command?;
    if !command.exempt_from_attention {
        lun.background().check_known()?;
    }
    lun.reservations().check(nexus.port(), command.conflict, &request.cdb)?;
    let overtaken = || request.overtaken || lun.sharing().is_changed_by_others(nexus.port());
    if request.again && command.once {
        // Nobody can tell what became of it; the initiator has to look.
        return Err(ScsiError::Aborted);
    }
    if request.again && command.changes() && overtaken() {
        // Nor what others have made of that. Initiators give such a command again by themselves, and then know that they do.
        let sense = Sense::new(Key::AbortedCommand, asc::IO_PROCESS_TERMINATED);
        return Err(ScsiError::Check(sense));
    }
    command.check_reserved_bits(&request.cdb, Some(lun))?;
    lun.background().check(command.tolerance())?;
    if command.access != Access::None {
        lun.check_ready()?;
    }
    if command.access == Access::Write {
        lun.check_writable()?;
    }
    if command.changes() {
        lun.change(nexus.port(), command.access == Access::Write)?;
    }
    Ok(command)
}

/// Gives data-in bytes to the initiator, cut off at the allocation length (SPC-5 4.2.5.6). There must
/// be room for all that the allocation length allows (VIRTIO 1.3 5.6.6.1.1, OVERRUN).
fn deliver(data_in: &Buffers, bytes: &[u8], allocation: usize) -> Result<Outcome, ScsiError> {
    if allocation > data_in.len() {
        return Err(ScsiError::Overrun);
    }
    let bytes = bytes.get(..allocation).unwrap_or(bytes);
    Ok(Outcome::good(data_in.write_at(0, bytes)))
}
