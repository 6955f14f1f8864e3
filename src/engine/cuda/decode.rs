//! Decode steps: enqueued many at a time, collected when they have arrived.
//!
//! Tokens, positions, counts and stop flags live in the slots on the device, so a step needs
//! nothing of the host. A step of each bucket of rows is run once as it is, then captured as a
//! graph and replayed.

use super::backend::CudaBackend;
use super::buffer::Plain;
use super::forward::{Rows, Until};
use super::launch::SampleArgs;
use super::memory::bucket;
use super::sharing::{LiveRow, Sharing};
use crate::engine::{
    EngineError, PAGE_POSITIONS, SamplingParams, SequenceId, SlotStart, StopReason, TokenEvent,
};

use super::error::CudaError;

/// Steps enqueued between two looks at what has stopped.
pub const MAX_STEPS: usize = 16;

/// Stop ids of a slot.
pub const MAX_STOPS: usize = 32;

/// No slot, no page.
pub const NONE: u32 = u32::MAX;

/// As `Slot` in kernels/common.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slot {
    pub seed: u64,
    pub row_hash: u64,
    /// top-p as a share of 2^53.
    pub top_p_share: u64,
    pub live: u32,
    pub token: u32,
    pub position: u32,
    pub n_generated: u32,
    pub max_new_tokens: u32,
    pub sample: u32,
    pub temperature: f32,
    pub top_k: u32,
    pub keeps_p: u32,
    pub n_stop: u32,
    pub stop: [u32; MAX_STOPS],
}

// SAFETY: numbers alone, no padding (three u64, 42 words).
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for Slot {}

/// As `Event` in kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Event {
    pub logits_hash: u64,
    pub slot: u32,
    pub position: u32,
    pub token: u32,
    pub logprob: f32,
    pub state: u32,
    pub padding: u32,
}

// SAFETY: numbers alone, no padding.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for Event {}

/// States of an event.
const NO_ROW: u32 = 0;
const STOPPED: u32 = 3;
const LENGTH: u32 = 5;
const NOT_FINITE: u32 = 8;

/// What the host knows of a live slot.
#[derive(Clone, Copy, Debug)]
pub struct Decoding {
    pub max_new_tokens: usize,
    pub n_generated: usize,
}

/// Steps that are enqueued and not collected.
#[derive(Clone, Copy, Debug)]
pub struct Outstanding {
    n_steps: usize,
    n_rows: usize,
}

impl Slot {
    /// # Errors
    /// More stop ids than a slot holds.
    pub fn new(start: &SlotStart) -> Result<Self, CudaError> {
        let stops = &start.stop_tokens;
        if stops.len() > MAX_STOPS {
            return Err(CudaError::StopTokens {
                found: stops.len(),
                most: MAX_STOPS,
            });
        }
        let SamplingParams {
            temperature,
            top_p,
            top_k,
            seed,
        } = start.sampling;
        let mut stop = [NONE; MAX_STOPS];
        stop[..stops.len()].copy_from_slice(stops);
        Ok(Self {
            seed,
            row_hash: start.row_hash,
            // As `share` in engine/sample: a NaN or a negative share is 0.
            top_p_share: (f64::from(top_p) * (1u64 << 53) as f64) as u64,
            live: 1,
            token: start.token,
            position: start.position as u32,
            n_generated: 0,
            max_new_tokens: u32::try_from(start.max_new_tokens).unwrap_or(u32::MAX),
            sample: start.sample,
            temperature,
            top_k,
            keeps_p: u32::from(top_p < 1.0 || top_p.is_nan()),
            n_stop: stops.len() as u32,
            stop,
        })
    }
}

impl CudaBackend {
    /// Slots that the host knows to be live.
    fn live_slots(&self) -> Vec<u32> {
        let slots = self.sequences.iter().take(self.info.shape.n_slots);
        slots
            .enumerate()
            .filter(|(_, sequence)| sequence.decoding.is_some())
            .map(|(slot, _)| slot as u32)
            .collect()
    }

    /// Enqueues at most `n_steps` of all live slots, in calls of [`MAX_STEPS`].
    pub(super) fn enqueue_steps(&mut self, n_steps: usize) -> Result<(), EngineError> {
        let mut left = n_steps;
        while left > 0 {
            self.collect()?;
            if self.failed.is_some() {
                break;
            }
            let live = self.live_slots();
            let longest = live
                .iter()
                .filter_map(|&slot| self.sequences[slot as usize].decoding)
                .map(|decoding| decoding.max_new_tokens.saturating_sub(decoding.n_generated))
                .max();
            let Some(longest) = longest else {
                break;
            };
            let n = left.min(MAX_STEPS).min(longest.max(1));
            self.check_pages(&live, n);
            self.enqueue(&live, n)?;
            left -= n;
        }
        Ok(())
    }

    /// Steps write without asking, so their pages are mapped ahead.
    fn check_pages(&self, live: &[u32], n_steps: usize) {
        if self.geometry.n_full_layers == 0 {
            return;
        }
        for &slot in live {
            let sequence = &self.sequences[slot as usize];
            let Some(decoding) = sequence.decoding else {
                continue;
            };
            let remaining = decoding.max_new_tokens.saturating_sub(decoding.n_generated);
            let end = sequence.length + n_steps.min(remaining.max(1));
            let end = end.min(self.info.shape.max_context);
            let first = sequence.length / PAGE_POSITIONS;
            let pages = &self.pages_of(slot as usize)[first..end.div_ceil(PAGE_POSITIONS)];
            assert!(
                !pages.contains(&NONE),
                "a page of positions {}..{end} of slot {slot} is not mapped",
                sequence.length
            );
        }
    }

    fn enqueue(&mut self, live: &[u32], n_steps: usize) -> Result<(), EngineError> {
        let rows = self.prepare_rows(live)?;
        let n_rows = rows.n_rows();
        for _ in 0..n_steps {
            match self.graphs.get(&rows) {
                None => {
                    // The first one loads the kernels' code, which a capture may not.
                    self.step(rows)?;
                    self.graphs.insert(rows, None);
                }
                Some(None) => {
                    let calls = &self.loaded.kernels.calls;
                    let capture = || self.device.capture(|| self.step(rows));
                    let (graph, recorded) = calls.recorded(capture);
                    let graph = graph?;
                    graph.launch()?;
                    calls.add(&recorded);
                    self.graphs.insert(rows, Some((graph, recorded)));
                }
                Some(Some((graph, recorded))) => {
                    graph.launch()?;
                    self.loaded.kernels.calls.add(recorded);
                }
            }
        }
        self.work
            .events
            .download_async(n_steps * n_rows, &mut self.arrived)?;
        self.arrival.record()?;
        self.outstanding = Some(Outstanding { n_steps, n_rows });
        Ok(())
    }

    /// Uploads which slots a step has, and what they share.
    fn prepare_rows(&mut self, live: &[u32]) -> Result<Rows, EngineError> {
        let n_rows = bucket(live.len().max(1));
        let mut slot_of = live.to_vec();
        slot_of.resize(n_rows, NONE);
        self.upload_page_table()?;
        self.work.slot_of.upload(0, &slot_of)?;
        self.work.step.fill(0, 1, 0)?;
        let shares = self.upload_sharing(n_rows, live)?;
        Ok(Rows::Step { n_rows, shares })
    }

    /// Uploads the work items of pages that live slots share; false for none.
    fn upload_sharing(&self, n_rows: usize, live: &[u32]) -> Result<bool, EngineError> {
        if self.geometry.n_full_layers == 0 {
            return Ok(false);
        }
        let rows: Vec<LiveRow<'_>> = live
            .iter()
            .enumerate()
            .map(|(row, &slot)| {
                let whole = self.sequences[slot as usize].length / PAGE_POSITIONS;
                LiveRow {
                    row: row as u32,
                    sequence: slot,
                    pages: &self.pages_of(slot as usize)[..whole],
                }
            })
            .collect();
        let kernels = &self.loaded.kernels;
        let n_items = kernels.whole_items(self.loaded.model.config.n_kv_heads);
        let sharing = Sharing::new(n_rows, &rows, kernels.shared_rows(), n_items);
        // More than there is room for is a very bushy tree: every row then reads for itself.
        let n_items = sharing.items.len();
        if n_items == 0 || n_items > self.work.items.len() {
            return Ok(false);
        }
        self.work.items.upload(0, &sharing.items)?;
        self.work.n_items.upload(0, &[n_items as u32])?;
        self.work.shared.upload(0, &sharing.rows)?;
        Ok(true)
    }

    /// One step of `rows`, of which padding does nothing.
    fn step(&self, rows: Rows) -> Result<(), EngineError> {
        let pass = self.pass();
        let n_rows = rows.n_rows();
        pass.forward(rows, Until::Normed)?;
        pass.lm_head(0, n_rows, self.work.maxima.at(0))?;
        let args = SampleArgs {
            logits: self.work.logits.at(0),
            maxima: self.work.maxima.at(0),
            slots: self.work.slots.at(0),
            rows: self.work.rows.at(0),
            events: self.work.events.at(0),
            step: self.work.step.at(0),
            partials: self.work.sample_partials.at(0),
            n_parts: 0,
            n_vocab: self.info.n_vocab as u32,
            max_context: self.info.shape.max_context as u32,
            trace_hash: u32::from(self.options.trace_hash),
        };
        Ok(self.loaded.kernels.sample(&args, n_rows)?)
    }

    /// Times of each kernel in a step of the live slots, run outside a graph. The tokens it makes
    /// are not reported: for measuring alone.
    ///
    /// # Errors
    /// The driver fails.
    pub fn time_step(&mut self) -> Result<Vec<(String, usize, f64)>, EngineError> {
        self.collect()?;
        let rows = self.prepare_rows(&self.live_slots())?;
        self.loaded.kernels.timed(|| self.step(rows))
    }

    /// Whether enqueued steps are still under way.
    pub(super) fn is_under_way(&self) -> Result<bool, EngineError> {
        match self.outstanding {
            Some(_) => Ok(!self.arrival.is_past()?),
            None => Ok(false),
        }
    }

    /// Waits for the enqueued steps and books what they produced.
    pub(super) fn collect(&mut self) -> Result<(), EngineError> {
        let Some(Outstanding { n_steps, n_rows }) = self.outstanding.take() else {
            return Ok(());
        };
        self.arrival.wait()?;
        for event in &self.arrived.values()[..n_steps * n_rows] {
            if event.state == NO_ROW {
                continue;
            }
            let Some(sequence) = self.sequences.get_mut(event.slot as usize) else {
                continue;
            };
            if event.state == NOT_FINITE {
                sequence.decoding = None;
                self.failed.get_or_insert(EngineError::NotFinite {
                    slot: event.slot,
                    position: event.position as usize,
                });
                continue;
            }
            let stop = match event.state {
                STOPPED => Some(StopReason::Stop),
                LENGTH => Some(StopReason::Length),
                _ => None,
            };
            sequence.length = event.position as usize;
            match (&mut sequence.decoding, stop) {
                (Some(decoding), None) => decoding.n_generated += 1,
                (decoding, _) => *decoding = None,
            }
            self.ready.push(TokenEvent {
                slot: SequenceId(event.slot),
                position: event.position as usize,
                token: event.token,
                logprob: event.logprob,
                logits_hash: self.options.trace_hash.then_some(event.logits_hash),
                stop,
            });
        }
        Ok(())
    }
}
