//! Errors as an initiator sees them: sense keys, additional sense codes and their encoding
//! (SPC-5 4.4), and the one map from what the store says.

use crate::store::{Cause, StoreError};

/// Sense key (SPC-5 table 28).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Key {
    NoSense = 0x0,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    CopyAborted = 0xa,
    AbortedCommand = 0xb,
    Miscompare = 0xe,
}

/// Additional sense code and qualifier in one number: 2400h is INVALID FIELD IN CDB.
pub type Asc = u16;

#[allow(missing_docs)]
pub mod asc {
    use super::Asc;
    pub const NONE: Asc = 0x0000;
    pub const OPERATION_IN_PROGRESS: Asc = 0x0016;
    pub const NOT_READY_INITIALIZING_COMMAND_REQUIRED: Asc = 0x0402;
    pub const NOT_READY_MANUAL_INTERVENTION_REQUIRED: Asc = 0x0403;
    pub const NOT_READY_FORMAT_IN_PROGRESS: Asc = 0x0404;
    pub const NOT_READY_SELF_TEST_IN_PROGRESS: Asc = 0x0409;
    pub const NOT_READY_SANITIZE_IN_PROGRESS: Asc = 0x041b;
    pub const UNREACHABLE_COPY_TARGET: Asc = 0x0804;
    pub const WRITE_ERROR: Asc = 0x0c00;
    pub const THIRD_PARTY_DEVICE_FAILURE: Asc = 0x0d01;
    pub const COPY_TARGET_DEVICE_NOT_REACHABLE: Asc = 0x0d02;
    pub const INCORRECT_COPY_TARGET_DEVICE_TYPE: Asc = 0x0d03;
    pub const UNRECOVERED_READ_ERROR: Asc = 0x1100;
    pub const PARAMETER_LIST_LENGTH_ERROR: Asc = 0x1a00;
    pub const MISCOMPARE_DURING_VERIFY: Asc = 0x1d00;
    pub const INVALID_OPCODE: Asc = 0x2000;
    pub const LBA_OUT_OF_RANGE: Asc = 0x2100;
    pub const UNSUPPORTED_TOKEN_TYPE: Asc = 0x2301;
    pub const TOKEN_UNKNOWN: Asc = 0x2304;
    pub const TOKEN_CORRUPT: Asc = 0x2305;
    pub const TOKEN_REVOKED: Asc = 0x2306;
    pub const TOKEN_EXPIRED: Asc = 0x2307;
    pub const TOKEN_DELETED: Asc = 0x2309;
    pub const INVALID_TOKEN_LENGTH: Asc = 0x230a;
    pub const INVALID_FIELD_IN_CDB: Asc = 0x2400;
    pub const LOGICAL_UNIT_NOT_SUPPORTED: Asc = 0x2500;
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Asc = 0x2600;
    pub const INVALID_RELEASE_OF_PERSISTENT_RESERVATION: Asc = 0x2604;
    pub const TOO_MANY_TARGET_DESCRIPTORS: Asc = 0x2606;
    pub const UNSUPPORTED_TARGET_DESCRIPTOR_TYPE: Asc = 0x2607;
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: Asc = 0x2608;
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE: Asc = 0x2609;
    pub const UNEXPECTED_INEXACT_SEGMENT: Asc = 0x260a;
    pub const INLINE_DATA_LENGTH_EXCEEDED: Asc = 0x260b;
    pub const WRITE_PROTECTED: Asc = 0x2700;
    pub const SOFTWARE_WRITE_PROTECTED: Asc = 0x2702;
    pub const SPACE_ALLOCATION_FAILED: Asc = 0x2707;
    pub const POWER_ON_OR_RESET: Asc = 0x2900;
    pub const I_T_NEXUS_LOSS: Asc = 0x2907;
    pub const COMMAND_SEQUENCE_ERROR: Asc = 0x2c00;
    pub const MODE_PARAMETERS_CHANGED: Asc = 0x2a01;
    pub const LOG_PARAMETERS_CHANGED: Asc = 0x2a02;
    pub const RESERVATIONS_PREEMPTED: Asc = 0x2a03;
    pub const RESERVATIONS_RELEASED: Asc = 0x2a04;
    pub const REGISTRATIONS_PREEMPTED: Asc = 0x2a05;
    pub const CAPACITY_DATA_CHANGED: Asc = 0x2a09;
    pub const TIMESTAMP_CHANGED: Asc = 0x2a10;
    pub const MEDIUM_FORMAT_CORRUPTED: Asc = 0x3100;
    pub const SANITIZE_COMMAND_FAILED: Asc = 0x3103;
    pub const THIN_PROVISIONING_SOFT_THRESHOLD_REACHED: Asc = 0x3807;
    pub const SAVING_PARAMETERS_NOT_SUPPORTED: Asc = 0x3900;
    pub const DEVICE_IDENTIFIER_CHANGED: Asc = 0x3f05;
    pub const LOGICAL_UNIT_FAILED_SELF_TEST: Asc = 0x3e03;
    pub const REPORTED_LUNS_DATA_CHANGED: Asc = 0x3f0e;
    pub const INTERNAL_TARGET_FAILURE: Asc = 0x4400;
    pub const INSUFFICIENT_REGISTRATION_RESOURCES: Asc = 0x5504;
}

/// Sense data before it is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: Key,
    /// Additional sense code and qualifier.
    pub asc: Asc,
    /// What is said beyond that, as the sense key defines it.
    pub specific: Option<KeySpecific>,
    /// INFORMATION: an LBA or an offset, as the command defines.
    pub information: Option<u64>,
    /// COMMAND-SPECIFIC INFORMATION.
    pub command_specific: Option<u64>,
}

/// Sense key specific data (SPC-5 4.4.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySpecific {
    /// Which field was wrong, for ILLEGAL REQUEST.
    Field(FieldPointer),
    /// How far a long operation has come, in 65536ths, for NOT READY and NO SENSE.
    Progress(u16),
}

/// Points at the field in error (SPC-5 4.4.2.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPointer {
    /// Whether the byte is in the CDB rather than in the parameter list.
    pub in_cdb: bool,
    /// The byte.
    pub byte: u16,
    /// Its leftmost bit in error, where one can be named.
    pub bit: Option<u8>,
}

impl Sense {
    /// Sense data without details.
    pub const fn new(key: Key, asc: Asc) -> Self {
        Sense { key, asc, specific: None, information: None, command_specific: None }
    }

    /// Encodes in fixed (70h) or descriptor (72h) format.
    pub fn encode(&self, descriptor_format: bool) -> Vec<u8> {
        if descriptor_format { self.encode_descriptors() } else { self.encode_fixed() }
    }

    fn encode_fixed(&self) -> Vec<u8> {
        // INFORMATION has four bytes here; what does not fit is not valid (SPC-5 4.4.3).
        let information = self.information.and_then(|i| u32::try_from(i).ok());
        let [asc, ascq] = self.asc.to_be_bytes();
        let [i0, i1, i2, i3] = information.unwrap_or(0).to_be_bytes();
        let [s0, s1, s2] = self.specific.map_or([0; 3], KeySpecific::encode);
        let command = self.command_specific.and_then(|c| u32::try_from(c).ok()).unwrap_or(0);
        let [c0, c1, c2, c3] = command.to_be_bytes();
        let valid = if information.is_some() { 0x80 } else { 0 };
        vec![
            0x70 | valid,
            0,
            self.key as u8,
            i0,
            i1,
            i2,
            i3,
            10,
            c0,
            c1,
            c2,
            c3,
            asc,
            ascq,
            0,
            s0,
            s1,
            s2,
        ]
    }

    fn encode_descriptors(&self) -> Vec<u8> {
        let [asc, ascq] = self.asc.to_be_bytes();
        let mut descriptors = Vec::new();
        if let Some(information) = self.information {
            descriptors.extend([0x00, 0x0a, 0x80, 0x00]);
            descriptors.extend(information.to_be_bytes());
        }
        if let Some(command) = self.command_specific {
            descriptors.extend([0x01, 0x0a, 0x00, 0x00]);
            descriptors.extend(command.to_be_bytes());
        }
        if let Some(specific) = self.specific {
            let [s0, s1, s2] = specific.encode();
            descriptors.extend([0x02, 0x06, 0, 0, s0, s1, s2, 0]);
        }
        let len = u8::try_from(descriptors.len()).unwrap_or(u8::MAX);
        let mut sense = vec![0x72, self.key as u8, asc, ascq, 0, 0, 0, len];
        sense.append(&mut descriptors);
        sense
    }
}

impl KeySpecific {
    fn encode(self) -> [u8; 3] {
        match self {
            KeySpecific::Field(field) => field.encode(),
            KeySpecific::Progress(progress) => {
                let [high, low] = progress.to_be_bytes();
                [0x80, high, low]
            }
        }
    }
}

impl FieldPointer {
    /// The three sense-key specific bytes: SKSV, C/D, BPV, bit pointer, field pointer.
    fn encode(self) -> [u8; 3] {
        let [high, low] = self.byte.to_be_bytes();
        let in_cdb = if self.in_cdb { 0x40 } else { 0 };
        let bit = self.bit.map_or(0, |bit| 0x08 | (bit & 7));
        [0x80 | in_cdb | bit, high, low]
    }
}

/// Why a command did not end with GOOD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScsiError {
    /// CHECK CONDITION with this sense data.
    Check(Sense),
    /// BUSY: the host is short of a resource right now.
    Busy,
    /// RESERVATION CONFLICT: another initiator has reserved the disk.
    ReservationConflict,
    /// The CDB asks for more bytes than the initiator gave buffers for (VIRTIO 5.6.6.1.1 OVERRUN).
    Overrun,
    /// Ended by a task management function; the initiator is told by that function's answer.
    Aborted,
}

impl ScsiError {
    /// 05/20/00.
    pub const INVALID_OPCODE: Self = Self::illegal(asc::INVALID_OPCODE);
    /// 05/21/00.
    pub const LBA_OUT_OF_RANGE: Self = Self::illegal(asc::LBA_OUT_OF_RANGE);
    /// 05/1A/00.
    pub const PARAMETER_LIST_LENGTH: Self = Self::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);

    /// ILLEGAL REQUEST with an additional sense code.
    pub const fn illegal(asc: Asc) -> Self {
        ScsiError::Check(Sense::new(Key::IllegalRequest, asc))
    }

    /// 05/24/00, pointing at a byte and the leftmost wrong bit of the CDB.
    pub const fn cdb_field(byte: u16, bit: u8) -> Self {
        Self::field(asc::INVALID_FIELD_IN_CDB, true, byte, Some(bit))
    }

    /// 05/26/00, pointing at a byte of the parameter list and, where known, a bit of it.
    pub const fn parameter_field(byte: u16, bit: Option<u8>) -> Self {
        Self::field(asc::INVALID_FIELD_IN_PARAMETER_LIST, false, byte, bit)
    }

    const fn field(asc: Asc, in_cdb: bool, byte: u16, bit: Option<u8>) -> Self {
        let mut sense = Sense::new(Key::IllegalRequest, asc);
        sense.specific = Some(KeySpecific::Field(FieldPointer { in_cdb, byte, bit }));
        ScsiError::Check(sense)
    }

    /// 0E/1D/00: the first byte that differs, counted from the start of the data-out buffer.
    pub const fn miscompare(offset: u64) -> Self {
        let mut sense = Sense::new(Key::Miscompare, asc::MISCOMPARE_DURING_VERIFY);
        sense.information = Some(offset);
        ScsiError::Check(sense)
    }

    /// The one map from what the host said to what the initiator hears. INFORMATION is the first
    /// logical block that was not transferred.
    pub fn from_store(error: StoreError, writing: bool, block_size: u32) -> Self {
        let (key, asc) = match error.cause {
            Cause::NoSpace => (Key::DataProtect, asc::SPACE_ALLOCATION_FAILED),
            Cause::ReadOnly => (Key::DataProtect, asc::WRITE_PROTECTED),
            Cause::Medium if writing => (Key::MediumError, asc::WRITE_ERROR),
            Cause::Medium => (Key::MediumError, asc::UNRECOVERED_READ_ERROR),
            Cause::Busy => return ScsiError::Busy,
            Cause::Cancelled => return ScsiError::Aborted,
        };
        let information = error.at.map(|at| at / u64::from(block_size.max(1)));
        ScsiError::Check(Sense { information, ..Sense::new(key, asc) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format() {
        let ScsiError::Check(sense) = ScsiError::cdb_field(2, 5) else { panic!() };
        let bytes = sense.encode(false);
        assert_eq!(bytes.len(), 18);
        assert_eq!((bytes[0], bytes[2], bytes[7], bytes[12], bytes[13]), (0x70, 5, 10, 0x24, 0));
        assert_eq!(bytes[15..18], [0xcd, 0, 2]);
    }

    #[test]
    fn information_that_does_not_fit_is_not_valid_in_fixed_format() {
        let sense = Sense { information: Some(1 << 32), ..Sense::new(Key::MediumError, 0x1100) };
        assert_eq!(sense.encode(false)[0], 0x70);
        let bytes = sense.encode(true);
        assert_eq!(bytes[..8], [0x72, 3, 0x11, 0, 0, 0, 0, 12]);
        assert_eq!(bytes[8..], [0, 10, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        let small = Sense { information: Some(7), ..sense };
        assert_eq!(small.encode(false)[..7], [0xf0, 0, 3, 0, 0, 0, 7]);
    }

    #[test]
    fn progress_is_sense_key_specific() {
        let specific = Some(KeySpecific::Progress(0x1234));
        let sense = Sense { specific, ..Sense::new(Key::NotReady, 0x0404) };
        assert_eq!(sense.encode(false)[15..18], [0x80, 0x12, 0x34]);
        assert_eq!(sense.encode(true)[8..], [2, 6, 0, 0, 0x80, 0x12, 0x34, 0]);
    }

    #[test]
    fn no_store_error_is_good() {
        for cause in [Cause::NoSpace, Cause::ReadOnly, Cause::Medium] {
            for writing in [false, true] {
                let error = ScsiError::from_store(StoreError::at(cause, 5120), writing, 512);
                let ScsiError::Check(sense) = error else { panic!("{cause:?}: {error:?}") };
                assert_ne!(sense.key, Key::NoSense);
                assert_eq!(sense.information, Some(10));
            }
        }
    }
}
