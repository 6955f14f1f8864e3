//! Random checkpoints of a small shape, in the Hugging Face layout.

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, TensorView};

use crate::engine::checkpoint::{Checkpoint, MatrixFormat, VectorFormat};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn bf16(&mut self, size: f32) -> u16 {
        let value = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        crate::quant::bf16::from_f32(value * size)
    }
}

pub const VOCAB: usize = 77;
pub const HIDDEN: usize = 64;
pub const WIDTH: usize = 96;
pub const EXPERTS: usize = 6;

const CONFIG: &str = r#"{"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
    "intermediate_size": 96, "vocab_size": 77, "sliding_window": 20, "rope_theta": 150000,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 4096}"#;

/// A random checkpoint in the Hugging Face layout.
pub struct Maker {
    random: Random,
    experts: MatrixFormat,
    norms: VectorFormat,
    pub tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Maker {
    pub fn new(experts: MatrixFormat, norms: VectorFormat) -> Self {
        let mut maker = Self {
            random: Random(11),
            experts,
            norms,
            tensors: BTreeMap::new(),
        };
        maker.bf16("model.embed_tokens.weight", &[VOCAB, HIDDEN], 1.0);
        maker.bf16("lm_head.weight", &[VOCAB, HIDDEN], 0.5);
        maker.norm("model.norm.weight");
        for layer in 0..3 {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}");
            maker.norm(&name("input_layernorm.weight"));
            maker.norm(&name("post_attention_layernorm.weight"));
            for (part, n_out, n_k) in [
                ("self_attn.q_proj", 192, HIDDEN),
                ("self_attn.k_proj", 64, HIDDEN),
                ("self_attn.v_proj", 64, HIDDEN),
                ("self_attn.o_proj", HIDDEN, 192),
                ("mlp.router", EXPERTS, HIDDEN),
            ] {
                maker.bf16(&name(&format!("{part}.weight")), &[n_out, n_k], 0.3);
                maker.bf16(&name(&format!("{part}.bias")), &[n_out], 0.3);
            }
            maker.bf16(&name("self_attn.sinks"), &[6], 1.0);
            maker.experts(&name("mlp.experts.gate_up_proj"), 2 * WIDTH, HIDDEN);
            maker.experts(&name("mlp.experts.down_proj"), HIDDEN, WIDTH);
        }
        maker
    }

    fn bf16(&mut self, name: &str, shape: &[usize], size: f32) {
        let n = shape.iter().product();
        let bytes = (0..n)
            .flat_map(|_| self.random.bf16(size).to_le_bytes())
            .collect();
        self.tensors
            .insert(name.into(), (Dtype::BF16, shape.to_vec(), bytes));
    }

    fn norm(&mut self, name: &str) {
        self.bf16(name, &[HIDDEN], 1.0);
        if self.norms == VectorFormat::F32 {
            let (dtype, _, bytes) = self.tensors.get_mut(name).expect("just made");
            *dtype = Dtype::F32;
            let wide = |b: &[u8; 2]| crate::quant::bf16::to_f32(u16::from_le_bytes(*b));
            *bytes = bytes
                .as_chunks()
                .0
                .iter()
                .flat_map(|b| wide(b).to_le_bytes())
                .collect();
        }
    }

    fn experts(&mut self, name: &str, n_out: usize, n_k: usize) {
        match self.experts {
            MatrixFormat::Bf16 => self.bf16(name, &[EXPERTS, n_k, n_out], 0.2),
            MatrixFormat::Mxint8 => unreachable!("no layout stores it"),
            MatrixFormat::Mxfp4 => {
                let n_blocks = EXPERTS * n_out * n_k / 32;
                let codes = (0..16 * n_blocks)
                    .map(|_| self.random.next() as u8)
                    .collect();
                let scales = (0..n_blocks).map(|_| 121 + (self.random.next() % 3) as u8);
                let scales = scales.collect();
                let shape = vec![EXPERTS, n_out, n_k / 32];
                let wide = [&shape[..], &[16]].concat();
                self.tensors
                    .insert(format!("{name}_blocks"), (Dtype::U8, wide, codes));
                self.tensors
                    .insert(format!("{name}_scales"), (Dtype::U8, shape, scales));
            }
        }
        self.bf16(&format!("{name}_bias"), &[EXPERTS, n_out], 0.2);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let view = |(dtype, shape, bytes): &'_ (Dtype, Vec<usize>, Vec<u8>)| {
            let bytes: &'static [u8] = bytes.clone().leak();
            TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit the shape")
        };
        let views = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), view(tensor)));
        safetensors::serialize(views, None).expect("it serializes")
    }

    pub fn open(&self) -> Checkpoint {
        Checkpoint::from_bytes(CONFIG.as_bytes(), self.bytes()).expect("it is complete")
    }
}
