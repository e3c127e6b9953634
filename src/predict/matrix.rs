//! Embeddings as a matrix: answers, a line of JSON each → a file of NumPy or of Parquet, a row for a line.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use parquet::basic::Compression;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, FloatType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::Result;

/// The form of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// `numpy.load` reads it: float32, (lines, width). The row of a line that has an error is of NaN.
    Npy,
    /// Columns `index` (the record's place in the input, from 0), `id` where the records have one, `embedding` (a list of float32, null
    /// where there is an error), `error` and `truncated`.
    Parquet,
}

/// Numbers that a row group of Parquet holds (16 MiB).
const GROUP: usize = 4 << 20;

/// The line of an answer.
#[derive(Deserialize)]
struct Line {
    id: Option<Box<RawValue>>,
    embedding: Option<Vec<f32>>,
    error: Option<String>,
    #[serde(default)]
    truncated: bool,
}

impl Matrix {
    /// What the name of an output asks for.
    pub fn of(output: &str) -> Option<Self> {
        match Path::new(output).extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "npy" => Some(Self::Npy),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// A matrix to be written.
#[derive(Clone, Copy, Debug)]
pub struct MatrixFile {
    pub form: Matrix,
    /// Numbers of a row.
    pub width: usize,
    /// The place of the first row's record in the input.
    pub first: usize,
}

impl MatrixFile {
    /// Makes the file at `path`, of answers.
    ///
    /// # Errors
    /// A line is no answer with an embedding of this width, or the file can't be written.
    pub fn write(self, answers: &Path, path: &Path) -> Result<()> {
        match self.form {
            Matrix::Npy => npy(answers, self.width, path),
            Matrix::Parquet => parquet(answers, self.width, self.first, path),
        }
    }
}

/// The lines of a file, with their numbers from 1, as far as a `T` has them.
fn parsed<T: DeserializeOwned>(answers: &Path) -> Result<impl Iterator<Item = Result<(usize, T)>>> {
    let place = answers.display().to_string();
    let file = File::open(answers).with_context(|| place.clone())?;
    Ok(BufReader::new(file).lines().zip(1..).map(move |(line, number)| {
        let place = || format!("{place}:{number}");
        Ok((number, serde_json::from_str(&line.with_context(place)?).with_context(place)?))
    }))
}

/// The answers of a file.
fn lines(answers: &Path, width: usize) -> Result<impl Iterator<Item = Result<Line>>> {
    Ok(parsed(answers)?.map(move |line| {
        let (number, line): (usize, Line) = line?;
        let found = line.embedding.as_ref().map(Vec::len);
        anyhow::ensure!(
            found.unwrap_or(width) == width && found.is_some() != line.error.is_some(),
            "{}:{number}: no embedding of {width} numbers",
            answers.display()
        );
        Ok(line)
    }))
}

/// Version 1.0 of the format, as `numpy.lib.format` describes it.
fn npy(answers: &Path, width: usize, path: &Path) -> Result<()> {
    let file = File::open(answers).with_context(|| answers.display().to_string())?;
    let rows = BufReader::new(file).split(b'\n').try_fold(0, |rows, line| line.map(|_| rows + 1))?;
    let about = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    // the numbers begin at a multiple of 64, behind ten bytes, the text, and a line's end
    let length = (10 + about.len() + 1).next_multiple_of(64) - 10;
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(b"\x93NUMPY\x01\x00")?;
    file.write_all(&u16::try_from(length)?.to_le_bytes())?;
    writeln!(file, "{about:<0$}", length - 1)?;
    for line in lines(answers, width)? {
        let row = line?.embedding.unwrap_or_else(|| vec![f32::NAN; width]);
        file.write_all(&row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    Ok(file.flush()?)
}

/// What the records' ids are.
#[derive(Clone, Copy, PartialEq)]
enum Ids {
    None,
    /// All of them are integers.
    Integers,
    /// Texts, and other values as JSON writes them.
    Texts,
}

impl Ids {
    fn of(answers: &Path) -> Result<Self> {
        /// What is asked of a line: the numbers of its embedding are passed over.
        #[derive(Deserialize)]
        struct Id {
            id: Option<Box<RawValue>>,
        }
        let mut found = Self::None;
        for line in parsed(answers)? {
            let (_, Id { id: Some(id) }) = line? else { continue };
            match id.get().parse::<i64>() {
                Ok(_) => found = Self::Integers,
                Err(_) => return Ok(Self::Texts),
            }
        }
        Ok(found)
    }
}

fn parquet(answers: &Path, width: usize, mut first: usize, path: &Path) -> Result<()> {
    let ids = Ids::of(answers)?;
    let id = match ids {
        Ids::None => "",
        Ids::Integers => "optional int64 id;",
        Ids::Texts => "optional binary id (STRING);",
    };
    let schema = format!(
        "message answers {{
            required int64 index;
            {id}
            optional group embedding (LIST) {{ repeated group list {{ required float element; }} }}
            optional binary error (STRING);
            required boolean truncated;
        }}"
    );
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        // numbers of which hardly two are equal
        .set_column_dictionary_enabled(ColumnPath::from("embedding.list.element"), false);
    let mut file = SerializedFileWriter::new(
        File::create(path)?,
        Arc::new(parse_message_type(&schema)?),
        Arc::new(properties.build()),
    )?;
    let size = (GROUP / width.max(1)).max(1);
    let mut all = lines(answers, width)?;
    loop {
        let group = all.by_ref().take(size).collect::<Result<Vec<Line>>>()?;
        if group.is_empty() {
            break;
        }
        row_group(&mut file, &group, first, ids)?;
        first += group.len();
    }
    file.close()?;
    Ok(())
}

/// Writes the answers whose first stands at the place `first`, column after column as the schema has them.
fn row_group(file: &mut SerializedFileWriter<File>, lines: &[Line], first: usize, ids: Ids) -> Result<()> {
    let mut group = file.next_row_group()?;
    let places: Vec<i64> = (first..first + lines.len()).map(|i| i as i64).collect();
    column::<Int64Type>(&mut group, &places, None, None)?;

    let written: Vec<Option<&str>> = lines.iter().map(|line| line.id.as_deref().map(RawValue::get)).collect();
    match ids {
        Ids::None => {}
        Ids::Integers => {
            let there = written.iter().flatten().map(|id| id.parse()).collect::<Result<Vec<i64>, _>>()?;
            column::<Int64Type>(&mut group, &there, Some(&defined(&written)), None)?;
        }
        Ids::Texts => {
            let text = |id: &&str| serde_json::from_str(id).unwrap_or_else(|_| (*id).to_owned());
            let there: Vec<String> = written.iter().flatten().map(text).collect();
            texts(&mut group, there.iter().map(String::as_str), &defined(&written))?;
        }
    }

    // a list that is there has its numbers at level 2; a null has one level and no number
    let (mut numbers, mut levels, mut repeats) = (Vec::new(), Vec::new(), Vec::new());
    for line in lines {
        let row = line.embedding.as_deref().unwrap_or_default();
        numbers.extend_from_slice(row);
        levels.extend(std::iter::repeat_n(if row.is_empty() { 0 } else { 2 }, row.len().max(1)));
        repeats.extend((0..row.len().max(1)).map(|i| i16::from(i > 0)));
    }
    column::<FloatType>(&mut group, &numbers, Some(&levels), Some(&repeats))?;

    let errors: Vec<Option<&str>> = lines.iter().map(|line| line.error.as_deref()).collect();
    texts(&mut group, errors.iter().flatten().copied(), &defined(&errors))?;
    let truncated: Vec<bool> = lines.iter().map(|line| line.truncated).collect();
    column::<BoolType>(&mut group, &truncated, None, None)?;
    group.close()?;
    Ok(())
}

/// Which of a column's values are there, as Parquet marks them.
fn defined<T>(values: &[Option<T>]) -> Vec<i16> {
    values.iter().map(|value| i16::from(value.is_some())).collect()
}

type Group<'g> = SerializedRowGroupWriter<'g, File>;

fn texts<'t>(group: &mut Group, there: impl Iterator<Item = &'t str>, levels: &[i16]) -> Result<()> {
    let bytes: Vec<ByteArray> = there.map(ByteArray::from).collect();
    column::<ByteArrayType>(group, &bytes, Some(levels), None)
}

/// Writes the next column: the values that are there, and the levels of all.
fn column<T: DataType>(
    group: &mut Group,
    there: &[T::T],
    levels: Option<&[i16]>,
    repeats: Option<&[i16]>,
) -> Result<()> {
    let mut column = group.next_column()?.context("the schema has fewer columns")?;
    column.typed::<T>().write_batch(there, levels, repeats)?;
    Ok(column.close()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::data::records::{self, How, Source};

    const BIG: &str = "12345678901234567890123";

    fn written(
        form: Matrix,
        lines: &[&str],
        width: usize,
    ) -> Result<(tempfile::TempDir, std::path::PathBuf)> {
        let dir = tempfile::tempdir()?;
        let (answers, path) = (dir.path().join("answers"), dir.path().join("matrix.parquet"));
        std::fs::write(&answers, lines.iter().map(|line| format!("{line}\n")).collect::<String>())?;
        MatrixFile { form, width, first: 0 }.write(&answers, &path)?;
        Ok((dir, path))
    }

    /// (header, numbers), as numpy.lib.format reads them.
    fn read_npy(bytes: &[u8]) -> (String, Vec<f32>) {
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        let begin = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert!(begin.is_multiple_of(64) && bytes[begin - 1] == b'\n');
        let numbers = bytes[begin..].chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        (String::from_utf8(bytes[10..begin].to_vec()).unwrap().trim_end().to_owned(), numbers.collect())
    }

    fn rows(path: &Path) -> Vec<Value> {
        let rows = records::read(&Source::Path(path.to_owned()), &How::default()).unwrap();
        rows.map(|row| Value::Object(row.unwrap().unwrap().fields)).collect()
    }

    #[test]
    fn a_row_stands_for_each_line() {
        let lines = [
            r#"{"index":0,"embedding":[1.0,-2.5]}"#,
            r#"{"index":1,"error":"no text"}"#,
            r#"{"index":2,"embedding":[0.1,3e-40],"truncated":true}"#,
        ];
        let (_dir, path) = written(Matrix::Npy, &lines, 2).unwrap();
        let (header, numbers) = read_npy(&std::fs::read(path).unwrap());
        assert_eq!(header, "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }");
        assert!(numbers[2].is_nan() && numbers[3].is_nan());
        assert_eq!([&numbers[..2], &numbers[4..]].concat(), [1.0, -2.5, 0.1, 3e-40]);
        let (_dir, path) = written(Matrix::Parquet, &lines, 2).unwrap();
        let rows = rows(&path);
        assert_eq!(rows[0], json!({"index": 0, "embedding": [1.0, -2.5], "error": null, "truncated": false}));
        assert_eq!(rows[1], json!({"index": 1, "embedding": null, "error": "no text", "truncated": false}));
        assert_eq!((&rows[2]["index"], &rows[2]["truncated"], rows.len()), (&json!(2), &json!(true), 3));
    }

    #[test]
    fn nothing_is_a_matrix_too() {
        let (_dir, path) = written(Matrix::Npy, &[], 384).unwrap();
        let (header, numbers) = read_npy(&std::fs::read(path).unwrap());
        assert!(header.contains("'shape': (0, 384)") && numbers.is_empty());
        let (_dir, path) = written(Matrix::Parquet, &[], 384).unwrap();
        assert!(rows(&path).is_empty());
    }

    #[test]
    fn ids_are_integers_where_all_are() {
        let ids = |ids: &[&str]| -> Vec<Value> {
            let lines: Vec<String> = ids.iter().map(|id| format!(r#"{{{}"embedding":[0.5]}}"#, id)).collect();
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            let (_dir, path) = written(Matrix::Parquet, &lines, 1).unwrap();
            rows(&path).iter().map(|row| row["id"].clone()).collect()
        };
        assert_eq!(ids(&[r#""id":7,"#, r#""index":1,"#, r#""id":-1,"#]), [json!(7), Value::Null, json!(-1)]);
        let big = format!(r#""id":{BIG},"#);
        assert_eq!(
            ids(&[r#""id":"é","#, r#""id":7,"#, &big, r#""id":[1, "a"],"#]),
            [json!("é"), json!("7"), json!(BIG), json!("[1, \"a\"]")]
        );
    }

    #[test]
    fn what_is_no_embedding_of_this_width_is_refused() {
        for form in [Matrix::Npy, Matrix::Parquet] {
            for bad in [
                r#"{"index":1,"embedding":[1.0]}"#,
                r#"{"index":1}"#,
                r#"{"index":1,"similarity":0.5}"#,
                "no JSON",
            ] {
                let error = written(form, &[r#"{"index":0,"embedding":[1.0,2.0]}"#, bad], 2).unwrap_err();
                assert!(format!("{error:#}").contains("answers:2"), "{form:?}, {bad}: {error:#}");
            }
        }
    }

    proptest! {
        /// The text of an answer loses nothing of a number.
        #[test]
        fn numbers_come_back_bit_for_bit(bits in proptest::collection::vec(any::<u32>(), 1..40)) {
            let row: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|x| x.is_finite()).collect();
            let numbers: Vec<Value> = row.iter().map(|&x| crate::task::scores::short(x)).collect();
            let line = json!({"index": 0, "embedding": numbers}).to_string();
            let (_dir, path) = written(Matrix::Npy, &[&line], row.len()).unwrap();
            let found = read_npy(&std::fs::read(path).unwrap()).1;
            prop_assert!(found.iter().zip(&row).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}
