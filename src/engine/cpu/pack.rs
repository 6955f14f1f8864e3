//! Tensors as stored to weights as the kernels read them.
//!
//! Every function takes one tensor's bytes, packs its tiles in parallel, and lets the system
//! drop the file's pages. Formats change only as the precision asked for says: MXFP4 to bf16 is
//! exact, bf16 to MXFP4 quantizes.

use rayon::prelude::*;

use super::buffer::Buffer;
use super::lanes::LANES;
use super::matmul_bf16::Projection;
use super::moe_matmul::Experts;
use super::swiglu::PAIRS;
use super::weights::{Bf16Tiles, Mxfp4Tiles, Vector, pack_bf16, pack_mxfp4_block};
use crate::engine::EngineError;
use crate::engine::checkpoint::layers::Parts;
use crate::engine::checkpoint::{
    Checkpoint, CheckpointError, ExpertTensors, Layer, Tensor, VectorFormat, WeightFormat,
};
use crate::quant::{bf16, mxfp4};

/// Element `i` of a vector tensor.
fn element(tensor: &Tensor, i: usize) -> f32 {
    match tensor.dtype {
        safetensors::Dtype::F32 => {
            let bytes = &tensor.bytes[4 * i..4 * i + 4];
            f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        }
        // The checkpoint has checked that there is no third dtype.
        _ => bf16::to_f32(tensor.bf16(i)),
    }
}

/// `n` elements, the `i`-th from `of(i)`, in the given format; bf16 is taken only where every
/// tensor of the checkpoint is bf16, so nothing is rounded.
fn vector_from(
    format: VectorFormat,
    n: usize,
    of: impl Fn(usize) -> f32,
) -> Result<Vector, EngineError> {
    let what = "a norm, bias or sink";
    match format {
        VectorFormat::Bf16 => {
            let mut values = Buffer::zeroed(what, n)?;
            for (i, value) in values.iter_mut().enumerate() {
                *value = bf16::from_f32(of(i));
            }
            Ok(Vector::Bf16(values))
        }
        VectorFormat::F32 => {
            let mut values = Buffer::zeroed(what, n)?;
            for (i, value) in values.iter_mut().enumerate() {
                *value = of(i);
            }
            Ok(Vector::F32(values))
        }
    }
}

pub fn vector(
    checkpoint: &Checkpoint,
    format: VectorFormat,
    tensor: &Tensor,
) -> Result<Vector, EngineError> {
    let n = tensor.shape.iter().product();
    let vector = vector_from(format, n, |i| element(tensor, i))?;
    checkpoint.release(tensor);
    Ok(vector)
}

pub fn embedding(checkpoint: &Checkpoint) -> Result<Buffer<u16>, EngineError> {
    let tensor = checkpoint.embedding()?;
    let mut values = Buffer::zeroed("the embedding", tensor.bytes.len() / 2)?;
    values
        .par_chunks_mut(1 << 16)
        .zip(tensor.bytes.par_chunks(1 << 17))
        .for_each(|(out, bytes)| {
            for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = u16::from_le_bytes(bytes);
            }
        });
    checkpoint.release(&tensor);
    Ok(values)
}

pub fn lm_head(checkpoint: &Checkpoint) -> Result<Projection, EngineError> {
    let tensor = checkpoint.lm_head()?;
    let parts = Parts {
        weights: vec![tensor],
        biases: Vec::new(),
    };
    projection(checkpoint, VectorFormat::Bf16, &parts)
}

pub fn projection(
    checkpoint: &Checkpoint,
    format: VectorFormat,
    parts: &Parts,
) -> Result<Projection, EngineError> {
    let n_k = parts.weights.first().map_or(0, |tensor| tensor.shape[1]);
    let n_out = parts.weights.iter().map(|tensor| tensor.shape[0]).sum();
    let mut tiles = Bf16Tiles::zeroed("a projection", usize::div_ceil(n_out, LANES), n_k)?;
    let tile_words = tiles.tile_words();
    let pack = |(tile, words): (usize, &mut [u32])| {
        for lane in 0..LANES {
            let Some((tensor, row)) = part_of(&parts.weights, tile * LANES + lane) else {
                return;
            };
            for k in 0..n_k {
                pack_bf16(words, lane, k, tensor.bf16(row * n_k + k));
            }
        }
    };
    tiles
        .words_mut()
        .par_chunks_mut(tile_words)
        .enumerate()
        .for_each(pack);
    let bias = match parts.biases.is_empty() {
        true => None,
        false => Some(vector_from(format, n_out, |i| {
            let (tensor, i) = part_of(&parts.biases, i).expect("biases are as long as weights");
            element(tensor, i)
        })?),
    };
    parts
        .weights
        .iter()
        .for_each(|tensor| checkpoint.release(tensor));
    Ok(Projection { n_out, tiles, bias })
}

/// The part that holds row `row`, and the row's index in it.
fn part_of<'a, 'b>(parts: &'b [Tensor<'a>], mut row: usize) -> Option<(&'b Tensor<'a>, usize)> {
    for tensor in parts {
        if row < tensor.shape[0] {
            return Some((tensor, row));
        }
        row -= tensor.shape[0];
    }
    None
}

/// Where lane `lane` of tile `tile` of an expert's gate-up comes from: gates in the lower lanes,
/// ups in the upper ones, interleaved in the file.
fn gate_up_row(tile: usize, lane: usize) -> usize {
    2 * (tile * PAIRS + lane % PAIRS) + lane / PAIRS
}

fn plain_row(tile: usize, lane: usize) -> usize {
    tile * LANES + lane
}

/// Packs the experts of a layer.
pub fn experts<W: PackedTiles>(
    checkpoint: &Checkpoint,
    format: WeightFormat,
    layer: &Layer,
) -> Result<Experts<W>, EngineError> {
    let config = checkpoint.config();
    let (hidden, width) = (config.hidden, config.intermediate);
    let shape = |n_out, n_k| ExpertShape {
        n_experts: config.n_experts,
        n_out,
        n_k,
    };
    let gate_up_bias = vector_from(format.vectors, config.n_experts * 2 * width, |i| {
        let (expert, lane) = (i / (2 * width), i % (2 * width));
        let row = gate_up_row(lane / LANES, lane % LANES);
        element(&layer.gate_up_bias, expert * 2 * width + row)
    })?;
    let experts = Experts {
        n_experts: config.n_experts,
        gate_up: W::pack(&layer.gate_up, shape(2 * width, hidden), gate_up_row)?,
        gate_up_bias,
        down: W::pack(&layer.down, shape(hidden, width), plain_row)?,
        down_bias: vector(checkpoint, format.vectors, &layer.down_bias)?,
    };
    for tensors in [&layer.gate_up, &layer.down] {
        match tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                checkpoint.release(codes);
                checkpoint.release(scales);
            }
            ExpertTensors::Bf16 { values, .. } => checkpoint.release(values),
        }
    }
    Ok(experts)
}

/// Shape of an expert projection.
#[derive(Clone, Copy)]
pub struct ExpertShape {
    n_experts: usize,
    n_out: usize,
    n_k: usize,
}

/// Blocks of 32 k of an expert projection, whatever the file's format.
struct Source<'a> {
    tensors: &'a ExpertTensors<'a>,
    shape: ExpertShape,
}

impl Source<'_> {
    /// Scale and codes of a block, quantized when the file holds bf16.
    fn mxfp4(
        &self,
        expert: usize,
        row: usize,
        block: usize,
    ) -> Result<(u8, [u8; mxfp4::BLOCK_BYTES]), CheckpointError> {
        match self.tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                let n_blocks = self.shape.n_k / mxfp4::BLOCK;
                let index = (expert * self.shape.n_out + row) * n_blocks + block;
                let codes = codes.bytes.as_chunks::<{ mxfp4::BLOCK_BYTES }>().0[index];
                let byte = scales.bytes[index];
                if !mxfp4::is_loadable(byte, &codes) {
                    return Err(CheckpointError::Scale {
                        path: scales.path.to_owned(),
                        tensor: scales.name.clone(),
                        block: index,
                        byte,
                    });
                }
                Ok((byte, codes))
            }
            ExpertTensors::Bf16 { values, .. } => {
                let mut block_values = [0.0; mxfp4::BLOCK];
                for (i, value) in block_values.iter_mut().enumerate() {
                    let k = block * mxfp4::BLOCK + i;
                    *value = bf16::to_f32(values.bf16(self.element(expert, row, k)));
                }
                mxfp4::pack(&block_values).ok_or_else(|| CheckpointError::NotFinite {
                    path: values.path.to_owned(),
                    tensor: values.name.clone(),
                    element: self.element(expert, row, block * mxfp4::BLOCK),
                })
            }
        }
    }

    /// The bf16 bits of a block's values; exact.
    fn bf16(
        &self,
        expert: usize,
        row: usize,
        block: usize,
    ) -> Result<[u16; mxfp4::BLOCK], CheckpointError> {
        let mut bits = [0; mxfp4::BLOCK];
        match self.tensors {
            ExpertTensors::Mxfp4 { .. } => {
                let (scale, codes) = self.mxfp4(expert, row, block)?;
                for (bits, value) in bits.iter_mut().zip(mxfp4::unpack(scale, &codes)) {
                    *bits = bf16::from_f32(value);
                }
            }
            ExpertTensors::Bf16 { values, .. } => {
                for (i, bits) in bits.iter_mut().enumerate() {
                    *bits = values.bf16(self.element(expert, row, block * mxfp4::BLOCK + i));
                }
            }
        }
        Ok(bits)
    }

    fn element(&self, expert: usize, row: usize, k: usize) -> usize {
        let ExpertShape { n_out, n_k, .. } = self.shape;
        match self.tensors {
            ExpertTensors::Bf16 {
                transposed: true, ..
            } => (expert * n_k + k) * n_out + row,
            _ => (expert * n_out + row) * n_k + k,
        }
    }
}

/// Tiles that experts can be packed into.
pub trait PackedTiles: Sized {
    /// Packs a projection; `row_of(tile, lane)` is the file's row within the expert.
    fn pack(
        tensors: &ExpertTensors,
        shape: ExpertShape,
        row_of: fn(usize, usize) -> usize,
    ) -> Result<Self, EngineError>;
}

impl PackedTiles for Mxfp4Tiles {
    fn pack(
        tensors: &ExpertTensors,
        shape: ExpertShape,
        row_of: fn(usize, usize) -> usize,
    ) -> Result<Self, EngineError> {
        let tiles_an_expert = shape.n_out / LANES;
        let n_tiles = shape.n_experts * tiles_an_expert;
        let mut packed = Self::zeroed("experts", n_tiles, shape.n_k)?;
        let source = Source { tensors, shape };
        packed
            .bytes_mut()
            .par_chunks_mut(Self::tile_bytes(shape.n_k))
            .enumerate()
            .try_for_each(|(tile, bytes)| {
                let (expert, tile) = (tile / tiles_an_expert, tile % tiles_an_expert);
                for lane in 0..LANES {
                    for block in 0..shape.n_k / mxfp4::BLOCK {
                        let (scale, codes) = source.mxfp4(expert, row_of(tile, lane), block)?;
                        pack_mxfp4_block(bytes, lane, block, scale, &codes);
                    }
                }
                Ok::<_, CheckpointError>(())
            })?;
        Ok(packed)
    }
}

impl PackedTiles for Bf16Tiles {
    fn pack(
        tensors: &ExpertTensors,
        shape: ExpertShape,
        row_of: fn(usize, usize) -> usize,
    ) -> Result<Self, EngineError> {
        let tiles_an_expert = shape.n_out / LANES;
        let n_tiles = shape.n_experts * tiles_an_expert;
        let mut packed = Self::zeroed("experts", n_tiles, shape.n_k)?;
        let tile_words = packed.tile_words();
        let source = Source { tensors, shape };
        packed
            .words_mut()
            .par_chunks_mut(tile_words)
            .enumerate()
            .try_for_each(|(tile, words)| {
                let (expert, tile) = (tile / tiles_an_expert, tile % tiles_an_expert);
                for lane in 0..LANES {
                    for block in 0..shape.n_k / mxfp4::BLOCK {
                        let bits = source.bf16(expert, row_of(tile, lane), block)?;
                        for (i, bits) in bits.into_iter().enumerate() {
                            pack_bf16(words, lane, block * mxfp4::BLOCK + i, bits);
                        }
                    }
                }
                Ok::<_, CheckpointError>(())
            })?;
        Ok(packed)
    }
}
