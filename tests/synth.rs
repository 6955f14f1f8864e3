//! `podium synth`: its checkpoints load, run, repeat by seed, and are lively.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::{Scratch, bits, jsonl, run, run_ok};

/// gpt-oss's vocabulary on a small model, so that its special ids are the real ones.
fn shape(n_vocab: usize) -> String {
    json!({
        "num_hidden_layers": 4, "num_local_experts": 32, "num_experts_per_tok": 4,
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": n_vocab,
        "sliding_window": 16, "max_position_embeddings": 4096, "rope_theta": 150_000,
        "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention", "full_attention",
        ],
    })
    .to_string()
}

#[test]
fn a_checkpoint_runs_from_prompt_file_to_submission() {
    let scratch = Scratch::new("synth");
    scratch.write("shape.json", shape(201_088));
    let args = [
        "synth",
        "model",
        "--shape",
        "shape.json",
        "--shard-size",
        "20MB",
    ];
    let text = String::from_utf8(run_ok(scratch.path(), &args).stdout).unwrap();
    assert!(text.contains("random weights"), "{text}");
    assert!(scratch.join("model/model.safetensors.index.json").is_file());
    let generation = std::fs::read(scratch.join("model/generation_config.json")).unwrap();
    let generation: Value = serde_json::from_slice(&generation).unwrap();
    assert_eq!(
        generation["eos_token_id"],
        json!([200_002, 199_999, 200_012])
    );

    let row = |i: usize| json!({"id": i, "question": format!("Été {i}: 1 + {i}?")}).to_string();
    scratch.write(
        "rows.jsonl",
        (0..6).map(|i| row(i) + "\n").collect::<String>(),
    );
    let eval = |out: &str, model: &str| {
        let args = format!(
            "eval rows.jsonl --model {model} --max-new-tokens 24 --quiet --trace-hash --out {out}"
        );
        run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
        bits(&scratch.join(out))
    };
    let found = eval("a", "model");
    let distinct: BTreeSet<&String> = found.values().collect();
    assert_eq!(distinct.len(), 6, "rows differ");
    for row in jsonl(&scratch.join("a/results.jsonl")) {
        let ids = row["output_ids"].as_array().unwrap();
        let distinct: BTreeSet<u64> = ids.iter().map(|id| id.as_u64().unwrap()).collect();
        assert!(
            distinct.len() > ids.len() / 2,
            "a row is no one token: {ids:?}"
        );
    }
    // Prompts are bytes and special tokens, under the released ids.
    let prompt = &jsonl(&scratch.join("a/prompts.jsonl"))[0];
    let text = prompt["text"].as_str().unwrap();
    let bytes: usize = text
        .split("<|")
        .enumerate()
        .map(|(i, part)| match part.split_once("|>") {
            Some((_, rest)) if i > 0 => 1 + rest.len(),
            _ => part.len(),
        })
        .sum();
    assert_eq!(
        prompt["n_tokens"].as_u64().unwrap() as usize,
        bytes,
        "{text}"
    );

    // The same seed gives the same weights, another one others.
    let again = ["synth", "again", "--shape", "shape.json", "--quiet"];
    run_ok(scratch.path(), &again);
    assert_eq!(found, eval("b", "again"));
    let other = [&again[..1], &["other"], &again[2..], &["--seed", "1"]].concat();
    run_ok(scratch.path(), &other);
    assert_ne!(found, eval("c", "other"));

    // The same weights without files.
    assert_eq!(found, eval("d", "synthetic:shape.json"));
    let other = eval("e", "synthetic:shape.json:1");
    assert_eq!(eval("f", "other"), other);
    assert_ne!(found, other);
    let run_json = std::fs::read(scratch.join("e/run.json")).unwrap();
    let run_json: Value = serde_json::from_slice(&run_json).unwrap();
    assert_eq!(run_json["model_path"], "synthetic:shape.json:1");
    for args in [
        "plan synthetic:shape.json",
        "inspect rows.jsonl --model synthetic:shape.json",
    ] {
        run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    }
}

#[test]
fn what_it_cannot_write_it_refuses() {
    let scratch = Scratch::new("synth-errors");
    scratch.write("small.json", shape(200));
    for (shape, word) in [
        ("gpt-5", "unknown shape `gpt-5`"),
        ("small.json", "at least 266"),
    ] {
        let output = run(scratch.path(), &["synth", "out", "--shape", shape]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(word), "{text}");
    }
    assert!(!scratch.join("out").exists());

    // A large shape is planned for, and made while it is loaded: there is nothing to convert.
    scratch.write(
        "rows.jsonl",
        json!({"id": 1, "question": "1 + 1?"}).to_string(),
    );
    let plan = "plan synthetic:gpt-oss-20b --host-memory 64GiB --context 1024 --batch 4";
    run_ok(scratch.path(), &plan.split(' ').collect::<Vec<_>>());
    let args = [
        "quantize",
        "synthetic:gpt-oss-20b",
        "16bit",
        "--precision",
        "16bit",
    ];
    let output = run(scratch.path(), &args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("made while they are loaded"), "{text}");
    assert!(text.contains("`podium synth`"), "{text}");
    let args = ["inspect", "rows.jsonl", "--model", "synthetic:small.json"];
    let output = run(scratch.path(), &args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("at least 266"), "{text}");
}
