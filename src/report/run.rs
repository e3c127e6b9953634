//! What a run has left in `training/`: the settings that it was started with and its inputs' hashes.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::checkpoint::file_hash;
use crate::data::records::{Files, file_names};
use crate::task::{RecordFlags, TrainingFlags};
use crate::train::checkpoint::Folder;
use crate::train::split::{SplitFlags, Whole};
use crate::{Result, unusable};

/// What a run was started with.
#[derive(Debug, Default)]
pub struct Started {
    /// All settings, as they were saved.
    pub table: toml::Table,
    /// Names of inputs and their sha256.
    pub inputs: Vec<(String, String)>,
    known: Known,
}

/// The settings that a report asks for.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Known {
    task: Option<String>,
    model: Option<String>,
    seed: u64,
    #[serde(with = "file_names")]
    train: Vec<PathBuf>,
    #[serde(with = "file_names")]
    eval: Vec<PathBuf>,
    best_metric: Option<String>,
    #[serde(flatten)]
    records: RecordFlags,
    #[serde(flatten)]
    training: TrainingFlags,
    #[serde(flatten)]
    split: SplitFlags,
}

#[derive(Deserialize)]
struct Inputs {
    inputs: Vec<(String, String)>,
}

impl Started {
    /// Reads them; a directory that no run of tk's wrote has none.
    ///
    /// # Errors
    /// Unusable: a file can't be read, or is none of a run's.
    pub fn read(folder: &Folder) -> Result<Option<Self>> {
        let path = folder.settings();
        if !path.is_file() {
            return Ok(None);
        }
        let read =
            |path: &Path| std::fs::read_to_string(path).map_err(|e| unusable!("{}: {e}", path.display()));
        let table: toml::Table =
            toml::from_str(&read(&path)?).map_err(|e| unusable!("{}: {e}", path.display()))?;
        let known = table.clone().try_into().map_err(|e| unusable!("{}: {e}", path.display()))?;
        let path = folder.inputs();
        let inputs: Inputs =
            serde_json::from_str(&read(&path)?).map_err(|e| unusable!("{}: {e}", path.display()))?;
        Ok(Some(Self { table, inputs: inputs.inputs, known }))
    }

    /// The model that the run started from.
    pub fn model(&self) -> Option<&str> {
        self.known.model.as_deref()
    }

    /// The files that it learnt from.
    pub fn train(&self) -> &[PathBuf] {
        &self.known.train
    }

    /// The files that it measured on.
    pub fn eval(&self) -> &[PathBuf] {
        &self.known.eval
    }

    /// How its records were read.
    pub fn records(&self) -> &RecordFlags {
        &self.known.records
    }

    /// The metric that said which evaluation is the best, where one was asked for.
    pub fn best_metric(&self) -> Option<&str> {
        self.known.best_metric.as_deref()
    }

    /// The records that it measured on, if their files are still the same; else why not.
    ///
    /// # Errors
    /// One is there, but can't be read.
    pub fn measured_on(&self) -> Result<Result<Files, String>> {
        if !self.eval().is_empty() {
            return self.unchanged("eval", self.eval());
        }
        let Known { task: Some(task), seed, records, training, split, .. } = &self.known else {
            return Ok(Err("the run had no --eval".to_owned()));
        };
        if split.validation_split.is_none() {
            return Ok(Err("the run had no --eval".to_owned()));
        }
        let train = match self.unchanged("train", self.train())? {
            Ok(train) => train,
            why => return Ok(why),
        };
        let divided = split.divide(&Whole { task, train: &train, records, training, seed: *seed })?;
        Ok(divided
            .and_then(|divided| divided.eval)
            .ok_or_else(|| "nothing was drawn to measure on".to_owned()))
    }

    /// The files that a run was given by this flag, if they are still the same; else why not.
    fn unchanged(&self, flag: &str, names: &[PathBuf]) -> Result<Result<Files, String>> {
        let files = match Files::named(names, self.known.records.reading.format) {
            Ok(files) => files,
            Err(error) => return Ok(Err(format!("what the run measured on is not there: {error:#}"))),
        };
        if let Some(gone) = files.all().into_iter().find(|path| !path.is_file()) {
            return Ok(Err(format!("{}, which the run measured on, is not there", gone.display())));
        }
        let is_own =
            |name: &str| name.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '));
        let mut was: Vec<&str> =
            self.inputs.iter().filter(|(name, _)| is_own(name)).map(|(_, hash)| hash.as_str()).collect();
        let now = files.all().into_iter().map(file_hash).collect::<Result<Vec<_>>>()?;
        let mut now: Vec<&str> = now.iter().map(String::as_str).collect();
        was.sort_unstable();
        now.sort_unstable();
        if was != now {
            return Ok(Err(format!("{files} is not any more what the run measured on")));
        }
        Ok(Ok(files))
    }
}
