//! `y = x · Wᵀ + b` or `x · W + b`, with a non-linearity behind it or without; the backward pass gives dx, dW and db.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::gemm::{
    Factors, Matrix, MatrixMut, PackedMatrix, Shared, Write, parallel_product, row_blocks, share,
};
use super::{Numbers, Weight, activation, simd, wide};
use crate::eager::tape::{Tape, TapeValue};
use crate::model::ops::{Activation, Layout};

/// x (R, in), weight as `layout` says, bias (out) → (R, out), in candle's operations.
pub fn composite(x: &Tensor, weight: &Weight, bias: Option<&Weight>, layout: Layout) -> Result<Tensor> {
    let w = weight.values.to_dtype(x.dtype())?;
    let y = match layout {
        Layout::OutIn => x.matmul(&w.t()?)?,
        Layout::InOut => x.matmul(&w)?,
    };
    match bias {
        Some(bias) => wide(&y)?.broadcast_add(&bias.values)?.to_dtype(x.dtype()),
        None => Ok(y),
    }
}

/// The same, fused.
pub fn linear(tape: &Tape, x: &Arc<TapeValue>, map: &LinearMap) -> Result<Arc<TapeValue>> {
    map.check(x.width)?;
    let mut y = Buffer::any(x.rows() * map.output);
    map.forward(&x.numbers, &mut y)?;
    let (x, map) = (x.clone(), map.clone());
    let learns = x.learns || map.learns();
    Ok(tape.push(y, map.output, learns, move |dy, flow| {
        map.backward_weights(&Input::new(&x.numbers), &dy);
        flow.add(&x, |dx, write| map.backward_input(dx, write, &dy))
    }))
}

/// The same with a non-linearity behind it.
pub fn linear_activation(
    tape: &Tape,
    x: &Arc<TapeValue>,
    map: &LinearMap,
    how: Activation,
) -> Result<Arc<TapeValue>> {
    map.check(x.width)?;
    let [z, y] = inner_values(x, map, how, false)?;
    let (x, map) = (x.clone(), map.clone());
    let learns = x.learns || map.learns();
    Ok(tape.push(y, map.output, learns, move |mut dy, flow| {
        activation::backward(how, &mut dy, &z);
        drop(z);
        map.backward_weights(&Input::new(&x.numbers), &dy);
        flow.add(&x, |dx, write| map.backward_input(dx, write, &dy))
    }))
}

/// A linear map whose result's second half is multiplied with a non-linearity of its first.
pub fn linear_gated(
    tape: &Tape,
    x: &Arc<TapeValue>,
    map: &LinearMap,
    how: Activation,
) -> Result<Arc<TapeValue>> {
    map.check(x.width)?;
    let [z, y] = inner_values(x, map, how, true)?;
    let (x, map, width) = (x.clone(), map.clone(), inner_width(map, true)?);
    let learns = x.learns || map.learns();
    Ok(tape.push(y, width, learns, move |dy, flow| {
        let mut dz = Buffer::any(z.len());
        activation::gate_backward(how, &mut dz, &dy, &z, width);
        drop(z);
        map.backward_weights(&Input::new(&x.numbers), &dz);
        flow.add(&x, |dx, write| map.backward_input(dx, write, &dz))
    }))
}

/// The channels behind a map's non-linearity, which gates one half with the other or does not.
pub(super) fn inner_width(map: &LinearMap, gated: bool) -> Result<usize> {
    if gated { activation::half(map.output) } else { Ok(map.output) }
}

/// `z = x · Wᵀ + b`, and `how(z)` or its gated halves.
pub(super) fn inner_values(
    x: &TapeValue,
    map: &LinearMap,
    how: Activation,
    gated: bool,
) -> Result<[Buffer; 2]> {
    let inner = inner_width(map, gated)?;
    let mut values = [map.output, inner].map(|width| Buffer::any(x.rows() * width));
    let starts = values.each_mut().map(|buffer| Shared::new(buffer));
    let (weight, bias) = (map.packed()?, map.bias()?);
    row_blocks(x.rows(), map.factors, |rows| {
        let [z, y] = [(starts[0], map.output), (starts[1], inner)].map(|(start, width)| {
            // SAFETY: blocks of rows do not overlap, and the buffers outlive the loop.
            unsafe { start.slice(rows.start * width, rows.len() * width) }
        });
        map.block(&weight, bias.as_deref(), z, &x.numbers, rows);
        match gated {
            true => activation::gate(how, y, z, inner),
            false => activation::forward(how, y, z),
        }
    });
    Ok(values)
}

/// Weights that are packed once for all passes of a step. Weights must not change as long as it lives.
#[derive(Default)]
pub struct PackedWeights {
    by_name: Mutex<BTreeMap<String, Arc<PackedWeight>>>,
}

/// One of them, for the forward pass and for the gradient of the input.
#[derive(Default)]
struct PackedWeight {
    ways: [OnceLock<Arc<PackedMatrix>>; 2],
}

impl PackedWeights {
    fn of(&self, name: &str) -> Arc<PackedWeight> {
        // a panic elsewhere leaves a map that is whole
        let mut by_name = self.by_name.lock().unwrap_or_else(|broken| broken.into_inner());
        by_name.entry(name.to_owned()).or_default().clone()
    }
}

/// A weight and a bias, applied to plain numbers.
#[derive(Clone)]
pub struct LinearMap {
    weight: Weight,
    bias: Option<Weight>,
    /// Where the packed weight is kept; else it is packed for each use.
    kept: Option<Arc<PackedWeight>>,
    layout: Layout,
    pub input: usize,
    pub output: usize,
    /// Of all its products, forward and backward.
    pub factors: Factors,
}

/// What maps were applied to, (R, in); the backward passes of all of them pack it once.
pub(super) struct Input<'a> {
    x: &'a [f32],
    packed: OnceCell<PackedMatrix>,
}

impl<'a> Input<'a> {
    pub(super) fn new(x: &'a [f32]) -> Self {
        Self { x, packed: OnceCell::new() }
    }
}

impl LinearMap {
    /// weight (out, in) or (in, out), bias (out).
    pub fn new(weight: &Weight, bias: Option<&Weight>, layout: Layout, factors: Factors) -> Result<Self> {
        let (rows, columns) = weight.values.dims2()?;
        let (input, output) = match layout {
            Layout::OutIn => (columns, rows),
            Layout::InOut => (rows, columns),
        };
        if let Some(bias) = bias
            && bias.values.dims1()? != output
        {
            candle_core::bail!("a bias of {} for a map to {output} channels", bias.values.dims1()?);
        }
        Ok(Self { weight: weight.clone(), bias: bias.cloned(), kept: None, layout, input, output, factors })
    }

    /// The same, which keeps its packed weight under the parameter's name.
    pub fn packed_in(self, weights: &PackedWeights, name: &str) -> Self {
        Self { kept: Some(weights.of(name)), ..self }
    }

    /// The weight as a matrix (in, out), however it is stored.
    fn matrix<'a>(&self, w: &'a [f32]) -> Matrix<'a> {
        match self.layout {
            Layout::OutIn => Matrix::new(w, self.output, self.input, self.input).transposed(),
            Layout::InOut => Matrix::new(w, self.input, self.output, self.output),
        }
    }

    /// Weight and bias where the weight is stored (out, in).
    pub(in crate::eager) fn out_in(&self) -> Option<(&Weight, Option<&Weight>)> {
        (self.layout == Layout::OutIn).then_some((&self.weight, self.bias.as_ref()))
    }

    /// Whether it can be applied to so many channels.
    pub(super) fn check(&self, channels: usize) -> Result<()> {
        if self.input != channels {
            candle_core::bail!("a map from {} channels is applied to {channels}", self.input);
        }
        Ok(())
    }

    /// Whether weight or bias wants its gradient.
    pub(super) fn learns(&self) -> bool {
        self.weight.learns() || self.bias.as_ref().is_some_and(Weight::learns)
    }

    /// Rows that the map is applied to, as a matrix.
    pub(super) fn rows<'a>(&self, x: &'a [f32]) -> Matrix<'a> {
        Matrix::new(x, x.len() / self.input, self.input, self.input)
    }

    /// The weight, packed for the forward pass.
    pub(super) fn packed(&self) -> Result<Arc<PackedMatrix>> {
        self.packed_way(0)
    }

    /// The weight, packed for the gradient of the input.
    pub(super) fn packed_backward(&self) -> Result<Arc<PackedMatrix>> {
        self.packed_way(1)
    }

    fn packed_way(&self, way: usize) -> Result<Arc<PackedMatrix>> {
        let kept = self.kept.as_ref().map(|kept| &kept.ways[way]);
        if let Some(packed) = kept.and_then(OnceLock::get) {
            return Ok(packed.clone());
        }
        let numbers = Numbers::of(&self.weight.values)?;
        let matrix = self.matrix(&numbers);
        let matrix = if way == 0 { matrix } else { matrix.transposed() };
        let packed = Arc::new(PackedMatrix::new(matrix, self.factors));
        Ok(kept.map_or(packed.clone(), |kept| kept.get_or_init(|| packed).clone()))
    }

    pub(super) fn bias(&self) -> Result<Option<Buffer>> {
        self.bias.as_ref().map(|bias| Ok(Buffer::of(&Numbers::of(&bias.values)?))).transpose()
    }

    /// `y = x · Wᵀ + b` for some rows of x, in this thread.
    pub(super) fn block(
        &self,
        weight: &PackedMatrix,
        bias: Option<&[f32]>,
        y: &mut [f32],
        x: &[f32],
        rows: std::ops::Range<usize>,
    ) {
        let dst = MatrixMut::new(y, rows.len(), self.output, self.output);
        weight.product(dst, Write::Replace, 1.0, bias, self.rows(x).rows(rows));
    }

    /// `y = x · Wᵀ + b`, on all threads.
    pub(super) fn forward(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let dst = MatrixMut::new(y, x.len() / self.input, self.output, self.output);
        self.packed()?.parallel_product(dst, Write::Replace, self.bias()?.as_deref(), self.rows(x));
        Ok(())
    }

    /// Adds the gradients of weight, `dyᵀ · x` or `xᵀ · dy`, and bias up.
    pub(super) fn backward_weights(&self, x: &Input, dy: &[f32]) {
        let rows = dy.len() / self.output;
        if let Some(gradient) = &self.weight.gradient {
            let dy = Matrix::new(dy, rows, self.output, self.output);
            gradient.add(|dw, write| match self.layout {
                Layout::OutIn => {
                    let x = x.packed.get_or_init(|| PackedMatrix::new(self.rows(x.x), self.factors));
                    let dst = MatrixMut::new(dw, self.output, self.input, self.input);
                    x.parallel_product(dst, write, None, dy.transposed());
                }
                Layout::InOut => {
                    let dst = MatrixMut::new(dw, self.input, self.output, self.output);
                    parallel_product(dst, write, self.rows(x.x).transposed(), dy, self.factors);
                }
            });
        }
        if let Some(gradient) = self.bias.as_ref().and_then(|bias| bias.gradient.as_ref()) {
            gradient.add_values(&column_sums(dy, self.output));
        }
    }

    /// `dx = dy · W`, or `dx += …`.
    pub(super) fn backward_input(&self, dx: &mut [f32], write: Write, dy: &[f32]) -> Result<()> {
        let rows = dy.len() / self.output;
        let dst = MatrixMut::new(dx, rows, self.input, self.input);
        let dy = Matrix::new(dy, rows, self.output, self.output);
        self.packed_backward()?.parallel_product(dst, write, None, dy);
        Ok(())
    }
}

/// The sums of the columns of a row-major matrix: blocks of rows side by side, their sums in a fixed order.
pub(crate) fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let parts = rows.div_ceil(128).clamp(1, 16);
    let partial: Vec<Vec<f32>> = (0..parts)
        .into_par_iter()
        .map(|part| {
            let rows = share(rows, parts, part, 1);
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
    pub(super) fn add_rows(sums: &mut [f32], rows: &[f32]) {
        for row in rows.chunks_exact(sums.len()) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}
