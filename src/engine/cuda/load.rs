//! A checkpoint's weights onto the device: reader threads, each with a stream and two slots.
//!
//! ```text
//! file -- pread --> pinned half of a slot -- copy --> device half -- repack --> tiles
//! ```
//!
//! A thread reads into one slot while its other one is copied and repacked; threads' streams run
//! side by side, so reading, copying and repacking overlap. Nothing of a weight is kept on the
//! host. What may be wrong with values is found by the kernels and told in a word for each matrix.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::buffer::{DeviceBuffer, PinnedBuffer};
use super::device::Device;
use super::error::CudaError;
use super::graph::Event;
use super::model::{Bytes, CudaModel, Experts, LayerWeights, Projection, assemble, kinds};
use super::pack::{self, RowOrder};
use super::pieces::{Matrix, Piece, Source, Then, copies};
use super::repack::Repack;
use super::stream::Stream;
use crate::engine::checkpoint::layers::Parts;
use crate::engine::checkpoint::{
    Checkpoint, ExpertTensors, MatrixFormat, Precision, Tensor, VectorFormat, WeightFormat,
};
use crate::engine::config::ModelConfig;
use crate::engine::{BackendMemory, EngineError};
use crate::quant::bf16;

/// Most bytes of all slots: on the device, and as many page-locked on the host.
pub const MAX_STAGING_BYTES: u64 = 256 << 20;

/// Most reader threads: that many fill the link out of the page cache.
const MAX_READERS: usize = 8;
/// A thread's slots.
const SLOTS: usize = 2;
const MAX_SLOT_BYTES: usize = 16 << 20;
/// Rather fewer threads than slots smaller than this.
const GOOD_SLOT_BYTES: usize = 4 << 20;

/// What loading may take beside the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staging {
    /// Of all slots, on the device and on the host alike. Slots that hold one row of tiles are
    /// made even where this is less.
    pub n_bytes: u64,
    pub n_threads: usize,
}

impl Default for Staging {
    fn default() -> Self {
        Self {
            n_bytes: MAX_STAGING_BYTES,
            n_threads: MAX_READERS,
        }
    }
}

impl Staging {
    /// Within a plan: slots take the room of KV and workspace, which are allocated when the slots
    /// are gone, so loading takes no more than the run; and a quarter of the host's budget.
    pub fn within(planned: &BackendMemory, host_memory: Option<u64>, n_threads: usize) -> Self {
        let on_device = planned.kv_bytes.saturating_add(planned.workspace_bytes);
        let on_host = host_memory.map_or(u64::MAX, |bytes| bytes / 4);
        Self {
            n_bytes: on_device.min(on_host).min(MAX_STAGING_BYTES),
            n_threads,
        }
    }

    /// Reader threads, and the bytes of a slot of at least `least`.
    fn split(self, least: usize) -> (usize, usize) {
        let slot = |n_readers: usize| self.n_bytes as usize / (SLOTS * n_readers);
        let mut n_readers = self.n_threads.clamp(1, MAX_READERS);
        while n_readers > 1 && slot(n_readers) < least.max(GOOD_SLOT_BYTES) {
            n_readers -= 1;
        }
        (n_readers, slot(n_readers).min(MAX_SLOT_BYTES).max(least))
    }
}

impl CudaModel {
    /// Loads a checkpoint's weights.
    ///
    /// # Errors
    /// A file that cannot be read, a scale byte or a value that cannot be held, out of memory, or
    /// counts that differ from the plan.
    pub fn load(
        device: &Arc<Device>,
        repack: &Repack,
        checkpoint: &Checkpoint,
        precision: Precision,
        staging: Staging,
    ) -> Result<Self, EngineError> {
        let n_layers = checkpoint.config().n_layers();
        // A word for each layer's four matrices and the lm head, and the greatest scale.
        let mut report = vec![u64::MAX; n_layers * 4 + 2];
        report[n_layers * 4 + 1] = 0;
        let words: DeviceBuffer<u64> = device.alloc("a report", report.len())?;
        words.upload(0, &report)?;
        device.synchronize()?;

        let mut loader = Loader {
            device,
            checkpoint,
            config: checkpoint.config(),
            format: checkpoint.weight_format(precision),
            matrices: Vec::new(),
            copies: Vec::new(),
            report: &words,
        };
        let mut model = loader.allocate()?;
        let matrices = &loader.matrices;
        let least = matrices.iter().map(Matrix::least_slot).max().unwrap_or(1);
        let (n_readers, slot_bytes) = staging.split(least);
        let mut pieces = Vec::new();
        for (tensor, to) in &loader.copies {
            pieces.extend(copies(tensor, *to, slot_bytes));
        }
        for matrix in matrices {
            pieces.extend(matrix.pieces(slot_bytes));
        }
        transfer(device, repack, &pieces, n_readers, slot_bytes)?;

        words.download(0, &mut report)?;
        for (matrix, &bad) in matrices.iter().zip(&report) {
            if let Some(error) = matrix.error(bad) {
                return Err(error.into());
            }
        }
        model.wide_scales = report[n_layers * 4 + 1] > 0;
        if model.wide_scales {
            let stream = Stream::new(device)?;
            for (format, tiles) in model.matrices() {
                repack.widen(&stream, format, tiles.at(0), tiles.n_bytes())?;
            }
            stream.synchronize()?;
        }
        device.synchronize()?;
        model.checked()
    }
}

/// Allocates the weights and notes what goes where.
struct Loader<'a> {
    device: &'a Arc<Device>,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    format: WeightFormat,
    matrices: Vec<Matrix<'a>>,
    copies: Vec<(Tensor<'a>, u64)>,
    report: &'a DeviceBuffer<u64>,
}

impl<'a> Loader<'a> {
    fn allocate(&mut self) -> Result<CudaModel, EngineError> {
        let config = self.config;
        let head_dim = config.head_dim;
        let attention = self.format.attention;
        let embedding = self.as_stored(self.checkpoint.embedding()?)?;
        let mut layers = Vec::with_capacity(config.n_layers());
        for (i, (kind, kind_index)) in kinds(config).enumerate() {
            let tensors = self.checkpoint.layer(i)?;
            let mut router = tensors.router;
            layers.push(LayerWeights {
                kind,
                kind_index,
                attention_norm: self.vector(&[tensors.attention_norm])?,
                qkv: self.projection(attention, tensors.qkv, RowOrder::Rotary { head_dim })?,
                sinks: self.vector(&[tensors.sinks])?,
                out: self.projection(attention, tensors.out, RowOrder::Natural)?,
                mlp_norm: self.vector(&[tensors.mlp_norm])?,
                router: self.as_stored(router.weights.remove(0))?,
                router_bias: self.vector(&router.biases)?,
                gate_up: self.experts(
                    tensors.gate_up,
                    tensors.gate_up_bias,
                    (2 * config.intermediate, config.hidden),
                    RowOrder::GateUp,
                )?,
                down: self.experts(
                    tensors.down,
                    tensors.down_bias,
                    (config.hidden, config.intermediate),
                    RowOrder::Natural,
                )?,
            });
        }
        let final_norm = self.vector(&[self.checkpoint.final_norm()?])?;
        let parts = Parts {
            weights: vec![self.checkpoint.lm_head()?],
            biases: Vec::new(),
        };
        let lm_head = self.projection(self.format.lm_head, parts, RowOrder::Natural)?;
        let ends = (embedding, final_norm, lm_head);
        Ok(assemble(config, self.format, false, ends, layers))
    }

    fn as_stored(&mut self, tensor: Tensor<'a>) -> Result<Bytes, CudaError> {
        let buffer: Bytes = self.device.alloc(&tensor.name, tensor.bytes.len())?;
        self.copies.push((tensor, buffer.at(0)));
        Ok(buffer)
    }

    /// Vectors that follow each other, in the format of all the checkpoint's vectors. They are
    /// small, and go at once.
    fn vector(&self, tensors: &[Tensor]) -> Result<Bytes, CudaError> {
        let mut bytes = Vec::new();
        for tensor in tensors {
            let is_f32 = tensor.dtype == safetensors::Dtype::F32;
            match self.format.vectors {
                VectorFormat::F32 if !is_f32 => {
                    for i in 0..tensor.bytes.len() / 2 {
                        bytes.extend(bf16::to_f32(tensor.bf16(i)).to_le_bytes());
                    }
                }
                // bf16 is the format only where no vector is f32.
                _ => bytes.extend_from_slice(tensor.bytes),
            }
        }
        let buffer = self.device.alloc("a norm, bias or sink", bytes.len())?;
        buffer.upload(0, &bytes)?;
        tensors.iter().for_each(|it| self.checkpoint.release(it));
        Ok(buffer)
    }

    fn projection(
        &mut self,
        format: MatrixFormat,
        parts: Parts<'a>,
        order: RowOrder,
    ) -> Result<Projection, CudaError> {
        let n_k = parts.weights.first().map_or(0, |tensor| tensor.shape[1]);
        let n_out = parts.weights.iter().map(|tensor| tensor.shape[0]).sum();
        let n_bytes = pack::matrix_bytes(format, n_out, n_k);
        let tiles: Bytes = self.device.alloc("a projection", n_bytes)?;
        let bias = match parts.biases.is_empty() {
            true => None,
            false => Some(self.vector(&parts.biases)?),
        };
        self.note(Matrix {
            source: Source::Rows(parts.weights),
            n_experts: 1,
            n_out,
            n_k,
            order,
            held: format,
            tiles: tiles.at(0),
            bad: 0,
            greatest: 0,
        });
        Ok(Projection {
            format,
            n_out,
            n_k,
            tiles,
            bias,
        })
    }

    fn experts(
        &mut self,
        tensors: ExpertTensors<'a>,
        bias: Tensor<'a>,
        (n_out, n_k): (usize, usize),
        order: RowOrder,
    ) -> Result<Experts, CudaError> {
        let n_experts = self.config.n_experts;
        let format = self.format.experts;
        let n_bytes = n_experts * pack::matrix_bytes(format, n_out, n_k);
        let tiles: Bytes = self.device.alloc("experts", n_bytes)?;
        self.note(Matrix {
            source: Source::Experts(tensors),
            n_experts,
            n_out,
            n_k,
            order,
            held: format,
            tiles: tiles.at(0),
            bad: 0,
            greatest: 0,
        });
        Ok(Experts {
            format,
            n_out,
            n_k,
            tiles,
            bias: self.vector(&[bias])?,
        })
    }

    fn note(&mut self, matrix: Matrix<'a>) {
        self.matrices.push(Matrix {
            bad: self.report.at(self.matrices.len()),
            greatest: self.report.at(self.report.len() - 1),
            ..matrix
        });
    }
}

/// A piece's place on the host and on the device.
struct Slot {
    pinned: PinnedBuffer<u8>,
    staged: Bytes,
    /// The device is done with both.
    done: Event,
}

impl Slot {
    fn new(device: &Arc<Device>, n_bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            pinned: device.alloc_pinned(n_bytes)?,
            staged: device.alloc("a slot for raw weights", n_bytes)?,
            done: device.event()?,
        })
    }
}

/// Reads pieces and repacks them, until all are on the device.
///
/// # Errors
/// A file cannot be read, or the driver fails; the first of the threads' errors.
pub fn transfer(
    device: &Arc<Device>,
    repack: &Repack,
    pieces: &[Piece],
    n_readers: usize,
    slot_bytes: usize,
) -> Result<(), EngineError> {
    let work = Transfer {
        device,
        repack,
        pieces,
        slot_bytes,
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..n_readers.min(pieces.len()))
            .map(|_| scope.spawn(|| work.run()))
            .collect();
        let results = readers.into_iter().map(|reader| reader.join());
        // All are joined before the first error is told.
        let results: Vec<_> = results.collect();
        let result = |joined: std::thread::Result<_>| match joined {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        results.into_iter().try_for_each(result)
    })
}

/// What the reader threads share.
struct Transfer<'a> {
    device: &'a Arc<Device>,
    repack: &'a Repack,
    pieces: &'a [Piece<'a>],
    slot_bytes: usize,
    next: AtomicUsize,
    /// Some thread has stopped with an error: the others may.
    failed: AtomicBool,
}

impl Transfer<'_> {
    fn run(&self) -> Result<(), EngineError> {
        let result = self.read();
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn read(&self) -> Result<(), EngineError> {
        let mut slots = Vec::new();
        for _ in 0..SLOTS {
            slots.push(Slot::new(self.device, self.slot_bytes)?);
        }
        // Dropped before the slots are, and waits for what uses them.
        let stream = Stream::new(self.device)?;
        for turn in 0.. {
            let piece = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed));
            let Some(piece) = piece.filter(|_| !self.failed.load(Ordering::Relaxed)) else {
                break;
            };
            let slot = &mut slots[turn % SLOTS];
            slot.done.wait()?;
            piece.read(slot.pinned.values_mut())?;
            let n_bytes = piece.n_bytes();
            match piece.then {
                Then::Copy { to } => stream.upload(to, &slot.pinned, n_bytes)?,
                Then::Repack { stored, held, args } => {
                    let staged = slot.staged.at(0);
                    stream.upload(staged, &slot.pinned, n_bytes)?;
                    let args = args.in_slot(staged);
                    self.repack.repack(&stream, stored, held, &args)?;
                }
            }
            stream.record(&slot.done)?;
        }
        Ok(stream.synchronize()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_fit_the_room() {
        let split = |n_bytes: u64, least| {
            let staging = Staging {
                n_bytes,
                n_threads: 16,
            };
            staging.split(least)
        };
        assert_eq!(split(MAX_STAGING_BYTES, 1), (8, 16 << 20));
        assert_eq!(split(64 << 20, 1), (8, 4 << 20));
        // Fewer threads before small slots.
        assert_eq!(split(16 << 20, 1), (2, 4 << 20));
        assert_eq!(split(2 << 20, 1), (1, 1 << 20));
        assert_eq!(split(0, 5000), (1, 5000));
    }

    #[test]
    fn loading_stays_within_the_plan() {
        let planned = BackendMemory {
            weights_bytes: 1 << 40,
            kv_bytes: 3 << 20,
            workspace_bytes: 5 << 20,
        };
        assert_eq!(Staging::within(&planned, None, 4).n_bytes, 8 << 20);
        assert_eq!(Staging::within(&planned, Some(4 << 20), 4).n_bytes, 1 << 20);
    }
}
