//! Attention as ONNX Runtime's own operator, `MultiHeadAttention`, of which its CUDA provider has kernels that keep no scores.

use super::{Emit, MASKED, X};
use crate::Result;
use crate::model::ops::{Attend, Distances, Pick, Sees};
use crate::onnx::graph::{ABSENT, ValueId, int};
use crate::onnx::proto::tensor_proto::DataType;
use crate::task::Form;

impl Emit {
    /// Whether this attention is written so: of whole sequences, without products with tables of distances.
    pub(super) fn is_fused(&self, distances: &Distances<X>) -> bool {
        self.kind.fused && self.kind.form == Form::Whole && !matches!(distances, Distances::Products { .. })
    }

    /// See [`Ops::attention_by_distance`](crate::model::ops::Ops::attention_by_distance).
    pub(super) fn attention_fused(
        &self,
        at: &str,
        [q, k, v]: [&X; 3],
        how: Attend,
        distances: &Distances<X>,
    ) -> Result<X> {
        let [queries, keys] = self.queries_and_keys([q, k], how, distances)?;
        let mut inputs = vec![queries, keys, v.value, ABSENT]; // without a bias of the projections
        let mut attributes = vec![int("num_heads", how.heads as i64)];
        let alone = matches!(how.queries, Some(Pick::First | Pick::Last));
        match (distances, how.sees) {
            (Distances::Bias { table, buckets, longest }, _) => {
                let keep = self.keep_of(how)?;
                let bias = self.masked_bias(table, *buckets, *longest, how.queries, keep)?;
                inputs.extend([ABSENT, bias]);
            }
            (_, Sees::Near { .. }) => {
                let keep = self.keep_of(how)?;
                inputs.extend([ABSENT, self.added(keep)]);
            }
            (_, Sees::Causal) if !alone => {
                inputs.push(self.tokens_kept());
                attributes.push(int("unidirectional", 1));
            }
            (_, Sees::All | Sees::Causal) => inputs.push(self.tokens_kept()),
        }
        let value = self.node(at, "MultiHeadAttention", &inputs, attributes);
        Ok(self.attended(at, value, q, v))
    }

    /// (B, T), 1 for a token, as int32.
    fn tokens_kept(&self) -> ValueId {
        self.graph.borrow_mut().shared("tokens_kept", |g| {
            let mask = g.input("attention_mask");
            g.node("attention_mask", "Cast", &[mask], vec![int("to", DataType::Int32 as i64)])
        })
    }

    /// What is added to scores: 0 for a key that is seen, [`MASKED`] for others.
    fn added(&self, keep: ValueId) -> ValueId {
        let (seen, masked) = (self.f32(0.0), self.f32(MASKED));
        self.graph.borrow_mut().shared(&format!("added/{keep:?}"), |g| {
            g.node("attention_mask", "Where", &[keep, seen, masked], Vec::new())
        })
    }
}
