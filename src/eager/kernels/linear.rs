//! `y = x · Wᵀ + b`, rows in parallel; the backward pass gives dx, dW and db.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, Write, parallel_product, share};
use super::{Kernels, Numbers, Weight, gradient, numbers, simd, stored};

/// x (R, in), weight (out, in), bias (out) → (R, out).
pub fn linear(kernels: Kernels, x: &Tensor, weight: &Weight, bias: &Weight) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => x.contiguous()?.apply_op1(Linear { weight: weight.clone(), bias: bias.clone() }),
        Kernels::Composite => x.matmul(&weight.values.t()?)?.broadcast_add(&bias.values),
    }
}

struct Linear {
    weight: Weight,
    bias: Weight,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = layout.shape().dims2()?;
        let (output, width) = self.weight.values.dims2()?;
        if width != input {
            candle_core::bail!("a map from {width} channels is applied to {input}");
        }
        let (x, w, b) =
            (numbers(x, layout)?, Numbers::of(&self.weight.values)?, Numbers::of(&self.bias.values)?);
        let mut y = b.repeat(rows);
        let weight = Matrix::new(&w, output, input, input).transposed();
        let dst = MatrixMut::new(&mut y, rows, output, output);
        parallel_product(dst, Write::Add, Matrix::new(x, rows, input, input), weight);
        stored(y, (rows, output))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (rows, input) = x.dims2()?;
        let (output, _) = self.weight.values.dims2()?;
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (Numbers::of(x)?, Numbers::of(&self.weight.values)?, Numbers::of(&dy)?);
        let dy_matrix = Matrix::new(&dys, rows, output, output);
        if let Some(gradient) = &self.weight.gradient {
            let x_matrix = Matrix::new(&xs, rows, input, input);
            gradient.add(|dw, write| {
                let dst = MatrixMut::new(dw, output, input, input);
                parallel_product(dst, write, dy_matrix.transposed(), x_matrix);
            });
        }
        if let Some(gradient) = &self.bias.gradient {
            gradient.add_values(&column_sums(&dys, output));
        }
        let mut dx = vec![0.0; rows * input];
        let dst = MatrixMut::new(&mut dx, rows, input, input);
        parallel_product(dst, Write::Replace, dy_matrix, Matrix::new(&ws, output, input, input));
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
