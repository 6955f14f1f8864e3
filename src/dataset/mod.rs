//! Records out of prompt files: readers for JSONL, JSON arrays, CSV and Parquet (each also
//! gzipped), and the mapping of their fields found out from the whole file.
//!
//! A record keeps its file and line, so that every later message can name them. A row that
//! cannot be used is a record with a [`Defect`], never a missing row. This module knows nothing
//! of prompts, models or flags.
//!
//! [`read`] goes through `sniff` (bytes, format), `json`, `csv` or `parquet` (rows of cells),
//! `guess` and `headless` (which field is what: the `mapping`, by `names` and by content),
//! `options`, `inline` and `gold` (their spellings), `build` (records) and `visible` (what of a
//! row a template may use).

mod build;
mod cell;
mod csv;
mod error;
mod gold;
mod guess;
mod headless;
mod inline;
mod json;
mod mapping;
mod names;
mod options;
mod parquet;
mod sniff;
#[cfg(test)]
mod tests;
mod visible;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use error::DatasetError;
pub use mapping::{GoldKind, Mapping, OptionsSource, Pins};
pub use sniff::Format;

/// Where a record stands. `line` is the line its row begins on (for a JSON array: the line the
/// element begins on; in a Parquet file, which has no lines, the row), counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Location {
    pub file: PathBuf,
    pub line: usize,
}

/// The expected answer, as the file gives it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "kind", content = "value", rename_all = "snake_case")]
pub enum Gold {
    /// An option's index, counted from 0 whatever the file counts from.
    Option(usize),
    /// Any other answer, spelled as the file spells it.
    Text(String),
}

/// A turn of a `messages` row.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// One input row.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Record {
    /// The id as text, else a content hash and an occurrence number; unique within a data set.
    pub key: String,
    /// The id with its JSON type and spelling; absent when the file has none. Written back to
    /// submissions as it came (`007` stays `007`: from CSV an id is always a string). A number
    /// that JSON values cannot hold as spelled (`1.50`, 30 digits) is a string.
    pub id: Option<Value>,
    pub location: Location,
    pub question: String,
    /// Turns that replace the question; empty for most rows.
    pub messages: Vec<Message>,
    pub options: Vec<String>,
    pub gold: Option<Gold>,
    pub group: Option<String>,
    pub cluster: Option<String>,
    /// The row's other fields, for a profile's template. Never the gold, nor a field that a gold
    /// answer goes by.
    pub fields: Map<String, Value>,
    /// Why the row cannot be run; such a row gets status `error`.
    pub defect: Option<Defect>,
}

/// Why a row cannot be run: what, in which field, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Defect {
    pub field: Option<String>,
    pub message: String,
    pub hint: String,
}

/// A prompt file, read.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub path: PathBuf,
    /// SHA-256 of the decompressed bytes, in hex.
    pub content_hash: String,
    pub format: Format,
    /// Which field is what.
    pub mapping: Mapping,
    /// One for each row, in the file's order.
    pub records: Vec<Record>,
}

/// Reads a prompt file, guessing its mapping.
///
/// # Errors
/// When the file as a whole cannot be used; a bad row is a record with a defect.
pub fn read(path: &Path) -> Result<Dataset, DatasetError> {
    read_with(path, &Pins::default())
}

/// Reads a prompt file with parts of the mapping given.
///
/// # Errors
/// As [`read`], and when a pinned field is in no row.
pub fn read_with(path: &Path, pins: &Pins) -> Result<Dataset, DatasetError> {
    let file = sniff::open(path)?;
    let format = file.format;
    let content_hash = file.content_hash.clone();
    let mut pins = std::borrow::Cow::Borrowed(pins);
    let rows = match format {
        Format::Jsonl | Format::Json => json::rows(path, &file, &pins)?,
        Format::Csv => {
            let table = csv::read(path, &file, &pins)?;
            if !table.has_header && !table.rows.is_empty() {
                pins = std::borrow::Cow::Owned(headless::pins(path, &table.rows, &pins)?);
            }
            table.rows
        }
        Format::Parquet => parquet::rows(path, file)?,
    };
    if rows.is_empty() {
        return Err(DatasetError::NoRows {
            path: path.to_owned(),
        });
    }
    let mapping = guess::mapping(path, &rows, &pins)?;
    let (mapping, records) = build::records(path, rows, mapping, &pins)?;
    Ok(Dataset {
        path: path.to_owned(),
        content_hash,
        format,
        mapping,
        records,
    })
}
