//! The shape of the house: who may import whom, and where `unsafe` may stand.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(below: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![below.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(source_folder()).unwrap().display().to_string();
                found.push((name, code_of(&fs::read_to_string(&path).unwrap())));
            }
        }
    }
    found
}

/// The lines that are no comments.
fn code_of(text: &str) -> String {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

fn source_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn assert_never(folder: &str, words: &[&str]) {
    for (name, code) in sources(&source_folder().join(folder)) {
        for word in words {
            assert!(!code.contains(word), "{name} must not use {word}");
        }
    }
}

#[test]
fn imports_run_one_way() {
    assert_never("store", &["crate::scsi", "crate::vhost", "crate::daemon", "crate::config"]);
    assert_never("scsi", &["crate::vhost", "crate::daemon", "crate::config"]);
    assert_never("vhost", &["crate::daemon", "crate::config"]);
}

#[test]
fn only_the_transport_knows_virtio_and_only_the_store_knows_files() {
    let virtio = ["vm_memory", "use vhost::", "vhost_user"];
    assert_never("store", &virtio);
    assert_never("scsi", &virtio);
    assert_never("daemon", &virtio);
    assert_never("scsi", &["std::fs", "libc::", "nix::", "std::io"]);
}

#[test]
fn unsafe_stands_in_few_files_and_each_says_so() {
    let allowed = [
        "daemon/socket.rs",
        "store/buffers.rs",
        "store/engine/uring.rs",
        "store/fiemap.rs",
        "store/sys.rs",
        "vhost/event_fd.rs",
        "vhost/lent.rs",
        "vhost/guest_buf.rs",
        "vhost/messages.rs",
        "vhost/split_ring.rs",
    ];
    for (name, code) in sources(&source_folder()) {
        let opened = code.contains("#![allow(unsafe_code)]");
        assert_eq!(opened, allowed.contains(&name.as_str()), "{name}");
        let blocks = ["unsafe {", "unsafe fn", "unsafe impl"];
        assert!(opened || !blocks.iter().any(|b| code.contains(b)), "{name} has unsafe code");
    }
}
