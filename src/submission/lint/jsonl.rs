//! A JSONL submission's bytes to its table, with what is wrong about its lines.

use serde_json::{Map, Value};

use super::{Kind, Notes, Table, TableRow};
use crate::submission::format::SubmissionFormat;

/// Reads a line a row. The table has the format's columns; a line with other ones is told.
pub(super) fn read(bytes: &[u8], format: &SubmissionFormat, notes: &mut Notes) -> Table {
    let names: Vec<&str> = format
        .columns
        .iter()
        .map(|column| column.name.as_str())
        .collect();
    let mut table = Table {
        columns: names.iter().map(|name| (*name).to_owned()).collect(),
        rows: Vec::new(),
    };
    if bytes.starts_with(b"\xef\xbb\xbf") {
        notes.file(
            Kind::ByteOrderMark,
            "it begins with a byte-order mark, so its first line is no JSON".to_owned(),
        );
    }
    let lines = bytes.split(|&byte| byte == b'\n').zip(1u64..);
    for (text, line) in lines.filter(|(text, _)| !text.trim_ascii().is_empty()) {
        let row = table.rows.len() + 1;
        let mut note = |kind, message| notes.cell(kind, Some(row), Some(line), None, message);
        let object: Map<String, Value> = match serde_json::from_slice(text) {
            Ok(object) => object,
            Err(error) => {
                let kind = match std::str::from_utf8(text) {
                    Ok(_) => Kind::NotJson,
                    Err(_) => Kind::NotUtf8,
                };
                note(kind, format!("the line is not a JSON object: {error}"));
                // Without cells, so that they are not told once more each.
                table.rows.push(TableRow {
                    line,
                    cells: Vec::new(),
                });
                continue;
            }
        };
        if !object.keys().eq(names.iter().copied()) {
            let found: Vec<&str> = object.keys().map(String::as_str).collect();
            note(
                Kind::Columns,
                format!(
                    "the keys are `{}`, expected `{}`",
                    found.join("`, `"),
                    names.join("`, `")
                ),
            );
        }
        let cell = |name: &&str| match object.get(*name)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        table.rows.push(TableRow {
            line,
            cells: names.iter().map(cell).collect(),
        });
    }
    table
}
