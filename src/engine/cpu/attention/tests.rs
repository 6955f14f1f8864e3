//! Attention by the tile unit, or its emulation: against the reference, and a row's bits alone and among
//! others. The other ways are in `tests/kernels`.

use super::*;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::gemm::Exec;
use crate::engine::cpu::kv_append::kv_append;
use crate::engine::cpu::weights::tests::Random;

/// Probabilities and results are rounded to bf16.
const TOLERANCE: f32 = 1e-2;

const GROUP: usize = 4;

fn geometry(head_dim: usize, window: usize) -> KvGeometry {
    KvGeometry {
        n_kv_heads: 2,
        head_dim,
        padded_head_dim: head_dim.next_multiple_of(LANES),
        n_full_layers: 1,
        n_sliding_layers: 1,
        window,
        ring_tiles: window.div_ceil(TILE_KEYS) + 1,
        n_pages: 1,
        n_sequences: 1,
    }
}

fn bf16_values(random: &mut Random, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| bf16::round(size * random.value())).collect()
}

/// The tiles of a sequence; what is not written is no number.
fn cache(geometry: &KvGeometry, n_positions: usize, random: &mut Random) -> Vec<Vec<u16>> {
    let n_tiles = n_positions.div_ceil(TILE_KEYS);
    let mut tiles = vec![vec![0x7FC0; geometry.tile_len()]; n_tiles];
    for position in 0..n_positions {
        let [k, v] = [(); 2].map(|()| bf16_values(random, geometry.head_dim, 1.0));
        let tile = &mut tiles[position / TILE_KEYS];
        kv_append(
            CpuPath::PORTABLE,
            geometry,
            tile,
            position % TILE_KEYS,
            &k,
            &v,
        );
    }
    tiles
}

fn attended<'t>(
    geometry: &KvGeometry,
    queries: &Queries,
    tile_of: impl Fn(usize, usize) -> &'t [u16],
    is_reference: bool,
) -> Vec<f32> {
    let path = CpuPath::available().pop().expect("a path");
    let exec = Exec::new(path, false, 1, geometry.head_dim, 0).expect("memory");
    let n = queries.rows.len() * GROUP * geometry.head_dim;
    let mut out = vec![f32::NAN; n];
    let write = |index: usize, g: usize, block: usize, lanes: &[f32; LANES]| {
        let row = queries.rows.iter().position(|row| row.index == index);
        let query = row.expect("a row of the queries") * GROUP + g;
        let out = &mut out[query * geometry.head_dim + block * LANES..][..LANES];
        assert!(out[0].is_nan(), "each output is written once");
        match queries.to_pairs && !is_reference {
            true => {
                for (pair, out) in lanes.iter().zip(out.as_chunks_mut::<2>().0) {
                    let bits = pair.to_bits();
                    *out = [bits << 16, bits & 0xFFFF_0000].map(f32::from_bits);
                }
            }
            false => out.copy_from_slice(lanes),
        }
    };
    exec.with_scratch(|scratch| {
        let scratch = &mut scratch.attention;
        if is_reference {
            reference(path, geometry, scratch, queries, tile_of, write);
        } else {
            attend(path, geometry, scratch, queries, tile_of, write);
            let is_used = scratch.p_pairs.iter().any(|&pair| pair != 0);
            assert!(is_used, "probabilities were not joined for the unit");
        }
    });
    out
}

/// Rows `(sequence, position)` whose tiles are those of `tile_of`.
fn check<'t>(
    geometry: &KvGeometry,
    random: &mut Random,
    rows: &[(usize, usize)],
    window: Option<usize>,
    tile_of: impl Fn(usize, usize) -> &'t [u16],
) {
    let q_stride = GROUP * geometry.head_dim + 3;
    let q = bf16_values(random, rows.len() * q_stride, 3.0);
    let mut sinks = Buffer::zeroed("a test", 2 * GROUP).expect("memory");
    sinks.iter_mut().for_each(|sink| *sink = random.value());
    let what = format!("{rows:?}, {} dimensions, {window:?}", geometry.head_dim);
    let rows: Vec<Row> = rows
        .iter()
        .enumerate()
        .map(|(index, &(sequence, position))| Row {
            index,
            sequence,
            position,
        })
        .collect();
    let queries = Queries {
        rows: &rows,
        group: GROUP,
        q: &q,
        q_stride,
        window,
        sinks: &Vector::F32(sinks),
        first_sink: GROUP,
        exact: false,
        by_tiles: true,
        to_pairs: false,
    };
    let all = attended(geometry, &queries, &tile_of, false);
    let to_pairs = Queries {
        to_pairs: true,
        ..queries
    };
    let pairs = attended(geometry, &to_pairs, &tile_of, false);
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    assert!(all.iter().zip(&pairs).all(same), "as pairs: {what}");
    let expected = attended(geometry, &queries, &tile_of, true);
    for (i, (a, b)) in all.iter().zip(&expected).enumerate() {
        let error = (a - b).abs() / b.abs().max(1.0);
        assert!(error <= TOLERANCE, "{a} for {b} at {i}: {what}");
    }
    for (row, among) in rows.iter().zip(all.chunks(GROUP * geometry.head_dim)) {
        let alone = Queries {
            rows: &[*row],
            ..queries
        };
        let alone = attended(geometry, &alone, &tile_of, false);
        let same = alone
            .iter()
            .zip(among)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "row {row:?} among others: {what}");
    }
}

#[test]
fn rows_of_a_sequence_by_tiles() {
    let mut random = Random(31);
    for (head_dim, window) in [(64, 128), (32, 7), (96, 65)] {
        let geometry = geometry(head_dim, window);
        for (first, n_rows) in [
            (0, 1),
            (0, 9),
            (62, 4),
            (63, 1),
            (255, 3),
            (256, 1),
            (700, 16),
        ] {
            let tiles = cache(&geometry, first + n_rows, &mut random);
            let rows: Vec<_> = (first..first + n_rows)
                .map(|position| (0, position))
                .collect();
            for window in [None, Some(window)] {
                let tile_of = |_, tile: usize| &tiles[tile][..];
                check(&geometry, &mut random, &rows, window, tile_of);
            }
        }
    }
}

#[test]
fn rows_that_share_pages_by_tiles() {
    let mut random = Random(32);
    let geometry = geometry(64, 128);
    let shared = cache(&geometry, 256, &mut random);
    let own: [_; 3] = [300, 256, 770].map(|position| cache(&geometry, position + 1, &mut random));
    let tile_of = |sequence: usize, tile: usize| match tile {
        0..4 => &shared[tile][..],
        _ => &own[sequence][tile][..],
    };
    let rows = [(0, 300), (1, 256), (2, 770), (0, 40), (2, 200)];
    check(&geometry, &mut random, &rows, None, tile_of);
}
