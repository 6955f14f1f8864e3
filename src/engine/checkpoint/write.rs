//! Checkpoints in the released Hugging Face layout: MXFP4 experts as `*_blocks` and `*_scales`,
//! or bf16 experts with the input dimension first.
//!
//! [`write()`] puts a checkpoint into another precision: tensors stream from the mapped input to
//! the output; beside it at most one expert's projection is held. All other tensors are copied
//! byte for byte, so nothing but the experts can change. [`super::synthetic`] writes a checkpoint
//! of random weights by the same way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::blocks::{BLOCK, Blocks, ExpertBlocks, part_of};
use super::layers::Layout;
use super::{Checkpoint, CheckpointError, Deviation, ExpertTensors, MatrixFormat, Tensor};
use crate::engine::config::{LayerKind, ModelConfig};
use crate::quant::mxfp4;

/// Largest shard, as Hugging Face writes them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What was written.
#[derive(Debug)]
pub struct Written {
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub n_bytes: u64,
    /// What became of the experts' values.
    pub experts: Deviation,
}

/// Name, type and shape of a tensor to write.
pub(super) struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    pub(super) fn n_bytes(&self) -> u64 {
        let n: usize = self.shape.iter().product();
        (n * self.dtype.bitsize() / 8) as u64
    }
}

/// Tensors that are written one after the other from one source.
pub(super) struct Unit<'a> {
    pub tensors: Vec<TensorInfo>,
    pub content: Content<'a>,
    /// Whose file pages may go afterwards.
    pub sources: Vec<Tensor<'a>>,
}

/// Fills bytes of a tensor that begin at an offset, a multiple of [`FILL_BYTES`].
pub(super) type Fill<'a> = Box<dyn Fn(u64, &mut [u8]) + Sync + 'a>;

/// Bytes that are filled at a time.
pub(super) const FILL_BYTES: usize = 1 << 16;

pub(super) enum Content<'a> {
    Copy(&'a [u8]),
    Fill(Fill<'a>),
    /// Codes, then scales, of experts of `n_out` rows and `n_k` columns.
    Mxfp4 {
        tensors: ExpertTensors<'a>,
        n_out: usize,
        n_k: usize,
    },
    /// `[n_experts, n_k, n_out]`.
    Bf16 {
        tensors: ExpertTensors<'a>,
        n_out: usize,
        n_k: usize,
    },
}

impl Unit<'_> {
    fn n_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorInfo::n_bytes).sum()
    }

    /// Width of an element, by which a file's tensors are ordered so that all are aligned.
    pub(super) fn width(&self) -> usize {
        self.tensors.first().map_or(0, |t| t.dtype.bitsize())
    }
}

/// Writes `checkpoint` into `folder` with experts in `experts`, in shards of at most
/// `shard_bytes` where tensors allow it; `progress` hears the bytes written so far and in all.
///
/// # Errors
/// A format that the layout has no place for, a scale or value that cannot be held, or a file
/// that cannot be written; files that are not whole are taken away again.
pub fn write(
    checkpoint: &Checkpoint,
    experts: MatrixFormat,
    folder: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, CheckpointError> {
    checkpoint.check_filled()?;
    let units = units(checkpoint, experts)?;
    let release = |tensor: &Tensor| checkpoint.release(tensor);
    write_units(
        units,
        checkpoint.config().n_experts,
        folder,
        shard_bytes,
        &release,
        progress,
    )
}

/// Writes units in their order, in shards.
pub(super) fn write_units(
    units: Vec<Unit>,
    n_experts: usize,
    folder: &Path,
    shard_bytes: u64,
    release: &dyn Fn(&Tensor),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, CheckpointError> {
    let n_bytes = units.iter().map(Unit::n_bytes).sum();
    let mut shards: Vec<Vec<Unit>> = vec![Vec::new()];
    let mut filled = 0;
    for unit in units {
        if filled > 0 && filled + unit.n_bytes() > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += unit.n_bytes();
        shards.last_mut().expect("one is there").push(unit);
    }
    let n_shards = shards.len();
    let mut written = Written {
        files: Vec::new(),
        n_bytes,
        experts: Deviation::default(),
    };
    let mut weight_map = BTreeMap::new();
    let mut done = 0;
    for (i, mut units) in shards.into_iter().enumerate() {
        units.sort_by_key(|unit| std::cmp::Reverse(unit.width()));
        let name = match n_shards {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        for tensor in units.iter().flat_map(|unit| &unit.tensors) {
            weight_map.insert(tensor.name.clone(), name.clone());
        }
        let path = folder.join(&name);
        let part = folder.join(format!("{name}.part"));
        let shard = write_shard(n_experts, &units, &part, release, &mut |n| {
            done += n;
            progress(done, n_bytes);
        });
        let renamed = shard.and_then(|deviation| {
            std::fs::rename(&part, &path).map_err(|source| failed(&path, source))?;
            Ok(deviation)
        });
        match renamed {
            Ok(deviation) => written.experts += deviation,
            Err(error) => {
                // What is half written is of no use; that it stays behind is no second error.
                let _ = std::fs::remove_file(&part);
                return Err(error);
            }
        }
        written.files.push(path);
    }
    if n_shards > 1 {
        let path = folder.join("model.safetensors.index.json");
        let index = json!({"metadata": {"total_size": n_bytes}, "weight_map": weight_map});
        let text = format!("{index:#}\n");
        std::fs::write(&path, text).map_err(|source| failed(&path, source))?;
        written.files.push(path);
    }
    Ok(written)
}

fn failed(path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Write {
        path: path.to_owned(),
        source,
    }
}

/// All tensors in the order of the released files.
fn units(checkpoint: &Checkpoint, experts: MatrixFormat) -> Result<Vec<Unit<'_>>, CheckpointError> {
    let config = checkpoint.config();
    let (hidden, width) = (config.hidden, config.intermediate);
    let mut units = vec![copy("model.embed_tokens.weight", checkpoint.embedding()?)];
    for i in 0..config.n_layers() {
        let layer = checkpoint.layer(i)?;
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let (q, kv) = (config.q_width(), config.n_kv_heads * config.head_dim);
        units.push(copy(&name("input_layernorm.weight"), layer.attention_norm));
        for (part, first, n) in [("q", 0, q), ("k", q, kv), ("v", q + kv, kv)] {
            for (kind, tensors) in [("weight", &layer.qkv.weights), ("bias", &layer.qkv.biases)] {
                let name = name(&format!("self_attn.{part}_proj.{kind}"));
                units.push(copy_rows(name, tensors, first, n));
            }
        }
        units.push(copy(&name("self_attn.sinks"), layer.sinks));
        for (part, parts) in [
            ("self_attn.o_proj", layer.out),
            ("mlp.router", layer.router),
        ] {
            for (kind, tensors) in [("weight", parts.weights), ("bias", parts.biases)] {
                let name = name(&format!("{part}.{kind}"));
                units.extend(tensors.into_iter().map(|tensor| copy(&name, tensor)));
            }
        }
        let norm = name("post_attention_layernorm.weight");
        units.push(copy(&norm, layer.mlp_norm));
        for (part, tensors, bias, n_out, n_k) in [
            (
                "gate_up_proj",
                layer.gate_up,
                layer.gate_up_bias,
                2 * width,
                hidden,
            ),
            ("down_proj", layer.down, layer.down_bias, hidden, width),
        ] {
            let name = name(&format!("mlp.experts.{part}"));
            units.push(copy(&format!("{name}_bias"), bias));
            units.push(expert_unit(
                name,
                experts,
                config.n_experts,
                tensors,
                n_out,
                n_k,
            )?);
        }
    }
    units.push(copy("model.norm.weight", checkpoint.final_norm()?));
    if !config.tie_word_embeddings {
        units.push(copy("lm_head.weight", checkpoint.lm_head()?));
    }
    Ok(units)
}

fn copy<'a>(name: &str, tensor: Tensor<'a>) -> Unit<'a> {
    Unit {
        tensors: vec![TensorInfo {
            name: name.to_owned(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        }],
        content: Content::Copy(tensor.bytes),
        sources: vec![tensor],
    }
}

/// Rows `first..first + n` of parts that follow each other; they lie in one part.
fn copy_rows<'a>(name: String, parts: &[Tensor<'a>], first: usize, n: usize) -> Unit<'a> {
    let (tensor, row) = part_of(parts, first).expect("the checkpoint was checked");
    let row_bytes = tensor.bytes.len() / tensor.shape[0];
    let mut shape = tensor.shape.clone();
    shape[0] = n;
    Unit {
        tensors: vec![TensorInfo {
            name,
            dtype: tensor.dtype,
            shape,
        }],
        content: Content::Copy(&tensor.bytes[row * row_bytes..(row + n) * row_bytes]),
        sources: vec![tensor.clone()],
    }
}

fn expert_unit<'a>(
    name: String,
    format: MatrixFormat,
    n_experts: usize,
    tensors: ExpertTensors<'a>,
    n_out: usize,
    n_k: usize,
) -> Result<Unit<'a>, CheckpointError> {
    let sources = match &tensors {
        ExpertTensors::Mxfp4 { codes, scales } => vec![codes.clone(), scales.clone()],
        ExpertTensors::Bf16 { values, .. } => vec![values.clone()],
    };
    let info = |name: String, dtype, shape: &[usize]| TensorInfo {
        name,
        dtype,
        shape: shape.to_vec(),
    };
    let (n_blocks, code_bytes) = (n_k / BLOCK, mxfp4::BLOCK_BYTES);
    Ok(match format {
        MatrixFormat::Mxfp4 => Unit {
            tensors: vec![
                info(
                    format!("{name}_blocks"),
                    Dtype::U8,
                    &[n_experts, n_out, n_blocks, code_bytes],
                ),
                info(
                    format!("{name}_scales"),
                    Dtype::U8,
                    &[n_experts, n_out, n_blocks],
                ),
            ],
            content: Content::Mxfp4 {
                tensors,
                n_out,
                n_k,
            },
            sources,
        },
        MatrixFormat::Bf16 => Unit {
            tensors: vec![info(name, Dtype::BF16, &[n_experts, n_k, n_out])],
            content: Content::Bf16 {
                tensors,
                n_out,
                n_k,
            },
            sources,
        },
        MatrixFormat::Mxint8 => return Err(CheckpointError::NoLayout { format }),
    })
}

fn write_shard(
    n_experts: usize,
    units: &[Unit],
    path: &Path,
    release: &dyn Fn(&Tensor),
    progress: &mut dyn FnMut(u64),
) -> Result<Deviation, CheckpointError> {
    let io = |source| failed(path, source);
    let file = File::create(path).map_err(io)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let header = header(units);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(&header))
        .map_err(io)?;
    let mut deviation = Deviation::default();
    for unit in units {
        deviation += match &unit.content {
            Content::Copy(bytes) => {
                out.write_all(bytes).map_err(io)?;
                Deviation::default()
            }
            Content::Fill(fill) => {
                write_filled(fill, unit.n_bytes(), &mut out, path)?;
                Deviation::default()
            }
            Content::Mxfp4 {
                tensors,
                n_out,
                n_k,
            } => {
                let blocks = ExpertBlocks {
                    tensors,
                    n_out: *n_out,
                    n_k: *n_k,
                };
                write_mxfp4(&blocks, n_experts, &mut out, path)?
            }
            Content::Bf16 {
                tensors,
                n_out,
                n_k,
            } => {
                let blocks = ExpertBlocks {
                    tensors,
                    n_out: *n_out,
                    n_k: *n_k,
                };
                write_bf16(&blocks, n_experts, &mut out, path)?;
                Deviation::default()
            }
        };
        unit.sources.iter().for_each(release);
        progress(unit.n_bytes());
    }
    let file = out.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)?;
    Ok(deviation)
}

fn write_filled(
    fill: &Fill,
    n_bytes: u64,
    out: &mut impl Write,
    path: &Path,
) -> Result<(), CheckpointError> {
    let mut bytes = vec![0; n_bytes.min(64 * FILL_BYTES as u64) as usize];
    let mut start = 0;
    while start < n_bytes {
        let n = (bytes.len() as u64).min(n_bytes - start) as usize;
        bytes[..n]
            .par_chunks_mut(FILL_BYTES)
            .enumerate()
            .for_each(|(i, chunk)| fill(start + (i * FILL_BYTES) as u64, chunk));
        out.write_all(&bytes[..n])
            .map_err(|source| failed(path, source))?;
        start += n as u64;
    }
    Ok(())
}

/// Codes of all experts, then their scales, which are held meanwhile.
fn write_mxfp4(
    blocks: &ExpertBlocks,
    n_experts: usize,
    out: &mut impl Write,
    path: &Path,
) -> Result<Deviation, CheckpointError> {
    let (n_out, n_blocks) = (blocks.n_out, blocks.n_k / BLOCK);
    let row_bytes = n_blocks * mxfp4::BLOCK_BYTES;
    let mut codes = vec![0; n_out * row_bytes];
    let mut scales = vec![0; n_experts * n_out * n_blocks];
    let mut sum = Deviation::default();
    for (expert, scales) in scales.chunks_mut(n_out * n_blocks).enumerate() {
        let by_row: Vec<Deviation> = codes
            .par_chunks_mut(row_bytes)
            .zip(scales.par_chunks_mut(n_blocks))
            .enumerate()
            .map(|(row, (codes, scales))| {
                let mut deviation = Deviation::default();
                let codes = codes.as_chunks_mut::<{ mxfp4::BLOCK_BYTES }>().0;
                for (block, (codes, scale)) in codes.iter_mut().zip(scales).enumerate() {
                    let stored = blocks.block(expert, row, block)?;
                    let stored = stored.expect("rows are those of the shape");
                    (*scale, *codes) = stored
                        .to_mxfp4(&mut deviation)
                        .ok_or_else(|| blocks.not_finite(expert, row, block))?;
                }
                Ok(deviation)
            })
            .collect::<Result<_, CheckpointError>>()?;
        by_row.into_iter().for_each(|row| sum += row);
        out.write_all(&codes)
            .map_err(|source| failed(path, source))?;
    }
    out.write_all(&scales)
        .map_err(|source| failed(path, source))?;
    Ok(sum)
}

fn write_bf16(
    blocks: &ExpertBlocks,
    n_experts: usize,
    out: &mut impl Write,
    path: &Path,
) -> Result<(), CheckpointError> {
    let (n_out, n_k) = (blocks.n_out, blocks.n_k);
    let mut bytes = vec![0; n_k * n_out * 2];
    for expert in 0..n_experts {
        bytes
            .par_chunks_mut(BLOCK * n_out * 2)
            .enumerate()
            .try_for_each(|(block, bytes)| {
                for row in 0..n_out {
                    let stored = blocks.block(expert, row, block)?;
                    let stored = stored.expect("rows are those of the shape");
                    for (i, bits) in stored.to_bf16().into_iter().enumerate() {
                        bytes[(i * n_out + row) * 2..][..2].copy_from_slice(&bits.to_le_bytes());
                    }
                }
                Ok::<_, CheckpointError>(())
            })?;
        out.write_all(&bytes)
            .map_err(|source| failed(path, source))?;
    }
    Ok(())
}

/// The JSON header of a safetensors file, padded with blanks to whole words.
fn header(units: &[Unit]) -> Vec<u8> {
    let mut map = Map::new();
    // transformers reads only files that say what wrote their tensors.
    map.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in units.iter().flat_map(|unit| &unit.tensors) {
        let end = start + tensor.n_bytes();
        let info = json!({
            "dtype": tensor.dtype.to_string(),
            "shape": tensor.shape,
            "data_offsets": [start, end],
        });
        map.insert(tensor.name.clone(), info);
        start = end;
    }
    let mut header = Value::Object(map).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

/// The `config.json` beside the written tensors: the input's own with the precision changed, or a
/// new one in Hugging Face's names where the input has OpenAI's.
pub fn config_json(checkpoint: &Checkpoint, stored: &Value, experts: MatrixFormat) -> Value {
    let mut config = match (checkpoint.layout, stored) {
        (Layout::HuggingFace, Value::Object(map)) => map.clone(),
        _ => hugging_face_config(checkpoint.config()),
    };
    if experts == MatrixFormat::Mxfp4 {
        config.insert(
            "quantization_config".to_owned(),
            json!({
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router",
                    "model.embed_tokens", "lm_head",
                ],
            }),
        );
    } else {
        config.remove("quantization_config");
    }
    Value::Object(config)
}

pub(super) fn hugging_face_config(config: &ModelConfig) -> Map<String, Value> {
    let layer_types: Vec<&str> = config
        .layers
        .iter()
        .map(|kind| match kind {
            LayerKind::Sliding => "sliding_attention",
            LayerKind::Full => "full_attention",
        })
        .collect();
    let rope_scaling = config.yarn.map(|yarn| {
        json!({
            "rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow, "truncate": yarn.truncate,
            "original_max_position_embeddings": yarn.original_context,
        })
    });
    let value = json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "attention_bias": true, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": config.hidden, "intermediate_size": config.intermediate,
        "num_hidden_layers": config.n_layers(), "layer_types": layer_types,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "vocab_size": config.n_vocab,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.n_experts_per_token,
        "experts_per_token": config.n_experts_per_token,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": shortest(config.rms_norm_eps), "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling, "swiglu_limit": shortest(config.swiglu_limit),
        "tie_word_embeddings": config.tie_word_embeddings,
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The f64 with the fewest digits that reads back as this f32: 1e-5, not 9.99999974e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
