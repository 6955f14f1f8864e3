//! Routing: a row's experts and their weights in any number of rows, and the lists that experts'
//! products go by.

use std::sync::Arc;

use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};
use podium::engine::cuda::buffer::DeviceBuffer;
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::{GatherArgs, Kernels, RouteArgs};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::{pack, places};
use podium::quant::bf16;

use crate::common::{PRODUCT, assert_close, device, download, routing_config, upload};
use crate::support::random::Random;

#[test]
#[ignore = "needs a GPU"]
fn routing_takes_the_greatest_logits_in_any_number_of_rows() {
    let device = device();
    // Fewer experts than a tile has, a tile and some, several times 32; rows shorter than one
    // piece a warp, of the released length, and too long to be kept in registers.
    for (n_experts, hidden, k) in [
        (5, 96, 2),
        (32, 2880, 4),
        (128, 2880, 4),
        (20, 672, 4),
        (72, 3616, 3),
        (8, 6688, 4),
    ] {
        routing_takes_the_greatest_logits(&device, n_experts, hidden, k);
    }
}

/// `gather` puts the entries in the order that `group` has found, and their rows of `t` beside.
fn check_gathering(
    device: &Arc<Device>,
    kernels: &Kernels,
    experts: &[u32],
    k: usize,
    t: &[u16],
    [offsets, entries]: [&[u32]; 2],
) {
    let n_experts = offsets.len() - 1;
    let hidden = t.len() / (experts.len() / k);
    let n_octets = places::n_octets(experts.len(), n_experts);
    let (experts_device, t_device) = (upload(device, experts), upload(device, t));
    let places_device: DeviceBuffer<u32> = device.alloc("places", n_octets * 8).unwrap();
    let tiles: DeviceBuffer<u16> = device
        .alloc("tiles", places::tiles_len(n_octets, hidden))
        .unwrap();
    let listed: DeviceBuffer<u32> = device.alloc("token tiles", n_octets * 4).unwrap();
    let [sorted_offsets, sorted_entries] = [offsets, entries].map(|list| upload(device, list));
    // Few entries are sorted by each block, of many `group` has done it.
    for (tile_octets, is_sorted) in [(1, false), (2, true), (6, false), (16, true)] {
        tiles.fill(0, tiles.len(), 0xFF).unwrap();
        listed.fill(0, listed.len(), 0xFF).unwrap();
        let of_sorted = |list: &DeviceBuffer<u32>| if is_sorted { list.at(0) } else { 0 };
        let args = GatherArgs {
            experts: experts_device.at(0),
            offsets: of_sorted(&sorted_offsets),
            entries: of_sorted(&sorted_entries),
            t: t_device.at(0),
            places: places_device.at(0),
            tiles: tiles.at(0),
            listed: listed.at(0),
            n_entries: experts.len() as u32,
            n_experts: n_experts as u32,
            k: k as u32,
            n_k: hidden as u32,
            n_octets: n_octets as u32,
            tile_octets: tile_octets as u32,
            n_listed: n_octets as u32,
        };
        kernels.gather(&args).unwrap();
        let (found, tiles) = (download(&places_device), download(&tiles));
        let mut expected = Vec::new();
        let mut octet = 0;
        for expert in 0..n_experts {
            let of_expert = &entries[offsets[expert] as usize..offsets[expert + 1] as usize];
            let end = octet + of_expert.len().div_ceil(8);
            for first in (octet..end).step_by(tile_octets) {
                expected.push([expert as u32, first as u32, end as u32, 0]);
            }
            for place in octet * 8..end * 8 {
                let entry = of_expert.get(place - octet * 8).copied();
                let what = format!("place {place} of {experts:?}");
                assert_eq!(found[place], entry.unwrap_or(u32::MAX), "{what}");
                let Some(entry) = entry else { continue };
                let row = &t[entry as usize / k * hidden..][..hidden];
                for at in 0..pack::n_groups(hidden) * 64 {
                    let value = row.get(at).copied().unwrap_or(0);
                    assert_eq!(tiles[places::at(n_octets, place, at)], value, "{what}");
                }
            }
            octet = end;
        }
        expected.resize(n_octets, [u32::MAX, 0, 0, 0]);
        assert_eq!(download(&listed), expected.concat(), "{experts:?}");
    }
}

fn routing_takes_the_greatest_logits(
    device: &Arc<Device>,
    n_experts: usize,
    hidden: usize,
    k: usize,
) {
    let eps = 1e-5f32;
    let config = routing_config(n_experts, hidden, k);
    let formats = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let build = Build::new(&config, formats).unwrap();
    let nvrtc = Nvrtc::load().expect("NVRTC");
    let kernels = Kernels::load(device, &nvrtc, &config, build).unwrap();
    let mut random = Random(4);
    let (norm, weights) = (random.bits(hidden), random.bits(n_experts * hidden));
    let bias = random.bits(n_experts);
    let to_f64 = |bits: &u16| f64::from(bf16::to_f32(*bits));
    // Rows of other sizes; the second has nothing but its experts' biases.
    const N_KINDS: usize = 7;
    let mut kinds: Vec<Vec<f32>> = (0..N_KINDS)
        .map(|kind| {
            let size = (kind as f32 + 0.5) * 2.0;
            (0..hidden).map(|_| size * random.value()).collect()
        })
        .collect();
    kinds[1].fill(0.0);
    let norm_device = upload(device, &norm);
    let weights_device = upload(device, &weights);
    // Experts, bits of their gates, the normed row.
    type Routed = (Vec<u32>, Vec<u32>, Vec<u16>);
    let mut first: Vec<Option<Routed>> = vec![None; N_KINDS];
    // As they come, all equal, and one that makes its expert's logit no number.
    let mut with_nan = bias.clone();
    with_nan[1] = bf16::from_f32(f32::NAN);
    for bias in [bias, vec![bf16::from_f32(0.5); n_experts], with_nan] {
        let bias_device = upload(device, &bias);
        first.fill(None);
        // An H100 takes a row a tile up to 33 rows, then more, 16 from 1,057 on; with 4,099 some
        // blocks take several tiles.
        for n_rows in [1usize, 2, 9, 34, 131, 1055, 1056, 1057, 4099] {
            let x: Vec<f32> = (0..n_rows)
                .flat_map(|row| kinds[row % N_KINDS].clone())
                .collect();
            // The last of several rows is padding.
            let padding = (n_rows > 1).then_some(n_rows - 1);
            // Sequence, position and segment, of which the first counts here.
            let rows: Vec<u32> = (0..n_rows)
                .flat_map(|row| {
                    let is_padding = padding == Some(row);
                    [if is_padding { u32::MAX } else { row as u32 }, 0, 0, 0]
                })
                .collect();
            let (x_device, rows) = (upload(device, &x), upload(device, &rows));
            let t: DeviceBuffer<u16> = device.alloc("t", n_rows * hidden).unwrap();
            let experts: DeviceBuffer<u32> = device.alloc("experts", n_rows * k).unwrap();
            let gates: DeviceBuffer<f32> = device.alloc("gates", n_rows * k).unwrap();
            gates.fill(0, gates.len(), 0xFF).unwrap();
            let args = RouteArgs {
                x: x_device.at(0),
                norm: norm_device.at(0),
                t: t.at(0),
                weights: weights_device.at(0),
                bias: bias_device.at(0),
                rows: rows.at(0),
                experts: experts.at(0),
                gates: gates.at(0),
                n_experts: n_experts as u32,
                k: k as u32,
                n_rows: n_rows as u32,
                eps,
                ..RouteArgs::default()
            };
            kernels.route(&args).unwrap();
            let offsets: DeviceBuffer<u32> = device.alloc("offsets", n_experts + 1).unwrap();
            let entries: DeviceBuffer<u32> = device.alloc("entries", n_rows * k).unwrap();
            kernels
                .group_entries(
                    experts.at(0),
                    (n_rows * k) as u32,
                    offsets.at(0),
                    entries.at(0),
                )
                .unwrap();
            let (t, experts, gates) = (download(&t), download(&experts), download(&gates));
            for row in 0..n_rows {
                let what = format!("row {row} of {n_rows}");
                let chosen = experts[row * k..][..k].to_vec();
                if padding == Some(row) {
                    assert!(chosen.iter().all(|e| *e == u32::MAX), "{what}");
                    continue;
                }
                let t = &t[row * hidden..][..hidden];
                let bits: Vec<u32> = gates[row * k..][..k].iter().map(|g| g.to_bits()).collect();
                let found = (chosen.clone(), bits, t.to_vec());
                let kind = row % N_KINDS;
                let of_kind = first[kind].get_or_insert_with(|| found.clone());
                assert_eq!(*of_kind, found, "{what}: not as alone");
                if n_rows > 9 {
                    continue;
                }
                let x = &kinds[kind];
                let squares = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let scale = 1.0 / (squares / hidden as f64 + f64::from(eps)).sqrt();
                let normed: Vec<f64> = x
                    .iter()
                    .zip(&norm)
                    .map(|(x, norm)| f64::from(*x) * scale * to_f64(norm))
                    .collect();
                let got: Vec<f32> = t.iter().map(|bits| bf16::to_f32(*bits)).collect();
                assert_close(&got, &normed, 8e-3, &what);
                let logits: Vec<f64> = (0..n_experts)
                    .map(|expert| {
                        let weights = &weights[expert * hidden..][..hidden];
                        let products = t.iter().zip(weights).map(|(t, w)| to_f64(t) * to_f64(w));
                        products.sum::<f64>() + to_f64(&bias[expert])
                    })
                    .collect();
                let mut order: Vec<u32> = (0..n_experts as u32).collect();
                order.retain(|&e| !logits[e as usize].is_nan());
                // Stable: the lower expert among equals.
                order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
                assert_eq!(chosen, order[..k], "{what}: {logits:?}");
                let best = logits[order[0] as usize];
                let shares: Vec<f64> = order[..k]
                    .iter()
                    .map(|&e| (logits[e as usize] - best).exp())
                    .collect();
                let sum: f64 = shares.iter().sum();
                let shares: Vec<f64> = shares.iter().map(|share| share / sum).collect();
                assert_close(&gates[row * k..][..k], &shares, PRODUCT, &what);
            }
            // Every entry once, under its expert, in order.
            let (offsets, entries) = (download(&offsets), download(&entries));
            if n_rows <= 131 {
                check_gathering(
                    device,
                    &kernels,
                    &experts,
                    k,
                    &t,
                    [offsets.as_slice(), &entries],
                );
            }
            let mut sorted: Vec<u32> = (0..(n_rows * k) as u32)
                .filter(|&entry| experts[entry as usize] != u32::MAX)
                .collect();
            sorted.sort_by_key(|&entry| (experts[entry as usize], entry));
            assert_eq!(entries[..sorted.len()], sorted, "{n_rows} rows");
            let ends: Vec<u32> = (0..=n_experts as u32)
                .map(|end| {
                    sorted
                        .iter()
                        .filter(|&&e| experts[e as usize] < end)
                        .count() as u32
                })
                .collect();
            assert_eq!(offsets, ends, "{n_rows} rows");
        }
    }
}
