//! ONNX: the interpreter that writes graphs, and their check, their files and their text.

pub mod blocks;
pub mod check;
pub mod dump;
pub mod emit;
mod fp16;
mod fuse;
mod graph;
pub mod int8;
pub mod model;
pub mod rows;
pub mod write;

/// The protobuf messages of ONNX, as candle-onnx generates them.
pub use candle_onnx::onnx as proto;

use std::collections::BTreeMap;

pub use blocks::{DEFAULT_BLOCK, LARGEST_BLOCK, LEAST_BLOCK, Precision};

use crate::task::Form;
use crate::{Result, bail_unusable};

/// What kind of graph is written.
#[derive(Clone, Debug, PartialEq)]
pub struct GraphKind {
    pub form: Form,
    pub opset: i64,
    pub precision: Precision,
    /// Numbers of a block, where matrices are stored in blocks.
    pub block: usize,
    /// The weights that stay in fp32 among others in int8.
    pub kept: Vec<String>,
    /// Between what numbers the activations lie that int8 rounds, by the weight that they are multiplied with. Those of
    /// others are rounded as they come.
    pub ranges: BTreeMap<String, Range>,
    /// Whether outputs tell of every product in fp32 between what numbers its activations lie: see [`emit::LEAST`] and
    /// [`emit::MOST`].
    pub observed: bool,
    /// Whether attention is ONNX Runtime's own operator.
    pub fused: bool,
}

/// The least and the largest number of activations.
pub type Range = (f32, f32);

impl GraphKind {
    /// A graph in fp32.
    pub fn fp32(form: Form, opset: i64) -> Self {
        Self {
            form,
            opset,
            precision: Precision::Fp32,
            block: DEFAULT_BLOCK,
            kept: Vec::new(),
            ranges: BTreeMap::new(),
            observed: false,
            fused: false,
        }
    }

    /// A graph of whole sequences in fp32 for ONNX Runtime alone.
    pub fn fused() -> Self {
        Self { fused: true, ..Self::fp32(Form::Whole, FUSED_OPSET) }
    }

    /// A graph of whole sequences whose matrices are in int8, but for those that are kept in fp32.
    pub fn int8(kept: Vec<String>, ranges: BTreeMap<String, Range>, opset: i64) -> Self {
        Self { precision: Precision::Int8, kept, ranges, ..Self::fp32(Form::Whole, opset) }
    }

    /// A graph in fp32 that tells the ranges of its activations.
    pub fn observed(opset: i64) -> Self {
        Self { observed: true, ..Self::fp32(Form::Whole, opset) }
    }

    /// A graph that ONNX Runtime alone reads, with its own operators.
    pub fn in_place(precision: Precision) -> Self {
        Self { precision, ..Self::fp32(Form::InPlace, IN_PLACE_OPSET) }
    }
}

/// The opsets that tk writes; what serves them must know at least that opset of `ai.onnx`.
pub const OPSETS: std::ops::RangeInclusive<i64> = 13..=24;

/// The first opset with LayerNormalization that peers also default to.
pub const DEFAULT_OPSET: i64 = 18;

/// The opset that candle-onnx's evaluator can run: layer norms and GELUs stand there as primitives.
pub const CANDLE_OPSET: i64 = 14;

/// The opset of graphs of whole sequences with ONNX Runtime's own attention; it has the operator that turns queries.
const FUSED_OPSET: i64 = 23;

/// The opset of graphs with ONNX Runtime's own operators.
const IN_PLACE_OPSET: i64 = 21;

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
