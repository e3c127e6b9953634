//! `tk train`: a model, labelled records and a regime → a directory with the trained model.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use candle_core::Device;
use indicatif::HumanCount;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{self, Weights, file_hash};
use crate::data::hub;
use crate::data::tokens;
use crate::eager::{Init, Params};
use crate::model::ops::{Param, Part};
use crate::model::{ModelConfig, token_ids};
use crate::predict::graphs;
use crate::say::{Say, peak_rss_bytes};
use crate::task::{Encoder, Example, Learning, Metrics, RecordFlags, Start, Target, Task, TrainingFlags};
use crate::train::checkpoint::Folder;
use crate::train::{Outcome, Run, Settings};
use crate::{Result, bail_unusable, device, files, saved, unusable};

/// Fine-tune a model, or pre-train one from scratch.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Args {
    /// What to train for.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(Task::NAMES))]
    task: String,
    /// The model to start from: a directory in Hugging Face's layout, or a hub id.
    #[arg(long, value_name = "DIR|ID", alias = "model-name-or-path")]
    model: String,
    /// Records to learn from: .jsonl, .json, .csv, .tsv, .parquet; or .txt, a text a line (--text-unit asks for longer ones).
    #[arg(long, value_name = "FILE", alias = "train-file")]
    train: PathBuf,
    /// Records to measure on; the best evaluation's weights are kept.
    #[arg(long, value_name = "FILE", alias = "validation-file")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eval: Option<PathBuf>,
    /// The directory to write.
    #[arg(long, value_name = "DIR", alias = "output-dir")]
    #[serde(skip)]
    output: PathBuf,
    /// Go on from the newest checkpoint of --output, with the settings it was started with.
    #[arg(long, conflicts_with = "overwrite")]
    #[serde(skip)]
    resume: bool,
    /// Replace what an earlier run wrote to --output.
    #[arg(long)]
    #[serde(skip)]
    overwrite: bool,
    /// Use only the model's config.json and tokenizer; draw all weights anew. For causal-lm, where the model has no
    /// tokenizer, one is trained on the texts.
    #[arg(long)]
    #[serde(default)]
    from_scratch: bool,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingFlags,
    #[command(flatten)]
    #[serde(flatten)]
    records: RecordFlags,
    #[command(flatten)]
    #[serde(flatten)]
    settings: Settings,
}

/// What a run is started with and goes on with.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    /// Sha-256 of each input, so that a resumed run goes on with the same.
    inputs: Vec<(String, String)>,
}

/// Trains and writes the model.
pub fn run(args: &Args, say: Say) -> Result<()> {
    args.settings.check()?;
    args.check_records()?;
    let folder = Folder::of(&args.output);
    check_output(args, &folder)?;
    let device = device::open(&args.device)?;
    args.settings.precision.check(&device)?;
    if args.settings.checkpoint_activations && !device.is_cpu() {
        bail_unusable!("--checkpoint-activations works with --device cpu; here, try a smaller --batch-size");
    }
    let prepared = Prepared::new(args, &device, &say)?;
    prepared.describe(args, &say);
    let _held = start_folder(args, &folder, &prepared)?;

    let Prepared { config, learning, params, eval, .. } = &prepared;
    let Learning { task, examples: train, .. } = learning;
    let run = Run {
        settings: &args.settings,
        family: &config.family,
        task,
        params,
        device: &device,
        train,
        eval,
        folder: &folder,
        say,
        interrupted: interrupted(),
    };
    let outcome = run.go(args.resume)?;
    if !outcome.finished {
        anyhow::bail!(
            "interrupted at step {}; `tk train --resume --output {}` goes on from there",
            outcome.progress.step,
            args.output.display()
        );
    }
    write_model(args, &prepared)?;
    report(args, &outcome, &say)
}

impl Args {
    /// Refuses files that can't be trained on, and flags that the task has no use for.
    fn check_records(&self) -> Result<()> {
        let files: Vec<&Path> = [&self.train].into_iter().chain(&self.eval).map(PathBuf::as_path).collect();
        for file in &files {
            // a second look at a pipe would wait for ever
            if file.metadata().is_ok_and(|about| !about.is_file() && !about.is_dir()) {
                bail_unusable!(
                    "{} is a pipe or a device, and training reads its records and then hashes them: give a file",
                    file.display()
                );
            }
        }
        self.training.check(&self.task)?;
        self.records.check(&self.task, &files)
    }
}

/// Everything that is read and checked before the first file is written.
struct Prepared {
    model: PathBuf,
    config: ModelConfig,
    learning: Learning<Task, Target>,
    params: Params,
    new: Vec<String>,
    unused: Vec<String>,
    eval: Vec<Example>,
}

impl Prepared {
    fn new(args: &Args, device: &Device, say: &Say) -> Result<Self> {
        let (settings, max_length) = (&args.settings, args.settings.max_length);
        let model = hub::model_dir(&args.model, say.quiet)?;
        let mut config = ModelConfig::read(&model)?;
        if let Some(p) = settings.dropout {
            config.set_dropout(p)?;
        }
        if max_length > config.max_positions() {
            bail_unusable!(
                "--max-length {max_length} is above the {} rows of the model's position table",
                config.max_positions()
            );
        }
        let (records, training, from_scratch) = (&args.records, &args.training, args.from_scratch);
        let (model, train) = (model.as_path(), args.train.as_path());
        let mut start = Start { model, config, from_scratch, train, records, training, max_length, say };
        let learning = Task::learn(&args.task, &mut start)?;
        let (task, mut config) = (&learning.task, start.config);
        settings.check_task(task)?;
        let encoder = Encoder { records, training, tokenizer: &learning.tokenizer, max_length };
        let eval = args.eval.as_ref().map(|path| task.examples(path, &encoder)).transpose()?;

        let manifest = task.params(&config.family)?;
        let init = Init { seed: settings.seed, std: config.initializer_range() };
        let (params, fit) = if from_scratch {
            (Params::from_scratch(&manifest, init, device)?, Default::default())
        } else {
            let mut weights = Weights::open(model, config.family.names())?;
            if Task::from_config(&config).ok().as_ref() != Some(task) {
                // a head that was trained for other labels
                for Param { name, .. } in manifest.iter().filter(|param| param.part == Part::Labels) {
                    if weights.forget(name) {
                        say.line(format!("{name} was trained for other labels and starts anew"));
                    }
                }
            }
            Params::load(&manifest, &weights, init, device)?
        };
        task.write_config(&mut config);
        for key in ["torch_dtype", "dtype"] {
            if config.raw.contains_key(key) {
                config.raw.insert(key.to_owned(), "float32".into()); // what is saved
            }
        }
        let (new, unused, eval) = (fit.new, fit.unused, eval.unwrap_or_default());
        Ok(Self { model: model.to_owned(), config, learning, params, new, unused, eval })
    }

    fn describe(&self, args: &Args, say: &Say) {
        say.line(format!(
            "{}: {} parameters; {}",
            self.model.display(),
            grouped(self.params.numel()),
            if args.from_scratch {
                "all drawn anew".to_owned()
            } else if self.new.is_empty() {
                "all from the checkpoint".to_owned()
            } else {
                format!("{} drawn anew", self.new.join(", "))
            }
        ));
        if !self.unused.is_empty() {
            let shown = self.unused.len().min(8);
            say.line(format!(
                "not used from the checkpoint: {}{}",
                self.unused[..shown].join(", "),
                if self.unused.len() > shown { " …" } else { "" }
            ));
        }
        let cut = |examples: &[Example]| examples.iter().filter(|example| example.encoding.truncated).count();
        let train = &self.learning.examples;
        let tokens: usize = train.iter().map(|example| example.encoding.len()).sum();
        let learnt: usize = train.iter().map(|example| example.target.losses()).sum();
        let learnt = (learnt != train.len()).then(|| format!("{} tokens are learnt", grouped(learnt)));
        let more = self.learning.task.summary().into_iter().chain(learnt).map(|text| format!("; {text}"));
        say.line(format!(
            "{} training examples of {:.1} tokens, {} to measure on{}",
            grouped(train.len()),
            tokens as f64 / train.len() as f64,
            grouped(self.eval.len()),
            more.collect::<String>()
        ));
        for (name, examples) in [("training", train), ("evaluation", &self.eval)] {
            if cut(examples) > 0 {
                say.warn(format!(
                    "{} of {} {name} examples are longer than --max-length {} and are cut",
                    grouped(cut(examples)),
                    grouped(examples.len()),
                    args.settings.max_length
                ));
            }
        }
    }

    /// The hash of each file that a run's result depends on.
    fn inputs(&self, args: &Args) -> Result<Vec<(String, String)>> {
        let mut inputs = vec![("train".to_owned(), file_hash(&args.train)?)];
        if let Some(path) = &args.eval {
            inputs.push(("eval".to_owned(), file_hash(path)?));
        }
        let of_tasks = Task::files();
        let mut names: Vec<PathBuf> =
            ["config.json"].iter().chain(&of_tasks).chain(&tokens::FILES).map(PathBuf::from).collect();
        if !args.from_scratch {
            let weights = checkpoint::weight_files(&self.model)?;
            if !weights.contains(&self.model.join("model.safetensors")) {
                names.push(checkpoint::INDEX.into());
            }
            names.extend(
                weights.iter().filter_map(|path| Some(path.strip_prefix(&self.model).ok()?.to_owned())),
            );
        }
        for name in names {
            let path = self.model.join(&name);
            if path.is_file() {
                inputs.push((name.display().to_string(), file_hash(&path)?));
            }
        }
        Ok(inputs)
    }
}

/// Refuses an output directory that holds something of somebody else's, or a run that nobody spoke of.
fn check_output(args: &Args, folder: &Folder) -> Result<()> {
    let output = &args.output;
    let ours = folder.settings().is_file();
    if args.resume && !ours {
        bail_unusable!("{} holds no run of tk's that could be resumed", output.display());
    }
    if output.exists() && !output.is_dir() {
        bail_unusable!("--output {} is a file, expected a directory", output.display());
    }
    let is_empty = !output.is_dir()
        || output.read_dir().map_err(|e| unusable!("{}: {e}", output.display()))?.next().is_none();
    if !ours && !is_empty {
        bail_unusable!(
            "--output {} holds files that tk train did not write; name a new or an empty directory",
            output.display()
        );
    }
    if ours && !args.resume && !args.overwrite {
        bail_unusable!(
            "--output {} holds an earlier run: --resume goes on with it, --overwrite replaces it",
            output.display()
        );
    }
    if args.resume {
        let saved = saved_settings(folder)?;
        let differing = differences(&toml::Table::try_from(args)?, &saved);
        if !differing.is_empty() {
            bail_unusable!(
                "a resumed run goes on with the settings of {}; these differ: {}",
                folder.settings().display(),
                differing.join(", ")
            );
        }
    }
    Ok(())
}

fn saved_settings(folder: &Folder) -> Result<toml::Table> {
    let path = folder.settings();
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))
}

fn differences(now: &toml::Table, then: &toml::Table) -> Vec<String> {
    let keys: std::collections::BTreeSet<&String> = now.keys().chain(then.keys()).collect();
    let shown = |value: Option<&toml::Value>| value.map_or("not set".to_owned(), toml::Value::to_string);
    keys.into_iter()
        .filter(|key| now.get(*key) != then.get(*key))
        .map(|key| format!("{key} ({}, was {})", shown(now.get(key)), shown(then.get(key))))
        .collect()
}

/// Makes `training/` with the settings and the inputs' hashes, or holds a resumed run against them. No other process
/// trains there until the result is dropped.
fn start_folder(args: &Args, folder: &Folder, prepared: &Prepared) -> Result<Option<std::fs::File>> {
    let now = Manifest { inputs: prepared.inputs(args)? };
    let unwritable =
        |e: std::io::Error| unusable!("--output {} can't be written: {e}", args.output.display());
    files::create_folder(&args.output).map_err(unwritable)?;
    let held = folder.occupy()?;
    files::sweep(&args.output).map_err(unwritable)?;
    let inputs = folder.inputs();
    if args.resume {
        let text = std::fs::read_to_string(&inputs).with_context(|| inputs.display().to_string())?;
        let then: Manifest =
            serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", inputs.display()))?;
        let differing = |a: &Manifest, b: &Manifest| -> Vec<String> {
            let only = a.inputs.iter().filter(|input| !b.inputs.contains(input));
            only.map(|(name, _)| name.clone()).collect()
        };
        if now != then {
            let mut changed = [differing(&now, &then), differing(&then, &now)].concat();
            changed.sort();
            changed.dedup();
            bail_unusable!(
                "the run can't be resumed: its inputs have changed since it was started ({})",
                changed.join(", ")
            );
        }
        return Ok(held);
    }
    folder.clear()?;
    files::write(&folder.settings(), toml::to_string(args)?)?;
    files::write(&inputs, serde_json::to_string_pretty(&now)?)?;
    Ok(held)
}

/// Writes the directory that transformers, `tk export` and `tk eval` read; the weights last.
fn write_model(args: &Args, prepared: &Prepared) -> Result<()> {
    let output = &args.output;
    let weights = output.join("model.safetensors");
    let temporary = files::temporary_beside(&weights)?;
    prepared.params.save(&temporary)?;
    // an earlier run's graphs and weights would not be this model's; without weights the directory is no model, and says
    // so, until all of it is there
    graphs::remove(output)?;
    match std::fs::remove_file(&weights) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| weights.display().to_string());
        }
        _ => {}
    }
    prepared.learning.tokenizer.save(&prepared.model, output)?;
    let pads = match prepared.config.family.pads_with_the_end() {
        false => None, // has a token of its own for it
        true => token_ids::read(&prepared.config.raw, "eos_token_id", prepared.config.vocab_size())?,
    };
    let pads = pads.and_then(|ends| ends.first().copied());
    let pad_token = pads.and_then(|id| prepared.learning.tokenizer.inner().id_to_token(id));
    saved::finish_tokenizer_config(output, args.settings.max_length, pad_token.as_deref())?;
    files::write(&output.join("config.json"), serde_json::to_string_pretty(&prepared.config.raw)? + "\n")?;
    for name in Task::files() {
        let path = output.join(name);
        match prepared.learning.files.iter().find(|(own, _)| *own == name) {
            Some((_, text)) => files::write(&path, text)?,
            None if path.exists() => {
                std::fs::remove_file(&path).with_context(|| path.display().to_string())?; // an earlier run's
            }
            None => {}
        }
    }
    files::put(temporary, &weights).with_context(|| weights.display().to_string())
}

fn report(args: &Args, outcome: &Outcome, say: &Say) -> Result<()> {
    let progress = &outcome.progress;
    let metrics: Metrics = progress.best.as_ref().map(|best| best.metrics.clone()).unwrap_or_default();
    let shown: Vec<String> = metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    let speed = progress.tokens as f64 / progress.seconds.max(1e-9);
    let peak = peak_rss_bytes();
    let memory = if peak == 0 {
        String::new() // the system does not tell
    } else {
        format!(", peak memory {:.2} GB", peak as f64 / 1e9)
    };
    let human = format!(
        "{}: {} steps, {} tokens in {:.1} s ({speed:.0} tokens/s){memory}{}{}",
        args.output.display(),
        progress.step,
        grouped(progress.tokens as usize),
        progress.seconds,
        if shown.is_empty() { "" } else { "; " },
        shown.join("  ")
    );
    say.result(
        human,
        &json!({
            "train_seconds": progress.seconds,
            "tokens": progress.tokens,
            "tokens_per_second": speed,
            "epochs": args.settings.epochs,
            "steps": progress.step,
            "train_loss": progress.loss_sum / progress.step.max(1) as f64,
            "eval": metrics,
            "peak_rss_bytes": peak,
        }),
    )
}

/// Digits in groups of three.
fn grouped(n: usize) -> HumanCount {
    HumanCount(n as u64)
}

/// Set by Ctrl-C; the second one ends the process at once.
fn interrupted() -> &'static AtomicBool {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    // where no handler can be set, Ctrl-C ends the process as it always does
    let _ = ctrlc::set_handler(handler);
    &INTERRUPTED
}
