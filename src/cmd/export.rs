//! `tk export`.

use crate::Result;
use crate::say::Say;

/// Write a trained model as ONNX and verify it.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args, _say: Say) -> Result<()> {
    anyhow::bail!("not written yet")
}
