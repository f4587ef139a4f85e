//! Giving many blocks the same contents, or none: what UNMAP, WRITE SAME, FORMAT UNIT and SANITIZE do
//! to a range, a step at a time.

use super::lun::{ByteRange, Lun};
use super::sense::ScsiError;
use crate::store::{Buffers, Durability, Kind, Piece, Store, StoreError};

/// What becomes of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// They read as zeroes and their space is given back.
    Deallocated,
    /// They read as zeroes and have space.
    Anchored,
    /// Each holds these bytes; one block.
    Pattern(Vec<u8>),
}

impl Fill {
    /// Does it to a range of a disk, by a thread that may wait for others. Before each step `go_on` gets the bytes of
    /// the range that are done.
    ///
    /// # Errors
    /// What the host says, with the first block that is not done; or what `go_on` says.
    pub fn run(
        &self,
        lun: &Lun,
        range: ByteRange,
        go_on: impl FnMut(u64) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        self.run_on(lun.store().as_ref(), lun, range, go_on)
    }

    /// Does it to what there is of a whole disk, likewise: a file that the host made shorter than the disk does not
    /// become longer.
    ///
    /// # Errors
    /// As [`Fill::run`].
    pub fn run_on_all(
        &self,
        lun: &Lun,
        range: ByteRange,
        go_on: impl FnMut(u64) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        self.steps(
            lun.store().as_ref(),
            lun,
            range,
            |store, at, from| store.overwrite(at, from),
            go_on,
        )
    }

    /// Does it to a range that is held, by way of the store that is for that.
    ///
    /// # Errors
    /// As [`Fill::run`].
    pub fn run_on(
        &self,
        store: &dyn Store,
        lun: &Lun,
        range: ByteRange,
        go_on: impl FnMut(u64) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        let write =
            |store: &dyn Store, at, from: &Buffers| store.write(at, from, Durability::Cached);
        self.steps(store, lun, range, write, go_on)
    }

    fn steps(
        &self,
        store: &dyn Store,
        lun: &Lun,
        range: ByteRange,
        write: impl Fn(&dyn Store, u64, &Buffers) -> Result<(), StoreError>,
        mut go_on: impl FnMut(u64) -> Result<(), ScsiError>,
    ) -> Result<(), ScsiError> {
        let chunk = match self {
            Fill::Pattern(block) => Some(repeated(block, &range)?),
            Fill::Deallocated | Fill::Anchored => None,
        };
        let mut at = range.start;
        while at < range.end {
            go_on(at - range.start)?;
            let step = match (self, &chunk) {
                (_, Some(chunk)) => chunk.len() as u64,
                (Fill::Deallocated, None) => store.zeroes_at_a_time(Kind::Hole),
                (_, None) => store.zeroes_at_a_time(Kind::Reserved),
            };
            let end = range.end.min(at.saturating_add(step.max(1)));
            let done = match (self, &chunk) {
                (Fill::Deallocated, _) => store.deallocate(at..end),
                (Fill::Anchored, _) => store.reserve(at..end),
                (Fill::Pattern(_), None) => Ok(()),
                (Fill::Pattern(_), Some(chunk)) => {
                    let len = usize::try_from(end - at).unwrap_or(usize::MAX);
                    write(store, at, &chunk.slice(0, len))
                }
            };
            done.map_err(|e| ScsiError::from_store(e, true, lun.block_size()))?;
            at = end;
        }
        Ok(())
    }
}

/// A chunk of copies of a block, as long as the range at most; whole blocks, as every piece is.
fn repeated(block: &[u8], range: &ByteRange) -> Result<Piece, ScsiError> {
    let whole = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let chunk = Piece::of(whole).ok_or(ScsiError::Busy)?;
    let mut filled = 0;
    while filled < chunk.len() && !block.is_empty() {
        filled += chunk.write_at(filled, block);
    }
    Ok(chunk)
}
