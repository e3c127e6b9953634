//! `tk export`: a trained model → `onnx/model.onnx` beside it, once ONNX Runtime has given the same logits.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::eager::Evaluator;
use crate::onnx::proto::ModelProto;
use crate::onnx::write::{self, Scratch};
use crate::onnx::{
    DEFAULT_BLOCK, DEFAULT_OPSET, Kind, LARGEST_BLOCK, LEAST_BLOCK, Precision, checked_opset, model,
};
use crate::parity::{self, Compared, Runtime, Subject, decoding, inputs, report};
use crate::predict::graphs;
use crate::runtime::{Provider, Slots, library};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Encoder, Form, RecordFlags, TrainingFlags};
use crate::{Result, bail_unusable, checkpoint, files, process, unusable};

/// The graph that every runtime reads.
const MODEL: &str = "model.onnx";
/// The graph that tk generates with.
const GENERATE: &str = "generate.onnx";

/// Write a trained model as ONNX, and verify it: ONNX Runtime must give the trained model's logits.
///
/// A language model becomes two graphs of one set of weights: model.onnx with past_key_values, which the ecosystem
/// reads, and generate.onnx, which tk generates with.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory; DIR/onnx/ is written.
    dir: PathBuf,
    /// The numbers that the matrices are stored in; q8 and q4 are for language models, as generate_q8.onnx and
    /// generate_q4.onnx.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// The version of ONNX's operators in model.onnx: 13 to 21.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_OPSET)]
    opset: i64,
    /// Write the weights beside the graph, into model.onnx_data; always done for a language model, whose two graphs
    /// share them, and above 1.9 GB.
    #[arg(long)]
    external_data: bool,
    /// Texts to measure q8 and q4 on, as records for `tk eval` [default: a few built-in pages of English].
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Numbers of q8's and q4's matrices that share a scale: 32, 64, 128 or 256. Larger blocks are faster, smaller
    /// ones closer to what was trained.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BLOCK)]
    block_size: usize,
    /// By how much q8 and q4 may raise the perplexity, as a share of it; more is an error.
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    max_perplexity_increase: f64,
    #[command(flatten)]
    records: RecordFlags,
}

/// Builds, writes under a temporary name, verifies, and only then puts the graphs in place.
pub fn run(args: &Args, say: Say) -> Result<()> {
    checked_opset(args.opset)?;
    let saved = Saved::open(&args.dir)?;
    check_usage(args, &saved)?;
    library::library()?; // nothing is written that can't be verified
    let folder = graphs::folder(&args.dir);
    if folder.exists() && !folder.is_dir() {
        bail_unusable!("{} is no directory, and the graph belongs there: move it away", folder.display());
    }
    let folder = files::behind_links(&folder).map_err(|e| unusable!("{}: {e}", folder.display()))?;
    // on the file system of the folder, which may be another one than DIR's, so that a rename puts a file in place
    let home = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(&args.dir);
    let scratch = Scratch::new(home).map_err(|e| unusable!("{}: can't write: {e:#}", home.display()))?;
    let place = Place { saved: &saved, folder: &folder, scratch: scratch.path(), say };
    place.read_manifest()?; // one that can't be read is told before the work
    if args.precision == Precision::Fp32 { as_trained(args, &place) } else { in_blocks(args, &place) }
}

fn check_usage(args: &Args, saved: &Saved) -> Result<()> {
    let language_model = saved.task.form() == Form::Cached;
    if args.precision != Precision::Fp32 && !language_model {
        bail_unusable!(
            "--precision {} is for language models; this is a {} model, which is exported in fp32",
            args.precision,
            saved.task.name()
        );
    }
    if args.precision == Precision::Fp32 && args.input.is_some() {
        bail_unusable!(
            "--input is what q8 and q4 are measured on: give --precision q8 or q4, or leave it out"
        );
    }
    let files: Vec<&Path> = args.input.iter().map(PathBuf::as_path).collect();
    args.records.check(saved.task.name(), &files)?;
    if !args.block_size.is_power_of_two() || !(LEAST_BLOCK..=LARGEST_BLOCK).contains(&args.block_size) {
        bail_unusable!("--block-size {}: expected 32, 64, 128 or 256", args.block_size);
    }
    if args.precision == Precision::Fp32 && args.block_size != DEFAULT_BLOCK {
        bail_unusable!("--block-size is for q8 and q4: give --precision q8 or q4, or leave it out");
    }
    if args.max_perplexity_increase.is_nan() || args.max_perplexity_increase < 0.0 {
        bail_unusable!(
            "--max-perplexity-increase {}: expected a number from 0 upwards",
            args.max_perplexity_increase
        );
    }
    Ok(())
}

/// What an export works with.
struct Place<'a> {
    saved: &'a Saved,
    /// DIR/onnx, or where it leads as a link.
    folder: &'a Path,
    /// Where files lie until they are verified.
    scratch: &'a Path,
    say: Say,
}

impl Place<'_> {
    fn build(&self, kind: Kind) -> Result<ModelProto> {
        let Saved { config, task, weights, tokenizer, .. } = self.saved;
        model::build(config, task, weights, tokenizer.hash(), kind)
    }

    /// What a manifest says of a file that is in place.
    fn entry(&self, file: &str, kind: Kind) -> Result<Map<String, Value>> {
        let path = self.folder.join(file);
        let entry = json!({
            "file": file,
            "sha256": checkpoint::file_hash(&path)?,
            "weights_sha256": write::metadata(&path)?.get("weights_sha256"),
            "opset": kind.opset,
            "precision": kind.precision.name(),
            "tk_version": env!("CARGO_PKG_VERSION"),
        });
        let Value::Object(entry) = entry else { anyhow::bail!("an entry is an object") };
        Ok(entry)
    }

    fn bytes(&self, file: &str) -> u64 {
        std::fs::metadata(self.folder.join(file)).map(|file| file.len()).unwrap_or_default()
    }

    fn manifest(&self) -> PathBuf {
        self.folder.join("manifest.json")
    }

    /// What the manifest in place says; empty where there is none.
    ///
    /// # Errors
    /// Unusable: it can't be read, or is no manifest.
    fn read_manifest(&self) -> Result<Map<String, Value>> {
        let place = self.manifest();
        let bytes = match std::fs::read(&place) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
            bytes => bytes.map_err(|e| unusable!("{}: {e}", place.display()))?,
        };
        let manifest: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|e| unusable!("{}: {e}: delete it", place.display()))?;
        match manifest.get("generate") {
            Some(other) if !other.is_object() => {
                bail_unusable!("{}: \"generate\" is {other}, expected an object: delete it", place.display())
            }
            _ => Ok(manifest),
        }
    }

    /// What the manifest says of the graphs that generate, whose files are there.
    fn generating(&self, manifest: &mut Map<String, Value>) -> Map<String, Value> {
        let Some(Value::Object(mut entries)) = manifest.remove("generate") else { return Map::new() };
        entries
            .retain(|_, entry| entry["file"].as_str().is_some_and(|file| self.folder.join(file).is_file()));
        entries
    }

    /// The folder, for this process alone until the result is dropped.
    fn locked(&self) -> Result<Option<std::fs::File>> {
        files::create_folder(self.folder)
            .and_then(|()| files::lock(self.folder))
            .map_err(|e| unusable!("{}: {e}", self.folder.display()))
    }
}

/// The graphs in fp32.
fn as_trained(args: &Args, place: &Place) -> Result<()> {
    let form = place.saved.task.form();
    let kind = Kind::fp32(form, args.opset);
    let (target, written) = (graphs::path(&place.saved.dir), place.scratch.join(MODEL));
    let external = write::save(place.build(kind)?, &written, args.external_data || form == Form::Cached)?;
    place.say.detail(format!("verifying {}", written.display()));
    let mut compared = vec![verify(place.saved, &written, form)?];
    let generating = graphs::generating(&place.saved.dir, Precision::Fp32);
    let generated = place.scratch.join(GENERATE);
    if form == Form::Cached {
        write::save_sharing(place.build(Kind::in_place(Precision::Fp32))?, &generated, &written)?;
        place.say.detail(format!("verifying {}", generated.display()));
        compared.push(verify(place.saved, &generated, Form::InPlace)?);
    }

    let _held = place.locked()?;
    let files: &[&str] = if form == Form::Cached { &[MODEL, GENERATE] } else { &[MODEL] };
    write::install(place.scratch, place.folder, files, external)?;
    let mut others = place.generating(&mut place.read_manifest()?);
    let mut manifest = place.entry(MODEL, kind)?;
    manifest.insert("max_abs".to_owned(), json!(compared[0].max_abs));
    let mut size = place.bytes(MODEL);
    if external {
        manifest.insert("data_file".to_owned(), json!("model.onnx_data"));
        let data = write::data_path(&place.folder.join(MODEL));
        manifest.insert("data_sha256".to_owned(), json!(checkpoint::file_hash(&data)?));
        size += place.bytes("model.onnx_data");
    }
    let mut also = String::new();
    if let Some(in_place) = compared.get(1) {
        let mut entry = place.entry(GENERATE, Kind::in_place(Precision::Fp32))?;
        entry.insert("max_abs".to_owned(), json!(in_place.max_abs));
        others.shift_insert(0, Precision::Fp32.name().to_owned(), Value::Object(entry));
        also = format!(
            "\n{}: the same weights, the logits of {} tokens within {:.1e}",
            generating.display(),
            in_place.records,
            in_place.max_abs
        );
    }
    if !others.is_empty() {
        manifest.insert("generate".to_owned(), Value::Object(others));
    }
    files::write(&place.manifest(), format!("{:#}\n", Value::Object(manifest.clone())))?;

    let human = format!(
        "{}: opset {}, {:.1} MB, the logits of {} {} within {:.1e} of the trained model's{also}",
        target.display(),
        args.opset,
        size as f64 / 1e6,
        compared[0].records,
        if form == Form::Whole { "records" } else { "tokens, behind a past and without," },
        compared[0].max_abs
    );
    manifest.insert("path".to_owned(), json!(target));
    manifest.insert("bytes".to_owned(), json!(size));
    manifest.insert("records".to_owned(), json!(compared[0].records));
    place.say.result(human, &manifest)
}

/// A language model's graph with its matrices in blocks of few bits, held against the trained model's perplexity.
fn in_blocks(args: &Args, place: &Place) -> Result<()> {
    let (saved, precision) = (place.saved, args.precision);
    let lm = saved.task.generating("export --precision")?;
    let (tokenizer, max_length) = (&saved.tokenizer, saved.max_length);
    let examples = match &args.input {
        Some(input) => {
            let (records, training) = (&args.records, &TrainingFlags::default());
            saved.task.examples(input, &Encoder { records, training, tokenizer, max_length })?
        }
        None => lm.builtin_examples(tokenizer, max_length)?,
    };
    let kind = Kind { block: args.block_size, ..Kind::in_place(precision) };
    let target = graphs::generating(&saved.dir, precision);
    let file = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let written = place.scratch.join(&file);
    let external = write::save(place.build(kind)?, &written, false)?;
    place.say.detail(format!("measuring {}", written.display()));
    let before = Evaluator::open(saved, &candle_core::Device::Cpu)?.measure(&examples)?.metrics["perplexity"];
    let threads = process::cores();
    let mut slots = Slots::open(&written, threads, place.say)?;
    let after = saved.task.measure_in_place(&mut slots, &examples)?.metrics["perplexity"];
    drop(slots);
    let increase = after / before - 1.0;
    let found =
        format!("perplexity {before:.3} in fp32, {after:.3} in {precision}: {:+.2} %", increase * 100.0);
    // not a number is too much as well
    if increase.is_nan() || increase > args.max_perplexity_increase {
        anyhow::bail!(
            "{found}; more than --max-perplexity-increase {} allows, so no {file} is written: allow more, or try a \
             smaller --block-size or q8",
            args.max_perplexity_increase
        );
    }

    let _held = place.locked()?;
    write::install(place.scratch, place.folder, &[file.as_str()], external)?;
    let mut entry = place.entry(&file, kind)?;
    entry.insert("block_size".to_owned(), json!(args.block_size));
    entry.insert("perplexity_fp32".to_owned(), json!(before));
    entry.insert("perplexity".to_owned(), json!(after));
    let mut manifest = place.read_manifest()?;
    let mut entries = place.generating(&mut manifest);
    entries.insert(precision.name().to_owned(), Value::Object(entry.clone()));
    manifest.insert("generate".to_owned(), Value::Object(entries));
    files::write(&place.manifest(), format!("{:#}\n", Value::Object(manifest)))?;
    let bytes = place.bytes(&file) + if external { place.bytes(&format!("{file}_data")) } else { 0 };
    entry.insert("path".to_owned(), json!(target));
    entry.insert("bytes".to_owned(), json!(bytes));
    entry.insert("records".to_owned(), json!(examples.len()));
    place.say.result(format!("{}: {:.1} MB, {found}", target.display(), bytes as f64 / 1e6), &entry)
}

/// Runs the built-in records through candle and through the written file.
///
/// # Errors
/// The logits differ by more than the tolerance, or are not finite.
fn verify(saved: &Saved, graph: &Path, form: Form) -> Result<Compared> {
    let encodings = saved.tokenizer.encode_all(&inputs::builtin(saved)?, saved.max_length)?;
    let compared = match form {
        Form::Whole => {
            let subject = Subject { saved, graph, encodings: &encodings };
            let runtimes = [Runtime::Eager, Runtime::Ort(Provider::Cpu)];
            parity::run(&subject, &runtimes, parity::TOLERANCE)?.remove(0)
        }
        Form::Cached => {
            let texts = decoding::few(&encodings);
            decoding::run(saved, graph, &texts, Provider::Cpu, parity::TOLERANCE)?
        }
        Form::InPlace => decoding::in_place(saved, graph, &decoding::few(&encodings), parity::TOLERANCE)?,
    };
    if !compared.pass {
        anyhow::bail!(
            "the exported graph does not give the trained model's logits, so none is left behind:\n{}",
            report::table(&[compared])
        );
    }
    Ok(compared)
}
