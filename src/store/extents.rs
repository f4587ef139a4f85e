//! Which parts of a file hold data, which only reserve space, and which are holes.
//!
//! No single call knows. lseek(2) knows what reads as zeroes, page cache included, but not what has
//! space; FIEMAP knows what has space, but without flushing it calls fresh data unwritten. So both
//! are asked, FIEMAP first: a write that lands in between is then seen by lseek.
//!
//! | lseek | FIEMAP | kind |
//! |---|---|---|
//! | not asked | extent, written | data |
//! | data | anything | data |
//! | hole | extent, unwritten | reserved; data, where a disk cannot be asked to reserve space |
//! | hole | no extent, or no FIEMAP here | hole |
//! | says nothing | anything | data |
//!
//! lseek errs to the safe side: on ext4 and XFS whatever lies in the page cache over unwritten space is data to it, be it
//! the zeroes that a read has left there, or the mark that stays where memory pressure evicted such a page. Where none of
//! it waits to be written, the kernel is asked to drop it, and lseek once more: what it calls data then is.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::fiemap::{self, Mapped};
use super::trial::Seek;

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// May hold data. The only safe answer where nothing is known.
    Data,
    /// Reads as zeroes and has space reserved for it.
    Reserved,
    /// Reads as zeroes and has no space.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The bytes.
    pub range: Range<u64>,
    /// What they are.
    pub kind: Kind,
}

/// A list of extents that touch each other; neighbours differ in kind.
#[derive(Debug, Default)]
pub(super) struct List(Vec<Extent>);

impl List {
    /// Number of extents.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The first extents, at most `limit`.
    pub(super) fn first(mut self, limit: usize) -> Vec<Extent> {
        self.0.truncate(limit);
        self.0
    }

    /// Adds a run; one of the same kind as the last extent becomes part of it.
    pub(super) fn push(&mut self, range: Range<u64>, kind: Kind) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.kind == kind && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.0.push(Extent { range, kind }),
        }
    }
}

/// What a host tells about a file; the file systems differ in what they know.
pub(super) trait Host {
    /// The page cache is asked about parts of a range that begin and end at multiples of this: no folio is longer.
    const FOLIO: u64 = 2 << 20;

    /// The first extents with space (at most `max`) that overlap the range.
    fn mapped(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Mapped>>;
    /// The first byte of data at or after `at`; `None` if there is none before the end of the file.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>>;
    /// The first byte of a hole at or after `at`, which is in data.
    fn next_hole(&self, at: u64) -> io::Result<u64>;
    /// What the page cache has of a range that has no data on the disk.
    fn cached(&self, _range: &Range<u64>) -> Cached {
        Cached::Fresh
    }
    /// Drops from the page cache what is not waiting to be written.
    fn forget(&self, _range: &Range<u64>) {}
}

/// What the page cache has of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cached {
    /// Nothing but what is to be written, or that is not known.
    Fresh,
    /// Something of the one, and something of the other.
    Mixed,
    /// Nothing that was written and is not on the disk.
    Clean,
}

/// Most bytes of the page cache that are looked at, and dropped, by one call.
const CACHED_AT_A_TIME: u64 = 1 << 30;

impl Host for File {
    fn mapped(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Mapped>> {
        fiemap::mapped(self, range, max)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        seek(self, at, Whence::SeekData)
    }

    fn next_hole(&self, at: u64) -> io::Result<u64> {
        // Beyond the end of the file everything is a hole.
        Ok(seek(self, at, Whence::SeekHole)?.unwrap_or(at))
    }
}

/// `lseek(2)`; `None` for ENXIO. Nobody uses the file position that it moves.
fn seek(file: &File, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let offset = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    match lseek(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a host can tell about one file, tried out on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knowledge {
    /// lseek tells data from holes.
    pub seek: bool,
    /// It does so once what was written is flushed.
    pub when_flushed: bool,
    /// FIEMAP tells what has space.
    pub fiemap: bool,
    /// Space that was not written is told as reserved, not as data: for files of which space can be reserved.
    pub reserved: bool,
}

impl std::fmt::Display for Knowledge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match (self.seek, self.fiemap) {
            (true, true) if self.reserved => "fiemap+seek",
            (true, true) => "fiemap+seek(reserved space is told as data)",
            (true, false) => "seek(reserved space is told as a hole)",
            (false, _) => "none(everything is told as data)",
        })?;
        f.write_str(if self.when_flushed { "(flushed first)" } else { "" })
    }
}

impl Knowledge {
    /// Tries both calls on the file, of which it is known what lseek sees.
    pub(super) fn probe(host: &impl Host, seek: Seek) -> Self {
        let fiemap = host.mapped(0..1, 1).is_ok();
        let seeks = seek != Seek::Lies && host.next_data(0).is_ok();
        let when_flushed = seeks && seek == Seek::SeesWhatIsFlushed;
        Knowledge { seek: seeks, when_flushed, fiemap, reserved: false }
    }

    /// Whether lseek tells data from holes at any time.
    fn seeks_at_once(self) -> bool {
        self.seek && !self.when_flushed
    }
}

/// Host calls after which a walk lets others run: on a busy machine a read would else wait for the
/// scheduler's slice, which is as long as a thousand calls.
const CALLS_AT_A_TIME: usize = 6;

/// Host calls that one walk may make for each extent it may return, and at least.
const CALLS_PER_EXTENT: usize = 4;
const MIN_CALLS: usize = 64;

/// The extents from `range.start` on: touching, merged, at most `limit` of them. The list may end
/// before the range does, if there are more extents or if finding them would take too long; it is
/// empty only if the range is.
pub(super) fn walk(
    host: &impl Host,
    knows: Knowledge,
    range: Range<u64>,
    limit: usize,
) -> Vec<Extent> {
    let budget = limit.saturating_mul(CALLS_PER_EXTENT).max(MIN_CALLS);
    let (list, no_data) = (List::default(), 0..0);
    let mut walk = Walk { host, knows, list, no_data, limit, calls: 0, budget };
    let mut at = range.start;
    while at < range.end && !walk.is_over() {
        at = match (knows.seek, knows.fiemap) {
            (false, _) => walk.all_data(at..range.end),
            (true, false) => walk.step_by_seek(at..range.end),
            (true, true) => walk.step_by_both(at..range.end),
        };
    }
    walk.list.first(limit)
}

/// A range without the parts of blocks at its ends where the whole block reads as zeroes already: freeing a part
/// of such a block frees nothing, and btrfs may even take space for it, to write the zeroes into.
pub(super) fn without_empty_ends(
    host: &impl Host,
    knows: Knowledge,
    range: Range<u64>,
    block: u64,
) -> Range<u64> {
    let Range { mut start, mut end } = range;
    let is_empty = |at: u64| matches!(host.next_data(at), Ok(data) if data.is_none_or(|data| data >= at + block));
    let (head, tail) = (start % block, end % block);
    if knows.seeks_at_once() && head != 0 && is_empty(start - head) {
        start = end.min(start - head + block);
    }
    if knows.seeks_at_once() && tail != 0 && start < end && is_empty(end - tail) {
        end = start.max(end - tail);
    }
    start..end
}

struct Walk<'a, H> {
    host: &'a H,
    knows: Knowledge,
    list: List,
    /// A range in which lseek has found no data during this walk.
    no_data: Range<u64>,
    limit: usize,
    calls: usize,
    budget: usize,
}

impl<H: Host> Walk<'_, H> {
    /// Whether there is enough, or it has taken long enough. One extent too many is looked for: only then is it sure that
    /// the last one is whole.
    fn is_over(&self) -> bool {
        self.list.len() > self.limit || self.calls >= self.budget
    }

    fn count_call(&mut self) {
        self.calls += 1;
        if self.calls.is_multiple_of(CALLS_AT_A_TIME) {
            std::thread::yield_now();
        }
    }

    fn all_data(&mut self, range: Range<u64>) -> u64 {
        self.list.push(range.clone(), Kind::Data);
        range.end
    }

    /// A hole and the data behind it.
    fn step_by_seek(&mut self, range: Range<u64>) -> u64 {
        let data = self.data_in(range.clone());
        self.list.push(range.start..data.start, Kind::Hole);
        self.list.push(data.clone(), Kind::Data);
        data.end
    }

    /// A batch of FIEMAP's extents with what lies between them, or as much of it as is wanted: there may be any number of
    /// fresh writes in one of them.
    fn step_by_both(&mut self, range: Range<u64>) -> u64 {
        self.count_call();
        let max = self.limit.saturating_add(2).min(fiemap::BATCH);
        let Ok(batch) = self.host.mapped(range.clone(), max) else {
            // It worked when it was tried: whatever this is, nothing was learned.
            return self.all_data(range);
        };
        let complete = batch.len() < max;
        let mut at = range.start;
        for extent in batch {
            let (start, end) = (extent.start.clamp(at, range.end), extent.end.clamp(at, range.end));
            at = self.zeroes_unless_data(at..start, Kind::Hole);
            if at < start {
                return at;
            }
            at = match extent.unwritten && self.knows.reserved {
                true => self.zeroes_unless_data(start..end, Kind::Reserved),
                false => self.all_data(start..end),
            };
            if at < end {
                return at;
            }
        }
        match complete || at == range.start {
            true => self.zeroes_unless_data(at..range.end, Kind::Hole),
            false => at,
        }
    }

    /// A range that is of this kind where lseek finds no data in it; says how far it came before the walk was over.
    fn zeroes_unless_data(&mut self, range: Range<u64>, kind: Kind) -> u64 {
        let mut at = range.start;
        while at < range.end && !self.is_over() {
            let data = self.data_in(at..range.end);
            self.list.push(at..data.start, kind);
            at = self.data_unless_cached(data, kind);
        }
        at
    }

    /// What lseek calls data in a range that is of this kind else; the same.
    fn data_unless_cached(&mut self, data: Range<u64>, kind: Kind) -> u64 {
        let mut at = data.start;
        while at < data.end && (at == data.start || !self.is_over()) {
            let (piece, cached) = self.cached(at..data.end);
            let left = match cached {
                true => {
                    self.count_call();
                    self.host.forget(&piece);
                    self.data_in(piece)
                }
                false => piece,
            };
            self.list.push(at..left.start, kind);
            self.list.push(left.clone(), Kind::Data);
            at = left.end;
        }
        at
    }

    /// As much of a range from its start on as is either data or nothing but cached, and which of the two it is.
    fn cached(&mut self, range: Range<u64>) -> (Range<u64>, bool) {
        let start = range.start;
        let mut end = range.end.min(start.saturating_add(CACHED_AT_A_TIME));
        loop {
            self.count_call();
            let cached = self.host.cached(&(start..end));
            let half = start + (end - start) / 2;
            let middle = half - half % H::FOLIO;
            match cached {
                Cached::Mixed if start < middle => end = middle,
                cached => return (start..end, cached == Cached::Clean),
            }
        }
    }

    /// The first data that lseek knows of in the range; an empty range at its end if there is none.
    fn data_in(&mut self, range: Range<u64>) -> Range<u64> {
        let nothing = range.end..range.end;
        if self.no_data.contains(&range.start) && range.end <= self.no_data.end {
            return nothing;
        }
        self.count_call();
        let start = match self.host.next_data(range.start) {
            Ok(Some(start)) => start,
            Ok(None) => u64::MAX,
            // Learned nothing: all of it may be data.
            Err(_) => return range,
        };
        self.no_data = range.start..start;
        if start >= range.end {
            return nothing;
        }
        self.count_call();
        match self.host.next_hole(start) {
            // A file that changes under us may have no data here any more; progress all the same.
            Ok(end) => start..end.clamp(start + 1, range.end),
            Err(_) => start..range.end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    /// A file as a string, a byte a letter: `d`ata, fresh data in an `f`resh unwritten extent, or in a hole, where it is
    /// `n`ew, `u`nwritten, `.` hole, and these two with `c`ached zeroes, `k` in a hole. Beyond its end it is a hole.
    struct Model(&'static str, Cell<usize>, RefCell<Vec<Range<u64>>>);

    impl Model {
        /// What lseek calls data.
        fn is_data(&self, at: u64) -> bool {
            let forgotten = || self.2.borrow().iter().any(|range| range.contains(&at));
            let letter = self.at(at);
            "dfn".contains(letter) || "ck".contains(letter) && !forgotten()
        }

        fn at(&self, at: u64) -> char {
            self.0.as_bytes().get(at as usize).map_or('.', |b| char::from(*b))
        }

        fn find(&self, from: u64, data: bool) -> Option<u64> {
            (from..self.0.len() as u64).find(|at| self.is_data(*at) == data)
        }
    }

    impl Host for Model {
        const FOLIO: u64 = 1;

        fn cached(&self, range: &Range<u64>) -> Cached {
            self.1.set(self.1.get() + 1);
            let any = |letters: &str| range.clone().any(|at| letters.contains(self.at(at)));
            match (any("fn"), any("ck")) {
                (true, true) => Cached::Mixed,
                (true, false) => Cached::Fresh,
                (false, _) => Cached::Clean,
            }
        }

        fn forget(&self, range: &Range<u64>) {
            self.1.set(self.1.get() + 1);
            self.2.borrow_mut().push(range.clone());
        }

        fn mapped(&self, range: Range<u64>, max: usize) -> io::Result<Vec<Mapped>> {
            self.1.set(self.1.get() + 1);
            let mut list: Vec<Mapped> = Vec::new();
            for at in range {
                let unwritten = match self.at(at) {
                    'd' => false,
                    'u' | 'f' | 'c' => true,
                    _ => continue,
                };
                let count = list.len();
                match list.last_mut() {
                    Some(m) if m.end == at && m.unwritten == unwritten => m.end += 1,
                    _ if count == max => break,
                    _ => list.push(Mapped { start: at, end: at + 1, unwritten }),
                }
            }
            Ok(list)
        }

        fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
            self.1.set(self.1.get() + 1);
            Ok(self.find(at, true))
        }

        fn next_hole(&self, at: u64) -> io::Result<u64> {
            self.1.set(self.1.get() + 1);
            Ok(self.find(at, false).unwrap_or(self.0.len() as u64))
        }
    }

    fn drawn(model: &str) -> Model {
        let text = Box::leak(model.to_owned().into_boxed_str());
        Model(text, Cell::new(0), RefCell::default())
    }

    fn letters(extents: &[Extent]) -> String {
        let letter = |kind| match kind {
            Kind::Data => "d",
            Kind::Reserved => "u",
            Kind::Hole => ".",
        };
        extents
            .iter()
            .map(|e| letter(e.kind).repeat((e.range.end - e.range.start) as usize))
            .collect()
    }

    const BOTH: Knowledge =
        Knowledge { seek: true, when_flushed: false, fiemap: true, reserved: true };
    const SEEK: Knowledge =
        Knowledge { seek: true, when_flushed: false, fiemap: false, reserved: true };
    const NEITHER: Knowledge =
        Knowledge { seek: false, when_flushed: false, fiemap: true, reserved: true };

    #[test]
    fn fresh_data_in_unwritten_extents_is_data() {
        let file = drawn("uufuu..dd.f.uu");
        assert_eq!(letters(&walk(&file, BOTH, 0..16, 99)), "uuduu..dd.d.uu..");
        assert_eq!(letters(&walk(&file, SEEK, 0..16, 99)), "..d....dd.d.....");
        assert_eq!(letters(&walk(&file, NEITHER, 0..16, 99)), "dddddddddddddddd");
        let no_anchors = Knowledge { reserved: false, ..BOTH };
        assert_eq!(letters(&walk(&file, no_anchors, 0..16, 99)), "ddddd..dd.d.dd..");
    }

    #[test]
    fn the_list_tiles_the_range_from_its_start() {
        let pattern = "du.fd..uuffd.u.d";
        let file = drawn(pattern);
        let whole = pattern.replace('f', "d");
        for knows in [BOTH, SEEK] {
            let whole = if knows == SEEK { whole.replace('u', ".") } else { whole.clone() };
            for start in 0..16usize {
                for end in start..16 {
                    for limit in 1..8 {
                        let list = walk(&file, knows, start as u64..end as u64, limit);
                        let text = letters(&list);
                        assert_eq!(text, whole[start..start + text.len()]);
                        assert!(list.len() <= limit);
                        assert_eq!(list.is_empty(), start == end);
                        assert!(list.len() == limit || text.len() == end - start);
                        assert!(list.windows(2).all(|w| w[0].kind != w[1].kind));
                        assert!(list.windows(2).all(|w| w[0].range.end == w[1].range.start));
                    }
                }
            }
        }
    }

    #[test]
    fn calls_are_bounded_by_what_is_returned() {
        let file = drawn(&"du.f".repeat(5000));
        for limit in [1, 10, 100] {
            for start in [0u64, 10_000, 19_000] {
                file.1.set(0);
                let list = walk(&file, BOTH, start..20_000, limit);
                assert_eq!(list.len(), limit);
                assert!(file.1.get() <= limit * CALLS_PER_EXTENT + MIN_CALLS + 2 * fiemap::BATCH);
            }
        }
        // One merged extent made of very many: the walk gives up early, and says so by a short list.
        let file = drawn(&"df".repeat(5000));
        file.1.set(0);
        let list = walk(&file, BOTH, 0..10_000, 4);
        assert!(list.len() == 1 && list[0].range.end < 10_000);
        assert!(file.1.get() <= MIN_CALLS + 2 * fiemap::BATCH);
    }

    /// What reads have left in the page cache is no data; what was written is, wherever it lies.
    #[test]
    fn cached_zeroes_are_no_data() {
        for (pattern, told) in [
            ("uccuu.kk.dd", "uuuuu....dd"),
            ("ccccfccc.knkk.", "uuuuduuu..d..."),
            ("fcfcfcfc", "dudududu"),
            ("ffff", "dddd"),
        ] {
            let file = drawn(pattern);
            let len = pattern.len() as u64;
            assert_eq!(letters(&walk(&file, BOTH, 0..len, 99)), told, "{pattern}");
            let dropped = |at: u64| file.2.borrow().iter().any(|range| range.contains(&at));
            for (at, letter) in (0..).zip(pattern.chars()) {
                assert!(!"fn".contains(letter) || !dropped(at), "{pattern}: {at} was dropped");
            }
        }
        // Asked for one extent, of which all was read.
        let file = drawn(&"c".repeat(10_000));
        assert_eq!(
            walk(&file, BOTH, 0..10_000, 1),
            [Extent { range: 0..10_000, kind: Kind::Reserved }]
        );
        assert!(file.1.get() < 10, "{} calls", file.1.get());
        // However it is mixed up, no more is done than was asked for.
        let file = drawn(&"cccfcccccfcfccfc".repeat(1000));
        walk(&file, BOTH, 0..16_000, 4);
        assert!(file.1.get() < MIN_CALLS + 40, "{} calls", file.1.get());
    }

    /// However many writes were made into one extent or hole since the last flush.
    #[test]
    fn fresh_data_in_one_extent_is_no_more_work_than_was_asked_for() {
        for (pattern, kind) in [("uf", Kind::Reserved), (".n", Kind::Hole)] {
            let file = drawn(&pattern.repeat(20_000));
            for (limit, most) in [(1, 8), (2, 10), (100, 410)] {
                file.1.set(0);
                let list = walk(&file, BOTH, 0..40_000, limit);
                let kinds: Vec<Kind> = list.iter().map(|extent| extent.kind).collect();
                let wanted: Vec<Kind> =
                    [kind, Kind::Data].into_iter().cycle().take(limit).collect();
                assert_eq!(kinds, wanted);
                assert!(file.1.get() <= most, "{} calls for {limit} extents", file.1.get());
            }
            // As a whole, as `thinlun map` asks.
            file.1.set(0);
            let (mut at, mut seen) = (0, String::new());
            while at < 40_000 {
                let list = walk(&file, BOTH, at..40_000, 500);
                seen += &letters(&list);
                at = list.last().unwrap().range.end;
            }
            assert!(seen == pattern.replace(['f', 'n'], "d").repeat(20_000));
            assert!(file.1.get() < 70_000, "{} calls for all of it", file.1.get());
        }
    }

    #[test]
    fn parts_of_empty_blocks_at_the_ends_are_left_alone() {
        let file = drawn("....uuuud...");
        let cut = |range| without_empty_ends(&file, BOTH, range, 4);
        assert_eq!(cut(1..11), 4..11);
        assert_eq!(cut(2..7), 4..4);
        assert_eq!((cut(1..3), cut(0..4), cut(4..8)), (3..3, 0..4, 4..8));
        assert_eq!((cut(9..11), cut(6..12), cut(7..9)), (9..11, 8..12, 8..9));
        assert_eq!(cut(13..15), 15..15, "behind the end");
        assert_eq!(without_empty_ends(&file, NEITHER, 1..3, 4), 1..3);
    }

    #[test]
    fn one_seek_serves_a_whole_stretch_without_data() {
        let file = drawn(&"u.".repeat(100));
        walk(&file, BOTH, 0..200, 1000);
        let batches = 100usize.div_ceil(fiemap::BATCH) + 1;
        assert!(file.1.get() <= batches + 1, "{} calls", file.1.get());
    }
}
