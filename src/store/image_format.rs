//! Image files that are no disks byte by byte: served as they are they would show a guest their headers, and be destroyed
//! by what it writes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// What is looked at of the start of a file, and of its end, in bytes.
const HEAD: usize = 1024;
const TAIL: u64 = 512;

/// The name of a format, and what files of it hold at a byte.
const FORMATS: [(&str, usize, &[u8]); 15] = [
    ("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("Bochs", 0, b"Bochs Virtual HD Image"),
    ("EWF", 0, b"EVF\x09\x0d\x0a\xff\0"),
    ("AFF", 0, b"AFF10\r\n\0"),
];

/// The same of the last 512 bytes.
const AT_THE_END: [(&str, &[u8]); 2] = [("VHD", b"conectix"), ("DMG", b"koly")];

/// The format of the image file of this name, if it is one that is not raw; nothing of what cannot be read.
#[must_use]
pub fn of(path: &Path) -> Option<&'static str> {
    // What is neither is not opened: that may do something.
    let kind = path.metadata().ok()?.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        return None;
    }
    let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).clone();
    let file = options.open(path).ok()?;
    let head = bytes(&file, 0, HEAD);
    let holds = |(_, at, magic): &&(&str, usize, &[u8])| {
        head.get(*at..).is_some_and(|rest| rest.starts_with(magic))
    };
    let named = FORMATS.iter().find(holds).map(|(name, ..)| *name);
    named.or_else(|| {
        let tail = file.metadata().ok()?.len().checked_sub(TAIL)?;
        let tail = bytes(&file, tail, 16);
        AT_THE_END.iter().find(|(_, magic)| tail.starts_with(magic)).map(|(name, _)| *name)
    })
}

/// So many bytes of a file, or as many as there are.
fn bytes(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let read = file.read_at(&mut bytes, at).unwrap_or(0);
    bytes.truncate(read);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_what_they_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let image = |at: usize, magic: &[u8], len: usize| {
            let mut bytes = vec![0; len];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            std::fs::write(&path, bytes).unwrap();
            of(&path)
        };
        for (name, at, magic) in FORMATS {
            assert_eq!(image(at, magic, 4096), Some(name));
            assert_eq!(image(at + 1, magic, 4096), None, "{name}");
            assert_eq!(image(at, &magic[1..], 4096), None, "{name}");
        }
        for (name, magic) in AT_THE_END {
            assert_eq!(image(65536, magic, 65536 + 512), Some(name));
            assert_eq!(image(65537, magic, 65536 + 512), None, "{name}");
        }
        // Disks: nothing, a boot sector, an EFI table, and what is shorter than any header.
        assert_eq!(image(0, b"", 0), None);
        assert_eq!(image(510, b"\x55\xaa", 4096), None);
        assert_eq!(image(512, b"EFI PART", 4096), None);
        assert_eq!(image(0, b"QFI", 3), None);
        assert_eq!(of(&folder.path().join("none")), None);
        assert_eq!(of(folder.path()), None);
    }
}
