//! Steps that run on the device alone: what a captured step asks of the host.

use std::sync::Arc;

use podium::engine::Backend;
use podium::engine::cuda::{CudaBackend, CudaOptions, Event};

use crate::golden::{cases, load, map_pages, shape, span, start};

#[test]
#[ignore = "needs a GPU"]
fn a_step_asks_nothing_of_the_host() {
    let case = cases().into_iter().next().unwrap();
    let loaded = load(&case);
    let options = CudaOptions::default();
    let n_slots = 8;
    let mut backend = CudaBackend::new(Arc::clone(&loaded), shape(n_slots, 64), options).unwrap();
    let prompt = &case.prompts[0];
    let mut spans = Vec::new();
    for slot in 0..n_slots {
        map_pages(&mut backend, slot, 0);
        spans.push(span(slot, 0, &prompt.tokens[..prompt.tokens.len() - 1]));
    }
    backend.prefill(&spans).expect("prefill runs");
    for slot in 0..n_slots {
        backend.start(&start(slot, prompt, 100)).unwrap();
    }
    let mut events = Vec::new();
    let mut run = |n_steps: usize| {
        let before = (loaded.device.counters.read(), backend.kernel_calls());
        backend.decode(n_steps).expect("steps");
        while !backend.poll(&mut events).expect("steps ran") {}
        let after = backend.kernel_calls();
        let n_samples = after["sample"] - before.1.get("sample").copied().unwrap_or(0);
        (loaded.device.counters.read() - before.0, n_samples)
    };
    // One as it is, one captured.
    assert_eq!(run(1).1, 1);
    assert_eq!(run(1).1, 1);
    for n_steps in [1u64, 4, 16] {
        let (asked, n_samples) = run(n_steps as usize);
        println!("{n_steps} steps: {asked:?}");
        assert_eq!(asked.graph_launches, n_steps);
        assert_eq!(n_samples, n_steps, "a replayed kernel counts");
        assert_eq!(asked.launches, 0, "all kernels are in the graph");
        assert_eq!(asked.allocations, 0);
        assert_eq!(asked.waits, 0, "the host looks, it does not stand");
        // The tokens and what belongs to them: far less than a row of logits.
        let events_bytes = n_steps * (n_slots * size_of::<Event>()) as u64;
        assert_eq!(asked.bytes_to_host, events_bytes);
    }
    assert_eq!(events.len(), n_slots * 23);
}
