//! A model and its own records, to be trained.

use std::io::{BufRead, BufReader, Lines};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use super::{copy_dir, models, records_file};

/// A directory with a model and data, and room for outputs.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub task: &'static str,
}

impl Bench {
    /// A reference model, and its records four times over in `train.jsonl`.
    pub fn new(task: &'static str, model: &str) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap(), task };
        copy_dir(&models(model), &bench.path("model"));
        records_file(model, 4, &bench.path("train.jsonl"));
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Starts a run, and waits until it tells of a step; what it says from then on.
pub fn started_until(step: &str, run: &mut Command) -> (Child, Lines<BufReader<ChildStderr>>) {
    let mut run = run.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(run.stderr.take().unwrap()).lines();
    lines
        .by_ref()
        .map(Result::unwrap)
        .find(|line| line.starts_with(step))
        .expect("the run tells of the step");
    (run, lines)
}
