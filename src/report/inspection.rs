//! What `podium inspect` says of a prompt file: an object for programs, a page of text for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::table::percent;
use crate::dataset::{Format, Mapping};

pub const INSPECT_SCHEMA: &str = "podium.inspect/1";

/// Golds that the text names; the object has all.
const MAX_GOLDS: usize = 10;
/// Reasons that the text names.
const MAX_REASONS: usize = 10;

/// A prompt file as it is read and rendered.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub schema: &'static str,
    pub dataset: String,
    pub format: Format,
    pub content_hash: String,
    pub mapping: Mapping,
    pub profile: String,
    pub n_rows: usize,
    /// Rows that cannot run, too long ones among them.
    pub n_defects: usize,
    /// Why they cannot, the most frequent reason first.
    pub defects: Vec<Reason>,
    pub n_gold: usize,
    /// Each gold and its count, the most frequent first.
    pub golds: Vec<(String, u64)>,
    /// Accuracy of always giving the most frequent gold.
    pub majority_baseline: Option<f64>,
    /// Accuracy of guessing evenly among each row's options.
    pub random_baseline: Option<f64>,
    pub groups: BTreeMap<String, usize>,
    /// Rows by their number of options.
    pub n_options: BTreeMap<usize, usize>,
    pub tokenizer: String,
    /// Absent where no row renders.
    pub prompt_tokens: Option<Lengths>,
    /// `--context`, else the model's own.
    pub context: usize,
    /// Rows whose prompt leaves no room for a reply in it.
    pub n_too_long: usize,
    /// The first prompt that renders, special tokens spelled out.
    pub first_prompt: Option<String>,
}

/// A reason why rows cannot run, as the first of them says it.
#[derive(Debug, Serialize)]
pub struct Reason {
    pub message: String,
    pub hint: String,
    pub field: Option<String>,
    pub n_rows: usize,
    /// The first such row, and the line it begins on.
    pub first_key: String,
    pub first_line: usize,
}

/// Prompt lengths in tokens; a percentile is the least length that so many rows do not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lengths {
    pub min: usize,
    pub median: usize,
    pub p90: usize,
    pub p99: usize,
    pub max: usize,
}

impl Lengths {
    /// Of any lengths; absent without one.
    pub fn new(mut lengths: Vec<usize>) -> Option<Self> {
        lengths.sort_unstable();
        let percentile = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100);
            lengths.get(rank.saturating_sub(1)).copied()
        };
        Some(Self {
            min: percentile(0)?,
            median: percentile(50)?,
            p90: percentile(90)?,
            p99: percentile(99)?,
            max: percentile(100)?,
        })
    }
}

impl Inspection {
    /// The page for people.
    pub fn render(&self) -> String {
        let mut text = format!(
            "{}: {} rows of {}\n{}\nprofile {}\n",
            self.dataset,
            self.n_rows,
            self.format,
            indent(&self.mapping.to_string()),
            self.profile
        );
        if let Some(prompt) = &self.first_prompt {
            let _ = write!(text, "\nfirst prompt\n{}\n", indent(prompt));
        }
        if let Some(Lengths {
            min,
            median,
            p90,
            p99,
            max,
        }) = self.prompt_tokens
        {
            let _ = write!(
                text,
                "\nprompt tokens ({} tokenizer)\n  min {min}, median {median}, 90 % {p90}, \
                 99 % {p99}, max {max}\n  {} rows exceed a context of {} positions\n",
                self.tokenizer, self.n_too_long, self.context
            );
        }
        counts(&mut text, "groups", &self.groups);
        counts(&mut text, "options in a row", &self.n_options);
        self.render_golds(&mut text);
        self.render_defects(&mut text);
        text
    }

    fn render_golds(&self, text: &mut String) {
        let _ = write!(text, "\ngold in {} of {} rows\n", self.n_gold, self.n_rows);
        for (gold, n) in self.golds.iter().take(MAX_GOLDS) {
            let _ = writeln!(text, "  {}: {n}", gold.replace('\n', " "));
        }
        if self.golds.len() > MAX_GOLDS {
            let _ = writeln!(text, "  and {} others", self.golds.len() - MAX_GOLDS);
        }
        if let Some(majority) = self.majority_baseline {
            let _ = write!(text, "majority baseline {}", percent(majority));
            if let Some(random) = self.random_baseline {
                let _ = write!(text, ", by chance {}", percent(random));
            }
            text.push('\n');
        }
    }

    fn render_defects(&self, text: &mut String) {
        if self.n_defects == 0 {
            return;
        }
        let _ = write!(text, "\n{} rows cannot run\n", self.n_defects);
        for reason in self.defects.iter().take(MAX_REASONS) {
            let field = match &reason.field {
                Some(field) => format!(", field `{field}`"),
                None => String::new(),
            };
            let more = match reason.n_rows {
                1 => String::new(),
                n => format!(", {} more like it", n - 1),
            };
            let _ = write!(
                text,
                "  {}\n    row `{}` in line {}{field}{more}; {}\n",
                reason.message, reason.first_key, reason.first_line, reason.hint
            );
        }
        if self.defects.len() > MAX_REASONS {
            let rest = self.defects.len() - MAX_REASONS;
            let _ = writeln!(text, "  and {rest} other reasons");
        }
    }
}

fn counts<K: std::fmt::Display>(text: &mut String, heading: &str, counts: &BTreeMap<K, usize>) {
    if counts.is_empty() {
        return;
    }
    let _ = write!(text, "\n{heading}\n");
    for (name, n) in counts {
        let _ = writeln!(text, "  {name}: {n}");
    }
}

/// Every line moved in by two blanks.
pub fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_lengths_that_occur() {
        assert_eq!(Lengths::new(vec![]), None);
        let lengths = |n: usize| Lengths::new((1..=n).rev().collect()).expect("there are some");
        let one = lengths(1);
        assert_eq!((one.min, one.median, one.p99, one.max), (1, 1, 1, 1));
        let hundred = lengths(100);
        assert_eq!((hundred.median, hundred.p90, hundred.p99), (50, 90, 99));
        assert_eq!(lengths(10).p99, 10);
    }
}
