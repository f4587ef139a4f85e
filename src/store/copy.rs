//! Copying ranges from one store to another, or within one, by the best way the host has.
//!
//! The source's extents say what there is to copy: holes become holes (or zeroes, where the destination
//! shall not be thin), reserved space is reserved, and data is shared by reflink, else moved inside the
//! kernel, else read and written. Which ways two files have is found out by trying, once per copy.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use super::{Cause, Durability, Hold, Kind, Piece, Store, StoreError, WriteBack, pieces};

/// A way to move data between two files without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Share the blocks (FICLONERANGE).
    Reflink,
    /// Let the kernel move the bytes (copy_file_range).
    Offload,
}

/// Bytes moved, by the way that moved them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Shared, not moved at all.
    pub reflinked: u64,
    /// Moved by the kernel.
    pub offloaded: u64,
    /// Read and written.
    pub copied: u64,
    /// Holes and reserved space, which have no bytes.
    pub holes: u64,
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Moved { reflinked, offloaded, copied, holes } = self;
        write!(f, "{reflinked} reflinked, {offloaded} offloaded, {copied} copied, {holes} in holes")
    }
}

/// Where a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source could not be read.
    Source,
    /// The destination could not be written.
    Destination,
}

/// A copy that did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyError {
    /// Which store the error is about.
    pub side: Side,
    /// What it said.
    pub error: StoreError,
    /// Bytes from the start that are copied all the same.
    pub done: u64,
}

/// What becomes of the destination where the source has a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// A hole.
    Stay,
    /// Zeroes that have space.
    AreReserved,
}

/// Extents looked at in one go.
const EXTENTS: usize = 512;

/// Bytes shared by one host call. It writes out what is not written yet, and nobody else gets at the files
/// meanwhile.
const REFLINK_STEP: u64 = 128 << 20;
/// Bytes moved by one host call, between which a cancellation is heard.
const OFFLOAD_STEP: u64 = 16 << 20;
/// Less than this is not worth splitting extents for.
const REFLINK_MIN: u64 = 64 << 10;

/// A copy between two stores.
pub struct Copy<'a> {
    from: &'a dyn Store,
    to: &'a dyn Store,
    holes: Holes,
    /// Asked with the bytes done so far; false ends the copy.
    go_on: &'a mut dyn FnMut(u64) -> bool,
    reflinks: bool,
    offloads: bool,
    buffer: Option<Buffer>,
    moved: Moved,
}

/// Why a step failed, before the bytes done are known.
type Failure = (Side, StoreError);

impl<'a> Copy<'a> {
    /// A copy from one store to another, which may be the same.
    pub fn new(
        from: &'a dyn Store,
        to: &'a dyn Store,
        holes: Holes,
        go_on: &'a mut dyn FnMut(u64) -> bool,
    ) -> Self {
        let (reflinks, offloads, buffer, moved) = (true, true, None, Moved::default());
        Copy { from, to, holes, go_on, reflinks, offloads, buffer, moved }
    }

    /// Bytes moved so far.
    pub fn moved(&self) -> Moved {
        self.moved
    }

    /// Copies a range to byte `at`. Within one store the ranges may overlap: the destination gets what
    /// the source was before.
    ///
    /// # Errors
    /// What went wrong and how far it came; [`Cause::Cancelled`] if it was told to end.
    pub fn run(&mut self, source: Range<u64>, at: u64) -> Result<(), CopyError> {
        let len = source.end.saturating_sub(source.start);
        let distance = at.abs_diff(source.start);
        let same = std::ptr::addr_eq(self.from, self.to);
        if same && distance == 0 {
            return Ok(());
        }
        if !same || distance >= len {
            return self.forward(source, at, u64::MAX);
        }
        // Pieces no longer than the distance do not overlap themselves; where that would be very
        // short ones, each is read whole before it is written.
        let room = self.buffer().map_err(|(side, error)| CopyError { side, error, done: 0 })?;
        let piece = distance.max(room.room() as u64);
        self.buffer = Some(room);
        match at.cmp(&source.start) {
            Ordering::Greater => self.backward(source, at, piece),
            Ordering::Less | Ordering::Equal => self.forward(source, at, piece),
        }
    }

    fn forward(&mut self, source: Range<u64>, at: u64, piece: u64) -> Result<(), CopyError> {
        let mut from = source.start;
        while from < source.end {
            let end = source.end.min(from.saturating_add(piece));
            let done = from - source.start;
            self.piece(from..end, at + done, done).map_err(|(more, (side, error))| CopyError {
                side,
                error,
                done: done + more,
            })?;
            from = end;
        }
        Ok(())
    }

    /// From the end to the start, so that nothing is overwritten before it is copied.
    fn backward(&mut self, source: Range<u64>, at: u64, piece: u64) -> Result<(), CopyError> {
        let mut end = source.end;
        while end > source.start {
            let start = source.start.max(end.saturating_sub(piece));
            let done = source.end - end;
            // What is done is at the end: from the start on, nothing is.
            self.piece(start..end, at + (start - source.start), done)
                .map_err(|(_, (side, error))| CopyError { side, error, done: 0 })?;
            end = start;
        }
        Ok(())
    }

    /// A piece whose source and destination do not overlap, or that is read whole before it is
    /// written; on failure also the bytes of it that are done.
    fn piece(&mut self, source: Range<u64>, at: u64, before: u64) -> Result<(), (u64, Failure)> {
        let len = source.end - source.start;
        let overlaps = std::ptr::addr_eq(self.from, self.to) && at.abs_diff(source.start) < len;
        if overlaps {
            self.check(before).map_err(|failure| (0, failure))?;
            return self.through_buffer(source, at).map(drop).map_err(|failure| (0, failure));
        }
        let mut from = source.start;
        while from < source.end {
            let extents = self
                .from
                .extents(from..source.end, EXTENTS)
                .map_err(|error| (from - source.start, (Side::Source, error)))?;
            for extent in extents {
                let to = at + (extent.range.start - source.start);
                from = extent.range.end;
                let start = extent.range.start;
                self.extent(extent.range, extent.kind, to, before + (start - source.start))
                    .map_err(|(done, failure)| (start - source.start + done, failure))?;
            }
        }
        Ok(())
    }

    fn check(&mut self, done: u64) -> Result<(), Failure> {
        match (self.go_on)(done) {
            true => Ok(()),
            false => Err((Side::Destination, Cause::Cancelled.into())),
        }
    }

    /// An extent of one kind.
    fn extent(
        &mut self,
        source: Range<u64>,
        kind: Kind,
        at: u64,
        before: u64,
    ) -> Result<(), (u64, Failure)> {
        let len = source.end - source.start;
        if kind == Kind::Data {
            return self.data(source, at, before);
        }
        let into = if self.holes == Holes::Stay { kind } else { Kind::Reserved };
        let mut done = 0;
        while done < len {
            self.check(before + done).map_err(|failure| (done, failure))?;
            let step = (len - done).min(self.to.zeroes_at_a_time(into).max(1));
            let range = at + done..at + done + step;
            let zeroed = match into {
                Kind::Hole => self.to.deallocate(range),
                Kind::Reserved | Kind::Data => self.to.reserve(range),
            };
            zeroed.map_err(|error| (done, (Side::Destination, error)))?;
            self.moved.holes += step;
            done += step;
        }
        Ok(())
    }

    /// Data: the blocks that both sides have whole are shared, what is left around them is copied.
    fn data(&mut self, source: Range<u64>, at: u64, before: u64) -> Result<(), (u64, Failure)> {
        let mut done = 0;
        let len = source.end - source.start;
        while done < len {
            self.check(before + done).map_err(|failure| (done, failure))?;
            let (from, to, left) = (source.start + done, at + done, len - done);
            let step = self.step(from, to, left).map_err(|failure| (done, failure))?;
            done += step;
        }
        Ok(())
    }

    /// Moves some bytes of data, and says how many.
    fn step(&mut self, from: u64, to: u64, left: u64) -> Result<u64, Failure> {
        let block = self.shared_block();
        let aligned = self.reflinks && from % block == to % block;
        let head = from.next_multiple_of(block) - from;
        let shares = aligned && left >= REFLINK_MIN + head;
        let most = match (shares, head) {
            (true, 0) => (left - left % block).min(REFLINK_STEP),
            (true, head) => head,
            (false, _) => left.min(OFFLOAD_STEP),
        };
        // The kernel reads and writes in one call. Where somebody has the blocks of one side for himself, he would have to
        // be waited for with the other side held: they are read and written one after the other instead.
        if let Some(held) = Both::hold_now(self.from, self.to, from, to, most) {
            if shares && head == 0 {
                match self.take(&held, from, to, most, Method::Reflink)? {
                    Some(moved) => {
                        self.moved.reflinked += moved;
                        return Ok(moved);
                    }
                    None => self.reflinks = false,
                }
            }
            if self.offloads {
                match self.take(&held, from, to, most.min(OFFLOAD_STEP), Method::Offload)? {
                    Some(moved) => {
                        self.moved.offloaded += moved;
                        return Ok(moved);
                    }
                    None => self.offloads = false,
                }
            }
        }
        self.through_buffer(from..from + most, to)
    }

    fn shared_block(&self) -> u64 {
        let block = |store: &dyn Store| u64::from(store.capabilities().host_block.max(1));
        block(self.from).max(block(self.to))
    }

    /// `None` if these two files do not have the method, or it failed and cannot tell which of them it is about: reading
    /// and writing can.
    fn take(
        &self,
        _held: &Both<'_>,
        from: u64,
        to: u64,
        len: u64,
        how: Method,
    ) -> Result<Option<u64>, Failure> {
        let Some(file) = self.from.file() else { return Ok(None) };
        let taken = self.to.behind().unwrap_or(self.to).take(file, from, to, len, how);
        // What is shared is what the host has written back, which is to be what is read.
        let is_lost = |write_back: &Arc<WriteBack>| write_back.look().is_some();
        match taken {
            Err(StoreError { cause: Cause::Medium, .. }) => Ok(None),
            Ok(Some(_)) if self.from.write_back().is_some_and(is_lost) => Ok(None),
            other => other.map_err(|error| (Side::Destination, error)),
        }
    }

    fn buffer(&mut self) -> Result<Buffer, Failure> {
        let new = || Piece::of(pieces::LONGEST).map(Buffer);
        self.buffer.take().or_else(new).ok_or((Side::Source, Cause::Busy.into()))
    }

    /// Reads a range, or as much of it as the buffer holds, whole, then writes it; says how many bytes that were.
    fn through_buffer(&mut self, source: Range<u64>, at: u64) -> Result<u64, Failure> {
        let buffer = self.buffer()?;
        let len = usize::try_from(source.end - source.start).unwrap_or(usize::MAX);
        let len = len.min(buffer.room());
        let done = copy_through(self.from, self.to, source.start, at, len, &buffer);
        self.buffer = Some(buffer);
        done?;
        self.moved.copied += len as u64;
        Ok(len as u64)
    }
}

/// What is read and what is written, held at the same time.
struct Both<'a> {
    held: [(&'a dyn Store, Option<Hold>); 2],
}

impl<'a> Both<'a> {
    /// `None` if somebody would have to be waited for.
    fn hold_now(
        from: &'a dyn Store,
        to: &'a dyn Store,
        source: u64,
        at: u64,
        len: u64,
    ) -> Option<Self> {
        let (read, written) = (source..source.saturating_add(len), at..at.saturating_add(len));
        let mut both = Both { held: [(from, None), (to, None)] };
        let [(_, source), (_, destination)] = &mut both.held;
        if std::ptr::addr_eq(from, to) {
            *source = Some(from.hold_now(&[read, written])?);
        } else {
            *source = Some(from.hold_now(&[read])?);
            *destination = Some(to.hold_now(&[written])?);
        }
        Some(both)
    }
}

impl Drop for Both<'_> {
    fn drop(&mut self) {
        for (store, hold) in &mut self.held {
            if let Some(hold) = hold.take() {
                store.let_go(hold);
            }
        }
    }
}

/// Memory for what is read, and as much for what is written where the two are aligned differently.
struct Buffer(Piece);

impl Buffer {
    fn half(&self) -> usize {
        self.0.len() / 2
    }

    /// Bytes that can be copied at a time, whatever stands around them.
    fn room(&self) -> usize {
        self.half().saturating_sub(2 * EDGE)
    }
}

/// The largest alignment of transfers that there is (O_DIRECT).
const EDGE: usize = 4096;

/// Reads `len` bytes from `source` and writes them to `at`. Where transfers must be aligned and these are
/// not, what stands around them is read with them, and written back as it is.
fn copy_through(
    from: &dyn Store,
    to: &dyn Store,
    source: u64,
    at: u64,
    len: usize,
    buffer: &Buffer,
) -> Result<(), Failure> {
    let read_error = |error| (Side::Source, error);
    let write_error = |error| (Side::Destination, error);
    let window = aligned_window(from, source, len);
    let within = usize::try_from(source - window.start).unwrap_or(0);
    let bytes = buffer.0.slice(0, usize::try_from(window.end - window.start).unwrap_or(0));
    from.read(window.start, &bytes).map_err(read_error)?;
    let data = bytes.slice(within, len);
    let target = aligned_window(to, at, len);
    if target == (at..at + len as u64) {
        return to.write(at, &data, Durability::Cached).map_err(write_error);
    }
    let around = usize::try_from(target.end - target.start).unwrap_or(0);
    let whole = buffer.0.slice(buffer.half(), around);
    to.read(target.start, &whole).map_err(write_error)?;
    whole.copy_from(usize::try_from(at - target.start).unwrap_or(0), &data, 0, len);
    to.write(target.start, &whole, Durability::Cached).map_err(write_error)
}

/// The smallest range around this one that a store can transfer.
fn aligned_window(store: &dyn Store, start: u64, len: usize) -> Range<u64> {
    let align = u64::from(store.capabilities().transfer_align.max(1));
    let end = start.saturating_add(len as u64);
    start - start % align..end.next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::store::mem::MemStore;
    use crate::store::{Buffers, Capabilities, Extent, Notes, Pool, Space};

    const SIZE: u64 = 4 << 20;

    fn filled() -> MemStore {
        let store = MemStore::new(SIZE);
        let bytes: Vec<u8> = (0..SIZE).map(|n| (n / 512 * 7 + n) as u8).collect();
        store.write(0, &Buffers::copy_of(&bytes).unwrap(), Durability::Cached).unwrap();
        store
    }

    fn bytes(store: &dyn Store) -> Vec<u8> {
        let all = Buffers::zeroed(SIZE as usize).unwrap();
        store.read(0, &all).unwrap();
        all.to_vec(SIZE as usize)
    }

    /// A disk on a host where the kernel's own copies of a range fail, and say no more than that.
    struct Mute {
        store: MemStore,
        file: File,
        unreadable: Range<u64>,
        unwritable: Range<u64>,
    }

    impl Mute {
        fn new(unreadable: Range<u64>, unwritable: Range<u64>) -> Self {
            let file = File::open("/dev/null").unwrap();
            Mute { store: filled(), file, unreadable, unwritable }
        }
    }

    fn meets(range: &Range<u64>, offset: u64, len: usize) -> Result<(), StoreError> {
        let meets = offset < range.end && range.start < offset + len as u64;
        if meets { Err(StoreError::at(Cause::Medium, offset.max(range.start))) } else { Ok(()) }
    }

    impl Store for Mute {
        fn capabilities(&self) -> &Capabilities {
            self.store.capabilities()
        }

        fn size(&self) -> Result<u64, StoreError> {
            self.store.size()
        }

        fn read(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
            meets(&self.unreadable, offset, into.len())?;
            self.store.read(offset, into)
        }

        fn read_medium(&self, offset: u64, into: &Buffers) -> Result<(), StoreError> {
            self.read(offset, into)
        }

        fn write(&self, offset: u64, from: &Buffers, how: Durability) -> Result<(), StoreError> {
            meets(&self.unwritable, offset, from.len())?;
            self.store.write(offset, from, how)
        }

        fn write_whole(&self, offset: u64, from: &Buffers) -> Result<(), StoreError> {
            self.write(offset, from, Durability::Stable)
        }

        fn flush(&self) -> Result<(), StoreError> {
            self.store.flush()
        }

        fn prefetch(&self, offset: u64, len: u64) -> Result<(), StoreError> {
            self.store.prefetch(offset, len)
        }

        fn extents(&self, range: Range<u64>, limit: usize) -> Result<Vec<Extent>, StoreError> {
            self.store.extents(range, limit)
        }

        fn deallocate(&self, range: Range<u64>) -> Result<(), StoreError> {
            self.store.deallocate(range)
        }

        fn reserve(&self, range: Range<u64>) -> Result<(), StoreError> {
            self.store.reserve(range)
        }

        fn file(&self) -> Option<&File> {
            Some(&self.file)
        }

        fn take(
            &self,
            _: &File,
            _: u64,
            at: u64,
            _: u64,
            _: Method,
        ) -> Result<Option<u64>, StoreError> {
            Err(StoreError::at(Cause::Medium, at))
        }

        fn space(&self) -> Result<Option<Space>, StoreError> {
            self.store.space()
        }

        fn notes(&self) -> &Notes {
            self.store.notes()
        }

        fn pool(&self) -> &Pool {
            self.store.pool()
        }
    }

    #[test]
    fn it_is_the_side_that_fails_which_is_named() {
        let bad = 2 << 20..(2 << 20) + 512;
        for (unreadable, unwritable, side) in [
            (bad.clone(), 0..0, Some(Side::Source)),
            (0..0, bad.clone(), Some(Side::Destination)),
            // The kernel's own way fails, and it was neither.
            (0..0, 0..0, None),
        ] {
            let (from, to) = (Mute::new(unreadable, 0..0), Mute::new(0..0, unwritable));
            to.store.deallocate(0..SIZE).unwrap();
            let copied = Copy::new(&from, &to, Holes::Stay, &mut |_| true).run(0..SIZE, 0);
            let error = copied.err().map(|e| (e.side, e.error));
            assert_eq!(error, side.map(|side| (side, StoreError::at(Cause::Medium, bad.start))));
            let done = copied.map_or_else(|error| error.done as usize, |()| SIZE as usize);
            assert!(bytes(&to)[..done] == bytes(&from.store)[..done]);
        }
    }

    #[test]
    fn overlapping_copies_are_what_memmove_does() {
        for (source, at) in [
            (0..3 << 20, 512),
            (512..3 << 20, 0),
            (0..3 << 20, 1 << 20),
            (1 << 20..4 << 20, 0),
            (100..(2 << 20) + 7, (1 << 20) + 300),
            (0..SIZE, 0),
            (5..6, 6),
        ] {
            let store = filled();
            let mut expected = bytes(&store);
            expected.copy_within(source.start as usize..source.end as usize, at as usize);
            Copy::new(&store, &store, Holes::Stay, &mut |_| true).run(source.clone(), at).unwrap();
            assert!(bytes(&store) == expected, "{source:?} to {at}");
        }
    }

    #[test]
    fn holes_and_reserved_space_stay_what_they_are() {
        let (from, to) = (filled(), filled());
        from.deallocate(0..1 << 20).unwrap();
        from.reserve(2 << 20..3 << 20).unwrap();
        let mut go_on = |_| true;
        let mut copy = Copy::new(&from, &to, Holes::Stay, &mut go_on);
        copy.run(0..SIZE, 0).unwrap();
        assert_eq!(copy.moved().holes, 2 << 20);
        let kinds = |store: &MemStore| store.extents(0..SIZE, 99).unwrap();
        assert_eq!(kinds(&from), kinds(&to));
        assert!(bytes(&from) == bytes(&to));
        let thick = filled();
        Copy::new(&from, &thick, Holes::AreReserved, &mut |_| true).run(0..SIZE, 0).unwrap();
        assert!(kinds(&thick).iter().all(|extent| extent.kind != Kind::Hole));
    }

    /// A hole or reserved space of any length is a step at a time, and the copy can be ended before each.
    #[test]
    fn a_huge_hole_can_be_cancelled() {
        const HUGE: u64 = 12 << 30;
        let (from, to) = (MemStore::new(HUGE), MemStore::new(HUGE));
        let step = to.zeroes_at_a_time(Kind::Hole);
        let mut go_on = |done| done < step;
        let mut copy = Copy::new(&from, &to, Holes::Stay, &mut go_on);
        let error = copy.run(0..HUGE, 0).unwrap_err();
        assert_eq!((error.error.cause, error.done), (Cause::Cancelled, step));
        assert_eq!(copy.moved().holes, step);
    }

    #[test]
    fn a_copy_that_is_cancelled_or_fails_says_how_far_it_came() {
        let (from, to) = (filled(), MemStore::new(SIZE));
        let error = Copy::new(&from, &to, Holes::Stay, &mut |done| done < 2 << 20)
            .run(0..SIZE, 0)
            .unwrap_err();
        assert_eq!(error.error.cause, Cause::Cancelled);
        assert!((2 << 20..3 << 20).contains(&error.done), "{}", error.done);
        let done = error.done as usize;
        assert!(bytes(&to)[..done] == bytes(&from)[..done]);
        assert!(bytes(&to)[done..].iter().all(|byte| *byte == 0));
        let read_only = MemStore::new(SIZE).read_only();
        let error = Copy::new(&from, &read_only, Holes::Stay, &mut |_| true).run(512..1024, 0);
        let error = error.unwrap_err();
        assert_eq!((error.side, error.error.cause), (Side::Destination, Cause::ReadOnly));
    }
}
