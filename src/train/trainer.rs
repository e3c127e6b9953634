//! One optimizer step: micro-batches of examples → changed parameters, and what there is to say about it.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Context;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::Settings;
use super::audit::{Audit, Row};
use super::ema::Ema;
use super::exchange;
use super::gradients::Gradients;
use super::not_finite::{Alone, NotFinite, Tensors, is_finite};
use super::optimizer::{AdamW, Constants, clip_factor};
use super::rates::Rates;
use super::schedule::warmup_steps;
use crate::Result;
use crate::data::batch::PackedBatch;
use crate::eager::kernels::dropout::mix;
use crate::eager::kernels::gradient::GradientRows;
use crate::eager::kernels::linear::PackedWeights;
use crate::eager::{Eager, Kernels, Mode, Params, X, tensors};
use crate::model::Family;
use crate::task::{Example, Task};
use crate::world::{self, World};

/// A model in training: its definition, its parameters and the optimizer's state.
pub struct Trainer<'a> {
    pub settings: &'a Settings,
    pub family: &'a Family,
    pub task: &'a Task,
    pub params: &'a Params,
    pub device: &'a Device,
    kernels: Kernels,
    /// What interpreters compute in.
    dtype: DType,
    /// Weights that are packed once for all passes of a step.
    packed: Option<Arc<PackedWeights>>,
    pub optimizer: AdamW,
    /// Averages of the weights, where `--ema` asks for them.
    pub ema: Option<Ema>,
    rates: Rates,
    /// Optimizer steps that the schedule is planned for.
    pub total_steps: usize,
    /// Those that train the same model.
    world: &'a dyn World,
}

/// What a step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The mean loss of the step's examples, or of their predicted tokens, before its update; the sum of several.
    pub loss: f64,
    /// Each of the task's losses.
    pub losses: Vec<f64>,
    pub learning_rate: f64,
    /// The gradients' norm before clipping.
    pub grad_norm: f64,
    /// Tokens that were computed; none of them is padding.
    pub tokens: usize,
    /// What the step did to each parameter, where `--audit` asks for it.
    pub audit: Option<Vec<Row>>,
}

impl<'a> Trainer<'a> {
    /// A trainer at step 0.
    pub fn new(
        settings: &'a Settings,
        family: &'a Family,
        task: &'a Task,
        params: &'a Params,
        device: &'a Device,
        total_steps: usize,
    ) -> Result<Self> {
        let constants = Constants {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            eps: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
        };
        let kernels = Kernels::of(device);
        let optimizer = AdamW::new(constants, params, kernels)?;
        let ema = settings.ema.map(Ema::new);
        let rates = Rates::new(params, settings);
        Ok(Self {
            settings,
            family,
            task,
            params,
            device,
            kernels,
            dtype: settings.precision.dtype(device),
            packed: None,
            optimizer,
            ema,
            rates,
            total_steps,
            world: &world::Alone,
        })
    }

    /// The same with the given form of the operations; only before the first step.
    pub fn with_kernels(self, kernels: Kernels) -> Result<Self> {
        let optimizer = AdamW::new(self.optimizer.constants(), self.params, kernels)?;
        Ok(Self { kernels, optimizer, ..self })
    }

    /// The same as one of several processes: each takes its share of a step's micro-batches.
    pub fn in_world(self, world: &'a dyn World) -> Self {
        Self { world, ..self }
    }

    /// Takes one step with the mean gradient over the examples of all micro-batches.
    ///
    /// # Errors
    /// The loss or a gradient is not finite ([`NotFinite`]), or a parameter gets no gradient (which shows at the first
    /// step): nothing has been changed then.
    pub fn step(&mut self, micro_batches: &[Vec<&Example>]) -> Result<StepReport> {
        let number = self.optimizer.steps();
        let mut tokens = 0;
        let mut gradients = self.no_gradients();
        let key = |part: usize| mix(mix(self.settings.seed ^ mix(number as u64)) ^ part as u64);
        // micro-batches of others have numbers, too
        let ahead = self.world.rank() * self.settings.gradient_accumulation;
        let own = micro_batches.iter().enumerate().skip(ahead);
        let own =
            own.take(if self.world.size() > 1 { self.settings.gradient_accumulation } else { usize::MAX });
        let drawn = own
            .map(|(part, examples)| Ok((key(part), self.drawn(examples, key(part))?)))
            .collect::<Result<Vec<(u64, Vec<Cow<Example>>)>>>()?;
        let mut weights = vec![0.0; self.task.loss_names().len()];
        for example in drawn.iter().flat_map(|(_, examples)| examples) {
            let own = self.task.weights(&example.target);
            weights.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        }
        self.world.sums(&mut weights)?;
        // in fp32 they would be twice as large, and packing them is a smaller part of a pass
        let again = drawn.len() > 1 || self.settings.checkpoint_activations || self.task.chunk().is_some();
        self.packed = (again && self.dtype == DType::BF16).then(Arc::default);
        // the values stay where they are until all is computed: reading one waits for a device
        let mut of_micro_batches = Vec::new();
        for (key, examples) in &drawn {
            let examples: Vec<&Example> = examples.iter().map(Cow::as_ref).collect();
            of_micro_batches.extend(self.backward(&examples, &weights, *key, &mut gradients)?);
            tokens += examples.iter().map(|example| example.tokens()).sum::<usize>();
        }
        self.packed = None; // the weights are about to change
        let mut losses = vec![0.0; weights.len()];
        for own in numbers(&of_micro_batches)?.chunks(weights.len().max(1)) {
            losses.iter_mut().zip(own).for_each(|(loss, own)| *loss += own);
        }
        losses.push(tokens as f64);
        self.world.sums(&mut losses)?;
        let tokens = losses.pop().unwrap_or_default() as usize;
        exchange::sum_gradients(self.world, self.params, &mut gradients)?;
        let loss: f64 = losses.iter().sum();
        let grad_norm = gradients.norm(self.params)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let first = self.first_not_finite(&drawn, &weights, &gradients.norms(self.params)?)?;
            let micro_batches: Vec<Vec<Alone>> =
                drawn.iter().map(|(key, examples)| self.alone(examples, *key)).collect();
            let step = number + 1;
            self.only_one(!matches!(first, Tensors::Norm))?;
            return Err(NotFinite { step, loss, grad_norm, first, micro_batches }.into());
        }
        let audit = self.audits(number + 1).then(|| Audit::before(self.params, &gradients)).transpose()?;
        let warmup = warmup_steps(self.settings.warmup_ratio, self.total_steps);
        let factor = self.settings.schedule.factor(number, warmup, self.total_steps);
        let learning_rate = self.settings.learning_rate * factor;
        let clip = clip_factor(grad_norm, self.settings.max_grad_norm);
        let rate = |index| self.rates.peak(index) * factor;
        self.optimizer.step(self.params, &gradients, rate, clip)?;
        if let Some(ema) = &mut self.ema {
            ema.update(self.params)?;
        }
        let audit = audit.map(|audit| audit.after(self.params)).transpose()?;
        Ok(StepReport { loss, losses, learning_rate, grad_norm, tokens, audit })
    }

    /// Whether this step, counted from 1, is looked at parameter by parameter.
    fn audits(&self, step: usize) -> bool {
        let is_end = step == 1 || step == self.total_steps;
        self.settings.audit.is_some_and(|every| is_end || step.is_multiple_of(every))
    }

    /// Where the gradients of a step are added up, empty.
    fn no_gradients(&self) -> Gradients {
        self.params.trainable().for_each(|own| own.gradient.lock().clear());
        match self.kernels {
            Kernels::Fused => Gradients::Slots,
            Kernels::Composite => Gradients::Flat(Vec::new()),
        }
    }

    /// The examples as they are learnt in a micro-batch with this key.
    fn drawn<'e>(&self, examples: &[&'e Example], key: u64) -> Result<Vec<Cow<'e, Example>>> {
        let drawn = |(i, example): (usize, &&'e Example)| {
            // dropout has keys of its own
            let drawn = self.task.drawn(example, mix(!key ^ mix(i as u64)))?;
            Ok(drawn.map_or(Cow::Borrowed(*example), Cow::Owned))
        };
        examples.iter().enumerate().map(drawn).collect()
    }

    /// The examples of each forward pass of a micro-batch, with the key of what it drops: all of them, where the task does
    /// not ask for chunks.
    fn passes<'e>(&self, examples: &'e [&'e Example], key: u64) -> Vec<(&'e [&'e Example], u64)> {
        match self.task.chunk().filter(|&chunk| chunk < examples.len()) {
            None => vec![(examples, key)],
            Some(chunk) => {
                let keyed = |(place, chunk)| (chunk, mix(key ^ mix(place as u64)));
                examples.chunks(chunk).enumerate().map(keyed).collect()
            }
        }
    }

    /// Adds a micro-batch's gradients up; returns its shares of the losses, whose weights are `of`
    /// together, one number each.
    fn backward(
        &self,
        examples: &[&Example],
        of: &[f64],
        key: u64,
        gradients: &mut Gradients,
    ) -> Result<Vec<Tensor>> {
        let passes = self.passes(examples, key);
        if passes.len() > 1 {
            return self.backward_in_chunks(examples, &passes, of, key, gradients);
        }
        let batch = Task::packed(examples);
        let eager = self.eager(&batch, key);
        let outputs = self.task.define(&eager, self.family)?;
        let losses = self.task.loss(&eager, outputs, examples, self.settings.label_smoothing, of)?;
        let values = losses.iter().map(Tensor::detach).collect();
        self.add_up(sum(losses)?.backward()?, gradients)?;
        Ok(values)
    }

    /// The same with the activations of so many examples at a time: all outputs are computed first, then the loss of all
    /// of them and its gradient there, then, chunk by chunk again, what leads back from it (Gao et al. 2021,
    /// arXiv:2101.06983). Each chunk drops the same in both passes.
    fn backward_in_chunks(
        &self,
        examples: &[&Example],
        chunks: &[(&[&Example], u64)],
        of: &[f64],
        key: u64,
        gradients: &mut Gradients,
    ) -> Result<Vec<Tensor>> {
        let ahead = self.task.ahead();
        let mut of_chunks: Vec<Vec<Tensor>> = Vec::with_capacity(chunks.len());
        for &(chunk, key) in chunks {
            let batch = Task::packed(chunk);
            let outputs = self.task.define(&self.eager(&batch, key), self.family)?;
            let outputs = tensors(outputs.into_iter().skip(ahead).collect())?;
            of_chunks.push(outputs.iter().map(Tensor::detach).collect());
        }
        let whole = |output: usize| {
            let parts: Vec<&Tensor> = of_chunks.iter().map(|outputs| &outputs[output]).collect();
            Ok(Var::from_tensor(&Tensor::cat(&parts, 0)?)?)
        };
        let wholes: Vec<Var> =
            (0..of_chunks.first().map_or(0, Vec::len)).map(whole).collect::<Result<_>>()?;
        let batch = Task::packed(examples);
        let outputs = wholes.iter().map(|whole| X::Tensor(whole.as_tensor().clone())).collect();
        let smoothing = self.settings.label_smoothing;
        let losses = self.task.loss(&self.eager(&batch, key), outputs, examples, smoothing, of)?;
        let values = losses.iter().map(Tensor::detach).collect();
        let mut store = sum(losses)?.backward()?;
        let stored: Vec<Option<Tensor>> =
            wholes.iter().map(|whole| store.remove(whole.as_tensor())).collect();
        let mut starts = vec![0; stored.len()];
        for &(chunk, key) in chunks {
            let batch = Task::packed(chunk);
            let outputs = self.task.define(&self.eager(&batch, key), self.family)?;
            // those ahead lead nowhere back
            let outputs = tensors(outputs.into_iter().skip(ahead).collect())?;
            let mut leading = Vec::new();
            for ((output, stored), start) in outputs.iter().zip(&stored).zip(&mut starts) {
                let rows = output.dim(0)?;
                if let Some(stored) = stored {
                    leading.push((output * stored.narrow(0, *start, rows)?)?.sum_all()?);
                }
                *start += rows;
            }
            anyhow::ensure!(!leading.is_empty(), "the loss depends on no output");
            self.add_up(Tensor::stack(&leading, 0)?.sum_all()?.backward()?, gradients)?;
        }
        Ok(values)
    }

    /// An interpreter for one forward pass.
    fn eager<'b>(&'b self, batch: &'b PackedBatch, key: u64) -> Eager<'b> {
        let eager = Eager::new(self.params, batch, self.device, Mode::Training { key })
            .with_kernels(self.kernels)
            .with_dtype(self.dtype);
        let eager = match &self.packed {
            Some(weights) => eager.with_packed(weights),
            None => eager,
        };
        if self.settings.checkpoint_activations { eager.with_recomputation() } else { eager }
    }

    /// Adds the gradients of a backward pass up.
    ///
    /// # Errors
    /// A parameter has none.
    fn add_up(&self, mut store: GradStore, gradients: &mut Gradients) -> Result<()> {
        let mut missing = Vec::new();
        match gradients {
            Gradients::Slots => {
                for own in self.params.trainable() {
                    if *own.gradient.lock().rows() == GradientRows::None {
                        missing.push(own.param.name.as_str());
                    }
                }
            }
            Gradients::Flat(_) => {
                let mut found = Vec::new();
                for own in self.params.trainable() {
                    match store.remove(own.var.as_tensor()) {
                        None => missing.push(own.param.name.as_str()),
                        Some(gradient) => found.push(gradient),
                    }
                }
                if missing.is_empty() {
                    gradients.add(Gradients::flat(self.params, &found)?)?;
                }
            }
        }
        if !missing.is_empty() {
            anyhow::bail!(
                "step {}: no gradient reaches {} of {} parameters, so they would never learn: {}",
                self.optimizer.steps() + 1,
                missing.len(),
                self.params.trainable().count(),
                missing.join(", ")
            );
        }
        Ok(())
    }

    /// What a step whose loss or gradients' norm is not finite has met first that is not, in the order of the
    /// computation.
    fn first_not_finite(
        &self,
        drawn: &[(u64, Vec<Cow<Example>>)],
        of: &[f64],
        norms: &[f64],
    ) -> Result<Tensors> {
        let mut weights = Vec::new();
        for (param, var) in self.params.iter() {
            if !is_finite(var.as_tensor())? {
                weights.push(param.name.clone());
            }
        }
        if !weights.is_empty() {
            return Ok(Tensors::Weights(weights));
        }
        for (key, examples) in drawn {
            let examples: Vec<&Example> = examples.iter().map(Cow::as_ref).collect();
            for (chunk, key) in self.passes(&examples, *key) {
                let batch = Task::packed(chunk);
                let eager = self.eager(&batch, key).with_taps();
                let outputs = self.task.define(&eager, self.family)?;
                let outputs = tensors(outputs)?;
                let mut taps = eager.into_taps();
                taps.extend(outputs.into_iter().map(|output| ("of the head".to_owned(), output)));
                for (name, tap) in taps {
                    if !is_finite(&tap)? {
                        return Ok(Tensors::Activation(name));
                    }
                }
            }
        }
        let losses_are_finite = drawn.iter().try_fold(true, |all, (key, examples)| {
            let examples: Vec<&Example> = examples.iter().map(Cow::as_ref).collect();
            let losses = numbers(&self.backward(&examples, of, *key, &mut self.no_gradients())?)?;
            Ok::<_, anyhow::Error>(all && losses.iter().all(|loss| loss.is_finite()))
        })?;
        if !losses_are_finite {
            return Ok(Tensors::Loss);
        }
        // the backward pass comes to the last parameters first
        let names = self.params.trainable().zip(norms).filter(|(_, norm)| !norm.is_finite());
        let mut names: Vec<String> = names.map(|(own, _)| own.param.name.clone()).collect();
        names.reverse();
        Ok(if names.is_empty() { Tensors::Norm } else { Tensors::Gradients(names) })
    }

    /// Of processes that fail together lets one go on, which tells of it and ends the others: the first that has found
    /// something.
    fn only_one(&self, has_found: bool) -> Result<()> {
        let found = self.world.gather(&[u8::from(has_found)])?;
        let chosen = found.iter().position(|found| found == &[1]).unwrap_or(0);
        // one of them does not come to meet the others
        if chosen == self.world.rank() { Ok(()) } else { self.world.meet() }
    }

    /// Each example of a micro-batch with the loss that it has when it is computed alone.
    fn alone(&self, examples: &[Cow<Example>], key: u64) -> Vec<Alone> {
        let alone = |example: &Cow<Example>| {
            let mut gradients = self.no_gradients();
            let loss = self
                .backward(&[example.as_ref()], &self.task.weights(&example.target), key, &mut gradients)
                .and_then(|losses| {
                    let norm = gradients.norm(self.params)?;
                    Ok(if norm.is_finite() { numbers(&losses)?.iter().sum() } else { f64::NAN })
                });
            // one that can't be computed alone, as a contrast needs others, is no suspect
            Alone { example: example.clone().into_owned(), loss: loss.unwrap_or(0.0) }
        };
        examples.iter().map(alone).collect()
    }
}

/// The values of losses, which come to the host together.
fn numbers(losses: &[Tensor]) -> Result<Vec<f64>> {
    if losses.is_empty() {
        return Ok(Vec::new());
    }
    Ok(Tensor::stack(losses, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// All losses as one.
fn sum(losses: Vec<Tensor>) -> Result<Tensor> {
    let sum = losses.into_iter().map(Ok).reduce(|a, b| a? + b?);
    Ok(sum.context("the task has no loss")??)
}
