//! What has to be remembered of a disk while the program does not run: a few lines of text in a file
//! beside the image, `IMAGE.thinlun`, replaced as a whole and only there while there is something to
//! remember.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::beside::{Beside, Directory};
use super::{Cause, StoreError};

/// Longest file that is read: far more than is ever written.
const MAX_BYTES: u64 = 64 << 10;

/// The first line, so that nobody else's file is taken for ours.
const HEADING: &str = "# thinlun remembers this of the image beside it.";

/// Named values that survive a restart, if there is a place to keep them.
#[derive(Debug)]
pub struct Notes {
    place: Option<Place>,
    values: Mutex<BTreeMap<String, String>>,
    /// Held by who changes them, which takes as long as the host does. Who looks does not wait for that.
    changing: Mutex<()>,
}

#[derive(Debug)]
struct Place(Beside);

impl Notes {
    /// Notes that last as long as the program.
    pub fn in_memory() -> Self {
        Notes { place: None, values: Mutex::default(), changing: Mutex::default() }
    }

    /// The notes beside `image`, in its directory.
    ///
    /// # Errors
    /// If there is a file with the name of one that is ours, but none we can read.
    pub(super) fn beside(directory: &Arc<Directory>, image: &Path) -> io::Result<Self> {
        let place = Place(Beside::of(directory, image, ".thinlun")?);
        let values = parse(&String::from_utf8_lossy(&place.0.read(MAX_BYTES)?))?;
        Ok(Notes { place: Some(place), values: Mutex::new(values), ..Self::in_memory() })
    }

    /// The same values, to be kept in memory from now on: of an image that others may read too.
    pub fn detached(self) -> Self {
        Notes { place: None, ..self }
    }

    /// Whether there is a place to keep them in.
    pub fn survive(&self) -> bool {
        self.place.is_some()
    }

    /// What was noted under a name.
    pub fn get(&self, name: &str) -> Option<String> {
        self.values().get(name).cloned()
    }

    fn values(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a value, or forgets it. When this returns, a crash of the host changes nothing about it.
    /// Neither name nor value may contain a line break, nor the name an equals sign.
    ///
    /// # Errors
    /// If the host cannot keep it; then what was noted before still is.
    pub fn set(&self, name: &str, value: Option<&str>) -> Result<(), StoreError> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.values().clone();
        let mut new = old.clone();
        match value {
            Some(value) => drop(new.insert(name.to_owned(), value.to_owned())),
            None => drop(new.remove(name)),
        }
        if let (Some(place), true) = (&self.place, new != old) {
            place.write(&new).map_err(|e| StoreError::from(Cause::from(&e)))?;
        }
        *self.values() = new;
        Ok(())
    }
}

fn parse(text: &str) -> io::Result<BTreeMap<String, String>> {
    let foreign = || io::Error::new(ErrorKind::InvalidData, "not a file of notes of thinlun");
    let mut lines = text.lines();
    match lines.next() {
        None => return Ok(BTreeMap::new()),
        Some(HEADING) => {}
        Some(_) => return Err(foreign()),
    }
    let values = lines.map(|line| line.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())));
    values.collect::<Option<_>>().ok_or_else(foreign)
}

impl Place {
    fn write(&self, values: &BTreeMap<String, String>) -> io::Result<()> {
        if values.is_empty() {
            return self.0.remove();
        }
        let lines = values.iter().map(|(name, value)| format!("{name}={value}\n"));
        let text = format!("{HEADING}\n{}", lines.collect::<String>());
        self.0.replace(|file| file.write_all(text.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_and_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let file = directory.path().join("disk.img.thinlun");
        let beside = |image: &Path| Notes::beside(&Directory::of(image)?, image);
        let notes = beside(&image).unwrap();
        assert_eq!(notes.get("a"), None);
        notes.set("a", Some("1=2 3")).unwrap();
        notes.set("b", Some("")).unwrap();
        let again = beside(&image).unwrap();
        assert_eq!((again.get("a").unwrap(), again.get("b").unwrap()), ("1=2 3".into(), "".into()));
        again.set("a", None).unwrap();
        again.set("b", None).unwrap();
        assert!(!file.exists());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    /// A queue thread looks; it must not hang with the host of one disk.
    #[test]
    fn who_looks_does_not_wait_for_who_changes() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let notes = Arc::new(Notes::beside(&Directory::of(&image).unwrap(), &image).unwrap());
        notes.set("a", Some("1")).unwrap();
        // What opens it to write waits until somebody reads.
        let fifo = directory.path().join("disk.img.thinlun.new");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let changing = Arc::clone(&notes);
        let change = std::thread::spawn(move || changing.set("a", Some("2")));
        while notes.changing.try_lock().is_ok() {
            std::thread::yield_now();
        }
        let looking = Arc::clone(&notes);
        let (found, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || found.send(looking.get("a")));
        let seen = seen.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(seen, Ok(Some("1".into())));
        // A pipe cannot be made to last, and the old note stays.
        std::fs::read(&fifo).unwrap();
        assert!(change.join().unwrap().is_err());
        assert_eq!(notes.get("a").as_deref(), Some("1"));
    }

    #[test]
    fn a_foreign_file_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("disk.img.thinlun");
        for text in ["hello", &format!("{HEADING}\nno equals sign\n")] {
            std::fs::write(&file, text).unwrap();
            let image = directory.path().join("disk.img");
            Notes::beside(&Directory::of(&image).unwrap(), &image).unwrap_err();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        }
    }
}
