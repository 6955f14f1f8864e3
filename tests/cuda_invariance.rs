//! The promise about bits at the shape that matters: four layers of gpt-oss-20b on a GPU, through
//! the loop that a run goes through. Every step's token, log-probability and logits hash of every
//! row must be those of the row alone, whatever slots, prefill passes, shared prefixes, pages and
//! neighbours it had. The same check of a tiny model on the CPU shows that it can tell.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use podium::batch::Job;
use podium::engine::checkpoint::{Checkpoint, MatrixFormat, Precision, VectorFormat};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::memory::{BUCKETS, driver_bytes};
use podium::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use podium::engine::generate::{
    GenerateOptions, Generation, JobError, Observer, StepKind, StepReport, generate, score_tokens,
};
use podium::engine::kv::pages_for;
use podium::engine::sample::{log_softmax_at, logits_hash, philox4x32, trace_hash};
use podium::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId,
    SamplingParams, SequenceId, SlotStart, Span, TokenEvent, TokenId, shapes,
};

/// A row and sample.
type Key = (u64, u32);

/// What a step of a row came to: token, bits of its log-probability, hash of its logits.
type Step = (TokenId, u32, u64);

/// Steps by the position of the token they made.
type Traces = BTreeMap<Key, BTreeMap<usize, Step>>;

/// A backend that writes down every step. A row that starts again must repeat itself.
struct Recorder<'a> {
    inner: Box<dyn Backend + 'a>,
    rows: HashMap<SequenceId, Key>,
    traces: Traces,
    n_repeated: usize,
}

impl Recorder<'_> {
    fn record(&mut self, event: &TokenEvent) {
        let key = self.rows[&event.slot];
        let hash = event.logits_hash.expect("hashes were asked for");
        let step = (event.token, event.logprob.to_bits(), hash);
        let before = self
            .traces
            .entry(key)
            .or_default()
            .insert(event.position, step);
        if let Some(before) = before {
            self.n_repeated += 1;
            assert_eq!(
                before, step,
                "row {key:?} at {} when redone",
                event.position
            );
        }
    }
}

impl Backend for Recorder<'_> {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        self.inner.map_page(sequence, index, page);
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        self.inner.fork(fork)
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.inner.prefill(spans)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.rows.insert(start.slot, (start.row_hash, start.sample));
        self.inner.start(start)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        let n_before = events.len();
        let polled = self.inner.poll(events);
        for event in &events[n_before..] {
            self.record(event);
        }
        polled
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        self.inner.clear(sequences);
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.inner.score(span, visit)
    }

    fn memory(&self) -> BackendMemory {
        self.inner.memory()
    }
}

/// Which model, and how long its rows are.
struct Bench<'a> {
    open: &'a dyn Fn(EngineShape, bool) -> Box<dyn Backend + 'a>,
    n_vocab: usize,
    longest: usize,
    shared: usize,
}

#[derive(Clone)]
struct Row {
    hash: u64,
    prompt: Arc<[TokenId]>,
    n_new: usize,
    n_samples: u32,
}

/// One way of running the rows.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    n_slots: usize,
    prefill_rows: usize,
    steps_per_call: usize,
    reuse: bool,
    refill: bool,
    poison: bool,
    /// Jobs are moved to every so many places: another order among equals, other neighbours.
    stride: usize,
    /// Short rows beside those that are looked at.
    n_mates: usize,
    n_pages: Option<usize>,
}

const WAY: Way = Way {
    name: "one row at a time",
    n_slots: 1,
    prefill_rows: 1000,
    steps_per_call: 4,
    reuse: false,
    refill: true,
    poison: false,
    stride: 1,
    n_mates: 0,
    n_pages: None,
};

/// The longest row's pages and two more: rows that pass a page's border together are evicted.
const FEW_PAGES: usize = 22;

const WAYS: [Way; 8] = [
    Way {
        name: "7 slots, passes of 64, memory of NaN",
        n_slots: 7,
        prefill_rows: 64,
        steps_per_call: 1,
        reuse: true,
        poison: true,
        ..WAY
    },
    Way {
        name: "8 slots, whole prompts, another order",
        n_slots: 8,
        prefill_rows: 16_384,
        steps_per_call: 16,
        reuse: true,
        stride: 17,
        ..WAY
    },
    Way {
        name: "9 slots without refill or reuse, memory of NaN",
        n_slots: 9,
        refill: false,
        poison: true,
        ..WAY
    },
    Way {
        name: "9 slots, too few pages, memory of NaN",
        n_slots: 9,
        reuse: true,
        poison: true,
        n_pages: Some(FEW_PAGES),
        ..WAY
    },
    Way {
        name: "64 slots among short rows",
        n_slots: 64,
        prefill_rows: 16_384,
        steps_per_call: 16,
        reuse: true,
        stride: 7,
        n_mates: 150,
        ..WAY
    },
    Way {
        name: "256 slots among short rows, memory of NaN",
        n_slots: 256,
        reuse: true,
        poison: true,
        stride: 29,
        n_mates: 230,
        ..WAY
    },
    Way {
        name: "256 slots without reuse, passes of 64",
        n_slots: 256,
        prefill_rows: 64,
        steps_per_call: 8,
        n_mates: 230,
        ..WAY
    },
    Way {
        name: "256 slots, whole prompts, memory of NaN",
        n_slots: 256,
        prefill_rows: 16_384,
        poison: true,
        stride: 3,
        n_mates: 230,
        ..WAY
    },
];

impl Bench<'_> {
    fn tokens(&self, row: u64, n: usize) -> Vec<TokenId> {
        let token = |i: usize| {
            let [word, ..] = philox4x32([row as u32, i as u32, 0, 0], [0x1BAD, 0xB002]);
            ((u64::from(word) * self.n_vocab as u64) >> 32) as TokenId
        };
        (0..n).map(token).collect()
    }

    /// Lengths about the borders of tiles, windows, rings and pages; a long prefix that some
    /// share, with tails within and past its last page; several samples of some rows.
    fn rows(&self) -> Vec<Row> {
        let (longest, shared) = (self.longest, self.shared);
        let mut lengths = vec![
            1, 1, 2, 3, 15, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300,
        ];
        // Several past a border of pages at about the same step.
        lengths.extend(496..506);
        lengths.extend([640, shared + 1, longest / 2, longest]);
        let mut rows = Vec::new();
        let mut add = |prompt: Vec<TokenId>, n_samples: u32| {
            let hash = rows.len() as u64;
            rows.push(Row {
                hash,
                prompt: prompt.into(),
                // They do not end together.
                n_new: 24 + 3 * (rows.len() % 3),
                n_samples,
            });
        };
        for (i, &length) in lengths.iter().enumerate() {
            let n_samples = if length == 300 { 3 } else { 1 };
            add(self.tokens(1000 + i as u64, length), n_samples);
        }
        let prefix = self.tokens(77, shared);
        for (i, tail) in [1, 2, 37, 256, 257, 700].into_iter().enumerate() {
            let own = self.tokens(2000 + i as u64, tail);
            let prompt = [&prefix[..], &own].concat();
            add(prompt, if tail == 37 { 3 } else { 1 });
        }
        rows
    }

    fn mates(&self, n: usize) -> impl Iterator<Item = Row> + '_ {
        (0..n).map(|i| Row {
            hash: 10_000 + i as u64,
            prompt: self.tokens(3000 + i as u64, 1 + i % 23).into(),
            n_new: 4 + i % 19,
            n_samples: 1,
        })
    }

    fn backend(&self, way: &Way, rows: &[Row]) -> Recorder<'_> {
        let needed = |row: &Row| pages_for(row.prompt.len() + row.n_new) * row.n_samples as usize;
        let n_forks = if way.reuse { 6 } else { 0 };
        // A refill keeps a page free for every fourth row.
        let all = rows.iter().map(needed).sum::<usize>() + way.n_slots / 4 + 32;
        let longest = rows.iter().map(|row| row.prompt.len() + row.n_new).max();
        let shape = EngineShape {
            n_slots: way.n_slots,
            n_forks,
            n_pages: way.n_pages.unwrap_or(all),
            max_context: longest.unwrap_or(1),
            prefill_rows: way.prefill_rows,
        };
        Recorder {
            inner: (self.open)(shape, way.poison),
            rows: HashMap::new(),
            traces: Traces::new(),
            n_repeated: 0,
        }
    }

    fn run(&self, way: &Way, rows: &[Row], sampling: SamplingParams) -> Traces {
        let begun = Instant::now();
        let rows: Vec<Row> = rows
            .iter()
            .cloned()
            .chain(self.mates(way.n_mates))
            .collect();
        let mut jobs: Vec<Job> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            jobs.extend((0..row.n_samples).map(|sample| Job {
                row: i,
                sample,
                prompt: Arc::clone(&row.prompt),
                max_new_tokens: row.n_new,
                row_hash: row.hash,
                may_go_on: false,
            }));
        }
        let n_jobs = jobs.len();
        jobs.sort_by_key(|job| (job.row * way.stride) % rows.len());
        let mut backend = self.backend(way, &rows);
        let options = GenerateOptions {
            refill: way.refill,
            prefix_reuse: way.reuse,
            steps_per_call: way.steps_per_call,
            ..GenerateOptions::new(sampling, Arc::new([]))
        };
        let mut seen = Seen::default();
        generate(
            &mut backend,
            jobs,
            &options,
            &AtomicBool::new(false),
            &mut seen,
        )
        .unwrap();
        println!(
            "{}: {:.1} s, {} prefills, {} tokens reused, {} rows evicted, {} steps repeated",
            way.name,
            begun.elapsed().as_secs_f64(),
            seen.n_prefills,
            seen.n_reused,
            seen.n_evicted,
            backend.n_repeated,
        );
        assert_eq!(seen.done.len(), n_jobs, "{}", way.name);
        for (at, done) in &seen.done {
            let row = &rows[at.0];
            let trace = &backend.traces[&(row.hash, at.1)];
            assert_eq!(done.output_ids.len(), row.n_new);
            let hash = trace.values().fold(0, |sum, step| trace_hash(sum, step.2));
            assert_eq!(done.trace_hash, Some(hash), "{}: {at:?}", way.name);
        }
        assert_eq!(seen.n_reused > 0, way.reuse, "{}", way.name);
        assert_eq!(seen.n_evicted > 0, way.n_pages.is_some(), "{}", way.name);
        assert_eq!(
            backend.n_repeated > 0,
            way.n_pages.is_some(),
            "{}",
            way.name
        );
        backend.traces
    }

    /// The logits of given tokens, against those of the steps that made them.
    fn check_forced(&self, rows: &[Row], base: &Traces) {
        for (poison, prefill_rows) in [(true, 64), (false, 16_384)] {
            let way = Way {
                poison,
                prefill_rows,
                n_slots: 3,
                ..WAY
            };
            let mut backend = self.backend(&way, rows);
            for row in rows {
                let trace = &base[&(row.hash, 0)];
                let fed = with_output(row, trace, row.n_new - 1);
                let mut n_seen = 0;
                let visit = &mut |position: usize, logits: &[f32]| {
                    let (token, logprob, hash) = trace[&(position + 1)];
                    let what = format!("{} tokens, position {position}", row.prompt.len());
                    assert_eq!(logits_hash(logits), hash, "{what}");
                    assert_eq!(log_softmax_at(logits, token).to_bits(), logprob, "{what}");
                    n_seen += 1;
                };
                score_tokens(&mut backend, &fed, row.prompt.len() - 1, visit).unwrap();
                assert_eq!(n_seen, row.n_new);
            }
        }
    }

    /// A second stage: rows that go on where they stood make the rest of their tokens, and rows
    /// with a new turn behind their reply are the same alone and beside others that share it.
    fn check_second_stage(&self, rows: &[Row], base: &Traces, sampling: SamplingParams) {
        let halved: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                prompt: with_output(row, &base[&(row.hash, 0)], row.n_new / 2).into(),
                n_new: row.n_new - row.n_new / 2,
                n_samples: 1,
                ..*row
            })
            .collect();
        let way = Way {
            name: "second halves",
            n_slots: 9,
            prefill_rows: 64,
            reuse: true,
            poison: true,
            ..WAY
        };
        for (key, found) in self.run(&way, &halved, sampling) {
            for (position, step) in &found {
                assert_eq!(base[&key][position], *step, "second half of {key:?}");
            }
        }
        // Two turns behind each reply, in batches of one and of many.
        let mut turns = Vec::new();
        for row in rows.iter().step_by(4) {
            let replied = with_output(row, &base[&(row.hash, 0)], row.n_new);
            for turn in 0..2 {
                let hash = 20_000 + 2 * row.hash + turn;
                let own = self.tokens(hash, 5 + 40 * turn as usize);
                turns.push(Row {
                    hash,
                    prompt: [&replied[..], &own].concat().into(),
                    n_new: 12,
                    n_samples: 1,
                });
            }
        }
        let alone = Way {
            name: "second turns, one at a time",
            ..WAY
        };
        let together = Way {
            name: "second turns together",
            n_slots: 64,
            ..way
        };
        let alone = self.run(&alone, &turns, sampling);
        same(
            &alone,
            &self.run(&together, &turns, sampling),
            together.name,
        );
    }

    fn check(&self, sampling: SamplingParams, ways: &[Way]) {
        let rows = self.rows();
        let base = self.run(&WAY, &rows, sampling);
        let outputs: std::collections::BTreeSet<Vec<TokenId>> = base
            .values()
            .map(|trace| trace.values().map(|step| step.0).collect())
            .collect();
        let n_rows = rows.len();
        assert!(
            outputs.len() >= n_rows - 2,
            "outputs hardly differ: a weak test"
        );
        for way in ways {
            same(&base, &self.run(way, &rows, sampling), way.name);
        }
        self.check_forced(&rows, &base);
        self.check_second_stage(&rows, &base, sampling);
    }
}

/// A row's prompt and the first tokens of its reply.
fn with_output(row: &Row, trace: &BTreeMap<usize, Step>, n: usize) -> Vec<TokenId> {
    let output = trace.values().take(n).map(|step| step.0);
    row.prompt.iter().copied().chain(output).collect()
}

fn same(base: &Traces, found: &Traces, way: &str) {
    for (key, expected) in base {
        let found = found
            .get(key)
            .unwrap_or_else(|| panic!("{way}: no row {key:?}"));
        let differs = expected
            .iter()
            .find(|(position, step)| found.get(position) != Some(step));
        if let Some((position, step)) = differs {
            let found = found.get(position);
            panic!("{way}: row {key:?} at position {position}: {found:?} for {step:?}");
        }
    }
}

#[derive(Default)]
struct Seen {
    done: BTreeMap<(usize, u32), Generation>,
    n_prefills: usize,
    n_reused: usize,
    n_evicted: usize,
}

impl Observer for Seen {
    fn finished(&mut self, generation: Generation) {
        let key = (generation.row, generation.sample);
        self.n_reused += generation.reused_tokens;
        assert!(self.done.insert(key, generation).is_none(), "{key:?} twice");
    }

    fn failed(&mut self, row: usize, _sample: u32, error: JobError) {
        panic!("row {row}: {error}");
    }

    fn step(&mut self, report: &StepReport) {
        self.n_prefills += usize::from(report.kind == StepKind::Prefill);
        self.n_evicted += report.n_evicted;
    }
}

const DRAWN: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_p: 0.95,
    top_k: 0,
    seed: 9,
};

/// Captures a step of every row count; the driver then has what it keeps of its own.
fn check_memory(loaded: &Arc<Loaded>, free_before: u64) {
    let n_slots = 256;
    let shape = EngineShape {
        n_slots,
        n_forks: 0,
        n_pages: n_slots,
        max_context: PAGE_POSITIONS,
        prefill_rows: 2048,
    };
    let options = CudaOptions::default();
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, options).unwrap();
    let free = || loaded.device.memory().unwrap().0;
    let free_allocated = free();
    for n_rows in BUCKETS.into_iter().filter(|&n_rows| n_rows <= n_slots) {
        let slots: Vec<SequenceId> = (0..n_rows as u32).map(SequenceId).collect();
        for &slot in &slots {
            backend.map_page(slot, 0, PageId(slot.0));
            let start = SlotStart {
                slot,
                token: slot.0,
                position: 0,
                sampling: DRAWN,
                row_hash: u64::from(slot.0),
                sample: 0,
                stop_tokens: Arc::new([]),
                max_new_tokens: 2,
            };
            backend.start(&start).unwrap();
        }
        // One as it is, one captured.
        let mut events = Vec::new();
        for _ in 0..2 {
            backend.decode(1).unwrap();
            while !backend.poll(&mut events).unwrap() {}
        }
        assert_eq!(events.len(), 2 * n_rows);
        backend.clear(&slots);
    }
    let memory = backend.memory();
    let allocated = memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes;
    let model = &loaded.model;
    let planned = allocated + driver_bytes(&model.config, model.format, n_slots);
    let used = free_before - free();
    println!(
        "device memory: {used} bytes used, {planned} planned, {allocated} allocated; {} while steps \
         were run and captured",
        free_allocated - free()
    );
    let off = used as f64 / planned as f64 - 1.0;
    assert!(off.abs() <= 0.02, "the plan is {:.1} % off", 100.0 * off);
}

#[test]
#[ignore = "needs a GPU"]
fn four_layers_of_gpt_oss_20b() {
    let mut config = shapes::named("gpt-oss-20b").unwrap();
    config.layers.truncate(4);
    let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    // The context stands before the first look at what is free.
    let device = Device::open(0).expect("a GPU");
    let (free, _) = device.memory().unwrap();
    let loaded = Arc::new(Loaded::synthetic(&config, format, 5, 0).expect("a GPU"));
    check_memory(&loaded, free);
    let open = |shape, poison| -> Box<dyn Backend> {
        let options = CudaOptions {
            trace_hash: true,
            poison,
        };
        Box::new(CudaBackend::new(Arc::clone(&loaded), shape, options).unwrap())
    };
    let bench = Bench {
        open: &open,
        n_vocab: config.n_vocab,
        // With the tokens it makes: 5,000.
        longest: 4970,
        shared: 1300,
    };
    bench.check(DRAWN, &WAYS);
    // Greedy rows may take another way through the last kernels.
    bench.check(SamplingParams::default(), &[WAYS[1], WAYS[5]]);
}

#[test]
fn a_tiny_model_on_the_cpu() {
    let folder = support::Scratch::new("invariance-model");
    support::checkpoint::write(folder.path(), 11);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let open = |shape, poison| -> Box<dyn Backend> {
        let options = CpuOptions {
            n_threads: 2,
            exact: false,
            trace_hash: true,
            poison,
        };
        Box::new(CpuBackend::open(&checkpoint, Precision::Stored, shape, options).unwrap())
    };
    let bench = Bench {
        open: &open,
        n_vocab: checkpoint.config().n_vocab,
        longest: 660,
        shared: 300,
    };
    bench.check(DRAWN, &WAYS[..6]);
}
