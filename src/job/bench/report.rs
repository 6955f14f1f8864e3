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

/// What the machine could give.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Limits {
    /// Measured in this process.
    pub bytes_per_s: f64,
    /// `copied` within the memory, read and written bytes counted, or `read`.
    pub bytes_are: &'static str,
    pub flops_per_s: Option<f64>,
    /// `measured` in this process, or `nominal`: what the matrix units could do at their highest
    /// clock.
    pub flops_are: &'static str,
}

/// What a step asks of a GPU besides its kernels.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Asked {
    /// By the host: a graph is one.
    pub launches: f64,
    pub allocations: f64,
    pub waits: f64,
    pub bytes_to_host: f64,
    pub bytes_to_device: f64,
}

/// A workload's figures; those of a step are means over the decode steps of the last repeat.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    pub schema: &'static str,
    pub model: String,
    pub device: String,
    pub numerics: String,
    pub workload: String,
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
    pub share_of_bandwidth: Option<f64>,
    pub limits: Limits,
    pub prefill_flops_per_s: Option<Spread>,
    pub decode_flops_per_s: Option<Spread>,
    pub experts_hit: f64,
    pub experts_by_chance: f64,
    /// Nothing on the CPU.
    pub step_asked: Option<Asked>,
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

/// Tokens a second, those of a CPU with their fractions.
fn rate(spread: Option<Spread>) -> String {
    spread.map_or(String::new(), |spread| digits(spread, spread.median))
}

fn digits(of: Spread, value: f64) -> String {
    let digits = match of.median {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

fn with_spread(spread: Option<Spread>) -> String {
    spread.map_or("not measured".to_owned(), |spread| {
        let in_digits = |value| digits(spread, value);
        format!(
            "{} ({} to {})",
            in_digits(spread.median),
            in_digits(spread.least),
            in_digits(spread.most)
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
             tok/s\n  step {} ms, {:.2} GB a step, {} % of the {:.0} GB/s {}; {:.1} of {:.1} experts \
             hit\n",
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
            figure(self.share_of_bandwidth, 100.0, 0),
            self.limits.bytes_per_s / 1e9,
            self.limits.bytes_are,
            self.experts_hit,
            self.experts_by_chance,
        );
        let tflops = |spread| figure(median(spread), 1e-12, 2);
        let limit = self.limits.flops_per_s.map_or(String::new(), |limit| {
            let share = |spread| figure(median(spread).map(|flops| flops / limit), 100.0, 0);
            format!(
                ": {} % and {} % of the {} {:.2}",
                share(self.prefill_flops_per_s),
                share(self.decode_flops_per_s),
                self.limits.flops_are,
                limit / 1e12
            )
        });
        text += &format!(
            "  {} TFLOP/s in prefill, {} in decode{limit}\n",
            tflops(self.prefill_flops_per_s),
            tflops(self.decode_flops_per_s),
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
        if let Some(asked) = self.step_asked {
            text += &format!(
                "  a step: {:.2} launches, {:.2} allocations, {:.2} waits, {:.0} bytes to the host, \
                 {:.0} to the device\n",
                asked.launches,
                asked.allocations,
                asked.waits,
                asked.bytes_to_host,
                asked.bytes_to_device,
            );
        }
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
            "of memory %",
            "prefill TFLOP/s",
            "live %",
        ],
    );
    for report in reports {
        table.push(vec![
            report.workload.clone(),
            rate(report.output_tokens_per_s),
            rate(report.decode_tokens_per_s),
            rate(report.prefill_tokens_per_s),
            figure(median(report.decode_step_ms), 1.0, 2),
            figure(
                Some(report.step_weight_bytes + report.step_kv_bytes),
                1e-9,
                2,
            ),
            figure(report.share_of_bandwidth, 100.0, 0),
            figure(median(report.prefill_flops_per_s), 1e-12, 2),
            figure(median(report.live_share), 100.0, 1),
        ]);
    }
    table.render(false)
}
