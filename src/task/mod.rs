//! Tasks: each owns its head, loss, metrics, graph contract and record shapes in one file here.
//! Training, export, parity and serving read them from [`Task`].

pub mod causal_lm;
pub mod examples;
mod metrics;
pub mod output;
pub mod text_classification;
pub mod token_classification;

use std::collections::BTreeMap;

use anyhow::Context;
use candle_core::Tensor;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::data::batch::Encoding;
use crate::eager::{Eager, Forward, X, tensors};
use crate::model::ops::{Ops, Param};
use crate::model::{Family, Head, ModelConfig, manifest, token_ids};
use crate::{Result, bail_unusable};
pub use causal_lm::{CausalLm, Next};
pub use output::{Dim, Output, Outputs, Scope};
pub use text_classification::{Problem, TextClassification};
pub use token_classification::{Tags, TokenClassification};

/// What a model is trained for and serves.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    TextClassification(TextClassification),
    TokenClassification(TokenClassification),
    CausalLm(CausalLm),
}

/// What an example ought to give.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    Class(u32),
    /// Label ids, ascending.
    Classes(Vec<u32>),
    Number(f32),
    /// The tags of a sentence's words.
    Tags(Tags),
    /// The next tokens.
    Next(Next),
}

impl Target {
    /// How many losses it has: a step's loss is their mean.
    pub fn losses(&self) -> usize {
        match self {
            Self::Next(next) => next.count(),
            Self::Tags(tags) => tags.count(),
            Self::Class(_) | Self::Classes(_) | Self::Number(_) => 1,
        }
    }
}

/// An example that is learnt from, or measured on.
#[derive(Clone, Debug)]
pub struct Example {
    pub encoding: Encoding,
    pub target: Target,
}

impl Example {
    /// Examples' encodings and targets.
    pub fn apart(examples: &[Self]) -> (Vec<&Encoding>, Vec<&Target>) {
        examples.iter().map(|example| (&example.encoding, &example.target)).unzip()
    }
}

/// Whether a graph goes on from tokens that it has read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// It reads whole sequences.
    Whole,
    /// Keys and values of earlier tokens come in as `past_key_values.{layer}.key` and `.value`, and those of all go
    /// out as `present.{layer}.key` and `.value`, (B, H, T, D) each; positions are an input. What Optimum calls
    /// `text-generation-with-past`.
    Cached,
    /// Keys and values stand in buffers of a capacity that is not yet used up, (B, H, capacity, D): new ones are
    /// written into them in place, each row at its own length, and the same buffers go in as `past_key_values…` and
    /// out as `present…`. Scores are given for the tokens at the columns `logits_at` alone. ONNX Runtime's own
    /// operators; what tk generates with.
    InPlace,
}

/// Metrics by name, in alphabetical order. Not a number where a metric is not defined.
pub type Metrics = BTreeMap<String, f64>;

/// What is measured on examples: the metrics that runs are compared by, and what else there is to say, such as a row a
/// type of entity.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    #[serde(flatten)]
    pub metrics: Metrics,
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl From<Metrics> for Measured {
    fn from(metrics: Metrics) -> Self {
        Self { metrics, details: Map::new() }
    }
}

impl Task {
    /// The task that a trained model directory's `config.json` speaks of.
    ///
    /// # Errors
    /// `architectures` names no head that tk knows, the labels are inconsistent, or a token id is none of the
    /// vocabulary.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        token_ids::check(&config.raw, config.vocab_size())?;
        match config.architecture() {
            _ if config.has(Head::SequenceClassification { labels: 0 }) => {
                Ok(Self::TextClassification(TextClassification::from_config(config)?))
            }
            _ if config.has(Head::TokenClassification { labels: 0 }) => {
                Ok(Self::TokenClassification(TokenClassification::from_config(config)?))
            }
            _ if config.has(Head::CausalLm { wanted: None }) => {
                Ok(Self::CausalLm(CausalLm::from_config(config)?))
            }
            Some(name) => bail_unusable!(
                "architectures is [\"{name}\"], which is no trained task of tk's \
                 (BertForSequenceClassification, BertForTokenClassification and GPT2LMHeadModel are): fine-tune it first \
                 with `tk train`"
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
            Self::TokenClassification(_) => "token-classification",
            Self::CausalLm(_) => "causal-lm",
        }
    }

    /// The model with the task's head: the graph's outputs, in the order of [`Task::outputs`].
    pub fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        match self {
            Self::TextClassification(task) => Ok(vec![task.define(o, family)?]),
            Self::TokenClassification(task) => Ok(vec![family.define(o, task.head())?]),
            Self::CausalLm(task) => Ok(vec![task.define(o, family)?]),
        }
    }

    /// The same for the last token of every sequence alone: what a graph that generates computes.
    ///
    /// # Errors
    /// The task's model generates nothing.
    pub fn generate<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        match self {
            Self::TextClassification(_) | Self::TokenClassification(_) => {
                bail_unusable!("a {} model generates no text", self.name())
            }
            Self::CausalLm(task) => Ok(vec![task.generate(o, family)?]),
        }
    }

    /// What a graph of the task takes and gives beside its tokens.
    pub fn form(&self) -> Form {
        match self {
            Self::TextClassification(_) | Self::TokenClassification(_) => Form::Whole,
            Self::CausalLm(_) => Form::Cached,
        }
    }

    /// The parameters of the model with the task's head.
    pub fn params(&self, family: &Family) -> Result<Vec<Param>> {
        manifest::manifest(|o| self.define(o, family).map(drop))
    }

    /// The outputs of a graph of this form.
    pub fn outputs(&self, form: Form) -> Vec<Output> {
        match self {
            Self::TextClassification(task) => task.outputs(),
            Self::TokenClassification(task) => task.outputs(),
            Self::CausalLm(task) => task.outputs(form),
        }
    }

    /// What the rows of each output stand for.
    pub fn scopes(&self) -> Vec<Scope> {
        self.outputs(self.form()).iter().map(Output::scope).collect()
    }

    /// The sum of the examples' losses over the outputs of [`Task::define`], divided by `of`; gradients flow back through
    /// it. The examples are those of the batch.
    ///
    /// # Errors
    /// The outputs do not fit the targets.
    pub fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[&Encoding],
        targets: &[&Target],
        label_smoothing: f64,
        of: usize,
    ) -> Result<Tensor> {
        match self {
            Self::TextClassification(task) => {
                let outputs = tensors(outputs)?;
                let logits = outputs.first().context("the model has no output")?;
                Ok((task.loss(logits, targets, label_smoothing)? / of as f64)?)
            }
            Self::TokenClassification(_) | Self::CausalLm(_) => {
                let wanted = match self {
                    Self::CausalLm(_) => CausalLm::targets(examples, targets),
                    _ => TokenClassification::targets(targets),
                };
                let scores = outputs.first().context("the model has no output")?;
                eager.cross_entropy(scores, &wanted, label_smoothing as f32, 1.0 / of as f32)
            }
        }
    }

    /// The metrics and the mean loss of what a model computes in candle.
    pub fn measure(&self, model: &Forward, examples: &[Example]) -> Result<Measured> {
        let (encodings, targets) = Example::apart(examples);
        match self {
            Self::TextClassification(_) | Self::TokenClassification(_) => {
                self.measure_outputs(&model.outputs(&encodings)?, &targets)
            }
            Self::CausalLm(_) => {
                let losses = model.losses(&encodings, |batch| {
                    let of = |i: &usize| (encodings[*i], targets[*i]);
                    let (encodings, targets): (Vec<&Encoding>, Vec<&Target>) = batch.iter().map(of).unzip();
                    CausalLm::targets(&encodings, &targets)
                })?;
                Ok(CausalLm::measured(losses, &targets).into())
            }
        }
    }

    /// The metrics and the mean loss of outputs, whatever has computed them.
    ///
    /// # Errors
    /// The task's outputs are too many to be held: it is a language model.
    pub fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Target]) -> Result<Measured> {
        match self {
            Self::TextClassification(task) => Ok(task.measure(outputs, targets)?.into()),
            Self::TokenClassification(task) => task.measure(outputs, targets),
            Self::CausalLm(_) => anyhow::bail!("a language model is measured by its losses"),
        }
    }

    /// Writes what the task knows into a configuration that is about to be saved.
    pub fn write_config(&self, config: &mut ModelConfig) {
        match self {
            Self::TextClassification(task) => task.write_config(config),
            Self::TokenClassification(task) => task.write_config(config),
            Self::CausalLm(task) => task.write_config(config),
        }
    }

    /// The language model that a command which generates works with.
    ///
    /// # Errors
    /// Names the command and the task.
    pub fn causal_lm(&self, command: &str) -> Result<&CausalLm> {
        match self {
            Self::CausalLm(task) => Ok(task),
            other => bail_unusable!("tk {command} works with causal-lm; this is a {} model", other.name()),
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
            Self::TokenClassification(task) => (task.deciding(), token_classification::METRICS),
            Self::CausalLm(_) => ("loss", causal_lm::METRICS),
        };
        let name = asked.unwrap_or(own);
        if name != "loss" && !known.contains(&name) {
            bail_unusable!("--best-metric {name}: {} has loss, {}", self.name(), known.join(", "));
        }
        Ok((name.to_owned(), !["loss", "mse", "mae", "perplexity", "bits_per_byte"].contains(&name)))
    }
}
