//! `thinlun map`: the extents that a disk on this file would report, as a table, as JSON, and as a
//! picture. It only looks: it takes no lock and works on a file that is being served.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::cli::{MapArgs, Output};
use crate::config::StartError;
use crate::store::file::{FileStore, OpenError};
use crate::store::{Extent, Kind, Space, Store, StoreError};

/// Extents asked for at a time.
const STEP: usize = 4096;

/// Rows of the picture.
const ROWS: u64 = 8;

/// Prints the map of a disk.
///
/// # Errors
/// If the file cannot be looked at.
pub fn run(args: &MapArgs) -> Result<(), StartError> {
    let failed = |why: String| StartError::host(format!("{}: {why}", args.disk.display()));
    let store = FileStore::inspect(&args.disk).map_err(|OpenError(why)| failed(why))?;
    match print(args, &store) {
        // Whoever read our output has seen enough.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(Failure::Output(e)) => Err(StartError::host(format!("output: {e}"))),
        Err(Failure::Store(e)) => Err(failed(e.to_string())),
        Ok(()) => Ok(()),
    }
}

enum Failure {
    Output(io::Error),
    Store(StoreError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::Store(error)
    }
}

fn print(args: &MapArgs, store: &FileStore) -> Result<(), Failure> {
    let stdout = io::stdout();
    let terminal = stdout.is_terminal();
    let colour = terminal && std::env::var_os("NO_COLOR").is_none();
    let mut out = BufWriter::new(stdout.lock());
    match (args.output, args.watch) {
        (Output::Json, _) => print_json(&mut out, store)?,
        (Output::Human, None) => {
            let picture = print_table(&mut out, store, args.width)?;
            picture.print(&mut out, store.space()?, colour)?;
        }
        (Output::Human, Some(seconds)) => watch(&mut out, args, store, seconds, terminal, colour)?,
    }
    Ok(out.flush()?)
}

/// Draws the picture again and again until a signal ends it, which is what one does to end it: the
/// status is 0. A frame is written as a whole.
fn watch(
    out: &mut impl Write,
    args: &MapArgs,
    store: &FileStore,
    seconds: u64,
    terminal: bool,
    colour: bool,
) -> Result<(), Failure> {
    let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    ends.thread_block().map_err(io::Error::from)?;
    let ended = SignalFd::new(&ends).map_err(io::Error::from)?;
    let pause = PollTimeout::try_from(Duration::from_secs(seconds)).unwrap_or(PollTimeout::MAX);
    loop {
        let mut frame = Vec::new();
        if terminal {
            // Home, and clear what is below.
            write!(frame, "\x1b[H\x1b[J{}\n\n", args.disk.display())?;
        }
        let mut picture = Picture::new(store.size()?, args.width);
        for_each(store, |extent| {
            picture.add(extent);
            Ok(())
        })?;
        picture.print(&mut frame, store.space()?, colour)?;
        out.write_all(&frame)?;
        out.flush()?;
        let mut fds = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, pause).map_err(io::Error::from)? > 0 {
            return Ok(());
        }
    }
}

/// Calls `f` for each extent of the file, neighbours of one kind merged.
fn for_each(
    store: &FileStore,
    mut f: impl FnMut(&Extent) -> io::Result<()>,
) -> Result<(), Failure> {
    let size = store.size()?;
    let mut last: Option<Extent> = None;
    let mut at = 0;
    while at < size {
        for extent in store.extents(at..size, STEP)? {
            at = extent.range.end;
            match &mut last {
                Some(last) if last.kind == extent.kind => last.range.end = extent.range.end,
                _ => {
                    if let Some(done) = last.replace(extent) {
                        f(&done)?;
                    }
                }
            }
        }
    }
    match last {
        Some(done) => Ok(f(&done)?),
        None => Ok(()),
    }
}

/// PROVISIONING STATUS in words.
fn status(kind: Kind) -> &'static str {
    match kind {
        Kind::Data => "mapped",
        Kind::Reserved => "anchored",
        Kind::Hole => "deallocated",
    }
}

/// An array of objects like those of `qemu-img map`, with the status beside them.
fn print_json(out: &mut impl Write, store: &FileStore) -> Result<(), Failure> {
    let mut separator = "[";
    for_each(store, |extent| {
        let (start, length) = (extent.range.start, extent.range.end - extent.range.start);
        let (zero, alloc) = (extent.kind != Kind::Data, extent.kind != Kind::Hole);
        write!(
            out,
            "{separator}{{\"start\": {start}, \"length\": {length}, \"zero\": {zero}, \
             \"alloc\": {alloc}, "
        )?;
        if alloc {
            // In a raw file a byte of the disk is where it is in the file.
            write!(out, "\"offset\": {start}, ")?;
        }
        separator = ",\n";
        write!(out, "\"status\": \"{}\"}}", status(extent.kind))
    })?;
    let begin = if separator == "[" { "[" } else { "" };
    writeln!(out, "{begin}]")?;
    Ok(())
}

fn print_table(out: &mut impl Write, store: &FileStore, width: u16) -> Result<Picture, Failure> {
    let mut picture = Picture::new(store.size()?, width);
    writeln!(out, "{:>18} {:>18} {:>9}  status", "start", "length", "")?;
    for_each(store, |extent| {
        picture.add(extent);
        let length = extent.range.end - extent.range.start;
        let (start, status) = (extent.range.start, status(extent.kind));
        writeln!(out, "{start:>18} {length:>18} {:>9}  {status}", human(length))
    })?;
    writeln!(out)?;
    Ok(picture)
}

/// The disk as a grid of cells.
struct Picture {
    size: u64,
    width: u64,
    /// Bytes of a cell.
    cell: u64,
    /// Bytes of each kind in each cell.
    cells: Vec<[u64; 3]>,
    /// Bytes and number of extents that are mapped, anchored, deallocated.
    totals: [(u64, u64); 3],
}

impl Picture {
    fn new(size: u64, width: u16) -> Self {
        let width = u64::from(width.max(1));
        let cell = size.div_ceil(width * ROWS).next_multiple_of(512).max(512);
        let count = usize::try_from(size.div_ceil(cell)).unwrap_or(0);
        Picture { size, width, cell, cells: vec![[0; 3]; count], totals: [(0, 0); 3] }
    }

    fn add(&mut self, extent: &Extent) {
        let (start, end) = (extent.range.start, extent.range.end);
        if let Some((bytes, count)) = self.totals.get_mut(rank(extent.kind)) {
            *bytes += end - start;
            *count += 1;
        }
        let first = start / self.cell;
        let cells = self.cells.iter_mut().skip(usize::try_from(first).unwrap_or(usize::MAX));
        for (cell, from) in cells.zip((first * self.cell..end).step_by(step(self.cell))) {
            let inside = end.min(from.saturating_add(self.cell)) - start.max(from);
            if let Some(bytes) = cell.get_mut(rank(extent.kind)) {
                *bytes += inside;
            }
        }
    }

    fn print(&self, out: &mut impl Write, space: Option<Space>, colour: bool) -> io::Result<()> {
        let width = usize::try_from(self.width).unwrap_or(1);
        for row in self.cells.chunks(width) {
            let cells: String = row.iter().map(|bytes| Cell::of(*bytes).draw(colour)).collect();
            writeln!(out, "{cells}")?;
        }
        writeln!(
            out,
            "\none cell is {}: {} where all of it is mapped, {} where some is, {} where none is and \
             some is anchored",
            human(self.cell),
            Cell::Mapped.draw(colour),
            Cell::PartlyMapped.draw(colour),
            Cell::Anchored.draw(colour),
        )?;
        for (kind, cell) in [
            (Kind::Data, Cell::Mapped),
            (Kind::Reserved, Cell::Anchored),
            (Kind::Hole, Cell::Deallocated),
        ] {
            let (bytes, count) = self.totals.get(rank(kind)).copied().unwrap_or_default();
            let (percent, status) = (percent(bytes, self.size), status(kind));
            let extents = if count == 1 { "extent" } else { "extents" };
            writeln!(
                out,
                "{} {status:<12} {:>9} {percent:>4}  {count} {extents}",
                cell.draw(colour),
                human(bytes)
            )?;
        }
        match space {
            Some(space) => {
                writeln!(out, "{} of {} are allocated", human(space.used), human(self.size))
            }
            None => Ok(()),
        }
    }
}

fn step(cell: u64) -> usize {
    usize::try_from(cell).unwrap_or(usize::MAX)
}

/// A share in whole percent; what is there is never 0%, and what is missing never makes 100%.
fn percent(part: u64, whole: u64) -> String {
    match u128::from(part) * 100 / u128::from(whole.max(1)) {
        0 if part > 0 => "<1%".into(),
        99 if u128::from(part) * 100 > u128::from(whole) * 99 => ">99%".into(),
        percent => format!("{percent}%"),
    }
}

/// Place in arrays of what is counted by kind.
fn rank(kind: Kind) -> usize {
    match kind {
        Kind::Data => 0,
        Kind::Reserved => 1,
        Kind::Hole => 2,
    }
}

/// What a cell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Mapped,
    PartlyMapped,
    Anchored,
    Deallocated,
}

impl Cell {
    fn of([data, reserved, holes]: [u64; 3]) -> Self {
        match (data, reserved, holes) {
            (0, 0, _) => Cell::Deallocated,
            (0, ..) => Cell::Anchored,
            (_, 0, 0) => Cell::Mapped,
            _ => Cell::PartlyMapped,
        }
    }

    fn draw(self, colour: bool) -> String {
        let (plain, code) = match self {
            Cell::Mapped => ('#', 32),
            Cell::PartlyMapped => ('%', 36),
            Cell::Anchored => ('+', 33),
            Cell::Deallocated => ('.', 90),
        };
        if colour { format!("\x1b[{code}m{plain}\x1b[0m") } else { plain.to_string() }
    }
}

/// Bytes for people: at most four digits and a unit.
fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut rest = bytes;
    let mut tenths = 0;
    for unit in units {
        if rest < 1024 {
            return if tenths > 0 {
                format!("{rest}.{tenths}{unit}")
            } else {
                format!("{rest}{unit}")
            };
        }
        tenths = rest % 1024 * 10 / 1024;
        rest /= 1024;
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let texts = [0, 512, 1023, 1024, 1536, 1 << 20, (5 << 30) + (1 << 29), u64::MAX].map(human);
        assert_eq!(texts, ["0B", "512B", "1023B", "1KiB", "1.5KiB", "1MiB", "5.5GiB", "15.9EiB"]);
    }

    #[test]
    fn shares_are_never_rounded_to_nothing_or_all() {
        let shares = [(0, 7), (1, 1000), (1, 4), (999, 1000), (1000, 1000), (0, 0)];
        let texts = shares.map(|(part, whole)| percent(part, whole));
        assert_eq!(texts, ["0%", "<1%", "25%", ">99%", "100%", "0%"]);
    }

    #[test]
    fn one_byte_of_data_shows() {
        let mut picture = Picture::new(64 << 20, 64);
        let whole = 64 << 20;
        picture.add(&Extent { range: 0..5 << 20, kind: Kind::Hole });
        picture.add(&Extent { range: 5 << 20..(5 << 20) + 512, kind: Kind::Data });
        picture.add(&Extent { range: (5 << 20) + 512..8 << 20, kind: Kind::Reserved });
        picture.add(&Extent { range: 8 << 20..whole, kind: Kind::Hole });
        let mut out = Vec::new();
        picture.print(&mut out, Some(Space { available: 0, used: 3 << 20 }), false).unwrap();
        let text = String::from_utf8(out).unwrap();
        let first = text.lines().next().unwrap();
        assert_eq!(first, format!("{}%{}", ".".repeat(40), "+".repeat(23)));
        assert!(text.contains("mapped            512B  <1%  1 extent\n"), "{text}");
        assert!(text.ends_with("3MiB of 64MiB are allocated\n"), "{text}");
    }
}
