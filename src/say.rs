//! What the user is told, and where: messages and progress on stderr, data on stdout.

use std::io::Write;

use chrono::{SecondsFormat, Utc};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::Result;

/// How much is said, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Say {
    pub quiet: bool,
    pub verbose: bool,
    /// The command's result goes to stdout as one JSON object.
    pub json: bool,
    /// How what goes to stderr is written.
    pub log: LogFormat,
}

/// How messages are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line: time, level, message, and what else there is to say.
    Json,
}

/// How much a message matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Debug,
    Info,
    Warning,
    Error,
}

impl Say {
    /// A line about what is done, on stderr.
    pub fn line(&self, text: impl AsRef<str>) {
        self.entry(Level::Info, text.as_ref(), Map::new());
    }

    /// A line that only `-v` shows.
    pub fn detail(&self, text: impl AsRef<str>) {
        self.entry(Level::Debug, text.as_ref(), Map::new());
    }

    /// Something the user should know although the work goes on.
    pub fn warn(&self, text: impl AsRef<str>) {
        self.entry(Level::Warning, text.as_ref(), Map::new());
    }

    /// A message with fields, which text leaves out. What failed is told even where nothing else is.
    pub fn entry(&self, level: Level, text: &str, fields: Map<String, Value>) {
        let is_told = match level {
            Level::Debug => self.verbose,
            Level::Info | Level::Warning => !self.quiet,
            Level::Error => true,
        };
        match (self.log, level) {
            _ if !is_told => {}
            (LogFormat::Json, _) => {
                let time = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true);
                let mut entry = Map::from_iter(
                    [("time", json!(time)), ("level", json!(level)), ("message", json!(text))]
                        .map(|(name, value)| (name.to_owned(), value)),
                );
                entry.extend(fields);
                tell(Value::Object(entry).to_string());
            }
            (LogFormat::Text, Level::Debug | Level::Info) => tell(text),
            (LogFormat::Text, Level::Warning) => tell(format!("warning: {text}")),
            (LogFormat::Text, Level::Error) => tell(format!("error: {text}")),
        }
    }

    /// The result of a command whose log is JSON: an error is told there, and by nobody else.
    ///
    /// # Errors
    /// The command's own.
    pub fn logged<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| match self.log {
            LogFormat::Text => error,
            LogFormat::Json => {
                self.entry(Level::Error, &format!("{error:#}"), Map::new());
                error.context(Logged)
            }
        })
    }

    /// A progress bar of `length` steps; it hides itself where stderr is no terminal.
    /// `template` is indicatif's, e.g. `{bar:30} {pos}/{len} {msg} {eta}`.
    pub fn bar(&self, length: u64, template: &str) -> Result<ProgressBar> {
        let is_hidden = self.quiet || self.log == LogFormat::Json;
        let target = if is_hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
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

/// The name among known ones that one which is none of them was meant for, if it is near to any.
pub fn nearest<S: AsRef<str>>(name: &str, known: &[S]) -> Option<String> {
    const NEAR: f64 = 0.7;
    let name = name.to_lowercase();
    let near = known.iter().map(|own| (strsim::jaro(&name, &own.as_ref().to_lowercase()), own.as_ref()));
    let near = near.filter(|(likeness, _)| *likeness >= NEAR);
    near.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, own)| own.to_owned())
}

/// A line on stderr. Where it can't be written, since the terminal has gone or a pipe's reader, nobody listens, and the
/// work goes on.
pub fn tell(text: impl AsRef<str>) {
    // one write, so that lines of several processes stay whole
    let line = format!("{}\n", text.as_ref());
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Stands around an error that the log has told.
#[derive(Debug, thiserror::Error)]
#[error("told in the log")]
pub struct Logged;

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
