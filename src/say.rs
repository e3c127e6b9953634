//! What the user is told, and where: messages and progress on stderr, data on stdout.

use std::io::Write;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::Result;

/// How much is said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Say {
    pub quiet: bool,
    pub verbose: bool,
    /// The command's result goes to stdout as one JSON object.
    pub json: bool,
}

impl Say {
    /// A line about what is done, on stderr.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// A line that only `-v` shows.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbose {
            eprintln!("{}", text.as_ref());
        }
    }

    /// Something the user should know although the work goes on.
    pub fn warn(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("warning: {}", text.as_ref());
        }
    }

    /// A progress bar of `length` steps; it hides itself where stderr is no terminal.
    /// `template` is indicatif's, e.g. `{bar:30} {pos}/{len} {msg} {eta}`.
    pub fn bar(&self, length: u64, template: &str) -> Result<ProgressBar> {
        let target = if self.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template(template)?;
        Ok(ProgressBar::with_draw_target(Some(length), target).with_style(style))
    }

    /// The command's result: `human` on stdout, or `result` as one JSON object with `--json`.
    pub fn result(&self, human: impl AsRef<str>, result: &impl Serialize) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut out, result)?;
            writeln!(out)?;
        } else if !human.as_ref().is_empty() {
            writeln!(out, "{}", human.as_ref())?;
        }
        Ok(())
    }
}

/// The most memory this process has held, in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    #[cfg(unix)]
    {
        // SAFETY: `getrusage` fills the zeroed struct that it is given.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &mut usage);
            usage
        };
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        usage.ru_maxrss as u64 * unit
    }
    #[cfg(not(unix))]
    0
}
