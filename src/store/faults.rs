//! A host that fails on request (`fault=`): a store around a store that answers with errors, late, or in part. For
//! tests, and for people who want to see what their guest does then.

use std::fs::File;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::copy::{CopyError, Method, Side};
use super::{
    Buffers, Capabilities, Cause, Durability, Extent, Hold, Kind, Notes, Operation, Pool, RingFile,
    Snapshot, Space, Store, StoreError, WriteBack,
};

/// What a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    Copy,
    Any,
}

/// What happens then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Fails(Cause),
    /// It succeeds after this long.
    Late(Duration),
    /// It holds whoever makes the call for this long, as a frozen file system does, then it succeeds.
    Stalls(Duration),
    /// Its first half is done, then it fails.
    Half,
}

/// One fault: `OPERATION:EFFECT[@FROM-TO][*COUNT]`.
#[derive(Debug)]
pub struct Fault {
    target: Target,
    effect: Effect,
    range: Range<u64>,
    /// How often it still happens.
    left: AtomicU64,
}

impl PartialEq for Fault {
    fn eq(&self, other: &Self) -> bool {
        (self.target, self.effect, &self.range) == (other.target, other.effect, &other.range)
    }
}

impl Eq for Fault {}

impl Clone for Fault {
    fn clone(&self) -> Self {
        let left = AtomicU64::new(self.left.load(Ordering::Acquire));
        Fault { target: self.target, effect: self.effect, range: self.range.clone(), left }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("'{text}' is no number"));
        let (text, left) = match text.split_once('*') {
            Some((text, count)) => (text, number(count)?),
            None => (text, u64::MAX),
        };
        let (text, range) = match text.split_once('@') {
            Some((text, range)) => {
                let (from, to) = range.split_once('-').ok_or("a range is FROM-TO, in bytes")?;
                (text, number(from)?..number(to)?)
            }
            None => (text, 0..u64::MAX),
        };
        let (target, effect) = text.split_once(':').ok_or("a fault is OPERATION:EFFECT")?;
        let target = match target {
            "read" => Target::Read,
            "write" => Target::Write,
            "flush" => Target::Flush,
            "discard" => Target::Discard,
            "zero" => Target::Zero,
            "copy" => Target::Copy,
            "any" => Target::Any,
            _ => return Err("OPERATION is read, write, flush, discard, zero, copy or any".into()),
        };
        let effect = match effect {
            "eio" => Effect::Fails(Cause::Medium),
            "enospc" => Effect::Fails(Cause::NoSpace),
            "erofs" => Effect::Fails(Cause::ReadOnly),
            "enomem" => Effect::Fails(Cause::Busy),
            "half" => Effect::Half,
            _ => match effect.split_once("-ms-") {
                Some(("delay", ms)) => Effect::Late(Duration::from_millis(number(ms)?)),
                Some(("stall", ms)) => Effect::Stalls(Duration::from_millis(number(ms)?)),
                _ => {
                    let known = "eio, enospc, erofs, enomem, half, delay-ms-N or stall-ms-N";
                    return Err(format!("EFFECT is {known}"));
                }
            },
        };
        Ok(Fault { target, effect, range, left: AtomicU64::new(left) })
    }
}

/// A store with faults.
pub struct Faults<S> {
    store: S,
    faults: Vec<Fault>,
}

impl<S: Store> Faults<S> {
    /// Puts faults into a store.
    pub fn new(store: S, faults: Vec<Fault>) -> Self {
        Faults { store, faults }
    }

    /// What happens to an operation: an error, nothing (any more), or that it ends at a byte.
    fn strike(&self, target: Target, range: &Range<u64>) -> Result<Option<u64>, StoreError> {
        for fault in &self.faults {
            let about = fault.target == target || fault.target == Target::Any;
            let overlaps =
                fault.range.start < range.end.max(range.start + 1) && range.start < fault.range.end;
            if !about || !overlaps || !fault.spend() {
                continue;
            }
            let at = range.start.max(fault.range.start);
            match fault.effect {
                Effect::Fails(cause) => return Err(StoreError::at(cause, at)),
                Effect::Late(time) | Effect::Stalls(time) => std::thread::sleep(time),
                Effect::Half => return Ok(Some(range.start + (range.end - range.start) / 2)),
            }
        }
        Ok(None)
    }

    /// What happens to a flush: what was written before is lost, but where the call could not even begin.
    fn strike_flush(&self) -> Result<(), StoreError> {
        let struck = self.strike(Target::Flush, &(0..u64::MAX)).map(drop);
        struck.map_err(|error| match (error.cause, self.store.write_back()) {
            (Cause::Busy, _) => Cause::Busy.into(),
            (cause, Some(write_back)) => write_back.fail(cause),
            (cause, None) => StoreError::lost(cause),
        })
    }

    /// Does `whole`, or as much of it as a fault leaves, by `part`.
    fn run(
        &self,
        target: Target,
        range: Range<u64>,
        part: impl Fn(Range<u64>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        match self.strike(target, &range)? {
            None => part(range),
            Some(end) => {
                let align = u64::from(self.store.capabilities().transfer_align.max(512));
                let end = end - end % align;
                if end > range.start {
                    part(range.start..end)?;
                }
                Err(StoreError::at(Cause::Medium, end.max(range.start)))
            }
        }
    }
}

impl Fault {
    /// Whether it happens once more.
    fn spend(&self) -> bool {
        let spend = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, spend).is_ok()
    }
}

/// As many bytes of a list as there are in a range that begins where the list does.
fn first(list: &Buffers, range: &Range<u64>) -> Buffers {
    list.slice(0, usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(list.len()))
}

fn bytes(offset: u64, list: &Buffers) -> Range<u64> {
    offset..offset.saturating_add(list.len() as u64)
}

/// Where the byte is that comes after so many bytes of ranges.
fn place(ranges: &[Range<u64>], mut done: u64) -> u64 {
    for range in ranges {
        let len = range.end - range.start;
        if done < len {
            return range.start + done;
        }
        done -= len;
    }
    0
}

impl<S: Store> Store for Faults<S> {
    fn capabilities(&self) -> &Capabilities {
        self.store.capabilities()
    }

    fn size(&self) -> Result<u64, StoreError> {
        self.store.size()
    }

    fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        let part = |range| self.store.read(offset, &first(into, &range));
        self.run(Target::Read, bytes(offset, into), part)
    }

    fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
        let part = |range| self.store.read_medium(offset, &first(into, &range));
        self.run(Target::Read, bytes(offset, into), part)
    }

    fn write(&self, offset: u64, from: &Buffers, durability: Durability) -> Result<(), StoreError> {
        if durability == Durability::Stable
            && let Some(lost) = self.store.write_back().and_then(|w| w.failure())
        {
            return Err(lost);
        }
        let part = |range| self.store.write(offset, &first(from, &range), Durability::Cached);
        self.run(Target::Write, bytes(offset, from), part)?;
        match durability {
            Durability::Cached => Ok(()),
            Durability::Stable => self.flush(),
        }
    }

    fn overwrite(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        let part = |range| self.store.overwrite(offset, &first(from, &range));
        self.run(Target::Write, bytes(offset, from), part)
    }

    fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
        self.strike(Target::Write, &bytes(offset, from))?;
        self.strike_flush()?;
        self.store.write_whole(offset, from)
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.strike_flush()?;
        self.store.flush()
    }

    fn write_back(&self) -> Option<&Arc<WriteBack>> {
        self.store.write_back()
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.store.prefetch(offset, len)
    }

    fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
        self.store.extents(range, limit)
    }

    fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.run(Target::Discard, range, |part| self.store.deallocate(part))
    }

    fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
        self.run(Target::Zero, range, |part| self.store.reserve(part))
    }

    fn zeroes_at_a_time(&self, into: Kind) -> u64 {
        self.store.zeroes_at_a_time(into)
    }

    /// Nothing, but for stalls of writes: other faults happen where there is time for them.
    fn try_now(&self, operation: &Operation) -> Option<Result<(), StoreError>> {
        let stalls = |fault: &Fault| {
            matches!(fault.effect, Effect::Stalls(_)) && fault.target == Target::Write
        };
        if !self.faults.iter().all(stalls) {
            return None;
        }
        if let Operation::Write { offset, from, .. } = operation
            && let Err(error) = self.strike(Target::Write, &bytes(*offset, from))
        {
            return Some(Err(error));
        }
        self.store.try_now(operation)
    }

    fn ring_file(&self, _: &Operation) -> Option<(RingFile, Hold)> {
        None
    }

    fn file(&self) -> Option<&File> {
        self.store.file()
    }

    fn take(
        &self,
        from: &File,
        source: u64,
        at: u64,
        len: u64,
        how: Method,
    ) -> Result<Option<u64>, StoreError> {
        let end = self.strike(Target::Copy, &(at..at.saturating_add(len)))?;
        // A part of a block cannot be shared: then this way has nothing to offer, and the bytes are copied.
        self.store.take(from, source, at, end.map_or(len, |end| end - at), how)
    }

    /// The steps of a snapshot are copies of what is in the ranges.
    fn snapshot(
        &self,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>, CopyError> {
        let mut failed = None;
        let mut step = |done: u64| {
            let at = place(ranges, done);
            match self.strike(Target::Copy, &(at..at.saturating_add(1))) {
                Ok(_) => go_on(done),
                Err(error) => {
                    failed = Some(CopyError { side: Side::Source, error, done });
                    false
                }
            }
        };
        let made = self.store.snapshot(ranges, &mut step);
        failed.map_or(made, Err)
    }

    fn space(&self) -> Result<Option<Space>, StoreError> {
        self.store.space()
    }

    fn notes(&self) -> &Notes {
        self.store.notes()
    }

    fn take_over(&self, go_on: &dyn Fn() -> bool) -> Result<(), StoreError> {
        self.store.take_over(go_on)
    }

    fn pool(&self) -> &Pool {
        self.store.pool()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;

    fn store(faults: &[&str]) -> Faults<MemStore> {
        Faults::new(MemStore::new(1 << 20), faults.iter().map(|f| f.parse().unwrap()).collect())
    }

    #[test]
    fn faults_happen_where_and_as_often_as_they_should() {
        let store = store(&["write:eio@4096-8192*2", "flush:enospc*1", "read:half@65536-65537"]);
        let two = Buffers::copy_of(&[7; 8192]).unwrap();
        let write = |offset| store.write(offset, &two, Durability::Cached);
        assert_eq!(write(0), Err(StoreError::at(Cause::Medium, 4096)));
        write(8192).unwrap();
        assert_eq!(write(4096), Err(StoreError::at(Cause::Medium, 4096)));
        write(0).unwrap();
        assert_eq!(store.flush(), Err(StoreError::lost(Cause::NoSpace)));
        store.flush().unwrap();
        write(65536).unwrap();
        let into = Buffers::zeroed(8192).unwrap();
        assert_eq!(store.read(65536, &into), Err(StoreError::at(Cause::Medium, 65536 + 4096)));
        assert_eq!(into.to_vec(8192), [[7; 4096], [0; 4096]].concat());
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for text in [
            "",
            "write",
            "write:",
            "write:eperm",
            "erase:eio",
            "read:eio@5",
            "read:eio*x",
            "read:delay-ms-x",
        ] {
            text.parse::<Fault>().unwrap_err();
        }
    }
}
