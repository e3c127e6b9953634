//! Element-wise non-linearities; the backward pass recomputes from the input and keeps nothing.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{self, normal, tanh};
use super::{CHUNK, Kernels, Numbers, gradient, numbers, stored, wide};
use crate::model::ops::Activation;

/// √(2/π), of the tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// The cubic term's factor there.
const CUBIC: f32 = 0.044_715;
/// 1 / √(2π), the height of the normal density.
const DENSITY: f32 = 0.398_942_3;

/// Applies `how` to every element.
pub fn activate(kernels: Kernels, x: &Tensor, how: Activation) -> Result<Tensor> {
    if kernels == Kernels::Fused && is_fused(how) {
        return x.contiguous()?.apply_op1(Fused(how));
    }
    let dtype = x.dtype();
    let x = wide(x)?;
    let y = match how {
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        // candle's relu has gradient 1 at 0, PyTorch's has 0
        Activation::Relu => &x * x.gt(0.0)?.to_dtype(DType::F32)?,
        Activation::Silu => x.silu(),
        Activation::Tanh => x.tanh(),
    };
    y?.to_dtype(dtype)
}

/// Whether there is a fused form; the others are used on few numbers.
pub(super) fn is_fused(how: Activation) -> bool {
    matches!(how, Activation::Gelu | Activation::GeluTanh)
}

/// `y = how(x)` for one that is fused.
pub(super) fn forward(how: Activation, y: &mut [f32], x: &[f32]) {
    match how {
        Activation::GeluTanh => gelu_tanh(y, x),
        _ => gelu(y, x),
    }
}

/// `dx = dy · how'(x)` for one that is fused.
pub(super) fn backward(how: Activation, dx: &mut [f32], x: &[f32], dy: &[f32]) {
    match how {
        Activation::GeluTanh => gelu_tanh_backward(dx, x, dy),
        _ => gelu_backward(dx, x, dy),
    }
}

struct Fused(Activation);

impl CustomOp1 for Fused {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(x, layout)?;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| forward(self.0, y, x));
        stored(y, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, dys) = (Numbers::of(x)?, Numbers::of(&dy)?);
        let mut dx = vec![0.0; xs.len()];
        dx.par_chunks_mut(CHUNK)
            .zip(xs.par_chunks(CHUNK).zip(dys.par_chunks(CHUNK)))
            .for_each(|(dx, (x, dy))| backward(self.0, dx, x, dy));
        gradient(dx, x)
    }
}

simd::vectorised! {
    fn gelu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * normal(x).0;
        }
    }
}

simd::vectorised! {
    fn gelu_backward(dx: &mut [f32], x: &[f32], dy: &[f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let (cdf, e) = normal(x);
            *dx = dy * (cdf + x * DENSITY * e);
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
    fn gelu_tanh_backward(dx: &mut [f32], x: &[f32], dy: &[f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
            let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *dx = dy * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner);
        }
    }
}
