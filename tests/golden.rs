//! Logits and greedy tokens against transformers in float32, on tiny checkpoints
//! (`tests/golden/README.md`), in every way the engine can come to them: chunk sizes, slot
//! counts, shared prefixes, from decode and from scoring.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::sample::logits_hash;
use podium::engine::{
    Backend, EngineShape, Fork, PAGE_POSITIONS, PageId, SamplingParams, SequenceId, SlotStart,
    Span, TokenEvent, TokenId,
};
use podium::quant::{bf16, mxfp4, mxint8};
use safetensors::SafeTensors;

struct Prompt {
    name: String,
    tokens: Vec<TokenId>,
    greedy: Vec<TokenId>,
    /// `[tokens + greedy - 1, n_vocab]`.
    logits: Vec<f32>,
}

struct Case {
    folder: PathBuf,
    tolerance: f32,
    prompts: Vec<Prompt>,
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("the golden files are committed")
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    folders.sort();
    assert!(folders.len() >= 9, "goldens are missing");
    folders.into_iter().map(read_case).collect()
}

fn read_case(folder: PathBuf) -> Case {
    let read = |name: &str| std::fs::read(folder.join(name)).expect("a golden file");
    let meta: serde_json::Value = serde_json::from_slice(&read("meta.json")).expect("JSON");
    let expected = read("expected.safetensors");
    let expected = SafeTensors::deserialize(&expected).expect("safetensors");
    let data = |name: String| expected.tensor(&name).expect("a tensor a prompt").data();
    let input = String::from_utf8(read("input.jsonl")).expect("UTF-8");
    let prompts = input.lines().map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let name = line["prompt"].as_str().expect("a name").to_owned();
        let tokens = line["tokens"].as_array().expect("tokens");
        let greedy = data(format!("{name}.greedy"));
        let logits = data(format!("{name}.logits"));
        Prompt {
            tokens: tokens
                .iter()
                .map(|t| t.as_u64().expect("an id") as TokenId)
                .collect(),
            greedy: words(greedy).map(u32::from_le_bytes).collect(),
            logits: words(logits).map(f32::from_le_bytes).collect(),
            name,
        }
    });
    Case {
        tolerance: meta["tolerance"].as_f64().expect("a number") as f32,
        prompts: prompts.collect(),
        folder: folder.clone(),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.as_chunks::<4>().0.iter().copied()
}

/// Longest prompt and continuation of the goldens, with room.
const MAX_CONTEXT: usize = 768;
const PAGES_A_SEQUENCE: usize = MAX_CONTEXT / PAGE_POSITIONS;

fn open(case: &Case, n_slots: usize, prefill_rows: usize) -> CpuBackend {
    open_in(true, case, n_slots, prefill_rows)
}

fn open_in(exact: bool, case: &Case, n_slots: usize, prefill_rows: usize) -> CpuBackend {
    let checkpoint = Checkpoint::open(&case.folder).expect("a golden checkpoint opens");
    let shape = EngineShape {
        n_slots,
        n_forks: 1,
        n_pages: (n_slots + 1) * PAGES_A_SEQUENCE,
        max_context: MAX_CONTEXT,
        prefill_rows,
    };
    let options = CpuOptions {
        n_threads: 2,
        exact,
        trace_hash: true,
        poison: true,
    };
    CpuBackend::open(&checkpoint, Precision::Stored, shape, options).expect("it loads")
}

/// Maps a sequence's own pages from index `first` on.
fn map_pages(backend: &mut CpuBackend, sequence: usize, first: usize) {
    for index in first..PAGES_A_SEQUENCE {
        let page = PageId((sequence * PAGES_A_SEQUENCE + index) as u32);
        backend.map_page(SequenceId(sequence as u32), index, page);
    }
}

fn span(sequence: usize, start: usize, tokens: &[TokenId]) -> Span {
    Span {
        sequence: SequenceId(sequence as u32),
        start,
        tokens: tokens.into(),
    }
}

fn start(slot: usize, prompt: &Prompt, max_new_tokens: usize) -> SlotStart {
    let position = prompt.tokens.len() - 1;
    SlotStart {
        slot: SequenceId(slot as u32),
        token: prompt.tokens[position],
        position,
        sampling: SamplingParams::default(),
        row_hash: slot as u64,
        sample: 0,
        stop_tokens: Arc::new([]),
        max_new_tokens,
    }
}

/// Every token, log-probability and logits hash that a slot produced.
type Trace = Vec<(TokenId, u32, u64)>;

fn drain(backend: &mut CpuBackend, traces: &mut [Trace]) {
    let mut events: Vec<TokenEvent> = Vec::new();
    assert!(backend.poll(&mut events).expect("steps ran"));
    for event in events {
        let hash = event.logits_hash.expect("hashes were asked for");
        let token = (event.token, event.logprob.to_bits(), hash);
        traces[event.slot.0 as usize].push(token);
    }
}

/// Prompt `i % prompts` in slot `i`, prefilled together, decoded together.
fn generate(case: &Case, n_slots: usize, prefill_rows: usize) -> Vec<Trace> {
    let mut backend = open(case, n_slots, prefill_rows);
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
            .expect("it starts");
    }
    let mut traces = vec![Trace::new(); n_slots];
    backend.decode(1).expect("a step");
    backend.decode(100).expect("steps");
    drain(&mut backend, &mut traces);
    traces
}

fn tokens_of(trace: &Trace) -> Vec<TokenId> {
    trace.iter().map(|&(token, ..)| token).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    for case in cases() {
        let mut backend = open(&case, 3, 64);
        for prompt in &case.prompts {
            let n_vocab = backend.info().n_vocab;
            let mut tokens = prompt.tokens.clone();
            tokens.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
            map_pages(&mut backend, 0, 0);
            let mut n_rows = 0;
            let visit = &mut |position: usize, logits: &[f32]| {
                let expected = &prompt.logits[position * n_vocab..][..n_vocab];
                for (id, (got, expected)) in logits.iter().zip(expected).enumerate() {
                    let error = (got - expected).abs();
                    assert!(
                        error <= case.tolerance,
                        "{}, {}, position {position}, id {id}: {got} for {expected}, tolerance {}",
                        case.folder.display(),
                        prompt.name,
                        case.tolerance
                    );
                }
                n_rows += 1;
            };
            backend
                .score(&span(0, 0, &tokens), visit)
                .expect("it scores");
            assert_eq!(n_rows * n_vocab, prompt.logits.len());
            backend.clear(&[SequenceId(0)]);
        }
    }
}

/// How much further from float32 than transformers' own bf16 run ours may be.
const BF16_SHARE: f64 = 1.5;

#[test]
fn bf16_is_as_near_to_float32_as_transformers_bf16() {
    for case in cases() {
        let theirs = std::fs::read(case.folder.join("bf16.json")).expect("a golden file");
        let theirs: serde_json::Value = serde_json::from_slice(&theirs).expect("JSON");
        let mut backend = open_in(false, &case, 3, 64);
        let n_vocab = backend.info().n_vocab;
        let mut by_position = Vec::new();
        for prompt in &case.prompts {
            let mut tokens = prompt.tokens.clone();
            tokens.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
            map_pages(&mut backend, 0, 0);
            let visit = &mut |position: usize, logits: &[f32]| {
                let expected = &prompt.logits[position * n_vocab..][..n_vocab];
                let off = logits.iter().zip(expected);
                let squares = off.map(|(got, expected)| f64::from(got - expected).powi(2));
                by_position.push((squares.sum::<f64>() / n_vocab as f64).sqrt());
            };
            backend
                .score(&span(0, 0, &tokens), visit)
                .expect("it scores");
            backend.clear(&[SequenceId(0)]);
        }
        by_position.sort_by(f64::total_cmp);
        // The largest are positions at which other experts were chosen, in either run.
        for (which, share) in [
            ("median", 0.5),
            ("upper_quartile", 0.75),
            ("upper_decile", 0.9),
        ] {
            let ours = by_position[(share * (by_position.len() - 1) as f64) as usize];
            let theirs = theirs[which].as_f64().expect("a number");
            assert!(
                ours <= theirs * BF16_SHARE,
                "{}: {which} distance {ours:.2e}, transformers' {theirs:.2e}",
                case.folder.display()
            );
        }
    }
}

#[test]
fn greedy_tokens_are_equal_in_any_chunks_and_slots() {
    for case in cases() {
        let mut by_prompt: HashMap<usize, Trace> = HashMap::new();
        for (n_slots, prefill_rows) in [(1, 1), (1, 1024), (7, 7), (7, 64), (64, 64), (64, 1024)] {
            for (slot, trace) in generate(&case, n_slots, prefill_rows)
                .into_iter()
                .enumerate()
            {
                let index = slot % case.prompts.len();
                let prompt = &case.prompts[index];
                let name = format!("{} {}", case.folder.display(), prompt.name);
                assert_eq!(tokens_of(&trace), prompt.greedy, "{name}");
                let first = by_prompt.entry(index).or_insert_with(|| trace.clone());
                assert_eq!(
                    *first, trace,
                    "{name}: {n_slots} slots, chunks of {prefill_rows}"
                );
            }
        }
    }
}

#[test]
fn scoring_gives_the_bits_of_decoding() {
    for case in cases() {
        let traces = generate(&case, case.prompts.len(), 64);
        for (prompt, trace) in case.prompts.iter().zip(&traces) {
            let mut tokens = prompt.tokens.clone();
            tokens.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
            let mut backend = open(&case, 2, 7);
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
fn a_shared_prefix_changes_no_bit() {
    let mut n_shared = 0;
    for case in cases() {
        let alone = generate(&case, case.prompts.len(), 64);
        for (a, b) in (0..case.prompts.len()).zip(1..case.prompts.len()) {
            let (x, y) = (&case.prompts[a], &case.prompts[b]);
            let shared = x
                .tokens
                .iter()
                .zip(&y.tokens)
                .take_while(|(x, y)| x == y)
                .count();
            // The last token of a prompt is a decode row.
            let shared = shared.min(x.tokens.len() - 1).min(y.tokens.len() - 1);
            for shared in [
                shared,
                shared.saturating_sub(1),
                shared / PAGE_POSITIONS * PAGE_POSITIONS,
            ] {
                if shared == 0 {
                    continue;
                }
                n_shared += 1;
                let mut backend = open(&case, 2, 64);
                let fork_point = 2;
                map_pages(&mut backend, fork_point, 0);
                let prefix = span(fork_point, 0, &x.tokens[..shared]);
                backend.prefill(&[prefix]).expect("prefill runs");
                let whole_pages = shared / PAGE_POSITIONS;
                let mut spans = Vec::new();
                for (slot, prompt) in [x, y].into_iter().enumerate() {
                    let page = |sequence: usize, index: usize| {
                        PageId((sequence * PAGES_A_SEQUENCE + index) as u32)
                    };
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
                backend
                    .start(&start(0, x, x.greedy.len()))
                    .expect("it starts");
                backend
                    .start(&start(1, y, y.greedy.len()))
                    .expect("it starts");
                let mut traces = vec![Trace::new(); 2];
                backend.decode(100).expect("steps");
                drain(&mut backend, &mut traces);
                let name = case.folder.display();
                assert_eq!(traces[0], alone[a], "{name}: {} after {shared}", x.name);
                assert_eq!(traces[1], alone[b], "{name}: {} after {shared}", y.name);
            }
        }
    }
    assert!(n_shared >= 4, "no golden shares a prefix");
}

fn quant(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quant");
    std::fs::read(root.join(name)).expect("the golden files are committed")
}

#[test]
fn mxfp4_bytes_mean_what_transformers_reads() {
    let file = quant("mxfp4_bytes.safetensors");
    let file = SafeTensors::deserialize(&file).expect("safetensors");
    let data = |name: &str| file.tensor(name).expect("a tensor").data();
    let pairs: Vec<f32> = words(data("f32")).map(f32::from_le_bytes).collect();
    let halves: Vec<u16> = data("bf16")
        .as_chunks()
        .0
        .iter()
        .map(|b| u16::from_le_bytes(*b))
        .collect();
    for (i, &scale) in data("scale").iter().enumerate() {
        for (j, &byte) in data("byte").iter().enumerate() {
            let values = mxfp4::unpack(scale, &[byte; mxfp4::BLOCK_BYTES]);
            #[allow(clippy::needless_range_loop, reason = "the loop names the nibble")]
            for half in 0..2 {
                let at = (i * 256 + j) * 2 + half;
                let value = values[half];
                assert_eq!(
                    value.to_bits(),
                    pairs[at].to_bits(),
                    "byte {byte}, scale {scale}"
                );
                if (mxfp4::SCALE_MIN..=mxfp4::SCALE_MAX).contains(&scale) {
                    assert_eq!(
                        bf16::from_f32(value),
                        halves[at],
                        "byte {byte}, scale {scale}"
                    );
                }
            }
        }
    }
}

#[test]
fn mxfp4_tensors_are_laid_out_as_transformers_reads_them() {
    let file = quant("mxfp4_tensor.safetensors");
    let file = SafeTensors::deserialize(&file).expect("safetensors");
    let tensor = |name: &str| file.tensor(name).expect("a tensor");
    let (blocks, scales, in_out) = (tensor("blocks"), tensor("scales"), tensor("in_out"));
    let expected: Vec<f32> = words(in_out.data()).map(f32::from_le_bytes).collect();
    let &[n_experts, n_rows, n_blocks] = scales.shape() else {
        panic!("three dimensions");
    };
    for expert in 0..n_experts {
        for row in 0..n_rows {
            for block in 0..n_blocks {
                let index = (expert * n_rows + row) * n_blocks + block;
                let codes = &blocks.data().as_chunks().0[index];
                let values = mxfp4::unpack(scales.data()[index], codes);
                for (i, value) in values.into_iter().enumerate() {
                    let k = block * mxfp4::BLOCK + i;
                    let at = (expert * n_blocks * mxfp4::BLOCK + k) * n_rows + row;
                    assert_eq!(value.to_bits(), expected[at].to_bits());
                }
            }
        }
    }
}

/// Scales and codes that a search over all codes finds, for blocks with ties, outliers and largest
/// values near the ends of their binade.
#[test]
fn blocks_are_quantized_as_a_search_over_all_codes_does() {
    let file = quant("quantized.safetensors");
    let file = SafeTensors::deserialize(&file).expect("safetensors");
    let data = |name: &str| file.tensor(name).expect("a tensor").data();
    let values = data("values").as_chunks::<{ 4 * mxfp4::BLOCK }>().0;
    let four = data("mxfp4_codes").as_chunks::<{ mxfp4::BLOCK_BYTES }>().0;
    let eight = data("mxint8_codes").as_chunks::<{ mxint8::BLOCK }>().0;
    let mut n_wider = 0;
    for (i, bytes) in values.iter().enumerate() {
        let words = bytes.as_chunks::<4>().0;
        let block: [f32; mxfp4::BLOCK] = std::array::from_fn(|k| f32::from_le_bytes(words[k]));
        let found = mxfp4::pack(&block).expect("finite");
        assert_eq!(found, (data("mxfp4_scale")[i], four[i]), "block {i}");
        let (scale, codes) = mxint8::pack(&block).expect("finite");
        assert_eq!(scale, data("mxint8_scale")[i], "block {i}");
        assert_eq!(codes, eight[i].map(u8::cast_signed), "block {i}");
        let largest = block.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        n_wider += usize::from(u32::from(scale) > largest.to_bits() >> 23);
    }
    assert!(
        values.len() > 60 && n_wider >= 2,
        "{n_wider} of the wider scale"
    );
}
