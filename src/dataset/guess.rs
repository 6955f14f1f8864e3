//! Finds the mapping from the fields' names and from what the whole file holds. Two readings of
//! equal right are an error that names both.

use std::path::Path;

use super::DatasetError;
use super::cell::{Cell, Row};
use super::mapping::{Mapping, OptionsSource, Pins};
use super::names::{
    GOLD_NAMES, GROUP_NAMES, ID_NAMES, MESSAGES_NAMES, OPTIONS_NAMES, QUESTION_NAMES, REPLY_NAMES,
    WEAK_ID_NAMES, is_wrapper_name, role_name,
};
use super::options::find_columns;

/// The field names in the order of their first appearance, also those inside a wrapping object:
/// `question.stem`.
pub fn field_names(rows: &[Row]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    let mut add = |name: String| {
        if seen.insert(name.clone()) {
            names.push(name);
        }
    };
    for (name, cell) in rows.iter().flat_map(|row| row.fields.iter().flatten()) {
        add(name.clone());
        if let Cell::Object(fields) = cell
            && is_wrapper_name(name)
        {
            for (inner, _) in fields {
                add(format!("{name}.{inner}"));
            }
        }
    }
    names
}

/// Finds every part but the gold, which needs the rows' options (see [`super::gold`]).
pub fn mapping(path: &Path, rows: &[Row], pins: &Pins) -> Result<Mapping, DatasetError> {
    let guess = Guess {
        path,
        rows,
        fields: field_names(rows),
    };
    guess.check_pins(pins)?;
    guess.refuse_own_files()?;
    let (question, messages) = guess.question(pins)?;
    let is_taken = |field: &String| {
        [&question, &messages]
            .iter()
            .any(|it| it.as_ref() == Some(field))
            || pins.names(field)
    };
    let id = pinned(&pins.id).unwrap_or_else(|| guess.id(&is_taken));
    let options = match &pins.options {
        Some(OptionsSource::Field(name)) if name.is_empty() => None,
        Some(source) => Some(source.clone()),
        None => guess.options(&is_taken)?,
    };
    let group = pinned(&pins.group).unwrap_or_else(|| guess.group(&is_taken));
    Ok(Mapping {
        id,
        question,
        messages,
        options,
        gold: None,
        gold_kind: None,
        group,
        cluster: pinned(&pins.cluster).flatten(),
    })
}

/// The fields that may hold the gold: the pinned one, else all filled ones of the better rank.
pub fn gold_candidates(rows: &[Row], mapping: &Mapping, pins: &Pins) -> Vec<String> {
    if let Some(pin) = pinned(&pins.gold) {
        return pin.into_iter().collect();
    }
    let fields = field_names(rows);
    let is_taken = |field: &str| mapping.uses(field);
    for rank in GOLD_NAMES {
        let found: Vec<String> = rank
            .iter()
            .flat_map(|name| fields.iter().filter(move |field| role_name(field) == *name))
            .filter(|field| !is_taken(field) && filled(rows, field).next().is_some())
            .cloned()
            .collect();
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// A pin's field; the inner `None` is a pin that says there is none.
fn pinned(pin: &Option<String>) -> Option<Option<String>> {
    pin.as_ref()
        .map(|field| Some(field.clone()).filter(|field| !field.is_empty()))
}

/// Rows in which a field holds something, and what.
fn filled<'a>(rows: &'a [Row], field: &'a str) -> impl Iterator<Item = (usize, &'a Cell)> {
    rows.iter().enumerate().filter_map(move |(index, row)| {
        let cell = row.get(field)?;
        (!cell.is_blank()).then_some((index, cell))
    })
}

struct Guess<'a> {
    path: &'a Path,
    rows: &'a [Row],
    fields: Vec<String>,
}

impl Guess<'_> {
    fn check_pins(&self, pins: &Pins) -> Result<(), DatasetError> {
        let mut named: Vec<(&'static str, &String)> = Vec::new();
        for (key, pin) in [
            ("id", &pins.id),
            ("question", &pins.question),
            ("messages", &pins.messages),
            ("gold", &pins.gold),
            ("group", &pins.group),
            ("cluster", &pins.cluster),
        ] {
            named.extend(pin.iter().map(|field| (key, field)));
        }
        match &pins.options {
            Some(OptionsSource::Field(field)) => named.push(("options", field)),
            Some(OptionsSource::Columns(fields)) => {
                named.extend(fields.iter().map(|field| ("options", field)));
            }
            None => {}
        }
        match named
            .into_iter()
            .find(|(_, field)| !field.is_empty() && !self.fields.contains(field))
        {
            Some((key, field)) => Err(DatasetError::PinnedField {
                path: self.path.to_owned(),
                key,
                field: field.clone(),
                fields: self.fields.clone(),
            }),
            None => Ok(()),
        }
    }

    /// A run's files are no prompt files, though some hold texts.
    fn refuse_own_files(&self) -> Result<(), DatasetError> {
        let schema = self.rows.first().and_then(|row| row.get("schema")?.text());
        match schema.filter(|schema| schema.starts_with("podium.")) {
            Some(schema) => Err(DatasetError::OfARun {
                path: self.path.to_owned(),
                schema: schema.to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// The fields of the given plain names, in the names' order.
    fn named<'n>(&'n self, names: &'n [&str]) -> impl Iterator<Item = &'n String> {
        names.iter().flat_map(move |name| {
            self.fields
                .iter()
                .filter(move |field| role_name(field) == *name)
        })
    }

    fn question(&self, pins: &Pins) -> Result<(Option<String>, Option<String>), DatasetError> {
        match (pinned(&pins.question), pinned(&pins.messages)) {
            (Some(Some(question)), messages) => {
                return Ok((Some(question), messages.flatten()));
            }
            (_, Some(Some(messages))) => return Ok((None, Some(messages))),
            _ => {}
        }
        let messages = self
            .named(&MESSAGES_NAMES)
            .find(|field| filled(self.rows, field).any(|(_, cell)| is_messages(cell)));
        let question = self.question_field()?;
        match (question, messages) {
            (Some(question), Some(messages)) if question != *messages => {
                self.question_or_messages(question, messages)
            }
            (_, Some(messages)) => Ok((None, Some(messages.clone()))),
            (Some(question), None) => Ok((Some(question), None)),
            (None, None) => Err(self.no_question()),
        }
    }

    fn no_question(&self) -> DatasetError {
        let path = self.path.to_owned();
        match self.named(&REPLY_NAMES).next() {
            Some(field) => DatasetError::Replies {
                path,
                field: field.clone(),
                fields: self.fields.clone(),
            },
            None => DatasetError::NoQuestion {
                path,
                fields: self.fields.clone(),
            },
        }
    }

    fn question_field(&self) -> Result<Option<String>, DatasetError> {
        let has_text =
            |field: &&String| filled(self.rows, field).any(|(_, cell)| cell.text().is_some());
        for rank in QUESTION_NAMES {
            let found: Vec<&String> = self.named(rank).filter(has_text).collect();
            if let Some(field) = self.choose("question", "question", &found)? {
                return Ok(Some(field));
            }
        }
        // A field of the right name that no row fills: its rows are defective, one by one.
        let named = QUESTION_NAMES
            .iter()
            .find_map(|rank| self.named(rank).next());
        Ok(named.cloned())
    }

    /// One of several fields of equal rank: the same in every row, or never in one row together.
    fn choose(
        &self,
        role: &'static str,
        key: &'static str,
        found: &[&String],
    ) -> Result<Option<String>, DatasetError> {
        let differ = |first: &String, second: &String| {
            self.rows
                .iter()
                .any(|row| match (row.get(first), row.get(second)) {
                    (Some(a), Some(b)) => !a.is_blank() && !b.is_blank() && a != b,
                    _ => false,
                })
        };
        let clash = found.iter().enumerate().any(|(index, first)| {
            found
                .iter()
                .skip(index + 1)
                .any(|second| differ(first, second))
        });
        if clash {
            let names: Vec<String> = found.iter().map(|field| (*field).clone()).collect();
            return Err(DatasetError::Ambiguous {
                path: self.path.to_owned(),
                role,
                mends: names.iter().map(|it| (key, it.clone())).collect(),
                candidates: names,
            });
        }
        let most = found
            .iter()
            .map(|field| filled(self.rows, field).count())
            .max();
        Ok(found
            .iter()
            .find(|field| Some(filled(self.rows, field).count()) == most)
            .map(|field| (*field).clone()))
    }

    /// Both a question and messages: the messages where their last user turn is the question, the
    /// question where the messages hold the reply, too.
    fn question_or_messages(
        &self,
        question: String,
        messages: &str,
    ) -> Result<(Option<String>, Option<String>), DatasetError> {
        let mut all_prompts = true;
        let mut all_same = true;
        for row in self.rows {
            let (Some(text), Some(cell)) = (row.get(&question), row.get(messages)) else {
                continue;
            };
            let last = last_turn(cell);
            all_prompts &= last.as_ref().is_none_or(|(role, _)| role == "user");
            all_same &= match (text.text(), last) {
                (Some(text), Some((_, content))) => text.trim() == content.trim(),
                _ => true,
            };
        }
        if !all_prompts {
            Ok((Some(question), None))
        } else if all_same {
            Ok((None, Some(messages.to_owned())))
        } else {
            Err(DatasetError::Ambiguous {
                path: self.path.to_owned(),
                role: "question",
                candidates: vec![question.clone(), messages.to_owned()],
                mends: vec![("question", question), ("messages", messages.to_owned())],
            })
        }
    }

    fn id(&self, is_taken: &impl Fn(&String) -> bool) -> Option<String> {
        let strong: Vec<&String> = self
            .named(&ID_NAMES)
            .filter(|field| !is_taken(field))
            .filter(|field| filled(self.rows, field).any(|(_, cell)| cell.scalar().is_some()))
            .collect();
        let is_unique = |field: &&&String| {
            let mut seen = std::collections::HashSet::new();
            filled(self.rows, field).all(|(_, cell)| match cell.scalar() {
                Some(id) => seen.insert(id),
                None => false,
            })
        };
        let weak: Vec<&String> = self
            .named(&WEAK_ID_NAMES)
            .filter(|field| !is_taken(field))
            .filter(|field| {
                filled(self.rows, field).count()
                    == self.rows.iter().filter(|row| row.fields.is_ok()).count()
            })
            .collect();
        strong
            .iter()
            .find(is_unique)
            .or_else(|| strong.first())
            .or_else(|| weak.iter().find(is_unique))
            .map(|field| (*field).clone())
    }

    fn options(
        &self,
        is_taken: &impl Fn(&String) -> bool,
    ) -> Result<Option<OptionsSource>, DatasetError> {
        let found: Vec<&String> = self
            .named(&OPTIONS_NAMES)
            .filter(|field| !is_taken(field) && filled(self.rows, field).next().is_some())
            .collect();
        if let Some(field) = self.choose("list of options", "options", &found)? {
            return Ok(Some(OptionsSource::Field(field)));
        }
        let free: Vec<String> = self
            .fields
            .iter()
            .filter(|field| !is_taken(field))
            .cloned()
            .collect();
        Ok(find_columns(&free).map(OptionsSource::Columns))
    }

    fn group(&self, is_taken: &impl Fn(&String) -> bool) -> Option<String> {
        self.named(&GROUP_NAMES)
            .find(|field| {
                !is_taken(field)
                    && filled(self.rows, field).any(|(_, cell)| cell.scalar().is_some())
            })
            .cloned()
    }
}

/// Whether a cell is a list of turns.
fn is_messages(cell: &Cell) -> bool {
    match cell {
        Cell::List(turns) => {
            !turns.is_empty()
                && turns
                    .iter()
                    .all(|turn| turn.get("role").is_some() && turn.get("content").is_some())
        }
        _ => false,
    }
}

fn last_turn(cell: &Cell) -> Option<(String, String)> {
    match cell {
        Cell::List(turns) => {
            let turn = turns.last()?;
            Some((turn.get("role")?.scalar()?, turn.get("content")?.scalar()?))
        }
        _ => None,
    }
}
