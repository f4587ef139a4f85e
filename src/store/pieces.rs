//! Memory to work in: for transfers that O_DIRECT cannot make where the guest has its buffers, and for what is compared,
//! repeated or copied. It is had in pieces, and work that needs more is done piece by piece.
//!
//! Guests decide how much of such work there is at once, so all of them share one budget. Nobody waits for it: who holds a
//! piece may be waiting for a host that hangs. When the budget is used up a piece is small, and not counted: each thread
//! of a pool has few at a time.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Buffers;

/// Most memory in pieces that are not small, in bytes, in the whole process.
const BUDGET: usize = 32 << 20;

/// Longest piece, in bytes.
pub const LONGEST: usize = 1 << 20;

/// Length of a piece when there is no more to be had, in bytes; a multiple of every block size and alignment.
pub const SMALL: usize = 64 << 10;

/// What is in use of a budget.
#[derive(Debug)]
struct Budget {
    used: AtomicUsize,
    most: usize,
}

static ALL: Budget = Budget::new(BUDGET);

impl Budget {
    const fn new(most: usize) -> Self {
        Budget { used: AtomicUsize::new(0), most }
    }

    fn reserve(&self, len: usize) -> bool {
        let reserve = |used: usize| used.checked_add(len).filter(|sum| *sum <= self.most);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve).is_ok()
    }

    fn give_back(&self, len: usize) {
        self.used.fetch_sub(len, Ordering::Relaxed);
    }

    fn piece(&'static self, wanted: usize) -> Option<Piece> {
        let long = wanted.min(LONGEST);
        if long > SMALL && self.reserve(long) {
            // Counted from here on, and given back if there is no memory.
            let mut piece = Piece { memory: Buffers::default(), counted: long, budget: self };
            if let Some(memory) = Buffers::zeroed(long) {
                piece.memory = memory;
                return Some(piece);
            }
        }
        let memory = Buffers::zeroed(wanted.min(SMALL))?;
        Some(Piece { memory, counted: 0, budget: self })
    }
}

/// Memory of our own, page aligned. It holds zeroes at first, and is given back with this value.
#[derive(Debug)]
pub struct Piece {
    memory: Buffers,
    counted: usize,
    budget: &'static Budget,
}

impl Piece {
    /// A piece of `wanted` bytes, or a shorter one: never longer than [`LONGEST`], never shorter than [`SMALL`] unless
    /// that is all that is wanted. `None` if the host has no memory.
    pub fn of(wanted: usize) -> Option<Self> {
        ALL.piece(wanted)
    }
}

impl Deref for Piece {
    type Target = Buffers;

    fn deref(&self) -> &Buffers {
        &self.memory
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // First the memory, then the right to it.
        self.memory = Buffers::default();
        self.budget.give_back(self.counted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_the_budget_is_used_up_pieces_are_small() {
        static BUDGET: Budget = Budget::new(3 * LONGEST + SMALL);
        let lens = |pieces: &[Piece]| pieces.iter().map(|piece| piece.len()).collect::<Vec<_>>();
        let mut pieces: Vec<Piece> = (0..5).map(|_| BUDGET.piece(32 << 20).unwrap()).collect();
        assert_eq!(lens(&pieces), [LONGEST, LONGEST, LONGEST, SMALL, SMALL]);
        assert_eq!(BUDGET.piece(512).unwrap().len(), 512);
        assert_eq!(BUDGET.used.load(Ordering::Relaxed), 3 * LONGEST);
        pieces.remove(0);
        assert_eq!(BUDGET.piece(LONGEST - 512).unwrap().len(), LONGEST - 512);
        drop(pieces);
        assert_eq!(BUDGET.used.load(Ordering::Relaxed), 0);
    }
}
