//! Weights on their way to the device: every matrix cut into pieces that fit a slot, each with
//! the stretches of the file it is read from and what becomes of it. Pure but for the reading.
//!
//! A piece is some experts whole, or a stretch of one: of its rows, where rows are stored one
//! behind the other, or of its k, where the file is transposed; so what is read is one run of
//! bytes of each tensor, and blocks of tiles come out whole.

use super::pack::{BLOCK_TILES, GROUP_K, RowOrder, TILE_M, n_groups};
use super::repack::{RepackArgs, Stored, order_number};
use crate::engine::EngineError;
use crate::engine::checkpoint::blocks::{Blocks, DenseBlocks, ExpertBlocks};
use crate::engine::checkpoint::{CheckpointError, ExpertTensors, MatrixFormat, Tensor};
use crate::quant::mxfp4;

/// What lies in a slot begins at multiples of so many bytes.
const ALIGNED: usize = 256;

/// Where a matrix's values are.
pub enum Source<'a> {
    /// bf16 rows, part behind part.
    Rows(Vec<Tensor<'a>>),
    Experts(ExpertTensors<'a>),
}

/// A matrix, or one for each expert: where it comes from and where its tiles go.
pub struct Matrix<'a> {
    pub source: Source<'a>,
    pub n_experts: usize,
    pub n_out: usize,
    pub n_k: usize,
    pub order: RowOrder,
    pub held: MatrixFormat,
    /// Address of the first expert's tiles.
    pub tiles: u64,
    /// Addresses of the words that kernels/repack.cu reports to.
    pub bad: u64,
    pub greatest: u64,
}

/// A run of a tensor's bytes and its place in a slot.
struct Read<'a> {
    tensor: Tensor<'a>,
    start: usize,
    n_bytes: usize,
    at: usize,
}

/// What becomes of a piece.
#[derive(Clone, Copy, Debug)]
pub enum Then {
    /// It stays as it is, at this address.
    Copy { to: u64 },
    /// It is repacked; values and scales count from the slot's begin.
    Repack {
        stored: Stored,
        held: MatrixFormat,
        args: RepackArgs,
    },
}

/// What a slot takes at a time.
pub struct Piece<'a> {
    reads: Vec<Read<'a>>,
    pub then: Then,
}

impl Piece<'_> {
    /// Bytes of the slot that it takes.
    pub fn n_bytes(&self) -> usize {
        let ends = self.reads.iter().map(|read| read.at + read.n_bytes);
        ends.max().unwrap_or(0)
    }

    /// Reads it into a slot.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, slot: &mut [u8]) -> Result<(), EngineError> {
        for read in &self.reads {
            let out = &mut slot[read.at..][..read.n_bytes];
            read.tensor.read(read.start, out)?;
        }
        Ok(())
    }
}

impl RepackArgs {
    /// For a slot at this address.
    pub fn in_slot(mut self, address: u64) -> Self {
        self.values += address;
        self.scales += address;
        self
    }
}

/// Pieces of a tensor that stays as it is.
pub fn copies<'a>(tensor: &Tensor<'a>, to: u64, slot_bytes: usize) -> Vec<Piece<'a>> {
    let n_bytes = tensor.bytes.len();
    let starts = (0..n_bytes).step_by(slot_bytes);
    let piece = |start: usize| Piece {
        reads: vec![Read {
            tensor: tensor.clone(),
            start,
            n_bytes: slot_bytes.min(n_bytes - start),
            at: 0,
        }],
        then: Then::Copy {
            to: to + start as u64,
        },
    };
    starts.map(piece).collect()
}

/// Rows of a block of tiles: what is packed is made of whole ones.
const BLOCK_ROWS: usize = BLOCK_TILES * TILE_M;

/// Some experts, rows and k of a matrix.
struct Stretch {
    first_expert: usize,
    n_experts: usize,
    first_row: usize,
    n_rows: usize,
    first_k: usize,
    n_k: usize,
}

impl<'a> Matrix<'a> {
    fn stored(&self) -> Stored {
        match &self.source {
            Source::Experts(ExpertTensors::Mxfp4 { .. }) => Stored::Mxfp4,
            Source::Experts(ExpertTensors::Bf16 {
                transposed: true, ..
            }) => Stored::Bf16Transposed,
            _ => Stored::Bf16,
        }
    }

    /// Lines that are stored one behind the other, the fewest that whole blocks are made of, and
    /// the bytes of one: rows, or where transposed k.
    fn lines(&self) -> (usize, usize, usize) {
        let unit = match self.order {
            // Whole heads, too: the least common multiple.
            RowOrder::Rotary { head_dim } => (head_dim..)
                .step_by(head_dim)
                .find(|n_rows| n_rows.is_multiple_of(BLOCK_ROWS))
                .unwrap_or(head_dim),
            _ => BLOCK_ROWS,
        };
        match self.stored() {
            Stored::Mxfp4 => (
                self.n_out,
                unit,
                self.n_k / mxfp4::BLOCK * (mxfp4::BLOCK_BYTES + 1),
            ),
            Stored::Bf16 => (self.n_out, unit, self.n_k * 2),
            Stored::Bf16Transposed => (self.n_k, GROUP_K, self.n_out * 2),
        }
    }

    /// Bytes of the smallest slot that will do.
    pub fn least_slot(&self) -> usize {
        let (_, unit, line_bytes) = self.lines();
        unit * line_bytes + ALIGNED
    }

    /// Pieces that together are the matrix.
    ///
    /// # Panics
    /// When a slot is smaller than [`Matrix::least_slot`].
    pub fn pieces(&self, slot_bytes: usize) -> Vec<Piece<'a>> {
        assert!(slot_bytes >= self.least_slot(), "a slot holds whole tiles");
        // What aligning takes is left out of the room.
        let room = slot_bytes - ALIGNED;
        let (n_lines, unit, line_bytes) = self.lines();
        let mut pieces = Vec::new();
        if n_lines * line_bytes <= room {
            let n_at_once = room / (n_lines * line_bytes).max(1);
            for first in (0..self.n_experts).step_by(n_at_once.max(1)) {
                let n_experts = n_at_once.min(self.n_experts - first);
                pieces.push(self.piece(first, n_experts, 0, n_lines));
            }
            return pieces;
        }
        let n_at_once = room / line_bytes / unit * unit;
        for expert in 0..self.n_experts {
            for first in (0..n_lines).step_by(n_at_once) {
                pieces.push(self.piece(expert, 1, first, n_at_once.min(n_lines - first)));
            }
        }
        pieces
    }

    fn piece(
        &self,
        first_expert: usize,
        n_experts: usize,
        first_line: usize,
        n_lines: usize,
    ) -> Piece<'a> {
        let mut stretch = Stretch {
            first_expert,
            n_experts,
            first_row: 0,
            n_rows: self.n_out,
            first_k: 0,
            n_k: self.n_k,
        };
        let stored = self.stored();
        if stored == Stored::Bf16Transposed {
            (stretch.first_k, stretch.n_k) = (first_line, n_lines);
        } else {
            (stretch.first_row, stretch.n_rows) = (first_line, n_lines);
        }
        let reads = self.reads(&stretch);
        let scales = match stored {
            Stored::Mxfp4 => reads[1].at as u64,
            _ => 0,
        };
        let args = RepackArgs {
            values: 0,
            scales,
            tiles: self.tiles,
            bad: self.bad,
            greatest: self.greatest,
            n_out: self.n_out as u32,
            n_k: self.n_k as u32,
            order: order_number(self.order),
            first_expert: first_expert as u32,
            n_experts: n_experts as u32,
            first_tile: (stretch.first_row / TILE_M) as u32,
            n_tiles: (stretch.n_rows.div_ceil(BLOCK_ROWS) * BLOCK_TILES) as u32,
            first_group: (stretch.first_k / GROUP_K) as u32,
            n_groups: n_groups(stretch.n_k) as u32,
            first_row: stretch.first_row as u32,
            n_rows: stretch.n_rows as u32,
            first_k: stretch.first_k as u32,
            n_staged_k: stretch.n_k as u32,
        };
        Piece {
            reads,
            then: Then::Repack {
                stored,
                held: self.held,
                args,
            },
        }
    }

    fn reads(&self, stretch: &Stretch) -> Vec<Read<'a>> {
        // Lines of all experts before the first, and lines of the stretch.
        let (first, n_lines) = match self.stored() {
            Stored::Bf16Transposed => (
                stretch.first_expert * self.n_k + stretch.first_k,
                stretch.n_experts * stretch.n_k,
            ),
            _ => (
                stretch.first_expert * self.n_out + stretch.first_row,
                stretch.n_experts * stretch.n_rows,
            ),
        };
        let read = |tensor: &Tensor<'a>, line_bytes: usize, at: usize| Read {
            tensor: tensor.clone(),
            start: first * line_bytes,
            n_bytes: n_lines * line_bytes,
            at,
        };
        let n_blocks = self.n_k / mxfp4::BLOCK;
        match &self.source {
            Source::Experts(ExpertTensors::Mxfp4 { codes, scales }) => {
                let codes = read(codes, n_blocks * mxfp4::BLOCK_BYTES, 0);
                let at = codes.n_bytes.next_multiple_of(ALIGNED);
                let scales = read(scales, n_blocks, at);
                vec![codes, scales]
            }
            Source::Experts(ExpertTensors::Bf16 { values, transposed }) => {
                let width = if *transposed { self.n_out } else { self.n_k };
                vec![read(values, width * 2, 0)]
            }
            Source::Rows(parts) => self.reads_of_parts(parts, first, n_lines),
        }
    }

    fn reads_of_parts(&self, parts: &[Tensor<'a>], first: usize, n_rows: usize) -> Vec<Read<'a>> {
        let row_bytes = self.n_k * 2;
        let mut reads = Vec::new();
        let mut part_start = 0;
        for part in parts {
            let part_end = part_start + part.shape[0];
            let (start, end) = (first.max(part_start), (first + n_rows).min(part_end));
            if start < end {
                reads.push(Read {
                    tensor: part.clone(),
                    start: (start - part_start) * row_bytes,
                    n_bytes: (end - start) * row_bytes,
                    at: (start - first) * row_bytes,
                });
            }
            part_start = part_end;
        }
        reads
    }

    /// The error that a report of kernels/repack.cu means; nothing where all is well.
    pub fn error(&self, bad: u64) -> Option<CheckpointError> {
        if bad == u64::MAX {
            return None;
        }
        let (index, byte) = ((bad >> 8) as usize, bad as u8);
        let n_blocks = self.n_k / mxfp4::BLOCK;
        let (line, block) = (index / n_blocks, index % n_blocks);
        let (expert, row) = (line / self.n_out, line % self.n_out);
        let (n_out, n_k) = (self.n_out, self.n_k);
        Some(match &self.source {
            Source::Experts(ExpertTensors::Mxfp4 { scales, .. }) => CheckpointError::Scale {
                path: scales.path.to_owned(),
                tensor: scales.name.clone(),
                block: index,
                byte,
            },
            Source::Experts(tensors) => ExpertBlocks {
                tensors,
                n_out,
                n_k,
            }
            .not_finite(expert, row, block),
            Source::Rows(parts) => DenseBlocks { parts, n_k }.not_finite(expert, row, block),
        })
    }
}
