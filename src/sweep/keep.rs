//! What stays on the disk of a run that has ended: the best one's model, and everyone's log.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::train::checkpoint::Folder;
use crate::{Result, files};

/// Moves a run's model to `best`, with a copy of its log and settings, whole or not at all. Nobody else writes to the folder
/// in which `best` stands.
///
/// # Errors
/// A file can't be written.
pub fn keep(run: &Path, best: &Path) -> Result<()> {
    let folder = files::folder_of(best);
    let whole = folder.join(format!("{}best", files::TEMPORARY));
    let moved = || -> std::io::Result<()> {
        std::fs::create_dir(&whole)?;
        for path in model_of(run)? {
            std::fs::rename(&path, whole.join(path.file_name().unwrap_or_default()))?;
        }
        let (from, to) = (Folder::of(run), Folder::of(&whole));
        std::fs::create_dir(to.path())?;
        for entry in from.path().read_dir()? {
            let entry = entry?;
            let is_weights = entry.path().extension().is_some_and(|extension| extension == "safetensors");
            if entry.file_type()?.is_file() && !is_weights {
                std::fs::copy(entry.path(), to.path().join(entry.file_name()))?;
            }
        }
        if best.exists() {
            std::fs::remove_dir_all(best)?;
        }
        std::fs::rename(&whole, best)?;
        files::sync_folder(folder)
    };
    moved().with_context(|| best.display().to_string())
}

/// Removes a run's model and weights; its log stays.
///
/// # Errors
/// A file can't be removed.
pub fn clear(run: &Path) -> Result<()> {
    let removed = || -> std::io::Result<()> {
        for path in model_of(run)? {
            match path.is_dir() {
                true => std::fs::remove_dir_all(&path)?,
                false => std::fs::remove_file(&path)?,
            }
        }
        Ok(())
    };
    removed().with_context(|| run.display().to_string())?;
    Folder::of(run).drop_weights()
}

/// All that stands in a run's directory beside `training/`.
fn model_of(run: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match run.read_dir() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    let training = Folder::of(run);
    Ok(paths.into_iter().filter(|path| path != training.path()).collect())
}
