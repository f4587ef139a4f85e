//! Parameter lists of third-party copies: EXTENDED COPY, POPULATE TOKEN, WRITE USING TOKEN (SPC-5 6.6 ff, SBC-4 5.16, 5.57).

use super::lun::Lun;

/// An identification CSCD descriptor with the first designator of VPD page 83.
pub fn cscd(lun: &Lun<'_>) -> Vec<u8> {
    let page = lun.vpd(0x83);
    let len = usize::from(page[7]);
    let mut descriptor = vec![0xe4, 0, 0, 0, page[4], page[5], 0, len as u8];
    descriptor.extend(&page[8..8 + len]);
    descriptor.resize(28, 0);
    descriptor.push(0);
    descriptor.extend(&(lun.block_size as u32).to_be_bytes()[1..]);
    descriptor
}

/// Segment descriptor 02h: blocks of one descriptor's disk to another's.
pub fn segment(from: (u16, u64), to: (u16, u64), count: u16) -> Vec<u8> {
    let mut bytes = vec![0x02, 0, 0, 0x18];
    bytes.extend(from.0.to_be_bytes());
    bytes.extend(to.0.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(count.to_be_bytes());
    bytes.extend(from.1.to_be_bytes());
    bytes.extend(to.1.to_be_bytes());
    bytes
}

/// The list of EXTENDED COPY(LID4), whose result is kept to be asked for.
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

/// The list of POPULATE TOKEN; the token lives so many seconds unused.
pub fn populate_list(seconds: u32, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut list = vec![0; 16];
    list[4..8].copy_from_slice(&seconds.to_be_bytes());
    with_ranges(list, ranges)
}

/// The list of WRITE USING TOKEN, from the token's first block on.
pub fn write_list(token: &[u8], immediate: bool, delete: bool, ranges: &[(u64, u32)]) -> Vec<u8> {
    let mut list = vec![0; 536];
    list[2] = u8::from(immediate) | u8::from(delete) << 1;
    list[16..528].copy_from_slice(token);
    with_ranges(list, ranges)
}

fn with_ranges(mut list: Vec<u8>, ranges: &[(u64, u32)]) -> Vec<u8> {
    let at = list.len() - 2;
    list[at..].copy_from_slice(&(16 * ranges.len() as u16).to_be_bytes());
    for (lba, count) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    let len = list.len() as u16 - 2;
    list[..2].copy_from_slice(&len.to_be_bytes());
    list
}

/// The token in the answer of RECEIVE ROD TOKEN INFORMATION, if it has one.
pub fn token(answer: &[u8]) -> Option<Vec<u8>> {
    let sense = usize::from(*answer.get(13)?);
    answer.get(36 + sense + 2..36 + sense + 2 + 512).map(<[u8]>::to_vec)
}
