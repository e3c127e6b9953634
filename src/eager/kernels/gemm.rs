//! Matrix products: strided views → one multi-threaded product whose result depends on shapes alone.
//!
//! The work is cut into blocks, each one single-threaded call of the `gemm` crate.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

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
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len());
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Some of the rows.
    pub fn rows(self, range: Range<usize>) -> Self {
        assert!(range.end <= self.rows);
        let data = self.data.get(range.start * self.row_stride..).unwrap_or_default();
        Self { data, rows: range.len(), ..self }
    }

    /// Some of the columns.
    pub fn columns(self, range: Range<usize>) -> Self {
        assert!(range.end <= self.columns);
        let data = self.data.get(range.start * self.column_stride..).unwrap_or_default();
        Self { data, columns: range.len(), ..self }
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
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len());
        Self { data: Shared::new(data), rows, columns, row_stride, borrowed: PhantomData }
    }

    /// A matrix whose rows lie between those of others, which a slice could not say.
    ///
    /// # Safety
    /// For as long as the result lives, its elements are valid and nobody else touches them.
    pub unsafe fn raw(data: *mut f32, rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data: Shared(data), rows, columns, row_stride, borrowed: PhantomData }
    }
}

/// Whether a product replaces what stands in the destination or is added to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

/// `dst = scale · lhs · rhs`, or `dst += …`, in this thread.
pub fn product(dst: MatrixMut, write: Write, scale: f32, lhs: Matrix, rhs: Matrix) {
    assert_eq!((dst.rows, dst.columns, lhs.columns), (lhs.rows, rhs.columns, rhs.rows));
    if dst.rows == 0 || dst.columns == 0 {
        return;
    }
    // SAFETY: the views' constructors have checked that every element that the strides reach lies inside its
    // slice, and `dst` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.columns,
            lhs.columns,
            dst.data.get(),
            1,
            dst.row_stride as isize,
            write == Write::Add,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0, // scales what stands in dst
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `dst = lhs · rhs`, or `dst += …`, on all threads.
pub fn parallel_product(dst: MatrixMut, write: Write, lhs: Matrix, rhs: Matrix) {
    assert_eq!((dst.rows, dst.columns, lhs.columns), (lhs.rows, rhs.columns, rhs.rows));
    let (start, stride) = (dst.data, dst.row_stride);
    in_blocks(dst.rows, dst.columns, lhs.columns, |rows, columns| {
        // SAFETY: the block lies inside dst, which is borrowed exclusively, and blocks do not overlap.
        let block = unsafe {
            let first = start.get().add(rows.start * stride + columns.start);
            MatrixMut::raw(first, rows.len(), columns.len(), stride)
        };
        product(block, write, 1.0, lhs.rows(rows), rhs.columns(columns));
    });
}

/// Cuts an (m, n) product over k into blocks of rows and columns, and works on them on all threads.
pub fn in_blocks(m: usize, n: usize, k: usize, work: impl Fn(Range<usize>, Range<usize>) + Sync) {
    let (down, across) = blocks(m, n, k);
    (0..down * across).into_par_iter().with_max_len(1).for_each(|task| {
        let (rows, columns) = (share(m, down, task / across), share(n, across, task % across));
        if !rows.is_empty() && !columns.is_empty() {
            work(rows, columns);
        }
    });
}

/// A pointer that tasks share to write to places of their own.
#[derive(Clone, Copy)]
pub struct Shared(*mut f32);

// SAFETY: whoever dereferences it keeps tasks apart.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Shares what `data` points to.
    pub fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The pointer. Through this method closures capture the whole, which is `Sync`.
    pub fn get(self) -> *mut f32 {
        self.0
    }

    /// `length` elements from `offset` on.
    ///
    /// # Safety
    /// They lie inside the shared slice, which outlives the result, and no other task touches them.
    pub unsafe fn slice<'a>(self, offset: usize, length: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), length) }
    }
}

/// The `index`-th of `parts` nearly equal ranges of `0..n`, cut at multiples of 16 where there are enough.
pub fn share(n: usize, parts: usize, index: usize) -> Range<usize> {
    let cut = |i: usize| {
        let exact = n * i / parts;
        if i == parts || n < 16 * parts { exact } else { exact.next_multiple_of(16).min(n) }
    };
    cut(index)..cut(index + 1)
}

/// Into how many blocks a product is cut, down and across: one for each thread, in the shape that packs the least
/// twice; one where there is too little to share. The `gemm` crate sums an element over k in an order that depends
/// on k, and on whether rows and columns are both at most 64; blocks stay above that, so no cut shows in a result.
fn blocks(m: usize, n: usize, k: usize) -> (usize, usize) {
    const WORTH_A_TASK: usize = 4_000_000;
    const LEAST: usize = 96; // `share` may take 16 away
    let most = (2 * m * n * k / WORTH_A_TASK).max(1);
    let tasks = rayon::current_num_threads().min(most);
    let mut best = (1, 1);
    let mut least = usize::MAX;
    for down in 1..=tasks.min(m / LEAST).max(1) {
        let across = (tasks / down).min(n / LEAST).max(1);
        // what is packed, as often as blocks fall short of the tasks: threads without work
        let cost = (down * n + across * m) * tasks.div_ceil(down * across);
        if cost < least {
            (least, best) = (cost, (down, across));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_a_range_once() {
        for n in [0, 1, 7, 16, 100, 530] {
            for parts in [1, 3, 8] {
                let all: Vec<usize> = (0..parts).flat_map(|i| share(n, parts, i)).collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_number_of_threads_shows_in_no_bit() {
        for (m, n, k) in
            [(522, 384, 384), (100, 1536, 384), (522, 384, 1536), (384, 1536, 522), (33, 800, 1000)]
        {
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
                pool.install(|| parallel_product(MatrixMut::new(&mut c, m, n, n), Write::Replace, lhs, rhs));
                c
            };
            for transposed in [false, true] {
                let one = with(1, transposed);
                for threads in [2, 3, 5, 8, 16] {
                    assert!(one == with(threads, transposed), "{m}×{n}×{k} on {threads} threads");
                }
            }
        }
    }

    #[test]
    fn a_product_is_the_sum_of_products() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 2), (130, 70, 65), (200, 300, 100)] {
            let value = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..n * k).map(|i| value(i + 5)).collect();
            let mut c = vec![1.0; m * n];
            let (lhs, rhs) = (Matrix::new(&a, m, k, k), Matrix::new(&b, n, k, k).transposed());
            parallel_product(MatrixMut::new(&mut c, m, n, n), Write::Add, lhs, rhs);
            for (i, j) in [(0, 0), (m - 1, n - 1), (m / 2, n / 3)] {
                let exact = 1.0 + (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum::<f32>();
                assert!((c[i * n + j] - exact).abs() < 1e-4, "{m}×{n}×{k} at {i},{j}");
            }
        }
    }
}
