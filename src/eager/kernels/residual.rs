//! What ends a half of a transformer's layer: `sum = x + dropout(branch)` and the layer norm behind it. The branch's
//! last products, the sum and the norm are computed a block of rows at a time, which stays in the cache.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::activation;
use super::buffer::Buffer;
use super::dropout::{self, Mask};
use super::gemm::{Factors, Matrix, MatrixMut, PackedMatrix, Shared, Write, row_blocks};
use super::kept::{Kept, Place};
use super::layer_norm::{self, NormWeights};
use super::linear::{Input, LinearMap, inner_values, inner_width};
use super::{CHUNK, Weight, add_here, wide};
use crate::eager::tape::{Flow, Tape, TapeValue};
use crate::model::ops::Activation;

/// The layer norm of `x + dropout(branch)`, (R, C) each, in candle's operations.
pub fn composite(
    branch: &Tensor,
    mask: Option<Mask>,
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Weight>,
    eps: f64,
) -> Result<Tensor> {
    let branch = match mask {
        Some(mask) => dropout::composite(branch, mask)?,
        None => branch.clone(),
    };
    let sum = (wide(&branch)? + wide(x)?)?;
    layer_norm::composite(&sum, weight, bias, eps)?.to_dtype(x.dtype())
}

/// What is added to the residual stream, computed or still to be.
#[derive(Clone)]
pub enum Branch {
    Ready(Arc<TapeValue>),
    /// A linear map of a value.
    Linear {
        x: Arc<TapeValue>,
        map: LinearMap,
    },
    /// Two linear maps with a non-linearity between them, which may gate one half of the channels with the other.
    FeedForward {
        x: Arc<TapeValue>,
        first: LinearMap,
        how: Activation,
        gated: bool,
        second: LinearMap,
    },
}

impl Branch {
    /// Of its products.
    fn factors(&self) -> Factors {
        match self {
            Self::Ready(_) => Factors::F32,
            Self::Linear { map, .. } | Self::FeedForward { first: map, .. } => map.factors,
        }
    }

    /// Whether something of it wants its gradient.
    fn learns(&self) -> bool {
        match self {
            Self::Ready(value) => value.learns,
            Self::Linear { x, map } => x.learns || map.learns(),
            Self::FeedForward { x, first, second, .. } => x.learns || first.learns() || second.learns(),
        }
    }
}

/// `x + dropout(branch)`, (R, C).
pub fn residual(
    tape: &Tape,
    branch: &Branch,
    mask: Option<Mask>,
    x: &Arc<TapeValue>,
) -> Result<Arc<TapeValue>> {
    Ok(compute(tape, branch, mask, x, None)?.0)
}

/// The same, and its layer norm.
pub fn residual_norm(
    tape: &Tape,
    branch: &Branch,
    mask: Option<Mask>,
    x: &Arc<TapeValue>,
    norm: &NormWeights,
) -> Result<(Arc<TapeValue>, Arc<TapeValue>)> {
    let (sum, normed) = compute(tape, branch, mask, x, Some(norm))?;
    let normed = layer_norm::push(tape, &sum, normed, norm);
    Ok((sum, normed))
}

/// The sum, on the tape, and its norm's numbers where one is asked for.
fn compute(
    tape: &Tape,
    branch: &Branch,
    mask: Option<Mask>,
    x: &Arc<TapeValue>,
    norm: Option<&NormWeights>,
) -> Result<(Arc<TapeValue>, Buffer)> {
    let width = x.width;
    let mut sum = Buffer::any(x.numbers.len());
    let mut normed = Buffer::any(if norm.is_some() { sum.len() } else { 0 });
    let learns = x.learns || branch.learns();
    let work = Work::new(branch, x, tape.keeps() && learns)?;
    {
        let norm = norm.map(NormWeights::numbers).transpose()?;
        let (start, behind) = (Shared::new(&mut sum), Shared::new(&mut normed));
        row_blocks(x.rows(), branch.factors(), |rows| {
            let (at, n) = (rows.start * width, rows.len() * width);
            // SAFETY: blocks of rows do not overlap, and both buffers outlive the loop.
            let sum = unsafe { start.slice(at, n) };
            work.rows(sum, rows);
            if let Some(mask) = mask {
                mask.apply(at, sum);
            }
            add_here(sum, &x.numbers[at..at + n]);
            if let Some(norm) = &norm {
                // SAFETY: as above.
                norm.apply(unsafe { behind.slice(at, n) }, sum);
            }
        });
    }
    let kept = work.kept;
    let (branch, stream) = (branch.clone(), x.clone());
    let sum =
        tape.push(sum, width, learns, move |dsum, flow| backward(&branch, mask, &stream, kept, dsum, flow));
    Ok((sum, normed))
}

/// The branch's forward pass.
struct Work<'a> {
    branch: &'a Branch,
    /// The maps' packed weights and their biases.
    maps: Vec<(Arc<PackedMatrix>, Option<Buffer>)>,
    /// A feed-forward branch's inner values: before the non-linearity, and behind it.
    kept: Option<[Kept; 2]>,
    places: Option<[Place; 2]>,
}

impl<'a> Work<'a> {
    fn new(branch: &'a Branch, x: &TapeValue, keeps: bool) -> Result<Self> {
        let maps: Vec<&LinearMap> = match branch {
            Branch::Ready(_) => vec![],
            Branch::Linear { map, .. } => vec![map],
            Branch::FeedForward { first, second, .. } => vec![first, second],
        };
        let (rows, width) = match branch {
            Branch::Ready(value) => (value.rows(), value.width),
            Branch::Linear { x, map } => {
                map.check(x.width)?;
                (x.rows(), map.output)
            }
            Branch::FeedForward { x, first, second, gated, .. } => {
                first.check(x.width)?;
                second.check(inner_width(first, *gated)?)?;
                (x.rows(), second.output)
            }
        };
        if (rows, width) != (x.rows(), x.width) {
            candle_core::bail!("({rows}, {width}) is added to ({}, {})", x.rows(), x.width);
        }
        let maps = maps.into_iter().map(|map| Ok((map.packed()?, map.bias()?))).collect::<Result<_>>()?;
        let mut kept = match branch {
            Branch::FeedForward { first, second, .. } if keeps => {
                Some([first.output, second.input].map(|width| Kept::any(rows * width, first.factors)))
            }
            _ => None,
        };
        let places = kept.as_mut().map(|kept| kept.each_mut().map(Kept::place));
        Ok(Self { branch, maps, kept, places })
    }

    /// Puts some rows of the branch into `to`.
    fn rows(&self, to: &mut [f32], rows: std::ops::Range<usize>) {
        match self.branch {
            Branch::Ready(value) => {
                to.copy_from_slice(&value.numbers[rows.start * value.width..][..to.len()]);
            }
            Branch::Linear { x, map } => {
                let (weight, bias) = &self.maps[0];
                map.block(weight, bias.as_deref(), to, &x.numbers, rows);
            }
            Branch::FeedForward { x, first, how, gated, second } => {
                let (widths, mut own) = ([first.output, second.input], None);
                let kept = self.places.and_then(|[z, y]| {
                    // SAFETY: a block's rows are its own, and what is kept outlives the loop.
                    let whole =
                        |place: Place, width| unsafe { place.whole(rows.start * width, rows.len() * width) };
                    Some([whole(z, widths[0])?, whole(y, widths[1])?])
                });
                let [z, y] = kept.unwrap_or_else(|| {
                    own.insert(widths.map(|width| Buffer::any(rows.len() * width)))
                        .each_mut()
                        .map(|buffer| &mut **buffer)
                });
                let [(weight, bias), (second_weight, second_bias)] = &self.maps[..] else { return };
                first.block(weight, bias.as_deref(), z, &x.numbers, rows.clone());
                match gated {
                    true => activation::gate(*how, y, z, second.input),
                    false => activation::forward(*how, y, z),
                }
                second.block(second_weight, second_bias.as_deref(), to, y, 0..rows.len());
                for (place, (values, width)) in
                    self.places.iter().flatten().zip([(z, widths[0]), (y, widths[1])])
                {
                    // SAFETY: as above.
                    unsafe { place.keep(rows.start * width, values) };
                }
            }
        }
    }
}

fn backward(
    branch: &Branch,
    mask: Option<Mask>,
    stream: &TapeValue,
    kept: Option<[Kept; 2]>,
    dsum: Buffer,
    flow: &mut Flow,
) -> Result<()> {
    if !branch.learns() {
        flow.give(stream, dsum);
        return Ok(());
    }
    let mut dbranch = Buffer::any(dsum.len());
    dbranch.par_chunks_mut(CHUNK).zip(dsum.par_chunks(CHUNK)).enumerate().for_each(|(i, (to, from))| {
        to.copy_from_slice(from);
        if let Some(mask) = mask {
            mask.apply(i * CHUNK, to);
        }
    });
    flow.give(stream, dsum);
    match branch {
        Branch::Ready(value) => flow.give(value, dbranch),
        Branch::Linear { x, map } => {
            flow.add(x, |dx, write| map.backward_input(dx, write, &dbranch))?;
            map.backward_weights(&Input::new(&x.numbers), &dbranch);
        }
        Branch::FeedForward { x, first, how, gated, second } => {
            let [z, y] = match kept {
                Some(kept) => kept.map(Kept::numbers),
                None => inner_values(x, first, *how, *gated)?,
            };
            let weights = [first.packed_backward()?, second.packed_backward()?];
            let (inner, outer) = (first.output, second.output);
            let mut dz = Buffer::any(z.len());
            let mut inner_backward = |dx: &mut [f32], write| {
                let (dx, dz) = (Shared::new(dx), Shared::new(&mut dz));
                row_blocks(x.rows(), first.factors, |rows| {
                    let (m, at) = (rows.len(), rows.start * inner);
                    // SAFETY: blocks of rows do not overlap, and both buffers outlive the loop.
                    let (dx, dz) =
                        unsafe { (dx.slice(rows.start * x.width, m * x.width), dz.slice(at, m * inner)) };
                    let dy = Matrix::new(&dbranch[rows.start * outer..rows.end * outer], m, outer, outer);
                    let z = &z[at..at + m * inner];
                    if *gated {
                        let width = second.input;
                        let mut dgated = Buffer::any(m * width);
                        let dst = MatrixMut::new(&mut dgated, m, width, width);
                        weights[1].product(dst, Write::Replace, 1.0, None, dy);
                        activation::gate_backward_here(*how, dz, &dgated, z, width);
                    } else {
                        weights[1].product(
                            MatrixMut::new(dz, m, inner, inner),
                            Write::Replace,
                            1.0,
                            None,
                            dy,
                        );
                        activation::backward_here(*how, dz, z);
                    }
                    let dst = MatrixMut::new(dx, m, x.width, x.width);
                    weights[0].product(dst, write, 1.0, None, Matrix::new(dz, m, inner, inner));
                });
                Ok(())
            };
            if x.learns {
                flow.add(x, inner_backward)?;
            } else if first.learns() {
                // it needs dz alone
                inner_backward(&mut Buffer::any(x.numbers.len()), Write::Replace)?;
            }
            second.backward_weights(&Input::new(&y), &dbranch);
            first.backward_weights(&Input::new(&x.numbers), &dz);
        }
    }
    Ok(())
}
