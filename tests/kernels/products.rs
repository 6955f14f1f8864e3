//! Products on packed weights: tiles unpack to what was packed, and dense and experts' products of
//! every format have the same bits on the same values.

use podium::engine::cpu::gemm::Rows;
use podium::engine::cpu::lanes::LANES;
use podium::engine::cpu::matmul::{self, Epilogue, Projection};
use podium::engine::cpu::moe_combine;
use podium::engine::cpu::moe_matmul::{self, Experts};
use podium::engine::cpu::path::CpuPath;
use podium::engine::cpu::topk_routing::{self, Routing};
use podium::engine::cpu::weights::{
    Bf16Tiles, Matrix, Mxfp4Tiles, Mxint8Tiles, Tiles, Vector, pack_bf16, pack_mxfp4_block,
    pack_mxint8_block,
};
use podium::quant::{bf16, mxfp4, mxint8};

use crate::common::{ELEMENT, PRODUCT, assert_same_bits, buffer, exec, on_all_paths, vector};
use crate::support::random::Random;

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
                let codes: [u8; 16] = std::array::from_fn(|_| random.word() as u8);
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
                bias: (n_out != 33).then(|| vector(&mut random, n_out)),
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
                    matmul::matmul(&exec, &weights, 0, Rows::Values(&x), n_rows, into, &mut out);
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
    let mut projection = |tiles| Projection {
        n_out,
        tiles,
        bias: Some(vector(&mut random, n_out)),
    };
    let wide = projection(bf16_tiles(&mut Random(4), n_out / LANES, n_k));
    let [narrow, ..] = mxfp4_tiles(&mut Random(5), n_out / LANES, n_k).map(projection);
    let mut x = random.values(n_rows * n_k);
    for value in &mut x {
        *value = bf16::round(*value);
    }
    let kinds = CpuPath::available()
        .into_iter()
        .flat_map(|path| [(path, true), (path, false)])
        .flat_map(|(path, exact)| [(path, exact, &wide), (path, exact, &narrow)]);
    for (path, exact, weights) in kinds {
        let exec = exec(path, exact, 32);
        let mut all = vec![0.0; n_rows * n_out];
        matmul::matmul(
            &exec,
            weights,
            0,
            Rows::Values(&x),
            n_rows,
            Epilogue::Store,
            &mut all,
        );
        for n in 1..=13 {
            for first in [0, 40, n_rows - n] {
                let mut some = vec![0.0; n * n_out];
                let x = &x[first * n_k..(first + n) * n_k];
                matmul::matmul(
                    &exec,
                    weights,
                    0,
                    Rows::Values(x),
                    n,
                    Epilogue::Store,
                    &mut some,
                );
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
    let gate_up_bias = vector(&mut random, n_experts * 2 * intermediate);
    let down_bias = vector(&mut random, n_experts * hidden);
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
            moe_matmul::gate_up(&exec, &experts, &routing, limit, Rows::Values(&x), &mut out);
            for copy in &copies {
                let mut of_copy = vec![f32::NAN; act.len()];
                moe_matmul::gate_up(&exec, copy, &routing, limit, Rows::Values(&x), &mut of_copy);
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
