//! READ BUFFER (10, 16) and WRITE BUFFER (SPC-5 6.18, 6.49): data, echo, and the descriptors of both.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::sense::{ScsiError, asc};
use crate::scsi::wire::{Cdb, U32, U64, from24, len24};

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

/// What part of which buffer.
struct Part {
    id: u8,
    offset: u64,
    len: u32,
}

impl Part {
    /// Of READ BUFFER(10) and WRITE BUFFER(10).
    fn of_10(cdb: &Cdb) -> Self {
        let number = |at: usize| from24([cdb.byte(at), cdb.byte(at + 1), cdb.byte(at + 2)]);
        Part { id: cdb.byte(2), offset: number(3).into(), len: number(6) }
    }

    /// The data buffer is number 0; the echo buffer has no number.
    fn check_id(&self, mode: Mode, byte: u16) -> Result<(), ScsiError> {
        match mode {
            Mode::Data if self.id != 0 => Err(ScsiError::cdb_field(byte, 7)),
            _ => Ok(()),
        }
    }
}

/// READ BUFFER(10).
pub(super) fn read_buffer_10(context: Context<'_>) -> Result<Reply, ScsiError> {
    let part = Part::of_10(&context.request.cdb);
    read(&context, &part, 2, 3)
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReadBuffer16 {
    opcode: u8,
    mode: u8,
    offset: U64,
    allocation: U32,
    id: u8,
    control: u8,
}

/// READ BUFFER(16).
pub(super) fn read_buffer_16(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &ReadBuffer16 = context.request.cdb.view()?;
    let part = Part { id: cdb.id, offset: cdb.offset.get(), len: cdb.allocation.get() };
    read(&context, &part, 14, 2)
}

/// The fields of the part are in these bytes.
fn read(
    context: &Context<'_>,
    part: &Part,
    id_at: u16,
    offset_at: u16,
) -> Result<Reply, ScsiError> {
    let mode = Mode::parse(&context.request.cdb)?;
    part.check_id(mode, id_at)?;
    let scratch = context.lun.scratch();
    let bytes = match mode {
        Mode::Data => {
            let mut bytes = scratch.data.clone();
            bytes.resize(CAPACITY as usize, 0);
            let from = usize::try_from(part.offset).unwrap_or(usize::MAX);
            bytes.get(from..).ok_or(ScsiError::cdb_field(offset_at, 7))?.to_vec()
        }
        Mode::Descriptor => {
            // OFFSET BOUNDARY 0: any byte. Other buffers have no bytes.
            let capacity = if part.id == 0 { CAPACITY } else { 0 };
            [vec![0], len24(capacity).to_vec()].concat()
        }
        Mode::Echo => {
            let sequence = ScsiError::illegal(asc::COMMAND_SEQUENCE_ERROR);
            scratch.echo.clone().ok_or(sequence)?
        }
        Mode::EchoDescriptor => CAPACITY.to_be_bytes().to_vec(),
    };
    Ok(Reply::Data { bytes, allocation: wire::allocation(part.len) })
}

/// WRITE BUFFER(10).
pub(super) fn write_buffer(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    let mode = Mode::parse(cdb)?;
    let part = Part::of_10(cdb);
    part.check_id(mode, 2)?;
    let (from, end) = match mode {
        Mode::Data => (part.offset, part.offset.saturating_add(part.len.into())),
        Mode::Echo => (0, part.len.into()),
        Mode::Descriptor | Mode::EchoDescriptor => return Err(ScsiError::cdb_field(1, 4)),
    };
    if end > CAPACITY.into() {
        return Err(ScsiError::cdb_field(6, 7));
    }
    let len = part.len as usize;
    let bytes = context.data_out(len)?.to_vec(len);
    let mut scratch = context.lun.scratch();
    if mode == Mode::Echo {
        scratch.echo = Some(bytes);
    } else {
        scratch.data.resize(CAPACITY as usize, 0);
        let to = scratch.data.iter_mut().skip(usize::try_from(from).unwrap_or(usize::MAX));
        to.zip(bytes).for_each(|(to, from)| *to = from);
    }
    Ok(Reply::Consumed(len))
}
