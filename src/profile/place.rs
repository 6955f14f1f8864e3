//! On which line of a profile a key stands, for messages about its value.

use toml::de::{DeTable, DeValue};

/// The line, from 1, of the value of a dotted key, such as `few_shot.count`; of the deepest part
/// of it that is there.
pub fn line_of(text: &str, key: &str) -> usize {
    let span = value_span(text, key).unwrap_or(0..0);
    line_at(text, span.start)
}

/// The line of the `n`-th line (from 1) of a text that is a key's value. Only a string in three
/// quotes has lines of its own; the break behind its opening quotes is no part of it.
pub fn line_in(text: &str, key: &str, n: usize) -> usize {
    let span = value_span(text, key).unwrap_or(0..0);
    let first = line_at(text, span.start);
    let raw = text.get(span).unwrap_or_default();
    let is_long = raw.starts_with("\"\"\"") || raw.starts_with("'''");
    if !is_long {
        return first;
    }
    let begins_below = raw
        .get(3..)
        .is_some_and(|rest| rest.starts_with(['\n', '\r']));
    first + usize::from(begins_below) + n - 1
}

/// The line of a byte.
pub fn line_at(text: &str, at: usize) -> usize {
    text.get(..at).unwrap_or_default().matches('\n').count() + 1
}

fn value_span(text: &str, key: &str) -> Option<std::ops::Range<usize>> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut found = None;
    for part in key.split('.') {
        let (_, value) = table
            .iter()
            .find(|(name, _)| name.get_ref().as_ref() == part)?;
        found = Some(value.span());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    found
}
