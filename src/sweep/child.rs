//! One run of a sweep: `tk train` in a process of its own, which is watched.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::train::checkpoint::Folder;
use crate::{Result, files, process};

/// How often a run is looked at.
const EVERY: Duration = Duration::from_millis(100);

/// A run by its name in the folder of all runs, where `NAME.toml` has its settings, `NAME.log` what it says and
/// `NAME.json` its result.
pub struct Child<'a> {
    pub folder: &'a Path,
    pub name: String,
}

/// How a run ended.
pub enum Ended {
    /// With its result.
    Finished(Value),
    Hopeless,
    /// With what it said.
    Failed(String),
    /// Because the sweep was asked to end.
    Interrupted,
}

impl Child<'_> {
    /// Where it trains.
    pub fn output(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", self.name))
    }

    /// Trains, or goes on with what was begun, until it is over, is hopeless, or `stopped` is set.
    ///
    /// # Errors
    /// Unusable: another process still trains there. A file can't be written, or the process can't be started.
    pub fn run(
        &self,
        settings: &toml::Table,
        hopeless: impl Fn() -> bool,
        stopped: &AtomicI32,
    ) -> Result<Ended> {
        let output = self.output();
        let place = || output.display().to_string();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["train", "--json", "--output"]).arg(&output);
        let training = Folder::of(&output);
        if training.settings().is_file() {
            // a process of a sweep that was killed may be alive
            drop(files::try_lock(training.path())?);
            command.arg("--resume");
        } else {
            if output.exists() {
                std::fs::remove_dir_all(&output).with_context(place)?; // it had not begun
            }
            files::write(&self.file("toml"), toml::to_string(settings)?)?;
            command.arg("--config").arg(self.file("toml"));
        }
        let [said, result] = ["log", "json"].map(|extension| {
            let path = self.file(extension);
            File::create(&path).with_context(|| path.display().to_string())
        });
        command.stdin(Stdio::null()).stdout(result?).stderr(said?);
        // a terminal's Ctrl-C reaches this process alone, which hands it on
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().context("starting tk train")?;
        let (mut seen, mut asked) = (None, None);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if asked.is_none() {
                let size = training.log().metadata().map(|about| about.len()).ok();
                asked = match stopped.load(Ordering::Relaxed) {
                    0 if size != seen && hopeless() => Some(Ended::Hopeless),
                    0 => None,
                    _ => Some(Ended::Interrupted),
                };
                seen = size;
                if asked.is_some() {
                    process::terminate(&mut child)?;
                }
            }
            std::thread::sleep(EVERY);
        };
        if status.success() {
            let path = self.file("json");
            let place = || path.display().to_string();
            let text = std::fs::read_to_string(&path).with_context(place)?;
            return Ok(Ended::Finished(serde_json::from_str(&text).with_context(place)?));
        }
        Ok(asked.unwrap_or_else(|| Ended::Failed(self.error(status))))
    }

    /// What a failed run said last.
    fn error(&self, status: std::process::ExitStatus) -> String {
        let said = std::fs::read(self.file("log")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let error = said.rfind("error: ").map(|at| said[at + "error: ".len()..].trim().to_owned());
        error.unwrap_or_else(|| format!("{status}"))
    }

    /// The values of a metric in its evaluations so far; not a number where it is none.
    pub fn evaluations(&self, metric: &str) -> Vec<f64> {
        let key = format!("eval_{metric}");
        let text = std::fs::read_to_string(Folder::of(&self.output()).log()).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains("\"eval_"));
        let value = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?; // the last one may be half there
            line.get(&key).map(|value| value.as_f64().unwrap_or(f64::NAN))
        };
        lines.filter_map(value).collect()
    }
}
