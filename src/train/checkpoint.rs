//! A run's state on disk: parameters, optimizer and progress, whole or not at all.
//!
//! There is no generator to save: the order of the examples is a function of (seed, epoch) and every dropout
//! mask one of (seed, step, place), so the number of steps says where both stand.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::optimizer::AdamW;
use crate::checkpoint::{self, Weights};
use crate::eager::Params;
use crate::task::Metrics;
use crate::{Result, files};

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
}

/// The best evaluation so far; its weights stand in `best.safetensors`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: usize,
    pub metrics: Metrics,
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

    /// The weights of the best evaluation.
    pub fn best(&self) -> PathBuf {
        self.path.join("best.safetensors")
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Writes a checkpoint and drops all but the newest `keep`.
    pub fn save(&self, progress: &Progress, params: &Params, optimizer: &AdamW, keep: usize) -> Result<()> {
        let path = self.checkpoints().join(format!("step-{:08}", progress.step));
        let temporary = files::beside(&path, "tmp");
        remove_dir(&temporary)?;
        std::fs::create_dir_all(&temporary).with_context(|| temporary.display().to_string())?;
        params.save(&temporary.join("model.safetensors"))?;
        save_optimizer(&temporary.join("optimizer.safetensors"), params, optimizer)?;
        files::write(&temporary.join("progress.json"), serde_json::to_string_pretty(progress)?)?;
        remove_dir(&path)?;
        std::fs::rename(&temporary, &path).with_context(|| path.display().to_string())?;
        let all = self.list()?;
        for old in &all[..all.len().saturating_sub(keep)] {
            remove_dir(old)?;
        }
        Ok(())
    }

    /// Goes back to the newest checkpoint. Returns none where there is none yet.
    pub fn restore(&self, params: &Params, optimizer: &mut AdamW) -> Result<Option<Progress>> {
        let Some(path) = self.list()?.pop() else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path.join("progress.json"))
            .with_context(|| path.display().to_string())?;
        let progress: Progress = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let weights = Weights::open_file(&path.join("model.safetensors"))?;
        params.set_values(&read_all(&weights, params, "")?)?;
        let state = Weights::open_file(&path.join("optimizer.safetensors"))?;
        let means = read_all(&state, params, "exp_avg.")?;
        let squares = read_all(&state, params, "exp_avg_sq.")?;
        optimizer.restore(progress.step, means.into_iter().zip(squares).collect())?;
        Ok(Some(progress))
    }

    /// Takes the weights of the best evaluation.
    pub fn restore_best(&self, params: &Params) -> Result<()> {
        params.set_values(&read_all(&Weights::open_file(&self.best())?, params, "")?)
    }

    /// Whole checkpoints, the oldest first.
    fn list(&self) -> Result<Vec<PathBuf>> {
        let Ok(entries) = std::fs::read_dir(self.checkpoints()) else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_none() {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The optimizer's state under PyTorch's names: `exp_avg.NAME` and `exp_avg_sq.NAME`.
fn save_optimizer(path: &Path, params: &Params, optimizer: &AdamW) -> Result<()> {
    let state = optimizer.state()?;
    let mut named = Vec::new();
    for ((param, _), (mean, square)) in params.iter().zip(&state) {
        named.push((format!("exp_avg.{}", param.name), param.shape.as_slice(), mean.as_slice()));
        named.push((format!("exp_avg_sq.{}", param.name), param.shape.as_slice(), square.as_slice()));
    }
    checkpoint::write_safetensors(
        path,
        named.iter().map(|(name, shape, values)| (name.as_str(), *shape, *values)),
    )
}

fn read_all(weights: &Weights, params: &Params, prefix: &str) -> Result<Vec<Vec<f32>>> {
    params
        .iter()
        .map(|(param, _)| Ok(weights.f32(&format!("{prefix}{}", param.name))?.into_owned()))
        .collect()
}

fn remove_dir(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}
