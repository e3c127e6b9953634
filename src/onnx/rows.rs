//! The graph that copies rows between matrices: for memory that only a provider can reach.

use super::graph::{int, typed};
use super::proto::tensor_proto::DataType;
use super::proto::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto};
use super::{IN_PLACE_OPSET, emit};

/// `rows_to`, (M, W), with its rows `to`, (N, 1), replaced by the rows `from`, (N), of `rows_from`, (L, W): `moved`, (M, W).
/// All are read before any is written, so both matrices, and the result, may be one.
pub fn copying(kind: DataType) -> ModelProto {
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        op_type: op.to_owned(),
        name: op.to_owned(),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    };
    let gather =
        NodeProto { attribute: vec![int("axis", 0)], ..node("Gather", &["rows_from", "from"], "rows") };
    let indices = DataType::Int64;
    let graph = GraphProto {
        name: "rows".to_owned(),
        node: vec![gather, node("ScatterND", &["rows_to", "to", "rows"], "moved")],
        input: vec![
            typed("rows_from", kind, None),
            typed("rows_to", kind, None),
            typed("from", indices, None),
            typed("to", indices, None),
        ],
        output: vec![typed("moved", kind, None)],
        ..Default::default()
    };
    ModelProto {
        ir_version: emit::ir_version(IN_PLACE_OPSET),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: IN_PLACE_OPSET }],
        producer_name: "tk".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(graph),
        ..Default::default()
    }
}
