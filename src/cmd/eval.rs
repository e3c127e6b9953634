//! `tk eval`.

use crate::Result;
use crate::say::Say;

/// Measure a trained model on labelled records.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args, _say: Say) -> Result<()> {
    anyhow::bail!("not written yet")
}
