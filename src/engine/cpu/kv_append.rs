//! Writes new keys and values into a tile of the cache, rounded to the cache's type.

use super::kv_cache::{KvElement, KvGeometry};
use super::lanes::next_row;
use super::path::on_each_path;
use crate::engine::TILE_KEYS;

on_each_path! {
    /// Puts `k` and `v` `[head_dim]` of one position at `key` of a tile.
    pub fn kv_append<E: KvElement>(
        geometry: &KvGeometry,
        tile: &mut [E],
        key: usize,
        k: &[f32],
        v: &[f32],
    ) = body
}

#[inline(always)]
fn body<E: KvElement>(geometry: &KvGeometry, tile: &mut [E], key: usize, k: &[f32], v: &[f32]) {
    /// Dimensions that are rounded together before each goes to its column.
    const WIDTH: usize = 16;
    assert!(key < TILE_KEYS, "a tile's key");
    let (keys, values) = tile.split_at_mut(TILE_KEYS * geometry.head_dim);
    let (chunks, rest) = k.as_chunks::<WIDTH>();
    let (columns, rest_columns) = keys.as_chunks_mut::<{ WIDTH * TILE_KEYS }>();
    for (k, columns) in chunks.iter().zip(columns) {
        next_row();
        let mut rounded = [E::from_f32(0.0); WIDTH];
        for i in 0..WIDTH {
            rounded[i] = E::from_f32(k[i]);
        }
        for i in 0..WIDTH {
            columns[i * TILE_KEYS + key] = rounded[i];
        }
    }
    for (column, &k) in rest_columns.chunks_exact_mut(TILE_KEYS).zip(rest) {
        column[key] = E::from_f32(k);
    }
    let values = &mut values[key * geometry.padded_head_dim..][..geometry.head_dim];
    for i in 0..values.len().min(v.len()) {
        values[i] = E::from_f32(v[i]);
    }
}

/// As [`kv_append`], slow and obvious.
pub fn reference<E: KvElement>(
    geometry: &KvGeometry,
    tile: &mut [E],
    key: usize,
    k: &[f32],
    v: &[f32],
) {
    for dim in 0..geometry.head_dim {
        tile[dim * TILE_KEYS + key] = E::from_f32(k[dim]);
        let of_values = TILE_KEYS * geometry.head_dim + key * geometry.padded_head_dim;
        tile[of_values + dim] = E::from_f32(v[dim]);
    }
}
