//! Weights as the kernels read them: tiles of 32 output rows, all of K, one after the other.
//!
//! A tile's lanes are 32 outputs, so a product is 32 chains side by side (see
//! [`super::lanes::fma_chain`]). Weights stay in their format and are unpacked into a scratch of
//! [`CHUNK_K`] steps that stays in the first-level cache for all rows of a group. A file a
//! format; [`Matrix`] is any of them.

mod bf16;
mod mxfp4;
mod mxint8;
mod vector;

pub use bf16::{Bf16Tiles, pack_bf16};
pub use mxfp4::{Mxfp4Tiles, pack_mxfp4_block};
pub use mxint8::{Mxint8Tiles, pack_mxint8_block};
pub use vector::Vector;

use super::lanes::LANES;
use super::path::CpuPath;
use crate::engine::checkpoint::MatrixFormat;

/// Steps along K that are unpacked together.
pub const CHUNK_K: usize = 128;

/// Weights in tiles of [`LANES`] outputs.
pub trait Tiles: Sync {
    /// Length of the reduction, a multiple of 32.
    fn n_k(&self) -> usize;

    fn n_tiles(&self) -> usize;

    /// Writes `n_k` steps from `k` (a multiple of 32) of a tile's 32 lanes each to `out`.
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]);

    /// The same as pairs of bf16: 32 lanes a pair of k, the even one in the low half. Where a value
    /// is subnormal it may be 0.
    fn unpack_pairs(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [u32]) {
        let mut values = [0.0; BLOCK * LANES];
        for (i, out) in out[..n_k / 2 * LANES]
            .chunks_mut(BLOCK / 2 * LANES)
            .enumerate()
        {
            self.unpack(path, tile, k + i * BLOCK, BLOCK, &mut values);
            let rows = values.as_chunks::<LANES>().0.as_chunks::<2>().0;
            for (pairs, [even, odd]) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(rows) {
                for lane in 0..LANES {
                    let (even, odd) = (even[lane].to_bits(), odd[lane].to_bits());
                    pairs[lane] = even >> 16 | odd & 0xFFFF_0000;
                }
            }
        }
    }

    /// The pairs of a tile and of those behind it, and how many words a tile has, where they are packed
    /// as [`Tiles::unpack_pairs`] gives them.
    fn packed_pairs(&self, _tile: usize) -> Option<(&[u32], usize)> {
        None
    }

    /// Continues the chains of up to [`FUSED_ROWS`] rows over all of a tile's K (see
    /// [`pair_chain`](super::pairs::pair_chain)), unpacking in registers; `false`, and nothing done, for
    /// a format that is not unpacked there.
    fn fused_chain(
        &self,
        _path: CpuPath,
        _tile: usize,
        _acc: &mut [[f32; LANES]],
        _x: &[u32],
        _x_starts: &[usize],
    ) -> bool {
        false
    }

    /// One weight, for the reference kernels.
    fn get(&self, tile: usize, lane: usize, k: usize) -> f32;
}

/// The most rows of a fused chain: with more, unpacking once for all of them is faster.
pub const FUSED_ROWS: usize = 8;

/// K is a multiple of this.
const BLOCK: usize = 32;

/// A packed matrix in one of the formats. All are unpacked to the same lanes and multiplied by
/// the same chain, so equal values give equal bits in any of them.
pub enum Matrix {
    Mxfp4(Mxfp4Tiles),
    Mxint8(Mxint8Tiles),
    Bf16(Bf16Tiles),
}

/// Runs `$body` with `$tiles` bound to the matrix's tiles, whichever its format.
macro_rules! with_tiles {
    ($matrix:expr, $tiles:ident => $body:expr) => {
        match $matrix {
            Matrix::Mxfp4($tiles) => $body,
            Matrix::Mxint8($tiles) => $body,
            Matrix::Bf16($tiles) => $body,
        }
    };
}

impl Matrix {
    /// Bytes of one tile of a format.
    pub const fn tile_bytes(format: MatrixFormat, n_k: usize) -> usize {
        match format {
            MatrixFormat::Mxfp4 => Mxfp4Tiles::tile_bytes(n_k),
            MatrixFormat::Mxint8 => Mxint8Tiles::tile_bytes(n_k),
            MatrixFormat::Bf16 => Bf16Tiles::tile_bytes(n_k),
        }
    }

    pub fn format(&self) -> MatrixFormat {
        match self {
            Self::Mxfp4(_) => MatrixFormat::Mxfp4,
            Self::Mxint8(_) => MatrixFormat::Mxint8,
            Self::Bf16(_) => MatrixFormat::Bf16,
        }
    }

    pub fn n_bytes(&self) -> u64 {
        with_tiles!(self, tiles => tiles.n_bytes())
    }
}

impl Tiles for Matrix {
    fn n_k(&self) -> usize {
        with_tiles!(self, tiles => tiles.n_k())
    }

    fn n_tiles(&self) -> usize {
        with_tiles!(self, tiles => tiles.n_tiles())
    }

    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
        with_tiles!(self, tiles => tiles.unpack(path, tile, k, n_k, out));
    }

    fn unpack_pairs(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [u32]) {
        with_tiles!(self, tiles => tiles.unpack_pairs(path, tile, k, n_k, out));
    }

    fn packed_pairs(&self, tile: usize) -> Option<(&[u32], usize)> {
        with_tiles!(self, tiles => tiles.packed_pairs(tile))
    }

    fn fused_chain(
        &self,
        path: CpuPath,
        tile: usize,
        acc: &mut [[f32; LANES]],
        x: &[u32],
        x_starts: &[usize],
    ) -> bool {
        with_tiles!(self, tiles => tiles.fused_chain(path, tile, acc, x, x_starts))
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        with_tiles!(self, tiles => tiles.get(tile, lane, k))
    }
}
