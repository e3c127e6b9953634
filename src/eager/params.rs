//! A definition's parameters as candle variables, in the order of the manifest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::kernels::{Gradient, Kernels, Weight};
use crate::Result;
use crate::checkpoint::{self, Fit, Weights};
use crate::model::ops::{Param, Role};

/// Named variables, f32, each with a slot for its gradient.
pub struct Params {
    list: Vec<(Param, Var)>,
    gradients: Vec<Arc<Gradient>>,
    /// Those that no step changes.
    frozen: Vec<bool>,
    index: BTreeMap<String, usize>,
}

/// A parameter that training changes.
pub struct Trainable<'a> {
    pub param: &'a Param,
    pub var: &'a Var,
    /// Where fused operations add its gradient up.
    pub gradient: &'a Gradient,
}

impl Params {
    /// Takes every parameter from a checkpoint; those of the head that it lacks are drawn anew.
    ///
    /// # Errors
    /// The checkpoint does not fit; see [`Weights::fit`].
    pub fn load(params: &[Param], weights: &Weights, init: Init, device: &Device) -> Result<(Self, Fit)> {
        let fit = weights.fit(params)?;
        let list = params
            .iter()
            .map(|param| {
                let values = if fit.new.contains(&param.name) {
                    init.draw(param)
                } else {
                    weights.f32(&param.name)?.into_owned()
                };
                Ok((param.clone(), variable(values, &param.shape, device)?))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok((Self::new(list), fit))
    }

    /// Draws every parameter anew.
    pub fn from_scratch(params: &[Param], init: Init, device: &Device) -> Result<Self> {
        let list = params
            .iter()
            .map(|param| Ok((param.clone(), variable(init.draw(param), &param.shape, device)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::new(list))
    }

    fn new(list: Vec<(Param, Var)>) -> Self {
        let index = list.iter().enumerate().map(|(i, (param, _))| (param.name.clone(), i)).collect();
        let gradients = list.iter().map(|(param, _)| Arc::new(Gradient::new(&param.shape))).collect();
        let frozen = vec![false; list.len()];
        Self { list, gradients, frozen, index }
    }

    /// Leaves parameters as they are from now on: they have no gradient, and the optimizer holds nothing for them.
    pub fn freeze(&mut self, which: impl Fn(&Param) -> bool) {
        for ((param, _), frozen) in self.list.iter().zip(&mut self.frozen) {
            *frozen |= which(param);
        }
    }

    /// Whether no step changes the parameter of this name.
    pub fn is_frozen(&self, name: &str) -> bool {
        self.index.get(name).is_some_and(|&at| self.frozen[at])
    }

    /// Those that training changes, in the order of the manifest.
    pub fn trainable(&self) -> impl Iterator<Item = Trainable<'_>> {
        let all = self.list.iter().zip(&self.gradients).zip(&self.frozen);
        all.filter(|(_, frozen)| !**frozen).map(|(((param, var), gradient), _)| Trainable {
            param,
            var,
            gradient,
        })
    }

    /// The slots that fused operations add gradients up in, in the order of the manifest.
    pub fn gradients(&self) -> &[Arc<Gradient>] {
        &self.gradients
    }

    /// A parameter for an operation, whose gradient is to be found in its slot (fused), on candle's tape
    /// (composite), or nowhere.
    pub fn weight(&self, name: &str, tracked: bool, kernels: Kernels) -> Result<Weight> {
        let at = self.at(name)?;
        let var = &self.list[at].1;
        Ok(match (tracked && !self.frozen[at], kernels) {
            (false, _) => Weight { values: var.as_detached_tensor(), gradient: None },
            (true, Kernels::Composite) => Weight { values: var.as_tensor().clone(), gradient: None },
            (true, Kernels::Fused) => {
                Weight { values: var.as_detached_tensor(), gradient: Some(self.gradients[at].clone()) }
            }
        })
    }

    fn at(&self, name: &str) -> Result<usize> {
        self.index.get(name).copied().with_context(|| format!("no parameter {name}"))
    }

    /// The variable of this name.
    ///
    /// # Errors
    /// The definition used a name that the manifest did not list.
    pub fn get(&self, name: &str) -> Result<&Var> {
        Ok(&self.list[self.at(name)?].1)
    }

    /// All of them, in the order of the manifest.
    pub fn iter(&self) -> impl Iterator<Item = (&Param, &Var)> {
        self.list.iter().map(|(param, var)| (param, var))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many numbers they hold together.
    pub fn numel(&self) -> usize {
        self.list.iter().map(|(param, _)| param.numel()).sum()
    }

    /// A copy of the values of those that training changes, in the order of the manifest.
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.trainable().map(|own| numbers(own.var)).collect()
    }

    /// Replaces them by such a copy.
    pub fn set_values(&self, values: &[Vec<f32>]) -> Result<()> {
        for (Trainable { param, var, .. }, values) in self.trainable().zip(values) {
            var.set(&Tensor::from_slice(values, param.shape.as_slice(), var.device())?)?;
        }
        Ok(())
    }

    /// Writes all of them as a checkpoint that transformers loads.
    pub fn save(&self, path: &Path) -> Result<()> {
        write(path, self.iter())
    }

    /// Writes those that training changes.
    pub fn save_trainable(&self, path: &Path) -> Result<()> {
        write(path, self.trainable().map(|own| (own.param, own.var)))
    }
}

fn numbers(var: &Var) -> Result<Vec<f32>> {
    Ok(var.flatten_all()?.to_vec1()?)
}

fn write<'a>(path: &Path, params: impl Iterator<Item = (&'a Param, &'a Var)>) -> Result<()> {
    let tensors = params.map(|(param, var)| Ok((param, numbers(var)?))).collect::<Result<Vec<_>>>()?;
    let named = tensors
        .iter()
        .map(|(param, values)| (param.name.as_str(), param.shape.as_slice(), values.as_slice()));
    checkpoint::write_safetensors(path, named)
}

fn variable(values: Vec<f32>, shape: &[usize], device: &Device) -> Result<Var> {
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?.to_device(device)?;
    Ok(Var::from_tensor(&tensor)?)
}

/// How new parameters are drawn: as transformers' models do, matrices and tables from N(0, std²), biases 0,
/// layer norms' scales 1; GPT-2's maps into the residual
/// stream with less; LoRA's as PEFT's, A from U(±1/√in) and B 0. Each parameter has a stream of its own, so one more changes no other.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    pub seed: u64,
    /// The configuration's `initializer_range`.
    pub std: f64,
}

impl Init {
    /// A parameter's own stream of random numbers.
    fn stream(&self, param: &Param) -> ChaCha8Rng {
        let mixed = |hash, byte| super::kernels::dropout::mix(hash ^ u64::from(byte));
        ChaCha8Rng::seed_from_u64(param.name.bytes().fold(self.seed, mixed))
    }

    fn draw(&self, param: &Param) -> Vec<f32> {
        let n = param.numel();
        match param.role {
            Role::Bias => vec![0.0; n],
            Role::Scale => vec![1.0; n],
            Role::LoraB => vec![0.0; n],
            Role::LoraA => {
                let bound = 1.0 / (param.shape[1] as f64).sqrt();
                let mut rng = self.stream(param);
                (0..n).map(|_| ((2.0 * uniform(&mut rng) - 1.0) * bound) as f32).collect()
            }
            Role::Matrix | Role::Table => {
                let mut rng = self.stream(param);
                let std = self.std / (param.summands as f64).sqrt();
                (0..n).map(|_| (normal(&mut rng) * std) as f32).collect()
            }
        }
    }
}

/// A number between 0 and 1.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// A standard normal number, by Box and Muller's transform.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (a, b) = (uniform(rng), uniform(rng));
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::At;

    #[test]
    fn maps_into_the_residual_stream_are_drawn_smaller() {
        let init = Init { seed: 1, std: 0.02 };
        let spread = |summands: usize| {
            let weight = At::body("x").conv1d(100, 100).one_of(summands).weight;
            let values = init.draw(&weight);
            (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt()
        };
        assert!((spread(1) / 0.02 - 1.0).abs() < 0.03);
        assert!((spread(24) * 24f32.sqrt() / 0.02 - 1.0).abs() < 0.03);
    }
}
