//! Heads turned by their rows' positions (Su et al. 2021, arXiv:2104.09864), for candle's tape, in one operation.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::{contiguous, wide};
use crate::model::ops::turn_by;

/// Cosines and sines of a head's angles for rows at their positions, (T, D / 2) each, in f32.
#[derive(Clone)]
pub struct Turns {
    cos: Tensor,
    sin: Tensor,
    heads: usize,
}

impl Turns {
    /// For heads of d channels of rows at these positions.
    ///
    /// # Errors
    /// d is odd.
    pub fn new(theta: f64, (heads, d): (usize, usize), positions: &[u32], device: &Device) -> Result<Self> {
        if !d.is_multiple_of(2) {
            candle_core::bail!("heads of {d} channels can't be turned: their channels are turned by two");
        }
        let (half, longest) = (d / 2, positions.iter().max().map_or(0, |&at| at as usize + 1));
        let by_position = turn_by(theta, d, longest);
        let of_rows = positions.iter().flat_map(|&at| &by_position[at as usize * half..][..half]);
        let (sin, cos): (Vec<f32>, Vec<f32>) = of_rows.copied().unzip();
        let table = |values| Tensor::from_vec(values, (positions.len(), half), device);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, heads })
    }

    /// The rows, (T, H·D): of each head the first half of its channels with the second.
    pub fn turn(&self, x: &Tensor) -> Result<Tensor> {
        wide(x)?.contiguous()?.apply_op1(self.clone())?.to_dtype(x.dtype())
    }

    /// (T, H, D)
    fn dims(&self, layout: &Layout) -> Result<(usize, usize, usize)> {
        let ((rows, width), of_turns) = (layout.shape().dims2()?, self.cos.dims2()?);
        if of_turns != (rows, width / self.heads / 2) {
            candle_core::bail!("({rows}, {width}) is turned by angles of {of_turns:?}");
        }
        Ok((rows, self.heads, width / self.heads))
    }
}

impl CustomOp1 for Turns {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, heads, d) = self.dims(layout)?;
        let ((cos, of_cos), (sin, of_sin)) = (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (Storage::Cpu(cos), Storage::Cpu(sin)) = (&*cos, &*sin) else {
            candle_core::bail!("rows and their angles are on two devices")
        };
        let cos = &cos.as_slice::<f32>()?[contiguous(of_cos)?];
        let sin = &sin.as_slice::<f32>()?[contiguous(of_sin)?];
        let mut y = x.as_slice::<f32>()?[contiguous(layout)?].to_vec();
        let turns = cos.par_chunks((d / 2).max(1)).zip(sin.par_chunks((d / 2).max(1)));
        y.par_chunks_mut((heads * d).max(1)).zip(turns).for_each(|(row, (cos, sin))| {
            for head in row.chunks_exact_mut(d) {
                let (first, second) = head.split_at_mut(d / 2);
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let dims = self.dims(layout)?;
        let ((cos, of_cos), (sin, of_sin)) = (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (Storage::Cuda(cos), Storage::Cuda(sin)) = (&*cos, &*sin) else {
            candle_core::bail!("rows and their angles are on two devices")
        };
        super::cuda::turn([(x, layout), (cos, of_cos), (sin, of_sin)], dims)
    }

    /// What was turned is turned back.
    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { sin: self.sin.neg()?, ..self.clone() };
        dy.contiguous()?.apply_op1(back).map(Some)
    }
}
