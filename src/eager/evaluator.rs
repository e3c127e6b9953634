//! A trained model in candle: encoded examples → logits, without dropout or gradients.

use std::borrow::Borrow;

use candle_core::{Device, Tensor};

use super::{Eager, Init, Mode, Params, tensors};
use crate::Result;
use crate::data::batch::{Encoding, Packed};
use crate::model::Family;
use crate::saved::Saved;
use crate::task::Task;

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

    /// What the definition taps, over one packed batch of all the examples: (T, C), or (B, C) behind `pick`.
    pub fn taps(&self, examples: &[Encoding]) -> Result<Vec<(String, Tensor)>> {
        let eager =
            Eager::new(&self.params, &Packed::new(examples), &self.device, Mode::Evaluation).with_taps();
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
    // of one length together, so that tasks within a batch are even
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| examples[i].borrow().len());
    let mut rows = vec![Vec::new(); examples.len()];
    let mut rest = &order[..];
    while !rest.is_empty() {
        let mut tokens = 0;
        let fitting = rest.iter().take_while(|&&i| {
            tokens += examples[i].borrow().len();
            tokens <= BATCH_TOKENS
        });
        let (batch, behind) = rest.split_at(fitting.count().max(1));
        let packed = Packed::new(batch.iter().map(|&i| examples[i].borrow()));
        let eager = Eager::new(params, &packed, device, Mode::Evaluation);
        let outputs = tensors(task.define(&eager, family)?)?;
        let values: Vec<Vec<f32>> = outputs[0].to_vec2()?;
        for (&i, row) in batch.iter().zip(values) {
            rows[i] = row;
        }
        rest = behind;
    }
    Ok(rows)
}
