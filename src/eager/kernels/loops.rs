//! Every loop of the kernels over a few small numbers, in one thread. Each instruction set must give the same bits; and
//! under Miri, valgrind or AddressSanitizer the same cases show that no loop reads or writes where it must not
//! (`scripts/miri`).

use super::activation::{backward_here, forward};
use super::buffer::Buffer;
use super::dropout::Mask;
use super::gemm::{Factors, Matrix, MatrixMut, Write, product};
use super::{add_here, attention, cross_entropy, gradient, layer_norm, linear, simd};
use crate::model::ops::Activation;

/// Lengths on both sides of every vector's.
const LENGTHS: [usize; 7] = [1, 3, 8, 15, 16, 17, 37];

const ACTIVATIONS: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];

/// Numbers between −4 and 4.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 31 * seed) * 7919) % 1009) as f32 / 126.0 - 4.0).collect()
}

/// Runs every loop over vectors of this length; gives the names of the loops and what they wrote.
fn every_loop(n: usize) -> Vec<(&'static str, Vec<f32>)> {
    let (a, b, c) = (numbers(n, 1), numbers(n, 2), numbers(n, 3));
    let mut done = Vec::new();
    let mut on = |name, from: &[f32], change: &dyn Fn(&mut [f32])| {
        let mut to = from.to_vec();
        change(&mut to);
        done.push((name, to));
    };
    for how in ACTIVATIONS {
        on("activation", &a, &|to| forward(how, to, &b));
        on("activation's gradient", &a, &|to| backward_here(how, to, &b));
    }
    on("add", &a, &|to| add_here(to, &b));
    on("sum of squares", &[0.0], &|to| to[0] = gradient::sum_of_squares(&a));
    on("dot", &[0.0], &|to| to[0] = attention::dot(&a, &b));
    on("sums of columns", &a, &|to| linear::add_rows(to, &[&b[..], &c].concat()));

    let mask = Mask::new(7, 0.3);
    on("dropout", &a, &|to| mask.apply(1000, to));
    on("dropout, added", &a, &|to| mask.add(1000, to, &b));
    on("dropout of weights", &a, &|to| attention::multiply(to, mask.row(3), 0));

    let rows = [&a[..], &b].concat();
    on("layer norm", &rows, &|to| layer_norm::normalise(to, &rows, &b, &c, 1e-5));
    on("layer norm's gradient", &rows, &|to| {
        let (mut dw, mut db) = (a.clone(), b.clone());
        layer_norm::gradients(to, &mut dw, &mut db, &rows, &c, 1e-5);
        to[0] += dw.iter().sum::<f32>() + db.iter().sum::<f32>();
    });

    on("softmax", &a, &|to| to[0] += attention::softmax(to));
    let pairs = [&a[..], &b].concat();
    on("softmax's gradient", &pairs, &|to| {
        let (weights, gradient) = to.split_at_mut(n);
        attention::softmax_backward(weights, gradient, 4.0, 0.5);
    });
    on("softmax's gradient, masked", &pairs, &|to| {
        let (weights, gradient) = to.split_at_mut(n);
        attention::softmax_backward_masked(weights, gradient, 4.0, 0.5, mask.row(5), 0);
    });

    for smoothing in [0.0, 0.1] {
        on("cross-entropy", &[0.0], &|to| to[0] = cross_entropy::loss(&a, n / 2, smoothing));
        on("cross-entropy's gradient", &a, &|to| {
            let loss = cross_entropy::loss_gradient(to, n / 2, smoothing, 0.25);
            to[0] += loss;
        });
    }
    done
}

#[test]
#[cfg(target_arch = "x86_64")]
fn every_instruction_set_gives_the_same_bits() {
    for n in LENGTHS {
        let results = simd::tests::on_each(|| every_loop(n));
        let (_, plain) = &results[0];
        for (instructions, found) in &results {
            for ((name, found), (_, plain)) in found.iter().zip(plain) {
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(found), bits(plain), "{name}, {n} numbers, {instructions:?}");
            }
        }
    }
}

#[test]
fn every_loop_gives_numbers() {
    for n in LENGTHS {
        for (name, found) in every_loop(n) {
            assert!(found.iter().all(|x| x.is_finite()), "{name}, {n} numbers: {found:?}");
        }
    }
}

/// A number that is none must reach the loss, where training ends with its step and place.
#[test]
fn what_is_not_a_number_stays_so() {
    for n in LENGTHS {
        for how in ACTIVATIONS {
            let (mut x, dy) = (numbers(n, 1), numbers(n, 2));
            x[n / 2] = f32::NAN;
            let (mut y, mut dx) = (vec![0.0; n], dy);
            forward(how, &mut y, &x);
            assert!(y[n / 2].is_nan(), "{how:?} of {n}");
            assert_eq!(y.iter().filter(|y| y.is_nan()).count(), 1, "{how:?} of {n}");
            dx[n / 2] = f32::NAN;
            backward_here(how, &mut dx, &x);
            assert!(dx[n / 2].is_nan(), "{how:?}'s gradient of {n}");
        }
        let with_nan = |seed| {
            let mut x = numbers(n, seed);
            x[n / 2] = f32::NAN;
            x
        };
        let mut row = with_nan(1);
        assert!(attention::softmax(&mut row).is_nan() && row.iter().all(|x| x.is_nan()), "softmax of {n}");
        assert!(cross_entropy::loss(&with_nan(1), 0, 0.0).is_nan(), "cross-entropy of {n}");
        let mut row = with_nan(1);
        assert!(cross_entropy::loss_gradient(&mut row, 0, 0.0, 1.0).is_nan(), "cross-entropy of {n}");
        assert!(row.iter().all(|x| x.is_nan()), "cross-entropy's gradient of {n}");
        let (x, mut y) = (with_nan(1), vec![0.0; n]);
        layer_norm::normalise(&mut y, &x, &numbers(n, 2), &numbers(n, 3), 1e-5);
        assert!(y.iter().all(|y| y.is_nan()), "layer norm of {n}");
    }
}

/// An operand of a product: memory exactly as long as the matrix, whose last row ends where the memory does.
struct Operand {
    data: Vec<f32>,
    /// As it lies there.
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
}

impl Operand {
    /// (rows, columns), stored as it is or transposed, `wider` numbers between its rows.
    fn new(rows: usize, columns: usize, transposed: bool, wider: usize, seed: usize) -> Self {
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        let length = if rows * columns == 0 { 0 } else { (rows - 1) * (columns + wider) + columns };
        Self { data: numbers(length, seed), rows, columns, stride: columns + wider, transposed }
    }

    fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::new(&self.data, self.rows, self.columns, self.stride);
        if self.transposed { matrix.transposed() } else { matrix }
    }

    fn at(&self, i: usize, j: usize, factors: Factors) -> f64 {
        let (row, column) = if self.transposed { (j, i) } else { (i, j) };
        let x = self.data[row * self.stride + column];
        f64::from(match factors {
            Factors::F32 => x,
            Factors::Bf16 => half::bf16::from_f32(x).to_f32(),
        })
    }
}

#[test]
fn products_of_all_small_shapes_are_sums_of_products() {
    // behind 768 numbers of k there is a second part, of bf16 behind 1536
    let shapes =
        [(1, 1, 1), (2, 3, 0), (3, 5, 2), (5, 9, 17), (7, 33, 4), (15, 2, 9), (1, 2, 770), (1, 2, 1540)];
    for ((m, n, k), factors) in
        shapes.into_iter().flat_map(|shape| [(shape, Factors::F32), (shape, Factors::Bf16)])
    {
        for (lhs_transposed, rhs_transposed, wider) in
            [(false, false, 0), (true, false, 1), (false, true, 2), (true, true, 0)]
        {
            let lhs = Operand::new(m, k, lhs_transposed, wider, 1);
            let rhs = Operand::new(k, n, rhs_transposed, wider, 2);
            let mut c = vec![1.0; (m - 1) * (n + wider) + n];
            let dst = MatrixMut::new(&mut c, m, n, n + wider);
            product(dst, Write::Add, 0.5, lhs.matrix(), rhs.matrix(), factors);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum: f64 = (0..k).map(|p| lhs.at(i, p, factors) * rhs.at(p, j, factors)).sum();
                let found = f64::from(c[i * (n + wider) + j]);
                assert!(
                    (found - 1.0 - 0.5 * sum).abs() < 2e-3,
                    "{factors:?}, {m}×{n}×{k} at {i}, {j}: {found}, {sum}"
                );
            }
        }
    }
}

#[test]
fn buffers_are_taken_again_and_hold_their_own_numbers() {
    for n in LENGTHS {
        let (mut first, second) = (Buffer::of(&numbers(n, 1)), Buffer::of(&numbers(n, 2)));
        first.fill(0.5);
        drop(first);
        let mut third = Buffer::any(n);
        third.fill(3.0);
        assert_eq!(second[..], numbers(n, 2));
    }
}

/// The assertions in debug builds would find these by themselves; in release builds sums and products wrap.
#[test]
fn a_matrix_that_is_not_inside_its_numbers_is_refused() {
    let refused = |make: &dyn Fn(&mut [f32])| {
        let mut data = [0.0; 8];
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| make(&mut data))).unwrap_err();
        panic.downcast_ref::<String>().cloned().unwrap_or_default()
    };
    for (rows, columns, stride) in
        [(2, 4, 5), (9, 1, 1), (1, 9, 9), (1 + (1 << 62), 4, 4), (3, 4, usize::MAX / 2), (2, usize::MAX, 4)]
    {
        let place = format!("{rows} rows of {columns}, {stride} apart");
        let read = refused(&|data| {
            std::hint::black_box(Matrix::new(data, rows, columns, stride).transposed());
        });
        assert!(read.contains("are not inside of 8 numbers"), "{place}: {read}");
        let written = refused(&|data| _ = MatrixMut::new(data, rows, columns, stride));
        assert!(written.contains("are not inside of 8 numbers"), "{place}: {written}");
    }
    for (rows, columns, stride) in [(2, 4, 3), (3, 2, 0)] {
        let overlapping = refused(&|data| _ = MatrixMut::new(data, rows, columns, stride));
        assert!(overlapping.contains("overlap"), "{rows} rows of {columns}, {stride} apart: {overlapping}");
    }
    // rows that are the same numbers again and again can be read
    let row = [1.0, 2.0];
    let same = Matrix::new(&row, 3, 2, 0);
    let mut sum = [0.0; 4];
    let ones = Matrix::new(&[1.0; 6], 2, 3, 3);
    product(MatrixMut::new(&mut sum, 2, 2, 2), Write::Replace, 1.0, ones, same, Factors::F32);
    assert_eq!(sum, [3.0, 6.0, 3.0, 6.0]);
}
