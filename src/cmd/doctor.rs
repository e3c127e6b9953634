//! `tk doctor`.

use crate::Result;
use crate::say::Say;

/// Say what this machine has: ONNX Runtime, execution providers, threads.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args, _say: Say) -> Result<()> {
    anyhow::bail!("not written yet")
}
