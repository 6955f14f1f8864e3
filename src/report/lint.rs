//! What reading a submission back found: the line of a summary, and the page of `podium lint`.

use super::summary::wrapped;
use super::table::{grouped, printable};
use crate::submission::lint::{Finding, Lint};

/// Findings that a summary names.
const MAX_IN_SUMMARY: usize = 5;
/// Findings that `podium lint` prints.
const MAX_PRINTED: usize = 100;

/// The part of a lint that stands in a summary.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LintBrief {
    pub n_files: usize,
    pub n_rows: usize,
    /// Cells whose word got a full stop, so that pandas does not read it as missing.
    pub n_stopped_words: usize,
    pub n_findings: usize,
    /// The first of them.
    pub findings: Vec<Finding>,
}

impl LintBrief {
    pub fn of(lint: &Lint) -> Self {
        let first = lint.files.first();
        Self {
            n_files: lint.files.len(),
            n_rows: first.map_or(0, |file| file.n_rows),
            n_stopped_words: first.map_or(0, |file| file.n_stopped_words),
            n_findings: lint.findings.len(),
            findings: lint.findings.iter().take(MAX_IN_SUMMARY).cloned().collect(),
        }
    }

    /// One line, and one more for each finding that is named.
    pub fn render(&self) -> String {
        let rows = plural(self.n_rows, "row");
        let mut text = match self.n_findings {
            0 => format!("submission read back: {rows}, nothing wrong"),
            n => format!("submission read back: {rows}, {} WRONG", plural(n, "thing")),
        };
        if self.n_stopped_words > 0 {
            text += &format!(
                "; {} with a word such as `None` got a full stop behind it, or pandas would read \
                 it as missing",
                plural(self.n_stopped_words, "cell")
            );
        }
        let mut text = wrapped(&text);
        for finding in &self.findings {
            text += &format!("  {}\n", line(finding));
        }
        if self.n_findings > self.findings.len() {
            text += &format!(
                "  and {} more; `podium lint` has them all\n",
                grouped((self.n_findings - self.findings.len()) as u64)
            );
        }
        text
    }
}

/// The whole lint as text.
pub fn render(lint: &Lint) -> String {
    let mut text = String::new();
    for finding in lint.findings.iter().take(MAX_PRINTED) {
        text += &format!("{}\n", line(finding));
    }
    if let Some(more) = lint
        .findings
        .len()
        .checked_sub(MAX_PRINTED)
        .filter(|&n| n > 0)
    {
        text += &format!("and {} more; `--json` has all\n", grouped(more as u64));
    }
    for file in &lint.files {
        text += &format!(
            "{}: {}\n",
            printable(&file.file),
            plural(file.n_rows, "row")
        );
    }
    for unchecked in &lint.unchecked {
        text += &format!("not checked: {unchecked}\n");
    }
    text += &match lint.findings.len() {
        0 => "nothing wrong\n".to_owned(),
        n => format!("{} wrong\n", plural(n, "thing")),
    };
    text
}

/// One JSON object on one line.
pub fn to_json(lint: &Lint) -> String {
    serde_json::to_string(lint).expect("a lint has only text keys")
}

fn line(finding: &Finding) -> String {
    printable(&format!("{}: {}", finding.place(), finding.message))
}

fn plural(n: usize, word: &str) -> String {
    let ending = if n == 1 { "" } else { "s" };
    format!("{} {word}{ending}", grouped(n as u64))
}
