//! A graph under construction: nodes over numbered values, whose names are settled last.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;

use super::blocks::Blocks;
use super::int8::{NUMBERS, Rounded, Rounding, SCALES};
use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_proto::DataType;
use super::proto::tensor_shape_proto::{Dimension, dimension};
use super::proto::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};
use crate::checkpoint::f32_bytes;
use crate::model::ops::{Layout, Param, Role};
use crate::task::Dim;
use crate::{Result, bail_unusable};

/// A value's number. Values are named when the graph is finished, so that a tap can still rename one.
pub(super) type ValueId = usize;

/// In the place of an input that is left out, or an output that nobody reads.
pub(super) const ABSENT: ValueId = ValueId::MAX;

/// The operators that are ONNX Runtime's own.
const OWN: [&str; 5] =
    ["FastGelu", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention"];

/// Their domain.
pub(super) const OWN_DOMAIN: &str = "com.microsoft";

/// What the names of a graph's own constants begin with; no weight's does.
pub(super) const CONSTANTS: &str = "const/";

/// The inputs of tokens that a graph may have, in their order, int64. Others follow as they were declared.
pub const INPUTS: [&str; 4] = ["input_ids", "attention_mask", "token_type_ids", "position_ids"];

/// A graph's input or output.
#[derive(Clone)]
pub(super) struct Outlet {
    pub name: String,
    pub kind: DataType,
    pub dims: Vec<Dim>,
    pub value: ValueId,
}

impl Outlet {
    fn info(&self) -> ValueInfoProto {
        value_info(&self.name, self.kind, &self.dims)
    }
}

#[derive(Default)]
pub(super) struct Graph {
    /// The name of each value.
    names: Vec<String>,
    /// Values whose name is somebody's promise: inputs, weights, taps, outputs.
    fixed: BTreeSet<ValueId>,
    nodes: Vec<Node>,
    node_names: BTreeMap<String, usize>,
    inputs: Vec<Outlet>,
    params: Vec<Initializer>,
    blocks: Vec<InBlocks>,
    int8: Vec<InInt8>,
    constants: Vec<(TensorProto, ValueId)>,
    /// What is computed once for the whole graph, e.g. the mask.
    shared: BTreeMap<String, ValueId>,
}

/// A weight that is stored as numbers, and its value.
struct Initializer {
    param: Param,
    /// Whether it is a matrix whose rows are written as columns.
    transposed: bool,
    value: ValueId,
}

impl Initializer {
    fn name(&self) -> String {
        if self.transposed { format!("{}.T", self.param.name) } else { self.param.name.clone() }
    }

    fn shape(&self) -> Vec<usize> {
        let mut shape = self.param.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}

/// A weight that is stored in blocks, and the values of its numbers and its scales.
struct InBlocks {
    param: Param,
    blocks: Blocks,
    numbers: ValueId,
    scales: ValueId,
}

/// A weight that is stored in int8, and the values of its numbers and its scales.
struct InInt8 {
    param: Param,
    rounding: Rounding,
    numbers: ValueId,
    scales: ValueId,
}

impl InInt8 {
    /// Whether its rows are written as columns: matrices stand as products take them, tables as they are.
    fn transposed(&self) -> bool {
        self.rounding.layout == Layout::OutIn && self.param.role != Role::Table
    }
}

pub(super) struct Node {
    pub op: &'static str,
    name: String,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
    pub attributes: Vec<AttributeProto>,
}

impl Graph {
    fn value(&mut self, name: String) -> ValueId {
        self.names.push(name);
        self.names.len() - 1
    }

    fn fixed_value(&mut self, name: &str) -> ValueId {
        let value = self.value(name.to_owned());
        self.fixed.insert(value);
        value
    }

    /// Adds a node `scope/Op` (`scope/Op_1` … where that is taken) and returns its output.
    pub fn node(
        &mut self,
        scope: &str,
        op: &'static str,
        inputs: &[ValueId],
        attributes: Vec<AttributeProto>,
    ) -> ValueId {
        self.node_of(scope, op, inputs, attributes, 1)[0]
    }

    /// The same with several outputs.
    pub fn node_of(
        &mut self,
        scope: &str,
        op: &'static str,
        inputs: &[ValueId],
        attributes: Vec<AttributeProto>,
        outputs: usize,
    ) -> Vec<ValueId> {
        let mut name = format!("{scope}/{op}");
        let seen = self.node_names.entry(name.clone()).or_default();
        if *seen > 0 {
            name = format!("{name}_{seen}");
        }
        *seen += 1;
        let first = self.value(name.clone());
        let outputs: Vec<ValueId> =
            std::iter::once(first).chain((1..outputs).map(|i| self.value(format!("{name}:{i}")))).collect();
        self.nodes.push(Node { op, name, inputs: inputs.to_vec(), outputs: outputs.clone(), attributes });
        outputs
    }

    /// One of [`INPUTS`], (B, T), declared by its first use.
    pub fn input(&mut self, name: &str) -> ValueId {
        self.input_of(name, DataType::Int64, &[Dim::Batch, Dim::Sequence])
    }

    /// An input, declared by its first use.
    pub fn input_of(&mut self, name: &str, kind: DataType, dims: &[Dim]) -> ValueId {
        if let Some(known) = self.inputs.iter().find(|known| known.name == name) {
            return known.value;
        }
        let value = self.fixed_value(name);
        self.inputs.push(Outlet { name: name.to_owned(), kind, dims: dims.to_vec(), value });
        value
    }

    /// A weight, declared by its first use; the same name again is the same (tied) weight.
    pub fn param(&mut self, param: &Param) -> Result<ValueId> {
        self.weight(param, false)
    }

    /// A matrix that a checkpoint stores as (out, in), as (in, out).
    pub fn transposed(&mut self, param: &Param) -> Result<ValueId> {
        self.weight(param, true)
    }

    fn weight(&mut self, param: &Param, transposed: bool) -> Result<ValueId> {
        match self.params.iter().find(|known| known.param.name == param.name) {
            Some(known) if known.param.shape == param.shape && known.transposed == transposed => {
                return Ok(known.value);
            }
            Some(known) => anyhow::bail!(
                "{} is used with shape {:?} and with shape {:?}, or in two layouts",
                param.name,
                known.param.shape,
                param.shape
            ),
            None => {}
        }
        let mut weight = Initializer { param: param.clone(), transposed, value: 0 };
        weight.value = self.fixed_value(&weight.name());
        let value = weight.value;
        self.params.push(weight);
        Ok(value)
    }

    /// A weight in blocks: its numbers and its scales, declared by their first use.
    pub fn in_blocks(&mut self, param: &Param, blocks: Blocks) -> Result<(ValueId, ValueId)> {
        if let Some(known) = self.blocks.iter().find(|known| known.param.name == param.name) {
            anyhow::ensure!(known.blocks == blocks, "{} is cut into blocks in two ways", param.name);
            return Ok((known.numbers, known.scales));
        }
        let numbers = self.fixed_value(&format!("{}_q{}", param.name, blocks.bits));
        let scales = self.fixed_value(&format!("{}_scales", param.name));
        self.blocks.push(InBlocks { param: param.clone(), blocks, numbers, scales });
        Ok((numbers, scales))
    }

    /// A weight in int8: its numbers, (in, out) of a matrix and as it is of a table, and its scales, (out) of a matrix and
    /// (rows, 1) of a table. Declared by their first use.
    pub fn in_int8(&mut self, param: &Param, rounding: Rounding) -> Result<(ValueId, ValueId)> {
        if let Some(known) = self.int8.iter_mut().find(|known| known.param.name == param.name) {
            let other = Rounding { multiplied: known.rounding.multiplied, ..rounding };
            anyhow::ensure!(known.rounding == other, "{} is rounded in two ways", param.name);
            known.rounding.multiplied |= rounding.multiplied;
            return Ok((known.numbers, known.scales));
        }
        let numbers = self.fixed_value(&format!("{}{NUMBERS}", param.name));
        let scales = self.fixed_value(&format!("{}{SCALES}", param.name));
        self.int8.push(InInt8 { param: param.clone(), rounding, numbers, scales });
        Ok((numbers, scales))
    }

    /// The node that makes a value, and which of its outputs it is.
    pub fn maker(&self, value: ValueId) -> Option<(&Node, usize)> {
        self.nodes.iter().rev().find_map(|node| {
            node.outputs.iter().position(|&output| output == value).map(|index| (node, index))
        })
    }

    /// The outputs of a node without attributes, which is made once for all who want it of these inputs.
    pub fn once(
        &mut self,
        scope: &str,
        op: &'static str,
        inputs: &[ValueId],
        outputs: usize,
    ) -> Vec<ValueId> {
        match self.nodes.iter().find(|node| node.op == op && node.inputs == inputs) {
            Some(node) => node.outputs.clone(),
            None => self.node_of(scope, op, inputs, Vec::new(), outputs),
        }
    }

    /// Whether a value is a weight with so many dimensions.
    pub fn is_weight(&self, value: ValueId, dims: usize) -> bool {
        self.params.iter().any(|known| known.value == value && known.param.shape.len() == dims)
    }

    /// The nodes, to be rewritten.
    pub fn nodes_mut(&mut self) -> &mut Vec<Node> {
        &mut self.nodes
    }

    /// Leaves out the nodes, weights and constants that no output depends on.
    fn prune(&mut self, outputs: &[Outlet]) {
        let mut used: BTreeSet<ValueId> = outputs.iter().map(|output| output.value).collect();
        let mut kept: Vec<Node> = Vec::with_capacity(self.nodes.len());
        for node in std::mem::take(&mut self.nodes).into_iter().rev() {
            if node.outputs.iter().any(|output| used.contains(output)) {
                used.extend(&node.inputs);
                kept.push(node);
            }
        }
        kept.reverse();
        self.nodes = kept;
        self.params.retain(|weight| used.contains(&weight.value));
        self.int8.retain(|weight| used.contains(&weight.numbers));
        self.constants.retain(|(_, value)| used.contains(value));
    }

    /// An integer constant of the given shape: `[]` for a scalar, `[n]` for a list.
    pub fn i64s(&mut self, dims: &[i64], values: &[i64]) -> ValueId {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(format!("i64/{}", listed(dims, values)), DataType::Int64, dims, bytes)
    }

    /// A list of integers as a constant with a name of its own, where they are many.
    pub fn named_i64s(&mut self, name: &str, values: &[i64]) -> ValueId {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(format!("i64/{name}"), DataType::Int64, &[values.len() as i64], bytes)
    }

    /// A byte as a constant without dimensions.
    pub fn u8(&mut self, value: u8) -> ValueId {
        self.constant(format!("u8/{value}"), DataType::Uint8, &[], vec![value])
    }

    /// A number as a constant without dimensions.
    pub fn f32(&mut self, value: f32) -> ValueId {
        self.constant(format!("f32/{value:?}"), DataType::Float, &[], value.to_le_bytes().to_vec())
    }

    /// Numbers of the given shape, each so many times.
    pub fn f32s(&mut self, dims: &[i64], values: &[(usize, f32)]) -> ValueId {
        let content: Vec<String> = values.iter().map(|(count, value)| format!("{count}x{value:?}")).collect();
        let bytes = values.iter().flat_map(|(count, value)| value.to_le_bytes().repeat(*count)).collect();
        self.constant(format!("f32/{dims:?}/{}", content.join(",")), DataType::Float, dims, bytes)
    }

    /// Constants are named for their content, so equal ones are one.
    fn constant(&mut self, content: String, kind: DataType, dims: &[i64], raw_data: Vec<u8>) -> ValueId {
        let name = format!("{CONSTANTS}{content}");
        if let Some((_, value)) = self.constants.iter().find(|(known, _)| known.name == name) {
            return *value;
        }
        let value = self.fixed_value(&name);
        let tensor =
            TensorProto { name, data_type: kind as i32, dims: dims.to_vec(), raw_data, ..Default::default() };
        self.constants.push((tensor, value));
        value
    }

    /// A value that is made once and used wherever it is asked for.
    pub fn shared(&mut self, key: &str, make: impl FnOnce(&mut Self) -> ValueId) -> ValueId {
        if let Some(&value) = self.shared.get(key) {
            return value;
        }
        let value = make(self);
        self.shared.insert(key.to_owned(), value);
        value
    }

    /// Gives a value exactly this name; one that already has a promised name is passed through an Identity.
    pub fn rename(&mut self, value: ValueId, name: &str) -> Result<ValueId> {
        anyhow::ensure!(!self.names.iter().any(|known| known == name), "two values are named {name}");
        let value = if self.fixed.contains(&value) {
            self.node(name, "Identity", &[value], Vec::new())
        } else {
            value
        };
        name.clone_into(&mut self.names[value]);
        self.fixed.insert(value);
        Ok(value)
    }

    /// Settles the names, fetches the weights and writes the graph out.
    pub fn finish<'w>(
        mut self,
        outputs: &[Outlet],
        weights: impl Fn(&Param) -> Result<std::borrow::Cow<'w, [f32]>>,
    ) -> Result<GraphProto> {
        let mut graph = GraphProto { name: "tk".to_owned(), ..Default::default() };
        self.prune(outputs);
        for output in outputs {
            if self.names[output.value] != output.name {
                self.rename(output.value, &output.name)?;
            }
            graph.output.push(output.info());
        }
        let place = |input: &Outlet| INPUTS.iter().position(|name| *name == input.name);
        self.inputs.sort_by_key(|input| place(input).unwrap_or(INPUTS.len()));
        graph.input = self.inputs.iter().map(Outlet::info).collect();
        let weights = |param: &Param| {
            let values = weights(param).with_context(|| param.name.clone())?;
            if values.len() != param.numel() {
                bail_unusable!(
                    "{} holds {} numbers, the shape {:?} asks for {}",
                    param.name,
                    values.len(),
                    param.shape,
                    param.numel()
                );
            }
            Ok(values)
        };
        let tensor = |name: &str, kind: DataType, dims: &[usize], raw_data: Vec<u8>| TensorProto {
            name: name.to_owned(),
            data_type: kind as i32,
            dims: dims.iter().map(|&n| n as i64).collect(),
            raw_data,
            ..Default::default()
        };
        for weight in &self.params {
            let values = weights(&weight.param)?;
            let values = if weight.transposed {
                f32_bytes(&transpose(&values, weight.param.shape[0])).into_owned()
            } else {
                f32_bytes(&values).into_owned()
            };
            graph.initializer.push(tensor(&weight.name(), DataType::Float, &weight.shape(), values));
        }
        // rounded, a number that is not finite would be seen no more
        let finite = |param: &Param| {
            let values = weights(param)?;
            if values.iter().any(|x| !x.is_finite()) {
                bail_unusable!(
                    "{} is not finite, so no graph is written; the training run diverged",
                    param.name
                );
            }
            Ok(values)
        };
        for weight in &self.int8 {
            let Rounded { numbers, scales } = weight.rounding.round(&finite(&weight.param)?);
            let (mut shape, table) = (weight.param.shape.clone(), weight.param.role == Role::Table);
            let mut bytes: Vec<u8> = numbers.into_iter().map(i8::cast_unsigned).collect();
            if weight.transposed() {
                bytes = transpose(&bytes, shape[0]);
                shape.reverse();
            }
            graph.initializer.push(tensor(&self.names[weight.numbers], DataType::Int8, &shape, bytes));
            let of_each: &[usize] = if table { &[1] } else { &[] };
            let shape = [&[scales.len()], of_each].concat();
            let scales = f32_bytes(&scales).into_owned();
            graph.initializer.push(tensor(&self.names[weight.scales], DataType::Float, &shape, scales));
        }
        for InBlocks { param, blocks, numbers, scales } in &self.blocks {
            let values = finite(param)?;
            let packed = blocks.pack(&values);
            let dims = [blocks.rows, blocks.of_row(), blocks.bytes()];
            graph.initializer.push(tensor(&self.names[*numbers], DataType::Uint8, &dims, packed.numbers));
            let values = f32_bytes(&packed.scales).into_owned();
            graph.initializer.push(tensor(&self.names[*scales], DataType::Float, &dims[..2], values));
        }
        graph.initializer.extend(self.constants.into_iter().map(|(tensor, _)| tensor));
        let name = |&value: &ValueId| if value == ABSENT { String::new() } else { self.names[value].clone() };
        graph.node = self
            .nodes
            .into_iter()
            .map(|node| NodeProto {
                op_type: node.op.to_owned(),
                domain: if OWN.contains(&node.op) { OWN_DOMAIN.to_owned() } else { String::new() },
                name: node.name,
                input: node.inputs.iter().map(name).collect(),
                output: node.outputs.iter().map(name).collect(),
                attribute: node.attributes,
                ..Default::default()
            })
            .collect();
        Ok(graph)
    }
}

/// A matrix of so many rows, its columns one after another.
fn transpose<T: Copy>(values: &[T], rows: usize) -> Vec<T> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|column| values[column..].iter().step_by(columns).copied()).collect()
}

fn listed(dims: &[i64], values: &[i64]) -> String {
    let values: Vec<String> = values.iter().map(i64::to_string).collect();
    if dims.is_empty() { values.join(",") } else { format!("[{}]", values.join(",")) }
}

/// An integer attribute.
pub(super) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Int as i32,
        i: value,
        ..Default::default()
    }
}

/// A list of integers as an attribute.
pub(super) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Ints as i32,
        ints: values.to_vec(),
        ..Default::default()
    }
}

/// A number as an attribute.
pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Float as i32,
        f: value,
        ..Default::default()
    }
}

/// A text as an attribute.
pub(super) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::String as i32,
        s: value.as_bytes().to_vec(),
        ..Default::default()
    }
}

/// The name, type and shape of a graph's input or output.
pub(super) fn value_info(name: &str, kind: DataType, dims: &[Dim]) -> ValueInfoProto {
    let dim = dims
        .iter()
        .map(|dim| {
            let value = match dim {
                Dim::Batch => dimension::Value::DimParam("batch_size".to_owned()),
                Dim::Sequence => dimension::Value::DimParam("sequence_length".to_owned()),
                Dim::Past => dimension::Value::DimParam("past_sequence_length".to_owned()),
                Dim::Total => dimension::Value::DimParam("past_sequence_length + sequence_length".to_owned()),
                Dim::Capacity => dimension::Value::DimParam("capacity".to_owned()),
                Dim::Asked => dimension::Value::DimParam("asked".to_owned()),
                Dim::Of(n) => dimension::Value::DimValue(*n as i64),
            };
            Dimension { value: Some(value), ..Default::default() }
        })
        .collect();
    typed(name, kind, Some(TensorShapeProto { dim }))
}

/// The name and type of a graph's output whose shape is left to inference.
pub(super) fn typed(name: &str, kind: DataType, shape: Option<TensorShapeProto>) -> ValueInfoProto {
    let tensor = type_proto::Tensor { elem_type: kind as i32, shape };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.to_owned(), r#type: Some(r#type), ..Default::default() }
}
