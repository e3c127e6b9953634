//! A served model → how fast this machine answers with it: by batch and length, and records as they are served.

mod batches;
mod texts;
mod whole;

use std::time::{Duration, Instant};

use serde::Serialize;

pub use batches::{Bench, Load};
pub use texts::{NEW, TextCell, TextRun, generated, made_up, medians, of_language_model};
pub use whole::{Soaked, Whole, builtin};

use crate::Result;

/// The fewest runs that are timed of one shape.
const LEAST_RUNS: usize = 5;

/// Runs before the clock starts: the first allocate what later ones use again.
const WARM_UP: usize = 2;

/// What was measured of batches of one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// Tokens of each sequence.
    pub length: usize,
    /// Sequences of a batch.
    pub batch: usize,
    pub runs: usize,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub records_per_second: f64,
    pub tokens_per_second: f64,
}

/// The number below which a share of sorted ones lies: the nearest rank.
fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    let at = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

/// Times a run again and again, until the time is over and there are enough.
fn timed(time: Duration, mut run: impl FnMut() -> Result<()>) -> Result<Vec<Duration>> {
    let started = Instant::now();
    let mut times = Vec::new();
    while times.len() < LEAST_RUNS || started.elapsed() < time {
        let before = Instant::now();
        run()?;
        times.push(before.elapsed());
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_ranks() {
        let times: Vec<Duration> = (1..=10).map(Duration::from_millis).collect();
        assert_eq!([0.5, 0.9, 0.99].map(|share| percentile(&times, share)), [5.0, 9.0, 10.0]);
        assert_eq!(percentile(&times[..1], 0.99), 1.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
