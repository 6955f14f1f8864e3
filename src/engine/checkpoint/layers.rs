//! Names, shapes and dtypes of a GPT-OSS checkpoint in both layouts.

use std::collections::HashMap;

use safetensors::Dtype;

use super::{Checkpoint, CheckpointError, ClassBytes, Located, MatrixFormat, Tensor, VectorFormat};
use crate::quant::mxfp4;

/// Which names the tensors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `model.layers.N.self_attn.q_proj.weight`, …
    HuggingFace,
    /// `block.N.attn.qkv.weight`, …
    Original,
}

impl Layout {
    pub(super) fn of(tensors: &HashMap<String, Located>) -> Self {
        if tensors.contains_key("embedding.weight") {
            Self::Original
        } else {
            Self::HuggingFace
        }
    }
}

/// An expert projection as stored.
#[derive(Clone)]
pub enum ExpertTensors<'a> {
    /// Codes `[n_experts, n_out, n_k / 32, 16]` and scales `[n_experts, n_out, n_k / 32]`.
    Mxfp4 {
        codes: Tensor<'a>,
        scales: Tensor<'a>,
    },
    /// `[n_experts, n_k, n_out]` when `transposed` (Hugging Face), else `[n_experts, n_out, n_k]`.
    Bf16 {
        values: Tensor<'a>,
        transposed: bool,
    },
}

/// A matrix in parts that follow each other along its rows, and the bias likewise.
#[derive(Clone)]
pub struct Parts<'a> {
    pub weights: Vec<Tensor<'a>>,
    pub biases: Vec<Tensor<'a>>,
}

/// The tensors of a layer.
#[derive(Clone)]
pub struct Layer<'a> {
    pub attention_norm: Tensor<'a>,
    /// All q rows, then all k, then all v.
    pub qkv: Parts<'a>,
    pub sinks: Tensor<'a>,
    pub out: Parts<'a>,
    pub mlp_norm: Tensor<'a>,
    pub router: Parts<'a>,
    /// Rows interleaved: even ones are gates, odd ones ups.
    pub gate_up: ExpertTensors<'a>,
    pub gate_up_bias: Tensor<'a>,
    pub down: ExpertTensors<'a>,
    pub down_bias: Tensor<'a>,
}

impl Checkpoint {
    /// `[n_vocab, hidden]`, bf16.
    pub fn embedding(&self) -> Result<Tensor<'_>, CheckpointError> {
        let name = match self.layout {
            Layout::HuggingFace => "model.embed_tokens.weight",
            Layout::Original => "embedding.weight",
        };
        self.matrix(name.into(), self.config.n_vocab, self.config.hidden)
    }

    /// `[n_vocab, hidden]`, bf16; the embedding when the two are tied.
    pub fn lm_head(&self) -> Result<Tensor<'_>, CheckpointError> {
        let name = match self.layout {
            Layout::HuggingFace if self.config.tie_word_embeddings => return self.embedding(),
            Layout::HuggingFace => "lm_head.weight",
            Layout::Original => "unembedding.weight",
        };
        self.matrix(name.into(), self.config.n_vocab, self.config.hidden)
    }

    /// `[hidden]`.
    pub fn final_norm(&self) -> Result<Tensor<'_>, CheckpointError> {
        let name = match self.layout {
            Layout::HuggingFace => "model.norm.weight",
            Layout::Original => "norm.scale",
        };
        self.vector(name.into(), &[self.config.hidden])
    }

    /// The tensors of layer `i`.
    ///
    /// # Errors
    /// A tensor is missing or not as the configuration demands.
    pub fn layer(&self, i: usize) -> Result<Layer<'_>, CheckpointError> {
        let config = &self.config;
        let prefix = match self.layout {
            Layout::HuggingFace => format!("model.layers.{i}."),
            Layout::Original => format!("block.{i}."),
        };
        let original = self.layout == Layout::Original;
        let name = |hf: &str, ours: &str| format!("{prefix}{}", if original { ours } else { hf });
        let (hidden, width, n_experts) = (config.hidden, config.intermediate, config.n_experts);
        let vector = |hf: &str, ours: &str, n: usize| self.vector(name(hf, ours), &[n]);
        let parts = |hf: &str, ours: &str, n_out: usize, n_k: usize| {
            let weight = self.matrix(format!("{}.weight", name(hf, ours)), n_out, n_k)?;
            let bias = self.vector(format!("{}.bias", name(hf, ours)), &[n_out])?;
            Ok(Parts {
                weights: vec![weight],
                biases: vec![bias],
            })
        };
        let expert_bias =
            |hf: &str, ours: &str, n_out: usize| self.vector(name(hf, ours), &[n_experts, n_out]);
        Ok(Layer {
            attention_norm: vector("input_layernorm.weight", "attn.norm.scale", hidden)?,
            qkv: match self.layout {
                Layout::Original => parts("", "attn.qkv", config.qkv_width(), hidden)?,
                Layout::HuggingFace => {
                    let kv_width = config.n_kv_heads * config.head_dim;
                    let q = parts("self_attn.q_proj", "", config.q_width(), hidden)?;
                    let k = parts("self_attn.k_proj", "", kv_width, hidden)?;
                    let v = parts("self_attn.v_proj", "", kv_width, hidden)?;
                    Parts {
                        weights: [q.weights, k.weights, v.weights].concat(),
                        biases: [q.biases, k.biases, v.biases].concat(),
                    }
                }
            },
            sinks: vector("self_attn.sinks", "attn.sinks", config.n_heads)?,
            out: parts("self_attn.o_proj", "attn.out", hidden, config.q_width())?,
            mlp_norm: vector("post_attention_layernorm.weight", "mlp.norm.scale", hidden)?,
            router: parts("mlp.router", "mlp.gate", n_experts, hidden)?,
            gate_up: self.expert_tensors(
                &name("mlp.experts.gate_up_proj", "mlp.mlp1_weight"),
                2 * width,
                hidden,
            )?,
            gate_up_bias: expert_bias("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", 2 * width)?,
            down: self.expert_tensors(
                &name("mlp.experts.down_proj", "mlp.mlp2_weight"),
                hidden,
                width,
            )?,
            down_bias: expert_bias("mlp.experts.down_proj_bias", "mlp.mlp2_bias", hidden)?,
        })
    }

    /// Checks every tensor; returns the formats found.
    pub(super) fn check(&self) -> Result<(MatrixFormat, VectorFormat), CheckpointError> {
        let mut vectors = VectorFormat::Bf16;
        let mut experts = None;
        self.embedding()?;
        self.lm_head()?;
        self.for_each_vector(&mut |tensor| {
            if tensor.dtype == Dtype::F32 {
                vectors = VectorFormat::F32;
            }
        })?;
        for i in 0..self.config.n_layers() {
            let layer = self.layer(i)?;
            for tensors in [&layer.gate_up, &layer.down] {
                let (format, tensor) = match tensors {
                    ExpertTensors::Mxfp4 { codes, .. } => (MatrixFormat::Mxfp4, codes),
                    ExpertTensors::Bf16 { values, .. } => (MatrixFormat::Bf16, values),
                };
                if *experts.get_or_insert(format) != format {
                    return Err(tensor.type_error("the format of the other experts"));
                }
            }
        }
        Ok((experts.unwrap_or(MatrixFormat::Mxfp4), vectors))
    }

    /// Bytes of each class as the file stores them.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`].
    pub fn stored_bytes(&self) -> Result<ClassBytes, CheckpointError> {
        let n = |tensor: &Tensor| tensor.bytes.len() as u64;
        let parts = |parts: &Parts| {
            let tensors = parts.weights.iter().chain(&parts.biases);
            tensors.map(n).sum::<u64>()
        };
        let experts = |tensors: &ExpertTensors| match tensors {
            ExpertTensors::Mxfp4 { codes, scales } => n(codes) + n(scales),
            ExpertTensors::Bf16 { values, .. } => n(values),
        };
        let mut bytes = ClassBytes {
            norms: n(&self.final_norm()?),
            embedding: n(&self.embedding()?),
            ..ClassBytes::default()
        };
        if !(self.layout == Layout::HuggingFace && self.config.tie_word_embeddings) {
            bytes.lm_head = n(&self.lm_head()?);
        }
        for i in 0..self.config.n_layers() {
            let layer = self.layer(i)?;
            bytes.norms += n(&layer.attention_norm) + n(&layer.mlp_norm);
            bytes.attention += parts(&layer.qkv) + parts(&layer.out) + n(&layer.sinks);
            bytes.router += parts(&layer.router);
            bytes.experts += experts(&layer.gate_up) + n(&layer.gate_up_bias);
            bytes.experts += experts(&layer.down) + n(&layer.down_bias);
        }
        Ok(bytes)
    }

    fn for_each_vector(&self, visit: &mut dyn FnMut(&Tensor)) -> Result<(), CheckpointError> {
        visit(&self.final_norm()?);
        for i in 0..self.config.n_layers() {
            let layer = self.layer(i)?;
            let biases = [&layer.qkv, &layer.out, &layer.router];
            biases.iter().flat_map(|p| &p.biases).for_each(&mut *visit);
            let others = [
                &layer.attention_norm,
                &layer.sinks,
                &layer.mlp_norm,
                &layer.gate_up_bias,
                &layer.down_bias,
            ];
            others.into_iter().for_each(&mut *visit);
        }
        Ok(())
    }

    /// A bf16 matrix.
    fn matrix(
        &self,
        name: String,
        n_out: usize,
        n_k: usize,
    ) -> Result<Tensor<'_>, CheckpointError> {
        let tensor = self.tensor(name, &[n_out, n_k])?;
        match tensor.dtype {
            Dtype::BF16 => Ok(tensor),
            _ => Err(tensor.type_error("BF16")),
        }
    }

    /// A small tensor: bf16 or f32.
    fn vector(&self, name: String, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let tensor = self.tensor(name, shape)?;
        match tensor.dtype {
            Dtype::BF16 | Dtype::F32 => Ok(tensor),
            _ => Err(tensor.type_error("BF16 or F32")),
        }
    }

    fn expert_tensors(
        &self,
        name: &str,
        n_out: usize,
        n_k: usize,
    ) -> Result<ExpertTensors<'_>, CheckpointError> {
        let n_experts = self.config.n_experts;
        let separator = match self.layout {
            Layout::HuggingFace => '_',
            Layout::Original => '.',
        };
        if self.tensors.contains_key(name) {
            let transposed = self.layout == Layout::HuggingFace;
            let shape = match transposed {
                true => [n_experts, n_k, n_out],
                false => [n_experts, n_out, n_k],
            };
            let values = self.tensor(name.into(), &shape)?;
            return match values.dtype {
                Dtype::BF16 => Ok(ExpertTensors::Bf16 { values, transposed }),
                _ => Err(values.type_error("BF16")),
            };
        }
        let n_blocks = n_k / mxfp4::BLOCK;
        let codes = self.tensor(
            format!("{name}{separator}blocks"),
            &[n_experts, n_out, n_blocks, mxfp4::BLOCK_BYTES],
        )?;
        let scales = self.tensor(
            format!("{name}{separator}scales"),
            &[n_experts, n_out, n_blocks],
        )?;
        for tensor in [&codes, &scales] {
            if tensor.dtype != Dtype::U8 {
                return Err(tensor.type_error("U8"));
            }
        }
        Ok(ExpertTensors::Mxfp4 { codes, scales })
    }
}
