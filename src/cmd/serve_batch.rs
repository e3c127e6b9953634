//! `tk serve-batch`: records → predictions through ONNX Runtime, a line for a line.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};

use super::export::Precision;
use crate::data::batch::Encoding;
use crate::data::records::{self, Format, Source};
use crate::runtime::Providers;
use crate::saved::Saved;
use crate::say::{Say, peak_rss_bytes};
use crate::serve::output::{Done, Output};
use crate::serve::window::{Window, Windows};
use crate::serve::{Pool, served};
use crate::task::TextClassification;
use crate::task::examples::TextColumns;
use crate::{Result, bail_unusable, checkpoint};

/// Predict for a file of records through ONNX Runtime: one output line for each input line, in order.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory, exported by `tk export`.
    dir: PathBuf,
    /// Records: .jsonl, .json, .csv, .tsv, .parquet or .txt; - reads standard input.
    #[arg(long, value_name = "FILE|-")]
    input: String,
    /// Where the predictions go, as JSON lines; - writes standard output.
    #[arg(long, value_name = "FILE|-", default_value = "-")]
    output: String,
    /// The input's format, where its name does not tell [default for standard input: jsonl].
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// What computes: auto, or cpu, cuda, tensorrt; a list takes the first that can be had.
    #[arg(long, value_name = "LIST", default_value = "auto")]
    ep: Providers,
    /// Which of the exported graphs.
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// Write the logits too, in the order of id2label.
    #[arg(long)]
    logits: bool,
    /// Tokens of the longest record; longer ones are cut [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Padded tokens of a batch [default: 256 on a CPU, 16384 on a GPU].
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    batch_tokens: Option<u64>,
    /// Records that are sorted by length and batched together.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = at_least_one())]
    window: u64,
    /// Threads that compute, each with a session and a copy of the weights of its own [default: the cores].
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    threads: Option<u64>,
    /// Stop at the first record that can't be used, with exit code 2.
    #[arg(long)]
    strict: bool,
    /// Go on with a run that was killed: the same bytes as if it had not been.
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    texts: TextColumns,
    /// The column that is carried over as id [default: id].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    id_column: Option<String>,
}

fn at_least_one() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..)
}

/// Reads, tokenizes and predicts window by window, and writes in the order of the input.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let Precision::Fp32 = args.precision;
    let source = Source::of(&args.input);
    let target = (args.output != "-").then(|| PathBuf::from(&args.output));
    check_streams(args, &source, target.as_deref(), say)?;
    let saved = Saved::open(&args.dir)?;
    let task = saved.task.text_classification("serve-batch")?.clone();
    let max_length = saved.checked_max_length(args.max_length)?;
    saved.tokenizer.encode("", Some("a pair"), max_length)?; // room for the special tokens
    let model = served::checked(&saved)?;
    let rows = records::read(&source, args.format)?;
    let threads = args
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |n| n as usize);
    let batch_tokens = args.batch_tokens.map(|n| n as usize);
    let mut pool = Pool::open(&model, &args.ep, threads, batch_tokens, saved.tokenizer.pad_id(), say)?;

    let size = args.window as usize;
    let (mut output, done) = match &target {
        None => (Output::Stdout, Done::default()),
        Some(target) => {
            let settings = settings(args, &source, &model, &pool, max_length)?;
            open(target, &settings, size, args.resume, say)?
        }
    };
    let columns = args.texts.columns().with("id", args.id_column.clone());
    let mut windows = Windows {
        rows,
        source: source.to_string(),
        columns,
        tokenizer: saved.tokenizer,
        max_length,
        size,
        strict: args.strict,
        read: 0,
    };
    windows.pass_over(done.records)?;

    let mut progress = Progress::new(done, say)?;
    for window in prefetched(windows) {
        let answered = window.and_then(|window| {
            let lines = answers(&window, &task, &mut pool, args.logits, &mut progress)?;
            output.write(&lines)
        });
        if let Err(error) = answered {
            // a refused input changes nothing; work that failed can be resumed
            if crate::error::exit_code(&error) == 2 && !args.resume {
                output.discard()?;
            }
            return Err(error);
        }
        progress.show();
    }
    output.finish()?;
    progress.finish(&pool, target.as_deref())
}

fn check_streams(args: &Args, source: &Source, target: Option<&Path>, say: Say) -> Result<()> {
    match target {
        None if say.json => {
            bail_unusable!(
                "--json prints the result on standard output, where the predictions go: give --output FILE"
            )
        }
        None if args.resume => bail_unusable!("--resume goes on with a file: give --output FILE"),
        None => return Ok(()),
        Some(_) if args.resume && *source == Source::Stdin => {
            bail_unusable!("--resume reads the input again from its start: give --input FILE")
        }
        Some(target) => {
            if let Source::Path(input) = source
                && let (Ok(input), Ok(output)) = (input.canonicalize(), target.canonicalize())
                && input == output
            {
                bail_unusable!("--output {} is the input: give another name", target.display());
            }
        }
    }
    Ok(())
}

/// Everything that the bytes of the output depend on.
fn settings(args: &Args, source: &Source, model: &Path, pool: &Pool, max_length: usize) -> Result<Value> {
    let input = match source {
        Source::Stdin => json!("standard input"),
        Source::Path(path) => {
            let about = path.metadata().with_context(|| path.display().to_string())?;
            let modified = about.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            json!({"path": path.canonicalize()?, "bytes": about.len(), "modified": modified.as_secs_f64()})
        }
    };
    Ok(json!({
        "tk_version": env!("CARGO_PKG_VERSION"),
        "model_sha256": checkpoint::file_hash(model)?,
        "input": input,
        "format": args.format.map(|format| format!("{format:?}")),
        "columns": [&args.texts.text_column, &args.texts.text_pair_column, &args.id_column],
        "provider": pool.provider().name(),
        "logits": args.logits,
        "max_length": max_length,
        "batch_tokens": pool.batch_tokens(),
        "window": args.window,
    }))
}

fn open(target: &Path, settings: &Value, window: usize, resume: bool, say: Say) -> Result<(Output, Done)> {
    if resume {
        if let Some((output, done)) = Output::resume(target, settings, window)? {
            say.line(format!("{}: going on behind record {}", target.display(), done.records));
            return Ok((output, done));
        }
        say.line(format!("{}: nothing was begun, so nothing is resumed", target.display()));
    } else if Output::is_begun(target) {
        say.warn(format!(
            "{}: an earlier run was not finished; starting over (--resume would have gone on)",
            target.display()
        ));
    }
    Ok((Output::begin(target, settings)?, Done::default()))
}

/// Reads and tokenizes the next window while this one is computed. The thread is not waited for: it may stand
/// in a read of standard input when the work is over.
fn prefetched(windows: Windows) -> mpsc::IntoIter<Result<Window>> {
    let (send, receive) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        for window in windows {
            let last = window.is_err();
            if send.send(window).is_err() || last {
                break;
            }
        }
    });
    receive.into_iter()
}

/// A window's lines.
fn answers(
    window: &Window,
    task: &TextClassification,
    pool: &mut Pool,
    with_logits: bool,
    progress: &mut Progress,
) -> Result<Vec<u8>> {
    let encodings: Vec<&Encoding> = window.entries.iter().flat_map(|entry| &entry.encoding).collect();
    let mut logits = pool.logits(&encodings)?.into_iter();
    let mut lines = Vec::new();
    for entry in &window.entries {
        let mut record = entry.key.record();
        let answer = match &entry.encoding {
            Err(error) => Err(error.clone()),
            Ok(_) => {
                let row = logits.next().context("fewer results than records")?;
                if row.iter().all(|x| x.is_finite()) {
                    Ok(task.prediction(&row, with_logits))
                } else {
                    Err(format!("the model's logits are not finite: {row:?}"))
                }
            }
        };
        progress.records += 1;
        match answer {
            Ok(answer) => record.extend(answer),
            Err(error) => {
                progress.errors += 1;
                record.insert("error".to_owned(), json!(error));
            }
        }
        serde_json::to_writer(&mut lines, &record)?;
        lines.push(b'\n');
    }
    progress.tokens += encodings.iter().map(|encoding| encoding.len()).sum::<usize>();
    progress.truncated += encodings.iter().filter(|encoding| encoding.truncated).count();
    Ok(lines)
}

/// What was done so far, and the telling of it.
struct Progress {
    say: Say,
    bar: indicatif::ProgressBar,
    started: Instant,
    told: Instant,
    /// Answered by the run that was killed.
    before: Done,
    records: usize,
    errors: usize,
    tokens: usize,
    /// Records that were cut to the maximum length.
    truncated: usize,
}

/// How often a line is written where there is no terminal.
const TELL_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    fn new(before: Done, say: Say) -> Result<Self> {
        let bar = say.bar(0, "{spinner} {pos} records  {msg}  {elapsed}")?;
        let now = Instant::now();
        Ok(Self { say, bar, started: now, told: now, before, records: 0, errors: 0, tokens: 0, truncated: 0 })
    }

    fn rates(&self) -> (f64, f64) {
        let seconds = self.started.elapsed().as_secs_f64();
        (self.records as f64 / seconds, self.tokens as f64 / seconds)
    }

    fn show(&mut self) {
        let (records, tokens) = self.rates();
        let text = format!("{records:.0} records/s  {tokens:.0} tokens/s");
        self.bar.set_position((self.before.records + self.records) as u64);
        self.bar.set_message(text.clone());
        if !std::io::stderr().is_terminal() && self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            self.say.line(format!("{} records  {text}", self.before.records + self.records));
        }
    }

    fn finish(self, pool: &Pool, target: Option<&Path>) -> Result<()> {
        self.bar.finish_and_clear();
        let seconds = self.started.elapsed().as_secs_f64();
        let (records_per_second, tokens_per_second) = self.rates();
        let (records, errors) = (self.before.records + self.records, self.before.errors + self.errors);
        self.say.line(format!(
            "{records} records, {errors} of them errors, {} cut to the maximum length, {seconds:.1} s: \
             {records_per_second:.0} records/s, {tokens_per_second:.0} tokens/s on {}{}",
            self.truncated,
            pool.provider().name(),
            target.map(|target| format!(" → {}", target.display())).unwrap_or_default()
        ));
        let result = json!({
            "records": records,
            "errors": errors,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "seconds": seconds,
            "records_per_second": records_per_second,
            "tokens_per_second": tokens_per_second,
            "provider": pool.provider().name(),
            "resumed_records": self.before.records,
            "peak_rss_bytes": peak_rss_bytes(),
        });
        self.say.result("", &result)
    }
}
