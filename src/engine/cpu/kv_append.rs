//! Writes new keys and values into a tile of the cache, rounded to the cache's type.

use super::kv_cache::{KvElement, KvGeometry};
use crate::engine::TILE_KEYS;

/// Puts `k` and `v` `[head_dim]` of one position at `key` of a tile.
#[inline]
pub fn kv_append<E: KvElement>(
    geometry: &KvGeometry,
    tile: &mut [E],
    key: usize,
    k: &[f32],
    v: &[f32],
) {
    let (keys, values) = tile.split_at_mut(TILE_KEYS * geometry.head_dim);
    for (column, &k) in keys.chunks_exact_mut(TILE_KEYS).zip(k) {
        column[key] = E::from_f32(k);
    }
    let values = &mut values[key * geometry.padded_head_dim..][..geometry.head_dim];
    for (out, &v) in values.iter_mut().zip(v) {
        *out = E::from_f32(v);
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
