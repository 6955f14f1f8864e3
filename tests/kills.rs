//! Nothing finished is lost: killed at random moments, a run resumes with exactly the missing
//! rows and ends with the same files as one that was left alone. The same holds where the device is
//! lost.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{Scratch, bits, jsonl, nano_rows, podium, run, run_ok};

const N_KILLS: usize = 30;
const N_ROWS: usize = 48;
const FILES: [&str; 4] = [
    "submission.csv",
    "submission.jsonl",
    "scores.csv",
    "prompts.jsonl",
];

/// Complete lines of the log.
fn n_lines(log: &Path) -> usize {
    std::fs::read(log).map_or(0, |bytes| bytes.iter().filter(|&&b| b == b'\n').count())
}

#[test]
fn a_killed_run_resumes_with_exactly_the_missing_rows() {
    let scratch = Scratch::new("kills");
    let dataset = scratch.write("rows.jsonl", nano_rows("mixed.jsonl", N_ROWS).join("\n"));
    let dataset = dataset.to_str().unwrap();
    let whole = scratch.join("whole");
    let flags = ["--batch", "4", "--threads", "1", "--quiet", "--trace-hash"];
    let args = |out: &Path| -> Vec<String> {
        ["eval", dataset, "--out", out.to_str().unwrap()]
            .into_iter()
            .chain(flags)
            .map(str::to_owned)
            .collect()
    };
    let strs = |args: &[String]| -> Vec<String> { args.to_vec() };
    run_ok(
        scratch.path(),
        &strs(&args(&whole))
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    let expected = bits(&whole);
    assert_eq!(expected.len(), N_ROWS);

    // A small generator of our own: the kill points differ but repeat with the test.
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut interrupted = 0;
    for kill in 0..N_KILLS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let k = (state % N_ROWS as u64) as usize;
        let out = scratch.join(&format!("run-{kill}"));
        let log = out.join("results.jsonl");
        let mut child = podium(scratch.path())
            .args(args(&out))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while n_lines(&log) < k && child.try_wait().unwrap().is_none() {
            assert!(
                started.elapsed() < Duration::from_secs(120),
                "the run does not go on"
            );
            std::thread::sleep(Duration::from_micros(300));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let before: BTreeSet<String> = if log.exists() {
            let text = std::fs::read_to_string(&log).unwrap();
            text.split_inclusive('\n')
                .filter(|l| l.ends_with('\n'))
                .map(str::to_owned)
                .collect()
        } else {
            BTreeSet::new()
        };
        interrupted += usize::from(before.len() < N_ROWS);
        run_ok(
            scratch.path(),
            &args(&out).iter().map(String::as_str).collect::<Vec<_>>(),
        );

        let lines = jsonl(&log);
        assert_eq!(
            lines.len(),
            N_ROWS,
            "kill {kill} at {k}: each sample stands once in the log"
        );
        let text = std::fs::read_to_string(&log).unwrap();
        for line in &before {
            assert!(
                text.contains(line.as_str()),
                "kill {kill} at {k}: a finished row was lost"
            );
        }
        assert_eq!(bits(&out), expected, "kill {kill} at {k}");
        for file in FILES {
            assert_eq!(
                std::fs::read(out.join(file)).unwrap(),
                std::fs::read(whole.join(file)).unwrap(),
                "kill {kill} at {k}: {file}"
            );
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(
        interrupted >= N_KILLS / 2,
        "only {interrupted} runs were really interrupted"
    );
}

#[test]
fn a_signal_ends_the_run_with_its_files_and_the_same_command_goes_on() {
    let scratch = Scratch::new("signal");
    let dataset = scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 200).join("\n"));
    let out = scratch.join("run");
    let args = [
        "eval",
        dataset.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--batch",
        "4",
    ];
    for (signal, name, code) in [(libc::SIGINT, "INT", 130), (libc::SIGTERM, "TERM", 143)] {
        let child = podium(scratch.path())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let before = n_lines(&out.join("results.jsonl"));
        while n_lines(&out.join("results.jsonl")) < before + 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        #[allow(unsafe_code, reason = "std sends only SIGKILL")]
        // SAFETY: kill takes two integers; the process is our own child and not yet waited for.
        unsafe {
            libc::kill(child.id() as i32, signal);
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "SIG{name}: {stderr}");
        assert!(
            stderr.contains("same command"),
            "it says how to resume: {stderr}"
        );
        let scores = std::fs::read_to_string(out.join("scores.csv")).unwrap();
        assert_eq!(
            scores.lines().count(),
            201,
            "every row stands in scores.csv"
        );
        assert!(scores.contains("not_run"));
    }
    let output = run_ok(scratch.path(), &args);
    assert!(!String::from_utf8_lossy(&output.stdout).is_empty());
    assert_eq!(jsonl(&out.join("results.jsonl")).len(), 200);
    assert!(
        !std::fs::read_to_string(out.join("scores.csv"))
            .unwrap()
            .contains("not_run")
    );
}

/// A device that is lost: what was in flight begins anew, once; then the run ends with its log
/// intact, and the same command finishes it.
#[test]
fn a_lost_device_is_tried_again_once() {
    let scratch = Scratch::new("lost-device");
    let dataset = scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 24).join("\n"));
    let eval = |out: &str, more: &[&str]| {
        let mut args = vec!["eval", dataset.to_str().unwrap(), "--out", out, "--quiet"];
        args.extend(["--trace-hash", "--batch", "4"]);
        args.extend(more);
        run(scratch.path(), &args)
    };
    assert!(eval("whole", &[]).status.success());
    let whole = bits(&scratch.join("whole"));

    let once = eval("once", &["--lose-device", "5"]);
    let text = String::from_utf8(once.stderr).unwrap();
    assert!(once.status.success(), "{text}");
    assert!(text.contains("the GPU was lost at a step"), "{text}");
    assert!(text.contains("begins anew"), "{text}");
    assert_eq!(whole, bits(&scratch.join("once")));
    let session = &manifest(&scratch.join("once"))["sessions"][0];
    assert_eq!(session["n_lost_devices"], 1);
    assert_eq!(session["outcome"], "complete");
    assert!(session["first_token_seconds"].as_f64().unwrap() > 0.0);
    // Rows that were done are not run again: they stand in the log once.
    assert_eq!(jsonl(&scratch.join("once/results.jsonl")).len(), 24);

    let twice = eval("twice", &["--lose-device", "20,10"]);
    let text = String::from_utf8(twice.stderr).unwrap();
    assert_eq!(twice.status.code(), Some(2), "{text}");
    assert!(text.contains("run the same command"), "{text}");
    let session = &manifest(&scratch.join("twice"))["sessions"][0];
    assert_eq!(session["outcome"], "failed");
    let n_done = jsonl(&scratch.join("twice/results.jsonl")).len();
    assert!((1..24).contains(&n_done), "{n_done} rows were done");
    assert!(eval("twice", &[]).status.success());
    assert_eq!(whole, bits(&scratch.join("twice")));
}

fn manifest(run: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap()
}
