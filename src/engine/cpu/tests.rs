//! The backend as a whole on small random models: the same bits in any order of work, memory as
//! planned, precisions, stops and failures. Parity with another program is in `tests/golden.rs`.

mod maker;
mod routing;
mod sharing;

use std::sync::Arc;

use super::*;
use crate::engine::checkpoint::{MatrixFormat, VectorFormat};
use crate::engine::sample::logits_hash;
use crate::engine::{SamplingParams, StopReason};
use maker::{EXPERTS, HIDDEN, Maker, Random, VOCAB, WIDTH};

fn checkpoint() -> Checkpoint {
    Maker::new(MatrixFormat::Mxfp4, VectorFormat::Bf16).open()
}

const SHAPE: EngineShape = EngineShape {
    n_slots: 9,
    n_forks: 1,
    n_pages: 20,
    max_context: 512,
    prefill_rows: 64,
};

fn options(exact: bool) -> CpuOptions {
    CpuOptions {
        n_threads: 2,
        exact,
        trace_hash: true,
        poison: true,
    }
}

fn backend(exact: bool) -> CpuBackend {
    CpuBackend::open(&checkpoint(), Precision::Stored, SHAPE, options(exact)).expect("it opens")
}

/// The paths that this CPU can run, and `amx` in emulation where it cannot.
fn paths() -> Vec<CpuPath> {
    with_tiles(CpuPath::available())
}

/// A path of each kind of bits: the default one, and `amx`, be it emulated.
fn kinds() -> Vec<CpuPath> {
    with_tiles(vec![CpuPath::choose().expect("a path of this CPU")])
}

fn with_tiles(mut paths: Vec<CpuPath>) -> Vec<CpuPath> {
    let tiles = CpuPath::tiles();
    if !paths.contains(&tiles) {
        paths.push(tiles);
    }
    paths
}

fn backend_on(path: CpuPath, precision: Precision, exact: bool) -> CpuBackend {
    CpuBackend::open_on(path, &checkpoint(), precision, SHAPE, options(exact)).expect("it opens")
}

/// Two pages a sequence.
fn map_pages(backend: &mut CpuBackend, sequence: u32) {
    for index in 0..2 {
        backend.map_page(
            SequenceId(sequence),
            index,
            PageId(2 * sequence + index as u32),
        );
    }
}

fn prompt(seed: u64, n: usize) -> Vec<TokenId> {
    let mut random = Random(seed);
    (0..n)
        .map(|_| (random.next() % VOCAB as u64) as TokenId)
        .collect()
}

fn span(sequence: u32, start: usize, tokens: &[TokenId]) -> Span {
    Span {
        sequence: SequenceId(sequence),
        start,
        tokens: tokens.into(),
    }
}

fn start(slot: u32, tokens: &[TokenId], n: usize) -> SlotStart {
    SlotStart {
        slot: SequenceId(slot),
        token: tokens[tokens.len() - 1],
        position: tokens.len() - 1,
        sampling: SamplingParams::default(),
        row_hash: 0,
        sample: 0,
        stop_tokens: Arc::new([]),
        max_new_tokens: n,
    }
}

/// Logits hashes of every position of `tokens`, by scoring.
fn score(backend: &mut CpuBackend, tokens: &[TokenId]) -> Vec<u64> {
    map_pages(backend, 0);
    let mut hashes = Vec::new();
    let visit = &mut |_: usize, logits: &[f32]| hashes.push(logits_hash(logits));
    backend
        .score(&span(0, 0, tokens), visit)
        .expect("it scores");
    backend.clear(&[SequenceId(0)]);
    hashes
}

fn events(backend: &mut CpuBackend) -> Vec<TokenEvent> {
    let mut events = Vec::new();
    assert!(backend.poll(&mut events).expect("steps ran"));
    events
}

#[test]
fn prefill_of_more_is_prefill_and_decode() {
    let ways = kinds()
        .into_iter()
        .flat_map(|path| [(path, true), (path, false)]);
    for (path, exact) in ways {
        let mut backend = backend_on(path, Precision::Stored, exact);
        let tokens = prompt(1, 330);
        let expected = score(&mut backend, &tokens);
        // Greedy from position `n` on, each time teacher-forced by a new prefill.
        for n in [1, 2, 19, 20, 21, 63, 64, 65, 255, 256, 257, 330] {
            map_pages(&mut backend, 3);
            let head = &tokens[..n];
            backend
                .prefill(&[span(3, 0, &head[..n - 1])])
                .expect("prefill");
            backend.start(&start(3, head, 40)).expect("start");
            backend.decode(40).expect("steps");
            let events = events(&mut backend);
            assert_eq!(
                events[0].logits_hash,
                Some(expected[n - 1]),
                "{n}, exact {exact}"
            );
            let mut all = head.to_vec();
            all.extend(events.iter().map(|event| event.token));
            backend.clear(&[SequenceId(3)]);
            let rescored = score(&mut backend, &all[..all.len() - 1]);
            let decoded: Vec<u64> = events.iter().filter_map(|e| e.logits_hash).collect();
            assert_eq!(decoded, rescored[n - 1..], "{n}, exact {exact}");
        }
    }
}

/// Token, log-probability bits and logits' hash of each step of each row.
type Traces = Vec<Vec<(TokenId, u32, u64)>>;

#[test]
fn batch_mates_threads_and_paths_change_no_bit() {
    for exact in [true, false] {
        // Of the paths that give equal bits, and of `amx`, which has its own.
        let mut firsts: [Option<Traces>; 2] = [None, None];
        for path in paths() {
            let first = &mut firsts[usize::from(path.gives_common_bits(exact))];
            for (n_threads, n_together, prefill_rows) in [(1, 1, 3), (2, 4, 64), (3, 9, 512)] {
                let shape = EngineShape {
                    prefill_rows,
                    ..SHAPE
                };
                let options = CpuOptions {
                    n_threads,
                    ..options(exact)
                };
                let opened =
                    CpuBackend::open_on(path, &checkpoint(), Precision::Stored, shape, options);
                let mut backend = opened.expect("it opens");
                let mut traces = vec![Vec::new(); 9];
                for rows in (0..9u32).collect::<Vec<_>>().chunks(n_together) {
                    let prompts: Vec<_> = rows
                        .iter()
                        .map(|&row| prompt(u64::from(row), 3 + 37 * row as usize))
                        .collect();
                    let mut spans = Vec::new();
                    // Rows land in slots in reverse.
                    let slots = (0..rows.len() as u32).rev();
                    for (slot, tokens) in slots.clone().zip(&prompts) {
                        map_pages(&mut backend, slot);
                        spans.push(span(slot, 0, &tokens[..tokens.len() - 1]));
                    }
                    backend.prefill(&spans).expect("prefill");
                    for (slot, tokens) in slots.clone().zip(&prompts) {
                        backend.start(&start(slot, tokens, 12)).expect("start");
                    }
                    backend.decode(12).expect("steps");
                    for event in events(&mut backend) {
                        let row = rows[rows.len() - 1 - event.slot.0 as usize];
                        let hash = event.logits_hash.expect("asked for");
                        let token = (event.token, event.logprob.to_bits(), hash);
                        traces[row as usize].push(token);
                    }
                    backend.clear(&slots.map(SequenceId).collect::<Vec<_>>());
                }
                let name = format!("{path:?}, {n_threads} threads, {n_together} together");
                assert!(traces.iter().all(|trace| trace.len() == 12));
                assert_eq!(
                    *first.get_or_insert_with(|| traces.clone()),
                    traces,
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn eight_and_sixteen_bit_copies_of_mxfp4_experts_give_the_same_bits() {
    kinds().into_iter().for_each(copies_give_the_same_bits);
}

fn copies_give_the_same_bits(path: CpuPath) {
    let tokens = prompt(5, 40);
    let mut base = None;
    for (precision, kernel) in [
        (Precision::Stored, "moe_matmul_mxfp4"),
        (Precision::Bits4, "moe_matmul_mxfp4"),
        (Precision::Experts8, "moe_matmul_mxint8"),
        (Precision::Bits16, "moe_matmul_bf16"),
    ] {
        for exact in [true, false] {
            let mut opened = backend_on(path, precision, exact);
            let hashes = score(&mut opened, &tokens);
            let base = base.get_or_insert([None, None]);
            let base = base[usize::from(exact)].get_or_insert_with(|| hashes.clone());
            assert_eq!(*base, hashes, "{}", precision.name());
            let calls = opened.kernel_calls();
            assert_eq!(
                calls[kernel] % 6,
                0,
                "two products for each of three layers"
            );
            let other = calls
                .keys()
                .find(|&name| name.starts_with("moe") && name != kernel);
            assert_eq!(other, None, "no other kernel multiplied experts");
        }
    }
}

#[test]
fn every_policy_changes_what_it_names_and_nothing_else() {
    let checkpoint = checkpoint();
    let tokens = prompt(5, 40);
    let mut seen: Vec<Vec<u64>> = Vec::new();
    for (precision, changed) in [
        (Precision::Bits4, &[][..]),
        (Precision::Bits8, &["attention", "lm_head"][..]),
        (Precision::Bits4Dense8, &["attention", "lm_head"][..]),
        (Precision::Bits4Dense4, &["attention", "lm_head"][..]),
    ] {
        let mut opened =
            CpuBackend::open(&checkpoint, precision, SHAPE, options(true)).expect("it opens");
        for (class, deviation) in opened.model.deviation().classes() {
            let relative = deviation.relative();
            let expected = match (changed.contains(&class), precision) {
                (false, _) => 0.0..=0.0,
                (true, Precision::Bits4Dense4) => 0.05..=0.2,
                (true, _) => 0.001..=0.02,
            };
            assert!(
                expected.contains(&relative),
                "{} of {class}: {relative}",
                precision.name()
            );
        }
        seen.push(score(&mut opened, &tokens));
    }
    // 8bit's experts are exact copies, so it is 4bit-dense8 in other bytes.
    assert_eq!(seen[1], seen[2]);
    assert_ne!(seen[0], seen[1]);
    assert_ne!(seen[1], seen[3]);
}

#[test]
fn one_flipped_weight_code_changes_the_hash() {
    let mut maker = Maker::new(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let tokens = prompt(5, 40);
    let hashes = |maker: &Maker| {
        let opened = CpuBackend::open(&maker.open(), Precision::Experts8, SHAPE, options(false));
        score(&mut opened.expect("it opens"), &tokens)
    };
    // The highest bit of one magnitude of an expert.
    let flip = |maker: &mut Maker, expert: usize| {
        let name = "model.layers.1.mlp.experts.down_proj_blocks";
        let (_, shape, codes) = maker.tensors.get_mut(name).expect("it was made");
        let an_expert: usize = shape[1..].iter().product();
        codes[expert * an_expert + an_expert / 2] ^= 0x40;
    };
    let before = hashes(&maker);
    let mut n_seen = 0;
    for expert in 0..EXPERTS {
        flip(&mut maker, expert);
        n_seen += usize::from(before != hashes(&maker));
        flip(&mut maker, expert);
    }
    // An expert that no token was sent to may hold anything.
    assert!(n_seen >= 2, "{n_seen} of {EXPERTS} flips were seen");
}

#[test]
fn memory_is_as_planned_for_every_format() {
    for experts in [MatrixFormat::Mxfp4, MatrixFormat::Bf16] {
        for norms in [VectorFormat::Bf16, VectorFormat::F32] {
            let checkpoint = Maker::new(experts, norms).open();
            for precision in Precision::ALL {
                for exact in [true, false] {
                    let format = checkpoint.weight_format(precision);
                    assert_eq!(format.vectors, norms);
                    let options = options(exact);
                    let planned =
                        CpuBackend::planned_memory(checkpoint.config(), format, &SHAPE, &options);
                    let opened = CpuBackend::open(&checkpoint, precision, SHAPE, options);
                    let opened = opened.expect("it opens");
                    assert_eq!(opened.memory(), planned);
                    let classes = CpuModel::planned_bytes(checkpoint.config(), format);
                    assert_eq!(opened.loaded_bytes(), classes);
                }
            }
            // What is not padded takes the bytes of the file.
            let stored = checkpoint.stored_bytes().expect("complete");
            let format = checkpoint.weight_format(Precision::Stored);
            let planned = CpuModel::planned_bytes(checkpoint.config(), format);
            assert_eq!(planned.embedding, stored.embedding);
            if norms == VectorFormat::Bf16 {
                assert_eq!(planned.experts, stored.experts);
                assert_eq!(planned.attention, stored.attention);
                assert_eq!(planned.norms, stored.norms);
            }
        }
    }
}

#[test]
fn eight_bit_experts_take_33_bytes_for_17() {
    let checkpoint = checkpoint();
    let of = |precision| {
        let planned =
            CpuModel::planned_bytes(checkpoint.config(), checkpoint.weight_format(precision));
        // Biases are the same in both.
        planned.experts - (3 * EXPERTS * (2 * WIDTH + HIDDEN) * 2) as u64
    };
    assert_eq!(of(Precision::Experts8) * 17, of(Precision::Bits4) * 33);
}

#[test]
fn impossible_shapes_are_errors() {
    let open = |shape| CpuBackend::open(&checkpoint(), Precision::Stored, shape, options(true));
    let huge = EngineShape {
        n_pages: 1 << 24,
        ..SHAPE
    };
    assert!(matches!(open(huge), Err(EngineError::OutOfMemory { .. })));
    let none = EngineShape {
        n_slots: 0,
        ..SHAPE
    };
    assert!(matches!(
        open(none),
        Err(EngineError::Config(ConfigError::Shape {
            key: "n_slots",
            ..
        }))
    ));
}

#[test]
fn slots_stop_and_go_on_apart() {
    let mut backend = backend(true);
    let (a, b) = (prompt(1, 10), prompt(2, 30));
    for (slot, tokens) in [(0, &a), (1, &b)] {
        map_pages(&mut backend, slot);
        backend
            .prefill(&[span(slot, 0, &tokens[..tokens.len() - 1])])
            .expect("prefill");
    }
    backend.start(&start(0, &a, 20)).expect("start");
    backend.decode(20).expect("steps");
    let alone = events(&mut backend);
    assert_eq!(alone.len(), 20);
    assert_eq!(alone[19].stop, Some(StopReason::Length));
    assert!(alone[..19].iter().all(|event| event.stop.is_none()));
    assert_eq!((alone[0].position, alone[19].position), (10, 29));
    // The same row again, now ended by the token that it produced third.
    backend.clear(&[SequenceId(0)]);
    map_pages(&mut backend, 0);
    backend.prefill(&[span(0, 0, &a[..9])]).expect("prefill");
    let stop = alone[3].token;
    let first = alone
        .iter()
        .position(|event| event.token == stop)
        .expect("it is there");
    let mut ended = start(0, &a, 20);
    ended.stop_tokens = Arc::new([stop]);
    backend.start(&ended).expect("start");
    backend.start(&start(1, &b, 20)).expect("start");
    backend.decode(100).expect("steps");
    let both = events(&mut backend);
    let of = |slot| {
        both.iter()
            .filter(move |event| event.slot == SequenceId(slot))
    };
    assert_eq!(of(0).count(), first + 1);
    assert_eq!(
        of(0).next_back().and_then(|event| event.stop),
        Some(StopReason::Stop)
    );
    assert_eq!(of(1).count(), 20);
    // The context's end stops a slot, too.
    backend.clear(&[SequenceId(1)]);
    map_pages(&mut backend, 1);
    let long = prompt(3, 505);
    backend
        .prefill(&[span(1, 0, &long[..504])])
        .expect("prefill");
    backend.start(&start(1, &long, 100)).expect("start");
    backend.decode(100).expect("steps");
    let last = events(&mut backend).pop().expect("tokens came");
    assert_eq!((last.position, last.stop), (511, Some(StopReason::Length)));
}

#[test]
fn tokens_outside_the_vocabulary_and_nan_are_errors() {
    let mut opened = backend(true);
    map_pages(&mut opened, 0);
    let refused = opened.prefill(&[span(0, 0, &[3, VOCAB as u32])]);
    assert!(matches!(
        refused,
        Err(EngineError::Token {
            token: 77,
            n_vocab: 77
        })
    ));

    let mut maker = Maker::new(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let (.., bytes) = maker
        .tensors
        .get_mut("model.norm.weight")
        .expect("it is there");
    bytes[..2].copy_from_slice(&crate::quant::bf16::NAN.to_le_bytes());
    let opened = CpuBackend::open(&maker.open(), Precision::Stored, SHAPE, options(true));
    let mut backend = opened.expect("it opens");
    map_pages(&mut backend, 2);
    let tokens = prompt(1, 5);
    backend
        .prefill(&[span(2, 0, &tokens[..4])])
        .expect("prefill");
    backend.start(&start(2, &tokens, 5)).expect("start");
    let failed = backend.decode(5);
    assert!(matches!(
        failed,
        Err(EngineError::NotFinite {
            slot: 2,
            position: 5
        })
    ));
    let failed = backend.score(&span(1, 0, &[]), &mut |_, _| ());
    assert!(failed.is_ok(), "an empty span is nothing");
}

#[test]
fn lanes_packed_together_are_those_packed_one_by_one() {
    use super::lanes::LANES;
    use super::weights::{
        Mxfp4Tiles, pack_bf16, pack_bf16_run, pack_mxfp4_block, pack_mxfp4_lanes,
    };
    const N_K: usize = 96;
    let byte = |i: usize| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
    let mut together = vec![0; Mxfp4Tiles::tile_bytes(N_K)];
    let mut alone = together.clone();
    let mut run = vec![0; N_K / 2 * LANES];
    let mut values = run.clone();
    for block in 0..N_K / 32 {
        let scales: [u8; LANES] = std::array::from_fn(|lane| byte(block + 3 * lane));
        let codes: [[u8; 16]; LANES] =
            std::array::from_fn(|lane| std::array::from_fn(|i| byte(block * 7 + lane * 16 + i)));
        pack_mxfp4_lanes(&mut together, block, &scales, &codes);
        for lane in 0..LANES {
            pack_mxfp4_block(&mut alone, lane, block, scales[lane], &codes[lane]);
            let bits: [u16; 32] = std::array::from_fn(|i| {
                u16::from_le_bytes([byte(i + lane), byte(i * lane + block)])
            });
            pack_bf16_run(&mut run, lane, block * 32, &bits);
            for (i, &bits) in bits.iter().enumerate() {
                pack_bf16(&mut values, lane, block * 32 + i, bits);
            }
        }
    }
    assert_eq!(together, alone);
    assert_eq!(run, values);
}
