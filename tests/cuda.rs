//! The CUDA backend on a GPU: kernels against plain sums, logits against the goldens, and the
//! promise about bits. Run by `just test-gpu`; without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use podium::batch::Job;
use podium::engine::checkpoint::{Checkpoint, MatrixFormat, Precision, VectorFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::cuda::buffer::{DeviceBuffer, Plain};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::{
    Dense, ExpertBuffers, GatherArgs, Kernels, MatmulArgs, MoeArgs, RouteArgs, SampleArgs,
};
use podium::engine::cuda::memory;
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::pack::{self, NeedsWide, RowOrder};
use podium::engine::cuda::places;
use podium::engine::cuda::{CudaBackend, CudaOptions, Event, Loaded, Slot};
use podium::engine::generate::{
    GenerateOptions, Generation, JobError, Observer, StepReport, generate as engine_generate,
};
use podium::engine::sample::{SampleKey, Sampler, logits_hash};
use podium::engine::{
    Backend, BackendInfo, BackendMemory, EngineError, EngineShape, Fork, PAGE_POSITIONS, PageId,
    SamplingParams, SequenceId, SlotStart, Span, TokenEvent, TokenId,
};
use podium::quant::{bf16, mxfp4, mxint8};
use safetensors::SafeTensors;

/// Sums of bf16 products in f32, in another order than the reference's.
const PRODUCT: f32 = 1e-4;
/// How much further from float32 than another bf16 run the GPU's may be: than transformers' on the
/// same golden, and than the CPU's.
const BF16_SHARE: f32 = 1.5;
/// What a bf16 run of a tiny model may differ by where the CPU's happens to be exact.
const BF16_FLOOR: f32 = 4e-3;

fn device() -> Arc<Device> {
    Device::open(0).expect("a GPU with a driver")
}

/// Numbers that differ by position.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    fn value(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    fn bits(&mut self, n: usize) -> Vec<u16> {
        self.wide_bits(n, 0)
    }

    /// Values times a power of two between `-powers` and `powers`.
    fn wide_bits(&mut self, n: usize, powers: i32) -> Vec<u16> {
        let value = |_| {
            let power = (self.word() >> 33) as i32 % (2 * powers + 1) - powers;
            bf16::from_f32(self.value() * 2f32.powi(power))
        };
        (0..n).map(value).collect()
    }
}

fn upload<T: Plain>(device: &Arc<Device>, values: &[T]) -> DeviceBuffer<T> {
    let buffer = device.alloc("a test's values", values.len()).unwrap();
    buffer.upload(0, values).unwrap();
    buffer
}

fn download<T: Plain>(buffer: &DeviceBuffer<T>) -> Vec<T> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.download(0, &mut values).unwrap();
    values
}

fn assert_close(got: &[f32], expected: &[f64], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(
            error <= f64::from(tolerance) * scale.max(1.0),
            "{what}, element {i}: {got} for {expected}"
        );
    }
}

fn same_bits(a: &[f32], b: &[f32], what: &str) {
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}, element {i}: {a} and {b}");
    }
}

fn small_config(n_experts: usize) -> ModelConfig {
    routing_config(n_experts, 96, 2)
}

fn routing_config(n_experts: usize, hidden: usize, k: usize) -> ModelConfig {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": {hidden}, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": {n_experts},
        "num_experts_per_tok": {k}, "intermediate_size": 64, "vocab_size": 500,
        "sliding_window": 32, "rope_theta": 10000, "max_position_embeddings": 4096}}"#
    );
    ModelConfig::parse(text.as_bytes(), Path::new("test")).unwrap()
}

fn kernels(device: &Arc<Device>, format: MatrixFormat, n_experts: usize, wide: bool) -> Kernels {
    let [kernels, _] = both_kernels(device, format, n_experts, wide);
    kernels
}

/// The kernels for this GPU, and those of a GPU without warpgroup instructions.
fn both_kernels(
    device: &Arc<Device>,
    format: MatrixFormat,
    n_experts: usize,
    wide: bool,
) -> [Kernels; 2] {
    let config = small_config(n_experts);
    let mut build = Build::new(
        &config,
        Precision::Stored.formats(format, VectorFormat::Bf16),
    )
    .unwrap();
    build.wide_scales = wide;
    let nvrtc = Nvrtc::load().expect("NVRTC");
    [true, false].map(|warpgroups| {
        build.warpgroups = warpgroups;
        Kernels::load(device, &nvrtc, &config, build).unwrap()
    })
}

#[test]
#[ignore = "needs a GPU"]
fn dense_products_have_one_order_of_sums() {
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(1);
    // A row, a tile of them and one more, for every width of a tile; outputs and k that end within
    // a tile.
    for (i, (n_out, n_k, n_rows)) in [
        (64, 64, 1),
        (64, 64, 8),
        (68, 96, 9),
        (72, 128, 16),
        (68, 96, 33),
        (200, 160, 64),
        (200, 160, 65),
        (136, 96, 128),
        (136, 96, 129),
        (128, 64, 256),
        (68, 160, 257),
        // Odd row blocks, features that end in half a block, more row pairs than a band.
        (320, 2880, 257),
        (576, 96, 2433),
        (512, 2880, 130),
        (512, 2880, 130),
    ]
    .into_iter()
    .enumerate()
    {
        // The last one again, over many powers of two: what is lost in a sum then shows.
        let powers = if i == 14 { 20 } else { 0 };
        let weights = random.wide_bits(n_out * n_k, powers);
        let x = random.wide_bits(n_rows * n_k, powers);
        let mut tiles = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
        pack::bf16(&mut tiles, n_out, n_k, RowOrder::Natural, |row, k| {
            weights[row * n_k + k]
        });
        let (tiles, x_device) = (upload(&device, &tiles), upload(&device, &x));
        let mut expected = vec![0.0f64; n_rows * n_out];
        for row in 0..n_rows {
            for out in 0..n_out {
                expected[row * n_out + out] = (0..n_k)
                    .map(|k| {
                        f64::from(bf16::to_f32(weights[out * n_k + k]))
                            * f64::from(bf16::to_f32(x[row * n_k + k]))
                    })
                    .sum();
            }
        }
        let mut first: Option<Vec<f32>> = None;
        let variants = both
            .iter()
            .flat_map(|kernels| (0..kernels.n_dense()).map(move |variant| (kernels, variant)));
        for (kernels, variant) in variants {
            let out: DeviceBuffer<f32> = device.alloc("out", n_rows * n_out).unwrap();
            out.fill(0, out.len(), 0xFF).unwrap();
            let args = MatmulArgs {
                weights: tiles.at(0),
                x: x_device.at(0),
                out: out.at(0),
                n_rows: n_rows as u32,
                n_out: n_out as u32,
                n_k: n_k as u32,
                n_tiles: pack::n_tiles(n_out) as u32,
                ..MatmulArgs::default()
            };
            kernels
                .matmul_variant(Dense::Logits, variant, &args)
                .unwrap();
            let got = download(&out);
            let name = kernels.dense_name(variant);
            let what = format!("{n_out} x {n_k}, {n_rows} rows, variant {name}");
            assert_close(&got, &expected, PRODUCT, &what);
            same_bits(first.get_or_insert_with(|| got.clone()), &got, &what);
        }
    }
}

/// Weights in tiles, inputs, and the product in f32 with the bits that all variants give.
fn product(
    device: &Arc<Device>,
    kernels: &Kernels,
    random: &mut Random,
    order: RowOrder,
    (n_out, n_k, n_rows): (usize, usize, usize),
) -> (MatmulArgs, DeviceBuffer<u8>, DeviceBuffer<u16>, Vec<f32>) {
    let weights = random.bits(n_out * n_k);
    let x = upload(device, &random.bits(n_rows * n_k));
    let [natural, ordered] = [RowOrder::Natural, order].map(|order| {
        let mut tiles = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
        pack::bf16(&mut tiles, n_out, n_k, order, |row, k| {
            weights[row * n_k + k]
        });
        upload(device, &tiles)
    });
    let out: DeviceBuffer<f32> = device.alloc("out", n_rows * n_out).unwrap();
    let args = MatmulArgs {
        weights: natural.at(0),
        x: x.at(0),
        out: out.at(0),
        n_rows: n_rows as u32,
        n_out: n_out as u32,
        n_k: n_k as u32,
        n_tiles: pack::n_tiles(n_out) as u32,
        ..MatmulArgs::default()
    };
    kernels.matmul_variant(Dense::Logits, 0, &args).unwrap();
    let args = MatmulArgs {
        weights: ordered.at(0),
        ..args
    };
    (args, ordered, x, download(&out))
}

#[test]
#[ignore = "needs a GPU"]
fn every_variant_adds_to_the_residual() {
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(5);
    for (n_out, n_k, n_rows) in [
        (68, 64, 1),
        (320, 96, 129),
        (324, 160, 257),
        (640, 64, 300),
        (576, 64, 2177),
    ] {
        let shape = (n_out, n_k, n_rows);
        let (args, _tiles, _x, sums) =
            product(&device, &both[0], &mut random, RowOrder::Natural, shape);
        let bias = random.bits(n_out);
        let residual: Vec<f32> = (0..n_rows * n_out).map(|_| random.value()).collect();
        let expected: Vec<f32> = (0..n_rows * n_out)
            .map(|i| residual[i] + (sums[i] + bf16::to_f32(bias[i % n_out])))
            .collect();
        let bias = upload(&device, &bias);
        for kernels in &both {
            for variant in 0..kernels.n_dense() {
                let out = upload(&device, &residual);
                let args = MatmulArgs {
                    bias: bias.at(0),
                    out: out.at(0),
                    ..args
                };
                kernels.matmul_variant(Dense::Add, variant, &args).unwrap();
                let name = kernels.dense_name(variant);
                let what = format!("{shape:?}, variant {name}");
                same_bits(&expected, &download(&out), &what);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_variant_turns_and_caches_keys() {
    // As `small_config`.
    const HEAD_DIM: usize = 64;
    const N_HEADS: usize = 8;
    const N_KV_HEADS: usize = 2;
    // Sequences take turns, the last row is padding.
    const N_SEQUENCES: usize = 3;
    const RING: usize = 128;
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(6);
    let width = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM;
    let rope: Vec<f32> = (0..RING * HEAD_DIM).map(|_| random.value()).collect();
    let rope_device = upload(&device, &rope);
    for n_rows in [2usize, 9, 64, 130, 257] {
        let shape = (width, 96, n_rows);
        let order = RowOrder::Rotary { head_dim: HEAD_DIM };
        let (args, _tiles, _x, sums) = product(&device, &both[0], &mut random, order, shape);
        let bias = random.bits(width);
        let bias_device = upload(&device, &bias);
        let place = |row: usize| match row + 1 == n_rows {
            true => (u32::MAX, 0),
            false => ((row % N_SEQUENCES) as u32, row / N_SEQUENCES),
        };
        let rows: Vec<u32> = (0..n_rows)
            .flat_map(|row| {
                let (sequence, position) = place(row);
                [sequence, position as u32, 0, 0]
            })
            .collect();
        let rows = upload(&device, &rows);
        // With all queries, and without.
        for first_tile in [0, N_HEADS * HEAD_DIM / pack::TILE_M] {
            let mut expected = vec![u16::MAX; n_rows * width];
            let mut cached = vec![u16::MAX; N_SEQUENCES * N_KV_HEADS * 2 * RING * HEAD_DIM];
            for row in 0..n_rows {
                let (sequence, position) = place(row);
                for head in first_tile * pack::TILE_M / HEAD_DIM..width / HEAD_DIM {
                    for dim in 0..HEAD_DIM / 2 {
                        let at = [dim, dim + HEAD_DIM / 2].map(|dim| head * HEAD_DIM + dim);
                        let [low, high] =
                            at.map(|at| sums[row * width + at] + bf16::to_f32(bias[at]));
                        let turn = &rope[position * HEAD_DIM + dim..];
                        let (cos, sin) = (turn[0], turn[HEAD_DIM / 2]);
                        let turned = if head < N_HEADS + N_KV_HEADS {
                            [low * cos - high * sin, high * cos + low * sin]
                        } else {
                            [low, high]
                        };
                        for (at, value) in at.into_iter().zip(turned) {
                            let bits = bf16::from_f32(value);
                            expected[row * width + at] = bits;
                            if head >= N_HEADS && sequence != u32::MAX {
                                let kv = head - N_HEADS;
                                let (kv_head, is_value) = (kv % N_KV_HEADS, kv / N_KV_HEADS);
                                let of_head = sequence as usize * N_KV_HEADS + kv_head;
                                let of_position = (of_head * 2 + is_value) * RING + position;
                                cached[of_position * HEAD_DIM + at % HEAD_DIM] = bits;
                            }
                        }
                    }
                }
            }
            for kernels in &both {
                for variant in 0..kernels.n_dense() {
                    let qkv = upload(&device, &vec![u16::MAX; expected.len()]);
                    let cache = upload(&device, &vec![u16::MAX; cached.len()]);
                    let args = MatmulArgs {
                        bias: bias_device.at(0),
                        out: 0,
                        qkv: qkv.at(0),
                        rows: rows.at(0),
                        rope: rope_device.at(0),
                        cache: cache.at(0),
                        first_tile: first_tile as u32,
                        n_heads: N_HEADS as u32,
                        n_kv_heads: N_KV_HEADS as u32,
                        n_layers: 1,
                        ring: RING as u32,
                        ..args
                    };
                    kernels.matmul_variant(Dense::Qkv, variant, &args).unwrap();
                    let name = kernels.dense_name(variant);
                    let what = format!("{n_rows} rows from tile {first_tile}, variant {name}");
                    assert!(download(&qkv) == expected, "{what}: qkv");
                    assert!(download(&cache) == cached, "{what}: cache");
                }
            }
        }
    }
}

/// How rows choose their two experts of five.
type Choice = fn(usize) -> [u32; 2];

/// Expert 3 has no token, expert 1 one of every row.
const UNEVEN: Choice = |row| [1, [0, 2, 4][row % 3]];

/// All tokens are on the same experts, the others have none.
const ALL_ON_ONE: Choice = |_| [4, 1];

/// Of 97 rows 1, 9, 17 and 70 on four experts, all on the fifth.
const RAGGED: Choice = |row| {
    let other = match row {
        40 => 0,
        50..=58 => 1,
        60..=76 => 3,
        _ => 4,
    };
    [other, 2]
};

/// Experts' products by every variant against sums in f64; gives their bits.
fn check_experts(format: MatrixFormat, wide: bool) -> Vec<(Vec<u16>, Vec<f32>)> {
    let device = device();
    let n_experts = 5;
    let both = both_kernels(&device, format, n_experts, wide);
    let mut products = Vec::new();
    let mut random = Random(2);
    let k = 2;
    // None is whole groups of 64; the larger ones are more groups than there are stages.
    let (small, large) = ((160, 224), (1248, 608));
    for ((hidden, width), n_rows, choice) in [
        (small, 1usize, UNEVEN),
        (small, 7, UNEVEN),
        (small, 40, UNEVEN),
        (small, 150, UNEVEN),
        (small, 1, ALL_ON_ONE),
        (small, 8, ALL_ON_ONE),
        (small, 9, ALL_ON_ONE),
        (small, 15, ALL_ON_ONE),
        (small, 17, ALL_ON_ONE),
        (small, 31, ALL_ON_ONE),
        (small, 33, ALL_ON_ONE),
        (small, 49, ALL_ON_ONE),
        (small, 64, ALL_ON_ONE),
        (small, 65, ALL_ON_ONE),
        (small, 97, ALL_ON_ONE),
        (small, 128, ALL_ON_ONE),
        (small, 129, ALL_ON_ONE),
        (large, 9, UNEVEN),
        (large, 97, RAGGED),
    ] {
        let experts: Vec<u32> = (0..n_rows).flat_map(choice).collect();
        let counts: [usize; 5] = std::array::from_fn(|of| {
            experts
                .iter()
                .filter(|&&expert| expert as usize == of)
                .count()
        });
        let x = random.bits(n_rows * hidden);
        let bias_up = random.bits(n_experts * 2 * width);
        let bias_down = random.bits(n_experts * hidden);
        let mut make = |n_out: usize, n_k: usize, order: RowOrder| {
            let mut tiles = Vec::new();
            let mut values = Vec::new();
            for _ in 0..n_experts {
                let mut blocks = Vec::new();
                for _ in 0..n_out * n_k / 32 {
                    let codes: [u8; 16] = std::array::from_fn(|_| random.word() as u8);
                    let scale = if wide { 128 } else { 118 } + (random.word() % 4) as u8;
                    blocks.push((scale, codes));
                    values.extend(mxfp4::unpack(scale, &codes));
                }
                let start = values.len() - n_out * n_k;
                match format {
                    MatrixFormat::Mxfp4 => {
                        let mut one = vec![0; pack::matrix_bytes(MatrixFormat::Mxfp4, n_out, n_k)];
                        pack::mxfp4::<NeedsWide>(&mut one, n_out, n_k, order, wide, |row, i| {
                            Ok(blocks[row * n_k / 32 + i])
                        })
                        .unwrap();
                        tiles.extend(one);
                    }
                    MatrixFormat::Mxint8 => {
                        let mut one = vec![0; pack::matrix_bytes(format, n_out, n_k)];
                        pack::mxint8::<NeedsWide>(&mut one, n_out, n_k, order, wide, |row, i| {
                            let (scale, codes) = &blocks[row * n_k / 32 + i];
                            Ok(mxint8::from_mxfp4(*scale, codes))
                        })
                        .unwrap();
                        tiles.extend(one);
                    }
                    MatrixFormat::Bf16 => {
                        let mut one = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
                        let of =
                            |row: usize, k: usize| bf16::from_f32(values[start + row * n_k + k]);
                        pack::bf16(&mut one, n_out, n_k, order, of);
                        tiles.extend(one);
                    }
                }
            }
            (upload(&device, &tiles), values)
        };
        let (up_tiles, up) = make(2 * width, hidden, RowOrder::GateUp);
        let (down_tiles, down) = make(hidden, width, RowOrder::Natural);
        let dot = |w: &[f32], x: &[f32]| -> f64 {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            products.sum()
        };
        let to_f32 = |bits: &[u16]| bits.iter().map(|&b| bf16::to_f32(b)).collect::<Vec<f32>>();
        let (x_f32, bias_up_f32, bias_down_f32) =
            (to_f32(&x), to_f32(&bias_up), to_f32(&bias_down));
        let x_device = upload(&device, &x);
        let (bias_up, bias_down) = (upload(&device, &bias_up), upload(&device, &bias_down));
        let experts_device = upload(&device, &experts);
        let offsets: DeviceBuffer<u32> = device.alloc("offsets", n_experts + 1).unwrap();
        let entries: DeviceBuffer<u32> = device.alloc("entries", n_rows * k).unwrap();
        let n_octets = places::n_octets(n_rows * k, n_experts);
        let n_listed = n_octets * places::LISTED_WORDS;
        let listed: DeviceBuffer<u32> = device.alloc("token tiles", n_listed).unwrap();
        let n_places = n_octets * places::OCTET;
        let places_device: DeviceBuffer<u32> = device.alloc("places", n_places).unwrap();
        let tiles = |n_k: usize| -> DeviceBuffer<u16> {
            device
                .alloc("tiles", places::tiles_len(n_octets, n_k))
                .unwrap()
        };
        let (t_tiles, act_tiles) = (tiles(hidden), tiles(width));
        let mut first: Option<(Vec<u16>, Vec<f32>)> = None;
        let variants = both
            .iter()
            .flat_map(|kernels| (0..kernels.n_moe()).map(move |variant| (kernels, variant)));
        for (kernels, variant) in variants {
            let act: DeviceBuffer<u16> = device.alloc("act", n_rows * k * width).unwrap();
            let y: DeviceBuffer<u16> = device.alloc("y", n_rows * k * hidden).unwrap();
            act.fill(0, act.len(), 0xFF).unwrap();
            y.fill(0, y.len(), 0xFF).unwrap();
            // No number where nothing was brought.
            t_tiles.fill(0, t_tiles.len(), 0xFF).unwrap();
            act_tiles.fill(0, act_tiles.len(), 0xFF).unwrap();
            places_device.fill(0, n_places, 0xFF).unwrap();
            let buffers = ExpertBuffers {
                t: x_device.at(0),
                act: act.at(0),
                y: y.at(0),
                experts: experts_device.at(0),
                offsets: offsets.at(0),
                entries: entries.at(0),
                places: places_device.at(0),
                listed: listed.at(0),
                t_tiles: t_tiles.at(0),
                act_tiles: act_tiles.at(0),
            };
            let common = MoeArgs {
                k: k as u32,
                ..MoeArgs::default()
            };
            let gate_up = MoeArgs {
                weights: up_tiles.at(0),
                bias: bias_up.at(0),
                n_k: hidden as u32,
                n_tiles: pack::n_tiles(2 * width) as u32,
                n_out: width as u32,
                limit: 7.0,
                ..common
            };
            let down_args = MoeArgs {
                weights: down_tiles.at(0),
                bias: bias_down.at(0),
                n_k: width as u32,
                n_tiles: pack::n_tiles(hidden) as u32,
                n_out: hidden as u32,
                ..common
            };
            kernels
                .experts_variant(&buffers, &gate_up, &down_args, n_rows, variant)
                .unwrap();
            let (mut act, y) = (download(&act), to_f32(&download(&y)));
            if kernels.moe_is_streaming(variant) {
                let (tiles, placed) = (download(&act_tiles), download(&places_device));
                for (place, &entry) in placed.iter().enumerate() {
                    for f in (0..width).filter(|_| entry != u32::MAX) {
                        act[entry as usize * width + f] = tiles[places::at(n_octets, place, f)];
                    }
                }
            }
            let what = format!(
                "{format:?}, {n_rows} rows of {hidden} on {counts:?}, variant {}",
                kernels.moe_name(variant)
            );
            if let Some((first_act, first_y)) = &first {
                assert_eq!(*first_act, act, "{what}: gate_up");
                same_bits(first_y, &y, &what);
                continue;
            }
            let act_f32 = to_f32(&act);
            for row in 0..n_rows {
                for (rank, expert) in choice(row).into_iter().enumerate() {
                    let (entry, expert) = (row * k + rank, expert as usize);
                    let x = &x_f32[row * hidden..][..hidden];
                    let weights = &up[expert * 2 * width * hidden..];
                    let expected: Vec<f64> = (0..width)
                        .map(|f| {
                            let of = |row: usize| {
                                dot(&weights[row * hidden..][..hidden], x)
                                    + f64::from(bias_up_f32[expert * 2 * width + row])
                            };
                            let (gate, up) = (of(2 * f).min(7.0), of(2 * f + 1).clamp(-7.0, 7.0));
                            gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
                        })
                        .collect();
                    let got = &act_f32[entry * width..][..width];
                    // One rounding to bf16.
                    assert_close(got, &expected, 8e-3, &format!("{what}: gate_up of {entry}"));
                    let weights = &down[expert * width * hidden..];
                    let expected: Vec<f64> = (0..hidden)
                        .map(|m| {
                            dot(&weights[m * width..][..width], got)
                                + f64::from(bias_down_f32[expert * hidden + m])
                        })
                        .collect();
                    let got = &y[entry * hidden..][..hidden];
                    assert_close(got, &expected, 8e-3, &format!("{what}: down of {entry}"));
                }
            }
            first = Some((act, y));
        }
        products.extend(first);
    }
    products
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_experts_have_the_same_bits() {
    check_copies(false);
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_experts_with_large_scales_have_the_same_bits() {
    check_copies(true);
}

fn check_copies(wide: bool) {
    let of_mxfp4 = check_experts(MatrixFormat::Mxfp4, wide);
    for format in [MatrixFormat::Mxint8, MatrixFormat::Bf16] {
        let of_copy = check_experts(format, wide);
        assert_eq!(of_mxfp4.len(), of_copy.len());
        for ((act, y), (copy_act, copy_y)) in of_mxfp4.iter().zip(&of_copy) {
            assert_eq!(act, copy_act, "{format:?}: gate_up");
            same_bits(y, copy_y, &format!("{format:?}: down"));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn routing_takes_the_greatest_logits_in_any_number_of_rows() {
    let device = device();
    // Fewer experts than a tile has, a tile and some, several times 32; rows shorter than one
    // piece a warp, of the released length, and too long to be kept in registers.
    for (n_experts, hidden, k) in [
        (5, 96, 2),
        (32, 2880, 4),
        (128, 2880, 4),
        (20, 672, 4),
        (72, 3616, 3),
        (8, 6688, 4),
    ] {
        routing_takes_the_greatest_logits(&device, n_experts, hidden, k);
    }
}

/// `gather` puts the entries in the order that `group` has found, and their rows of `t` beside.
fn check_gathering(
    device: &Arc<Device>,
    kernels: &Kernels,
    experts: &[u32],
    k: usize,
    t: &[u16],
    [offsets, entries]: [&[u32]; 2],
) {
    let n_experts = offsets.len() - 1;
    let hidden = t.len() / (experts.len() / k);
    let n_octets = places::n_octets(experts.len(), n_experts);
    let (experts_device, t_device) = (upload(device, experts), upload(device, t));
    let places_device: DeviceBuffer<u32> = device.alloc("places", n_octets * 8).unwrap();
    let tiles: DeviceBuffer<u16> = device
        .alloc("tiles", places::tiles_len(n_octets, hidden))
        .unwrap();
    let listed: DeviceBuffer<u32> = device.alloc("token tiles", n_octets * 4).unwrap();
    let [sorted_offsets, sorted_entries] = [offsets, entries].map(|list| upload(device, list));
    // Few entries are sorted by each block, of many `group` has done it.
    for (tile_octets, is_sorted) in [(1, false), (2, true), (6, false), (16, true)] {
        tiles.fill(0, tiles.len(), 0xFF).unwrap();
        let of_sorted = |list: &DeviceBuffer<u32>| if is_sorted { list.at(0) } else { 0 };
        let args = GatherArgs {
            experts: experts_device.at(0),
            offsets: of_sorted(&sorted_offsets),
            entries: of_sorted(&sorted_entries),
            t: t_device.at(0),
            places: places_device.at(0),
            tiles: tiles.at(0),
            listed: listed.at(0),
            n_entries: experts.len() as u32,
            n_experts: n_experts as u32,
            k: k as u32,
            n_k: hidden as u32,
            n_octets: n_octets as u32,
            tile_octets: tile_octets as u32,
            n_listed: n_octets as u32,
        };
        kernels.gather(&args).unwrap();
        let (found, tiles) = (download(&places_device), download(&tiles));
        let mut expected = Vec::new();
        let mut octet = 0;
        for expert in 0..n_experts {
            let of_expert = &entries[offsets[expert] as usize..offsets[expert + 1] as usize];
            let end = octet + of_expert.len().div_ceil(8);
            for first in (octet..end).step_by(tile_octets) {
                expected.push([expert as u32, first as u32, end as u32, 0]);
            }
            for place in octet * 8..end * 8 {
                let entry = of_expert.get(place - octet * 8).copied();
                let what = format!("place {place} of {experts:?}");
                assert_eq!(found[place], entry.unwrap_or(u32::MAX), "{what}");
                let Some(entry) = entry else { continue };
                let row = &t[entry as usize / k * hidden..][..hidden];
                for at in 0..pack::n_groups(hidden) * 64 {
                    let value = row.get(at).copied().unwrap_or(0);
                    assert_eq!(tiles[places::at(n_octets, place, at)], value, "{what}");
                }
            }
            octet = end;
        }
        expected.resize(n_octets, [u32::MAX, 0, 0, 0]);
        assert_eq!(download(&listed), expected.concat(), "{experts:?}");
    }
}

fn routing_takes_the_greatest_logits(
    device: &Arc<Device>,
    n_experts: usize,
    hidden: usize,
    k: usize,
) {
    let eps = 1e-5f32;
    let config = routing_config(n_experts, hidden, k);
    let formats = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let build = Build::new(&config, formats).unwrap();
    let nvrtc = Nvrtc::load().expect("NVRTC");
    let kernels = Kernels::load(device, &nvrtc, &config, build).unwrap();
    let mut random = Random(4);
    let (norm, weights) = (random.bits(hidden), random.bits(n_experts * hidden));
    let bias = random.bits(n_experts);
    let to_f64 = |bits: &u16| f64::from(bf16::to_f32(*bits));
    // Rows of other sizes; the second has nothing but its experts' biases.
    const N_KINDS: usize = 7;
    let mut kinds: Vec<Vec<f32>> = (0..N_KINDS)
        .map(|kind| {
            let size = (kind as f32 + 0.5) * 2.0;
            (0..hidden).map(|_| size * random.value()).collect()
        })
        .collect();
    kinds[1].fill(0.0);
    let norm_device = upload(device, &norm);
    let weights_device = upload(device, &weights);
    // Experts, bits of their gates, the normed row.
    type Routed = (Vec<u32>, Vec<u32>, Vec<u16>);
    let mut first: Vec<Option<Routed>> = vec![None; N_KINDS];
    // As they come, all equal, and one that makes its expert's logit no number.
    let mut with_nan = bias.clone();
    with_nan[1] = bf16::from_f32(f32::NAN);
    for bias in [bias, vec![bf16::from_f32(0.5); n_experts], with_nan] {
        let bias_device = upload(device, &bias);
        first.fill(None);
        // An H100 takes a row a tile up to 33 rows, then more, 16 from 1,057 on; with 4,099 some
        // blocks take several tiles.
        for n_rows in [1usize, 2, 9, 34, 131, 1055, 1056, 1057, 4099] {
            let x: Vec<f32> = (0..n_rows)
                .flat_map(|row| kinds[row % N_KINDS].clone())
                .collect();
            // The last of several rows is padding.
            let padding = (n_rows > 1).then_some(n_rows - 1);
            // Sequence, position and segment, of which the first counts here.
            let rows: Vec<u32> = (0..n_rows)
                .flat_map(|row| {
                    let is_padding = padding == Some(row);
                    [if is_padding { u32::MAX } else { row as u32 }, 0, 0, 0]
                })
                .collect();
            let (x_device, rows) = (upload(device, &x), upload(device, &rows));
            let t: DeviceBuffer<u16> = device.alloc("t", n_rows * hidden).unwrap();
            let experts: DeviceBuffer<u32> = device.alloc("experts", n_rows * k).unwrap();
            let gates: DeviceBuffer<f32> = device.alloc("gates", n_rows * k).unwrap();
            gates.fill(0, gates.len(), 0xFF).unwrap();
            let args = RouteArgs {
                x: x_device.at(0),
                norm: norm_device.at(0),
                t: t.at(0),
                weights: weights_device.at(0),
                bias: bias_device.at(0),
                rows: rows.at(0),
                experts: experts.at(0),
                gates: gates.at(0),
                n_experts: n_experts as u32,
                k: k as u32,
                n_rows: n_rows as u32,
                eps,
                ..RouteArgs::default()
            };
            kernels.route(&args).unwrap();
            let offsets: DeviceBuffer<u32> = device.alloc("offsets", n_experts + 1).unwrap();
            let entries: DeviceBuffer<u32> = device.alloc("entries", n_rows * k).unwrap();
            kernels
                .group_entries(
                    experts.at(0),
                    (n_rows * k) as u32,
                    offsets.at(0),
                    entries.at(0),
                )
                .unwrap();
            let (t, experts, gates) = (download(&t), download(&experts), download(&gates));
            for row in 0..n_rows {
                let what = format!("row {row} of {n_rows}");
                let chosen = experts[row * k..][..k].to_vec();
                if padding == Some(row) {
                    assert!(chosen.iter().all(|e| *e == u32::MAX), "{what}");
                    continue;
                }
                let t = &t[row * hidden..][..hidden];
                let bits: Vec<u32> = gates[row * k..][..k].iter().map(|g| g.to_bits()).collect();
                let found = (chosen.clone(), bits, t.to_vec());
                let kind = row % N_KINDS;
                let of_kind = first[kind].get_or_insert_with(|| found.clone());
                assert_eq!(*of_kind, found, "{what}: not as alone");
                if n_rows > 9 {
                    continue;
                }
                let x = &kinds[kind];
                let squares = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let scale = 1.0 / (squares / hidden as f64 + f64::from(eps)).sqrt();
                let normed: Vec<f64> = x
                    .iter()
                    .zip(&norm)
                    .map(|(x, norm)| f64::from(*x) * scale * to_f64(norm))
                    .collect();
                let got: Vec<f32> = t.iter().map(|bits| bf16::to_f32(*bits)).collect();
                assert_close(&got, &normed, 8e-3, &what);
                let logits: Vec<f64> = (0..n_experts)
                    .map(|expert| {
                        let weights = &weights[expert * hidden..][..hidden];
                        let products = t.iter().zip(weights).map(|(t, w)| to_f64(t) * to_f64(w));
                        products.sum::<f64>() + to_f64(&bias[expert])
                    })
                    .collect();
                let mut order: Vec<u32> = (0..n_experts as u32).collect();
                order.retain(|&e| !logits[e as usize].is_nan());
                // Stable: the lower expert among equals.
                order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
                assert_eq!(chosen, order[..k], "{what}: {logits:?}");
                let best = logits[order[0] as usize];
                let shares: Vec<f64> = order[..k]
                    .iter()
                    .map(|&e| (logits[e as usize] - best).exp())
                    .collect();
                let sum: f64 = shares.iter().sum();
                let shares: Vec<f64> = shares.iter().map(|share| share / sum).collect();
                assert_close(&gates[row * k..][..k], &shares, PRODUCT, &what);
            }
            // Every entry once, under its expert, in order.
            let (offsets, entries) = (download(&offsets), download(&entries));
            if n_rows <= 131 {
                check_gathering(
                    device,
                    &kernels,
                    &experts,
                    k,
                    &t,
                    [offsets.as_slice(), &entries],
                );
            }
            let mut sorted: Vec<u32> = (0..(n_rows * k) as u32)
                .filter(|&entry| experts[entry as usize] != u32::MAX)
                .collect();
            sorted.sort_by_key(|&entry| (experts[entry as usize], entry));
            assert_eq!(entries[..sorted.len()], sorted, "{n_rows} rows");
            let ends: Vec<u32> = (0..=n_experts as u32)
                .map(|end| {
                    sorted
                        .iter()
                        .filter(|&&e| experts[e as usize] < end)
                        .count() as u32
                })
                .collect();
            assert_eq!(offsets, ends, "{n_rows} rows");
        }
    }
}

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
        let args = SampleArgs {
            logits: logits_device.at(0),
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

struct Prompt {
    name: String,
    tokens: Vec<TokenId>,
    greedy: Vec<TokenId>,
    /// `[tokens + greedy - 1, n_vocab]`.
    logits: Vec<f32>,
}

struct Case {
    folder: PathBuf,
    prompts: Vec<Prompt>,
    /// Distances of transformers' own bf16 run from float32, by [`QUANTILES`].
    of_transformers: [f64; 3],
}

/// Distances of a case's positions: the largest are those where rounding chose other experts.
const QUANTILES: [(&str, f64); 3] = [
    ("median", 0.5),
    ("upper_quartile", 0.75),
    ("upper_decile", 0.9),
];

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.as_chunks::<4>().0.iter().copied()
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Elsewhere than where it was built: the tests may be carried to the GPU.
    let root = match std::env::var_os("PODIUM_ROOT") {
        Some(root) => PathBuf::from(root),
        None => root.to_owned(),
    };
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root.join("tests/golden/logits"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    let read_case = |folder: PathBuf| {
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let of_bf16: serde_json::Value = serde_json::from_slice(&read("bf16.json")).unwrap();
        let expected = read("expected.safetensors");
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let data = |name: String| expected.tensor(&name).unwrap().data();
        let input = String::from_utf8(read("input.jsonl")).unwrap();
        let prompts = input.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let name = line["prompt"].as_str().unwrap().to_owned();
            let tokens = line["tokens"].as_array().unwrap();
            Prompt {
                tokens: tokens
                    .iter()
                    .map(|t| t.as_u64().unwrap() as TokenId)
                    .collect(),
                greedy: words(data(format!("{name}.greedy")))
                    .map(u32::from_le_bytes)
                    .collect(),
                logits: words(data(format!("{name}.logits")))
                    .map(f32::from_le_bytes)
                    .collect(),
                name,
            }
        });
        Case {
            prompts: prompts.collect(),
            of_transformers: QUANTILES.map(|(which, _)| of_bf16[which].as_f64().unwrap()),
            folder: folder.clone(),
        }
    };
    folders.into_iter().map(read_case).collect()
}

/// Longest prompt and continuation of the goldens, with room.
const MAX_CONTEXT: usize = 768;
const PAGES_A_SEQUENCE: usize = MAX_CONTEXT / PAGE_POSITIONS;

fn shape(n_slots: usize, prefill_rows: usize) -> EngineShape {
    EngineShape {
        n_slots,
        n_forks: 1,
        n_pages: (n_slots + 1) * PAGES_A_SEQUENCE,
        max_context: MAX_CONTEXT,
        prefill_rows,
    }
}

fn load(case: &Case) -> Arc<Loaded> {
    let checkpoint = Checkpoint::open(&case.folder).unwrap();
    Arc::new(Loaded::open(&checkpoint, Precision::Stored, 0).expect("a GPU"))
}

fn open(loaded: &Arc<Loaded>, n_slots: usize, prefill_rows: usize) -> CudaBackend {
    let options = CudaOptions {
        trace_hash: true,
        poison: true,
    };
    CudaBackend::new(Arc::clone(loaded), shape(n_slots, prefill_rows), options).unwrap()
}

/// Maps a sequence's own pages from index `first` on.
fn map_pages(backend: &mut dyn Backend, sequence: usize, first: usize) {
    for index in first..PAGES_A_SEQUENCE {
        let page = PageId((sequence * PAGES_A_SEQUENCE + index) as u32);
        backend.map_page(SequenceId(sequence as u32), index, page);
    }
}

fn span(sequence: usize, start: usize, tokens: &[TokenId]) -> Span {
    Span {
        sequence: SequenceId(sequence as u32),
        start,
        tokens: tokens.into(),
    }
}

fn start(slot: usize, prompt: &Prompt, max_new_tokens: usize) -> SlotStart {
    let position = prompt.tokens.len() - 1;
    SlotStart {
        slot: SequenceId(slot as u32),
        token: prompt.tokens[position],
        position,
        sampling: SamplingParams::default(),
        row_hash: slot as u64,
        sample: 0,
        stop_tokens: Arc::new([]),
        max_new_tokens,
    }
}

/// Largest distance of a prompt's logits to the golden ones; of each position the root mean square
/// goes to `by_position`.
fn distance(backend: &mut dyn Backend, prompt: &Prompt, by_position: &mut Vec<f64>) -> f32 {
    let n_vocab = backend.info().n_vocab;
    let mut tokens = prompt.tokens.clone();
    tokens.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
    map_pages(backend, 0, 0);
    let mut most = 0.0f32;
    let mut n_rows = 0;
    let visit = &mut |position: usize, logits: &[f32]| {
        let mut squares = 0.0;
        for (got, expected) in logits.iter().zip(&prompt.logits[position * n_vocab..]) {
            most = most.max((got - expected).abs());
            squares += f64::from(got - expected).powi(2);
        }
        by_position.push((squares / n_vocab as f64).sqrt());
        n_rows += 1;
    };
    backend
        .score(&span(0, 0, &tokens), visit)
        .expect("it scores");
    assert_eq!(n_rows * n_vocab, prompt.logits.len());
    backend.clear(&[SequenceId(0)]);
    most
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_as_near_to_float32_as_other_bf16_runs() {
    for case in cases() {
        let checkpoint = Checkpoint::open(&case.folder).unwrap();
        let options = CpuOptions {
            n_threads: 2,
            exact: false,
            trace_hash: false,
            poison: false,
        };
        let mut cpu =
            CpuBackend::open(&checkpoint, Precision::Stored, shape(3, 64), options).unwrap();
        let loaded = load(&case);
        for prefill_rows in [64, 7] {
            let mut gpu = open(&loaded, 3, prefill_rows);
            let mut by_position = Vec::new();
            for prompt in &case.prompts {
                let what = format!("{} {}", case.folder.display(), prompt.name);
                let ours = distance(&mut gpu, prompt, &mut by_position);
                let theirs = distance(&mut cpu, prompt, &mut Vec::new());
                println!("{what}: GPU {ours:.2e}, CPU {theirs:.2e}");
                assert!(
                    ours <= theirs * BF16_SHARE + BF16_FLOOR,
                    "{what}: the GPU is {ours} from float32, the CPU {theirs}"
                );
            }
            by_position.sort_by(f64::total_cmp);
            for ((which, share), theirs) in QUANTILES.into_iter().zip(case.of_transformers) {
                let ours = by_position[(share * (by_position.len() - 1) as f64) as usize];
                let what = format!(
                    "{}: {which} distance {ours:.2e}, transformers' {theirs:.2e}",
                    case.folder.display()
                );
                println!("{what}");
                assert!(ours <= theirs * f64::from(BF16_SHARE), "{what}");
            }
        }
    }
}

/// Every token, log-probability and logits hash that a slot produced.
type Trace = Vec<(TokenId, u32, u64)>;

fn drain(backend: &mut CudaBackend, traces: &mut [Trace]) {
    let mut events: Vec<TokenEvent> = Vec::new();
    while !backend.poll(&mut events).expect("steps ran") {}
    for event in events {
        let hash = event.logits_hash.expect("hashes were asked for");
        traces[event.slot.0 as usize].push((event.token, event.logprob.to_bits(), hash));
    }
}

/// Prompt `i % prompts` in slot `i`, prefilled together, decoded together.
fn generate(case: &Case, loaded: &Arc<Loaded>, n_slots: usize, prefill_rows: usize) -> Vec<Trace> {
    let mut backend = open(loaded, n_slots, prefill_rows);
    let prompt_of = |slot: usize| &case.prompts[slot % case.prompts.len()];
    let mut spans = Vec::new();
    for slot in 0..n_slots {
        map_pages(&mut backend, slot, 0);
        let tokens = &prompt_of(slot).tokens;
        spans.push(span(slot, 0, &tokens[..tokens.len() - 1]));
    }
    backend.prefill(&spans).expect("prefill runs");
    for slot in 0..n_slots {
        let prompt = prompt_of(slot);
        backend
            .start(&start(slot, prompt, prompt.greedy.len()))
            .unwrap();
    }
    let mut traces = vec![Trace::new(); n_slots];
    backend.decode(1).expect("a step");
    backend.decode(100).expect("steps");
    drain(&mut backend, &mut traces);
    traces
}

#[test]
#[ignore = "needs a GPU"]
fn rows_have_the_same_bits_in_any_chunks_and_slots() {
    for case in cases() {
        let loaded = load(&case);
        let n = case.prompts.len();
        let base = generate(&case, &loaded, n, 1);
        for (prompt, trace) in case.prompts.iter().zip(&base) {
            assert_eq!(trace.len(), prompt.greedy.len(), "{}", prompt.name);
            // What bf16 leaves of the float32 tokens.
            let n_same = trace
                .iter()
                .zip(&prompt.greedy)
                .take_while(|(a, b)| a.0 == **b)
                .count();
            println!(
                "{} {}: {n_same} of {} tokens",
                case.folder.display(),
                prompt.name,
                prompt.greedy.len()
            );
        }
        for (n_slots, prefill_rows) in [(1, 1024), (7, 7), (7, 64), (40, 64), (40, 1024)] {
            for (slot, trace) in generate(&case, &loaded, n_slots, prefill_rows)
                .iter()
                .enumerate()
            {
                assert_eq!(
                    base[slot % n],
                    *trace,
                    "{} {}: {n_slots} slots, chunks of {prefill_rows}",
                    case.folder.display(),
                    case.prompts[slot % n].name
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn scoring_gives_the_bits_of_decoding() {
    for case in cases() {
        let loaded = load(&case);
        let traces = generate(&case, &loaded, case.prompts.len(), 64);
        for (prompt, trace) in case.prompts.iter().zip(&traces) {
            let mut tokens = prompt.tokens.clone();
            tokens.extend(trace[..trace.len() - 1].iter().map(|(token, ..)| token));
            let mut backend = open(&loaded, 2, 7);
            map_pages(&mut backend, 1, 0);
            let mut hashes = Vec::new();
            let visit = &mut |position: usize, logits: &[f32]| {
                if position + 1 >= prompt.tokens.len() {
                    hashes.push(logits_hash(logits));
                }
            };
            backend
                .score(&span(1, 0, &tokens), visit)
                .expect("it scores");
            let decoded: Vec<u64> = trace.iter().map(|&(.., hash)| hash).collect();
            assert_eq!(hashes, decoded, "{} {}", case.folder.display(), prompt.name);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_shared_prefix_changes_no_bit() {
    let mut n_shared = 0;
    for case in cases() {
        let loaded = load(&case);
        let alone = generate(&case, &loaded, case.prompts.len(), 64);
        for (a, b) in (0..case.prompts.len()).zip(1..case.prompts.len()) {
            let (x, y) = (&case.prompts[a], &case.prompts[b]);
            let equal = x.tokens.iter().zip(&y.tokens).take_while(|(x, y)| x == y);
            // The last token of a prompt is a decode row.
            let shared = equal
                .count()
                .min(x.tokens.len() - 1)
                .min(y.tokens.len() - 1);
            for shared in [shared, shared / PAGE_POSITIONS * PAGE_POSITIONS] {
                if shared == 0 {
                    continue;
                }
                n_shared += 1;
                let mut backend = open(&loaded, 2, 64);
                let fork_point = 2;
                map_pages(&mut backend, fork_point, 0);
                backend
                    .prefill(&[span(fork_point, 0, &x.tokens[..shared])])
                    .expect("prefill runs");
                let whole_pages = shared / PAGE_POSITIONS;
                let page = |sequence: usize, index: usize| {
                    PageId((sequence * PAGES_A_SEQUENCE + index) as u32)
                };
                let mut spans = Vec::new();
                for (slot, prompt) in [x, y].into_iter().enumerate() {
                    for index in 0..whole_pages {
                        backend.map_page(SequenceId(slot as u32), index, page(fork_point, index));
                    }
                    map_pages(&mut backend, slot, whole_pages);
                    let tail = (page(fork_point, whole_pages), page(slot, whole_pages));
                    let fork = Fork {
                        from: SequenceId(fork_point as u32),
                        to: SequenceId(slot as u32),
                        n_positions: shared,
                        tail: (shared % PAGE_POSITIONS != 0).then_some(tail),
                    };
                    backend.fork(&fork).expect("it forks");
                    let tokens = &prompt.tokens;
                    spans.push(span(slot, shared, &tokens[shared..tokens.len() - 1]));
                }
                backend.prefill(&spans).expect("prefill runs");
                backend.start(&start(0, x, x.greedy.len())).unwrap();
                backend.start(&start(1, y, y.greedy.len())).unwrap();
                let mut traces = vec![Trace::new(); 2];
                backend.decode(100).expect("steps");
                drain(&mut backend, &mut traces);
                let name = case.folder.display();
                assert_eq!(traces[0], alone[a], "{name}: {} after {shared}", x.name);
                assert_eq!(traces[1], alone[b], "{name}: {} after {shared}", y.name);
            }
        }
    }
    assert!(n_shared >= 2, "no golden shares a prefix");
}

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

/// Fills a slot's keys and values with NaN before some calls of steps.
struct Damaging<'a> {
    inner: &'a mut CudaBackend,
    slot: SequenceId,
    /// Calls of steps before which it is done.
    at: Vec<usize>,
    n_calls: usize,
}

impl Backend for Damaging<'_> {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }

    fn map_page(&mut self, sequence: SequenceId, index: usize, page: PageId) {
        self.inner.map_page(sequence, index, page);
    }

    fn fork(&mut self, fork: &Fork) -> Result<(), EngineError> {
        self.inner.fork(fork)
    }

    fn prefill(&mut self, spans: &[Span]) -> Result<(), EngineError> {
        self.inner.prefill(spans)
    }

    fn start(&mut self, start: &SlotStart) -> Result<(), EngineError> {
        self.inner.start(start)
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        if self.at.contains(&self.n_calls) {
            self.inner.damage(self.slot)?;
        }
        self.n_calls += 1;
        self.inner.decode(n_steps)
    }

    fn poll(&mut self, events: &mut Vec<TokenEvent>) -> Result<bool, EngineError> {
        self.inner.poll(events)
    }

    fn clear(&mut self, sequences: &[SequenceId]) {
        self.inner.clear(sequences);
    }

    fn score(
        &mut self,
        span: &Span,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.inner.score(span, visit)
    }

    fn memory(&self) -> BackendMemory {
        self.inner.memory()
    }
}

/// Tokens and trace of the rows that are done, and the rows that failed.
#[derive(Default)]
struct Ended {
    done: BTreeMap<usize, (Vec<TokenId>, Option<u64>)>,
    failed: Vec<usize>,
}

impl Observer for Ended {
    fn finished(&mut self, done: Generation) {
        self.done
            .insert(done.row, (done.output_ids, done.trace_hash));
    }

    fn failed(&mut self, row: usize, _sample: u32, error: JobError) {
        println!("row {row}: {error}");
        self.failed.push(row);
    }

    fn step(&mut self, _report: &StepReport) {}
}

#[test]
#[ignore = "needs a GPU"]
fn logits_that_are_not_finite_are_tried_again_once() {
    let case = cases().into_iter().next().unwrap();
    let loaded = load(&case);
    let run = |at: Vec<usize>| {
        let mut backend = open(&loaded, 4, 64);
        let jobs = (0..8).map(|row| Job {
            row,
            sample: 0,
            prompt: case.prompts[row % case.prompts.len()]
                .tokens
                .as_slice()
                .into(),
            max_new_tokens: 12 + row,
            row_hash: row as u64,
            may_go_on: false,
        });
        let options = GenerateOptions {
            prefix_reuse: false,
            ..GenerateOptions::new(SamplingParams::default(), Arc::new([]))
        };
        let mut damaging = Damaging {
            inner: &mut backend,
            slot: SequenceId(1),
            at,
            n_calls: 0,
        };
        let mut ended = Ended::default();
        let stop = std::sync::atomic::AtomicBool::new(false);
        engine_generate(&mut damaging, jobs.collect(), &options, &stop, &mut ended).unwrap();
        ended
    };
    let whole = run(Vec::new());
    assert_eq!((whole.done.len(), whole.failed.len()), (8, 0));
    // Once: every row has what it would have had.
    let once = run(vec![2]);
    assert_eq!(once.failed, Vec::<usize>::new());
    assert_eq!(once.done, whole.done);
    // Twice the row of that slot, if it comes back there: given up, the others are not.
    let often = run(vec![0, 1, 2]);
    assert!(!often.failed.is_empty());
    assert_eq!(often.done.len() + often.failed.len(), 8);
    for (row, done) in &often.done {
        assert_eq!(whole.done[row], *done);
    }
}
