//! The tokens of every sequence as one row, and rows of length 1.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::gemm::Write;
use super::reorder::side_by_side;
use super::wide;
use crate::data::batch::Spans;
use crate::eager::tape::{Tape, TapeValue};
use crate::model::ops::Pooling;

/// The smallest norm that a row is divided by: `torch.nn.functional.normalize`'s.
pub const SMALLEST_NORM: f32 = 1e-12;

/// What each token counts in its sequence's row, (T); none where the largest number is taken.
fn shares(spans: &Spans, how: Pooling) -> Option<Vec<f32>> {
    let share: fn(usize, usize) -> f32 = match how {
        Pooling::Mean => |_, length| 1.0 / length as f32,
        Pooling::MeanSqrtLength => |_, length| 1.0 / (length as f32).sqrt(),
        Pooling::WeightedMean => |at, length| (at + 1) as f32 / (length * (length + 1) / 2) as f32,
        Pooling::Max => return None,
    };
    Some(spans.iter().flat_map(|span| (0..span.len()).map(move |at| share(at, span.len()))).collect())
}

/// # Errors
/// The rows are not those of the spans, or a sequence has none.
fn check(rows: usize, spans: &Spans) -> Result<()> {
    if rows != spans.tokens() || spans.iter().any(|span| span.is_empty()) {
        candle_core::bail!("{rows} tokens are pooled of {} sequences with {}", spans.len(), spans.tokens());
    }
    Ok(())
}

/// x (T, C) → (B, C), in candle's operations.
///
/// # Errors
/// x has other rows than the spans, or a sequence has none.
pub fn composite(x: &Tensor, spans: &Spans, how: Pooling) -> Result<Tensor> {
    check(x.dim(0)?, spans)?;
    let x = wide(x)?.contiguous()?;
    let lengths: Vec<usize> = spans.iter().map(|span| span.len()).collect();
    let Some(shares) = shares(spans, how) else {
        let rows = side_by_side(&x, &lengths, f32::NEG_INFINITY)?;
        // candle's own maximum gives each of several largest numbers the whole gradient
        return rows.gather(&rows.argmax_keepdim(1)?, 1)?.squeeze(1);
    };
    let shares = Tensor::from_vec(shares, (spans.tokens(), 1), x.device())?;
    side_by_side(&x.broadcast_mul(&shares)?, &lengths, 0.0)?.sum(1)
}

/// The same, fused. Of several largest numbers the first gets the gradient.
///
/// # Errors
/// As [`composite`].
pub fn pool(tape: &Tape, x: &Arc<TapeValue>, spans: &Arc<Spans>, how: Pooling) -> Result<Arc<TapeValue>> {
    check(x.rows(), spans)?;
    let (x, spans, width) = (x.clone(), spans.clone(), x.width);
    let mut y = Buffer::any(spans.len() * width);
    let Some(shares) = shares(&spans, how) else { return Ok(largest(tape, x, &spans, y)) };
    y.par_chunks_exact_mut(width).enumerate().for_each(|(b, y)| {
        y.fill(0.0);
        for t in spans.get(b) {
            for (sum, x) in y.iter_mut().zip(&x.numbers[t * width..]) {
                *sum += shares[t] * x;
            }
        }
    });
    Ok(tape.push(y, width, x.learns, move |dy, flow| {
        flow.add(&x, |dx, write| {
            let mut rest = dx;
            let mut tasks = Vec::with_capacity(spans.len());
            for (span, dy) in spans.iter().zip(dy.chunks_exact(width)) {
                let (own, others) = rest.split_at_mut(span.len() * width);
                tasks.push((own, &shares[span], dy));
                rest = others;
            }
            tasks.into_par_iter().for_each(|(dx, shares, dy)| {
                for (dx, share) in dx.chunks_exact_mut(width).zip(shares) {
                    for (dx, dy) in dx.iter_mut().zip(dy) {
                        *dx = if write == Write::Replace { share * dy } else { *dx + share * dy };
                    }
                }
            });
            Ok(())
        })
    }))
}

/// The largest number of each channel in every sequence.
fn largest(tape: &Tape, x: Arc<TapeValue>, spans: &Spans, mut y: Buffer) -> Arc<TapeValue> {
    let width = x.width;
    let mut places = vec![0; y.len()]; // where each number of y stands in x
    let rows = y.par_chunks_exact_mut(width).zip(places.par_chunks_exact_mut(width)).enumerate();
    rows.for_each(|(b, (y, places))| {
        let span = spans.get(b);
        for (c, (y, place)) in y.iter_mut().zip(places).enumerate() {
            *place = span.start * width + c;
            for at in span.clone().map(|t| t * width + c) {
                // what is not a number stays, as in PyTorch
                if x.numbers[at] > x.numbers[*place]
                    || (x.numbers[at].is_nan() && !x.numbers[*place].is_nan())
                {
                    *place = at;
                }
            }
            *y = x.numbers[*place];
        }
    });
    tape.push(y, width, x.learns, move |dy, flow| {
        flow.add(&x, |dx, write| {
            if write == Write::Replace {
                dx.fill(0.0);
            }
            places.iter().zip(&*dy).for_each(|(&at, dy)| dx[at] += dy);
            Ok(())
        })
    })
}

/// `x / max(|x|, 1e-12)` of every row, in candle's operations.
pub fn normalize_composite(x: &Tensor) -> Result<Tensor> {
    let x = wide(x)?;
    // the square root has no gradient at 0
    let smallest = f64::from(SMALLEST_NORM);
    let norm = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(smallest * smallest)?.sqrt()?;
    x.broadcast_div(&norm)
}

/// The same, fused.
pub fn normalize(tape: &Tape, x: &Arc<TapeValue>) -> Arc<TapeValue> {
    let (x, width) = (x.clone(), x.width);
    let norms: Vec<f32> = x.numbers.chunks_exact(width).map(norm).collect();
    let mut y = Buffer::of(&x.numbers);
    for (y, norm) in y.chunks_exact_mut(width).zip(&norms) {
        y.iter_mut().for_each(|y| *y /= norm);
    }
    tape.push_with_result(y, width, x.learns, move |y, mut dy, flow| {
        for ((dy, y), &norm) in dy.chunks_exact_mut(width).zip(y.numbers.chunks_exact(width)).zip(&norms) {
            // along the row itself nothing changes, unless it is too short to be made longer
            let along = if norm > SMALLEST_NORM { dot(dy, y) } else { 0.0 };
            dy.iter_mut().zip(y).for_each(|(dy, y)| *dy = (*dy - along * y) / norm);
        }
        flow.give(&x, dy);
        Ok(())
    })
}

/// The length of a row, as far as it is divided by.
fn norm(row: &[f32]) -> f32 {
    dot(row, row).sqrt().max(SMALLEST_NORM)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}
