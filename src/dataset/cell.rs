//! A row between its file and its record: named cells that keep each number's spelling.

use std::fmt;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::Defect;

/// A field's value. Unlike `serde_json::Value` it keeps a number as it is spelled.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Cell>),
    Object(Vec<(String, Cell)>),
}

/// A row of the file.
#[derive(Clone, Debug)]
pub struct Row {
    /// The line it begins on, from 1; in a Parquet file its number.
    pub line: usize,
    /// Its fields, or why it has none.
    pub fields: Result<Vec<(String, Cell)>, Defect>,
    /// Its bytes as they are in the file: kept only for the key of a row without fields.
    pub raw: Vec<u8>,
}

/// Nested deeper than this a value is refused.
const MAX_DEPTH: usize = 32;

impl Cell {
    /// Text that is not blank.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) if !text.trim().is_empty() => Some(text),
            _ => None,
        }
    }

    /// A text, number or truth value as text.
    pub fn scalar(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Number(number) => Some(number.clone()),
            Self::Bool(value) => Some(value.to_string()),
            Self::Null | Self::List(_) | Self::Object(_) => None,
        }
    }

    /// Whether there is nothing in it: null, blank text, an empty list or object.
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => text.trim().is_empty(),
            Self::List(cells) => cells.is_empty(),
            Self::Object(fields) => fields.is_empty(),
            Self::Bool(_) | Self::Number(_) => false,
        }
    }

    /// The field of an object.
    pub fn get(&self, name: &str) -> Option<&Cell> {
        match self {
            Self::Object(fields) => fields
                .iter()
                .find_map(|(field, cell)| (field == name).then_some(cell)),
            _ => None,
        }
    }

    /// The JSON value; a number that it cannot hold as spelled becomes a string.
    pub fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(value) => Value::Bool(*value),
            Self::Number(spelling) => match serde_json::from_str(spelling) {
                Ok(Value::Number(number)) if number.to_string() == *spelling => {
                    Value::Number(number)
                }
                _ => Value::String(spelling.clone()),
            },
            Self::Text(text) => Value::String(text.clone()),
            Self::List(cells) => cells.iter().map(Cell::to_value).collect(),
            Self::Object(fields) => {
                let fields: Map<String, Value> = fields
                    .iter()
                    .map(|(name, cell)| (name.clone(), cell.to_value()))
                    .collect();
                Value::Object(fields)
            }
        }
    }
}

impl Row {
    /// A field of a row that has fields; `question.stem` is the field `stem` of the object
    /// `question`, where no field has that whole name.
    pub fn get(&self, name: &str) -> Option<&Cell> {
        let fields = self.fields.as_ref().ok()?;
        let find = |name: &str| {
            fields
                .iter()
                .find_map(|(field, cell)| (field == name).then_some(cell))
        };
        find(name).or_else(|| {
            let (outer, inner) = name.split_once('.')?;
            find(outer)?.get(inner)
        })
    }
}

/// The fields of a JSON object; of a doubled name the last value, in the first one's place.
pub fn object_from_json(text: &str) -> Result<Vec<(String, Cell)>, String> {
    match from_json(text)? {
        Cell::Object(fields) => Ok(fields),
        Cell::List(_) => Err("the row is a list, not an object".into()),
        Cell::Text(_) => Err("the row is a string, not an object".into()),
        Cell::Number(_) => Err("the row is a number, not an object".into()),
        Cell::Bool(_) | Cell::Null => Err("the row is a constant, not an object".into()),
    }
}

/// The fields of a JSON object with their values as they stand in the text.
pub fn object_parts(text: &str) -> Option<Vec<(String, &RawValue)>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parts = deserializer.deserialize_map(ObjectParts).ok()?;
    deserializer.end().ok()?;
    Some(parts)
}

/// A JSON text as a cell.
pub fn from_json(text: &str) -> Result<Cell, String> {
    let raw: &RawValue = serde_json::from_str(text).map_err(|error| error.to_string())?;
    cell(raw, 0)
}

fn cell(raw: &RawValue, depth: usize) -> Result<Cell, String> {
    if depth > MAX_DEPTH {
        return Err(format!("values are nested more than {MAX_DEPTH} deep"));
    }
    let text = raw.get().trim();
    let value = match text.as_bytes().first() {
        Some(b'{') => {
            let parts = serde_json::Deserializer::from_str(text)
                .deserialize_map(ObjectParts)
                .map_err(|error| error.to_string())?;
            let mut fields: Vec<(String, Cell)> = Vec::with_capacity(parts.len());
            for (name, raw) in parts {
                let value = cell(raw, depth + 1)?;
                match fields.iter_mut().find(|(field, _)| *field == name) {
                    Some(slot) => slot.1 = value,
                    None => fields.push((name, value)),
                }
            }
            Cell::Object(fields)
        }
        Some(b'[') => {
            let parts = serde_json::Deserializer::from_str(text)
                .deserialize_seq(ListParts)
                .map_err(|error| error.to_string())?;
            let cells: Result<Vec<Cell>, String> =
                parts.into_iter().map(|raw| cell(raw, depth + 1)).collect();
            Cell::List(cells?)
        }
        Some(b'"') => Cell::Text(serde_json::from_str(text).map_err(|error| error.to_string())?),
        Some(b't') => Cell::Bool(true),
        Some(b'f') => Cell::Bool(false),
        Some(b'n') | None => Cell::Null,
        Some(_) => Cell::Number(text.to_owned()),
    };
    Ok(value)
}

struct ObjectParts;

impl<'de> Visitor<'de> for ObjectParts {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut parts = Vec::new();
        while let Some(part) = map.next_entry()? {
            parts.push(part);
        }
        Ok(parts)
    }
}

struct ListParts;

impl<'de> Visitor<'de> for ListParts {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut parts = Vec::new();
        while let Some(part) = seq.next_element()? {
            parts.push(part);
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_spelling() {
        let cell = from_json(r#"[1, 1.0, 1.50, 123456789012345678901234567890, 1e5]"#);
        let spelled: Vec<String> = match cell.expect("it parses") {
            Cell::List(cells) => cells.iter().filter_map(Cell::scalar).collect(),
            _ => Vec::new(),
        };
        let expected = ["1", "1.0", "1.50", "123456789012345678901234567890", "1e5"];
        assert_eq!(spelled, expected);
        assert_eq!(Cell::Number("1.0".into()).to_value().to_string(), "1.0");
        assert_eq!(Cell::Number("1.50".into()).to_value(), "1.50");
    }

    #[test]
    fn deep_and_broken_values_are_errors() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for text in [
            deep.as_str(),
            "",
            "{",
            "{\"a\": NaN}",
            "{\"a\": 1} x",
            "[1,]",
        ] {
            assert!(
                from_json(text).is_err(),
                "{}",
                text.chars().take(20).collect::<String>()
            );
        }
        assert!(object_from_json("[]").is_err());
    }

    #[test]
    fn a_doubled_field_has_its_last_value() {
        let fields = object_from_json(r#"{"a": 1, "b": 2, "a": 3}"#).expect("it parses");
        assert_eq!(
            fields.first(),
            Some(&("a".into(), Cell::Number("3".into())))
        );
        assert_eq!(fields.len(), 2);
    }
}
