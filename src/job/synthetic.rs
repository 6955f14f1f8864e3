//! `--model synthetic:SHAPE[:SEED]`: random weights of a published shape, or of a
//! `config.json`'s, made on the device.

use std::path::Path;

use super::JobError;
use super::precision;
use crate::engine::EngineError;
use crate::engine::checkpoint::{MatrixFormat, VectorFormat, WeightFormat};
use crate::engine::config::ModelConfig;
use crate::engine::shapes;

/// What a synthetic model's word begins with.
pub const PREFIX: &str = "synthetic:";

/// Shape and seed of a word such as `synthetic:gpt-oss-20b:7`.
///
/// # Errors
/// A word that names no shape, or a seed that is no number.
pub fn parse(word: &str) -> Result<(ModelConfig, u64), JobError> {
    let bad = || JobError::Option {
        message: format!(
            "no synthetic model `{word}`, expected {PREFIX}SHAPE[:SEED] with a config.json or {}",
            shapes::NAMES.join(", ")
        ),
    };
    let rest = word.strip_prefix(PREFIX).ok_or_else(bad)?;
    let (shape, seed) = match rest.split_once(':') {
        Some((shape, seed)) => (shape, seed.parse().map_err(|_| bad())?),
        None => (rest, 0),
    };
    let config = find_shape(shape)?.ok_or_else(bad)?;
    let widths = [
        ("hidden_size", config.hidden),
        ("intermediate_size", config.intermediate),
        ("num_attention_heads x head_dim", config.q_width()),
    ];
    match widths.into_iter().find(|(_, width)| width % 64 != 0) {
        None => Ok((config, seed)),
        Some((key, width)) => Err(JobError::Option {
            message: format!("a synthetic model's `{key}` is a multiple of 64, not {width}"),
        }),
    }
}

/// A published shape by name, or that of a `config.json`; nothing where the word is neither.
///
/// # Errors
/// A file that cannot be read, or describes no GPT-OSS model.
pub fn find_shape(word: &str) -> Result<Option<ModelConfig>, JobError> {
    if let Some(config) = shapes::named(word) {
        return Ok(Some(config));
    }
    let path = Path::new(word);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(|source| JobError::Read {
        path: path.to_owned(),
        source,
    })?;
    let config = ModelConfig::parse(&text, path).map_err(EngineError::from)?;
    Ok(Some(config))
}

/// Formats as released, or those of a precision.
///
/// # Errors
/// No such precision.
pub fn format(word: Option<&str>) -> Result<WeightFormat, JobError> {
    Ok(precision(word)?.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_shape_and_seed() {
        let (config, seed) = parse("synthetic:gpt-oss-20b:7").expect("a shape and a seed");
        assert_eq!((config.n_layers(), seed), (24, 7));
        assert_eq!(parse("synthetic:gpt-oss-120b").map(|m| m.1).ok(), Some(0));
        for word in ["gpt-oss-20b", "synthetic:gpt-5", "synthetic:gpt-oss-20b:x"] {
            assert!(parse(word).is_err(), "{word}");
        }
    }
}
