//! Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): an interpreter around another one. Beside the linear maps that
//! it names, `W · x`, stands `scale · B · A · dropout(x)`, with A (rank, in) and B (out, rank); all else is the inner
//! interpreter's. So every family has it, and every runtime.

use std::collections::BTreeMap;

use super::ops::{
    Activation, Attend, Distances, Ids, Layout, Linear, Norm, Ops, Param, Part, Pick, Pooling, Role, Table,
};
use crate::Result;

/// Which maps have something beside them, and what.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// By the name of the map's module, such as `bert.encoder.layer.0.attention.self.query`.
    pub maps: BTreeMap<String, LowRank>,
    /// The probability with which what goes into A is dropped in training.
    pub dropout: f32,
}

/// What stands beside one map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    pub rank: usize,
    /// `alpha / rank`, or `alpha / √rank` (Kalajdzievski 2023, arXiv:2312.03732).
    pub scale: f64,
}

impl LowRank {
    /// Of a rank and an alpha, by rsLoRA's rule or LoRA's own.
    pub fn new(rank: usize, alpha: f64, rslora: bool) -> Self {
        let root = if rslora { (rank as f64).sqrt() } else { rank as f64 };
        Self { rank, scale: alpha / root }
    }
}

/// The module of a map: its weight's name without what all have.
pub fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// The name of A's weight beside a module's.
pub fn name_of_a(module: &str) -> String {
    format!("{module}.lora_A.weight")
}

/// The same of B's.
pub fn name_of_b(module: &str) -> String {
    format!("{module}.lora_B.weight")
}

impl Lora {
    /// What stands beside a map; nothing beside a table that is a head's matrix too.
    fn beside(&self, map: &Linear) -> Option<(LowRank, Linear, Linear)> {
        if map.weight.role != Role::Matrix {
            return None;
        }
        let module = module(&map.weight.name);
        let own = *self.maps.get(module)?;
        let linear = |name: String, shape: [usize; 2], role: Role| Linear {
            weight: Param { name, shape: shape.to_vec(), role, part: Part::Adapter, summands: 1 },
            bias: None,
            layout: Layout::OutIn,
        };
        let a = linear(name_of_a(module), [own.rank, map.input()], Role::LoraA);
        let b = linear(name_of_b(module), [map.output(), own.rank], Role::LoraB);
        Some((own, a, b))
    }
}

/// An interpreter that adapts what another one runs.
pub struct Adapted<'a, O> {
    pub inner: &'a O,
    pub lora: &'a Lora,
}

impl<O: Ops> Ops for Adapted<'_, O> {
    type X = O::X;

    fn linear(&self, map: Linear, x: &O::X) -> Result<O::X> {
        let Some((own, a, b)) = self.lora.beside(&map) else { return self.inner.linear(map, x) };
        let dropped = self.inner.dropout(x, self.lora.dropout)?;
        // the narrow side is the cheaper one to scale
        let low = self.inner.scale(&self.inner.linear(a, &dropped)?, own.scale)?;
        self.inner.add(&self.inner.linear(map, x)?, &self.inner.linear(b, &low)?)
    }

    fn embed(&self, table: Table, ids: Ids) -> Result<O::X> {
        self.inner.embed(table, ids)
    }

    fn whole(&self, table: Table) -> Result<O::X> {
        self.inner.whole(table)
    }

    fn split(&self, x: &O::X, parts: usize) -> Result<Vec<O::X>> {
        self.inner.split(x, parts)
    }

    fn layer_norm(&self, norm: Norm, x: &O::X) -> Result<O::X> {
        self.inner.layer_norm(norm, x)
    }

    fn attention_by_distance(
        &self,
        q: &O::X,
        k: &O::X,
        v: &O::X,
        how: Attend,
        distances: Distances<O::X>,
    ) -> Result<O::X> {
        self.inner.attention_by_distance(q, k, v, how, distances)
    }

    fn activate(&self, x: &O::X, how: Activation) -> Result<O::X> {
        self.inner.activate(x, how)
    }

    fn gated(&self, x: &O::X, how: Activation) -> Result<O::X> {
        self.inner.gated(x, how)
    }

    fn add(&self, a: &O::X, b: &O::X) -> Result<O::X> {
        self.inner.add(a, b)
    }

    fn scale(&self, x: &O::X, factor: f64) -> Result<O::X> {
        self.inner.scale(x, factor)
    }

    fn dropout(&self, x: &O::X, p: f32) -> Result<O::X> {
        self.inner.dropout(x, p)
    }

    fn pick(&self, x: &O::X, which: Pick) -> Result<O::X> {
        self.inner.pick(x, which)
    }

    fn pool(&self, x: &O::X, how: Pooling) -> Result<O::X> {
        self.inner.pool(x, how)
    }

    fn normalize(&self, x: &O::X) -> Result<O::X> {
        self.inner.normalize(x)
    }

    fn tap(&self, name: &str, x: O::X) -> Result<O::X> {
        self.inner.tap(name, x)
    }
}
