//! The token by which an agent of tenants knows this process: a file that the cluster keeps up to date.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use crate::error::{Doing, Error, Result};

/// Where a pod has it that says nothing else.
const FILE: &str = "/var/run/secrets/tierkeep/token";

/// A service account's token has one or two kilobytes.
const BYTES_MAX: u64 = 64 << 10;

/// `TIERKEEP_TOKEN_FILE`; else the usual place, where there is one.
#[must_use]
pub fn token_file() -> Option<PathBuf> {
    let named = std::env::var_os("TIERKEEP_TOKEN_FILE").filter(|value| !value.is_empty());
    named.map(PathBuf::from).or_else(|| Some(FILE.into()).filter(|path: &PathBuf| path.exists()))
}

/// What it has now: it is replaced long before it ends.
///
/// # Errors
/// It cannot be read, or is no token.
pub(super) fn read(file: Option<&Path>) -> Result<String> {
    let Some(file) = file else { return Ok(String::new()) };
    let mut text = String::new();
    let opened = std::fs::File::open(file).at("read the token in", file)?;
    opened.take(BYTES_MAX + 1).read_to_string(&mut text).at("read the token in", file)?;
    let token = text.trim();
    if token.is_empty() || token.len() as u64 > BYTES_MAX {
        let why = format!("{} (TIERKEEP_TOKEN_FILE) has no token", file.display());
        return Err(Error::invalid(why));
    }
    Ok(token.into())
}
