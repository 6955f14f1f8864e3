//! Bad input of each kind: the message names what, where and how to mend it; nothing panics,
//! nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::Path;

use support::{Scratch, jsonl, nano_rows, root, run, snapshot};

/// A valid row, for files in which one row is bad.
const GOOD: &str = r#"{"id": "good-1", "question": "2 + 3 = ?", "answer": "5"}"#;

/// Runs a file in which some rows are bad: the run ends with exit code 1, every row has its
/// result, the bad one with status `error`.
fn bad_row(name: &str, content: &[u8], n_rows: usize, n_bad: usize) {
    let scratch = Scratch::new(name);
    scratch.write("rows.jsonl", content);
    let args = [
        "eval",
        "rows.jsonl",
        "--out",
        "run",
        "--quiet",
        "--threads",
        "1",
    ];
    let output = run(scratch.path(), &args);
    snapshot::check_output(name, scratch.path(), &args, &output);
    assert_eq!(
        output.status.code(),
        Some(1),
        "rows in error give exit code 1"
    );
    let results = jsonl(&scratch.join("run/results.jsonl"));
    assert_eq!(results.len(), n_rows);
    let bad: Vec<_> = results
        .iter()
        .filter(|row| row["status"] == "error")
        .collect();
    assert_eq!(bad.len(), n_bad);
    for row in bad {
        assert!(row["error"]["line"].as_u64().unwrap() >= 1, "{row}");
        assert!(!row["error"]["hint"].as_str().unwrap().is_empty(), "{row}");
    }
    let scores = std::fs::read_to_string(scratch.join("run/scores.csv")).unwrap();
    assert_eq!(scores.lines().count(), n_rows + 1);

    let strict = run(
        scratch.path(),
        &[
            "eval",
            "rows.jsonl",
            "--out",
            "strict",
            "--quiet",
            "--strict",
        ],
    );
    snapshot::check_output(
        &format!("{name}-strict"),
        scratch.path(),
        &[
            "eval",
            "rows.jsonl",
            "--out",
            "strict",
            "--quiet",
            "--strict",
        ],
        &strict,
    );
    assert_eq!(strict.status.code(), Some(2), "--strict stops");
}

#[test]
fn row_without_question() {
    bad_row(
        "row-without-question",
        format!("{GOOD}\n{{\"id\": \"b\", \"answer\": \"1\"}}\n").as_bytes(),
        2,
        1,
    );
}

#[test]
fn row_not_json() {
    bad_row(
        "row-not-json",
        format!("{GOOD}\n{{\"id\": \"b\", \"question\"\n").as_bytes(),
        2,
        1,
    );
}

#[test]
fn row_invalid_utf8() {
    let mut content = format!("{GOOD}\n").into_bytes();
    content.extend(b"{\"id\": \"b\", \"question\": \"caf\xe9?\", \"answer\": \"1\"}\n");
    bad_row("row-invalid-utf8", &content, 2, 1);
}

#[test]
fn row_doubled_id() {
    bad_row(
        "row-doubled-id",
        format!("{GOOD}\n{GOOD}\n").as_bytes(),
        2,
        1,
    );
}

#[test]
fn row_longer_than_the_context() {
    let long = "one and two and ".repeat(2500);
    let row = serde_json::json!({"id": "long", "question": long, "answer": "1"});
    bad_row("row-too-long", format!("{GOOD}\n{row}\n").as_bytes(), 2, 1);
}

/// A copy of nano's checkpoint folder, to be damaged.
fn nano_copy(scratch: &Scratch) -> std::path::PathBuf {
    let folder = scratch.join("model");
    std::fs::create_dir_all(&folder).unwrap();
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(root().join("models/nano").join(file), folder.join(file)).unwrap();
    }
    folder
}

fn refused(name: &str, damage: impl FnOnce(&Path)) {
    let scratch = Scratch::new(name);
    scratch.write("rows.jsonl", GOOD);
    damage(&nano_copy(&scratch));
    let args = [
        "eval",
        "rows.jsonl",
        "--model",
        "model",
        "--out",
        "run",
        "--quiet",
    ];
    let output = run(scratch.path(), &args);
    snapshot::check_output(name, scratch.path(), &args, &output);
    assert_eq!(output.status.code(), Some(2));
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    edit(&mut header);
    let text = header.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + n..]);
    std::fs::write(path, out).unwrap();
}

#[test]
fn checkpoint_truncated() {
    refused("checkpoint-truncated", |folder| {
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
}

#[test]
fn checkpoint_hostile_header() {
    refused("checkpoint-hostile-header", |folder| {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend(b"{\"a\": 1}");
        std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    });
}

#[test]
fn checkpoint_tensor_missing() {
    refused("checkpoint-tensor-missing", |folder| {
        edit_header(&folder.join("model.safetensors"), |header| {
            let header = header.as_object_mut().unwrap();
            let sinks = header.remove("model.layers.1.self_attn.sinks").unwrap();
            header.insert("model.layers.1.self_attn.drains".into(), sinks);
        });
    });
}

#[test]
fn checkpoint_wrong_shape() {
    refused("checkpoint-wrong-shape", |folder| {
        let path = folder.join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["num_local_experts"] = 16.into();
        std::fs::write(path, config.to_string()).unwrap();
    });
}

#[test]
fn checkpoint_nan_scale() {
    refused("checkpoint-nan-scale", |folder| {
        let path = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        let at = header["model.layers.0.mlp.experts.down_proj_scales"]["data_offsets"][0]
            .as_u64()
            .unwrap() as usize;
        bytes[8 + n + at + 5] = 255;
        std::fs::write(path, bytes).unwrap();
    });
}

#[test]
fn checkpoint_config_not_sane() {
    refused("checkpoint-config-not-sane", |folder| {
        let path = folder.join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["num_key_value_heads"] = 0.into();
        std::fs::write(path, config.to_string()).unwrap();
    });
}

#[test]
fn tokenizer_broken() {
    refused("tokenizer-broken", |folder| {
        std::fs::write(folder.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    });
}

/// Commands that cannot run: exit code 2, with a message and a hint.
fn cannot_run(name: &str, files: &[(&str, &[u8])], args: &[&str]) {
    let scratch = Scratch::new(name);
    for (file, content) in files {
        scratch.write(file, content);
    }
    let output = run(scratch.path(), args);
    snapshot::check_output(name, scratch.path(), args, &output);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        !scratch.join("submissions").exists(),
        "nothing is left behind"
    );
}

#[test]
fn commands_that_cannot_run() {
    let good = GOOD.as_bytes();
    cannot_run("no-dataset", &[], &["eval"]);
    cannot_run("missing-dataset", &[], &["eval", "nowhere.jsonl"]);
    cannot_run("empty-dataset", &[("a.jsonl", b"")], &["eval", "a.jsonl"]);
    cannot_run(
        "binary-dataset",
        &[("a.jsonl", b"\x7fELF\0\0\x01\xff\xfe")],
        &["eval", "a.jsonl"],
    );
    cannot_run(
        "ambiguous-dataset",
        &[(
            "a.jsonl",
            br#"{"question": "What is 1 + 1?", "problem": "What is 2 + 2?"}"#,
        )],
        &["eval", "a.jsonl"],
    );
    cannot_run(
        "unknown-model",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--model", "gpt-9"],
    );
    cannot_run(
        "empty-model",
        &[("a.jsonl", good), ("m/x", b"")],
        &["eval", "a.jsonl", "--model", "m"],
    );
    cannot_run(
        "bench-unknown-workload",
        &[],
        &["bench", "--device", "cpu", "--workload", "decode-8,8x512"],
    );
    cannot_run(
        "bench-no-room",
        &[],
        &[
            "bench",
            "--device",
            "cpu",
            "--workload",
            "decode-1,1048576x1048576/1",
        ],
    );
    cannot_run(
        "precision-unknown",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--precision", "3bit"],
    );
    cannot_run(
        "device-cuda-exact",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--device", "cuda", "--exact"],
    );
    cannot_run(
        "profile-unknown",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--profile", "none"],
    );
    cannot_run(
        "profile-bad-key",
        &[
            ("a.jsonl", good),
            ("p.toml", b"name = \"p\"\ntemplat = \"x\"\n"),
        ],
        &["eval", "a.jsonl", "--profile", "p.toml"],
    );
    cannot_run(
        "temperature",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--temperature", "-1"],
    );
    cannot_run(
        "shard",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--shard", "4/3"],
    );
    cannot_run("config-missing", &[], &["eval", "--config", "none.toml"]);
    cannot_run(
        "config-bad-key",
        &[
            ("c.toml", b"datasets = [\"a.jsonl\"]\nbatches = 3\n"),
            ("a.jsonl", good),
        ],
        &["eval", "--config", "c.toml"],
    );
    cannot_run(
        "memory-too-small",
        &[("a.jsonl", good)],
        &[
            "eval",
            "a.jsonl",
            "--threads",
            "2",
            "--host-memory",
            "64KiB",
        ],
    );
    cannot_run(
        "batch-too-large",
        &[("a.jsonl", nano_rows("sums.jsonl", 40).join("\n").as_bytes())],
        &[
            "eval",
            "a.jsonl",
            "--batch",
            "40",
            "--context",
            "4096",
            "--host-memory",
            "24MiB",
            "--threads",
            "2",
        ],
    );
    cannot_run("merge-nothing", &[], &["merge", "latest"]);
}

#[test]
fn numbers_out_of_range_are_refused() {
    let good = GOOD.as_bytes();
    cannot_run(
        "samples-too-many",
        &[("a.jsonl", good)],
        &["eval", "a.jsonl", "--samples", "18446744073709551615"],
    );
    cannot_run(
        "threads-too-many",
        &[
            ("c.toml", b"threads = 9223372036854775807\n"),
            ("a.jsonl", good),
        ],
        &["eval", "a.jsonl", "--config", "c.toml"],
    );
    cannot_run(
        "plan-batch-too-large",
        &[],
        &["plan", "--batch", "18446744073709551615"],
    );
    let endless = br#"{"prompt": "p", "tokens": [1], "n_greedy": 18446744073709551615}"#;
    cannot_run(
        "logits-too-long",
        &[("in.jsonl", endless)],
        &["logits", "nano", "in.jsonl"],
    );
    let profile = b"name = \"p\"\ntemplate = \"{{ question }}\"\n[scoring]\nscorer = \"exact\"\n\
        rules = [\"whole\"]\n[defaults]\ntemperature = nan\n";
    cannot_run(
        "profile-out-of-range",
        &[("a.jsonl", good), ("p.toml", profile)],
        &["eval", "a.jsonl", "--profile", "p.toml"],
    );
}

/// A run whose file was edited: the command names the field and leaves the folder alone.
fn damaged_run(name: &str, file: &str, edit: impl Fn(&str) -> String, args: &[&str]) {
    let scratch = Scratch::new(name);
    let row =
        r#"{"id": "c-1", "question": "Which is even?", "options": ["1", "2"], "answer": "B"}"#;
    scratch.write("rows.jsonl", row);
    let eval = ["eval", "rows.jsonl", "--out", "run", "--quiet"];
    support::run_ok(scratch.path(), &eval);
    let path = scratch.join("run").join(file);
    let whole = std::fs::read_to_string(&path).unwrap();
    let damaged = edit(&whole);
    assert_ne!(damaged, whole);
    std::fs::write(&path, &damaged).unwrap();
    let output = run(scratch.path(), args);
    snapshot::check_output(name, scratch.path(), args, &output);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
}

#[test]
fn numbers_that_no_run_writes_are_refused() {
    const MAX: &str = "18446744073709551615";
    let gold = |text: &str| {
        let old = r#""gold":{"kind":"option","value":1}"#;
        text.replace(old, &old.replace('1', MAX))
    };
    damaged_run("damaged-gold", "results.jsonl", gold, &["report", "run"]);
    let sample = |text: &str| text.replace("\"sample\":0", "\"sample\":4294967295");
    let merge = ["merge", "run", "--out", "all"];
    damaged_run("damaged-sample", "results.jsonl", sample, &merge);
    let bytes = |text: &str| text.replace("\"loaded_bytes\": ", "\"loaded_bytes\": 999999999999");
    let compare = ["compare", "run", "run"];
    damaged_run("damaged-ledger", "run.json", bytes, &compare);
    let steps = |text: &str| {
        text.replace(
            "\"live_row_steps\": ",
            "\"live_row_steps\": 999999999999999",
        )
    };
    damaged_run("damaged-totals", "run.json", steps, &["score", "run"]);
    let samples = |text: &str| text.replace("\"samples\": 1,", "\"samples\": 4294967295,");
    damaged_run("damaged-samples", "run.json", samples, &compare);
}

#[test]
fn a_file_name_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let scratch = Scratch::new("name-not-utf8");
    let name = std::ffi::OsStr::from_bytes(b"rows-\xff.jsonl");
    std::fs::write(scratch.path().join(name), GOOD).unwrap();
    let eval = || {
        let mut command = support::podium(scratch.path());
        command.arg("eval").arg(name).args(["--out", "run", "-q"]);
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{message}");
    };
    eval();
    let manifest = std::fs::read_to_string(scratch.join("run/run.json")).unwrap();
    assert!(manifest.contains("rows-\u{fffd}.jsonl"), "{manifest}");
    eval();
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let scratch = Scratch::new("mismatch");
    scratch.write("rows.jsonl", GOOD);
    let base = ["eval", "rows.jsonl", "--out", "run", "--quiet"];
    support::run_ok(scratch.path(), &base);
    let other = [
        "eval",
        "rows.jsonl",
        "--out",
        "run",
        "--quiet",
        "--seed",
        "3",
    ];
    let output = run(scratch.path(), &other);
    snapshot::check_output("folder-of-another-run", scratch.path(), &other, &output);
    assert_eq!(output.status.code(), Some(2));
    let fresh = [&other[..], &["--fresh"]].concat();
    support::run_ok(scratch.path(), &fresh);
    let kept = std::fs::read_dir(scratch.path())
        .unwrap()
        .filter(|e| {
            e.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("run.")
        })
        .count();
    assert_eq!(kept, 1, "--fresh keeps the old folder under another name");
}

#[test]
fn an_incomplete_merge_is_refused() {
    let scratch = Scratch::new("merge-incomplete");
    scratch.write("rows.jsonl", nano_rows("sums.jsonl", 9).join("\n"));
    for shard in ["1/3", "3/3"] {
        let out = format!("s{}", &shard[..1]);
        support::run_ok(
            scratch.path(),
            &[
                "eval",
                "rows.jsonl",
                "--shard",
                shard,
                "--out",
                &out,
                "--quiet",
            ],
        );
    }
    let args = ["merge", "s1", "s3", "--out", "all"];
    let output = run(scratch.path(), &args);
    snapshot::check_output("merge-incomplete", scratch.path(), &args, &output);
    assert_eq!(output.status.code(), Some(2));
    assert!(!scratch.join("all").exists());
}

#[test]
fn a_full_disk_stops_the_run_with_its_log_intact() {
    use std::os::unix::process::CommandExt;
    let scratch = Scratch::new("disk-full");
    const N_SAMPLES: usize = 4;
    let rows = nano_rows("mixed.jsonl", 500);
    scratch.write("rows.jsonl", rows.join("\n"));
    let args = "eval rows.jsonl --out run --quiet --temperature 1 --samples 4";
    let args: Vec<&str> = args.split(' ').collect();
    let mut command = support::podium(scratch.path());
    command.args(&args);
    #[allow(
        unsafe_code,
        reason = "a file size limit can only be set between fork and exec"
    )]
    // SAFETY: signal and setrlimit are async-signal-safe and touch nothing of this process.
    unsafe {
        command.pre_exec(|| {
            // Writes past the limit then fail, as on a full disk, instead of killing.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            // Above the 1 MiB that is tried before the model loads, below what the log needs.
            let limit = libc::rlimit {
                rlim_cur: 1_200_000,
                rlim_max: 1_200_000,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("results.jsonl") && stderr.contains("hint:"),
        "{stderr}"
    );
    let log = std::fs::read_to_string(scratch.join("run/results.jsonl")).unwrap();
    assert!(log.ends_with('\n'), "no torn line stays");
    let kept = log.lines().count();
    assert!(
        kept > 0 && kept < N_SAMPLES * rows.len(),
        "{kept} rows were written before the disk was full"
    );
    support::run_ok(scratch.path(), &args);
    let results = jsonl(&scratch.join("run/results.jsonl"));
    assert_eq!(
        results.len(),
        N_SAMPLES * rows.len(),
        "the resume runs exactly the missing rows"
    );
}

#[test]
fn a_read_only_folder_is_noticed_before_the_model_loads() {
    // Root writes anywhere, so the folder's place is taken by a file instead.
    let scratch = Scratch::new("read-only");
    scratch.write("rows.jsonl", GOOD);
    scratch.write("taken", "a file");
    let args = ["eval", "rows.jsonl", "--out", "taken/run", "--quiet"];
    let output = run(scratch.path(), &args);
    snapshot::check_output("folder-not-writable", scratch.path(), &args, &output);
    assert_eq!(output.status.code(), Some(2));
}
