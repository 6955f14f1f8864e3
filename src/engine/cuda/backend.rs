//! The CUDA backend: the workspace and the bookkeeping of sequences, on a GPU that is loaded.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::buffer::PinnedBuffer;
use super::counts::Recorded;
use super::decode::{Decoding, Event as StepEvent, NONE, Outstanding, Slot};
use super::device::Device;
use super::forward::{Pass, Rows, Until};
use super::graph::{Event, Graph};
use super::loaded::Loaded;
use super::memory::{self, KvGeometry};
use super::workspace::{Row, Workspace};
use crate::engine::config::{ConfigError, LayerKind};
use crate::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId,
    SequenceId, SlotStart, Span, TokenEvent, TokenId,
};

/// How the GPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Report a hash of each logits row.
    pub trace_hash: bool,
    /// Fill memory that holds nothing with NaN, so that reading it shows.
    pub poison: bool,
}

/// What the backend knows of a slot or fork point.
#[derive(Clone, Copy, Default)]
pub(super) struct Sequence {
    /// Positions in the cache.
    pub length: usize,
    pub decoding: Option<Decoding>,
}

/// The rows of a prefill pass.
#[derive(Default)]
struct Batch {
    rows: Vec<Row>,
    tokens: Vec<TokenId>,
    blocks: Vec<[u32; 2]>,
    sequences: Vec<usize>,
}

/// A model on a GPU.
pub struct CudaBackend {
    pub(super) info: BackendInfo,
    pub(super) options: CudaOptions,
    memory: BackendMemory,
    pub(super) loaded: Arc<Loaded>,
    pub(super) device: Arc<Device>,
    pub(super) geometry: KvGeometry,
    pub(super) work: Workspace,
    pub(super) sequences: Vec<Sequence>,
    /// The device's page table, and whether it is behind this one.
    page_table: Vec<u32>,
    page_table_changed: bool,
    /// Mappings of each page.
    page_users: Vec<u32>,
    batch: Batch,
    /// Of each kind of step that has been run: its captured launches.
    pub(super) graphs: HashMap<Rows, Option<(Graph, Recorded)>>,
    /// Runs of each kernel before this backend's.
    calls_before: Recorded,
    pub(super) outstanding: Option<Outstanding>,
    pub(super) arrived: PinnedBuffer<StepEvent>,
    pub(super) arrival: Event,
    pub(super) ready: Vec<TokenEvent>,
    pub(super) failed: Option<EngineError>,
}

impl CudaBackend {
    /// A backend over weights that are loaded already; allocates the rest.
    ///
    /// # Errors
    /// An impossible shape, or out of memory.
    pub fn new(
        loaded: Arc<Loaded>,
        shape: EngineShape,
        options: CudaOptions,
    ) -> Result<Self, EngineError> {
        check_shape(&shape)?;
        let device = Arc::clone(&loaded.device);
        let config = &loaded.model.config;
        let work = Workspace::new(&device, config, &shape)?;
        let memory = BackendMemory {
            weights_bytes: loaded.model.loaded_bytes().total(),
            kv_bytes: work.kv_bytes(),
            workspace_bytes: work.workspace_bytes(),
        };
        assert_eq!(
            memory,
            memory::planned(config, loaded.model.format, &shape),
            "what is planned is what is allocated"
        );
        let n_sequences = shape.n_slots + shape.n_forks;
        let backend = Self {
            info: BackendInfo {
                numerics_id: loaded.numerics_id.clone(),
                shape,
                n_vocab: config.n_vocab,
            },
            options,
            memory,
            geometry: KvGeometry::new(config),
            sequences: vec![Sequence::default(); n_sequences],
            page_table: vec![NONE; work.lengths.page_table],
            page_table_changed: true,
            page_users: vec![0; shape.n_pages],
            batch: Batch::default(),
            graphs: HashMap::new(),
            calls_before: loaded.kernels.calls.read(),
            outstanding: None,
            arrived: device.alloc_pinned(work.lengths.events)?,
            arrival: device.event()?,
            ready: Vec::new(),
            failed: None,
            work,
            device,
            loaded,
        };
        if options.poison {
            let work = &backend.work;
            work.pages.fill(0, work.pages.len(), 0xFF)?;
            work.rings.fill(0, work.rings.len(), 0xFF)?;
            work.poison()?;
        }
        Ok(backend)
    }

    pub fn loaded(&self) -> &Arc<Loaded> {
        &self.loaded
    }

    /// Fills a sequence's window and pages with NaN, so that its next logits are not finite: for
    /// tests of what is done then.
    ///
    /// # Errors
    /// The driver fails.
    pub fn damage(&mut self, sequence: SequenceId) -> Result<(), EngineError> {
        self.collect()?;
        let (ring, page) = (self.geometry.ring_len, self.geometry.page_len);
        let sequence = sequence.0 as usize;
        self.work.rings.fill(sequence * ring, ring, 0xFF)?;
        for &mapped in self.pages_of(sequence).iter().filter(|&&page| page != NONE) {
            self.work.pages.fill(mapped as usize * page, page, 0xFF)?;
        }
        Ok(())
    }

    /// Runs of each kernel by name, those in replayed graphs among them.
    pub fn kernel_calls(&self) -> BTreeMap<String, u64> {
        self.loaded.kernels.calls_since(&self.calls_before)
    }

    pub(super) fn pass(&self) -> Pass<'_> {
        Pass {
            kernels: &self.loaded.kernels,
            model: &self.loaded.model,
            work: &self.work,
            geometry: self.geometry,
        }
    }

    /// Entries of the host's page table.
    pub(super) fn pages_of(&self, sequence: usize) -> &[u32] {
        let max_pages = self.work.lengths.max_pages;
        &self.page_table[sequence * max_pages..][..max_pages]
    }

    pub(super) fn upload_page_table(&mut self) -> Result<(), EngineError> {
        if std::mem::take(&mut self.page_table_changed) {
            self.work.page_table.upload(0, &self.page_table)?;
        }
        Ok(())
    }

    /// Routing of the latest pass, `[n_rows, k]`, `u32::MAX` for padding: for statistics.
    ///
    /// # Errors
    /// The driver fails.
    pub fn routed(&self, n_rows: usize) -> Result<Vec<u32>, EngineError> {
        let k = self.loaded.model.config.n_experts_per_token;
        let mut experts = vec![0; n_rows * k];
        self.work.experts.download(0, &mut experts)?;
        Ok(experts)
    }

    fn check_tokens(&self, tokens: &[TokenId]) -> Result<(), EngineError> {
        let n_vocab = self.info.n_vocab;
        match tokens.iter().find(|&&token| token as usize >= n_vocab) {
            Some(&token) => Err(EngineError::Token { token, n_vocab }),
            None => Ok(()),
        }
    }

    fn check_span(&self, span: &Span) -> Result<(), EngineError> {
        let length = self.sequences[span.sequence.0 as usize].length;
        assert_eq!(span.start, length, "a span goes on where its sequence ends");
        self.check_tokens(&span.tokens)
    }

    /// Adds consecutive tokens to the pass being built and to their sequence's length.
    fn push(&mut self, sequence: usize, tokens: &[TokenId]) {
        let first = self.sequences[sequence].length;
        let end = first + tokens.len();
        assert!(
            end <= self.info.shape.max_context,
            "position {end} of sequence {sequence} is past the context"
        );
        if self.loaded.model.config.layers.contains(&LayerKind::Full) {
            let range = first / PAGE_POSITIONS..end.div_ceil(PAGE_POSITIONS);
            assert!(
                !self.pages_of(sequence)[range].contains(&NONE),
                "a page of positions {first}..{end} of sequence {sequence} is not mapped"
            );
        }
        let a_block = self.loaded.kernels.attention_rows();
        let batch = &mut self.batch;
        let row = batch.rows.len();
        batch.rows.extend((0..tokens.len()).map(|i| Row {
            sequence: sequence as u32,
            position: (first + i) as u32,
            segment_row: row as u32,
            segment_end: (row + tokens.len()) as u32,
        }));
        let starts = (0..tokens.len()).step_by(a_block);
        batch.blocks.extend(starts.map(|skip| {
            let n_rows = a_block.min(tokens.len() - skip);
            [(row + skip) as u32, n_rows as u32]
        }));
        batch.tokens.extend_from_slice(tokens);
        batch.sequences.push(sequence);
        self.sequences[sequence].length = end;
    }

    /// Runs the pass that was built and begins the next.
    fn run_batch(&mut self, until: Until) -> Result<(), EngineError> {
        let batch = std::mem::take(&mut self.batch);
        self.upload_page_table()?;
        self.work.rows.upload(0, &batch.rows)?;
        self.work.tokens.upload(0, &batch.tokens)?;
        self.work.blocks.upload(0, &batch.blocks)?;
        let rows = Rows::Prefill {
            n_rows: batch.rows.len(),
            n_blocks: batch.blocks.len(),
        };
        self.pass().forward(rows, until)
    }

    /// As [`Backend::clear`], with the driver's errors.
    fn try_clear(&mut self, sequences: &[SequenceId]) -> Result<(), EngineError> {
        self.collect()?;
        let max_pages = self.work.lengths.max_pages;
        for sequence in sequences {
            let sequence = sequence.0 as usize;
            self.sequences[sequence] = Sequence::default();
            for entry in &mut self.page_table[sequence * max_pages..][..max_pages] {
                if *entry != NONE {
                    self.page_users[*entry as usize] -= 1;
                    *entry = NONE;
                }
            }
            self.page_table_changed = true;
            if self.options.poison {
                let n = self.geometry.ring_len;
                self.work.rings.fill(sequence * n, n, 0xFF)?;
            }
        }
        if self.options.poison {
            self.work.poison()?;
        }
        Ok(())
    }

    /// Keeps the first failure for the next call that may report one.
    fn note(&mut self, result: Result<(), EngineError>) {
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
    }

    fn take_failure(&mut self) -> Result<(), EngineError> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

fn check_shape(shape: &EngineShape) -> Result<(), EngineError> {
    // More than this is a mistake, and sums of such counts stay far from overflow.
    const MOST: usize = 1 << 24;
    let counts = [
        ("n_slots", shape.n_slots, 1, 4096),
        ("n_forks", shape.n_forks, 0, MOST),
        ("n_pages", shape.n_pages, 0, MOST),
        ("max_context", shape.max_context, 1, MOST),
        ("prefill_rows", shape.prefill_rows, 1, 1 << 18),
    ];
    for (key, found, least, most) in counts {
        if !(least..=most).contains(&found) {
            return Err(ConfigError::Shape {
                key,
                found,
                expected: format!("{least} to {most}"),
            }
            .into());
        }
    }
    Ok(())
}

impl Backend for CudaBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        let sequence = sequence.0 as usize;
        let max_pages = self.work.lengths.max_pages;
        assert!(index < max_pages, "page {index} is past the context");
        assert!(
            (page.0 as usize) < self.info.shape.n_pages,
            "page {} is not in the arena",
            page.0
        );
        let entry = &mut self.page_table[sequence * max_pages + index];
        let before = std::mem::replace(entry, page.0);
        if before == page.0 {
            return;
        }
        self.page_table_changed = true;
        if before != NONE {
            self.page_users[before as usize] -= 1;
        }
        let users = &mut self.page_users[page.0 as usize];
        *users += 1;
        // A page that others map holds a shared prefix.
        if self.options.poison && *users == 1 {
            let n = self.geometry.page_len;
            let filled = self.work.pages.fill(page.0 as usize * n, n, 0xFF);
            self.note(filled.map_err(EngineError::from));
        }
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        self.collect()?;
        let (from, to) = (fork.from.0 as usize, fork.to.0 as usize);
        assert_eq!(
            self.sequences[from].length, fork.n_positions,
            "a fork takes over all positions"
        );
        self.sequences[to] = Sequence {
            length: fork.n_positions,
            decoding: None,
        };
        let (ring, page) = (self.geometry.ring_len, self.geometry.page_len);
        self.work.rings.copy_within(from * ring, to * ring, ring)?;
        if let Some((tail, copy)) = fork.tail {
            let (tail, copy) = (tail.0 as usize, copy.0 as usize);
            self.work
                .pages
                .copy_within(tail * page, copy * page, page)?;
        }
        Ok(())
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.collect()?;
        self.batch = Batch::default();
        for span in spans {
            self.check_tokens(&span.tokens)?;
        }
        let max_rows = self.info.shape.prefill_rows;
        for span in spans {
            let sequence = span.sequence.0 as usize;
            self.check_span(span)?;
            // A sequence may be in a pass once.
            if self.batch.sequences.contains(&sequence) {
                self.run_batch(Until::Cached)?;
            }
            let mut rest = &span.tokens[..];
            while !rest.is_empty() {
                let room = max_rows - self.batch.rows.len();
                let (now, later) = rest.split_at(room.min(rest.len()));
                self.push(sequence, now);
                rest = later;
                if self.batch.rows.len() == max_rows {
                    self.run_batch(Until::Cached)?;
                }
            }
        }
        if !self.batch.rows.is_empty() {
            self.run_batch(Until::Cached)?;
        }
        // The loop above times a pass by when it returns.
        Ok(self.device.synchronize()?)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.collect()?;
        self.check_tokens(&[start.token])?;
        let slot = start.slot.0 as usize;
        assert!(slot < self.info.shape.n_slots, "sequence {slot} is no slot");
        let sequence = &mut self.sequences[slot];
        assert_eq!(
            sequence.length, start.position,
            "a slot starts where its prompt ends"
        );
        sequence.decoding = Some(Decoding {
            max_new_tokens: start.max_new_tokens,
            n_generated: 0,
        });
        let on_device = Slot::new(start)?;
        let slots = self.work.slots.at(0);
        Ok(self
            .loaded
            .kernels
            .start_slot(slots, slot as u32, &on_device)?)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        self.enqueue_steps(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        if self.is_under_way()? {
            return Ok(false);
        }
        self.collect()?;
        events.append(&mut self.ready);
        self.take_failure()?;
        Ok(true)
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        let cleared = self.try_clear(sequences);
        self.note(cleared);
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.collect()?;
        self.check_span(span)?;
        let n_vocab = self.info.n_vocab;
        let sequence = span.sequence.0 as usize;
        let step_rows = self.work.lengths.step_rows;
        let mut logits = vec![0.0; step_rows * n_vocab];
        let mut position = span.start;
        for tokens in span.tokens.chunks(self.info.shape.prefill_rows) {
            self.batch = Batch::default();
            self.push(sequence, tokens);
            self.run_batch(Until::Normed)?;
            // The logits workspace has a row a slot.
            for first in (0..tokens.len()).step_by(step_rows) {
                let n_rows = step_rows.min(tokens.len() - first);
                self.pass().lm_head(first, n_rows, 0)?;
                let logits = &mut logits[..n_rows * n_vocab];
                self.work.logits.download(0, logits)?;
                for logits in logits.chunks_exact(n_vocab) {
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

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Buffers are freed behind the work that uses them.
        let _ = self.device.synchronize();
    }
}
