//! What a run came to: every step of every row, and what the loop told of it.

use std::collections::{BTreeMap, HashMap};

use podium::engine::generate::{Generation, JobError, Observer, StepKind, StepReport};
use podium::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, Fork, PageId, SequenceId, SlotStart, Span,
    TokenEvent, TokenId,
};

/// A row and sample.
pub type Key = (u64, u32);

/// What a step of a row came to: token, bits of its log-probability, hash of its logits.
pub type Step = (TokenId, u32, u64);

/// Steps by the position of the token they made.
pub type Traces = BTreeMap<Key, BTreeMap<usize, Step>>;

/// A backend that writes down every step. A row that starts again must repeat itself.
pub struct Recorder<'a> {
    pub inner: Box<dyn Backend + 'a>,
    pub rows: HashMap<SequenceId, Key>,
    pub traces: Traces,
    pub n_repeated: usize,
}

impl Recorder<'_> {
    fn record(&mut self, event: &TokenEvent) {
        let key = self.rows[&event.slot];
        let hash = event.logits_hash.expect("hashes were asked for");
        let step = (event.token, event.logprob.to_bits(), hash);
        let before = self
            .traces
            .entry(key)
            .or_default()
            .insert(event.position, step);
        if let Some(before) = before {
            self.n_repeated += 1;
            assert_eq!(
                before, step,
                "row {key:?} at {} when redone",
                event.position
            );
        }
    }
}

impl Backend for Recorder<'_> {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        self.inner.map_page(sequence, index, page);
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        self.inner.fork(fork)
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.inner.prefill(spans)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.rows.insert(start.slot, (start.row_hash, start.sample));
        self.inner.start(start)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        let n_before = events.len();
        let polled = self.inner.poll(events);
        for event in &events[n_before..] {
            self.record(event);
        }
        polled
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        self.inner.clear(sequences);
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.inner.score(span, visit)
    }

    fn memory(&self) -> BackendMemory {
        self.inner.memory()
    }
}

#[derive(Default)]
pub struct Seen {
    pub done: BTreeMap<(usize, u32), Generation>,
    pub n_prefills: usize,
    pub n_reused: usize,
    pub n_evicted: usize,
}

impl Observer for Seen {
    fn finished(&mut self, generation: Generation) {
        let key = (generation.row, generation.sample);
        self.n_reused += generation.reused_tokens;
        assert!(self.done.insert(key, generation).is_none(), "{key:?} twice");
    }

    fn failed(&mut self, row: usize, _sample: u32, error: JobError) {
        panic!("row {row}: {error}");
    }

    fn step(&mut self, report: &StepReport) {
        self.n_prefills += usize::from(report.kind == StepKind::Prefill);
        self.n_evicted += report.n_evicted;
    }
}

pub fn same(base: &Traces, found: &Traces, way: &str) {
    for (key, expected) in base {
        let found = found
            .get(key)
            .unwrap_or_else(|| panic!("{way}: no row {key:?}"));
        let differs = expected
            .iter()
            .find(|(position, step)| found.get(position) != Some(step));
        if let Some((position, step)) = differs {
            let found = found.get(position);
            panic!("{way}: row {key:?} at position {position}: {found:?} for {step:?}");
        }
    }
}
