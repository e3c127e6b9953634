//! A run's log: a JSON line a step and an evaluation, in `training/log.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use crate::{Result, bail_unusable, files};

/// The open log.
pub struct Log {
    /// None takes what is written for nothing.
    file: Option<File>,
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
        Ok(Self { file: Some(file) })
    }

    /// One that keeps nothing: of a process that does not write.
    pub fn none() -> Self {
        Self { file: None }
    }

    /// Appends one line.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        writeln!(file, "{line}").context("writing the training log")
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
