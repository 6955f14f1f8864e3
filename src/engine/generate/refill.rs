//! Starting rows: the shared prefixes they need, their prefill, and the bookkeeping of both.
//!
//! A refill admits jobs in batch order while slots, pages and fork sequences last. Admission is
//! bookkeeping only; the work is collected into stages (prefixes by depth, then the rows
//! themselves) so that each stage is one set of forks and full prefill passes.

use std::time::Instant;

use super::headroom::limit;
use super::{GenerateError, LiveRow, Run, StepKind, StepReport};
use crate::batch::{Batch, PlannedJob};
use crate::engine::kv::pages_for;
use crate::engine::{
    EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId, SequenceId, SlotStart, Span, TokenId,
};

/// Prompt tokens worth a refill of their own while other rows decode.
const REFILL_TOKENS: usize = 2048;

/// A refill is also worth it for one in so many slots.
const REFILL_SLOT_SHARE: usize = 16;

/// Of the rows in use one in so many may need its next page soon: pages kept free by a refill, so
/// that a row just evicted does not come straight back.
const RESERVE_SHARE: usize = 4;

/// Which prefixes of the batch are held by which fork sequences.
pub(super) struct PrefixStore {
    /// Of each prefix: the sequence that holds it.
    held_by: Vec<Option<SequenceId>>,
    /// Of each prefix: jobs below it, next stages among them, that have not been admitted.
    n_waiting: Vec<usize>,
    /// Prefixes that are held.
    held: Vec<usize>,
    free: Vec<SequenceId>,
}

impl PrefixStore {
    pub(super) fn new(batch: &Batch, shape: &EngineShape) -> Self {
        let forks = shape.n_slots as u32..(shape.n_slots + shape.n_forks) as u32;
        Self {
            held_by: vec![None; batch.prefixes.len()],
            n_waiting: batch.prefixes.iter().map(|p| p.n_jobs).collect(),
            held: Vec::new(),
            free: forks.rev().map(SequenceId).collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// A job has come back to the queue.
    pub(super) fn expect_job(&mut self, batch: &Batch, job: usize) {
        for prefix in batch.path(batch.jobs[job].prefix) {
            self.n_waiting[prefix] += 1;
        }
    }

    /// A job has been admitted, or one that was expected will not come.
    pub(super) fn admit_job(&mut self, batch: &Batch, job: usize) {
        for prefix in batch.path(batch.jobs[job].prefix) {
            self.n_waiting[prefix] -= 1;
        }
    }
}

/// Work of one level: page tables, copies of shared prefixes, then new tokens.
#[derive(Default)]
struct Stage {
    /// Mapped when the stage begins: a whole page gets its second owner when it is full.
    pages: Vec<(SequenceId, Vec<PageId>)>,
    forks: Vec<Fork>,
    spans: Vec<Span>,
}

/// A row to start once its prompt is in.
struct Launch {
    job: usize,
    slot: SequenceId,
    reused_tokens: usize,
}

/// The work of a refill, admitted and not yet done.
#[derive(Default)]
struct Round {
    prefixes: Vec<Stage>,
    rows: Stage,
    launches: Vec<Launch>,
}

impl Round {
    fn prefix_stage(&mut self, depth: usize) -> &mut Stage {
        if self.prefixes.len() <= depth {
            self.prefixes.resize_with(depth + 1, Stage::default);
        }
        &mut self.prefixes[depth]
    }
}

impl Run<'_> {
    /// Whether to start rows now: always when nothing is live, else when it is worth a pass.
    pub(super) fn refill_is_due(&self) -> bool {
        let n_live = self.n_live();
        if self.queue.is_empty() || n_live == 0 {
            return !self.queue.is_empty();
        }
        if !self.options.refill {
            return false;
        }
        let n_next = (self.shape.n_slots - n_live).min(self.queue.len());
        let enough_slots = (self.shape.n_slots / REFILL_SLOT_SHARE).clamp(1, self.queue.len());
        let n_tokens = || -> usize {
            let next = self.queue.iter().take(n_next);
            next.map(|&job| self.batch.jobs[job].job.prompt.len()).sum()
        };
        n_next > 0
            && (n_next >= enough_slots || n_tokens() >= REFILL_TOKENS)
            && self
                .queue
                .front()
                .is_some_and(|&job| self.has_pages(job, n_live))
    }

    /// Fills free slots from the queue as far as pages last.
    pub(super) fn refill(&mut self) -> Result<(), GenerateError> {
        let mut free: Vec<SequenceId> = (0u32..)
            .zip(&self.slots)
            .filter(|(_, row)| row.is_none())
            .map(|(slot, _)| SequenceId(slot))
            .collect();
        free.reverse();
        let mut round = Round::default();
        while let (Some(&slot), Some(&job)) = (free.last(), self.queue.front()) {
            if !self.admit(&mut round, slot, job)? {
                break;
            }
            free.pop();
            self.queue.pop_front();
        }
        self.work(round)
    }

    /// Books one job into a slot; `false` when it has to wait for pages.
    fn admit(
        &mut self,
        round: &mut Round,
        slot: SequenceId,
        job: usize,
    ) -> Result<bool, GenerateError> {
        let (mut base, mut missing) = self.prefix_steps(job);
        if missing.len() > self.prefixes.free.len() && !round.launches.is_empty() {
            // Prefixes whose last row is in the round become free when it is done.
            self.work(std::mem::take(round))?;
            if self.interrupted().is_some() {
                return Ok(false);
            }
            (base, missing) = self.prefix_steps(job);
        }
        // Too few fork sequences: the deeper levels are not shared.
        missing.truncate(self.prefixes.free.len());

        let n_in_use = self.n_live() + round.launches.len();
        if self.n_pages_to_admit(job, base, &missing) + reserve(n_in_use) > self.arena.n_free() {
            if n_in_use > 0 {
                return Ok(false);
            }
            // Alone and still too large: without any prefix the row has the whole arena.
            self.drop_all_prefixes();
            (base, missing) = (None, Vec::new());
        }

        let mut n_computed = 0;
        for prefix in missing {
            let Some(sequence) = self.prefixes.free.pop() else {
                break;
            };
            let planned = &self.batch.prefixes[prefix];
            let (prompt, n_tokens) = (planned.prompt.clone(), planned.n_tokens);
            let stage = round.prefix_stage(planned.depth);
            n_computed += n_tokens - self.extend(stage, base, sequence, &prompt[..n_tokens]);
            self.prefixes.held_by[prefix] = Some(sequence);
            self.prefixes.held.push(prefix);
            base = Some(prefix);
        }
        let prompt = self.batch.jobs[job].job.prompt.clone();
        let n_prefill = prompt.len() - 1;
        let n_taken_over = self.extend(&mut round.rows, base, slot, &prompt[..n_prefill]);
        round.launches.push(Launch {
            job,
            slot,
            // What had to be computed for this row is not reused by it.
            reused_tokens: n_taken_over - n_computed,
        });
        self.prefixes.admit_job(&self.batch, job);
        Ok(true)
    }

    /// The longest prefix of a job that is held, and the longer ones worth computing now,
    /// shortest first.
    fn prefix_steps(&self, job: usize) -> (Option<usize>, Vec<usize>) {
        let mut missing = Vec::new();
        for prefix in self.batch.path(self.batch.jobs[job].prefix) {
            if self.prefixes.held_by[prefix].is_some() {
                missing.reverse();
                return (Some(prefix), missing);
            }
            // For its last job a prefix is no shorter than the prompt itself.
            if self.prefixes.n_waiting[prefix] >= 2 {
                missing.push(prefix);
            }
        }
        missing.reverse();
        (None, missing)
    }

    /// Pages that a job, its missing prefixes and its first decode step take.
    fn n_pages_to_admit(&self, job: usize, base: Option<usize>, missing: &[usize]) -> usize {
        let n_tokens = |prefix: usize| self.batch.prefixes[prefix].n_tokens;
        let n_shared = |held: usize| held / PAGE_POSITIONS;
        let mut held = base.map_or(0, n_tokens);
        let mut n_pages = 0;
        for &prefix in missing {
            n_pages += pages_for(n_tokens(prefix)) - n_shared(held);
            held = n_tokens(prefix);
        }
        n_pages + pages_for(self.batch.jobs[job].job.prompt.len()) - n_shared(held)
    }

    /// Whether the next job could be admitted beside `n_live` rows.
    fn has_pages(&self, job: usize, n_live: usize) -> bool {
        let (base, mut missing) = self.prefix_steps(job);
        missing.truncate(self.prefixes.free.len());
        self.n_pages_to_admit(job, base, &missing) + reserve(n_live) <= self.arena.n_free()
    }

    /// Books `tokens` into an empty sequence, beginning from a held prefix. Returns the number
    /// of tokens taken over.
    fn extend(
        &mut self,
        stage: &mut Stage,
        base: Option<usize>,
        to: SequenceId,
        tokens: &[TokenId],
    ) -> usize {
        let from = base.and_then(|prefix| self.prefixes.held_by[prefix]);
        if let Some(from) = from {
            let shared = self.arena.share(from, to);
            let shared = shared.expect("the pages were counted before");
            stage.forks.push(Fork {
                from,
                to,
                n_positions: self.arena.length(to),
                tail: shared.tail,
            });
        }
        let held = self.arena.length(to);
        if held < tokens.len() {
            let new = self.arena.assign(to, tokens.len());
            new.expect("the pages were counted before");
            self.arena.advance(to, tokens.len() - held);
            stage.spans.push(Span {
                sequence: to,
                start: held,
                tokens: tokens[held..].into(),
            });
        }
        stage.pages.push((to, self.arena.pages(to).to_vec()));
        held
    }

    /// Does the work of a round and starts its rows; returns early when interrupted.
    fn work(&mut self, round: Round) -> Result<(), GenerateError> {
        if round.launches.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let mut n_prefilled = 0;
        for stage in round.prefixes.iter().chain([&round.rows]) {
            for (sequence, pages) in &stage.pages {
                for (index, &page) in pages.iter().enumerate() {
                    self.backend.map_page(*sequence, index, page);
                }
            }
            for fork in &stage.forks {
                self.backend.fork(fork)?;
            }
            for pass in pack(&stage.spans, self.shape.prefill_rows.max(1)) {
                // The run ends at once then, so half-done rows do not matter.
                if self.interrupted().is_some() {
                    return Ok(());
                }
                self.backend.prefill(&pass)?;
                n_prefilled += pass.iter().map(|span| span.tokens.len()).sum::<usize>();
            }
        }
        let mut reused_tokens = 0;
        for launch in round.launches {
            reused_tokens += launch.reused_tokens;
            self.start(launch, begun)?;
        }
        self.drop_idle_prefixes();
        self.observer.step(&StepReport {
            kind: StepKind::Prefill,
            tokens: n_prefilled,
            seconds: begun.elapsed().as_secs_f64(),
            live_row_steps: 0,
            padded_row_steps: 0,
            reused_tokens,
            n_live: self.n_live(),
            queue_len: self.queue.len(),
            n_evicted: std::mem::take(&mut self.n_evicted),
        });
        Ok(())
    }

    fn start(&mut self, launch: Launch, begun: Instant) -> Result<(), EngineError> {
        let PlannedJob { job, .. } = &self.batch.jobs[launch.job];
        let position = job.prompt.len() - 1;
        let limit = limit(job.max_new_tokens, self.options.answer_headroom);
        self.backend.start(&SlotStart {
            slot: launch.slot,
            token: job.prompt[position],
            position,
            sampling: self.options.sampling,
            row_hash: job.row_hash,
            sample: job.sample,
            stop_tokens: self.options.stop_tokens.clone(),
            max_new_tokens: limit,
        })?;
        self.slots[launch.slot.0 as usize] = Some(LiveRow {
            job: launch.job,
            age: self.n_started,
            started: begun,
            reused_tokens: launch.reused_tokens,
            output_ids: Vec::with_capacity(job.max_new_tokens.min(PAGE_POSITIONS)),
            limit,
            paused: false,
            forced: None,
            logprob_sum: 0.0,
            trace_hash: Some(0),
        });
        self.n_started += 1;
        Ok(())
    }

    /// Drops the prefixes that no job waits for.
    pub(super) fn drop_idle_prefixes(&mut self) {
        self.drop_prefixes(|store, prefix| store.n_waiting[prefix] == 0);
    }

    pub(super) fn drop_all_prefixes(&mut self) {
        self.drop_prefixes(|_, _| true);
    }

    fn drop_prefixes(&mut self, is_over: impl Fn(&PrefixStore, usize) -> bool) {
        let (over, kept) = std::mem::take(&mut self.prefixes.held)
            .into_iter()
            .partition(|&prefix| is_over(&self.prefixes, prefix));
        self.prefixes.held = kept;
        let over: Vec<usize> = over;
        for prefix in over {
            if let Some(sequence) = self.prefixes.held_by[prefix].take() {
                self.backend.clear(&[sequence]);
                self.arena.release(sequence);
                self.prefixes.free.push(sequence);
            }
        }
    }
}

/// Pages to keep free beside `n_in_use` rows and the one to be admitted; none for the first.
fn reserve(n_in_use: usize) -> usize {
    if n_in_use == 0 {
        0
    } else {
        (n_in_use + 1).div_ceil(RESERVE_SHARE)
    }
}

/// Cuts spans into passes of exactly `n_rows` tokens (the last may be shorter), so that passes
/// are full and the stop flag is seen between them.
fn pack(spans: &[Span], n_rows: usize) -> Vec<Vec<Span>> {
    let mut passes = Vec::new();
    let mut pass = Vec::new();
    let mut room = n_rows;
    for span in spans {
        let mut done = 0;
        while done < span.tokens.len() {
            let n = room.min(span.tokens.len() - done);
            let tokens = if n == span.tokens.len() {
                span.tokens.clone()
            } else {
                span.tokens[done..done + n].into()
            };
            pass.push(Span {
                sequence: span.sequence,
                start: span.start + done,
                tokens,
            });
            done += n;
            room -= n;
            if room == 0 {
                passes.push(std::mem::take(&mut pass));
                room = n_rows;
            }
        }
    }
    if !pass.is_empty() {
        passes.push(pass);
    }
    passes
}
