//! `tk serve-batch`: records → predictions through ONNX Runtime, a line for a line.

mod generate;
mod progress;

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::checkpoint;
use crate::data::records::{self, Columns, How, Source};
use crate::files::Destination;
use crate::onnx::Precision;
use crate::predict::chunks::{Chunk, Chunks, Make, ReadAhead};
use crate::predict::matrix::{Matrix, MatrixFile};
use crate::predict::shard::Shard;
use crate::predict::sink::{self, Done, Sink};
use crate::predict::{Asked, Options, Predictor};
use crate::runtime::{EpFlags, Provider};
use crate::saved::{Saved, TaskFlag};
use crate::say::Say;
use crate::task::{Answer, AnswerFlags, Task};
use crate::{Result, bail_unusable, process};
use progress::ServeProgress;

/// Predict for a file of records through ONNX Runtime: one output line for each input line, in order.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory, exported by `tk export`.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    /// Records: .jsonl, .json, .csv, .tsv, .parquet or .txt, packed or not (.jsonl.gz, .csv.zst); - reads standard input.
    #[arg(long, value_name = "FILE|-")]
    input: String,
    /// Where the predictions go, as JSON lines; - writes standard output. A link is followed; a pipe or a device is
    /// written to as it is. Embeddings are written as a matrix to a name that ends in .npy or .parquet.
    #[arg(long, value_name = "FILE|-", default_value = "-")]
    output: String,
    #[command(flatten)]
    ep: EpFlags,
    /// Which of the exported graphs: fp32, fp16 or int8, and for language models fp32, fp16, q8 or q4; with --ep openvino
    /// also bf16.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Tokens of the longest record; longer ones are cut [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Padded tokens of a batch [default: 256 on a CPU, 16384 on a GPU].
    #[arg(long, value_name = "N", value_parser = from_one_to(u64::MAX))]
    batch_tokens: Option<u64>,
    /// Records that are read, answered and written together [default: 4096, 256 where texts are generated].
    #[arg(long, value_name = "N", value_parser = from_one_to(LARGEST_WINDOW))]
    window: Option<u64>,
    /// Answer one of N parts alone, the I-th from 0: whole windows of records, with the places that they have in the
    /// whole input. The outputs of all parts, one behind the other, are those of one run.
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Threads that compute; but for texts that are generated, each runs batches of its own [default: the cores].
    #[arg(long, value_name = "N", value_parser = from_one_to(MOST_THREADS))]
    threads: Option<u64>,
    /// Stop at the first record that can't be used, with exit code 2.
    #[arg(long)]
    strict: bool,
    /// Go on with a run that was killed: the same bytes as if it had not been.
    #[arg(long)]
    resume: bool,
    /// The column that is carried over as id [default: id].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    id_column: Option<String>,
    #[command(flatten)]
    flags: AnswerFlags,
}

/// Records that are sorted by length and batched together.
const WINDOW: u64 = 4096;

/// A window is held in memory.
const LARGEST_WINDOW: u64 = 1_000_000;

/// Each has a session.
const MOST_THREADS: u64 = 1024;

fn from_one_to(most: u64) -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=most)
}

/// Reads, tokenizes and predicts window by window, and writes in the order of the input.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let target = match args.output.as_str() {
        "-" => Destination::STDOUT,
        path => Destination::of(Path::new(path))?,
    };
    let mut job = BatchRun { args, source: Source::of(&args.input), target, matrix: None, say };
    job.check_streams()?;
    let saved = Saved::open_for(&args.dir, &args.task)?;
    args.flags.check(saved.task.name())?;
    job.matrix = job.matrix_of(&saved.task)?;
    match saved.task.language_model() {
        Some(lm) => generate::run(&job, &saved, lm),
        None => predict(&job, &saved),
    }
}

/// Answers every record in one pass of the model.
fn predict(job: &BatchRun, saved: &Saved) -> Result<()> {
    let args = job.args;
    let predictor = Predictor::open(
        saved,
        args.precision,
        &Options {
            providers: &args.ep.providers(args.precision)?,
            threads: job.threads(),
            batch_tokens: args.batch_tokens.map(|n| n as usize),
            max_length: args.max_length,
            flags: &args.flags,
        },
        job.say,
    )?;
    let settings = json!({
        "model_sha256": checkpoint::file_hash(predictor.graph())?,
        "provider": predictor.provider().name(),
        "precision": args.precision.name(),
        "tf32": args.ep.tf32(),
        "max_length": predictor.max_length(),
        "batch_tokens": predictor.batch_tokens(),
    });
    let make = Box::new(predictor.reader());
    job.answer(predictor, make, saved.task.columns(&args.flags), job.window(WINDOW), settings)
}

/// Answers records.
trait Work {
    /// What is made of a record.
    type Item: Send;

    fn provider(&self) -> Provider;

    /// An answer for each item, or what is wrong with it; counts tokens.
    fn answers(&mut self, items: &[&Self::Item], progress: &mut ServeProgress) -> Result<Vec<Answer>>;
}

impl Work for Predictor {
    type Item = Asked;

    fn provider(&self) -> Provider {
        Self::provider(self)
    }

    fn answers(&mut self, asked: &[&Asked], progress: &mut ServeProgress) -> Result<Vec<Answer>> {
        let answers = Self::answers(self, asked)?;
        progress.tokens += asked.iter().map(|asked| asked.tokens()).sum::<usize>();
        progress.truncated += asked.iter().filter(|asked| asked.truncated()).count();
        Ok(answers)
    }
}

/// A run of the command.
struct BatchRun<'a> {
    args: &'a Args,
    source: Source,
    target: Destination,
    /// What the file becomes, where not JSON lines.
    matrix: Option<MatrixFile>,
    say: Say,
}

impl BatchRun<'_> {
    fn threads(&self) -> usize {
        self.args.threads.map_or_else(process::cores, |n| n as usize)
    }

    /// Records of a window.
    fn window(&self, default: u64) -> usize {
        self.args.window.unwrap_or(default) as usize
    }

    /// Answers every record of the input, of which `columns` are read; `settings` is what the bytes of the output depend
    /// on, beside the input and the flags.
    fn answer<W: Work>(
        &self,
        mut work: W,
        make: Make<W::Item>,
        columns: Columns,
        size: usize,
        settings: Value,
    ) -> Result<()>
    where
        W::Item: 'static,
    {
        let args = self.args;
        let how = How { untagged: true, ..args.flags.reading.how() };
        let part = self.part(&how, size)?;
        let rows = records::read(&self.source, &how)?;
        let (mut output, done) = match &self.target {
            Destination::File(target) => {
                open(target, &self.settings(size, settings)?, size, args.resume, self.say)?
            }
            stream => (Sink::stream(stream)?, Done::default()),
        };
        let columns = columns.with("id", args.id_column.clone());
        let source = self.source.to_string();
        let until = part.as_ref().map(|part| part.end);
        let first = part.map_or(0, |part| part.start);
        let mut chunks = Chunks { rows, source, columns, make, size, strict: args.strict, read: 0, until };
        chunks.pass_over(first + done.records)?;

        let shown = (self.target != Destination::STDOUT).then(|| args.output.clone());
        let mut progress = ServeProgress::new(done, shown, self.say)?;
        for chunk in ReadAhead::start(chunks)? {
            let answered = chunk.and_then(|chunk| {
                let rows_only = self.matrix.is_some();
                output.write(&lines(&chunk, &mut work, rows_only, &mut progress)?)
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
        output.finish(self.matrix.map(|matrix| MatrixFile { first, ..matrix }))?;
        let errors = done.errors + progress.errors;
        if let (Some(MatrixFile { form: Matrix::Npy, .. }), 1..) = (self.matrix, errors) {
            let output = &args.output;
            self.say.warn(format!(
                "{output}: {errors} rows are NaN, of records that can't be used; a name that ends in .parquet or .jsonl keeps why"
            ));
        }
        progress.finish(work.provider())
    }

    /// The records that `--shard` asks for; none where all are answered.
    fn part(&self, how: &How, window: usize) -> Result<Option<Range<usize>>> {
        let (Some(shard), Source::Path(input)) = (self.args.shard, &self.source) else { return Ok(None) };
        let count = records::count(input, how)?;
        let part = shard.records(count, window);
        self.say.line(if part.is_empty() {
            format!("part {shard} is empty: {} has {} windows", input.display(), count.div_ceil(window))
        } else {
            format!("part {shard}: {} records from {} on, of {count}", part.len(), part.start)
        });
        Ok(Some(part))
    }

    /// What the output's name asks for beside JSON lines.
    fn matrix_of(&self, task: &Task) -> Result<Option<MatrixFile>> {
        let output = &self.args.output;
        let Some(form) = Matrix::of(output) else { return Ok(None) };
        let Some(width) = task.row_width(&self.args.flags) else {
            bail_unusable!(
                "--output {output}: a matrix holds embeddings, and the answers of {} are JSON lines: give a name that ends \
                 in .jsonl",
                task.name()
            );
        };
        if !matches!(self.target, Destination::File(_)) {
            bail_unusable!("--output {output}: a matrix is written to a file, and this is none");
        }
        Ok(Some(MatrixFile { form, width, first: 0 }))
    }

    fn check_streams(&self) -> Result<()> {
        let (args, source) = (self.args, &self.source);
        let is_stream = match source {
            Source::Stdin => true,
            Source::Path(input) => input.exists() && !input.is_file(),
        };
        if let (Some(shard), true) = (args.shard, is_stream) {
            bail_unusable!(
                "--shard {shard} counts the records before it reads them, and --input {} is no file: give --input FILE, or \
                 split the stream and leave --shard out",
                args.input
            );
        }
        let file = match &self.target {
            Destination::File(file) => file,
            &Destination::STDOUT if self.say.json => {
                bail_unusable!(
                    "--json prints the result on standard output, where the predictions go: give --output FILE"
                )
            }
            &Destination::STDOUT if args.resume => {
                bail_unusable!("--resume goes on with a file: give --output FILE")
            }
            stream if args.resume => bail_unusable!(
                "--resume goes on with a file, and --output {stream} is none, it keeps nothing: give --output FILE"
            ),
            _ => return Ok(()),
        };
        match source {
            Source::Stdin if args.resume => {
                bail_unusable!("--resume reads the input again from its start: give --input FILE")
            }
            Source::Path(input) if args.resume && input.exists() && !input.is_file() => bail_unusable!(
                "--resume reads the input again from its start, and --input {} is a pipe or a device: give --input FILE",
                input.display()
            ),
            Source::Stdin => {}
            Source::Path(input) => {
                let own = [&[file.clone()][..], &sink::names(file)].concat();
                let is_input = |path: &PathBuf| match (input.canonicalize(), path.canonicalize()) {
                    (Ok(input), Ok(path)) => input == path,
                    _ => false,
                };
                if own.iter().any(is_input) {
                    bail_unusable!("--output {} would write over the input: give another name", args.output);
                }
            }
        }
        Ok(())
    }

    /// Everything that the bytes of the output depend on.
    fn settings(&self, window: usize, work: Value) -> Result<Value> {
        let input = match &self.source {
            Source::Stdin => json!("standard input"),
            Source::Path(path) if !path.is_file() => json!({"path": path}), // a pipe, which can't be read again
            Source::Path(path) => {
                let place = || path.display().to_string();
                let about = path.metadata().with_context(place)?;
                let modified = about.modified().with_context(place)?;
                let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                let path = path.canonicalize().with_context(place)?;
                json!({"path": path, "bytes": about.len(), "modified": modified.as_secs_f64()})
            }
        };
        let mut settings = json!({
            "tk_version": env!("CARGO_PKG_VERSION"),
            "input": input,
            "flags": self.args.flags,
            "id_column": self.args.id_column,
            "window": window,
        });
        if let (Some(settings), Value::Object(work)) = (settings.as_object_mut(), work) {
            settings.extend(work);
            settings.extend(self.args.shard.map(|shard| ("shard".to_owned(), json!(shard.to_string()))));
        }
        Ok(settings)
    }
}

fn open(target: &Path, settings: &Value, window: usize, resume: bool, say: Say) -> Result<(Sink, Done)> {
    if resume {
        if let Some((output, done)) = Sink::resume(target, settings, window)? {
            say.line(format!("{}: going on behind record {}", target.display(), done.records));
            return Ok((output, done));
        }
        say.line(format!("{}: nothing was begun, so nothing is resumed", target.display()));
    } else if Sink::is_begun(target) {
        say.warn(format!(
            "{}: an earlier run was not finished; starting over (--resume would have gone on)",
            target.display()
        ));
    }
    Ok((Sink::begin(target, settings)?, Done::default()))
}

/// A chunk's lines.
///
/// # Errors
/// Unusable: a record's answer is no embedding, where `rows_only` are asked for.
fn lines<W: Work>(
    chunk: &Chunk<W::Item>,
    work: &mut W,
    rows_only: bool,
    progress: &mut ServeProgress,
) -> Result<Vec<u8>> {
    let items: Vec<&W::Item> = chunk.entries.iter().filter_map(|entry| entry.item.as_ref().ok()).collect();
    let mut answers = work.answers(&items, progress)?.into_iter();
    let mut lines = Vec::new();
    for entry in &chunk.entries {
        let mut record = Map::new();
        let answer = match &entry.item {
            Err(error) => Err(error.clone()),
            Ok(_) => answers.next().context("fewer answers than records")?,
        };
        progress.records += 1;
        match answer {
            Ok(answer) if rows_only && !answer.contains_key("embedding") => bail_unusable!(
                "record {}: a matrix has a row for a text, and this record has two: give an --output that ends in .jsonl",
                entry.key
            ),
            Ok(answer) => record.extend(answer),
            Err(error) => {
                progress.errors += 1;
                record.insert("error".to_owned(), json!(error));
            }
        }
        lines.extend(entry.key.answer(&record).bytes());
        lines.push(b'\n');
    }
    anyhow::ensure!(answers.next().is_none(), "more answers than records");
    Ok(lines)
}
