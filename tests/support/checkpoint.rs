//! A lively random checkpoint in the released layout, with nano's tokenizer: 32 experts, top 4,
//! windows shorter than its prompts. For tests that ask whether bits are equal, not whether they
//! are right (the golden files ask that).

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::random::Random;

const HIDDEN: usize = 96;
const INTERMEDIATE: usize = 64;
const N_LAYERS: usize = 4;
const N_EXPERTS: usize = 32;
const N_HEADS: usize = 4;
const N_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

/// Writes the checkpoint into `folder`.
pub fn write(folder: &Path, seed: u64) {
    let nano = super::root().join("models/nano");
    std::fs::create_dir_all(folder).unwrap();
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(nano.join(file), folder.join(file)).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(nano.join("config.json")).unwrap()).unwrap();
    let n_vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let fields = serde_json::json!({
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": N_LAYERS,
        "num_local_experts": N_EXPERTS, "num_experts_per_tok": 4, "experts_per_token": 4,
        "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV_HEADS, "head_dim": HEAD_DIM,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut random = Random(seed);
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut bf16 = |name: String, shape: Vec<usize>, mean: f32, deviation: f32| {
        let n = shape.iter().product::<usize>();
        let bytes = (0..n)
            .flat_map(|_| {
                let value = mean + deviation * random.normal();
                ((value.to_bits() >> 16) as u16).to_le_bytes()
            })
            .collect();
        tensors.insert(name, (Dtype::BF16, shape, bytes));
    };
    let wide = |n: usize| 1.6 / (n as f32).sqrt();
    bf16(
        "model.embed_tokens.weight".into(),
        vec![n_vocab, HIDDEN],
        0.0,
        1.0,
    );
    bf16(
        "lm_head.weight".into(),
        vec![n_vocab, HIDDEN],
        0.0,
        2.0 * wide(HIDDEN),
    );
    bf16("model.norm.weight".into(), vec![HIDDEN], 1.0, 0.3);
    for layer in 0..N_LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            bf16(name(&format!("{norm}.weight")), vec![HIDDEN], 1.0, 0.3);
        }
        for (part, n_out, n_in) in [
            ("self_attn.q_proj", N_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", N_KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", N_KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, N_HEADS * HEAD_DIM),
            ("mlp.router", N_EXPERTS, HIDDEN),
        ] {
            bf16(
                name(&format!("{part}.weight")),
                vec![n_out, n_in],
                0.0,
                wide(n_in),
            );
            bf16(name(&format!("{part}.bias")), vec![n_out], 0.0, 0.2);
        }
        bf16(name("self_attn.sinks"), vec![N_HEADS], 0.5, 1.0);
        bf16(
            name("mlp.experts.gate_up_proj_bias"),
            vec![N_EXPERTS, 2 * INTERMEDIATE],
            0.0,
            0.3,
        );
        bf16(
            name("mlp.experts.down_proj_bias"),
            vec![N_EXPERTS, HIDDEN],
            0.0,
            0.3,
        );
    }
    for layer in 0..N_LAYERS {
        for (part, n_out, n_in) in [
            ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ] {
            let n_blocks = N_EXPERTS * n_out * n_in / 32;
            let name = |kind: &str| format!("model.layers.{layer}.mlp.experts.{part}_{kind}");
            let codes = (0..n_blocks * 16).map(|_| random.word() as u8).collect();
            let scales = (0..n_blocks)
                .map(|_| 121 + (random.word() % 3) as u8)
                .collect();
            tensors.insert(
                name("blocks"),
                (Dtype::U8, vec![N_EXPERTS, n_out, n_in / 32, 16], codes),
            );
            tensors.insert(
                name("scales"),
                (Dtype::U8, vec![N_EXPERTS, n_out, n_in / 32], scales),
            );
        }
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (
            name.clone(),
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    std::fs::write(
        folder.join("model.safetensors"),
        serialize(views, None).unwrap(),
    )
    .unwrap();
}
