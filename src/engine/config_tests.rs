//! Both spellings of the released configuration, YaRN's ramp, and refusals.

use super::*;

const HF: &str = r#"{"num_hidden_layers": 4, "hidden_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "intermediate_size": 2880, "vocab_size": 201088, "sliding_window": 128, "rope_theta": 150000,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "swiglu_limit": 7.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "truncate": false}}"#;

const ORIGINAL: &str = r#"{"num_hidden_layers": 4, "num_experts": 32, "experts_per_token": 4,
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0,
    "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
    "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1, "rope_ntk_beta": 32}"#;

fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
    ModelConfig::parse(text.as_bytes(), Path::new("config.json"))
}

#[test]
fn both_layouts_give_the_same_configuration() {
    let hf = parse(HF).expect("the Hugging Face form is complete");
    assert_eq!(hf, parse(ORIGINAL).expect("the original form is complete"));
    assert_eq!(hf.qkv_width(), 5120);
    assert_eq!(hf.n_layers_of(LayerKind::Full), 2);
    let newer = HF.replace("\"rope_theta\": 150000,", "").replace(
        "\"rope_scaling\": {",
        "\"rope_parameters\": {\"rope_theta\": 150000.0,",
    );
    assert_eq!(hf, parse(&newer).expect("the newer form is complete"));
}

#[test]
fn yarn_ends_stay_fractional_unless_truncated() {
    let config = parse(HF).expect("valid");
    let yarn = config.yarn.expect("yarn");
    let (low, high) = yarn.ramp(64, 150_000.0);
    // Computed apart (engine.md, section 1).
    assert!((low - 8.093).abs() < 1e-3 && (high - 17.398).abs() < 1e-3);
    let truncated = Yarn {
        truncate: true,
        ..yarn
    };
    assert_eq!(truncated.ramp(64, 150_000.0), (8.0, 18.0));
    let (frequencies, concentration) = config.rope_frequencies();
    assert!((concentration - 1.346_574).abs() < 1e-6);
    assert_eq!(frequencies[0], 1.0);
    let last = 1.0 / 150_000f64.powf(62.0 / 64.0) / 32.0;
    assert!((f64::from(frequencies[31]) / last - 1.0).abs() < 1e-6);
}

#[test]
fn mistakes_are_named() {
    let cases = [
        (
            HF.replace("2880", "2881"),
            "`hidden_size` in `config.json` is 2881",
        ),
        (HF.replace("\"head_dim\": 64,", ""), "has no `head_dim`"),
        (
            HF.replace("\"yarn\"", "\"llama3\""),
            "`rope_scaling.rope_type`",
        ),
        (
            HF.replace("201088", "-4"),
            "`vocab_size` in `config.json` is -4",
        ),
        (HF.replace("201088", "99999999999999"), "`vocab_size`"),
        (
            HF.replace("_tok\": 4", "_tok\": 33"),
            "`num_experts_per_tok`",
        ),
        (
            HF.replace("\"full_attention\", \"sliding", "\"sliding"),
            "3 entries",
        ),
        (
            HF.replace(
                "\"head_dim\"",
                "\"quantization_config\": {\"quant_method\": \"awq\"}, \"head_dim\"",
            ),
            "`quantization_config.quant_method` in `config.json` is \"awq\"",
        ),
        ("[1]".into(), "not a JSON object"),
        ("{".into(), "not a JSON object"),
    ];
    for (text, expected) in cases {
        let message = parse(&text).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message} lacks {expected}");
    }
}
