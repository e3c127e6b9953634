//! The gradients of a step: in the parameters' slots, or on candle's tape → what the optimizer takes, and their norms.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::eager::Params;
use crate::eager::kernels::gradient::GradientRows;

/// Numbers of one group (64 MiB), where that is more than one parameter: what is computed of a group at a time stays
/// small beside a step's activations.
const GROUP: usize = 1 << 24;

/// Where the gradients of a step are.
pub enum Gradients {
    /// In the parameters' slots, where fused operations put them.
    Slots,
    /// In a tensor a group of parameters, end to end; none before the first.
    Flat(Vec<Tensor>),
}

/// Parameters whose numbers stand end to end in one tensor, so that one operation is for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group(Vec<Member>);

/// A parameter of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its place among those that are trained.
    pub place: usize,
    pub numel: usize,
}

impl Group {
    /// Those that are trained, in groups: first those that decay, then the others, so that what is alike is together.
    pub fn all(params: &Params) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for decays in [true, false] {
            let own = params.trainable().enumerate().filter(|(_, own)| own.param.role.decays() == decays);
            for member in own.map(|(place, own)| Member { place, numel: own.param.numel() }) {
                match groups.last_mut() {
                    Some(group) if group.numel() + member.numel <= GROUP => group.0.push(member),
                    _ => groups.push(Self(vec![member])),
                }
            }
        }
        groups
    }

    /// Its parameters, in the order of their numbers.
    pub fn members(&self) -> &[Member] {
        &self.0
    }

    /// How many numbers it has.
    pub fn numel(&self) -> usize {
        self.0.iter().map(|member| member.numel).sum()
    }

    /// Its parameters' parts of its numbers, each with its place.
    pub fn parts<'a, T>(&'a self, numbers: &'a [T]) -> impl Iterator<Item = (usize, &'a [T])> {
        let mut rest = numbers;
        self.0.iter().map(move |member| {
            let (own, others) = rest.split_at(member.numel);
            rest = others;
            (member.place, own)
        })
    }

    /// The numbers of some members, (N), of the tensors of all that are trained.
    pub fn flat(members: &[Member], of: impl Fn(usize) -> Tensor) -> Result<Tensor> {
        let parts: Vec<Tensor> = members
            .iter()
            .map(|member| of(member.place).flatten_all())
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

impl Gradients {
    /// Gradients on candle's tape, in the order of the parameters that are trained.
    pub fn flat(params: &Params, of: &[Tensor]) -> Result<Self> {
        let flat = |group: &Group| Ok(Group::flat(group.members(), |place| of[place].clone())?.detach());
        Ok(Self::Flat(Group::all(params).iter().map(flat).collect::<Result<_>>()?))
    }

    /// Adds those of another micro-batch, which are of the same kernels.
    pub fn add(&mut self, more: Self) -> Result<()> {
        match (self, more) {
            (Self::Slots, Self::Slots) => {}
            (Self::Flat(sums), Self::Flat(more)) if sums.is_empty() => *sums = more,
            (Self::Flat(sums), Self::Flat(more)) => {
                for (sum, more) in sums.iter_mut().zip(more) {
                    *sum = (&*sum + more)?;
                }
            }
            _ => anyhow::bail!("gradients of different kernels are added"),
        }
        Ok(())
    }

    /// The Euclidean norm of all of them together. Of tensors, one number a group comes to the host.
    pub fn norm(&self, params: &Params) -> Result<f64> {
        match self {
            Self::Slots => Ok(together(&self.norms(params)?)),
            Self::Flat(groups) => Ok(squares(groups.iter().cloned())?.into_iter().sum::<f64>().sqrt()),
        }
    }

    /// That of each trained parameter's gradient.
    pub fn norms(&self, params: &Params) -> Result<Vec<f64>> {
        match self {
            Self::Slots => Ok(params.trainable().map(|own| own.gradient.lock().squares().sqrt()).collect()),
            Self::Flat(flat) => {
                let groups = Group::all(params);
                let (mut places, mut parts) = (Vec::new(), Vec::new());
                for (group, flat) in groups.iter().zip(flat) {
                    let mut at = 0;
                    for member in group.members() {
                        places.push(member.place);
                        parts.push(flat.narrow(0, at, member.numel)?);
                        at += member.numel;
                    }
                }
                let mut norms = vec![0.0; places.len()];
                places
                    .into_iter()
                    .zip(squares(parts.into_iter())?)
                    .for_each(|(at, sum)| norms[at] = sum.sqrt());
                Ok(norms)
            }
        }
    }

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
            Self::Flat(flat) => {
                let mut shares = vec![0.0; params.trainable().count()];
                for (group, flat) in Group::all(params).iter().zip(flat) {
                    let numbers: Vec<f32> = flat.to_dtype(DType::F32)?.to_vec1()?;
                    group.parts(&numbers).for_each(|(at, own)| shares[at] = share(counted(own), own.len()));
                }
                Ok(shares)
            }
        }
    }
}

/// The sum of the squares of each tensor, which come to the host together.
fn squares(tensors: impl Iterator<Item = Tensor>) -> Result<Vec<f64>> {
    let sums =
        tensors.map(|x| x.to_dtype(DType::F32)?.sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    Ok(Tensor::stack(&sums, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// The norm of all, from that of each.
fn together(norms: &[f64]) -> f64 {
    norms.iter().map(|norm| norm.powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Device;

    use super::*;
    use crate::eager::Init;
    use crate::model::ops::At;

    /// A matrix with its bias, and a table behind them: the bias does not decay, so its numbers stand behind the table's.
    pub fn params() -> Params {
        let map = At::body("map").linear(3, 2);
        let list = [map.weight, map.bias.unwrap(), At::body("table").table(4, 2).weight];
        Params::from_scratch(&list, Init { seed: 1, std: 0.1 }, &Device::Cpu).unwrap()
    }

    fn tensors() -> Vec<Tensor> {
        let of = |first: f32, numel: usize, shape: &[usize]| {
            let numbers = (0..numel).map(|i| if i == 0 { 0.0 } else { first + i as f32 }).collect();
            Tensor::from_vec::<_, f32>(numbers, shape, &Device::Cpu).unwrap()
        };
        vec![of(1.0, 6, &[2, 3]), of(10.0, 2, &[2]), of(-20.0, 8, &[4, 2])]
    }

    #[test]
    fn what_stands_in_groups_is_told_of_each_parameter_in_its_place() {
        let params = params();
        let places: Vec<Vec<usize>> = Group::all(&params)
            .iter()
            .map(|group| group.members().iter().map(|member| member.place).collect())
            .collect();
        assert_eq!(places, [[0, 2, 1]]);
        let mut gradients = Gradients::Flat(Vec::new());
        gradients.add(Gradients::flat(&params, &tensors()).unwrap()).unwrap();
        gradients.add(Gradients::flat(&params, &tensors()).unwrap()).unwrap();
        let of = |x: &Tensor| {
            let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
            numbers.iter().map(|&x| f64::from(2.0 * x).powi(2)).sum::<f64>().sqrt()
        };
        let wanted: Vec<f64> = tensors().iter().map(of).collect();
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
        let found = gradients.norms(&params).unwrap();
        assert!(found.iter().zip(&wanted).all(|(&a, &b)| near(a, b)), "{found:?} and {wanted:?}");
        assert!(near(gradients.norm(&params).unwrap(), together(&wanted)));
        assert_eq!(gradients.zeros(&params).unwrap(), [1.0 / 6.0, 0.5, 0.125]);
        assert!(gradients.add(Gradients::Slots).is_err());
    }
}
