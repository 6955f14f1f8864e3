//! Logits that are not finite: keys and values of a slot are damaged between steps, and its row
//! is tried again once.

use std::collections::BTreeMap;
use std::sync::Arc;

use podium::batch::Job;
use podium::engine::cuda::CudaBackend;
use podium::engine::generate::{
    GenerateOptions, Generation, JobError, Observer, StepReport, generate,
};
use podium::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, Fork, PageId, SamplingParams, SequenceId,
    SlotStart, Span, TokenEvent, TokenId,
};

use crate::golden::{cases, load, open};

/// Fills a slot's keys and values with NaN before some calls of steps.
struct Damaging<'a> {
    inner: &'a mut CudaBackend,
    slot: SequenceId,
    /// Calls of steps before which it is done.
    at: Vec<usize>,
    n_calls: usize,
}

impl Backend for Damaging<'_> {
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
        self.inner.start(start)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        if self.at.contains(&self.n_calls) {
            self.inner.damage(self.slot)?;
        }
        self.n_calls += 1;
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        self.inner.poll(events)
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

/// Tokens and trace of the rows that are done, and the rows that failed.
#[derive(Default)]
struct Ended {
    done: BTreeMap<usize, (Vec<TokenId>, Option<u64>)>,
    failed: Vec<usize>,
}

impl Observer for Ended {
    fn finished(&mut self, done: Generation) {
        self.done
            .insert(done.row, (done.output_ids, done.trace_hash));
    }

    fn failed(&mut self, row: usize, _sample: u32, error: JobError) {
        println!("row {row}: {error}");
        self.failed.push(row);
    }

    fn step(&mut self, _report: &StepReport) {}
}

#[test]
#[ignore = "needs a GPU"]
fn logits_that_are_not_finite_are_tried_again_once() {
    let case = cases().into_iter().next().unwrap();
    let loaded = load(&case);
    let run = |at: Vec<usize>| {
        let mut backend = open(&loaded, 4, 64);
        let jobs = (0..8).map(|row| Job {
            row,
            sample: 0,
            prompt: case.prompts[row % case.prompts.len()]
                .tokens
                .as_slice()
                .into(),
            max_new_tokens: 12 + row,
            row_hash: row as u64,
            may_go_on: false,
        });
        let options = GenerateOptions {
            prefix_reuse: false,
            ..GenerateOptions::new(SamplingParams::default(), Arc::new([]))
        };
        let mut damaging = Damaging {
            inner: &mut backend,
            slot: SequenceId(1),
            at,
            n_calls: 0,
        };
        let mut ended = Ended::default();
        let stop = std::sync::atomic::AtomicBool::new(false);
        generate(&mut damaging, jobs.collect(), &options, &stop, &mut ended).unwrap();
        ended
    };
    let whole = run(Vec::new());
    assert_eq!((whole.done.len(), whole.failed.len()), (8, 0));
    // Once: every row has what it would have had.
    let once = run(vec![2]);
    assert_eq!(once.failed, Vec::<usize>::new());
    assert_eq!(once.done, whole.done);
    // Twice the row of that slot, if it comes back there: given up, the others are not.
    let often = run(vec![0, 1, 2]);
    assert!(!often.failed.is_empty());
    assert_eq!(often.done.len() + often.failed.len(), 8);
    for (row, done) in &often.done {
        assert_eq!(whole.done[row], *done);
    }
}
