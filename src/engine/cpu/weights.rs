//! Weights as the kernels read them: tiles of 32 output rows, all of K, one after the other.
//!
//! A tile's lanes are 32 outputs, so a product is 32 chains side by side (see
//! [`super::lanes::fma_chain`]). Weights stay in their format and are unpacked into a scratch of
//! [`CHUNK_K`] steps that stays in the first-level cache for all rows of a group.
//!
//! ```text
//! mxfp4  [tile][k / 32] { 32 scale bytes | [32 k][16 bytes]: byte j = lane j low, lane 16+j high }
//! bf16   [tile][k][16 words]: word j = lane j in the low half, lane 16+j in the high half
//! ```

use super::buffer::{Buffer, Plain};
use super::lanes::LANES;
use super::path::{CpuPath, Kind};
use crate::engine::EngineError;
use crate::quant::{bf16, mxfp4};

/// Steps along K that are unpacked together.
pub const CHUNK_K: usize = 128;

/// Bytes of 32 k of an MXFP4 tile: scales, then codes.
const BLOCK_BYTES: usize = LANES + mxfp4::BLOCK * LANES / 2;

/// Weights in tiles of [`LANES`] outputs.
pub trait Tiles: Sync {
    /// Length of the reduction, a multiple of 32.
    fn n_k(&self) -> usize;

    fn n_tiles(&self) -> usize;

    /// Writes `n_k` steps from `k` (a multiple of 32) of a tile's 32 lanes each to `out`.
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]);

    /// One weight, for the reference kernels.
    fn get(&self, tile: usize, lane: usize, k: usize) -> f32;
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
        let bytes = Buffer::zeroed(what, n_tiles * Self::tile_bytes(n_k))?;
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
        Kind::Avx512 => unsafe { x86::unpack_mxfp4_avx512(bytes, out) },
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

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
mod x86 {
    use super::{LANES, Mxfp4Block, STEP_WORDS, UnpackedBlock};
    use crate::quant::mxfp4;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512F; `out` is as long as `words`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn unpack_bf16_avx512(words: &[[u32; STEP_WORDS]], out: &mut [[f32; LANES]]) {
        let upper = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
        let (mut from, mut to) = (words.as_ptr().cast::<i32>(), out.as_mut_ptr().cast::<f32>());
        for _ in 0..words.len() {
            // SAFETY: 16 words and 32 values a step.
            unsafe {
                let words = _mm512_loadu_epi32(from);
                let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
                let high = _mm512_castsi512_ps(_mm512_and_si512(words, upper));
                _mm512_storeu_ps(to, low);
                _mm512_storeu_ps(to.wrapping_add(16), high);
            }
            (from, to) = (from.wrapping_add(STEP_WORDS), to.wrapping_add(LANES));
        }
    }

    /// # Safety
    /// The CPU has AVX2; `out` is as long as `words`.
    #[target_feature(enable = "avx2")]
    pub unsafe fn unpack_bf16_avx2(words: &[[u32; STEP_WORDS]], out: &mut [[f32; LANES]]) {
        let upper = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
        let (mut from, mut to) = (words.as_ptr().cast::<i32>(), out.as_mut_ptr().cast::<f32>());
        for _ in 0..words.len() {
            for half in [0, 8] {
                // SAFETY: 16 words and 32 values a step.
                unsafe {
                    let words = _mm256_loadu_si256(from.wrapping_add(half).cast());
                    let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
                    let high = _mm256_castsi256_ps(_mm256_and_si256(words, upper));
                    _mm256_storeu_ps(to.wrapping_add(half), low);
                    _mm256_storeu_ps(to.wrapping_add(16 + half), high);
                }
            }
            (from, to) = (from.wrapping_add(STEP_WORDS), to.wrapping_add(LANES));
        }
    }

    /// # Safety
    /// The CPU has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn unpack_mxfp4_avx512(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
        // SAFETY: `bytes` holds 32 scales and 32 x 16 codes, `out` 32 x 32 values.
        unsafe {
            let values = _mm512_loadu_ps(mxfp4::VALUES.as_ptr());
            let scales = |at: usize| {
                let bytes = _mm_loadu_si128(bytes.as_ptr().wrapping_add(at).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes)))
            };
            let (low_scales, high_scales) = (scales(0), scales(16));
            for k in 0..mxfp4::BLOCK {
                let codes = _mm_loadu_si128(bytes.as_ptr().wrapping_add(LANES + 16 * k).cast());
                // The permutation looks at the low four bits of each index alone.
                let low = _mm512_cvtepu8_epi32(codes);
                let high = _mm512_srli_epi32::<4>(low);
                let low = _mm512_mul_ps(_mm512_permutexvar_ps(low, values), low_scales);
                let high = _mm512_mul_ps(_mm512_permutexvar_ps(high, values), high_scales);
                _mm512_storeu_ps(out.as_mut_ptr().wrapping_add(k * LANES), low);
                _mm512_storeu_ps(out.as_mut_ptr().wrapping_add(k * LANES + 16), high);
            }
        }
    }

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn unpack_mxfp4_avx2(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
        // SAFETY: `bytes` holds 32 scales and 32 x 16 codes, `out` 32 x 32 values.
        unsafe {
            let magnitudes = _mm256_loadu_ps(mxfp4::VALUES.as_ptr());
            let sign_bit = _mm256_set1_epi32(i32::MIN);
            let scales = |at: usize| {
                let bytes = _mm_loadl_epi64(bytes.as_ptr().wrapping_add(at).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes)))
            };
            let scales = [scales(0), scales(8), scales(16), scales(24)];
            // The permutation looks at the low three bits, bit 3 moves to the sign.
            let value = |codes: __m256i, scales: __m256| {
                let magnitude = _mm256_permutevar8x32_ps(magnitudes, codes);
                let sign = _mm256_and_si256(_mm256_slli_epi32::<28>(codes), sign_bit);
                _mm256_mul_ps(_mm256_or_ps(magnitude, _mm256_castsi256_ps(sign)), scales)
            };
            for k in 0..mxfp4::BLOCK {
                let out = out.as_mut_ptr().wrapping_add(k * LANES);
                for half in 0..2 {
                    let at = bytes.as_ptr().wrapping_add(LANES + 16 * k + 8 * half);
                    let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()));
                    let high = _mm256_srli_epi32::<4>(low);
                    _mm256_storeu_ps(out.wrapping_add(8 * half), value(low, scales[half]));
                    _mm256_storeu_ps(
                        out.wrapping_add(16 + 8 * half),
                        value(high, scales[2 + half]),
                    );
                }
            }
        }
    }
}

/// Packed bf16 weights.
pub struct Bf16Tiles {
    n_k: usize,
    words: Buffer<u32>,
}

/// Words of one step of a bf16 tile.
const STEP_WORDS: usize = LANES / 2;

impl Bf16Tiles {
    /// Bytes of one tile.
    pub const fn tile_bytes(n_k: usize) -> usize {
        n_k * STEP_WORDS * size_of::<u32>()
    }

    pub fn zeroed(what: &str, n_tiles: usize, n_k: usize) -> Result<Self, EngineError> {
        let words = Buffer::zeroed(what, n_tiles * n_k * STEP_WORDS)?;
        Ok(Self { n_k, words })
    }

    pub fn n_bytes(&self) -> u64 {
        self.words.n_bytes()
    }

    /// The words of all tiles, to be filled by [`pack_bf16`]; [`Self::tile_words`] a tile.
    pub fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }

    pub fn tile_words(&self) -> usize {
        self.n_k * STEP_WORDS
    }
}

/// Puts one weight into its tile's words.
#[inline(always)]
pub fn pack_bf16(tile: &mut [u32], lane: usize, k: usize, bits: u16) {
    // The tile began as zeros.
    tile[k * STEP_WORDS + lane % 16] |= u32::from(bits) << (lane / 16 * 16);
}

impl Tiles for Bf16Tiles {
    fn n_k(&self) -> usize {
        self.n_k
    }

    fn n_tiles(&self) -> usize {
        self.words.len() / self.tile_words()
    }

    #[inline]
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
        let start = tile * self.tile_words() + k * STEP_WORDS;
        let words = &self.words[start..][..n_k * STEP_WORDS];
        unpack_bf16(path, words, &mut out[..n_k * LANES]);
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        let word = self.words[tile * self.tile_words() + k * STEP_WORDS + lane % 16];
        bf16::to_f32((word >> (lane / 16 * 16)) as u16)
    }
}

fn unpack_bf16(path: CpuPath, words: &[u32], out: &mut [f32]) {
    let (words, out) = (
        words.as_chunks::<STEP_WORDS>().0,
        out.as_chunks_mut::<LANES>().0,
    );
    assert_eq!(words.len(), out.len(), "as many steps");
    match path.kind() {
        Kind::Portable => unpack_bf16_portable(words, out),
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: a path of this kind exists only where the CPU has its features.
        Kind::Avx2 => unsafe { x86::unpack_bf16_avx2(words, out) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: as above.
        Kind::Avx512 => unsafe { x86::unpack_bf16_avx512(words, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unpack_bf16_portable(words, out),
    }
}

fn unpack_bf16_portable(words: &[[u32; STEP_WORDS]], out: &mut [[f32; LANES]]) {
    for (words, out) in words.iter().zip(out) {
        for (j, &word) in words.iter().enumerate() {
            out[j] = f32::from_bits(word << 16);
            out[STEP_WORDS + j] = f32::from_bits(word & 0xFFFF_0000);
        }
    }
}

/// A norm's scale, a bias or the sinks: bf16 as released, or f32 where the file holds f32.
pub enum Vector {
    Bf16(Buffer<u16>),
    F32(Buffer<f32>),
}

impl Vector {
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn n_bytes(&self) -> u64 {
        match self {
            Self::Bf16(values) => values.n_bytes(),
            Self::F32(values) => values.n_bytes(),
        }
    }

    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Bf16(values) => bf16::to_f32(values[i]),
            Self::F32(values) => values[i],
        }
    }

    /// Values `start..start + N`, zeros past the end.
    #[inline(always)]
    pub fn lanes<const N: usize>(&self, start: usize) -> [f32; N] {
        fn take<T: Plain, const N: usize>(
            values: &[T],
            start: usize,
            value: impl Fn(T) -> f32,
        ) -> [f32; N] {
            let mut lanes = [0.0; N];
            match values[start..].first_chunk::<N>() {
                Some(values) => {
                    for lane in 0..N {
                        lanes[lane] = value(values[lane]);
                    }
                }
                None => {
                    for (lane, &x) in lanes.iter_mut().zip(&values[start..]) {
                        *lane = value(x);
                    }
                }
            }
            lanes
        }
        match self {
            Self::Bf16(values) => take(values, start, bf16::to_f32),
            Self::F32(values) => take(values, start, |x| x),
        }
    }
}
