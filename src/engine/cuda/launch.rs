//! The only place that launches: one typed function a kernel, which picks the variant and the
//! grid. Their argument records are in `arguments`.

#![allow(unsafe_code, reason = "launches kernels")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

pub use super::arguments::{
    AttentionArgs, Dense, ExpertBuffers, GatherArgs, MatmulArgs, MoeArgs, RouteArgs, SampleArgs,
};
use super::buffer::DeviceBuffer;
use super::counts::{Calls, add};
use super::decode::Slot;
use super::device::{Device, Function, Module, check};
use super::error::CudaError;
use super::graph::Event;
use super::kernels::{self, Build, Cubin};
use super::memory::MAX_SAMPLE_PARTS;
use super::nvrtc::Nvrtc;
use super::pack;
use super::places;
use super::sharing;
use super::tensor_map::TensorMap;
use super::variants::{self, Room, Variant};
use crate::engine::TILE_KEYS;
use crate::engine::checkpoint::MatrixFormat;
use crate::engine::config::ModelConfig;

/// All kernels of a model on a device.
pub struct Kernels {
    pub(super) device: Arc<Device>,
    /// Of the experts' weights.
    experts_format: MatrixFormat,
    /// Of the dense products' weights, by [`Dense`].
    dense_formats: [MatrixFormat; 3],
    room: Room,
    dense_variants: Vec<Variant>,
    moe_variants: Vec<Variant>,
    head_dim: usize,
    group: usize,
    n_experts: usize,
    embed: Function,
    embed_step: Function,
    start_slot: Function,
    rmsnorm: Function,
    moe_combine: Function,
    route: Route,
    /// For many rows, where it fits.
    route_16: Option<Route>,
    group_entries: Function,
    gather: Function,
    attention_full: Function,
    attention_sliding: Function,
    prefill: AttentionBlock,
    shared_decode: AttentionBlock,
    attention_full_decode: Function,
    attention_sliding_decode: Function,
    attention_shared_decode: Function,
    attention_merge: Function,
    dense: [Vec<Function>; 3],
    gate_up: Vec<Function>,
    down: Vec<Function>,
    ring_append: Function,
    tally: Function,
    sample: Function,
    fill_bf16: Function,
    fill_f32: Function,
    fill_blocks: Function,
    /// Times of launches, while somebody asks for them.
    pub(super) profile: Mutex<Option<Vec<(Function, Event, Event)>>>,
    pub(super) names: Vec<(Function, String)>,
    /// Launches of each kernel; those of a capture count when it is replayed.
    pub(super) calls: Calls,
    /// Kernel files that were compiled, not taken from the cache.
    pub n_compiled: usize,
    _modules: Vec<Module>,
}

/// What a block of attention has that takes several rows.
#[derive(Clone, Copy)]
struct AttentionBlock {
    rows: usize,
    threads: usize,
    shared: usize,
    /// It reads pages by tensor copies.
    copies_tensors: bool,
}

/// Rows from which the experts' products may start early.
const OVERLAP_ROWS: usize = 32;

/// A kernel that routes, and what its blocks have.
struct Route {
    function: Function,
    /// Most rows of a tile.
    rows: usize,
    /// A warp's pieces of weights in shared memory.
    n_slots: usize,
    shared: usize,
}

/// With few rows there is about a block for so many multiprocessors: each brings all weights
/// through L2.
const ROUTE_SPREAD: usize = 4;

/// Row blocks of a dense product up to which they follow each other.
const ROW_BLOCKS_FIRST: usize = 8;

/// Entries from which they are sorted before they are gathered.
const SORTED_ENTRIES: usize = 2048;

/// Blocks a multiprocessor that go through logits.
const SAMPLE_BLOCKS: usize = 4;

/// Blocks of a grid-stride loop.
const STRIDE_BLOCKS: u32 = 2048;

impl Kernels {
    /// Compiles or takes from the cache, and loads.
    ///
    /// # Errors
    /// The compiler's log, or code that the driver refuses.
    pub fn load(
        device: &Arc<Device>,
        nvrtc: &Nvrtc,
        config: &ModelConfig,
        build: Build,
    ) -> Result<Self, CudaError> {
        let cubins = Self::compile(device, nvrtc, build)?;
        Self::of_cubins(device, config, build, &cubins)
    }

    /// What [`Kernels::of_cubins`] takes: needs no weights, so it may run beside their loading.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(
        device: &Device,
        nvrtc: &Nvrtc,
        mut build: Build,
    ) -> Result<Vec<Cubin>, CudaError> {
        let room = room(device, &build);
        build.small_shared = room.small_shared;
        build.warpgroups = room.warpgroups;
        kernels::compile(nvrtc, &architecture(device), &build)
    }

    /// Loads what was compiled for a build.
    ///
    /// # Errors
    /// Code that the driver refuses.
    pub fn of_cubins(
        device: &Arc<Device>,
        config: &ModelConfig,
        build: Build,
        cubins: &[Cubin],
    ) -> Result<Self, CudaError> {
        let room = room(device, &build);
        let n_compiled = cubins.iter().filter(|cubin| !cubin.cached).count();
        let mut modules = Vec::new();
        for cubin in cubins {
            modules.push((cubin.name, device.load(&cubin.bytes, cubin.name)?));
        }
        let names = RefCell::new(Vec::new());
        let named = |file: &str, name: &str, shared: usize, label: String| {
            let module = modules.iter().find(|(name, _)| *name == file);
            let (_, module) = module.expect("every file is in the list of texts");
            let function = module.function(name, shared as u32)?;
            names.borrow_mut().push((function, label));
            Ok::<_, CudaError>(function)
        };
        let function =
            |file: &str, name: &str, shared: usize| named(file, name, shared, name.to_owned());
        let experts_format = build.format.experts;
        let (attention, lm_head) = (build.format.attention, build.format.lm_head);
        let dense_variants = variants::dense(room);
        let moe_variants = variants::moe(experts_format, room);
        // A product's label says on which format it is.
        let of_variants = |file: &str, name: &str, variants: &[Variant], format: MatrixFormat| {
            let each = variants.iter().map(|variant| {
                let name = format!("{name}_{}", variant.name);
                let label = format!("{file}_{}", name.trim_start_matches("matmul_"));
                let shared = variant.most_shared_bytes(pack::tile_bytes(format), room);
                named(file, &name, shared, label)
            });
            each.collect::<Result<Vec<_>, CudaError>>()
        };
        let dense_of = |name: &str, format: MatrixFormat| {
            of_variants(kernels::matmul_file(format), name, &dense_variants, format)
        };
        let moe_of = |name: &str| {
            let file = kernels::moe_matmul_file(experts_format);
            of_variants(file, name, &moe_variants, experts_format)
        };
        let dense = [
            dense_of("matmul_qkv", attention)?,
            dense_of("matmul_add", attention)?,
            dense_of("matmul_logits", lm_head)?,
        ];
        let ring_append = function(kernels::matmul_file(attention), "ring_append", 0)?;
        let dense_formats = [attention, attention, lm_head];
        let attention = |name| function("attention", name, attention_shared(config.head_dim));
        let prefill = AttentionBlock::of_prefill(config, room);
        let shared_decode = AttentionBlock::of_shared(config, room);
        let route = |name: &str, rows: usize, n_slots: usize| {
            let shared = route_shared(config, rows, n_slots);
            let function = function("topk_routing", name, shared)?;
            Ok::<_, CudaError>(Route {
                function,
                rows,
                n_slots,
                shared,
            })
        };
        let all = config.hidden.div_ceil(32 * 16) * config.n_experts.div_ceil(32);
        // With more a block of few rows would not start beside blocks of the kernel before.
        let ahead = all.min(if room.small_shared { 2 } else { 3 });
        let fits = |n_slots: &usize| {
            route_shared(config, 16, *n_slots) + ROUTE_STATIC <= device.shared_bytes as usize
        };
        let many_slots = [all, ahead].into_iter().find(fits);
        Ok(Self {
            experts_format,
            dense_formats,
            room,
            head_dim: config.head_dim,
            group: config.group(),
            n_experts: config.n_experts,
            embed: function("embed", "embed", 0)?,
            embed_step: function("embed", "embed_step", 0)?,
            start_slot: function("embed", "start_slot", 0)?,
            rmsnorm: function("rmsnorm", "rmsnorm", 0)?,
            moe_combine: function("rmsnorm", "moe_combine", 0)?,
            route: route("route", 8, ahead)?,
            route_16: many_slots
                .map(|n_slots| route("route_16", 16, n_slots))
                .transpose()?,
            group_entries: function("topk_routing", "group", 0)?,
            gather: function(
                "topk_routing",
                "gather",
                config.n_experts * size_of::<u32>(),
            )?,
            attention_full: function("attention", "attention_full", prefill.shared)?,
            attention_sliding: function("attention", "attention_sliding", prefill.shared)?,
            prefill,
            attention_full_decode: attention("attention_full_decode")?,
            attention_sliding_decode: attention("attention_sliding_decode")?,
            attention_shared_decode: function(
                "attention",
                "attention_shared_decode",
                shared_decode.shared,
            )?,
            shared_decode,
            attention_merge: function("attention", "attention_merge", 0)?,
            dense,
            gate_up: moe_of("gate_up")?,
            down: moe_of("down")?,
            dense_variants,
            moe_variants,
            ring_append,
            tally: function("sample", "tally", 0)?,
            sample: function("sample", "sample", 0)?,
            fill_bf16: function("synthetic", "fill_bf16", 0)?,
            fill_f32: function("synthetic", "fill_f32", 0)?,
            fill_blocks: function("synthetic", "fill_blocks", 0)?,
            n_compiled,
            profile: Mutex::new(None),
            names: names.into_inner(),
            calls: Calls::default(),
            device: Arc::clone(device),
            _modules: modules.into_iter().map(|(_, module)| module).collect(),
        })
    }

    /// Rows of a segment that one attention block takes in a prefill pass.
    pub fn attention_rows(&self) -> usize {
        self.prefill.rows
    }

    /// Most rows of a shared item.
    pub fn shared_rows(&self) -> usize {
        self.shared_decode.rows
    }

    pub fn embed(
        &self,
        embedding: u64,
        tokens: u64,
        x: u64,
        hidden: u32,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        self.follow(
            self.embed,
            [n_rows, 1, 1],
            256,
            0,
            &[arg(&embedding), arg(&tokens), arg(&x), arg(&hidden)],
        )
    }

    #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
    pub fn embed_step(
        &self,
        embedding: u64,
        slots: u64,
        slot_of: u64,
        rows: u64,
        step: u64,
        x: u64,
        hidden: u32,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let args = [
            arg(&embedding),
            arg(&slots),
            arg(&slot_of),
            arg(&rows),
            arg(&step),
            arg(&x),
            arg(&hidden),
        ];
        self.follow(self.embed_step, [n_rows, 1, 1], 256, 0, &args)
    }

    pub fn start_slot(&self, slots: u64, index: u32, slot: &Slot) -> Result<(), CudaError> {
        self.launch(
            self.start_slot,
            [1, 1, 1],
            1,
            0,
            &[arg(&slots), arg(&index), arg(slot)],
        )
    }

    pub fn rmsnorm(
        &self,
        x: u64,
        scale: u64,
        t: u64,
        eps: f32,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let args = [arg(&x), arg(&scale), arg(&t), arg(&eps)];
        self.follow(self.rmsnorm, [n_rows, 1, 1], 256, 0, &args)
    }

    #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
    pub fn moe_combine(
        &self,
        x: u64,
        y: u64,
        gates: u64,
        scale: u64,
        t: u64,
        eps: f32,
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let args = [
            arg(&x),
            arg(&y),
            arg(&gates),
            arg(&scale),
            arg(&t),
            arg(&eps),
        ];
        self.follow(self.moe_combine, [n_rows, 1, 1], 256, 0, &args)
    }

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
            &self.dense_variants,
            self.room,
            self.tile_bytes(which),
            shape,
        )
    }

    /// Bytes of a tile of a dense product's weights.
    fn tile_bytes(&self, which: Dense) -> usize {
        pack::tile_bytes(self.dense_formats[which as usize])
    }

    pub fn dense_name(&self, index: usize) -> &'static str {
        self.dense_variants[index].name
    }

    /// Whether a block of variant `index` has the shared memory that the product takes.
    pub fn dense_fits(&self, index: usize, args: &MatmulArgs) -> bool {
        let n_groups = pack::n_groups(args.n_k as usize);
        self.dense_variants[index].fits(self.room, n_groups, args.n_rows as usize)
    }

    pub fn moe_name(&self, index: usize) -> &'static str {
        self.moe_variants[index].name
    }

    /// Whether variant `index` takes tokens and leaves activations as tiles.
    pub fn moe_is_streaming(&self, index: usize) -> bool {
        self.moe_variants[index].is_streaming()
    }

    /// How many variants the dense products have.
    pub fn n_dense(&self) -> usize {
        self.dense_variants.len()
    }

    /// How many variants the experts' products have.
    pub fn n_moe(&self) -> usize {
        self.moe_variants.len()
    }

    /// A dense product by variant `index` : all give the same bits.
    pub fn matmul_variant(
        &self,
        which: Dense,
        index: usize,
        args: &MatmulArgs,
    ) -> Result<(), CudaError> {
        let variant = self.dense_variants[index];
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
        let grid = match args.rows_first {
            0 => [m_blocks, row_blocks, 1],
            _ => [row_blocks, m_blocks, 1],
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

    pub fn route(&self, args: &RouteArgs) -> Result<(), CudaError> {
        let (n_rows, n_blocks) = (args.n_rows as usize, self.room.n_multiprocessors);
        let few = &self.route;
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
            let grid = [
                (args.n_tiles as usize).div_ceil(variant.block_tiles()),
                most,
                1,
            ];
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
        let shared = attention_shared(self.head_dim);
        let threads = 32 * self.group.div_ceil(16);
        let n_kv_heads = args.n_kv_heads as usize;
        if sliding {
            let grid = [n_rows, n_kv_heads, 1];
            return self.follow(
                self.attention_sliding_decode,
                grid,
                threads,
                shared,
                &[arg(args)],
            );
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
        let grid = [n_rows, n_kv_heads, splits];
        self.follow(
            self.attention_full_decode,
            grid,
            threads,
            shared,
            &[arg(args)],
        )?;
        let grid = [
            n_rows,
            (args.n_heads as usize * self.head_dim).div_ceil(256),
            1,
        ];
        self.follow(self.attention_merge, grid, 256, 0, &[arg(args)])
    }

    pub fn sample(&self, args: &SampleArgs, n_rows: usize) -> Result<(), CudaError> {
        // Not more blocks than run at once.
        let n_parts =
            (SAMPLE_BLOCKS * self.room.n_multiprocessors / n_rows).clamp(1, MAX_SAMPLE_PARTS);
        let args = SampleArgs {
            n_parts: n_parts as u32,
            ..*args
        };
        let parts = [n_rows, n_parts, 1];
        self.follow(self.tally, parts, 256, 0, &[arg(&args)])?;
        self.follow(self.sample, [n_rows, 1, 1], 512, 0, &[arg(&args)])
    }

    pub fn fill_bf16(
        &self,
        out: u64,
        n: u64,
        seed: u64,
        mean: f32,
        spread: f32,
    ) -> Result<(), CudaError> {
        let args = [arg(&out), arg(&n), arg(&seed), arg(&mean), arg(&spread)];
        self.launch(
            self.fill_bf16,
            [STRIDE_BLOCKS as usize, 1, 1],
            256,
            0,
            &args,
        )
    }

    pub fn fill_f32(
        &self,
        out: u64,
        n: u64,
        seed: u64,
        mean: f32,
        spread: f32,
    ) -> Result<(), CudaError> {
        let args = [arg(&out), arg(&n), arg(&seed), arg(&mean), arg(&spread)];
        self.launch(self.fill_f32, [STRIDE_BLOCKS as usize, 1, 1], 256, 0, &args)
    }

    /// `n_chunks` of 16 bytes, `tile_chunks` of them a tile.
    pub fn fill_blocks(
        &self,
        out: u64,
        n_chunks: u64,
        tile_chunks: u32,
        seed: u64,
        base: u32,
    ) -> Result<(), CudaError> {
        let args = [
            arg(&out),
            arg(&n_chunks),
            arg(&tile_chunks),
            arg(&seed),
            arg(&base),
        ];
        self.launch(
            self.fill_blocks,
            [STRIDE_BLOCKS as usize, 1, 1],
            256,
            0,
            &args,
        )
    }

    /// Launches behind all that is enqueued.
    fn launch(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &[*mut c_void],
    ) -> Result<(), CudaError> {
        self.enqueue(function, grid, threads, shared, args, false)
    }

    /// Launches a kernel that begins with `wait_for_previous` (kernels/ptx.cuh): its blocks may
    /// start while the kernel before still runs, where the GPU can do that.
    fn follow(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &[*mut c_void],
    ) -> Result<(), CudaError> {
        self.enqueue(function, grid, threads, shared, args, true)
    }

    fn enqueue(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &[*mut c_void],
        may_overlap: bool,
    ) -> Result<(), CudaError> {
        // The driver's limits along y and z; x has 2^31.
        if grid[1] > 65_535 || grid[2] > 65_535 {
            return Err(CudaError::Shape {
                key: "rows of a pass",
                found: grid[1].max(grid[2]),
                expected: "at most 65535 blocks of them",
            });
        }
        let begun = self.begin_timing()?;
        self.device.bind()?;
        let mut args = args.to_vec();
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: grid[2] as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.device.stream(),
            attrs: &mut overlap,
            // A timed launch stands between two events.
            numAttrs: u32::from(may_overlap && self.device.major >= 9 && begun.is_none()),
        };
        // SAFETY: the functions above pass the kernel's own arguments, in order, each living
        // until the driver has copied it, which it does before this returns; what they point to
        // are buffers of the lengths in `memory.rs`.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&config, function.0, args.as_mut_ptr(), ptr::null_mut())
        };
        check(launched, "a launch")?;
        self.calls.add(&[(function, 1)]);
        add(&self.device.counters.launches, 1);
        match begun {
            Some(begun) => self.end_timing(function, begun),
            None => Ok(()),
        }
    }
}

fn arg<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

fn architecture(device: &Device) -> String {
    kernels::architecture(device.major, device.minor)
}

fn room(device: &Device, build: &Build) -> Room {
    Room {
        warpgroups: build.warpgroups && architecture(device) == "sm_90a",
        small_shared: device.shared_bytes < 130 << 10,
        shared_bytes: device.shared_bytes as usize,
        n_multiprocessors: device.n_multiprocessors as usize,
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
    fn of_prefill(config: &ModelConfig, room: Room) -> Self {
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
    fn of_shared(config: &ModelConfig, room: Room) -> Self {
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
fn attention_shared(head_dim: usize) -> usize {
    2 * 2 * 64 * (head_dim + 8) * 2
}

/// For the static shared memory of `route_16`.
const ROUTE_STATIC: usize = 2 << 10;

/// Dynamic shared memory of a block of `route` with so many rows (kernels/topk_routing.cu).
fn route_shared(config: &ModelConfig, rows: usize, n_slots: usize) -> usize {
    // Of 16 warps: 16 bytes a lane of four weight rows; a sum of a row for 32 experts.
    const PIECE: usize = 32 << 10;
    const SUMS: usize = 16 * 32;
    let keys = match config.n_experts {
        ..=32 => 0,
        more => more,
    };
    n_slots * PIECE + rows * (SUMS + keys) * size_of::<f32>()
}
