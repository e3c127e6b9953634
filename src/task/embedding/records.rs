//! Records of related texts: their columns, and what is in them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Embedding;
use crate::data::records::{self, Files, Place, describe};
use crate::task::Objective;
use crate::{Result, bail_unusable};

/// Which prompts stand in front of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct PromptFlags {
    /// For embedding, the prompt in front of texts, of those that config_sentence_transformers.json names: of text, of
    /// anchors and of both of a scored pair [default: its default_prompt_name].
    #[arg(long, value_name = "NAME", help_heading = "Prompts")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_name: Option<String>,
    /// For embedding, the same in front of text_pair, of positives and of negatives.
    #[arg(long, value_name = "NAME", help_heading = "Prompts")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document_prompt_name: Option<String>,
}

/// Flags of related texts.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct RecordFlags {
    /// For embedding, the column of the text that others belong to [default: anchor].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor_column: Option<String>,
    /// The column of the text that belongs to the anchor [default: positive].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positive_column: Option<String>,
    /// The column of one that does not, which may be absent [default: negative].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_column: Option<String>,
    /// The column of the first text of a scored pair [default: sentence1].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence1_column: Option<String>,
    /// The column of the second one [default: sentence2].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence2_column: Option<String>,
    /// The column of how like they are [default: score].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_column: Option<String>,
    /// The highest score, by which all are divided: 5 for STS-B. --embedding-loss cosine needs scores from -1 to 1.
    #[arg(long, value_name = "X", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_score: Option<f32>,
    #[command(flatten)]
    #[serde(flatten)]
    pub prompts: PromptFlags,
}

/// What records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Two texts and how like they are.
    Scored,
    /// A text, one that belongs to it, and maybe one that does not.
    Ranked,
}

/// A record before it is tokenized: its place, its texts and the score.
pub(super) struct Record {
    pub place: Place,
    pub texts: Vec<String>,
    pub score: Option<f32>,
}

impl Record {
    /// What it is.
    pub fn kind(&self) -> Kind {
        if self.score.is_some() { Kind::Scored } else { Kind::Ranked }
    }
}

/// Reads every record.
///
/// # Errors
/// Unusable: the file can't be read, or has records that can't be used; the first of them are listed with file and line.
pub(super) fn read(files: &Files, flags: &crate::task::RecordFlags) -> Result<Vec<Record>> {
    let own = &flags.embedding;
    let most = own.max_score.unwrap_or(1.0);
    if !(most > 0.0 && most.is_finite()) {
        bail_unusable!("--max-score {most}: expected a number above 0");
    }
    let (how, columns) = Embedding::reading(flags);
    records::read_examples(files, &how, |row| {
        let text = |name| row.text(&columns, name).map(str::to_owned);
        let is_scored =
            ["sentence1", "sentence2", "score"].iter().any(|name| row.get(&columns, name).is_some());
        if is_scored && row.get(&columns, "anchor").is_none() {
            let texts = vec![text("sentence1")?, text("sentence2")?];
            let value = row.value(&columns, "score")?;
            let number = match value {
                Value::Number(number) => number.as_f64(),
                Value::String(text) => text.trim().parse().ok(),
                _ => None,
            };
            let score =
                number.map(|number| (number / f64::from(most)) as f32).filter(|score| score.is_finite());
            let score = score.ok_or_else(|| {
                let column = columns.of("score");
                row.bad(format!("field {column:?} is {}; a number was expected", describe(value)))
            })?;
            return Ok(Record { place: row.place(), texts, score: Some(score) });
        }
        let mut texts = vec![text("anchor")?, text("positive")?];
        texts.extend(row.optional_text(&columns, "negative")?.map(str::to_owned));
        Ok(Record { place: row.place(), texts, score: None })
    })
}
