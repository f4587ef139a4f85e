//! REQUEST SENSE (SPC-5 6.39).

use super::{Context, Reply};
use crate::scsi::sense::ScsiError;
use crate::scsi::sense::{Key, Sense, asc};
use crate::scsi::wire::Cdb;

/// Whether DESC asks for descriptor format, and the allocation length.
fn parse(cdb: &Cdb) -> (bool, usize) {
    (cdb.byte(1) & 1 != 0, cdb.byte(4).into())
}

/// REQUEST SENSE to a disk: a unit attention or deferred error that is due (and no longer is then), or the condition
/// that keeps it from being ready, with the progress where there is one, or nothing.
pub(super) fn request_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (descriptor_format, allocation) = parse(&context.request.cdb);
    // A request from before a restart does not learn what arose with it (see the check of other commands).
    let attentions = context.nexus.attentions(context.lun.index());
    let again = context.request.again;
    let attention = if again { None } else { attentions.take() };
    let deferred = || (!again).then(|| context.lun.deferred_error(context.nexus)).flatten();
    let not_ready = || match context.lun.check_ready() {
        Err(ScsiError::Check(not_ready)) => Some(not_ready),
        _ => None,
    };
    let sense = attention
        .map(|attention| attention.sense())
        .or_else(deferred)
        .or_else(|| context.lun.background().sense())
        .or_else(not_ready)
        .unwrap_or(Sense::new(Key::NoSense, asc::NONE));
    Ok(Reply::Data { bytes: sense.encode(descriptor_format), allocation })
}

/// REQUEST SENSE to no disk: GOOD, and the data says what is wrong.
pub(super) fn without_disk(cdb: &Cdb, well_known: bool) -> Result<(Vec<u8>, usize), ScsiError> {
    let (descriptor_format, allocation) = parse(cdb);
    let sense = match well_known {
        true => Sense::new(Key::NoSense, asc::NONE),
        false => Sense::new(Key::IllegalRequest, asc::LOGICAL_UNIT_NOT_SUPPORTED),
    };
    Ok((sense.encode(descriptor_format), allocation))
}
