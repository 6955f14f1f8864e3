//! Rows of JSON lines and of JSON arrays.
//!
//! An array is cut into its elements before anything is parsed, so that one broken element is
//! one bad row and not the end of the file.

use std::path::Path;

use serde_json::value::RawValue;

use super::cell::{Row, object_from_json, object_parts};
use super::mapping::Pins;
use super::names::{QUESTION_NAMES, plain_name};
use super::sniff::{Format, OpenFile};
use super::{DatasetError, Defect};

/// The fields under which a JSON object holds its rows.
const ROWS_FIELDS: [&str; 17] = [
    "examples",
    "data",
    "rows",
    "questions",
    "items",
    "records",
    "instances",
    "problems",
    "prompts",
    "tasks",
    "samples",
    "entries",
    "dataset",
    "test",
    "validation",
    "dev",
    "train",
];

/// The rows of a JSON or JSON lines file.
pub fn rows(path: &Path, file: &OpenFile, pins: &Pins) -> Result<Vec<Row>, DatasetError> {
    let bytes = file.bytes.as_slice();
    let rows = match file.format {
        Format::Json => {
            let held = match bytes.trim_ascii_start().first() {
                Some(b'{') => held_array(path, bytes, pins)?,
                _ => None,
            };
            array_rows(bytes, held).unwrap_or_else(|| line_rows(bytes))
        }
        _ => line_rows(bytes),
    };
    let first = match rows.first() {
        Some(row) => row.fields.as_ref().err(),
        None => return Ok(rows),
    };
    if let Some(defect) = first
        && rows.iter().all(|row| row.fields.is_err())
    {
        return Err(DatasetError::NoObjects {
            path: path.to_owned(),
            n_rows: rows.len(),
            first: defect.message.clone(),
        });
    }
    Ok(rows)
}

/// One row a line; blank lines are none. A file whose first line is no whole value may hold
/// objects over several lines (as `jq` writes them).
fn line_rows(bytes: &[u8]) -> Vec<Row> {
    let lines: Vec<Row> = bytes
        .split(|&byte| byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(index, line)| row(index + 1, line.trim_ascii()))
        .collect();
    let first_is_broken = lines.first().is_some_and(|row| row.fields.is_err());
    if first_is_broken && let Some(objects) = stream_rows(bytes) {
        return objects;
    }
    lines
}

/// Objects one after another, whatever their lines; absent if anything else is there.
fn stream_rows(bytes: &[u8]) -> Option<Vec<Row>> {
    let mut lines = LineCounter::new(bytes);
    let mut rows = Vec::new();
    let mut at = 0;
    while let Some(skip) = bytes
        .get(at..)?
        .iter()
        .position(|b| !b.is_ascii_whitespace())
    {
        let from = at + skip;
        let to = from + value_end(bytes.get(from..)?)?;
        let row = row(lines.at(from), bytes.get(from..to)?);
        row.fields.as_ref().ok()?;
        rows.push(row);
        at = to;
    }
    Some(rows)
}

/// The elements of an array that is the whole file, or of the one that begins at `held`.
fn array_rows(bytes: &[u8], held: Option<usize>) -> Option<Vec<Row>> {
    let start = bytes.iter().position(|b| !b.is_ascii_whitespace())?;
    let start = match bytes.get(start)? {
        b'[' => start,
        _ => match held {
            Some(start) => start,
            None => {
                // A file that is one object is one row.
                let line = LineCounter::new(bytes).at(start);
                let row = row(line, bytes.trim_ascii());
                return row.fields.is_ok().then(|| vec![row]);
            }
        },
    };
    let is_whole_file = bytes.get(..start)?.trim_ascii().is_empty();
    let mut lines = LineCounter::new(bytes);
    let mut rows = Vec::new();
    let mut at = start + 1;
    loop {
        at += bytes
            .get(at..)?
            .iter()
            .position(|b| !b.is_ascii_whitespace() && *b != b',')
            .unwrap_or(bytes.len() - at);
        match bytes.get(at) {
            // The array is not closed: what is there counts.
            None => return Some(rows),
            Some(b']') => break,
            Some(_) => {}
        }
        let rest = bytes.get(at..)?;
        let end = at + element_end(rest);
        rows.push(row(lines.at(at), bytes.get(at..end)?.trim_ascii()));
        at = end;
    }
    let after = bytes.get(at + 1..)?.trim_ascii();
    // More after the array: then each line was an array, and no line is an object.
    (!is_whole_file || after.is_empty()).then_some(rows)
}

/// Where the array begins that an object holds: under the pinned field, else under the only one
/// of [`ROWS_FIELDS`] that holds objects. Absent where the object is a row itself.
fn held_array(path: &Path, bytes: &[u8], pins: &Pins) -> Result<Option<usize>, DatasetError> {
    let held = objects_by_field(bytes).unwrap_or_default();
    if let Some(field) = &pins.rows {
        return match held.iter().find(|(name, _)| name == field) {
            Some((_, start)) => Ok(Some(*start)),
            None => Err(DatasetError::PinnedField {
                path: path.to_owned(),
                key: "rows",
                field: field.clone(),
                fields: held.into_iter().map(|(name, _)| name).collect(),
            }),
        };
    }
    let likely: Vec<&(String, usize)> = held
        .iter()
        .filter(|(name, _)| ROWS_FIELDS.contains(&plain_name(name).as_str()))
        .collect();
    match likely.as_slice() {
        [] => Ok(None),
        [(_, start)] => Ok(Some(*start)),
        _ => {
            let names: Vec<String> = likely.iter().map(|(name, _)| name.clone()).collect();
            Err(DatasetError::Ambiguous {
                path: path.to_owned(),
                role: "list of rows",
                mends: names.iter().map(|it| ("rows", it.clone())).collect(),
                candidates: names,
            })
        }
    }
}

/// The fields of a file that is one JSON object which hold arrays of objects, and where these
/// begin; none where the object has a question of its own.
fn objects_by_field(bytes: &[u8]) -> Option<Vec<(String, usize)>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let parts: Vec<(String, &RawValue)> = object_parts(text)?;
    let has_question = parts.iter().any(|(name, raw)| {
        let is_text = raw.get().starts_with('"');
        is_text && QUESTION_NAMES[0].contains(&plain_name(name).as_str())
    });
    if has_question {
        return None;
    }
    let held = parts.into_iter().filter_map(|(name, raw)| {
        let inner = raw.get().strip_prefix('[')?.trim_start();
        // The raw value is borrowed from the text: its distance is its place.
        let start = (raw.get().as_ptr() as usize).checked_sub(bytes.as_ptr() as usize)?;
        inner.starts_with('{').then_some((name, start))
    });
    Some(held.collect())
}

/// The length of an array's element: up to the comma or bracket that ends it.
fn element_end(bytes: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut in_text = false;
    let mut escaped = false;
    for (index, &byte) in bytes.iter().enumerate() {
        if in_text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_text = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_text = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b',' | b']' if depth == 0 => return index,
            _ => {}
        }
    }
    bytes.len()
}

/// The length of the object that the bytes begin with.
fn value_end(bytes: &[u8]) -> Option<usize> {
    let mut stream = serde_json::Deserializer::from_slice(bytes).into_iter::<&RawValue>();
    stream.next()?.ok()?;
    Some(stream.byte_offset())
}

fn row(line: usize, bytes: &[u8]) -> Row {
    let fields = match std::str::from_utf8(bytes) {
        Ok(text) => object_from_json(text).map_err(|reason| Defect {
            field: None,
            message: if reason.starts_with("the row is") {
                reason
            } else {
                format!("the row is not JSON: {reason}")
            },
            hint: "write the row as one JSON object; a quote inside a text is `\\\"`, a line \
                   break `\\n`"
                .into(),
        }),
        Err(error) => Err(Defect {
            field: None,
            message: format!("byte {} of the row is not UTF-8", error.valid_up_to() + 1),
            hint: "save the file as UTF-8".into(),
        }),
    };
    let raw = if fields.is_err() {
        bytes.to_vec()
    } else {
        Vec::new()
    };
    Row { line, fields, raw }
}

/// Line numbers of rising offsets.
struct LineCounter<'a> {
    bytes: &'a [u8],
    at: usize,
    line: usize,
}

impl<'a> LineCounter<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            line: 1,
        }
    }

    fn at(&mut self, offset: usize) -> usize {
        let passed = self.bytes.get(self.at..offset).unwrap_or_default();
        self.line += passed.iter().filter(|&&byte| byte == b'\n').count();
        self.at = offset;
        self.line
    }
}
