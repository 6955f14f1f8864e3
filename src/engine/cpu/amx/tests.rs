//! The driver against plain loops, bit for bit: with the CPU's own unit where there is one
//! ([`super::multiply`] takes that then), and with its emulation everywhere. The instruction against its
//! emulation.

#![allow(clippy::print_stderr, reason = "a test that cannot run says so")]

use super::super::gemm::{self, RowSets};
use super::super::matmul::{self, Epilogue, Projection};
use super::super::moe_matmul::{self, Experts};
use super::super::rmsnorm;
use super::super::swiglu::{self, PAIRS};
use super::super::topk_routing::{self, Routing};
use super::super::weights::tests::{ByValues, Random, formats};
use super::super::weights::{Matrix, Vector};
use super::emulated::Emulated;
use super::*;
use crate::engine::cpu::buffer::Buffer;
use crate::quant::bf16;

/// As in `tests/kernels/common.rs`: of chains of some hundred products of about 1.
const PRODUCT: f32 = 2e-5;

const LIMIT: f32 = 1.5;

/// With the CPU's own unit, or its emulation where there is none.
fn exec() -> Exec {
    Exec::new(CpuPath::tiles(), false, 2, 32, 1 << 22).expect("memory")
}

fn values(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| bf16::round(random.value())).collect()
}

fn vector(random: &mut Random, n: usize) -> Vector {
    let mut values = Buffer::zeroed("a test", n).expect("memory");
    values.iter_mut().for_each(|v| *v = random.value());
    Vector::F32(values)
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0_f32.copysign(x)
    } else {
        x
    }
}

/// One output, as the instruction sums it.
fn model(weights: &Matrix, tile: usize, lane: usize, x: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    for step in (0..x.len()).step_by(32) {
        let [even, odd] = [0, 1].map(|first| {
            let ks = (step + first..step + 32).step_by(2);
            ks.fold(0.0f32, |sum, k| {
                flush(x[k].mul_add(weights.get(tile, lane, k), sum))
            })
        });
        sum = flush(sum + flush(even + odd));
    }
    sum
}

#[track_caller]
fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} for {b} at {i}");
    }
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        let error = (a - b).abs() / b.abs().max(1.0);
        assert!(error <= PRODUCT, "{what}: {a} for {b} at {i}");
    }
}

fn multiplied(exec: &Exec, weights: &Projection, x: &[f32], n_rows: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n_rows * weights.n_out];
    matmul::matmul(
        exec,
        weights,
        0,
        gemm::Rows::Values(x),
        n_rows,
        Epilogue::Store,
        &mut out,
    );
    out
}

#[test]
fn amx_rows_of_all_counts_are_the_models_sums() {
    let exec = exec();
    let mut random = Random(21);
    for (n_rows, n_k, n_tiles) in [
        (1usize, 32, 1),
        (1, 2880, 2),
        (15, 96, 3),
        (16, 224, 2),
        (17, 192, 3),
        (32, 416, 2),
        (33, 96, 3),
        (96, 2880, 1),
        (97, 416, 3),
        (97, 32, 2),
        (230, 96, 5),
        // Several groups of rows.
        (257, 96, 2),
        (600, 64, 5),
        (400, 4096, 1),
    ] {
        let x = values(&mut random, n_rows * n_k);
        let mut expected = Vec::new();
        for tiles in formats(&mut random, n_tiles, n_k) {
            let name = tiles.format().name();
            let weights = Projection {
                n_out: n_tiles * LANES - 3,
                tiles,
                bias: None,
            };
            let what = format!("{name}, {n_rows} rows x {n_k} x {n_tiles} tiles");
            let got = multiplied(&exec, &weights, &x, n_rows);
            if expected.is_empty() {
                for row in 0..n_rows {
                    let x = &x[row * n_k..][..n_k];
                    let sum = |o| model(&weights.tiles, o / LANES, o % LANES, x);
                    expected.extend((0..weights.n_out).map(sum));
                }
                let mut close = vec![0.0; got.len()];
                let into = Epilogue::Store;
                matmul::reference(&exec, &weights, 0, &x, n_rows, into, &mut close);
                // Errors grow with the square root of the number of products.
                if n_k < 1000 {
                    assert_close(&got, &close, &what);
                }
            }
            assert_same_bits(&got, &expected, &what);
        }
    }
}

#[test]
fn amx_row_does_not_depend_on_its_mates() {
    let exec = exec();
    let mut random = Random(22);
    let (n_rows, n_k, n_tiles) = (275, 288, 3);
    let x = values(&mut random, n_rows * n_k);
    for tiles in formats(&mut random, n_tiles, n_k) {
        let weights = Projection {
            n_out: n_tiles * LANES,
            tiles,
            bias: None,
        };
        let all = multiplied(&exec, &weights, &x, n_rows);
        for n in [1, 5, 16, 17, 31, 33, 96, 257] {
            for first in [0, 40, n_rows - n] {
                let first = first.min(n_rows - n);
                let some = multiplied(&exec, &weights, &x[first * n_k..][..n * n_k], n);
                let expected = &all[first * weights.n_out..][..n * weights.n_out];
                assert_same_bits(&some, expected, "some rows");
            }
        }
        // Neighbours that are no numbers, in the same block and behind it.
        for row in [0, 40, 96, 144, n_rows - 1] {
            let mut among = vec![f32::NAN; n_rows * n_k];
            among[row * n_k..][..n_k].copy_from_slice(&x[row * n_k..][..n_k]);
            let got = multiplied(&exec, &weights, &among, n_rows);
            let row = row * weights.n_out..(row + 1) * weights.n_out;
            assert_same_bits(&got[row.clone()], &all[row], "among NaN");
        }
    }
}

/// Sums as rows `[rows][n_out]` of a set.
struct AsRows<'a> {
    out: &'a mut [f32],
    n_out: usize,
}

impl Output for AsRows<'_> {
    fn prefetch(&self, _: usize, _: Range<usize>) {}

    fn take(&mut self, tile: usize, first: usize, sums: &mut [[f32; LANES]]) {
        for (i, lanes) in sums.iter().enumerate() {
            let start = (first + i) * self.n_out + tile * LANES;
            self.out[start..start + LANES].copy_from_slice(lanes);
        }
    }
}

/// Products of `n_rows` rows in sets of `a_set`, by the emulated unit.
fn emulated<W: Tiles>(
    exec: &Exec,
    weights: &W,
    x: &[f32],
    n_rows: usize,
    a_set: usize,
) -> Vec<f32> {
    let n_k = weights.n_k();
    let offsets: Vec<u32> = (0..n_rows + a_set)
        .step_by(a_set)
        .map(|row| row.min(n_rows) as u32)
        .collect();
    let sets = RowSets {
        n_k,
        offsets: &offsets,
        start: &|row| row * n_k,
    };
    let mut blocks = vec![0; n_rows * n_k / 2 + SLACK];
    join(exec.path, x, &sets, &mut blocks);
    let n_out = weights.n_tiles() * LANES;
    let mut out = vec![f32::NAN; n_rows * n_out];
    for set in 0..sets.n_sets() {
        let rows = sets.of_set(set);
        let base = rows.start;
        let product = Product {
            path: exec.path,
            weights,
            tiles: 0..weights.n_tiles(),
            blocks: &blocks,
            rows,
            next: sets.of_next(set),
        };
        exec.with_scratch(|scratch| {
            let output = AsRows {
                out: &mut out[base * n_out..],
                n_out,
            };
            product.multiply_by::<Emulated, false>(scratch, output);
        });
    }
    out
}

#[test]
fn amx_driver_gives_the_models_sums_on_any_cpu() {
    let path = *CpuPath::available().last().expect("at least one");
    let exec = Exec::new(path, false, 1, 32, 0).expect("memory");
    let mut random = Random(25);
    // Runs of all lengths, tiles behind tiles, and blocks up to several groups.
    for (n_rows, a_set, n_k, n_tiles) in [
        (1, 1, 32, 1),
        (3, 2, 64, 5),
        (16, 16, 192, 2),
        (17, 17, 224, 3),
        (40, 16, 416, 2),
        (97, 97, 96, 4),
        (200, 130, 256, 1),
        (700, 600, 96, 2),
    ] {
        let x = values(&mut random, n_rows * n_k);
        let matrices = formats(&mut random, n_tiles, n_k);
        let n_out = n_tiles * LANES;
        let of_row = |row: usize| {
            let x = &x[row * n_k..][..n_k];
            (0..n_out).map(|o| model(&matrices[0], o / LANES, o % LANES, x))
        };
        let expected: Vec<f32> = (0..n_rows).flat_map(of_row).collect();
        for matrix in &matrices {
            let name = matrix.format().name();
            let what = format!("{name}, {n_rows} rows x {n_k} x {n_tiles} tiles");
            let got = emulated(&exec, &ByValues(matrix), &x, n_rows, a_set);
            assert_same_bits(&got, &expected, &what);
            if matrix.packed_pairs(0).is_some() {
                let got = emulated(&exec, matrix, &x, n_rows, a_set);
                assert_same_bits(&got, &expected, &what);
            }
        }
    }
}

#[test]
fn amx_places_are_where_rows_are_joined() {
    // Values that bf16 holds: their numbers in the upper half.
    let (n_k, n_rows) = (96, 450);
    let number = |row: usize, k: usize| (row * n_k + k) as u32 + 1;
    let x: Vec<f32> = (0..n_rows * n_k)
        .map(|i| f32::from_bits(number(i / n_k, i % n_k) << 16))
        .collect();
    let offsets = [0u32, 0, 1, 18, 50, 146, 450];
    let rows = RowSets {
        n_k,
        offsets: &offsets,
        start: &|row| row * n_k,
    };
    let mut blocks = vec![0; n_rows * n_k / 2 + SLACK];
    join(CpuPath::PORTABLE, &x, &rows, &mut blocks);
    let mut n_seen = 0;
    for set in 0..rows.n_sets() {
        let set = rows.of_set(set);
        let a_group = group_rows(set.len(), n_k);
        for group in set.clone().step_by(a_group) {
            let end = set.end.min(group + a_group);
            let a_block = block_rows(end - group);
            for first in (group..end).step_by(a_block) {
                let n = a_block.min(end - first);
                for (row, k) in (0..n).flat_map(|row| [0, 16, 32, 48, 64, 80].map(|k| (row, k))) {
                    let start = start_of(first, n, n_k, k) + row * STEP_PAIRS;
                    for pair in 0..8 {
                        let word = blocks[start + pair];
                        let [even, odd] = [0, 1].map(|i| number(first + row, k + 2 * pair + i));
                        assert_eq!(word, even | odd << 16, "row {row} of {first}, k {k}");
                    }
                    n_seen += 16;
                }
            }
        }
    }
    assert_eq!(n_seen, n_rows * n_k);
}

/// Experts in three formats of the same values.
fn experts(random: &mut Random, n: usize, hidden: usize, intermediate: usize) -> Vec<Experts> {
    let gate_up = formats(random, n * intermediate / 16, hidden);
    let down = formats(random, n * hidden / LANES, intermediate);
    let biases = (random.0, n * 2 * intermediate, n * hidden);
    gate_up
        .into_iter()
        .zip(down)
        .map(|(gate_up, down)| {
            let mut random = Random(biases.0);
            Experts {
                n_experts: n,
                gate_up,
                gate_up_bias: vector(&mut random, biases.1),
                down,
                down_bias: vector(&mut random, biases.2),
            }
        })
        .collect()
}

/// Rows of entries in the blocks of their experts, with the slack behind them.
fn joined_act(exec: &Exec, routing: &Routing, intermediate: usize, act: &[f32]) -> Vec<f32> {
    assert!(exec.in_blocks(), "products of tiles");
    let rows = RowSets {
        n_k: intermediate,
        offsets: routing.offsets(),
        start: &|i| routing.entries()[i] as usize * intermediate,
    };
    let mut blocks = vec![0; act.len() / 2 + SLACK];
    join(exec.path, act, &rows, &mut blocks);
    blocks.into_iter().map(f32::from_bits).collect()
}

#[test]
fn amx_scattered_experts_are_the_models_sums() {
    let exec = exec();
    let mut random = Random(23);
    let (n_experts, hidden, intermediate) = (7, 224, 160);
    let of_formats = experts(&mut random, n_experts, hidden, intermediate);
    for (n_rows, k) in [(1usize, 1usize), (1, 4), (3, 2), (60, 4), (150, 3)] {
        let mut logits: Vec<f32> = (0..n_rows * n_experts).map(|_| random.value()).collect();
        for row in logits.chunks_exact_mut(n_experts) {
            // One expert has no row, another almost all.
            row[2] = -9.0;
            row[5] += 1.0;
        }
        let mut routing = Routing::new(n_experts, k, n_rows).expect("memory");
        topk_routing::route(exec.path, &logits, n_rows, &mut routing);
        let x = values(&mut random, n_rows * hidden);
        let act = values(&mut random, n_rows * k * intermediate);
        let base = &of_formats[0];
        let mut expected_act = vec![f32::NAN; act.len()];
        let mut expected_y = vec![f32::NAN; n_rows * k * hidden];
        for entry in 0..n_rows * k {
            let expert = routing.experts[entry] as usize;
            let x = &x[entry / k * hidden..][..hidden];
            for tile in 0..intermediate / PAIRS {
                let at = expert * intermediate / PAIRS + tile;
                let bias = base.gate_up_bias.lanes::<LANES>(at * LANES);
                let rows = &mut [std::array::from_fn(|lane| {
                    model(&base.gate_up, at, lane, x)
                })];
                swiglu::swiglu_to_bf16(exec.path, LIMIT, &bias, rows);
                let act = &mut expected_act[entry * intermediate + tile * PAIRS..][..PAIRS];
                for (pair, act) in rows[0].iter().zip(act.as_chunks_mut().0) {
                    let bits = pair.to_bits();
                    *act = [bits << 16, bits & 0xFFFF_0000].map(f32::from_bits);
                }
            }
            let act = &act[entry * intermediate..][..intermediate];
            for o in 0..hidden {
                let at = expert * hidden + o;
                let sum = model(&base.down, at / LANES, at % LANES, act);
                expected_y[entry * hidden + o] = sum + base.down_bias.get(at);
            }
        }
        for experts in &of_formats {
            let what = format!("{}, {n_rows} rows x {k}", experts.down.format().name());
            let mut got = vec![f32::NAN; act.len() + SLACK];
            moe_matmul::gate_up(
                &exec,
                experts,
                &routing,
                LIMIT,
                gemm::Rows::Values(&x),
                &mut got,
            );
            let joined = joined_act(&exec, &routing, intermediate, &expected_act);
            let n = act.len() / 2;
            assert_same_bits(&got[..n], &joined[..n], &what);
            let blocks = in_blocks(exec.path, &x, n_rows, hidden);
            let x = gemm::Rows::Blocks(&blocks, n_rows);
            let mut got = vec![f32::NAN; act.len() + SLACK];
            moe_matmul::gate_up(&exec, experts, &routing, LIMIT, x, &mut got);
            assert_same_bits(&got[..n], &joined[..n], &what);
            let mut got = vec![f32::NAN; expected_y.len()];
            let joined = joined_act(&exec, &routing, intermediate, &act);
            moe_matmul::down(&exec, experts, &routing, &joined, &mut got);
            assert_same_bits(&got, &expected_y, &what);
        }
        let mut close = vec![f32::NAN; expected_y.len()];
        moe_matmul::down_reference(&exec, base, &routing, &act, &mut close);
        assert_close(&expected_y, &close, "down");
    }
}

/// The words of a set of rows in blocks, the slack behind them.
fn in_blocks(path: CpuPath, x: &[f32], n_rows: usize, n_k: usize) -> Vec<u32> {
    let rows = RowSets {
        n_k,
        offsets: &[0, n_rows as u32],
        start: &|row| row * n_k,
    };
    let mut blocks = vec![u32::MAX; x.len() / 2 + SLACK];
    join(path, x, &rows, &mut blocks);
    blocks
}

#[test]
fn rows_gathered_from_blocks_are_those_joined_from_values() {
    let mut random = Random(28);
    for path in CpuPath::available() {
        for (n_rows, n_k) in [
            (1usize, 32usize),
            (3, 2880),
            (17, 544),
            (100, 96),
            (230, 64),
        ] {
            let x = values(&mut random, n_rows * n_k);
            let of_rows = in_blocks(path, &x, n_rows, n_k);
            // Each row several times, in sets of which one is empty and one has several groups.
            let n = 3 * n_rows;
            let chosen: Vec<usize> = (0..n).map(|_| random.next() as usize % n_rows).collect();
            let offsets = [0, n / 7, n / 7, n - n / 9, n].map(|offset| offset as u32);
            let rows = RowSets {
                n_k,
                offsets: &offsets,
                start: &|i| chosen[i] * n_k,
            };
            let [mut expected, mut got] = [(); 2].map(|()| vec![u32::MAX; n * n_k / 2]);
            join(path, &x, &rows, &mut expected);
            gather(path, &of_rows, n_rows, &rows, &mut got);
            assert!(got == expected, "{n_rows} rows x {n_k} on {path:?}");
        }
    }
}

#[test]
fn rows_normed_to_blocks_are_those_normed_and_joined() {
    let mut random = Random(29);
    for path in CpuPath::available() {
        for (n_rows, hidden) in [(1usize, 32usize), (16, 96), (20, 2880), (115, 64)] {
            let exec = Exec::new(path, false, 2, 32, 0).expect("memory");
            let x = values(&mut random, n_rows * hidden);
            let mut scale = Buffer::zeroed("a test", hidden).expect("memory");
            scale.iter_mut().for_each(|scale| *scale = random.value());
            let scale = Vector::F32(scale);
            let mut normed = vec![f32::NAN; x.len()];
            rmsnorm::rmsnorm(&exec, &scale, 1e-5, &x, n_rows, &mut normed);
            let expected = in_blocks(path, &normed, n_rows, hidden);
            let mut got = vec![u32::MAX; expected.len()];
            rmsnorm::rmsnorm_to_blocks(&exec, &scale, 1e-5, &x, n_rows, &mut got);
            assert!(got == expected, "{n_rows} rows x {hidden} on {path:?}");
        }
    }
}

/// bf16 in pairs and f32 sums over powers of two `low..low + n`, some subnormal and some 0.
struct Wide<'a> {
    random: &'a mut Random,
    low: u32,
    n: u32,
}

impl Wide<'_> {
    fn bits(&mut self) -> u32 {
        let word = self.random.next();
        let (sign, mantissa) = ((word as u32 & 1) << 31, (word >> 8) as u32 & 0x7F_FFFF);
        match word >> 40 & 31 {
            0 => sign,
            1 => sign | mantissa,
            _ => sign | (self.low + (word >> 48) as u32 % self.n) << 23 | mantissa,
        }
    }

    fn pair(&mut self) -> u32 {
        self.bits() >> 16 | self.bits() & 0xFFFF_0000
    }
}

#[test]
fn amx_instruction_is_its_emulation() {
    if !is_available() {
        eprintln!("not run: this CPU has no AMX");
        return;
    }
    const STEPS: usize = 3;
    let mut random = Random(24);
    // Sums of about 1; of all sizes; those that fall below the smallest number; those that overflow.
    for (low, n) in [(117, 20), (87, 80), (1, 130), (50, 30), (1, 254), (170, 84)] {
        for round in 0..200usize {
            let n_rows = 1 + round % 16;
            let mut wide = Wide {
                random: &mut random,
                low,
                n,
            };
            let pairs: [[u32; STEP_WORDS]; STEPS] =
                std::array::from_fn(|_| std::array::from_fn(|_| wide.pair()));
            let rows: [[u32; 16 * STEP_PAIRS]; STEPS] =
                std::array::from_fn(|_| std::array::from_fn(|_| wide.pair()));
            let sums: [[f32; LANES]; 16] =
                std::array::from_fn(|_| std::array::from_fn(|_| f32::from_bits(wide.bits())));
            for (is_first, passing) in [(false, false), (true, false), (false, true)] {
                let start = (!is_first).then_some(&sums[..]);
                let got = products::<unit::Hardware>(n_rows, &rows, &pairs, start, passing);
                let expected = products::<Emulated>(n_rows, &rows, &pairs, start, passing);
                for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
                    let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                    assert!(
                        same,
                        "{a:e} for {b:e} ({:08x}, {:08x}) at {i}, powers from {low}, {n_rows} rows",
                        a.to_bits(),
                        b.to_bits()
                    );
                }
            }
        }
    }
}

/// Sums after some steps, from `start` on or from zeros.
fn products<U: TileUnit>(
    n_rows: usize,
    rows: &[[u32; 16 * STEP_PAIRS]],
    pairs: &[[u32; STEP_WORDS]],
    start: Option<&[[f32; LANES]]>,
    passing: bool,
) -> Vec<f32> {
    let unit = U::set(n_rows);
    match start {
        Some(sums) => unit.load(sums),
        None => unit.clear(),
    }
    let (rows, a_step) = (rows.as_flattened(), 16 * STEP_PAIRS);
    for (step, pairs) in pairs.iter().enumerate() {
        let rows = &rows[step * a_step..];
        if !passing {
            unit.multiply_step(rows, pairs);
            continue;
        }
        unit.take_rows::<true>(rows);
        unit.take_pairs::<0>(pairs);
        unit.multiply::<0>();
        unit.take_pairs::<1>(pairs);
        unit.multiply::<1>();
    }
    let mut sums = vec![[f32::NAN; LANES]; n_rows];
    unit.store(&mut sums);
    sums.into_flattened()
}
