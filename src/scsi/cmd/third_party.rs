//! The Third-party Copy VPD page (SPC-5 7.7.18): what the copy manager does, and its limits.

use super::extended_copy::{
    BLOCK_TO_BLOCK, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION, MAX_CSCDS, MAX_DESCRIPTORS,
    MAX_SEGMENTS, THIS_DISK, VERIFY_CSCD,
};
use super::receive_copy::DATA_SEGMENT_GRANULARITY;
use super::token::{MAX_RANGES, MAX_TRANSFER, OPTIMAL_TRANSFER};
use super::{ServiceAction, TABLE};
use crate::scsi::copy::rod::{
    ACCESS_UPON_REFERENCE, BLOCK_ZERO, DEFAULT_TIMEOUT, MAX_TIMEOUT, POINT_IN_TIME,
};
use crate::scsi::lun::Lun;
use crate::scsi::target::Target;
use crate::scsi::wire::{U32, len8, len16, len32};

/// Operation codes of third-party copy commands.
const OUT: u8 = 0x83;
const IN: u8 = 0x84;

/// What stands behind the page's header.
pub(super) fn page(target: &Target, lun: &Lun) -> Vec<u8> {
    [
        descriptor(0x0000, rod_limits(lun)),
        descriptor(0x0001, supported_commands()),
        descriptor(0x0004, parameter_data()),
        descriptor(0x0008, supported_descriptors()),
        descriptor(0x000c, supported_cscd_ids()),
        descriptor(0x0106, token_features()),
        descriptor(0x0108, token_types(lun)),
        descriptor(0x8001, general_operations(target)),
    ]
    .concat()
}

/// A descriptor, padded to a multiple of four bytes.
fn descriptor(kind: u16, mut contents: Vec<u8>) -> Vec<u8> {
    contents.resize(contents.len().next_multiple_of(4), 0);
    let mut bytes = kind.to_be_bytes().to_vec();
    bytes.extend(len16(contents.len()).to_bytes());
    bytes.extend(contents);
    bytes
}

fn rod_limits(lun: &Lun) -> Vec<u8> {
    let block = u64::from(lun.block_size());
    let mut bytes = vec![0; 6];
    bytes.extend(len16(MAX_RANGES).to_bytes());
    bytes.extend(MAX_TIMEOUT.to_be_bytes());
    bytes.extend(DEFAULT_TIMEOUT.to_be_bytes());
    bytes.extend((MAX_TRANSFER / block).to_be_bytes());
    bytes.extend((OPTIMAL_TRANSFER / block).to_be_bytes());
    bytes
}

/// The commands, from the table.
fn supported_commands() -> Vec<u8> {
    let of = |opcode: u8| {
        let actions: Vec<u8> = TABLE
            .iter()
            .filter(|command| command.opcode() == opcode)
            .filter_map(|command| match command.service_action {
                ServiceAction::Byte1(action) => Some(action),
                ServiceAction::None | ServiceAction::Variable(_) => None,
            })
            .collect();
        [vec![opcode, len8(actions.len())], actions].concat()
    };
    let list = [of(OUT), of(IN)].concat();
    [vec![len8(list.len())], list].concat()
}

fn parameter_data() -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend(len16(MAX_CSCDS).to_bytes());
    bytes.extend(len16(MAX_SEGMENTS).to_bytes());
    bytes.extend(len32(MAX_DESCRIPTORS).to_bytes());
    bytes.resize(28, 0);
    bytes
}

fn supported_descriptors() -> Vec<u8> {
    let list = [BLOCK_TO_BLOCK, VERIFY_CSCD, BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION];
    [&[len8(list.len())], &list[..]].concat()
}

fn supported_cscd_ids() -> Vec<u8> {
    [2u16.to_be_bytes(), THIS_DISK.to_be_bytes()].concat()
}

/// ROD token features: tokens are for the disks of this daemon only (REMOTE TOKENS 0).
fn token_features() -> Vec<u8> {
    let mut bytes = vec![0; 12];
    // MINIMUM and MAXIMUM TOKEN LIFETIME: it lives as long as it is used.
    bytes.extend([0; 8]);
    bytes.extend(MAX_TIMEOUT.to_be_bytes());
    bytes.resize(42, 0);
    // For block devices: how much is best moved at once.
    let mut block = vec![0, 0, 0, 0x2c, 0, 0, 0, 0];
    block.extend(MAX_TRANSFER.to_be_bytes());
    block.extend(OPTIMAL_TRANSFER.to_be_bytes());
    block.extend(OPTIMAL_TRANSFER.to_be_bytes());
    block.extend(OPTIMAL_TRANSFER.to_be_bytes());
    block.resize(48, 0);
    bytes.extend(len16(block.len()).to_bytes());
    bytes.extend(block);
    bytes
}

/// The types of tokens, which the disk makes (TOKEN_OUT) or takes (TOKEN_IN).
fn token_types(lun: &Lun) -> Vec<u8> {
    const MADE_AND_TAKEN: u8 = 0x03;
    const TAKEN: u8 = 0x02;
    let mut types = vec![(ACCESS_UPON_REFERENCE, MADE_AND_TAKEN)];
    if lun.store().capabilities().snapshots {
        types.push((POINT_IN_TIME, MADE_AND_TAKEN));
    } else {
        // Another disk of the daemon may make them.
        types.push((POINT_IN_TIME, TAKEN));
    }
    types.push((BLOCK_ZERO, TAKEN));
    let list: Vec<u8> = types
        .into_iter()
        .flat_map(|(kind, flags)| {
            let mut bytes = kind.to_be_bytes().to_vec();
            bytes.push(flags);
            bytes.resize(64, 0);
            bytes
        })
        .collect();
    let mut bytes = vec![0, 0];
    bytes.extend(len16(list.len()).to_bytes());
    bytes.extend(list);
    bytes
}

fn general_operations(target: &Target) -> Vec<u8> {
    let copies = len32(target.copies().max_copies());
    let mut bytes = [copies, copies].map(U32::to_bytes).concat();
    // MAXIMUM SEGMENT LENGTH: no limit but the descriptors' own.
    bytes.extend(u32::MAX.to_be_bytes());
    bytes.push(DATA_SEGMENT_GRANULARITY);
    bytes.resize(32, 0);
    bytes
}
