//! The interpreter that writes ONNX: a definition → nodes and initializers.
//!
//! Weights keep their Hugging Face names. A matrix that is multiplied with stands as MatMul takes it, (in, out), which
//! the tools that look for constant weights expect: one that a checkpoint holds as (out, in) is written transposed,
//! under its name with `.T` behind it. A table that is a head's matrix too is stored once, as it is, with a Transpose in
//! front of the product; all else is byte for byte that of `model.safetensors`. Shapes are written with 0 (copied from
//! the input) where a batch or a length stands, so nothing is baked in.

mod distances;
mod fused;
mod in_place;
mod int8;
mod operator;
mod pooling;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

use super::graph::{Graph, OWN_DOMAIN, Outlet, ValueId, float, int, ints, string};
use super::proto::tensor_proto::DataType;
use super::proto::{ModelProto, OperatorSetIdProto};
use super::{GraphKind, Precision, check, checked_opset, fuse};
use crate::model::ops::{
    Activation, Attend, Distances, Ids, Layout, Linear, Norm, Ops, Param, Pick, Pooling, Role, Sees, Table,
};
use crate::task::{Dim, Form, Output};
use crate::{Result, bail_unusable};

/// What a masked score becomes: the lowest f32. Finite, so a row without any key stays finite too.
const MASKED: f32 = f32::MIN;

/// Behind the name of a weight, the output with the least number that it is multiplied with: see [`GraphKind::observed`].
pub const LEAST: &str = "/least";
/// The same of the largest.
pub const MOST: &str = "/most";

/// Writes the nodes that the verbs stand for.
pub struct Emit {
    graph: RefCell<Graph>,
    kind: GraphKind,
    /// The keys and values that go out, two for each attention met so far.
    presents: RefCell<Vec<Outlet>>,
    /// The activations whose ranges are asked for, by the weight that they are multiplied with.
    observed: RefCell<BTreeMap<String, Vec<ValueId>>>,
}

/// A value of the graph.
#[derive(Clone, Debug)]
pub struct X {
    value: ValueId,
    /// The module it came from: what follows without weights of its own is named after it.
    scope: String,
    /// C, the last axis.
    width: usize,
    /// Whether it holds every token, (B, T, C), or one a sequence, (B, C).
    every: bool,
}

/// A definition as a checked model: (batch_size, sequence_length) inputs, the given outputs, one weight for
/// each parameter, and what the form adds to them. The same definition and weights give the same bytes.
///
/// # Errors
/// An opset that tk does not write; a weight that is missing, of another size, or not finite.
pub fn graph<'w>(
    define: impl FnOnce(&Emit) -> Result<Vec<X>>,
    outputs: &[Output],
    kind: GraphKind,
    weights: impl Fn(&Param) -> Result<Cow<'w, [f32]>>,
) -> Result<ModelProto> {
    let opset = checked_opset(kind.opset)?;
    let (form, fused) = (kind.form, kind.fused);
    let emit =
        Emit { graph: RefCell::default(), kind, presents: RefCell::default(), observed: RefCell::default() };
    let results = define(&emit)?;
    anyhow::ensure!(
        results.len() == outputs.len(),
        "the definition gives {} results, its contract has {} outputs",
        results.len(),
        outputs.len()
    );
    let outlet = |(output, x): (&Output, &X)| {
        let value = match output.dims[..] {
            // a number a token, not a row of one
            [Dim::Batch, Dim::Sequence] => {
                let axis = emit.list(&[-1]);
                emit.plain(&x.scope, "Squeeze", &[x.value, axis])
            }
            _ => x.value,
        };
        Outlet { name: output.name.to_owned(), kind: DataType::Float, dims: output.dims.clone(), value }
    };
    let mut results: Vec<Outlet> = outputs.iter().zip(&results).map(outlet).collect();
    results.extend(emit.presents.take());
    results.extend(emit.ranges());
    let mut graph = emit.graph.into_inner();
    let mut operators = vec![OperatorSetIdProto { domain: String::new(), version: opset }];
    if form == Form::InPlace {
        fuse::fuse(&mut graph);
    }
    if form == Form::InPlace || fused {
        operators.push(OperatorSetIdProto { domain: OWN_DOMAIN.to_owned(), version: 1 });
    }
    let model = ModelProto {
        ir_version: ir_version(opset),
        opset_import: operators,
        producer_name: "tk".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(graph.finish(&results, weights)?),
        ..Default::default()
    };
    check::check(&model)?;
    Ok(model)
}

/// The file format's version that came with an opset, never below 8.
pub(super) fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=18 => 8,
        19 | 20 => 9,
        21 | 22 => 10,
        23 => 11,
        _ => 12,
    }
}

/// The shape of the batch, (B, T), its length, T, and 0, 1, 2 … for one sequence, (T).
struct TokenInputs {
    shape: ValueId,
    length: ValueId,
    range: ValueId,
}

impl Emit {
    fn node(
        &self,
        scope: &str,
        op: &'static str,
        inputs: &[ValueId],
        attributes: Vec<super::proto::AttributeProto>,
    ) -> ValueId {
        self.graph.borrow_mut().node(scope, op, inputs, attributes)
    }

    /// A node without attributes.
    fn plain(&self, scope: &str, op: &'static str, inputs: &[ValueId]) -> ValueId {
        self.node(scope, op, inputs, Vec::new())
    }

    fn f32(&self, value: f32) -> ValueId {
        self.graph.borrow_mut().f32(value)
    }

    fn list(&self, values: &[i64]) -> ValueId {
        self.graph.borrow_mut().i64s(&[values.len() as i64], values)
    }

    fn param(&self, param: &Param) -> Result<ValueId> {
        self.graph.borrow_mut().param(param)
    }

    fn transpose(&self, scope: &str, x: ValueId, perm: &[i64]) -> ValueId {
        self.node(scope, "Transpose", &[x], vec![ints("perm", perm)])
    }

    /// (B, T, H·D) → (B, T, H, D) → the given order; T is 1 where x holds one token a sequence.
    fn split_heads(&self, x: &X, heads: usize, perm: &[i64]) -> ValueId {
        let tokens = if x.every { 0 } else { 1 };
        let shape = self.list(&[0, tokens, heads as i64, (x.width / heads) as i64]);
        let split = self.plain(&x.scope, "Reshape", &[x.value, shape]);
        self.transpose(&x.scope, split, perm)
    }

    /// (B, 1, 1, T), true for a token.
    fn keep(&self) -> ValueId {
        let seen = self.seen();
        self.graph.borrow_mut().shared("keep", |g| {
            let mask = g.input_of("attention_mask", DataType::Int64, &[Dim::Batch, seen]);
            let mask = g.node("attention_mask", "Cast", &[mask], vec![int("to", DataType::Bool as i64)]);
            // one axis at a time: candle-onnx 0.11.1 puts several in the wrong order
            let axis = g.i64s(&[1], &[1]);
            let mask = g.node("attention_mask", "Unsqueeze", &[mask, axis], Vec::new());
            g.node("attention_mask", "Unsqueeze", &[mask, axis], Vec::new())
        })
    }

    /// The keys that a query may see: as many as there are tokens, or those of the past before them.
    fn seen(&self) -> Dim {
        match self.kind.form {
            Form::Whole | Form::InPlace => Dim::Sequence,
            Form::Cached => Dim::Total,
        }
    }

    /// (B, 1, T, T), true for a key that is a token and not behind the query; (B, 1, T, P + T) behind a past.
    fn keep_causal(&self) -> ValueId {
        let (keep, TokenInputs { length, range, .. }) = (self.keep(), self.tokens());
        let form = self.kind.form;
        self.graph.borrow_mut().shared("keep_causal", |g| {
            let axis = g.i64s(&[1], &[1]);
            let (keys, queries) = match form {
                Form::Whole | Form::InPlace => (range, range),
                Form::Cached => {
                    let (zero, one) = (g.i64s(&[], &[0]), g.i64s(&[], &[1]));
                    let mask = g.input("attention_mask"); // declared by `keep`
                    let seen = g.node("causal_mask", "Shape", &[mask], Vec::new());
                    let total = g.node("causal_mask", "Gather", &[seen, one], vec![int("axis", 0)]);
                    let past = g.node("causal_mask", "Sub", &[total, length], Vec::new());
                    let keys = g.node("causal_mask", "Range", &[zero, total, one], Vec::new());
                    (keys, g.node("causal_mask", "Add", &[range, past], Vec::new()))
                }
            };
            let queries = g.node("causal_mask", "Unsqueeze", &[queries, axis], Vec::new()); // (T, 1)
            let causal = g.node("causal_mask", "LessOrEqual", &[keys, queries], Vec::new()); // (T, P + T)
            g.node("causal_mask", "And", &[keep, causal], Vec::new())
        })
    }

    /// Keys or values of the past and of x, (B, H, P + T, D), which also go out.
    fn appended(&self, layer: usize, what: &str, x: &X, heads: usize) -> Result<ValueId> {
        let now = self.split_heads(x, heads, &[0, 2, 1, 3]); // (B, H, T, D)
        let dims = |length| vec![Dim::Batch, Dim::Of(heads), length, Dim::Of(x.width / heads)];
        let past = format!("past_key_values.{layer}.{what}");
        let past = self.graph.borrow_mut().input_of(&past, DataType::Float, &dims(Dim::Past));
        let all = self.node(&x.scope, "Concat", &[past, now], vec![int("axis", 2)]);
        let name = format!("present.{layer}.{what}");
        let value = self.graph.borrow_mut().rename(all, &name)?;
        self.presents.borrow_mut().push(Outlet {
            name,
            kind: DataType::Float,
            dims: dims(Dim::Total),
            value,
        });
        Ok(value)
    }

    /// Which keys the queries see: (B, 1, 1, T), or (B, 1, T, T) where it differs from query to query.
    fn keep_of(&self, how: Attend) -> Result<ValueId> {
        Ok(match (how.sees, how.queries) {
            (Sees::All, _) | (Sees::Causal, Some(Pick::Last)) => self.keep(),
            (Sees::Causal, None | Some(Pick::Asked)) => self.keep_causal(),
            (Sees::Near { reach }, queries) => self.keep_near(reach, queries),
            (Sees::Causal, Some(Pick::First)) => {
                anyhow::bail!("a causal model's first token sees nothing but itself")
            }
        })
    }

    /// What is known of the tokens that a graph is given.
    fn tokens(&self) -> TokenInputs {
        let mut graph = self.graph.borrow_mut();
        let shape = graph.shared("shape", |g| {
            let ids = g.input("input_ids");
            g.node("position_ids", "Shape", &[ids], Vec::new())
        });
        let (zero, one) = (graph.i64s(&[], &[0]), graph.i64s(&[], &[1]));
        let length =
            graph.shared("length", |g| g.node("position_ids", "Gather", &[shape, one], vec![int("axis", 0)]));
        let range =
            graph.shared("range", |g| g.node("position_ids", "Range", &[zero, length, one], Vec::new()));
        TokenInputs { shape, length, range }
    }

    /// 0, 1, 2 … for every sequence: (B, T).
    fn positions(&self) -> ValueId {
        let TokenInputs { range, shape, .. } = self.tokens();
        let mut graph = self.graph.borrow_mut();
        graph.shared("positions", |g| g.node("position_ids", "Expand", &[range, shape], Vec::new()))
    }

    /// [`Ids::PositionsBehind`]: (B, T), of the tokens that are not `padding`.
    ///
    /// # Errors
    /// The graph goes on from a past, whose tokens it does not see.
    fn positions_behind(&self, padding: u32) -> Result<ValueId> {
        anyhow::ensure!(self.kind.form == Form::Whole, "positions are not counted in a past's tokens");
        Ok(self.graph.borrow_mut().shared("positions_behind", |g| {
            let (ids, at) = (g.input("input_ids"), "position_ids");
            let (padding, axis) = (g.i64s(&[], &[i64::from(padding)]), g.i64s(&[], &[1]));
            let pads = g.node(at, "Equal", &[ids, padding], Vec::new());
            let counts = g.node(at, "Not", &[pads], Vec::new());
            // candle-onnx 0.11.1 sums no integers up
            let counts = g.node(at, "Cast", &[counts], vec![int("to", DataType::Float as i64)]);
            let place = g.node(at, "CumSum", &[counts, axis], Vec::new());
            let place = g.node(at, "Mul", &[place, counts], Vec::new());
            let place = g.node(at, "Cast", &[place], vec![int("to", DataType::Int64 as i64)]);
            g.node(at, "Add", &[place, padding], Vec::new())
        }))
    }

    /// Where the last token of every sequence stands among all of the batch's, (B). Padding may stand on either side.
    fn last(&self) -> ValueId {
        let (TokenInputs { shape, length, range }, opset) = (self.tokens(), self.kind.opset);
        self.graph.borrow_mut().shared("last", |g| {
            let (zero, one) = (g.i64s(&[], &[0]), g.i64s(&[], &[1]));
            let mask = g.input("attention_mask");
            let places = g.node("last_token", "Mul", &[mask, range], Vec::new());
            let drop = int("keepdims", 0);
            let place = if opset >= 18 {
                let axis = g.i64s(&[1], &[1]);
                g.node("last_token", "ReduceMax", &[places, axis], vec![drop])
            } else {
                g.node("last_token", "ReduceMax", &[places], vec![ints("axes", &[1]), drop])
            };
            let rows = g.node("last_token", "Gather", &[shape, zero], vec![int("axis", 0)]);
            let rows = g.node("last_token", "Range", &[zero, rows, one], Vec::new());
            let starts = g.node("last_token", "Mul", &[rows, length], Vec::new());
            g.node("last_token", "Add", &[starts, place], Vec::new())
        })
    }

    /// `x · 0.5 · (1 + erf(x / √2))`, in the order of operations that runtimes know and fuse.
    fn gelu_from_erf(&self, at: &str, x: ValueId) -> ValueId {
        let scaled = self.plain(at, "Div", &[x, self.f32(std::f32::consts::SQRT_2)]);
        let erf = self.plain(at, "Erf", &[scaled]);
        let sum = self.plain(at, "Add", &[erf, self.f32(1.0)]);
        let product = self.plain(at, "Mul", &[x, sum]);
        self.plain(at, "Mul", &[product, self.f32(0.5)])
    }

    /// `0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`.
    fn gelu_from_tanh(&self, at: &str, x: ValueId) -> ValueId {
        let half = self.plain(at, "Mul", &[x, self.f32(0.5)]);
        let cube = self.plain(at, "Pow", &[x, self.f32(3.0)]);
        let small = self.plain(at, "Mul", &[cube, self.f32(0.044_715)]);
        let sum = self.plain(at, "Add", &[x, small]);
        let scaled = self.plain(at, "Mul", &[sum, self.f32((2.0 / std::f64::consts::PI).sqrt() as f32)]);
        let tanh = self.plain(at, "Tanh", &[scaled]);
        let one = self.plain(at, "Add", &[tanh, self.f32(1.0)]);
        self.plain(at, "Mul", &[half, one])
    }

    /// Layer norm where the opset has no operator for it.
    fn layer_norm_from_primitives(
        &self,
        at: &str,
        x: ValueId,
        scale: ValueId,
        shift: Option<ValueId>,
        eps: f32,
    ) -> ValueId {
        let mean = |x| self.node(at, "ReduceMean", &[x], vec![ints("axes", &[-1]), int("keepdims", 1)]);
        let centred = self.plain(at, "Sub", &[x, mean(x)]);
        let square = self.plain(at, "Pow", &[centred, self.f32(2.0)]);
        let shifted = self.plain(at, "Add", &[mean(square), self.f32(eps)]);
        let deviation = self.plain(at, "Sqrt", &[shifted]);
        let normal = self.plain(at, "Div", &[centred, deviation]);
        let scaled = self.plain(at, "Mul", &[normal, scale]);
        match shift {
            Some(shift) => self.plain(at, "Add", &[scaled, shift]),
            None => scaled,
        }
    }
}

impl Ops for Emit {
    type X = X;

    fn embed(&self, table: Table, ids: Ids) -> Result<X> {
        let scope = module(&table.weight.name).to_owned();
        let width = table.weight.shape[1];
        let bits = self.kind.precision.bits().filter(|_| ids == Ids::Tokens);
        let int8 = ids == Ids::Tokens && self.is_int8(&table.weight.name);
        let ids = match ids {
            Ids::Tokens => self.graph.borrow_mut().input("input_ids"),
            Ids::TokenTypes => self.graph.borrow_mut().input("token_type_ids"),
            Ids::Positions => match self.kind.form {
                Form::Whole => self.positions(),
                Form::Cached | Form::InPlace => self.graph.borrow_mut().input("position_ids"),
            },
            Ids::PositionsBehind { padding } => self.positions_behind(padding)?,
            Ids::Zero => self.graph.borrow_mut().i64s(&[], &[0]), // one row, (C), which is added to every token
        };
        let value = match bits {
            None if int8 => self.rows_in_int8(&scope, &table, ids)?,
            None => {
                let table = self.param(&table.weight)?;
                self.node(&scope, "Gather", &[table, ids], vec![int("axis", 0)])
            }
            Some(bits) => self.rows_of_blocks(&scope, &table, bits, ids)?,
        };
        Ok(X { value, scope, width, every: true })
    }

    fn whole(&self, table: Table) -> Result<X> {
        let scope = module(&table.weight.name).to_owned();
        let value = self.param(&table.weight)?;
        Ok(X { value, scope, width: table.weight.shape[1], every: true })
    }

    fn linear(&self, map: Linear, x: &X) -> Result<X> {
        let scope = module(&map.weight.name).to_owned();
        let width = map.output();
        if let Some(bits) = self.kind.precision.bits() {
            let value = self.product_with_blocks(&scope, &map, bits, x)?;
            return Ok(X { value, scope, width, every: x.every });
        }
        if self.multiplies_in_int8(&map) {
            let value = self.product_in_int8(&scope, &map, x)?;
            return Ok(X { value, scope, width, every: x.every });
        }
        if self.kind.observed && int8::is_worth_it(&map) {
            self.observed.borrow_mut().entry(map.weight.name.clone()).or_default().push(x.value);
        }
        let weight = match (map.layout, map.weight.role) {
            (Layout::InOut, _) => self.param(&map.weight)?,
            (Layout::OutIn, Role::Table) => {
                let table = self.param(&map.weight)?;
                self.transpose(&scope, table, &[1, 0])
            }
            (Layout::OutIn, _) => self.graph.borrow_mut().transposed(&map.weight)?,
        };
        let mut value = self.plain(&scope, "MatMul", &[x.value, weight]);
        if let Some(bias) = &map.bias {
            value = self.plain(&scope, "Add", &[value, self.param(bias)?]);
        }
        Ok(X { value, scope, width, every: x.every })
    }

    fn split(&self, x: &X, parts: usize) -> Result<Vec<X>> {
        anyhow::ensure!(x.width.is_multiple_of(parts), "{} channels are cut into {parts} parts", x.width);
        let width = x.width / parts;
        let widths = self.list(&vec![width as i64; parts]);
        let how = vec![int("axis", -1)];
        let values = self.graph.borrow_mut().node_of(&x.scope, "Split", &[x.value, widths], how, parts);
        Ok(values.into_iter().map(|value| X { value, width, ..x.clone() }).collect())
    }

    fn layer_norm(&self, norm: Norm, x: &X) -> Result<X> {
        let scope = module(&norm.weight.name).to_owned();
        let scale = self.param(&norm.weight)?;
        let shift = norm.bias.as_ref().map(|bias| self.param(bias)).transpose()?;
        let eps = norm.eps as f32;
        let value = if self.kind.opset >= 17 {
            let how = vec![int("axis", -1), float("epsilon", eps)];
            let inputs: Vec<ValueId> = [x.value, scale].into_iter().chain(shift).collect();
            self.node(&scope, "LayerNormalization", &inputs, how)
        } else {
            self.layer_norm_from_primitives(&scope, x.value, scale, shift, eps)
        };
        Ok(X { value, scope, ..*x })
    }

    fn attention_by_distance(&self, q: &X, k: &X, v: &X, how: Attend, distances: Distances<X>) -> Result<X> {
        let at = common(&q.scope, &k.scope).to_owned();
        if !matches!((&distances, how.sees), (Distances::Nothing, Sees::All | Sees::Causal)) {
            self.check_distances(how.queries)?;
        }
        if self.kind.form == Form::InPlace {
            let value = self.attention_in_place(&at, [q, k, v], how)?;
            return Ok(X { value, scope: at, width: v.width, every: true });
        }
        if self.is_fused(&distances) {
            return self.attention_fused(&at, [q, k, v], how, &distances);
        }
        if self.has_operator(&distances) {
            return self.attention_operator(&at, [q, k, v], how, &distances);
        }
        let d = q.width / how.heads;
        let mut q_heads = self.split_heads(q, how.heads, &[0, 2, 1, 3]); // (B, H, T, D)
        let (k_heads, v_heads) = match (self.kind.form, how.sees) {
            (Form::Whole, _) if let Distances::Rotary { theta } = distances => {
                if !Self::first(how.queries) {
                    q_heads = self.turned(&q.scope, q_heads, theta, d)?; // the first token's position is 0
                }
                let keys = self.split_heads(k, how.heads, &[0, 2, 1, 3]);
                let keys = self.turned(&k.scope, keys, theta, d)?;
                let values = self.split_heads(v, how.heads, &[0, 2, 1, 3]);
                (self.transpose(&k.scope, keys, &[0, 1, 3, 2]), values)
            }
            (Form::Whole | Form::InPlace, _) => (
                self.split_heads(k, how.heads, &[0, 2, 3, 1]), // (B, H, D, T)
                self.split_heads(v, how.heads, &[0, 2, 1, 3]), // (B, H, T, D)
            ),
            (Form::Cached, Sees::Causal) => {
                let layer = self.presents.borrow().len() / 2;
                let keys = self.appended(layer, "key", k, how.heads)?;
                let values = self.appended(layer, "value", v, how.heads)?;
                (self.transpose(&k.scope, keys, &[0, 1, 3, 2]), values)
            }
            (Form::Cached, Sees::All | Sees::Near { .. }) => {
                anyhow::bail!("tokens that see those behind them can't go on from a past")
            }
        };
        let scaled_first = self.kind.precision == Precision::Fp16;
        if scaled_first && matches!(distances, Distances::Products { .. }) {
            bail_unusable!(
                "--precision fp16: ONNX Runtime 1.31 ends with a fault of its memory where it loads this attention, with \
                 products of distances, in fp16 on a CPU: leave it out"
            );
        }
        // the products of q and k as they are might be too large
        let scale = |summands: usize| self.f32((1.0 / ((d * summands) as f64).sqrt()) as f32);
        if scaled_first {
            q_heads = self.plain(&at, "Mul", &[q_heads, scale(1)]);
        }
        let mut scores = self.plain(&at, "MatMul", &[q_heads, k_heads]); // (B, H, T, T)
        let mut summands = 1;
        if let Distances::Products { keys, queries, buckets, longest } = &distances {
            let of = (*buckets, *longest);
            let mut add = |terms| {
                scores = self.plain(&at, "Add", &[scores, terms]);
                summands += 1;
            };
            if let Some(table) = keys {
                add(self.products_of_queries(&q.scope, q_heads, table, of, how.heads, how.queries));
            }
            if let Some(table) = queries {
                let k_heads = self.split_heads(k, how.heads, &[0, 2, 1, 3]);
                add(self.products_of_keys(&k.scope, k_heads, table, of, how.heads, how.queries));
            }
        }
        if !scaled_first {
            scores = self.plain(&at, "Mul", &[scores, scale(summands)]);
        }
        let keep = self.keep_of(how)?;
        let scores = match &distances {
            Distances::Bias { table, buckets, longest } => {
                let bias = self.masked_bias(table, *buckets, *longest, how.queries, keep)?;
                self.plain(&at, "Add", &[scores, bias])
            }
            _ => self.plain(&at, "Where", &[keep, scores, self.f32(MASKED)]),
        };
        let weights = self.node(&at, "Softmax", &[scores], vec![int("axis", -1)]);
        let mixed = self.plain(&at, "MatMul", &[weights, v_heads]); // (B, H, T, D)
        let mixed = self.transpose(&at, mixed, &[0, 2, 1, 3]);
        let shape =
            if q.every { self.list(&[0, 0, v.width as i64]) } else { self.list(&[0, v.width as i64]) };
        let value = self.plain(&at, "Reshape", &[mixed, shape]); // (B, T, C), or (B, C)
        Ok(X { value, scope: at, width: v.width, every: q.every })
    }

    fn activate(&self, x: &X, how: Activation) -> Result<X> {
        let at = &x.scope;
        let value = match how {
            Activation::Gelu if self.kind.opset >= 20 => self.plain(at, "Gelu", &[x.value]),
            Activation::Gelu => self.gelu_from_erf(at, x.value),
            Activation::GeluTanh if self.kind.opset >= 20 => {
                self.node(at, "Gelu", &[x.value], vec![string("approximate", "tanh")])
            }
            Activation::GeluTanh => self.gelu_from_tanh(at, x.value),
            Activation::Relu => self.plain(at, "Relu", &[x.value]),
            Activation::Silu => {
                let sigmoid = self.plain(at, "Sigmoid", &[x.value]);
                self.plain(at, "Mul", &[x.value, sigmoid])
            }
            Activation::Tanh => self.plain(at, "Tanh", &[x.value]),
        };
        Ok(X { value, ..x.clone() })
    }

    fn gated(&self, x: &X, how: Activation) -> Result<X> {
        let parts = self.split(x, 2)?;
        let first = self.activate(&parts[0], how)?;
        let value = self.plain(&x.scope, "Mul", &[first.value, parts[1].value]);
        Ok(X { value, ..first })
    }

    fn add(&self, a: &X, b: &X) -> Result<X> {
        let (shared, parent) = (common(&a.scope, &b.scope), module(&a.scope));
        let scope = if shared.len() > parent.len() { shared } else { parent }.to_owned();
        let value = self.plain(&scope, "Add", &[a.value, b.value]);
        Ok(X { value, scope, ..*a })
    }

    fn dropout(&self, x: &X, _: f32) -> Result<X> {
        Ok(x.clone())
    }

    fn pick(&self, x: &X, which: Pick) -> Result<X> {
        let value = match which {
            Pick::First => {
                let zero = self.graph.borrow_mut().i64s(&[], &[0]);
                self.node(&x.scope, "Gather", &[x.value, zero], vec![int("axis", 1)])
            }
            Pick::Asked => return Ok(x.clone()),
            Pick::Last if self.kind.form == Form::InPlace => {
                let value = self.asked(&x.scope, x.value);
                return Ok(X { value, ..x.clone() });
            }
            Pick::Last if self.kind.form == Form::Cached => {
                anyhow::bail!("the last token of a sequence is not looked for behind a past")
            }
            Pick::Last => {
                let rows = self.list(&[-1, x.width as i64]);
                let rows = self.plain(&x.scope, "Reshape", &[x.value, rows]); // (B · T, C)
                self.node(&x.scope, "Gather", &[rows, self.last()], vec![int("axis", 0)])
            }
        };
        Ok(X { value, every: false, ..x.clone() })
    }

    fn pool(&self, x: &X, how: Pooling) -> Result<X> {
        let value = self.pooled(x, how)?;
        Ok(X { value, every: false, ..x.clone() })
    }

    fn scale(&self, x: &X, factor: f64) -> Result<X> {
        let factor = self.f32(factor as f32);
        let value = self.plain(&x.scope, "Mul", &[x.value, factor]);
        Ok(X { value, ..x.clone() })
    }

    fn normalize(&self, x: &X) -> Result<X> {
        let value = self.normalized(x);
        Ok(X { value, ..x.clone() })
    }

    fn tap(&self, name: &str, x: X) -> Result<X> {
        let value = self.graph.borrow_mut().rename(x.value, name)?;
        Ok(X { value, ..x })
    }
}

/// `a.b.weight` → `a.b`; a name without dots stays.
fn module(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The longest prefix of whole dotted parts that both share.
fn common<'a>(a: &'a str, b: &str) -> &'a str {
    let parts = a.split('.').zip(b.split('.')).take_while(|(a, b)| a == b);
    let length: usize = parts.map(|(part, _)| part.len() + 1).sum();
    &a[..length.saturating_sub(1)]
}
