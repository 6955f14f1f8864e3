//! Runs of the same questions side by side (design: the first run is the base, each other run is
//! set against it).
//!
//! [`load::LoadedRun`]s come in, read from finished run folders; [`compare`] joins them by key and
//! gives a [`Comparison`], the document `comparison.json` and all that the text, the table and the
//! page are rendered from. The figures come from [`crate::stats`]; no model is loaded.

pub mod build;
pub mod change;
pub mod check;
pub mod divergence;
pub mod join;
pub mod ledger;
pub mod load;
pub mod markdown;
pub mod pair;
pub mod render;
pub mod side;
pub mod words;
pub mod write;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataset::Gold;
use crate::score::Status;
use crate::submission::manifest::{Accuracy, GroupAccuracy, LenientAccuracy, Outcome};

pub use build::compare;

/// The schema of `comparison.json`.
pub const COMPARISON_SCHEMA: &str = "podium.comparison/1";

/// Runs of the same questions, set against the first of them. Absent figures were not measured or
/// do not apply. Shares and accuracies are from 0 to 1, differences are other less base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub schema: String,
    /// `<A>-vs-<B>`, of the folders' names.
    pub name: String,
    pub podium_version: String,
    /// Of the bootstrap and the permutation test.
    pub seed: u64,
    /// What differs besides the precision; not empty only with `--force`.
    pub differences: Vec<RunDifference>,
    /// In the order given; the first is the base.
    pub runs: Vec<ComparedRun>,
    /// Each other run against the base, in the order of `runs`.
    pub pairs: Vec<Pair>,
    /// A tensor class a row.
    pub ledger: Vec<LedgerClass>,
    /// In the base's input order, then those that only others have.
    pub questions: Vec<Question>,
    /// What else the reader should know, a sentence each.
    pub notes: Vec<String>,
}

/// A setting in which a run differs from the base. Values as canonical JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunDifference {
    /// Index in [`Comparison::runs`].
    pub run: usize,
    pub key: String,
    pub base: String,
    pub other: String,
}

/// A run by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComparedRun {
    /// `A`, `B`, …: how tables call it.
    pub label: String,
    /// The folder's name.
    pub name: String,
    pub run_dir: String,
    pub dataset: String,
    pub model: String,
    pub precision: String,
    pub generation_hash: String,
    pub scoring_hash: String,
    pub numerics: String,
    pub device: String,
    pub n_slots: usize,
    pub n_sessions: usize,
    /// How the newest session ended.
    pub outcome: Option<Outcome>,
    /// Samples a question.
    pub samples: u32,
    /// Strict: every question with gold that was run, by its first sample.
    pub accuracy: Accuracy,
    /// The same questions by the lenient answers; absent where the log is of a version that knew
    /// none, and in comparisons of such a version.
    #[serde(default)]
    pub lenient: Option<LenientAccuracy>,
    /// In the base's order of groups; empty when no row has a group.
    pub by_group: Vec<GroupAccuracy>,
    /// Samples of each status that occurs.
    pub statuses: BTreeMap<String, u64>,
    pub statuses_by_group: Vec<GroupStatuses>,
    pub tokens: TokenCounts,
    pub speed: Speed,
    pub memory: MemoryUse,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatuses {
    pub group: String,
    pub statuses: BTreeMap<String, u64>,
}

/// Sums over all samples that were run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenCounts {
    pub n_samples: u64,
    pub prompt: u64,
    /// Prompt tokens whose KV came from a shared prefix.
    pub reused: u64,
    /// Everything generated, special tokens included.
    pub output: u64,
    pub analysis: u64,
    pub r#final: u64,
    pub output_per_sample: Option<f64>,
}

/// Over all sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    pub wall_seconds: f64,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    pub prefill_tokens_per_s: Option<f64>,
    /// Generated tokens of live rows over decode time.
    pub decode_tokens_per_s: Option<f64>,
    pub rows_per_s: Option<f64>,
    pub occupancy: Option<f64>,
}

/// Of the newest session that measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Weights as loaded, by the ledger.
    pub weights_bytes: Option<u64>,
    pub planned_bytes: Option<u64>,
    /// Counted by the backend; equals the plan.
    pub allocated_bytes: Option<u64>,
    /// Growth of the process from before loading.
    pub measured_bytes: Option<u64>,
}

/// A run against the base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Index in [`Comparison::runs`]; the base is 0.
    pub run: usize,
    /// Questions that count in the figures below.
    pub n_questions: u64,
    /// Sample pairs that count in them.
    pub n_samples: u64,
    /// Sample pairs that do not.
    pub excluded: Excluded,
    /// Accuracies over the questions that count; with several samples the mean over questions of
    /// the share of right samples. Absent when there are none.
    pub accuracy_base: Option<f64>,
    pub accuracy_other: Option<f64>,
    /// Right and wrong by question; with several samples absent.
    pub table: Option<PairTable>,
    pub difference: Option<DifferenceEstimate>,
    pub tests: Tests,
    /// Standard error over clusters; only with a cluster field of 20 or more clusters.
    pub clustered: Option<Clustered>,
    pub detectable: Option<Detectable>,
    pub by_group: Vec<GroupPair>,
    pub identity: OutputIdentity,
    /// Changes by cause, in the order of [`Cause::ALL`]; all causes are there.
    pub causes: Vec<CauseCount>,
    /// Sample pairs whose correctness changed.
    pub n_flips: u64,
    /// Sample pairs whose status, answer or correctness changed.
    pub n_changes: u64,
    /// Every change, flips first, then in input order.
    pub changes: Vec<Change>,
    /// With `--divergence`.
    #[serde(default)]
    pub divergence: Option<divergence::Divergence>,
}

/// Sample pairs left out of the statistics, each counted once under the first that applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    /// The question or the sample is in one of the runs only.
    pub missing: u64,
    pub not_run: u64,
    pub error: u64,
    /// Both ran, but there is nothing to be right about.
    pub no_gold: u64,
}

/// Questions by what became of them in both runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairTable {
    pub both_right: u64,
    /// Right in the base only.
    pub lost: u64,
    /// Right in the other only.
    pub gained: u64,
    pub both_wrong: u64,
}

/// The difference in accuracy, other less base, with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DifferenceEstimate {
    pub difference: f64,
    pub low: f64,
    pub high: f64,
    /// How the interval was made, in words.
    pub method: String,
}

/// Tests of no difference, two-sided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tests {
    pub mcnemar_exact_p: Option<f64>,
    pub mcnemar_mid_p: Option<f64>,
    /// Sign flips of the questions' differences; with several samples a question.
    pub permutation_p: Option<f64>,
    pub n_permutations: Option<u64>,
    pub n_bootstrap: Option<u64>,
    /// The one that decides: over clusters where there are enough of them, else permutation with
    /// several samples, else exact McNemar.
    pub p: Option<f64>,
    pub p_method: Option<String>,
    /// Holm's adjustment of `p` over all pairs.
    pub p_holm: Option<f64>,
    /// `p_holm` is below 0.05.
    pub significant: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clustered {
    pub n_clusters: u64,
    pub standard_error: f64,
    pub low: f64,
    pub high: f64,
    pub p: f64,
}

/// The smallest difference that so many questions show with this power.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detectable {
    pub difference: f64,
    pub power: f64,
    pub alpha: f64,
    /// Share of questions that differ, as observed; absent with several samples.
    pub discordance: Option<f64>,
    pub formula: String,
}

/// One group of a pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupPair {
    pub group: String,
    pub n_questions: u64,
    pub accuracy_base: f64,
    pub accuracy_other: f64,
    pub difference: f64,
    /// Questions that went down and up.
    pub lost: u64,
    pub gained: u64,
}

/// How far the outputs of both runs are the same, over sample pairs that both ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OutputIdentity {
    pub n_samples: u64,
    /// The same token ids.
    pub n_same_tokens: u64,
    pub same_tokens_share: Option<f64>,
    /// The same token ids and the same bits of their summed log-probability.
    pub n_same_bits: u64,
    pub same_bits_share: Option<f64>,
    /// Pairs of which both have a hash of their logits, and those where it is the same.
    pub n_trace_hashes: u64,
    pub n_same_trace_hash: u64,
    /// First differing token, counted from 0, of the pairs that differ.
    pub first_difference_min: Option<u64>,
    pub first_difference_median: Option<f64>,
    pub first_difference_max: Option<u64>,
}

/// Why a sample's outcome changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Both gave an answer, and not the same.
    AnswerChanged,
    /// The same final text, read differently.
    ExtractionChanged,
    /// One of the two ran out of tokens.
    TruncatedInOne,
    /// The status changed in another way.
    StatusChanged,
    /// The same answer, judged differently.
    ScoringChanged,
}

impl Cause {
    pub const ALL: [Self; 5] = [
        Self::AnswerChanged,
        Self::ExtractionChanged,
        Self::TruncatedInOne,
        Self::StatusChanged,
        Self::ScoringChanged,
    ];

    /// As the files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AnswerChanged => "answer_changed",
            Self::ExtractionChanged => "extraction_changed",
            Self::TruncatedInOne => "truncated_in_one",
            Self::StatusChanged => "status_changed",
            Self::ScoringChanged => "scoring_changed",
        }
    }

    /// For reading.
    pub fn title(self) -> &'static str {
        match self {
            Self::AnswerChanged => "answer changed",
            Self::ExtractionChanged => "extraction changed",
            Self::TruncatedInOne => "truncated in one",
            Self::StatusChanged => "status changed",
            Self::ScoringChanged => "scoring changed",
        }
    }
}

/// Which way a change went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Right in the base, wrong in the other: a flip.
    Lost,
    /// Wrong in the base, right in the other: a flip.
    Gained,
    /// As right as before, or no gold.
    Neither,
}

impl Direction {
    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Gained => "gained",
            Self::Neither => "neither",
        }
    }
}

/// Changes of one cause, by direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CauseCount {
    pub cause: Cause,
    pub lost: u64,
    pub gained: u64,
    pub neither: u64,
}

/// A sample whose status, answer or correctness is not the base's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub key: String,
    pub sample: u32,
    pub group: Option<String>,
    pub cause: Cause,
    pub direction: Direction,
    pub gold: Option<Gold>,
    /// The rendered prompt.
    pub prompt: Option<String>,
    /// Counted from 0; absent when the tokens are the same.
    pub first_differing_token: Option<u64>,
    pub base: ChangeSide,
    pub other: ChangeSide,
}

/// One run's side of a change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeSide {
    pub status: Status,
    pub correct: Option<bool>,
    pub answer: Option<String>,
    /// The rule that found the answer, and its byte span in `final_text`.
    pub rule: Option<String>,
    pub span: Option<[usize; 2]>,
    pub final_text: Option<String>,
    /// The end of what the model wrote, where there is no final text.
    pub raw_tail: Option<String>,
    pub output_tokens: u64,
}

/// A question in all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub key: String,
    pub id: Option<Value>,
    pub group: Option<String>,
    pub cluster: Option<String>,
    /// In the order of [`Comparison::runs`]; absent where a run does not have the question.
    pub sides: Vec<Option<QuestionSide>>,
    /// In the order of [`Comparison::pairs`]: the first sample's change that is a flip, else the
    /// first that changed.
    pub changes: Vec<Option<QuestionChange>>,
}

/// What became of a question in one run; the first sample's status and answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuestionSide {
    pub status: Status,
    /// Share of right samples: 0 or 1 with one sample; absent without gold.
    pub correct: Option<f64>,
    pub answer: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuestionChange {
    pub cause: Cause,
    pub direction: Direction,
}

/// A tensor class in all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerClass {
    pub class: String,
    /// In the order of [`Comparison::runs`].
    pub sides: Vec<Option<LedgerSide>>,
    /// Each run's values against the base's, in the order of [`Comparison::pairs`].
    pub values: Vec<ValuesVerdict>,
}

/// One run's entry of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerSide {
    pub scheme: String,
    pub stored_bytes: u64,
    pub loaded_bytes: u64,
    pub lossless: Option<bool>,
    /// Of the loaded values against the stored ones, where it was measured.
    pub relative_error: Option<f64>,
}

/// Whether a class holds the same values in two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValuesVerdict {
    /// One checkpoint, and the same scheme or both lossless.
    Same,
    /// One checkpoint, held differently, and not both lossless.
    Differ,
    /// Another checkpoint, or the ledger does not say.
    Unknown,
}

#[cfg(test)]
pub(crate) mod tests;
