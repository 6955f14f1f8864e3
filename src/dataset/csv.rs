//! Rows of CSV files with a header. Every cell is text: `007` stays `007`.

use std::collections::HashSet;
use std::path::Path;

use super::cell::{Cell, Row};
use super::guess::is_question_name;
use super::mapping::Pins;
use super::sniff::OpenFile;
use super::{DatasetError, Defect};

/// The rows of a CSV file; its first row names the columns.
pub fn rows(path: &Path, file: &OpenFile, pins: &Pins) -> Result<Vec<Row>, DatasetError> {
    let bytes = file.bytes.as_slice();
    let delimiter = delimiter(bytes);
    let mut reader = ::csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(delimiter)
        .from_reader(bytes);
    let mut rows = Vec::new();
    let mut header: Option<Vec<String>> = None;
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
        match &header {
            None => header = Some(header_names(path, &record, pins)?),
            Some(header) => {
                let fields = if to == bytes.len() && ends_in_quotes(stored, delimiter) {
                    Err(unclosed_quote(stored))
                } else {
                    fields(header, &record)
                };
                let raw = if fields.is_err() { stored } else { &[] };
                rows.push(Row {
                    line,
                    fields,
                    raw: raw.to_vec(),
                });
            }
        }
        line += count_lines(stored);
        from = to;
    }
    Ok(rows)
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

fn header_names(
    path: &Path,
    record: &::csv::ByteRecord,
    pins: &Pins,
) -> Result<Vec<String>, DatasetError> {
    let names: Vec<String> = record
        .iter()
        .map(|cell| String::from_utf8_lossy(cell).trim().to_owned())
        .collect();
    let is_known = |name: &String| is_question_name(name) || pins.names(name);
    if !names.iter().any(is_known) && looks_like_data(&names) {
        return Err(DatasetError::NoHeader {
            path: path.to_owned(),
            first_row: names,
        });
    }
    let mut seen = HashSet::new();
    if let Some(name) = names
        .iter()
        .find(|name| !name.is_empty() && !seen.insert(name.as_str()))
    {
        return Err(DatasetError::DoubledHeader {
            path: path.to_owned(),
            name: name.clone(),
        });
    }
    Ok(names)
}

/// Whether a first row without a known name is rather a row of data: a number, a sentence or a
/// doubled cell is no column's name.
fn looks_like_data(cells: &[String]) -> bool {
    let mut seen = HashSet::new();
    cells.iter().any(|cell| {
        cell.parse::<f64>().is_ok()
            || cell.contains(['?', '\n'])
            || cell.split_whitespace().count() > 4
            || (!cell.is_empty() && !seen.insert(cell))
    }) || cells.len() == 1
}

fn fields(header: &[String], record: &::csv::ByteRecord) -> Result<Vec<(String, Cell)>, Defect> {
    if record.len() != header.len() {
        return Err(Defect {
            field: None,
            message: format!(
                "the row has {} cells, the header {}",
                record.len(),
                header.len()
            ),
            hint: "put quotes around a cell that holds a separator".into(),
        });
    }
    header
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
