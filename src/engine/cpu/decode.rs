//! Decode steps: the live slots' rows through the model, a token drawn for each, slots that stop.

use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::CpuBackend;
use super::forward::{self, Until};
use crate::engine::sample::{SampleKey, Sampled, Sampler, logits_hash};
use crate::engine::{
    EngineError, SamplingParams, SequenceId, SlotStart, StopReason, TokenEvent, TokenId,
};

/// A live slot.
pub struct Decoding {
    /// The token of the next step and its position.
    token: TokenId,
    position: usize,
    sampling: SamplingParams,
    row_hash: u64,
    sample: u32,
    stop_tokens: Arc<[TokenId]>,
    max_new_tokens: usize,
    n_generated: usize,
}

impl Decoding {
    pub fn new(start: &SlotStart) -> Self {
        Self {
            token: start.token,
            position: start.position,
            sampling: start.sampling,
            row_hash: start.row_hash,
            sample: start.sample,
            stop_tokens: start.stop_tokens.clone(),
            max_new_tokens: start.max_new_tokens,
            n_generated: 0,
        }
    }

    /// Takes the token that was drawn; says whether the slot stops.
    fn take(&mut self, token: TokenId, max_context: usize) -> Option<StopReason> {
        self.token = token;
        self.position += 1;
        self.n_generated += 1;
        if self.stop_tokens.contains(&token) {
            Some(StopReason::Stop)
        } else if self.n_generated >= self.max_new_tokens || self.position + 1 >= max_context {
            Some(StopReason::Length)
        } else {
            None
        }
    }
}

/// What a row of a step comes to; nothing when its logits are not finite.
type Drawn = Option<(Sampled, Option<u64>)>;

/// What all steps share.
pub struct Steps {
    pub events: Vec<TokenEvent>,
    /// Live slots of the present step.
    live: Vec<usize>,
    drawn: Vec<Drawn>,
    /// One a thread.
    samplers: Vec<Mutex<Sampler>>,
}

impl Steps {
    pub fn new(n_slots: usize, n_threads: usize) -> Self {
        Self {
            events: Vec::with_capacity(n_slots),
            live: Vec::with_capacity(n_slots),
            drawn: Vec::with_capacity(n_slots),
            samplers: (0..n_threads.max(1)).map(|_| Mutex::default()).collect(),
        }
    }
}

impl CpuBackend {
    /// One step of all live slots; returns whether there were any.
    pub(super) fn step(&mut self) -> Result<bool, EngineError> {
        self.batch.clear();
        self.steps.live.clear();
        for slot in 0..self.info.shape.n_slots {
            let Some(decoding) = &self.sequences[slot].decoding else {
                continue;
            };
            let token = decoding.token;
            self.push(slot, &[token]);
            self.steps.live.push(slot);
        }
        let n_rows = self.steps.live.len();
        if n_rows == 0 {
            return Ok(false);
        }
        self.pass(Until::Residual);
        let (exec, model, work) = (&self.exec, &self.model, &mut self.work);
        self.pool
            .install(|| forward::lm_head(exec, model, work, 0..n_rows));
        self.draw(n_rows);
        let max_context = self.info.shape.max_context;
        let mut not_finite = None;
        for (&slot, drawn) in self.steps.live.iter().zip(self.steps.drawn.drain(..)) {
            let decoding = &mut self.sequences[slot].decoding;
            let Some(live) = decoding else {
                continue;
            };
            let Some((sampled, logits_hash)) = drawn else {
                not_finite.get_or_insert(EngineError::NotFinite {
                    slot: slot as u32,
                    position: live.position + 1,
                });
                // The slot does not go on; the others' tokens are reported first.
                *decoding = None;
                continue;
            };
            let stop = live.take(sampled.token, max_context);
            self.steps.events.push(TokenEvent {
                slot: SequenceId(slot as u32),
                position: live.position,
                token: sampled.token,
                logprob: sampled.logprob,
                logits_hash,
                stop,
            });
            if stop.is_some() {
                *decoding = None;
            }
        }
        match not_finite {
            Some(error) => Err(error),
            None => Ok(true),
        }
    }

    /// Draws a token for each row of the step from its logits.
    fn draw(&mut self, n_rows: usize) {
        let (live, samplers) = (&self.steps.live, &self.steps.samplers);
        let (sequences, logits) = (&self.sequences, &self.work.logits);
        let (n_vocab, trace_hash) = (self.info.n_vocab, self.options.trace_hash);
        let draw = |row: usize| -> Drawn {
            let decoding = sequences[live[row]].decoding.as_ref()?;
            let logits = &logits[row * n_vocab..][..n_vocab];
            let thread = rayon::current_thread_index().unwrap_or(0) % samplers.len();
            let mut sampler = samplers[thread]
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let key = SampleKey {
                seed: decoding.sampling.seed,
                row_hash: decoding.row_hash,
                sample: decoding.sample,
                position: (decoding.position + 1) as u32,
            };
            let sampled = sampler.sample(logits, &key, &decoding.sampling).ok()?;
            Some((sampled, trace_hash.then(|| logits_hash(logits))))
        };
        let drawn = &mut self.steps.drawn;
        self.pool.install(|| {
            (0..n_rows)
                .into_par_iter()
                .map(draw)
                .collect_into_vec(drawn)
        });
    }
}
