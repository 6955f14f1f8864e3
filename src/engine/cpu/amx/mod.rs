//! Products of tiles of bf16 pairs, where the CPU has AMX: which blocks of rows meet which tiles.
//!
//! `tdpbf16ps` adds to sums `C [16 rows][16 lanes]` the product of `A [16 rows][32 k]` and
//! `B [32 k][16 lanes]`. Rows of tokens are A and weights are B, so that packed pairs of weights, as
//! they lie, are two B side by side, and half of the rows of 32 sums that every epilogue takes is a C;
//! the other way round both would have to be transposed.
//!
//! The instruction sums the even and the odd of the 32 k apart, each in a chain of fma from 0 on, adds
//! the two and then adds that to C; numbers below the smallest normal one are 0. So an output is a chain
//! over ascending blocks of 32 k whatever the number of rows, but its bits are not those of the other
//! paths.
//!
//! ```text
//! rows     [group of a set][k / 32][rows of the group][16 pairs]: an A is up to 16 rows of 64 bytes,
//!          one behind the other (see `join`)
//! weights  [k / 2][32 lanes] pairs: a B is 16 rows of 64 bytes, 128 bytes apart
//! sums     [rows][32 lanes]: as well
//! ```

mod unit;

#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

use std::hint::black_box;
use std::ops::Range;

use super::buffer::Disjoint;
use super::gemm::{Exec, GROUP_ROWS, RowSets};
use super::lanes::{LANES, for_each};
use super::path::{CpuPath, on_each_path};
use super::weights::{Tiles, prefetch};
use unit::{Operands, TileUnit};

pub use unit::is_available;

/// k of one instruction.
const STEP_K: usize = 32;

/// Pairs of a row in an A: 64 bytes.
const STEP_PAIRS: usize = STEP_K / 2;

/// Rows of an A.
const BLOCK_ROWS: usize = 16;

/// k between which sums lie in registers: two tiles' pairs take 24 KiB, and leave the first-level
/// cache, of 48 KiB where there is AMX, room for sums and two blocks of rows. A divisor of 2880.
const CHUNK_K: usize = 192;

/// Tiles that share a chunk, so that a block's rows come from the second-level cache once for both.
const JOINT: usize = 2;

/// Words that may be read behind the last row: a block of a large group is always 16 rows.
pub const SLACK: usize = (BLOCK_ROWS - 1) * STEP_PAIRS;

/// Sums of a group of rows, tile by tile. A row is two lines of the cache, and no more.
#[repr(align(64))]
struct Sums([[f32; LANES]; JOINT * GROUP_ROWS]);

/// Writes rows of bf16 values as the blocks that [`multiply`] takes: those of a set, wherever in `x`
/// they are, one behind the other.
pub fn join(path: CpuPath, x: &[f32], rows: &RowSets, blocks: &mut [u32]) {
    /// k of a task.
    const PART_K: usize = 16 * STEP_K;
    /// Values too few to be worth tasks.
    const FEW: usize = 1 << 15;
    let n_k = rows.n_k;
    let (n_groups, n_parts) = (rows.n_rows().div_ceil(GROUP_ROWS), n_k.div_ceil(PART_K));
    let n_tasks = rows.n_sets() * n_groups * n_parts;
    let blocks = Disjoint::new(blocks);
    let one_by_one = if rows.n_rows() * n_k <= FEW {
        n_tasks
    } else {
        1
    };
    for_each(n_tasks, one_by_one, |task| {
        let (set, part) = (task / n_parts / n_groups, task % n_parts);
        let set = rows.of_set(set);
        let first = set.start + task / n_parts % n_groups * GROUP_ROWS;
        if first >= set.end {
            return;
        }
        let n = GROUP_ROWS.min(set.end - first);
        let mut starts = [0; GROUP_ROWS];
        for (i, start) in starts[..n].iter_mut().enumerate() {
            *start = (rows.start)(first + i) + part * PART_K;
        }
        let part_k = PART_K.min(n_k - part * PART_K);
        let start = first * n_k / 2 + part * PART_K / 2 * n;
        // SAFETY: each part of a group of a set is written by one task.
        #[allow(unsafe_code, reason = "parts are disjoint")]
        let blocks = unsafe { blocks.slice_mut(start, part_k / 2 * n) };
        join_steps(path, x, &starts[..n], blocks);
    });
}

on_each_path! {
    fn join_steps(x: &[f32], starts: &[usize], blocks: &mut [u32]) = join_steps_body
}

#[inline(always)]
fn join_steps_body(x: &[f32], starts: &[usize], blocks: &mut [u32]) {
    let (blocks, _) = blocks.as_chunks_mut::<STEP_PAIRS>();
    for (step, blocks) in blocks.chunks_exact_mut(starts.len()).enumerate() {
        for (i, row) in blocks.iter_mut().enumerate() {
            let values: &[f32] = &x[starts[i] + step * STEP_K..][..STEP_K];
            let values: &[f32; STEP_K] = values.try_into().expect("of this length");
            let mut any = 0;
            for pair in 0..STEP_PAIRS {
                let (even, odd) = (values[2 * pair].to_bits(), values[2 * pair + 1].to_bits());
                any |= even | odd;
                row[pair] = even >> 16 | odd & 0xFFFF_0000;
            }
            debug_assert_eq!(any & 0xFFFF, 0, "bf16 values");
        }
    }
}

/// Multiplies tiles with the rows of a set; as [`multiply`](super::gemm::multiply), on blocks that
/// [`join`] wrote, with [`SLACK`] words behind them.
pub fn multiply<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    blocks: &[u32],
    rows: Range<usize>,
    finish: impl FnMut(usize, usize, &mut [[f32; LANES]]),
) {
    #[cfg(test)]
    if !is_available() {
        return multiply_by::<emulated::Emulated, W>(exec, weights, tiles, blocks, rows, finish);
    }
    multiply_by::<unit::Hardware, W>(exec, weights, tiles, blocks, rows, finish);
}

fn multiply_by<U: TileUnit, W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    blocks: &[u32],
    rows: Range<usize>,
    mut finish: impl FnMut(usize, usize, &mut [[f32; LANES]]),
) {
    if rows.is_empty() {
        return;
    }
    let n_k = weights.n_k();
    exec.with_scratch(|scratch| {
        let mut sums = Sums([[0.0; LANES]; JOINT * GROUP_ROWS]);
        // Up to two blocks are of the rows that there are. Of more, all are full and the last takes
        // what lies behind its rows, so that the unit is set once.
        let few = rows.len() <= 2 * BLOCK_ROWS;
        let first = BLOCK_ROWS.min(rows.len());
        let second = match rows.len() {
            n if few && n > BLOCK_ROWS => n - BLOCK_ROWS,
            _ => first,
        };
        let unit = U::set([first, second]);
        for group in (0..rows.len()).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(rows.len() - group);
            let a_tile = if few {
                n
            } else {
                n.next_multiple_of(BLOCK_ROWS)
            };
            let blocks = &blocks[(rows.start + group) * n_k / 2..];
            for first in tiles.clone().step_by(JOINT) {
                let n_tiles = JOINT.min(tiles.end - first);
                let sums = &mut sums.0[..n_tiles * a_tile];
                sums.fill([0.0; LANES]);
                let packed = weights.packed_pairs(first);
                for k in (0..n_k).step_by(CHUNK_K) {
                    let chunk_k = CHUNK_K.min(n_k - k);
                    let (w, w_tile) = match packed {
                        Some((w, w_tile)) => {
                            if group == 0 {
                                prefetch_next(w, w_tile, k, n_k);
                            }
                            (&w[k / 2 * LANES..], w_tile)
                        }
                        None => {
                            let w_tile = chunk_k / 2 * LANES;
                            let w = &mut scratch.pairs[..n_tiles * w_tile];
                            for (i, w) in w.chunks_exact_mut(w_tile).enumerate() {
                                weights.unpack_pairs(exec.path, first + i, k, chunk_k, w);
                            }
                            (&*w, w_tile)
                        }
                    };
                    let chunk = Chunk {
                        w,
                        w_tile,
                        blocks: &blocks[k / 2 * n..],
                        n_rows: n,
                        n_steps: chunk_k / STEP_K,
                    };
                    chunk.multiply(&unit, sums, a_tile);
                }
                for (i, sums) in sums.chunks_exact_mut(a_tile).enumerate() {
                    finish(first + i, group, &mut sums[..n]);
                }
            }
        }
    });
}

/// Asks for the next chunk of packed tiles: that of the next tiles behind the last.
fn prefetch_next(w: &[u32], w_tile: usize, k: usize, n_k: usize) {
    let next = k + CHUNK_K;
    let (tile, k) = if next < n_k { (0, next) } else { (JOINT, 0) };
    for i in 0..JOINT {
        let start = (tile + i) * w_tile + k / 2 * LANES;
        prefetch(w, start, CHUNK_K.min(n_k - k) / 2 * LANES);
    }
}

/// A chunk of K of some tiles, and of a group of rows.
struct Chunk<'a> {
    /// Pairs `[steps * 16][LANES]` of each tile, `w_tile` words apart.
    w: &'a [u32],
    w_tile: usize,
    /// `[steps][n_rows][STEP_PAIRS]`, and more.
    blocks: &'a [u32],
    n_rows: usize,
    n_steps: usize,
}

impl Chunk<'_> {
    /// Continues the sums of all rows, `a_tile` rows of sums a tile: four C at a time, two blocks of rows
    /// by the halves of a tile, or one block by those of two tiles. So there are as many loads as
    /// products, each of half the cycles of one, and no product waits for the one before.
    fn multiply<U: TileUnit>(&self, unit: &U, sums: &mut [[f32; LANES]], a_tile: usize) {
        let n_tiles = sums.len() / a_tile;
        let end = (n_tiles - 1) * self.w_tile + self.n_steps * STEP_PAIRS * LANES;
        assert!(end <= self.w.len(), "weights too short");
        assert!(self.n_rows <= a_tile, "a row of sums for each row");
        let end = ((self.n_steps - 1) * self.n_rows + a_tile) * STEP_PAIRS;
        assert!(end <= self.blocks.len(), "rows too short");
        let a_row = self.n_rows * STEP_PAIRS;
        let sums = sums.as_mut_ptr();
        for row in (0..self.n_rows).step_by(2 * BLOCK_ROWS) {
            let operands = |tile: usize| Operands {
                sums: sums.wrapping_add(tile * a_tile + row).cast(),
                w: self.w.as_ptr().wrapping_add(tile * self.w_tile),
                rows: self.blocks.as_ptr().wrapping_add(row * STEP_PAIRS),
                a_step: a_row,
                n_steps: self.n_steps,
            };
            // SAFETY: by the checks above tiles, blocks of rows and their sums lie inside: the unit has
            // the rows of sums that a tile has, or 16 where that is a multiple of 16.
            #[allow(unsafe_code, reason = "bounds were checked")]
            unsafe {
                if self.n_rows - row > BLOCK_ROWS {
                    (0..n_tiles).for_each(|tile| unit.two_blocks(&operands(tile)));
                } else if n_tiles == JOINT {
                    unit.two_tiles(&operands(0), &operands(1));
                } else {
                    unit.one(&operands(0));
                }
            }
        }
    }
}

/// Multiplies 32 rows with a tile of 256 k `n_rounds` times, from the first-level cache; gives the number
/// of products. For a measure of the unit's rate.
///
/// # Panics
/// When there is no unit.
pub fn multiply_from_cache(n_rounds: usize) -> usize {
    const N_STEPS: usize = 8;
    const N_ROWS: usize = 2 * BLOCK_ROWS;
    #[repr(align(64))]
    struct Lines<const N: usize>([u32; N]);
    assert!(is_available(), "no unit");
    // Pairs of 0.5 in bf16.
    let w = Lines([0x3F00_3F00; N_STEPS * STEP_PAIRS * LANES]);
    let rows = Lines([0x3F00_3F00; N_STEPS * STEP_PAIRS * N_ROWS]);
    let mut sums = Sums([[0.0; LANES]; JOINT * GROUP_ROWS]);
    let unit = unit::Hardware::set([BLOCK_ROWS; 2]);
    for _ in 0..n_rounds {
        let chunk = Chunk {
            w: black_box(&w.0),
            w_tile: 0,
            blocks: &rows.0,
            n_rows: N_ROWS,
            n_steps: N_STEPS,
        };
        chunk.multiply(&unit, &mut sums.0[..N_ROWS], N_ROWS);
    }
    black_box(&sums.0);
    n_rounds * N_ROWS * LANES * N_STEPS * STEP_K
}
