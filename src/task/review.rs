//! Predictions beside what was wanted → what people want to see of them: in numbers and texts, whatever shows them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::RecordFlags;

/// Where the examples come from that are looked at.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub files: &'a crate::data::records::Files,
    pub records: &'a RecordFlags,
}

/// What there is to see of predictions beside the metrics. What a task has nothing of is empty.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Review {
    /// Which label was taken for which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confusion: Option<Confusion>,
    /// What [`Review::rows`] are of: labels, or types of entities.
    #[serde(skip)]
    pub rows_of: &'static str,
    /// How well each is found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Row>,
    /// Whether predictions are right as often as they claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Of a regression, what was wanted and what was predicted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<(f64, f64)>,
    /// What the scores of wrong answers are; none where they have none.
    #[serde(skip)]
    pub scores: Option<&'static str>,
    /// Wrong answers, the worst first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub worst: Vec<Wrong>,
    /// How many answers are wrong.
    pub wrong: usize,
}

impl Review {
    /// Keeps the worst of all wrong answers: those of the highest loss, and before them those whose loss is no number.
    #[must_use]
    pub fn with_wrong(mut self, mut wrong: Vec<Wrong>) -> Self {
        self.wrong = wrong.len();
        // falling; NaN counts as above all
        let loss = |wrong: &Wrong| if wrong.loss.is_nan() { f64::INFINITY } else { wrong.loss };
        wrong.sort_by(|a, b| loss(b).total_cmp(&loss(a)));
        wrong.truncate(WORST);
        self.worst = wrong;
        self
    }
}

/// Wrong answers that are shown.
pub const WORST: usize = 30;

/// A wrong answer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Wrong {
    /// The line of the file where the record begins.
    pub line: usize,
    pub text: String,
    /// The second text of a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pair: Option<String>,
    pub wanted: String,
    pub found: String,
    /// What the model gives for its answer, where it gives something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    pub loss: f64,
}

/// How well a label is found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub label: String,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// How many are wanted.
    pub support: usize,
    /// How many were predicted.
    pub predicted: usize,
}

impl Row {
    /// A label's row, from how many were right, predicted and wanted. 0 where there is nothing to divide by.
    pub fn new(label: &str, right: usize, predicted: usize, support: usize) -> Self {
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        Self {
            label: label.to_owned(),
            precision: share(right, predicted),
            recall: share(right, support),
            f1: share(2 * right, predicted + support),
            support,
            predicted,
        }
    }
}

/// Which label was taken for which.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Confusion {
    pub labels: Vec<String>,
    /// (wanted, predicted, how often), of those that occur; in the order of the labels.
    pub counts: Vec<(usize, usize, usize)>,
}

impl Confusion {
    /// Counts pairs of a wanted and a predicted label.
    pub fn new(labels: &[String], pairs: impl Iterator<Item = (usize, usize)>) -> Self {
        let mut counts = BTreeMap::new();
        pairs.for_each(|pair| *counts.entry(pair).or_default() += 1);
        let counts = counts.into_iter().map(|((wanted, found), count)| (wanted, found, count)).collect();
        Self { labels: labels.to_vec(), counts }
    }

    /// A row for each label that was wanted or predicted.
    pub fn rows(&self) -> Vec<Row> {
        let mut of = vec![(0, 0, 0); self.labels.len()];
        for &(wanted, found, count) in &self.counts {
            of[wanted].2 += count;
            of[found].1 += count;
            of[wanted].0 += if wanted == found { count } else { 0 };
        }
        let met = self.labels.iter().zip(of).filter(|(_, (_, predicted, support))| predicted + support > 0);
        met.map(|(label, (right, predicted, support))| Row::new(label, right, predicted, support)).collect()
    }
}

/// Probabilities in bins of equal width, and how often what they were given for was so.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// The expected calibration error: the mean distance of both, weighted by the bins' sizes.
    pub ece: f64,
    pub bins: Vec<Bin>,
}

/// The predictions whose probability lies in a bin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bin {
    pub count: usize,
    /// The mean probability.
    pub confidence: f64,
    /// The share that is right.
    pub accuracy: f64,
}

impl Calibration {
    /// The bins that are usual.
    pub const BINS: usize = 15;

    /// Of probabilities and whether that was so; a bin holds its upper end. Those that are no number are left out.
    pub fn new(predictions: impl Iterator<Item = (f64, bool)>) -> Option<Self> {
        let mut sums = vec![(0usize, 0.0, 0usize); Self::BINS];
        for (p, right) in predictions.filter(|(p, _)| p.is_finite()) {
            let at = ((p * Self::BINS as f64).ceil() as usize).clamp(1, Self::BINS) - 1;
            let (count, confidence, hits) = &mut sums[at];
            (*count, *confidence, *hits) = (*count + 1, *confidence + p, *hits + usize::from(right));
        }
        let all: usize = sums.iter().map(|(count, ..)| count).sum();
        let bin = |(count, confidence, hits): (usize, f64, usize)| match count {
            0 => Bin::default(),
            n => Bin { count, confidence: confidence / n as f64, accuracy: hits as f64 / n as f64 },
        };
        let bins: Vec<Bin> = sums.into_iter().map(bin).collect();
        let apart = bins.iter().map(|bin| bin.count as f64 * (bin.confidence - bin.accuracy).abs());
        (all > 0).then(|| Self { ece: apart.sum::<f64>() / all as f64, bins: bins.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calibration_error_is_the_mean_distance_of_claim_and_truth() {
        // bins (0.6, 0.667] and (0.933, 1]: |0.65 − 1/2| of two, |0.95 − 1| of one; and ends that belong to the lower bin
        let found = [(0.65, true), (0.65, false), (0.95, true), (f64::NAN, true)];
        let calibration = Calibration::new(found.into_iter()).unwrap();
        assert!((calibration.ece - (2.0 * 0.15 + 0.05) / 3.0).abs() < 1e-12, "{}", calibration.ece);
        let counts: Vec<usize> = calibration.bins.iter().map(|bin| bin.count).collect();
        assert_eq!((counts[9], counts[14], counts.iter().sum::<usize>()), (2, 1, 3));
        let ends = Calibration::new([(0.0, false), (1.0, true)].into_iter()).unwrap();
        assert_eq!((ends.bins[0].count, ends.bins[14].count, ends.ece), (1, 1, 0.0));
        assert_eq!(Calibration::new([(f64::NAN, true)].into_iter()), None);
    }

    #[test]
    fn rows_follow_from_what_was_taken_for_what() {
        let labels = ["a", "b", "c", "never"].map(str::to_owned);
        let pairs = [(0, 0), (0, 1), (1, 1), (1, 1), (2, 0)];
        let confusion = Confusion::new(&labels, pairs.into_iter());
        assert_eq!(confusion.counts, [(0, 0, 1), (0, 1, 1), (1, 1, 2), (2, 0, 1)]);
        let rows = confusion.rows();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0], Row::new("a", 1, 2, 2));
        assert_eq!((rows[1].precision, rows[1].recall, rows[1].f1), (2.0 / 3.0, 1.0, 0.8));
        assert_eq!((rows[2].f1, rows[2].support, rows[2].predicted), (0.0, 1, 0));
    }

    #[test]
    fn the_worst_answers_are_those_of_the_highest_loss() {
        let wrong = (0..50).map(|line| Wrong {
            line,
            loss: if line == 7 { f64::NAN } else { (line * 37 % 50) as f64 },
            ..Wrong::default()
        });
        let review = Review::default().with_wrong(wrong.collect());
        assert_eq!((review.wrong, review.worst.len(), review.worst[0].line), (50, WORST, 7));
        assert!(review.worst[1..].windows(2).all(|pair| pair[0].loss > pair[1].loss));
    }
}
