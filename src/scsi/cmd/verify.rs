//! VERIFY with BYTCHK 0, 1 and 3, WRITE AND VERIFY with 0 and 1 (10, 12, 16, 32) (SBC-4 5.36, 5.47).

use std::sync::Arc;

use super::rw::{BlockCdb, range_of};
use super::{Context, Reply};
use crate::scsi::lun::{BlockRange, Lun};
use crate::scsi::sense::ScsiError;
use crate::scsi::statistics::Activity;
use crate::store::engine::{Cancel, Need};
use crate::store::{Buffers, Durability, Piece, Store};

/// Memory that one verification uses to read into, in bytes.
const CHUNK: usize = 256 << 10;

/// What the medium is compared with.
enum Against {
    /// Nothing: it only has to be readable (BYTCHK 00b).
    Nothing,
    /// The data-out buffer, block for block (01b).
    All,
    /// One block, over and over (11b).
    OneBlock,
}

impl Against {
    fn parse(cdb: BlockCdb) -> Result<Self, ScsiError> {
        match cdb.bytchk() {
            0 => Ok(Against::Nothing),
            1 => Ok(Against::All),
            3 => Ok(Against::OneBlock),
            _ => Err(ScsiError::cdb_field(cdb.flags_byte, 2)),
        }
    }

    /// Bytes of data-out that the command needs.
    fn data_out(&self, range: &BlockRange, block_size: u32) -> usize {
        match self {
            _ if range.bytes == 0 => 0,
            Against::Nothing => 0,
            Against::All => range.bytes,
            Against::OneBlock => block_size as usize,
        }
    }

    /// Where the byte at `position` of the range is found in the data-out buffer.
    fn position(&self, position: usize, block_size: u32) -> usize {
        match self {
            Against::Nothing | Against::All => position,
            Against::OneBlock => position % (block_size as usize).max(1),
        }
    }
}

/// VERIFY.
pub(super) fn verify(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (cdb, range) = range_of(&context)?;
    let against = Against::parse(cdb)?;
    let needed = against.data_out(&range, context.lun.block_size());
    let expected = context.data_out(needed)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    let lun = Arc::clone(context.lun);
    let job = move |cancel: &Cancel, store: &dyn Store| {
        // Once: what others write meanwhile is not what is to be verified.
        let flushed = lun.flush();
        let compared =
            flushed.and_then(|()| compare(&lun, store, &range, &against, &expected, cancel));
        lun.account(Activity::Verify, range.bytes, &compared);
        compared.map(|()| needed)
    };
    Ok(Reply::Needy(Need::Together(vec![range.in_store()]), Box::new(job)))
}

/// WRITE AND VERIFY: the data reaches the medium and is read back from there. BYTCHK 11b is reserved
/// here (SBC-4 5.47); the table keeps it away.
pub(super) fn write_and_verify(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (cdb, range) = range_of(&context)?;
    let against = Against::parse(cdb)?;
    let data = context.data_out(range.bytes)?;
    if range.bytes == 0 {
        return Ok(Reply::Good);
    }
    let lun = Arc::clone(context.lun);
    let job = move |cancel: &Cancel, store: &dyn Store| {
        stop_if(cancel)?;
        let written = store.write(range.offset, &data, Durability::Stable);
        let written = written.map_err(|e| ScsiError::from_store(e, true, lun.block_size()));
        lun.account(Activity::Write, range.bytes, &written);
        written?;
        let compared = compare(&lun, store, &range, &against, &data, cancel);
        lun.account(Activity::Verify, range.bytes, &compared);
        compared.map(|()| range.bytes)
    };
    Ok(Reply::Needy(Need::Together(vec![range.in_store()]), Box::new(job)))
}

/// Reads the range from the medium, to where it was flushed, and compares it; the first difference is a MISCOMPARE.
fn compare(
    lun: &Lun,
    store: &dyn Store,
    range: &BlockRange,
    against: &Against,
    expected: &Buffers,
    cancel: &Cancel,
) -> Result<(), ScsiError> {
    let own = Piece::of(CHUNK.min(range.bytes)).ok_or(ScsiError::Busy)?;
    let mut done = 0;
    while done < range.bytes {
        stop_if(cancel)?;
        let len = own.len().min(range.bytes - done);
        let chunk = own.slice(0, len);
        store
            .read_medium(range.offset + done as u64, &chunk)
            .map_err(|e| ScsiError::from_store(e, false, lun.block_size()))?;
        if !matches!(against, Against::Nothing) {
            let want = |at, into: &mut [u8]| {
                expected.read_at(against.position(done + at, lun.block_size()), into)
            };
            if let Some(at) = first_difference(&chunk, want) {
                return Err(ScsiError::miscompare((done + at) as u64));
            }
        }
        done += len;
    }
    Ok(())
}

/// The first byte in which what was found differs from what is expected. `expected(at, into)` copies bytes from `at` on,
/// and says how many; it may stop early, but not before it has copied one.
pub(super) fn first_difference(
    found: &Buffers,
    expected: impl Fn(usize, &mut [u8]) -> usize,
) -> Option<usize> {
    let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
    let mut at = 0;
    while at < found.len() {
        let len = expected(at, &mut theirs);
        let (ours, theirs) = (ours.get_mut(..len)?, theirs.get(..len)?);
        let len = found.read_at(at, ours);
        let (ours, theirs) = (ours.get(..len)?, theirs.get(..len)?);
        if ours != theirs {
            return ours.iter().zip(theirs).position(|(a, b)| a != b).map(|n| at + n);
        }
        if len == 0 {
            return Some(at);
        }
        at += len;
    }
    None
}

fn stop_if(cancel: &Cancel) -> Result<(), ScsiError> {
    if cancel.is_requested() { Err(ScsiError::Aborted) } else { Ok(()) }
}
