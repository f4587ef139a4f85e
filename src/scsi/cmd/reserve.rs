//! PERSISTENT RESERVE IN and OUT (SPC-5 6.14, 6.15), RESERVE and RELEASE (SPC-2 7.17 ff).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::attention::Port;
use crate::scsi::copy::{Operation, Waiter};
use crate::scsi::lun::Lun;
use crate::scsi::reservations::{Change, Effects, State, Type};
use crate::scsi::sense::ScsiError;
use crate::scsi::target::Target;
use crate::scsi::wire::{Cdb, U16, U32, U64, bytes_of, len32};
use crate::store::engine::Cancel;
use crate::store::engine::ending::{Ending, ending};

/// TransportID of the initiator behind a port. No SCSI transport protocol is defined for virtio (PROTOCOL
/// IDENTIFIER Fh: no specific protocol); there is one initiator to a port, and it is known by that.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
struct TransportId {
    protocol: u8,
    reserved: [u8; 3],
    /// `"THINLUN "`.
    name: [u8; 8],
    reserved2: [u8; 10],
    port: U16,
}

impl TransportId {
    fn of(port: Port) -> Self {
        TransportId {
            protocol: 0x0f,
            reserved: [0; 3],
            name: *b"THINLUN ",
            reserved2: [0; 10],
            port: U16::new(port.0),
        }
    }
}

fn allocation(context: &Context<'_>) -> usize {
    let cdb = &context.request.cdb;
    u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]).into()
}

/// The state, for who may look at it.
fn state(context: &Context<'_>) -> Result<State, ScsiError> {
    let reservations = context.lun.reservations();
    reservations.check_basic(context.nexus.port())?;
    Ok(reservations.state())
}

/// PRGENERATION, the length of what follows, and that.
fn parameters(context: &Context<'_>, state: &State, contents: &[u8]) -> Reply {
    let mut bytes = bytes_of(&[U32::new(state.generation), len32(contents.len())]);
    bytes.extend(contents);
    Reply::Data { bytes, allocation: allocation(context) }
}

/// READ KEYS.
pub(super) fn read_keys(context: Context<'_>) -> Result<Reply, ScsiError> {
    let state = state(&context)?;
    let keys: Vec<u8> = state.keys.values().flat_map(|key| key.to_be_bytes()).collect();
    Ok(parameters(&context, &state, &keys))
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ReservationDescriptor {
    key: U64,
    obsolete: [u8; 4],
    reserved: u8,
    /// SCOPE 0h, logical unit, and TYPE.
    kind: u8,
    obsolete2: [u8; 2],
}

/// READ RESERVATION.
pub(super) fn read_reservation(context: Context<'_>) -> Result<Reply, ScsiError> {
    let state = state(&context)?;
    let descriptor = state.held.map(|held| {
        bytes_of(&ReservationDescriptor {
            key: U64::new(state.holders_key()),
            obsolete: [0; 4],
            reserved: 0,
            kind: held.kind as u8,
            obsolete2: [0; 2],
        })
    });
    Ok(parameters(&context, &state, &descriptor.unwrap_or_default()))
}

/// CRH: RESERVE and RELEASE get along with registrations.
const CRH: u8 = 0x10;
/// PTPL_C: reservations can survive a restart.
const PTPL_C: u8 = 0x01;
/// TMV: the mask of types is valid. PTPL_A: they survive now.
const TMV: u8 = 0x80;
const PTPL_A: u8 = 0x01;

/// REPORT CAPABILITIES.
pub(super) fn report_capabilities(context: Context<'_>) -> Result<Reply, ScsiError> {
    let state = state(&context)?;
    let ptpl = if context.lun.store().notes().survive() { PTPL_C } else { 0 };
    let active = if state.survives { PTPL_A } else { 0 };
    // A bit for each type's code: 1 to 7 in the first byte of the mask, 8 in the second.
    let mask = Type::ALL.iter().fold(0u16, |mask, kind| mask | 1 << (*kind as u8));
    let [high, low] = mask.to_be_bytes();
    let bytes = vec![0, 8, CRH | ptpl, TMV | active, low, high, 0, 0];
    Ok(Reply::Data { bytes, allocation: allocation(&context) })
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct FullStatus {
    key: U64,
    reserved: [u8; 4],
    /// R_HOLDER.
    flags: u8,
    kind: u8,
    reserved2: [u8; 4],
    relative_port: U16,
    additional_length: U32,
    initiator: TransportId,
}

/// READ FULL STATUS.
pub(super) fn read_full_status(context: Context<'_>) -> Result<Reply, ScsiError> {
    let state = state(&context)?;
    let descriptors: Vec<u8> = state
        .keys
        .iter()
        .flat_map(|(port, key)| {
            let held = state.held.filter(|_| state.holds(*port));
            bytes_of(&FullStatus {
                key: U64::new(*key),
                reserved: [0; 4],
                flags: u8::from(held.is_some()),
                kind: held.map_or(0, |held| held.kind as u8),
                reserved2: [0; 4],
                relative_port: U16::new(port.0),
                additional_length: len32(size_of::<TransportId>()),
                initiator: TransportId::of(*port),
            })
        })
        .collect();
    Ok(parameters(&context, &state, &descriptors))
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Basic {
    key: U64,
    other: U64,
    obsolete: [u8; 4],
    /// SPEC_I_PT, ALL_TG_PT and APTPL.
    flags: u8,
    reserved: u8,
    obsolete2: [u8; 2],
}

const SPEC_I_PT: u8 = 0x08;
const ALL_TG_PT: u8 = 0x04;
const APTPL: u8 = 0x01;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Move {
    key: U64,
    other: U64,
    reserved: u8,
    /// UNREG and APTPL.
    flags: u8,
    relative_port: U16,
    transport_id_length: U32,
    initiator: TransportId,
}

const UNREG: u8 = 0x02;

/// PARAMETER LIST LENGTH.
fn list_len(cdb: &Cdb) -> usize {
    let length = [cdb.byte(5), cdb.byte(6), cdb.byte(7), cdb.byte(8)];
    wire::allocation(u32::from_be_bytes(length))
}

/// The parameter list, which is as long as the structure.
fn list<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    context: &Context<'_>,
) -> Result<T, ScsiError> {
    let len = list_len(&context.request.cdb);
    if len != size_of::<T>() {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    T::read_from_bytes(&context.data_out(len)?.to_vec(len)).map_err(|_| ScsiError::Overrun)
}

/// The list of all service actions but one; the flags are for registering, and ignored otherwise.
fn basic(context: &Context<'_>) -> Result<Basic, ScsiError> {
    list(context)
}

/// APTPL, which the disk must have a place for.
fn survives(context: &Context<'_>, flags: u8, byte: u16) -> Result<bool, ScsiError> {
    let asked = flags & APTPL != 0;
    match asked && !context.lun.store().notes().survive() {
        true => Err(ScsiError::parameter_field(byte, Some(0))),
        false => Ok(asked),
    }
}

/// TYPE; SCOPE must be that of the logical unit.
fn kind(context: &Context<'_>) -> Result<Type, ScsiError> {
    let byte = context.request.cdb.byte(2);
    match byte >> 4 {
        0 => Type::parse(byte).ok_or(ScsiError::cdb_field(2, 3)),
        _ => Err(ScsiError::cdb_field(2, 7)),
    }
}

fn registering(
    context: &Context<'_>,
    old: impl Fn(u64) -> Option<u64>,
) -> Result<Change, ScsiError> {
    let list = basic(context)?;
    for (flag, bit) in [(SPEC_I_PT, 3), (ALL_TG_PT, 2)] {
        if list.flags & flag != 0 {
            // SIP_C and ATP_C are zero.
            return Err(ScsiError::parameter_field(20, Some(bit)));
        }
    }
    let survives = survives(context, list.flags, 20)?;
    Ok(Change::Register { old: old(list.key.get()), new: list.other.get(), survives })
}

/// REGISTER.
pub(super) fn register(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = registering(&context, Some)?;
    job(&context, change, false)
}

/// REGISTER AND IGNORE EXISTING KEY.
pub(super) fn register_and_ignore(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = registering(&context, |_| None)?;
    job(&context, change, false)
}

/// PERSISTENT RESERVE OUT RESERVE.
pub(super) fn reserve(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = Change::Reserve { key: basic(&context)?.key.get(), kind: kind(&context)? };
    job(&context, change, false)
}

/// PERSISTENT RESERVE OUT RELEASE.
pub(super) fn release(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = Change::Release { key: basic(&context)?.key.get(), kind: kind(&context)? };
    job(&context, change, false)
}

/// CLEAR.
pub(super) fn clear(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = Change::Clear { key: basic(&context)?.key.get() };
    job(&context, change, false)
}

fn preempting(context: &Context<'_>) -> Result<Change, ScsiError> {
    let list = basic(context)?;
    let (key, other) = (list.key.get(), list.other.get());
    Ok(Change::Preempt { key, other, kind: kind(context)? })
}

/// PREEMPT.
pub(super) fn preempt(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = preempting(&context)?;
    job(&context, change, false)
}

/// PREEMPT AND ABORT.
pub(super) fn preempt_and_abort(context: Context<'_>) -> Result<Reply, ScsiError> {
    let change = preempting(&context)?;
    job(&context, change, true)
}

/// REGISTER AND MOVE.
pub(super) fn register_and_move(context: Context<'_>) -> Result<Reply, ScsiError> {
    let list: Move = list(&context)?;
    if list.transport_id_length.get() as usize != size_of::<TransportId>() {
        return Err(ScsiError::parameter_field(20, None));
    }
    let to = Port(list.relative_port.get());
    if to == context.nexus.port() || !context.target.ports().any(|port| port == to) {
        return Err(ScsiError::parameter_field(18, None));
    }
    if list.initiator != TransportId::of(to) {
        return Err(ScsiError::parameter_field(24, None));
    }
    let change = Change::Move {
        key: list.key.get(),
        other: list.other.get(),
        to,
        unregister: list.flags & UNREG != 0,
        survives: survives(&context, list.flags, 17)?,
    };
    job(&context, change, false)
}

/// Makes a change, at once where nothing has to be noted, and tells who has to know. What it aborts is told to end before
/// anything waits: with many commands under way, those are in the way of whoever waits for a thread. For its end nothing
/// waits but the answer.
fn job(context: &Context<'_>, change: Change, abort: bool) -> Result<Reply, ScsiError> {
    let (target, lun) = (Arc::clone(context.target), Arc::clone(context.lun));
    let (port, len) = (context.nexus.port(), list_len(&context.request.cdb));
    let (ending, ended) = ending();
    let Some(effects) = lun.reservations().change_now(port, change) else {
        let job = move |cancel: &Cancel| {
            if cancel.is_requested() {
                return Err(ScsiError::Aborted);
            }
            let effects = lun.reservations().change(port, change, lun.store().notes())?;
            follow(&target, &lun, effects, abort, ending);
            Ok(len)
        };
        return Ok(Reply::After(Box::new(job), ended));
    };
    match follow(&target, &lun, effects?, abort, ending) {
        false => Ok(Reply::Consumed(len)),
        true => Ok(Reply::After(Box::new(move |_| Ok(len)), ended)),
    }
}

/// Tells who has to know, and has what those who were preempted have under way at the disk end; says whether that is to be
/// waited for. What ends before PREEMPT AND ABORT does (SPC-5 5.14.11.2.6) are their commands to the disk, and their copies
/// from and to it, whichever disk was asked for them and whether or not the command has been answered. It holds `ending`.
fn follow(
    target: &Arc<Target>,
    lun: &Arc<Lun>,
    effects: Effects,
    abort: bool,
    ending: Arc<Ending>,
) -> bool {
    for (port, attention) in &effects.tell {
        target.tell(lun, *attention, *port);
    }
    if !abort || effects.preempted.is_empty() {
        return false;
    }
    let (ports, next) = (effects.preempted, Arc::clone(&ending));
    let (of_commands, commands) = self::ending();
    target.abort_tasks(&ports, lun, of_commands);
    let (target, lun) = (Arc::clone(target), Arc::clone(lun));
    let waiter: Waiter = ending;
    let end_copies = move || {
        let theirs = |copy: &Operation| ports.contains(&copy.port) && copy.concerns(&lun);
        target.copies().end(theirs, &waiter);
    };
    end_copies();
    // Once more: one of the commands may have begun a copy before it ended.
    commands.then_before(next, Box::new(end_copies));
    true
}

/// RESERVE (6, 10): the whole disk, for the initiator itself.
pub(super) fn basic_reserve(context: Context<'_>) -> Result<Reply, ScsiError> {
    context.lun.reservations().reserve(context.nexus.port())?;
    Ok(Reply::Good)
}

/// RELEASE (6, 10).
pub(super) fn basic_release(context: Context<'_>) -> Result<Reply, ScsiError> {
    context.lun.reservations().release(context.nexus.port())?;
    Ok(Reply::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_standards() {
        assert_eq!(size_of::<TransportId>(), 24);
        assert_eq!(size_of::<FullStatus>(), 48);
        assert_eq!((size_of::<Basic>(), size_of::<Move>()), (24, 48));
        assert_eq!(size_of::<ReservationDescriptor>(), 16);
    }
}
