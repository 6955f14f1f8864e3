//! What scoring a run again changed: as a table, and as one JSON object (schema
//! `podium.rescore/1`).

use super::lint::LintBrief;
use super::summary::lenient_words;
use super::table::{Align, Table, bold, grouped, percent, printable};
use crate::score::Status;
use crate::submission::ResultRow;
use crate::submission::manifest::{Accuracy, LenientAccuracy};
use crate::submission::write::status_name;

pub const RESCORE_SCHEMA: &str = "podium.rescore/1";

/// Changed samples that the table names.
const MAX_NAMED: usize = 20;

/// Verdicts before and after.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Rescore {
    pub schema: String,
    pub run: String,
    /// The profile whose rules are in force now.
    pub profile: String,
    pub scoring_hash_before: String,
    pub scoring_hash: String,
    pub accuracy_before: Option<Accuracy>,
    pub accuracy: Accuracy,
    /// By the lenient answers; absent as [`crate::submission::manifest::Tally`]'s.
    pub lenient_before: Option<LenientAccuracy>,
    pub lenient: Option<LenientAccuracy>,
    pub n_samples: u64,
    /// Samples whose status, strict answer or its correctness changed.
    pub n_changed: u64,
    /// Wrong before, right now.
    pub n_gained: u64,
    /// Right before, wrong now.
    pub n_lost: u64,
    /// All of them, in input order.
    pub changes: Vec<Change>,
    /// What reading the new submission back found; absent when it could not be read.
    pub lint: Option<LintBrief>,
}

/// A sample with another verdict.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Change {
    pub key: String,
    pub sample: u32,
    pub before: Verdict,
    pub after: Verdict,
}

/// A verdict as `scores.csv` has it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verdict {
    pub status: Status,
    pub correct: Option<bool>,
    pub answer: Option<String>,
}

impl Verdict {
    pub fn of(row: &ResultRow) -> Self {
        Self {
            status: row.status,
            correct: row.correct,
            answer: row.answer.as_ref().map(|answer| answer.text.clone()),
        }
    }

    fn text(&self) -> String {
        let correct = match self.correct {
            Some(true) => "right",
            Some(false) => "wrong",
            None => "no gold",
        };
        match &self.answer {
            Some(answer) => format!("{answer} ({correct})"),
            None => format!("{} ({correct})", status_name(self.status)),
        }
    }
}

impl Rescore {
    /// Takes all samples and keeps and counts those that changed.
    #[must_use]
    pub fn with_changes<'a>(
        mut self,
        samples: impl Iterator<Item = (&'a ResultRow, Verdict, Verdict)>,
    ) -> Self {
        for (row, before, after) in samples.filter(|(_, before, after)| before != after) {
            self.n_changed += 1;
            match (before.correct, after.correct) {
                (Some(true), Some(false)) => self.n_lost += 1,
                (Some(false), Some(true)) => self.n_gained += 1,
                _ => {}
            }
            self.changes.push(Change {
                key: row.key.clone(),
                sample: row.sample,
                before,
                after,
            });
        }
        self
    }

    /// One JSON object on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a rescore has only text keys")
    }

    pub fn render(&self, color: bool) -> String {
        let run = printable(&self.run);
        let title = if color { bold(&run) } else { run };
        let mut text = format!(
            "{title}\n{} samples judged by profile {}, {} verdicts changed\n",
            grouped(self.n_samples),
            printable(&self.profile),
            grouped(self.n_changed)
        );
        let mut table = Table::with_header(
            &[Align::Left, Align::Right, Align::Right, Align::Left],
            &["accuracy", "correct", "share", "95 % interval"],
        );
        let mut line = |label: &str, accuracy: &Accuracy| {
            let interval = match (accuracy.low, accuracy.high) {
                (Some(low), Some(high)) => format!("{} to {}", percent(low), percent(high)),
                _ => String::new(),
            };
            table.push(vec![
                label.to_owned(),
                format!("{}/{}", accuracy.n_correct, accuracy.n),
                accuracy.accuracy.map_or_else(String::new, percent),
                interval,
            ]);
        };
        let has_lenient = self.lenient_before.is_some() || self.lenient.is_some();
        let strict = if has_lenient { ", strict" } else { "" };
        for (when, accuracy, lenient) in [
            (
                "before",
                self.accuracy_before.as_ref(),
                &self.lenient_before,
            ),
            ("now", Some(&self.accuracy), &self.lenient),
        ] {
            if let Some(accuracy) = accuracy {
                line(&format!("{when}{strict}"), accuracy);
            }
            if let Some(lenient) = lenient {
                line(&format!("{when}, lenient"), &lenient.accuracy);
            }
        }
        text += &format!("\n{}", table.render(color));
        text += &self
            .lenient
            .as_ref()
            .and_then(lenient_words)
            .unwrap_or_default();
        if let Some(lint) = &self.lint {
            text += &format!("\n{}", lint.render());
        }
        if self.n_changed == 0 {
            return text;
        }
        text += &format!(
            "\nwrong to right: {}, right to wrong: {}, other: {}\n\n",
            grouped(self.n_gained),
            grouped(self.n_lost),
            grouped(self.n_changed - self.n_gained - self.n_lost)
        );
        let mut table = Table::with_header(
            &[Align::Left, Align::Right, Align::Left, Align::Left],
            &["row", "sample", "before", "now"],
        );
        for change in self.changes.iter().take(MAX_NAMED) {
            table.push(vec![
                change.key.clone(),
                change.sample.to_string(),
                change.before.text(),
                change.after.text(),
            ]);
        }
        text += &table.render(color);
        if let Some(more) = self.changes.len().checked_sub(MAX_NAMED).filter(|&n| n > 0) {
            text += &format!("and {} more; `--json` has all\n", grouped(more as u64));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tally::accuracy;
    use crate::submission::test_rows::{row, unanswered, wrong};

    #[test]
    fn only_changed_verdicts_are_counted_and_named() {
        let pairs = [
            (row("a", 0), row("a", 0)),
            (row("b", 0), wrong("b", 0, "9")),
            (wrong("c", 0, "9"), row("c", 0)),
            (wrong("d", 0, "9"), unanswered("d", 0, Status::NoAnswer)),
        ];
        let rescore = Rescore {
            run: "r".to_owned(),
            profile: "qa".to_owned(),
            accuracy_before: Some(accuracy(2, 4)),
            accuracy: accuracy(2, 4),
            lenient: Some(LenientAccuracy {
                accuracy: accuracy(3, 4),
                n_unanswered: 1,
                n_found: 1,
                n_gained: 1,
            }),
            n_samples: 4,
            ..Rescore::default()
        }
        .with_changes(
            pairs
                .iter()
                .map(|(old, new)| (old, Verdict::of(old), Verdict::of(new))),
        );
        assert_eq!(
            (rescore.n_changed, rescore.n_gained, rescore.n_lost),
            (3, 1, 1)
        );
        let expected = "\
r
4 samples judged by profile qa, 3 verdicts changed

accuracy        correct   share  95 % interval
before, strict      2/4  50.0 %  15.0 % to 85.0 %
now, strict         2/4  50.0 %  15.0 % to 85.0 %
now, lenient        3/4  75.0 %  30.1 % to 95.4 %
Without a strict answer: 1; stating one elsewhere: 1; the right one: 1.

wrong to right: 1, right to wrong: 1, other: 1

row  sample  before        now
b         0  4200 (right)  9 (wrong)
c         0  9 (wrong)     4200 (right)
d         0  9 (wrong)     no_answer (wrong)
";
        assert_eq!(rescore.render(false), expected);
        let json: serde_json::Value = serde_json::from_str(&rescore.to_json()).expect("our own");
        assert_eq!(json["changes"][0]["after"]["correct"], false);
    }
}
