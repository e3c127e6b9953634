//! Files that are either whole or not there: written beside their name and renamed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::{Result, bail_unusable};

/// Lets `write` fill a temporary file beside `path`, then renames it to `path`.
/// When `write` fails, neither name is left changed.
pub fn write_through_rename(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = beside(path, "tmp");
    let written = write(&temporary)
        .and_then(|()| Ok(std::fs::File::open(&temporary)?.sync_all()?))
        .and_then(|()| Ok(std::fs::rename(&temporary, path)?));
    if written.is_err() {
        // the first error is the one to report
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

/// Writes `bytes` to `path` through a rename.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_through_rename(path, |temporary| Ok(std::fs::write(temporary, bytes)?))
}

/// `path` with `.extension` appended to its name.
pub fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.file_name().map(OsString::from).unwrap_or_default();
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}

/// Checks, before any work is done, that a file can stand at `target`.
///
/// # Errors
/// Unusable: it is a directory, or its folder is not there.
pub fn check_place(target: &Path) -> Result<()> {
    if target.is_dir() {
        bail_unusable!("{} is a directory; a file was expected", target.display());
    }
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        bail_unusable!("{}: the folder {} is not there", target.display(), folder.display());
    }
    Ok(())
}
