//! A run's files: the append-only result log, and the submission rebuilt from it.
//!
//! A finished sample is a [`ResultRow`], a line of the [`log`]. Everything else in a run folder
//! is made from the log and the manifest and replaced whole ([`mod@write`], [`manifest`]), so a run
//! that was killed and resumed leaves the same submission as one that was not. One process at a
//! time writes to a folder ([`lock`]); readers need no lock. What was written is read back as the
//! competition would ([`mod@lint`]). Which rows to run and how they are scored is decided elsewhere.

pub mod answer_of;
pub mod cells;
pub mod environment;
pub mod find;
pub mod format;
pub mod identity;
pub mod lint;
pub mod lock;
pub mod log;
pub mod manifest;
pub mod merge;
pub mod null_words;
pub mod package;
pub mod prompts;
pub mod questions;
pub mod reply_text;
pub mod results;
pub mod vote;
pub mod write;

#[cfg(test)]
pub(crate) mod test_rows;

pub use results::Results;

use std::borrow::Cow;

use crate::dataset::Gold;
use crate::engine::StopReason;
use crate::score::{Answer, Lenient, Status};

/// The schema of a line of `results.jsonl`.
pub const RESULT_SCHEMA: &str = "podium.result/1";

/// A line of `results.jsonl`: one finished sample (schema `podium.result/1`).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ResultRow {
    pub schema: String,
    pub key: String,
    pub id: Option<serde_json::Value>,
    pub sample: u32,
    pub status: Status,
    pub correct: Option<bool>,
    pub gold: Option<Gold>,
    pub answer: Option<Answer>,
    /// The lenient verdict on a row without a strict answer ([`Status::is_unanswered`]), its span in
    /// `raw_text`. Absent in other rows, whose lenient answer is the strict one, and in logs of
    /// versions that did not look for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lenient: Option<Lenient>,
    /// What the model wrote, special tokens spelled out.
    pub raw_text: String,
    /// The text of the last final message.
    pub final_text: Option<String>,
    pub output_ids: Vec<u32>,
    /// Sum of the output tokens' log-probabilities, added in order in f32.
    pub logprob_sum: Option<f32>,
    /// The same, its f32 bits in hex.
    pub logprob_sum_bits: Option<String>,
    pub prompt_tokens: u32,
    /// Prompt tokens whose KV was taken from a shared prefix.
    pub reused_tokens: u32,
    pub analysis_tokens: u32,
    pub final_tokens: u32,
    pub stop_reason: Option<StopReason>,
    pub group: Option<String>,
    pub cluster: Option<String>,
    /// From the row's start in a slot to its end.
    pub seconds: Option<f64>,
    /// What was wrong with the reply's chat format, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub format_issues: Vec<String>,
    /// Why the row is in error, with file and line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RowError>,
    /// Hash over the bits of every step's logits (`--trace-hash`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_hash: Option<String>,
    /// The numerics this row ran under, where a run mixes several (`--allow-mixed`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics_id: Option<String>,
    /// The range of `output_ids` that podium wrote, not the model: it closes the analysis where
    /// only the answer headroom was left (`--answer-headroom`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<[u32; 2]>,
    /// The row's second stage, which the verdict is about: `status`, `correct`, `answer` (its span
    /// is in the second stage's final text) and `lenient` (in its raw text). All other fields are then the first stage's,
    /// `final_text` the open answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<SecondStage>,
}

/// The second stage of a row that has one: the fields of [`ResultRow`] for its reply.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SecondStage {
    /// The user's second turn.
    pub user_turn: String,
    pub raw_text: String,
    pub final_text: Option<String>,
    pub output_ids: Vec<u32>,
    /// Over this stage's tokens alone, as the row's own is over the first's.
    pub logprob_sum: f32,
    pub logprob_sum_bits: String,
    /// The first stage's prompt is among them.
    pub prompt_tokens: u32,
    pub reused_tokens: u32,
    pub analysis_tokens: u32,
    pub final_tokens: u32,
    pub stop_reason: StopReason,
    pub seconds: f64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub format_issues: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<[u32; 2]>,
}

/// Why a row is in error.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RowError {
    pub message: String,
    pub hint: String,
    pub file: String,
    pub line: usize,
    pub field: Option<String>,
    /// A resume tries the row again (a passing failure of the device, not of the row).
    pub transient: bool,
}

impl ResultRow {
    /// The tokens of all stages, one after the other.
    pub fn all_output_ids(&self) -> Cow<'_, [u32]> {
        match &self.second {
            None => Cow::Borrowed(&self.output_ids),
            Some(second) => Cow::Owned([&self.output_ids[..], &second.output_ids].concat()),
        }
    }

    /// The raw text of the stage that the verdict is about.
    pub fn last_raw_text(&self) -> &str {
        let second = self.second.as_ref();
        second.map_or(&self.raw_text, |second| &second.raw_text)
    }

    /// Whether podium closed the analysis of one of its stages at the answer headroom.
    pub fn is_closed(&self) -> bool {
        let second = self.second.as_ref().and_then(|second| second.forced);
        self.forced.is_some() || second.is_some()
    }

    /// The answer that the lenient score goes by: the strict one where there is one.
    pub fn lenient_answer(&self) -> Option<&Answer> {
        let lenient = self.lenient.as_ref().and_then(|it| it.answer.as_ref());
        self.answer.as_ref().or(lenient)
    }

    /// Whether the lenient answer is right; absent without gold.
    pub fn lenient_correct(&self) -> Option<bool> {
        match &self.lenient {
            Some(lenient) => lenient.correct,
            None => self.correct,
        }
    }

    /// False in logs of versions that looked for no lenient answers, where one may be.
    pub fn has_lenient(&self) -> bool {
        self.lenient.is_some() || !self.status.is_unanswered()
    }

    /// Whether a resume leaves this row alone: it ran, or failed for a reason of its own.
    pub fn is_finished(&self) -> bool {
        match self.status {
            Status::NotRun => false,
            Status::Error => !self.error.as_ref().is_some_and(|error| error.transient),
            _ => true,
        }
    }
}
