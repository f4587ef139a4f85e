//! THE TABLE of commands: dispatch, REPORT SUPPORTED OPERATION CODES, the README's list and the
//! tests all read it. A new command is one file, or a function in one, plus one row.

mod atomic;
pub mod buffer;
mod capacity;
mod diagnostic;
mod extended_copy;
mod flush;
mod format;
pub mod identity;
mod inquiry;
mod lba_status;
mod log;
mod mode;
mod power;
mod receive_copy;
mod report;
mod reserve;
mod rw;
mod sanitize;
mod sense;
mod third_party;
mod token;
mod unmap;
mod verify;
mod vpd;
mod write_same;

use std::sync::mpsc::Sender;
use std::sync::{Arc, LazyLock};

use super::attention::Nexus;
use super::background::Tolerance;
use super::lun::Lun;
use super::reservations::Conflict;
use super::sense::{ScsiError, asc};
use super::target::Target;
use super::wire::Cdb;
use super::{Request, wire};
use crate::store::engine::ending::Ended;
use crate::store::engine::{Cancel, Need};
use crate::store::{Buffers, Operation, Store};

/// What a command does with the medium, and so what has to be checked before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: it works on a stopped disk too.
    None,
    /// Reads it, or makes it be read.
    Read,
    /// Changes it.
    Write,
}

/// Direction of the data phase, as the initiator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// No data phase.
    None,
    /// Data to the initiator.
    In,
    /// Data from the initiator.
    Out,
}

/// How to tell commands with the same operation code apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceAction {
    /// The operation code says it all.
    None,
    /// In the low five bits of byte 1.
    Byte1(u8),
    /// In bytes 8 and 9 of a variable-length CDB (operation code 7Fh).
    Variable(u16),
}

/// What a disk must offer for a command to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing in particular.
    Nothing,
    /// Thin provisioning.
    Thin,
    /// Anchored blocks.
    Anchors,
    /// Writes that are whole or not begun.
    AtomicWrites,
}

impl Needs {
    fn are_met_by(self, lun: &Lun) -> bool {
        match self {
            Needs::Nothing => true,
            Needs::Thin => lun.is_thin(),
            Needs::Anchors => lun.can_anchor(),
            Needs::AtomicWrites => lun.store().capabilities().whole_writes > 0,
        }
    }
}

/// Bits of a CDB that are reserved on a disk that does not have what they are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    /// Byte of the CDB.
    pub byte: usize,
    /// The bits.
    pub bits: u8,
    /// What the disk must offer.
    pub needs: Needs,
}

/// What a handler gets.
pub struct Context<'a> {
    /// The whole target, for commands that look beyond their disk.
    pub target: &'a Arc<Target>,
    /// Who asks.
    pub nexus: &'a Arc<Nexus>,
    /// The disk that is asked.
    pub lun: &'a Arc<Lun>,
    /// The command itself; handlers take its buffers.
    pub request: &'a mut Request,
}

impl Context<'_> {
    /// The first `len` bytes from the initiator.
    ///
    /// # Errors
    /// OVERRUN if it gave fewer than the CDB says.
    fn data_out(&self, len: usize) -> Result<Buffers, ScsiError> {
        let data = &self.request.data_out;
        if data.len() < len { Err(ScsiError::Overrun) } else { Ok(data.slice(0, len)) }
    }
}

/// Blocking work that ends with the number of bytes transferred. It looks at the cancel flag before
/// each step that may take long, and ends with [`ScsiError::Aborted`] when it is set.
pub type JobFn = Box<dyn FnOnce(&Cancel) -> Result<usize, ScsiError> + Send>;

/// Blocking work that needs ranges of the disk, or a thread, to itself, and uses the disk's store as it is given to it.
pub type NeedyFn = Box<dyn FnOnce(&Cancel, &dyn Store) -> Result<usize, ScsiError> + Send>;

/// What a handler wants done.
pub enum Reply {
    /// GOOD, without data.
    Good,
    /// GOOD, after that many bytes of data-out were taken.
    Consumed(usize),
    /// GOOD, with data to be cut off at the allocation length.
    Data {
        /// The whole answer.
        bytes: Vec<u8>,
        /// How much of it the initiator wants.
        allocation: usize,
    },
    /// One operation of the store; GOOD when it succeeds. With the bytes of the data buffers used.
    Transfer(Operation, usize),
    /// Blocking work that waits for nothing but the host.
    Job(JobFn),
    /// Blocking work, and what else must have ended before the command is answered: nothing is held meanwhile.
    After(JobFn, Ended),
    /// Blocking work that is begun when it can have what it needs.
    Needy(Need, NeedyFn),
    /// Blocking work that prepares something which goes on when the command has been answered (IMMED). It is told when it
    /// may; if the command is ended before that, nobody tells it, and it must not begin.
    Begins(JobFn, Sender<()>),
}

/// Data that takes blocking work to make, to be cut off at the allocation length like any other.
fn data_job(
    request: &mut Request,
    allocation: usize,
    make: impl FnOnce(&Cancel) -> Result<Vec<u8>, ScsiError> + Send + 'static,
) -> Result<Reply, ScsiError> {
    let data_in = std::mem::take(&mut request.data_in);
    if allocation > data_in.len() {
        return Err(ScsiError::Overrun);
    }
    Ok(Reply::Job(Box::new(move |cancel| {
        let bytes = make(cancel)?;
        Ok(data_in.write_at(0, bytes.get(..allocation).unwrap_or(&bytes)))
    })))
}

/// A handler validates and plans; it never blocks.
pub type Handler = fn(Context<'_>) -> Result<Reply, ScsiError>;

/// A row of the table.
pub struct Command {
    /// Its name in the standard.
    pub name: &'static str,
    /// Service action, if the operation code alone does not name it.
    pub service_action: ServiceAction,
    /// CDB usage data (SPC-5 6.36.3): the operation code, then for each byte the bits that are looked
    /// at. Every other bit is reserved and must be zero. Its length is the CDB's.
    pub usage: &'static [u8],
    /// The bits that must be zero on every disk, in words as [`Cdb::words`] has them.
    reserved: [u64; 4],
    /// Direction of its data.
    pub data: Data,
    /// What it does with the medium.
    pub access: Access,
    /// How it gets along with the reservation of another initiator.
    pub conflict: Conflict,
    /// What the disk must offer.
    pub needs: Needs,
    /// Bits of `usage` that only some disks look at.
    pub options: &'static [Bits],
    /// It is what a disk needs whose format or sanitize operation has failed.
    pub mends: bool,
    /// Runs although a unit attention is due (SAM-6 5.14.5).
    pub exempt_from_attention: bool,
    /// To do it twice is not what doing it once is.
    pub once: bool,
    /// Nominal and recommended timeout in seconds (0: none is given).
    pub timeouts: (u32, u32),
    /// What it does.
    pub handler: Handler,
}

impl Command {
    /// Operation code.
    pub fn opcode(&self) -> u8 {
        self.usage.first().copied().unwrap_or(0)
    }

    /// The standard's clause is simple: a reserved bit that is set is an invalid field.
    ///
    /// # Errors
    /// 05/24/00 pointing at the leftmost such bit.
    pub fn check_reserved_bits(&self, cdb: &Cdb, lun: Option<&Lun>) -> Result<(), ScsiError> {
        // Most commands are right: a look at whole words tells.
        let wrong = cdb.words().into_iter().zip(self.reserved).fold(0, |bits, (w, r)| bits | w & r);
        let plain = !matches!(self.service_action, ServiceAction::Variable(_));
        if wrong == 0 && plain && self.options.is_empty() {
            return Ok(());
        }
        for (byte, (value, used)) in (0u16..).zip(cdb.0.iter().zip(self.usage)).skip(1) {
            let used = match (self.service_action, byte) {
                (ServiceAction::Byte1(_), 1) => used | 0x1f,
                (ServiceAction::Variable(_), 8 | 9) => 0xff,
                _ => used & !lun.map_or(0, |lun| self.absent(byte.into(), lun)),
            };
            if let Some(bit) = (value & !used).checked_ilog2() {
                return Err(ScsiError::cdb_field(byte, u8::try_from(bit).unwrap_or(7)));
            }
        }
        let additional = usize::from(cdb.byte(7)) + 8;
        match self.service_action {
            ServiceAction::Variable(_) if additional != self.usage.len() => {
                Err(ScsiError::cdb_field(7, 7))
            }
            _ => Ok(()),
        }
    }

    /// The bits of a byte that are about what this disk does not have.
    fn absent(&self, byte: usize, lun: &Lun) -> u8 {
        let of_byte = self.options.iter().filter(|o| o.byte == byte && !o.needs.are_met_by(lun));
        of_byte.fold(0, |bits, option| bits | option.bits)
    }

    /// CDB usage data as it is true for a disk.
    fn usage_on(&self, lun: &Lun) -> Vec<u8> {
        let action = |byte: usize| match (self.service_action, byte) {
            (ServiceAction::Byte1(action), 1) => action,
            (ServiceAction::Variable(action), 8) => action.to_be_bytes()[0],
            (ServiceAction::Variable(action), 9) => action.to_be_bytes()[1],
            _ => 0,
        };
        let bytes = self.usage.iter().enumerate();
        // The service action stands there itself.
        bytes.map(|(byte, used)| used & !self.absent(byte, lun) | action(byte)).collect()
    }

    /// Whether it is about what the medium holds, and has to be over before all of that changes.
    pub fn is_at_medium(&self) -> bool {
        self.access != Access::None && !self.mends
    }

    /// Whether it changes the medium or anything else that the disk keeps.
    pub fn changes(&self) -> bool {
        match (self.access, self.data) {
            (Access::Write, _) | (Access::None, Data::Out | Data::None) => true,
            (Access::Read, _) | (Access::None, Data::In) => false,
        }
    }

    /// How it gets along with a format or sanitize operation.
    pub fn tolerance(&self) -> Tolerance {
        match (self.access, self.data) {
            _ if self.mends => Tolerance::Mends,
            (Access::None, Data::In) => Tolerance::Always,
            (Access::None, Data::Out | Data::None) => Tolerance::AfterFailedFormat,
            (Access::Read | Access::Write, _) => Tolerance::Never,
        }
    }

    fn matches(&self, cdb: &Cdb) -> bool {
        self.opcode() == cdb.opcode()
            && match self.service_action {
                ServiceAction::None => true,
                ServiceAction::Byte1(action) => cdb.byte(1) & 0x1f == action,
                ServiceAction::Variable(action) => {
                    u16::from_be_bytes([cdb.byte(8), cdb.byte(9)]) == action
                }
            }
    }
}

/// The commands that a disk has.
pub fn offered(lun: &Lun) -> impl Iterator<Item = &'static Command> {
    TABLE.iter().filter(|c| c.needs.are_met_by(lun))
}

/// Finds the row for a CDB among the commands that a disk has.
///
/// # Errors
/// As [`find`].
pub fn find_on(lun: &Lun, cdb: &Cdb) -> Result<&'static Command, ScsiError> {
    let rows = TABLE.get(first_row(cdb.opcode())..).unwrap_or_default();
    // Nearly all commands are the only ones with their operation code, and on every disk.
    if let Some(row) = rows.first()
        && row.service_action == ServiceAction::None
        && row.needs == Needs::Nothing
    {
        return Ok(row);
    }
    find(rows.iter().filter(|c| c.needs.are_met_by(lun)), cdb)
}

/// Where in the table the rows of an operation code begin; its end where there are none.
fn first_row(opcode: u8) -> usize {
    static FIRST: LazyLock<Vec<usize>> = LazyLock::new(|| {
        let first = |opcode| TABLE.iter().position(|command| command.opcode() == opcode);
        (0..=u8::MAX).map(|opcode| first(opcode).unwrap_or(TABLE.len())).collect()
    });
    FIRST.get(usize::from(opcode)).copied().unwrap_or(0)
}

/// Finds the row for a CDB among the commands that are there.
///
/// # Errors
/// 05/20/00 for an unknown operation code, 05/24/00 for an unknown service action of a known one.
pub fn find(
    commands: impl Iterator<Item = &'static Command>,
    cdb: &Cdb,
) -> Result<&'static Command, ScsiError> {
    let mut same_opcode = commands.filter(|c| c.opcode() == cdb.opcode()).peekable();
    let unknown = match same_opcode.peek().map(|c| c.service_action) {
        None => ScsiError::INVALID_OPCODE,
        Some(ServiceAction::Variable(_)) => ScsiError::cdb_field(8, 7),
        Some(_) => ScsiError::cdb_field(1, 4),
    };
    same_opcode.find(|c| c.matches(cdb)).ok_or(unknown)
}

/// Why there is no disk behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It is the REPORT LUNS well-known logical unit.
    WellKnown,
    /// It is a number without a logical unit; number 0 answers REPORT LUNS all the same
    /// (SPC-5 6.34: an initiator has to begin somewhere).
    Lun {
        /// Whether it is number 0.
        lun_zero: bool,
    },
}

/// 05/25/00.
const LUN_NOT_SUPPORTED: ScsiError = ScsiError::illegal(asc::LOGICAL_UNIT_NOT_SUPPORTED);

/// What a logical unit answers that is no disk: data and allocation length.
pub(super) fn without_disk(
    target: &Target,
    number: u8,
    request: &Request,
    missing: Missing,
) -> Result<(Vec<u8>, usize), ScsiError> {
    let command = find(TABLE.iter(), &request.cdb)?;
    command.check_reserved_bits(&request.cdb, None)?;
    let well_known = missing == Missing::WellKnown;
    let finds_luns = well_known || missing == Missing::Lun { lun_zero: true };
    match command.opcode() {
        opcode::INQUIRY => inquiry::without_disk(&request.cdb, well_known),
        opcode::REPORT_LUNS if finds_luns => report::luns(target, number, &request.cdb),
        opcode::REQUEST_SENSE => sense::without_disk(&request.cdb, well_known),
        opcode::TEST_UNIT_READY if well_known => Ok((Vec::new(), 0)),
        _ if well_known => Err(ScsiError::INVALID_OPCODE),
        _ => Err(LUN_NOT_SUPPORTED),
    }
}

/// Operation codes that are named outside the table.
mod opcode {
    pub(super) const TEST_UNIT_READY: u8 = 0x00;
    pub(super) const REQUEST_SENSE: u8 = 0x03;
    pub(super) const INQUIRY: u8 = 0x12;
    pub(super) const REPORT_LUNS: u8 = 0xa0;
}

/// Seconds within which a command that only looks at our memory is answered.
const QUICK: (u32, u32) = (0, 10);
/// Seconds for a transfer, which may wait for a busy host.
const TRANSFER: (u32, u32) = (0, 60);
/// Seconds for a flush, which may have to write out a whole page cache.
const FLUSH: (u32, u32) = (0, 300);

/// Seconds for an operation on the whole medium.
const LONG: (u32, u32) = (0, 86400);

/// DPO and FUA.
const DPO_FUA: u8 = 0x18;
/// DPO and BYTCHK of VERIFY.
const DPO_BYTCHK: u8 = 0x16;
/// DPO and BYTCHK of WRITE AND VERIFY, which has but the low bit of it.
const DPO_BYTCHK_LOW: u8 = 0x12;
/// UNMAP and ANCHOR of WRITE SAME; the LBDATA and PBDATA of old are reserved.
const UNMAP_ANCHOR: u8 = 0x18;
/// Which disks know the UNMAP and ANCHOR bits of WRITE SAME, which are in byte 1 or 10.
const fn write_same_options(byte: usize) -> [Bits; 2] {
    [
        Bits { byte, bits: 0x08, needs: Needs::Thin },
        Bits { byte, bits: 0x10, needs: Needs::Anchors },
    ]
}
/// NDOB of WRITE SAME(16) and (32).
const NDOB: u8 = 0x01;
/// IMMED.
const IMMED: u8 = 0x02;
/// IMMED and AUSE of SANITIZE; there are no zones for ZNR to be about.
const IMMED_AUSE: u8 = 0xa0;
/// LONGLIST, FMTDATA, CMPLST and DEFECT LIST FORMAT of FORMAT UNIT; there is no protection information.
const FORMAT_FLAGS: u8 = 0x3f;

/// The bits of a CDB that nobody looks at, without those that name the command and those behind its end. The table is made
/// by the compiler: an index that is wrong does not compile.
#[allow(clippy::indexing_slicing)]
const fn reserved_words(usage: &[u8], action: ServiceAction) -> [u64; 4] {
    let mut words = [[0u8; 8]; 4];
    let mut at = 1;
    while at < usage.len() {
        words[at / 8][at % 8] = !usage[at];
        at += 1;
    }
    if matches!(action, ServiceAction::Byte1(_)) {
        words[0][1] &= 0xe0;
    }
    let [a, b, c, d] = words;
    [u64::from_ne_bytes(a), u64::from_ne_bytes(b), u64::from_ne_bytes(c), u64::from_ne_bytes(d)]
}

const fn row(
    name: &'static str,
    usage: &'static [u8],
    data: Data,
    access: Access,
    timeouts: (u32, u32),
    handler: Handler,
) -> Command {
    Command {
        name,
        service_action: ServiceAction::None,
        usage,
        reserved: reserved_words(usage, ServiceAction::None),
        data,
        access,
        conflict: match access {
            Access::None => Conflict::Never,
            Access::Read => Conflict::ExclusiveAccess,
            Access::Write => Conflict::Always,
        },
        needs: Needs::Nothing,
        options: &[],
        mends: false,
        exempt_from_attention: false,
        once: false,
        timeouts,
        handler,
    }
}

impl Command {
    const fn action(mut self, action: u8) -> Self {
        self.service_action = ServiceAction::Byte1(action);
        self.reserved = reserved_words(self.usage, self.service_action);
        self
    }

    const fn variable(mut self, action: u16) -> Self {
        self.service_action = ServiceAction::Variable(action);
        self
    }

    const fn if_thin(mut self) -> Self {
        self.needs = Needs::Thin;
        self
    }

    const fn if_atomic(mut self) -> Self {
        self.needs = Needs::AtomicWrites;
        self
    }

    const fn options(mut self, options: &'static [Bits]) -> Self {
        self.options = options;
        self
    }

    const fn reserved(mut self, conflict: Conflict) -> Self {
        self.conflict = conflict;
        self
    }

    const fn mends(mut self) -> Self {
        self.mends = true;
        self
    }

    const fn once(mut self) -> Self {
        self.once = true;
        self
    }

    const fn exempt(mut self) -> Self {
        self.exempt_from_attention = true;
        self
    }
}

const FF: u8 = 0xff;

/// GROUP NUMBER: may be given, and means nothing as there are no groups (VPD 86 GROUP_SUP is zero).
const GROUP: u8 = 0x3f;

/// Usage of the ten-byte block CDB: flags, LBA, group, length.
const fn cdb10(opcode: u8, flags: u8) -> [u8; 10] {
    [opcode, flags, FF, FF, FF, FF, GROUP, FF, FF, 0]
}

/// Usage of the twelve-byte block CDB.
const fn cdb12(opcode: u8, flags: u8) -> [u8; 12] {
    [opcode, flags, FF, FF, FF, FF, FF, FF, FF, FF, GROUP, 0]
}

/// Usage of the sixteen-byte block CDB.
const fn cdb16(opcode: u8, flags: u8) -> [u8; 16] {
    [opcode, flags, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, GROUP, 0]
}

/// Usage of SANITIZE: flags, parameter list length.
const fn sanitize_cdb() -> [u8; 10] {
    [0x48, IMMED_AUSE, 0, 0, 0, 0, 0, FF, FF, 0]
}

/// Usage of EXTENDED COPY and its like: list identifier, parameter list length, group.
const fn copy_cdb(list_id: [u8; 4], group: u8) -> [u8; 16] {
    let [a, b, c, d] = list_id;
    [0x83, 0, 0, 0, 0, 0, a, b, c, d, FF, FF, FF, FF, group, 0]
}

/// Usage of RECEIVE COPY RESULTS: list identifier, allocation length.
const fn receive_cdb(list_id: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = list_id;
    [0x84, 0, a, b, c, d, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0]
}

/// Usage of the 32-byte block CDB: group, service action, flags, LBA, expected tags, blocks. CONTROL is byte 1.
/// Without protection information there is nothing to hold the tags against (SBC-4 4.21.2.2).
#[rustfmt::skip]
const fn cdb32(action: u8, flags: u8) -> [u8; 32] {
    [
        0x7f, 0, 0, 0, 0, 0, GROUP, 0x18, 0, action, flags, 0, FF, FF, FF, FF,
        FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF,
    ]
}

/// Usage of PERSISTENT RESERVE IN: allocation length.
const fn reserve_in_cdb() -> [u8; 10] {
    [0x5e, 0, 0, 0, 0, 0, 0, FF, FF, 0]
}

/// Usage of PERSISTENT RESERVE OUT: SCOPE and TYPE, parameter list length.
const fn reserve_out_cdb() -> [u8; 10] {
    [0x5f, 0, FF, 0, 0, FF, FF, FF, FF, 0]
}

/// START STOP UNIT takes nothing from anybody where it starts the disk (SBC-4 table 13).
fn starts(cdb: &Cdb) -> bool {
    cdb.byte(4) & 0xf1 == 0x01
}

/// Nor does PREVENT ALLOW MEDIUM REMOVAL where it allows it.
fn allows(cdb: &Cdb) -> bool {
    cdb.byte(4) & 0x03 == 0
}

/// Usage of GET LBA STATUS(32): report type, LBA, scan length, allocation length. CONTROL is byte 1.
const GET_LBA_STATUS_32: [u8; 32] = [
    0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x12, FF, 0, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF,
    0, 0, 0, 0, FF, FF, FF, FF,
];

use Access::{Read, Write};
use Data::{In, Out};
/// No data phase.
const NO: Data = Data::None;
/// No access to the medium.
const NA: Access = Access::None;

/// Runs under any reservation but a RESERVE.
const KNOWN: Conflict = Conflict::NeverPersistent;
/// Runs under the Write Exclusive types.
const READS: Conflict = Conflict::ExclusiveAccess;
/// Only for those whom a reservation is for.
const MINE: Conflict = Conflict::Always;
/// Looks at reservations itself.
const ITSELF: Conflict = Conflict::Itself;

/// Every command there is, in the order of operation codes.
#[rustfmt::skip]
pub static TABLE: &[Command] = &[
    row("TEST UNIT READY", &[0x00, 0, 0, 0, 0, 0], NO, Read, QUICK, power::test_unit_ready).reserved(KNOWN),
    row("REQUEST SENSE", &[0x03, 1, 0, 0, FF, 0], In, NA, QUICK, sense::request_sense).exempt(),
    row("FORMAT UNIT", &[0x04, FORMAT_FLAGS, 0, 0, 0, 0], Out, Write, LONG, format::format_unit).mends().once(),
    row("READ(6)", &[0x08, 0x1f, FF, FF, FF, 0], In, Read, TRANSFER, rw::read),
    row("WRITE(6)", &[0x0a, 0x1f, FF, FF, FF, 0], Out, Write, TRANSFER, rw::write),
    row("INQUIRY", &[0x12, 1, FF, FF, FF, 0], In, NA, QUICK, inquiry::inquiry).exempt(),
    row("MODE SELECT(6)", &[0x15, 0x11, 0, 0, FF, 0], Out, NA, FLUSH, mode::mode_select).reserved(MINE),
    row("RESERVE(6)", &[0x16, 0, 0, 0, 0, 0], NO, NA, QUICK, reserve::basic_reserve).reserved(ITSELF),
    row("RELEASE(6)", &[0x17, 0, 0, 0, 0, 0], NO, NA, QUICK, reserve::basic_release).reserved(ITSELF),
    row("MODE SENSE(6)", &[0x1a, 0x08, FF, FF, FF, 0], In, NA, QUICK, mode::mode_sense).reserved(READS),
    row("START STOP UNIT", &[0x1b, 1, 0, 0x0f, 0xf7, 0], NO, NA, FLUSH, power::start_stop_unit).reserved(Conflict::Unless(starts)),
    row("RECEIVE DIAGNOSTIC RESULTS", &[0x1c, 1, FF, FF, FF, 0], In, NA, QUICK, diagnostic::receive_results).reserved(READS),
    row("SEND DIAGNOSTIC", &[0x1d, 0xf7, 0, FF, FF, 0], Out, NA, TRANSFER, diagnostic::send_diagnostic).reserved(MINE),
    row("PREVENT ALLOW MEDIUM REMOVAL", &[0x1e, 0, 0, 0, 3, 0], NO, NA, QUICK, power::prevent_allow).reserved(Conflict::Unless(allows)),
    row("READ CAPACITY(10)", &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], In, Read, QUICK, capacity::read_capacity_10).reserved(Conflict::Never),
    row("READ(10)", const { &cdb10(0x28, DPO_FUA) }, In, Read, TRANSFER, rw::read),
    row("WRITE(10)", const { &cdb10(0x2a, DPO_FUA) }, Out, Write, TRANSFER, rw::write),
    row("WRITE AND VERIFY(10)", const { &cdb10(0x2e, DPO_BYTCHK_LOW) }, Out, Write, TRANSFER, verify::write_and_verify),
    row("VERIFY(10)", const { &cdb10(0x2f, DPO_BYTCHK) }, Out, Read, TRANSFER, verify::verify),
    row("PRE-FETCH(10)", const { &cdb10(0x34, IMMED) }, NO, Read, QUICK, flush::prefetch),
    row("SYNCHRONIZE CACHE(10)", const { &cdb10(0x35, IMMED) }, NO, Read, FLUSH, flush::synchronize_cache).reserved(MINE),
    row("READ DEFECT DATA(10)", &[0x37, 0, 0x1f, 0, 0, 0, 0, FF, FF, 0], In, Read, QUICK, diagnostic::defect_data_10),
    row("WRITE BUFFER(10)", &[0x3b, 0x1f, FF, FF, FF, FF, FF, FF, FF, 0], Out, NA, QUICK, buffer::write_buffer).reserved(MINE),
    row("READ BUFFER(10)", &[0x3c, 0x1f, FF, FF, FF, FF, FF, FF, FF, 0], In, NA, QUICK, buffer::read_buffer_10).reserved(READS),
    row("WRITE SAME(10)", const { &cdb10(0x41, UNMAP_ANCHOR) }, Out, Write, FLUSH, write_same::write_same).options(const { &write_same_options(1) }),
    row("UNMAP", &[0x42, 1, 0, 0, 0, 0, GROUP, FF, FF, 0], Out, Write, FLUSH, unmap::unmap).if_thin().options(&[Bits { byte: 1, bits: 1, needs: Needs::Anchors }]),
    row("SANITIZE OVERWRITE", const { &sanitize_cdb() }, Out, Write, LONG, sanitize::overwrite).action(0x01).mends().once(),
    row("SANITIZE BLOCK ERASE", const { &sanitize_cdb() }, NO, Write, LONG, sanitize::block_erase).action(0x02).mends().once(),
    row("SANITIZE EXIT FAILURE MODE", const { &sanitize_cdb() }, NO, Write, LONG, sanitize::exit_failure_mode).action(0x1f).mends(),
    row("LOG SELECT", &[0x4c, 0x03, FF, FF, 0, 0, 0, FF, FF, 0], Out, NA, QUICK, log::log_select).reserved(MINE),
    row("LOG SENSE", &[0x4d, 0, FF, FF, 0, FF, FF, FF, FF, 0], In, NA, QUICK, log::log_sense),
    row("MODE SELECT(10)", &[0x55, 0x11, 0, 0, 0, 0, 0, FF, FF, 0], Out, NA, FLUSH, mode::mode_select).reserved(MINE),
    row("RESERVE(10)", &[0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NA, QUICK, reserve::basic_reserve).reserved(ITSELF),
    row("RELEASE(10)", &[0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NA, QUICK, reserve::basic_release).reserved(ITSELF),
    row("MODE SENSE(10)", &[0x5a, 0x18, FF, FF, 0, 0, 0, FF, FF, 0], In, NA, QUICK, mode::mode_sense).reserved(READS),
    row("PERSISTENT RESERVE IN READ KEYS", const { &reserve_in_cdb() }, In, NA, QUICK, reserve::read_keys).action(0x00).reserved(ITSELF),
    row("PERSISTENT RESERVE IN READ RESERVATION", const { &reserve_in_cdb() }, In, NA, QUICK, reserve::read_reservation).action(0x01).reserved(ITSELF),
    row("PERSISTENT RESERVE IN REPORT CAPABILITIES", const { &reserve_in_cdb() }, In, NA, QUICK, reserve::report_capabilities).action(0x02).reserved(ITSELF),
    row("PERSISTENT RESERVE IN READ FULL STATUS", const { &reserve_in_cdb() }, In, NA, QUICK, reserve::read_full_status).action(0x03).reserved(ITSELF),
    row("PERSISTENT RESERVE OUT REGISTER", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::register).action(0x00).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT RESERVE", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::reserve).action(0x01).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT RELEASE", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::release).action(0x02).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT CLEAR", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::clear).action(0x03).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT PREEMPT", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::preempt).action(0x04).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT PREEMPT AND ABORT", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::preempt_and_abort).action(0x05).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT REGISTER AND IGNORE EXISTING KEY", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::register_and_ignore).action(0x06).reserved(ITSELF).once(),
    row("PERSISTENT RESERVE OUT REGISTER AND MOVE", const { &reserve_out_cdb() }, Out, NA, FLUSH, reserve::register_and_move).action(0x07).reserved(ITSELF).once(),
    row("READ(32)", const { &cdb32(0x09, DPO_FUA) }, In, Read, TRANSFER, rw::read).variable(0x09),
    row("VERIFY(32)", const { &cdb32(0x0a, DPO_BYTCHK) }, Out, Read, TRANSFER, verify::verify).variable(0x0a),
    row("WRITE(32)", const { &cdb32(0x0b, DPO_FUA) }, Out, Write, TRANSFER, rw::write).variable(0x0b),
    row("WRITE AND VERIFY(32)", const { &cdb32(0x0c, DPO_BYTCHK_LOW) }, Out, Write, TRANSFER, verify::write_and_verify).variable(0x0c),
    row("WRITE SAME(32)", const { &cdb32(0x0d, UNMAP_ANCHOR | NDOB) }, Out, Write, FLUSH, write_same::write_same).variable(0x0d).options(const { &write_same_options(10) }),
    row("GET LBA STATUS(32)", &GET_LBA_STATUS_32, In, Read, TRANSFER, lba_status::get_lba_status_32).variable(0x12),
    row("EXTENDED COPY(LID1)", const { &copy_cdb([0, 0, 0, 0], 0) }, Out, Read, LONG, extended_copy::lid1).action(0x00).once().reserved(MINE),
    row("EXTENDED COPY(LID4)", const { &copy_cdb([0, 0, 0, 0], 0) }, Out, Read, LONG, extended_copy::lid4).action(0x01).once().reserved(MINE),
    row("POPULATE TOKEN", const { &copy_cdb([FF, FF, FF, FF], GROUP) }, Out, Read, LONG, token::populate).action(0x10),
    row("WRITE USING TOKEN", const { &copy_cdb([FF, FF, FF, FF], GROUP) }, Out, Write, LONG, token::write).action(0x11),
    row("COPY OPERATION ABORT", &[0x83, 0, FF, FF, FF, FF, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NA, FLUSH, extended_copy::abort).action(0x1c).reserved(MINE),
    row("RECEIVE COPY STATUS(LID1)", const { &receive_cdb([FF, 0, 0, 0]) }, In, NA, QUICK, receive_copy::status_lid1).action(0x00).reserved(MINE),
    row("RECEIVE COPY DATA(LID1)", const { &receive_cdb([FF, 0, 0, 0]) }, In, NA, QUICK, receive_copy::data_lid1).action(0x01).reserved(MINE),
    row("RECEIVE COPY OPERATING PARAMETERS", const { &receive_cdb([0; 4]) }, In, NA, QUICK, receive_copy::operating_parameters).action(0x03),
    row("RECEIVE COPY FAILURE DETAILS(LID1)", const { &receive_cdb([FF, 0, 0, 0]) }, In, NA, QUICK, receive_copy::failure_details).action(0x04).reserved(MINE),
    row("RECEIVE COPY STATUS(LID4)", const { &receive_cdb([FF; 4]) }, In, NA, QUICK, receive_copy::status_lid4).action(0x05).reserved(MINE),
    row("RECEIVE COPY DATA(LID4)", const { &receive_cdb([FF; 4]) }, In, NA, QUICK, receive_copy::data_lid4).action(0x06).reserved(MINE),
    row("RECEIVE ROD TOKEN INFORMATION", const { &receive_cdb([FF; 4]) }, In, NA, QUICK, receive_copy::token_information).action(0x07).reserved(MINE),
    row("REPORT ALL ROD TOKENS", const { &receive_cdb([0; 4]) }, In, NA, QUICK, receive_copy::all_tokens).action(0x08).reserved(MINE),
    row("READ(16)", const { &cdb16(0x88, DPO_FUA) }, In, Read, TRANSFER, rw::read),
    row("COMPARE AND WRITE", &[0x89, DPO_FUA, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0, 0, FF, GROUP, 0], Out, Write, TRANSFER, atomic::compare_and_write).once(),
    row("WRITE(16)", const { &cdb16(0x8a, DPO_FUA) }, Out, Write, TRANSFER, rw::write),
    row("ORWRITE(16)", const { &cdb16(0x8b, DPO_FUA) }, Out, Write, TRANSFER, atomic::or_write),
    row("WRITE AND VERIFY(16)", const { &cdb16(0x8e, DPO_BYTCHK_LOW) }, Out, Write, TRANSFER, verify::write_and_verify),
    row("VERIFY(16)", const { &cdb16(0x8f, DPO_BYTCHK) }, Out, Read, TRANSFER, verify::verify),
    row("PRE-FETCH(16)", const { &cdb16(0x90, IMMED) }, NO, Read, QUICK, flush::prefetch),
    row("SYNCHRONIZE CACHE(16)", const { &cdb16(0x91, IMMED) }, NO, Read, FLUSH, flush::synchronize_cache).reserved(MINE),
    row("WRITE SAME(16)", const { &cdb16(0x93, UNMAP_ANCHOR | NDOB) }, Out, Write, FLUSH, write_same::write_same).options(const { &write_same_options(1) }),
    row("READ BUFFER(16)", &[0x9b, 0x1f, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0], In, NA, QUICK, buffer::read_buffer_16).reserved(READS),
    row("WRITE ATOMIC(16)", const { &cdb16(0x9c, DPO_FUA) }, Out, Write, FLUSH, atomic::write_atomic).if_atomic(),
    row("READ CAPACITY(16)", &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, Read, QUICK, capacity::read_capacity_16).action(0x10).reserved(Conflict::Never),
    row("GET LBA STATUS(16)", &[0x9e, 0x12, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0], In, Read, TRANSFER, lba_status::get_lba_status_16).action(0x12),
    row("REPORT LUNS", &[0xa0, 0, FF, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, NA, QUICK, report::report_luns).exempt(),
    row("REPORT IDENTIFYING INFORMATION", &[0xa3, 0x05, 0, 0, 0, 0, FF, FF, FF, FF, 0xfe, 0], In, NA, QUICK, identity::report_information).action(0x05),
    row("REPORT TARGET PORT GROUPS", &[0xa3, 0xea, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, NA, QUICK, identity::target_port_groups).action(0x0a),
    row("REPORT SUPPORTED OPERATION CODES", &[0xa3, 0x0c, 0x87, FF, FF, FF, FF, FF, FF, FF, 0, 0], In, NA, QUICK, report::supported_operation_codes).action(0x0c).reserved(READS),
    row("REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", &[0xa3, 0x0d, 0x80, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, NA, QUICK, report::supported_task_management).action(0x0d).reserved(READS),
    row("REPORT TIMESTAMP", &[0xa3, 0x0f, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, NA, QUICK, identity::report_timestamp).action(0x0f),
    row("SET IDENTIFYING INFORMATION", &[0xa4, 0x06, 0, 0, 0, 0, FF, FF, FF, FF, 0xfe, 0], Out, NA, FLUSH, identity::set_information).action(0x06).reserved(MINE),
    row("SET TIMESTAMP", &[0xa4, 0x0f, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0], Out, NA, QUICK, identity::set_timestamp).action(0x0f).reserved(MINE),
    row("READ(12)", const { &cdb12(0xa8, DPO_FUA) }, In, Read, TRANSFER, rw::read),
    row("WRITE(12)", const { &cdb12(0xaa, DPO_FUA) }, Out, Write, TRANSFER, rw::write),
    row("READ MEDIA SERIAL NUMBER", &[0xab, 0x01, 0, 0, 0, 0, FF, FF, FF, FF, 0, 0], In, NA, QUICK, identity::media_serial_number).action(0x01),
    row("WRITE AND VERIFY(12)", const { &cdb12(0xae, DPO_BYTCHK_LOW) }, Out, Write, TRANSFER, verify::write_and_verify),
    row("VERIFY(12)", const { &cdb12(0xaf, DPO_BYTCHK) }, Out, Read, TRANSFER, verify::verify),
    row("READ DEFECT DATA(12)", &[0xb7, 0x1f, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0], In, Read, QUICK, diagnostic::defect_data_12),
];
