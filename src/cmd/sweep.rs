//! `tk sweep`: a file of settings → runs of training, a table of them, and the best model.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::say::Say;
use crate::sweep::Sweep;
use crate::{Result, process};

/// Train with several settings, one run after the other, and keep the best model.
///
/// The file says `output`, the directory to write, and in `[train]` the options that every run of `tk train` has (with
/// `eval`). What differs stands in `[grid]`, lists of which every combination is a run, or in `[random]`: `runs`, a `seed`,
/// and for each option a list or `{ min, max, scale = "log" | "linear" }` (learning rates: log). Further keys: `metric`, which
/// decides what is best [default: the task's]; `stop` ("median" or "none"): a run ends where the best of its evaluations,
/// `grace-evaluations` (1) at least, is worse than the median of what `grace-runs` (3) finished runs or more had by then.
/// The same command goes on with a sweep that was ended.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A TOML file.
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
}

/// Runs them all. `options` are those of `tk train`.
pub fn run(args: &Args, options: &[String], say: Say) -> Result<()> {
    let report = Sweep::read(&args.file, options)?.go(stopped(), &say)?;
    say.result(report.told(), &report)?;
    anyhow::ensure!(report.best.is_some(), "no run has succeeded; what each said stands in runs/NAME.log");
    Ok(())
}

/// Set to the number of the signal that asks the process to end; the second one ends it at once.
fn stopped() -> &'static AtomicI32 {
    static STOPPED: AtomicI32 = AtomicI32::new(0);
    process::on_stop(|signal| {
        if STOPPED.swap(signal, Ordering::Relaxed) != 0 {
            std::process::exit(process::exit_code(signal));
        }
    });
    &STOPPED
}
