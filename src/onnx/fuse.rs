//! Chains of operators → those that ONNX Runtime runs best.

use super::graph::{Graph, Node, ValueId};

/// Rewrites `Gelu(x (+ bias))`, by tanh, to `FastGelu`. Sums and their norms are left to the runtime: a provider whose
/// `SkipLayerNormalization` is fast makes it of them, and the CPU's takes twice as long as they.
pub(super) fn fuse(graph: &mut Graph) {
    let mut at = 0;
    while at < graph.nodes_mut().len() {
        let node = &mut graph.nodes_mut()[at];
        if node.op == "Gelu" && node.attributes.iter().any(|attribute| attribute.s == b"tanh") {
            node.op = "FastGelu";
            node.attributes.clear();
            let x = node.inputs[0];
            if let Some(add) = sum_for(graph, at, x)
                && let [product, bias] = graph.nodes_mut()[add].inputs[..]
                && graph.is_weight(bias, 1)
            {
                graph.nodes_mut()[at].inputs = vec![product, bias];
                graph.nodes_mut().remove(add);
                continue; // the next node stands here now
            }
        }
        at += 1;
    }
}

/// The sum that is made for the `reader`-th node alone.
fn sum_for(graph: &mut Graph, reader: usize, value: ValueId) -> Option<usize> {
    let nodes = graph.nodes_mut();
    let maker = nodes[..reader].iter().position(|node| node.outputs.contains(&value))?;
    let reads = |node: &Node| node.inputs.contains(&value);
    let others = nodes.iter().enumerate().any(|(i, node)| i != reader && reads(node));
    (nodes[maker].op == "Add" && !others).then_some(maker)
}

/// A value times a factor for each of its columns, given as (columns, factor). Where a linear map makes it, the weights
/// are multiplied instead: ONNX Runtime does that once, when it loads the graph.
pub(super) fn times(graph: &mut Graph, at: &str, value: ValueId, factors: &[(usize, f32)]) -> ValueId {
    let columns = factors.iter().map(|(count, _)| *count as i64).sum();
    let by_column = graph.f32s(&[columns], factors);
    let maker = graph.maker(value).map(|(node, _)| (node.op, node.inputs.clone(), node.attributes.clone()));
    let map = maker.filter(|(op, inputs, _)| match *op {
        "Add" => graph.is_weight(inputs[1], 1),
        "MatMul" => graph.is_weight(inputs[1], 2),
        op => op == "MatMulNBits",
    });
    let Some((op, mut inputs, attributes)) = map else {
        return graph.node(at, "Mul", &[value, by_column], Vec::new());
    };
    match op {
        "Add" => {
            inputs[0] = times(graph, at, inputs[0], factors);
            inputs[1] = graph.node(at, "Mul", &[inputs[1], by_column], Vec::new());
        }
        "MatMul" => inputs[1] = graph.node(at, "Mul", &[inputs[1], by_column], Vec::new()),
        _ => {
            let by_row = graph.f32s(&[columns, 1], factors);
            inputs[2] = graph.node(at, "Mul", &[inputs[2], by_row], Vec::new()); // the scales
            if let Some(&bias) = inputs.get(5) {
                inputs[5] = graph.node(at, "Mul", &[bias, by_column], Vec::new());
            }
        }
    }
    graph.node(at, op, &inputs, attributes)
}
