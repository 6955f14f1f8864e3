//! Weights as stored to weights as the kernels read them (kernels/gemm.cuh): tiles of 16 out
//! features x 64 k in the order in which the lanes of `mma.m16n8k16` hold them.
//!
//! ```text
//! lane l: g = l / 4, t = l % 4
//! a0 = (g, 2t), a1 = (g + 8, 2t), a2 = (g, 2t + 8), a3 = (g + 8, 2t + 8), each with the next k
//! bf16   [4 steps][32 lanes][a0 a1 a2 a3]                             2048 bytes
//! mxint8 [2 halves][32 lanes][2 steps][2] words, scales               1056 bytes
//! mxfp4  [32 lanes][4 steps] words, scales                             544 bytes
//! scales [8 g][rows g, g + 8][2 halves]
//! matrix [blocks of 64 features][groups of 64 k][4 tiles]
//! ```
//!
//! Rows and k past the matrix are zeros. Pure functions; the tests unpack as the kernels do.

use std::convert::Infallible;

use rayon::prelude::*;

use crate::engine::checkpoint::MatrixFormat;
use crate::quant::{mxfp4, mxint8};

/// Out features of a tile.
pub const TILE_M: usize = 16;
/// k of a tile.
pub const GROUP_K: usize = 64;
/// Tiles of a block of 64 out features.
pub const BLOCK_TILES: usize = 4;
/// Scale bytes of a tile of a block format: its last ones.
pub const TILE_SCALES: usize = TILE_M * GROUP_K / mxfp4::BLOCK;

/// Bytes of a tile.
pub const fn tile_bytes(format: MatrixFormat) -> usize {
    match format {
        MatrixFormat::Bf16 => TILE_M * GROUP_K * 2,
        MatrixFormat::Mxint8 => TILE_M * GROUP_K + TILE_SCALES,
        MatrixFormat::Mxfp4 => TILE_M * GROUP_K / 2 + TILE_SCALES,
    }
}

/// Scale bytes in the kernels' narrow form, which unpacks with one product: as exponents of a
/// scale times a power of two.
struct Narrow {
    /// Greatest scale byte for which that is a bf16.
    greatest: u8,
    /// What is added to a scale byte.
    bias: u8,
}

/// Codes are read as 2^-126 of their values.
const MXFP4_NARROW: Narrow = Narrow {
    greatest: 128,
    bias: 126,
};
/// Codes are read as significands: one step is 1 / 128, and 128 steps are twice the scale.
const MXINT8_NARROW: Narrow = Narrow {
    greatest: 253,
    bias: 1,
};

/// What is added to the scale bytes of a block format's tiles in the narrow form; nothing in bf16,
/// which has none.
pub fn narrow_bias(format: MatrixFormat) -> Option<u8> {
    match format {
        MatrixFormat::Bf16 => None,
        MatrixFormat::Mxint8 => Some(MXINT8_NARROW.bias),
        MatrixFormat::Mxfp4 => Some(MXFP4_NARROW.bias),
    }
}

/// Which row of the matrix is row `r` of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    Natural,
    /// Of interleaved rows (even gate, odd up): 8 gates, then their ups.
    GateUp,
    /// Dims `p..p + 8` of a head, then dims `p + head_dim / 2..`: rotary pairs 8 apart.
    Rotary {
        head_dim: usize,
    },
}

impl RowOrder {
    /// The matrix's row.
    pub fn row(self, tile: usize, r: usize) -> usize {
        let (half, g) = (r / 8, r % 8);
        match self {
            Self::Natural => tile * TILE_M + r,
            Self::GateUp => 2 * (tile * 8 + g) + half,
            Self::Rotary { head_dim } => {
                let tiles = head_dim / TILE_M;
                tile / tiles * head_dim + tile % tiles * 8 + g + half * head_dim / 2
            }
        }
    }
}

/// Groups along k.
pub fn n_groups(n_k: usize) -> usize {
    n_k.div_ceil(GROUP_K)
}

/// Tiles along the out features.
pub fn n_tiles(n_out: usize) -> usize {
    n_out.div_ceil(TILE_M)
}

/// Tiles that a packed matrix has: whole blocks.
fn packed_tiles(n_out: usize) -> usize {
    n_tiles(n_out).next_multiple_of(BLOCK_TILES)
}

/// Bytes of a packed matrix.
pub fn matrix_bytes(format: MatrixFormat, n_out: usize, n_k: usize) -> usize {
    packed_tiles(n_out) * n_groups(n_k) * tile_bytes(format)
}

/// Fills every tile of a packed matrix: `fill(tile, group, bytes)`.
fn each_tile<E: Send>(
    out: &mut [u8],
    n_k: usize,
    tile_bytes: usize,
    fill: impl Fn(usize, usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let block_bytes = n_groups(n_k) * BLOCK_TILES * tile_bytes;
    out.par_chunks_mut(block_bytes)
        .enumerate()
        .try_for_each(|(block, bytes)| {
            let tiles = bytes.chunks_exact_mut(tile_bytes).enumerate();
            for (i, bytes) in tiles {
                let (group, tile) = (i / BLOCK_TILES, block * BLOCK_TILES + i % BLOCK_TILES);
                fill(tile, group, bytes)?;
            }
            Ok(())
        })
}

/// Packs the bf16 matrix `[n_out, n_k]` whose bits are `value(row, k)`.
pub fn bf16(
    out: &mut [u8],
    n_out: usize,
    n_k: usize,
    order: RowOrder,
    value: impl Fn(usize, usize) -> u16 + Sync,
) {
    let room = matrix_bytes(MatrixFormat::Bf16, n_out, n_k);
    assert_eq!(out.len(), room, "the caller made room");
    let tile_bytes = tile_bytes(MatrixFormat::Bf16);
    let filled = each_tile::<Infallible>(out, n_k, tile_bytes, |tile, group, bytes| {
        for (i, word) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (j, lane, step) = (i % 4, i / 4 % 32, i / 128);
            let row = order.row(tile, lane / 4 + j % 2 * 8);
            let k = group * GROUP_K + step * 16 + lane % 4 * 2 + j / 2 * 8;
            let at = |k: usize| {
                let inside = row < n_out && k < n_k;
                if inside { value(row, k) } else { 0 }
            };
            let [a, b] = at(k).to_le_bytes();
            let [c, d] = at(k + 1).to_le_bytes();
            *word = [a, b, c, d];
        }
        Ok(())
    });
    match filled {
        Ok(()) => {}
    }
}

/// A scale byte that the kernels' narrow form cannot hold was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsWide;

/// Places of a code's sign and three other bits (exponent high, low, mantissa) in the low half
/// of a word, for each of the four pairs.
const CODE_PLACES: [[u32; 4]; 4] = [[15, 8, 7, 6], [5, 30, 29, 28], [9, 2, 1, 0], [11, 4, 3, 10]];

/// A code of pair `j` in half `half` of a word.
fn place_code(code: u8, j: usize, half: usize) -> u32 {
    let bits = CODE_PLACES[j]
        .iter()
        .zip([3, 2, 1, 0])
        .map(|(place, bit)| u32::from(code >> bit & 1) << place);
    bits.sum::<u32>().rotate_left(16 * half as u32)
}

/// Packs the MXFP4 matrix `[n_out, n_k]` whose blocks are `block(row, k / 32)`: scale byte and
/// codes. `wide`: scale bytes stay as they are, for kernels built with `WIDE_SCALES`.
///
/// # Errors
/// What `block` gives, or [`NeedsWide`] through `E` for a scale byte above 128.
pub fn mxfp4<E: From<NeedsWide> + Send>(
    out: &mut [u8],
    n_out: usize,
    n_k: usize,
    order: RowOrder,
    wide: bool,
    block: impl Fn(usize, usize) -> Result<(u8, [u8; mxfp4::BLOCK_BYTES]), E> + Sync,
) -> Result<(), E> {
    let room = matrix_bytes(MatrixFormat::Mxfp4, n_out, n_k);
    assert_eq!(out.len(), room, "the caller made room");
    let tile_bytes = tile_bytes(MatrixFormat::Mxfp4);
    each_tile(out, n_k, tile_bytes, |tile, group, bytes| {
        let (codes, scales) = bytes.split_at_mut(TILE_M * GROUP_K / 2);
        let mut words = [[0u32; 4]; 32];
        for r in 0..TILE_M {
            for half in 0..GROUP_K / mxfp4::BLOCK {
                let (row, index) = (order.row(tile, r), group * 2 + half);
                let inside = row < n_out && index * mxfp4::BLOCK < n_k;
                let (scale, block) = match inside {
                    true => block(row, index)?,
                    false => (0, [0; mxfp4::BLOCK_BYTES]),
                };
                let zeros = block.iter().all(|byte| byte & 0x77 == 0);
                scales[scale_at(r, half)] = MXFP4_NARROW.byte(scale, zeros, wide)?;
                for (pair, byte) in block.into_iter().enumerate() {
                    place_pair(&mut words, r, half * mxfp4::BLOCK + 2 * pair, byte);
                }
            }
        }
        let codes = codes.as_chunks_mut::<4>().0.iter_mut();
        for (out, word) in codes.zip(words.as_flattened()) {
            *out = word.to_le_bytes();
        }
        Ok(())
    })
}

/// Packs the MXINT8 matrix `[n_out, n_k]` whose blocks are `block(row, k / 32)`: scale byte and
/// codes, none of them -128. `wide`: scale bytes stay as they are, for kernels built with
/// `WIDE_SCALES`.
///
/// # Errors
/// What `block` gives, or [`NeedsWide`] through `E` for a scale byte above 253.
pub fn mxint8<E: From<NeedsWide> + Send>(
    out: &mut [u8],
    n_out: usize,
    n_k: usize,
    order: RowOrder,
    wide: bool,
    block: impl Fn(usize, usize) -> Result<(u8, [i8; mxint8::BLOCK]), E> + Sync,
) -> Result<(), E> {
    let room = matrix_bytes(MatrixFormat::Mxint8, n_out, n_k);
    assert_eq!(out.len(), room, "the caller made room");
    let tile_bytes = tile_bytes(MatrixFormat::Mxint8);
    each_tile(out, n_k, tile_bytes, |tile, group, bytes| {
        let (bytes, scales) = bytes.split_at_mut(TILE_M * GROUP_K);
        bytes.fill(0);
        for r in 0..TILE_M {
            for half in 0..GROUP_K / mxint8::BLOCK {
                let (row, index) = (order.row(tile, r), group * 2 + half);
                let inside = row < n_out && index * mxint8::BLOCK < n_k;
                let (scale, codes) = match inside {
                    true => block(row, index)?,
                    false => (0, [0; mxint8::BLOCK]),
                };
                let zeros = codes.iter().all(|&code| code == 0);
                scales[scale_at(r, half)] = MXINT8_NARROW.byte(scale, zeros, wide)?;
                for (i, code) in codes.into_iter().enumerate() {
                    place_int8(bytes, r, half * mxint8::BLOCK + i, code);
                }
            }
        }
        Ok(())
    })
}

/// Where among a tile's scales that of tile row `r` is, in a half of its k.
fn scale_at(r: usize, half: usize) -> usize {
    r % 8 * 4 + r / 8 * 2 + half
}

impl Narrow {
    /// The scale as the kernels want it. A block of zeros gets scale 1, whatever its byte was.
    fn byte(&self, scale: u8, zeros: bool, wide: bool) -> Result<u8, NeedsWide> {
        let scale = if zeros { 127 } else { scale };
        if wide {
            Ok(scale)
        } else if scale > self.greatest {
            Err(NeedsWide)
        } else {
            Ok(scale + self.bias)
        }
    }
}

/// Puts the code of k `k` of tile row `r` into its lane's words: the magnitude in bits 0 to 6 of a
/// byte, the sign at bit 7 of the other byte of the same half.
fn place_int8(bytes: &mut [u8], r: usize, k: usize, code: i8) {
    let (step, within) = (k / 16, k % 16);
    let lane = r % 8 * 4 + within % 8 / 2;
    let at = step / 2 * 512 + lane * 16 + step % 2 * 8 + within / 8 * 4 + within % 2 * 2;
    bytes[at + r / 8] |= code.unsigned_abs();
    bytes[at + 1 - r / 8] |= u8::from(code < 0) << 7;
}

/// Puts the codes of k `k` (low nibble) and `k + 1` of tile row `r` into their lane's word.
fn place_pair(words: &mut [[u32; 4]; 32], r: usize, k: usize, byte: u8) {
    let (step, within) = (k / 16, k % 16);
    let lane = r % 8 * 4 + within % 8 / 2;
    let j = r / 8 + within / 8 * 2;
    words[lane][step] |= place_code(byte & 15, j, 0) | place_code(byte >> 4, j, 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{bf16 as bf16_format, mxint8 as mxint8_format};

    /// The kernels' `unpack_mxfp4` and `mul_bf16x2`, in f32 (all values are exact in bf16).
    fn unpack(word: u32, scales: [f32; 2]) -> [[f32; 2]; 4] {
        const CODE_BITS: u32 = 0x81C0_81C0;
        let pairs = [
            word & CODE_BITS,
            word.rotate_left(10) & CODE_BITS,
            (word << 6) & CODE_BITS,
            ((word << 4) & 0x8180_8180) | ((word >> 4) & 0x0040_0040),
        ];
        let value = |bits: u32, j: usize| {
            // The product is exact; in f64 no step of it leaves the range.
            let small = f64::from(bf16_format::to_f32(bits as u16));
            (small * 2f64.powi(126) * f64::from(scales[j % 2])) as f32
        };
        std::array::from_fn(|j| [value(pairs[j] & 0xFFFF, j), value(pairs[j] >> 16, j)])
    }

    /// Where the kernels look for a tile.
    fn tile_index(tile: usize, group: usize, groups: usize) -> usize {
        (tile / BLOCK_TILES * groups + group) * BLOCK_TILES + tile % BLOCK_TILES
    }

    const MXFP4_TILE_BYTES: usize = tile_bytes(MatrixFormat::Mxfp4);
    const MXINT8_TILE_BYTES: usize = tile_bytes(MatrixFormat::Mxint8);
    const BF16_TILE_BYTES: usize = tile_bytes(MatrixFormat::Bf16);

    fn mxfp4_bytes(n_out: usize, n_k: usize) -> usize {
        matrix_bytes(MatrixFormat::Mxfp4, n_out, n_k)
    }

    /// The kernels' `unpack_mxint8` of one half of a word, in f64, where every step is exact.
    fn unpack_int8(half: u16, scale_byte: u8, wide: bool) -> f32 {
        let of = |bits: u16| f64::from(bf16_format::to_f32(bits));
        let significand = of((half & 0x807F) | 0x3F80);
        let scale = u16::from(scale_byte) << 7;
        let value = if wide {
            (significand * of(0x4000) + of((!half & 0x8000) | 0x4000)) * of(scale)
        } else {
            significand * of(scale) + of((!half & 0x8000) | scale)
        };
        let value = value as f32;
        assert_eq!(bf16_format::round(value).to_bits(), value.to_bits());
        value
    }

    /// What the kernels make of (tile, row of tile, k) of a packed MXINT8 matrix.
    fn unpacked_int8(
        bytes: &[u8],
        groups: usize,
        tile: usize,
        r: usize,
        k: usize,
        wide: bool,
    ) -> f32 {
        let start = tile_index(tile, k / GROUP_K, groups) * MXINT8_TILE_BYTES;
        let bytes = &bytes[start..start + MXINT8_TILE_BYTES];
        let (k, g) = (k % GROUP_K, r % 8);
        let (step, within) = (k / 16, k % 16);
        let lane = g * 4 + within % 8 / 2;
        // Two words a step: of near k and of far.
        let at = step / 2 * 512 + lane * 16 + step % 2 * 8 + within / 8 * 4;
        let word = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let half = (word >> (within % 2 * 16)) as u16;
        let half = if r < 8 { half } else { half.swap_bytes() };
        let scale = bytes[1024 + g * 4 + r / 8 * 2 + step / 2];
        unpack_int8(half, scale, wide)
    }

    /// What lane and word of a packed matrix say of (tile, row of tile, k).
    fn unpacked(bytes: &[u8], groups: usize, tile: usize, r: usize, k: usize, wide: bool) -> f32 {
        let start = tile_index(tile, k / GROUP_K, groups) * MXFP4_TILE_BYTES;
        let bytes = &bytes[start..start + MXFP4_TILE_BYTES];
        let (k, g) = (k % GROUP_K, r % 8);
        let (step, within) = (k / 16, k % 16);
        let lane = g * 4 + within % 8 / 2;
        let at = lane * 16 + step * 4;
        let word = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        // The kernels' `scales_of_rows`: the byte is the exponent of a bf16.
        let scale = |i: usize| {
            let byte = bytes[512 + g * 4 + i * 2 + step / 2];
            let exponent = f32::from_bits(u32::from(byte) << 23);
            if wide {
                exponent
            } else {
                (f64::from(exponent) * 2f64.powi(-126)) as f32
            }
        };
        unpack(word, [scale(0), scale(1)])[r / 8 + within / 8 * 2][within % 2]
    }

    fn blocks(seed: u8, scale_of: impl Fn(usize) -> u8) -> impl Fn(usize, usize) -> (u8, [u8; 16]) {
        move |row, block| {
            let of = |i: usize| {
                (row * 7 + block * 31 + i * 13 + usize::from(seed)).wrapping_mul(0x9E37_79B9) >> 9
            };
            (
                scale_of(row * 5 + block),
                std::array::from_fn(|i| of(i) as u8),
            )
        }
    }

    #[test]
    fn unpacked_mxfp4_is_what_was_packed() {
        let orders = [
            (RowOrder::Natural, 68, 96),
            (RowOrder::GateUp, 128, 160),
            (RowOrder::Rotary { head_dim: 32 }, 96, 32),
            (RowOrder::Rotary { head_dim: 64 }, 192, 64),
        ];
        for (order, n_out, n_k) in orders {
            for wide in [false, true] {
                let most = if wide { 252 } else { 128 };
                let block = blocks(3, move |i| 2 + (i * 11 % (most - 1)) as u8);
                let mut bytes = vec![0xFF; mxfp4_bytes(n_out, n_k)];
                mxfp4::<NeedsWide>(&mut bytes, n_out, n_k, order, wide, |row, i| {
                    Ok(block(row, i))
                })
                .expect("the scales fit");
                let mut seen = vec![false; n_out];
                for tile in 0..n_tiles(n_out) {
                    for r in 0..TILE_M {
                        let row = order.row(tile, r);
                        for k in 0..n_groups(n_k) * GROUP_K {
                            let got = unpacked(&bytes, n_groups(n_k), tile, r, k, wide);
                            let expected = if row < n_out && k < n_k {
                                let (scale, codes) = block(row, k / 32);
                                mxfp4::unpack(scale, &codes)[k % 32]
                            } else {
                                0.0
                            };
                            assert_eq!(got, expected, "{order:?} wide {wide} row {row} k {k}");
                        }
                        if let Some(seen) = seen.get_mut(row) {
                            assert!(!*seen, "row {row} is in two places");
                            *seen = true;
                        }
                    }
                }
                assert!(seen.iter().all(|&seen| seen), "{order:?} leaves rows out");
            }
        }
    }

    #[test]
    fn unpacked_mxint8_is_what_was_packed() {
        let orders = [
            (RowOrder::Natural, 68, 96),
            (RowOrder::GateUp, 128, 160),
            (RowOrder::Rotary { head_dim: 64 }, 192, 64),
        ];
        for (order, n_out, n_k) in orders {
            for wide in [false, true] {
                let most = if wide { 254 } else { 253 };
                let block = |row: usize, index: usize| {
                    let at = row * 7 + index * 31;
                    let codes = std::array::from_fn(|i| ((at + i * 13) % 255) as i32 - 127);
                    (1 + (at % most) as u8, codes.map(|code| code as i8))
                };
                let mut bytes = vec![0xFF; matrix_bytes(MatrixFormat::Mxint8, n_out, n_k)];
                mxint8::<NeedsWide>(&mut bytes, n_out, n_k, order, wide, |row, i| {
                    Ok(block(row, i))
                })
                .expect("the scales fit");
                for tile in 0..n_tiles(n_out) {
                    for r in 0..TILE_M {
                        let row = order.row(tile, r);
                        for k in 0..n_groups(n_k) * GROUP_K {
                            let got = unpacked_int8(&bytes, n_groups(n_k), tile, r, k, wide);
                            let expected = if row < n_out && k < n_k {
                                let (scale, codes) = block(row, k / 32);
                                mxint8_format::unpack(scale, &codes)[k % 32]
                            } else {
                                0.0
                            };
                            assert_eq!(got, expected, "{order:?} wide {wide} row {row} k {k}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn all_int8_codes_and_scales_are_exact() {
        for scale in mxint8_format::SCALE_MIN..=mxint8_format::SCALE_MAX {
            for code in -127..=127i8 {
                for r in [3, 11] {
                    let mut bytes = [0; 1024];
                    place_int8(&mut bytes, r, 0, code);
                    let half = u16::from_le_bytes([bytes[192], bytes[193]]);
                    let half = if r < 8 { half } else { half.swap_bytes() };
                    let expected = f32::from(code) * mxint8_format::step(scale);
                    let wide = MXINT8_NARROW.byte(scale, false, true);
                    let wide = unpack_int8(half, wide.expect("it holds every scale"), true);
                    assert_eq!(wide, expected, "{code} at {scale}");
                    match MXINT8_NARROW.byte(scale, false, false) {
                        Ok(byte) => {
                            let narrow = unpack_int8(half, byte, false);
                            assert_eq!(narrow.to_bits(), expected.to_bits(), "{code} at {scale}");
                        }
                        Err(NeedsWide) => assert_eq!(scale, mxint8_format::SCALE_MAX),
                    }
                }
            }
        }
    }

    #[test]
    fn all_codes_and_narrow_scales_are_exact() {
        for scale in 2..=MXFP4_NARROW.greatest {
            for code in 0..16u8 {
                for j in 0..4 {
                    for half in 0..2 {
                        let word = place_code(code, j, half);
                        let got = unpack(word, [mxfp4::scale(scale); 2])[j][half];
                        let expected = mxfp4::VALUES[usize::from(code)] * mxfp4::scale(scale);
                        assert_eq!(got.to_bits(), expected.to_bits());
                    }
                }
            }
        }
        let all = (0..4).map(|j| place_code(15, j, 0) | place_code(15, j, 1));
        assert_eq!(
            all.fold(0, |sum, bits| sum ^ bits),
            u32::MAX,
            "places overlap"
        );
    }

    #[test]
    fn a_large_scale_asks_for_the_wide_form() {
        let pack = |scale: u8, code: u8, wide| {
            let mut bytes = vec![0; mxfp4_bytes(16, 64)];
            mxfp4::<NeedsWide>(&mut bytes, 16, 64, RowOrder::Natural, wide, |_, _| {
                Ok((scale, [code; 16]))
            })
        };
        assert_eq!(pack(129, 1, false), Err(NeedsWide));
        assert_eq!(pack(129, 1, true), Ok(()));
        assert_eq!(
            pack(255, 0x80, false),
            Ok(()),
            "a block of zeros has no scale"
        );
    }

    #[test]
    fn bf16_is_laid_out_as_the_lanes_read_it() {
        let (n_out, n_k) = (40, 96);
        let value = |row: usize, k: usize| (row * 1000 + k) as u16;
        let mut bytes = vec![0xFF; matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
        bf16(&mut bytes, n_out, n_k, RowOrder::Natural, value);
        let groups = n_groups(n_k);
        for row in 0..n_tiles(n_out) * TILE_M {
            for k in 0..groups * GROUP_K {
                let (tile, g) = (row / TILE_M, row % 8);
                let (step, within) = (k % GROUP_K / 16, k % 16);
                let j = row % TILE_M / 8 + within / 8 * 2;
                let lane = g * 4 + within % 8 / 2;
                let at = tile_index(tile, k / GROUP_K, groups) * BF16_TILE_BYTES
                    + step * 512
                    + lane * 16
                    + j * 4
                    + within % 2 * 2;
                let got = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                let expected = if row < n_out && k < n_k {
                    value(row, k)
                } else {
                    0
                };
                assert_eq!(got, expected, "row {row} k {k}");
            }
        }
    }
}
