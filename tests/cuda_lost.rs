//! A GPU that is lost: the failure is named, and so is that the device cannot be had again, where
//! the driver gives it to new processes alone (580.159.04 does, after an illegal address). On its
//! own, since everything in the process that is on the GPU goes with it.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, Precision};
use podium::engine::cuda::launch::{Dense, MatmulArgs};
use podium::engine::cuda::{CudaBackend, CudaError, CudaOptions, Loaded, device};
use podium::engine::{Backend, EngineError, EngineShape, PageId, SequenceId, Span};

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

#[test]
#[ignore = "needs a GPU"]
fn a_lost_device_is_named_and_bits_stay_where_it_comes_back() {
    let folder = support::Scratch::new("lost-model");
    support::checkpoint::write(folder.path(), 3);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let load = || Loaded::open(&checkpoint, Precision::Stored, 0).map(Arc::new);
    let loaded = load().expect("a GPU");
    let before = score(&loaded);
    // Weights at an address that is nobody's.
    let args = MatmulArgs {
        weights: 1 << 20,
        x: 1 << 20,
        out: 1 << 20,
        n_rows: 8,
        n_out: 64,
        n_k: 96,
        n_tiles: 4,
        ..MatmulArgs::default()
    };
    let launched = loaded.kernels.matmul(Dense::Logits, &args);
    let failed = launched.and_then(|()| loaded.device.synchronize());
    let error = failed.expect_err("there is nothing there");
    assert!(matches!(error, CudaError::Lost { .. }), "{error}");
    // And it stays so.
    assert!(loaded.device.synchronize().is_err());
    drop(loaded);
    match device::reset(0)
        .map_err(EngineError::from)
        .and_then(|()| load())
    {
        Ok(loaded) => assert_eq!(score(&loaded), before),
        Err(error) => assert!(error.is_lost_device(), "{error}"),
    }
}
