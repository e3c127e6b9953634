//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with gradient clipping: gradients → changed parameters.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::Result;
use crate::eager::Params;
use crate::eager::kernels::{CHUNK, Kernels, Numbers, numbers, simd};

/// AdamW's constants; the learning rate comes with each step.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// AdamW's state: for each parameter the running means of its gradient and of the gradient's square.
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
    /// A fresh state for the given parameters.
    pub fn new(constants: Constants, params: &Params) -> Result<Self> {
        let kernels =
            params.iter().next().map_or(Kernels::Fused, |(_, var)| Kernels::of(var.device(), var.dtype()));
        Self::with_kernels(constants, params, kernels)
    }

    /// The same with the given form of the update.
    pub fn with_kernels(constants: Constants, params: &Params, kernels: Kernels) -> Result<Self> {
        let moments = params
            .iter()
            .map(|(param, var)| {
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

    /// Changes every parameter by its gradient times `clip`. Gradients stand in the order of the parameters.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &[Tensor],
        learning_rate: f64,
        clip: f64,
    ) -> Result<()> {
        self.step += 1;
        let Constants { beta1, beta2, eps, weight_decay } = self.constants;
        let exponent = self.step as i32;
        for (((param, var), gradient), moments) in params.iter().zip(gradients).zip(&mut self.moments) {
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
            match moments {
                Moments::Host(means) => {
                    var.as_tensor().inplace_op2(&gradient.contiguous()?, &Fused { update, means })?;
                }
                Moments::Device(mean, square) => update.composite(var, gradient, mean, square)?,
            }
        }
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// The running means of every parameter, in order: (of the gradient, of its square).
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

struct Fused<'a> {
    update: Update,
    means: &'a Mutex<(Vec<f32>, Vec<f32>)>,
}

impl InplaceOp2 for Fused<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        weights_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        let gradient = numbers(gradient, gradient_layout)?;
        let (CpuStorage::F32(weights), Some((start, end))) = (weights, weights_layout.contiguous_offsets())
        else {
            candle_core::bail!("the fused AdamW takes contiguous f32 parameters");
        };
        let mut means = self.means.lock().unwrap_or_else(|broken| broken.into_inner());
        let (mean, square) = &mut *means;
        weights[start..end]
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK)))
            .for_each(|((weights, gradient), (mean, square))| {
                update(weights, gradient, mean, square, self.update)
            });
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

/// The Euclidean norm over all gradients together.
pub fn global_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut total = 0.0;
    for gradient in gradients {
        total += match Kernels::of(gradient.device(), gradient.dtype()) {
            Kernels::Fused => {
                let gradient = gradient.contiguous()?;
                let values = Numbers::of(&gradient)?;
                let parts: Vec<f64> =
                    values.par_chunks(CHUNK).map(|chunk| f64::from(sum_of_squares(chunk))).collect();
                parts.iter().sum()
            }
            Kernels::Composite => {
                f64::from(gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?)
            }
        };
    }
    Ok(total.sqrt())
}

simd::vectorised! {
    fn sum_of_squares(values: &[f32]) -> f32 {
        simd::sum(values.len(), |i| values[i] * values[i])
    }
}

/// The factor that brings a norm down to `max`, as `torch.nn.utils.clip_grad_norm_` computes it; 1 where
/// `max` is 0.
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
}
