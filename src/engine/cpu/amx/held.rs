//! Products of rows with a few tiles that are in the cache: those of attention, whose keys and values are
//! made pairs of for some queries and are small.
//!
//! ```text
//! rows   [k / 32][rows][16 pairs]: any rows that follow each other are an A
//! tiles  [lanes / 32][k / 32]: two B each
//! sums   [lanes / 32][MAX_QUERIES][32 lanes]
//! ```

use std::ops::Range;

use super::super::gemm::MAX_QUERIES;
use super::super::lanes::LANES;
use super::super::path::{CpuPath, on_each_path};
use super::super::weights::PairedBlock;
use super::unit::{self, TileUnit};
use super::{BLOCK_ROWS, STEP_K, STEP_PAIRS, join_steps};

/// Joins rows of bf16 values, `n_k` from each start.
pub fn join_rows(path: CpuPath, x: &[f32], starts: &[usize], n_k: usize, rows: &mut [u32]) {
    join_steps(path, x, starts, &mut rows[..starts.len() * n_k / 2]);
}

on_each_path! {
    /// Makes tiles of bf16 values `[k][n_lanes]`, of which those of k `from` and on are there; what is
    /// not is zeros.
    pub fn pair_rows(values: &[u16], n_lanes: usize, from: usize, tiles: &mut [PairedBlock])
        = pair_rows_body
}

#[inline(always)]
fn pair_rows_body(values: &[u16], n_lanes: usize, from: usize, tiles: &mut [PairedBlock]) {
    const NONE: [u16; LANES] = [0; LANES];
    let n_steps = tiles.len() / (n_lanes / LANES);
    let (lanes, _) = values.as_chunks::<LANES>();
    for pair in 0..n_steps * STEP_PAIRS {
        for tile in 0..n_lanes / LANES {
            let of_k = |k: usize| {
                let row = k
                    .checked_sub(from)
                    .map(|row| row * (n_lanes / LANES) + tile);
                row.and_then(|at| lanes.get(at)).unwrap_or(&NONE)
            };
            let (even, odd) = (of_k(2 * pair), of_k(2 * pair + 1));
            let to = &mut tiles[tile * n_steps + pair / STEP_PAIRS];
            let to = &mut to[pair % STEP_PAIRS * LANES..][..LANES];
            for lane in 0..LANES {
                to[lane] = u32::from(even[lane]) | u32::from(odd[lane]) << 16;
            }
        }
    }
}

/// Multiplies `some` of `n_rows` joined rows with tiles of `n_k`; sums are written from the first of
/// them on.
pub fn multiply_held(
    rows: &[u32],
    n_rows: usize,
    some: Range<usize>,
    tiles: &[PairedBlock],
    n_k: usize,
    sums: &mut [[f32; LANES]],
) {
    #[cfg(test)]
    if !unit::is_available() {
        return multiply_by::<super::emulated::Emulated>(rows, n_rows, some, tiles, n_k, sums);
    }
    multiply_by::<unit::Hardware>(rows, n_rows, some, tiles, n_k, sums);
}

fn multiply_by<U: TileUnit>(
    rows: &[u32],
    n_rows: usize,
    some: Range<usize>,
    tiles: &[PairedBlock],
    n_k: usize,
    sums: &mut [[f32; LANES]],
) {
    for first in some.clone().step_by(BLOCK_ROWS) {
        let unit = U::set(BLOCK_ROWS.min(some.end - first));
        for (tile, steps) in tiles.chunks_exact(n_k / STEP_K).enumerate() {
            unit.clear();
            for (step, pairs) in steps.iter().enumerate() {
                unit.step(&rows[(step * n_rows + first) * STEP_PAIRS..], pairs);
            }
            unit.store(&mut sums[tile * MAX_QUERIES + first - some.start..]);
        }
    }
}
