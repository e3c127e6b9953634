//! Rows by id: of a table, whose gradient touches the rows that were looked up, and of an activation.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::buffer::Buffer;
use super::gemm::Write;
use super::{Numbers, Weight, add_here};
use crate::eager::tape::{Tape, TapeValue};

/// Rows of x, (R, C), by ids, (T): (T, C), in candle's operations.
///
/// # Errors
/// An id that x has no row for.
pub fn composite(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    check(x.dim(0)?, ids)?;
    x.index_select(&Tensor::new(ids, x.device())?, 0)
}

/// table (V, C), ids (T) → (T, C), fused.
///
/// # Errors
/// An id that the table has no row for.
pub fn embedding(tape: &Tape, table: &Weight, ids: &Arc<[u32]>) -> Result<Arc<TapeValue>> {
    let (rows, width) = table.values.dims2()?;
    check(rows, ids)?;
    let y = gather(&Numbers::of(&table.values)?, width, ids);
    let (gradient, ids) = (table.gradient.clone(), ids.clone());
    Ok(tape.push(y, width, gradient.is_some(), move |dy, _| {
        if let Some(gradient) = gradient {
            gradient.add_rows(&ids, &dy);
        }
        Ok(())
    }))
}

/// x (T, C), ids (B) → (B, C), fused.
///
/// # Errors
/// An id that x has no row for.
pub fn pick(tape: &Tape, x: &Arc<TapeValue>, ids: &Arc<[u32]>) -> Result<Arc<TapeValue>> {
    check(x.rows(), ids)?;
    let (x, ids) = (x.clone(), ids.clone());
    let width = x.width;
    Ok(tape.push(gather(&x.numbers, width, &ids), width, x.learns, move |dy, flow| {
        flow.add(&x, |dx, write| {
            if write == Write::Replace {
                dx.fill(0.0);
            }
            for (dy, &id) in dy.chunks_exact(width).zip(&*ids) {
                add_here(&mut dx[id as usize * width..][..width], dy);
            }
            Ok(())
        })
    }))
}

fn check(rows: usize, ids: &[u32]) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => candle_core::bail!("id {id} is looked up in a table of {rows} rows"),
        None => Ok(()),
    }
}

fn gather(x: &[f32], width: usize, ids: &[u32]) -> Buffer {
    let mut y = Buffer::any(ids.len() * width);
    for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
        y.copy_from_slice(&x[id as usize * width..][..width]);
    }
    y
}
