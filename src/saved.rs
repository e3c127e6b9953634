//! A trained model's directory: configuration, task, tokenizer and weights, opened and held against each other.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::checkpoint::Weights;
use crate::checkpoint::adapter::{self, Adapter};
use crate::data::records::Files;
use crate::data::tokens::{Tokenizer, settings};
use crate::model::ModelConfig;
use crate::say::Say;
use crate::task::{Encoder, Example, RecordFlags, Task, TrainingFlags};
use crate::{Result, bail_unusable, files, unusable};

/// The fewest tokens that a text may be cut to: one between two special ones, as in training.
pub const SHORTEST: usize = 3;

/// Which of a checkpoint's heads is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct TaskFlag {
    /// The task, where the checkpoint has more heads than one [default: as the model's files say].
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(Task::NAMES))]
    pub task: Option<String>,
}

/// A model that can be evaluated, exported and served.
pub struct Saved {
    pub dir: PathBuf,
    pub config: ModelConfig,
    pub task: Task,
    /// Whether `--task` named it, in place of the directory's files.
    pub task_was_asked: bool,
    pub tokenizer: Tokenizer,
    pub weights: Weights,
    /// The longest sequence it takes, special tokens included.
    pub max_length: usize,
}

impl Saved {
    /// Opens a directory that `tk train` or `transformers` wrote.
    ///
    /// # Errors
    /// Something is missing, broken, or does not fit together; nothing is changed.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_for(dir, &TaskFlag::default())
    }

    /// The same for a task that may be named.
    ///
    /// # Errors
    /// As [`Saved::open`]; or the checkpoint lacks the task's head.
    pub fn open_for(dir: &Path, asked: &TaskFlag) -> Result<Self> {
        if !dir.is_dir() {
            bail_unusable!(
                "{} is no directory; expected a trained model's, as `tk train` writes it",
                dir.display()
            );
        }
        let config = if is_bare(dir) { config_of_adapter(dir)? } else { ModelConfig::read(dir)? };
        let task = match &asked.task {
            Some(name) => Task::open_as(name, dir, &config)?,
            None => Task::open(dir, &config)?,
        };
        let longest = [model_max_length(dir)?, task.max_length()].into_iter().flatten();
        let max_length = longest.fold(config.max_positions(), usize::min);
        let mut tokenizer = Tokenizer::open(&tokenizer_folder(dir)?)?;
        tokenizer.check_fits(config.vocab_size(), config.token_types())?;
        let weights = Weights::open(dir, config.family.names())?;
        let task_was_asked = asked.task.is_some();
        if task_was_asked {
            task.trained_params(&config.family, &weights)?;
        }
        Ok(Self { dir: dir.to_owned(), config, task, task_was_asked, tokenizer, weights, max_length })
    }
}

impl Saved {
    /// The asked length, or the model's own.
    ///
    /// # Errors
    /// More than the model takes, or fewer than a text needs.
    pub fn checked_max_length(&self, asked: Option<usize>) -> Result<usize> {
        let most = self.config.max_positions();
        match asked {
            Some(length) if length > most => {
                bail_unusable!("--max-length {length} is above the {most} tokens that the model takes")
            }
            Some(length) if length < SHORTEST => {
                bail_unusable!("--max-length is {length}, expected at least {SHORTEST} (as in training)")
            }
            asked => Ok(asked.unwrap_or(self.max_length)),
        }
    }

    /// Records to measure on. How many are cut to the longest length is said.
    ///
    /// # Errors
    /// Unusable: a flag that says nothing to the task, or records that can't be used.
    pub fn examples(
        &self,
        files: &Files,
        records: &RecordFlags,
        max_length: usize,
        say: Say,
    ) -> Result<Vec<Example>> {
        records.check(self.task.name(), &files.all())?;
        let (training, tokenizer) = (&TrainingFlags::default(), &self.tokenizer);
        let examples = self.task.examples(files, &Encoder { records, training, tokenizer, max_length })?;
        let cut = cut(&examples);
        if cut > 0 {
            let all = examples.len();
            say.warn(format!(
                "{cut} of {all} examples are longer than --max-length {max_length} and are cut"
            ));
        }
        Ok(examples)
    }
}

/// What the model of an adapter's folder without a `config.json` is: its base's configuration, for PEFT's `task_type`, with as
/// many labels as the trained head has rows.
///
/// # Errors
/// Unusable: a task that tk has not, or as of reading base and adapter.
fn config_of_adapter(dir: &Path) -> Result<ModelConfig> {
    let mut config = ModelConfig::read(&adapter::base_of(dir)?)?;
    let read = Adapter::open(dir, config.family.names())?;
    let Some(asked) = read.config.task_type.as_deref() else { return Ok(config) };
    let head = Task::HEADS.iter().find(|head| head.peft_task() == Some(asked));
    let class = head.and_then(|head| config.family.class(*head)).ok_or_else(|| {
        unusable!(
            "{}: task_type is {asked}, which is no task of a {} in tk",
            dir.join(adapter::CONFIG).display(),
            config.family.model_type()
        )
    })?;
    config.raw.insert("architectures".to_owned(), json!([class]));
    let labels = read.rows();
    let known = config.raw.get("id2label").and_then(Value::as_object).map(serde_json::Map::len);
    if let Some(labels) = labels.filter(|labels| Some(*labels) != known) {
        for key in ["id2label", "label2id"] {
            config.raw.remove(key);
        }
        config.raw.insert("num_labels".to_owned(), json!(labels));
    }
    Ok(config)
}

/// How many examples something was cut off.
pub fn cut(examples: &[Example]) -> usize {
    examples.iter().filter(|example| example.is_cut()).count()
}

/// Whether a folder is one of PEFT's own, which have the adapter alone.
fn is_bare(dir: &Path) -> bool {
    adapter::is_in(dir) && !dir.join("config.json").is_file()
}

/// Where a model's tokenizer stands: in its directory, or with the base, of a folder of PEFT's that has none.
///
/// # Errors
/// The base can't be found.
pub fn tokenizer_folder(dir: &Path) -> Result<PathBuf> {
    if is_bare(dir) && !Tokenizer::is_in(dir) { adapter::base_of(dir) } else { Ok(dir.to_owned()) }
}

/// Writes the length that a model was trained with into its `tokenizer_config.json`, so that transformers and tk cut
/// texts where training did; and, where the tokenizer has none, the token that pads, so that transformers can batch.
pub fn finish_tokenizer_config(dir: &Path, max_length: usize, pad_token: Option<&str>) -> Result<()> {
    let path = dir.join("tokenizer_config.json");
    let mut config = settings(&path)?;
    config.insert("model_max_length".to_owned(), max_length.into());
    if let Some(token) = pad_token.filter(|_| config.get("pad_token").is_none_or(Value::is_null)) {
        config.insert("pad_token".to_owned(), token.into());
    }
    files::write(&path, serde_json::to_string_pretty(&config)? + "\n")
}

/// `model_max_length` of `tokenizer_config.json` (older files: `max_len`), which transformers truncates at, where it is
/// a real limit.
///
/// # Errors
/// Unusable: it is no number, or too short for any text.
fn model_max_length(dir: &Path) -> Result<Option<usize>> {
    let config = settings(&dir.join("tokenizer_config.json"))?;
    let named = ["model_max_length", "max_len"].into_iter().find_map(|key| Some((key, config.get(key)?)));
    let Some((key, value)) = named.filter(|(_, value)| !value.is_null()) else { return Ok(None) };
    match value.as_f64() {
        Some(length) if length >= SHORTEST as f64 && length.fract() == 0.0 => {
            // transformers writes 10³⁰ for "none"
            Ok(Some(length).filter(|length| *length < u32::MAX as f64).map(|length| length as usize))
        }
        _ => bail_unusable!(
            "{}: {key} is {value}, expected a whole number of tokens, at least {SHORTEST}; without the entry the \
             model's own limit holds",
            dir.join("tokenizer_config.json").display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model's directory whose tokenizer_config.json has the given entries changed.
    fn with(changes: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bert-single");
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(model.join(name), dir.path().join(name)).unwrap();
        }
        let path = dir.path().join("tokenizer_config.json");
        let mut config = settings(&path).unwrap();
        for (key, value) in changes {
            config.insert((*key).to_owned(), value.clone());
        }
        config.retain(|_, value| value != "absent");
        std::fs::write(path, Value::Object(config).to_string()).unwrap();
        dir
    }

    #[test]
    fn a_length_that_is_no_length_is_refused_with_its_file() {
        for value in
            [json!(0), json!(1), json!(2), json!(-5), json!(7.5), json!("8"), json!([8]), json!(true)]
        {
            let dir = with(&[("model_max_length", value.clone())]);
            let error = Saved::open(dir.path()).err().unwrap();
            assert_eq!(crate::error::exit_code(&error), 2);
            assert_eq!(
                error.to_string(),
                format!(
                    "{}: model_max_length is {value}, expected a whole number of tokens, at least 3; without the \
                     entry the model's own limit holds",
                    dir.path().join("tokenizer_config.json").display()
                )
            );
        }
    }

    #[test]
    fn the_length_is_the_files_where_it_is_below_the_position_tables() {
        let length = |changes: &[(&str, Value)]| Saved::open(with(changes).path()).unwrap().max_length;
        assert_eq!(length(&[("model_max_length", json!(8))]), 8);
        assert_eq!(length(&[("model_max_length", json!(8.0))]), 8);
        for none in [json!(1e30), json!(u64::MAX), json!(null), json!("absent")] {
            assert_eq!(length(&[("model_max_length", none)]), 64);
        }
        assert_eq!(length(&[("model_max_length", json!("absent")), ("max_len", json!(9))]), 9);
    }

    #[test]
    fn an_asked_length_is_one_that_training_could_have() {
        let saved = Saved::open(with(&[]).path()).unwrap();
        assert_eq!(saved.checked_max_length(Some(3)).unwrap(), 3);
        for length in [0, 1, 2] {
            let error = saved.checked_max_length(Some(length)).unwrap_err().to_string();
            assert_eq!(error, format!("--max-length is {length}, expected at least 3 (as in training)"));
        }
        let most = saved.config.max_positions();
        assert!(saved.checked_max_length(Some(most + 1)).is_err());
    }

    #[test]
    fn a_padding_token_that_is_null_is_given_one() {
        let dir = with(&[("pad_token", json!(null))]);
        finish_tokenizer_config(dir.path(), 16, Some("[SEP]")).unwrap();
        let config = settings(&dir.path().join("tokenizer_config.json")).unwrap();
        assert_eq!((&config["pad_token"], &config["model_max_length"]), (&json!("[SEP]"), &json!(16)));
        finish_tokenizer_config(dir.path(), 16, Some("[CLS]")).unwrap();
        assert_eq!(settings(&dir.path().join("tokenizer_config.json")).unwrap(), config);
    }
}
