//! One optimizer step: a batch of examples → changed parameters, and what there is to say about it.

use candle_core::{Device, Tensor};

use super::optimizer::{AdamW, Constants, clip_factor, global_norm};
use super::schedule::warmup_steps;
use super::{Example, Settings};
use crate::Result;
use crate::data::batch::Packed;
use crate::eager::kernels::dropout::mix;
use crate::eager::{Eager, Mode, Params};
use crate::model::Family;
use crate::task::{Target, Task};

/// A model in training: its definition, its parameters and the optimizer's state.
pub struct Trainer<'a> {
    pub settings: &'a Settings,
    pub family: &'a Family,
    pub task: &'a Task,
    pub params: &'a Params,
    pub device: &'a Device,
    pub optimizer: AdamW,
    /// Optimizer steps that the schedule is planned for.
    pub total_steps: usize,
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The mean loss of the step's examples, before its update.
    pub loss: f64,
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
        let optimizer = AdamW::new(constants, params)?;
        Ok(Self { settings, family, task, params, device, optimizer, total_steps })
    }

    /// Takes one step with the mean gradient over all the examples, `batch_size` of them at a time.
    ///
    /// # Errors
    /// The loss or a gradient is not finite, or (at the first step) a parameter gets no gradient: nothing has
    /// been changed then.
    pub fn step(&mut self, examples: &[&Example]) -> Result<Step> {
        let number = self.optimizer.steps();
        let (mut loss, mut tokens) = (0.0, 0);
        let mut sums: Option<Vec<Tensor>> = None;
        for (part, micro_batch) in examples.chunks(self.settings.batch_size).enumerate() {
            let key = mix(mix(self.settings.seed ^ mix(number as u64)) ^ part as u64);
            let (part_loss, gradients) = self.gradients(micro_batch, examples.len(), key)?;
            loss += part_loss;
            tokens += micro_batch.iter().map(|example| example.encoding.len()).sum::<usize>();
            sums = Some(match sums {
                None => gradients,
                Some(sums) => {
                    sums.iter().zip(&gradients).map(|(a, b)| Ok((a + b)?)).collect::<Result<_>>()?
                }
            });
        }
        let gradients = sums.unwrap_or_default();
        let grad_norm = global_norm(&gradients)?;
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
        Ok(Step { loss, learning_rate, grad_norm, tokens })
    }

    /// The share of `of` examples' mean loss that a micro-batch has, and its gradients.
    fn gradients(&self, examples: &[&Example], of: usize, key: u64) -> Result<(f64, Vec<Tensor>)> {
        let batch = Packed::new(examples.iter().map(|example| &example.encoding));
        let targets: Vec<&Target> = examples.iter().map(|example| &example.target).collect();
        let eager = Eager::new(self.params, &batch, self.device, Mode::Training { key });
        let outputs = self.task.define(&eager, self.family)?;
        let loss = (self.task.loss(&outputs, &targets, self.settings.label_smoothing)? / of as f64)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        let mut store = loss.backward()?;
        let (mut gradients, mut missing) = (Vec::with_capacity(self.params.len()), Vec::new());
        for (param, var) in self.params.iter() {
            match store.remove(var.as_tensor()) {
                Some(gradient) => gradients.push(gradient),
                None => missing.push(param.name.as_str()),
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
        Ok((value, gradients))
    }

    /// Names the parameters whose gradients are not finite.
    fn not_finite(&self, gradients: &[Tensor]) -> Result<String> {
        let mut names = Vec::new();
        for ((param, _), gradient) in self.params.iter().zip(gradients) {
            if !global_norm(std::slice::from_ref(gradient))?.is_finite() {
                names.push(param.name.as_str());
            }
        }
        Ok(match names.as_slice() {
            [] => String::new(),
            [first, rest @ ..] => format!(" (not finite: {first} and {} more)", rest.len()),
        })
    }
}
