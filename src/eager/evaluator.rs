//! A model in candle: encoded examples → its outputs, without dropout or gradients.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;
use candle_core::{Device, Tensor};
use ndarray::Array2;

use super::{Eager, Init, Mode, Params, tensors};
use crate::Result;
use crate::checkpoint::Weights;
use crate::checkpoint::adapter::Adapter;
use crate::data::batch::{Encoding, PackedBatch};
use crate::model::Family;
use crate::saved::Saved;
use crate::task::output::{Scope, Standing};
use crate::task::{Example, Measured, Outputs, Review, Source, Task};
use crate::world::{self, World};

/// Tokens of one packed batch: enough for the matrix products, little enough for the memory.
const BATCH_TOKENS: usize = 2048;

/// A model whose parameters are given, in candle, without dropout or gradients.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    pub params: &'a Params,
    pub family: &'a Family,
    pub task: &'a Task,
    pub device: &'a Device,
    /// Those that compute the same together, where there are several.
    pub world: &'a dyn World,
    /// Set from outside to a signal's number, it ends the work by [`Interrupted`].
    pub stopped: Option<&'a AtomicI32>,
}

/// Work that was ended by a signal.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

impl Forward<'_> {
    /// Each example's outputs, in order.
    ///
    /// # Errors
    /// The definition gives other rows than its outputs say.
    pub fn outputs<E: Borrow<Encoding>>(&self, examples: &[E]) -> Result<Vec<Outputs>> {
        self.outputs_behind(0, examples)
    }

    /// The same without those that are for other programs alone.
    ///
    /// # Errors
    /// As [`Forward::outputs`].
    pub fn answering<E: Borrow<Encoding>>(&self, examples: &[E]) -> Result<Vec<Outputs>> {
        self.outputs_behind(self.task.ahead(), examples)
    }

    fn outputs_behind<E: Borrow<Encoding>>(&self, ahead: usize, examples: &[E]) -> Result<Vec<Outputs>> {
        let scopes = self.task.scopes();
        let mut of_examples = vec![Outputs::new(); examples.len()];
        let batches = batches(examples.iter().map(|example| example.borrow().len()));
        for batch in self.own(&batches) {
            let batch = batch?;
            let packed = PackedBatch::new(batch.iter().map(|&i| examples[i].borrow()));
            let lengths: Vec<usize> = packed.spans.iter().map(|span| span.len()).collect();
            self.compute(&packed, ahead, &scopes, &lengths, |i, output| of_examples[batch[i]].push(output))?;
        }
        self.exchange(&mut of_examples)?;
        Ok(of_examples)
    }

    /// Of batches those that this process computes, as long as no signal ends it.
    fn own<'b>(&self, batches: &'b [Vec<usize>]) -> impl Iterator<Item = Result<&'b Vec<usize>>> {
        let Self { world, stopped, .. } = *self;
        let is_stopped = move || stopped.is_some_and(|signal| signal.load(Ordering::Relaxed) != 0);
        let own = batches.iter().enumerate().filter(|(n, _)| world.has(*n));
        own.map(move |(_, batch)| if is_stopped() { Err(Interrupted.into()) } else { Ok(batch) })
    }

    /// Puts in place what other processes have computed.
    fn exchange(&self, of_examples: &mut [Outputs]) -> Result<()> {
        if self.world.size() == 1 {
            return Ok(());
        }
        let mut sent = Vec::new();
        for outputs in of_examples.iter() {
            sent.extend((outputs.len() as u32).to_le_bytes());
            for output in outputs {
                let (rows, columns) = output.dim();
                sent.extend([rows, columns].into_iter().flat_map(|n| (n as u32).to_le_bytes()));
                sent.extend(output.iter().flat_map(|number| number.to_le_bytes()));
            }
        }
        of_examples.iter_mut().for_each(Outputs::clear); // what it has sent comes back
        for theirs in self.world.gather(&sent)? {
            let mut words = theirs.as_chunks().0.iter().copied();
            let mut number =
                || words.next().map(u32::from_le_bytes).context("another process measures other data");
            for outputs in of_examples.iter_mut() {
                for _ in 0..number()? {
                    let shape = (number()? as usize, number()? as usize);
                    let values = (0..shape.0 * shape.1).map(|_| Ok(f32::from_bits(number()?)));
                    let output = Array2::from_shape_vec(shape, values.collect::<Result<_>>()?)?;
                    outputs.push(output);
                }
            }
        }
        Ok(())
    }

    /// What is kept of each example's outputs where some of its tokens are asked for: a row for the first token, and one
    /// for each of `places` of an example that is not the first.
    ///
    /// # Errors
    /// As [`Forward::outputs`], and what `keep` fails with.
    pub fn asked(
        &self,
        examples: &[&Encoding],
        places: impl Fn(usize) -> Option<Vec<usize>>,
        keep: impl Fn(usize, Outputs) -> Result<Outputs>,
    ) -> Result<Vec<Outputs>> {
        let scopes = self.task.scopes();
        let mut kept = vec![Outputs::new(); examples.len()];
        let batches = batches(examples.iter().map(|example| example.len()));
        for batch in self.own(&batches) {
            let batch = batch?;
            let places: Vec<_> = batch.iter().map(|&i| places(i)).collect();
            let packed = PackedBatch::new(batch.iter().map(|&i| examples[i])).asking(&places);
            let lengths: Vec<usize> =
                packed.asked.iter().flat_map(|asked| asked.spans.iter()).map(|span| span.len()).collect();
            let mut of_examples = vec![Outputs::new(); batch.len()];
            self.compute(&packed, 0, &scopes, &lengths, |i, output| of_examples[i].push(output))?;
            for (&i, outputs) in batch.iter().zip(of_examples) {
                kept[i] = keep(i, outputs)?;
            }
        }
        self.exchange(&mut kept)?;
        Ok(kept)
    }

    /// Hands on each output of each sequence of a batch, but for those ahead; of tokens, a sequence has so many rows.
    fn compute(
        &self,
        packed: &PackedBatch,
        ahead: usize,
        scopes: &[Scope],
        lengths: &[usize],
        mut take: impl FnMut(usize, Array2<f32>),
    ) -> Result<()> {
        let eager = Eager::new(self.params, packed, self.device, Mode::Evaluation);
        let outputs = self.task.define(&eager, self.family)?;
        anyhow::ensure!(outputs.len() == scopes.len(), "the definition gives {} outputs", outputs.len());
        let outputs = tensors(outputs.into_iter().skip(ahead).collect())?;
        for (scope, output) in scopes[ahead..].iter().zip(outputs) {
            let shape = output.dims2()?;
            let rows = Array2::from_shape_vec(shape, output.flatten_all()?.to_vec1()?)?;
            let own = scope.unpack(rows.view(), lengths, Standing::Packed)?;
            own.into_iter().enumerate().for_each(|(i, own)| take(i, own));
        }
        Ok(())
    }

    /// The sum of all losses of the first output's rows. `wanted` gives the target of each row of a packed batch, of
    /// which it is told the examples. The rows themselves are never held, where the head is a linear map.
    pub fn losses(
        &self,
        examples: &[&Encoding],
        wanted: impl Fn(&[usize]) -> Vec<Option<u32>>,
    ) -> Result<f64> {
        let mut losses = 0.0;
        let batches = batches(examples.iter().map(|example| example.len()));
        for batch in self.own(&batches) {
            let batch = batch?;
            let packed = PackedBatch::new(batch.iter().map(|&i| examples[i]));
            let eager = Eager::new(self.params, &packed, self.device, Mode::Evaluation);
            let scores = self.task.define(&eager, self.family)?;
            let wanted = wanted(batch);
            let of_rows = eager.losses(scores.first().context("the model has no output")?, &wanted)?;
            anyhow::ensure!(
                of_rows.len() == wanted.len(),
                "{} losses for {} tokens",
                of_rows.len(),
                wanted.len()
            );
            losses += of_rows.into_iter().map(f64::from).sum::<f64>();
        }
        let mut losses = [losses];
        self.world.sums(&mut losses)?;
        Ok(losses[0])
    }
}

/// A trained model of a directory in candle.
pub struct Evaluator {
    family: Family,
    task: Task,
    params: Params,
    device: Device,
}

impl Evaluator {
    /// Loads a trained model's weights.
    ///
    /// # Errors
    /// A weight is missing or has another shape than the configuration says, the head's included.
    pub fn open(saved: &Saved, device: &Device) -> Result<Self> {
        Self::of(saved, saved.config.family.clone(), &saved.weights, device)
    }

    /// Loads the base of an adapter with the adapter beside it, as both were trained.
    ///
    /// # Errors
    /// As [`Adapter::open`] and [`Evaluator::open`].
    pub fn apart(saved: &Saved, device: &Device) -> Result<Self> {
        let names = saved.config.family.names();
        let adapter = Adapter::open(&saved.dir, names)?;
        let family = saved.config.family.clone().adapted(Some(adapter.lora()?));
        Self::of(saved, family, &adapter.apart(names)?, device)
    }

    fn of(saved: &Saved, family: Family, weights: &Weights, device: &Device) -> Result<Self> {
        let params = saved.task.params(&family)?;
        let (params, fit) = Params::load(&params, weights, Init { seed: 0, std: 0.0 }, device)?;
        if !fit.new.is_empty() {
            crate::bail_unusable!(
                "{} lacks {}: it is no model trained for {}; fine-tune it with `tk train`",
                saved.dir.display(),
                fit.new.join(", "),
                saved.task.name()
            );
        }
        Ok(Self { family, task: saved.task.clone(), params, device: device.clone() })
    }

    fn forward(&self) -> Forward<'_> {
        let Self { params, family, task, device } = self;
        Forward { params, family, task, device, world: &world::Alone, stopped: None }
    }

    /// Each example's outputs, in order.
    pub fn outputs<E: Borrow<Encoding>>(&self, examples: &[E]) -> Result<Vec<Outputs>> {
        self.forward().outputs(examples)
    }

    /// A language model's scores behind each token of each example: V numbers a token. One example at a time, because
    /// they are many.
    pub fn scores(&self, examples: &[&Encoding]) -> Result<Vec<Vec<Vec<f32>>>> {
        let of_one = |example: &&Encoding| {
            let outputs = self.forward().outputs(&[*example])?.concat();
            Ok(outputs.iter().flat_map(|output| output.rows()).map(|row| row.to_vec()).collect())
        };
        examples.iter().map(of_one).collect()
    }

    /// The task's metrics and mean loss over examples.
    pub fn measure(&self, examples: &[Example]) -> Result<Measured> {
        self.task.measure(&self.forward(), examples)
    }

    /// The same, and what there is to see beside.
    ///
    /// # Errors
    /// As of [`Task::review`].
    pub fn review(&self, examples: &[Example], of: Source) -> Result<(Measured, Review)> {
        self.task.review(&self.forward(), examples, of)
    }

    /// What the definition taps, over one packed batch of all the examples: (T, C), or (B, C) behind `pick`.
    pub fn taps(&self, examples: &[Encoding]) -> Result<Vec<(String, Tensor)>> {
        let packed = PackedBatch::new(examples);
        let eager = Eager::new(&self.params, &packed, &self.device, Mode::Evaluation).with_taps();
        self.task.define(&eager, &self.family)?;
        Ok(eager.into_taps())
    }
}

/// Examples of these lengths in batches of at most [`BATCH_TOKENS`], those of one length together, so that tasks
/// within a batch are even.
fn batches(lengths: impl Iterator<Item = usize>) -> Vec<Vec<usize>> {
    let mut order: Vec<(usize, usize)> = lengths.zip(0..).collect();
    order.sort_unstable();
    let (mut batches, mut tokens) = (Vec::<Vec<usize>>::new(), 0);
    for (length, i) in order {
        match batches.last_mut() {
            Some(batch) if tokens + length <= BATCH_TOKENS => {
                tokens += length;
                batch.push(i);
            }
            _ => {
                tokens = length;
                batches.push(vec![i]);
            }
        }
    }
    batches
}
