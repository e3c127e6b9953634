//! The candle interpreter: a definition over a packed batch → tensors, for training and for evaluation.

mod evaluator;
pub mod kernels;
mod loss;
mod params;
pub mod tape;
#[cfg(test)]
mod tests;
mod x;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};

pub use evaluator::{Evaluator, Forward, Interrupted};
pub use kernels::{Kernels, Weight};
pub use params::{Init, Params, Trainable};
pub use x::X;

use crate::Result;
use crate::data::batch::{PackedBatch, Spans};
use crate::model::ops::{Activation, Attend, Distances, Ids, Linear, Norm, Ops, Param, Pick, Pooling, Table};
use kernels::attention::{Attention, ByDistance, Queries, Relative};
use kernels::dropout::{Mask, mix};
use kernels::gemm::Factors;
use kernels::linear::{LinearMap, PackedWeights};
use kernels::residual::{Branch, residual_norm};
use kernels::{activation, attention, dropout, embedding, layer_norm, linear, pooling, scale, split, wide};
use tape::{Tape, TapeValue};
use x::{Fused, Pending};

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout, no gradients.
    Evaluation,
    /// Gradients reach the parameters; dropout masks are a function of this key.
    Training { key: u64 },
}

/// Runs verbs as candle operations. One instance runs one forward pass.
pub struct Eager<'a> {
    params: &'a Params,
    ids: Arc<[u32]>,
    type_ids: Arc<[u32]>,
    batch: &'a PackedBatch,
    spans: Arc<Spans>,
    tape: Arc<Tape>,
    kernels: Kernels,
    /// The activations' type; what the fused operations round the factors of their products to.
    dtype: DType,
    mode: Mode,
    /// Dropout sites met so far: each has a mask of its own.
    sites: Cell<u64>,
    /// What the layers' composite attention shares.
    paddings: attention::Paddings,
    taps: Option<RefCell<Vec<(String, Tensor)>>>,
    packed: Option<Arc<PackedWeights>>,
}

impl<'a> Eager<'a> {
    /// An interpreter for one batch, with the fastest kernels that the device runs.
    pub fn new(params: &'a Params, batch: &'a PackedBatch, device: &Device, mode: Mode) -> Self {
        Self {
            params,
            ids: batch.ids.as_slice().into(),
            type_ids: batch.type_ids.as_slice().into(),
            batch,
            spans: Arc::new(batch.spans.clone()),
            tape: Arc::new(Tape::new(mode != Mode::Evaluation)),
            kernels: Kernels::of(device),
            dtype: DType::F32,
            mode,
            sites: Cell::new(0),
            paddings: attention::Paddings::default(),
            taps: None,
            packed: None,
        }
    }

    /// The same with the given kernels.
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// The same in f32 or bf16. The composite form keeps its activations in it; the fused operations round the factors of
    /// their products to it, and keep all else in f32.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The same, whose fused operations compute their inner values again in the backward pass. Only before a verb.
    pub fn with_recomputation(self) -> Self {
        match self.mode {
            Mode::Training { .. } => Self { tape: Arc::new(Tape::recomputing()), ..self },
            Mode::Evaluation => self,
        }
    }

    /// The same, which leaves the weights that it packs for the passes to come over weights that are still these.
    pub fn with_packed(self, weights: &Arc<PackedWeights>) -> Self {
        Self { packed: Some(weights.clone()), ..self }
    }

    /// The same, keeping what [`Ops::tap`] names.
    pub fn with_taps(self) -> Self {
        Self { taps: Some(RefCell::default()), ..self }
    }

    /// What was tapped, in the order of the definition.
    pub fn into_taps(self) -> Vec<(String, Tensor)> {
        self.taps.map(RefCell::into_inner).unwrap_or_default()
    }

    /// Of the fused operations' products.
    fn factors(&self) -> Factors {
        if self.dtype == DType::BF16 { Factors::Bf16 } else { Factors::F32 }
    }

    fn weight(&self, param: &Param) -> Result<Weight> {
        self.params.weight(&param.name, self.mode != Mode::Evaluation, self.kernels)
    }

    /// The next dropout site's mask, or none where nothing is dropped.
    fn mask(&self, p: f32) -> Option<Mask> {
        let site = self.sites.replace(self.sites.get() + 1);
        match self.mode {
            Mode::Training { key } if p > 0.0 => Some(Mask::new(mix(key ^ mix(site)), p)),
            _ => None,
        }
    }
}

impl Eager<'_> {
    fn fused(&self, state: Pending) -> X {
        X::Fused(Fused::new(&self.tape, state))
    }

    fn ready(&self, value: Arc<TapeValue>) -> X {
        self.fused(Pending::Branch(Branch::Ready(value)))
    }
}

impl Eager<'_> {
    /// What scores take from distances, for an operation.
    fn relative<T>(
        &self,
        distances: Distances<X>,
        table: impl Fn(&X) -> candle_core::Result<T>,
    ) -> Result<Relative<T>> {
        let longest = self.spans.iter().map(|span| span.len()).max().unwrap_or(0).max(1);
        Ok(match distances {
            Distances::Nothing => Relative::Nothing,
            Distances::Rotary { theta } => Relative::Rotary { theta },
            Distances::Bias { table, buckets, .. } => Relative::Bias {
                table: self.weight(&table.weight)?,
                rows: Arc::new(ByDistance::new(buckets, longest)),
            },
            Distances::Products { keys, queries, buckets, .. } => Relative::Products {
                keys: keys.as_ref().map(&table).transpose()?,
                queries: queries.as_ref().map(&table).transpose()?,
                rows: Arc::new(ByDistance::new(buckets, longest)),
            },
        })
    }
}

impl Ops for Eager<'_> {
    type X = X;

    fn embed(&self, table: Table, ids: Ids) -> Result<X> {
        let ids = match ids {
            Ids::Tokens => &self.ids,
            Ids::TokenTypes => &self.type_ids,
            Ids::Positions => &self.batch.positions().into(),
            Ids::PositionsBehind { padding } => &self.batch.positions_behind(padding).into(),
            Ids::Zero => &vec![0; self.ids.len()].into(),
        };
        let rows = self.weight(&table.weight)?;
        let x = match self.kernels {
            Kernels::Fused => embedding::embedding(&self.tape, &rows, ids).map(|x| self.ready(x)),
            Kernels::Composite => {
                embedding::composite(&rows.values, ids).and_then(|x| x.to_dtype(self.dtype)).map(X::Tensor)
            }
        };
        x.with_context(|| table.weight.name)
    }

    fn whole(&self, table: Table) -> Result<X> {
        let rows: Arc<[u32]> = (0..table.weight.shape[0] as u32).collect();
        let values = self.weight(&table.weight)?;
        let x = match self.kernels {
            Kernels::Fused => embedding::embedding(&self.tape, &values, &rows).map(|x| self.ready(x)),
            Kernels::Composite => values.values.to_dtype(self.dtype).map(X::Tensor),
        };
        x.with_context(|| table.weight.name)
    }

    fn linear(&self, map: Linear, x: &X) -> Result<X> {
        let weight = self.weight(&map.weight)?;
        let bias = map.bias.as_ref().map(|bias| self.weight(bias)).transpose()?;
        let x = match x {
            X::Tensor(x) => {
                let y = linear::composite(x, &weight, bias.as_ref(), map.layout);
                X::Tensor(y.with_context(|| map.weight.name)?)
            }
            X::Fused(x) => {
                let mut second = LinearMap::new(&weight, bias.as_ref(), map.layout, self.factors())?;
                if let Some(weights) = &self.packed {
                    second = second.packed_in(weights, &map.weight.name);
                }
                self.fused(Pending::Branch(match x.state() {
                    Pending::Activated { x, map: first, how, gated } => {
                        Branch::FeedForward { x, first, how, gated, second }
                    }
                    _ => Branch::Linear { x: x.value()?, map: second },
                }))
            }
        };
        Ok(x)
    }

    fn split(&self, x: &X, parts: usize) -> Result<Vec<X>> {
        (0..parts)
            .map(|index| {
                Ok(match x {
                    X::Tensor(x) => X::Tensor(split::composite(x, index, parts)?),
                    X::Fused(whole) => self.fused(Pending::Part { whole: whole.clone(), index, parts }),
                })
            })
            .collect()
    }

    fn layer_norm(&self, norm: Norm, x: &X) -> Result<X> {
        let weight = self.weight(&norm.weight)?;
        let bias = norm.bias.as_ref().map(|bias| self.weight(bias)).transpose()?;
        let normed = match x {
            X::Tensor(x) => layer_norm::composite(x, &weight, bias.as_ref(), norm.eps)
                .and_then(|x| x.to_dtype(self.dtype))
                .map(X::Tensor),
            X::Fused(x) => {
                let norm = layer_norm::NormWeights { weight, bias, eps: norm.eps as f32 };
                match x.state() {
                    Pending::Sum { branch, mask, x: stream } => {
                        let (sum, normed) = residual_norm(&self.tape, &branch, mask, &stream, &norm)?;
                        x.is_now(sum);
                        Ok(self.ready(normed))
                    }
                    _ => layer_norm::layer_norm(&self.tape, &x.value()?, &norm).map(|x| self.ready(x)),
                }
            }
        };
        normed.with_context(|| norm.weight.name)
    }

    fn attention_by_distance(&self, q: &X, k: &X, v: &X, how: Attend, distances: Distances<X>) -> Result<X> {
        let mask = self.mask(how.dropout);
        let Attend { heads, sees, queries, .. } = how;
        let queries = match queries {
            None => Queries::All,
            Some(Pick::First) => Queries::First,
            Some(Pick::Last) => Queries::Last,
            Some(Pick::Asked) => match &self.batch.asked {
                Some(asked) => Queries::Asked(Arc::new(asked.spans.clone())),
                None => Queries::All,
            },
        };
        let factors = self.factors();
        let how = Attention { spans: self.spans.clone(), heads, sees, queries, mask, factors };
        let (q, k, v) = match (q, k, v) {
            (X::Fused(q), X::Fused(k), X::Fused(v)) => (q, k, v),
            _ => {
                let relative = self.relative(distances, X::tensor)?;
                let [q, k, v] = [q.tensor()?, k.tensor()?, v.tensor()?];
                return Ok(X::Tensor(attention::composite_in(&self.paddings, &q, &k, &v, &how, &relative)?));
            }
        };
        let relative = self.relative(distances, |x| match x {
            X::Fused(x) => x.value(),
            X::Tensor(_) => Err(candle_core::Error::Msg("a table of distances of another form".to_owned())),
        })?;
        let y = match [q.state(), k.state(), v.state()] {
            [
                Pending::Branch(Branch::Linear { x, map: q }),
                Pending::Branch(Branch::Linear { x: x_k, map: k }),
                Pending::Branch(Branch::Linear { x: x_v, map: v }),
            ] if Arc::ptr_eq(&x, &x_k) && Arc::ptr_eq(&x, &x_v) => {
                attention::self_attention(&self.tape, &x, [&q, &k, &v], &how, &relative)?
            }
            [
                Pending::Part { whole, index: 0, parts: 3 },
                Pending::Part { whole: of_k, index: 1, parts: 3 },
                Pending::Part { whole: of_v, index: 2, parts: 3 },
            ] if whole.is(&of_k) && whole.is(&of_v) => match whole.state() {
                Pending::Branch(Branch::Linear { x, map }) => {
                    attention::self_attention_of_parts(&self.tape, &x, &map, &how, &relative)?
                }
                _ => attention::attention_of_parts(&self.tape, &whole.value()?, &how, &relative)?,
            },
            _ => attention::attention(&self.tape, &q.value()?, &k.value()?, &v.value()?, &how, &relative)?,
        };
        Ok(self.ready(y))
    }

    fn gated(&self, x: &X, how: Activation) -> Result<X> {
        Ok(match x {
            X::Tensor(x) => X::Tensor(activation::gated_composite(x, how)?),
            X::Fused(x) => match x.state() {
                Pending::Branch(Branch::Linear { x, map }) => {
                    self.fused(Pending::Activated { x, map, how, gated: true })
                }
                _ => self.ready(activation::gated(&self.tape, &x.value()?, how)?),
            },
        })
    }

    fn activate(&self, x: &X, how: Activation) -> Result<X> {
        Ok(match x {
            X::Tensor(x) => X::Tensor(activation::composite(x, how)?),
            X::Fused(x) => match x.state() {
                Pending::Branch(Branch::Linear { x, map }) => {
                    self.fused(Pending::Activated { x, map, how, gated: false })
                }
                _ => self.ready(activation::activate(&self.tape, &x.value()?, how)),
            },
        })
    }

    fn add(&self, a: &X, b: &X) -> Result<X> {
        let (a, b) = match (a, b) {
            (X::Fused(a), X::Fused(b)) => (a, b),
            _ => {
                return Ok(X::Tensor((wide(&a.tensor()?)? + wide(&b.tensor()?)?)?));
            }
        };
        let (branch, mask, x) = match (a.state(), b.state()) {
            (Pending::Dropped { branch, mask }, _) => (branch, Some(mask), b.value()?),
            (_, Pending::Dropped { branch, mask }) => (branch, Some(mask), a.value()?),
            _ => (a.branch()?, None, b.value()?),
        };
        Ok(self.fused(Pending::Sum { branch, mask, x }))
    }

    fn scale(&self, x: &X, factor: f64) -> Result<X> {
        Ok(match x {
            X::Tensor(x) => X::Tensor((x * factor)?),
            X::Fused(x) => self.ready(scale::scale(&self.tape, &x.value()?, factor)),
        })
    }

    fn dropout(&self, x: &X, p: f32) -> Result<X> {
        Ok(match (x, self.mask(p)) {
            (x, None) => x.clone(),
            (X::Tensor(x), Some(mask)) => X::Tensor(dropout::composite(x, mask)?),
            (X::Fused(x), Some(mask)) => self.fused(Pending::Dropped { branch: x.branch()?, mask }),
        })
    }

    fn pick(&self, x: &X, which: Pick) -> Result<X> {
        // what is asked for has been picked before
        let spans = match &self.batch.asked {
            Some(asked) if x.rows()? == asked.rows.len() => &asked.spans,
            _ => &*self.spans,
        };
        anyhow::ensure!(
            which == Pick::Asked || spans.iter().all(|span| !span.is_empty()),
            "a sequence without tokens has no first or last one"
        );
        let rows: Vec<u32> = match (which, &self.batch.asked) {
            (Pick::First, _) => spans.iter().map(|span| span.start as u32).collect(),
            (Pick::Last, None) => spans.iter().map(|span| span.end as u32 - 1).collect(),
            (Pick::Last, Some(_)) => anyhow::bail!("the last token is picked where all are there"),
            (Pick::Asked, Some(asked)) if spans.tokens() != asked.rows.len() => asked.rows.clone(),
            (Pick::Asked, _) => return Ok(x.clone()),
        };
        Ok(match x {
            X::Tensor(x) => X::Tensor(embedding::composite(x, &rows)?),
            X::Fused(x) => self.ready(embedding::pick(&self.tape, &x.value()?, &rows.into())?),
        })
    }

    fn pool(&self, x: &X, how: Pooling) -> Result<X> {
        Ok(match x {
            X::Tensor(x) => X::Tensor(pooling::composite(x, &self.spans, how)?),
            X::Fused(x) => self.ready(pooling::pool(&self.tape, &x.value()?, &self.spans, how)?),
        })
    }

    fn normalize(&self, x: &X) -> Result<X> {
        Ok(match x {
            X::Tensor(x) => X::Tensor(pooling::normalize_composite(x)?),
            X::Fused(x) => self.ready(pooling::normalize(&self.tape, &x.value()?)),
        })
    }

    fn tap(&self, name: &str, x: X) -> Result<X> {
        if let Some(taps) = &self.taps {
            taps.borrow_mut().push((name.to_owned(), x.numbers()?));
        }
        Ok(x)
    }
}

/// Results as tensors, in f32 whatever they were computed in.
pub fn tensors(outputs: Vec<X>) -> Result<Vec<Tensor>> {
    outputs.iter().map(|x| Ok(x.tensor()?.to_dtype(DType::F32)?)).collect()
}
