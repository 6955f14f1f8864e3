//! The rows, and what is checked of them: every way gives the steps of the row alone, given tokens
//! have the logits of the steps that made them, and a second stage goes on where a first one stood.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use podium::batch::Job;
use podium::engine::generate::{GenerateOptions, generate, score_tokens};
use podium::engine::kv::pages_for;
use podium::engine::sample::{log_softmax_at, logits_hash, philox4x32, trace_hash};
use podium::engine::{Backend, EngineShape, SamplingParams, TokenId};

use crate::recorder::{Recorder, Seen, Step, Traces, same};
use crate::ways::{WAY, Way};

/// Which model, and how long its rows are.
pub struct Bench<'a> {
    pub open: &'a dyn Fn(EngineShape, bool) -> Box<dyn Backend + 'a>,
    pub n_vocab: usize,
    pub longest: usize,
    pub shared: usize,
}

#[derive(Clone)]
struct Row {
    hash: u64,
    prompt: Arc<[TokenId]>,
    n_new: usize,
    n_samples: u32,
}

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

    pub fn check(&self, sampling: SamplingParams, ways: &[Way]) {
        let rows = self.rows();
        let base = self.run(&WAY, &rows, sampling);
        let outputs: BTreeSet<Vec<TokenId>> = base
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
