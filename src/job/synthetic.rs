//! `--model synthetic:SHAPE[:layers=N][:SEED]`: random weights of a published shape, or of a
//! `config.json`'s, or of its first layers. The CPU has those that `podium synth` would write, and so
//! has a GPU where they are few; many are made on the GPU, and are others.

use std::path::Path;

use super::JobError;
use super::precision;
use crate::engine::EngineError;
use crate::engine::checkpoint::synthetic::{MIN_VOCAB, companions};
use crate::engine::checkpoint::{Checkpoint, MatrixFormat, VectorFormat, WeightFormat};
use crate::engine::config::ModelConfig;
use crate::engine::shapes;
use crate::submission::identity::sha256_hex;

/// What a synthetic model's word begins with.
pub const PREFIX: &str = "synthetic:";

/// Random weights by shape and seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Synthetic {
    /// The word, of a path its last part alone.
    pub name: String,
    pub config: ModelConfig,
    pub seed: u64,
}

impl Synthetic {
    /// Shape, layers and seed of a word such as `synthetic:gpt-oss-20b:layers=6:7`.
    ///
    /// # Errors
    /// A word that names no shape, more layers than it has, or a seed that is no number.
    pub fn named(word: &str) -> Result<Self, JobError> {
        let bad = || JobError::Option {
            message: format!(
                "no synthetic model `{word}`, expected {PREFIX}SHAPE[:layers=N][:SEED] with a \
                 config.json or {}",
                shapes::NAMES.join(", ")
            ),
        };
        let rest = word.strip_prefix(PREFIX).ok_or_else(bad)?;
        let (shape, options) = rest.split_once(':').unwrap_or((rest, ""));
        let mut config = find_shape(shape)?.ok_or_else(bad)?;
        let mut seed = 0;
        for option in options.split(':').filter(|option| !option.is_empty()) {
            match option.strip_prefix("layers=") {
                None => seed = option.parse().map_err(|_| bad())?,
                Some(n) => {
                    let n: usize = n.parse().map_err(|_| bad())?;
                    if !(1..=config.n_layers()).contains(&n) {
                        return Err(bad());
                    }
                    config.layers.truncate(n);
                }
            }
        }
        let last = Path::new(shape).file_name().unwrap_or_default();
        let with_options = rest.strip_prefix(shape).unwrap_or_default();
        Ok(Self {
            name: format!("{PREFIX}{}{with_options}", last.to_string_lossy()),
            config,
            seed,
        })
    }

    /// The checkpoint: in memory, or described for a device to make.
    ///
    /// # Errors
    /// No room for it, or a shape that a device cannot make in place.
    pub fn checkpoint(&self) -> Result<Checkpoint, JobError> {
        let checkpoint = Checkpoint::synthetic(&self.config, self.seed)?;
        if checkpoint.in_place().is_some() {
            self.check_in_place()?;
        }
        Ok(checkpoint)
    }

    /// Whether a device can make the weights in place: it makes whole tiles.
    ///
    /// # Errors
    /// A width that is none.
    pub fn check_in_place(&self) -> Result<(), JobError> {
        let config = &self.config;
        let widths = [
            ("hidden_size", config.hidden),
            ("intermediate_size", config.intermediate),
            ("num_attention_heads x head_dim", config.q_width()),
        ];
        match widths.into_iter().find(|(_, width)| width % 64 != 0) {
            None => Ok(()),
            Some((key, width)) => Err(JobError::Option {
                message: format!("a synthetic model's `{key}` is a multiple of 64, not {width}"),
            }),
        }
    }

    /// tokenizer.json and generation_config.json.
    ///
    /// # Errors
    /// A vocabulary that is too small.
    pub fn companions(&self) -> Result<(Vec<u8>, Vec<u8>), JobError> {
        check_vocabulary(&self.config)?;
        let file = |wanted: &str| {
            let files = companions(&self.config).into_iter();
            let mut found = files.filter(|(name, _)| *name == wanted);
            found
                .next()
                .map(|(_, value)| value.to_string().into_bytes())
        };
        let bytes = |name| file(name).unwrap_or_default();
        Ok((bytes("tokenizer.json"), bytes("generation_config.json")))
    }

    /// Stands for the weights: those made in place are others than those made in memory.
    pub fn hash(&self, in_place: bool) -> String {
        let files = companions(&self.config).into_iter();
        let shape: Vec<_> = files.filter(|(name, _)| *name == "config.json").collect();
        let parts = serde_json::json!(["synthetic", shape, self.seed, in_place]);
        sha256_hex(parts.to_string().as_bytes())
    }
}

/// Whether a vocabulary holds the tokenizer of synthetic models.
///
/// # Errors
/// It does not.
pub fn check_vocabulary(config: &ModelConfig) -> Result<(), JobError> {
    if config.n_vocab >= MIN_VOCAB {
        return Ok(());
    }
    Err(JobError::Option {
        message: format!(
            "a vocabulary of {} does not hold a token a byte and gpt-oss's special tokens; \
             expected at least {MIN_VOCAB}",
            config.n_vocab
        ),
    })
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
        let named = |word| Synthetic::named(word).ok();
        let found = named("synthetic:gpt-oss-20b:7").expect("a shape and a seed");
        assert_eq!((found.config.n_layers(), found.seed), (24, 7));
        assert_eq!(found.name, "synthetic:gpt-oss-20b:7");
        assert_eq!(named("synthetic:gpt-oss-120b").map(|m| m.seed), Some(0));
        let found = named("synthetic:gpt-oss-20b:layers=6:7").expect("six layers");
        assert_eq!((found.config.n_layers(), found.seed), (6, 7));
        assert_eq!(found.name, "synthetic:gpt-oss-20b:layers=6:7");
        for word in [
            "gpt-oss-20b",
            "synthetic:gpt-5",
            "synthetic:gpt-oss-20b:x",
            "synthetic:gpt-oss-20b:layers=0",
            "synthetic:gpt-oss-20b:layers=25",
        ] {
            assert!(named(word).is_none(), "{word}");
        }
    }

    #[test]
    fn the_hash_tells_shape_seed_and_place_apart() {
        let of = |word: &str, in_place| Synthetic::named(word).expect("a shape").hash(in_place);
        let hashes = [
            of("synthetic:gpt-oss-20b", true),
            of("synthetic:gpt-oss-20b", false),
            of("synthetic:gpt-oss-20b:1", true),
            of("synthetic:gpt-oss-120b", true),
        ];
        for (i, hash) in hashes.iter().enumerate() {
            assert!(!hashes[..i].contains(hash), "{i}");
        }
        assert_eq!(hashes[0], of("synthetic:gpt-oss-20b:0", true));
    }

    #[test]
    fn a_large_shape_is_described_and_takes_no_memory() {
        let large = Synthetic::named("synthetic:gpt-oss-20b:3").expect("a shape");
        let checkpoint = large.checkpoint().expect("addresses");
        assert_eq!(checkpoint.in_place(), Some(3));
        let stored = checkpoint.stored_bytes().expect("every tensor is there");
        assert_eq!(stored.total(), 13_761_264_768);
        let error = checkpoint.check_filled().expect_err("nothing is in it");
        assert!(error.to_string().contains("12.82 GiB"), "{error}");
    }
}
