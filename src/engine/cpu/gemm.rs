//! The driver of all matrix products: which tile meets which rows, in which scratch.
//!
//! A task takes some tiles of 32 outputs. For each group of [`GROUP_ROWS`] rows it walks its
//! tiles, unpacks [`CHUNK_K`] steps of a tile once, and continues the chains of all rows of the
//! group over them. The split into tasks, groups and chunks never changes a chain.

use std::sync::Mutex;

use super::buffer::Buffer;
use super::calls::Calls;
use super::lanes::{LANES, fma_chain};
use super::path::CpuPath;
use super::weights::{CHUNK_K, Tiles};
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
}

/// What one task works in.
pub struct Scratch {
    /// Unpacked weights `[CHUNK_K][LANES]`.
    pub weights: Buffer<f32>,
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
            + head_dim * TILE_KEYS
            + TILE_KEYS * padded
            + 2 * MAX_QUERIES * LANES
            + MAX_QUERIES * TILE_KEYS
            + 2 * padded * MAX_QUERIES;
        (values * size_of::<f32>()) as u64
    }
}

impl Exec {
    /// Scratch for `n_threads` threads and heads of `head_dim`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(
        path: CpuPath,
        exact: bool,
        n_threads: usize,
        head_dim: usize,
    ) -> Result<Self, EngineError> {
        let scratch = (0..n_threads.max(1))
            .map(|_| Scratch::zeroed(head_dim).map(Mutex::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            path,
            exact,
            calls: Calls::default(),
            scratch,
        })
    }

    /// Bytes held by all threads' scratch.
    pub fn n_bytes(&self) -> u64 {
        let of_thread = |scratch: &Mutex<Scratch>| {
            scratch
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .n_bytes()
        };
        self.scratch.iter().map(of_thread).sum()
    }

    /// Runs `task` with the calling thread's scratch. The task must not start parallel work.
    pub fn with_scratch<R>(&self, task: impl FnOnce(&mut Scratch) -> R) -> R {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.scratch.len();
        // A panic elsewhere leaves only scratch behind, which each task overwrites.
        let mut scratch = self.scratch[thread]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        task(&mut scratch)
    }
}

/// Multiplies tiles with rows and hands finished rows of 32 lanes to `finish(tile, first row,
/// rows)`; the row at index `i` is `x[row_start(i)..][..n_k]`.
pub fn multiply<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: std::ops::Range<usize>,
    x: &[f32],
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
                *start = row_start(group + i);
            }
            for tile in tiles.clone() {
                let acc = &mut acc[..n];
                acc.fill([0.0; LANES]);
                for k in (0..n_k).step_by(CHUNK_K) {
                    let n_k = CHUNK_K.min(n_k - k);
                    weights.unpack(exec.path, tile, k, n_k, &mut scratch.weights);
                    let w = &scratch.weights[..n_k * LANES];
                    fma_chain(exec.path, acc, w, LANES, &x[k..], &starts[..n], n_k);
                }
                finish(tile, group, acc);
            }
        }
    });
}

/// Tiles of one task: enough products to be worth a task, few enough for all threads to work.
pub fn tiles_a_task(n_tiles: usize, n_rows: usize, n_k: usize) -> usize {
    /// Products that take some ten microseconds.
    const WORTH: usize = 1 << 20;
    let worth = WORTH.div_ceil((n_rows * n_k * LANES).max(1));
    let for_all_threads = n_tiles / (4 * rayon::current_num_threads()).max(1);
    // More tiles a task let a group of rows stay in the second-level cache.
    worth.clamp(1, 8).max(for_all_threads.min(8)).max(1)
}
