//! Weights in every format on a GPU: products on MXFP4, MXINT8 and bf16 copies of the same values
//! have the same bits, and models under each policy are those of the CPU. Run by `just test-gpu`;
//! without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use podium::engine::checkpoint::{Checkpoint, MatrixFormat, Precision, VectorFormat, WeightFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cpu::{CpuBackend, CpuOptions};
use podium::engine::cuda::buffer::{DeviceBuffer, Plain};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::{Dense, Kernels, MatmulArgs};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::pack::{self, NeedsWide, RowOrder};
use podium::engine::cuda::variants;
use podium::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use podium::engine::sample::logits_hash;
use podium::engine::{Backend, EngineShape, PAGE_POSITIONS, PageId, SequenceId, Span, TokenId};
use podium::quant::{bf16, mxint8};
use support::random::Random;
use support::root;

/// Sums of bf16 products in f32, of the sum of their magnitudes.
const PRODUCT: f64 = 1e-4;
/// One rounding to bf16.
const ROUNDED: f64 = 8e-3;
/// How much further from the exact run than the CPU's the GPU's may be, and what both may differ
/// by where the CPU's happens to be exact.
const BF16_SHARE: f64 = 1.5;
const BF16_FLOOR: f64 = 4e-3;

const FORMATS: [MatrixFormat; 3] = [
    MatrixFormat::Mxfp4,
    MatrixFormat::Mxint8,
    MatrixFormat::Bf16,
];

fn small_config() -> ModelConfig {
    let text = r#"{"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 500,
        "sliding_window": 32, "rope_theta": 10000, "max_position_embeddings": 4096}"#;
    ModelConfig::parse(text.as_bytes(), Path::new("test")).unwrap()
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

/// Codes and scale bytes of a matrix, all of a row under scales near each other.
#[derive(Clone, Copy, Debug)]
struct Values {
    format: MatrixFormat,
    first_scale: u8,
    last_scale: u8,
    /// What is multiplied is so many powers of two larger: products stay normal numbers.
    x_exponent: i32,
    wide: bool,
}

/// The smallest scales, those of models and the greatest, as the narrow form holds them and as
/// the wide one does.
const VALUES: [Values; 11] = {
    const fn values(
        format: MatrixFormat,
        [first_scale, last_scale]: [u8; 2],
        x_exponent: i32,
        wide: bool,
    ) -> Values {
        Values {
            format,
            first_scale,
            last_scale,
            x_exponent,
            wide,
        }
    }
    let [mxfp4, mxint8] = [MatrixFormat::Mxfp4, MatrixFormat::Mxint8];
    [
        values(mxfp4, [2, 40], 60, false),
        values(mxfp4, [100, 128], 0, false),
        values(mxfp4, [2, 40], 60, true),
        values(mxfp4, [118, 140], 0, true),
        values(mxfp4, [230, 252], -60, true),
        values(mxint8, [1, 30], 40, false),
        values(mxint8, [100, 133], 0, false),
        values(mxint8, [230, 253], -60, false),
        values(mxint8, [1, 30], 40, true),
        values(mxint8, [100, 133], 0, true),
        values(mxint8, [230, 254], -60, true),
    ]
};

/// A matrix of 32-blocks in any format that holds them.
struct Matrix {
    n_out: usize,
    n_k: usize,
    mxfp4: Option<Vec<(u8, [u8; 16])>>,
    mxint8: Vec<(u8, [i8; 32])>,
    values: Vec<f32>,
}

impl Matrix {
    fn new(random: &mut Random, of: &Values, n_out: usize, n_k: usize) -> Self {
        let n_scales = usize::from(of.last_scale - of.first_scale) + 1;
        let mut four = Vec::new();
        let mut eight = Vec::new();
        for row in 0..n_out {
            let scale = of.first_scale + (row % n_scales) as u8;
            for _ in 0..n_k / 32 {
                match of.format {
                    MatrixFormat::Mxfp4 => {
                        let codes = std::array::from_fn(|_| random.word() as u8);
                        four.push((scale, codes));
                        eight.push(mxint8::from_mxfp4(scale, &codes));
                    }
                    _ => {
                        let code = |word: u64| (word % 255) as i16 - 127;
                        let codes = std::array::from_fn(|_| code(random.word()) as i8);
                        eight.push((scale, codes));
                    }
                }
            }
        }
        let values = eight
            .iter()
            .flat_map(|(scale, codes)| mxint8::unpack(*scale, codes));
        Self {
            n_out,
            n_k,
            values: values.collect(),
            mxfp4: (of.format == MatrixFormat::Mxfp4).then_some(four),
            mxint8: eight,
        }
    }

    /// Its tiles in a format; nothing where that does not hold them.
    fn tiles(&self, format: MatrixFormat, order: RowOrder, wide: bool) -> Option<Vec<u8>> {
        let (n_out, n_k) = (self.n_out, self.n_k);
        let at = |row: usize, block: usize| row * n_k / 32 + block;
        let mut tiles = vec![0; pack::matrix_bytes(format, n_out, n_k)];
        match format {
            MatrixFormat::Mxfp4 => {
                let blocks = self.mxfp4.as_ref()?;
                let block = |row, i| Ok(blocks[at(row, i)]);
                pack::mxfp4::<NeedsWide>(&mut tiles, n_out, n_k, order, wide, block).unwrap();
            }
            MatrixFormat::Mxint8 => {
                let block = |row, i| Ok(self.mxint8[at(row, i)]);
                pack::mxint8::<NeedsWide>(&mut tiles, n_out, n_k, order, wide, block).unwrap();
            }
            MatrixFormat::Bf16 => {
                let value = |row: usize, k: usize| bf16::from_f32(self.values[row * n_k + k]);
                pack::bf16(&mut tiles, n_out, n_k, order, value);
            }
        }
        Some(tiles)
    }
}

/// The kernels for this GPU, and those of a GPU without warpgroup instructions.
fn both_kernels(device: &Arc<Device>, dense: MatrixFormat, wide: bool) -> [Kernels; 2] {
    let config = small_config();
    let format = WeightFormat {
        experts: MatrixFormat::Mxfp4,
        attention: dense,
        lm_head: dense,
        vectors: VectorFormat::Bf16,
    };
    let mut build = Build::new(&config, format).unwrap();
    build.wide_scales = wide;
    let nvrtc = Nvrtc::load().expect("NVRTC");
    [true, false].map(|warpgroups| {
        build.warpgroups = warpgroups;
        Kernels::load(device, &nvrtc, &config, build).unwrap()
    })
}

/// A dense product by one variant; the outputs of `Qkv` without rotation, widened from bf16.
fn product(
    device: &Arc<Device>,
    kernels: &Kernels,
    (which, variant): (Dense, usize),
    (tiles, x): (&DeviceBuffer<u8>, &DeviceBuffer<u16>),
    (n_out, n_k, n_rows): (usize, usize, usize),
) -> Vec<f32> {
    const HEAD_DIM: usize = 64;
    let out: DeviceBuffer<f32> = device.alloc("out", n_rows * n_out).unwrap();
    // What `Add` adds to; the others overwrite it all.
    out.fill(0, out.len(), if which == Dense::Add { 0 } else { 0xFF })
        .unwrap();
    let qkv: DeviceBuffer<u16> = device.alloc("qkv", n_rows * n_out).unwrap();
    qkv.fill(0, qkv.len(), 0xFF).unwrap();
    let bias = upload(device, &vec![0u16; n_out]);
    // Sequence, position and segment; all at position 0, where nothing turns.
    let rows: Vec<u32> = (0..n_rows as u32)
        .flat_map(|row| [row, 0, row, row + 1])
        .collect();
    let rows = upload(device, &rows);
    let (cos, sin) = ([1.0f32; HEAD_DIM / 2], [0.0f32; HEAD_DIM / 2]);
    let rope = upload(device, &[cos, sin].concat());
    let n_exchanged = variants::exchange_len(n_out, n_rows);
    let exchange: DeviceBuffer<f32> = device.alloc("sums", n_exchanged).unwrap();
    exchange.fill(0, n_exchanged, 0xFF).unwrap();
    let n_heads = n_out / HEAD_DIM;
    let args = MatmulArgs {
        weights: tiles.at(0),
        bias: bias.at(0),
        x: x.at(0),
        out: out.at(0),
        qkv: qkv.at(0),
        rows: rows.at(0),
        rope: rope.at(0),
        exchange: exchange.at(0),
        n_rows: n_rows as u32,
        n_out: n_out as u32,
        n_k: n_k as u32,
        n_tiles: pack::n_tiles(n_out) as u32,
        n_heads: n_heads.saturating_sub(2) as u32,
        n_kv_heads: 1,
        ..MatmulArgs::default()
    };
    kernels.matmul_variant(which, variant, &args).unwrap();
    match which {
        Dense::Qkv => download(&qkv).into_iter().map(bf16::to_f32).collect(),
        _ => download(&out),
    }
}

#[test]
#[ignore = "needs a GPU"]
fn dense_products_of_copies_have_the_same_bits() {
    let device = Device::open(0).expect("a GPU with a driver");
    let kernels =
        FORMATS.map(|format| [false, true].map(|wide| both_kernels(&device, format, wide)));
    let mut random = Random(7);
    for of in &VALUES {
        for (n_out, n_k, n_rows) in [
            (68, 96, 1),
            (68, 96, 9),
            (200, 160, 65),
            (256, 64, 33),
            (136, 96, 129),
            (576, 2880, 130),
        ] {
            let matrix = Matrix::new(&mut random, of, n_out, n_k);
            let x: Vec<u16> = (0..n_rows * n_k)
                .map(|_| {
                    let value = random.value();
                    bf16::from_f32(value * 2f32.powi(of.x_exponent))
                })
                .collect();
            let x_f64: Vec<f64> = x
                .iter()
                .map(|&bits| f64::from(bf16::to_f32(bits)))
                .collect();
            let mut expected = Vec::with_capacity(n_rows * n_out);
            for x in x_f64.chunks_exact(n_k) {
                for w in matrix.values.chunks_exact(n_k) {
                    let products = x.iter().zip(w).map(|(x, &w)| x * f64::from(w));
                    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                        (sum + product, size + product.abs())
                    });
                    expected.push((sum, size));
                }
            }
            let x = upload(&device, &x);
            for which in [Dense::Logits, Dense::Add, Dense::Qkv] {
                let (order, tolerance) = match which {
                    Dense::Qkv if n_out % 64 != 0 => continue,
                    Dense::Qkv => (RowOrder::Rotary { head_dim: 64 }, ROUNDED),
                    _ => (RowOrder::Natural, PRODUCT),
                };
                let mut first: Option<Vec<f32>> = None;
                for (format, kernels) in FORMATS.iter().zip(&kernels) {
                    let Some(tiles) = matrix.tiles(*format, order, of.wide) else {
                        continue;
                    };
                    let tiles = upload(&device, &tiles);
                    for kernels in &kernels[usize::from(of.wide)] {
                        for variant in 0..kernels.n_dense(which) {
                            let name = kernels.dense_name(which, variant);
                            let what = format!(
                                "{which:?} of {n_out} x {n_k}, {n_rows} rows, {of:?} in {}, \
                                 variant {name}",
                                format.name()
                            );
                            let shape = (n_out, n_k, n_rows);
                            let inputs = (&tiles, &x);
                            let got = product(&device, kernels, (which, variant), inputs, shape);
                            let first = first.get_or_insert_with(|| got.clone());
                            for (i, (got, (sum, size))) in got.iter().zip(&expected).enumerate() {
                                let error = (f64::from(*got) - sum).abs();
                                assert!(
                                    error <= tolerance * size,
                                    "{what}, element {i}: {got} for {sum}"
                                );
                                assert_eq!(
                                    got.to_bits(),
                                    first[i].to_bits(),
                                    "{what}, element {i}: {got} and {}",
                                    first[i]
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Longest prompt and continuation of the goldens, with room.
const MAX_CONTEXT: usize = 768;

fn shape() -> EngineShape {
    EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: MAX_CONTEXT / PAGE_POSITIONS,
        max_context: MAX_CONTEXT,
        prefill_rows: 64,
    }
}

/// Logits of every position of a row.
fn score(backend: &mut dyn Backend, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    let sequence = SequenceId(0);
    for index in 0..MAX_CONTEXT / PAGE_POSITIONS {
        backend.map_page(sequence, index, PageId(index as u32));
    }
    let span = Span {
        sequence,
        start: 0,
        tokens: tokens.into(),
    };
    let mut rows = Vec::new();
    let visit = &mut |_: usize, logits: &[f32]| rows.push(logits.to_vec());
    backend.score(&span, visit).expect("it scores");
    backend.clear(&[sequence]);
    rows
}

fn on_gpu(loaded: Loaded) -> CudaBackend {
    let options = CudaOptions {
        trace_hash: true,
        poison: true,
    };
    CudaBackend::new(Arc::new(loaded), shape(), options).unwrap()
}

fn on_cpu(checkpoint: &Checkpoint, precision: Precision, exact: bool) -> CpuBackend {
    let options = CpuOptions {
        n_threads: 2,
        exact,
        trace_hash: false,
        poison: false,
    };
    CpuBackend::open(checkpoint, precision, shape(), options).unwrap()
}

/// The rows of a golden.
fn rows(folder: &Path) -> Vec<Vec<TokenId>> {
    let input = std::fs::read_to_string(folder.join("input.jsonl")).unwrap();
    let of_line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let tokens = line["tokens"].as_array().unwrap();
        tokens
            .iter()
            .map(|t| t.as_u64().unwrap() as TokenId)
            .collect()
    };
    input.lines().map(of_line).collect()
}

fn golden(name: &str) -> PathBuf {
    root().join("tests/golden/logits").join(name)
}

/// Largest distance of each position's logits.
fn distances(a: &[Vec<f32>], b: &[Vec<f32>]) -> Vec<f64> {
    let of_row = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let distances = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
        distances.fold(0.0, f64::max)
    };
    a.iter().zip(b).map(of_row).collect()
}

fn best(logits: &[f32]) -> usize {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0
}

#[test]
#[ignore = "needs a GPU"]
fn every_policy_is_that_of_the_cpu() {
    for name in ["plain", "bf16"] {
        let folder = golden(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let rows = rows(&folder);
        let mut hashes = BTreeMap::new();
        for precision in Precision::POLICIES {
            let what = format!("{name} in {}", precision.name());
            let loaded = Loaded::open(&checkpoint, precision, 0).expect("a GPU");
            assert_eq!(loaded.model.format, checkpoint.weight_format(precision));
            let mut gpu = on_gpu(loaded);
            let mut cpu = on_cpu(&checkpoint, precision, false);
            let mut exact = on_cpu(&checkpoint, precision, true);
            let mut hash = Vec::new();
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            let (mut n_same, mut n) = (0, 0);
            for tokens in &rows {
                let on_gpu = score(&mut gpu, tokens);
                let on_cpu = score(&mut cpu, tokens);
                let exact = score(&mut exact, tokens);
                hash.extend(on_gpu.iter().map(|logits| logits_hash(logits)));
                let of_row = distances(&on_gpu, &exact);
                let same = |(a, b): &(&Vec<f32>, &Vec<f32>)| best(a) == best(b);
                n_same += on_gpu.iter().zip(&on_cpu).filter(same).count();
                n += on_gpu.len();
                ours.extend(of_row);
                theirs.extend(distances(&on_cpu, &exact));
            }
            ours.sort_by(f64::total_cmp);
            theirs.sort_by(f64::total_cmp);
            // Others where two are nearly equal, or rounding chose other experts.
            println!("{what}: {n_same} of {n} tokens are the CPU's");
            assert!(n_same * 100 >= n * 95, "{what}: {n_same} of {n}");
            // The largest distances are those where rounding chose other experts.
            for share in [0.5, 0.75, 0.9] {
                let at = |of: &[f64]| of[(share * (of.len() - 1) as f64) as usize];
                let (ours, theirs) = (at(&ours), at(&theirs));
                println!("{what}, {share}: GPU {ours:.2e}, CPU {theirs:.2e}");
                assert!(
                    ours <= theirs * BF16_SHARE + BF16_FLOOR,
                    "{what}, {share}: the GPU is {ours} from the exact run, the CPU {theirs}"
                );
            }
            let calls: Vec<String> = gpu.kernel_calls().into_keys().collect();
            let format = checkpoint.weight_format(precision);
            for (prefix, format) in [
                ("moe_matmul_", format.experts),
                ("matmul_", format.attention),
            ] {
                let products = calls.iter().filter_map(|name| name.strip_prefix(prefix));
                let mut products = products.peekable();
                assert!(products.peek().is_some(), "{what}: {calls:?}");
                for product in products {
                    assert!(product.starts_with(format.name()), "{what}: {product}");
                }
            }
            hashes.insert(precision.name(), hash);
        }
        if checkpoint.weight_format(Precision::Stored).experts == MatrixFormat::Mxfp4 {
            // Copies of the experts, the dense parts alike.
            for (a, b) in [
                ("4bit", "experts8"),
                ("4bit", "16bit"),
                ("8bit", "4bit-dense8"),
            ] {
                assert_eq!(hashes[a], hashes[b], "{name}: {a} and {b}");
            }
        }
        assert_ne!(hashes["4bit"], hashes["4bit-dense8"], "{name}");
        assert_ne!(hashes["4bit-dense8"], hashes["4bit-dense4"], "{name}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn random_weights_are_lively_in_every_format() {
    let config = small_config();
    let tokens: Vec<TokenId> = (0..100).map(|i| i * 37 % 500).collect();
    for precision in Precision::POLICIES {
        let format = precision.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
        let loaded = Loaded::synthetic(&config, format, 5, 0).expect("a GPU");
        let rows = score(&mut on_gpu(loaded), &tokens);
        let mut chosen: Vec<usize> = rows.iter().map(|logits| best(logits)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let values = rows.iter().flatten().map(|&logit| f64::from(logit));
        let size = (values.map(|x| x * x).sum::<f64>() / (rows.len() * 500) as f64).sqrt();
        println!(
            "{}: size {size:.2}, {} tokens",
            precision.name(),
            chosen.len()
        );
        // The lm head doubles a normed row.
        assert!((1.0..4.0).contains(&size), "{}: {size}", precision.name());
        assert!(chosen.len() > 20, "{}: {chosen:?}", precision.name());
    }
}
