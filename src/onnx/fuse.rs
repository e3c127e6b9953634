//! Chains of operators → ONNX Runtime's fused ones.

use super::graph::{ABSENT, Graph, Node, Value};

/// Rewrites `LayerNormalization(a + b (+ bias))` to `SkipLayerNormalization`, which gives the sum too, and
/// `Gelu(x (+ bias))`, by tanh, to `FastGelu`.
pub(super) fn fuse(graph: &mut Graph) {
    let mut i = 0;
    while i < graph.nodes_mut().len() {
        match graph.nodes_mut()[i].op {
            "LayerNormalization" => i -= skip_layer_norm(graph, i),
            "Gelu" => i -= fast_gelu(graph, i),
            _ => {}
        }
        i += 1;
    }
}

/// How many nodes in front of the `at`-th it took in.
fn skip_layer_norm(graph: &mut Graph, at: usize) -> usize {
    let [x, scale, shift] = graph.nodes_mut()[at].inputs[..] else { return 0 };
    let Some(sum) = made_for(graph, at, x, "Add", true) else { return 0 };
    let [a, b] = graph.nodes_mut()[sum].inputs[..] else { return 0 };
    let mut taken = vec![sum];
    // one of the two may be a product and its bias
    let mut inputs = vec![a, b, scale, shift];
    for (branch, other) in [(a, b), (b, a)] {
        let Some(add) = made_for(graph, sum, branch, "Add", false) else { continue };
        let [product, bias] = graph.nodes_mut()[add].inputs[..] else { continue };
        if graph.is_vector(bias) {
            inputs = vec![product, other, scale, shift, bias];
            taken.push(add);
            break;
        }
    }
    let node = &mut graph.nodes_mut()[at];
    node.op = "SkipLayerNormalization";
    node.inputs = inputs;
    node.outputs.extend([ABSENT, ABSENT, x]);
    node.attributes.retain(|attribute| attribute.name != "axis"); // it is always the last
    remove(graph, taken)
}

fn fast_gelu(graph: &mut Graph, at: usize) -> usize {
    let node = &graph.nodes_mut()[at];
    if !node.attributes.iter().any(|attribute| attribute.s == b"tanh") {
        return 0;
    }
    let x = node.inputs[0];
    let mut taken = Vec::new();
    let mut inputs = vec![x];
    if let Some(add) = made_for(graph, at, x, "Add", false)
        && let [product, bias] = graph.nodes_mut()[add].inputs[..]
        && graph.is_vector(bias)
    {
        inputs = vec![product, bias];
        taken.push(add);
    }
    let node = &mut graph.nodes_mut()[at];
    node.op = "FastGelu";
    node.inputs = inputs;
    node.attributes.clear();
    remove(graph, taken)
}

/// The node of this kind in front of the `reader`-th that makes a value, where no other reads it: before the reader
/// if `later` ones may, else at all.
fn made_for(graph: &mut Graph, reader: usize, value: Value, op: &str, later: bool) -> Option<usize> {
    let nodes = graph.nodes_mut();
    let maker = nodes[..reader].iter().position(|node| node.outputs.contains(&value))?;
    let reads = |node: &Node| node.inputs.contains(&value);
    let end = if later { reader } else { nodes.len() };
    let others = nodes[..end].iter().enumerate().any(|(i, node)| i != reader && reads(node));
    (nodes[maker].op == op && !others).then_some(maker)
}

fn remove(graph: &mut Graph, mut taken: Vec<usize>) -> usize {
    taken.sort_unstable_by(|a, b| b.cmp(a));
    taken.iter().for_each(|&i| drop(graph.nodes_mut().remove(i)));
    taken.len()
}
