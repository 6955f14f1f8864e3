//! A run against the base: which samples count, the paired figures, what changed.

use polars::prelude::PolarsResult;

use super::change::{change, first_difference, side};
use super::join::{JoinedKey, sums};
use super::load::LoadedRun;
use super::{
    Cause, CauseCount, Change, Clustered, Detectable, DifferenceEstimate, Direction, Excluded,
    GroupPair, OutputIdentity, Pair, PairTable, Tests,
};
use crate::report::tally::NO_GROUP;
use crate::score::interval::Interval;
use crate::score::{Aggregate, Scoring, Status};
use crate::stats::cluster::clustered_mean;
use crate::stats::mcnemar::mcnemar;
use crate::stats::normal::{Z_80, Z_975};
use crate::stats::power::{
    ALPHA, MEAN_FORMULA, PAIRS_FORMULA, POWER, detectable_mean, detectable_pairs,
};
use crate::stats::resample::{N_REPLICATES, bootstrap_mean, quantile, sign_flip_p};
use crate::stats::tango::tango;
use crate::submission::write::chosen_sample;
use crate::submission::{ResultRow, vote};

const CLUSTERED_FORMULA: &str =
    "d = (z(0.975) + z(0.8)) s, s the clustered standard error of the difference";

/// The figures of the questions that count.
#[derive(Default)]
struct Counted {
    groups: Vec<String>,
    clusters: Vec<String>,
    has_clusters: bool,
    /// Share of right samples.
    base: Vec<f64>,
    other: Vec<f64>,
}

/// Sets `other` against `base`. The joined keys say which questions each has.
pub fn pair(run: usize, runs: &[LoadedRun], joined: &[JoinedKey], seed: u64) -> PolarsResult<Pair> {
    let (Some(base), Some(other)) = (runs.first(), runs.get(run)) else {
        unreachable!("a pair is made for a run that is there");
    };
    let samples = [base, other].map(|run| run.manifest.generation.samples);
    // A profile whose score is maj@k compares the questions' votes.
    let by_vote = voting(base).zip(voting(other)).map(|(a, b)| [a, b]);
    let mut excluded = Excluded::default();
    let mut counted = Counted::default();
    let mut n_samples = 0;
    let mut outputs = Outputs::default();
    let mut changes = Vec::new();
    for question in joined {
        let place = |run: usize| question.rows.get(run).copied().flatten();
        let is_missing = place(0).is_none() || place(run).is_none();
        let mut right = [0_u32; 2];
        let mut n = 0_u32;
        let mut first_row = None;
        for sample in 0..samples[0].max(samples[1]) {
            if is_missing || sample >= samples[0].min(samples[1]) {
                // In neither, when the question is in a third run only.
                let in_any = (place(0).is_some() && sample < samples[0])
                    || (place(run).is_some() && sample < samples[1]);
                excluded.missing += u64::from(in_any);
                continue;
            }
            let rows = (
                base.results.get(&question.key, sample),
                other.results.get(&question.key, sample),
            );
            let (Some(a), Some(b)) = rows else {
                excluded.not_run += 1;
                continue;
            };
            if [a, b].iter().any(|row| row.status == Status::NotRun) {
                excluded.not_run += 1;
                continue;
            }
            if [a, b].iter().any(|row| row.status == Status::Error) {
                excluded.error += 1;
                continue;
            }
            outputs.add(a, b);
            if let Some(found) = change(a, b) {
                let prompt = place(0).and_then(|row| base.prompts.get(row));
                let prompt = prompt.and_then(|prompt| prompt.text.clone());
                changes.push(described(a, b, found, prompt));
            }
            let (Some(in_base), Some(in_other)) = (a.correct, b.correct) else {
                excluded.no_gold += 1;
                continue;
            };
            right[0] += u32::from(in_base);
            right[1] += u32::from(in_other);
            n += 1;
            first_row = first_row.or(Some(a));
        }
        if let Some(row) = first_row {
            n_samples += u64::from(n);
            let share = |run: usize| f64::from(right[run]) / f64::from(n);
            let scores = match &by_vote {
                Some([a, b]) => [
                    voted(base, a, &question.key),
                    voted(other, b, &question.key),
                ],
                None => [share(0), share(1)],
            };
            counted.base.push(scores[0]);
            counted.other.push(scores[1]);
            let group = row.group.as_deref().unwrap_or(NO_GROUP);
            counted.groups.push(group.to_owned());
            counted.has_clusters |= row.cluster.is_some();
            // A question of no cluster stands for itself; the marks keep names apart.
            counted.clusters.push(match &row.cluster {
                Some(cluster) => format!("cluster {cluster}"),
                None => format!("key {}", row.key),
            });
        }
    }
    changes.sort_by_key(|change: &Change| change.direction == Direction::Neither);
    let single = samples == [1, 1] || by_vote.is_some();
    let figures = Figures::new(&counted, single, seed);
    Ok(Pair {
        run,
        n_questions: counted.base.len() as u64,
        n_samples,
        excluded,
        accuracy_base: mean(&counted.base),
        accuracy_other: mean(&counted.other),
        table: figures.table,
        difference: figures.difference,
        tests: figures.tests,
        clustered: figures.clustered,
        detectable: figures.detectable,
        by_group: by_group(&counted)?,
        identity: outputs.identity(),
        causes: causes(&changes),
        n_flips: changes
            .iter()
            .filter(|change| change.direction != Direction::Neither)
            .count() as u64,
        n_changes: changes.len() as u64,
        changes,
        divergence: None,
    })
}

/// A run's scoring where its score is maj@k.
fn voting(run: &LoadedRun) -> Option<&Scoring> {
    let scoring = run.manifest.scoring.as_ref()?;
    (scoring.aggregate == Aggregate::Majority).then_some(scoring)
}

/// 1 where the vote of a run's samples is right.
fn voted(run: &LoadedRun, scoring: &Scoring, key: &str) -> f64 {
    let is_right = chosen_sample(&run.results, key, &vote::pick(scoring))
        .is_some_and(|row| row.correct == Some(true));
    f64::from(u8::from(is_right))
}

fn described(
    a: &ResultRow,
    b: &ResultRow,
    (cause, direction): (Cause, Direction),
    prompt: Option<String>,
) -> Change {
    Change {
        key: a.key.clone(),
        sample: a.sample,
        group: a.group.clone(),
        cause,
        direction,
        gold: a.gold.clone(),
        prompt,
        first_differing_token: first_difference(&a.all_output_ids(), &b.all_output_ids())
            .map(|index| index as u64),
        base: side(a),
        other: side(b),
    }
}

fn causes(changes: &[Change]) -> Vec<CauseCount> {
    let count = |cause: Cause, direction: Direction| {
        let same = |change: &&Change| change.cause == cause && change.direction == direction;
        changes.iter().filter(same).count() as u64
    };
    let counts = Cause::ALL.map(|cause| CauseCount {
        cause,
        lost: count(cause, Direction::Lost),
        gained: count(cause, Direction::Gained),
        neither: count(cause, Direction::Neither),
    });
    counts.to_vec()
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The paired statistics of a pair.
#[derive(Default)]
struct Figures {
    table: Option<PairTable>,
    difference: Option<DifferenceEstimate>,
    tests: Tests,
    clustered: Option<Clustered>,
    detectable: Option<Detectable>,
}

impl Figures {
    fn new(counted: &Counted, single: bool, seed: u64) -> Self {
        let moved: Vec<f64> = counted
            .base
            .iter()
            .zip(&counted.other)
            .map(|(base, other)| other - base)
            .collect();
        if moved.is_empty() {
            return Self::default();
        }
        let mut figures = if single {
            Self::of_pairs(counted)
        } else {
            Self::of_means(&moved, seed)
        };
        if counted.has_clusters {
            figures.add_clusters(&moved, &counted.clusters);
        }
        figures
    }

    /// One sample a question: right or wrong in both runs.
    fn of_pairs(counted: &Counted) -> Self {
        let mut table = PairTable::default();
        for (base, other) in counted.base.iter().zip(&counted.other) {
            match (*base > 0.5, *other > 0.5) {
                (true, true) => table.both_right += 1,
                (true, false) => table.lost += 1,
                (false, true) => table.gained += 1,
                (false, false) => table.both_wrong += 1,
            }
        }
        let n = counted.base.len() as u64;
        let test = mcnemar(table.lost, table.gained);
        let difference = (table.gained as f64 - table.lost as f64) / n as f64;
        let discordance = (table.gained + table.lost) as f64 / n as f64;
        Self {
            table: Some(table),
            difference: tango(table.gained, table.lost, n).map(|interval| DifferenceEstimate {
                difference,
                low: interval.low,
                high: interval.high,
                method: "Tango's score interval".to_owned(),
            }),
            tests: Tests {
                mcnemar_exact_p: Some(test.exact_p),
                mcnemar_mid_p: Some(test.mid_p),
                p: Some(test.exact_p),
                p_method: Some("exact McNemar test".to_owned()),
                ..Tests::default()
            },
            clustered: None,
            detectable: detectable_pairs(discordance, n)
                .map(|difference| detectable(difference, Some(discordance), PAIRS_FORMULA)),
        }
    }

    /// Several samples a question: the questions' means.
    fn of_means(moved: &[f64], seed: u64) -> Self {
        let n = moved.len() as f64;
        let difference = mean(moved).unwrap_or_default();
        let squares: f64 = moved.iter().map(|value| (value - difference).powi(2)).sum();
        let deviation = if moved.len() > 1 {
            (squares / (n - 1.0)).sqrt()
        } else {
            0.0
        };
        let estimate = |interval: Interval| DifferenceEstimate {
            difference,
            low: interval.low,
            high: interval.high,
            method: "paired bootstrap over questions, percentiles".to_owned(),
        };
        let p = sign_flip_p(moved, seed);
        Self {
            table: None,
            difference: bootstrap_mean(moved, seed).map(estimate),
            tests: Tests {
                permutation_p: p,
                n_permutations: Some(u64::from(N_REPLICATES)),
                n_bootstrap: Some(u64::from(N_REPLICATES)),
                p,
                p_method: Some("sign-flip permutation test".to_owned()),
                ..Tests::default()
            },
            clustered: None,
            detectable: detectable_mean(deviation, moved.len() as u64)
                .map(|difference| detectable(difference, None, MEAN_FORMULA)),
        }
    }

    fn add_clusters(&mut self, moved: &[f64], clusters: &[String]) {
        let clusters: Vec<&str> = clusters.iter().map(String::as_str).collect();
        let Some(found) = clustered_mean(moved, &clusters) else {
            return;
        };
        self.clustered = Some(Clustered {
            n_clusters: found.n_clusters as u64,
            standard_error: found.standard_error,
            low: found.interval.low,
            high: found.interval.high,
            p: found.p,
        });
        self.tests.p = Some(found.p);
        self.tests.p_method = Some("normal test with clustered standard error".to_owned());
        if found.standard_error > 0.0 {
            let difference = (Z_975 + Z_80) * found.standard_error;
            self.detectable = Some(detectable(difference, None, CLUSTERED_FORMULA));
        }
    }
}

fn detectable(difference: f64, discordance: Option<f64>, formula: &str) -> Detectable {
    Detectable {
        difference,
        power: POWER,
        alpha: ALPHA,
        discordance,
        formula: formula.to_owned(),
    }
}

/// Empty when no question has a group.
fn by_group(counted: &Counted) -> PolarsResult<Vec<GroupPair>> {
    if counted.groups.iter().all(|group| group == NO_GROUP) {
        return Ok(Vec::new());
    }
    let pairs = || counted.base.iter().zip(&counted.other);
    let groups = counted.groups.iter().map(String::as_str).collect();
    let summed = sums(
        &[groups],
        &[
            vec![1.0; counted.base.len()],
            counted.base.clone(),
            counted.other.clone(),
            pairs().map(|(a, b)| f64::from(b < a)).collect(),
            pairs().map(|(a, b)| f64::from(b > a)).collect(),
        ],
    )?;
    let rows = summed.into_iter().filter_map(|(labels, sums)| {
        let [n, base, other, lost, gained] = sums.try_into().ok()?;
        Some(GroupPair {
            group: labels.into_iter().next()?,
            n_questions: n as u64,
            accuracy_base: base / n,
            accuracy_other: other / n,
            difference: (other - base) / n,
            lost: lost as u64,
            gained: gained as u64,
        })
    });
    Ok(rows.collect())
}

/// Counts of equal outputs while the pairs pass by.
#[derive(Default)]
struct Outputs {
    identity: OutputIdentity,
    first_differences: Vec<f64>,
}

impl Outputs {
    fn add(&mut self, a: &ResultRow, b: &ResultRow) {
        let identity = &mut self.identity;
        identity.n_samples += 1;
        let same_tokens = match first_difference(&a.all_output_ids(), &b.all_output_ids()) {
            None => true,
            Some(index) => {
                self.first_differences.push(index as f64);
                false
            }
        };
        let same_bits = a.logprob_sum_bits.is_some() && a.logprob_sum_bits == b.logprob_sum_bits;
        identity.n_same_tokens += u64::from(same_tokens);
        identity.n_same_bits += u64::from(same_tokens && same_bits);
        if let (Some(a), Some(b)) = (&a.trace_hash, &b.trace_hash) {
            identity.n_trace_hashes += 1;
            identity.n_same_trace_hash += u64::from(a == b);
        }
    }

    fn identity(mut self) -> OutputIdentity {
        let mut identity = self.identity;
        let share = |n: u64| (identity.n_samples > 0).then(|| n as f64 / identity.n_samples as f64);
        identity.same_tokens_share = share(identity.n_same_tokens);
        identity.same_bits_share = share(identity.n_same_bits);
        self.first_differences.sort_by(f64::total_cmp);
        let whole = |value: Option<&f64>| value.map(|value| *value as u64);
        identity.first_difference_min = whole(self.first_differences.first());
        identity.first_difference_max = whole(self.first_differences.last());
        identity.first_difference_median =
            (!self.first_differences.is_empty()).then(|| quantile(&self.first_differences, 0.5));
        identity
    }
}
