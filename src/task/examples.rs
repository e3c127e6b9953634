//! Labelled records → encoded examples.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Example, Problem, Task, TextClassification};
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{self, BadRow, Columns, Row};
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
}

impl TextColumns {
    /// The mapping from field to column.
    pub fn columns(&self) -> Columns {
        Columns::default()
            .with("text", self.text_column.clone())
            .with("text_pair", self.text_pair_column.clone())
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
    records::read_examples(path, None, |row| {
        let (text, pair) = TextColumns::read(&columns, &row)?;
        Ok(Labelled { line: row.line, text, pair, label: row.value(&columns, "label")?.clone() })
    })
}

/// Finds the task in the labels of the training data.
pub fn find_task(records: &[Labelled], problem: Option<Problem>, config: &ModelConfig) -> Result<Task> {
    let labels: Vec<&Value> = records.iter().map(|record| &record.label).collect();
    Ok(Task::TextClassification(TextClassification::from_labels(&labels, problem, config)?))
}

/// Encodes records and reads their labels.
///
/// # Errors
/// Unusable: labels that the task does not have; the first of them are listed with file and line.
pub fn encode(
    records: &[Labelled],
    path: &Path,
    task: &Task,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Example>> {
    let Task::TextClassification(classification) = task;
    let (mut targets, mut wrong) = (Vec::with_capacity(records.len()), Vec::new());
    for record in records {
        match classification.target(&record.label) {
            Ok(target) => targets.push(target),
            Err(error) => wrong.push(format!("  {}:{}: {error}", path.display(), record.line)),
        }
    }
    if !wrong.is_empty() {
        let more = wrong.len().saturating_sub(10);
        wrong.truncate(10);
        if more > 0 {
            wrong.push(format!("  and {more} more"));
        }
        crate::bail_unusable!("{}: labels that can't be used:\n{}", path.display(), wrong.join("\n"));
    }
    let texts: Vec<(&str, Option<&str>)> =
        records.iter().map(|record| (record.text.as_str(), record.pair.as_deref())).collect();
    let encodings: Vec<Encoding> = tokenizer.encode_all(&texts, max_length)?;
    Ok(encodings.into_iter().zip(targets).map(|(encoding, target)| Example { encoding, target }).collect())
}
