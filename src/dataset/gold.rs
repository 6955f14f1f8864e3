//! The gold answer: which field holds it and how it is spelled, decided over the whole file.
//!
//! Every reading of every candidate field is tried on all rows. The one that places most golds
//! among their options is right; where two place as many and differ, the file is ambiguous. A
//! second field (`answer` beside `answer_index`) settles what the first leaves open.

use std::path::Path;

use super::cell::{Cell, Row};
use super::mapping::{GoldKind, Pins};
use super::options::Options;
use super::{DatasetError, Defect, Gold};

const READINGS: [GoldKind; 5] = [
    GoldKind::Label,
    GoldKind::Letter,
    GoldKind::OptionText,
    GoldKind::IndexFrom0,
    GoldKind::IndexFrom1,
];

/// One way to read one field: the place of each row's gold, or its text in a row without options.
struct Reading {
    field: String,
    kind: GoldKind,
    golds: Vec<Option<Gold>>,
    n_placed: usize,
}

/// Chooses field and kind among the candidates, which are in order of preference.
pub fn decide(
    path: &Path,
    rows: &[Row],
    options: &[Options],
    candidates: &[String],
    pins: &Pins,
) -> Result<Option<(String, GoldKind)>, DatasetError> {
    let mut fields: Vec<Vec<Reading>> = candidates
        .iter()
        .map(|field| best_readings(field, rows, options, pins.gold_kind))
        .collect();
    // Where some field names options, one that hardly ever does is something else.
    let most = placed(&fields);
    fields.retain(|readings| readings.iter().any(|it| 2 * it.n_placed >= most));
    let Some((first, others)) = fields.split_first() else {
        return Ok(None);
    };
    let fitting: Vec<&Reading> = first
        .iter()
        .filter(|reading| {
            others
                .iter()
                .all(|readings| readings.iter().any(|it| agree(reading, it)))
        })
        .collect();
    let ambiguous = |candidates: Vec<String>, mends| {
        Err(DatasetError::Ambiguous {
            path: path.to_owned(),
            role: "gold answer",
            candidates,
            mends,
        })
    };
    let Some(chosen) = fitting.first() else {
        let names: Vec<String> = fields
            .iter()
            .filter_map(|readings| Some(readings.first()?.field.clone()))
            .collect();
        let mends = names.iter().map(|it| ("gold", it.clone())).collect();
        return ambiguous(names, mends);
    };
    let is_explicit = chosen.kind == GoldKind::Label;
    if !is_explicit && fitting.iter().any(|it| it.golds != chosen.golds) {
        let names = fitting
            .iter()
            .map(|it| format!("{} as {}", it.field, it.kind))
            .collect();
        let mends = fitting
            .iter()
            .map(|it| ("gold_kind", it.kind.key().to_owned()));
        return ambiguous(names, mends.collect());
    }
    Ok(Some((chosen.field.clone(), chosen.kind)))
}

/// The gold of one row; none where the field is blank.
pub fn read(
    row: &Row,
    options: &Options,
    field: &str,
    kind: GoldKind,
) -> Result<Option<Gold>, Defect> {
    let defect = |message: String, hint: &str| Defect {
        field: Some(field.to_owned()),
        message,
        hint: hint.to_owned(),
    };
    let Some(cell) = row.get(field).filter(|cell| !cell.is_blank()) else {
        return Ok(None);
    };
    let Some(text) = gold_text(cell) else {
        return Err(defect(
            "the gold answer is not one text or number".into(),
            "give one answer a row, or name another field as `gold` in a profile",
        ));
    };
    if options.texts.is_empty() {
        return Ok(Some(Gold::Text(text)));
    }
    match place(&text, options, kind) {
        Some(index) => Ok(Some(Gold::Option(index))),
        None => Err(defect(
            format!(
                "the gold answer `{}`, read as {kind}, is none of the {} options",
                text.chars().take(40).collect::<String>(),
                options.texts.len()
            ),
            "correct the row, or set `gold_kind` in a profile",
        )),
    }
}

fn best_readings(
    field: &str,
    rows: &[Row],
    options: &[Options],
    pin: Option<GoldKind>,
) -> Vec<Reading> {
    let read_as = |kind: GoldKind| {
        let golds: Vec<Option<Gold>> = rows
            .iter()
            .zip(options)
            .map(|(row, options)| {
                let text = gold_text(row.get(field)?)?;
                if options.texts.is_empty() {
                    Some(Gold::Text(text))
                } else {
                    place(&text, options, kind).map(Gold::Option)
                }
            })
            .collect();
        let n_placed = golds
            .iter()
            .filter(|gold| matches!(gold, Some(Gold::Option(_))))
            .count();
        Reading {
            field: field.to_owned(),
            kind,
            golds,
            n_placed,
        }
    };
    if options.iter().all(|options| options.texts.is_empty()) {
        return vec![read_as(GoldKind::Text)];
    }
    if let Some(pin) = pin {
        return vec![read_as(pin)];
    }
    let mut readings: Vec<Reading> = READINGS.into_iter().map(read_as).collect();
    let most = readings.iter().map(|it| it.n_placed).max().unwrap_or(0);
    if most == 0 {
        // Nothing fits: each row says so itself.
        readings.retain(|it| it.kind == GoldKind::OptionText);
    }
    readings.retain(|it| it.n_placed == most);
    readings
}

fn placed(fields: &[Vec<Reading>]) -> usize {
    let all = fields.iter().flatten();
    all.map(|reading| reading.n_placed).max().unwrap_or(0)
}

/// Whether two readings say the same wherever both say something.
fn agree(first: &Reading, second: &Reading) -> bool {
    first
        .golds
        .iter()
        .zip(&second.golds)
        .all(|golds| match golds {
            (Some(Gold::Text(a)), Some(Gold::Text(b))) => a.trim() == b.trim(),
            (Some(a), Some(b)) => a == b,
            _ => true,
        })
}

/// The gold as text: of a worked solution (GSM8K) what stands behind the last `####`.
fn gold_text(cell: &Cell) -> Option<String> {
    let text = match cell {
        Cell::List(cells) => match cells.as_slice() {
            [one] => one.scalar()?,
            _ => return None,
        },
        _ => cell.scalar()?,
    };
    let text = match text.rsplit_once("####") {
        Some((_, after)) if !after.trim().is_empty() => after.trim().to_owned(),
        _ => text,
    };
    (!text.trim().is_empty()).then_some(text)
}

/// The option that a gold names.
fn place(text: &str, options: &Options, kind: GoldKind) -> Option<usize> {
    let text = text.trim();
    let n_options = options.texts.len();
    let index = match kind {
        GoldKind::Label => {
            let text = bare(text);
            options
                .labels
                .iter()
                .position(|label| label.trim().eq_ignore_ascii_case(text))?
        }
        GoldKind::Letter => letter(text)?,
        GoldKind::OptionText => {
            let find = |same: fn(&str, &str) -> bool| {
                options.texts.iter().position(|it| same(it.trim(), text))
            };
            find(|a, b| a == b)
                .or_else(|| find(|a, b| a.to_lowercase() == b.to_lowercase()))
                // `B. y` where the options carried their letters, too.
                .or_else(|| lettered(text, options))?
        }
        GoldKind::IndexFrom0 => whole_number(text)?,
        GoldKind::IndexFrom1 => whole_number(text)?.checked_sub(1)?,
        GoldKind::Text => return None,
    };
    (index < n_options).then_some(index)
}

/// The option that a letter stands for: `B`, `b`, `(B)`, `B.`.
pub fn letter(text: &str) -> Option<usize> {
    let mut letters = bare(text).chars();
    let letter = letters.next().filter(char::is_ascii_alphabetic)?;
    if letters.next().is_some() {
        return None;
    }
    Some(usize::from(letter.to_ascii_uppercase() as u8 - b'A'))
}

/// A label without its brackets and stops: `(B)`, `B.`, `B)`.
fn bare(text: &str) -> &str {
    text.trim_matches(|c: char| matches!(c, '(' | ')' | '[' | ']' | '.' | ':') || c.is_whitespace())
}

fn lettered(text: &str, options: &Options) -> Option<usize> {
    options
        .texts
        .iter()
        .zip('A'..='Z')
        .position(|(option, letter)| {
            let rest = text.trim_start_matches('(').strip_prefix(letter);
            rest.and_then(|rest| rest.strip_prefix(['.', ')', ':']))
                .is_some_and(|rest| rest.trim() == option.trim())
        })
}

/// `2`, and `2.0` as pandas writes it.
fn whole_number(text: &str) -> Option<usize> {
    text.strip_suffix(".0").unwrap_or(text).parse().ok()
}
