//! A run's state on disk: the parameters that it trains, optimizer and progress, whole or not at all.
//!
//! There is no generator to save: the order of the examples is a function of (seed, epoch) and every dropout
//! mask one of (seed, step, place), so the number of steps says where both stand; and of a stream the number of the buffer.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ema::Ema;
use super::events;
use super::optimizer::AdamW;
use super::supply::Buffer;
use crate::checkpoint::{self, Weights};
use crate::eager::{Params, Trainable};
use crate::task::{Measured, Metrics};
use crate::{Result, files, unusable};

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken. With the settings it says the epoch and the place in the data.
    pub step: usize,
    /// Tokens computed.
    pub tokens: u64,
    /// The sum of the steps' losses.
    pub loss_sum: f64,
    /// Seconds spent, without what came before an interruption's checkpoint.
    pub seconds: f64,
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub evaluations_without_gain: usize,
    /// Whether the evaluation that is due behind this step was not made: a signal has ended it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unmeasured: bool,
    /// Where a stream stands; see [`super::supply`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer: Option<Buffer>,
}

/// The best evaluation so far; its weights stand in `best-NNNNNNNN.safetensors`, by its step. Where the metric that
/// decides was never a number, the last evaluation, without weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: usize,
    #[serde(deserialize_with = "metrics")]
    pub metrics: Metrics,
    /// What else was measured; see [`Measured`].
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

impl Best {
    /// The value of a metric, if it is a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.metrics.get(name).copied().filter(|value| value.is_finite())
    }

    /// All that was measured.
    pub fn measured(&self) -> Measured {
        Measured { metrics: self.metrics.clone(), details: self.details.clone() }
    }
}

/// Reads metrics; JSON has null for what is not a number.
fn metrics<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Metrics, D::Error> {
    let read = std::collections::BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(read.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// `training/` of an output directory.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder for an output directory.
    pub fn of(output: &Path) -> Self {
        Self { path: output.join("training") }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The settings that the run was started with; a directory that has them is one of ours.
    pub fn settings(&self) -> PathBuf {
        self.path.join("settings.toml")
    }

    /// A JSON line a step and an evaluation.
    pub fn log(&self) -> PathBuf {
        self.path.join("log.jsonl")
    }

    /// A JSON line for each step that was audited.
    pub fn audit(&self) -> PathBuf {
        self.path.join("audit.jsonl")
    }

    /// The step that was not taken because its loss or a gradient was not finite.
    pub fn not_finite(&self) -> PathBuf {
        self.path.join("not_finite.json")
    }

    /// Sha-256 of each input.
    pub fn inputs(&self) -> PathBuf {
        self.path.join("inputs.json")
    }

    /// Makes the folder, where a link leads if it is one, for this process alone until the result is dropped. What
    /// processes that were killed left half-written is removed.
    ///
    /// # Errors
    /// Unusable: another process trains here, or it can't be written.
    pub fn occupy(&self) -> Result<Option<std::fs::File>> {
        let unwritable = |e: std::io::Error| unusable!("{} can't be written: {e}", self.path.display());
        files::create_folder(&self.path).map_err(unwritable)?;
        let held = files::try_lock(&self.path)?;
        files::sweep(&self.path).map_err(unwritable)?;
        if self.checkpoints().is_dir() {
            files::sweep(&self.checkpoints()).map_err(unwritable)?;
        }
        Ok(held)
    }

    /// Removes what an earlier run wrote, and nothing else; its settings, which say that the folder is one of ours, are
    /// to be replaced.
    pub fn clear(&self) -> Result<()> {
        for path in [self.inputs(), self.log(), self.audit(), self.not_finite()] {
            remove_file(&path)?;
        }
        events::written(&self.path)?.iter().try_for_each(|path| remove_file(path))?;
        self.drop_weights()
    }

    /// Writes the weights of the evaluation behind `step`, the best one so far.
    pub fn save_best(&self, step: usize, params: &Params) -> Result<()> {
        params.save_trainable(&self.best(step))
    }

    /// Drops the weights of best evaluations but for those of these steps.
    pub fn keep_best(&self, steps: &[usize]) -> Result<()> {
        self.bests(steps)?.iter().try_for_each(|path| remove_file(path))
    }

    /// Drops all weights, of a run that nobody goes on with; its logs stay.
    ///
    /// # Errors
    /// A file can't be removed.
    pub fn drop_weights(&self) -> Result<()> {
        self.keep_best(&[])?;
        self.list()?.iter().try_for_each(|path| remove_dir(path))
    }

    fn best(&self, step: usize) -> PathBuf {
        self.path.join(format!("best-{step:08}.safetensors"))
    }

    /// The weights of best evaluations but for those of these steps.
    fn bests(&self, but: &[usize]) -> Result<Vec<PathBuf>> {
        let step = |name: &str| name.strip_prefix("best-")?.strip_suffix(".safetensors")?.parse().ok();
        let found = numbered(&self.path, step, |step| self.best(step))?;
        Ok(found.into_iter().filter(|(step, _)| !but.contains(step)).map(|(_, path)| path).collect())
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The folder of a checkpoint.
    pub fn checkpoint(&self, step: usize) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}"))
    }

    /// Writes a checkpoint, and once it is on the disk drops all but the newest `keep`.
    pub fn save(
        &self,
        progress: &Progress,
        params: &Params,
        optimizer: &AdamW,
        ema: Option<&Ema>,
        keep: usize,
    ) -> Result<()> {
        let (folder, path) = (self.checkpoints(), self.checkpoint(progress.step));
        let place = || path.display().to_string();
        if !folder.is_dir() {
            files::create_folder(&folder).with_context(place)?;
            files::sync_folder(&self.path).with_context(place)?;
        }
        let temporary = tempfile::Builder::new().prefix(files::TEMPORARY).tempdir_in(&folder)?;
        let written = temporary.path();
        params.save_trainable(&written.join("model.safetensors"))?;
        save_optimizer(&written.join("optimizer.safetensors"), params, optimizer)?;
        if let Some(ema) = ema {
            save_averages(&written.join("ema.safetensors"), params, ema)?;
        }
        files::write(&written.join("progress.json"), serde_json::to_string_pretty(progress)?)?;
        remove_dir(&path)?;
        std::fs::rename(written, &path).with_context(place)?;
        let _ = temporary.keep(); // the name is gone
        files::sync_folder(&folder).with_context(place)?;
        let all = self.list()?;
        for old in &all[..all.len().saturating_sub(keep)] {
            remove_dir(old)?;
        }
        Ok(())
    }

    /// Goes back to the newest checkpoint. Returns none where there is none yet.
    ///
    /// # Errors
    /// It can't be read, or is not of the step that its name says.
    pub fn restore(
        &self,
        params: &Params,
        optimizer: &mut AdamW,
        ema: Option<&mut Ema>,
    ) -> Result<Option<Progress>> {
        let Some(path) = self.list()?.pop() else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path.join("progress.json"))
            .with_context(|| path.display().to_string())?;
        let progress: Progress = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        anyhow::ensure!(
            path == self.checkpoint(progress.step),
            "{}: its progress.json is of step {}: remove it, and an older one is gone on with",
            path.display(),
            progress.step
        );
        let weights = Weights::open_file(&path.join("model.safetensors"))?;
        params.set_values(&read_all(&weights, params, "")?)?;
        let state = Weights::open_file(&path.join("optimizer.safetensors"))?;
        let means = read_all(&state, params, "exp_avg.")?;
        let squares = read_all(&state, params, "exp_avg_sq.")?;
        optimizer.restore(progress.step, means.into_iter().zip(squares).collect())?;
        if let Some(ema) = ema {
            let averages = Weights::open_file(&path.join("ema.safetensors"))?;
            ema.restore(params, read_all(&averages, params, "")?)?;
        }
        Ok(Some(progress))
    }

    /// Takes the weights of the best evaluation, which was made behind `step`.
    pub fn restore_best(&self, step: usize, params: &Params) -> Result<()> {
        params.set_values(&read_all(&Weights::open_file(&self.best(step))?, params, "")?)
    }

    /// Whole checkpoints, the oldest first.
    fn list(&self) -> Result<Vec<PathBuf>> {
        let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
        let found = numbered(&self.checkpoints(), step, |step| self.checkpoint(step))?;
        Ok(found.into_iter().map(|(_, path)| path).filter(|path| path.is_dir()).collect())
    }
}

/// The names of what stands in a folder; none where there is no such folder.
///
/// # Errors
/// The folder can't be read.
pub(super) fn names_in(folder: &Path) -> Result<Vec<OsString>> {
    let place = || folder.display().to_string();
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(place)?,
    };
    entries.map(|entry| Ok(entry.with_context(place)?.file_name())).collect()
}

/// What stands in a folder under the names that `path` gives numbers, by number; others' files are none of it.
fn numbered(
    folder: &Path,
    number: impl Fn(&str) -> Option<usize>,
    path: impl Fn(usize) -> PathBuf,
) -> Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    for name in names_in(folder)? {
        if let Some(number) = name.to_str().and_then(&number)
            && path(number) == folder.join(&name)
        {
            found.push((number, path(number)));
        }
    }
    found.sort();
    Ok(found)
}

/// The optimizer's state under PyTorch's names: `exp_avg.NAME` and `exp_avg_sq.NAME`.
fn save_optimizer(path: &Path, params: &Params, optimizer: &AdamW) -> Result<()> {
    let state = optimizer.state()?;
    let mut named = Vec::new();
    for (Trainable { param, .. }, (mean, square)) in params.trainable().zip(&state) {
        named.push((format!("exp_avg.{}", param.name), param.shape.as_slice(), mean.as_slice()));
        named.push((format!("exp_avg_sq.{}", param.name), param.shape.as_slice(), square.as_slice()));
    }
    checkpoint::write_safetensors(
        path,
        named.iter().map(|(name, shape, values)| (name.as_str(), *shape, *values)),
    )
}

/// The averages of the weights, under the names of these.
fn save_averages(path: &Path, params: &Params, ema: &Ema) -> Result<()> {
    let averages = ema.values()?;
    let named = params.trainable().zip(&averages);
    checkpoint::write_safetensors(
        path,
        named.map(|(own, values)| (own.param.name.as_str(), own.param.shape.as_slice(), values.as_slice())),
    )
}

fn read_all(weights: &Weights, params: &Params, prefix: &str) -> Result<Vec<Vec<f32>>> {
    params
        .trainable()
        .map(|Trainable { param, .. }| Ok(weights.f32(&format!("{prefix}{}", param.name))?.into_owned()))
        .collect()
}

fn remove_dir(path: &Path) -> Result<()> {
    removed(std::fs::remove_dir_all(path), path)
}

fn remove_file(path: &Path) -> Result<()> {
    removed(std::fs::remove_file(path), path)
}

/// What was not there is removed as well.
fn removed(done: std::io::Result<()>, path: &Path) -> Result<()> {
    match done {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        done => done.with_context(|| path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &Path) -> Folder {
        let folder = Folder::of(dir);
        for step in [7, 100_000_000, 20] {
            std::fs::create_dir_all(folder.checkpoint(step)).unwrap();
        }
        folder
    }

    #[test]
    fn only_checkpoints_by_their_steps_are_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        let steps = || -> Vec<String> {
            let names = folder.list().unwrap();
            names.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        let wanted = ["step-00000007", "step-00000020", "step-100000000"];
        assert_eq!(steps(), wanted);
        for other in ["step-9", "step-+0000009", "step-00000009.tmp", "my-notes", "zzz", "step-"] {
            std::fs::create_dir(folder.checkpoints().join(other)).unwrap();
        }
        std::fs::write(folder.checkpoints().join("step-00000030"), "a file").unwrap();
        assert_eq!(steps(), wanted);

        // and nobody else's file goes when a run is begun anew
        std::fs::write(folder.path().join("thesis.txt"), "years").unwrap();
        std::fs::write(folder.path().join("best-of.safetensors"), "mine").unwrap();
        std::fs::write(folder.best(9), "").unwrap();
        folder.clear().unwrap();
        assert_eq!(steps(), [""; 0]);
        assert_eq!(folder.checkpoints().read_dir().unwrap().count(), 7);
        assert!(
            folder.path().join("thesis.txt").exists() && folder.path().join("best-of.safetensors").exists()
        );
        assert!(!folder.best(9).exists());
    }

    #[test]
    fn metrics_that_are_no_numbers_read_back() {
        let metrics = [("mse", 2.0), ("pearson", f64::NAN), ("loss", f64::INFINITY)];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        let progress =
            Progress { best: Some(Best { step: 3, metrics, details: Map::new() }), ..Default::default() };
        let text = serde_json::to_string(&progress).unwrap();
        let read = serde_json::from_str::<Progress>(&text).unwrap().best.unwrap();
        assert_eq!((read.step, read.number("mse"), read.metrics.len()), (3, Some(2.0), 3));
        assert_eq!((read.number("pearson"), read.number("loss"), read.number("other")), (None, None, None));
    }

    #[test]
    fn best_weights_go_when_no_state_speaks_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        for step in [1, 2, 3] {
            std::fs::write(folder.best(step), "").unwrap();
        }
        folder.keep_best(&[1, 3]).unwrap();
        assert_eq!([1, 2, 3].map(|step| folder.best(step).exists()), [true, false, true]);
    }

    #[test]
    fn what_a_killed_run_left_half_written_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        let left = [folder.path().join(".tk-abc.tmp"), folder.checkpoints().join(".tk-def")];
        std::fs::write(&left[0], "").unwrap();
        std::fs::create_dir(&left[1]).unwrap();
        let _held = folder.occupy().unwrap();
        assert!(left.iter().all(|path| !path.exists()));
        assert_eq!(folder.list().unwrap().len(), 3);
    }
}
