//! A model held against the rules of ONNX before it is written: every name once, every value known before it
//! is used, nothing unused, every number finite.

use std::collections::{BTreeMap, BTreeSet};

use super::proto::tensor_proto::{DataLocation, DataType};
use super::proto::{GraphProto, ModelProto, TensorProto};
use crate::{Result, bail_unusable};

/// The most findings that an error lists.
const SHOWN: usize = 12;

/// Checks a model whose initializers are in memory.
///
/// # Errors
/// Lists what is wrong. A weight that is not finite is the input's fault, everything else is tk's.
pub fn check(model: &ModelProto) -> Result<()> {
    let Some(graph) = &model.graph else { anyhow::bail!("the model has no graph") };
    let not_finite: Vec<&str> =
        graph.initializer.iter().filter(|t| !is_finite(t)).map(|t| t.name.as_str()).collect();
    if !not_finite.is_empty() {
        bail_unusable!(
            "{} of {} weights are not finite, so no graph is written: {}; the training run diverged",
            not_finite.len(),
            graph.initializer.len(),
            not_finite.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ")
        );
    }
    let wrong = findings(model, graph);
    if !wrong.is_empty() {
        let shown: Vec<&str> = wrong.iter().take(SHOWN).map(String::as_str).collect();
        anyhow::bail!("the graph is malformed ({} findings):\n  {}", wrong.len(), shown.join("\n  "));
    }
    Ok(())
}

fn findings(model: &ModelProto, graph: &GraphProto) -> Vec<String> {
    let mut wrong = Vec::new();
    let domains: Vec<&str> = model.opset_import.iter().map(|opset| opset.domain.as_str()).collect();
    let mut used: BTreeSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    used.extend(graph.node.iter().flat_map(|node| node.input.iter().map(String::as_str)));

    // where each value comes from, in the order of the file: inputs, initializers, nodes
    let mut known: BTreeMap<&str, String> = BTreeMap::new();
    let mut nodes = BTreeSet::new();
    for input in &graph.input {
        note(&mut known, &mut wrong, &input.name, "the graph's inputs");
    }
    for tensor in &graph.initializer {
        note(&mut known, &mut wrong, &tensor.name, "the initializers");
        wrong.extend(size_mismatch(tensor));
    }
    for name in graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|t| &t.name)) {
        if !used.contains(name.as_str()) {
            wrong.push(format!("{name} is not used"));
        }
    }
    for node in &graph.node {
        if !nodes.insert(node.name.as_str()) {
            wrong.push(format!("two nodes are named {}", node.name));
        }
        if !domains.contains(&node.domain.as_str()) {
            wrong.push(format!("{} is of the domain \"{}\", which is not imported", node.name, node.domain));
        }
        for input in node.input.iter().filter(|input| !input.is_empty()) {
            if !known.contains_key(input.as_str()) {
                wrong.push(format!("{} reads {input}, which nothing before it defines", node.name));
            }
        }
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            note(&mut known, &mut wrong, output, &node.name);
        }
        if !node.output.iter().any(|output| used.contains(output.as_str())) {
            wrong.push(format!("{} of {} is not used", node.output.join(", "), node.name));
        }
    }
    for output in &graph.output {
        if !known.contains_key(output.name.as_str()) {
            wrong.push(format!("the output {} is never computed", output.name));
        }
    }
    wrong
}

/// Notes where a value is defined; a second definition is wrong.
fn note<'a>(known: &mut BTreeMap<&'a str, String>, wrong: &mut Vec<String>, name: &'a str, place: &str) {
    if let Some(before) = known.insert(name, place.to_owned()) {
        wrong.push(format!("{name} is defined by {before} and by {place}"));
    }
}

fn size_mismatch(tensor: &TensorProto) -> Option<String> {
    if tensor.data_location == DataLocation::External as i32 {
        return None;
    }
    let count: i64 = tensor.dims.iter().product();
    let width = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Uint8 | DataType::Int8) => 1,
        Ok(DataType::Float16) => 2,
        Ok(DataType::Float) => 4,
        Ok(DataType::Int64) => 8,
        _ => {
            return Some(format!(
                "{} is of a type that tk does not write ({})",
                tensor.name, tensor.data_type
            ));
        }
    };
    (tensor.raw_data.len() as i64 != count * width).then(|| {
        format!(
            "{} has {} bytes, its shape {:?} asks for {}",
            tensor.name,
            tensor.raw_data.len(),
            tensor.dims,
            count * width
        )
    })
}

fn is_finite(tensor: &TensorProto) -> bool {
    tensor.data_type != DataType::Float as i32
        || tensor.raw_data.as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite())
}

#[cfg(test)]
mod tests {
    use super::super::graph::typed;
    use super::super::proto::{NodeProto, OperatorSetIdProto};
    use super::*;

    fn node(name: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            name: name.to_owned(),
            op_type: "Add".to_owned(),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..Default::default()
        }
    }

    fn weight(name: &str, value: f32) -> TensorProto {
        TensorProto {
            name: name.to_owned(),
            data_type: DataType::Float as i32,
            raw_data: value.to_le_bytes().to_vec(),
            ..Default::default()
        }
    }

    /// `y = (x + w) + w`.
    fn model() -> ModelProto {
        let graph = GraphProto {
            input: vec![typed("x", DataType::Float, None)],
            output: vec![typed("y", DataType::Float, None)],
            initializer: vec![weight("w", 1.0)],
            node: vec![node("a", &["x", "w"], "h"), node("b", &["h", "w"], "y")],
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            opset_import: vec![OperatorSetIdProto::default()],
            ..Default::default()
        }
    }

    fn error(change: impl FnOnce(&mut GraphProto)) -> String {
        let mut model = model();
        change(model.graph.as_mut().unwrap());
        check(&model).unwrap_err().to_string()
    }

    #[test]
    fn a_sound_graph_passes() {
        check(&model()).unwrap();
    }

    #[test]
    fn what_is_malformed_is_named() {
        assert!(error(|g| g.node.swap(0, 1)).contains("b reads h, which nothing before it defines"));
        assert!(error(|g| g.node[1].output[0] = "h".to_owned()).contains("h is defined by a and by b"));
        assert!(error(|g| g.node[1].name = "a".to_owned()).contains("two nodes are named a"));
        assert!(error(|g| g.initializer.push(weight("v", 1.0))).contains("v is not used"));
        assert!(error(|g| g.output[0].name = "z".to_owned()).contains("the output z is never computed"));
        assert!(
            error(|g| g.initializer[0].dims = vec![2]).contains("w has 4 bytes, its shape [2] asks for 8")
        );
        assert!(
            error(|g| g.node[0].domain = "com.x".to_owned()).contains("\"com.x\", which is not imported")
        );
    }

    #[test]
    fn a_weight_that_is_not_finite_is_named_and_is_the_inputs_fault() {
        let mut model = model();
        model.graph.as_mut().unwrap().initializer[0] = weight("w", f32::NAN);
        let error = check(&model).unwrap_err();
        assert!(error.to_string().contains("1 of 1 weights are not finite"), "{error}");
        assert_eq!(crate::error::exit_code(&error), 2);
    }
}
