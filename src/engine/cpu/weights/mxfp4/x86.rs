//! MXFP4 blocks by AVX2 and AVX-512: unpacked to values or to pairs of bf16, or multiplied as they are
//! unpacked.

#![allow(unsafe_code, reason = "SIMD loads through pointers")]
#![allow(clippy::needless_range_loop, reason = "registers in lockstep")]

use super::{LANES, Mxfp4Block, PARTS, PairedBlock, UnpackedBlock, in_parts};
use crate::quant::mxfp4;
use std::arch::x86_64::*;

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

/// Twice the values: integers.
const TWICE_VALUES: [i8; 32] = {
    let mut values = [0; 32];
    let mut i = 0;
    while i < 32 {
        values[i] = (mxfp4::VALUES[i % 16] * 2.0) as i8;
        i += 1;
    }
    values
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
        for pair in 0..PAIRS {
            // SAFETY: 16 pairs of 32 bytes.
            let codes =
                unsafe { _mm256_loadu_si256(codes.as_ptr().wrapping_add(32 * pair).cast()) };
            // Lanes 0 to 15 of the even k and then of the odd one; lanes 16 to 31.
            let look_up = |codes| _mm256_shuffle_epi8(values, _mm256_and_si256(codes, low_half));
            let lanes = [look_up(codes), look_up(_mm256_srli_epi16::<4>(codes))];
            for odd in [true, false] {
                for q in 0..QUARTERS {
                    let of_k = match odd {
                        true => _mm256_extracti128_si256::<1>(lanes[q / 2]),
                        false => _mm256_castsi256_si128(lanes[q / 2]),
                    };
                    let of_quarter = match q % 2 {
                        0 => of_k,
                        _ => _mm_unpackhi_epi64(of_k, of_k),
                    };
                    let w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(of_quarter));
                    let w = _mm256_mul_ps(w, scales[q]);
                    for t in 0..T {
                        let factor = rows[t].wrapping_add(2 * pair + usize::from(odd));
                        // SAFETY: a factor of each row.
                        let factor = _mm256_set1_ps(unsafe { factor.read_unaligned() });
                        sums[t][q] = _mm256_fmadd_ps(w, factor, sums[t][q]);
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

/// The exponent by which [`BF16_VALUES`] are too large: the most that leaves them finite.
const EXPONENT: u16 = 125;

/// The values times 2^[`EXPONENT`] as bf16. Both zeros are 0, from which subtraction that saturates
/// takes nothing.
const BF16_VALUES: [u16; 32] = {
    let mut values = [0; 32];
    let mut i = 0;
    while i < 32 {
        // Twice, so that an index's fifth bit does not matter.
        let value = mxfp4::VALUES[i % 16];
        values[i] = if value == 0.0 {
            0
        } else {
            (value.to_bits() >> 16) as u16 + (EXPONENT << 7)
        };
        i += 1;
    }
    values
};

/// The values' low bytes, then their high ones, twice.
const BYTES_OF_VALUES: [u8; 64] = {
    let mut bytes = [0; 64];
    let mut i = 0;
    while i < 64 {
        bytes[i] = BF16_VALUES[i % 16].to_le_bytes()[i / 16 % 2];
        i += 1;
    }
    bytes
};

/// Bytes before a pair's codes that are loaded with them: a block begins with as many.
const BEFORE: usize = LANES;

/// Of 32 bytes of codes, 16 lanes of an even k and then of the odd one, the two of each lane, in both
/// bytes of a word.
const LANES_OF_CODES: [u8; 64] = {
    let mut indices = [0; 64];
    let mut i = 0;
    while i < 64 {
        indices[i] = (BEFORE + i / 4 + i % 4 / 2 * 16) as u8;
        i += 1;
    }
    indices
};

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

/// Unpacks blocks to pairs of bf16, 16 lanes a register.
///
/// Registers are read and written as arrays: where debug assertions are compiled in, those of unaligned
/// loads and stores would send every register through memory.
///
/// A code's value is looked up at once or, by `BYTES`, a byte at a time: the processors that have AMX
/// take two operations to look up words, on the one port that can, and one for bytes.
struct Unpacker<'a, const BYTES: bool> {
    values: __m512i,
    lanes: __m512i,
    /// What the exponents of a pair are too large by, of the lower and the upper lanes.
    excess: [__m512i; 2],
    bytes: &'a Mxfp4Block,
}

impl<'a, const BYTES: bool> Unpacker<'a, BYTES> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn new(bytes: &'a Mxfp4Block) -> Self {
        /// The upper byte of each word.
        const UPPER: u64 = 0xAAAA_AAAA_AAAA_AAAA;
        // SAFETY: any bytes are a register.
        let register = |bytes| unsafe { std::mem::transmute::<[u8; 64], __m512i>(bytes) };
        let scales: &[u8; 64] = bytes.first_chunk().expect("a block is longer");
        let scales = register(*scales);
        let most = _mm512_set1_epi16(((EXPONENT + 127) << 7).cast_signed());
        let excess = |lanes| {
            let shifted = _mm512_maskz_permutexvar_epi8(UPPER, register(lanes), scales);
            _mm512_sub_epi16(most, _mm512_srli_epi16::<1>(shifted))
        };
        let values = match BYTES {
            true => register(BYTES_OF_VALUES),
            // SAFETY: as above.
            false => unsafe { std::mem::transmute::<[u16; 32], __m512i>(BF16_VALUES) },
        };
        Self {
            values,
            lanes: register(LANES_OF_CODES),
            excess: [excess(LANES_OF_SCALES[0]), excess(LANES_OF_SCALES[1])],
            bytes,
        }
    }

    /// The block's pairs of k 2 pair, 2 pair + 1: the lower lanes, and the upper ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn pair(&self, pair: usize) -> [__m512i; 2] {
        // With what lies before them, so that one instruction loads and permutes.
        let codes: &[u8; BEFORE + 32] = self.bytes[32 * pair..]
            .first_chunk()
            .expect("a block has 16 pairs");
        // SAFETY: as above.
        let codes = unsafe { std::mem::transmute::<[u8; 64], __m512i>(*codes) };
        let codes = _mm512_permutexvar_epi8(self.lanes, codes);
        let value = |codes: __m512i, excess: __m512i| {
            let value = if BYTES {
                // The low four bits of each byte, and a fifth in high bytes.
                const A_AND_B_OR_C: i32 = 0xEA;
                let (low, fifth) = (_mm512_set1_epi8(0xF), _mm512_set1_epi16(0x1000));
                let bytes = _mm512_ternarylogic_epi32::<A_AND_B_OR_C>(codes, low, fifth);
                _mm512_permutexvar_epi8(bytes, self.values)
            } else {
                // The permutation looks at the low five bits of each index alone.
                _mm512_permutexvar_epi16(codes, self.values)
            };
            _mm512_subs_epu16(value, excess)
        };
        [
            value(codes, self.excess[0]),
            value(_mm512_srli_epi16::<4>(codes), self.excess[1]),
        ]
    }
}

/// # Safety
/// The CPU has AVX-512F, BW and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub unsafe fn unpack_mxfp4_pairs<const BYTES: bool>(bytes: &Mxfp4Block, out: &mut PairedBlock) {
    // SAFETY: as above.
    unsafe { unpack_mxfp4_pairs_here::<BYTES>(bytes, out, |_| {}) }
}

/// As part of its caller, which was compiled for the features; runs `between` after each part
/// (see [`Tiles::unpack_block_here`](super::Tiles::unpack_block_here)).
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn unpack_mxfp4_pairs_here<const BYTES: bool>(
    bytes: &Mxfp4Block,
    out: &mut PairedBlock,
    mut between: impl FnMut(usize),
) {
    const A_PART: usize = PAIRS / PARTS;
    // SAFETY: as above.
    let block = unsafe { Unpacker::<BYTES>::new(bytes) };
    let (out, _) = out.as_chunks_mut::<LANES>();
    in_parts!(part => {
        for pair in part * A_PART..(part + 1) * A_PART {
            // SAFETY: as above; two registers are 32 words.
            out[pair] =
                unsafe { std::mem::transmute::<[__m512i; 2], [u32; LANES]>(block.pair(pair)) };
        }
        between(part);
    });
}

/// # Safety
/// The CPU has AVX-512F, BW, VBMI and BF16; `x` holds 16 words a block for each row.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
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
        let block = Unpacker::<false>::new(bytes);
        for pair in 0..PAIRS {
            let [low, high] = block.pair(pair);
            // SAFETY: each row has its factor; a register of words is one of bf16 pairs.
            unsafe {
                let bf16 = |words: __m512i| std::mem::transmute::<__m512i, __m512bh>(words);
                for t in 0..T {
                    let factor = rows[t].wrapping_add(pair).read_unaligned();
                    let factor = bf16(_mm512_set1_epi32(factor.cast_signed()));
                    low_sums[t] = _mm512_dpbf16_ps(low_sums[t], bf16(low), factor);
                    high_sums[t] = _mm512_dpbf16_ps(high_sums[t], bf16(high), factor);
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
