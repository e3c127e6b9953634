//! What an operation keeps for its backward pass: numbers as they are, or rounded to bf16 where its products take them
//! so anyway, which halves the memory.

use half::bf16;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::gemm::{Factors, Shared};
use super::{CHUNK, simd};

/// Numbers that are kept.
pub enum Kept {
    Whole(Buffer),
    Rounded(Rounded),
}

/// bf16 numbers in a buffer's memory.
pub struct Rounded {
    /// Two in the place of one f32.
    memory: Buffer,
    length: usize,
}

/// Where tasks put rows that are kept.
#[derive(Clone, Copy)]
pub enum Place {
    Whole(Shared),
    Rounded(Shared<bf16>),
}

impl Rounded {
    fn any(length: usize) -> Self {
        Self { memory: Buffer::any(length.div_ceil(2)), length }
    }

    fn numbers(&self) -> &[bf16] {
        // SAFETY: the buffer holds as many, aligned for f32, and every pattern of bits is a bf16.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.length) }
    }

    fn numbers_mut(&mut self) -> &mut [bf16] {
        // SAFETY: as above; the other way round, every pattern of bits is an f32.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.length) }
    }
}

impl Kept {
    /// Room for `length` numbers that are factors of products, of whatever value.
    pub fn any(length: usize, factors: Factors) -> Self {
        match factors {
            Factors::F32 => Self::Whole(Buffer::any(length)),
            Factors::Bf16 => Self::Rounded(Rounded::any(length)),
        }
    }

    /// Numbers that are factors of products.
    pub fn of(numbers: Buffer, factors: Factors) -> Self {
        match factors {
            Factors::F32 => Self::Whole(numbers),
            Factors::Bf16 => {
                let mut rounded = Rounded::any(numbers.len());
                let to = rounded.numbers_mut().par_chunks_mut(CHUNK);
                to.zip(numbers.par_chunks(CHUNK)).for_each(|(to, from)| round(to, from));
                Self::Rounded(rounded)
            }
        }
    }

    /// The numbers, in f32 again.
    pub fn numbers(self) -> Buffer {
        match self {
            Self::Whole(numbers) => numbers,
            Self::Rounded(rounded) => {
                let mut numbers = Buffer::any(rounded.length);
                let to = numbers.par_chunks_mut(CHUNK);
                to.zip(rounded.numbers().par_chunks(CHUNK)).for_each(|(to, from)| widen(to, from));
                numbers
            }
        }
    }

    /// For tasks that fill it.
    pub fn place(&mut self) -> Place {
        match self {
            Self::Whole(numbers) => Place::Whole(Shared::new(numbers)),
            Self::Rounded(rounded) => Place::Rounded(Shared::new(rounded.numbers_mut())),
        }
    }
}

impl Place {
    /// `length` numbers from `offset` on to be written, where they are kept as they are.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    pub unsafe fn whole<'a>(self, offset: usize, length: usize) -> Option<&'a mut [f32]> {
        match self {
            // SAFETY: the caller's promise.
            Self::Whole(place) => Some(unsafe { place.slice(offset, length) }),
            Self::Rounded(_) => None,
        }
    }

    /// Keeps numbers from `offset` on, where they are rounded; those of [`Place::whole`] stand there already.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    pub unsafe fn keep(self, offset: usize, numbers: &[f32]) {
        if let Self::Rounded(place) = self {
            // SAFETY: the caller's promise.
            round(unsafe { place.slice(offset, numbers.len()) }, numbers);
        }
    }
}

simd::vectorised! {
    /// To the nearest, of two equally near ones to the even one; what is no number stays none.
    pub(super) fn round(to: &mut [bf16], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let near = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
            let quiet = bits >> 16 | 0x40;
            *to = bf16::from_bits(if from.is_nan() { quiet } else { near } as u16);
        }
    }
}

simd::vectorised! {
    pub(super) fn widen(to: &mut [f32], from: &[bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_the_nearest_bf16_of_every_kind_of_number() {
        let mut numbers: Vec<f32> = (0..20_000).map(|i| f32::from_bits(i as u32 * 214_747)).collect();
        numbers.extend([
            0.0,
            -0.0,
            f32::INFINITY,
            f32::MAX,
            1.003_906_2,
            1.011_718_8,
            f32::from_bits(0x7fff_ffff),
        ]);
        let kept = Kept::of(Buffer::of(&numbers), Factors::Bf16).numbers();
        assert_eq!(kept.len(), numbers.len());
        for (x, kept) in numbers.iter().zip(kept.iter()) {
            let right = bf16::from_f32(*x).to_f32();
            assert!(kept.to_bits() == right.to_bits() || kept.is_nan() && x.is_nan(), "{x}: {kept}, {right}");
        }
        let whole = Kept::of(Buffer::of(&numbers), Factors::F32).numbers();
        assert!(whole.iter().zip(&numbers).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn tasks_fill_their_rows_of_both_kinds() {
        for factors in [Factors::F32, Factors::Bf16] {
            let mut kept = Kept::any(7, factors);
            let place = kept.place();
            for (offset, row) in [(0, [1.0f32, 2.0, 3.0]), (3, [4.0, 5.0, 6.0])] {
                // SAFETY: inside, and one after the other.
                unsafe {
                    if let Some(to) = place.whole(offset, 3) {
                        to.copy_from_slice(&row);
                    }
                    place.keep(offset, &row);
                }
            }
            assert_eq!(kept.numbers()[..6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        }
    }
}
