//! Which file an image is, whatever it is called. What lies beside an image carries this of the image that it is about: a
//! name can come to lead to another file, by which then nothing must be written over.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::time::UNIX_EPOCH;

use super::sys;

/// What a host tells of a file that stays the same as long as the file is there, over restarts of the host and on other
/// hosts that see the same file system (and so not the device number). Each of it may not be known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    /// Inode number, where it lasts.
    inode: Option<u64>,
    /// Tells files apart that had an inode one after another.
    generation: Option<u32>,
    /// When the file was made: seconds and nanoseconds.
    born: Option<(u64, u32)>,
}

impl Identity {
    /// The identity of an open file.
    ///
    /// # Errors
    /// If the host cannot say what it is.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let born = born.map(|time| (time.as_secs(), time.subsec_nanos()));
        let lasts = sys::inodes_last(file);
        Ok(Identity {
            inode: lasts.then(|| metadata.ino()),
            generation: lasts.then(|| sys::generation(file)).flatten(),
            born: born.filter(|born| *born != (0, 0)),
        })
    }

    /// Whether nothing that is known of both speaks against it that they are one file.
    pub(super) fn may_be(&self, other: &Self) -> bool {
        fn agree<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
            one.is_none() || other.is_none() || one == other
        }
        agree(self.inode, other.inode)
            && agree(self.generation, other.generation)
            && agree(self.born, other.born)
    }

    /// Whether enough is known of both to say that they are one file.
    pub(super) fn is(&self, other: &Self) -> bool {
        let same = |known: bool, agree: bool| known && agree;
        self.may_be(other)
            && same(self.inode.is_some(), self.inode == other.inode)
            && (same(self.generation.is_some(), self.generation == other.generation)
                || same(self.born.is_some(), self.born == other.born))
    }
}

/// `inode:12 generation:34 born:56.000000789`: what is known of it.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            self.inode.map(|inode| format!("inode:{inode}")),
            self.generation.map(|generation| format!("generation:{generation}")),
            self.born.map(|(seconds, nanoseconds)| format!("born:{seconds}.{nanoseconds:09}")),
        ];
        f.write_str(&words.into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

/// Words that are not understood were written by a later thinlun, which knows more.
impl FromStr for Identity {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut identity = Identity::default();
        for word in text.split(' ') {
            match word.split_once(':') {
                Some(("inode", inode)) => identity.inode = Some(inode.parse()?),
                Some(("generation", generation)) => {
                    identity.generation = Some(generation.parse()?);
                }
                Some(("born", time)) => {
                    let (seconds, nanoseconds) = time.split_once('.').unwrap_or((time, "0"));
                    identity.born = Some((seconds.parse()?, nanoseconds.parse()?));
                }
                Some(_) | None => {}
            }
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_and_understood_again() {
        for text in
            ["", "inode:7", "inode:7 generation:4294967295 born:12.000000034", "born:1.999999999"]
        {
            let identity: Identity = text.parse().unwrap();
            assert_eq!(identity.to_string(), text);
        }
        assert_eq!("colour:red inode:7".parse::<Identity>().unwrap().to_string(), "inode:7");
        for text in ["inode:", "inode:x", "born:1.x", "generation:-1"] {
            text.parse::<Identity>().unwrap_err();
        }
    }

    #[test]
    fn what_is_not_known_speaks_neither_for_nor_against() {
        let identity = |text: &str| text.parse::<Identity>().unwrap();
        let whole = identity("inode:7 generation:3 born:12.000000034");
        for (text, may_be, is) in [
            ("inode:7 generation:3 born:12.000000034", true, true),
            ("inode:7 generation:3", true, true),
            ("inode:7 born:12.000000034", true, true),
            ("inode:7", true, false),
            ("generation:3 born:12.000000034", true, false),
            ("", true, false),
            ("inode:8 generation:3 born:12.000000034", false, false),
            ("inode:7 generation:4 born:12.000000034", false, false),
            ("inode:7 generation:3 born:12.000000035", false, false),
            ("born:13.000000034", false, false),
        ] {
            let other = identity(text);
            assert_eq!((whole.may_be(&other), whole.is(&other)), (may_be, is), "{text}");
            assert_eq!((other.may_be(&whole), other.is(&whole)), (may_be, is), "{text}");
        }
        assert!(!identity("").is(&identity("")));
    }

    #[test]
    fn a_file_keeps_it_and_another_has_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, "1").unwrap();
        let of = |path: &std::path::Path| Identity::of(&File::open(path).unwrap()).unwrap();
        let first = of(&path);
        std::fs::write(&path, "22").unwrap();
        std::fs::rename(&path, directory.path().join("b")).unwrap();
        assert_eq!(of(&directory.path().join("b")), first);
        std::fs::write(&path, "1").unwrap();
        assert!(!of(&path).may_be(&first));
    }
}
