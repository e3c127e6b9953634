//! Matrices in blocks of few bits, as ONNX Runtime's `MatMulNBits` reads them: the numbers of a block share a scale.

use std::fmt;

use rayon::prelude::*;

use crate::model::ops::Layout;

/// Numbers of a block, consecutive inputs of one output: what the field's quantizers take. Larger blocks are read
/// faster (ONNX Runtime keeps two fp32 numbers a block), smaller ones round less.
pub const DEFAULT_BLOCK: usize = 128;
/// The smallest block.
pub const LEAST_BLOCK: usize = 32;
/// The largest block.
pub const LARGEST_BLOCK: usize = 256;

/// The numbers that a graph's matrices are stored in. Biases, norms and positions stay in fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// As they were trained.
    #[default]
    Fp32,
    /// 16 bits, for GPUs: half the size; sums, norms and angles stay in fp32. What language models generate in on CUDA.
    Fp16,
    /// The graph in fp32, whose products OpenVINO computes in bf16 where the processor can; not for language models.
    Bf16,
    /// 8 bits, multiplied as integers with activations that are rounded as they come; not for language models.
    Int8,
    /// 8 bits in blocks that share a scale.
    Q8,
    /// 4 bits in blocks that share a scale.
    Q4,
}

impl Precision {
    /// The name that `--precision` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The precision of the file that is run.
    pub fn stored(self) -> Self {
        match self {
            Self::Bf16 => Self::Fp32,
            stored => stored,
        }
    }

    /// The bits of a matrix' numbers, where it is stored in blocks.
    pub(super) fn bits(self) -> Option<u32> {
        match self {
            Self::Fp32 | Self::Fp16 | Self::Bf16 | Self::Int8 => None,
            Self::Q8 => Some(8),
            Self::Q4 => Some(4),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a matrix is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// N: outputs.
    pub rows: usize,
    /// K: inputs.
    pub columns: usize,
    pub bits: u32,
    /// Numbers of a block; a power of two.
    pub size: usize,
    /// How the matrix is stored before.
    pub layout: Layout,
}

/// A matrix in blocks: element = (number − 2^(bits − 1)) · scale.
pub(super) struct PackedBlocks {
    /// (N, blocks, size · bits / 8): numbers along K, the first in the low bits.
    pub numbers: Vec<u8>,
    /// (N, blocks)
    pub scales: Vec<f32>,
}

impl Blocks {
    /// Blocks of a row; the last is filled up with zeros.
    pub fn of_row(&self) -> usize {
        self.columns.div_ceil(self.size)
    }

    /// Bytes of a block.
    pub fn bytes(&self) -> usize {
        self.size * self.bits as usize / 8
    }

    /// Rounds a matrix. Of several scales each block takes the one with the least squared error.
    pub fn pack(&self, values: &[f32]) -> PackedBlocks {
        let (of_row, bytes) = (self.of_row(), self.bytes());
        let mut numbers = vec![0; self.rows * of_row * bytes];
        let mut scales = vec![0.0; self.rows * of_row];
        let rows = numbers.par_chunks_exact_mut(of_row * bytes).zip(scales.par_chunks_exact_mut(of_row));
        rows.enumerate().for_each(|(n, (numbers, scales))| {
            let mut row = vec![0.0; of_row * self.size];
            for (k, x) in row[..self.columns].iter_mut().enumerate() {
                *x = match self.layout {
                    Layout::OutIn => values[n * self.columns + k],
                    Layout::InOut => values[k * self.rows + n],
                };
            }
            let mut rounded = vec![0; self.size];
            let blocks = row.chunks_exact(self.size).zip(numbers.chunks_exact_mut(bytes)).zip(scales);
            for ((block, numbers), scale) in blocks {
                if self.bits == 4 {
                    *scale = four_bits(block, &mut rounded);
                    for (byte, pair) in numbers.iter_mut().zip(rounded.as_chunks().0) {
                        let [low, high] = pair.map(|q| (q + 8) as u8);
                        *byte = low | high << 4;
                    }
                } else {
                    *scale = eight_bits(block, &mut rounded);
                    for (byte, &q) in numbers.iter_mut().zip(&rounded) {
                        *byte = (i16::from(q) + 128) as u8;
                    }
                }
            }
        });
        PackedBlocks { numbers, scales }
    }
}

/// Rounds to −127 … 127 times the scale.
fn eight_bits(block: &[f32], rounded: &mut [i8]) -> f32 {
    let scale = largest(block) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (q, x) in rounded.iter_mut().zip(block) {
        *q = (x * inverse).round_ties_even() as i8;
    }
    scale
}

/// Rounds to −8 … 7 times the scale, which may be negative: the larger side of a lopsided block then has eight steps.
fn four_bits(block: &[f32], rounded: &mut [i8]) -> f32 {
    let largest = largest(block);
    if largest == 0.0 {
        rounded.fill(0);
        return 0.0;
    }
    let round = |x: f32, inverse: f32| (x * inverse).round_ties_even().clamp(-8.0, 7.0);
    let (mut least, mut best) = (f32::INFINITY, (0.0, 0.0));
    for steps in [-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0] {
        let inverse = steps / largest;
        // the scale that fits these numbers best: Σ x·q / Σ q²
        let (mut product, mut square) = (0.0, 0.0);
        for &x in block {
            let q = round(x, inverse);
            product += x * q;
            square += q * q;
        }
        let scale = product / square; // the largest number is not rounded to 0
        let error = block.iter().map(|&x| (x - round(x, inverse) * scale).powi(2)).sum::<f32>();
        if error < least {
            (least, best) = (error, (inverse, scale));
        }
    }
    for (q, &x) in rounded.iter_mut().zip(block) {
        *q = round(x, best.0) as i8;
    }
    best.1
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(blocks: Blocks, packed: &PackedBlocks) -> Vec<f32> {
        let numbers: Vec<f32> = if blocks.bits == 4 {
            let both = |&byte: &u8| [byte & 15, byte >> 4].map(|q| f32::from(q) - 8.0);
            packed.numbers.iter().flat_map(both).collect()
        } else {
            packed.numbers.iter().map(|&q| f32::from(q) - 128.0).collect()
        };
        let rows = numbers
            .chunks_exact(blocks.of_row() * blocks.size)
            .zip(packed.scales.chunks_exact(blocks.of_row()));
        rows.flat_map(|(row, scales)| {
            let all = row.iter().enumerate().map(|(k, q)| q * scales[k / blocks.size]);
            all.take(blocks.columns).collect::<Vec<_>>()
        })
        .collect()
    }

    #[test]
    fn a_matrix_is_rounded_to_its_blocks_steps_in_either_layout() {
        let (rows, columns) = (5, 70); // the last block of a row is not full
        let value = |n: usize, k: usize| ((n * 31 + k * 17) % 23) as f32 / 23.0 - 0.3;
        let out_in: Vec<f32> = (0..rows).flat_map(|n| (0..columns).map(move |k| value(n, k))).collect();
        let in_out: Vec<f32> = (0..columns).flat_map(|k| (0..rows).map(move |n| value(n, k))).collect();
        for (bits, most) in [(8, 0.7 / 127.0 / 2.0), (4, 0.05)] {
            for size in [32, 64] {
                let blocks = Blocks { rows, columns, bits, size, layout: Layout::OutIn };
                let packed = blocks.pack(&out_in);
                let other = Blocks { layout: Layout::InOut, ..blocks }.pack(&in_out);
                assert_eq!((&packed.numbers, &packed.scales), (&other.numbers, &other.scales));
                let again = unpacked(blocks, &packed);
                let error = again.iter().zip(&out_in).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error <= most + 1e-6, "{bits} bits in blocks of {size}: {error}");
            }
        }
    }

    #[test]
    fn what_four_bits_hold_exactly_stays_exact() {
        let block: [f32; 32] = std::array::from_fn(|i| (i as f32 % 16.0 - 8.0) * 0.25);
        let mut rounded = [0; 32];
        for sign in [1.0, -1.0] {
            let scale = four_bits(&block.map(|x| x * sign), &mut rounded);
            let again = rounded.map(|q| f32::from(q) * scale);
            assert_eq!(again, block.map(|x| x * sign));
        }
        assert_eq!((four_bits(&[0.0; 32], &mut rounded), rounded), (0.0, [0; 32]));
    }
}
