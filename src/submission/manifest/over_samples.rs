//! What several samples a question come to: maj@k, mean@k and pass@k, each over the questions.

use super::Accuracy;
use crate::score::Aggregate;

/// The figures of a run with `k` samples a question.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct OverSamples {
    pub k: u32,
    /// Which of the figures is the profile's score.
    pub aggregate: Aggregate,
    /// maj@k over every question with gold that was run.
    pub majority: Accuracy,
    /// Votes that were tied: the answer of the lowest sample has won.
    pub n_tied: u64,
    /// Questions with gold whose samples were not all run: not in the figures below.
    pub n_incomplete: u64,
    /// mean@k: the mean over questions of the share of right samples, which is pass@1. Absent
    /// with early stop, which leaves out samples by what the others said.
    pub mean: Option<Estimate>,
    /// mean@k of the lenient answers; absent where `mean` is, and where rows are of a version that
    /// knew none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lenient_mean: Option<Estimate>,
    /// pass@k for the powers of two up to k, and for k; empty with early stop.
    pub pass: Vec<PassAt>,
}

/// pass@k for one k.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PassAt {
    pub k: u32,
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// A mean over questions with a 95 % interval.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Estimate {
    /// Questions.
    pub n: u64,
    pub value: f64,
    pub low: f64,
    pub high: f64,
    /// `wilson` where every question is wholly right or wrong, else `bootstrap` (over questions,
    /// percentiles, seed 0).
    pub method: String,
}
