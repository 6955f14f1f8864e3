//! A table held against the format and the data set: columns, cells, ids.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{ExpectedRow, Kind, Notes, Table};
use crate::score::option_letter;
use crate::submission::format::{Column, ColumnValue, SubmissionFormat};
use crate::submission::null_words::{has_stop, is_null_word};

/// Checks all cells; gives how many hold a null word with a full stop behind it.
pub(super) fn check(
    table: &Table,
    format: &SubmissionFormat,
    expected: Option<&[ExpectedRow]>,
    notes: &mut Notes,
) -> usize {
    check_columns(table, format, notes);
    let by_id: Option<HashMap<&str, &ExpectedRow>> =
        expected.map(|rows| rows.iter().map(|row| (row.id.as_str(), row)).collect());
    let id_column = format
        .columns
        .iter()
        .find(|column| column.value == ColumnValue::Id)
        .and_then(|column| table.columns.iter().position(|name| *name == column.name));
    let columns: Vec<(usize, &Column)> = format
        .columns
        .iter()
        .filter_map(|column| {
            let place = table.columns.iter().position(|name| *name == column.name)?;
            Some((place, column))
        })
        .collect();
    let mut n_stopped_words = 0;
    for (index, row) in table.rows.iter().enumerate() {
        let id = id_column
            .and_then(|place| row.cells.get(place))
            .and_then(|cell| cell.as_deref());
        let known = id.and_then(|id| by_id.as_ref()?.get(id).copied());
        for &(place, column) in &columns {
            // A cell that a short row lacks was told with the row; in JSONL, null is a cell.
            let Some(cell) = row.cells.get(place) else {
                continue;
            };
            let cell = cell.as_deref().unwrap_or_default();
            n_stopped_words += usize::from(column.never_null && has_stop(cell));
            if let Some((kind, message)) = wrong(cell, column, format, known, by_id.is_some()) {
                notes.cell(
                    kind,
                    Some(index + 1),
                    Some(row.line),
                    Some(&column.name),
                    message,
                );
            }
        }
    }
    if let Some(place) = id_column {
        check_ids(table, place, expected, notes);
    }
    n_stopped_words
}

fn check_columns(table: &Table, format: &SubmissionFormat, notes: &mut Notes) {
    let wanted: Vec<&str> = format
        .columns
        .iter()
        .map(|column| column.name.as_str())
        .collect();
    if table.columns.is_empty() {
        notes.file(Kind::Columns, "it is empty, without a header".to_owned());
    } else if table.columns != wanted {
        notes.file(
            Kind::Columns,
            format!(
                "the columns are `{}`, expected `{}`",
                table.columns.join("`, `"),
                wanted.join("`, `")
            ),
        );
    }
}

/// What is wrong with a cell.
fn wrong(
    cell: &str,
    column: &Column,
    format: &SubmissionFormat,
    known: Option<&ExpectedRow>,
    has_dataset: bool,
) -> Option<(Kind, String)> {
    if column.never_null && cell.trim().is_empty() {
        return Some((Kind::Empty, "the cell is empty".to_owned()));
    }
    if column.never_null && is_null_word(cell) {
        return Some((
            Kind::NullWord,
            format!("pandas reads `{}` as a missing value", cell.trim()),
        ));
    }
    let sentinel = format.missing_in(column);
    if cell == sentinel {
        return None;
    }
    match column.value {
        ColumnValue::Choice => {
            let options = known.and_then(|row| row.options.as_ref());
            let is_choice = match options {
                Some(options) => (0..options.len()).any(|index| option_letter(index) == cell),
                None => matches!(cell.as_bytes(), [b'A'..=b'Z']),
            };
            // A row that is not the data set's is told by its id.
            let is_told = has_dataset && known.is_none();
            (!is_choice && !is_told).then(|| {
                let among = match options.map(Vec::len) {
                    Some(0) => "the row has no options".to_owned(),
                    Some(1) => "the row has the option A alone".to_owned(),
                    Some(n) => format!("the row has the options A to {}", option_letter(n - 1)),
                    None => "it is no letter".to_owned(),
                };
                let or = match sentinel {
                    "" => String::new(),
                    sentinel => format!(", and it is not `{sentinel}`"),
                };
                (Kind::Choice, format!("`{}`: {among}{or}", short(cell)))
            })
        }
        ColumnValue::Reasoning => not_messages(cell).map(|reason| (Kind::NotJson, reason)),
        _ => None,
    }
}

/// Why a text is not a conversation in JSON.
fn not_messages(text: &str) -> Option<String> {
    let turns: Vec<Value> = match serde_json::from_str(text) {
        Ok(turns) => turns,
        Err(error) => return Some(format!("it is not a JSON list of messages: {error}")),
    };
    let is_message = |turn: &Value| {
        let has = |key: &str| turn.get(key).is_some_and(Value::is_string);
        has("role") && has("content")
    };
    let wrong = turns.iter().position(|turn| !is_message(turn))?;
    Some(format!(
        "its message {} has no `role` and `content`",
        wrong + 1
    ))
}

/// Every id once, none too many, in the data set's order.
fn check_ids(table: &Table, place: usize, expected: Option<&[ExpectedRow]>, notes: &mut Notes) {
    let column = table.columns.get(place).map(String::as_str);
    let known: Option<HashSet<&str>> =
        expected.map(|rows| rows.iter().map(|row| row.id.as_str()).collect());
    let mut first_row: HashMap<&str, usize> = HashMap::new();
    let mut in_order = Vec::new();
    let mut all_known = true;
    for (index, row) in table.rows.iter().enumerate() {
        let Some(id) = row.cells.get(place).and_then(|cell| cell.as_deref()) else {
            all_known = false;
            continue;
        };
        let mut note = |kind, message| {
            all_known = false;
            notes.cell(kind, Some(index + 1), Some(row.line), column, message);
        };
        if let Some(first) = first_row.get(id) {
            note(
                Kind::IdDoubled,
                format!("id `{}` is that of row {first} already", short(id)),
            );
            continue;
        }
        first_row.insert(id, index + 1);
        in_order.push(id);
        if known.as_ref().is_some_and(|known| !known.contains(id)) {
            note(
                Kind::IdUnknown,
                format!("id `{}` is not in the data set", short(id)),
            );
        }
    }
    let Some(expected) = expected else { return };
    for row in expected {
        if !first_row.contains_key(row.id.as_str()) {
            all_known = false;
            let message = format!("id `{}` of the data set is missing", short(&row.id));
            notes.cell(Kind::IdMissing, None, None, column, message);
        }
    }
    let wanted = expected.iter().map(|row| row.id.as_str());
    if all_known && let Some(index) = wanted.zip(&in_order).position(|(a, b)| a != *b) {
        let message = "from here on the ids are in another order than the data set's".to_owned();
        let line = table.rows.get(index).map(|row| row.line);
        notes.cell(Kind::IdOrder, Some(index + 1), line, column, message);
    }
}

/// The beginning of a text, on one line.
fn short(text: &str) -> String {
    const MAX_CHARS: usize = 40;
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_CHARS)
        .collect();
    match text.chars().nth(MAX_CHARS) {
        Some(_) => line + "…",
        None => line,
    }
}
