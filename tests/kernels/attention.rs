//! Attention and the keys and values it reads: windows, sinks, borders of tiles; a row's bits alone
//! and among others.

use podium::engine::TILE_KEYS;
use podium::engine::cpu::attention::{self, Rows};
use podium::engine::cpu::kv_append;
use podium::engine::cpu::kv_cache::{KvElement, KvGeometry};
use podium::engine::cpu::path::CpuPath;

use crate::common::{PRODUCT, assert_same_bits, config, exec, on_all_paths, vector};
use crate::support::random::Random;

/// Probabilities are rounded to bf16 before they meet the values: half of 2^-8 each, averaged.
const BF16_ATTENTION: f32 = 1e-2;

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

fn check_attention<E: KvElement>(exact: bool, tolerance: f32) {
    let mut random = Random(9);
    let shape = podium::engine::EngineShape {
        n_slots: 1,
        n_forks: 0,
        n_pages: 1,
        max_context: 1024,
        prefill_rows: 1,
    };
    for (group, head_dim, window) in [(1, 32, 7), (8, 64, 128), (5, 16, 64), (2, 96, 65)] {
        let config = config(2 * group, 2, head_dim.max(16), window);
        let geometry = KvGeometry::new(&config, &shape);
        let sinks = vector(&mut random, 2 * group);
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
            for window in [None, Some(window)] {
                let rows = Rows {
                    first,
                    n_rows,
                    group,
                    q: &q,
                    q_stride: group * head_dim,
                    window,
                    sinks: &sinks,
                    first_sink: group,
                    exact,
                };
                let what = format!("rows {first}+{n_rows}, {group} x {head_dim}, {window:?}");
                let run = |path: CpuPath, rows: &Rows, fast: bool| {
                    let mut out = vec![f32::NAN; rows.n_rows * group * head_dim];
                    let mut parts: Vec<Option<&mut [f32]>> =
                        out.chunks_mut(head_dim).map(Some).collect();
                    let tile_of = |tile: usize| &tiles[tile][..];
                    let write = |row: usize, g: usize| {
                        parts[row * group + g]
                            .take()
                            .expect("each output is written once")
                    };
                    exec(path, exact, head_dim).with_scratch(|scratch| {
                        let scratch = &mut scratch.attention;
                        if fast {
                            attention::attend(path, &geometry, scratch, rows, tile_of, write);
                        } else {
                            attention::reference(path, &geometry, scratch, rows, tile_of, write);
                        }
                    });
                    out
                };
                let expected = run(CpuPath::PORTABLE, &rows, false);
                on_all_paths(&expected, tolerance, &what, |path| {
                    let all = run(path, &rows, true);
                    // One row alone gives the bits it has among the others.
                    for row in 0..n_rows {
                        let n = group * head_dim;
                        let alone = Rows {
                            first: first + row,
                            n_rows: 1,
                            q: &q[row * n..][..n],
                            ..rows
                        };
                        assert_same_bits(&run(path, &alone, true), &all[row * n..][..n], &what);
                    }
                    all
                });
            }
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
