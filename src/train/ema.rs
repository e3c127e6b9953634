//! Averages of the weights over the steps: the weights behind each step → what is evaluated and saved with `--ema`.

use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::Result;
use crate::eager::Params;
use crate::eager::kernels::{CHUNK, Numbers, simd};

/// The exponential moving average of every parameter that is trained. As in `torch.optim.swa_utils` (`AveragedModel` with
/// `get_ema_multi_avg_fn`), the weights behind the first step are its start, so nothing leans to 0; from then on
/// `average ← average + (1 − decay) · (weight − average)` behind each step.
pub struct Ema {
    decay: f64,
    /// In the order of the parameters that are trained; none before the first step.
    averages: Vec<Average>,
}

enum Average {
    /// On the CPU: plain numbers.
    Host(Vec<f32>),
    /// Elsewhere: a tensor.
    Device(Tensor),
}

impl Ema {
    /// Averages that have seen no step.
    pub fn new(decay: f64) -> Self {
        Self { decay, averages: Vec::new() }
    }

    /// Moves the averages towards the parameters, behind a step.
    pub fn update(&mut self, params: &Params) -> Result<()> {
        if self.averages.is_empty() {
            return self.restore(params, params.values()?);
        }
        let share = 1.0 - self.decay;
        for (average, own) in self.averages.iter_mut().zip(params.trainable()) {
            match average {
                Average::Host(average) => {
                    let weights = Numbers::of(own.var.as_tensor())?;
                    let weights: &[f32] = &weights;
                    average
                        .par_chunks_mut(CHUNK)
                        .zip(weights.par_chunks(CHUNK))
                        .for_each(|(average, weights)| moved(average, weights, share as f32));
                }
                Average::Device(average) => {
                    let moved = ((own.var.as_detached_tensor() - &*average)? * share)?;
                    *average = (&*average + moved)?.detach();
                }
            }
        }
        Ok(())
    }

    /// The averages, in the order of the parameters that are trained.
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        let values = |average: &Average| match average {
            Average::Host(values) => Ok(values.clone()),
            Average::Device(values) => Ok(values.flatten_all()?.to_vec1()?),
        };
        self.averages.iter().map(values).collect()
    }

    /// Goes on from such averages.
    pub fn restore(&mut self, params: &Params, values: Vec<Vec<f32>>) -> Result<()> {
        let average = |(values, var): (Vec<f32>, &Var)| match var.device().is_cpu() {
            true => Ok(Average::Host(values)),
            false => Ok(Average::Device(Tensor::from_vec(values, var.shape(), var.device())?)),
        };
        self.averages = values
            .into_iter()
            .zip(params.trainable().map(|own| own.var))
            .map(average)
            .collect::<Result<_>>()?;
        Ok(())
    }

    /// Has work done with the averages as the parameters, which are what they were behind it.
    ///
    /// # Errors
    /// Those of the work.
    pub fn instead<T>(&self, params: &Params, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let weights = params.values()?;
        params.set_values(&self.values()?)?;
        let done = work();
        params.set_values(&weights)?;
        done
    }
}

simd::vectorised! {
    fn moved(average: &mut [f32], weights: &[f32], share: f32) {
        for (average, weight) in average.iter_mut().zip(weights) {
            *average += share * (weight - *average);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::eager::Init;
    use crate::model::ops::At;

    /// Numbers of PyTorch 2: `avg = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(decay))`, and behind each of the
    /// weights below `avg.update_parameters(m)`.
    #[test]
    fn averages_are_pytorchs() {
        let weights = [[1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -0.5, 3.0], [0.25, 4.0, 7.0, -3.0]];
        for (decay, wanted) in [
            (0.9, [[1.1, -1.7, 0.4, 3.0], [1.015, -1.13, 1.06, 2.4]]),
            (0.25, [[1.75, 0.25, -0.25, 3.0], [0.625, 3.0625, 5.1875, -1.5]]),
        ] {
            let list = [At::body("x").to("map").linear(2, 2).weight];
            let params = Params::from_scratch(&list, Init { seed: 1, std: 0.02 }, &Device::Cpu).unwrap();
            let mut ema = Ema::new(decay);
            for (i, weights) in weights.iter().enumerate() {
                params.set_values(&[weights.to_vec()]).unwrap();
                ema.update(&params).unwrap();
                let wanted = if i == 0 { *weights } else { wanted[i - 1] };
                let found = &ema.values().unwrap()[0];
                for (found, wanted) in found.iter().zip(wanted) {
                    assert!((found - wanted).abs() < 1e-6, "{decay}: {found} and {wanted}");
                }
            }
            let seen = ema.instead(&params, || params.values()).unwrap();
            assert_eq!(seen, ema.values().unwrap());
            assert_eq!(params.values().unwrap(), [weights[2].to_vec()]);
        }
    }
}
