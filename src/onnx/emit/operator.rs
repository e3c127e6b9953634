//! Attention as one operator, which ONNX has from opset 23. It takes no products with tables of distances; and ONNX Runtime's
//! kernel refuses to go on from a past with no token at all, which decoders do.

use super::{Emit, X};
use crate::Result;
use crate::model::ops::{Attend, Distances, Pick, Sees};
use crate::onnx::graph::{ValueId, int};
use crate::task::Form;

/// The first opset with `Attention` and `RotaryEmbedding`.
const SINCE: i64 = 23;

impl Emit {
    /// Whether the graph's opset has an operator for this attention.
    pub(super) fn has_operator(&self, distances: &Distances<X>) -> bool {
        let whole = self.kind.form == Form::Whole;
        whole && self.kind.opset >= SINCE && !matches!(distances, Distances::Products { .. })
    }

    /// See [`Ops::attention_by_distance`](crate::model::ops::Ops::attention_by_distance).
    pub(super) fn attention_operator(
        &self,
        at: &str,
        [q, k, v]: [&X; 3],
        how: Attend,
        distances: &Distances<X>,
    ) -> Result<X> {
        let heads = how.heads as i64;
        let [queries, keys] = self.queries_and_keys([q, k], how, distances)?;
        let mask = self.mask(how, distances)?;
        let attributes = vec![int("q_num_heads", heads), int("kv_num_heads", heads)];
        let value = self.node(at, "Attention", &[queries, keys, v.value, mask], attributes);
        Ok(self.attended(at, value, q, v))
    }

    /// Queries and keys, (B, T, H·D), or (B, 1, H·D) of one token a sequence, as an operator for attention takes them:
    /// turned by their positions where these count so.
    pub(super) fn queries_and_keys(
        &self,
        [q, k]: [&X; 2],
        how: Attend,
        distances: &Distances<X>,
    ) -> Result<[ValueId; 2]> {
        let (mut queries, mut keys) = (q.value, k.value);
        if !q.every {
            queries = self.plain(&q.scope, "Unsqueeze", &[queries, self.list(&[1])]); // (B, C) → (B, 1, C)
        }
        if let Distances::Rotary { theta } = *distances {
            let (d, heads) = (q.width / how.heads, how.heads as i64);
            if !Self::first(how.queries) {
                queries = self.rotated(&q.scope, queries, theta, d, heads)?; // the first token's position is 0
            }
            keys = self.rotated(&k.scope, keys, theta, d, heads)?;
        }
        Ok([queries, keys])
    }

    /// What such an operator gives for these queries and values.
    pub(super) fn attended(&self, at: &str, mut value: ValueId, q: &X, v: &X) -> X {
        if !q.every {
            value = self.plain(at, "Reshape", &[value, self.list(&[0, v.width as i64])]); // (B, 1, C) → (B, C)
        }
        X { value, scope: at.to_owned(), width: v.width, every: q.every }
    }

    /// What the operator takes as a mask: (B, 1, queries, keys), true where a query sees a key, or
    /// (B, H, queries, keys), what is added to the scaled scores. It is not broadcast over queries.
    fn mask(&self, how: Attend, distances: &Distances<X>) -> Result<ValueId> {
        let keep = self.keep_of(how)?;
        if let Distances::Bias { table, buckets, longest } = distances {
            return self.masked_bias(table, *buckets, *longest, how.queries, keep);
        }
        if matches!(how.queries, Some(Pick::First | Pick::Last)) || how.sees != Sees::All {
            return Ok(keep);
        }
        let length = self.length();
        Ok(self.graph.borrow_mut().shared("keep_square", |g| {
            let one = g.i64s(&[1], &[1]);
            let shape = g.node("attention_mask", "Concat", &[one, one, length, one], vec![int("axis", 0)]);
            g.node("attention_mask", "Expand", &[keep, shape], Vec::new())
        }))
    }

    /// Queries or keys, (B, T, H·D), turned by their positions.
    fn rotated(&self, at: &str, x: ValueId, theta: f64, d: usize, heads: i64) -> Result<ValueId> {
        let [cos, sin] = self.cos_and_sin(theta, d)?;
        let how = vec![int("num_heads", heads)];
        Ok(self.node(at, "RotaryEmbedding", &[x, cos, sin, self.positions()], how))
    }
}
