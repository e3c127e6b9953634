//! Where the backward passes of fused operations add up the gradients of parameters.
//!
//! candle's gradient store makes a zero tensor, a gradient tensor and their sum for every parameter and
//! micro-batch. A slot is one buffer that lives as long as its parameter: a product is written into it, or added to
//! it, and of a table only the rows that were looked up are touched.

use std::sync::{Mutex, MutexGuard};

use rayon::prelude::*;

use super::gemm::Write;
use super::{CHUNK, add_here, simd};

/// One parameter's gradient.
#[derive(Debug)]
pub struct Gradient {
    state: Mutex<GradientSlot>,
}

/// A gradient's numbers, and which of them count.
#[derive(Debug)]
pub struct GradientSlot {
    /// Empty until the first gradient; rows that do not count hold zeros, or what `stale` says.
    values: Vec<f32>,
    numel: usize,
    width: usize,
    rows: GradientRows,
    /// The buffer still holds an earlier step's numbers.
    stale: bool,
}

/// Which rows have a gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GradientRows {
    /// None was computed.
    None,
    /// These, ascending; the others' is zero.
    Some(Vec<u32>),
    All,
}

impl Gradient {
    /// The slot of a parameter of this shape.
    pub fn new(shape: &[usize]) -> Self {
        let numel = shape.iter().product();
        let width = shape.last().copied().unwrap_or(1);
        let slot = GradientSlot { values: Vec::new(), numel, width, rows: GradientRows::None, stale: false };
        Self { state: Mutex::new(slot) }
    }

    /// The slot, for one that reads or changes it.
    pub fn lock(&self) -> MutexGuard<'_, GradientSlot> {
        // a panic elsewhere leaves numbers behind, which are numbers all the same
        self.state.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    /// Lets `write` put a gradient of every element into the buffer, or add it to what stands there.
    pub fn add(&self, write: impl FnOnce(&mut [f32], Write)) {
        let mut slot = self.lock();
        let how = if slot.rows == GradientRows::None { Write::Replace } else { Write::Add };
        slot.allocate();
        slot.rows = GradientRows::All;
        slot.stale = false;
        write(&mut slot.values, how);
    }

    /// Adds a vector of gradients.
    pub fn add_values(&self, values: &[f32]) {
        self.add(|sums, how| match how {
            Write::Replace => sums.copy_from_slice(values),
            Write::Add => add_here(sums, values),
        });
    }

    /// Adds `dy`, (T, C), to the rows of a table that `ids`, (T), names. Each row's part is added up in the order of the
    /// tokens first, then to what an earlier micro-batch has left: so it is what processes that share the micro-batches
    /// out add up, too.
    pub fn add_rows(&self, ids: &[u32], dy: &[f32]) {
        let mut slot = self.lock();
        slot.allocate();
        if slot.stale {
            slot.values.fill(0.0);
            slot.stale = false;
        }
        let earlier = std::mem::replace(&mut slot.rows, GradientRows::None);
        let is_new = |id: u32| match &earlier {
            GradientRows::None => true,
            GradientRows::Some(rows) => rows.binary_search(&id).is_err(),
            GradientRows::All => false,
        };
        // tokens by their row: a row is one task's, and the order of its tokens is kept
        let mut order: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(&id, token)| (id, token)).collect();
        order.sort_unstable();
        let width = slot.width;
        let (start, length) = (super::gemm::Shared::new(&mut slot.values), slot.numel);
        let runs: Vec<&[(u32, u32)]> = order.chunk_by(|a, b| a.0 == b.0).collect();
        runs.par_iter().with_min_len(16).for_each(|run| {
            let at = run[0].0 as usize * width;
            assert!(at + width <= length, "an id outside of its table");
            // SAFETY: inside the buffer, and every run has a row of its own.
            let row = unsafe { start.slice(at, width) };
            let add_all = |sum: &mut [f32]| {
                run.iter().for_each(|&(_, token)| add_here(sum, &dy[token as usize * width..][..width]));
            };
            if run.len() == 1 || is_new(run[0].0) {
                add_all(row);
            } else {
                let mut sum = vec![0.0; width];
                add_all(&mut sum);
                add_here(row, &sum);
            }
        });
        slot.rows = match earlier {
            GradientRows::All => GradientRows::All,
            earlier => {
                let mut rows = ids.to_vec();
                if let GradientRows::Some(earlier) = earlier {
                    rows.extend(earlier);
                }
                rows.sort_unstable();
                rows.dedup();
                GradientRows::Some(rows)
            }
        };
    }
}

impl GradientSlot {
    fn allocate(&mut self) {
        if self.values.is_empty() {
            self.values = vec![0.0; self.numel];
        }
    }

    /// Which rows have a gradient.
    pub fn rows(&self) -> &GradientRows {
        &self.rows
    }

    /// The buffer; only the rows that have a gradient count.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The numbers of a row, C.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The numbers of a row.
    pub fn row(&self, row: u32) -> &[f32] {
        &self.values[row as usize * self.width..][..self.width]
    }

    /// Appends the numbers of some rows, of which those without a gradient are zero.
    pub fn copy_rows(&self, rows: &GradientRows, to: &mut Vec<f32>) {
        let has = |row: &u32| match &self.rows {
            GradientRows::None => false,
            GradientRows::All => true,
            GradientRows::Some(own) => own.binary_search(row).is_ok(),
        };
        match rows {
            GradientRows::None => {}
            GradientRows::All if self.rows == GradientRows::None => to.resize(to.len() + self.numel, 0.0),
            GradientRows::All => to.extend(&self.values),
            GradientRows::Some(rows) => {
                for row in rows {
                    if has(row) {
                        to.extend(self.row(*row));
                    } else {
                        to.resize(to.len() + self.width, 0.0);
                    }
                }
            }
        }
    }

    /// Takes some rows' numbers in place of its own; the rest of what it was handed.
    pub fn set_rows<'v>(&mut self, rows: GradientRows, from: &'v [f32]) -> &'v [f32] {
        self.clear();
        if rows != GradientRows::None {
            self.allocate();
        }
        let taken = match &rows {
            GradientRows::None => 0,
            GradientRows::All => {
                self.values.copy_from_slice(&from[..self.numel]);
                self.stale = false;
                self.numel
            }
            GradientRows::Some(rows) => {
                if self.stale {
                    self.values.fill(0.0);
                    self.stale = false;
                }
                for (row, values) in rows.iter().zip(from.chunks_exact(self.width)) {
                    self.values[*row as usize * self.width..][..self.width].copy_from_slice(values);
                }
                rows.len() * self.width
            }
        };
        self.rows = rows;
        &from[taken..]
    }

    /// A copy with zeros where no gradient is; none where there is none at all.
    pub fn dense(&self) -> Option<Vec<f32>> {
        match self.rows {
            GradientRows::None => None,
            GradientRows::Some(_) | GradientRows::All => Some(self.values.clone()),
        }
    }

    /// The sum of the squares, in an order that does not depend on the number of threads.
    pub fn squares(&self) -> f64 {
        match &self.rows {
            GradientRows::None => 0.0,
            GradientRows::All => {
                let parts: Vec<f64> =
                    self.values.par_chunks(CHUNK).map(|chunk| f64::from(sum_of_squares(chunk))).collect();
                parts.iter().sum()
            }
            GradientRows::Some(rows) => {
                rows.iter().map(|&row| f64::from(sum_of_squares(self.row(row)))).sum()
            }
        }
    }

    /// Forgets the gradient; costs as much as it had rows.
    pub fn clear(&mut self) {
        match std::mem::replace(&mut self.rows, GradientRows::None) {
            GradientRows::None => {}
            GradientRows::All => self.stale = true,
            GradientRows::Some(rows) => {
                for row in rows {
                    self.values[row as usize * self.width..][..self.width].fill(0.0);
                }
            }
        }
    }
}

simd::vectorised! {
    pub(super) fn sum_of_squares(values: &[f32]) -> f32 {
        simd::sum(values.len(), |i| values[i] * values[i])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_add_up_until_they_are_forgotten() {
        let gradient = Gradient::new(&[4, 2]);
        assert_eq!(gradient.lock().dense(), None);
        for _ in 0..2 {
            gradient.add_rows(&[3, 1, 3], &[1.0, 2.0, 3.0, 4.0, 10.0, 20.0]);
            assert_eq!(gradient.lock().rows(), &GradientRows::Some(vec![1, 3]));
            assert_eq!(gradient.lock().dense().unwrap(), [0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 11.0, 22.0]);
            assert_eq!(gradient.lock().squares(), 9.0 + 16.0 + 121.0 + 484.0);
            gradient.add_values(&[1.0; 8]); // a tied weight: looked up and multiplied with
            assert_eq!(gradient.lock().dense().unwrap(), [1.0, 1.0, 4.0, 5.0, 1.0, 1.0, 12.0, 23.0]);
            gradient.lock().clear();
            assert_eq!(gradient.lock().squares(), 0.0);
        }
        gradient.add_values(&[2.0; 8]);
        gradient.add_rows(&[0], &[1.0, 1.0]);
        assert_eq!(gradient.lock().dense().unwrap(), [3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_micro_batch_is_added_up_before_it_is_added() {
        let gradient = Gradient::new(&[2, 1]);
        let large = 16_777_216.0; // to which 1 can't be added in f32, and 2 can
        gradient.add_rows(&[1], &[large]);
        gradient.add_rows(&[1, 1], &[1.0, 1.0]);
        assert_eq!(gradient.lock().dense().unwrap(), [0.0, large + 2.0]);
    }
}
