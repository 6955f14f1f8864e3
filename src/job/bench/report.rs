//! What a workload came to, as an object, in words, and as a row of a table.

use crate::engine::BackendMemory;
use crate::report::table::{Align, Table};

/// A number over the repeats.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Nothing for no numbers.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            least: *values.first()?,
            most: *values.last()?,
        })
    }
}

/// A workload's figures; those of a step are means over the decode steps of the last repeat.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    pub schema: &'static str,
    pub model: String,
    pub device: String,
    pub numerics: String,
    pub workload: &'static str,
    pub rows: usize,
    pub slots: usize,
    pub shared_tokens: usize,
    pub prompt_tokens: String,
    pub output_tokens: String,
    /// Whether the order of the rows was made without their lengths.
    pub lengths_hidden: bool,
    pub repeats: usize,
    pub prefill_tokens_per_s: Option<Spread>,
    pub decode_tokens_per_s: Option<Spread>,
    pub output_tokens_per_s: Option<Spread>,
    /// Output tokens a second against those of b256, where both ran.
    pub of_yardstick: Option<f64>,
    /// Slots that had a row, of all, while rows were waiting.
    pub live_share: Option<Spread>,
    pub evicted_rows: usize,
    pub decode_step_ms: Option<Spread>,
    pub step_weight_bytes: f64,
    pub step_kv_bytes: f64,
    pub share_of_copy_bandwidth: Option<f64>,
    pub copy_bytes_per_s: f64,
    pub prefill_flops_per_s: Option<Spread>,
    pub decode_flops_per_s: Option<Spread>,
    /// What the device's multiprocessors could do at their highest clock, not measured.
    pub nominal_flops_per_s: Option<f64>,
    pub experts_hit: f64,
    pub experts_by_chance: f64,
    pub step_allocations: f64,
    pub step_waits: f64,
    pub step_bytes_to_host: f64,
    pub step_bytes_to_device: f64,
    /// Launches by the host: a graph is one.
    pub step_launches: f64,
    pub memory: BackendMemory,
    pub kernels: Option<serde_json::Value>,
}

fn median(spread: Option<Spread>) -> Option<f64> {
    spread.map(|spread| spread.median)
}

/// A figure, or nothing where it was not measured.
fn figure(value: Option<f64>, scale: f64, digits: usize) -> String {
    value.map_or(String::new(), |value| format!("{:.digits$}", value * scale))
}

fn with_spread(spread: Option<Spread>) -> String {
    spread.map_or("not measured".to_owned(), |spread| {
        format!(
            "{:.0} ({:.0} to {:.0})",
            spread.median, spread.least, spread.most
        )
    })
}

impl Report {
    /// Sets a workload of rows of all lengths beside the yardstick.
    pub fn set_beside(&mut self, yardstick: Option<&Self>) {
        let rate = |report: &Self| median(report.output_tokens_per_s);
        if let (Some(ours), Some(theirs)) = (rate(self), yardstick.and_then(rate)) {
            self.of_yardstick = Some(ours / theirs);
        }
    }

    pub fn text(&self) -> String {
        let mut text = format!(
            "{}: {} x {}+{}/{}, {} slots\n  prefill {} tok/s, decode {} tok/s, whole {} output \
             tok/s\n  step {} ms, {:.2} GB a step, {} % of the copy bandwidth; {:.1} of {:.1} \
             experts hit\n",
            self.workload,
            self.rows,
            self.shared_tokens,
            self.prompt_tokens,
            self.output_tokens,
            self.slots,
            with_spread(self.prefill_tokens_per_s),
            with_spread(self.decode_tokens_per_s),
            with_spread(self.output_tokens_per_s),
            figure(median(self.decode_step_ms), 1.0, 3),
            (self.step_weight_bytes + self.step_kv_bytes) / 1e9,
            figure(self.share_of_copy_bandwidth, 100.0, 0),
            self.experts_hit,
            self.experts_by_chance,
        );
        let tflops = |spread| figure(median(spread), 1e-12, 0);
        text += &format!(
            "  {} TFLOP/s in prefill, {} in decode{}\n",
            tflops(self.prefill_flops_per_s),
            tflops(self.decode_flops_per_s),
            self.nominal_flops_per_s.map_or(String::new(), |nominal| {
                let share = median(self.prefill_flops_per_s).map(|flops| flops / nominal);
                format!(
                    "; prefill is {} % of the nominal {:.0}",
                    figure(share, 100.0, 0),
                    nominal / 1e12
                )
            }),
        );
        if let Some(live) = self.live_share {
            text += &format!(
                "  {:.1} % of the row-steps were live while rows waited, {} rows evicted{}{}\n",
                100.0 * live.median,
                self.evicted_rows,
                if self.lengths_hidden {
                    ", lengths hidden from the order"
                } else {
                    ""
                },
                self.of_yardstick.map_or(String::new(), |share| {
                    format!("; {:.0} % of b256's output tok/s", 100.0 * share)
                }),
            );
        }
        text += &format!(
            "  a step: {:.2} launches, {:.2} allocations, {:.2} waits, {:.0} bytes to the host, \
             {:.0} to the device\n",
            self.step_launches,
            self.step_allocations,
            self.step_waits,
            self.step_bytes_to_host,
            self.step_bytes_to_device,
        );
        let phases = self.kernels.iter().flat_map(|kernels| kernels.as_object());
        for (phase, times) in phases.flatten() {
            text += &format!("  {phase}\n");
            for time in times.as_array().into_iter().flatten() {
                text += &format!(
                    "    {:<28} {:>5} launches {:>9.3} ms\n",
                    time[0].as_str().unwrap_or_default(),
                    time[1],
                    time[2].as_f64().unwrap_or_default()
                );
            }
        }
        text
    }
}

/// All workloads, a row each.
pub fn table(reports: &[Report]) -> String {
    let mut alignment = [Align::Right; 9];
    alignment[0] = Align::Left;
    let mut table = Table::with_header(
        &alignment,
        &[
            "workload",
            "output tok/s",
            "decode",
            "prefill",
            "step ms",
            "GB a step",
            "of copy %",
            "prefill TFLOP/s",
            "live %",
        ],
    );
    for report in reports {
        table.push(vec![
            report.workload.to_owned(),
            figure(median(report.output_tokens_per_s), 1.0, 0),
            figure(median(report.decode_tokens_per_s), 1.0, 0),
            figure(median(report.prefill_tokens_per_s), 1.0, 0),
            figure(median(report.decode_step_ms), 1.0, 2),
            figure(
                Some(report.step_weight_bytes + report.step_kv_bytes),
                1e-9,
                2,
            ),
            figure(report.share_of_copy_bandwidth, 100.0, 0),
            figure(median(report.prefill_flops_per_s), 1e-12, 0),
            figure(median(report.live_share), 100.0, 1),
        ]);
    }
    table.render(false)
}
