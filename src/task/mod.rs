//! Tasks: each owns its head, loss, metrics, graph contract and record shapes in one file here.
//! Training, export, parity and serving read them from [`Task`].

pub mod examples;
mod metrics;
pub mod text_classification;

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::{Map, Value};

use crate::data::batch::Encoding;
use crate::model::ops::{Ops, Param};
use crate::model::{Family, ModelConfig, manifest};
use crate::{Result, bail_unusable};
pub use text_classification::{Problem, Target, TextClassification};

/// What a model is trained for and serves.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    TextClassification(TextClassification),
}

/// An example that is learnt from, or measured on.
#[derive(Clone, Debug)]
pub struct Example {
    pub encoding: Encoding,
    pub target: Target,
}

/// The name and the symbolic shape of a graph's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub name: &'static str,
    pub dims: Vec<Dim>,
}

/// One dimension of a graph's input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Symbolic, `batch_size`.
    Batch,
    /// Symbolic, `sequence_length`.
    Sequence,
    Of(usize),
}

/// Metrics by name, in alphabetical order. Not a number where a metric is not defined.
pub type Metrics = BTreeMap<String, f64>;

impl Task {
    /// The task that a trained model directory's `config.json` speaks of.
    ///
    /// # Errors
    /// `architectures` names no head that tk knows, or the labels are inconsistent.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        let architecture =
            config.raw.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        match architecture {
            Some(name) if name.ends_with("ForSequenceClassification") => {
                Ok(Self::TextClassification(TextClassification::from_config(config)?))
            }
            Some(name) => bail_unusable!(
                "architectures is [\"{name}\"], which is no trained task of tk's \
                 (BertForSequenceClassification is): fine-tune it first with `tk train`"
            ),
            None => {
                bail_unusable!("architectures is missing, so the task is unknown: fine-tune with `tk train`")
            }
        }
    }

    /// The task's name, as `--task` takes it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TextClassification(_) => "text-classification",
        }
    }

    /// The model with the task's head: the graph's outputs, in the order of [`Task::outputs`].
    pub fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        match self {
            Self::TextClassification(task) => Ok(vec![task.define(o, family)?]),
        }
    }

    /// The parameters of the model with the task's head.
    pub fn params(&self, family: &Family) -> Result<Vec<Param>> {
        manifest::manifest(|o| self.define(o, family).map(drop))
    }

    /// The graph's outputs.
    pub fn outputs(&self) -> Vec<Output> {
        match self {
            Self::TextClassification(task) => task.outputs(),
        }
    }

    /// Writes what the task knows into a configuration that is about to be saved.
    pub fn write_config(&self, config: &mut ModelConfig) {
        match self {
            Self::TextClassification(task) => task.write_config(config),
        }
    }

    /// The sum over the examples of a batch of their losses.
    pub fn loss(&self, outputs: &[Tensor], targets: &[&Target], label_smoothing: f64) -> Result<Tensor> {
        match self {
            Self::TextClassification(task) => task.loss(&outputs[0], targets, label_smoothing),
        }
    }

    /// A prediction as a record's fields, from one example's logits.
    pub fn prediction(&self, logits: &[f32], with_logits: bool) -> Map<String, Value> {
        match self {
            Self::TextClassification(task) => task.prediction(logits, with_logits),
        }
    }

    /// The task's metrics over a whole evaluation set, and the mean `loss`.
    pub fn measure(&self, logits: &[Vec<f32>], targets: &[Target]) -> Result<Metrics> {
        match self {
            Self::TextClassification(task) => task.measure(logits, targets),
        }
    }

    /// The metric that decides which evaluation is the best, and whether more of it is better: the asked one, or
    /// the task's own.
    ///
    /// # Errors
    /// The task has no such metric.
    pub fn deciding_metric(&self, asked: Option<&str>) -> Result<(String, bool)> {
        let (own, known) = match self {
            Self::TextClassification(task) => task.metrics(),
        };
        let name = asked.unwrap_or(own);
        if name != "loss" && !known.contains(&name) {
            bail_unusable!("--best-metric {name}: {} has loss, {}", self.name(), known.join(", "));
        }
        Ok((name.to_owned(), !["loss", "mse", "mae"].contains(&name)))
    }
}
