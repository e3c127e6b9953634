//! What can run a model: each takes records and gives their outputs.

use std::path::Path;
use std::str::FromStr;

use anyhow::Context;

use super::{Subject, candle};
use crate::data::batch::{Encoding, PaddedBatch};
use crate::eager::Evaluator;
use crate::onnx::write;
use crate::predict::pool;
use crate::runtime::session::Values;
use crate::runtime::{Model, OrtSession, Provider, Threads, probe};
use crate::say::Say;
use crate::task::{Output, Outputs};
use crate::{Result, unusable};

/// A way to run a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The definition in candle: what was trained.
    Eager,
    /// candle's own evaluator of ONNX graphs, on a graph of an opset that it can run.
    CandleOnnx,
    /// ONNX Runtime on a provider.
    Ort(Provider),
}

impl Runtime {
    /// All of them, the reference first.
    pub const ALL: [Self; 6] = [
        Self::Eager,
        Self::CandleOnnx,
        Self::Ort(Provider::Cpu),
        Self::Ort(Provider::OpenVino),
        Self::Ort(Provider::Cuda),
        Self::Ort(Provider::TensorRt),
    ];

    /// The name that `--runtimes` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::CandleOnnx => "candle-onnx",
            Self::Ort(Provider::Cpu) => "ort-cpu",
            Self::Ort(Provider::OpenVino) => "ort-openvino",
            Self::Ort(Provider::Cuda) => "ort-cuda",
            Self::Ort(Provider::TensorRt) => "ort-tensorrt",
        }
    }

    /// Whether this machine has it.
    ///
    /// # Errors
    /// Says why not.
    pub fn available(self) -> Result<()> {
        match self {
            Self::Eager | Self::CandleOnnx => Ok(()),
            Self::Ort(provider) => probe::probe(provider),
        }
    }
}

impl FromStr for Runtime {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|runtime| runtime.name() == text).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|runtime| runtime.name()).collect();
            unusable!("\"{text}\" is no runtime; tk has {}", known.join(", "))
        })
    }
}

/// Each record's outputs on a runtime, in order; so many records run together.
///
/// # Errors
/// The runtime can't be had or fails, or its graph lacks an output of the task's.
pub fn outputs(runtime: Runtime, subject: &Subject, together: usize) -> Result<Vec<Outputs>> {
    let found = match runtime {
        Runtime::Eager => {
            let evaluator = Evaluator::open(subject.saved, &candle_core::Device::Cpu)?;
            match together {
                1 => {
                    let alone = |encoding: &Encoding| evaluator.outputs(std::slice::from_ref(encoding));
                    let alone = subject.encodings.iter().map(alone).collect::<Result<Vec<_>>>();
                    alone.map(|outputs| outputs.concat())
                }
                _ => evaluator.outputs(subject.encodings),
            }
        }
        _ => {
            let mut graph = LoadedGraph::open(runtime, subject, &[])?;
            let task = &subject.saved.task;
            let (outputs, scopes) = (task.outputs(task.form()), task.scopes());
            let mut found = Vec::with_capacity(subject.encodings.len());
            for batch in subject.encodings.chunks(together) {
                let batch = padded(subject, batch);
                found.extend(pool::unpack(&named(graph.run(&batch)?, &outputs)?, &batch, &scopes)?);
            }
            Ok(found)
        }
    };
    let found = found.with_context(|| format!("runtime {}", runtime.name()))?;
    anyhow::ensure!(
        found.len() == subject.encodings.len(),
        "{} gave {} outputs for {} records",
        runtime.name(),
        found.len(),
        subject.encodings.len()
    );
    Ok(found)
}

/// A graph's outputs in the order of the task's, whatever else it gives.
///
/// # Errors
/// Unusable: it lacks one, or has none.
fn named(values: Vec<Values>, outputs: &[Output]) -> Result<Vec<Values>> {
    outputs
        .iter()
        .map(|output| {
            values.iter().find(|values| values.name == output.name).cloned().ok_or_else(|| {
                let names: Vec<&str> = values.iter().map(|values| values.name.as_str()).collect();
                unusable!("the graph has no output {}; it has {}", output.name, names.join(", "))
            })
        })
        .collect()
}

/// A batch as graphs take it.
pub(super) fn padded(subject: &Subject, batch: &[Encoding]) -> PaddedBatch {
    PaddedBatch::new(&batch.iter().collect::<Vec<_>>(), subject.saved.tokenizer.pad_id())
}

/// A graph that is loaded somewhere.
pub(super) enum LoadedGraph {
    Candle(Box<candle::Evaluated>),
    Ort(Box<OrtSession>),
}

impl LoadedGraph {
    /// Loads the subject's graph with intermediate values as outputs behind its own.
    pub fn open(runtime: Runtime, subject: &Subject, taps: &[String]) -> Result<Self> {
        match runtime {
            Runtime::Eager => anyhow::bail!("the eager runtime has no graph"),
            Runtime::CandleOnnx => Ok(Self::Candle(Box::new(candle::Evaluated::of(subject.saved, taps)?))),
            Runtime::Ort(provider) => Ok(Self::Ort(Box::new(ort(subject, provider, taps)?))),
        }
    }

    /// Every output of one batch.
    pub fn run(&mut self, batch: &PaddedBatch) -> Result<Vec<Values>> {
        match self {
            Self::Candle(model) => model.run(batch),
            Self::Ort(session) => session.run(batch),
        }
    }
}

fn ort(subject: &Subject, provider: Provider, taps: &[String]) -> Result<OrtSession> {
    let (graph, threads) = (subject.graph, Threads::Together(crate::process::cores()));
    let providers = subject.on(provider);
    let open = |path: &Path| OrtSession::open(Model::File(path), &providers, threads, Say::default());
    if taps.is_empty() {
        return open(graph);
    }
    // by way of a file, because weights above 2 GB can't be handed over in memory
    let scratch = write::Scratch::new(&std::env::temp_dir())?;
    let path = scratch.path().join("model.onnx");
    write::save(crate::onnx::model::with_outputs(write::load(graph)?, taps), &path, false)?;
    open(&path)
}
