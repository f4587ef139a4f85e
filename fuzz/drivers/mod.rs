//! What the fuzz targets make of their bytes. The corpora are replayed through the same by
//! tests/fuzz_corpora.rs.
#![allow(dead_code, clippy::cast_possible_truncation)]

pub mod chains;
pub mod commands;
pub mod disk;
pub mod messages;
pub mod parameters;
pub mod session;

/// Bytes that are taken from the front. What is missing is zero.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        let mut taken = taken.to_vec();
        taken.resize(len, 0);
        taken
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1)[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
}
