//! Routing, the experts' tokens, and their products.

use super::{ExpertBuffers, GatherArgs, Kernels, MoeArgs, RouteArgs, arg};
use crate::engine::config::ModelConfig;
use crate::engine::cuda::device::Function;
use crate::engine::cuda::error::CudaError;
use crate::engine::cuda::pack;
use crate::engine::cuda::places;
use crate::engine::cuda::variants;

/// Rows from which the experts' products may start early.
const OVERLAP_ROWS: usize = 32;

/// With few rows there is about a block for so many multiprocessors: each brings all weights
/// through L2.
const ROUTE_SPREAD: usize = 4;

/// Entries from which they are sorted before they are gathered.
const SORTED_ENTRIES: usize = 2048;

/// For the static shared memory of `route_16`.
pub(super) const ROUTE_STATIC: usize = 2 << 10;

/// A kernel that routes, and what its blocks have.
pub(super) struct Route {
    pub function: Function,
    /// Most rows of a tile.
    pub rows: usize,
    /// A warp's pieces of weights in shared memory.
    pub n_slots: usize,
    pub shared: usize,
}

impl Kernels {
    pub fn route(&self, args: &RouteArgs) -> Result<(), CudaError> {
        let (n_rows, n_blocks) = (args.n_rows as usize, self.room.n_multiprocessors);
        let one = self.route_one.as_ref().filter(|_| n_rows == 1);
        let few = one.unwrap_or(&self.route);
        let many = self.route_16.as_ref();
        let (route, tile_rows, grid) = match many.filter(|_| n_rows > few.rows * n_blocks) {
            // A block takes tile after tile and keeps the weights.
            Some(many) => (many, many.rows, n_rows.div_ceil(many.rows).min(n_blocks)),
            None => {
                let tile_rows = (n_rows * ROUTE_SPREAD)
                    .div_ceil(n_blocks)
                    .clamp(1, few.rows);
                (few, tile_rows, n_rows.div_ceil(tile_rows))
            }
        };
        let args = RouteArgs {
            tile_rows: tile_rows as u32,
            n_slots: route.n_slots as u32,
            ..*args
        };
        self.follow(
            route.function,
            [grid, 1, 1],
            512,
            route.shared,
            &[arg(&args)],
        )
    }

    pub fn group_entries(
        &self,
        experts: u64,
        n_entries: u32,
        offsets: u64,
        entries: u64,
    ) -> Result<(), CudaError> {
        let n_experts = self.n_experts as u32;
        let args = [
            arg(&experts),
            arg(&n_entries),
            arg(&n_experts),
            arg(&offsets),
            arg(&entries),
        ];
        self.follow(self.group_entries, [self.n_experts, 1, 1], 256, 0, &args)
    }

    /// `args` of entries that may take `args.n_octets` octets.
    pub fn gather(&self, args: &GatherArgs) -> Result<(), CudaError> {
        let grid = [
            args.n_octets as usize + 1,
            pack::n_groups(args.n_k as usize).div_ceil(places::GATHERED_GROUPS),
            1,
        ];
        let shared = self.n_experts * size_of::<u32>();
        self.follow(self.gather, grid, 256, shared, &[arg(args)])
    }

    /// Both products of the experts, by the variant for `n_rows` rows routed evenly. `gate_up` and
    /// `down` tell weights and shapes, the rest is told by `buffers`.
    pub fn experts(
        &self,
        buffers: &ExpertBuffers,
        gate_up: &MoeArgs,
        down: &MoeArgs,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let tokens = variants::expected_tokens(n_rows, gate_up.k as usize, self.n_experts);
        let n_groups = pack::n_groups(gate_up.n_k.max(down.n_k) as usize);
        let index = variants::choose_moe(&self.moe_variants, self.room, n_groups, tokens);
        self.experts_variant(buffers, gate_up, down, n_rows, index)
    }

    /// Both products of the experts by variant `index` : all give the same bits.
    pub fn experts_variant(
        &self,
        buffers: &ExpertBuffers,
        gate_up: &MoeArgs,
        down: &MoeArgs,
        n_rows: usize,
        index: usize,
    ) -> Result<(), CudaError> {
        let variant = self.moe_variants[index];
        let n_entries = n_rows * gate_up.k as usize;
        // Every expert may have one tile that is not full.
        let mut most = n_entries.min(n_entries / variant.columns() + self.n_experts);
        let ExpertBuffers { t, act, y, .. } = *buffers;
        let sorted = if variant.is_streaming() {
            let n_octets = places::n_octets(n_entries, self.n_experts);
            most = most.min(n_octets);
            let (mut offsets, mut entries) = (0, 0);
            if n_entries > SORTED_ENTRIES {
                (offsets, entries) = (buffers.offsets, buffers.entries);
                self.group_entries(buffers.experts, n_entries as u32, offsets, entries)?;
            }
            self.gather(&GatherArgs {
                experts: buffers.experts,
                offsets,
                entries,
                t,
                places: buffers.places,
                tiles: buffers.t_tiles,
                listed: buffers.listed,
                n_entries: n_entries as u32,
                n_experts: self.n_experts as u32,
                k: gate_up.k,
                n_k: gate_up.n_k,
                n_octets: n_octets as u32,
                tile_octets: variant.octets as u32,
                n_listed: most as u32,
            })?;
            MoeArgs {
                x: buffers.t_tiles,
                act: buffers.act_tiles,
                entries: buffers.places,
                listed: buffers.listed,
                n_octets: n_octets as u32,
                ..MoeArgs::default()
            }
        } else {
            let (mut offsets, mut entries) = (buffers.offsets, buffers.entries);
            if n_rows == 1 {
                // One row's entries need no order.
                (offsets, entries) = (0, buffers.experts);
            } else {
                self.group_entries(buffers.experts, n_entries as u32, offsets, entries)?;
            }
            MoeArgs {
                x: t,
                act,
                offsets,
                entries,
                ..MoeArgs::default()
            }
        };
        let of = |args: &MoeArgs, x: u64| MoeArgs {
            x,
            y,
            weights: args.weights,
            bias: args.bias,
            n_experts: self.n_experts as u32,
            k: args.k,
            n_k: args.n_k,
            n_tiles: args.n_tiles,
            n_out: args.n_out,
            limit: args.limit,
            ..sorted
        };
        let tile_bytes = pack::tile_bytes(self.experts_format);
        for (functions, args) in [
            (&self.gate_up, &of(gate_up, sorted.x)),
            (&self.down, &of(down, sorted.act)),
        ] {
            let shared =
                variant.shared_bytes(tile_bytes, pack::n_groups(args.n_k as usize), n_rows);
            let feature_blocks = (args.n_tiles as usize).div_ceil(variant.block_tiles());
            let grid = if variant.is_streaming() {
                [feature_blocks * most, 1, 1]
            } else {
                [feature_blocks, most, 1]
            };
            let threads = variant.threads();
            let shared = variant.spread(self.room, shared, grid[0] * grid[1]);
            // With few rows an early start costs more than it saves, but for one row's `down`, which
            // knows its experts (kernels/NOTES.md).
            let is_down = std::ptr::eq(functions, &self.down);
            let overlaps = n_rows >= OVERLAP_ROWS || n_rows == 1 && is_down;
            self.enqueue(
                functions[index],
                grid,
                threads,
                shared,
                &[arg(args)],
                overlaps,
            )?;
        }
        Ok(())
    }

    pub fn moe_name(&self, index: usize) -> &'static str {
        self.moe_variants[index].name
    }

    /// Whether variant `index` takes tokens and leaves activations as tiles.
    pub fn moe_is_streaming(&self, index: usize) -> bool {
        self.moe_variants[index].is_streaming()
    }

    /// How many variants the experts' products have.
    pub fn n_moe(&self) -> usize {
        self.moe_variants.len()
    }
}

/// Dynamic shared memory of a block of `route` with so many rows (kernels/topk_routing.cu).
pub(super) fn route_shared(config: &ModelConfig, rows: usize, n_slots: usize) -> usize {
    // Of 16 warps: 16 bytes a lane of four weight rows; a sum of a row for 32 experts.
    const PIECE: usize = 32 << 10;
    const SUMS: usize = 16 * 32;
    let keys = match config.n_experts {
        ..=32 => 0,
        more => more,
    };
    n_slots * PIECE + rows * (SUMS + keys) * size_of::<f32>()
}
