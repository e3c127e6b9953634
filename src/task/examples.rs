//! Labelled records → encoded examples.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::causal_lm::{Cutting, Document};
use super::token_classification::{self, TagFields};
use super::{CausalLm, Example, Problem, Task, TextClassification};
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{self, BadRow, Columns, Format, How, Row, TagColumn, TextEncoding, TextUnit};
use crate::data::tokens::Tokenizer;
use crate::model::ModelConfig;

/// The columns that the texts stand in.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
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
    /// The encoding of the records' text: utf-16, windows-1252, shift_jis … [default: utf-8].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<TextEncoding>,
}

impl TextColumns {
    /// The mapping from field to column.
    pub fn columns(&self) -> Columns {
        Columns::default()
            .with("text", self.text_column.clone())
            .with("text_pair", self.text_pair_column.clone())
    }

    /// How files are read.
    pub fn how(&self) -> How {
        How { encoding: self.encoding, ..How::default() }
    }

    /// A row's texts.
    pub fn read(columns: &Columns, row: &Row) -> Result<(String, Option<String>), BadRow> {
        let pair = row.optional_text(columns, "text_pair")?.map(str::to_owned);
        Ok((row.text(columns, "text")?.to_owned(), pair))
    }
}

/// The columns of labelled records.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Fields {
    #[command(flatten)]
    #[serde(flatten)]
    pub texts: TextColumns,
    /// The column of the label [default: label].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_column: Option<String>,
    /// The column of what stands before a completion [default: prompt].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_column: Option<String>,
    /// The column of what is learnt behind a prompt [default: completion].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_column: Option<String>,
    /// For causal-lm, what one text of a .txt file is: a line, what stands between blank lines, or the whole file
    /// [default: line].
    #[arg(long, value_enum, value_name = "UNIT", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_unit: Option<TextUnit>,
    /// For .conll files, the column of the tags, by its number from 1 or its name [default: the last].
    #[arg(long, value_name = "COLUMN", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag_column: Option<TagColumn>,
    #[command(flatten)]
    #[serde(flatten)]
    pub tags: TagFields,
}

impl Fields {
    /// How files are read.
    pub(super) fn how(&self) -> How {
        How { unit: self.text_unit, tag_column: self.tag_column.clone(), ..self.texts.how() }
    }

    /// Refuses `--text-unit` where none of the files is a `.txt`, or the task has no texts of one.
    ///
    /// # Errors
    /// Names the flag.
    pub fn check_unit<'p>(
        &self,
        is_causal_lm: bool,
        mut paths: impl Iterator<Item = &'p Path>,
    ) -> Result<()> {
        if self.text_unit.is_some() && !is_causal_lm {
            crate::bail_unusable!("--text-unit says nothing to this task");
        }
        if self.text_unit.is_some() && !paths.any(|path| Format::of(path).is_ok_and(|of| of == Format::Txt)) {
            crate::bail_unusable!("--text-unit is for .txt files; here is none");
        }
        Ok(())
    }
}

/// A record before the labels are known: its place, its texts, its label.
pub struct Labelled {
    line: usize,
    text: String,
    pair: Option<String>,
    label: Value,
}

/// Reads every record of a file.
///
/// # Errors
/// Unusable: the file can't be read, has no records, or has records without text or label; the first of them are
/// listed with file and line.
pub fn read(path: &Path, fields: &Fields) -> Result<Vec<Labelled>> {
    let columns = fields.texts.columns().with("label", fields.label_column.clone());
    records::read_examples(path, &fields.how(), |row| {
        let (text, pair) = TextColumns::read(&columns, &row)?;
        let label = match (row.value(&columns, "label")?, row.exact.get(columns.of("label"))) {
            (Value::String(name), _) if name.trim().is_empty() => {
                return Err(
                    row.bad(format!("field {:?} is empty: a label was expected", columns.of("label")))
                );
            }
            // an integer beyond 64 bits
            (Value::Number(_), Some(digits)) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.clone().into()
            }
            (label, _) => label.clone(),
        };
        Ok(Labelled { line: row.line, text, pair, label })
    })
}

/// Reads every text, or every prompt with its completion, of a file.
///
/// # Errors
/// As [`read`].
pub fn read_documents(path: &Path, fields: &Fields) -> Result<Vec<Document>> {
    let columns = Columns::default()
        .with("text", fields.texts.text_column.clone())
        .with("prompt", fields.prompt_column.clone())
        .with("completion", fields.completion_column.clone());
    records::read_examples(path, &fields.how(), |row| {
        let prompt = row.optional_text(&columns, "prompt")?.map(str::to_owned);
        let name = if prompt.is_some() { "completion" } else { "text" };
        Ok(Document { line: row.line, prompt, text: row.text(&columns, name)?.to_owned() })
    })
}

/// Reads a file as examples of a task to measure on; `concatenate` joins a language model's documents.
///
/// # Errors
/// As [`read`] and [`encode`].
pub fn load(
    path: &Path,
    fields: &Fields,
    task: &Task,
    tokenizer: &Tokenizer,
    max_length: usize,
    concatenate: bool,
) -> Result<Vec<Example>> {
    match task {
        Task::TextClassification(classification) => {
            encode(&read(path, fields)?, path, classification, tokenizer, max_length)
        }
        Task::TokenClassification(task) => {
            let sentences = token_classification::read(path, fields)?;
            task.examples(&sentences, path, tokenizer, max_length, fields.tags.label_all_pieces)
        }
        Task::CausalLm(lm) => {
            let cutting = if concatenate { Cutting::Concatenated } else { Cutting::Evaluation };
            of_documents(&read_documents(path, fields)?, path, lm, tokenizer, max_length, cutting)
        }
    }
}

/// Documents that were read from `path` as examples.
///
/// # Errors
/// Unusable: none has a token that could be predicted.
pub fn of_documents(
    documents: &[Document],
    path: &Path,
    lm: &CausalLm,
    tokenizer: &Tokenizer,
    max_length: usize,
    cutting: Cutting,
) -> Result<Vec<Example>> {
    let examples = lm.examples(documents, tokenizer, max_length, cutting)?;
    if examples.is_empty() {
        crate::bail_unusable!("{}: no text has a token that could be predicted", path.display());
    }
    Ok(examples)
}

/// Finds the task in the labels of the training data.
///
/// # Errors
/// Unusable: labels of another kind than the others; the first of them are listed with file and line. The base
/// model's own labels are inconsistent.
pub fn find_task(
    records: &[Labelled],
    path: &Path,
    problem: Option<Problem>,
    config: &ModelConfig,
) -> Result<TextClassification> {
    let known = TextClassification::known(config).context("config.json of the model to start from")?;
    let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
    let wrong = TextClassification::unfit(&labels, problem);
    refuse(path, WRONG_LABELS, wrong.into_iter().map(|(i, error)| (records[i].line, error.to_string())))?;
    TextClassification::from_labels(&labels, problem, known).with_context(|| path.display().to_string())
}

const WRONG_LABELS: &str = "labels that can't be used";

/// Encodes records and reads their labels.
///
/// # Errors
/// Unusable: labels that the task does not have; the first of them are listed with file and line.
pub fn encode(
    records: &[Labelled],
    path: &Path,
    classification: &TextClassification,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Example>> {
    let (mut targets, mut wrong) = (Vec::with_capacity(records.len()), Vec::new());
    let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
    for (record, target) in records.iter().zip(classification.targets(&labels)) {
        match target {
            Ok(target) => targets.push(target),
            Err(error) => wrong.push((record.line, error.to_string())),
        }
    }
    refuse(path, WRONG_LABELS, wrong)?;
    let texts: Vec<(&str, Option<&str>)> =
        records.iter().map(|record| (record.text.as_str(), record.pair.as_deref())).collect();
    let encodings: Vec<Encoding> = tokenizer.encode_all(&texts, max_length).map_err(|error| {
        let bad = |(text, pair): &(&str, Option<&str>)| tokenizer.encode(text, *pair, max_length).is_err();
        let first = texts.iter().position(bad).map_or(0, |i| records[i].line);
        error.context(format!("{}:{first}", path.display()))
    })?;
    let empty = records.iter().zip(&encodings).filter(|(_, encoding)| encoding.is_empty());
    refuse(
        path,
        "texts without tokens",
        empty.map(|(record, _)| (record.line, "the text is empty".to_owned())),
    )?;
    Ok(encodings.into_iter().zip(targets).map(|(encoding, target)| Example { encoding, target }).collect())
}

/// Lists the first records that can't be used, if there are any.
pub(super) fn refuse(
    path: &Path,
    what: &str,
    wrong: impl IntoIterator<Item = (usize, String)>,
) -> Result<()> {
    let mut lines: Vec<String> =
        wrong.into_iter().map(|(line, why)| format!("  {}:{line}: {why}", path.display())).collect();
    if lines.is_empty() {
        return Ok(());
    }
    let more = lines.len().saturating_sub(10);
    lines.truncate(10);
    if more > 0 {
        lines.push(format!("  and {more} more"));
    }
    crate::bail_unusable!("{}: {what}:\n{}", path.display(), lines.join("\n"));
}
