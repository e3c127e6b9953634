//! Learning-rate schedules, as transformers defines them: a step's number → a factor of the peak rate.

use serde::{Deserialize, Serialize};

/// What follows the linear warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// A straight line to 0.
    Linear,
    /// Half a cosine to 0.
    Cosine,
    /// The peak rate.
    Constant,
}

impl Schedule {
    /// As `--schedule` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Constant => "constant",
        }
    }

    /// The factor of update `step`, counted from 0, of `total`, the first `warmup` of which rise from 0.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
            Self::Constant => 1.0,
        }
    }
}

/// Steps of warm-up for a share of all steps, rounded up as transformers does.
pub fn warmup_steps(ratio: f64, total: usize) -> usize {
    (ratio * total as f64).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_rises_from_zero_to_its_peak_at_the_end_of_the_warm_up() {
        for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::Constant] {
            let factors: Vec<f64> = (0..=10).map(|step| schedule.factor(step, 2, 10)).collect();
            assert_eq!(factors[..3], [0.0, 0.5, 1.0], "{schedule:?}");
        }
    }

    #[test]
    fn decays_end_at_zero_and_constant_does_not() {
        assert_eq!(Schedule::Linear.factor(6, 2, 10), 0.5);
        assert!((Schedule::Cosine.factor(6, 2, 10) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Linear.factor(10, 2, 10), 0.0);
        assert!(Schedule::Cosine.factor(10, 2, 10).abs() < 1e-12);
        assert_eq!(Schedule::Constant.factor(10, 2, 10), 1.0);
    }

    #[test]
    fn warm_up_is_rounded_up() {
        assert_eq!(warmup_steps(0.1, 750), 75);
        assert_eq!(warmup_steps(0.1, 11), 2);
        assert_eq!(warmup_steps(0.0, 11), 0);
    }
}
