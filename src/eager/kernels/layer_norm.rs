//! Layer normalisation over the last axis; the backward pass computes each row's statistics again.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Shared, share};
use super::{Kernels, Numbers, Weight, gradient, numbers, simd, stored};

/// x (…, C), weight (C), bias (C) → (…, C), with the biased variance.
pub fn layer_norm(kernels: Kernels, x: &Tensor, weight: &Weight, bias: &Weight, eps: f64) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => {
            let op = LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: eps as f32 };
            x.contiguous()?.apply_op1(op)
        }
        Kernels::Composite => {
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
            let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
            normed.broadcast_mul(&weight.values)?.broadcast_add(&bias.values)
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

impl CustomOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (w, b) = (Numbers::of(&self.weight.values)?, Numbers::of(&self.bias.values)?);
        let (x, w, b): (&[f32], &[f32], &[f32]) = (numbers(x, layout)?, &w, &b);
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(ROWS * w.len())
            .zip(x.par_chunks(ROWS * w.len()))
            .for_each(|(y, x)| forward(y, x, w, b, self.eps));
        stored(y, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (Numbers::of(x)?, Numbers::of(&self.weight.values)?, Numbers::of(&dy)?);
        let [xs, ws, dys]: [&[f32]; 3] = [&xs, &ws, &dys];
        let width = ws.len();
        let rows = xs.len() / width;
        let parts = rows.div_ceil(ROWS).clamp(1, 16);
        let mut dx = vec![0.0; xs.len()];
        let start = Shared::new(&mut dx);
        let partial: Vec<(Vec<f32>, Vec<f32>)> = (0..parts)
            .into_par_iter()
            .map(|part| {
                let rows = share(rows, parts, part);
                let range = rows.start * width..rows.end * width;
                let (mut dw, mut db) = (vec![0.0; width], vec![0.0; width]);
                // SAFETY: the parts' rows are disjoint ranges of dx, which outlives the loop.
                let dx = unsafe { start.slice(range.start, range.len()) };
                backward(dx, &mut dw, &mut db, &xs[range.clone()], &dys[range], ws, self.eps);
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
        gradient(dx, x)
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
    fn forward(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], eps: f32) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let (mean, rstd) = statistics(x, eps);
            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (x - mean) * rstd * w + b;
            }
        }
    }
}

simd::vectorised! {
    fn backward(dx: &mut [f32], dw: &mut [f32], db: &mut [f32], x: &[f32], dy: &[f32], w: &[f32], eps: f32) {
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
