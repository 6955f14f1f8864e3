//! A backend that answers from a table, for tests of everything around the engine.
//!
//! It stores the token of every (page, offset) as a real backend stores keys and values, and
//! checks the caller's bookkeeping as strictly as it can: pages are mapped before they are
//! written, a page with two owners is never written, spans start at the sequence's length, and
//! what a sequence reads back through its page table is what was written for it. A broken rule is
//! a bug above the seam, so it panics.
//!
//! Logits are a function of the tokens read back, so an error in paging that slips past the checks
//! still changes log-probabilities and hashes; teacher forcing gives those of generation.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::sample::{log_softmax_at, logits_hash, trace_hash};
use super::{
    Backend, BackendInfo, BackendMemory, EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId,
    SequenceId, SlotStart, Span, StopReason, TokenEvent, TokenId,
};

/// What a slot answers: from its prompt and start, the tokens it will produce. When they run out
/// without a stop token the first of the start's stop tokens follows.
type Answer = Box<dyn Fn(&[TokenId], &SlotStart) -> Vec<TokenId> + Send>;

/// Work done so far, for tests to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScriptedCounts {
    pub prefilled_tokens: usize,
    pub decoded_tokens: usize,
    pub forks: usize,
    pub starts: usize,
}

/// A [`Backend`] without a model.
pub struct ScriptedBackend {
    info: BackendInfo,
    answer: Answer,
    /// Token of each (page, offset); `None` was never written.
    cells: Vec<Option<TokenId>>,
    n_owners: Vec<u32>,
    sequences: Vec<Sequence>,
    pending: VecDeque<Vec<TokenEvent>>,
    failure: Option<EngineError>,
    not_finite: HashMap<(u64, usize), usize>,
    fails_in_decode: bool,
    step_delay: Duration,
    counts: ScriptedCounts,
}

#[derive(Default)]
struct Sequence {
    pages: Vec<PageId>,
    /// What was written for this sequence, whatever the pages hold now.
    tokens: Vec<TokenId>,
    live: Option<LiveSlot>,
}

struct LiveSlot {
    start: SlotStart,
    /// The token to feed next.
    token: TokenId,
    answer: Vec<TokenId>,
    n_produced: usize,
    stopped: bool,
}

impl ScriptedBackend {
    /// Answers `answers[prompt]`, or `default_answer` for any other prompt.
    pub fn new(
        shape: EngineShape,
        n_vocab: usize,
        answers: HashMap<Vec<TokenId>, Vec<TokenId>>,
        default_answer: Vec<TokenId>,
    ) -> Self {
        Self::from_fn(shape, n_vocab, move |prompt, _| {
            answers.get(prompt).unwrap_or(&default_answer).clone()
        })
    }

    /// Answers what `answer` makes of a prompt and its start (sample, seed, row hash).
    pub fn from_fn(
        shape: EngineShape,
        n_vocab: usize,
        answer: impl Fn(&[TokenId], &SlotStart) -> Vec<TokenId> + Send + 'static,
    ) -> Self {
        let n_sequences = shape.n_slots + shape.n_forks;
        Self {
            info: BackendInfo {
                numerics_id: "scripted".to_owned(),
                shape,
                n_vocab,
            },
            answer: Box::new(answer),
            cells: vec![None; shape.n_pages * PAGE_POSITIONS],
            n_owners: vec![0; shape.n_pages],
            sequences: (0..n_sequences).map(|_| Sequence::default()).collect(),
            pending: VecDeque::new(),
            failure: None,
            not_finite: HashMap::new(),
            fails_in_decode: false,
            step_delay: Duration::ZERO,
            counts: ScriptedCounts::default(),
        }
    }

    /// Makes the logits that would give the token at `position` of the row not finite, the first
    /// `n_times` they are computed.
    pub fn inject_not_finite(&mut self, row_hash: u64, position: usize, n_times: usize) {
        self.not_finite.insert((row_hash, position), n_times);
    }

    /// Whether an injected failure comes out of `decode` itself, with the tokens of the steps
    /// before it not yet polled, or out of `poll` after them (as at first).
    pub fn fail_in_decode(&mut self, at_once: bool) {
        self.fails_in_decode = at_once;
    }

    /// Sleeps this long in every decode step.
    pub fn set_step_delay(&mut self, delay: Duration) {
        self.step_delay = delay;
    }

    pub fn counts(&self) -> ScriptedCounts {
        self.counts
    }

    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        &mut self.sequences[id.0 as usize]
    }

    /// Writes one token at the end of a sequence.
    fn append(&mut self, id: SequenceId, token: TokenId) {
        let sequence = &mut self.sequences[id.0 as usize];
        let position = sequence.tokens.len();
        assert!(
            position < self.info.shape.max_context,
            "sequence {} goes beyond the context of {}",
            id.0,
            self.info.shape.max_context
        );
        let page = sequence.pages.get(position / PAGE_POSITIONS).copied();
        let page = page.unwrap_or_else(|| {
            panic!("position {position} of sequence {} has no page", id.0);
        });
        assert_eq!(
            self.n_owners[page.0 as usize], 1,
            "page {} is written by sequence {} while others hold it",
            page.0, id.0
        );
        assert!(
            (token as usize) < self.info.n_vocab,
            "token {token} is outside the vocabulary"
        );
        self.cells[page.0 as usize * PAGE_POSITIONS + position % PAGE_POSITIONS] = Some(token);
        sequence.tokens.push(token);
    }

    /// Reads a sequence back through its page table, as attention does; gives the hash of it.
    fn attend(&self, id: SequenceId) -> u64 {
        let sequence = &self.sequences[id.0 as usize];
        let mut hash = 0;
        for (position, &written) in sequence.tokens.iter().enumerate() {
            let page = sequence.pages[position / PAGE_POSITIONS];
            let cell = self.cells[page.0 as usize * PAGE_POSITIONS + position % PAGE_POSITIONS];
            assert_eq!(
                cell,
                Some(written),
                "sequence {} reads another token at position {position}",
                id.0
            );
            hash = trace_hash(hash, u64::from(written));
        }
        hash
    }

    /// The logits after a context with this hash.
    fn logits(&self, hash: u64) -> Vec<f32> {
        (0..self.info.n_vocab as u64)
            .map(|id| (trace_hash(hash, id) >> 48) as f32 / 8192.0)
            .collect()
    }

    /// One step of one live slot; `None` when it has stopped before.
    fn step_slot(&mut self, id: SequenceId) -> Result<Option<TokenEvent>, EngineError> {
        let Some(live) = self.sequence(id).live.as_ref().filter(|l| !l.stopped) else {
            return Ok(None);
        };
        let (token, row_hash) = (live.token, live.start.row_hash);
        self.append(id, token);
        let hash = self.attend(id);
        let position = self.sequence(id).tokens.len();
        if let Some(n_left) = self.not_finite.get_mut(&(row_hash, position))
            && *n_left > 0
        {
            *n_left -= 1;
            return Err(EngineError::NotFinite {
                slot: id.0,
                position,
            });
        }
        let logits = self.logits(hash);
        let max_context = self.info.shape.max_context;
        let live = self.sequences[id.0 as usize].live.as_mut();
        let live = live.expect("the slot was live a moment ago");
        let stop_tokens = &live.start.stop_tokens;
        let produced = live.answer.get(live.n_produced).copied();
        let produced = produced.unwrap_or_else(|| stop_tokens.first().copied().unwrap_or(0));
        live.n_produced += 1;
        live.token = produced;
        let stop = if stop_tokens.contains(&produced) {
            Some(StopReason::Stop)
        } else if live.n_produced >= live.start.max_new_tokens || position + 1 >= max_context {
            Some(StopReason::Length)
        } else {
            None
        };
        live.stopped = stop.is_some();
        self.counts.decoded_tokens += 1;
        Ok(Some(TokenEvent {
            slot: id,
            position,
            token: produced,
            logprob: log_softmax_at(&logits, produced),
            logits_hash: Some(logits_hash(&logits)),
            stop,
        }))
    }
}

impl Backend for ScriptedBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        self.n_owners[page.0 as usize] += 1;
        let pages = &mut self.sequence(sequence).pages;
        assert_eq!(
            index,
            pages.len(),
            "page table of sequence {} has a gap",
            sequence.0
        );
        pages.push(page);
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        let n_whole = fork.n_positions / PAGE_POSITIONS;
        let n_tail = fork.n_positions % PAGE_POSITIONS;
        self.attend(fork.from);
        let from = self.sequence(fork.from);
        assert_eq!(from.tokens.len(), fork.n_positions, "a fork takes all");
        let (pages, tokens) = (from.pages.clone(), from.tokens.clone());
        let to = self.sequence(fork.to);
        assert!(
            to.tokens.is_empty() && to.live.is_none(),
            "sequence {} was not cleared before a fork into it",
            fork.to.0
        );
        assert_eq!(
            to.pages.get(..n_whole),
            pages.get(..n_whole),
            "whole pages are shared"
        );
        assert_eq!(
            fork.tail,
            (n_tail > 0).then(|| (pages[n_whole], to.pages[n_whole])),
            "the tail is the pair of last pages"
        );
        to.tokens = tokens;
        if let Some((source, copy)) = fork.tail {
            assert_ne!(source, copy, "the copy of a tail is private");
            assert_eq!(self.n_owners[copy.0 as usize], 1, "a tail's copy is shared");
            let source = source.0 as usize * PAGE_POSITIONS;
            let copy = copy.0 as usize * PAGE_POSITIONS;
            self.cells.copy_within(source..source + n_tail, copy);
        }
        self.counts.forks += 1;
        Ok(())
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        for span in spans {
            let sequence = self.sequence(span.sequence);
            assert!(sequence.live.is_none(), "a live slot is not prefilled");
            assert_eq!(span.start, sequence.tokens.len(), "a span goes on");
            for &token in span.tokens.iter() {
                self.append(span.sequence, token);
            }
            self.attend(span.sequence);
            self.counts.prefilled_tokens += span.tokens.len();
        }
        Ok(())
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        assert!(
            (start.slot.0 as usize) < self.info.shape.n_slots,
            "only slots are started"
        );
        let sequence = &mut self.sequences[start.slot.0 as usize];
        // A slot that has stopped may go on from where it is.
        let is_live = sequence.live.as_ref().is_some_and(|live| !live.stopped);
        assert!(!is_live, "slot {} is live", start.slot.0);
        assert_eq!(sequence.tokens.len(), start.position, "a start goes on");
        let mut prompt = sequence.tokens.clone();
        prompt.push(start.token);
        sequence.live = Some(LiveSlot {
            start: start.clone(),
            token: start.token,
            answer: (self.answer)(&prompt, start),
            n_produced: 0,
            stopped: false,
        });
        self.counts.starts += 1;
        Ok(())
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        for _ in 0..n_steps {
            std::thread::sleep(self.step_delay);
            let mut events = Vec::new();
            for slot in 0..self.info.shape.n_slots as u32 {
                match self.step_slot(SequenceId(slot)) {
                    Ok(event) => events.extend(event),
                    Err(error) if self.fails_in_decode => return Err(error),
                    Err(error) => {
                        self.failure = Some(error);
                        return Ok(());
                    }
                }
            }
            self.pending.push_back(events);
        }
        Ok(())
    }

    /// Reports one step a call, as a device that runs behind would.
    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        match self.pending.pop_front() {
            Some(step) => events.extend(step),
            None => {
                if let Some(failure) = self.failure.take() {
                    return Err(failure);
                }
            }
        }
        Ok(self.pending.is_empty() && self.failure.is_none())
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        for &id in sequences {
            let emptied = std::mem::take(self.sequence(id));
            for page in emptied.pages {
                self.n_owners[page.0 as usize] -= 1;
            }
        }
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        for (offset, &token) in span.tokens.iter().enumerate() {
            assert_eq!(
                span.start + offset,
                self.sequence(span.sequence).tokens.len(),
                "a span goes on"
            );
            self.append(span.sequence, token);
            let hash = self.attend(span.sequence);
            visit(span.start + offset, &self.logits(hash));
        }
        Ok(())
    }

    fn memory(&self) -> BackendMemory {
        BackendMemory {
            weights_bytes: 0,
            kv_bytes: (self.cells.len() * size_of::<Option<TokenId>>()) as u64,
            workspace_bytes: 0,
        }
    }
}
