//! What of a sweep has been done: `sweep.json` in its output.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::Sweep;
use super::stop::is_better;
use crate::checkpoint::file_hash;
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
    /// The run whose model stands in `best`.
    pub kept: Option<String>,
}

/// A run that has ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Finished,
    /// It was hopeless.
    Stopped,
    #[default]
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
        let path = file(&sweep.output);
        let now = Self { settings: sweep.file.clone(), inputs: inputs(sweep)?, ..Self::default() };
        if !path.is_file() {
            let others = sweep.output.read_dir().map_err(|e| unusable!("{}: {e}", sweep.output.display()))?;
            let is_other = |name: &std::ffi::OsStr| name != "runs";
            if others.filter_map(Result::ok).any(|entry| is_other(&entry.file_name()))
                || sweep.output.join("runs").read_dir()?.next().is_some()
            {
                bail_unusable!(
                    "output {} holds files that tk sweep did not write; name a new or an empty directory",
                    sweep.output.display()
                );
            }
            now.save(&sweep.output)?;
            return Ok(now);
        }
        let text = std::fs::read_to_string(&path).map_err(|e| unusable!("{}: {e}", path.display()))?;
        let then: Self = serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))?;
        let mut differing = differences("", &now.settings, &then.settings);
        let names: BTreeSet<&String> = now.inputs.keys().chain(then.inputs.keys()).collect();
        let changed = names.into_iter().filter(|name| now.inputs.get(*name) != then.inputs.get(*name));
        differing.extend(changed.map(|name| format!("what is in {name}")));
        if !differing.is_empty() {
            bail_unusable!(
                "{} holds a sweep with other settings: {}; name another output",
                sweep.output.display(),
                differing.join(", ")
            );
        }
        Ok(then)
    }

    /// Writes it down.
    pub fn save(&self, output: &Path) -> Result<()> {
        files::write(&file(output), serde_json::to_string_pretty(self)? + "\n")
    }

    /// Runs that came to their end.
    pub fn finished(&self) -> impl Iterator<Item = &Ran> {
        self.runs.values().filter(|ran| ran.status == Status::Finished)
    }

    /// The name of the best finished run; of equals the first.
    pub fn best(&self) -> Option<String> {
        let finished = self.runs.iter().filter(|(_, ran)| ran.status == Status::Finished);
        let valued = finished.filter_map(|(name, ran)| Some((name, ran.value?)));
        let better = |a: (_, f64), b: (_, f64)| if is_better(b.1, a.1, self.more_is_better) { b } else { a };
        valued.reduce(better).map(|(name, _)| name.clone())
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
                format!(
                    "stopped behind {} evaluations: {value} is worse than the median",
                    self.evaluations.len()
                )
            }
            _ => value,
        }
    }
}

fn file(output: &Path) -> PathBuf {
    output.join("sweep.json")
}

/// Sha-256 of the files of records that every run reads.
fn inputs(sweep: &Sweep) -> Result<BTreeMap<String, String>> {
    let mut inputs = BTreeMap::new();
    for key in ["train", "eval"] {
        let value = sweep.train.get(key);
        let paths = value.into_iter().flat_map(|value| match value {
            toml::Value::Array(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        });
        for path in paths.filter_map(toml::Value::as_str).map(Path::new).filter(|path| path.is_file()) {
            let hash = file_hash(path).with_context(|| path.display().to_string())?;
            inputs.insert(path.display().to_string(), hash);
        }
    }
    Ok(inputs)
}

/// The keys that differ, with those of tables inside.
fn differences(within: &str, now: &toml::Table, then: &toml::Table) -> Vec<String> {
    let keys: BTreeSet<&String> = now.keys().chain(then.keys()).collect();
    let shown = |value: Option<&toml::Value>| value.map_or("not set".to_owned(), toml::Value::to_string);
    let of_key = |key: &String| match (now.get(key), then.get(key)) {
        (Some(toml::Value::Table(now)), Some(toml::Value::Table(then))) => {
            differences(&format!("{within}{key}."), now, then)
        }
        (now, then) if now == then => Vec::new(),
        (now, then) => vec![format!("{within}{key} ({}, was {})", shown(now), shown(then))],
    };
    keys.into_iter().flat_map(of_key).collect()
}
