//! Parquet columns → rows of JSON values.

use std::fs::File;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Number, Value};

use super::{Item, Row};
use crate::{Result, unusable};

/// The rows of a Parquet file.
pub(super) fn rows(file: File, name: &str) -> Result<Box<dyn Iterator<Item = Item> + Send>> {
    let reader = SerializedFileReader::new(file)
        .map_err(|error| unusable!("{name} can't be read as Parquet: {error}"))?;
    // RowIter takes it for granted that every row group can be opened
    for i in 0..reader.num_row_groups() {
        reader.get_row_group(i).map_err(|error| unusable!("{name}: row group {i}: {error}"))?;
    }
    Ok(Box::new(
        RowIter::from_file_into(Box::new(reader))
            .enumerate()
            .map(|(i, record)| Ok(Ok(Row { line: i + 1, fields: fields(record?) }))),
    ))
}

/// Null is an absent field.
fn fields(record: Record) -> Map<String, Value> {
    let columns = record.into_columns().into_iter();
    columns.map(|(name, field)| (name, value(field))).filter(|(_, value)| !value.is_null()).collect()
}

fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => number(value.to_f64()),
        Field::Float(value) => number(value.into()),
        Field::Double(value) => number(value),
        Field::Str(value) => value.into(),
        // strings of writers that don't mark them as such
        Field::Bytes(value) => String::from_utf8_lossy(value.data()).into(),
        Field::Group(record) => fields(record).into(),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        // dates, times, decimals and maps, as they are printed
        other => other.to_string().into(),
    }
}

/// JSON has no NaN and no infinity: they are given as text, so that an error can show them.
fn number(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number)
}
