//! Products of rows with a few tiles that are in the cache: those of attention. A tile of keys or values is
//! made pairs once for all queries of a task.
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
use super::blocks::join_steps;
use super::unit::{self, TileUnit};
use super::{BLOCK_ROWS, STEP_K, STEP_PAIRS};

/// Whether attention by heads of so many dimensions can be done here: they are whole tiles.
pub fn takes_heads(head_dim: usize) -> bool {
    head_dim.is_multiple_of(LANES)
}

/// Joins rows of bf16 values, `n_k` from each start.
pub fn join_rows(path: CpuPath, x: &[f32], starts: &[usize], n_k: usize, rows: &mut [u32]) {
    join_steps(path, x, starts, &mut rows[..starts.len() * n_k / 2]);
}

on_each_path! {
    /// Makes tiles of bf16 values `[k][n_lanes]`, of the blocks `blocks` of 32 lanes, of which those of k `from`
    /// and on are there; what is not is zeros.
    pub fn pair_rows(
        values: &[u16],
        n_lanes: usize,
        from: usize,
        blocks: Range<usize>,
        tiles: &mut [PairedBlock],
    ) = pair_rows_body
}

#[inline(always)]
fn pair_rows_body(
    values: &[u16],
    n_lanes: usize,
    from: usize,
    blocks: Range<usize>,
    tiles: &mut [PairedBlock],
) {
    let (values, _) = values.as_chunks::<LANES>();
    let (n_steps, a_row) = (tiles.len() / blocks.len(), n_lanes / LANES);
    // As arrays and by index: what joins two iterators, and a slice's copy, is called. What is before the first
    // row wraps to behind the last.
    let of_k = |k: usize, block: usize| {
        let at = k.wrapping_sub(from).wrapping_mul(a_row);
        values
            .get(at.wrapping_add(block))
            .copied()
            .unwrap_or([0; LANES])
    };
    for block in blocks.clone() {
        for step in 0..n_steps {
            let tile = &mut tiles[(block - blocks.start) * n_steps + step];
            for pair in 0..STEP_PAIRS {
                let k = step * STEP_K + 2 * pair;
                let (even, odd) = (of_k(k, block), of_k(k + 1, block));
                for lane in 0..LANES {
                    tile[pair * LANES + lane] = u32::from(even[lane]) | u32::from(odd[lane]) << 16;
                }
            }
        }
    }
}

/// The unit through a task's products: it stays set while blocks have as many rows.
pub struct HeldUnit<U = unit::Hardware> {
    unit: Option<U>,
    n_rows: usize,
}

impl<U> Default for HeldUnit<U> {
    /// Not yet set.
    fn default() -> Self {
        Self {
            unit: None,
            n_rows: 0,
        }
    }
}

impl<U: TileUnit> HeldUnit<U> {
    fn of_rows(&mut self, n_rows: usize) -> &U {
        if self.n_rows != n_rows {
            // Its end takes the shapes from the thread, so it comes before the next one is set.
            self.unit = None;
            self.n_rows = n_rows;
        }
        self.unit.get_or_insert_with(|| U::set(n_rows))
    }
}

/// Multiplies `some` of `n_rows` joined rows with tiles of `n_k`; sums are written from the first of
/// them on.
pub fn multiply_held(
    unit: &mut HeldUnit,
    rows: &[u32],
    n_rows: usize,
    some: Range<usize>,
    tiles: &[PairedBlock],
    n_k: usize,
    sums: &mut [[f32; LANES]],
) {
    #[cfg(test)]
    if !unit::is_available() {
        let mut unit = HeldUnit::<super::emulated::Emulated>::default();
        return multiply_by(&mut unit, rows, n_rows, some, tiles, n_k, sums);
    }
    multiply_by(unit, rows, n_rows, some, tiles, n_k, sums);
}

fn multiply_by<U: TileUnit>(
    unit: &mut HeldUnit<U>,
    rows: &[u32],
    n_rows: usize,
    some: Range<usize>,
    tiles: &[PairedBlock],
    n_k: usize,
    sums: &mut [[f32; LANES]],
) {
    let end_whole = some.end - some.len() % BLOCK_ROWS;
    for blocks in [some.start..end_whole, end_whole..some.end] {
        if blocks.is_empty() {
            continue;
        }
        let unit = unit.of_rows(BLOCK_ROWS.min(blocks.len()));
        for first in blocks.step_by(BLOCK_ROWS) {
            for (tile, steps) in tiles.chunks_exact(n_k / STEP_K).enumerate() {
                unit.clear();
                for (step, pairs) in steps.iter().enumerate() {
                    let rows = &rows[(step * n_rows + first) * STEP_PAIRS..];
                    unit.multiply_step(rows, pairs);
                }
                unit.store(&mut sums[tile * MAX_QUERIES + first - some.start..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::emulated::{Emulated, n_set};
    use super::*;

    #[test]
    fn the_unit_is_set_again_for_other_rows_alone() {
        const N_K: usize = 2 * STEP_K;
        let word = |i: usize| 0x3F80_3F80 ^ (i as u32 * 0x0101) & 0x007F_007F;
        let rows: Vec<u32> = (0..40 * N_K / 2).map(word).collect();
        let tile: PairedBlock = std::array::from_fn(|i| word(i * 7 + 3));
        let multiply = |unit: &mut HeldUnit<Emulated>, n: usize| {
            let mut sums = vec![[0.0; LANES]; MAX_QUERIES];
            multiply_by(unit, &rows, 40, 0..n, &[tile; 2], N_K, &mut sums);
            sums.truncate(n);
            sums
        };
        // Of 16, 16, 8, 16, 16 and 8 rows.
        let counts = [16, 40, 16, 24];
        let alone = counts.map(|n| multiply(&mut HeldUnit::default(), n));
        let before = n_set();
        let mut unit = HeldUnit::default();
        let held = counts.map(|n| multiply(&mut unit, n));
        assert!(held == alone, "sums are those of a unit that was just set");
        assert_eq!(n_set() - before, 4, "16, 8, 16, 8 rows");
    }
}
