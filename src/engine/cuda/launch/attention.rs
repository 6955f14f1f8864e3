//! Attention of prefill passes and of decode steps.

use super::{AttentionArgs, Kernels, arg};
use crate::engine::TILE_KEYS;
use crate::engine::config::ModelConfig;
use crate::engine::cuda::buffer::DeviceBuffer;
use crate::engine::cuda::device::Function;
use crate::engine::cuda::error::CudaError;
use crate::engine::cuda::sharing;
use crate::engine::cuda::tensor_map::TensorMap;
use crate::engine::cuda::variants::Room;

/// What a block of attention has that takes several rows.
#[derive(Clone, Copy)]
pub(super) struct AttentionBlock {
    rows: usize,
    threads: usize,
    pub shared: usize,
    /// It reads pages by tensor copies.
    copies_tensors: bool,
}

impl Kernels {
    /// Rows of a segment that one attention block takes in a prefill pass.
    pub fn attention_rows(&self) -> usize {
        self.prefill.rows
    }

    /// Most rows of a shared item.
    pub fn shared_rows(&self) -> usize {
        self.shared_decode.rows
    }

    /// Attention of a prefill pass over `n_blocks` blocks of rows.
    pub fn attention(
        &self,
        sliding: bool,
        args: &AttentionArgs,
        n_blocks: usize,
    ) -> Result<(), CudaError> {
        let function = if sliding {
            self.attention_sliding
        } else {
            self.attention_full
        };
        let grid = [n_blocks, args.n_kv_heads as usize, 1];
        let AttentionBlock {
            threads, shared, ..
        } = self.prefill;
        self.follow(function, grid, threads, shared, &[arg(args)])
    }

    /// What `attention_shared_decode` is told of the pages, where it reads them by tensor copies.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn cache_map(&self, pages: &DeviceBuffer<u16>) -> Result<TensorMap, CudaError> {
        if !self.shared_decode.copies_tensors {
            return Ok(TensorMap::default());
        }
        let n_rows = pages.len() / self.head_dim;
        TensorMap::of_rows(pages.at(0), n_rows, self.head_dim, TILE_KEYS)
    }

    /// Items of one KV head from which a prefix need not be cut to keep the GPU busy.
    pub fn whole_items(&self, n_kv_heads: usize) -> usize {
        (self.room.n_multiprocessors / 2).div_ceil(n_kv_heads)
    }

    /// Attention of a decode step: one row a sequence. `args.items` are there or not.
    pub fn attention_decode(
        &self,
        sliding: bool,
        args: &AttentionArgs,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let n_kv_heads = args.n_kv_heads as usize;
        // With more rows blocks of a warp each, of which a multiprocessor takes more, wait less.
        let few = n_rows * n_kv_heads <= ROW_BLOCKS * self.room.n_multiprocessors;
        let (functions, threads, shared) = match self.row_decode.filter(|_| few) {
            Some(row) => ([row.full, row.sliding], ROW_THREADS, row.shared),
            None => (
                [self.attention_full_decode, self.attention_sliding_decode],
                32 * self.group.div_ceil(16),
                [attention_shared(self.head_dim); 2],
            ),
        };
        let of_layer = usize::from(sliding);
        let launch = |splits: usize| {
            let grid = [n_rows, n_kv_heads, splits];
            let (function, shared) = (functions[of_layer], shared[of_layer]);
            self.follow(function, grid, threads, shared, &[arg(args)])
        };
        if sliding {
            return launch(1);
        }
        if args.items != 0 {
            let blocks = (self.room.n_multiprocessors / n_kv_heads).max(1);
            let grid = [n_kv_heads, blocks, 1];
            let AttentionBlock {
                threads, shared, ..
            } = self.shared_decode;
            let function = self.attention_shared_decode;
            self.follow(function, grid, threads, shared, &[arg(args)])?;
        }
        // A block goes through every so many splits: so many blocks that the last to run are few.
        let wanted = 24 * self.room.n_multiprocessors;
        let splits = wanted
            .div_ceil(n_rows * n_kv_heads)
            .clamp(1, args.max_splits.max(1) as usize);
        launch(splits)?;
        let grid = [
            n_rows,
            (args.n_heads as usize * self.head_dim).div_ceil(4 * 256),
            1,
        ];
        self.follow(self.attention_merge, grid, 256, 0, &[arg(args)])
    }
}

impl AttentionBlock {
    /// As kernels/attention_wgmma.cuh with so many stages, where that is used.
    fn of_warpgroups(config: &ModelConfig, room: Room, stages: usize) -> Option<Self> {
        // 64 keys and values; what splits are folded to; and alignment.
        const STAGE: usize = 2 * 64 * 128;
        const FOLDED: usize = 9 * 32 * 16;
        const WARPS: usize = 8;
        let group = config.group();
        let is_used = room.warpgroups && config.head_dim == 64 && group <= 64;
        is_used.then(|| Self {
            rows: 2 * (64 / group),
            threads: 32 * WARPS,
            shared: stages * STAGE + WARPS * FOLDED + 1024,
            copies_tensors: false,
        })
    }

    /// Of `attention_full` and `attention_sliding`: consecutive rows of a sequence.
    pub fn of_prefill(config: &ModelConfig, room: Room) -> Self {
        Self::of_warpgroups(config, room, 4).unwrap_or_else(|| {
            let group = config.group();
            let warps = group.div_ceil(16).max(4);
            Self {
                rows: warps * 16 / group,
                threads: 32 * warps,
                shared: attention_shared(config.head_dim),
                copies_tensors: false,
            }
        })
    }

    /// Of `attention_shared_decode`: rows of an item.
    pub fn of_shared(config: &ModelConfig, room: Room) -> Self {
        if let Some(block) = Self::of_warpgroups(config, room, 8) {
            let rows = block.rows.min(sharing::MAX_ROWS);
            return Self {
                rows,
                copies_tensors: true,
                ..block
            };
        }
        // As `SHARED_ROWS` in kernels/attention.cu.
        let group = config.group();
        let rows = match group {
            ..=8 => sharing::MAX_ROWS,
            9..=64 => 128 / group,
            _ => 1,
        };
        Self {
            rows,
            threads: 32 * (rows * group).div_ceil(16),
            shared: attention_shared(config.head_dim),
            copies_tensors: false,
        }
    }
}

/// Two stages of 64 keys and values.
pub(super) fn attention_shared(head_dim: usize) -> usize {
    2 * 2 * 64 * (head_dim + 8) * 2
}

/// Rows and KV heads a multiprocessor up to which [`RowDecode`] is used.
const ROW_BLOCKS: usize = 2;

/// Threads of a block of [`RowDecode`]: `ROW_WARPS` in kernels/attention_row.cuh.
const ROW_THREADS: usize = 4 * 32;

/// The kernels whose blocks have one row under one KV head (kernels/attention_row.cuh).
#[derive(Clone, Copy)]
pub(super) struct RowDecode {
    pub full: Function,
    pub sliding: Function,
    /// Of full layers and of sliding ones.
    pub shared: [usize; 2],
}

impl RowDecode {
    /// Dynamic shared memory of a block, where groups of heads are small enough.
    pub fn shared(config: &ModelConfig) -> Option<[usize; 2]> {
        let head_dim = config.head_dim;
        // As `FULL_BATCH` and `WINDOW_BATCH`, `KEY_SPACE` and `VALUE_SPACE`.
        let batches = if head_dim > 64 { [2, 2] } else { [4, 3] };
        let values = TILE_KEYS * (head_dim + 8) * size_of::<u16>();
        let tile = values.max(TILE_KEYS * 64) + values;
        (config.group() <= 16).then_some(batches.map(|batch| batch * tile))
    }
}
