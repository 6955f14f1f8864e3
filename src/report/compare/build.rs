//! From loaded runs to the comparison: the join, each run by itself, each pair, the questions.

use std::collections::HashMap;

use super::join::{JoinedKey, join};
use super::load::LoadedRun;
use super::{
    COMPARISON_SCHEMA, Comparison, Direction, Pair, Question, QuestionChange, QuestionSide,
    ValuesVerdict, check, ledger, pair, side,
};
use crate::score::Status;
use crate::stats::cluster::MIN_CLUSTERS;
use crate::stats::holm::holm;
use crate::submission::ResultRow;
use crate::submission::manifest::Outcome;

/// Below this a comparison is called significant.
const SIGNIFICANT_P: f64 = 0.05;

/// Sets the runs against the first of them. Whether they may be compared was asked before
/// ([`check::check`]); what differs is named here.
pub fn compare(runs: &[LoadedRun], seed: u64) -> Comparison {
    let keys: Vec<Vec<&str>> = runs
        .iter()
        .map(|run| {
            run.prompts
                .iter()
                .map(|prompt| prompt.key.as_str())
                .collect()
        })
        .collect();
    let joined = join(&keys).expect("columns of our own making fit together");
    let groups = groups(runs);
    let compared = runs.iter().enumerate().map(|(index, run)| {
        side::compared_run(index, run, &groups).expect("columns of our own making fit together")
    });
    let mut pairs: Vec<Pair> = (1..runs.len())
        .map(|run| {
            pair::pair(run, runs, &joined, seed).expect("columns of our own making fit together")
        })
        .collect();
    let p_values: Vec<Option<f64>> = pairs.iter().map(|pair| pair.tests.p).collect();
    for (pair, adjusted) in pairs.iter_mut().zip(holm(&p_values)) {
        pair.tests.p_holm = adjusted;
        pair.tests.significant = adjusted.map(|p| p < SIGNIFICANT_P);
    }
    let mut comparison = Comparison {
        schema: COMPARISON_SCHEMA.to_owned(),
        name: runs
            .iter()
            .map(|run| run.name.as_str())
            .collect::<Vec<_>>()
            .join("-vs-"),
        podium_version: env!("CARGO_PKG_VERSION").to_owned(),
        seed,
        differences: check::differences(runs),
        runs: compared.collect(),
        questions: questions(runs, &joined, &pairs),
        ledger: ledger::classes(runs),
        pairs,
        notes: Vec::new(),
    };
    comparison.notes = notes(&comparison);
    comparison
}

/// Groups in order of first appearance, the base's first.
fn groups(runs: &[LoadedRun]) -> Vec<String> {
    let prompts = runs.iter().flat_map(|run| &run.prompts);
    let mut seen = HashMap::new();
    let mut groups = Vec::new();
    for group in prompts.filter_map(|prompt| prompt.group.as_ref()) {
        if seen.insert(group, ()).is_none() {
            groups.push(group.clone());
        }
    }
    groups
}

fn questions(runs: &[LoadedRun], joined: &[JoinedKey], pairs: &[Pair]) -> Vec<Question> {
    // A question's change in a pair. Flips come first among the changes, so the first found wins.
    let changes: Vec<HashMap<&str, QuestionChange>> = pairs
        .iter()
        .map(|pair| {
            let mut by_key = HashMap::new();
            for change in &pair.changes {
                by_key.entry(change.key.as_str()).or_insert(QuestionChange {
                    cause: change.cause,
                    direction: change.direction,
                });
            }
            by_key
        })
        .collect();
    let question = |joined: &JoinedKey| {
        let key = joined.key.as_str();
        let prompt = runs
            .iter()
            .zip(&joined.rows)
            .find_map(|(run, row)| run.prompts.get((*row)?));
        let sides = runs.iter().zip(&joined.rows).map(|(run, row)| {
            row.map(|_| question_side(&run.results.samples(key).collect::<Vec<_>>()))
        });
        let rows = || {
            runs.iter()
                .filter_map(|run| run.results.samples(key).next())
        };
        Question {
            key: key.to_owned(),
            id: prompt.and_then(|prompt| prompt.id.clone()),
            group: prompt.and_then(|prompt| prompt.group.clone()),
            cluster: rows().find_map(|row| row.cluster.clone()),
            sides: sides.collect(),
            changes: changes
                .iter()
                .map(|by_key| by_key.get(key).copied())
                .collect(),
        }
    };
    joined.iter().map(question).collect()
}

fn question_side(samples: &[&ResultRow]) -> QuestionSide {
    let judged: Vec<bool> = samples
        .iter()
        .filter(|row| row.status != Status::NotRun)
        .filter_map(|row| row.correct)
        .collect();
    let n_right = judged.iter().filter(|right| **right).count();
    let first = samples.first();
    QuestionSide {
        status: first.map_or(Status::NotRun, |row| row.status),
        correct: (!judged.is_empty()).then(|| n_right as f64 / judged.len() as f64),
        answer: first
            .and_then(|row| row.answer.as_ref())
            .map(|answer| answer.text.clone()),
    }
}

/// What the figures do not say by themselves.
fn notes(comparison: &Comparison) -> Vec<String> {
    let mut notes = Vec::new();
    for run in &comparison.runs {
        if !matches!(run.outcome, Some(Outcome::Complete)) {
            notes.push(format!("{} is not complete: rows are missing", run.label));
        }
    }
    let n_clusters = {
        let mut clusters: Vec<&String> = comparison
            .questions
            .iter()
            .filter_map(|question| question.cluster.as_ref())
            .collect();
        clusters.sort_unstable();
        clusters.dedup();
        clusters.len()
    };
    if (1..MIN_CLUSTERS).contains(&n_clusters) {
        notes.push(format!(
            "{n_clusters} clusters are too few for clustered errors ({MIN_CLUSTERS} are needed): \
             questions are taken as independent"
        ));
    }
    for pair in &comparison.pairs {
        let Some(run) = comparison.runs.get(pair.run) else {
            continue;
        };
        let verdicts: Vec<ValuesVerdict> = comparison
            .ledger
            .iter()
            .filter_map(|class| class.values.get(pair.run - 1).copied())
            .collect();
        let all_same = !verdicts.is_empty() && verdicts.iter().all(|v| *v == ValuesVerdict::Same);
        if all_same
            && comparison.differences.is_empty()
            && pair.identity.n_same_tokens < pair.identity.n_samples
        {
            notes.push(format!(
                "every tensor class of {} holds the base's values: what differs comes from the \
                 arithmetic alone",
                run.label
            ));
        }
        let n_lost = pair
            .changes
            .iter()
            .filter(|c| c.direction == Direction::Lost);
        let n_lost_cut = n_lost
            .clone()
            .filter(|change| change.cause == super::Cause::TruncatedInOne)
            .count();
        let n_lost = n_lost.count();
        if n_lost_cut * 2 > n_lost && n_lost > 1 {
            notes.push(format!(
                "{n_lost_cut} of the {n_lost} samples that {} lost ended at the token budget: a \
                 larger one would tell the rest",
                run.label
            ));
        }
    }
    notes
}
