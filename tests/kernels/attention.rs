//! Attention and the keys and values it reads: windows, sinks, borders of tiles; a row's bits alone
//! and among others.

use podium::engine::TILE_KEYS;
use podium::engine::config::ModelConfig;
use podium::engine::cpu::attention::{self, Queries, Row};
use podium::engine::cpu::kv_append;
use podium::engine::cpu::kv_cache::{KvElement, KvGeometry};
use podium::engine::cpu::lanes::LANES;
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
    // By all paths in turn.
    let paths = CpuPath::available();
    for position in 0..n_positions {
        let (k, v) = (
            random.values(geometry.head_dim),
            random.values(geometry.head_dim),
        );
        let (tile, key) = (position / TILE_KEYS, position % TILE_KEYS);
        let path = paths[position % paths.len()];
        kv_append::kv_append(path, geometry, &mut tiles[tile], key, &k, &v);
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
    let write = |index: usize, g: usize, block: usize, lanes: &[f32; LANES]| {
        let row = rows.iter().position(|row| row.index == index);
        let query = row.expect("a row of the queries") * group + g;
        let n = LANES.min(head_dim - block * LANES);
        let out = &mut out[query * head_dim + block * LANES..][..n];
        assert!(out[0].is_nan(), "each output is written once");
        out.copy_from_slice(&lanes[..n]);
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
                    by_tiles: false,
                    to_pairs: false,
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
        let sinks = vector(&mut random, 2 * group);
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
                by_tiles: false,
                to_pairs: false,
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
    let sinks = vector(&mut random, 16);
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
        by_tiles: false,
        to_pairs: false,
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
