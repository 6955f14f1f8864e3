//! A GPU that is lost: the failure is named, the process does not get it back, a new one gets it
//! with the same bits, and a run goes on in one by itself. The driver gives it to new processes
//! alone (580.159.04 does, after an illegal address).

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cuda::{CudaBackend, CudaError, CudaOptions, Loaded};
use podium::engine::{Backend, EngineShape, PageId, SequenceId, Span};

fn load(model: &Path) -> Arc<Loaded> {
    let checkpoint = Checkpoint::open(model).unwrap();
    Arc::new(Loaded::open(&checkpoint, Precision::Stored, 0).expect("a GPU"))
}

/// Logits' hash of a few tokens.
fn score(loaded: &Arc<Loaded>) -> Vec<u64> {
    let shape = EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: 1,
        max_context: 64,
        prefill_rows: 64,
    };
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, CudaOptions::default()).unwrap();
    backend.map_page(SequenceId(0), 0, PageId(0));
    let span = Span {
        sequence: SequenceId(0),
        start: 0,
        tokens: (1..20).collect(),
    };
    let mut hashes = Vec::new();
    let visit = &mut |_: usize, logits: &[f32]| {
        hashes.push(podium::engine::sample::logits_hash(logits));
    };
    backend.score(&span, visit).unwrap();
    hashes
}

/// Names the model's folder to a process that shall write its hashes into it.
const CHILD: &str = "PODIUM_LOST_CHILD";

/// The hashes of a new process.
fn score_elsewhere(model: &Path) -> Vec<u64> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_lost_device_is_named_and_a_new_process_has_it"])
        .args(["--ignored", "--nocapture"])
        .env(CHILD, model)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let bytes = std::fs::read(model.join("hashes.json")).unwrap();
    std::fs::remove_file(model.join("hashes.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn a_lost_device_is_named_and_a_new_process_has_it() {
    if let Some(model) = std::env::var_os(CHILD).map(PathBuf::from) {
        let hashes = serde_json::to_vec(&score(&load(&model))).unwrap();
        std::fs::write(model.join("hashes.json"), hashes).unwrap();
        return;
    }
    let folder = support::Scratch::new("lost-model");
    support::checkpoint::write(folder.path(), 3);
    let loaded = load(folder.path());
    let before = score(&loaded);
    assert_eq!(score_elsewhere(folder.path()), before);

    let error = loaded.lose().expect_err("there is nothing there");
    assert!(matches!(error, CudaError::Lost { .. }), "{error}");
    // And it stays so here, and nowhere else.
    assert!(loaded.device.synchronize().is_err());
    assert_eq!(score_elsewhere(folder.path()), before);
}

#[test]
#[ignore = "needs a GPU"]
fn a_run_goes_on_in_a_new_process() {
    let scratch = support::Scratch::new("lost-run");
    let rows = support::nano_rows("mixed.jsonl", 24).join("\n");
    scratch.write("rows.jsonl", rows);
    let eval = |out: &str, more: &[&str]| {
        let mut podium = support::podium(scratch.path());
        match std::env::var_os("CUDA_VISIBLE_DEVICES") {
            Some(devices) => podium.env("CUDA_VISIBLE_DEVICES", devices),
            None => podium.env_remove("CUDA_VISIBLE_DEVICES"),
        };
        let output = podium
            .args(["eval", "rows.jsonl", "--out", out, "--quiet"])
            .args(["--trace-hash", "--batch", "4", "--device", "cuda"])
            .args(more)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), stderr)
    };
    let (code, stderr) = eval("whole", &[]);
    assert_eq!(code, Some(0), "{stderr}");

    let (code, stderr) = eval("once", &["--lose-device", "5"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("the GPU was lost at"), "{stderr}");
    assert!(
        !stderr.contains("an injected fault"),
        "the driver says so, not podium: {stderr}"
    );
    assert!(stderr.contains("begins anew"), "{stderr}");
    assert_eq!(
        support::bits(&scratch.join("once")),
        support::bits(&scratch.join("whole"))
    );
    let run = std::fs::read(scratch.join("once/run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_slice(&run).unwrap();
    let sessions = run["sessions"].as_array().unwrap();
    let n_lost = sessions.iter().map(|session| &session["n_lost_devices"]);
    assert_eq!(n_lost.collect::<Vec<_>>(), [1, 0]);
}
