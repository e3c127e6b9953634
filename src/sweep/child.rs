//! One run of a sweep: `tk train` in a process of its own, which is watched.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use crate::train::checkpoint::Folder;
use crate::{Result, files, process};

/// How often a process is looked after.
const EVERY: Duration = Duration::from_millis(50);
/// Times as long as its log takes to be read, it is left alone.
const PAUSE: u32 = 50;

/// A run by its name in the folder of all runs. It trains in `NAME`; beside it `NAME.toml` has its settings, `NAME.log`
/// what it says and `NAME.json` its result.
pub struct Child<'a> {
    pub folder: &'a Path,
    pub name: String,
}

/// How a run ended.
pub enum Ended {
    /// With its result.
    Finished(Value),
    Hopeless,
    /// With what it said; whether before its first step, because its settings or its data are unusable.
    Failed {
        error: String,
        is_unusable: bool,
    },
    /// Because the sweep was asked to end.
    Interrupted,
}

impl Child<'_> {
    /// Where it trains.
    pub fn output(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Whether a run was begun there that can be gone on with.
    pub fn is_begun(&self) -> bool {
        Folder::of(&self.output()).settings().is_file()
    }

    /// Removes all that a run has left.
    pub fn remove(&self) -> Result<()> {
        let output = self.output();
        if output.exists() {
            std::fs::remove_dir_all(&output).with_context(|| output.display().to_string())?;
        }
        for path in ["toml", "log", "json"].map(|extension| self.file(extension)) {
            if path.exists() {
                std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", self.name))
    }

    /// Trains, or goes on with what was begun, until it is over, is hopeless, or `stopped` is set.
    ///
    /// # Errors
    /// A file can't be written, or the process can't be started.
    pub fn run(
        &self,
        settings: &toml::Table,
        hopeless: impl Fn() -> bool,
        stopped: &AtomicI32,
    ) -> Result<Ended> {
        if stopped.load(Ordering::Relaxed) != 0 {
            return Ok(Ended::Interrupted);
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["train", "--json", "--output"]).arg(self.output());
        let training = Folder::of(&self.output());
        if self.is_begun() {
            // of a sweep that was killed, the process may be about to end
            drop(files::lock(training.path())?);
            command.arg("--resume");
        } else {
            self.remove()?; // it had not begun
            files::write(&self.file("toml"), toml::to_string(settings)?)?;
            command.arg("--config").arg(self.file("toml"));
        }
        let (said, result) = (self.file("log"), self.file("json"));
        let said = File::options().append(true).create(true).open(&said);
        let said = said.with_context(|| self.file("log").display().to_string())?;
        let result = File::create(&result).with_context(|| result.display().to_string())?;
        command.stdin(Stdio::null()).stdout(result).stderr(said);
        process::lead(&mut command);
        let mut child = command.spawn().context("starting tk train")?;

        let (mut seen, mut next, mut asked) = (None, Instant::now(), None);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if asked.is_none() {
                let size = training.log().metadata().map(|about| about.len()).ok();
                if stopped.load(Ordering::Relaxed) != 0 {
                    asked = Some(Ended::Interrupted);
                } else if size != seen && Instant::now() >= next {
                    let began = Instant::now();
                    asked = hopeless().then_some(Ended::Hopeless);
                    (seen, next) = (size, began + began.elapsed() * PAUSE);
                }
                if asked.is_some() {
                    process::terminate(&mut child)?;
                }
            }
            std::thread::sleep(EVERY);
        };
        if status.success() {
            return self.result().map(Ended::Finished);
        }
        let failed = || Ended::Failed { error: self.error(status), is_unusable: status.code() == Some(2) };
        Ok(asked.unwrap_or_else(failed))
    }

    fn result(&self) -> Result<Value> {
        let path = self.file("json");
        let read = || -> Result<Value> { Ok(serde_json::from_str(&std::fs::read_to_string(&path)?)?) };
        read().with_context(|| path.display().to_string())
    }

    /// What a failed run said last.
    fn error(&self, status: ExitStatus) -> String {
        let said = std::fs::read(self.file("log")).unwrap_or_default();
        let said = format!("\n{}", String::from_utf8_lossy(&said));
        let told = said.rsplit_once("\nerror: ").map(|(_, told)| told.trim().to_owned());
        // a process that a signal has ended said nothing
        told.filter(|_| status.code().is_some()).unwrap_or_else(|| status.to_string())
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
