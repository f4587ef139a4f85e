//! Vital product data pages (SPC-5 7.7, SBC-4 6.6). What stands here is what the disk does; a field
//! whose command or feature is not there stays zero.

use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::identity::PORT_GROUP;
use super::{atomic, third_party, unmap, write_same};
use crate::scsi::attention::Port;
use crate::scsi::lun::Lun;
use crate::scsi::provisioning;
use crate::scsi::sense::ScsiError;
use crate::scsi::target::Target;
use crate::scsi::wire::{U16, U32, U64, ascii_field, bytes_of, len8, len16};

/// T10 VENDOR IDENTIFICATION, here and in the standard inquiry data.
pub(super) const VENDOR: &str = "THINLUN";

/// A page: its code and what makes its contents after the header.
type Page = (u8, fn(&Asked<'_>) -> Vec<u8>);

/// What a page may be about.
pub(super) struct Asked<'a> {
    /// The disk.
    pub lun: &'a Lun,
    /// The port that it was asked by.
    pub port: Port,
    /// Its ports.
    pub target: &'a Target,
}

/// Every page, in the order of codes; page 00 lists them.
const PAGES: &[Page] = &[
    (0x00, supported_pages),
    (0x80, unit_serial_number),
    (0x83, device_identification),
    (0x85, management_addresses),
    (0x86, extended_inquiry),
    (0x87, mode_page_policy),
    (0x88, scsi_ports),
    (0x8f, |asked| third_party::page(asked.target, asked.lun)),
    (0xb0, |asked| block_limits(asked.lun)),
    (0xb1, |asked| block_device_characteristics(asked.lun)),
    (0xb2, |asked| logical_block_provisioning(asked.lun)),
    (0xb7, block_limits_extension),
    (0xb9, concurrent_positioning_ranges),
];

/// The whole page with its header.
///
/// # Errors
/// 05/24/00 pointing at PAGE CODE for a page that is not there.
pub(super) fn page(asked: &Asked<'_>, code: u8) -> Result<Vec<u8>, ScsiError> {
    let (_, contents) = PAGES.iter().find(|(c, _)| *c == code).ok_or(ScsiError::cdb_field(2, 7))?;
    let contents = contents(asked);
    let [high, low] = len16(contents.len()).to_bytes();
    let mut page = vec![0x00, code, high, low];
    page.extend(contents);
    Ok(page)
}

fn supported_pages(_: &Asked<'_>) -> Vec<u8> {
    PAGES.iter().map(|(code, _)| *code).collect()
}

fn unit_serial_number(asked: &Asked<'_>) -> Vec<u8> {
    asked.lun.settings().serial.clone().into_bytes()
}

/// Code set, then association and designator type of a designation descriptor (SPC-5 7.7.6).
type Head = [u8; 2];
const NAA: Head = [1, 3];
const T10_VENDOR_ID: Head = [2, 1];
const SCSI_NAME_STRING: Head = [3, 8];
const RELATIVE_TARGET_PORT: Head = [1, 1 << 4 | 4];
const TARGET_PORT_GROUP: Head = [1, 1 << 4 | 5];

/// The names of a disk: its NAA, its T10 name, its SCSI name string. They stay the same wherever and
/// however often the image is served.
pub(super) fn designators(lun: &Lun) -> [(Head, Vec<u8>); 3] {
    let settings = lun.settings();
    let hex: String = settings.naa.iter().map(|b| format!("{b:02X}")).collect();
    // UTF-8, null-terminated and padded to a multiple of four (SPC-5 4.3.2).
    let mut name = format!("naa.{hex}").into_bytes();
    name.resize((name.len() + 1).next_multiple_of(4), 0);
    let mut t10 = ascii_field::<8>(VENDOR).to_vec();
    t10.extend(settings.serial.bytes());
    [(NAA, settings.naa.clone()), (T10_VENDOR_ID, t10), (SCSI_NAME_STRING, name)]
}

/// The disk's names, the port it was asked by, and the group of that.
fn device_identification(asked: &Asked<'_>) -> Vec<u8> {
    let number = |number: u16| u32::from(number).to_be_bytes().to_vec();
    designators(asked.lun)
        .into_iter()
        .chain([
            (RELATIVE_TARGET_PORT, number(asked.port.0)),
            (TARGET_PORT_GROUP, number(PORT_GROUP)),
        ])
        .flat_map(|([code_set, kind], bytes)| {
            [vec![code_set, kind, 0, len8(bytes.len())], bytes].concat()
        })
        .collect()
}

/// There is no network to manage it by.
fn management_addresses(_: &Asked<'_>) -> Vec<u8> {
    Vec::new()
}

fn extended_inquiry(_: &Asked<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    // Byte 5: HEADSUP, ORDSUP, SIMPSUP. Byte 6: V_SUP, there is a volatile cache.
    for (byte, value) in [(1, 0x07), (2, 0x01)] {
        if let Some(to) = page.get_mut(byte) {
            *to = value;
        }
    }
    page
}

/// One policy for all pages and subpages: shared by all initiators.
fn mode_page_policy(_: &Asked<'_>) -> Vec<u8> {
    vec![0x3f, 0xff, 0x00, 0]
}

/// The target ports; virtio-scsi defines no names for ports.
fn scsi_ports(asked: &Asked<'_>) -> Vec<u8> {
    let descriptor = |port: Port| {
        let [high, low] = port.0.to_be_bytes();
        [0, 0, high, low, 0, 0, 0, 0, 0, 0, 0, 0]
    };
    asked.target.ports().flat_map(descriptor).collect()
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct BlockLimits {
    /// Bit 0: WSNZ.
    wsnz: u8,
    max_compare_and_write: u8,
    optimal_granularity: U16,
    max_transfer: U32,
    optimal_transfer: U32,
    max_prefetch: U32,
    max_unmap_blocks: U32,
    max_unmap_descriptors: U32,
    optimal_unmap_granularity: U32,
    unmap_alignment: U32,
    max_write_same: U64,
    max_atomic: U32,
    atomic_alignment: U32,
    atomic_granularity: U32,
    max_atomic_with_boundary: U32,
    max_atomic_boundary: U32,
}

fn block_limits(lun: &Lun) -> Vec<u8> {
    let max_transfer = u32::try_from(lun.max_transfer_blocks()).unwrap_or(u32::MAX);
    let thin = lun.is_thin();
    let granularity = lun.settings().discard_granularity / lun.block_size();
    bytes_of(&BlockLimits {
        wsnz: 0,
        max_compare_and_write: atomic::MAX_COMPARE_AND_WRITE,
        optimal_granularity: U16::new(1 << lun.physical_exponent().min(15)),
        max_transfer: U32::new(max_transfer),
        optimal_transfer: U32::ZERO,
        max_prefetch: U32::ZERO,
        max_unmap_blocks: U32::new(if thin { unmap::MAX_BLOCKS } else { 0 }),
        max_unmap_descriptors: U32::new(if thin { unmap::MAX_DESCRIPTORS } else { 0 }),
        optimal_unmap_granularity: U32::new(if thin { granularity } else { 0 }),
        // UGAVALID: the granularity counts from LBA 0.
        unmap_alignment: U32::new(if thin { 1 << 31 } else { 0 }),
        max_write_same: U64::new(write_same::MAX_BYTES / u64::from(lun.block_size())),
        max_atomic: U32::new(atomic::max_atomic_blocks(lun)),
        atomic_alignment: U32::ZERO,
        atomic_granularity: U32::ZERO,
        max_atomic_with_boundary: U32::ZERO,
        max_atomic_boundary: U32::ZERO,
    })
}

/// MEDIUM ROTATION RATE: 1 says that nothing turns.
const NON_ROTATING: u16 = 1;
/// What a disk that pretends to turn says.
const ROTATING: u16 = 7200;

fn block_device_characteristics(lun: &Lun) -> Vec<u8> {
    let rate = if lun.settings().rotational { ROTATING } else { NON_ROTATING };
    let mut page = rate.to_be_bytes().to_vec();
    page.resize(60, 0);
    // Byte 3: WABEREQ 01b, reads after a block erase succeed. Byte 4: FUAB, SYNCHRONIZE CACHE
    // reaches the medium; VBULS, unmapped blocks can be verified too.
    for (byte, value) in [(3, 0x40), (4, 0x03)] {
        if let Some(to) = page.get_mut(byte) {
            *to = value;
        }
    }
    page
}

/// LBPU, LBPWS, LBPWS10, and LBPRZ 001b: unmapped blocks read as zeroes.
const THIN: u8 = 0x80 | 0x40 | 0x20 | 0x04;
/// ANC_SUP.
const ANCHORS: u8 = 0x02;

fn logical_block_provisioning(lun: &Lun) -> Vec<u8> {
    let anchors = if lun.can_anchor() { ANCHORS } else { 0 };
    let exponent = lun.space_watch().map_or(0, |_| provisioning::threshold_exponent(lun));
    match lun.is_thin() {
        // PROVISIONING TYPE 2: thin.
        true => vec![exponent, THIN | anchors, 2, 0],
        false => vec![0, 0, 0, 0],
    }
}

/// There are no streams, and no scattered writes: nothing has a limit.
fn block_limits_extension(_: &Asked<'_>) -> Vec<u8> {
    vec![0; 60]
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct PositioningRange {
    number: u8,
    storage_elements: u8,
    reserved: [u8; 6],
    lba: U64,
    blocks: U64,
    reserved2: [u8; 8],
}

/// One range: all of the disk.
fn concurrent_positioning_ranges(asked: &Asked<'_>) -> Vec<u8> {
    let mut page = vec![0; 60];
    page.extend(bytes_of(&PositioningRange {
        number: 0,
        storage_elements: 1,
        reserved: [0; 6],
        lba: U64::ZERO,
        blocks: U64::new(asked.lun.blocks()),
        reserved2: [0; 8],
    }));
    page
}
