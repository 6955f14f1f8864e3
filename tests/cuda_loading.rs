//! Loading onto a GPU: what kernels/repack.cu makes of a checkpoint's tensors there equals the
//! host's packers byte for byte. Run by `just test-gpu`; without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::sync::Arc;

use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::device::Device;
use podium::engine::cuda::load::transfer;
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::repack::Repack;
use podium::engine::cuda::stream::Stream;
use support::raw::{cases, check};

fn open() -> (Arc<Device>, Repack) {
    let device = Device::open(0).expect("a GPU with a driver");
    let repack = Repack::load(&device, &Nvrtc::load().expect("NVRTC")).unwrap();
    (device, repack)
}

#[test]
#[ignore = "needs a GPU"]
fn the_device_repacks_as_the_host_does() {
    let (device, repack) = open();
    for case in cases() {
        let raw = case.raw();
        let least = case.matrix(&raw, 0, 0, 0).least_slot();
        for slot_bytes in case.slot_sizes(least) {
            let tiles: DeviceBuffer<u8> = device.alloc("tiles", case.n_bytes()).unwrap();
            tiles.fill(0, tiles.len(), 0xEE).unwrap();
            let mut report = [u64::MAX, 0];
            let words: DeviceBuffer<u64> = device.alloc("a report", 2).unwrap();
            words.upload(0, &report).unwrap();
            device.synchronize().unwrap();
            let matrix = case.matrix(&raw, tiles.at(0), words.at(0), words.at(1));
            transfer(&device, &repack, &matrix.pieces(slot_bytes), 3, slot_bytes).unwrap();
            words.download(0, &mut report).unwrap();
            if report[1] > 0 {
                let stream = Stream::new(&device).unwrap();
                repack.widen(&stream, tiles.at(0), tiles.n_bytes()).unwrap();
                stream.synchronize().unwrap();
            }
            let mut bytes = vec![0; tiles.len()];
            tiles.download(0, &mut bytes).unwrap();
            check(&case, &raw, &matrix, &bytes, report[0], report[1]);
        }
    }
}
