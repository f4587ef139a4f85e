//! Mode pages (SPC-5 7.5, SBC-4 6.5): what they say and what they switch.
//!
//! A page is bytes with a mask that says which bits an initiator may change. What those bits switch
//! is read from the bytes, so that what MODE SENSE shows is what is in force.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::sense::{ScsiError, asc};
use super::wire::{from_hex, len8, len16};
use crate::store::{Notes, StoreError};

/// The name that saved pages are noted under.
const NOTE: &str = "mode-pages";

/// All pages, or all subpages.
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// A mode page: header and parameters as on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    code: u8,
    subpage: u8,
    current: Vec<u8>,
    default: Vec<u8>,
    /// As after a reset: what was saved, if something was.
    saved: Vec<u8>,
    /// Bits that MODE SELECT may change.
    changeable: Vec<u8>,
}

/// Page and byte of a switch, and its bit.
struct Switch(u8, usize, u8);

const WCE: Switch = Switch(CACHING, 2, 0x04);
const D_SENSE: Switch = Switch(CONTROL, 2, 0x04);
const SWP: Switch = Switch(CONTROL, 4, 0x08);

const LBPERE: Switch = Switch(READ_WRITE_ERROR_RECOVERY, 7, 0x80);

const READ_WRITE_ERROR_RECOVERY: u8 = 0x01;
const DISCONNECT_RECONNECT: u8 = 0x02;
const VERIFY_ERROR_RECOVERY: u8 = 0x07;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const INFORMATIONAL_EXCEPTIONS: u8 = 0x1c;

/// Subpage of INFORMATIONAL_EXCEPTIONS: Logical Block Provisioning.
const PROVISIONING: u8 = 0x02;

/// Byte of the Logical Block Provisioning page where the threshold descriptor for available space is.
pub(super) const AVAILABLE_AT: usize = 16;
/// The same for used space.
pub(super) const USED_AT: usize = 24;

/// ENABLED of a threshold descriptor.
const ENABLED: u8 = 0x80;
/// THRESHOLD ARMING 001b: armed increasing; zero is armed decreasing.
const INCREASING: u8 = 0x01;
/// THRESHOLD RESOURCE: available and used LBA mapping resources.
const AVAILABLE: u8 = 0x01;
const USED: u8 = 0x02;

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
        let (current, saved) = (default.clone(), default.clone());
        Page { code, subpage, current, default, saved, changeable }
    }

    fn is_changeable(&self) -> bool {
        let header = if self.subpage == 0 { 2 } else { 4 };
        self.changeable.iter().skip(header).any(|bits| *bits != 0)
    }
}

/// Pages with what was saved of them.
fn restored(pages: Vec<Page>, notes: &Notes) -> Vec<Page> {
    let Some(text) = notes.get(NOTE) else { return pages };
    let list = from_hex(&text);
    let mut new = pages.clone();
    let mut at = 0;
    while at < list.len() {
        match select_one(&mut new, &list, at) {
            Ok(next) => at = next,
            Err(_) => {
                log::warn!(
                    "the mode pages saved beside the image do not fit the disk any more: {text}"
                );
                return pages;
            }
        }
    }
    new.iter_mut().for_each(|page| page.saved.clone_from(&page.current));
    new
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
    /// There is a place to save them in.
    saves: bool,
    /// What is saved there, as far as is known.
    noted: Mutex<Option<String>>,
    // What every command looks at, kept beside the pages so that it costs no lock.
    write_cache: AtomicBool,
    descriptor_sense: AtomicBool,
    software_write_protect: AtomicBool,
    thresholds: AtomicBool,
}

/// The thresholds that are set, in threshold sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thresholds {
    /// Least space that may be left before initiators are told.
    pub available: Option<u32>,
    /// Most space that may be used before initiators are told.
    pub used: Option<u32>,
}

impl Pages {
    /// The pages as they are after power on; `thresholds` says whether space can be watched. What was saved is taken
    /// from the notes.
    pub fn new(write_cache: bool, thresholds: bool, notes: &Notes) -> Self {
        let wce = if write_cache { 0x04 } else { 0 };
        let lbpere = if thresholds { vec![LBPERE] } else { Vec::new() };
        let lbpere_on: &[(usize, u8)] = if thresholds { &[(7, 0x80)] } else { &[] };
        let mut pages = vec![
            Page::new(READ_WRITE_ERROR_RECOVERY, 0, 12, lbpere_on, &lbpere),
            Page::new(DISCONNECT_RECONNECT, 0, 16, &[], &[]),
            Page::new(VERIFY_ERROR_RECOVERY, 0, 12, &[], &[]),
            Page::new(CACHING, 0, 20, &[(2, wce)], &[WCE]),
            // TST 001b: each initiator has a task set of its own. GLTSD: nothing of the log pages is saved.
            // Unrestricted reordering, QERR 00b. TAS: who ends commands of others has them answered with TASK
            // ABORTED. BUSY TIMEOUT PERIOD without limit.
            Page::new(
                CONTROL,
                0,
                12,
                &[(2, 0x22), (3, 0x10), (5, 0x40), (8, 0xff), (9, 0xff)],
                &[D_SENSE, SWP],
            ),
            // TCMOS and SCSIP: the clock is the host's, until SET TIMESTAMP.
            Page::new(CONTROL, 1, 32, &[(4, 0x06)], &[]),
            // DEXCPT: there are no informational exceptions to report.
            Page::new(INFORMATIONAL_EXCEPTIONS, 0, 12, &[(2, 0x08)], &[]),
        ];
        if thresholds {
            pages.push(provisioning_page());
        }
        let all = Pages {
            pages: Mutex::new(restored(pages, notes)),
            saves: notes.survive(),
            noted: Mutex::new(notes.get(NOTE)),
            write_cache: AtomicBool::new(write_cache),
            descriptor_sense: AtomicBool::new(false),
            software_write_protect: AtomicBool::new(false),
            thresholds: AtomicBool::new(false),
        };
        all.apply(&all.lock());
        all
    }

    /// Whether pages can be saved.
    pub fn saves(&self) -> bool {
        self.saves
    }

    /// Saves the pages as they are now; it waits for the host.
    ///
    /// # Errors
    /// If the host cannot keep them.
    pub fn save(&self, notes: &Notes) -> Result<(), StoreError> {
        let pages = self.lock().clone();
        let own = pages.iter().filter(|page| page.is_changeable());
        let hex: String =
            own.flat_map(|page| &page.current).map(|byte| format!("{byte:02x}")).collect();
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        notes.set(NOTE, Some(&hex))?;
        *noted = Some(hex);
        for (page, saved) in self.lock().iter_mut().zip(pages) {
            page.saved = saved.current;
        }
        Ok(())
    }

    /// What is saved may be another's by now: then the pages are as after a reset of that. Blocks.
    pub fn take_over(&self, notes: &Notes) {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let now = notes.get(NOTE);
        if *noted == now {
            return;
        }
        *noted = now;
        let mut pages = self.lock();
        for page in pages.iter_mut() {
            page.current.clone_from(&page.default);
            page.saved.clone_from(&page.default);
        }
        *pages = restored(pages.clone(), notes);
        self.apply(&pages);
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
        let any = thresholds(pages) != Thresholds::default();
        self.thresholds.store(any && is_set(LBPERE), Ordering::Release);
    }

    /// Whether an initiator wants to be told of space that runs out.
    pub fn has_thresholds(&self) -> bool {
        self.thresholds.load(Ordering::Acquire)
    }

    /// The thresholds that are set.
    pub fn thresholds(&self) -> Thresholds {
        thresholds(&self.lock())
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

    /// Back to what was saved, or the defaults.
    pub fn reset(&self) {
        let mut pages = self.lock();
        pages.iter_mut().for_each(|p| p.current.clone_from(&p.saved));
        self.apply(&pages);
    }

    /// The pages that a MODE SENSE asks for, one after another.
    pub(super) fn sense(
        &self,
        page: u8,
        subpage: u8,
        control: PageControl,
    ) -> Result<Vec<u8>, ScsiError> {
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
            .map(|p| (p, p.is_changeable() && self.saves))
            .flat_map(|(p, saves)| {
                let mut bytes = match control {
                    PageControl::Current => p.current.clone(),
                    PageControl::Changeable => p.changeable.clone(),
                    PageControl::Default => p.default.clone(),
                    PageControl::Saved => p.saved.clone(),
                };
                // PS: it can be saved.
                if let (true, Some(first)) = (saves, bytes.first_mut()) {
                    *first |= 0x80;
                }
                bytes
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
    pub(super) fn select(&self, list: &[u8], at: usize) -> Result<bool, ScsiError> {
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

/// The Logical Block Provisioning page (SBC-4 6.5.9): one threshold for what is left, one for what is
/// used, both off.
fn provisioning_page() -> Page {
    let set = [(AVAILABLE_AT + 1, AVAILABLE), (USED_AT, INCREASING), (USED_AT + 1, USED)];
    let counts = [AVAILABLE_AT, USED_AT].into_iter().flat_map(|at| at + 4..at + 8);
    let mut switches: Vec<Switch> =
        counts.map(|byte| Switch(INFORMATIONAL_EXCEPTIONS, byte, 0xff)).collect();
    switches
        .extend([AVAILABLE_AT, USED_AT].map(|at| Switch(INFORMATIONAL_EXCEPTIONS, at, ENABLED)));
    Page::new(INFORMATIONAL_EXCEPTIONS, PROVISIONING, USED_AT + 8, &set, &switches)
}

fn thresholds(pages: &[Page]) -> Thresholds {
    let page =
        pages.iter().find(|p| (p.code, p.subpage) == (INFORMATIONAL_EXCEPTIONS, PROVISIONING));
    let count = |at: usize| match page?.current.get(at..at + 8)? {
        [flags, _, _, _, count @ ..] if flags & ENABLED != 0 => {
            Some(u32::from_be_bytes(count.try_into().ok()?))
        }
        _ => None,
    };
    Thresholds { available: count(AVAILABLE_AT), used: count(USED_AT) }
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
pub(super) enum PageControl {
    /// In force now.
    Current,
    /// A mask of the bits that can be changed.
    Changeable,
    /// As nobody has changed them.
    Default,
    /// As after a reset.
    Saved,
}

impl PageControl {
    /// The PC field; saved values are there only where pages can be saved (SPC-5 6.14.1).
    pub(super) fn parse(bits: u8, saves: bool) -> Result<Self, ScsiError> {
        match bits >> 6 {
            0 => Ok(PageControl::Current),
            1 => Ok(PageControl::Changeable),
            2 => Ok(PageControl::Default),
            3 if saves => Ok(PageControl::Saved),
            _ => Err(ScsiError::illegal(asc::SAVING_PARAMETERS_NOT_SUPPORTED)),
        }
    }
}
