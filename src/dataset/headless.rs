//! CSV without a header: its columns are numbered from 1, and what each holds is told from the
//! whole file's content. What the content does not decide is an error that names the candidates.

use std::collections::HashSet;
use std::path::Path;

use super::DatasetError;
use super::cell::Row;
use super::gold;
use super::mapping::{OptionsSource, Pins};

/// From so many times as many words on, a column is the question beside a shorter one.
const QUESTION_WORDS: usize = 2;

/// What a column holds, over all rows.
struct Column {
    name: String,
    cells: Vec<String>,
}

/// Completes the pins for columns that have numbers for names.
pub fn pins(path: &Path, rows: &[Row], pins: &Pins) -> Result<Pins, DatasetError> {
    let mut pins = pins.clone();
    if pins.question.is_some() || pins.messages.is_some() {
        return Ok(pins);
    }
    let mut free = columns(rows);
    free.retain(|column| !pins.names(&column.name));
    if pins.id.is_none()
        && let Some(first) = free.first()
        && first.name == "1"
        && first.is_id(free.len())
    {
        pins.id = Some(first.name.clone());
        free.remove(0);
    }
    let stuck = |role: &'static str, columns: &[Column]| {
        Err(DatasetError::NoHeader {
            path: path.to_owned(),
            role,
            candidates: columns.iter().map(Column::described).collect(),
        })
    };
    if pins.options.is_none() && pins.gold.is_none() {
        match choice(&free) {
            Choice::Found {
                question,
                options,
                gold,
            } => {
                pins.question = Some(question);
                pins.options = Some(OptionsSource::Columns(options));
                pins.gold = Some(gold);
                return Ok(pins);
            }
            Choice::Open => return stuck("question", &free),
            Choice::None => {}
        }
    }
    match free.as_slice() {
        [question] => pins.question = Some(question.name.clone()),
        [first, second] if pins.gold.is_none() => {
            let (first_words, second_words) = (first.n_words(), second.n_words());
            let (question, gold) = if first_words >= QUESTION_WORDS * second_words {
                (first, second)
            } else if second_words >= QUESTION_WORDS * first_words {
                (second, first)
            } else {
                return stuck("question", &free);
            };
            pins.question = Some(question.name.clone());
            pins.gold = Some(gold.name.clone());
        }
        _ => return stuck("question", &free),
    }
    Ok(pins)
}

fn columns(rows: &[Row]) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    for fields in rows.iter().filter_map(|row| row.fields.as_ref().ok()) {
        for (index, (name, cell)) in fields.iter().enumerate() {
            if index == columns.len() {
                columns.push(Column {
                    name: name.clone(),
                    cells: Vec::new(),
                });
            }
            let text = cell.text().map(str::trim).unwrap_or_default();
            if let Some(column) = columns.get_mut(index) {
                column.cells.push(text.to_owned());
            }
        }
    }
    columns
}

/// Question, options and gold where columns in this order hold them.
enum Choice {
    Found {
        question: String,
        options: Vec<String>,
        gold: String,
    },
    /// There are options and a gold, but more than one column may be the question.
    Open,
    None,
}

/// A question, its options, and last a gold that names one of them in every row: by letter, or
/// by the option's text.
fn choice(columns: &[Column]) -> Choice {
    let [question, options @ .., gold] = columns else {
        return Choice::None;
    };
    if options.len() < 2 {
        return Choice::None;
    }
    let by_letter = gold.cells.iter().all(|cell| {
        cell.is_empty() || gold::letter(cell).is_some_and(|index| index < options.len())
    });
    let by_text = gold.cells.iter().enumerate().all(|(row, cell)| {
        cell.is_empty() || options.iter().any(|it| it.cells.get(row) == Some(cell))
    });
    let is_filled = gold.cells.iter().any(|cell| !cell.is_empty());
    if !is_filled || !(by_letter || by_text) {
        return Choice::None;
    }
    // A column before the options that is no question, such as a subject, would be taken for one.
    let longest = options.iter().map(Column::n_words).max().unwrap_or(0);
    let all_letters = by_letter && gold.n_letters() == options.len();
    if !all_letters && question.n_words() < longest {
        return Choice::Open;
    }
    Choice::Found {
        question: question.name.clone(),
        options: options.iter().map(|it| it.name.clone()).collect(),
        gold: gold.name.clone(),
    }
}

impl Column {
    fn n_words(&self) -> usize {
        self.cells
            .iter()
            .map(|cell| cell.split_whitespace().count())
            .sum()
    }

    /// How many options the letters of a gold column reach to.
    fn n_letters(&self) -> usize {
        self.cells
            .iter()
            .filter_map(|cell| gold::letter(cell))
            .max()
            .map_or(0, |index| index + 1)
    }

    /// Whether a first column holds ids: each its own, in one word, and counted on from 0 or 1
    /// or, beside two more columns, of letters with digits.
    fn is_id(&self, n_columns: usize) -> bool {
        let mut seen = HashSet::new();
        let is_unique = self
            .cells
            .iter()
            .all(|cell| !cell.is_empty() && seen.insert(cell.as_str()));
        let is_counted = self.cells.iter().enumerate().all(|(index, cell)| {
            let n: Option<usize> = cell.parse().ok();
            n.is_some_and(|n| n == index || n == index + 1)
        });
        let is_code = n_columns > 2
            && self.cells.iter().all(|cell| {
                cell.chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_/.#".contains(c))
                    && cell.contains(|c: char| c.is_ascii_digit())
            });
        n_columns > 1 && is_unique && (is_counted || is_code)
    }

    /// Its number and how it begins: "`2` (What is …)".
    fn described(&self) -> String {
        const SHOWN: usize = 24;
        let text = self.cells.iter().find(|cell| !cell.is_empty());
        let text = text.map(String::as_str).unwrap_or_default();
        let short: String = text.chars().take(SHOWN).collect();
        let dots = if short.len() < text.len() { "…" } else { "" };
        format!("`{}` ({short}{dots})", self.name)
    }
}

/// Whether a first row that holds no known name is a row of data: a cell of it is a number, a
/// sentence or the like, which is no column's name, or it goes on in the next rows.
pub fn looks_like_data(first: &[&str], rest: &[Vec<&str>]) -> bool {
    let mut seen = HashSet::new();
    let is_no_name = |cell: &&str| {
        cell.parse::<f64>().is_ok()
            || cell.contains(['?', '\n'])
            || cell.split_whitespace().count() > 4
    };
    let is_doubled = first
        .iter()
        .any(|cell| !cell.is_empty() && !seen.insert(cell));
    // A gold's letter: `A` may be a column's name, but not where the column holds letters alone.
    let is_letter = first.iter().enumerate().any(|(index, cell)| {
        gold::letter(cell).is_some()
            && !rest.is_empty()
            && rest
                .iter()
                .all(|row| row.get(index).is_some_and(|it| gold::letter(it).is_some()))
    });
    is_doubled || is_letter || first.iter().any(is_no_name)
}

/// The cell of a row as text, for looking at a file before it has columns.
pub fn plain(cell: &[u8]) -> &str {
    std::str::from_utf8(cell).map_or("", str::trim)
}
