//! File systems of a test's own.
#![allow(clippy::print_stdout)] // A skip is said.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A tmpfs; needs root.
pub struct Mount(pub PathBuf);

impl Mount {
    /// `None`, and said: it cannot be mounted here.
    pub fn new(at: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(at);
        let ok = mount.status().is_ok_and(|s| s.success());
        if !ok {
            println!("NOT TESTED: mounting a tmpfs needs root");
        }
        ok.then(|| Self(at.into()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
