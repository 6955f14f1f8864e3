//! The plan of device memory beside what is used, the driver's own share with it, on four layers of
//! gpt-oss-20b.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

use std::sync::Arc;

use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::memory::{BUCKETS, driver_bytes};
use podium::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use podium::engine::{
    Backend, EngineShape, PAGE_POSITIONS, PageId, SamplingParams, SequenceId, SlotStart, shapes,
};

const DRAWN: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_p: 0.95,
    top_k: 0,
    seed: 9,
};

/// Alone on the device: what other programs take or leave meanwhile would count.
#[test]
#[ignore = "needs a GPU"]
fn the_plan_holds_what_is_used() {
    let mut config = shapes::named("gpt-oss-20b").unwrap();
    config.layers.truncate(4);
    let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    // The context stands before the first look at what is free.
    let device = Device::open(0).expect("a GPU");
    let (free, _) = device.memory().unwrap();
    let loaded = Arc::new(Loaded::synthetic(&config, format, 5, 0).expect("a GPU"));
    check_memory(&loaded, free);
}

/// Captures a step of every row count; the driver then has what it keeps of its own.
fn check_memory(loaded: &Arc<Loaded>, free_before: u64) {
    let n_slots = 256;
    let shape = EngineShape {
        n_slots,
        n_forks: 0,
        n_pages: n_slots,
        max_context: PAGE_POSITIONS,
        prefill_rows: 2048,
    };
    let options = CudaOptions::default();
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, options).unwrap();
    let free = || loaded.device.memory().unwrap().0;
    let free_allocated = free();
    for n_rows in BUCKETS.into_iter().filter(|&n_rows| n_rows <= n_slots) {
        let slots: Vec<SequenceId> = (0..n_rows as u32).map(SequenceId).collect();
        for &slot in &slots {
            backend.map_page(slot, 0, PageId(slot.0));
            let start = SlotStart {
                slot,
                token: slot.0,
                position: 0,
                sampling: DRAWN,
                row_hash: u64::from(slot.0),
                sample: 0,
                stop_tokens: Arc::new([]),
                max_new_tokens: 2,
            };
            backend.start(&start).unwrap();
        }
        // One as it is, one captured.
        let mut events = Vec::new();
        for _ in 0..2 {
            backend.decode(1).unwrap();
            while !backend.poll(&mut events).unwrap() {}
        }
        assert_eq!(events.len(), 2 * n_rows);
        backend.clear(&slots);
    }
    let memory = backend.memory();
    let allocated = memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes;
    let model = &loaded.model;
    let planned = allocated + driver_bytes(&model.config, model.format, n_slots);
    let taken_since = |before: u64| {
        let now = free();
        let taken = before.checked_sub(now);
        taken
            .unwrap_or_else(|| panic!("{before} bytes were free, now {now}: others use the device"))
    };
    let used = taken_since(free_before);
    println!(
        "device memory: {used} bytes used, {planned} planned, {allocated} allocated; {} while steps \
         were run and captured",
        taken_since(free_allocated)
    );
    let off = used as f64 / planned as f64 - 1.0;
    assert!(off.abs() <= 0.02, "the plan is {:.1} % off", 100.0 * off);
}
