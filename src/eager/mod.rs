//! The candle interpreter: a definition over a packed batch → tensors, for training and for evaluation.

mod evaluator;
pub mod kernels;
mod params;
mod x;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};

pub use evaluator::{Evaluator, logits};
pub use kernels::{Kernels, Weight};
pub use params::{Init, Params};
pub use x::X;

use crate::Result;
use crate::data::batch::{Packed, Spans};
use crate::model::ops::{Activation, Attend, Ids, Linear, Norm, Ops, Param, Pick, Sees, Table};
use kernels::activation::activate;
use kernels::attention::{attention, self_attention};
use kernels::dropout::{Mask, mix};
use kernels::layer_norm::{layer_norm, residual_norm};
use kernels::linear::linear_activation;
use x::State;

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
    positions: Arc<[u32]>,
    spans: Arc<Spans>,
    kernels: Kernels,
    /// The activations' type.
    dtype: DType,
    mode: Mode,
    /// Dropout sites met so far: each has a mask of its own.
    sites: Cell<u64>,
    taps: Option<RefCell<Vec<(String, Tensor)>>>,
}

impl<'a> Eager<'a> {
    /// An interpreter for one batch, with the fastest kernels that the device runs.
    pub fn new(params: &'a Params, batch: &Packed, device: &Device, mode: Mode) -> Self {
        Self {
            params,
            ids: batch.ids.as_slice().into(),
            type_ids: batch.type_ids.as_slice().into(),
            positions: batch.positions().into(),
            spans: Arc::new(batch.spans.clone()),
            kernels: Kernels::of(device, DType::F32),
            dtype: DType::F32,
            mode,
            sites: Cell::new(0),
            taps: None,
        }
    }

    /// The same with the given kernels.
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// The same with activations of the given type; the composite form alone takes another than f32.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The same, keeping what [`Ops::tap`] names.
    pub fn with_taps(self) -> Self {
        Self { taps: Some(RefCell::default()), ..self }
    }

    /// What was tapped, in the order of the definition.
    pub fn into_taps(self) -> Vec<(String, Tensor)> {
        self.taps.map(RefCell::into_inner).unwrap_or_default()
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
    fn ready(&self, tensor: Tensor) -> X {
        X::new(self.kernels, State::Ready(tensor))
    }
}

impl Ops for Eager<'_> {
    type X = X;

    fn embed(&self, table: Table, ids: Ids) -> Result<X> {
        let ids = match ids {
            Ids::Tokens => &self.ids,
            Ids::TokenTypes => &self.type_ids,
            Ids::Positions => &self.positions,
        };
        let rows = self.weight(&table.weight)?;
        let x = kernels::embedding::embedding(self.kernels, &rows, ids).with_context(|| table.weight.name)?;
        Ok(self.ready(x.to_dtype(self.dtype)?))
    }

    fn linear(&self, map: Linear, x: &X) -> Result<X> {
        let (weight, bias) = (self.weight(&map.weight)?, self.weight(&map.bias)?);
        Ok(X::new(self.kernels, State::Linear { x: x.tensor()?, weight, bias }))
    }

    fn layer_norm(&self, norm: Norm, x: &X) -> Result<X> {
        let (weight, bias) = (self.weight(&norm.weight)?, self.weight(&norm.bias)?);
        let normed = match x.state() {
            State::Sum { branch, mask, x } => {
                residual_norm(self.kernels, &branch, mask, &x, &weight, &bias, norm.eps)
            }
            _ => layer_norm(self.kernels, &x.tensor()?, &weight, &bias, norm.eps),
        };
        Ok(self.ready(normed.with_context(|| norm.weight.name)?))
    }

    fn attention(&self, q: &X, k: &X, v: &X, how: Attend) -> Result<X> {
        let mask = self.mask(how.dropout);
        let Sees::All = how.sees;
        let (spans, heads) = (&self.spans, how.heads);
        let y = match [q.state(), k.state(), v.state()] {
            [
                State::Linear { x, weight: q, bias: q_bias },
                State::Linear { x: x_k, weight: k, bias: k_bias },
                State::Linear { x: x_v, weight: v, bias: v_bias },
            ] if x.id() == x_k.id() && x.id() == x_v.id() => {
                let maps = [&(q, q_bias), &(k, k_bias), &(v, v_bias)];
                self_attention(self.kernels, &x, maps, spans, heads, mask)?
            }
            _ => attention(self.kernels, &q.tensor()?, &k.tensor()?, &v.tensor()?, spans, heads, mask)?,
        };
        Ok(self.ready(y))
    }

    fn activate(&self, x: &X, how: Activation) -> Result<X> {
        let y = match x.state() {
            State::Linear { x, weight, bias } => linear_activation(self.kernels, &x, &weight, &bias, how)?,
            _ => activate(self.kernels, &x.tensor()?, how)?,
        };
        Ok(self.ready(y))
    }

    fn add(&self, a: &X, b: &X) -> Result<X> {
        let (branch, mask, x) = match (a.state(), b.state()) {
            (State::Dropped { x: branch, mask }, _) => (branch, Some(mask), b.tensor()?),
            (_, State::Dropped { x: branch, mask }) => (branch, Some(mask), a.tensor()?),
            _ => (a.tensor()?, None, b.tensor()?),
        };
        Ok(X::new(self.kernels, State::Sum { branch, mask, x }))
    }

    fn dropout(&self, x: &X, p: f32) -> Result<X> {
        Ok(match self.mask(p) {
            Some(mask) => X::new(self.kernels, State::Dropped { x: x.tensor()?, mask }),
            None => x.clone(),
        })
    }

    fn pick(&self, x: &X, which: Pick) -> Result<X> {
        anyhow::ensure!(
            self.spans.iter().all(|span| !span.is_empty()),
            "a sequence without tokens has no first one"
        );
        let rows: Vec<u32> = match which {
            Pick::First => self.spans.iter().map(|span| span.start as u32).collect(),
        };
        Ok(self.ready(kernels::embedding::pick(self.kernels, &x.tensor()?, &rows.into())?))
    }

    fn tap(&self, name: &str, x: X) -> Result<X> {
        if let Some(taps) = &self.taps {
            taps.borrow_mut().push((name.to_owned(), x.tensor()?.detach()));
        }
        Ok(x)
    }
}

/// Results as tensors, in f32 whatever they were computed in.
pub fn tensors(outputs: Vec<X>) -> Result<Vec<Tensor>> {
    outputs.iter().map(|x| Ok(x.tensor()?.to_dtype(DType::F32)?)).collect()
}
