//! GET LBA STATUS (16, 32) (SBC-4 5.6, 5.7): which blocks are mapped, anchored or deallocated, from
//! the extents of the store. It runs beside I/O, and its cost is that of the descriptors it returns.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::lun::Lun;
use crate::scsi::sense::ScsiError;
use crate::scsi::wire::{U16, U32, U64, bytes_of, len32};
use crate::store::engine::Cancel;
use crate::store::{Extent, Kind};

/// Most descriptors in one answer: no list that is made for it takes more than 64 KiB.
const MAX_DESCRIPTORS: usize = 2048;

/// Walks of the store that one command may make; a badly fragmented file gets a shorter answer.
const MAX_WALKS: usize = 16;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GetLbaStatus16 {
    opcode: u8,
    service_action: u8,
    lba: U64,
    allocation: U32,
    report_type: u8,
    control: u8,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GetLbaStatus32 {
    opcode: u8,
    control: u8,
    reserved: [u8; 5],
    additional_length: u8,
    service_action: U16,
    report_type: u8,
    reserved2: u8,
    lba: U64,
    scan_length: U32,
    element: U32,
    allocation: U32,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    length: U32,
    reserved: [u8; 3],
    /// COMPLETION CONDITION and RTP.
    condition: u8,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Descriptor {
    lba: U64,
    blocks: U32,
    provisioning: u8,
    additional: u8,
    reserved: U16,
}

/// PROVISIONING STATUS. Plain data is "mapped", not SBC-4's "mapped or unknown": that is what today's
/// initiators know.
fn provisioning_status(kind: Kind) -> u8 {
    match kind {
        Kind::Data => 0,
        Kind::Hole => 1,
        Kind::Reserved => 2,
    }
}

/// Which blocks an initiator wants to hear of (SBC-4 table 68).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReportType {
    All,
    NotMapped,
    Only(Kind),
    /// Blocks that may give errors: none is known to.
    Nothing,
}

impl ReportType {
    fn parse(code: u8, byte: u16) -> Result<Self, ScsiError> {
        Ok(match code {
            0x00 => ReportType::All,
            0x01 => ReportType::NotMapped,
            0x02 => ReportType::Only(Kind::Data),
            0x03 => ReportType::Only(Kind::Hole),
            0x04 => ReportType::Only(Kind::Reserved),
            0x10 | 0x11 => ReportType::Nothing,
            _ => return Err(ScsiError::cdb_field(byte, 7)),
        })
    }

    fn wants(self, kind: Kind) -> bool {
        match self {
            ReportType::All => true,
            ReportType::NotMapped => kind != Kind::Data,
            ReportType::Only(only) => kind == only,
            ReportType::Nothing => false,
        }
    }
}

/// COMPLETION CONDITION: why the list ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Condition {
    NotSaid = 0,
    AllocationLength = 1,
    ScanLength = 2,
    EndOfMedium = 3,
}

/// What is asked.
struct Query {
    lba: u64,
    /// Blocks to look at; 0: all.
    scan: u64,
    report: ReportType,
    allocation: usize,
}

/// GET LBA STATUS(16).
pub(super) fn get_lba_status_16(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &GetLbaStatus16 = context.request.cdb.view()?;
    let query = Query {
        lba: cdb.lba.get(),
        scan: 0,
        report: ReportType::parse(cdb.report_type, 14)?,
        allocation: wire::allocation(cdb.allocation.get()),
    };
    answer(context, query)
}

/// GET LBA STATUS(32). ELEMENT IDENTIFIER must be zero: there are no storage elements.
pub(super) fn get_lba_status_32(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &GetLbaStatus32 = context.request.cdb.view()?;
    let query = Query {
        lba: cdb.lba.get(),
        scan: cdb.scan_length.get().into(),
        report: ReportType::parse(cdb.report_type, 10)?,
        allocation: wire::allocation(cdb.allocation.get()),
    };
    answer(context, query)
}

fn answer(context: Context<'_>, query: Query) -> Result<Reply, ScsiError> {
    if query.lba >= context.lun.blocks() {
        return Err(ScsiError::LBA_OUT_OF_RANGE);
    }
    let (lun, allocation) = (Arc::clone(context.lun), query.allocation);
    super::data_job(context.request, allocation, move |cancel| {
        let (runs, condition) = collect(&lun, &query, cancel)?;
        Ok(encode(&runs, condition))
    })
}

/// Blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    lba: u64,
    blocks: u64,
    kind: Kind,
}

/// The runs that are asked for, no more than fit.
fn collect(lun: &Lun, query: &Query, cancel: &Cancel) -> Result<(Vec<Run>, Condition), ScsiError> {
    let capacity = lun.blocks();
    let scan_end = match query.scan {
        0 => capacity,
        scan => capacity.min(query.lba.saturating_add(scan)),
    };
    let room = query.allocation.saturating_sub(size_of::<Header>());
    let fits = room.div_ceil(size_of::<Descriptor>()).clamp(1, MAX_DESCRIPTORS);
    let mut found = Runs::default();
    let mut at = query.lba;
    let mut walks = 0;
    while at < scan_end && found.descriptors <= fits && walks < MAX_WALKS {
        if cancel.is_requested() {
            return Err(ScsiError::Aborted);
        }
        if query.report == ReportType::Nothing {
            at = scan_end;
            break;
        }
        walks += 1;
        for run in runs(lun, at, scan_end, fits + 1)? {
            at = run.lba + run.blocks;
            if query.report.wants(run.kind) {
                found.push(run);
            }
        }
    }
    let condition = if found.descriptors > fits {
        Condition::AllocationLength
    } else if at >= capacity {
        Condition::EndOfMedium
    } else if at >= scan_end {
        Condition::ScanLength
    } else {
        Condition::NotSaid
    };
    Ok((found.first(fits), condition))
}

/// Runs of blocks, each as long as a descriptor can say, neighbours of one kind merged.
#[derive(Default)]
struct Runs {
    list: Vec<Run>,
    descriptors: usize,
}

/// Blocks that one descriptor can tell of.
const MAX_RUN: u64 = u32::MAX as u64;

impl Runs {
    fn push(&mut self, run: Run) {
        match self.list.last_mut() {
            Some(last) if last.kind == run.kind && last.lba + last.blocks == run.lba => {
                self.descriptors -= descriptors(last.blocks);
                last.blocks += run.blocks;
                self.descriptors += descriptors(last.blocks);
            }
            _ => {
                self.descriptors += descriptors(run.blocks);
                self.list.push(run);
            }
        }
    }

    /// Split into descriptors, the first `count` of them.
    fn first(self, count: usize) -> Vec<Run> {
        let pieces = self.list.into_iter().flat_map(|run| {
            (0..run.blocks).step_by(usize::try_from(MAX_RUN).unwrap_or(usize::MAX)).map(
                move |offset| Run {
                    lba: run.lba + offset,
                    blocks: (run.blocks - offset).min(MAX_RUN),
                    kind: run.kind,
                },
            )
        });
        pieces.take(count).collect()
    }
}

fn descriptors(blocks: u64) -> usize {
    usize::try_from(blocks.div_ceil(MAX_RUN)).unwrap_or(usize::MAX)
}

/// The runs of `lba..end`, as many as one walk of the store finds; at least one.
fn runs(lun: &Lun, lba: u64, end: u64, limit: usize) -> Result<Vec<Run>, ScsiError> {
    let block = u64::from(lun.block_size());
    if !lun.is_thin() {
        // Fully provisioned: every block is mapped, whatever the host does (SBC-4 4.7.2).
        return Ok(vec![Run { lba, blocks: end - lba, kind: Kind::Data }]);
    }
    let extents = lun.store().extents(lba * block..end * block, limit);
    let extents = extents.map_err(|e| ScsiError::from_store(e, false, lun.block_size()))?;
    Ok(blocks_of(&extents, lba, block))
}

/// Byte extents, the first of which begins with block `lba`, as runs of blocks. A block with one byte
/// of data is mapped; one that is only partly anchored has no claim to be. A block that the list ends
/// in is left for the next walk, unless it is the only one: then it may as well be mapped.
fn blocks_of(extents: &[Extent], lba: u64, block: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut push = |run: Run| match runs.last_mut() {
        Some(last) if last.kind == run.kind => last.blocks += run.blocks,
        _ if run.blocks > 0 => runs.push(run),
        _ => {}
    };
    let mut next = lba;
    let mut partial: Option<(u64, Kind)> = None;
    for extent in extents {
        let kind = extent.kind;
        let mut len = extent.range.end - extent.range.start;
        if let Some((filled, so_far)) = partial.take() {
            let take = len.min(block - filled);
            let kind = combined(so_far, kind);
            len -= take;
            if filled + take < block {
                partial = Some((filled + take, kind));
                continue;
            }
            push(Run { lba: next, blocks: 1, kind });
            next += 1;
        }
        push(Run { lba: next, blocks: len / block, kind });
        next += len / block;
        partial = (len % block > 0).then_some((len % block, kind));
    }
    if runs.is_empty() {
        runs.push(Run { lba, blocks: 1, kind: Kind::Data });
    }
    runs
}

/// What a block is of which parts are different.
fn combined(a: Kind, b: Kind) -> Kind {
    match (a, b) {
        (Kind::Data, _) | (_, Kind::Data) => Kind::Data,
        (Kind::Reserved, Kind::Reserved) => Kind::Reserved,
        (Kind::Hole | Kind::Reserved, Kind::Hole | Kind::Reserved) => Kind::Hole,
    }
}

fn encode(runs: &[Run], condition: Condition) -> Vec<u8> {
    let list = size_of_val(runs) / size_of::<Run>() * size_of::<Descriptor>();
    let header = Header {
        length: len32(size_of::<Header>() - 4 + list),
        reserved: [0; 3],
        // RTP: the report type was looked at.
        condition: (condition as u8) << 1 | 1,
    };
    let mut bytes = bytes_of(&header);
    for run in runs {
        bytes.extend(bytes_of(&Descriptor {
            lba: U64::new(run.lba),
            blocks: U32::new(u32::try_from(run.blocks).unwrap_or(u32::MAX)),
            provisioning: provisioning_status(run.kind),
            additional: 0,
            reserved: U16::ZERO,
        }));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(letters: &str) -> Vec<Extent> {
        let kind = |c| match c {
            'd' => Kind::Data,
            'u' => Kind::Reserved,
            _ => Kind::Hole,
        };
        letters
            .chars()
            .zip(0u64..)
            .map(|(c, at)| Extent { range: at..at + 1, kind: kind(c) })
            .collect()
    }

    fn letters(extents: &str, block: u64) -> String {
        let letter = |kind| match kind {
            Kind::Data => "d",
            Kind::Reserved => "u",
            Kind::Hole => ".",
        };
        let runs = blocks_of(&super::tests::extents(extents), 7, block);
        let mut next = 7;
        let text = runs.iter().map(|run| {
            assert_eq!(run.lba, next);
            next += run.blocks;
            letter(run.kind).repeat(run.blocks as usize)
        });
        text.collect()
    }

    #[test]
    fn blocks_with_a_byte_of_data_are_mapped_and_half_anchored_ones_are_not_anchored() {
        assert_eq!(letters("d...uuuu..uuuuudu", 4), "du.d");
        assert_eq!(letters("....uuuu....", 4), ".u.");
        assert_eq!(letters("u.u.", 1), "u.u.");
        assert_eq!(letters("..", 4), "d", "the list ends in the only block");
        assert_eq!(letters(".....", 4), ".", "the second block is left for the next walk");
    }

    #[test]
    fn long_runs_are_split_not_cut() {
        let mut runs = Runs::default();
        let half = MAX_RUN / 2 + 1;
        for n in 0..5 {
            runs.push(Run { lba: n * half, blocks: half, kind: Kind::Hole });
        }
        assert_eq!(runs.descriptors, 3);
        let pieces = runs.first(9);
        assert_eq!(pieces.iter().map(|r| r.blocks).sum::<u64>(), 5 * half);
        assert!(pieces.windows(2).all(|w| w[0].lba + w[0].blocks == w[1].lba));
        assert!(pieces.iter().all(|r| r.blocks <= MAX_RUN));
    }
}
