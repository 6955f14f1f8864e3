//! A backend under measurement: it passes everything on and counts what a step takes.

use std::collections::HashMap;

use super::cost::Cost;
use crate::engine::cpu::CpuBackend;
use crate::engine::cuda::CudaBackend;
use crate::engine::cuda::counts::Counts;
use crate::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, Fork, PAGE_POSITIONS, PageId, SequenceId,
    SlotStart, Span, TokenEvent,
};

/// A backend that can be looked into.
pub trait Probed: Backend {
    /// What was asked of the device so far.
    fn counts(&self) -> Counts;

    /// The routing of passes will be asked for from now on, or no longer.
    fn keep_routing(&mut self, keep: bool);

    /// Experts of each row of the latest pass, `[n_rows, k]` of each layer that can be looked at,
    /// `u32::MAX` for padding.
    ///
    /// # Errors
    /// The driver fails.
    fn routed(&self, n_rows: usize) -> Result<Vec<Vec<u32>>, EngineError>;
}

impl Probed for CudaBackend {
    fn counts(&self) -> Counts {
        self.loaded().device.counters.read()
    }

    /// The last layer's is always there, and no other's.
    fn keep_routing(&mut self, _keep: bool) {}

    fn routed(&self, n_rows: usize) -> Result<Vec<Vec<u32>>, EngineError> {
        Ok(vec![CudaBackend::routed(self, n_rows)?])
    }
}

impl Probed for CpuBackend {
    fn counts(&self) -> Counts {
        Counts::default()
    }

    fn keep_routing(&mut self, keep: bool) {
        CpuBackend::keep_routing(self, keep);
    }

    fn routed(&self, _n_rows: usize) -> Result<Vec<Vec<u32>>, EngineError> {
        Ok(CpuBackend::routed(self).to_vec())
    }
}

/// Sums over the steps and passes of a repeat.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    pub n_steps: usize,
    /// Asked of the device between enqueueing steps and their last token.
    pub asked: Counts,
    /// Bytes of KV that the steps read, shared pages once.
    pub step_kv_bytes: f64,
    /// Of each step the experts of a layer that chance would hit, added up.
    pub experts_by_chance: f64,
    pub step_flops: f64,
    pub prefill_flops: f64,
    /// Looks at the routing of a layer: experts hit, and how many chance would have.
    pub looks: usize,
    pub hit: f64,
    pub hit_by_chance: f64,
}

pub struct Measured<'a, B> {
    inner: &'a mut B,
    cost: &'a Cost,
    /// Positions in whole pages that all rows share.
    shared: f64,
    /// Look at the routing after each call of steps, which takes time.
    looks: bool,
    /// Tokens of each row by its hash, where the loop above does not know them.
    hidden: Option<HashMap<u64, usize>>,
    /// Of the call under way: its steps, the counts before it and the tokens so far.
    call: Option<(usize, Counts, usize)>,
    pub sums: Sums,
}

impl<'a, B: Probed> Measured<'a, B> {
    pub fn new(
        inner: &'a mut B,
        cost: &'a Cost,
        shared: usize,
        looks: bool,
        hidden: Option<HashMap<u64, usize>>,
    ) -> Self {
        inner.keep_routing(looks);
        Self {
            inner,
            cost,
            shared: (shared / PAGE_POSITIONS * PAGE_POSITIONS) as f64,
            looks,
            hidden,
            call: None,
            sums: Sums::default(),
        }
    }

    /// Books a call whose tokens have all arrived.
    fn end_call(&mut self) -> Result<(), EngineError> {
        let Some((n_steps, before, n_tokens)) = self.call.take() else {
            return Ok(());
        };
        self.sums.n_steps += n_steps;
        self.sums.asked += self.inner.counts() - before;
        self.sums.step_kv_bytes += self.cost.shared_bytes(self.shared) * n_steps as f64;
        let n_live = n_tokens as f64 / n_steps.max(1) as f64;
        self.sums.experts_by_chance += self.cost.experts_by_chance(n_live) * n_steps as f64;
        let routed = match self.looks {
            true => self.inner.routed(n_live.round() as usize)?,
            false => Vec::new(),
        };
        for mut experts in routed {
            experts.retain(|&expert| expert != u32::MAX);
            let n_rows = experts.len() / self.cost.n_experts_per_token;
            experts.sort_unstable();
            experts.dedup();
            self.sums.looks += 1;
            self.sums.hit += experts.len() as f64;
            self.sums.hit_by_chance += self.cost.experts_by_chance(n_rows as f64);
        }
        Ok(())
    }
}

impl<B: Probed> Backend for Measured<'_, B> {
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
        for span in spans {
            self.sums.prefill_flops += self.cost.prefill_flops(span.start, span.tokens.len());
        }
        self.inner.prefill(spans)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        let hidden = self.hidden.as_ref();
        let Some(&n) = hidden.and_then(|lengths| lengths.get(&start.row_hash)) else {
            return self.inner.start(start);
        };
        self.inner.start(&SlotStart {
            max_new_tokens: n,
            ..start.clone()
        })
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        self.call = Some((n_steps, self.inner.counts(), 0));
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        let n_before = events.len();
        let done = self.inner.poll(events)?;
        let new = &events[n_before..];
        for event in new {
            // The step had all positions before the token's.
            self.sums.step_kv_bytes += self.cost.kv_bytes(event.position as f64, self.shared);
            self.sums.step_flops += self.cost.step_flops(event.position as f64);
        }
        if let Some((_, _, n_tokens)) = &mut self.call {
            *n_tokens += new.len();
        }
        if done {
            self.end_call()?;
        }
        Ok(done)
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
