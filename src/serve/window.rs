//! Records in windows of a fixed number, tokenized: the unit that is answered and resumed at.

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::data::records::{BadRow, Columns, Row, Rows};
use crate::{Result, unusable};

/// Consecutive records.
pub struct Window<T> {
    pub entries: Vec<Entry<T>>,
}

/// One record: what to answer under, and what was made of it or what is wrong with it.
pub struct Entry<T> {
    pub key: Key,
    pub item: Result<T, String>,
}

/// Makes of a record what is computed on.
pub type Make<T> = Box<dyn Fn(&Row) -> Result<T, BadRow> + Send + Sync>;

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
pub struct Windows<T> {
    pub rows: Rows,
    /// The source's name, for errors.
    pub source: String,
    /// Where the id stands.
    pub columns: Columns,
    pub make: Make<T>,
    /// Records of a window.
    pub size: usize,
    /// Whether the first record that can't be used ends the reading.
    pub strict: bool,
    /// How many records were read.
    pub read: usize,
}

impl<T: Send> Windows<T> {
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
    fn window(&mut self) -> Result<Option<Window<T>>> {
        let mut rows = Vec::with_capacity(self.size);
        while rows.len() < self.size {
            let Some(row) = self.rows.next() else { break };
            let mut row = row?;
            if let (true, Err(bad)) = (self.strict, &row) {
                return Err(self.refused(bad));
            }
            let id = row.as_mut().ok().and_then(|row| row.take(&self.columns, "id"));
            rows.push((id.map_or(Key::Index(self.read), Key::Id), row));
            self.read += 1;
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let made: Vec<(Key, Result<T, BadRow>)> =
            rows.into_par_iter().map(|(key, row)| (key, row.and_then(|row| (self.make)(&row)))).collect();
        let entry = |(key, item): (Key, Result<T, BadRow>)| match item {
            Err(bad) if self.strict => Err(self.refused(&bad)),
            item => Ok(Entry { key, item: item.map_err(|bad| bad.to_string()) }),
        };
        Ok(Some(Window { entries: made.into_iter().map(entry).collect::<Result<_>>()? }))
    }

    fn refused(&self, bad: &BadRow) -> anyhow::Error {
        unusable!("{}:{}: {}", self.source, bad.line, bad.message)
    }
}

/// An error is that the source can't be read on, or that a record can't be used and that is strict; nothing behind
/// it counts.
impl<T: Send> Iterator for Windows<T> {
    type Item = Result<Window<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.window().transpose()
    }
}
