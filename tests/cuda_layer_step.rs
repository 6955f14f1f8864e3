//! `layer_step` against the kernels that it stands for, bit for bit, and many times in a row: its
//! blocks wait for each other. Run by `just test-gpu`; without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::path::Path;
use std::sync::Arc;

use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat, WeightFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cuda::CudaError;
use podium::engine::cuda::buffer::{DeviceBuffer, Plain};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::{
    Dense, ExpertBuffers, Kernels, LayerStepArgs, MatmulArgs, MoeArgs, RouteArgs,
};
use podium::engine::cuda::memory::EXCHANGE_KEYS;
use podium::engine::cuda::model::{CudaModel, Experts, Projection};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::pack;
use podium::engine::shapes;
use podium::quant::bf16;

const PADDING: u32 = u32::MAX;
/// Positions of a page, and of the tables here.
const PAGE: usize = 256;
const N_PAGES: usize = 2;

struct Random(u64);

impl Random {
    fn value(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((word ^ (word >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

fn small_config(hidden: usize, n_experts: usize, k: usize) -> ModelConfig {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": {hidden}, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": {n_experts},
        "num_experts_per_tok": {k}, "intermediate_size": 128, "vocab_size": 512,
        "sliding_window": 32, "rope_theta": 10000, "max_position_embeddings": 4096}}"#
    );
    ModelConfig::parse(text.as_bytes(), Path::new("test")).unwrap()
}

/// Two layers of the released shape.
fn two_layers() -> ModelConfig {
    let mut config = shapes::named("gpt-oss-20b").unwrap();
    config.layers.truncate(2);
    config.n_vocab = 512;
    config
}

/// A model's kernels, weights, and what a row needs beside them.
struct Bench {
    device: Arc<Device>,
    kernels: Kernels,
    model: CudaModel,
    attended: DeviceBuffer<u16>,
    residual: Vec<f32>,
    rope: DeviceBuffer<f32>,
    page_table: DeviceBuffer<u32>,
}

/// What a layer leaves behind.
struct State {
    x: DeviceBuffer<f32>,
    mid: DeviceBuffer<f32>,
    exchange: DeviceBuffer<u64>,
    t: DeviceBuffer<u16>,
    experts: DeviceBuffer<u32>,
    gates: DeviceBuffer<f32>,
    act: DeviceBuffer<u16>,
    y: DeviceBuffer<u16>,
    qkv: DeviceBuffer<u16>,
    cache: DeviceBuffer<u16>,
    rows: DeviceBuffer<u32>,
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

/// In bits: NaN is what nobody wrote.
fn words(buffer: &DeviceBuffer<f32>) -> Vec<u32> {
    download(buffer).into_iter().map(f32::to_bits).collect()
}

impl Bench {
    fn new(config: &ModelConfig, format: WeightFormat) -> Self {
        let device = Device::open(0).expect("a GPU with a driver");
        let nvrtc = Nvrtc::load().expect("NVRTC");
        let build = Build::new(config, format).unwrap();
        let kernels = Kernels::load(&device, &nvrtc, config, build).unwrap();
        let model = CudaModel::synthetic(&device, &kernels, config, format, 7).unwrap();
        let mut random = Random(3);
        let attended: Vec<u16> = (0..config.q_width())
            .map(|_| bf16::from_f32(random.value()))
            .collect();
        let rope: Vec<f32> = (0..N_PAGES * PAGE * config.head_dim)
            .map(|_| random.value())
            .collect();
        Self {
            attended: upload(&device, &attended),
            residual: (0..config.hidden).map(|_| random.value()).collect(),
            rope: upload(&device, &rope),
            page_table: upload(&device, &[1, 0]),
            device,
            kernels,
            model,
        }
    }

    fn state(&self, sequence: u32, position: usize) -> State {
        let config = &self.model.config;
        let (k, device) = (config.n_experts_per_token, &self.device);
        let unwritten = |n: usize| upload(device, &vec![0x7FFFu16; n]);
        let floats = |n: usize| upload(device, &vec![f32::NAN; n]);
        let of_page = 2 * config.n_kv_heads * PAGE * config.head_dim;
        State {
            x: upload(device, &self.residual),
            mid: floats(config.hidden),
            exchange: upload(device, &vec![0; EXCHANGE_KEYS + config.n_experts]),
            t: unwritten(config.hidden),
            experts: upload(device, &vec![77; k]),
            gates: floats(k),
            act: unwritten(k * config.intermediate),
            // Padding adds what is there.
            y: upload(device, &vec![0u16; k * config.hidden]),
            qkv: unwritten(config.qkv_width()),
            cache: unwritten(N_PAGES * of_page),
            rows: upload(device, &[sequence, position as u32, 0, 1]),
        }
    }

    fn dense(&self, projection: &Projection, x: u64) -> MatmulArgs {
        MatmulArgs {
            weights: projection.tiles.at(0),
            bias: projection.bias.as_ref().unwrap().at(0),
            x,
            n_rows: 1,
            n_out: projection.n_out as u32,
            n_k: projection.n_k as u32,
            n_tiles: pack::n_tiles(projection.n_out) as u32,
            ..MatmulArgs::default()
        }
    }

    fn expert_args(&self, experts: &Experts, state: &State, x: u64, n_out: usize) -> MoeArgs {
        let config = &self.model.config;
        MoeArgs {
            weights: experts.tiles.at(0),
            bias: experts.bias.at(0),
            x,
            act: state.act.at(0),
            y: state.y.at(0),
            offsets: 0,
            entries: state.experts.at(0),
            n_experts: config.n_experts as u32,
            k: config.n_experts_per_token as u32,
            n_k: experts.n_k as u32,
            n_tiles: pack::n_tiles(experts.n_out) as u32,
            n_out: n_out as u32,
            limit: config.swiglu_limit,
            ..MoeArgs::default()
        }
    }

    /// The first layer, then the second one's attention norm and qkv, in pages or in a ring; or the
    /// last norm.
    fn args(&self, state: &State, has_next: bool, in_pages: bool) -> LayerStepArgs {
        let (config, layers) = (&self.model.config, &self.model.layers);
        let (layer, next) = (&layers[0], &layers[1]);
        let qkv = MatmulArgs {
            qkv: state.qkv.at(0),
            rows: state.rows.at(0),
            rope: self.rope.at(0),
            cache: state.cache.at(0),
            page_table: self.page_table.at(0),
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            n_layers: 1,
            max_pages: if in_pages { N_PAGES as u32 } else { 0 },
            ring: PAGE as u32,
            ..self.dense(&next.qkv, state.t.at(0))
        };
        let norm = if has_next {
            &next.attention_norm
        } else {
            &self.model.final_norm
        };
        LayerStepArgs {
            out: MatmulArgs {
                out: state.x.at(0),
                ..self.dense(&layer.out, self.attended.at(0))
            },
            route: RouteArgs {
                x: state.mid.at(0),
                norm: layer.mlp_norm.at(0),
                t: state.t.at(0),
                weights: layer.router.at(0),
                bias: layer.router_bias.at(0),
                rows: state.rows.at(0),
                experts: state.experts.at(0),
                gates: state.gates.at(0),
                n_experts: config.n_experts as u32,
                k: config.n_experts_per_token as u32,
                n_rows: 1,
                eps: config.rms_norm_eps,
                ..RouteArgs::default()
            },
            gate_up: self.expert_args(&layer.gate_up, state, state.t.at(0), config.intermediate),
            down: self.expert_args(&layer.down, state, state.act.at(0), config.hidden),
            qkv: if has_next { qkv } else { MatmulArgs::default() },
            next_norm: norm.at(0),
            mid: state.mid.at(0),
            arrived: state.exchange.at(0),
            keys: state.exchange.at(EXCHANGE_KEYS),
            ..LayerStepArgs::default()
        }
    }

    /// The same by the separate kernels.
    fn by_parts(&self, args: &LayerStepArgs) -> Result<(), CudaError> {
        let kernels = &self.kernels;
        let (x, y, t) = (args.out.out, args.down.y, args.route.t);
        kernels.matmul(Dense::Add, &args.out)?;
        kernels.route(&RouteArgs { x, ..args.route })?;
        let buffers = ExpertBuffers {
            t: args.gate_up.x,
            act: args.gate_up.act,
            y,
            experts: args.gate_up.entries,
            ..ExpertBuffers::default()
        };
        kernels.experts(&buffers, &args.gate_up, &args.down, 1)?;
        let (gates, norm) = (args.route.gates, args.next_norm);
        kernels.moe_combine(x, y, gates, norm, t, args.route.eps, 1)?;
        match args.qkv.weights {
            0 => Ok(()),
            _ => kernels.matmul(Dense::Qkv, &args.qkv),
        }
    }

    fn check(&self, place: (u32, usize), has_next: bool, in_pages: bool, n: usize) {
        let what = format!("{place:?}, next {has_next}, pages {in_pages}, {n} times");
        let [parts, whole] = [0, 1].map(|_| self.state(place.0, place.1));
        let of_parts = self.args(&parts, has_next, in_pages);
        let of_whole = self.args(&whole, has_next, in_pages);
        // Once as they are, which loads their code.
        self.by_parts(&of_parts).unwrap();
        self.kernels.layer_step(&of_whole).unwrap();
        same(&parts, &whole, has_next, &what);
        // Each adds to the residual that the one before left.
        let [by_parts, by_whole] = [true, false].map(|parts| {
            let graph = self.device.capture(|| match parts {
                true => self.by_parts(&of_parts),
                false => self.kernels.layer_step(&of_whole),
            });
            graph.unwrap()
        });
        for _ in 0..n {
            by_parts.launch().unwrap();
            by_whole.launch().unwrap();
        }
        same(&parts, &whole, has_next, &what);
        // Several to a graph: they may begin before the one before has ended.
        let [by_parts, by_whole] = [true, false].map(|parts| {
            let graph = self.device.capture(|| {
                (0..24).try_for_each(|_| match parts {
                    true => self.by_parts(&of_parts),
                    false => self.kernels.layer_step(&of_whole),
                })
            });
            graph.unwrap()
        });
        for _ in 0..n.div_ceil(24) {
            by_parts.launch().unwrap();
            by_whole.launch().unwrap();
        }
        same(&parts, &whole, has_next, &what);
    }
}

fn same(parts: &State, whole: &State, has_next: bool, what: &str) {
    let experts = [parts, whole].map(|state| download(&state.experts));
    assert_eq!(experts[0], experts[1], "{what}: experts");
    assert_eq!(words(&parts.gates), words(&whole.gates), "{what}: gates");
    assert!(
        download(&parts.act) == download(&whole.act),
        "{what}: gate_up"
    );
    assert!(download(&parts.y) == download(&whole.y), "{what}: down");
    assert!(words(&parts.x) == words(&whole.x), "{what}: residual");
    if has_next {
        assert!(download(&parts.qkv) == download(&whole.qkv), "{what}: qkv");
        assert!(
            download(&parts.cache) == download(&whole.cache),
            "{what}: cache"
        );
    } else {
        assert!(download(&parts.t) == download(&whole.t), "{what}: t");
    }
    // All but the count that the next launch takes back.
    let exchange = download(&whole.exchange);
    assert_eq!(exchange[0], 0, "{what}: counts");
    assert!(exchange[EXCHANGE_KEYS..].iter().all(|&key| key == 0));
}

fn check(config: &ModelConfig, precision: Precision, vectors: VectorFormat, n: usize) {
    let format = precision.formats(MatrixFormat::Mxfp4, vectors);
    let bench = Bench::new(config, format);
    assert!(bench.kernels.has_layer_step(1) && !bench.kernels.has_layer_step(2));
    for (place, has_next, in_pages) in [
        ((0, 300), true, true),
        ((0, 40), true, false),
        ((0, 0), false, false),
        ((PADDING, 0), true, true),
    ] {
        bench.check(place, has_next, in_pages, n);
    }
}

const PRECISIONS: [Precision; 4] = [
    Precision::Stored,
    Precision::Bits4Dense4,
    Precision::Bits8,
    Precision::Bits16,
];

#[test]
#[ignore = "needs a GPU"]
fn layers_of_the_released_shape_have_the_same_bits() {
    for precision in PRECISIONS {
        check(&two_layers(), precision, VectorFormat::Bf16, 200);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn layers_of_small_shapes_have_the_same_bits() {
    // Fewer tiles than blocks, experts that end within a tile's half, more of them than lanes.
    for (hidden, n_experts, k) in [(64, 3, 1), (192, 5, 2), (320, 40, 3), (576, 128, 4)] {
        let config = small_config(hidden, n_experts, k);
        for precision in PRECISIONS {
            check(&config, precision, VectorFormat::F32, 20);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn blocks_never_miss_each_other() {
    check(&two_layers(), Precision::Stored, VectorFormat::Bf16, 20_000);
}
