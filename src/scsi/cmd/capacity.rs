//! READ CAPACITY(10) and (16) (SBC-4 5.20, 5.21). LOGICAL BLOCK ADDRESS and PMI are obsolete: the
//! table leaves them out, so that they must be zero.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::lun::Lun;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{U16, U32, U64, bytes_of};

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Capacity10 {
    last_lba: U32,
    block_size: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReadCapacity16 {
    opcode: u8,
    service_action: u8,
    obsolete_lba: U64,
    allocation: U32,
    obsolete_pmi: u8,
    control: u8,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Capacity16 {
    last_lba: U64,
    block_size: U32,
    protection: u8,
    physical_exponent: u8,
    /// LBPME 8000h, LBPRZ 4000h, LOWEST ALIGNED LOGICAL BLOCK ADDRESS below.
    provisioning: U16,
    reserved: [u8; 16],
}

/// Logical block provisioning management is enabled.
const LBPME: u16 = 0x8000;
/// Unmapped blocks read as zeroes.
const LBPRZ: u16 = 0x4000;

/// READ CAPACITY(10).
pub(super) fn read_capacity_10(context: Context<'_>) -> Result<Reply, ScsiError> {
    let last = context.lun.blocks().saturating_sub(1);
    let data = Capacity10 {
        // FFFFFFFFh sends the initiator to READ CAPACITY(16).
        last_lba: U32::new(u32::try_from(last).unwrap_or(u32::MAX)),
        block_size: U32::new(context.lun.block_size()),
    };
    Ok(Reply::Data { bytes: bytes_of(&data), allocation: size_of::<Capacity10>() })
}

/// Bytes 8 to 15 of the READ CAPACITY(16) data: blocks, and how they are provisioned.
pub(super) fn geometry(lun: &Lun) -> [u8; 8] {
    let [a, b, c, d] = lun.block_size().to_be_bytes();
    let [e, f] = provisioning(lun).to_be_bytes();
    [a, b, c, d, 0, lun.physical_exponent(), e, f]
}

fn provisioning(lun: &Lun) -> u16 {
    if lun.is_thin() { LBPME | LBPRZ } else { 0 }
}

/// READ CAPACITY(16).
pub(super) fn read_capacity_16(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &ReadCapacity16 = context.request.cdb.view()?;
    let data = Capacity16 {
        last_lba: U64::new(context.lun.blocks().saturating_sub(1)),
        block_size: U32::new(context.lun.block_size()),
        protection: 0,
        physical_exponent: context.lun.physical_exponent(),
        provisioning: U16::new(provisioning(context.lun)),
        reserved: [0; 16],
    };
    let allocation = wire::allocation(cdb.allocation.get());
    Ok(Reply::Data { bytes: bytes_of(&data), allocation })
}
