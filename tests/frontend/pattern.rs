//! Data that says where it belongs, and random numbers that can be repeated.

/// A small generator (splitmix64); the seed is printed by failing tests.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `count` blocks from `lba` on. Every 16 bytes hold the block's address and a number made from
/// address, place and `stamp`, so data of another block, time or place is never taken for it.
pub fn blocks(lba: u64, count: usize, block_size: usize, stamp: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * block_size);
    for lba in (lba..).take(count) {
        for cell in 0..block_size as u64 / 16 {
            bytes.extend_from_slice(&lba.to_be_bytes());
            bytes.extend_from_slice(&mix(mix(lba ^ stamp.rotate_left(32)) ^ cell).to_be_bytes());
        }
    }
    bytes
}

/// Compares and names the first difference instead of printing megabytes.
#[track_caller]
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "length of {what}");
    let Some(at) = found.iter().zip(expected).position(|(f, e)| f != e) else { return };
    let end = (at + 16).min(found.len());
    panic!(
        "{what} differs from byte {at} on: found {:02x?}, expected {:02x?}",
        &found[at..end],
        &expected[at..end]
    );
}
