//! Parquet columns → rows of JSON values.

use std::fs::File;
use std::sync::Arc;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::{ColumnDescriptor, Type};
use serde_json::{Map, Number, Value, json};

use super::columns::UNREADABLE;
use super::{BadRow, Item, Row, TextEncoding};
use crate::{Result, bail_unusable, unusable};

/// The rows of a Parquet file; `encoding` is that of strings that are not marked as such.
pub(super) fn rows(
    file: File,
    encoding: Option<TextEncoding>,
    name: &str,
) -> Result<Box<dyn Iterator<Item = Item> + Send>> {
    let unreadable = |error| unusable!("{name} can't be read as Parquet: {error}");
    let reader = SerializedFileReader::new(file).map_err(unreadable)?;
    // RowIter takes it for granted that every row group can be opened
    for i in 0..reader.num_row_groups() {
        reader.get_row_group(i).map_err(|error| unusable!("{name}: row group {i}: {error}"))?;
    }
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let columns = schema.root_schema().get_fields();
    for (i, column) in columns.iter().enumerate() {
        if let Some(first) = columns[..i].iter().position(|other| other.name() == column.name()) {
            bail_unusable!("{name}: columns {} and {} are both named {:?}", first + 1, i + 1, column.name());
        }
    }
    // the crate's records panic at these types: they are left out, and whoever uses one is told
    let mut odd: Vec<Option<String>> = vec![None; columns.len()];
    for (i, leaf) in schema.columns().iter().enumerate() {
        if !is_readable(leaf) {
            let of = leaf
                .logical_type_ref()
                .map_or_else(|| leaf.converted_type().to_string(), |of| format!("{of:?}"));
            odd[schema.get_column_root_idx(i)] = Some(format!("{} {of}", leaf.physical_type()));
        }
    }
    let kept: Vec<Arc<Type>> =
        columns.iter().zip(&odd).filter(|(_, odd)| odd.is_none()).map(|(column, _)| column.clone()).collect();
    if kept.is_empty() {
        bail_unusable!("{name} has no column of a type that can be read");
    }
    let projection = Type::group_type_builder(schema.root_schema().name())
        .with_fields(kept)
        .build()
        .map_err(unreadable)?;
    let records = RowIter::from_file_into(Box::new(reader)).project(Some(projection)).map_err(unreadable)?;
    let left_out: Map<String, Value> = columns
        .iter()
        .zip(odd)
        .filter_map(|(column, odd)| Some((column.name().to_owned(), json!({UNREADABLE: odd?}))))
        .collect();
    Ok(Box::new(records.enumerate().map(move |(i, record)| {
        let line = i + 1;
        let record = record.map_err(|error| unusable!("record {line}: {error}"))?;
        Ok(fields(record, encoding).map_err(|message| BadRow { line, message }).map(|mut fields| {
            fields.extend(left_out.clone());
            Row::new(line, fields)
        }))
    })))
}

/// How many rows a Parquet file says that it has.
pub(super) fn count(file: File, name: &str) -> Result<usize> {
    let reader = SerializedFileReader::new(file)
        .map_err(|error| unusable!("{name} can't be read as Parquet: {error}"))?;
    // as RowIter counts them
    let rows = reader.metadata().row_groups().iter().map(|group| group.num_rows());
    rows.map(|rows| usize::try_from(rows).unwrap_or(0))
        .try_fold(0, usize::checked_add)
        .ok_or_else(|| unusable!("{name} says that it has more rows than can be counted"))
}

/// Whether `parquet::record` makes something of a column's type.
fn is_readable(leaf: &ColumnDescriptor) -> bool {
    use ConvertedType::*;
    let is_half = leaf.logical_type_ref() == Some(&LogicalType::Float16);
    match (leaf.physical_type(), leaf.converted_type()) {
        (Physical::INT32, of) => matches!(
            of,
            NONE | INT_8 | INT_16 | INT_32 | UINT_8 | UINT_16 | UINT_32 | DATE | TIME_MILLIS | DECIMAL
        ),
        (Physical::INT64, of) => matches!(
            of,
            NONE | INT_64 | UINT_64 | TIME_MICROS | TIMESTAMP_MILLIS | TIMESTAMP_MICROS | DECIMAL
        ),
        (Physical::BYTE_ARRAY, of) => matches!(of, NONE | UTF8 | ENUM | JSON | BSON | DECIMAL),
        (Physical::FIXED_LEN_BYTE_ARRAY, NONE) => !is_half || leaf.type_length() == 2,
        (Physical::FIXED_LEN_BYTE_ARRAY, of) => of == DECIMAL,
        _ => true,
    }
}

fn fields(record: Record, encoding: Option<TextEncoding>) -> Result<Map<String, Value>, String> {
    let columns = record.into_columns().into_iter();
    columns
        .map(|(name, field)| match value(field, encoding) {
            Ok(value) => Ok((name, value)),
            Err(error) => Err(format!("field {name:?} is {error}")),
        })
        .collect()
}

fn value(field: Field, encoding: Option<TextEncoding>) -> Result<Value, String> {
    Ok(match field {
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
        Field::Bytes(value) => text(value.data(), encoding)?.into(),
        Field::Group(record) => fields(record, encoding)?.into(),
        Field::ListInternal(list) => list
            .elements()
            .iter()
            .cloned()
            .map(|field| value(field, encoding))
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        // beyond what a calendar holds, these can't be printed
        Field::Date(days) if days.unsigned_abs() > DAYS => days.into(),
        Field::TimestampMillis(ms) if ms.unsigned_abs() > DAY_MS * u64::from(DAYS) => ms.into(),
        Field::TimestampMicros(us) if us.unsigned_abs() / 1000 > DAY_MS * u64::from(DAYS) => us.into(),
        // dates, times, decimals and maps, as they are printed
        other => other.to_string().into(),
    })
}

/// A hundred thousand years and more.
const DAYS: u32 = 40_000_000;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

fn text(bytes: &[u8], encoding: Option<TextEncoding>) -> Result<String, String> {
    match encoding {
        Some(encoding) => encoding.decode(bytes).ok_or_else(|| format!("not {encoding}")),
        None => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => {
                Err(format!("not UTF-8: byte {}; --encoding names another encoding", error.valid_up_to() + 1))
            }
        },
    }
}

/// JSON has no NaN and no infinity: they are given as text, so that an error can show them.
fn number(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number)
}
