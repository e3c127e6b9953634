//! Layer normalisation over the last axis, of one activation or of a residual sum; the backward pass computes
//! each row's statistics again.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::dropout::{Mask, dropout};
use super::gemm::{Shared, share};
use super::{Kernels, Numbers, Weight, gradient, numbers, simd, stored, wide};

/// x (…, C), weight (C), bias (C) → (…, C), with the biased variance.
pub fn layer_norm(kernels: Kernels, x: &Tensor, weight: &Weight, bias: &Weight, eps: f64) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => {
            let op = LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: eps as f32 };
            x.contiguous()?.apply_op1(op)
        }
        Kernels::Composite => {
            let dtype = x.dtype();
            let x = wide(x)?;
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
            let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
            normed.broadcast_mul(&weight.values)?.broadcast_add(&bias.values)?.to_dtype(dtype)
        }
    }
}

/// The layer norm of `x + dropout(branch)`, (R, C) each: what ends both halves of a post-norm layer.
#[allow(clippy::too_many_arguments)] // a sum and a norm have this many parts
pub fn residual_norm(
    kernels: Kernels,
    branch: &Tensor,
    mask: Option<Mask>,
    x: &Tensor,
    weight: &Weight,
    bias: &Weight,
    eps: f64,
) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => {
            let norm = LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: eps as f32 };
            branch.contiguous()?.apply_op2(&x.contiguous()?, ResidualNorm { norm, mask })
        }
        Kernels::Composite => {
            let branch = match mask {
                Some(mask) => dropout(kernels, branch, mask)?,
                None => branch.clone(),
            };
            let sum = (wide(&branch)? + wide(x)?)?;
            layer_norm(kernels, &sum, weight, bias, eps)?.to_dtype(x.dtype())
        }
    }
}

struct LayerNorm {
    weight: Weight,
    bias: Weight,
    eps: f32,
}

/// Rows that one task works on.
const ROWS: usize = 32;

impl LayerNorm {
    /// `fill(place, rows)` puts what is normalised into a task's rows, which begin at that place.
    fn forward(&self, length: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Result<Vec<f32>> {
        let (w, b) = (Numbers::of(&self.weight.values)?, Numbers::of(&self.bias.values)?);
        let (w, b): (&[f32], &[f32]) = (&w, &b);
        let mut y = vec![0.0; length];
        y.par_chunks_mut(ROWS * w.len()).enumerate().for_each(|(task, y)| {
            fill(task * ROWS * w.len(), y);
            normalise(y, w, b, self.eps);
        });
        Ok(y)
    }

    /// The gradient of what is normalised, which `fill` gives again; `after` sees each task's rows of it.
    fn backward(
        &self,
        dy: &[f32],
        fill: impl Fn(usize, &mut [f32]) + Sync,
        after: impl Fn(usize, &[f32]) + Sync,
    ) -> Result<Vec<f32>> {
        let ws = Numbers::of(&self.weight.values)?;
        let ws: &[f32] = &ws;
        let width = ws.len();
        let rows = dy.len() / width;
        let parts = rows.div_ceil(ROWS).clamp(1, 16);
        let mut dx = vec![0.0; dy.len()];
        let start = Shared::new(&mut dx);
        let partial: Vec<(Vec<f32>, Vec<f32>)> = (0..parts)
            .into_par_iter()
            .map_init(Vec::new, |x, part| {
                let rows = share(rows, parts, part);
                let range = rows.start * width..rows.end * width;
                let (mut dw, mut db) = (vec![0.0; width], vec![0.0; width]);
                x.resize(range.len(), 0.0);
                fill(range.start, x);
                // SAFETY: the parts' rows are disjoint ranges of dx, which outlives the loop.
                let dx = unsafe { start.slice(range.start, range.len()) };
                gradients(dx, &mut dw, &mut db, x, &dy[range.clone()], ws, self.eps);
                after(range.start, dx);
                (dw, db)
            })
            .collect();
        for (dw, db) in &partial {
            for (weight, part) in [(&self.weight, dw), (&self.bias, db)] {
                if let Some(gradient) = &weight.gradient {
                    gradient.add_values(part);
                }
            }
        }
        Ok(dx)
    }
}

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(x, layout)?;
        let y = self.forward(x.len(), |at, y| y.copy_from_slice(&x[at..at + y.len()]))?;
        stored(y, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, dys) = (Numbers::of(x)?, Numbers::of(&dy)?);
        let xs: &[f32] = &xs;
        let fill = |at: usize, x: &mut [f32]| x.copy_from_slice(&xs[at..at + x.len()]);
        gradient(LayerNorm::backward(self, &dys, fill, |_, _| ())?, x)
    }
}

struct ResidualNorm {
    norm: LayerNorm,
    mask: Option<Mask>,
}

impl ResidualNorm {
    /// `sum = x + dropout(branch)`, from place `at` on.
    fn fill(&self, at: usize, sum: &mut [f32], branch: &[f32], x: &[f32]) {
        let range = at..at + sum.len();
        sum.copy_from_slice(&x[range.clone()]);
        match self.mask {
            Some(mask) => mask.add(at, sum, &branch[range]),
            None => sum.iter_mut().zip(&branch[range]).for_each(|(sum, branch)| *sum += branch),
        }
    }
}

impl CustomOp2 for ResidualNorm {
    fn name(&self) -> &'static str {
        "residual-norm"
    }

    fn cpu_fwd(
        &self,
        branch: &CpuStorage,
        branch_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (branch, x) = (numbers(branch, branch_layout)?, numbers(x, x_layout)?);
        let y = self.norm.forward(x.len(), |at, sum| self.fill(at, sum, branch, x))?;
        stored(y, x_layout.shape())
    }

    fn bwd(
        &self,
        branch: &Tensor,
        x: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (branches, xs, dys) = (Numbers::of(branch)?, Numbers::of(x)?, Numbers::of(&dy)?);
        let [branches, xs, dys]: [&[f32]; 3] = [&branches, &xs, &dys];
        let mut dbranch = vec![0.0; dys.len()];
        let start = Shared::new(&mut dbranch);
        let after = |at: usize, dsum: &[f32]| {
            // SAFETY: the parts' rows are disjoint ranges of dbranch, which outlives the loop.
            let dbranch = unsafe { start.slice(at, dsum.len()) };
            dbranch.copy_from_slice(dsum);
            if let Some(mask) = self.mask {
                mask.apply(at, dbranch);
            }
        };
        let dx = self.norm.backward(dys, |at, sum| self.fill(at, sum, branches, xs), after)?;
        Ok((gradient(dbranch, branch)?, gradient(dx, x)?))
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
    /// Rows in place.
    fn normalise(y: &mut [f32], w: &[f32], b: &[f32], eps: f32) {
        for y in y.chunks_exact_mut(w.len()) {
            let (mean, rstd) = statistics(y, eps);
            for ((y, &w), &b) in y.iter_mut().zip(w).zip(b) {
                *y = (*y - mean) * rstd * w + b;
            }
        }
    }
}

simd::vectorised! {
    fn gradients(dx: &mut [f32], dw: &mut [f32], db: &mut [f32], x: &[f32], dy: &[f32], w: &[f32], eps: f32) {
        let n = w.len();
        for ((dx, x), dy) in dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n)) {
            let (mean, rstd) = statistics(x, eps);
            let g_mean = simd::sum(n, |i| dy[i] * w[i]) / n as f32;
            let gx_mean = simd::sum(n, |i| dy[i] * w[i] * (x[i] - mean) * rstd) / n as f32;
            for i in 0..n {
                let normed = (x[i] - mean) * rstd;
                dx[i] = rstd * (dy[i] * w[i] - g_mean - normed * gx_mean);
                dw[i] += dy[i] * normed;
                db[i] += dy[i];
            }
        }
    }
}
