//! A trained model's directory: configuration, task, tokenizer and weights, opened and held against each other.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::Weights;
use crate::data::tokens::Tokenizer;
use crate::model::ModelConfig;
use crate::task::Task;
use crate::{Result, bail_unusable, files, unusable};

/// A model that can be evaluated, exported and served.
pub struct Saved {
    pub dir: PathBuf,
    pub config: ModelConfig,
    pub task: Task,
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
        if !dir.is_dir() {
            bail_unusable!(
                "{} is no directory; expected a trained model's, as `tk train` writes it",
                dir.display()
            );
        }
        let config = ModelConfig::read(dir)?;
        let task = Task::from_config(&config)
            .map_err(|e| e.context(dir.join("config.json").display().to_string()))?;
        let max_length = config.max_positions().min(model_max_length(dir).unwrap_or(usize::MAX));
        let tokenizer = Tokenizer::open(dir)?;
        tokenizer.check_fits(config.vocab_size(), config.token_types())?;
        let weights = Weights::open(dir)?;
        Ok(Self { dir: dir.to_owned(), config, task, tokenizer, weights, max_length })
    }
}

impl Saved {
    /// The asked length, or the model's own.
    ///
    /// # Errors
    /// More than the position table has rows.
    pub fn checked_max_length(&self, asked: Option<usize>) -> Result<usize> {
        let rows = self.config.max_positions();
        match asked {
            Some(length) if length > rows => {
                bail_unusable!("--max-length {length} is above the {rows} rows of the model's position table")
            }
            asked => Ok(asked.unwrap_or(self.max_length)),
        }
    }
}

/// Writes the length that a model was trained with into its `tokenizer_config.json`, so that transformers and tk cut
/// texts where training did; and, where the tokenizer has none, the token that pads, so that transformers can batch.
pub fn finish_tokenizer_config(dir: &Path, max_length: usize, pad_token: Option<&str>) -> Result<()> {
    let path = dir.join("tokenizer_config.json");
    let mut config: Map<String, Value> = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))?,
        Err(_) => Map::new(),
    };
    config.insert("model_max_length".to_owned(), max_length.into());
    if let Some(token) = pad_token {
        config.entry("pad_token").or_insert_with(|| token.into());
    }
    files::write(&path, serde_json::to_string_pretty(&config)? + "\n")
}

/// `model_max_length` of `tokenizer_config.json`, which transformers truncates at, where it is a real limit.
fn model_max_length(dir: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(dir.join("tokenizer_config.json")).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    // transformers writes 10³⁰ for "none"
    config.get("model_max_length")?.as_u64().map(|n| n as usize)
}
