//! Bytes of jsonl, json, csv, tsv, txt and conll → rows.

use std::io::{BufRead, Cursor, Error, ErrorKind, Read};

use serde_json::{Map, Value};

use super::conll::{Sentence, Sentences};
use super::{
    BadRow, EMPTY_LINE, Format, How, Input, Item, Row, TextEncoding, TextUnit, describe, exact, squad,
};
use crate::{Result, bail_unusable, unusable};

/// Reads records one after the other.
pub(super) enum Reader {
    /// Of a line each.
    Lines(ByLine),
    Records(Boxed),
}

type Boxed = Box<dyn Iterator<Item = Item> + Send>;

impl Iterator for Reader {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        match self {
            Self::Lines(lines) => lines.next(),
            Self::Records(records) => records.next(),
        }
    }
}

impl Reader {
    /// Passes over a record.
    pub fn pass_over(&mut self) -> Option<Result<()>> {
        match self {
            Self::Lines(ByLine { lines, .. }) => match lines.next() {
                Ok(line) => line.map(|_| Ok(())),
                Err(error) => Some(Err(failed(error))),
            },
            Self::Records(records) => records.next().map(|item| item.map(drop)),
        }
    }

    fn none() -> Self {
        Self::Records(Box::new(std::iter::empty()))
    }
}

const BOM: &[u8] = "\u{feff}".as_bytes();

/// The rows of a text format. `name` is what errors call the input.
pub(super) fn rows(input: Input, format: Format, how: &How, name: &str) -> Result<Reader> {
    let input = match how.encoding {
        Some(encoding) => encoding.decoded(input),
        None => input,
    };
    let lines = |input| Lines::new(input, how.encoding);
    let records = match (format, how.unit.unwrap_or_default()) {
        (Format::Jsonl, _) => return Ok(by_line(lines(input), |line, text, _| jsonl_row(line, text))),
        (Format::Txt, TextUnit::Line) => {
            return Ok(by_line(lines(input), |line, text, end| {
                if line == 1 && !end.ends_with(b"\n") && text.contains('\r') {
                    return Err(BadRow { line, message: CR_ALONE.into() });
                }
                Ok(text_row(line, text))
            }));
        }
        (Format::Txt, TextUnit::Document) => documents(lines(input)),
        (Format::Txt, TextUnit::File) => whole_text(input, how.encoding, name)?,
        (Format::Tsv, _) => return tsv(lines(input), name),
        (Format::Csv, _) => csv(lines(input), name)?,
        (Format::Json, _) => return json(input, how, name),
        (Format::Conll, _) => sentences(lines(input), how),
        (Format::Parquet, _) => unreachable!("Parquet is not a text format"),
    };
    Ok(Reader::Records(records))
}

pub(super) const CR_ALONE: &str = "the lines end with a carriage return alone, which ends no line here: \
                        `tr '\\r' '\\n' < FILE > NEW` mends that";

/// An error of reading: what stands in the file is the user's to mend.
pub(super) fn failed(error: Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::InvalidData => unusable!("{error}"),
        _ => error.into(),
    }
}

/// The line's text.
pub(super) fn text_of(line: usize, bytes: &[u8], encoding: Option<TextEncoding>) -> Result<&str, BadRow> {
    match std::str::from_utf8(bytes) {
        // letters of UTF-16 are UTF-8 too, with zeros between them
        Ok(_) if is_wide(bytes) => Err(BadRow { line, message: WIDE.into() }),
        Ok(text) => Ok(text),
        Err(error) => Err(BadRow { line, message: not_text(bytes, &error, encoding) }),
    }
}

const WIDE: &str = "every second byte is 0, as in UTF-16: give --encoding utf-16le or utf-16be";

/// Whether there are as many zeros as UTF-16 has where at least every second character is ASCII.
fn is_wide(bytes: &[u8]) -> bool {
    let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
    zeros > 0 && zeros * 4 >= bytes.len()
}

fn not_text(line: &[u8], error: &std::str::Utf8Error, encoding: Option<TextEncoding>) -> String {
    let good = error.valid_up_to();
    match encoding {
        None => format!("not UTF-8: byte {} of the line; --encoding names another encoding", good + 1),
        Some(encoding) => format!(
            "not {encoding}: what stands at character {} of the line can't be decoded",
            String::from_utf8_lossy(&line[..good]).chars().count() + 1
        ),
    }
}

/// Refuses the beginning of a file in UTF-16 or UTF-32 that is about to be read as UTF-8.
fn refuse_wide(bytes: &[u8]) -> std::io::Result<()> {
    let start = &bytes[..bytes.len().min(64)];
    let message = if bytes.starts_with(&[0xff, 0xfe, 0, 0]) || bytes.starts_with(&[0, 0, 0xfe, 0xff]) {
        "UTF-32, which tk does not read: `iconv -f UTF-32 -t UTF-8` turns it into UTF-8"
    } else if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        "UTF-16: give --encoding utf-16"
    } else if start.len() >= 4 && is_wide(start) {
        WIDE
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidData, message))
}

/// Refuses the beginning of a text that was decoded from UTF-16 of the other byte order: letters are U+6100 and so on.
fn refuse_swapped(bytes: &[u8]) -> std::io::Result<()> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(96)]);
    let swapped = text.chars().filter(|&c| c != '\0' && u32::from(c) & 0xff == 0).count();
    if swapped * 2 <= text.chars().count() {
        return Ok(());
    }
    let message =
        "its bytes stand the other way round: give --encoding utf-16be, or utf-16le where that was given";
    Err(Error::new(ErrorKind::InvalidData, message))
}

/// A line's number, its bytes and its end (nothing at the end of the input).
pub(super) type Line<'a> = (usize, &'a [u8], &'a [u8]);

/// Lines without their end (`\n` or `\r\n`). A final end begins no line; a byte order mark is dropped.
pub(super) struct Lines {
    input: Input,
    pub(super) encoding: Option<TextEncoding>,
    number: usize,
    bytes: Vec<u8>,
}

impl Lines {
    pub(super) fn new(input: Input, encoding: Option<TextEncoding>) -> Self {
        Self { input, encoding, number: 0, bytes: Vec::new() }
    }

    pub(super) fn next(&mut self) -> std::io::Result<Option<Line<'_>>> {
        self.bytes.clear();
        self.input.read_until(b'\n', &mut self.bytes)?;
        self.number += 1;
        let mut line = self.bytes.as_slice();
        if self.number == 1 {
            match self.encoding {
                None => refuse_wide(line)?,
                Some(_) => refuse_swapped(line)?,
            }
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

type LineRow = dyn Fn(usize, &str, &[u8]) -> Result<Row, BadRow> + Send;

/// One item for each line, from its number, its text and its end.
pub(super) struct ByLine {
    lines: Lines,
    row: Box<LineRow>,
}

fn by_line(lines: Lines, row: impl Fn(usize, &str, &[u8]) -> Result<Row, BadRow> + Send + 'static) -> Reader {
    Reader::Lines(ByLine { lines, row: Box::new(row) })
}

impl Iterator for ByLine {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        let encoding = self.lines.encoding;
        match self.lines.next() {
            Ok(line) => line.map(|(number, bytes, end)| {
                Ok(text_of(number, bytes, encoding).and_then(|text| (self.row)(number, text, end)))
            }),
            Err(error) => Some(Err(failed(error))),
        }
    }
}

fn text_row(line: usize, text: &str) -> Row {
    Row::new(line, Map::from_iter([("text".to_owned(), text.into())]))
}

/// Runs of lines between blank ones, with the line ends within them.
fn documents(mut lines: Lines) -> Boxed {
    let encoding = lines.encoding;
    let mut next = move || -> std::io::Result<Option<Result<Row, BadRow>>> {
        let (mut first, mut text, mut bad, mut last_end) = (0, String::new(), None, 0);
        while let Some((number, bytes, end)) = lines.next()? {
            let line = text_of(number, bytes, encoding);
            if line.as_ref().is_ok_and(|line| line.trim().is_empty()) {
                if first > 0 {
                    break;
                }
                continue;
            }
            if first == 0 {
                first = number;
            }
            match line {
                Ok(line) => text.push_str(line),
                Err(error) => drop(bad.get_or_insert(error)),
            }
            text.push_str(if end == b"\r\n" { "\r\n" } else { "\n" });
            last_end = end.len().max(1);
        }
        text.truncate(text.len().saturating_sub(last_end));
        Ok((first > 0).then(|| bad.map_or_else(|| Ok(text_row(first, &text)), Err)))
    };
    Box::new(std::iter::from_fn(move || next().map_err(failed).transpose()))
}

/// The whole input as one text.
fn whole_text(input: Input, encoding: Option<TextEncoding>, name: &str) -> Result<Boxed> {
    let text = whole(input, encoding, name)?;
    Ok(Box::new((!text.is_empty()).then(|| Ok(Ok(text_row(1, &text)))).into_iter()))
}

/// All of the input; a byte order mark is dropped.
fn whole(mut input: Input, encoding: Option<TextEncoding>, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    let read = input.read_to_end(&mut bytes).and_then(|_| match encoding {
        None => refuse_wide(&bytes),
        Some(_) => refuse_swapped(&bytes),
    });
    read.map_err(|error| failed(error).context(format!("reading {name}")))?;
    if bytes.starts_with(BOM) {
        bytes.drain(..BOM.len());
    }
    String::from_utf8(bytes).map_err(|error| {
        let (bytes, error) = (error.as_bytes(), error.utf8_error());
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        let start =
            bytes[..error.valid_up_to()].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        match std::str::from_utf8(&bytes[start..]) {
            Err(error) => unusable!("{name}:{line}: {}", not_text(&bytes[start..], &error, encoding)),
            Ok(_) => unusable!("{name}:{line}: {error}"),
        }
    })
}

/// A row for each sentence.
fn sentences(lines: Lines, how: &How) -> Boxed {
    let sentences = Sentences::new(lines, how.tag_column.clone().unwrap_or_default(), !how.untagged);
    let row = |sentence: Sentence| {
        let line = sentence.lines[0];
        let lists = [("tokens", Some(sentence.tokens)), ("tags", sentence.tags)];
        let fields = lists.into_iter().filter_map(|(name, list)| Some((name.to_owned(), list?.into())));
        Row { lines: sentence.lines, ..Row::new(line, fields.collect()) }
    };
    Box::new(sentences.map(move |sentence| sentence.map(|sentence| sentence.map(row)).map_err(failed)))
}

fn jsonl_row(line: usize, text: &str) -> Result<Row, BadRow> {
    let bad = |message| BadRow { line, message };
    if text.trim().is_empty() {
        return Err(bad(EMPTY_LINE.into()));
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => {
            Ok(Row { exact: exact::fields(text, &fields), ..Row::new(line, fields) })
        }
        Ok(other) => Err(bad(format!("{}; a JSON object was expected", describe(&other)))),
        Err(error) => {
            // the place counts from the line's start; "line 1" would mislead
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            Err(bad(format!("not JSON: {reason}, at column {}", error.column())))
        }
    }
}

fn tsv(mut lines: Lines, name: &str) -> Result<Reader> {
    let encoding = lines.encoding;
    let first = lines.next().map_err(|error| failed(error).context(format!("reading {name}")))?;
    let Some((number, bytes, _)) = first else { return Ok(Reader::none()) };
    let names = text_of(number, bytes, encoding).map_err(|bad| refused_header(name, &bad))?;
    let header = header(names.split('\t').map(str::to_owned).collect(), name)?;
    Ok(by_line(lines, move |number, text, _| {
        record(number, &header, text.split('\t').map(str::to_owned).collect())
    }))
}

fn csv(mut lines: Lines, name: &str) -> Result<Boxed> {
    let first = csv_record(&mut lines).map_err(|error| failed(error).context(format!("reading {name}")))?;
    let header = match first {
        Some(Ok((_, names))) => header(names, name)?,
        Some(Err(bad)) => return Err(refused_header(name, &bad)),
        None => return Ok(Box::new(std::iter::empty())),
    };
    Ok(Box::new(std::iter::from_fn(move || match csv_record(&mut lines) {
        Ok(fields) => {
            fields.map(|fields| Ok(fields.and_then(|(line, fields)| record(line, &header, fields))))
        }
        Err(error) => Some(Err(failed(error))),
    })))
}

fn refused_header(name: &str, bad: &BadRow) -> anyhow::Error {
    unusable!("{name}:{}: {}", bad.line, bad.message)
}

/// The line where a CSV record begins, and its fields.
type CsvRecord = (usize, Vec<String>);

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
    let encoding = lines.encoding;
    let (mut first, mut fields, mut field, mut at, mut bad) = (0, Vec::new(), Vec::new(), At::Start, None);
    while let Some((number, line, end)) = lines.next()? {
        if first == 0 {
            if line.is_empty() {
                continue;
            }
            first = number;
        }
        if let (None, Err(error)) = (&bad, text_of(number, line, encoding)) {
            bad = Some(error); // the record still goes to where its quotes end
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
            // cut at ASCII alone, a text's parts are texts
            let texts = fields.into_iter().map(String::from_utf8).collect::<Result<Vec<_>, _>>();
            let not_text =
                |error: std::string::FromUtf8Error| BadRow { line: first, message: error.to_string() };
            return Ok(Some(match bad {
                Some(bad) => Err(bad),
                None => texts.map(|texts| (first, texts)).map_err(not_text),
            }));
        }
        field.extend_from_slice(end);
    }
    let message = "a quote is opened in this record and never closed".into();
    Ok((first > 0).then_some(Err(BadRow { line: first, message })))
}

/// The columns' names; none may stand twice, and only the first may be empty.
fn header(names: Vec<String>, name: &str) -> Result<Vec<String>> {
    for (i, column) in names.iter().enumerate() {
        if column.replace("\r\n", "").contains('\r') {
            bail_unusable!("{name}:1: {CR_ALONE}");
        }
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

fn record(line: usize, header: &[String], values: Vec<String>) -> Result<Row, BadRow> {
    if values.len() != header.len() {
        let message =
            format!("{} fields; the header has {}: {}", values.len(), header.len(), header.join(", "));
        return Err(BadRow { line, message });
    }
    Ok(Row::new(line, header.iter().cloned().zip(values.into_iter().map(Value::String)).collect()))
}

fn json(input: Input, how: &How, name: &str) -> Result<Reader> {
    let text = whole(input, how.encoding, name)?;
    if text.trim().is_empty() {
        return Ok(Reader::none());
    }
    let mut array = text.as_str();
    let records = match serde_json::from_str(&text) {
        Ok(Value::Array(records)) => records,
        Ok(Value::Object(mut object)) if matches!(object.get("data"), Some(Value::Array(_))) => {
            array =
                exact::members(&text).into_iter().rfind(|(key, _)| key == "data").map_or("", |(_, raw)| raw);
            match object.remove("data") {
                Some(Value::Array(records)) => records,
                _ => unreachable!("just seen"),
            }
        }
        // datasets writes JSON lines under this name too
        _ if first_line_is_object(&text) => {
            let how = How { encoding: None, ..how.clone() };
            return rows(Box::new(Cursor::new(text.into_bytes())), Format::Jsonl, &how, name);
        }
        Ok(other) => bail_unusable!(
            r#"{name} is {}; an array of objects was expected, or an object whose "data" is one"#,
            describe(&other)
        ),
        Err(error) => return Err(unusable!("{name} is not JSON: {error}")),
    };
    if squad::is_squad(&records) {
        return Ok(Reader::Records(Box::new(squad::questions(records).map(Ok))));
    }
    let mut raw: Vec<String> = Vec::new();
    if records.iter().any(exact::has_fraction) {
        raw = exact::members(array).into_iter().map(|(_, raw)| raw.to_owned()).collect();
    }
    Ok(Reader::Records(Box::new(records.into_iter().enumerate().map(move |(i, record)| {
        Ok(match record {
            Value::Object(fields) => {
                let exact = raw.get(i).map(|raw| exact::fields(raw, &fields)).unwrap_or_default();
                Ok(Row { exact, ..Row::new(i + 1, fields) })
            }
            other => Err(BadRow {
                line: i + 1,
                message: format!("{}; a JSON object was expected", describe(&other)),
            }),
        })
    }))))
}

fn first_line_is_object(document: &str) -> bool {
    let line = document.split('\n').next().unwrap_or_default();
    serde_json::from_str::<Map<String, Value>>(line).is_ok()
}
