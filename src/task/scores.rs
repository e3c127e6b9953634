//! What is read out of a row of logits.

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::Outputs;

/// The place of the largest, the first of several.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// The share of the rows, of all outputs, whose largest number stands in the same place; an output with a number a row is
/// one row of them. None where a number is not finite.
pub fn agreement(wanted: &Outputs, found: &Outputs) -> f64 {
    let (mut same, mut all) = (0, 0);
    for (wanted, found) in wanted.iter().zip(found) {
        if wanted.dim() != found.dim() || found.iter().any(|x| !x.is_finite()) {
            return 0.0;
        }
        let (wanted, found) = match wanted.ncols() {
            1 => (wanted.t(), found.t()),
            _ => (wanted.view(), found.view()),
        };
        let places = |rows: ndarray::ArrayView2<f32>| -> Vec<usize> {
            rows.rows().into_iter().map(|row| argmax(&row.to_vec())).collect()
        };
        let (wanted, found) = (places(wanted), places(found));
        same += wanted.iter().zip(&found).filter(|(a, b)| a == b).count();
        all += wanted.len();
    }
    if all == 0 { 0.0 } else { same as f64 / all as f64 }
}

/// exp(x) / Σ exp(x).
pub fn softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

/// −ln p of one of the row's places under its softmax: the cross-entropy of a target, in nats.
pub fn cross_entropy(row: &[f32], target: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    sum.ln() - f64::from(row[target] - max)
}

/// Makes a row of length 1.
pub fn to_length_one(row: &mut [f32]) {
    let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt().max(1e-12);
    row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}

/// A number with the digits that tell it from every other f32, and no more.
pub fn short(x: f32) -> Value {
    json!(x.to_string().parse().unwrap_or(f64::from(x)))
}

/// The same, for the field of an answer.
///
/// # Errors
/// Those of the serializer.
pub fn serialize_short<S: Serializer>(x: &f32, to: S) -> Result<S::Ok, S::Error> {
    short(*x).serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_agree_where_their_largest_numbers_stand() {
        let rows = |values: &[[f32; 2]]| vec![ndarray::Array2::from(values.to_vec())];
        assert_eq!(agreement(&rows(&[[1.0, 2.0], [4.0, 3.0]]), &rows(&[[0.0, 9.0], [1.0, 3.0]])), 0.5);
        assert_eq!(agreement(&rows(&[[1.0, 2.0]]), &rows(&[[f32::NAN, 2.0]])), 0.0);
        // a score a token: where it is the highest
        let tokens = |values: &[f32]| vec![ndarray::Array2::from_shape_vec((3, 1), values.to_vec()).unwrap()];
        assert_eq!(agreement(&tokens(&[1.0, 5.0, 2.0]), &tokens(&[4.0, 9.0, 8.0])), 1.0);
        assert_eq!(agreement(&tokens(&[1.0, 5.0, 2.0]), &tokens(&[4.0, 0.0, 0.0])), 0.0);
    }

    #[test]
    fn large_logits_do_not_overflow_and_the_first_of_equals_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(softmax(&[1000.0, 1000.0]), [0.5, 0.5]);
        assert!((cross_entropy(&[1000.0, 1000.0], 1) - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!(short(0.1).to_string(), "0.1");
    }
}
