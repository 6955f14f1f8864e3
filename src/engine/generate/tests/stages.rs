//! Rows of two stages: each stage is what it would be as a row of its own, whatever the schedule.

use super::*;

/// Rows of [`jobs`] that may have a second stage: some rows have one stage alone.
fn two_stage_jobs(n_rows: usize, n_samples: u32) -> Vec<Job> {
    let mut jobs = jobs(n_rows, n_samples);
    for job in &mut jobs {
        job.may_go_on = job.row % 4 != 3;
    }
    jobs
}

/// The second stage of a first one; some first stages have none after all.
fn second(prompt: &[TokenId], first: &Generation) -> Option<Job> {
    if first.output_ids.len().is_multiple_of(5) {
        return None;
    }
    let reply = first.output_ids.iter().take(30);
    let turn = [60; 12];
    Some(Job {
        row: first.row,
        sample: first.sample,
        prompt: prompt.iter().chain(reply).chain(&turn).copied().collect(),
        max_new_tokens: 150,
        row_hash: 1_000 + first.row as u64,
        may_go_on: false,
    })
}

#[derive(Default)]
struct TwoStages<'a> {
    prompts: BTreeMap<usize, Arc<[TokenId]>>,
    first: BTreeMap<(usize, u32), Generation>,
    last: Collect<'a>,
    /// Raises a flag when so many first stages are done.
    stop_after: Option<(usize, &'a AtomicBool)>,
}

impl Observer for TwoStages<'_> {
    fn finished(&mut self, generation: Generation) {
        self.last.finished(generation);
    }

    fn failed(&mut self, row: usize, sample: u32, error: JobError) {
        self.last.failed(row, sample, error);
    }

    fn step(&mut self, report: &StepReport) {
        self.last.step(report);
    }

    fn next_stage(&mut self, generation: &Generation) -> Option<Job> {
        let next = second(&self.prompts[&generation.row], generation)?;
        let at = (generation.row, generation.sample);
        let doubled = self.first.insert(at, generation.clone());
        assert!(doubled.is_none(), "{at:?} ended its first stage twice");
        if let Some((n, flag)) = self.stop_after {
            flag.store(self.first.len() >= n, Ordering::Relaxed);
        }
        Some(next)
    }
}

impl<'a> TwoStages<'a> {
    fn of(jobs: &[Job]) -> Self {
        Self {
            prompts: jobs.iter().map(|j| (j.row, j.prompt.clone())).collect(),
            ..Self::default()
        }
    }

    /// Both stages' outputs; the last stage of a row stands under `(row, sample)`, a first one
    /// before it under `(row + 1000, sample)`.
    fn outputs(&self) -> BTreeMap<(usize, u32), Output> {
        let first = Collect {
            finished: self.first.clone(),
            ..Collect::default()
        };
        let mut outputs = self.last.outputs();
        let firsts = first.outputs().into_iter();
        outputs.extend(firsts.map(|((row, sample), output)| ((row + 1000, sample), output)));
        outputs
    }

    fn n_reused(&self) -> usize {
        let all = self.last.finished.values().chain(self.first.values());
        all.map(|g| g.reused_tokens).sum()
    }
}

fn run_stages<'a>(
    backend: &mut ScriptedBackend,
    jobs: Vec<Job>,
    options: &GenerateOptions,
) -> TwoStages<'a> {
    let mut both = TwoStages::of(&jobs);
    let never = AtomicBool::new(false);
    let outcome = generate(backend, jobs, options, &never, &mut both);
    assert_eq!(outcome.expect("the scripted backend"), Outcome::Complete);
    both
}

/// Each stage as a row of its own, one slot, nothing shared.
fn apart(jobs: Vec<Job>) -> BTreeMap<(usize, u32), Output> {
    let firsts = plain(jobs.clone());
    let seconds: Vec<Job> = jobs
        .iter()
        .filter(|job| job.may_go_on)
        .filter_map(|job| second(&job.prompt, &firsts.finished[&(job.row, job.sample)]))
        .collect();
    let mut outputs = firsts.outputs();
    for (at, output) in plain(seconds).outputs() {
        let first = outputs.insert(at, output).expect("its first stage ran");
        outputs.insert((at.0 + 1000, at.1), first);
    }
    outputs
}

#[test]
fn each_stage_is_what_it_is_as_a_row_of_its_own() {
    let expected = apart(two_stage_jobs(12, 2));
    let n_seconds = expected.keys().filter(|at| at.0 >= 1000).count();
    assert!((8..18).contains(&n_seconds), "{n_seconds} rows go on");
    let mut n_evicted = 0;
    for n_slots in [1, 3, 8] {
        for (n_forks, n_pages) in [(0, 4), (2, 9), (5, 30), (20, 60)] {
            for (refill, prefix_reuse) in [(true, true), (true, false), (false, true)] {
                let options = GenerateOptions {
                    refill,
                    prefix_reuse,
                    ..options()
                };
                let mut backend = backend(shape(n_slots, n_forks, n_pages));
                let got = run_stages(&mut backend, two_stage_jobs(12, 2), &options);
                assert!(got.last.failed.is_empty());
                assert_eq!(
                    first_difference(&got.outputs(), &expected),
                    None,
                    "{n_slots} slots, {n_forks} forks, refill {refill}, reuse {prefix_reuse}"
                );
                n_evicted += got.last.n_evicted();
            }
        }
    }
    assert!(n_evicted > 0, "no arena was small enough to evict a row");
}

#[test]
fn the_second_stage_goes_on_from_the_kv_of_the_first() {
    for (n_samples, refill) in [(1, true), (3, true), (1, false)] {
        let options = GenerateOptions {
            refill,
            ..options()
        };
        let mut shared = backend(shape(4, 12, 60));
        let got = run_stages(&mut shared, two_stage_jobs(12, n_samples), &options);
        assert_eq!(got.last.n_evicted(), 0);
        for at in got.first.keys() {
            let (first, second) = (&got.first[at], &got.last.finished[at]);
            assert!(
                second.reused_tokens >= first.prompt_tokens - 1,
                "row {at:?} took over {} of {} tokens",
                second.reused_tokens,
                first.prompt_tokens
            );
        }
        // Every prompt token was computed or reused.
        let all = got.last.finished.values().chain(got.first.values());
        let n_prompt: usize = all.map(|g| g.prompt_tokens - 1).sum();
        assert_eq!(got.n_reused() + shared.counts().prefilled_tokens, n_prompt);
        let n_logged: usize = got.last.steps.iter().map(|s| s.reused_tokens).sum();
        assert_eq!(n_logged, got.n_reused());

        let options = GenerateOptions {
            prefix_reuse: false,
            ..options
        };
        let mut alone = backend(shape(4, 12, 60));
        let without = run_stages(&mut alone, two_stage_jobs(12, n_samples), &options);
        assert_eq!((without.n_reused(), alone.counts().forks), (0, 0));
        assert_eq!(alone.counts().prefilled_tokens, n_prompt);
        assert_eq!(first_difference(&without.outputs(), &got.outputs()), None);
    }
}

#[test]
fn a_stop_between_the_stages_costs_only_rows_in_flight() {
    let jobs = || two_stage_jobs(12, 2);
    let expected = apart(jobs());
    let flag = AtomicBool::new(false);
    let mut backend = backend(shape(3, 8, 40));
    let mut both = TwoStages {
        stop_after: Some((5, &flag)),
        ..TwoStages::of(&jobs())
    };
    let outcome = generate(&mut backend, jobs(), &options(), &flag, &mut both);
    assert_eq!(outcome.expect("the scripted backend"), Outcome::Stopped);
    let done = both.last.outputs();
    assert!(both.first.keys().any(|at| !done.contains_key(at)));
    let rest: Vec<Job> = jobs()
        .into_iter()
        .filter(|job| !done.contains_key(&(job.row, job.sample)))
        .collect();
    let mut resumed = run_stages(&mut backend, rest, &options());
    resumed.last.finished.extend(both.last.finished);
    for (at, first) in both.first {
        resumed.first.entry(at).or_insert(first);
    }
    assert_eq!(first_difference(&resumed.outputs(), &expected), None);
}

#[test]
fn a_stage_not_finite_is_redone_and_then_fails_with_its_row() {
    let jobs = || two_stage_jobs(8, 1);
    let expected = apart(jobs());
    let goes_on = |row: usize| expected.contains_key(&(row + 1000, 0));
    let row = (0..8).find(|&row| goes_on(row)).expect("some row goes on");
    for (n_times, row_hash) in [(1, row), (1, row + 1000), (9, row), (9, row + 1000)] {
        let mut backend = backend(shape(3, 8, 40));
        // The first token of either stage.
        let prompt = &jobs()
            .into_iter()
            .find(|job| job.row == row)
            .expect("it is there")
            .prompt;
        let mut position = prompt.len();
        if row_hash >= 1000 {
            let first = &plain(jobs()).finished[&(row, 0)];
            position = second(prompt, first).expect("it goes on").prompt.len();
        }
        backend.inject_not_finite(row_hash as u64, position, n_times);
        let mut got = run_stages(&mut backend, jobs(), &options());
        let mut expected = expected.clone();
        if n_times > 1 {
            assert_eq!(got.last.failed.keys().collect::<Vec<_>>(), [&(row, 0)]);
            expected.remove(&(row, 0));
            expected.remove(&(row + 1000, 0));
            got.first.remove(&(row, 0));
        } else {
            assert!(got.last.failed.is_empty());
        }
        assert_eq!(first_difference(&got.outputs(), &expected), None);
    }
}

#[test]
fn a_second_stage_without_room_is_reported() {
    let mut jobs = two_stage_jobs(1, 1);
    jobs[0].max_new_tokens = 40;
    let n_prompt = jobs[0].prompt.len();
    let shape = EngineShape {
        max_context: n_prompt + 41,
        ..shape(1, 2, 8)
    };
    let mut backend = ScriptedBackend::from_fn(shape, N_VOCAB, |_, _| vec![5; 37]);
    let got = run_stages(&mut backend, jobs, &options());
    assert!(matches!(
        got.last.failed[&(0, 0)],
        JobError::TooLong { needed, holds } if needed == n_prompt + 43 && holds == n_prompt + 41
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_shape_gives_the_same_stages(
        n_slots in 1usize..12,
        n_forks in 0usize..20,
        n_pages in 4usize..50,
        prefill_rows in 1usize..400,
        steps_per_call in 1usize..12,
        refill: bool,
        fail_at_once: bool,
        failures in prop::collection::btree_map(0u64..8, 330usize..500, 0..3),
    ) {
        let jobs = || two_stage_jobs(8, 3);
        let expected = apart(jobs());
        let shape = EngineShape { prefill_rows, ..shape(n_slots, n_forks, n_pages) };
        let options = GenerateOptions { refill, steps_per_call, ..options() };
        let mut backend = backend(shape);
        backend.fail_in_decode(fail_at_once);
        for (row_hash, position) in failures {
            backend.inject_not_finite(row_hash, position, 1);
            backend.inject_not_finite(1000 + row_hash, position + 50, 1);
        }
        let got = run_stages(&mut backend, jobs(), &options);
        prop_assert!(got.last.failed.is_empty());
        prop_assert_eq!(first_difference(&got.outputs(), &expected), None);
    }
}
