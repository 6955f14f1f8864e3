//! The models of `tests/golden/logits` on the GPU, and how near their logits are to float32.

use std::path::PathBuf;
use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use podium::engine::{
    Backend, EngineShape, PAGE_POSITIONS, PageId, SamplingParams, SequenceId, SlotStart, Span,
    TokenId,
};
use safetensors::SafeTensors;

use crate::support::root;

/// How much further from float32 than another bf16 run the GPU's may be: than transformers' on the
/// same golden, and than the CPU's.
const BF16_SHARE: f32 = 1.5;
/// What a bf16 run of a tiny model may differ by where the CPU's happens to be exact.
const BF16_FLOOR: f32 = 4e-3;

pub struct Prompt {
    pub name: String,
    pub tokens: Vec<TokenId>,
    pub greedy: Vec<TokenId>,
    /// `[tokens + greedy - 1, n_vocab]`.
    logits: Vec<f32>,
}

pub struct Case {
    pub folder: PathBuf,
    pub prompts: Vec<Prompt>,
    /// Distances of transformers' own bf16 run from float32, by [`QUANTILES`].
    of_transformers: [f64; 3],
}

/// Distances of a case's positions: the largest are those where rounding chose other experts.
const QUANTILES: [(&str, f64); 3] = [
    ("median", 0.5),
    ("upper_quartile", 0.75),
    ("upper_decile", 0.9),
];

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.as_chunks::<4>().0.iter().copied()
}

pub fn cases() -> Vec<Case> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root().join("tests/golden/logits"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    let read_case = |folder: PathBuf| {
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let of_bf16: serde_json::Value = serde_json::from_slice(&read("bf16.json")).unwrap();
        let expected = read("expected.safetensors");
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let data = |name: String| expected.tensor(&name).unwrap().data();
        let input = String::from_utf8(read("input.jsonl")).unwrap();
        let prompts = input.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let name = line["prompt"].as_str().unwrap().to_owned();
            let tokens = line["tokens"].as_array().unwrap();
            Prompt {
                tokens: tokens
                    .iter()
                    .map(|t| t.as_u64().unwrap() as TokenId)
                    .collect(),
                greedy: words(data(format!("{name}.greedy")))
                    .map(u32::from_le_bytes)
                    .collect(),
                logits: words(data(format!("{name}.logits")))
                    .map(f32::from_le_bytes)
                    .collect(),
                name,
            }
        });
        Case {
            prompts: prompts.collect(),
            of_transformers: QUANTILES.map(|(which, _)| of_bf16[which].as_f64().unwrap()),
            folder: folder.clone(),
        }
    };
    folders.into_iter().map(read_case).collect()
}

/// Longest prompt and continuation of the goldens, with room.
const MAX_CONTEXT: usize = 768;
pub const PAGES_A_SEQUENCE: usize = MAX_CONTEXT / PAGE_POSITIONS;

pub fn shape(n_slots: usize, prefill_rows: usize) -> EngineShape {
    EngineShape {
        n_slots,
        n_forks: 1,
        n_pages: (n_slots + 1) * PAGES_A_SEQUENCE,
        max_context: MAX_CONTEXT,
        prefill_rows,
    }
}

pub fn load(case: &Case) -> Arc<Loaded> {
    let checkpoint = Checkpoint::open(&case.folder).unwrap();
    Arc::new(Loaded::open(&checkpoint, Precision::Stored, 0).expect("a GPU"))
}

pub fn open(loaded: &Arc<Loaded>, n_slots: usize, prefill_rows: usize) -> CudaBackend {
    let options = CudaOptions {
        trace_hash: true,
        poison: true,
    };
    CudaBackend::new(Arc::clone(loaded), shape(n_slots, prefill_rows), options).unwrap()
}

/// Maps a sequence's own pages from index `first` on.
pub fn map_pages(backend: &mut dyn Backend, sequence: usize, first: usize) {
    for index in first..PAGES_A_SEQUENCE {
        let page = PageId((sequence * PAGES_A_SEQUENCE + index) as u32);
        backend.map_page(SequenceId(sequence as u32), index, page);
    }
}

pub fn span(sequence: usize, start: usize, tokens: &[TokenId]) -> Span {
    Span {
        sequence: SequenceId(sequence as u32),
        start,
        tokens: tokens.into(),
    }
}

pub fn start(slot: usize, prompt: &Prompt, max_new_tokens: usize) -> SlotStart {
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

/// Largest distance of a prompt's logits to the golden ones; of each position the root mean square
/// goes to `by_position`.
fn distance(backend: &mut dyn Backend, prompt: &Prompt, by_position: &mut Vec<f64>) -> f32 {
    let n_vocab = backend.info().n_vocab;
    let mut tokens = prompt.tokens.clone();
    tokens.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
    map_pages(backend, 0, 0);
    let mut most = 0.0f32;
    let mut n_rows = 0;
    let visit = &mut |position: usize, logits: &[f32]| {
        let mut squares = 0.0;
        for (got, expected) in logits.iter().zip(&prompt.logits[position * n_vocab..]) {
            most = most.max((got - expected).abs());
            squares += f64::from(got - expected).powi(2);
        }
        by_position.push((squares / n_vocab as f64).sqrt());
        n_rows += 1;
    };
    backend
        .score(&span(0, 0, &tokens), visit)
        .expect("it scores");
    assert_eq!(n_rows * n_vocab, prompt.logits.len());
    backend.clear(&[SequenceId(0)]);
    most
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_as_near_to_float32_as_other_bf16_runs() {
    for case in cases() {
        let checkpoint = Checkpoint::open(&case.folder).unwrap();
        let options = CpuOptions {
            n_threads: 2,
            exact: false,
            trace_hash: false,
            poison: false,
        };
        let mut cpu =
            CpuBackend::open(&checkpoint, Precision::Stored, shape(3, 64), options).unwrap();
        let loaded = load(&case);
        for prefill_rows in [64, 7] {
            let mut gpu = open(&loaded, 3, prefill_rows);
            let mut by_position = Vec::new();
            for prompt in &case.prompts {
                let what = format!("{} {}", case.folder.display(), prompt.name);
                let ours = distance(&mut gpu, prompt, &mut by_position);
                let theirs = distance(&mut cpu, prompt, &mut Vec::new());
                println!("{what}: GPU {ours:.2e}, CPU {theirs:.2e}");
                assert!(
                    ours <= theirs * BF16_SHARE + BF16_FLOOR,
                    "{what}: the GPU is {ours} from float32, the CPU {theirs}"
                );
            }
            by_position.sort_by(f64::total_cmp);
            for ((which, share), theirs) in QUANTILES.into_iter().zip(case.of_transformers) {
                let ours = by_position[(share * (by_position.len() - 1) as f64) as usize];
                let what = format!(
                    "{}: {which} distance {ours:.2e}, transformers' {theirs:.2e}",
                    case.folder.display()
                );
                println!("{what}");
                assert!(ours <= theirs * f64::from(BF16_SHARE), "{what}");
            }
        }
    }
}
