//! `tk sweep`: a file of settings → runs of training, a table of them, and the best model.

use std::path::PathBuf;

use crate::say::Say;
use crate::sweep::{FilesOf, Sweep};
use crate::{Result, process};

/// Train with several settings, one run after the other, and keep the best model.
///
/// The file names `output`, the directory to write, and has in `[train]` the options that every run of `tk train` has, with
/// `eval` or `validation-split`; `best-metric` there decides what is best. What differs stands in `[grid]`, lists of which
/// every combination is a run; or in `[random]`: `runs`, a `seed`, and for each option a list or `{ min, max, scale = "log" |
/// "linear" }` (learning rates: log). `stop = "median"` (the default) ends a run where the best of its evaluations,
/// `grace-evaluations` (1) at least, is worse than the median of what the finished runs, `grace-runs` (3) at least, had by
/// then; `stop = "none"` ends none. The same command goes on with a sweep that was ended.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A TOML file.
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
}

/// Runs them all. `files_of` checks the settings of a run.
pub fn run(args: &Args, files_of: FilesOf, say: Say) -> Result<()> {
    let report = Sweep::read(&args.file, files_of)?.go(process::stop_signal(), &say)?;
    say.result(report.told(), &report)?;
    anyhow::ensure!(
        report.best.is_some(),
        "no run has come to a number to be compared by; what each said stands in {}",
        report.logs.display()
    );
    Ok(())
}
