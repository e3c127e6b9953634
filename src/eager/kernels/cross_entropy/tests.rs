//! Losses and gradients: against PyTorch's numbers, over chunk borders, at the ends of f32.

use std::sync::Arc;

use candle_core::Device;

use super::*;
use crate::eager::kernels::gradient::GradientRows;

/// Numbers between −1 and 1.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 31 * seed) * 7919) % 1009) as f32 / 504.5 - 1.0).collect()
}

fn weight(shape: &[usize], seed: usize) -> Weight {
    let values = numbers(shape.iter().product(), seed).iter().map(|x| x / 4.0).collect();
    let values = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    Weight { values, gradient: Some(Arc::new(Gradient::new(shape))) }
}

/// Every third row is ignored.
fn targets(rows: usize, vocabulary: usize) -> Vec<Option<u32>> {
    (0..rows).map(|row| (row % 3 != 1).then_some((row * 17 % vocabulary) as u32)).collect()
}

fn slot(weight: &Weight) -> Vec<f32> {
    weight.gradient.as_ref().unwrap().lock().dense().unwrap()
}

/// Losses, dx, dW and db of a small head that holds so many logits at once.
fn small(held: usize) -> [Vec<f32>; 4] {
    let (rows, input, vocabulary) = (50, 12, 70);
    let (w, b) = (weight(&[vocabulary, input], 1), weight(&[vocabulary], 2));
    let head = Head { weight: &w, bias: Some(&b), smoothing: 0.1, held, factors: Factors::F32 };
    let x = numbers(rows * input, 3);
    let (losses, dx) = head.run(&x, &targets(rows, vocabulary), Some(0.5)).unwrap();
    let (alone, none) = head.run(&x, &targets(rows, vocabulary), None).unwrap();
    assert!(alone == losses && none.is_empty(), "an evaluation's losses are those of training");
    [losses, dx, slot(&w), slot(&b)]
}

fn assert_near(a: &[f32], b: &[f32], most: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= most * b.abs().max(1.0), "{i}: {a} and {b}");
    }
}

#[test]
fn the_loss_and_its_gradient_are_pytorchs() {
    // torch.nn.CrossEntropyLoss in double precision; the gradient is that of half the sum
    let logits = [1.0f32, -2.0, 0.5, 3.0, 0.25, 0.0, -1.0, 2.0, 4.0, 1.0, 1.5, -3.0];
    let targets = [Some(1), None, Some(0)];
    #[rustfmt::skip]
    let cases = [
        (0.0, [5.202_253_4f32, 0.0, 0.124_678_27], [
            0.055_276_875f32, -0.497_247_93, 0.033_527_12, 0.408_443_93, 0.0, 0.0, 0.0, 0.0,
            -0.058_609_565, 0.021_975_536, 0.036_231_533, 0.000_402_496,
        ]),
        (0.2, [4.677_253_4, 0.0, 0.749_678_27], [
            0.030_276_875, -0.422_247_93, 0.008_527_12, 0.383_443_93, 0.0, 0.0, 0.0, 0.0,
            0.016_390_435, -0.003_024_464_2, 0.011_231_533, -0.024_597_504,
        ]),
    ];
    for (smoothing, losses, gradient) in cases {
        let mut of_logits = logits;
        let total = cross_entropy(&mut of_logits, 4, &targets, smoothing, 0.5).unwrap();
        assert!((total - sum(&losses)).abs() < 1e-6, "{total}");
        assert_near(&of_logits, &gradient, 1e-7);
        let tensor = Tensor::from_slice(&logits, (3, 4), &Device::Cpu).unwrap();
        let composite = composite_losses(&tensor, &targets, smoothing).unwrap();
        assert_near(&composite.to_vec1::<f32>().unwrap(), &losses, 1e-6);
    }
}

#[test]
fn extreme_logits_have_finite_losses_and_gradients() {
    let infinite = f32::NEG_INFINITY; // what a logit is masked with
    let cases = [
        ([1e30, -1e30, 0.0], 1, 2e30, [1.0, -1.0, 0.0]),
        ([100.0, -100.0, 0.0], 1, 200.0, [1.0, -1.0, 0.0]),
        ([100.0, -100.0, 0.0], 0, 0.0, [0.0, 0.0, 0.0]),
        ([-1e4, -1e4, infinite], 0, 2f64.ln(), [-0.5, 0.5, 0.0]),
    ];
    for (logits, target, loss, gradient) in cases {
        let mut of_logits = logits;
        let found = cross_entropy(&mut of_logits, 3, &[Some(target)], 0.0, 1.0).unwrap();
        assert!((found / loss.max(1e-9) - 1.0).abs() < 1e-6 || found == loss, "{logits:?}: {found}");
        assert_near(&of_logits, &gradient, 1e-6);
    }
}

#[test]
fn a_logit_that_is_no_number_shows() {
    let mut logits = [0.0, f32::NAN, 1.0];
    assert!(cross_entropy(&mut logits, 3, &[Some(0)], 0.0, 1.0).unwrap().is_nan());
}

#[test]
fn chunks_change_rounding_alone() {
    let whole = small(usize::MAX);
    for held in [1, 70, 3 * 70, 7 * 70 + 5, 33 * 70, 34 * 70] {
        for (chunked, whole) in small(held).iter().zip(&whole) {
            assert_near(chunked, whole, 2e-6);
        }
    }
}

#[test]
fn a_chunk_holds_no_more_than_it_may() {
    assert_eq!(rows_of_chunk(0, 0, 8), 1);
    assert_eq!(rows_of_chunk(5, 100, 8), 1);
    assert_eq!(rows_of_chunk(42, 100, 4100), 21);
    for (rows, vocabulary, held) in [(1000, 7, 64), (1000, 64, 64), (3, 7, 1000), (1001, 50, 5049)] {
        let chunk = rows_of_chunk(rows, vocabulary, held);
        assert!((1..=rows).contains(&chunk) && chunk * vocabulary <= held);
    }
}

#[test]
fn the_number_of_threads_shows_in_no_bit() {
    let (rows, input, vocabulary) = (300, 200, 3000);
    let x = numbers(rows * input, 3);
    let work = || {
        let (w, b) = (weight(&[vocabulary, input], 1), weight(&[vocabulary], 2));
        let head =
            Head { weight: &w, bias: Some(&b), smoothing: 0.1, held: 99 * vocabulary, factors: Factors::F32 };
        let (losses, dx) = head.run(&x, &targets(rows, vocabulary), Some(0.5)).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (sum(&losses).to_bits(), [losses, dx, slot(&w), slot(&b)].map(bits))
    };
    let with = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work);
    let one = with(1);
    for threads in [2, 3, 8] {
        assert!(one == with(threads), "{threads} threads");
    }
}

#[test]
fn a_row_without_a_target_is_not_read() {
    let (w, b) = (weight(&[9, 4], 1), weight(&[9], 2));
    let mut x = numbers(12, 3);
    x[4..8].fill(f32::NAN);
    let (total, dx) =
        linear_cross_entropy(&x, &w, Some(&b), &[Some(3), None, Some(8)], 0.1, 1.0, Factors::F32).unwrap();
    assert!(total.is_finite() && slot(&w).iter().chain(&slot(&b)).all(|x| x.is_finite()));
    assert!(dx[..4].iter().chain(&dx[8..]).all(|&x| x != 0.0) && dx[4..8] == [0.0; 4]);
    assert_eq!(linear_losses(&x, &w, Some(&b), &[None; 3], 0.1, Factors::F32).unwrap(), [0.0; 3]);
}

#[test]
fn where_no_row_has_a_target_the_gradient_is_zeros() {
    let (w, b) = (weight(&[9, 4], 1), weight(&[9], 2));
    let none =
        || linear_cross_entropy(&numbers(8, 3), &w, Some(&b), &[None, None], 0.0, 1.0, Factors::F32).unwrap();
    assert_eq!(none(), (0.0, vec![0.0; 8]));
    for (weight, n) in [(&w, 36), (&b, 9)] {
        let gradient = weight.gradient.as_ref().unwrap();
        assert_eq!((slot(weight), gradient.lock().rows()), (vec![0.0; n], &GradientRows::All));
        gradient.add_values(&vec![2.0; n]);
    }
    none();
    assert_eq!((slot(&w), slot(&b)), (vec![2.0; 36], vec![2.0; 9])); // another micro-batch's
    w.gradient.as_ref().unwrap().lock().clear();
    b.gradient.as_ref().unwrap().lock().clear();
    none();
    assert_eq!((slot(&w), slot(&b)), (vec![0.0; 36], vec![0.0; 9])); // an earlier step's have gone
}

#[test]
fn what_does_not_fit_is_named_and_touches_nothing() {
    let (w, b) = (weight(&[9, 4], 1), weight(&[9], 2));
    let refused = |x: &[f32], b: &Weight, targets: &[Option<u32>], smoothing| {
        linear_cross_entropy(x, &w, Some(b), targets, smoothing, 1.0, Factors::F32).unwrap_err().to_string()
    };
    let (x, kept) = (numbers(8, 3), [Some(0), None]);
    let message = refused(&x, &b, &[None, Some(9)], 0.0);
    assert!(message.contains("row 1 has target 9, outside of a vocabulary of 9"), "{message}");
    assert!(refused(&x[..7], &b, &kept, 0.0).contains("7 numbers for 2 rows of 4 channels"));
    assert!(refused(&x, &weight(&[8], 2), &kept, 0.0).contains("a bias of 8 for a vocabulary of 9"));
    assert!(refused(&x, &b, &kept, 1.5).contains("a label smoothing of 1.5"));
    assert!(refused(&x, &b, &kept, f32::NAN).contains("a label smoothing of NaN"));
    assert_eq!(w.gradient.as_ref().unwrap().lock().rows(), &GradientRows::None);
    let mut logits = numbers(8, 4);
    let message = cross_entropy(&mut logits, 4, &[Some(3), Some(4)], 0.0, 1.0).unwrap_err().to_string();
    assert!(message.contains("row 1 has target 4, outside of a vocabulary of 4"), "{message}");
    assert!(cross_entropy(&mut logits, 4, &[Some(3)], 0.0, 1.0).is_err());
    assert_eq!(logits, numbers(8, 4));
    assert_eq!(cross_entropy(&mut [], 0, &[None], 0.0, 1.0).unwrap(), 0.0);
}
