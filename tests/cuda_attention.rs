//! Attention of a prefill pass on a GPU: the kernels of warpgroups and of warps give the same bits,
//! those of decoding, near to plain sums. Run by `just test-gpu`; without a GPU these tests fail.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::Path;
use std::sync::Arc;

use podium::engine::PAGE_POSITIONS;
use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cuda::buffer::{DeviceBuffer, Plain};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::{AttentionArgs, Kernels};
use podium::engine::cuda::nvrtc::Nvrtc;
use podium::engine::cuda::sharing::{LiveRow, Sharing};
use podium::quant::bf16;
use support::random::Random;

const HEAD_DIM: usize = 64;
const N_KV_HEADS: usize = 2;
const N_LAYERS: usize = 2;
const LAYER: usize = 1;
const WINDOW: usize = 128;
const RING: usize = 192;
const SCALE: f32 = 0.125;
/// P is rounded to bf16, outputs are; values are below 2.
const ERROR: f64 = 2e-2;
/// What no kernel may let into a sum.
const NAN: u16 = 0xFFFF;

/// Between `-most` and `most`.
fn bits(random: &mut Random, most: f32) -> u16 {
    bf16::from_f32(random.value() * most)
}

fn upload<T: Plain>(device: &Arc<Device>, values: &[T]) -> DeviceBuffer<T> {
    let buffer = device.alloc("a test's values", values.len()).unwrap();
    buffer.upload(0, values).unwrap();
    buffer
}

/// The kernels for this GPU, and those of a GPU without warpgroup instructions.
fn both_kernels(device: &Arc<Device>, group: usize) -> [Kernels; 2] {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": {},
        "num_key_value_heads": {N_KV_HEADS}, "head_dim": {HEAD_DIM}, "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 500,
        "sliding_window": {WINDOW}, "rope_theta": 10000, "max_position_embeddings": 4096}}"#,
        group * N_KV_HEADS
    );
    let config = ModelConfig::parse(text.as_bytes(), Path::new("test")).unwrap();
    let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
    let mut build = Build::new(&config, format).unwrap();
    let nvrtc = Nvrtc::load().expect("NVRTC");
    [true, false].map(|warpgroups| {
        build.warpgroups = warpgroups;
        Kernels::load(device, &nvrtc, &config, build).unwrap()
    })
}

/// Where a sequence stands before the pass, and its rows in it.
type Segment = (usize, usize);

/// Sequences that share their first pages, and how many.
type Set = (std::ops::Range<usize>, usize);

/// A pass as the host has it. Keys and values are by sequence, position, KV head and dim.
struct Pass {
    segments: Vec<Segment>,
    n_heads: usize,
    qkv: Vec<u16>,
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
    sinks: Vec<u16>,
}

impl Pass {
    fn new(random: &mut Random, segments: &[Segment], n_heads: usize) -> Self {
        let a_position = N_KV_HEADS * HEAD_DIM;
        let mut draw = |most: f32| -> Vec<Vec<u16>> {
            let of = |&(start, n): &Segment| {
                (0..(start + n) * a_position)
                    .map(|_| bits(random, most))
                    .collect()
            };
            segments.iter().map(of).collect()
        };
        let (keys, values) = (draw(2.0), draw(1.5));
        let mut qkv = Vec::new();
        for (sequence, &(start, n)) in segments.iter().enumerate() {
            for position in start..start + n {
                // Some queries look at few keys, some at all alike.
                let most = [0.1, 2.0, 8.0][position % 3];
                qkv.extend((0..n_heads * HEAD_DIM).map(|_| bits(random, most)));
                let at = position * a_position..(position + 1) * a_position;
                qkv.extend_from_slice(&keys[sequence][at.clone()]);
                qkv.extend_from_slice(&values[sequence][at]);
            }
        }
        let sinks = (0..n_heads).map(|_| bits(random, 3.0)).collect();
        Self {
            segments: segments.to_vec(),
            n_heads,
            qkv,
            keys,
            values,
            sinks,
        }
    }

    /// A step of one row a segment; those of a set have the first one's keys and values in the first
    /// pages. Sets are runs of sequences, and how many pages those have in common.
    fn sharing(random: &mut Random, starts: &[usize], sets: &[Set], n_heads: usize) -> Self {
        let segments: Vec<Segment> = starts.iter().map(|&start| (start, 1)).collect();
        let mut pass = Self::new(random, &segments, n_heads);
        for (sequences, n_pages) in sets {
            let common = n_pages * PAGE_POSITIONS * N_KV_HEADS * HEAD_DIM;
            for of_all in [&mut pass.keys, &mut pass.values] {
                let of_first = of_all[sequences.start][..common].to_vec();
                for sequence in sequences.clone() {
                    of_all[sequence][..common].copy_from_slice(&of_first);
                }
            }
        }
        pass
    }

    fn n_rows(&self) -> usize {
        self.segments.iter().map(|&(_, n)| n).sum()
    }

    fn width(&self) -> usize {
        (self.n_heads + 2 * N_KV_HEADS) * HEAD_DIM
    }

    /// As `Row` in kernels/common.cuh.
    fn rows(&self) -> Vec<[u32; 4]> {
        let mut rows = Vec::new();
        for (sequence, &(start, n)) in self.segments.iter().enumerate() {
            let first = rows.len();
            let [segment_row, segment_end] = [first as u32, (first + n) as u32];
            rows.extend(
                (start..start + n)
                    .map(|position| [sequence as u32, position as u32, segment_row, segment_end]),
            );
        }
        rows
    }

    fn blocks(&self, a_block: usize) -> Vec<[u32; 2]> {
        let mut blocks = Vec::new();
        let mut row = 0;
        for &(_, n) in &self.segments {
            let starts = (0..n).step_by(a_block);
            blocks.extend(starts.map(|skip| [(row + skip) as u32, a_block.min(n - skip) as u32]));
            row += n;
        }
        blocks
    }

    /// Holders of `n_positions` positions each, NaN where nothing was written: positions `range`
    /// of a sequence lie in `holder(sequence, position)`.
    fn cache(
        &self,
        n_holders: usize,
        n_positions: usize,
        range: impl Fn(Segment) -> std::ops::Range<usize>,
        holder: impl Fn(usize, usize) -> usize,
    ) -> Vec<u16> {
        let a_head = 2 * n_positions * HEAD_DIM;
        let mut cache = vec![NAN; n_holders * N_LAYERS * N_KV_HEADS * a_head];
        for (sequence, &segment) in self.segments.iter().enumerate() {
            for position in range(segment) {
                let of_layer = holder(sequence, position) * N_LAYERS + LAYER;
                for kv_head in 0..N_KV_HEADS {
                    let key = (of_layer * N_KV_HEADS + kv_head) * a_head
                        + position % n_positions * HEAD_DIM;
                    let value = key + n_positions * HEAD_DIM;
                    let from = (position * N_KV_HEADS + kv_head) * HEAD_DIM;
                    let from = from..from + HEAD_DIM;
                    cache[key..key + HEAD_DIM].copy_from_slice(&self.keys[sequence][from.clone()]);
                    cache[value..value + HEAD_DIM].copy_from_slice(&self.values[sequence][from]);
                }
            }
        }
        cache
    }

    /// Outputs of a row's head by plain sums.
    fn expected(&self, row: usize, head: usize, sliding: bool) -> Vec<f64> {
        let [sequence, position, ..] = self.rows()[row].map(|word| word as usize);
        let kv_head = head / (self.n_heads / N_KV_HEADS);
        let float = |bits: u16| f64::from(bf16::to_f32(bits));
        let query = &self.qkv[row * self.width() + head * HEAD_DIM..][..HEAD_DIM];
        let first = if sliding {
            (position + 1).saturating_sub(WINDOW)
        } else {
            0
        };
        let at = |position: usize| (position * N_KV_HEADS + kv_head) * HEAD_DIM;
        let score = |position: usize| {
            let key = &self.keys[sequence][at(position)..][..HEAD_DIM];
            let products = query.iter().zip(key).map(|(&q, &k)| float(q) * float(k));
            products.sum::<f64>() * f64::from(SCALE)
        };
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let sink = float(self.sinks[head]);
        let most = scores.iter().fold(sink, |most, &score| most.max(score));
        let mut sum = (sink - most).exp();
        let mut out = vec![0.0; HEAD_DIM];
        for (i, score) in scores.into_iter().enumerate() {
            let p = (score - most).exp();
            sum += p;
            let value = &self.values[sequence][at(first + i)..][..HEAD_DIM];
            for (out, &value) in out.iter_mut().zip(value) {
                *out += p * float(value);
            }
        }
        out.iter().map(|out| out / sum).collect()
    }
}

/// What of a pass lies on the device.
struct OnDevice {
    qkv: DeviceBuffer<u16>,
    rows: DeviceBuffer<u32>,
    sinks: DeviceBuffer<u16>,
    pages: DeviceBuffer<u16>,
    rings: DeviceBuffer<u16>,
    page_table: DeviceBuffer<u32>,
    max_pages: usize,
}

impl OnDevice {
    fn new(device: &Arc<Device>, pass: &Pass) -> Self {
        let ends = pass.segments.iter().map(|&(start, n)| start + n);
        let max_pages = ends.max().unwrap().div_ceil(PAGE_POSITIONS);
        let n_sequences = pass.segments.len();
        // Pages lie in no order: their number has no factor in common with 7.
        let n_pages = (n_sequences * max_pages).next_multiple_of(7) + 1;
        let page = |sequence: usize, index: usize| (sequence * max_pages + index) * 7 % n_pages;
        let page_table: Vec<u32> = (0..n_sequences * max_pages)
            .map(|i| page(i / max_pages, i % max_pages) as u32)
            .collect();
        let pages = pass.cache(
            n_pages,
            PAGE_POSITIONS,
            |(start, n)| 0..start + n,
            |sequence, position| page(sequence, position / PAGE_POSITIONS),
        );
        // A ring has not yet what the pass brings.
        let rings = pass.cache(
            n_sequences,
            RING,
            |(start, _)| start.saturating_sub(RING)..start,
            |sequence, _| sequence,
        );
        Self {
            qkv: upload(device, &pass.qkv),
            rows: upload(device, &pass.rows().concat()),
            sinks: upload(device, &pass.sinks),
            pages: upload(device, &pages),
            rings: upload(device, &rings),
            page_table: upload(device, &page_table),
            max_pages,
        }
    }

    fn args(&self, n_heads: usize, sliding: bool) -> AttentionArgs {
        AttentionArgs {
            qkv: self.qkv.at(0),
            rows: self.rows.at(0),
            sinks: self.sinks.at(0),
            cache: if sliding {
                self.rings.at(0)
            } else {
                self.pages.at(0)
            },
            page_table: self.page_table.at(0),
            n_heads: n_heads as u32,
            n_kv_heads: N_KV_HEADS as u32,
            layer: LAYER as u32,
            n_layers: N_LAYERS as u32,
            max_pages: self.max_pages as u32,
            ring: RING as u32,
            window: WINDOW as u32,
            max_splits: self.max_pages as u32,
            scale: SCALE,
            ..AttentionArgs::default()
        }
    }

    /// Outputs of a prefill pass, or of a step that has all rows of it.
    fn attend(
        &self,
        device: &Arc<Device>,
        kernels: &Kernels,
        pass: &Pass,
        sliding: bool,
        is_step: bool,
    ) -> Vec<u16> {
        let n_rows = pass.n_rows();
        let out: DeviceBuffer<u16> = device
            .alloc("outputs", n_rows * pass.n_heads * HEAD_DIM)
            .unwrap();
        out.fill(0, out.len(), 0xFF).unwrap();
        let mut args = AttentionArgs {
            out: out.at(0),
            ..self.args(pass.n_heads, sliding)
        };
        if is_step {
            let splits = n_rows * pass.n_heads * self.max_pages * (HEAD_DIM + 2);
            let partial: DeviceBuffer<f32> = device.alloc("splits", splits).unwrap();
            args.partial = partial.at(0);
            kernels.attention_decode(sliding, &args, n_rows).unwrap();
            device.synchronize().unwrap();
        } else {
            let blocks = pass.blocks(kernels.attention_rows());
            let on_device = upload(device, &blocks.concat());
            args.blocks = on_device.at(0);
            kernels.attention(sliding, &args, blocks.len()).unwrap();
            device.synchronize().unwrap();
        }
        let mut values = vec![0; out.len()];
        out.download(0, &mut values).unwrap();
        values
    }
}

/// Rows that share pages, by items of them whole or cut, with the bits of rows that read them alone.
fn check_sharing(
    device: &Arc<Device>,
    both: &[Kernels; 2],
    starts: &[usize],
    sets: &[Set],
    group: usize,
) {
    let n_heads = group * N_KV_HEADS;
    let mut random = Random(starts.iter().sum::<usize>() as u64);
    let pass = Pass::sharing(&mut random, starts, sets, n_heads);
    let on_device = OnDevice::new(device, &pass);
    let alone = on_device.attend(device, &both[1], &pass, false, true);
    let max_pages = on_device.max_pages;
    let mut page_table = vec![0; on_device.page_table.len()];
    on_device.page_table.download(0, &mut page_table).unwrap();
    for (sequences, n_pages) in sets {
        let of_first = page_table[sequences.start * max_pages..][..*n_pages].to_vec();
        for sequence in sequences.clone() {
            page_table[sequence * max_pages..][..*n_pages].copy_from_slice(&of_first);
        }
    }
    on_device.page_table.upload(0, &page_table).unwrap();
    let live: Vec<LiveRow<'_>> = (0..starts.len())
        .map(|row| LiveRow {
            row: row as u32,
            sequence: row as u32,
            pages: &page_table[row * max_pages..][..(starts[row] + 1) / PAGE_POSITIONS],
        })
        .collect();
    for (kernels, name) in both.iter().zip(["warpgroups", "warps"]) {
        for n_items in [1, 100] {
            let sharing = Sharing::new(starts.len(), &live, kernels.shared_rows(), n_items);
            assert!(!sharing.items.is_empty(), "something is shared");
            let n_splits = starts.len() * n_heads * max_pages * (HEAD_DIM + 2);
            let out: DeviceBuffer<u16> = device.alloc("outputs", alone.len()).unwrap();
            let partial: DeviceBuffer<f32> = device.alloc("splits", n_splits).unwrap();
            out.fill(0, out.len(), 0xFF).unwrap();
            partial.fill(0, partial.len(), 0xFF).unwrap();
            let items = upload(device, &sharing.items);
            let n_shared = upload(device, &[sharing.items.len() as u32]);
            let shared = upload(device, &sharing.rows);
            let args = AttentionArgs {
                cache_map: kernels.cache_map(&on_device.pages).unwrap(),
                out: out.at(0),
                partial: partial.at(0),
                items: items.at(0),
                n_items: n_shared.at(0),
                shared: shared.at(0),
                ..on_device.args(n_heads, false)
            };
            kernels
                .attention_decode(false, &args, starts.len())
                .unwrap();
            device.synchronize().unwrap();
            let mut got = vec![0; out.len()];
            out.download(0, &mut got).unwrap();
            let what = format!("group {group}, {name}, {n_items} items, {starts:?}, {sets:?}");
            same(&got, &alone, &pass, &what);
        }
    }
}

fn same(got: &[u16], expected: &[u16], pass: &Pass, what: &str) {
    let a_row = pass.n_heads * HEAD_DIM;
    let differ = (0..got.len()).filter(|&i| got[i] != expected[i]);
    let places: Vec<usize> = differ.collect();
    let Some(&i) = places.first() else {
        return;
    };
    let [sequence, position, ..] = pass.rows()[i / a_row];
    panic!(
        "{what}: {} of {} outputs differ, the first of sequence {sequence} (row {}, position \
         {position}), head {}, dim {}: {} for {}",
        places.len(),
        got.len(),
        i / a_row,
        i % a_row / HEAD_DIM,
        i % HEAD_DIM,
        bf16::to_f32(got[i]),
        bf16::to_f32(expected[i])
    );
}

fn check(device: &Arc<Device>, both: &[Kernels; 2], segments: &[Segment], group: usize) {
    let n_heads = group * N_KV_HEADS;
    let mut random = Random(
        segments
            .iter()
            .map(|&(start, n)| (start * 4099 + n) as u64)
            .sum(),
    );
    let pass = Pass::new(&mut random, segments, n_heads);
    let on_device = OnDevice::new(device, &pass);
    for sliding in [false, true] {
        let what = format!("group {group}, {segments:?}, sliding {sliding}");
        let [warpgroups, warps] = both
            .each_ref()
            .map(|kernels| on_device.attend(device, kernels, &pass, sliding, false));
        // Plain sums first: of two kernels that differ they tell which is wrong.
        for (kernel, outputs) in [("warps", &warps), ("warpgroups", &warpgroups)] {
            for row in (0..pass.n_rows()).step_by(5) {
                let head = row % n_heads;
                let got = &outputs[(row * n_heads + head) * HEAD_DIM..][..HEAD_DIM];
                for (dim, expected) in pass.expected(row, head, sliding).into_iter().enumerate() {
                    let error = (f64::from(bf16::to_f32(got[dim])) - expected).abs();
                    assert!(
                        error <= ERROR,
                        "{what}, {kernel}: row {row}, head {head}, dim {dim}: {} for {expected}",
                        bf16::to_f32(got[dim])
                    );
                }
            }
        }
        same(&warpgroups, &warps, &pass, &what);
        if !sliding {
            let step = on_device.attend(device, &both[0], &pass, sliding, true);
            same(&warpgroups, &step, &pass, &format!("{what}, as a step"));
        }
    }
}

/// Starts at the borders of tiles, windows and splits.
const STARTS: [usize; 9] = [0, 1, 63, 64, 100, 255, 256, 300, 1000];

fn check_group(group: usize) {
    let device = Device::open(0).expect("a GPU with a driver");
    let both = both_kernels(&device, group);
    for n_rows in [1, 7, 8, 15, 16, 17, 63, 64, 65, 130] {
        check(&device, &both, &STARTS.map(|start| (start, n_rows)), group);
    }
    // More blocks than a GPU runs at once; splits in one pass; rows beside long ones.
    check(
        &device,
        &both,
        &[(0, 1500), (1000, 5), (300, 333), (7, 1)],
        group,
    );
}

fn check_sharing_group(group: usize) {
    let device = Device::open(0).expect("a GPU with a driver");
    let both = both_kernels(&device, group);
    // Rows at the border of the shared pages, and far behind.
    let starts = |n: usize, shared: usize| -> Vec<usize> {
        let first = shared * PAGE_POSITIONS;
        (0..n)
            .map(|row| first + [0, 1, 63, 255, 256, 700][row % 6])
            .collect()
    };
    for n_rows in [2, 8, 9, 16, 17, 40] {
        for n_pages in [1, 2, 5] {
            let sets = [(0..n_rows, n_pages)];
            check_sharing(&device, &both, &starts(n_rows, n_pages), &sets, group);
        }
    }
    // Sets of their own, a row alone, a set within a set, and more items than blocks.
    let mut many = starts(30, 3);
    many.extend([5, 300]);
    let sets = [(0..20, 2), (20..30, 3), (3..9, 3)];
    check_sharing(&device, &both, &many, &sets, group);
    let sets: Vec<Set> = (0..70).map(|set| (set * 2..set * 2 + 2, 3)).collect();
    check_sharing(&device, &both, &starts(140, 3), &sets, group);
}

#[test]
#[ignore = "needs a GPU"]
fn shared_pages_are_attended_as_by_rows_alone() {
    for group in [8, 3, 16, 25] {
        check_sharing_group(group);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn warpgroups_attend_as_warps_do() {
    check_group(8);
}

#[test]
#[ignore = "needs a GPU"]
fn warpgroups_that_are_not_full_attend_as_warps_do() {
    check_group(3);
}
