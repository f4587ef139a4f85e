//! READ BUFFER and WRITE BUFFER (SPC-5 6.18, 6.49): data, echo, and the descriptors of both.

use super::{Context, Reply};
use crate::scsi::sense::{ScsiError, asc};
use crate::scsi::wire::{Cdb, from24, len24};

/// Bytes of the data buffer, and of the echo buffer.
const CAPACITY: u32 = 4096;

/// What the two buffers of a disk hold.
#[derive(Debug, Default)]
pub struct Scratch {
    data: Vec<u8>,
    /// `None` until something was written to it.
    echo: Option<Vec<u8>>,
}

/// MODE.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Data,
    Descriptor,
    Echo,
    EchoDescriptor,
}

impl Mode {
    fn parse(cdb: &Cdb) -> Result<Self, ScsiError> {
        match cdb.byte(1) & 0x1f {
            0x02 => Ok(Mode::Data),
            0x03 => Ok(Mode::Descriptor),
            0x0a => Ok(Mode::Echo),
            0x0b => Ok(Mode::EchoDescriptor),
            _ => Err(ScsiError::cdb_field(1, 4)),
        }
    }
}

fn offset(cdb: &Cdb) -> u32 {
    from24([cdb.byte(3), cdb.byte(4), cdb.byte(5)])
}

fn length(cdb: &Cdb) -> u32 {
    from24([cdb.byte(6), cdb.byte(7), cdb.byte(8)])
}

/// The data buffer is number 0; the echo buffer has no number.
fn check_number(cdb: &Cdb, mode: Mode) -> Result<(), ScsiError> {
    match mode {
        Mode::Data if cdb.byte(2) != 0 => Err(ScsiError::cdb_field(2, 7)),
        _ => Ok(()),
    }
}

/// READ BUFFER(10).
pub(super) fn read_buffer(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let mode = Mode::parse(cdb)?;
    check_number(cdb, mode)?;
    let scratch = context.lun.scratch();
    let bytes = match mode {
        Mode::Data => {
            let mut bytes = scratch.data.clone();
            bytes.resize(CAPACITY as usize, 0);
            let from = offset(cdb) as usize;
            bytes.get(from..).ok_or(ScsiError::cdb_field(3, 7))?.to_vec()
        }
        Mode::Descriptor => {
            // OFFSET BOUNDARY 0: any byte. Other buffers have no bytes.
            let capacity = if cdb.byte(2) == 0 { CAPACITY } else { 0 };
            [vec![0], len24(capacity).to_vec()].concat()
        }
        Mode::Echo => {
            let sequence = ScsiError::illegal(asc::COMMAND_SEQUENCE_ERROR);
            scratch.echo.clone().ok_or(sequence)?
        }
        Mode::EchoDescriptor => CAPACITY.to_be_bytes().to_vec(),
    };
    Ok(Reply::Data { bytes, allocation: length(cdb) as usize })
}

/// WRITE BUFFER(10).
pub(super) fn write_buffer(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let mode = Mode::parse(cdb)?;
    check_number(cdb, mode)?;
    let len = length(cdb);
    let (from, end) = match mode {
        Mode::Data => (offset(cdb), offset(cdb).saturating_add(len)),
        Mode::Echo => (0, len),
        Mode::Descriptor | Mode::EchoDescriptor => return Err(ScsiError::cdb_field(1, 4)),
    };
    if end > CAPACITY {
        return Err(ScsiError::cdb_field(6, 7));
    }
    let len = len as usize;
    if context.request.data_out.len() < len {
        return Err(ScsiError::Overrun);
    }
    let bytes = context.request.data_out.to_vec(len);
    let mut scratch = context.lun.scratch();
    if mode == Mode::Echo {
        scratch.echo = Some(bytes);
    } else {
        scratch.data.resize(CAPACITY as usize, 0);
        let to = scratch.data.iter_mut().skip(from as usize);
        to.zip(bytes).for_each(|(to, from)| *to = from);
    }
    Ok(Reply::Consumed(len))
}
