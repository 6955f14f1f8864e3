//! Dense products: every variant has the bits of one order of sums, near to sums in f64, whether
//! they are stored, added to the residual, or turned and cached.

use std::ops::Range;
use std::sync::Arc;

use podium::engine::checkpoint::MatrixFormat;
use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::device::Device;
use podium::engine::cuda::launch::{Dense, Kernels, MatmulArgs};
use podium::engine::cuda::pack::{self, RowOrder};
use podium::engine::cuda::variants;
use podium::quant::bf16;

use crate::common::{
    PRODUCT, assert_close, both_kernels, device, download, order_key, same_bits, upload,
};
use crate::support::random::Random;

#[test]
#[ignore = "needs a GPU"]
fn dense_products_have_one_order_of_sums() {
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(1);
    // A row, a tile of them and one more, for every width of a tile; outputs and k that end within
    // a tile.
    for (i, (n_out, n_k, n_rows)) in [
        (64, 64, 1),
        (64, 64, 8),
        (68, 96, 9),
        (72, 128, 16),
        (68, 96, 33),
        (200, 160, 64),
        (200, 160, 65),
        (136, 96, 128),
        (136, 96, 129),
        (128, 64, 256),
        (68, 160, 257),
        // Odd row blocks, features that end in half a block, more row pairs than a band.
        (320, 2880, 257),
        (576, 96, 2433),
        (512, 2880, 130),
        (512, 2880, 130),
    ]
    .into_iter()
    .enumerate()
    {
        // The last one again, over many powers of two: what is lost in a sum then shows.
        let powers = if i == 14 { 20 } else { 0 };
        let weights = random.wide_bits(n_out * n_k, powers);
        let x = random.wide_bits(n_rows * n_k, powers);
        let mut tiles = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, n_k)];
        pack::bf16(&mut tiles, n_out, n_k, RowOrder::Natural, |row, k| {
            weights[row * n_k + k]
        });
        let (tiles, x_device) = (upload(&device, &tiles), upload(&device, &x));
        let mut expected = vec![0.0f64; n_rows * n_out];
        for row in 0..n_rows {
            for out in 0..n_out {
                expected[row * n_out + out] = (0..n_k)
                    .map(|k| {
                        f64::from(bf16::to_f32(weights[out * n_k + k]))
                            * f64::from(bf16::to_f32(x[row * n_k + k]))
                    })
                    .sum();
            }
        }
        // Greatest so far: nothing, less than all sums, more than all.
        let so_far: Vec<u32> = (0..n_rows)
            .map(|row| [0, order_key(-1e30), order_key(1e30)][row % 3])
            .collect();
        let mut first: Option<Vec<f32>> = None;
        let which = Dense::Logits;
        let variants = both
            .iter()
            .flat_map(|kernels| (0..kernels.n_dense(which)).map(move |variant| (kernels, variant)));
        for (kernels, variant) in variants {
            let out: DeviceBuffer<f32> = device.alloc("out", n_rows * n_out).unwrap();
            out.fill(0, out.len(), 0xFF).unwrap();
            let maxima = upload(&device, &so_far);
            let args = MatmulArgs {
                weights: tiles.at(0),
                x: x_device.at(0),
                out: out.at(0),
                maxima: maxima.at(0),
                n_rows: n_rows as u32,
                n_out: n_out as u32,
                n_k: n_k as u32,
                n_tiles: pack::n_tiles(n_out) as u32,
                ..MatmulArgs::default()
            };
            kernels.matmul_variant(which, variant, &args).unwrap();
            let got = download(&out);
            let name = kernels.dense_name(which, variant);
            let what = format!("{n_out} x {n_k}, {n_rows} rows, variant {name}");
            assert_close(&got, &expected, PRODUCT, &what);
            same_bits(first.get_or_insert_with(|| got.clone()), &got, &what);
            let greatest = got.chunks(n_out).zip(&so_far).map(|(sums, &so_far)| {
                let greatest = sums.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                so_far.max(order_key(greatest))
            });
            let greatest: Vec<u32> = greatest.collect();
            assert_eq!(download(&maxima), greatest, "{what}");
        }
    }
}

/// Weights in tiles, inputs, and the product in f32 with the bits that all variants of `which` give:
/// the sums of its runs of k, each a product that is not split.
fn product(
    device: &Arc<Device>,
    kernels: &Kernels,
    random: &mut Random,
    (which, order): (Dense, RowOrder),
    (n_out, n_k, n_rows): (usize, usize, usize),
) -> (MatmulArgs, DeviceBuffer<u8>, DeviceBuffer<u16>, Vec<f32>) {
    let weights = random.bits(n_out * n_k);
    let x = random.bits(n_rows * n_k);
    let tiles_of = |order, ks: Range<usize>| {
        let mut tiles = vec![0; pack::matrix_bytes(MatrixFormat::Bf16, n_out, ks.len())];
        pack::bf16(&mut tiles, n_out, ks.len(), order, |row, k| {
            weights[row * n_k + ks.start + k]
        });
        upload(device, &tiles)
    };
    let mut sums = vec![0.0; n_rows * n_out];
    let (splits, n_groups) = (variants::dense_splits(which), pack::n_groups(n_k));
    for split in 0..splits {
        let [start, end] = [split, split + 1]
            .map(|split| variants::first_group(splits, split, n_groups) * pack::GROUP_K);
        let ks = start..end.min(n_k);
        if ks.is_empty() {
            continue;
        }
        let of_run: Vec<u16> = x
            .chunks(n_k)
            .flat_map(|x| x[ks.clone()].iter().copied())
            .collect();
        let (x, tiles) = (
            upload(device, &of_run),
            tiles_of(RowOrder::Natural, ks.clone()),
        );
        let out: DeviceBuffer<f32> = device.alloc("out", n_rows * n_out).unwrap();
        let args = MatmulArgs {
            weights: tiles.at(0),
            x: x.at(0),
            out: out.at(0),
            n_k: ks.len() as u32,
            ..shaped(n_out, n_k, n_rows)
        };
        kernels.matmul_variant(Dense::Logits, 0, &args).unwrap();
        for (sum, of_run) in sums.iter_mut().zip(download(&out)) {
            *sum += of_run;
        }
    }
    let (tiles, x) = (tiles_of(order, 0..n_k), upload(device, &x));
    let args = MatmulArgs {
        weights: tiles.at(0),
        x: x.at(0),
        ..shaped(n_out, n_k, n_rows)
    };
    (args, tiles, x, sums)
}

fn shaped(n_out: usize, n_k: usize, n_rows: usize) -> MatmulArgs {
    MatmulArgs {
        n_rows: n_rows as u32,
        n_out: n_out as u32,
        n_k: n_k as u32,
        n_tiles: pack::n_tiles(n_out) as u32,
        ..MatmulArgs::default()
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_variant_adds_to_the_residual() {
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(5);
    for (n_out, n_k, n_rows) in [
        (68, 64, 1),
        (320, 96, 129),
        (324, 160, 257),
        (640, 64, 300),
        (576, 64, 2177),
        // Runs of k of many groups, not all alike.
        (132, 4096, 3),
        (192, 1472, 70),
        (320, 2880, 257),
    ] {
        let shape = (n_out, n_k, n_rows);
        let (args, _tiles, _x, sums) = product(
            &device,
            &both[0],
            &mut random,
            (Dense::Add, RowOrder::Natural),
            shape,
        );
        let bias = random.bits(n_out);
        let residual: Vec<f32> = (0..n_rows * n_out).map(|_| random.value()).collect();
        let expected: Vec<f32> = (0..n_rows * n_out)
            .map(|i| residual[i] + (sums[i] + bf16::to_f32(bias[i % n_out])))
            .collect();
        let bias = upload(&device, &bias);
        let n_exchanged = variants::exchange_len(n_out, n_rows);
        let exchange: DeviceBuffer<f32> = device.alloc("sums", n_exchanged).unwrap();
        for kernels in &both {
            for variant in 0..kernels.n_dense(Dense::Add) {
                if !kernels.dense_fits(Dense::Add, variant, &args) {
                    continue;
                }
                exchange.fill(0, n_exchanged, 0xFF).unwrap();
                let out = upload(&device, &residual);
                let args = MatmulArgs {
                    bias: bias.at(0),
                    out: out.at(0),
                    exchange: exchange.at(0),
                    ..args
                };
                kernels.matmul_variant(Dense::Add, variant, &args).unwrap();
                let name = kernels.dense_name(Dense::Add, variant);
                let what = format!("{shape:?}, variant {name}");
                same_bits(&expected, &download(&out), &what);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_variant_turns_and_caches_keys() {
    // As `small_config`.
    const HEAD_DIM: usize = 64;
    const N_HEADS: usize = 8;
    const N_KV_HEADS: usize = 2;
    // Sequences take turns, the last row is padding.
    const N_SEQUENCES: usize = 3;
    const RING: usize = 128;
    let device = device();
    let both = both_kernels(&device, MatrixFormat::Mxfp4, 4, false);
    let mut random = Random(6);
    let width = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM;
    let rope: Vec<f32> = (0..RING * HEAD_DIM).map(|_| random.value()).collect();
    let rope_device = upload(&device, &rope);
    for (n_rows, n_k) in [(2usize, 96), (9, 2880), (64, 96), (130, 64), (257, 352)] {
        let shape = (width, n_k, n_rows);
        let order = RowOrder::Rotary { head_dim: HEAD_DIM };
        let (args, _tiles, _x, sums) =
            product(&device, &both[0], &mut random, (Dense::Qkv, order), shape);
        let bias = random.bits(width);
        let bias_device = upload(&device, &bias);
        let place = |row: usize| match row + 1 == n_rows {
            true => (u32::MAX, 0),
            false => ((row % N_SEQUENCES) as u32, row / N_SEQUENCES),
        };
        let rows: Vec<u32> = (0..n_rows)
            .flat_map(|row| {
                let (sequence, position) = place(row);
                [sequence, position as u32, 0, 0]
            })
            .collect();
        let rows = upload(&device, &rows);
        // With all queries, and without.
        for first_tile in [0, N_HEADS * HEAD_DIM / pack::TILE_M] {
            let mut expected = vec![u16::MAX; n_rows * width];
            let mut cached = vec![u16::MAX; N_SEQUENCES * N_KV_HEADS * 2 * RING * HEAD_DIM];
            for row in 0..n_rows {
                let (sequence, position) = place(row);
                for head in first_tile * pack::TILE_M / HEAD_DIM..width / HEAD_DIM {
                    for dim in 0..HEAD_DIM / 2 {
                        let at = [dim, dim + HEAD_DIM / 2].map(|dim| head * HEAD_DIM + dim);
                        let [low, high] =
                            at.map(|at| sums[row * width + at] + bf16::to_f32(bias[at]));
                        let turn = &rope[position * HEAD_DIM + dim..];
                        let (cos, sin) = (turn[0], turn[HEAD_DIM / 2]);
                        let turned = if head < N_HEADS + N_KV_HEADS {
                            [low * cos - high * sin, high * cos + low * sin]
                        } else {
                            [low, high]
                        };
                        for (at, value) in at.into_iter().zip(turned) {
                            let bits = bf16::from_f32(value);
                            expected[row * width + at] = bits;
                            if head >= N_HEADS && sequence != u32::MAX {
                                let kv = head - N_HEADS;
                                let (kv_head, is_value) = (kv % N_KV_HEADS, kv / N_KV_HEADS);
                                let of_head = sequence as usize * N_KV_HEADS + kv_head;
                                let of_position = (of_head * 2 + is_value) * RING + position;
                                cached[of_position * HEAD_DIM + at % HEAD_DIM] = bits;
                            }
                        }
                    }
                }
            }
            for kernels in &both {
                for variant in 0..kernels.n_dense(Dense::Qkv) {
                    let qkv = upload(&device, &vec![u16::MAX; expected.len()]);
                    let cache = upload(&device, &vec![u16::MAX; cached.len()]);
                    let args = MatmulArgs {
                        bias: bias_device.at(0),
                        out: 0,
                        qkv: qkv.at(0),
                        rows: rows.at(0),
                        rope: rope_device.at(0),
                        cache: cache.at(0),
                        first_tile: first_tile as u32,
                        n_heads: N_HEADS as u32,
                        n_kv_heads: N_KV_HEADS as u32,
                        n_layers: 1,
                        ring: RING as u32,
                        ..args
                    };
                    kernels.matmul_variant(Dense::Qkv, variant, &args).unwrap();
                    let name = kernels.dense_name(Dense::Qkv, variant);
                    let what =
                        format!("{n_rows} rows of {n_k} from tile {first_tile}, variant {name}");
                    assert!(download(&qkv) == expected, "{what}: qkv");
                    assert!(download(&cache) == cached, "{what}: cache");
                }
            }
        }
    }
}
