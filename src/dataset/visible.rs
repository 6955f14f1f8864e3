//! What of a row a template may use: the gold, and all that gives it away, may not reach a prompt.

use serde_json::{Map, Value};

use super::cell::{Cell, from_json};
use super::mapping::Mapping;
use super::names::{is_gold_name, plain_name};

/// What an option may show of itself where it is an object; a mark like `is_correct` is no part.
const OPTION_PARTS: [&str; 8] = [
    "label", "key", "letter", "id", "text", "value", "content", "option",
];

/// A row's fields without those that hold a gold, at any depth, and without the messages, which
/// are turns of their own.
pub fn fields(fields: &[(String, Cell)], mapping: &Mapping) -> Map<String, Value> {
    fields
        .iter()
        .filter(|(name, _)| mapping.messages.as_deref() != Some(name))
        .filter_map(|(name, cell)| Some((name.clone(), shown(name, cell, mapping)?)))
        .collect()
}

/// The value of the field at this path (`question.stem`) as far as it may be shown.
fn shown(path: &str, cell: &Cell, mapping: &Mapping) -> Option<Value> {
    if mapping.gold.as_deref() == Some(path) {
        return None;
    }
    if !mapping.uses(path) && is_gold_name(path.rsplit('.').next().unwrap_or(path)) {
        return None;
    }
    let holds_options = mapping.options.as_ref().is_some_and(|it| it.names(path));
    if holds_options && mapping.question.as_deref() != Some(path) {
        return Some(options(cell));
    }
    inside(path, cell, mapping)
}

fn inside(path: &str, cell: &Cell, mapping: &Mapping) -> Option<Value> {
    match cell {
        Cell::Object(fields) => {
            let fields: Map<String, Value> = fields
                .iter()
                .filter_map(|(name, cell)| {
                    let shown = shown(&format!("{path}.{name}"), cell, mapping)?;
                    Some((name.clone(), shown))
                })
                .collect();
            Some(Value::Object(fields))
        }
        Cell::List(cells) => cells
            .iter()
            .map(|cell| inside(path, cell, mapping))
            .collect(),
        Cell::Text(text) => (!hides_gold(text)).then(|| cell.to_value()),
        _ => Some(cell.to_value()),
    }
}

/// Whether a text is JSON (as CSV cells hold it) in which a gold stands under its name.
fn hides_gold(text: &str) -> bool {
    let begins = text.trim_start().as_bytes().first();
    matches!(begins, Some(b'{' | b'[')) && from_json(text).is_ok_and(|cell| names_gold(&cell))
}

fn names_gold(cell: &Cell) -> bool {
    match cell {
        Cell::Object(fields) => fields
            .iter()
            .any(|(name, cell)| is_gold_name(name) || names_gold(cell)),
        Cell::List(cells) => cells.iter().any(names_gold),
        _ => false,
    }
}

/// Options as they stand in the file, of each object only its label and its text.
fn options(cell: &Cell) -> Value {
    match cell {
        Cell::List(cells) => cells
            .iter()
            .map(|cell| match cell {
                Cell::Object(fields) => fields
                    .iter()
                    .filter(|(name, _)| OPTION_PARTS.contains(&plain_name(name).as_str()))
                    .map(|(name, cell)| (name.clone(), cell.to_value()))
                    .collect::<Map<String, Value>>()
                    .into(),
                _ => cell.to_value(),
            })
            .collect(),
        Cell::Object(fields) => {
            let is_columns = fields.iter().any(|(_, cell)| matches!(cell, Cell::List(_)));
            fields
                .iter()
                // `{text: […], label: […]}` may have a third list that marks the right one.
                .filter(|(name, _)| {
                    !is_columns || OPTION_PARTS.contains(&plain_name(name).as_str())
                })
                .map(|(name, cell)| (name.clone(), cell.to_value()))
                .collect::<Map<String, Value>>()
                .into()
        }
        // A list in a CSV cell: its parts are the template's `options`.
        Cell::Text(text) if hides_gold_mark(text) => Value::Null,
        _ => cell.to_value(),
    }
}

/// Whether options written as JSON into a text carry more than their labels and texts.
fn hides_gold_mark(text: &str) -> bool {
    let Ok(Cell::List(cells)) = from_json(text) else {
        return false;
    };
    cells.iter().any(|cell| match cell {
        Cell::Object(fields) => fields
            .iter()
            .any(|(name, _)| !OPTION_PARTS.contains(&plain_name(name).as_str())),
        _ => false,
    })
}
