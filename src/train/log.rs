//! A run's log: a JSON line a step and an evaluation, in `training/log.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use crate::Result;
use crate::files;

/// The open log.
pub struct Log {
    file: File,
}

impl Log {
    /// Opens a log that has what was logged up to `step`, and nothing of later steps.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let kept: String = match std::fs::read_to_string(path) {
            Ok(text) => {
                text.lines().filter(|line| is_up_to(line, step)).map(|line| format!("{line}\n")).collect()
            }
            Err(_) => String::new(),
        };
        files::write(path, kept)?;
        let file = OpenOptions::new().append(true).open(path).with_context(|| path.display().to_string())?;
        Ok(Self { file })
    }

    /// Appends one line.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}").context("writing the training log")
    }
}

fn is_up_to(line: &str, step: usize) -> bool {
    let logged = serde_json::from_str::<Value>(line).ok().and_then(|line| line.get("step")?.as_u64());
    logged.is_some_and(|logged| logged <= step as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
}
