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
//! rows     [block of a set][k / 32][rows of the block][16 pairs]: an A is up to 16 rows of 64 bytes, one
//!          behind the other, and behind it the next step's (see `join`)
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
use unit::TileUnit;

pub use unit::is_available;

/// k of one instruction.
const STEP_K: usize = 32;

/// Pairs of a row in an A: 64 bytes.
const STEP_PAIRS: usize = STEP_K / 2;

/// Rows of an A.
const BLOCK_ROWS: usize = 16;

/// Steps of K between which sums lie in tiles, so that a step's weights are in the first-level cache for
/// all blocks of rows. A divisor of the 90 of 2880.
const RUN_STEPS: usize = 6;

/// Steps by which a block's rows are asked for ahead of the first tile's products.
const ROWS_AHEAD: usize = 4;

/// Words of a step of a tile of weights.
const STEP_WORDS: usize = STEP_PAIRS * LANES;

/// Words that may be read behind the last row: a block of a large group is always 16 rows.
pub const SLACK: usize = (BLOCK_ROWS - 1) * STEP_PAIRS;

/// Sums of a group of rows. A row is two lines of the cache, and no more.
#[repr(align(64))]
struct Sums([[f32; LANES]; GROUP_ROWS]);

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
        let part_k = PART_K.min(n_k - part * PART_K);
        for first in (first..first + n).step_by(BLOCK_ROWS) {
            let n = BLOCK_ROWS.min(set.end - first);
            let mut starts = [0; BLOCK_ROWS];
            for (i, start) in starts[..n].iter_mut().enumerate() {
                *start = (rows.start)(first + i) + part * PART_K;
            }
            let start = first * n_k / 2 + part * PART_K / 2 * n;
            // SAFETY: each part of a block of a set is written by one task.
            #[allow(unsafe_code, reason = "parts are disjoint")]
            let block = unsafe { blocks.slice_mut(start, part_k / 2 * n) };
            join_steps(path, x, &starts[..n], block);
        }
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
    // One block is of the rows that there are. Of more, all are full and the last takes what lies behind
    // its rows, so that the unit is set once.
    let unit = U::set(rows.len().min(BLOCK_ROWS));
    let n_steps = weights.n_k() / STEP_K;
    exec.with_scratch(|scratch| {
        for group in (0..rows.len()).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(rows.len() - group);
            let rows = Rows {
                blocks: &blocks[(rows.start + group) * n_steps * STEP_PAIRS..],
                n,
                n_steps,
            };
            let finish = |tile, sums: &mut [_]| finish(tiles.start + tile, group, sums);
            match weights.packed_pairs(tiles.start) {
                Some((words, _)) => {
                    let packed = Packed { words, asked: 0 };
                    rows.multiply(&unit, packed, tiles.len(), finish);
                }
                None => {
                    let unpacked = Unpacked {
                        weights,
                        path: exec.path,
                        ring: scratch.pairs.first_chunk_mut().expect("as many words"),
                        n_unpacked: 0,
                        next: (tiles.start, 0),
                    };
                    rows.multiply(&unit, unpacked, tiles.len(), finish);
                }
            }
        }
    });
}

/// Steps of a task's tiles as pairs, numbered through all of them.
trait Steps {
    /// Steps by which [`Steps::bring`] is ahead of the products.
    const AHEAD: usize;

    /// Has the next step on its way.
    fn bring(&mut self);

    /// A step that was brought, of the last `RUN_STEPS + AHEAD`.
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS];
}

/// Weights that are pairs as they lie, brought from memory.
struct Packed<'a> {
    words: &'a [u32],
    asked: usize,
}

impl Steps for Packed<'_> {
    /// 16 KiB.
    const AHEAD: usize = 8;

    #[inline(always)]
    fn bring(&mut self) {
        prefetch(self.words, self.asked, STEP_WORDS);
        self.asked += STEP_WORDS;
    }

    #[inline(always)]
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS] {
        let pairs = self.words[step * STEP_WORDS..].first_chunk();
        pairs.expect("a task's tiles are there")
    }
}

/// Steps that [`Unpacked`] has room for.
const RING_STEPS: usize = 8;

/// Weights that are unpacked.
struct Unpacked<'a, W> {
    weights: &'a W,
    path: CpuPath,
    ring: &'a mut [u32; RING_STEPS * STEP_WORDS],
    n_unpacked: usize,
    /// The next tile, and k of it.
    next: (usize, usize),
}

impl<W: Tiles> Steps for Unpacked<'_, W> {
    /// What is unpacked during a step's products is out of the store buffer when it is loaded, and still
    /// in the cache.
    const AHEAD: usize = RING_STEPS - RUN_STEPS;

    #[inline(always)]
    fn bring(&mut self) {
        let (tile, k) = self.next;
        let to = &mut self.ring[self.n_unpacked % RING_STEPS * STEP_WORDS..][..STEP_WORDS];
        self.weights.unpack_pairs(self.path, tile, k, STEP_K, to);
        self.n_unpacked += 1;
        self.next = match k + STEP_K {
            k if k == self.weights.n_k() => (tile + 1, 0),
            k => (tile, k),
        };
    }

    #[inline(always)]
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS] {
        let pairs = self.ring[step % RING_STEPS * STEP_WORDS..].first_chunk();
        pairs.expect("the ring is whole steps")
    }
}

/// A group of rows.
struct Rows<'a> {
    /// `[block][n_steps][rows of the block][STEP_PAIRS]`, and more.
    blocks: &'a [u32],
    n: usize,
    n_steps: usize,
}

impl Rows<'_> {
    /// Multiplies all rows with `n_tiles` tiles and hands the sums of each to `finish`.
    ///
    /// A tile's steps are taken in runs, each by all blocks of rows. While the first block is multiplied,
    /// steps a little further on are brought: memory and what unpacks work beside the unit.
    fn multiply<U: TileUnit, S: Steps>(
        &self,
        unit: &U,
        mut steps: S,
        n_tiles: usize,
        mut finish: impl FnMut(usize, &mut [[f32; LANES]]),
    ) {
        let mut sums = Sums([[0.0; LANES]; GROUP_ROWS]);
        let n_blocks = self.n.div_ceil(BLOCK_ROWS);
        let n_runs = self.n_steps.div_ceil(RUN_STEPS);
        let all = n_tiles * self.n_steps;
        (0..S::AHEAD.min(all)).for_each(|_| steps.bring());
        for tile in 0..n_tiles {
            for run in 0..n_runs {
                let first = run * self.n_steps / n_runs;
                let n = (run + 1) * self.n_steps / n_runs - first;
                let at = tile * self.n_steps + first;
                for block in 0..n_blocks {
                    let of_block = &mut sums.0[block * BLOCK_ROWS..];
                    let blocks = &self.blocks[block * BLOCK_ROWS * self.n_steps * STEP_PAIRS..];
                    let a_step = BLOCK_ROWS.min(self.n - block * BLOCK_ROWS) * STEP_PAIRS;
                    // Sums of a block without another stay where they are.
                    let is_alone = n_blocks == 1;
                    match run {
                        0 => unit.clear(),
                        _ if is_alone => {}
                        _ => unit.load(of_block),
                    }
                    for step in 0..n {
                        if block == 0 && at + step + S::AHEAD < all {
                            steps.bring();
                        }
                        let start = (first + step) * a_step;
                        if tile == 0 {
                            // Another core may have written them.
                            prefetch(blocks, start + ROWS_AHEAD * a_step, a_step);
                        }
                        unit.step(&blocks[start..], steps.pairs(at + step));
                    }
                    if !is_alone || run == n_runs - 1 {
                        unit.store(of_block);
                    }
                }
            }
            finish(tile, &mut sums.0[..self.n]);
        }
    }
}

/// One run's steps, over and over, in the cache.
struct Held<'a>(&'a [[u32; STEP_WORDS]; RUN_STEPS]);

impl Steps for Held<'_> {
    const AHEAD: usize = 0;

    fn bring(&mut self) {}

    #[inline(always)]
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS] {
        &self.0[step % RUN_STEPS]
    }
}

/// Multiplies 32 rows with 256 lanes of 192 k `n_rounds` times, from the first-level cache; gives the number
/// of products. For a measure of the unit's rate.
///
/// # Panics
/// When there is no unit.
pub fn multiply_from_cache(n_rounds: usize) -> usize {
    const N_ROWS: usize = 2 * BLOCK_ROWS;
    const N_TILES: usize = 8;
    #[repr(align(64))]
    struct Lines<T>(T);
    assert!(is_available(), "no unit");
    // Pairs of 0.5 in bf16.
    let pairs = Lines([[0x3F00_3F00; STEP_WORDS]; RUN_STEPS]);
    let blocks = Lines([0x3F00_3F00; RUN_STEPS * STEP_PAIRS * N_ROWS]);
    let unit = unit::Hardware::set(BLOCK_ROWS);
    let rows = Rows {
        blocks: &blocks.0,
        n: N_ROWS,
        n_steps: RUN_STEPS,
    };
    for _ in 0..n_rounds {
        rows.multiply(&unit, Held(black_box(&pairs.0)), N_TILES, |_, sums| {
            black_box(sums);
        });
    }
    n_rounds * N_ROWS * N_TILES * LANES * RUN_STEPS * STEP_K
}
