//! Joins the shards of a run: complete, or refused with what is missing.
//!
//! Every shard's `prompts.jsonl` lists all rows of the run, so a merge knows the order and what
//! must be there without the data set. Lines of the logs are copied byte for byte: a figure that
//! went through a parser need not come out the same.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use super::identity::Difference;
use super::lock::{LockError, RunLock};
use super::log::{self, LogError, RESULTS_FILE};
use super::manifest::{ManifestError, RunManifest, Shard, Tally, spell};
use super::prompts::{PromptRow, PromptsError, read_prompts, write_prompts};
use super::write::{PickSample, WriteError, chosen_sample, replace, write_submission};
use super::{ResultRow, Results};
use crate::score::Status;

/// Keys that a message names.
const MAX_NAMED: usize = 10;

/// Counts the rows: those that speak for a question each, then all samples.
pub type CountRows<'a> = dyn Fn(&[&ResultRow], &[&ResultRow]) -> Tally + 'a;

/// What a merge needs beside the runs.
pub struct MergeOptions<'a> {
    /// Runs of different numerics may be joined; each row then says which it ran under.
    pub allow_mixed: bool,
    pub pick: &'a PickSample<'a>,
    pub tally: &'a CountRows<'a>,
}

struct Part {
    run_dir: PathBuf,
    manifest: RunManifest,
    /// The lines that count, with their row.
    lines: Vec<(ResultRow, Vec<u8>)>,
}

/// Joins `runs` into the folder `out`, which must hold no run yet, and returns its manifest.
///
/// # Errors
/// When the runs are not of one generation and scoring, when their prompts differ, when a sample
/// is in two of them, or when one is missing.
pub fn merge(
    runs: &[PathBuf],
    out: &Path,
    options: &MergeOptions,
) -> Result<RunManifest, MergeError> {
    let parts = runs
        .iter()
        .map(|run_dir| read_part(run_dir))
        .collect::<Result<Vec<_>, _>>()?;
    let (Some(first), Some(first_dir)) = (parts.first(), runs.first()) else {
        return Err(MergeError::NoRuns);
    };
    let prompts = read_prompts(first_dir)?;
    for part in parts.iter().skip(1) {
        check_fits(first, &prompts, part, options.allow_mixed)?;
    }
    let lines = join(&parts)?;
    check_complete(&parts, &prompts, &lines, first.manifest.generation.samples)?;

    let mixed = parts
        .iter()
        .any(|part| part.manifest.generation.numerics != first.manifest.generation.numerics);
    let mut manifest = merged_manifest(&parts, first);
    write_merged(out, &prompts, &lines, &parts, mixed)?;
    let results = Results::new(log::read(out)?.rows);
    let questions: Vec<&ResultRow> = prompts
        .iter()
        .filter_map(|prompt| chosen_sample(&results, &prompt.key, options.pick))
        .collect();
    let samples: Vec<&ResultRow> = results
        .in_order(prompts.iter().map(|prompt| prompt.key.as_str()))
        .collect();
    let random_baseline = weighted_random_baseline(&parts);
    let mut tally = (options.tally)(&questions, &samples);
    tally.random_baseline = tally.random_baseline.or(random_baseline);
    manifest.tally = Some(tally);
    write_submission(
        out,
        &prompts,
        &results,
        &manifest.submission_format,
        options.pick,
    )?;
    // Last: a folder with a manifest is a whole run.
    manifest.write(out)?;
    Ok(manifest)
}

fn read_part(run_dir: &Path) -> Result<Part, MergeError> {
    let manifest = RunManifest::read(run_dir)?;
    // The repaired view first: it tells what is wrong with a damaged log, by line.
    let n_rows = log::read(run_dir)?.rows.len();
    let path = run_dir.join(RESULTS_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(LogError::Open { path, source }.into()),
    };
    let mut latest: HashMap<(String, u32), usize> = HashMap::new();
    let mut lines: Vec<(ResultRow, Vec<u8>)> = Vec::new();
    for text in bytes.split(|&byte| byte == b'\n') {
        let text = text.trim_ascii();
        if text.is_empty() || lines.len() == n_rows {
            continue;
        }
        let Ok(row) = serde_json::from_slice::<ResultRow>(text) else {
            continue;
        };
        latest.insert((row.key.clone(), row.sample), lines.len());
        lines.push((row, text.to_vec()));
    }
    let mut index = 0;
    lines.retain(|(row, _)| {
        let keep = latest.get(&(row.key.clone(), row.sample)) == Some(&index);
        index += 1;
        keep
    });
    Ok(Part {
        run_dir: run_dir.to_owned(),
        manifest,
        lines,
    })
}

fn check_fits(
    first: &Part,
    prompts: &[PromptRow],
    part: &Part,
    allow_mixed: bool,
) -> Result<(), MergeError> {
    let differences: Vec<Difference> = part
        .manifest
        .generation
        .differences(&first.manifest.generation)
        .into_iter()
        .filter(|difference| !(allow_mixed && difference.key == "numerics"))
        .collect();
    if !differences.is_empty() {
        return Err(MergeError::OtherGeneration {
            first: first.run_dir.clone(),
            other: part.run_dir.clone(),
            differences,
        });
    }
    if part.manifest.scoring_hash != first.manifest.scoring_hash {
        return Err(MergeError::OtherScoring {
            first: first.run_dir.clone(),
            other: part.run_dir.clone(),
        });
    }
    if read_prompts(&part.run_dir)? != prompts {
        return Err(MergeError::OtherPrompts {
            first: first.run_dir.clone(),
            other: part.run_dir.clone(),
        });
    }
    Ok(())
}

/// Where the line of a (key, sample) stands: part and line.
type Places = BTreeMap<(String, u32), (usize, usize)>;

fn join(parts: &[Part]) -> Result<Places, MergeError> {
    let mut places = Places::new();
    for (part_index, part) in parts.iter().enumerate() {
        for (line_index, (row, _)) in part.lines.iter().enumerate() {
            let place = (part_index, line_index);
            if let Some((other, _)) = places.insert((row.key.clone(), row.sample), place) {
                let folder = |index: usize| {
                    parts
                        .get(index)
                        .map_or_else(PathBuf::new, |part| part.run_dir.clone())
                };
                return Err(MergeError::Doubled {
                    key: row.key.clone(),
                    sample: row.sample,
                    first: folder(other),
                    second: folder(part_index),
                });
            }
        }
    }
    Ok(places)
}

/// A row that cannot be run needs but one line.
fn check_complete(
    parts: &[Part],
    prompts: &[PromptRow],
    places: &Places,
    n_samples: u32,
) -> Result<(), MergeError> {
    let row = |key: &str, sample| {
        let (part, line) = places.get(&(key.to_owned(), sample))?;
        parts.get(*part)?.lines.get(*line).map(|(row, _)| row)
    };
    let mut missing = Vec::new();
    for prompt in prompts {
        let cannot_run = row(&prompt.key, 0).is_some_and(|row| row.status == Status::Error);
        let n_wanted = if cannot_run { 1 } else { n_samples };
        if (0..n_wanted).any(|sample| row(&prompt.key, sample).is_none()) {
            missing.push(prompt.key.clone());
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let given: Vec<Shard> = parts
        .iter()
        .filter_map(|part| part.manifest.shard)
        .collect();
    let count = given.first().map_or(0, |shard| shard.count);
    let missing_shards = (1..=count)
        .filter(|index| given.iter().all(|shard| shard.index != *index))
        .map(|index| format!("{index}/{count}"))
        .collect();
    let n_missing = missing.len();
    missing.truncate(MAX_NAMED);
    Err(MergeError::Incomplete {
        n_missing,
        n_rows: prompts.len(),
        keys: missing,
        missing_shards,
    })
}

fn merged_manifest(parts: &[Part], first: &Part) -> RunManifest {
    let mut manifest = first.manifest.clone();
    manifest.shard = None;
    manifest.config.remove("shard");
    manifest.sessions = parts
        .iter()
        .flat_map(|part| {
            part.manifest.sessions.iter().cloned().map(|mut session| {
                session.shard = session.shard.or(part.manifest.shard);
                session
            })
        })
        .collect();
    manifest.sessions.sort_by(|a, b| a.start.cmp(&b.start));
    manifest.sum_sessions();
    manifest
}

/// The shards' baselines by chance, weighted by their questions: option counts are not in the log.
fn weighted_random_baseline(parts: &[Part]) -> Option<f64> {
    let mut n_questions = 0;
    let mut sum = 0.0;
    for part in parts {
        let tally = part.manifest.tally.as_ref()?;
        n_questions += tally.accuracy.n;
        sum += tally.random_baseline? * tally.accuracy.n as f64;
    }
    (n_questions > 0).then(|| sum / n_questions as f64)
}

fn write_merged(
    out: &Path,
    prompts: &[PromptRow],
    places: &Places,
    parts: &[Part],
    mixed: bool,
) -> Result<(), MergeError> {
    log::probe_writable(out)?;
    let _lock = RunLock::acquire(out)?;
    if RunManifest::read(out).is_ok() || out.join(RESULTS_FILE).exists() {
        return Err(MergeError::Occupied {
            out: out.to_owned(),
        });
    }
    write_prompts(out, prompts)?;
    replace(&out.join(RESULTS_FILE), |file| {
        for prompt in prompts {
            let samples = (prompt.key.clone(), 0)..=(prompt.key.clone(), u32::MAX);
            for &(part, line) in places.range(samples).map(|(_, place)| place) {
                let Some(part) = parts.get(part) else {
                    continue;
                };
                let Some((row, text)) = part.lines.get(line) else {
                    continue;
                };
                if mixed && row.numerics_id.is_none() {
                    let mut row = row.clone();
                    row.numerics_id = Some(part.manifest.generation.numerics.clone());
                    serde_json::to_writer(&mut *file, &row)?;
                } else {
                    file.write_all(text)?;
                }
                file.write_all(b"\n")?;
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Why runs cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    #[error("no runs to merge")]
    NoRuns,
    #[error(
        "`{other}` is not of the same generation as `{first}`: {}",
        spell(differences)
    )]
    OtherGeneration {
        first: PathBuf,
        other: PathBuf,
        differences: Vec<Difference>,
    },
    #[error("`{other}` was scored by other rules than `{first}`")]
    OtherScoring { first: PathBuf, other: PathBuf },
    #[error("`{other}` lists other prompts than `{first}`")]
    OtherPrompts { first: PathBuf, other: PathBuf },
    #[error("sample {sample} of `{key}` is in `{first}` and in `{second}`")]
    Doubled {
        key: String,
        sample: u32,
        first: PathBuf,
        second: PathBuf,
    },
    #[error("{n_missing} of {n_rows} rows are missing, such as `{}`", keys.join("`, `"))]
    Incomplete {
        n_missing: usize,
        n_rows: usize,
        keys: Vec<String>,
        missing_shards: Vec<String>,
    },
    #[error("`{out}` holds a run already")]
    Occupied { out: PathBuf },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Prompts(#[from] PromptsError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl MergeError {
    pub fn hint(&self) -> String {
        match self {
            Self::NoRuns => "name the folders of all shards".to_owned(),
            Self::OtherGeneration { differences, .. } => {
                if differences.iter().all(|d| d.key == "numerics") {
                    "`--allow-mixed` joins them and records the numerics per row".to_owned()
                } else {
                    "merge joins shards of one run; `podium compare` sets two runs side by side"
                        .to_owned()
                }
            }
            Self::OtherScoring { .. } => {
                "score both again by the same rules with `podium score RUN`".to_owned()
            }
            Self::OtherPrompts { .. } => {
                "run the shards again with the same files, limit and profile".to_owned()
            }
            Self::Doubled { .. } => "name every shard once".to_owned(),
            Self::Incomplete { missing_shards, .. } if missing_shards.is_empty() => {
                "give the command of each shard again: it resumes".to_owned()
            }
            Self::Incomplete { missing_shards, .. } => {
                format!("shards not named: {}", missing_shards.join(", "))
            }
            Self::Occupied { .. } => "name another folder with `--out DIR`".to_owned(),
            Self::Manifest(error) => error.hint(),
            Self::Prompts(error) => error.hint(),
            Self::Log(error) => error.hint(),
            Self::Write(error) => error.hint(),
            Self::Lock(error) => error.hint(),
        }
    }
}

#[cfg(test)]
mod tests;
