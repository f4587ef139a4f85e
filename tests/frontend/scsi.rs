//! One SCSI command as virtio-scsi carries it (VIRTIO 1.3, 5.6.6.1), and its answer.

use super::cdb::Cdb;
use super::queue::{Completion, Exchange, Shape};

/// Bytes of the request before the data-out buffer.
pub const REQUEST_HEADER: usize = 51;
/// Bytes of the response before the data-in buffer.
pub const RESPONSE_HEADER: usize = 108;
/// Where the sense data starts in the response.
pub const SENSE_OFFSET: usize = 12;

/// Response codes.
pub mod response {
    pub const OK: u8 = 0;
    pub const OVERRUN: u8 = 1;
    pub const ABORTED: u8 = 2;
    pub const BAD_TARGET: u8 = 3;
    pub const RESET: u8 = 4;
    pub const BUSY: u8 = 5;
    pub const TRANSPORT_FAILURE: u8 = 6;
    pub const TARGET_FAILURE: u8 = 7;
    pub const NEXUS_FAILURE: u8 = 8;
    pub const FAILURE: u8 = 9;
    pub const FUNCTION_SUCCEEDED: u8 = 10;
    pub const FUNCTION_REJECTED: u8 = 11;
    pub const INCORRECT_LUN: u8 = 12;
    /// FUNCTION COMPLETE of a task management request has the number of OK.
    pub const FUNCTION_COMPLETE: u8 = 0;
}

/// Status codes of SAM.
pub mod status {
    pub const GOOD: u8 = 0x00;
    pub const CHECK_CONDITION: u8 = 0x02;
    pub const CONDITION_MET: u8 = 0x04;
    pub const BUSY: u8 = 0x08;
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    pub const TASK_SET_FULL: u8 = 0x28;
    pub const TASK_ABORTED: u8 = 0x40;
}

/// Sense keys.
pub mod key {
    pub const NO_SENSE: u8 = 0x0;
    pub const NOT_READY: u8 = 0x2;
    pub const MEDIUM_ERROR: u8 = 0x3;
    pub const HARDWARE_ERROR: u8 = 0x4;
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    pub const UNIT_ATTENTION: u8 = 0x6;
    pub const DATA_PROTECT: u8 = 0x7;
    pub const COPY_ABORTED: u8 = 0xa;
    pub const ABORTED_COMMAND: u8 = 0xb;
    pub const MISCOMPARE: u8 = 0xe;
}

/// Key, additional sense code and qualifier of sense data that tests look for.
pub mod sense {
    pub type Code = (u8, u8, u8);
    pub const INVALID_OPCODE: Code = (0x5, 0x20, 0x00);
    pub const LBA_OUT_OF_RANGE: Code = (0x5, 0x21, 0x00);
    pub const INVALID_FIELD_IN_CDB: Code = (0x5, 0x24, 0x00);
    pub const LUN_NOT_SUPPORTED: Code = (0x5, 0x25, 0x00);
    pub const INVALID_FIELD_IN_LIST: Code = (0x5, 0x26, 0x00);
    pub const LIST_LENGTH_ERROR: Code = (0x5, 0x1a, 0x00);
    pub const POWER_ON_OR_RESET: Code = (0x6, 0x29, 0x00);
    pub const CAPACITY_CHANGED: Code = (0x6, 0x2a, 0x09);
    pub const MODE_PARAMETERS_CHANGED: Code = (0x6, 0x2a, 0x01);
    pub const REPORTED_LUNS_CHANGED: Code = (0x6, 0x3f, 0x0e);
    pub const WRITE_PROTECTED: Code = (0x7, 0x27, 0x00);
    pub const SPACE_ALLOCATION_FAILED: Code = (0x7, 0x27, 0x07);
    pub const MISCOMPARE: Code = (0xe, 0x1d, 0x00);
}

/// The eight bytes that name a logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address(pub [u8; 8]);

impl Address {
    /// As Linux writes it: flat form, whatever the number.
    pub fn new(target: u8, lun: u16) -> Self {
        Self::flat(target, lun)
    }

    /// Single level, flat space addressing: `01 TT 40|hh ll`.
    pub fn flat(target: u8, lun: u16) -> Self {
        let [high, low] = lun.to_be_bytes();
        Self([1, target, 0x40 | high, low, 0, 0, 0, 0])
    }

    /// Single level, peripheral device addressing: `01 TT 00 nn`.
    pub fn peripheral(target: u8, lun: u8) -> Self {
        Self([1, target, 0, lun, 0, 0, 0, 0])
    }

    /// The REPORT LUNS well-known logical unit of the device: `C1 01`.
    pub fn report_luns_of_device() -> Self {
        Self([0xc1, 0x01, 0, 0, 0, 0, 0, 0])
    }

    /// The REPORT LUNS well-known logical unit of a target: `01 TT C1 01`.
    pub fn report_luns_of(target: u8) -> Self {
        Self([1, target, 0xc1, 0x01, 0, 0, 0, 0])
    }
}

/// SAM's task attributes with the numbers of virtio-scsi.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum TaskAttribute {
    #[default]
    Simple = 0,
    Ordered = 1,
    HeadOfQueue = 2,
    Aca = 3,
}

/// A command to be submitted; built in place.
#[derive(Clone, Debug)]
pub struct ScsiRequest {
    pub address: Address,
    pub tag: u64,
    pub attribute: TaskAttribute,
    pub priority: u8,
    pub crn: u8,
    pub cdb: Cdb,
    pub data_out: Vec<u8>,
    pub data_in: usize,
    pub shape: Shape,
}

impl ScsiRequest {
    pub fn new(address: Address, cdb: Cdb) -> Self {
        Self {
            address,
            tag: 0,
            attribute: TaskAttribute::default(),
            priority: 0,
            crn: 0,
            cdb,
            data_out: Vec::new(),
            data_in: 0,
            shape: Shape::default(),
        }
    }

    pub fn tag(mut self, tag: u64) -> Self {
        self.tag = tag;
        self
    }

    pub fn attribute(mut self, attribute: TaskAttribute) -> Self {
        self.attribute = attribute;
        self
    }

    /// Room for this much data from the device.
    pub fn data_in(mut self, len: usize) -> Self {
        self.data_in = len;
        self
    }

    /// Data for the device.
    pub fn data_out(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.data_out = bytes.into();
        self
    }

    pub fn shape(mut self, shape: Shape) -> Self {
        self.shape = shape;
        self
    }

    /// The request header's bytes.
    pub fn header(&self) -> [u8; REQUEST_HEADER] {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[0..8].copy_from_slice(&self.address.0);
        bytes[8..16].copy_from_slice(&self.tag.to_le_bytes());
        bytes[16] = self.attribute as u8;
        bytes[17] = self.priority;
        bytes[18] = self.crn;
        bytes[19..51].copy_from_slice(&self.cdb.bytes());
        bytes
    }

    pub fn exchange(&self) -> Exchange {
        Exchange {
            readable: [&self.header()[..], &self.data_out].concat(),
            readable_header: REQUEST_HEADER,
            writable: RESPONSE_HEADER + self.data_in,
            writable_header: RESPONSE_HEADER,
            shape: self.shape.clone(),
        }
    }
}

/// The answer to a command.
#[derive(Clone, PartialEq, Eq)]
pub struct ScsiResponse {
    pub response: u8,
    pub status: u8,
    pub status_qualifier: u16,
    pub residual: u32,
    pub sense_len: u32,
    pub sense: Option<Sense>,
    /// The whole data-in buffer, also the part that was not transferred.
    pub buffer: Vec<u8>,
    /// The length in the used ring.
    pub used_len: u32,
}

impl ScsiResponse {
    pub fn parse(completion: &Completion) -> Self {
        let bytes = &completion.writable;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let sense_len = word(0);
        let sense_end = SENSE_OFFSET + sense_len.min(96) as usize;
        Self {
            response: bytes[11],
            status: bytes[10],
            status_qualifier: u16::from_le_bytes([bytes[8], bytes[9]]),
            residual: word(4),
            sense_len,
            sense: Sense::parse(&bytes[SENSE_OFFSET..sense_end]),
            buffer: bytes[RESPONSE_HEADER..].to_vec(),
            used_len: completion.used_len,
        }
    }

    /// The data that was transferred, by the residual count.
    pub fn data(&self) -> &[u8] {
        let len = self.buffer.len().saturating_sub(self.residual as usize);
        &self.buffer[..len]
    }

    pub fn is_good(&self) -> bool {
        self.response == response::OK && self.status == status::GOOD
    }

    /// Key, code and qualifier of a CHECK CONDITION.
    pub fn sense_code(&self) -> Option<sense::Code> {
        let checked = self.response == response::OK && self.status == status::CHECK_CONDITION;
        self.sense.as_ref().filter(|_| checked).map(Sense::code)
    }

    #[track_caller]
    pub fn expect_good(self) -> Self {
        assert!(self.is_good(), "expected GOOD, got {self:?}");
        assert_eq!(self.sense_len, 0, "GOOD comes without sense data: {self:?}");
        self
    }

    /// A CHECK CONDITION with just this sense; returns the details.
    #[track_caller]
    pub fn expect_sense(&self, code: sense::Code) -> &Sense {
        let found = self.sense_code();
        assert!(
            found == Some(code),
            "expected sense {:x}/{:02x}/{:02x}, got {self:?}",
            code.0,
            code.1,
            code.2
        );
        self.sense.as_ref().expect("sense data")
    }

    /// A response code other than OK, and nothing transferred.
    #[track_caller]
    pub fn expect_response(&self, code: u8) -> &Self {
        assert!(self.response == code, "expected response {code}, got {self:?}");
        self
    }
}

impl std::fmt::Debug for ScsiResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "response {} status {:02x}", self.response, self.status)?;
        if let Some(sense) = &self.sense {
            write!(f, " {sense:?}")?;
        }
        write!(f, " residual {} of {}", self.residual, self.buffer.len())?;
        let shown = &self.data()[..self.data().len().min(32)];
        write!(f, " used {} data {shown:02x?}", self.used_len)
    }
}

/// Sense data of either format, taken apart.
#[derive(Clone, PartialEq, Eq)]
pub struct Sense {
    pub response_code: u8,
    pub key: u8,
    pub asc: u8,
    pub ascq: u8,
    /// The INFORMATION field, if it is valid.
    pub information: Option<u64>,
    /// The sense-key specific field, if it is valid.
    pub specific: Option<[u8; 3]>,
    pub raw: Vec<u8>,
}

/// Which field a request had wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPointer {
    /// In the CDB, or else in the parameter list.
    pub in_cdb: bool,
    pub byte: u16,
    pub bit: Option<u8>,
}

impl Sense {
    pub fn parse(raw: &[u8]) -> Option<Self> {
        match raw.first()? & 0x7f {
            0x70 | 0x71 => Some(Self::parse_fixed(raw)),
            0x72 | 0x73 => Some(Self::parse_descriptors(raw)),
            _ => None,
        }
    }

    /// SPC-5, 4.4.3.
    fn parse_fixed(raw: &[u8]) -> Self {
        let byte = |at: usize| raw.get(at).copied().unwrap_or(0);
        let information = u32::from_be_bytes([byte(3), byte(4), byte(5), byte(6)]);
        let specific = [byte(15), byte(16), byte(17)];
        Self {
            response_code: byte(0) & 0x7f,
            key: byte(2) & 0x0f,
            asc: byte(12),
            ascq: byte(13),
            information: (byte(0) & 0x80 != 0).then_some(u64::from(information)),
            specific: (specific[0] & 0x80 != 0).then_some(specific),
            raw: raw.to_vec(),
        }
    }

    /// SPC-5, 4.4.2.
    fn parse_descriptors(raw: &[u8]) -> Self {
        let byte = |at: usize| raw.get(at).copied().unwrap_or(0);
        let mut sense = Self {
            response_code: byte(0) & 0x7f,
            key: byte(1) & 0x0f,
            asc: byte(2),
            ascq: byte(3),
            information: None,
            specific: None,
            raw: raw.to_vec(),
        };
        let mut rest = raw.get(8..).unwrap_or_default();
        while let [kind, len, ..] = *rest {
            let Some((descriptor, tail)) = rest.split_at_checked(usize::from(len) + 2) else {
                break;
            };
            sense.take_descriptor(kind, descriptor);
            rest = tail;
        }
        sense
    }

    fn take_descriptor(&mut self, kind: u8, descriptor: &[u8]) {
        const INFORMATION: u8 = 0;
        const SENSE_KEY_SPECIFIC: u8 = 2;
        match (kind, descriptor) {
            (INFORMATION, [_, _, valid, _, value @ ..]) if valid & 0x80 != 0 => {
                self.information = value.try_into().ok().map(u64::from_be_bytes);
            }
            (SENSE_KEY_SPECIFIC, [_, _, _, _, a, b, c, ..]) if a & 0x80 != 0 => {
                self.specific = Some([*a, *b, *c]);
            }
            _ => {}
        }
    }

    pub fn code(&self) -> sense::Code {
        (self.key, self.asc, self.ascq)
    }

    /// The sense-key specific field of an ILLEGAL REQUEST.
    pub fn field_pointer(&self) -> Option<FieldPointer> {
        let [flags, high, low] = self.specific.filter(|_| self.key == key::ILLEGAL_REQUEST)?;
        Some(FieldPointer {
            in_cdb: flags & 0x40 != 0,
            byte: u16::from_be_bytes([high, low]),
            bit: (flags & 0x08 != 0).then_some(flags & 0x07),
        })
    }
}

impl std::fmt::Debug for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sense {:x}/{:02x}/{:02x}", self.key, self.asc, self.ascq)?;
        if let Some(information) = self.information {
            write!(f, " information {information:#x}")?;
        }
        if let Some(pointer) = self.field_pointer() {
            write!(f, " {pointer:?}")?;
        }
        Ok(())
    }
}
