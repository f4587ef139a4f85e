//! MODE SENSE and MODE SELECT (6, 10) (SPC-5 6.14 ff).

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::UnitAttention;
use crate::scsi::lun::Lun;
use crate::scsi::mode_pages::PageControl;
use crate::scsi::provisioning::SpaceWatch;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{Cdb, U16, U24, U32, U64, bytes_of, len8, len16};

/// Longest MODE SELECT parameter list we look at: more than all pages and headers together.
const MAX_PARAMETER_LIST: usize = 1024;

/// DEVICE-SPECIFIC PARAMETER: write protected.
const WP: u8 = 0x80;
/// DEVICE-SPECIFIC PARAMETER: DPO and FUA are honoured.
const DPOFUA: u8 = 0x10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header6 {
    mode_data_length: u8,
    medium_type: u8,
    device_specific: u8,
    block_descriptor_length: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header10 {
    mode_data_length: U16,
    medium_type: u8,
    device_specific: u8,
    /// Bit 0: LONGLBA.
    long_lba: u8,
    reserved: u8,
    block_descriptor_length: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ShortBlockDescriptor {
    blocks: U32,
    reserved: u8,
    block_size: U24,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LongBlockDescriptor {
    blocks: U64,
    reserved: U32,
    block_size: U32,
}

fn is_ten_byte(cdb: &Cdb) -> bool {
    cdb.opcode() >= 0x20
}

/// Allocation or parameter list length of the six- and ten-byte forms.
fn cdb_length(cdb: &Cdb) -> usize {
    match is_ten_byte(cdb) {
        true => u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]).into(),
        false => cdb.byte(4).into(),
    }
}

/// MODE SENSE.
pub(super) fn mode_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (lun, cdb) = (context.lun, &context.request.cdb);
    let ten = is_ten_byte(cdb);
    let (dbd, long) = (cdb.byte(1) & 0x08 != 0, cdb.byte(1) & 0x10 != 0);
    let control = PageControl::parse(cdb.byte(2), lun.pages().saves())?;
    let mut pages = lun.pages().sense(cdb.byte(2) & 0x3f, cdb.byte(3), control)?;
    let mut descriptor = match (dbd, long) {
        (true, _) => Vec::new(),
        (false, true) => long_descriptor(lun),
        (false, false) => short_descriptor(lun),
    };
    let protected = if lun.is_write_protected() { WP } else { 0 };
    let device_specific = DPOFUA | protected;
    let rest = descriptor.len() + pages.len();
    let mut bytes = if ten {
        bytes_of(&Header10 {
            mode_data_length: len16(rest + 6),
            medium_type: 0,
            device_specific,
            long_lba: u8::from(long && !dbd),
            reserved: 0,
            block_descriptor_length: len16(descriptor.len()),
        })
    } else {
        bytes_of(&Header6 {
            mode_data_length: len8(rest + 3),
            medium_type: 0,
            device_specific,
            block_descriptor_length: len8(descriptor.len()),
        })
    };
    bytes.append(&mut descriptor);
    bytes.append(&mut pages);
    Ok(Reply::Data { bytes, allocation: cdb_length(cdb) })
}

fn short_descriptor(lun: &Lun) -> Vec<u8> {
    bytes_of(&ShortBlockDescriptor {
        blocks: U32::new(u32::try_from(lun.blocks()).unwrap_or(u32::MAX)),
        reserved: 0,
        block_size: wire::len24(lun.block_size()),
    })
}

fn long_descriptor(lun: &Lun) -> Vec<u8> {
    bytes_of(&LongBlockDescriptor {
        blocks: U64::new(lun.blocks()),
        reserved: U32::ZERO,
        block_size: U32::new(lun.block_size()),
    })
}

/// MODE SELECT. SP only where there is a place to save pages in. PF must be one: the list holds pages.
pub(super) fn mode_select(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let save = cdb.byte(1) & 0x01 != 0;
    if save && !context.lun.pages().saves() {
        return Err(ScsiError::cdb_field(1, 0));
    }
    let len = cdb_length(cdb);
    if len == 0 && !save {
        return Ok(Reply::Good);
    }
    if len > 0 && cdb.byte(1) & 0x10 == 0 {
        return Err(ScsiError::cdb_field(1, 4));
    }
    let list = context.data_out(len)?.to_vec(len.min(MAX_PARAMETER_LIST));
    if list.len() < len {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    if list.is_empty() {
        return Ok(apply(context.lun, false, save, 0));
    }
    let pages_at = check_header(context.lun, &list, is_ten_byte(cdb))?;
    let lun = context.lun;
    let cached = lun.pages().write_cache();
    if lun.pages().select(&list, pages_at)? {
        lun.space_watch().into_iter().for_each(SpaceWatch::rearm);
        context.target.announce(lun, UnitAttention::ModeParametersChanged, Some(context.nexus));
    }
    let flush = cached && !lun.pages().write_cache() && !lun.store().capabilities().read_only;
    Ok(apply(lun, flush, save, len))
}

/// What is still to be done when the pages have changed: if the cache is off now, what is in it must not be lost (SBC-4
/// 6.5.6); and they are saved if that was asked for.
fn apply(lun: &Arc<Lun>, flush: bool, save: bool, len: usize) -> Reply {
    if !flush && !save {
        return Reply::Consumed(len);
    }
    let on = Arc::clone(lun);
    Reply::Job(Box::new(move |_| {
        let failed = |e| ScsiError::from_store(e, true, on.block_size());
        if flush {
            on.store().flush().map_err(failed)?;
        }
        if save {
            on.pages().save(on.store().notes()).map_err(failed)?;
        }
        Ok(len)
    }))
}

/// Checks header and block descriptor; returns where the pages begin.
fn check_header(lun: &Lun, list: &[u8], ten: bool) -> Result<usize, ScsiError> {
    let short = || ScsiError::PARAMETER_LIST_LENGTH;
    let (header, long, descriptor_len) = if ten {
        let (header, _) = Header10::ref_from_prefix(list).map_err(|_| short())?;
        (
            size_of::<Header10>(),
            header.long_lba & 1 != 0,
            header.block_descriptor_length.get().into(),
        )
    } else {
        let (header, _) = Header6::ref_from_prefix(list).map_err(|_| short())?;
        (size_of::<Header6>(), false, usize::from(header.block_descriptor_length))
    };
    let length_field = u16::try_from(if ten { 6 } else { 3 }).unwrap_or(0);
    let rest = list.get(header..).ok_or_else(short)?;
    let (blocks, block_size, all_ones) = match (descriptor_len, long) {
        (0, _) => return Ok(header),
        (8, false) => {
            let (d, _) = ShortBlockDescriptor::ref_from_prefix(rest).map_err(|_| short())?;
            (u64::from(d.blocks.get()), wire::from24(d.block_size), u64::from(u32::MAX))
        }
        (16, true) => {
            let (d, _) = LongBlockDescriptor::ref_from_prefix(rest).map_err(|_| short())?;
            (d.blocks.get(), d.block_size.get(), u64::MAX)
        }
        _ => return Err(ScsiError::parameter_field(length_field, None)),
    };
    // Neither the block size nor the capacity can be changed.
    let at = u16::try_from(header).unwrap_or(0);
    let size_field = at + if long { 12 } else { 5 };
    if block_size != lun.block_size() {
        return Err(ScsiError::parameter_field(size_field, None));
    }
    if ![0, all_ones, lun.blocks()].contains(&blocks) {
        return Err(ScsiError::parameter_field(at, None));
    }
    Ok(header + descriptor_len)
}
