//! When a run is hopeless: its evaluations so far, and those of the runs that are finished → whether it ends.

use crate::{Result, bail_unusable};

/// When a run ends before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Never,
    /// Where the best of its evaluations is worse than the median of what finished runs had reached by as many
    /// evaluations (Golovin et al. 2017, Google Vizier).
    Median {
        /// Evaluations that a run has before it may end.
        evaluations: usize,
        /// Finished runs that there are before.
        runs: usize,
    },
}

impl Stop {
    /// What a file says.
    ///
    /// # Errors
    /// Unusable: no such rule.
    pub fn read(rule: Option<&str>, evaluations: Option<usize>, runs: Option<usize>) -> Result<Self> {
        match rule {
            None | Some("median") => {
                Ok(Self::Median { evaluations: evaluations.unwrap_or(1), runs: runs.unwrap_or(3) })
            }
            Some("none") => Ok(Self::Never),
            Some(other) => bail_unusable!("stop is {other:?}, expected \"median\" or \"none\""),
        }
    }

    /// Whether a run with these evaluations ends now.
    pub fn is_hopeless(self, evaluations: &[f64], finished: &[&[f64]], more_is_better: bool) -> bool {
        let Self::Median { evaluations: grace, runs } = self else { return false };
        let count = evaluations.len();
        if count < grace || finished.len() < runs {
            return false;
        }
        let best = |of: &[f64]| {
            let so_far = of.iter().take(count).copied();
            so_far
                .filter(|value| value.is_finite())
                .reduce(|a, b| if is_better(a, b, more_is_better) { a } else { b })
        };
        let mut reached: Vec<f64> = finished.iter().filter_map(|of| best(of)).collect();
        let Some(median) = median(&mut reached) else { return false };
        best(evaluations).is_none_or(|own| is_better(median, own, more_is_better))
    }
}

/// Whether a value is better than another.
pub fn is_better(a: f64, b: f64, more_is_better: bool) -> bool {
    if more_is_better { a > b } else { a < b }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len().checked_sub(1)? / 2;
    Some((values[middle] + values[values.len() / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_below_the_median_of_what_others_had_by_then() {
        let stop = Stop::read(None, Some(2), Some(3)).unwrap();
        let finished: [&[f64]; 3] = [&[0.1, 0.5, 0.9], &[0.2, 0.4, 0.5], &[0.3, 0.3, 0.3]];
        let ends = |own: &[f64]| stop.is_hopeless(own, &finished, true);
        // by the second evaluation: 0.5, 0.4 and 0.3
        assert!(ends(&[0.1, 0.39]) && !ends(&[0.1, 0.4]) && !ends(&[0.41, 0.1]));
        assert!(!ends(&[0.0]), "one evaluation is not enough");
        assert!(ends(&[f64::NAN, f64::NAN]));
        assert!(!stop.is_hopeless(&[0.0, 0.0], &finished[..2], true), "two runs are not enough");
        // the lower the better: 0.1, 0.2 and 0.3
        let ends = |own: &[f64]| stop.is_hopeless(own, &finished, false);
        assert!(ends(&[0.9, 0.21]) && !ends(&[0.9, 0.2]));
        assert!(!Stop::read(Some("none"), None, None).unwrap().is_hopeless(&[0.0; 9], &finished, true));
        let even = Stop::Median { evaluations: 1, runs: 2 };
        assert!(
            even.is_hopeless(&[0.14], &finished[..2], true)
                && !even.is_hopeless(&[0.15], &finished[..2], true)
        );
    }
}
