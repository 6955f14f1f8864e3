//! bf16 weights in tiles.
//!
//! ```text
//! [tile][k / 2][32 lanes]: words of the even k in the low half, the odd one in the high half
//! ```

use super::Tiles;
#[cfg(target_arch = "x86_64")]
use super::{BLOCK, fused_values};
use crate::engine::EngineError;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::lanes::{LANES, next_row};
use crate::engine::cpu::path::{CpuPath, on_each_path};
use crate::quant::bf16;

/// Packed bf16 weights.
pub struct Bf16Tiles {
    n_k: usize,
    words: Buffer<u32>,
}

impl Bf16Tiles {
    /// Bytes of one tile.
    pub const fn tile_bytes(n_k: usize) -> usize {
        n_k / 2 * LANES * size_of::<u32>()
    }

    pub fn zeroed(what: &str, n_tiles: usize, n_k: usize) -> Result<Self, EngineError> {
        assert_eq!(n_k % 2, 0, "the config was checked");
        let words = Buffer::to_fill(what, n_tiles * n_k / 2 * LANES)?;
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
        self.n_k / 2 * LANES
    }
}

/// Puts one weight into its tile's words.
#[inline(always)]
pub fn pack_bf16(tile: &mut [u32], lane: usize, k: usize, bits: u16) {
    // The tile began as zeros.
    tile[k / 2 * LANES + lane] |= u32::from(bits) << (k % 2 * 16);
}

/// As [`pack_bf16`] of a lane's values from `k`, which is even, on.
#[inline]
pub fn pack_bf16_run<const N: usize>(tile: &mut [u32], lane: usize, k: usize, bits: &[u16; N]) {
    let rows = tile[k / 2 * LANES..].as_chunks_mut::<LANES>().0;
    for (row, &[even, odd]) in rows.iter_mut().zip(bits.as_chunks::<2>().0) {
        row[lane] = u32::from(even) | u32::from(odd) << 16;
    }
}

/// As [`pack_bf16`] of all lanes' rows, each the little-endian bytes of its values.
pub fn pack_bf16_lanes(tile: &mut [u32], rows: &[&[u8]; LANES]) {
    // Pairs of a lane that are one line of the cache.
    const PAIRS: usize = 16;
    let out = tile.as_chunks_mut::<{ PAIRS * LANES }>().0;
    for (i, out) in out.iter_mut().enumerate() {
        let lines = rows.map(|row| {
            let line = row[i * PAIRS * 4..].as_chunks::<4>().0;
            std::array::from_fn::<u32, PAIRS, _>(|pair| u32::from_le_bytes(line[pair]))
        });
        for (pair, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            for lane in 0..LANES {
                out[lane] = lines[lane][pair];
            }
        }
    }
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
        let start = tile * self.tile_words() + k / 2 * LANES;
        let words = &self.words[start..][..n_k / 2 * LANES];
        unpack_bf16(path, words, &mut out[..n_k * LANES]);
    }

    fn packed_pairs(&self, tile: usize) -> Option<(&[u32], usize)> {
        let n_words = self.tile_words();
        Some((&self.words[tile * n_words..], n_words))
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
        let n_words = self.tile_words();
        let words = &self.words[tile * n_words..][..n_words];
        let of_tile = words.as_chunks::<{ BLOCK / 2 * LANES }>().0;
        fused_values!(x86::fused_values, of_tile, blocks, acc, x, x_starts);
        true
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        let word = self.words[tile * self.tile_words() + k / 2 * LANES + lane];
        bf16::to_f32((word >> (k % 2 * 16)) as u16)
    }
}

on_each_path! {
    fn unpack_bf16(words: &[u32], out: &mut [f32]) = unpack_body
}

#[inline(always)]
fn unpack_body(words: &[u32], out: &mut [f32]) {
    let words = words.as_chunks::<LANES>().0;
    let out = out.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
    assert_eq!(words.len(), out.len(), "as many pairs");
    for (words, [even, odd]) in words.iter().zip(out) {
        next_row();
        for lane in 0..LANES {
            even[lane] = f32::from_bits(words[lane] << 16);
            odd[lane] = f32::from_bits(words[lane] & 0xFFFF_0000);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
#[allow(clippy::needless_range_loop, reason = "registers in lockstep")]
mod x86 {
    use super::{BLOCK, LANES};
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX2 and FMA; `x` holds `BLOCK` values a block for each row.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn fused_values<const T: usize>(
        blocks: &[[u32; BLOCK / 2 * LANES]],
        acc: [&mut [f32; LANES]; T],
        x: &[f32],
        x_starts: [usize; T],
    ) {
        let mut sums = [[_mm256_setzero_ps(); LANES / 8]; T];
        let mut rows = [x.as_ptr(); T];
        for t in 0..T {
            rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
            for q in 0..LANES / 8 {
                // SAFETY: 32 lanes a row.
                sums[t][q] = unsafe { _mm256_loadu_ps(acc[t].as_ptr().wrapping_add(8 * q)) };
            }
        }
        let odd_half = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
        for words in blocks {
            for pair in 0..BLOCK / 2 {
                let words = words.as_ptr().wrapping_add(pair * LANES);
                for odd in [true, false] {
                    for q in 0..LANES / 8 {
                        // SAFETY: 32 words a pair, and a factor of each row.
                        unsafe {
                            let words = _mm256_loadu_si256(words.wrapping_add(8 * q).cast());
                            let w = _mm256_castsi256_ps(match odd {
                                true => _mm256_and_si256(words, odd_half),
                                false => _mm256_slli_epi32::<16>(words),
                            });
                            for t in 0..T {
                                let factor = rows[t].wrapping_add(2 * pair + usize::from(odd));
                                let factor = _mm256_set1_ps(factor.read_unaligned());
                                sums[t][q] = _mm256_fmadd_ps(w, factor, sums[t][q]);
                            }
                        }
                    }
                }
            }
            for row in &mut rows {
                *row = row.wrapping_add(BLOCK);
            }
        }
        for t in 0..T {
            for q in 0..LANES / 8 {
                // SAFETY: 32 lanes a row.
                unsafe { _mm256_storeu_ps(acc[t].as_mut_ptr().wrapping_add(8 * q), sums[t][q]) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::weights::tests::Random;

    #[test]
    fn all_lanes_at_once_are_packed_as_one_by_one() {
        const N_K: usize = 96;
        let mut random = Random(11);
        let rows: [Vec<u8>; LANES] =
            std::array::from_fn(|_| (0..2 * N_K).map(|_| random.next() as u8).collect());
        let mut singly = vec![0; N_K / 2 * LANES];
        for (lane, row) in rows.iter().enumerate() {
            for (k, &bytes) in row.as_chunks::<2>().0.iter().enumerate() {
                pack_bf16(&mut singly, lane, k, u16::from_le_bytes(bytes));
            }
        }
        let mut together = vec![u32::MAX; singly.len()];
        pack_bf16_lanes(&mut together, &std::array::from_fn(|lane| &rows[lane][..]));
        assert!(together == singly, "{N_K} values a lane");
    }
}
