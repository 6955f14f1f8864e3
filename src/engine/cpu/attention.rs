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

mod softmax;
#[cfg(test)]
mod tests;
mod tile;

use super::amx;
use super::gemm::{AttentionScratch, MAX_QUERIES};
use super::kv_cache::{KvElement, KvGeometry, PAGE_TILES};
use super::lanes::LANES;
use super::path::CpuPath;
use super::weights::Vector;
use crate::engine::TILE_KEYS;
use crate::quant::bf16;
use softmax::{States, finish, finish_to_pairs, fold, fold_outputs};
use tile::attend_tile;

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
    let mut unit = amx::HeldUnit::default();
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
                    &mut unit,
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

/// Query rows of lane block `block` of a scratch `[blocks][MAX_QUERIES][LANES]`.
fn lanes_of(values: &mut [f32], block: usize) -> &mut [[f32; LANES]] {
    let n = MAX_QUERIES * LANES;
    values[block * n..][..n].as_chunks_mut::<LANES>().0
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
