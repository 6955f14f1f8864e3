//! MXFP4: blocks of 32 E2M1 codes under one E8M0 scale (OCP Microscaling Formats 1.0, 5.3 and
//! 6.3).
//!
//! A byte holds two codes: the low nibble is the even element, the high nibble the odd one. The
//! scale byte `b` means 2^(b-127): byte 0 is 2^-127 and not zero, byte 255 is NaN. Every value
//! is exact in bf16 when the scale byte lies in [`SCALE_MIN`]..=[`SCALE_MAX`].

/// Elements under one scale.
pub const BLOCK: usize = 32;

/// Bytes of a block's codes.
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// The value of each code; bit 3 is the sign, so code 8 is minus zero.
pub const VALUES: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Smallest scale byte allowed on a block that is not all zero: 0.5 x 2^-125 is still a normal
/// number.
pub const SCALE_MIN: u8 = 2;

/// Largest such byte: 6 x 2^125 is still finite.
pub const SCALE_MAX: u8 = 252;

/// The scale of a byte as `f32`; NaN for 255.
#[inline(always)]
pub fn scale(byte: u8) -> f32 {
    match byte {
        // 2^-127 is subnormal: half the smallest normal number.
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// Whether a block may be loaded: scales outside [`SCALE_MIN`]..=[`SCALE_MAX`] only on blocks
/// whose codes are all zeros, and never NaN.
#[inline(always)]
pub fn is_loadable(scale_byte: u8, codes: &[u8; BLOCK_BYTES]) -> bool {
    if (SCALE_MIN..=SCALE_MAX).contains(&scale_byte) {
        return true;
    }
    scale_byte != 255 && codes.iter().all(|byte| byte & 0x77 == 0)
}

/// The 32 values of a block.
pub fn unpack(scale_byte: u8, codes: &[u8; BLOCK_BYTES]) -> [f32; BLOCK] {
    let scale = scale(scale_byte);
    let mut values = [0.0; BLOCK];
    for (pair, &byte) in values.chunks_exact_mut(2).zip(codes) {
        pair[0] = VALUES[usize::from(byte & 15)] * scale;
        pair[1] = VALUES[usize::from(byte >> 4)] * scale;
    }
    values
}

/// Quantizes a block: the scale is the power of two of the largest magnitude less E2M1's own
/// largest exponent (2), elements round to nearest even and saturate at 6 (OCP MX 1.0, 6.3).
/// Returns nothing when a value is not finite.
pub fn pack(values: &[f32; BLOCK]) -> Option<(u8, [u8; BLOCK_BYTES])> {
    let mut largest = 0.0f32;
    for &value in values {
        if !value.is_finite() {
            return None;
        }
        largest = largest.max(value.abs());
    }
    let scale_byte = if largest == 0.0 {
        127
    } else {
        // The biased exponent of a subnormal is 0; the clamp makes both the smallest scale.
        let exponent = (largest.to_bits() >> 23) as i32 - 2;
        exponent.clamp(i32::from(SCALE_MIN), i32::from(SCALE_MAX)) as u8
    };
    // The scale is a power of two in the normal range, so this product is exact in f64.
    let inverse = 1.0 / f64::from(scale(scale_byte));
    let mut codes = [0; BLOCK_BYTES];
    for (byte, pair) in codes.iter_mut().zip(values.chunks_exact(2)) {
        let low = code(f64::from(pair[0]) * inverse);
        let high = code(f64::from(pair[1]) * inverse);
        *byte = low | high << 4;
    }
    Some((scale_byte, codes))
}

/// The nearest E2M1 code: ties to the code with an even mantissa bit, saturating at 6.
fn code(x: f64) -> u8 {
    // Midpoints between neighbours; whether the midpoint itself belongs to the upper one.
    const MIDPOINTS: [(f64, bool); 7] = [
        (0.25, false),
        (0.75, true),
        (1.25, false),
        (1.75, true),
        (2.5, false),
        (3.5, true),
        (5.0, false),
    ];
    let magnitude = x.abs();
    let above =
        |&&(midpoint, up): &&(f64, bool)| magnitude > midpoint || (up && magnitude == midpoint);
    let index = MIDPOINTS.iter().take_while(above).count() as u8;
    index | u8::from(x.is_sign_negative()) << 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn scale_bytes_mean_powers_of_two() {
        for byte in 0..=254u8 {
            assert_eq!(f64::from(scale(byte)), 2f64.powi(i32::from(byte) - 127));
        }
        assert!(scale(255).is_nan());
    }

    #[test]
    fn low_nibble_is_the_even_element() {
        let mut codes = [0; BLOCK_BYTES];
        codes[3] = 0xA5;
        let values = unpack(128, &codes);
        assert_eq!(values[6], 6.0);
        assert_eq!(values[7], -2.0);
    }

    #[test]
    fn ties_round_to_even() {
        let halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0];
        let codes: Vec<u8> = halves.iter().map(|&x| code(x)).collect();
        assert_eq!(codes, [0, 2, 2, 4, 4, 6, 6, 7]);
        assert_eq!(code(-0.75), 10);
    }

    /// A block whose largest magnitude is 4 or 6 keeps its scale byte; others may come back
    /// under another scale with the same values.
    #[test]
    fn every_byte_at_every_scale_comes_back() {
        for scale_byte in SCALE_MIN..=SCALE_MAX {
            for byte in 0..=255u8 {
                let mut codes = [byte; BLOCK_BYTES];
                codes[15] = 0x7F;
                let values = unpack(scale_byte, &codes);
                let (again, packed) = pack(&values).expect("values are finite");
                assert_eq!((again, packed), (scale_byte, codes));
            }
        }
    }

    proptest! {
        #[test]
        fn unpack_of_pack_keeps_representable_values(
            scale_byte in SCALE_MIN..=SCALE_MAX,
            codes in prop::array::uniform16(any::<u8>()),
        ) {
            let values = unpack(scale_byte, &codes);
            let (again, packed) = pack(&values).expect("values are finite");
            // With the smallest scales a block of small codes has no smaller scale to go to.
            let back = unpack(again, &packed);
            for (a, b) in values.iter().zip(&back) {
                prop_assert_eq!(a.to_bits(), b.to_bits());
            }
        }

        #[test]
        fn pack_errs_by_at_most_a_quarter_of_the_block_maximum(
            values in prop::array::uniform32(-1e3f32..1e3),
        ) {
            let (scale_byte, codes) = pack(&values).expect("values are finite");
            let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for (a, b) in values.iter().zip(unpack(scale_byte, &codes)) {
                prop_assert!((a - b).abs() <= largest / 4.0 + f32::MIN_POSITIVE);
            }
        }
    }

    #[test]
    fn not_finite_values_are_refused() {
        let mut values = [1.0; BLOCK];
        values[7] = f32::NAN;
        assert_eq!(pack(&values), None);
        values[7] = f32::INFINITY;
        assert_eq!(pack(&values), None);
    }

    #[test]
    fn extreme_scales_are_allowed_on_zero_blocks_only() {
        let zero = [0x80; BLOCK_BYTES];
        let one = [0x02; BLOCK_BYTES];
        assert!(is_loadable(0, &zero) && is_loadable(254, &zero));
        assert!(!is_loadable(255, &zero));
        assert!(!is_loadable(0, &one) && !is_loadable(253, &one) && is_loadable(2, &one));
    }
}
