//! The candle interpreter: a definition over a packed batch → tensors, for training and for evaluation.

mod evaluator;
pub mod kernels;
mod params;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};

pub use evaluator::{Evaluator, logits};
pub use kernels::{Kernels, Weight};
pub use params::{Init, Params};

use crate::Result;
use crate::data::batch::{Packed, Spans};
use crate::model::ops::{Activation, Attend, Ids, Linear, Norm, Ops, Param, Pick, Sees, Table};
use kernels::dropout::{Mask, mix};

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
            mode,
            sites: Cell::new(0),
            taps: None,
        }
    }

    /// The same with the given kernels.
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
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

impl Ops for Eager<'_> {
    type X = Tensor;

    fn embed(&self, table: Table, ids: Ids) -> Result<Tensor> {
        let ids = match ids {
            Ids::Tokens => &self.ids,
            Ids::TokenTypes => &self.type_ids,
            Ids::Positions => &self.positions,
        };
        let rows = self.weight(&table.weight)?;
        kernels::embedding::embedding(self.kernels, &rows, ids).with_context(|| table.weight.name)
    }

    fn linear(&self, map: Linear, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight(&map.weight)?, self.weight(&map.bias)?);
        kernels::linear::linear(self.kernels, x, &weight, &bias).with_context(|| map.weight.name)
    }

    fn layer_norm(&self, norm: Norm, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight(&norm.weight)?, self.weight(&norm.bias)?);
        kernels::layer_norm::layer_norm(self.kernels, x, &weight, &bias, norm.eps)
            .with_context(|| norm.weight.name)
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, how: Attend) -> Result<Tensor> {
        let mask = self.mask(how.dropout);
        match how.sees {
            Sees::All => {
                Ok(kernels::attention::attention(self.kernels, q, k, v, &self.spans, how.heads, mask)?)
            }
        }
    }

    fn activate(&self, x: &Tensor, how: Activation) -> Result<Tensor> {
        Ok(kernels::activation::activate(self.kernels, x, how)?)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok((a + b)?)
    }

    fn dropout(&self, x: &Tensor, p: f32) -> Result<Tensor> {
        Ok(match self.mask(p) {
            Some(mask) => kernels::dropout::dropout(self.kernels, x, mask)?,
            None => x.clone(),
        })
    }

    fn pick(&self, x: &Tensor, which: Pick) -> Result<Tensor> {
        anyhow::ensure!(
            self.spans.iter().all(|span| !span.is_empty()),
            "a sequence without tokens has no first one"
        );
        let rows: Vec<u32> = match which {
            Pick::First => self.spans.iter().map(|span| span.start as u32).collect(),
        };
        Ok(kernels::embedding::pick(self.kernels, x, &rows.into())?)
    }

    fn tap(&self, name: &str, x: Tensor) -> Result<Tensor> {
        if let Some(taps) = &self.taps {
            taps.borrow_mut().push((name.to_owned(), x.detach()));
        }
        Ok(x)
    }
}
