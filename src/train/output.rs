//! The directory that `tk train` writes: nobody else's is touched, a run goes on with what it was started with, and the
//! result is whole or not there.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::checkpoint::Folder;
use super::prepare::Prepared;
use super::{Settings, lora};
use crate::checkpoint::adapter;
use crate::model::token_ids;
use crate::predict::graphs;
use crate::task::Task;
use crate::{Result, bail_unusable, files, saved, unusable};

/// What is to become of what an earlier run has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlierRun {
    /// There is none.
    New,
    /// It is replaced.
    Overwrite,
    /// It is gone on with.
    Resume,
}

/// What a run is started with and goes on with.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct RunInputs {
    /// Sha-256 of each input, so that a resumed run goes on with the same.
    inputs: Vec<(String, String)>,
}

/// Refuses an output directory that holds something of somebody else's, or a run that nobody spoke of.
///
/// # Errors
/// Unusable: says what stands there.
pub fn check(output: &Path, asked: EarlierRun, settings: &toml::Table) -> Result<()> {
    let folder = Folder::of(output);
    let ours = folder.settings().is_file();
    if asked == EarlierRun::Resume && !ours {
        bail_unusable!("{} holds no run of tk's that could be resumed", output.display());
    }
    if output.exists() && !output.is_dir() {
        bail_unusable!("--output {} is a file, expected a directory", output.display());
    }
    let is_empty = !output.is_dir()
        || output.read_dir().map_err(|e| unusable!("{}: {e}", output.display()))?.next().is_none();
    if !ours && !is_empty {
        bail_unusable!(
            "--output {} holds files that tk train did not write; name a new or an empty directory",
            output.display()
        );
    }
    if ours && asked == EarlierRun::New {
        bail_unusable!(
            "--output {} holds an earlier run: --resume goes on with it, --overwrite replaces it",
            output.display()
        );
    }
    if asked == EarlierRun::Resume {
        let differing = differences(settings, &saved_settings(&folder)?);
        if !differing.is_empty() {
            bail_unusable!(
                "a resumed run goes on with the settings of {}; these differ: {}",
                folder.settings().display(),
                differing.join(", ")
            );
        }
    }
    Ok(())
}

fn saved_settings(folder: &Folder) -> Result<toml::Table> {
    let path = folder.settings();
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))
}

/// The keys of settings whose values differ; of a table inside, as `TABLE.KEY`.
pub fn differences(now: &toml::Table, then: &toml::Table) -> Vec<String> {
    let keys: std::collections::BTreeSet<&String> = now.keys().chain(then.keys()).collect();
    let shown = |value: Option<&toml::Value>| value.map_or("not set".to_owned(), toml::Value::to_string);
    // a run that an older tk has started knows nothing of a flag that came since
    fn set<'t>(table: &'t toml::Table, key: &str) -> Option<&'t toml::Value> {
        table.get(key).filter(|value| **value != toml::Value::Boolean(false))
    }
    let differing = keys.into_iter().filter(|key| set(now, key) != set(then, key));
    differing
        .flat_map(|key| match (now.get(key), then.get(key)) {
            (Some(toml::Value::Table(now)), Some(toml::Value::Table(then))) => {
                differences(now, then).into_iter().map(|inside| format!("{key}.{inside}")).collect()
            }
            (now, then) => vec![format!("{key} ({}, was {})", shown(now), shown(then))],
        })
        .collect()
}

/// Makes `training/` with the settings and the inputs' hashes, or holds a resumed run against them. No other process
/// trains there until the result is dropped.
///
/// # Errors
/// Unusable: it can't be written, or the inputs have changed since the run was started.
pub fn start(
    output: &Path,
    asked: EarlierRun,
    settings: &toml::Table,
    inputs: Vec<(String, String)>,
) -> Result<Option<std::fs::File>> {
    let folder = Folder::of(output);
    let now = RunInputs { inputs };
    let unwritable = |e: std::io::Error| unusable!("--output {} can't be written: {e}", output.display());
    files::create_folder(output).map_err(unwritable)?;
    let held = folder.occupy()?;
    files::sweep(output).map_err(unwritable)?;
    let inputs = folder.inputs();
    if asked == EarlierRun::Resume {
        let text = std::fs::read_to_string(&inputs).with_context(|| inputs.display().to_string())?;
        let then: RunInputs =
            serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", inputs.display()))?;
        let differing = |a: &RunInputs, b: &RunInputs| -> Vec<String> {
            let only = a.inputs.iter().filter(|input| !b.inputs.contains(input));
            only.map(|(name, _)| name.clone()).collect()
        };
        if now != then {
            let mut changed = [differing(&now, &then), differing(&then, &now)].concat();
            changed.sort();
            changed.dedup();
            bail_unusable!(
                "the run can't be resumed: its inputs have changed since it was started ({})",
                changed.join(", ")
            );
        }
        return Ok(held);
    }
    folder.clear()?;
    files::write(&folder.settings(), toml::to_string(settings)?)?;
    files::write(&inputs, serde_json::to_string_pretty(&now)?)?;
    Ok(held)
}

/// Writes the directory that transformers, `tk export` and `tk eval` read; the weights last.
///
/// # Errors
/// A file can't be written.
pub fn write_model(output: &Path, prepared: &Prepared, settings: &Settings) -> Result<()> {
    let weights = output.join("model.safetensors");
    let is_adapter = prepared.config.family.lora().is_some();
    let temporary = if is_adapter { None } else { Some(files::temporary_beside(&weights)?) };
    temporary.as_ref().map_or(Ok(()), |temporary| prepared.params.save(temporary))?;
    // an earlier run's graphs and weights would not be this model's; without weights the directory is no model, and says
    // so, until all of it is there
    graphs::remove(output)?;
    for path in [&weights, &output.join(adapter::WEIGHTS), &output.join(adapter::CONFIG)] {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    prepared.learning.tokenizer.save(&prepared.model, output)?;
    let pads = match prepared.config.family.pads_with_the_end() {
        false => None, // has a token of its own for it
        true => token_ids::read(&prepared.config.raw, "eos_token_id", prepared.config.vocab_size())?,
    };
    let pads = pads.and_then(|ends| ends.first().copied());
    let pad_token = pads.and_then(|id| prepared.learning.tokenizer.inner().id_to_token(id));
    saved::finish_tokenizer_config(output, settings.max_length, pad_token.as_deref())?;
    files::write(&output.join("config.json"), serde_json::to_string_pretty(&prepared.config.raw)? + "\n")?;
    for name in Task::files() {
        let path = output.join(name);
        let folder = path.parent().filter(|folder| *folder != output);
        let place = || path.display().to_string();
        match prepared.learning.files.iter().find(|(own, _)| *own == name) {
            Some((_, text)) => {
                folder.map_or(Ok(()), files::create_folder).with_context(place)?;
                files::write(&path, text)?;
            }
            // an earlier run's
            None if path.exists() => {
                std::fs::remove_file(&path).with_context(place)?;
                if folder.is_some_and(|folder| folder.read_dir().is_ok_and(|mut left| left.next().is_none()))
                {
                    folder.map_or(Ok(()), std::fs::remove_dir).with_context(place)?;
                }
            }
            None => {}
        }
    }
    match temporary {
        Some(temporary) => files::put(temporary, &weights).with_context(|| weights.display().to_string()),
        None => lora::write(output, prepared, &settings.lora),
    }
}
