//! `tk serve-batch`.

use crate::Result;
use crate::say::Say;

/// Predict for a file of records through ONNX Runtime.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args, _say: Say) -> Result<()> {
    anyhow::bail!("not written yet")
}
