//! Pieces of wire format that several commands share. Numbers are big-endian, as in all of SCSI.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use zerocopy::big_endian::{U16, U32, U64};

use super::sense::ScsiError;

/// A 24-bit number.
pub type U24 = [u8; 3];

/// Longest CDB that the transport carries, in bytes (QEMU fixes virtio-scsi's `cdb_size` to 32).
pub const CDB_SIZE: usize = 32;

/// A command descriptor block, zero-padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb(pub [u8; CDB_SIZE]);

impl Cdb {
    /// A CDB from its leading bytes; what does not fit is cut off.
    pub fn new(bytes: &[u8]) -> Self {
        let mut cdb = [0; CDB_SIZE];
        for (to, from) in cdb.iter_mut().zip(bytes) {
            *to = *from;
        }
        Cdb(cdb)
    }

    /// Operation code.
    pub fn opcode(&self) -> u8 {
        self.byte(0)
    }

    /// Byte `n`; 0 beyond the end.
    pub fn byte(&self, n: usize) -> u8 {
        self.0.get(n).copied().unwrap_or(0)
    }

    /// All of it in words of the host's order, to look at many bits at once.
    pub fn words(&self) -> [u64; CDB_SIZE / 8] {
        let mut words = [0; CDB_SIZE / 8];
        for (word, bytes) in words.iter_mut().zip(self.0.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        words
    }

    /// The CDB in its typed form.
    ///
    /// # Errors
    /// INVALID COMMAND OPERATION CODE if `T` is longer than a CDB can be (a slip in the table).
    pub fn view<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &self,
    ) -> Result<&T, ScsiError> {
        match T::ref_from_prefix(&self.0) {
            Ok((view, _)) => Ok(view),
            Err(_) => Err(ScsiError::INVALID_OPCODE),
        }
    }
}

/// The bytes of a wire structure as a vector, to which variable parts are appended.
pub fn bytes_of<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// ASCII text in a field of fixed length: left-aligned, padded with spaces (SPC-5 4.3.1).
pub fn ascii_field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

/// A length as a 16-bit field. Everything we build is far shorter than that.
pub fn len16(len: usize) -> U16 {
    U16::new(u16::try_from(len).unwrap_or(u16::MAX))
}

/// A length as a 32-bit field.
pub fn len32(len: usize) -> U32 {
    U32::new(u32::try_from(len).unwrap_or(u32::MAX))
}

/// A length as an 8-bit field.
pub fn len8(len: usize) -> u8 {
    u8::try_from(len).unwrap_or(u8::MAX)
}

/// An allocation length from a CDB as a number of bytes.
pub fn allocation(length: impl Into<u64>) -> usize {
    usize::try_from(length.into()).unwrap_or(usize::MAX)
}

/// A number as a 24-bit field; the block sizes it is used for are far below its limit.
pub fn len24(number: u32) -> U24 {
    let [_, high, middle, low] = number.to_be_bytes();
    [high, middle, low]
}

/// The number in a 24-bit field.
pub fn from24(field: U24) -> u32 {
    let [high, middle, low] = field;
    u32::from_be_bytes([0, high, middle, low])
}

/// Bytes from hexadecimal digits; what is none is left out.
pub fn from_hex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
