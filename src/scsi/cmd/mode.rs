//! MODE SENSE and MODE SELECT (6, 10) and the mode pages (SPC-5 6.14 ff, 7.5; SBC-4 6.5).
//!
//! A page is bytes with a mask that says which bits an initiator may change. What those bits switch
//! is read from the bytes, so that what MODE SENSE shows is what is in force.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Context, Reply, wire};
use crate::scsi::UnitAttention;
use crate::scsi::lun::Lun;
use crate::scsi::sense::{ScsiError, asc};
use crate::scsi::wire::{Cdb, U16, U24, U32, U64, bytes_of, len8, len16};

/// All pages, or all subpages.
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// Longest MODE SELECT parameter list we look at: more than all pages and headers together.
const MAX_PARAMETER_LIST: usize = 1024;

/// A mode page: header and parameters as on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    code: u8,
    subpage: u8,
    current: Vec<u8>,
    default: Vec<u8>,
    /// Bits that MODE SELECT may change.
    changeable: Vec<u8>,
}

/// Page and byte of a switch, and its bit.
struct Switch(u8, usize, u8);

const WCE: Switch = Switch(CACHING, 2, 0x04);
const D_SENSE: Switch = Switch(CONTROL, 2, 0x04);
const SWP: Switch = Switch(CONTROL, 4, 0x08);

const READ_WRITE_ERROR_RECOVERY: u8 = 0x01;
const DISCONNECT_RECONNECT: u8 = 0x02;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x1c;

impl Page {
    /// A page of `len` bytes in all, with these bytes not zero.
    fn new(code: u8, subpage: u8, len: usize, set: &[(usize, u8)], switches: &[Switch]) -> Self {
        let mut default = if subpage == 0 {
            vec![code, len8(len.saturating_sub(2))]
        } else {
            let [high, low] = len16(len.saturating_sub(4)).to_bytes();
            vec![code | 0x40, subpage, high, low]
        };
        let header = default.len();
        default.resize(len, 0);
        let mut changeable = default.clone();
        changeable.iter_mut().skip(header).for_each(|byte| *byte = 0);
        for (byte, value) in set {
            put(&mut default, *byte, *value);
        }
        for Switch(_, byte, bit) in switches {
            let already = changeable.get(*byte).copied().unwrap_or(0);
            put(&mut changeable, *byte, already | bit);
        }
        Page { code, subpage, current: default.clone(), default, changeable }
    }
}

fn put(bytes: &mut [u8], at: usize, value: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = value;
    }
}

/// The mode pages of one disk and the switches in them.
#[derive(Debug)]
pub struct Pages {
    pages: Mutex<Vec<Page>>,
    // What every command looks at, kept beside the pages so that it costs no lock.
    write_cache: AtomicBool,
    descriptor_sense: AtomicBool,
    software_write_protect: AtomicBool,
}

impl Pages {
    /// The pages as they are after power on.
    pub fn new(write_cache: bool) -> Self {
        let wce = if write_cache { 0x04 } else { 0 };
        let pages = vec![
            Page::new(READ_WRITE_ERROR_RECOVERY, 0, 12, &[], &[]),
            Page::new(DISCONNECT_RECONNECT, 0, 16, &[], &[]),
            Page::new(CACHING, 0, 20, &[(2, wce)], &[WCE]),
            // GLTSD: nothing of the log pages is saved. Unrestricted reordering. BUSY TIMEOUT
            // PERIOD without limit.
            Page::new(
                CONTROL,
                0,
                12,
                &[(2, 0x02), (3, 0x10), (8, 0xff), (9, 0xff)],
                &[D_SENSE, SWP],
            ),
            Page::new(CONTROL, 1, 32, &[], &[]),
            // DEXCPT: there are no informational exceptions to report.
            Page::new(INFORMATIONAL_EXCEPTIONS, 0, 12, &[(2, 0x08)], &[]),
        ];
        let all = Pages {
            pages: Mutex::new(pages),
            write_cache: AtomicBool::new(write_cache),
            descriptor_sense: AtomicBool::new(false),
            software_write_protect: AtomicBool::new(false),
        };
        all.apply(&all.lock());
        all
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts what the pages say into force.
    fn apply(&self, pages: &[Page]) {
        let is_set = |Switch(code, byte, bit): Switch| {
            let page = pages.iter().find(|p| (p.code, p.subpage) == (code, 0));
            page.and_then(|p| p.current.get(byte)).is_some_and(|b| b & bit != 0)
        };
        self.write_cache.store(is_set(WCE), Ordering::Release);
        self.descriptor_sense.store(is_set(D_SENSE), Ordering::Release);
        self.software_write_protect.store(is_set(SWP), Ordering::Release);
    }

    /// WCE: writes may be answered before they are stable.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// D_SENSE: sense data in descriptor format.
    pub fn descriptor_sense(&self) -> bool {
        self.descriptor_sense.load(Ordering::Acquire)
    }

    /// SWP: the initiator has write-protected the disk.
    pub fn software_write_protect(&self) -> bool {
        self.software_write_protect.load(Ordering::Acquire)
    }

    /// Back to the defaults.
    pub fn reset(&self) {
        let mut pages = self.lock();
        pages.iter_mut().for_each(|p| p.current.clone_from(&p.default));
        self.apply(&pages);
    }

    /// The pages that a MODE SENSE asks for, one after another.
    fn sense(&self, page: u8, subpage: u8, control: PageControl) -> Result<Vec<u8>, ScsiError> {
        let wanted = |p: &&Page| {
            (page == ALL_PAGES || p.code == page)
                && (subpage == ALL_SUBPAGES || p.subpage == subpage)
        };
        if page == ALL_PAGES && subpage != 0 && subpage != ALL_SUBPAGES {
            return Err(ScsiError::cdb_field(3, 7));
        }
        let pages = self.lock();
        let bytes: Vec<u8> = pages
            .iter()
            .filter(wanted)
            .flat_map(|p| match control {
                PageControl::Current => p.current.clone(),
                PageControl::Changeable => p.changeable.clone(),
                PageControl::Default => p.default.clone(),
            })
            .collect();
        if bytes.is_empty() {
            let known = pages.iter().any(|p| p.code == page);
            return Err(ScsiError::cdb_field(if known { 3 } else { 2 }, if known { 7 } else { 5 }));
        }
        Ok(bytes)
    }

    /// Checks the pages of a MODE SELECT, at byte `at` of its parameter list, all of them before any
    /// takes effect; says whether anything changed.
    fn select(&self, list: &[u8], at: usize) -> Result<bool, ScsiError> {
        let mut pages = self.lock();
        let mut new = pages.clone();
        let mut at = at;
        while at < list.len() {
            at = select_one(&mut new, list, at)?;
        }
        let changed = *pages != new;
        *pages = new;
        self.apply(&pages);
        Ok(changed)
    }
}

/// Takes over the page at byte `at` of the list; returns where the next one begins.
fn select_one(pages: &mut [Page], list: &[u8], at: usize) -> Result<usize, ScsiError> {
    let byte = |n: usize| list.get(at + n).copied().ok_or(ScsiError::PARAMETER_LIST_LENGTH);
    let wrong = |n: usize, bit: Option<u8>| {
        ScsiError::parameter_field(u16::try_from(at + n).unwrap_or(u16::MAX), bit)
    };
    let first = byte(0)?;
    let (subpage, header, len) = if first & 0x40 == 0 {
        (0, 2, usize::from(byte(1)?) + 2)
    } else {
        let len = u16::from_be_bytes([byte(2)?, byte(3)?]);
        (byte(1)?, 4, usize::from(len) + 4)
    };
    let page = pages
        .iter_mut()
        .find(|p| (p.code, p.subpage) == (first & 0x3f, subpage))
        .ok_or(wrong(0, Some(5)))?;
    if len != page.current.len() {
        return Err(wrong(header - 1, None));
    }
    let new = list.get(at..at + len).ok_or(ScsiError::PARAMETER_LIST_LENGTH)?;
    // PS, the top bit of the first byte, is reserved in MODE SELECT and ignored: initiators send
    // back what MODE SENSE gave them.
    for (n, ((new, old), mask)) in
        new.iter().zip(&page.current).zip(&page.changeable).enumerate().skip(header)
    {
        if let Some(bit) = ((new ^ old) & !mask).checked_ilog2() {
            return Err(wrong(n, u8::try_from(bit).ok()));
        }
    }
    for (to, from) in page.current.iter_mut().zip(new).skip(header) {
        *to = *from;
    }
    Ok(at + len)
}

/// Which values a MODE SENSE asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageControl {
    Current,
    Changeable,
    Default,
}

impl PageControl {
    /// Saved values (11b) are not supported (SPC-5 6.14.1).
    fn parse(bits: u8) -> Result<Self, ScsiError> {
        match bits >> 6 {
            0 => Ok(PageControl::Current),
            1 => Ok(PageControl::Changeable),
            2 => Ok(PageControl::Default),
            _ => Err(ScsiError::illegal(asc::SAVING_PARAMETERS_NOT_SUPPORTED)),
        }
    }
}

/// DEVICE-SPECIFIC PARAMETER: write protected.
const WP: u8 = 0x80;
/// DEVICE-SPECIFIC PARAMETER: DPO and FUA are honoured.
const DPOFUA: u8 = 0x10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header6 {
    mode_data_length: u8,
    medium_type: u8,
    device_specific: u8,
    block_descriptor_length: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header10 {
    mode_data_length: U16,
    medium_type: u8,
    device_specific: u8,
    /// Bit 0: LONGLBA.
    long_lba: u8,
    reserved: u8,
    block_descriptor_length: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ShortBlockDescriptor {
    blocks: U32,
    reserved: u8,
    block_size: U24,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LongBlockDescriptor {
    blocks: U64,
    reserved: U32,
    block_size: U32,
}

fn is_ten_byte(cdb: &Cdb) -> bool {
    cdb.opcode() >= 0x20
}

/// Allocation or parameter list length of the six- and ten-byte forms.
fn cdb_length(cdb: &Cdb) -> usize {
    match is_ten_byte(cdb) {
        true => u16::from_be_bytes([cdb.byte(7), cdb.byte(8)]).into(),
        false => cdb.byte(4).into(),
    }
}

/// MODE SENSE.
pub(super) fn mode_sense(context: Context<'_>) -> Result<Reply, ScsiError> {
    let (lun, cdb) = (context.lun, &context.request.cdb);
    let ten = is_ten_byte(cdb);
    let (dbd, long) = (cdb.byte(1) & 0x08 != 0, cdb.byte(1) & 0x10 != 0);
    let control = PageControl::parse(cdb.byte(2))?;
    let mut pages = lun.pages().sense(cdb.byte(2) & 0x3f, cdb.byte(3), control)?;
    let mut descriptor = match (dbd, long) {
        (true, _) => Vec::new(),
        (false, true) => long_descriptor(lun),
        (false, false) => short_descriptor(lun),
    };
    let protected = if lun.is_write_protected() { WP } else { 0 };
    let device_specific = DPOFUA | protected;
    let rest = descriptor.len() + pages.len();
    let mut bytes = if ten {
        bytes_of(&Header10 {
            mode_data_length: len16(rest + 6),
            medium_type: 0,
            device_specific,
            long_lba: u8::from(long && !dbd),
            reserved: 0,
            block_descriptor_length: len16(descriptor.len()),
        })
    } else {
        bytes_of(&Header6 {
            mode_data_length: len8(rest + 3),
            medium_type: 0,
            device_specific,
            block_descriptor_length: len8(descriptor.len()),
        })
    };
    bytes.append(&mut descriptor);
    bytes.append(&mut pages);
    Ok(Reply::Data { bytes, allocation: cdb_length(cdb) })
}

fn short_descriptor(lun: &Lun) -> Vec<u8> {
    bytes_of(&ShortBlockDescriptor {
        blocks: U32::new(u32::try_from(lun.blocks()).unwrap_or(u32::MAX)),
        reserved: 0,
        block_size: wire::len24(lun.block_size()),
    })
}

fn long_descriptor(lun: &Lun) -> Vec<u8> {
    bytes_of(&LongBlockDescriptor {
        blocks: U64::new(lun.blocks()),
        reserved: U32::ZERO,
        block_size: U32::new(lun.block_size()),
    })
}

/// MODE SELECT. SP must be zero: nothing can be saved yet. PF must be one: the list holds pages.
pub(super) fn mode_select(context: Context<'_>) -> Result<Reply, ScsiError> {
    let cdb = &context.request.cdb;
    if cdb.byte(1) & 0x01 != 0 {
        return Err(ScsiError::cdb_field(1, 0));
    }
    let len = cdb_length(cdb);
    if len == 0 {
        return Ok(Reply::Good);
    }
    if cdb.byte(1) & 0x10 == 0 {
        return Err(ScsiError::cdb_field(1, 4));
    }
    if context.request.data_out.len() < len {
        return Err(ScsiError::Overrun);
    }
    let list = context.request.data_out.to_vec(len.min(MAX_PARAMETER_LIST));
    if list.len() < len {
        return Err(ScsiError::PARAMETER_LIST_LENGTH);
    }
    let pages_at = check_header(context.lun, &list, is_ten_byte(cdb))?;
    let lun = context.lun;
    let cached = lun.pages().write_cache();
    if lun.pages().select(&list, pages_at)? {
        context.target.announce(lun, UnitAttention::ModeParametersChanged, Some(context.nexus));
    }
    if cached && !lun.pages().write_cache() && !lun.store().capabilities().read_only {
        // The cache is off: what is still in it must not be lost (SBC-4 6.5.6).
        let on = Arc::clone(lun);
        return Ok(Reply::Job(Box::new(move |_| match on.store().flush() {
            Ok(()) => Ok(len),
            Err(e) => Err(ScsiError::from_store(e, true, on.block_size())),
        })));
    }
    Ok(Reply::Consumed(len))
}

/// Checks header and block descriptor; returns where the pages begin.
fn check_header(lun: &Lun, list: &[u8], ten: bool) -> Result<usize, ScsiError> {
    let short = || ScsiError::PARAMETER_LIST_LENGTH;
    let (header, long, descriptor_len) = if ten {
        let (header, _) = Header10::ref_from_prefix(list).map_err(|_| short())?;
        (
            size_of::<Header10>(),
            header.long_lba & 1 != 0,
            header.block_descriptor_length.get().into(),
        )
    } else {
        let (header, _) = Header6::ref_from_prefix(list).map_err(|_| short())?;
        (size_of::<Header6>(), false, usize::from(header.block_descriptor_length))
    };
    let length_field = u16::try_from(if ten { 6 } else { 3 }).unwrap_or(0);
    let rest = list.get(header..).ok_or_else(short)?;
    let (blocks, block_size, all_ones) = match (descriptor_len, long) {
        (0, _) => return Ok(header),
        (8, false) => {
            let (d, _) = ShortBlockDescriptor::ref_from_prefix(rest).map_err(|_| short())?;
            (u64::from(d.blocks.get()), wire::from24(d.block_size), u64::from(u32::MAX))
        }
        (16, true) => {
            let (d, _) = LongBlockDescriptor::ref_from_prefix(rest).map_err(|_| short())?;
            (d.blocks.get(), d.block_size.get(), u64::MAX)
        }
        _ => return Err(ScsiError::parameter_field(length_field, None)),
    };
    // Neither the block size nor the capacity can be changed.
    let at = u16::try_from(header).unwrap_or(0);
    let size_field = at + if long { 12 } else { 5 };
    if block_size != lun.block_size() {
        return Err(ScsiError::parameter_field(size_field, None));
    }
    if ![0, all_ones, lun.blocks()].contains(&blocks) {
        return Err(ScsiError::parameter_field(at, None));
    }
    Ok(header + descriptor_len)
}
