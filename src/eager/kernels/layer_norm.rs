//! Layer normalisation over the last axis; the backward pass computes each row's statistics again.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::gemm::{Factors, Shared, row_blocks, share};
use super::{Numbers, Weight, add_here, contiguous, simd, wide};
use crate::eager::tape::{Tape, TapeValue};

/// x (…, C), weight (C), bias (C) → (…, C), with the biased variance, in one operation of candle's.
pub fn composite(x: &Tensor, weight: &Weight, bias: Option<&Weight>, eps: f64) -> Result<Tensor> {
    let bias = match bias {
        Some(bias) => bias.values.clone(),
        None => weight.values.zeros_like()?,
    };
    let y = wide(x)?.contiguous()?.apply_op3(&weight.values, &bias, OnCandlesTape { eps })?;
    y.to_dtype(x.dtype())
}

/// The operation: candle's own has no gradient, and its primitives would be ten of them.
struct OnCandlesTape {
    eps: f64,
}

impl CustomOp3 for OnCandlesTape {
    fn name(&self) -> &'static str {
        "layer norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        weight: &CpuStorage,
        of_weight: &Layout,
        bias: &CpuStorage,
        of_bias: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = &x.as_slice::<f32>()?[contiguous(of_x)?];
        let weight = &weight.as_slice::<f32>()?[contiguous(of_weight)?];
        let bias = &bias.as_slice::<f32>()?[contiguous(of_bias)?];
        let width = weight.len();
        if of_x.shape().dims().last() != Some(&width) || bias.len() != width {
            candle_core::bail!("a norm of {width} channels is applied to {:?}", of_x.shape());
        }
        let mut y = x.to_vec();
        y.par_chunks_mut(width.max(1)).for_each(|row| {
            let mean_of =
                |number: &dyn Fn(f32) -> f64| row.iter().map(|&x| number(x)).sum::<f64>() / width as f64;
            let mean = mean_of(&|x| f64::from(x));
            let variance = mean_of(&|x| (f64::from(x) - mean).powi(2));
            let rstd = 1.0 / (variance + self.eps).sqrt();
            for ((x, &weight), &bias) in row.iter_mut().zip(weight).zip(bias) {
                *x = ((f64::from(*x) - mean) * rstd * f64::from(weight) + f64::from(bias)) as f32;
            }
        });
        Ok((CpuStorage::F32(y), of_x.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        of_x: &Layout,
        weight: &candle_core::CudaStorage,
        of_weight: &Layout,
        bias: &candle_core::CudaStorage,
        of_bias: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        super::cuda::layer_norm([(x, of_x), (weight, of_weight), (bias, of_bias)], self.eps as f32)
    }

    /// With the normalised `n = (x − mean) · rstd` and `g = dy · w`: `dw = Σ dy · n`, `db = Σ dy` and
    /// `dx = (g − mean g − n · mean (g · n)) · rstd`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, weight) = (x.detach(), weight.detach());
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let rstd = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let normed = centred.broadcast_mul(&rstd)?;
        let g = dy.broadcast_mul(&weight)?;
        let along = (&g * &normed)?.mean_keepdim(D::Minus1)?;
        let rest = (g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)? - normed.broadcast_mul(&along)?)?;
        let sum = |x: &Tensor| x.reshape(((), weight.elem_count()))?.sum(0);
        Ok((Some(rest.broadcast_mul(&rstd)?), Some(sum(&(dy * &normed)?)?), Some(sum(dy)?)))
    }
}

/// The same, fused.
pub fn layer_norm(tape: &Tape, x: &Arc<TapeValue>, norm: &NormWeights) -> Result<Arc<TapeValue>> {
    let numbers = norm.numbers()?;
    let mut y = Buffer::any(x.numbers.len());
    let start = Shared::new(&mut y);
    row_blocks(x.rows(), Factors::F32, |rows| {
        let range = rows.start * x.width..rows.end * x.width;
        // SAFETY: blocks of rows do not overlap, and y outlives the loop.
        let y = unsafe { start.slice(range.start, range.len()) };
        numbers.apply(y, &x.numbers[range]);
    });
    Ok(push(tape, x, y, norm))
}

/// Puts x's norm, which has been computed, on the tape.
pub(super) fn push(tape: &Tape, x: &Arc<TapeValue>, y: Buffer, norm: &NormWeights) -> Arc<TapeValue> {
    let (x, norm) = (x.clone(), norm.clone());
    let learns = x.learns || norm.weight.learns() || norm.bias.as_ref().is_some_and(Weight::learns);
    tape.push(y, x.width, learns, move |dy, flow| {
        let dx = norm.backward(&x.numbers, dy)?;
        flow.give(&x, dx);
        Ok(())
    })
}

/// A layer norm's parameters.
#[derive(Clone)]
pub struct NormWeights {
    pub weight: Weight,
    pub bias: Option<Weight>,
    pub eps: f32,
}

/// A layer norm in numbers.
pub(super) struct Numeric {
    weight: Buffer,
    bias: Buffer,
    eps: f32,
}

impl Numeric {
    /// Normalises whole rows.
    pub fn apply(&self, y: &mut [f32], x: &[f32]) {
        normalise(y, x, &self.weight, &self.bias, self.eps);
    }
}

/// Rows that one task works on.
const ROWS: usize = 32;

impl NormWeights {
    pub(super) fn numbers(&self) -> Result<Numeric> {
        let of = |weight: &Weight| -> Result<Buffer> { Ok(Buffer::of(&Numbers::of(&weight.values)?)) };
        let weight = of(&self.weight)?;
        let bias = match &self.bias {
            Some(bias) => of(bias)?,
            None => Buffer::of(&vec![0.0; weight.len()]),
        };
        Ok(Numeric { weight, bias, eps: self.eps })
    }

    /// The gradient of x, in dy's place; those of scale and bias go to their slots.
    fn backward(&self, x: &[f32], mut dy: Buffer) -> Result<Buffer> {
        let ws = Numbers::of(&self.weight.values)?;
        let ws: &[f32] = &ws;
        let width = ws.len();
        let rows = dy.len() / width;
        let parts = rows.div_ceil(ROWS).clamp(1, 16);
        let start = Shared::new(&mut dy);
        let partial: Vec<(Vec<f32>, Vec<f32>)> = (0..parts)
            .into_par_iter()
            .map(|part| {
                let rows = share(rows, parts, part, 1);
                let range = rows.start * width..rows.end * width;
                let (mut dw, mut db) = (vec![0.0; width], vec![0.0; width]);
                // SAFETY: the parts' rows are disjoint ranges of dy, which outlives the loop.
                let dy = unsafe { start.slice(range.start, range.len()) };
                gradients(dy, &mut dw, &mut db, &x[range], ws, self.eps);
                (dw, db)
            })
            .collect();
        let sums = partial.into_iter().reduce(|(mut dw, mut db), (more_w, more_b)| {
            add_here(&mut dw, &more_w);
            add_here(&mut db, &more_b);
            (dw, db)
        });
        if let Some((dw, db)) = sums {
            for (weight, sum) in [(Some(&self.weight), dw), (self.bias.as_ref(), db)] {
                if let Some(gradient) = weight.and_then(|weight| weight.gradient.as_ref()) {
                    gradient.add_values(&sum);
                }
            }
        }
        Ok(dy)
    }
}

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = simd::sum(x.len(), |i| x[i]) / n;
    let variance = simd::sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

simd::vectorised! {
    pub(super) fn normalise(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], eps: f32) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let (mean, rstd) = statistics(x, eps);
            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (x - mean) * rstd * w + b;
            }
        }
    }
}

simd::vectorised! {
    /// dy → dx in place.
    pub(super) fn gradients(dy: &mut [f32], dw: &mut [f32], db: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        let n = w.len();
        let (w, dw, db) = (&w[..n], &mut dw[..n], &mut db[..n]);
        for (dy, x) in dy.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            let (mean, rstd) = statistics(x, eps);
            let g_mean = simd::sum(n, |i| dy[i] * w[i]) / n as f32;
            let gx_mean = simd::sum(n, |i| dy[i] * w[i] * (x[i] - mean) * rstd) / n as f32;
            for i in 0..n {
                let normed = (x[i] - mean) * rstd;
                dw[i] += dy[i] * normed;
                db[i] += dy[i];
                dy[i] = rstd * (dy[i] * w[i] - g_mean - normed * gx_mean);
            }
        }
    }
}
