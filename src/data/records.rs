//! Files → rows of named fields, each with its place. What is packed by gzip or Zstandard is unpacked on the way.
//!
//! A row that can't be read is a [`BadRow`], an item like any other, and reading goes on: the caller
//! answers it in its place (serving) or lists it (training). Only what ends the reading is an error.

mod columns;
mod conll;
mod encoding;
mod exact;
pub mod file_names;
mod files;
mod packed;
mod parquet;
mod readers;
mod squad;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use columns::{Columns, describe};
pub use conll::TagColumn;
pub use encoding::TextEncoding;
pub use files::{Files, Numbered, Place};

use crate::{Result, bail_unusable, unusable};

/// One record.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where the record begins: the 1-based line, or the record's number in Parquet files and JSON arrays.
    pub line: usize,
    /// Of several files that are read as one, which it stands in, from 0.
    pub file: usize,
    pub fields: Map<String, Value>,
    /// Fields of JSON with numbers that `fields` can't hold, as they are written.
    pub exact: BTreeMap<String, String>,
    /// The line of each word, where each stands on one of its own (CoNLL); else empty.
    pub lines: Vec<usize>,
}

impl Row {
    /// A record whose fields hold all that was written.
    pub fn new(line: usize, fields: Map<String, Value>) -> Self {
        Self { line, file: 0, fields, exact: BTreeMap::new(), lines: Vec::new() }
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        Place { file: self.file, line: self.line }
    }
}

/// One record that can't be used; those after it can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct BadRow {
    /// As in [`Row`].
    pub line: usize,
    pub message: String,
}

/// Where records come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Path(PathBuf),
    Stdin,
}

impl Source {
    /// The source that a command line's argument names: `-` is standard input.
    pub fn of(argument: &str) -> Self {
        if argument == "-" { Self::Stdin } else { Self::Path(argument.into()) }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Stdin => f.write_str("standard input"),
        }
    }
}

/// How records stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A JSON object a line.
    Jsonl,
    /// An array of objects, or an object whose `data` is one. JSON lines are taken too, as `datasets` does.
    Json,
    /// A header, then records; fields may be quoted. Blank lines are skipped.
    Csv,
    /// A header, then a record a line; a quote is text.
    Tsv,
    Parquet,
    /// A text a line; an empty line is an empty text. [`TextUnit`] asks for longer ones.
    Txt,
    /// A token a line with its tag, a blank line between sentences: a sentence is a record of `tokens` and `tags`.
    Conll,
}

/// What one text of a `.txt` file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TextUnit {
    /// Every line.
    #[default]
    Line,
    /// What stands between blank lines, with its line breaks.
    Document,
    /// The whole file.
    File,
}

/// How a source is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Where there is none, the extension decides; standard input is `jsonl`.
    pub format: Option<Format>,
    /// UTF-8 where there is none. In Parquet files, of strings that are not marked as such.
    pub encoding: Option<TextEncoding>,
    /// What a text of `txt` is; a line where there is none.
    pub unit: Option<TextUnit>,
    /// The column of `conll` that is the tag; the last where there is none.
    pub tag_column: Option<TagColumn>,
    /// Whether of `conll` the tokens alone are read, as for predictions.
    pub untagged: bool,
}

const FORMATS: [(&str, Format); 7] = [
    ("jsonl", Format::Jsonl),
    ("json", Format::Json),
    ("csv", Format::Csv),
    ("tsv", Format::Tsv),
    ("parquet", Format::Parquet),
    ("txt", Format::Txt),
    ("conll", Format::Conll),
];

impl Format {
    /// The format that a path's extension names: the one before `.gz` or `.zst`, where it ends in that.
    pub fn of(path: &Path) -> Result<Self> {
        match packed::without_packing(path).extension() {
            Some(extension) => extension.to_string_lossy().parse::<Self>(),
            None => Err(unusable!("no extension; the known ones are {}", known())),
        }
        .map_err(|error| unusable!("{}: the format is not known: {error}", path.display()))
    }
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let name = name.to_lowercase();
        match FORMATS.iter().find(|(known, _)| *known == name) {
            Some((_, format)) => Ok(*format),
            None => Err(unusable!("{name:?} is none of {}", known())),
        }
    }
}

fn known() -> String {
    FORMATS.map(|(name, _)| name).join(", ")
}

/// The records of a source, in order. After an error (the source can't be read on) it ends.
pub struct Rows {
    name: String,
    rows: Option<readers::Reader>,
}

/// What [`Rows`] gives for each record.
pub type Item = Result<Result<Row, BadRow>>;

impl Iterator for Rows {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.step(Iterator::next)
    }
}

impl Rows {
    /// Passes over the next record; one that is a line is not looked into.
    pub fn pass_over(&mut self) -> Option<Result<()>> {
        self.step(readers::Reader::pass_over)
    }

    fn step<T>(&mut self, step: impl FnOnce(&mut readers::Reader) -> Option<Result<T>>) -> Option<Result<T>> {
        let rows = self.rows.as_mut()?;
        let item = guarded(|| Ok(step(rows))).unwrap_or_else(|error| Some(Err(error)));
        if !matches!(item, Some(Ok(_))) {
            self.rows = None;
        }
        item.map(|item| item.map_err(|error| error.context(format!("reading {}", self.name))))
    }
}

/// Opens a source. Memory does not grow with the file, save for `json`, row groups of `parquet`, and a whole file
/// that is one text.
///
/// # Errors
/// Unusable: a file that isn't there, an unknown extension, a header or a whole document that can't be read.
pub fn read(source: &Source, how: &How) -> Result<Rows> {
    let name = source.to_string();
    let (opened, path, format) = match source {
        Source::Path(path) => {
            (open(path)?, Some(path.as_path()), how.format.map_or_else(|| Format::of(path), Ok)?)
        }
        Source::Stdin => {
            let stdin: Input = Box::new(BufReader::new(std::io::stdin()));
            (Opened::Stream(stdin), None, how.format.unwrap_or(Format::Jsonl))
        }
    };
    let rows = match (packed::unpacked(opened, path, &name)?, format) {
        ((_, Some(packing)), Format::Parquet) => bail_unusable!(
            "{name} is packed by {packing}: a Parquet file is read from its end, and its columns are packed already; unpack it"
        ),
        ((Opened::File(file), _), Format::Parquet) => {
            readers::Reader::Records(guarded(|| parquet::rows(file, how.encoding, &name))?)
        }
        ((Opened::Stream(_), _), Format::Parquet) => {
            bail_unusable!("{name}: a Parquet file is read from its end, so it can't come through a pipe")
        }
        ((opened, _), _) => readers::rows(opened.buffered(), format, how, &name)?,
    };
    Ok(Rows { name, rows: Some(rows) })
}

/// How many records a file has: as many as [`read`] gives of it.
///
/// # Errors
/// Unusable: as [`read`], and what ends the reading.
pub fn count(path: &Path, how: &How) -> Result<usize> {
    let source = Source::Path(path.into());
    if how.format.map_or_else(|| Format::of(path), Ok)? == Format::Parquet
        && let (Opened::File(file), None) = packed::unpacked(open(path)?, Some(path), &source.to_string())?
    {
        return guarded(|| parquet::count(file, &source.to_string()));
    }
    let mut rows = read(&source, how)?;
    let mut count = 0;
    while let Some(passed) = rows.pass_over() {
        passed?;
        count += 1;
    }
    Ok(count)
}

/// What a reader gives. The parquet library takes for granted that a page holds what the file says of it, and panics
/// where it does not: then the file can't be read on, which is an error as any other.
fn guarded<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    // after a panic nobody looks at what the reader has left
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(unusable!("its parts contradict each other, so it can't be read on: write it again"))
    })
}

type Input = Box<dyn BufRead + Send>;

/// A source's bytes.
enum Opened {
    File(File),
    Stream(Input),
}

impl Opened {
    fn buffered(self) -> Input {
        match self {
            Self::File(file) => Box::new(BufReader::with_capacity(BUFFER, file)),
            Self::Stream(input) => input,
        }
    }
}

/// Bytes that are read ahead.
const BUFFER: usize = 1 << 17;

fn open(path: &Path) -> Result<Opened> {
    match File::open(path) {
        Ok(_) if path.is_dir() => {
            bail_unusable!("{} is a directory; a file of records was expected", path.display())
        }
        Ok(file) if file.metadata().is_ok_and(|about| about.is_file()) => Ok(Opened::File(file)),
        Ok(pipe) => Ok(Opened::Stream(Box::new(BufReader::with_capacity(BUFFER, pipe)))),
        Err(error) => bail_unusable!("{} can't be opened: {error}", path.display()),
    }
}

/// What is said of a line without anything.
const EMPTY_LINE: &str = "empty line";

/// How many bad records an error lists.
const LISTED: usize = 10;

/// Reads whole files, each row made into an example at once: all of them or, as one error, what is wrong.
/// Empty lines at a file's end are none of them.
///
/// # Errors
/// Unusable: as [`read`]; no records at all; records that can't be read or that `example` refuses, the first
/// ten with file and line.
pub fn read_examples<T>(
    files: &Files,
    how: &How,
    mut example: impl FnMut(Row) -> Result<T, BadRow>,
) -> Result<Vec<T>> {
    let (mut examples, mut listed, mut bad) = (Vec::new(), Vec::new(), 0);
    for numbered in files.read(how) {
        let Numbered { file, row, .. } = numbered?;
        match row.and_then(&mut example) {
            Ok(example) => examples.push(example),
            Err(BadRow { line, message }) => {
                bad += 1;
                if bad <= LISTED {
                    listed.push(format!("  {}: {message}", files.at(Place { file, line })));
                }
            }
        }
    }
    if bad > LISTED {
        listed.push(format!("  and {} more", bad - LISTED));
    }
    match (bad, examples.len()) {
        (0, 0) => Err(unusable!("{files} has no records")),
        (0, _) => Ok(examples),
        (_, good) => {
            Err(unusable!("{files}: {bad} of {} records can't be used:\n{}", bad + good, listed.join("\n")))
        }
    }
}

#[cfg(test)]
mod tests;
