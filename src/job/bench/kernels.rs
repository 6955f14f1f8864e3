//! Times of each kernel in a prefill pass and in a step right after the prompts.

use std::sync::Arc;

use super::JobError;
use super::workload::Workload;
use crate::engine::cuda::CudaBackend;
use crate::engine::kv::KvArena;
use crate::engine::{
    Backend, EngineError, Fork, SamplingParams, SequenceId, SlotStart, Span, TokenId,
};

/// Fills the slots as a run would, the shared beginning once, with one pass and one step timed.
/// The backend is warm and empty, and is left empty.
///
/// # Errors
/// The driver fails.
pub fn times(
    backend: &mut CudaBackend,
    workload: &Workload,
) -> Result<serde_json::Value, JobError> {
    let shape = backend.info().shape;
    let n_sequences = shape.n_slots + shape.n_forks;
    let mut arena = KvArena::new(shape.n_pages, n_sequences);
    let loaded = Arc::clone(backend.loaded());
    let mut jobs = workload.jobs(backend.info().n_vocab, u32::MAX);
    jobs.truncate(workload.n_slots);
    let n_steps = (0..jobs.len()).map(|row| workload.output_of(row)).min();
    let held_once = SequenceId(shape.n_slots as u32);
    if workload.shared > 0 {
        grow(backend, &mut arena, held_once, workload.shared);
        let tokens = jobs[0].prompt[..workload.shared].into();
        backend.prefill(&[span(held_once, 0, tokens)])?;
        arena.advance(held_once, workload.shared);
    }
    let mut spans = Vec::new();
    for (slot, job) in (0u32..).map(SequenceId).zip(&jobs) {
        let n_prefill = job.prompt.len() - 1;
        if workload.shared > 0 {
            let shared = arena.share(held_once, slot);
            let shared = shared.map_err(|error| too_small(&error.to_string()))?;
            grow(backend, &mut arena, slot, workload.shared);
            backend.fork(&Fork {
                from: held_once,
                to: slot,
                n_positions: workload.shared,
                tail: shared.tail,
            })?;
        }
        // Room for the steps below.
        grow(backend, &mut arena, slot, job.prompt.len() + 2);
        let tokens = job.prompt[workload.shared..n_prefill].into();
        spans.push(span(slot, workload.shared, tokens));
    }
    let passes = passes(spans, shape.prefill_rows);
    let mut prefill = Vec::new();
    for (i, pass) in passes.iter().enumerate() {
        match i {
            0 => prefill = loaded.kernels.timed(|| backend.prefill(pass))?,
            _ => backend.prefill(pass)?,
        }
    }
    for (slot, job) in (0u32..).map(SequenceId).zip(&jobs) {
        let position = job.prompt.len() - 1;
        backend.start(&SlotStart {
            slot,
            token: job.prompt[position],
            position,
            sampling: SamplingParams::default(),
            row_hash: job.row_hash,
            sample: 0,
            stop_tokens: Arc::new([]),
            max_new_tokens: job.max_new_tokens,
        })?;
    }
    let mut times = serde_json::json!({ "prefill pass": prefill });
    // The first step warms up.
    if n_steps.is_some_and(|n| n > 2) {
        backend.time_step()?;
        times["decode step"] = serde_json::to_value(backend.time_step()?).unwrap_or_default();
    }
    let all: Vec<SequenceId> = (0..n_sequences as u32).map(SequenceId).collect();
    backend.clear(&all);
    Ok(times)
}

fn span(sequence: SequenceId, start: usize, tokens: Arc<[TokenId]>) -> Span {
    Span {
        sequence,
        start,
        tokens,
    }
}

/// Gives a sequence pages for so many positions and maps all that it has.
fn grow(backend: &mut CudaBackend, arena: &mut KvArena, sequence: SequenceId, n: usize) {
    // The workload's shape has pages for every slot's longest row.
    let _ = arena.assign(sequence, n);
    for (index, &page) in arena.pages(sequence).iter().enumerate() {
        backend.map_page(sequence, index, page);
    }
}

fn too_small(reason: &str) -> EngineError {
    EngineError::OutOfMemory {
        what: format!("a slot's pages ({reason})"),
        needed: 0,
    }
}

/// Whole spans in passes of at most `n_rows` tokens; a longer one has a pass of its own.
fn passes(spans: Vec<Span>, n_rows: usize) -> Vec<Vec<Span>> {
    let mut passes: Vec<Vec<Span>> = Vec::new();
    let mut room = 0;
    for span in spans {
        if passes.is_empty() || span.tokens.len() > room {
            passes.push(Vec::new());
            room = n_rows;
        }
        room = room.saturating_sub(span.tokens.len());
        passes.last_mut().expect("one was just pushed").push(span);
    }
    passes
}
