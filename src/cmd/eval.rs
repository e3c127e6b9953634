//! `tk eval`: a trained model and labelled records → the task's metrics.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::data::records::Files;
use crate::eager::Evaluator;
use crate::onnx::Precision;
use crate::predict::{Options, Predictor, graphs};
use crate::runtime::{EpFlags, Slots};
use crate::saved::{Saved, TaskFlag, cut};
use crate::say::Say;
use crate::task::causal_lm::Completions;
use crate::task::{AnswerFlags, CausalLm, RecordFlags};
use crate::{Result, bail_unusable, device, generate, process};

/// Measure a trained model on labelled records.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    /// Labelled records: a file, a folder of files, or a pattern ('data/*.jsonl'). Several files are measured as one.
    #[arg(long, value_name = "FILE", required = true)]
    input: Vec<PathBuf>,
    /// What computes the logits: candle, or ONNX Runtime on what `tk export` wrote.
    #[arg(long, value_enum, default_value_t = MeasuredIn::Eager)]
    runtime: MeasuredIn,
    /// Tokens of the longest example [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Where candle computes: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(flatten)]
    ep: EpFlags,
    /// Which of the exported graphs ONNX Runtime runs: fp32, fp16 or int8, and of a language model fp32, fp16, q8
    /// or q4. With --ep openvino also bf16.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Of a language model that is measured in ONNX Runtime: tokens of the text that is generated behind each prompt, for
    /// rouge_l and chrf, at most [default: 128].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: Option<u32>,
    #[command(flatten)]
    records: RecordFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MeasuredIn {
    Eager,
    Onnx,
}

/// Measures and prints.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let saved = Saved::open_for(&args.dir, &args.task)?;
    if args.precision != Precision::Fp32 && args.runtime == MeasuredIn::Eager {
        bail_unusable!("--precision {} is of exported graphs: give --runtime onnx", args.precision);
    }
    graphs::check_precision(&saved, args.precision)?;
    let providers = args.ep.providers(args.precision)?;
    let max_length = saved.checked_max_length(args.max_length)?;
    let input = Files::named(&args.input, args.records.reading.format)?;
    let examples = saved.examples(&input, &args.records, max_length, say)?;
    let completions = completions(args, &saved, &input, say)?;
    let started = Instant::now();
    let measured = match args.runtime {
        MeasuredIn::Eager => Evaluator::open(&saved, &device::open(&args.device)?)?.measure(&examples)?,
        MeasuredIn::Onnx if saved.task.language_model().is_some() => {
            let providers = generate::providers(&args.ep, args.precision, say)?;
            let graph = graphs::checked_generating(&saved, args.precision)?;
            let mut slots = Slots::open(&graph, &providers, process::cores(), say)?;
            let mut measured = saved.task.measure_in_place(&mut slots, &examples)?;
            if let Some(completions) = completions {
                measured.metrics.extend(completions.measure(slots, say)?);
            }
            measured
        }
        MeasuredIn::Onnx => {
            let flags = &AnswerFlags::default();
            let (threads, batch_tokens, max_length) = (process::cores(), None, Some(max_length));
            let options = Options { providers: &providers, threads, batch_tokens, max_length, flags };
            Predictor::open(&saved, args.precision, &options, say)?.measure(&examples)?
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let shown: Vec<String> =
        measured.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    let human = format!("{input}: {} examples in {seconds:.1} s; {}", examples.len(), shown.join("  "));
    say.result(
        human,
        &json!({"records": examples.len(), "truncated": cut(&examples), "seconds": seconds, "metrics": measured}),
    )
}

/// What is generated and measured beside the losses of a language model; none where it is none, or has no prompts.
fn completions<'a>(
    args: &Args,
    saved: &'a Saved,
    files: &'a Files,
    say: Say,
) -> Result<Option<Completions<'a>>> {
    let documents = match saved.task.language_model() {
        Some(_) => CausalLm::prompted(files, &args.records, say)?,
        None => Vec::new(),
    };
    let max_new_tokens = args.max_new_tokens.map(|most| most as usize);
    let lm = saved.task.language_model().filter(|_| !documents.is_empty());
    match lm {
        Some(lm) if args.runtime == MeasuredIn::Onnx => {
            // what training cut texts at doesn't bound what is written
            let most = saved.config.max_positions();
            let positions = saved.checked_max_length(args.max_length.or(Some(most)))?;
            Ok(Some(Completions { saved, lm, files, documents, positions, max_new_tokens }))
        }
        _ if max_new_tokens.is_some() => bail_unusable!(
            "--max-new-tokens is of the texts that a language model generates behind prompts, with --runtime onnx"
        ),
        Some(_) => {
            say.line(
                "rouge_l and chrf are of generated texts: --runtime onnx measures them, of an exported model",
            );
            Ok(None)
        }
        None => Ok(None),
    }
}
