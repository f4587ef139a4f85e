//! What is kept beside an image is about that image, whatever happens to its name: a journal is not made good over another
//! image or over what is newer, and notes are not taken for another's.

mod frontend;
mod mounts;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use frontend::daemon::{Scratch, host_read, host_write};
use frontend::pattern::assert_same;
use frontend::scsi::sense;
use frontend::*;
use mounts::fuse::Fuse;
use mounts::{Kind, Mount, skipped};

/// What lies beside an image.
fn beside(image: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", image.display()))
}

fn notes(image: &Path) -> PathBuf {
    beside(image, ".thinlun")
}

fn journal(image: &Path) -> PathBuf {
    beside(image, ".thinlun-write")
}

/// As a journal and notes name an image.
fn identity(image: &Path) -> String {
    let metadata = image.metadata().unwrap();
    let born = metadata.created().unwrap().duration_since(UNIX_EPOCH).unwrap();
    format!("inode:{} born:{}.{:09}", metadata.ino(), born.as_secs(), born.subsec_nanos())
}

/// FNV-1a, of 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn head(magic: &[u8; 16], identity: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut image = identity.as_bytes().to_vec();
    image.resize(96, 0);
    [&magic[..], &offset.to_be_bytes(), &(len as u64).to_be_bytes(), &image].concat()
}

/// The journal of a write of `byte` to an image that held `old` there.
fn journal_of(identity: &str, offset: u64, old: u8, len: usize, byte: u8) -> Vec<u8> {
    let sums = sum(&[old; 512]).to_be_bytes().repeat(len / 512);
    [head(b"thinlun: write 3", identity, offset, len), sums, vec![byte; len]].concat()
}

/// As a thinlun wrote it that only said which sectors it would change: all.
fn second_journal_of(identity: &str, offset: u64, len: usize, byte: u8) -> Vec<u8> {
    let changes = vec![0xff; 256];
    [head(b"thinlun: write 2", identity, offset, len), changes, vec![byte; len]].concat()
}

/// As a thinlun wrote it that did not say which image it was about.
fn old_journal_of(offset: u64, len: usize, byte: u8) -> Vec<u8> {
    let mut bytes = b"thinlun: writing".to_vec();
    bytes.extend(offset.to_be_bytes());
    bytes.extend((len as u64).to_be_bytes());
    bytes.extend(vec![byte; len]);
    bytes
}

/// An image of ones.
fn image(scratch: &Scratch, name: &str) -> PathBuf {
    scratch.file(name, &[1; MIB as usize])
}

/// The host has died in the middle of a WRITE ATOMIC of sevens to blocks 2 to 5.
fn cut_off(image: &Path) {
    host_write(image, 1024, &[7; 512]);
    fs::write(journal(image), journal_of(&identity(image), 1024, 1, 2048, 7)).unwrap();
}

/// Whether it has been made good, and nothing else has changed.
fn is_whole(image: &Path) -> bool {
    let bytes = fs::read(image).unwrap();
    bytes.iter().enumerate().all(|(n, byte)| match n {
        1024..3072 => *byte == 7,
        _ => *byte == 1,
    })
}

fn serve(scratch: &Scratch, image: &Path, options: &str) -> Daemon {
    Daemon::builder(scratch).disk(image, options).spawn()
}

/// The start fails, says so, and has changed nothing.
#[track_caller]
fn refused(scratch: &Scratch, image: &Path, options: &str, words: &[&str]) {
    let (code, why) = Daemon::builder(scratch).disk(image, options).expect_refusal();
    assert_eq!(code, 1, "{why}");
    for word in words {
        assert!(why.contains(word), "no {word} in {why}");
    }
}

/// SET IDENTIFYING INFORMATION: something to remember.
#[track_caller]
fn name(lun: &Lun<'_>, text: &[u8]) -> ScsiResponse {
    lun.run_out(Cdb::new(0xa4).byte(1, 0x06).byte(9, text.len() as u8), text)
}

#[track_caller]
fn assert_named(scratch: &Scratch, image: &Path, options: &str, text: &[u8]) {
    let daemon = serve(scratch, image, options);
    let fe = FrontEnd::connect(&daemon);
    let report = Cdb::new(0xa3).byte(1, 0x05).byte(9, 64);
    let found = fe.ready_lun(0, 0).run_in(report, 64).expect_good();
    assert_eq!(&found.data()[4..], text);
}

/// Has something remembered of an image.
fn remember(scratch: &Scratch, image: &Path) {
    let daemon = serve(scratch, image, "");
    let fe = FrontEnd::connect(&daemon);
    name(&fe.ready_lun(0, 0), b"mine").expect_good();
    assert!(notes(image).exists());
}

/// SANITIZE OVERWRITE, killed when it is under way.
fn killed_while_erasing(scratch: &Scratch, image: &Path) {
    let mut daemon = serve(scratch, image, "fault=write:delay-ms-500@262144-1048576");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.run_out(cdb::sanitize(0x81, 5), &[1, 0, 0, 1, 0xee]).expect_good();
    eventually("the mark of the operation", || {
        let noted = fs::read_to_string(notes(image)).unwrap();
        assert!(noted.contains("operation=running"));
        noted.contains("operation=running#")
    });
    daemon.kill();
}

/// Whatever was noted: a guest finds this.
#[track_caller]
fn assert_served_as_it_is(scratch: &Scratch, image: &Path, options: &str) {
    let before = fs::read(image).unwrap();
    let daemon = serve(scratch, image, options);
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    assert_same(&lun.read16(0, 2048), &before, "the image");
    lun.write16(0, &[5; 512]);
    lun.synchronize_cache();
    std::thread::sleep(A_MOMENT);
    assert_eq!(lun.read16(0, 1), [5; 512]);
    assert_same(&fs::read(image).unwrap()[512..], &before[512..], "the image");
    assert!(!journal(image).exists());
}

/// By a thinlun that kept no sums.
#[test]
fn a_journal_of_an_older_thinlun_is_understood() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img");
    for old in [old_journal_of(1024, 2048, 7), second_journal_of(&identity(&disk), 1024, 2048, 7)] {
        host_write(&disk, 1024, &[1; 2048]);
        host_write(&disk, 1024, &[7; 700]);
        fs::write(journal(&disk), old).unwrap();
        drop(FrontEnd::connect(&serve(&scratch, &disk, "")));
        assert!(is_whole(&disk) && !journal(&disk).exists());
    }
}

#[test]
fn a_write_that_was_cut_off_is_made_again_whatever_the_locks() {
    for options in ["", "locking=off", "cache=direct,block-size=512", "adopt"] {
        let scratch = Scratch::new();
        let disk = image(&scratch, "disk.img");
        cut_off(&disk);
        for readonly in ["readonly", "readonly,locking=off"] {
            refused(&scratch, &disk, readonly, &["disk.img", "serve the image writable once"]);
        }
        let daemon = serve(&scratch, &disk, options);
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        assert_eq!(lun.read16(2, 4), [7; 2048], "{options}");
        assert!(is_whole(&disk) && !journal(&disk).exists(), "{options}");
        // What is written now is not written over by whoever comes next.
        lun.write16(2, &[8; 2048]);
        lun.synchronize_cache();
        drop((fe, daemon));
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        assert_eq!(fe.ready_lun(0, 0).read16(2, 4), [8; 2048]);
    }
}

/// Somebody has ignored it, and has written since.
#[test]
fn a_journal_is_not_made_good_over_what_is_newer() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img");
    cut_off(&disk);
    host_write(&disk, 1024, &[9; 2048]);
    assert_served_as_it_is(&scratch, &disk, "");
}

/// What lies beside a file is found through any link to it, and is kept there.
#[test]
fn links_lead_to_what_is_kept() {
    let scratch = Scratch::new();
    let [real, links] = ["real", "links"].map(|name| scratch.join(name));
    fs::create_dir(&real).unwrap();
    fs::create_dir(&links).unwrap();
    let (disk, link, again) = (real.join("disk.img"), links.join("a.img"), links.join("b.img"));
    fs::write(&disk, [1; MIB as usize]).unwrap();
    symlink(&disk, &link).unwrap();
    symlink("a.img", &again).unwrap();
    for path in [&link, &again] {
        host_write(&disk, 0, &[1; 4096]);
        cut_off(&disk);
        let daemon = serve(&scratch, path, "");
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        assert!(is_whole(&disk) && !journal(&disk).exists());
        name(&lun, b"mine").expect_good();
        assert!(notes(&disk).exists() && !notes(path).exists());
        lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]).expect_good();
    }
    assert_named(&scratch, &disk, "", b"mine");
    assert_eq!(fs::read_dir(&links).unwrap().count(), 2, "nothing but the links");
    // Where an older thinlun kept it, and where nobody would look any more.
    fs::rename(notes(&disk), notes(&link)).unwrap();
    refused(&scratch, &link, "", &["a.img.thinlun", "real/disk.img.thinlun"]);
    fs::rename(notes(&link), notes(&disk)).unwrap();
    assert_named(&scratch, &link, "", b"mine");
    fs::write(journal(&link), old_journal_of(0, 512, 9)).unwrap();
    refused(&scratch, &link, "", &["a.img.thinlun-write", "real/disk.img.thinlun-write"]);
}

/// A file that is made has nothing to do with what lies there of another that had its name.
#[test]
fn a_new_image_inherits_nothing() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img");
    {
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let mut list = vec![0; 24];
        (list[15], list[20]) = (5, 1);
        lun.run_out(Cdb::from_slice(&[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0]), &list).expect_good();
    }
    let named = fs::read_to_string(notes(&disk)).unwrap();
    let (first, rest) = named.split_once("\nimage=").unwrap();
    let unnamed = format!("{first}\n{}", rest.split_once('\n').unwrap().1);
    for (notes_left, journal_left) in [
        (named.clone(), journal_of(&identity(&disk), 0, 1, 4096, 9)),
        (unnamed, old_journal_of(0, 4096, 9)),
    ] {
        fs::remove_file(&disk).unwrap();
        fs::write(notes(&disk), notes_left).unwrap();
        fs::write(journal(&disk), journal_left).unwrap();
        for left in [notes(&disk), journal(&disk)] {
            fs::write(beside(&left, ".new"), b"thinlun: write 2, and the old guest's").unwrap();
        }
        // A start that fails leaves all as it is.
        refused(&scratch, &disk, "readonly,size=1M", &["not created"]);
        let daemon = serve(&scratch, &disk, "size=1M");
        let beside =
            |(name, _): &(std::ffi::OsString, u64)| name.to_string_lossy().starts_with("disk.img.");
        assert!(!scratch.listing().iter().any(beside), "{:?}", scratch.listing());
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        assert_eq!(lun.read16(0, 8), [0; 4096]);
        let keys = lun.run_in(Cdb::from_slice(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0]), 64);
        assert_eq!(keys.expect_good().data().len(), 8, "nobody is registered");
    }
    // What thinlun has not made it does not remove.
    fs::remove_file(&disk).unwrap();
    let kept = [notes(&disk), journal(&disk)];
    for left in kept.iter().flat_map(|kept| [kept.clone(), beside(kept, ".new")]) {
        fs::write(&left, "somebody else's").unwrap();
        refused(&scratch, &disk, "size=1M", &["disk.img.thinlun", "none of its files"]);
        assert_eq!(fs::read(&left).unwrap(), b"somebody else's");
        fs::remove_file(&left).unwrap();
        nix::unistd::mkfifo(&left, nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused(&scratch, &disk, "size=1M", &["disk.img.thinlun", "none of its files"]);
        fs::remove_file(left).unwrap();
    }
}

/// What others have put where thinlun writes what it keeps is not written over, and not called kept.
#[test]
fn what_others_have_put_there_stays() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img");
    let left = [notes(&disk), journal(&disk)].map(|kept| beside(&kept, ".new"));
    left.iter().for_each(|left| fs::write(left, "somebody else's").unwrap());
    {
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        let write = || lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]);
        assert!(!write().is_good() && !name(&lun, b"mine").is_good());
        assert_eq!(lun.read16(0, 8), [1; 4096]);
        let log = daemon.log();
        for left in &left {
            assert_eq!(fs::read(left).unwrap(), b"somebody else's");
            let told = format!("{}: lies where thinlun would write", left.display());
            assert!(log.contains(&told), "{log}");
            fs::remove_file(left).unwrap();
        }
        write().expect_good();
        name(&lun, b"mine").expect_good();
    }
    // Nor is it waited for.
    left.iter().for_each(|left| nix::unistd::mkfifo(left, nix::sys::stat::Mode::S_IRWXU).unwrap());
    let daemon = serve(&scratch, &disk, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    assert!(!lun.run_out(Cdb::new(0x9c).byte(13, 8), &[8; 4096]).is_good());
    assert!(!name(&lun, b"another's").is_good());
    assert_eq!(lun.read16(0, 8), [7; 4096]);
}

#[test]
fn a_journal_is_not_made_good_over_a_smaller_image() {
    for old in [false, true] {
        let scratch = Scratch::new();
        let disk = image(&scratch, "disk.img");
        cut_off(&disk);
        if old {
            fs::write(journal(&disk), old_journal_of(1024, 2048, 7)).unwrap();
        }
        File::options().write(true).open(&disk).unwrap().set_len(2048).unwrap();
        for options in ["", "adopt", "readonly"] {
            refused(&scratch, &disk, options, &["disk.img", "bytes 1024 to 3072", "has 2048"]);
        }
        assert_eq!(disk.metadata().unwrap().len(), 2048);
        // As it was, it is made good.
        File::options().write(true).open(&disk).unwrap().set_len(MIB).unwrap();
        host_write(&disk, 2048, &[1; 1024]);
        drop(FrontEnd::connect(&serve(&scratch, &disk, "")));
        assert_eq!(host_read(&disk, 1024, 2048), [7; 2048]);
    }
}

/// How a backup is put in the place of an image.
#[derive(Clone, Copy, Debug)]
enum Restored {
    ByName,
    InPlace,
    /// As a tool does that makes the file anew.
    Made,
}

impl Restored {
    const ALL: [Self; 3] = [Self::ByName, Self::InPlace, Self::Made];

    fn restore(self, backup: &Path, image: &Path) {
        match self {
            Restored::ByName => {
                let copy = beside(image, "-restored");
                fs::copy(backup, &copy).unwrap();
                fs::rename(copy, image).unwrap();
            }
            Restored::InPlace => fs::write(image, fs::read(backup).unwrap()).unwrap(),
            Restored::Made => {
                fs::remove_file(image).unwrap();
                fs::copy(backup, image).unwrap();
            }
        }
    }
}

/// On the file systems that use inodes again soon, and on one that does not.
fn places() -> Vec<(String, PathBuf, Box<dyn std::any::Any>)> {
    let mut places: Vec<(String, PathBuf, Box<dyn std::any::Any>)> = Vec::new();
    let scratch = Scratch::new();
    places.push(("temporary".into(), scratch.path().to_owned(), Box::new(scratch)));
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        if let Some(mount) = Mount::new(kind, 320) {
            places.push((format!("{kind:?}"), mount.path(), Box::new(mount)));
        }
    }
    places
}

/// A journal of the image that was there is not made good over the one that is.
#[test]
fn a_restored_image_is_not_written_over_by_a_journal() {
    for (place, folder, _kept) in places() {
        for restored in Restored::ALL {
            let scratch = Scratch::new();
            let (disk, backup) = (folder.join("disk.img"), folder.join("backup"));
            fs::write(&disk, [1; MIB as usize]).unwrap();
            fs::copy(&disk, &backup).unwrap();
            cut_off(&disk);
            restored.restore(&backup, &disk);
            println!("{place}: {restored:?}");
            assert_served_as_it_is(&scratch, &disk, "");
        }
    }
}

/// Nor where some of what was to be written is what the backup holds.
#[test]
fn a_backup_that_was_restored_in_place_is_not_written_over() {
    // The journal itself is not where writes fail.
    const AT: u64 = 2 * MIB;
    let Some(fuse) = Fuse::new(false) else { return };
    let (scratch, disk) = (Scratch::new(), fuse.path().join("disk.img"));
    let half = MIB as usize / 2;
    for backup in [0, 9] {
        fs::write(&disk, vec![1; 4 * MIB as usize]).unwrap();
        let mut daemon = serve(&scratch, &disk, "");
        {
            let fe = FrontEnd::connect(&daemon);
            let lun = fe.ready_lun(0, 0);
            // The backup's first quarter is what is written there.
            let data = [vec![backup; half / 2], vec![2; half + half / 2]].concat();
            fuse.fail_writes(Some(AT + half as u64..AT + MIB));
            let write = Cdb::new(0x9c).be64(2, AT / 512).be16(12, (MIB / 512) as u16);
            assert!(!lun.run_out(write, &data).is_good());
        }
        daemon.kill();
        fuse.fail_writes(None);
        assert!(journal(&disk).exists());
        assert_eq!(host_read(&disk, AT, 512), [backup; 512], "it was begun");
        fs::write(&disk, vec![backup; 4 * MIB as usize]).unwrap();
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        let found = fe.ready_lun(0, 0).read16(AT / 512, (MIB / 512) as u32);
        assert_same(&found, &vec![backup; MIB as usize], "the backup");
        assert!(!journal(&disk).exists());
        assert!(daemon.log().contains("is not made again"), "{}", daemon.log());
    }
}

/// A format or sanitize operation that was going on is not gone on with where the image has been restored.
#[test]
fn a_restored_image_is_not_erased() {
    for (place, folder, _kept) in places() {
        for restored in Restored::ALL {
            let scratch = Scratch::new();
            let (disk, backup) = (folder.join("disk.img"), folder.join("backup"));
            fs::write(&disk, [1; MIB as usize]).unwrap();
            fs::copy(&disk, &backup).unwrap();
            println!("{place}: {restored:?}");
            killed_while_erasing(&scratch, &disk);
            restored.restore(&backup, &disk);
            if !matches!(restored, Restored::InPlace) {
                // It may be a copy of both.
                refused(&scratch, &disk, "", &["disk.img", "another image", "adopt", "remove"]);
                refused(&scratch, &disk, "locking=off", &["another image"]);
                refused(&scratch, &disk, "readonly", &["another image"]);
                assert_same(&fs::read(&disk).unwrap(), &fs::read(&backup).unwrap(), "the backup");
            }
            // Even if somebody says that it is: the image knows nothing of an operation.
            assert_served_as_it_is(&scratch, &disk, "adopt");
            assert!(!notes(&disk).exists());
            assert_served_as_it_is(&scratch, &disk, "");
        }
    }
}

/// A copy of the image and of what lies beside it, made in the middle of something: it goes on there when somebody says
/// that both belong together.
#[test]
fn a_copy_of_both_goes_on_when_it_is_told_to() {
    let copy = |from: &Path, to: &Path| {
        for suffix in ["", ".thinlun", ".thinlun-write"] {
            let (from, to) = (beside(from, suffix), beside(to, suffix));
            if from.exists() {
                fs::copy(from, to).unwrap();
            }
        }
    };
    let scratch = Scratch::new();
    let (disk, other) = (image(&scratch, "disk.img"), scratch.join("copy.img"));
    cut_off(&disk);
    copy(&disk, &other);
    refused(&scratch, &other, "", &["copy.img", "another image", "adopt"]);
    drop(FrontEnd::connect(&serve(&scratch, &other, "adopt")));
    assert!(is_whole(&other) && !journal(&other).exists());
    // The original has lost nothing by that, nor is it confused by a copy beside it.
    assert!(journal(&disk).exists());
    remember(&scratch, &disk);
    assert!(is_whole(&disk));
    copy(&disk, &other);
    refused(&scratch, &other, "", &["copy.img", "another image (inode:", "adopt"]);
    assert_named(&scratch, &disk, "", b"mine");
    fs::remove_file(notes(&disk)).unwrap();
    assert_named(&scratch, &disk, "", b"");
    assert_named(&scratch, &other, "adopt", b"mine");
    assert_named(&scratch, &other, "", b"mine");
    // An operation.
    for name in [&disk, &other] {
        fs::write(name, [1; MIB as usize]).unwrap();
        let _ = fs::remove_file(notes(name));
    }
    killed_while_erasing(&scratch, &disk);
    copy(&disk, &other);
    refused(&scratch, &other, "", &["another image"]);
    for (name, options) in [(&other, "adopt"), (&disk, "")] {
        let daemon = serve(&scratch, name, options);
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.lun(0, 0);
        eventually("it is erased", || lun.run(cdb::test_unit_ready()).is_good());
        assert_same(&fs::read(name).unwrap(), &[0xee; MIB as usize], "an image that was erased");
        assert!(!notes(name).exists());
    }
}

/// It is found by what it says, and whoever starts with another name is told what to do.
#[test]
fn an_image_that_was_renamed_is_not_served_without_what_belongs_to_it() {
    let scratch = Scratch::new();
    let (disk, moved) = (image(&scratch, "disk.img"), scratch.join("moved.img"));
    cut_off(&disk);
    fs::rename(&disk, &moved).unwrap();
    for options in ["", "locking=off", "readonly"] {
        refused(&scratch, &moved, options, &["moved.img", "disk.img.thinlun-write", "rename"]);
    }
    fs::rename(journal(&disk), journal(&moved)).unwrap();
    remember(&scratch, &moved);
    assert!(is_whole(&moved));
    fs::rename(&moved, &disk).unwrap();
    refused(&scratch, &disk, "", &["disk.img", "moved.img.thinlun", "disk.img.thinlun"]);
    // So with another name for the same file.
    fs::rename(&disk, &moved).unwrap();
    fs::hard_link(&moved, &disk).unwrap();
    refused(&scratch, &disk, "", &["moved.img.thinlun"]);
    assert_named(&scratch, &moved, "", b"mine");
    // Another image has taken the old name, and what lies there is still not its own.
    fs::remove_file(&disk).unwrap();
    fs::rename(&moved, &disk).unwrap();
    image(&scratch, "moved.img");
    refused(&scratch, &moved, "", &["moved.img", "another image"]);
}

/// Names that change while the daemon runs.
#[test]
fn what_is_noted_of_an_image_that_has_moved_is_not_lost() {
    let scratch = Scratch::new();
    let (disk, moved) = (image(&scratch, "disk.img"), scratch.join("moved.img"));
    let daemon = serve(&scratch, &disk, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    fs::rename(&disk, &moved).unwrap();
    name(&lun, b"mine").expect_good();
    lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]).expect_good();
    drop((fe, daemon));
    refused(&scratch, &moved, "", &["moved.img", "disk.img.thinlun"]);
    fs::rename(notes(&disk), notes(&moved)).unwrap();
    assert_named(&scratch, &moved, "", b"mine");
    // Another image comes where it was, and is served by a daemon of its own.
    let daemon = serve(&scratch, &moved, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    fs::remove_file(notes(&moved)).unwrap();
    fs::rename(&moved, &disk).unwrap();
    image(&scratch, "moved.img");
    let socket = scratch.join("other.sock");
    let other = Daemon::builder(&scratch).socket(socket).disk(&moved, "").spawn();
    let guest = FrontEnd::connect(&other);
    name(&guest.ready_lun(0, 0), b"another's").expect_good();
    let before = scratch.listing();
    let answer = name(&lun, b"lost");
    assert!(!answer.is_good(), "{answer:?}");
    let answer = lun.run_out(Cdb::new(0x9c).byte(13, 8), &[8; 4096]);
    assert!(!answer.is_good(), "{answer:?}");
    assert_eq!(lun.read16(0, 8), [7; 4096], "and nothing was written");
    assert_eq!(scratch.listing(), before);
    assert!(daemon.log().contains("another file has its name now"), "{}", daemon.log());
    // A guest that starts anew still has its disk.
    fe.reset_device();
    fe.start();
    assert_eq!(fe.ready_lun(0, 0).read16(0, 8), [7; 4096]);
    drop((fe, daemon, guest, other));
    assert_named(&scratch, &moved, "", b"another's");
}

/// The first block of an image that is being erased is the last to be, and tells that it is.
#[test]
fn an_operation_that_nobody_was_told_of_does_not_go_on() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img");
    // As a crash leaves it between the note and the mark that it names.
    let text = format!(
        "# thinlun remembers this of the image beside it.\nimage={}\noperation=running#{} sanitize deallocate 1 0 0\n",
        identity(&disk),
        "0123456789abcdef".repeat(2),
    );
    fs::write(notes(&disk), text).unwrap();
    assert_served_as_it_is(&scratch, &disk, "");
    assert!(!notes(&disk).exists());
    // A note of a thinlun that made no marks goes on, and one that is not understood erases nothing.
    let noted = |operation: &str| {
        let head = "# thinlun remembers this of the image beside it.";
        fs::write(notes(&disk), format!("{head}\noperation={operation}\n")).unwrap();
    };
    noted("running sanitize deallocate one 0 0");
    {
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.lun(0, 0);
        eventually("its attention is taken", || {
            lun.run(cdb::test_unit_ready()).sense_code() == Some((3, 0x31, 3))
        });
        assert_eq!(host_read(&disk, 4096, 4096), [1; 4096]);
    }
    noted("running sanitize deallocate 1 0 0");
    let daemon = serve(&scratch, &disk, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.lun(0, 0);
    eventually("it is erased", || lun.run(cdb::test_unit_ready()).is_good());
    assert_eq!(lun.read16(0, 2048), [0; MIB as usize]);
}

/// Where there is no room for a mark an operation goes on without.
#[test]
fn a_full_disk_can_be_erased() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", MIB);
    let daemon = serve(&scratch, &disk, "space-limit=64K");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    lun.write16(1024, &[1; 64 << 10]);
    lun.run_out(cdb::write16(0, 1), &[1; 512]).expect_sense((7, 0x27, 7));
    lun.run(cdb::sanitize(2, 0)).expect_good();
    assert_eq!(lun.read16(1024, 128), [0; 64 << 10]);
    lun.write16(0, &[1; 512]);
    assert!(!notes(&disk).exists());
}

// ----- a directory in which nothing can be made -----------------------------------------------

/// What a disk offers of that which needs a place.
fn offers(fe: &FrontEnd) -> [bool; 3] {
    let lun = fe.ready_lun(0, 0);
    let atomic = lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]);
    let atomic = match atomic.sense_code() {
        None => atomic.expect_good().is_good(),
        code => {
            assert_eq!(code, Some(sense::INVALID_OPCODE));
            false
        }
    };
    assert_eq!(lun.vpd(0xb0)[44..48] != [0; 4], atomic, "MAXIMUM ATOMIC TRANSFER LENGTH");
    let sense = Cdb::from_slice(&[0x1a, 8, 8, 0, 64, 0]);
    let saves = lun.run_in(sense, 64).expect_good().data()[4] & 0x80 != 0;
    let mut list = vec![0; 24];
    (list[15], list[20]) = (5, 1);
    let register = lun.run_out(Cdb::from_slice(&[0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0]), &list);
    let capabilities = lun.run_in(Cdb::from_slice(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 8, 0]), 8);
    let survives = capabilities.expect_good().data()[2] & 1 != 0;
    assert_eq!(register.is_good(), survives, "{register:?}");
    // These are there in any case, and work.
    lun.run(cdb::format_unit(0)).expect_good();
    lun.run(cdb::sanitize(2, 0)).expect_good();
    name(&lun, b"mine").expect_good();
    let page = [&[0; 4][..], &[8, 18], &[0; 18]].concat();
    let save = lun.run_out(Cdb::from_slice(&[0x15, 0x11, 0, 0, 24, 0]), &page);
    assert_eq!(save.is_good(), saves, "{save:?}");
    [atomic, saves, survives]
}

fn own(path: &Path, user: u32, mode: u32) {
    std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// What cannot be kept is not offered: as nobody, and as root, who cannot any more when his capabilities are gone.
#[test]
fn what_cannot_be_kept_is_not_offered() {
    const NOBODY: u32 = 65534;
    if !nix::unistd::geteuid().is_root() {
        return skipped("nothing was proved of directories of others: this is not root");
    }
    let folder = |owner: u32, of_image: u32| {
        let scratch = Scratch::new();
        own(scratch.path(), NOBODY, 0o755);
        let folder = scratch.join("images");
        fs::create_dir(&folder).unwrap();
        let disk = folder.join("disk.img");
        fs::write(&disk, [1; MIB as usize]).unwrap();
        own(&disk, of_image, 0o600);
        own(&folder, owner, 0o755);
        (scratch, folder, disk)
    };
    for (owner, runs_as, arguments, offered) in [
        (0, NOBODY, &[][..], false),
        (NOBODY, NOBODY, &[], true),
        (NOBODY, 0, &[], false),
        (NOBODY, 0, &["--sandbox=none"], true),
        (0, 0, &[], true),
    ] {
        let (scratch, folder, disk) = folder(owner, runs_as);
        let builder = || {
            let builder = Daemon::builder(&scratch).disk(&disk, "").args(arguments);
            if runs_as == 0 { builder } else { builder.user(runs_as) }
        };
        let daemon = builder().spawn();
        let fe = FrontEnd::connect(&daemon);
        let what = format!("a directory of {owner}, run as {runs_as} {arguments:?}");
        assert_eq!(offers(&fe), [offered; 3], "{what}");
        let log = daemon.log();
        let told = log.contains("nothing can be kept beside it (permission denied)");
        assert_eq!(told, !offered, "{what}: {log}");
        drop((fe, daemon));
        if !offered {
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "{what}");
            // What is remembered already would be for ever.
            let text = "# thinlun remembers this of the image beside it.\noperation=running format deallocate\n";
            for (file, text) in
                [(notes(&disk), text.as_bytes()), (journal(&disk), &old_journal_of(0, 512, 9))]
            {
                fs::write(&file, text).unwrap();
                own(&file, runs_as, 0o644);
                let (code, why) = builder().expect_refusal();
                assert!(
                    code == 1 && why.contains("cannot be changed: permission denied"),
                    "{what}: {why}"
                );
                fs::remove_file(file).unwrap();
            }
        }
    }
}

/// A full file system is no reason to offer less: it may have room again.
#[test]
fn a_full_file_system_is_not_for_good() {
    let Some(mount) = Mount::new(Kind::Tmpfs, 8) else { return };
    let disk = mount.path().join("disk.img");
    fs::write(&disk, [1; MIB as usize]).unwrap();
    let rest = mount.path().join("rest");
    let into = format!("of={}", rest.display());
    let full = Command::new("dd").args(["if=/dev/zero", "bs=4k", &into]).output().unwrap();
    assert!(!full.status.success(), "it is full");
    let scratch = Scratch::new();
    let daemon = serve(&scratch, &disk, "");
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let write = || lun.run_out(Cdb::new(0x9c).byte(13, 8), &[7; 4096]);
    write().expect_sense((7, 0x27, 7));
    fs::remove_file(rest).unwrap();
    write().expect_good();
    assert_eq!(lun.read16(0, 8), [7; 4096]);
}

/// A name for which there is no room with anything behind it.
#[test]
fn a_name_that_is_too_long_has_nothing_beside_it() {
    let scratch = Scratch::new();
    for (len, offered) in [(237, true), (238, false)] {
        let disk = image(&scratch, &"n".repeat(len));
        let daemon = serve(&scratch, &disk, "");
        let fe = FrontEnd::connect(&daemon);
        assert_eq!(offers(&fe), [offered; 3], "{len}");
    }
}
