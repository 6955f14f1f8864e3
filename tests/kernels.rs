//! Each CPU kernel against its slow `reference`, on every SIMD path this machine has, at the
//! edges of its shapes; and all paths against each other, bit for bit: products are exact ones here,
//! and of these `amx` gives the common bits as well.

use podium::engine::TILE_KEYS;
use podium::engine::config::ModelConfig;
use podium::engine::cpu::attention::{self, Queries, Row};
use podium::engine::cpu::buffer::{Buffer, Plain};
use podium::engine::cpu::gemm::Exec;
use podium::engine::cpu::kv_append;
use podium::engine::cpu::kv_cache::{KvElement, KvGeometry};
use podium::engine::cpu::matmul::{self, Epilogue, Projection};
use podium::engine::cpu::moe_combine;
use podium::engine::cpu::moe_matmul::{self, Experts};
use podium::engine::cpu::path::CpuPath;
use podium::engine::cpu::rmsnorm;
use podium::engine::cpu::rope::{self, RopeTable};
use podium::engine::cpu::swiglu;
use podium::engine::cpu::topk_routing::{self, Routing};
use podium::engine::cpu::weights::{
    Bf16Tiles, Matrix, Mxfp4Tiles, Mxint8Tiles, Tiles, Vector, pack_bf16, pack_mxfp4_block,
    pack_mxint8_block,
};
use podium::engine::cpu::{embed, lanes::LANES};
use podium::quant::{bf16, mxfp4, mxint8};

/// f32 chains of up to 416 products against f64: rounding grows with the square root of their
/// number, of terms of about 1.
const PRODUCT: f32 = 2e-5;
/// One operation or a short sum, and `exp` to 2 ulp.
const ELEMENT: f32 = 2e-6;
/// A result rounded to bf16 may fall to the other neighbour: 2^-8 of its size.
const BF16: f32 = 4e-3;
/// Probabilities are rounded to bf16 before they meet the values: half of 2^-8 each, averaged.
const BF16_ATTENTION: f32 = 1e-2;

/// SplitMix64: values that differ by position.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -1 and 1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    fn vector(&mut self, n: usize) -> Vector {
        let mut values = buffer::<u16>(n);
        values
            .iter_mut()
            .for_each(|v| *v = bf16::from_f32(self.value()));
        Vector::Bf16(values)
    }
}

fn buffer<T: Plain>(n: usize) -> Buffer<T> {
    Buffer::zeroed("a test", n).expect("memory")
}

fn exec(path: CpuPath, exact: bool, head_dim: usize) -> Exec {
    Exec::new(path, exact, 2, head_dim, 1 << 22).expect("memory")
}

/// Absolute below 1, relative above; NaN and infinity fail.
fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let mut worst = (0.0, 0);
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(a.is_finite() && b.is_finite(), "{what}: {a} for {b} at {i}");
        let error = (a - b).abs() / b.abs().max(1.0);
        if error > worst.0 {
            worst = (error, i);
        }
    }
    let (error, i) = worst;
    assert!(
        error <= tolerance,
        "{what}: {} for {} at {i}, the largest error {error}",
        got[i],
        expected[i]
    );
}

fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} for {b} at {i}");
    }
}

/// Runs `kernel` on each path, compares with `expected`, and the paths with each other.
fn on_all_paths(
    expected: &[f32],
    tolerance: f32,
    what: &str,
    mut kernel: impl FnMut(CpuPath) -> Vec<f32>,
) {
    let mut first: Option<Vec<f32>> = None;
    for path in CpuPath::available() {
        let what = format!("{what} on {}", path.name());
        let got = kernel(path);
        assert_close(&got, expected, tolerance, &what);
        match &first {
            Some(first) => assert_same_bits(&got, first, &what),
            None => first = Some(got),
        }
    }
}

fn bf16_tiles(random: &mut Random, n_tiles: usize, n_k: usize) -> Matrix {
    let mut tiles = Bf16Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let words = tiles.tile_words();
    for tile in tiles.words_mut().chunks_exact_mut(words) {
        for lane in 0..LANES {
            for k in 0..n_k {
                pack_bf16(tile, lane, k, bf16::from_f32(random.value()));
            }
        }
    }
    Matrix::Bf16(tiles)
}

/// Random weights that use the whole range of the codes, and their bf16 copies.
fn mxint8_tiles(random: &mut Random, n_tiles: usize, n_k: usize) -> [Matrix; 2] {
    let mut packed = Mxint8Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let mut wide = Bf16Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let words = wide.tile_words();
    let tiles = packed
        .bytes_mut()
        .chunks_exact_mut(Mxint8Tiles::tile_bytes(n_k));
    for (packed, wide) in tiles.zip(wide.words_mut().chunks_exact_mut(words)) {
        for lane in 0..LANES {
            for block in 0..n_k / mxint8::BLOCK {
                let scale = 124 + random.below(4) as u8;
                let codes = std::array::from_fn(|_| (random.below(255) as i16 - 127) as i8);
                pack_mxint8_block(packed, lane, block, scale, &codes);
                for (i, value) in mxint8::unpack(scale, &codes).into_iter().enumerate() {
                    let bits = bf16::from_f32(value);
                    assert_eq!(
                        bf16::to_f32(bits),
                        value,
                        "an MXINT8 value is exact in bf16"
                    );
                    pack_bf16(wide, lane, block * mxint8::BLOCK + i, bits);
                }
            }
        }
    }
    [Matrix::Mxint8(packed), Matrix::Bf16(wide)]
}

/// The same random weights in all three formats, MXFP4 first.
fn mxfp4_tiles(random: &mut Random, n_tiles: usize, n_k: usize) -> [Matrix; 3] {
    let mut packed = Mxfp4Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let mut eight = Mxint8Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let mut wide = Bf16Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
    let words = wide.tile_words();
    let packed_tiles = packed
        .bytes_mut()
        .chunks_exact_mut(Mxfp4Tiles::tile_bytes(n_k));
    let eight_tiles = eight
        .bytes_mut()
        .chunks_exact_mut(Mxint8Tiles::tile_bytes(n_k));
    let wide_tiles = wide.words_mut().chunks_exact_mut(words);
    for ((packed, eight), wide) in packed_tiles.zip(eight_tiles).zip(wide_tiles) {
        for lane in 0..LANES {
            for block in 0..n_k / mxfp4::BLOCK {
                let scale = 122 + random.below(4) as u8;
                let codes: [u8; 16] = std::array::from_fn(|_| random.next() as u8);
                pack_mxfp4_block(packed, lane, block, scale, &codes);
                let (scale_8, codes_8) = mxint8::from_mxfp4(scale, &codes);
                pack_mxint8_block(eight, lane, block, scale_8, &codes_8);
                for (i, value) in mxfp4::unpack(scale, &codes).into_iter().enumerate() {
                    pack_bf16(wide, lane, block * mxfp4::BLOCK + i, bf16::from_f32(value));
                }
            }
        }
    }
    [
        Matrix::Mxfp4(packed),
        Matrix::Mxint8(eight),
        Matrix::Bf16(wide),
    ]
}

#[test]
fn tiles_unpack_to_what_was_packed() {
    let mut random = Random(1);
    let of_mxfp4 = mxfp4_tiles(&mut random, 3, 160);
    let of_mxint8 = mxint8_tiles(&mut random, 3, 160);
    for formats in [&of_mxfp4[..], &of_mxint8[..]] {
        for path in CpuPath::available() {
            for tile in 0..3 {
                let unpacked = formats.iter().map(|matrix| {
                    let mut values = vec![f32::NAN; 64 * LANES];
                    matrix.unpack(path, tile, 96, 64, &mut values);
                    for (i, value) in values.iter().enumerate() {
                        let (lane, k) = (i % LANES, 96 + i / LANES);
                        assert_eq!(value.to_bits(), matrix.get(tile, lane, k).to_bits());
                    }
                    // An integer has one zero: its sign may be lost, no other bit.
                    values.iter().map(|value| value + 0.0).collect()
                });
                let unpacked: Vec<Vec<f32>> = unpacked.collect();
                for other in &unpacked[1..] {
                    assert_same_bits(other, &unpacked[0], path.name());
                }
            }
        }
    }
}

#[test]
fn matmul_in_every_format() {
    let mut random = Random(2);
    for (n_rows, n_k, n_out) in [
        (1, 32, 1usize),
        (1, 416, 32),
        (2, 96, 33),
        (12, 128, 100),
        (13, 160, 64),
        (97, 256, 31),
        (130, 64, 288),
    ] {
        let n_tiles = n_out.div_ceil(LANES);
        let matrices = [bf16_tiles(&mut random, n_tiles, n_k)]
            .into_iter()
            .chain(mxint8_tiles(&mut random, n_tiles, n_k))
            .chain(mxfp4_tiles(&mut random, n_tiles, n_k));
        for tiles in matrices {
            let format = tiles.format().name();
            let weights = Projection {
                n_out,
                tiles,
                bias: (n_out != 33).then(|| random.vector(n_out)),
            };
            let x = random.values(n_rows * n_k);
            let before = random.values(n_rows * n_out);
            for into in [Epilogue::Store, Epilogue::Add] {
                let portable = exec(CpuPath::PORTABLE, true, 32);
                let mut expected = before.clone();
                matmul::reference(&portable, &weights, 0, &x, n_rows, into, &mut expected);
                let what = format!("{format}, {n_rows} x {n_k} x {n_out}, {into:?}");
                on_all_paths(&expected, PRODUCT, &what, |path| {
                    let mut out = before.clone();
                    let exec = exec(path, true, 32);
                    matmul::matmul(&exec, &weights, 0, &x, n_rows, into, &mut out);
                    let calls = exec.calls.by_name();
                    assert_eq!(calls.get(&format!("matmul_{format}")), Some(&1));
                    out
                });
            }
        }
    }
}

#[test]
fn a_row_of_a_product_does_not_depend_on_its_mates() {
    let mut random = Random(3);
    let (n_rows, n_k, n_out) = (107, 288, 96);
    let weights = Projection {
        n_out,
        tiles: bf16_tiles(&mut random, n_out / LANES, n_k),
        bias: Some(random.vector(n_out)),
    };
    let x = random.values(n_rows * n_k);
    for path in CpuPath::available() {
        let exec = exec(path, true, 32);
        let mut all = vec![0.0; n_rows * n_out];
        matmul::matmul(&exec, &weights, 0, &x, n_rows, Epilogue::Store, &mut all);
        for n in [1, 5, 13] {
            for first in [0, 40, n_rows - n] {
                let mut some = vec![0.0; n * n_out];
                let x = &x[first * n_k..(first + n) * n_k];
                matmul::matmul(&exec, &weights, 0, x, n, Epilogue::Store, &mut some);
                assert_same_bits(&some, &all[first * n_out..][..n * n_out], path.name());
            }
        }
    }
}

/// Router logits that send rows where `choice` says.
fn routing(
    n_rows: usize,
    n_experts: usize,
    k: usize,
    choice: &str,
    random: &mut Random,
) -> Routing {
    let mut logits = random.values(n_rows * n_experts);
    for row in logits.chunks_exact_mut(n_experts) {
        match choice {
            "spread" => {}
            "one idle" => row[1] = -9.0,
            "all on one" => row[n_experts - 1] = 9.0,
            other => unreachable!("{other}"),
        }
    }
    let mut routing = Routing::new(n_experts, k, n_rows).expect("memory");
    topk_routing::route(CpuPath::PORTABLE, &logits, n_rows, &mut routing);
    routing
}

#[test]
fn moe_matmul() {
    let mut random = Random(4);
    let (n_experts, hidden, intermediate) = (5, 96, 160);
    let copy = |vector: &Vector| {
        let mut values = buffer::<f32>(vector.len());
        (0..vector.len()).for_each(|i| values[i] = vector.get(i));
        Vector::F32(values)
    };
    let gate_up = mxfp4_tiles(&mut random, n_experts * intermediate / 16, hidden);
    let down = mxfp4_tiles(&mut random, n_experts * hidden / LANES, intermediate);
    let gate_up_bias = random.vector(n_experts * 2 * intermediate);
    let down_bias = random.vector(n_experts * hidden);
    let mut formats = gate_up
        .into_iter()
        .zip(down)
        .map(|(gate_up, down)| Experts {
            n_experts,
            gate_up,
            gate_up_bias: copy(&gate_up_bias),
            down,
            down_bias: copy(&down_bias),
        });
    let experts = formats.next().expect("MXFP4 comes first");
    let copies: Vec<Experts> = formats.collect();
    let limit = 1.5;
    for (n_rows, k, choice) in [
        (1, 1, "spread"),
        (1, 4, "spread"),
        (13, 2, "one idle"),
        (70, 4, "all on one"),
        (150, 1, "all on one"),
    ] {
        let routing = routing(n_rows, n_experts, k, choice, &mut random);
        let x = random.values(n_rows * hidden);
        let what = format!("{n_rows} rows, {k} experts a row, {choice}");
        let portable = exec(CpuPath::PORTABLE, true, 32);
        let mut act = vec![f32::NAN; n_rows * k * intermediate];
        moe_matmul::gate_up_reference(&portable, &experts, &routing, limit, &x, &mut act);
        on_all_paths(&act, PRODUCT, &format!("gate-up, {what}"), |path| {
            let exec = exec(path, true, 32);
            let mut out = vec![f32::NAN; act.len()];
            moe_matmul::gate_up(&exec, &experts, &routing, limit, &x, &mut out);
            for copy in &copies {
                let mut of_copy = vec![f32::NAN; act.len()];
                moe_matmul::gate_up(&exec, copy, &routing, limit, &x, &mut of_copy);
                assert_same_bits(&of_copy, &out, copy.gate_up.format().name());
            }
            out
        });
        let mut y = vec![f32::NAN; n_rows * k * hidden];
        moe_matmul::down_reference(&portable, &experts, &routing, &act, &mut y);
        on_all_paths(&y, PRODUCT, &format!("down, {what}"), |path| {
            let exec = exec(path, true, 32);
            let mut out = vec![f32::NAN; y.len()];
            moe_matmul::down(&exec, &experts, &routing, &act, &mut out);
            for copy in &copies {
                let mut of_copy = vec![f32::NAN; y.len()];
                moe_matmul::down(&exec, copy, &routing, &act, &mut of_copy);
                assert_same_bits(&of_copy, &out, copy.down.format().name());
            }
            out
        });
        let before = random.values(n_rows * hidden);
        let mut expected = before.clone();
        moe_combine::reference(CpuPath::PORTABLE, &routing, hidden, &y, &mut expected);
        on_all_paths(&expected, ELEMENT, &format!("combine, {what}"), |path| {
            let mut out = before.clone();
            moe_combine::moe_combine(path, &routing, hidden, &y, &mut out);
            out
        });
    }
}

#[test]
fn topk_routing() {
    let mut random = Random(5);
    for (n_experts, k) in [(1, 1), (4, 4), (32, 4), (128, 8)] {
        // Few distinct values, so that there are ties.
        let logits: Vec<f32> = (0..50 * n_experts)
            .map(|_| random.below(9) as f32 / 4.0)
            .collect();
        let mut expected = Routing::new(n_experts, k, 50).expect("memory");
        topk_routing::reference(CpuPath::PORTABLE, &logits, 50, &mut expected);
        let what = format!("{k} of {n_experts}");
        on_all_paths(&expected.weights, ELEMENT, &what, |path| {
            let mut got = Routing::new(n_experts, k, 50).expect("memory");
            topk_routing::route(path, &logits, 50, &mut got);
            assert_eq!(got.experts[..], expected.experts[..], "{what}");
            let mut n_entries = 0;
            for expert in 0..n_experts {
                let entries = got.of_expert(expert);
                assert!(entries.is_sorted());
                assert!(
                    entries
                        .iter()
                        .all(|&e| got.experts[e as usize] == expert as u32)
                );
                n_entries += entries.len();
            }
            assert_eq!(n_entries, 50 * k, "every entry belongs to one expert");
            for weights in got.weights.chunks(k) {
                assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
            got.weights.to_vec()
        });
    }
}

#[test]
fn rmsnorm() {
    let mut random = Random(6);
    for (n_rows, hidden) in [(1, 32), (3, 96), (20, 2880)] {
        let scale = random.vector(hidden);
        for size in [1.0, 1e-4] {
            let x: Vec<f32> = random
                .values(n_rows * hidden)
                .iter()
                .map(|x| x * size)
                .collect();
            for (exact, tolerance) in [(true, ELEMENT), (false, BF16)] {
                let mut expected = vec![0.0; x.len()];
                let portable = exec(CpuPath::PORTABLE, exact, 32);
                rmsnorm::reference(&portable, &scale, 1e-5, &x, n_rows, &mut expected);
                on_all_paths(
                    &expected,
                    tolerance,
                    &format!("{n_rows} x {hidden}"),
                    |path| {
                        let mut out = vec![f32::NAN; x.len()];
                        rmsnorm::rmsnorm(
                            &exec(path, exact, 32),
                            &scale,
                            1e-5,
                            &x,
                            n_rows,
                            &mut out,
                        );
                        out
                    },
                );
            }
        }
    }
}

#[test]
fn swiglu_clamps_and_joins() {
    let mut random = Random(7);
    let bias: [f32; LANES] = std::array::from_fn(|_| random.value());
    let rows: Vec<[f32; LANES]> = (0..37)
        .map(|_| std::array::from_fn(|_| 20.0 * random.value()))
        .collect();
    let joined = |rows: Vec<[f32; LANES]>| -> Vec<f32> {
        rows.iter()
            .flat_map(|row| row[..swiglu::PAIRS].to_vec())
            .collect()
    };
    for (exact, tolerance) in [(true, ELEMENT), (false, BF16)] {
        let mut expected = rows.clone();
        swiglu::reference(CpuPath::PORTABLE, 7.0, exact, &bias, &mut expected);
        on_all_paths(&joined(expected), tolerance, "swiglu", |path| {
            let mut got = rows.clone();
            swiglu::swiglu(path, 7.0, exact, &bias, &mut got);
            joined(got)
        });
    }
    // The gate has no lower limit, NaN is kept.
    let mut row = [[0.0; LANES]];
    (row[0][0], row[0][1], row[0][17]) = (-30.0, f32::NAN, 3.0);
    swiglu::swiglu(CpuPath::PORTABLE, 7.0, true, &[0.0; LANES], &mut row);
    assert!(row[0][0] < 0.0 && row[0][0] > -1e-19 && row[0][1].is_nan());
}

fn config(n_heads: usize, n_kv_heads: usize, head_dim: usize, window: usize) -> ModelConfig {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": {n_heads},
        "num_key_value_heads": {n_kv_heads}, "head_dim": {head_dim}, "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 50,
        "sliding_window": {window}, "rope_theta": 10000, "max_position_embeddings": 4096,
        "rope_scaling": {{"rope_type": "yarn", "factor": 8.0,
        "original_max_position_embeddings": 64, "truncate": false}}}}"#
    );
    ModelConfig::parse(text.as_bytes(), std::path::Path::new("test")).expect("valid")
}

#[test]
fn rope() {
    let mut random = Random(8);
    let config = config(4, 2, 48, 16);
    let table = RopeTable::new(&config, 300).expect("memory");
    let positions: Vec<u32> = (0..40).map(|_| random.below(300) as u32).collect();
    let row_len = config.qkv_width();
    let before = random.values(positions.len() * row_len);
    for (exact, tolerance) in [(true, ELEMENT), (false, BF16)] {
        for heads in [0..6, 4..6] {
            let mut expected = before.clone();
            let portable = exec(CpuPath::PORTABLE, exact, 48);
            rope::reference(
                &portable,
                &table,
                &positions,
                heads.clone(),
                row_len,
                &mut expected,
            );
            on_all_paths(&expected, tolerance, "rope", |path| {
                let mut qkv = before.clone();
                let exec = exec(path, exact, 48);
                rope::rope(&exec, &table, &positions, heads.clone(), row_len, &mut qkv);
                qkv
            });
        }
    }
}

#[test]
fn embed() {
    let mut table = buffer::<u16>(50 * 64);
    table
        .iter_mut()
        .enumerate()
        .for_each(|(i, v)| *v = i as u16);
    let tokens: Vec<u32> = (0..70).map(|i| i * 7 % 50).collect();
    let (mut got, mut expected) = (vec![0.0; 70 * 64], vec![1.0; 70 * 64]);
    embed::embed(&table, 64, &tokens, &mut got);
    embed::reference(&table, 64, &tokens, &mut expected);
    assert_same_bits(&got, &expected, "embed");
}

/// A sequence's keys and values as a list of tiles; what is not written is NaN.
fn cache<E: KvElement>(
    geometry: &KvGeometry,
    n_positions: usize,
    random: &mut Random,
) -> Vec<Vec<E>> {
    let n_tiles = n_positions.div_ceil(TILE_KEYS);
    let mut tiles = vec![vec![E::POISON; geometry.tile_len()]; n_tiles];
    let mut slow = tiles.clone();
    for position in 0..n_positions {
        let (k, v) = (
            random.values(geometry.head_dim),
            random.values(geometry.head_dim),
        );
        let (tile, key) = (position / TILE_KEYS, position % TILE_KEYS);
        kv_append::kv_append(geometry, &mut tiles[tile], key, &k, &v);
        kv_append::reference(geometry, &mut slow[tile], key, &k, &v);
    }
    let bits = |tiles: &[Vec<E>]| -> Vec<u32> {
        let mut scratch = vec![0.0; geometry.tile_len()];
        let mut of = |tile: &Vec<E>| -> Vec<u32> {
            E::as_f32(tile, &mut scratch)
                .iter()
                .map(|x| x.to_bits())
                .collect()
        };
        tiles.iter().flat_map(&mut of).collect()
    };
    assert_eq!(bits(&tiles), bits(&slow), "append");
    tiles
}

/// Attends by the fast way or by the reference; the output of each row, in the order of `queries.rows`.
fn attended<'t, E: KvElement>(
    path: CpuPath,
    geometry: &KvGeometry,
    queries: &Queries,
    tile_of: impl Fn(usize, usize) -> &'t [E],
    is_fast: bool,
) -> Vec<f32> {
    let Queries { rows, group, .. } = *queries;
    let head_dim = geometry.head_dim;
    let mut out = vec![f32::NAN; rows.len() * group * head_dim];
    let mut parts: Vec<Option<&mut [f32]>> = out.chunks_mut(head_dim).map(Some).collect();
    let write = |index: usize, g: usize| {
        let row = rows.iter().position(|row| row.index == index);
        let part = &mut parts[row.expect("a row of the queries") * group + g];
        part.take().expect("each output is written once")
    };
    exec(path, queries.exact, head_dim).with_scratch(|scratch| {
        let scratch = &mut scratch.attention;
        if is_fast {
            attention::attend(path, geometry, scratch, queries, tile_of, write);
        } else {
            attention::reference(path, geometry, scratch, queries, tile_of, write);
        }
    });
    out
}

/// Holds the rows together against the reference, and each alone against its bits among them.
fn check_rows<'t, E: KvElement>(
    geometry: &KvGeometry,
    queries: &Queries,
    tile_of: impl Fn(usize, usize) -> &'t [E],
    tolerance: f32,
    what: &str,
) {
    let expected = attended(CpuPath::PORTABLE, geometry, queries, &tile_of, false);
    on_all_paths(&expected, tolerance, what, |path| {
        let all = attended(path, geometry, queries, &tile_of, true);
        for (i, row) in queries.rows.iter().enumerate() {
            let alone = Queries {
                rows: &[*row],
                ..*queries
            };
            let alone = attended(path, geometry, &alone, &tile_of, true);
            assert_same_bits(&alone, &all[i * alone.len()..][..alone.len()], what);
        }
        all
    });
}

fn geometry(config: &ModelConfig) -> KvGeometry {
    let shape = podium::engine::EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: 1,
        max_context: 2048,
        prefill_rows: 1,
    };
    KvGeometry::new(config, &shape)
}

fn check_attention<E: KvElement>(exact: bool, tolerance: f32) {
    let mut random = Random(9);
    for (group, head_dim, window) in [(1, 32, 7), (8, 64, 128), (5, 16, 64), (2, 96, 65)] {
        let config = config(2 * group, 2, head_dim.max(16), window);
        let geometry = geometry(&config);
        let sinks = random.vector(2 * group);
        let most = 64 / group;
        for (first, n_rows) in [
            (0, 1),
            (0, most.min(9)),
            (62, most.min(4)),
            (63, 1),
            (255, most.min(3)),
            (256, 1),
            (700, most.min(7)),
        ] {
            let tiles = cache::<E>(&geometry, first + n_rows, &mut random);
            let q = random.values(n_rows * group * head_dim);
            let q: Vec<f32> = q.iter().map(|q| 3.0 * q).collect();
            let rows: Vec<Row> = (0..n_rows)
                .map(|index| Row {
                    index,
                    sequence: 0,
                    position: first + index,
                })
                .collect();
            for window in [None, Some(window)] {
                let queries = Queries {
                    rows: &rows,
                    group,
                    q: &q,
                    q_stride: group * head_dim,
                    window,
                    sinks: &sinks,
                    first_sink: group,
                    exact,
                };
                let what = format!("rows {first}+{n_rows}, {group} x {head_dim}, {window:?}");
                let tile_of = |_, tile: usize| &tiles[tile][..];
                check_rows(&geometry, &queries, tile_of, tolerance, &what);
            }
        }
    }
}

/// Rows of several sequences: each the pages of its table, by position.
fn check_shared_pages<E: KvElement>(exact: bool, tolerance: f32) {
    const A: &[usize] = &[0, 1, 2];
    let groups: [&[(&[usize], usize)]; 8] = [
        // One page, and two, and the row that follows at once.
        &[(&[0, 1], 300), (&[0, 2], 256)],
        &[(&[0, 1, 2], 512), (&[0, 1, 3], 700)],
        // Some share more than others, and one has nothing of its own to read first.
        &[
            (&[0], 255),
            (&[0, 1, 2, 4], 770),
            (&[0, 1, 2, 5], 1023),
            (&[0, 1, 3], 515),
            (&[0, 6], 400),
        ],
        // Within the shared page still, in order and out of it, in the tile and before it.
        &[(A, 517), (A, 518), (A, 640), (A, 641), (A, 767)],
        &[(A, 641), (A, 517), (&[0, 3], 257), (A, 64), (&[0, 1], 511)],
        &[(&[0], 3), (&[0], 70), (&[0, 1], 300), (&[0, 2], 290)],
        // Nothing is shared, or not from the beginning.
        &[(&[0, 1], 400), (&[2, 3], 500), (&[4, 3], 270)],
        // As many as go together: several rows of a sequence among them.
        &[
            (&[0, 1, 2], 600),
            (&[0, 1, 2], 601),
            (&[0, 1, 3], 513),
            (&[0, 1, 4, 5], 900),
            (&[0, 1, 6], 514),
            (&[0, 1, 7], 767),
            (&[0, 1, 8], 520),
            (&[0, 1, 9], 570),
        ],
    ];
    let mut random = Random(10);
    for (group, head_dim) in [(8, 64), (5, 16), (1, 32)] {
        let config = config(2 * group, 2, head_dim, 128);
        let geometry = geometry(&config);
        let sinks = random.vector(2 * group);
        for (i, of_group) in groups.into_iter().enumerate() {
            // Written as far as a row of the group sees; the rest is NaN.
            let n_seen = |page: usize| {
                let ends = of_group.iter().flat_map(|&(pages, position)| {
                    let places = pages.iter().enumerate();
                    places.map(move |(place, &of_row)| {
                        let end = (position + 1).saturating_sub(256 * place).min(256);
                        if of_row == page { end } else { 0 }
                    })
                });
                ends.max().unwrap_or(0)
            };
            let pages: Vec<_> = (0..10)
                .map(|page| cache::<E>(&geometry, n_seen(page), &mut random))
                .collect();
            // Outputs and queries lie apart, in another order.
            let n_rows = of_group.len();
            let q = random.values((n_rows + 1) * (group * head_dim + 3));
            let q: Vec<f32> = q.iter().map(|q| 3.0 * q).collect();
            let rows: Vec<Row> = (0..n_rows)
                .map(|sequence| Row {
                    index: n_rows - sequence,
                    sequence,
                    position: of_group[sequence].1,
                })
                .collect();
            let queries = Queries {
                rows: &rows,
                group,
                q: &q,
                q_stride: group * head_dim + 3,
                window: None,
                sinks: &sinks,
                first_sink: group,
                exact,
            };
            let tile_of =
                |sequence: usize, tile: usize| &pages[of_group[sequence].0[tile / 4]][tile % 4][..];
            let what = format!("group {i}, {group} x {head_dim}");
            check_rows(&geometry, &queries, tile_of, tolerance, &what);
        }
    }
}

#[test]
fn attention_exact() {
    check_attention::<f32>(true, PRODUCT);
}

#[test]
fn attention_bf16() {
    check_attention::<u16>(false, BF16_ATTENTION);
}

#[test]
fn attention_of_shared_pages_exact() {
    check_shared_pages::<f32>(true, PRODUCT);
}

#[test]
fn attention_of_shared_pages_bf16() {
    check_shared_pages::<u16>(false, BF16_ATTENTION);
}

#[test]
fn a_shared_page_is_read_for_one_row_alone() {
    let mut random = Random(11);
    let config = config(16, 2, 64, 128);
    let geometry = geometry(&config);
    let sinks = random.vector(16);
    let pages: Vec<_> = (0..3)
        .map(|_| cache::<u16>(&geometry, 256, &mut random))
        .collect();
    let tables = [[0, 1], [0, 2]];
    let rows = [0, 1].map(|sequence| Row {
        index: sequence,
        sequence,
        position: 511,
    });
    let q = random.values(2 * 8 * 64);
    let queries = Queries {
        rows: &rows,
        group: 8,
        q: &q,
        q_stride: 8 * 64,
        window: None,
        sinks: &sinks,
        first_sink: 0,
        exact: false,
    };
    let asked = std::cell::RefCell::new(std::collections::BTreeSet::new());
    let tile_of = |sequence: usize, tile: usize| {
        asked.borrow_mut().insert((sequence, tile));
        &pages[tables[sequence][tile / 4]][tile % 4][..]
    };
    attended(CpuPath::PORTABLE, &geometry, &queries, tile_of, true);
    // The second row's first tile is looked at to see whose it is.
    let expected = (0..8).map(|tile| (0, tile));
    let expected = expected.chain([0, 4, 5, 6, 7].map(|tile| (1, tile)));
    assert!(asked.into_inner().into_iter().eq(expected));
}
