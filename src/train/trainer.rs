//! One optimizer step: micro-batches of examples → changed parameters, and what there is to say about it.

use std::borrow::Cow;

use anyhow::Context;
use candle_core::Device;

use super::Settings;
use super::optimizer::{AdamW, Constants, Gradients, clip_factor};
use super::schedule::warmup_steps;
use crate::Result;
use crate::eager::kernels::dropout::mix;
use crate::eager::kernels::gradient::GradientRows;
use crate::eager::{Eager, Kernels, Mode, Params};
use crate::model::Family;
use crate::task::{Example, Task};

/// A model in training: its definition, its parameters and the optimizer's state.
pub struct Trainer<'a> {
    pub settings: &'a Settings,
    pub family: &'a Family,
    pub task: &'a Task,
    pub params: &'a Params,
    pub device: &'a Device,
    kernels: Kernels,
    pub optimizer: AdamW,
    /// Optimizer steps that the schedule is planned for.
    pub total_steps: usize,
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
        let kernels = Kernels::of(device, settings.precision.dtype());
        let optimizer = AdamW::new(constants, params, kernels)?;
        Ok(Self { settings, family, task, params, device, kernels, optimizer, total_steps })
    }

    /// The same with the given form of the operations; only before the first step.
    pub fn with_kernels(self, kernels: Kernels) -> Result<Self> {
        let optimizer = AdamW::new(self.optimizer.constants(), self.params, kernels)?;
        Ok(Self { kernels, optimizer, ..self })
    }

    /// Takes one step with the mean gradient over the examples of all micro-batches.
    ///
    /// # Errors
    /// The loss or a gradient is not finite, or a parameter gets no gradient (which shows at the first step):
    /// nothing has been changed then.
    pub fn step(&mut self, micro_batches: &[Vec<&Example>]) -> Result<StepReport> {
        let number = self.optimizer.steps();
        let mut tokens = 0;
        self.params.gradients().iter().for_each(|gradient| gradient.lock().clear());
        let mut gradients = match self.kernels {
            Kernels::Fused => Gradients::Slots,
            Kernels::Composite => Gradients::Tensors(Vec::new()),
        };
        let key = |part: usize| mix(mix(self.settings.seed ^ mix(number as u64)) ^ part as u64);
        let drawn = micro_batches.iter().enumerate();
        let drawn = drawn
            .map(|(part, examples)| self.drawn(examples, key(part)))
            .collect::<Result<Vec<Vec<Cow<Example>>>>>()?;
        let mut counts = vec![0; self.task.loss_names().len()];
        for example in drawn.iter().flatten() {
            let own = example.target.losses();
            counts.iter_mut().zip(own).for_each(|(count, own)| *count += own);
        }
        let mut losses = vec![0.0; counts.len()];
        for (part, examples) in drawn.iter().enumerate() {
            let examples: Vec<&Example> = examples.iter().map(Cow::as_ref).collect();
            let own = self.backward(&examples, &counts, key(part), &mut gradients)?;
            losses.iter_mut().zip(own).for_each(|(loss, own)| *loss += own);
            tokens += examples.iter().map(|example| example.encoding.len()).sum::<usize>();
        }
        let loss: f64 = losses.iter().sum();
        let grad_norm = gradients.global_norm(self.params)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            anyhow::bail!(
                "step {}: the loss is {loss} and the gradients' norm {grad_norm}{}; a lower --learning-rate, a \
                 longer --warmup-ratio or a look at the data may help",
                number + 1,
                self.not_finite(&gradients)?
            );
        }
        let warmup = warmup_steps(self.settings.warmup_ratio, self.total_steps);
        let factor = self.settings.schedule.factor(number, warmup, self.total_steps);
        let learning_rate = self.settings.learning_rate * factor;
        let clip = clip_factor(grad_norm, self.settings.max_grad_norm);
        self.optimizer.step(self.params, &gradients, learning_rate, clip)?;
        Ok(StepReport { loss, losses, learning_rate, grad_norm, tokens })
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

    /// Adds a micro-batch's gradients up; returns its shares of the means of `of` losses.
    fn backward(
        &self,
        examples: &[&Example],
        of: &[usize],
        key: u64,
        gradients: &mut Gradients,
    ) -> Result<Vec<f64>> {
        let batch = Task::packed(examples);
        let eager = Eager::new(self.params, &batch, self.device, Mode::Training { key })
            .with_kernels(self.kernels)
            .with_dtype(self.settings.precision.dtype());
        let eager = if self.settings.checkpoint_activations { eager.with_recomputation() } else { eager };
        let outputs = self.task.define(&eager, self.family)?;
        let smoothing = self.settings.label_smoothing;
        let losses = self.task.loss(&eager, outputs, examples, smoothing, of)?;
        let values = losses
            .iter()
            .map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?)))
            .collect::<Result<Vec<f64>>>()?;
        let loss = losses.into_iter().map(Ok).reduce(|a, b| a? + b?).context("the task has no loss")?;
        let mut store = loss?.backward()?;
        let mut missing = Vec::new();
        match gradients {
            Gradients::Slots => {
                for ((param, _), gradient) in self.params.iter().zip(self.params.gradients()) {
                    if *gradient.lock().rows() == GradientRows::None {
                        missing.push(param.name.as_str());
                    }
                }
            }
            Gradients::Tensors(sums) => {
                let first = sums.is_empty();
                for (i, (param, var)) in self.params.iter().enumerate() {
                    match store.remove(var.as_tensor()) {
                        None => missing.push(param.name.as_str()),
                        Some(gradient) if first => sums.push(gradient),
                        Some(gradient) => sums[i] = (&sums[i] + gradient)?,
                    }
                }
            }
        }
        if !missing.is_empty() {
            anyhow::bail!(
                "step {}: no gradient reaches {} of {} parameters, so they would never learn: {}",
                self.optimizer.steps() + 1,
                missing.len(),
                self.params.len(),
                missing.join(", ")
            );
        }
        Ok(values)
    }

    /// Names the parameters whose gradients are not finite.
    fn not_finite(&self, gradients: &Gradients) -> Result<String> {
        let mut names = Vec::new();
        for (i, (param, _)) in self.params.iter().enumerate() {
            if !gradients.norm(self.params, i)?.is_finite() {
                names.push(param.name.as_str());
            }
        }
        Ok(match names.as_slice() {
            [] => String::new(),
            [first, rest @ ..] => format!(" (not finite: {first} and {} more)", rest.len()),
        })
    }
}
