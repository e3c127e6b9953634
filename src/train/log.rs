//! A run's log: a JSON line a step and an evaluation, in `training/log.jsonl`, and the same for TensorBoard beside it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::checkpoint::Folder;
use super::events::Events;
use crate::{Result, bail_unusable, files};

/// What is logged of a step, or of an evaluation behind it.
pub struct Entry {
    pub step: usize,
    /// How many epochs that makes.
    pub epoch: f64,
    pub phase: Phase,
    /// How many tokens were learnt from.
    pub tokens: Option<usize>,
    /// Other numbers by their names, as they are.
    pub numbers: Vec<(String, f64)>,
}

/// What an entry's numbers were measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A step.
    Train,
    /// An evaluation.
    Eval,
}

impl Entry {
    /// `step`, `epoch`, and the numbers, those of an evaluation as `eval_NAME`; null for what is no number.
    fn line(&self) -> Value {
        let mut line = json!({"step": self.step, "epoch": self.epoch});
        for (name, number) in &self.numbers {
            match self.phase {
                Phase::Train => line[name] = json!(number),
                Phase::Eval => line[format!("eval_{name}")] = json!(number),
            }
        }
        if let Some(tokens) = self.tokens {
            line["tokens"] = json!(tokens);
        }
        line
    }

    /// The numbers under TensorBoard's kind of names: `train/loss`, `eval/accuracy`.
    fn scalars(&self) -> impl Iterator<Item = (String, f64)> {
        let group = match self.phase {
            Phase::Train => "train",
            Phase::Eval => "eval",
        };
        self.numbers.iter().map(move |(name, number)| (format!("{group}/{name}"), *number))
    }
}

/// The open logs of a run.
pub struct RunLog {
    /// None keeps nothing of what is written.
    files: Option<(Log, Events)>,
}

impl RunLog {
    /// Goes on behind `step`: what was logged of later steps is forgotten.
    ///
    /// # Errors
    /// As [`Log::open`]; or a file can't be written.
    pub fn open(folder: &Folder, step: usize) -> Result<Self> {
        let lines = Log::open(&folder.log(), step)?;
        Ok(Self { files: Some((lines, Events::start(folder.path(), step)?)) })
    }

    /// One that keeps nothing: of a process that does not write.
    pub fn none() -> Self {
        Self { files: None }
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&mut self, entry: &Entry) -> Result<()> {
        let Some((lines, events)) = &mut self.files else { return Ok(()) };
        lines.write(&entry.line())?;
        events.scalars(entry.step, entry.scalars())
    }
}

/// A file of JSON lines, each of a step.
pub struct Log {
    file: File,
}

impl Log {
    /// Opens a log that has what was logged up to `step`, and nothing of later steps.
    ///
    /// # Errors
    /// There is a log, but it can't be read, or has a line that is none of a log's; it stays as it is.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let place = || path.display().to_string();
        let text = match std::fs::read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            text => text.with_context(place)?,
        };
        let (mut kept, mut lines) =
            (Vec::new(), text.split_inclusive(|&byte| byte == b'\n').zip(1..).peekable());
        while let Some((line, number)) = lines.next() {
            match logged_step(line) {
                Some(logged) if logged <= step as u64 => kept.extend_from_slice(line),
                Some(_) => {}
                None if lines.peek().is_none() => {} // the last line, which a kill cut off
                None => bail_unusable!("{}:{number}: no line of a run's log: move the file away", place()),
            }
        }
        files::write(path, kept)?;
        let file = OpenOptions::new().append(true).open(path).with_context(place)?;
        Ok(Self { file })
    }

    /// Appends one line.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}").context("writing the training log")
    }
}

/// The step of a whole line.
fn logged_step(line: &[u8]) -> Option<u64> {
    let line = line.strip_suffix(b"\n")?;
    serde_json::from_slice::<Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_log_that_is_opened_again_forgets_what_came_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        for step in 1..=3 {
            log.write(&json!({"step": step, "loss": 0.5})).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"step\": 4, \"lo")
            .unwrap();
        Log::open(&path, 2).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.5}\n");
    }

    #[test]
    fn a_log_that_is_none_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        for text in [&b"my notes\n{\"step\":1}\n"[..], b"{\"step\":1}\n\xff\xfe\n{\"step\":2}\n"] {
            std::fs::write(&path, text).unwrap();
            let error = Log::open(&path, 2).err().unwrap();
            assert!(error.to_string().contains("log.jsonl:"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), text);
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Log::open(&path, 2).is_err() && path.is_dir());
    }
}
