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
//! rows     [group of a set][block][k / 32][rows of the block][16 pairs]: an A is up to 16 rows of 64 bytes,
//!          one behind the other, and behind it the next step's (see `join`)
//! weights  [k / 2][32 lanes] pairs: a B is 16 rows of 64 bytes, 128 bytes apart
//! sums     [rows][32 lanes]: as well
//! ```

mod held;
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
use super::weights::{Tiles, prefetch, prefetch_near};
use unit::TileUnit;

pub use held::{join_rows, multiply_held, pair_rows, takes_heads};
pub use unit::is_available;

/// k of one instruction.
const STEP_K: usize = 32;

/// Pairs of a row in an A: 64 bytes.
const STEP_PAIRS: usize = STEP_K / 2;

/// Rows of an A.
const BLOCK_ROWS: usize = 16;

/// Words of a step of a tile of weights.
const STEP_WORDS: usize = STEP_PAIRS * LANES;

/// Words that may be read behind the last row: where there are several blocks, as many rows are read of the
/// last as of the others.
pub const SLACK: usize = (BLOCK_ROWS - 1) * STEP_PAIRS;

/// Rows of each block of a group: as many in all but the last, of which as many are read.
fn block_rows(n_rows: usize) -> usize {
    n_rows.div_ceil(n_rows.div_ceil(BLOCK_ROWS))
}

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
        let group = first..first + n;
        for first in group.clone().step_by(block_rows(n)) {
            let n = block_rows(n).min(group.end - first);
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
    let n_steps = weights.n_k() / STEP_K;
    exec.with_scratch(|scratch| {
        for group in (0..rows.len()).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(rows.len() - group);
            let rows = Rows {
                blocks: &blocks[(rows.start + group) * n_steps * STEP_PAIRS..],
                n,
                n_steps,
            };
            let unit = U::set(block_rows(n));
            let finish = |tile, sums: &mut [_]| finish(tiles.start + tile, group, sums);
            let sums = &mut scratch.sums;
            match weights.packed_pairs(tiles.start) {
                Some((words, a_tile)) => {
                    let packed = Packed::new(&words[..tiles.len() * a_tile]);
                    rows.multiply(&unit, packed, tiles.len(), sums, finish);
                }
                None => {
                    let steps = tiles.start * n_steps..tiles.end * n_steps;
                    let ring = scratch.pairs.first_chunk_mut().expect("as many words");
                    let unpacked = Unpacked::new(weights, exec.path, steps, ring);
                    rows.multiply(&unit, unpacked, tiles.len(), sums, finish);
                }
            }
        }
    });
}

/// Steps of a task's tiles as pairs, numbered through all of them.
trait Steps {
    /// Steps of K between which the sums of several blocks lie in tiles: as many as there is room for in the
    /// first-level cache, where they stay for all blocks. A divisor of the 90 of 2880.
    const RUN: usize;

    /// Whether rows of several blocks pass through the first-level cache: they are too many to stay.
    const ROWS_PASS: bool = true;

    /// Has the first steps on their way.
    fn begin(&mut self);

    /// While a step's pairs are multiplied with the `block`th of `n_blocks` blocks of rows: has a share of
    /// what comes a few steps later on its way.
    fn bring(&mut self, block: usize, n_blocks: usize);

    /// A step that was brought.
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS];
}

/// What a task reads of memory, in order, and asks for some steps ahead.
struct Ahead<'a, T> {
    values: &'a [T],
    /// Values that were asked for.
    asked: usize,
    /// Values to ask for, times the number of blocks.
    due: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// Steps by which it is ahead: 16 KiB of pairs, 4 KiB of MXFP4.
    const STEPS: usize = 8;

    /// Values of a line of the cache.
    const LINE: usize = 64 / size_of::<T>();

    fn new(values: &'a [T]) -> Self {
        Self {
            values,
            asked: 0,
            due: 0,
        }
    }

    fn begin(&mut self, a_step: usize) {
        self.asked = Self::STEPS * a_step;
        prefetch(self.values, 0, self.asked.min(self.values.len()));
    }

    /// Memory answers at a steady pace, and whatever waits for it keeps a place that rows of the
    /// second-level cache need as well. So what is asked of it is spread over all blocks. Of many blocks it
    /// goes to the second-level cache: the first holds what they are multiplied with.
    #[inline(always)]
    fn ask(&mut self, a_step: usize, n_blocks: usize) {
        if self.asked >= self.values.len() {
            return;
        }
        if n_blocks == 1 {
            prefetch(self.values, self.asked, a_step);
            self.asked += a_step;
            return;
        }
        self.due += a_step;
        while self.due >= n_blocks * Self::LINE {
            self.due -= n_blocks * Self::LINE;
            prefetch_near(self.values, self.asked, Self::LINE);
            self.asked += Self::LINE;
        }
    }
}

/// Weights that are pairs as they lie, brought from memory.
struct Packed<'a> {
    words: &'a [u32],
    ahead: Ahead<'a, u32>,
}

impl<'a> Packed<'a> {
    fn new(words: &'a [u32]) -> Self {
        let ahead = Ahead::new(words);
        Self { words, ahead }
    }
}

impl Steps for Packed<'_> {
    const RUN: usize = 9;

    fn begin(&mut self) {
        self.ahead.begin(STEP_WORDS);
    }

    #[inline(always)]
    fn bring(&mut self, _: usize, n_blocks: usize) {
        self.ahead.ask(STEP_WORDS, n_blocks);
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
    /// Steps numbered through all of the weights' tiles: the task's first, the next to be unpacked, and
    /// that behind the last.
    first: usize,
    next: usize,
    end: usize,
    ahead: Ahead<'a, u8>,
}

impl<'a, W: Tiles> Unpacked<'a, W> {
    /// Steps by which unpacking is ahead: what is unpacked during a step's products is out of the store
    /// buffer when it is loaded, and still in the cache.
    const AHEAD: usize = RING_STEPS - Self::RUN;

    fn new(
        weights: &'a W,
        path: CpuPath,
        steps: Range<usize>,
        ring: &'a mut [u32; RING_STEPS * STEP_WORDS],
    ) -> Self {
        let (packed, a_step) = weights.packed_blocks();
        Self {
            weights,
            path,
            ring,
            first: steps.start,
            next: steps.start,
            end: steps.end,
            ahead: Ahead::new(&packed[steps.start * a_step..steps.end * a_step]),
        }
    }

    #[inline(always)]
    fn unpack_next(&mut self) {
        if self.next < self.end {
            let at = (self.next - self.first) % RING_STEPS * STEP_WORDS;
            let to = self.ring[at..].first_chunk_mut();
            let to = to.expect("the ring is whole steps");
            self.weights.unpack_block(self.path, self.next, to);
            self.next += 1;
        }
    }
}

impl<W: Tiles> Steps for Unpacked<'_, W> {
    const RUN: usize = 6;

    fn begin(&mut self) {
        self.ahead.begin(self.weights.packed_blocks().1);
        (0..Self::AHEAD).for_each(|_| self.unpack_next());
    }

    /// All is unpacked by the first block, since the others need it at once.
    #[inline(always)]
    fn bring(&mut self, block: usize, n_blocks: usize) {
        self.ahead.ask(self.weights.packed_blocks().1, n_blocks);
        if block == 0 {
            self.unpack_next();
        }
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

/// Sums that a task works in: of a group of rows with a tile.
pub const SUMS: usize = GROUP_ROWS * LANES;

impl Rows<'_> {
    /// Multiplies all rows with `n_tiles` tiles and hands the sums of each to `finish`. While steps are
    /// multiplied, those a little further on are brought: memory and what unpacks work beside the unit.
    fn multiply<U: TileUnit, S: Steps>(
        &self,
        unit: &U,
        mut steps: S,
        n_tiles: usize,
        sums: &mut [f32],
        mut finish: impl FnMut(usize, &mut [[f32; LANES]]),
    ) {
        let (sums, _) = sums.as_chunks_mut::<LANES>();
        steps.begin();
        for tile in 0..n_tiles {
            if self.n <= BLOCK_ROWS {
                self.multiply_block(unit, &mut steps, tile, sums);
            } else {
                self.multiply_blocks(unit, &mut steps, tile, sums);
            }
            finish(tile, &mut sums[..self.n]);
        }
    }

    /// One block with a tile: its sums stay where they are through all steps.
    #[inline(always)]
    fn multiply_block<U: TileUnit, S: Steps>(
        &self,
        unit: &U,
        steps: &mut S,
        tile: usize,
        sums: &mut [[f32; LANES]],
    ) {
        unit.clear();
        let a_step = self.n * STEP_PAIRS;
        let rows = self.blocks.chunks_exact(a_step).take(self.n_steps);
        for (step, rows) in rows.enumerate() {
            steps.bring(0, 1);
            if tile == 0 {
                ask_ahead(rows, 0, a_step);
            }
            unit.step(rows, steps.pairs(tile * self.n_steps + step));
        }
        unit.store(sums);
    }

    /// Several blocks with a tile. Its steps are taken in runs, each by all blocks.
    #[inline(always)]
    fn multiply_blocks<U: TileUnit, S: Steps>(
        &self,
        unit: &U,
        steps: &mut S,
        tile: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let block_rows = block_rows(self.n);
        let n_blocks = self.n.div_ceil(block_rows);
        let n_runs = self.n_steps.div_ceil(S::RUN);
        for run in 0..n_runs {
            let of_run = run * self.n_steps / n_runs..(run + 1) * self.n_steps / n_runs;
            for block in 0..n_blocks {
                let first = block * block_rows;
                let of_block = &mut sums[first..];
                let blocks = &self.blocks[first * self.n_steps * STEP_PAIRS..];
                let a_step = block_rows.min(self.n - first) * STEP_PAIRS;
                match run {
                    0 => unit.clear(),
                    _ => unit.load(of_block),
                }
                for step in of_run.clone() {
                    steps.bring(block, n_blocks);
                    if tile == 0 {
                        ask_ahead(blocks, step * a_step, a_step);
                    }
                    let rows = &blocks[step * a_step..];
                    let pairs = steps.pairs(tile * self.n_steps + step);
                    match S::ROWS_PASS {
                        true => unit.step_passing(rows, pairs),
                        false => unit.step(rows, pairs),
                    }
                }
                unit.store(of_block);
            }
        }
    }
}

/// Asks for a block's rows of a later step. For a task's first tile: another core may have written them.
#[inline(always)]
fn ask_ahead(rows: &[u32], start: usize, a_step: usize) {
    const AHEAD: usize = 4;
    prefetch(rows, start + AHEAD * a_step, a_step);
}

/// Steps of 12 KiB of pairs.
const HELD_STEPS: usize = 6;

/// One run's steps, over and over, in the cache.
struct Held<'a>(&'a [[u32; STEP_WORDS]; HELD_STEPS]);

impl Steps for Held<'_> {
    const RUN: usize = HELD_STEPS;
    const ROWS_PASS: bool = false;

    fn begin(&mut self) {}

    fn bring(&mut self, _: usize, _: usize) {}

    #[inline(always)]
    fn pairs(&self, step: usize) -> &[u32; STEP_WORDS] {
        &self.0[step % HELD_STEPS]
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
    let pairs = Lines([[0x3F00_3F00; STEP_WORDS]; HELD_STEPS]);
    let blocks = Lines([0x3F00_3F00; HELD_STEPS * STEP_PAIRS * N_ROWS]);
    let mut sums = Lines([0.0; SUMS]);
    let unit = unit::Hardware::set(BLOCK_ROWS);
    let rows = Rows {
        blocks: &blocks.0,
        n: N_ROWS,
        n_steps: HELD_STEPS,
    };
    for _ in 0..n_rounds {
        let held = Held(black_box(&pairs.0));
        rows.multiply(&unit, held, N_TILES, &mut sums.0, |_, sums| {
            black_box(sums);
        });
    }
    n_rounds * N_ROWS * N_TILES * LANES * HELD_STEPS * STEP_K
}
