//! The sum of a step's gradients over all processes: whole matrices, and of tables the rows that one of them looked up.

use candle_core::{DType, Device, Tensor};

use super::gradients::{Gradients, Group};
use crate::Result;
use crate::eager::Params;
use crate::eager::kernels::gradient::GradientRows;
use crate::world::World;

/// Adds the gradients of all processes up, in the order of their ranks; a process without any adds nothing.
///
/// # Errors
/// Another process can't be reached.
pub fn sum_gradients(world: &dyn World, params: &Params, gradients: &mut Gradients) -> Result<()> {
    if world.size() == 1 {
        return Ok(());
    }
    match gradients {
        Gradients::Slots => sum_slots(world, params),
        Gradients::Flat(sums) => {
            if sums.is_empty() {
                let device = params.trainable().next().map_or(Device::Cpu, |own| own.var.device().clone());
                let zeros = |group: &Group| Tensor::zeros(group.numel(), DType::F32, &device);
                *sums = Group::all(params).iter().map(zeros).collect::<candle_core::Result<_>>()?;
            }
            sums.iter_mut().try_for_each(|sum| {
                *sum = world.sum_tensor(sum)?;
                Ok(())
            })
        }
    }
}

fn sum_slots(world: &dyn World, params: &Params) -> Result<()> {
    let own: Vec<GradientRows> = params.trainable().map(|own| own.gradient.lock().rows().clone()).collect();
    let mut union = vec![GradientRows::None; own.len()];
    for theirs in world.gather(&encoded(&own))? {
        for (all, theirs) in union.iter_mut().zip(decoded(&theirs, own.len())?) {
            *all = joined(std::mem::replace(all, GradientRows::None), theirs);
        }
    }
    let mut values = Vec::new();
    for (own, rows) in params.trainable().zip(&union) {
        own.gradient.lock().copy_rows(rows, &mut values);
    }
    world.sum(&mut values)?;
    let mut rest = &values[..];
    for (own, rows) in params.trainable().zip(union) {
        rest = own.gradient.lock().set_rows(rows, rest);
    }
    Ok(())
}

/// The rows that one or the other has.
fn joined(a: GradientRows, b: GradientRows) -> GradientRows {
    match (a, b) {
        (GradientRows::None, other) | (other, GradientRows::None) => other,
        (GradientRows::All, _) | (_, GradientRows::All) => GradientRows::All,
        (GradientRows::Some(mut rows), GradientRows::Some(more)) => {
            rows.extend(more);
            rows.sort_unstable();
            rows.dedup();
            GradientRows::Some(rows)
        }
    }
}

/// A parameter's rows as numbers: 0 for none, 1 for all, else how many there are and 2, and the rows.
fn encoded(all: &[GradientRows]) -> Vec<u8> {
    let mut numbers: Vec<u32> = Vec::new();
    for rows in all {
        match rows {
            GradientRows::None => numbers.push(0),
            GradientRows::All => numbers.push(1),
            GradientRows::Some(rows) => {
                numbers.push(rows.len() as u32 + 2);
                numbers.extend(rows);
            }
        }
    }
    numbers.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn decoded(bytes: &[u8], count: usize) -> Result<Vec<GradientRows>> {
    let mut numbers = bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let mut next = || numbers.next().ok_or_else(|| anyhow::anyhow!("another process trains another model"));
    (0..count)
        .map(|_| {
            Ok(match next()? {
                0 => GradientRows::None,
                1 => GradientRows::All,
                more => GradientRows::Some((2..more).map(|_| next()).collect::<Result<_>>()?),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::eager::Init;
    use crate::eager::kernels::Gradient;
    use crate::model::ops::At;
    use crate::world::tests::each;

    #[test]
    fn rows_of_all_processes_are_added_up_and_the_same_in_each() {
        let list = vec![
            At::body("table").table(5, 2).weight,
            At::body("map").linear(2, 2).weight,
            At::body("none").linear(2, 1).weight,
        ];
        let found = each(3, |world| {
            let params = Params::from_scratch(&list, Init { seed: 1, std: 0.1 }, &Device::Cpu).unwrap();
            let slots = params.gradients();
            for turn in 0..2 {
                slots.iter().for_each(|slot| slot.lock().clear());
                match world.rank() {
                    0 => slots[0].add_rows(&[4, 1], &[1.0, 2.0, 3.0, 4.0]),
                    1 => slots[0].add_rows(&[1], &[10.0, 20.0]),
                    _ => {} // had no micro-batch
                }
                if world.rank() != 2 {
                    slots[1].add_values(&[1.0, 2.0, 3.0, (turn * 100) as f32]);
                }
                sum_gradients(world, &params, &mut Gradients::Slots).unwrap();
            }
            let told = |slot: &Arc<Gradient>| {
                let slot = slot.lock();
                (slot.rows().clone(), slot.dense())
            };
            slots.iter().map(told).collect::<Vec<_>>()
        });
        assert_eq!(found[0][0].0, GradientRows::Some(vec![1, 4]));
        assert_eq!(found[0][0].1.as_deref(), Some(&[0.0, 0.0, 13.0, 24.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0][..]));
        assert_eq!(found[0][1].1.as_deref(), Some(&[2.0, 4.0, 6.0, 200.0][..]));
        assert_eq!(found[0][2].0, GradientRows::None);
        assert!(found[1] == found[0] && found[2] == found[0]);
    }

    #[test]
    fn rows_are_read_back_as_they_were_written() {
        let rows = [
            GradientRows::None,
            GradientRows::Some(vec![]),
            GradientRows::All,
            GradientRows::Some(vec![7, 9]),
        ];
        assert_eq!(decoded(&encoded(&rows), 4).unwrap(), rows);
        assert!(decoded(&encoded(&rows), 5).is_err());
    }
}
