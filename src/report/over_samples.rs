//! maj@k, mean@k and pass@k over the questions of a run, with their intervals.

use std::collections::HashMap;

use super::summary::wrapped;
use super::table::{Align, Table, grouped, percent};
use super::tally::accuracy;
use crate::score::interval::wilson;
use crate::score::pass_at::pass_at;
use crate::score::{Aggregate, Scoring, Status};
use crate::stats::resample::bootstrap_mean;
use crate::submission::manifest::{Estimate, OverSamples, PassAt, RunManifest};
use crate::submission::{ResultRow, vote};

/// The setting's name in `run.json`.
const EARLY_STOP: &str = "early-stop";
/// A figure is the same each time it is printed.
const BOOTSTRAP_SEED: u64 = 0;

/// The figures of a run; absent with one sample a question. `samples` are all its rows, by
/// question and in the order of their numbers.
pub fn over_samples(manifest: &RunManifest, samples: &[&ResultRow]) -> Option<OverSamples> {
    let scoring = manifest.scoring.as_ref()?;
    let k = manifest.generation.samples;
    let early_stop = manifest
        .config
        .get(EARLY_STOP)
        .and_then(|setting| setting.value.as_bool())
        .unwrap_or(false);
    (k > 1).then(|| figures(scoring, k, early_stop, samples))
}

fn figures(scoring: &Scoring, k: u32, early_stop: bool, samples: &[&ResultRow]) -> OverSamples {
    let mut n_voted_right = 0;
    let mut n_scored = 0;
    let mut n_tied = 0;
    let mut n_incomplete = 0;
    let mut n_right: Vec<u32> = Vec::new();
    let mut lenient_shares: Vec<f64> = Vec::new();
    for question in questions(samples) {
        let was_run = |row: &&&ResultRow| row.status != Status::NotRun;
        let n_run = question.iter().filter(was_run).count();
        let vote = vote::count(scoring, &question);
        n_tied += u64::from(vote.is_some_and(|vote| vote.is_tied));
        if n_run == 0 || question.iter().all(|row| row.gold.is_none()) {
            continue;
        }
        n_scored += 1;
        let winner = vote.and_then(|vote| question.get(vote.winner));
        n_voted_right += u64::from(winner.is_some_and(|row| row.correct == Some(true)));
        if n_run < k as usize {
            n_incomplete += 1;
        } else {
            let right = question.iter().filter(|row| row.correct == Some(true));
            n_right.push(right.count() as u32);
            let right = question.iter();
            let right = right.filter(|row| row.lenient_correct() == Some(true));
            lenient_shares.push(right.count() as f64 / f64::from(k));
        }
    }
    let has_lenient = samples.iter().all(|row| row.has_lenient());
    let at = |at: u32| {
        let values = n_right.iter().filter_map(|&right| pass_at(at, k, right));
        estimate(&values.collect::<Vec<f64>>())
    };
    let powers = (0..32).map(|power| 1_u32 << power);
    let pass = powers
        .take_while(|&power| power < k)
        .chain([k])
        .filter_map(|power| Some((power, at(power)?)))
        .map(|(k, estimate)| PassAt { k, estimate });
    OverSamples {
        k,
        aggregate: scoring.aggregate,
        majority: accuracy(n_voted_right, n_scored),
        n_tied,
        n_incomplete,
        mean: if early_stop { None } else { at(1) },
        lenient_mean: if early_stop || !has_lenient {
            None
        } else {
            estimate(&lenient_shares)
        },
        pass: if early_stop {
            Vec::new()
        } else {
            pass.collect()
        },
    }
}

/// The rows of each question, in order of first appearance.
fn questions<'a>(samples: &[&'a ResultRow]) -> Vec<Vec<&'a ResultRow>> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut questions: Vec<Vec<&ResultRow>> = Vec::new();
    for row in samples {
        let place = *places.entry(row.key.as_str()).or_insert_with(|| {
            questions.push(Vec::new());
            questions.len() - 1
        });
        if let Some(question) = questions.get_mut(place) {
            question.push(row);
        }
    }
    questions
}

/// The mean of the questions' values. A bootstrap of wholly right and wrong questions would be an
/// interval of no width at 0 and 1, so theirs is Wilson's.
fn estimate(values: &[f64]) -> Option<Estimate> {
    let n = values.len() as u64;
    let is_whole = values.iter().all(|value| [0.0, 1.0].contains(value));
    let (interval, method) = if is_whole {
        let n_right = values.iter().filter(|value| **value == 1.0).count() as u64;
        (wilson(n_right, n)?, "wilson")
    } else {
        (bootstrap_mean(values, BOOTSTRAP_SEED)?, "bootstrap")
    };
    Some(Estimate {
        n,
        value: values.iter().sum::<f64>() / n as f64,
        low: interval.low,
        high: interval.high,
        method: method.to_owned(),
    })
}

/// What judges a question in a run of several samples: the vote, or the first sample.
pub fn speaker(figures: &OverSamples) -> String {
    match figures.aggregate {
        Aggregate::First => Aggregate::First,
        Aggregate::Majority | Aggregate::Pass | Aggregate::Mean => Aggregate::Majority,
    }
    .label(figures.k)
}

/// The figures as a table, and in words which of them counts and how ties are broken.
pub fn render(figures: &OverSamples, color: bool) -> String {
    let k = figures.k;
    let mut table = Table::with_header(
        &[Align::Left, Align::Right, Align::Right, Align::Left],
        &[&format!("over {k} samples"), "n", "share", "95 % interval"],
    );
    let mut line = |label: String, n: u64, value: f64, low: f64, high: f64| {
        let interval = format!("{} to {}", percent(low), percent(high));
        table.push(vec![label, grouped(n), percent(value), interval]);
    };
    let majority = &figures.majority;
    if let (Some(value), Some(low), Some(high)) = (majority.accuracy, majority.low, majority.high) {
        line(Aggregate::Majority.label(k), majority.n, value, low, high);
    }
    if let Some(mean) = &figures.mean {
        let label = format!("{} = pass@1", Aggregate::Mean.label(k));
        line(label, mean.n, mean.value, mean.low, mean.high);
    }
    if let Some(mean) = &figures.lenient_mean {
        let label = format!("{}, lenient", Aggregate::Mean.label(k));
        line(label, mean.n, mean.value, mean.low, mean.high);
    }
    if let Some(PassAt { k, estimate }) = figures.pass.last() {
        let label = Aggregate::Pass.label(*k);
        line(
            label,
            estimate.n,
            estimate.value,
            estimate.low,
            estimate.high,
        );
    }
    let mut words = format!(
        "The score is {}. A tied vote goes to the answer of the lowest sample ({} {} tied).",
        figures.aggregate.label(k),
        grouped(figures.n_tied),
        if figures.n_tied == 1 { "was" } else { "were" },
    );
    if figures.n_incomplete > 0 {
        words += &format!(
            " {} questions lack samples and count in {} alone.",
            grouped(figures.n_incomplete),
            Aggregate::Majority.label(k)
        );
    }
    format!("{}{}", table.render(color), wrapped(&words))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::tally::tally;
    use crate::score::{Rule, Scorer};
    use crate::submission::manifest::tests::manifest;
    use crate::submission::manifest::{Setting, Tally};
    use crate::submission::test_rows::{cut_off, row, unanswered, wrong};

    fn run(early_stop: bool) -> RunManifest {
        let mut manifest = manifest();
        manifest.generation.samples = 4;
        manifest.scoring = Some(Scoring {
            scorer: Scorer::Auto,
            rules: vec![Rule::Whole],
            tolerance: 1e-6,
            aggregate: Aggregate::Majority,
        });
        let setting = Setting {
            value: early_stop.into(),
            origin: crate::submission::manifest::Origin::Flag,
        };
        manifest.config.insert(EARLY_STOP.to_owned(), setting);
        manifest
    }

    fn rows() -> Vec<ResultRow> {
        vec![
            // 3 of 4 right, the vote too.
            row("a", 0),
            wrong("a", 1, "1"),
            row("a", 2),
            row("a", 3),
            // 2 of 4; tied, and the lower sample is right.
            row("b", 0),
            wrong("b", 1, "1"),
            wrong("b", 2, "1"),
            row("b", 3),
            // 1 of 4, and it alone voted.
            unanswered("c", 0, Status::NoAnswer),
            // Right leniently, which is no vote.
            cut_off("c", 1),
            unanswered("c", 2, Status::Error),
            row("c", 3),
            // None, by vote 1 against 1 against 1.
            wrong("d", 0, "1"),
            wrong("d", 1, "2"),
            wrong("d", 2, "3"),
            unanswered("d", 3, Status::NoFinal),
            // Decided by the first three.
            row("e", 0),
            row("e", 1),
            row("e", 2),
            unanswered("e", 3, Status::NotRun),
        ]
    }

    /// A manifest with the figures.
    pub(crate) fn sampled() -> RunManifest {
        let (mut manifest, rows) = (run(false), rows());
        let samples: Vec<&ResultRow> = rows.iter().collect();
        manifest.tally = Some(Tally {
            over_samples: over_samples(&manifest, &samples),
            ..tally(&samples, &samples, None)
        });
        manifest
    }

    #[test]
    fn figures_by_hand() {
        let rows = rows();
        let samples: Vec<&ResultRow> = rows.iter().collect();
        let found = over_samples(&run(false), &samples).expect("there are several samples");
        assert_eq!((found.majority.n_correct, found.majority.n), (4, 5));
        assert_eq!((found.n_tied, found.n_incomplete), (2, 1));
        let mean = found.mean.expect("four questions are whole");
        // (3 + 2 + 1 + 0) / 16.
        assert_eq!((mean.n, mean.value), (4, 0.375));
        let interval = bootstrap_mean(&[0.75, 0.5, 0.25, 0.0], 0).expect("there are values");
        assert_eq!((mean.low, mean.high), (interval.low, interval.high));
        let lenient = found.lenient_mean.expect("every row was looked at");
        // (3 + 2 + 2 + 0) / 16.
        assert_eq!((lenient.n, lenient.value), (4, 0.4375));
        let at: Vec<u32> = found.pass.iter().map(|pass| pass.k).collect();
        assert_eq!(at, [1, 2, 4]);
        // pass@2 of c right of 4: 1 - C(4-c, 2)/6 = 1, 5/6, 1/2, 0.
        let second = &found.pass[1].estimate;
        assert!((second.value - (1.0 + 5.0 / 6.0 + 0.5) / 4.0).abs() < 1e-12);
        let last = &found.pass[2].estimate;
        assert_eq!((last.value, last.method.as_str()), (0.75, "wilson"));
        let interval = wilson(3, 4).expect("four questions");
        assert_eq!((last.low, last.high), (interval.low, interval.high));
    }

    #[test]
    fn early_stop_leaves_the_vote_alone() {
        let rows = rows();
        let samples: Vec<&ResultRow> = rows.iter().collect();
        let found = over_samples(&run(true), &samples).expect("there are several samples");
        assert_eq!(found.majority.n_correct, 4);
        assert!(found.mean.is_none() && found.lenient_mean.is_none() && found.pass.is_empty());
        let mut single = run(false);
        single.generation.samples = 1;
        assert_eq!(over_samples(&single, &samples), None);
    }

    #[test]
    fn the_table_names_score_and_tie_rule() {
        let rows = rows();
        let samples: Vec<&ResultRow> = rows.iter().collect();
        let found = over_samples(&run(false), &samples).expect("there are several samples");
        let bootstrap = bootstrap_mean(&[0.75, 0.5, 0.25, 0.0], 0).expect("there are values");
        let mean = format!("{} to {}", percent(bootstrap.low), percent(bootstrap.high));
        let bootstrap = bootstrap_mean(&[0.75, 0.5, 0.5, 0.0], 0).expect("there are values");
        let lenient = format!("{} to {}", percent(bootstrap.low), percent(bootstrap.high));
        let expected = format!(
            "over 4 samples   n   share  95 % interval\n\
             maj@4            5  80.0 %  37.6 % to 96.4 %\n\
             mean@4 = pass@1  4  37.5 %  {mean}\n\
             mean@4, lenient  4  43.8 %  {lenient}\n\
             pass@4           4  75.0 %  30.1 % to 95.4 %\n\
             The score is maj@4. A tied vote goes to the answer of the lowest sample (2 were\n\
             tied). 1 questions lack samples and count in maj@4 alone.\n"
        );
        assert_eq!(render(&found, false), expected);
    }
}
