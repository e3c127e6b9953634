//! `tk completions`: a shell's name → its completion script.

use clap::CommandFactory;

use crate::cli::Cli;
use crate::{Result, say};

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
pub struct Args {
    shell: clap_complete::Shell,
}

/// Writes the script to stdout.
pub fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tk", &mut script);
    say::print(script)
}
