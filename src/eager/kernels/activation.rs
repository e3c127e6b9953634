//! Element-wise non-linearities; the backward pass recomputes from the input and keeps nothing.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::simd::{self, normal, tanh};
use super::{CHUNK, wide};
use crate::eager::tape::{Tape, TapeValue};
use crate::model::ops::Activation;

/// √(2/π), of the tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// The cubic term's factor there.
const CUBIC: f32 = 0.044_715;
/// 1 / √(2π), the height of the normal density.
const DENSITY: f32 = 0.398_942_3;

/// Applies `how` to every element, in candle's operations.
pub fn composite(x: &Tensor, how: Activation) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = wide(x)?;
    let y = match how {
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        // candle's relu has gradient 1 at 0, PyTorch's has 0; what is not a number stays so
        Activation::Relu => x.le(0.0)?.where_cond(&x.zeros_like()?, &x),
        Activation::Silu => x.silu(),
        Activation::Tanh => x.tanh(),
    };
    y?.to_dtype(dtype)
}

/// The same, fused.
pub fn activate(tape: &Tape, x: &Arc<TapeValue>, how: Activation) -> Arc<TapeValue> {
    let mut y = Buffer::any(x.numbers.len());
    y.par_chunks_mut(CHUNK).zip(x.numbers.par_chunks(CHUNK)).for_each(|(y, x)| forward(how, y, x));
    let x = x.clone();
    tape.push(y, x.width, x.learns, move |mut dy, flow| {
        backward(how, &mut dy, &x.numbers);
        flow.give(&x, dy);
        Ok(())
    })
}

/// The second half of x's channels times `how` of the first, (R, 2·C) → (R, C), in candle's operations.
pub fn gated_composite(x: &Tensor, how: Activation) -> Result<Tensor> {
    let width = half(x.dim(D::Minus1)?)?;
    let part = |start| x.narrow(D::Minus1, start, width);
    (wide(&composite(&part(0)?, how)?)? * wide(&part(width)?)?)?.to_dtype(x.dtype())
}

/// Half of so many channels, of which one half gates the other.
pub(super) fn half(channels: usize) -> Result<usize> {
    if !channels.is_multiple_of(2) {
        candle_core::bail!("{channels} channels have no two halves");
    }
    Ok(channels / 2)
}

/// The same, fused.
pub fn gated(tape: &Tape, x: &Arc<TapeValue>, how: Activation) -> Result<Arc<TapeValue>> {
    let width = half(x.width)?;
    let mut y = Buffer::any(x.numbers.len() / 2);
    let rows = CHUNK.div_ceil(x.width);
    y.par_chunks_mut(rows * width)
        .zip(x.numbers.par_chunks(rows * x.width))
        .for_each(|(y, x)| gate(how, y, x, width));
    let x = x.clone();
    Ok(tape.push(y, width, x.learns, move |dy, flow| {
        let mut dx = Buffer::any(x.numbers.len());
        gate_backward(how, &mut dx, &dy, &x.numbers, width);
        flow.give(&x, dx);
        Ok(())
    }))
}

/// Rows of x, (m, 2·C), → their gated halves, (m, C), in this thread.
pub(super) fn gate(how: Activation, y: &mut [f32], x: &[f32], width: usize) {
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
        let (first, second) = x.split_at(width);
        forward(how, y, first);
        multiply(y, second);
    }
}

/// The gradient of rows of x, (m, 2·C), from that of their gated halves, (m, C), in this thread.
pub(super) fn gate_backward_here(how: Activation, dx: &mut [f32], dy: &[f32], x: &[f32], width: usize) {
    let rows = dx.chunks_exact_mut(2 * width).zip(dy.chunks_exact(width));
    for ((dx, dy), x) in rows.zip(x.chunks_exact(2 * width)) {
        let ((dfirst, dsecond), (first, second)) = (dx.split_at_mut(width), x.split_at(width));
        dfirst.copy_from_slice(dy);
        multiply(dfirst, second);
        backward_here(how, dfirst, first);
        forward(how, dsecond, first);
        multiply(dsecond, dy);
    }
}

/// The same on all threads.
pub(super) fn gate_backward(how: Activation, dx: &mut [f32], dy: &[f32], x: &[f32], width: usize) {
    let rows = CHUNK.div_ceil(2 * width);
    dx.par_chunks_mut(rows * 2 * width)
        .zip(dy.par_chunks(rows * width))
        .zip(x.par_chunks(rows * 2 * width))
        .for_each(|((dx, dy), x)| gate_backward_here(how, dx, dy, x, width));
}

simd::vectorised! {
    pub(super) fn multiply(to: &mut [f32], by: &[f32]) {
        for (to, by) in to.iter_mut().zip(by) {
            *to *= by;
        }
    }
}

/// `y = how(x)`, in this thread.
pub(super) fn forward(how: Activation, y: &mut [f32], x: &[f32]) {
    match how {
        Activation::Gelu => gelu(y, x),
        Activation::GeluTanh => gelu_tanh(y, x),
        Activation::Relu => relu(y, x),
        Activation::Silu => silu(y, x),
        Activation::Tanh => y.iter_mut().zip(x).for_each(|(y, x)| *y = x.tanh()),
    }
}

/// `dy → dy · how'(x)` in place, in this thread.
pub(super) fn backward_here(how: Activation, dy: &mut [f32], x: &[f32]) {
    match how {
        Activation::Gelu => gelu_backward(dy, x),
        Activation::GeluTanh => gelu_tanh_backward(dy, x),
        Activation::Relu => relu_backward(dy, x),
        Activation::Silu => silu_backward(dy, x),
        Activation::Tanh => dy.iter_mut().zip(x).for_each(|(dy, x)| *dy *= 1.0 - x.tanh().powi(2)),
    }
}

/// The same on all threads.
pub(super) fn backward(how: Activation, dy: &mut [f32], x: &[f32]) {
    dy.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(dy, x)| backward_here(how, dy, x));
}

simd::vectorised! {
    fn gelu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * normal(x).0;
        }
    }
}

simd::vectorised! {
    fn gelu_backward(dy: &mut [f32], x: &[f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let (cdf, e) = normal(x);
            *dy *= cdf + x * DENSITY * e;
        }
    }
}

simd::vectorised! {
    fn gelu_tanh(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)));
        }
    }
}

simd::vectorised! {
    fn gelu_tanh_backward(dy: &mut [f32], x: &[f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
            let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *dy *= 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
        }
    }
}

simd::vectorised! {
    fn relu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = if x <= 0.0 { 0.0 } else { x }; // NaN stays, `max` would make it 0
        }
    }
}

simd::vectorised! {
    fn relu_backward(dy: &mut [f32], x: &[f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            *dy = if x <= 0.0 { 0.0 } else { *dy };
        }
    }
}

simd::vectorised! {
    fn silu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x / (1.0 + simd::exp(-x));
        }
    }
}

simd::vectorised! {
    fn silu_backward(dy: &mut [f32], x: &[f32]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let sigmoid = 1.0 / (1.0 + simd::exp(-x));
            *dy *= sigmoid * (1.0 + x * (1.0 - sigmoid));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn relu_keeps_what_is_not_a_number_in_both_forms() {
        let x = [f32::NAN, f32::NEG_INFINITY, -1.0, 0.0, 2.0, f32::INFINITY];
        let (y, dy) = ([f32::NAN, 0.0, 0.0, 0.0, 2.0, f32::INFINITY], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        let same = |found: &[f32], wanted: &[f32]| {
            found.iter().zip(wanted).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()))
        };
        let (mut fused, mut gradient) = ([7.0; 6], [1.0; 6]);
        forward(Activation::Relu, &mut fused, &x);
        backward_here(Activation::Relu, &mut gradient, &x);
        assert!(same(&fused, &y), "{fused:?}");
        assert_eq!(gradient, dy);

        let x = Var::new(&x, &Device::Cpu).unwrap();
        let composite = composite(&x, Activation::Relu).unwrap();
        let gradient = composite.sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
        assert!(same(&composite.to_vec1().unwrap(), &y), "{composite}");
        assert_eq!(gradient.to_vec1::<f32>().unwrap(), dy);
    }
}
