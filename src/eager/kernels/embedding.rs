//! Rows by id: of a table, whose gradient touches the rows that were looked up, and of an activation.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, Var};

use super::{Kernels, Numbers, Weight, gradient, numbers, stored};

/// table (V, C), ids (T) → (T, C).
///
/// # Errors
/// An id that the table has no row for.
pub fn embedding(kernels: Kernels, table: &Weight, ids: &Arc<[u32]>) -> Result<Tensor> {
    check(&table.values, ids)?;
    match kernels {
        Kernels::Fused => {
            // candle's tape begins at a variable. The table itself would be given a gradient of all its rows,
            // so a variable of one element stands for it.
            let start = Tensor::zeros(1, DType::F32, table.values.device())?;
            let start = if table.gradient.is_some() { Var::from_tensor(&start)?.into_inner() } else { start };
            start.apply_op1(Lookup { table: table.clone(), ids: ids.clone() })
        }
        Kernels::Composite => select(&table.values, ids),
    }
}

/// x (T, C), ids (B) → (B, C).
///
/// # Errors
/// An id that x has no row for.
pub fn pick(kernels: Kernels, x: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    check(x, ids)?;
    match kernels {
        Kernels::Fused => x.contiguous()?.apply_op1(Pick { ids: ids.clone() }),
        Kernels::Composite => select(x, ids),
    }
}

fn select(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    x.index_select(&Tensor::new(ids, x.device())?, 0)
}

fn check(x: &Tensor, ids: &[u32]) -> Result<()> {
    let rows = x.dim(0)?;
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => candle_core::bail!("id {id} is looked up in a table of {rows} rows"),
        None => Ok(()),
    }
}

fn gather(x: &[f32], width: usize, ids: &[u32]) -> Vec<f32> {
    let mut y = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        y.extend_from_slice(&x[id as usize * width..][..width]);
    }
    y
}

struct Lookup {
    table: Weight,
    ids: Arc<[u32]>,
}

impl CustomOp1 for Lookup {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = self.table.values.dims2()?;
        let y = gather(&Numbers::of(&self.table.values)?, width, &self.ids);
        stored(y, (self.ids.len(), width))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if let Some(gradient) = &self.table.gradient {
            let dy = dy.contiguous()?;
            gradient.add_rows(&self.ids, &Numbers::of(&dy)?);
        }
        // nothing reads the start's gradient, and a variable needs none
        Ok(None)
    }
}

struct Pick {
    ids: Arc<[u32]>,
}

impl CustomOp1 for Pick {
    fn name(&self) -> &'static str {
        "pick"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        stored(gather(numbers(x, layout)?, width, &self.ids), (self.ids.len(), width))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = x.dims2()?;
        let dy = dy.contiguous()?;
        let dys = Numbers::of(&dy)?;
        let mut dx = vec![0.0; rows * width];
        for (dy, &id) in dys.chunks_exact(width).zip(&*self.ids) {
            dx[id as usize * width..][..width].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
        gradient(dx, x)
    }
}
