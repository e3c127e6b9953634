//! A trained model → ONNX files in place beside it: built, written under a temporary name, verified against what was
//! trained, and only then given their names.

mod bf16;
mod calibrate;
mod fp16;
mod gate;
mod int8;
pub mod merged;
pub mod triton;

use gate::Gate;
pub use int8::Int8;

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::data::batch::Encoding;
use crate::eager::Evaluator;
use crate::onnx::proto::ModelProto;
use crate::onnx::write::{self, Scratch};
use crate::onnx::{GraphKind, Precision, model};
use crate::parity::{self, Compared, Runtime, Subject, decoding, inputs, report};
use crate::predict::{graphs, vouched};
use crate::runtime::{How, Provider, Providers, Slots, library};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Example, Form};
use crate::{Result, bail_unusable, checkpoint, files, process, unusable};

/// The graph that every runtime reads.
const MODEL: &str = "model.onnx";
/// Its weights, where they stand in a file of their own.
const DATA: &str = "model.onnx_data";
/// The graph that tk generates with.
const GENERATE: &str = "generate.onnx";

/// The graph that CUDA runs.
const OPTIMIZED: &str = "model_optimized.onnx";

/// Where a manifest speaks of the graphs that a provider runs in place of the one that all run, by provider.
const OPTIMIZING: &str = "optimized";
/// Where a manifest speaks of the graphs that generate, by precision.
const GENERATING: &str = "generate";
/// The same of graphs of whole sequences in fewer bits than they were trained in.
const PRECISIONS: &str = "precisions";

/// An export under way.
pub struct Export<'a> {
    saved: &'a Saved,
    /// DIR/onnx, or where it leads as a link.
    folder: PathBuf,
    /// Where files lie until they are verified.
    scratch: Scratch,
    /// Of a folder with an adapter: how far the merged model is from base and adapter.
    merged: Option<f32>,
    say: Say,
}

/// What was put in place.
pub struct Exported {
    /// What there is to say of it.
    pub summary: String,
    /// What the manifest says of it, with its path and size.
    pub manifest: Map<String, Value>,
}

impl<'a> Export<'a> {
    /// Finds the place for a model's graphs.
    ///
    /// # Errors
    /// Unusable: it can't be written, or what stands there is no export. ONNX Runtime can't be had: nothing is written
    /// that can't be verified.
    pub fn new(saved: &'a Saved, say: Say) -> Result<Self> {
        library::library()?;
        let folder = graphs::folder(&saved.dir);
        if folder.exists() && !folder.is_dir() {
            bail_unusable!("{} is no directory, and the graph belongs there: move it away", folder.display());
        }
        let folder = files::behind_links(&folder).map_err(|e| unusable!("{}: {e}", folder.display()))?;
        // on the file system of the folder, which may be another one than DIR's, so that a rename puts a file in place
        let home = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(&saved.dir);
        let scratch = Scratch::new(home).map_err(|e| unusable!("{}: can't write: {e:#}", home.display()))?;
        let merged = merged::prove(saved)?;
        let export = Self { saved, folder, scratch, merged, say };
        export.read_manifest()?; // one that can't be read is told before the work
        Ok(export)
    }

    fn build(&self, kind: &GraphKind) -> Result<ModelProto> {
        let Saved { config, task, weights, tokenizer, .. } = self.saved;
        model::build(config, task, weights, tokenizer.hash(), kind.clone())
    }

    /// What a manifest says of a file that is in place, and of the one that has its weights, if another has.
    fn entry(&self, file: &str, data_file: Option<&str>, kind: &GraphKind) -> Result<Map<String, Value>> {
        let path = self.folder.join(file);
        let entry = json!({
            "file": file,
            "sha256": checkpoint::file_hash(&path)?,
            "weights_sha256": write::metadata(&path)?.get("weights_sha256"),
            "opset": kind.opset,
            "precision": kind.precision.name(),
            "tk_version": env!("CARGO_PKG_VERSION"),
        });
        let Value::Object(mut entry) = entry else { anyhow::bail!("an entry is an object") };
        if let Some(worst) = self.merged {
            entry.insert("lora_max_abs".to_owned(), json!(worst));
        }
        if let Some(data_file) = data_file {
            entry.insert("data_file".to_owned(), json!(data_file));
            let hash = checkpoint::file_hash(&self.folder.join(data_file))?;
            entry.insert("data_sha256".to_owned(), json!(hash));
        }
        Ok(entry)
    }

    /// Puts graphs that were written in place, which share one file of weights or have none outside; the folder has to
    /// be held. The manifest vouches for none of them until it is written anew: wherever this process ends, what stands
    /// there is served.
    fn install(&self, files: &[&str], external: bool) -> Result<()> {
        let mut manifest = self.read_manifest()?;
        let replaced: Vec<String> =
            files.iter().flat_map(|file| [(*file).to_owned(), format!("{file}_data")]).collect();
        if vouched::disown(&mut manifest, &replaced) {
            files::write(&self.manifest(), format!("{:#}\n", Value::Object(manifest)))?;
        }
        write::install(self.scratch.path(), &self.folder, files, external)
    }

    fn bytes(&self, file: &str) -> u64 {
        std::fs::metadata(self.folder.join(file)).map(|file| file.len()).unwrap_or_default()
    }

    fn manifest(&self) -> PathBuf {
        self.folder.join(vouched::MANIFEST)
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
        for key in [GENERATING, OPTIMIZING, PRECISIONS] {
            if let Some(other) = manifest.get(key).filter(|entry| !entry.is_object()) {
                bail_unusable!("{}: \"{key}\" is {other}, expected an object: delete it", place.display());
            }
        }
        Ok(manifest)
    }

    /// What the manifest says under a key, of the graphs whose files are there.
    fn in_place(&self, manifest: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
        let Some(Value::Object(mut entries)) = manifest.remove(key) else { return Map::new() };
        entries
            .retain(|_, entry| entry["file"].as_str().is_some_and(|file| self.folder.join(file).is_file()));
        entries
    }

    /// The folder, for this process alone until the result is dropped.
    fn locked(&self) -> Result<Option<std::fs::File>> {
        files::create_folder(&self.folder)
            .and_then(|()| files::lock(&self.folder))
            .map_err(|e| unusable!("{}: {e}", self.folder.display()))
    }

    /// The graphs in fp32.
    ///
    /// # Errors
    /// ONNX Runtime gives other logits than the trained model: nothing is put in place then.
    pub fn as_trained(&self, opset: i64, external_data: bool, for_cuda: bool) -> Result<Exported> {
        let form = self.saved.task.form();
        let kind = GraphKind::fp32(form, opset);
        let (target, written) = (graphs::path(&self.saved.dir), self.scratch.path().join(MODEL));
        let external = write::save(self.build(&kind)?, &written, external_data || form == Form::Cached)?;
        self.say.detail(format!("verifying {}", written.display()));
        let mut compared = vec![verify(self.saved, &written, form)?];
        let generating = graphs::generating(&self.saved.dir, Precision::Fp32);
        let generated = self.scratch.path().join(GENERATE);
        if form == Form::Cached {
            write::save_sharing(self.build(&GraphKind::in_place(Precision::Fp32))?, &generated, &written)?;
            self.say.detail(format!("verifying {}", generated.display()));
            compared.push(verify(self.saved, &generated, Form::InPlace)?);
        }
        if for_cuda {
            let optimized = self.scratch.path().join(OPTIMIZED);
            let model = self.build(&GraphKind::fused())?;
            let mut nodes = model.graph.iter().flat_map(|graph| &graph.node);
            if nodes.all(|node| node.domain.is_empty()) {
                bail_unusable!(
                    "--ep cuda: no operator of ONNX Runtime's own computes this model's attention; CUDA runs model.onnx: leave \
                     --ep out"
                );
            }
            if external {
                write::save_sharing(model, &optimized, &written)?;
            } else {
                write::save(model, &optimized, false)?;
            }
            self.say.detail(format!("verifying {}", optimized.display()));
            compared.push(verify(self.saved, &optimized, form)?);
        }

        let _held = self.locked()?;
        if !for_cuda {
            // it may read weights that go with the export that it is of
            let optimized = self.folder.join(OPTIMIZED);
            let removed = if optimized.exists() { std::fs::remove_file(&optimized) } else { Ok(()) };
            removed.with_context(|| optimized.display().to_string())?;
        }
        let files: &[&str] = match form {
            Form::Cached => &[MODEL, GENERATE],
            _ if for_cuda => &[MODEL, OPTIMIZED],
            _ => &[MODEL],
        };
        self.install(files, external)?;
        let mut before = self.read_manifest()?;
        let mut others = self.in_place(&mut before, GENERATING);
        let mut optimized = self.in_place(&mut before, OPTIMIZING);
        let mut precisions = self.in_place(&mut before, PRECISIONS);
        // what was measured on the graph that stood here before
        precisions.retain(|_, entry| entry["file"] != MODEL);
        let data_file = external.then_some(DATA);
        let mut manifest = self.entry(MODEL, data_file, &kind)?;
        manifest.insert("max_abs".to_owned(), json!(compared[0].max_abs));
        let size = self.bytes(MODEL) + data_file.map_or(0, |file| self.bytes(file));
        let mut also = String::new();
        if for_cuda {
            let mut entry = self.entry(OPTIMIZED, data_file, &GraphKind::fused())?;
            entry.insert("max_abs".to_owned(), json!(compared[1].max_abs));
            optimized.insert(Provider::Cuda.name().to_owned(), Value::Object(entry));
            also = format!(
                "\n{}: the same for CUDA, with ONNX Runtime's own attention, within {:.1e} on this machine's CPU",
                graphs::optimized(&self.saved.dir).display(),
                compared[1].max_abs
            );
        } else if let Some(in_place) = compared.get(1) {
            let mut entry = self.entry(GENERATE, data_file, &GraphKind::in_place(Precision::Fp32))?;
            entry.insert("max_abs".to_owned(), json!(in_place.max_abs));
            others.shift_insert(0, Precision::Fp32.name().to_owned(), Value::Object(entry));
            also = format!(
                "\n{}: the same weights, the logits of {} tokens within {:.1e}",
                generating.display(),
                in_place.records,
                in_place.max_abs
            );
        }
        for (key, entries) in [(GENERATING, others), (OPTIMIZING, optimized), (PRECISIONS, precisions)] {
            if !entries.is_empty() {
                manifest.insert(key.to_owned(), Value::Object(entries));
            }
        }
        files::write(&self.manifest(), format!("{:#}\n", Value::Object(manifest.clone())))?;

        let human = format!(
            "{}: opset {}, {:.1} MB, the logits of {} {} within {:.1e} of the trained model's{also}",
            target.display(),
            opset,
            size as f64 / 1e6,
            compared[0].records,
            if form == Form::Whole { "records" } else { "tokens, behind a past and without," },
            compared[0].max_abs
        );
        manifest.insert("path".to_owned(), json!(target));
        manifest.insert("bytes".to_owned(), json!(size));
        manifest.insert("records".to_owned(), json!(compared[0].records));
        Ok(Exported { summary: human, manifest })
    }

    /// What graphs in fewer bits are held against: the one in fp32, which is not kept.
    fn gate<'e>(&'e self, opset: i64, examples: Option<&'e [Example]>) -> Result<Gate<'e>> {
        let fp32 = self.scratch.path().join("fp32.onnx");
        write::save(self.build(&GraphKind::fp32(Form::Whole, opset))?, &fp32, false)?;
        self.say.detail("measuring in fp32");
        Gate::new(self.saved, &fp32, examples)
    }

    /// A language model's graph in fp16, or with its matrices in blocks of few bits, held against the trained model's
    /// perplexity on this machine's CPU.
    ///
    /// # Errors
    /// Unusable: a weight is too large for fp16. The perplexity rises by more than `max_increase`, as a share of it:
    /// nothing is put in place then.
    pub fn generating_in(
        &self,
        precision: Precision,
        block: usize,
        max_increase: f64,
        examples: &[Example],
    ) -> Result<Exported> {
        let saved = self.saved;
        let kind = GraphKind { block, ..GraphKind::in_place(precision) };
        let target = graphs::generating(&saved.dir, precision);
        let file = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let written = self.scratch.path().join(&file);
        let external = write::save(self.build(&kind)?, &written, false)?;
        self.say.detail(format!("measuring {}", written.display()));
        let before =
            Evaluator::open(saved, &candle_core::Device::Cpu)?.measure(examples)?.metrics["perplexity"];
        let threads = process::cores();
        let mut slots = Slots::open(&written, &Providers::only(Provider::Cpu), threads, self.say)?;
        let after = saved.task.measure_in_place(&mut slots, examples)?.metrics["perplexity"];
        drop(slots);
        let increase = after / before - 1.0;
        let found =
            format!("perplexity {before:.3} in fp32, {after:.3} in {precision}: {:+.2} %", increase * 100.0);
        // not a number is too much as well
        if increase.is_nan() || increase > max_increase {
            anyhow::bail!(
                "{found}; more than --max-perplexity-increase {max_increase} allows, so no {file} is written: allow more, \
                 or {}",
                if precision == Precision::Fp16 {
                    "generate in fp32"
                } else {
                    "try a smaller --block-size or q8"
                }
            );
        }

        let mut about = vec![("perplexity_fp32", json!(before)), ("perplexity", json!(after))];
        about.push(match precision {
            // as far from the trained model as a GPU may be, too
            Precision::Fp16 => {
                ("max_abs", json!(compared(saved, &written, Form::InPlace, f32::INFINITY)?.max_abs))
            }
            _ => ("block_size", json!(block)),
        });
        let mut exported = self.put(GENERATING, &target, &kind, external, about, &found)?;
        exported.manifest.insert("records".to_owned(), json!(examples.len()));
        Ok(exported)
    }

    /// Writes into the manifest what there is to say of a precision, under a key. The folder has to be held.
    fn record(&self, key: &str, precision: Precision, entry: &Map<String, Value>) -> Result<()> {
        let mut manifest = self.read_manifest()?;
        let mut entries = self.in_place(&mut manifest, key);
        entries.insert(precision.name().to_owned(), Value::Object(entry.clone()));
        manifest.insert(key.to_owned(), Value::Object(entries));
        files::write(&self.manifest(), format!("{:#}\n", Value::Object(manifest)))
    }

    /// Puts a graph in fewer bits in its place, and what there is to say of it into the manifest, under a key.
    fn put(
        &self,
        key: &str,
        target: &Path,
        kind: &GraphKind,
        external: bool,
        about: impl IntoIterator<Item = (&'static str, Value)>,
        found: &str,
    ) -> Result<Exported> {
        let file = target.file_name().unwrap_or_default().to_string_lossy();
        let _held = self.locked()?;
        self.install(&[&file], external)?;
        let data_file = external.then(|| format!("{file}_data"));
        let mut entry = self.entry(&file, data_file.as_deref(), kind)?;
        entry.extend(about.into_iter().map(|(name, value)| (name.to_owned(), value)));
        self.record(key, kind.precision, &entry)?;
        let bytes = self.bytes(&file) + data_file.map_or(0, |file| self.bytes(&file));
        entry.insert("path".to_owned(), json!(target));
        entry.insert("bytes".to_owned(), json!(bytes));
        let summary = format!("{}: {:.1} MB, {found}", target.display(), bytes as f64 / 1e6);
        Ok(Exported { summary, manifest: entry })
    }
}

/// The built-in records.
fn records(saved: &Saved) -> Result<Vec<Encoding>> {
    saved.tokenizer.encode_all(&inputs::builtin(saved)?, saved.max_length)
}

/// What more a gate could tell.
fn hint(has_labels: bool) -> &'static str {
    if has_labels { "" } else { "; give --input with labelled records to measure the task's metric" }
}

/// Runs the built-in records through candle and through the written file.
///
/// # Errors
/// The logits differ by more than the tolerance, or are not finite.
fn verify(saved: &Saved, graph: &Path, form: Form) -> Result<Compared> {
    compared(saved, graph, form, parity::TOLERANCE)
}

/// The same within a tolerance.
fn compared(saved: &Saved, graph: &Path, form: Form, tolerance: f32) -> Result<Compared> {
    let encodings = records(saved)?;
    let compared = match form {
        Form::Whole => {
            let subject =
                Subject { saved, graph, how: &How::default(), encodings: &encodings, examples: None };
            let runtimes = [Runtime::Eager, Runtime::Ort(Provider::Cpu)];
            parity::run(&subject, &runtimes, tolerance)?.remove(0)
        }
        Form::Cached => {
            let texts = decoding::few(&encodings);
            decoding::run(saved, graph, &texts, Provider::Cpu, tolerance)?
        }
        Form::InPlace => {
            let texts = decoding::few(&encodings);
            decoding::in_place(saved, graph, &texts, Provider::Cpu, tolerance)?
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
