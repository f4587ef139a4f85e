//! Third-party copies: the parameter lists of EXTENDED COPY, POPULATE TOKEN and WRITE USING TOKEN, and what is told of them.

use super::cdb::{self, Cdb};
use super::lun::Lun;
use super::scsi::{ScsiResponse, sense};

/// LIST ID USAGE and list identifier of a list that nobody asks about.
pub const NO_LIST_ID: (u8, u8) = (0b11, 0);

/// An identification CSCD descriptor with a designator of VPD page 83, by its place there.
pub fn cscd(lun: &Lun<'_>, designator: usize) -> Vec<u8> {
    let page = lun.vpd(0x83);
    let mut at = 4;
    for _ in 0..designator {
        at += 4 + usize::from(page[at + 3]);
    }
    let len = usize::from(page[at + 3]);
    let mut descriptor = vec![0xe4, 0, 0, 0, page[at], page[at + 1], 0, len as u8];
    descriptor.extend(&page[at + 4..at + 4 + len]);
    descriptor.resize(28, 0);
    descriptor.push(0);
    descriptor.extend(&(lun.block_size as u32).to_be_bytes()[1..]);
    descriptor
}

/// Segment 02h.
pub fn blocks(from: (u16, u64), to: (u16, u64), count: u16, dc: bool) -> Vec<u8> {
    let mut s = vec![0x02, if dc { 2 } else { 0 }, 0, 0x18];
    s.extend(from.0.to_be_bytes());
    s.extend(to.0.to_be_bytes());
    s.extend([0, 0]);
    s.extend(count.to_be_bytes());
    s.extend(from.1.to_be_bytes());
    s.extend(to.1.to_be_bytes());
    s
}

/// Segment 0Ah, between bytes of disks with these block sizes.
pub fn bytes(from: (u16, u64, u64), to: (u16, u64, u64), count: u32) -> Vec<u8> {
    let mut s = vec![0x0a, 0, 0, 0x1c];
    s.extend(from.0.to_be_bytes());
    s.extend(to.0.to_be_bytes());
    s.extend(count.to_be_bytes());
    s.extend((from.1 / from.2).to_be_bytes());
    s.extend((to.1 / to.2).to_be_bytes());
    s.extend(((from.1 % from.2) as u16).to_be_bytes());
    s.extend(((to.1 % to.2) as u16).to_be_bytes());
    s
}

/// A parameter list of EXTENDED COPY(LID1).
pub fn list((usage, id): (u8, u8), cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (cscds, segments) = (cscds.concat(), segments.concat());
    let mut list = vec![id, usage << 3];
    list.extend((cscds.len() as u16).to_be_bytes());
    list.extend([0; 4]);
    list.extend((segments.len() as u32).to_be_bytes());
    list.extend([0; 4]);
    list.extend(cscds);
    list.extend(segments);
    list
}

/// A parameter list of EXTENDED COPY(LID4).
pub fn list_lid4(id: u32, immediate: bool, cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (cscds, segments) = (cscds.concat(), segments.concat());
    let mut list = vec![0; 48];
    list[0] = 1;
    list[3] = 0x20;
    list[15] = u8::from(immediate);
    list[16] = 0xff;
    list[20..24].copy_from_slice(&id.to_be_bytes());
    list[42..44].copy_from_slice(&(cscds.len() as u16).to_be_bytes());
    list[44..46].copy_from_slice(&(segments.len() as u16).to_be_bytes());
    list.extend(cscds);
    list.extend(segments);
    list
}

pub fn xcopy(lun: &Lun<'_>, list: &[u8]) -> ScsiResponse {
    lun.run_out(cdb::extended_copy_lid1(list.len() as u32), list)
}

pub fn xcopy_lid4(lun: &Lun<'_>, list: &[u8]) -> ScsiResponse {
    lun.run_out(cdb::extended_copy_lid4(list.len() as u32), list)
}

pub fn copy(lun: &Lun<'_>, cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> ScsiResponse {
    xcopy(lun, &list(NO_LIST_ID, cscds, segments))
}

/// ROD TYPE: as it is when the token is used.
pub const BY_REFERENCE: u32 = 0x0001_0000;
/// ROD TYPE: as it was when the token was made.
pub const POINT_IN_TIME: u32 = 0x0080_0000;

/// POPULATE TOKEN: CDB and parameter list.
pub fn populate_request(
    id: u32,
    timeout: u32,
    rod_type: Option<u32>,
    ranges: &[(u64, u32)],
) -> (Cdb, Vec<u8>) {
    let mut list = vec![0; 16];
    list[2] = if rod_type.is_some() { 0x02 } else { 0 };
    list[4..8].copy_from_slice(&timeout.to_be_bytes());
    list[8..12].copy_from_slice(&rod_type.unwrap_or(0).to_be_bytes());
    append_ranges(&mut list, 14, ranges);
    (cdb::populate_token(list.len() as u32).be32(6, id), list)
}

/// POPULATE TOKEN and RECEIVE ROD TOKEN INFORMATION; the token and the blocks it stands for.
#[track_caller]
pub fn populate(lun: &Lun<'_>, id: u32, timeout: u32, ranges: &[(u64, u32)]) -> (Vec<u8>, u64) {
    let (cdb, list) = populate_request(id, timeout, None, ranges);
    lun.run_out(cdb, &list).expect_good();
    let (status, blocks, rest) = token_information(lun, id);
    assert_eq!(status, 0x01);
    assert_eq!(rest.len(), 514, "one token");
    (rest[2..].to_vec(), blocks)
}

/// Status, transfer count and token descriptors.
#[track_caller]
pub fn token_information(lun: &Lun<'_>, id: u32) -> (u8, u64, Vec<u8>) {
    let answer = lun.run_in(cdb::receive_copy_lid4(0x07, id, 1024), 1024).expect_good();
    let data = answer.data();
    assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize + 4, data.len());
    assert_eq!(data[15], 0xf1, "logical blocks");
    let sense = usize::from(data[13]);
    let tokens = u32::from_be_bytes(data[32 + sense..36 + sense].try_into().unwrap());
    assert_eq!(tokens as usize, data.len() - 36 - sense);
    let count = u64::from_be_bytes(data[16..24].try_into().unwrap());
    (data[5], count, data[36 + sense..].to_vec())
}

pub fn append_ranges(list: &mut Vec<u8>, length_at: usize, ranges: &[(u64, u32)]) {
    list[length_at..length_at + 2].copy_from_slice(&(16 * ranges.len() as u16).to_be_bytes());
    for (lba, count) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    let len = list.len() as u16 - 2;
    list[..2].copy_from_slice(&len.to_be_bytes());
}

/// WRITE USING TOKEN: CDB and parameter list; `flags` are IMMED 01h and DEL_TKN 02h.
pub fn write_token_request(
    id: u32,
    token: &[u8],
    flags: u8,
    offset: u64,
    ranges: &[(u64, u32)],
) -> (Cdb, Vec<u8>) {
    let mut list = vec![0; 536];
    list[2] = flags;
    list[8..16].copy_from_slice(&offset.to_be_bytes());
    list[16..528].copy_from_slice(token);
    append_ranges(&mut list, 534, ranges);
    (cdb::write_using_token(list.len() as u32).be32(6, id), list)
}

#[track_caller]
pub fn write_token(
    lun: &Lun<'_>,
    id: u32,
    token: &[u8],
    flags: u8,
    offset: u64,
    ranges: &[(u64, u32)],
) -> ScsiResponse {
    let (cdb, list) = write_token_request(id, token, flags, offset, ranges);
    lun.run_out(cdb, &list)
}

/// COPY OPERATION STATUS of LID4 and token copies.
pub mod copy_status {
    pub const DONE: u8 = 0x01;
    pub const FAILED: u8 = 0x02;
    pub const FOREGROUND: u8 = 0x11;
    pub const BACKGROUND: u8 = 0x12;
    pub const TERMINATED: u8 = 0x60;
}

/// COPY OPERATION STATUS and TRANSFER COUNT by RECEIVE COPY STATUS(LID4); `None` if nothing is known of it.
#[track_caller]
pub fn status_of(lun: &Lun<'_>, id: u32) -> Option<(u8, u64)> {
    let answer = lun.run_in(cdb::receive_copy_lid4(5, id, 256), 256);
    if answer.sense_code() == Some(sense::INVALID_FIELD_IN_CDB) {
        return None;
    }
    let data = answer.expect_good().data().to_vec();
    Some((data[5], u64::from_be_bytes(data[16..24].try_into().unwrap())))
}

/// The token in the answer of RECEIVE ROD TOKEN INFORMATION, if it has one.
pub fn token(answer: &[u8]) -> Option<Vec<u8>> {
    let sense = usize::from(*answer.get(13)?);
    answer.get(36 + sense + 2..36 + sense + 2 + 512).map(<[u8]>::to_vec)
}
