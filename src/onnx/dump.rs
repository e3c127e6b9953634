//! A graph → stable text, one line a value: what snapshots are held against.

use std::fmt::Write;

use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_proto::DataType;
use super::proto::tensor_shape_proto::dimension;
use super::proto::{AttributeProto, ModelProto, TensorProto, ValueInfoProto, type_proto};

/// Inputs, initializers with their shapes, nodes with their attributes, outputs; no weights, no hashes.
pub fn dump(model: &ModelProto) -> String {
    let mut text = String::new();
    let opsets: Vec<String> = model
        .opset_import
        .iter()
        .map(|opset| {
            format!("{} {}", if opset.domain.is_empty() { "ai.onnx" } else { &opset.domain }, opset.version)
        })
        .collect();
    let Some(graph) = &model.graph else { return text };
    // writing to a String can't fail
    let _ = writeln!(text, "ir {}, {}", model.ir_version, opsets.join(", "));
    for input in &graph.input {
        let _ = writeln!(text, "input  {}", value(input));
    }
    for tensor in &graph.initializer {
        let _ = writeln!(text, "weight {}", initializer(tensor));
    }
    for node in &graph.node {
        let attributes: Vec<String> = node.attribute.iter().map(attribute).collect();
        let attributes =
            if attributes.is_empty() { String::new() } else { format!(" {{{}}}", attributes.join(", ")) };
        let renamed =
            if node.output == [node.name.as_str()] { String::new() } else { format!("  # {}", node.name) };
        let _ = writeln!(
            text,
            "{} = {}({}){attributes}{renamed}",
            node.output.join(", "),
            node.op_type,
            node.input.join(", ")
        );
    }
    for output in &graph.output {
        let _ = writeln!(text, "output {}", value(output));
    }
    text
}

fn value(info: &ValueInfoProto) -> String {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref().and_then(|t| t.value.as_ref())
    else {
        return format!("{}: ?", info.name);
    };
    let dims = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| match &dim.value {
        Some(dimension::Value::DimValue(n)) => n.to_string(),
        Some(dimension::Value::DimParam(name)) => name.clone(),
        None => "?".to_owned(),
    });
    format!("{}: {} [{}]", info.name, kind(tensor.elem_type), dims.collect::<Vec<_>>().join(", "))
}

fn initializer(tensor: &TensorProto) -> String {
    format!("{}: {} {:?}", tensor.name, kind(tensor.data_type), tensor.dims)
}

fn kind(kind: i32) -> String {
    DataType::try_from(kind).map_or_else(|_| kind.to_string(), |kind| kind.as_str_name().to_lowercase())
}

fn attribute(attribute: &AttributeProto) -> String {
    let value = match AttributeType::try_from(attribute.r#type) {
        Ok(AttributeType::Int) => attribute.i.to_string(),
        Ok(AttributeType::Ints) => format!("{:?}", attribute.ints),
        Ok(AttributeType::Float) => format!("{:?}", attribute.f),
        Ok(AttributeType::String) => format!("\"{}\"", String::from_utf8_lossy(&attribute.s)),
        _ => format!("({})", attribute.r#type),
    };
    format!("{} = {value}", attribute.name)
}
