//! Matrices as checkpoints store them, and the tiles that the host's packers make of them: what
//! kernels/repack.cu is compared with.

use std::path::Path;

use podium::engine::checkpoint::blocks::{Blocks, DenseBlocks, ExpertBlocks, StoredBlock};
use podium::engine::checkpoint::{CheckpointError, Deviation, ExpertTensors, MatrixFormat, Tensor};
use podium::engine::cuda::pack::{self, NeedsWide, RowOrder};
use podium::engine::cuda::pieces::{Matrix, Source};
use podium::engine::cuda::repack::Stored;
use safetensors::Dtype;

use super::random::Random;

/// What values a matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Scales up to 2, and blocks of zeros under any scale.
    Narrow,
    /// Every scale that may be loaded.
    Wide,
    /// Two blocks cannot be held.
    Bad,
}

/// A matrix to repack.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub stored: Stored,
    /// Of several tensors that follow each other.
    pub in_parts: bool,
    pub held: MatrixFormat,
    pub values: Values,
    pub order: RowOrder,
    pub n_experts: usize,
    pub n_out: usize,
    pub n_k: usize,
}

/// Every way from a stored format to a held one, on every row order: whole tiles, tails along
/// both sides, less than a tile.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |case: Case| cases.push(case);
    let experts = |stored, held, values, order, [n_experts, n_out, n_k]: [usize; 3]| Case {
        stored,
        in_parts: false,
        held,
        values,
        order,
        n_experts,
        n_out,
        n_k,
    };
    let shapes = [
        [3, 40, 96],
        [2, 64, 128],
        [1, 8, 32],
        [5, 32, 64],
        [2, 100, 224],
    ];
    let formats = [
        MatrixFormat::Mxfp4,
        MatrixFormat::Mxint8,
        MatrixFormat::Bf16,
    ];
    for stored in [Stored::Mxfp4, Stored::Bf16, Stored::Bf16Transposed] {
        for held in formats {
            for order in [RowOrder::Natural, RowOrder::GateUp] {
                for shape in shapes {
                    for values in [Values::Narrow, Values::Wide] {
                        add(experts(stored, held, values, order, shape));
                    }
                }
                if stored == Stored::Mxfp4 || held != MatrixFormat::Bf16 {
                    add(experts(stored, held, Values::Bad, order, [3, 40, 96]));
                }
            }
        }
    }
    for (head_dim, n_heads) in [(16, 5), (16, 11), (64, 5), (64, 11)] {
        for held in formats {
            for values in [Values::Narrow, Values::Wide] {
                add(Case {
                    in_parts: true,
                    ..experts(
                        Stored::Bf16,
                        held,
                        values,
                        RowOrder::Rotary { head_dim },
                        [1, n_heads * head_dim, 160],
                    )
                });
            }
        }
    }
    cases
}

/// A matrix's tensors: name, dtype, shape, bytes.
pub struct Raw {
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

fn is_zero(block: usize) -> bool {
    block % 7 == 3
}

impl Case {
    fn n_blocks(&self) -> usize {
        self.n_experts * self.n_out * self.n_k / 32
    }

    /// Blocks of the tensor that cannot be held.
    fn bad_blocks(&self) -> [usize; 2] {
        [self.n_blocks() * 2 / 3, self.n_blocks() / 2]
    }

    pub fn raw(&self) -> Raw {
        let mut random = Random(self.n_out as u64 * 31 + self.n_k as u64);
        let tensors = match self.stored {
            Stored::Mxfp4 => self.mxfp4(&mut random),
            _ => self.bf16(&mut random),
        };
        Raw { tensors }
    }

    fn mxfp4(&self, random: &mut Random) -> Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)> {
        let Self {
            n_experts,
            n_out,
            n_k,
            ..
        } = *self;
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for block in 0..self.n_blocks() {
            let zero = is_zero(block);
            // Zeros of either sign.
            let mask = if zero { 0x8888_8888_8888_8888 } else { !0 };
            for _ in 0..2 {
                codes.extend((random.word() & mask).to_le_bytes());
            }
            // Never a block of zeros where none is meant.
            let last = codes.len() - 1;
            codes[last] |= if zero { 0 } else { 0x10 };
            scales.push(match (zero, self.values) {
                (true, _) => [0, 1, 127, 253, 254][block % 5],
                (false, Values::Wide) => [2, 252, 129, 120, 131][block % 5],
                (false, _) => 100 + (random.word() % 29) as u8,
            });
        }
        if self.values == Values::Bad {
            let [late, early] = self.bad_blocks();
            let bytes = match self.order {
                RowOrder::GateUp => [1, 253],
                _ => [253, 1],
            };
            for (block, byte) in [late, early].into_iter().zip(bytes) {
                scales[block] = byte;
                codes[block * 16 + 5] = 0x20;
            }
        }
        let shape = vec![n_experts, n_out, n_k / 32, 16];
        let of_scales = shape[..3].to_vec();
        vec![
            ("codes", Dtype::U8, shape, codes),
            ("scales", Dtype::U8, of_scales, scales),
        ]
    }

    fn bf16(&self, random: &mut Random) -> Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)> {
        let Self {
            n_experts,
            n_out,
            n_k,
            ..
        } = *self;
        let transposed = self.stored == Stored::Bf16Transposed;
        let mut values = vec![0u8; n_experts * n_out * n_k * 2];
        for expert in 0..n_experts {
            for row in 0..n_out {
                for k in 0..n_k {
                    let block = ((expert * n_out + row) * n_k + k) / 32;
                    let word = random.word();
                    // Exponents near 2^-5, or anywhere at all, subnormal ones among them.
                    let exponent = match self.values {
                        Values::Wide => (block as u64 * 37 + word % 5) % 255,
                        _ => 118 + word % 8,
                    };
                    let bits = match is_zero(block) {
                        true => (word >> 48 & 0x8000) as u16,
                        false => (word >> 48 & 0x807F) as u16 | (exponent as u16) << 7,
                    };
                    let bad = self.values == Values::Bad && self.bad_blocks().contains(&block);
                    let bits = if bad && k % 32 == 17 { 0xFF80 } else { bits };
                    let i = match transposed {
                        true => (expert * n_k + k) * n_out + row,
                        false => (expert * n_out + row) * n_k + k,
                    };
                    values[2 * i..2 * i + 2].copy_from_slice(&bits.to_le_bytes());
                }
            }
        }
        if self.in_parts {
            // Two fifths of the rows, then the others in halves: heads of q, k and v.
            let RowOrder::Rotary { head_dim } = self.order else {
                panic!("only heads come in parts");
            };
            let n_heads = n_out / head_dim;
            let first = n_heads * 2 / 5;
            let second = (n_heads - first) / 2;
            let mut parts = Vec::new();
            for (name, heads) in [("q", first), ("k", second), ("v", n_heads - first - second)] {
                let n_rows = heads * head_dim;
                let rest = values.split_off(n_rows * n_k * 2);
                parts.push((name, Dtype::BF16, vec![n_rows, n_k], values));
                values = rest;
            }
            return parts;
        }
        let shape = match transposed {
            true => vec![n_experts, n_k, n_out],
            false => vec![n_experts, n_out, n_k],
        };
        vec![("values", Dtype::BF16, shape, values)]
    }

    /// The matrix, with its tiles and report at these addresses.
    pub fn matrix<'a>(&self, raw: &'a Raw, tiles: u64, bad: u64, greatest: u64) -> Matrix<'a> {
        Matrix {
            source: self.source(raw),
            n_experts: self.n_experts,
            n_out: self.n_out,
            n_k: self.n_k,
            order: self.order,
            held: self.held,
            tiles,
            bad,
            greatest,
        }
    }

    fn source<'a>(&self, raw: &'a Raw) -> Source<'a> {
        let mut tensors: Vec<Tensor> = raw
            .tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| Tensor {
                name: (*name).to_owned(),
                path: Path::new("model"),
                dtype: *dtype,
                shape: shape.clone(),
                bytes,
                file: None,
            })
            .collect();
        match self.stored {
            _ if self.in_parts => Source::Rows(tensors),
            Stored::Mxfp4 => {
                let scales = tensors.remove(1);
                let codes = tensors.remove(0);
                Source::Experts(ExpertTensors::Mxfp4 { codes, scales })
            }
            stored => Source::Experts(ExpertTensors::Bf16 {
                values: tensors.remove(0),
                transposed: stored == Stored::Bf16Transposed,
            }),
        }
    }

    /// Bytes of all experts' tiles.
    pub fn n_bytes(&self) -> usize {
        self.n_experts * pack::matrix_bytes(self.held, self.n_out, self.n_k)
    }

    /// The tiles by the host's packers, and whether they are in the form for large scales; or
    /// what is wrong with the values.
    pub fn expected(&self, raw: &Raw) -> Result<(Vec<u8>, bool), String> {
        let matrix = self.matrix(raw, 0, 0, 0);
        // The first block that cannot be held is the one that is told.
        for i in 0..self.n_blocks() {
            let (line, k) = (i / (self.n_k / 32), i % (self.n_k / 32));
            let (expert, row) = (line / self.n_out, line % self.n_out);
            let block = block(&matrix, expert, row, k).map_err(|error| error.to_string())?;
            let deviation = &mut Deviation::default();
            let is_held = match self.held {
                MatrixFormat::Mxfp4 => block.to_mxfp4(deviation).is_some(),
                MatrixFormat::Mxint8 => block.to_mxint8(deviation).is_some(),
                MatrixFormat::Bf16 => true,
            };
            if !is_held {
                let error = blocks(&matrix).not_finite(expert, row, k);
                return Err(error.to_string());
            }
        }
        match packed(&matrix, false) {
            Ok(tiles) => Ok((tiles, false)),
            Err(NeedsWide) => Ok((packed(&matrix, true).expect("it holds every scale"), true)),
        }
    }

    /// Slots of the smallest size, of a few units, and one for all.
    pub fn slot_sizes(&self, least: usize) -> [usize; 3] {
        [least, 3 * least, self.n_bytes() * 8 + least]
    }
}

fn blocks<'a>(matrix: &'a Matrix) -> Box<dyn Blocks + 'a> {
    let (n_out, n_k) = (matrix.n_out, matrix.n_k);
    match &matrix.source {
        Source::Rows(parts) => Box::new(DenseBlocks { parts, n_k }),
        Source::Experts(tensors) => Box::new(ExpertBlocks {
            tensors,
            n_out,
            n_k,
        }),
    }
}

fn block(
    matrix: &Matrix,
    expert: usize,
    row: usize,
    k: usize,
) -> Result<StoredBlock, CheckpointError> {
    let block = blocks(matrix).block(expert, row, k)?;
    Ok(block.expect("the row is there"))
}

/// A matrix's tiles by the host's packers; its values are such as can be held.
pub fn packed(matrix: &Matrix, wide: bool) -> Result<Vec<u8>, NeedsWide> {
    let (n_out, n_k, order) = (matrix.n_out, matrix.n_k, matrix.order);
    let n_bytes = pack::matrix_bytes(matrix.held, n_out, n_k);
    let mut tiles = vec![0; matrix.n_experts * n_bytes];
    for (expert, tiles) in tiles.chunks_exact_mut(n_bytes).enumerate() {
        let block = |row, k| block(matrix, expert, row, k).expect("a block that can be held");
        match matrix.held {
            MatrixFormat::Mxfp4 => {
                pack::mxfp4::<NeedsWide>(tiles, n_out, n_k, order, wide, |row, k| {
                    let block = block(row, k).to_mxfp4(&mut Deviation::default());
                    Ok(block.expect("finite values"))
                })?;
            }
            MatrixFormat::Mxint8 => {
                pack::mxint8::<NeedsWide>(tiles, n_out, n_k, order, wide, |row, k| {
                    let block = block(row, k).to_mxint8(&mut Deviation::default());
                    Ok(block.expect("finite values"))
                })?;
            }
            MatrixFormat::Bf16 => pack::bf16(tiles, n_out, n_k, order, |row, k| {
                block(row, k / 32).to_bf16()[k % 32]
            }),
        }
    }
    Ok(tiles)
}

/// What is asked of a case: its tiles as they came out, whether they were widened, and the report.
pub fn check(case: &Case, raw: &Raw, matrix: &Matrix, tiles: &[u8], bad: u64, greatest: u64) {
    let told = matrix.error(bad).map(|error| error.to_string());
    match case.expected(raw) {
        Err(error) => {
            assert_eq!(case.values, Values::Bad, "{case:?}");
            assert_eq!(told, Some(error), "{case:?}");
        }
        Ok((expected, wide)) => {
            assert_eq!(told, None, "{case:?}");
            assert_eq!(greatest > 0, wide, "{case:?}");
            let differs = tiles.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{case:?}: first byte that differs");
            assert_eq!(tiles.len(), expected.len());
        }
    }
}
