//! The driver of all matrix products: which tile meets which rows, in which scratch.
//!
//! A task takes some tiles of 32 outputs. For each group of [`GROUP_ROWS`] rows it walks its
//! tiles, unpacks [`CHUNK_K`] steps of a tile once, and continues the chains of all rows of the
//! group over them. The split into tasks, groups and chunks never changes a chain.
//!
//! Where the CPU multiplies pairs of bf16, weights are unpacked to those and the rows, which are
//! bf16 values already, are joined to pairs once for all tasks ([`Exec::with_inputs`]).

use std::sync::{Mutex, PoisonError};

use super::buffer::{Buffer, Disjoint};
use super::calls::Calls;
use super::lanes::{LANES, fma_chain_in_pairs, for_each};
use super::pairs::{MOST_JOINT, joint_tiles, pair_chain, to_pairs};
use super::path::{CpuPath, Kind};
use super::weights::{CHUNK_K, FUSED_ROWS, Tiles};
use crate::engine::EngineError;
use crate::engine::TILE_KEYS;

/// Rows that share one unpacking; their accumulators take 12 KiB.
pub const GROUP_ROWS: usize = 96;

/// Queries (rows x heads) that an attention task carries at once.
pub const MAX_QUERIES: usize = 64;

/// How kernels run: the SIMD path, the rounding, and each thread's scratch.
pub struct Exec {
    pub path: CpuPath,
    /// No rounding to bf16 anywhere.
    pub exact: bool,
    /// Products done, by operation and weight format.
    pub calls: Calls,
    scratch: Vec<Mutex<Scratch>>,
    /// The rows of a product as pairs of bf16.
    pairs: Mutex<Buffer<u32>>,
}

/// Rows of a product.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    Values(&'a [f32]),
    /// Two bf16 a word, the first in the low half.
    Pairs(&'a [u32]),
}

/// What one task works in.
pub struct Scratch {
    /// Unpacked weights `[CHUNK_K][LANES]`.
    pub weights: Buffer<f32>,
    /// The same of some tiles as pairs `[MOST_JOINT][CHUNK_K / 2][LANES]`.
    pub pairs: Buffer<u32>,
    pub attention: AttentionScratch,
}

/// What one attention task works in, for up to [`MAX_QUERIES`] queries.
pub struct AttentionScratch {
    /// `[head_dim][TILE_KEYS]`, unpacked.
    pub keys: Buffer<f32>,
    /// `[TILE_KEYS][padded_head_dim]`, unpacked.
    pub values: Buffer<f32>,
    /// Scores `[2][MAX_QUERIES][LANES]`.
    pub scores: Buffer<f32>,
    /// Probabilities `[MAX_QUERIES][TILE_KEYS]`.
    pub probabilities: Buffer<f32>,
    /// Outputs of the present split `[padded_head_dim / LANES][MAX_QUERIES][LANES]`.
    pub split: Buffer<f32>,
    /// Outputs folded so far, of the same shape.
    pub folded: Buffer<f32>,
}

/// `head_dim` rounded up to whole lanes: the row length of a V tile.
pub const fn padded_head_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

impl Scratch {
    fn zeroed(head_dim: usize) -> Result<Self, EngineError> {
        let what = "a thread's scratch";
        let padded = padded_head_dim(head_dim);
        Ok(Self {
            weights: Buffer::zeroed(what, CHUNK_K * LANES)?,
            pairs: Buffer::zeroed(what, MOST_JOINT * CHUNK_K / 2 * LANES)?,
            attention: AttentionScratch {
                keys: Buffer::zeroed(what, head_dim * TILE_KEYS)?,
                values: Buffer::zeroed(what, TILE_KEYS * padded)?,
                scores: Buffer::zeroed(what, 2 * MAX_QUERIES * LANES)?,
                probabilities: Buffer::zeroed(what, MAX_QUERIES * TILE_KEYS)?,
                split: Buffer::zeroed(what, padded * MAX_QUERIES)?,
                folded: Buffer::zeroed(what, padded * MAX_QUERIES)?,
            },
        })
    }

    fn n_bytes(&self) -> u64 {
        let attention = &self.attention;
        self.weights.n_bytes()
            + self.pairs.n_bytes()
            + attention.keys.n_bytes()
            + attention.values.n_bytes()
            + attention.scores.n_bytes()
            + attention.probabilities.n_bytes()
            + attention.split.n_bytes()
            + attention.folded.n_bytes()
    }

    /// Bytes of one thread's scratch, as planned.
    pub const fn planned_bytes(head_dim: usize) -> u64 {
        let padded = padded_head_dim(head_dim);
        let values = CHUNK_K * LANES
            + MOST_JOINT * CHUNK_K / 2 * LANES
            + head_dim * TILE_KEYS
            + TILE_KEYS * padded
            + 2 * MAX_QUERIES * LANES
            + MAX_QUERIES * TILE_KEYS
            + 2 * padded * MAX_QUERIES;
        (values * size_of::<f32>()) as u64
    }
}

/// Whether products are of bf16 pairs.
pub fn takes_pairs(path: CpuPath, exact: bool) -> bool {
    path.kind() == Kind::Avx512Bf16 && !exact
}

impl Exec {
    /// Scratch for `n_threads` threads and heads of `head_dim`, and room for rows of `n_inputs`
    /// values together.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(
        path: CpuPath,
        exact: bool,
        n_threads: usize,
        head_dim: usize,
        n_inputs: usize,
    ) -> Result<Self, EngineError> {
        let scratch = (0..n_threads.max(1))
            .map(|_| Scratch::zeroed(head_dim).map(Mutex::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            path,
            exact,
            calls: Calls::default(),
            scratch,
            pairs: Mutex::new(Buffer::zeroed("inputs", n_inputs.div_ceil(2))?),
        })
    }

    /// Bytes held by all threads' scratch and for inputs.
    pub fn n_bytes(&self) -> u64 {
        let of_thread = |scratch: &Mutex<Scratch>| {
            scratch
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .n_bytes()
        };
        let inputs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        self.scratch.iter().map(of_thread).sum::<u64>() + inputs.n_bytes()
    }

    /// Bytes of the room for inputs, as planned.
    pub const fn planned_input_bytes(n_inputs: usize) -> u64 {
        (n_inputs.div_ceil(2) * size_of::<u32>()) as u64
    }

    /// Runs a product on rows, in the form that the path multiplies.
    pub fn with_inputs<R>(&self, x: &[f32], product: impl FnOnce(Inputs) -> R) -> R {
        /// Values that are joined by one task.
        const CHUNK: usize = 1 << 14;
        if !takes_pairs(self.path, self.exact) {
            return product(Inputs::Values(x));
        }
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = &mut pairs[..x.len() / 2];
        let parts = Disjoint::new(pairs);
        for_each(x.len().div_ceil(CHUNK), 4, |part| {
            let x = &x[part * CHUNK..x.len().min((part + 1) * CHUNK)];
            // SAFETY: each part is written by one task.
            #[allow(unsafe_code, reason = "parts are disjoint")]
            let pairs = unsafe { parts.slice_mut(part * CHUNK / 2, x.len() / 2) };
            to_pairs(self.path, x, pairs);
        });
        product(Inputs::Pairs(pairs))
    }

    /// Runs `task` with the calling thread's scratch. The task must not start parallel work.
    pub fn with_scratch<R>(&self, task: impl FnOnce(&mut Scratch) -> R) -> R {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.scratch.len();
        // A panic elsewhere leaves only scratch behind, which each task overwrites.
        let mut scratch = self.scratch[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        task(&mut scratch)
    }
}

/// Multiplies tiles with rows and hands finished rows of 32 lanes to `finish(tile, first row,
/// rows)`; the row at index `i` is the `n_k` values of `x` from `row_start(i)` on.
pub fn multiply<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: std::ops::Range<usize>,
    x: Inputs,
    n_rows: usize,
    row_start: impl Fn(usize) -> usize,
    mut finish: impl FnMut(usize, usize, &mut [[f32; LANES]]),
) {
    let n_k = weights.n_k();
    exec.with_scratch(|scratch| {
        let mut acc = [[0.0; LANES]; GROUP_ROWS];
        let mut starts = [0; GROUP_ROWS];
        for group in (0..n_rows).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(n_rows - group);
            for (i, start) in starts[..n].iter_mut().enumerate() {
                *start = match x {
                    Inputs::Values(_) => row_start(group + i),
                    Inputs::Pairs(_) => row_start(group + i) / 2,
                };
            }
            let starts = &starts[..n];
            let joint = match x {
                Inputs::Values(_) => 1,
                Inputs::Pairs(_) => joint_tiles(n),
            };
            if let Inputs::Pairs(x) = x
                && n <= FUSED_ROWS
                && fused(
                    exec,
                    weights,
                    tiles.clone(),
                    &mut acc[..n],
                    x,
                    starts,
                    |tile, acc| {
                        finish(tile, group, acc);
                    },
                )
            {
                continue;
            }
            for first in tiles.clone().step_by(joint) {
                let n_tiles = joint.min(tiles.end - first);
                let acc = &mut acc[..n_tiles * n];
                acc.fill([0.0; LANES]);
                let packed = weights.packed_pairs(first);
                // Few rows take packed pairs straight from memory.
                let a_chunk = match (x, packed) {
                    (Inputs::Pairs(_), Some(_)) if n <= FEW_ROWS => n_k,
                    _ => CHUNK_K,
                };
                for k in (0..n_k).step_by(a_chunk) {
                    let n_k = a_chunk.min(n_k - k);
                    match (x, packed) {
                        (Inputs::Values(x), _) => {
                            weights.unpack(exec.path, first, k, n_k, &mut scratch.weights);
                            let w = &scratch.weights[..n_k * LANES];
                            fma_chain_in_pairs(exec.path, acc, w, &x[k..], starts, n_k);
                        }
                        (Inputs::Pairs(x), Some((w, w_tile))) => {
                            let (w, x) = (&w[k / 2 * LANES..], &x[k / 2..]);
                            pair_chain(exec.path, acc, w, w_tile, x, starts, n_k / 2);
                        }
                        (Inputs::Pairs(x), None) => {
                            let w_tile = n_k / 2 * LANES;
                            let w = &mut scratch.pairs[..n_tiles * w_tile];
                            for (i, w) in w.chunks_exact_mut(w_tile).enumerate() {
                                weights.unpack_pairs(exec.path, first + i, k, n_k, w);
                            }
                            let x = &x[k / 2..];
                            pair_chain(exec.path, acc, w, w_tile, x, starts, n_k / 2);
                        }
                    }
                }
                for (i, acc) in acc.chunks_exact_mut(n).enumerate() {
                    finish(first + i, group, acc);
                }
            }
        }
    });
}

/// Few rows of a format that is unpacked in registers; `false` for one that is not.
fn fused<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: std::ops::Range<usize>,
    acc: &mut [[f32; LANES]],
    x: &[u32],
    starts: &[usize],
    mut finish: impl FnMut(usize, &mut [[f32; LANES]]),
) -> bool {
    for tile in tiles {
        acc.fill([0.0; LANES]);
        if !weights.fused_chain(exec.path, tile, acc, x, starts) {
            return false;
        }
        finish(tile, acc);
    }
    true
}

/// Rows whose chains lie in registers at once.
const FEW_ROWS: usize = 12;

/// Tiles of one task: enough products to be worth a task, few enough for all threads to work.
pub fn tiles_a_task(n_tiles: usize, n_rows: usize, n_k: usize) -> usize {
    /// Products that take some ten microseconds.
    const WORTH: usize = 1 << 20;
    let worth = WORTH.div_ceil((n_rows * n_k * LANES).max(1));
    let for_all_threads = n_tiles / (4 * rayon::current_num_threads()).max(1);
    // More tiles a task let a group of rows stay in the second-level cache.
    worth.clamp(1, 8).max(for_all_threads.min(8)).max(1)
}
