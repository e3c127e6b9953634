//! What a run has left in `training/`: the settings that it was started with and its inputs' hashes.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::checkpoint::file_hash;
use crate::task::RecordFlags;
use crate::train::checkpoint::Folder;
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
    model: Option<String>,
    train: Names,
    eval: Names,
    best_metric: Option<String>,
    #[serde(flatten)]
    records: RecordFlags,
}

/// One name, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl Default for Names {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Names {
    fn all(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Several(paths) => paths,
        }
    }
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
        self.known.train.all()
    }

    /// The files that it measured on.
    pub fn eval(&self) -> &[PathBuf] {
        self.known.eval.all()
    }

    /// How its records were read.
    pub fn records(&self) -> &RecordFlags {
        &self.known.records
    }

    /// The metric that said which evaluation is the best, where one was asked for.
    pub fn best_metric(&self) -> Option<&str> {
        self.known.best_metric.as_deref()
    }

    /// The file that it measured on, if it is still the same; else why not.
    ///
    /// # Errors
    /// It is there, but can't be read.
    pub fn measured_on(&self) -> Result<Result<&Path, String>> {
        let path = match self.eval() {
            [] => return Ok(Err("the run had no --eval".to_owned())),
            [path] => path,
            several => return Ok(Err(format!("the run measured on {} files", several.len()))),
        };
        if !path.is_file() {
            return Ok(Err(format!("{}, which the run measured on, is not there", path.display())));
        }
        let was = self.inputs.iter().find(|(name, _)| name == "eval").map(|(_, hash)| hash);
        if was != Some(&file_hash(path)?) {
            return Ok(Err(format!("{} is not the file any more that the run measured on", path.display())));
        }
        Ok(Ok(path))
    }
}
