//! Rows that start again: evicted for lack of pages, or with logits that were not finite. A row
//! begins anew from its prompt, so its tokens are those it would have had.

use super::{GenerateError, JobError, Run};
use crate::engine::{EngineError, SequenceId};

/// Times a row's logits may be not finite before it is given up.
const MAX_ROW_FAILURES: u8 = 2;

/// Failures without a finished row between them after which all live rows are given up: the
/// fault is then not one row's, and redoing the batch for each would take forever.
pub(super) const MAX_FAILURES_IN_A_ROW: usize = 8;

impl Run<'_> {
    pub(super) fn evict_youngest(&mut self) {
        let youngest = self.live().max_by_key(|(_, row)| row.age);
        let Some(slot) = youngest.map(|(slot, _)| slot) else {
            return;
        };
        if let Some(row) = self.vacate(slot) {
            self.redo(row.job);
            self.n_evicted += 1;
        }
    }

    /// Puts a job back to the head of the queue, to start from its prompt.
    fn redo(&mut self, job: usize) {
        self.queue.push_front(job);
        self.prefixes.expect_job(&self.batch, job);
    }

    /// After logits that were not finite: all live rows start again on fresh state, but for the
    /// row at fault if it was so before.
    pub(super) fn recover(&mut self, slot: u32, position: usize) -> Result<(), GenerateError> {
        let error = || EngineError::NotFinite { slot, position };
        let at_fault = self.slots.get(slot as usize).and_then(Option::as_ref);
        let Some(at_fault) = at_fault.map(|row| row.job) else {
            return Err(error().into());
        };
        self.n_failures[at_fault] += 1;
        self.failures_in_a_row += 1;
        let give_up_all = self.failures_in_a_row >= MAX_FAILURES_IN_A_ROW;
        let mut slots: Vec<(u64, SequenceId)> =
            self.live().map(|(slot, row)| (row.age, slot)).collect();
        slots.sort_unstable_by(|a, b| b.cmp(a));
        for (_, slot) in slots {
            let Some(row) = self.vacate(slot) else {
                continue;
            };
            let is_lost = row.job == at_fault && self.n_failures[at_fault] >= MAX_ROW_FAILURES;
            if is_lost || give_up_all {
                self.fail(row.job, JobError::Engine(error()));
            } else {
                self.redo(row.job);
            }
        }
        self.drop_all_prefixes();
        if give_up_all {
            self.failures_in_a_row = 0;
        }
        Ok(())
    }
}
