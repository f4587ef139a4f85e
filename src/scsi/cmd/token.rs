//! POPULATE TOKEN and WRITE USING TOKEN (SBC-4 5.16, 5.57): copies by way of a token (ODX).

use std::sync::Arc;
use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::capacity::geometry;
use super::extended_copy::{IDENTIFICATION, run};
use super::{Context, Reply};
use crate::scsi::copy::rod::{
    self, ACCESS_UPON_REFERENCE, BLOCK_ZERO, Creator, DEFAULT_TIMEOUT, Keep, MAX_TIMEOUT,
    POINT_IN_TIME, POINT_IN_TIME_ANY, Rod, TOKEN_LEN, TokenBytes, Wanted,
};
use crate::scsi::copy::segment::Leave;
use crate::scsi::copy::{CopyManager, Operation, Start, Status};
use crate::scsi::fill::Fill;
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::sense::{ScsiError, asc};
use crate::scsi::wire::{Cdb, U16, U32, U64, len8, len24};
use crate::store::engine::Cancel;

/// The service actions.
pub(super) const POPULATE_TOKEN: u8 = 0x10;
pub(super) const WRITE_USING_TOKEN: u8 = 0x11;

/// MAXIMUM RANGE DESCRIPTORS.
pub(super) const MAX_RANGES: usize = 64;
/// MAXIMUM TOKEN TRANSFER SIZE, in bytes here.
pub(super) const MAX_TRANSFER: u64 = 64 << 30;
/// OPTIMAL TRANSFER COUNT, in bytes here.
pub(super) const OPTIMAL_TRANSFER: u64 = 1 << 30;

const IMMED: u8 = 0x01;
/// RTV: ROD TYPE is valid.
const RTV: u8 = 0x02;
/// DEL_TKN.
const DELETE: u8 = 0x02;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Populate {
    length: U16,
    flags: u8,
    reserved: u8,
    timeout: U32,
    rod_type: U32,
    reserved2: U16,
    ranges: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Write {
    length: U16,
    flags: u8,
    reserved: [u8; 5],
    offset: U64,
    token: [u8; TOKEN_LEN],
    reserved2: [u8; 6],
    ranges: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Range {
    lba: U64,
    blocks: U32,
    reserved: U32,
}

/// LIST IDENTIFIER and PARAMETER LIST LENGTH.
fn fields(cdb: &Cdb) -> (u32, usize) {
    let number = |at: usize| {
        u32::from_be_bytes([cdb.byte(at), cdb.byte(at + 1), cdb.byte(at + 2), cdb.byte(at + 3)])
    };
    (number(6), usize::try_from(number(10)).unwrap_or(usize::MAX))
}

fn wrong(byte: usize) -> ScsiError {
    ScsiError::parameter_field(u16::try_from(byte).unwrap_or(u16::MAX), None)
}

/// The parameter list, as much of it as can mean something.
fn list(context: &Context<'_>, len: usize) -> Result<Vec<u8>, ScsiError> {
    if context.request.data_out.len() < len {
        return Err(ScsiError::Overrun);
    }
    let most = size_of::<Write>() + (MAX_RANGES + 1) * size_of::<Range>();
    Ok(context.request.data_out.to_vec(len.min(most)))
}

/// The ranges behind a header of `at` bytes, whose length fields say how long they are.
fn ranges(
    lun: &Lun,
    rest: &[u8],
    at: usize,
    data_length: U16,
    length: U16,
) -> Result<Vec<ByteRange>, ScsiError> {
    let length = usize::from(length.get());
    if usize::from(data_length.get()) + 2 < at + length {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    if length < size_of::<Range>() {
        return Err(wrong(at - 2));
    }
    if length / size_of::<Range>() > MAX_RANGES {
        return Err(ScsiError::illegal(asc::TOO_MANY_SEGMENT_DESCRIPTORS));
    }
    // What does not make a whole descriptor at the end is ignored.
    let bytes = rest.get(..length).ok_or(ScsiError::PARAMETER_LIST_LENGTH)?;
    let mut ranges: Vec<ByteRange> = Vec::new();
    let mut total = 0u64;
    for bytes in bytes.chunks_exact(size_of::<Range>()) {
        let range = Range::ref_from_bytes(bytes).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
        let range = lun.bytes(range.lba.get(), range.blocks.get().into())?;
        // A block named twice would be in the token twice (SBC-4 5.16: not allowed).
        if ranges.iter().any(|r| r.start < range.end && range.start < r.end) {
            return Err(wrong(at));
        }
        total = total.saturating_add(range.end - range.start);
        ranges.push(range);
    }
    if total > MAX_TRANSFER {
        return Err(wrong(at - 2));
    }
    Ok(ranges)
}

/// POPULATE TOKEN.
pub(super) fn populate(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (list_id, len) = fields(&context.request.cdb);
    if len == 0 {
        return Ok(Reply::Good);
    }
    let bytes = list(&context, len)?;
    let (header, rest) =
        Populate::ref_from_prefix(&bytes).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
    let lun = Arc::clone(context.lun);
    let ranges = ranges(&lun, rest, size_of::<Populate>(), header.length, header.ranges)?;
    let timeout = match header.timeout.get() {
        0 => DEFAULT_TIMEOUT,
        seconds if seconds > MAX_TIMEOUT => return Err(wrong(4)),
        seconds => seconds,
    };
    let snapshots = lun.store().capabilities().snapshots;
    let keep = match header.rod_type.get() {
        _ if header.flags & RTV == 0 => Keep::IfPossible,
        ACCESS_UPON_REFERENCE => Keep::Not,
        POINT_IN_TIME | POINT_IN_TIME_ANY if snapshots => Keep::Surely,
        _ => return Err(wrong(8)),
    };
    let immediate = header.flags & IMMED != 0;
    let start =
        Start { list_id: Some(list_id), service_action: POPULATE_TOKEN, hold: true, immediate };
    let timeout = Duration::from_secs(timeout.into());
    let manager = Arc::clone(context.target.copies());
    let copy = manager.begin(context.nexus, &lun, Vec::new(), &start)?;
    let on = Arc::clone(&lun);
    let make = move |operation: &Operation, cancel: &Cancel| {
        let bytes = ranges.iter().map(|r| r.end - r.start).sum();
        let wanted = Wanted { creator: creator(&on), lun: Arc::clone(&on), ranges, keep, timeout };
        let mut leave = Leave::new(operation, cancel, Some(&on), None);
        let token = manager.rods().create(wanted, &mut leave)?;
        operation.update(|report| {
            report.tokens.push(token);
            report.bytes = bytes;
            report.segments = 1;
        });
        Ok(())
    };
    Ok(run(copy, lun, immediate, len, make))
}

/// WRITE USING TOKEN.
pub(super) fn write(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (list_id, len) = fields(&context.request.cdb);
    if len == 0 {
        return Ok(Reply::Good);
    }
    let bytes = list(&context, len)?;
    let (header, rest) =
        Write::ref_from_prefix(&bytes).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
    let lun = Arc::clone(context.lun);
    let ranges = ranges(&lun, rest, size_of::<Write>(), header.length, header.ranges)?;
    let manager = Arc::clone(context.target.copies());
    let data = find(&manager, &header.token)?;
    let offset = header.offset.get().saturating_mul(lun.block_size().into());
    if let Data::Rod(rod) = &data
        && offset >= rod.len()
    {
        return Err(wrong(8));
    }
    let immediate = header.flags & IMMED != 0;
    let delete = header.flags & DELETE != 0;
    let start =
        Start { list_id: Some(list_id), service_action: WRITE_USING_TOKEN, hold: true, immediate };
    let source = data.source()?.map(|source| source.index());
    let copy = manager.begin(context.nexus, &lun, source.into_iter().collect(), &start)?;
    let on = Arc::clone(&lun);
    let write = move |operation: &Operation, cancel: &Cancel| {
        let result = data.write(operation, &on, &ranges, offset, cancel);
        on.settle(on.durability(false))?;
        if let (Ok(()), true, Data::Rod(rod)) = (&result, delete, &data) {
            manager.rods().delete(rod);
        }
        result
    };
    Ok(run(copy, lun, immediate, len, write))
}

/// What a token stands for.
enum Data {
    Zeroes,
    Rod(Arc<Rod>),
}

fn find(manager: &CopyManager, token: &TokenBytes) -> Result<Data, ScsiError> {
    let [_, _, _, _, _, _, high, low, ..] = *token;
    match rod::token_type(token) {
        BLOCK_ZERO | ACCESS_UPON_REFERENCE | POINT_IN_TIME if [high, low] != [0x01, 0xf8] => {
            Err(ScsiError::illegal(asc::INVALID_TOKEN_LENGTH))
        }
        BLOCK_ZERO => Ok(Data::Zeroes),
        ACCESS_UPON_REFERENCE | POINT_IN_TIME => Ok(Data::Rod(manager.rods().find(token)?)),
        _ => Err(ScsiError::illegal(asc::UNSUPPORTED_TOKEN_TYPE)),
    }
}

impl Data {
    /// The disk that it is of, if it is of one.
    fn source(&self) -> Result<Option<Arc<Lun>>, ScsiError> {
        match self {
            Data::Zeroes => Ok(None),
            Data::Rod(rod) => rod.source().map(Some),
        }
    }

    /// Writes to ranges of a disk, in their order, as far as the data goes.
    fn write(
        &self,
        operation: &Operation,
        to: &Lun,
        ranges: &[ByteRange],
        offset: u64,
        cancel: &Cancel,
    ) -> Result<(), ScsiError> {
        let source = self.source()?;
        let mut at = offset;
        for range in ranges {
            let wanted = range.end - range.start;
            // A token does not outlive the right to read its disk, whether or not it has its bytes from there.
            let mut leave = Leave::new(operation, cancel, source.as_deref(), Some(to));
            match (self, &source) {
                (Data::Rod(rod), Some(source)) => {
                    let len = wanted.min(rod.len().saturating_sub(at));
                    let mut go_on = |done| leave.step(done);
                    let copied = rod.copy_to(source, at, len, to, range.start, &mut go_on);
                    if let Err(error) = copied {
                        leave.end(error.done);
                        return Err(leave.why(&error, to));
                    }
                    leave.end(len);
                    at += len;
                    if len < wanted {
                        operation.update(|report| report.status = Status::Residual);
                        return Ok(());
                    }
                }
                _ => {
                    let fill = if to.is_thin() { Fill::Deallocated } else { Fill::Anchored };
                    fill.run(to, range.clone(), |done| {
                        leave.end(done);
                        leave.look()
                    })?;
                    leave.end(wanted);
                }
            }
            operation.update(|report| report.segments = report.segments.saturating_add(1));
        }
        Ok(())
    }
}

/// An identification CSCD descriptor.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Descriptor {
    kind: u8,
    device: u8,
    relative_port: U16,
    code_set: u8,
    designator_type: u8,
    reserved: u8,
    length: u8,
    designator: [u8; 20],
    flags: u8,
    block_length: [u8; 3],
}

fn creator(lun: &Lun) -> Creator {
    let naa = &lun.settings().naa;
    let mut designator = [0; 20];
    designator.iter_mut().zip(naa).for_each(|(to, from)| *to = *from);
    let mut descriptor = [0; 32];
    let named = Descriptor {
        kind: IDENTIFICATION,
        device: 0,
        relative_port: U16::ZERO,
        code_set: 1,
        designator_type: 3,
        reserved: 0,
        length: len8(naa.len()),
        designator,
        flags: 0,
        block_length: len24(lun.block_size()),
    };
    descriptor.iter_mut().zip(named.as_bytes()).for_each(|(to, from)| *to = *from);
    Creator { descriptor, geometry: geometry(lun) }
}
