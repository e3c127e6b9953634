//! Softmax cross-entropy of a map onto a vocabulary, or of given logits, in one pass: losses and gradients.
//!
//! The rows that have a target are worked on in chunks, and a chunk's logits turn into their own gradient where
//! they stand, so the logits of a whole batch are never held at once (Hsu et al. 2024, arXiv:2410.10989; Wijmans
//! et al. 2024, arXiv:2411.09009). The backward pass is thus over before the caller has the loss: the gradient's
//! factor is given beforehand. A row without a target has loss 0 and gradient 0, whatever stands in it.
//!
//! With logits z, probabilities p = softmax z, target t, vocabulary V and smoothing ε (Szegedy et al. 2016,
//! arXiv:1512.00567), as `torch.nn.CrossEntropyLoss` has them:
//!
//! `loss = −(1 − ε) · log p_t − ε / V · Σ log p_j` and `dz_j = p_j − ε / V − (1 − ε) · [j = t]`.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Factors, Matrix, MatrixMut, PackedMatrix, Write, parallel_product};
use super::{CHUNK, Gradient, Numbers, Weight, add_here, simd};

/// Logits that are held at once (32 MiB), where that is more than one row. Each of a chunk's products reads the
/// whole weight or its gradient: over GPT-2's vocabulary a quarter of this takes a third longer, twice as much saves
/// little.
const HELD: usize = 8 * 1024 * 1024;

/// x (T, C), weight (V, C), bias (V), targets (T) → the sum of the losses of `x · Wᵀ + b`, and dx, (T, C).
///
/// Gradients are those of the sum times `scale`, dW and db are added to their slots. Where no row has a target,
/// zeros are added: the weight was used, and that is its gradient.
///
/// # Errors
/// A target outside of the vocabulary; shapes that do not fit. No slot was touched then.
pub fn linear_cross_entropy(
    x: &[f32],
    weight: &Weight,
    bias: Option<&Weight>,
    targets: &[Option<u32>],
    smoothing: f32,
    scale: f32,
    factors: Factors,
) -> Result<(f64, Vec<f32>)> {
    let (losses, dx) = Head { weight, bias, smoothing, held: HELD, factors }.run(x, targets, Some(scale))?;
    Ok((sum(&losses), dx))
}

/// The same rows' losses, (T), without gradients.
///
/// # Errors
/// As above.
pub fn linear_losses(
    x: &[f32],
    weight: &Weight,
    bias: Option<&Weight>,
    targets: &[Option<u32>],
    smoothing: f32,
    factors: Factors,
) -> Result<Vec<f32>> {
    Ok(Head { weight, bias, smoothing, held: HELD, factors }.run(x, targets, None)?.0)
}

/// Logits (T, V), targets (T) → the sum of the losses; the logits become its gradient times `scale`.
///
/// # Errors
/// A target outside of the vocabulary; shapes that do not fit. The logits are as they were then.
pub fn cross_entropy(
    logits: &mut [f32],
    vocabulary: usize,
    targets: &[Option<u32>],
    smoothing: f32,
    scale: f32,
) -> Result<f64> {
    check(targets, vocabulary, smoothing)?;
    if logits.len() != targets.len() * vocabulary {
        candle_core::bail!("{} logits for {} rows of {vocabulary}", logits.len(), targets.len());
    }
    let mut losses = vec![0.0; targets.len()];
    by_row(logits, vocabulary, &mut losses, |row, logits| match targets[row] {
        Some(target) => loss_gradient(logits, target as usize, smoothing, scale),
        None => {
            logits.fill(0.0);
            0.0
        }
    });
    Ok(sum(&losses))
}

/// The losses, (T), of `x · Wᵀ + b` in candle's primitives, which hold the logits of all rows.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn composite(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Weight>,
    targets: &[Option<u32>],
    smoothing: f32,
) -> Result<Tensor> {
    let logits = x.matmul(&weight.values.t()?)?;
    let logits = match bias {
        Some(bias) => logits.broadcast_add(&bias.values)?,
        None => logits,
    };
    composite_losses(&logits, targets, smoothing)
}

/// The same of given logits, (T, V).
///
/// # Errors
/// As [`cross_entropy`].
pub fn composite_losses(logits: &Tensor, targets: &[Option<u32>], smoothing: f32) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    check(targets, vocabulary, smoothing)?;
    let device = logits.device();
    let ids: Vec<u32> = targets.iter().map(|target| target.unwrap_or(0)).collect();
    let kept: Vec<f32> = targets.iter().map(|target| if target.is_some() { 1.0 } else { 0.0 }).collect();
    let log_p = candle_nn::ops::log_softmax(logits, 1)?;
    let of_targets = log_p.gather(&Tensor::from_vec(ids, (rows, 1), device)?, 1)?.squeeze(1)?;
    let mut losses = (of_targets * -f64::from(1.0 - smoothing))?;
    if smoothing > 0.0 {
        losses = (losses - (log_p.mean(1)? * f64::from(smoothing))?)?;
    }
    losses * Tensor::from_vec(kept, rows, device)?.to_dtype(logits.dtype())?
}

/// A map onto a vocabulary, and the loss behind it.
struct Head<'a> {
    weight: &'a Weight,
    bias: Option<&'a Weight>,
    smoothing: f32,
    /// [`HELD`], or what a test wants.
    held: usize,
    /// Of all its products.
    factors: Factors,
}

impl Head<'_> {
    /// The rows' losses, and dx where the gradient's factor is given.
    fn run(&self, x: &[f32], targets: &[Option<u32>], scale: Option<f32>) -> Result<(Vec<f32>, Vec<f32>)> {
        let (vocabulary, input) = self.weight.values.dims2()?;
        check(targets, vocabulary, self.smoothing)?;
        if x.len() != targets.len() * input {
            candle_core::bail!("{} numbers for {} rows of {input} channels", x.len(), targets.len());
        }
        let w = Numbers::of(&self.weight.values)?;
        let w = Matrix::new(&w, vocabulary, input, input);
        let bias = self.bias.map(|bias| Numbers::of(&bias.values)).transpose()?;
        let bias: Option<&[f32]> = bias.as_deref();
        if let Some(bias) = bias.filter(|bias| bias.len() != vocabulary) {
            candle_core::bail!("a bias of {} for a vocabulary of {vocabulary}", bias.len());
        }

        let kept: Vec<(usize, usize)> =
            targets.iter().enumerate().filter_map(|(row, target)| Some((row, (*target)? as usize))).collect();
        let mut losses = vec![0.0; targets.len()];
        let mut dx = vec![0.0; if scale.is_some() { x.len() } else { 0 }];
        if kept.is_empty() {
            if scale.is_some() {
                self.add_zeros();
            }
            return Ok((losses, dx));
        }
        let rows = rows_of_chunk(kept.len(), vocabulary, self.held);
        let mut buffers = [rows * vocabulary, rows * input, rows].map(|n| vec![0.0f32; n]);
        // of all chunks
        let forward = PackedMatrix::new(w.transposed(), self.factors);
        let backward = scale.map(|_| PackedMatrix::new(w, self.factors));
        for kept in kept.chunks(rows) {
            let n = kept.len();
            let [logits, xs, of_rows] = &mut buffers;
            let (logits, xs) = (&mut logits[..n * vocabulary], &mut xs[..n * input]);
            for (i, &(row, _)) in kept.iter().enumerate() {
                xs[i * input..][..input].copy_from_slice(&x[row * input..][..input]);
            }
            let dst = MatrixMut::new(logits, n, vocabulary, vocabulary);
            let rows = Matrix::new(xs, n, input, input);
            forward.parallel_product(dst, Write::Replace, None, rows);
            by_row(logits, vocabulary, &mut of_rows[..n], |i, logits| {
                let target = kept[i].1;
                if let Some(bias) = bias {
                    add_here(logits, bias);
                }
                match scale {
                    Some(scale) => loss_gradient(logits, target, self.smoothing, scale),
                    None => loss(logits, target, self.smoothing),
                }
            });
            for (&(row, _), &loss) in kept.iter().zip(&*of_rows) {
                losses[row] = loss;
            }
            if let Some(backward) = &backward {
                self.add_gradients(logits, xs, n);
                // x's copies have served, and their gradients are as large
                let dst = MatrixMut::new(xs, n, input, input);
                let dz = Matrix::new(logits, n, vocabulary, vocabulary);
                backward.parallel_product(dst, Write::Replace, None, dz);
                for (i, &(row, _)) in kept.iter().enumerate() {
                    dx[row * input..][..input].copy_from_slice(&xs[i * input..][..input]);
                }
            }
        }
        Ok((losses, dx))
    }

    /// `dW += dzᵀ · x` and `db += Σ dz` over n rows.
    fn add_gradients(&self, dz: &[f32], x: &[f32], n: usize) {
        let (vocabulary, input) = (dz.len() / n, x.len() / n);
        if let Some(gradient) = &self.weight.gradient {
            let dz = Matrix::new(dz, n, vocabulary, vocabulary);
            gradient.add(|dw, write| {
                let dst = MatrixMut::new(dw, vocabulary, input, input);
                let x = Matrix::new(x, n, input, input);
                parallel_product(dst, write, dz.transposed(), x, self.factors);
            });
        }
        if let Some(gradient) = self.bias.and_then(|bias| bias.gradient.as_ref()) {
            add_column_sums(gradient, dz, vocabulary);
        }
    }

    fn add_zeros(&self) {
        for gradient in
            [Some(self.weight), self.bias].into_iter().flatten().filter_map(|w| w.gradient.as_ref())
        {
            gradient.add(|sums, write| match write {
                Write::Replace => sums.fill(0.0), // the buffer may hold an earlier step's numbers
                Write::Add => {}
            });
        }
    }
}

fn check(targets: &[Option<u32>], vocabulary: usize, smoothing: f32) -> Result<()> {
    if !(0.0..=1.0).contains(&smoothing) {
        candle_core::bail!("a label smoothing of {smoothing}: it goes from 0 to 1");
    }
    let outside = targets.iter().enumerate().find_map(|(row, target)| {
        let target = (*target)?;
        (target as usize >= vocabulary).then_some((row, target))
    });
    match outside {
        Some((row, target)) => {
            candle_core::bail!("row {row} has target {target}, outside of a vocabulary of {vocabulary}")
        }
        None => Ok(()),
    }
}

/// How many rows a chunk has, at least one. Chunks are of nearly the same size: a last one of few rows would take
/// almost as long as a full one.
fn rows_of_chunk(rows: usize, vocabulary: usize, held: usize) -> usize {
    let most = (held / vocabulary.max(1)).max(1);
    let chunks = rows.div_ceil(most).max(1);
    rows.div_ceil(chunks).max(1)
}

/// The sum of the losses, in the order of the rows.
fn sum(losses: &[f32]) -> f64 {
    losses.iter().copied().map(f64::from).sum()
}

/// `losses[row] = work(row, its part of values)` on all threads; values are (rows, width).
fn by_row(
    values: &mut [f32],
    width: usize,
    losses: &mut [f32],
    work: impl Fn(usize, &mut [f32]) -> f32 + Sync,
) {
    if width == 0 {
        return; // a row of nothing has no target
    }
    let rows = (CHUNK / width).max(1);
    let tasks = values.par_chunks_mut(rows * width).zip(losses.par_chunks_mut(rows)).enumerate();
    tasks.for_each(|(task, (values, losses))| {
        for (i, (values, loss)) in values.chunks_exact_mut(width).zip(losses).enumerate() {
            *loss = work(task * rows + i, values);
        }
    });
}

/// Adds the sums of a row-major matrix's columns, each over the rows in order.
fn add_column_sums(gradient: &Gradient, values: &[f32], columns: usize) {
    const COLUMNS: usize = 1024;
    gradient.add(|sums, write| {
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
            let mut part = [0.0; COLUMNS];
            let part = &mut part[..sums.len()];
            for row in values.chunks_exact(columns) {
                add_here(part, &row[task * COLUMNS..][..sums.len()]);
            }
            match write {
                Write::Replace => sums.copy_from_slice(part),
                Write::Add => add_here(sums, part),
            }
        });
    });
}

/// How far the target's logit lies below the largest; with smoothing, mixed with how far all do on average.
#[inline(always)]
fn below(row: &[f32], max: f32, target: usize, smoothing: f32) -> f32 {
    let of_target = (1.0 - smoothing) * (max - row[target]);
    if smoothing == 0.0 {
        return of_target; // a logit of −∞ is then allowed
    }
    let share = smoothing / row.len() as f32;
    of_target + simd::sum(row.len(), |i| share * (max - row[i]))
}

simd::vectorised! {
    /// A row's loss; finite where the target's probability is no longer a number above 0.
    pub(super) fn loss(row: &[f32], target: usize, smoothing: f32) -> f32 {
        let max = simd::max(row);
        let sum = simd::sum(row.len(), |i| simd::exp(row[i] - max));
        below(row, max, target, smoothing) + sum.ln()
    }
}

simd::vectorised! {
    /// The same number; the row becomes the loss's gradient times `scale`.
    pub(super) fn loss_gradient(row: &mut [f32], target: usize, smoothing: f32, scale: f32) -> f32 {
        let max = simd::max(row);
        let below = below(row, max, target, smoothing);
        for x in row.iter_mut() {
            *x = simd::exp(*x - max);
        }
        let sum = simd::sum(row.len(), |i| row[i]);
        let (factor, share) = (scale / sum, scale * smoothing / row.len() as f32);
        for x in row.iter_mut() {
            *x = *x * factor - share;
        }
        row[target] -= scale * (1.0 - smoothing);
        below + sum.ln()
    }
}

#[cfg(test)]
mod tests;
