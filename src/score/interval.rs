//! Error bars of a proportion.

use serde::{Deserialize, Serialize};

/// The 0.975 quantile of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// A 95 % interval of a proportion, within 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// Wilson's score interval (Wilson 1927) at 95 %; absent for n = 0, and for more hits than trials.
pub fn wilson(n_correct: u64, n: u64) -> Option<Interval> {
    if n == 0 || n_correct > n {
        return None;
    }
    let trials = n as f64;
    let share = n_correct as f64 / trials;
    let z2 = Z_95 * Z_95;
    let denominator = 1.0 + z2 / trials;
    let center = (share + z2 / (2.0 * trials)) / denominator;
    let half =
        Z_95 * (share * (1.0 - share) / trials + z2 / (4.0 * trials * trials)).sqrt() / denominator;
    // At the ends the exact bound is 0 or 1, which rounding may miss.
    let low = if n_correct == 0 {
        0.0
    } else {
        (center - half).max(0.0)
    };
    let high = if n_correct == n {
        1.0
    } else {
        (center + half).min(1.0)
    };
    Some(Interval { low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        k: u64,
        n: u64,
        low: f64,
        high: f64,
    }

    #[test]
    fn equals_statsmodels() {
        let golden = include_str!("../../tests/golden/stats/wilson.json");
        let golden: Vec<Golden> = serde_json::from_str(golden).expect("the golden file is JSON");
        assert!(golden.len() > 10);
        for Golden { k, n, low, high } in golden {
            let interval = wilson(k, n).expect("n is not 0");
            let close = |a: f64, b: f64| (a - b).abs() < TOLERANCE;
            assert!(
                close(interval.low, low) && close(interval.high, high),
                "{k} of {n}: {interval:?}, not {low} to {high}"
            );
        }
    }

    /// Two ways to write one formula in f64 differ by a few units in the last place.
    const TOLERANCE: f64 = 1e-12;

    #[test]
    fn nothing_has_no_interval() {
        assert_eq!(wilson(0, 0), None);
        assert_eq!(wilson(2, 1), None);
    }
}
