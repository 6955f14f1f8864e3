//! The sampling rule in plain doubles with a full sort, for the tests of the fast one.

use super::{NoiseStream, SampleKey};
use crate::engine::{SamplingParams, TokenId};

/// Exact probabilities after temperature, top-k and top-p, by id; 0 for a token cut off.
pub fn probabilities(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let max = f64::from(logits[order[0]]);
    let weight = |id: usize| ((f64::from(logits[id]) - max) / f64::from(params.temperature)).exp();
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut reached = 0.0;
    let mut n_kept = 0;
    for &id in &order {
        reached += weight(id);
        n_kept += 1;
        if reached >= f64::from(params.top_p) * total {
            break;
        }
    }
    order.truncate(n_kept);
    let mut out = vec![0.0; logits.len()];
    for &id in &order {
        out[id] = weight(id) / reached;
    }
    out
}

/// The token drawn: greatest ln p + Gumbel noise, std's logarithms.
pub fn draw(logits: &[f32], key: &SampleKey, params: &SamplingParams) -> TokenId {
    let noise = NoiseStream::new(key);
    let mut best = (f64::NEG_INFINITY, 0);
    for (id, p) in probabilities(logits, params).into_iter().enumerate() {
        if p > 0.0 {
            let word = noise.block(id as u32 / 4)[id % 4];
            let u = (f64::from(word) + 0.5) / 2f64.powi(32);
            let score = p.ln() - (-u.ln()).ln();
            if score > best.0 {
                best = (score, id as TokenId);
            }
        }
    }
    best.1
}
