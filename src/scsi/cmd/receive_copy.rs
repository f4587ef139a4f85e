//! RECEIVE COPY STATUS, DATA, FAILURE DETAILS, OPERATING PARAMETERS and ROD TOKEN INFORMATION, and REPORT ALL
//! ROD TOKENS (SPC-5 6.20 ff).

use std::sync::Arc;

use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::extended_copy::{
    BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION, MAX_CSCDS, MAX_DESCRIPTORS,
    MAX_SEGMENTS, VERIFY_CSCD,
};
use super::token::{POPULATE_TOKEN, WRITE_USING_TOKEN};
use super::{Context, Reply};
use crate::scsi::copy::{Operation, Status};
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{Cdb, U16, U32, U64, bytes_of, len8, len16, len32};

/// Granularity of segments: a byte can be copied.
pub(super) const DATA_SEGMENT_GRANULARITY: u8 = 0;

/// TRANSFER COUNT UNITS.
const BYTES: u8 = 0x00;
const LOGICAL_BLOCKS: u8 = 0xf1;

/// Milliseconds after which it is worth while to ask again.
const UPDATE_DELAY: u32 = 100;

fn allocation(cdb: &Cdb) -> usize {
    let bytes = [cdb.byte(10), cdb.byte(11), cdb.byte(12), cdb.byte(13)];
    usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
}

/// AVAILABLE DATA in front of what it counts.
fn available(data: Vec<u8>) -> Vec<u8> {
    let mut bytes = len32(data.len()).to_bytes().to_vec();
    bytes.extend(data);
    bytes
}

fn reply(context: &Context<'_>, bytes: Vec<u8>) -> Result<Reply, ScsiError> {
    Ok(Reply::Data { bytes, allocation: allocation(&context.request.cdb) })
}

/// The copy that a command with a short list identifier asks about.
fn find_lid1(context: &Context<'_>) -> Result<Arc<Operation>, ScsiError> {
    let list_id = context.request.cdb.byte(2).into();
    context.target.copies().find(context.nexus, context.lun, list_id, 2)
}

/// The same with a long one.
fn find_lid4(context: &Context<'_>) -> Result<Arc<Operation>, ScsiError> {
    let cdb = &context.request.cdb;
    let list_id = u32::from_be_bytes([cdb.byte(2), cdb.byte(3), cdb.byte(4), cdb.byte(5)]);
    context.target.copies().find(context.nexus, context.lun, list_id, 2)
}

/// A copy that is done is forgotten once that was told; one that failed has details to ask for.
fn told(context: &Context<'_>, operation: &Arc<Operation>, bytes: &[u8]) {
    let done = matches!(operation.report().status, Status::Done | Status::Terminated);
    if done && allocation(&context.request.cdb) >= bytes.len() {
        context.target.copies().forget(operation);
    }
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct StatusLid1 {
    /// HDD, COPY MANAGER STATUS.
    status: u8,
    segments: U16,
    units: u8,
    count: U32,
}

/// RECEIVE COPY STATUS(LID1).
pub(super) fn status_lid1(context: Context<'_>) -> Result<Reply, ScsiError> {
    let operation = find_lid1(&context)?;
    let report = operation.report();
    // The count has 32 bits: it is given in the smallest unit that fits.
    let unit = (0..3).find(|n| report.bytes >> (10 * n) <= u64::from(u32::MAX)).unwrap_or(3);
    let bytes = available(bytes_of(&StatusLid1 {
        status: match report.status {
            Status::Foreground | Status::Background => 0,
            Status::Done | Status::Residual => 1,
            Status::Failed | Status::Terminated => 2,
        },
        segments: U16::new(report.segments),
        units: unit,
        count: U32::new(u32::try_from(report.bytes >> (10 * unit)).unwrap_or(u32::MAX)),
    }));
    told(&context, &operation, &bytes);
    reply(&context, bytes)
}

/// RECEIVE COPY DATA(LID1, LID4): no segment descriptor that we know holds data.
pub(super) fn data_lid1(context: Context<'_>) -> Result<Reply, ScsiError> {
    find_lid1(&context)?;
    reply(&context, available(Vec::new()))
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct OperatingParameters {
    /// SNLID.
    snlid: u8,
    reserved: [u8; 3],
    max_cscds: U16,
    max_segments: U16,
    max_descriptors: U32,
    max_segment_length: U32,
    max_inline: U32,
    held_data_limit: U32,
    max_stream_transfer: U32,
    reserved2: U16,
    total_copies: U16,
    max_copies: u8,
    segment_granularity: u8,
    inline_granularity: u8,
    held_data_granularity: u8,
    reserved3: [u8; 3],
    descriptors_length: u8,
    descriptors: [u8; 4],
}

/// RECEIVE COPY OPERATING PARAMETERS.
pub(super) fn operating_parameters(context: Context<'_>) -> Result<Reply, ScsiError> {
    let copies = context.target.copies().max_copies();
    let bytes = available(bytes_of(&OperatingParameters {
        snlid: 1,
        reserved: [0; 3],
        max_cscds: len16(MAX_CSCDS),
        max_segments: len16(MAX_SEGMENTS),
        max_descriptors: len32(MAX_DESCRIPTORS),
        // No limit but the descriptors' own.
        max_segment_length: U32::ZERO,
        max_inline: U32::ZERO,
        held_data_limit: U32::ZERO,
        max_stream_transfer: U32::ZERO,
        reserved2: U16::ZERO,
        total_copies: len16(copies),
        max_copies: len8(copies),
        segment_granularity: DATA_SEGMENT_GRANULARITY,
        inline_granularity: 0,
        held_data_granularity: 0,
        reserved3: [0; 3],
        descriptors_length: 4,
        descriptors: [BLOCK_TO_BLOCK, VERIFY_CSCD, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION],
    }));
    reply(&context, bytes)
}

/// RECEIVE COPY FAILURE DETAILS(LID1): the sense data of the segment that failed.
pub(super) fn failure_details(context: Context<'_>) -> Result<Reply, ScsiError> {
    let operation = find_lid1(&context)?;
    let Some(sense) = operation.report().sense else {
        // Nothing failed.
        return reply(&context, available(Vec::new()));
    };
    let sense = sense.encode(context.lun.pages().descriptor_sense());
    // EXTENDED COPY COMMAND STATUS: CHECK CONDITION.
    let mut details = vec![0; 52];
    details.extend([0x02, 0]);
    details.extend(len16(sense.len()).to_bytes());
    details.extend(sense);
    reply(&context, available(details))
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct StatusLid4 {
    service_action: u8,
    /// HDD, COPY OPERATION STATUS.
    status: u8,
    operation_counter: U16,
    update_delay: U32,
    completion_status: u8,
    sense_field_length: u8,
    sense_length: u8,
    units: u8,
    count: U64,
    segments: U16,
    reserved: [u8; 6],
}

fn status_of(operation: &Operation, units: u8, descriptor_sense: bool) -> Vec<u8> {
    let report = operation.report();
    let sense = report.sense.map(|s| s.encode(descriptor_sense)).unwrap_or_default();
    let sense_length = u8::try_from(sense.len()).unwrap_or(u8::MAX);
    let running = matches!(report.status, Status::Foreground | Status::Background);
    let unit = if units == BYTES { 1 } else { u64::from(operation.block_size.max(1)) };
    let mut bytes = bytes_of(&StatusLid4 {
        service_action: operation.service_action,
        status: report.status as u8,
        operation_counter: U16::ZERO,
        update_delay: U32::new(if running { UPDATE_DELAY } else { u32::MAX - 1 }),
        completion_status: if sense.is_empty() { 0 } else { 0x02 },
        sense_field_length: sense_length,
        sense_length,
        units,
        count: U64::new(report.bytes / unit),
        segments: U16::new(report.segments),
        reserved: [0; 6],
    });
    bytes.extend(sense);
    bytes
}

/// RECEIVE COPY STATUS(LID4).
pub(super) fn status_lid4(context: Context<'_>) -> Result<Reply, ScsiError> {
    let operation = find_lid4(&context)?;
    let bytes = available(status_of(&operation, BYTES, context.lun.pages().descriptor_sense()));
    told(&context, &operation, &bytes);
    reply(&context, bytes)
}

/// RECEIVE COPY DATA(LID4).
pub(super) fn data_lid4(context: Context<'_>) -> Result<Reply, ScsiError> {
    let operation = find_lid4(&context)?;
    let mut bytes = status_of(&operation, BYTES, context.lun.pages().descriptor_sense());
    // HELD DATA LENGTH.
    bytes.extend([0; 4]);
    reply(&context, available(bytes))
}

/// RECEIVE ROD TOKEN INFORMATION: what became of POPULATE TOKEN or WRITE USING TOKEN, and the token.
pub(super) fn token_information(context: Context<'_>) -> Result<Reply, ScsiError> {
    let operation = find_lid4(&context)?;
    if ![POPULATE_TOKEN, WRITE_USING_TOKEN].contains(&operation.service_action) {
        return Err(ScsiError::cdb_field(2, 7));
    }
    let descriptor_sense = context.lun.pages().descriptor_sense();
    let mut bytes = status_of(&operation, LOGICAL_BLOCKS, descriptor_sense);
    let tokens: Vec<u8> = operation
        .report()
        .tokens
        .iter()
        .flat_map(|token| [0, 0].into_iter().chain(*token))
        .collect();
    bytes.extend(len32(tokens.len()).to_bytes());
    bytes.extend(tokens);
    reply(&context, available(bytes))
}

/// REPORT ALL ROD TOKENS: those that there are, without what it takes to use them.
pub(super) fn all_tokens(context: Context<'_>) -> Result<Reply, ScsiError> {
    let mut bytes = vec![0; 4];
    bytes.extend(context.target.copies().rods().list().concat());
    reply(&context, available(bytes))
}
