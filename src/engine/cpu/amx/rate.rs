//! A measure of the unit's rate: the driver on what stays in the first-level cache.

use std::hint::black_box;
use std::ops::Range;

use super::super::gemm::Output;
use super::super::lanes::LANES;
use super::super::weights::in_parts;
use super::steps::Steps;
use super::unit::{self, TileUnit};
use super::{BLOCK_ROWS, Rows, STEP_K, STEP_PAIRS, STEP_WORDS, SUMS};

/// Steps of 12 KiB of pairs.
const HELD_STEPS: usize = 6;

/// One run's steps, over and over, in the cache.
struct Held<'a>(&'a [[u32; STEP_WORDS]; HELD_STEPS]);

impl Steps for Held<'_> {
    const RUN: usize = HELD_STEPS;
    const ROWS_PASS: bool = false;

    fn begin(&mut self, _: usize) {}

    #[inline(always)]
    fn step<const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        _: usize,
        mut product: impl FnMut(&[u32; STEP_WORDS], usize),
    ) {
        let pairs = &self.0[step % HELD_STEPS];
        product(pairs, 0);
        in_parts!(part => product(pairs, part + 1));
    }
}

struct Nowhere;

impl Output for Nowhere {
    fn prefetch(&self, _: usize, _: Range<usize>) {}

    fn take(&mut self, _: usize, _: usize, sums: &mut [[f32; LANES]]) {
        black_box(sums);
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
    assert!(unit::is_available(), "no unit");
    // Pairs of 0.5 in bf16.
    let pairs = Lines([[0x3F00_3F00; STEP_WORDS]; HELD_STEPS]);
    let blocks = Lines([0x3F00_3F00; HELD_STEPS * STEP_PAIRS * N_ROWS]);
    let mut sums = Lines([0.0; SUMS]);
    let unit = unit::Hardware::set(BLOCK_ROWS);
    let rows = Rows {
        blocks: &blocks.0,
        next: &[],
        n: N_ROWS,
        n_steps: HELD_STEPS,
    };
    for _ in 0..n_rounds {
        let held = Held(black_box(&pairs.0));
        rows.multiply(&unit, held, &(0..N_TILES), &mut sums.0, 0, &mut Nowhere);
    }
    n_rounds * N_ROWS * N_TILES * LANES * HELD_STEPS * STEP_K
}
