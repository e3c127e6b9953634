//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with gradient clipping: gradients → changed parameters.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;

use super::gradients::{Gradients, Group, Member};
use crate::Result;
use crate::eager::kernels::gradient::{GradientRows, GradientSlot};
use crate::eager::kernels::{CHUNK, Kernels, simd};
use crate::eager::{Params, Trainable};
use crate::model::ops::{Param, Role};

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
    moments: Moments,
}

enum Moments {
    /// On the CPU: plain numbers of each parameter, updated with it in one pass.
    Host(Vec<Mutex<HostMeans>>),
    /// Elsewhere: tensors of several parameters, end to end.
    Device(Vec<Means>),
}

/// The running means of a parameter.
struct HostMeans {
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Of each row, of so many numbers, whether it has a mean: that of a row of a table that was never looked up is zero, and
    /// nothing of it is read. All rows have, where there are none here.
    rows: Vec<bool>,
}

impl HostMeans {
    fn zeros(param: &Param) -> Self {
        let zeros = vec![0.0; param.numel()];
        let rows = if param.role == Role::Table { vec![false; param.shape[0]] } else { Vec::new() };
        Self { mean: zeros.clone(), square: zeros, rows }
    }

    fn set(&mut self, mean: Vec<f32>, square: Vec<f32>) {
        let width = mean.len().checked_div(self.rows.len()).unwrap_or(0).max(1);
        let has = |(mean, square): (&[f32], &[f32])| mean.iter().chain(square).any(|&x| x != 0.0);
        let parts = mean.chunks(width).zip(square.chunks(width));
        self.rows.iter_mut().zip(parts.map(has)).for_each(|(row, has)| *row = has);
        (self.mean, self.square) = (mean, square);
    }
}

/// The running means of a group of parameters, (N) each.
struct Means {
    group: Group,
    mean: Tensor,
    square: Tensor,
}

impl AdamW {
    /// A fresh state for the given parameters and form of the update.
    pub fn new(constants: Constants, params: &Params, kernels: Kernels) -> Result<Self> {
        let moments = match kernels {
            Kernels::Fused => {
                Moments::Host(params.trainable().map(|own| Mutex::new(HostMeans::zeros(own.param))).collect())
            }
            Kernels::Composite => {
                let means = |group: Group| {
                    let device =
                        params.trainable().next().map_or(Device::Cpu, |own| own.var.device().clone());
                    let zeros = Tensor::zeros(group.numel(), DType::F32, &device)?;
                    Ok(Means { group, mean: zeros.clone(), square: zeros })
                };
                Moments::Device(Group::all(params).into_iter().map(means).collect::<Result<_>>()?)
            }
        };
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
        let own: Vec<Trainable> = params.trainable().collect();
        let update = |place: usize| {
            let learning_rate = learning_rate(place);
            let decay = if own[place].param.role.decays() { weight_decay } else { 0.0 };
            Update {
                clip: clip as f32,
                beta1: beta1 as f32,
                one_less_beta1: (1.0 - beta1) as f32,
                beta2: beta2 as f32,
                one_less_beta2: (1.0 - beta2) as f32,
                keep: (1.0 - learning_rate * decay) as f32,
                rate: (learning_rate / (1.0 - beta1.powi(exponent))) as f32,
                scale: (1.0 / (1.0 - beta2.powi(exponent)).sqrt()) as f32,
                eps: eps as f32,
            }
        };
        match (&mut self.moments, gradients) {
            (Moments::Host(all), Gradients::Slots) => {
                for (place, (means, Trainable { var, gradient, .. })) in all.iter_mut().zip(&own).enumerate()
                {
                    let mut slot = gradient.lock();
                    let means = means.get_mut().unwrap_or_else(|broken| broken.into_inner());
                    let fused = Fused { update: update(place), slot: &slot, means: Mutex::new(means) };
                    var.as_tensor().inplace_op1(&fused)?;
                    slot.clear();
                }
            }
            (Moments::Device(all), Gradients::Flat(gradients)) => {
                anyhow::ensure!(all.len() == gradients.len(), "AdamW on parameters without a gradient");
                all.iter_mut()
                    .zip(gradients)
                    .try_for_each(|(means, gradient)| means.step(&own, gradient, update))?;
            }
            _ => anyhow::bail!("the optimizer and the gradients are of different kernels"),
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
        match &self.moments {
            Moments::Host(all) => {
                let numbers = |means: &Mutex<HostMeans>| {
                    let means = means.lock().unwrap_or_else(|broken| broken.into_inner());
                    (means.mean.clone(), means.square.clone())
                };
                Ok(all.iter().map(numbers).collect())
            }
            Moments::Device(all) => {
                let mut state =
                    vec![(Vec::new(), Vec::new()); all.iter().map(|of| of.group.members().len()).sum()];
                for Means { group, mean, square } in all {
                    let (mean, square) = (mean.to_vec1::<f32>()?, square.to_vec1::<f32>()?);
                    group.parts(&mean).for_each(|(place, own)| state[place].0 = own.to_vec());
                    group.parts(&square).for_each(|(place, own)| state[place].1 = own.to_vec());
                }
                Ok(state)
            }
        }
    }

    /// Goes on from a state that was taken after `step` steps.
    ///
    /// # Errors
    /// It is of other parameters.
    pub fn restore(&mut self, step: usize, state: Vec<(Vec<f32>, Vec<f32>)>) -> Result<()> {
        match &mut self.moments {
            Moments::Host(all) => {
                for (means, (mean, square)) in all.iter_mut().zip(state) {
                    means.get_mut().unwrap_or_else(|broken| broken.into_inner()).set(mean, square);
                }
            }
            Moments::Device(all) => {
                let (means, squares): (Vec<_>, Vec<_>) = state.into_iter().unzip();
                for Means { group, mean, square } in all {
                    let flat = |of: &[Vec<f32>], like: &Tensor| {
                        let own = group.members().iter().filter_map(|member| of.get(member.place));
                        let numbers: Vec<f32> = own.flatten().copied().collect();
                        Tensor::from_vec(numbers, like.shape(), like.device())
                    };
                    (*mean, *square) = (flat(&means, mean)?, flat(&squares, square)?);
                }
            }
        }
        self.step = step;
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

impl Means {
    /// Changes the parameters of the group, of all that are trained. Those whose numbers are the same are changed together.
    fn step(&mut self, own: &[Trainable], gradient: &Tensor, update: impl Fn(usize) -> Update) -> Result<()> {
        let updates: Vec<(Member, Update)> =
            self.group.members().iter().map(|member| (*member, update(member.place))).collect();
        let Some((_, of_all)) = updates.first() else { return Ok(()) };
        let gradient = (gradient * f64::from(of_all.clip))?;
        let weighted = |old: &Tensor, keep: f32, new: &Tensor, share: f32| {
            (old * f64::from(keep))? + (new * f64::from(share))?
        };
        self.mean = weighted(&self.mean, of_all.beta1, &gradient, of_all.one_less_beta1)?;
        self.square = weighted(&self.square, of_all.beta2, &gradient.sqr()?, of_all.one_less_beta2)?;
        let denominator = self.square.sqrt()?.affine(f64::from(of_all.scale), f64::from(of_all.eps))?;
        let change = (&self.mean / denominator)?;
        let mut at = 0;
        let same = |(_, a): &(_, Update), (_, b): &(_, Update)| (a.keep, a.rate) == (b.keep, b.rate);
        for run in updates.chunk_by(same) {
            let members: Vec<Member> = run.iter().map(|(member, _)| *member).collect();
            let (keep, rate) = (f64::from(run[0].1.keep), f64::from(run[0].1.rate));
            let weights = Group::flat(&members, |place| own[place].var.as_detached_tensor())?;
            let numel = weights.elem_count();
            let changed = ((weights * keep)? - (change.narrow(0, at, numel)? * rate)?)?;
            let mut start = 0;
            for Member { place, numel } in members {
                let var = own[place].var;
                var.set(&changed.narrow(0, start, numel)?.reshape(var.shape())?)?;
                start += numel;
            }
            at += numel;
        }
        Ok(())
    }
}

/// The update of a parameter on the CPU, in one pass over it.
struct Fused<'a> {
    update: Update,
    slot: &'a GradientSlot,
    /// The operation is handed over by a shared reference, but is applied once.
    means: Mutex<&'a mut HostMeans>,
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
        let HostMeans { mean, square, rows: with_means } = &mut **means;
        let weights = &mut weights[start..end];
        match self.slot.rows() {
            GradientRows::None => candle_core::bail!("AdamW on a parameter without a gradient"),
            GradientRows::All => {
                with_means.fill(true);
                weights
                    .par_chunks_mut(CHUNK)
                    .zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK)))
                    .zip(self.slot.values().par_chunks(CHUNK))
                    .for_each(|((weights, (mean, square)), gradient)| {
                        update(weights, gradient, mean, square, self.update);
                    });
            }
            GradientRows::Some(rows) => {
                // no gradient of a row that was not looked up is read, but the row is decayed, and moved if it ever was
                for &row in rows {
                    if let Some(has) = with_means.get_mut(row as usize) {
                        *has = true;
                    }
                }
                let with_means = &*with_means;
                let has_means = |row: u32| with_means.get(row as usize).is_none_or(|&has| has);
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
                            if has_means(row) {
                                let gradient = if is_next { self.slot.row(row) } else { &zeros };
                                update(weights, gradient, mean, square, self.update);
                            } else {
                                scale(weights, self.update.keep);
                            }
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

simd::vectorised! {
    /// What the update is where there is neither a gradient nor a mean.
    fn scale(weights: &mut [f32], keep: f32) {
        for w in weights {
            *w *= keep;
        }
    }
}

/// The factor that brings a norm down to `max`, as `torch.nn.utils.clip_grad_norm_` computes it; 1 where
/// `max` is 0.
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eager::Init;
    use crate::model::ops::At;
    use crate::train::gradients::tests::params;

    #[test]
    fn a_state_is_the_same_numbers_in_either_form() {
        let params = params();
        let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        let numbers = |from: f32, own: &Trainable| (0..own.param.numel()).map(|i| from + i as f32).collect();
        let state: Vec<(Vec<f32>, Vec<f32>)> = params
            .trainable()
            .zip([0.0, 100.0, 200.0])
            .map(|(own, from)| (numbers(from, &own), numbers(from + 50.0, &own)))
            .collect();
        for kernels in [Kernels::Fused, Kernels::Composite] {
            let mut optimizer = AdamW::new(constants, &params, kernels).unwrap();
            optimizer.restore(7, state.clone()).unwrap();
            assert_eq!((optimizer.steps(), optimizer.state().unwrap()), (7, state.clone()), "{kernels:?}");
        }
    }

    #[test]
    fn a_row_moves_from_its_first_gradient_on_and_behind_a_resumption_too() {
        let list = [At::body("embeddings").table(4, 2).weight];
        let init = Init { seed: 1, std: 0.02 };
        let (params, again) = (
            Params::from_scratch(&list, init, &Device::Cpu).unwrap(),
            Params::from_scratch(&list, init, &Device::Cpu).unwrap(),
        );
        let constants = Constants { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        let new = |params: &Params| AdamW::new(constants, params, Kernels::Fused).unwrap();
        let step = |optimizer: &mut AdamW, params: &Params, row: u32| {
            params.gradients()[0].add_rows(&[row], &[1.0, -2.0]);
            optimizer.step(params, &Gradients::Slots, |_| 0.1, 1.0).unwrap();
            params.values().unwrap().concat()
        };
        let mut optimizer = new(&params);
        let before = params.values().unwrap().concat();
        let first = step(&mut optimizer, &params, 1);
        let kept = (1.0f64 - 0.1 * 0.1) as f32;
        let decayed =
            |row: usize, x: &[f32], of: &[f32]| (2 * row..2 * row + 2).all(|i| x[i] == of[i] * kept);
        assert!(decayed(0, &first, &before) && decayed(3, &first, &before) && !decayed(1, &first, &before));

        again.set_values(&params.values().unwrap()).unwrap();
        let mut resumed = new(&again);
        resumed.restore(1, optimizer.state().unwrap()).unwrap();
        let (second, same) = (step(&mut optimizer, &params, 3), step(&mut resumed, &again, 3));
        assert_eq!(second, same);
        assert!(!decayed(1, &second, &first), "what had a gradient goes on");
        assert!(decayed(0, &second, &first) && !decayed(3, &second, &first));
    }

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
