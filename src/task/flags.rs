//! What several tasks have in common on the command line: how records stand in files, and the columns of texts. Flags of
//! its own a task declares in its file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::weighting::ClassWeights;
use crate::data::offsets::OffsetUnit;
use crate::data::records::{BadRow, Columns, Files, Format, How, Place, Row, TextEncoding, TextUnit};
use crate::{Result, bail_unusable};

/// How records stand in files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct Reading {
    /// The records' format, where a file's name does not tell: jsonl, json, csv, tsv, parquet, txt or conll [default for
    /// standard input: jsonl].
    #[arg(long, value_name = "FORMAT", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The encoding of the records' text: utf-16, windows-1252, shift_jis … [default: utf-8].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<TextEncoding>,
}

impl Reading {
    /// How files are read.
    pub fn how(&self) -> How {
        How { format: self.format, encoding: self.encoding, ..How::default() }
    }

    /// Whether a file is read as this format.
    pub fn is(&self, format: Format, path: &Path) -> bool {
        self.format.or(Format::of(path).ok()) == Some(format)
    }
}

/// The columns that texts stand in.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct TextColumns {
    /// The column of the text [default: text].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_column: Option<String>,
    /// The column of the second text of a pair [default: text_pair].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_pair_column: Option<String>,
}

impl TextColumns {
    /// The mapping from field to column.
    pub fn columns(&self) -> Columns {
        Columns::default()
            .with("text", self.text_column.clone())
            .with("text_pair", self.text_pair_column.clone())
    }

    /// A row's texts.
    ///
    /// # Errors
    /// There is no text, or one is no string.
    pub fn read(columns: &Columns, row: &Row) -> Result<(String, Option<String>), BadRow> {
        let pair = row.optional_text(columns, "text_pair")?.map(str::to_owned);
        Ok((row.text(columns, "text")?.to_owned(), pair))
    }
}

/// Flags of records that mean something to several tasks; [`super::Objective::RECORD_FLAGS`] says to which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct SharedRecordFlags {
    /// For causal-lm, masked-lm and next-sentence, what one text of a .txt file is: a line, what stands between blank
    /// lines, or the whole file [default: line; for next-sentence: document].
    #[arg(long, value_enum, value_name = "UNIT", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_unit: Option<TextUnit>,
}

impl SharedRecordFlags {
    /// Refuses flags that say nothing of any of these files.
    ///
    /// # Errors
    /// Unusable: names the flag.
    pub fn check_files(&self, reading: &Reading, files: &[&Path]) -> Result<()> {
        if self.text_unit.is_some() && !files.iter().any(|path| reading.is(Format::Txt, path)) {
            bail_unusable!("--text-unit is for .txt files; here is none");
        }
        Ok(())
    }
}

/// Flags of training that mean something to several tasks; [`super::Objective::TRAINING_FLAGS`] says to which.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct SharedTrainingFlags {
    /// For masked-lm, the share of a text's tokens that are to be found; of these 80 % are masked, 10 % are another
    /// token, 10 % stay. Evaluations take 0.15 [default: 0.15].
    #[arg(long, value_name = "P", alias = "mlm-probability", help_heading = "Masked words")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_probability: Option<f64>,
    /// For masked-lm, all tokens of a word are to be found, or none. Evaluations take single tokens.
    #[arg(long, help_heading = "Masked words")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub whole_words: bool,
    /// For text-classification and token-classification, how much each label counts in the loss: balanced (n / (labels ·
    /// count), as scikit-learn has it; where a text may have several labels, those without it over those with it), or a
    /// .json or .toml file of labels and weights, in which a label that is not there weighs 1.
    #[arg(long, value_name = "balanced|FILE", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
    /// For text-classification and token-classification, the focal loss: what is known with probability p already
    /// counts (1 − p)^G; 2 is usual.
    #[arg(long, value_name = "G", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub focal_gamma: Option<f64>,
    /// For text-classification and token-classification, a trained model of the same labels to learn from: what it says of
    /// the training data, by its own tokenizer, is learnt beside the labels. It is asked once, before the first step.
    #[arg(long, value_name = "DIR", help_heading = "Distillation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
    /// What the logits of both models are divided by, so that what is unlikely counts, too [default: 2].
    #[arg(long, value_name = "T", help_heading = "Distillation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation_temperature: Option<f64>,
    /// The teacher's share of the loss; the labels have the rest. At 1 the labels say nothing [default: 0.5].
    #[arg(long, value_name = "A", help_heading = "Distillation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation_weight: Option<f64>,
}

/// Those of them that the tasks take which give labels.
pub(super) const LABEL_FLAGS: &[&str] =
    &["--class-weights", "--focal-gamma", "--teacher", "--distillation-temperature", "--distillation-weight"];

/// Flags of answers that mean something to several tasks; [`super::Objective::ANSWER_FLAGS`] says to which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct SharedFlags {
    /// For token-classification and question-answering, what offsets count [default: char].
    #[arg(long, value_enum, value_name = "UNIT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset_unit: Option<OffsetUnit>,
    /// For causal-lm, draw from the K most likely tokens; for question-answering, list the K best answers; for
    /// masked-lm, the K most likely tokens of each mask [default of masked-lm: 5].
    #[arg(long, value_name = "K")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
}

/// The flags that were given, in their long form and in alphabetical order.
///
/// # Errors
/// They are no fields that can be written.
pub(super) fn given(flags: &impl Serialize) -> Result<Vec<String>> {
    let Value::Object(fields) = serde_json::to_value(flags)? else { anyhow::bail!("flags are an object") };
    let is_set = |value: &Value| !matches!(value, Value::Null | Value::Bool(false));
    let set = fields.iter().filter(|(_, value)| is_set(value));
    Ok(set.map(|(name, _)| format!("--{}", name.replace('_', "-"))).collect())
}

/// Refuses flags of one task where another one is at work.
///
/// # Errors
/// Unusable: names the flag and its task.
pub(super) fn refuse_given(flags: &impl Serialize, of: &str, task: &str) -> Result<()> {
    match given(flags)?.first() {
        Some(flag) => bail_unusable!("{flag} is for {of}, and this is {task}"),
        None => Ok(()),
    }
}

/// Refuses columns of texts that a task does not read.
///
/// # Errors
/// Unusable: names the flag.
pub(super) fn refuse_texts(texts: &TextColumns, read: &[&str], task: &str) -> Result<()> {
    let unread =
        |flag: &&String| !read.iter().any(|name| **flag == format!("--{}-column", name.replace('_', "-")));
    match given(texts)?.iter().find(unread) {
        Some(flag) => bail_unusable!("{flag} says nothing to {task}"),
        None => Ok(()),
    }
}

/// Refuses flags that several tasks share where another one is at work. `takers` are the tasks, and what each takes.
///
/// # Errors
/// Unusable: names the flag and its tasks.
pub(super) fn refuse_shared(flags: &impl Serialize, takers: &[(&str, &[&str])], task: &str) -> Result<()> {
    for flag in given(flags)? {
        let of = takers.iter().filter(|(_, taken)| taken.contains(&flag.as_str())).map(|(name, _)| *name);
        let of: Vec<&str> = of.collect();
        if !of.contains(&task) {
            let (last, others) = of.split_last().map_or(("", &[][..]), |(last, others)| (*last, others));
            let others = others.join(", ");
            let and = if others.is_empty() { "" } else { " and " };
            bail_unusable!("{flag} is for {others}{and}{last}, and this is {task}");
        }
    }
    Ok(())
}

/// Lists the first records that can't be used, if there are any.
///
/// # Errors
/// Unusable: there are some.
pub(crate) fn refuse_records(
    files: &Files,
    what: &str,
    wrong: impl IntoIterator<Item = (Place, String)>,
) -> Result<()> {
    let mut lines: Vec<String> =
        wrong.into_iter().map(|(place, why)| format!("  {}: {why}", files.at(place))).collect();
    if lines.is_empty() {
        return Ok(());
    }
    let more = lines.len().saturating_sub(10);
    lines.truncate(10);
    if more > 0 {
        lines.push(format!("  and {more} more"));
    }
    bail_unusable!("{files}: {what}:\n{}", lines.join("\n"));
}
