//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with gradient clipping: gradients → changed parameters.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::Result;
use crate::eager::kernels::gradient::{GradientRows, GradientSlot};
use crate::eager::kernels::{CHUNK, Kernels, simd};
use crate::eager::{Params, Trainable};

/// AdamW's constants; the learning rate comes with each step.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// AdamW's state: for each parameter that is trained the running means of its gradient and of the gradient's square.
///
/// The update is `torch.optim.AdamW`'s. Weight decay is decoupled and applies to matrices and tables, not to
/// biases and layer norms. Every row of a table is updated at every step, with or without a gradient.
pub struct AdamW {
    constants: Constants,
    /// Steps taken.
    step: usize,
    moments: Vec<Moments>,
}

enum Moments {
    /// On the CPU: plain numbers, updated with the parameter in one pass.
    Host(Mutex<(Vec<f32>, Vec<f32>)>),
    /// Elsewhere: tensors.
    Device(Tensor, Tensor),
}

impl AdamW {
    /// A fresh state for the given parameters and form of the update.
    pub fn new(constants: Constants, params: &Params, kernels: Kernels) -> Result<Self> {
        let moments = params
            .trainable()
            .map(|Trainable { param, var, .. }| {
                Ok(match kernels {
                    Kernels::Fused => {
                        let zeros = vec![0.0; param.numel()];
                        Moments::Host(Mutex::new((zeros.clone(), zeros)))
                    }
                    Kernels::Composite => Moments::Device(var.zeros_like()?, var.zeros_like()?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { constants, step: 0, moments })
    }

    /// Changes every parameter that is trained by its gradient times `clip`, at the learning rate of its place among them,
    /// and forgets the gradients.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        learning_rate: impl Fn(usize) -> f64,
        clip: f64,
    ) -> Result<()> {
        self.step += 1;
        let Constants { beta1, beta2, eps, weight_decay } = self.constants;
        let exponent = self.step as i32;
        for (i, Trainable { param, var, gradient }) in params.trainable().enumerate() {
            let learning_rate = learning_rate(i);
            let decay = if param.role.decays() { weight_decay } else { 0.0 };
            let update = Update {
                clip: clip as f32,
                beta1: beta1 as f32,
                one_less_beta1: (1.0 - beta1) as f32,
                beta2: beta2 as f32,
                one_less_beta2: (1.0 - beta2) as f32,
                keep: (1.0 - learning_rate * decay) as f32,
                rate: (learning_rate / (1.0 - beta1.powi(exponent))) as f32,
                scale: (1.0 / (1.0 - beta2.powi(exponent)).sqrt()) as f32,
                eps: eps as f32,
            };
            match (&mut self.moments[i], gradients) {
                (Moments::Host(means), Gradients::Slots) => {
                    let mut slot = gradient.lock();
                    let means = means.get_mut().unwrap_or_else(|broken| broken.into_inner());
                    var.as_tensor().inplace_op1(&Fused { update, slot: &slot, means: Mutex::new(means) })?;
                    slot.clear();
                }
                (Moments::Device(mean, square), Gradients::Tensors(gradients)) => {
                    update.composite(var, &gradients[i], mean, square)?;
                }
                _ => anyhow::bail!("the optimizer and the gradients are of different kernels"),
            }
        }
        Ok(())
    }

    /// What it was made with.
    pub fn constants(&self) -> Constants {
        self.constants
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// The running means of every parameter that is trained, in order: (of the gradient, of its square).
    pub fn state(&self) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
        let host = |moments: &Moments| match moments {
            Moments::Host(means) => Ok(means.lock().unwrap_or_else(|broken| broken.into_inner()).clone()),
            Moments::Device(mean, square) => {
                Ok((mean.flatten_all()?.to_vec1()?, square.flatten_all()?.to_vec1()?))
            }
        };
        self.moments.iter().map(host).collect()
    }

    /// Goes on from a state that was taken after `step` steps.
    pub fn restore(&mut self, step: usize, state: Vec<(Vec<f32>, Vec<f32>)>) -> Result<()> {
        self.step = step;
        for (moments, (mean, square)) in self.moments.iter_mut().zip(state) {
            match moments {
                Moments::Host(means) => *means = Mutex::new((mean, square)),
                Moments::Device(old_mean, old_square) => {
                    *old_mean = Tensor::from_vec(mean, old_mean.shape(), old_mean.device())?;
                    *old_square = Tensor::from_vec(square, old_square.shape(), old_square.device())?;
                }
            }
        }
        Ok(())
    }
}

/// One parameter's update in numbers.
#[derive(Clone, Copy)]
struct Update {
    clip: f32,
    beta1: f32,
    one_less_beta1: f32,
    beta2: f32,
    one_less_beta2: f32,
    /// What weight decay leaves: 1 − rate · decay.
    keep: f32,
    /// The learning rate over the first mean's bias correction.
    rate: f32,
    /// One over the root of the second mean's bias correction.
    scale: f32,
    eps: f32,
}

impl Update {
    fn composite(&self, var: &Var, gradient: &Tensor, mean: &mut Tensor, square: &mut Tensor) -> Result<()> {
        let gradient = (gradient * f64::from(self.clip))?;
        *mean = ((&*mean * f64::from(self.beta1))? + (&gradient * f64::from(self.one_less_beta1))?)?.detach();
        *square = ((&*square * f64::from(self.beta2))?
            + (gradient.sqr()? * f64::from(self.one_less_beta2))?)?
        .detach();
        let denominator = ((square.sqrt()? * f64::from(self.scale))? + f64::from(self.eps))?;
        let change = ((&*mean / denominator)? * f64::from(self.rate))?;
        var.set(&((var.as_detached_tensor() * f64::from(self.keep))? - change)?)?;
        Ok(())
    }
}

/// The update of a parameter on the CPU, in one pass over it.
struct Fused<'a> {
    update: Update,
    slot: &'a GradientSlot,
    /// The operation is handed over by a shared reference, but is applied once.
    means: Mutex<&'a mut (Vec<f32>, Vec<f32>)>,
}

impl InplaceOp1 for Fused<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, weights: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(weights), Some((start, end))) = (weights, layout.contiguous_offsets()) else {
            candle_core::bail!("the fused AdamW takes contiguous f32 parameters");
        };
        let mut means = self.means.lock().unwrap_or_else(|broken| broken.into_inner());
        let (mean, square) = &mut **means;
        let weights = &mut weights[start..end];
        match self.slot.rows() {
            GradientRows::None => candle_core::bail!("AdamW on a parameter without a gradient"),
            GradientRows::All => weights
                .par_chunks_mut(CHUNK)
                .zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK)))
                .zip(self.slot.values().par_chunks(CHUNK))
                .for_each(|((weights, (mean, square)), gradient)| {
                    update(weights, gradient, mean, square, self.update);
                }),
            GradientRows::Some(rows) => {
                // no gradient of a row that was not looked up is read, but the row is decayed and moved
                let width = self.slot.width();
                let zeros = vec![0.0; width];
                let block = (CHUNK / width).max(1);
                weights
                    .par_chunks_mut(block * width)
                    .zip(mean.par_chunks_mut(block * width).zip(square.par_chunks_mut(block * width)))
                    .enumerate()
                    .for_each(|(at, (weights, (mean, square)))| {
                        let first = (at * block) as u32;
                        let mut next = rows.partition_point(|&row| row < first);
                        let parts = mean.chunks_exact_mut(width).zip(square.chunks_exact_mut(width));
                        for (row, (weights, (mean, square))) in
                            (first..).zip(weights.chunks_exact_mut(width).zip(parts))
                        {
                            let is_next = rows.get(next) == Some(&row);
                            next += usize::from(is_next);
                            let gradient = if is_next { self.slot.row(row) } else { &zeros };
                            update(weights, gradient, mean, square, self.update);
                        }
                    });
            }
        }
        Ok(())
    }
}

simd::vectorised! {
    fn update(weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32], u: Update) {
        for (((w, &g), m), v) in weights.iter_mut().zip(gradient).zip(mean).zip(square) {
            let g = g * u.clip;
            *m = u.beta1 * *m + u.one_less_beta1 * g;
            *v = u.beta2 * *v + u.one_less_beta2 * g * g;
            *w = *w * u.keep - u.rate * *m / (v.sqrt() * u.scale + u.eps);
        }
    }
}

/// Where the gradients of a step are.
pub enum Gradients {
    /// In the parameters' slots, where fused operations put them.
    Slots,
    /// In tensors, in the order of the parameters that are trained.
    Tensors(Vec<Tensor>),
}

impl Gradients {
    /// The Euclidean norm of each trained parameter's gradient.
    pub fn norms(&self, params: &Params) -> Result<Vec<f64>> {
        match self {
            Self::Slots => Ok(params.trainable().map(|own| own.gradient.lock().squares().sqrt()).collect()),
            Self::Tensors(gradients) => {
                let norm = |gradient: &Tensor| {
                    let squares = gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?;
                    Ok(f64::from(squares.to_scalar::<f32>()?).sqrt())
                };
                gradients.iter().map(norm).collect()
            }
        }
    }
}

impl Gradients {
    /// The share of each trained parameter's gradient that is exactly zero.
    pub fn zeros(&self, params: &Params) -> Result<Vec<f64>> {
        let share = |zeros: usize, of: usize| zeros as f64 / of.max(1) as f64;
        let counted = |numbers: &[f32]| numbers.iter().filter(|&&number| number == 0.0).count();
        match self {
            Self::Slots => Ok(params
                .trainable()
                .map(|own| {
                    let slot = own.gradient.lock();
                    let numel = own.param.numel();
                    match slot.rows() {
                        GradientRows::None => 1.0,
                        GradientRows::All => share(counted(slot.values()), numel),
                        GradientRows::Some(rows) => {
                            let zeros: usize = rows.iter().map(|&row| counted(slot.row(row))).sum();
                            share(numel - rows.len() * slot.width() + zeros, numel)
                        }
                    }
                })
                .collect()),
            Self::Tensors(gradients) => gradients
                .iter()
                .map(|gradient| {
                    let numbers: Vec<f32> = gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                    Ok(share(counted(&numbers), numbers.len()))
                })
                .collect(),
        }
    }
}

/// The norm of all gradients together, from that of each.
pub fn global_norm(norms: &[f64]) -> f64 {
    norms.iter().map(|norm| norm.powi(2)).sum::<f64>().sqrt()
}

/// The factor that brings a norm down to `max`, as `torch.nn.utils.clip_grad_norm_` computes it; 1 where
/// `max` is 0.
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_update_is_the_same_on_every_instruction_set_and_leaves_numbers_without_a_gradient() {
        let how = Update {
            clip: 0.5,
            beta1: 0.9,
            one_less_beta1: 0.1,
            beta2: 0.999,
            one_less_beta2: 0.001,
            keep: 0.99,
            rate: 0.01,
            scale: 31.6,
            eps: 1e-8,
        };
        for n in [1, 8, 16, 37] {
            let numbers = |seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7919 + seed) % 101) as f32 / 50.0 - 1.0).collect()
            };
            let step = |gradient: &[f32]| {
                let (mut weights, mut mean, mut square) = (numbers(1), vec![0.0; n], vec![0.0; n]);
                update(&mut weights, gradient, &mut mean, &mut square, how);
                [weights, mean, square].concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let results = simd::tests::on_each(|| step(&numbers(2)));
            for (instructions, found) in &results {
                assert_eq!(found, &results[0].1, "{n} numbers on {instructions:?}");
            }
            // a row that was never looked up is decayed, no more
            let untouched = step(&vec![0.0; n]);
            for (found, before) in untouched.iter().zip(numbers(1)) {
                assert_eq!(f32::from_bits(*found), before * how.keep);
            }
        }
    }
}
