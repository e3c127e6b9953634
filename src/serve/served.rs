//! The graph that a model directory serves: where it lies, and that it is the trained model's.

use std::path::{Path, PathBuf};

use crate::onnx::{Precision, model};
use crate::saved::Saved;
use crate::{Result, bail_unusable};

/// Where `tk export` writes the graph of a model directory.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("onnx").join("model.onnx")
}

/// Where it writes the graph that generates.
pub fn generating(dir: &Path, precision: Precision) -> PathBuf {
    dir.join("onnx").join(match precision {
        Precision::Fp32 => "generate.onnx".to_owned(),
        other => format!("generate_{other}.onnx"),
    })
}

/// The exported graph that generates, held against the weights beside it.
///
/// # Errors
/// As [`checked`].
pub fn checked_generating(saved: &Saved, precision: Precision) -> Result<PathBuf> {
    let path = generating(&saved.dir, precision);
    if !path.is_file() {
        bail_unusable!(
            "{} is not there: run `tk export {}{}` first",
            path.display(),
            saved.dir.display(),
            if precision == Precision::Fp32 { String::new() } else { format!(" --precision {precision}") }
        );
    }
    check_fresh(saved, &path)?;
    Ok(path)
}

/// The exported graph of a trained model, held against the weights beside it.
///
/// # Errors
/// Unusable: there is none, or the model was trained on since it was exported.
pub fn checked(saved: &Saved) -> Result<PathBuf> {
    let path = path(&saved.dir);
    if !path.is_file() {
        bail_unusable!("{} is not there: run `tk export {}` first", path.display(), saved.dir.display());
    }
    check_fresh(saved, &path)?;
    Ok(path)
}

/// Holds a graph's metadata against the directory that it lies in.
///
/// # Errors
/// Unusable: the graph is not of these weights or this tokenizer, or says nothing of them.
pub fn check_fresh(saved: &Saved, path: &Path) -> Result<()> {
    let metadata = crate::onnx::write::metadata(path)?;
    let weights = model::weights_sha256(&saved.config, &saved.task, &saved.weights)?;
    for (key, what, wanted) in [
        ("weights_sha256", "weights", weights.as_str()),
        ("tokenizer_sha256", "tokenizer", saved.tokenizer.hash()),
    ] {
        match metadata.get(key) {
            Some(found) if found == wanted => {}
            Some(_) => bail_unusable!(
                "{} is stale: it was exported from other {what} than {} has now; run `tk export {}` again",
                path.display(),
                saved.dir.display(),
                saved.dir.display()
            ),
            None => bail_unusable!(
                "{} does not say which {what} it was exported from ({key} is missing): run `tk export {}`",
                path.display(),
                saved.dir.display()
            ),
        }
    }
    Ok(())
}
