//! What is read out of a row of logits.

use serde_json::{Value, json};

/// The place of the largest, the first of several.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
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

/// A number with the digits that tell it from every other f32, and no more.
pub fn short(x: f32) -> Value {
    json!(x.to_string().parse().unwrap_or(f64::from(x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_logits_do_not_overflow_and_the_first_of_equals_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(softmax(&[1000.0, 1000.0]), [0.5, 0.5]);
        assert!((cross_entropy(&[1000.0, 1000.0], 1) - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!(short(0.1).to_string(), "0.1");
    }
}
