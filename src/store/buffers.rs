//! Scatter lists over memory that a guest may change at any moment.
//!
//! A [`Buffers`] is what a data transfer reads from or writes into: the kernel gets its segments
//! as an iovec, so that guest memory is filled or read in place; commands that must look at the
//! bytes copy them in or out. No reference to the memory is ever made, only raw copies.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

/// Alignment of memory made by [`Buffers::zeroed`], in bytes: enough for O_DIRECT everywhere.
const OWNED_ALIGN: usize = 4096;

/// A list of memory segments, and what keeps them mapped.
#[derive(Clone, Default)]
pub struct Buffers {
    segments: Segments,
    len: usize,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

/// Segments in the kernel's form. A queue thread makes lists for each request, so that hardly any of them is
/// allocated: a single segment lies where it is used, and the vectors of long lists are used again.
enum Segments {
    /// One; none if it is empty.
    One(libc::iovec),
    Many(Vec<libc::iovec>),
}

/// Vectors that a thread keeps for later, and the longest that it keeps, in segments. Together at most
/// 1 MiB, and so much only where hundreds of requests of a MiB were in flight.
const SPARE_LISTS: usize = 256;
const SPARE_SEGMENTS: usize = 256;

thread_local! {
    static SPARE: RefCell<Vec<Vec<libc::iovec>>> = const { RefCell::new(Vec::new()) };
}

impl Segments {
    #[inline]
    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Segments::One(one) if one.iov_len == 0 => &[],
            Segments::One(one) => std::slice::from_ref(one),
            Segments::Many(all) => all,
        }
    }

    #[inline]
    fn first_mut(&mut self) -> Option<&mut libc::iovec> {
        match self {
            Segments::One(one) => Some(one).filter(|one| one.iov_len > 0),
            Segments::Many(all) => all.first_mut(),
        }
    }

    /// Adds a segment that is not empty.
    #[inline]
    fn push(&mut self, base: *mut u8, len: usize) {
        let segment = libc::iovec { iov_base: base.cast(), iov_len: len };
        match self {
            Segments::One(one) if one.iov_len == 0 => *one = segment,
            Segments::One(_) => self.push_many(segment),
            Segments::Many(all) => all.push(segment),
        }
    }

    #[cold]
    fn push_many(&mut self, segment: libc::iovec) {
        self.as_vec();
        if let Segments::Many(all) = self {
            all.push(segment);
        }
    }

    /// The segments in a vector.
    fn as_vec(&mut self) -> &[libc::iovec] {
        if let Segments::One(_) = self {
            let mut many = spare();
            many.extend_from_slice(self.as_slice());
            *self = Segments::Many(many);
        }
        self.as_slice()
    }

    /// Takes away the first `gone`, of which there are as many.
    #[inline]
    fn drop_first(&mut self, gone: usize) {
        match self {
            Segments::One(one) if gone > 0 => one.iov_len = 0,
            Segments::One(_) => {}
            Segments::Many(all) => drop(all.drain(..gone)),
        }
    }
}

impl Default for Segments {
    #[inline]
    fn default() -> Self {
        Segments::One(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 })
    }
}

impl Clone for Segments {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        for segment in self.as_slice() {
            copy.push(segment.iov_base.cast(), segment.iov_len);
        }
        copy
    }
}

impl Drop for Segments {
    #[inline]
    fn drop(&mut self) {
        if let Segments::Many(list) = self {
            keep(std::mem::take(list));
        }
    }
}

/// A vector that was kept, or a new one.
fn spare() -> Vec<libc::iovec> {
    SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default()
}

/// Keeps the vector of a list that is gone.
#[cold]
fn keep(mut list: Vec<libc::iovec>) {
    if list.capacity() > SPARE_SEGMENTS {
        return;
    }
    list.clear();
    // A thread that ends keeps nothing.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < SPARE_LISTS {
            spare.push(list);
        }
    });
}

// SAFETY: the segments are plain addresses of memory that `owner` keeps mapped; every access goes
// through raw copies or the kernel, neither of which assumes exclusive access.
unsafe impl Send for Buffers {}
// SAFETY: as above; no method gives out a reference to the memory.
unsafe impl Sync for Buffers {}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes in {} segments)", self.len, self.iovecs().len())
    }
}

/// Memory of our own, page aligned, freed with its last user.
struct Owned(*mut u8, std::alloc::Layout);

// SAFETY: an allocation is not tied to a thread.
unsafe impl Send for Owned {}
// SAFETY: the pointer is only read to free it.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, and freed only here.
        unsafe { std::alloc::dealloc(self.0, self.1) }
    }
}

impl Buffers {
    /// An empty list, of segments that `owner` keeps mapped.
    pub fn of(owner: Arc<dyn Any + Send + Sync>) -> Self {
        Buffers { owner: Some(owner), ..Self::default() }
    }

    /// Adds a segment.
    ///
    /// # Safety
    /// It must stay mapped readable and writable as long as the list's owner lives, and must not overlap
    /// memory that Rust references point to.
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.segments.push(base, len);
            self.len += len;
        }
    }

    /// `len` zero bytes of our own memory, page aligned; `None` if there is no memory for them.
    pub fn zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self::default());
        }
        let layout = std::alloc::Layout::from_size_align(len, OWNED_ALIGN).ok()?;
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            return None;
        }
        let mut list = Self::of(Arc::new(Owned(base, layout)));
        // SAFETY: the owner frees the memory when the last list over it is gone.
        unsafe { list.push(base, len) };
        Some(list)
    }

    /// A copy of `bytes` in our own memory; `None` if there is no memory for it.
    pub fn copy_of(bytes: &[u8]) -> Option<Self> {
        let list = Self::zeroed(bytes.len())?;
        list.write_at(0, bytes);
        Some(list)
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments in the kernel's form.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.segments.as_slice()
    }

    /// The segments in the kernel's form, where they stay wherever the list goes.
    pub fn fixed_iovecs(&mut self) -> &[libc::iovec] {
        self.segments.as_vec()
    }

    /// Whether every segment starts at, and is as long as, a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        let mask = align.max(1) - 1;
        self.iovecs().iter().all(|s| (s.iov_base as usize | s.iov_len) & mask == 0)
    }

    /// The part `offset .. offset + len`, cut short at the end of the list.
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let mut part = Buffers { owner: self.owner.clone(), ..Self::default() };
        self.for_each(offset, len, |base, n, _| {
            part.segments.push(base, n);
            part.len += n;
        });
        part
    }

    /// The first `at` bytes, and the rest.
    pub fn split(self, at: usize) -> (Self, Self) {
        match self.len <= at {
            true => (self, Self::default()),
            false => (self.slice(0, at), self.skip(at)),
        }
    }

    /// The list without its first `count` bytes.
    pub fn skip(mut self, count: usize) -> Self {
        let mut left = count.min(self.len);
        self.len -= left;
        let whole = self.iovecs().iter().take_while(|s| {
            let goes = s.iov_len <= left;
            left -= if goes { s.iov_len } else { 0 };
            goes
        });
        let whole = whole.count();
        self.segments.drop_first(whole);
        if let Some(first) = self.segments.first_mut() {
            // `left` is less than the segment is long.
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
        }
        self
    }

    /// Copies out of the list from `offset` on, as much as `into` holds or the list has; returns
    /// the number of bytes copied.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> usize {
        let dst = into.as_mut_ptr();
        self.for_each(offset, into.len(), |base, n, at| {
            // SAFETY: `base` is mapped for `n` bytes by the contract of `from_raw`, and
            // `at + n <= into.len()` because `for_each` visits at most `into.len()` bytes.
            unsafe { std::ptr::copy_nonoverlapping(base, dst.add(at), n) }
        })
    }

    /// Copies `from` into the list at `offset`, as much as the list holds; returns the number of
    /// bytes copied.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let src = from.as_ptr();
        self.for_each(offset, from.len(), |base, n, at| {
            // SAFETY: as in `read_at`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(src.add(at), base, n) }
        })
    }

    /// Copies `len` bytes of another list, from its byte `skip` on, to byte `at` of this one, as much as both hold; returns
    /// the number of bytes copied.
    pub fn copy_from(&self, at: usize, from: &Buffers, skip: usize, len: usize) -> usize {
        from.for_each(skip, len.min(self.len.saturating_sub(at)), |source, n, done| {
            self.for_each(at + done, n, |target, n, more| {
                // SAFETY: both are mapped for `n` bytes by the contract of `push`; they may overlap.
                unsafe { std::ptr::copy(source.wrapping_add(more), target, n) }
            });
        })
    }

    /// The first `len` bytes (fewer if the list is shorter) as a vector.
    pub fn to_vec(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(self.len)];
        self.read_at(0, &mut bytes);
        bytes
    }

    /// Whether there is nothing but zeroes in it; looked at in pieces, the first others end it.
    pub fn is_zero(&self) -> bool {
        let mut piece = [0; 4096];
        let mut at = 0;
        while at < self.len {
            let n = self.read_at(at, &mut piece);
            if piece.iter().take(n).any(|byte| *byte != 0) {
                return false;
            }
            at += n.max(1);
        }
        true
    }

    /// Fills `len` bytes from `offset` on with zeroes.
    pub fn fill_zero(&self, offset: usize, len: usize) {
        self.for_each(offset, len, |base, n, _| {
            // SAFETY: `base` is mapped for `n` bytes by the contract of `from_raw`.
            unsafe { std::ptr::write_bytes(base, 0, n) }
        });
    }

    /// Calls `f(address, length, bytes visited before)` for each piece of the given range; returns
    /// how many bytes were visited.
    fn for_each(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(*mut u8, usize, usize),
    ) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for segment in self.iovecs() {
            if done == len {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let n = (segment.iov_len - skip).min(len - done);
            // `skip < iov_len`, so the sum stays inside the segment.
            f(segment.iov_base.cast::<u8>().wrapping_add(skip), n, done);
            done += n;
            skip = 0;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(parts: &[&[u8]]) -> Buffers {
        let mut all = Buffers::default();
        let mut owners: Vec<Arc<dyn Any + Send + Sync>> = Vec::new();
        for part in parts {
            let piece = Buffers::copy_of(part).unwrap();
            piece.iovecs().iter().for_each(|s| all.segments.push(s.iov_base.cast(), s.iov_len));
            all.len += piece.len;
            owners.extend(piece.owner.clone());
        }
        all.owner = Some(Arc::new(owners));
        all
    }

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let l = list(&[b"abc", b"", b"defg", b"h"]);
        assert_eq!(l.len(), 8);
        let mut out = [0; 5];
        assert_eq!(l.read_at(2, &mut out), 5);
        assert_eq!(&out, b"cdefg");
        assert_eq!(l.read_at(7, &mut out), 1);
        assert_eq!(l.read_at(8, &mut out), 0);
        assert_eq!(l.write_at(6, b"XYZ"), 2);
        assert_eq!(l.to_vec(99), b"abcdefXY");
    }

    #[test]
    fn slices_share_the_memory() {
        let l = list(&[b"abc", b"defg"]);
        let s = l.slice(2, 3);
        assert_eq!(s.to_vec(9), b"cde");
        s.fill_zero(0, 2);
        assert_eq!(l.to_vec(9), b"ab\0\0efg");
        assert_eq!(l.slice(7, 3).len(), 0);
        assert_eq!(l.slice(6, 3).len(), 1);
        for count in 0..9 {
            let rest = l.clone().skip(count);
            let (first, second) = l.clone().split(count);
            assert_eq!([first.to_vec(9), second.to_vec(9)].concat(), l.to_vec(9));
            assert_eq!((first.len(), second.to_vec(9)), (count.min(7), rest.to_vec(9)));
            assert_eq!(
                (rest.len(), rest.to_vec(9)),
                (7usize.saturating_sub(count), l.to_vec(9).split_off(count.min(7)))
            );
        }
    }

    #[test]
    fn lists_are_copied_between_segments_of_any_length() {
        let from = list(&[b"abc", b"defg", b"h"]);
        for (at, skip, len) in [(0, 0, 99), (1, 2, 5), (6, 1, 4), (0, 7, 3), (2, 8, 1), (9, 0, 1)] {
            let to = list(&[b"12345", b"6", b"789"]);
            let mut expected = b"123456789".to_vec();
            let source = b"abcdefgh".get(skip..).unwrap_or_default();
            let count = len.min(source.len()).min(9 - at);
            expected[at..at + count].copy_from_slice(&source[..count]);
            assert_eq!(to.copy_from(at, &from, skip, len), count, "{at} {skip} {len}");
            assert_eq!(to.to_vec(99), expected, "{at} {skip} {len}");
        }
    }

    #[test]
    fn alignment_looks_at_address_and_length() {
        let l = Buffers::zeroed(8192).unwrap();
        assert!(l.is_aligned(4096));
        assert!(!l.slice(512, 1024).is_aligned(4096));
        assert!(l.slice(512, 1024).is_aligned(512));
        assert!(!l.slice(0, 100).is_aligned(512));
    }
}
