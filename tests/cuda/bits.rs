//! The promise about bits: a row's steps are the same in any slots and chunks, scored as decoded,
//! and with a shared prefix.

use std::sync::Arc;

use podium::engine::cuda::{CudaBackend, Loaded};
use podium::engine::sample::logits_hash;
use podium::engine::{Backend, Fork, PAGE_POSITIONS, PageId, SequenceId, TokenEvent, TokenId};

use crate::golden::{Case, PAGES_A_SEQUENCE, cases, load, map_pages, open, span, start};

/// Every token, log-probability and logits hash that a slot produced.
type Trace = Vec<(TokenId, u32, u64)>;

fn drain(backend: &mut CudaBackend, traces: &mut [Trace]) {
    let mut events: Vec<TokenEvent> = Vec::new();
    while !backend.poll(&mut events).expect("steps ran") {}
    for event in events {
        let hash = event.logits_hash.expect("hashes were asked for");
        traces[event.slot.0 as usize].push((event.token, event.logprob.to_bits(), hash));
    }
}

/// Prompt `i % prompts` in slot `i`, prefilled together, decoded together.
fn generate(case: &Case, loaded: &Arc<Loaded>, n_slots: usize, prefill_rows: usize) -> Vec<Trace> {
    let mut backend = open(loaded, n_slots, prefill_rows);
    let prompt_of = |slot: usize| &case.prompts[slot % case.prompts.len()];
    let mut spans = Vec::new();
    for slot in 0..n_slots {
        map_pages(&mut backend, slot, 0);
        let tokens = &prompt_of(slot).tokens;
        spans.push(span(slot, 0, &tokens[..tokens.len() - 1]));
    }
    backend.prefill(&spans).expect("prefill runs");
    for slot in 0..n_slots {
        let prompt = prompt_of(slot);
        backend
            .start(&start(slot, prompt, prompt.greedy.len()))
            .unwrap();
    }
    let mut traces = vec![Trace::new(); n_slots];
    backend.decode(1).expect("a step");
    backend.decode(100).expect("steps");
    drain(&mut backend, &mut traces);
    traces
}

#[test]
#[ignore = "needs a GPU"]
fn rows_have_the_same_bits_in_any_chunks_and_slots() {
    for case in cases() {
        let loaded = load(&case);
        let n = case.prompts.len();
        let base = generate(&case, &loaded, n, 1);
        for (prompt, trace) in case.prompts.iter().zip(&base) {
            assert_eq!(trace.len(), prompt.greedy.len(), "{}", prompt.name);
            // What bf16 leaves of the float32 tokens.
            let n_same = trace
                .iter()
                .zip(&prompt.greedy)
                .take_while(|(a, b)| a.0 == **b)
                .count();
            println!(
                "{} {}: {n_same} of {} tokens",
                case.folder.display(),
                prompt.name,
                prompt.greedy.len()
            );
        }
        for (n_slots, prefill_rows) in [(1, 1024), (7, 7), (7, 64), (40, 64), (40, 1024)] {
            for (slot, trace) in generate(&case, &loaded, n_slots, prefill_rows)
                .iter()
                .enumerate()
            {
                assert_eq!(
                    base[slot % n],
                    *trace,
                    "{} {}: {n_slots} slots, chunks of {prefill_rows}",
                    case.folder.display(),
                    case.prompts[slot % n].name
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn scoring_gives_the_bits_of_decoding() {
    for case in cases() {
        let loaded = load(&case);
        let traces = generate(&case, &loaded, case.prompts.len(), 64);
        for (prompt, trace) in case.prompts.iter().zip(&traces) {
            let mut tokens = prompt.tokens.clone();
            tokens.extend(trace[..trace.len() - 1].iter().map(|(token, ..)| token));
            let mut backend = open(&loaded, 2, 7);
            map_pages(&mut backend, 1, 0);
            let mut hashes = Vec::new();
            let visit = &mut |position: usize, logits: &[f32]| {
                if position + 1 >= prompt.tokens.len() {
                    hashes.push(logits_hash(logits));
                }
            };
            backend
                .score(&span(1, 0, &tokens), visit)
                .expect("it scores");
            let decoded: Vec<u64> = trace.iter().map(|&(.., hash)| hash).collect();
            assert_eq!(hashes, decoded, "{} {}", case.folder.display(), prompt.name);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_shared_prefix_changes_no_bit() {
    let mut n_shared = 0;
    for case in cases() {
        let loaded = load(&case);
        let alone = generate(&case, &loaded, case.prompts.len(), 64);
        for (a, b) in (0..case.prompts.len()).zip(1..case.prompts.len()) {
            let (x, y) = (&case.prompts[a], &case.prompts[b]);
            let equal = x.tokens.iter().zip(&y.tokens).take_while(|(x, y)| x == y);
            // The last token of a prompt is a decode row.
            let shared = equal
                .count()
                .min(x.tokens.len() - 1)
                .min(y.tokens.len() - 1);
            for shared in [shared, shared / PAGE_POSITIONS * PAGE_POSITIONS] {
                if shared == 0 {
                    continue;
                }
                n_shared += 1;
                let mut backend = open(&loaded, 2, 64);
                let fork_point = 2;
                map_pages(&mut backend, fork_point, 0);
                backend
                    .prefill(&[span(fork_point, 0, &x.tokens[..shared])])
                    .expect("prefill runs");
                let whole_pages = shared / PAGE_POSITIONS;
                let page = |sequence: usize, index: usize| {
                    PageId((sequence * PAGES_A_SEQUENCE + index) as u32)
                };
                let mut spans = Vec::new();
                for (slot, prompt) in [x, y].into_iter().enumerate() {
                    for index in 0..whole_pages {
                        backend.map_page(SequenceId(slot as u32), index, page(fork_point, index));
                    }
                    map_pages(&mut backend, slot, whole_pages);
                    let tail = (page(fork_point, whole_pages), page(slot, whole_pages));
                    let fork = Fork {
                        from: SequenceId(fork_point as u32),
                        to: SequenceId(slot as u32),
                        n_positions: shared,
                        tail: (shared % PAGE_POSITIONS != 0).then_some(tail),
                    };
                    backend.fork(&fork).expect("it forks");
                    let tokens = &prompt.tokens;
                    spans.push(span(slot, shared, &tokens[shared..tokens.len() - 1]));
                }
                backend.prefill(&spans).expect("prefill runs");
                backend.start(&start(0, x, x.greedy.len())).unwrap();
                backend.start(&start(1, y, y.greedy.len())).unwrap();
                let mut traces = vec![Trace::new(); 2];
                backend.decode(100).expect("steps");
                drain(&mut backend, &mut traces);
                let name = case.folder.display();
                assert_eq!(traces[0], alone[a], "{name}: {} after {shared}", x.name);
                assert_eq!(traces[1], alone[b], "{name}: {} after {shared}", y.name);
            }
        }
    }
    assert!(n_shared >= 2, "no golden shares a prefix");
}
