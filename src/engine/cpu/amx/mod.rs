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
//!          one behind the other, and behind it the next step's (see `blocks`)
//! weights  [k / 2][32 lanes] pairs: a B is 16 rows of 64 bytes, 128 bytes apart
//! sums     [rows][32 lanes]: as well
//! ```

mod blocks;
mod held;
mod rate;
mod steps;
mod unit;

#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::gemm::{Exec, Output, Scratch};
use super::lanes::LANES;
use super::path::CpuPath;
use super::weights::{PARTS, Tiles, prefetch, prefetch_near};
use blocks::{GROUP_ROWS, block_rows};
use steps::{LINE_WORDS, Packed, Steps, Unpacked};
use unit::TileUnit;

pub use blocks::{Place, gather, group_rows, join, start_of};
pub use held::{HeldUnit, join_rows, multiply_held, pair_rows, takes_heads};
pub use rate::multiply_from_cache;
pub use unit::is_available;

/// k of one instruction.
const STEP_K: usize = 32;

/// Pairs of a row in an A: 64 bytes.
pub const STEP_PAIRS: usize = STEP_K / 2;

/// Rows of an A.
const BLOCK_ROWS: usize = 16;

/// Words of a step of a tile of weights.
const STEP_WORDS: usize = STEP_PAIRS * LANES;

/// Words that may be read behind the last row: where there are several blocks, as many rows are read of the
/// last as of the others.
pub const SLACK: usize = (BLOCK_ROWS - 1) * STEP_PAIRS;

/// Multiplies tiles with the rows of a set; as [`multiply`](super::gemm::multiply), on blocks that
/// [`join`] wrote, with [`SLACK`] words behind them. Those of the `next` set are on their way when it is done.
///
/// # Panics
/// When the path is another.
pub fn multiply<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    blocks: &[u32],
    rows: Range<usize>,
    next: Range<usize>,
    output: impl Output,
) {
    let path = exec.path;
    assert!(path.has_tiles(), "products of tiles");
    let product = Product {
        path,
        weights,
        tiles,
        blocks,
        rows,
        next,
    };
    exec.with_scratch(|scratch| {
        #[cfg(test)]
        if !is_available() {
            return product.multiply_by::<emulated::Emulated, false>(scratch, output);
        }
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        unsafe {
            product.multiply(scratch, output);
        }
    });
}

/// Some tiles times the rows of a set.
struct Product<'a, W> {
    path: CpuPath,
    weights: &'a W,
    tiles: Range<usize>,
    blocks: &'a [u32],
    rows: Range<usize>,
    /// Rows of the next set.
    next: Range<usize>,
}

impl<W: Tiles> Product<'_, W> {
    /// By the CPU's unit, with the loops compiled for what comes with it.
    ///
    /// # Safety
    /// The CPU has all of [`Kind::Avx512Bf16`](super::path::Kind::Avx512Bf16), and the unit.
    #[cfg_attr(
        target_arch = "x86_64",
        target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")
    )]
    #[allow(unsafe_code, reason = "features were detected")]
    unsafe fn multiply(&self, scratch: &mut Scratch, output: impl Output) {
        self.multiply_by::<unit::Hardware, true>(scratch, output);
    }

    /// `HERE`: as part of [`Product::multiply`].
    #[inline(always)]
    fn multiply_by<U: TileUnit, const HERE: bool>(
        &self,
        scratch: &mut Scratch,
        mut output: impl Output,
    ) {
        let (weights, tiles) = (self.weights, &self.tiles);
        let n_steps = weights.n_k() / STEP_K;
        let a_group = |rows: &Range<usize>| group_rows(rows.len(), weights.n_k());
        for group in (0..self.rows.len()).step_by(a_group(&self.rows)) {
            let n = a_group(&self.rows).min(self.rows.len() - group);
            let of_rows = |row: usize| row * n_steps * STEP_PAIRS;
            let next = match group + n == self.rows.len() {
                true => self.next.start..self.next.end.min(self.next.start + a_group(&self.next)),
                false => 0..0,
            };
            let rows = Rows {
                blocks: &self.blocks[of_rows(self.rows.start + group)..],
                next: &self.blocks[of_rows(next.start)..of_rows(next.end)],
                n,
                n_steps,
            };
            let unit = U::set(block_rows(n));
            let sums = &mut scratch.sums;
            match weights.packed_pairs(tiles.start) {
                Some((words, a_tile)) => {
                    let packed = Packed::new(&words[..tiles.len() * a_tile]);
                    rows.multiply(&unit, packed, tiles, sums, group, &mut output);
                }
                None => {
                    let steps = tiles.start * n_steps..tiles.end * n_steps;
                    let ring = scratch.pairs.as_chunks_mut().0;
                    let ring = ring.first_chunk_mut().expect("as many words");
                    let unpacked = Unpacked::<W, HERE>::new(weights, self.path, steps, ring);
                    rows.multiply(&unit, unpacked, tiles, sums, group, &mut output);
                }
            }
        }
    }
}

/// A group of rows.
struct Rows<'a> {
    /// `[block][n_steps][rows of the block][STEP_PAIRS]`, and more.
    blocks: &'a [u32],
    /// The same of the next set's first group, where this is the last one of its own: none else.
    next: &'a [u32],
    n: usize,
    n_steps: usize,
}

/// Sums that a task works in: of a group of rows with a tile.
pub const SUMS: usize = GROUP_ROWS * LANES;

impl Rows<'_> {
    /// Multiplies all rows, of the set those from `first` on, with tiles. While steps are multiplied, those a
    /// little further on are brought: memory and what unpacks work beside the unit.
    #[inline(always)]
    fn multiply<U: TileUnit, S: Steps>(
        &self,
        unit: &U,
        mut steps: S,
        tiles: &Range<usize>,
        sums: &mut [f32],
        first: usize,
        output: &mut impl Output,
    ) {
        let (sums, _) = sums.as_chunks_mut::<LANES>();
        let n_blocks = self.n.div_ceil(BLOCK_ROWS);
        let last = tiles.len().saturating_sub(self.tiles_to_ask(n_blocks));
        let mut next = self.next;
        steps.begin(n_blocks);
        for tile in 0..tiles.len() {
            let (steps, next) = (&mut steps, &mut next);
            let (number, rows) = (tiles.start + tile, first..first + self.n);
            if n_blocks == 1 {
                output.prefetch(number, rows);
                match tile {
                    0 => self.multiply_block::<U, S, OWN>(unit, steps, tile, sums),
                    _ => self.multiply_block::<U, S, NONE>(unit, steps, tile, sums),
                }
                output.take(number, first, &mut sums[..self.n]);
                continue;
            }
            let mut out = OfTile {
                output: &mut *output,
                tile: number,
                first,
                sums: &mut *sums,
            };
            let out = &mut out;
            match (tile == 0, tile >= last) {
                (true, _) => self.multiply_blocks::<U, S, OWN>(unit, steps, tile, next, out),
                (_, false) => self.multiply_blocks::<U, S, NONE>(unit, steps, tile, next, out),
                (_, true) => self.multiply_blocks::<U, S, NEXT>(unit, steps, tile, next, out),
            }
        }
    }

    /// The last tiles of a task, during whose products the next rows can be asked for.
    fn tiles_to_ask(&self, n_blocks: usize) -> usize {
        let n_lines = self.next.len().div_ceil(LINE_WORDS);
        n_lines.div_ceil(n_blocks * self.n_steps * NEXT_LINES)
    }

    /// One block with a tile: its sums stay where they are through all steps.
    #[inline(always)]
    fn multiply_block<U: TileUnit, S: Steps, const ASKS: usize>(
        &self,
        unit: &U,
        steps: &mut S,
        tile: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let block = Block {
            turn: 0,
            rows: self.blocks,
            a_step: self.n * STEP_PAIRS,
            first_step: tile * self.n_steps,
            n_steps: self.n_steps,
        };
        unit.clear();
        block.multiply::<U, S, true, true, ASKS>(unit, steps, &mut &[][..]);
        unit.store(sums);
    }

    /// Several blocks with a tile. Its steps are taken in runs, each by all blocks: in turn from the first to the
    /// last and back, so that the sums of the one a run ends with stay where they are for the next.
    ///
    /// A block's sums are taken when the next block's products are under way: the one is for the unit, the other
    /// for the ports of registers.
    #[inline(always)]
    fn multiply_blocks<U: TileUnit, S: Steps, const ASKS: usize>(
        &self,
        unit: &U,
        steps: &mut S,
        tile: usize,
        next: &mut &[u32],
        out: &mut OfTile<impl Output>,
    ) {
        let a_block = block_rows(self.n);
        let n_blocks = self.n.div_ceil(a_block);
        let n_runs = self.n_steps.div_ceil(S::RUN);
        let step_of = |run| run * self.n_steps / n_runs;
        for run in 0..n_runs {
            let of_run = step_of(run)..step_of(run + 1);
            let is_last = run + 1 == n_runs;
            let rows_of = |turn: usize| {
                let block = match run % 2 {
                    0 => turn,
                    _ => n_blocks - 1 - turn,
                };
                block * a_block..self.n.min((block + 1) * a_block)
            };
            for turn in 0..n_blocks + usize::from(is_last) {
                if turn < n_blocks {
                    let rows = rows_of(turn);
                    let a_step = rows.len() * STEP_PAIRS;
                    let start = rows.start * self.n_steps * STEP_PAIRS + of_run.start * a_step;
                    let block = Block {
                        turn,
                        rows: &self.blocks[start..],
                        a_step,
                        first_step: tile * self.n_steps + of_run.start,
                        n_steps: of_run.len(),
                    };
                    match (run, turn) {
                        (0, _) => {
                            unit.clear();
                            out.prefetch(rows.clone());
                        }
                        (_, 0) => {}
                        _ => unit.load(&out.sums[rows.start..]),
                    }
                    match turn {
                        0 => block.multiply::<U, S, true, false, ASKS>(unit, steps, next),
                        _ => block.multiply::<U, S, false, false, ASKS>(unit, steps, next),
                    }
                    if turn + 1 < n_blocks || is_last {
                        unit.store(&mut out.sums[rows.start..]);
                    }
                }
                if is_last && turn > 0 {
                    out.take(rows_of(turn - 1));
                }
            }
        }
    }
}

/// Where the sums of a tile go, block by block.
struct OfTile<'a, O> {
    output: &'a mut O,
    tile: usize,
    /// The group's first row.
    first: usize,
    /// Those of the group.
    sums: &'a mut [[f32; LANES]],
}

impl<O: Output> OfTile<'_, O> {
    #[inline(always)]
    fn prefetch(&self, rows: Range<usize>) {
        let rows = self.first + rows.start..self.first + rows.end;
        self.output.prefetch(self.tile, rows);
    }

    #[inline(always)]
    fn take(&mut self, rows: Range<usize>) {
        let first = self.first + rows.start;
        self.output.take(self.tile, first, &mut self.sums[rows]);
    }
}

/// Some steps of a block.
struct Block<'a> {
    /// The number of blocks that took these steps before.
    turn: usize,
    /// From the first step on.
    rows: &'a [u32],
    /// Words of a step.
    a_step: usize,
    first_step: usize,
    n_steps: usize,
}

impl Block<'_> {
    #[inline(always)]
    fn multiply<U: TileUnit, S: Steps, const FIRST: bool, const ONLY: bool, const ASKS: usize>(
        &self,
        unit: &U,
        steps: &mut S,
        next: &mut &[u32],
    ) {
        const HALF: usize = PARTS / 2;
        let (mut start, mut at) = (0usize, self.first_step);
        for _ in 0..self.n_steps {
            let rows = &self.rows[start..];
            match ASKS {
                OWN => ask_ahead(rows, self.a_step),
                NEXT => ask_next(next),
                _ => {}
            }
            steps.step::<FIRST, ONLY>(at, self.turn, |pairs, part| match part {
                0 => {
                    match S::ROWS_PASS && !ONLY {
                        true => unit.take_rows::<true>(rows),
                        false => unit.take_rows::<false>(rows),
                    }
                    unit.take_pairs::<0>(pairs);
                }
                HALF => {
                    unit.multiply::<0>();
                    unit.take_pairs::<1>(pairs);
                }
                PARTS => unit.multiply::<1>(),
                _ => {}
            });
            start = start.wrapping_add(self.a_step);
            at = at.wrapping_add(1);
        }
    }
}

/// What rows are asked for during a tile's products, beside its weights.
const NONE: usize = 0;
/// The block's own, by a task's first tile: they may be another core's, or memory's.
const OWN: usize = 1;
/// Those of the next set, by a task's last tiles.
const NEXT: usize = 2;

/// Lines of the next rows that are asked for in a step: few, since what waits for memory also waits for them.
const NEXT_LINES: usize = 2;

/// Asks for a little more of the next rows, to the second-level cache.
#[inline(always)]
fn ask_next(next: &mut &[u32]) {
    let n = next.len().min(NEXT_LINES * LINE_WORDS);
    if n > 0 {
        prefetch_near(next, 0, NEXT_LINES * LINE_WORDS);
        *next = &next[n..];
    }
}

/// Asks for a block's rows of a later step.
#[inline(always)]
fn ask_ahead(rows: &[u32], a_step: usize) {
    const AHEAD: usize = 4;
    prefetch(rows, a_step.wrapping_mul(AHEAD), a_step);
}
