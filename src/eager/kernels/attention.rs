//! Multi-head attention over packed sequences: a task a sequence and head, queries in blocks.
//!
//! Nothing of the size of a sequence squared outlives a block: the forward pass keeps the logarithm of each
//! row's softmax denominator, and the backward pass computes the weights again from it (Dao et al. 2022,
//! arXiv:2205.14135). Causal attention computes no key behind a block's last query.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::dropout::{Mask, Row};
use super::gemm::{Matrix, MatrixMut, Shared, Write, product, row_blocks};
use super::linear::{Input, LinearMap};
use super::{simd, wide};
use crate::data::batch::Spans;
use crate::eager::tape::{Tape, TapeValue};
use crate::model::ops::Sees;

/// Queries of one block.
const BLOCK: usize = 64;

/// q, k, v (T, H·D) → (T, H·D), fused; q and the result are (B, H·D) where one token of every sequence asks.
pub fn attention(
    tape: &Tape,
    q: &Arc<TapeValue>,
    k: &Arc<TapeValue>,
    v: &Arc<TapeValue>,
    how: &Attention,
) -> Result<Arc<TapeValue>> {
    let width = q.width;
    how.check([q, k, v].map(|x| (x.rows(), x.width)))?;
    let mut log_sums = Buffer::any(q.rows() * how.heads);
    let y = how.forward([q, k, v].map(|x| Columns::all(&x.numbers, width)), width, &mut log_sums);
    let (how, inputs) = (how.clone(), [q, k, v].map(Arc::clone));
    Ok(tape.push_with_result(y, width, move |y, dy, flow| {
        let gradients = how.backward_of_all(inputs.each_ref().map(|x| &x.numbers[..]), &y, &log_sums, &dy);
        inputs.iter().zip(gradients).for_each(|(x, gradient)| flow.give(x, gradient));
        Ok(())
    }))
}

/// The same where q, k and v are the three parts of one value, (T, 3·H·D), as one linear map gives them.
pub fn attention_of_parts(tape: &Tape, x: &Arc<TapeValue>, how: &Attention) -> Result<Arc<TapeValue>> {
    let width = x.width / 3;
    how.check([(x.rows(), width); 3])?;
    let mut log_sums = Buffer::any(x.rows() * how.heads);
    let y = how.forward(Columns::parts(&x.numbers, width), width, &mut log_sums);
    let (how, x) = (how.clone(), x.clone());
    Ok(tape.push_with_result(y, width, move |y, dy, flow| {
        let mut dx = Buffer::any(x.numbers.len());
        let start = Shared::new(&mut dx);
        let gradients = [0, 1, 2].map(|i| ColumnsMut { x: start, at: i * width, stride: 3 * width });
        how.backward(Columns::parts(&x.numbers, width), &y, &log_sums, &dy, gradients);
        flow.give(&x, dx);
        Ok(())
    }))
}

/// The same over three linear maps of x, (T, C).
pub fn self_attention(
    tape: &Tape,
    x: &Arc<TapeValue>,
    maps: [&LinearMap; 3],
    how: &Attention,
) -> Result<Arc<TapeValue>> {
    let (rows, width) = (x.rows(), maps[0].output);
    maps.iter().try_for_each(|map| map.check(x.width))?;
    how.check(maps.map(|map| (rows, map.output)))?;
    let mapped = map_all(&x.numbers, maps)?;
    let mut log_sums = Buffer::any(rows * how.heads);
    let y = how.forward(mapped.each_ref().map(|x| Columns::all(x, width)), width, &mut log_sums);
    let kept = tape.keeps().then_some(mapped);
    let (how, x, maps) = (how.clone(), x.clone(), maps.map(LinearMap::clone));
    Ok(tape.push_with_result(y, width, move |y, dy, flow| {
        let mapped = match kept {
            Some(mapped) => mapped,
            None => map_all(&x.numbers, maps.each_ref())?,
        };
        let gradients = how.backward_of_all(mapped.each_ref().map(|x| &x[..]), &y, &log_sums, &dy);
        drop(mapped);
        let input = Input::new(&x.numbers);
        for (map, dy) in maps.iter().zip(&gradients) {
            flow.add(&x, |dx, write| map.backward_input(dx, write, dy))?;
            map.backward_weights(&input, dy);
        }
        Ok(())
    }))
}

/// Three linear maps of x, (T, C).
fn map_all(x: &[f32], maps: [&LinearMap; 3]) -> Result<[Buffer; 3]> {
    let (rows, width) = (x.len() / maps[0].input, maps[0].output);
    let mut mapped = [(); 3].map(|()| Buffer::any(rows * width));
    let packed = [maps[0].packed()?, maps[1].packed()?, maps[2].packed()?];
    let biases = [maps[0].bias()?, maps[1].bias()?, maps[2].bias()?];
    let starts = mapped.each_mut().map(|y| Shared::new(y));
    row_blocks(rows, |rows| {
        for (i, start) in starts.iter().enumerate() {
            // SAFETY: blocks of rows do not overlap, and the buffers outlive the loop.
            let y = unsafe { start.slice(rows.start * width, rows.len() * width) };
            maps[i].block(&packed[i], biases[i].as_deref(), y, x, rows.clone());
        }
    });
    Ok(mapped)
}

/// q, k, v (T, H·D) → (T, H·D): inside every span, every token sees every token or those up to itself; in candle's
/// operations.
pub fn composite(q: &Tensor, k: &Tensor, v: &Tensor, how: &Attention) -> Result<Tensor> {
    let heads = how.heads;
    let (_, width) = q.dims2()?;
    how.check([q.dims2()?, k.dims2()?, v.dims2()?])?;
    let d = width / heads;
    let mut outputs = Vec::with_capacity(how.spans.len());
    for Asked { span, queries, .. } in how.asked().filter(|asked| !asked.queries.is_empty()) {
        let (m, n) = (queries.len(), span.len());
        let part = |x: &Tensor, rows: &Range<usize>| {
            let n = rows.len();
            x.narrow(0, rows.start, n)?.reshape((n, heads, d))?.transpose(0, 1)?.contiguous()
        };
        let (q, k, v) = (part(q, &queries)?, part(k, &span)?, part(v, &span)?); // (H, T, D)
        let mut scores = (wide(&q.matmul(&k.transpose(1, 2)?)?)? / (d as f64).sqrt())?;
        if how.sees == Sees::Causal && matches!(how.queries, Queries::All) {
            // a row has its own key at least, so its largest score is finite
            let never = Tensor::full(f32::NEG_INFINITY, scores.shape(), scores.device())?;
            let visible = up_to_itself(n, scores.device())?.broadcast_as(scores.shape())?;
            scores = visible.where_cond(&scores, &never)?;
        }
        let mut weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        if let Some(mask) = how.mask {
            let mut factors = Vec::with_capacity(heads * m * n);
            for head in 0..heads {
                for t in queries.clone() {
                    let row = mask.row((t * heads + head) as u64);
                    factors.extend((0..n as u32).map(|column| row.factor(column)));
                }
            }
            let factors = Tensor::from_vec(factors, (heads, m, n), weights.device())?;
            weights = (weights * factors)?;
        }
        outputs.push(weights.to_dtype(v.dtype())?.matmul(&v)?.transpose(0, 1)?.reshape((m, width))?);
    }
    Tensor::cat(&outputs, 0)
}

/// (T, T), 1 where the key is not behind the query.
fn up_to_itself(n: usize, device: &Device) -> Result<Tensor> {
    let visible: Vec<u8> = (0..n).flat_map(|query| (0..n).map(move |key| u8::from(key <= query))).collect();
    Tensor::from_vec(visible, (n, n), device)
}

/// Which tokens see each other, by how many heads, and which weights are dropped: row `t · H + head` of the mask,
/// column the key's place in its span.
#[derive(Clone)]
pub struct Attention {
    pub spans: Arc<Spans>,
    pub heads: usize,
    pub sees: Sees,
    pub queries: Queries,
    pub mask: Option<Mask>,
}

/// Which tokens of every sequence ask.
#[derive(Clone)]
pub enum Queries {
    All,
    /// The first alone.
    First,
    /// The last alone.
    Last,
    /// Some, one at least: these are the rows of q that each sequence has.
    Asked(Arc<Spans>),
}

/// A sequence and its queries.
struct Asked {
    /// The sequence's rows of the keys.
    span: Range<usize>,
    /// Its rows of the queries.
    queries: Range<usize>,
    /// The first of them's place in the sequence.
    position: usize,
}

/// One block of queries of one head of one sequence.
struct QueryBlock {
    head: usize,
    /// The sequence's tokens that any of the block's sees: the keys.
    keys: Range<usize>,
    /// The block's rows of the queries.
    queries: Range<usize>,
    /// How many keys the first of them sees; causal, the next one sees one more.
    seen: usize,
}

/// Queries, keys or values: columns of a row-major matrix, from `at` on.
#[derive(Clone, Copy)]
struct Columns<'a> {
    x: &'a [f32],
    at: usize,
    stride: usize,
}

impl<'a> Columns<'a> {
    fn all(x: &'a [f32], width: usize) -> Self {
        Self { x, at: 0, stride: width }
    }

    fn parts(x: &'a [f32], width: usize) -> [Self; 3] {
        [0, 1, 2].map(|i| Self { x, at: i * width, stride: 3 * width })
    }

    fn rows(&self) -> usize {
        self.x.len() / self.stride
    }

    /// A head's (rows, D).
    fn head(&self, rows: &Range<usize>, head: usize, d: usize) -> Matrix<'a> {
        Matrix::new(&self.x[rows.start * self.stride + self.at + head * d..], rows.len(), d, self.stride)
    }
}

/// The same of a matrix that is written.
#[derive(Clone, Copy)]
struct ColumnsMut {
    x: Shared,
    at: usize,
    stride: usize,
}

impl ColumnsMut {
    /// A head's (rows, D).
    ///
    /// # Safety
    /// The matrix outlives the result; no other task touches this part of it.
    unsafe fn head<'a>(&self, rows: &Range<usize>, head: usize, d: usize) -> MatrixMut<'a> {
        let start = rows.start * self.stride + self.at + head * d;
        // SAFETY: the part lies inside the matrix; the rest is the caller's promise.
        unsafe { MatrixMut::raw(self.x.get().add(start), rows.len(), d, self.stride) }
    }
}

impl Attention {
    fn mask_row(&self, query: usize, head: usize) -> Option<Row> {
        self.mask.map(|mask| mask.row((query * self.heads + head) as u64))
    }

    /// How many keys the `i`-th query of a block sees.
    fn seen(&self, block: &QueryBlock, i: usize) -> usize {
        match self.sees {
            Sees::All => block.seen,
            Sees::Causal => block.seen + i,
        }
    }

    fn asked(&self) -> impl Iterator<Item = Asked> + '_ {
        self.spans.iter().enumerate().map(|(b, span)| match &self.queries {
            Queries::All => Asked { queries: span.clone(), position: 0, span },
            Queries::First => Asked { queries: b..b + 1, position: 0, span },
            Queries::Last => Asked { queries: b..b + 1, position: span.len() - 1, span },
            Queries::Asked(rows) => Asked { queries: rows.get(b), position: 0, span },
        })
    }

    fn blocks(&self) -> Vec<QueryBlock> {
        let mut blocks = Vec::new();
        for Asked { span, queries, position } in self.asked() {
            for head in 0..self.heads {
                for start in queries.clone().step_by(BLOCK) {
                    let part = start..(start + BLOCK).min(queries.end);
                    let (seen, most) = match self.sees {
                        Sees::All => (span.len(), span.len()),
                        Sees::Causal => {
                            let before = position + start - queries.start;
                            (before + 1, before + part.len())
                        }
                    };
                    blocks.push(QueryBlock {
                        head,
                        keys: span.start..span.start + most,
                        queries: part,
                        seen,
                    });
                }
            }
        }
        blocks
    }
}

impl Attention {
    fn check(&self, shapes: [(usize, usize); 3]) -> Result<()> {
        let (tokens, width) = (self.spans.tokens(), shapes[0].1);
        let asking = match &self.queries {
            Queries::All => tokens,
            Queries::First | Queries::Last => self.spans.len(),
            Queries::Asked(rows) => rows.tokens(),
        };
        if shapes != [(asking, width), (tokens, width), (tokens, width)] || width % self.heads != 0 {
            candle_core::bail!(
                "attention by {} heads takes {asking} queries, {tokens} keys and values of one width, not {shapes:?}",
                self.heads
            );
        }
        match &self.queries {
            Queries::First | Queries::Last if self.spans.iter().any(|span| span.is_empty()) => {
                candle_core::bail!("a sequence without tokens has no token that asks")
            }
            // its keys and values would get no gradient
            Queries::Asked(rows) if rows.iter().any(|rows| rows.is_empty()) => {
                candle_core::bail!("a sequence has no token that asks")
            }
            Queries::First | Queries::Asked(_) if self.sees == Sees::Causal => {
                candle_core::bail!("of a causal model's tokens all ask, or the last one")
            }
            Queries::Asked(rows) if rows.len() != self.spans.len() => {
                candle_core::bail!("{} sequences ask, of {}", rows.len(), self.spans.len())
            }
            _ => Ok(()),
        }
    }

    /// `log_sums` (H, queries) receives the logarithm of each row's softmax denominator.
    fn forward(&self, [q, k, v]: [Columns; 3], width: usize, log_sums: &mut [f32]) -> Buffer {
        let (asking, d) = (q.rows(), width / self.heads);
        let scale = 1.0 / (d as f32).sqrt();
        let mut y = Buffer::any(asking * width);
        let y_columns = ColumnsMut { x: Shared::new(&mut y), at: 0, stride: width };
        let sums_start = Shared::new(log_sums);
        self.blocks().par_iter().for_each_init(Vec::new, |weights, block| {
            let QueryBlock { head, keys, queries, .. } = block;
            let (m, n) = (queries.len(), keys.len());
            weights.resize(m * n, 0.0);
            let scores = MatrixMut::new(weights, m, n, n);
            let (q, k) = (q.head(queries, *head, d), k.head(keys, *head, d));
            product(scores, Write::Replace, scale, q, k.transposed());
            // SAFETY: a block's queries and head are its own, in the sums and in y.
            let sums = unsafe { sums_start.slice(head * asking + queries.start, m) };
            for (i, (row, sum)) in weights.chunks_exact_mut(n).zip(sums).enumerate() {
                let (row, behind) = row.split_at_mut(self.seen(block, i));
                behind.fill(0.0);
                *sum = softmax(row);
                if let Some(mask) = self.mask_row(queries.start + i, *head) {
                    multiply(row, mask);
                }
            }
            // SAFETY: as above.
            let y = unsafe { y_columns.head(queries, *head, d) };
            product(y, Write::Replace, 1.0, Matrix::new(weights, m, n, n), v.head(keys, *head, d));
        });
        y
    }

    /// dq, dk and dv of queries, keys and values of their own.
    fn backward_of_all(
        &self,
        inputs: [&[f32]; 3],
        y: &TapeValue,
        log_sums: &[f32],
        dy: &[f32],
    ) -> [Buffer; 3] {
        let mut gradients = inputs.map(|x| Buffer::any(x.len()));
        let places = gradients.each_mut().map(|gradient| {
            let x = Shared::new(gradient);
            ColumnsMut { x, at: 0, stride: y.width }
        });
        self.backward(inputs.map(|x| Columns::all(x, y.width)), y, log_sums, dy, places);
        gradients
    }

    /// Writes dq, dk and dv, whose places outlive the call and are nobody else's.
    fn backward(
        &self,
        [qs, ks, vs]: [Columns; 3],
        y: &TapeValue,
        log_sums: &[f32],
        dy: &[f32],
        [dqs, dks, dvs]: [ColumnsMut; 3],
    ) {
        let (asking, width) = (qs.rows(), y.width);
        let d = width / self.heads;
        let scale = 1.0 / (d as f32).sqrt();
        let (ys, dys) = (Columns::all(&y.numbers, width), Columns::all(dy, width));
        // a sequence's head is one task: its blocks add to the same dK and dV, in order
        let mut tasks: Vec<Vec<QueryBlock>> = Vec::new();
        for block in self.blocks() {
            match tasks.last_mut() {
                Some(task) if task[0].head == block.head && task[0].keys.start == block.keys.start => {
                    task.push(block);
                }
                _ => tasks.push(vec![block]),
            }
        }
        if self.sees == Sees::Causal {
            // the last block has every key: it writes all of dK and dV, and the others add to the front
            tasks.iter_mut().for_each(|task| task.reverse());
        }
        tasks.par_iter().for_each_init(<(Vec<f32>, Vec<f32>)>::default, |(weights, dweights), task| {
            for (i, block) in task.iter().enumerate() {
                let QueryBlock { head, keys, queries, .. } = block;
                let first = if i == 0 { Write::Replace } else { Write::Add };
                let (m, n) = (queries.len(), keys.len());
                weights.resize(m * n, 0.0);
                dweights.resize(m * n, 0.0);
                let (q, dy) = (qs.head(queries, *head, d), dys.head(queries, *head, d));
                let (k, v) = (ks.head(keys, *head, d), vs.head(keys, *head, d));
                product(MatrixMut::new(weights, m, n, n), Write::Replace, scale, q, k.transposed());
                product(MatrixMut::new(dweights, m, n, n), Write::Replace, 1.0, dy, v.transposed());
                for (i, query) in queries.clone().enumerate() {
                    let seen = self.seen(block, i);
                    let (row, behind) = weights[i * n..][..n].split_at_mut(seen);
                    let (drow, dbehind) = dweights[i * n..][..n].split_at_mut(seen);
                    behind.fill(0.0);
                    dbehind.fill(0.0);
                    let at = query * width + head * d;
                    let delta = dot(&dys.x[at..at + d], &ys.x[at..at + d]);
                    let log_sum = log_sums[head * asking + query];
                    match self.mask_row(query, *head) {
                        None => softmax_backward(row, drow, log_sum, delta),
                        Some(mask) => softmax_backward_masked(row, drow, log_sum, delta, mask),
                    }
                }
                let (p, ds) = (Matrix::new(weights, m, n, n), Matrix::new(dweights, m, n, n));
                // SAFETY: this sequence and head belong to this task alone.
                unsafe {
                    product(dqs.head(queries, *head, d), Write::Replace, scale, ds, k);
                    product(dks.head(keys, *head, d), first, scale, ds.transposed(), q);
                    product(dvs.head(keys, *head, d), first, 1.0, p.transposed(), dy);
                }
            }
        });
    }
}

simd::vectorised! {
    /// Scores → weights in place; returns the logarithm of the denominator.
    pub(super) fn softmax(row: &mut [f32]) -> f32 {
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
    pub(super) fn softmax_backward(row: &mut [f32], drow: &mut [f32], log_sum: f32, delta: f32) {
        for (x, dx) in row.iter_mut().zip(drow) {
            let p = simd::exp(*x - log_sum);
            *dx = p * (*dx - delta);
            *x = p;
        }
    }
}

simd::vectorised! {
    /// The same where weights were dropped: what goes on to the values is the masked weight.
    pub(super) fn softmax_backward_masked(row: &mut [f32], drow: &mut [f32], log_sum: f32, delta: f32, mask: Row) {
        for (column, (x, dx)) in row.iter_mut().zip(drow).enumerate() {
            let p = simd::exp(*x - log_sum);
            let factor = mask.factor(column as u32);
            *dx = p * (*dx * factor - delta);
            *x = p * factor;
        }
    }
}

simd::vectorised! {
    pub(super) fn multiply(row: &mut [f32], mask: Row) {
        for (column, x) in row.iter_mut().enumerate() {
            *x *= mask.factor(column as u32);
        }
    }
}

simd::vectorised! {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        simd::sum(n, |i| a[i] * b[i])
    }
}
