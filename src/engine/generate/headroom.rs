//! Answer headroom: a row that would spend its whole budget on thinking is stopped before, told to
//! answer, and goes on in its slot.
//!
//! The slot is given the budget less the headroom. Where it stops for its length there, its KV
//! holds the prompt and all but the last token of the output, exactly what the next token needs.
//! What the observer then writes is scored, so that its log-probabilities count as those of
//! drawn tokens do and teacher forcing gives the same sum. A row that starts again (evicted, not
//! finite) comes to the same place with the same tokens.

use std::time::Instant;

use super::{GenerateError, Run, StepKind, StepReport};
use crate::engine::sample::{log_softmax_at, logits_hash, trace_hash};
use crate::engine::{EngineError, SequenceId, SlotStart, Span, StopReason, TokenId};

/// Tokens at which a slot stops first. A budget within the headroom has no room to think in.
pub(super) fn limit(max_new_tokens: usize, headroom: usize) -> usize {
    if headroom < max_new_tokens {
        max_new_tokens - headroom
    } else {
        max_new_tokens
    }
}

impl Run<'_> {
    /// Lets the rows that stopped at their headroom go on.
    pub(super) fn resume_paused(&mut self) -> Result<(), GenerateError> {
        let begun = Instant::now();
        let paused: Vec<SequenceId> = self
            .live()
            .filter(|(_, row)| row.paused)
            .map(|(slot, _)| slot)
            .collect();
        let mut n_forced = 0;
        for slot in paused {
            match self.resume(slot) {
                Ok(n) => n_forced += n,
                Err(GenerateError::Engine(EngineError::NotFinite { slot, position })) => {
                    self.recover(slot, position)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.observer.step(&StepReport {
            kind: StepKind::Prefill,
            tokens: n_forced,
            seconds: begun.elapsed().as_secs_f64(),
            live_row_steps: 0,
            padded_row_steps: 0,
            reused_tokens: 0,
            n_live: self.n_live(),
            queue_len: self.queue.len(),
            n_evicted: std::mem::take(&mut self.n_evicted),
        });
        Ok(())
    }

    /// Writes what the observer says into a row and starts its slot again. Returns the number of
    /// tokens written.
    fn resume(&mut self, slot: SequenceId) -> Result<usize, GenerateError> {
        // Another row's resuming may have evicted this one.
        let Some(row) = self.slots[slot.0 as usize].as_ref() else {
            return Ok(0);
        };
        let job = self.job(row).clone();
        let n_output = row.output_ids.len();
        let forced = self.observer.at_headroom(job.row, &row.output_ids);
        let n_forced = forced.len();
        if n_output + n_forced >= job.max_new_tokens {
            // No token of an answer would follow.
            self.finish(slot, StopReason::Length);
            return Ok(0);
        }
        let n_positions = self.arena.length(slot) + n_forced;
        while self.arena.n_missing(slot, n_positions) > self.arena.n_free() {
            self.free_pages(self.arena.n_missing(slot, n_positions))?;
            if self.slots[slot.0 as usize].is_none() {
                return Ok(0);
            }
        }
        self.assign(slot, n_positions);
        self.write_forced(slot, &forced)?;

        let Some(row) = self.slots[slot.0 as usize].as_mut() else {
            return Ok(0);
        };
        row.paused = false;
        row.limit = job.max_new_tokens;
        row.forced = (n_forced > 0).then_some(n_output..n_output + n_forced);
        let last = row.output_ids.last().or(job.prompt.last());
        let token = last.copied().expect("an admitted prompt has tokens");
        self.backend.start(&SlotStart {
            slot,
            token,
            position: self.arena.length(slot),
            sampling: self.options.sampling,
            row_hash: job.row_hash,
            sample: job.sample,
            stop_tokens: self.options.stop_tokens.clone(),
            max_new_tokens: job.max_new_tokens - (n_output + n_forced),
        })?;
        Ok(n_forced)
    }

    /// Runs a row's last token and all but the last of `forced` through the model, and books
    /// `forced` as its output.
    fn write_forced(&mut self, slot: SequenceId, forced: &[TokenId]) -> Result<(), EngineError> {
        let row = self.slots[slot.0 as usize].as_mut();
        let row = row.expect("the row is in its slot");
        let (Some(&last), Some((_, fed))) = (row.output_ids.last(), forced.split_last()) else {
            return Ok(());
        };
        let span = Span {
            sequence: slot,
            start: self.arena.length(slot),
            tokens: std::iter::once(last).chain(fed.iter().copied()).collect(),
        };
        let mut next = forced.iter();
        self.backend.score(&span, &mut |_, logits| {
            let Some(&token) = next.next() else {
                return;
            };
            row.output_ids.push(token);
            row.logprob_sum += log_softmax_at(logits, token);
            row.trace_hash = row
                .trace_hash
                .map(|so_far| trace_hash(so_far, logits_hash(logits)));
        })?;
        self.arena.advance(slot, forced.len());
        Ok(())
    }
}
