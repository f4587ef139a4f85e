//! REPORT LUNS, REPORT SUPPORTED OPERATION CODES, REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
//! (SPC-5 6.34, 6.36, 6.37).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Command, Context, Reply, ServiceAction, offered, wire};
use crate::scsi::UnitAttention;
use crate::scsi::address::REPORT_LUNS_WLUN;
use crate::scsi::lun::Lun;
use crate::scsi::sense::ScsiError;
use crate::scsi::target::Target;
use crate::scsi::wire::{Cdb, U16, U32, bytes_of, len16, len32};

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReportLuns {
    opcode: u8,
    reserved: u8,
    select_report: u8,
    reserved2: [u8; 3],
    allocation: U32,
    reserved3: u8,
    control: u8,
}

/// REPORT LUNS to a disk.
pub(super) fn report_luns(context: Context<'_>) -> Result<Reply, ScsiError> {
    let target = context.lun.settings().target;
    let (bytes, allocation) = luns(context.target, target, &context.request.cdb)?;
    // The initiator learns here what the condition would have told it (SPC-5 6.34). Also from a list that was asked for
    // before a restart: it is made now.
    context.nexus.attentions(context.lun.index()).clear(UnitAttention::ReportedLunsChanged);
    Ok(Reply::Data { bytes, allocation })
}

/// The list for one target, whoever was asked for it.
pub(super) fn luns(target: &Target, number: u8, cdb: &Cdb) -> Result<(Vec<u8>, usize), ScsiError> {
    let cdb: &ReportLuns = cdb.view()?;
    // No logical unit here is administrative or part of a conglomerate: 10h and 12h list nothing,
    // 11h lists what 00h does (SPC-5 table 292).
    let (disks, well_known) = match cdb.select_report {
        0x00 | 0x11 => (true, false),
        0x01 => (false, true),
        0x02 => (true, true),
        0x10 | 0x12 => (false, false),
        _ => return Err(ScsiError::cdb_field(2, 7)),
    };
    let mut list = Vec::new();
    if disks {
        list.extend(target.units_of(number).flat_map(|lun| lun.encode()));
    }
    if well_known {
        list.extend(REPORT_LUNS_WLUN);
    }
    let mut bytes = bytes_of(&[len32(list.len()), U32::ZERO]);
    bytes.append(&mut list);
    Ok((bytes, wire::allocation(cdb.allocation.get())))
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReportOperationCodes {
    opcode: u8,
    service_action: u8,
    /// RCTD and REPORTING OPTIONS.
    options: u8,
    requested_opcode: u8,
    requested_action: U16,
    allocation: U32,
    reserved: u8,
    control: u8,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct CommandDescriptor {
    opcode: u8,
    reserved: u8,
    service_action: U16,
    reserved2: u8,
    /// CTDP and SERVACTV.
    flags: u8,
    cdb_length: U16,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct TimeoutsDescriptor {
    length: U16,
    reserved: u8,
    command_specific: u8,
    nominal: U32,
    recommended: U32,
}

impl Command {
    fn action_code(&self) -> Option<u16> {
        match self.service_action {
            ServiceAction::None => None,
            ServiceAction::Byte1(action) => Some(action.into()),
            ServiceAction::Variable(action) => Some(action),
        }
    }

    fn timeouts_descriptor(&self) -> Vec<u8> {
        let (nominal, recommended) = self.timeouts;
        bytes_of(&TimeoutsDescriptor {
            length: U16::new(10),
            reserved: 0,
            command_specific: 0,
            nominal: U32::new(nominal),
            recommended: U32::new(recommended),
        })
    }

    fn descriptor(&self, with_timeouts: bool) -> Vec<u8> {
        let ctdp = if with_timeouts { 0x02 } else { 0 };
        let mut bytes = bytes_of(&CommandDescriptor {
            opcode: self.opcode(),
            reserved: 0,
            service_action: U16::new(self.action_code().unwrap_or(0)),
            reserved2: 0,
            flags: ctdp | u8::from(self.action_code().is_some()),
            cdb_length: len16(self.usage.len()),
        });
        if with_timeouts {
            bytes.extend(self.timeouts_descriptor());
        }
        bytes
    }

    /// The one-command format: SUPPORT 011b, in conformance with the standard.
    fn one_command(&self, lun: &Lun, with_timeouts: bool) -> Vec<u8> {
        let ctdp = if with_timeouts { 0x80 } else { 0 };
        let mut bytes = vec![0, ctdp | 0x03];
        bytes.extend(len16(self.usage.len()).to_bytes());
        bytes.extend(self.usage_on(lun));
        if with_timeouts {
            bytes.extend(self.timeouts_descriptor());
        }
        bytes
    }
}

/// REPORT SUPPORTED OPERATION CODES.
pub(super) fn supported_operation_codes(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &ReportOperationCodes = context.request.cdb.view()?;
    let with_timeouts = cdb.options & 0x80 != 0;
    let (opcode, action) = (cdb.requested_opcode, cdb.requested_action.get());
    let same_opcode = || offered(context.lun).filter(|c| c.opcode() == opcode);
    let has_actions = same_opcode().any(|c| c.action_code().is_some());
    let plain = || same_opcode().find(|c| c.action_code().is_none());
    let exact = || same_opcode().find(|c| c.action_code() == Some(action));
    let known = same_opcode().next().is_some();
    let found = match cdb.options & 7 {
        0 => return Ok(all_commands(context.lun, cdb, with_timeouts)),
        // Asked without a service action where there are some, or the other way round: the question
        // makes no sense (SPC-5 table 297).
        1 if has_actions => return Err(ScsiError::cdb_field(2, 2)),
        1 => plain(),
        2 if known && !has_actions => return Err(ScsiError::cdb_field(2, 2)),
        2 => exact(),
        3 if has_actions => exact(),
        3 => plain().filter(|_| action == 0),
        _ => return Err(ScsiError::cdb_field(2, 2)),
    };
    let bytes = match found {
        Some(command) => command.one_command(context.lun, with_timeouts),
        // SUPPORT 001b: not supported.
        None => vec![0, 0x01, 0, 0],
    };
    Ok(Reply::Data { bytes, allocation: wire::allocation(cdb.allocation.get()) })
}

fn all_commands(lun: &Lun, cdb: &ReportOperationCodes, with_timeouts: bool) -> Reply {
    let mut list: Vec<u8> = offered(lun).flat_map(|c| c.descriptor(with_timeouts)).collect();
    let mut bytes = len32(list.len()).to_bytes().to_vec();
    bytes.append(&mut list);
    Reply::Data { bytes, allocation: wire::allocation(cdb.allocation.get()) }
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReportTaskManagement {
    opcode: u8,
    service_action: u8,
    /// REPD.
    repd: u8,
    reserved: [u8; 3],
    allocation: U32,
    reserved2: u8,
    control: u8,
}

/// ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK.
const FUNCTIONS_0: u8 = 0x80 | 0x40 | 0x10 | 0x08 | 0x04;
/// QUERY TASK SET, I_T NEXUS RESET.
const FUNCTIONS_1: u8 = 0x02 | 0x01;

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS: what the control queue does.
pub(super) fn supported_task_management(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb: &ReportTaskManagement = context.request.cdb.view()?;
    let mut bytes = vec![FUNCTIONS_0, FUNCTIONS_1, 0, 0];
    if cdb.repd & 0x80 != 0 {
        // Extended format: no timeouts are promised (TMFTMOV zero).
        bytes = vec![FUNCTIONS_0, FUNCTIONS_1, 0, 0x0c];
        bytes.resize(16, 0);
    }
    Ok(Reply::Data { bytes, allocation: wire::allocation(cdb.allocation.get()) })
}
