//! Full-size checkpoints of random weights in the released layout: what exercises and times the
//! real path from disk where no released weights are at hand.
//!
//! Every value is a pure function of (seed, tensor name, index). The distributions keep the model
//! lively: products keep their scale, routing is near uniform, and rows differ.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use memmap2::MmapOptions;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::write::{
    Content, FILL_BYTES, Fill, TensorInfo, Unit, Written, hugging_face_config, write_units,
};
use super::{Bytes, Checkpoint, CheckpointError, MatrixFormat, Shard, read_header};
use crate::engine::config::ModelConfig;
use crate::quant::{bf16, mxfp4};

/// Special tokens of gpt-oss and their ids in the released vocabulary.
const SPECIAL_TOKENS: [(&str, u32); 10] = [
    ("<|startoftext|>", 199_998),
    ("<|endoftext|>", 199_999),
    ("<|return|>", 200_002),
    ("<|constrain|>", 200_003),
    ("<|channel|>", 200_005),
    ("<|start|>", 200_006),
    ("<|end|>", 200_007),
    ("<|message|>", 200_008),
    ("<|call|>", 200_012),
    ("<|endofprompt|>", 200_018),
];

/// Bytes that have tokens of their own.
const N_BYTES: u32 = 256;

/// Writes the tensors of a shape into `folder`.
///
/// # Errors
/// A file that cannot be written.
pub fn write_tensors(
    config: &ModelConfig,
    seed: u64,
    folder: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, CheckpointError> {
    let units = units(config, seed);
    write_units(
        units,
        config.n_experts,
        folder,
        shard_bytes,
        &|_| {},
        progress,
    )
}

/// Weights up to this size are made in memory, as they would be written; more of them are
/// described, and a device makes its own.
pub const MOST_IN_MEMORY: u64 = 1 << 30;

impl Checkpoint {
    /// Random weights of a shape without files: those that [`write_tensors`] would write, or
    /// above [`MOST_IN_MEMORY`] a checkpoint whose tensors hold nothing
    /// ([`Checkpoint::in_place`]).
    ///
    /// # Errors
    /// The system has no room for them.
    pub fn synthetic(config: &ModelConfig, seed: u64) -> Result<Self, CheckpointError> {
        let path = PathBuf::from("synthetic");
        let mut units = units(config, seed);
        let (begin, n_bytes) = described(&mut units);
        let n_head = begin.len();
        let is_filled = n_bytes <= MOST_IN_MEMORY;
        let bytes = if is_filled {
            Bytes::Owned(filled(&units, begin, n_bytes))
        } else {
            // Addresses alone: no page of it is touched but the header's.
            let failed = |source| CheckpointError::Write {
                path: path.clone(),
                source,
            };
            let mut map = MmapOptions::new()
                .len(n_head + n_bytes as usize)
                .no_reserve_swap()
                .map_anon()
                .map_err(failed)?;
            map[..n_head].copy_from_slice(&begin);
            Bytes::Unfilled(map.make_read_only().map_err(failed)?)
        };
        let shards = vec![Shard {
            path: path.clone(),
            bytes,
        }];
        let mut checkpoint = Self::new(config.clone(), path, shards)?;
        checkpoint.in_place = (!is_filled).then_some(seed);
        Ok(checkpoint)
    }

    /// The checkpoint with values in the tensors whose names begin with `prefix`: itself where it
    /// has them all, else another with those tensors alone, as [`write_tensors`] would write them.
    ///
    /// # Errors
    /// A name of no tensor.
    pub fn filled(&self, prefix: &str) -> Result<Filled<'_>, CheckpointError> {
        let Some(seed) = self.in_place else {
            return Ok(Filled::Itself(self));
        };
        let mut units = units(&self.config, seed);
        units.retain(|unit| unit.tensors.iter().all(|t| t.name.starts_with(prefix)));
        let (begin, n_bytes) = described(&mut units);
        let shard = Shard {
            path: self.path.clone(),
            bytes: Bytes::Owned(filled(&units, begin, n_bytes)),
        };
        Ok(Filled::Part(Box::new(Self {
            config: self.config.clone(),
            path: self.path.clone(),
            tensors: read_header(0, &shard)?.into_iter().collect(),
            shards: vec![shard],
            layout: self.layout,
            expert_format: self.expert_format,
            vector_format: self.vector_format,
            in_place: None,
        })))
    }
}

/// A checkpoint whose wanted tensors have values.
pub enum Filled<'a> {
    Itself(&'a Checkpoint),
    Part(Box<Checkpoint>),
}

impl std::ops::Deref for Filled<'_> {
    type Target = Checkpoint;

    fn deref(&self) -> &Checkpoint {
        match self {
            Self::Itself(checkpoint) => checkpoint,
            Self::Part(part) => part,
        }
    }
}

/// Puts the tensors into a file's order; the file's beginning, and the bytes behind it.
fn described(units: &mut [Unit]) -> (Vec<u8>, u64) {
    units.sort_by_key(|unit| Reverse(unit.width()));
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in units.iter().flat_map(|unit| &unit.tensors) {
        let begin = end;
        end += tensor.n_bytes();
        let dtype = serde_json::to_value(tensor.dtype).unwrap_or_default();
        header.insert(
            tensor.name.clone(),
            json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut begin = (header.len() as u64).to_le_bytes().to_vec();
    begin.extend_from_slice(header.as_bytes());
    (begin, end)
}

/// A file with its tensors' values, of which there are `n_bytes`.
fn filled(units: &[Unit], begin: Vec<u8>, n_bytes: u64) -> Vec<u8> {
    let (n_head, mut file) = (begin.len(), begin);
    file.resize(n_head + n_bytes as usize, 0);
    fill(units, &mut file[n_head..]);
    file
}

/// Fills the tensors, which lie one behind the other.
fn fill(units: &[Unit], mut bytes: &mut [u8]) {
    for unit in units {
        let n_bytes: u64 = unit.tensors.iter().map(TensorInfo::n_bytes).sum();
        let (here, rest) = bytes.split_at_mut(n_bytes as usize);
        if let Content::Fill(fill) = &unit.content {
            let chunks = here.par_chunks_mut(FILL_BYTES).enumerate();
            chunks.for_each(|(i, chunk)| fill((i * FILL_BYTES) as u64, chunk));
        }
        bytes = rest;
    }
}

/// The other files of the checkpoint: `config.json`, tokenizer, generation settings.
pub fn companions(config: &ModelConfig) -> [(&'static str, Value); 4] {
    let special = special_ids(config);
    let id = |wanted: &str| {
        special
            .iter()
            .find(|(name, _)| *name == wanted)
            .map(|s| s.1)
    };
    let stops: Vec<u32> = ["<|return|>", "<|endoftext|>", "<|call|>"]
        .into_iter()
        .filter_map(id)
        .collect();
    let mut described = hugging_face_config(config);
    described.insert("eos_token_id".to_owned(), json!(id("<|return|>")));
    described.insert("pad_token_id".to_owned(), json!(id("<|endoftext|>")));
    let quantization = json!({
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router",
            "model.embed_tokens", "lm_head",
        ],
    });
    described.insert("quantization_config".to_owned(), quantization);
    let generation = json!({
        "bos_token_id": id("<|startoftext|>"), "eos_token_id": stops,
        "pad_token_id": id("<|endoftext|>"), "do_sample": true,
    });
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>", "pad_token": "<|endoftext|>",
        "model_max_length": config.max_context,
    });
    [
        ("tokenizer.json", tokenizer(&special)),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
        ("config.json", Value::Object(described)),
    ]
}

/// gpt-oss's own ids where the vocabulary has them, else the last ids of it.
fn special_ids(config: &ModelConfig) -> Vec<(&'static str, u32)> {
    let n_vocab = config.n_vocab as u32;
    let last = SPECIAL_TOKENS[SPECIAL_TOKENS.len() - 1].1;
    let n = SPECIAL_TOKENS.len() as u32;
    SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(i, &(name, id))| match last < n_vocab {
            true => (name, id),
            false => (name, n_vocab - n + i as u32),
        })
        .collect()
}

/// The smallest vocabulary that holds a token a byte and the special tokens.
pub const MIN_VOCAB: usize = N_BYTES as usize + SPECIAL_TOKENS.len();

/// A byte-level tokenizer without merges: a token a byte.
fn tokenizer(special: &[(&'static str, u32)]) -> Value {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(byte_name(byte).to_string(), json!(byte));
    }
    // Added tokens have the ids that the model's vocabulary gives them.
    for (name, id) in special {
        vocab.insert((*name).to_owned(), json!(id));
    }
    let added: Vec<Value> = special
        .iter()
        .map(|(name, id)| {
            json!({
                "id": id, "content": name, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = |trim: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim,
            "use_regex": false,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level(false), "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// The character that stands for a byte in a byte-level vocabulary: printable ones stand for
/// themselves, the others follow from U+0100 on, in order.
fn byte_name(byte: u8) -> char {
    let is_printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&b| !is_printable(b)).count() as u32;
    char::from_u32(0x100 + n_before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// All tensors, in the order of the released files.
fn units(config: &ModelConfig, seed: u64) -> Vec<Unit<'static>> {
    let (hidden, width, n_experts) = (config.hidden, config.intermediate, config.n_experts);
    // Uniform values of deviation 1 / sqrt(n_k) keep a product's scale.
    let unit = |n_k: usize| (3.0 / n_k as f32).sqrt();
    let tensor = |name: &str, shape: &[usize], mean: f32, spread: f32| {
        let words = Words::of(seed, name);
        Unit {
            tensors: vec![TensorInfo {
                name: name.to_owned(),
                dtype: Dtype::BF16,
                shape: shape.to_vec(),
            }],
            content: Content::Fill(words.bf16(mean, spread)),
            sources: Vec::new(),
        }
    };
    let mut units = vec![tensor(
        "model.embed_tokens.weight",
        &[config.n_vocab, hidden],
        0.0,
        1.7,
    )];
    for layer in 0..config.n_layers() {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (q, kv) = (config.q_width(), config.n_kv_heads * config.head_dim);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            units.push(tensor(
                &name(&format!("{norm}.weight")),
                &[hidden],
                1.0,
                0.1,
            ));
        }
        for (part, n_out, n_k, gain, bias) in [
            ("self_attn.q_proj", q, hidden, 1.0, 0.1),
            ("self_attn.k_proj", kv, hidden, 1.0, 0.1),
            ("self_attn.v_proj", kv, hidden, 1.0, 0.1),
            ("self_attn.o_proj", hidden, q, 1.0, 0.1),
            ("mlp.router", n_experts, hidden, 1.5, 0.01),
        ] {
            let weight = name(&format!("{part}.weight"));
            units.push(tensor(&weight, &[n_out, n_k], 0.0, gain * unit(n_k)));
            units.push(tensor(&name(&format!("{part}.bias")), &[n_out], 0.0, bias));
        }
        units.push(tensor(
            &name("self_attn.sinks"),
            &[config.n_heads],
            0.0,
            1.0,
        ));
        for (part, n_out, n_k) in [
            ("gate_up_proj", 2 * width, hidden),
            ("down_proj", hidden, width),
        ] {
            let name = name(&format!("mlp.experts.{part}"));
            let bias = format!("{name}_bias");
            units.push(tensor(&bias, &[n_experts, n_out], 0.0, 0.1));
            let shape = [n_experts, n_out, n_k / mxfp4::BLOCK];
            for (kind, shape, base) in [
                ("blocks", [&shape[..], &[mxfp4::BLOCK_BYTES]].concat(), None),
                ("scales", shape.to_vec(), Some(scale_byte(n_k))),
            ] {
                let name = format!("{name}_{kind}");
                let words = Words::of(seed, &name);
                units.push(Unit {
                    content: Content::Fill(match base {
                        None => words.codes(),
                        Some(base) => words.scales(base),
                    }),
                    tensors: vec![TensorInfo {
                        name,
                        dtype: Dtype::U8,
                        shape,
                    }],
                    sources: Vec::new(),
                });
            }
        }
    }
    units.push(tensor("model.norm.weight", &[hidden], 1.0, 0.1));
    if !config.tie_word_embeddings {
        let shape = [config.n_vocab, hidden];
        units.push(tensor("lm_head.weight", &shape, 0.0, 2.0 * unit(hidden)));
    }
    units
}

/// The lower of two scale bytes that bring random codes, whose deviation is 2.93, near
/// 1 / sqrt(n_k).
fn scale_byte(n_k: usize) -> u8 {
    let exponent = (1.0 / (2.93 * (n_k as f64).sqrt())).log2().round() as i32 - 1;
    (127 + exponent) as u8
}

/// The random words of one tensor: SplitMix64 of (seed, tensor, index).
#[derive(Clone, Copy)]
struct Words(u64);

impl Words {
    fn of(seed: u64, name: &str) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        Self(mix(hash ^ mix(seed)))
    }

    fn word(self, index: u64) -> u64 {
        mix(self.0 ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// bf16 values, uniform about `mean`: four to a word.
    fn bf16(self, mean: f32, spread: f32) -> Fill<'static> {
        Box::new(move |start, bytes| {
            for (i, bytes) in bytes.chunks_mut(8).enumerate() {
                let word = self.word(start / 8 + i as u64);
                for (lane, pair) in bytes.chunks_exact_mut(2).enumerate() {
                    // Sixteen bits to the middle of one of 2^16 steps.
                    let bits = (word >> (16 * lane)) as u16;
                    let unit = (f32::from(bits) + 0.5) / 65_536.0;
                    let value = mean + spread * (2.0 * unit - 1.0);
                    pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
            }
        })
    }

    /// Codes of random bits.
    fn codes(self) -> Fill<'static> {
        Box::new(move |start, bytes| {
            for (i, bytes) in bytes.chunks_mut(8).enumerate() {
                let word = self.word(start / 8 + i as u64).to_le_bytes();
                bytes.copy_from_slice(&word[..bytes.len()]);
            }
        })
    }

    /// Scale bytes: `base` or the next.
    fn scales(self, base: u8) -> Fill<'static> {
        Box::new(move |start, bytes| {
            for (i, bytes) in bytes.chunks_mut(8).enumerate() {
                let word = self.word(start / 8 + i as u64).to_le_bytes();
                for (byte, random) in bytes.iter_mut().zip(word) {
                    *byte = base + (random & 1);
                }
            }
        })
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Bytes of all tensors of a shape as written: MXFP4 experts, bf16 for the rest.
pub fn tensor_bytes(config: &ModelConfig) -> u64 {
    let units = units(config, 0);
    let tensors = units.iter().flat_map(|unit| &unit.tensors);
    tensors.map(TensorInfo::n_bytes).sum()
}

/// The experts' format of a written checkpoint.
pub const EXPERTS: MatrixFormat = MatrixFormat::Mxfp4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::shapes;

    #[test]
    fn bytes_have_the_names_of_byte_level_vocabularies() {
        assert_eq!(byte_name(b'A'), 'A');
        assert_eq!(byte_name(b' '), '\u{120}');
        assert_eq!(byte_name(b'\n'), '\u{10A}');
        assert_eq!(byte_name(0xAD), '\u{143}');
        let mut names: Vec<char> = (0..=255).map(byte_name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 256);
    }

    #[test]
    fn the_released_shape_has_the_released_size() {
        let config = shapes::named("gpt-oss-20b").expect("a shape");
        assert_eq!(tensor_bytes(&config), 13_761_264_768);
    }

    #[test]
    fn scales_bring_codes_near_unit_products() {
        assert_eq!(scale_byte(2880), 127 - 8);
        let near = (1.5 * 2f64.powi(-8)) * 2.93 * 2880f64.sqrt();
        assert!((0.8..1.2).contains(&near), "{near}");
    }

    #[test]
    fn layers_made_one_by_one_are_those_of_the_whole() {
        let mut config = shapes::named("gpt-oss-20b").expect("a shape");
        config.layers.truncate(2);
        (config.n_experts, config.n_vocab) = (4, 300);
        (config.hidden, config.intermediate) = (64, 32);
        let whole = Checkpoint::synthetic(&config, 7).expect("memory");
        assert!(whole.in_place().is_none(), "it is small");
        let mut described = Checkpoint::synthetic(&config, 7).expect("memory");
        described.in_place = Some(7);
        let part = described.filled("model.layers.1.").expect("it is a layer");
        let bytes = |checkpoint: &Checkpoint| {
            let layer = checkpoint.layer(1).expect("it is there");
            let parts = [&layer.qkv, &layer.out, &layer.router];
            let weights = parts.iter().flat_map(|part| &part.weights);
            weights
                .map(|tensor| tensor.bytes.to_vec())
                .collect::<Vec<_>>()
        };
        assert_eq!(bytes(&part), bytes(&whole));
        assert!(part.layer(0).is_err(), "no other layer is made");
        let part = described.filled("lm_head.").expect("it has one");
        let (found, expected) = (part.lm_head(), whole.lm_head());
        assert_eq!(found.expect("made").bytes, expected.expect("made").bytes);
    }

    #[test]
    fn words_do_not_depend_on_how_they_are_cut() {
        let fill = Words::of(3, "a tensor").bf16(0.0, 1.0);
        let mut whole = vec![0; 4096];
        fill(0, &mut whole);
        let mut parts = vec![0; 4096];
        for (i, part) in parts.chunks_mut(1024).enumerate() {
            fill(1024 * i as u64, part);
        }
        assert_eq!(whole, parts);
        let other = Words::of(4, "a tensor");
        assert_ne!(other.word(0), Words::of(3, "a tensor").word(0));
    }
}
