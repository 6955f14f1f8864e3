//! The published shapes of GPT-OSS, by name: plans for them need no weights.

use std::path::Path;

use super::config::ModelConfig;

/// The names that [`named`] knows.
pub const NAMES: [&str; 2] = ["gpt-oss-20b", "gpt-oss-120b"];

/// The configuration of a published model, or nothing.
pub fn named(name: &str) -> Option<ModelConfig> {
    let (n_layers, n_experts) = match name {
        "gpt-oss-20b" => (24, 32),
        "gpt-oss-120b" => (36, 128),
        _ => return None,
    };
    let layer_types: Vec<&str> = (0..n_layers)
        .map(|layer| match layer % 2 {
            0 => "sliding_attention",
            _ => "full_attention",
        })
        .collect();
    let config = serde_json::json!({
        "num_hidden_layers": n_layers,
        "num_local_experts": n_experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201_088,
        "sliding_window": 128,
        "layer_types": layer_types,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": false,
        },
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
    });
    let config = ModelConfig::parse(config.to_string().as_bytes(), Path::new(name));
    Some(config.expect("a published shape is in range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_shape() {
        for name in NAMES {
            let config = named(name).expect("it is listed");
            assert_eq!((config.hidden, config.group()), (2880, 8));
            assert!(config.yarn.is_some_and(|yarn| !yarn.truncate));
        }
        assert_eq!(named("gpt-oss-20b").map(|c| c.n_layers()), Some(24));
        assert!(named("gpt-5").is_none());
    }
}
