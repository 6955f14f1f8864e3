//! The weights of a model as the device holds them: packed on the host tensor by tensor, or made
//! in place from a seed; counted as allocated.

use std::sync::Arc;

use super::buffer::DeviceBuffer;
use super::device::Device;
use super::launch::Kernels;
use super::pack::{self, NeedsWide, RowOrder};
use crate::engine::EngineError;
use crate::engine::checkpoint::layers::Parts;
use crate::engine::checkpoint::{
    Checkpoint, CheckpointError, ClassBytes, ExpertTensors, MatrixFormat, Precision, Tensor,
    VectorFormat, WeightFormat,
};
use crate::engine::config::{LayerKind, ModelConfig};
use crate::quant::{bf16, mxfp4};

/// Bytes on the device.
pub type Bytes = DeviceBuffer<u8>;

/// A dense matrix in tiles, and its bias.
pub struct Projection {
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
    /// Some scale is above 2: kernels are built for that.
    pub wide_scales: bool,
    /// bf16 `[n_vocab, hidden]`.
    pub embedding: Bytes,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Bytes,
    pub lm_head: Projection,
    loaded: ClassBytes,
}

/// Why experts were not packed.
enum PackError {
    Engine(EngineError),
    NeedsWide,
}

impl From<NeedsWide> for PackError {
    fn from(_: NeedsWide) -> Self {
        Self::NeedsWide
    }
}

impl<E: Into<EngineError>> From<E> for PackError {
    fn from(error: E) -> Self {
        Self::Engine(error.into())
    }
}

impl CudaModel {
    /// Packs a checkpoint's weights, tensor by tensor; the file's pages are dropped behind.
    ///
    /// # Errors
    /// A precision this version lacks, a scale byte or a value that cannot be held, out of
    /// memory, or counts that differ from the plan.
    pub fn load(
        device: &Arc<Device>,
        checkpoint: &Checkpoint,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        for wide_scales in [false, true] {
            let loader = Loader {
                device,
                checkpoint,
                config: checkpoint.config(),
                format: checkpoint.weight_format(precision),
                wide_scales,
            };
            match loader.load() {
                Ok(model) => {
                    device.synchronize()?;
                    return model.checked();
                }
                // Once more, in the form for large scales.
                Err(PackError::NeedsWide) => {}
                Err(PackError::Engine(error)) => return Err(error),
            }
        }
        unreachable!("the wide form holds every scale")
    }

    fn checked(self) -> Result<Self, EngineError> {
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

    /// Bytes of each class as loaded, counted at allocation.
    pub fn loaded_bytes(&self) -> ClassBytes {
        self.loaded
    }

    /// Bytes of each class that a model of this configuration takes; pure.
    pub fn planned_bytes(config: &ModelConfig, format: WeightFormat) -> ClassBytes {
        let vector = format.vectors.n_bytes();
        let projection = |n_out: usize, n_k: usize| pack::bf16_bytes(n_out, n_k) + n_out * vector;
        let expert = |n_out: usize, n_k: usize| expert_bytes(format, n_out, n_k) + n_out * vector;
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
            lm_head: pack::bf16_bytes(config.n_vocab, hidden) as u64,
        }
    }
}

/// Bytes of one expert's packed matrix.
fn expert_bytes(format: WeightFormat, n_out: usize, n_k: usize) -> usize {
    match format.experts {
        MatrixFormat::Mxfp4 => pack::mxfp4_bytes(n_out, n_k),
        _ => pack::bf16_bytes(n_out, n_k),
    }
}

/// Puts layers together in order and counts them.
fn assemble(
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
fn kinds(config: &ModelConfig) -> impl Iterator<Item = (LayerKind, usize)> + '_ {
    config.layers.iter().enumerate().map(|(i, &kind)| {
        let before = config.layers[..i].iter().filter(|&&k| k == kind).count();
        (kind, before)
    })
}

struct Loader<'a> {
    device: &'a Arc<Device>,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    format: WeightFormat,
    wide_scales: bool,
}

impl Loader<'_> {
    fn load(&self) -> Result<CudaModel, PackError> {
        let embedding = self.as_stored(&self.checkpoint.embedding()?)?;
        let mut layers = Vec::with_capacity(self.config.n_layers());
        for (i, (kind, kind_index)) in kinds(self.config).enumerate() {
            let tensors = self.checkpoint.layer(i)?;
            let head_dim = self.config.head_dim;
            let router = &tensors.router;
            let mut router_bytes = Vec::new();
            for tensor in &router.weights {
                router_bytes.extend_from_slice(tensor.bytes);
            }
            layers.push(LayerWeights {
                kind,
                kind_index,
                attention_norm: self.vector(std::slice::from_ref(&tensors.attention_norm))?,
                qkv: self.projection(&tensors.qkv, RowOrder::Rotary { head_dim })?,
                sinks: self.vector(std::slice::from_ref(&tensors.sinks))?,
                out: self.projection(&tensors.out, RowOrder::Natural)?,
                mlp_norm: self.vector(std::slice::from_ref(&tensors.mlp_norm))?,
                router: self.upload("the router", &router_bytes)?,
                router_bias: self.vector(&router.biases)?,
                gate_up: self.experts(
                    &tensors.gate_up,
                    &tensors.gate_up_bias,
                    (2 * self.config.intermediate, self.config.hidden),
                    RowOrder::GateUp,
                )?,
                down: self.experts(
                    &tensors.down,
                    &tensors.down_bias,
                    (self.config.hidden, self.config.intermediate),
                    RowOrder::Natural,
                )?,
            });
        }
        let final_norm = self.vector(&[self.checkpoint.final_norm()?])?;
        let parts = Parts {
            weights: vec![self.checkpoint.lm_head()?],
            biases: Vec::new(),
        };
        let lm_head = self.projection(&parts, RowOrder::Natural)?;
        let ends = (embedding, final_norm, lm_head);
        Ok(assemble(
            self.config,
            self.format,
            self.wide_scales,
            ends,
            layers,
        ))
    }

    fn upload(&self, what: &str, bytes: &[u8]) -> Result<Bytes, PackError> {
        let buffer = self.device.alloc(what, bytes.len())?;
        buffer.upload(0, bytes)?;
        Ok(buffer)
    }

    fn as_stored(&self, tensor: &Tensor) -> Result<Bytes, PackError> {
        let buffer = self.upload(&tensor.name, tensor.bytes)?;
        self.checkpoint.release(tensor);
        Ok(buffer)
    }

    /// Vectors that follow each other, in the format of all the checkpoint's vectors.
    fn vector(&self, tensors: &[Tensor]) -> Result<Bytes, PackError> {
        let mut bytes = Vec::new();
        for tensor in tensors {
            let is_f32 = tensor.dtype == safetensors::Dtype::F32;
            match self.format.vectors {
                VectorFormat::F32 if !is_f32 => {
                    for i in 0..tensor.bytes.len() / 2 {
                        bytes.extend(bf16::to_f32(tensor.bf16(i)).to_le_bytes());
                    }
                }
                // bf16 is the format only where no vector is f32.
                _ => bytes.extend_from_slice(tensor.bytes),
            }
        }
        self.upload("a norm, bias or sink", &bytes)
    }

    fn projection(&self, parts: &Parts, order: RowOrder) -> Result<Projection, PackError> {
        let n_k = parts.weights.first().map_or(0, |tensor| tensor.shape[1]);
        let n_out = parts.weights.iter().map(|tensor| tensor.shape[0]).sum();
        // First row of each part.
        let mut starts = Vec::new();
        let mut next = 0;
        for tensor in &parts.weights {
            starts.push(next);
            next += tensor.shape[0];
        }
        let value = |row: usize, k: usize| {
            let part = starts.partition_point(|&start| start <= row) - 1;
            parts.weights[part].bf16((row - starts[part]) * n_k + k)
        };
        let mut bytes = vec![0; pack::bf16_bytes(n_out, n_k)];
        pack::bf16(&mut bytes, n_out, n_k, order, value);
        let tiles = self.upload("a projection", &bytes)?;
        let bias = match parts.biases.is_empty() {
            true => None,
            false => Some(self.vector(&parts.biases)?),
        };
        for tensor in &parts.weights {
            self.checkpoint.release(tensor);
        }
        Ok(Projection {
            n_out,
            n_k,
            tiles,
            bias,
        })
    }

    fn experts(
        &self,
        tensors: &ExpertTensors,
        bias: &Tensor,
        (n_out, n_k): (usize, usize),
        order: RowOrder,
    ) -> Result<Experts, PackError> {
        let n_bytes = expert_bytes(self.format, n_out, n_k);
        let tiles: Bytes = self
            .device
            .alloc("experts", self.config.n_experts * n_bytes)?;
        let mut bytes = vec![0; n_bytes];
        for expert in 0..self.config.n_experts {
            let source = Source {
                tensors,
                expert,
                n_out,
                n_k,
            };
            match self.format.experts {
                MatrixFormat::Mxfp4 => {
                    pack::mxfp4(
                        &mut bytes,
                        n_out,
                        n_k,
                        order,
                        self.wide_scales,
                        |row, block| source.mxfp4(row, block).map_err(PackError::from),
                    )?;
                }
                _ => {
                    source.check()?;
                    pack::bf16(&mut bytes, n_out, n_k, order, |row, k| source.bf16(row, k));
                }
            }
            tiles.upload(expert * n_bytes, &bytes)?;
        }
        match tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                self.checkpoint.release(codes);
                self.checkpoint.release(scales);
            }
            ExpertTensors::Bf16 { values, .. } => self.checkpoint.release(values),
        }
        Ok(Experts {
            n_out,
            n_k,
            tiles,
            bias: self.vector(std::slice::from_ref(bias))?,
        })
    }
}

/// One expert's matrix as stored.
struct Source<'a> {
    tensors: &'a ExpertTensors<'a>,
    expert: usize,
    n_out: usize,
    n_k: usize,
}

impl Source<'_> {
    /// Scale and codes of a block, quantized when the file holds bf16.
    fn mxfp4(
        &self,
        row: usize,
        block: usize,
    ) -> Result<(u8, [u8; mxfp4::BLOCK_BYTES]), CheckpointError> {
        match self.tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                let n_blocks = self.n_k / mxfp4::BLOCK;
                let index = (self.expert * self.n_out + row) * n_blocks + block;
                let codes = codes.bytes.as_chunks().0[index];
                let byte = scales.bytes[index];
                if mxfp4::is_loadable(byte, &codes) {
                    return Ok((byte, codes));
                }
                Err(CheckpointError::Scale {
                    path: scales.path.to_owned(),
                    tensor: scales.name.clone(),
                    block: index,
                    byte,
                })
            }
            ExpertTensors::Bf16 { values, .. } => {
                let first = block * mxfp4::BLOCK;
                let of_block: [f32; mxfp4::BLOCK] = std::array::from_fn(|i| {
                    bf16::to_f32(values.bf16(self.element(row, first + i)))
                });
                mxfp4::pack(&of_block).ok_or_else(|| CheckpointError::NotFinite {
                    path: values.path.to_owned(),
                    tensor: values.name.clone(),
                    element: self.element(row, first),
                })
            }
        }
    }

    /// Whether every block of MXFP4 may be widened; bf16 is taken as it is.
    fn check(&self) -> Result<(), CheckpointError> {
        if matches!(self.tensors, ExpertTensors::Mxfp4 { .. }) {
            for row in 0..self.n_out {
                for block in 0..self.n_k / mxfp4::BLOCK {
                    self.mxfp4(row, block)?;
                }
            }
        }
        Ok(())
    }

    /// The bits of a value; exact for MXFP4 that passed [`Source::check`].
    fn bf16(&self, row: usize, k: usize) -> u16 {
        match self.tensors {
            ExpertTensors::Mxfp4 { codes, scales } => {
                let index =
                    (self.expert * self.n_out + row) * (self.n_k / mxfp4::BLOCK) + k / mxfp4::BLOCK;
                let byte = codes.bytes[index * mxfp4::BLOCK_BYTES + k % mxfp4::BLOCK / 2];
                let code = byte >> (k % 2 * 4) & 15;
                // A block of zeros may have any scale.
                match code & 7 {
                    0 => u16::from(code) << 12,
                    _ => bf16::from_f32(
                        mxfp4::VALUES[usize::from(code)] * mxfp4::scale(scales.bytes[index]),
                    ),
                }
            }
            ExpertTensors::Bf16 { values, .. } => values.bf16(self.element(row, k)),
        }
    }

    fn element(&self, row: usize, k: usize) -> usize {
        let (n_out, n_k) = (self.n_out, self.n_k);
        match self.tensors {
            ExpertTensors::Bf16 {
                transposed: true, ..
            } => (self.expert * n_k + k) * n_out + row,
            _ => (self.expert * n_out + row) * n_k + k,
        }
    }
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
        // Uniform values of standard deviation 1 / sqrt(n_k) keep a product's scale.
        let unit = |n_k: usize| (3.0 / n_k as f32).sqrt();
        let projection = |n_out: usize, n_k: usize, gain: f32, bias: bool| {
            Ok::<_, EngineError>(Projection {
                n_out,
                n_k,
                tiles: self.bf16(pack::bf16_bytes(n_out, n_k) / 2, 0.0, gain * unit(n_k))?,
                bias: match bias {
                    true => Some(self.vector(n_out, 0.0, 0.02)?),
                    false => None,
                },
            })
        };
        let experts = |n_out: usize, n_k: usize| {
            Ok::<_, EngineError>(Experts {
                n_out,
                n_k,
                tiles: self.experts(n_out, n_k)?,
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
                qkv: projection(config.qkv_width(), hidden, 1.0, true)?,
                sinks: self.vector(config.n_heads, 0.0, 1.0)?,
                out: projection(hidden, config.q_width(), 0.5, true)?,
                mlp_norm: self.vector(hidden, 1.0, 0.1)?,
                router: self.bf16(n_experts * hidden, 0.0, 1.5 * unit(hidden))?,
                router_bias: self.vector(n_experts, 0.0, 0.01)?,
                gate_up: experts(2 * width, hidden)?,
                down: experts(hidden, width)?,
            });
        }
        let final_norm = self.vector(hidden, 1.0, 0.1)?;
        let lm_head = projection(config.n_vocab, hidden, 2.0, false)?;
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

    fn experts(&self, n_out: usize, n_k: usize) -> Result<Bytes, EngineError> {
        let n_bytes = self.config.n_experts * expert_bytes(self.format, n_out, n_k);
        match self.format.experts {
            MatrixFormat::Mxfp4 => {
                let out: Bytes = self.device.alloc("synthetic weights", n_bytes)?;
                // Codes of random bits have deviation 2.93; with scales 2^-8 and 2^-7 that is
                // near 1 / sqrt(2880). Down is eight times smaller: what SwiGLU gives has a mean,
                // which all rows share, and routing would follow it.
                let base = 127 - if n_out == self.config.hidden { 11 } else { 8 } + 126;
                self.kernels
                    .fill_mxfp4(out.at(0), n_bytes as u64 / 16, self.seed(), base)?;
                Ok(out)
            }
            _ => self.bf16(n_bytes / 2, 0.0, (3.0 / n_k as f32).sqrt()),
        }
    }
}
