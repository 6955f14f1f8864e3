//! A checkpoint of 2 GB is loaded and run under a limit of its final copy and three layers.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::random::Random;
use support::{Scratch, jsonl, root};

const N_LAYERS: usize = 36;
const HIDDEN: usize = 1024;
const N_EXPERTS: usize = 32;
const N_HEADS: usize = 8;
const N_KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 608;

/// How a tensor is filled.
#[derive(Clone, Copy, PartialEq)]
enum Fill {
    /// Any bytes: MXFP4 codes.
    Codes,
    /// Scale bytes that keep products near 1.
    Scales,
    /// bf16 of either sign, about 2^-6 to 2^-5.
    Small,
    /// bf16 ones.
    Ones,
}

/// Eight bytes of a tensor.
fn word(fill: Fill, random: &mut Random) -> u64 {
    match fill {
        Fill::Codes => random.word(),
        Fill::Scales => 0x7777_7777_7777_7777 | (random.word() & 0x0101_0101_0101_0101),
        // Sign and mantissa at random, exponent 2^-6.
        Fill::Small => 0x3C80_3C80_3C80_3C80 ^ (random.word() & 0x807F_807F_807F_807F),
        Fill::Ones => 0x3F80_3F80_3F80_3F80,
    }
}

/// Names, types, shapes and contents of all tensors.
fn tensors() -> Vec<(String, &'static str, Vec<usize>, Fill)> {
    let mut all = Vec::new();
    let mut bf16 = |name: String, shape: &[usize], fill| {
        all.push((name, "BF16", shape.to_vec(), fill));
    };
    bf16(
        "model.embed_tokens.weight".into(),
        &[VOCAB, HIDDEN],
        Fill::Small,
    );
    bf16("lm_head.weight".into(), &[VOCAB, HIDDEN], Fill::Small);
    bf16("model.norm.weight".into(), &[HIDDEN], Fill::Ones);
    for layer in 0..N_LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            bf16(name(&format!("{norm}.weight")), &[HIDDEN], Fill::Ones);
        }
        for (part, n_out, n_k) in [
            ("self_attn.q_proj", N_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", N_KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", N_KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, N_HEADS * HEAD_DIM),
            ("mlp.router", N_EXPERTS, HIDDEN),
        ] {
            bf16(name(&format!("{part}.weight")), &[n_out, n_k], Fill::Small);
            bf16(name(&format!("{part}.bias")), &[n_out], Fill::Small);
        }
        bf16(name("self_attn.sinks"), &[N_HEADS], Fill::Small);
        for (part, n_out) in [("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)] {
            let bias = name(&format!("mlp.experts.{part}_bias"));
            bf16(bias, &[N_EXPERTS, n_out], Fill::Small);
        }
    }
    for layer in 0..N_LAYERS {
        for (part, n_out) in [("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN)] {
            let name = format!("model.layers.{layer}.mlp.experts.{part}");
            let shape = vec![N_EXPERTS, n_out, HIDDEN / 32, 16];
            let scales = shape[..3].to_vec();
            all.push((format!("{name}_blocks"), "U8", shape, Fill::Codes));
            all.push((format!("{name}_scales"), "U8", scales, Fill::Scales));
        }
    }
    all
}

/// Streams the checkpoint into `folder`; gives the bytes of its tensors.
fn write(folder: &Path) -> u64 {
    let nano = root().join("models/nano");
    std::fs::create_dir_all(folder).unwrap();
    for file in ["tokenizer.json", "generation_config.json"] {
        std::fs::copy(nano.join(file), folder.join(file)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(nano.join("config.json")).unwrap()).unwrap();
    let layer_types: Vec<&str> = (0..N_LAYERS)
        .map(|layer| ["sliding_attention", "full_attention"][layer % 2])
        .collect();
    let fields = json!({
        "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": N_LAYERS,
        "num_local_experts": N_EXPERTS, "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "layer_types": layer_types,
    });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut header = serde_json::Map::new();
    let mut end = 0;
    let tensors = tensors();
    for (name, dtype, shape, _) in &tensors {
        let width = if *dtype == "U8" { 1 } else { 2 };
        let start = end;
        end += shape.iter().product::<usize>() * width;
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let file = File::create(folder.join("model.safetensors")).unwrap();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(&header).unwrap();
    let mut random = Random(3);
    for (_, dtype, shape, fill) in &tensors {
        let n_bytes = shape.iter().product::<usize>() * if *dtype == "U8" { 1 } else { 2 };
        assert_eq!(n_bytes % 8, 0);
        for _ in 0..n_bytes / 8 {
            let bytes = word(*fill, &mut random).to_le_bytes();
            out.write_all(&bytes).unwrap();
        }
    }
    out.flush().unwrap();
    end as u64
}

#[test]
fn two_gigabytes_load_beside_three_layers() {
    let scratch = Scratch::new("loading");
    let n_bytes = write(&scratch.join("model"));
    assert!(n_bytes > 2_000_000_000, "{n_bytes}");
    let rows = [json!({"id": "a", "question": "What is 1 + 2?"}).to_string()];
    scratch.write("rows.jsonl", rows.join("\n"));
    let args = "eval rows.jsonl --model model --profile qa --max-new-tokens 2 --batch 1 \
                --context 256 --threads 2 --quiet --out run";
    let planned = podium(&scratch, &format!("{args} --dry-run"), None);
    assert!(planned.contains("would run 1 samples"), "{planned}");

    let layer = n_bytes / N_LAYERS as u64;
    // The weights, and a little for KV, workspace and the program itself, which is known after
    // the run: the limit is on what the process may ever hold in memory of its own.
    let limit = n_bytes + 3 * layer;
    podium(&scratch, args, Some(limit));

    let memory = jsonl(&scratch.join("run/memory.jsonl"));
    let of = |event: &str, key: &str| -> u64 {
        let line = memory.iter().find(|line| line["event"] == event);
        line.unwrap_or_else(|| panic!("no {event}"))[key]
            .as_u64()
            .unwrap()
    };
    let planned = of("arena", "planned_weights_bytes");
    assert_eq!(of("arena", "weights_bytes"), planned);
    // Nothing of it is padded but the router's and the lm head's last tile.
    assert!(planned >= n_bytes && planned < n_bytes + layer / 10);
    let peak = of("peak", "process_peak_bytes");
    let (anonymous, file) = (
        of("peak", "process_anonymous_bytes"),
        of("peak", "process_file_bytes"),
    );
    #[allow(clippy::print_stdout, reason = "figures for who asks with --nocapture")]
    {
        println!(
            "{n_bytes} bytes of tensors, {layer} a layer: peak {peak} in all, sampled peaks \
         {anonymous} anonymous, {file} of files"
        );
    }
    assert!(peak > n_bytes, "the weights are in memory");
    assert!(anonymous <= limit);
    // The highest resident memory ever, pages of the file among it.
    let base = of("start", "process_peak_bytes");
    assert!(
        peak <= limit + base,
        "a peak of {peak} bytes, {} allowed",
        limit + base
    );
}

/// Runs podium with a limit on its anonymous memory, and gives what it prints.
fn podium(scratch: &Scratch, args: &str, limit: Option<u64>) -> String {
    let limit = match limit {
        Some(bytes) => format!("ulimit -d {} && ", bytes / 1024),
        None => String::new(),
    };
    let program = env!("CARGO_BIN_EXE_podium");
    let output = Command::new("sh")
        .current_dir(scratch.path())
        .args(["-c", &format!("{limit}exec {program} {args}")])
        .env_remove("PODIUM_CPU")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The limit is a real one: where the arena does not fit under it, it is said why.
#[test]
fn less_than_the_plan_is_refused_with_a_message() {
    let scratch = Scratch::new("refused");
    let row = |i: usize| json!({"id": i, "question": format!("What is 1 + {i}?")}).to_string();
    scratch.write(
        "rows.jsonl",
        (0..64).map(|i| row(i) + "\n").collect::<String>(),
    );
    let program = env!("CARGO_BIN_EXE_podium");
    let command = format!("ulimit -d 60000 && exec {program} eval rows.jsonl --out run --quiet");
    let output = Command::new("sh")
        .current_dir(scratch.path())
        .args(["-c", &format!("{command} --batch 64 --context 4096")])
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("the system refused them") || text.contains("budget"),
        "{text}"
    );
}
