//! bf16 weights in tiles.
//!
//! ```text
//! [tile][k][16 words]: word j = lane j in the low half, lane 16 + j in the high half
//! ```

use super::Tiles;
use crate::engine::EngineError;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::lanes::LANES;
use crate::engine::cpu::path::{CpuPath, Kind};
use crate::quant::bf16;

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

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn unpack_pairs(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [u32]) {
        assert_eq!(path.kind(), Kind::Avx512Bf16, "it takes pairs");
        let start = tile * self.tile_words() + k * STEP_WORDS;
        let words = &self.words[start..][..n_k * STEP_WORDS];
        let words = words.as_chunks::<LANES>().0;
        let out = out[..n_k / 2 * LANES].as_chunks_mut::<LANES>().0;
        assert_eq!(words.len(), out.len(), "as many pairs");
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        unsafe {
            x86::unpack_bf16_pairs(words, out);
        }
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
        Kind::Avx512 | Kind::Avx512Bf16 => unsafe { x86::unpack_bf16_avx512(words, out) },
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

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
mod x86 {
    use super::{LANES, STEP_WORDS};
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
    /// The CPU has AVX-512F; `out` is as long as `words`, both of pairs of k.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn unpack_bf16_pairs(words: &[[u32; LANES]], out: &mut [[u32; LANES]]) {
        let upper = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
        for (words, out) in words.iter().zip(out) {
            let (from, to) = (words.as_ptr().cast::<i32>(), out.as_mut_ptr().cast::<i32>());
            // SAFETY: 16 words a k, 32 words a pair.
            unsafe {
                let even = _mm512_loadu_epi32(from);
                let odd = _mm512_loadu_epi32(from.wrapping_add(STEP_WORDS));
                // Where a bit of `upper` is, the first's bit, else the second's.
                let select = |a, b| _mm512_ternarylogic_epi32::<0xCA>(upper, a, b);
                let low = select(_mm512_slli_epi32::<16>(odd), even);
                let high = select(odd, _mm512_srli_epi32::<16>(even));
                _mm512_storeu_epi32(to, low);
                _mm512_storeu_epi32(to.wrapping_add(16), high);
            }
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
}
