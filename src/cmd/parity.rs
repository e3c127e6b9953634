//! `tk parity`.

use crate::Result;
use crate::say::Say;

/// Compare the logits of the runtimes side by side.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: &Args, _say: Say) -> Result<()> {
    anyhow::bail!("not written yet")
}
