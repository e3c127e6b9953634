//! Products of bf16 numbers that are added up in f32, and which of the processor's units computes them.
//!
//! Two numbers of k that follow each other are packed as a pair into the place of one f32: with AVX-512 and plainly the
//! loops are those of f32 (`micro`), and a multiplication is that of a pair. A pair's second product is added
//! before its first, as Intel's manual has it of AVX512-BF16, so these forms agree to the bit but for numbers below the
//! normal ones, which the unit takes for zero. The tile unit (`tiles`) adds its own way.

#![allow(clippy::needless_range_loop)] // loops over constant ranges become registers, iterators may not

use super::micro::{Loops, Multiply, PackSource, Vector};

/// What computes with pairs of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Products of tiles of 16 × 32 and 32 × 16 numbers.
    Amx,
    /// Products of sixteen pairs at once.
    Avx512Bf16,
}

impl Unit {
    /// What Intel calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "AMX-BF16",
            Self::Avx512Bf16 => "AVX512-BF16",
        }
    }
}

/// The fastest that this processor has and the system lets this process use, which it is asked for here.
pub fn unit() -> Option<Unit> {
    #[cfg(target_arch = "x86_64")]
    {
        if super::tiles::are_there() {
            return Some(Unit::Amx);
        }
        if x86::has_unit() {
            return Some(Unit::Avx512Bf16);
        }
    }
    None
}

/// The fastest that this processor runs; without a unit, products are rounded in software, more slowly than f32.
pub(super) fn loops() -> Loops {
    #[cfg(target_arch = "x86_64")]
    match unit() {
        Some(Unit::Amx) => return super::tiles::LOOPS,
        Some(Unit::Avx512Bf16) => return x86::WITH_UNIT,
        None if is_x86_feature_detected!("avx512f") => return x86::WITHOUT_UNIT,
        None => {}
    }
    plain::LOOPS
}

/// All that this processor runs, and what is emulated on it, for the tests.
#[cfg(test)]
pub(super) fn all() -> Vec<(&'static str, Loops)> {
    let mut all = vec![("plain", plain::LOOPS)];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        let emulated = std::env::var_os("TK_TEST_EMULATED").is_some();
        all.push(("avx512", x86::WITHOUT_UNIT));
        if x86::has_unit() || emulated {
            all.push((Unit::Avx512Bf16.name(), x86::WITH_UNIT));
        }
        if super::tiles::are_there() || emulated && super::tiles::permitted() {
            all.push((Unit::Amx.name(), super::tiles::LOOPS));
        }
    }
    all
}

/// How numbers become pairs, and how these are multiplied.
pub(super) trait Pairs<V>: Multiply<V> {
    /// Lane i holds number i of both vectors.
    unsafe fn interleave(first: V, second: V) -> V;
    /// Lane i holds numbers 2 i and 2 i + 1 of the vectors, one behind the other.
    unsafe fn adjacent(first: V, second: V) -> V;
}

/// A pair's bits, its first number in the lower half.
fn pair(first: f32, second: f32) -> f32 {
    let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
    f32::from_bits(bits(first) | bits(second) << 16)
}

/// Numbers `at` and those behind it of a row of k, zeros behind its end.
///
/// # Safety
/// The row is valid.
#[inline(always)]
pub(super) unsafe fn load_row<V: Vector>(row: *const f32, at: usize, k: usize) -> V {
    // SAFETY: the caller's promise; nothing behind the row is read.
    unsafe {
        match k.saturating_sub(at) {
            0 => V::splat(0.0),
            n if n < V::LANES => V::load_first(row.add(at), n),
            _ => V::load(row.add(at)),
        }
    }
}

/// Packs groups as (pairs, group), of k filled up to a multiple of `k_unit`.
///
/// # Safety
/// As `Loops::pack_rows`.
#[inline(always)]
pub(super) unsafe fn pack<V: Vector, M: Pairs<V>, const LANES: usize>(
    source: PackSource,
    group: usize,
    k_unit: usize,
    to: *mut f32,
) {
    let PackSource { start, count, k, across, along } = source;
    let pairs = k.next_multiple_of(k_unit) / 2;
    // SAFETY: reads stay inside the source, whose last row or column stands in for those that are missing; writes
    // inside of whole groups and one vector behind them, and what is written there is written again in its turn.
    unsafe {
        for first in (0..count).step_by(group) {
            let here = group.min(count - first);
            let (from, to) = (start.add(first * across), to.add(first * pairs));
            if along == 1 {
                for i in (0..here).step_by(LANES) {
                    let rows: [_; LANES] =
                        std::array::from_fn(|lane| from.add((i + lane).min(here - 1) * across));
                    for p in (0..pairs).step_by(LANES) {
                        let mut vectors = [V::splat(0.0); LANES];
                        for lane in 0..LANES {
                            let first = load_row(rows[lane], 2 * p, k);
                            vectors[lane] = M::adjacent(first, load_row(rows[lane], 2 * p + LANES, k));
                        }
                        V::transpose(&mut vectors);
                        for place in 0..LANES.min(pairs - p) {
                            vectors[place].store(to.add((p + place) * group + i));
                        }
                    }
                }
                continue;
            }
            for p in 0..pairs {
                if across == 1 {
                    for i in (0..here).step_by(LANES) {
                        let n = (here - i).min(LANES);
                        let (mut first, mut second) = (V::splat(0.0), V::splat(0.0));
                        if 2 * p < k {
                            first = V::load_first(from.add(2 * p * along + i), n);
                        }
                        if 2 * p + 1 < k {
                            second = V::load_first(from.add((2 * p + 1) * along + i), n);
                        }
                        M::interleave(first, second).store_first(to.add(p * group + i), n);
                    }
                    continue;
                }
                for i in 0..here {
                    let number = |at| if at < k { *from.add(i * across + at * along) } else { 0.0 };
                    *to.add(p * group + i) = pair(number(2 * p), number(2 * p + 1));
                }
            }
        }
    }
}

mod plain {
    //! Arrays, for processors without instructions of ours: what the others are held against.

    use super::{Pairs, pack, pair};
    use crate::eager::kernels::gemm::micro::{Loops, Multiply, PackSource, ProductBlock, tile, with_rows};

    const LANES: usize = 4;
    type Lanes = [f32; LANES];

    pub const LOOPS: Loops = Loops {
        rows: 4,
        columns: 2 * LANES,
        per_element: 2,
        k_unit: 2,
        depth: 2 * 768,
        block,
        pack_rows,
        pack_columns,
    };

    struct Plain;

    impl Multiply<Lanes> for Plain {
        unsafe fn add(a: Lanes, b: Lanes, sum: Lanes) -> Lanes {
            std::array::from_fn(|i| {
                let [a, b] = [a[i], b[i]].map(f32::to_bits);
                let product = |a: u32, b: u32| f32::from_bits(a) * f32::from_bits(b); // exact
                let sum = product(a & 0xffff_0000, b & 0xffff_0000) + sum[i];
                product(a << 16, b << 16) + sum
            })
        }
    }

    impl Pairs<Lanes> for Plain {
        unsafe fn interleave(first: Lanes, second: Lanes) -> Lanes {
            std::array::from_fn(|i| pair(first[i], second[i]))
        }
        unsafe fn adjacent(first: Lanes, second: Lanes) -> Lanes {
            let number = |i: usize| if i < LANES { first[i] } else { second[i - LANES] };
            std::array::from_fn(|i| pair(number(2 * i), number(2 * i + 1)))
        }
    }

    unsafe fn block(b: &ProductBlock) {
        for column in (0..b.columns).step_by(LOOPS.columns) {
            for row in (0..b.rows).step_by(LOOPS.rows) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!(Lanes, Plain, 4, [1 2 3], b, row, column) }
            }
        }
    }

    unsafe fn pack_rows(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::<Lanes, Plain, LANES>(source, LOOPS.rows, LOOPS.k_unit, to) }
    }

    unsafe fn pack_columns(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::<Lanes, Plain, LANES>(source, LOOPS.columns, LOOPS.k_unit, to) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! AVX-512, with the unit for bf16 and without.

    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{Pairs, pack};
    use crate::eager::kernels::gemm::micro::{Loops, Multiply, PackSource, ProductBlock, tile, with_rows};

    pub const WITH_UNIT: Loops = Loops {
        rows: 14,
        columns: 32,
        per_element: 2,
        k_unit: 2,
        depth: 2 * 768,
        block: block_with_unit,
        pack_rows: pack_with_unit::<14>,
        pack_columns: pack_with_unit::<32>,
    };
    pub const WITHOUT_UNIT: Loops = Loops {
        block: block_without_unit,
        pack_rows: pack_without_unit::<14>,
        pack_columns: pack_without_unit::<32>,
        ..WITH_UNIT
    };

    /// Whether the processor has all that [`WITH_UNIT`] is written in.
    pub fn has_unit() -> bool {
        is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512f")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn block_with_unit(b: &ProductBlock) {
        for column in (0..b.columns).step_by(32) {
            for row in (0..b.rows).step_by(14) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!(__m512, Unit, 14, [1 2 3 4 5 6 7 8 9 10 11 12 13], b, row, column) }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn block_without_unit(b: &ProductBlock) {
        for column in (0..b.columns).step_by(32) {
            for row in (0..b.rows).step_by(14) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!(__m512, NoUnit, 14, [1 2 3 4 5 6 7 8 9 10 11 12 13], b, row, column) }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pack_with_unit<const GROUP: usize>(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::<__m512, Unit, 16>(source, GROUP, WITH_UNIT.k_unit, to) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn pack_without_unit<const GROUP: usize>(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { pack::<__m512, NoUnit, 16>(source, GROUP, WITHOUT_UNIT.k_unit, to) }
    }

    // SAFETY of all of the below: whoever calls has the instructions; vectors of one size are any bits.

    /// AVX512-BF16.
    pub struct Unit;

    impl Multiply<__m512> for Unit {
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512, sum: __m512) -> __m512 {
            unsafe {
                _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b))
            }
        }
    }

    impl Pairs<__m512> for Unit {
        #[inline(always)]
        unsafe fn interleave(first: __m512, second: __m512) -> __m512 {
            unsafe {
                let halves = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
                // number i of the first half, number i of the second
                let order = _mm512_or_si512(
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                    _mm512_slli_epi32::<16>(_mm512_setr_epi32(
                        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                    )),
                );
                _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))
            }
        }
        #[inline(always)]
        unsafe fn adjacent(first: __m512, second: __m512) -> __m512 {
            unsafe { transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
        }
    }

    /// The same by AVX-512 alone.
    struct NoUnit;

    /// bf16 in the lower half of each lane.
    #[inline(always)]
    unsafe fn rounded(x: __m512) -> __m512i {
        unsafe {
            let bits = _mm512_castps_si512(x);
            let cut = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(cut, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let near = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            // what is no number stays none, whichever of its bits are cut
            let quiet = _mm512_or_si512(cut, _mm512_set1_epi32(0x40));
            _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), quiet)
        }
    }

    impl Multiply<__m512> for NoUnit {
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512, sum: __m512) -> __m512 {
            unsafe {
                let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
                let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let second = |x| _mm512_castsi512_ps(_mm512_and_si512(x, high));
                let first = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
                _mm512_fmadd_ps(first(a), first(b), _mm512_fmadd_ps(second(a), second(b), sum))
            }
        }
    }

    impl Pairs<__m512> for NoUnit {
        #[inline(always)]
        unsafe fn interleave(first: __m512, second: __m512) -> __m512 {
            unsafe {
                let second = _mm512_slli_epi32::<16>(rounded(second));
                _mm512_castsi512_ps(_mm512_or_si512(rounded(first), second))
            }
        }
        #[inline(always)]
        unsafe fn adjacent(first: __m512, second: __m512) -> __m512 {
            unsafe {
                let first = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(rounded(first)));
                let second = _mm512_cvtepi32_epi16(rounded(second));
                _mm512_castsi512_ps(_mm512_inserti64x4::<1>(first, second))
            }
        }
    }
}
