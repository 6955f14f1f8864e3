//! A tile of keys and values: what it adds to the split of the rows that see some of it, by the tile unit or
//! by values.

use std::ops::Range;

use super::super::amx::{self, HeldUnit};
use super::super::gemm::{AttentionScratch, MAX_QUERIES};
use super::super::kv_cache::{KvElement, KvGeometry};
use super::super::lanes::{LANES, fma_chain};
use super::super::path::{CpuPath, Kind};
use super::softmax::{States, decay_all, decay_and_add, softmax_tile, softmax_to_pairs};
use super::{Queries, Row, Starts, lanes_of};
use crate::engine::TILE_KEYS;

/// What rows see of the tile of positions `start..`.
struct View<'a> {
    geometry: &'a KvGeometry,
    queries: &'a Queries<'a>,
    start: usize,
    /// The rows that see some key, in order; what each sees begins and ends no earlier than what its predecessor
    /// does.
    rows: &'a [Row],
    /// Their queries.
    of_rows: Range<usize>,
}

impl View<'_> {
    /// The keys that a row sees.
    fn seen(&self, row: &Row) -> Range<usize> {
        let end = (row.position + 1).clamp(self.start, self.start + TILE_KEYS);
        self.queries.low(row).max(self.start) - self.start..end - self.start
    }

    /// The keys that any row sees.
    fn keys(&self) -> Range<usize> {
        let (first, last) = (&self.rows[0], &self.rows[self.rows.len() - 1]);
        self.seen(first).start..self.seen(last).end
    }

    fn scale(&self) -> f32 {
        1.0 / (self.geometry.head_dim as f32).sqrt()
    }
}

/// Continues the split of the rows `run` by the tile of positions `start..`.
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel takes its shapes one by one"
)]
pub fn attend_tile<E: KvElement>(
    path: CpuPath,
    geometry: &KvGeometry,
    scratch: &mut AttentionScratch,
    unit: &mut HeldUnit,
    queries: &Queries,
    run: Range<usize>,
    starts: &Starts,
    start: usize,
    tile: &[E],
    split: &mut States,
) {
    let rows = &queries.rows[run.clone()];
    let from = run.start + rows.partition_point(|row| row.position < start);
    let to = run.start + rows.partition_point(|row| queries.low(row) < start + TILE_KEYS);
    if from >= to {
        return;
    }
    let view = View {
        geometry,
        queries,
        start,
        rows: &queries.rows[from..to],
        of_rows: from * queries.group..to * queries.group,
    };
    let (keys, values) = tile.split_at(TILE_KEYS * geometry.head_dim);
    // Values of keys that no row sees are left alone.
    let seen = view.keys();
    let padded = geometry.padded_head_dim;
    let values = &values[seen.start * padded..seen.end * padded];
    let in_pairs = E::as_bf16(keys).zip(E::as_bf16(values));
    match in_pairs.filter(|_| queries.by_tiles && amx::takes_heads(geometry.head_dim)) {
        Some((keys, values)) => by_tiles(path, scratch, unit, &view, keys, values, split),
        None => by_values(path, scratch, &view, starts, keys, values, split),
    }
}

/// By the tile unit.
fn by_tiles(
    path: CpuPath,
    scratch: &mut AttentionScratch,
    unit: &mut HeldUnit,
    view: &View,
    keys: &[u16],
    values: &[u16],
    split: &mut States,
) {
    let (head_dim, padded) = (view.geometry.head_dim, view.geometry.padded_head_dim);
    let (group, seen, all) = (view.queries.group, view.keys(), view.of_rows.clone());
    let n = all.len();
    let halves = seen.start / LANES..seen.end.div_ceil(LANES);
    let tiles = scratch.tile_pairs.as_chunks_mut().0;
    let of_keys = &mut tiles[..halves.len() * head_dim / LANES];
    amx::pair_rows(path, keys, TILE_KEYS, 0, halves.clone(), of_keys);
    let n_queries = view.queries.rows.len() * group;
    let scores = &mut scratch.scores.as_chunks_mut().0[halves.start * MAX_QUERIES + all.start..];
    let q = &scratch.q_pairs;
    amx::multiply_held(unit, q, n_queries, all.clone(), of_keys, head_dim, scores);
    // A bit for each key.
    let mut bits = [0; MAX_QUERIES];
    for (row, bits) in view.rows.iter().zip(bits.chunks_exact_mut(group)) {
        let seen = view.seen(row);
        bits.fill(u64::MAX >> (TILE_KEYS - seen.len()) << seen.start);
    }
    let mut decay = [0.0; MAX_QUERIES];
    let (scores_low, scores_high) = scratch.scores.split_at(MAX_QUERIES * LANES);
    let p_pairs = &mut scratch.p_pairs[..n * TILE_KEYS / 2];
    softmax_to_pairs(
        path,
        [scores_low, scores_high].map(|scores| &scores.as_chunks().0[all.clone()]),
        &bits[..n],
        view.scale(),
        &mut split.max[all.clone()],
        &mut split.sum[all.clone()],
        &mut decay[..n],
        &mut scratch.probabilities.as_chunks_mut::<TILE_KEYS>().0[..n],
        p_pairs,
    );
    amx::pair_rows(path, values, padded, seen.start, 0..padded / LANES, tiles);
    let sums = scratch.values.as_chunks_mut().0;
    amx::multiply_held(unit, p_pairs, n, 0..n, tiles, TILE_KEYS, sums);
    for block in 0..padded / LANES {
        let out = &mut lanes_of(&mut scratch.split, block)[all.clone()];
        let sums = &lanes_of(&mut scratch.values, block)[..n];
        decay_and_add(path, &decay[..n], sums, out);
    }
}

/// By values in f32.
fn by_values<E: KvElement>(
    path: CpuPath,
    scratch: &mut AttentionScratch,
    view: &View,
    starts: &Starts,
    keys: &[E],
    values: &[E],
    split: &mut States,
) {
    let (head_dim, padded) = (view.geometry.head_dim, view.geometry.padded_head_dim);
    let (queries, seen, all) = (view.queries, view.keys(), view.of_rows.clone());
    let keys = unpack(path, keys, &mut scratch.keys);
    for half in seen.start / LANES..seen.end.div_ceil(LANES) {
        let scores = &mut lanes_of(&mut scratch.scores, half)[all.clone()];
        scores.fill([0.0; LANES]);
        let starts = &starts.q[all.clone()];
        let keys = &keys[half * LANES..];
        fma_chain(path, scores, keys, TILE_KEYS, queries.q, starts, head_dim);
    }
    let values = unpack(path, values, &mut scratch.values);
    let mut decay = [0.0; MAX_QUERIES];
    // Rows that see the same keys go on together.
    let mut first = all.start;
    for rows in view.rows.chunk_by(|a, b| view.seen(a) == view.seen(b)) {
        let visible = view.seen(&rows[0]);
        let some = first..first + rows.len() * queries.group;
        first = some.end;
        let (scores_low, scores_high) = scratch.scores.split_at(MAX_QUERIES * LANES);
        softmax_tile(
            path,
            &scores_low.as_chunks::<LANES>().0[some.clone()],
            &scores_high.as_chunks::<LANES>().0[some.clone()],
            (visible.start, visible.end),
            view.scale(),
            queries.exact,
            &mut split.max[some.clone()],
            &mut split.sum[some.clone()],
            &mut decay[some.clone()],
            &mut scratch.probabilities.as_chunks_mut::<TILE_KEYS>().0[some.clone()],
        );
        for block in 0..padded / LANES {
            let out = &mut lanes_of(&mut scratch.split, block)[some.clone()];
            decay_all(path, &decay[some.clone()], out);
            let values = &values[(visible.start - seen.start) * padded + block * LANES..];
            let starts = &starts.p[some.clone()];
            let p = &scratch.probabilities[visible.start..];
            fma_chain(path, out, values, padded, p, starts, visible.len());
        }
    }
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
