//! Loading onto a GPU: what kernels/repack.cu makes of a checkpoint's tensors there equals the
//! host's packers byte for byte. Run by `just test-gpu`; without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::sync::Arc;

use podium::engine::checkpoint::{
    Checkpoint, ExpertTensors, MatrixFormat, Precision, Tensor, VectorFormat,
};
use podium::engine::cuda::Staging;
use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::device::Device;
use podium::engine::cuda::load::transfer;
use podium::engine::cuda::model::{Bytes, CudaModel};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::pack::RowOrder;
use podium::engine::cuda::pieces::{Matrix, Source};
use podium::engine::cuda::repack::Repack;
use podium::engine::cuda::stream::Stream;
use podium::quant::bf16;
use support::raw::{cases, check, packed};
use support::root;

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
                repack
                    .widen(&stream, case.held, tiles.at(0), tiles.n_bytes())
                    .unwrap();
                stream.synchronize().unwrap();
            }
            check(
                &case,
                &raw,
                &matrix,
                &download(&tiles),
                report[0],
                report[1],
            );
        }
    }
}

fn download(buffer: &Bytes) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.download(0, &mut bytes).unwrap();
    bytes
}

fn assert_same(buffer: &Bytes, expected: &[u8], what: &str) {
    let bytes = download(buffer);
    let differs = bytes.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first byte that differs");
    assert_eq!(bytes.len(), expected.len(), "{what}");
}

/// Vectors one behind the other in a format.
fn vectors(tensors: &[Tensor], format: VectorFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    for tensor in tensors {
        match format {
            VectorFormat::F32 if tensor.dtype == safetensors::Dtype::BF16 => {
                for i in 0..tensor.bytes.len() / 2 {
                    bytes.extend(bf16::to_f32(tensor.bf16(i)).to_le_bytes());
                }
            }
            _ => bytes.extend_from_slice(tensor.bytes),
        }
    }
    bytes
}

fn matrix(
    source: Source<'_>,
    n_experts: usize,
    (n_out, n_k): (usize, usize),
    order: RowOrder,
    held: MatrixFormat,
) -> Matrix<'_> {
    Matrix {
        source,
        n_experts,
        n_out,
        n_k,
        order,
        held,
        tiles: 0,
        bad: 0,
        greatest: 0,
    }
}

/// Every tensor of a model against the checkpoint's.
fn check_model(model: &CudaModel, checkpoint: &Checkpoint, what: &str) {
    let config = checkpoint.config();
    let dense_as = |held, parts: &[Tensor<'_>], n_out, n_k, order| {
        let source = Source::Rows(parts.to_vec());
        let matrix = matrix(source, 1, (n_out, n_k), order, held);
        packed(&matrix, model.wide_scales).unwrap()
    };
    let dense = |parts: &[Tensor<'_>], n_out, n_k, order| {
        dense_as(model.format.attention, parts, n_out, n_k, order)
    };
    let experts = |tensors: &ExpertTensors<'_>, n_out, n_k, order| {
        let source = Source::Experts(tensors.clone());
        let held = model.format.experts;
        let matrix = matrix(source, config.n_experts, (n_out, n_k), order, held);
        packed(&matrix, model.wide_scales).unwrap()
    };
    let vector = |tensors: &[Tensor]| vectors(tensors, model.format.vectors);
    let (hidden, width, head_dim) = (config.hidden, config.intermediate, config.head_dim);
    let embedding = checkpoint.embedding().unwrap();
    assert_same(&model.embedding, embedding.bytes, what);
    for (i, layer) in model.layers.iter().enumerate() {
        let what = format!("{what}, layer {i}");
        let tensors = checkpoint.layer(i).unwrap();
        let rotary = RowOrder::Rotary { head_dim };
        let qkv = dense(&tensors.qkv.weights, config.qkv_width(), hidden, rotary);
        assert_same(&layer.qkv.tiles, &qkv, &what);
        let out = dense(
            &tensors.out.weights,
            hidden,
            config.q_width(),
            RowOrder::Natural,
        );
        assert_same(&layer.out.tiles, &out, &what);
        assert_same(&layer.router, tensors.router.weights[0].bytes, &what);
        let gate_up = experts(&tensors.gate_up, 2 * width, hidden, RowOrder::GateUp);
        assert_same(&layer.gate_up.tiles, &gate_up, &what);
        let down = experts(&tensors.down, hidden, width, RowOrder::Natural);
        assert_same(&layer.down.tiles, &down, &what);
        for (buffer, tensors) in [
            (&layer.attention_norm, vec![tensors.attention_norm]),
            (&layer.mlp_norm, vec![tensors.mlp_norm]),
            (&layer.sinks, vec![tensors.sinks]),
            (layer.qkv.bias.as_ref().unwrap(), tensors.qkv.biases),
            (layer.out.bias.as_ref().unwrap(), tensors.out.biases),
            (&layer.router_bias, tensors.router.biases),
            (&layer.gate_up.bias, vec![tensors.gate_up_bias]),
            (&layer.down.bias, vec![tensors.down_bias]),
        ] {
            assert_same(buffer, &vector(&tensors), &what);
        }
    }
    let final_norm = checkpoint.final_norm().unwrap();
    assert_same(&model.final_norm, &vector(&[final_norm]), what);
    let lm_head = checkpoint.lm_head().unwrap();
    let lm_head = dense_as(
        model.format.lm_head,
        &[lm_head],
        config.n_vocab,
        hidden,
        RowOrder::Natural,
    );
    assert_same(&model.lm_head.tiles, &lm_head, what);
}

#[test]
#[ignore = "needs a GPU"]
fn a_loaded_model_is_the_checkpoint() {
    let (device, repack) = open();
    for name in ["plain", "original", "bf16", "sharded"] {
        let folder = root().join("tests/golden/logits").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for precision in Precision::POLICIES {
            for (n_bytes, n_threads) in [(0, 1), (1 << 16, 3), (64 << 20, 8)] {
                let staging = Staging { n_bytes, n_threads };
                let model =
                    CudaModel::load(&device, &repack, &checkpoint, precision, staging).unwrap();
                let what = format!("{name}, {}, {staging:?}", precision.name());
                check_model(&model, &checkpoint, &what);
            }
        }
    }
}
