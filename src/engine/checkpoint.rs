//! Checkpoints: tensors by meaning, out of the Hugging Face layout (single or sharded
//! safetensors) or OpenAI's original layout.
//!
//! [`Checkpoint::open`] maps the files, reads their headers and checks that every tensor the
//! configuration asks for is there with its shape and dtype. Nothing is copied; a backend takes
//! the bytes as stored and packs them for itself ([`layers`]), in a format that [`mod@format`]
//! derives from the precision asked for. Files are not trusted: every range is checked against
//! the file's real length before it is used.

pub mod blocks;
pub mod format;
pub mod layers;
pub mod synthetic;
pub mod write;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::EngineError;
use super::config::ModelConfig;
use super::plan::bytes_text;

pub use format::{
    ByClass, ClassBytes, Deviation, MatrixFormat, Precision, VectorFormat, WeightFormat,
};
pub use layers::{ExpertTensors, Layer};

/// A config or an index larger than this is not one.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// What is wrong with a checkpoint: file, tensor, expected and found.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("`{path}` holds no `*.safetensors` file")]
    NoFiles { path: PathBuf },
    #[error("`{path}` is not a safetensors file: {reason}")]
    Header { path: PathBuf, reason: String },
    #[error("`{path}` is {found} bytes long, its header describes {expected}")]
    Length {
        path: PathBuf,
        expected: String,
        found: u64,
    },
    #[error("`{path}` is not a weight index: {reason}")]
    Index { path: PathBuf, reason: String },
    #[error("tensor `{tensor}` is missing from `{path}`")]
    Missing { path: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is in `{path}` and in `{other}`")]
    Twice {
        path: PathBuf,
        other: PathBuf,
        tensor: String,
    },
    #[error("tensor `{tensor}` in `{path}` has shape {found:?}, expected {expected:?}")]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("tensor `{tensor}` in `{path}` has dtype {found}, expected {expected}")]
    Type {
        path: PathBuf,
        tensor: String,
        expected: &'static str,
        found: String,
    },
    #[error(
        "tensor `{tensor}` in `{path}` has scale byte {byte} at block {block}, expected 2 to 252"
    )]
    Scale {
        path: PathBuf,
        tensor: String,
        block: usize,
        byte: u8,
    },
    #[error("tensor `{tensor}` in `{path}` has a value that is not finite at element {element}")]
    NotFinite {
        path: PathBuf,
        tensor: String,
        element: usize,
    },
    #[error("no checkpoint layout holds {} experts", .format.name())]
    NoLayout { format: MatrixFormat },
    #[error("{} of random weights: they are made while they are loaded", bytes_text(*.n_bytes))]
    InPlace { n_bytes: u64 },
    #[error("cannot write `{path}`: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{class} weights take {loaded} bytes, {planned} were planned")]
    Plan {
        class: &'static str,
        planned: u64,
        loaded: u64,
    },
}

impl CheckpointError {
    /// How to mend it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoFiles { .. } => "give the folder that holds the checkpoint's weights",
            Self::Header { .. } | Self::Length { .. } | Self::Index { .. } => {
                "the file is damaged or not whole: fetch it again"
            }
            Self::Missing { .. } | Self::Shape { .. } | Self::Twice { .. } => {
                "the weights do not fit the config.json beside them: fetch both again"
            }
            Self::Type { .. } => "give a GPT-OSS checkpoint with MXFP4 or bf16 experts",
            Self::Scale { .. } | Self::NotFinite { .. } => {
                "the weights are damaged: fetch the file again"
            }
            Self::NoLayout { .. } => {
                "choose 4bit or 16bit; the other precisions are made from those while loading"
            }
            Self::InPlace { .. } => "write them with `podium synth` and give the folder",
            Self::Write { .. } => "check the path, its permissions and the room on the disk",
            Self::Plan { .. } => "this is a mistake in podium; please report it",
        }
    }
}

/// Where a file's bytes live.
pub enum Bytes {
    Mapped {
        map: Mmap,
        file: File,
    },
    /// Embedded in the binary.
    Static(&'static [u8]),
    Owned(Vec<u8>),
    /// Zeros that take no memory.
    Unfilled(Mmap),
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Self {
        Self::Static(bytes)
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Owned(bytes)
    }
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Unfilled(map) => map,
        }
    }
}

struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

/// A tensor's place, its range checked against the file.
struct Located {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// A tensor as stored; `bytes` may have any alignment.
#[derive(Clone)]
pub struct Tensor<'a> {
    pub name: String,
    pub path: &'a Path,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
    /// The file that `bytes` are mapped from, and where in it they begin.
    pub file: Option<(&'a File, u64)>,
}

/// A checked checkpoint.
pub struct Checkpoint {
    config: ModelConfig,
    /// The folder or file it came from, for messages.
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Located>,
    layout: layers::Layout,
    expert_format: MatrixFormat,
    vector_format: VectorFormat,
    /// The seed of weights that are made where they live: the tensors are not filled.
    in_place: Option<u64>,
}

impl Checkpoint {
    /// Opens a folder with a `config.json` and safetensors files.
    ///
    /// # Errors
    /// A file that cannot be read, a configuration out of range, or a tensor that is missing or
    /// not as the configuration demands.
    pub fn open(folder: &Path) -> Result<Self, EngineError> {
        let config_path = folder.join("config.json");
        let config = ModelConfig::parse(&read_small(&config_path)?, &config_path)?;
        let mut shards = Vec::new();
        for path in shard_paths(folder)? {
            shards.push(Shard {
                bytes: map(&path)?,
                path,
            });
        }
        Ok(Self::new(config, folder.to_owned(), shards)?)
    }

    /// A checkpoint whose two files are in memory, such as the embedded model.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(config: &[u8], tensors: impl Into<Bytes>) -> Result<Self, EngineError> {
        let config = ModelConfig::parse(config, Path::new("config.json"))?;
        let path = PathBuf::from("model.safetensors");
        let shard = Shard {
            path: path.clone(),
            bytes: tensors.into(),
        };
        Ok(Self::new(config, path, vec![shard])?)
    }

    fn new(
        config: ModelConfig,
        path: PathBuf,
        shards: Vec<Shard>,
    ) -> Result<Self, CheckpointError> {
        let mut tensors: HashMap<String, Located> = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for (name, located) in read_header(i, shard)? {
                if let Some(other) = tensors.insert(name.clone(), located) {
                    return Err(CheckpointError::Twice {
                        path: shard.path.clone(),
                        other: shards[other.shard].path.clone(),
                        tensor: name,
                    });
                }
            }
        }
        let mut checkpoint = Self {
            layout: layers::Layout::of(&tensors),
            config,
            path,
            shards,
            tensors,
            expert_format: MatrixFormat::Mxfp4,
            vector_format: VectorFormat::Bf16,
            in_place: None,
        };
        (checkpoint.expert_format, checkpoint.vector_format) = checkpoint.check()?;
        Ok(checkpoint)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder or file it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The seed of random weights that a device makes for itself; the tensors hold nothing then.
    pub fn in_place(&self) -> Option<u64> {
        self.in_place
    }

    /// # Errors
    /// The tensors hold nothing.
    pub fn check_filled(&self) -> Result<(), CheckpointError> {
        match self.in_place {
            None => Ok(()),
            Some(_) => Err(CheckpointError::InPlace {
                n_bytes: self.stored_bytes()?.total(),
            }),
        }
    }

    /// How the experts are stored.
    pub fn expert_format(&self) -> MatrixFormat {
        self.expert_format
    }

    /// The tensor of this name with this shape.
    fn tensor(&self, name: String, shape: &[usize]) -> Result<Tensor<'_>, CheckpointError> {
        let Some(located) = self.tensors.get(&name) else {
            return Err(CheckpointError::Missing {
                path: self.path.clone(),
                tensor: name,
            });
        };
        let shard = &self.shards[located.shard];
        if located.shape != shape {
            return Err(CheckpointError::Shape {
                path: shard.path.clone(),
                tensor: name,
                expected: shape.to_vec(),
                found: located.shape.clone(),
            });
        }
        let file = match &shard.bytes {
            Bytes::Mapped { file, .. } => Some((file, located.range.start as u64)),
            _ => None,
        };
        Ok(Tensor {
            name,
            path: &shard.path,
            file,
            dtype: located.dtype,
            shape: located.shape.clone(),
            // The range was checked when the header was read.
            bytes: &shard.bytes.get()[located.range.clone()],
        })
    }

    /// Asks the system to read the tensors whose names begin with `prefix`, so that nobody waits for
    /// each page when it is touched.
    pub fn prefetch(&self, prefix: &str) {
        #[cfg(unix)]
        for (name, located) in &self.tensors {
            let Bytes::Mapped { map, .. } = &self.shards[located.shard].bytes else {
                continue;
            };
            if name.starts_with(prefix) {
                let (start, n) = (located.range.start, located.range.len());
                // Without it the pages are read when they are touched.
                let _ = map.advise_range(memmap2::Advice::WillNeed, start, n);
            }
        }
    }

    /// Lets the system drop the file's pages under a tensor that has been copied.
    pub fn release(&self, tensor: &Tensor) {
        #[cfg(unix)]
        for shard in &self.shards {
            let Bytes::Mapped { map, .. } = &shard.bytes else {
                continue;
            };
            let (start, base) = (tensor.bytes.as_ptr() as usize, map.as_ptr() as usize);
            if (base..base + map.len()).contains(&start) {
                // SAFETY: the mapping is shared, read-only and of a file: dropped pages are
                // read again from the file when touched.
                #[allow(unsafe_code, reason = "see above")]
                let advised = unsafe {
                    map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start - base,
                        tensor.bytes.len(),
                    )
                };
                // Without it the pages merely stay in the cache for longer.
                let _ = advised;
            }
        }
    }
}

impl Tensor<'_> {
    pub(crate) fn type_error(&self, expected: &'static str) -> CheckpointError {
        CheckpointError::Type {
            path: self.path.to_owned(),
            tensor: self.name.clone(),
            expected,
            found: format!("{:?}", self.dtype),
        }
    }

    /// Copies the bytes from `start` on to `out`. They are read from the file where there is one:
    /// pages of a mapping would count as this process's memory, and are slower to come.
    ///
    /// # Errors
    /// The file cannot be read, or is shorter than when it was opened.
    ///
    /// # Panics
    /// When they go past the tensor's end.
    pub fn read(&self, start: usize, out: &mut [u8]) -> Result<(), EngineError> {
        let bytes = &self.bytes[start..start + out.len()];
        #[cfg(unix)]
        if let Some((file, first)) = self.file {
            use std::os::unix::fs::FileExt;
            let read = file.read_exact_at(out, first + start as u64);
            return read.map_err(|source| EngineError::Read {
                path: self.path.to_owned(),
                source,
            });
        }
        out.copy_from_slice(bytes);
        Ok(())
    }

    /// bf16 bits of element `i`.
    #[inline(always)]
    pub fn bf16(&self, i: usize) -> u16 {
        u16::from_le_bytes([self.bytes[2 * i], self.bytes[2 * i + 1]])
    }
}

/// Reads a shard's header and checks every range against the file.
fn read_header(index: usize, shard: &Shard) -> Result<Vec<(String, Located)>, CheckpointError> {
    let bytes = shard.bytes.get();
    let header = |reason: String| CheckpointError::Header {
        path: shard.path.clone(),
        reason,
    };
    let length = |expected: String| CheckpointError::Length {
        path: shard.path.clone(),
        expected,
        found: bytes.len() as u64,
    };
    let Some(prefix) = bytes.first_chunk::<8>() else {
        return Err(length("at least 8".into()));
    };
    let n_header = u64::from_le_bytes(*prefix);
    let data_start = n_header.checked_add(8).filter(|&n| n <= bytes.len() as u64);
    let Some(data_start) = data_start else {
        return Err(length(format!("a header of {n_header} alone")));
    };
    let data_start = data_start as usize;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| match error {
        safetensors::SafeTensorError::MetadataIncompleteBuffer => {
            length("another length".to_owned())
        }
        error => header(error.to_string()),
    })?;
    let mut located = Vec::new();
    for (name, info) in metadata.tensors() {
        // The crate's own arithmetic may wrap on hostile offsets.
        let (start, end) = info.data_offsets;
        let range = data_start
            .checked_add(start)
            .zip(data_start.checked_add(end))
            .filter(|&(start, end)| start <= end && end <= bytes.len());
        let Some((start, end)) = range else {
            return Err(header(format!("tensor `{name}` lies outside the file")));
        };
        located.push((
            name,
            Located {
                shard: index,
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: start..end,
            },
        ));
    }
    Ok(located)
}

/// The files of a folder: those the index lists, else all.
fn shard_paths(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let index = folder.join("model.safetensors.index.json");
    if index.exists() {
        let bad = |reason: &str| CheckpointError::Index {
            path: index.clone(),
            reason: reason.to_owned(),
        };
        let value: serde_json::Value = serde_json::from_slice(&read_small(&index)?)
            .map_err(|error| bad(&error.to_string()))?;
        let map = value.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| bad("it has no `weight_map` object"))?;
        let mut names = std::collections::BTreeSet::new();
        for name in map.values() {
            let name = name.as_str().ok_or_else(|| bad("a file name is no text"))?;
            // A name must not lead out of the folder.
            if Path::new(name).file_name() != Some(std::ffi::OsStr::new(name)) {
                return Err(bad("a file name has a folder in it").into());
            }
            names.insert(name);
        }
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let read_error = |source| EngineError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(CheckpointError::NoFiles {
            path: folder.to_owned(),
        }
        .into());
    }
    Ok(paths)
}

fn read_small(path: &Path) -> Result<Vec<u8>, EngineError> {
    let read_error = |source| EngineError::Read {
        path: path.to_owned(),
        source,
    };
    let n_bytes = std::fs::metadata(path).map_err(read_error)?.len();
    if n_bytes > MAX_JSON_BYTES {
        return Err(read_error(std::io::Error::other(
            "it is larger than 64 MiB",
        )));
    }
    std::fs::read(path).map_err(read_error)
}

fn map(path: &Path) -> Result<Bytes, EngineError> {
    let read_error = |source| EngineError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read_error)?;
    if file.metadata().map_err(read_error)?.len() == 0 {
        return Ok(Bytes::Static(&[]));
    }
    // SAFETY: the file is read alone; podium, like every reader of mapped files, relies on
    // nobody truncating it meanwhile.
    #[allow(unsafe_code, reason = "see above")]
    let map = unsafe { Mmap::map(&file) }.map_err(read_error)?;
    Ok(Bytes::Mapped { map, file })
}

#[cfg(test)]
mod tests;
