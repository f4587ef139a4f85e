//! READ and WRITE (6, 10, 12, 16, 32), and the CDB shapes that all block commands share (SBC-4 5.15 ff).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply};
use crate::scsi::fill::Fill;
use crate::scsi::lun::{BlockRange, DetectZeroes, Lun};
use crate::scsi::sense::ScsiError;
use crate::scsi::statistics::Activity;
use crate::scsi::wire::{Cdb, U16, U32, U64};
use crate::store::engine::{Cancel, Need};
use crate::store::{Buffers, Durability, Operation, Store};

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb6 {
    opcode: u8,
    lba_high: u8,
    lba_low: U16,
    blocks: u8,
    control: u8,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb10 {
    opcode: u8,
    flags: u8,
    lba: U32,
    group: u8,
    blocks: U16,
    control: u8,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb12 {
    opcode: u8,
    flags: u8,
    lba: U32,
    blocks: U32,
    group: u8,
    control: u8,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb16 {
    opcode: u8,
    flags: u8,
    lba: U64,
    blocks: U32,
    group: u8,
    control: u8,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Cdb32 {
    opcode: u8,
    control: u8,
    reserved: [u8; 4],
    group: u8,
    additional_length: u8,
    service_action: U16,
    flags: u8,
    reserved2: u8,
    lba: U64,
    /// Expected tags: there is no protection information to hold them against.
    tags: [u8; 8],
    blocks: U32,
}

/// What every block command's CDB says, whatever its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockCdb {
    pub lba: u64,
    pub blocks: u64,
    pub flags: u8,
    /// Which byte the flags are, for field pointers.
    pub flags_byte: u16,
}

impl BlockCdb {
    /// Reads the shape that the group code of the opcode stands for (SPC-5 4.2.5.1).
    pub(super) fn parse(cdb: &Cdb) -> Result<Self, ScsiError> {
        let (flags_byte, (lba, blocks, flags)) = match cdb.opcode() >> 5 {
            0 => {
                let c: &Cdb6 = cdb.view()?;
                let lba = u64::from(c.lba_high & 0x1f) << 16 | u64::from(c.lba_low);
                // Zero means 256 blocks, in the six-byte commands only.
                let blocks = if c.blocks == 0 { 256 } else { u64::from(c.blocks) };
                (1, (lba, blocks, 0))
            }
            1 | 2 => {
                let c: &Cdb10 = cdb.view()?;
                (1, (c.lba.into(), c.blocks.into(), c.flags))
            }
            3 => {
                let c: &Cdb32 = cdb.view()?;
                (10, (c.lba.into(), c.blocks.into(), c.flags))
            }
            5 => {
                let c: &Cdb12 = cdb.view()?;
                (1, (c.lba.into(), c.blocks.into(), c.flags))
            }
            _ => {
                let c: &Cdb16 = cdb.view()?;
                (1, (c.lba.into(), c.blocks.into(), c.flags))
            }
        };
        Ok(BlockCdb { lba, blocks, flags, flags_byte })
    }

    /// Force unit access. DPO, the bit above it, is a hint about caching that we have no use for.
    pub(super) fn fua(self) -> bool {
        self.flags & 0x08 != 0
    }

    /// BYTCHK of the VERIFY and WRITE AND VERIFY commands.
    pub(super) fn bytchk(self) -> u8 {
        (self.flags >> 1) & 3
    }
}

/// The command's range, checked.
pub(super) fn range_of(context: &Context<'_>) -> Result<(BlockCdb, BlockRange), ScsiError> {
    let cdb = BlockCdb::parse(&context.request.cdb)?;
    Ok((cdb, context.lun.range(cdb.lba, cdb.blocks)?))
}

/// READ. With FUA the data is made stable first and then read from the medium (SBC-4 4.15).
pub(super) fn read(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (cdb, range) = range_of(&context)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    if context.request.data_in.len() < range.bytes {
        return Err(ScsiError::Overrun);
    }
    let into = exactly(std::mem::take(&mut context.request.data_in), range.bytes);
    let read = Operation::Read { offset: range.offset, into, medium: cdb.fua() };
    Ok(Reply::Transfer(read, range.bytes))
}

/// WRITE.
pub(super) fn write(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (cdb, range) = range_of(&context)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    if context.request.data_out.len() < range.bytes {
        return Err(ScsiError::Overrun);
    }
    let durability = context.lun.durability(cdb.fua());
    let from = exactly(std::mem::take(&mut context.request.data_out), range.bytes);
    let zeroes = match context.lun.settings().detect_zeroes {
        DetectZeroes::Unmap if context.lun.is_thin() => Some(Fill::Deallocated),
        DetectZeroes::On | DetectZeroes::Unmap => Some(Fill::Anchored),
        DetectZeroes::Off => None,
    };
    if let Some(fill) = zeroes {
        return Ok(write_unless_zero(context.lun, range, from, durability, fill));
    }
    let write = Operation::Write { offset: range.offset, from, durability };
    Ok(Reply::Transfer(write, range.bytes))
}

/// `detect-zeroes=`: a write of nothing but zeroes becomes `fill`, every other one is written.
fn write_unless_zero(
    lun: &Arc<Lun>,
    range: BlockRange,
    from: Buffers,
    durability: Durability,
    fill: Fill,
) -> Reply {
    let lun = Arc::clone(lun);
    let job = move |cancel: &Cancel, store: &dyn Store| {
        if cancel.is_requested() {
            return Err(ScsiError::Aborted);
        }
        let done = if from.is_zero() {
            fill.run_on(store, &lun, range.in_store(), |_| Ok(()))
                .and_then(|()| lun.settle(durability))
        } else {
            let written = store.write(range.offset, &from, durability);
            written
                .map_err(|e| ScsiError::from_store(e, true, lun.block_size()))
                .and_then(|()| lun.settle_written(durability))
        };
        lun.account(Activity::Write, range.bytes, &done);
        done.map(|()| range.bytes)
    };
    Reply::Needy(Need::Together(vec![range.in_store()]), Box::new(job))
}

/// The first `len` bytes of a list that has at least as many; the list itself where it fits.
fn exactly(list: Buffers, len: usize) -> Buffers {
    if list.len() == len { list } else { list.slice(0, len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_parses() {
        let parse = |bytes: &[u8]| BlockCdb::parse(&Cdb::new(bytes)).unwrap();
        let c = parse(&[0x08, 0x1f, 0xff, 0xfe, 0, 0]);
        assert_eq!((c.lba, c.blocks, c.fua()), (0x1f_fffe, 256, false));
        let c = parse(&[0x28, 0x08, 1, 2, 3, 4, 0, 5, 6, 0]);
        assert_eq!((c.lba, c.blocks, c.fua()), (0x0102_0304, 0x0506, true));
        let c = parse(&[0xaf, 0x06, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
        assert_eq!((c.lba, c.blocks, c.bytchk()), (0x0102_0304, 0x0506_0708, 3));
        let c = parse(&[0x8f, 0x02, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]);
        assert_eq!((c.lba, c.blocks, c.bytchk()), (0x0102_0304_0506_0708, 0x090a_0b0c, 1));
    }
}
