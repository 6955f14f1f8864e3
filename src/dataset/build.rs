//! Rows to records: every row becomes exactly one, with a defect where it cannot be run.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Map;
use sha2::{Digest, Sha256};

use super::cell::{Cell, Row};
use super::guess::gold_candidates;
use super::mapping::{GoldKind, Mapping, OptionsSource, Pins};
use super::options::{self, Options};
use super::sniff::hex;
use super::{DatasetError, Defect, Location, Message, Record, gold, inline, visible};

/// Builds the records and settles the gold part of the mapping.
pub fn records(
    path: &Path,
    rows: Vec<Row>,
    mut mapping: Mapping,
    pins: &Pins,
) -> Result<(Mapping, Vec<Record>), DatasetError> {
    let candidates = gold_candidates(&rows, &mapping, pins);
    if mapping.options.is_none()
        && pins.options.is_none()
        && let Some(question) = &mapping.question
        && inline::applies(&rows, question, &candidates)
    {
        mapping.options = Some(OptionsSource::Field(question.clone()));
    }
    let mut options = Vec::with_capacity(rows.len());
    let mut defects = Vec::with_capacity(rows.len());
    for row in &rows {
        let read = match (&mapping.options, &row.fields) {
            (Some(_), Ok(_)) if mapping.has_inline_options() => Ok(inline_options(row, &mapping)),
            (Some(source), Ok(_)) => options::read(row, source),
            _ => Ok(Options::default()),
        };
        let (read, defect) = match read {
            Ok(read) => (read, None),
            Err(defect) => (Options::default(), Some(defect)),
        };
        options.push(read);
        defects.push(defect);
    }
    let gold = gold::decide(path, &rows, &options, &candidates, pins)?;
    (mapping.gold, mapping.gold_kind) = gold.unzip();
    let mut records: Vec<Record> = rows
        .iter()
        .zip(options.into_iter().zip(defects))
        .map(|(row, (options, defect))| record(path, row, options, defect, &mapping))
        .collect();
    set_keys(&rows, &mapping, &mut records);
    Ok((mapping, records))
}

/// The options at the end of a question's text; none where it does not end in any.
fn inline_options(row: &Row, mapping: &Mapping) -> Options {
    let question = mapping.question.as_deref().and_then(|field| row.get(field));
    let texts = question
        .and_then(Cell::text)
        .and_then(|text| Some(inline::split(text)?.1));
    Options {
        texts: texts.unwrap_or_default(),
        labels: Vec::new(),
    }
}

fn record(
    path: &Path,
    row: &Row,
    options: Options,
    options_defect: Option<Defect>,
    mapping: &Mapping,
) -> Record {
    let mut record = Record {
        key: String::new(),
        id: None,
        location: Location {
            file: path.to_owned(),
            line: row.line,
        },
        question: String::new(),
        messages: Vec::new(),
        options: Vec::new(),
        gold: None,
        group: None,
        cluster: None,
        fields: Map::new(),
        defect: None,
    };
    let fields = match &row.fields {
        Ok(fields) => fields,
        Err(defect) => {
            record.defect = Some(defect.clone());
            return record;
        }
    };
    let get = |field: &Option<String>| row.get(field.as_deref()?).filter(|cell| !cell.is_blank());
    record.id = get(&mapping.id).map(Cell::to_value);
    record.group = get(&mapping.group).and_then(Cell::scalar);
    record.cluster = get(&mapping.cluster).and_then(Cell::scalar);
    record.fields = visible::fields(fields, mapping);
    let mut defect = None;
    match question(row, mapping) {
        Ok((question, messages)) => {
            record.question = question;
            record.messages = messages;
        }
        Err(found) => defect = Some(found),
    }
    // Without its options a row's gold cannot be read, and the options are what to mend.
    if options_defect.is_none()
        && let Some(field) = &mapping.gold
    {
        let kind = mapping.gold_kind.unwrap_or(GoldKind::Text);
        match gold::read(row, &options, field, kind) {
            Ok(gold) => record.gold = gold,
            Err(found) => defect = defect.or(Some(found)),
        }
    }
    record.options = options.texts;
    record.defect = options_defect.or(defect);
    record
}

/// The question, and the turns of a messages row.
fn question(row: &Row, mapping: &Mapping) -> Result<(String, Vec<Message>), Defect> {
    if let Some(field) = &mapping.messages
        && let Some(cell) = row.get(field).filter(|cell| !cell.is_blank())
    {
        return turns(cell, field);
    }
    let (field, what) = match (&mapping.question, &mapping.messages) {
        (Some(field), _) => (field, "question"),
        (None, Some(field)) => (field, "messages"),
        (None, None) => return Ok((String::new(), Vec::new())),
    };
    let defect = |message: String| Defect {
        field: Some(field.clone()),
        message,
        hint: format!("fill `{field}`, or remove the row"),
    };
    match row.get(field) {
        None => Err(defect(format!("the row has no `{field}`, so no {what}"))),
        Some(cell) if cell.is_blank() => Err(defect(format!("the {what} is empty"))),
        Some(Cell::Text(text)) => {
            let is_inline = mapping.has_inline_options();
            let stem = inline::split(text).filter(|_| is_inline).map(|it| it.0);
            Ok((stem.unwrap_or(text).to_owned(), Vec::new()))
        }
        Some(_) => Err(defect(format!("the {what} is not text"))),
    }
}

fn turns(cell: &Cell, field: &str) -> Result<(String, Vec<Message>), Defect> {
    let defect = |message: String| Defect {
        field: Some(field.to_owned()),
        message,
        hint: "messages are a list like [{\"role\": \"user\", \"content\": \"…\"}] and end with \
               the user's turn"
            .into(),
    };
    let Cell::List(cells) = cell else {
        return Err(defect("the messages are not a list".into()));
    };
    let mut messages = Vec::with_capacity(cells.len());
    for (index, cell) in cells.iter().enumerate() {
        let role = cell.get("role").and_then(Cell::scalar);
        let content = cell.get("content").and_then(content_text);
        let (Some(role), Some(content)) = (role, content) else {
            return Err(defect(format!(
                "message {} lacks a role or a text as content",
                index + 1
            )));
        };
        if !["system", "developer", "user", "assistant"].contains(&role.as_str()) {
            return Err(defect(format!(
                "message {} has the role `{role}`, which a prompt cannot hold",
                index + 1
            )));
        }
        messages.push(Message { role, content });
    }
    match messages.last() {
        Some(last) if last.role == "user" => Ok((last.content.clone(), messages)),
        Some(last) => Err(defect(format!(
            "the last message is by `{}`, so there is nothing to answer",
            last.role
        ))),
        None => Err(defect("there are no messages".into())),
    }
}

/// A turn's text, also in the form of parts: `[{"type": "text", "text": "…"}]`.
fn content_text(cell: &Cell) -> Option<String> {
    match cell {
        Cell::Text(text) => Some(text.clone()),
        Cell::List(parts) => parts
            .iter()
            .map(|part| part.get("text").and_then(Cell::text))
            .collect::<Option<Vec<&str>>>()
            .map(|texts| texts.concat()),
        _ => None,
    }
}

/// Gives every record its key. A doubled id is a defect of the later rows.
fn set_keys(rows: &[Row], mapping: &Mapping, records: &mut [Record]) {
    let ids: Vec<Option<String>> = records
        .iter()
        .map(|record| record.id.as_ref().map(id_text))
        .collect();
    let mut taken: HashSet<String> = ids.iter().flatten().cloned().collect();
    // Of each id: the line it stands on first, and the number the next doubled row tries.
    let mut seen: HashMap<String, (usize, usize)> = HashMap::new();
    let mut occurrences: HashMap<String, usize> = HashMap::new();
    for ((record, id), row) in records.iter_mut().zip(ids).zip(rows) {
        let Some(id) = id else {
            let hash = content_hash(record, row);
            let occurrence = occurrences.entry(hash.clone()).or_insert(0);
            record.key = loop {
                *occurrence += 1;
                let key = format!("row-{hash}-{occurrence}");
                if taken.insert(key.clone()) {
                    break key;
                }
            };
            continue;
        };
        let Some((line, next)) = seen.get_mut(&id) else {
            seen.insert(id.clone(), (record.location.line, 2));
            record.key = id;
            continue;
        };
        record.defect.get_or_insert_with(|| Defect {
            field: mapping.id.clone(),
            message: format!("the id `{id}` is already that of line {line}"),
            hint: "give every row its own id".into(),
        });
        record.key = loop {
            let key = format!("{id}#{next}");
            *next += 1;
            if taken.insert(key.clone()) {
                break key;
            }
        };
    }
}

fn id_text(id: &serde_json::Value) -> String {
    match id {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// 16 hex digits over what the model would be asked; of an unreadable row over its bytes.
fn content_hash(record: &Record, row: &Row) -> String {
    let mut hasher = Sha256::new();
    let mut add = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    if row.fields.is_err() {
        hasher.update(&row.raw);
    } else {
        add(&record.question);
        for message in &record.messages {
            add(&message.role);
            add(&message.content);
        }
        for option in &record.options {
            add(option);
        }
    }
    hex(hasher.finalize().get(..8).unwrap_or_default())
}
