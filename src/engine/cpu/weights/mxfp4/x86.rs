//! MXFP4 blocks by AVX2 and AVX-512: unpacked to values or to pairs of bf16, or multiplied as they are
//! unpacked.

#![allow(unsafe_code, reason = "SIMD loads through pointers")]
#![allow(clippy::needless_range_loop, reason = "registers in lockstep")]

use super::{GROUP_BYTES, LANES, Mxfp4Block, PARTS, PairedBlock, UnpackedBlock, VALUES, in_parts};
use crate::quant::mxfp4;
use std::arch::x86_64::*;

/// # Safety
/// The CPU has AVX-512F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn unpack_mxfp4_avx512(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
    // SAFETY: `bytes` holds 32 scales and 8 x 64 bytes of codes, `out` 32 x 32 values.
    unsafe {
        let values = _mm512_loadu_ps(VALUES.as_ptr());
        let scales = |at: usize| {
            let bytes = _mm_loadu_si128(bytes.as_ptr().wrapping_add(at).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes)))
        };
        let scales = [scales(0), scales(16)];
        for group in 0..GROUPS {
            let at = LANES + GROUP_BYTES * group;
            let codes = _mm512_loadu_si512(bytes.as_ptr().wrapping_add(at).cast());
            // The four codes of a lane, in the lower half of a word.
            let halves = [
                _mm512_unpacklo_epi16(codes, codes),
                _mm512_unpackhi_epi16(codes, codes),
            ];
            for half in 0..2 {
                let codes = halves[half];
                let of_k = [
                    codes,
                    _mm512_srli_epi32::<8>(codes),
                    _mm512_srli_epi32::<4>(codes),
                    _mm512_srli_epi32::<12>(codes),
                ];
                for k in 0..4 {
                    // The permutation looks at the low four bits of each index alone.
                    let value = _mm512_permutexvar_ps(of_k[k], values);
                    let at = (4 * group + k) * LANES + 16 * half;
                    let to = out.as_mut_ptr().wrapping_add(at);
                    _mm512_storeu_ps(to, _mm512_mul_ps(value, scales[half]));
                }
            }
        }
    }
}

/// Twice the values: integers.
const TWICE_VALUES: [i8; 32] = {
    let mut values = [0; 32];
    let mut i = 0;
    while i < 32 {
        values[i] = (VALUES[i % 16] * 2.0) as i8;
        i += 1;
    }
    values
};

/// Of 32 bytes of a pair of k, 4 lower lanes and 4 upper ones and as many again: the lower or the upper lanes of
/// the even or the odd k, each the top byte of a word.
const TOP_BYTES: [[[u8; 32]; 2]; 2] = {
    // An index with its highest bit set gives 0.
    let mut indices = [[[0x80; 32]; 2]; 2];
    let mut i = 0;
    while i < 32 {
        let (half, odd, lane) = (i / 16, i / 8 % 2, i % 8);
        indices[half][odd][4 * lane + 3] = (8 * half + 2 * (lane % 4) + odd) as u8;
        i += 1;
    }
    indices
};

/// A value is the integer that is twice as large, as f32, times half its scale.
///
/// # Safety
/// The CPU has AVX2 and FMA; `x` holds 32 values a block for each row.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn fused_values<const T: usize>(
    blocks: &[Mxfp4Block],
    acc: [&mut [f32; LANES]; T],
    x: &[f32],
    x_starts: [usize; T],
) {
    const QUARTERS: usize = LANES / 8;
    let mut sums = [[_mm256_setzero_ps(); QUARTERS]; T];
    let mut rows = [x.as_ptr(); T];
    for t in 0..T {
        rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
        for q in 0..QUARTERS {
            // SAFETY: 32 lanes a row.
            sums[t][q] = unsafe { _mm256_loadu_ps(acc[t].as_ptr().wrapping_add(8 * q)) };
        }
    }
    // SAFETY: any bytes are a register.
    let values = unsafe { std::mem::transmute::<[i8; 32], __m256i>(TWICE_VALUES) };
    let low_half = _mm256_set1_epi8(0xF);
    for block in blocks {
        let (scales, codes) = block.split_at(LANES);
        let scale = |q: usize| {
            // SAFETY: 32 scales.
            let bytes = unsafe { _mm_loadl_epi64(scales.as_ptr().wrapping_add(8 * q).cast()) };
            let scale = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes));
            _mm256_mul_ps(_mm256_castsi256_ps(scale), _mm256_set1_ps(0.5))
        };
        // One by one: `from_fn` would call it.
        let scales: [__m256; QUARTERS] = [scale(0), scale(1), scale(2), scale(3)];
        for group in 0..GROUPS {
            let codes = |half: usize| {
                let at = GROUP_BYTES * group + 32 * half;
                // SAFETY: 8 groups of 64 bytes.
                unsafe { _mm256_loadu_si256(codes.as_ptr().wrapping_add(at).cast()) }
            };
            let codes = [codes(0), codes(1)];
            for pair in 0..2 {
                let look_up = |codes: __m256i| {
                    let codes = match pair {
                        0 => codes,
                        _ => _mm256_srli_epi16::<4>(codes),
                    };
                    _mm256_shuffle_epi8(values, _mm256_and_si256(codes, low_half))
                };
                let values = [look_up(codes[0]), look_up(codes[1])];
                for odd in [1, 0] {
                    for q in 0..QUARTERS {
                        // SAFETY: any bytes are a register.
                        let bytes = unsafe {
                            std::mem::transmute::<[u8; 32], __m256i>(TOP_BYTES[q / 2][odd])
                        };
                        let w = _mm256_shuffle_epi8(values[q % 2], bytes);
                        let w = _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(w));
                        let w = _mm256_mul_ps(w, scales[q]);
                        for t in 0..T {
                            let factor = rows[t].wrapping_add(4 * group + 2 * pair + odd);
                            // SAFETY: a factor of each row.
                            let factor = _mm256_set1_ps(unsafe { factor.read_unaligned() });
                            sums[t][q] = _mm256_fmadd_ps(w, factor, sums[t][q]);
                        }
                    }
                }
            }
        }
        for row in &mut rows {
            *row = row.wrapping_add(mxfp4::BLOCK);
        }
    }
    for t in 0..T {
        for q in 0..QUARTERS {
            // SAFETY: 32 lanes a row.
            unsafe { _mm256_storeu_ps(acc[t].as_mut_ptr().wrapping_add(8 * q), sums[t][q]) };
        }
    }
}

/// The exponent by which [`HIGH_BYTES`] are too large: an even one, for their low bytes to be those of the values,
/// and more than the largest scale leaves, so that something is taken from all.
const EXPONENT: u16 = 126;

/// The upper bytes of the values times 2^[`EXPONENT`] as bf16, for the low four bits of an index. Both zeros have
/// 0, so that they are less than what is taken, and subtraction that saturates leaves 0.
const HIGH_BYTES: [u8; 64] = {
    let mut bytes = [0; 64];
    let mut i = 0;
    while i < 64 {
        let value = VALUES[i % 16];
        if value != 0.0 {
            let bits = (value.to_bits() >> 16) as u16 + (EXPONENT << 7);
            assert!(
                bits & 0xFF == (i as u16 / 4 % 4) << 6,
                "the lower byte is in the code"
            );
            bytes[i] = (bits >> 8) as u8;
        }
        i += 1;
    }
    bytes
};

/// Moves bits 2 and 3 of a byte to 6 and 7: a matrix of bits whose first byte tells the highest.
const LOW_BYTES: i64 = 0x0408;

/// Of 32 scales, those of the lower lanes and those of the upper ones: each in all bytes of its pair.
const LANES_OF_SCALES: [[u8; 64]; 2] = {
    let mut indices = [[0; 64]; 2];
    let mut i = 0;
    while i < 128 {
        indices[i / 64][i % 64] = (i / 4) as u8;
        i += 1;
    }
    indices
};

/// Pairs of k of a block.
const PAIRS: usize = mxfp4::BLOCK / 2;

/// Parts of a block of 4 k each.
const GROUPS: usize = mxfp4::BLOCK / 4;

/// Unpacks blocks to pairs of bf16, 16 lanes a register: the upper bytes of 64 values are looked up, the lower
/// ones are bits of the codes, and both are interleaved. With scales that makes 13 operations of the two ports
/// that take them for 4 registers, where a value's two bytes, looked up together, took 16.
///
/// Registers are read and written as arrays: where debug assertions are compiled in, those of unaligned
/// loads and stores would send every register through memory.
struct Unpacker<'a> {
    high_bytes: __m512i,
    /// What the exponents of a pair are too large by, of the lower and the upper lanes.
    excess: [__m512i; 2],
    bytes: &'a Mxfp4Block,
}

impl<'a> Unpacker<'a> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    fn new(bytes: &'a Mxfp4Block) -> Self {
        // SAFETY: any bytes are a register.
        let register = |bytes| unsafe { std::mem::transmute::<[u8; 64], __m512i>(bytes) };
        let scales: &[u8; 64] = bytes.first_chunk().expect("a block is longer");
        let scales = register(*scales);
        let most = _mm512_set1_epi16(((EXPONENT + 127) << 7).cast_signed());
        let excess = |lanes| {
            let scales = _mm512_permutexvar_epi8(register(lanes), scales);
            // 64 and 64 times a scale: it, where the exponent is.
            let shifted = _mm512_maddubs_epi16(scales, _mm512_set1_epi8(64));
            _mm512_sub_epi16(most, shifted)
        };
        Self {
            high_bytes: register(HIGH_BYTES),
            excess: [excess(LANES_OF_SCALES[0]), excess(LANES_OF_SCALES[1])],
            bytes,
        }
    }

    /// A group's two pairs of k, of each the lower lanes and the upper ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    fn group(&self, group: usize) -> [[__m512i; 2]; 2] {
        let codes: &[u8; GROUP_BYTES] = self.bytes[LANES + GROUP_BYTES * group..]
            .first_chunk()
            .expect("a block has 8 groups");
        // SAFETY: any bytes are a register.
        let codes = unsafe { std::mem::transmute::<[u8; 64], __m512i>(*codes) };
        // The permutation looks at the low six bits of each index alone.
        let high = |codes| _mm512_permutexvar_epi8(codes, self.high_bytes);
        let pair = |low: __m512i, high: __m512i| {
            [
                _mm512_subs_epu16(_mm512_unpacklo_epi8(low, high), self.excess[0]),
                _mm512_subs_epu16(_mm512_unpackhi_epi8(low, high), self.excess[1]),
            ]
        };
        let low_bits = _mm512_set1_epi64(LOW_BYTES);
        [
            pair(
                _mm512_gf2p8affine_epi64_epi8::<0>(codes, low_bits),
                high(codes),
            ),
            pair(
                _mm512_and_si512(codes, _mm512_set1_epi8(0xC0_u8.cast_signed())),
                high(_mm512_srli_epi16::<4>(codes)),
            ),
        ]
    }
}

/// # Safety
/// The CPU has AVX-512F, BW, VBMI and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
pub unsafe fn unpack_mxfp4_pairs(bytes: &Mxfp4Block, out: &mut PairedBlock) {
    // SAFETY: as above.
    unsafe { unpack_mxfp4_pairs_here(bytes, out, |_| {}) }
}

/// As part of its caller, which was compiled for the features; runs `between` after each part
/// (see [`Tiles::unpack_block_here`](super::Tiles::unpack_block_here)).
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn unpack_mxfp4_pairs_here(
    bytes: &Mxfp4Block,
    out: &mut PairedBlock,
    mut between: impl FnMut(usize),
) {
    const { assert!(GROUPS == PARTS, "a group a part") };
    // SAFETY: as above.
    let block = unsafe { Unpacker::new(bytes) };
    let (out, _) = out.as_chunks_mut::<{ 2 * LANES }>();
    in_parts!(part => {
        // SAFETY: as above; four registers are 64 words.
        out[part] = unsafe {
            std::mem::transmute::<[[__m512i; 2]; 2], [u32; 2 * LANES]>(block.group(part))
        };
        between(part);
    });
}

/// # Safety
/// The CPU has AVX-512F, BW, VBMI, GFNI and BF16; `x` holds 16 words a block for each row.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni,avx512bf16")]
pub unsafe fn fused_chain<const T: usize>(
    blocks: &[Mxfp4Block],
    acc: &mut [[f32; LANES]; T],
    x: &[u32],
    x_starts: &[usize; T],
) {
    // By index throughout: sums and rows that are also taken as a whole would be kept in memory.
    let mut low_sums = [_mm512_setzero_ps(); T];
    let mut high_sums = [_mm512_setzero_ps(); T];
    let mut rows = [x.as_ptr(); T];
    for t in 0..T {
        rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
        // SAFETY: 32 lanes a row.
        unsafe {
            low_sums[t] = _mm512_loadu_ps(acc[t].as_ptr());
            high_sums[t] = _mm512_loadu_ps(acc[t].as_ptr().wrapping_add(16));
        }
    }
    for bytes in blocks {
        let block = Unpacker::new(bytes);
        for group in 0..GROUPS {
            let pairs = block.group(group);
            for pair in 0..2 {
                let [low, high] = pairs[pair];
                // SAFETY: each row has its factor; a register of words is one of bf16 pairs.
                unsafe {
                    let bf16 = |words: __m512i| std::mem::transmute::<__m512i, __m512bh>(words);
                    for t in 0..T {
                        let factor = rows[t].wrapping_add(2 * group + pair).read_unaligned();
                        let factor = bf16(_mm512_set1_epi32(factor.cast_signed()));
                        low_sums[t] = _mm512_dpbf16_ps(low_sums[t], bf16(low), factor);
                        high_sums[t] = _mm512_dpbf16_ps(high_sums[t], bf16(high), factor);
                    }
                }
            }
        }
        for t in 0..T {
            rows[t] = rows[t].wrapping_add(PAIRS);
        }
    }
    for t in 0..T {
        // SAFETY: 32 lanes a row.
        unsafe {
            _mm512_storeu_ps(acc[t].as_mut_ptr(), low_sums[t]);
            _mm512_storeu_ps(acc[t].as_mut_ptr().wrapping_add(16), high_sums[t]);
        }
    }
}

/// The magnitudes of codes as they are kept, less their sign.
const MAGNITUDES: [f32; 8] = {
    let mut magnitudes = [0.0; 8];
    let mut i = 0;
    while i < 8 {
        magnitudes[i] = VALUES[2 * i];
        i += 1;
    }
    magnitudes
};

/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn unpack_mxfp4_avx2(bytes: &Mxfp4Block, out: &mut UnpackedBlock) {
    // SAFETY: `bytes` holds 32 scales and 8 x 64 bytes of codes, `out` 32 x 32 values.
    unsafe {
        let magnitudes = _mm256_loadu_ps(MAGNITUDES.as_ptr());
        let sign_bit = _mm256_set1_epi32(i32::MIN);
        let scales = |at: usize| {
            let bytes = _mm_loadl_epi64(bytes.as_ptr().wrapping_add(at).cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes)))
        };
        let scales = [scales(0), scales(8), scales(16), scales(24)];
        for group in 0..GROUPS {
            for q in 0..4 {
                let at = LANES + GROUP_BYTES * group + 32 * (q % 2);
                let codes = _mm256_loadu_si256(bytes.as_ptr().wrapping_add(at).cast());
                // The four codes of a lane, in the lower half of a word.
                let codes = match q / 2 {
                    0 => _mm256_unpacklo_epi16(codes, codes),
                    _ => _mm256_unpackhi_epi16(codes, codes),
                };
                // The lowest bit is the sign, the permutation looks at the three above.
                macro_rules! value {
                    ($k:literal, $first:literal) => {
                        let indices = _mm256_srli_epi32::<{ $first + 1 }>(codes);
                        let magnitude = _mm256_permutevar8x32_ps(magnitudes, indices);
                        let sign = _mm256_slli_epi32::<{ 31 - $first }>(codes);
                        let sign = _mm256_castsi256_ps(_mm256_and_si256(sign, sign_bit));
                        let value = _mm256_mul_ps(_mm256_or_ps(magnitude, sign), scales[q]);
                        let to = out
                            .as_mut_ptr()
                            .wrapping_add((4 * group + $k) * LANES + 8 * q);
                        _mm256_storeu_ps(to, value);
                    };
                }
                value!(0, 0);
                value!(1, 8);
                value!(2, 4);
                value!(3, 12);
            }
        }
    }
}
