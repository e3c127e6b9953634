//! Questions with their texts and right answers: what is in a record, and the windows that are made of it.

use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use super::{QuestionAnswering, QuestionFlags, Wanted};
use crate::Result;
use crate::data::cache::Key;
use crate::data::records::{self, BadRow, Columns, Files, Place, Row};
use crate::data::tokens::{PairWindow, SecondText, Tokenizer};
use crate::task::flags::refuse_records;
use crate::task::{Example, Objective};

/// A record to learn from, or to measure on.
pub(super) struct Record {
    pub at: Place,
    pub question: String,
    pub context: Arc<str>,
    /// The right answers; none, where the question can't be answered.
    pub answers: Vec<String>,
    /// The bytes of the first answer in the context.
    pub place: Option<Range<usize>>,
}

/// Reads every question.
///
/// # Errors
/// Unusable: the file can't be read, or has records that can't be used; the first of them are listed with file and line.
pub(super) fn read(files: &Files, flags: &crate::task::RecordFlags) -> Result<Vec<Record>> {
    let (how, columns) = QuestionAnswering::reading(flags);
    let mut before: Arc<str> = "".into();
    records::read_examples(files, &how, |row| {
        let question = row.text(&columns, "question")?.to_owned();
        let context = row.text(&columns, "context")?;
        if *before != *context {
            before = context.into(); // questions of one paragraph share it
        }
        let (answers, starts) = right_answers(&row, &columns)?;
        let place = match (answers.first(), starts.first()) {
            (Some(answer), Some(&start)) => Some(placed(&row, context, answer, start)?),
            _ => None,
        };
        Ok(Record { at: row.place(), question, context: before.clone(), answers, place })
    })
}

/// The texts of the right answers, and where each begins, in characters, where that is said: of
/// `{"text": […], "answer_start": […]}`, or of a list of such objects.
fn right_answers(row: &Row, columns: &Columns) -> Result<(Vec<String>, Vec<usize>), BadRow> {
    let field = columns.of("answers");
    let value = row.value(columns, "answers")?;
    let wrong = |what: &str| {
        row.bad(format!(
            "field {field:?} {what}; {{\"text\": [\"…\"], \"answer_start\": [0]}} was expected, or a list of such objects"
        ))
    };
    let one = |value: &Value| match value {
        Value::Array(list) => list.clone(),
        value => vec![value.clone()],
    };
    let (texts, starts): (Vec<Value>, Option<Vec<Value>>) = match value {
        Value::Object(answers) => (
            answers.get("text").map(one).ok_or_else(|| wrong("has no \"text\""))?,
            answers.get("answer_start").map(one),
        ),
        Value::Array(list) => {
            let column = |name: &str| list.iter().map(|answer| answer.get(name).cloned()).collect();
            let texts: Option<Vec<Value>> = column("text");
            (texts.ok_or_else(|| wrong("has an answer without \"text\""))?, column("answer_start"))
        }
        _ => return Err(wrong("is neither")),
    };
    let impossible = row.fields.get("is_impossible").and_then(Value::as_bool) == Some(true);
    if impossible {
        return Ok((Vec::new(), Vec::new()));
    }
    let text = |value: &Value| value.as_str().map(str::to_owned).filter(|text| !text.trim().is_empty());
    let texts = texts
        .iter()
        .map(text)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| wrong("has an answer that is no text"))?;
    let start = |value: &Value| value.as_u64().and_then(|start| usize::try_from(start).ok());
    let starts = match starts {
        None => Vec::new(),
        Some(starts) => starts
            .iter()
            .map(start)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| wrong("has an answer_start that is no place"))?,
    };
    if !starts.is_empty() && starts.len() != texts.len() {
        return Err(wrong(&format!("has {} texts and {} places", texts.len(), starts.len())));
    }
    Ok((texts, starts))
}

/// The bytes of an answer that begins at a character of the context.
fn placed(row: &Row, context: &str, answer: &str, start: usize) -> Result<Range<usize>, BadRow> {
    let at = context.char_indices().map(|(at, _)| at).chain([context.len()]).nth(start);
    match at.filter(|&at| context[at..].starts_with(answer)) {
        Some(at) => Ok(at..at + answer.len()),
        None => {
            let stands: String = context.chars().skip(start).take(answer.chars().count()).collect();
            Err(row.bad(format!(
                "the answer {answer:?} does not stand at character {start} of the context, where {stands:?} stands"
            )))
        }
    }
}

/// Questions as examples, one for each window of their texts.
///
/// # Errors
/// Unusable: questions that leave no room for a text; the first of them are listed with file and line.
pub(super) fn examples_of(
    records: &[Record],
    files: &Files,
    tokenizer: &Tokenizer,
    max_length: usize,
    flags: &QuestionFlags,
) -> Result<Vec<Example<Wanted>>> {
    let stride = flags.stride(max_length);
    let (mut examples, mut wrong) = (Vec::new(), Vec::new());
    let windows =
        |record: &Record| tokenizer.pair_windows(&record.question, &record.context, max_length, stride);
    let of = format!("{} {max_length} {stride}", QuestionAnswering::NAME);
    let own = |record: &Record, key: &mut Key| {
        key.add(Some(&record.question));
        key.add(Some(&record.context));
    };
    tokenizer.in_order(&of, records, own, windows, |question, windows| {
        let record = &records[question];
        let windows = match windows {
            Ok(windows) => windows,
            Err(error) => {
                wrong.push((record.at, format!("{error:#}")));
                return Ok(());
            }
        };
        let right: Arc<[String]> = record.answers.clone().into();
        for window in windows {
            let tokens =
                record.place.as_ref().and_then(|place| wanted_tokens(&window, place)).unwrap_or((0, 0));
            let PairWindow { encoding, second: text } = window;
            let (context, right) = (record.context.clone(), right.clone());
            let target = Wanted { question, tokens, context, right, text, limits: flags.limits() };
            examples.push(Example { encoding, target });
        }
        Ok(())
    })?;
    refuse_records(files, "questions that can't be used", wrong)?;
    Ok(examples)
}

/// The tokens of a window that an answer begins and ends with, where all of it stands there: the last one that begins at
/// or before it, and the first that ends at or behind its end, as transformers' `run_qa.py` finds them.
fn wanted_tokens(window: &PairWindow, answer: &Range<usize>) -> Option<(usize, usize)> {
    let SecondText { tokens, spans, .. } = &window.second;
    let inside = spans.first()?.start <= answer.start && answer.end <= spans.last()?.end;
    let first = spans.iter().rposition(|span| span.start <= answer.start).filter(|_| inside)?;
    let last = spans.iter().position(|span| span.end >= answer.end)?;
    Some((tokens.start + first, tokens.start + last.max(first)))
}
