//! UNMAP (SBC-4 5.34).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::fill::Fill;
use crate::scsi::lun::{ByteRange, Lun};
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{U16, U32, U64};
use crate::store::Store;
use crate::store::engine::{Cancel, Need};

/// MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT.
pub(super) const MAX_DESCRIPTORS: u32 = 256;

/// MAXIMUM UNMAP LBA COUNT: no limit but the field's.
pub(super) const MAX_BLOCKS: u32 = u32::MAX;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    data_length: U16,
    descriptors_length: U16,
    reserved: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Descriptor {
    lba: U64,
    blocks: U32,
    reserved: U32,
}

/// UNMAP. Every descriptor is checked before any takes effect.
pub(super) fn unmap(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let anchor = cdb.byte(1) & 1 != 0;
    let len = usize::from(u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]));
    if len == 0 {
        return Ok(Reply::Good);
    }
    // What can be right is no longer than this.
    let most = size_of::<Header>() + (MAX_DESCRIPTORS as usize + 1) * size_of::<Descriptor>();
    let ranges = parse(context.lun, &context.data_out(len)?.to_vec(len.min(most)), len)?;
    let fill = if anchor { Fill::Anchored } else { Fill::Deallocated };
    Ok(job(context.lun, ranges, fill, len))
}

/// The ranges of a parameter list of `len` bytes, of which `list` is the beginning.
fn parse(lun: &Lun, list: &[u8], len: usize) -> Result<Vec<ByteRange>, ScsiError> {
    let (header, rest) =
        Header::ref_from_prefix(list).map_err(|_| ScsiError::PARAMETER_LIST_LENGTH)?;
    let length = usize::from(header.descriptors_length.get());
    if size_of::<Header>() + length > len {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    let descriptors = rest.get(..length).unwrap_or(rest);
    // What does not make a whole descriptor at the end is ignored.
    let mut ranges = Vec::new();
    let mut total = 0u64;
    for (n, bytes) in (0u32..).zip(descriptors.chunks_exact(size_of::<Descriptor>())) {
        let too_many = || ScsiError::parameter_field(2, None);
        if n >= MAX_DESCRIPTORS {
            return Err(too_many());
        }
        let descriptor = Descriptor::ref_from_bytes(bytes).map_err(|_| too_many())?;
        total += u64::from(descriptor.blocks.get());
        if total > MAX_BLOCKS.into() {
            return Err(too_many());
        }
        ranges.push(lun.bytes(descriptor.lba.get(), descriptor.blocks.get().into())?);
    }
    Ok(ranges)
}

/// The work of filling ranges, after which `transferred` bytes of data-out were used.
pub(super) fn job(lun: &Arc<Lun>, ranges: Vec<ByteRange>, fill: Fill, transferred: usize) -> Reply {
    let (lun, need) = (Arc::clone(lun), Need::Together(ranges.clone()));
    let job = move |cancel: &Cancel, store: &dyn Store| {
        for range in ranges {
            fill.run_on(store, &lun, range, |_| match cancel.is_requested() {
                true => Err(ScsiError::Aborted),
                false => Ok(()),
            })?;
        }
        lun.settle(lun.durability(false))?;
        Ok(transferred)
    };
    Reply::Needy(need, Box::new(job))
}
