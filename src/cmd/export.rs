//! `tk export`: a trained model → `onnx/model.onnx` beside it, once ONNX Runtime has given the same logits.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::json;

use crate::onnx::write::{self, Scratch};
use crate::onnx::{DEFAULT_OPSET, checked_opset, model};
use crate::parity::{self, Compared, Runtime, Subject, decoding, inputs, report};
use crate::runtime::{Provider, library};
use crate::saved::Saved;
use crate::say::Say;
use crate::serve::served;
use crate::task::Form;
use crate::{Result, bail_unusable, checkpoint, files, unusable};

/// Write a trained model as ONNX, and verify it: ONNX Runtime must give the trained model's logits.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory; DIR/onnx/ is written.
    dir: PathBuf,
    /// The numbers that the graph computes in.
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// The version of ONNX's operators: 13 to 21.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_OPSET)]
    opset: i64,
    /// Write the weights beside the graph, into model.onnx_data; always done above 1.9 GB.
    #[arg(long)]
    external_data: bool,
}

/// What a graph computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    Fp32,
}

/// Builds, writes under a temporary name, verifies, and only then puts the graph in place.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let opset = checked_opset(args.opset)?;
    let Precision::Fp32 = args.precision;
    let saved = Saved::open(&args.dir)?;
    library::library()?; // nothing is written that can't be verified
    let target = served::path(&args.dir);
    let folder = target.parent().context("the graph has no folder")?;
    if folder.exists() && !folder.is_dir() {
        bail_unusable!("{} is no directory, and the graph belongs there: move it away", folder.display());
    }

    let graph = model::build(&saved.config, &saved.task, &saved.weights, saved.tokenizer.hash(), opset)?;
    let weights_sha256 = model::metadata(&graph, "weights_sha256").unwrap_or_default().to_owned();
    let scratch =
        Scratch::new(&args.dir).map_err(|e| unusable!("{}: can't write: {e:#}", args.dir.display()))?;
    let written = scratch.path().join("model.onnx");
    let external = write::save(graph, &written, args.external_data)?;
    say.detail(format!("verifying {}", written.display()));
    let compared = verify(&saved, &written)?;

    std::fs::create_dir_all(folder).map_err(|e| unusable!("{}: {e}", folder.display()))?;
    let data = write::data_path(&target);
    if external {
        // a graph that was killed here has no weights, never another export's
        remove(&target)?;
        std::fs::rename(write::data_path(&written), &data).with_context(|| data.display().to_string())?;
    }
    std::fs::rename(&written, &target).with_context(|| target.display().to_string())?;
    if !external {
        remove(&data)?;
    }
    let mut manifest = json!({
        "file": "model.onnx",
        "sha256": checkpoint::file_hash(&target)?,
        "weights_sha256": weights_sha256,
        "opset": opset,
        "precision": "fp32",
        "max_abs": compared.max_abs,
        "tk_version": env!("CARGO_PKG_VERSION"),
    });
    if external {
        manifest["data_file"] = json!("model.onnx_data");
        manifest["data_sha256"] = json!(checkpoint::file_hash(&data)?);
    }
    files::write(&folder.join("manifest.json"), format!("{manifest:#}\n"))?;

    let bytes = |path: &Path| std::fs::metadata(path).map(|file| file.len()).unwrap_or_default();
    let size = bytes(&target) + if external { bytes(&data) } else { 0 };
    let human = format!(
        "{}: opset {opset}, {:.1} MB, the logits of {} {} within {:.1e} of the trained model's",
        target.display(),
        size as f64 / 1e6,
        compared.records,
        match saved.task.form() {
            Form::Whole => "records",
            Form::Cached => "tokens, behind a past and without,",
        },
        compared.max_abs
    );
    manifest["path"] = json!(target);
    manifest["bytes"] = json!(size);
    manifest["records"] = json!(compared.records);
    say.result(human, &manifest)
}

/// Runs the built-in records through candle and through the written file.
///
/// # Errors
/// The logits differ by more than the tolerance, or are not finite.
fn verify(saved: &Saved, graph: &Path) -> Result<Compared> {
    let encodings = saved.tokenizer.encode_all(&inputs::builtin(saved)?, saved.max_length)?;
    let compared = match saved.task.form() {
        Form::Whole => {
            let subject = Subject { saved, graph, encodings: &encodings };
            let runtimes = [Runtime::Eager, Runtime::Ort(Provider::Cpu)];
            parity::run(&subject, &runtimes, parity::TOLERANCE)?.remove(0)
        }
        Form::Cached => {
            let texts = decoding::few(&encodings);
            decoding::run(saved, graph, &texts, Provider::Cpu, parity::TOLERANCE)?
        }
    };
    if !compared.pass {
        anyhow::bail!(
            "the exported graph does not give the trained model's logits, so none is left behind:\n{}",
            report::table(&[compared])
        );
    }
    Ok(compared)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}
