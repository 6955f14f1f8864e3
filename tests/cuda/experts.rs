//! Experts' products: every variant has the same bits, near to sums in f64, however tokens are
//! spread over the experts; copies of the weights in other formats have them too.

use podium::engine::checkpoint::MatrixFormat;
use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::launch::{ExpertBuffers, MoeArgs};
use podium::engine::cuda::pack::{self, NeedsWide, RowOrder};
use podium::engine::cuda::places;
use podium::quant::{bf16, mxfp4, mxint8};

use crate::common::{assert_close, both_kernels, device, download, same_bits, upload};
use crate::support::random::Random;

/// How rows choose their two experts of five.
type Choice = fn(usize) -> [u32; 2];

/// Expert 3 has no token, expert 1 one of every row.
const UNEVEN: Choice = |row| [1, [0, 2, 4][row % 3]];

/// All tokens are on the same experts, the others have none.
const ALL_ON_ONE: Choice = |_| [4, 1];

/// Of 97 rows 1, 9, 17 and 70 on four experts, all on the fifth.
const RAGGED: Choice = |row| {
    let other = match row {
        40 => 0,
        50..=58 => 1,
        60..=76 => 3,
        _ => 4,
    };
    [other, 2]
};

/// Experts' products by every variant against sums in f64; gives their bits.
fn check_experts(format: MatrixFormat, wide: bool) -> Vec<(Vec<u16>, Vec<f32>)> {
    let device = device();
    let n_experts = 5;
    let both = both_kernels(&device, format, n_experts, wide);
    let mut products = Vec::new();
    let mut random = Random(2);
    let k = 2;
    // None is whole groups of 64; the larger ones are more groups than there are stages.
    let (small, large) = ((160, 224), (1248, 608));
    for ((hidden, width), n_rows, choice) in [
        (small, 1usize, UNEVEN),
        (small, 7, UNEVEN),
        (small, 40, UNEVEN),
        (small, 150, UNEVEN),
        (small, 1, ALL_ON_ONE),
        (small, 8, ALL_ON_ONE),
        (small, 9, ALL_ON_ONE),
        (small, 15, ALL_ON_ONE),
        (small, 17, ALL_ON_ONE),
        (small, 31, ALL_ON_ONE),
        (small, 33, ALL_ON_ONE),
        (small, 49, ALL_ON_ONE),
        (small, 64, ALL_ON_ONE),
        (small, 65, ALL_ON_ONE),
        (small, 97, ALL_ON_ONE),
        (small, 128, ALL_ON_ONE),
        (small, 129, ALL_ON_ONE),
        (large, 9, UNEVEN),
        (large, 97, RAGGED),
    ] {
        let experts: Vec<u32> = (0..n_rows).flat_map(choice).collect();
        let counts: [usize; 5] = std::array::from_fn(|of| {
            experts
                .iter()
                .filter(|&&expert| expert as usize == of)
                .count()
        });
        let x = random.bits(n_rows * hidden);
        let bias_up = random.bits(n_experts * 2 * width);
        let bias_down = random.bits(n_experts * hidden);
        let mut make = |n_out: usize, n_k: usize, order: RowOrder| {
            let mut tiles = Vec::new();
            let mut values = Vec::new();
            for _ in 0..n_experts {
                let mut blocks = Vec::new();
                for _ in 0..n_out * n_k / 32 {
                    let codes: [u8; 16] = std::array::from_fn(|_| random.word() as u8);
                    let scale = if wide { 128 } else { 118 } + (random.word() % 4) as u8;
                    blocks.push((scale, codes));
                    values.extend(mxfp4::unpack(scale, &codes));
                }
                let start = values.len() - n_out * n_k;
                match format {
                    MatrixFormat::Mxfp4 => {
                        let mut one = vec![0; pack::matrix_bytes(MatrixFormat::Mxfp4, n_out, n_k)];
                        pack::mxfp4::<NeedsWide>(&mut one, n_out, n_k, order, wide, |row, i| {
                            Ok(blocks[row * n_k / 32 + i])
                        })
                        .unwrap();
                        tiles.extend(one);
                    }
                    MatrixFormat::Mxint8 => {
                        let mut one = vec![0; pack::matrix_bytes(format, n_out, n_k)];
                        pack::mxint8::<NeedsWide>(&mut one, n_out, n_k, order, wide, |row, i| {
                            let (scale, codes) = &blocks[row * n_k / 32 + i];
                            Ok(mxint8::from_mxfp4(*scale, codes))
                        })
                        .unwrap();
                        tiles.extend(one);
                    }
                    MatrixFormat::Bf16 => {
                        let mut one = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
                        let of =
                            |row: usize, k: usize| bf16::from_f32(values[start + row * n_k + k]);
                        pack::bf16(&mut one, n_out, n_k, order, of);
                        tiles.extend(one);
                    }
                }
            }
            (upload(&device, &tiles), values)
        };
        let (up_tiles, up) = make(2 * width, hidden, RowOrder::GateUp);
        let (down_tiles, down) = make(hidden, width, RowOrder::Natural);
        let dot = |w: &[f32], x: &[f32]| -> f64 {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            products.sum()
        };
        let to_f32 = |bits: &[u16]| bits.iter().map(|&b| bf16::to_f32(b)).collect::<Vec<f32>>();
        let (x_f32, bias_up_f32, bias_down_f32) =
            (to_f32(&x), to_f32(&bias_up), to_f32(&bias_down));
        let x_device = upload(&device, &x);
        let (bias_up, bias_down) = (upload(&device, &bias_up), upload(&device, &bias_down));
        let experts_device = upload(&device, &experts);
        let offsets: DeviceBuffer<u32> = device.alloc("offsets", n_experts + 1).unwrap();
        let entries: DeviceBuffer<u32> = device.alloc("entries", n_rows * k).unwrap();
        let n_octets = places::n_octets(n_rows * k, n_experts);
        let n_listed = n_octets * places::LISTED_WORDS;
        let listed: DeviceBuffer<u32> = device.alloc("token tiles", n_listed).unwrap();
        let n_places = n_octets * places::OCTET;
        let places_device: DeviceBuffer<u32> = device.alloc("places", n_places).unwrap();
        let tiles = |n_k: usize| -> DeviceBuffer<u16> {
            device
                .alloc("tiles", places::tiles_len(n_octets, n_k))
                .unwrap()
        };
        let (t_tiles, act_tiles) = (tiles(hidden), tiles(width));
        let mut first: Option<(Vec<u16>, Vec<f32>)> = None;
        let variants = both
            .iter()
            .flat_map(|kernels| (0..kernels.n_moe()).map(move |variant| (kernels, variant)));
        for (kernels, variant) in variants {
            let act: DeviceBuffer<u16> = device.alloc("act", n_rows * k * width).unwrap();
            let y: DeviceBuffer<u16> = device.alloc("y", n_rows * k * hidden).unwrap();
            act.fill(0, act.len(), 0xFF).unwrap();
            y.fill(0, y.len(), 0xFF).unwrap();
            // No number where nothing was brought.
            t_tiles.fill(0, t_tiles.len(), 0xFF).unwrap();
            act_tiles.fill(0, act_tiles.len(), 0xFF).unwrap();
            places_device.fill(0, n_places, 0xFF).unwrap();
            let buffers = ExpertBuffers {
                t: x_device.at(0),
                act: act.at(0),
                y: y.at(0),
                experts: experts_device.at(0),
                offsets: offsets.at(0),
                entries: entries.at(0),
                places: places_device.at(0),
                listed: listed.at(0),
                t_tiles: t_tiles.at(0),
                act_tiles: act_tiles.at(0),
            };
            let common = MoeArgs {
                k: k as u32,
                ..MoeArgs::default()
            };
            let gate_up = MoeArgs {
                weights: up_tiles.at(0),
                bias: bias_up.at(0),
                n_k: hidden as u32,
                n_tiles: pack::n_tiles(2 * width) as u32,
                n_out: width as u32,
                limit: 7.0,
                ..common
            };
            let down_args = MoeArgs {
                weights: down_tiles.at(0),
                bias: bias_down.at(0),
                n_k: width as u32,
                n_tiles: pack::n_tiles(hidden) as u32,
                n_out: hidden as u32,
                ..common
            };
            kernels
                .experts_variant(&buffers, &gate_up, &down_args, n_rows, variant)
                .unwrap();
            let (mut act, y) = (download(&act), to_f32(&download(&y)));
            if kernels.moe_is_streaming(variant) {
                let (tiles, placed) = (download(&act_tiles), download(&places_device));
                for (place, &entry) in placed.iter().enumerate() {
                    for f in (0..width).filter(|_| entry != u32::MAX) {
                        act[entry as usize * width + f] = tiles[places::at(n_octets, place, f)];
                    }
                }
            }
            let what = format!(
                "{format:?}, {n_rows} rows of {hidden} on {counts:?}, variant {}",
                kernels.moe_name(variant)
            );
            if let Some((first_act, first_y)) = &first {
                assert_eq!(*first_act, act, "{what}: gate_up");
                same_bits(first_y, &y, &what);
                continue;
            }
            let act_f32 = to_f32(&act);
            for row in 0..n_rows {
                for (rank, expert) in choice(row).into_iter().enumerate() {
                    let (entry, expert) = (row * k + rank, expert as usize);
                    let x = &x_f32[row * hidden..][..hidden];
                    let weights = &up[expert * 2 * width * hidden..];
                    let expected: Vec<f64> = (0..width)
                        .map(|f| {
                            let of = |row: usize| {
                                dot(&weights[row * hidden..][..hidden], x)
                                    + f64::from(bias_up_f32[expert * 2 * width + row])
                            };
                            let (gate, up) = (of(2 * f).min(7.0), of(2 * f + 1).clamp(-7.0, 7.0));
                            gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
                        })
                        .collect();
                    let got = &act_f32[entry * width..][..width];
                    // One rounding to bf16.
                    assert_close(got, &expected, 8e-3, &format!("{what}: gate_up of {entry}"));
                    let weights = &down[expert * width * hidden..];
                    let expected: Vec<f64> = (0..hidden)
                        .map(|m| {
                            dot(&weights[m * width..][..width], got)
                                + f64::from(bias_down_f32[expert * hidden + m])
                        })
                        .collect();
                    let got = &y[entry * hidden..][..hidden];
                    assert_close(got, &expected, 8e-3, &format!("{what}: down of {entry}"));
                }
            }
            first = Some((act, y));
        }
        products.extend(first);
    }
    products
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_experts_have_the_same_bits() {
    check_copies(false);
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_experts_with_large_scales_have_the_same_bits() {
    check_copies(true);
}

fn check_copies(wide: bool) {
    let of_mxfp4 = check_experts(MatrixFormat::Mxfp4, wide);
    for format in [MatrixFormat::Mxint8, MatrixFormat::Bf16] {
        let of_copy = check_experts(format, wide);
        assert_eq!(of_mxfp4.len(), of_copy.len());
        for ((act, y), (copy_act, copy_y)) in of_mxfp4.iter().zip(&of_copy) {
            assert_eq!(act, copy_act, "{format:?}: gate_up");
            same_bits(y, copy_y, &format!("{format:?}: down"));
        }
    }
}
