//! Which checkpoint a `--model` word means, and that checkpoint opened.
//!
//! The word is, in order: an existing folder, the built-in name `nano`, `synthetic:SHAPE[:SEED]`, a
//! hub id whose files the local hub cache holds. podium never fetches anything.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::JobError;
use super::nano::{self, NANO};
use super::synthetic::{self, Synthetic};
use crate::engine::TokenId;
use crate::engine::checkpoint::{Checkpoint, MatrixFormat, Precision};
use crate::submission::identity::sha256_hex;
use crate::tokenizer::Tokenizer;

/// A checkpoint's place.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// The model embedded in this binary.
    Nano,
    /// A folder in the Hugging Face layout or OpenAI's original layout.
    Folder { name: String, path: PathBuf },
    /// Random weights.
    Synthetic(Synthetic),
}

impl ModelSource {
    /// The name for tables and manifests: no machine path.
    pub fn name(&self) -> &str {
        match self {
            ModelSource::Nano => NANO,
            ModelSource::Folder { name, .. } => name,
            ModelSource::Synthetic(synthetic) => &synthetic.name,
        }
    }

    /// The checkpoint, its files open and checked.
    ///
    /// # Errors
    /// Files that are no GPT-OSS checkpoint, or no room for random weights.
    pub fn checkpoint(&self) -> Result<Checkpoint, JobError> {
        Ok(match self {
            ModelSource::Nano => Checkpoint::from_bytes(nano::CONFIG, nano::TENSORS)?,
            ModelSource::Folder { path, .. } => Checkpoint::open(path)?,
            ModelSource::Synthetic(synthetic) => synthetic.checkpoint()?,
        })
    }
}

/// Why no checkpoint was found.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("no model `{word}`: it is no folder, not `{NANO}`, and not in the hub cache")]
    Unknown { word: String },
    #[error("the model folder `{path}` has no `config.json`")]
    NoConfig { path: PathBuf },
    #[error("the model folder `{path}` has no `tokenizer.json`")]
    NoTokenizer { path: PathBuf },
    #[error("cannot read `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl ModelError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Unknown { .. } => format!(
                "give a checkpoint's folder, `{NANO}`, or fetch the model into the hub cache first"
            ),
            Self::NoConfig { .. } => {
                "give the folder that holds config.json and the safetensors files".to_owned()
            }
            Self::NoTokenizer { .. } => {
                "put the checkpoint's tokenizer.json beside its config.json".to_owned()
            }
            Self::Read { .. } => "check the path and its permissions".to_owned(),
        }
    }
}

/// Finds the checkpoint that `word` names.
///
/// # Errors
/// Nothing by that name, a folder that is no checkpoint, or no such shape.
pub fn resolve(word: &str) -> Result<ModelSource, JobError> {
    let path = Path::new(word);
    if path.is_dir() {
        return Ok(folder(word.trim_end_matches('/'), path.to_owned())?);
    }
    if word == NANO {
        return Ok(ModelSource::Nano);
    }
    if word.starts_with(synthetic::PREFIX) {
        return Ok(ModelSource::Synthetic(Synthetic::named(word)?));
    }
    let unknown = || ModelError::Unknown {
        word: word.to_owned(),
    };
    let snapshot = hub_snapshot(word).ok_or_else(unknown)?;
    Ok(folder(word, snapshot)?)
}

fn folder(name: &str, path: PathBuf) -> Result<ModelSource, ModelError> {
    if !path.join("config.json").is_file() {
        return Err(ModelError::NoConfig { path });
    }
    let name = match Path::new(name).file_name() {
        // A hub id keeps its owner; a path keeps only its last part.
        Some(last) if path.ends_with(name) => last.to_string_lossy().into_owned(),
        _ => name.to_owned(),
    };
    Ok(ModelSource::Folder { name, path })
}

/// The newest snapshot of `owner/name` in the hub cache (`HF_HUB_CACHE`, `HF_HOME/hub` or
/// `~/.cache/huggingface/hub`).
fn hub_snapshot(id: &str) -> Option<PathBuf> {
    let (owner, name) = id.split_once('/')?;
    if [owner, name]
        .iter()
        .any(|part| part.is_empty() || part.contains('/') || *part == "..")
    {
        return None;
    }
    let var = |key: &str| std::env::var_os(key).map(PathBuf::from);
    let cache = var("HF_HUB_CACHE")
        .or_else(|| var("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| var("HOME").map(|home| home.join(".cache/huggingface/hub")))?;
    let model = cache.join(format!("models--{owner}--{name}"));
    let snapshots = model.join("snapshots");
    if let Ok(revision) = std::fs::read_to_string(model.join("refs/main")) {
        let path = snapshots.join(revision.trim());
        if path.is_dir() {
            return Some(path);
        }
    }
    std::fs::read_dir(snapshots)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok())
}

/// A checkpoint whose files are open and checked, its weights not loaded.
pub struct OpenModel {
    pub name: String,
    pub is_nano: bool,
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    /// Ids that end a reply.
    pub stop_tokens: Arc<[TokenId]>,
    /// Hash of the configuration and the weights.
    pub hash: String,
    pub tokenizer_hash: String,
}

impl OpenModel {
    /// Opens the checkpoint that `word` names.
    ///
    /// # Errors
    /// Nothing by that name, or files that are no GPT-OSS checkpoint with its tokenizer.
    pub fn open(word: &str) -> Result<Self, JobError> {
        let source = resolve(word)?;
        let name = source.name().to_owned();
        let checkpoint = source.checkpoint()?;
        match source {
            ModelSource::Nano => {
                let tokenizer = Tokenizer::from_bytes(nano::TOKENIZER)?;
                let stop_tokens = stop_tokens(nano::GENERATION_CONFIG, &tokenizer);
                let mut hasher = Sha256::new();
                hasher.update(nano::CONFIG);
                hasher.update(nano::TENSORS);
                Ok(Self {
                    name,
                    is_nano: true,
                    checkpoint,
                    stop_tokens,
                    hash: hex(hasher),
                    tokenizer_hash: sha256_hex(nano::TOKENIZER),
                    tokenizer,
                })
            }
            ModelSource::Folder { path, .. } => {
                let tokenizer_path = path.join("tokenizer.json");
                if !tokenizer_path.is_file() {
                    return Err(ModelError::NoTokenizer { path }.into());
                }
                let bytes = read(&tokenizer_path)?;
                let tokenizer = Tokenizer::from_bytes(&bytes)?;
                let generation = std::fs::read(path.join("generation_config.json"));
                let stop_tokens = stop_tokens(&generation.unwrap_or_default(), &tokenizer);
                Ok(Self {
                    name,
                    is_nano: false,
                    checkpoint,
                    stop_tokens,
                    hash: hash_folder(&path)?,
                    tokenizer_hash: sha256_hex(&bytes),
                    tokenizer,
                })
            }
            ModelSource::Synthetic(synthetic) => {
                let (tokenizer_json, generation) = synthetic.companions()?;
                let tokenizer = Tokenizer::from_bytes(&tokenizer_json)?;
                Ok(Self {
                    name,
                    is_nano: false,
                    stop_tokens: stop_tokens(&generation, &tokenizer),
                    hash: synthetic.hash(checkpoint.in_place().is_some()),
                    checkpoint,
                    tokenizer_hash: sha256_hex(&tokenizer_json),
                    tokenizer,
                })
            }
        }
    }

    /// The precision that a run of this checkpoint has: what `stored` comes to.
    pub fn effective_precision(&self, asked: Precision) -> Precision {
        match (asked, self.checkpoint.expert_format()) {
            (Precision::Stored, MatrixFormat::Mxfp4) => Precision::Bits4,
            (Precision::Stored, _) => Precision::Bits16,
            (asked, _) => asked,
        }
    }
}

/// The ids of `generation_config.json`, and those of the chat format that end a reply. `<|end|>`
/// closes a message and is never one of them.
fn stop_tokens(generation_config: &[u8], tokenizer: &Tokenizer) -> Arc<[TokenId]> {
    let config: serde_json::Value = serde_json::from_slice(generation_config).unwrap_or_default();
    let listed = match &config["eos_token_id"] {
        serde_json::Value::Array(ids) => ids.clone(),
        id => vec![id.clone()],
    };
    let special = tokenizer.special_ids();
    let mut ids: Vec<TokenId> = listed
        .iter()
        .filter_map(|id| TokenId::try_from(id.as_u64()?).ok())
        .chain(
            [special.return_, special.call, special.end_of_text]
                .into_iter()
                .flatten(),
        )
        .filter(|&id| Some(id) != special.end)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into()
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|source| ModelError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Files up to this size are hashed whole.
const WHOLE_BYTES: u64 = 64 << 20;
/// Larger ones by their length, their first and last chunk and this many between.
const N_CHUNKS: u64 = 256;
const CHUNK_BYTES: u64 = 64 << 10;

/// Hash over a checkpoint's configuration and weight files. Large files are sampled at even
/// places, so that a run of a 13 GB model need not read it twice.
fn hash_folder(folder: &Path) -> Result<String, ModelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelError::Read { path, source }
    };
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(failed(folder))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension().is_some_and(|e| e == "safetensors")
                || path.file_name().is_some_and(|name| name == "config.json")
        })
        .collect();
    names.sort();
    let mut hasher = Sha256::new();
    for path in names {
        hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        let mut file = File::open(&path).map_err(failed(&path))?;
        let length = file.metadata().map_err(failed(&path))?.len();
        hasher.update(length.to_le_bytes());
        if length <= WHOLE_BYTES {
            hasher.update(read(&path)?);
            continue;
        }
        let mut chunk = vec![0; CHUNK_BYTES as usize];
        for i in 0..=N_CHUNKS {
            let at = (length - CHUNK_BYTES) / N_CHUNKS * i;
            file.seek(SeekFrom::Start(at)).map_err(failed(&path))?;
            file.read_exact(&mut chunk).map_err(failed(&path))?;
            hasher.update(&chunk);
        }
    }
    Ok(hex(hasher))
}

fn hex(hasher: Sha256) -> String {
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_nothing_is_an_error_with_a_hint() {
        let error = resolve("no/such/model").expect_err("there is no such model");
        let is_unknown = matches!(error, JobError::Model(ModelError::Unknown { .. }));
        assert!(is_unknown);
        assert!(error.hint().contains("nano"));
        assert!(resolve("../..").is_err());
    }
}
