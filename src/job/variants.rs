//! `podium bench --variants`: how long every block shape of each product takes at some numbers of
//! rows, all layers' weights one after the other so that none is in L2. What `engine/cuda/variants`
//! chooses can be held against it.

use std::sync::Arc;

use super::JobError;
use crate::cli::print;
use crate::engine::EngineError;
use crate::engine::cuda::buffer::DeviceBuffer;
use crate::engine::cuda::launch::{Dense, ExpertBuffers, MatmulArgs, MoeArgs};
use crate::engine::cuda::model::{Experts, Projection};
use crate::engine::cuda::pack;
use crate::engine::cuda::places;
use crate::engine::cuda::variants;
use crate::engine::cuda::{CudaError, Loaded};
use crate::engine::sample::philox4x32;

/// Times of one is measured so often; the least is told.
const REPEATS: usize = 3;

/// Prints a table a product.
///
/// # Errors
/// The driver fails, or memory is short.
pub fn time_variants(loaded: &Arc<Loaded>, rows: &[usize]) -> Result<(), JobError> {
    let most = rows.iter().copied().max().unwrap_or(1);
    let bench = Bench::new(loaded, most).map_err(EngineError::from)?;
    for &n_rows in rows {
        bench.run(n_rows).map_err(EngineError::from)?;
    }
    Ok(())
}

/// Buffers that every product takes.
struct Bench<'a> {
    loaded: &'a Loaded,
    x: DeviceBuffer<u16>,
    act: DeviceBuffer<u16>,
    out: DeviceBuffer<f32>,
    rows: DeviceBuffer<u32>,
    rope: DeviceBuffer<f32>,
    experts: DeviceBuffer<u32>,
    offsets: DeviceBuffer<u32>,
    entries: DeviceBuffer<u32>,
    places: DeviceBuffer<u32>,
    listed: DeviceBuffer<u32>,
    exchange: DeviceBuffer<f32>,
    x_tiles: DeviceBuffer<u16>,
    act_tiles: DeviceBuffer<u16>,
}

impl<'a> Bench<'a> {
    fn new(loaded: &'a Arc<Loaded>, most: usize) -> Result<Self, CudaError> {
        let (device, config) = (&loaded.device, &loaded.model.config);
        let k = config.n_experts_per_token;
        let width = config.qkv_width().max(config.hidden);
        let x = device.alloc("inputs", most * width)?;
        loaded
            .kernels
            .fill_bf16(x.at(0), x.len() as u64, 1, 0.0, 1.0)?;
        let outputs = (most.min(256) * config.n_vocab).max(most * k * config.hidden);
        let n_octets = places::n_octets(most * k, config.n_experts);
        let tiles = |n_k| device.alloc("tiles", places::tiles_len(n_octets, n_k));
        let rows: Vec<u32> = (0..most as u32).flat_map(|r| [0, 0, r, r + 1]).collect();
        let bench = Self {
            loaded,
            x,
            act: device.alloc("activations", most * k * config.intermediate)?,
            out: device.alloc("outputs", outputs)?,
            rows: device.alloc("rows", rows.len())?,
            rope: device.alloc("angles", config.head_dim)?,
            experts: device.alloc("experts", most * k)?,
            offsets: device.alloc("offsets", config.n_experts + 1)?,
            entries: device.alloc("entries", most * k)?,
            places: device.alloc("places", n_octets * places::OCTET)?,
            listed: device.alloc("token tiles", n_octets * places::LISTED_WORDS)?,
            exchange: device.alloc("sums", variants::exchange_len(config.hidden, most))?,
            x_tiles: tiles(config.hidden)?,
            act_tiles: tiles(config.intermediate)?,
        };
        bench.rows.upload(0, &rows)?;
        bench.rope.fill(0, config.head_dim, 0)?;
        Ok(bench)
    }

    /// Sends every row to `k` experts by chance; the share of the experts that have a token.
    fn route(&self, n_rows: usize) -> Result<f64, CudaError> {
        let config = &self.loaded.model.config;
        let (n, k) = (config.n_experts, config.n_experts_per_token);
        let mut experts = Vec::new();
        for row in 0..n_rows {
            let mut chosen: Vec<usize> = Vec::new();
            for draw in 0u32.. {
                let [word, ..] = philox4x32([row as u32, draw, 0, 0], [7, 9]);
                let expert = word as usize % n;
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
                if chosen.len() == k {
                    break;
                }
            }
            experts.extend(chosen.iter().map(|&expert| expert as u32));
        }
        self.experts.upload(0, &experts)?;
        experts.sort_unstable();
        experts.dedup();
        Ok(experts.len() as f64 / n as f64)
    }

    fn run(&self, n_rows: usize) -> Result<(), CudaError> {
        let model = &self.loaded.model;
        let kernels = &self.loaded.kernels;
        let hit = self.route(n_rows)?;
        let layers = &model.layers;
        let qkv: Vec<&Projection> = layers.iter().map(|layer| &layer.qkv).collect();
        let out: Vec<&Projection> = layers.iter().map(|layer| &layer.out).collect();
        let products = [(Dense::Qkv, qkv), (Dense::Add, out)];
        for (which, projections) in products {
            self.dense(which, &projections, n_rows)?;
        }
        if n_rows <= 256 {
            self.dense(Dense::Logits, &[&model.lm_head], n_rows)?;
        }
        for index in 0..kernels.n_moe() {
            // Of both products, and of what sorts the entries before them.
            let mut times = [f64::INFINITY; 3];
            for _ in 0..REPEATS {
                let mut sums = [0.0; 3];
                for layer in layers {
                    let (up, down) = (
                        self.experts(&layer.gate_up, true),
                        self.experts(&layer.down, false),
                    );
                    let timed = kernels.timed(|| {
                        kernels.experts_variant(&self.buffers(), &up, &down, n_rows, index)
                    })?;
                    for (name, _, ms) in timed {
                        let which = ["gate_up", "down"].map(|product| name.contains(product));
                        sums[which.iter().position(|&is| is).unwrap_or(2)] += ms;
                    }
                }
                times = std::array::from_fn(|i| times[i].min(sums[i]));
            }
            for (what, experts, ms) in [
                ("gate_up", &layers[0].gate_up, times[0]),
                ("down", &layers[0].down, times[1]),
            ] {
                let bytes = experts.tiles.n_bytes() as f64 * hit;
                let flops = 2.0
                    * (n_rows * model.config.n_experts_per_token * experts.n_out * experts.n_k)
                        as f64;
                self.tell(
                    what,
                    kernels.moe_name(index),
                    n_rows,
                    ms / layers.len() as f64,
                    bytes,
                    flops,
                );
            }
            print::result(&format!(
                "{:<8} {n_rows:>5} rows {:<10} {:>8.1} us",
                "sorting",
                kernels.moe_name(index),
                1000.0 * times[2] / layers.len() as f64
            ));
        }
        Ok(())
    }

    fn dense(
        &self,
        which: Dense,
        projections: &[&Projection],
        n_rows: usize,
    ) -> Result<(), CudaError> {
        let kernels = &self.loaded.kernels;
        for index in 0..kernels.n_dense(which) {
            if !kernels.dense_fits(which, index, &self.matmul(projections[0], n_rows)) {
                continue;
            }
            let mut best = f64::INFINITY;
            for _ in 0..REPEATS {
                let mut sum = 0.0;
                for projection in projections {
                    let args = self.matmul(projection, n_rows);
                    let timed = kernels.timed(|| kernels.matmul_variant(which, index, &args))?;
                    sum += timed.iter().map(|(.., ms)| ms).sum::<f64>();
                }
                best = best.min(sum / projections.len() as f64);
            }
            let projection = projections[0];
            let flops = 2.0 * (n_rows * projection.n_out * projection.n_k) as f64;
            let chosen = kernels.chosen_dense(which, &self.matmul(projection, n_rows)) == index;
            let name = format!(
                "{}{}",
                kernels.dense_name(which, index),
                if chosen { "*" } else { "" }
            );
            let bytes = projection.tiles.n_bytes() as f64;
            self.tell(
                &format!("{which:?}").to_lowercase(),
                &name,
                n_rows,
                best,
                bytes,
                flops,
            );
        }
        Ok(())
    }

    fn tell(&self, what: &str, name: &str, n_rows: usize, ms: f64, bytes: f64, flops: f64) {
        print::result(&format!(
            "{what:<8} {n_rows:>5} rows {name:<10} {:>8.1} us {:>6.2} TB/s {:>6.1} TFLOP/s",
            1000.0 * ms,
            bytes / ms / 1e9,
            flops / ms / 1e9
        ));
    }

    fn matmul(&self, projection: &Projection, n_rows: usize) -> MatmulArgs {
        let config = &self.loaded.model.config;
        MatmulArgs {
            weights: projection.tiles.at(0),
            bias: projection.bias.as_ref().map_or(0, |bias| bias.at(0)),
            x: self.x.at(0),
            out: self.out.at(0),
            qkv: self.act.at(0),
            rows: self.rows.at(0),
            rope: self.rope.at(0),
            exchange: self.exchange.at(0),
            n_rows: n_rows as u32,
            n_out: projection.n_out as u32,
            n_k: projection.n_k as u32,
            n_tiles: pack::n_tiles(projection.n_out) as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            ..MatmulArgs::default()
        }
    }

    fn buffers(&self) -> ExpertBuffers {
        ExpertBuffers {
            t: self.x.at(0),
            act: self.act.at(0),
            y: self.out.at(0),
            experts: self.experts.at(0),
            offsets: self.offsets.at(0),
            entries: self.entries.at(0),
            places: self.places.at(0),
            listed: self.listed.at(0),
            t_tiles: self.x_tiles.at(0),
            act_tiles: self.act_tiles.at(0),
        }
    }

    fn experts(&self, experts: &Experts, is_up: bool) -> MoeArgs {
        let config = &self.loaded.model.config;
        MoeArgs {
            weights: experts.tiles.at(0),
            bias: experts.bias.at(0),
            k: config.n_experts_per_token as u32,
            n_k: experts.n_k as u32,
            n_tiles: pack::n_tiles(experts.n_out) as u32,
            n_out: if is_up {
                config.intermediate
            } else {
                experts.n_out
            } as u32,
            limit: config.swiglu_limit,
            ..MoeArgs::default()
        }
    }
}
