//! Matrix products: strided views → one multi-threaded product, and what follows it while it is in the cache.
//!
//! An element of a result is summed over k in one order, which depends on k alone: neither the number of threads nor
//! the other rows of a batch show in a bit of it.

pub mod bf16;
mod micro;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Buffer;
use micro::{Base, Loops, PackSource, ProductBlock};

/// A matrix in memory: element (i, j) stands at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows stand `row_stride` apart.
    ///
    /// # Panics
    /// It does not lie inside `data`.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        check_inside(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// How many columns it has.
    pub(in crate::eager::kernels) fn width(&self) -> usize {
        self.columns
    }

    /// Some of the rows.
    pub fn rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        let data = self.data.get(range.start * self.row_stride..).unwrap_or_default();
        Self { data, rows: range.len(), ..self }
    }

    /// Some of the columns.
    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns);
        let data = self.data.get(range.start * self.column_stride..).unwrap_or_default();
        Self { data, columns: range.len(), ..self }
    }

    /// What the packing loops read, rows side by side.
    fn source(self) -> PackSource {
        let (across, along) = (self.row_stride, self.column_stride);
        PackSource { start: self.data.as_ptr(), count: self.rows, k: self.columns, across, along }
    }

    /// The same numbers with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix that is written.
pub struct MatrixMut<'a> {
    data: Shared,
    rows: usize,
    columns: usize,
    row_stride: usize,
    borrowed: PhantomData<&'a mut f32>,
}

impl<'a> MatrixMut<'a> {
    /// A row-major matrix whose rows stand `row_stride` apart.
    ///
    /// # Panics
    /// It does not lie inside `data`, or its rows overlap: threads would write the same numbers.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        check_inside(data.len(), rows, columns, row_stride);
        assert!(
            rows < 2 || row_stride >= columns,
            "rows of {columns} numbers that stand {row_stride} apart overlap"
        );
        Self { data: Shared::new(data), rows, columns, row_stride, borrowed: PhantomData }
    }

    /// A matrix whose rows lie between those of others, which a slice could not say.
    ///
    /// # Safety
    /// For as long as the result lives, its elements are valid and nobody else touches them; its rows don't overlap.
    pub unsafe fn raw(data: *mut f32, rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data: Shared(data), rows, columns, row_stride, borrowed: PhantomData }
    }
}

/// Whether so many rows lie inside so many numbers.
///
/// # Panics
/// They don't.
fn check_inside(numbers: usize, rows: usize, columns: usize, row_stride: usize) {
    let end = match rows.checked_sub(1) {
        Some(before) if columns > 0 => {
            before.checked_mul(row_stride).and_then(|last| last.checked_add(columns))
        }
        _ => Some(0),
    };
    assert!(
        end.is_some_and(|end| end <= numbers),
        "{rows} rows of {columns} numbers, {row_stride} apart, are not inside of {numbers} numbers"
    );
}

/// Whether a product replaces what stands in the destination or is added to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

/// What the factors of products are rounded to; the products themselves are added up in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    F32,
    /// To the nearest number of eight binary digits, of two equally near ones the even one.
    Bf16,
}

impl Factors {
    /// The fastest loops that this processor runs.
    fn loops(self) -> Loops {
        match self {
            Self::F32 => micro::loops(),
            Self::Bf16 => bf16::loops(),
        }
    }
}

/// Rows that a task packs and works on, or a few less.
const HEIGHT: usize = 128;

/// Multiplications that are worth a task.
const WORTH_A_TASK: usize = 1 << 20;

/// Numbers of a vector: packing may write so many behind the last group.
const SLACK: usize = 16;

/// `dst = scale · lhs · rhs`, or `dst += …`, in this thread.
pub fn product(dst: MatrixMut, write: Write, scale: f32, lhs: Matrix, rhs: Matrix, factors: Factors) {
    PackedMatrix::here(rhs, factors).product(dst, write, scale, None, lhs);
}

/// `dst = lhs · rhs`, or `dst += …`, on all threads.
pub fn parallel_product(dst: MatrixMut, write: Write, lhs: Matrix, rhs: Matrix, factors: Factors) {
    PackedMatrix::new(rhs, factors).parallel_product(dst, write, None, lhs);
}

/// The right operand of products, in the order in which they read it.
pub struct PackedMatrix {
    loops: Loops,
    k: usize,
    columns: usize,
    /// Part of k by part of k, panel by panel.
    numbers: Buffer,
}

impl PackedMatrix {
    /// Packs (k, columns) on all threads. The left operands are rounded to the same.
    pub fn new(rhs: Matrix, factors: Factors) -> Self {
        let mut packed = Self::empty(rhs, factors.loops());
        let start = Shared::new(&mut packed.numbers);
        let pieces = if packed.numbers.len() < WORTH_A_TASK / 16 { 1 } else { rayon::current_num_threads() };
        each(pieces, |i| packed.pack(rhs, share(rhs.columns, pieces, i, packed.loops.columns), start));
        packed
    }

    /// Packs (k, columns) in this thread.
    pub fn here(rhs: Matrix, factors: Factors) -> Self {
        Self::with(rhs, factors.loops())
    }

    fn with(rhs: Matrix, loops: Loops) -> Self {
        let mut packed = Self::empty(rhs, loops);
        let start = Shared::new(&mut packed.numbers);
        packed.pack(rhs, 0..rhs.columns, start);
        packed
    }

    fn empty(rhs: Matrix, loops: Loops) -> Self {
        // the rows of an operand may be the same numbers over and over, so they may be any number
        let length = rhs.columns.checked_next_multiple_of(loops.columns);
        let length = length.and_then(|columns| columns.checked_mul(loops.elements(rhs.rows)));
        let numbers = Buffer::any(length.expect("an operand that can be packed"));
        Self { loops, k: rhs.rows, columns: rhs.columns, numbers }
    }

    /// Where the panels of a part of k begin that hold the columns from `column` on.
    fn place(&self, depth: &Range<usize>, column: usize) -> usize {
        let before = self.loops.elements(depth.start) * self.columns.next_multiple_of(self.loops.columns);
        before + column * self.loops.elements(depth.len())
    }

    /// Packs whole panels.
    fn pack(&self, rhs: Matrix, columns: Range<usize>, start: Shared) {
        if self.k == 0 {
            return; // nothing to read
        }
        let rhs = rhs.columns(columns.clone());
        for depth in self.depths() {
            let source = rhs.rows(depth.clone()).transposed().source();
            // SAFETY: the view lies inside its slice; from this place on there is room for the panels, which no other
            // task packs.
            unsafe {
                let to = start.get().add(self.place(&depth, columns.start));
                (self.loops.pack_columns)(source, to);
            }
        }
    }

    /// `dst = scale · lhs · self + bias`, or `dst += …` without a bias, in this thread.
    pub fn product(&self, dst: MatrixMut, write: Write, scale: f32, bias: Option<&[f32]>, lhs: Matrix) {
        self.check(&dst, write, bias, lhs);
        // SAFETY: all of dst, which is borrowed exclusively.
        unsafe { self.block(&dst, 0..dst.rows, 0..dst.columns, write, scale, bias, lhs) }
    }

    /// `dst = lhs · self + bias`, or `dst += …` without a bias, on all threads.
    pub fn parallel_product(&self, dst: MatrixMut, write: Write, bias: Option<&[f32]>, lhs: Matrix) {
        self.check(&dst, write, bias, lhs);
        let (down, across) = self.grid(dst.rows);
        each(down * across, |task| {
            let rows = share(dst.rows, down, task / across, self.loops.rows);
            let columns = share(dst.columns, across, task % across, self.loops.columns);
            // SAFETY: blocks do not overlap, and dst is borrowed exclusively.
            unsafe { self.block(&dst, rows, columns, write, 1.0, bias, lhs) }
        });
    }

    fn check(&self, dst: &MatrixMut, write: Write, bias: Option<&[f32]>, lhs: Matrix) {
        assert_eq!((dst.rows, dst.columns, lhs.columns), (lhs.rows, self.columns, self.k));
        assert!(bias.is_none_or(|bias| bias.len() == self.columns && write == Write::Replace));
    }

    /// Computes a block of the result, whose columns begin at a panel.
    ///
    /// # Safety
    /// Nobody else touches the block.
    #[allow(clippy::too_many_arguments)] // a product, and which part of it
    unsafe fn block(
        &self,
        dst: &MatrixMut,
        rows: Range<usize>,
        columns: Range<usize>,
        write: Write,
        scale: f32,
        bias: Option<&[f32]>,
        lhs: Matrix,
    ) {
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        let lhs = lhs.rows(rows.clone());
        let deepest = self.depths().map(|depth| self.loops.elements(depth.len())).max().unwrap_or(0);
        let kept = LHS.take();
        let room = rows.len().next_multiple_of(self.loops.rows) * deepest + SLACK;
        let mut packed = kept.filter(|kept| kept.len() >= room).unwrap_or_else(|| Buffer::any(room));
        for depth in self.depths() {
            let k = self.loops.elements(depth.len());
            let base = match (bias, write) {
                (Some(bias), _) if depth.start == 0 => Base::Row(bias[columns.start..].as_ptr()),
                (None, Write::Replace) if depth.start == 0 => Base::Zero,
                _ => Base::Result,
            };
            // SAFETY: views lie inside their slices, packed operands hold whole tiles and panels, and the block is
            // the caller's alone.
            unsafe {
                if !depth.is_empty() {
                    let source = lhs.columns(depth.clone()).source();
                    (self.loops.pack_rows)(source, packed.as_mut_ptr());
                }
                (self.loops.block)(&ProductBlock {
                    lhs: packed.as_ptr(),
                    rhs: self.numbers[self.place(&depth, columns.start)..].as_ptr(),
                    panel: k * self.loops.columns,
                    rows: rows.len(),
                    columns: columns.len(),
                    k,
                    result: dst.data.get().add(rows.start * dst.row_stride + columns.start),
                    stride: dst.row_stride,
                    base,
                    scale,
                });
            }
        }
        LHS.set(Some(packed));
    }

    /// The parts of k that are summed in registers, at least one.
    fn depths(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (k, unit) = (self.k, self.loops.k_unit);
        let parts = k.div_ceil(self.loops.depth).max(1);
        (0..parts).map(move |i| share(k, parts, i, unit))
    }

    /// Into how many blocks a result is cut, down and across, so that threads are done at the same time.
    fn grid(&self, rows: usize) -> (usize, usize) {
        let threads = rayon::current_num_threads();
        let (tiles, panels) = (rows.div_ceil(self.loops.rows), self.columns.div_ceil(self.loops.columns));
        let most = (rows.saturating_mul(self.columns).saturating_mul(self.k) / WORTH_A_TASK).max(1);
        let least = rows.div_ceil(HEIGHT).max(1);
        let mut best = (usize::MAX, (least, 1));
        for across in 1..=threads.min(panels).max(1) {
            for down in least..=least.next_multiple_of(threads) {
                let tasks = down * across;
                let cost = tasks.div_ceil(threads) * tiles.div_ceil(down) * panels.div_ceil(across);
                if tasks <= most.max(least) && cost < best.0 {
                    best = (cost, (down, across));
                }
            }
        }
        best.1
    }
}

thread_local! {
    /// The packed left operand of the block that this thread works on.
    static LHS: Cell<Option<Buffer>> = const { Cell::new(None) };
}

/// Works on blocks of rows on all threads; a block is large enough for products, small enough for the cache.
pub fn row_blocks(rows: usize, factors: Factors, work: impl Fn(Range<usize>) + Sync) {
    let unit = factors.loops().rows;
    let threads = rayon::current_num_threads();
    let blocks = rows.div_ceil(HEIGHT).next_multiple_of(threads).min(rows.div_ceil(unit)).max(1);
    each(blocks, |i| {
        let rows = share(rows, blocks, i, unit);
        if !rows.is_empty() {
            work(rows);
        }
    });
}

/// Does tasks on all threads; a single one in this thread.
fn each(tasks: usize, work: impl Fn(usize) + Sync) {
    match tasks {
        1 => work(0),
        _ => (0..tasks).into_par_iter().with_max_len(1).for_each(&work),
    }
}

/// A pointer that tasks share to write to places of their own.
#[derive(Clone, Copy)]
pub struct Shared<T = f32>(*mut T);

// SAFETY: whoever dereferences it keeps tasks apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// Shares what `data` points to.
    pub fn new(data: &mut [T]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The pointer. Through this method closures capture the whole, which is `Sync`.
    pub fn get(self) -> *mut T {
        self.0
    }

    /// `length` elements from `offset` on.
    ///
    /// # Safety
    /// They lie inside the shared slice, which outlives the result, and no other task touches them.
    pub unsafe fn slice<'a>(self, offset: usize, length: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), length) }
    }
}

/// The `index`-th of `parts` nearly equal ranges of `0..n`, cut at multiples of `unit`.
pub fn share(n: usize, parts: usize, index: usize, unit: usize) -> Range<usize> {
    let units = n.div_ceil(unit);
    let cut = |i: usize| (units * i / parts * unit).min(n);
    cut(index)..cut(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_a_range_once() {
        for n in [0, 1, 7, 16, 100, 530] {
            for parts in [1, 3, 8] {
                let all: Vec<usize> = (0..parts).flat_map(|i| share(n, parts, i, 16)).collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_number_of_threads_shows_in_no_bit() {
        let sizes = [(522, 384, 384), (100, 1536, 384), (522, 384, 1536), (384, 1536, 522), (33, 800, 1000)];
        let all = sizes.map(|size| (size, Factors::F32)).into_iter();
        for ((m, n, k), factors) in all.chain([((200, 96, 900), Factors::Bf16)]) {
            let value = |i: usize| ((i * 7919) % 1009) as f32 / 500.0 - 1.0;
            let (a, b): (Vec<f32>, Vec<f32>) =
                ((0..m * k).map(value).collect(), (0..n * k).map(value).collect());
            let with = |threads, transposed: bool| {
                let mut c = vec![0.0; m * n];
                let lhs =
                    if transposed { Matrix::new(&a, k, m, m).transposed() } else { Matrix::new(&a, m, k, k) };
                let rhs =
                    if transposed { Matrix::new(&b, k, n, n) } else { Matrix::new(&b, n, k, k).transposed() };
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let dst = MatrixMut::new(&mut c, m, n, n);
                pool.install(|| parallel_product(dst, Write::Replace, lhs, rhs, factors));
                c
            };
            for transposed in [false, true] {
                let one = with(1, transposed);
                for threads in [2, 3, 5, 8, 16] {
                    assert!(
                        one == with(threads, transposed),
                        "{m}×{n}×{k} on {threads} threads: {factors:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_element_is_the_sum_of_its_products() {
        let value = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
        let whole = |x: f32| x;
        micro::all().into_iter().for_each(|loops| check_sums("f32", loops, value, whole));
    }

    #[test]
    fn every_element_in_bf16_is_the_sum_of_the_rounded_numbers_products() {
        // between two numbers of bf16, in their middle, and on them
        let value = |i: usize| ((i * 7919) % 1021) as f32 / 512.0 - 1.0;
        let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
        for (name, loops) in bf16::all() {
            check_sums(name, loops, value, rounded);
        }
    }

    #[test]
    fn in_bf16_what_is_no_number_is_none_in_its_row_and_column_alone() {
        let (m, n, k) = (35, 40, 37);
        for (name, loops) in bf16::all() {
            let (mut a, mut b) = (vec![1.0; m * k], vec![1.0; k * n]);
            (a[3 * k + 36], b[36 * n + 5]) = (f32::NAN, f32::from_bits(0x7fff_ffff));
            (a[20 * k], b[9]) = (f32::INFINITY, f32::NEG_INFINITY);
            let mut c = vec![0.0; m * n];
            let packed = PackedMatrix::with(Matrix::new(&b, k, n, n), loops);
            let (dst, lhs) = (MatrixMut::new(&mut c, m, n, n), Matrix::new(&a, m, k, k));
            packed.product(dst, Write::Replace, 1.0, None, lhs);
            for (at, &x) in c.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                let right = match (i, j) {
                    (3, _) | (_, 5) => x.is_nan(),
                    (20, 9) => x == f32::NEG_INFINITY,
                    (20, _) => x == f32::INFINITY,
                    (_, 9) => x == f32::NEG_INFINITY,
                    _ => x == k as f32,
                };
                assert!(right, "{name}: {x} at {i}, {j}");
            }
        }
    }

    /// The forms in software add in one order, which is that of AVX512-BF16 by Intel's manual, so that they agree with what
    /// is emulated by it. A processor's own unit is held to the sums alone: another maker's may round less often.
    #[test]
    fn forms_of_bf16_agree_to_the_bit_where_they_add_in_one_order() {
        let value = |i: usize| ((i * 7919) % 1021) as f32 / 512.0 - 1.0;
        let (m, n, k) = (29, 70, 130);
        let (a, b): (Vec<f32>, Vec<f32>) =
            ((0..m * k).map(value).collect(), (0..k * n).map(|i| value(i + 5)).collect());
        let of = |loops| {
            let mut c = vec![0.0f32; m * n];
            let packed = PackedMatrix::with(Matrix::new(&b, k, n, n), loops);
            let (dst, lhs) = (MatrixMut::new(&mut c, m, n, n), Matrix::new(&a, m, k, k));
            packed.product(dst, Write::Replace, 1.0, None, lhs);
            c
        };
        let all = bf16::all();
        let plain = of(all[0].1);
        let emulated = if bf16::unit().is_none() { bf16::Unit::Avx512Bf16.name() } else { "" };
        let compared = ["avx512", emulated];
        for (name, loops) in all.into_iter().filter(|(name, _)| compared.contains(name)) {
            assert!(of(loops) == plain, "{name}");
        }
    }

    fn check_sums(
        name: &str,
        loops: Loops,
        value: impl Fn(usize) -> f32 + Copy,
        factor: impl Fn(f32) -> f32 + Copy,
    ) {
        for (m, n, k) in [(1, 1, 1), (3, 5, 2), (14, 32, 16), (29, 70, 65), (45, 17, 1100), (2, 3, 0)] {
            // each operand as it is, as a part of a wider matrix, and transposed
            for (a_wide, b_wide, transposed) in [(0, 0, false), (3, 1, false), (0, 0, true), (1, 2, true)] {
                let (a, b): (Vec<f32>, Vec<f32>) = (
                    (0..(m + a_wide) * (k + a_wide)).map(value).collect(),
                    (0..(n + b_wide) * (k + b_wide)).map(|i| value(i + 5)).collect(),
                );
                let (lhs, rhs) = if transposed {
                    let lhs = Matrix::new(&a, k, m, m + a_wide).transposed();
                    (lhs, Matrix::new(&b, n, k, k + b_wide).transposed())
                } else {
                    (Matrix::new(&a, m, k, k + a_wide), Matrix::new(&b, k, n, n + b_wide))
                };
                let bias: Vec<f32> = (0..n).map(|i| value(i + 9)).collect();
                let packed = PackedMatrix::with(rhs, loops);
                let mut c = vec![7.0; m * (n + 2)];
                let dst = MatrixMut::new(&mut c, m, n, n + 2);
                packed.product(dst, Write::Replace, 1.0, Some(&bias), lhs);
                let dst = MatrixMut::new(&mut c, m, n, n + 2);
                packed.product(dst, Write::Add, 0.5, None, lhs);
                for i in 0..m {
                    for j in 0..n {
                        let at = |x: Matrix, i, j| {
                            f64::from(factor(x.data[i * x.row_stride + j * x.column_stride]))
                        };
                        let sum: f64 = (0..k).map(|p| at(lhs, i, p) * at(rhs, p, j)).sum();
                        let exact = 1.5 * sum + f64::from(bias[j]);
                        let found = f64::from(c[i * (n + 2) + j]);
                        assert!(
                            (found - exact).abs() < 1e-3,
                            "{name}: {m}×{n}×{k} at {i}, {j}: {found}, {exact}"
                        );
                    }
                    assert_eq!(c[i * (n + 2) + n..][..2], [7.0; 2], "what stands beside the result stays");
                }
            }
        }
    }
}
