//! What a graph in fewer bits loses of what the model was trained for.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;
use crate::data::batch::Encoding;
use crate::onnx::Precision;
use crate::parity::{Compared, Measure, inputs};
use crate::predict::Predictor;
use crate::runtime::{Provider, Providers};
use crate::saved::Saved;
use crate::task::{Example, Measured, Outputs};

/// Texts that tell which weights suffer most.
const SAMPLE: usize = 64;

/// The most numbers of their outputs.
const SAMPLE_NUMBERS: usize = 16 * 1024 * 1024;

/// A graph's answers beside those of the graph in fp32.
pub struct Gate<'a> {
    saved: &'a Saved,
    /// Labelled records, where there are any.
    examples: Option<&'a [Example]>,
    /// The built-in texts where there are none, else some of the records.
    encodings: Vec<Encoding>,
    reference: Predictor,
    /// What it measures on the labelled records.
    expected: Option<Measured>,
    /// A few sequences, and its outputs of them.
    sample: (Vec<Encoding>, Vec<Outputs>),
}

/// A metric in fp32 and in fewer bits.
#[derive(Clone, Debug, Serialize)]
pub struct Loss {
    /// The task's own metric, or `agreement`: how many of the answers are those of fp32.
    pub metric: &'static str,
    pub before: f64,
    pub after: f64,
    /// In points of 100; of a metric of which less is better, by how many percent it rose.
    pub drop: f64,
    pub records: usize,
}

impl Loss {
    /// Whether it is too much; not a number always is.
    pub fn is_above(&self, most: f64) -> bool {
        self.drop.is_nan() || self.drop > most
    }

    /// Refuses a loss that is too much, where nothing can be done about it.
    ///
    /// # Errors
    /// It is above `most`.
    pub fn check(&self, precision: Precision, most: f64) -> Result<()> {
        if self.is_above(most) {
            anyhow::bail!(
                "{}; more than --max-metric-drop {most} allows: allow more, or serve fp32",
                self.told(precision)
            );
        }
        Ok(())
    }

    /// What a manifest says of it, and of how far the logits are.
    pub fn about(&self, most: f64, compared: &Compared) -> [(&'static str, Value); 4] {
        [
            ("gate", json!(self)),
            ("max_metric_drop", json!(most)),
            ("max_abs", json!(compared.max_abs)),
            ("batch_invariance", json!(compared.batch_invariance)),
        ]
    }

    /// For people.
    pub fn told(&self, precision: Precision) -> String {
        let Self { metric, before, after, drop, records } = self;
        match *metric {
            "agreement" => {
                format!("{:.2} % of the answers to {records} built-in texts are those of fp32", after * 100.0)
            }
            metric => format!(
                "{metric} {before:.4} in fp32, {after:.4} in {precision}: {:+.2} points, {records} records",
                -drop
            ),
        }
    }
}

impl<'a> Gate<'a> {
    /// Runs the graph in fp32 on labelled records, or on the built-in texts where there are none.
    ///
    /// # Errors
    /// The graph can't be run, or gives other outputs than its task has.
    pub fn new(saved: &'a Saved, fp32: &Path, examples: Option<&'a [Example]>) -> Result<Self> {
        let encodings = match examples {
            Some(examples) => examples.iter().flat_map(Example::encodings).take(SAMPLE).cloned().collect(),
            None => saved.tokenizer.encode_all(&inputs::of_agreement(saved)?, saved.max_length)?,
        };
        let reference = open(saved, fp32)?;
        let expected = examples.map(|examples| reference.measure(examples)).transpose()?;
        let few = few(&encodings, saved.task.numbers_of_token());
        let outputs = reference.outputs(&few.iter().collect::<Vec<_>>())?;
        Ok(Self { saved, examples, encodings, reference, expected, sample: (few, outputs) })
    }

    /// What the graph at `path` loses on this machine's CPU.
    ///
    /// # Errors
    /// It can't be run, or gives other outputs than its task has.
    pub fn loss(&self, path: &Path) -> Result<Loss> {
        self.loss_of(&open(self.saved, path)?)
    }

    /// What a graph loses where it is loaded.
    ///
    /// # Errors
    /// It can't be run, or gives other outputs than its task has.
    pub fn loss_of(&self, graph: &Predictor) -> Result<Loss> {
        let task = &self.saved.task;
        if let (Some(examples), Some(expected)) = (self.examples, &self.expected) {
            let Measure { name, expected, found } = Measure::of(task, expected, &graph.measure(examples)?)?;
            let metric = task.metrics().iter().find(|metric| metric.name == name);
            let drop = metric.with_context(|| format!("no metric {name}"))?.lost(expected, found);
            return Ok(Loss { metric: name, before: expected, after: found, drop, records: examples.len() });
        }
        let mut agreement = 0.0;
        for chunk in self.encodings.chunks(SAMPLE) {
            let chunk: Vec<&Encoding> = chunk.iter().collect();
            let (wanted, found) = (self.reference.outputs(&chunk)?, graph.outputs(&chunk)?);
            agreement += wanted.iter().zip(&found).map(|(a, b)| task.agreement(a, b)).sum::<f64>();
        }
        let records = self.encodings.len();
        let after = agreement / records.max(1) as f64;
        Ok(Loss { metric: "agreement", before: 1.0, after, drop: (1.0 - after) * 100.0, records })
    }

    /// How far the graph at `path` is from fp32 on a few texts: the mean of |a − b| over their outputs.
    ///
    /// # Errors
    /// As [`Gate::loss`].
    pub fn apart(&self, path: &Path) -> Result<f64> {
        let (few, wanted) = &self.sample;
        let found = open(self.saved, path)?.outputs(&few.iter().collect::<Vec<_>>())?;
        let pairs = wanted.iter().flatten().flatten().zip(found.iter().flatten().flatten());
        let (mut sum, mut count) = (0.0, 0);
        for (a, b) in pairs {
            sum += f64::from((a - b).abs());
            count += 1;
        }
        Ok(sum / f64::from(count.max(1)))
    }
}

/// The first sequences, of whose outputs there are so many numbers for a token.
fn few(encodings: &[Encoding], numbers: usize) -> Vec<Encoding> {
    let mut left = SAMPLE_NUMBERS;
    let fits = |encoding: &&Encoding| {
        let numbers = encoding.len() * numbers;
        let fits = numbers <= left;
        left = left.saturating_sub(numbers);
        fits
    };
    encodings.iter().take(SAMPLE).filter(fits).cloned().collect()
}

/// A graph as it is served on this machine's CPU.
fn open(saved: &Saved, graph: &Path) -> Result<Predictor> {
    Predictor::by_default(saved, graph, &Providers::only(Provider::Cpu))
}
