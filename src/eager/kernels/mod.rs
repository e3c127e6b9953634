//! Fused differentiable operations for f32 on the CPU, each beside a composite of candle's primitives.
//!
//! The composite runs on every other device and is the oracle of the tests. Its operations are few and large, as many for
//! many sequences as for one, and none waits for a number to come back from a device. Where candle has no operation with
//! a gradient, the composite brings one of its own. Its activations may be bf16: then products are too; statistics,
//! softmax and non-linearities are computed in f32, and parameters are always f32. The fused operations may round the
//! factors of their products to bf16 ([`gemm::Factors`]); all else of them is f32.
//! A fused operation has its own backward pass, on the tape ([`super::tape`]); its result does not depend on the
//! number of threads.

pub mod activation;
pub mod attention;
pub mod buffer;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod gradient;
pub mod kept;
pub mod layer_norm;
pub mod linear;
#[cfg(test)]
mod loops;
pub mod pooling;
pub mod reorder;
pub mod residual;
pub mod rotary;
pub mod scale;
pub mod simd;
pub mod softmax;
pub mod split;

use std::ops::Deref;
use std::sync::Arc;

pub use gradient::Gradient;

use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Which form of the operations is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    Fused,
    Composite,
}

impl Kernels {
    /// The fastest that runs there.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Fused } else { Self::Composite }
    }
}

/// A parameter as an operation takes it.
#[derive(Clone, Debug)]
pub struct Weight {
    /// In f32.
    pub values: Tensor,
    /// Where a fused operation adds the gradient up; none in evaluation, of what is frozen, and where candle's own tape
    /// keeps it.
    pub gradient: Option<Arc<Gradient>>,
}

impl Weight {
    /// Whether a fused operation has to compute its gradient.
    pub fn learns(&self) -> bool {
        self.gradient.is_some()
    }
}

/// A composite's operand in f32: sums, statistics and non-linearities need more digits than bf16 has.
pub(crate) fn wide(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)
}

/// Elements that one task of an element-wise loop works on.
pub(crate) const CHUNK: usize = 16 * 1024;

/// A contiguous f32 CPU tensor's numbers, behind its storage's read lock.
pub(crate) struct Numbers<G> {
    storage: G,
    range: std::ops::Range<usize>,
}

impl Numbers<()> {
    pub(crate) fn of(tensor: &Tensor) -> Result<Numbers<impl Deref<Target = Storage> + '_>> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = contiguous(layout)?;
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Numbers { storage, range }),
            _ => Err(Error::Msg("a fused operation takes f32 tensors on the CPU".to_owned())),
        }
    }
}

impl<G: Deref<Target = Storage>> Deref for Numbers<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => &[], // `of` has let only f32 on the CPU in
        }
    }
}

fn contiguous(layout: &Layout) -> Result<std::ops::Range<usize>> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::Msg("a fused operation takes contiguous tensors".to_owned()))?;
    Ok(start..end)
}

/// A custom operation's result.
pub(crate) fn stored(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// `sums += values`, on all threads.
pub(crate) fn add(sums: &mut [f32], values: &[f32]) {
    sums.par_chunks_mut(CHUNK)
        .zip(values.par_chunks(CHUNK))
        .for_each(|(sums, values)| add_here(sums, values));
}

simd::vectorised! {
    /// The same in this thread.
    pub(crate) fn add_here(sums: &mut [f32], values: &[f32]) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
}
