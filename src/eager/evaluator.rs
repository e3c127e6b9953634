//! A trained model in candle: encoded examples → logits, without dropout or gradients.

use std::borrow::Borrow;

use anyhow::Context;
use candle_core::{Device, Tensor};

use super::{Eager, Init, Mode, Params, tensors};
use crate::Result;
use crate::data::batch::{Encoding, Packed};
use crate::model::Family;
use crate::saved::Saved;
use crate::task::{CausalLm, Example, Metrics, Target, Task};

/// Tokens of one packed batch: enough for the matrix products, little enough for the memory.
const BATCH_TOKENS: usize = 2048;

/// Computes what a model's graph computes, in candle.
pub struct Evaluator {
    family: Family,
    task: Task,
    params: Params,
    device: Device,
}

impl Evaluator {
    /// Loads a trained model's weights.
    ///
    /// # Errors
    /// A weight is missing or has another shape than the configuration says, the head's included.
    pub fn open(saved: &Saved, device: &Device) -> Result<Self> {
        let params = saved.task.params(&saved.config.family)?;
        let (params, fit) = Params::load(&params, &saved.weights, Init { seed: 0, std: 0.0 }, device)?;
        if !fit.new.is_empty() {
            crate::bail_unusable!(
                "{} lacks {}: it is no model trained for {}; fine-tune it with `tk train`",
                saved.dir.display(),
                fit.new.join(", "),
                saved.task.name()
            );
        }
        let (family, task) = (saved.config.family.clone(), saved.task.clone());
        Ok(Self { family, task, params, device: device.clone() })
    }

    /// Each example's logits, one flat row an example, in order.
    pub fn logits(&self, examples: &[Encoding]) -> Result<Vec<Vec<f32>>> {
        logits(&self.params, &self.family, &self.task, examples, &self.device)
    }

    /// A language model's scores behind each token of each example: V numbers a token.
    pub fn scores(&self, examples: &[&Encoding]) -> Result<Vec<Vec<Vec<f32>>>> {
        examples
            .iter()
            .map(|example| {
                let packed = Packed::new([*example]);
                let eager = Eager::new(&self.params, &packed, &self.device, Mode::Evaluation);
                rows(&tensors(self.task.define(&eager, &self.family)?)?, example.len())
            })
            .collect()
    }

    /// The task's metrics and mean loss over examples.
    pub fn measure(&self, examples: &[Example]) -> Result<Metrics> {
        measure(&self.params, &self.family, &self.task, examples, &self.device)
    }

    /// What the definition taps, over one packed batch of all the examples: (T, C), or (B, C) behind `pick`.
    pub fn taps(&self, examples: &[Encoding]) -> Result<Vec<(String, Tensor)>> {
        let packed = Packed::new(examples);
        let eager = Eager::new(&self.params, &packed, &self.device, Mode::Evaluation).with_taps();
        self.task.define(&eager, &self.family)?;
        Ok(eager.into_taps())
    }
}

/// Each example's logits with the given parameters, one flat row an example, in order.
pub fn logits<E: Borrow<Encoding>>(
    params: &Params,
    family: &Family,
    task: &Task,
    examples: &[E],
    device: &Device,
) -> Result<Vec<Vec<f32>>> {
    let mut of_examples = vec![Vec::new(); examples.len()];
    for batch in batches(examples.iter().map(|example| example.borrow().len())) {
        let packed = Packed::new(batch.iter().map(|&i| examples[i].borrow()));
        let eager = Eager::new(params, &packed, device, Mode::Evaluation);
        let outputs = tensors(task.define(&eager, family)?)?;
        for (&i, row) in batch.iter().zip(rows(&outputs, batch.len())?) {
            of_examples[i] = row;
        }
    }
    Ok(of_examples)
}

/// The first output of a definition, (`count`, C), as rows.
///
/// # Errors
/// There is none, or it has another number of rows.
fn rows(outputs: &[Tensor], count: usize) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<Vec<f32>> = outputs.first().context("the model has no output")?.to_vec2()?;
    anyhow::ensure!(rows.len() == count, "the model gives {} rows where {count} are due", rows.len());
    Ok(rows)
}

/// The task's metrics and mean loss over examples.
pub fn measure(
    params: &Params,
    family: &Family,
    task: &Task,
    examples: &[Example],
    device: &Device,
) -> Result<Metrics> {
    let encodings: Vec<&Encoding> = examples.iter().map(|example| &example.encoding).collect();
    let targets: Vec<&Target> = examples.iter().map(|example| &example.target).collect();
    match task {
        Task::TextClassification(classification) => {
            classification.measure(&logits(params, family, task, &encodings, device)?, &targets)
        }
        Task::CausalLm(_) => {
            let mut losses = 0.0;
            for batch in batches(encodings.iter().map(|encoding| encoding.len())) {
                let encodings: Vec<&Encoding> = batch.iter().map(|&i| encodings[i]).collect();
                let targets: Vec<&Target> = batch.iter().map(|&i| targets[i]).collect();
                let packed = Packed::new(encodings.iter().copied());
                let eager = Eager::new(params, &packed, device, Mode::Evaluation);
                let scores = task.define(&eager, family)?;
                let wanted = CausalLm::targets(&encodings, &targets);
                let of_rows = eager.losses(scores.first().context("the model has no output")?, &wanted)?;
                anyhow::ensure!(
                    of_rows.len() == wanted.len(),
                    "{} losses for {} tokens",
                    of_rows.len(),
                    wanted.len()
                );
                losses += of_rows.into_iter().map(f64::from).sum::<f64>();
            }
            Ok(CausalLm::measured(losses, &targets))
        }
    }
}

/// Examples of these lengths in batches of at most [`BATCH_TOKENS`], those of one length together, so that tasks
/// within a batch are even.
fn batches(lengths: impl Iterator<Item = usize>) -> Vec<Vec<usize>> {
    let mut order: Vec<(usize, usize)> = lengths.zip(0..).collect();
    order.sort_unstable();
    let (mut batches, mut tokens) = (Vec::<Vec<usize>>::new(), 0);
    for (length, i) in order {
        match batches.last_mut() {
            Some(batch) if tokens + length <= BATCH_TOKENS => {
                tokens += length;
                batch.push(i);
            }
            _ => {
                tokens = length;
                batches.push(vec![i]);
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_that_lacks_a_row_is_refused() {
        let output = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(rows(std::slice::from_ref(&output), 2).unwrap().len(), 2);
        let error = rows(&[output], 3).unwrap_err();
        assert_eq!(error.to_string(), "the model gives 2 rows where 3 are due");
        assert!(rows(&[], 0).is_err());
    }
}
