//! An exported graph → a model of a Triton repository: `NAME/1/model.onnx` and `NAME/config.pbtxt`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::onnx::proto::tensor_proto::DataType;
use crate::onnx::proto::tensor_shape_proto::dimension;
use crate::onnx::proto::{ModelProto, ValueInfoProto, type_proto};
use crate::onnx::write::{self, Scratch};
use crate::onnx::{Precision, model};
use crate::predict::graphs;
use crate::saved::Saved;
use crate::task::Form;
use crate::{Result, bail_unusable, files, unusable};

/// Where a graph goes beside the model's directory.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Triton")]
pub struct TritonFlags {
    /// Also put the graph into a model repository of NVIDIA's Triton, as DIR/NAME with its config.pbtxt.
    #[arg(long, value_name = "DIR")]
    pub triton: Option<PathBuf>,
    /// The model's name there [default: the last part of the model's directory].
    #[arg(long, value_name = "NAME", requires = "triton")]
    triton_name: Option<String>,
    /// Have Triton compile the graph with TensorRT on a GPU, computing in fp32 or fp16; without it ONNX Runtime takes a GPU
    /// where there is one, by CUDA.
    #[arg(long, value_enum, requires = "triton")]
    triton_tensorrt: Option<TensorRt>,
}

/// What TensorRT computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TensorRt {
    Fp32,
    Fp16,
}

/// The file that Triton looks for.
const MODEL: &str = "model.onnx";
/// Records of a batch.
const MAX_BATCH: i64 = 32;
/// Records of the batches that TensorRT suits its kernels to.
const USUAL_BATCH: i64 = 8;
/// Tokens of the texts that it does so for, and that a model is warmed up with.
const USUAL_TOKENS: i64 = 128;
/// Tokens of the past that a language model is warmed up with.
const WARM_PAST: i64 = 8;

/// A model's place in a repository.
pub struct Triton<'a> {
    repository: &'a Path,
    name: String,
    tensorrt: Option<TensorRt>,
}

impl TritonFlags {
    /// The place that is asked for, if any is.
    ///
    /// # Errors
    /// Unusable: the graph is none that Triton can serve in this way, or the name is none.
    pub fn place(&self, saved: &Saved, precision: Precision) -> Result<Option<Triton<'_>>> {
        let Some(repository) = &self.triton else { return Ok(None) };
        if repository.exists() && !repository.is_dir() {
            bail_unusable!("--triton {}: a directory was expected", repository.display());
        }
        let whole = saved.task.form() == Form::Whole;
        if !whole && precision != Precision::Fp32 {
            bail_unusable!(
                "--triton takes the graph with past_key_values, model.onnx, and --precision {precision} is one that tk \
                 alone generates with: leave one of them out"
            );
        }
        if self.triton_tensorrt.is_some() {
            if !whole {
                bail_unusable!(
                    "--triton-tensorrt: TensorRT compiles for a range of lengths, and the past of a {} model grows with \
                     every token: leave it out",
                    saved.task.name()
                );
            }
            if precision == Precision::Int8 {
                bail_unusable!(
                    "--triton-tensorrt: TensorRT multiplies signed bytes around zero alone, and the activations of int8 are \
                     unsigned ones here: leave it out, or --precision"
                );
            }
        }
        let name = match &self.triton_name {
            Some(name) => name.clone(),
            None => {
                let dir = saved.dir.canonicalize().with_context(|| saved.dir.display().to_string())?;
                dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
        };
        if !files::is_plain_name(&name) {
            bail_unusable!(
                "{name:?} can't be a model's name: give --triton-name NAME, with letters, digits, - _ and ."
            );
        }
        Ok(Some(Triton { repository, name, tensorrt: self.triton_tensorrt }))
    }
}

impl Triton<'_> {
    /// Puts the exported graph of this precision there. Returns the model's folder.
    ///
    /// A server that looks at the repository meanwhile finds a whole graph, the old one or the new one.
    ///
    /// # Errors
    /// Unusable: the folder can't be written.
    pub fn put(&self, saved: &Saved, precision: Precision) -> Result<PathBuf> {
        let graph = graphs::in_precision(&saved.dir, precision);
        let folder = self.repository.join(&self.name);
        let version = folder.join("1");
        files::create_folder(&version).map_err(|e| unusable!("{}: {e}", version.display()))?;
        let held = files::try_lock(&folder)?;
        if held.is_some() {
            files::sweep(&folder).with_context(|| folder.display().to_string())?;
        }
        let scratch =
            Scratch::new(&folder).map_err(|e| unusable!("{}: can't write: {e:#}", folder.display()))?;
        let written = scratch.path().join(MODEL);
        let data = write::data_path(&graph);
        let external = data.is_file();
        if external {
            copy(&data, &write::data_path(&written))?;
            write::point_to(&graph, &format!("{MODEL}_data"), &written)?;
        } else {
            copy(&graph, &written)?;
        }
        let config = self.config(&write::load(&written)?, precision, saved.max_length as i64)?;
        write::install(scratch.path(), &version, &[MODEL], external)?;
        files::write(&folder.join("config.pbtxt"), config)?;
        Ok(folder)
    }

    /// What Triton must know of a graph, in protobuf's text form; `longest` is the tokens of the longest text.
    ///
    /// # Errors
    /// A value of the graph has a type or a dimension that Triton's batches don't have.
    fn config(&self, model: &ModelProto, precision: Precision, longest: i64) -> Result<String> {
        let graph = model.graph.as_ref().context("a model without a graph")?;
        let inputs = graph.input.iter().map(Tensor::of).collect::<Result<Vec<_>>>()?;
        let outputs = graph.output.iter().map(Tensor::of).collect::<Result<Vec<_>>>()?;
        let usual = Lengths { tokens: USUAL_TOKENS.min(longest - WARM_PAST).max(1), past: WARM_PAST };
        let weights = model::metadata(model, "weights_sha256").context("a graph without weights_sha256")?;
        let kind = match (self.tensorrt, precision) {
            (Some(_), _) => "KIND_GPU",
            (None, Precision::Int8) => "KIND_CPU", // where its products of integers are
            (None, _) => "KIND_AUTO",
        };
        let list = |tensors: &[Tensor]| {
            let rows = tensors.iter().map(|t| {
                let dims: Vec<String> = t.dims.iter().map(|dim| dim.declared().to_string()).collect();
                format!("  {{ name: {:?} data_type: {} dims: [ {} ] }}", t.name, t.kind, dims.join(", "))
            });
            rows.collect::<Vec<_>>().join(",\n")
        };

        let mut text = format!(
            "# Written by tk export. Requests of one length are batched together: where many come at once, pad them to a few\n\
             # lengths, with 0 in attention_mask.\n\
             name: {:?}\nbackend: \"onnxruntime\"\nmax_batch_size: {MAX_BATCH}\n\
             input [\n{}\n]\noutput [\n{}\n]\n\
             dynamic_batching {{ max_queue_delay_microseconds: 2000 }}\n\
             instance_group [ {{ count: 1 kind: {kind} }} ]\n",
            self.name,
            list(&inputs),
            list(&outputs)
        );
        // writing to a String can't fail
        if let Some(computes) = self.tensorrt {
            let _ = write!(text, "{}", tensorrt(computes, &inputs, weights, model, longest));
        }
        let _ = writeln!(
            text,
            "parameters {{ key: \"intra_op_thread_count\" value: {{ string_value: \"0\" }} }} # all cores\n\
             parameters {{ key: \"weights_sha256\" value: {{ string_value: {weights:?} }} }}\n\
             model_warmup [ {{\n  name: \"one text\"\n  batch_size: 1"
        );
        for Tensor { name, kind, dims } in &inputs {
            let dims: Vec<String> = dims.iter().map(|dim| dim.at(usual).to_string()).collect();
            let _ = writeln!(
                text,
                "  inputs {{ key: {name:?} value: {{ data_type: {kind} dims: [ {} ] zero_data: true }} }}",
                dims.join(", ")
            );
        }
        text.push_str("} ]\n");
        Ok(text)
    }
}

/// The accelerator. Engines are compiled for the ranges of the inputs' shapes and kept on disk, in a folder that no other
/// weights, operators or numbers share: TensorRT does not notice all of these.
fn tensorrt(
    computes: TensorRt,
    inputs: &[Tensor],
    weights: &str,
    model: &ModelProto,
    longest: i64,
) -> String {
    let shapes = |batch: i64, tokens: i64| {
        let of = |t: &Tensor| {
            let dims = t.dims.iter().map(|dim| dim.at(Lengths { tokens, past: 0 }));
            let dims: Vec<String> = std::iter::once(batch).chain(dims).map(|n| n.to_string()).collect();
            format!("{}:{}", t.name, dims.join("x"))
        };
        inputs.iter().map(of).collect::<Vec<_>>().join(",")
    };
    let mode = match computes {
        TensorRt::Fp32 => "FP32",
        TensorRt::Fp16 => "FP16",
    };
    let opset = model.opset_import.iter().find(|set| set.domain.is_empty()).map_or(0, |set| set.version);
    let cache = format!(
        "/cache/{}-opset{opset}-{}-{MAX_BATCH}x{longest}",
        &weights[..weights.len().min(16)],
        mode.to_lowercase()
    );
    let mut parameters = vec![
        ("precision_mode", mode.to_owned()),
        ("max_workspace_size_bytes", (1u64 << 30).to_string()),
        ("trt_engine_cache_enable", "1".to_owned()),
        ("trt_engine_cache_path", cache.clone()),
        ("trt_timing_cache_enable", "1".to_owned()),
        ("trt_timing_cache_path", cache),
        ("trt_profile_min_shapes", shapes(1, 1)),
        ("trt_profile_opt_shapes", shapes(USUAL_BATCH, longest.min(USUAL_TOKENS))),
        ("trt_profile_max_shapes", shapes(MAX_BATCH, longest)),
    ];
    if computes == TensorRt::Fp16 {
        // a norm's squares are beyond what fp16 holds
        parameters.push(("trt_layer_norm_fp32_fallback", "1".to_owned()));
    }
    let parameters = parameters
        .iter()
        .map(|(key, value)| format!("    parameters {{ key: \"{key}\" value: {value:?} }}\n"))
        .collect::<String>();
    format!(
        "# engines are kept in /cache, for this kind of GPU and version of TensorRT alone: mount a volume there\n\
         optimization {{ execution_accelerators {{\n  gpu_execution_accelerator [ {{\n    name: \"tensorrt\"\n{parameters}  \
         }} ]\n}} }}\n"
    )
}

/// An input or an output.
struct Tensor<'g> {
    name: &'g str,
    /// As Triton calls it.
    kind: &'static str,
    /// Behind the batch.
    dims: Vec<Length>,
}

/// A dimension.
#[derive(Clone, Copy)]
enum Length {
    Of(i64),
    Tokens,
    Past,
    /// The past and the tokens behind it.
    Total,
}

/// What stands for the dimensions that are not fixed.
#[derive(Clone, Copy)]
struct Lengths {
    tokens: i64,
    past: i64,
}

impl Length {
    /// As Triton has it.
    fn declared(self) -> i64 {
        if let Self::Of(n) = self { n } else { -1 }
    }

    fn at(self, Lengths { tokens, past }: Lengths) -> i64 {
        match self {
            Self::Of(n) => n,
            Self::Tokens => tokens,
            Self::Past => past,
            Self::Total => past + tokens,
        }
    }
}

impl<'g> Tensor<'g> {
    fn of(info: &'g ValueInfoProto) -> Result<Self> {
        let name = info.name.as_str();
        let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref().and_then(|t| t.value.as_ref())
        else {
            anyhow::bail!("{name} is no tensor");
        };
        let kind = match DataType::try_from(tensor.elem_type) {
            Ok(DataType::Float) => "TYPE_FP32",
            Ok(DataType::Float16) => "TYPE_FP16",
            Ok(DataType::Int64) => "TYPE_INT64",
            Ok(DataType::Int32) => "TYPE_INT32",
            _ => anyhow::bail!("{name} is of type {}, which Triton is not told of", tensor.elem_type),
        };
        let mut dims = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| dim.value.as_ref());
        let param = |dim: Option<Option<&'g dimension::Value>>| match dim {
            Some(Some(dimension::Value::DimParam(name))) => Some(name.as_str()),
            _ => None,
        };
        anyhow::ensure!(param(dims.next()) == Some("batch_size"), "{name} does not begin with the batch");
        let length = |dim: Option<&'g dimension::Value>| match (dim, param(Some(dim))) {
            (Some(&dimension::Value::DimValue(n)), _) => Ok(Length::Of(n)),
            (_, Some("sequence_length")) => Ok(Length::Tokens),
            (_, Some("past_sequence_length")) => Ok(Length::Past),
            (_, Some("past_sequence_length + sequence_length")) => Ok(Length::Total),
            (_, other) => Err(anyhow::anyhow!("{name} has a dimension {other:?}, which Triton can't batch")),
        };
        let dims = dims.map(length).collect::<Result<Vec<_>>>()?;
        anyhow::ensure!(!dims.is_empty(), "{name} has no dimension but the batch");
        Ok(Self { name, kind, dims })
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = std::fs::copy(from, to).and_then(|_| std::fs::File::open(to)?.sync_all());
    copied.with_context(|| format!("copying {} to {}", from.display(), to.display()))
}
