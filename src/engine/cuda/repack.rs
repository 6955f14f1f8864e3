//! Launches of kernels/repack.cu: pieces of raw weights, staged on the device, to tiles.

#![allow(unsafe_code, reason = "launches kernels")]

use std::ptr;
use std::sync::Arc;

use super::device::{Device, Function, Module};
use super::error::CudaError;
use super::kernels::{self, architecture};
use super::nvrtc::Nvrtc;
use super::pack::{self, RowOrder};
use super::stream::Stream;
use crate::engine::checkpoint::MatrixFormat;

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    Mxfp4,
    Bf16,
    /// k outermost, out features innermost.
    Bf16Transposed,
}

/// As `RepackArgs` in kernels/repack.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RepackArgs {
    pub values: u64,
    pub scales: u64,
    pub tiles: u64,
    pub bad: u64,
    pub greatest: u64,
    pub n_out: u32,
    pub n_k: u32,
    pub order: u32,
    pub first_expert: u32,
    pub n_experts: u32,
    pub first_tile: u32,
    pub n_tiles: u32,
    pub first_group: u32,
    pub n_groups: u32,
    pub first_row: u32,
    pub n_rows: u32,
    pub first_k: u32,
    pub n_staged_k: u32,
}

impl RepackArgs {
    /// Blocks of the launch: a warp a tile.
    pub fn n_blocks(&self) -> u32 {
        (self.n_experts * self.n_tiles * self.n_groups).div_ceil(8)
    }
}

/// The kernel's number of a row order.
pub fn order_number(order: RowOrder) -> u32 {
    match order {
        RowOrder::Natural => 0,
        RowOrder::GateUp => 1,
        RowOrder::Rotary { head_dim } => head_dim as u32,
    }
}

/// The kernel from a stored format to a held one.
pub fn kernel_name(stored: Stored, held: MatrixFormat) -> &'static str {
    match (stored, held) {
        (Stored::Mxfp4, MatrixFormat::Mxfp4) => "mxfp4_to_mxfp4",
        (Stored::Mxfp4, MatrixFormat::Mxint8) => "mxfp4_to_mxint8",
        (Stored::Mxfp4, MatrixFormat::Bf16) => "mxfp4_to_bf16",
        (Stored::Bf16, MatrixFormat::Mxfp4) => "bf16_to_mxfp4",
        (Stored::Bf16, MatrixFormat::Mxint8) => "bf16_to_mxint8",
        (Stored::Bf16, MatrixFormat::Bf16) => "bf16_to_bf16",
        (Stored::Bf16Transposed, MatrixFormat::Mxfp4) => "bf16_transposed_to_mxfp4",
        (Stored::Bf16Transposed, MatrixFormat::Mxint8) => "bf16_transposed_to_mxint8",
        (Stored::Bf16Transposed, MatrixFormat::Bf16) => "bf16_transposed_to_bf16",
    }
}

/// The kernels, loaded: the same for every model.
pub struct Repack {
    module: Module,
    /// They were compiled, not taken from the cache.
    pub is_compiled: bool,
}

impl Repack {
    /// Compiles or takes from the cache, and loads.
    ///
    /// # Errors
    /// The compiler's log, or code that the driver refuses.
    pub fn load(device: &Arc<Device>, nvrtc: &Nvrtc) -> Result<Self, CudaError> {
        let arch = architecture(device.major, device.minor);
        let cubin = kernels::compile_repack(nvrtc, &arch)?;
        Ok(Self {
            module: device.load(&cubin.bytes, cubin.name)?,
            is_compiled: !cubin.cached,
        })
    }

    /// Enqueues a piece.
    ///
    /// # Errors
    /// The driver fails.
    pub fn repack(
        &self,
        stream: &Stream,
        stored: Stored,
        held: MatrixFormat,
        args: &RepackArgs,
    ) -> Result<(), CudaError> {
        let function = self.module.function(kernel_name(stored, held), 0)?;
        self.launch(stream, function, args.n_blocks(), &mut [arg(args)])
    }

    /// Enqueues the change of a format's tiles to the form for kernels built with `WIDE_SCALES`;
    /// bf16 has but one form.
    ///
    /// # Errors
    /// The driver fails.
    pub fn widen(
        &self,
        stream: &Stream,
        format: MatrixFormat,
        tiles: u64,
        n_bytes: u64,
    ) -> Result<(), CudaError> {
        let Some(bias) = pack::narrow_bias(format).map(u32::from) else {
            return Ok(());
        };
        let tile_bytes = pack::tile_bytes(format) as u32;
        let n_tiles = n_bytes / u64::from(tile_bytes);
        let n_blocks = (n_tiles * pack::TILE_SCALES as u64).div_ceil(256) as u32;
        let function = self.module.function("widen", 0)?;
        let mut args = [arg(&tiles), arg(&n_tiles), arg(&tile_bytes), arg(&bias)];
        self.launch(stream, function, n_blocks, &mut args)
    }

    fn launch(
        &self,
        stream: &Stream,
        function: Function,
        n_blocks: u32,
        args: &mut [*mut std::ffi::c_void],
    ) -> Result<(), CudaError> {
        // SAFETY: the functions above pass their kernel's own arguments, and the pieces that they
        // tell of lie in a slot and in tiles of the lengths in `pieces.rs` and `model.rs`.
        unsafe { stream.launch(function, n_blocks, 256, args) }
    }
}

fn arg<T>(value: &T) -> *mut std::ffi::c_void {
    ptr::from_ref(value).cast_mut().cast()
}
