//! `y = x · Wᵀ + b`, rows in parallel; the backward pass gives dx, dW and db.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, Write, parallel_product, share};
use super::{Kernels, Numbers, gradient, numbers, simd, stored};

/// x (R, in), weight (out, in), bias (out) → (R, out).
pub fn linear(kernels: Kernels, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    match kernels {
        Kernels::Fused => x.contiguous()?.apply_op3(weight, bias, Linear),
        Kernels::Composite => x.matmul(&weight.t()?)?.broadcast_add(bias),
    }
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = x_layout.shape().dims2()?;
        let (output, _) = w_layout.shape().dims2()?;
        let (x, w, b) = (numbers(x, x_layout)?, numbers(w, w_layout)?, numbers(b, b_layout)?);
        let mut y = b.repeat(rows);
        let weight = Matrix::new(w, output, input, input).transposed();
        let dst = MatrixMut::new(&mut y, rows, output, output);
        parallel_product(dst, Write::Add, Matrix::new(x, rows, input, input), weight);
        stored(y, (rows, output))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, input) = x.dims2()?;
        let (output, _) = w.dims2()?;
        let dy = dy.contiguous()?;
        let (xs, ws, dys) = (Numbers::of(x)?, Numbers::of(w)?, Numbers::of(&dy)?);
        let dy_matrix = Matrix::new(&dys, rows, output, output);

        let mut dx = vec![0.0; rows * input];
        let dst = MatrixMut::new(&mut dx, rows, input, input);
        parallel_product(dst, Write::Replace, dy_matrix, Matrix::new(&ws, output, input, input));

        let mut dw = vec![0.0; output * input];
        let dst = MatrixMut::new(&mut dw, output, input, input);
        parallel_product(dst, Write::Replace, dy_matrix.transposed(), Matrix::new(&xs, rows, input, input));

        Ok((gradient(dx, x)?, gradient(dw, w)?, gradient(column_sums(&dys, output), b)?))
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
