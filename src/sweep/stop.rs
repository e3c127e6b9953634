//! When a run is hopeless: its evaluations so far, and those of the runs that are finished → whether it ends.

use crate::task::is_better;
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
    /// Unusable: no such rule, or counts for none.
    pub fn read(rule: Option<&str>, evaluations: Option<usize>, runs: Option<usize>) -> Result<Self> {
        match rule {
            None | Some("median") => {
                Ok(Self::Median { evaluations: evaluations.unwrap_or(1), runs: runs.unwrap_or(3) })
            }
            Some("none") if evaluations.or(runs).is_some() => {
                bail_unusable!("grace-evaluations and grace-runs say nothing with stop = \"none\"")
            }
            Some("none") => Ok(Self::Never),
            Some(other) => bail_unusable!("stop is {other:?}, expected \"median\" or \"none\""),
        }
    }

    /// Whether a run with these evaluations ends now.
    pub fn is_hopeless(self, evaluations: &[f64], finished: &[Vec<f64>], more_is_better: bool) -> bool {
        let Self::Median { evaluations: grace, runs } = self else { return false };
        let count = evaluations.len();
        if count < grace || finished.len() < runs {
            return false;
        }
        let by_then = |of: &Vec<f64>| best_of(&of[..count.min(of.len())], more_is_better);
        let mut reached: Vec<f64> = finished.iter().filter_map(by_then).collect();
        let Some(median) = median(&mut reached) else { return false };
        best_of(evaluations, more_is_better).is_none_or(|own| is_better(median, own, more_is_better))
    }
}

/// The best of the values that are numbers.
pub fn best_of(values: &[f64], more_is_better: bool) -> Option<f64> {
    let numbers = values.iter().copied().filter(|value| value.is_finite());
    numbers.reduce(|a, b| if is_better(b, a, more_is_better) { b } else { a })
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
    fn a_run_ends_where_it_is_worse_than_the_median_of_what_others_had_by_then() {
        let stop = Stop::read(None, Some(2), Some(3)).unwrap();
        let finished = [vec![0.1, 0.5, 0.9], vec![0.2, 0.4, 0.5], vec![0.3, 0.3, 0.3]];
        let ends = |own: &[f64]| stop.is_hopeless(own, &finished, true);
        // by the second evaluation: 0.5, 0.4 and 0.3
        assert!(ends(&[0.1, 0.39]) && !ends(&[0.1, 0.4]) && !ends(&[0.41, 0.1]));
        assert!(!ends(&[0.0]), "one evaluation is not enough");
        assert!(ends(&[f64::NAN, f64::NAN]));
        assert!(!stop.is_hopeless(&[0.0, 0.0], &finished[..2], true), "two runs are not enough");
        // the lower the better: 0.1, 0.2 and 0.3
        let ends = |own: &[f64]| stop.is_hopeless(own, &finished, false);
        assert!(ends(&[0.9, 0.21]) && !ends(&[0.9, 0.2]) && !ends(&[0.05, 9.0]));
        assert!(!Stop::read(Some("none"), None, None).unwrap().is_hopeless(&[0.0; 9], &finished, true));
        let even = Stop::Median { evaluations: 1, runs: 2 };
        assert!(
            even.is_hopeless(&[0.14], &finished[..2], true)
                && !even.is_hopeless(&[0.16], &finished[..2], true)
        );
    }
}
