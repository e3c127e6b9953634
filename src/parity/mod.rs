//! The runtimes side by side: the same records through each, the same numbers expected.

pub mod candle;
pub mod compare;
pub mod decoding;
pub mod detail;
pub mod difference;
pub mod inputs;
pub mod page;
pub mod report;
pub mod runtimes;

use std::path::Path;

use anyhow::Context;
use ndarray::Array2;

pub use compare::{Compared, Measure};
pub use runtimes::Runtime;

use crate::Result;
use crate::data::batch::Encoding;
use crate::predict::Predictor;
use crate::runtime::{How, Provider, Providers};
use crate::saved::Saved;
use crate::task::{Example, Measured, Outputs};

/// How far a logit may be from the reference's: what float32 rounding explains, and no more.
pub const TOLERANCE: f32 = 1e-4;

/// Records that run together. Their lengths are mixed as they come, so that rows are padded.
pub(crate) const BATCH: usize = 8;

/// What is compared: one trained model, its graph, and records.
pub struct Subject<'a> {
    pub saved: &'a Saved,
    /// The ONNX file that ONNX Runtime runs.
    pub graph: &'a Path,
    /// How a provider computes it.
    pub how: &'a How,
    pub encodings: &'a [Encoding],
    /// The same with what they ought to give, where the task's metric is measured too.
    pub examples: Option<&'a [Example]>,
}

impl Subject<'_> {
    /// A provider, and how it computes.
    fn on(&self, provider: Provider) -> Providers {
        Providers { how: self.how.clone(), ..Providers::only(provider) }
    }
}

/// Runs the records on every runtime and compares each with the first.
///
/// # Errors
/// A runtime can't be had or fails. Numbers that differ are no error: see [`Compared::pass`].
pub fn run(subject: &Subject, runtimes: &[Runtime], tolerance: f32) -> Result<Vec<Compared>> {
    let Some((&reference, others)) = runtimes.split_first() else {
        return Ok(Vec::new());
    };
    let wanted = runtimes::outputs(reference, subject, BATCH)?;
    let task = &subject.saved.task;
    let names: Vec<&'static str> = task.outputs(task.form()).iter().map(|output| output.name).collect();
    let metrics = |runtime, outputs: &[Outputs]| -> Result<Option<Measured>> {
        subject.examples.map(|examples| measured(subject, runtime, outputs, examples)).transpose()
    };
    let expected = metrics(reference, &wanted)?;
    others
        .iter()
        .map(|&runtime| {
            let found = runtimes::outputs(runtime, subject, BATCH)?;
            let by_output = names.iter().enumerate().map(|(i, name)| {
                let (wanted, found) = (rows(&wanted, i), rows(&found, i));
                let compared = Compared::new(runtime, reference, &wanted, &found, tolerance)?;
                Ok(compared.of_output(name, &wanted, &found))
            });
            let both = by_output.reduce(|a, b: Result<Compared>| Ok(a?.with(&b?)));
            let mut compared = both.context("the task has no output")??;
            compared.records = subject.encodings.len();
            let alone = runtimes::outputs(runtime, subject, 1)?;
            compared = compared.among_others(apart(&found, &alone));
            if !compared.pass {
                compared.first_difference = difference::first(subject, runtime, &wanted, &found, tolerance)?;
            }
            if let (Some(expected), Some(found)) = (&expected, metrics(runtime, &found)?) {
                compared.metric = Some(Measure::of(&subject.saved.task, expected, &found)?);
            }
            Ok(compared)
        })
        .collect()
}

/// The task's metrics on a runtime: by the predictor, where it serves with that one, else from the outputs.
fn measured(
    subject: &Subject,
    runtime: Runtime,
    outputs: &[Outputs],
    examples: &[Example],
) -> Result<Measured> {
    let Runtime::Ort(provider) = runtime else {
        let task = &subject.saved.task;
        return task.measure_outputs(&task.kept(outputs.to_vec(), examples)?, examples);
    };
    Predictor::by_default(subject.saved, subject.graph, &subject.on(provider))?.measure(examples)
}

/// The rows of one output of all records, one after another. Of one number a token they are one row.
fn rows(records: &[Outputs], output: usize) -> Vec<Vec<f32>> {
    let of = |output: &Array2<f32>| match output.ncols() {
        1 => vec![output.iter().copied().collect()],
        _ => output.rows().into_iter().map(|row| row.to_vec()).collect(),
    };
    records.iter().filter_map(|outputs| outputs.get(output)).flat_map(of).collect::<Vec<Vec<f32>>>()
}

/// The largest difference between the same records' outputs.
fn apart(a: &[Outputs], b: &[Outputs]) -> f32 {
    let flat = |outputs: &[Outputs]| -> Vec<f32> { outputs.iter().flatten().flatten().copied().collect() };
    compare::distance(&flat(a), &flat(b))
}
