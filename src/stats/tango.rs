//! Tango's score interval of a difference between paired proportions (Tango 1998, "Equivalence
//! test and confidence interval for the difference in proportions for the paired-sample design").
//!
//! It inverts the score test, so it keeps its level for few pairs and few changes, where Wald's
//! collapses to a point.

use super::normal::Z_975;
use crate::score::interval::Interval;

/// Halvings of a range of width 2: more than f64 can tell apart.
const N_HALVINGS: usize = 80;

/// The 95 % interval of `(gained - lost) / n`; absent for n = 0 and for more changes than pairs.
pub fn tango(gained: u64, lost: u64, n: u64) -> Option<Interval> {
    if n == 0 || gained + lost > n {
        return None;
    }
    let (b, c, n) = (gained as f64, lost as f64, n as f64);
    let observed = (b - c) / n;
    // The score falls as the assumed difference rises: 0 at the observed one.
    let edge = |mut inside: f64, mut outside: f64| {
        for _ in 0..N_HALVINGS {
            let middle = (inside + outside) / 2.0;
            if score(b, c, n, middle).abs() <= Z_975 {
                inside = middle;
            } else {
                outside = middle;
            }
        }
        (inside + outside) / 2.0
    };
    Some(Interval {
        low: edge(observed, -1.0),
        high: edge(observed, 1.0),
    })
}

/// The score statistic of an assumed difference `delta`: the observed one less `delta`, over its
/// standard error at the likeliest proportions that have this difference.
fn score(b: f64, c: f64, n: f64, delta: f64) -> f64 {
    // The likeliest share of lost pairs solves 2n q^2 + B q - c delta (1 - delta) = 0.
    let linear = -(b + c) + (2.0 * n - b + c) * delta;
    let constant = -c * delta * (1.0 - delta);
    let root = (linear * linear - 8.0 * n * constant).max(0.0).sqrt();
    // The larger root, in the form that does not cancel.
    let lost = if linear <= 0.0 {
        (root - linear) / (4.0 * n)
    } else {
        -2.0 * constant / (linear + root)
    };
    let lost = lost.max(0.0).max(-delta);
    let variance = n * (2.0 * lost + delta * (1.0 - delta));
    let distance = b - c - n * delta;
    if variance <= 0.0 {
        return if distance == 0.0 {
            0.0
        } else {
            distance.signum() * f64::INFINITY
        };
    }
    distance / variance.sqrt()
}
