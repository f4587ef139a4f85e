//! INQUIRY (SPC-5 6.7) and the standard inquiry data.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::vpd::{self, VENDOR};
use super::{Context, Reply, wire};
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{Cdb, U16, ascii_field, bytes_of};

/// PRODUCT IDENTIFICATION.
const PRODUCT: &str = "THIN DISK";

/// PRODUCT REVISION LEVEL.
const REVISION: &str =
    concat!(env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));

/// Direct access block device.
const DISK: u8 = 0x00;
/// Well-known logical unit.
const WELL_KNOWN: u8 = 0x1e;
/// No device here, nor can there be one: qualifier 011b, type 1Fh.
const NOTHING: u8 = 0x7f;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Inquiry {
    opcode: u8,
    evpd: u8,
    page: u8,
    allocation: U16,
    control: u8,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Standard {
    peripheral: u8,
    removable: u8,
    version: u8,
    /// HISUP and the response data format.
    format: u8,
    additional_length: u8,
    /// SCCS, TPGS, 3PC, PROTECT.
    flags5: u8,
    flags6: u8,
    /// CMDQUE.
    flags7: u8,
    vendor: [u8; 8],
    product: [u8; 16],
    revision: [u8; 4],
    vendor_specific: [u8; 22],
    version_descriptors: [U16; 8],
    reserved: [u8; 22],
}

/// 3PC.
const THIRD_PARTY_COPY: u8 = 0x08;
/// TPGS 01b: which ports there are, and that all are as good, is said by REPORT TARGET PORT GROUPS.
const PORT_GROUPS: u8 = 0x10;
/// MULTIP.
const SEVERAL_PORTS: u8 = 0x10;

impl Standard {
    fn new(peripheral: u8, ports: usize) -> Self {
        // SAM-5, SPC-4, SBC-3, without naming a revision (SPC-5 annex E). Version 6 is SPC-4:
        // today's initiators and test suites know it, and a 60-byte VPD B0 needs SBC-3.
        let mut version_descriptors = [U16::ZERO; 8];
        let known = [0x00a0, 0x0460, 0x04c0];
        for (to, from) in version_descriptors.iter_mut().zip(known) {
            *to = U16::new(from);
        }
        Standard {
            peripheral,
            removable: 0,
            version: 6,
            format: 0x12,
            additional_length: wire::len8(size_of::<Self>() - 5),
            flags5: if peripheral == DISK { PORT_GROUPS | THIRD_PARTY_COPY } else { 0 },
            flags6: if ports > 1 { SEVERAL_PORTS } else { 0 },
            flags7: 0x02,
            vendor: ascii_field(VENDOR),
            product: ascii_field(PRODUCT),
            revision: ascii_field(REVISION),
            vendor_specific: [0; 22],
            version_descriptors,
            reserved: [0; 22],
        }
    }
}

/// INQUIRY to a disk.
pub(super) fn inquiry(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &Inquiry = context.request.cdb.view()?;
    let bytes = match (cdb.evpd & 1, cdb.page) {
        (0, 0) => bytes_of(&Standard::new(DISK, context.target.ports().count())),
        (0, _) => return Err(ScsiError::cdb_field(2, 7)),
        (_, page) => {
            let (lun, port) = (context.lun, context.nexus.port());
            vpd::page(&vpd::Asked { lun, port, target: context.target }, page)?
        }
    };
    Ok(Reply::Data { bytes, allocation: cdb.allocation.get().into() })
}

/// INQUIRY to the well-known logical unit, or to none. Of the VPD pages there is only the list.
pub(super) fn without_disk(cdb: &Cdb, well_known: bool) -> Result<(Vec<u8>, usize), ScsiError> {
    let cdb: &Inquiry = cdb.view()?;
    let peripheral = if well_known { WELL_KNOWN } else { NOTHING };
    let bytes = match (cdb.evpd & 1, cdb.page) {
        (0, 0) => bytes_of(&Standard::new(peripheral, 1)),
        (1, 0) => vec![peripheral, 0, 0, 1, 0],
        _ => return Err(ScsiError::cdb_field(2, 7)),
    };
    Ok((bytes, cdb.allocation.get().into()))
}
