//! Softmax over the last axis for candle's tape, in one operation; candle's own has five, or no gradient.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::contiguous;

/// x (…, C) → (…, C), in f32. A number of −∞ becomes 0; one at least is finite in each row.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Softmax)
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = &x.as_slice::<f32>()?[contiguous(layout)?];
        let shape = layout.shape().clone();
        let width = shape.dims().last().copied().unwrap_or(0).max(1);
        let mut y = x.to_vec();
        y.par_chunks_mut(width).for_each(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|x| *x = (*x - max).exp());
            let sum: f64 = row.iter().copied().map(f64::from).sum();
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / sum) as f32);
        });
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        super::cuda::softmax(x, layout)
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let y = y.detach();
        let along = (dy * &y)?.sum_keepdim(D::Minus1)?;
        Ok(Some((dy.broadcast_sub(&along)? * y)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn softmax_and_its_gradient_are_those_of_candles_primitives() {
        let hidden = f32::NEG_INFINITY;
        let numbers = [[1f32, -2.0, 90.0, 0.5], [hidden, 3.0, hidden, 2.0], [-7.0, -7.0, -7.0, hidden]];
        let weights =
            Tensor::new(&[[1f32, 2.0, -1.0, 3.0], [0.5, 1.0, 4.0, -2.0], [1.0, 2.0, 3.0, 4.0]], &Device::Cpu);
        let weights = weights.unwrap();
        let run = |softmax: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let x = Var::new(&numbers, &Device::Cpu).unwrap();
            let y = softmax(x.as_tensor()).unwrap();
            let store = (&y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let all = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            [all(&y), all(store.get(x.as_tensor()).unwrap())].concat()
        };
        let found = run(&softmax);
        let wanted = run(&|x| candle_nn::ops::softmax(x, D::Minus1));
        for (found, wanted) in found.iter().zip(&wanted) {
            assert!((found - wanted).abs() < 1e-6, "{found} and {wanted}");
        }
    }
}
