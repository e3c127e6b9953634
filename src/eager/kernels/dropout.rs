//! Dropout (Srivastava et al. 2014) whose mask is a function of a key and a place: nothing is stored, and the
//! backward pass computes the same mask again.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::reorder::NONE;
use super::{CHUNK, contiguous, simd, wide};
use crate::eager::tape::{Tape, TapeValue};

/// Which elements are dropped: a pure function of (key, row, column).
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    pub(super) key: u64,
    /// An element stays where its hash is at least this.
    pub(super) threshold: u32,
    pub(super) scale: f32,
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

/// Multiplies `x` by the mask, element i standing in row i / 1024, in one operation of candle's.
pub fn composite(x: &Tensor, mask: Mask) -> Result<Tensor> {
    wide(x)?.contiguous()?.apply_op1(Dropped { mask, rows: None })?.to_dtype(x.dtype())
}

/// The same of x, (…, C), whose rows stand in these rows of the mask, (R); where that is [`NONE`], zeros come out.
///
/// # Errors
/// There are not as many rows as x has.
pub fn composite_of_rows(x: &Tensor, mask: Mask, rows: &Tensor) -> Result<Tensor> {
    let (of_x, of_mask) = (x.elem_count() / x.dim(D::Minus1)?.max(1), rows.elem_count());
    if of_x != of_mask {
        candle_core::bail!("{of_mask} rows of a mask for {of_x} rows");
    }
    wide(x)?.contiguous()?.apply_op1(Dropped { mask, rows: Some(rows.clone()) })?.to_dtype(x.dtype())
}

/// An operation that draws its mask as it runs, so that none is held or copied to a device.
#[derive(Clone)]
struct Dropped {
    mask: Mask,
    rows: Option<Tensor>,
}

impl CustomOp1 for Dropped {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = x.as_slice::<f32>()?[contiguous(layout)?].to_vec();
        match &self.rows {
            None => apply(&mut y, self.mask),
            Some(rows) => {
                let (rows, of_rows) = rows.storage_and_layout();
                let Storage::Cpu(rows) = &*rows else {
                    candle_core::bail!("a mask's rows are on another device")
                };
                let rows = &rows.as_slice::<u32>()?[contiguous(of_rows)?];
                let width = (y.len() / rows.len().max(1)).max(1);
                y.par_chunks_mut(width).zip(rows).for_each(|(y, &row)| match row {
                    NONE => y.fill(0.0),
                    row => multiply(y, self.mask.row(u64::from(row)), 0),
                });
            }
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let Some(rows) = &self.rows else { return super::cuda::dropout(x, layout, self.mask, None) };
        let (rows, of_rows) = rows.storage_and_layout();
        let Storage::Cuda(rows) = &*rows else { candle_core::bail!("a mask's rows are on another device") };
        super::cuda::dropout(x, layout, self.mask, Some((rows, of_rows)))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.apply_op1(self.clone()).map(Some)
    }
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

    /// What a GPU draws, in plain C: what stands between the marks of `cuda.cu`.
    #[test]
    #[cfg(unix)]
    fn a_gpu_draws_the_bits_of_the_cpu() {
        let source = include_str!("cuda.cu");
        let arithmetic = source.split("// mark").nth(1).unwrap();
        let (key, p, rows, columns) = (0xfeed_5eed_0bad_cafe, 0.3, [7u32, NONE, 0, 4_000_000_000], 37u32);
        let mask = Mask::new(key, p);
        let Mask { threshold, scale, .. } = mask;
        let [first, last] = [3 * ROW as u64 - 5, 5 * ROW as u64];
        let program = format!(
            "#include <stdio.h>
            #define __device__
            typedef unsigned int u32;
            typedef unsigned long long u64;
            //{arithmetic}
            int main(void) {{
              u32 rows[] = {{{}u, {}u, {}u, {}u}};
              for (u64 i = 0; i < 4 * {columns}; i++)
                printf(\"%.9g\\n\", factor_of_rows(i, rows, {columns}, {key}ull, {threshold}u, {scale:?}f));
              for (u64 i = {first}; i < {last}; i++)
                printf(\"%.9g\\n\", factor_of_numbers(i, {key}ull, {threshold}u, {scale:?}f));
            }}",
            rows[0], rows[1], rows[2], rows[3]
        );
        let dir = tempfile::tempdir().unwrap();
        let [file, binary] = ["mask.c", "mask"].map(|name| dir.path().join(name));
        std::fs::write(&file, program).unwrap();
        let built = std::process::Command::new("cc").arg(&file).arg("-o").arg(&binary).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let said = String::from_utf8(std::process::Command::new(&binary).output().unwrap().stdout).unwrap();
        let found: Vec<f32> = said.lines().map(|line| line.parse().unwrap()).collect();

        let mut wanted = vec![1.0; rows.len() * columns as usize];
        let of_rows = Tensor::new(&rows, &candle_core::Device::Cpu).unwrap();
        let ones =
            Tensor::from_slice(&wanted, (rows.len(), columns as usize), &candle_core::Device::Cpu).unwrap();
        let dropped = composite_of_rows(&ones, mask, &of_rows).unwrap();
        wanted.copy_from_slice(&dropped.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let mut numbers = vec![1.0; (last - first) as usize];
        mask.apply(first as usize, &mut numbers);
        wanted.extend(numbers);
        let differs = found.iter().zip(&wanted).position(|(found, wanted)| found != wanted);
        assert_eq!((found.len(), differs), (wanted.len(), None));
        assert!(wanted[columns as usize..][..columns as usize].iter().all(|&factor| factor == 0.0));
    }

    #[test]
    fn no_probability_changes_nothing() {
        let row = Mask::new(7, 0.0).row(3);
        assert!((0..1000).all(|column| row.factor(column) == 1.0));
    }
}
