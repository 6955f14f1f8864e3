//! The weights of a model as the CPU holds them: packed once from a checkpoint, counted.
//!
//! [`CpuModel::planned_bytes`] computes from the configuration alone what [`CpuModel::load`] will
//! allocate; a load whose own counts differ is refused.

use super::buffer::Buffer;
use super::lanes::LANES;
use super::matmul::Projection;
use super::moe_matmul::Experts;
use super::pack;
use super::weights::{Matrix, Vector};
use crate::engine::EngineError;
use crate::engine::checkpoint::layers::Parts;
use crate::engine::checkpoint::{
    ByClass, Checkpoint, CheckpointError, ClassBytes, Deviation, MatrixFormat, Precision, Tensor,
    WeightFormat,
};
use crate::engine::config::{LayerKind, ModelConfig};

fn expert_bytes(experts: &Experts) -> u64 {
    let matrices = experts.gate_up.n_bytes() + experts.down.n_bytes();
    matrices + experts.gate_up_bias.n_bytes() + experts.down_bias.n_bytes()
}

/// The weights of a layer.
pub struct LayerWeights {
    pub kind: LayerKind,
    /// Index among the layers of this kind.
    pub kind_index: usize,
    pub attention_norm: Vector,
    pub qkv: Projection,
    pub sinks: Vector,
    pub out: Projection,
    pub mlp_norm: Vector,
    pub router: Projection,
    pub experts: Experts,
}

/// All weights.
pub struct CpuModel {
    pub config: ModelConfig,
    pub format: WeightFormat,
    /// `[n_vocab, hidden]`.
    pub embedding: Buffer<u16>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Vector,
    pub lm_head: Projection,
    loaded: ClassBytes,
    deviation: ByClass<Deviation>,
}

impl CpuModel {
    /// Packs a checkpoint's weights, tensor by tensor; the file's pages are dropped behind. Random
    /// weights are made layer by layer. Runs on the current rayon pool.
    ///
    /// # Errors
    /// A scale byte or a value that cannot be held, out of memory, or counts that differ from
    /// the plan.
    pub fn load(checkpoint: &Checkpoint, precision: Precision) -> Result<Self, EngineError> {
        let config = checkpoint.config().clone();
        let format = checkpoint.weight_format(precision);
        let mut deviation = ByClass::<Deviation>::default();
        checkpoint.prefetch("model.embed_tokens.");
        checkpoint.prefetch("lm_head.");
        let part = checkpoint.filled("model.embed_tokens.")?;
        let embedding = pack::embedding(&part)?;
        checkpoint.prefetch("model.layers.0.");
        // The largest tensors first, while little else is resident beside them and their copies.
        let part = checkpoint.filled(match config.tie_word_embeddings {
            true => "model.embed_tokens.",
            false => "lm_head.",
        })?;
        let (lm_head, of_lm_head) = pack::lm_head(&part, format.lm_head)?;
        deviation.lm_head = of_lm_head;
        let mut loaded = ClassBytes {
            embedding: embedding.n_bytes(),
            lm_head: lm_head.n_bytes(),
            ..ClassBytes::default()
        };
        let (mut n_sliding, mut n_full) = (0, 0);
        let mut layers = Vec::with_capacity(config.n_layers());
        for (i, &kind) in config.layers.iter().enumerate() {
            // While this one is packed the next comes from the disk.
            checkpoint.prefetch(&format!("model.layers.{}.", i + 1));
            let part = checkpoint.filled(&format!("model.layers.{i}."))?;
            let vector = |tensor: &Tensor| pack::vector(&part, format.vectors, tensor);
            let projection = |class: MatrixFormat, parts: &Parts| {
                pack::projection(&part, class, format.vectors, parts)
            };
            let tensors = part.layer(i)?;
            let counter = match kind {
                LayerKind::Sliding => &mut n_sliding,
                LayerKind::Full => &mut n_full,
            };
            let (qkv, of_qkv) = projection(format.attention, &tensors.qkv)?;
            let (out, of_out) = projection(format.attention, &tensors.out)?;
            let (experts, of_experts) = pack::experts(&part, format, &tensors)?;
            for of_part in [of_qkv, of_out] {
                deviation.attention += of_part;
            }
            deviation.experts += of_experts;
            let layer = LayerWeights {
                kind,
                kind_index: *counter,
                attention_norm: vector(&tensors.attention_norm)?,
                qkv,
                sinks: vector(&tensors.sinks)?,
                out,
                mlp_norm: vector(&tensors.mlp_norm)?,
                router: projection(MatrixFormat::Bf16, &tensors.router)?.0,
                experts,
            };
            *counter += 1;
            loaded.norms += layer.attention_norm.n_bytes() + layer.mlp_norm.n_bytes();
            loaded.attention += layer.qkv.n_bytes() + layer.out.n_bytes() + layer.sinks.n_bytes();
            loaded.router += layer.router.n_bytes();
            loaded.experts += expert_bytes(&layer.experts);
            layers.push(layer);
        }
        let part = checkpoint.filled("model.norm.")?;
        let final_norm = pack::vector(&part, format.vectors, &part.final_norm()?)?;
        loaded.norms += final_norm.n_bytes();
        let planned = Self::planned_bytes(&config, format);
        for ((class, planned), (_, loaded)) in planned.classes().iter().zip(loaded.classes()) {
            if *planned != loaded {
                return Err(CheckpointError::Plan {
                    class,
                    planned: *planned,
                    loaded,
                }
                .into());
            }
        }
        Ok(Self {
            config,
            format,
            embedding,
            layers,
            final_norm,
            lm_head,
            loaded,
            deviation,
        })
    }

    /// Bytes of each class as loaded, counted at allocation.
    pub fn loaded_bytes(&self) -> ClassBytes {
        self.loaded
    }

    /// What the change of format did to the values of each class; zero where none was made or
    /// all were exact.
    pub fn deviation(&self) -> ByClass<Deviation> {
        self.deviation
    }

    /// Bytes of each class that a model of this configuration takes; pure.
    pub fn planned_bytes(config: &ModelConfig, format: WeightFormat) -> ClassBytes {
        let of_vector = format.vectors.n_bytes();
        let matrix = |format: MatrixFormat, n_out: usize, n_k: usize| {
            n_out.div_ceil(LANES) * Matrix::tile_bytes(format, n_k)
        };
        let projection = |format: MatrixFormat, n_out: usize, n_k: usize| {
            matrix(format, n_out, n_k) + n_out * of_vector
        };
        let expert =
            |n_out: usize, n_k: usize| config.n_experts * projection(format.experts, n_out, n_k);
        let (hidden, n_layers) = (config.hidden, config.n_layers());
        let qkv = projection(format.attention, config.qkv_width(), hidden);
        let out = projection(format.attention, hidden, config.q_width());
        let gate_up = expert(2 * config.intermediate, hidden);
        let down = expert(hidden, config.intermediate);
        ClassBytes {
            experts: (n_layers * (gate_up + down)) as u64,
            attention: (n_layers * (qkv + out + config.n_heads * of_vector)) as u64,
            router: (n_layers * projection(MatrixFormat::Bf16, config.n_experts, hidden)) as u64,
            norms: ((2 * n_layers + 1) * hidden * of_vector) as u64,
            embedding: (config.n_vocab * hidden * size_of::<u16>()) as u64,
            lm_head: matrix(format.lm_head, config.n_vocab, hidden) as u64,
        }
    }
}
