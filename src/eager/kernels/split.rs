//! Equal parts of the last axis.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};

use super::add_here;
use super::buffer::Buffer;
use super::gemm::Write;
use crate::eager::tape::{Tape, TapeValue};

/// The `index`-th of `parts` equal parts of x's channels, (R, n·C) → (R, C), in candle's operations.
pub fn composite(x: &Tensor, index: usize, parts: usize) -> Result<Tensor> {
    let width = part_width(x.dim(D::Minus1)?, parts)?;
    x.narrow(D::Minus1, index * width, width)?.contiguous()
}

/// The same, fused.
pub fn split(tape: &Tape, x: &Arc<TapeValue>, index: usize, parts: usize) -> Result<Arc<TapeValue>> {
    let width = part_width(x.width, parts)?;
    let (x, at) = (x.clone(), index * width);
    let mut y = Buffer::any(x.rows() * width);
    for (to, from) in y.chunks_exact_mut(width).zip(x.numbers.chunks_exact(x.width)) {
        to.copy_from_slice(&from[at..at + width]);
    }
    Ok(tape.push(y, width, x.learns, move |dy, flow| {
        flow.add(&x, |dx, write| {
            if write == Write::Replace {
                dx.fill(0.0);
            }
            for (sum, dy) in dx.chunks_exact_mut(x.width).zip(dy.chunks_exact(width)) {
                add_here(&mut sum[at..at + width], dy);
            }
            Ok(())
        })
    }))
}

fn part_width(width: usize, parts: usize) -> Result<usize> {
    if !width.is_multiple_of(parts) {
        candle_core::bail!("{width} channels are cut into {parts} equal parts");
    }
    Ok(width / parts)
}
