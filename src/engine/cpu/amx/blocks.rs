//! Rows in blocks: where the values of a set's rows lie for products of tiles, and what writes them there.

use std::ops::Range;

use super::super::buffer::Disjoint;
use super::super::gemm::RowSets;
use super::super::lanes::for_each;
use super::super::path::{CpuPath, on_each_path};
use super::{BLOCK_ROWS, STEP_K, STEP_PAIRS};

/// Rows of a group, at most: as many as weights are read once for.
pub const GROUP_ROWS: usize = 256;

/// Rows of each group of a set: as many in all but the last. A group stays in the second-level cache while tiles
/// of weights pass by, so that each comes from memory once for all of its rows, and the rows once for all tiles
/// of a task.
#[inline]
pub fn group_rows(n_rows: usize, n_k: usize) -> usize {
    /// Bytes of it: where there is AMX the cache has 2 MiB.
    const ROOM: usize = 3 << 19;
    let most = (ROOM / (2 * n_k)).clamp(BLOCK_ROWS, GROUP_ROWS) / BLOCK_ROWS * BLOCK_ROWS;
    let a_group = n_rows.div_ceil(n_rows.div_ceil(most).max(1));
    a_group.next_multiple_of(BLOCK_ROWS).max(BLOCK_ROWS)
}

/// Rows of each block of a group: as many in all but the last, of which as many are read.
#[inline]
pub fn block_rows(n_rows: usize) -> usize {
    n_rows.div_ceil(n_rows.div_ceil(BLOCK_ROWS))
}

/// Writes rows of bf16 values as the blocks that [`multiply`](super::multiply) takes: those of a set, wherever in `x`
/// they are, one behind the other.
pub fn join(path: CpuPath, x: &[f32], rows: &RowSets, blocks: &mut [u32]) {
    each_part(rows, blocks, |numbers, steps, block| {
        let mut starts = [0; BLOCK_ROWS];
        for (start, row) in starts.iter_mut().zip(numbers.clone()) {
            *start = (rows.start)(row) + steps.start * STEP_K;
        }
        join_steps(path, x, &starts[..numbers.len()], block);
    });
}

/// Runs `part(rows, steps, words)` in parallel for the parts of all sets' blocks: some steps of a block's rows,
/// which are numbered through all sets.
fn each_part(
    rows: &RowSets,
    blocks: &mut [u32],
    part: impl Fn(Range<usize>, Range<usize>, &mut [u32]) + Sync + Send,
) {
    /// Steps of a task.
    const PART: usize = 16;
    /// Values too few to be worth tasks.
    const FEW: usize = 1 << 15;
    let n_k = rows.n_k;
    let n_steps = n_k / STEP_K;
    // Those of all rows in one set: no set has more.
    let n_groups = rows.n_rows().div_ceil(group_rows(rows.n_rows(), n_k));
    let n_parts = n_steps.div_ceil(PART);
    let n_tasks = rows.n_sets() * n_groups * n_parts;
    let blocks = Disjoint::new(blocks);
    let one_by_one = if rows.n_rows() * n_k <= FEW {
        n_tasks
    } else {
        1
    };
    for_each(n_tasks, one_by_one, |task| {
        let (set, steps) = (task / n_parts / n_groups, task % n_parts * PART);
        let set = rows.of_set(set);
        let a_group = group_rows(set.len(), n_k);
        let group = set.start + task / n_parts % n_groups * a_group;
        if group >= set.end {
            return;
        }
        let end = set.end.min(group + a_group);
        let steps = steps..n_steps.min(steps + PART);
        let a_block = block_rows(end - group);
        for first in (group..end).step_by(a_block) {
            let numbers = first..end.min(first + a_block);
            let n = numbers.len();
            let start = first * n_k / 2 + steps.start * STEP_PAIRS * n;
            // SAFETY: each part of a block of a set is written by one task.
            #[allow(unsafe_code, reason = "parts are disjoint")]
            let words = unsafe { blocks.slice_mut(start, steps.len() * STEP_PAIRS * n) };
            part(numbers, steps.clone(), words);
        }
    });
}

/// The word where the values from `k` on of a block's first row lie, of `n_rows` rows from row `first` of all sets
/// on; those of each other row lie [`STEP_PAIRS`] words behind.
#[inline(always)]
pub fn start_of(first: usize, n_rows: usize, n_k: usize, k: usize) -> usize {
    first * n_k / 2 + k / STEP_K * n_rows * STEP_PAIRS + k % STEP_K / 2
}

/// Where a row lies in the blocks of a set.
#[derive(Clone, Copy, Default)]
pub struct Place {
    /// Word of its first step.
    pub start: usize,
    /// Words from a step to the next.
    pub a_step: usize,
}

impl Place {
    /// Of a row of a set of `n_rows` rows of `n_k` values, whose blocks begin at word 0.
    #[inline(always)]
    pub fn of(row: usize, n_rows: usize, n_k: usize) -> Self {
        let a_group = group_rows(n_rows, n_k);
        let group = row / a_group * a_group;
        let of_group = a_group.min(n_rows - group);
        let a_block = block_rows(of_group);
        let block = (row - group) / a_block * a_block;
        let n = a_block.min(of_group - block);
        Self {
            start: (group + block) * n_k / 2 + (row - group - block) * STEP_PAIRS,
            a_step: n * STEP_PAIRS,
        }
    }
}

/// As [`join`], of rows that lie in the blocks of one set of `n_rows` rows.
pub fn gather(path: CpuPath, x: &[u32], n_rows: usize, rows: &RowSets, blocks: &mut [u32]) {
    let n_k = rows.n_k;
    each_part(rows, blocks, |numbers, steps, block| {
        let mut places = [Place::default(); BLOCK_ROWS];
        for (place, row) in places.iter_mut().zip(numbers.clone()) {
            *place = Place::of((rows.start)(row) / n_k, n_rows, n_k);
            place.start += steps.start * place.a_step;
        }
        gather_steps(path, x, &places[..numbers.len()], block);
    });
}

on_each_path! {
    fn gather_steps(x: &[u32], places: &[Place], blocks: &mut [u32]) = gather_steps_body
}

#[inline(always)]
fn gather_steps_body(x: &[u32], places: &[Place], blocks: &mut [u32]) {
    let (blocks, _) = blocks.as_chunks_mut::<STEP_PAIRS>();
    for (step, blocks) in blocks.chunks_exact_mut(places.len()).enumerate() {
        for (i, row) in blocks.iter_mut().enumerate() {
            let at = step.wrapping_mul(places[i].a_step);
            let start = places[i].start.wrapping_add(at);
            *row = *x[start..].first_chunk().expect("whole steps");
        }
    }
}

on_each_path! {
    pub fn join_steps(x: &[f32], starts: &[usize], blocks: &mut [u32]) = join_steps_body
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
