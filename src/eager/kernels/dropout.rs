//! Dropout (Srivastava et al. 2014) whose mask is a function of a key and a place: nothing is stored, and the
//! backward pass computes the same mask again.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CHUNK, simd, wide};
use crate::eager::tape::{Tape, TapeValue};

/// Which elements are dropped: a pure function of (key, row, column).
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    key: u64,
    /// An element stays where its hash is at least this.
    threshold: u32,
    scale: f32,
}

impl Mask {
    /// A mask that drops each element with probability `p`, in [0, 1), and scales the rest by 1 / (1 − p).
    pub fn new(key: u64, p: f32) -> Self {
        let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
        Self { key, threshold, scale: 1.0 / (1.0 - p) }
    }

    /// The mask's row.
    #[inline(always)]
    pub fn row(&self, row: u64) -> Row {
        let key = mix(self.key ^ mix(row));
        Row { low: key as u32, high: (key >> 32) as u32, threshold: self.threshold, scale: self.scale }
    }
}

/// One row of a mask.
#[derive(Clone, Copy)]
pub struct Row {
    low: u32,
    high: u32,
    threshold: u32,
    scale: f32,
}

impl Row {
    /// What the element of this column is multiplied by: 0, or 1 / (1 − p).
    #[inline(always)]
    pub fn factor(&self, column: u32) -> f32 {
        // a 32-bit finalizer (xor-shift-multiply) over a Weyl sequence
        let mut x = column.wrapping_mul(0x9E37_79B9).wrapping_add(self.low);
        x ^= x >> 16;
        x = x.wrapping_mul(0x7FEB_352D) ^ self.high;
        x ^= x >> 15;
        x = x.wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        if x >= self.threshold { self.scale } else { 0.0 }
    }
}

/// What is dropped of numbers that have no rows of their own: number i stands in row i / 1024.
impl Mask {
    /// Multiplies the numbers that begin at place `start` by the mask.
    pub fn apply(&self, start: usize, values: &mut [f32]) {
        self.in_rows(start, values.len(), |row, column, range| multiply(&mut values[range], row, column));
    }

    /// Adds the numbers `from`, which begin at place `start`, times the mask to `sums`.
    pub fn add(&self, start: usize, sums: &mut [f32], from: &[f32]) {
        self.in_rows(start, sums.len(), |row, column, range| {
            add_masked(&mut sums[range.clone()], &from[range], row, column);
        });
    }

    fn in_rows(&self, start: usize, length: usize, mut work: impl FnMut(Row, u32, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < length {
            let (row, column) = ((start + done) / ROW, (start + done) % ROW);
            let end = (done + ROW - column).min(length);
            work(self.row(row as u64), column as u32, done..end);
            done = end;
        }
    }
}

/// SplitMix64's finalizer (Steele et al. 2014): one 64-bit number → a well-mixed one.
#[inline(always)]
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Elements of a mask's row, where what is masked has no rows of its own.
const ROW: usize = 1024;

/// Multiplies `x` by the mask, element i standing in row i / 1024, in candle's operations.
pub fn composite(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let mut factors = vec![1.0; x.elem_count()];
    apply(&mut factors, mask);
    (wide(x)? * Tensor::from_vec(factors, x.shape(), x.device())?)?.to_dtype(x.dtype())
}

/// The same, fused.
pub fn dropout(tape: &Tape, x: &Arc<TapeValue>, mask: Mask) -> Arc<TapeValue> {
    let mut y = Buffer::of(&x.numbers);
    apply(&mut y, mask);
    let x = x.clone();
    tape.push(y, x.width, x.learns, move |mut dy, flow| {
        apply(&mut dy, mask);
        flow.give(&x, dy);
        Ok(())
    })
}

fn apply(values: &mut [f32], mask: Mask) {
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, values)| mask.apply(i * CHUNK, values));
}

simd::vectorised! {
    fn multiply(values: &mut [f32], row: Row, first: u32) {
        for (column, value) in (first..).zip(values) {
            *value *= row.factor(column);
        }
    }
}

simd::vectorised! {
    fn add_masked(sums: &mut [f32], from: &[f32], row: Row, first: u32) {
        for ((column, sum), from) in (first..).zip(sums).zip(from) {
            *sum += from * row.factor(column);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_drops_the_share_it_says_everywhere() {
        for p in [0.1f32, 0.5] {
            let mask = Mask::new(42, p);
            let dropped = |rows: std::ops::Range<u64>, columns: std::ops::Range<u32>| {
                let all = (rows.end - rows.start) as f32 * columns.len() as f32;
                let zeros = rows
                    .map(|row| columns.clone().filter(|&c| mask.row(row).factor(c) == 0.0).count())
                    .sum::<usize>();
                zeros as f32 / all
            };
            // four standard deviations of a share of 100,000
            let near = 4.0 * (p * (1.0 - p) / 1e5).sqrt();
            assert!((dropped(0..100, 0..1000) - p).abs() < near);
            assert!((dropped(0..100_000, 0..1) - p).abs() < near);
            assert!((dropped(0..1, 0..100_000) - p).abs() < near);
        }
    }

    #[test]
    fn masks_of_different_keys_are_independent() {
        let (a, b) = (Mask::new(1, 0.5), Mask::new(2, 0.5));
        let same = (0..100u64)
            .flat_map(|row| (0..1000u32).map(move |column| (row, column)))
            .filter(|&(row, column)| a.row(row).factor(column) == b.row(row).factor(column))
            .count();
        assert!((same as f32 / 1e5 - 0.5).abs() < 0.0064);
    }

    #[test]
    fn no_probability_changes_nothing() {
        let row = Mask::new(7, 0.0).row(3);
        assert!((0..1000).all(|column| row.factor(column) == 1.0));
    }
}
