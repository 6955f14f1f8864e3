//! Dense products, by the variant that should take the least time.

use super::{Dense, Kernels, MatmulArgs, arg};
use crate::engine::cuda::error::CudaError;
use crate::engine::cuda::pack;
use crate::engine::cuda::tensor_map::TensorMap;
use crate::engine::cuda::variants;

/// Row blocks of a dense product up to which they follow each other.
const ROW_BLOCKS_FIRST: usize = 8;

impl Kernels {
    /// A dense product, by the variant that should take the least time.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub fn matmul(&self, which: Dense, args: &MatmulArgs) -> Result<(), CudaError> {
        self.matmul_variant(which, self.chosen_dense(which, args), args)
    }

    /// Index of the variant that [`Kernels::matmul`] takes.
    pub fn chosen_dense(&self, which: Dense, args: &MatmulArgs) -> usize {
        let n_tiles = (args.n_tiles - args.first_tile) as usize;
        let n_groups = pack::n_groups(args.n_k as usize);
        let shape = (n_tiles, n_groups, args.n_rows as usize);
        variants::choose_dense(
            &self.dense_variants[which as usize],
            self.room,
            self.tile_bytes(which),
            shape,
        )
    }

    /// Bytes of a tile of a dense product's weights.
    fn tile_bytes(&self, which: Dense) -> usize {
        pack::tile_bytes(self.dense_formats[which as usize])
    }

    pub fn dense_name(&self, which: Dense, index: usize) -> &'static str {
        self.dense_variants[which as usize][index].name
    }

    /// Whether a block of variant `index` has the shared memory that the product takes.
    pub fn dense_fits(&self, which: Dense, index: usize, args: &MatmulArgs) -> bool {
        let n_groups = pack::n_groups(args.n_k as usize);
        self.dense_variants[which as usize][index].fits(self.room, n_groups, args.n_rows as usize)
    }

    /// How many variants a dense product has.
    pub fn n_dense(&self, which: Dense) -> usize {
        self.dense_variants[which as usize].len()
    }

    /// A dense product by variant `index` : all give the same bits.
    pub fn matmul_variant(
        &self,
        which: Dense,
        index: usize,
        args: &MatmulArgs,
    ) -> Result<(), CudaError> {
        let variant = self.dense_variants[which as usize][index];
        let n_tiles = (args.n_tiles - args.first_tile) as usize;
        let m_blocks = n_tiles.div_ceil(variant.block_tiles());
        let row_blocks = variant.row_blocks(args.n_rows as usize);
        let x_map = if variant.is_streaming() {
            let (n_rows, n_k) = (args.n_rows as usize, args.n_k as usize);
            TensorMap::of_rows(args.x, n_rows, n_k, variant.columns())?
        } else {
            args.x_map
        };
        let args = MatmulArgs {
            x_map,
            // Few row blocks share a weight tile while it is in L2.
            rows_first: u32::from(row_blocks <= ROW_BLOCKS_FIRST),
            ..*args
        };
        let grid = if variant.is_streaming() {
            // As `DenseWork::MANY` in kernels/matmul.cuh.
            let takes_many = which == Dense::Logits;
            let n_items = m_blocks * row_blocks;
            let blocks = variant.streaming_blocks(self.room, n_items, takes_many);
            [blocks, 1, variant.k_blocks()]
        } else if args.rows_first == 0 {
            [m_blocks, row_blocks, 1]
        } else {
            [row_blocks, m_blocks, 1]
        };
        let n_groups = pack::n_groups(args.n_k as usize);
        let shared = variant.shared_bytes(self.tile_bytes(which), n_groups, args.n_rows as usize);
        let shared = variant.spread(self.room, shared, m_blocks * row_blocks);
        let function = self.dense[which as usize][index];
        self.enqueue(
            function,
            grid,
            variant.threads(),
            shared,
            &[arg(&args)],
            true,
        )
    }

    pub fn ring_append(&self, args: &MatmulArgs) -> Result<(), CudaError> {
        self.follow(
            self.ring_append,
            [args.n_rows as usize, 1, 1],
            128,
            0,
            &[arg(args)],
        )
    }
}
