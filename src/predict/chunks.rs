//! Records in chunks of a fixed number, tokenized: the unit that is answered and resumed at.

use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::Context;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::data::records::{BadRow, Columns, Row, Rows};
use crate::{Result, unusable};

/// Consecutive records.
pub struct Chunk<T> {
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
    /// The same as it is written in JSON, with numbers that a [`Value`] can't hold.
    Written(String),
    /// Its place among the records, from 0.
    Index(usize),
}

impl Key {
    /// An answer as a line of JSON: the key, then the `fields`.
    pub fn answer(&self, fields: &Map<String, Value>) -> String {
        let key = match self {
            Self::Id(id) => format!("\"id\":{id}"),
            Self::Written(id) => format!("\"id\":{id}"),
            Self::Index(index) => format!("\"index\":{index}"),
        };
        let fields = json!(fields).to_string();
        match fields.strip_prefix('{') {
            Some(rest) if rest != "}" => format!("{{{key},{rest}"),
            _ => format!("{{{key}}}"),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "of id {id}"),
            Self::Written(id) => write!(f, "of id {id}"),
            Self::Index(index) => write!(f, "{index}"),
        }
    }
}

/// Reads chunks from a stream of records.
pub struct Chunks<T> {
    pub rows: Rows,
    /// The source's name, for errors.
    pub source: String,
    /// Where the id stands.
    pub columns: Columns,
    pub make: Make<T>,
    /// Records of a chunk.
    pub size: usize,
    /// Whether the first record that can't be used ends the reading.
    pub strict: bool,
    /// How many records were read.
    pub read: usize,
    /// Ends before the record of this place; where there is none, with the source.
    pub until: Option<usize>,
}

impl<T: Send> Chunks<T> {
    /// Passes over records that are answered elsewhere, or were before.
    ///
    /// # Errors
    /// The source ends before that.
    pub fn pass_over(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            match self.rows.pass_over() {
                Some(passed) => passed?,
                None => return Err(self.ended(count)),
            }
            self.read += 1;
        }
        Ok(())
    }

    fn ended(&self, expected: usize) -> anyhow::Error {
        let (source, read) = (&self.source, self.read);
        unusable!("{source} has {read} records, and had {expected} before: it was changed; start over")
    }

    /// The next chunk; none at the end.
    fn chunk(&mut self) -> Result<Option<Chunk<T>>> {
        let mut rows = Vec::new();
        while rows.len() < self.size && self.until != Some(self.read) {
            let Some(row) = self.rows.next() else {
                match self.until {
                    Some(until) => return Err(self.ended(until)),
                    None => break,
                }
            };
            let mut row = row?;
            let mut key = None;
            if let Ok(record) = &mut row {
                match record.take_any(&self.columns, "id") {
                    Ok(id) => {
                        let written = record.exact.get(self.columns.of("id")).cloned();
                        key = id.map(|id| written.map_or(Key::Id(id), Key::Written));
                    }
                    Err(bad) => row = Err(bad),
                }
            }
            if let (true, Err(bad)) = (self.strict, &row) {
                return Err(self.refused(bad));
            }
            rows.push((key.unwrap_or(Key::Index(self.read)), row));
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
        Ok(Some(Chunk { entries: made.into_iter().map(entry).collect::<Result<_>>()? }))
    }

    fn refused(&self, bad: &BadRow) -> anyhow::Error {
        unusable!("{}:{}: {}", self.source, bad.line, bad.message)
    }
}

/// An error is that the source can't be read on, or that a record can't be used and that is strict; nothing behind
/// it counts.
impl<T: Send> Iterator for Chunks<T> {
    type Item = Result<Chunk<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.chunk().transpose()
    }
}

/// Chunks that a thread of its own reads and tokenizes, while the one before is computed.
pub struct ReadAhead<T> {
    chunks: mpsc::Receiver<Result<Chunk<T>>>,
    /// None once it is known how it ended.
    reader: Option<JoinHandle<()>>,
    source: String,
}

impl<T: Send + 'static> ReadAhead<T> {
    /// Starts to read. The thread is not waited for when this is dropped before its end: it may stand in a read of
    /// standard input.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(chunks: Chunks<T>) -> Result<Self> {
        let source = chunks.source.clone();
        let (send, receive) = mpsc::sync_channel(1);
        let read = move || {
            for chunk in chunks {
                let last = chunk.is_err();
                if send.send(chunk).is_err() || last {
                    break;
                }
            }
        };
        let reader = std::thread::Builder::new().name("reader".to_owned()).spawn(read);
        Ok(Self { chunks: receive, reader: Some(reader.context("starting a thread")?), source })
    }
}

/// An error is one of [`Chunks`]', or that the thread broke down: never a quiet end.
impl<T> Iterator for ReadAhead<T> {
    type Item = Result<Chunk<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Ok(chunk) = self.chunks.recv() {
            return Some(chunk);
        }
        let ended = self.reader.take()?.join();
        ended
            .err()
            .map(|panic| Err(crate::error::of_panic(&format!("reading {}", self.source), panic.as_ref())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::records::{How, Source, read};

    /// Chunks of 2 over 5 texts.
    fn chunks(dir: &std::path::Path, size: usize, make: Make<String>) -> Chunks<String> {
        let path = dir.join("in.txt");
        std::fs::write(&path, "a\nb\nc\nd\ne\n").unwrap();
        let rows = read(&Source::Path(path), &How::default()).unwrap();
        let (source, columns) = ("in.txt".to_owned(), Columns::default());
        Chunks { rows, source, columns, make, size, strict: false, read: 0, until: None }
    }

    fn text(row: &Row) -> Result<String, BadRow> {
        Ok(row.text(&Columns::default(), "text")?.to_owned())
    }

    #[test]
    fn a_reader_that_breaks_down_is_an_error_and_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |row: &Row| match text(row)?.as_str() {
            "d" => panic!("no more of this"),
            text => Ok(text.to_owned()),
        };
        let mut chunks = ReadAhead::start(chunks(dir.path(), 2, Box::new(broken))).unwrap();
        assert_eq!(chunks.next().unwrap().unwrap().entries.len(), 2);
        let error = chunks.next().unwrap().err().unwrap();
        assert!(error.to_string().contains("reading in.txt broke down: no more of this"), "{error}");
        assert_eq!(crate::error::exit_code(&error), 1);
        assert!(chunks.next().is_none());
    }

    #[test]
    fn a_chunk_of_any_size_takes_the_room_of_its_records() {
        let dir = tempfile::tempdir().unwrap();
        let chunks = ReadAhead::start(chunks(dir.path(), usize::MAX, Box::new(text))).unwrap();
        let read: Vec<usize> = chunks.map(|chunk| chunk.unwrap().entries.len()).collect();
        assert_eq!(read, [5]);
    }

    /// The lines that answer a file of records, each with its text.
    fn answers(records: &str, columns: Columns) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, records).unwrap();
        let rows = read(&Source::Path(path), &How::default()).unwrap();
        let texts = columns.clone();
        let make = Box::new(move |row: &Row| row.text(&texts, "text").map(str::to_owned));
        let chunks =
            Chunks { rows, source: "a".into(), columns, make, size: 2, strict: false, read: 0, until: None };
        let entries = chunks.flat_map(|chunk| chunk.unwrap().entries);
        let answer = |entry: Entry<String>| {
            let text = entry.item.map_or_else(|error| json!({"error": error}), |text| json!({"text": text}));
            entry.key.answer(text.as_object().unwrap())
        };
        entries.map(answer).collect()
    }

    #[test]
    fn an_id_comes_back_as_it_is_written() {
        let ids =
            ["12345678901234567890123", "18446744073709551615", "-0.10", "1.0", "\"007\"", "{\"b\":[1.50]}"];
        let records: String = ids.iter().map(|id| format!("{{\"id\": {id}, \"text\": \"a\"}}\n")).collect();
        let columns = Columns::default().with("text", None).with("id", None);
        let expected: Vec<String> = ids.iter().map(|id| format!("{{\"id\":{id},\"text\":\"a\"}}")).collect();
        assert_eq!(answers(&records, columns), expected);
        assert_eq!(Key::Index(3).answer(&Map::new()), "{\"index\":3}");
    }

    #[test]
    fn an_id_may_be_the_text_itself() {
        let columns = Columns::default().with("text", None).with("id", Some("text".into()));
        assert_eq!(answers("{\"text\": \"a\"}\n", columns), ["{\"id\":\"a\",\"text\":\"a\"}"]);
    }
}
