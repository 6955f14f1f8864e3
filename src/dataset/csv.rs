//! Rows of CSV files, with a header or without. Every cell is text: `007` stays `007`.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::cell::{Cell, Row};

use super::mapping::Pins;
use super::names::is_question_name;
use super::sniff::OpenFile;
use super::{DatasetError, Defect, headless};

/// The rows of a CSV file.
pub struct Table {
    pub rows: Vec<Row>,
    /// Whether the first row names the columns; without, they are numbered from 1.
    pub has_header: bool,
}

/// A row as it stands in the file.
struct Stored<'a> {
    line: usize,
    bytes: &'a [u8],
    cells: ::csv::ByteRecord,
}

/// Reads a CSV file; whether it has a header is told from the whole of it.
pub fn read(path: &Path, file: &OpenFile, pins: &Pins) -> Result<Table, DatasetError> {
    let bytes = file.bytes.as_slice();
    let delimiter = delimiter(bytes);
    let stored = stored_rows(bytes, delimiter);
    let has_header = has_header(&stored, pins);
    let (names, data) = match stored.split_first() {
        Some((first, rest)) if has_header => (header_names(path, &first.cells)?, rest),
        _ => (numbers(&stored), stored.as_slice()),
    };
    let n_data = data.len();
    let rows = data.iter().enumerate().map(|(index, row)| {
        let fields = if index + 1 == n_data && ends_in_quotes(row.bytes, delimiter) {
            Err(unclosed_quote(row.bytes))
        } else {
            fields(&names, &row.cells, has_header)
        };
        let raw = if fields.is_err() { row.bytes } else { &[] };
        Row {
            line: row.line,
            fields,
            raw: raw.to_vec(),
        }
    });
    Ok(Table {
        rows: rows.collect(),
        has_header,
    })
}

fn stored_rows(bytes: &[u8], delimiter: u8) -> Vec<Stored<'_>> {
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(delimiter)
        .from_reader(bytes);
    let mut rows = Vec::new();
    let mut record = ::csv::ByteRecord::new();
    let mut from = 0;
    let mut line = 1;
    // Reading from memory into bytes can meet neither IO errors nor, being flexible, others.
    while let Ok(true) = reader.read_byte_record(&mut record) {
        let to = usize::try_from(reader.position().byte()).unwrap_or(bytes.len());
        let stored = bytes.get(from..to).unwrap_or_default();
        // The crate skips blank lines before a row; the row begins after them.
        let n_blank = stored
            .iter()
            .take_while(|byte| matches!(byte, b'\n' | b'\r'))
            .count();
        let (blank, stored) = stored.split_at(n_blank);
        line += count_lines(blank);
        rows.push(Stored {
            line,
            bytes: stored,
            cells: record.clone(),
        });
        line += count_lines(stored);
        from = to;
    }
    rows
}

/// Whether the first row names the columns: because the profile says so, because it has a name
/// that is known, or because it does not look like the rows below it.
fn has_header(rows: &[Stored], pins: &Pins) -> bool {
    if let Some(has_header) = pins.header {
        return has_header;
    }
    let Some((first, rest)) = rows.split_first() else {
        return true;
    };
    let first: Vec<&str> = first.cells.iter().map(headless::plain).collect();
    let is_known = |name: &&str| is_question_name(name) || pins.names(name);
    if first.iter().any(is_known) {
        return true;
    }
    let rest: Vec<Vec<&str>> = rest
        .iter()
        .map(|row| row.cells.iter().map(headless::plain).collect())
        .collect();
    !headless::looks_like_data(&first, &rest)
}

/// `1`, `2`, … for as many columns as most rows have.
fn numbers(rows: &[Stored]) -> Vec<String> {
    let mut counts: HashMap<usize, usize> = HashMap::new();
    for row in rows {
        *counts.entry(row.cells.len()).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|&(n_cells, n)| (n, n_cells));
    (1..=most.map_or(0, |it| it.0))
        .map(|n| n.to_string())
        .collect()
}

fn count_lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}

/// The separator that the header uses most, outside quotes.
fn delimiter(bytes: &[u8]) -> u8 {
    let mut quoted = false;
    let mut counts = [(b',', 0), (b'\t', 0), (b';', 0)];
    for &byte in bytes.trim_ascii_start() {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            _ if !quoted => {
                if let Some(count) = counts.iter_mut().find(|count| count.0 == byte) {
                    count.1 += 1;
                }
            }
            _ => {}
        }
    }
    let [comma, others @ ..] = counts;
    others
        .into_iter()
        .fold(comma, |best, it| if it.1 > best.1 { it } else { best })
        .0
}

fn header_names(path: &Path, record: &::csv::ByteRecord) -> Result<Vec<String>, DatasetError> {
    let names: Vec<String> = record
        .iter()
        .map(|cell| String::from_utf8_lossy(cell).trim().to_owned())
        .collect();
    let mut seen = HashSet::new();
    match names
        .iter()
        .find(|name| !name.is_empty() && !seen.insert(name.as_str()))
    {
        Some(name) => Err(DatasetError::DoubledHeader {
            path: path.to_owned(),
            name: name.clone(),
        }),
        None => Ok(names),
    }
}

fn fields(
    names: &[String],
    record: &::csv::ByteRecord,
    has_header: bool,
) -> Result<Vec<(String, Cell)>, Defect> {
    if record.len() != names.len() {
        let others = if has_header {
            "the header"
        } else {
            "most rows"
        };
        return Err(Defect {
            field: None,
            message: format!(
                "the row has {} cells, {others} {}",
                record.len(),
                names.len()
            ),
            hint: "put quotes around a cell that holds a separator".into(),
        });
    }
    names
        .iter()
        .zip(record)
        .map(|(name, cell)| match std::str::from_utf8(cell) {
            Ok(text) => Ok((name.clone(), Cell::Text(text.to_owned()))),
            Err(error) => Err(Defect {
                field: Some(name.clone()),
                message: format!("byte {} of the cell is not UTF-8", error.valid_up_to() + 1),
                hint: "save the file as UTF-8".into(),
            }),
        })
        .collect()
}

fn unclosed_quote(stored: &[u8]) -> Defect {
    Defect {
        field: None,
        message: format!(
            "a quote is opened and never closed: the row takes in the rest of the file, {} lines",
            count_lines(stored.trim_ascii_end()) + 1
        ),
        hint: "close the quote; inside a quoted cell a quote is written twice".into(),
    }
}

/// Whether a row's bytes end inside a quoted cell, which only the last row of a file can.
fn ends_in_quotes(stored: &[u8], delimiter: u8) -> bool {
    let mut quoted = false;
    let mut at_cell_start = true;
    let mut after_quote = false;
    for &byte in stored {
        if quoted {
            quoted = byte != b'"';
            after_quote = !quoted;
        } else if byte == b'"' && (at_cell_start || after_quote) {
            quoted = true;
            after_quote = false;
        } else {
            after_quote = false;
        }
        at_cell_start = !quoted && (byte == delimiter || matches!(byte, b'\n' | b'\r'));
    }
    quoted
}
