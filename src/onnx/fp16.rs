//! A graph in fp32 → the same in fp16, for GPUs: weights and activations of half the size. What would overflow or lose its
//! meaning in eleven bits of mantissa is computed in fp32, between casts; outputs stay what they are. The keys and values
//! that come in and go out again are in fp16.

use std::collections::{BTreeMap, BTreeSet};

use half::f16;

use super::graph::int;
use super::proto::tensor_proto::DataType;
use super::proto::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use crate::{Result, bail_unusable};

/// Sums over a text, squares and cubes, roots, angles. Products, LayerNormalization and Softmax add up in fp32 by
/// themselves, whatever their inputs are.
const IN_FP32: [&str; 9] =
    ["Cos", "CumSum", "Pow", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Sin", "Sqrt"];

/// What goes on in fp32 behind these, where it is cheap.
const GOES_ON: [&str; 7] = ["Add", "Clip", "Div", "Max", "Min", "Mul", "Sub"];

/// What makes no number of numbers: in fp32, where all who read it are.
const HANDS_ON: [&str; 5] = ["Cast", "Expand", "Reshape", "Squeeze", "Unsqueeze"];

/// Operators that give no floating-point numbers, whatever they are given.
const NOT_FLOAT: [&str; 7] = ["And", "Equal", "Less", "LessOrEqual", "Not", "Range", "Shape"];

/// Converts a graph whose floating-point numbers are all in fp32.
///
/// # Errors
/// Unusable: a weight is too large for fp16.
pub fn convert(mut model: ModelProto) -> Result<ModelProto> {
    if let Some(graph) = model.graph.take() {
        model.graph = Some(converted(graph)?);
    }
    Ok(model)
}

fn converted(mut graph: GraphProto) -> Result<GraphProto> {
    let weights: BTreeMap<String, TensorProto> = std::mem::take(&mut graph.initializer)
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    let nodes = std::mem::take(&mut graph.node);
    let floats = floats(&nodes, &weights);
    let wide_nodes = wide(&nodes, &floats);
    let caches = graph.input.iter_mut().chain(&mut graph.output).filter(|outlet| is_cache(&outlet.name));
    caches.for_each(into_fp16);
    let given = graph.output.iter().map(|output| &output.name).filter(|name| !is_cache(name));
    let mut wide: BTreeSet<String> = given.cloned().collect();
    let made = |(node, _): (&NodeProto, _)| node.output.clone();
    wide.extend(nodes.iter().zip(&wide_nodes).filter(|(_, wide)| **wide).flat_map(made));

    let mut halves = Halves { weights, floats, wide, made: BTreeSet::new(), graph };
    for (mut node, is_wide) in nodes.into_iter().zip(wide_nodes) {
        for input in &mut node.input {
            *input = halves.read(input, is_wide)?;
        }
        if node.op_type == "Cast" && halves.floats.contains(&node.output[0]) && !is_wide {
            node.attribute = vec![int("to", DataType::Float16 as i64)];
        }
        for output in &mut node.output {
            *output = halves.written(output, is_wide);
        }
        halves.graph.node.push(node);
    }
    let outputs: Vec<String> = halves.graph.output.iter().map(|output| output.name.clone()).collect();
    for output in outputs {
        halves.read(&output, !is_cache(&output))?;
    }
    Ok(halves.graph)
}

/// Whether keys or values have this name, which come in as a past and go out as what is present.
fn is_cache(name: &str) -> bool {
    name.starts_with("past_key_values.") || name.starts_with("present.")
}

/// Declares an input or output in fp16.
fn into_fp16(outlet: &mut ValueInfoProto) {
    let kind = outlet.r#type.as_mut().and_then(|kind| kind.value.as_mut());
    if let Some(type_proto::Value::TensorType(tensor)) = kind {
        tensor.elem_type = DataType::Float16 as i32;
    }
}

/// The values that are floating-point numbers.
fn floats(nodes: &[NodeProto], weights: &BTreeMap<String, TensorProto>) -> BTreeSet<String> {
    let is_float = |tensor: &&TensorProto| tensor.data_type == DataType::Float as i32;
    let mut floats: BTreeSet<String> =
        weights.values().filter(is_float).map(|tensor| tensor.name.clone()).collect();
    for node in nodes {
        let is_float = |place: usize| node.input.get(place).is_some_and(|name| floats.contains(name));
        let gives_floats = match node.op_type.as_str() {
            "Cast" => node.attribute.iter().any(|to| to.name == "to" && to.i == DataType::Float as i64),
            "Where" => is_float(1),
            op => !NOT_FLOAT.contains(&op) && is_float(0),
        };
        if gives_floats {
            floats.extend(node.output.clone());
        }
    }
    floats
}

/// Of each node, whether it is computed in fp32.
fn wide(nodes: &[NodeProto], floats: &BTreeSet<String>) -> Vec<bool> {
    let is = |node: &NodeProto, ops: &[&str]| {
        ops.contains(&node.op_type.as_str()) && node.output.iter().all(|output| floats.contains(output))
    };
    let mut wide: Vec<bool> = nodes.iter().map(|node| is(node, &IN_FP32)).collect();
    let mut values: BTreeSet<&str> = BTreeSet::new();
    for (node, wide) in nodes.iter().zip(&mut wide) {
        *wide |= is(node, &GOES_ON) && node.input.iter().any(|input| values.contains(input.as_str()));
        if *wide {
            values.extend(node.output.iter().map(String::as_str));
        }
    }
    let hands_on = [&GOES_ON[..], &HANDS_ON].concat();
    // how many read a value, and how many of them in fp32
    let mut readers: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (node, wide) in nodes.iter().zip(&mut wide).rev() {
        let all_read_wide =
            |output: &String| readers.get(output.as_str()).is_some_and(|(all, wide)| all == wide);
        *wide |= is(node, &hands_on) && node.output.iter().all(all_read_wide);
        for input in &node.input {
            let counts = readers.entry(input).or_default();
            counts.0 += 1;
            counts.1 += usize::from(*wide);
        }
    }
    wide
}

/// A graph whose values stand in fp16, in fp32, or in both.
struct Halves {
    weights: BTreeMap<String, TensorProto>,
    floats: BTreeSet<String>,
    /// The values whose own name is that of their numbers in fp32.
    wide: BTreeSet<String>,
    /// The names of weights and casts that are there.
    made: BTreeSet<String>,
    graph: GraphProto,
}

impl Halves {
    /// The name of a value's numbers in fp32 or in fp16.
    fn name(&self, value: &str, wide: bool) -> String {
        match (wide, self.wide.contains(value)) {
            (true, false) => format!("{value}/fp32"),
            (false, true) => format!("{value}/fp16"),
            _ => value.to_owned(),
        }
    }

    /// Where a node writes a value to.
    fn written(&mut self, value: &str, wide: bool) -> String {
        if !self.floats.contains(value) {
            return value.to_owned();
        }
        let name = self.name(value, wide);
        self.made.insert(name.clone());
        name
    }

    /// Where a value is read from; makes a weight or a cast where it does not stand so yet.
    fn read(&mut self, value: &str, wide: bool) -> Result<String> {
        if !self.floats.contains(value) {
            if let Some(weight) = self.weights.get(value).filter(|_| self.made.insert(value.to_owned())) {
                self.graph.initializer.push(weight.clone());
            }
            return Ok(value.to_owned());
        }
        let name = self.name(value, wide);
        if !self.made.insert(name.clone()) {
            return Ok(name);
        }
        if let Some(weight) = self.weights.get(value) {
            let mut weight = weight.clone();
            if !wide {
                halve(&mut weight)?;
            }
            weight.name.clone_from(&name);
            self.graph.initializer.push(weight);
        } else {
            let kind = if wide { DataType::Float } else { DataType::Float16 };
            self.graph.node.push(NodeProto {
                op_type: "Cast".to_owned(),
                name: format!("{name}/Cast"),
                input: vec![self.name(value, !wide)],
                output: vec![name.clone()],
                attribute: vec![int("to", kind as i64)],
                ..Default::default()
            });
        }
        Ok(name)
    }
}

/// A weight's or a constant's numbers in fp16. What stands for a masked score is the lowest number there.
fn halve(tensor: &mut TensorProto) -> Result<()> {
    let mut halves = Vec::with_capacity(tensor.raw_data.len() / 2);
    for bytes in tensor.raw_data.as_chunks::<4>().0 {
        let value = f32::from_le_bytes(*bytes);
        let half = if value == f32::MIN { f16::MIN } else { f16::from_f32(value) };
        if !half.is_finite() {
            bail_unusable!(
                "{} holds {value}, which is too large for fp16: leave --precision fp16 out",
                tensor.name
            );
        }
        halves.extend(half.to_le_bytes());
    }
    tensor.raw_data = halves;
    tensor.data_type = DataType::Float16 as i32;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::graph::typed;
    use super::*;

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: op.to_owned(),
            name: format!("{op}/{output}"),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..Default::default()
        }
    }

    fn weight(name: &str, values: &[f32]) -> TensorProto {
        TensorProto {
            name: name.to_owned(),
            data_type: DataType::Float as i32,
            dims: vec![values.len() as i64],
            raw_data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ..Default::default()
        }
    }

    fn graph(nodes: Vec<NodeProto>, weights: Vec<TensorProto>) -> GraphProto {
        let output = vec![typed("y", DataType::Float, None)];
        GraphProto { node: nodes, initializer: weights, output, ..Default::default() }
    }

    /// `y = w · x / max(√Σ x², 1e-12)`, of rows of a table.
    #[test]
    fn sums_and_what_follows_stay_in_fp32_with_their_constants() {
        let nodes = vec![
            node("Gather", &["table", "ids"], "x"),
            node("ReduceL2", &["x"], "norm"),
            node("Max", &["norm", "least"], "length"),
            node("Div", &["x", "length"], "unit"),
            node("MatMul", &["unit", "w"], "y"),
        ];
        let weights = vec![weight("table", &[0.5]), weight("least", &[1e-12]), weight("w", &[2.0])];
        let found = converted(graph(nodes, weights)).unwrap();
        let told: Vec<String> = found
            .node
            .iter()
            .map(|node| format!("{} {} -> {}", node.op_type, node.input.join(" "), node.output.join(" ")))
            .collect();
        assert_eq!(
            told,
            [
                "Gather table ids -> x",
                "Cast x -> x/fp32",
                "ReduceL2 x/fp32 -> norm",
                "Max norm least/fp32 -> length",
                "Div x/fp32 length -> unit",
                "Cast unit -> unit/fp16",
                "MatMul unit/fp16 w -> y/fp16",
                "Cast y/fp16 -> y",
            ]
        );
        let kinds: Vec<(&str, i32)> =
            found.initializer.iter().map(|weight| (weight.name.as_str(), weight.data_type)).collect();
        let (fp16, fp32) = (DataType::Float16 as i32, DataType::Float as i32);
        assert_eq!(kinds, [("table", fp16), ("least/fp32", fp32), ("w", fp16)]);
    }

    #[test]
    fn angles_are_computed_in_fp32_from_the_start() {
        let mut places = node("Cast", &["positions"], "places");
        places.attribute = vec![int("to", DataType::Float as i64)];
        let nodes = vec![places, node("Mul", &["places", "speeds"], "angles"), node("Cos", &["angles"], "y")];
        let found = converted(graph(nodes, vec![weight("speeds", &[1.0])])).unwrap();
        let ops: Vec<&str> = found.node.iter().map(|node| node.op_type.as_str()).collect();
        assert_eq!(ops, ["Cast", "Mul", "Cos"]);
        assert_eq!(found.node[0].attribute[0].i, DataType::Float as i64);
    }

    #[test]
    fn what_does_not_fit_is_named_and_a_masked_score_is_the_lowest_number() {
        let model = |value| {
            graph(
                vec![node("Mul", &["x", "w"], "y"), node("Neg", &["w"], "z")],
                vec![weight("x", &[1.0]), weight("w", &[value])],
            )
        };
        let found = converted(model(f32::MIN)).unwrap();
        assert_eq!(found.initializer[1].raw_data, f16::MIN.to_le_bytes());
        let error = converted(model(1e5)).unwrap_err();
        assert!(error.to_string().contains("w holds 100000, which is too large for fp16"), "{error}");
        assert_eq!(crate::error::exit_code(&error), 2);
    }
}
