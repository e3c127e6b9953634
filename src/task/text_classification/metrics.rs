//! Predictions and what was wanted → metrics, defined as scikit-learn and SciPy define them.

use crate::task::Metrics;

/// `accuracy`, and `f1_macro` over the labels that were predicted or wanted.
pub fn single_label(predicted: &[Vec<u32>], wanted: &[Vec<u32>], labels: usize) -> Metrics {
    let counts = Counts::by_label(predicted, wanted, labels);
    let met: Vec<Counts> = counts.into_iter().filter(|count| count.all() > 0).collect();
    named([("accuracy", exact(predicted, wanted)), ("f1_macro", mean_f1(&met))])
}

/// `accuracy` (of whole sets of labels), `f1_macro` over all labels, and `f1_micro`.
pub fn multi_label(predicted: &[Vec<u32>], wanted: &[Vec<u32>], labels: usize) -> Metrics {
    let counts = Counts::by_label(predicted, wanted, labels);
    named([
        ("accuracy", exact(predicted, wanted)),
        ("f1_macro", mean_f1(&counts)),
        ("f1_micro", Counts::sum(&counts).f1()),
    ])
}

/// `mse`, `mae`, and the correlations `pearson` and `spearman`.
pub fn regression(predicted: &[f64], wanted: &[f64]) -> Metrics {
    let n = predicted.len() as f64;
    let errors = || predicted.iter().zip(wanted).map(|(p, w)| p - w);
    named([
        ("mse", errors().map(|e| e * e).sum::<f64>() / n),
        ("mae", errors().map(f64::abs).sum::<f64>() / n),
        ("pearson", pearson(predicted, wanted)),
        ("spearman", spearman(predicted, wanted)),
    ])
}

fn named<const N: usize>(metrics: [(&str, f64); N]) -> Metrics {
    metrics.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn exact(predicted: &[Vec<u32>], wanted: &[Vec<u32>]) -> f64 {
    predicted.iter().zip(wanted).filter(|(p, w)| p == w).count() as f64 / predicted.len() as f64
}

fn mean_f1(counts: &[Counts]) -> f64 {
    counts.iter().map(Counts::f1).sum::<f64>() / counts.len() as f64
}

/// True positives, false positives and false negatives of a label.
#[derive(Clone, Copy, Default)]
struct Counts {
    hit: usize,
    extra: usize,
    missed: usize,
}

impl Counts {
    fn by_label(predicted: &[Vec<u32>], wanted: &[Vec<u32>], labels: usize) -> Vec<Self> {
        let mut counts = vec![Self::default(); labels];
        for (p, w) in predicted.iter().zip(wanted) {
            for id in p {
                let count = &mut counts[*id as usize];
                if w.contains(id) { count.hit += 1 } else { count.extra += 1 }
            }
            for id in w.iter().filter(|id| !p.contains(id)) {
                counts[*id as usize].missed += 1;
            }
        }
        counts
    }

    fn sum(counts: &[Self]) -> Self {
        counts.iter().fold(Self::default(), |a, b| Self {
            hit: a.hit + b.hit,
            extra: a.extra + b.extra,
            missed: a.missed + b.missed,
        })
    }

    fn all(&self) -> usize {
        self.hit + self.extra + self.missed
    }

    /// 0 for a label that is neither predicted nor wanted.
    fn f1(&self) -> f64 {
        2.0 * self.hit as f64 / (self.all() + self.hit).max(1) as f64
    }
}

/// Spearman's correlation: Pearson's of the ranks.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    pearson(&ranks(a), &ranks(b))
}

/// Pearson's correlation; not a number where one side is constant.
fn pearson(a: &[f64], b: &[f64]) -> f64 {
    // asked of the values: a mean that is rounded leaves differences of its own
    if [a, b].iter().any(|side| side.windows(2).all(|pair| pair[0] == pair[1])) {
        return f64::NAN;
    }
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - mean_a, y - mean_b);
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    (ab / (aa.sqrt() * bb.sqrt())).clamp(-1.0, 1.0)
}

/// Ranks from 1; ties share their mean.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for tie in order.chunk_by(|&i, &j| values[i] == values[j]) {
        for &i in tie {
            ranks[i] = before as f64 + (tie.len() as f64 + 1.0) / 2.0;
        }
        before += tie.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(metrics: &Metrics, name: &str, expected: f64) {
        assert!((metrics[name] - expected).abs() < 1e-12, "{name}: {}", metrics[name]);
    }

    #[test]
    fn one_label_each() {
        let ids = |ids: &[u32]| ids.iter().map(|&id| vec![id]).collect::<Vec<_>>();
        // label 0: 1 of 2 predicted, 1 of 1 wanted; 1: 1 of 1, 1 of 2; 3 is never met
        let metrics = single_label(&ids(&[0, 0, 1]), &ids(&[0, 1, 1]), 4);
        near(&metrics, "accuracy", 2.0 / 3.0);
        near(&metrics, "f1_macro", 2.0 / 3.0);
    }

    #[test]
    fn several_labels_each() {
        let metrics = multi_label(&[vec![0, 1], vec![], vec![2]], &[vec![0], vec![], vec![1]], 3);
        near(&metrics, "accuracy", 1.0 / 3.0);
        near(&metrics, "f1_macro", 1.0 / 3.0);
        near(&metrics, "f1_micro", 0.4);
    }

    #[test]
    fn numbers() {
        let metrics = regression(&[1.0, 2.0, 2.0, 3.0, 10.0], &[2.0, 1.0, 4.0, 4.0, 5.0]);
        near(&metrics, "mse", 6.4);
        near(&metrics, "mae", 2.0);
        near(&metrics, "pearson", 0.684_189_104_906_403_7);
        near(&metrics, "spearman", 0.763_157_894_736_842_1);
        for constant in [1.0, 0.1, 1e-300, 1e300] {
            let metrics = regression(&[constant; 3], &[0.1, 0.2, 0.4]);
            assert!(metrics["pearson"].is_nan() && metrics["spearman"].is_nan(), "{constant}");
            assert!(regression(&[0.1, 0.2, 0.4], &[constant; 3])["pearson"].is_nan(), "{constant}");
        }
    }
}
