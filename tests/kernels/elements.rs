//! Operations on rows and elements: routing, RMSNorm, SwiGLU, rotary positions, embeddings.

use podium::engine::cpu::embed;
use podium::engine::cpu::lanes::LANES;
use podium::engine::cpu::path::CpuPath;
use podium::engine::cpu::rmsnorm;
use podium::engine::cpu::rope::{self, RopeTable};
use podium::engine::cpu::swiglu;
use podium::engine::cpu::topk_routing::{self, Routing};

use crate::common::{BF16, ELEMENT, assert_same_bits, buffer, config, exec, on_all_paths, vector};
use crate::support::random::Random;

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
        let scale = vector(&mut random, hidden);
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
    // Two bf16 to a word, the first in the low half.
    let halves = |row: &[f32; LANES], i: usize| {
        let bits = row[i / 2].to_bits();
        (bits >> (i % 2 * 16)) as u16
    };
    for path in CpuPath::available() {
        let (mut values, mut words) = (rows.clone(), rows.clone());
        swiglu::swiglu(path, 7.0, false, &bias, &mut values);
        swiglu::swiglu_to_bf16(path, 7.0, &bias, &mut words);
        let mut n_other = 0;
        for (values, words) in values.iter().zip(&words) {
            for (i, value) in values[..swiglu::PAIRS].iter().enumerate() {
                let (got, expected) = (halves(words, i), (value.to_bits() >> 16) as u16);
                // The other neighbour where pairs have their own way.
                let most = u16::from(path.has_pairs());
                assert!(got.abs_diff(expected) <= most, "value {i}, {path:?}");
                n_other += usize::from(got != expected);
            }
        }
        assert!(n_other * 100 <= rows.len() * swiglu::PAIRS, "{n_other}");
        let mut row = [[0.0; LANES]];
        (row[0][0], row[0][1], row[0][17]) = (-30.0, f32::NAN, 3.0);
        (row[0][2], row[0][3], row[0][19]) = (-1e6, 1e6, f32::NAN);
        swiglu::swiglu_to_bf16(path, 7.0, &[0.0; LANES], &mut row);
        let got: [f32; 4] =
            std::array::from_fn(|i| f32::from_bits(u32::from(halves(&row[0], i)) << 16));
        assert!(
            got[0] < 0.0 && got[0] > -1e-19 && got[1].is_nan(),
            "{got:?}"
        );
        assert!(got[2].abs() < 1e-19 && got[3].is_nan(), "{got:?}");
    }
    // The gate has no lower limit, NaN is kept.
    let mut row = [[0.0; LANES]];
    (row[0][0], row[0][1], row[0][17]) = (-30.0, f32::NAN, 3.0);
    swiglu::swiglu(CpuPath::PORTABLE, 7.0, true, &[0.0; LANES], &mut row);
    assert!(row[0][0] < 0.0 && row[0][0] > -1e-19 && row[0][1].is_nan());
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
