//! Which checkpoint a `--model` word means, and that checkpoint opened.
//!
//! The word is, in order: an existing folder, the built-in name `nano`, `synthetic:SHAPE[:SEED]`, a
//! hub id: from the hub cache, or downloaded into it.

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
use crate::engine::config::ModelConfig;
use crate::hub::{Hub, HubError, ModelId, Part};
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
    #[error("no model `{word}`: it is no folder, not `{NANO}`, and no hub id")]
    Unknown { word: String },
    #[error(transparent)]
    Hub(#[from] HubError),
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
                "give a checkpoint's folder, `{NANO}`, or a hub id such as `openai/gpt-oss-20b`"
            ),
            Self::Hub(error) => error.hint(),
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

/// Finds the checkpoint that `word` names; of a hub id, this part of it, downloaded where the cache
/// does not hold it.
///
/// # Errors
/// Nothing by that name, a folder that is no checkpoint, no such shape, or no way to the hub.
pub fn resolve(word: &str, part: Part, quiet: bool) -> Result<ModelSource, JobError> {
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
    let id = ModelId::parse(word).ok_or_else(|| ModelError::Unknown {
        word: word.to_owned(),
    })?;
    let path = Hub::from_env().fetch(&id, part, quiet);
    Ok(ModelSource::Folder {
        name: word.to_owned(),
        path: path.map_err(ModelError::from)?,
    })
}

/// Whether `word` is a hub id whose weights would have to be downloaded.
pub fn needs_download(word: &str) -> bool {
    let is_other = Path::new(word).is_dir() || word == NANO || word.starts_with(synthetic::PREFIX);
    let id = ModelId::parse(word).filter(|_| !is_other);
    id.is_some_and(|id| Hub::from_env().find(&id, Part::Whole).is_none())
}

fn folder(name: &str, path: PathBuf) -> Result<ModelSource, ModelError> {
    if !path.join("config.json").is_file() {
        return Err(ModelError::NoConfig { path });
    }
    // Of a path only the last part, where it has one.
    let name = match Path::new(name).file_name() {
        Some(last) => last.to_string_lossy().into_owned(),
        None => name.to_owned(),
    };
    Ok(ModelSource::Folder { name, path })
}

/// What is known of a model without its weights.
pub struct Description {
    pub name: String,
    pub is_nano: bool,
    pub config: ModelConfig,
    /// How the configuration says that the experts are stored.
    pub experts: MatrixFormat,
    pub tokenizer: Tokenizer,
}

impl Description {
    /// Reads configuration and tokenizer of the model that `word` names.
    ///
    /// # Errors
    /// As [`OpenModel::open`]; weights need not be there.
    pub fn read(word: &str, quiet: bool) -> Result<Self, JobError> {
        let source = resolve(word, Part::Description, quiet)?;
        let (config, experts, tokenizer) = match &source {
            ModelSource::Nano => (
                ModelConfig::parse(nano::CONFIG, Path::new("config.json"))?,
                stored_experts(nano::CONFIG),
                Tokenizer::from_bytes(nano::TOKENIZER)?,
            ),
            ModelSource::Folder { path, .. } => {
                let config_path = path.join("config.json");
                let config = read(&config_path)?;
                (
                    ModelConfig::parse(&config, &config_path)?,
                    stored_experts(&config),
                    Tokenizer::from_bytes(&read_tokenizer(path)?)?,
                )
            }
            ModelSource::Synthetic(synthetic) => (
                synthetic.config.clone(),
                MatrixFormat::Mxfp4,
                Tokenizer::from_bytes(&synthetic.companions()?.0)?,
            ),
        };
        Ok(Self {
            name: source.name().to_owned(),
            is_nano: source == ModelSource::Nano,
            config,
            experts,
            tokenizer,
        })
    }
}

fn stored_experts(config: &[u8]) -> MatrixFormat {
    let config: serde_json::Value = serde_json::from_slice(config).unwrap_or_default();
    match config["quantization_config"].is_object() {
        true => MatrixFormat::Mxfp4,
        false => MatrixFormat::Bf16,
    }
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
    /// Opens the checkpoint that `word` names; `quiet` is about the progress of a download.
    ///
    /// # Errors
    /// Nothing by that name, or files that are no GPT-OSS checkpoint with its tokenizer.
    pub fn open(word: &str, quiet: bool) -> Result<Self, JobError> {
        let source = resolve(word, Part::Whole, quiet)?;
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
                let bytes = read_tokenizer(&path)?;
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

fn read_tokenizer(folder: &Path) -> Result<Vec<u8>, ModelError> {
    let path = folder.join("tokenizer.json");
    match path.is_file() {
        true => read(&path),
        false => Err(ModelError::NoTokenizer {
            path: folder.to_owned(),
        }),
    }
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
        let found = |word| resolve(word, Part::Whole, true);
        let error = found("no/such/model").expect_err("there is no such model");
        let is_unknown = matches!(error, JobError::Model(ModelError::Unknown { .. }));
        assert!(is_unknown);
        assert!(error.hint().contains("nano"));
        assert!(found("../..").is_err());
    }
}
