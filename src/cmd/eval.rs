//! `tk eval`: a trained model and labelled records → the task's metrics.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::eager::Evaluator;
use crate::onnx::Precision;
use crate::runtime::{Providers, Slots};
use crate::saved::Saved;
use crate::say::Say;
use crate::serve::{Pool, served};
use crate::task::examples::{self, Fields};
use crate::task::{Example, Form, Task};
use crate::{Result, bail_unusable, device, generate};

/// Measure a trained model on labelled records.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory.
    dir: PathBuf,
    /// Labelled records.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// What computes the logits: candle, or ONNX Runtime on what `tk export` wrote.
    #[arg(long, value_enum, default_value_t = Runtime::Eager)]
    runtime: Runtime,
    /// Tokens of the longest example [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Where candle computes: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What ONNX Runtime runs on: auto, or a list of cpu, cuda and tensorrt in order of preference.
    #[arg(long, default_value = "auto", value_name = "LIST")]
    ep: Providers,
    /// Which of a language model's exported graphs ONNX Runtime runs.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    #[command(flatten)]
    fields: Fields,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Runtime {
    Eager,
    Onnx,
}

/// Measures and prints.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let saved = Saved::open(&args.dir)?;
    let in_blocks = args.precision != Precision::Fp32;
    if in_blocks && (args.runtime == Runtime::Eager || saved.task.form() == Form::Whole) {
        bail_unusable!("--precision {} is for language models and --runtime onnx", args.precision);
    }
    args.fields.check_unit(matches!(saved.task, Task::CausalLm(_)), [args.input.as_path()].into_iter())?;
    let max_length = saved.checked_max_length(args.max_length)?;
    let examples =
        examples::load(&args.input, &args.fields, &saved.task, &saved.tokenizer, max_length, false)?;
    let cut = examples.iter().filter(|example| example.encoding.truncated).count();
    if cut > 0 {
        let all = examples.len();
        say.warn(format!("{cut} of {all} examples are longer than --max-length {max_length} and are cut"));
    }
    let started = Instant::now();
    let measured = match args.runtime {
        Runtime::Eager => Evaluator::open(&saved, &device::open(&args.device)?)?.measure(&examples)?,
        Runtime::Onnx => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            match &saved.task {
                Task::TextClassification(_) | Task::TokenClassification(_) => {
                    let graph = served::checked(&saved)?;
                    let mut pool = Pool::open(&saved, &graph, &args.ep, threads, None, say)?;
                    let (encodings, targets) = Example::apart(&examples);
                    saved.task.measure_outputs(&pool.outputs(&encodings)?, &targets)?
                }
                Task::CausalLm(_) => {
                    super::generation::on_cpu(&args.ep)?;
                    let graph = served::checked_generating(&saved, args.precision)?;
                    generate::measure(&mut Slots::open(&graph, threads, say)?, &examples)?.into()
                }
            }
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let shown: Vec<String> =
        measured.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    let human = format!(
        "{}: {} examples in {seconds:.1} s; {}",
        args.input.display(),
        examples.len(),
        shown.join("  ")
    );
    say.result(
        human,
        &json!({"records": examples.len(), "truncated": cut, "seconds": seconds, "metrics": measured}),
    )
}
