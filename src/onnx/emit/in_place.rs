//! What graphs that generate have of their own: attention over a cache that is written in place, and matrices in blocks.

use anyhow::Context;

use super::{Emit, X};
use crate::Result;
use crate::model::ops::{Attend, Layout, Linear, Pick, Sees, Table};
use crate::onnx::blocks::{Blocks, LEAST_BLOCK};
use crate::onnx::fuse;
use crate::onnx::graph::{ABSENT, Graph, Outlet, ValueId, float, int};
use crate::onnx::proto::tensor_proto::DataType;
use crate::task::Dim;

impl Emit {
    /// The columns of x, (B, T, C), whose scores are asked for, (B, L, C).
    pub(super) fn asked(&self, scope: &str, x: ValueId) -> ValueId {
        let at = self.graph.borrow_mut().input_of("logits_at", DataType::Int64, &[Dim::Asked]);
        self.node(scope, "Gather", &[x, at], vec![int("axis", 1)])
    }

    /// Attention that writes keys and values into their buffers, and reads them there. Where not all tokens ask, all
    /// the same go through it, and what was asked for is taken from the result.
    pub(super) fn attention_in_place(&self, at: &str, [q, k, v]: [&X; 3], how: Attend) -> Result<ValueId> {
        anyhow::ensure!(
            how.sees == Sees::Causal && how.queries != Some(Pick::First),
            "only tokens that see none behind them can go on from a past"
        );
        let mut graph = self.graph.borrow_mut();
        let all_ask = match how.queries {
            None => q.value,
            Some(_) => graph.maker(q.value).context("what asks is picked")?.0.inputs[0],
        };
        let (layer, d) = (self.presents.borrow().len() / 2, k.width / how.heads);
        // the operator's own scale would keep ONNX Runtime from its product for one row, which knows no factor
        let scale = 1.0 / (d as f32).sqrt();
        let given = match packed(&graph, [all_ask, k.value, v.value]) {
            Some(whole) => {
                let factors = [(q.width, scale), (k.width + v.width, 1.0)];
                [fuse::times(&mut graph, at, whole, &factors), ABSENT, ABSENT]
            }
            None => [fuse::times(&mut graph, at, all_ask, &[(q.width, scale)]), k.value, v.value],
        };
        let dims = [Dim::Batch, Dim::Of(how.heads), Dim::Capacity, Dim::Of(d)];
        let mut past = |what| {
            let name = format!("past_key_values.{layer}.{what}");
            graph.input_of(&name, DataType::Float, &dims)
        };
        let (keys, values) = (past("key"), past("value"));
        let lengths = graph.input_of("seqlens_k", DataType::Int32, &[Dim::Batch]);
        let longest = graph.input_of("total_sequence_length", DataType::Int32, &[Dim::Of(1)]);
        let inputs = [&given[..], &[keys, values, lengths, longest]].concat();
        let heads = how.heads as i64;
        let attributes = vec![int("kv_num_heads", heads), int("num_heads", heads), float("scale", 1.0)];
        let results = graph.node_of(at, "GroupQueryAttention", &inputs, attributes, 3);
        for (what, &value) in ["key", "value"].into_iter().zip(&results[1..]) {
            let name = format!("present.{layer}.{what}");
            let value = graph.rename(value, &name)?;
            let outlet = Outlet { name, kind: DataType::Float, dims: dims.to_vec(), value };
            self.presents.borrow_mut().push(outlet);
        }
        drop(graph);
        Ok(match how.queries {
            None => results[0],
            Some(_) => self.asked(at, results[0]),
        })
    }

    /// How a matrix is cut: into blocks of the size that was asked for, or the largest smaller one (32 at least)
    /// that fills a row.
    fn cut(&self, rows: usize, columns: usize, bits: u32, layout: Layout) -> Blocks {
        let mut size = self.kind.block;
        while !columns.is_multiple_of(size) && size > LEAST_BLOCK {
            size /= 2;
        }
        Blocks { rows, columns, bits, size, layout }
    }

    /// x · W + b with W in blocks.
    pub(super) fn product_with_blocks(&self, scope: &str, map: &Linear, bits: u32, x: &X) -> Result<ValueId> {
        let blocks = self.cut(map.output(), x.width, bits, map.layout);
        let (numbers, scales) = self.graph.borrow_mut().in_blocks(&map.weight, blocks)?;
        let mut inputs = vec![x.value, numbers, scales];
        if let Some(bias) = &map.bias {
            inputs.extend([ABSENT, ABSENT, self.param(bias)?]); // without zero points and order of groups
        }
        let attributes = vec![
            int("K", blocks.columns as i64),
            int("N", blocks.rows as i64),
            int("accuracy_level", 4), // activations in 8 bits, blockwise
            int("bits", i64::from(bits)),
            int("block_size", blocks.size as i64),
        ];
        Ok(self.node(scope, "MatMulNBits", &inputs, attributes))
    }

    /// Rows of a table in blocks, which may be a head's matrix too.
    pub(super) fn rows_of_blocks(
        &self,
        scope: &str,
        table: &Table,
        bits: u32,
        ids: ValueId,
    ) -> Result<ValueId> {
        let [rows, columns] = table.weight.shape[..] else { anyhow::bail!("a table has two dimensions") };
        let blocks = self.cut(rows, columns, bits, Layout::OutIn);
        anyhow::ensure!(
            columns.is_multiple_of(blocks.size),
            "{}: a width of {columns} is not a multiple of {}, so its rows can't be stored in blocks: leave \
             --precision out",
            table.weight.name,
            blocks.size
        );
        let (numbers, scales) = self.graph.borrow_mut().in_blocks(&table.weight, blocks)?;
        let shape = self.list(&[rows as i64, -1]);
        let numbers = self.plain(scope, "Reshape", &[numbers, shape]); // folded when the graph is loaded
        let attributes = vec![
            int("bits", i64::from(bits)),
            int("block_size", blocks.size as i64),
            int("gather_axis", 0),
            int("quantize_axis", 1),
        ];
        Ok(self.node(scope, "GatherBlockQuantized", &[numbers, ids, scales], attributes))
    }
}

/// The value whose three parts are q, k and v.
fn packed(graph: &Graph, parts: [ValueId; 3]) -> Option<ValueId> {
    let mut whole = None;
    for (part, value) in parts.into_iter().enumerate() {
        let (node, output) = graph.maker(value)?;
        if node.op != "Split" || output != part || whole.is_some_and(|whole| whole != node.inputs[0]) {
            return None;
        }
        whole = Some(node.inputs[0]);
    }
    whole
}
