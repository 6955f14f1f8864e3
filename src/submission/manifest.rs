//! The manifest `run.json` (schema `podium.run/1`): what the run is, where it ran, how it went.
//!
//! It holds all that is needed to repeat the run and to trust its figures: every effective value
//! with its origin, the hashes, the ledger and the memory plan as the engine printed them, a
//! session for each process that worked on it, and the tally. It is replaced whole at each
//! change, so that a kill leaves the last good one.

mod over_samples;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Number, Value};

pub use over_samples::{Estimate, OverSamples, PassAt};

use super::environment::Environment;
use super::identity::{Difference, GenerationIdentity, MAX_SAMPLES};
use super::write::{SubmissionFormat, WriteError, replace};
use crate::score::Scoring;
use crate::telemetry::device::DeviceLoad;
use crate::telemetry::memory::MemorySummary;
use crate::telemetry::throughput::{MAX_COUNT, ThroughputTotals, read_totals};
use crate::telemetry::utc_now;

pub const RUN_SCHEMA: &str = "podium.run/1";
pub const RUN_FILE: &str = "run.json";

/// The parts of the document whose counts are added up.
const SUMMED: [&str; 4] = ["ledger", "sessions", "totals", "tally"];

/// Where an effective value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    Default,
    Profile,
    Flag,
    /// The file named by `--config`.
    Config,
    /// The checkpoint's own files.
    Model,
}

/// An effective value of the configuration.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Setting {
    pub value: Value,
    pub origin: Origin,
}

/// `--shard I/N`, I from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shard {
    pub index: usize,
    pub count: usize,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every row has a result.
    Complete,
    /// By a signal, in good order.
    Stopped,
    TimeLimit,
    /// By an error of ours or of the device.
    Failed,
    /// It never said how: found open by the next session.
    Killed,
}

/// One call of the command; two where it lost its device and began anew.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Session {
    /// RFC 3339, UTC.
    pub start: String,
    /// Absent while it runs, or when it was killed.
    pub end: Option<String>,
    /// Absent while it runs.
    pub outcome: Option<Outcome>,
    pub device: String,
    pub numerics_id: String,
    pub n_slots: usize,
    /// The shard this session belonged to, in a merged run.
    pub shard: Option<Shard>,
    pub throughput: ThroughputTotals,
    pub memory: Option<MemorySummary>,
    /// Means of the device's samples while it generated.
    #[serde(default)]
    pub device_load: Option<DeviceLoad>,
    /// Matrix products by the kernel that did them, such as `moe_matmul_mxfp4`: what ran, counted
    /// where it ran. On a GPU all kernels, such as `moe_matmul_mxfp4_gate_up_w8`.
    #[serde(default)]
    pub kernel_calls: BTreeMap<String, u64>,
    /// From the start of the process, or of the run where it is not the process's first, to the
    /// first token.
    #[serde(default)]
    pub first_token_seconds: Option<f64>,
    /// Times that the device was lost. It is lost to the whole process, so the session ends with it.
    #[serde(default)]
    pub n_lost_devices: u32,
}

impl Session {
    /// A session that starts now.
    pub fn start(device: &str, numerics_id: &str, n_slots: usize) -> Self {
        Self {
            start: utc_now(),
            end: None,
            outcome: None,
            device: device.to_owned(),
            numerics_id: numerics_id.to_owned(),
            n_slots,
            shard: None,
            throughput: ThroughputTotals::default(),
            memory: None,
            device_load: None,
            kernel_calls: BTreeMap::new(),
            first_token_seconds: None,
            n_lost_devices: 0,
        }
    }
}

/// A share of right answers with its 95 % Wilson interval.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Accuracy {
    pub n_correct: u64,
    /// Questions with gold, `not_run` ones left out.
    pub n: u64,
    /// Absent when `n` is 0.
    pub accuracy: Option<f64>,
    pub low: Option<f64>,
    pub high: Option<f64>,
}

/// The accuracy by the lenient answers: where a question has no strict one, by what else its
/// reply says. Over the questions of the strict accuracy, and never below it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LenientAccuracy {
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Questions whose reply came to no strict answer.
    pub n_unanswered: u64,
    /// Those of them that have a lenient one.
    pub n_found: u64,
    /// Those of these that are right: what the lenient accuracy has more than the strict one.
    pub n_gained: u64,
}

/// The accuracy of one group.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GroupAccuracy {
    pub group: String,
    #[serde(flatten)]
    pub accuracy: Accuracy,
}

/// What became of the rows.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    pub n_questions: u64,
    pub n_samples: u64,
    /// Strict, over questions: each is judged by the sample that speaks for it.
    pub accuracy: Accuracy,
    /// Beside it. Absent without gold, and where a version that knew no lenient answers has logged
    /// or counted the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lenient: Option<LenientAccuracy>,
    /// In order of first appearance; empty when no row has a group.
    pub by_group: Vec<GroupAccuracy>,
    /// Samples of each status that occurs.
    pub statuses: BTreeMap<String, u64>,
    /// Accuracy of always giving the most frequent gold.
    pub majority_baseline: Option<f64>,
    /// Expected accuracy of choosing among the options by chance.
    pub random_baseline: Option<f64>,
    /// Absent with one sample a question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_samples: Option<OverSamples>,
    /// Over questions whose analysis podium closed at the answer headroom; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Accuracy>,
}

/// The document `run.json`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RunManifest {
    pub schema: String,
    pub name: String,
    pub generation_hash: String,
    pub scoring_hash: String,
    /// What turned replies into verdicts and samples into a score; older runs do not say.
    #[serde(default)]
    pub scoring: Option<Scoring>,
    /// The parts of `generation_hash`.
    pub generation: GenerationIdentity,
    /// Paths as they were given, redacted.
    pub dataset_path: String,
    pub model_path: String,
    pub profile: String,
    pub config: BTreeMap<String, Setting>,
    pub submission_format: SubmissionFormat,
    pub shard: Option<Shard>,
    /// Rows of the run before sharding.
    pub n_rows: usize,
    /// Bytes a tensor class as stored and as loaded.
    pub ledger: Value,
    pub memory_plan: Value,
    pub environment: Environment,
    pub sessions: Vec<Session>,
    /// Sums over the sessions.
    pub totals: ThroughputTotals,
    /// Absent until a session has ended.
    pub tally: Option<Tally>,
}

impl RunManifest {
    /// Reads a run folder's manifest.
    ///
    /// # Errors
    /// [`ManifestError::Missing`] when the folder holds none.
    pub fn read(run_dir: &Path) -> Result<Self, ManifestError> {
        let path = run_dir.join(RUN_FILE);
        let bytes = std::fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ManifestError::Missing {
                run_dir: run_dir.to_owned(),
            },
            _ => ManifestError::Read {
                path: path.clone(),
                source,
            },
        })?;
        let invalid = |reason: String| ManifestError::Invalid {
            path: path.clone(),
            reason,
        };
        // The schema first: a newer one need not have this one's fields.
        let document: Value =
            serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        match document.get("schema").and_then(Value::as_str) {
            Some(RUN_SCHEMA) => {}
            other => {
                return Err(invalid(format!(
                    "schema `{}`, expected `{RUN_SCHEMA}`",
                    other.unwrap_or("none")
                )));
            }
        }
        for part in SUMMED {
            let found = document.get(part).and_then(|value| too_large(value, part));
            if let Some((field, n)) = found {
                return Err(invalid(format!(
                    "`{field}` is {n}, expected at most {MAX_COUNT}"
                )));
            }
        }
        let manifest: Self =
            serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        let n_samples = manifest.generation.samples;
        if n_samples > MAX_SAMPLES {
            return Err(invalid(format!(
                "`generation.samples` is {n_samples}, expected at most {MAX_SAMPLES}"
            )));
        }
        // Another's folder must not name a file of ours to be replaced.
        if let Some(package) = &manifest.submission_format.package {
            package
                .check()
                .map_err(|reason| invalid(format!("`submission_format.package`: {reason}")))?;
        }
        Ok(manifest)
    }

    /// Replaces the folder's manifest.
    pub fn write(&self, run_dir: &Path) -> Result<PathBuf, WriteError> {
        let path = run_dir.join(RUN_FILE);
        replace(&path, |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        })?;
        Ok(path)
    }

    /// Refuses to go on in a folder whose tokens came from something else.
    pub fn check_same_generation(
        &self,
        run_dir: &Path,
        wanted: &GenerationIdentity,
        allow_mixed: bool,
    ) -> Result<(), ManifestError> {
        let differences: Vec<Difference> = wanted
            .differences(&self.generation)
            .into_iter()
            .filter(|difference| !(allow_mixed && difference.key == "numerics"))
            .collect();
        if differences.is_empty() {
            Ok(())
        } else {
            Err(ManifestError::Mismatch {
                run_dir: run_dir.to_owned(),
                differences,
            })
        }
    }

    /// Adds a session and returns its index. Sessions left open by a kill are closed with what
    /// their throughput log had reached.
    pub fn begin_session(&mut self, run_dir: &Path, session: Session) -> usize {
        for (index, open) in self.sessions.iter_mut().enumerate() {
            if open.outcome.is_none() {
                open.outcome = Some(Outcome::Killed);
                if let Some(totals) = read_totals(run_dir, index) {
                    open.throughput = totals;
                }
            }
        }
        self.sessions.push(session);
        self.sum_sessions();
        self.sessions.len() - 1
    }

    /// Closes the session begun last.
    pub fn end_session(
        &mut self,
        outcome: Outcome,
        throughput: ThroughputTotals,
        memory: Option<MemorySummary>,
        kernel_calls: BTreeMap<String, u64>,
    ) {
        if let Some(session) = self.sessions.last_mut() {
            session.end = Some(utc_now());
            session.outcome = Some(outcome);
            session.throughput = throughput;
            session.memory = memory;
            session.kernel_calls = kernel_calls;
        }
        self.sum_sessions();
    }

    pub(crate) fn sum_sessions(&mut self) {
        self.totals = ThroughputTotals::default();
        for session in &self.sessions {
            self.totals.add(&session.throughput);
        }
    }

    /// Start of the newest session: what `latest` goes by. RFC 3339 in UTC sorts as text.
    pub fn last_start(&self) -> &str {
        self.sessions
            .iter()
            .map(|session| session.start.as_str())
            .max()
            .unwrap_or_default()
    }
}

/// The first count above [`MAX_COUNT`], with the path of its field.
fn too_large<'a>(value: &'a Value, path: &str) -> Option<(String, &'a Number)> {
    match value {
        // What is past 64 bits is read as a float.
        Value::Number(number) => {
            let is_too_large = number.as_f64().is_some_and(|n| n > MAX_COUNT as f64);
            is_too_large.then(|| (path.to_owned(), number))
        }
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(i, item)| too_large(item, &format!("{path}[{i}]"))),
        Value::Object(fields) => fields
            .iter()
            .find_map(|(name, value)| too_large(value, &format!("{path}.{name}"))),
        _ => None,
    }
}

/// What can go wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("`{run_dir}` is not a run: it holds no `{RUN_FILE}`")]
    Missing { run_dir: PathBuf },
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("`{path}` is not a run's manifest: {reason}")]
    Invalid { path: PathBuf, reason: String },
    #[error("`{run_dir}` holds another generation: {}", spell(differences))]
    Mismatch {
        run_dir: PathBuf,
        differences: Vec<Difference>,
    },
}

/// `seed is 1, there 0; temperature is 0.6, there 1.0`.
pub(crate) fn spell(differences: &[Difference]) -> String {
    differences
        .iter()
        .map(|Difference { key, ours, theirs }| format!("`{key}` is {ours}, there {theirs}"))
        .collect::<Vec<_>>()
        .join("; ")
}

impl ManifestError {
    pub fn hint(&self) -> String {
        match self {
            Self::Missing { .. } => {
                "name a run by its folder, a unique prefix of its name, or `latest`".to_owned()
            }
            Self::Read { .. } => "check the folder's permissions".to_owned(),
            Self::Invalid { .. } => {
                "a newer podium may have written it; `--fresh` starts over and keeps the old folder"
                    .to_owned()
            }
            Self::Mismatch { differences, .. } => {
                let only_numerics = differences.iter().all(|d| d.key == "numerics");
                let mixed = if only_numerics {
                    ", `--allow-mixed` goes on and records it per row"
                } else {
                    ""
                };
                format!(
                    "give the same settings again, another `--out`, or `--fresh` to start over{mixed}"
                )
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
