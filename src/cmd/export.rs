//! `tk export`: a trained model → `onnx/model.onnx` beside it, once ONNX Runtime has given the same logits.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use crate::data::records::Files;
use crate::export::triton::TritonFlags;
use crate::export::{Export, Int8, merged};
use crate::onnx::{DEFAULT_BLOCK, DEFAULT_OPSET, LARGEST_BLOCK, LEAST_BLOCK, Precision, checked_opset};
use crate::predict::graphs;
use crate::runtime::{Provider, Providers};
use crate::saved::{Saved, TaskFlag};
use crate::say::Say;
use crate::task::{AnswerFlags, Encoder, Example, Form, RecordFlags, TrainingFlags};
use crate::{Result, bail_unusable};

/// Write a trained model as ONNX, and verify it: ONNX Runtime must give the trained model's logits.
///
/// A language model becomes two graphs of one set of weights: model.onnx with past_key_values, which the ecosystem
/// reads, and generate.onnx, which tk generates with. In fewer bits a graph is measured on records, and put in place if
/// it loses no more than is allowed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory; DIR/onnx/ is written.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    /// The numbers that the matrices are stored in: int8, as model_quantized.onnx; fp16, for GPUs, as model_fp16.onnx, or of a
    /// language model as generate_fp16.onnx; for language models also q8 and q4, as generate_q8.onnx and generate_q4.onnx.
    /// With bf16 and --ep openvino no graph is written: what model.onnx loses where OpenVINO computes it in bf16 is measured,
    /// and kept in the manifest.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// What the graph is for: cuda also writes model_optimized.onnx, with ONNX Runtime's own attention, which CUDA then runs in
    /// place of model.onnx; openvino is what computes in bf16.
    #[arg(long, value_name = "cuda|openvino")]
    ep: Option<Provider>,
    /// The version of ONNX's operators in model.onnx and model_quantized.onnx: 13 to 24; from 23 on attention is one operator.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_OPSET)]
    opset: i64,
    /// Write the weights beside the graph, into model.onnx_data (of int8, model_quantized.onnx_data); always done for a
    /// language model, whose two graphs share them, and above 1.9 GB.
    #[arg(long)]
    external_data: bool,
    /// What fewer bits are measured on: records as for `tk eval` [default: whether the answers to built-in texts are
    /// those of fp32; for language models a few built-in pages of English].
    #[arg(long, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Records as for `tk serve-batch`, on the first 512 of which int8 learns between what numbers the activations lie.
    /// Then they are rounded alike in every record (static), and no answer depends on the records beside it; without, they
    /// are rounded as they come (dynamic).
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// How many points of 100 the task's metric may lose in int8, fp16 or bf16 (of one that is better the lower it is: how
    /// many percent it may rise). In int8 the matrices that lose most stay in fp32 until it holds; where it can't, that is an error
    /// [default: 0.5].
    #[arg(long, value_name = "X")]
    max_metric_drop: Option<f64>,
    /// Numbers of q8's and q4's matrices that share a scale: 32, 64, 128 or 256. Larger blocks are faster, smaller
    /// ones closer to what was trained.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BLOCK)]
    block_size: usize,
    /// By how much q8, q4 and fp16 may raise a language model's perplexity, as a share of it; more is an error [default:
    /// 0.1, of fp16 0.01].
    #[arg(long, value_name = "X")]
    max_perplexity_increase: Option<f64>,
    /// Write no graph, but the model of a LoRA adapter as one of its own, merged into its base, in this new directory.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["precision", "ep", "opset", "external_data", "input", "calibration"])]
    merged: Option<PathBuf>,
    #[command(flatten)]
    records: RecordFlags,
    #[command(flatten)]
    triton: TritonFlags,
}

impl Args {
    /// What fewer bits are measured on, where it is given.
    fn files(&self) -> Result<Option<Files>> {
        (!self.input.is_empty()).then(|| Files::named(&self.input, self.records.reading.format)).transpose()
    }
}

/// Points of 100 that a metric may lose in fewer bits.
const MAX_METRIC_DROP: f64 = 0.5;

/// By which share a language model's perplexity may rise in fewer bits.
const MAX_PERPLEXITY_INCREASE: f64 = 0.1;

/// The same of fp16, which is to change next to nothing.
const MAX_PERPLEXITY_INCREASE_FP16: f64 = 0.01;

/// Builds, writes under a temporary name, verifies, and only then puts the graphs in place.
pub fn run(args: &Args, say: Say) -> Result<()> {
    checked_opset(args.opset)?;
    let saved = Saved::open_for(&args.dir, &args.task)?;
    check_usage(args, &saved)?;
    if let Some(to) = &args.merged {
        let worst = merged::write(&saved, to)?;
        let human =
            format!("{}: the merged model, its outputs within {worst:.1e} of the adapter's", to.display());
        return say.result(human, &json!({"path": to, "lora_max_abs": worst}));
    }
    // before the library is loaded
    let openvino = (args.precision == Precision::Bf16).then(Providers::openvino_in_bf16).transpose()?;
    let triton = args.triton.place(&saved, args.precision)?;
    let export = Export::new(&saved, say)?;
    let examples = || -> Result<Option<Vec<Example>>> {
        let read = |input: Files| saved.examples(&input, &args.records, saved.max_length, say);
        args.files()?.map(read).transpose()
    };
    let most = args.max_metric_drop.unwrap_or(MAX_METRIC_DROP);
    let form = saved.task.form();
    let mut exported = match args.precision {
        Precision::Fp32 => {
            export.as_trained(args.opset, args.external_data, args.ep == Some(Provider::Cuda))?
        }
        Precision::Int8 => {
            let flags = AnswerFlags::default();
            let calibrated = |input| export.calibrated(input, &flags, args.opset);
            let ranges = args.calibration.as_deref().map(calibrated).transpose()?;
            let (examples, opset, external_data) = (examples()?, args.opset, args.external_data);
            let examples = examples.as_deref();
            export.in_int8(Int8 { opset, external_data, examples, max_drop: most, ranges })?
        }
        Precision::Fp16 if form == Form::Whole => {
            export.in_fp16(args.opset, args.external_data, examples()?.as_deref(), most)?
        }
        Precision::Bf16 => {
            let providers = openvino.context("bf16 is OpenVINO's")?;
            export.in_bf16(&providers, examples()?.as_deref(), most)?
        }
        precision @ (Precision::Fp16 | Precision::Q8 | Precision::Q4) => {
            let examples = of_language_model(args, &saved)?;
            let most = args.max_perplexity_increase.unwrap_or(match precision {
                Precision::Fp16 => MAX_PERPLEXITY_INCREASE_FP16,
                _ => MAX_PERPLEXITY_INCREASE,
            });
            export.generating_in(precision, args.block_size, most, &examples)?
        }
    };
    if let Some(place) = triton {
        let folder = place.put(&saved, args.precision)?;
        exported.summary += &format!("\n{}: the same for Triton", folder.display());
        exported.manifest.insert("triton".to_owned(), json!(folder));
    }
    say.result(exported.summary, &exported.manifest)
}

/// What a language model's blocks are measured on.
fn of_language_model(args: &Args, saved: &Saved) -> Result<Vec<Example>> {
    let (tokenizer, max_length) = (&saved.tokenizer, saved.max_length);
    match args.files()? {
        Some(input) => {
            let (records, training) = (&args.records, &TrainingFlags::default());
            saved.task.examples(&input, &Encoder { records, training, tokenizer, max_length })
        }
        None => saved.task.generating("export --precision")?.builtin_examples(tokenizer, max_length),
    }
}

fn check_usage(args: &Args, saved: &Saved) -> Result<()> {
    graphs::check_precision(saved, args.precision)?;
    let in_blocks = matches!(args.precision, Precision::Q8 | Precision::Q4);
    let generates = saved.task.form() != Form::Whole;
    let fp16_generates = generates && args.precision == Precision::Fp16;
    if args.precision == Precision::Fp32 && !args.input.is_empty() {
        bail_unusable!(
            "--input is what fewer bits are measured on: give a --precision, or leave it out; `tk eval` measures fp32"
        );
    }
    let files = args.files()?;
    args.records.check(saved.task.name(), &files.as_ref().map(Files::all).unwrap_or_default())?;
    if !args.block_size.is_power_of_two() || !(LEAST_BLOCK..=LARGEST_BLOCK).contains(&args.block_size) {
        bail_unusable!("--block-size {}: expected 32, 64, 128 or 256", args.block_size);
    }
    if !in_blocks && args.block_size != DEFAULT_BLOCK {
        bail_unusable!("--block-size is for q8 and q4: give --precision q8 or q4, or leave it out");
    }
    if let Some(most) = args.max_metric_drop {
        if fp16_generates {
            bail_unusable!(
                "--max-metric-drop: a language model is measured by its perplexity: give --max-perplexity-increase"
            );
        }
        if !matches!(args.precision, Precision::Fp16 | Precision::Bf16 | Precision::Int8) {
            bail_unusable!(
                "--max-metric-drop is for int8, fp16 and bf16: give one of them by --precision, or leave it out"
            );
        }
        if most.is_nan() || most < 0.0 {
            bail_unusable!("--max-metric-drop {most}: expected a number from 0 upwards");
        }
    }
    if args.calibration.is_some() && args.precision != Precision::Int8 {
        bail_unusable!("--calibration is for int8: give --precision int8, or leave it out");
    }
    if let Some(most) = args.max_perplexity_increase {
        if !in_blocks && !fp16_generates {
            bail_unusable!(
                "--max-perplexity-increase is for q8 and q4, and fp16 of a language model: give one of them, or leave it out"
            );
        }
        if most.is_nan() || most < 0.0 {
            bail_unusable!("--max-perplexity-increase {most}: expected a number from 0 upwards");
        }
    }
    let own_graph = in_blocks || fp16_generates;
    if (own_graph || args.precision == Precision::Bf16) && (args.opset != DEFAULT_OPSET || args.external_data)
    {
        let why = if own_graph { "whose graph is tk's own" } else { "which writes no graph" };
        bail_unusable!(
            "--opset and --external-data say nothing to --precision {}, {why}: leave them out",
            args.precision
        );
    }
    match (args.precision, args.ep) {
        (Precision::Bf16, Some(Provider::OpenVino)) => {}
        (Precision::Bf16, _) => {
            bail_unusable!("--precision bf16 is computed by OpenVINO: give --ep openvino")
        }
        (Precision::Fp32, Some(Provider::Cuda)) if saved.task.form() == Form::Whole => {}
        (_, Some(provider)) => bail_unusable!(
            "--ep {}: of its own a provider has CUDA's graph in fp32 of models that don't generate, and OpenVINO's bf16",
            provider.name()
        ),
        (_, None) => {}
    }
    Ok(())
}
