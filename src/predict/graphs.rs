//! The graph that a model directory serves: where it lies, and that it is the trained model's.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::vouched;
use crate::onnx::{Precision, model};
use crate::saved::Saved;
use crate::task::Form;
use crate::{Result, bail_unusable};

/// Where `tk export` writes the graphs of a model directory.
pub fn folder(dir: &Path) -> PathBuf {
    dir.join("onnx")
}

/// Where it writes the graph that every runtime reads.
pub fn path(dir: &Path) -> PathBuf {
    folder(dir).join("model.onnx")
}

/// Where it writes the graph that CUDA runs, with ONNX Runtime's own attention.
pub fn optimized(dir: &Path) -> PathBuf {
    folder(dir).join("model_optimized.onnx")
}

/// The graph that CUDA runs in place of the one that every provider runs, where it was exported, held against the weights
/// beside it.
///
/// # Errors
/// Unusable: the model was trained on since it was exported, or the graph is another file now.
pub fn checked_optimized(saved: &Saved) -> Result<Option<PathBuf>> {
    let path = optimized(&saved.dir);
    if !path.is_file() {
        return Ok(None);
    }
    whole(saved, path, Precision::Fp32).map(Some)
}

/// Where it writes the graph of whole sequences in this precision; the names are those of the ecosystem.
pub fn in_precision(dir: &Path, precision: Precision) -> PathBuf {
    match precision.stored() {
        Precision::Fp32 => path(dir),
        Precision::Int8 => folder(dir).join("model_quantized.onnx"),
        other => folder(dir).join(format!("model_{other}.onnx")),
    }
}

/// Removes the graphs of a model directory, which is about to hold another model: every ONNX file, its weights and the
/// manifest. The folder itself goes if nothing else is in it, and if it is neither a link nor a file system of its own.
pub fn remove(dir: &Path) -> Result<()> {
    let folder = folder(dir);
    let place = || folder.display().to_string();
    let entries = match std::fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(place)?,
    };
    for entry in entries {
        let path = entry.with_context(place)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".onnx") || name.contains(".onnx_data") || name == vouched::MANIFEST {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    // a folder that has to stay, for one of these reasons
    let _ = std::fs::remove_dir(&folder);
    Ok(())
}

/// Where it writes the graph that generates.
pub fn generating(dir: &Path, precision: Precision) -> PathBuf {
    folder(dir).join(match precision {
        Precision::Fp32 => "generate.onnx".to_owned(),
        other => format!("generate_{other}.onnx"),
    })
}

/// The exported graph that generates, held against the weights beside it.
///
/// # Errors
/// As [`checked`].
pub fn checked_generating(saved: &Saved, precision: Precision) -> Result<PathBuf> {
    check_precision(saved, precision)?;
    whole(saved, generating(&saved.dir, precision), precision)
}

/// The exported graph of a trained model in this precision, held against the weights beside it.
///
/// # Errors
/// Unusable: there is none, or the model was trained on since it was exported, or the graph is another file now; or its
/// task has no such precision.
pub fn checked(saved: &Saved, precision: Precision) -> Result<PathBuf> {
    check_precision(saved, precision)?;
    whole(saved, in_precision(&saved.dir, precision), precision)
}

/// The same whatever the graph computes, for who holds that against the trained model.
///
/// # Errors
/// As [`checked`], but that the file may be another one.
pub fn fresh(saved: &Saved, precision: Precision) -> Result<PathBuf> {
    check_precision(saved, precision)?;
    let path = match saved.task.form() {
        Form::Whole => in_precision(&saved.dir, precision),
        Form::Cached | Form::InPlace => generating(&saved.dir, precision),
    };
    there_and_fresh(saved, path, precision)
}

/// How far a graph in fewer bits may be from the trained model: twice of what its export found, for processors round
/// differently.
///
/// # Errors
/// Unusable: the manifest beside it doesn't say.
pub fn tolerance(saved: &Saved, precision: Precision) -> Result<f32> {
    let path = folder(&saved.dir).join(vouched::MANIFEST);
    let manifest = std::fs::read(&path).ok();
    let manifest = manifest.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let key = if saved.task.form() == Form::Whole { "precisions" } else { "generate" };
    let found = manifest.and_then(|manifest| manifest[key][precision.name()]["max_abs"].as_f64());
    match found {
        Some(found) => Ok(2.0 * found as f32),
        None => bail_unusable!(
            "{} does not say how far {precision} may be from fp32: run `{}`, or give --tolerance",
            path.display(),
            export(saved, precision)
        ),
    }
}

/// Refuses a precision that graphs of the task are not exported in.
///
/// # Errors
/// Unusable: names those that there are.
pub fn check_precision(saved: &Saved, precision: Precision) -> Result<()> {
    let known: &[Precision] = match saved.task.form() {
        Form::Whole => &[Precision::Fp32, Precision::Fp16, Precision::Bf16, Precision::Int8],
        Form::Cached | Form::InPlace => &[Precision::Fp32, Precision::Fp16, Precision::Q8, Precision::Q4],
    };
    if !known.contains(&precision) {
        let known: Vec<&str> = known.iter().map(|precision| precision.name()).collect();
        bail_unusable!(
            "--precision {precision}: a {} model is exported in {}",
            saved.task.name(),
            known.join(", ")
        );
    }
    Ok(())
}

/// A graph that is there, fresh, and the file that was verified.
fn whole(saved: &Saved, path: PathBuf, precision: Precision) -> Result<PathBuf> {
    let path = there_and_fresh(saved, path, precision)?;
    vouched::check(&path)?;
    Ok(path)
}

fn there_and_fresh(saved: &Saved, path: PathBuf, precision: Precision) -> Result<PathBuf> {
    let precision = precision.stored();
    if !path.is_file() {
        bail_unusable!("{} is not there: run `{}` first", path.display(), export(saved, precision));
    }
    check_fresh(saved, &path, precision)?;
    Ok(path)
}

/// The command that exports this model in a precision.
pub fn export(saved: &Saved, precision: Precision) -> String {
    let task = if saved.task_was_asked { format!(" --task {}", saved.task.name()) } else { String::new() };
    let precision = match precision {
        Precision::Fp32 => String::new(),
        Precision::Bf16 => format!(" --precision {precision} --ep openvino"),
        _ => format!(" --precision {precision}"),
    };
    format!("tk export {}{task}{precision}", saved.dir.display())
}

/// Holds a graph's metadata against the directory that it lies in.
///
/// # Errors
/// Unusable: the graph is not of these weights, this tokenizer, configuration and task, or says nothing of them.
pub fn check_fresh(saved: &Saved, path: &Path, precision: Precision) -> Result<()> {
    let metadata = crate::onnx::write::metadata(path)?;
    let task = saved.task.name();
    if let Some(other) = metadata.get("task").filter(|found| *found != task) {
        bail_unusable!(
            "{} was exported for {other}, not for {task}: run `{}` again{}",
            path.display(),
            export(saved, precision),
            if saved.task_was_asked { String::new() } else { format!(", or give --task {other}") }
        );
    }
    let weights = model::weights_sha256(&saved.config, &saved.task, &saved.weights)?;
    let definition = model::definition_sha256(&saved.config, &saved.task)?;
    for (key, what, wanted) in [
        ("weights_sha256", "other weights", weights.as_str()),
        ("tokenizer_sha256", "another tokenizer", saved.tokenizer.hash()),
        ("definition_sha256", "another definition (config.json, or how it pools)", definition.as_str()),
    ] {
        match metadata.get(key) {
            Some(found) if found == wanted => {}
            Some(_) => bail_unusable!(
                "{} is stale: it was exported from {what} than {} has now; run `{}` again",
                path.display(),
                saved.dir.display(),
                export(saved, precision)
            ),
            None => bail_unusable!(
                "{} does not say what it was exported from ({key} is missing): run `{}` again",
                path.display(),
                export(saved, precision)
            ),
        }
    }
    Ok(())
}
