//! A row's tokens, log-probabilities and logits are a function of the row alone: every schedule
//! of the loop over the CPU backend gives the same bits, with all unused memory full of NaN. Half
//! of the rows have a second stage, and all of them a headroom at which some are closed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use podium::batch::Job;
use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::generate::{
    GenerateOptions, Generation, JobError, Observer, Outcome, StepReport, forced_logprobs, generate,
};
use podium::engine::sample::philox4x32;
use podium::engine::{EngineShape, SamplingParams, TokenId};

#[derive(Default)]
struct Collect {
    prompts: BTreeMap<usize, Arc<[TokenId]>>,
    /// First stages of the rows that have a second one.
    first: BTreeMap<(usize, u32), Generation>,
    finished: BTreeMap<(usize, u32), Generation>,
    n_evicted: usize,
    n_reused: usize,
}

impl Observer for Collect {
    fn finished(&mut self, generation: Generation) {
        self.finished
            .insert((generation.row, generation.sample), generation);
    }

    fn failed(&mut self, row: usize, sample: u32, error: JobError) {
        panic!("row {row}, sample {sample}: {error}");
    }

    fn step(&mut self, report: &StepReport) {
        self.n_evicted += report.n_evicted;
        self.n_reused += report.reused_tokens;
    }

    /// The first prompt, a part of the reply, another turn.
    fn next_stage(&mut self, first: &Generation) -> Option<Job> {
        let prompt = self.prompts[&first.row].iter();
        let reply = first.output_ids.iter().take(20);
        self.first.insert((first.row, first.sample), first.clone());
        Some(Job {
            row: first.row,
            sample: first.sample,
            prompt: prompt.chain(reply).chain(&[3; 15]).copied().collect(),
            max_new_tokens: 70,
            row_hash: 77 * first.row as u64 + 1,
            may_go_on: false,
        })
    }

    fn at_headroom(&mut self, _row: usize, output_ids: &[TokenId]) -> Vec<TokenId> {
        match output_ids.last() {
            Some(last) if last % 3 > 0 => vec![1, 2, 3, 4],
            _ => Vec::new(),
        }
    }
}

/// A stage's (row, sample), tokens, bits of the log-probability sum and trace hash.
type Output = ((usize, u32), Vec<TokenId>, u32, Option<u64>);

const HEADROOM: usize = 25;

impl Collect {
    fn outputs(&self) -> Vec<Output> {
        self.finished
            .iter()
            .chain(&self.first)
            .map(|(&at, g)| {
                (
                    at,
                    g.output_ids.clone(),
                    g.logprob_sum.to_bits(),
                    g.trace_hash,
                )
            })
            .collect()
    }
}

/// Rows with a common beginning of 270 tokens (more than a page), a few-shot part and an own
/// part, two samples each.
fn jobs(n_vocab: usize) -> Vec<Job> {
    let token = |i: usize, stream: u32| -> TokenId {
        philox4x32([i as u32, stream, 0, 0], [1, 2])[0] % n_vocab as u32
    };
    let mut jobs = Vec::new();
    for row in 0..6usize {
        let common = (0..270).map(|i| token(i, 0));
        let shots = (0..33).map(|i| token(i, 1 + row as u32 % 2));
        let own = (0..5 + 9 * row).map(|i| token(i, 10 + row as u32));
        let prompt: Arc<[TokenId]> = common.chain(shots).chain(own).collect();
        for sample in 0..2 {
            jobs.push(Job {
                row,
                sample,
                prompt: prompt.clone(),
                max_new_tokens: 60 + 90 * (row % 3),
                row_hash: 77 * row as u64,
                may_go_on: row % 2 == 0,
            });
        }
    }
    jobs
}

struct Schedule {
    n_slots: usize,
    n_forks: usize,
    n_pages: usize,
    prefill_rows: usize,
    n_threads: usize,
    refill: bool,
}

fn run(folder: &Path, exact: bool, schedule: &Schedule) -> Collect {
    let checkpoint = Checkpoint::open(folder).expect("a golden checkpoint opens");
    let shape = EngineShape {
        n_slots: schedule.n_slots,
        n_forks: schedule.n_forks,
        n_pages: schedule.n_pages,
        max_context: 600,
        prefill_rows: schedule.prefill_rows,
    };
    let options = CpuOptions {
        n_threads: schedule.n_threads,
        exact,
        trace_hash: true,
        poison: true,
    };
    let mut backend = CpuBackend::open(&checkpoint, Precision::Stored, shape, options)
        .expect("a golden checkpoint loads");
    let sampling = SamplingParams {
        temperature: 1.0,
        top_p: 0.95,
        top_k: 40,
        seed: 5,
    };
    let options = GenerateOptions {
        refill: schedule.refill,
        answer_headroom: HEADROOM,
        // No stop tokens: rows end by their budgets, some of them beyond a second page.
        ..GenerateOptions::new(sampling, [].into())
    };
    let jobs = jobs(checkpoint.config().n_vocab);
    let mut collect = Collect {
        prompts: jobs.iter().map(|j| (j.row, j.prompt.clone())).collect(),
        ..Collect::default()
    };
    let never = AtomicBool::new(false);
    let outcome = generate(&mut backend, jobs.clone(), &options, &never, &mut collect)
        .expect("the CPU backend generates");
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(collect.finished.len(), jobs.len());
    // Teacher forcing on the same backend gives the logged log-probabilities.
    for job in jobs.iter().step_by(5) {
        let at = (job.row, job.sample);
        let generation = collect.first.get(&at).unwrap_or(&collect.finished[&at]);
        let forced = forced_logprobs(&mut backend, &job.prompt, &generation.output_ids)
            .expect("the row fits");
        let sum = forced.iter().fold(0.0f32, |sum, logprob| sum + logprob);
        assert_eq!(sum.to_bits(), generation.logprob_sum.to_bits(), "forced");
    }
    collect
}

fn assert_invariant(name: &str, exact: bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/logits")
        .join(name);
    let schedule = |n_slots, n_forks, n_pages, prefill_rows, n_threads, refill| Schedule {
        n_slots,
        n_forks,
        n_pages,
        prefill_rows,
        n_threads,
        refill,
    };
    let plain = run(&folder, exact, &schedule(1, 0, 3, 64, 1, false));
    assert_eq!(plain.first.len(), 6, "half of the rows have two stages");
    let forced = plain.finished.values().filter(|g| g.forced.is_some());
    assert!((1..12).contains(&forced.count()), "some rows are closed");
    let expected = plain.outputs();
    let schedules = [
        schedule(1, 6, 12, 1, 2, true),
        schedule(3, 4, 20, 7, 1, true),
        schedule(3, 4, 20, 300, 2, false),
        schedule(5, 2, 6, 100, 2, true),
        schedule(5, 0, 8, 100, 2, true),
        schedule(12, 0, 36, 128, 2, true),
        schedule(12, 10, 50, 512, 3, true),
    ];
    let (mut n_evicted, mut n_reused) = (0, 0);
    for (at, schedule) in schedules.iter().enumerate() {
        let got = run(&folder, exact, schedule);
        n_evicted += got.n_evicted;
        n_reused += got.n_reused;
        for (got, expected) in got.outputs().iter().zip(&expected) {
            assert_eq!(got, expected, "{name}, exact {exact}, schedule {at}");
        }
    }
    assert!(n_evicted > 0, "a schedule evicts rows");
    assert!(n_reused > 0, "a schedule shares prefixes");
}

#[test]
fn outputs_do_not_depend_on_the_schedule() {
    for name in ["plain", "odd"] {
        assert_invariant(name, false);
    }
}

#[test]
fn exact_outputs_do_not_depend_on_the_schedule() {
    assert_invariant("pages", true);
}
