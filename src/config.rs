//! What was asked for, validated. Every rejection is a sentence that names the option or the file.

use std::collections::BTreeSet;
use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::scsi::address::MAX_LUN;
use crate::scsi::{DetectZeroes, Lun, LunNumber, LunSettings};
use crate::store::Store;
use crate::store::budget::Budget;
use crate::store::faults::{Fault, Faults};
use crate::store::file::{
    FileStore, OpenError, OpenOptionsFor, Provision, Surroundings, create, left_over, plain,
    stable_name,
};
use crate::store::image_format;
use crate::store::sum::fnv_1a;

/// Why the program does not start, and its exit status.
#[derive(Debug, PartialEq, Eq)]
pub struct StartError {
    /// One sentence for people.
    pub message: String,
    /// 2 if the command line is wrong, 1 if the host would not go along.
    pub status: u8,
}

impl StartError {
    /// The command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        StartError { message: message.into(), status: 2 }
    }

    /// The host would not go along.
    pub fn host(message: impl Into<String>) -> Self {
        StartError { message: message.into(), status: 1 }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What a path leads to, however it is spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A file, by device and inode number.
    File(u64, u64),
    /// A device, by its number.
    Device(u64),
    /// A name in a directory, by the directory's device and inode number.
    Name(u64, u64, std::ffi::OsString),
    /// That cannot be told.
    Unknown,
}

impl Identity {
    /// The file or block device at `path`, or the name that one would get there.
    fn of_disk(path: &Path) -> Self {
        match path.metadata() {
            Ok(meta) if meta.file_type().is_block_device() => Identity::Device(meta.rdev()),
            Ok(meta) => Identity::File(meta.dev(), meta.ino()),
            Err(_) => Self::of_name(path),
        }
    }

    /// The name itself.
    pub fn of_name(path: &Path) -> Self {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        match (parent.unwrap_or(Path::new(".")).metadata(), path.file_name()) {
            (Ok(meta), Some(name)) => Identity::Name(meta.dev(), meta.ino(), name.to_owned()),
            _ => Identity::Unknown,
        }
    }
}

/// `cache=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Through the page cache, write cache enabled.
    #[default]
    Writeback,
    /// O_DIRECT, write cache enabled.
    Direct,
    /// Through the page cache, every write stable.
    Writethrough,
}

/// One DISK argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// Nobody writes to it.
    pub read_only: bool,
    /// Target number.
    pub target: u8,
    /// Logical unit number, if it was given.
    pub lun: Option<LunNumber>,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Physical block size in bytes, if it was given.
    pub physical_block_size: Option<u32>,
    /// Unit serial number, if it was given.
    pub serial: Option<String>,
    /// NAA name, if it was given: 8 or 16 bytes.
    pub naa: Option<Vec<u8>>,
    /// Bytes of the sparse file to create if there is none.
    pub size: Option<u64>,
    /// Look like a disk that turns.
    pub rotational: bool,
    /// How the host's page cache is used.
    pub cache: CacheMode,
    /// Offer thin provisioning where the file can do it.
    pub discard: bool,
    /// OPTIMAL UNMAP GRANULARITY in bytes, if it was given.
    pub discard_granularity: Option<u64>,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// How much space a created file takes at once.
    pub provision: Provision,
    /// Most bytes of space that the file may take, if there is such a limit.
    pub space_limit: Option<u64>,
    /// Keep other processes away from the file.
    pub locking: bool,
    /// What lies beside it is about it, though it says that it is about another.
    pub adopt: bool,
    /// The disk is the file byte by byte, whatever that looks like.
    pub raw: bool,
    /// How its host fails, on request.
    pub faults: Vec<Fault>,
}

impl DiskConfig {
    /// Reads `PATH[,key=value]...`.
    ///
    /// # Errors
    /// Names the disk, the option and what it could have been.
    pub fn parse(argument: &str) -> Result<Self, StartError> {
        let mut parts = split_at_commas(argument).into_iter();
        let path = parts.next().filter(|p| !p.is_empty());
        let path = path.ok_or_else(|| StartError::usage(format!("'{argument}': no path")))?;
        let mut disk = DiskConfig {
            path: PathBuf::from(&path),
            read_only: false,
            target: 0,
            lun: None,
            block_size: 512,
            physical_block_size: None,
            serial: None,
            naa: None,
            size: None,
            rotational: false,
            cache: CacheMode::default(),
            discard: true,
            discard_granularity: None,
            detect_zeroes: DetectZeroes::default(),
            provision: Provision::default(),
            space_limit: None,
            locking: true,
            adopt: false,
            raw: false,
            faults: Vec::new(),
        };
        let mut seen = BTreeSet::new();
        for option in parts {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option.as_str(), None),
            };
            let wrong = |why: String| StartError::usage(format!("{path}: {key}: {why}"));
            if !seen.insert(key.to_owned()) {
                return Err(wrong("given twice".into()));
            }
            disk.set(key, value).map_err(wrong)?;
        }
        disk.check().map_err(|why| StartError::usage(format!("{path}: {why}")))?;
        Ok(disk)
    }

    fn set(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        match key {
            "readonly" => self.read_only = switch(value)?,
            "rotational" => self.rotational = switch(value)?,
            "target" => self.target = number(value, 255)?,
            "lun" => self.lun = LunNumber::new(number(value, MAX_LUN.into())?),
            "block-size" => self.block_size = block_size(value, &[512, 4096])?,
            "physical-block-size" => {
                let sizes = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];
                self.physical_block_size = Some(block_size(value, &sizes)?);
            }
            "serial" => self.serial = Some(serial(given(value)?)?),
            "wwn" => self.naa = Some(naa(given(value)?)?),
            "size" => self.size = Some(size(given(value)?)?),
            "space-limit" => self.space_limit = Some(size(given(value)?)?),
            "fault" => {
                let faults = given(value)?.split('+').map(str::parse);
                self.faults = faults.collect::<Result<_, _>>()?;
            }
            "locking" => self.locking = switch(value)?,
            "format" => match given(value)? {
                "raw" => self.raw = true,
                other => {
                    return Err(format!(
                        "'{other}': disks are raw files here; convert it (qemu-img convert -O raw OLD NEW)"
                    ));
                }
            },
            "adopt" => self.adopt = switch(value)?,
            "discard" => self.discard = switch(value)?,
            "discard-granularity" => self.discard_granularity = Some(size(given(value)?)?),
            "detect-zeroes" => {
                let choices = [
                    ("off", DetectZeroes::Off),
                    ("on", DetectZeroes::On),
                    ("unmap", DetectZeroes::Unmap),
                ];
                self.detect_zeroes = choice(given(value)?, &choices)?;
            }
            "provision" => {
                let choices = [
                    ("thin", Provision::Thin),
                    ("anchored", Provision::Anchored),
                    ("full", Provision::Full),
                ];
                self.provision = choice(given(value)?, &choices)?;
            }
            "cache" => {
                let choices = [
                    ("writeback", CacheMode::Writeback),
                    ("direct", CacheMode::Direct),
                    ("writethrough", CacheMode::Writethrough),
                ];
                self.cache = choice(given(value)?, &choices)?;
            }
            _ => return Err("no such option (thinlun --help lists them)".into()),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.physical_block_size.is_some_and(|p| p < self.block_size) {
            return Err("physical-block-size is smaller than block-size".into());
        }
        if self.detect_zeroes == DetectZeroes::Unmap && !self.discard {
            return Err("detect-zeroes=unmap and discard=off exclude each other".into());
        }
        if self.provision != Provision::Thin && self.size.is_none() {
            return Err("provision= is for files that are created: give size= too".into());
        }
        if let (Some(limit), Some(size)) = (self.space_limit, self.size)
            && self.provision != Provision::Thin
            && limit < size
        {
            return Err("provision= would take more space than space-limit= allows".into());
        }
        let granularity = self.discard_granularity.unwrap_or(self.block_size.into());
        if !granularity.is_power_of_two()
            || !(u64::from(self.block_size)..=1 << 30).contains(&granularity)
        {
            return Err(format!(
                "discard-granularity: {granularity} is no power of two from the block size to 1G"
            ));
        }
        match self.size {
            Some(size) if size % u64::from(self.block_size) != 0 => {
                Err(format!("size: {size} bytes are no multiple of block-size {}", self.block_size))
            }
            _ => Ok(()),
        }
    }

    fn open_options(&self) -> OpenOptionsFor {
        OpenOptionsFor {
            read_only: self.read_only,
            direct: self.cache == CacheMode::Direct,
            block_size: self.block_size,
            locking: self.locking,
        }
    }

    /// What the disk will say about itself.
    fn settings(&self, lun: LunNumber, store: &FileStore) -> Result<LunSettings, StartError> {
        let name = stable_name(&self.path).map_err(|e| self.host_error(&e.to_string()))?;
        let naa = self.naa.clone().unwrap_or_else(|| derived_naa(&name));
        let hex = || derived_naa(&name).iter().map(|b| format!("{b:02x}")).collect();
        let host_block = store.capabilities().host_block.clamp(self.block_size, 4096);
        Ok(LunSettings {
            target: self.target,
            lun,
            serial: self.serial.clone().unwrap_or_else(hex),
            naa,
            block_size: self.block_size,
            physical_block_size: self.physical_block_size.unwrap_or(host_block),
            rotational: self.rotational,
            discard: self.discard,
            discard_granularity: self.granularity(store),
            detect_zeroes: self.detect_zeroes,
            write_cache: self.cache != CacheMode::Writethrough,
        })
    }

    /// OPTIMAL UNMAP GRANULARITY in bytes: what was given, else the host's block.
    fn granularity(&self, store: &FileStore) -> u32 {
        let given = self.discard_granularity.and_then(|g| u32::try_from(g).ok());
        given.unwrap_or(store.capabilities().host_block).max(self.block_size)
    }

    /// The store with its budget or its faults, if it has any.
    fn wrapped(&self, store: FileStore) -> Result<Arc<dyn Store>, StartError> {
        if !self.faults.is_empty() {
            let faults = Faults::new(store, self.faults.clone());
            return match self.space_limit {
                None => Ok(Arc::new(faults)),
                Some(_) => Err(StartError::usage("fault= and space-limit= exclude each other")),
            };
        }
        let Some(limit) = self.space_limit else { return Ok(Arc::new(store)) };
        match store.space() {
            Ok(Some(_)) => Ok(Arc::new(Budget::new(store, limit))),
            Ok(None) => Err(self.host_error(
                "space-limit= is for files; how much of a block device is in use is not known",
            )),
            Err(error) => Err(self.host_error(&error.to_string())),
        }
    }

    fn host_error(&self, why: &str) -> StartError {
        StartError::host(format!("{}: {why}", self.path.display()))
    }
}

/// Gives every disk its LUN: the one asked for, else the lowest that is free on its target.
///
/// # Errors
/// If two disks ask for the same one, or a target is full.
fn assign_luns(disks: &[DiskConfig]) -> Result<Vec<LunNumber>, StartError> {
    let mut taken = BTreeSet::new();
    for disk in disks {
        if let Some(lun) = disk.lun
            && !taken.insert((disk.target, lun))
        {
            return Err(StartError::usage(format!(
                "{}: target {} LUN {} is taken by another disk",
                disk.path.display(),
                disk.target,
                lun.get()
            )));
        }
    }
    let mut luns = Vec::new();
    for disk in disks {
        let mut free = (0..=MAX_LUN).filter_map(LunNumber::new);
        let lun = disk.lun.or_else(|| free.find(|l| !taken.contains(&(disk.target, *l))));
        let lun = lun.ok_or_else(|| {
            StartError::usage(format!("target {} has no free LUN left", disk.target))
        })?;
        taken.insert((disk.target, lun));
        luns.push(lun);
    }
    Ok(luns)
}

/// No file is given twice, by whatever names, unless nobody writes to it.
fn check_distinct(disks: &[DiskConfig]) -> Result<(), StartError> {
    let mut seen: Vec<(Identity, &DiskConfig)> = Vec::new();
    for disk in disks {
        let identity = Identity::of_disk(&disk.path);
        let same = |(other, first): &&(Identity, &DiskConfig)| {
            (disk.path == first.path || *other == identity && identity != Identity::Unknown)
                && !(disk.read_only && first.read_only)
        };
        if let Some((_, first)) = seen.iter().find(same) {
            // Paths that differ by a `.` count as equal.
            let as_well = match first.path.as_os_str() == disk.path.as_os_str() {
                true => String::new(),
                false => format!(", also as {}", first.path.display()),
            };
            let path = disk.path.display();
            return Err(StartError::usage(format!("{path}: is given twice{as_well}")));
        }
        seen.push((identity, disk));
    }
    Ok(())
}

/// Opens all disks, for a process that will be `confined` or not. Files are created last, and if one cannot be, those
/// created before it go again: a start that fails changes nothing. They go as well unless [`Created::keep`] is called, when
/// nothing can fail any more.
///
/// # Errors
/// The first thing that is wrong.
pub fn open_disks(
    disks: &[DiskConfig],
    confined: bool,
) -> Result<(Vec<Arc<Lun>>, Created), StartError> {
    if disks.is_empty() {
        return Err(StartError::usage("no DISK given; thinlun --help shows how"));
    }
    let luns = assign_luns(disks)?;
    check_distinct(disks)?;
    let mut created = Created::default();
    let mut open = Vec::new();
    let there = |disk: &DiskConfig, new| Surroundings { new, adopt: disk.adopt, confined };
    for (index, disk) in disks.iter().enumerate() {
        if disk.path.exists() || disk.size.is_none() {
            open.push((index, open_existing(disk, there(disk, false))?));
        }
    }
    for (index, disk) in disks.iter().enumerate() {
        if let (Some(size), false) = (disk.size, open.iter().any(|(i, _)| *i == index)) {
            if disk.read_only {
                return Err(disk.host_error("no such file, and a readonly disk is not created"));
            }
            created.create(disk, size)?;
            open.push((index, open_existing(disk, there(disk, true))?));
        }
    }
    open.sort_by_key(|(index, _)| *index);
    let mut units = Vec::new();
    for (((index, store), disk), lun) in open.into_iter().zip(disks).zip(luns) {
        let settings = disk.settings(lun, &store)?;
        let unit = Lun::new(settings, index, disk.wrapped(store)?);
        units.push(Arc::new(unit.map_err(|e| disk.host_error(&e.to_string()))?));
    }
    Ok((units, created))
}

fn open_existing(disk: &DiskConfig, surroundings: Surroundings) -> Result<FileStore, StartError> {
    let host = |OpenError(why)| disk.host_error(&why);
    if let Some(format) = image_format::of(&disk.path).filter(|_| !disk.raw) {
        return Err(disk.host_error(&format!(
            "is a {format} image, and a guest would get its bytes as they are: convert it (qemu-img convert -O raw \
             OLD NEW), or say format=raw if this is what its disk holds"
        )));
    }
    let store = FileStore::open_among(&disk.path, &disk.open_options(), surroundings);
    let store = store.map_err(host)?;
    let size = store.size().map_err(|e| disk.host_error(&e.to_string()))?;
    match disk.size {
        Some(asked) if asked != size => Err(disk.host_error(&format!(
            "is {size} bytes long, not size={asked}; size= is for files that are not there yet"
        ))),
        _ => Ok(store),
    }
}

/// Files created by this start, removed again unless it succeeds.
#[derive(Default)]
#[must_use = "the files go with it"]
pub struct Created {
    files: Vec<PathBuf>,
    /// What was remembered of others of their names.
    left_over: Vec<PathBuf>,
}

impl Created {
    fn create(&mut self, disk: &DiskConfig, size: u64) -> Result<(), StartError> {
        let host = |OpenError(why)| disk.host_error(&why);
        let left_over = left_over(&disk.path).map_err(host)?;
        create(&disk.path, size, disk.provision).map_err(host)?;
        self.files.push(disk.path.clone());
        self.left_over.extend(left_over);
        Ok(())
    }

    /// Removes what was remembered of other files of their names, so that it is not taken for theirs by the next start.
    ///
    /// # Errors
    /// If something stays.
    pub fn clear(&mut self) -> Result<(), StartError> {
        for path in self.left_over.drain(..) {
            let host = |why: std::io::Error| {
                StartError::host(format!("{}: is left over: {}", path.display(), plain(&why)))
            };
            std::fs::remove_file(&path).map_err(host)?;
            let directory = path.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(directory).and_then(|d| d.sync_all()).map_err(host)?;
            log::info!("{}: was left over from another image, and is gone", path.display());
        }
        Ok(())
    }

    /// They stay.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        for path in &self.files {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Splits at single commas; a doubled one is a comma in the text, as QEMU has it.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

fn given(value: Option<&str>) -> Result<&str, String> {
    value.filter(|v| !v.is_empty()).ok_or_else(|| "needs a value".into())
}

fn switch(value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => Err(format!("'{other}' is not on or off")),
    }
}

fn choice<T: Copy>(value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let chosen = choices.iter().find(|(name, _)| *name == value);
    chosen.map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        format!("'{value}' is not one of {}", names.join(", "))
    })
}

fn number<T: TryFrom<u32>>(value: Option<&str>, max: u32) -> Result<T, String> {
    let value = given(value)?;
    let number = value.parse::<u32>().ok().filter(|n| *n <= max);
    number
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| format!("'{value}' is not a number from 0 to {max}"))
}

fn block_size(value: Option<&str>, allowed: &[u32]) -> Result<u32, String> {
    let value = given(value)?;
    let size = value.parse().ok().filter(|n| allowed.contains(n));
    size.ok_or_else(|| {
        let names: Vec<String> = allowed.iter().map(u32::to_string).collect();
        format!("'{value}' is not one of {}", names.join(", "))
    })
}

fn serial(value: &str) -> Result<String, String> {
    let printable = value.bytes().all(|b| (0x20..0x7f).contains(&b));
    match printable && value.len() <= 64 {
        true => Ok(value.to_owned()),
        false => Err("at most 64 printable ASCII characters".into()),
    }
}

/// An NAA name in hexadecimal: 16 digits for formats 2, 3 and 5, 32 digits for format 6.
fn naa(value: &str) -> Result<Vec<u8>, String> {
    let digits = value.trim_start_matches("naa.").trim_start_matches("0x");
    let fits = matches!(
        (digits.chars().next(), digits.len()),
        (Some('2' | '3' | '5'), 16) | (Some('6'), 32)
    );
    let bytes = (0..digits.len() / 2)
        .map(|n| digits.get(2 * n..2 * n + 2).and_then(|d| u8::from_str_radix(d, 16).ok()));
    match bytes.collect::<Option<Vec<u8>>>() {
        Some(bytes) if fits => Ok(bytes),
        _ => Err(format!(
            "'{value}' is no NAA name: 16 hexadecimal digits that begin with 2, 3 or 5, or 32 that \
             begin with 6"
        )),
    }
}

/// Bytes, with K, M, G or T for powers of 1024.
fn size(value: &str) -> Result<u64, String> {
    let (digits, unit) = match value.char_indices().last() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (value.get(..at).unwrap_or(""), unit),
        _ => (value, 'B'),
    };
    let shift = match unit.to_ascii_uppercase() {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return Err(format!("'{value}': the unit is not K, M, G or T")),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes > 0 && i64::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err(format!("'{value}' is no size, such as 512M or 3T")),
    }
}

/// A locally assigned NAA name (format 3h, SPC-5 7.7.6.6.4) from a file's lasting name, so that it
/// stays the same over restarts: 60 bits of its FNV-1a hash.
fn derived_naa(name: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let hash = fnv_1a(name.as_os_str().as_bytes());
    (0x3 << 60 | hash >> 4).to_be_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let disk = DiskConfig::parse(
            "/a,,b.img,readonly,lun=300,target=2,block-size=4096,physical-block-size=8192,\
             serial=a,,b,wwn=5000c50015ea71ac,size=3T,rotational=off,cache=direct",
        )
        .unwrap();
        assert_eq!(disk.path, Path::new("/a,b.img"));
        assert_eq!((disk.lun, disk.target), (LunNumber::new(300), 2));
        assert_eq!((disk.block_size, disk.physical_block_size), (4096, Some(8192)));
        assert_eq!((disk.serial.as_deref(), disk.size), (Some("a,b"), Some(3 << 40)));
        assert_eq!(disk.naa, Some(vec![0x50, 0, 0xc5, 0, 0x15, 0xea, 0x71, 0xac]));
        assert!(disk.read_only && !disk.rotational);
        assert_eq!(disk.cache, CacheMode::Direct);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (argument, part) in [
            ("", "no path"),
            ("a,color=red", "color: no such option"),
            ("a,lun=16384", "lun: '16384' is not a number from 0 to 16383"),
            ("a,lun", "lun: needs a value"),
            ("a,readonly=yes", "readonly: 'yes' is not on or off"),
            ("a,block-size=1024", "'1024' is not one of 512, 4096"),
            ("a,size=1000", "no multiple"),
            ("a,size=0", "no size"),
            ("a,size=9999999T", "no size"),
            ("a,size=12Q", "unit"),
            ("a,wwn=1000c50015ea71ac", "NAA"),
            ("a,wwn=5000c50015ea71a", "NAA"),
            ("a,wwn=5000c50015ea71é", "NAA"),
            ("a,lun=1,lun=2", "given twice"),
            ("a,block-size=4096,physical-block-size=512", "smaller"),
            ("a,cache=none", "'none' is not"),
            ("a,detect-zeroes=unmap,discard=off", "exclude"),
            ("a,provision=full", "size="),
            ("a,provision=full,size=2M,space-limit=1M", "space-limit"),
            ("a,space-limit=0", "no size"),
            ("a,discard-granularity=3K", "power of two"),
        ] {
            let error = DiskConfig::parse(argument).unwrap_err();
            assert!(error.message.contains(part), "{argument}: {error}");
            assert_eq!(error.status, 2);
        }
    }

    #[test]
    fn luns_are_given_in_order_around_those_asked_for() {
        let disks: Vec<DiskConfig> = ["a", "b,lun=0", "c,target=1", "d", "e,lun=300"]
            .map(|a| DiskConfig::parse(a).unwrap())
            .into();
        let luns: Vec<u16> = assign_luns(&disks).unwrap().iter().map(|l| l.get()).collect();
        assert_eq!(luns, [1, 0, 0, 2, 300]);
        let twice = ["a,lun=1", "b,lun=1"].map(|a| DiskConfig::parse(a).unwrap());
        assert!(assign_luns(&twice).unwrap_err().message.contains("LUN 1 is taken"));
    }

    #[test]
    fn names_are_stable_and_differ() {
        let a = derived_naa(Path::new("/images/a.img"));
        assert_eq!(a, derived_naa(Path::new("/images/a.img")));
        assert_ne!(a, derived_naa(Path::new("/images/b.img")));
        assert_eq!((a.len(), a[0] >> 4), (8, 3));
    }
}
