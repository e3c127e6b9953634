//! The innermost loops of a product, in the processor's own vectors: a tile of the result is held in registers while
//! a column of one packed operand meets a row of the other (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053).

#![allow(clippy::needless_range_loop)] // loops over constant ranges become registers, iterators may not

/// What the loops are written in: vectors of f32.
pub(super) trait Vector: Copy {
    /// Numbers of a vector.
    const LANES: usize;

    /// Asks for the cache line of a place that is about to be used.
    unsafe fn prefetch(_place: *const f32) {}
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// The first `n` numbers, zeros behind them.
    unsafe fn load_first(from: *const f32, n: usize) -> Self;
    unsafe fn store_first(self, to: *mut f32, n: usize);
    /// `self · b + c`, rounded once where the processor can.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `LANES` vectors, the rows of a square matrix → its columns.
    unsafe fn transpose(rows: &mut [Self]);
}

/// How elements of packed operands are multiplied.
pub(super) trait Multiply<V> {
    /// `a · b + sum`.
    unsafe fn add(a: V, b: V, sum: V) -> V;
}

/// Elements that are one number each.
pub(super) struct Numbers;

impl<V: Vector> Multiply<V> for Numbers {
    #[inline(always)]
    unsafe fn add(a: V, b: V, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { a.mul_add(b, sum) }
    }
}

/// What stands in a tile of the result before the products are added.
#[derive(Clone, Copy)]
pub(super) enum Base {
    Zero,
    /// A row that is added to every row: a bias, from its first column on.
    Row(*const f32),
    /// What is there.
    Result,
}

/// A block of the result and the packed operands that it is the product of.
pub(super) struct ProductBlock {
    /// Row tiles, each (k, rows of a tile).
    pub lhs: *const f32,
    /// Column panels, each (k, columns of a panel), `panel` numbers apart.
    pub rhs: *const f32,
    pub panel: usize,
    pub rows: usize,
    pub columns: usize,
    /// Elements.
    pub k: usize,
    pub result: *mut f32,
    pub stride: usize,
    pub base: Base,
    pub scale: f32,
}

/// A matrix that is packed: `count` rows or columns, of `k` numbers each; number p of the i-th is `i · across + p ·
/// along` behind the start.
#[derive(Clone, Copy)]
pub(super) struct PackSource {
    pub start: *const f32,
    pub count: usize,
    pub k: usize,
    pub across: usize,
    pub along: usize,
}

/// The loops for one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a tile: of a panel.
    pub columns: usize,
    /// Numbers of k in an element of a packed operand, which is as large as an f32.
    pub per_element: usize,
    /// k is filled up with zeros to a multiple of this.
    pub k_unit: usize,
    /// Numbers of k that are summed in registers: the packed operands of so many stay in the cache.
    pub depth: usize,
    /// Computes a block. Safe to call where the block's pointers are valid and its result is nobody else's.
    pub block: unsafe fn(&ProductBlock),
    /// Packs groups of as many rows as a tile has: group by group. The destination has room for whole groups and for
    /// one more vector.
    pub pack_rows: unsafe fn(PackSource, *mut f32),
    /// Packs panels: panel by panel, (k, columns of a panel). The destination has room for whole panels.
    pub pack_columns: unsafe fn(PackSource, *mut f32),
}

impl Loops {
    /// The elements that so many numbers of k are packed into.
    pub fn elements(&self, k: usize) -> usize {
        k.next_multiple_of(self.k_unit) / self.per_element
    }
}

/// Of f32, in one vector's registers.
const DEPTH: usize = 768;

/// The widest that this processor runs.
pub(super) fn loops() -> Loops {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return x86::AVX512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return x86::AVX2;
        }
    }
    plain::LOOPS
}

/// All that this processor runs, for the tests.
#[cfg(test)]
pub(super) fn all() -> Vec<Loops> {
    let mut all = vec![plain::LOOPS];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            all.push(x86::AVX512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(x86::AVX2);
        }
    }
    all
}

/// Calls `tile` with a constant number of rows.
macro_rules! with_rows {
    ($vector:ty, $how:ty, $max:literal, [$($n:literal)*], $block:ident, $row:ident, $column:ident) => {
        match $block.rows - $row {
            $($n => tile::<$vector, $how, $n, $max>($block, $row, $column),)*
            _ => tile::<$vector, $how, $max, $max>($block, $row, $column),
        }
    };
}
pub(super) use with_rows;

/// One tile: R rows, two vectors of columns; the packed left operand has MAX rows.
#[inline(always)]
pub(super) unsafe fn tile<V: Vector, M: Multiply<V>, const R: usize, const MAX: usize>(
    block: &ProductBlock,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's block is valid, and the tile lies inside it; packed operands hold whole tiles.
    unsafe {
        let width = 2 * V::LANES;
        let mut lhs = block.lhs.add(row * block.k);
        let mut rhs = block.rhs.add(column / width * block.panel);
        // the result's lines arrive while the sums grow
        for r in 0..R {
            let to = block.result.wrapping_add((row + r) * block.stride + column);
            V::prefetch(to);
            V::prefetch(to.wrapping_add(V::LANES));
        }
        let (mut left, mut right) = ([V::splat(0.0); R], [V::splat(0.0); R]);
        for _ in 0..block.k {
            let columns = [V::load(rhs), V::load(rhs.add(V::LANES))];
            for r in 0..R {
                let x = V::splat(*lhs.add(r));
                left[r] = M::add(x, columns[0], left[r]);
                right[r] = M::add(x, columns[1], right[r]);
            }
            lhs = lhs.add(MAX);
            rhs = rhs.add(width);
        }
        write(block, row, column, left);
        if column + V::LANES < block.columns {
            write(block, row, column + V::LANES, right);
        }
    }
}

/// Puts one vector of columns of a tile into the result.
#[inline(always)]
pub(super) unsafe fn write<V: Vector, const R: usize>(
    block: &ProductBlock,
    row: usize,
    column: usize,
    sums: [V; R],
) {
    // SAFETY: as in `tile`; no column behind the block's is touched.
    unsafe {
        let n = (block.columns - column).min(V::LANES);
        let scale = V::splat(block.scale);
        for (r, sum) in sums.into_iter().enumerate() {
            let to = block.result.add((row + r) * block.stride + column);
            let sum = sum.mul(scale);
            let sum = match block.base {
                Base::Zero => sum,
                Base::Row(start) => sum.add(V::load_first(start.add(column), n)),
                Base::Result => sum.add(V::load_first(to, n)),
            };
            sum.store_first(to, n);
        }
    }
}

/// See [`Loops::pack_rows`]; groups are (k, group).
#[inline(always)]
unsafe fn pack<V: Vector, const LANES: usize>(source: PackSource, group: usize, to: *mut f32) {
    let PackSource { start, count, k, across, along } = source;
    // SAFETY: reads stay inside the source, whose last row or column stands in for those that are missing; writes
    // inside of whole groups and one vector behind them, and what is written there is written again in its turn.
    unsafe {
        if across == 1 {
            for first in (0..count).step_by(group) {
                let (from, to) = (start.add(first), to.add(first * k));
                if group.is_multiple_of(LANES) && first + group <= count {
                    for p in 0..k {
                        for i in (0..group).step_by(LANES) {
                            V::load(from.add(p * along + i)).store(to.add(p * group + i));
                        }
                    }
                    continue;
                }
                let here = group.min(count - first);
                for p in 0..k {
                    for i in (0..here).step_by(LANES) {
                        let n = (here - i).min(LANES);
                        V::load_first(from.add(p * along + i), n).store_first(to.add(p * group + i), n);
                    }
                }
            }
            return;
        }
        for first in (0..count).step_by(group) {
            let here = group.min(count - first);
            let (from, to) = (start.add(first * across), to.add(first * k));
            if along != 1 {
                for (p, i) in (0..k).flat_map(|p| (0..here).map(move |i| (p, i))) {
                    *to.add(p * group + i) = *from.add(i * across + p * along);
                }
                continue;
            }
            for i in (0..here).step_by(LANES) {
                let rows: [_; LANES] =
                    std::array::from_fn(|lane| from.add((i + lane).min(here - 1) * across));
                let to = to.add(i);
                for p in (0..k - k % LANES).step_by(LANES) {
                    let mut vectors = [V::splat(0.0); LANES];
                    for lane in 0..LANES {
                        vectors[lane] = V::load(rows[lane].add(p));
                    }
                    V::transpose(&mut vectors);
                    for place in 0..LANES {
                        vectors[place].store(to.add((p + place) * group));
                    }
                }
                let (p, n) = (k - k % LANES, k % LANES);
                if n > 0 {
                    let mut vectors = [V::splat(0.0); LANES];
                    for lane in 0..LANES {
                        vectors[lane] = V::load_first(rows[lane].add(p), n);
                    }
                    V::transpose(&mut vectors);
                    for (place, vector) in vectors[..n].iter().enumerate() {
                        vector.store(to.add((p + place) * group));
                    }
                }
            }
        }
    }
}

mod plain {
    //! Arrays, for processors without instructions of ours.

    use super::{DEPTH, Loops, Numbers, PackSource, ProductBlock, Vector, tile};

    const LANES: usize = 4;
    pub const LOOPS: Loops = Loops {
        rows: 4,
        columns: 2 * LANES,
        per_element: 1,
        k_unit: 1,
        depth: DEPTH,
        block,
        pack_rows,
        pack_columns,
    };

    unsafe fn block(b: &ProductBlock) {
        for column in (0..b.columns).step_by(LOOPS.columns) {
            for row in (0..b.rows).step_by(LOOPS.rows) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!([f32; LANES], Numbers, 4, [1 2 3], b, row, column) }
            }
        }
    }

    unsafe fn pack_rows(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { super::pack::<[f32; LANES], LANES>(source, LOOPS.rows, to) }
    }

    unsafe fn pack_columns(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { super::pack::<[f32; LANES], LANES>(source, LOOPS.columns, to) }
    }

    impl Vector for [f32; LANES] {
        const LANES: usize = LANES;

        unsafe fn splat(x: f32) -> Self {
            [x; LANES]
        }
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's promise; arrays of f32 are aligned as f32.
            unsafe { *from.cast() }
        }
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { *to.cast() = self }
        }
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            // SAFETY: the caller's promise.
            std::array::from_fn(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
        }
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            for (i, x) in self.into_iter().take(n).enumerate() {
                // SAFETY: the caller's promise.
                unsafe { *to.add(i) = x }
            }
        }
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            std::array::from_fn(|i| self[i] * b[i] + c[i])
        }
        unsafe fn add(self, b: Self) -> Self {
            std::array::from_fn(|i| self[i] + b[i])
        }
        unsafe fn mul(self, b: Self) -> Self {
            std::array::from_fn(|i| self[i] * b[i])
        }
        unsafe fn transpose(rows: &mut [Self]) {
            for i in 0..LANES {
                for j in 0..i {
                    (rows[i][j], rows[j][i]) = (rows[j][i], rows[i][j]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! AVX-512, and AVX2 with FMA.

    use std::arch::x86_64::*;

    use super::{DEPTH, Loops, Numbers, PackSource, ProductBlock, Vector, tile};

    pub const AVX512: Loops = Loops {
        rows: 14,
        columns: 32,
        per_element: 1,
        k_unit: 1,
        depth: DEPTH,
        block: block_avx512,
        pack_rows: pack_avx512::<14>,
        pack_columns: pack_avx512::<32>,
    };
    pub const AVX2: Loops = Loops {
        rows: 6,
        columns: 16,
        per_element: 1,
        k_unit: 1,
        depth: DEPTH,
        block: block_avx2,
        pack_rows: pack_avx2::<6>,
        pack_columns: pack_avx2::<16>,
    };

    #[target_feature(enable = "avx512f")]
    unsafe fn block_avx512(b: &ProductBlock) {
        for column in (0..b.columns).step_by(32) {
            for row in (0..b.rows).step_by(14) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!(__m512, Numbers, 14, [1 2 3 4 5 6 7 8 9 10 11 12 13], b, row, column) }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn pack_avx512<const GROUP: usize>(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { super::pack::<__m512, 16>(source, GROUP, to) }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn block_avx2(b: &ProductBlock) {
        for column in (0..b.columns).step_by(16) {
            for row in (0..b.rows).step_by(6) {
                // SAFETY: the caller's promise.
                unsafe { with_rows!(__m256, Numbers, 6, [1 2 3 4 5], b, row, column) }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn pack_avx2<const GROUP: usize>(source: PackSource, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { super::pack::<__m256, 8>(source, GROUP, to) }
    }

    // SAFETY of all of the below: whoever calls has the instructions, and hands over valid pointers.

    impl Vector for __m512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn prefetch(place: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, from) }
        }
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << n) - 1) as u16, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm512_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm512_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self]) {
            unsafe {
                let (mut t, mut u) = ([_mm512_setzero_ps(); 16], [_mm512_setzero_ps(); 16]);
                for i in 0..8 {
                    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
                }
                let low =
                    |a, b| _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
                let high =
                    |a, b| _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
                for i in [0, 4, 8, 12] {
                    (u[i], u[i + 1]) = (low(t[i], t[i + 2]), high(t[i], t[i + 2]));
                    (u[i + 2], u[i + 3]) = (low(t[i + 1], t[i + 3]), high(t[i + 1], t[i + 3]));
                }
                // quarter l of u[4 i + j] is column 4 l + j of the rows 4 i to 4 i + 3
                for j in 0..4 {
                    let even = [
                        _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
                        _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88),
                    ];
                    let odd = [
                        _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd),
                        _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd),
                    ];
                    rows[j] = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
                    rows[4 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
                    rows[8 + j] = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
                    rows[12 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
                }
            }
        }
    }

    /// All bits in the first `n` lanes.
    #[inline(always)]
    unsafe fn first(n: usize) -> __m256i {
        const BITS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        unsafe { _mm256_loadu_si256(BITS.as_ptr().add(8 - n).cast()) }
    }

    impl Vector for __m256 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn prefetch(place: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            unsafe { _mm256_maskload_ps(from, first(n)) }
        }
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            unsafe { _mm256_maskstore_ps(to, first(n), self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, b, c) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm256_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm256_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [Self]) {
            unsafe {
                let (mut t, mut u) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
                for i in 0..4 {
                    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
                }
                for i in [0, 4] {
                    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
                    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
                    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
                    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
                }
                // half l of u[4 i + j] is column 4 l + j of the rows 4 i to 4 i + 3
                for j in 0..4 {
                    rows[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
                    rows[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
                }
            }
        }
    }
}
