//! How far a run is, and how it went.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Result;
use crate::predict::sink::Done;
use crate::runtime::Provider;
use crate::say::{Say, peak_rss_bytes};

/// What was done so far, and the telling of it.
pub(super) struct ServeProgress {
    say: Say,
    bar: indicatif::ProgressBar,
    started: Instant,
    told: Instant,
    /// Answered by the run that was killed.
    before: Done,
    pub records: usize,
    pub errors: usize,
    pub tokens: usize,
    /// Records that were cut to the maximum length.
    pub truncated: usize,
    /// Where the predictions go, if not to standard output.
    target: Option<String>,
}

/// How often a line is written where there is no terminal.
const TELL_EVERY: Duration = Duration::from_secs(10);

impl ServeProgress {
    pub fn new(before: Done, target: Option<String>, say: Say) -> Result<Self> {
        let bar = say.bar(0, "{spinner} {pos} records  {msg}  {elapsed}")?;
        let now = Instant::now();
        Ok(Self {
            say,
            bar,
            started: now,
            told: now,
            before,
            records: 0,
            errors: 0,
            tokens: 0,
            truncated: 0,
            target,
        })
    }

    fn rates(&self) -> (f64, f64) {
        let seconds = self.started.elapsed().as_secs_f64();
        (self.records as f64 / seconds, self.tokens as f64 / seconds)
    }

    /// Tells how far it is.
    pub fn show(&mut self) {
        let (records, tokens) = self.rates();
        let text = format!("{records:.0} records/s  {tokens:.0} tokens/s");
        self.bar.set_position((self.before.records + self.records) as u64);
        self.bar.set_message(text.clone());
        if !std::io::stderr().is_terminal() && self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            self.say.line(format!("{} records  {text}", self.before.records + self.records));
        }
    }

    /// The summary.
    pub fn finish(self, provider: Provider) -> Result<()> {
        self.bar.finish_and_clear();
        let seconds = self.started.elapsed().as_secs_f64();
        let (records_per_second, tokens_per_second) = self.rates();
        let (records, errors) = (self.before.records + self.records, self.before.errors + self.errors);
        self.say.line(format!(
            "{records} records, {errors} of them errors, {} cut to the maximum length, {seconds:.1} s: \
             {records_per_second:.0} records/s, {tokens_per_second:.0} tokens/s on {}{}",
            self.truncated,
            provider.name(),
            self.target.as_ref().map(|target| format!(" → {target}")).unwrap_or_default()
        ));
        let result = json!({
            "records": records,
            "errors": errors,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "seconds": seconds,
            "records_per_second": records_per_second,
            "tokens_per_second": tokens_per_second,
            "provider": provider.name(),
            "resumed_records": self.before.records,
            "peak_rss_bytes": peak_rss_bytes(),
        });
        self.say.result("", &result)
    }
}
