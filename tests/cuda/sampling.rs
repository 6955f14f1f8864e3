//! Sampling: tokens, log-probabilities and hashes are those that the CPU draws of the same logits.

use std::sync::Arc;

use podium::engine::checkpoint::MatrixFormat;
use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::launch::SampleArgs;
use podium::engine::cuda::memory;
use podium::engine::cuda::{Event, Slot};
use podium::engine::sample::{SampleKey, Sampler, logits_hash};
use podium::engine::{SamplingParams, SequenceId, SlotStart};

use crate::common::{device, download, kernels, order_key, upload};
use crate::support::random::Random;

#[test]
#[ignore = "needs a GPU"]
fn draws_are_those_of_the_cpu() {
    let device = device();
    let kernels = kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let params = |temperature, top_k, top_p| SamplingParams {
        temperature,
        top_p,
        top_k,
        seed: 77,
    };
    let settings = [
        params(0.0, 0, 1.0),
        params(1.0, 0, 1.0),
        params(0.7, 0, 0.9),
        params(1.3, 40, 1.0),
        params(1.0, 50, 0.95),
        params(0.2, 0, 0.3),
        params(1.0, 1, 1.0),
        params(1.0, 0, 0.0),
        params(3.0, 3, 0.5),
        params(f32::NAN, 2, 0.5),
        params(1.0, 0, f32::NAN),
        // Greedy again, of logits without ties and of equal ones.
        params(0.0, 0, 1.0),
        params(0.0, 0, 1.0),
        params(0.0, 0, 1.0),
    ];
    let mut random = Random(3);
    let mut sampler = Sampler::new(0);
    for n_vocab in [1usize, 3, 5, 608, 2049, 201_088] {
        let n_rows = settings.len();
        let mut logits = Vec::new();
        for row in 0..n_rows {
            let spread = [0.0, 1.0, 6.0, 12.0][row % 4];
            // Ties at the border of the nucleus, too.
            let coarse = row % 3 == 0;
            logits.extend((0..n_vocab).map(|_| {
                let x = random.value() * spread;
                if coarse { (x * 4.0).round() / 4.0 } else { x }
            }));
        }
        let mut slots = Vec::new();
        let mut keys = Vec::new();
        for (row, sampling) in settings.into_iter().enumerate() {
            let start = SlotStart {
                slot: SequenceId(row as u32),
                token: 0,
                position: 10 + row,
                sampling,
                row_hash: 0x1234_5678_9ABC_DEF0 ^ row as u64,
                sample: row as u32 % 3,
                stop_tokens: Arc::new([]),
                max_new_tokens: 5,
            };
            slots.push(Slot::new(&start).unwrap());
            keys.push(SampleKey {
                seed: 77,
                row_hash: start.row_hash,
                sample: start.sample,
                position: 11 + row as u32,
            });
        }
        let rows: Vec<u32> = (0..n_rows as u32)
            .flat_map(|r| [r, 10 + r, r, r + 1])
            .collect();
        let logits_device = upload(&device, &logits);
        let slots_device = upload(&device, &slots);
        let rows_device = upload(&device, &rows);
        let step = upload(&device, &[1u32]);
        let events: DeviceBuffer<Event> = device.alloc("events", n_rows).unwrap();
        let n_partials = memory::sample_partials_len(n_rows);
        let partials: DeviceBuffer<u64> = device.alloc("logits", n_partials).unwrap();
        let greatest =
            |row: &[f32]| order_key(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let maxima: Vec<u32> = logits.chunks(n_vocab).map(greatest).collect();
        let maxima = upload(&device, &maxima);
        let args = SampleArgs {
            logits: logits_device.at(0),
            maxima: maxima.at(0),
            slots: slots_device.at(0),
            rows: rows_device.at(0),
            events: events.at(0),
            step: step.at(0),
            partials: partials.at(0),
            n_parts: 0,
            n_vocab: n_vocab as u32,
            max_context: 4096,
            trace_hash: 1,
        };
        kernels.sample(&args, n_rows).unwrap();
        assert_eq!(download(&maxima), vec![0; n_rows], "left for the next step");
        for (row, event) in download(&events).into_iter().enumerate() {
            let logits = &logits[row * n_vocab..][..n_vocab];
            let expected = sampler.sample(logits, &keys[row], &settings[row]).unwrap();
            let what = format!("{n_vocab} tokens, {:?}", settings[row]);
            assert_eq!(event.state, 1, "{what}");
            assert_eq!(event.token, expected.token, "{what}");
            assert_eq!(
                event.logprob.to_bits(),
                expected.logprob.to_bits(),
                "{what}"
            );
            assert_eq!(event.logits_hash, logits_hash(logits), "{what}");
        }
    }
}
