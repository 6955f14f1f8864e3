//! The smallest difference that a number of pairs can detect, two-sided at 5 % with a power of
//! 80 %.

use super::normal::{Z_80, Z_975};

pub const ALPHA: f64 = 0.05;
pub const POWER: f64 = 0.8;

/// The formula of [`detectable_pairs`], for the reader.
pub const PAIRS_FORMULA: &str = "Connor 1987: n d^2 = (z(0.975) sqrt(D) + z(0.8) sqrt(D - d^2))^2, \
                                 D the observed share of questions that differ, at least d";

/// The formula of [`detectable_mean`], for the reader.
pub const MEAN_FORMULA: &str = "d = (z(0.975) + z(0.8)) s / sqrt(n), s the standard deviation of \
                                the questions' differences";

const N_HALVINGS: usize = 80;

/// For right and wrong by question (Connor 1987, "Sample size for testing differences in
/// proportions for the paired-sample design"). A difference `d` needs at least a share `d` of
/// questions that differ, so the larger of `discordance` and `d` is assumed. Absent when not even
/// a difference of 1 would show.
pub fn detectable_pairs(discordance: f64, n: u64) -> Option<f64> {
    let n = n as f64;
    let shows = |d: f64| {
        let share = discordance.max(d);
        let needed = Z_975 * share.sqrt() + Z_80 * (share - d * d).max(0.0).sqrt();
        n.sqrt() * d >= needed
    };
    if !shows(1.0) {
        return None;
    }
    let (mut hidden, mut shown) = (0.0, 1.0);
    for _ in 0..N_HALVINGS {
        let middle = (hidden + shown) / 2.0;
        if shows(middle) {
            shown = middle;
        } else {
            hidden = middle;
        }
    }
    Some(shown)
}

/// For means: `deviation` is the sample standard deviation of the questions' differences. Absent
/// without questions, and without any spread to judge by.
pub fn detectable_mean(deviation: f64, n: u64) -> Option<f64> {
    (n > 1 && deviation > 0.0).then(|| (Z_975 + Z_80) * deviation / (n as f64).sqrt())
}
