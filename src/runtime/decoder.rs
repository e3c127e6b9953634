//! A language model in ONNX Runtime: tokens in, scores of the next tokens out, and the keys and values of what was
//! read kept in between.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Context;
use ort::session::SessionInputValue;
use ort::value::{DynValue, Tensor, TensorRef};

use super::Providers;
use super::session::{Model, OrtSession, Threads, Values};
use crate::say::Say;
use crate::{Result, bail_unusable};

/// A graph of the form [`crate::task::Form::Cached`], and what it has read.
pub struct Decoder {
    session: OrtSession,
    caches: Vec<LayerCache>,
    /// The caches' values, once something was read.
    past: Vec<DynValue>,
}

/// One tensor that goes out and comes in again.
struct LayerCache {
    past: String,
    present: String,
    heads: usize,
    width: usize,
}

/// Tokens that the rows of a batch read at once, T each, behind the P that they have read.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    pub rows: usize,
    /// (rows, T)
    pub ids: &'a [i64],
    /// (rows, P + T), 0 for padding.
    pub mask: &'a [i64],
    /// (rows, T): each token's place in its sequence.
    pub positions: &'a [i64],
}

impl Decoder {
    /// Loads a graph that has read nothing.
    ///
    /// # Errors
    /// As [`OrtSession::open`]; the graph's caches are not (batch, heads, past, width).
    pub fn open(model: &Path, providers: &Providers, threads: usize, say: Say) -> Result<Self> {
        let session = OrtSession::open(Model::File(model), providers, Threads::Together(threads), say)?;
        let mut caches = Vec::new();
        for input in session.session.inputs() {
            let Some(layer) = input.name().strip_prefix("past_key_values.") else { continue };
            let shape = input.dtype().tensor_shape().map(|shape| shape.to_vec()).unwrap_or_default();
            let (past, present) = (input.name().to_owned(), format!("present.{layer}"));
            match shape[..] {
                [_, heads, _, width] if heads > 0 && width > 0 => {
                    caches.push(LayerCache { past, present, heads: heads as usize, width: width as usize });
                }
                _ => bail_unusable!(
                    "{}: {past} has the shape {shape:?}, expected (batch, heads, past, width): export it again",
                    model.display()
                ),
            }
        }
        if caches.is_empty() {
            bail_unusable!("{} has no past_key_values: it is no language model's graph", model.display());
        }
        Ok(Self { session, caches, past: Vec::new() })
    }

    /// Forgets what was read.
    pub fn forget(&mut self) {
        self.past.clear();
    }

    /// Reads tokens and gives the scores behind each, (rows, T, V).
    ///
    /// # Errors
    /// The run fails, as where the rows are not those that were read before.
    pub fn read(&mut self, tokens: Tokens) -> Result<Values> {
        let Tokens { rows, ids, mask, positions } = tokens;
        anyhow::ensure!(rows > 0 && ids.len().is_multiple_of(rows), "{} ids for {rows} rows", ids.len());
        let mut inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::new();
        let given = [("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)];
        let asked = |name| self.session.session.inputs().iter().any(|input| input.name() == name);
        for (name, values) in given.into_iter().filter(|(name, _)| asked(*name)) {
            let tensor = TensorRef::from_array_view(([rows, values.len() / rows], values))?;
            inputs.push((name.into(), tensor.into()));
        }
        if self.past.is_empty() {
            for cache in &self.caches {
                let empty = Tensor::from_array(([rows, cache.heads, 0, cache.width], Vec::<f32>::new()))?;
                self.past.push(empty.into_dyn());
            }
        }
        for (cache, past) in self.caches.iter().zip(self.past.drain(..)) {
            inputs.push((cache.past.as_str().into(), past.into()));
        }
        let mut outputs = self.session.session.run(inputs).context("reading tokens")?;
        for cache in &self.caches {
            let present = outputs.remove(&cache.present);
            self.past.push(present.with_context(|| format!("the graph gives no {}", cache.present))?);
        }
        let logits = outputs.remove("logits").context("the graph gives no logits")?;
        let array = logits.try_extract_array::<f32>()?.to_owned();
        Ok(Values { name: "logits".to_owned(), array })
    }
}
