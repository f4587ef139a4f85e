//! Logical unit numbers and how they are written (SAM-6 4.7).

/// Largest logical unit number in flat space addressing (SAM-6 4.7.7.3).
pub const MAX_LUN: u16 = 0x3fff;

/// A logical unit number, 0 to 16383.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LunNumber(u16);

impl LunNumber {
    /// The first.
    pub const MIN: Self = LunNumber(0);
    /// The last.
    pub const MAX: Self = LunNumber(MAX_LUN);

    /// `None` above [`MAX_LUN`].
    pub fn new(number: u16) -> Option<Self> {
        (number <= MAX_LUN).then_some(LunNumber(number))
    }

    /// The plain number.
    pub fn get(self) -> u16 {
        self.0
    }

    /// As an eight-byte LUN: peripheral device addressing up to 255, flat space above.
    pub fn encode(self) -> [u8; 8] {
        let [high, low] = self.0.to_be_bytes();
        let method = if self.0 > 255 { 0x40 } else { 0 };
        [method | high, low, 0, 0, 0, 0, 0, 0]
    }
}

/// The REPORT LUNS well-known logical unit (SPC-5 8.2).
pub const REPORT_LUNS_WLUN: [u8; 8] = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];
