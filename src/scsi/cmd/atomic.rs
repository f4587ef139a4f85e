//! Commands whose steps nobody else gets between: COMPARE AND WRITE, ORWRITE, WRITE ATOMIC (SBC-4 5.3, 5.14, 5.48).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::rw::range_of;
use super::verify::first_difference;
use super::{Context, Reply};
use crate::scsi::lun::{BlockRange, Lun};
use crate::scsi::sense::{ScsiError, asc};
use crate::scsi::statistics::Activity;
use crate::scsi::wire::{U16, U64};
use crate::store::engine::{Cancel, Need};
use crate::store::{Buffers, Durability, Piece, Store};

/// MAXIMUM COMPARE AND WRITE LENGTH: what its field of the CDB can say.
pub(super) const MAX_COMPARE_AND_WRITE: u8 = 255;

/// Memory that one of them uses, in bytes.
const CHUNK: usize = 256 << 10;

/// A range that is worked on alone.
struct Alone<'a> {
    lun: &'a Lun,
    store: &'a dyn Store,
    cancel: &'a Cancel,
}

impl Alone<'_> {
    fn go_on(&self) -> Result<(), ScsiError> {
        if self.cancel.is_requested() { Err(ScsiError::Aborted) } else { Ok(()) }
    }

    /// Reads a range piece by piece: `step` gets each, and where in the range it begins.
    fn read(
        &self,
        range: &BlockRange,
        mut step: impl FnMut(&Buffers, usize) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        let room = Piece::of(CHUNK.min(range.bytes)).ok_or(ScsiError::Busy)?;
        for at in (0..range.bytes).step_by(room.len().max(1)) {
            self.go_on()?;
            let piece = room.slice(0, range.bytes - at);
            let read = self.store.read(range.offset + at as u64, &piece);
            read.map_err(|e| ScsiError::from_store(e, false, self.lun.block_size()))?;
            step(&piece, at)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), ScsiError> {
        let written = self.store.write(offset, from, durability);
        written.map_err(|e| ScsiError::from_store(e, true, self.lun.block_size()))
    }
}

/// A job that works on a range alone, and uses that many bytes of the data buffers.
fn job(
    context: &Context<'_>,
    range: BlockRange,
    used: usize,
    work: impl FnOnce(&Alone<'_>) -> Result<(), ScsiError> + Send + 'static,
) -> Reply {
    let lun = Arc::clone(context.lun);
    let job = move |cancel: &Cancel, store: &dyn Store| {
        let done = work(&Alone { lun: &lun, store, cancel });
        lun.account(Activity::Write, range.bytes, &done);
        done.map(|()| used)
    };
    Reply::Needy(Need::Alone(range.in_store()), Box::new(job))
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CompareAndWrite {
    opcode: u8,
    flags: u8,
    lba: U64,
    reserved: [u8; 3],
    blocks: u8,
    group: u8,
    control: u8,
}

const FUA: u8 = 0x08;

/// COMPARE AND WRITE: the first half of data-out is what must be there for the second half to be written.
pub(super) fn compare_and_write(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &CompareAndWrite = context.request.cdb.view()?;
    let (fua, blocks) = (cdb.flags & FUA != 0, cdb.blocks);
    let range = context.lun.range(cdb.lba.get(), blocks.into())?;
    let data = context.data_out(2 * range.bytes)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    let durability = context.lun.durability(fua);
    Ok(job(&context, range, 2 * range.bytes, move |alone| {
        let (expected, new) = data.split(range.bytes);
        alone.read(&range, |found, at| {
            let want = |more, into: &mut [u8]| expected.read_at(at + more, into);
            match first_difference(found, want) {
                Some(more) => Err(ScsiError::miscompare((at + more) as u64)),
                None => Ok(()),
            }
        })?;
        alone.go_on()?;
        alone.write(range.offset, &new, durability)?;
        alone.lun.settle_written(durability)
    }))
}

/// Sets the bits in `found` that are set in `new` from `at` on.
fn set_bits(found: &Buffers, new: &Buffers, at: usize) {
    let (mut old, mut set) = ([0; 4096], [0; 4096]);
    let mut done = 0;
    while done < found.len() {
        let len = found.read_at(done, &mut old);
        new.read_at(at + done, &mut set);
        old.iter_mut().zip(set).for_each(|(old, set)| *old |= set);
        found.write_at(done, old.get(..len).unwrap_or_default());
        done += len.max(1);
    }
}

/// ORWRITE(16): bits are set, none is cleared.
pub(super) fn or_write(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (cdb, range) = range_of(&context)?;
    let data = context.data_out(range.bytes)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    let durability = context.lun.durability(cdb.fua());
    Ok(job(&context, range, range.bytes, move |alone| {
        alone.read(&range, |found, at| {
            set_bits(found, &data, at);
            alone.write(range.offset + at as u64, found, Durability::Cached)
        })?;
        alone.lun.settle(durability)
    }))
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WriteAtomic {
    opcode: u8,
    flags: u8,
    lba: U64,
    boundary: U16,
    blocks: U16,
    group: u8,
    control: u8,
}

/// MAXIMUM ATOMIC TRANSFER LENGTH in blocks; 0 where there are no atomic writes.
pub(super) fn max_atomic_blocks(lun: &Lun) -> u32 {
    let blocks = lun.store().capabilities().whole_writes / lun.block_size() as usize;
    u32::try_from(blocks).unwrap_or(0)
}

/// WRITE ATOMIC(16): all of it or nothing, for whoever looks meanwhile and after a crash of the host. It reaches the
/// medium whatever FUA says. There is one atomic operation to a command: the boundary must be zero.
pub(super) fn write_atomic(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &WriteAtomic = context.request.cdb.view()?;
    let (lba, blocks) = (cdb.lba.get(), cdb.blocks.get());
    if cdb.boundary.get() != 0 {
        return Err(ScsiError::cdb_field(10, 7));
    }
    let range = context.lun.range(lba, blocks.into())?;
    if u32::from(blocks) > max_atomic_blocks(context.lun) {
        return Err(ScsiError::illegal(asc::INVALID_FIELD_IN_CDB));
    }
    let data = context.data_out(range.bytes)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    Ok(job(&context, range, range.bytes, move |alone| {
        alone.go_on()?;
        let written = alone.store.write_whole(range.offset, &data);
        written.map_err(|e| ScsiError::from_store(e, true, alone.lun.block_size()))
    }))
}
