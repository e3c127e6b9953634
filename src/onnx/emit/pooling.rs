//! The tokens of every sequence as one row, and rows of length 1, in operators that every opset and candle-onnx have.
//! Padding is told by the mask, and never counts.

use super::super::graph::{ValueId, int};
use super::super::proto::tensor_proto::DataType;
use super::{Emit, MASKED, X, ints};
use crate::Result;
use crate::eager::kernels::pooling::SMALLEST_NORM;
use crate::model::ops::Pooling;
use crate::task::Form;

/// What a sequence's tokens are counted as at least, so that one without any gives zeros.
const FEWEST: f32 = 1e-9;

impl Emit {
    /// (B, T, C) → (B, C).
    ///
    /// # Errors
    /// The graph goes on from a past, whose tokens it does not see.
    pub(super) fn pooled(&self, x: &X, how: Pooling) -> Result<ValueId> {
        anyhow::ensure!(
            self.kind.form == Form::Whole && x.every,
            "tokens are pooled where all of them are there"
        );
        let at = &x.scope;
        let axis = self.list(&[1]);
        if how == Pooling::Max {
            let mask = self.graph.borrow_mut().input("attention_mask");
            let mask = self.node(at, "Cast", &[mask], vec![int("to", DataType::Bool as i64)]);
            let last = self.list(&[2]);
            let mask = self.plain(at, "Unsqueeze", &[mask, last]); // (B, T, 1)
            let kept = self.plain(at, "Where", &[mask, x.value, self.f32(MASKED)]);
            let drop = int("keepdims", 0);
            return Ok(if self.kind.opset >= 18 {
                self.node(at, "ReduceMax", &[kept, axis], vec![drop])
            } else {
                self.node(at, "ReduceMax", &[kept], vec![ints("axes", &[1]), drop])
            });
        }
        let mask = self.graph.borrow_mut().input("attention_mask");
        let ones = self.node(at, "Cast", &[mask], vec![int("to", DataType::Float as i64)]); // (B, T)
        let weights = match how {
            Pooling::WeightedMean => {
                let along = self.graph.borrow_mut().i64s(&[], &[1]);
                let counts = self.plain(at, "CumSum", &[ones, along]);
                self.plain(at, "Mul", &[counts, ones])
            }
            _ => ones,
        };
        let sum = self.node(at, "ReduceSum", &[weights, axis], vec![int("keepdims", 1)]); // (B, 1)
        let sum = self.plain(at, "Clip", &[sum, self.f32(FEWEST)]);
        let by = if how == Pooling::MeanSqrtLength { self.plain(at, "Sqrt", &[sum]) } else { sum };
        let shares = self.plain(at, "Div", &[weights, by]);
        let shares = self.plain(at, "Unsqueeze", &[shares, axis]); // (B, 1, T)
        let row = self.plain(at, "MatMul", &[shares, x.value]); // (B, 1, C)
        Ok(self.plain(at, "Squeeze", &[row, axis]))
    }

    /// Each row by its norm.
    pub(super) fn normalized(&self, x: &X) -> ValueId {
        let at = &x.scope;
        let axis = self.list(&[if x.every { 2 } else { 1 }]);
        let square = self.plain(at, "Mul", &[x.value, x.value]);
        let sum = self.node(at, "ReduceSum", &[square, axis], vec![int("keepdims", 1)]);
        let norm = self.plain(at, "Sqrt", &[sum]);
        let norm = self.plain(at, "Clip", &[norm, self.f32(SMALLEST_NORM)]);
        self.plain(at, "Div", &[x.value, norm])
    }
}
