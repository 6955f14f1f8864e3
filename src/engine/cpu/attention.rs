//! Grouped-query attention with sinks and a sliding window, for any number of consecutive rows
//! of one sequence and one KV head.
//!
//! A row's arithmetic depends on absolute positions alone: tiles of 64 keys in order with online
//! softmax; on full layers a split of 256 keys begins from zero and finished splits are folded in
//! position order; on sliding layers all tiles are one split. The sink joins maximum and
//! denominator last, unscaled. A masked key is never multiplied: its score is not looked at and
//! its V is skipped, so the cache may hold anything there.

use super::gemm::{AttentionScratch, MAX_QUERIES};
use super::kv_cache::{KvElement, KvGeometry, PAGE_TILES};
use super::lanes::{LANES, exp, fma_chain, larger, max_lanes, sum_lanes};
use super::path::{CpuPath, Kind, on_each_path};
use super::weights::Vector;
use crate::engine::TILE_KEYS;
use crate::quant::bf16;

/// Consecutive rows of one sequence that one task attends, under one KV head.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Position of the first row.
    pub first: usize,
    pub n_rows: usize,
    /// Query heads that share the KV head; `n_rows * group` is at most [`MAX_QUERIES`].
    pub group: usize,
    /// The query of (row, head `g`) is `q[row * q_stride + g * head_dim..][..head_dim]`.
    pub q: &'a [f32],
    pub q_stride: usize,
    /// The window on sliding layers.
    pub window: Option<usize>,
    pub sinks: &'a Vector,
    /// The first of the group's sinks.
    pub first_sink: usize,
    pub exact: bool,
}

impl Rows<'_> {
    /// First position that a row sees.
    fn low(&self, row: usize) -> usize {
        let end = self.first + row + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))
    }
}

/// Running maximum and denominator of each query.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

const EMPTY: State = State {
    max: f32::NEG_INFINITY,
    sum: 0.0,
};

/// Attends; `tile_of(t)` is the tile of positions `64 t..`, and `write(row, g)` is where the
/// output `[head_dim]` of a query goes.
pub fn attend<'t, 'o, E: KvElement>(
    path: CpuPath,
    geometry: &KvGeometry,
    scratch: &mut AttentionScratch,
    rows: &Rows,
    tile_of: impl Fn(usize) -> &'t [E],
    mut write: impl FnMut(usize, usize) -> &'o mut [f32],
) {
    let (head_dim, padded, group) = (geometry.head_dim, geometry.padded_head_dim, rows.group);
    let n_queries = rows.n_rows * group;
    assert!(n_queries <= MAX_QUERIES, "the caller cuts rows into blocks");
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut q_starts = [0; MAX_QUERIES];
    let mut p_starts = [0; MAX_QUERIES];
    for query in 0..n_queries {
        q_starts[query] = query / group * rows.q_stride + query % group * head_dim;
        p_starts[query] = query * TILE_KEYS;
    }
    let mut split = [EMPTY; MAX_QUERIES];
    let mut folded = [EMPTY; MAX_QUERIES];
    for block in 0..padded / LANES {
        lanes_of(&mut scratch.folded, block)[..n_queries].fill([0.0; LANES]);
    }
    let n_positions = rows.first + rows.n_rows;
    let end_tile = n_positions.div_ceil(TILE_KEYS);
    let mut tile = rows.low(0) / TILE_KEYS;
    while tile < end_tile {
        // A split's first query: rows before it do not see any of its keys.
        let split_start = (tile * TILE_KEYS).saturating_sub(rows.first) * group;
        let split_end = match rows.window {
            Some(_) => end_tile,
            None => (tile / PAGE_TILES * PAGE_TILES + PAGE_TILES).min(end_tile),
        };
        split[..n_queries].fill(EMPTY);
        for block in 0..padded / LANES {
            lanes_of(&mut scratch.split, block)[..n_queries].fill([0.0; LANES]);
        }
        while tile < split_end {
            let start = tile * TILE_KEYS;
            // The rows that see some key of the tile.
            let from = start.saturating_sub(rows.first);
            let to = match rows.window {
                Some(window) => (start + TILE_KEYS + window - 1)
                    .saturating_sub(rows.first)
                    .min(rows.n_rows),
                None => rows.n_rows,
            };
            if from < to {
                let (keys, values) = tile_of(tile).split_at(TILE_KEYS * head_dim);
                let keys = unpack(path, keys, &mut scratch.keys);
                // Values of keys that no row sees are left alone.
                let first_key = rows.low(from).max(start) - start;
                let end_key = (rows.first + to).min(start + TILE_KEYS) - start;
                let values = &values[first_key * padded..end_key * padded];
                let values = unpack(path, values, &mut scratch.values);
                let queries = from * group..to * group;
                for half in first_key / LANES..end_key.div_ceil(LANES) {
                    let scores = &mut lanes_of(&mut scratch.scores, half)[queries.clone()];
                    scores.fill([0.0; LANES]);
                    let starts = &q_starts[queries.clone()];
                    let keys = &keys[half * LANES..];
                    fma_chain(path, scores, keys, TILE_KEYS, rows.q, starts, head_dim);
                }
                // Rows that see the same keys go on together.
                let seen = |row: usize| {
                    let low = rows.low(row).max(start) - start;
                    (low, (rows.first + row + 1).min(start + TILE_KEYS) - start)
                };
                let mut row = from;
                while row < to {
                    let (low, high) = seen(row);
                    let mut next = row + 1;
                    while next < to && seen(next) == (low, high) {
                        next += 1;
                    }
                    let queries = row * group..next * group;
                    row = next;
                    let mut decay = [0.0; MAX_QUERIES];
                    let (scores_low, scores_high) = scratch.scores.split_at(MAX_QUERIES * LANES);
                    softmax_tile(
                        path,
                        &scores_low.as_chunks::<LANES>().0[queries.clone()],
                        &scores_high.as_chunks::<LANES>().0[queries.clone()],
                        (low, high),
                        scale,
                        rows.exact,
                        &mut split[queries.clone()],
                        &mut decay[queries.clone()],
                        &mut scratch.probabilities.as_chunks_mut::<TILE_KEYS>().0[queries.clone()],
                    );
                    for block in 0..padded / LANES {
                        let out = &mut lanes_of(&mut scratch.split, block)[queries.clone()];
                        decay_all(path, &decay[queries.clone()], out);
                        let values = &values[(low - first_key) * padded + block * LANES..];
                        let starts = &p_starts[queries.clone()];
                        let p = &scratch.probabilities[low..];
                        fma_chain(path, out, values, padded, p, starts, high - low);
                    }
                }
            }
            tile += 1;
        }
        let queries = split_start.min(n_queries)..n_queries;
        let mut factors = [(0.0, 0.0); MAX_QUERIES];
        for query in queries.clone() {
            factors[query] = fold(path, &mut folded[query], split[query]);
        }
        for block in 0..padded / LANES {
            let from = &lanes_of(&mut scratch.split, block)[queries.clone()];
            let to = &mut lanes_of(&mut scratch.folded, block)[queries.clone()];
            fold_all(path, &factors[queries.clone()], from, to);
        }
    }
    for (query, state) in folded[..n_queries].iter_mut().enumerate() {
        let sink = State {
            max: rows.sinks.get(rows.first_sink + query % group),
            sum: 1.0,
        };
        let (decay, _) = fold(path, state, sink);
        let out = write(query / group, query % group);
        for (block, out) in out.chunks_mut(LANES).enumerate() {
            let from = &lanes_of(&mut scratch.folded, block)[query];
            finish(path, decay, state.sum, rows.exact, from, out);
        }
    }
}

/// Query rows of lane block `block` of a scratch `[blocks][MAX_QUERIES][LANES]`.
fn lanes_of(values: &mut [f32], block: usize) -> &mut [[f32; LANES]] {
    let n = MAX_QUERIES * LANES;
    values[block * n..][..n].as_chunks_mut::<LANES>().0
}

fn unpack<'a, E: KvElement>(path: CpuPath, source: &'a [E], scratch: &'a mut [f32]) -> &'a [f32] {
    #[inline(always)]
    fn body<'a, E: KvElement>(source: &'a [E], scratch: &'a mut [f32]) -> &'a [f32] {
        E::as_f32(source, scratch)
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn avx512<'a, E: KvElement>(source: &'a [E], scratch: &'a mut [f32]) -> &'a [f32] {
        body(source, scratch)
    }
    match path.kind() {
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        Kind::Avx512 | Kind::Avx512Bf16 | Kind::Amx => unsafe { avx512(source, scratch) },
        _ => body(source, scratch),
    }
}

on_each_path! {
    /// Continues the online softmax of some queries over keys `seen.0..seen.1` of a tile:
    /// writes their probabilities and what their outputs so far shrink by.
    fn softmax_tile(
        scores_low: &[[f32; LANES]],
        scores_high: &[[f32; LANES]],
        seen: (usize, usize),
        scale: f32,
        exact: bool,
        states: &mut [State],
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
    states: &mut [State],
    decay: &mut [f32],
    probabilities: &mut [[f32; TILE_KEYS]],
) {
    let n = states.len();
    let (scores_low, scores_high) = (&scores_low[..n], &scores_high[..n]);
    let (decay, probabilities) = (&mut decay[..n], &mut probabilities[..n]);
    let (from, to) = (seen.0 as u32, seen.1 as u32);
    for query in 0..n {
        let mut scores = [f32::NEG_INFINITY; TILE_KEYS];
        for lane in 0..LANES {
            let key = lane as u32;
            let visible = key >= from && key < to;
            scores[lane] = if visible {
                scores_low[query][lane] * scale
            } else {
                f32::NEG_INFINITY
            };
            let key = key + LANES as u32;
            let visible = key >= from && key < to;
            scores[LANES + lane] = if visible {
                scores_high[query][lane] * scale
            } else {
                f32::NEG_INFINITY
            };
        }
        let state = &mut states[query];
        let max = larger(state.max, max_lanes(scores));
        decay[query] = exp(state.max - max);
        let mut p = [0.0; TILE_KEYS];
        for lane in 0..TILE_KEYS {
            let key = lane as u32;
            let visible = key >= from && key < to;
            let e = exp(scores[lane] - max);
            p[lane] = if visible { e } else { 0.0 };
        }
        state.sum = state.sum.mul_add(decay[query], sum_lanes(p));
        state.max = max;
        for (out, p) in probabilities[query].iter_mut().zip(p) {
            *out = if exact { p } else { bf16::round(p) };
        }
    }
}

on_each_path! {
    fn decay_all(decay: &[f32], out: &mut [[f32; LANES]]) = decay_all_body
}

#[inline(always)]
fn decay_all_body(decay: &[f32], out: &mut [[f32; LANES]]) {
    for (decay, out) in decay.iter().zip(out) {
        for out in out {
            *out *= decay;
        }
    }
}

on_each_path! {
    /// Folds a split (or the sink) into what came before it; returns the factors of the old and
    /// the new output.
    fn fold(folded: &mut State, split: State) -> (f32, f32) = fold_body
}

#[inline(always)]
fn fold_body(folded: &mut State, split: State) -> (f32, f32) {
    let max = larger(folded.max, split.max);
    let (old, new) = (exp(folded.max - max), exp(split.max - max));
    folded.sum = split.sum.mul_add(new, folded.sum * old);
    folded.max = max;
    (old, new)
}

on_each_path! {
    fn fold_all(factors: &[(f32, f32)], split: &[[f32; LANES]], folded: &mut [[f32; LANES]])
        = fold_all_body
}

#[inline(always)]
fn fold_all_body(factors: &[(f32, f32)], split: &[[f32; LANES]], folded: &mut [[f32; LANES]]) {
    for ((&(old, new), split), folded) in factors.iter().zip(split).zip(folded) {
        for (folded, split) in folded.iter_mut().zip(split) {
            *folded = split.mul_add(new, *folded * old);
        }
    }
}

on_each_path! {
    fn finish(decay: f32, sum: f32, exact: bool, from: &[f32; LANES], out: &mut [f32])
        = finish_body
}

#[inline(always)]
fn finish_body(decay: f32, sum: f32, exact: bool, from: &[f32; LANES], out: &mut [f32]) {
    for (out, from) in out.iter_mut().zip(from) {
        let value = from * decay / sum;
        *out = if exact { value } else { bf16::round(value) };
    }
}

/// As [`attend`], slow and obvious: one softmax over all visible keys in f64. Without `exact`
/// it rounds the result alone.
pub fn reference<'t, 'o, E: KvElement>(
    _path: CpuPath,
    geometry: &KvGeometry,
    _scratch: &mut AttentionScratch,
    rows: &Rows,
    tile_of: impl Fn(usize) -> &'t [E],
    mut write: impl FnMut(usize, usize) -> &'o mut [f32],
) {
    let (head_dim, padded) = (geometry.head_dim, geometry.padded_head_dim);
    let value = |x: E| {
        let mut scratch = [0.0];
        f64::from(E::as_f32(&[x], &mut scratch)[0])
    };
    for row in 0..rows.n_rows {
        let keys = rows.low(row)..rows.first + row + 1;
        for g in 0..rows.group {
            let q = &rows.q[row * rows.q_stride + g * head_dim..][..head_dim];
            let score = |key: usize| {
                let tile = tile_of(key / TILE_KEYS);
                let k = |dim: usize| value(tile[dim * TILE_KEYS + key % TILE_KEYS]);
                let sum: f64 = (0..head_dim).map(|dim| f64::from(q[dim]) * k(dim)).sum();
                sum / (head_dim as f64).sqrt()
            };
            let scores: Vec<f64> = keys.clone().map(score).collect();
            let sink = f64::from(rows.sinks.get(rows.first_sink + g));
            let max = scores.iter().copied().fold(sink, f64::max);
            let sum = (sink - max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            for (dim, out) in write(row, g).iter_mut().enumerate() {
                let mut total = 0.0;
                for (key, score) in keys.clone().zip(&scores) {
                    let tile = tile_of(key / TILE_KEYS);
                    let at = TILE_KEYS * head_dim + key % TILE_KEYS * padded + dim;
                    total += (score - max).exp() / sum * value(tile[at]);
                }
                let total = total as f32;
                *out = if rows.exact {
                    total
                } else {
                    bf16::round(total)
                };
            }
        }
    }
}
