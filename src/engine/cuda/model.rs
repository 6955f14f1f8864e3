//! The weights of a model as the device holds them: loaded from a checkpoint ([`super::load`]) or
//! made in place from a seed; counted as allocated.

use std::sync::Arc;

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::launch::Kernels;
use super::pack;
use crate::engine::EngineError;
use crate::engine::checkpoint::{
    CheckpointError, ClassBytes, MatrixFormat, VectorFormat, WeightFormat,
};
use crate::engine::config::{LayerKind, ModelConfig};

/// Bytes on the device.
pub type Bytes = DeviceBuffer<u8>;

/// A dense matrix in tiles, and its bias.
pub struct Projection {
    pub format: MatrixFormat,
    pub n_out: usize,
    pub n_k: usize,
    pub tiles: Bytes,
    pub bias: Option<Bytes>,
}

impl Projection {
    fn n_bytes(&self) -> u64 {
        self.tiles.n_bytes() + self.bias.as_ref().map_or(0, Bytes::n_bytes)
    }
}

/// The experts' matrix of one kind in tiles, an expert behind the other, and their biases.
pub struct Experts {
    pub format: MatrixFormat,
    pub n_out: usize,
    pub n_k: usize,
    pub tiles: Bytes,
    pub bias: Bytes,
}

/// The weights of a layer.
pub struct LayerWeights {
    pub kind: LayerKind,
    /// Index among the layers of this kind.
    pub kind_index: usize,
    pub attention_norm: Bytes,
    pub qkv: Projection,
    pub sinks: Bytes,
    pub out: Projection,
    pub mlp_norm: Bytes,
    /// bf16 `[n_experts, hidden]`, as stored.
    pub router: Bytes,
    pub router_bias: Bytes,
    pub gate_up: Experts,
    pub down: Experts,
}

/// All weights.
pub struct CudaModel {
    pub config: ModelConfig,
    pub format: WeightFormat,
    /// Some scale is beyond the narrow form: kernels are built for that.
    pub wide_scales: bool,
    /// bf16 `[n_vocab, hidden]`.
    pub embedding: Bytes,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Bytes,
    pub lm_head: Projection,
    loaded: ClassBytes,
}

impl CudaModel {
    pub(super) fn checked(self) -> Result<Self, EngineError> {
        let planned = Self::planned_bytes(&self.config, self.format);
        for ((class, planned), (_, loaded)) in
            planned.classes().into_iter().zip(self.loaded.classes())
        {
            if planned != loaded {
                return Err(CheckpointError::Plan {
                    class,
                    planned,
                    loaded,
                }
                .into());
            }
        }
        Ok(self)
    }

    /// Random weights of a shape, made on the device; lively enough that routing is near uniform
    /// and rows differ. A function of shape and seed alone.
    ///
    /// # Errors
    /// Out of memory.
    ///
    /// # Panics
    /// When a width is no multiple of 64: padding would not be zeros.
    pub fn synthetic(
        device: &Arc<Device>,
        kernels: &Kernels,
        config: &ModelConfig,
        format: WeightFormat,
        seed: u64,
    ) -> Result<Self, EngineError> {
        let maker = Maker {
            device,
            kernels,
            config,
            format,
            next: std::cell::Cell::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
        };
        let model = maker.make()?;
        device.synchronize()?;
        model.checked()
    }

    /// All matrices in tiles.
    pub(super) fn matrices(&self) -> impl Iterator<Item = (MatrixFormat, &Bytes)> {
        let layers = self.layers.iter().flat_map(|layer| {
            let dense = [&layer.qkv, &layer.out].map(|it| (it.format, &it.tiles));
            let experts = [&layer.gate_up, &layer.down].map(|it| (it.format, &it.tiles));
            dense.into_iter().chain(experts)
        });
        layers.chain([(self.lm_head.format, &self.lm_head.tiles)])
    }

    /// Bytes of each class as loaded, counted at allocation.
    pub fn loaded_bytes(&self) -> ClassBytes {
        self.loaded
    }

    /// Bytes of each class that a model of this configuration takes; pure.
    pub fn planned_bytes(config: &ModelConfig, format: WeightFormat) -> ClassBytes {
        let vector = format.vectors.n_bytes();
        let with_bias = |class: MatrixFormat, n_out: usize, n_k: usize| {
            pack::matrix_bytes(class, n_out, n_k) + n_out * vector
        };
        let projection = |n_out: usize, n_k: usize| with_bias(format.attention, n_out, n_k);
        let expert = |n_out: usize, n_k: usize| with_bias(format.experts, n_out, n_k);
        let (hidden, n_layers, width) = (config.hidden, config.n_layers(), config.intermediate);
        let experts = config.n_experts * (expert(2 * width, hidden) + expert(hidden, width));
        let qkv = projection(config.qkv_width(), hidden);
        let out = projection(hidden, config.q_width());
        ClassBytes {
            experts: (n_layers * experts) as u64,
            attention: (n_layers * (qkv + out + config.n_heads * vector)) as u64,
            router: (n_layers * config.n_experts * (hidden * 2 + vector)) as u64,
            norms: ((2 * n_layers + 1) * hidden * vector) as u64,
            embedding: (config.n_vocab * hidden * 2) as u64,
            lm_head: pack::matrix_bytes(format.lm_head, config.n_vocab, hidden) as u64,
        }
    }
}

/// Puts layers together in order and counts them.
pub(super) fn assemble(
    config: &ModelConfig,
    format: WeightFormat,
    wide_scales: bool,
    ends: (Bytes, Bytes, Projection),
    layers: Vec<LayerWeights>,
) -> CudaModel {
    let (embedding, final_norm, lm_head) = ends;
    let mut loaded = ClassBytes {
        embedding: embedding.n_bytes(),
        lm_head: lm_head.n_bytes(),
        norms: final_norm.n_bytes(),
        ..ClassBytes::default()
    };
    for layer in &layers {
        loaded.norms += layer.attention_norm.n_bytes() + layer.mlp_norm.n_bytes();
        loaded.attention += layer.qkv.n_bytes() + layer.out.n_bytes() + layer.sinks.n_bytes();
        loaded.router += layer.router.n_bytes() + layer.router_bias.n_bytes();
        for experts in [&layer.gate_up, &layer.down] {
            loaded.experts += experts.tiles.n_bytes() + experts.bias.n_bytes();
        }
    }
    CudaModel {
        config: config.clone(),
        format,
        wide_scales,
        embedding,
        layers,
        final_norm,
        lm_head,
        loaded,
    }
}

/// Kind of each layer, and its index among those of its kind.
pub(super) fn kinds(config: &ModelConfig) -> impl Iterator<Item = (LayerKind, usize)> + '_ {
    config.layers.iter().enumerate().map(|(i, &kind)| {
        let before = config.layers[..i].iter().filter(|&&k| k == kind).count();
        (kind, before)
    })
}

/// Makes weights from a seed.
struct Maker<'a> {
    device: &'a Arc<Device>,
    kernels: &'a Kernels,
    config: &'a ModelConfig,
    format: WeightFormat,
    next: std::cell::Cell<u64>,
}

impl Maker<'_> {
    fn make(&self) -> Result<CudaModel, EngineError> {
        let config = self.config;
        let (hidden, width, n_experts) = (config.hidden, config.intermediate, config.n_experts);
        for n in [hidden, width, config.q_width()] {
            assert!(n % 64 == 0, "a synthetic shape is made of whole tiles");
        }
        let formats = self.format;
        let projection = |format, n_out: usize, n_k: usize, gain: f32, bias: bool| {
            Ok::<_, EngineError>(Projection {
                format,
                n_out,
                n_k,
                tiles: self.matrices(format, 1, (n_out, n_k), gain)?,
                bias: match bias {
                    true => Some(self.vector(n_out, 0.0, 0.02)?),
                    false => None,
                },
            })
        };
        let experts = |n_out: usize, n_k: usize, gain: f32| {
            let format = formats.experts;
            Ok::<_, EngineError>(Experts {
                format,
                n_out,
                n_k,
                tiles: self.matrices(format, n_experts, (n_out, n_k), gain)?,
                bias: self.vector(n_experts * n_out, 0.0, 0.02)?,
            })
        };
        let embedding = self.bf16(config.n_vocab * hidden, 0.0, 1.7)?;
        let mut layers = Vec::new();
        for (kind, kind_index) in kinds(config) {
            layers.push(LayerWeights {
                kind,
                kind_index,
                attention_norm: self.vector(hidden, 1.0, 0.1)?,
                qkv: projection(formats.attention, config.qkv_width(), hidden, 1.0, true)?,
                sinks: self.vector(config.n_heads, 0.0, 1.0)?,
                out: projection(formats.attention, hidden, config.q_width(), 0.5, true)?,
                mlp_norm: self.vector(hidden, 1.0, 0.1)?,
                router: self.bf16(n_experts * hidden, 0.0, 1.5 * unit(hidden))?,
                router_bias: self.vector(n_experts, 0.0, 0.01)?,
                gate_up: experts(2 * width, hidden, 1.0)?,
                // What SwiGLU gives has a mean, which all rows share: routing would follow it.
                down: experts(hidden, width, 0.125)?,
            });
        }
        let final_norm = self.vector(hidden, 1.0, 0.1)?;
        let lm_head = projection(formats.lm_head, config.n_vocab, hidden, 2.0, false)?;
        let ends = (embedding, final_norm, lm_head);
        Ok(assemble(config, self.format, false, ends, layers))
    }

    fn seed(&self) -> u64 {
        let seed = self.next.get();
        self.next.set(seed.wrapping_add(0xD1B5_4A32_D192_ED03));
        seed
    }

    fn bf16(&self, n: usize, mean: f32, spread: f32) -> Result<Bytes, EngineError> {
        let out: Bytes = self.device.alloc("synthetic weights", 2 * n)?;
        self.kernels
            .fill_bf16(out.at(0), n as u64, self.seed(), mean, spread)?;
        Ok(out)
    }

    fn vector(&self, n: usize, mean: f32, spread: f32) -> Result<Bytes, EngineError> {
        match self.format.vectors {
            VectorFormat::Bf16 => self.bf16(n, mean, spread),
            VectorFormat::F32 => {
                let out: Bytes = self.device.alloc("synthetic weights", 4 * n)?;
                self.kernels
                    .fill_f32(out.at(0), n as u64, self.seed(), mean, spread)?;
                Ok(out)
            }
        }
    }

    /// Tiles of some matrices whose products have `gain` times the scale of what is multiplied.
    fn matrices(
        &self,
        format: MatrixFormat,
        n: usize,
        (n_out, n_k): (usize, usize),
        gain: f32,
    ) -> Result<Bytes, EngineError> {
        let n_bytes = n * pack::matrix_bytes(format, n_out, n_k);
        // Codes of random bits under scale 1 have this root mean square.
        let (bias, of_codes) = match (pack::narrow_bias(format), format) {
            (Some(bias), MatrixFormat::Mxfp4) => (bias, 2.926),
            (Some(bias), _) => (bias, 1.148),
            (None, _) => return self.bf16(n_bytes / 2, 0.0, gain * unit(n_k)),
        };
        // Scales 2^exponent and twice that: together the root of 2.5 of the first.
        let wanted = gain / (n_k as f32).sqrt();
        let exponent = (wanted / (of_codes * 2.5f32.sqrt())).log2().round() as i32;
        let base = (127 + exponent + i32::from(bias)) as u32;
        let out: Bytes = self.device.alloc("synthetic weights", n_bytes)?;
        let tile_chunks = pack::tile_bytes(format) as u32 / 16;
        self.kernels.fill_blocks(
            out.at(0),
            n_bytes as u64 / 16,
            tile_chunks,
            self.seed(),
            base,
        )?;
        Ok(out)
    }
}

/// Greatest of uniform values whose standard deviation is 1 / sqrt(n_k): they keep a product's
/// scale.
fn unit(n_k: usize) -> f32 {
    (3.0 / n_k as f32).sqrt()
}
