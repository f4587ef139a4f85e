//! What has to be remembered of a disk while the program does not run: a few lines of text in a file
//! beside the image, `IMAGE.thinlun`, replaced as a whole and only there while there is something to
//! remember. It says which image it is about.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::beside::{Beside, Directory, Failed};
use super::identity::Identity;
use super::{Cause, StoreError};

/// What the file's name has more than the image's.
pub(super) const SUFFIX: &str = ".thinlun";

/// Longest file that is read: far more than is ever written.
pub(super) const MAX_BYTES: u64 = 64 << 10;

/// The first line, so that nobody else's file is taken for ours.
const HEADING: &str = "# thinlun remembers this of the image beside it.";

/// The name of the line behind it, which says which image that is. A thinlun that did not know of it wrote none.
const IMAGE: &str = "image";

type Values = BTreeMap<String, String>;

/// Named values that survive a restart, if there is a place to keep them.
#[derive(Debug)]
pub struct Notes {
    place: Option<Place>,
    values: Mutex<Values>,
    /// Held by who changes them, which takes as long as the host does. Who looks does not wait for that.
    changing: Mutex<Kept>,
}

/// Whether the file holds the values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kept {
    #[default]
    Surely,
    /// The host has failed to replace it, and it may hold others.
    Perhaps,
}

#[derive(Debug)]
struct Place {
    beside: Beside,
    image: Identity,
}

impl Notes {
    /// Notes that last as long as the program.
    pub fn in_memory() -> Self {
        Notes { place: None, values: Mutex::default(), changing: Mutex::default() }
    }

    /// Notes beside an image, in its directory; what lies there already is taken over by [`Notes::read`].
    pub(super) fn beside(directory: &Arc<Directory>, image: Identity) -> Self {
        let place = Place { beside: Beside::of(directory, SUFFIX), image };
        Notes { place: Some(place), ..Self::in_memory() }
    }

    /// Takes over what is in the file beside `image`; nothing if there is none (it is empty). Values about another image
    /// are an error, or with `adopt` are taken as if they were about this one, and are from then on.
    ///
    /// # Errors
    /// If that is not a file of ours, or one about another image, or the host fails in what `adopt` asks for. Then
    /// nothing has changed.
    pub(super) fn read(&self, image: &Identity, file: &[u8], adopt: bool) -> io::Result<()> {
        let mut kept = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let (about, values) = parse(&String::from_utf8_lossy(file))?;
        if let Some(about) = about
            && !about.may_be(image)
        {
            if !adopt {
                return Err(of_another(&about));
            }
            if let Some(place) = &self.place {
                place.write(&values).map_err(|failed| failed.error)?;
            }
        }
        *kept = Kept::Surely;
        *self.values() = values;
        Ok(())
    }

    /// Whether there is a place to keep them in.
    pub fn survive(&self) -> bool {
        self.place.is_some()
    }

    /// What was noted under a name.
    pub fn get(&self, name: &str) -> Option<String> {
        self.values().get(name).cloned()
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a value, or forgets it. When this returns, a crash of the host changes nothing about it.
    /// Neither name nor value may contain a line break, nor the name an equals sign.
    ///
    /// # Errors
    /// If the host cannot keep it; then what was noted before still is.
    pub fn set(&self, name: &str, value: Option<&str>) -> Result<(), StoreError> {
        let mut kept = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.values().clone();
        let mut new = old.clone();
        match value {
            Some(value) => drop(new.insert(name.to_owned(), value.to_owned())),
            None => drop(new.remove(name)),
        }
        if let Some(place) = &self.place
            && (new != old || *kept == Kept::Perhaps)
        {
            if let Err(Failed { error, happened }) = place.write(&new) {
                // What was refused must not be found by the next who looks.
                if happened {
                    let undone = place.write(&old).is_ok();
                    *kept = if undone { Kept::Surely } else { Kept::Perhaps };
                }
                let file = place.beside.path();
                log::error!("{}: {name}: {}", file.display(), super::file::plain(&error));
                return Err(Cause::from(&error).into());
            }
            *kept = Kept::Surely;
        }
        *self.values() = new;
        Ok(())
    }
}

/// What lies beside an image is about another one.
pub(super) fn of_another(image: &Identity) -> io::Error {
    io::Error::other(format!(
        "it is about another image ({image}): if this one is a copy that was made, or has come back, together with it, \
         start once with adopt; if this one has taken the other's place, remove that file"
    ))
}

/// Which image a file says that it is about, if it is one of ours and says so.
pub(super) fn image_of(file: &[u8]) -> Option<Identity> {
    let text = String::from_utf8_lossy(file);
    let mut lines = text.lines();
    let heading = lines.next() == Some(HEADING);
    let value = lines.next()?.split_once('=').filter(|(name, _)| heading && *name == IMAGE)?.1;
    value.parse().ok()
}

/// Whether a file is one of ours, whatever it says.
pub(super) fn is_ours(file: &[u8]) -> bool {
    file.is_empty() || file.starts_with(HEADING.as_bytes())
}

/// Whether a file is one of ours, or the beginning of one.
pub(super) fn is_begun(file: &[u8]) -> bool {
    is_ours(file) || HEADING.as_bytes().starts_with(file)
}

fn parse(text: &str) -> io::Result<(Option<Identity>, Values)> {
    let foreign = || io::Error::new(ErrorKind::InvalidData, "not a file of notes of thinlun");
    let mut lines = text.lines();
    match lines.next() {
        None => return Ok((None, Values::new())),
        Some(HEADING) => {}
        Some(_) => return Err(foreign()),
    }
    let values = lines.map(|line| line.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())));
    let mut values: Values = values.collect::<Option<_>>().ok_or_else(foreign)?;
    let image = values.remove(IMAGE).map(|image| image.parse().map_err(|_| foreign()));
    Ok((image.transpose()?, values))
}

impl Place {
    fn write(&self, values: &Values) -> Result<(), Failed> {
        if values.is_empty() {
            return self.beside.remove();
        }
        let lines = values.iter().map(|(name, value)| format!("{name}={value}\n"));
        let (image, lines) = (&self.image, lines.collect::<String>());
        let text = format!("{HEADING}\n{IMAGE}={image}\n{lines}");
        self.beside.replace(|file| file.write_all(text.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::path::{Path, PathBuf};

    /// An image in a folder of its own, and the file that notes about it are in.
    struct Image {
        folder: tempfile::TempDir,
        path: PathBuf,
        file: PathBuf,
    }

    impl Image {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (path, file) =
                (folder.path().join("disk.img"), folder.path().join("disk.img.thinlun"));
            fs::write(&path, [0; 512]).unwrap();
            Image { folder, path, file }
        }

        fn identity(&self) -> Identity {
            Identity::of(&File::open(&self.path).unwrap()).unwrap()
        }

        fn read_into(&self, notes: &Notes, adopt: bool) -> io::Result<()> {
            notes.read(&self.identity(), &fs::read(&self.file).unwrap_or_default(), adopt)
        }

        fn read(&self, adopt: bool) -> io::Result<Notes> {
            let directory = Directory::of(&self.path, &File::open(&self.path)?)?;
            let notes = Notes::beside(&directory, self.identity());
            self.read_into(&notes, adopt)?;
            Ok(notes)
        }

        fn notes(&self) -> Notes {
            self.read(false).unwrap()
        }

        /// Another file takes its name.
        fn replace(&self) {
            let other = self.folder.path().join("other.img");
            fs::write(&other, [1; 512]).unwrap();
            fs::rename(&other, &self.path).unwrap();
        }
    }

    #[test]
    fn notes_survive_and_leave_nothing_behind() {
        let image = Image::new();
        let notes = image.notes();
        assert_eq!(notes.get("a"), None);
        notes.set("a", Some("1=2 3")).unwrap();
        notes.set("b", Some("")).unwrap();
        let again = image.notes();
        assert_eq!((again.get("a").unwrap(), again.get("b").unwrap()), ("1=2 3".into(), "".into()));
        again.set("a", None).unwrap();
        again.set("b", None).unwrap();
        assert!(!image.file.exists());
        assert_eq!(fs::read_dir(image.folder.path()).unwrap().count(), 1);
    }

    /// The name alone does not make them notes about an image.
    #[test]
    fn notes_about_another_image_are_taken_only_if_asked_for() {
        let image = Image::new();
        image.notes().set("a", Some("1")).unwrap();
        let written = fs::read(&image.file).unwrap();
        assert_eq!(image_of(&written), Some(image.identity()));
        image.replace();
        let why = image.read(false).unwrap_err().to_string();
        assert!(why.contains("another image (inode:") && why.contains("adopt"), "{why}");
        assert_eq!(fs::read(&image.file).unwrap(), written);
        assert_eq!(image.read(true).unwrap().get("a").as_deref(), Some("1"));
        // Once is enough.
        assert_eq!(image.notes().get("a").as_deref(), Some("1"));
    }

    /// Those of an older thinlun say nothing of an image.
    #[test]
    fn notes_that_name_no_image_are_about_the_one_beside_them() {
        let image = Image::new();
        fs::write(&image.file, format!("{HEADING}\na=1\n")).unwrap();
        let notes = image.notes();
        assert_eq!(notes.get("a").as_deref(), Some("1"));
        notes.set("a", Some("2")).unwrap();
        image.replace();
        image.read(false).unwrap_err();
    }

    /// What another process has noted meanwhile.
    #[test]
    fn notes_are_read_again() {
        let image = Image::new();
        let (one, other) = (image.notes(), image.notes());
        one.set("a", Some("1")).unwrap();
        let read = |notes: &Notes| image.read_into(notes, false);
        read(&other).unwrap();
        assert_eq!(other.get("a").as_deref(), Some("1"));
        other.set("b", Some("2")).unwrap();
        other.set("a", None).unwrap();
        read(&one).unwrap();
        assert_eq!((one.get("a"), one.get("b").as_deref()), (None, Some("2")));
        other.set("b", None).unwrap();
        read(&one).unwrap();
        assert_eq!(one.get("b"), None);
        // What cannot be read changes nothing.
        other.set("b", Some("3")).unwrap();
        read(&one).unwrap();
        one.read(&image.identity(), b"hello", false).unwrap_err();
        assert_eq!(one.get("b").as_deref(), Some("3"));
    }

    /// A queue thread looks; it must not hang with the host of one disk.
    #[test]
    fn who_looks_does_not_wait_for_who_changes() {
        let image = Image::new();
        let notes = Arc::new(image.notes());
        notes.set("a", Some("1")).unwrap();
        // As who has the host replace the file.
        let changing = notes.changing.lock().unwrap();
        let other = Arc::clone(&notes);
        let change = std::thread::spawn(move || other.set("a", Some("2")));
        let looking = Arc::clone(&notes);
        let (found, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || found.send(looking.get("a")));
        let seen = seen.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(seen, Ok(Some("1".into())));
        drop(changing);
        change.join().unwrap().unwrap();
        assert_eq!(notes.get("a").as_deref(), Some("2"));
        // What cannot be made to last is not noted, and the old note stays.
        let fifo = image.folder.path().join("disk.img.thinlun.new");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        notes.set("a", Some("3")).unwrap_err();
        assert_eq!(notes.get("a").as_deref(), Some("2"));
        assert_eq!(image.notes().get("a").as_deref(), Some("2"));
    }

    #[test]
    fn a_foreign_file_is_not_touched() {
        let image = Image::new();
        for text in [
            "hello",
            &format!("{HEADING}\nno equals sign\n"),
            &format!("{HEADING}\nimage=inode:x\n"),
        ] {
            fs::write(&image.file, text).unwrap();
            for adopt in [false, true] {
                image.read(adopt).unwrap_err();
            }
            assert_eq!(fs::read_to_string(&image.file).unwrap(), text);
        }
    }

    /// Where the image has gone from its name, and where another has come.
    #[test]
    fn nothing_is_noted_over_what_is_noted_of_another_image() {
        let image = Image::new();
        let notes = image.notes();
        notes.set("a", Some("1")).unwrap();
        let moved: &Path = &image.folder.path().join("moved.img");
        fs::rename(&image.path, moved).unwrap();
        notes.set("a", Some("2")).unwrap();
        fs::write(&image.path, [1; 512]).unwrap();
        fs::remove_file(&image.file).unwrap();
        let other = image.notes();
        other.set("a", Some("another's")).unwrap();
        for value in [Some("3"), None] {
            notes.set("a", value).unwrap_err();
        }
        assert_eq!(notes.get("a").as_deref(), Some("2"));
        assert_eq!(image.notes().get("a").as_deref(), Some("another's"));
    }
}
