//! Command descriptor blocks. One function a command, with the fields every caller sets; rarer
//! bits are added with [`Cdb::or`].

/// A CDB in the 32 bytes that virtio-scsi has for it by default.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cdb([u8; 32]);

/// Byte 1 of READ and WRITE (10), (12) and (16).
pub const FUA: u8 = 0x08;
/// Byte 1 of READ and WRITE (10), (12) and (16).
pub const DPO: u8 = 0x10;
/// Byte 1 of SYNCHRONIZE CACHE and PRE-FETCH.
pub const IMMED: u8 = 0x02;

/// Byte 1 of WRITE SAME.
pub mod write_same {
    pub const NDOB: u8 = 0x01;
    pub const LBDATA: u8 = 0x02;
    pub const PBDATA: u8 = 0x04;
    pub const UNMAP: u8 = 0x08;
    pub const ANCHOR: u8 = 0x10;
}

impl Cdb {
    pub const fn new(opcode: u8) -> Self {
        let mut bytes = [0; 32];
        bytes[0] = opcode;
        Self(bytes)
    }

    pub fn from_slice(slice: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes[..slice.len()].copy_from_slice(slice);
        Self(bytes)
    }

    pub const fn bytes(&self) -> [u8; 32] {
        self.0
    }

    pub const fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// Sets bits of one byte.
    pub fn or(mut self, at: usize, bits: u8) -> Self {
        self.0[at] |= bits;
        self
    }

    /// Replaces one byte.
    pub fn byte(mut self, at: usize, value: u8) -> Self {
        self.0[at] = value;
        self
    }

    pub fn be16(self, at: usize, value: u16) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    pub fn be24(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes()[1..])
    }

    pub fn be32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    pub fn be64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// A variable length CDB of 32 bytes with its service action.
    fn long(service_action: u16) -> Self {
        Self::new(0x7f).byte(7, 0x18).be16(8, service_action)
    }
}

impl std::fmt::Debug for Cdb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x?}", self.0)
    }
}

// ----- SPC ------------------------------------------------------------------------------------

pub fn test_unit_ready() -> Cdb {
    Cdb::new(0x00)
}

/// Fixed format, or descriptor format with `desc`.
pub fn request_sense(desc: bool, len: u8) -> Cdb {
    Cdb::new(0x03).byte(1, u8::from(desc)).byte(4, len)
}

pub fn inquiry(len: u16) -> Cdb {
    Cdb::new(0x12).be16(3, len)
}

pub fn inquiry_vpd(page: u8, len: u16) -> Cdb {
    inquiry(len).byte(1, 1).byte(2, page)
}

pub fn report_luns(select: u8, len: u32) -> Cdb {
    Cdb::new(0xa0).byte(2, select).be32(6, len)
}

pub fn mode_sense6(page: u8, subpage: u8, len: u8) -> Cdb {
    Cdb::new(0x1a).byte(2, page).byte(3, subpage).byte(4, len)
}

pub fn mode_sense10(page: u8, subpage: u8, len: u16) -> Cdb {
    Cdb::new(0x5a).byte(2, page).byte(3, subpage).be16(7, len)
}

/// With PF set.
pub fn mode_select6(len: u8) -> Cdb {
    Cdb::new(0x15).byte(1, 0x10).byte(4, len)
}

/// With PF set.
pub fn mode_select10(len: u16) -> Cdb {
    Cdb::new(0x55).byte(1, 0x10).be16(7, len)
}

pub fn log_sense(page: u8, subpage: u8, len: u16) -> Cdb {
    Cdb::new(0x4d).byte(2, 0x40 | page).byte(3, subpage).be16(7, len)
}

pub fn start_stop_unit(byte4: u8) -> Cdb {
    Cdb::new(0x1b).byte(4, byte4)
}

pub fn persistent_reserve_in(service_action: u8, len: u16) -> Cdb {
    Cdb::new(0x5e).byte(1, service_action).be16(7, len)
}

pub fn persistent_reserve_out(service_action: u8, scope_and_type: u8, len: u32) -> Cdb {
    Cdb::new(0x5f).byte(1, service_action).byte(2, scope_and_type).be32(5, len)
}

/// `options` is the reporting option (0 all, 1 opcode, 2 and 3 with service action).
pub fn report_supported_opcodes(options: u8, opcode: u8, service_action: u16, len: u32) -> Cdb {
    Cdb::new(0xa3)
        .byte(1, 0x0c)
        .byte(2, options)
        .byte(3, opcode)
        .be16(4, service_action)
        .be32(6, len)
}

pub fn report_supported_tmfs(len: u32) -> Cdb {
    Cdb::new(0xa3).byte(1, 0x0d).be32(6, len)
}

pub fn extended_copy_lid1(len: u32) -> Cdb {
    Cdb::new(0x83).be32(10, len)
}

pub fn extended_copy_lid4(len: u32) -> Cdb {
    Cdb::new(0x83).byte(1, 0x01).be32(10, len)
}

pub fn populate_token(len: u32) -> Cdb {
    Cdb::new(0x83).byte(1, 0x10).be32(10, len)
}

pub fn write_using_token(len: u32) -> Cdb {
    Cdb::new(0x83).byte(1, 0x11).be32(10, len)
}

/// RECEIVE COPY RESULTS with a one byte list identifier.
pub fn receive_copy(service_action: u8, list_id: u8, len: u32) -> Cdb {
    Cdb::new(0x84).byte(1, service_action).byte(2, list_id).be32(10, len)
}

/// RECEIVE ROD TOKEN INFORMATION, RECEIVE COPY STATUS (LID4): a four byte list identifier.
pub fn receive_copy_lid4(service_action: u8, list_id: u32, len: u32) -> Cdb {
    Cdb::new(0x84).byte(1, service_action).be32(2, list_id).be32(10, len)
}

// ----- SBC: capacity and status ---------------------------------------------------------------

pub fn read_capacity10() -> Cdb {
    Cdb::new(0x25)
}

pub fn read_capacity16(len: u32) -> Cdb {
    Cdb::new(0x9e).byte(1, 0x10).be32(10, len)
}

pub fn get_lba_status16(lba: u64, len: u32, report_type: u8) -> Cdb {
    Cdb::new(0x9e).byte(1, 0x12).be64(2, lba).be32(10, len).byte(14, report_type)
}

pub fn get_lba_status32(lba: u64, scan: u32, len: u32, report_type: u8) -> Cdb {
    Cdb::long(0x0012).byte(10, report_type).be64(12, lba).be32(20, scan).be32(28, len)
}

// ----- SBC: transfers -------------------------------------------------------------------------

fn rw6(opcode: u8, lba: u32, blocks: u8) -> Cdb {
    assert!(lba < 1 << 21, "a 21-bit address");
    Cdb::new(opcode).be24(1, lba).byte(4, blocks)
}

fn rw10(opcode: u8, lba: u32, blocks: u16) -> Cdb {
    Cdb::new(opcode).be32(2, lba).be16(7, blocks)
}

fn rw12(opcode: u8, lba: u32, blocks: u32) -> Cdb {
    Cdb::new(opcode).be32(2, lba).be32(6, blocks)
}

fn rw16(opcode: u8, lba: u64, blocks: u32) -> Cdb {
    Cdb::new(opcode).be64(2, lba).be32(10, blocks)
}

fn rw32(service_action: u16, lba: u64, blocks: u32) -> Cdb {
    Cdb::long(service_action).be64(12, lba).be32(28, blocks)
}

/// 0 blocks mean 256.
pub fn read6(lba: u32, blocks: u8) -> Cdb {
    rw6(0x08, lba, blocks)
}

pub fn read10(lba: u32, blocks: u16) -> Cdb {
    rw10(0x28, lba, blocks)
}

pub fn read12(lba: u32, blocks: u32) -> Cdb {
    rw12(0xa8, lba, blocks)
}

pub fn read16(lba: u64, blocks: u32) -> Cdb {
    rw16(0x88, lba, blocks)
}

pub fn read32(lba: u64, blocks: u32) -> Cdb {
    rw32(0x0009, lba, blocks)
}

/// 0 blocks mean 256.
pub fn write6(lba: u32, blocks: u8) -> Cdb {
    rw6(0x0a, lba, blocks)
}

pub fn write10(lba: u32, blocks: u16) -> Cdb {
    rw10(0x2a, lba, blocks)
}

pub fn write12(lba: u32, blocks: u32) -> Cdb {
    rw12(0xaa, lba, blocks)
}

pub fn write16(lba: u64, blocks: u32) -> Cdb {
    rw16(0x8a, lba, blocks)
}

pub fn write32(lba: u64, blocks: u32) -> Cdb {
    rw32(0x000b, lba, blocks)
}

/// `bytchk` is 0, 1 or 3.
pub fn write_and_verify10(bytchk: u8, lba: u32, blocks: u16) -> Cdb {
    rw10(0x2e, lba, blocks).or(1, bytchk << 1)
}

pub fn write_and_verify12(bytchk: u8, lba: u32, blocks: u32) -> Cdb {
    rw12(0xae, lba, blocks).or(1, bytchk << 1)
}

pub fn write_and_verify16(bytchk: u8, lba: u64, blocks: u32) -> Cdb {
    rw16(0x8e, lba, blocks).or(1, bytchk << 1)
}

pub fn verify10(bytchk: u8, lba: u32, blocks: u16) -> Cdb {
    rw10(0x2f, lba, blocks).or(1, bytchk << 1)
}

pub fn verify12(bytchk: u8, lba: u32, blocks: u32) -> Cdb {
    rw12(0xaf, lba, blocks).or(1, bytchk << 1)
}

pub fn verify16(bytchk: u8, lba: u64, blocks: u32) -> Cdb {
    rw16(0x8f, lba, blocks).or(1, bytchk << 1)
}

pub fn synchronize_cache10(lba: u32, blocks: u16) -> Cdb {
    rw10(0x35, lba, blocks)
}

pub fn synchronize_cache16(lba: u64, blocks: u32) -> Cdb {
    rw16(0x91, lba, blocks)
}

pub fn pre_fetch10(lba: u32, blocks: u16) -> Cdb {
    rw10(0x34, lba, blocks)
}

pub fn pre_fetch16(lba: u64, blocks: u32) -> Cdb {
    rw16(0x90, lba, blocks)
}

pub fn compare_and_write(lba: u64, blocks: u8) -> Cdb {
    Cdb::new(0x89).be64(2, lba).byte(13, blocks)
}

// ----- SBC: provisioning ----------------------------------------------------------------------

/// FORMAT UNIT; `flags` is byte 1.
pub fn format_unit(flags: u8) -> Cdb {
    Cdb::from_slice(&[0x04, flags, 0, 0, 0, 0])
}

/// SANITIZE; `flags` is byte 1 with the service action.
pub fn sanitize(flags: u8, len: u16) -> Cdb {
    Cdb::from_slice(&[0x48, flags, 0, 0, 0, 0, 0, 0, 0, 0]).be16(7, len)
}

pub fn unmap(anchor: bool, len: u16) -> Cdb {
    Cdb::new(0x42).byte(1, u8::from(anchor)).be16(7, len)
}

/// The parameter list of UNMAP for these (LBA, count) pairs.
pub fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let descriptors = 16 * ranges.len() as u16;
    let mut list = [descriptors + 6, descriptors].map(u16::to_be_bytes).concat();
    list.extend([0; 4]);
    for (lba, count) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

/// `flags` from [`write_same`].
pub fn write_same10(flags: u8, lba: u32, blocks: u16) -> Cdb {
    rw10(0x41, lba, blocks).or(1, flags)
}

pub fn write_same16(flags: u8, lba: u64, blocks: u32) -> Cdb {
    rw16(0x93, lba, blocks).or(1, flags)
}

pub fn write_same32(flags: u8, lba: u64, blocks: u32) -> Cdb {
    rw32(0x000d, lba, blocks).or(10, flags)
}
