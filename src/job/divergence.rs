//! How far a precision moves the model: teacher-forced logits of one run's outputs under its own
//! precision and under another's, position by position.
//!
//! Under its own precision the log-probabilities must be those that generation logged, bit for
//! bit: that is the noise floor, and it is checked on every row.

use std::path::Path;
use std::sync::Arc;

use super::JobError;
use super::eval::assemble;
use super::model::OpenModel;
use super::plan::PREFILL_ROWS;
use super::precision;
use super::settings::{Effective, Layers};
use crate::cli::eval::{Options, read_config};
use crate::engine::cpu::{CpuBackend, CpuOptions};
use crate::engine::kv::pages_for;
use crate::engine::sample::log_softmax_at;
use crate::engine::{Backend, EngineShape, PageId, SequenceId, Span, TokenId};
use crate::report::compare::divergence::{Divergence, PositionRange};
use crate::submission::log;
use crate::submission::manifest::{Origin, RUN_FILE, RunManifest};
use crate::submission::{ResultRow, Results};

/// Positions scored at a time under both precisions: their logits are held once.
const CHUNK: usize = 32;

/// Ends of the ranges of output positions that are told apart; the last range is open.
const POSITION_ENDS: [usize; 6] = [16, 64, 256, 1024, 4096, usize::MAX];

/// One output position under both precisions.
struct Point {
    position: usize,
    kl: f64,
    same_top: bool,
    logprob: f32,
    other_logprob: f32,
}

/// Scores run `a`'s outputs under its own precision and under run `b`'s.
///
/// # Errors
/// The model, data set or profile of run `a` is not there any more or is another one; the weights
/// of both precisions cannot be held.
pub fn measure(a: &Path, b: &Path) -> Result<Divergence, JobError> {
    let (manifest, other) = (RunManifest::read(a)?, RunManifest::read(b)?);
    let config = read_config(&a.join(RUN_FILE)).map_err(|error| JobError::Option {
        message: error.to_string(),
    })?;
    let layers = Layers {
        flags: Options::default(),
        config: config.options,
    };
    let model_word = layers.model();
    let model = OpenModel::open(&model_word.value, false)?;
    if model.hash != manifest.generation.model {
        return Err(JobError::Changed {
            what: "model",
            run: a.to_owned(),
        });
    }
    let path = config.datasets.first().ok_or_else(|| JobError::Changed {
        what: "data set",
        run: a.to_owned(),
    })?;
    let own = precision(Some(&manifest.generation.precision))?;
    let effective = Effective {
        value: own,
        origin: Origin::Config,
    };
    let run = assemble(&layers, &model, &model_word, effective, path, false)?;
    if run.identity()?.prompts != manifest.generation.prompts {
        return Err(JobError::Changed {
            what: "data set or profile",
            run: a.to_owned(),
        });
    }

    let results = Results::new(log::read(a)?.rows);
    let rows: Vec<(&Arc<[TokenId]>, &ResultRow)> = run
        .prepared
        .pairs()
        .flat_map(|(record, row)| results.samples(&record.key).map(move |r| (&row.tokens, r)))
        .filter(|(tokens, result)| !tokens.is_empty() && !result.output_ids.is_empty())
        .collect();
    let longest = rows
        .iter()
        .map(|(tokens, row)| tokens.len() + row.output_ids.len())
        .max()
        .unwrap_or(1);
    let shape = EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: pages_for(longest),
        max_context: longest,
        prefill_rows: PREFILL_ROWS,
    };
    let options = CpuOptions {
        trace_hash: false,
        poison: false,
        ..run.options
    };
    let their = precision(Some(&other.generation.precision))?;
    let mut ours = CpuBackend::open(&model.checkpoint, own, shape, options)?;
    let mut theirs = CpuBackend::open(&model.checkpoint, their, shape, options)?;

    let mut points = Vec::new();
    let mut n_rows_equal_to_log = 0;
    for (prompt, row) in &rows {
        let first = points.len();
        score_row(&mut ours, &mut theirs, prompt, &row.output_ids, &mut points)?;
        let sum = points[first..]
            .iter()
            .fold(0.0f32, |sum, point| sum + point.logprob);
        let logged = row.logprob_sum_bits.as_deref();
        n_rows_equal_to_log +=
            usize::from(logged == Some(format!("{:08x}", sum.to_bits()).as_str()));
    }
    Ok(summarize(
        &manifest,
        &other,
        rows.len(),
        n_rows_equal_to_log,
        &points,
    ))
}

/// Both models over prompt and output; a point for each output token.
fn score_row(
    ours: &mut CpuBackend,
    theirs: &mut CpuBackend,
    prompt: &[TokenId],
    output: &[TokenId],
    points: &mut Vec<Point>,
) -> Result<(), JobError> {
    let sequence = SequenceId(0);
    let tokens: Vec<TokenId> = prompt.iter().chain(output).copied().collect();
    for backend in [&mut *ours, &mut *theirs] {
        for index in 0..pages_for(tokens.len()) {
            backend.map_page(sequence, index, PageId(index as u32));
        }
    }
    // The logits at position p are of token p + 1: the last token is never fed.
    let head = prompt.len() - 1;
    let fed = &tokens[..tokens.len() - 1];
    if head > 0 {
        let span = Span {
            sequence,
            start: 0,
            tokens: fed[..head].into(),
        };
        ours.prefill(std::slice::from_ref(&span))?;
        theirs.prefill(std::slice::from_ref(&span))?;
    }
    let n_vocab = ours.info().n_vocab;
    let mut held: Vec<f32> = Vec::with_capacity(CHUNK * n_vocab);
    for (i, chunk) in fed[head..].chunks(CHUNK).enumerate() {
        let start = head + i * CHUNK;
        let span = Span {
            sequence,
            start,
            tokens: chunk.into(),
        };
        held.clear();
        ours.score(&span, &mut |_, logits| held.extend_from_slice(logits))?;
        theirs.score(&span, &mut |position, logits| {
            let own = &held[(position - start) * n_vocab..][..n_vocab];
            let next = tokens[position + 1];
            points.push(Point {
                position: position - head,
                kl: kl(own, logits),
                same_top: argmax(own) == argmax(logits),
                logprob: log_softmax_at(own, next),
                other_logprob: log_softmax_at(logits, next),
            });
        })?;
    }
    ours.clear(&[sequence]);
    theirs.clear(&[sequence]);
    Ok(())
}

/// KL(p || q) of the softmaxes of two logit rows, in f64.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        f64::from(max) + sum.ln()
    };
    let (log_p, log_q) = (log_sum(p), log_sum(q));
    let sum: f64 = p
        .iter()
        .zip(q)
        .map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - log_p, f64::from(q) - log_q);
            p.exp() * (p - q)
        })
        .sum();
    // Rounding may leave a hair below zero where the rows are equal.
    sum.max(0.0)
}

fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best
}

fn summarize(
    manifest: &RunManifest,
    other: &RunManifest,
    n_rows: usize,
    n_rows_equal_to_log: usize,
    points: &[Point],
) -> Divergence {
    let n_tokens = points.len();
    let mean = |value: &dyn Fn(&Point) -> f64| {
        (n_tokens > 0).then(|| points.iter().map(value).sum::<f64>() / n_tokens as f64)
    };
    let mut kls: Vec<f64> = points.iter().map(|point| point.kl).collect();
    kls.sort_by(f64::total_cmp);
    let mut by_position = Vec::new();
    let mut from = 0;
    for end in POSITION_ENDS {
        let range: Vec<&Point> = points
            .iter()
            .filter(|point| (from..end).contains(&point.position))
            .collect();
        if let Some(last) = range.iter().map(|point| point.position).max() {
            let n = range.len() as f64;
            by_position.push(PositionRange {
                from,
                to: last + 1,
                n_tokens: range.len(),
                mean_kl: range.iter().map(|point| point.kl).sum::<f64>() / n,
                top1_agreement: range.iter().filter(|point| point.same_top).count() as f64 / n,
            });
        }
        from = end;
    }
    Divergence {
        precision: manifest.generation.precision.clone(),
        other_precision: other.generation.precision.clone(),
        n_rows,
        n_tokens,
        n_rows_equal_to_log,
        mean_kl: mean(&|point| point.kl),
        // The nearest rank: the smallest value that 99 % of all do not exceed.
        p99_kl: kls
            .get(((n_tokens as f64 * 0.99).ceil() as usize).saturating_sub(1))
            .copied(),
        top1_agreement: mean(&|point| f64::from(u8::from(point.same_top))),
        perplexity: mean(&|point| -f64::from(point.logprob)).map(f64::exp),
        other_perplexity: mean(&|point| -f64::from(point.other_logprob)).map(f64::exp),
        by_position,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_have_no_divergence_and_others_the_textbook_one() {
        let p = [0.0f32, 1.0, -2.0, 3.5];
        assert!(kl(&p, &p) < 1e-15);
        // Two tokens at even odds against three to one: ln 2 - ln(3) / 2 + ... by hand.
        let even = [0.0f32, 0.0];
        let uneven = [3.0f32.ln(), 0.0];
        let by_hand = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((kl(&even, &uneven) - by_hand).abs() < 1e-7);
    }
}
