//! A run by itself: what it is, its strict and lenient accuracy, statuses, tokens, speed and memory.

use std::collections::BTreeMap;

use polars::prelude::PolarsResult;

use super::join::sums;
use super::load::LoadedRun;
use super::{ComparedRun, GroupStatuses, MemoryUse, Speed, TokenCounts};
use crate::report::tally::{NO_GROUP, tally};
use crate::score::Status;
use crate::submission::write::{PickSample, chosen_sample, first_sample, status_name};
use crate::submission::{ResultRow, vote};
use crate::telemetry::memory::total_bytes;

/// `A`, `B`, …, and from the 27th on a number.
pub fn label(index: usize) -> String {
    match u8::try_from(index) {
        Ok(index) if index < 26 => char::from(b'A' + index).to_string(),
        _ => format!("R{}", index + 1),
    }
}

/// `groups` is the base's order of groups.
pub fn compared_run(index: usize, run: &LoadedRun, groups: &[String]) -> PolarsResult<ComparedRun> {
    let keys = || run.prompts.iter().map(|prompt| prompt.key.as_str());
    let samples: Vec<&ResultRow> = run.results.in_order(keys()).collect();
    let by_vote = run.manifest.scoring.as_ref().map(vote::pick);
    let pick: &PickSample = match &by_vote {
        Some(pick) => pick,
        None => &first_sample,
    };
    let questions: Vec<&ResultRow> = keys()
        .filter_map(|key| chosen_sample(&run.results, key, pick))
        .collect();
    let mut tally = tally(&questions, &samples, None);
    let place = |group: &String| {
        let found = groups.iter().position(|known| known == group);
        found.unwrap_or(groups.len())
    };
    tally.by_group.sort_by_key(|entry| place(&entry.group));
    let mut statuses_by_group = statuses_by_group(&samples)?;
    statuses_by_group.sort_by_key(|entry| place(&entry.group));
    if tally.by_group.is_empty() {
        statuses_by_group.clear();
    }
    let manifest = &run.manifest;
    let last = manifest.sessions.last();
    Ok(ComparedRun {
        label: label(index),
        name: run.name.clone(),
        run_dir: run.dir.to_string_lossy().into_owned(),
        dataset: manifest.dataset_path.clone(),
        model: manifest.model_path.clone(),
        precision: manifest.generation.precision.clone(),
        generation_hash: manifest.generation_hash.clone(),
        scoring_hash: manifest.scoring_hash.clone(),
        numerics: manifest.generation.numerics.clone(),
        device: last.map_or_else(String::new, |session| session.device.clone()),
        n_slots: last.map_or(0, |session| session.n_slots),
        n_sessions: manifest.sessions.len(),
        outcome: last.and_then(|session| session.outcome),
        samples: manifest.generation.samples,
        accuracy: tally.accuracy,
        lenient: tally.lenient,
        by_group: tally.by_group,
        statuses: tally.statuses,
        statuses_by_group,
        tokens: tokens(&samples)?,
        speed: speed(run),
        memory: memory(run),
    })
}

fn statuses_by_group(samples: &[&ResultRow]) -> PolarsResult<Vec<GroupStatuses>> {
    let groups = samples
        .iter()
        .map(|row| row.group.as_deref().unwrap_or(NO_GROUP));
    let names = samples.iter().map(|row| status_name(row.status));
    let counted = sums(
        &[groups.collect(), names.collect()],
        &[vec![1.0; samples.len()]],
    )?;
    let mut found: Vec<GroupStatuses> = Vec::new();
    for (labels, counts) in counted {
        let (Some(group), Some(status), Some(count)) =
            (labels.first(), labels.get(1), counts.first())
        else {
            continue;
        };
        let at = match found.iter().position(|entry| entry.group == *group) {
            Some(at) => at,
            None => {
                found.push(GroupStatuses {
                    group: group.clone(),
                    statuses: BTreeMap::new(),
                });
                found.len() - 1
            }
        };
        if let Some(entry) = found.get_mut(at) {
            entry.statuses.insert(status.clone(), *count as u64);
        }
    }
    Ok(found)
}

fn tokens(samples: &[&ResultRow]) -> PolarsResult<TokenCounts> {
    let ran: Vec<&&ResultRow> = samples
        .iter()
        .filter(|row| !matches!(row.status, Status::Error | Status::NotRun))
        .collect();
    let column = |of: fn(&ResultRow) -> u32| ran.iter().map(|row| f64::from(of(row))).collect();
    let columns = [
        column(|row| row.prompt_tokens),
        column(|row| row.reused_tokens),
        column(|row| row.all_output_ids().len() as u32),
        column(|row| row.analysis_tokens),
        column(|row| row.final_tokens),
    ];
    let summed = sums(&[vec!["all"; ran.len()]], &columns)?;
    let n_samples = ran.len() as u64;
    let Some((_, counts)) = summed.into_iter().next() else {
        return Ok(TokenCounts::default());
    };
    let count = |index: usize| counts.get(index).copied().unwrap_or(0.0) as u64;
    Ok(TokenCounts {
        n_samples,
        prompt: count(0),
        reused: count(1),
        output: count(2),
        analysis: count(3),
        r#final: count(4),
        output_per_sample: (n_samples > 0).then(|| count(2) as f64 / n_samples as f64),
    })
}

fn speed(run: &LoadedRun) -> Speed {
    let totals = &run.manifest.totals;
    Speed {
        wall_seconds: totals.wall_seconds,
        prefill_seconds: totals.prefill_seconds,
        decode_seconds: totals.decode_seconds,
        prefill_tokens_per_s: totals.prefill_tokens_per_s(),
        decode_tokens_per_s: totals.decode_tokens_per_s(),
        rows_per_s: totals.rows_per_s(),
        occupancy: totals.occupancy(),
    }
}

fn memory(run: &LoadedRun) -> MemoryUse {
    let sessions = &run.manifest.sessions;
    let measured = sessions.iter().rev().find_map(|session| session.memory);
    let loaded = run.manifest.ledger.as_array().map(|entries| {
        let bytes = entries.iter().filter_map(|entry| entry.get("loaded_bytes"));
        bytes.filter_map(serde_json::Value::as_u64).sum()
    });
    MemoryUse {
        weights_bytes: loaded,
        planned_bytes: measured.and_then(|m| m.planned).map(|m| total_bytes(&m)),
        allocated_bytes: measured.and_then(|m| m.allocated).map(|m| total_bytes(&m)),
        measured_bytes: measured.and_then(|m| m.measured_bytes()),
    }
}
