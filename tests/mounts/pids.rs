//! A control group in which a process gets no more threads.

use std::fs;
use std::path::{Path, PathBuf};

use super::skipped;

/// A control group for one daemon, gone with this value, which has to outlive the daemon.
pub struct Pids(PathBuf);

impl Pids {
    /// `None`, loudly, where there can be none.
    pub fn new() -> Option<Self> {
        // Version 1 has a tree for each controller, version 2 one for all.
        for tree in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new) {
            let _ = fs::write(tree.join("cgroup.subtree_control"), "+pids");
            let group = tempfile::Builder::new().prefix("thinlun-test-").tempdir_in(tree);
            let Ok(group) = group else { continue };
            // Its files go with it, and cannot be removed before.
            let group = Pids(group.keep());
            if group.0.join("pids.max").exists() {
                return Some(group);
            }
        }
        skipped("nothing was proved of a host without threads: no control group can be made");
        None
    }

    /// Puts a process into it.
    pub fn add(&self, pid: i32) {
        self.write("cgroup.procs", &pid.to_string());
    }

    /// From here on there are no more threads, or processes.
    pub fn fill(&self) {
        self.write("pids.max", "1");
    }

    /// There are some again.
    pub fn release(&self) {
        self.write("pids.max", "max");
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap_or_else(|e| panic!("{file}: {e}"));
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
