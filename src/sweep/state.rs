//! What of a sweep has been done: `sweep.json` in its output.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Sweep;
use super::child::Ended;
use super::stop::best_of;
use crate::checkpoint::file_hash;
use crate::train::output::differences;
use crate::{Result, bail_unusable, files, unusable};

/// The runs that have ended, and what they were started from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// The sweep's file.
    settings: toml::Table,
    /// Sha-256 of each file of records.
    inputs: BTreeMap<String, String>,
    /// What runs are compared by; known when one is finished.
    pub metric: Option<String>,
    pub more_is_better: bool,
    /// By name.
    pub runs: BTreeMap<String, Ran>,
}

/// A run that has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ran {
    pub status: Status,
    /// The metric of its best evaluation.
    pub value: Option<f64>,
    /// The metric of each evaluation; none where it was no number.
    pub evaluations: Vec<Option<f64>>,
    pub steps: Option<u64>,
    pub seconds: Option<f64>,
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Finished,
    /// It was hopeless.
    Stopped,
    Failed,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl State {
    /// What was done of this sweep before.
    ///
    /// # Errors
    /// Unusable: the output is somebody else's, or of a sweep with other settings or other data.
    pub fn open(sweep: &Sweep) -> Result<Self> {
        let (output, path) = (&sweep.output, file(&sweep.output));
        let now = Self { settings: sweep.file.clone(), inputs: inputs(sweep)?, ..Self::default() };
        if !path.is_file() {
            let entries = output.read_dir().map_err(|e| unusable!("{}: {e}", output.display()))?;
            // but for what a kill has left of a first `sweep.json`
            let is_other =
                |name: &std::ffi::OsStr| !name.as_encoded_bytes().starts_with(files::TEMPORARY.as_bytes());
            if entries.filter_map(Result::ok).any(|entry| is_other(&entry.file_name())) {
                bail_unusable!(
                    "output {} holds files that tk sweep did not write; name a new or an empty directory",
                    output.display()
                );
            }
            now.save(output)?;
            return Ok(now);
        }
        let text = std::fs::read_to_string(&path).map_err(|e| unusable!("{}: {e}", path.display()))?;
        let then: Self = serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))?;
        let mut differing = differences(&now.settings, &then.settings);
        let names: BTreeSet<&String> = now.inputs.keys().chain(then.inputs.keys()).collect();
        let changed = names.into_iter().filter(|name| now.inputs.get(*name) != then.inputs.get(*name));
        differing.extend(changed.map(|name| format!("what is in {name}")));
        if !differing.is_empty() {
            bail_unusable!(
                "{} holds a sweep with other settings: {}; name another output",
                output.display(),
                differing.join(", ")
            );
        }
        Ok(then)
    }

    /// Writes it down.
    pub fn save(&self, output: &Path) -> Result<()> {
        files::write(&file(output), serde_json::to_string_pretty(self)? + "\n")
    }

    /// Forgets a sweep of which nothing was done.
    pub fn remove(&self, output: &Path) -> Result<()> {
        let path = file(output);
        std::fs::remove_file(&path).with_context(|| path.display().to_string())
    }

    /// A run that has ended. The first that is finished tells what runs are compared by.
    ///
    /// # Errors
    /// Its result names no metric.
    pub fn ran(&mut self, ended: Ended, evaluations: impl Fn(&str) -> Vec<f64>) -> Result<Ran> {
        let (mut value, mut steps, mut seconds, mut error) = (None, None, None, None);
        let status = match ended {
            Ended::Finished(result) => {
                let metric = result["best_metric"].as_str().context("a run's result names no metric")?;
                value = result["eval"][metric].as_f64();
                (steps, seconds) = (result["steps"].as_u64(), result["train_seconds"].as_f64());
                self.metric = Some(metric.to_owned());
                self.more_is_better = result["more_is_better"] == Value::Bool(true);
                Status::Finished
            }
            Ended::Failed { error: said, .. } => {
                error = Some(said);
                Status::Failed
            }
            Ended::Hopeless | Ended::Interrupted => Status::Stopped,
        };
        let evaluations = self.metric.as_deref().map(evaluations).unwrap_or_default();
        if status == Status::Stopped {
            value = best_of(&evaluations, self.more_is_better);
        }
        let evaluations = evaluations.iter().map(|value| value.is_finite().then_some(*value)).collect();
        Ok(Ran { status, value, evaluations, steps, seconds, error })
    }

    /// Runs that came to their end, by name.
    pub fn finished(&self) -> impl Iterator<Item = (&String, &Ran)> {
        self.runs.iter().filter(|(_, ran)| ran.status == Status::Finished)
    }

    /// The name of the best finished run; of equals the first.
    pub fn best(&self) -> Option<&String> {
        let values: Vec<(&String, f64)> =
            self.finished().filter_map(|(name, ran)| Some((name, ran.value?))).collect();
        let numbers: Vec<f64> = values.iter().map(|(_, value)| *value).collect();
        let best = best_of(&numbers, self.more_is_better)?;
        values.into_iter().find(|(_, value)| *value == best).map(|(name, _)| name)
    }
}

impl Ran {
    /// The metric of each evaluation; not a number where it was none.
    pub fn numbers(&self) -> Vec<f64> {
        self.evaluations.iter().map(|value| value.unwrap_or(f64::NAN)).collect()
    }

    /// How it ended, for people.
    pub fn told(&self, metric: Option<&str>) -> String {
        if let Some(error) = &self.error {
            return format!("failed: {error}");
        }
        let value = self.value.map_or("no number".to_owned(), |value| format!("{value:.4}"));
        let value = format!("{} {value}", metric.unwrap_or("no metric"));
        match self.status {
            Status::Stopped => {
                let count = self.evaluations.len();
                let evaluations = if count == 1 { "evaluation" } else { "evaluations" };
                format!("stopped behind {count} {evaluations}: {value} is worse than the median")
            }
            _ => value,
        }
    }
}

fn file(output: &Path) -> PathBuf {
    output.join("sweep.json")
}

/// Sha-256 of the files of records; one that is not there is refused by the run that reads it.
fn inputs(sweep: &Sweep) -> Result<BTreeMap<String, String>> {
    let files = sweep.records.iter().filter(|path| path.is_file());
    let hashed = files.map(|path| Ok((path.display().to_string(), file_hash(path)?)));
    hashed.collect()
}
