//! The engine: tokens in, tokens and log-probabilities out.
//!
//! This file holds the seam: the [`Backend`] trait and the plain types that cross it. Everything
//! above it (`batch`, [`generate`]) knows sequences, pages and spans, never a kernel; everything
//! below it (`cpu`, `cuda`, `scripted`) knows kernels, never a data set.
//!
//! A forward pass is a list of (sequence, position) rows. Prefill and decode are the same
//! operations with different row counts and give equal bits. Shape letters used below:
//! `n_rows` rows of a pass, `n_heads`, `n_kv_heads`, `head_dim`, `hidden`, `n_vocab`.
//!
//! A *sequence* is a slot or a fork point (a shared prefix): it has a page table for the
//! full-attention layers and one ring for the sliding-window layers. A *page* holds
//! [`PAGE_POSITIONS`] positions of all full-attention layers and is the unit of sharing.

pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod generate;
pub mod kv;
pub mod plan;
pub mod sample;
pub mod scripted;
pub mod shapes;

use std::path::PathBuf;
use std::sync::Arc;

/// A token's id in the checkpoint's own vocabulary.
pub type TokenId = u32;

/// Positions in a KV page: the attention split and the unit of sharing.
pub const PAGE_POSITIONS: usize = 256;

/// Keys in an attention tile; tiles lie at absolute multiples of it.
pub const TILE_KEYS: usize = 64;

/// Index of a sequence: slots come first (`0..n_slots`), then fork points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// Index of a page in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// What is allocated once for a run. Every field is a count; the backend turns it into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EngineShape {
    /// Rows that decode together.
    pub n_slots: usize,
    /// Sequences beside the slots that hold shared prefixes.
    pub n_forks: usize,
    /// Pages in the arena, shared by all sequences.
    pub n_pages: usize,
    /// Positions a sequence may reach.
    pub max_context: usize,
    /// Rows of one prefill pass (a longer span is cut into passes of at most this many rows).
    pub prefill_rows: usize,
}

/// Tokens to run through the model, at consecutive positions of one sequence.
#[derive(Clone, Debug)]
pub struct Span {
    pub sequence: SequenceId,
    /// Position of `tokens[0]`; must equal the sequence's present length.
    pub start: usize,
    pub tokens: Arc<[TokenId]>,
}

/// Copy of a shared prefix into another sequence: whole pages are shared through the page
/// table (see [`Backend::map_page`]), the tail and the ring are copied.
#[derive(Clone, Copy, Debug)]
pub struct Fork {
    pub from: SequenceId,
    pub to: SequenceId,
    /// Positions held by `from`, all of which `to` takes over.
    pub n_positions: usize,
    /// The partly filled last page of `from` and the private page of `to` that takes its copy;
    /// absent when `n_positions` is a multiple of [`PAGE_POSITIONS`].
    pub tail: Option<(PageId, PageId)>,
}

/// How tokens are drawn. Order: temperature, top-k, top-p, renormalize.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// The run's seed.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
        }
    }
}

/// What a slot needs to decode on its own. The last prompt token is always a decode row: prefill
/// covers the prompt less its last token.
#[derive(Clone, Debug)]
pub struct SlotStart {
    pub slot: SequenceId,
    /// The last prompt token and its position.
    pub token: TokenId,
    pub position: usize,
    pub sampling: SamplingParams,
    /// Hash of the row's key: with the seed, the sample and the position it keys the generator.
    pub row_hash: u64,
    pub sample: u32,
    /// Ids that end the row; the stop token itself is reported.
    pub stop_tokens: Arc<[TokenId]>,
    pub max_new_tokens: usize,
}

/// Why a slot stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// A stop id was produced.
    Stop,
    /// `max_new_tokens` or the context's end was reached.
    Length,
}

/// A token that has arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenEvent {
    pub slot: SequenceId,
    /// Position of the produced token.
    pub position: usize,
    pub token: TokenId,
    /// Log-probability under the untempered softmax of the whole vocabulary.
    pub logprob: f32,
    /// 64-bit hash of the logits row's bits, when the backend was opened with `trace_hash`.
    pub logits_hash: Option<u64>,
    pub stop: Option<StopReason>,
}

/// Bytes a backend holds, by class. What it allocated, counted at allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BackendMemory {
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub workspace_bytes: u64,
}

/// What the loop above must know of a backend.
#[derive(Clone, Debug)]
pub struct BackendInfo {
    /// `cpu/avx512/exact`, `scripted`, …: the numerics that a run's hash covers.
    pub numerics_id: String,
    pub shape: EngineShape,
    pub n_vocab: usize,
}

/// A model that runs: one implementation each for the CPU, the GPU and a table of answers.
///
/// The caller owns the bookkeeping (which page belongs to whom); the backend owns the bytes.
pub trait Backend: Send {
    fn info(&self) -> &BackendInfo;

    /// Makes `page` the `index`-th page of a sequence.
    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId);

    /// Gives `fork.to` the positions of `fork.from`; `to`'s pages are mapped before the call.
    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError>;

    /// Runs spans through the model and keeps their KV. Never runs the lm head.
    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError>;

    /// Makes a slot live from its last prompt token on.
    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError>;

    /// Enqueues `n_steps` steps of all live slots; a slot that stops does not go on.
    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError>;

    /// Moves the events that have arrived to the end of `events`, in step order. Returns whether
    /// all enqueued steps have been reported.
    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError>;

    /// Forgets sequences: they are no longer live and have length 0.
    fn clear(&mut self, sequences: &[SequenceId]);

    /// Teacher forcing: as `prefill`, and gives each position's logits `[n_vocab]` to `visit`
    /// as (position, logits), in order.
    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError>;

    fn memory(&self) -> BackendMemory;
}

/// What can go wrong below the seam.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    #[error(transparent)]
    Cuda(#[from] cuda::CudaError),
    #[error("logits of slot {slot} at position {position} are not finite")]
    NotFinite { slot: u32, position: usize },
    #[error("token {token} is not below the vocabulary's {n_vocab}")]
    Token { token: TokenId, n_vocab: usize },
    #[error("{what} needs {needed} bytes, the system refused them")]
    OutOfMemory { what: String, needed: u64 },
    #[error("cannot start {n_threads} worker threads: {reason}")]
    Threads { n_threads: usize, reason: String },
    #[error("cannot read `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl EngineError {
    /// Whether everything on the device is gone: a new process may have it again.
    pub fn is_lost_device(&self) -> bool {
        matches!(self, Self::Cuda(cuda::CudaError::Lost { .. }))
    }

    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Config(_) => "the model's config.json must describe a GPT-OSS model".to_owned(),
            Self::Checkpoint(error) => error.hint().to_owned(),
            Self::Cuda(error) => error.hint(),
            Self::NotFinite { .. } => "the checkpoint's weights may be damaged".to_owned(),
            Self::OutOfMemory { .. } => {
                "lower `--batch`, `--context` or `--host-memory`".to_owned()
            }
            Self::Threads { .. } => "lower `--threads`".to_owned(),
            Self::Read { .. } => "check the path and its permissions".to_owned(),
            Self::Token { .. } => {
                "the tokenizer and the checkpoint do not belong together".to_owned()
            }
        }
    }
}
