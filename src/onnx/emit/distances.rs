//! Attention whose scores depend on the distance between tokens, in graphs that see whole sequences.
//!
//! Which row of a table a distance has stands in the graph as a constant, so no logarithm is taken where it runs. It is
//! looked up once for a table that all layers share. Products with tables are made for each distance and moved into place
//! by cutting the rows anew (Dai et al. 2019, arXiv:1901.02860, appendix B), which copies memory where a gather would
//! look each number up.

use super::{Emit, MASKED, X, module};
use crate::Result;
use crate::model::ops::{Buckets, Pick, Table, speeds};
use crate::onnx::graph::{ValueId, int};
use crate::onnx::proto::tensor_proto::DataType;
use crate::task::Form;

impl Emit {
    /// Refuses what a graph can't say of distances.
    pub(super) fn check_distances(&self, queries: Option<Pick>) -> Result<()> {
        anyhow::ensure!(
            self.kind.form == Form::Whole,
            "attention that depends on the distance of tokens does not go on from a past yet"
        );
        anyhow::ensure!(queries != Some(Pick::Last), "distances are not counted from the last token yet");
        Ok(())
    }

    /// Whether the first token of every sequence alone asks.
    pub(super) fn first(queries: Option<Pick>) -> bool {
        queries == Some(Pick::First)
    }

    /// T, as a list of one number.
    pub(super) fn length(&self) -> ValueId {
        let (length, axis) = (self.tokens().length, self.list(&[0]));
        self.graph
            .borrow_mut()
            .shared("length_list", |g| g.node("position_ids", "Unsqueeze", &[length, axis], Vec::new()))
    }

    /// (B, 1, T, T), true for a key that is a token and near the query; (B, 1, 1, T) for the first query alone.
    pub(super) fn keep_near(&self, reach: usize, queries: Option<Pick>) -> ValueId {
        let (keep, range) = (self.keep(), self.tokens().range);
        let mut graph = self.graph.borrow_mut();
        let (first, at) = (Self::first(queries), "window_mask");
        let key = format!("keep_near/{reach}/{first}");
        let reach = graph.i64s(&[], &[i64::try_from(reach).unwrap_or(i64::MAX / 2)]);
        if first {
            return graph.shared(&key, |g| {
                let near = g.node(at, "LessOrEqual", &[range, reach], Vec::new());
                g.node(at, "And", &[keep, near], Vec::new())
            });
        }
        graph.shared(&key, |g| {
            let axis = g.i64s(&[1], &[1]);
            let queries = g.node(at, "Unsqueeze", &[range, axis], Vec::new()); // (T, 1)
            let (first, last) = (
                g.node(at, "Sub", &[queries, reach], Vec::new()),
                g.node(at, "Add", &[queries, reach], Vec::new()),
            );
            let (behind, before) = (
                g.node(at, "LessOrEqual", &[first, range], Vec::new()), // (T, T)
                g.node(at, "LessOrEqual", &[range, last], Vec::new()),
            );
            let near = g.node(at, "And", &[behind, before], Vec::new());
            g.node(at, "And", &[keep, near], Vec::new())
        })
    }

    /// The rows of distances from the largest negative key − query up, or of query − key, and one more that nothing needs:
    /// (2 · longest).
    fn rows(&self, buckets: Buckets, longest: usize, of_keys: bool) -> ValueId {
        let mut rows: Vec<i64> = buckets.by_distance(longest).into_iter().map(i64::from).collect();
        if of_keys {
            rows.reverse();
        }
        rows.push(rows[rows.len() - 1]);
        let name = format!("{buckets:?}/{longest}/{}", if of_keys { "key-query" } else { "query-key" });
        self.graph.borrow_mut().named_i64s(&name.replace(' ', ""), &rows)
    }

    /// A number a head of each distance, (H, T, T), or of each distance from the first token, (H, 1, T).
    fn bias(
        &self,
        table: &Table,
        buckets: Buckets,
        longest: usize,
        queries: Option<Pick>,
    ) -> Result<ValueId> {
        let at = module(&table.weight.name);
        let (weight, range) = (self.param(&table.weight)?, self.tokens().range);
        let rows = self.rows(buckets, longest, true);
        let first = Self::first(queries);
        let key = format!("bias/{}/{first}", table.weight.name);
        Ok(self.graph.borrow_mut().shared(&key, |g| {
            let by_distance = g.node(at, "Gather", &[weight, rows], vec![int("axis", 0)]); // (2L, H)
            let by_distance = g.node(at, "Transpose", &[by_distance], vec![super::ints("perm", &[1, 0])]);
            let none = g.i64s(&[], &[longest as i64 - 1]);
            let (front, behind) = (g.i64s(&[1], &[0]), g.i64s(&[1], &[1]));
            let keys = g.node(at, "Add", &[range, none], Vec::new());
            let keys = g.node(at, "Unsqueeze", &[keys, front], Vec::new()); // (1, T)
            let distances = if first {
                keys
            } else {
                let queries = g.node(at, "Unsqueeze", &[range, behind], Vec::new()); // (T, 1)
                g.node(at, "Sub", &[keys, queries], Vec::new()) // (T, T)
            };
            g.node(at, "Gather", &[by_distance, distances], vec![int("axis", 1)])
        }))
    }

    /// The same for the keys that are seen, and [`MASKED`] for all others: (B, H, T, T), or (B, H, 1, T). Layers that share a
    /// table share this.
    pub(super) fn masked_bias(
        &self,
        table: &Table,
        buckets: Buckets,
        longest: usize,
        queries: Option<Pick>,
        keep: ValueId,
    ) -> Result<ValueId> {
        let at = module(&table.weight.name);
        let (bias, masked) = (self.bias(table, buckets, longest, queries)?, self.f32(MASKED));
        let key = format!("masked_bias/{}/{}/{keep:?}", table.weight.name, Self::first(queries));
        let mut graph = self.graph.borrow_mut();
        Ok(graph.shared(&key, |g| g.node(at, "Where", &[keep, bias, masked], Vec::new())))
    }

    /// Cosines and sines of the angles that positions turn by, (T, D / 2) each.
    pub(super) fn cos_and_sin(&self, theta: f64, d: usize) -> Result<[ValueId; 2]> {
        anyhow::ensure!(
            d.is_multiple_of(2),
            "heads of {d} channels can't be turned, which are turned by two"
        );
        let angles = self.angles(theta, d);
        Ok(["Cos", "Sin"].map(|op| {
            let key = format!("{op}/{theta}/{d}");
            self.graph.borrow_mut().shared(&key, |g| g.node("rotary", op, &[angles], Vec::new()))
        }))
    }

    /// Queries or keys, (B, H, T, D), turned by their positions.
    pub(super) fn turned(&self, at: &str, x: ValueId, theta: f64, d: usize) -> Result<ValueId> {
        let [cos, sin] = self.cos_and_sin(theta, d)?;
        let half = (d / 2) as i64;
        let widths = self.list(&[half, half]);
        let how = vec![int("axis", -1)];
        let parts = self.graph.borrow_mut().node_of(at, "Split", &[x, widths], how, 2);
        let times = |x, by| self.plain(at, "Mul", &[x, by]);
        let first = self.plain(at, "Sub", &[times(parts[0], cos), times(parts[1], sin)]);
        let second = self.plain(at, "Add", &[times(parts[1], cos), times(parts[0], sin)]);
        Ok(self.node(at, "Concat", &[first, second], vec![int("axis", -1)]))
    }

    /// (T, D / 2)
    fn angles(&self, theta: f64, d: usize) -> ValueId {
        let range = self.tokens().range;
        self.graph.borrow_mut().shared(&format!("angles/{theta}/{d}"), |g| {
            let speeds: Vec<(usize, f32)> = speeds(theta, d).into_iter().map(|speed| (1, speed)).collect();
            let (speeds, axis) = (g.f32s(&[1, (d / 2) as i64], &speeds), g.i64s(&[1], &[1]));
            let places = g.node("rotary", "Cast", &[range], vec![int("to", DataType::Float as i64)]);
            let places = g.node("rotary", "Unsqueeze", &[places, axis], Vec::new()); // (T, 1)
            g.node("rotary", "Mul", &[places, speeds], Vec::new())
        })
    }

    /// The rows of a table, (R, C), for the distances of the batch: (2T, H, D), or (T, H, D) from the first token.
    fn of_distances(
        &self,
        at: &str,
        table: &X,
        rows: ValueId,
        longest: usize,
        heads: usize,
        first: bool,
    ) -> ValueId {
        let (length, longest) = (self.length(), longest as i64);
        let (from, to) = if first {
            let from = self.list(&[longest - 1]);
            (from, self.plain(at, "Add", &[from, length]))
        } else {
            let longest = self.list(&[longest]);
            (self.plain(at, "Sub", &[longest, length]), self.plain(at, "Add", &[longest, length]))
        };
        let axis = self.list(&[0]);
        let rows = self.plain(at, "Slice", &[rows, from, to, axis]);
        let table_rows = self.node(at, "Gather", &[table.value, rows], vec![int("axis", 0)]);
        let shape = self.list(&[0, heads as i64, (table.width / heads) as i64]);
        self.plain(at, "Reshape", &[table_rows, shape])
    }

    /// The products of queries, (B, H, T, D), with a table's rows: (B, H, T, T), or (B, H, 1, T) of the first token.
    pub(super) fn products_of_queries(
        &self,
        at: &str,
        q: ValueId,
        table: &X,
        (buckets, longest): (Buckets, usize),
        heads: usize,
        queries: Option<Pick>,
    ) -> ValueId {
        let first = Self::first(queries);
        let rows = self.rows(buckets, longest, true);
        let by_distance = self.of_distances(at, table, rows, longest, heads, first);
        let by_distance = self.transpose(at, by_distance, &[1, 2, 0]); // (H, D, 2T), or (H, D, T)
        let products = self.plain(at, "MatMul", &[q, by_distance]);
        if first { products } else { self.in_place_of_distances(at, products) }
    }

    /// The products of keys, (B, H, T, D), with a table's rows: (B, H, T, T), or (B, H, 1, T) for the first token.
    pub(super) fn products_of_keys(
        &self,
        at: &str,
        k: ValueId,
        table: &X,
        (buckets, longest): (Buckets, usize),
        heads: usize,
        queries: Option<Pick>,
    ) -> ValueId {
        let first = Self::first(queries);
        let rows = self.rows(buckets, longest, first);
        let by_distance = self.of_distances(at, table, rows, longest, heads, first);
        let products = if first {
            let by_distance = self.transpose(at, by_distance, &[1, 0, 2]); // (H, T, D)
            let products = self.plain(at, "Mul", &[k, by_distance]);
            let last = self.list(&[3]); // candle-onnx 0.11.1 counts no axis from the end here
            self.node(at, "ReduceSum", &[products, last], vec![int("keepdims", 1)]) // (B, H, T, 1)
        } else {
            let by_distance = self.transpose(at, by_distance, &[1, 2, 0]); // (H, D, 2T)
            let products = self.plain(at, "MatMul", &[k, by_distance]);
            self.in_place_of_distances(at, products) // (B, H, T of keys, T of queries)
        };
        self.transpose(at, products, &[0, 1, 3, 2])
    }

    /// (B, H, T, 2T), where column T − 1 is that of no distance, → (B, H, T, T): row i begins at its column T − 1 − i. In
    /// rows of 2T − 1 numbers, each begins where it ought to.
    fn in_place_of_distances(&self, at: &str, x: ValueId) -> ValueId {
        let length = self.length();
        let one = self.list(&[1]);
        let (from, to) = {
            let mut graph = self.graph.borrow_mut();
            let two = graph.i64s(&[1], &[2]);
            let from =
                graph.shared("distances_from", |g| g.node("distances", "Sub", &[length, one], Vec::new()));
            let to = graph.shared("distances_to", |g| {
                let square = g.node("distances", "Mul", &[length, length], Vec::new());
                let twice = g.node("distances", "Mul", &[square, two], Vec::new());
                g.node("distances", "Sub", &[twice, one], Vec::new())
            });
            (from, to)
        };
        let flat = self.list(&[0, 0, -1]);
        let x = self.plain(at, "Reshape", &[x, flat]); // (B, H, T · 2T)
        let axis = self.list(&[2]);
        let x = self.plain(at, "Slice", &[x, from, to, axis]); // (B, H, T · (2T − 1))
        let (kept, rest) = (self.list(&[0, 0]), self.list(&[-1]));
        let rows = self.graph.borrow_mut().shared("distances_shape", |g| {
            g.node("distances", "Concat", &[kept, length, rest], vec![int("axis", 0)])
        });
        let x = self.plain(at, "Reshape", &[x, rows]); // (B, H, T, 2T − 1)
        let (zero, axis) = (self.list(&[0]), self.list(&[3]));
        self.plain(at, "Slice", &[x, zero, length, axis])
    }
}
