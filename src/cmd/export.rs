//! `tk export`: a trained model → `onnx/model.onnx` beside it, once ONNX Runtime has given the same logits.

use std::path::{Path, PathBuf};

use crate::export::Export;
use crate::onnx::{DEFAULT_BLOCK, DEFAULT_OPSET, LARGEST_BLOCK, LEAST_BLOCK, Precision, checked_opset};
use crate::saved::{Saved, TaskFlag};
use crate::say::Say;
use crate::task::{Encoder, Example, Form, RecordFlags, TrainingFlags};
use crate::{Result, bail_unusable};

/// Write a trained model as ONNX, and verify it: ONNX Runtime must give the trained model's logits.
///
/// A language model becomes two graphs of one set of weights: model.onnx with past_key_values, which the ecosystem
/// reads, and generate.onnx, which tk generates with.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory; DIR/onnx/ is written.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    /// The numbers that the matrices are stored in; q8 and q4 are for language models, as generate_q8.onnx and
    /// generate_q4.onnx.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// The version of ONNX's operators in model.onnx: 13 to 24; from 23 on attention is one operator.
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
    let saved = Saved::open_for(&args.dir, &args.task)?;
    check_usage(args, &saved)?;
    let export = Export::new(&saved, say)?;
    let exported = match args.precision {
        Precision::Fp32 => export.as_trained(args.opset, args.external_data)?,
        precision => {
            let examples = examples(args, &saved)?;
            export.in_blocks(precision, args.block_size, args.max_perplexity_increase, &examples)?
        }
    };
    say.result(exported.summary, &exported.manifest)
}

/// What a language model's blocks are measured on.
fn examples(args: &Args, saved: &Saved) -> Result<Vec<Example>> {
    let (tokenizer, max_length) = (&saved.tokenizer, saved.max_length);
    match &args.input {
        Some(input) => {
            let (records, training) = (&args.records, &TrainingFlags::default());
            saved.task.examples(input, &Encoder { records, training, tokenizer, max_length })
        }
        None => saved.task.generating("export --precision")?.builtin_examples(tokenizer, max_length),
    }
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
