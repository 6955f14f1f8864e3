//! The CPU backend: rayon over tiles and heads, SIMD behind run-time detection, weights in the
//! format they are stored in.
//!
//! One operation a file: each holds a fast function and a slow `reference`. [`forward`] puts them
//! in order, [`CpuBackend`] owns the memory and the bookkeeping of sequences. Everything is
//! allocated in [`CpuBackend::open`]; a step allocates nothing but what rayon does.

pub mod amx;
mod attended;
pub mod attention;
pub mod buffer;
pub mod calls;
pub mod embed;
#[cfg(target_arch = "x86_64")]
mod exp2;
pub mod forward;
pub mod gemm;
pub mod kv_append;
pub mod kv_cache;
pub mod lanes;
pub mod matmul;
pub mod model;
pub mod moe_combine;
pub mod moe_matmul;
pub mod numa;
mod pack;
pub mod pairs;
pub mod path;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;
pub mod topk_routing;
pub mod weights;
pub mod workspace;

mod decode;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use rayon::{ThreadPool, ThreadPoolBuilder};

use self::decode::Decoding;
use self::forward::{Batch, Until};
use self::gemm::Exec;
use self::kv_cache::{KvCache, KvGeometry};
use self::model::CpuModel;
use self::path::CpuPath;
use self::workspace::{NO_PAGE, Workspace};
use super::checkpoint::{Checkpoint, ClassBytes, Precision, WeightFormat};
use super::config::{ConfigError, ModelConfig};
use super::{
    Backend, BackendInfo, BackendMemory, EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId,
    SequenceId, SlotStart, Span, TokenEvent, TokenId,
};

/// Part of the numerics' name: raised whenever a change of the kernels changes a bit of what they
/// give, so that an older version's run is not gone on with unawares.
const KERNEL_REVISION: u32 = 5;

/// How the CPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    pub n_threads: usize,
    /// f32 activations and KV: no rounding to bf16 anywhere.
    pub exact: bool,
    /// Report a hash of each logits row.
    pub trace_hash: bool,
    /// Fill memory that holds nothing with NaN, so that reading it shows.
    pub poison: bool,
}

/// The KV arena in its element type.
enum Kv {
    Bf16(KvCache<u16>),
    Exact(KvCache<f32>),
}

/// Runs `$body` with `$kv` bound to the cache, whichever its type.
macro_rules! with_kv {
    ($kvs:expr, $kv:ident => $body:expr) => {
        match $kvs {
            Kv::Bf16($kv) => $body,
            Kv::Exact($kv) => $body,
        }
    };
}

/// What the backend knows of a slot or fork point.
#[derive(Default)]
struct Sequence {
    /// Positions in the cache.
    length: usize,
    decoding: Option<Decoding>,
}

/// A model on the CPU.
pub struct CpuBackend {
    info: BackendInfo,
    memory: BackendMemory,
    options: CpuOptions,
    pool: ThreadPool,
    exec: Exec,
    model: Arc<CpuModel>,
    kv: Kv,
    work: Workspace,
    sequences: Vec<Sequence>,
    /// Mappings of each page.
    page_users: Vec<u32>,
    batch: Batch,
    steps: decode::Steps,
}

impl CpuBackend {
    /// Loads a checkpoint and allocates everything a run needs.
    ///
    /// # Errors
    /// Weights that cannot be held, an impossible shape, out of memory, no worker threads, or a
    /// `PODIUM_CPU` that this machine cannot follow.
    pub fn open(
        checkpoint: &Checkpoint,
        precision: Precision,
        shape: EngineShape,
        options: CpuOptions,
    ) -> Result<Self, EngineError> {
        Self::open_on(CpuPath::choose()?, checkpoint, precision, shape, options)
    }

    /// As [`CpuBackend::open`], on a given SIMD path.
    ///
    /// # Errors
    /// As [`CpuBackend::open`].
    pub fn open_on(
        path: CpuPath,
        checkpoint: &Checkpoint,
        precision: Precision,
        shape: EngineShape,
        options: CpuOptions,
    ) -> Result<Self, EngineError> {
        check_shape(&shape, options.n_threads)?;
        let model = Self::load(checkpoint, precision, options.n_threads)?;
        Self::with_model(path, Arc::new(model), shape, options)
    }

    /// Loads a checkpoint's weights, for one backend or several in turn.
    ///
    /// # Errors
    /// As [`CpuModel::load`], and when no worker threads start.
    pub fn load(
        checkpoint: &Checkpoint,
        precision: Precision,
        n_threads: usize,
    ) -> Result<CpuModel, EngineError> {
        thread_pool(n_threads)?.install(|| CpuModel::load(checkpoint, precision))
    }

    /// A backend over weights that are loaded already; allocates the rest.
    ///
    /// # Errors
    /// As [`CpuBackend::open`], less what concerns weights.
    pub fn with_model(
        path: CpuPath,
        model: Arc<CpuModel>,
        shape: EngineShape,
        options: CpuOptions,
    ) -> Result<Self, EngineError> {
        check_shape(&shape, options.n_threads)?;
        let pool = thread_pool(options.n_threads)?;
        let config = &model.config;
        let n_inputs = Workspace::most_inputs(config, &shape);
        let exec = Exec::new(
            path,
            options.exact,
            options.n_threads,
            config.head_dim,
            n_inputs,
        )?;
        let mut work = Workspace::new(config, &shape)?;
        let geometry = KvGeometry::new(config, &shape);
        let mut kv = match options.exact {
            true => Kv::Exact(KvCache::new(geometry)?),
            false => Kv::Bf16(KvCache::new(geometry)?),
        };
        if options.poison {
            with_kv!(&mut kv, kv => kv.poison_all());
            work.poison();
        }
        let memory = BackendMemory {
            weights_bytes: model.loaded_bytes().total(),
            kv_bytes: with_kv!(&kv, kv => kv.n_bytes()),
            workspace_bytes: work.n_bytes() + exec.n_bytes(),
        };
        Ok(Self {
            info: BackendInfo {
                numerics_id: Self::numerics_id(path, options.exact),
                shape,
                n_vocab: config.n_vocab,
            },
            memory,
            options,
            exec,
            kv,
            sequences: (0..shape.n_slots + shape.n_forks)
                .map(|_| Sequence::default())
                .collect(),
            page_users: vec![0; shape.n_pages],
            batch: Batch::with_capacity(workspace::max_rows(&shape)),
            steps: decode::Steps::new(shape.n_slots, pool.current_num_threads()),
            work,
            model,
            pool,
        })
    }

    /// What a run's bits depend on beside the model: `cpu/avx512/bf16/r1`, …
    pub fn numerics_id(path: CpuPath, exact: bool) -> String {
        let mode = if exact { "exact" } else { "bf16" };
        format!("cpu/{}/{mode}/r{KERNEL_REVISION}", path.name())
    }

    /// The bytes that [`CpuBackend::open`] will allocate, by class; pure.
    pub fn planned_memory(
        config: &ModelConfig,
        format: WeightFormat,
        shape: &EngineShape,
        options: &CpuOptions,
    ) -> BackendMemory {
        let element = if options.exact { 4 } else { 2 };
        let kv_len = KvGeometry::new(config, shape).total_len() as u64;
        BackendMemory {
            weights_bytes: CpuModel::planned_bytes(config, format).total(),
            kv_bytes: kv_len.saturating_mul(element),
            workspace_bytes: Workspace::planned_bytes(config, shape, options.n_threads),
        }
    }

    /// Bytes of one page and of one sequence's rings: what the caller sizes an arena by; pure.
    pub fn kv_unit_bytes(config: &ModelConfig, exact: bool) -> (u64, u64) {
        let element = if exact { 4 } else { 2 };
        let shape = EngineShape {
            n_slots: 1,
            n_forks: 0,
            n_pages: 1,
            max_context: PAGE_POSITIONS,
            prefill_rows: 1,
        };
        let geometry = KvGeometry::new(config, &shape);
        (
            (geometry.page_len() * element) as u64,
            (geometry.ring_len() * element) as u64,
        )
    }

    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Bytes of each weight class as loaded, counted at allocation.
    pub fn loaded_bytes(&self) -> ClassBytes {
        self.model.loaded_bytes()
    }

    /// Matrix products so far by kernel name, such as `moe_matmul_mxfp4`.
    pub fn kernel_calls(&self) -> std::collections::BTreeMap<String, u64> {
        self.exec.calls.by_name()
    }

    /// From now on the routing of each pass is kept, or no longer.
    pub fn keep_routing(&mut self, keep: bool) {
        self.work.routed = keep.then(Vec::new);
    }

    /// Experts of each row of the latest pass, `[n_rows, k]` of each layer that routed; nothing where
    /// they are not kept.
    pub fn routed(&self) -> &[Vec<u32>] {
        self.work.routed.as_deref().unwrap_or_default()
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), EngineError> {
        let n_vocab = self.info.n_vocab;
        match tokens.iter().find(|&&token| token as usize >= n_vocab) {
            Some(&token) => Err(EngineError::Token { token, n_vocab }),
            None => Ok(()),
        }
    }

    /// Adds consecutive tokens to the pass being built and to their sequence's length.
    fn push(&mut self, sequence: usize, tokens: &[TokenId]) {
        let first = self.sequences[sequence].length;
        let end = first + tokens.len();
        assert!(
            end <= self.info.shape.max_context,
            "position {end} of sequence {sequence} is past the context"
        );
        if self
            .model
            .config
            .layers
            .contains(&super::config::LayerKind::Full)
        {
            let max_pages = self.work.max_pages;
            let table = &self.work.page_table[sequence * max_pages..][..max_pages];
            let pages = &table[first / PAGE_POSITIONS..end.div_ceil(PAGE_POSITIONS)];
            assert!(
                !pages.contains(&NO_PAGE),
                "a page of positions {first}..{end} of sequence {sequence} is not mapped"
            );
        }
        self.batch.push(sequence, first, tokens);
        self.sequences[sequence].length = end;
    }

    /// Runs the pass that was built.
    fn pass(&mut self, until: Until) {
        let Self {
            pool,
            exec,
            model,
            kv,
            work,
            batch,
            options,
            ..
        } = self;
        let most = forward::rows_a_task(&model.config, batch.n_rows(), options.n_threads);
        batch.divide(&work.page_table, work.max_pages, most);
        pool.install(|| {
            with_kv!(kv, kv => forward::forward(exec, model, kv, work, batch, until));
        });
    }

    fn check_span(&self, span: &Span) -> Result<(), EngineError> {
        let length = self.sequences[span.sequence.0 as usize].length;
        let sequence = span.sequence.0;
        assert_eq!(
            span.start, length,
            "a span goes on where sequence {sequence} ends"
        );
        self.check_tokens(&span.tokens)
    }
}

/// The pool that does a backend's work.
///
/// # Errors
/// The system starts no threads.
pub fn thread_pool(n_threads: usize) -> Result<ThreadPool, EngineError> {
    ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|i| format!("podium-{i}"))
        .build()
        .map_err(|error| EngineError::Threads {
            n_threads,
            reason: error.to_string(),
        })
}

fn check_shape(shape: &EngineShape, n_threads: usize) -> Result<(), EngineError> {
    // More than this is a mistake, and sums of such counts stay far from overflow.
    const MOST: usize = 1 << 24;
    let counts = [
        ("n_slots", shape.n_slots, 1),
        ("n_forks", shape.n_forks, 0),
        ("n_pages", shape.n_pages, 0),
        ("max_context", shape.max_context, 1),
        ("prefill_rows", shape.prefill_rows, 1),
        ("n_threads", n_threads, 1),
    ];
    for (key, found, least) in counts {
        if !(least..=MOST).contains(&found) {
            return Err(ConfigError::Shape {
                key,
                found,
                expected: format!("{least} to {MOST}"),
            }
            .into());
        }
    }
    Ok(())
}

impl Backend for CpuBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        let sequence = sequence.0 as usize;
        assert!(
            index < self.work.max_pages,
            "page {index} is past the context"
        );
        let entry = sequence * self.work.max_pages + index;
        let before = std::mem::replace(&mut self.work.page_table[entry], page.0);
        if before == page.0 {
            return;
        }
        if before != NO_PAGE {
            self.page_users[before as usize] -= 1;
        }
        let users = &mut self.page_users[page.0 as usize];
        *users += 1;
        // A page that others map holds a shared prefix.
        if self.options.poison && *users == 1 {
            with_kv!(&mut self.kv, kv => kv.poison_page(page.0 as usize));
        }
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        let (from, to) = (fork.from.0 as usize, fork.to.0 as usize);
        assert_eq!(
            self.sequences[from].length, fork.n_positions,
            "a fork takes over all positions"
        );
        self.sequences[to] = Sequence {
            length: fork.n_positions,
            decoding: None,
        };
        with_kv!(&mut self.kv, kv => {
            kv.copy_ring(from, to);
            if let Some((tail, copy)) = fork.tail {
                kv.copy_page(tail.0 as usize, copy.0 as usize);
            }
        });
        Ok(())
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.batch.clear();
        for span in spans {
            self.check_tokens(&span.tokens)?;
        }
        let max_rows = self.info.shape.prefill_rows;
        for span in spans {
            let sequence = span.sequence.0 as usize;
            self.check_span(span)?;
            // A sequence may be in a pass once.
            if self
                .batch
                .segments
                .iter()
                .any(|segment| segment.sequence == sequence)
            {
                self.pass(Until::Cached);
                self.batch.clear();
            }
            let mut rest = &span.tokens[..];
            while !rest.is_empty() {
                let room = max_rows - self.batch.n_rows();
                let (now, later) = rest.split_at(room.min(rest.len()));
                self.push(sequence, now);
                rest = later;
                if self.batch.n_rows() == max_rows {
                    self.pass(Until::Cached);
                    self.batch.clear();
                }
            }
        }
        if self.batch.n_rows() > 0 {
            self.pass(Until::Cached);
        }
        Ok(())
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.check_tokens(&[start.token])?;
        let slot = start.slot.0 as usize;
        assert!(slot < self.info.shape.n_slots, "sequence {slot} is no slot");
        let sequence = &mut self.sequences[slot];
        assert_eq!(
            sequence.length, start.position,
            "a slot starts where its prompt ends"
        );
        sequence.decoding = Some(Decoding::new(start));
        Ok(())
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        for _ in 0..n_steps {
            if !self.step()? {
                break;
            }
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        events.append(&mut self.steps.events);
        Ok(true)
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        let max_pages = self.work.max_pages;
        for sequence in sequences {
            let sequence = sequence.0 as usize;
            self.sequences[sequence] = Sequence::default();
            for entry in &mut self.work.page_table[sequence * max_pages..][..max_pages] {
                if *entry != NO_PAGE {
                    self.page_users[*entry as usize] -= 1;
                    *entry = NO_PAGE;
                }
            }
            if self.options.poison {
                with_kv!(&mut self.kv, kv => kv.poison_ring(sequence));
            }
        }
        if self.options.poison {
            self.work.poison();
        }
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.check_span(span)?;
        let EngineShape {
            n_slots,
            prefill_rows,
            ..
        } = self.info.shape;
        let sequence = span.sequence.0 as usize;
        let mut position = span.start;
        for tokens in span.tokens.chunks(prefill_rows) {
            self.batch.clear();
            self.push(sequence, tokens);
            self.pass(Until::Residual);
            // The logits workspace has a row a slot.
            for first in (0..tokens.len()).step_by(n_slots) {
                let rows = first..(first + n_slots).min(tokens.len());
                let (exec, model, work) = (&self.exec, &self.model, &mut self.work);
                let n_rows = rows.len();
                self.pool
                    .install(|| forward::lm_head(exec, model, work, rows));
                let logits = self.work.logits.chunks_exact(self.info.n_vocab);
                for logits in logits.take(n_rows) {
                    if !logits.iter().all(|logit| logit.is_finite()) {
                        let slot = span.sequence.0;
                        return Err(EngineError::NotFinite { slot, position });
                    }
                    visit(position, logits);
                    position += 1;
                }
            }
        }
        Ok(())
    }

    fn memory(&self) -> BackendMemory {
        self.memory
    }
}
