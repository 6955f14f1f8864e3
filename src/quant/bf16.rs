//! bfloat16: the upper half of an `f32`, kept as its bits in a `u16`.

/// The quiet NaN that poisoned memory is filled with.
pub const NAN: u16 = 0x7FC0;

/// The value of bf16 bits; exact.
#[inline(always)]
pub fn to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16 to `x`, ties to even; NaN stays NaN, too large becomes infinite.
#[inline(always)]
pub fn from_f32(x: f32) -> u16 {
    (rounded_bits(x) >> 16) as u16
}

/// `x` rounded to bf16 and back: what a matrix product sees of an activation.
#[inline(always)]
pub fn round(x: f32) -> f32 {
    f32::from_bits(rounded_bits(x) & 0xFFFF_0000)
}

/// Bits of `x` after rounding to nearest even; only the upper half counts.
#[inline(always)]
fn rounded_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    // Adding just under half a unit, or exactly half when the kept bit is odd, carries right.
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    // A NaN could carry into infinity: keep it, made quiet.
    let nan = bits | 0x0040_0000;
    if bits & 0x7FFF_FFFF > 0x7F80_0000 {
        nan
    } else {
        rounded
    }
}

/// The value of two little-endian bytes of a file.
#[inline(always)]
pub fn from_le_bytes(bytes: [u8; 2]) -> u16 {
    u16::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_bf16_comes_back() {
        for bits in 0..=u16::MAX {
            let value = to_f32(bits);
            if value.is_nan() {
                assert!(to_f32(from_f32(value)).is_nan());
            } else {
                assert_eq!(from_f32(value), bits);
                assert_eq!(round(value).to_bits(), value.to_bits());
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_large_values_to_infinity() {
        assert_eq!(from_f32(f32::from_bits(0x3F80_8000)), 0x3F80);
        assert_eq!(from_f32(f32::from_bits(0x3F81_8000)), 0x3F82);
        assert_eq!(from_f32(f32::from_bits(0x3F80_8001)), 0x3F81);
        assert_eq!(from_f32(f32::MAX), 0x7F80);
    }

    proptest! {
        #[test]
        fn rounding_takes_the_nearest(bits in 0u32..0x7F00_0000) {
            let x = f32::from_bits(bits);
            let down = f64::from(to_f32((bits >> 16) as u16));
            let up = f64::from(to_f32((bits >> 16) as u16 + 1));
            let got = f64::from(round(x));
            let error = (got - f64::from(x)).abs();
            prop_assert!(error <= (down - f64::from(x)).abs());
            prop_assert!(error <= (up - f64::from(x)).abs());
        }
    }
}
