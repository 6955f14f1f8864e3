//! What a row of a pass reads and computes, by the model's shape.

use crate::engine::config::{LayerKind, ModelConfig};

/// Bytes and products of a model.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    n_full: f64,
    n_sliding: f64,
    window: f64,
    n_experts: f64,
    pub n_experts_per_token: usize,
    q_width: f64,
    /// Bytes of a position's keys and values in a layer.
    kv_bytes: f64,
    /// Multiplications and additions of a row in a layer, attention's own left out; of its keys
    /// and values alone; and in the lm head.
    layer_flops: f64,
    kv_flops: f64,
    lm_head_flops: f64,
}

impl Cost {
    pub fn new(config: &ModelConfig) -> Self {
        let product = |n_out: usize, n_k: usize| 2.0 * n_out as f64 * n_k as f64;
        let (hidden, width) = (config.hidden, config.intermediate);
        let expert = product(2 * width, hidden) + product(hidden, width);
        let kv_width = 2 * config.n_kv_heads * config.head_dim;
        Self {
            n_full: config.n_layers_of(LayerKind::Full) as f64,
            n_sliding: config.n_layers_of(LayerKind::Sliding) as f64,
            window: config.sliding_window as f64,
            n_experts: config.n_experts as f64,
            n_experts_per_token: config.n_experts_per_token,
            q_width: config.q_width() as f64,
            // bf16.
            kv_bytes: 2.0 * kv_width as f64,
            layer_flops: product(config.qkv_width(), hidden)
                + product(hidden, config.q_width())
                + product(config.n_experts, hidden)
                + config.n_experts_per_token as f64 * expert,
            kv_flops: product(kv_width, hidden),
            lm_head_flops: product(config.n_vocab, hidden),
        }
    }

    /// Experts of a layer that `n_rows` rows hit if each chooses as chance would have it.
    pub fn experts_by_chance(&self, n_rows: f64) -> f64 {
        let missed = 1.0 - self.n_experts_per_token as f64 / self.n_experts;
        self.n_experts * (1.0 - missed.powf(n_rows))
    }

    /// Share of the experts' bytes that so many experts of a layer are.
    pub fn share_of_experts(&self, n_hit: f64) -> f64 {
        n_hit / self.n_experts
    }

    /// Positions that a row at the end of `context` positions attends to, over all layers.
    fn attended(&self, context: f64) -> f64 {
        self.n_full * context + self.n_sliding * context.min(self.window)
    }

    /// KV that a step reads for a row of `context` positions, of which the first `shared` lie in
    /// pages that are read once for all rows.
    pub fn kv_bytes(&self, context: f64, shared: f64) -> f64 {
        self.kv_bytes * self.attended(context) - self.shared_bytes(shared.min(context))
    }

    /// KV of positions in shared pages, which full-attention layers have.
    pub fn shared_bytes(&self, shared: f64) -> f64 {
        self.kv_bytes * self.n_full * shared
    }

    /// Attention: a product of q and one of v for each position.
    fn attention_flops(&self, attended: f64) -> f64 {
        4.0 * self.q_width * attended
    }

    /// A row of a step at `context` positions.
    pub fn step_flops(&self, context: f64) -> f64 {
        (self.n_full + self.n_sliding) * self.layer_flops
            + self.attention_flops(self.attended(context))
            + self.lm_head_flops
    }

    /// `n` tokens from position `start` on. Of the last layer a prefill needs keys and values
    /// alone; its attention is counted as if it were a layer like the others' mean.
    pub fn prefill_flops(&self, start: usize, n: usize) -> f64 {
        let n_layers = self.n_full + self.n_sliding;
        let (first, n) = (start as f64, n as f64);
        // Mean of the contexts, of which the window cuts off what is beyond it.
        let middle = first + (n + 1.0) / 2.0;
        let share = (n_layers - 1.0) / n_layers;
        n * ((n_layers - 1.0) * self.layer_flops
            + self.kv_flops
            + share * self.attention_flops(self.attended(middle)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::shapes;

    #[test]
    fn a_token_of_20b_has_the_published_active_parameters() {
        let cost = Cost::new(&shapes::named("gpt-oss-20b").expect("a shape"));
        // 3.6 thousand million, the lm head among them.
        let billions = cost.step_flops(0.0) / 2e9;
        assert!((3.55..3.65).contains(&billions), "{billions}");
        assert_eq!(cost.kv_bytes(100.0, 0.0), 24.0 * 2048.0 * 100.0);
        assert_eq!(cost.kv_bytes(1000.0, 0.0), 12.0 * 2048.0 * 1128.0);
        // The window slides over a row's own ring.
        assert_eq!(cost.kv_bytes(1000.0, 768.0), 12.0 * 2048.0 * 360.0);
        assert_eq!(cost.shared_bytes(768.0), 12.0 * 2048.0 * 768.0);
        assert!((cost.experts_by_chance(1.0) - 4.0).abs() < 1e-9);
        assert!(cost.experts_by_chance(64.0) > 31.9);
    }
}
