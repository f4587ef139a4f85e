//! What a disk is called and what time it has: REPORT and SET IDENTIFYING INFORMATION, REPORT and SET TIMESTAMP,
//! REPORT TARGET PORT GROUPS (SPC-5 6.32, 6.43, 6.40, 6.46, 6.39), READ MEDIA SERIAL NUMBER (SPC-5 6.20).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::UnitAttention;
use crate::scsi::lun::Lun;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{Cdb, U16, bytes_of, from_hex, len16, len32};

/// Allocation or parameter list length of all these commands.
fn length(cdb: &Cdb) -> usize {
    wire::allocation(u32::from_be_bytes([cdb.byte(6), cdb.byte(7), cdb.byte(8), cdb.byte(9)]))
}

/// A kind of identifying information: INFORMATION TYPE, what it is noted as, and its most bytes.
struct Kind(u8, &'static str, usize);

const KINDS: [Kind; 2] =
    [Kind(0, "identifying-information", 512), Kind(2, "identifying-text", 256)];

/// INFORMATION TYPE that asks which types there are.
const SUPPORTED: u8 = 0x7f;

fn kind(cdb: &Cdb) -> Result<&'static Kind, ScsiError> {
    let code = cdb.byte(10) >> 1;
    KINDS.iter().find(|kind| kind.0 == code).ok_or(ScsiError::cdb_field(10, 7))
}

/// REPORT IDENTIFYING INFORMATION.
pub(super) fn report_information(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let allocation = length(cdb);
    let information = if cdb.byte(10) >> 1 == SUPPORTED {
        let descriptor = |kind: &Kind| {
            let [high, low] = len16(kind.2).to_bytes();
            [kind.0 << 1, 0, high, low]
        };
        KINDS.iter().flat_map(descriptor).collect()
    } else {
        let noted = context.lun.store().notes().get(kind(cdb)?.1).unwrap_or_default();
        from_hex(&noted)
    };
    let mut bytes = bytes_of(&[U16::ZERO, len16(information.len())]);
    bytes.extend(information);
    Ok(Reply::Data { bytes, allocation })
}

/// SET IDENTIFYING INFORMATION: kept beside the image.
pub(super) fn set_information(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let (Kind(code, name, most), len) = (kind(cdb)?, length(cdb));
    if len > *most {
        return Err(ScsiError::cdb_field(6, 7));
    }
    let information = context.data_out(len)?.to_vec(len);
    // Text is UTF-8 that ends with a null (SPC-5 6.43).
    let is_text = || match information.split_last() {
        Some((0, text)) => std::str::from_utf8(text).is_ok(),
        Some(_) => false,
        None => true,
    };
    if *code == 2 && !is_text() {
        return Err(ScsiError::parameter_field(0, None));
    }
    let (target, lun) = (Arc::clone(context.target), Arc::clone(context.lun));
    let nexus = Arc::clone(context.nexus);
    Ok(Reply::Job(Box::new(move |cancel| {
        if cancel.is_requested() {
            return Err(ScsiError::Aborted);
        }
        let hex: String = information.iter().map(|byte| format!("{byte:02x}")).collect();
        let noted = lun.store().notes().set(name, Some(hex.as_str()).filter(|hex| !hex.is_empty()));
        noted.map_err(|e| ScsiError::from_store(e, true, lun.block_size()))?;
        target.announce(&lun, UnitAttention::DeviceIdentifierChanged, Some(nexus.as_ref()));
        Ok(len)
    })))
}

/// Milliseconds in six bytes.
const TIME_MASK: u64 = (1 << 48) - 1;

fn host_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX) & TIME_MASK
}

/// The clock of a disk: the host's, or what an initiator has set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Milliseconds that the host's has to be put forward by.
    ahead: Option<u64>,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Timestamp {
    length: U16,
    origin: u8,
    reserved: u8,
    time: [u8; 6],
    reserved2: [u8; 2],
}

/// REPORT TIMESTAMP.
pub(super) fn report_timestamp(context: Context<'_>) -> Result<Reply, ScsiError> {
    let clock = *context.lun.clock();
    // TIMESTAMP ORIGIN: by SET TIMESTAMP, or by a way outside the standard.
    let origin = if clock.ahead.is_some() { 0b010 } else { 0b011 };
    let now = host_time().wrapping_add(clock.ahead.unwrap_or(0)) & TIME_MASK;
    let [_, _, time @ ..] = now.to_be_bytes();
    let bytes =
        bytes_of(&Timestamp { length: U16::new(10), origin, reserved: 0, time, reserved2: [0; 2] });
    Ok(Reply::Data { bytes, allocation: length(&context.request.cdb) })
}

/// SET TIMESTAMP.
pub(super) fn set_timestamp(context: Context<'_>) -> Result<Reply, ScsiError> {
    let len = length(&context.request.cdb);
    if len == 0 {
        return Ok(Reply::Good);
    }
    if len != size_of::<Timestamp>() {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    let list = context.data_out(len)?.to_vec(len);
    let time = list.iter().skip(4).take(6).fold(0, |time, byte| time << 8 | u64::from(*byte));
    *context.lun.clock() = Clock { ahead: Some(time.wrapping_sub(host_time()) & TIME_MASK) };
    let nexus = Some(context.nexus.as_ref());
    context.target.announce(context.lun, UnitAttention::TimestampChanged, nexus);
    Ok(Reply::Consumed(len))
}

/// TARGET PORT GROUP: all ports are in one, through which the disks are reached best (ACTIVE/OPTIMIZED).
pub(super) const PORT_GROUP: u16 = 1;

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Group {
    /// PREF and ASYMMETRIC ACCESS STATE.
    state: u8,
    /// AO_SUP: only that state is ever there.
    supported: u8,
    group: U16,
    reserved: u8,
    status: u8,
    vendor: u8,
    ports: u8,
}

/// REPORT TARGET PORT GROUPS.
pub(super) fn target_port_groups(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let ports: Vec<u8> =
        context.target.ports().flat_map(|port| u32::from(port.0).to_be_bytes()).collect();
    let mut contents = bytes_of(&Group {
        state: 0,
        supported: 0x01,
        group: U16::new(PORT_GROUP),
        reserved: 0,
        status: 0,
        vendor: 0,
        ports: wire::len8(ports.len() / 4),
    });
    contents.extend(ports);
    // PARAMETER DATA FORMAT: with or without a header.
    match cdb.byte(1) >> 5 {
        0 => {}
        1 => contents.splice(..0, [0x10, 0, 0, 0]).for_each(drop),
        _ => return Err(ScsiError::cdb_field(1, 7)),
    }
    let mut bytes = bytes_of(&len32(contents.len()));
    bytes.extend(contents);
    Ok(Reply::Data { bytes, allocation: length(cdb) })
}

/// READ MEDIA SERIAL NUMBER: the medium is the disk.
pub(super) fn media_serial_number(context: Context<'_>) -> Result<Reply, ScsiError> {
    Ok(Reply::Data { bytes: serial_number(context.lun), allocation: length(&context.request.cdb) })
}

/// Padded to a multiple of four.
fn serial_number(lun: &Lun) -> Vec<u8> {
    let mut serial = lun.settings().serial.clone().into_bytes();
    serial.resize(serial.len().next_multiple_of(4), b' ');
    let mut bytes = bytes_of(&len32(serial.len()));
    bytes.extend(serial);
    bytes
}
