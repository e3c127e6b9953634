//! Layer normalisation over the last axis; the backward pass computes each row's statistics again.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Shared, share};
use super::{Kernels, Numbers, gradient, numbers, simd, stored};

/// x (…, C), weight (C), bias (C) → (…, C), with the biased variance.
pub fn layer_norm(kernels: Kernels, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => x.contiguous()?.apply_op3(weight, bias, LayerNorm { eps: eps as f32 }),
        Kernels::Composite => {
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
            let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
            normed.broadcast_mul(weight)?.broadcast_add(bias)
        }
    }
}

struct LayerNorm {
    eps: f32,
}

/// Rows that one task works on.
const ROWS: usize = 32;

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (numbers(x, x_layout)?, numbers(w, w_layout)?, numbers(b, b_layout)?);
        let width = w.len();
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(ROWS * width)
            .zip(x.par_chunks(ROWS * width))
            .for_each(|(y, x)| forward(y, x, w, b, self.eps));
        stored(y, x_layout.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (Numbers::of(x)?, Numbers::of(w)?, Numbers::of(&dy)?);
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
                backward(dx, &mut dw, &mut db, &xs[range.clone()], &dys[range], &ws, self.eps);
                (dw, db)
            })
            .collect();
        let (mut dw, mut db) = (vec![0.0; width], vec![0.0; width]);
        for (part_w, part_b) in &partial {
            dw.iter_mut().zip(part_w).for_each(|(sum, part)| *sum += part);
            db.iter_mut().zip(part_b).for_each(|(sum, part)| *sum += part);
        }
        Ok((gradient(dx, x)?, gradient(dw, w)?, gradient(db, b)?))
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
