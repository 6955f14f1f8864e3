//! The promise that a row's tokens and log-probabilities depend on the row alone: bit for bit the
//! same at any batch size, thread count and order, in shards, with and without prefix reuse, with
//! all memory filled with NaN first.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use support::{Scratch, bits, jsonl, nano_rows, run_ok};

/// nano's sliding window.
const WINDOW: u64 = 32;
/// Positions of two KV pages.
const TWO_PAGES: u64 = 512;

type Bits = BTreeMap<(String, u64), String>;

/// Runs `dataset` with `flags` and gives the bits of every sample.
fn eval(scratch: &Scratch, name: &str, dataset: &Path, flags: &str) -> Bits {
    let out = scratch.join(name);
    let mut args = vec![
        "eval",
        dataset.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    args.extend(["--quiet", "--trace-hash"]);
    args.extend(flags.split_whitespace());
    run_ok(scratch.path(), &args);
    bits(&out)
}

/// Holds every way of running `rows` against plain sequential decoding of one row at a time.
/// The longest row must reach past `least_positions`, so that pages and rings are really crossed.
fn check(name: &str, rows: &[String], common: &str, n_samples: usize, least_positions: u64) {
    let scratch = Scratch::new(name);
    let dataset = scratch.write("rows.jsonl", rows.join("\n"));
    let mut reversed: Vec<String> = rows.to_vec();
    reversed.reverse();
    reversed.rotate_left(rows.len() / 3);
    let shuffled = scratch.write("shuffled.jsonl", reversed.join("\n"));

    let base = eval(
        &scratch,
        "base",
        &dataset,
        &format!("{common} --batch 1 --threads 1"),
    );
    assert_eq!(base.len(), rows.len() * n_samples);
    let distinct: std::collections::BTreeSet<_> = base.values().collect();
    // A sure model's samples of one row are often the same; different rows never are.
    let least = rows.len() + usize::from(n_samples > 1);
    assert!(
        distinct.len() >= least,
        "the outputs hardly differ: a weak test"
    );

    let positions = jsonl(&scratch.join("base/results.jsonl"))
        .into_iter()
        .map(|row| {
            row["prompt_tokens"].as_u64().unwrap()
                + row["output_ids"].as_array().unwrap().len() as u64
        });
    assert!(
        positions.max().unwrap() > least_positions,
        "the rows are too short for this test"
    );

    for (variant, flags) in [
        ("batch-5", "--batch 5 --threads 2"),
        ("batch-32", "--batch 32 --threads 1"),
        ("auto", "--batch auto --threads 2"),
        ("static", "--batch 7 --no-refill"),
        ("no-reuse", "--batch 32 --no-prefix-reuse"),
        ("poison", "--batch 32 --poison"),
        ("poison-1", "--batch 1 --poison --no-prefix-reuse"),
    ] {
        let found = eval(&scratch, variant, &dataset, &format!("{common} {flags}"));
        same(&base, &found, variant);
    }
    let found = eval(
        &scratch,
        "shuffled",
        &shuffled,
        &format!("{common} --batch 5"),
    );
    same(&base, &found, "shuffled rows");

    let mut merge = vec!["merge".to_owned()];
    for shard in 1..=3 {
        let part = format!("shard-{shard}");
        let flags = format!(
            "{common} --shard {shard}/3 --batch {}",
            [1, 4, 16][shard - 1]
        );
        let found = eval(&scratch, &part, &dataset, &flags);
        assert!(found.len() < base.len());
        merge.push(scratch.join(&part).to_str().unwrap().to_owned());
    }
    let merged = scratch.join("merged");
    merge.extend(["--out".to_owned(), merged.to_str().unwrap().to_owned()]);
    run_ok(
        scratch.path(),
        &merge.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    same(&base, &bits(&merged), "three shards merged");
    for file in [
        "submission.csv",
        "submission.jsonl",
        "scores.csv",
        "prompts.jsonl",
    ] {
        let read = |run: &str| std::fs::read(scratch.join(run).join(file)).unwrap();
        assert_eq!(read("base"), read("merged"), "{file} of the merged shards");
        assert_eq!(read("base"), read("auto"), "{file} at another batch size");
    }
}

fn same(base: &Bits, found: &Bits, variant: &str) {
    assert_eq!(
        base.len(),
        found.len(),
        "{variant}: another number of samples"
    );
    for (key, value) in base {
        assert_eq!(
            Some(value),
            found.get(key),
            "{variant}: row {key:?} differs"
        );
    }
}

/// Rows of very different lengths that share beginnings: what a lively random model gets.
fn long_rows() -> Vec<String> {
    let context = "The quick brown fox counts 1 2 3 4 5 6 7 8 9 and runs. ".repeat(9);
    let mut rows = Vec::new();
    for i in 0..10 {
        // Some share the whole context (over a page of KV), some half of it, some nothing.
        let shared = match i % 3 {
            0 => context.as_str(),
            1 => &context[..context.len() / 2],
            _ => "",
        };
        let question = format!("{shared}Row {i}: what is {} + {}?", i * 17, i * i);
        rows.push(serde_json::json!({"id": format!("row-{i}"), "question": question}).to_string());
    }
    rows
}

#[test]
fn nano_greedy() {
    check("nano-greedy", &nano_rows("mixed.jsonl", 40), "", 1, WINDOW);
}

#[test]
fn nano_sampled() {
    check(
        "nano-sampled",
        &nano_rows("mixed.jsonl", 16),
        "--temperature 1 --samples 4 --seed 5",
        4,
        WINDOW,
    );
}

#[test]
fn nano_exact() {
    check(
        "nano-exact",
        &nano_rows("mixed.jsonl", 12),
        "--exact",
        1,
        WINDOW,
    );
}

#[test]
fn lively_greedy_past_two_pages() {
    lively("lively-greedy", "", 1);
}

#[test]
fn lively_sampled_past_two_pages() {
    lively("lively-sampled", "--temperature 1 --samples 4", 4);
}

fn lively(name: &str, flags: &str, n_samples: usize) {
    let model = Scratch::new("lively-model");
    support::checkpoint::write(model.path(), 11);
    let flags = format!(
        "--model {} --profile nano --max-new-tokens 280 {flags}",
        model.path().display()
    );
    check(name, &long_rows(), &flags, n_samples, TWO_PAGES);
}
