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
            tell(text);
        }
    }

    /// A line that only `-v` shows.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbose {
            tell(text);
        }
    }

    /// Something the user should know although the work goes on.
    pub fn warn(&self, text: impl AsRef<str>) {
        if !self.quiet {
            tell(format!("warning: {}", text.as_ref()));
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
        let text = if self.json { serde_json::to_string(result)? } else { human.as_ref().to_owned() };
        if text.is_empty() { Ok(()) } else { print(text + "\n") }
    }
}

/// The first of some names, and how many more there are.
pub fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>, most: usize) -> String {
    let more = names.len().saturating_sub(most);
    let mut listed = names.take(most).collect::<Vec<_>>().join(", ");
    if more > 0 {
        listed += &format!(" and {more} more");
    }
    listed
}

/// A line on stderr. Where it can't be written, since the terminal has gone or a pipe's reader, nobody listens, and the
/// work goes on.
pub fn tell(text: impl AsRef<str>) {
    // one write, so that lines of several processes stay whole
    let line = format!("{}\n", text.as_ref());
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// The reader of standard output has gone, as `head` does: a reason to stop, no failure.
#[derive(Debug, thiserror::Error)]
#[error("the reader of standard output has gone")]
pub struct StdoutClosed;

/// Writes data to standard output, to the last byte.
///
/// # Errors
/// [`StdoutClosed`] where nobody reads any more.
pub fn print(data: impl AsRef<[u8]>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(data.as_ref()).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        std::io::ErrorKind::BrokenPipe => anyhow::Error::new(StdoutClosed),
        _ => anyhow::Error::new(e).context("writing to standard output"),
    })
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
