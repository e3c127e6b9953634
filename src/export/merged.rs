//! An adapter's model, merged: the proof that it computes what base and adapter compute apart, and the whole of it as a
//! folder for those who know no adapters.

use std::path::Path;

use candle_core::Device;

use super::records;
use crate::checkpoint::{adapter, write_safetensors};
use crate::eager::Evaluator;
use crate::parity::TOLERANCE;
use crate::saved::{Saved, tokenizer_folder};
use crate::task::Task;
use crate::{Result, bail_unusable, files, unusable};

/// The largest difference between the merged model's outputs and those of base and adapter, on the built-in records; none
/// where the folder holds no adapter.
///
/// # Errors
/// They differ by more than parity's tolerance, beside the largest number.
pub fn prove(saved: &Saved) -> Result<Option<f32>> {
    if !adapter::is_in(&saved.dir) {
        return Ok(None);
    }
    let encodings = records(saved)?;
    let merged = Evaluator::open(saved, &Device::Cpu)?.outputs(&encodings)?;
    let apart = Evaluator::apart(saved, &Device::Cpu)?.outputs(&encodings)?;
    let (mut worst, mut largest) = (0.0f32, 1.0f32);
    for (merged, apart) in merged.iter().flatten().zip(apart.iter().flatten()) {
        for (a, b) in merged.iter().zip(apart) {
            let difference = (a - b).abs();
            worst = if difference.is_nan() { f32::INFINITY } else { worst.max(difference) };
            largest = largest.max(b.abs());
        }
    }
    anyhow::ensure!(
        worst <= TOLERANCE * largest,
        "merged into its base the adapter gives other outputs than beside it, by up to {worst:e} of numbers up to \
         {largest}: nothing is exported"
    );
    Ok(Some(worst))
}

/// Writes the merged model as transformers and tk read it.
///
/// # Errors
/// Unusable: the folder holds no adapter, or the target is not empty. A file can't be written.
pub fn write(saved: &Saved, to: &Path) -> Result<f32> {
    let Some(worst) = prove(saved)? else {
        bail_unusable!("{} holds no adapter, so there is nothing to merge", saved.dir.display());
    };
    let unwritable = |e: std::io::Error| unusable!("--merged {}: {e}", to.display());
    if to.exists() && (!to.is_dir() || to.read_dir().map_err(unwritable)?.next().is_some()) {
        bail_unusable!("--merged {} is there already: name a new or an empty directory", to.display());
    }
    files::create_folder(to).map_err(unwritable)?;
    saved.tokenizer.save(&tokenizer_folder(&saved.dir)?, to)?;
    for name in Task::files() {
        let (from, target) = (saved.dir.join(name), to.join(name));
        if from.is_file() {
            target.parent().map_or(Ok(()), files::create_folder).map_err(unwritable)?;
            std::fs::copy(&from, &target).map_err(unwritable)?;
        }
    }
    files::write(&to.join("config.json"), serde_json::to_string_pretty(&saved.config.raw)? + "\n")?;
    let params = saved.task.params(&saved.config.family)?;
    let values = params.iter().map(|param| saved.weights.f32(&param.name)).collect::<Result<Vec<_>>>()?;
    let tensors = params.iter().zip(&values);
    write_safetensors(
        &to.join("model.safetensors"),
        tensors.map(|(param, values)| (param.name.as_str(), &param.shape[..], values.as_ref())),
    )?;
    Ok(worst)
}
