//! Softmax mass in fixed point, and the log-probability made from it.
//!
//! The platform's `exp` and `log` differ between machines, so both are written out here from
//! additions, multiplications and one division, which IEEE 754 rounds the same way everywhere
//! (Rust never contracts them to a fused multiply-add). Masses are integers, so their sum is the
//! same in any order: lanes, threads and a GPU's atomics all give the same bits.

use super::NotFinite;
use crate::engine::TokenId;

/// A token's unnormalized probability `exp(x)`, `x <= 0`, in units of 2^-44. The best token has
/// 2^44, so a sum over up to 2^19 tokens stays below 2^63.
pub type Mass = u64;

/// Binary places of a [`Mass`].
pub const MASS_BITS: u32 = 44;

/// The greatest logit.
///
/// # Errors
/// [`NotFinite`] when a logit is NaN or infinite, or there is none.
pub fn finite_max(logits: &[f32]) -> Result<f32, NotFinite> {
    const EXPONENT: u32 = 0x7f80_0000;
    let mut max = f32::NEG_INFINITY;
    let mut any_special = 0u32;
    for &logit in logits {
        max = if logit > max { logit } else { max };
        any_special |= u32::from(logit.to_bits() & EXPONENT == EXPONENT);
    }
    if any_special != 0 || logits.is_empty() {
        return Err(NotFinite);
    }
    Ok(max)
}

/// e^x for `x <= 0`, relative error below 3e-7; below -80 the value at -80, whose mass is 0.
#[inline(always)]
fn exp_of_nonpositive(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few enough bits that `n * LN2_HIGH` is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > -80.0 { x } else { -80.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor series; |r| <= ln 2 / 2, so the first term left out is below 1.2e-7 of the value.
    let mut p = 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// The mass of a scaled logit `x = (logit - max) / temperature`, `x <= 0`.
#[inline(always)]
pub fn mass(x: f32) -> Mass {
    /// In [256, 512) a double's last place is 2^-44, so this sum rounds to whole masses.
    const SHIFT: f64 = 384.0;
    (f64::from(exp_of_nonpositive(x)) + SHIFT)
        .to_bits()
        .wrapping_sub(SHIFT.to_bits())
}

/// The mass of all tokens at temperature 1.
pub fn total_mass(logits: &[f32], max: f32) -> Mass {
    logits
        .iter()
        .fold(0, |sum: Mass, &logit| sum.wrapping_add(mass(logit - max)))
}

/// ln x for a positive, normal `x`; error below one unit in the last place of max(1, |ln x|).
#[inline]
pub fn ln(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i32 - 1023;
    let mut m = f64::from_bits((bits & MANTISSA) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln m = 2 atanh(s); s^2 <= 0.0295, so the first term left out is below 3e-17.
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut p = 1.0 / 19.0;
    for odd in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        p = p * z + 1.0 / odd;
    }
    let n = f64::from(exponent);
    n * LN2_HIGH + (n * LN2_LOW + 2.0 * s * p)
}

/// Log-probability of a token's logit from the row's maximum and total mass.
pub fn log_probability(logit: f32, max: f32, total: Mass) -> f32 {
    let ln_total = ln(total as f64) - f64::from(MASS_BITS) * std::f64::consts::LN_2;
    ((f64::from(logit) - f64::from(max)) - ln_total) as f32
}

/// Log-probability of `token` under the softmax of `logits` `[n_vocab]`; sampling and teacher
/// forcing both use it, so the two agree bit for bit. NaN when a logit is not finite or `token`
/// is outside the vocabulary.
pub fn log_softmax_at(logits: &[f32], token: TokenId) -> f32 {
    match (finite_max(logits), logits.get(token as usize)) {
        (Ok(max), Some(&logit)) => log_probability(logit, max, total_mass(logits, max)),
        _ => f32::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_whole_range() {
        for i in 0..80_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_of_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "x {x}: relative error {error}");
        }
        assert_eq!(exp_of_nonpositive(0.0), 1.0);
        assert_eq!(mass(0.0), 1 << MASS_BITS);
        assert_eq!(mass(-40.0), 0);
        assert_eq!(mass(f32::NEG_INFINITY), 0);
    }

    #[test]
    fn ln_is_close_over_many_magnitudes() {
        for exponent in -60..60 {
            for i in 0..1000 {
                let x = (1.0 + f64::from(i) / 1000.0) * 2f64.powi(exponent);
                let error = (ln(x) - x.ln()).abs();
                assert!(
                    error <= 4e-16 * x.ln().abs().max(1.0),
                    "x {x}: error {error}"
                );
            }
        }
        let just_below_one = 1.0 - 2f64.powi(-33);
        assert!((ln(just_below_one) / just_below_one.ln() - 1.0).abs() < 1e-15);
    }

    #[test]
    fn log_softmax_matches_doubles() {
        let logits: Vec<f32> = (0..5000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 8.0)
            .collect();
        let max = f64::from(finite_max(&logits).expect("these logits are finite"));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        for (token, &logit) in logits.iter().enumerate().take(200) {
            let got = log_softmax_at(&logits, token as TokenId);
            let exact = f64::from(logit) - max - sum.ln();
            assert!(
                (f64::from(got) - exact).abs() < 2e-6,
                "{got} against {exact}"
            );
        }
        assert!(log_softmax_at(&logits, 5000).is_nan());
        assert!(log_softmax_at(&[0.0, f32::NAN], 0).is_nan());
        assert_eq!(log_softmax_at(&[3.5], 0), 0.0);
    }

    #[test]
    fn a_special_logit_anywhere_is_refused() {
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..40 {
                let mut logits = vec![1.0f32; 40];
                logits[at] = special;
                assert_eq!(finite_max(&logits), Err(NotFinite));
            }
        }
        assert_eq!(finite_max(&[]), Err(NotFinite));
        assert_eq!(finite_max(&[f32::MAX, -f32::MAX]), Ok(f32::MAX));
    }
}
