//! ONNX: the interpreter that writes graphs, and their check, their files and their text.

pub mod check;
pub mod dump;
pub mod emit;
mod graph;
pub mod model;
pub mod write;

/// The protobuf messages of ONNX, as candle-onnx generates them.
pub use candle_onnx::onnx as proto;

use crate::{Result, bail_unusable};

/// The opsets that tk writes; what serves them must know at least that opset of `ai.onnx`.
pub const OPSETS: std::ops::RangeInclusive<i64> = 13..=21;

/// The first opset with LayerNormalization that peers also default to.
pub const DEFAULT_OPSET: i64 = 18;

/// The opset that candle-onnx's evaluator can run: layer norms and GELUs stand there as primitives.
pub const CANDLE_OPSET: i64 = 14;

/// Refuses an opset that tk does not write.
pub fn checked_opset(opset: i64) -> Result<i64> {
    if !OPSETS.contains(&opset) {
        bail_unusable!(
            "opset {opset}: tk writes the opsets {} to {} (default {DEFAULT_OPSET})",
            OPSETS.start(),
            OPSETS.end()
        );
    }
    Ok(opset)
}
