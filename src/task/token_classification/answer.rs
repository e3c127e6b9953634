//! Texts, or their words, → entities.

use anyhow::Context;
use serde::Serialize;
use serde_json::{Map, json};

use super::TokenClassification;
use super::decode::{self, Aggregation, Piece};
use super::scheme::OUTSIDE;
use super::windowed::Windowed;
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Row};
use crate::data::tokens::Pieces;
use crate::task::{Answer, Asking, Outputs};

/// How entities are answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct AnswerFlags {
    /// The column of the words, where a text is given as such [default: tokens].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_column: Option<String>,
    /// For token-classification, what entities are made of [default: first].
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Entities")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<Aggregation>,
    /// Answer with the label of every word, too.
    #[arg(long, help_heading = "Entities")]
    pub tags: bool,
}

/// A text whose entities are asked for.
pub struct Question {
    text: String,
    pieces: Pieces,
    /// How many words it has.
    count: usize,
    /// For each piece the window that predicts it, and its row there.
    places: Vec<(usize, usize)>,
}

/// Makes of a record the windows that a model is asked with: of `tokens`, or of a `text`.
///
/// # Errors
/// The record has neither, or what can't be tokenized.
pub(super) fn question(row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
    let Asking { columns, tokenizer, max_length, .. } = asking;
    let bad = |error: anyhow::Error| row.bad(format!("{error:#}"));
    let given = row.fields.contains_key(columns.of("tokens"));
    let (text, pieces, count) = if given {
        let words = row.words(columns, "tokens")?;
        let pieces = tokenizer.pieces_of_words(&words).map_err(bad)?;
        (words.join(" "), pieces, words.len())
    } else {
        let text = row.text(columns, "text")?.to_owned();
        let pieces = tokenizer.pieces(&text).map_err(bad)?;
        let count = pieces.words.last().map_or(0, |word| word + 1);
        (text, pieces, count)
    };
    // pieces that go on with a word stay with it in one window
    let mut groups: Vec<usize> = Vec::with_capacity(pieces.ids.len());
    for at in 0..pieces.ids.len() {
        let before = groups.last().copied();
        groups.push(match before {
            Some(group) if pieces.continues[at] => group,
            Some(group) => group + 1,
            None => 0,
        });
    }
    let windows = Windowed::of(&pieces, |at| groups[at], tokenizer, *max_length).map_err(bad)?;
    let mut places = vec![(0, 0); pieces.ids.len()];
    for (i, window) in windows.iter().enumerate() {
        window.predicts().for_each(|(token, at)| places[at] = (i, token));
    }
    let encodings = windows.into_iter().map(|window| window.encoding).collect();
    Ok((encodings, Question { text, pieces, count, places }))
}

impl TokenClassification {
    /// The entities of a text as a record's fields, from the outputs of its windows.
    ///
    /// # Errors
    /// The outputs are not those of the windows. The inner error is the record's: logits that are not finite.
    pub(super) fn entities(
        &self,
        question: &Question,
        outputs: &[Outputs],
        flags: &crate::task::AnswerFlags,
    ) -> Result<Answer> {
        let own = &flags.token_classification;
        let mut rows = Vec::with_capacity(question.places.len());
        for &(window, token) in &question.places {
            let logits =
                outputs.get(window).and_then(|outputs| outputs.first()).context("a window has no output")?;
            anyhow::ensure!(
                token < logits.nrows() && logits.ncols() == self.labels.len(),
                "the graph gives logits of {:?} for {} labels: export it again",
                logits.dim(),
                self.labels.len()
            );
            rows.push(logits.row(token).to_vec());
        }
        if let Some(row) = rows.iter().find(|row| row.iter().any(|x| !x.is_finite())) {
            return Ok(Err(format!("the model's logits are not finite: {row:?}")));
        }
        let Pieces { spans, words, continues, .. } = &question.pieces;
        let pieces: Vec<Piece> = (0..rows.len())
            .map(|i| Piece {
                span: spans[i].clone(),
                continues: continues[i],
                word: Some(words[i]),
                logits: &rows[i],
            })
            .collect();
        let aggregation = own.aggregation.unwrap_or_default();
        let unit = flags.shared.offset_unit.unwrap_or_default();
        let found = decode::entities(&question.text, &pieces, &self.labels, self.scheme, aggregation, unit);
        let mut answer = Map::from_iter([("entities".to_owned(), json!(found))]);
        if own.tags {
            let tags = decode::tags(&pieces, question.count, aggregation);
            let names = tags.into_iter().map(|id| id.map_or(OUTSIDE, |id| self.labels[id].as_str()));
            answer.insert("tags".to_owned(), names.collect());
        }
        Ok(Ok(answer))
    }
}
