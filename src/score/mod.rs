//! Answers out of replies, and answers against keys. Never sees the engine.
//!
//! [`judge`] goes from a parsed reply to a [`Verdict`]: the reply's status, then the answer by
//! the profile's rules ([`extract`]), then the answer against the gold ([`metric`]).
//! [`judge_text`] starts at a saved final text, for scoring a run again without its model.
//!
//! The verdict is strict: the answer is what the last finished final message says. Beside it
//! stands the [`Lenient`] one, of what else the reply says ([`mod@lenient`]); it changes neither
//! status nor correctness, and is never voted on or submitted.

pub mod baseline;
mod choice;
mod code;
mod correction;
pub mod extract;
pub mod interval;
pub mod lenient;
pub mod metric;
pub mod number;
pub mod pass_at;
pub mod vote;

use serde::{Deserialize, Serialize};

use crate::dataset::{Gold, Record};
use crate::engine::StopReason;
use crate::prompt::harmony::{Channel, Reply};

pub use choice::letter as option_letter;
pub use extract::{Extraction, Rule};

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// An answer was found.
    Answered,
    /// The token budget ended in the analysis.
    TruncatedAnalysis,
    /// The token budget ended in the final message.
    TruncatedFinal,
    /// The model stopped without a final message.
    NoFinal,
    /// The model called a tool.
    ToolCall,
    /// The reply does not follow the chat format.
    Malformed,
    /// A final message without an answer that any rule finds.
    NoAnswer,
    /// The answer is none of the row's options.
    NotAnOption,
    /// The row could not be run.
    Error,
    /// The run ended before this sample.
    NotRun,
}

impl Status {
    /// Whether the model had its say and no answer came of it: what a lenient one is looked for in.
    pub fn is_unanswered(self) -> bool {
        match self {
            Self::TruncatedAnalysis
            | Self::TruncatedFinal
            | Self::NoFinal
            | Self::ToolCall
            | Self::Malformed
            | Self::NoAnswer => true,
            Self::Answered | Self::NotAnOption | Self::Error | Self::NotRun => false,
        }
    }
}

/// The answer read from a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The answer as it is scored and submitted.
    pub text: String,
    /// The rule that found it.
    pub rule: String,
    /// Byte span in the final text; a lenient answer's in the raw text.
    pub span: [usize; 2],
    /// Whether every other rule that found something found the same.
    pub rules_agree: bool,
    /// The channel of the message it was read from, as the model wrote it; absent where the
    /// message has none. Older logs do not say, and had answers from `final` alone.
    #[serde(default = "final_channel")]
    pub channel: Option<String>,
}

fn final_channel() -> Option<String> {
    Channel::Final.name().map(str::to_owned)
}

/// The second verdict on a sample without a strict answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lenient {
    /// Absent where nothing that the reply says is one.
    pub answer: Option<Answer>,
    /// Absent without gold.
    pub correct: Option<bool>,
}

/// A reply and how it came to its end.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    pub reply: &'a Reply,
    pub stop: StopReason,
    /// Whether podium closed its analysis at the answer headroom.
    pub is_closed: bool,
}

/// The verdict on one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub status: Status,
    /// Absent without gold.
    pub correct: Option<bool>,
    pub answer: Option<Answer>,
    /// There for a reply that came to no strict answer ([`Status::is_unanswered`]), and only then.
    pub lenient: Option<Lenient>,
}

/// How an answer is compared with the gold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scorer {
    /// By the row: `choice` with options, `decimal` where the gold is a number, else
    /// `normalized`.
    #[default]
    Auto,
    /// The same text, but for blanks at the ends.
    Exact,
    /// The same text without case, articles, blanks and punctuation at the ends.
    Normalized,
    /// The same whole number, of any size.
    Integer,
    /// The same number within the tolerance; two whole numbers must be equal.
    Decimal,
    /// The same option.
    Choice,
}

/// A profile's scoring: covered by the run's `scoring_hash`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scoring {
    #[serde(default)]
    pub scorer: Scorer,
    /// Tried in order; the first that finds an answer decides.
    pub rules: Vec<Rule>,
    /// Of `decimal`: relative above 1, absolute below.
    #[serde(default = "default_tolerance")]
    pub tolerance: f64,
    /// How several samples of a question make one score.
    #[serde(default)]
    pub aggregate: Aggregate,
}

/// How several samples of a question make one score. It names the figure that is the run's score
/// and the unit of a comparison; with one sample all are the same. The submission gives the
/// majority's answer, with `first` the first sample's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// The first sample alone.
    First,
    /// maj@k: the answer that most samples give ([`vote`]).
    Majority,
    /// pass@k: any right sample will do ([`pass_at`]).
    Pass,
    /// mean@k: the share of right samples.
    #[default]
    Mean,
}

impl Aggregate {
    /// As summaries name it, of `k` samples.
    pub fn label(self, k: u32) -> String {
        match self {
            Self::First => "the first sample".to_owned(),
            Self::Majority => format!("maj@{k}"),
            Self::Pass => format!("pass@{k}"),
            Self::Mean => format!("mean@{k}"),
        }
    }
}

fn default_tolerance() -> f64 {
    1e-6
}

impl Scoring {
    /// With `auto` replaced where the whole data set agrees, so that rows without gold are read
    /// as the others are.
    pub fn resolve(&self, records: &[Record]) -> Self {
        let mut resolved = self.clone();
        if self.scorer == Scorer::Auto {
            let usable = || records.iter().filter(|record| record.defect.is_none());
            let mut golds = usable()
                .filter_map(|record| record.gold.as_ref())
                .peekable();
            let has_golds = golds.peek().is_some();
            if usable().all(|record| !record.options.is_empty()) {
                resolved.scorer = Scorer::Choice;
            } else if usable().all(|record| record.options.is_empty())
                && has_golds
                && golds.all(is_number)
            {
                resolved.scorer = Scorer::Decimal;
            }
        }
        resolved
    }

    /// The scorer of one row; never [`Scorer::Auto`].
    pub fn scorer_for(&self, record: &Record) -> Scorer {
        match self.scorer {
            Scorer::Auto if !record.options.is_empty() => Scorer::Choice,
            Scorer::Auto if record.gold.as_ref().is_some_and(is_number) => Scorer::Decimal,
            Scorer::Auto => Scorer::Normalized,
            scorer => scorer,
        }
    }
}

fn is_number(gold: &Gold) -> bool {
    match gold {
        Gold::Option(_) => false,
        Gold::Text(text) => number::parse(text).is_some(),
    }
}

/// The verdict on a reply.
pub fn judge(record: &Record, scoring: &Scoring, ended: Ended) -> Verdict {
    if record.defect.is_some() {
        return without_answer(record, Status::Error);
    }
    let reply = ended.reply;
    let mut verdict = match (status(reply, ended.stop), &reply.final_text) {
        (Some(status), _) => without_answer(record, status),
        (None, Some(text)) => judge_text(record, scoring, text),
        (None, None) => without_answer(record, Status::NoFinal),
    };
    if verdict.status.is_unanswered() {
        verdict.lenient = Some(lenient::lenient(record, scoring, ended));
    }
    verdict
}

/// The verdict on a finished final message, by its text alone.
pub fn judge_text(record: &Record, scoring: &Scoring, final_text: &str) -> Verdict {
    let scorer = scoring.scorer_for(record);
    let (status, answer) =
        match extract::extract(final_text, &record.options, scorer, &scoring.rules) {
            Extraction::Found(answer) => (Status::Answered, answer),
            Extraction::NotAnOption(answer) => (Status::NotAnOption, answer),
            Extraction::Nothing => return without_answer(record, Status::NoAnswer),
        };
    let is_option = status == Status::Answered;
    Verdict {
        status,
        correct: is_correct(record, scoring, &answer).map(|is_correct| is_option && is_correct),
        answer: Some(answer),
        lenient: None,
    }
}

/// Whether an answer is the gold; absent without gold.
fn is_correct(record: &Record, scoring: &Scoring, answer: &Answer) -> Option<bool> {
    let (scorer, options) = (scoring.scorer_for(record), &record.options);
    let gold = record.gold.as_ref()?;
    let is_correct = metric::is_correct(scorer, &answer.text, gold, options, scoring.tolerance);
    Some(is_correct)
}

/// The verdict on a row that gave no answer: wrong, where there is a gold and the row was tried.
pub fn without_answer(record: &Record, status: Status) -> Verdict {
    let counts = status != Status::NotRun && record.gold.is_some();
    let correct = counts.then_some(false);
    let nothing = Lenient {
        answer: None,
        correct,
    };
    Verdict {
        status,
        correct,
        answer: None,
        lenient: status.is_unanswered().then_some(nothing),
    }
}

/// Why a reply has no final message to read; absent when it has one.
pub fn status(reply: &Reply, stop: StopReason) -> Option<Status> {
    if reply.finished_final().is_some() {
        return None;
    }
    if reply.calls_tool() {
        return Some(Status::ToolCall);
    }
    match stop {
        StopReason::Length if reply.truncated_in == Some(Channel::Final) => {
            Some(Status::TruncatedFinal)
        }
        StopReason::Length => Some(Status::TruncatedAnalysis),
        // A stop id that the chat format does not have ended the final message.
        StopReason::Stop if reply.final_text.is_some() => None,
        StopReason::Stop if reply.is_well_formed() => Some(Status::NoFinal),
        StopReason::Stop => Some(Status::Malformed),
    }
}

#[cfg(test)]
mod tests;
