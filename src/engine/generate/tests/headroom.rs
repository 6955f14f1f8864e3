//! Rows at their answer headroom: what is written there, and that nothing else changes.

use super::*;

const HEADROOM: usize = 90;

/// What closes a row's analysis; none for a row that is in its final message.
fn closing(output: &[TokenId]) -> Vec<TokenId> {
    if output.len() > 1 && output[1].is_multiple_of(3) {
        Vec::new()
    } else {
        vec![93, 94, 95, 96]
    }
}

#[derive(Default)]
struct Closes(Collect<'static>);

impl Observer for Closes {
    fn finished(&mut self, generation: Generation) {
        self.0.finished(generation);
    }

    fn failed(&mut self, row: usize, sample: u32, error: JobError) {
        self.0.failed(row, sample, error);
    }

    fn step(&mut self, report: &StepReport) {
        self.0.step(report);
    }

    fn at_headroom(&mut self, _row: usize, output_ids: &[TokenId]) -> Vec<TokenId> {
        closing(output_ids)
    }
}

fn with_headroom(headroom: usize) -> GenerateOptions {
    GenerateOptions {
        answer_headroom: headroom,
        ..options()
    }
}

fn run_closing(
    backend: &mut ScriptedBackend,
    jobs: Vec<Job>,
    options: &GenerateOptions,
) -> Collect<'static> {
    let mut closes = Closes::default();
    let never = AtomicBool::new(false);
    let outcome = generate(backend, jobs, options, &never, &mut closes);
    assert_eq!(outcome.expect("the scripted backend"), Outcome::Complete);
    closes.0
}

/// Tokens, and the range of those that were forced.
type Closed = (Vec<TokenId>, Option<Range<usize>>);

/// What each row has by two plain runs: up to the headroom, and, for a row that
/// reached it, the rest after prompt, output and what closes it.
fn apart(jobs: &[Job]) -> BTreeMap<(usize, u32), Closed> {
    let shorter = jobs.iter().cloned().map(|mut job| {
        job.max_new_tokens -= HEADROOM;
        job
    });
    let begun = plain(shorter.collect());
    let mut rests = Vec::new();
    let mut expected = BTreeMap::new();
    for job in jobs {
        let at = (job.row, job.sample);
        let first = &begun.finished[&at];
        let mut output = first.output_ids.clone();
        let mut forced = None;
        if first.stop == StopReason::Length {
            let closing = closing(&output);
            let range = output.len()..output.len() + closing.len();
            forced = (!closing.is_empty()).then_some(range);
            output.extend(&closing);
            rests.push(Job {
                prompt: job.prompt.iter().chain(&output).copied().collect(),
                max_new_tokens: HEADROOM - closing.len(),
                ..job.clone()
            });
        }
        expected.insert(at, (output, forced));
    }
    for (at, rest) in plain(rests).finished {
        if let Some((output, _)) = expected.get_mut(&at) {
            output.extend(rest.output_ids);
        }
    }
    expected
}

#[test]
fn a_row_is_closed_where_only_its_headroom_is_left() {
    let expected = apart(&jobs(12, 2));
    let n_forced = expected.values().filter(|row| row.1.is_some()).count();
    assert!((3..20).contains(&n_forced), "{n_forced} rows are closed");
    let mut n_evicted = 0;
    for (n_slots, n_forks, n_pages) in [(1, 0, 4), (3, 4, 30), (8, 4, 7), (8, 0, 40)] {
        for refill in [true, false] {
            let options = GenerateOptions {
                refill,
                ..with_headroom(HEADROOM)
            };
            let mut backend = backend(shape(n_slots, n_forks, n_pages));
            let got = run_closing(&mut backend, jobs(12, 2), &options);
            n_evicted += got.n_evicted();
            for (at, (output, forced)) in &expected {
                let row = &got.finished[at];
                assert_eq!(&row.output_ids, output, "{at:?}, {n_slots} slots");
                assert_eq!(&row.forced, forced, "{at:?}, {n_slots} slots");
            }
        }
    }
    assert!(n_evicted > 0, "no arena was small enough to evict a row");
}

#[test]
fn teacher_forcing_gives_the_sum_and_the_hash_of_a_closed_row() {
    let mut backend = backend(shape(4, 3, 30));
    let got = run_closing(&mut backend, jobs(8, 1), &with_headroom(HEADROOM));
    assert!(got.finished.values().any(|row| row.forced.is_some()));
    for job in jobs(8, 1) {
        let row = &got.finished[&(job.row, 0)];
        let forced = forced_logprobs(&mut backend, &job.prompt, &row.output_ids);
        let sum = forced
            .expect("it fits")
            .iter()
            .fold(0.0f32, |sum, l| sum + l);
        assert_eq!(sum.to_bits(), row.logprob_sum.to_bits());
        let mut trace = 0;
        let fed: Vec<TokenId> = job.prompt.iter().chain(&row.output_ids).copied().collect();
        let (fed, first) = (&fed[..fed.len() - 1], job.prompt.len() - 1);
        score_tokens(&mut backend, fed, first, &mut |_, logits| {
            trace = trace_hash(trace, logits_hash(logits));
        })
        .expect("it fits");
        assert_eq!(row.trace_hash, Some(trace));
    }
}

#[test]
fn a_headroom_without_room_changes_nothing() {
    let expected = plain(jobs(6, 1)).outputs();
    // As large as the budget: there is nowhere to stop before. Off: the same.
    for headroom in [0, 350, 400] {
        let mut backend = backend(shape(4, 3, 30));
        let got = run_closing(&mut backend, jobs(6, 1), &with_headroom(headroom));
        assert_eq!(first_difference(&got.outputs(), &expected), None);
    }
    // What closes a row would take all that is left: it ends there.
    let mut backend = backend(shape(4, 3, 30));
    let got = run_closing(&mut backend, jobs(12, 1), &with_headroom(4));
    let cut: Vec<_> = got
        .finished
        .values()
        .filter(|row| row.output_ids.len() == 346)
        .collect();
    assert!(!cut.is_empty());
    for row in cut {
        assert_eq!((row.stop, &row.forced), (StopReason::Length, &None));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn any_shape_closes_the_same_rows(
        n_slots in 1usize..12,
        n_forks in 0usize..6,
        n_pages in 3usize..40,
        prefill_rows in 1usize..400,
        steps_per_call in 1usize..12,
        refill: bool,
        fail_at_once: bool,
        failures in prop::collection::btree_map(0u64..8, 330usize..700, 0..3),
    ) {
        let expected = apart(&jobs(8, 2));
        let shape = EngineShape { prefill_rows, ..shape(n_slots, n_forks, n_pages) };
        let options = GenerateOptions { refill, steps_per_call, ..with_headroom(HEADROOM) };
        let mut backend = backend(shape);
        backend.fail_in_decode(fail_at_once);
        for (row_hash, position) in failures {
            backend.inject_not_finite(row_hash, position, 1);
        }
        let got = run_closing(&mut backend, jobs(8, 2), &options);
        prop_assert!(got.failed.is_empty());
        for (at, (output, forced)) in &expected {
            prop_assert_eq!(&got.finished[at].output_ids, output);
            prop_assert_eq!(&got.finished[at].forced, forced);
        }
    }
}
