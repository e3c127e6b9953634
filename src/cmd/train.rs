//! `tk train`: a model, labelled records and a regime → a directory with the trained model.

use std::path::PathBuf;

use candle_core::Device;
use indicatif::HumanCount;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::cache::Cache;
use crate::data::records::{Files, file_names};
use crate::error::{self, Stopped};
use crate::say::{Say, peak_rss_bytes, tell};
use crate::task::{Encoder, Learning, Metric, Metrics, RecordFlags, Task, TrainingFlags};
use crate::train::checkpoint::Folder;
use crate::train::dry_run::DryRun;
use crate::train::output::{self, EarlierRun};
use crate::train::prepare::{Job, Prepared};
use crate::train::split::{SplitFlags, Whole};
use crate::train::stream::Stream;
use crate::train::supply::Streamed;
use crate::train::verify::verify_resume;
use crate::train::{End, Outcome, Run, Settings};
use crate::world::{self, World};
use crate::{Result, bail_unusable, device, process, report};

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
    /// Each may be packed: .jsonl.gz, .csv.zst.
    /// Several files are read as one: name them, a folder (all files of these kinds below it) or a pattern ('data/*.jsonl').
    #[arg(long, value_name = "FILE", alias = "train-file", required = true, num_args = 1..)]
    #[serde(with = "file_names")]
    train: Vec<PathBuf>,
    /// Records to measure on, named in the same ways; the best evaluation's weights are kept.
    #[arg(long, value_name = "FILE", alias = "validation-file", num_args = 1..)]
    #[serde(with = "file_names", default, skip_serializing_if = "Vec::is_empty")]
    eval: Vec<PathBuf>,
    /// The directory to write. In its training/ the log grows: log.jsonl, and the same numbers for `tensorboard --logdir DIR`.
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
    /// Read everything, train nothing, write nothing: tell what is in the files, what a run would do and take, and what
    /// looks like a mistake.
    #[arg(long, conflicts_with = "resume")]
    #[serde(skip)]
    dry_run: bool,
    /// With --dry-run, end with exit code 2 where something looks like a mistake.
    #[arg(long, requires = "dry_run")]
    #[serde(skip)]
    strict: bool,
    /// Train N steps without a break, and again with a break in the middle, in processes of their own: every number of
    /// both checkpoints must be the same. Nothing else is trained, and --output is not written.
    #[arg(long, value_name = "N", conflicts_with_all = ["resume", "dry_run"])]
    #[serde(skip)]
    verify_resume: Option<usize>,
    /// End behind a checkpoint after so many steps, with the schedule of the whole run.
    #[arg(long, hide = true, value_name = "N")]
    #[serde(skip)]
    stop_at: Option<usize>,
    /// Use only the model's config.json and tokenizer; draw all weights anew. A task that learns from texts without
    /// labels trains a tokenizer on them where the model has none.
    #[arg(long)]
    #[serde(default)]
    from_scratch: bool,
    /// Tokenize everything anew, ask a --teacher anew, and keep none of it. Else the tokens of large data and a teacher's logits
    /// are kept in TK_CACHE (or tk in XDG_CACHE_HOME, or in ~/.cache), 8 GiB at most: what was used the longest ago goes first.
    #[arg(long)]
    #[serde(skip)]
    no_cache: bool,
    /// Where to compute: cpu, cuda or cuda:N. Of several processes on a machine (mpirun), cuda gives each a GPU of its own.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingFlags,
    #[command(flatten)]
    #[serde(flatten)]
    split: SplitFlags,
    #[command(flatten)]
    #[serde(flatten)]
    records: RecordFlags,
    #[command(flatten)]
    #[serde(flatten)]
    settings: Settings,
}

/// Trains and writes the model, as one of several processes where several were started.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let world = world::world()?;
    let done = train(args, world, say);
    if world.size() > 1 {
        if let Err(error) = &done {
            tell(format!("error: process {} of {}: {error:#}", world.rank(), world.size()));
            world.abort(error::exit_code(error).into());
        }
        world.end();
    }
    done
}

fn train(args: &Args, world: &dyn World, say: Say) -> Result<()> {
    let say = Say { quiet: say.quiet || !world.leads(), ..say };
    let (train, eval) = args.files()?;
    args.check(&args.job(&train, eval.as_ref()))?;
    let device = device::open(&world.device(&args.device))?;
    args.settings.precision.check(&device)?;
    // what was taken is what a resumed run goes on with
    let (precision, taken) = args.settings.precision.taken(&device);
    taken.iter().for_each(|text| say.line(text));
    let args = &Args { settings: Settings { precision, ..args.settings.clone() }, ..args.clone() };
    let job = args.job(&train, eval.as_ref());
    let asked = match (args.resume, args.overwrite) {
        (true, _) => EarlierRun::Resume,
        (false, true) => EarlierRun::Overwrite,
        (false, false) => EarlierRun::New,
    };
    let settings = toml::Table::try_from(args)?;
    if world.size() > 1 && (args.dry_run || args.verify_resume.is_some()) {
        bail_unusable!("--dry-run and --verify-resume are for one process: leave out mpirun");
    }
    if let Some(steps) = args.verify_resume {
        let verified = verify_resume(&settings, steps, &say)?;
        let human = format!(
            "{steps} steps with a break in the middle are those without one, bit for bit: {} tensors of {} numbers",
            HumanCount(verified.tensors as u64),
            HumanCount(verified.numbers as u64)
        );
        return say.result(human, &verified);
    }
    if world.leads() {
        output::check(&args.output, asked, &settings)?;
    }
    if args.settings.checkpoint_activations && !device.is_cpu() {
        bail_unusable!("--checkpoint-activations works with --device cpu; here, try a smaller --batch-size");
    }
    let (task, records, training, seed) = (&*args.task, &args.records, &args.training, args.settings.seed);
    let divided = args.split.divide(&Whole { task, train: &train, records, training, seed })?;
    // a dry run writes nothing
    let cache = (!args.no_cache && !args.dry_run).then(|| Cache::of_user(say)).flatten();
    let job = Job { cache: cache.as_ref(), ..job };
    let job = match &divided {
        Some(divided) => Job { train: &divided.train, eval: divided.eval.as_ref().or(job.eval), ..job },
        None => job,
    };
    divided.iter().flat_map(|divided| &divided.told).for_each(|text| say.line(text));
    let (how, _) = Task::reading_of(&args.task, &args.records)?;
    let mut stream = Stream::of(&job, &how);
    let first = stream.as_mut().map(Stream::first).transpose()?;
    let job = match &first {
        // what is passed by once is not worth keeping
        Some(first) => Job { train: first, cache: None, ..job },
        None => job,
    };
    let mut prepared = Prepared::new(&job, &device, &say)?;
    if let Some(stream) = &mut stream {
        stream.check(&job, &prepared.learning.task, &say)?;
    }
    if args.dry_run {
        return dry_run(args, &job, &prepared, stream.as_ref(), &device, &say);
    }
    prepared.describe(&job, &say);
    let _held = match world.leads() {
        true => output::start(&args.output, asked, &settings, prepared.inputs(&job, world)?)?,
        false => None,
    };
    world.meet()?; // what a killed run has left is gone now
    prepared.be_taught(&device, job.cache, &say)?;

    let Prepared { config, learning, params, eval, .. } = &prepared;
    let Learning { task, examples: train, .. } = learning;
    let (tokenizer, max_length) = (&learning.tokenizer, args.settings.max_length);
    let encoder = Encoder { records, training, tokenizer, max_length };
    let run = Run {
        settings: &args.settings,
        family: &config.family,
        task,
        params,
        device: &device,
        train,
        streamed: stream.map(|stream| Streamed { stream, encoder }),
        eval,
        folder: &Folder::of(&args.output),
        say,
        tokenizer,
        world,
        stopped: process::stop_signal(),
        stop_at: args.stop_at,
    };
    let outcome = run.go(args.resume)?;
    match outcome.end {
        End::Finished => {}
        End::StopAt => return Ok(()),
        End::Stopped(signal) => {
            let message = format!(
                "stopped at step {} behind a checkpoint; `tk train --resume --output {}` goes on from there",
                outcome.progress.step,
                args.output.display()
            );
            return Err(Stopped { signal, message }.into());
        }
    }
    if !world.leads() {
        return Ok(());
    }
    if let Some(best) = &outcome.progress.best {
        prepared.tune(&best.measured(), &say);
    }
    report::remove(&args.output)?; // an earlier model's
    output::write_model(&args.output, &prepared, &args.settings)?;
    let best = prepared.learning.task.deciding_metric(args.settings.best_metric.as_deref())?;
    tell_outcome(args, &outcome, best, &say)
}

impl Args {
    /// Refuses what no look into a file is needed for; the files of records that are named.
    pub fn looked_at(&self) -> Result<Vec<PathBuf>> {
        let (train, eval) = self.files()?;
        self.check(&self.job(&train, eval.as_ref()))?;
        Ok([&train].into_iter().chain(&eval).flat_map(Files::paths).cloned().collect())
    }

    fn check(&self, job: &Job) -> Result<()> {
        self.settings.check()?;
        job.check()?;
        self.split.check()
    }

    fn files(&self) -> Result<(Files, Option<Files>)> {
        let named = |names| Files::named(names, self.records.reading.format);
        let eval = if self.eval.is_empty() { None } else { Some(named(&self.eval)?) };
        Ok((named(&self.train)?, eval))
    }

    fn job<'a>(&'a self, train: &'a Files, eval: Option<&'a Files>) -> Job<'a> {
        Job {
            task: &self.task,
            model: &self.model,
            train,
            eval,
            from_scratch: self.from_scratch,
            records: &self.records,
            training: &self.training,
            settings: &self.settings,
            cache: None,
        }
    }
}

fn dry_run(
    args: &Args,
    job: &Job,
    prepared: &Prepared,
    stream: Option<&Stream>,
    device: &Device,
    say: &Say,
) -> Result<()> {
    let found = DryRun::new(job, prepared, stream, device)?;
    say.result(found.told(), &found)?;
    match found.warnings.len() {
        count if args.strict && count > 0 => {
            let warnings = if count == 1 { "warning" } else { "warnings" };
            bail_unusable!("--strict: {count} {warnings}, see above")
        }
        _ => Ok(()),
    }
}

fn tell_outcome(args: &Args, outcome: &Outcome, best: Metric, say: &Say) -> Result<()> {
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
        HumanCount(progress.tokens),
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
            "epochs": (outcome.epochs * 100.0).round() / 100.0,
            "steps": progress.step,
            "train_loss": progress.loss_sum / progress.step.max(1) as f64,
            "eval": metrics,
            "best_metric": best.name,
            "more_is_better": best.more_is_better,
            "peak_rss_bytes": peak,
        }),
    )
}
