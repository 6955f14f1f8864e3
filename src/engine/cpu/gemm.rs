//! The driver of all matrix products: which tile meets which rows, in which scratch.
//!
//! A task takes some tiles of 32 outputs. For each group of [`GROUP_ROWS`] rows it walks its
//! tiles, unpacks [`CHUNK_K`] steps of a tile once, and continues the chains of all rows of the
//! group over them. The split into tasks, groups and chunks never changes a chain.
//!
//! There are three ways of multiplying, and [`Products`] says which a path takes: f32 values here, pairs
//! of bf16 ([`super::pairs`]), and tiles of such pairs ([`super::amx`]). For the latter two, rows, which
//! are bf16 values already, are joined to pairs once for all tasks ([`Exec::with_inputs`]).

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::amx;
use super::buffer::{Buffer, Disjoint};
use super::calls::Calls;
use super::lanes::{LANES, fma_chain_in_pairs, for_each};
use super::pairs::{self, MOST_JOINT, to_pairs};
use super::path::{CpuPath, Kind};
use super::weights::{CHUNK_K, FUSED_VALUE_ROWS, Matrix, Tiles, with_tiles};
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

/// How matrix products are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Of f32 values.
    Values,
    /// Of pairs of bf16.
    Pairs,
    /// Of tiles of such pairs.
    Tiles,
}

impl Products {
    /// Of a path; an exact run's values are not bf16.
    pub fn of(path: CpuPath, exact: bool) -> Self {
        match path.kind() {
            _ if exact => Self::Values,
            _ if path.has_tiles() => Self::Tiles,
            Kind::Avx512Bf16 => Self::Pairs,
            _ => Self::Values,
        }
    }
}

/// Rows of a product, as it is done.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    Values(&'a [f32]),
    /// Two bf16 a word, the first in the low half.
    Pairs(&'a [u32]),
    /// The same in blocks of rows ([`amx::join`]).
    Blocks(&'a [u32]),
}

/// Rows as the operation before left them.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// `[row][k]`.
    Values(&'a [f32]),
    /// In the blocks of one set of so many rows ([`amx::join`]), with [`amx::SLACK`] words behind them.
    Blocks(&'a [u32], usize),
}

/// Which rows a product has: sets that meet the same weights, one behind the other.
pub struct RowSets<'a> {
    /// Values of a row.
    pub n_k: usize,
    /// The number of rows before each set, and of all.
    pub offsets: &'a [u32],
    /// Where in the input a row's values begin.
    pub start: &'a (dyn Fn(usize) -> usize + Sync),
}

impl RowSets<'_> {
    pub fn n_sets(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Rows of all sets.
    pub fn n_rows(&self) -> usize {
        self.offsets[self.n_sets()] as usize
    }

    /// The rows of a set.
    pub fn of_set(&self, set: usize) -> Range<usize> {
        self.offsets[set] as usize..self.offsets[set + 1] as usize
    }

    /// The rows of the next set that has any, or none.
    pub fn of_next(&self, set: usize) -> Range<usize> {
        let mut later = (set + 1..self.n_sets()).map(|set| self.of_set(set));
        later.find(|rows| !rows.is_empty()).unwrap_or_default()
    }
}

/// What one task works in.
pub struct Scratch {
    /// Unpacked weights `[CHUNK_K][LANES]`.
    pub weights: Buffer<f32>,
    /// The same of some tiles as pairs `[MOST_JOINT][CHUNK_K / 2][LANES]`, or of as many words.
    pub pairs: Buffer<u32>,
    /// Sums of tiles ([`amx::SUMS`]).
    pub sums: Buffer<f32>,
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
    /// Queries joined to pairs, for the tile unit.
    pub q_pairs: Buffer<u32>,
    /// Probabilities of a tile, as well.
    pub p_pairs: Buffer<u32>,
    /// Keys of a tile in pairs, and then its values.
    pub tile_pairs: Buffer<u32>,
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
            sums: Buffer::zeroed(what, amx::SUMS)?,
            attention: AttentionScratch {
                keys: Buffer::zeroed(what, head_dim * TILE_KEYS)?,
                values: Buffer::zeroed(what, TILE_KEYS * padded)?,
                scores: Buffer::zeroed(what, 2 * MAX_QUERIES * LANES)?,
                probabilities: Buffer::zeroed(what, MAX_QUERIES * TILE_KEYS)?,
                split: Buffer::zeroed(what, padded * MAX_QUERIES)?,
                folded: Buffer::zeroed(what, padded * MAX_QUERIES)?,
                q_pairs: Buffer::zeroed(what, padded / 2 * MAX_QUERIES)?,
                p_pairs: Buffer::zeroed(what, TILE_KEYS / 2 * MAX_QUERIES)?,
                tile_pairs: Buffer::zeroed(what, TILE_KEYS / 2 * padded)?,
            },
        })
    }

    fn n_bytes(&self) -> u64 {
        let attention = &self.attention;
        self.weights.n_bytes()
            + self.pairs.n_bytes()
            + self.sums.n_bytes()
            + attention.keys.n_bytes()
            + attention.values.n_bytes()
            + attention.scores.n_bytes()
            + attention.probabilities.n_bytes()
            + attention.split.n_bytes()
            + attention.folded.n_bytes()
            + attention.q_pairs.n_bytes()
            + attention.p_pairs.n_bytes()
            + attention.tile_pairs.n_bytes()
    }

    /// Bytes of one thread's scratch, as planned.
    pub const fn planned_bytes(head_dim: usize) -> u64 {
        let padded = padded_head_dim(head_dim);
        let values = CHUNK_K * LANES
            + MOST_JOINT * CHUNK_K / 2 * LANES
            + amx::SUMS
            + head_dim * TILE_KEYS
            + TILE_KEYS * padded
            + 2 * MAX_QUERIES * LANES
            + MAX_QUERIES * TILE_KEYS
            + 2 * padded * MAX_QUERIES
            + (padded + TILE_KEYS) / 2 * MAX_QUERIES
            + TILE_KEYS / 2 * padded;
        (values * size_of::<f32>()) as u64
    }
}

/// Words of the room for `n_inputs` values in pairs or blocks.
const fn input_words(n_inputs: usize) -> usize {
    n_inputs.div_ceil(2) + amx::SLACK
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
            pairs: Mutex::new(Buffer::zeroed("inputs", input_words(n_inputs))?),
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
        (input_words(n_inputs) * size_of::<u32>()) as u64
    }

    /// Whether rows are written in blocks for the products that take them.
    pub fn in_blocks(&self) -> bool {
        Products::of(self.path, self.exact) == Products::Tiles
    }

    /// Runs a product on rows of `x`, in the form that the path multiplies.
    pub fn with_inputs<R>(&self, x: Rows, rows: &RowSets, product: impl FnOnce(Inputs) -> R) -> R {
        let products = Products::of(self.path, self.exact);
        if let (Products::Values, Rows::Values(x)) = (products, x) {
            return product(Inputs::Values(x));
        }
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let x = match x {
            Rows::Values(x) => x,
            Rows::Blocks(x, n_rows) => {
                assert_eq!(products, Products::Tiles, "rows in blocks");
                amx::gather(self.path, x, n_rows, rows, &mut pairs);
                return product(Inputs::Blocks(&pairs));
            }
        };
        if products == Products::Tiles {
            amx::join(self.path, x, rows, &mut pairs);
            return product(Inputs::Blocks(&pairs));
        }
        let pairs = &mut pairs[..x.len() / 2];
        self.join(x, pairs);
        product(Inputs::Pairs(pairs))
    }

    /// Joins values to pairs, where they are.
    fn join(&self, x: &[f32], pairs: &mut [u32]) {
        /// Values that are joined by one task.
        const CHUNK: usize = 1 << 14;
        let parts = Disjoint::new(pairs);
        for_each(x.len().div_ceil(CHUNK), 4, |part| {
            let x = &x[part * CHUNK..x.len().min((part + 1) * CHUNK)];
            // SAFETY: each part is written by one task.
            #[allow(unsafe_code, reason = "parts are disjoint")]
            let pairs = unsafe { parts.slice_mut(part * CHUNK / 2, x.len() / 2) };
            to_pairs(self.path, x, pairs);
        });
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

/// Where a product's sums go.
pub trait Output {
    /// Soon there will be sums of a tile with these rows of the set: what they are written to may be brought. They
    /// are a group, or where products are of tiles a block of one; so are those that are taken.
    fn prefetch(&self, tile: usize, rows: Range<usize>);

    /// Takes the sums of a tile with the rows of the set from `first` on.
    fn take(&mut self, tile: usize, first: usize, sums: &mut [[f32; LANES]]);
}

/// Multiplies tiles with the rows of a set.
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel takes its shapes one by one"
)]
pub fn multiply(
    exec: &Exec,
    weights: &Matrix,
    tiles: Range<usize>,
    x: Inputs,
    rows: &RowSets,
    set: usize,
    output: impl Output,
) {
    let of_set = rows.of_set(set);
    let (n_rows, start) = (of_set.len(), |i| (rows.start)(of_set.start + i));
    match x {
        Inputs::Values(x) => multiply_values(exec, weights, tiles, x, n_rows, start, output),
        Inputs::Pairs(x) => {
            let start = |i| start(i) / 2;
            pairs::multiply(exec, weights, tiles, x, n_rows, start, output);
        }
        Inputs::Blocks(x) => {
            let next = rows.of_next(set);
            with_tiles!(weights, w => amx::multiply(exec, w, tiles, x, of_set, next, output));
        }
    }
}

fn multiply_values<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    x: &[f32],
    n_rows: usize,
    row_start: impl Fn(usize) -> usize,
    mut output: impl Output,
) {
    let n_k = weights.n_k();
    exec.with_scratch(|scratch| {
        let mut acc = [[0.0; LANES]; GROUP_ROWS];
        let mut starts = [0; GROUP_ROWS];
        for group in (0..n_rows).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(n_rows - group);
            let (acc, starts) = (&mut acc[..n], &mut starts[..n]);
            for (i, start) in starts.iter_mut().enumerate() {
                *start = row_start(group + i);
            }
            for tile in tiles.clone() {
                output.prefetch(tile, group..group + n);
                acc.fill([0.0; LANES]);
                if n <= FEW_ROWS && fused(exec, weights, tile, acc, x, starts) {
                    output.take(tile, group, acc);
                    continue;
                }
                for k in (0..n_k).step_by(CHUNK_K) {
                    let n_k = CHUNK_K.min(n_k - k);
                    weights.unpack(exec.path, tile, k, n_k, &mut scratch.weights);
                    let w = &scratch.weights[..n_k * LANES];
                    fma_chain_in_pairs(exec.path, acc, w, &x[k..], starts, n_k);
                }
                output.take(tile, group, acc);
            }
        }
    });
}

/// Rows for which a tile is unpacked in registers, again for every few of them.
const FEW_ROWS: usize = 12;

/// All of a tile's K for few rows, where its format is unpacked in registers; `false` where it is not.
fn fused<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tile: usize,
    acc: &mut [[f32; LANES]],
    x: &[f32],
    starts: &[usize],
) -> bool {
    /// Blocks of 32 k that stay in the first-level cache: 16 KiB of bf16.
    const BLOCKS: usize = 8;
    let n_blocks = weights.n_k() / 32;
    let n = acc.len().div_ceil(acc.len().div_ceil(FUSED_VALUE_ROWS));
    for first in (0..n_blocks).step_by(BLOCKS) {
        let blocks = first..n_blocks.min(first + BLOCKS);
        for (acc, starts) in acc.chunks_mut(n).zip(starts.chunks(n)) {
            if !weights.fused_values(exec.path, tile, blocks.clone(), acc, x, starts) {
                return false;
            }
        }
    }
    true
}

/// Tiles of one task of a product of `n_sets` sets of about `n_rows` rows, each with `n_tiles` tiles: enough
/// products to be worth a task, few enough for all threads to work. Of products of tiles, where rows are brought
/// once for all of a task's, tasks are as large as leaves `a_thread` of them to a thread.
pub fn tiles_a_task(
    exec: &Exec,
    weights: &Matrix,
    n_tiles: usize,
    n_sets: usize,
    n_rows: usize,
    a_thread: usize,
) -> usize {
    /// Products that take some ten microseconds.
    const WORTH: usize = 1 << 20;
    /// Tiles for which rows come from the second-level cache all but the first time.
    const MANY: usize = 8;
    let n_k = weights.n_k();
    let n_threads = rayon::current_num_threads();
    let worth = WORTH.div_ceil((n_rows * n_k * LANES).max(1));
    let for_all_threads = n_tiles / (4 * n_threads).max(1);
    let many = worth.clamp(1, MANY).max(for_all_threads.min(MANY)).max(1);
    let by_tiles = Products::of(exec.path, exec.exact) == Products::Tiles;
    if by_tiles && (n_sets > 1 || n_rows > GROUP_ROWS) {
        let of_sets = n_sets * n_tiles / (a_thread * n_threads).max(1);
        many.max(of_sets).min(n_tiles)
    } else {
        many
    }
}
