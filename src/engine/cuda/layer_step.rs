//! How a block of `kernels/layer_step.cu` divides its shared memory, and which models it takes.

use super::arguments::LayerStepLayout;
use super::pack;
use super::variants::Room;
use crate::engine::checkpoint::{MatrixFormat, WeightFormat};
use crate::engine::config::ModelConfig;

/// As in kernels/routing.cuh, gemm_row.cuh and layer_step.cu.
pub const WARPS: usize = 16;
const STAGES: usize = 4;
const KEYS: usize = 8;
/// Groups of a stage are asked for by a lane each.
const MOST_GROUPS: usize = 32;
/// A wider row does not fit in the registers of the sixteen warps that norm it.
const MOST_HIDDEN: usize = 4096;
/// Room for the arrays of fixed size.
const STATIC_BYTES: usize = 3 << 10;
/// What a block leaves, where there is much, to a block of attention beside it.
const LEFT_BYTES: usize = 40 << 10;
const MUCH_SHARED: usize = 200 << 10;

/// The layout for a model, and the bytes it takes; nothing where the separate kernels must do.
pub fn layout(
    config: &ModelConfig,
    format: WeightFormat,
    room: Room,
) -> Option<(LayerStepLayout, usize)> {
    let (hidden, width) = (config.hidden, config.intermediate);
    let (k, n_experts) = (config.n_experts_per_token, config.n_experts);
    let n_blocks = room.n_multiprocessors;
    let rows_fit = hidden.is_multiple_of(32) && hidden <= MOST_HIDDEN && width.is_multiple_of(8);
    if !rows_fit || n_experts.div_ceil(KEYS) > n_blocks {
        return None;
    }
    let q_width = config.q_width();
    let groups = [q_width, hidden, width].map(pack::n_groups);
    let tokens = groups[0].max(groups[1]).max(k * groups[2]) * pack::GROUP_K * 2;
    let norms_at = tokens;
    let keys_at = norms_at + 2 * hidden * format.vectors.n_bytes();
    let dense_at = (keys_at + n_experts * size_of::<u32>()).next_multiple_of(128);

    let left = match room.shared_bytes {
        ..MUCH_SHARED => 0,
        _ => LEFT_BYTES,
    };
    let rings = room
        .shared_bytes
        .checked_sub(STATIC_BYTES + left + dense_at)?;
    // Bytes of all warps' stages for each group in a stage, and most groups.
    let product = |format: MatrixFormat, n_tiles: usize, n_k: usize| {
        let warps = n_tiles.div_ceil(n_blocks).min(WARPS);
        let most = pack::n_groups(n_k).div_ceil(STAGES).min(MOST_GROUPS);
        (warps * STAGES * pack::tile_bytes(format), most)
    };
    let gate_up = product(format.experts, k * pack::n_tiles(2 * width), hidden);
    let down = product(format.experts, k * pack::n_tiles(hidden), width);
    let out = product(format.attention, pack::n_tiles(hidden), q_width);
    let qkv = product(format.attention, pack::n_tiles(config.qkv_width()), hidden);
    // The experts' weights stream, those of the others wait in shared memory for what they are
    // multiplied by.
    let share = rings * 3 / 8;
    let of_experts = [gate_up, down].map(|(bytes, most)| (share / bytes).clamp(1, most));
    let experts_bytes = (gate_up.0 * of_experts[0]).max(down.0 * of_experts[1]);
    let rest = rings.checked_sub(experts_bytes)?;
    let of_dense = [out, qkv].map(|(bytes, most)| (rest / bytes).min(most));
    if of_dense.contains(&0) {
        return None;
    }
    let dense_bytes = (out.0 * of_dense[0]).max(qkv.0 * of_dense[1]);
    let experts_at = dense_at + dense_bytes;
    let layout = LayerStepLayout {
        out_groups: of_dense[0] as u32,
        gate_up_groups: of_experts[0] as u32,
        down_groups: of_experts[1] as u32,
        qkv_groups: of_dense[1] as u32,
        norms_at: norms_at as u32,
        keys_at: keys_at as u32,
        dense_at: dense_at as u32,
        experts_at: experts_at as u32,
    };
    Some((layout, experts_at + experts_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::checkpoint::{Precision, VectorFormat};
    use crate::engine::shapes;

    fn room(shared_kib: usize, n_multiprocessors: usize) -> Room {
        Room {
            warpgroups: false,
            small_shared: shared_kib < 130,
            shared_bytes: shared_kib << 10,
            n_multiprocessors,
        }
    }

    #[test]
    fn published_shapes_fit_in_every_format() {
        for name in shapes::NAMES {
            let config = shapes::named(name).expect("a shape");
            for precision in [
                Precision::Bits4Dense4,
                Precision::Stored,
                Precision::Bits8,
                Precision::Bits16,
            ] {
                for vectors in [VectorFormat::Bf16, VectorFormat::F32] {
                    let format = precision.formats(MatrixFormat::Mxfp4, vectors);
                    for room in [room(227, 132), room(163, 108)] {
                        let found = layout(&config, format, room);
                        // Sixteen bits an expert's weight are too many for an A100.
                        if found.is_none() && precision == Precision::Bits16 {
                            assert_eq!(room.n_multiprocessors, 108);
                            continue;
                        }
                        let (layout, bytes) = found.expect("it fits");
                        assert!(bytes + STATIC_BYTES <= room.shared_bytes, "{layout:?}");
                        assert!(layout.out_groups > 0 && layout.qkv_groups > 0);
                    }
                }
            }
        }
    }

    #[test]
    fn much_of_the_dense_weights_is_there_before_it_is_needed() {
        let config = shapes::named("gpt-oss-20b").expect("a shape");
        let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
        let (layout, bytes) = layout(&config, format, room(227, 132)).expect("it fits");
        assert_eq!((layout.out_groups, layout.qkv_groups), (6, 4));
        assert_eq!((layout.gate_up_groups, layout.down_groups), (2, 4));
        assert!(bytes <= 184 << 10, "{bytes}");
    }

    #[test]
    fn too_wide_a_row_is_left_to_the_separate_kernels() {
        let mut config = shapes::named("gpt-oss-20b").expect("a shape");
        config.hidden = 8192;
        let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
        assert!(layout(&config, format, room(227, 132)).is_none());
    }
}
