//! Records in windows of a fixed number, tokenized: the unit that is batched, answered and resumed at.

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Columns, Row, Rows};
use crate::data::tokens::Tokenizer;
use crate::{Result, unusable};

/// Consecutive records.
pub struct Window {
    pub entries: Vec<Entry>,
}

/// One record: what to answer under, and its tokens or what is wrong with it.
pub struct Entry {
    pub key: Key,
    pub encoding: Result<Encoding, String>,
}

/// What an answer is found by.
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    /// The record's own `id`.
    Id(Value),
    /// Its place among the records, from 0.
    Index(usize),
}

impl Key {
    /// The start of an answer.
    pub fn record(&self) -> Map<String, Value> {
        let (name, value) = match self {
            Self::Id(id) => ("id", id.clone()),
            Self::Index(index) => ("index", json!(index)),
        };
        Map::from_iter([(name.to_owned(), value)])
    }
}

/// Reads windows from a stream of records.
pub struct Windows {
    pub rows: Rows,
    /// The source's name, for errors.
    pub source: String,
    pub columns: Columns,
    pub tokenizer: Tokenizer,
    pub max_length: usize,
    /// Records of a window.
    pub size: usize,
    /// Whether the first record that can't be used ends the reading.
    pub strict: bool,
    /// How many records were read.
    pub read: usize,
}

impl Windows {
    /// Passes over records that were answered before.
    ///
    /// # Errors
    /// The source ends before that.
    pub fn pass_over(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            match self.rows.next() {
                Some(row) => drop(row?),
                None => {
                    return Err(unusable!(
                        "{} has {} records, {count} were answered before",
                        self.source,
                        self.read
                    ));
                }
            }
            self.read += 1;
        }
        Ok(())
    }

    /// The next window; none at the end.
    fn window(&mut self) -> Result<Option<Window>> {
        let mut texts = Vec::with_capacity(self.size);
        while texts.len() < self.size {
            let Some(row) = self.rows.next() else { break };
            let (id, text) = match row? {
                Ok(mut row) => (row.take(&self.columns, "id"), self.text(&row)),
                Err(bad) => (None, Err(bad)),
            };
            if let (true, Err(bad)) = (self.strict, &text) {
                return Err(unusable!("{}:{}: {}", self.source, bad.line, bad.message));
            }
            let key = id.map_or(Key::Index(self.read), Key::Id);
            texts.push((key, text));
            self.read += 1;
        }
        if texts.is_empty() {
            return Ok(None);
        }
        let encode = |(key, text): (Key, Result<(String, Option<String>), BadRow>)| {
            let encoding = text.map_err(|bad| bad.to_string()).and_then(|(text, pair)| {
                let encoding = self.tokenizer.encode(&text, pair.as_deref(), self.max_length);
                match encoding {
                    Ok(encoding) if encoding.is_empty() => Err("the text has no tokens".to_owned()),
                    encoding => encoding.map_err(|error| format!("{error:#}")),
                }
            });
            Entry { key, encoding }
        };
        let entries = texts.into_par_iter().map(encode).collect();
        Ok(Some(Window { entries }))
    }

    fn text(&self, row: &Row) -> Result<(String, Option<String>), BadRow> {
        let pair = row.optional_text(&self.columns, "text_pair")?;
        Ok((row.text(&self.columns, "text")?.to_owned(), pair.map(str::to_owned)))
    }
}

/// An error is that the source can't be read on, or that a record can't be used and that is strict; nothing behind
/// it counts.
impl Iterator for Windows {
    type Item = Result<Window>;

    fn next(&mut self) -> Option<Self::Item> {
        self.window().transpose()
    }
}
