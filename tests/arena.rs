//! The memory a backend really takes against what it plans, at arenas of 0.1, 1 and 4 GB. One
//! test in a process of its own, so that nothing else moves the figure.

#![cfg(target_os = "linux")]

use std::path::Path;

use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::{Backend, EngineShape};

/// How far measured growth over planned growth may be from 1.
const SLOPE: f64 = 0.02;

/// Anonymous resident memory of this process.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .expect("a line");
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("a number");
    kib * 1024
}

#[test]
fn resident_memory_follows_the_plan() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits/plain");
    let checkpoint = Checkpoint::open(&folder).expect("a golden checkpoint opens");
    let (page_bytes, _) = CpuBackend::kv_unit_bytes(checkpoint.config(), false);
    let options = CpuOptions {
        n_threads: 2,
        exact: false,
        trace_hash: false,
        poison: false,
    };
    let mut measured = Vec::new();
    for arena_bytes in [100_000_000, 1_000_000_000, 4_000_000_000] {
        let shape = EngineShape {
            n_slots: 4,
            n_forks: 1,
            n_pages: (arena_bytes / page_bytes) as usize,
            max_context: 1024,
            prefill_rows: 64,
        };
        let format = checkpoint.weight_format(Precision::Stored);
        let planned = CpuBackend::planned_memory(checkpoint.config(), format, &shape, &options);
        let before = resident_bytes();
        let opened = CpuBackend::open(&checkpoint, Precision::Stored, shape, options);
        let backend = opened.expect("it opens");
        let grown = resident_bytes().saturating_sub(before);
        assert_eq!(backend.memory(), planned);
        let planned = planned.weights_bytes + planned.kv_bytes + planned.workspace_bytes;
        measured.push((planned as f64, grown as f64));
    }
    for pair in measured.windows(2) {
        let ((planned, grown), (more_planned, more_grown)) = (pair[0], pair[1]);
        let slope = (more_grown - grown) / (more_planned - planned);
        assert!(
            (slope - 1.0).abs() <= SLOPE,
            "slope {slope} of {measured:?}"
        );
    }
}
