//! Bytes of jsonl, json, csv, tsv and txt → rows.

use std::io::{BufRead, Cursor, Read};

use anyhow::Context;
use serde_json::{Map, Value};

use super::{BadRow, Format, Input, Item, Row, describe};
use crate::{Result, bail_unusable, unusable};

type Boxed = Box<dyn Iterator<Item = Item> + Send>;

const BOM: &[u8] = "\u{feff}".as_bytes();

/// The rows of a text format. `name` is what errors call the input.
pub(super) fn rows(input: Input, format: Format, name: &str) -> Result<Boxed> {
    Ok(match format {
        Format::Jsonl => by_line(input, jsonl_row),
        Format::Txt => by_line(input, |line, bytes| {
            Ok(Row { line, fields: Map::from_iter([("text".to_owned(), Value::String(lossy(bytes)))]) })
        }),
        Format::Tsv => tsv(input, name)?,
        Format::Csv => csv(input, name)?,
        Format::Json => json(input, name)?,
        Format::Parquet => unreachable!("Parquet is not a text format"),
    })
}

/// A line's number, its bytes and its end (nothing at the end of the input).
type Line<'a> = (usize, &'a [u8], &'a [u8]);

/// Lines without their end (`\n` or `\r\n`). A final end begins no line; a byte order mark is dropped.
struct Lines {
    input: Input,
    number: usize,
    bytes: Vec<u8>,
}

impl Lines {
    fn new(input: Input) -> Self {
        Self { input, number: 0, bytes: Vec::new() }
    }

    /// The next line and its number.
    fn next(&mut self) -> std::io::Result<Option<(usize, &[u8])>> {
        Ok(self.next_with_end()?.map(|(number, line, _)| (number, line)))
    }

    fn next_with_end(&mut self) -> std::io::Result<Option<Line<'_>>> {
        self.bytes.clear();
        self.input.read_until(b'\n', &mut self.bytes)?;
        self.number += 1;
        let mut line = self.bytes.as_slice();
        if self.number == 1 {
            line = line.strip_prefix(BOM).unwrap_or(line);
        }
        if line.is_empty() {
            return Ok(None);
        }
        let content = line.strip_suffix(b"\n").unwrap_or(line);
        let content = content.strip_suffix(b"\r").unwrap_or(content);
        Ok(Some((self.number, content, &line[content.len()..])))
    }
}

/// One item for each line.
fn by_line(input: Input, row: impl Fn(usize, &[u8]) -> Result<Row, BadRow> + Send + 'static) -> Boxed {
    let mut lines = Lines::new(input);
    Box::new(std::iter::from_fn(move || match lines.next() {
        Ok(line) => line.map(|(number, bytes)| Ok(row(number, bytes))),
        Err(error) => Some(Err(error.into())),
    }))
}

fn jsonl_row(line: usize, bytes: &[u8]) -> Result<Row, BadRow> {
    let bad = |message| BadRow { line, message };
    let text = std::str::from_utf8(bytes)
        .map_err(|error| bad(format!("not UTF-8: byte {} of the line", error.valid_up_to() + 1)))?;
    if text.trim().is_empty() {
        return Err(bad("empty line".into()));
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(Row { line, fields }),
        Ok(other) => Err(bad(format!("{}; a JSON object was expected", describe(&other)))),
        Err(error) => {
            // the place counts from the line's start; "line 1" would mislead
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            Err(bad(format!("not JSON: {reason}, at column {}", error.column())))
        }
    }
}

fn tsv(input: Input, name: &str) -> Result<Boxed> {
    let mut lines = Lines::new(input);
    let header = match lines.next().with_context(|| format!("reading {name}"))? {
        Some((_, line)) => header(line.split(|&byte| byte == b'\t'), name)?,
        None => return Ok(Box::new(std::iter::empty())),
    };
    Ok(Box::new(std::iter::from_fn(move || match lines.next() {
        Ok(line) => line.map(|(number, line)| Ok(record(number, &header, line.split(|&byte| byte == b'\t')))),
        Err(error) => Some(Err(error.into())),
    })))
}

fn csv(input: Input, name: &str) -> Result<Boxed> {
    let mut lines = Lines::new(input);
    let header = match csv_record(&mut lines).with_context(|| format!("reading {name}"))? {
        Some(Ok((_, names))) => header(names.iter().map(Vec::as_slice), name)?,
        Some(Err(bad)) => bail_unusable!("{name}:{}: {}", bad.line, bad.message),
        None => return Ok(Box::new(std::iter::empty())),
    };
    Ok(Box::new(std::iter::from_fn(move || match csv_record(&mut lines) {
        Ok(fields) => fields.map(|fields| {
            Ok(fields.and_then(|(line, fields)| record(line, &header, fields.iter().map(Vec::as_slice))))
        }),
        Err(error) => Some(Err(error.into())),
    })))
}

/// The line where a CSV record begins, and its fields.
type CsvRecord = (usize, Vec<Vec<u8>>);

/// The next CSV record that is not a blank line.
///
/// The csv crate reads the same fields (a test holds the two together), but its line numbers are off
/// behind CRLF and blank lines, and it does not tell that a quote was never closed, which may have
/// swallowed the rest of the file.
fn csv_record(lines: &mut Lines) -> std::io::Result<Option<Result<CsvRecord, BadRow>>> {
    enum At {
        Start,
        Bare,
        Quoted,
        /// behind a quote within a quoted field: its end, or the first half of a doubled quote
        Quote,
    }
    let (mut first, mut fields, mut field, mut at) = (0, Vec::new(), Vec::new(), At::Start);
    while let Some((number, line, end)) = lines.next_with_end()? {
        if first == 0 {
            if line.is_empty() {
                continue;
            }
            first = number;
        }
        for &byte in line {
            at = match (at, byte) {
                (At::Start, b'"') => At::Quoted,
                (At::Quoted, b'"') => At::Quote,
                (At::Start | At::Bare | At::Quote, b',') => {
                    fields.push(std::mem::take(&mut field));
                    At::Start
                }
                (now, byte) => {
                    field.push(byte);
                    match now {
                        At::Quoted => At::Quoted,
                        At::Quote if byte == b'"' => At::Quoted,
                        _ => At::Bare,
                    }
                }
            };
        }
        if !matches!(at, At::Quoted) {
            fields.push(field);
            return Ok(Some(Ok((first, fields))));
        }
        field.extend_from_slice(end);
    }
    let message = "a quote is opened in this record and never closed".into();
    Ok((first > 0).then_some(Err(BadRow { line: first, message })))
}

/// The columns' names; none may stand twice, and only the first may be empty.
fn header<'a>(names: impl Iterator<Item = &'a [u8]>, name: &str) -> Result<Vec<String>> {
    let names: Vec<_> = names.map(lossy).collect();
    for (i, column) in names.iter().enumerate() {
        // pandas leaves the name of its index, the first column, empty
        if column.is_empty() && i > 0 {
            bail_unusable!("{name}:1: column {} has no name in the header", i + 1);
        }
        if let Some(first) = names[..i].iter().position(|other| other == column) {
            bail_unusable!("{name}:1: columns {} and {} are both named {column:?}", first + 1, i + 1);
        }
    }
    Ok(names)
}

fn record<'a>(line: usize, header: &[String], fields: impl Iterator<Item = &'a [u8]>) -> Result<Row, BadRow> {
    let values: Vec<_> = fields.map(|field| Value::String(lossy(field))).collect();
    if values.len() != header.len() {
        let message =
            format!("{} fields; the header has {}: {}", values.len(), header.len(), header.join(", "));
        return Err(BadRow { line, message });
    }
    Ok(Row { line, fields: header.iter().cloned().zip(values).collect() })
}

fn json(mut input: Input, name: &str) -> Result<Boxed> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).with_context(|| format!("reading {name}"))?;
    let document = bytes.strip_prefix(BOM).unwrap_or(&bytes);
    if document.trim_ascii().is_empty() {
        return Ok(Box::new(std::iter::empty()));
    }
    let records = match serde_json::from_slice(document) {
        Ok(Value::Array(records)) => records,
        Ok(Value::Object(mut object)) if matches!(object.get("data"), Some(Value::Array(_))) => {
            match object.remove("data") {
                Some(Value::Array(records)) => records,
                _ => unreachable!("just seen"),
            }
        }
        // datasets writes JSON lines under this name too
        _ if first_line_is_object(document) => {
            return rows(Box::new(Cursor::new(bytes)), Format::Jsonl, name);
        }
        Ok(other) => bail_unusable!(
            r#"{name} is {}; an array of objects was expected, or an object whose "data" is one"#,
            describe(&other)
        ),
        Err(error) => return Err(unusable!("{name} is not JSON: {error}")),
    };
    Ok(Box::new(records.into_iter().enumerate().map(|(i, record)| {
        Ok(match record {
            Value::Object(fields) => Ok(Row { line: i + 1, fields }),
            other => Err(BadRow {
                line: i + 1,
                message: format!("{}; a JSON object was expected", describe(&other)),
            }),
        })
    })))
}

fn first_line_is_object(document: &[u8]) -> bool {
    let line = document.split(|&byte| byte == b'\n').next().unwrap_or_default();
    serde_json::from_slice::<Map<String, Value>>(line).is_ok()
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
