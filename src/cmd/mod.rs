//! One file a command: checked settings → work → a result. Each reads top to bottom.

pub mod bench;
pub mod completions;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod models;
pub mod parity;
pub mod report;
pub mod serve;
pub mod serve_batch;
pub mod sweep;
pub mod train;

use std::time::Duration;

use crate::{Result, unusable};

/// A flag's seconds.
///
/// # Errors
/// Unusable: no number above 0.
fn seconds(flag: &str, seconds: f64) -> Result<Duration> {
    let time = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
    time.ok_or_else(|| unusable!("{flag} {seconds}: expected a number of seconds above 0"))
}
