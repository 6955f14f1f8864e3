//! The normal distribution's tail.

/// The 0.975 quantile: two-sided 5 %.
pub const Z_975: f64 = 1.959_963_984_540_054;

/// The 0.8 quantile: a power of 80 %.
pub const Z_80: f64 = 0.841_621_233_572_914_3;

/// Below this the series of the error function converges fast, above it the continued fraction.
const SERIES_BELOW: f64 = 2.5;

/// The probability of a standard normal variable as far from 0 as `z`, on either side.
pub fn two_sided_p(z: f64) -> f64 {
    erfc(z.abs() / std::f64::consts::SQRT_2)
}

/// The complementary error function for `x >= 0`.
fn erfc(x: f64) -> f64 {
    if x.is_nan() {
        return f64::NAN;
    }
    let scale = (-x * x).exp() / std::f64::consts::PI.sqrt();
    if x < SERIES_BELOW {
        // erf(x) = 2/sqrt(pi) exp(-x^2) sum 2^k x^(2k+1) / (1 3 5 ... (2k+1)) (Abramowitz and
        // Stegun 7.1.6): all terms are positive, so nothing cancels.
        let mut term = x;
        let mut sum = x;
        let mut k = 0.0;
        while term > sum * 1e-17 {
            k += 1.0;
            term *= 2.0 * x * x / (2.0 * k + 1.0);
            sum += term;
        }
        return 1.0 - 2.0 * scale * sum;
    }
    // erfc(x) = exp(-x^2)/sqrt(pi) / (x + (1/2)/(x + 1/(x + (3/2)/(x + ...)))) (7.1.14), from the
    // inside out; 200 levels are plenty from 2.5 on.
    let mut fraction = x;
    for k in (1..=200).rev() {
        fraction = x + f64::from(k) / 2.0 / fraction;
    }
    scale / fraction
}
