//! Online softmax: what attention does with scores and outputs, query by query.
//!
//! Of a tile's scores it makes probabilities and what the outputs so far shrink by; a split's outputs, or the
//! sinks, are folded into those before it; at the end outputs are divided by their denominators. Nothing here knows
//! of rows, pages or how products are done.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use super::super::amx;
use super::super::gemm::MAX_QUERIES;
use super::super::lanes::{
    LANES, REGISTER, exp, halved, larger, max_lanes, next_row, sum_register,
};
use super::super::path::{CpuPath, on_each_path};
use crate::engine::TILE_KEYS;
use crate::quant::bf16;

/// Running maximum and denominator of each query.
pub struct States {
    pub max: [f32; MAX_QUERIES],
    pub sum: [f32; MAX_QUERIES],
}

impl States {
    pub const EMPTY: Self = Self {
        max: [f32::NEG_INFINITY; MAX_QUERIES],
        sum: [0.0; MAX_QUERIES],
    };

    pub fn clear(&mut self, queries: Range<usize>) {
        self.max[queries.clone()].fill(f32::NEG_INFINITY);
        self.sum[queries].fill(0.0);
    }
}

on_each_path! {
    /// Continues the online softmax of some queries over keys `seen.0..seen.1` of a tile:
    /// writes their probabilities and what their outputs so far shrink by.
    pub fn softmax_tile(
        scores_low: &[[f32; LANES]],
        scores_high: &[[f32; LANES]],
        seen: (usize, usize),
        scale: f32,
        exact: bool,
        maxima: &mut [f32],
        denominators: &mut [f32],
        decay: &mut [f32],
        probabilities: &mut [[f32; TILE_KEYS]],
    ) = softmax_tile_body
}

#[allow(
    clippy::too_many_arguments,
    reason = "as the function it is the body of"
)]
#[inline(always)]
fn softmax_tile_body(
    scores_low: &[[f32; LANES]],
    scores_high: &[[f32; LANES]],
    seen: (usize, usize),
    scale: f32,
    exact: bool,
    maxima: &mut [f32],
    denominators: &mut [f32],
    decay: &mut [f32],
    probabilities: &mut [[f32; TILE_KEYS]],
) {
    let n = maxima.len();
    let (scores_low, scores_high) = (&scores_low[..n], &scores_high[..n]);
    let (decay, probabilities) = (&mut decay[..n], &mut probabilities[..n]);
    let denominators = &mut denominators[..n];
    let (from, to) = (seen.0 as u32, seen.1 as u32);
    // A register of queries in loops of few instructions each, so that a processor has several at work; by
    // index: iterators are called.
    let mut first = 0;
    while first < n {
        let end = n.min(first + REGISTER);
        let mut shrunk = [0.0; REGISTER];
        for query in first..end {
            let (low, high) = (scores_low[query], scores_high[query]);
            let mut scores = [f32::NEG_INFINITY; TILE_KEYS];
            for lane in 0..LANES {
                let key = lane as u32;
                let visible = key >= from && key < to;
                scores[lane] = if visible {
                    low[lane] * scale
                } else {
                    f32::NEG_INFINITY
                };
                let key = key + LANES as u32;
                let visible = key >= from && key < to;
                scores[LANES + lane] = if visible {
                    high[lane] * scale
                } else {
                    f32::NEG_INFINITY
                };
            }
            // In every lane the same.
            let state = maxima[query];
            let mut max = max_lanes(scores);
            for max in &mut max {
                *max = larger(state, *max);
            }
            shrunk[query - first] = state - max[0];
            maxima[query] = max[0];
        }
        // The score of a key that is not visible may be anything.
        let mut sums = [[0.0; REGISTER]; REGISTER];
        for query in first..end {
            let (low, high) = (scores_low[query], scores_high[query]);
            let max = maxima[query];
            let mut p = [0.0; TILE_KEYS];
            for lane in 0..LANES {
                let key = lane as u32;
                let visible = key >= from && key < to;
                let e = exp(low[lane] * scale - max);
                p[lane] = if visible { e } else { 0.0 };
                let key = key + LANES as u32;
                let visible = key >= from && key < to;
                let e = exp(high[lane] * scale - max);
                p[LANES + lane] = if visible { e } else { 0.0 };
            }
            sums[query - first] = halved(p, |a, b| a + b);
            let out = &mut probabilities[query];
            for key in 0..TILE_KEYS {
                out[key] = if exact { p[key] } else { bf16::round(p[key]) };
            }
        }
        for shrunk in &mut shrunk {
            *shrunk = exp(*shrunk);
        }
        for query in first..end {
            next_row();
            let shrunk = shrunk[query - first];
            decay[query] = shrunk;
            denominators[query] =
                denominators[query].mul_add(shrunk, sum_register(&sums[query - first]));
        }
        first = end;
    }
}

/// As [`softmax_tile`] of queries that each see the keys that have a bit in `seen`, with probabilities rounded and
/// written as rows for the tile unit, `pairs` `[2][queries][16]`; `probabilities` are scratch. Where there are
/// instructions for pairs it takes half as many operations, of exponentials within 3e-6.
#[allow(
    clippy::too_many_arguments,
    reason = "kernels take their shapes one by one"
)]
pub fn softmax_to_pairs(
    path: CpuPath,
    scores: [&[[f32; LANES]]; 2],
    seen: &[u64],
    scale: f32,
    maxima: &mut [f32],
    denominators: &mut [f32],
    decay: &mut [f32],
    probabilities: &mut [[f32; TILE_KEYS]],
    pairs: &mut [u32],
) {
    #[cfg(target_arch = "x86_64")]
    if path.has_pairs() {
        let sees_all = seen.iter().all(|&seen| seen == u64::MAX);
        let mut tile = x86::Tile {
            scores,
            seen,
            scale,
            maxima,
            denominators,
            decay,
            pairs,
        };
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        return unsafe {
            match sees_all {
                true => tile.softmax::<true>(),
                false => tile.softmax::<false>(),
            }
        };
    }
    let mut first = 0;
    for alike in seen.chunk_by(|a, b| a == b) {
        let some = first..first + alike.len();
        first = some.end;
        let keys = alike[0].trailing_zeros()..u64::BITS - alike[0].leading_zeros();
        softmax_tile(
            path,
            &scores[0][some.clone()],
            &scores[1][some.clone()],
            (keys.start as usize, keys.end as usize),
            scale,
            false,
            &mut maxima[some.clone()],
            &mut denominators[some.clone()],
            &mut decay[some.clone()],
            &mut probabilities[some],
        );
    }
    let probabilities = probabilities.as_flattened();
    let mut starts = [0; MAX_QUERIES];
    for (query, start) in starts.iter_mut().enumerate() {
        *start = query * TILE_KEYS;
    }
    amx::join_rows(path, probabilities, &starts[..seen.len()], TILE_KEYS, pairs);
}

on_each_path! {
    pub fn decay_all(decay: &[f32], out: &mut [[f32; LANES]]) = decay_all_body
}

#[inline(always)]
fn decay_all_body(decay: &[f32], out: &mut [[f32; LANES]]) {
    let decay = &decay[..out.len()];
    for (query, out) in out.iter_mut().enumerate() {
        next_row();
        for lane in out {
            *lane *= decay[query];
        }
    }
}

on_each_path! {
    pub fn decay_and_add(decay: &[f32], sums: &[[f32; LANES]], out: &mut [[f32; LANES]])
        = decay_and_add_body
}

#[inline(always)]
fn decay_and_add_body(decay: &[f32], sums: &[[f32; LANES]], out: &mut [[f32; LANES]]) {
    let (decay, sums) = (&decay[..out.len()], &sums[..out.len()]);
    for (query, out) in out.iter_mut().enumerate() {
        next_row();
        for lane in 0..LANES {
            out[lane] = out[lane].mul_add(decay[query], sums[query][lane]);
        }
    }
}

on_each_path! {
    /// Folds a split (or the sinks) of some queries into what came before it; writes the factors of the old
    /// and the new outputs.
    pub fn fold(
        queries: Range<usize>,
        folded: &mut States,
        split: &States,
        old: &mut [f32; MAX_QUERIES],
        new: &mut [f32; MAX_QUERIES],
    ) = fold_body
}

#[inline(always)]
fn fold_body(
    queries: Range<usize>,
    folded: &mut States,
    split: &States,
    old: &mut [f32; MAX_QUERIES],
    new: &mut [f32; MAX_QUERIES],
) {
    const { assert!(MAX_QUERIES.is_multiple_of(REGISTER)) };
    assert!(queries.end <= MAX_QUERIES, "queries of a task");
    // Whole registers: what a loop over some leaves over is done one by one.
    let (start, end) = (queries.start as u32, queries.end as u32);
    let mut first = queries.start / REGISTER * REGISTER;
    while first < queries.end {
        let (max, sum) = (
            register(&mut folded.max, first),
            register(&mut folded.sum, first),
        );
        let (old, new) = (register(old, first), register(new, first));
        let split_max: [f32; REGISTER] =
            split.max[first..][..REGISTER].try_into().expect("as many");
        let split_sum: [f32; REGISTER] =
            split.sum[first..][..REGISTER].try_into().expect("as many");
        for i in 0..REGISTER {
            let query = first as u32 + i as u32;
            let is_one = query >= start && query < end;
            let larger = larger(max[i], split_max[i]);
            let (of_old, of_new) = (exp(max[i] - larger), exp(split_max[i] - larger));
            let both = split_sum[i].mul_add(of_new, sum[i] * of_old);
            old[i] = if is_one { of_old } else { old[i] };
            new[i] = if is_one { of_new } else { new[i] };
            sum[i] = if is_one { both } else { sum[i] };
            max[i] = if is_one { larger } else { max[i] };
        }
        first += REGISTER;
    }
}

/// A register of queries' values.
#[inline(always)]
fn register(values: &mut [f32; MAX_QUERIES], first: usize) -> &mut [f32; REGISTER] {
    values[first..].first_chunk_mut().expect("whole registers")
}

on_each_path! {
    pub fn fold_outputs(
        old: &[f32],
        new: &[f32],
        split: &[[f32; LANES]],
        folded: &mut [[f32; LANES]],
    ) = fold_outputs_body
}

#[inline(always)]
fn fold_outputs_body(
    old: &[f32],
    new: &[f32],
    split: &[[f32; LANES]],
    folded: &mut [[f32; LANES]],
) {
    let n = folded.len();
    let (old, new, split) = (&old[..n], &new[..n], &split[..n]);
    for (query, folded) in folded.iter_mut().enumerate() {
        let (old, new) = (old[query], new[query]);
        next_row();
        for lane in 0..LANES {
            folded[lane] = split[query][lane].mul_add(new, folded[lane] * old);
        }
    }
}

on_each_path! {
    pub fn finish(decay: &[f32], sums: &[f32], exact: bool, out: &mut [[f32; LANES]]) = finish_body
}

#[inline(always)]
fn finish_body(decay: &[f32], sums: &[f32], exact: bool, out: &mut [[f32; LANES]]) {
    let (decay, sums) = (&decay[..out.len()], &sums[..out.len()]);
    for (query, out) in out.iter_mut().enumerate() {
        let (decay, sum) = (decay[query], sums[query]);
        next_row();
        for lane in out {
            let value = *lane * decay / sum;
            *lane = if exact { value } else { bf16::round(value) };
        }
    }
}

on_each_path! {
    /// The same, rounded, as pairs of bf16 in the lower half of the lanes; with a division a query, not a value.
    pub fn finish_to_pairs(decay: &[f32], sums: &[f32], out: &mut [[f32; LANES]])
        = finish_to_pairs_body
}

#[inline(always)]
fn finish_to_pairs_body(decay: &[f32], sums: &[f32], out: &mut [[f32; LANES]]) {
    let (decay, sums) = (&decay[..out.len()], &sums[..out.len()]);
    for (query, out) in out.iter_mut().enumerate() {
        let factor = decay[query] / sums[query];
        next_row();
        let mut values = [0; LANES];
        for lane in 0..LANES {
            values[lane] = bf16::from_f32(out[lane] * factor);
        }
        let lower: &mut [f32; LANES / 2] = out.first_chunk_mut().expect("half of the lanes");
        // SAFETY: both are 64 bytes, and any bits are a number.
        #[allow(unsafe_code, reason = "see above")]
        let pairs = unsafe { std::mem::transmute::<[u16; LANES], [f32; LANES / 2]>(values) };
        *lower = pairs;
    }
}
