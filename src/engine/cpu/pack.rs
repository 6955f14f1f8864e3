//! Tensors as stored to weights as the kernels read them.
//!
//! Every function takes one tensor's bytes, packs its tiles in parallel, and lets the system
//! drop the file's pages. Formats change only as the precision asked for says: MXFP4 to MXINT8
//! and to bf16 is exact, bf16 to MXFP4 and to MXINT8 quantizes, and what that did to the values
//! is summed up in a [`Deviation`].

use rayon::prelude::*;

use super::buffer::Buffer;
use super::lanes::LANES;
use super::matmul::Projection;
use super::moe_matmul::Experts;
use super::swiglu::PAIRS;
use super::weights::{
    Bf16Tiles, Matrix, Mxfp4Tiles, Mxint8Tiles, Vector, pack_bf16_lanes, pack_bf16_run,
    pack_mxfp4_lanes, pack_mxint8_block, prefetch,
};
use crate::engine::EngineError;
use crate::engine::checkpoint::blocks::{
    BLOCK, Blocks, DenseBlocks, ExpertBlocks, StoredBlock, part_of,
};
use crate::engine::checkpoint::layers::Parts;
use crate::engine::checkpoint::{
    Checkpoint, CheckpointError, Deviation, ExpertTensors, Layer, MatrixFormat, Tensor,
    VectorFormat, WeightFormat,
};
use crate::quant::bf16;

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
    let mut values = Buffer::to_fill("the embedding", tensor.bytes.len() / 2)?;
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

pub fn lm_head(
    checkpoint: &Checkpoint,
    format: MatrixFormat,
) -> Result<(Projection, Deviation), EngineError> {
    let tensor = checkpoint.lm_head()?;
    let parts = Parts {
        weights: vec![tensor],
        biases: Vec::new(),
    };
    projection(checkpoint, format, VectorFormat::Bf16, &parts)
}

/// A dense matrix and its bias.
pub fn projection(
    checkpoint: &Checkpoint,
    format: MatrixFormat,
    vectors: VectorFormat,
    parts: &Parts,
) -> Result<(Projection, Deviation), EngineError> {
    let n_k = parts.weights.first().map_or(0, |tensor| tensor.shape[1]);
    let n_out = parts.weights.iter().map(|tensor| tensor.shape[0]).sum();
    let shape = MatrixShape {
        n_groups: 1,
        n_out,
        n_k,
    };
    let source = DenseBlocks {
        parts: &parts.weights,
        n_k,
    };
    let (tiles, deviation) = matrix("a projection", format, shape, &source, plain_row)?;
    let bias = match parts.biases.is_empty() {
        true => None,
        false => Some(vector_from(vectors, n_out, |i| {
            let (tensor, i) = part_of(&parts.biases, i).expect("biases are as long as weights");
            element(tensor, i)
        })?),
    };
    parts
        .weights
        .iter()
        .for_each(|tensor| checkpoint.release(tensor));
    Ok((Projection { n_out, tiles, bias }, deviation))
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
pub fn experts(
    checkpoint: &Checkpoint,
    format: WeightFormat,
    layer: &Layer,
) -> Result<(Experts, Deviation), EngineError> {
    let config = checkpoint.config();
    let (hidden, width) = (config.hidden, config.intermediate);
    let pack = |tensors: &ExpertTensors, n_out, n_k, row_of| {
        let shape = MatrixShape {
            n_groups: config.n_experts,
            n_out,
            n_k,
        };
        let source = ExpertBlocks {
            tensors,
            n_out,
            n_k,
        };
        matrix("experts", format.experts, shape, &source, row_of)
    };
    let gate_up_bias = vector_from(format.vectors, config.n_experts * 2 * width, |i| {
        let (expert, lane) = (i / (2 * width), i % (2 * width));
        let row = gate_up_row(lane / LANES, lane % LANES);
        element(&layer.gate_up_bias, expert * 2 * width + row)
    })?;
    let (gate_up, mut deviation) = pack(&layer.gate_up, 2 * width, hidden, gate_up_row)?;
    let (down, of_down) = pack(&layer.down, hidden, width, plain_row)?;
    deviation += of_down;
    let experts = Experts {
        n_experts: config.n_experts,
        gate_up,
        gate_up_bias,
        down,
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
    Ok((experts, deviation))
}

/// Shape of a matrix: `n_groups` experts, or one, of `n_out` rows.
#[derive(Clone, Copy)]
struct MatrixShape {
    n_groups: usize,
    n_out: usize,
    n_k: usize,
}

/// Packs a matrix; `row_of(tile, lane)` is the file's row within the group. The sums of the
/// deviation run over tiles in order, so that they do not depend on the threads.
fn matrix(
    what: &str,
    format: MatrixFormat,
    shape: MatrixShape,
    source: &impl Blocks,
    row_of: fn(usize, usize) -> usize,
) -> Result<(Matrix, Deviation), EngineError> {
    let tiles_a_group = shape.n_out.div_ceil(LANES);
    let n_tiles = shape.n_groups * tiles_a_group;
    // Calls `put(lane, stored)` for the lanes of a tile's block that have a row.
    let each_lane = |tile: usize,
                     block: usize,
                     put: &mut dyn FnMut(usize, StoredBlock) -> Option<()>|
     -> Result<(), CheckpointError> {
        let (group, tile) = (tile / tiles_a_group, tile % tiles_a_group);
        for lane in 0..LANES {
            let row = row_of(tile, lane);
            if let Some(stored) = source.block(group, row, block)? {
                put(lane, stored).ok_or_else(|| source.not_finite(group, row, block))?;
            }
        }
        Ok(())
    };
    let n_blocks = shape.n_k / BLOCK;
    Ok(match format {
        MatrixFormat::Mxfp4 => {
            let mut packed = Mxfp4Tiles::zeroed(what, n_tiles, shape.n_k)?;
            let length = Mxfp4Tiles::tile_bytes(shape.n_k);
            let deviation = fill(packed.bytes_mut(), length, |tile, bytes, deviation| {
                let (group, of_group) = (tile / tiles_a_group, tile % tiles_a_group);
                let rows = (0..LANES).map(|lane| {
                    let row = row_of(of_group, lane);
                    (row < shape.n_out).then(|| source.mxfp4_row(group, row))?
                });
                // As they are stored, of all lanes.
                if let Some(rows) = rows.collect::<Option<Vec<_>>>() {
                    for (scales, codes) in &rows {
                        bring(scales);
                        bring(codes.as_flattened());
                    }
                    for block in 0..n_blocks {
                        let scales = std::array::from_fn(|lane| rows[lane].0[block]);
                        let codes = std::array::from_fn(|lane| rows[lane].1[block]);
                        pack_mxfp4_lanes(bytes, block, &scales, &codes);
                    }
                    return Ok(());
                }
                for block in 0..n_blocks {
                    let (mut scales, mut codes) = ([0; LANES], [[0; BLOCK / 2]; LANES]);
                    each_lane(tile, block, &mut |lane, stored| {
                        (scales[lane], codes[lane]) = stored.to_mxfp4(deviation)?;
                        Some(())
                    })?;
                    pack_mxfp4_lanes(bytes, block, &scales, &codes);
                }
                Ok(())
            })?;
            (Matrix::Mxfp4(packed), deviation)
        }
        MatrixFormat::Mxint8 => {
            let mut packed = Mxint8Tiles::zeroed(what, n_tiles, shape.n_k)?;
            let length = Mxint8Tiles::tile_bytes(shape.n_k);
            let deviation = fill(packed.bytes_mut(), length, |tile, bytes, deviation| {
                for block in 0..n_blocks {
                    each_lane(tile, block, &mut |lane, stored| {
                        let (scale, codes) = stored.to_mxint8(deviation)?;
                        pack_mxint8_block(bytes, lane, block, scale, &codes);
                        Some(())
                    })?;
                }
                Ok(())
            })?;
            (Matrix::Mxint8(packed), deviation)
        }
        MatrixFormat::Bf16 => {
            let mut packed = Bf16Tiles::zeroed(what, n_tiles, shape.n_k)?;
            let length = packed.tile_words();
            let deviation = fill(packed.words_mut(), length, |tile, words, _| {
                let (group, of_group) = (tile / tiles_a_group, tile % tiles_a_group);
                let rows = (0..LANES).map(|lane| source.bf16_row(group, row_of(of_group, lane)));
                // As they are stored, of all lanes.
                if let Some(rows) = rows.collect::<Option<Vec<_>>>() {
                    rows.iter().for_each(|row| bring(row));
                    let rows = std::array::from_fn(|lane| rows[lane]);
                    pack_bf16_lanes(words, &rows);
                    return Ok(());
                }
                for block in 0..n_blocks {
                    each_lane(tile, block, &mut |lane, stored| {
                        pack_bf16_run(words, lane, block * BLOCK, &stored.to_bf16());
                        Some(())
                    })?;
                }
                Ok(())
            })?;
            (Matrix::Bf16(packed), deviation)
        }
    })
}

/// Brings a row of a file to the cache, one line after the other: as a tile's lanes, 32 rows side by
/// side, the processor would wait for each.
fn bring(row: &[u8]) {
    const PAGE: usize = 4096;
    for page in row.chunks(PAGE) {
        // A page that is not there yet is not prefetched.
        std::hint::black_box(page[0]);
        prefetch(page, 0, page.len());
    }
}

/// Fills tiles of `length` words in parallel.
fn fill<T: Send>(
    words: &mut [T],
    length: usize,
    pack: impl Fn(usize, &mut [T], &mut Deviation) -> Result<(), CheckpointError> + Sync,
) -> Result<Deviation, CheckpointError> {
    let by_tile: Vec<Deviation> = words
        .par_chunks_mut(length)
        .enumerate()
        .map(|(tile, words)| {
            let mut deviation = Deviation::default();
            pack(tile, words, &mut deviation)?;
            Ok(deviation)
        })
        .collect::<Result<_, CheckpointError>>()?;
    let mut sum = Deviation::default();
    by_tile.into_iter().for_each(|tile| sum += tile);
    Ok(sum)
}
