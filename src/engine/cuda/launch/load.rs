//! Loading the kernels: which there are, in which variants, and what their blocks have.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use super::Kernels;
use super::attention::{AttentionBlock, RowDecode, attention_shared};
use super::experts::{ROUTE_STATIC, Route, route_shared};
use crate::engine::checkpoint::MatrixFormat;
use crate::engine::config::ModelConfig;
use crate::engine::cuda::arguments::Dense;
use crate::engine::cuda::counts::Calls;
use crate::engine::cuda::device::Device;
use crate::engine::cuda::error::CudaError;
use crate::engine::cuda::kernels::{self, Build, Cubin};
use crate::engine::cuda::nvrtc::Nvrtc;
use crate::engine::cuda::pack;
use crate::engine::cuda::variants::{self, Room, Variant};

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
        let dense_variants =
            [Dense::Qkv, Dense::Add, Dense::Logits].map(|which| variants::dense(which, room));
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
        let dense_of = |name: &str, which: Dense, format: MatrixFormat| {
            let variants = &dense_variants[which as usize];
            of_variants(kernels::matmul_file(format), name, variants, format)
        };
        let moe_of = |name: &str| {
            let file = kernels::moe_matmul_file(experts_format);
            of_variants(file, name, &moe_variants, experts_format)
        };
        let dense = [
            dense_of("matmul_qkv", Dense::Qkv, attention)?,
            dense_of("matmul_add", Dense::Add, attention)?,
            dense_of("matmul_logits", Dense::Logits, lm_head)?,
        ];
        let ring_append = function(kernels::matmul_file(attention), "ring_append", 0)?;
        let dense_formats = [attention, attention, lm_head];
        let decode_shared = attention_shared(config.head_dim);
        let row_decode = RowDecode::shared(config).map(|shared| {
            Ok::<_, CudaError>(RowDecode {
                full: function("attention", "attention_full_row", shared[0])?,
                sliding: function("attention", "attention_sliding_row", shared[1])?,
                shared,
            })
        });
        let prefill = AttentionBlock::of_prefill(config, room);
        let shared_decode = AttentionBlock::of_shared(config, room);
        let route = |name: &str, rows: usize, n_slots: usize, most_slots: usize| {
            let shared = route_shared(config, rows, n_slots);
            let most_shared = route_shared(config, rows, most_slots);
            let function = function("topk_routing", name, most_shared)?;
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
        let fits = |rows: usize, n_slots: usize| {
            route_shared(config, rows, n_slots) + ROUTE_STATIC <= device.shared_bytes as usize
        };
        let many_slots = [all, ahead].into_iter().find(|&slots| fits(16, slots));
        let one_slots = Some(all).filter(|&all| fits(8, all));
        let most_slots = one_slots.unwrap_or(ahead);
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
            route: route("route", 8, ahead, most_slots)?,
            route_one: one_slots
                .map(|n_slots| route("route", 8, n_slots, most_slots))
                .transpose()?,
            route_16: many_slots
                .map(|n_slots| route("route_16", 16, n_slots, n_slots))
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
            attention_full_decode: function("attention", "attention_full_decode", decode_shared)?,
            attention_sliding_decode: function(
                "attention",
                "attention_sliding_decode",
                decode_shared,
            )?,
            row_decode: row_decode.transpose()?,
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
