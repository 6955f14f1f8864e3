//! A comparison's figures as words: shared by the terminal, the Markdown file and the page.

use super::{
    Change, ChangeSide, ComparedRun, Comparison, LedgerSide, OutputIdentity, Pair, ValuesVerdict,
};
use crate::dataset::Gold;
use crate::report::table::{bytes, duration, grouped, percent, rate};
use crate::score::option_letter;
use crate::submission::write::status_name;

/// A difference of shares in points: `+1.3`.
pub fn points(difference: f64) -> String {
    // Rounded first, so that nothing becomes `-0.0`.
    let rounded = (difference * 1000.0).round() / 10.0 + 0.0;
    format!("{rounded:+.1}")
}

/// A p-value: three significant digits, none below a ten-thousandth.
pub fn p_value(p: f64) -> String {
    match p {
        p if p < 0.0001 => "< 0.0001".to_owned(),
        p if p < 0.01 => format!("{p:.4}"),
        p => format!("{p:.3}"),
    }
}

/// `+1.3 points (95 % interval -0.2 to +2.9)`.
pub fn difference(pair: &Pair) -> Option<String> {
    let estimate = pair.difference.as_ref()?;
    Some(format!(
        "{} points (95 % interval {} to {})",
        points(estimate.difference),
        points(estimate.low),
        points(estimate.high)
    ))
}

/// The finding of a pair in a sentence or two.
pub fn verdict(comparison: &Comparison, pair: &Pair) -> String {
    let (Some(base), Some(other)) = (comparison.runs.first(), comparison.runs.get(pair.run)) else {
        return String::new();
    };
    let (Some(difference), Some(p), Some(method)) = (
        difference(pair),
        pair.tests.p_holm,
        pair.tests.p_method.as_ref(),
    ) else {
        return "No question has a verdict in both runs: there is nothing to test.".to_owned();
    };
    let n_pairs = comparison.pairs.len();
    let adjusted = if n_pairs > 1 {
        format!(", Holm-adjusted over {n_pairs} comparisons")
    } else {
        String::new()
    };
    let p = match p_value(p) {
        p if p.starts_with('<') => format!("p {p}"),
        p => format!("p = {p}"),
    };
    let evidence = format!("{difference}, {p} ({method}{adjusted})");
    if pair.tests.significant == Some(true) {
        let is_worse = pair.difference.as_ref().is_some_and(|d| d.difference < 0.0);
        let word = if is_worse { "worse" } else { "better" };
        return format!("{} is {word} than {}: {evidence}.", other.label, base.label);
    }
    if is_identical(&pair.identity) {
        return format!(
            "{} and {} gave the same tokens and log-probability bits for every sample.",
            base.label, other.label
        );
    }
    let detectable = match &pair.detectable {
        Some(detectable) => format!(
            " {} questions would show a difference of {:.1} points.",
            grouped(pair.n_questions),
            detectable.difference * 100.0
        ),
        None => " So few questions would show no difference at all.".to_owned(),
    };
    format!(
        "No difference between {} and {} was shown: {evidence}.{detectable}",
        base.label, other.label
    )
}

/// Every output is the other's, bit for bit.
pub fn is_identical(identity: &OutputIdentity) -> bool {
    identity.n_samples > 0
        && identity.n_same_tokens == identity.n_samples
        && identity.n_same_bits == identity.n_samples
}

/// What the figures do not count; absent when they count everything.
pub fn excluded(pair: &Pair) -> Option<String> {
    let excluded = &pair.excluded;
    let parts: Vec<String> = [
        (excluded.error, "in error"),
        (excluded.not_run, "not run"),
        (excluded.missing, "in one run only"),
        (excluded.no_gold, "without gold"),
    ]
    .iter()
    .filter(|(n, _)| *n > 0)
    .map(|(n, what)| format!("{} {what}", grouped(*n)))
    .collect();
    (!parts.is_empty()).then(|| format!("left out (pairs of samples): {}", parts.join(", ")))
}

/// Where outputs differ, from which token on.
pub fn first_differences(identity: &OutputIdentity) -> Option<String> {
    let (Some(min), Some(median), Some(max)) = (
        identity.first_difference_min,
        identity.first_difference_median,
        identity.first_difference_max,
    ) else {
        return None;
    };
    Some(format!(
        "{} outputs differ, from token {median:.0} on in the median ({min} to {max})",
        grouped(identity.n_samples - identity.n_same_tokens)
    ))
}

/// One run's side of a change: `answered, wrong: 42`.
pub fn outcome(side: &ChangeSide) -> String {
    let verdict = match side.correct {
        Some(true) => ", right",
        Some(false) => ", wrong",
        None => "",
    };
    let answer = side
        .answer
        .as_ref()
        .map_or(String::new(), |answer| format!(": {answer}"));
    format!("{}{verdict}{answer}", status_name(side.status))
}

/// The gold for reading: an option by its letter.
pub fn gold(change: &Change) -> Option<String> {
    Some(match change.gold.as_ref()? {
        Gold::Option(index) => option_letter(*index),
        Gold::Text(text) => text.clone(),
    })
}

/// How a class is held: `mxint8, changed by 0.4 %`.
pub fn held(side: &LedgerSide) -> String {
    match (side.lossless, side.relative_error) {
        (Some(true), _) => format!("{} exact", side.scheme),
        (Some(false), Some(error)) => format!("{} off {:.2} %", side.scheme, error * 100.0),
        (Some(false), None) => format!("{} changed", side.scheme),
        (None, _) => side.scheme.clone(),
    }
}

pub fn values(verdict: ValuesVerdict) -> &'static str {
    match verdict {
        ValuesVerdict::Same => "same",
        ValuesVerdict::Differ => "differ",
        ValuesVerdict::Unknown => "unknown",
    }
}

/// A line of the table of runs.
pub type RunFigure = (&'static str, fn(&ComparedRun) -> Option<String>);

/// What stands side by side for every run. A line that no run has is left out by the caller.
pub const RUN_FIGURES: [RunFigure; 17] = [
    ("precision", |run| Some(run.precision.clone())),
    ("slots", |run| Some(grouped(run.n_slots as u64))),
    ("accuracy", |run| run.accuracy.accuracy.map(percent)),
    ("  right of", |run| {
        let accuracy = &run.accuracy;
        Some(format!(
            "{}/{}",
            grouped(accuracy.n_correct),
            grouped(accuracy.n)
        ))
    }),
    ("  95 % interval", |run| {
        let (low, high) = (run.accuracy.low?, run.accuracy.high?);
        Some(format!("{:.1} to {:.1}", low * 100.0, high * 100.0))
    }),
    ("  lenient", |run| {
        run.lenient.as_ref()?.accuracy.accuracy.map(percent)
    }),
    ("prompt tokens", |run| Some(grouped(run.tokens.prompt))),
    ("analysis tokens", |run| Some(grouped(run.tokens.analysis))),
    ("final tokens", |run| Some(grouped(run.tokens.r#final))),
    ("output tokens a sample", |run| {
        run.tokens.output_per_sample.map(rate)
    }),
    ("seconds", |run| {
        (run.speed.wall_seconds > 0.0).then(|| duration(run.speed.wall_seconds))
    }),
    ("prefill tokens/s", |run| {
        run.speed.prefill_tokens_per_s.map(rate)
    }),
    ("decode tokens/s", |run| {
        run.speed.decode_tokens_per_s.map(rate)
    }),
    ("rows/s", |run| run.speed.rows_per_s.map(rate)),
    ("weights loaded", |run| run.memory.weights_bytes.map(bytes)),
    ("memory planned", |run| run.memory.planned_bytes.map(bytes)),
    ("memory measured", |run| {
        run.memory.measured_bytes.map(bytes)
    }),
];
