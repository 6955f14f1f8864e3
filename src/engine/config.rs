//! The model's configuration: `config.json` of the Hugging Face layout or of OpenAI's original
//! layout in, a checked [`ModelConfig`] out.
//!
//! The two files name the same things differently (`num_local_experts` and `num_experts`,
//! `rope_scaling.beta_fast` and `rope_ntk_beta`), and newer tools write `rope_parameters` for
//! `rope_scaling` and `rope_theta`. Every number that a later size is computed from is checked
//! here, so the checkpoint and the engine may multiply without overflow.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Largest accepted value of a count that sizes are computed from: products of four of these
/// times a byte width stay below 2^63 for any checkpoint that fits on a disk.
const MAX_WIDTH: u64 = 1 << 17;
const MAX_VOCAB: u64 = 1 << 22;
const MAX_LAYERS: u64 = 1 << 10;
const MAX_EXPERTS: u64 = 1 << 12;
const MAX_CONTEXT: u64 = 1 << 24;

/// Largest head dim that the attention's scratch is made for.
pub const MAX_HEAD_DIM: usize = 128;

/// Most query heads that may share a KV head.
pub const MAX_GROUP: usize = 64;

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// The token itself and the `sliding_window - 1` tokens before it.
    Sliding,
    /// All tokens so far.
    Full,
}

/// YaRN's stretching of the rotary frequencies (arXiv 2309.00071; `_compute_yarn_parameters` in
/// transformers' `modeling_rope_utils.py`).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Yarn {
    pub factor: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub original_context: usize,
    /// Whether the ramp's ends are rounded outwards to whole pairs; gpt-oss keeps the fractions.
    pub truncate: bool,
    /// What cos and sin are multiplied by.
    pub concentration: f64,
}

/// A checked configuration of a GPT-OSS model.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelConfig {
    pub hidden: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub n_experts: usize,
    pub n_experts_per_token: usize,
    /// An expert's width: rows of `gate_up` are twice as many.
    pub intermediate: usize,
    pub n_vocab: usize,
    pub sliding_window: usize,
    /// One entry a layer.
    pub layers: Vec<LayerKind>,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub yarn: Option<Yarn>,
    pub swiglu_limit: f32,
    pub max_context: usize,
    /// The lm head is the embedding.
    pub tie_word_embeddings: bool,
}

/// What is wrong with a configuration: file, key, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("`{path}` is not a JSON object: {reason}")]
    NotJson { path: PathBuf, reason: String },
    #[error("`{path}` has no `{key}`, expected {expected}")]
    Missing {
        path: PathBuf,
        key: String,
        expected: String,
    },
    #[error("`{key}` in `{path}` is {found}, expected {expected}")]
    Bad {
        path: PathBuf,
        key: String,
        found: String,
        expected: String,
    },
    #[error("engine shape: `{key}` is {found}, expected {expected}")]
    Shape {
        key: &'static str,
        found: usize,
        expected: String,
    },
    #[error("`{variable}` is `{found}`, expected {expected}")]
    Environment {
        variable: &'static str,
        found: String,
        expected: String,
    },
}

impl ModelConfig {
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Layers of one kind.
    pub fn n_layers_of(&self, kind: LayerKind) -> usize {
        self.layers.iter().filter(|&&k| k == kind).count()
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Width of the attention's output before its projection.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Rows of q, k and v together.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Reads a `config.json`; `path` is for messages only.
    ///
    /// # Errors
    /// A key that is missing, of the wrong type, or out of the range the engine can hold.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_slice(text).map_err(|e| ConfigError::NotJson {
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        let Value::Object(map) = &value else {
            return Err(ConfigError::NotJson {
                path: path.to_owned(),
                reason: "it holds another kind of value".into(),
            });
        };
        let keys = Keys { path, map, at: "" };
        let n_layers = keys.count("num_hidden_layers", MAX_LAYERS)?;
        let hidden = keys.count("hidden_size", MAX_WIDTH)?;
        let n_heads = keys.count("num_attention_heads", MAX_WIDTH)?;
        let n_kv_heads = keys.count("num_key_value_heads", MAX_WIDTH)?;
        let head_dim = keys.count("head_dim", MAX_HEAD_DIM as u64)?;
        let n_experts = keys.count_of(&["num_local_experts", "num_experts"], MAX_EXPERTS)?;
        let n_experts_per_token =
            keys.count_of(&["num_experts_per_tok", "experts_per_token"], MAX_EXPERTS)?;
        let intermediate = keys.count("intermediate_size", MAX_WIDTH)?;
        let sliding_window = keys.count("sliding_window", MAX_CONTEXT)?;
        let (rope_theta, yarn) = read_rope(&keys)?;
        let max_context = match keys.optional_count("max_position_embeddings", MAX_CONTEXT)? {
            Some(n) => n,
            None => {
                let base = keys.count("initial_context_length", MAX_CONTEXT)?;
                let stretched = base as f64 * yarn.map_or(1.0, |y| y.factor);
                if stretched > MAX_CONTEXT as f64 {
                    return Err(keys.bad("rope_scaling_factor", "a context of at most 2^24"));
                }
                stretched as usize
            }
        };
        let config = Self {
            hidden,
            n_heads,
            n_kv_heads,
            head_dim,
            n_experts,
            n_experts_per_token,
            intermediate,
            n_vocab: keys.count("vocab_size", MAX_VOCAB)?,
            sliding_window,
            layers: read_layers(&keys, n_layers)?,
            rms_norm_eps: keys.number_or("rms_norm_eps", 1e-5)? as f32,
            rope_theta,
            yarn,
            swiglu_limit: keys.number_or("swiglu_limit", 7.0)? as f32,
            max_context,
            tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
        };
        config.check(&keys)?;
        check_quantization(&keys)?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<(), ConfigError> {
        // MXFP4 blocks and the kernels' lanes are 32 wide along every reduction.
        let blocks = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_attention_heads", self.q_width()),
        ];
        for (key, width) in blocks {
            if width % 32 != 0 {
                let what = match key {
                    "num_attention_heads" => "num_attention_heads x head_dim a multiple of 32",
                    _ => "a multiple of 32",
                };
                return Err(keys.bad(key, what));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(keys.bad("head_dim", "an even number"));
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) || self.group() > MAX_GROUP {
            let expected = "a divisor of num_attention_heads, with at most 64 heads each";
            return Err(keys.bad("num_key_value_heads", expected));
        }
        if self.n_experts_per_token > self.n_experts || self.n_experts_per_token > 32 {
            let key = ["num_experts_per_tok", "experts_per_token"]
                .into_iter()
                .find(|key| keys.map.contains_key(*key))
                .unwrap_or("experts_per_token");
            return Err(keys.bad(key, "at most the number of experts, and at most 32"));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(keys.bad("rms_norm_eps", "a number between 0 and 1"));
        }
        if !(self.swiglu_limit > 0.0 && self.swiglu_limit.is_finite()) {
            return Err(keys.bad("swiglu_limit", "a positive number"));
        }
        Ok(())
    }

    /// Rotary frequencies of the `head_dim / 2` pairs, in radians a position, and the factor of
    /// cos and sin.
    pub fn rope_frequencies(&self) -> (Vec<f32>, f32) {
        let n_pairs = self.head_dim / 2;
        let plain = |pair: usize| {
            1.0 / self
                .rope_theta
                .powf(2.0 * pair as f64 / self.head_dim as f64)
        };
        let Some(yarn) = self.yarn else {
            return ((0..n_pairs).map(|pair| plain(pair) as f32).collect(), 1.0);
        };
        let (low, high) = yarn.ramp(self.head_dim, self.rope_theta);
        let mixed = |pair: usize| {
            let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let plain = plain(pair);
            (plain / yarn.factor * ramp + plain * (1.0 - ramp)) as f32
        };
        ((0..n_pairs).map(mixed).collect(), yarn.concentration as f32)
    }
}

impl Yarn {
    /// The pairs between which plain frequencies turn into interpolated ones.
    fn ramp(&self, head_dim: usize, theta: f64) -> (f64, f64) {
        let pair_of = |turns: f64| {
            let context = self.original_context as f64;
            head_dim as f64 * (context / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        low = low.max(0.0);
        high = high.min(head_dim as f64 - 1.0);
        if low == high {
            // As transformers: keeps the ramp's slope finite.
            high += 0.001;
        }
        (low, high)
    }
}

/// A checkpoint quantized in another way would have other tensors.
fn check_quantization(keys: &Keys) -> Result<(), ConfigError> {
    let Some(Value::Object(map)) = keys.get("quantization_config") else {
        return Ok(());
    };
    let inner = Keys {
        path: keys.path,
        map,
        at: "quantization_config",
    };
    match inner.get("quant_method").and_then(Value::as_str) {
        Some("mxfp4") => Ok(()),
        _ => Err(inner.bad("quant_method", "`mxfp4`")),
    }
}

fn read_layers(keys: &Keys, n_layers: usize) -> Result<Vec<LayerKind>, ConfigError> {
    let Some(value) = keys.get("layer_types") else {
        let kind = |i| match i % 2 {
            0 => LayerKind::Sliding,
            _ => LayerKind::Full,
        };
        return Ok((0..n_layers).map(kind).collect());
    };
    let kinds = value.as_array().and_then(|names| {
        let kind = |name: &Value| match name.as_str()? {
            "sliding_attention" => Some(LayerKind::Sliding),
            "full_attention" => Some(LayerKind::Full),
            _ => None,
        };
        names.iter().map(kind).collect::<Option<Vec<_>>>()
    });
    match kinds {
        Some(kinds) if kinds.len() == n_layers => Ok(kinds),
        Some(kinds) => Err(keys.bad_as(
            "layer_types",
            format!("{} entries", kinds.len()),
            format!("{n_layers}, one a layer"),
        )),
        None => Err(keys.bad(
            "layer_types",
            "a list of `sliding_attention` and `full_attention`",
        )),
    }
}

fn read_rope(keys: &Keys) -> Result<(f64, Option<Yarn>), ConfigError> {
    let nested = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .find_map(|key| match keys.get(key) {
            Some(Value::Object(map)) => Some(Keys {
                path: keys.path,
                map,
                at: key,
            }),
            _ => None,
        });
    let theta = match &nested {
        Some(inner) if inner.get("rope_theta").is_some() => inner.number("rope_theta")?,
        _ => keys.number("rope_theta")?,
    };
    if !(theta > 1.0 && theta.is_finite()) {
        return Err(keys.bad("rope_theta", "a number above 1"));
    }
    let yarn = match &nested {
        Some(inner) => read_nested_yarn(keys, inner)?,
        None => read_original_yarn(keys)?,
    };
    if let Some(yarn) = &yarn {
        let inner = nested.as_ref().unwrap_or(keys);
        let positive = [
            ("factor", yarn.factor),
            ("beta_fast", yarn.beta_fast),
            ("beta_slow", yarn.beta_slow),
            ("attention_factor", yarn.concentration),
        ];
        for (key, number) in positive {
            if !(number > 0.0 && number < 1e6) {
                return Err(inner.bad_as(key, number.to_string(), "a positive number".into()));
            }
        }
    }
    Ok((theta, yarn))
}

fn read_nested_yarn(keys: &Keys, inner: &Keys) -> Result<Option<Yarn>, ConfigError> {
    let kind = inner.get("rope_type").or_else(|| inner.get("type"));
    match kind.and_then(Value::as_str) {
        Some("default") => return Ok(None),
        Some("yarn") => {}
        _ => return Err(inner.bad("rope_type", "`yarn` or `default`")),
    }
    for key in ["mscale", "mscale_all_dim"] {
        if inner.get(key).is_some() {
            return Err(inner.bad(key, "absent: this engine does not know it"));
        }
    }
    let original = "original_max_position_embeddings";
    let original_context = match inner.optional_count(original, MAX_CONTEXT)? {
        Some(n) => n,
        None => keys.count_of(
            &["initial_context_length", "max_position_embeddings"],
            MAX_CONTEXT,
        )?,
    };
    let factor = inner.number("factor")?;
    Ok(Some(Yarn {
        factor,
        beta_fast: inner.number_or("beta_fast", 32.0)?,
        beta_slow: inner.number_or("beta_slow", 1.0)?,
        original_context,
        truncate: inner.bool_or("truncate", true)?,
        concentration: inner.number_or("attention_factor", concentration(factor))?,
    }))
}

fn read_original_yarn(keys: &Keys) -> Result<Option<Yarn>, ConfigError> {
    let factor = keys.number_or("rope_scaling_factor", 1.0)?;
    if factor <= 1.0 {
        return Ok(None);
    }
    Ok(Some(Yarn {
        factor,
        beta_fast: keys.number_or("rope_ntk_beta", 32.0)?,
        beta_slow: keys.number_or("rope_ntk_alpha", 1.0)?,
        original_context: keys.count("initial_context_length", MAX_CONTEXT)?,
        truncate: false,
        concentration: concentration(factor),
    }))
}

fn concentration(factor: f64) -> f64 {
    if factor > 1.0 {
        0.1 * factor.ln() + 1.0
    } else {
        1.0
    }
}

/// A JSON object with the file and place it came from, for messages.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// The key this object stands under; empty at the top.
    at: &'a str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn name(&self, key: &str) -> String {
        match self.at {
            "" => key.to_owned(),
            at => format!("{at}.{key}"),
        }
    }

    fn missing(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Missing {
            path: self.path.to_owned(),
            key: self.name(key),
            expected: expected.to_owned(),
        }
    }

    fn bad(&self, key: &str, expected: &str) -> ConfigError {
        let mut found = match self.get(key) {
            None => return self.missing(key, expected),
            Some(value) => value.to_string(),
        };
        if found.len() > 80 {
            found = found.chars().take(80).chain("…".chars()).collect();
        }
        self.bad_as(key, found, expected.to_owned())
    }

    fn bad_as(&self, key: &str, found: String, expected: String) -> ConfigError {
        ConfigError::Bad {
            path: self.path.to_owned(),
            key: self.name(key),
            found,
            expected,
        }
    }

    fn optional_count(&self, key: &str, max: u64) -> Result<Option<usize>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=max).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.bad(key, &format!("a whole number from 1 to {max}"))),
            },
        }
    }

    fn count(&self, key: &str, max: u64) -> Result<usize, ConfigError> {
        self.count_of(&[key], max)
    }

    /// The first of several spellings that is there.
    fn count_of(&self, spellings: &[&str], max: u64) -> Result<usize, ConfigError> {
        for key in spellings {
            if let Some(n) = self.optional_count(key, max)? {
                return Ok(n);
            }
        }
        Err(self.missing(&spellings.join("` or `"), "a whole number"))
    }

    fn number(&self, key: &str) -> Result<f64, ConfigError> {
        self.get(key)
            .and_then(Value::as_f64)
            .ok_or_else(|| self.bad(key, "a number"))
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(_) => self.number(key),
        }
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.bad(key, "true or false")),
        }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
