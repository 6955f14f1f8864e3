//! Stored matrices in blocks of 32 values along K, whatever the file's format and layout, and
//! what a block becomes in another format.

use rayon::prelude::*;

use super::{
    ByClass, Checkpoint, CheckpointError, Deviation, ExpertTensors, MatrixFormat, Tensor,
    WeightFormat,
};
use crate::quant::{bf16, mxfp4, mxint8};

/// Elements under one scale, in every block format.
pub const BLOCK: usize = mxfp4::BLOCK;

/// 32 values along K as the file holds them.
pub enum StoredBlock {
    Mxfp4(u8, [u8; mxfp4::BLOCK_BYTES]),
    Bf16([u16; BLOCK]),
}

impl StoredBlock {
    /// In MXFP4, quantized when the file holds bf16; nothing when a value is not finite.
    pub fn to_mxfp4(&self, deviation: &mut Deviation) -> Option<(u8, [u8; mxfp4::BLOCK_BYTES])> {
        match self {
            Self::Mxfp4(scale, codes) => Some((*scale, *codes)),
            Self::Bf16(bits) => {
                let values = bits.map(bf16::to_f32);
                let (scale, codes) = mxfp4::pack(&values)?;
                compare(&values, &mxfp4::unpack(scale, &codes), deviation);
                Some((scale, codes))
            }
        }
    }

    /// In MXINT8: exact from MXFP4, quantized from bf16; nothing when a value is not finite.
    pub fn to_mxint8(&self, deviation: &mut Deviation) -> Option<(u8, [i8; BLOCK])> {
        match self {
            Self::Mxfp4(scale, codes) => Some(mxint8::from_mxfp4(*scale, codes)),
            Self::Bf16(bits) => {
                let values = bits.map(bf16::to_f32);
                let (scale, codes) = mxint8::pack(&values)?;
                compare(&values, &mxint8::unpack(scale, &codes), deviation);
                Some((scale, codes))
            }
        }
    }

    /// The bf16 bits of the values; exact.
    pub fn to_bf16(&self) -> [u16; BLOCK] {
        match self {
            Self::Mxfp4(scale, codes) => mxfp4::unpack(*scale, codes).map(bf16::from_f32),
            Self::Bf16(bits) => *bits,
        }
    }
}

fn compare(values: &[f32; BLOCK], held: &[f32; BLOCK], deviation: &mut Deviation) {
    for (&value, &held) in values.iter().zip(held) {
        deviation.add(value, held);
    }
}

/// A stored matrix in blocks of 32 k, whatever the file's format and layout.
pub trait Blocks: Sync {
    /// A block of a row of a group; nothing past the last row.
    fn block(
        &self,
        group: usize,
        row: usize,
        block: usize,
    ) -> Result<Option<StoredBlock>, CheckpointError>;

    /// All blocks of a row of a group, where the file has them in MXFP4 and none needs a closer look:
    /// scales, and the codes of each.
    fn mxfp4_row(&self, _group: usize, _row: usize) -> Option<Mxfp4Row<'_>> {
        None
    }

    /// All of a row, where the file has it as bf16 values that follow each other.
    fn bf16_row(&self, _group: usize, _row: usize) -> Option<&[u8]> {
        None
    }

    /// The error for a block that holds a value which is not finite.
    fn not_finite(&self, group: usize, row: usize, block: usize) -> CheckpointError;
}

/// Scales and codes of a row's blocks.
pub type Mxfp4Row<'a> = (&'a [u8], &'a [[u8; mxfp4::BLOCK_BYTES]]);

/// Rows of dense bf16 tensors that follow each other.
pub struct DenseBlocks<'a> {
    pub parts: &'a [Tensor<'a>],
    pub n_k: usize,
}

impl Blocks for DenseBlocks<'_> {
    fn block(
        &self,
        _group: usize,
        row: usize,
        block: usize,
    ) -> Result<Option<StoredBlock>, CheckpointError> {
        Ok(part_of(self.parts, row).map(|(tensor, row)| {
            let start = row * self.n_k + block * BLOCK;
            let bytes = &tensor.bytes[2 * start..][..2 * BLOCK];
            let bytes = bytes.as_chunks::<2>().0;
            StoredBlock::Bf16(std::array::from_fn(|i| u16::from_le_bytes(bytes[i])))
        }))
    }

    fn bf16_row(&self, _group: usize, row: usize) -> Option<&[u8]> {
        let (tensor, row) = part_of(self.parts, row)?;
        let n_bytes = 2 * self.n_k;
        Some(&tensor.bytes[row * n_bytes..][..n_bytes])
    }

    fn not_finite(&self, _group: usize, row: usize, block: usize) -> CheckpointError {
        let (tensor, row) = part_of(self.parts, row).expect("the block was read");
        not_finite(tensor, row * self.n_k + block * BLOCK)
    }
}

fn not_finite(tensor: &Tensor, element: usize) -> CheckpointError {
    CheckpointError::NotFinite {
        path: tensor.path.to_owned(),
        tensor: tensor.name.clone(),
        element,
    }
}

/// An expert projection.
pub struct ExpertBlocks<'a> {
    pub tensors: &'a ExpertTensors<'a>,
    pub n_out: usize,
    pub n_k: usize,
}

impl ExpertBlocks<'_> {
    /// Index of a bf16 value.
    fn element(&self, expert: usize, row: usize, k: usize) -> usize {
        let Self { n_out, n_k, .. } = *self;
        match self.tensors {
            ExpertTensors::Bf16 {
                transposed: true, ..
            } => (expert * n_k + k) * n_out + row,
            _ => (expert * n_out + row) * n_k + k,
        }
    }
}

impl Blocks for ExpertBlocks<'_> {
    fn block(
        &self,
        expert: usize,
        row: usize,
        block: usize,
    ) -> Result<Option<StoredBlock>, CheckpointError> {
        Ok(Some(match self.tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                let n_blocks = self.n_k / BLOCK;
                let index = (expert * self.n_out + row) * n_blocks + block;
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
                StoredBlock::Mxfp4(byte, codes)
            }
            ExpertTensors::Bf16 { values, .. } => StoredBlock::Bf16(std::array::from_fn(|i| {
                values.bf16(self.element(expert, row, block * BLOCK + i))
            })),
        }))
    }

    fn mxfp4_row(&self, expert: usize, row: usize) -> Option<Mxfp4Row<'_>> {
        let ExpertTensors::Mxfp4 { codes, scales } = self.tensors else {
            return None;
        };
        let n_blocks = self.n_k / BLOCK;
        let first = (expert * self.n_out + row) * n_blocks;
        let scales = &scales.bytes[first..][..n_blocks];
        let codes = codes.bytes.as_chunks::<{ mxfp4::BLOCK_BYTES }>().0;
        let is_plain = |byte: &u8| (mxfp4::SCALE_MIN..=mxfp4::SCALE_MAX).contains(byte);
        let rows = (scales, &codes[first..][..n_blocks]);
        scales.iter().all(is_plain).then_some(rows)
    }

    fn not_finite(&self, expert: usize, row: usize, block: usize) -> CheckpointError {
        match self.tensors {
            ExpertTensors::Mxfp4 { scales: values, .. } | ExpertTensors::Bf16 { values, .. } => {
                not_finite(values, self.element(expert, row, block * BLOCK))
            }
        }
    }
}

impl Checkpoint {
    /// What holding the weights in these formats does to their values, for a device that packs
    /// them out of the host's sight. Nothing is read where the formats hold what is stored.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn deviation(&self, format: WeightFormat) -> Result<ByClass<Deviation>, CheckpointError> {
        let config = self.config();
        let (hidden, width) = (config.hidden, config.intermediate);
        let mut sum = ByClass::<Deviation>::default();
        if self.in_place().is_some() {
            return Ok(sum);
        }
        let dense = |parts: &[Tensor], n_k: usize, held: MatrixFormat| {
            let n_rows = parts.iter().map(|tensor| tensor.shape[0]).sum();
            deviation_of(&DenseBlocks { parts, n_k }, 1, n_rows, n_k / BLOCK, held)
        };
        for i in 0..config.n_layers() {
            let layer = self.layer(i)?;
            if !format.attention.holds(MatrixFormat::Bf16) {
                sum.attention += dense(&layer.qkv.weights, hidden, format.attention)?;
                sum.attention += dense(&layer.out.weights, config.q_width(), format.attention)?;
            }
            if format.experts.holds(self.expert_format()) {
                continue;
            }
            for (tensors, n_out, n_k) in [
                (&layer.gate_up, 2 * width, hidden),
                (&layer.down, hidden, width),
            ] {
                let blocks = ExpertBlocks {
                    tensors,
                    n_out,
                    n_k,
                };
                let n_blocks = n_k / BLOCK;
                sum.experts +=
                    deviation_of(&blocks, config.n_experts, n_out, n_blocks, format.experts)?;
                if let ExpertTensors::Bf16 { values, .. } = tensors {
                    self.release(values);
                }
            }
        }
        if !format.lm_head.holds(MatrixFormat::Bf16) {
            sum.lm_head += dense(&[self.lm_head()?], hidden, format.lm_head)?;
        }
        Ok(sum)
    }
}

/// Sums over all blocks, a row at a time.
fn deviation_of(
    blocks: &impl Blocks,
    n_groups: usize,
    n_rows: usize,
    n_blocks: usize,
    held: MatrixFormat,
) -> Result<Deviation, CheckpointError> {
    let rows: Vec<Deviation> = (0..n_groups * n_rows)
        .into_par_iter()
        .map(|at| {
            let (group, row) = (at / n_rows, at % n_rows);
            let mut deviation = Deviation::default();
            for block in 0..n_blocks {
                let Some(stored) = blocks.block(group, row, block)? else {
                    continue;
                };
                let is_held = match held {
                    MatrixFormat::Mxfp4 => stored.to_mxfp4(&mut deviation).is_some(),
                    MatrixFormat::Mxint8 => stored.to_mxint8(&mut deviation).is_some(),
                    MatrixFormat::Bf16 => true,
                };
                if !is_held {
                    return Err(blocks.not_finite(group, row, block));
                }
            }
            Ok(deviation)
        })
        .collect::<Result<_, CheckpointError>>()?;
    let mut sum = Deviation::default();
    rows.into_iter().for_each(|row| sum += row);
    Ok(sum)
}

/// The part that holds row `row`, and the row's index in it.
pub fn part_of<'a, 'b>(parts: &'b [Tensor<'a>], mut row: usize) -> Option<(&'b Tensor<'a>, usize)> {
    for tensor in parts {
        if row < tensor.shape[0] {
            return Some((tensor, row));
        }
        row -= tensor.shape[0];
    }
    None
}
