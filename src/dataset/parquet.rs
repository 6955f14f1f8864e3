//! Rows of Parquet files, with the `parquet` crate alone (no Arrow).
//!
//! Numbers are spelled as the shortest text that gives them again. A row has no line; its number
//! stands in the line's place.

use std::path::Path;

use ::parquet::data_type::Decimal;
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row as ParquetRow};

use super::DatasetError;
use super::cell::{Cell, Row};
use super::sniff::OpenFile;

/// The rows of a Parquet file.
pub fn rows(path: &Path, file: OpenFile) -> Result<Vec<Row>, DatasetError> {
    let bytes = bytes::Bytes::from(file.bytes);
    contained(|| read(bytes)).map_err(|reason| DatasetError::Parquet {
        path: path.to_owned(),
        reason,
    })
}

fn read(bytes: bytes::Bytes) -> Result<Vec<Row>, ParquetError> {
    let reader = SerializedFileReader::new(bytes)?;
    let mut rows = Vec::new();
    for (index, row) in reader.get_row_iter(None)?.enumerate() {
        rows.push(Row {
            line: index + 1,
            fields: Ok(fields(row?)),
            raw: Vec::new(),
        });
    }
    Ok(rows)
}

thread_local! {
    /// Whether a panic of this thread is about to be caught, so that nobody need hear of it.
    static CONTAINED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs the crate's reader, which panics on some damaged files (version 60: a negative offset in
/// the footer) where it should give an error.
fn contained<T>(
    read: impl FnOnce() -> Result<T, ParquetError> + std::panic::UnwindSafe,
) -> Result<T, String> {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                loud(info);
            }
        }));
    });
    CONTAINED.set(true);
    let outcome = std::panic::catch_unwind(read);
    CONTAINED.set(false);
    match outcome {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("its parts contradict each other".to_owned()),
    }
}

fn fields(row: ParquetRow) -> Vec<(String, Cell)> {
    row.into_columns()
        .into_iter()
        .map(|(name, field)| (name, cell(field)))
        .collect()
}

fn cell(field: Field) -> Cell {
    match field {
        Field::Null => Cell::Null,
        Field::Bool(value) => Cell::Bool(value),
        Field::Str(text) => Cell::Text(text),
        // Files of writers that do not mark their texts as such.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Cell::Text(text.to_owned()),
            // A picture or the like: nothing a prompt could hold.
            Err(_) => Cell::Null,
        },
        Field::Group(row) => Cell::Object(fields(row)),
        Field::ListInternal(list) => {
            Cell::List(list.elements().iter().cloned().map(cell).collect())
        }
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| {
                let key = cell(key.clone()).scalar().unwrap_or_default();
                (key, cell(value.clone()))
            };
            Cell::Object(map.entries().iter().map(entry).collect())
        }
        Field::Byte(n) => number(n),
        Field::Short(n) => number(n),
        Field::Int(n) => number(n),
        Field::Long(n) => number(n),
        Field::UByte(n) => number(n),
        Field::UShort(n) => number(n),
        Field::UInt(n) => number(n),
        Field::ULong(n) => number(n),
        Field::Float16(value) => float(f64::from(value)),
        // Through its own text, as 0.1 of 32 bits is not 0.1 of 64.
        Field::Float(value) if value.is_finite() => Cell::Number(format!("{value:?}")),
        Field::Float(_) => Cell::Null,
        Field::Double(value) => float(value),
        Field::Decimal(value) => Cell::Number(decimal(&value)),
        Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => Cell::Text(field.to_string()),
    }
}

fn number(n: impl ToString) -> Cell {
    Cell::Number(n.to_string())
}

/// pandas writes a missing value among floats as NaN.
fn float(value: f64) -> Cell {
    if value.is_finite() {
        Cell::Number(format!("{value:?}"))
    } else {
        Cell::Null
    }
}

/// A decimal with all its digits: the big-endian two's complement of its unscaled value.
fn decimal(value: &Decimal) -> String {
    let bytes = value.data();
    let negative = bytes.first().is_some_and(|byte| byte & 0x80 != 0);
    let fill: i128 = if negative { -1 } else { 0 };
    let unscaled = bytes
        .iter()
        .fold(fill, |sum, &byte| (sum << 8) | i128::from(byte));
    let scale = usize::try_from(value.scale()).unwrap_or(0);
    let digits = format!("{:0>width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let sign = if negative { "-" } else { "" };
    let point = if scale > 0 { "." } else { "" };
    format!("{sign}{whole}{point}{fraction}")
}
