//! Multi-head attention over packed sequences: a task a sequence and head, queries in blocks.
//!
//! Nothing of the size of a sequence squared outlives a block: the forward pass keeps the logarithm of each
//! row's softmax denominator, and the backward pass computes the weights again from it (Dao et al. 2022,
//! arXiv:2205.14135).

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::dropout::{Mask, Row};
use super::gemm::{Matrix, MatrixMut, Shared, Write, product};
use super::linear::{Map, linear};
use super::{Kernels, Numbers, Weight, gradient, numbers, simd, stored, wide};
use crate::data::batch::Spans;

/// Queries of one block.
const BLOCK: usize = 64;

/// q, k, v (T, H·D) → (T, H·D): inside every span, every token sees every token.
/// `mask` drops weights: row `t · H + head`, column the key's place in its span.
pub fn attention(
    kernels: Kernels,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &Arc<Spans>,
    heads: usize,
    mask: Option<Mask>,
) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => {
            let op = Attention { spans: spans.clone(), heads, mask, log_sums: OnceLock::new() };
            q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
        }
        Kernels::Composite => composite(q, k, v, spans, heads, mask),
    }
}

/// The same over three linear maps (weight, bias) of x, (T, C).
pub fn self_attention(
    kernels: Kernels,
    x: &Tensor,
    maps: [&(Weight, Weight); 3],
    spans: &Arc<Spans>,
    heads: usize,
    mask: Option<Mask>,
) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => {
            let [q, k, v] = maps.map(|(weight, bias)| Map::new(weight, bias));
            let attention = Attention { spans: spans.clone(), heads, mask, log_sums: OnceLock::new() };
            let op = SelfAttention { attention, maps: [q?, k?, v?], mapped: OnceLock::new() };
            x.contiguous()?.apply_op1(op)
        }
        Kernels::Composite => {
            let [q, k, v] = maps.map(|(weight, bias)| linear(kernels, x, weight, bias));
            attention(kernels, &q?, &k?, &v?, spans, heads, mask)
        }
    }
}

fn composite(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &Spans,
    heads: usize,
    mask: Option<Mask>,
) -> Result<Tensor> {
    let (_, width) = q.dims2()?;
    let d = width / heads;
    let mut outputs = Vec::with_capacity(spans.len());
    for span in spans.iter().filter(|span| !span.is_empty()) {
        let (start, n) = (span.start, span.len());
        let part = |x: &Tensor| x.narrow(0, start, n)?.reshape((n, heads, d))?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (part(q)?, part(k)?, part(v)?); // (H, T, D)
        let scores = (wide(&q.matmul(&k.transpose(1, 2)?)?)? / (d as f64).sqrt())?;
        let mut weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        if let Some(mask) = mask {
            let mut factors = Vec::with_capacity(heads * n * n);
            for head in 0..heads {
                for t in span.clone() {
                    let row = mask.row((t * heads + head) as u64);
                    factors.extend((0..n as u32).map(|column| row.factor(column)));
                }
            }
            let factors = Tensor::from_vec(factors, (heads, n, n), weights.device())?;
            weights = (weights * factors)?;
        }
        outputs.push(weights.to_dtype(v.dtype())?.matmul(&v)?.transpose(0, 1)?.reshape((n, width))?);
    }
    Tensor::cat(&outputs, 0)
}

struct Attention {
    spans: Arc<Spans>,
    heads: usize,
    mask: Option<Mask>,
    /// (H, T): the logarithm of each row's softmax denominator, from the forward pass.
    log_sums: OnceLock<Vec<f32>>,
}

/// One block of queries of one head of one sequence.
struct Block {
    head: usize,
    /// The sequence's tokens: the keys.
    keys: std::ops::Range<usize>,
    /// The block's tokens.
    queries: std::ops::Range<usize>,
}

impl Attention {
    /// A head's (rows, D) part of a (T, C) tensor.
    fn part<'a>(&self, x: &'a [f32], rows: &std::ops::Range<usize>, width: usize, head: usize) -> Matrix<'a> {
        let d = width / self.heads;
        Matrix::new(&x[rows.start * width + head * d..], rows.len(), d, width)
    }

    /// The same part of a tensor that is written.
    ///
    /// # Safety
    /// `x` points to a (T, C) tensor that outlives the result; no other task touches this part of it.
    unsafe fn part_mut<'a>(
        &self,
        x: Shared,
        rows: &std::ops::Range<usize>,
        width: usize,
        head: usize,
    ) -> MatrixMut<'a> {
        let d = width / self.heads;
        // SAFETY: the part lies inside the tensor; the rest is the caller's promise.
        unsafe { MatrixMut::raw(x.get().add(rows.start * width + head * d), rows.len(), d, width) }
    }

    fn mask_row(&self, query: usize, head: usize) -> Option<Row> {
        self.mask.map(|mask| mask.row((query * self.heads + head) as u64))
    }

    fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for keys in self.spans.iter() {
            for head in 0..self.heads {
                for start in keys.clone().step_by(BLOCK) {
                    let queries = start..(start + BLOCK).min(keys.end);
                    blocks.push(Block { head, keys: keys.clone(), queries });
                }
            }
        }
        blocks
    }
}

impl Attention {
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], width: usize) -> Vec<f32> {
        let tokens = q.len() / width;
        let scale = 1.0 / ((width / self.heads) as f32).sqrt();
        let mut y = vec![0.0; tokens * width];
        let mut log_sums = vec![0.0; self.heads * tokens];
        let (y_start, sums_start) = (Shared::new(&mut y), Shared::new(&mut log_sums));
        self.blocks().par_iter().for_each_init(Vec::new, |weights, Block { head, keys, queries }| {
            let (m, n) = (queries.len(), keys.len());
            weights.resize(m * n, 0.0);
            let scores = MatrixMut::new(weights, m, n, n);
            let q = self.part(q, queries, width, *head);
            product(scores, Write::Replace, scale, q, self.part(k, keys, width, *head).transposed());
            // SAFETY: a block's queries and head are its own, in the sums and in y.
            let sums = unsafe { sums_start.slice(head * tokens + queries.start, m) };
            for ((row, sum), query) in weights.chunks_exact_mut(n).zip(sums).zip(queries.clone()) {
                *sum = softmax(row);
                if let Some(mask) = self.mask_row(query, *head) {
                    multiply(row, mask);
                }
            }
            // SAFETY: as above.
            let y = unsafe { self.part_mut(y_start, queries, width, *head) };
            product(y, Write::Replace, 1.0, Matrix::new(weights, m, n, n), self.part(v, keys, width, *head));
        });
        // an operation is applied once, so the cell is empty
        let _ = self.log_sums.set(log_sums);
        y
    }

    /// dq, dk and dv.
    fn backward(&self, [q, k, v]: [&[f32]; 3], y: &[f32], dy: &[f32], width: usize) -> Result<[Vec<f32>; 3]> {
        let (qs, ks, vs, ys, dys) = (q, k, v, y, dy);
        let tokens = qs.len() / width;
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("attention's backward pass before its forward pass");
        };
        let d = width / self.heads;
        let scale = 1.0 / (d as f32).sqrt();
        let (mut dq, mut dk, mut dv) =
            (vec![0.0; tokens * width], vec![0.0; tokens * width], vec![0.0; tokens * width]);
        let (dq_start, dk_start, dv_start) =
            (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
        // a sequence's head is one task: its blocks add to the same dK and dV, in order
        let mut tasks: Vec<Vec<Block>> = Vec::new();
        for block in self.blocks() {
            match tasks.last_mut() {
                Some(task) if task[0].head == block.head && task[0].keys == block.keys => task.push(block),
                _ => tasks.push(vec![block]),
            }
        }
        tasks.par_iter().for_each_init(<(Vec<f32>, Vec<f32>)>::default, |(weights, dweights), task| {
            for Block { head, keys, queries } in task {
                let (m, n) = (queries.len(), keys.len());
                weights.resize(m * n, 0.0);
                dweights.resize(m * n, 0.0);
                let (q, k, v) = (
                    self.part(qs, queries, width, *head),
                    self.part(ks, keys, width, *head),
                    self.part(vs, keys, width, *head),
                );
                let dy = self.part(dys, queries, width, *head);
                product(MatrixMut::new(weights, m, n, n), Write::Replace, scale, q, k.transposed());
                product(MatrixMut::new(dweights, m, n, n), Write::Replace, 1.0, dy, v.transposed());
                for (i, query) in queries.clone().enumerate() {
                    let (row, drow) = (&mut weights[i * n..][..n], &mut dweights[i * n..][..n]);
                    let at = query * width + head * d;
                    let delta = dot(&dys[at..at + d], &ys[at..at + d]);
                    let log_sum = log_sums[head * tokens + query];
                    match self.mask_row(query, *head) {
                        None => softmax_backward(row, drow, log_sum, delta),
                        Some(mask) => softmax_backward_masked(row, drow, log_sum, delta, mask),
                    }
                }
                let (p, ds) = (Matrix::new(weights, m, n, n), Matrix::new(dweights, m, n, n));
                // SAFETY: this sequence and head belong to this task alone.
                unsafe {
                    let (dq, dk, dv) = (
                        self.part_mut(dq_start, queries, width, *head),
                        self.part_mut(dk_start, keys, width, *head),
                        self.part_mut(dv_start, keys, width, *head),
                    );
                    product(dq, Write::Replace, scale, ds, k);
                    product(dk, Write::Add, scale, ds.transposed(), q);
                    product(dv, Write::Add, 1.0, p.transposed(), dy);
                }
            }
        });
        Ok([dq, dk, dv])
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = q_layout.shape().dims2()?;
        let (q, k, v) = (numbers(q, q_layout)?, numbers(k, k_layout)?, numbers(v, v_layout)?);
        stored(self.forward(q, k, v, width), (tokens, width))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, width) = q.dims2()?;
        let dy = dy.contiguous()?;
        let (qs, ks, vs) = (Numbers::of(q)?, Numbers::of(k)?, Numbers::of(v)?);
        let (ys, dys) = (Numbers::of(y)?, Numbers::of(&dy)?);
        let [dq, dk, dv] = self.backward([&qs, &ks, &vs], &ys, &dys, width)?;
        Ok((gradient(dq, q)?, gradient(dk, k)?, gradient(dv, v)?))
    }
}

/// The attention of three linear maps of one activation.
struct SelfAttention {
    attention: Attention,
    maps: [Map; 3],
    /// q, k and v, from the forward pass.
    mapped: OnceLock<[Vec<f32>; 3]>,
}

impl CustomOp1 for SelfAttention {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, input) = layout.shape().dims2()?;
        let x = numbers(x, layout)?;
        let width = self.maps[0].output;
        let mut mapped = [const { Vec::new() }; 3];
        for (map, y) in self.maps.iter().zip(&mut mapped) {
            if (map.input, map.output) != (input, width) {
                candle_core::bail!("self-attention's maps are of different shapes");
            }
            *y = vec![0.0; tokens * width];
            map.forward(x, |_, _| (), Shared::new(y))?;
        }
        let y = self.attention.forward(&mapped[0], &mapped[1], &mapped[2], width);
        // an operation is applied once, so the cell is empty
        let _ = self.mapped.set(mapped);
        stored(y, (tokens, width))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let Some([q, k, v]) = self.mapped.get() else {
            candle_core::bail!("self-attention's backward pass before its forward pass");
        };
        let dy = dy.contiguous()?;
        let (xs, ys, dys) = (Numbers::of(x)?, Numbers::of(y)?, Numbers::of(&dy)?);
        let gradients = self.attention.backward([q, k, v], &ys, &dys, self.maps[0].output)?;
        let mut dx = vec![0.0; xs.len()];
        for (i, (map, dy)) in self.maps.iter().zip(&gradients).enumerate() {
            map.backward_weights(&xs, dy);
            map.backward_input(&mut dx, if i == 0 { Write::Replace } else { Write::Add }, dy)?;
        }
        gradient(dx, x)
    }
}

simd::vectorised! {
    /// Scores → weights in place; returns the logarithm of the denominator.
    fn softmax(row: &mut [f32]) -> f32 {
        let max = simd::max(row);
        for x in row.iter_mut() {
            *x = simd::exp(*x - max);
        }
        let sum = simd::sum(row.len(), |i| row[i]);
        let factor = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= factor;
        }
        max + sum.ln()
    }
}

simd::vectorised! {
    /// Scores and the weights' gradient → weights and the scores' gradient, in place.
    fn softmax_backward(row: &mut [f32], drow: &mut [f32], log_sum: f32, delta: f32) {
        for (x, dx) in row.iter_mut().zip(drow) {
            let p = simd::exp(*x - log_sum);
            *dx = p * (*dx - delta);
            *x = p;
        }
    }
}

simd::vectorised! {
    /// The same where weights were dropped: what goes on to the values is the masked weight.
    fn softmax_backward_masked(row: &mut [f32], drow: &mut [f32], log_sum: f32, delta: f32, mask: Row) {
        for (column, (x, dx)) in row.iter_mut().zip(drow).enumerate() {
            let p = simd::exp(*x - log_sum);
            let factor = mask.factor(column as u32);
            *dx = p * (*dx * factor - delta);
            *x = p * factor;
        }
    }
}

simd::vectorised! {
    fn multiply(row: &mut [f32], mask: Row) {
        for (column, x) in row.iter_mut().enumerate() {
            *x *= mask.factor(column as u32);
        }
    }
}

simd::vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        simd::sum(n, |i| a[i] * b[i])
    }
}
