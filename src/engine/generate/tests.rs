mod headroom;
mod stages;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use proptest::prelude::*;

use super::redo::MAX_FAILURES_IN_A_ROW;
use super::*;
use crate::engine::sample::logits_hash;
use crate::engine::scripted::ScriptedBackend;

const STOP: TokenId = 1;
const N_VOCAB: usize = 100;

/// Collects everything; may raise the stop flag after some rows.
#[derive(Default)]
struct Collect<'a> {
    finished: BTreeMap<(usize, u32), Generation>,
    failed: BTreeMap<(usize, u32), JobError>,
    steps: Vec<StepReport>,
    stop_after: Option<(usize, &'a AtomicBool)>,
}

impl Observer for Collect<'_> {
    fn finished(&mut self, generation: Generation) {
        let at = (generation.row, generation.sample);
        let doubled = self.finished.insert(at, generation);
        assert!(doubled.is_none(), "{at:?} finished twice");
        if let Some((n, flag)) = self.stop_after {
            flag.store(self.finished.len() >= n, Ordering::Relaxed);
        }
    }

    fn failed(&mut self, row: usize, sample: u32, error: JobError) {
        let doubled = self.failed.insert((row, sample), error);
        assert!(doubled.is_none(), "row {row} failed twice");
    }

    fn step(&mut self, report: &StepReport) {
        self.steps.push(*report);
    }
}

/// Tokens, bits of the log-probability sum, stop reason, trace hash.
type Output = (Vec<TokenId>, u32, StopReason, Option<u64>);

impl Collect<'_> {
    /// What must not depend on the schedule.
    fn outputs(&self) -> BTreeMap<(usize, u32), Output> {
        let output = |g: &Generation| {
            let bits = g.logprob_sum.to_bits();
            (g.output_ids.clone(), bits, g.stop, g.trace_hash)
        };
        self.finished
            .iter()
            .map(|(&at, g)| (at, output(g)))
            .collect()
    }

    fn n_evicted(&self) -> usize {
        self.steps.iter().map(|s| s.n_evicted).sum()
    }
}

/// The first (row, sample) whose outputs differ: the outputs themselves fill a screen.
fn first_difference(
    a: &BTreeMap<(usize, u32), Output>,
    b: &BTreeMap<(usize, u32), Output>,
) -> Option<(usize, u32)> {
    let differs = |at: &&(usize, u32)| a.get(at) != b.get(at);
    a.keys().chain(b.keys()).find(differs).copied()
}

fn shape(n_slots: usize, n_forks: usize, n_pages: usize) -> EngineShape {
    EngineShape {
        n_slots,
        n_forks,
        n_pages,
        max_context: 1000,
        prefill_rows: 128,
    }
}

/// Answers of 0 to 399 tokens that depend on prompt and sample.
fn backend(shape: EngineShape) -> ScriptedBackend {
    ScriptedBackend::from_fn(shape, N_VOCAB, |prompt, start| {
        let mut hash = u64::from(start.sample);
        for &token in prompt {
            hash = trace_hash(hash, u64::from(token));
        }
        let n_tokens = hash % 400;
        (0..n_tokens)
            .map(|i| 2 + (trace_hash(hash, i) % 90) as TokenId)
            .collect()
    })
}

/// Rows of a 300-token system prompt, one of three 40-token few-shot parts and an own part.
fn jobs(n_rows: usize, n_samples: u32) -> Vec<Job> {
    let mut jobs = Vec::new();
    for row in 0..n_rows {
        let mut prompt = vec![2; 300];
        prompt.extend([3 + (row % 3) as TokenId; 40]);
        prompt.extend((0..20 + row % 7).map(|i| 10 + ((i * 7 + row) % 80) as TokenId));
        let prompt: Arc<[TokenId]> = prompt.into();
        for sample in 0..n_samples {
            jobs.push(Job {
                row,
                sample,
                prompt: prompt.clone(),
                max_new_tokens: 350,
                row_hash: row as u64,
                may_go_on: false,
            });
        }
    }
    jobs
}

fn options() -> GenerateOptions {
    GenerateOptions::new(SamplingParams::default(), [STOP].into())
}

fn run_on(
    backend: &mut ScriptedBackend,
    jobs: Vec<Job>,
    options: &GenerateOptions,
) -> Collect<'static> {
    let mut collect = Collect::default();
    let never = AtomicBool::new(false);
    let outcome = generate(backend, jobs, options, &never, &mut collect);
    assert_eq!(outcome.expect("the scripted backend"), Outcome::Complete);
    collect
}

fn run(shape: EngineShape, jobs: Vec<Job>, options: &GenerateOptions) -> Collect<'static> {
    run_on(&mut backend(shape), jobs, options)
}

/// One slot, no sharing, nothing that could go wrong: what all schedules must equal.
fn plain(jobs: Vec<Job>) -> Collect<'static> {
    let options = GenerateOptions {
        refill: false,
        prefix_reuse: false,
        steps_per_call: 1,
        ..options()
    };
    run(shape(1, 0, 4), jobs, &options)
}

#[test]
fn outputs_do_not_depend_on_slots_refill_or_reuse() {
    let expected = plain(jobs(12, 2)).outputs();
    assert_eq!(expected.len(), 24);
    assert!(expected.values().any(|g| g.2 == StopReason::Length));
    assert!(expected.values().any(|g| g.2 == StopReason::Stop));
    for n_slots in [1, 3, 64] {
        for (refill, prefix_reuse) in [(true, true), (true, false), (false, true)] {
            let options = GenerateOptions {
                refill,
                prefix_reuse,
                ..options()
            };
            let got = run(shape(n_slots, 5, n_slots * 4 + 5), jobs(12, 2), &options);
            assert_eq!(
                first_difference(&got.outputs(), &expected),
                None,
                "{n_slots} slots, refill {refill}, reuse {prefix_reuse}"
            );
            assert_eq!(got.n_evicted(), 0);
        }
    }
}

#[test]
fn rows_evicted_for_lack_of_pages_give_the_same_outputs() {
    let expected = plain(jobs(12, 2)).outputs();
    let mut n_evicted = 0;
    for n_pages in [3, 4, 5, 7, 9] {
        for n_forks in [0, 1, 4] {
            let got = run(shape(8, n_forks, n_pages), jobs(12, 2), &options());
            assert_eq!(
                first_difference(&got.outputs(), &expected),
                None,
                "{n_pages} pages, {n_forks} forks"
            );
            n_evicted += got.n_evicted();
        }
    }
    assert!(n_evicted > 0, "no arena was small enough to evict a row");
}

#[test]
fn shared_prefixes_are_computed_once() {
    let n_prompt_tokens: usize = jobs(12, 4).iter().map(|j| j.prompt.len() - 1).sum();
    let mut shared = backend(shape(8, 6, 60));
    let with_reuse = run_on(&mut shared, jobs(12, 4), &options());
    let counts = shared.counts();
    // The system prompt once, three few-shot parts, twelve rows' own parts.
    let own: usize = (0..12).map(|row| 19 + row % 7).sum();
    assert_eq!(counts.prefilled_tokens, 300 + 3 * 40 + own);
    assert_eq!(counts.forks, 3 + 12 + 48);
    let n_reused: usize = with_reuse.finished.values().map(|g| g.reused_tokens).sum();
    assert_eq!(n_reused + counts.prefilled_tokens, n_prompt_tokens);
    let n_logged: usize = with_reuse.steps.iter().map(|s| s.reused_tokens).sum();
    assert_eq!(n_logged, n_reused);

    let mut alone = backend(shape(8, 6, 60));
    let options = GenerateOptions {
        prefix_reuse: false,
        ..options()
    };
    let without = run_on(&mut alone, jobs(12, 4), &options);
    assert_eq!(alone.counts().forks, 0);
    assert_eq!(alone.counts().prefilled_tokens, n_prompt_tokens);
    assert!(without.finished.values().all(|g| g.reused_tokens == 0));
    assert_eq!(
        first_difference(&without.outputs(), &with_reuse.outputs()),
        None
    );
}

#[test]
fn a_static_batch_starts_rows_only_when_none_is_live() {
    let options = GenerateOptions {
        refill: false,
        prefix_reuse: false,
        ..options()
    };
    let got = run(shape(4, 0, 30), jobs(10, 1), &options);
    let mut n_live = 0;
    for step in &got.steps {
        if step.kind == StepKind::Prefill {
            assert_eq!(n_live, 0);
        }
        n_live = step.n_live;
    }
    let refilled = run(shape(4, 2, 30), jobs(10, 1), &self::options());
    let padded = |c: &Collect| c.steps.iter().map(|s| s.padded_row_steps).sum::<usize>();
    assert!(padded(&refilled) < padded(&got), "refill fills empty slots");
}

#[test]
fn counts_of_all_passes_add_up() {
    let got = run(shape(5, 3, 40), jobs(9, 2), &options());
    let n_tokens: usize = got.finished.values().map(|g| g.output_ids.len()).sum();
    let decodes = || got.steps.iter().filter(|s| s.kind == StepKind::Decode);
    assert_eq!(decodes().map(|s| s.tokens).sum::<usize>(), n_tokens);
    assert!(decodes().all(|s| (s.live_row_steps + s.padded_row_steps).is_multiple_of(5)));
    assert_eq!(
        got.steps.last().map(|s| (s.n_live, s.queue_len)),
        Some((0, 0))
    );
}

#[test]
fn a_stop_keeps_what_is_done_and_leaves_the_backend_usable() {
    let flag = AtomicBool::new(false);
    let mut backend = backend(shape(3, 4, 30));
    let mut collect = Collect {
        stop_after: Some((4, &flag)),
        ..Collect::default()
    };
    let outcome = generate(&mut backend, jobs(12, 2), &options(), &flag, &mut collect);
    assert_eq!(outcome.expect("the scripted backend"), Outcome::Stopped);
    let n_done = collect.finished.len();
    assert!((4..24).contains(&n_done), "{n_done} rows were done");

    let rest = jobs(12, 2)
        .into_iter()
        .filter(|job| !collect.finished.contains_key(&(job.row, job.sample)))
        .collect();
    let mut all = collect.outputs();
    all.extend(run_on(&mut backend, rest, &options()).outputs());
    assert_eq!(first_difference(&all, &plain(jobs(12, 2)).outputs()), None);
}

#[test]
fn a_stop_in_the_midst_of_a_refill_ends_the_run() {
    // With one fork sequence a refill works off its rows in several rounds; the flag is raised
    // when the n-th row starts, so a later round of the same refill is cut short.
    for (n_forks, n_pages) in [(1, 40), (2, 40), (3, 12)] {
        for n_starts in 1..6 {
            let flag = Arc::new(AtomicBool::new(false));
            let (raise, started) = (flag.clone(), AtomicUsize::new(0));
            let shape = shape(8, n_forks, n_pages);
            let mut backend = ScriptedBackend::from_fn(shape, N_VOCAB, move |_, _| {
                let n = started.fetch_add(1, Ordering::Relaxed) + 1;
                raise.store(n >= n_starts, Ordering::Relaxed);
                vec![5; 20]
            });
            let mut collect = Collect::default();
            let outcome = generate(&mut backend, jobs(12, 2), &options(), &flag, &mut collect);
            assert_eq!(outcome.expect("the scripted backend"), Outcome::Stopped);
            assert!(backend.counts().starts < 24);
        }
    }
}

#[test]
fn a_deadline_ends_the_run() {
    let mut backend = backend(shape(2, 2, 30));
    backend.set_step_delay(Duration::from_millis(2));
    let options = GenerateOptions {
        deadline: Some(Instant::now() + Duration::from_millis(30)),
        ..options()
    };
    let mut collect = Collect::default();
    let never = AtomicBool::new(false);
    let outcome = generate(&mut backend, jobs(12, 2), &options, &never, &mut collect);
    assert_eq!(
        outcome.expect("the scripted backend"),
        Outcome::DeadlineReached
    );
    assert!(collect.finished.len() < 24);
}

#[test]
fn a_row_not_finite_once_is_redone_with_its_batch() {
    let expected = plain(jobs(12, 2)).outputs();
    let mut backend = backend(shape(5, 3, 40));
    backend.inject_not_finite(4, 370, 1);
    backend.inject_not_finite(7, 365, 1);
    let got = run_on(&mut backend, jobs(12, 2), &options());
    assert!(got.failed.is_empty());
    let mut undisturbed = self::backend(shape(5, 3, 40));
    run_on(&mut undisturbed, jobs(12, 2), &options());
    let n_more = backend.counts().prefilled_tokens - undisturbed.counts().prefilled_tokens;
    assert!(n_more > 2 * 300, "shared prefixes are computed again, too");
    assert_eq!(first_difference(&got.outputs(), &expected), None);
}

#[test]
fn a_row_not_finite_twice_fails_alone() {
    let mut backend = backend(shape(5, 3, 40));
    backend.inject_not_finite(4, 370, usize::MAX);
    let got = run_on(&mut backend, jobs(12, 1), &options());
    let failed: Vec<_> = got.failed.keys().collect();
    assert_eq!(failed, [&(4, 0)]);
    assert!(matches!(
        got.failed[&(4, 0)],
        JobError::Engine(EngineError::NotFinite { position: 370, .. })
    ));
    let mut expected = plain(jobs(12, 1)).outputs();
    expected.remove(&(4, 0));
    assert_eq!(first_difference(&got.outputs(), &expected), None);
}

#[test]
fn a_model_that_is_never_finite_fails_all_rows_soon() {
    let mut backend = backend(shape(8, 3, 60));
    for job in jobs(40, 1) {
        backend.inject_not_finite(job.row_hash, job.prompt.len(), usize::MAX);
    }
    let got = run_on(&mut backend, jobs(40, 1), &options());
    assert_eq!(got.failed.len(), 40);
    let n_starts = backend.counts().starts;
    assert!(n_starts <= 40 * MAX_FAILURES_IN_A_ROW, "{n_starts} starts");
}

#[test]
fn jobs_without_room_are_reported_before_the_run() {
    let job = |row, n_prompt: usize, max_new_tokens| Job {
        row,
        sample: 0,
        prompt: vec![5; n_prompt].into(),
        max_new_tokens,
        row_hash: 0,
        may_go_on: false,
    };
    let jobs = vec![job(0, 1000, 5), job(1, 0, 5), job(2, 999, 5), job(3, 9, 0)];
    let got = run(shape(2, 0, 8), jobs, &options());
    assert!(matches!(
        got.failed[&(0, 0)],
        JobError::TooLong {
            needed: 1001,
            holds: 1000
        }
    ));
    assert!(matches!(got.failed[&(1, 0)], JobError::EmptyPrompt));
    assert_eq!(
        got.finished[&(2, 0)].output_ids.len(),
        1,
        "the context's end"
    );
    assert_eq!(got.finished[&(2, 0)].stop, StopReason::Length);
    assert!(got.finished[&(3, 0)].output_ids.is_empty());
    assert_eq!(got.finished.len() + got.failed.len(), 4);
}

#[test]
fn a_prompt_of_one_token_needs_no_prefill() {
    let job = Job {
        row: 0,
        sample: 0,
        prompt: [7].into(),
        max_new_tokens: 3,
        row_hash: 0,
        may_go_on: false,
    };
    let mut backend = ScriptedBackend::new(shape(2, 0, 2), 10, Default::default(), vec![5, 6, 7]);
    let got = run_on(&mut backend, vec![job], &options());
    assert_eq!(got.finished[&(0, 0)].output_ids, [5, 6, 7]);
    assert_eq!(backend.counts().prefilled_tokens, 0);
    assert!(
        run_on(&mut backend, Vec::new(), &options())
            .steps
            .is_empty()
    );
}

#[test]
fn a_job_larger_than_the_arena_is_an_error_value() {
    let never = AtomicBool::new(false);
    let result = generate(
        &mut backend(shape(2, 0, 2)),
        jobs(1, 1),
        &options(),
        &never,
        &mut Collect::default(),
    );
    assert!(matches!(
        result,
        Err(GenerateError::ArenaTooSmall {
            row: 0,
            needed: 3,
            n_pages: 2
        })
    ));
}

#[test]
fn forced_log_probabilities_equal_those_of_generation() {
    let mut backend = backend(shape(4, 3, 30));
    let got = run_on(&mut backend, jobs(6, 1), &options());
    for job in jobs(6, 1) {
        let generation = &got.finished[&(job.row, 0)];
        let forced = forced_logprobs(&mut backend, &job.prompt, &generation.output_ids);
        let mut sum = 0.0f32;
        for logprob in forced.expect("it fits") {
            sum += logprob;
        }
        assert_eq!(sum.to_bits(), generation.logprob_sum.to_bits());
        let mut trace = 0;
        let fed: Vec<TokenId> = job
            .prompt
            .iter()
            .chain(&generation.output_ids)
            .copied()
            .collect();
        let (fed, first) = (&fed[..fed.len() - 1], job.prompt.len() - 1);
        score_tokens(&mut backend, fed, first, &mut |_, logits| {
            trace = trace_hash(trace, logits_hash(logits));
        })
        .expect("it fits");
        assert_eq!(generation.trace_hash, Some(trace));
    }
}

#[test]
fn forced_tokens_are_scored_after_their_whole_context() {
    let mut backend = backend(shape(2, 0, 4));
    let prompt: Vec<TokenId> = (2..70).collect();
    let output: Vec<TokenId> = (5..40).collect();
    let forced = forced_logprobs(&mut backend, &prompt, &output).expect("it fits");
    assert_eq!(forced.len(), output.len());
    let again = forced_logprobs(&mut backend, &prompt, &output[..20]).expect("it fits");
    assert_eq!(again, forced[..20], "a longer text does not change a score");
    assert!(matches!(
        forced_logprobs(&mut backend, &vec![2; 1200], &output),
        Err(ForcedError::Job(JobError::TooLong { .. }))
    ));
    assert!(matches!(forced_logprobs(&mut backend, &[], &[]), Ok(l) if l.is_empty()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_shape_gives_the_same_outputs(
        n_slots in 1usize..20,
        n_forks in 0usize..6,
        n_pages in 3usize..40,
        prefill_rows in 1usize..400,
        steps_per_call in 1usize..12,
        refill: bool,
        fail_at_once: bool,
        // At most one a row: a second one fails the row, as it should.
        failures in prop::collection::btree_map(0u64..8, 330usize..500, 0..3),
    ) {
        let expected = plain(jobs(8, 3)).outputs();
        let shape = EngineShape { prefill_rows, ..shape(n_slots, n_forks, n_pages) };
        let options = GenerateOptions { refill, steps_per_call, ..options() };
        let mut backend = backend(shape);
        backend.fail_in_decode(fail_at_once);
        for (row_hash, position) in failures {
            backend.inject_not_finite(row_hash, position, 1);
        }
        let got = run_on(&mut backend, jobs(8, 3), &options);
        prop_assert!(got.failed.is_empty());
        prop_assert_eq!(first_difference(&got.outputs(), &expected), None);
    }
}
