//! The standard error of a mean whose items come in clusters (Liang and Zeger 1986).

use std::collections::HashMap;

use super::normal::{Z_975, two_sided_p};
use crate::score::interval::Interval;

/// Fewer clusters tell too little of the spread between them.
pub const MIN_CLUSTERS: usize = 20;

/// A mean with an error that lets items of a cluster go together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClusteredMean {
    pub mean: f64,
    pub n_clusters: usize,
    pub standard_error: f64,
    /// Normal approximation, 95 %.
    pub interval: Interval,
    /// Two-sided, of a mean of 0.
    pub p: f64,
}

/// The sandwich estimate with the small-sample factor G/(G - 1) (a regression on a constant, whose
/// (n - 1)/(n - k) is 1). Absent below [`MIN_CLUSTERS`].
pub fn clustered_mean(values: &[f64], clusters: &[&str]) -> Option<ClusteredMean> {
    let n = values.len().min(clusters.len());
    if n == 0 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n as f64;
    let mut sums: HashMap<&str, f64> = HashMap::new();
    let mut order: Vec<&str> = Vec::new();
    for (value, cluster) in values.iter().zip(clusters) {
        let sum = sums.entry(cluster).or_insert_with(|| {
            order.push(cluster);
            0.0
        });
        *sum += value - mean;
    }
    let n_clusters = order.len();
    if n_clusters < MIN_CLUSTERS {
        return None;
    }
    // In order of appearance: a hash map's own order would change the last bits.
    let squares: f64 = order.iter().map(|cluster| sums[cluster].powi(2)).sum();
    let groups = n_clusters as f64;
    let standard_error = (groups / (groups - 1.0) * squares).sqrt() / n as f64;
    Some(ClusteredMean {
        mean,
        n_clusters,
        standard_error,
        interval: Interval {
            low: mean - Z_975 * standard_error,
            high: mean + Z_975 * standard_error,
        },
        p: if standard_error > 0.0 {
            two_sided_p(mean / standard_error)
        } else if mean == 0.0 {
            1.0
        } else {
            0.0
        },
    })
}
