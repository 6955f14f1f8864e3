//! bf16 weights in tiles.
//!
//! ```text
//! [tile][k / 2][32 lanes]: words of the even k in the low half, the odd one in the high half
//! ```

use super::Tiles;
use crate::engine::EngineError;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::lanes::LANES;
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
        for lane in 0..LANES {
            even[lane] = f32::from_bits(words[lane] << 16);
            odd[lane] = f32::from_bits(words[lane] & 0xFFFF_0000);
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
