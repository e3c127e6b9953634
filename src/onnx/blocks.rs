//! Matrices in blocks of few bits, as ONNX Runtime's `MatMulNBits` reads them: 32 numbers share a scale.

use std::fmt;

use rayon::prelude::*;

use crate::model::ops::{Layout, Role};

/// Numbers of a block: consecutive inputs of one output.
pub const BLOCK: usize = 32;

/// The numbers that a graph's matrices are stored in. Biases, norms and positions stay in fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// As they were trained.
    #[default]
    Fp32,
    /// 8 bits in blocks of 32.
    Q8,
    /// 4 bits in blocks of 32; the table of words, which is the head too, 8 bits.
    Q4,
}

impl Precision {
    /// The name that `--precision` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The bits of a matrix' numbers, where it is stored in blocks.
    pub(super) fn bits(self, role: Role) -> Option<u32> {
        match self {
            Self::Fp32 => None,
            Self::Q8 => Some(8),
            Self::Q4 if role == Role::Table => Some(8),
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
    /// How the matrix is stored before.
    pub layout: Layout,
}

/// A matrix in blocks: element = (number − 2^(bits − 1)) · scale.
pub(super) struct Packed {
    /// (N, blocks, 32 · bits / 8): numbers along K, the first in the low bits.
    pub numbers: Vec<u8>,
    /// (N, blocks)
    pub scales: Vec<f32>,
}

impl Blocks {
    /// Blocks of a row.
    pub fn of_row(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// Bytes of a block.
    pub fn bytes(&self) -> usize {
        BLOCK * self.bits as usize / 8
    }

    /// Rounds a matrix. Of several scales each block takes the one with the least squared error.
    pub fn pack(&self, values: &[f32]) -> Packed {
        let (of_row, bytes) = (self.of_row(), self.bytes());
        let mut numbers = vec![0; self.rows * of_row * bytes];
        let mut scales = vec![0.0; self.rows * of_row];
        let rows = numbers.par_chunks_exact_mut(of_row * bytes).zip(scales.par_chunks_exact_mut(of_row));
        rows.enumerate().for_each(|(n, (numbers, scales))| {
            for (b, (numbers, scale)) in numbers.chunks_exact_mut(bytes).zip(scales).enumerate() {
                let mut block = [0.0; BLOCK];
                let columns = b * BLOCK..self.columns.min((b + 1) * BLOCK);
                for (x, k) in block.iter_mut().zip(columns) {
                    *x = match self.layout {
                        Layout::OutIn => values[n * self.columns + k],
                        Layout::InOut => values[k * self.rows + n],
                    };
                }
                let rounded;
                (*scale, rounded) = if self.bits == 4 { four_bits(&block) } else { eight_bits(&block) };
                if self.bits == 4 {
                    for (byte, pair) in numbers.iter_mut().zip(rounded.as_chunks().0) {
                        let [low, high] = pair.map(|q| (q + 8) as u8);
                        *byte = low | high << 4;
                    }
                } else {
                    for (byte, q) in numbers.iter_mut().zip(rounded) {
                        *byte = (i16::from(q) + 128) as u8;
                    }
                }
            }
        });
        Packed { numbers, scales }
    }
}

/// −127 … 127 times the scale.
fn eight_bits(block: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    let scale = largest(block) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    (scale, block.map(|x| (x * inverse).round_ties_even() as i8))
}

/// −8 … 7 times the scale, which may be negative: the larger side of a lopsided block then has eight steps.
fn four_bits(block: &[f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    let largest = largest(block);
    if largest == 0.0 {
        return (0.0, [0; BLOCK]);
    }
    let mut best = (f32::INFINITY, 0.0, [0.0; BLOCK]);
    for steps in [-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0] {
        let inverse = steps / largest;
        let rounded = block.map(|x| (x * inverse).round_ties_even().clamp(-8.0, 7.0));
        // the scale that fits these numbers best: Σ x·q / Σ q²
        let (mut product, mut square) = (0.0, 0.0);
        for (x, q) in block.iter().zip(rounded) {
            product += x * q;
            square += q * q;
        }
        let scale = product / square; // the largest number is not rounded to 0
        let error = block.iter().zip(rounded).map(|(x, q)| (x - q * scale) * (x - q * scale)).sum::<f32>();
        if error < best.0 {
            best = (error, scale, rounded);
        }
    }
    (best.1, best.2.map(|q| q as i8))
}

fn largest(block: &[f32; BLOCK]) -> f32 {
    block.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(blocks: Blocks, packed: &Packed) -> Vec<f32> {
        let numbers: Vec<f32> = if blocks.bits == 4 {
            let both = |&byte: &u8| [byte & 15, byte >> 4].map(|q| f32::from(q) - 8.0);
            packed.numbers.iter().flat_map(both).collect()
        } else {
            packed.numbers.iter().map(|&q| f32::from(q) - 128.0).collect()
        };
        let rows =
            numbers.chunks_exact(blocks.of_row() * BLOCK).zip(packed.scales.chunks_exact(blocks.of_row()));
        rows.flat_map(|(row, scales)| {
            let all = row.iter().enumerate().map(|(k, q)| q * scales[k / BLOCK]);
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
            let blocks = Blocks { rows, columns, bits, layout: Layout::OutIn };
            let packed = blocks.pack(&out_in);
            let other = Blocks { layout: Layout::InOut, ..blocks }.pack(&in_out);
            assert_eq!((&packed.numbers, &packed.scales), (&other.numbers, &other.scales));
            let again = unpacked(blocks, &packed);
            let error = again.iter().zip(&out_in).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error <= most + 1e-6, "{bits} bits: {error}");
        }
    }

    #[test]
    fn what_four_bits_hold_exactly_stays_exact() {
        let block: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 % 16.0 - 8.0) * 0.25);
        for sign in [1.0, -1.0] {
            let (scale, rounded) = four_bits(&block.map(|x| x * sign));
            let again = rounded.map(|q| f32::from(q) * scale);
            assert_eq!(again, block.map(|x| x * sign));
        }
        assert_eq!(four_bits(&[0.0; BLOCK]), (0.0, [0; BLOCK]));
    }
}
