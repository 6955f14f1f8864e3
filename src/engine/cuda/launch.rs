//! The only place that launches: one typed function a kernel, which picks the variant and the
//! grid. Their argument records are in `arguments`; which kernels there are is in `load`, and the larger
//! families have files of their own.

#![allow(unsafe_code, reason = "launches kernels")]

mod attention;
mod dense;
mod experts;
mod load;

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

pub use super::arguments::{
    AttentionArgs, Dense, ExpertBuffers, GatherArgs, MatmulArgs, MoeArgs, RouteArgs, SampleArgs,
};
use super::counts::{Calls, add};
use super::decode::Slot;
use super::device::{Device, Function, Module, check};
use super::error::CudaError;
use super::graph::Event;
use super::memory::MAX_SAMPLE_PARTS;
use super::variants::{Room, Variant};
use crate::engine::checkpoint::MatrixFormat;
use attention::{AttentionBlock, RowDecode};
use experts::Route;

/// All kernels of a model on a device.
pub struct Kernels {
    pub(super) device: Arc<Device>,
    /// Of the experts' weights.
    experts_format: MatrixFormat,
    /// Of the dense products' weights, by [`Dense`].
    dense_formats: [MatrixFormat; 3],
    room: Room,
    /// Of each [`Dense`].
    dense_variants: [Vec<Variant>; 3],
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
    /// The same for one row, with all weights in shared memory, where they fit.
    route_one: Option<Route>,
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
    /// Of decode steps of few rows, where groups are small enough.
    row_decode: Option<RowDecode>,
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

/// Blocks a multiprocessor that go through logits.
const SAMPLE_BLOCKS: usize = 4;

/// Blocks of a grid-stride loop.
const STRIDE_BLOCKS: u32 = 2048;

impl Kernels {
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
