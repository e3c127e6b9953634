//! `y = x · Wᵀ + b`, with a non-linearity behind it or without; the backward pass gives dx, dW and db.

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::activation::{self, activate, is_fused};
use super::gemm::{Matrix, MatrixMut, Shared, Write, in_blocks, parallel_product, product, share};
use super::{CHUNK, Kernels, Numbers, Weight, gradient, numbers, simd, stored, wide};
use crate::model::ops::Activation;

/// x (R, in), weight (out, in), bias (out) → (R, out).
pub fn linear(kernels: Kernels, x: &Tensor, weight: &Weight, bias: &Weight) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => x.contiguous()?.apply_op1(Linear::new(weight, bias, None)?),
        Kernels::Composite => {
            let y = x.matmul(&weight.values.to_dtype(x.dtype())?.t()?)?;
            wide(&y)?.broadcast_add(&bias.values)?.to_dtype(x.dtype())
        }
    }
}

/// The same with a non-linearity behind it.
pub fn linear_activation(
    kernels: Kernels,
    x: &Tensor,
    weight: &Weight,
    bias: &Weight,
    how: Activation,
) -> Result<Tensor> {
    if kernels == Kernels::Fused && is_fused(how) {
        return x.contiguous()?.apply_op1(Linear::new(weight, bias, Some(how))?);
    }
    activate(kernels, &linear(kernels, x, weight, bias)?, how)
}

struct Linear {
    map: Map,
    how: Option<Activation>,
    /// What the non-linearity was applied to, from the forward pass.
    before: OnceLock<Vec<f32>>,
}

/// A weight and a bias, applied to plain numbers.
pub(super) struct Map {
    weight: Weight,
    bias: Weight,
    pub input: usize,
    pub output: usize,
}

impl Map {
    pub fn new(weight: &Weight, bias: &Weight) -> Result<Self> {
        let (output, input) = weight.values.dims2()?;
        Ok(Self { weight: weight.clone(), bias: bias.clone(), input, output })
    }

    /// `y = x · Wᵀ + b`; each block of y is handed to `after` while it is in the cache: its rows' starts in y, and
    /// how many columns of each.
    pub fn forward(&self, x: &[f32], after: impl Fn(usize, usize) + Sync, y: Shared) -> Result<()> {
        let (w, b) = (Numbers::of(&self.weight.values)?, Numbers::of(&self.bias.values)?);
        let (w, b): (&[f32], &[f32]) = (&w, &b);
        let (rows, output) = (x.len() / self.input, self.output);
        let x = Matrix::new(x, rows, self.input, self.input);
        let w = Matrix::new(w, output, self.input, self.input).transposed();
        in_blocks(rows, output, self.input, |rows, columns| {
            let starts = rows.clone().map(|row| row * output + columns.start);
            for start in starts.clone() {
                // SAFETY: y holds (rows, output) numbers, and this block of them is this task's.
                unsafe { y.slice(start, columns.len()) }.copy_from_slice(&b[columns.clone()]);
            }
            // SAFETY: as above.
            let block = unsafe {
                let first = y.get().add(rows.start * output + columns.start);
                MatrixMut::raw(first, rows.len(), columns.len(), output)
            };
            product(block, Write::Add, 1.0, x.rows(rows.clone()), w.columns(columns.clone()));
            starts.for_each(|start| after(start, columns.len()));
        });
        Ok(())
    }

    /// Adds the gradients of weight and bias up.
    pub fn backward_weights(&self, x: &[f32], dy: &[f32]) {
        let rows = dy.len() / self.output;
        if let Some(gradient) = &self.weight.gradient {
            let x = Matrix::new(x, rows, self.input, self.input);
            let dy = Matrix::new(dy, rows, self.output, self.output);
            gradient.add(|dw, write| {
                let dst = MatrixMut::new(dw, self.output, self.input, self.input);
                parallel_product(dst, write, dy.transposed(), x);
            });
        }
        if let Some(gradient) = &self.bias.gradient {
            gradient.add_values(&column_sums(dy, self.output));
        }
    }

    /// `dx = dy · W`, or `dx += …`.
    pub fn backward_input(&self, dx: &mut [f32], write: Write, dy: &[f32]) -> Result<()> {
        let w = Numbers::of(&self.weight.values)?;
        let rows = dy.len() / self.output;
        let dst = MatrixMut::new(dx, rows, self.input, self.input);
        let dy = Matrix::new(dy, rows, self.output, self.output);
        parallel_product(dst, write, dy, Matrix::new(&w, self.output, self.input, self.input));
        Ok(())
    }
}

impl Linear {
    fn new(weight: &Weight, bias: &Weight, how: Option<Activation>) -> Result<Self> {
        Ok(Self { map: Map::new(weight, bias)?, how, before: OnceLock::new() })
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = layout.shape().dims2()?;
        if self.map.input != input {
            candle_core::bail!("a map from {} channels is applied to {input}", self.map.input);
        }
        let x = numbers(x, layout)?;
        let mut y = vec![0.0; rows * self.map.output];
        match self.how {
            None => self.map.forward(x, |_, _| (), Shared::new(&mut y))?,
            Some(how) => {
                let mut before = vec![0.0; y.len()];
                let (z, start) = (Shared::new(&mut before), Shared::new(&mut y));
                let apply = |at, length| {
                    // SAFETY: both hold (rows, output) numbers, and this row of the block is this task's.
                    let (z, y) = unsafe { (z.slice(at, length), start.slice(at, length)) };
                    activation::forward(how, y, z);
                };
                self.map.forward(x, apply, z)?;
                // an operation is applied once, so the cell is empty
                let _ = self.before.set(before);
            }
        }
        stored(y, (rows, self.map.output))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (xs, dys) = (Numbers::of(x)?, Numbers::of(&dy)?);
        let dz = match (self.how, self.before.get()) {
            (Some(how), Some(before)) => {
                let mut dz = vec![0.0; before.len()];
                dz.par_chunks_mut(CHUNK)
                    .zip(before.par_chunks(CHUNK).zip(dys.par_chunks(CHUNK)))
                    .for_each(|(dz, (z, dy))| activation::backward(how, dz, z, dy));
                Cow::Owned(dz)
            }
            _ => Cow::Borrowed(&*dys),
        };
        self.map.backward_weights(&xs, &dz);
        let mut dx = vec![0.0; xs.len()];
        self.map.backward_input(&mut dx, Write::Replace, &dz)?;
        gradient(dx, x)
    }
}

/// The sums of the columns of a row-major matrix: blocks of rows side by side, their sums in a fixed order.
pub(crate) fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let parts = rows.div_ceil(128).clamp(1, 16);
    let partial: Vec<Vec<f32>> = (0..parts)
        .into_par_iter()
        .map(|part| {
            let rows = share(rows, parts, part);
            let mut sums = vec![0.0; columns];
            add_rows(&mut sums, &values[rows.start * columns..rows.end * columns]);
            sums
        })
        .collect();
    let mut sums = vec![0.0; columns];
    partial.iter().for_each(|part| add_rows(&mut sums, part));
    sums
}

simd::vectorised! {
    fn add_rows(sums: &mut [f32], rows: &[f32]) {
        for row in rows.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
