//! Grouped-query attention with sinks and a sliding window, for any rows under one KV head.
//!
//! A row's arithmetic depends on absolute positions alone: tiles of 64 keys in order with online
//! softmax; on full layers a split of 256 keys begins from zero and finished splits are folded in
//! position order; on sliding layers all tiles are one split. The sink joins maximum and
//! denominator last, unscaled. A masked key is never multiplied: its score is not looked at and
//! its V is skipped, so the cache may hold anything there. By the tile unit zeros stand for the V of
//! keys that no row of a task sees, and a row's probability of 0 meets the V of those that others see.
//!
//! Neighbours whose split lies in the same memory, be they rows of one sequence or of several that
//! share a page, go through it together: it is read and unpacked once for all of them. A query is
//! a chain of its own throughout, so its company changes no bit.

use std::ops::Range;

use super::amx;
use super::gemm::{AttentionScratch, MAX_QUERIES};
use super::kv_cache::{KvElement, KvGeometry, PAGE_TILES};
use super::lanes::{
    LANES, REGISTER, exp, fma_chain, halved, larger, max_lanes, next_row, sum_register,
};
use super::path::{CpuPath, Kind, on_each_path};
use super::weights::Vector;
use crate::engine::TILE_KEYS;
use crate::quant::bf16;

/// A row that is attended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its place among the queries and the outputs.
    pub index: usize,
    pub sequence: usize,
    pub position: usize,
}

/// The queries of some rows that one task attends, under one KV head.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Those that share pages next to each other; on sliding layers rows of one sequence, by
    /// position.
    pub rows: &'a [Row],
    /// Query heads that share the KV head; `rows.len() * group` is at most [`MAX_QUERIES`].
    pub group: usize,
    /// The query of (row, head `g`) is `q[row.index * q_stride + g * head_dim..][..head_dim]`.
    pub q: &'a [f32],
    pub q_stride: usize,
    /// The window on sliding layers.
    pub window: Option<usize>,
    pub sinks: &'a Vector,
    /// The first of the group's sinks.
    pub first_sink: usize,
    pub exact: bool,
    /// Products are done as pairs of bf16 by the tile unit, in its order, where keys and values are bf16 and
    /// it takes such heads.
    pub by_tiles: bool,
    /// Outputs are written as pairs of bf16, in the lower half of their lanes.
    pub to_pairs: bool,
}

impl Queries<'_> {
    /// First position that a row sees.
    fn low(&self, row: &Row) -> usize {
        let end = row.position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))
    }
}

/// Running maximum and denominator of each query.
struct States {
    max: [f32; MAX_QUERIES],
    sum: [f32; MAX_QUERIES],
}

impl States {
    const EMPTY: Self = Self {
        max: [f32::NEG_INFINITY; MAX_QUERIES],
        sum: [0.0; MAX_QUERIES],
    };

    fn clear(&mut self, queries: Range<usize>) {
        self.max[queries.clone()].fill(f32::NEG_INFINITY);
        self.sum[queries].fill(0.0);
    }
}

/// Where each query's values and probabilities begin.
struct Starts {
    q: [usize; MAX_QUERIES],
    p: [usize; MAX_QUERIES],
}

/// Attends; `tile_of(sequence, t)` is the tile of positions `64 t..`, and `write(index, g, block, lanes)`
/// takes 32 dimensions of the output of a row's query, those behind `head_dim` nothing.
pub fn attend<'t, E: KvElement>(
    path: CpuPath,
    geometry: &KvGeometry,
    scratch: &mut AttentionScratch,
    queries: &Queries,
    tile_of: impl Fn(usize, usize) -> &'t [E],
    mut write: impl FnMut(usize, usize, usize, &[f32; LANES]),
) {
    let (head_dim, padded) = (geometry.head_dim, geometry.padded_head_dim);
    let (rows, group) = (queries.rows, queries.group);
    let n_queries = rows.len() * group;
    assert!(n_queries <= MAX_QUERIES, "the caller cuts rows into blocks");
    let mut starts = Starts {
        q: [0; MAX_QUERIES],
        p: [0; MAX_QUERIES],
    };
    for query in 0..n_queries {
        let row = &rows[query / group];
        starts.q[query] = row.index * queries.q_stride + query % group * head_dim;
        starts.p[query] = query * TILE_KEYS;
    }
    if queries.by_tiles && amx::takes_heads(head_dim) {
        let to = &mut scratch.q_pairs;
        amx::join_rows(path, queries.q, &starts.q[..n_queries], head_dim, to);
    }
    let (mut split, mut folded) = (States::EMPTY, States::EMPTY);
    let (mut old, mut new) = ([0.0; MAX_QUERIES], [0.0; MAX_QUERIES]);
    for block in 0..padded / LANES {
        lanes_of(&mut scratch.folded, block)[..n_queries].fill([0.0; LANES]);
    }
    let lows = rows.iter().map(|row| queries.low(row) / TILE_KEYS);
    let ends = rows.iter().map(|row| row.position / TILE_KEYS + 1);
    let (mut tile, end_tile) = (lows.min().unwrap_or(0), ends.max().unwrap_or(0));
    while tile < end_tile {
        let split_end = match queries.window {
            Some(_) => end_tile,
            None => tile + PAGE_TILES,
        };
        // How far a row sees into the split, if it sees any of it.
        let end = |row: &Row| (row.position + 1).min(split_end * TILE_KEYS);
        let sees = |row: &Row| end(row) > tile * TILE_KEYS;
        // Each sees what its predecessor sees, and of the same memory.
        let together = |a: &Row, b: &Row| {
            let same = || std::ptr::eq(tile_of(a.sequence, tile), tile_of(b.sequence, tile));
            sees(a) && end(a) <= end(b) && same()
        };
        let mut first = 0;
        for run in rows.chunk_by(together) {
            let run = first..first + run.len();
            first = run.end;
            if !sees(&rows[run.start]) {
                continue;
            }
            let of_run = run.start * group..run.end * group;
            split.clear(of_run.clone());
            for block in 0..padded / LANES {
                lanes_of(&mut scratch.split, block)[of_run.clone()].fill([0.0; LANES]);
            }
            for tile in tile..split_end.min(rows[run.end - 1].position / TILE_KEYS + 1) {
                let keys_values = tile_of(rows[run.start].sequence, tile);
                attend_tile(
                    path,
                    geometry,
                    scratch,
                    queries,
                    run.clone(),
                    &starts,
                    tile * TILE_KEYS,
                    keys_values,
                    &mut split,
                );
            }
            fold(
                path,
                of_run.clone(),
                &mut folded,
                &split,
                &mut old,
                &mut new,
            );
            for block in 0..padded / LANES {
                let from = &lanes_of(&mut scratch.split, block)[of_run.clone()];
                let to = &mut lanes_of(&mut scratch.folded, block)[of_run.clone()];
                fold_outputs(path, &old[of_run.clone()], &new[of_run.clone()], from, to);
            }
        }
        tile = split_end;
    }
    // The sinks as one more split.
    split.sum[..n_queries].fill(1.0);
    for query in 0..n_queries {
        split.max[query] = queries.sinks.get(queries.first_sink + query % group);
    }
    fold(path, 0..n_queries, &mut folded, &split, &mut old, &mut new);
    for block in 0..padded / LANES {
        let of_block = &mut lanes_of(&mut scratch.folded, block)[..n_queries];
        match queries.to_pairs {
            true => finish_to_pairs(path, &old, &folded.sum, of_block),
            false => finish(path, &old, &folded.sum, queries.exact, of_block),
        }
    }
    for query in 0..n_queries {
        for block in 0..padded / LANES {
            let lanes = &lanes_of(&mut scratch.folded, block)[query];
            write(rows[query / group].index, query % group, block, lanes);
        }
    }
}

/// Continues the split of the rows `run` by the tile of positions `start..`. What a row sees of it
/// begins and ends no earlier than what its predecessor does.
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel takes its shapes one by one"
)]
fn attend_tile<E: KvElement>(
    path: CpuPath,
    geometry: &KvGeometry,
    scratch: &mut AttentionScratch,
    queries: &Queries,
    run: Range<usize>,
    starts: &Starts,
    start: usize,
    tile: &[E],
    split: &mut States,
) {
    let (head_dim, padded, group) = (geometry.head_dim, geometry.padded_head_dim, queries.group);
    let scale = 1.0 / (head_dim as f32).sqrt();
    // The keys that a row sees.
    let seen = |row: &Row| {
        let end = (row.position + 1).clamp(start, start + TILE_KEYS);
        (queries.low(row).max(start) - start, end - start)
    };
    // The rows that see some key.
    let rows = &queries.rows[run.clone()];
    let from = run.start + rows.partition_point(|row| row.position < start);
    let to = run.start + rows.partition_point(|row| queries.low(row) < start + TILE_KEYS);
    if from >= to {
        return;
    }
    let rows = &queries.rows[from..to];
    let (keys, values) = tile.split_at(TILE_KEYS * head_dim);
    // Values of keys that no row sees are left alone.
    let (first_key, end_key) = (seen(&rows[0]).0, seen(&rows[rows.len() - 1]).1);
    let values = &values[first_key * padded..end_key * padded];
    let in_pairs = E::as_bf16(keys).zip(E::as_bf16(values));
    let in_pairs = in_pairs.filter(|_| queries.by_tiles && amx::takes_heads(head_dim));
    let all = from * group..to * group;
    if let Some((keys, _)) = in_pairs {
        let halves = first_key / LANES..end_key.div_ceil(LANES);
        let tiles = scratch.tile_pairs.as_chunks_mut().0;
        let tiles = &mut tiles[..halves.len() * head_dim / LANES];
        amx::pair_rows(path, keys, TILE_KEYS, 0, halves.clone(), tiles);
        let n_queries = queries.rows.len() * group;
        let sums = &mut scratch.scores.as_chunks_mut().0[halves.start * MAX_QUERIES + all.start..];
        amx::multiply_held(
            &scratch.q_pairs,
            n_queries,
            all.clone(),
            tiles,
            head_dim,
            sums,
        );
    } else {
        let keys = unpack(path, keys, &mut scratch.keys);
        for half in first_key / LANES..end_key.div_ceil(LANES) {
            let scores = &mut lanes_of(&mut scratch.scores, half)[all.clone()];
            scores.fill([0.0; LANES]);
            let starts = &starts.q[all.clone()];
            let keys = &keys[half * LANES..];
            fma_chain(path, scores, keys, TILE_KEYS, queries.q, starts, head_dim);
        }
    }
    // Rows that see the same keys go on together.
    let mut decay = [0.0; MAX_QUERIES];
    let mut first = all.start;
    let alike = || rows.chunk_by(|a, b| seen(a) == seen(b));
    for rows in alike() {
        let some = first..first + rows.len() * group;
        first = some.end;
        let (scores_low, scores_high) = scratch.scores.split_at(MAX_QUERIES * LANES);
        softmax_tile(
            path,
            &scores_low.as_chunks::<LANES>().0[some.clone()],
            &scores_high.as_chunks::<LANES>().0[some.clone()],
            seen(&rows[0]),
            scale,
            queries.exact,
            &mut split.max[some.clone()],
            &mut split.sum[some.clone()],
            &mut decay[some.clone()],
            &mut scratch.probabilities.as_chunks_mut::<TILE_KEYS>().0[some],
        );
    }
    if let Some((_, values)) = in_pairs {
        let tiles = scratch.tile_pairs.as_chunks_mut().0;
        amx::pair_rows(path, values, padded, first_key, 0..padded / LANES, tiles);
        let (p, p_pairs) = (&scratch.probabilities, &mut scratch.p_pairs);
        amx::join_rows(path, p, &starts.p[all.clone()], TILE_KEYS, p_pairs);
        let sums = scratch.values.as_chunks_mut().0;
        amx::multiply_held(p_pairs, all.len(), 0..all.len(), tiles, TILE_KEYS, sums);
        for block in 0..padded / LANES {
            let out = &mut lanes_of(&mut scratch.split, block)[all.clone()];
            let sums = &lanes_of(&mut scratch.values, block)[..all.len()];
            decay_and_add(path, &decay[all.clone()], sums, out);
        }
        return;
    }
    let values = unpack(path, values, &mut scratch.values);
    let mut first = all.start;
    for rows in alike() {
        let (low, high) = seen(&rows[0]);
        let some = first..first + rows.len() * group;
        first = some.end;
        for block in 0..padded / LANES {
            let out = &mut lanes_of(&mut scratch.split, block)[some.clone()];
            decay_all(path, &decay[some.clone()], out);
            let values = &values[(low - first_key) * padded + block * LANES..];
            let starts = &starts.p[some.clone()];
            let p = &scratch.probabilities[low..];
            fma_chain(path, out, values, padded, p, starts, high - low);
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
        Kind::Avx512 | Kind::Avx512Bf16 => unsafe { avx512(source, scratch) },
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

on_each_path! {
    fn decay_all(decay: &[f32], out: &mut [[f32; LANES]]) = decay_all_body
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
    fn decay_and_add(decay: &[f32], sums: &[[f32; LANES]], out: &mut [[f32; LANES]])
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
    fn fold(
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
    fn fold_outputs(
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
    fn finish(decay: &[f32], sums: &[f32], exact: bool, out: &mut [[f32; LANES]]) = finish_body
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
    /// The same, rounded, as pairs of bf16 in the lower half of the lanes.
    fn finish_to_pairs(decay: &[f32], sums: &[f32], out: &mut [[f32; LANES]])
        = finish_to_pairs_body
}

#[inline(always)]
fn finish_to_pairs_body(decay: &[f32], sums: &[f32], out: &mut [[f32; LANES]]) {
    let (decay, sums) = (&decay[..out.len()], &sums[..out.len()]);
    for (query, out) in out.iter_mut().enumerate() {
        let (decay, sum) = (decay[query], sums[query]);
        next_row();
        let mut values = [0; LANES];
        for lane in 0..LANES {
            values[lane] = bf16::from_f32(out[lane] * decay / sum);
        }
        let lower: &mut [f32; LANES / 2] = out.first_chunk_mut().expect("half of the lanes");
        // SAFETY: both are 64 bytes, and any bits are a number.
        #[allow(unsafe_code, reason = "see above")]
        let pairs = unsafe { std::mem::transmute::<[u16; LANES], [f32; LANES / 2]>(values) };
        *lower = pairs;
    }
}

/// As [`attend`], slow and obvious: one softmax over all visible keys in f64. Without `exact`
/// it rounds the result alone; it writes values.
pub fn reference<'t, E: KvElement>(
    _path: CpuPath,
    geometry: &KvGeometry,
    _scratch: &mut AttentionScratch,
    queries: &Queries,
    tile_of: impl Fn(usize, usize) -> &'t [E],
    mut write: impl FnMut(usize, usize, usize, &[f32; LANES]),
) {
    let (head_dim, padded) = (geometry.head_dim, geometry.padded_head_dim);
    let value = |x: E| {
        let mut scratch = [0.0];
        f64::from(E::as_f32(&[x], &mut scratch)[0])
    };
    for row in queries.rows {
        let keys = queries.low(row)..row.position + 1;
        let tile_of = |tile: usize| tile_of(row.sequence, tile);
        for g in 0..queries.group {
            let q = &queries.q[row.index * queries.q_stride + g * head_dim..][..head_dim];
            let score = |key: usize| {
                let tile = tile_of(key / TILE_KEYS);
                let k = |dim: usize| value(tile[dim * TILE_KEYS + key % TILE_KEYS]);
                let sum: f64 = (0..head_dim).map(|dim| f64::from(q[dim]) * k(dim)).sum();
                sum / (head_dim as f64).sqrt()
            };
            let scores: Vec<f64> = keys.clone().map(score).collect();
            let sink = f64::from(queries.sinks.get(queries.first_sink + g));
            let max = scores.iter().copied().fold(sink, f64::max);
            let sum = (sink - max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            let mut values = vec![0.0; padded];
            for (dim, out) in values[..head_dim].iter_mut().enumerate() {
                let mut total = 0.0;
                for (key, score) in keys.clone().zip(&scores) {
                    let tile = tile_of(key / TILE_KEYS);
                    let at = TILE_KEYS * head_dim + key % TILE_KEYS * padded + dim;
                    total += (score - max).exp() / sum * value(tile[at]);
                }
                let total = total as f32;
                *out = if queries.exact {
                    total
                } else {
                    bf16::round(total)
                };
            }
            for (block, lanes) in values.as_chunks::<LANES>().0.iter().enumerate() {
                write(row.index, g, block, lanes);
            }
        }
    }
}

#[cfg(test)]
mod tests;
