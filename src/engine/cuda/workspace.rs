//! The device memory of all passes: KV arena, activations, tables. Allocated once, by the lengths
//! of [`super::memory`].

use std::sync::Arc;

use super::buffer::{DeviceBuffer, Plain};
use super::decode::{Event as StepEvent, Slot};
use super::device::Device;
use super::error::CudaError;
use super::memory::{KvGeometry, Lengths};
use super::sharing::SharedItem;
use crate::engine::EngineShape;
use crate::engine::config::ModelConfig;

/// As `Row` in kernels/common.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Row {
    pub sequence: u32,
    pub position: u32,
    pub segment_row: u32,
    pub segment_end: u32,
}

// SAFETY: four words.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for Row {}

/// Buffers of all passes; lengths and meanings in [`Lengths`].
pub struct Workspace {
    pub lengths: Lengths,
    pub pages: DeviceBuffer<u16>,
    pub rings: DeviceBuffer<u16>,
    pub x: DeviceBuffer<f32>,
    pub t: DeviceBuffer<u16>,
    pub qkv: DeviceBuffer<u16>,
    pub attended: DeviceBuffer<u16>,
    pub experts: DeviceBuffer<u32>,
    pub gates: DeviceBuffer<f32>,
    pub offsets: DeviceBuffer<u32>,
    pub entries: DeviceBuffer<u32>,
    pub act: DeviceBuffer<u16>,
    pub places: DeviceBuffer<u32>,
    pub listed: DeviceBuffer<u32>,
    pub y: DeviceBuffer<u16>,
    pub exchange: DeviceBuffer<f32>,
    pub logits: DeviceBuffer<f32>,
    pub maxima: DeviceBuffer<u32>,
    pub sample_partials: DeviceBuffer<u64>,
    pub rope: DeviceBuffer<f32>,
    pub page_table: DeviceBuffer<u32>,
    pub partial: DeviceBuffer<f32>,
    pub rows: DeviceBuffer<Row>,
    pub tokens: DeviceBuffer<u32>,
    pub blocks: DeviceBuffer<[u32; 2]>,
    pub slots: DeviceBuffer<Slot>,
    pub slot_of: DeviceBuffer<u32>,
    pub items: DeviceBuffer<SharedItem>,
    pub n_items: DeviceBuffer<u32>,
    pub shared: DeviceBuffer<[u32; 2]>,
    pub step: DeviceBuffer<u32>,
    pub events: DeviceBuffer<StepEvent>,
}

impl Workspace {
    pub(super) fn new(
        device: &Arc<Device>,
        config: &ModelConfig,
        shape: &EngineShape,
    ) -> Result<Self, CudaError> {
        let lengths = Lengths::new(config, shape);
        let geometry = KvGeometry::new(config);
        let n_sequences = shape.n_slots + shape.n_forks;
        let what = "activations";
        let work = Self {
            lengths,
            pages: device.alloc("KV pages", shape.n_pages.saturating_mul(geometry.page_len))?,
            rings: device.alloc("KV rings", n_sequences.saturating_mul(geometry.ring_len))?,
            x: device.alloc(what, lengths.x)?,
            t: device.alloc(what, lengths.t)?,
            qkv: device.alloc(what, lengths.qkv)?,
            attended: device.alloc(what, lengths.attended)?,
            experts: device.alloc(what, lengths.entries)?,
            gates: device.alloc(what, lengths.entries)?,
            offsets: device.alloc(what, lengths.offsets)?,
            entries: device.alloc(what, lengths.entries)?,
            act: device.alloc(what, lengths.act)?,
            places: device.alloc(what, lengths.places)?,
            listed: device.alloc(what, lengths.listed)?,
            y: device.alloc(what, lengths.y)?,
            exchange: device.alloc(what, lengths.exchange)?,
            logits: device.alloc("logits", lengths.logits)?,
            maxima: device.alloc("logits", lengths.step_rows)?,
            sample_partials: device.alloc("logits", lengths.sample_partials)?,
            rope: device.alloc("rotary table", lengths.rope)?,
            page_table: device.alloc("page table", lengths.page_table)?,
            partial: device.alloc("attention splits", lengths.partial)?,
            rows: device.alloc("rows", lengths.max_rows)?,
            tokens: device.alloc("tokens", lengths.max_rows)?,
            blocks: device.alloc("attention blocks", lengths.max_rows)?,
            slots: device.alloc("slots", shape.n_slots)?,
            slot_of: device.alloc("slots", lengths.step_rows)?,
            items: device.alloc("shared pages", lengths.items)?,
            n_items: device.alloc("shared pages", 1)?,
            shared: device.alloc("shared pages", lengths.step_rows)?,
            step: device.alloc("step counter", 1)?,
            events: device.alloc("events", lengths.events)?,
        };
        work.rope
            .upload(0, &rope_table(config, shape.max_context))?;
        // What is read before it is first written: padding rows' inputs. Any value will do, but
        // the same in every run.
        work.x.fill(0, lengths.x, 0)?;
        work.t.fill(0, lengths.t, 0)?;
        work.attended.fill(0, lengths.attended, 0)?;
        work.y.fill(0, lengths.y, 0)?;
        work.act.fill(0, lengths.act, 0)?;
        // Sampling leaves zeros for the next step.
        work.maxima.fill(0, lengths.step_rows, 0)?;
        Ok(work)
    }

    pub(super) fn kv_bytes(&self) -> u64 {
        self.pages.n_bytes() + self.rings.n_bytes()
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        let two = [&self.t, &self.qkv, &self.attended, &self.act, &self.y];
        let words = [
            &self.x,
            &self.gates,
            &self.exchange,
            &self.logits,
            &self.rope,
            &self.partial,
        ];
        let counts = [
            &self.experts,
            &self.offsets,
            &self.entries,
            &self.places,
            &self.listed,
            &self.page_table,
            &self.tokens,
            &self.slot_of,
            &self.maxima,
            &self.n_items,
            &self.step,
        ];
        two.iter().map(|buffer| buffer.n_bytes()).sum::<u64>()
            + words.iter().map(|buffer| buffer.n_bytes()).sum::<u64>()
            + counts.iter().map(|buffer| buffer.n_bytes()).sum::<u64>()
            + self.sample_partials.n_bytes()
            + self.rows.n_bytes()
            + self.blocks.n_bytes()
            + self.slots.n_bytes()
            + self.items.n_bytes()
            + self.shared.n_bytes()
            + self.events.n_bytes()
    }

    /// Fills all activations with NaN: nothing in them outlives a pass.
    pub(super) fn poison(&self) -> Result<(), CudaError> {
        self.x.fill(0, self.x.len(), 0xFF)?;
        self.t.fill(0, self.t.len(), 0xFF)?;
        self.qkv.fill(0, self.qkv.len(), 0xFF)?;
        self.attended.fill(0, self.attended.len(), 0xFF)?;
        self.act.fill(0, self.act.len(), 0xFF)?;
        self.y.fill(0, self.y.len(), 0xFF)?;
        self.gates.fill(0, self.gates.len(), 0xFF)?;
        self.partial.fill(0, self.partial.len(), 0xFF)?;
        self.exchange.fill(0, self.exchange.len(), 0xFF)?;
        self.logits.fill(0, self.logits.len(), 0xFF)
    }
}

/// cos and sin of all positions, as in `cpu/rope.rs`.
fn rope_table(config: &ModelConfig, max_context: usize) -> Vec<f32> {
    let head_dim = config.head_dim;
    let (frequencies, concentration) = config.rope_frequencies();
    let mut values = vec![0.0; max_context * head_dim];
    for (position, row) in values.chunks_exact_mut(head_dim).enumerate() {
        let (cos, sin) = row.split_at_mut(head_dim / 2);
        for (pair, &frequency) in frequencies.iter().enumerate() {
            // The angle is an f32 product, as in transformers; its cos is not.
            let angle = f64::from(position as f32 * frequency);
            cos[pair] = (angle.cos() * f64::from(concentration)) as f32;
            sin[pair] = (angle.sin() * f64::from(concentration)) as f32;
        }
    }
    values
}
