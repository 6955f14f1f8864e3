//! Few-shot rows: questions shown with their answers before the row's own.
//!
//! A shot's gold is meant to be shown. The row itself is never among its shots, nor is a row that
//! asks the same, so its own gold stays out of its prompt. Shots come first, and by default all
//! rows have the same ones: the engine then computes that beginning once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use minijinja::context;
use serde::{Deserialize, Serialize};

use super::draws::Draws;
use super::template::{self, Template};
use super::{Profile, ProfileError, shuffle};
use crate::dataset::{self, Gold, Message, Record};
use crate::score::option_letter;

const PURPOSE: &str = "shots";
/// Between shots inside the user's turn, and between the last one and the question.
const BETWEEN: &str = "\n\n";

/// What a profile says of its shots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewShot {
    /// Shots a row; all of `ids` where it is absent.
    #[serde(default)]
    pub count: Option<usize>,
    /// A prompt file, relative to the profile's folder, read with the profile's mapping.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// In place of `file`.
    #[serde(default)]
    pub from: Option<From>,
    /// The rows to take, in this order; absent, every row with a gold.
    #[serde(default)]
    pub ids: Vec<Id>,
    #[serde(default)]
    pub choose: Choose,
    /// Only rows of the row's own group, such as MMLU's subject. A row whose group has too few
    /// gets those there are.
    #[serde(default)]
    pub same_group: bool,
    #[serde(default)]
    pub form: Form,
    /// The shot's question; absent, the profile's own template.
    #[serde(default)]
    pub template: Option<String>,
    /// The shot's answer. Besides what every template sees, it sees `gold` (a letter where the
    /// row has options) and `gold_text`.
    #[serde(default = "default_answer")]
    pub answer: String,
}

fn default_answer() -> String {
    "Answer: {{ gold }}".to_owned()
}

/// Where shots come from, if not from a file of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    SameFile,
}

/// Which of the rows that may be shots a row gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choose {
    /// The first: the same for all rows, but for those that are shots themselves.
    #[default]
    First,
    /// By the profile's seed and the row's key: every row its own, so nothing of them is shared.
    ByRow,
}

/// How shots stand in the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A user's and an assistant's turn each.
    #[default]
    Turns,
    /// All in the user's turn, blank lines between.
    Inline,
}

/// An id as TOML may spell it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Id {
    Number(i64),
    Text(String),
}

impl Id {
    fn text(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

impl FewShot {
    /// What is wrong with it as a whole: the key and why.
    pub(super) fn problem(&self) -> Option<(&'static str, &'static str)> {
        match (&self.file, self.from) {
            (None, None) => return Some(("few_shot", "`few_shot` needs `file` or `from`")),
            (Some(_), Some(_)) => {
                return Some(("few_shot.from", "`from` and `file` exclude each other"));
            }
            _ => {}
        }
        match self.count {
            None if self.ids.is_empty() => Some(("few_shot", "`few_shot` needs `count` or `ids`")),
            Some(0) => Some((
                "few_shot.count",
                "`count` is 0; leave `few_shot` out instead",
            )),
            Some(count) if !self.ids.is_empty() && count > self.ids.len() => Some((
                "few_shot.count",
                "`count` is larger than the number of `ids`",
            )),
            _ => None,
        }
    }
}

/// The rows that may be shots, in order, as they are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Shots {
    pool: Vec<Shot>,
}

#[derive(Clone, Debug, PartialEq)]
struct Shot {
    key: String,
    /// The question as it is compared with the row's.
    question: String,
    group: Option<String>,
    turn: String,
    answer: String,
}

impl Shots {
    /// Collects the shots of a profile. `records` are the data set's own, as they are shown.
    pub(super) fn collect(profile: &Profile, records: &[Record]) -> Result<Self, ProfileError> {
        let Some(few_shot) = &profile.few_shot else {
            return Ok(Self::default());
        };
        let of_file;
        let rows = match &few_shot.file {
            None => records,
            Some(file) => {
                of_file = read(profile, file)?;
                &of_file
            }
        };
        let is_usable = |record: &&Record| {
            record.defect.is_none() && record.gold.is_some() && record.messages.is_empty()
        };
        let usable = rows.iter().filter(is_usable);
        let chosen: Vec<&Record> = if few_shot.ids.is_empty() {
            usable.collect()
        } else {
            let by_key: HashMap<&str, &Record> =
                usable.map(|record| (record.key.as_str(), record)).collect();
            let find = |id: &Id| {
                let id = id.text();
                by_key.get(id.as_str()).copied().ok_or_else(|| {
                    profile.few_shot_problem(format!(
                        "`few_shot.ids`: no row with a gold has the id `{id}`"
                    ))
                })
            };
            few_shot.ids.iter().map(find).collect::<Result<_, _>>()?
        };
        let wanted = few_shot.count.unwrap_or(chosen.len());
        if chosen.len() < wanted {
            return Err(profile.few_shot_problem(format!(
                "`few_shot.count` is {wanted}, but only {} rows have a gold",
                chosen.len()
            )));
        }
        let pool = chosen
            .into_iter()
            .map(|record| shot(profile, few_shot, record))
            .collect::<Result<_, _>>()?;
        Ok(Self { pool })
    }

    /// The shots of a row, in the order they are shown.
    fn of<'a>(&'a self, few_shot: &FewShot, seed: u64, record: &Record) -> Vec<&'a Shot> {
        let question = comparable(&record.question);
        let mut others = self.pool.iter().filter(|shot| {
            shot.key != record.key
                && shot.question != question
                && (!few_shot.same_group || shot.group == record.group)
        });
        let count = few_shot.count.unwrap_or(self.pool.len());
        match few_shot.choose {
            Choose::First => others.take(count).collect(),
            Choose::ByRow => {
                let mut rest: Vec<&Shot> = others.by_ref().collect();
                let mut draws = Draws::new(seed, PURPOSE, &record.key);
                let count = count.min(rest.len());
                for place in 0..count {
                    let other = place + draws.below(rest.len() - place);
                    rest.swap(place, other);
                }
                rest.truncate(count);
                rest
            }
        }
    }

    /// The turns up to and with the row's own question.
    pub(super) fn turns(&self, profile: &Profile, record: &Record, own: String) -> Vec<Message> {
        let turn = |role: &str, content: String| Message {
            role: role.to_owned(),
            content,
        };
        let Some(few_shot) = &profile.few_shot else {
            return vec![turn("user", own)];
        };
        let shots = self.of(few_shot, profile.seed, record);
        match few_shot.form {
            Form::Turns => shots
                .into_iter()
                .flat_map(|shot| {
                    [
                        turn("user", shot.turn.clone()),
                        turn("assistant", shot.answer.clone()),
                    ]
                })
                .chain([turn("user", own)])
                .collect(),
            Form::Inline => {
                let shown = shots
                    .into_iter()
                    .map(|shot| format!("{}\n{}", shot.turn, shot.answer));
                let parts: Vec<String> = shown.chain([own]).collect();
                vec![turn("user", parts.join(BETWEEN))]
            }
        }
    }
}

/// The rows of a file of shots, shuffled as the data set's own are.
fn read(profile: &Profile, file: &Path) -> Result<Vec<Record>, ProfileError> {
    let path = profile.folder.join(file);
    let read = dataset::read_with(&path, &profile.mapping).map_err(|error| {
        profile.few_shot_problem(format!("`few_shot.file` cannot be used: {error}"))
    })?;
    let mut records = read.records;
    if profile.shuffle_options {
        for record in &mut records {
            shuffle::shuffle(record, profile.seed);
        }
    }
    Ok(records)
}

fn shot(profile: &Profile, few_shot: &FewShot, record: &Record) -> Result<Shot, ProfileError> {
    let question = match &few_shot.template {
        Some(text) => Template::new("few_shot.template", text),
        None => Template::new("template", &profile.template),
    };
    let (gold, gold_text) = match record.gold.as_ref() {
        Some(Gold::Option(index)) => (
            option_letter(*index),
            record.options.get(*index).cloned().unwrap_or_default(),
        ),
        Some(Gold::Text(text)) => (text.clone(), text.clone()),
        None => Default::default(),
    };
    let gold = context! { gold => gold, gold_text => gold_text };
    let answer = Template::new("few_shot.answer", &few_shot.answer);
    Ok(Shot {
        key: record.key.clone(),
        question: comparable(&record.question),
        group: record.group.clone(),
        turn: template::render(&profile.name, question, record, None)?,
        answer: template::render(&profile.name, answer, record, Some(gold))?,
    })
}

/// A question without what does not make it another: case and blanks.
fn comparable(question: &str) -> String {
    let words: Vec<&str> = question.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests;
