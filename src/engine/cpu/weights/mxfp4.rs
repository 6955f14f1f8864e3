//! MXFP4 weights in tiles, 4 bits and a quarter each.
//!
//! ```text
//! [tile][k / 32] { 32 scale bytes | [k / 4][16 lanes / 4][2 halves of the lanes][4 lanes][k % 2] bytes of two
//!                  codes: the lower of k % 4 = 0 or 1, the upper of the k behind the next }
//! ```
//!
//! So 64 bytes are 64 codes and another 64, whose values are looked up in one go each, and interleaving the
//! bytes of both parts of a value gives pairs of k, 16 lanes a register. Codes are put into another order for
//! that (see [`stored`]).

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

/// Bytes of 4 k.
const GROUP_BYTES: usize = 2 * LANES;

/// A code as it is kept: the upper two of its bits are those that the lower byte of its value as bf16 has, which
/// the code has as they are, once 0 and 0.5 have changed places (where 0 is, 0.75 would be). Then come the bit
/// that is left of the magnitude, and the sign. It works on all codes of a word at once.
const fn stored(codes: u64) -> u64 {
    const LOWEST: u64 = 0x1111_1111_1111_1111;
    let codes = codes ^ (!(codes >> 1 | codes >> 2) & LOWEST);
    let lower = codes & (3 * LOWEST);
    let (third, sign) = ((codes >> 1) & (2 * LOWEST), (codes >> 3) & LOWEST);
    lower << 2 | third | sign
}

/// The value of each code as it is kept.
const VALUES: [f32; 16] = {
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        values[stored(code) as usize & 15] = mxfp4::VALUES[code as usize];
        code += 1;
    }
    values
};

/// A block's scale as it is kept: of zeros alone, which may have a larger one, the largest that others have, of
/// which pairs' exponents are made.
fn loaded_scale(byte: u8) -> u8 {
    byte.min(mxfp4::SCALE_MAX)
}

/// Where a code of a block is: its byte behind the scales, and the bit it begins at.
fn place(lane: usize, k: usize) -> (usize, usize) {
    let at = lane % 16 / 4 * 16 + lane / 16 * 8 + lane % 4 * 2 + k % 2;
    (k / 4 * GROUP_BYTES + at, k / 2 % 2 * 4)
}

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
    bytes[lane] = loaded_scale(scale);
    for k in 0..mxfp4::BLOCK {
        let code = codes[k / 2] >> (k % 2 * 4) & 15;
        let (at, shift) = place(lane, k);
        // The tile began as zeros.
        bytes[LANES + at] |= (stored(code.into()) as u8 & 15) << shift;
    }
}

/// As [`pack_mxfp4_block`] of all lanes, several times as fast.
pub fn pack_mxfp4_lanes(
    tile: &mut [u8],
    block: usize,
    scales: &[u8; LANES],
    codes: &[[u8; mxfp4::BLOCK_BYTES]; LANES],
) {
    /// The four k of a group are 16 bits of a word; of each four codes the middle two change places.
    fn of_lane(codes: u64) -> u64 {
        const FIRST_AND_LAST: u64 = 0xF00F_F00F_F00F_F00F;
        const SECOND: u64 = 0x00F0_00F0_00F0_00F0;
        let codes = stored(codes);
        codes & FIRST_AND_LAST | (codes >> 4) & SECOND | (codes & SECOND) << 4
    }
    /// Four lanes of four groups: for each of the groups its lanes.
    fn transposed([a, b, c, d]: [u64; 4]) -> [u64; 4] {
        const EVEN: u64 = 0x0000_FFFF_0000_FFFF;
        const LOW: u64 = 0xFFFF_FFFF;
        let even = |a, b| a & EVEN | (b & EVEN) << 16;
        let odd = |a, b| (a >> 16) & EVEN | b & !EVEN;
        let low = |a, c| a & LOW | c << 32;
        let high = |a, c| a >> 32 | c & !LOW;
        let (evens, odds) = ((even(a, b), even(c, d)), (odd(a, b), odd(c, d)));
        [
            low(evens.0, evens.1),
            low(odds.0, odds.1),
            high(evens.0, evens.1),
            high(odds.0, odds.1),
        ]
    }
    let bytes = &mut tile[block * BLOCK_BYTES..][..BLOCK_BYTES];
    let (to_scales, to_codes) = bytes.split_at_mut(LANES);
    for lane in 0..LANES {
        to_scales[lane] = loaded_scale(scales[lane]);
    }
    // In a loop of its own, which is compiled to vectors.
    let mut words = [[0; 2]; LANES];
    for lane in 0..LANES {
        let halves = codes[lane].as_chunks().0;
        for half in 0..2 {
            words[lane][half] = of_lane(u64::from_le_bytes(halves[half]));
        }
    }
    for (number, lanes) in words.as_chunks::<4>().0.iter().enumerate() {
        let (at, _) = place(4 * number, 0);
        for half in 0..2 {
            // As arrays: a map, and a slice's copy, would be called.
            let [a, b, c, d] = lanes;
            let words = transposed([a[half], b[half], c[half], d[half]]);
            for (group, word) in words.iter().enumerate() {
                let start = (4 * half + group) * GROUP_BYTES + at;
                let out = to_codes[start..].first_chunk_mut().expect("whole groups");
                *out = word.to_le_bytes();
            }
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
            x86::unpack_mxfp4_pairs(block, out);
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
            x86::unpack_mxfp4_pairs_here(block_of(&self.bytes, block), out, between);
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
        let (at, shift) = place(lane, k % mxfp4::BLOCK);
        let code = bytes[LANES + at] >> shift & 15;
        VALUES[usize::from(code)] * mxfp4::scale(bytes[lane])
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

/// The scale of a loaded byte: blocks with bytes below 2 hold zeros alone, so the bits of byte 0 may
/// stand for 0.
#[inline(always)]
fn scale_of(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23)
}

fn unpack_mxfp4_portable(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
    let (scales, codes) = bytes.split_at(LANES);
    for (k, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for lane in 0..LANES {
            let (at, shift) = place(lane, k);
            let code = codes[at] >> shift & 15;
            out[lane] = VALUES[usize::from(code)] * scale_of(scales[lane]);
        }
    }
}
