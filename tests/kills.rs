//! Nothing finished is lost: killed at random moments, a run resumes with exactly the missing
//! rows and ends with the same files as one that was left alone. The same holds where the device is
//! lost, and then podium resumes by itself, once.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{Scratch, bits, jsonl, nano_rows, podium, run_ok};

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

/// What a device is lost in, and what it gives where it is not.
struct Lost {
    scratch: Scratch,
    dataset: String,
    n_rows: usize,
}

impl Lost {
    fn new(name: &str, n_rows: usize) -> Self {
        let scratch = Scratch::new(name);
        let dataset = scratch.write("rows.jsonl", nano_rows("mixed.jsonl", n_rows).join("\n"));
        let dataset = dataset.to_str().unwrap().to_owned();
        Self {
            scratch,
            dataset,
            n_rows,
        }
    }

    fn command(&self, out: &str, more: &[&str]) -> std::process::Command {
        let mut command = podium(self.scratch.path());
        command
            .args(["eval", &self.dataset, "--out", out, "--quiet"])
            .args(["--trace-hash", "--batch", "4"])
            .args(more);
        command
    }

    /// Exit code, stdout and stderr.
    fn eval(&self, out: &str, more: &[&str]) -> (Option<i32>, String, String) {
        let output = self.command(out, more).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    fn n_done(&self, out: &str) -> usize {
        jsonl(&self.scratch.join(out).join("results.jsonl")).len()
    }

    fn sessions(&self, out: &str) -> Vec<serde_json::Value> {
        let manifest = manifest(&self.scratch.join(out));
        manifest["sessions"].as_array().unwrap().clone()
    }

    fn assert_same(&self, out: &str, expected: &str) {
        let (out, expected) = (self.scratch.join(out), self.scratch.join(expected));
        assert_eq!(bits(&out), bits(&expected));
        assert_eq!(bits(&out).len(), self.n_rows);
        for file in FILES {
            assert_eq!(
                std::fs::read(out.join(file)).unwrap(),
                std::fs::read(expected.join(file)).unwrap(),
                "{file}"
            );
        }
    }
}

fn manifest(run: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap()
}

#[test]
fn after_a_lost_device_a_new_process_goes_on() {
    let lost = Lost::new("lost-once", 24);
    assert_eq!(lost.eval("whole", &[]).0, Some(0));

    let (code, stdout, stderr) = lost.eval("once", &["--lose-device", "5"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("the GPU was lost at a step"), "{stderr}");
    assert!(stderr.contains("begins anew"), "{stderr}");
    assert!(!stderr.contains("error"), "{stderr}");
    assert!(stdout.contains("complete after 2 sessions"), "{stdout}");
    assert!(stdout.contains("the device was lost once"), "{stdout}");
    lost.assert_same("once", "whole");
    // Rows that were done are not run again: they stand in the log once.
    assert_eq!(lost.n_done("once"), 24);

    let sessions = lost.sessions("once");
    assert_eq!(sessions.len(), 2);
    assert_eq!(sessions[0]["outcome"], "failed");
    assert_eq!(sessions[0]["n_lost_devices"], 1);
    assert_eq!(sessions[1]["outcome"], "complete");
    assert_eq!(sessions[1]["n_lost_devices"], 0);
    // The first one's figures are kept, and counted.
    let totals = &manifest(&lost.scratch.join("once"))["totals"];
    for name in ["wall_seconds", "decode_seconds", "live_row_steps"] {
        let value = |of: &serde_json::Value| of[name].as_f64().unwrap();
        let [first, second] = [0, 1].map(|index| value(&sessions[index]["throughput"]));
        assert!(first > 0.0 && second > 0.0, "{name}");
        assert!((value(totals) - first - second).abs() < 1e-9, "{name}");
    }
    assert_eq!(totals["rows_finished"], 24);
    for session in &sessions {
        assert!(session["first_token_seconds"].as_f64().unwrap() > 0.0);
    }
    for file in ["throughput.jsonl", "memory.jsonl"] {
        let of: Vec<u64> = jsonl(&lost.scratch.join("once").join(file))
            .iter()
            .map(|line| line["session"].as_u64().unwrap())
            .collect();
        assert!(of.is_sorted(), "{file}");
        assert!(of.contains(&0) && of.contains(&1), "{file}");
    }
}

#[test]
fn a_device_that_is_lost_again_ends_the_run_which_can_be_resumed() {
    let lost = Lost::new("lost-twice", 24);
    assert_eq!(lost.eval("whole", &[]).0, Some(0));

    let (code, _, stderr) = lost.eval("twice", &["--lose-device", "20,10"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert_eq!(stderr.matches("begins anew").count(), 1, "{stderr}");
    assert!(
        stderr.contains("error: the GPU was lost at a step"),
        "{stderr}"
    );
    assert!(stderr.contains("run the same command"), "{stderr}");
    let sessions = lost.sessions("twice");
    assert_eq!(sessions.len(), 2);
    for session in &sessions {
        assert_eq!(session["outcome"], "failed");
        assert_eq!(session["n_lost_devices"], 1);
    }
    let n_done = lost.n_done("twice");
    assert!((1..24).contains(&n_done), "{n_done} rows were done");

    // A command of its own has a second attempt of its own.
    let (code, stdout, stderr) = lost.eval("twice", &["--lose-device", "0"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("the device was lost 3 times"), "{stdout}");
    assert_eq!(lost.sessions("twice").len(), 4);
    lost.assert_same("twice", "whole");
}

#[test]
fn the_second_attempt_begins_no_run_over_that_the_first_one_began() {
    let scratch = Scratch::new("lost-fresh");
    // Only the longer one lasts until the device is lost.
    for (name, n_rows) in [("a", 2), ("b", 24), ("c", 2)] {
        let rows = nano_rows("mixed.jsonl", n_rows).join("\n");
        scratch.write(&format!("{name}.jsonl"), rows);
    }
    let args = ["eval", "a.jsonl", "b.jsonl", "c.jsonl", "--quiet"];
    let args = [args.as_slice(), &["--json", "--batch", "4", "--trace-hash"]].concat();
    run_ok(scratch.path(), &args);
    let folders = || {
        let mut names: Vec<String> = std::fs::read_dir(scratch.join("submissions"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let before = folders();
    assert_eq!(before.len(), 3);

    let args = [args.as_slice(), &["--fresh", "--lose-device", "30"]].concat();
    let output = run_ok(scratch.path(), &args);
    let mut expected: Vec<String> = before.iter().map(|name| format!("{name}.old")).collect();
    expected.extend(before.iter().cloned());
    expected.sort();
    assert_eq!(folders(), expected, "each was renamed aside once");
    // Each run's summary is printed once, by the process that finished it.
    let stdout = String::from_utf8(output.stdout).unwrap();
    let n_sessions: Vec<u64> = stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|summary| summary["n_sessions"].as_u64().unwrap())
        .collect();
    assert_eq!(n_sessions, [1, 2, 1]);
    for name in &before {
        let run = scratch.join("submissions").join(name);
        let old = scratch.join("submissions").join(format!("{name}.old"));
        assert_eq!(bits(&run), bits(&old));
    }
}

#[test]
fn the_second_attempt_is_the_same_process_and_hears_signals() {
    let lost = Lost::new("lost-signal", 200);
    let child = lost
        .command("run", &["--lose-device", "5"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let throughput = lost.scratch.join("run/throughput.jsonl");
    let started = Instant::now();
    // The second session has made tokens.
    while !std::fs::read_to_string(&throughput).is_ok_and(|text| text.contains("\"session\":1,")) {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "the run does not go on"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    #[allow(unsafe_code, reason = "std sends only SIGKILL")]
    // SAFETY: kill takes two integers; the process is our own child and not yet waited for.
    unsafe {
        libc::kill(child.id() as i32, libc::SIGTERM);
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{stderr}");
    assert!(stderr.contains("same command"), "{stderr}");
    assert_eq!(lost.sessions("run")[1]["outcome"], "stopped");
}

#[test]
fn the_second_attempt_has_the_time_that_the_first_one_left() {
    let lost = Lost::new("lost-time", 24);
    assert_eq!(lost.eval("run", &["--lose-device", "20,10"]).0, Some(2));
    // Of a session of the length of a test no limit is left for certain: it is said to have been
    // longer.
    let path = lost.scratch.join("run/run.json");
    let mut run = manifest(&lost.scratch.join("run"));
    run["sessions"][1]["throughput"]["wall_seconds"] = 3600.into();
    std::fs::write(&path, serde_json::to_vec(&run).unwrap()).unwrap();
    let n_done = lost.n_done("run");

    // As podium begins itself anew: in the place of a process that had the same id.
    let inner = lost.command("run", &["--time-limit", "30m"]);
    let attempt = r#"{"process_id":'$$',"n_lost_devices":1,"broken_off":"Cpu","done":[],"code":0}"#;
    let script = format!("PODIUM_ATTEMPT='{attempt}' exec \"$0\" \"$@\"");
    let output = std::process::Command::new("sh")
        .current_dir(lost.scratch.path())
        .args(["-c", &script])
        .arg(inner.get_program())
        .args(inner.get_args())
        .args(["--device", "cpu"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(lost.sessions("run")[2]["outcome"], "time_limit");
    assert_eq!(lost.n_done("run"), n_done);

    // A command that the user gives has its own time.
    let (code, _, stderr) = lost.eval("run", &["--time-limit", "30m"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(lost.sessions("run")[3]["outcome"], "complete");
    assert_eq!(lost.n_done("run"), 24);
}
