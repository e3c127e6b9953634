//! Rows in another order, with gaps, in one operation; its gradient is the same in the order before.
//!
//! candle adds the gradient of rows by id up in the order of the ids, which on a GPU is done by one thread a channel:
//! an id may come twice. Here none does, so the gradient's rows are looked up in turn.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor};

/// An id that is no row's: candle's operations put zeros there.
pub const NONE: u32 = u32::MAX;

/// An order of rows, where each comes once.
#[derive(Clone)]
pub struct Order {
    /// The row that comes to each place, or [`NONE`]. (S)
    from: Tensor,
    /// The place of each row. (R)
    to: Tensor,
}

impl Order {
    /// From the row of each place, of so many rows.
    pub fn new(from: Vec<u32>, rows: usize, device: &Device) -> Result<Self> {
        let mut to = vec![NONE; rows];
        for (place, &row) in from.iter().enumerate().filter(|(_, row)| **row != NONE) {
            match to.get_mut(row as usize) {
                Some(to) if *to == NONE => *to = place as u32,
                _ => candle_core::bail!("row {row} of {rows} is put in order twice, or is none"),
            }
        }
        let places = from.len();
        Ok(Self { from: Tensor::from_vec(from, places, device)?, to: Tensor::from_vec(to, rows, device)? })
    }

    /// The row of each place.
    pub fn from(&self) -> &Tensor {
        &self.from
    }

    /// (R, C) → (S, C), zeros where no row comes.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(Reordered { from: self.from.clone(), to: self.to.clone() })
    }

    /// (S, C) → (R, C).
    pub fn back(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(Reordered { from: self.to.clone(), to: self.from.clone() })
    }
}

/// Sequences that stand back to back, (T, C), side by side, (B, N, C): `padding` stands behind each one's end, up to the
/// longest's.
///
/// # Errors
/// T is not the sum of the lengths.
pub fn side_by_side(x: &Tensor, lengths: &[usize], padding: f32) -> Result<Tensor> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let (mut places, mut first) = (Vec::with_capacity(lengths.len() * longest), 0);
    for &length in lengths {
        places.extend((0..longest).map(|i| if i < length { (first + i) as u32 } else { NONE }));
        first += length;
    }
    let absent: Vec<f32> = places.iter().map(|&place| if place == NONE { padding } else { 0.0 }).collect();
    let rows = Order::new(places, first, x.device())?.apply(x)?.reshape((lengths.len(), longest, ()))?;
    if padding == 0.0 {
        return Ok(rows);
    }
    rows.broadcast_add(&Tensor::from_vec(absent, (lengths.len(), longest, 1), x.device())?)
}

struct Reordered {
    from: Tensor,
    to: Tensor,
}

impl Reordered {
    fn run<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        ids: impl FnOnce(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (storage, of_ids) = self.from.storage_and_layout();
        let Some(ids) = ids(&storage) else { candle_core::bail!("rows and their order are on two devices") };
        let shape = (of_ids.dims()[0], layout.shape().dims2()?.1);
        Ok((x.index_select(ids, layout, of_ids, 0)?, shape.into()))
    }
}

impl CustomOp1 for Reordered {
    fn name(&self) -> &'static str {
        "reordered rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout, |ids| if let Storage::Cpu(ids) = ids { Some(ids) } else { None })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run(x, layout, |ids| if let Storage::Cuda(ids) = ids { Some(ids) } else { None })
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.index_select(&self.to, 0).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn rows_come_back_from_another_order_and_so_do_their_gradients() {
        let device = Device::Cpu;
        let order = Order::new(vec![2, NONE, 0, 1, NONE], 3, &device).unwrap();
        let x = Var::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &device).unwrap();
        let y = order.apply(x.as_tensor()).unwrap();
        let wanted = [[5f32, 6.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]];
        assert_eq!(y.to_vec2::<f32>().unwrap(), wanted);
        assert_eq!(order.back(&y).unwrap().to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
        let weights = Tensor::new(&[[1f32], [10.0], [100.0], [1000.0], [10000.0]], &device).unwrap();
        let store = y.broadcast_mul(&weights).unwrap().sum_all().unwrap().backward().unwrap();
        let gradient = store.get(x.as_tensor()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(gradient, [[100.0, 100.0], [1000.0, 1000.0], [1.0, 1.0]]);
        assert!(Order::new(vec![0, 0], 1, &device).is_err());
        assert!(Order::new(vec![1], 1, &device).is_err());
    }
}
