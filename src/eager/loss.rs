//! The losses that tasks are made of: what training walks back from, and what evaluation measures.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};

use super::kernels::cross_entropy::{composite_losses, linear_cross_entropy, linear_losses};
use super::kernels::linear::LinearMap;
use super::kernels::residual::Branch;
use super::tape::TapeValue;
use super::x::{Pending, X};
use super::{Eager, Mode};
use crate::Result;

impl Eager<'_> {
    /// The cross-entropy of rows of scores, (rows, C), with the targets of those that have one: the sum of the rows'
    /// losses times `scale`. Of a linear map that is not computed yet, the scores are computed in
    /// chunks, and turn into their gradients at once: those of the whole batch are never held.
    pub fn cross_entropy(
        &self,
        scores: &X,
        targets: &[Option<u32>],
        smoothing: f32,
        scale: f32,
    ) -> Result<Tensor> {
        if let (Some((x, map)), Mode::Training { .. }) = (not_computed(scores), self.mode)
            && let Some((weight, bias)) = map.out_in()
        {
            let (sum, dx) =
                linear_cross_entropy(&x.numbers, weight, bias, targets, smoothing, scale, map.factors)?;
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
            return Ok(linear_losses(&x.numbers, weight, bias, targets, 0.0, map.factors)?);
        }
        Ok(composite_losses(&scores.tensor()?.to_dtype(DType::F32)?, targets, 0.0)?.to_vec1()?)
    }
}

/// The linear map that scores still wait for, and what it is applied to.
fn not_computed(scores: &X) -> Option<(Arc<TapeValue>, LinearMap)> {
    match scores {
        X::Fused(fused) => match fused.state() {
            Pending::Branch(Branch::Linear { x, map }) => Some((x, map)),
            _ => None,
        },
        X::Tensor(_) => None,
    }
}
