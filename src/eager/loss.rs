//! A task's loss over a batch: what training walks back from, and what evaluation measures.

use std::sync::Arc;

use anyhow::Context;
use candle_core::{D, DType, Tensor};

use super::kernels::cross_entropy::{composite_losses, linear_cross_entropy, linear_losses};
use super::kernels::linear::Map;
use super::kernels::residual::Branch;
use super::tape::Value;
use super::x::{State, X};
use super::{Eager, Mode, tensors};
use crate::Result;
use crate::data::batch::Encoding;
use crate::task::{CausalLm, Target, Task};

impl Eager<'_> {
    /// The sum of the examples' losses over the given outputs of the task's definition, divided by `of`; gradients
    /// flow back through it. The examples are those of the batch.
    pub fn loss(
        &self,
        task: &Task,
        outputs: Vec<X>,
        examples: &[&Encoding],
        targets: &[&Target],
        label_smoothing: f64,
        of: usize,
    ) -> Result<Tensor> {
        match task {
            Task::TextClassification(task) => {
                let outputs = tensors(outputs)?;
                let logits = outputs.first().context("the model has no output")?;
                Ok((task.loss(logits, targets, label_smoothing)? / of as f64)?)
            }
            Task::CausalLm(_) => {
                let wanted = CausalLm::targets(examples, targets);
                let scores = outputs.first().context("the model has no output")?;
                self.cross_entropy(scores, &wanted, label_smoothing as f32, 1.0 / of as f32)
            }
        }
    }

    /// The sum of the rows' losses times `scale`. Of a linear map that is not computed yet, the scores are computed in
    /// chunks, and turn into their gradients at once: those of the whole batch are never held.
    fn cross_entropy(
        &self,
        scores: &X,
        targets: &[Option<u32>],
        smoothing: f32,
        scale: f32,
    ) -> Result<Tensor> {
        if let (Some((x, map)), Mode::Training { .. }) = (not_computed(scores), self.mode)
            && let Some((weight, bias)) = map.out_in()
        {
            let (sum, dx) = linear_cross_entropy(&x.numbers, weight, bias, targets, smoothing, scale)?;
            return Ok(self.tape.loss(&x, (sum * f64::from(scale)) as f32, dx)?);
        }
        let losses = composite_losses(&scores.tensor()?.to_dtype(DType::F32)?, targets, smoothing)?;
        Ok((losses.sum(D::Minus1)? * f64::from(scale))?)
    }

    /// Each row's loss, 0 where it has no target, without gradients.
    pub fn losses(&self, scores: &X, targets: &[Option<u32>]) -> Result<Vec<f32>> {
        if let Some((x, map)) = not_computed(scores)
            && let Some((weight, bias)) = map.out_in()
        {
            return Ok(linear_losses(&x.numbers, weight, bias, targets, 0.0)?);
        }
        Ok(composite_losses(&scores.tensor()?.to_dtype(DType::F32)?, targets, 0.0)?.to_vec1()?)
    }
}

/// The linear map that scores still wait for, and what it is applied to.
fn not_computed(scores: &X) -> Option<(Arc<Value>, Map)> {
    match scores {
        X::Fused(fused) => match fused.state() {
            State::Branch(Branch::Linear { x, map }) => Some((x, map)),
            _ => None,
        },
        X::Tensor(_) => None,
    }
}
