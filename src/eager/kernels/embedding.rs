//! Rows of a table by id; the backward pass adds each row's gradients up in the order of the tokens.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::share;
use super::{Kernels, Numbers, gradient, numbers, stored};

/// table (V, C), ids (T) → (T, C).
///
/// # Errors
/// An id that the table has no row for.
pub fn embedding(kernels: Kernels, table: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    let rows = table.dim(0)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
        candle_core::bail!("id {id} is looked up in a table of {rows} rows");
    }
    match kernels {
        Kernels::Fused => table.apply_op1(Embedding { ids: ids.clone() }),
        Kernels::Composite => table.index_select(&Tensor::new(&ids[..], table.device())?, 0),
    }
}

struct Embedding {
    ids: Arc<[u32]>,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let table = numbers(table, layout)?;
        let mut y = Vec::with_capacity(self.ids.len() * width);
        for &id in &*self.ids {
            y.extend_from_slice(&table[id as usize * width..][..width]);
        }
        stored(y, (self.ids.len(), width))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = table.dims2()?;
        let dy = dy.contiguous()?;
        let dys = Numbers::of(&dy)?;
        let mut dtable = vec![0.0; rows * width];
        // each task owns a range of rows and walks all the ids: no two tasks meet, and the order is fixed
        let parts = rows.div_ceil(256).clamp(1, 16);
        let mut rest = &mut dtable[..];
        let mut tasks = Vec::with_capacity(parts);
        for part in 0..parts {
            let range = share(rows, parts, part);
            let (own, behind) = rest.split_at_mut(range.len() * width);
            tasks.push((range, own));
            rest = behind;
        }
        tasks.into_par_iter().for_each(|(range, own)| {
            for (token, &id) in self.ids.iter().enumerate() {
                let id = id as usize;
                if range.contains(&id) {
                    let row = &mut own[(id - range.start) * width..][..width];
                    row.iter_mut().zip(&dys[token * width..]).for_each(|(sum, dy)| *sum += dy);
                }
            }
        });
        gradient(dtable, table)
    }
}
