//! MXFP4 weights in tiles, 4 bits and a quarter each.
//!
//! ```text
//! [tile][k / 32] { 32 scale bytes | [32 k][16 bytes]: byte j = lane j low, lane 16 + j high }
//! ```

#[cfg(target_arch = "x86_64")]
mod x86;

use super::Tiles;
#[cfg(target_arch = "x86_64")]
use super::{PARTS, PairedBlock, block_of, fused_values, in_parts, unpack_block_by_values};
use crate::engine::EngineError;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::lanes::LANES;
use crate::engine::cpu::path::{CpuPath, Kind};
use crate::quant::mxfp4;

/// Bytes of 32 k of a tile: scales, then codes.
const BLOCK_BYTES: usize = LANES + mxfp4::BLOCK * LANES / 2;

/// Packed MXFP4 weights.
pub struct Mxfp4Tiles {
    n_k: usize,
    bytes: Buffer<u8>,
}

impl Mxfp4Tiles {
    /// Bytes of one tile.
    pub const fn tile_bytes(n_k: usize) -> usize {
        n_k / mxfp4::BLOCK * BLOCK_BYTES
    }

    pub fn zeroed(what: &str, n_tiles: usize, n_k: usize) -> Result<Self, EngineError> {
        assert_eq!(n_k % mxfp4::BLOCK, 0, "the config was checked");
        let bytes = Buffer::to_fill(what, n_tiles * Self::tile_bytes(n_k))?;
        Ok(Self { n_k, bytes })
    }

    pub fn n_bytes(&self) -> u64 {
        self.bytes.n_bytes()
    }

    /// The bytes of all tiles, to be filled by [`pack_mxfp4_block`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// Puts one block of 32 k of one output into its tile's bytes.
#[inline]
pub fn pack_mxfp4_block(
    tile: &mut [u8],
    lane: usize,
    block: usize,
    scale: u8,
    codes: &[u8; mxfp4::BLOCK_BYTES],
) {
    let bytes = &mut tile[block * BLOCK_BYTES..][..BLOCK_BYTES];
    bytes[lane] = scale;
    let (column, shift) = (lane % 16, lane / 16 * 4);
    for (pair, &byte) in codes.iter().enumerate() {
        for (k, code) in [(2 * pair, byte & 15), (2 * pair + 1, byte >> 4)] {
            // The tile began as zeros.
            bytes[LANES + k * 16 + column] |= code << shift;
        }
    }
}

/// As [`pack_mxfp4_block`] of all lanes, several times as fast.
pub fn pack_mxfp4_lanes(
    tile: &mut [u8],
    block: usize,
    scales: &[u8; LANES],
    codes: &[[u8; mxfp4::BLOCK_BYTES]; LANES],
) {
    let bytes = &mut tile[block * BLOCK_BYTES..][..BLOCK_BYTES];
    let (to_scales, to_codes) = bytes.split_at_mut(LANES);
    to_scales.copy_from_slice(scales);
    let (low, high) = codes.split_at(16);
    let pairs = to_codes.as_chunks_mut::<32>().0;
    for (pair, out) in pairs.iter_mut().enumerate() {
        let (even, odd) = out.split_at_mut(16);
        for column in 0..16 {
            let (low, high) = (low[column][pair], high[column][pair]);
            even[column] = low & 15 | high << 4;
            odd[column] = low >> 4 | high & 0xF0;
        }
    }
}

impl Tiles for Mxfp4Tiles {
    fn n_k(&self) -> usize {
        self.n_k
    }

    fn n_tiles(&self) -> usize {
        self.bytes.len() / Self::tile_bytes(self.n_k)
    }

    #[inline]
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
        let start = tile * Self::tile_bytes(self.n_k) + k / mxfp4::BLOCK * BLOCK_BYTES;
        let bytes = &self.bytes[start..][..n_k / mxfp4::BLOCK * BLOCK_BYTES];
        let out = &mut out[..n_k * LANES];
        for (bytes, out) in bytes
            .chunks_exact(BLOCK_BYTES)
            .zip(out.chunks_exact_mut(mxfp4::BLOCK * LANES))
        {
            let bytes = bytes.try_into().expect("chunks are of this size");
            let out = out.try_into().expect("chunks are of this size");
            unpack_mxfp4_block(path, bytes, out);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn unpack_block(&self, path: CpuPath, block: usize, out: &mut PairedBlock) {
        if !path.has_pairs() {
            return unpack_block_by_values(self, path, block, out);
        }
        let block = block_of(&self.bytes, block);
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        unsafe {
            match path.has_tiles() {
                true => x86::unpack_mxfp4_pairs::<true>(block, out),
                false => x86::unpack_mxfp4_pairs::<false>(block, out),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "features were detected")]
    #[inline(always)]
    unsafe fn unpack_block_here(
        &self,
        _: CpuPath,
        block: usize,
        out: &mut PairedBlock,
        between: impl FnMut(usize),
    ) {
        // SAFETY: as the caller says.
        unsafe {
            x86::unpack_mxfp4_pairs_here::<true>(block_of(&self.bytes, block), out, between);
        }
    }

    #[inline(always)]
    fn packed_blocks(&self) -> (&[u8], usize) {
        (&self.bytes, BLOCK_BYTES)
    }

    #[cfg(target_arch = "x86_64")]
    fn fused_chain(
        &self,
        path: CpuPath,
        tile: usize,
        acc: &mut [[f32; LANES]],
        x: &[u32],
        x_starts: &[usize],
    ) -> bool {
        assert!(path.has_pairs(), "it takes pairs");
        assert_eq!(acc.len(), x_starts.len(), "one chain a row");
        let n_bytes = Self::tile_bytes(self.n_k);
        let blocks = &self.bytes[tile * n_bytes..][..n_bytes];
        let blocks = blocks.as_chunks::<BLOCK_BYTES>().0;
        let furthest = x_starts.iter().copied().max().unwrap_or(0);
        assert!(furthest + self.n_k / 2 <= x.len(), "rows too short");
        macro_rules! rows {
            ($($n:literal)*) => {
                match acc.len() {
                    $($n => fused_rows::<$n>(blocks, acc, x, x_starts),)*
                    n => unreachable!("a fused chain of {n} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
        true
    }

    #[cfg(target_arch = "x86_64")]
    fn fused_values(
        &self,
        path: CpuPath,
        tile: usize,
        blocks: std::ops::Range<usize>,
        acc: &mut [[f32; LANES]],
        x: &[f32],
        x_starts: &[usize],
    ) -> bool {
        if !path.has_avx2() {
            return false;
        }
        let n_bytes = Self::tile_bytes(self.n_k);
        let of_tile = self.bytes[tile * n_bytes..][..n_bytes]
            .as_chunks::<BLOCK_BYTES>()
            .0;
        fused_values!(x86::fused_values, of_tile, blocks, acc, x, x_starts);
        true
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        let start = tile * Self::tile_bytes(self.n_k) + k / mxfp4::BLOCK * BLOCK_BYTES;
        let bytes = &self.bytes[start..][..BLOCK_BYTES];
        let byte = bytes[LANES + k % mxfp4::BLOCK * 16 + lane % 16];
        let code = (byte >> (lane / 16 * 4)) & 15;
        mxfp4::VALUES[usize::from(code)] * mxfp4::scale(bytes[lane])
    }
}

type Mxfp4Block = [u8; BLOCK_BYTES];
type UnpackedBlock = [f32; mxfp4::BLOCK * LANES];

/// `T` rows; the caller has checked bounds and path.
#[cfg(target_arch = "x86_64")]
fn fused_rows<const T: usize>(
    blocks: &[Mxfp4Block],
    acc: &mut [[f32; LANES]],
    x: &[u32],
    x_starts: &[usize],
) {
    let acc = acc.try_into().expect("the caller matched the length");
    let x_starts = x_starts.try_into().expect("as long");
    // SAFETY: a path that takes pairs exists only where the CPU has its features; the caller has
    // checked the bounds.
    #[allow(unsafe_code, reason = "features were detected, bounds checked")]
    unsafe {
        x86::fused_chain::<T>(blocks, acc, x, x_starts);
    }
}

fn unpack_mxfp4_block(path: CpuPath, bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
    match path.kind() {
        Kind::Portable => unpack_mxfp4_portable(bytes, out),
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: a path of this kind exists only where the CPU has its features.
        Kind::Avx2 => unsafe { x86::unpack_mxfp4_avx2(bytes, out) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: as above.
        Kind::Avx512 | Kind::Avx512Bf16 => unsafe { x86::unpack_mxfp4_avx512(bytes, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unpack_mxfp4_portable(bytes, out),
    }
}

/// The scale of a loaded byte: blocks with bytes outside 2..=252 hold zeros alone, so the bits
/// of byte 0 may stand for 0.
#[inline(always)]
fn scale_of(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

fn unpack_mxfp4_portable(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
    let (scales, codes) = bytes.split_at(LANES);
    for (codes, out) in codes.chunks_exact(16).zip(out.chunks_exact_mut(LANES)) {
        let (low, high) = out.split_at_mut(16);
        for (lane, &byte) in codes.iter().enumerate() {
            low[lane] = mxfp4::VALUES[usize::from(byte & 15)] * scale_of(scales[lane]);
            high[lane] = mxfp4::VALUES[usize::from(byte >> 4)] * scale_of(scales[16 + lane]);
        }
    }
}
