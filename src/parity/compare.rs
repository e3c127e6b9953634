//! Two runtimes' logits → how far they are apart.

use std::collections::BTreeMap;

use anyhow::Context;
use serde::Serialize;

use super::Runtime;
use super::difference::Difference;
use crate::Result;
use crate::task::scores::argmax;
use crate::task::{Measured, Task};

/// One runtime held against another.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    pub name: &'static str,
    pub compared_with: &'static str,
    /// The largest |a − b| over all logits; not a number where one of them is not finite.
    pub max_abs: f32,
    /// The largest |a − b| / max(|a|, |b|).
    pub max_rel: f32,
    /// The share of records whose largest logit is the same one.
    pub argmax_agreement: f64,
    pub records: usize,
    pub tolerance: f32,
    /// Whether `max_abs` is within the tolerance and every logit is finite.
    pub pass: bool,
    /// The same for each output.
    pub outputs: BTreeMap<&'static str, Apart>,
    /// The largest |a − b| between a record that runs alone and the same among others, on this runtime. None of a language
    /// model.
    pub batch_invariance: Option<f32>,
    /// Where the two part, if they do.
    pub first_difference: Option<Difference>,
    /// What both measure on labelled records; of a language model's graphs on the one that generates.
    pub metric: Option<Measure>,
}

/// How far two runtimes are apart in one output.
#[derive(Clone, Debug, Serialize)]
pub struct Apart {
    pub max_abs: f32,
    pub max_rel: f32,
    /// The mean of |a − b|.
    pub mean_abs: f64,
    pub argmax_agreement: f64,
    pub pass: bool,
}

/// The task's first metric by two runtimes.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    pub name: &'static str,
    pub expected: f64,
    pub found: f64,
}

impl Measure {
    /// The metric that decides what is best, of two measurements.
    ///
    /// # Errors
    /// One lacks it.
    pub fn of(task: &Task, expected: &Measured, found: &Measured) -> Result<Self> {
        let decides = task.deciding_metric(None)?.name;
        // records of another kind than those that the task's first metric is of
        let found_there = task.metrics().iter().map(|metric| metric.name);
        let name =
            found_there.into_iter().find(|name| expected.metrics.contains_key(*name)).unwrap_or(decides);
        let value = |of: &Measured| of.metrics.get(name).copied().with_context(|| format!("no {name}"));
        Ok(Self { name, expected: value(expected)?, found: value(found)? })
    }
}

impl Compared {
    /// Compares row by row.
    ///
    /// # Errors
    /// The two have not as many rows, so what belongs together is not known.
    pub fn new(
        name: Runtime,
        with: Runtime,
        wanted: &[Vec<f32>],
        found: &[Vec<f32>],
        tolerance: f32,
    ) -> Result<Self> {
        anyhow::ensure!(
            wanted.len() == found.len(),
            "{} gives {} rows where {} gives {}",
            name.name(),
            found.len(),
            with.name(),
            wanted.len()
        );
        let (mut max_abs, mut max_rel, mut agreeing) = (0f32, 0f32, 0);
        for (wanted, found) in wanted.iter().zip(found) {
            max_abs = worse(max_abs, distance(wanted, found));
            for (&a, &b) in wanted.iter().zip(found) {
                let scale = a.abs().max(b.abs());
                max_rel = worse(max_rel, if scale == 0.0 { 0.0 } else { (a - b).abs() / scale });
            }
            agreeing += usize::from(argmax(wanted) == argmax(found));
        }
        Ok(Self {
            name: name.name(),
            compared_with: with.name(),
            max_abs,
            max_rel,
            argmax_agreement: agreeing as f64 / wanted.len().max(1) as f64,
            records: wanted.len(),
            tolerance,
            pass: max_abs <= tolerance, // false for not a number
            outputs: BTreeMap::new(),
            batch_invariance: None,
            first_difference: None,
            metric: None,
        })
    }
}

impl Compared {
    /// The same as of an output of this name alone, by rows that were compared.
    pub fn of_output(self, name: &'static str, wanted: &[Vec<f32>], found: &[Vec<f32>]) -> Self {
        let pairs = || wanted.iter().flatten().zip(found.iter().flatten());
        let sum: f64 = pairs().map(|(a, b)| f64::from((a - b).abs())).sum();
        let apart = Apart {
            max_abs: self.max_abs,
            max_rel: self.max_rel,
            mean_abs: sum / pairs().count().max(1) as f64,
            argmax_agreement: self.argmax_agreement,
            pass: self.pass,
        };
        Self { outputs: BTreeMap::from([(name, apart)]), ..self }
    }

    /// Says how far records that run alone are from the same among others, and fails where that is too far.
    pub fn among_others(self, apart: f32) -> Self {
        Self { batch_invariance: Some(apart), pass: self.pass && apart <= self.tolerance, ..self }
    }

    /// Both comparisons of the same runtimes as one.
    pub fn with(self, other: &Self) -> Self {
        let records = self.records + other.records;
        let agreeing =
            self.argmax_agreement * self.records as f64 + other.argmax_agreement * other.records as f64;
        Self {
            max_abs: worse(self.max_abs, other.max_abs),
            max_rel: worse(self.max_rel, other.max_rel),
            argmax_agreement: agreeing / records.max(1) as f64,
            records,
            pass: self.pass && other.pass,
            outputs: self.outputs.into_iter().chain(other.outputs.clone()).collect(),
            ..self
        }
    }
}

/// The largest |a − b|; not a number where one is not finite, or where the lengths differ.
pub(super) fn distance(wanted: &[f32], found: &[f32]) -> f32 {
    if wanted.len() != found.len() {
        return f32::NAN;
    }
    wanted.iter().zip(found).fold(0.0, |max, (a, b)| {
        worse(max, if a.is_finite() && b.is_finite() { (a - b).abs() } else { f32::NAN })
    })
}

/// The larger of the two, where not a number is the largest.
fn worse(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Provider;

    fn compare(wanted: &[f32], found: &[f32]) -> Compared {
        Compared::new(
            Runtime::Ort(Provider::Cpu),
            Runtime::Eager,
            &[wanted.to_vec()],
            &[found.to_vec()],
            1e-4,
        )
        .unwrap()
    }

    #[test]
    fn rows_that_are_missing_are_an_error() {
        let rows = [vec![1.0], vec![2.0]];
        let compare = |wanted: &[Vec<f32>], found: &[Vec<f32>]| {
            Compared::new(Runtime::Ort(Provider::Cpu), Runtime::Eager, wanted, found, 1e-4)
        };
        let error = compare(&rows, &rows[..1]).unwrap_err();
        assert_eq!(error.to_string(), "ort-cpu gives 1 rows where eager gives 2");
        assert!(compare(&rows[..1], &rows).is_err());
    }

    #[test]
    fn what_is_within_the_tolerance_passes() {
        assert!(compare(&[1.0, 2.0], &[1.00005, 2.0]).pass);
        let off = compare(&[1.0, 2.0], &[1.5, 1.0]);
        assert!(!off.pass);
        assert_eq!((off.max_abs, off.max_rel, off.argmax_agreement), (1.0, 0.5, 0.0));
    }

    #[test]
    fn two_comparisons_are_as_good_as_the_worse_one() {
        let (same, off) = (compare(&[1.0, 2.0], &[1.0, 2.0]), compare(&[1.0, 2.0], &[1.5, 1.0]));
        let both = same.with(&off);
        assert_eq!((both.max_abs, both.records, both.argmax_agreement, both.pass), (1.0, 2, 0.5, false));
        assert!(off.with(&compare(&[1.0], &[f32::NAN])).max_abs.is_nan());
    }

    #[test]
    fn what_is_not_finite_or_of_another_width_never_passes() {
        for found in [&[f32::NAN, 2.0][..], &[f32::INFINITY, 2.0], &[1.0], &[1.0, 2.0, 3.0]] {
            assert!(!compare(&[1.0, 2.0], found).pass, "{found:?}");
        }
        // not even where both sides agree on it
        assert!(!compare(&[f32::NAN, 2.0], &[f32::NAN, 2.0]).pass);
        assert!(!compare(&[f32::INFINITY, 2.0], &[f32::INFINITY, 2.0]).pass);
    }
}
