//! The promise about bits at the shape that matters: four layers of gpt-oss-20b on a GPU, through
//! the loop that a run goes through. Every step's token, log-probability and logits hash of every
//! row must be those of the row alone, whatever slots, prefill passes, shared prefixes, pages and
//! neighbours it had. The same check of a tiny model on the CPU shows that it can tell.
//!
//! [`bench`] makes the rows and checks them, [`ways`] are the ways they are run, [`recorder`] writes
//! their steps down.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

mod bench;
mod recorder;
#[path = "../support/mod.rs"]
mod support;
mod ways;

use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, MatrixFormat, Precision, VectorFormat};
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use podium::engine::{Backend, SamplingParams, shapes};

use bench::Bench;
use ways::WAYS;

const DRAWN: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_p: 0.95,
    top_k: 0,
    seed: 9,
};

#[test]
#[ignore = "needs a GPU"]
fn four_layers_of_gpt_oss_20b() {
    let mut config = shapes::named("gpt-oss-20b").unwrap();
    config.layers.truncate(4);
    let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let loaded = Arc::new(Loaded::synthetic(&config, format, 5, 0).expect("a GPU"));
    let open = |shape, poison| -> Box<dyn Backend> {
        let options = CudaOptions {
            trace_hash: true,
            poison,
        };
        Box::new(CudaBackend::new(Arc::clone(&loaded), shape, options).unwrap())
    };
    let bench = Bench {
        open: &open,
        n_vocab: config.n_vocab,
        // With the tokens it makes: 5,000.
        longest: 4970,
        shared: 1300,
    };
    bench.check(DRAWN, &WAYS);
    // Greedy rows may take another way through the last kernels.
    bench.check(SamplingParams::default(), &[WAYS[1], WAYS[5]]);
}

#[test]
fn a_tiny_model_on_the_cpu() {
    let folder = support::Scratch::new("invariance-model");
    support::checkpoint::write(folder.path(), 11);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let open = |shape, poison| -> Box<dyn Backend> {
        let options = CpuOptions {
            n_threads: 2,
            exact: false,
            trace_hash: true,
            poison,
        };
        Box::new(CpuBackend::open(&checkpoint, Precision::Stored, shape, options).unwrap())
    };
    let bench = Bench {
        open: &open,
        n_vocab: checkpoint.config().n_vocab,
        longest: 660,
        shared: 300,
    };
    bench.check(DRAWN, &WAYS[..6]);
}
