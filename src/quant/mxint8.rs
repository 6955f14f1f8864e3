//! MXINT8: blocks of 32 signed 8-bit integers under one E8M0 scale (OCP Microscaling Formats
//! 1.0, 5.3).
//!
//! An element means `code / 64`, so a block with scale byte `b` has values `code * 2^(b - 133)`.
//! Codes are symmetric, -127 to 127: -128 is never written. Scale bytes lie in
//! [`SCALE_MIN`]..=[`SCALE_MAX`]. Every value is exact in bf16, and every MXFP4 block with a
//! scale byte in 2..=252 is exact here ([`from_mxfp4`]).

use super::mxfp4;

/// Elements under one scale.
pub const BLOCK: usize = 32;

/// Largest magnitude of a code.
pub const CODE_MAX: i8 = 127;

/// Smallest scale byte written: below it bf16 itself is subnormal.
pub const SCALE_MIN: u8 = 1;

/// Largest one: 255 is NaN.
pub const SCALE_MAX: u8 = 254;

/// Fraction bits of a code.
const FRACTION_BITS: i32 = 6;

/// The value of code 1 under a scale byte: 2^(byte - 133), exact, subnormal below byte 7.
#[inline(always)]
pub fn step(byte: u8) -> f32 {
    f32::from_bits(u32::from(byte) << 23) * (1.0 / 64.0)
}

/// The 32 values of a block.
pub fn unpack(scale_byte: u8, codes: &[i8; BLOCK]) -> [f32; BLOCK] {
    let step = step(scale_byte);
    std::array::from_fn(|i| f32::from(codes[i]) * step)
}

/// Quantizes a block: the scale is 2^E with E = floor(log2 of the largest magnitude), or E + 1
/// where the squared error is lower (a tie takes E); elements round to nearest even and saturate
/// at 127. Returns nothing when a value is not finite.
pub fn pack(values: &[f32; BLOCK]) -> Option<(u8, [i8; BLOCK])> {
    let mut largest = 0.0f32;
    for &value in values {
        if !value.is_finite() {
            return None;
        }
        largest = largest.max(value.abs());
    }
    if largest == 0.0 {
        return Some((127, [0; BLOCK]));
    }
    // The biased exponent of a subnormal is 0; the clamp makes it the smallest scale.
    let byte = ((largest.to_bits() >> 23) as u8).clamp(SCALE_MIN, SCALE_MAX);
    let near = with_scale(values, byte);
    // Nothing was cut off and nothing rounded: no other scale is better.
    if near.1 == 0.0 || byte == SCALE_MAX {
        return Some((byte, near.0));
    }
    let wide = with_scale(values, byte + 1);
    if wide.1 < near.1 {
        Some((byte + 1, wide.0))
    } else {
        Some((byte, near.0))
    }
}

/// The codes under one scale, and the sum of squared errors in the order of the elements.
fn with_scale(values: &[f32; BLOCK], byte: u8) -> ([i8; BLOCK], f64) {
    // Powers of two in f64: products with them are exact.
    let step = f64::from(step(byte));
    let inverse = 1.0 / step;
    let most = f64::from(CODE_MAX);
    let mut error = 0.0f64;
    let codes = std::array::from_fn(|i| {
        let value = f64::from(values[i]);
        let code = (value * inverse).round_ties_even().clamp(-most, most);
        error += (value - code * step).powi(2);
        code as i8
    });
    (codes, error)
}

/// The same values out of an MXFP4 block whose scale byte lies in
/// [`mxfp4::SCALE_MIN`]..=[`mxfp4::SCALE_MAX`], or whose codes are all zeros: what [`pack`] makes
/// of the unpacked values, without the search.
#[inline]
pub fn from_mxfp4(scale_byte: u8, codes: &[u8; mxfp4::BLOCK_BYTES]) -> (u8, [i8; BLOCK]) {
    /// Twice the value of a code: whole numbers.
    const DOUBLED: [i8; 8] = [0, 1, 2, 3, 4, 6, 8, 12];
    let largest = codes
        .iter()
        .map(|byte| (byte & 7).max(byte >> 4 & 7))
        .max()
        .unwrap_or(0);
    if largest == 0 {
        return (127, [0; BLOCK]);
    }
    // floor(log2) of the largest value, which is half of DOUBLED.
    let exponent = DOUBLED[usize::from(largest)].ilog2() as i32 - 1;
    let shift = FRACTION_BITS - 1 - exponent;
    let scale = (i32::from(scale_byte) + exponent) as u8;
    let code = |nibble: u8| {
        let magnitude = DOUBLED[usize::from(nibble & 7)] << shift;
        if nibble & 8 == 0 {
            magnitude
        } else {
            -magnitude
        }
    };
    let mut out = [0; BLOCK];
    for (pair, &byte) in out.chunks_exact_mut(2).zip(codes) {
        pair[0] = code(byte & 15);
        pair[1] = code(byte >> 4);
    }
    (scale, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::bf16;
    use proptest::prelude::*;

    #[test]
    fn a_step_is_a_power_of_two() {
        for byte in SCALE_MIN..=SCALE_MAX {
            assert_eq!(f64::from(step(byte)), 2f64.powi(i32::from(byte) - 133));
        }
    }

    /// Every code at every allowed scale, as the largest of its block and beside a larger one:
    /// MXINT8 and bf16 hold it exactly. The sign of a zero is the one thing that an integer
    /// cannot keep.
    #[test]
    fn every_mxfp4_value_is_exact_here_and_in_bf16() {
        for scale in mxfp4::SCALE_MIN..=mxfp4::SCALE_MAX {
            for byte in 0..=255u8 {
                for other in 0..=255u8 {
                    let mut codes = [byte; mxfp4::BLOCK_BYTES];
                    codes[15] = other;
                    let values = mxfp4::unpack(scale, &codes);
                    let (ours, packed) = from_mxfp4(scale, &codes);
                    if values.iter().any(|&value| value != 0.0) {
                        assert!((SCALE_MIN..=SCALE_MAX).contains(&ours));
                    }
                    for (a, b) in values.iter().zip(unpack(ours, &packed)) {
                        assert_eq!(*a, b, "byte {byte:#x}, scale {scale}");
                        assert_eq!(bf16::round(b).to_bits(), b.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn the_short_way_from_mxfp4_is_the_long_one() {
        for scale in mxfp4::SCALE_MIN..=mxfp4::SCALE_MAX {
            for byte in 0..=255u8 {
                let mut codes = [0; mxfp4::BLOCK_BYTES];
                codes[usize::from(byte) % 16] = byte;
                codes[7] = byte.rotate_left(4) & 0x3B;
                let long = pack(&mxfp4::unpack(scale, &codes)).expect("values are finite");
                assert_eq!(
                    from_mxfp4(scale, &codes),
                    long,
                    "byte {byte:#x}, scale {scale}"
                );
            }
        }
    }

    #[test]
    fn the_wider_scale_is_taken_where_it_errs_less() {
        // 1.999 rounds to 127.9 steps of 1/64 and is cut to 127; two to the first holds it better.
        let mut values = [0.0; BLOCK];
        values[3] = 1.999;
        let (byte, codes) = pack(&values).expect("finite");
        assert_eq!((byte, codes[3]), (128, 64));
        // With a small element that only the narrow scale can hold, the cut costs less.
        let mut values = [1.0 / 64.0; BLOCK];
        values[3] = 127.4 / 64.0;
        let (byte, codes) = pack(&values).expect("finite");
        assert_eq!((byte, codes[3], codes[0]), (127, 127, 1));
    }

    #[test]
    fn ties_round_to_even() {
        let mut values = [1.0; BLOCK];
        values[0] = 2.5 / 64.0;
        values[1] = -3.5 / 64.0;
        let (byte, codes) = pack(&values).expect("finite");
        assert_eq!((byte, codes[0], codes[1]), (127, 2, -4));
    }

    #[test]
    fn zeros_and_the_smallest_numbers() {
        assert_eq!(pack(&[0.0; BLOCK]), Some((127, [0; BLOCK])));
        let (byte, codes) = pack(&[f32::from_bits(1); BLOCK]).expect("finite");
        assert_eq!((byte, codes), (SCALE_MIN, [0; BLOCK]));
        let mut values = [1.0; BLOCK];
        values[7] = f32::NAN;
        assert_eq!(pack(&values), None);
    }

    #[test]
    fn the_largest_numbers_saturate() {
        let (byte, codes) = pack(&[f32::MAX; BLOCK]).expect("finite");
        assert_eq!((byte, codes), (SCALE_MAX, [CODE_MAX; BLOCK]));
    }

    proptest! {
        #[test]
        fn unpack_of_pack_keeps_representable_values(
            byte in 8u8..=SCALE_MAX,
            codes in prop::array::uniform32(-CODE_MAX..=CODE_MAX),
        ) {
            let values = unpack(byte, &codes);
            let (again, packed) = pack(&values).expect("values are finite");
            for (a, b) in values.iter().zip(unpack(again, &packed)) {
                prop_assert_eq!(*a, b);
            }
        }

        #[test]
        fn pack_errs_by_at_most_a_step(values in prop::array::uniform32(-1e3f32..1e3)) {
            let (byte, codes) = pack(&values).expect("values are finite");
            let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for (a, b) in values.iter().zip(unpack(byte, &codes)) {
                prop_assert!((a - b).abs() <= step(byte));
                prop_assert!((a - b).abs() <= largest / 64.0);
            }
        }
    }
}
